use std::io;

use crate::api::{ErrorBody, ErrorCode};

/// Why a call to the daemon failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// No connection.
    #[error("Can't reach rametd at {target}: {source}")]
    Connect {
        /// The socket or address.
        target: String,
        /// The cause.
        #[source]
        source: io::Error,
    },
    /// The daemon refused or failed: its own words.
    #[error("{}", .0.message)]
    Api(Box<ErrorBody>),
    /// The connection broke, or what came is not HTTP.
    #[error("The connection to rametd at {target} broke: {message}")]
    Broken {
        /// The socket or address.
        target: String,
        /// The cause.
        message: String,
    },
    /// The answer is not what this version understands.
    #[error(
        "rametd at {target} answered {what} that this version does not understand: {message}; use the same version of both"
    )]
    Answer {
        /// The socket or address.
        target: String,
        /// Which part.
        what: &'static str,
        /// The cause.
        message: String,
    },
}

impl Error {
    /// The daemon's error, when it is one.
    #[must_use]
    pub fn body(&self) -> Option<&ErrorBody> {
        match self {
            Self::Api(body) => Some(body),
            _ => None,
        }
    }

    /// The daemon's error code, when it is one.
    #[must_use]
    pub fn code(&self) -> Option<ErrorCode> {
        self.body().map(|b| b.code)
    }

    /// What to do about it.
    #[must_use]
    pub fn remedy(&self) -> Option<String> {
        match self {
            Self::Connect { source, target } => Some(match source.kind() {
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => {
                    format!(
                        "start the daemon with `rametd`, or name its socket by --socket or RAMET_SOCKET (tried {target})"
                    )
                }
                io::ErrorKind::PermissionDenied => {
                    "run as root, or as a member of the group given to `rametd --group`".to_owned()
                }
                _ => "look at the daemon's log".to_owned(),
            }),
            Self::Api(body) => body.remedy.clone(),
            Self::Broken { .. } => {
                Some("look at the daemon's log; the call may or may not have taken effect".to_owned())
            }
            Self::Answer { .. } => None,
        }
    }
}
