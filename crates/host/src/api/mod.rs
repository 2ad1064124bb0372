//! The HTTP API: thin handlers over the daemon's operations.

mod checkpoints;
mod hosts;
mod networks;
pub mod openapi;
mod peer;
mod server;
mod upgrade;
mod vms;

use std::sync::Arc;

use axum::{
    Json, Router,
    extract::{DefaultBodyLimit, FromRequest, FromRequestParts, Request, State},
    http::{Method, request::Parts},
    middleware::{self, Next},
    response::{IntoResponse as _, Response},
    routing::{delete, get, post, put},
};
use ramet_client::api::ErrorCode;
use serde::de::DeserializeOwned;

pub use server::{Server, serve};

use crate::{
    daemon::Daemon,
    error::{ApiError, ApiResult},
    peers::{proxy, tls::Role},
};

/// Largest body of a request but a file's: a descriptor.
const MAX_BODY: usize = ramet_wire::descriptor::MAX_ENCODED + (2 << 20);

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Caller {
    /// Somebody who may use the Unix socket.
    Local,
    /// Somebody with a certificate.
    Tls(Role),
}

/// What a caller may do.
///
/// # Errors
/// [`ErrorCode::Forbidden`].
pub fn authorize(caller: &Caller, method: &Method, path: &str) -> ApiResult<()> {
    let between_hosts = path.starts_with("/v1/peer/");
    let joining = method == Method::POST && path == "/v1/peer/join";
    let allowed = match caller {
        Caller::Local => !between_hosts,
        Caller::Tls(Role::Host(_)) => !joining,
        Caller::Tls(Role::Join(_)) => joining,
    };
    if allowed {
        return Ok(());
    }
    let (what, remedy) = match caller {
        Caller::Local => ("only other hosts may ask for this", "use the calls outside /v1/peer"),
        Caller::Tls(Role::Host(_)) => ("this host has joined already", "see `ramet host ls`"),
        Caller::Tls(Role::Join(_)) => ("a token is good for joining only", "use `ramet host join TOKEN`"),
    };
    Err(ApiError::new(ErrorCode::Forbidden, format!("{method} {path}: {what}")).remedy(remedy))
}

/// All routes.
pub fn router(daemon: Arc<Daemon>) -> Router {
    Router::new()
        .route("/v1/info", get(hosts::info))
        .route("/v1/doctor", get(hosts::doctor))
        .route("/v1/images", get(hosts::images))
        .route("/v1/stats", get(hosts::stats))
        .route("/v1/pool", get(hosts::pool).post(hosts::warm))
        .route("/v1/shutdown", post(hosts::shutdown))
        .route("/metrics", get(hosts::metrics))
        .route("/openapi.json", get(hosts::openapi))
        .route("/v1/hosts", get(hosts::list))
        .route("/v1/host/init", post(hosts::init))
        .route("/v1/host/token", post(hosts::token))
        .route("/v1/host/join", post(hosts::join))
        .route("/v1/host/drain", post(hosts::drain))
        .route("/v1/vms", get(vms::list).post(vms::run))
        .route("/v1/vms/{vm}", get(vms::show).delete(vms::remove))
        .route("/v1/vms/{vm}/stop", post(vms::stop))
        .route("/v1/vms/{vm}/stats", get(vms::stats))
        .route("/v1/vms/{vm}/ping", get(vms::ping))
        .route("/v1/vms/{vm}/time", get(vms::time))
        .route("/v1/vms/{vm}/files", get(vms::get_file).put(vms::put_file).layer(DefaultBodyLimit::disable()))
        .route("/v1/vms/{vm}/exec", post(upgrade::exec))
        .route("/v1/vms/{vm}/console", get(upgrade::console))
        .route("/v1/networks", get(networks::list).post(networks::create))
        .route("/v1/networks/{name}", delete(networks::remove))
        .route("/v1/vms/{vm}/checkpoints", post(checkpoints::create))
        .route("/v1/vms/{vm}/fork", post(checkpoints::fork))
        .route("/v1/checkpoints", get(checkpoints::list))
        .route("/v1/checkpoints/{id}", get(checkpoints::show).delete(checkpoints::remove))
        .route("/v1/checkpoints/{id}/wait", get(checkpoints::wait))
        .route("/v1/checkpoints/{id}/descriptor", get(checkpoints::descriptor))
        .route("/v1/checkpoints/{id}/colors", get(checkpoints::colors))
        .route("/v1/checkpoints/{id}/colors/map", get(checkpoints::color_map))
        .route("/v1/checkpoints/{id}/changed", get(checkpoints::changed))
        .route("/v1/checkpoints/{id}/clones", post(checkpoints::clone))
        .route("/v1/leases", post(upgrade::lease))
        .route("/v1/peer/join", post(peer::join))
        .route("/v1/peer/hosts", post(peer::hosts))
        .route("/v1/peer/clones", post(peer::clones))
        .route("/v1/peer/pool", post(peer::pool))
        .route("/v1/peer/families/{family}/members", put(peer::members))
        .route("/v1/peer/boot/{hash}", get(peer::boot))
        .route("/v1/peer/tunnel", put(peer::tunnel))
        .route("/v1/peer/images/{id}", get(peer::image).delete(peer::image_drop))
        .route("/v1/peer/images/{id}/disk", put(peer::disk_sources))
        .route("/v1/peer/leases/{lease}", delete(peer::abort))
        .route("/v1/peer/leases/{lease}/commit", post(peer::commit))
        .fallback(nothing_here)
        .layer(DefaultBodyLimit::max(MAX_BODY))
        .layer(middleware::from_fn_with_state(daemon.clone(), gate))
        .with_state(daemon)
}

/// Before every handler: may the caller do this, and is it for this host at all?
async fn gate(State(daemon): State<Arc<Daemon>>, request: Request, next: Next) -> ApiResult<Response> {
    let caller = request.extensions().get::<Caller>().cloned();
    let Some(caller) = caller else {
        return Err(ApiError::new(ErrorCode::Forbidden, "Nobody knows who asks"));
    };
    authorize(&caller, request.method(), request.uri().path())?;
    match proxy::wanted(&request)? {
        Some(host) if host != daemon.config.name => {
            if caller != Caller::Local {
                return Err(ApiError::new(ErrorCode::Forbidden, "Requests are passed on once only")
                    .remedy("ask the daemon of your own host"));
            }
            proxy::pass_on(&daemon.peers, &host, request).await
        }
        _ => Ok(next.run(request).await),
    }
}

async fn nothing_here(request: Request) -> Response {
    let what = format!("There is no {} {}", request.method(), crate::names::shown(request.uri().path()));
    ApiError::new(ErrorCode::NotFound, what).remedy("GET /openapi.json tells what there is").into_response()
}

/// A JSON body; what is wrong with it is told as every other error. No body is an empty object.
pub(crate) struct Body<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequest<S> for Body<T> {
    type Rejection = ApiError;
    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let bytes = axum::body::Bytes::from_request(request, state)
            .await
            .map_err(|e| ApiError::new(ErrorCode::BadRequest, format!("The request can't be read: {e}")))?;
        let json = if bytes.is_empty() { b"{}".as_slice() } else { &bytes };
        serde_json::from_slice(json).map(Self).map_err(|e| {
            ApiError::new(ErrorCode::BadRequest, format!("The request is not understood: {e}"))
                .remedy("GET /openapi.json tells what it may hold; are both of the same ramet release?")
        })
    }
}

/// The query of a request; what is wrong with it is told as every other error.
pub(crate) struct Query<T>(pub(crate) T);

impl<S: Send + Sync, T: DeserializeOwned> FromRequestParts<S> for Query<T> {
    type Rejection = ApiError;
    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        match axum::extract::Query::<T>::from_request_parts(parts, state).await {
            Ok(axum::extract::Query(query)) => Ok(Self(query)),
            Err(err) => Err(ApiError::new(ErrorCode::BadRequest, format!("The query is not understood: {err}"))
                .remedy("GET /openapi.json tells what it may hold")),
        }
    }
}

pub(crate) type Daemonic = State<Arc<Daemon>>;
pub(crate) type Answer<T> = ApiResult<Json<T>>;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_joins_and_does_nothing_else() {
        let join = Caller::Tls(Role::Join("t".to_owned()));
        authorize(&join, &Method::POST, "/v1/peer/join").unwrap();
        for (method, path) in [
            (Method::GET, "/v1/peer/join"),
            (Method::POST, "/v1/peer/clones"),
            (Method::GET, "/v1/info"),
            (Method::GET, "/metrics"),
            (Method::POST, "/v1/peer/join/"),
        ] {
            let err = authorize(&join, &method, path).unwrap_err();
            assert_eq!(err.code(), ErrorCode::Forbidden, "{method} {path}");
        }
    }

    #[test]
    fn only_hosts_use_what_is_between_hosts() {
        let host = Caller::Tls(Role::Host("h2".to_owned()));
        authorize(&host, &Method::POST, "/v1/peer/clones").unwrap();
        authorize(&host, &Method::GET, "/v1/vms").unwrap();
        assert!(authorize(&host, &Method::POST, "/v1/peer/join").is_err());
        authorize(&Caller::Local, &Method::POST, "/v1/host/init").unwrap();
        assert!(authorize(&Caller::Local, &Method::POST, "/v1/peer/clones").is_err());
    }
}
