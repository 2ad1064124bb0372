//! What rametd and the processes that serve pages on its host say to each other: one JSON object a line, over a Unix socket.
//!
//! Each kind of process (`ramet-pager`, `ramet-disk`) has requests and replies of its own; what frames them is here.

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use serde_json::Value;
use std::{
    io::{BufRead, BufReader, Read, Write},
    os::unix::net::{UnixListener, UnixStream},
    sync::Arc,
    time::Duration,
};

/// A process of another host that has pages.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SourceAddress {
    /// `IP:PORT`.
    pub addr: String,
    /// The name in its host's certificate.
    pub name: String,
}

/// An answer: either `ok` or `error`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Response {
    /// The reply that the request's documentation names; `null` where it names none.
    Ok(Value),
    /// What went wrong. Nothing half-made is left.
    Error(ControlError),
}

/// A refused or failed request.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct ControlError {
    /// For programs: `no_such_vm`, `no_such_image`, `no_such_disk`, `exists`, `in_use`, `bad_request`, `state`, `broken` or
    /// `internal`.
    pub code: String,
    /// For people: names the thing and, where there is one, the remedy.
    pub message: String,
}

impl ControlError {
    /// An error with this code and text.
    pub fn new(code: &str, message: impl Into<String>) -> Self {
        Self { code: code.to_owned(), message: message.into() }
    }
}

/// Answers `ping`, which every kind of process knows.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PingReply {
    /// The process's version.
    pub version: String,
    /// Its number.
    pub pid: u32,
    /// Where it serves pages to other hosts; `None` when started without `--listen`.
    pub listen: Option<String>,
}

impl PingReply {
    /// Of this process, which serves pages at `listen`.
    #[must_use]
    pub fn here(version: &str, listen: Option<&str>) -> Self {
        Self { version: version.to_owned(), pid: std::process::id(), listen: listen.map(str::to_owned) }
    }
}

/// A reply as the line has it.
///
/// # Errors
/// When it can't be said in JSON.
pub fn json(value: impl Serialize) -> Result<Value, ControlError> {
    serde_json::to_value(value).map_err(|err| ControlError::new("internal", err.to_string()))
}

/// Serves control connections for ever, each on a thread of its own. A line of more than `max_line` bytes is answered as what
/// it is, no request, and ends its connection.
pub fn serve<R: DeserializeOwned>(
    listener: &UnixListener,
    max_line: u64,
    act: impl Fn(R) -> Result<Value, ControlError> + Send + Sync + 'static,
) {
    let act = Arc::new(act);
    for stream in listener.incoming() {
        let act = act.clone();
        let spawned = stream.and_then(|stream| {
            let body = move || converse(&stream, max_line, &*act);
            std::thread::Builder::new().name("control".into()).spawn(body)
        });
        if let Err(err) = spawned {
            tracing::warn!(error = %err, "a control connection could not be served");
        }
    }
}

fn converse<R: DeserializeOwned>(stream: &UnixStream, max_line: u64, act: &dyn Fn(R) -> Result<Value, ControlError>) {
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    loop {
        line.clear();
        match (&mut reader).take(max_line).read_line(&mut line) {
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        let response = match serde_json::from_str(&line) {
            Ok(request) => act(request).map_or_else(Response::Error, Response::Ok),
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

/// Ends this process, once the answer to the request for that is sent.
pub fn end_soon() {
    std::thread::spawn(|| {
        std::thread::sleep(Duration::from_millis(50));
        rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::TERM)
    });
}
