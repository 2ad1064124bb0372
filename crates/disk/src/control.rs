//! The control protocol between rametd and `ramet-disk`: one JSON object a line, over the Unix socket `DIR/control.sock`.
//!
//! Requests on one connection are answered in order. A line is at most [`MAX_LINE`] bytes.
//!
//! ```text
//! -> {"op":"ping"}
//! <- {"ok":{"version":"0.1.0","pid":4711,"listen":"10.0.0.1:40123"}}
//! -> {"op":"frozen_add","disk":"0123...","chain":{"size":1073741824,"golden":"/var/lib/.../disk.raw","layers":["/.../1.qcow2"]}}
//! <- {"ok":{"size":1073741824}}
//! -> {"op":"extents","disk":"0123..."}
//! <- {"ok":{"size":1073741824,"extents":"UlhNMQ..."}}
//! -> {"op":"remote_add","disk":"4567...","size":1073741824,"golden":null,"extents":"UlhNMQ...","sources":[{"addr":"10.0.0.1:40123","name":"h1"}]}
//! <- {"ok":{"socket":"/run/.../45670123.nbd"}}
//! -> {"op":"drop","disk":"89ab..."}
//! <- {"error":{"code":"no_such_disk","message":"..."}}
//! ```
//!
//! # What survives what
//!
//! What was added stays added when the process dies: started again with the same `--dir`, it serves the same sockets and,
//! as far as the port is free, at the same address. Its caches stay too, until the machine restarts.

use crate::{ChainPaths, DiskId, ExtentMap};
pub use ramet_wire::control::{ControlError, PingReply, Response, SourceAddress};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Longest line of a request.
pub const MAX_LINE: u64 = 8 << 20;
/// Most sources of one disk.
pub const MAX_SOURCES: usize = 64;

/// A request to `ramet-disk`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Request {
    /// Who are you? Answered by [`PingReply`].
    Ping,
    /// This host has all files of a frozen disk: it is served to other hosts from now on. Cheap: nothing is started
    /// before the first page is asked for. The same disk again replaces its files' paths. Answered by [`FrozenReply`].
    FrozenAdd {
        /// The frozen disk.
        disk: DiskId,
        /// Its files.
        chain: ChainPaths,
    },
    /// Which pages of a frozen disk are as in its golden image, zero, or data. Runs `qemu-img map` the first time.
    /// Answered by [`ExtentsReply`].
    Extents {
        /// A disk that was added, frozen or remote.
        disk: DiskId,
    },
    /// Starts an NBD server for a frozen disk of another host. The same disk again replaces its sources and, where one is
    /// named, its golden image; readers go on. Answered by [`RemoteReply`].
    RemoteAdd {
        /// The frozen disk.
        disk: DiskId,
        /// Its size in bytes.
        size: u64,
        /// This host's copy of its golden image, if it has one. Without it those pages are fetched too.
        golden: Option<PathBuf>,
        /// Its map, by the `extents` of its own host. Without a map, `ExtentMap::uniform(size, Kind::Data)` is right too.
        extents: ExtentMap,
        /// Who serves its pages, best first. None is allowed: readers wait until there is one.
        sources: Vec<SourceAddress>,
    },
    /// Replaces the sources of another host's disk that was added; readers go on. Answered by `null`.
    Sources {
        /// The disk.
        disk: DiskId,
        /// Who serves its pages, best first. A source need not have all of them.
        sources: Vec<SourceAddress>,
    },
    /// Forgets a disk: its server ends, its socket, cache and export go. Files of a frozen disk stay. Answered by `null`.
    Drop {
        /// The disk.
        disk: DiskId,
    },
    /// Answered by [`StatusReply`].
    Status,
    /// Ends the process. What it was told stays on record. Answered by `null`.
    Shutdown,
}

/// Answers [`Request::FrozenAdd`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrozenReply {
    /// The disk's size in bytes.
    pub size: u64,
}

/// Answers [`Request::Extents`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExtentsReply {
    /// The disk's size in bytes.
    pub size: u64,
    /// The map. In JSON: base64 of [`ExtentMap::encode`].
    pub extents: ExtentMap,
}

/// Answers [`Request::RemoteAdd`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RemoteReply {
    /// The Unix socket of the NBD server; any export name is right. The same path for as long as the disk is added.
    pub socket: PathBuf,
}

/// Answers [`Request::Status`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StatusReply {
    /// Each disk that was added.
    pub disks: Vec<DiskStatus>,
    /// Connections of other hosts refused or ended for what they sent.
    pub bad_peers: u64,
}

/// Whether a disk's files are on this host.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DiskKind {
    /// They are: it is served to other hosts.
    Frozen,
    /// They are not: it is fetched from another host.
    Remote,
}

/// One disk. Counters are since the process started.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskStatus {
    /// The disk.
    pub disk: DiskId,
    /// Whether its files are here.
    pub kind: DiskKind,
    /// Its size in bytes.
    pub size: u64,
    /// Remote: bytes of pages fetched from other hosts, unpacked.
    pub fetched_bytes: u64,
    /// Bytes given to readers: to QEMUs of this host (remote), to other hosts (frozen).
    pub served_bytes: u64,
    /// Remote: bytes of pages in the cache, also those from before this process started.
    pub cached_bytes: u64,
    /// Remote: bytes of its cache given to other hosts.
    #[serde(default)]
    pub passed_on_bytes: u64,
    /// Remote: who is asked for its pages.
    #[serde(default)]
    pub sources: Vec<SourceAddress>,
    /// Remote: bytes read from this host's golden image.
    pub golden_bytes: u64,
    /// Reads of QEMUs (remote), requests of other hosts (frozen).
    pub requests: u64,
    /// Remote: pages that arrived damaged and were dropped.
    pub damaged_pages: u64,
    /// Readers that wait for another host at this moment.
    pub waiting: u64,
    /// Why readers wait for longer than a moment, if they do.
    pub stalled: Option<Stalled>,
    /// Remote: the socket of the NBD server.
    pub socket: Option<PathBuf>,
    /// Frozen: the process of its export, while one runs.
    pub export_pid: Option<u32>,
}

/// Readers wait.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stalled {
    /// For how long, in milliseconds.
    pub since_ms: u64,
    /// Why, in words.
    pub reason: String,
}
