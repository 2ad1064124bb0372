//! QEMU's control channel, as little of it as tests and benches need, without an async runtime.

use anyhow::{Context as _, Result, bail, ensure};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use serde_json::{Value, json};
use std::{
    collections::VecDeque,
    fs::File,
    io::{BufRead as _, BufReader, IoSlice, Write as _},
    mem::MaybeUninit,
    os::{fd::AsFd as _, unix::net::UnixStream},
    path::Path,
    process::Child,
    time::{Duration, Instant},
};

/// A connection to QEMU.
#[derive(Debug)]
pub struct Qmp {
    writer: UnixStream,
    reader: BufReader<UnixStream>,
    events: VecDeque<Value>,
}

impl Qmp {
    /// Connects to the socket of a QEMU that was started just now. No answer takes longer than `limit`.
    ///
    /// # Errors
    /// When QEMU ends, or has no socket in time.
    pub fn connect(path: &Path, child: &mut Child, limit: Duration) -> Result<Self> {
        let deadline = Instant::now() + Duration::from_secs(30);
        let writer = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(err) => {
                    if let Some(status) = child.try_wait()? {
                        bail!("it ended ({status})");
                    }
                    ensure!(Instant::now() < deadline, "no control channel: {err}");
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
        };
        writer.set_read_timeout(Some(limit))?;
        let reader = BufReader::new(writer.try_clone()?);
        let mut qmp = Self { writer, reader, events: VecDeque::new() };
        qmp.read()?;
        qmp.call("qmp_capabilities", &json!({}))?;
        Ok(qmp)
    }

    fn read(&mut self) -> Result<Value> {
        let mut line = String::new();
        ensure!(
            self.reader.read_line(&mut line).context("QEMU does not answer on its control channel")? > 0,
            "QEMU closed its control channel"
        );
        Ok(serde_json::from_str(&line)?)
    }

    /// Forgets the events that have come.
    pub fn forget_events(&mut self) {
        self.events.clear();
    }

    /// Has a command done and returns its result.
    ///
    /// # Errors
    /// When QEMU refuses, is gone, or does not answer in time.
    pub fn call(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let line = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
        self.writer.write_all(line.as_bytes())?;
        self.reply(command)
    }

    /// The same with a file handed over.
    ///
    /// # Errors
    /// As [`Qmp::call`].
    pub fn call_with_fd(&mut self, command: &str, arguments: &Value, file: &File) -> Result<Value> {
        let line = format!("{}\n", json!({ "execute": command, "arguments": arguments }));
        let fds = [file.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        ensure!(control.push(SendAncillaryMessage::ScmRights(&fds)), "no room for a descriptor");
        let sent = sendmsg(&self.writer, &[IoSlice::new(line.as_bytes())], &mut control, SendFlags::empty())?;
        ensure!(sent == line.len(), "QEMU's control channel takes only {sent} bytes");
        self.reply(command)
    }

    fn reply(&mut self, command: &str) -> Result<Value> {
        loop {
            let mut message = self.read()?;
            if message.get("event").is_some() {
                self.events.push_back(message);
            } else if let Some(value) = message.get_mut("return") {
                return Ok(value.take());
            } else {
                bail!("QEMU refused {command}: {}", message["error"]["desc"]);
            }
        }
    }

    /// When the next event of this name happened, since 1970; waits for it.
    ///
    /// # Errors
    /// When QEMU is gone, or it does not happen in time.
    pub fn event(&mut self, name: &str) -> Result<Duration> {
        loop {
            let event = match self.events.pop_front() {
                Some(event) => event,
                None => self.read().with_context(|| format!("No event {name} from QEMU"))?,
            };
            if event["event"] == name {
                let time = |field: &str| event["timestamp"][field].as_u64().unwrap_or(0);
                return Ok(Duration::from_secs(time("seconds")) + Duration::from_micros(time("microseconds")));
            }
        }
    }
}
