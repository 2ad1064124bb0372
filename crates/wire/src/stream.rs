//! Blocking, full-duplex connections that carry [frames](crate::frame) between hosts.
//!
//! A [`Connection`] splits into a [`Sender`] and a [`Receiver`], made for two threads that never wait for each other:
//! each owns its half of the keys, so a receiver asleep in `read` holds no lock that a sender needs.
//!
//! In the product every connection is TCP with mutual TLS 1.3 ([`Connection::connect`], [`Listener`]): both sides show a
//! certificate of the same CA, and the asker checks the source's name. rustls with the ring provider does the handshake,
//! the key schedule and the record ciphers; this module only moves records, which saves rustls's copies and its one lock
//! around both directions (see `record`).
//!
//! A peer that stops answering is noticed within [`Options::dead_after`] by keep-alive probes and the TCP user timeout;
//! a peer that stops *reading* for as long is dropped too, so nobody can make a sender wait for ever.

mod handshake;
mod identity;
mod record;
mod serving;
mod socket;

pub use identity::{TlsConfig, TlsFiles};
pub use serving::with_causes;

use crate::frame::{ErrorCode, Frame, Message, WireError};
use record::{Decryptor, Encryptor};
use socket::Socket;
use std::{
    io,
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::net::UnixStream,
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// Settings of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Time limit for the TCP connection to be made. Default 3 s.
    pub connect: Duration,
    /// Time limit for the TLS handshake. Default 5 s.
    pub handshake: Duration,
    /// A peer whose machine does not answer, or that does not read, for this long is dead. Default 10 s.
    pub dead_after: Duration,
    /// How long a receiver polls before it sleeps. Waking a sleeping thread costs tens of microseconds, on the path of
    /// every faulting page; polling costs a core meanwhile. Default 60 us.
    pub spin: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(3),
            handshake: Duration::from_secs(5),
            dead_after: Duration::from_secs(10),
            spin: Duration::from_micros(60),
        }
    }
}

/// What can go wrong with a connection. After any of these the connection is of no more use.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StreamError {
    /// The peer, or [`Sender::close`] or [`Listener::close`] on this side, ended the connection between two frames.
    #[error("Connection closed")]
    Closed,
    /// The peer sent something that is no frame. [`Sender::refuse`] tells it so.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// No TCP connection came about.
    #[error("Cannot connect to {addr}: check that rametd runs there and that the network lets this port through")]
    Connect {
        /// The peer.
        addr: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The address cannot be listened on.
    #[error(
        "Cannot listen on {addr}: check that the address belongs to this host and that no other process has the port"
    )]
    Bind {
        /// The address.
        addr: SocketAddr,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The handshake failed on this side.
    #[error("TLS with {peer} failed: check that both hosts are joined to the same cluster (`ramet host ls`)")]
    Tls {
        /// The peer: name and address as far as known.
        peer: String,
        /// Why.
        #[source]
        source: rustls::Error,
    },
    /// The peer refused the handshake or a record; with TLS 1.3 the asker learns that at its first `recv`.
    #[error(
        "Peer refused this host (TLS alert {alert}): check that this host's certificate is from the cluster's CA and has not expired (`ramet host join`)"
    )]
    Alert {
        /// The alert's name.
        alert: String,
    },
    /// The peer was too slow.
    #[error("{what} took longer than {limit:?}: the peer is overloaded, or not a ramet")]
    Timeout {
        /// What it was waited for.
        what: &'static str,
        /// The limit.
        limit: Duration,
    },
    /// A certificate or key that cannot be used.
    #[error("Cannot use {path}: {what}; make the host's certificates anew with `ramet host init` or `ramet host join`")]
    Identity {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A name that cannot stand in a certificate.
    #[error("'{name}' is not a host name: letters, digits, '-' and '.' only")]
    ServerName {
        /// The name.
        name: String,
    },
    /// The socket failed.
    #[error("Connection lost while {what}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl StreamError {
    fn io(what: &'static str, source: io::Error) -> Self {
        use io::ErrorKind::{BrokenPipe, ConnectionReset, NotConnected};
        match source.kind() {
            BrokenPipe | ConnectionReset | NotConnected => Self::Closed,
            _ => Self::Io { what, source },
        }
    }
}

/// A connection whose handshake is done.
#[derive(Debug)]
pub struct Connection {
    sender: Sender,
    receiver: Receiver,
}

impl Connection {
    /// Connects to a source and does the handshake.
    ///
    /// `server_name` must stand in the peer's certificate. Whether the peer accepts *this* host shows at the first
    /// `recv`: a refused one gets [`StreamError::Alert`] or [`StreamError::Closed`] there.
    ///
    /// # Errors
    /// [`StreamError::Connect`], [`StreamError::Tls`], [`StreamError::Timeout`], [`StreamError::ServerName`].
    pub fn connect(
        addr: SocketAddr,
        server_name: &str,
        tls: &TlsConfig,
        options: &Options,
    ) -> Result<Self, StreamError> {
        let name = rustls_pki_types::ServerName::try_from(server_name.to_owned())
            .map_err(|_| StreamError::ServerName { name: server_name.to_owned() })?;
        let tcp = TcpStream::connect_timeout(&addr, options.connect)
            .map_err(|source| StreamError::Connect { addr, source })?;
        let socket = Socket::tcp(tcp, options).map_err(|source| StreamError::Connect { addr, source })?;
        let limit = handshake::Limit::new(options.handshake);
        let peer = format!("{server_name} at {addr}");
        let done = handshake::client(&socket, Arc::clone(&tls.client), name, &limit, peer)?;
        Ok(Self::new(socket, options, Some(done)))
    }

    /// A connection without TLS, for benches and tests. The product never uses it.
    ///
    /// # Errors
    /// [`StreamError::Io`] when the socket's options cannot be set.
    pub fn insecure_for_bench(tcp: TcpStream, options: &Options) -> Result<Self, StreamError> {
        let socket = Socket::tcp(tcp, options).map_err(|e| StreamError::io("setting it up", e))?;
        Ok(Self::new(socket, options, None))
    }

    /// A connection over a Unix socket, for benches and tests. The product never uses it.
    #[must_use]
    pub fn insecure_unix_for_bench(unix: UnixStream, options: &Options) -> Self {
        Self::new(Socket::Unix(unix), options, None)
    }

    fn new(socket: Socket, options: &Options, tls: Option<handshake::Done>) -> Self {
        let shared = Arc::new(Shared {
            peer_addr: socket.peer_addr(),
            socket,
            closed: AtomicBool::new(false),
            link_speed: AtomicU64::new(0),
        });
        let (encryptor, decryptor, early) = match tls {
            Some(done) => (Some(done.encryptor), Some(done.decryptor), done.early),
            None => (None, None, Vec::new()),
        };
        let sending = Sending { encryptor, window: Window::default() };
        let sender = Sender { shared: Arc::clone(&shared), sending: Arc::new(Mutex::new(sending)) };
        let receiver = Receiver { shared, spin: options.spin, decryptor, plain: Plain::new(early) };
        Self { sender, receiver }
    }

    /// The peer's address; `None` for Unix sockets.
    #[must_use]
    pub fn peer_addr(&self) -> Option<SocketAddr> {
        self.sender.shared.peer_addr
    }

    /// The two halves, for two threads. The socket closes when both are dropped, or at [`Sender::close`].
    #[must_use]
    pub fn split(self) -> (Sender, Receiver) {
        (self.sender, self.receiver)
    }
}

#[derive(Debug)]
struct Shared {
    socket: Socket,
    peer_addr: Option<SocketAddr>,
    closed: AtomicBool,
    /// Bytes per second; 0 while unknown.
    link_speed: AtomicU64,
}

#[derive(Debug)]
struct Sending {
    /// `None`: plain.
    encryptor: Option<Encryptor>,
    window: Window,
}

/// The sending half. Its clones share the connection and take turns frame by frame.
#[derive(Debug, Clone)]
pub struct Sender {
    shared: Arc<Shared>,
    sending: Arc<Mutex<Sending>>,
}

impl Sender {
    /// Sends one frame, or several that lie back to back. Blocks while the peer is slower than this side.
    ///
    /// # Errors
    /// [`StreamError::Closed`] or [`StreamError::Io`]; how much of the frames has left is then unknown.
    pub fn send(&self, frames: &[u8]) -> Result<(), StreamError> {
        let mut sending = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
        let Sending { encryptor, window } = &mut *sending;
        let socket = &self.shared.socket;
        let mut spent = Duration::ZERO;
        let mut timed = |parts: &mut [io::IoSlice<'_>]| {
            let begin = Instant::now();
            let sent = socket.write_all(parts);
            spent += begin.elapsed();
            sent.map_err(|e| StreamError::io("sending", e))
        };
        match encryptor {
            Some(encryptor) => encryptor.send(frames, &mut timed)?,
            None => timed(&mut [io::IoSlice::new(frames)])?,
        }
        if let Some(speed) = window.add(frames.len(), spent) {
            self.shared.link_speed.store(speed.max(1), Ordering::Relaxed);
        }
        Ok(())
    }

    /// How fast the link has taken bytes lately, in bytes per second; `None` before about 1 MiB was sent in large
    /// frames. For [`crate::PagesWriter::set_link_speed`].
    #[must_use]
    pub fn link_speed(&self) -> Option<u64> {
        Some(self.shared.link_speed.load(Ordering::Relaxed)).filter(|&speed| speed > 0)
    }

    /// Tells the peer what was wrong with its frame, as far as it still listens, and closes the connection.
    pub fn refuse(&self, req: u32, error: &WireError) {
        let code = if matches!(error, WireError::Version { .. }) { ErrorCode::Version } else { ErrorCode::Malformed };
        let mut frame = Vec::new();
        Frame { req, message: Message::Error { code, message: &error.to_string() } }.encode(&mut frame);
        // The peer may be gone already: it is refused either way.
        let _ = self.send(&frame);
        self.finish();
    }

    /// Ends the sending direction: the peer reads what was sent, then [`StreamError::Closed`].
    pub fn finish(&self) {
        let mut sending = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(encryptor) = &mut sending.encryptor {
            let socket = &self.shared.socket;
            let _ = encryptor
                .close_notify(&mut |parts| socket.write_all(parts).map_err(|e| StreamError::io("closing it", e)));
        }
        self.shared.socket.shutdown(std::net::Shutdown::Write);
    }

    /// Closes both directions at once. Whoever waits in `send` or `recv`, in any thread, gets [`StreamError::Closed`].
    pub fn close(&self) {
        self.shared.closed.store(true, Ordering::Release);
        self.shared.socket.shutdown(std::net::Shutdown::Both);
    }
}

/// Bytes and time of large writes, for the speed of the link.
#[derive(Debug, Default)]
struct Window {
    bytes: u64,
    time: Duration,
    speed: Option<u64>,
}

impl Window {
    /// Smaller sends cost system calls, not link time.
    const LARGE: usize = 64 << 10;
    /// Several times what the kernel takes without sending ([`socket::UNSENT`]).
    const LENGTH: u64 = 2 << 20;

    /// A new estimate whenever a window is full.
    fn add(&mut self, bytes: usize, time: Duration) -> Option<u64> {
        if bytes < Self::LARGE {
            return None;
        }
        self.bytes += bytes as u64;
        self.time += time;
        if self.bytes < Self::LENGTH {
            return None;
        }
        let now = (self.bytes as f64 / self.time.as_secs_f64().max(1e-9)) as u64;
        let speed = self.speed.map_or(now, |old| old / 2 + now / 2);
        *self = Self { speed: Some(speed), ..Self::default() };
        Some(speed)
    }
}

/// Decrypted bytes that are not yet taken as frames.
#[derive(Debug)]
struct Plain {
    bytes: Vec<u8>,
    start: usize,
}

impl Plain {
    fn new(early: Vec<u8>) -> Self {
        Self { bytes: early, start: 0 }
    }

    fn rest(&self) -> &[u8] {
        &self.bytes[self.start..]
    }

    /// Forgets what was taken. Moves what is left only when that keeps the buffer from growing.
    fn tidy(&mut self, room: usize) {
        if self.start == self.bytes.len() {
            self.bytes.clear();
            self.start = 0;
        } else if self.start > 0 && self.bytes.len() + room > self.bytes.capacity() {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
    }
}

/// The receiving half.
#[derive(Debug)]
pub struct Receiver {
    shared: Arc<Shared>,
    spin: Duration,
    /// `None`: plain.
    decryptor: Option<Decryptor>,
    plain: Plain,
}

impl Receiver {
    /// The next frame. Waits for it; the frame lives until the next call.
    ///
    /// # Errors
    /// [`StreamError::Closed`] at the end; [`StreamError::Wire`] when the peer sent no frame: [`Sender::refuse`] it;
    /// [`StreamError::Alert`], [`StreamError::Tls`], [`StreamError::Io`].
    pub fn recv(&mut self) -> Result<Frame<'_>, StreamError> {
        self.fill(None)?;
        self.take().ok_or(StreamError::Closed)?
    }

    /// As [`Self::recv`], but gives up after `limit` with `None`. The connection stays good: a frame that was on its way
    /// comes with a later call.
    ///
    /// # Errors
    /// As [`Self::recv`].
    pub fn recv_timeout(&mut self, limit: Duration) -> Result<Option<Frame<'_>>, StreamError> {
        if self.fill(Some(Instant::now() + limit))? { self.take().transpose() } else { Ok(None) }
    }

    /// Waits until a whole frame is there; false at the deadline.
    fn fill(&mut self, deadline: Option<Instant>) -> Result<bool, StreamError> {
        loop {
            if self.whole_frame()? {
                return Ok(true);
            }
            let more = match &mut self.decryptor {
                Some(decryptor) => decryptor.receive(&self.shared.socket, self.spin, deadline, &mut self.plain)?,
                None => record::receive_plain(&self.shared.socket, self.spin, deadline, &mut self.plain)?,
            };
            match more {
                // A peer that trickles bytes does not stretch the caller's limit.
                record::Received::Bytes if deadline.is_none_or(|deadline| Instant::now() < deadline) => {}
                record::Received::Bytes => return Ok(self.whole_frame()?),
                record::Received::Nothing => return Ok(false),
                record::Received::End => return Err(self.end()),
            }
        }
    }

    fn whole_frame(&self) -> Result<bool, WireError> {
        let there = self.plain.rest();
        Ok(Frame::length(there)?.is_some_and(|len| there.len() >= len))
    }

    fn end(&self) -> StreamError {
        if self.plain.rest().is_empty() || self.shared.closed.load(Ordering::Acquire) {
            return StreamError::Closed;
        }
        let source = io::Error::new(io::ErrorKind::UnexpectedEof, "the connection ended inside a frame");
        StreamError::Io { what: "receiving", source }
    }

    fn take(&mut self) -> Option<Result<Frame<'_>, StreamError>> {
        let begin = self.plain.start;
        match Frame::decode(&self.plain.bytes[begin..]) {
            Ok(Some((frame, len))) => {
                self.plain.start += len;
                Some(Ok(frame))
            }
            Ok(None) => None,
            Err(error) => Some(Err(error.into())),
        }
    }
}

/// Accepts connections from other hosts.
#[derive(Debug)]
pub struct Listener {
    tcp: TcpListener,
    addr: SocketAddr,
    tls: TlsConfig,
    options: Options,
    closed: AtomicBool,
}

impl Listener {
    /// Listens on `addr`; port 0 takes a free one, see [`Self::local_addr`]. A port whose last owner has just ended can
    /// be taken at once.
    ///
    /// # Errors
    /// [`StreamError::Bind`].
    pub fn bind(addr: SocketAddr, tls: &TlsConfig, options: &Options) -> Result<Self, StreamError> {
        let error = |source| StreamError::Bind { addr, source };
        // The standard library sets SO_REUSEADDR on listeners.
        let tcp = TcpListener::bind(addr).map_err(error)?;
        let addr = tcp.local_addr().map_err(error)?;
        Ok(Self { tcp, addr, tls: tls.clone(), options: options.clone(), closed: AtomicBool::new(false) })
    }

    /// Where it listens.
    #[must_use]
    pub const fn local_addr(&self) -> SocketAddr {
        self.addr
    }

    /// The next caller. Does not talk to it, so a slow caller keeps nobody waiting: give it a thread, and call
    /// [`Pending::handshake`] there.
    ///
    /// A shortage of descriptors or memory, and callers that vanished, are waited out.
    ///
    /// # Errors
    /// [`StreamError::Closed`] after [`Self::close`]; [`StreamError::Io`] when the socket is broken.
    pub fn accept(&self) -> Result<Pending, StreamError> {
        loop {
            let accepted = self.tcp.accept();
            if self.closed.load(Ordering::Acquire) {
                return Err(StreamError::Closed);
            }
            match accepted {
                Ok((tcp, addr)) => {
                    return Ok(Pending { tcp, addr, tls: self.tls.clone(), options: self.options.clone() });
                }
                Err(source) => match rustix::io::Errno::from_io_error(&source) {
                    Some(e) if socket::passing_shortage(e) => std::thread::sleep(Duration::from_millis(50)),
                    Some(e) if socket::passing_accept_error(e) => {}
                    _ => return Err(StreamError::Io { what: "accepting", source }),
                },
            }
        }
    }

    /// Stops listening: `accept`, in whatever thread, ends with [`StreamError::Closed`].
    pub fn close(&self) {
        self.closed.store(true, Ordering::Release);
        // On Linux this wakes a thread that waits in accept(2). An error means that it is closed already.
        let _ = rustix::net::shutdown(&self.tcp, rustix::net::Shutdown::Both);
    }
}

/// A caller, before the handshake.
#[derive(Debug)]
pub struct Pending {
    tcp: TcpStream,
    addr: SocketAddr,
    tls: TlsConfig,
    options: Options,
}

impl Pending {
    /// The caller's address.
    #[must_use]
    pub const fn peer_addr(&self) -> SocketAddr {
        self.addr
    }

    /// Does the handshake within [`Options::handshake`]. A caller without a certificate of the CA is refused.
    ///
    /// # Errors
    /// [`StreamError::Tls`], [`StreamError::Timeout`], [`StreamError::Closed`], [`StreamError::Io`].
    pub fn handshake(self) -> Result<Connection, StreamError> {
        let limit = handshake::Limit::new(self.options.handshake);
        let socket = Socket::tcp(self.tcp, &self.options).map_err(|e| StreamError::io("setting it up", e))?;
        let done = handshake::server(&socket, self.tls.server, &limit, self.addr.to_string())?;
        Ok(Connection::new(socket, &self.options, Some(done)))
    }
}

#[cfg(test)]
mod tests;
