//! What travels between `ramet` and `rametd`, and between daemons: requests and responses of the HTTP API.
//!
//! Every type is JSON by serde and described in the OpenAPI document by utoipa. Conventions:
//!
//! - names of fields carry their unit: `_us` microseconds, `_ms` milliseconds, `_s` seconds, `_unix_ms` milliseconds
//!   since 1970, `_bytes` bytes; `ByteSize` is a plain number of bytes;
//! - identifiers are 32 lowercase hex digits; paths accept a VM's name, its id, or a unique prefix of at least 4 digits;
//! - optional fields may be left out; unknown fields are refused in requests, so that a typing error is never silent.

mod checkpoint;
mod host;
mod peer;
mod vm;

pub use checkpoint::*;
pub use host::*;
pub use peer::*;
pub use vm::*;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Header that names another host: the daemon that gets the request passes it on to that host.
pub const HOST_HEADER: &str = "x-ramet-host";
/// `Upgrade:` value of `GET /v1/vms/{vm}/console`: raw bytes of the serial console, both ways.
pub const CONSOLE_PROTOCOL: &str = "ramet-console/1";
/// `Upgrade:` value of `POST /v1/vms/{vm}/exec`: see [`crate::exec`].
pub const EXEC_PROTOCOL: &str = "ramet-exec/1";
/// `Upgrade:` value of `POST /v1/leases`: the daemon writes one line of JSON, a [`LeaseInfo`]; then the connection
/// only stays open.
pub const LEASE_PROTOCOL: &str = "ramet-lease/1";
/// The version of this API.
pub const API_VERSION: u32 = 1;

/// What kind of error it is, for programs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ErrorCode {
    /// The request makes no sense (status 400).
    BadRequest,
    /// A name breaks the rules for names (400).
    BadName,
    /// The caller may not do this (403).
    Forbidden,
    /// No VM, checkpoint, image, host or file of that name (404).
    NotFound,
    /// A prefix of an id fits several things (409).
    Ambiguous,
    /// The name is taken (409).
    NameTaken,
    /// Something else uses it: a checkpoint with clones or children, a running VM to be removed (409).
    InUse,
    /// The VM is not in a state that allows this (409).
    WrongState,
    /// A configured limit on number or depth is reached (422).
    LimitReached,
    /// Not enough memory for this on the host (507).
    NoMemory,
    /// The host takes no new VMs (503).
    Draining,
    /// Another host can't be reached (502).
    HostUnreachable,
    /// Trust between hosts is not set up, or set up already (409).
    Trust,
    /// Versions of two hosts don't fit (422).
    VersionMismatch,
    /// The guest's agent does not answer (504).
    AgentSilent,
    /// A fork or clone call failed and was undone; `clones` says what happened to each (500).
    ForkFailed,
    /// Something on the host failed (500).
    Internal,
}

/// The body of every response that is no success.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// For programs.
    pub code: ErrorCode,
    /// What went wrong; names the thing.
    pub message: String,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remedy: Option<String>,
    /// With [`ErrorCode::ForkFailed`]: one entry for each clone asked for.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub clones: Vec<CloneFailure>,
}

/// What became of one clone of a fork that failed as a whole.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct CloneFailure {
    /// Its number in the call, from 1.
    pub clone_number: u32,
    /// The name it was to have.
    pub name: String,
    /// The host it was to run on.
    pub host: String,
    /// Why it failed; none: it had come up, and was undone because a sibling failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}
