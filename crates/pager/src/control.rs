//! The control protocol between rametd and a pager: one JSON object a line, over a Unix socket.
//!
//! Requests on one connection are answered in order. [`Request::ImageWait`] blocks its connection until the image is
//! complete, so a caller that waits should use a connection of its own.
//!
//! ```text
//! -> {"op":"ping"}
//! <- {"ok":{"version":"0.1.0","pid":4711,"listen":"10.0.0.1:40123"}}
//! -> {"op":"detach","vm":"0123..."}
//! <- {"error":{"code":"no_such_vm","message":"..."}}
//! ```

use ramet_color::{CpuRoot, Method};
use ramet_memory::{ImageId, LayerId, VmId};
pub use ramet_wire::control::{ControlError, PingReply, Response, SourceAddress};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// A request to the pager.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Request {
    /// Who are you? Answered by [`PingReply`].
    Ping,
    /// Maps a view into a VM and serves its faults from now on. Answered by [`AttachReply`].
    Attach {
        /// The VM.
        vm: VmId,
        /// The socket of the preload object in its VMM.
        shim_sock: PathBuf,
        /// The VMM's process.
        pid: u32,
        /// What its memory shows.
        view: View,
    },
    /// Forgets a VM, which is gone or about to go. Its faults are no longer served.
    Detach {
        /// The VM.
        vm: VmId,
    },
    /// Before the pause: write-protects the running VM's memory and finds what it may have changed. Answered by
    /// [`PrepareReply`].
    CheckpointPrepare {
        /// The VM.
        vm: VmId,
        /// The image that the checkpoint will make.
        image: ImageId,
        /// Its newest layer.
        layer: LayerId,
    },
    /// Inside the pause, after the device state was saved: fixes the image. Clones may attach to it from now on, while
    /// its pages are still being copied. Answered by [`CommitReply`].
    CheckpointCommit {
        /// The VM.
        vm: VmId,
    },
    /// Gives a prepared checkpoint up. The VM goes on; nothing of the checkpoint is left.
    CheckpointAbort {
        /// The VM.
        vm: VmId,
    },
    /// Writes the image's description ([`ramet_memory::ImageSpec::encode`]) to a file. Answered by [`SpecReply`].
    ImageSpec {
        /// The image.
        image: ImageId,
    },
    /// Adds an image of another host, whose pages are fetched on demand. For an image that is here already, and whose
    /// pages came from another address, they come from the new one from now on.
    ImageAdd {
        /// The image.
        image: ImageId,
        /// A file that holds its description.
        spec_path: PathBuf,
        /// Where its pages come from.
        source: SourceAddress,
    },
    /// Drops an image. Refused while a VM's memory shows it; layers that other images need stay.
    ImageDrop {
        /// The image.
        image: ImageId,
    },
    /// Waits until every page of the image has been copied out of its parent. Answered by [`ImageReport`].
    ImageWait {
        /// The image.
        image: ImageId,
    },
    /// Tells what each page of the image is, once every page has been copied out of its parent: writes its color map
    /// ([`ramet_color::ColorMap::encode`]) to a file. Answered by [`ColorReply`].
    ImageColor {
        /// The image.
        image: ImageId,
        /// Where the CPUs' page tables are.
        cpus: Vec<CpuRoot>,
        /// The file.
        path: PathBuf,
        /// An image that it is over, already colored.
        base: Option<ColorBase>,
    },
    /// The pages in which two images differ, once both have been copied out of their parents. Answered by [`ChangedReply`].
    ImageChanged {
        /// The image.
        image: ImageId,
        /// The other one.
        since: ImageId,
    },
    /// Answered by [`ImageReport`].
    ImageStatus {
        /// The image.
        image: ImageId,
    },
    /// The host of some images has moved to another address.
    SetSource {
        /// The old address.
        old: SourceAddress,
        /// The new one.
        new: SourceAddress,
    },
    /// Answered by [`StatsReport`].
    Stats,
    /// Ends the pager. Refused while VMs are attached, unless `force`.
    Shutdown {
        /// End even though VMs would stall.
        force: bool,
    },
}

/// A colored image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ColorBase {
    /// The image.
    pub image: ImageId,
    /// The file with its color map.
    pub path: PathBuf,
}

/// What a VM's memory shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum View {
    /// Memory of its own: a VM that was booted, not cloned.
    Anonymous,
    /// A private view of an image.
    Image(ImageId),
}

/// Answers [`Request::Attach`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachReply {
    /// Where the RAM is mapped in the VMM.
    pub ram_addr: u64,
    /// Its length in bytes.
    pub ram_len: u64,
    /// Time to map the view, in microseconds.
    pub remap_us: u64,
    /// Time to register for faults and start serving them, in microseconds.
    pub attach_us: u64,
    /// Pieces that the view is mapped in.
    pub segments: u64,
}

/// Answers [`Request::CheckpointPrepare`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrepareReply {
    /// Pages that may have changed, so far.
    pub candidate_pages: u64,
    /// Whether this was the VM's first checkpoint (all of its memory was protected).
    pub full: bool,
    /// Time taken, in microseconds. The VM was running.
    pub prepare_us: u64,
}

/// Answers [`Request::CheckpointCommit`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommitReply {
    /// Pages that the layer may hold: those still to be copied.
    pub owed_pages: u64,
    /// Of these, written between prepare and the pause.
    pub late_pages: u64,
    /// Time taken, in microseconds: part of the pause.
    pub commit_us: u64,
}

/// Answers [`Request::ImageSpec`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SpecReply {
    /// The file.
    pub path: PathBuf,
}

/// Answers [`Request::ImageColor`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ColorReply {
    /// Size of the map, in bytes.
    pub bytes: u64,
    /// Time taken, without waiting, in microseconds.
    pub color_us: u64,
    /// Whether the map of the image below saved work.
    pub incremental: bool,
    /// How it was made.
    pub method: Method,
    /// Why no more could be found out; empty when everything was.
    pub trouble: String,
}

/// Answers [`Request::ImageChanged`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangedReply {
    /// Runs of pages: the first, and how many.
    pub runs: Vec<[u64; 2]>,
}

/// Answers [`Request::ImageStatus`] and [`Request::ImageWait`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ImageReport {
    /// The image.
    pub image: ImageId,
    /// The guest's memory, in bytes.
    pub memory: u64,
    /// The layers, oldest first.
    pub layers: Vec<LayerReport>,
    /// Whether every page has been copied out of the parent (always, for an image of another host).
    pub complete: bool,
    /// Why the image can never be complete, if so.
    pub broken: Option<String>,
    /// Why its copying out of the parent does not get on at the moment, if so: there is no room for page files.
    #[serde(default)]
    pub stalled: Option<String>,
    /// VMs whose memory shows the image.
    pub vms: Vec<VmId>,
}

/// One layer on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerReport {
    /// The layer.
    pub id: LayerId,
    /// Pages that it owns.
    pub owned_pages: u64,
    /// Bytes that its page file takes here.
    pub stored_bytes: u64,
    /// Pages fetched from another host into it.
    pub fetched_pages: u64,
}

/// Answers [`Request::Stats`].
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct StatsReport {
    /// Each attached VM.
    pub vms: Vec<VmReport>,
    /// Each image.
    pub images: Vec<ImageReport>,
    /// Each source of pages.
    pub sources: Vec<SourceReport>,
    /// Pages served to other hosts.
    pub served_pages: u64,
    /// Bytes sent to other hosts for them, headers included.
    pub served_bytes: u64,
    /// Connections of other hosts refused or ended for a malformed frame.
    pub bad_peers: u64,
}

/// A VM's paging.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmReport {
    /// The VM.
    pub vm: VmId,
    /// The image that its memory shows; `None` for a booted VM.
    pub image: Option<ImageId>,
    /// Faults on missing pages.
    pub missing_faults: u64,
    /// Pages answered with zeros.
    pub zero_pages: u64,
    /// Pages made present from this host's memory.
    pub local_pages: u64,
    /// Pages fetched from another host because this VM touched them.
    pub demand_pages: u64,
    /// Pages fetched from another host around and ahead of those.
    pub prefetched_pages: u64,
    /// Bytes that came over the network for this VM, headers included.
    pub network_bytes: u64,
    /// Faults on write-protected pages (first writes after a checkpoint).
    pub write_faults: u64,
    /// Faults that wait for another host at this moment.
    pub waiting: u64,
    /// Why the VM is stalled, if it is.
    pub stalled: Option<String>,
    /// Bytes of guest memory that only this VM holds.
    pub private_bytes: u64,
    /// Guest memory held, shared pages divided among those who share them (PSS), in bytes.
    pub ram_pss_bytes: u64,
    /// The VMM's own weight: PSS of everything but guest memory, in bytes.
    pub vmm_pss_bytes: u64,
    /// Faults served from this host, in microseconds from reading the event to waking the VM.
    pub local_fault_us: Latency,
    /// Faults served from another host, in microseconds from reading the event to waking the VM.
    pub remote_fault_us: Latency,
}

/// A source of pages.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SourceReport {
    /// Where it is.
    pub source: SourceAddress,
    /// Whether a connection stands.
    pub connected: bool,
    /// The last failure, while there is one.
    pub error: Option<String>,
    /// Pages received and verified.
    pub pages: u64,
    /// Bytes received.
    pub bytes: u64,
    /// Pages refused because their checksum did not fit.
    pub bad_checksums: u64,
    /// Requests under way.
    pub in_flight: u64,
}

/// Quantiles of a latency histogram, in microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Latency {
    /// Samples.
    pub count: u64,
    /// Half were at most this.
    pub p50: f64,
    /// 99 in 100 were at most this.
    pub p99: f64,
    /// The largest.
    pub max: f64,
    /// The sum of all.
    pub sum: f64,
}
