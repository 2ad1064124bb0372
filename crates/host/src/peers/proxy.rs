//! Passing requests on to the host that the header [`HOST_HEADER`] names, upgrades (exec, console, leases) included.

use axum::{
    body::Body,
    extract::Request,
    http::{HeaderValue, StatusCode, header},
    response::{IntoResponse as _, Response},
};
use hyper::upgrade::OnUpgrade;
use hyper_util::rt::TokioIo;
use ramet_client::api::{ErrorCode, HOST_HEADER};

use super::Peers;
use crate::error::{ApiError, ApiResult, from_peer};

/// The host that a request is for, when it names one.
///
/// # Errors
/// When the header is no text.
pub fn wanted(request: &Request) -> ApiResult<Option<String>> {
    request.headers().get(HOST_HEADER).map_or(Ok(None), |value| match value.to_str() {
        Ok(name) => Ok(Some(name.to_owned())),
        Err(_) => Err(ApiError::new(ErrorCode::BadRequest, format!("The header {HOST_HEADER} is no name of a host"))),
    })
}

/// Passes a request on, and its answer back.
///
/// # Errors
/// When the host is unknown or can't be reached.
pub async fn pass_on(peers: &Peers, host: &str, mut request: Request) -> ApiResult<Response> {
    let client = peers.client(host)?;
    let upgrade = request.headers().contains_key(header::UPGRADE);
    let here = upgrade.then(|| request.extensions_mut().remove::<OnUpgrade>()).flatten();
    let (mut parts, body) = request.into_parts();
    parts.headers.remove(HOST_HEADER);
    parts.headers.insert(header::HOST, HeaderValue::from_static("rametd"));
    if !upgrade {
        parts.headers.remove(header::CONNECTION);
    }
    parts.extensions.clear();
    let mut response = client.forward(into_sync(parts, body)).await.map_err(|e| from_peer(host, e))?;
    if response.status() == StatusCode::SWITCHING_PROTOCOLS {
        let Some(here) = here else {
            return Err(ApiError::new(ErrorCode::BadRequest, "The upgrade can't be passed on"));
        };
        let there = hyper::upgrade::on(&mut response);
        tokio::spawn(async move {
            if let (Ok(here), Ok(there)) = tokio::join!(here, there) {
                let _ = tokio::io::copy_bidirectional(&mut TokioIo::new(here), &mut TokioIo::new(there)).await;
            }
        });
        let (parts, _) = response.into_parts();
        return Ok(Response::from_parts(parts, Body::empty()));
    }
    Ok(response.map(Body::new).into_response())
}

/// axum's bodies are not `Sync`; the client's are. A body that is read by one task only loses nothing by a lock.
fn into_sync(parts: axum::http::request::Parts, body: Body) -> Request<SyncBody> {
    Request::from_parts(parts, SyncBody(std::sync::Mutex::new(body)))
}

struct SyncBody(std::sync::Mutex<Body>);

impl hyper::body::Body for SyncBody {
    type Data = hyper::body::Bytes;
    type Error = axum::Error;
    fn poll_frame(
        self: std::pin::Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<hyper::body::Frame<Self::Data>, Self::Error>>> {
        let body = self.get_mut().0.get_mut().unwrap_or_else(std::sync::PoisonError::into_inner);
        std::pin::Pin::new(body).poll_frame(cx)
    }
    fn is_end_stream(&self) -> bool {
        crate::stats::lock(&self.0).is_end_stream()
    }
    fn size_hint(&self) -> hyper::body::SizeHint {
        crate::stats::lock(&self.0).size_hint()
    }
}
