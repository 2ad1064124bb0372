//! The sockets underneath: their options, waiting with a time limit, polling before sleeping.

use super::Options;
use rustix::{
    event::{PollFd, PollFlags, Timespec, poll},
    io::Errno,
    net::{RecvFlags, recv},
};
use std::{
    io::{self, IoSlice, Write as _},
    net::{Shutdown, SocketAddr, TcpStream},
    os::{
        fd::{AsFd, BorrowedFd},
        unix::net::UnixStream,
    },
    time::{Duration, Instant},
};

/// Unsent bytes that the kernel takes before `write` waits. Bytes beyond what the network takes now only make a page on
/// demand wait behind pages fetched ahead.
pub(super) const UNSENT: u32 = 512 << 10;

/// A connected socket.
#[derive(Debug)]
pub(super) enum Socket {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Socket {
    /// Sets the options that notice a dead peer and that keep small frames from waiting.
    pub(super) fn tcp(tcp: TcpStream, options: &Options) -> io::Result<Self> {
        let socket = socket2::SockRef::from(&tcp);
        tcp.set_nodelay(true)?;
        // Idle connections: probe from 2/5 of the limit, three times. Busy ones: unacknowledged for the whole limit.
        let probe = (options.dead_after / 5).max(Duration::from_secs(1));
        let keepalive = socket2::TcpKeepalive::new().with_time(probe * 2).with_interval(probe).with_retries(3);
        socket.set_tcp_keepalive(&keepalive)?;
        socket.set_tcp_user_timeout(Some(options.dead_after))?;
        socket.set_tcp_notsent_lowat(UNSENT)?;
        Ok(Self::Tcp(tcp))
    }

    pub(super) fn peer_addr(&self) -> Option<SocketAddr> {
        match self {
            Self::Tcp(tcp) => tcp.peer_addr().ok(),
            Self::Unix(_) => None,
        }
    }

    /// Best effort: a socket that is not connected any more is shut down.
    pub(super) fn shutdown(&self, how: Shutdown) {
        let _ = match self {
            Self::Tcp(tcp) => tcp.shutdown(how),
            Self::Unix(unix) => unix.shutdown(how),
        };
    }

    /// A limit for each single write; `None` for none.
    pub(super) fn set_write_limit(&self, limit: Option<Duration>) -> io::Result<()> {
        match self {
            Self::Tcp(tcp) => tcp.set_write_timeout(limit),
            Self::Unix(unix) => unix.set_write_timeout(limit),
        }
    }

    /// Writes all bytes of all parts, with as few system calls as the kernel allows.
    pub(super) fn write_all(&self, mut parts: &mut [IoSlice<'_>]) -> io::Result<()> {
        while !parts.is_empty() {
            let written = match self {
                Self::Tcp(tcp) => (&mut &*tcp).write_vectored(parts),
                Self::Unix(unix) => (&mut &*unix).write_vectored(parts),
            };
            match written {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => IoSlice::advance_slices(&mut parts, n),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Reads some bytes; `Some(0)` at the end, `None` at the deadline. Polls for up to `spin` before it sleeps.
    pub(super) fn read(
        &self,
        buffer: &mut [u8],
        spin: Duration,
        deadline: Option<Instant>,
    ) -> io::Result<Option<usize>> {
        let mut begin = None;
        loop {
            match recv(self, &mut *buffer, RecvFlags::DONTWAIT) {
                Ok((_, n)) => return Ok(Some(n)),
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) => {}
                Err(e) => return Err(e.into()),
            }
            if begin.get_or_insert_with(Instant::now).elapsed() >= spin {
                break;
            }
            std::hint::spin_loop();
        }
        if deadline.is_some_and(|deadline| !self.wait_readable(deadline).unwrap_or(true)) {
            return Ok(None);
        }
        loop {
            match recv(self, &mut *buffer, RecvFlags::empty()) {
                Ok((_, n)) => return Ok(Some(n)),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }

    /// Whether a read would not wait, by the deadline.
    fn wait_readable(&self, deadline: Instant) -> io::Result<bool> {
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).map_err(|_| io::ErrorKind::InvalidInput)?;
            let mut fds = [PollFd::new(self, PollFlags::IN)];
            match poll(&mut fds, Some(&timeout)) {
                Ok(n) => return Ok(n > 0),
                Err(Errno::INTR) => {}
                Err(e) => return Err(e.into()),
            }
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(tcp) => tcp.as_fd(),
            Self::Unix(unix) => unix.as_fd(),
        }
    }
}

/// Errors of accept(2) that pass when somebody closes something.
pub(super) fn passing_shortage(error: Errno) -> bool {
    matches!(error, Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM)
}

/// Errors of accept(2) that concern one caller only; Linux hands on its pending network errors here too.
pub(super) fn passing_accept_error(error: Errno) -> bool {
    matches!(
        error,
        Errno::INTR
            | Errno::CONNABORTED
            | Errno::PERM
            | Errno::PROTO
            | Errno::NETDOWN
            | Errno::NOPROTOOPT
            | Errno::HOSTDOWN
            | Errno::HOSTUNREACH
            | Errno::NETUNREACH
            | Errno::OPNOTSUPP
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::TcpListener;

    #[test]
    fn a_dead_peer_is_noticed_within_the_limit() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let tcp = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        for limit in [10, 30].map(Duration::from_secs) {
            let options = Options { dead_after: limit, ..Options::default() };
            let Socket::Tcp(tcp) = Socket::tcp(tcp.try_clone().unwrap(), &options).unwrap() else { panic!() };
            let set = socket2::SockRef::from(&tcp);
            assert!(set.keepalive().unwrap() && set.tcp_nodelay().unwrap());
            let probes = set.tcp_keepalive_interval().unwrap() * set.tcp_keepalive_retries().unwrap();
            assert!(set.tcp_keepalive_time().unwrap() + probes <= limit);
            assert_eq!(set.tcp_user_timeout().unwrap(), Some(limit));
            assert_eq!(set.tcp_notsent_lowat().unwrap(), UNSENT);
        }
    }
}
