//! Running commands in a guest: the frames on an upgraded `exec` connection.
//!
//! A frame is `kind: u8`, `length: u32` little-endian (at most [`MAX_PAYLOAD`]), and the payload. The client's first
//! frame is [`Kind::Request`]; the daemon ends with [`Kind::Exit`] or [`Kind::Error`].

use std::{collections::BTreeMap, io};

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use utoipa::ToSchema;

use crate::transport::BoxIo;

/// Largest payload of a frame.
pub const MAX_PAYLOAD: usize = 64 << 10;

/// What to run.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ExecRequest {
    /// The command and its arguments; the guest searches its PATH.
    pub argv: Vec<String>,
    /// Environment variables to set, over the agent's own.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Working directory; default `/`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// On a terminal of its own.
    #[serde(default)]
    pub tty: bool,
    /// Standard input will come; otherwise it is empty.
    #[serde(default)]
    pub stdin: bool,
    /// Lines of the terminal, when `tty`; 0: the guest's default.
    #[serde(default)]
    pub rows: u16,
    /// Columns of the terminal, when `tty`; 0: the guest's default.
    #[serde(default)]
    pub cols: u16,
}

impl ExecRequest {
    /// A command without standard input.
    pub fn new<S: Into<String>>(argv: impl IntoIterator<Item = S>) -> Self {
        Self { argv: argv.into_iter().map(Into::into).collect(), ..Self::default() }
    }
}

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// To the daemon, first: an [`ExecRequest`] as JSON.
    Request = 0,
    /// To the daemon: bytes for standard input.
    Stdin = 1,
    /// To the daemon: the end of standard input.
    StdinEof = 2,
    /// To the daemon: one byte, a signal's number.
    Signal = 3,
    /// To the daemon: the terminal's new size: lines and columns, u16 little-endian each.
    Resize = 4,
    /// From the daemon: bytes of standard output.
    Stdout = 0x81,
    /// From the daemon: bytes of standard error.
    Stderr = 0x82,
    /// From the daemon, last: the exit code, i32 little-endian; 128 and the signal's number when one ended the command.
    Exit = 0x83,
    /// From the daemon, last: why there is no exit code.
    Error = 0x84,
}

impl TryFrom<u8> for Kind {
    type Error = io::Error;
    fn try_from(byte: u8) -> io::Result<Self> {
        Ok(match byte {
            0 => Self::Request,
            1 => Self::Stdin,
            2 => Self::StdinEof,
            3 => Self::Signal,
            4 => Self::Resize,
            0x81 => Self::Stdout,
            0x82 => Self::Stderr,
            0x83 => Self::Exit,
            0x84 => Self::Error,
            _ => return Err(io::Error::new(io::ErrorKind::InvalidData, format!("Unknown exec frame {byte:#x}"))),
        })
    }
}

/// Writes one frame.
///
/// # Errors
/// Those of the stream, and a payload over [`MAX_PAYLOAD`].
pub async fn write_frame(out: &mut (impl AsyncWrite + Unpin), kind: Kind, payload: &[u8]) -> io::Result<()> {
    if payload.len() > MAX_PAYLOAD {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("Exec frame of {} bytes", payload.len())));
    }
    let mut frame = Vec::with_capacity(5 + payload.len());
    frame.push(kind as u8);
    frame.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    frame.extend_from_slice(payload);
    out.write_all(&frame).await?;
    out.flush().await
}

/// Reads one frame; none at the end of the stream.
///
/// # Errors
/// Those of the stream, an unknown kind, a payload over [`MAX_PAYLOAD`], an end in mid-frame.
pub async fn read_frame(input: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<(Kind, Vec<u8>)>> {
    let kind = match input.read_u8().await {
        Ok(byte) => Kind::try_from(byte)?,
        Err(err) if err.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        Err(err) => return Err(err),
    };
    let len = input.read_u32_le().await? as usize;
    if len > MAX_PAYLOAD {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("Exec frame of {len} bytes")));
    }
    let mut payload = vec![0; len];
    input.read_exact(&mut payload).await?;
    Ok(Some((kind, payload)))
}

/// What a command does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExecEvent {
    /// Bytes of its standard output.
    Stdout(Vec<u8>),
    /// Bytes of its standard error.
    Stderr(Vec<u8>),
    /// It ended with this code. The last event.
    Exit(i32),
    /// It could not be run, or the guest went away. The last event.
    Error(String),
}

/// Standard input and signals of a running command.
#[derive(Debug)]
pub struct ExecInput {
    io: tokio::io::WriteHalf<BoxIo>,
}

impl ExecInput {
    /// Sends bytes to standard input.
    ///
    /// # Errors
    /// When the connection is gone.
    pub async fn stdin(&mut self, bytes: &[u8]) -> io::Result<()> {
        for chunk in bytes.chunks(MAX_PAYLOAD) {
            write_frame(&mut self.io, Kind::Stdin, chunk).await?;
        }
        Ok(())
    }

    /// Ends standard input.
    ///
    /// # Errors
    /// When the connection is gone.
    pub async fn eof(&mut self) -> io::Result<()> {
        write_frame(&mut self.io, Kind::StdinEof, &[]).await
    }

    /// Sends a signal, such as 2 for SIGINT.
    ///
    /// # Errors
    /// When the connection is gone.
    pub async fn signal(&mut self, signal: u8) -> io::Result<()> {
        write_frame(&mut self.io, Kind::Signal, &[signal]).await
    }

    /// Tells the command's terminal its new size.
    ///
    /// # Errors
    /// When the connection is gone.
    pub async fn resize(&mut self, rows: u16, cols: u16) -> io::Result<()> {
        let ([r0, r1], [c0, c1]) = (rows.to_le_bytes(), cols.to_le_bytes());
        write_frame(&mut self.io, Kind::Resize, &[r0, r1, c0, c1]).await
    }
}

/// What a running command writes.
#[derive(Debug)]
pub struct ExecOutput {
    io: tokio::io::ReadHalf<BoxIo>,
}

impl ExecOutput {
    /// The next event; none when the connection ended without [`ExecEvent::Exit`] or [`ExecEvent::Error`] before.
    ///
    /// # Errors
    /// When the connection breaks, or what comes is no frame.
    pub async fn next(&mut self) -> io::Result<Option<ExecEvent>> {
        Ok(match read_frame(&mut self.io).await? {
            None => None,
            Some((Kind::Stdout, bytes)) => Some(ExecEvent::Stdout(bytes)),
            Some((Kind::Stderr, bytes)) => Some(ExecEvent::Stderr(bytes)),
            Some((Kind::Exit, bytes)) => {
                let code = <[u8; 4]>::try_from(bytes.as_slice())
                    .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "Bad exit frame"))?;
                Some(ExecEvent::Exit(i32::from_le_bytes(code)))
            }
            Some((Kind::Error, text)) => Some(ExecEvent::Error(String::from_utf8_lossy(&text).into_owned())),
            Some((kind, _)) => {
                return Err(io::Error::new(io::ErrorKind::InvalidData, format!("Unexpected exec frame {kind:?}")));
            }
        })
    }
}

/// A running command.
#[derive(Debug)]
pub struct ExecSession {
    /// To it.
    pub input: ExecInput,
    /// From it.
    pub output: ExecOutput,
}

/// All that a finished command wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecOutcome {
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
    /// Exit code.
    pub code: i32,
}

impl ExecOutcome {
    /// Standard output as text, without surrounding white space.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).trim().to_owned()
    }
}

impl ExecSession {
    pub(crate) fn new(io: BoxIo) -> Self {
        let (read, write) = tokio::io::split(io);
        Self { input: ExecInput { io: write }, output: ExecOutput { io: read } }
    }

    /// Waits for the end and collects what the command wrote, at most `limit` bytes of each stream (the rest is dropped).
    ///
    /// # Errors
    /// When the connection breaks or the command can't be run.
    pub async fn collect(mut self, limit: usize) -> io::Result<ExecOutcome> {
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let keep = |to: &mut Vec<u8>, bytes: Vec<u8>| {
            let room = limit.saturating_sub(to.len()).min(bytes.len());
            to.extend_from_slice(&bytes[..room]);
        };
        loop {
            match self.output.next().await? {
                Some(ExecEvent::Stdout(bytes)) => keep(&mut stdout, bytes),
                Some(ExecEvent::Stderr(bytes)) => keep(&mut stderr, bytes),
                Some(ExecEvent::Exit(code)) => return Ok(ExecOutcome { stdout, stderr, code }),
                Some(ExecEvent::Error(text)) => return Err(io::Error::other(text)),
                None => {
                    return Err(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        "The connection ended before the command",
                    ));
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn frames_round_trip_and_bad_ones_are_refused() {
        let mut wire = Vec::new();
        write_frame(&mut wire, Kind::Stdout, b"hello").await.unwrap();
        write_frame(&mut wire, Kind::Exit, &7i32.to_le_bytes()).await.unwrap();
        let mut input = wire.as_slice();
        assert_eq!(read_frame(&mut input).await.unwrap(), Some((Kind::Stdout, b"hello".to_vec())));
        assert_eq!(read_frame(&mut input).await.unwrap(), Some((Kind::Exit, vec![7, 0, 0, 0])));
        assert_eq!(read_frame(&mut input).await.unwrap(), None);

        assert!(read_frame(&mut [0x55, 0, 0, 0, 0].as_slice()).await.is_err(), "unknown kind");
        assert!(read_frame(&mut [1, 255, 255, 255, 255].as_slice()).await.is_err(), "too long");
        assert!(read_frame(&mut [1, 4, 0, 0, 0, 9].as_slice()).await.is_err(), "cut short");
        assert!(write_frame(&mut Vec::new(), Kind::Stdin, &vec![0; MAX_PAYLOAD + 1]).await.is_err());
    }

    #[tokio::test]
    async fn collect_keeps_no_more_than_the_limit() {
        let (ours, mut theirs) = tokio::io::duplex(1 << 16);
        for _ in 0..3 {
            write_frame(&mut theirs, Kind::Stdout, b"12345").await.unwrap();
        }
        write_frame(&mut theirs, Kind::Exit, &0i32.to_le_bytes()).await.unwrap();
        let outcome = ExecSession::new(BoxIo::new(ours)).collect(7).await.unwrap();
        assert_eq!(outcome.stdout, b"1234512");
        assert_eq!(outcome.code, 0);
    }
}
