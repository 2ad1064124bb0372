//! The control socket: reads requests, acts on the disks, writes answers.

use crate::{
    control::{ControlError, MAX_LINE, PingReply, Request, Response},
    host::Host,
};
use serde::Serialize;
use std::{
    fs,
    io::{BufRead, BufReader, Read, Write},
    os::unix::{
        fs::PermissionsExt,
        net::{UnixListener, UnixStream},
    },
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
    for stream in listener.incoming() {
        let (host, listen) = (host.clone(), listen.map(str::to_owned));
        let spawned = stream.and_then(|stream| {
            let body = move || converse(&stream, &host, listen.as_deref());
            std::thread::Builder::new().name("control".into()).spawn(body)
        });
        if let Err(err) = spawned {
            tracing::warn!(error = %err, "a control connection could not be served");
        }
    }
    Ok(())
}

fn converse(stream: &UnixStream, host: &Arc<Host>, listen: Option<&str>) {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    loop {
        line.clear();
        match (&mut reader).take(MAX_LINE).read_line(&mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let response = match serde_json::from_str(&line) {
            Ok(request) => act(request, host, listen).map_or_else(Response::Error, Response::Ok),
            Err(err) => Response::Error(ControlError::new("bad_request", format!("not a request: {err}"))),
        };
        let Ok(mut bytes) = serde_json::to_vec(&response) else { return };
        bytes.push(b'\n');
        let mut out = stream;
        if out.write_all(&bytes).is_err() || !line.ends_with('\n') {
            return;
        }
    }
}

fn json(value: impl Serialize) -> Result<serde_json::Value, ControlError> {
    serde_json::to_value(value).map_err(|err| ControlError::new("internal", err.to_string()))
}

fn act(request: Request, host: &Arc<Host>, listen: Option<&str>) -> Result<serde_json::Value, ControlError> {
    match request {
        Request::Ping => json(PingReply {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            listen: listen.map(str::to_owned),
        }),
        Request::FrozenAdd { disk, chain } => json(host.add_frozen(disk, chain)?),
        Request::Extents { disk } => json(host.extents(disk)?),
        Request::RemoteAdd { disk, size, golden, extents, sources } => {
            json(host.add_remote(disk, size, golden.as_deref(), extents, sources)?)
        }
        Request::Drop { disk } => json(host.drop_disk(disk)?),
        Request::Status => json(host.status()),
        Request::Shutdown => {
            host.end_exports();
            // Everything is on record: the end of this process loses nothing.
            std::thread::spawn(|| {
                std::thread::sleep(std::time::Duration::from_millis(50));
                rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::TERM)
            });
            json(())
        }
    }
}
