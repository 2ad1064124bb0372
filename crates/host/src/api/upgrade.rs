//! Connections that stop being HTTP: commands, consoles, leases.

use std::future::Future;

use axum::{
    body::Body,
    extract::{Path, Request, State},
    http::{StatusCode, header},
    response::Response,
};
use hyper::upgrade::{OnUpgrade, Upgraded};
use hyper_util::rt::TokioIo;
use ramet_client::{
    api::{CONSOLE_PROTOCOL, EXEC_PROTOCOL, ErrorBody, ErrorCode, LEASE_PROTOCOL, LeaseInfo},
    exec::ExecRequest,
};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use super::Daemonic;
use crate::{
    error::{ApiError, ApiResult},
    guest::serve_exec,
};

/// The upgrade that a request asks for.
fn wanted(request: &mut Request, protocol: &'static str) -> ApiResult<OnUpgrade> {
    let asked = request.headers().get(header::UPGRADE).is_some_and(|v| v.as_bytes() == protocol.as_bytes());
    let upgrade = request.extensions_mut().remove::<OnUpgrade>().filter(|_| asked);
    upgrade.ok_or_else(|| {
        ApiError::new(ErrorCode::BadRequest, format!("This needs an upgrade to {protocol}"))
            .remedy(format!("send `Connection: upgrade` and `Upgrade: {protocol}`, by HTTP/1.1"))
    })
}

/// Answers 101, then lets `serve` have the connection.
fn switch<F>(
    upgrade: OnUpgrade,
    protocol: &'static str,
    serve: impl FnOnce(TokioIo<Upgraded>) -> F + Send + 'static,
) -> ApiResult<Response>
where
    F: Future<Output = ()> + Send,
{
    tokio::spawn(async move {
        if let Ok(upgraded) = upgrade.await {
            serve(TokioIo::new(upgraded)).await;
        }
    });
    Response::builder()
        .status(StatusCode::SWITCHING_PROTOCOLS)
        .header(header::CONNECTION, "upgrade")
        .header(header::UPGRADE, protocol)
        .body(Body::empty())
        .map_err(|e| ApiError::failed("Failed to upgrade", e))
}

/// Runs a command. An upgrade to `ramet-exec/1`: frames of `kind: u8`, `length: u32` little-endian, payload. To the
/// daemon: 0 the request as JSON, first; 1 standard input; 2 its end; 3 a signal; 4 the terminal's size. From it:
/// 0x81 standard output, 0x82 standard error; 0x83 the exit code (i32 little-endian) or 0x84 an error, last.
#[utoipa::path(post, path = "/v1/vms/{vm}/exec", tag = "guest", params(("vm" = String, Path, description = "Name, id, or prefix of the id")),
    request_body(content = ExecRequest, description = "Not the body, but the first frame after the upgrade"),
    responses((status = 101), (status = "default", body = ErrorBody)))]
pub(super) async fn exec(State(daemon): Daemonic, Path(vm): Path<String>, mut request: Request) -> ApiResult<Response> {
    let upgrade = wanted(&mut request, EXEC_PROTOCOL)?;
    let (_, agent) = daemon.agent_of(&vm).await?;
    switch(upgrade, EXEC_PROTOCOL, async move |io| {
        let mut io = io;
        if let Err(err) = serve_exec(agent, &mut io).await {
            tracing::debug!("exec ended: {err}");
        }
        let _ = io.shutdown().await;
    })
}

/// The serial console: an upgrade to `ramet-console/1`, raw bytes.
#[utoipa::path(get, path = "/v1/vms/{vm}/console", tag = "guest", params(("vm" = String, Path, description = "Name, id, or prefix of the id")),
    responses((status = 101), (status = "default", body = ErrorBody)))]
pub(super) async fn console(
    State(daemon): Daemonic,
    Path(vm): Path<String>,
    mut request: Request,
) -> ApiResult<Response> {
    let upgrade = wanted(&mut request, CONSOLE_PROTOCOL)?;
    let mut console = daemon.console(&vm).await?;
    switch(upgrade, CONSOLE_PROTOCOL, async move |io| {
        let mut io = io;
        // Either end closes both: a console has no half-open state.
        let (mut from_user, mut to_user) = tokio::io::split(&mut io);
        let (mut from_vm, mut to_vm) = console.stream().split();
        tokio::select! {
            _ = tokio::io::copy(&mut from_user, &mut to_vm) => {}
            _ = tokio::io::copy(&mut from_vm, &mut to_user) => {}
        }
        let _ = to_user.shutdown().await;
    })
}

/// Opens a lease: an upgrade to `ramet-lease/1`. The daemon writes a line of JSON; when the connection closes, the VMs
/// that were made with the lease are removed.
#[utoipa::path(post, path = "/v1/leases", tag = "vms", responses((status = 101, body = LeaseInfo), (status = "default", body = ErrorBody)))]
pub(super) async fn lease(State(daemon): Daemonic, mut request: Request) -> ApiResult<Response> {
    let upgrade = wanted(&mut request, LEASE_PROTOCOL)?;
    switch(upgrade, LEASE_PROTOCOL, async move |mut io| {
        let lease = daemon.leases.begin();
        let line = serde_json::to_string(&LeaseInfo { lease: lease.clone() }).unwrap_or_default() + "\n";
        if io.write_all(line.as_bytes()).await.is_ok() && io.flush().await.is_ok() {
            let mut byte = [0];
            while matches!(io.read(&mut byte).await, Ok(n) if n > 0) {}
        }
        daemon.end_lease(&lease).await;
    })
}
