//! Hosts, trust between them, and their statistics.

use std::collections::BTreeMap;

use ramet_memory::{ByteSize, FamilyId};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{AccelKind, CheckpointInfo, Counters, LatencySummary, VmInfo};

/// `GET /v1/info`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct HostInfo {
    /// The host's name.
    pub name: String,
    /// Ramet's version.
    pub version: String,
    /// `API_VERSION`.
    pub api_version: u32,
    /// What new VMs run on.
    pub accel: AccelKind,
    /// Address for other hosts; none: trust is not set up.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    /// Takes no new VMs.
    pub draining: bool,
    /// Memory that new VMs can have.
    pub memory_available_bytes: u64,
    /// Memory of the machine.
    pub memory_total_bytes: u64,
    /// Room left for page files.
    pub pages_available_bytes: u64,
    /// How many VMs have a QEMU.
    pub vms: u32,
    /// How many checkpoints.
    pub checkpoints: u32,
    /// Limits in force.
    pub limits: Limits,
    /// Process id of the daemon.
    pub pid: u32,
    /// Directory of its state.
    pub state_dir: String,
    /// Directory of the guest images.
    pub image_dir: String,
}

/// Limits of a host; a request beyond one fails with `ErrorCode::LimitReached`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(default)]
pub struct Limits {
    /// Clones of one call, over all hosts.
    pub clones_per_call: u32,
    /// VMs on this host.
    pub vms: u32,
    /// Generations: forks between a root VM and its furthest descendant.
    pub depth: u32,
    /// Memory of one VM.
    #[schema(value_type = u64)]
    pub vm_memory: ByteSize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { clones_per_call: 64, vms: 256, depth: 128, vm_memory: ByteSize(256 << 30) }
    }
}

/// `POST /v1/host/init`: make the certificate authority and this host's certificate.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct HostInitRequest {
    /// `IP:PORT` that other hosts reach this one at. Default: what `--listen` says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
}

/// `POST /v1/host/token`.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct TokenRequest {
    /// How long it can be used. Default 600, at most 86400.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_s: Option<u64>,
}

/// A token that lets one host join, once.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct TokenResponse {
    /// To be carried to the new host; it is a secret.
    pub token: String,
    /// When it ends.
    pub expires_unix_ms: u64,
}

/// `POST /v1/host/join`: on the new host.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct JoinRequest {
    /// From `ramet host token` on a host of the group.
    pub token: String,
    /// `IP:PORT` that other hosts reach this one at. Default: what `--listen` says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
}

/// One host of the group.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct HostEntry {
    /// Its name.
    pub name: String,
    /// Where other hosts reach it.
    pub address: String,
    /// This is the host that answers.
    pub this: bool,
    /// It answered just now.
    pub alive: bool,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Round trip of that question.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rtt_us: Option<u64>,
    /// It takes no new VMs.
    pub draining: bool,
    /// VMs on it.
    pub vms: u32,
    /// Its version.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// What its VMs run on.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accel: Option<AccelKind>,
}

/// `GET /v1/hosts`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct HostList {
    /// This host first, then the others by name.
    pub hosts: Vec<HostEntry>,
}

/// `POST /v1/host/drain`.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct DrainRequest {
    /// Take new VMs again.
    #[serde(default)]
    pub undo: bool,
}

/// What is still on a host that takes no new VMs.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct DrainReport {
    /// The host.
    pub host: String,
    /// Whether it takes no new VMs now.
    pub draining: bool,
    /// VMs left.
    pub vms: Vec<VmInfo>,
    /// Checkpoints left.
    pub checkpoints: Vec<CheckpointInfo>,
}

/// `POST /v1/shutdown`: the daemon ends.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ShutdownRequest {
    /// End all VMs and pagers, too, and unmount the page files. Otherwise they go on without the daemon.
    #[serde(default)]
    pub stop_vms: bool,
}

/// `POST /v1/pool`: have QEMUs ready for clones. For a VM these are pre-started ones of its shape; for a checkpoint, on its
/// own host, clones of it that are loaded already and only have to go on.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PoolRequest {
    /// A VM or a checkpoint whose clones they are for.
    pub like: String,
    /// How many to keep ready.
    pub count: u32,
    /// Hosts that are to have them. Empty: this one.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hosts: Vec<String>,
    /// Answer only when they are.
    #[serde(default)]
    pub wait: bool,
}

/// Pre-started QEMUs of one shape on one host.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct PoolEntry {
    /// The host.
    pub host: String,
    /// Machine, memory, CPUs, accelerator, in words.
    pub shape: String,
    /// How many are ready.
    pub ready: u32,
}

/// `GET /v1/pool`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct PoolStatus {
    /// One entry for each shape.
    pub entries: Vec<PoolEntry>,
}

/// A guest image on the host.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct GuestImage {
    /// Its name.
    pub name: String,
    /// `linux` or `tiny`.
    pub guest: String,
    /// Bytes of kernel and initramfs.
    pub bytes: u64,
    /// Why it can't be used: a file missing or truncated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// `GET /v1/images`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct GuestImageList {
    /// The images by name.
    pub images: Vec<GuestImage>,
}

/// How a finding of the doctor is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum FindingStatus {
    /// As it should be.
    Ok,
    /// Works, but less well.
    Warn,
    /// Ramet can't work like this.
    Fail,
}

/// One thing that the doctor looked at.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct Finding {
    /// What was looked at.
    pub name: String,
    /// The verdict.
    pub status: FindingStatus,
    /// What was found.
    pub detail: String,
    /// What to do about it; empty: nothing.
    #[serde(default)]
    pub remedy: String,
}

/// `GET /v1/doctor`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct DoctorReport {
    /// The findings.
    pub findings: Vec<Finding>,
}

/// One pager: all VMs and images of a family on this host.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct PagerInfo {
    /// The family.
    #[schema(value_type = String)]
    pub family: FamilyId,
    /// Its process id.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// How often it was started again.
    pub restarts: u32,
    /// Why it does not answer, when it doesn't.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Counters of the whole process.
    pub counters: Counters,
    /// Counters by VM id.
    pub vms: BTreeMap<String, Counters>,
    /// Counters by checkpoint id.
    pub images: BTreeMap<String, Counters>,
    /// Counters of the family's server of frozen disks, when it has one: `fetched_bytes` and `cached_bytes` of other
    /// hosts' disks, `golden_bytes` read from images of this host, `served_bytes` to QEMUs and of this host's disks to other
    /// hosts, `passed_on_bytes` to other hosts of what was fetched.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<Counters>,
}

/// `GET /v1/stats`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct HostStats {
    /// The host.
    pub host: String,
    /// Latencies of all forks since the daemon started, by phase: `clone_claim`, `clone_load`, `clone_running` (request
    /// to running), `clone_answered`, `parent_pause` and so on.
    pub phases: BTreeMap<String, LatencySummary>,
    /// Events since the daemon started: `forks`, `forks_failed`, `clones`, `checkpoints`, `vm_crashes`, `pager_restarts`.
    pub events: BTreeMap<String, u64>,
    /// The pagers.
    pub pagers: Vec<PagerInfo>,
}
