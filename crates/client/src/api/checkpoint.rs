//! Checkpoints, clones and forks.

use ramet_color::Summary;
use ramet_memory::{ByteSize, FamilyId, ImageId, LayerId, VmId};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::VmInfo;

/// Where the time went.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Timeline {
    /// The phases in order. Of a clone: `claim`, `remap`, `attach`, `load`, `wait` (for its siblings), `continue`,
    /// `first_answer`, `identity`, `release`; on another host before them `send` and `import`; one with a network card has
    /// `network` as part of `attach`. Of a parent: `attach` (the first time), `quiesce`, `prepare`, `save`, `commit`,
    /// `resume`; `pause` is the part of these from STOP to RESUME.
    pub phases: Vec<Phase>,
    /// From the request to the end of the last phase.
    pub total_us: u64,
}

impl Timeline {
    /// How long this phase took; none when there was no such phase.
    #[must_use]
    pub fn phase_us(&self, name: &str) -> Option<u64> {
        self.phases.iter().find(|p| p.name == name).map(|p| p.duration_us)
    }
}

/// One phase of a [`Timeline`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Phase {
    /// Its name.
    pub name: String,
    /// When it began, from the request.
    pub start_us: u64,
    /// How long it took.
    pub duration_us: u64,
}

/// `POST /v1/vms/{vm}/checkpoints`.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CheckpointRequest {
    /// A note to find it again by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// Answer only when the layer is complete on disk, not already when the parent runs again.
    #[serde(default)]
    pub wait: bool,
    /// What the guest does before it.
    #[serde(default)]
    pub quiesce: Quiesce,
}

/// What a guest does before a checkpoint is taken of it. Only a Linux guest whose agent has answered is asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Quiesce {
    /// Run the hooks in `/etc/ramet/checkpoint.d`. One that fails or takes too long makes the checkpoint fail. Default true.
    #[serde(default = "yes")]
    pub hooks: bool,
    /// Have all applications stand still from before the checkpoint until, in the parent, it is taken, and in a clone its
    /// kernel has fresh entropy and it knows who it is. Without this, programs of several clones may draw the same random
    /// numbers for a moment. Costs some tens of milliseconds.
    #[serde(default)]
    pub freeze: bool,
    /// Write file systems to their disks before. A clone does not need that, as it has its parent's page cache; one that
    /// reads the disk alone does.
    #[serde(default)]
    pub sync: bool,
    /// How long all of it may take, in seconds. Default 30.
    #[serde(default = "default_hook_limit")]
    pub limit_s: u64,
}

impl Default for Quiesce {
    fn default() -> Self {
        Self { hooks: true, freeze: false, sync: false, limit_s: default_hook_limit() }
    }
}

/// How a clone becomes somebody.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CloneOptions {
    /// Make new SSH host keys in it.
    #[serde(default)]
    pub ssh_host_keys: bool,
    /// Run the hooks in `/etc/ramet/clone.d` before it is released. One that fails or takes too long makes the call fail.
    /// Default true.
    #[serde(default = "yes")]
    pub hooks: bool,
    /// How long the hooks may take, in seconds. Default 30.
    #[serde(default = "default_hook_limit")]
    pub hook_limit_s: u64,
    /// Release it even when its agent can't confirm that the kernel has fresh entropy. Its random numbers may then be those
    /// of its siblings. Also when its parent's agent has never answered: then nobody in it is told anything, and its network
    /// cards are replaced by new ones.
    #[serde(default)]
    pub allow_unseeded: bool,
}

impl Default for CloneOptions {
    fn default() -> Self {
        Self { ssh_host_keys: false, hooks: true, hook_limit_s: default_hook_limit(), allow_unseeded: false }
    }
}

fn yes() -> bool {
    true
}
fn default_hook_limit() -> u64 {
    30
}

/// What a checkpoint call did.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct CheckpointResult {
    /// The checkpoint.
    pub checkpoint: CheckpointInfo,
    /// How long the parent stood still: STOP to RESUME.
    pub pause_us: u64,
    /// The parent's phases.
    pub timeline: Timeline,
}

/// One layer of a checkpoint's image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LayerInfo {
    /// Its id.
    #[schema(value_type = String)]
    pub id: LayerId,
    /// Pages that it changed.
    pub pages: u64,
    /// Size of those pages.
    pub bytes: u64,
    /// What its page file takes on this host.
    pub stored_bytes: u64,
    /// The checkpoints on this host that have it, by id.
    #[schema(value_type = Vec<String>)]
    pub checkpoints: Vec<ImageId>,
}

/// Something that a checkpoint is needed by.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct UserInfo {
    /// `vm` or `checkpoint`.
    pub kind: String,
    /// The VM's name, or the checkpoint's id.
    pub name: String,
    /// The host it is on.
    pub host: String,
}

/// One checkpoint.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CheckpointInfo {
    /// Its id.
    #[schema(value_type = String)]
    pub id: ImageId,
    /// The note given when it was made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// The host that holds it.
    pub host: String,
    /// The family.
    #[schema(value_type = String)]
    pub family: FamilyId,
    /// The VM that it was taken of.
    #[schema(value_type = String)]
    pub vm: VmId,
    /// That VM's name at the time.
    pub vm_name: String,
    /// The checkpoint that VM was cloned from, or last checkpointed as.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub base: Option<ImageId>,
    /// Generation of the VM that it was taken of.
    pub generation: u32,
    /// Guest image of the root VM.
    pub image: String,
    /// Guest memory.
    #[schema(value_type = u64)]
    pub memory: ByteSize,
    /// When it was made.
    pub created_unix_ms: u64,
    /// Size of the devices' state.
    pub state_bytes: u64,
    /// The parent's pause when it was made.
    pub pause_us: u64,
    /// True when the background copy of its newest layer has ended.
    pub complete: bool,
    /// Why it can never be complete: its parent's QEMU died before its pages were copied out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub broken: Option<String>,
    /// Size of its color map, once that has been made.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub colors_bytes: Option<u64>,
    /// Its layers, lowest first.
    pub layers: Vec<LayerInfo>,
    /// Who needs it: VMs and checkpoints, here and on other hosts.
    pub users: Vec<UserInfo>,
}

/// Query of `GET /v1/checkpoints/{id}/colors`.
#[derive(Debug, Clone, Default, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct ColorsQuery {
    /// How many of the largest files, processes and slab caches are told [default: 10].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub largest: Option<usize>,
}

/// `GET /v1/checkpoints/{id}/colors`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct CheckpointColors {
    /// The checkpoint.
    #[schema(value_type = String)]
    pub checkpoint: ImageId,
    /// Name of the VM that it was taken of.
    pub vm_name: String,
    /// The host that holds the checkpoint.
    pub host: String,
    /// Size of the color map as it is kept and sent.
    pub map_bytes: u64,
    /// What is in it.
    #[schema(value_type = Object)]
    pub summary: Summary,
}

/// Query of `GET /v1/checkpoints/{id}/changed`.
#[derive(Debug, Clone, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct ChangedQuery {
    /// The other checkpoint: id, or prefix of it.
    pub since: String,
}

/// `GET /v1/checkpoints/{id}/changed`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ChangedPages {
    /// The checkpoint.
    #[schema(value_type = String)]
    pub checkpoint: ImageId,
    /// The one that it is compared with.
    #[schema(value_type = String)]
    pub since: ImageId,
    /// Pages of the guest.
    pub pages: u64,
    /// Runs of pages that differ, or whose contents are on another host: the first page, by its place in RAM, and how many.
    pub runs: Vec<[u64; 2]>,
}

/// `GET /v1/checkpoints`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct CheckpointList {
    /// The checkpoints, oldest first.
    pub checkpoints: Vec<CheckpointInfo>,
}

/// How to clone: the body of `POST /v1/checkpoints/{id}/clones`, and part of [`ForkRequest`].
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CloneRequest {
    /// How many clones. Default 1.
    #[serde(default = "one_u32")]
    pub count: u32,
    /// Their names, in order; when fewer are given than `count` the rest get default names `PARENT-cNUMBER`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub names: Vec<String>,
    /// Hosts to run on: clone 1 on the first, clone 2 on the second, and so on, around. Empty: the checkpoint's host.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub hosts: Vec<String>,
    /// Every clone is removed after so many seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_s: Option<u64>,
    /// Every clone is removed when this lease ends ([`crate::Client::lease`]): clones that die with their caller.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<String>,
    /// How long to wait for every clone's agent; 0: do not wait (identity and entropy are still given, afterwards).
    /// A clone that does not answer in time fails the call. Default 60.
    #[serde(default = "default_clone_wait")]
    pub wait_agent_s: u64,
    /// How a clone becomes somebody.
    #[serde(default)]
    pub options: CloneOptions,
}

impl Default for CloneRequest {
    fn default() -> Self {
        Self {
            count: 1,
            names: Vec::new(),
            hosts: Vec::new(),
            ttl_s: None,
            lease: None,
            wait_agent_s: default_clone_wait(),
            options: CloneOptions::default(),
        }
    }
}

impl CloneRequest {
    /// A request for `count` clones on the checkpoint's host, all else default.
    #[must_use]
    pub fn new(count: u32) -> Self {
        Self { count, ..Self::default() }
    }
}

/// `POST /v1/vms/{vm}/fork`: checkpoint and clone in one call. When the clones fail the checkpoint is removed, too.
#[derive(Debug, Clone, Default, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ForkRequest {
    /// The clones.
    #[serde(default)]
    pub clones: CloneRequest,
    /// A note for the checkpoint.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// What the guest does before the checkpoint.
    #[serde(default)]
    pub quiesce: Quiesce,
}

/// One clone that runs.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct CloneResult {
    /// The new VM.
    pub vm: VmInfo,
    /// From the request to its CPUs running.
    pub running_us: u64,
    /// From the request to the agent's first answer; none: not waited for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answered_us: Option<u64>,
    /// From the request to the agent's word that identity, clock and entropy are the clone's own; none: not waited for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ready_us: Option<u64>,
    /// Whether a pre-started QEMU was ready in the pool.
    pub warm: bool,
    /// It had been made before, and only had to go on.
    #[serde(default)]
    pub prepared: bool,
    /// Its phases.
    pub timeline: Timeline,
}

/// What a clone call made: all clones, or the call is an error and none.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct CloneResponse {
    /// The checkpoint.
    #[schema(value_type = String)]
    pub checkpoint: ImageId,
    /// The clones in order of their numbers.
    pub clones: Vec<CloneResult>,
    /// The whole call, in the daemon.
    pub total_us: u64,
}

/// What a fork call made: the checkpoint and all clones, or the call is an error and nothing is left of either.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct ForkResponse {
    /// The checkpoint, and how the parent fared.
    pub parent: CheckpointResult,
    /// The clones in order of their numbers.
    pub clones: Vec<CloneResult>,
    /// The whole call, in the daemon.
    pub total_us: u64,
}

/// First line on a lease's connection.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct LeaseInfo {
    /// To be given in [`CloneRequest::lease`] and `RunRequest::lease`.
    pub lease: String,
}

fn one_u32() -> u32 {
    1
}
fn default_clone_wait() -> u64 {
    60
}
