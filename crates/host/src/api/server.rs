//! The sockets: a Unix socket for local callers, TCP with mutual TLS for other hosts.

use std::{fs, io, os::unix::fs::PermissionsExt as _, sync::Arc, time::Duration};

use anyhow::Context as _;
use axum::{Router, extract::Request};
use hyper::{body::Incoming, server::conn::http1, service::Service as _};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
};
use tokio_rustls::TlsAcceptor;

use super::{Caller, router};
use crate::{config::group_id, daemon::Daemon, peers::tls::role_of};

/// How long a connection may take to say what it wants.
const HEADERS: Duration = Duration::from_secs(15);
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Most connections of other hosts at a time.
const MAX_TLS: usize = 512;

/// The daemon's sockets.
#[derive(Debug)]
pub struct Server {
    daemon: Arc<Daemon>,
    unix: UnixListener,
}

impl Server {
    /// Opens the Unix socket, for its owner and one group. A socket that nobody serves is replaced.
    ///
    /// # Errors
    /// When it can't be opened, or another daemon serves it.
    pub fn open(daemon: Arc<Daemon>) -> anyhow::Result<Self> {
        let path = &daemon.config.socket;
        if std::os::unix::net::UnixStream::connect(path).is_ok() {
            anyhow::bail!("Another rametd serves {}: stop it, or give --socket", path.display());
        }
        let open = || -> anyhow::Result<UnixListener> {
            let _ = fs::remove_file(path);
            if let Some(dir) = path.parent() {
                fs::create_dir_all(dir)?;
            }
            // Nobody may connect before owner, group and mode are as they should be.
            let before = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
            let listener = UnixListener::bind(path);
            rustix::process::umask(before);
            let listener = listener?;
            if let Some(group) = &daemon.config.group {
                std::os::unix::fs::chown(path, None, Some(group_id(group)?))?;
            }
            fs::set_permissions(path, fs::Permissions::from_mode(0o660))?;
            Ok(listener)
        };
        let unix = open().with_context(|| format!("Failed to open the socket {}", path.display()))?;
        Ok(Self { daemon, unix })
    }
}

/// Serves until the daemon is told to end.
///
/// # Errors
/// When the TCP port can't be opened.
pub async fn serve(server: Server) -> anyhow::Result<()> {
    let Server { daemon, unix } = server;
    let router = router(daemon.clone());
    let ended = daemon.ended();
    tokio::select! {
        _ = ended => Ok(()),
        never = serve_unix(&unix, &router) => never,
        failed = serve_tls(&daemon, &router) => failed,
    }
}

async fn serve_unix(listener: &UnixListener, router: &Router) -> anyhow::Result<()> {
    loop {
        match listener.accept().await {
            Ok((stream, _)) => drop(tokio::spawn(connection(stream, Caller::Local, router.clone()))),
            Err(err) => pause(&err).await,
        }
    }
}

/// Waits until trust is set up, then serves other hosts.
async fn serve_tls(daemon: &Arc<Daemon>, router: &Router) -> anyhow::Result<()> {
    let Some(address) = daemon.config.listen else { return std::future::pending().await };
    daemon.trusted().await;
    let acceptor = TlsAcceptor::from(daemon.peers.files().server_config()?);
    let listener = TcpListener::bind(address).await.with_context(|| format!("Failed to listen at {address}"))?;
    daemon.port_is_open();
    tracing::info!(%address, "listening for other hosts");
    let room = Arc::new(tokio::sync::Semaphore::new(MAX_TLS));
    loop {
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(err) => {
                pause(&err).await;
                continue;
            }
        };
        let Ok(place) = room.clone().try_acquire_owned() else { continue };
        let (acceptor, router) = (acceptor.clone(), router.clone());
        tokio::spawn(async move {
            let _place = place;
            let _ = stream.set_nodelay(true);
            let role = match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
                Ok(Ok(tls)) => {
                    let role = tls.get_ref().1.peer_certificates().and_then(|c| c.first()).map(role_of);
                    role.map(|role| (tls, role))
                }
                Ok(Err(err)) => {
                    tracing::warn!(%peer, "TLS handshake failed: {err}");
                    None
                }
                Err(_) => None,
            };
            match role {
                Some((tls, Ok(role))) => connection(tls, Caller::Tls(role), router).await,
                Some((_, Err(err))) => tracing::warn!(%peer, "refused: {err:#}"),
                None => {}
            }
        });
    }
}

/// Serves one connection. Who asks goes with every request.
async fn connection<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(stream: S, caller: Caller, router: Router) {
    let service = TowerToHyperService::new(router);
    let service = hyper::service::service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(caller.clone());
        service.call(request)
    });
    let served = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADERS)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades()
        .await;
    if let Err(err) = served {
        tracing::debug!("connection ended: {err}");
    }
}

/// Too many open files, and the like: they pass.
async fn pause(err: &io::Error) {
    tracing::warn!("Failed to accept a connection: {err}");
    tokio::time::sleep(Duration::from_millis(50)).await;
}
