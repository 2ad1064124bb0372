//! The client of the preload object in a VMM: asks for its userfaultfd, and has it map files over its RAM.
//!
//! ```text
//! request:  magic u32 | op u32 (1 info, 2 map) | segments u32 | files u32 | per segment:
//!           guest offset u64 | length u64 | file offset u64 | file u32 | flags u32
//! response: magic u32 | errno i32 | ram address u64 | ram length u64 | pid u32 | 0 u32
//! ```
//!
//! Little endian, over a Unix stream socket; files travel with the first byte of a request, the userfaultfd with the answer
//! to an info request.

use crate::Uffd;
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
    recvmsg, sendmsg,
};
use std::{
    io::{self, IoSlice, IoSliceMut, Read, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsRawFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    time::Duration,
};

const MAGIC: u32 = 0x4d48_5352;
const INFO: u32 = 1;
const MAP: u32 = 2;
const RESPONSE: usize = 32;
/// Most files of one request: the kernel's limit for one message.
pub const MAX_FILES: usize = 253;
/// A preload object that does not answer within this time is taken for hung.
const LIMIT: Duration = Duration::from_secs(5);

/// A stretch of RAM to be mapped from a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    /// Byte offset in RAM.
    pub guest_offset: u64,
    /// Length in bytes.
    pub len: u64,
    /// Byte offset in the file.
    pub file_offset: u64,
    /// Which of the request's files.
    pub fd_index: u32,
    /// 0; 1 maps zeros instead of a file.
    pub flags: u32,
}

/// What a VMM says of itself.
#[derive(Debug)]
pub struct ShimInfo {
    /// Its userfaultfd.
    pub uffd: Uffd,
    /// Where its RAM is mapped.
    pub ram_addr: u64,
    /// How long its RAM is, in bytes.
    pub ram_len: u64,
    /// Its process.
    pub pid: u32,
}

/// A connection to a preload object.
#[derive(Debug)]
pub struct ShimClient(UnixStream);

impl ShimClient {
    /// Connects.
    ///
    /// # Errors
    /// When nobody listens: the VMM is gone, or runs without the preload object.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let stream = UnixStream::connect(path)?;
        stream.set_read_timeout(Some(LIMIT))?;
        stream.set_write_timeout(Some(LIMIT))?;
        Ok(Self(stream))
    }

    /// Asks for the userfaultfd and for where RAM is.
    ///
    /// # Errors
    /// When the answer is malformed, or what came is no userfaultfd.
    pub fn info(&mut self) -> io::Result<ShimInfo> {
        self.send(INFO, &[], &[])?;
        let (answer, fd) = self.receive()?;
        let fd = fd.ok_or_else(|| io::Error::other("the VMM sent no userfaultfd"))?;
        let link = std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))?;
        if link.to_str() != Some("anon_inode:[userfaultfd]") {
            return Err(io::Error::other(format!("the VMM sent {} instead of a userfaultfd", link.display())));
        }
        if answer.ram_len == 0 {
            return Err(io::Error::other("the VMM has not mapped its RAM"));
        }
        Ok(ShimInfo { uffd: fd.into(), ram_addr: answer.ram_addr, ram_len: answer.ram_len, pid: answer.pid })
    }

    /// Maps files privately over RAM. Returns when all is mapped; on an error nothing more is mapped, and the VMM should
    /// be ended.
    ///
    /// # Errors
    /// When a segment lies outside RAM or the kernel refuses.
    pub fn map(&mut self, segments: &[Segment], files: &[BorrowedFd<'_>]) -> io::Result<()> {
        if files.len() > MAX_FILES {
            return Err(io::Error::other(format!(
                "{} files in one view, at most {MAX_FILES} can be mapped",
                files.len()
            )));
        }
        self.send(MAP, segments, files)?;
        self.receive().map(drop)
    }

    fn send(&mut self, op: u32, segments: &[Segment], files: &[BorrowedFd<'_>]) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(16 + segments.len() * 32);
        for n in [MAGIC, op, segments.len() as u32, files.len() as u32] {
            bytes.extend(n.to_le_bytes());
        }
        for s in segments {
            for n in [s.guest_offset, s.len, s.file_offset] {
                bytes.extend(n.to_le_bytes());
            }
            bytes.extend(s.fd_index.to_le_bytes());
            bytes.extend(s.flags.to_le_bytes());
        }
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MAX_FILES))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !files.is_empty() && !control.push(SendAncillaryMessage::ScmRights(files)) {
            return Err(io::Error::other("too many files"));
        }
        let sent = sendmsg(&self.0, &[IoSlice::new(&bytes)], &mut control, SendFlags::NOSIGNAL)?;
        self.0.write_all(&bytes[sent..])
    }

    fn receive(&mut self) -> io::Result<(Answer, Option<OwnedFd>)> {
        let mut bytes = [0u8; RESPONSE];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let received =
            recvmsg(&self.0, &mut [IoSliceMut::new(&mut bytes)], &mut control, RecvFlags::CMSG_CLOEXEC)?.bytes;
        let mut fd = None;
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                fd = fds.last().or(fd);
            }
        }
        if received == 0 {
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the VMM closed its preload object's socket"));
        }
        self.0.read_exact(&mut bytes[received..])?;
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        if word(0) != MAGIC {
            return Err(io::Error::other("the socket belongs to no preload object of this release"));
        }
        match word(4).cast_signed() {
            0 => Ok((Answer { ram_addr: long(8), ram_len: long(16), pid: word(24) }, fd)),
            errno => Err(io::Error::from_raw_os_error(errno)),
        }
    }
}

struct Answer {
    ram_addr: u64,
    ram_len: u64,
    pid: u32,
}
