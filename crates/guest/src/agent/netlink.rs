//! The few messages of netlink that the agent needs, in a form that is small: a whole library for it would be many
//! pages for every clone to fetch.

use rustix::net::netlink::{SOCK_DIAG, SocketAddrNetlink};
use rustix::net::{AddressFamily, Protocol, SocketFlags, SocketType, bind, socket_with};
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
/// `NLM_F_CREATE | NLM_F_REPLACE`.
pub(crate) const PUT: u16 = 0x500;
/// Length, kind, flags, sequence, port.
const HEADER: usize = 16;
/// Kernels make no longer datagrams of a dump.
const BUFFER: usize = 32 * 1024;

/// A request under construction.
#[derive(Debug)]
pub(crate) struct Message(Vec<u8>);

impl Message {
    /// A message with the fixed part that its kind has. `flags` are those besides `NLM_F_REQUEST`.
    pub(crate) fn new(kind: u16, flags: u16, fixed: &[u8]) -> Self {
        let mut bytes = vec![0; HEADER];
        bytes[4..6].copy_from_slice(&kind.to_ne_bytes());
        bytes[6..8].copy_from_slice(&(flags | NLM_F_REQUEST).to_ne_bytes());
        bytes.extend_from_slice(fixed);
        Self(bytes)
    }

    /// Adds an attribute of at most a few bytes.
    #[must_use]
    pub(crate) fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(value.len() + 4).unwrap_or(4);
        self.0.extend_from_slice(&length.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    fn finish(mut self, sequence: u32, flags: u16) -> Vec<u8> {
        let length = u32::try_from(self.0.len()).unwrap_or(0);
        self.0[..4].copy_from_slice(&length.to_ne_bytes());
        let flags = flags | u16::from_ne_bytes([self.0[6], self.0[7]]);
        self.0[6..8].copy_from_slice(&flags.to_ne_bytes());
        self.0[8..12].copy_from_slice(&sequence.to_ne_bytes());
        self.0
    }
}

/// The attributes in what follows the fixed part of a message.
pub(crate) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let &[l0, l1, k0, k1, ..] = bytes else { return None };
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        let value = bytes.get(4..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        // The upper two bits say how it is coded.
        Some((u16::from_ne_bytes([k0, k1]) & 0x3fff, value))
    })
}

/// The `u32` at an offset.
pub(crate) fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// A socket to the kernel.
#[derive(Debug)]
pub(crate) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl AsFd for Netlink {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Netlink {
    /// Interfaces, addresses, routes.
    pub(crate) fn route() -> io::Result<Self> {
        Self::open(None)
    }

    /// Sockets.
    pub(crate) fn sock_diag() -> io::Result<Self> {
        Self::open(Some(SOCK_DIAG))
    }

    fn open(protocol: Option<Protocol>) -> io::Result<Self> {
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, protocol)?;
        Ok(Self { socket, sequence: 0, buffer: vec![0; BUFFER] })
    }

    /// Has something done and waits for the kernel's answer.
    pub(crate) fn request(&mut self, message: Message) -> io::Result<()> {
        self.exchange(message, NLM_F_ACK, |_, _| {})
    }

    /// Asks for a list. `each` gets the kind and the contents of each message.
    pub(crate) fn dump(&mut self, message: Message, each: impl FnMut(u16, &[u8])) -> io::Result<()> {
        self.exchange(message, NLM_F_DUMP, each)
    }

    fn exchange(&mut self, message: Message, flags: u16, mut each: impl FnMut(u16, &[u8])) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let sequence = self.sequence;
        // Without an address a message goes to the kernel.
        rustix::io::write(&self.socket, &message.finish(sequence, flags))?;
        loop {
            let length = match rustix::io::read(&self.socket, &mut self.buffer[..]) {
                Err(rustix::io::Errno::INTR) => continue,
                other => other?,
            };
            let mut ended = None;
            messages(&self.buffer[..length], |kind, of, content| {
                if of != sequence || ended.is_some() {
                    return;
                }
                match kind {
                    NLMSG_ERROR | NLMSG_DONE => ended = Some(u32_at(content, 0).unwrap_or(0).cast_signed()),
                    _ => each(kind, content),
                }
            });
            match ended {
                None => {}
                Some(code) if code >= 0 => return Ok(()),
                Some(code) => return Err(io::Error::from_raw_os_error(-code)),
            }
        }
    }
}

/// Hears of each new interface, and of nothing else: whoever waits here sleeps while interfaces only change.
#[derive(Debug)]
pub(crate) struct NewLinks(OwnedFd);

impl NewLinks {
    pub(crate) fn open() -> io::Result<Self> {
        const LINKS: u32 = 1;
        let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
        // First, so that nothing else is in the queue.
        only_new_links(&socket)?;
        bind(&socket, &SocketAddrNetlink::new(0, LINKS))?;
        Ok(Self(socket))
    }

    /// Waits for the next one, or for several.
    pub(crate) fn wait(&self) -> io::Result<()> {
        loop {
            match rustix::io::read(&self.0, &mut [0; 64]) {
                Err(rustix::io::Errno::INTR) => {}
                // Too many to be kept: then there were some.
                Ok(_) | Err(rustix::io::Errno::NOBUFS) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Has the kernel drop all but messages of kind `RTM_NEWLINK` in which everything has changed: so it tells of an interface
/// that was not there.
#[allow(unsafe_code, reason = "no safe library attaches a socket filter")]
fn only_new_links(socket: &OwnedFd) -> io::Result<()> {
    const LOAD_HALF: u16 = 0x28;
    const LOAD_WORD: u16 = 0x20;
    const IF_EQUAL: u16 = 0x15;
    const RETURN: u16 = 0x06;
    // A filter reads numbers as if they came over a network.
    let newlink = u32::from(16_u16.swap_bytes());
    let newlink = if cfg!(target_endian = "little") { newlink } else { 16 };
    let step = |code, k, jt, jf| libc::sock_filter { code, jt, jf, k };
    let mut program = [
        // The kind, in the header.
        step(LOAD_HALF, 4, 0, 0),
        step(IF_EQUAL, newlink, 0, 3),
        // `ifi_change`.
        step(LOAD_WORD, 28, 0, 0),
        step(IF_EQUAL, u32::MAX, 0, 1),
        step(RETURN, u32::MAX, 0, 0),
        step(RETURN, 0, 0, 0),
    ];
    let filter = libc::sock_fprog { len: 6, filter: program.as_mut_ptr() };
    let size = u32::try_from(size_of_val(&filter)).unwrap_or(0);
    // SAFETY: SO_ATTACH_FILTER reads one `sock_fprog` of `size` bytes and the `len` instructions that it points to, all of
    // which live until the call returns; the kernel keeps a copy and writes nothing to our memory.
    let code = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            std::ptr::from_ref(&filter).cast(),
            size,
        )
    };
    if code == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Calls `each` with kind, sequence and contents of the messages in a datagram.
fn messages(mut bytes: &[u8], mut each: impl FnMut(u16, u32, &[u8])) {
    while let Some(length) = u32_at(bytes, 0) {
        let length = length as usize;
        let Some(content) = bytes.get(HEADER..length) else { return };
        each(u16::from_ne_bytes([bytes[4], bytes[5]]), u32_at(bytes, 8).unwrap_or(0), content);
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or(&[]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_has_the_form_of_the_kernel() {
        let message = Message::new(20, PUT, &[2, 24, 0, 0, 7, 0, 0, 0]).attribute(1, &[9, 8, 7]).attribute(2, &[1; 4]);
        let want = [
            &[40, 0, 0, 0, 20, 0, 5, 5, 3, 0, 0, 0, 0, 0, 0, 0][..],
            &[2, 24, 0, 0, 7, 0, 0, 0],
            &[7, 0, 1, 0, 9, 8, 7, 0],
            &[8, 0, 2, 0, 1, 1, 1, 1],
        ]
        .concat();
        assert_eq!(message.finish(3, NLM_F_ACK), want);
    }

    #[test]
    fn what_was_put_in_is_found_again() {
        let message = Message::new(16, 0, &[0; 16]).attribute(3, b"eth0\0").attribute(0x8000 | 1, &[1, 2, 3, 4, 5, 6]);
        let mut bytes = message.finish(9, 0);
        bytes.extend(Message::new(NLMSG_DONE, 0, &[0; 4]).finish(9, 0));
        let mut seen = Vec::new();
        messages(&bytes, |kind, sequence, content| seen.push((kind, sequence, content.to_vec())));
        assert_eq!(seen.len(), 2);
        assert_eq!((seen[0].0, seen[0].1), (16, 9));
        let found: Vec<_> = attributes(&seen[0].2[16..]).collect();
        assert_eq!(found, [(3, &b"eth0\0"[..]), (1, &[1, 2, 3, 4, 5, 6][..])]);
        assert_eq!((seen[1].0, &seen[1].2[..]), (NLMSG_DONE, &[0; 4][..]));
    }

    #[test]
    fn bytes_that_are_cut_off_end_the_reading() {
        let bytes = Message::new(16, 0, &[1; 16]).attribute(3, &[7; 9]).finish(1, 0);
        for cut in 0..bytes.len() {
            messages(&bytes[..cut], |_, _, _| panic!("a message that is cut is none"));
        }
        for cut in 0..20 {
            let _ = attributes(&bytes[HEADER..][..cut]).count();
        }
        assert_eq!(attributes(&[3, 0, 1, 0, 5, 5, 5, 5]).count(), 0, "a length below the header's ends it");
    }

    #[test]
    fn the_kernel_takes_the_filter_and_nothing_waits_behind_it() {
        use rustix::event::{PollFd, PollFlags, Timespec, poll};
        let links = NewLinks::open().unwrap();
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        assert_eq!(poll(&mut [PollFd::new(&links.0, PollFlags::IN)], Some(&now)).unwrap(), 0);
    }

    #[test]
    fn the_kernel_lists_the_loopback_and_refuses_what_is_not_there() {
        let mut netlink = Netlink::route().unwrap();
        let mut seen = 0;
        netlink.dump(Message::new(18, 0, &[0; 16]), |kind, _| seen += u32::from(kind == 16)).unwrap();
        assert!(seen > 0);
        let mut fixed = [0; 16];
        fixed[4..8].copy_from_slice(&i32::MAX.to_ne_bytes());
        let error = netlink.request(Message::new(19, 0, &fixed)).unwrap_err();
        assert!(error.raw_os_error().is_some(), "{error}");
    }
}
