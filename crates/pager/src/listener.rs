//! The control socket: reads requests, acts on the family, writes answers.

use crate::{
    control::{ControlError, PingReply, Request, Response, SpecReply},
    family::Family,
};
use serde::Serialize;
use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    path::Path,
    sync::Arc,
};

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
    for stream in listener.incoming() {
        let (family, listen) = (family.clone(), listen.map(str::to_owned));
        let spawned = stream.and_then(|stream| {
            let body = move || converse(&stream, &family, listen.as_deref());
            std::thread::Builder::new().name("control".into()).spawn(body)
        });
        if let Err(err) = spawned {
            tracing::warn!(error = %err, "a control connection could not be served");
        }
    }
    Ok(())
}

fn converse(stream: &UnixStream, family: &Arc<Family>, listen: Option<&str>) {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    loop {
        line.clear();
        match (&mut reader).take(MAX_LINE).read_line(&mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let response = match serde_json::from_str(&line) {
            Ok(request) => act(request, family, listen).map_or_else(Response::Error, Response::Ok),
            Err(err) => Response::Error(ControlError::new("bad_request", format!("not a request: {err}"))),
        };
        let Ok(mut bytes) = serde_json::to_vec(&response) else { return };
        bytes.push(b'\n');
        let mut out = stream;
        if out.write_all(&bytes).is_err() {
            return;
        }
    }
}

fn json(value: impl Serialize) -> Result<serde_json::Value, ControlError> {
    serde_json::to_value(value).map_err(|err| ControlError::new("internal", err.to_string()))
}

fn act(request: Request, family: &Arc<Family>, listen: Option<&str>) -> Result<serde_json::Value, ControlError> {
    match request {
        Request::Ping => json(PingReply {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            listen: listen.map(str::to_owned),
        }),
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
            std::thread::spawn(|| {
                std::thread::sleep(std::time::Duration::from_millis(50));
                rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::TERM)
            });
            json(())
        }
    }
}
