//! What one daemon asks of another.

use std::collections::BTreeMap;

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
    /// Its number in the group: addresses of VMs that it numbers have it in them.
    pub number: u8,
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
    /// Its place in the family's network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nic: Option<MemberNumber>,
}

/// A frozen disk that its host serves to others.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PeerDisk {
    /// Its id.
    pub disk: String,
    /// Its size in bytes.
    pub size: u64,
    /// Its golden image.
    pub golden: PeerGolden,
    /// The images that are data volumes.
    #[serde(default)]
    pub volumes: Vec<PeerGolden>,
    /// Which of its pages are as in the golden image, zero, or data: base64, as `ramet_disk` encodes it.
    pub extents: String,
    /// Who serves it: first the checkpoint's host, which has all of it, then those that have some.
    pub sources: Vec<PeerSource>,
}

/// A host that serves pages of a frozen disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PeerSource {
    /// The host's name.
    pub host: String,
    /// `IP:PORT` of its `ramet-disk`.
    pub address: String,
}

/// `PUT /v1/peer/images/{id}/disk`: who has pages of the disk of the sender's checkpoint.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PeerDiskSources {
    /// The disk's id.
    pub disk: String,
    /// Who serves it, best first.
    pub sources: Vec<PeerSource>,
}

/// Answers it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PeerDiskServer {
    /// `IP:PORT` of the `ramet-disk` that serves what the host has of the disk; none: it has nothing of it.
    pub address: Option<String>,
}

/// A member of a family: its address follows from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
pub struct MemberNumber {
    /// Number of the host that gave it its address.
    pub range: u8,
    /// Its number among those of that host.
    pub index: u16,
}

/// An image's disk, known by its contents.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PeerGolden {
    /// The image's name where it was first used.
    pub image: String,
    /// The hash of the disk.
    pub hash: String,
}

/// A family's network.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PeerNetwork {
    /// Its number in tunnels.
    pub vni: u32,
    /// What may leave it, as `ramet_net` writes it.
    #[schema(value_type = Object)]
    pub egress: serde_json::Value,
    /// Bits a second in and out of it, on each host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<u64>,
    /// Hosts that have the family, and who its members are there.
    pub hosts: BTreeMap<String, Vec<MemberNumber>>,
}

/// `PUT /v1/peer/families/{family}/members`: who the sender's members of a family are from now on.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PeerMembers {
    /// All of them.
    pub members: Vec<MemberNumber>,
    /// All hosts that the sender knows to have the family.
    pub hosts: Vec<String>,
}

/// What a VM was booted from, known by its contents: a clone has none of it until it boots anew, and may be on a host that
/// has not the image. `GET /v1/peer/boot/{hash}` gives a file of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PeerBoot {
    /// The hash of the kernel.
    pub kernel: String,
    /// That of its initial file system.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub initrd: Option<String>,
    /// The whole command line.
    pub cmdline: String,
}

/// `PUT /v1/peer/tunnel`, and its answer: how a host encrypts its tunnels.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PeerTunnel {
    /// Its public key (X25519), base64; none: it does not encrypt.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
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
    /// The checkpoint's disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<PeerDisk>,
    /// The family's network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<PeerNetwork>,
    /// Applications stand still in the checkpoint.
    #[serde(default)]
    pub frozen: bool,
    /// The agent of the parent had answered.
    pub agent: bool,
    /// What the clones boot from when they boot anew.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<PeerBoot>,
    /// As in [`CloneRequest`](super::CloneRequest).
    #[serde(default)]
    pub options: super::CloneOptions,
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
    /// Members of the family on other hosts, as they are now.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub members: BTreeMap<String, Vec<MemberNumber>>,
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
