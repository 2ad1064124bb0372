//! Virtual machines.

use std::collections::BTreeMap;

use ramet_memory::{ByteSize, FamilyId, ImageId, VmId};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::Timeline;

/// Which processor emulation runs a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum AccelKind {
    /// QEMU's own emulation: works everywhere.
    Tcg,
    /// The kernel's hypervisor.
    Kvm,
}

/// What a VM is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum VmState {
    /// It is being made.
    Starting,
    /// Its CPUs run.
    Running,
    /// Its CPUs are stopped: by a checkpoint, or by hand.
    Paused,
    /// It waits for pages that no source gives: the reason is in its stats. It goes on when the source is back.
    Stalled,
    /// It was stopped on request; only its record is left.
    Stopped,
    /// Its QEMU died; `state_reason` says how.
    Crashed,
}

/// `POST /v1/vms`: boot a new root VM.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RunRequest {
    /// Name, unique on the host: 1 to 63 of `a-z A-Z 0-9 . _ -`, beginning with a letter or digit. Default:
    /// `IMAGE-` and a number.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// The guest image.
    pub image: String,
    /// Guest memory. Default 512M.
    #[serde(default = "default_memory")]
    #[schema(value_type = u64, example = 536_870_912)]
    pub memory: ByteSize,
    /// Virtual CPUs. Default 1.
    #[serde(default = "one")]
    pub cpus: u8,
    /// QEMU machine type. Default: the daemon's (`pc-i440fx-7.2`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<String>,
    /// Default: KVM when usable, else TCG.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accel: Option<AccelKind>,
    /// QEMU CPU model. Default: `max` under TCG, `host` under KVM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu: Option<String>,
    /// Appended to the image's kernel command line.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub append: Option<String>,
    /// The VM is removed after so many seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_s: Option<u64>,
    /// The VM is removed when this lease ends ([`crate::Client::lease`]).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<String>,
    /// How long to wait for the guest's agent; 0: answer as soon as the CPUs run. Default 120. A guest that does not
    /// answer in time is left running, and `agent` in the answer is false.
    #[serde(default = "default_agent_wait")]
    pub wait_agent_s: u64,
    /// The image whose disk is the root disk, copy-on-write. Default: that of `image`, when it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<String>,
    /// Size of the root disk, when it is to be larger than the image's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<u64>)]
    pub disk_size: Option<ByteSize>,
    /// Images whose disks are data volumes, which the guest can only read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<String>,
    /// The network of the VM and its clones. Default: [`Egress::Nat`] with a root disk, [`Egress::Off`] without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<Egress>,
    /// Bits a second between the family and the outside, in each direction and on each host.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<u64>,
    /// Ports of the host that lead to the VM, not to its clones.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub publish: Vec<PublishedPort>,
    /// Networks with a name to join, each with a card of its own after that of the family's network.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub join: Vec<String>,
}

/// `POST /v1/networks`: a network with a name, for VMs of any family that are told to join it.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct NetworkRequest {
    /// Its name, as for VMs.
    pub name: String,
    /// What it lets out. Default: nothing.
    #[serde(default = "no_egress")]
    pub egress: Egress,
    /// Bits a second between it and the outside, in each direction.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<u64>,
}

fn no_egress() -> Egress {
    Egress::None
}

/// A network with a name. It is on one host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NetworkInfo {
    /// Its name.
    pub name: String,
    /// Addresses of its members.
    pub subnet: String,
    /// Its namespace on the host, to look into it.
    pub namespace: String,
    /// VMs that have joined it.
    pub members: Vec<NetworkMember>,
}

/// A member of a network with a name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NetworkMember {
    /// The VM's name.
    pub vm: String,
    /// Its address there.
    pub ip: String,
}

/// `GET /v1/networks`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct NetworkList {
    /// The networks, by name.
    pub networks: Vec<NetworkInfo>,
}

/// What the network of a family lets out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Egress {
    /// There is no network: no card.
    Off,
    /// A private network that nothing leaves.
    None,
    /// Connections outward, with the host's address.
    Nat,
    /// Connections to these only: `IP`, `IP/PREFIX`, each with `:PORT` or without.
    List(Vec<String>),
}

/// A protocol with ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// A port of the host that leads to a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PublishedPort {
    /// The protocol.
    pub protocol: Protocol,
    /// The host's port.
    pub host_port: u16,
    /// The guest's port.
    pub guest_port: u16,
}

/// A VM's place in its family's network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmNetwork {
    /// Its IPv4 address.
    pub ip: String,
    /// Its MAC address.
    pub mac: String,
    /// Its device in the family's namespace on the host.
    pub tap: String,
    /// Ports of the host that lead to it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub published: Vec<PublishedPort>,
}

/// A VM's disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VmDisk {
    /// Name of the golden image.
    pub image: String,
    /// Its size as the guest sees it.
    #[schema(value_type = u64)]
    pub size: ByteSize,
    /// Frozen layers on this host between the golden image and what the VM has written.
    pub layers: u32,
    /// What the VM has written takes so many bytes.
    pub written_bytes: u64,
    /// It lies over a frozen disk of another host, and what is missing is fetched from there.
    pub remote: bool,
}

impl RunRequest {
    /// A request for a VM of this image, all else default.
    #[must_use]
    pub fn new(image: impl Into<String>) -> Self {
        Self {
            name: None,
            image: image.into(),
            memory: default_memory(),
            cpus: 1,
            machine: None,
            accel: None,
            cpu: None,
            append: None,
            ttl_s: None,
            lease: None,
            wait_agent_s: default_agent_wait(),
            disk: None,
            disk_size: None,
            volumes: Vec::new(),
            network: None,
            rate: None,
            publish: Vec::new(),
            join: Vec::new(),
        }
    }
}

fn default_memory() -> ByteSize {
    ByteSize::mib(512)
}
fn one() -> u8 {
    1
}
fn default_agent_wait() -> u64 {
    120
}
fn default_grace() -> u64 {
    10
}

/// One VM, as `ramet ps` shows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct VmInfo {
    /// Its id.
    #[schema(value_type = String)]
    pub id: VmId,
    /// Its name, unique on its host.
    pub name: String,
    /// The host it runs on.
    pub host: String,
    /// What it is doing.
    pub state: VmState,
    /// Why, when the state needs a reason.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_reason: Option<String>,
    /// The guest image that its root VM booted.
    pub image: String,
    /// `linux` or `tiny`.
    pub guest: String,
    /// Guest memory.
    #[schema(value_type = u64)]
    pub memory: ByteSize,
    /// Virtual CPUs.
    pub cpus: u8,
    /// What runs its CPUs.
    pub accel: AccelKind,
    /// QEMU machine type.
    pub machine: String,
    /// A root VM and all its descendants.
    #[schema(value_type = String)]
    pub family: FamilyId,
    /// The VM that it is a clone of; none: a root VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub parent: Option<VmId>,
    /// The checkpoint that it was cloned from; none: it was booted, or has rebooted since.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    pub checkpoint: Option<ImageId>,
    /// Which clone of its fork call it is, from 1; 0: a root VM.
    pub clone_number: u32,
    /// How many forks lie between the root VM (0) and this one.
    pub generation: u32,
    /// When it was made.
    pub created_unix_ms: u64,
    /// When its time to live ends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_unix_ms: Option<u64>,
    /// The lease it lives with.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lease: Option<String>,
    /// Its QEMU's process id, while it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pid: Option<u32>,
    /// True once its agent has answered.
    pub agent: bool,
    /// Its place in the family's network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<VmNetwork>,
    /// Its disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<VmDisk>,
}

/// Query of `GET /v1/vms`.
#[derive(Debug, Clone, Default, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct ListVmsQuery {
    /// Ask all hosts, not only this one.
    #[serde(default)]
    pub all_hosts: bool,
}

/// `GET /v1/vms`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct VmList {
    /// The VMs, oldest first, host by host.
    pub vms: Vec<VmInfo>,
    /// Hosts that were asked and did not answer.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub unreachable: Vec<UnreachableHost>,
}

/// A host that did not answer.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct UnreachableHost {
    /// Its name.
    pub host: String,
    /// Why.
    pub error: String,
}

/// `POST /v1/vms/{vm}/stop`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StopRequest {
    /// How long the guest may take to shut down by itself before its QEMU is ended; 0: at once. Default 10.
    #[serde(default = "default_grace")]
    pub grace_s: u64,
}

impl Default for StopRequest {
    fn default() -> Self {
        Self { grace_s: default_grace() }
    }
}

/// Query of `DELETE /v1/vms/{vm}`.
#[derive(Debug, Clone, Default, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct RemoveVmQuery {
    /// Remove it even while it runs.
    #[serde(default)]
    pub force: bool,
    /// First write its disk, as it is now, as a new image of this name on its host. The VM must run, and stands still from
    /// then on. Unless `force` is given, its agent is asked before to run the hooks of a checkpoint and to write its file
    /// systems out. Whatever fails, the VM goes on, and there is no such image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub keep_disk: Option<String>,
}

/// Query of `PUT` and `GET /v1/vms/{vm}/files`.
#[derive(Debug, Clone, Serialize, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
#[serde(deny_unknown_fields)]
pub struct FileQuery {
    /// Absolute path in the guest.
    pub path: String,
    /// Permission bits of a new file, as a decimal number. Default 420 (octal 644).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mode: Option<u32>,
}

/// `GET /v1/vms/{vm}/ping`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct PingReply {
    /// Round trip between daemon and agent.
    pub rtt_us: u64,
}

/// `GET /v1/vms/{vm}/time`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct GuestTime {
    /// The guest's real-time clock, nanoseconds since 1970.
    pub realtime_ns: u64,
    /// The guest's monotonic clock, nanoseconds.
    pub monotonic_ns: u64,
    /// The guest's real-time clock less the host's, in nanoseconds (with the round trip's uncertainty).
    pub offset_ns: i64,
}

/// Memory that a VM holds on its host.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct MemoryUse {
    /// Its share of guest RAM: private pages and its part of the pages shared with siblings (PSS).
    pub ram_pss_bytes: u64,
    /// Pages of guest RAM that are its own.
    pub ram_private_bytes: u64,
    /// What QEMU itself weighs, guest RAM left out (PSS).
    pub vmm_pss_bytes: u64,
}

/// A latency histogram in short. All zero when nothing was recorded.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct LatencySummary {
    /// How many values.
    pub count: u64,
    /// Smallest value; none: not kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_us: Option<f64>,
    /// Mean.
    pub mean_us: f64,
    /// Median.
    pub p50_us: f64,
    /// 90th percentile; none: not kept.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub p90_us: Option<f64>,
    /// 99th percentile.
    pub p99_us: f64,
    /// Largest value.
    pub max_us: f64,
}

/// Counters and latencies by name, as the pager reports them.
///
/// Of a VM: `missing_faults`, `zero_pages`, `local_pages`, `demand_pages`, `prefetched_pages`, `network_bytes`,
/// `write_faults`, `waiting_faults`, `stalled`, `private_bytes`, `ram_pss_bytes`, `vmm_pss_bytes`, and the latencies
/// `local_fault` and `remote_fault`. Of an image: `layers`, `owned_pages`, `stored_bytes`, `fetched_pages`, `complete`,
/// `broken`, `vms`. Of a pager: `served_pages`, `served_bytes`, `received_pages`, `received_bytes`, `bad_checksums`,
/// `bad_peers` and more. In Prometheus text they become `ramet_vm_NAME`, `ramet_image_NAME` and `ramet_pager_NAME`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct Counters {
    /// Counters and gauges.
    #[serde(default)]
    pub values: BTreeMap<String, u64>,
    /// Latency histograms.
    #[serde(default)]
    pub latencies: BTreeMap<String, LatencySummary>,
}

impl Counters {
    /// The counter of this name, 0 when there is none.
    #[must_use]
    pub fn get(&self, name: &str) -> u64 {
        self.values.get(name).copied().unwrap_or(0)
    }
}

/// `GET /v1/vms/{vm}/stats`.
#[derive(Debug, Clone, Serialize, Deserialize, ToSchema)]
pub struct VmStats {
    /// The VM.
    pub vm: VmInfo,
    /// Memory held on the host; none when its QEMU is gone.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<MemoryUse>,
    /// Why it is stalled, when it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stalled: Option<String>,
    /// The pager's counters of this VM.
    pub pager: Counters,
    /// Counters of the other host's frozen disk that its disk lies over, when it does: shared by all VMs here over it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<Counters>,
    /// How its last fork or start went, phase by phase.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeline: Option<Timeline>,
}
