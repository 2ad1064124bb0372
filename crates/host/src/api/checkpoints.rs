//! `/v1/checkpoints`, and forks.

use axum::{
    Json,
    extract::{Path, State},
    http::{StatusCode, header},
    response::IntoResponse,
};
use ramet_client::api::{
    ChangedPages, ChangedQuery, CheckpointColors, CheckpointInfo, CheckpointList, CheckpointRequest, CheckpointResult,
    CloneRequest, CloneResponse, ColorsQuery, ErrorBody, ForkRequest, ForkResponse,
};

use super::{Answer, Body, Daemonic, Query};
use crate::error::ApiResult;

/// Checkpoints a VM, which goes on.
#[utoipa::path(post, path = "/v1/vms/{vm}/checkpoints", tag = "checkpoints", params(("vm" = String, Path, description = "Name, id, or prefix of the id")),
    request_body = CheckpointRequest, responses((status = 200, body = CheckpointResult), (status = "default", body = ErrorBody)))]
pub(super) async fn create(
    State(daemon): Daemonic,
    Path(vm): Path<String>,
    Body(request): Body<CheckpointRequest>,
) -> Answer<CheckpointResult> {
    Ok(Json(daemon.checkpoint(&vm, request).await?))
}

/// Checkpoint and clones in one call: all, or an error and nothing.
#[utoipa::path(post, path = "/v1/vms/{vm}/fork", tag = "checkpoints", params(("vm" = String, Path, description = "Name, id, or prefix of the id")),
    request_body = ForkRequest, responses((status = 200, body = ForkResponse), (status = "default", body = ErrorBody)))]
pub(super) async fn fork(
    State(daemon): Daemonic,
    Path(vm): Path<String>,
    Body(request): Body<ForkRequest>,
) -> Answer<ForkResponse> {
    Ok(Json(daemon.fork(&vm, request).await?))
}

/// Lists the checkpoints of this host.
#[utoipa::path(get, path = "/v1/checkpoints", tag = "checkpoints",
    responses((status = 200, body = CheckpointList), (status = "default", body = ErrorBody)))]
pub(super) async fn list(State(daemon): Daemonic) -> Answer<CheckpointList> {
    Ok(Json(CheckpointList { checkpoints: daemon.list_checkpoints().await }))
}

/// Shows a checkpoint.
#[utoipa::path(get, path = "/v1/checkpoints/{id}", tag = "checkpoints", params(("id" = String, Path, description = "Id, or prefix of it")),
    responses((status = 200, body = CheckpointInfo), (status = "default", body = ErrorBody)))]
pub(super) async fn show(State(daemon): Daemonic, Path(id): Path<String>) -> Answer<CheckpointInfo> {
    Ok(Json(daemon.show_checkpoint(&id).await?))
}

/// Waits until the checkpoint's pages have been copied out of its parent.
#[utoipa::path(get, path = "/v1/checkpoints/{id}/wait", tag = "checkpoints", params(("id" = String, Path, description = "Id, or prefix of it")),
    responses((status = 200, body = CheckpointInfo), (status = "default", body = ErrorBody)))]
pub(super) async fn wait(State(daemon): Daemonic, Path(id): Path<String>) -> Answer<CheckpointInfo> {
    Ok(Json(daemon.checkpoint_wait(&id).await?))
}

/// The checkpoint's descriptor, as it goes to another host.
#[utoipa::path(get, path = "/v1/checkpoints/{id}/descriptor", tag = "checkpoints", params(("id" = String, Path, description = "Id, or prefix of it")),
    responses((status = 200, content_type = "application/octet-stream", body = Vec<u8>), (status = "default", body = ErrorBody)))]
pub(super) async fn descriptor(State(daemon): Daemonic, Path(id): Path<String>) -> ApiResult<impl IntoResponse> {
    let bytes = daemon.encoded_descriptor(&id).await?;
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], bytes))
}

/// What the pages of a checkpoint are: how many of each color, the largest files, processes and slab caches. Waits until it is
/// known.
#[utoipa::path(get, path = "/v1/checkpoints/{id}/colors", tag = "checkpoints", params(("id" = String, Path, description = "Id, or prefix of it"), ColorsQuery),
    responses((status = 200, body = CheckpointColors), (status = "default", body = ErrorBody)))]
pub(super) async fn colors(
    State(daemon): Daemonic,
    Path(id): Path<String>,
    Query(query): Query<ColorsQuery>,
) -> Answer<CheckpointColors> {
    Ok(Json(daemon.checkpoint_colors(&id, query.largest).await?))
}

/// The color map itself: what each page is. Waits until it is known.
#[utoipa::path(get, path = "/v1/checkpoints/{id}/colors/map", tag = "checkpoints", params(("id" = String, Path, description = "Id, or prefix of it")),
    responses((status = 200, content_type = "application/octet-stream", body = Vec<u8>), (status = "default", body = ErrorBody)))]
pub(super) async fn color_map(State(daemon): Daemonic, Path(id): Path<String>) -> ApiResult<impl IntoResponse> {
    let bytes = daemon.encoded_colors(&id).await?;
    Ok(([(header::CONTENT_TYPE, "application/octet-stream")], bytes))
}

/// The pages in which a checkpoint differs from another one of its family.
#[utoipa::path(get, path = "/v1/checkpoints/{id}/changed", tag = "checkpoints", params(("id" = String, Path, description = "Id, or prefix of it"), ChangedQuery),
    responses((status = 200, body = ChangedPages), (status = "default", body = ErrorBody)))]
pub(super) async fn changed(
    State(daemon): Daemonic,
    Path(id): Path<String>,
    Query(query): Query<ChangedQuery>,
) -> Answer<ChangedPages> {
    Ok(Json(daemon.changed_pages(&id, &query.since).await?))
}

/// Removes a checkpoint that nothing uses.
#[utoipa::path(delete, path = "/v1/checkpoints/{id}", tag = "checkpoints", params(("id" = String, Path, description = "Id, or prefix of it")),
    responses((status = 204), (status = "default", body = ErrorBody)))]
pub(super) async fn remove(State(daemon): Daemonic, Path(id): Path<String>) -> ApiResult<StatusCode> {
    daemon.remove_checkpoint(&id).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Clones of a checkpoint: all, or an error and none.
#[utoipa::path(post, path = "/v1/checkpoints/{id}/clones", tag = "checkpoints", params(("id" = String, Path, description = "Id, or prefix of it")),
    request_body = CloneRequest, responses((status = 200, body = CloneResponse), (status = "default", body = ErrorBody)))]
pub(super) async fn clone(
    State(daemon): Daemonic,
    Path(id): Path<String>,
    Body(request): Body<CloneRequest>,
) -> Answer<CloneResponse> {
    Ok(Json(daemon.clone_checkpoint(&id, request).await?))
}
