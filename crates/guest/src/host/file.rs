//! Files into and out of the guest.

use super::{AgentClient, AgentError, ExecEvents, from_json, to_json, unexpected};
use crate::protocol::{FileGet, FileInfo, FilePut, MAX_PAYLOAD, kind};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::timeout;

impl AgentClient {
    /// Writes a file of `size` bytes in the guest, with these permission bits. It appears under its absolute path only
    /// when it is complete, and replaces a file of that name.
    pub async fn put_file(
        &self,
        path: &str,
        mode: u32,
        size: u64,
        mut from: impl AsyncRead + Unpin,
    ) -> Result<(), AgentError> {
        let request = FilePut { path: path.to_owned(), mode, size };
        let (mut input, mut events, _) = self.open_stream(kind::FILE_PUT, &to_json(&request)?)?;
        let stalled = || AgentError::TimedOut { what: "put_file", limit: self.limit };
        let mut buffer = vec![0; MAX_PAYLOAD];
        let mut left = size;
        while left > 0 {
            let want = usize::try_from(left).map_or(buffer.len(), |left| left.min(buffer.len()));
            let read = from.read(&mut buffer[..want]).await.map_err(|error| host("reading the file", error))?;
            if read == 0 {
                return Err(AgentError::Host {
                    what: "reading the file",
                    reason: format!("it ended {left} bytes before its size of {size}"),
                });
            }
            match timeout(self.limit, input.write_all(&buffer[..read])).await {
                Err(_) => return Err(stalled()),
                // The guest's own reason comes as an event.
                Ok(Err(AgentError::InputClosed)) => break,
                Ok(other) => other?,
            }
            left -= read as u64;
        }
        drop(input);
        events.set_deadline(self.limit);
        match events.next_frame("put_file").await? {
            Some((kind::EXIT, _)) => Ok(()),
            Some((other, _)) => Err(unexpected(other)),
            None => Err(self.channel.why_closed()),
        }
    }

    /// Reads a file of the guest into `to`, and tells its permission bits and its size.
    pub async fn get_file(&self, path: &str, mut to: impl AsyncWrite + Unpin) -> Result<FileInfo, AgentError> {
        let request = FileGet { path: path.to_owned() };
        let (input, mut events, _) = self.open_stream(kind::FILE_GET, &to_json(&request)?)?;
        let result = self.take_file(&mut events, &mut to).await;
        drop(input);
        result
    }

    async fn take_file(
        &self,
        events: &mut ExecEvents,
        to: &mut (impl AsyncWrite + Unpin),
    ) -> Result<FileInfo, AgentError> {
        let mut info: Option<FileInfo> = None;
        loop {
            events.set_deadline(self.limit);
            match (events.next_frame("get_file").await?, info) {
                (Some((kind::FILE_INFO, json)), None) => info = Some(from_json(&json)?),
                (Some((kind::STDOUT, bytes)), Some(_)) => {
                    to.write_all(&bytes).await.map_err(|error| host("writing the file", error))?;
                }
                (Some((kind::EXIT, _)), Some(info)) => {
                    to.flush().await.map_err(|error| host("writing the file", error))?;
                    return Ok(info);
                }
                (Some((other, _)), _) => return Err(unexpected(other)),
                (None, _) => return Err(self.channel.why_closed()),
            }
        }
    }
}

fn host(what: &'static str, error: std::io::Error) -> AgentError {
    AgentError::Host { what, reason: error.to_string() }
}
