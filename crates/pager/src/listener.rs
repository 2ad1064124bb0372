//! The control socket: reads requests, acts on the family, writes answers.

use crate::{
    control::{ControlError, PingReply, Request, SpecReply},
    family::Family,
};
use ramet_wire::control::{self, json};
use std::{os::unix::net::UnixListener, path::Path, sync::Arc};

/// Longest request line: paths and identifiers only.
const MAX_LINE: u64 = 64 << 10;

/// Serves the control socket at `path` for ever, each connection on its own thread. `listen` is where pages are served.
///
/// # Errors
/// When the socket can't be made.
pub fn serve(path: &Path, family: &Arc<Family>, listen: Option<&str>) -> std::io::Result<()> {
    // A pager before this one may have left its socket.
    let _ = std::fs::remove_file(path);
    let listener = UnixListener::bind(path)?;
    let (family, listen) = (family.clone(), listen.map(str::to_owned));
    control::serve(&listener, MAX_LINE, move |request| act(request, &family, listen.as_deref()));
    Ok(())
}

fn act(request: Request, family: &Arc<Family>, listen: Option<&str>) -> Result<serde_json::Value, ControlError> {
    match request {
        Request::Ping => json(PingReply::here(env!("CARGO_PKG_VERSION"), listen)),
        Request::Attach { vm, shim_sock, pid, view } => json(family.attach(vm, &shim_sock, pid, view)?),
        Request::Detach { vm } => json(family.detach(vm)?),
        Request::CheckpointPrepare { vm, image, layer } => json(family.prepare(vm, image, layer)?),
        Request::CheckpointCommit { vm } => json(family.commit(vm)?),
        Request::CheckpointAbort { vm } => json(family.abort(vm)?),
        Request::ImageSpec { image } => json(SpecReply { path: family.write_spec(image)? }),
        Request::ImageAdd { image, spec_path, source } => json(family.add_image(image, &spec_path, &source)?),
        Request::ImageDrop { image } => json(family.drop_image(image)?),
        Request::ImageWait { image } => json(family.wait_image(image)?),
        Request::ImageColor { image, cpus, path, base } => json(family.color_image(image, cpus, &path, base)?),
        Request::ImageChanged { image, since } => json(family.compare_images(image, since)?),
        Request::ImageStatus { image } => json(family.report_image(image)?),
        Request::SetSource { old, new } => json(family.set_source(&old, &new)?),
        Request::Stats => json(family.stats()),
        Request::Shutdown { force } => {
            let vms = family.vm_count();
            if vms > 0 && !force {
                return Err(ControlError::new("in_use", format!("{vms} VMs would stall without their pager")));
            }
            // Everything is on record: the end of this process loses nothing.
            control::end_soon();
            json(())
        }
    }
}
