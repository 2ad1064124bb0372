//! QMP, QEMU's machine protocol: a thin client.
//!
//! One JSON object a line. Events and fields that this client does not know pass through or are ignored, since QEMU's newer
//! versions have more of them. Descriptors travel with the first byte of a command.

use crate::VmmError;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};
use std::{
    collections::HashMap,
    io::{self, IoSlice},
    mem::MaybeUninit,
    os::fd::{AsFd, BorrowedFd},
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, SystemTime},
};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Interest},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::{broadcast, oneshot},
};

/// Longest line that is accepted. QEMU's longest known answers have some tens of KiB.
const MAX_LINE: u64 = 1 << 20;

/// An event of QEMU's.
#[derive(Debug, Clone, PartialEq)]
pub struct Event {
    /// Its name, such as `STOP`.
    pub name: String,
    /// Its data; `null` when there is none.
    pub data: Value,
    /// When it happened, by QEMU's clock.
    pub at: SystemTime,
}

/// What a line from QEMU is.
#[derive(Debug, Clone, PartialEq)]
enum Line {
    Greeting,
    Event(Event),
    Answer { id: u64, result: Result<Value, String> },
    Unknown,
}

fn parse(line: &str) -> Line {
    let Ok(Value::Object(mut object)) = serde_json::from_str::<Value>(line) else { return Line::Unknown };
    if object.contains_key("QMP") {
        return Line::Greeting;
    }
    if let Some(Value::String(name)) = object.remove("event") {
        let number =
            |field: &str| object.get("timestamp").and_then(|t| t.get(field)).and_then(Value::as_u64).unwrap_or(0);
        let since = Duration::from_secs(number("seconds")) + Duration::from_micros(number("microseconds").min(999_999));
        let at = SystemTime::UNIX_EPOCH.checked_add(since).unwrap_or(SystemTime::UNIX_EPOCH);
        return Line::Event(Event { name, data: object.remove("data").unwrap_or(Value::Null), at });
    }
    let Some(id) = object.get("id").and_then(Value::as_u64) else { return Line::Unknown };
    match (object.remove("return"), object.remove("error")) {
        (Some(value), _) => Line::Answer { id, result: Ok(value) },
        (None, Some(error)) => {
            let text = error.get("desc").and_then(Value::as_str).unwrap_or("no reason given").to_owned();
            Line::Answer { id, result: Err(text) }
        }
        (None, None) => Line::Unknown,
    }
}

type Pending = Arc<Mutex<HashMap<u64, oneshot::Sender<Result<Value, String>>>>>;

/// A connection to one QEMU.
#[derive(Debug)]
pub struct Qmp {
    writer: tokio::sync::Mutex<OwnedWriteHalf>,
    pending: Pending,
    next: AtomicU64,
    events: broadcast::Sender<Event>,
}

impl Qmp {
    /// Connects and leaves QEMU's negotiation mode.
    ///
    /// # Errors
    /// When nobody listens at `path` or the greeting does not come in time.
    pub async fn connect(path: &Path, limit: Duration) -> Result<Self, VmmError> {
        let timeout = |_| VmmError::Timeout { command: "connect".to_owned(), limit };
        let stream = UnixStream::connect(path).await.map_err(VmmError::Connection)?;
        let (read, write) = stream.into_split();
        let mut reader = BufReader::new(read);
        let mut line = String::new();
        let greeting = async { (&mut reader).take(MAX_LINE).read_line(&mut line).await };
        tokio::time::timeout(limit, greeting).await.map_err(timeout)?.map_err(VmmError::Connection)?;
        if parse(&line) != Line::Greeting {
            return Err(VmmError::Connection(io::Error::other("no QMP greeting came")));
        }
        let (events, _) = broadcast::channel(256);
        let qmp = Self { writer: write.into(), pending: Pending::default(), next: AtomicU64::new(1), events };
        tokio::spawn(read_lines(reader, qmp.pending.clone(), qmp.events.clone()));
        qmp.execute("qmp_capabilities", Value::Null, limit).await?;
        Ok(qmp)
    }

    /// Events from now on.
    #[must_use]
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.events.subscribe()
    }

    /// Runs a command and returns its answer.
    ///
    /// # Errors
    /// [`VmmError::Refused`] with QEMU's reason, [`VmmError::Timeout`], [`VmmError::Connection`].
    pub async fn execute(&self, command: &str, arguments: Value, limit: Duration) -> Result<Value, VmmError> {
        self.send(command, arguments, None, limit).await
    }

    /// The same, passing a descriptor (for `getfd`).
    ///
    /// # Errors
    /// As [`Qmp::execute`].
    pub async fn execute_with(
        &self,
        command: &str,
        arguments: Value,
        fd: BorrowedFd<'_>,
        limit: Duration,
    ) -> Result<Value, VmmError> {
        self.send(command, arguments, Some(fd), limit).await
    }

    async fn send(
        &self,
        command: &str,
        arguments: Value,
        fd: Option<BorrowedFd<'_>>,
        limit: Duration,
    ) -> Result<Value, VmmError> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let mut object = json!({ "execute": command, "id": id });
        if !arguments.is_null() {
            object["arguments"] = arguments;
        }
        tracing::trace!(%object, "to QEMU");
        let mut line = object.to_string().into_bytes();
        line.push(b'\n');
        let (tell, answer) = oneshot::channel();
        self.pending.lock().unwrap_or_else(PoisonError::into_inner).insert(id, tell);
        let asked = async {
            self.write(&line, fd).await.map_err(VmmError::Connection)?;
            answer.await.map_err(|_| VmmError::Connection(io::ErrorKind::UnexpectedEof.into()))
        };
        let answer = tokio::time::timeout(limit, asked).await;
        self.pending.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
        match answer {
            Ok(Ok(Ok(value))) => Ok(value),
            Ok(Ok(Err(message))) => Err(VmmError::Refused { command: command.to_owned(), message }),
            Ok(Err(err)) => Err(err),
            Err(_) => Err(VmmError::Timeout { command: command.to_owned(), limit }),
        }
    }

    async fn write(&self, line: &[u8], fd: Option<BorrowedFd<'_>>) -> io::Result<()> {
        let mut writer = self.writer.lock().await;
        let mut sent = 0;
        if let Some(fd) = fd {
            let stream: &UnixStream = writer.as_ref();
            sent = loop {
                stream.writable().await?;
                let send = || {
                    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
                    let mut control = SendAncillaryBuffer::new(&mut space);
                    let fds = [fd];
                    control.push(SendAncillaryMessage::ScmRights(&fds));
                    Ok(sendmsg(stream.as_fd(), &[IoSlice::new(line)], &mut control, SendFlags::NOSIGNAL)?)
                };
                match stream.try_io(Interest::WRITABLE, send) {
                    Err(err) if err.kind() == io::ErrorKind::WouldBlock => {}
                    done => break done?,
                }
            };
        }
        writer.write_all(&line[sent..]).await
    }
}

async fn read_lines(mut reader: BufReader<OwnedReadHalf>, pending: Pending, events: broadcast::Sender<Event>) {
    let mut line = String::new();
    loop {
        line.clear();
        match (&mut reader).take(MAX_LINE).read_line(&mut line).await {
            Ok(n) if n > 0 && line.ends_with('\n') => {}
            // The end, an error, or a line beyond the limit: nothing after it could be understood.
            _ => break,
        }
        match parse(&line) {
            Line::Event(event) => {
                let _ = events.send(event);
            }
            Line::Answer { id, result } => {
                let waiting = pending.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
                if let Some(waiting) = waiting {
                    let _ = waiting.send(result);
                }
            }
            Line::Greeting | Line::Unknown => {}
        }
    }
    // Whoever waits for an answer learns that none will come.
    pending.lock().unwrap_or_else(PoisonError::into_inner).clear();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_told_apart_and_unknown_ones_do_no_harm() {
        assert_eq!(parse(r#"{"QMP": {"version": {}, "new": 1}}"#), Line::Greeting);
        let answer = parse(r#"{"return": {"a": 1}, "id": 7, "new": []}"#);
        assert_eq!(answer, Line::Answer { id: 7, result: Ok(json!({"a": 1})) });
        let answer = parse(r#"{"error": {"class": "X", "desc": "no"}, "id": 8}"#);
        assert_eq!(answer, Line::Answer { id: 8, result: Err("no".into()) });
        match parse(r#"{"event": "NEVER_HEARD_OF", "timestamp": {"seconds": 5, "microseconds": 7}, "data": {"x": 1}}"#)
        {
            Line::Event(event) => {
                assert_eq!(event.name, "NEVER_HEARD_OF");
                assert_eq!(event.at, SystemTime::UNIX_EPOCH + Duration::from_micros(5_000_007));
            }
            other => panic!("{other:?}"),
        }
        for odd in [
            "",
            "{",
            "[]",
            "7",
            r#"{"id": -1, "return": 1}"#,
            r#"{"event": 3}"#,
            r#"{"event":"E","timestamp":{"seconds":18446744073709551615}}"#,
        ] {
            let _ = parse(odd);
        }
    }

    #[tokio::test]
    async fn an_endless_line_ends_the_connection() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("qmp");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(b"{\"QMP\": {}}\n").await.unwrap();
            let mut command = [0; 1024];
            let _ = stream.read(&mut command).await;
            let block = vec![b'x'; 64 << 10];
            while stream.write_all(&block).await.is_ok() {}
        });
        let result = Qmp::connect(&path, Duration::from_secs(10)).await;
        assert!(matches!(result, Err(VmmError::Connection(_))), "{result:?}");
    }
}
