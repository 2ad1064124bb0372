//! The host itself, its group, and its statistics.

use axum::{
    Json,
    extract::State,
    http::{StatusCode, header},
    response::IntoResponse,
};
use ramet_client::api::{
    DoctorReport, DrainReport, DrainRequest, ErrorBody, GuestImageList, HostInfo, HostInitRequest, HostList, HostStats,
    JoinRequest, PoolRequest, PoolStatus, ShutdownRequest, TokenRequest, TokenResponse,
};

use super::{Answer, Body, Daemonic};
use crate::{
    backend,
    daemon::{Ending, to_the_end},
    error::ApiResult,
    peers::join as joining,
};

/// About this host.
#[utoipa::path(get, path = "/v1/info", tag = "host", responses((status = 200, body = HostInfo), (status = "default", body = ErrorBody)))]
pub(super) async fn info(State(daemon): Daemonic) -> Answer<HostInfo> {
    Ok(Json(daemon.info().await?))
}

/// What this host can do, and what to do about what it can't.
#[utoipa::path(get, path = "/v1/doctor", tag = "host", responses((status = 200, body = DoctorReport), (status = "default", body = ErrorBody)))]
pub(super) async fn doctor(State(daemon): Daemonic) -> Answer<DoctorReport> {
    Ok(Json(backend::doctor(&daemon.config).await))
}

/// The guest images on this host.
#[utoipa::path(get, path = "/v1/images", tag = "host", responses((status = 200, body = GuestImageList), (status = "default", body = ErrorBody)))]
pub(super) async fn images(State(daemon): Daemonic) -> Answer<GuestImageList> {
    Ok(Json(GuestImageList { images: backend::list_images(&daemon.images).await? }))
}

/// Histograms of fork phases, events, and the pagers' counters.
#[utoipa::path(get, path = "/v1/stats", tag = "stats", responses((status = 200, body = HostStats), (status = "default", body = ErrorBody)))]
pub(super) async fn stats(State(daemon): Daemonic) -> Answer<HostStats> {
    Ok(Json(daemon.host_stats().await))
}

/// The same as Prometheus text.
#[utoipa::path(get, path = "/metrics", tag = "stats", responses((status = 200, content_type = "text/plain", body = String)))]
pub(super) async fn metrics(State(daemon): Daemonic) -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], daemon.prometheus().await)
}

/// This document.
#[utoipa::path(get, path = "/openapi.json", tag = "host", responses((status = 200, content_type = "application/json")))]
pub(super) async fn openapi() -> impl IntoResponse {
    ([(header::CONTENT_TYPE, "application/json")], super::openapi::document())
}

/// The pre-started QEMUs.
#[utoipa::path(get, path = "/v1/pool", tag = "host", responses((status = 200, body = PoolStatus), (status = "default", body = ErrorBody)))]
pub(super) async fn pool(State(daemon): Daemonic) -> Answer<PoolStatus> {
    Ok(Json(daemon.pool_status()))
}

/// Has QEMUs made ready for clones of a VM or checkpoint.
#[utoipa::path(post, path = "/v1/pool", tag = "host", request_body = PoolRequest,
    responses((status = 200, body = PoolStatus), (status = "default", body = ErrorBody)))]
pub(super) async fn warm(State(daemon): Daemonic, Body(request): Body<PoolRequest>) -> Answer<PoolStatus> {
    Ok(Json(daemon.warm(request).await?))
}

/// Ends the daemon.
#[utoipa::path(post, path = "/v1/shutdown", tag = "host", request_body = ShutdownRequest,
    responses((status = 202), (status = "default", body = ErrorBody)))]
pub(super) async fn shutdown(State(daemon): Daemonic, Body(request): Body<ShutdownRequest>) -> StatusCode {
    daemon.end(if request.stop_vms { Ending::StopVms } else { Ending::LeaveVms });
    StatusCode::ACCEPTED
}

/// The hosts of the group, and whether they answer.
#[utoipa::path(get, path = "/v1/hosts", tag = "host", responses((status = 200, body = HostList), (status = "default", body = ErrorBody)))]
pub(super) async fn list(State(daemon): Daemonic) -> Answer<HostList> {
    Ok(Json(daemon.hosts().await?))
}

/// Makes this host the first of a group: a certificate authority, and its own certificate.
#[utoipa::path(post, path = "/v1/host/init", tag = "host", request_body = HostInitRequest,
    responses((status = 200, body = HostList), (status = "default", body = ErrorBody)))]
pub(super) async fn init(State(daemon): Daemonic, Body(request): Body<HostInitRequest>) -> Answer<HostList> {
    joining::init(&daemon.peers, request.address.as_deref(), daemon.config.listen)?;
    daemon.trust_is_set_up().await;
    Ok(Json(daemon.hosts().await?))
}

/// A token with which one more host can join.
#[utoipa::path(post, path = "/v1/host/token", tag = "host", request_body = TokenRequest,
    responses((status = 200, body = TokenResponse), (status = "default", body = ErrorBody)))]
pub(super) async fn token(State(daemon): Daemonic, Body(request): Body<TokenRequest>) -> Answer<TokenResponse> {
    Ok(Json(joining::token(&daemon.peers, &daemon.tokens, request.ttl_s)?))
}

/// Makes this host a member of the token's group.
#[utoipa::path(post, path = "/v1/host/join", tag = "host", request_body = JoinRequest,
    responses((status = 200, body = HostList), (status = "default", body = ErrorBody)))]
pub(super) async fn join(State(daemon): Daemonic, Body(request): Body<JoinRequest>) -> Answer<HostList> {
    let ours = daemon.clone();
    to_the_end(async move {
        joining::join(&ours.peers, &request.token, request.address.as_deref(), ours.config.listen).await?;
        ours.trust_is_set_up().await;
        Ok(())
    })
    .await?;
    Ok(Json(daemon.hosts().await?))
}

/// Has this host take no new VMs, and tells what is left on it.
#[utoipa::path(post, path = "/v1/host/drain", tag = "host", request_body = DrainRequest,
    responses((status = 200, body = DrainReport), (status = "default", body = ErrorBody)))]
pub(super) async fn drain(State(daemon): Daemonic, Body(request): Body<DrainRequest>) -> Answer<DrainReport> {
    daemon.store.update(|s| -> ApiResult<()> {
        s.draining = !request.undo;
        Ok(())
    })?;
    Ok(Json(DrainReport {
        host: daemon.config.name.clone(),
        draining: !request.undo,
        vms: daemon.list_vms(false).await.vms,
        checkpoints: daemon.list_checkpoints().await,
    }))
}
