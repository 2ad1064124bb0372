//! A client that reads, one request at a time.

use super::*;
use std::{io::Write, os::unix::net::UnixStream, path::Path, time::Duration};

/// A connection to an NBD server.
#[derive(Debug)]
pub struct Client {
    stream: UnixStream,
    size: u64,
    cookie: u64,
}

impl Client {
    /// Connects to the export `name` of the server at `path`. A server that stays silent for `limit`, now or at a read,
    /// is an error.
    ///
    /// # Errors
    /// When there is no such server or export, or it does not speak NBD.
    pub fn connect(path: &Path, name: &str, limit: Duration) -> io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(limit))?;
        stream.set_write_timeout(Some(limit))?;
        let mut s = &stream;
        if u64_of(&mut s)? != NBDMAGIC || u64_of(&mut s)? != IHAVEOPT {
            return Err(bad("its greeting"));
        }
        let flags = u16_of(&mut s)?;
        if flags & FIXED_NEWSTYLE == 0 {
            return Err(bad("it is too old"));
        }
        let mut hello = Vec::new();
        hello.extend(u32::from(flags & (FIXED_NEWSTYLE | NO_ZEROES)).to_be_bytes());
        hello.extend(IHAVEOPT.to_be_bytes());
        hello.extend(OPT_GO.to_be_bytes());
        hello.extend((name.len() as u32 + 6).to_be_bytes());
        hello.extend((name.len() as u32).to_be_bytes());
        hello.extend(name.as_bytes());
        hello.extend(0u16.to_be_bytes());
        s.write_all(&hello)?;
        let mut size = None;
        loop {
            if u64_of(&mut s)? != OPTION_REPLY || u32_of(&mut s)? != OPT_GO {
                return Err(bad("an option's reply"));
            }
            let (kind, len) = (u32_of(&mut s)?, u32_of(&mut s)?);
            if len > MAX_OPTION {
                return Err(bad("a reply too long"));
            }
            let mut data = vec![0; len as usize];
            s.read_exact(&mut data)?;
            match kind {
                REP_ACK => break,
                REP_INFO => {
                    let mut data = &data[..];
                    if u16_of(&mut data)? == INFO_EXPORT {
                        size = Some(u64_of(&mut data)?);
                    }
                }
                kind if kind & REP_ERROR != 0 => {
                    return Err(io::Error::other(format!(
                        "the export '{name}' is refused: {}",
                        String::from_utf8_lossy(&data)
                    )));
                }
                _ => {}
            }
        }
        let size = size.ok_or_else(|| bad("no size"))?;
        Ok(Self { stream, size, cookie: 0 })
    }

    /// Size of the export in bytes.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// Reads all of `buffer`, at most [`MAX_READ`] bytes.
    ///
    /// # Errors
    /// [`io::ErrorKind::Other`] when the server cannot read its disk: the connection stays good. Anything else: it is of
    /// no more use.
    pub fn read(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        self.cookie += 1;
        let mut request = [0; 28];
        request[..4].copy_from_slice(&REQUEST.to_be_bytes());
        request[6..8].copy_from_slice(&CMD_READ.to_be_bytes());
        request[8..16].copy_from_slice(&self.cookie.to_be_bytes());
        request[16..24].copy_from_slice(&offset.to_be_bytes());
        request[24..].copy_from_slice(&(buffer.len() as u32).to_be_bytes());
        let mut s = &self.stream;
        s.write_all(&request)?;
        if u32_of(&mut s)? != SIMPLE_REPLY {
            return Err(bad("a reply"));
        }
        let error = u32_of(&mut s)?;
        if u64_of(&mut s)? != self.cookie {
            return Err(bad("a reply to another request"));
        }
        if error != 0 {
            return Err(io::Error::other(format!("the disk cannot be read at {offset}: error {error}")));
        }
        s.read_exact(buffer)
    }
}
