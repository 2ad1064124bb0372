//! What can go wrong between the host and an agent.

use std::path::PathBuf;
use std::time::Duration;

/// A failure of the channel, of the agent, or of what was asked of it.
#[derive(Clone, Debug, thiserror::Error)]
pub enum AgentError {
    /// No connection to the socket of the virtual machine's agent port.
    #[error(
        "cannot connect to the agent's socket {} within {limit:?}: {reason}; check that the virtual machine runs",
        path.display()
    )]
    Connect {
        /// The socket.
        path: PathBuf,
        /// How long it was tried.
        limit: Duration,
        /// The last error.
        reason: String,
    },
    /// The agent did not answer the handshake.
    #[error(
        "the guest's agent did not answer within {limit:?}; the guest may still be booting, may hang (see its console), \
         or another client may hold its channel"
    )]
    NoHello {
        /// How long it was tried.
        limit: Duration,
    },
    /// An answer did not come in time.
    #[error(
        "the guest's agent did not finish `{what}` within {limit:?}; the guest may hang, or its pages may not be reachable"
    )]
    TimedOut {
        /// What was asked.
        what: &'static str,
        /// How long it was waited for.
        limit: Duration,
    },
    /// The channel has ended: the virtual machine has stopped, or the client was closed.
    #[error("the channel to the guest's agent was closed ({reason}); connect again if the virtual machine still runs")]
    Disconnected {
        /// Why.
        reason: String,
    },
    /// The guest refused, or failed at, what was asked.
    #[error("{message}")]
    Guest {
        /// The guest's own words.
        message: String,
    },
    /// The guest broke the rules of the protocol.
    #[error("the guest's agent broke the protocol: {what}; rebuild the guest image with this version of Ramet")]
    Protocol {
        /// How.
        what: String,
    },
    /// A request that does not fit into a frame.
    #[error("the request is too large for the agent's protocol: {0}; shorten the arguments or the environment")]
    TooLarge(#[from] crate::protocol::TooLong),
    /// The command has ended or does not take input.
    #[error("the command does not take input any more")]
    InputClosed,
    /// Reading or writing on the host's side failed.
    #[error("{what} on the host failed: {reason}")]
    Host {
        /// What failed.
        what: &'static str,
        /// Why.
        reason: String,
    },
}

impl AgentError {
    pub(super) fn protocol(what: impl Into<String>) -> Self {
        Self::Protocol { what: what.into() }
    }

    pub(super) fn disconnected(reason: impl ToString) -> Self {
        Self::Disconnected { reason: reason.to_string() }
    }

    /// Whether the channel itself is unusable and a new [`AgentClient`](super::AgentClient) is needed.
    pub fn is_channel(&self) -> bool {
        matches!(self, Self::Connect { .. } | Self::NoHello { .. } | Self::Disconnected { .. })
    }
}
