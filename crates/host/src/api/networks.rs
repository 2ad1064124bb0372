//! `/v1/networks`: networks with a name.

use axum::{
    Json,
    extract::{Path, State},
    http::StatusCode,
};
use ramet_client::api::{ErrorBody, NetworkInfo, NetworkList, NetworkRequest};

use super::{Answer, Body, Daemonic};
use crate::error::ApiResult;

/// Makes a network with a name, on this host.
#[utoipa::path(post, path = "/v1/networks", tag = "networks", request_body = NetworkRequest,
    responses((status = 200, body = NetworkInfo), (status = "default", body = ErrorBody)))]
pub(super) async fn create(State(daemon): Daemonic, Body(request): Body<NetworkRequest>) -> Answer<NetworkInfo> {
    Ok(Json(daemon.create_network(&request).await?))
}

/// Lists them.
#[utoipa::path(get, path = "/v1/networks", tag = "networks",
    responses((status = 200, body = NetworkList), (status = "default", body = ErrorBody)))]
pub(super) async fn list(State(daemon): Daemonic) -> Answer<NetworkList> {
    Ok(Json(NetworkList { networks: daemon.named_networks() }))
}

/// Removes one that no VM has joined.
#[utoipa::path(delete, path = "/v1/networks/{name}", tag = "networks",
    params(("name" = String, Path, description = "The network's name")),
    responses((status = 204), (status = "default", body = ErrorBody)))]
pub(super) async fn remove(State(daemon): Daemonic, Path(name): Path<String>) -> ApiResult<StatusCode> {
    daemon.remove_named_network(&name).await?;
    Ok(StatusCode::NO_CONTENT)
}
