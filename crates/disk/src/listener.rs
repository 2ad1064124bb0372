//! The control socket: reads requests, acts on the disks, writes answers.

use crate::{
    control::{ControlError, MAX_LINE, PingReply, Request},
    host::Host,
};
use ramet_wire::control::{self, json};
use std::{
    fs,
    os::unix::{fs::PermissionsExt, net::UnixListener},
    path::Path,
    sync::Arc,
};

/// Serves the control socket at `path` for ever, each connection on its own thread. `listen` is where pages are served.
///
/// # Errors
/// When the socket cannot be made.
pub fn serve(path: &Path, host: &Arc<Host>, listen: Option<&str>) -> std::io::Result<()> {
    // One before may have left its socket. The directory may be entered by all, the socket is the owner's from the start.
    let new = path.with_extension("sock-new");
    let _ = fs::remove_file(&new);
    let listener = UnixListener::bind(&new)?;
    fs::set_permissions(&new, fs::Permissions::from_mode(0o600))?;
    fs::rename(&new, path)?;
    let (host, listen) = (host.clone(), listen.map(str::to_owned));
    control::serve(&listener, MAX_LINE, move |request| act(request, &host, listen.as_deref()));
    Ok(())
}

fn act(request: Request, host: &Arc<Host>, listen: Option<&str>) -> Result<serde_json::Value, ControlError> {
    match request {
        Request::Ping => json(PingReply::here(env!("CARGO_PKG_VERSION"), listen)),
        Request::FrozenAdd { disk, chain } => json(host.add_frozen(disk, chain)?),
        Request::Extents { disk } => json(host.extents(disk)?),
        Request::RemoteAdd { disk, size, golden, extents, sources } => {
            json(host.add_remote(disk, size, golden.as_deref(), extents, sources)?)
        }
        Request::Sources { disk, sources } => json(host.set_sources(disk, sources)?),
        Request::Drop { disk } => json(host.drop_disk(disk)?),
        Request::Status => json(host.status()),
        Request::Shutdown => {
            host.end_exports();
            // Everything is on record: the end of this process loses nothing.
            control::end_soon();
            json(())
        }
    }
}
