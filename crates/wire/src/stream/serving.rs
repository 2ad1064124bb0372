//! The side of a process that serves pages to other hosts: where it listens, and a thread for each peer.

use super::{Connection, Listener, Options, StreamError, TlsConfig};
use std::{
    fs,
    net::SocketAddr,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

impl Listener {
    /// Binds where the process before this one listened, as it noted in `dir`, so that other hosts find it again; or else at
    /// `addr`.
    ///
    /// # Errors
    /// [`StreamError::Bind`], or when the address can't be noted.
    pub fn bind_again(addr: SocketAddr, dir: &Path, tls: &TlsConfig, options: &Options) -> Result<Self, StreamError> {
        let note = dir.join("listen");
        let before = fs::read_to_string(&note).ok().and_then(|text| text.parse::<SocketAddr>().ok());
        let before = before.filter(|b| b.ip() == addr.ip() && (addr.port() == 0 || addr.port() == b.port()));
        let bound = match before.map(|before| Self::bind(before, tls, options)) {
            Some(Ok(bound)) => bound,
            _ => Self::bind(addr, tls, options)?,
        };
        fs::write(&note, bound.local_addr().to_string())
            .map_err(|source| StreamError::Io { what: "noting the address that is listened at", source })?;
        Ok(bound)
    }

    /// Accepts peers until the listener is closed, each on a thread of its own, at most `most` at a time. `bad_peer` is told of
    /// those that are refused or end with an error.
    pub fn serve(
        &self,
        most: usize,
        bad_peer: impl Fn() + Clone + Send + 'static,
        converse: impl Fn(Connection) -> Result<(), StreamError> + Clone + Send + 'static,
    ) {
        let peers = Arc::new(AtomicUsize::new(0));
        loop {
            let pending = match self.accept() {
                Ok(pending) => pending,
                Err(StreamError::Closed) => return,
                Err(err) => {
                    tracing::warn!(error = %err, "a connection could not be accepted");
                    std::thread::sleep(Duration::from_millis(20));
                    continue;
                }
            };
            if peers.fetch_add(1, Ordering::AcqRel) >= most {
                peers.fetch_sub(1, Ordering::AcqRel);
                bad_peer();
                continue;
            }
            let (bad_peer, converse, count) = (bad_peer.clone(), converse.clone(), peers.clone());
            let spawned = std::thread::Builder::new().name("serve".into()).spawn(move || {
                let peer = pending.peer_addr();
                let ended = pending.handshake().and_then(converse);
                if let Err(err) = ended
                    && !matches!(err, StreamError::Closed)
                {
                    bad_peer();
                    tracing::warn!(%peer, error = %err, "connection ended");
                }
                count.fetch_sub(1, Ordering::AcqRel);
            });
            if spawned.is_err() {
                peers.fetch_sub(1, Ordering::AcqRel);
            }
        }
    }
}

/// An error with its causes.
#[must_use]
pub fn with_causes(err: &dyn std::error::Error) -> String {
    let mut text = err.to_string();
    let mut next = err.source();
    while let Some(cause) = next {
        let cause_text = cause.to_string();
        if !text.contains(&cause_text) {
            text = format!("{text}: {cause_text}");
        }
        next = cause.source();
    }
    text
}
