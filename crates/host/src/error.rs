//! One error type for the whole daemon: what the API answers with.

use std::fmt;

use axum::{
    Json,
    http::StatusCode,
    response::{IntoResponse, Response},
};
use ramet_client::api::{CloneFailure, ErrorBody, ErrorCode};

/// A failed request: code, message, remedy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ApiError(Box<ErrorBody>);

/// Result of the daemon's operations.
pub type ApiResult<T> = Result<T, ApiError>;

impl ApiError {
    /// An error with the remedy that fits most errors of this kind.
    pub fn new(code: ErrorCode, message: impl Into<String>) -> Self {
        let remedy = usual_remedy(code).map(str::to_owned);
        Self(Box::new(ErrorBody { code, message: message.into(), remedy, clones: Vec::new() }))
    }

    /// Something on the host failed that the caller can't help.
    pub fn internal(message: impl Into<String>) -> Self {
        Self::new(ErrorCode::Internal, message)
    }

    /// Something on the host failed while `what`; `err` says how, with its causes.
    pub fn failed(what: impl fmt::Display, err: impl Into<anyhow::Error>) -> Self {
        Self::internal(format!("{what}: {:#}", err.into()))
    }

    /// Says what to do about it, instead of what is usual.
    #[must_use]
    pub fn remedy(mut self, remedy: impl Into<String>) -> Self {
        self.0.remedy = Some(remedy.into());
        self
    }

    /// Adds what became of each clone.
    #[must_use]
    pub fn clones(mut self, clones: Vec<CloneFailure>) -> Self {
        self.0.clones = clones;
        self
    }

    /// Puts the circumstances before the message.
    #[must_use]
    pub fn context(mut self, context: impl fmt::Display) -> Self {
        self.0.message = format!("{context}: {}", self.0.message);
        self
    }

    /// The error's kind.
    #[must_use]
    pub fn code(&self) -> ErrorCode {
        self.0.code
    }

    /// The error as it is sent.
    #[must_use]
    pub fn body(&self) -> &ErrorBody {
        &self.0
    }

    /// The HTTP status that goes with the code.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        match self.0.code {
            ErrorCode::BadRequest | ErrorCode::BadName => StatusCode::BAD_REQUEST,
            ErrorCode::Forbidden => StatusCode::FORBIDDEN,
            ErrorCode::NotFound => StatusCode::NOT_FOUND,
            ErrorCode::Ambiguous
            | ErrorCode::NameTaken
            | ErrorCode::InUse
            | ErrorCode::WrongState
            | ErrorCode::Trust => StatusCode::CONFLICT,
            ErrorCode::LimitReached | ErrorCode::VersionMismatch => StatusCode::UNPROCESSABLE_ENTITY,
            ErrorCode::NoMemory => StatusCode::INSUFFICIENT_STORAGE,
            ErrorCode::Draining => StatusCode::SERVICE_UNAVAILABLE,
            ErrorCode::HostUnreachable => StatusCode::BAD_GATEWAY,
            ErrorCode::AgentSilent => StatusCode::GATEWAY_TIMEOUT,
            _ => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }
}

/// What helps against most errors of a kind. Where an error knows better it says so.
fn usual_remedy(code: ErrorCode) -> Option<&'static str> {
    Some(match code {
        ErrorCode::BadRequest | ErrorCode::BadName => "correct the request; `ramet help COMMAND` tells what is allowed",
        ErrorCode::NotFound => "`ramet ps`, `ramet checkpoint ls` and `ramet image ls` tell what there is",
        ErrorCode::Ambiguous => "give more digits of the id",
        ErrorCode::NameTaken => "choose another name",
        ErrorCode::InUse => "remove what uses it first",
        ErrorCode::WrongState => "`ramet ps` shows the state",
        ErrorCode::LimitReached => "ask for less, or start rametd with a higher limit",
        ErrorCode::NoMemory => "ask for less memory, remove VMs (`ramet ps`), or use another host",
        ErrorCode::Draining => "use another host, or `ramet host drain --undo`",
        ErrorCode::HostUnreachable => "see `ramet host ls`; is rametd running there, and the network up?",
        ErrorCode::Trust => "see `ramet host ls`; `ramet host init`, `token` and `join` set trust up",
        ErrorCode::VersionMismatch => "run the same ramet release on both hosts",
        ErrorCode::AgentSilent => "look at `ramet console VM`; is the agent in the image?",
        ErrorCode::ForkFailed => "nothing is left of the call; try again, or fewer clones",
        ErrorCode::Internal => "look at the daemon's log",
        _ => return None,
    })
}

impl fmt::Display for ApiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.message)?;
        if let Some(remedy) = &self.0.remedy {
            write!(f, " ({remedy})")?;
        }
        Ok(())
    }
}

impl std::error::Error for ApiError {}

impl From<anyhow::Error> for ApiError {
    fn from(err: anyhow::Error) -> Self {
        Self::internal(format!("{err:#}"))
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        if self.0.code == ErrorCode::Internal {
            tracing::error!("{self}");
        }
        (self.status(), Json(self.0)).into_response()
    }
}

/// An error of a call to another daemon: its own words are kept, and the host is named.
#[must_use]
pub fn from_peer(host: &str, err: ramet_client::Error) -> ApiError {
    match err {
        ramet_client::Error::Api(body) => ApiError(body).context(format!("host '{host}'")),
        ramet_client::Error::Answer { .. } => {
            ApiError::new(ErrorCode::VersionMismatch, format!("Host '{host}' does not speak this version: {err}"))
        }
        err => ApiError::new(ErrorCode::HostUnreachable, format!("Can't reach host '{host}': {err}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_has_a_status_that_fits() {
        assert_eq!(ApiError::new(ErrorCode::NameTaken, "x").status(), StatusCode::CONFLICT);
        assert_eq!(ApiError::new(ErrorCode::NoMemory, "x").status(), StatusCode::INSUFFICIENT_STORAGE);
        assert_eq!(ApiError::internal("x").status(), StatusCode::INTERNAL_SERVER_ERROR);
    }

    #[test]
    fn a_peers_error_keeps_its_code_and_names_the_host() {
        let body = ErrorBody { code: ErrorCode::NameTaken, message: "taken".into(), remedy: None, clones: vec![] };
        let err = from_peer("h2", ramet_client::Error::Api(Box::new(body)));
        assert_eq!(err.code(), ErrorCode::NameTaken);
        assert_eq!(err.to_string(), "host 'h2': taken");
    }
}
