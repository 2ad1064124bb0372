//! What one daemon asks of another.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::UserInfo;

/// `POST /v1/peer/join`: by a host that holds a token.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PeerJoinRequest {
    /// The new host's name.
    pub name: String,
    /// Where it listens, `IP:PORT`.
    pub address: String,
    /// Its certificate request, PEM.
    pub csr_pem: String,
}

/// A host of the group and where it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PeerAddress {
    /// Its name.
    pub name: String,
    /// `IP:PORT`.
    pub address: String,
}

/// What a joining host gets.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct PeerJoinReply {
    /// The authority's certificate.
    pub ca_pem: String,
    /// The new host's certificate, signed.
    pub cert_pem: String,
    /// All hosts, the new one included.
    pub hosts: Vec<PeerAddress>,
}

/// `POST /v1/peer/hosts`: hosts that the sender knows.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PeerHosts {
    /// The hosts.
    pub hosts: Vec<PeerAddress>,
}

/// One clone that a peer is asked for.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PeerClone {
    /// Its number in the call.
    pub clone_number: u32,
    /// Its name.
    pub name: String,
}

/// First part of the body of `POST /v1/peer/clones`: 4 bytes little-endian length, this as JSON, then the descriptor.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PeerCloneRequest {
    /// The host that holds the checkpoint.
    pub origin: String,
    /// The clones.
    pub clones: Vec<PeerClone>,
    /// Guest image of the root VM.
    pub image: String,
    /// As in [`CloneRequest`](super::CloneRequest).
    #[serde(default)]
    pub ttl_s: Option<u64>,
    /// A lease on the peer's daemon.
    #[serde(default)]
    pub lease: Option<String>,
    /// As in [`CloneRequest`](super::CloneRequest).
    pub wait_agent_s: u64,
}

/// `GET /v1/peer/images/{id}`: who uses another host's checkpoint here.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
pub struct PeerImageUse {
    /// The users.
    pub users: Vec<UserInfo>,
}

/// `POST /v1/peer/leases/{lease}/commit`: the clones of a fork are to stay, now that all of it has come up.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PeerCommit {
    /// The lease on this daemon that they live with from now on; none: until they are removed.
    #[serde(default)]
    pub lease: Option<String>,
}

/// `POST /v1/peer/pool`: have pre-started QEMUs ready on the peer.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PeerPoolRequest {
    /// The machine, as in a descriptor.
    #[schema(value_type = Object)]
    pub spec: serde_json::Value,
    /// How many to keep ready.
    pub count: u32,
    /// Answer only when they are.
    #[serde(default)]
    pub wait: bool,
}
