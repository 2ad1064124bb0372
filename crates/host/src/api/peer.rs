//! `/v1/peer`: what one daemon asks of another. Over TLS only.

use axum::{
    Extension, Json,
    body::Bytes,
    extract::{Path, State},
    http::{StatusCode, header},
    response::IntoResponse,
};
use ramet_client::api::{
    CloneResponse, ErrorBody, ErrorCode, PeerCommit, PeerDiskServer, PeerDiskSources, PeerHosts, PeerImageUse,
    PeerJoinReply, PeerJoinRequest, PeerMembers, PeerPoolRequest, PeerTunnel, PoolStatus,
};

use super::{Answer, Body, Caller, Daemonic};
use crate::{
    error::{ApiError, ApiResult},
    peers::{join as joining, tls::Role},
};

fn sender(caller: &Caller) -> ApiResult<&str> {
    match caller {
        Caller::Tls(Role::Host(name)) => Ok(name),
        _ => Err(ApiError::new(ErrorCode::Forbidden, "Only another host may ask for this")),
    }
}

/// Signs a new host's certificate. With a token's certificate only.
#[utoipa::path(post, path = "/v1/peer/join", tag = "peer", request_body = PeerJoinRequest,
    responses((status = 200, body = PeerJoinReply), (status = "default", body = ErrorBody)))]
pub(super) async fn join(
    State(daemon): Daemonic,
    Extension(caller): Extension<Caller>,
    Body(request): Body<PeerJoinRequest>,
) -> Answer<PeerJoinReply> {
    let Caller::Tls(Role::Join(number)) = caller else {
        return Err(ApiError::new(ErrorCode::Forbidden, "Only the holder of a token may join"));
    };
    Ok(Json(joining::sign(&daemon.peers, &daemon.tokens, &number, &request).await?))
}

/// Learns of hosts.
#[utoipa::path(post, path = "/v1/peer/hosts", tag = "peer", request_body = PeerHosts,
    responses((status = 204), (status = "default", body = ErrorBody)))]
pub(super) async fn hosts(
    State(daemon): Daemonic,
    Extension(caller): Extension<Caller>,
    Body(request): Body<PeerHosts>,
) -> ApiResult<StatusCode> {
    joining::heard(&daemon.peers, sender(&caller)?, &request.hosts)?;
    Ok(StatusCode::NO_CONTENT)
}

/// Makes clones of the sender's checkpoint. They stay when they are committed. The body: the length of a
/// `PeerCloneRequest` as 4 bytes little-endian, the request as JSON, the checkpoint's descriptor.
#[utoipa::path(post, path = "/v1/peer/clones", tag = "peer", request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses((status = 200, body = CloneResponse), (status = "default", body = ErrorBody)))]
pub(super) async fn clones(
    State(daemon): Daemonic,
    Extension(caller): Extension<Caller>,
    body: Bytes,
) -> Answer<CloneResponse> {
    Ok(Json(daemon.peer_clones(sender(&caller)?, &body).await?))
}

/// Has QEMUs made ready.
#[utoipa::path(post, path = "/v1/peer/pool", tag = "peer", request_body = PeerPoolRequest,
    responses((status = 200, body = PoolStatus), (status = "default", body = ErrorBody)))]
pub(super) async fn pool(State(daemon): Daemonic, Body(request): Body<PeerPoolRequest>) -> Answer<PoolStatus> {
    Ok(Json(daemon.warm_here(request).await?))
}

/// A file that VMs boot from, by the hash of its contents.
#[utoipa::path(get, path = "/v1/peer/boot/{hash}", tag = "peer", params(("hash" = String, Path, description = "XXH3 of its bytes")),
    responses((status = 200, content_type = "application/octet-stream", body = Vec<u8>), (status = "default", body = ErrorBody)))]
pub(super) async fn boot(State(daemon): Daemonic, Path(hash): Path<String>) -> ApiResult<impl IntoResponse> {
    let bytes = daemon.peer_boot(&hash).await?;
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], bytes))
}

/// Who uses the sender's checkpoint on this host.
#[utoipa::path(get, path = "/v1/peer/images/{id}", tag = "peer", params(("id" = String, Path, description = "The checkpoint's id")),
    responses((status = 200, body = PeerImageUse), (status = "default", body = ErrorBody)))]
pub(super) async fn image(State(daemon): Daemonic, Path(id): Path<String>) -> Answer<PeerImageUse> {
    Ok(Json(PeerImageUse { users: daemon.peer_image(&id)? }))
}

/// Drops this host's copy of the sender's checkpoint.
#[utoipa::path(delete, path = "/v1/peer/images/{id}", tag = "peer", params(("id" = String, Path, description = "The checkpoint's id")),
    responses((status = 204), (status = "default", body = ErrorBody)))]
pub(super) async fn image_drop(State(daemon): Daemonic, Path(id): Path<String>) -> ApiResult<StatusCode> {
    daemon.peer_image_drop(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Tells who else has pages of the disk of the sender's checkpoint; the answer: where this host serves them.
#[utoipa::path(put, path = "/v1/peer/images/{id}/disk", tag = "peer", params(("id" = String, Path, description = "The checkpoint's id")),
    request_body = PeerDiskSources,
    responses((status = 200, body = PeerDiskServer), (status = "default", body = ErrorBody)))]
pub(super) async fn disk_sources(
    State(daemon): Daemonic,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    Body(request): Body<PeerDiskSources>,
) -> Answer<PeerDiskServer> {
    Ok(Json(daemon.peer_disk_sources(sender(&caller)?, &id, &request).await?))
}

/// Ends a lease; its VMs are gone when this answers.
#[utoipa::path(delete, path = "/v1/peer/leases/{lease}", tag = "peer", params(("lease" = String, Path, description = "The lease")),
    responses((status = 204), (status = "default", body = ErrorBody)))]
pub(super) async fn abort(State(daemon): Daemonic, Path(lease): Path<String>) -> StatusCode {
    daemon.peer_abort(&lease).await;
    StatusCode::NO_CONTENT
}

/// The clones of a fork stay.
#[utoipa::path(post, path = "/v1/peer/leases/{lease}/commit", tag = "peer", params(("lease" = String, Path, description = "The fork's lease")),
    request_body = PeerCommit, responses((status = 204), (status = "default", body = ErrorBody)))]
pub(super) async fn commit(
    State(daemon): Daemonic,
    Path(lease): Path<String>,
    Body(request): Body<PeerCommit>,
) -> ApiResult<StatusCode> {
    daemon.peer_commit(&lease, &request).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Who the sender's members of a family are.
#[utoipa::path(put, path = "/v1/peer/families/{family}/members", tag = "peer",
    params(("family" = String, Path, description = "The family's id")),
    request_body = PeerMembers, responses((status = 204), (status = "default", body = ErrorBody)))]
pub(super) async fn members(
    State(daemon): Daemonic,
    Extension(caller): Extension<Caller>,
    Path(family): Path<String>,
    Body(request): Body<PeerMembers>,
) -> ApiResult<StatusCode> {
    daemon.peer_members(sender(&caller)?, &family, &request).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Tells keys of encrypted tunnels: the sender's, and this host's in the answer. A host without one does not encrypt.
#[utoipa::path(put, path = "/v1/peer/tunnel", tag = "peer", request_body = PeerTunnel,
    responses((status = 200, body = PeerTunnel), (status = "default", body = ErrorBody)))]
pub(super) async fn tunnel(
    State(daemon): Daemonic,
    Extension(caller): Extension<Caller>,
    Body(request): Body<PeerTunnel>,
) -> Answer<PeerTunnel> {
    Ok(Json(daemon.peer_tunnel(sender(&caller)?, &request)?))
}
