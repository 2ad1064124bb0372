//! How the client reaches a daemon: a Unix socket, or whatever the caller supplies (mutual TLS between hosts).

use std::{
    fmt,
    future::Future,
    io,
    path::PathBuf,
    pin::Pin,
    sync::{Mutex, PoisonError},
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A byte stream of any kind.
pub trait Io: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Io for T {}

/// A boxed byte stream. The lock is never waited for: it only makes the stream `Sync`.
pub struct BoxIo(Mutex<Box<dyn Io>>);

impl BoxIo {
    /// Boxes a stream.
    pub fn new(io: impl Io + 'static) -> Self {
        Self(Mutex::new(Box::new(io)))
    }

    fn inner(&mut self) -> Pin<&mut dyn Io> {
        Pin::new(&mut **self.0.get_mut().unwrap_or_else(PoisonError::into_inner))
    }
}

impl fmt::Debug for BoxIo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BoxIo")
    }
}

impl AsyncRead for BoxIo {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        self.inner().poll_read(cx, buf)
    }
}

impl AsyncWrite for BoxIo {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        self.inner().poll_write(cx, buf)
    }
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.inner().poll_flush(cx)
    }
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.inner().poll_shutdown(cx)
    }
}

/// A future of a connection.
pub type Connecting<'a> = Pin<Box<dyn Future<Output = io::Result<BoxIo>> + Send + 'a>>;

/// Makes connections to one daemon.
pub trait Connect: Send + Sync {
    /// A new connection.
    fn connect(&self) -> Connecting<'_>;
    /// Where to, in words, for messages.
    fn target(&self) -> String;
}

/// Connects to a Unix socket.
#[derive(Debug)]
pub struct Unix(pub PathBuf);

impl Connect for Unix {
    fn connect(&self) -> Connecting<'_> {
        Box::pin(async { Ok(BoxIo::new(tokio::net::UnixStream::connect(&self.0).await?)) })
    }
    fn target(&self) -> String {
        self.0.display().to_string()
    }
}
