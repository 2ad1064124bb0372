//! Copy-on-write disks: what QEMU's qcow2 does not do by itself.
//!
//! A VM's root disk is a chain of files. At the bottom lies a *golden image*: a raw file that never changes. Over it lie
//! *frozen overlays*, one for each checkpoint, which never change either. On top lies the *active overlay* of one VM.
//! QEMU does the copying on write. A *frozen disk* is what a chain without its active overlay shows.
//!
//! On the host of the checkpoint, clones open the files of a frozen disk. On another host they open it through a small
//! read-only NBD server of this crate, one for each frozen disk and host. It reads what is as in the golden image from
//! the golden image of its own host, and fetches the rest, once, by the page protocol ([`ramet_wire`]).
//!
//! ```text
//! clone's QEMU -- NBD, Unix socket --> ramet-disk -- page protocol, TLS --> ramet-disk -- NBD, Unix socket --> qemu-storage-daemon
//!                                      (cache, golden image)                (checkpoint's host)                (frozen chain)
//! ```
//!
//! * [`overlay`]: empty overlays, made quickly.
//! * [`chain`]: the files of a frozen disk, and which of its pages they hold.
//! * [`extents`]: the map of what is golden, zero, or data.
//! * [`merge`]: one layer in the place of several.
//! * [`nbd`]: the NBD server, and a client.
//! * [`cache`]: pages that were fetched.
//! * [`source`]: fetching them.
//! * [`serve`]: the other end.
//! * [`control`]: what the daemon says to the process `ramet-disk`.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod cache;
pub mod chain;
pub mod control;
pub mod export;
pub mod extents;
pub mod host;
mod ids;
pub mod listener;
pub mod merge;
pub mod nbd;
pub mod overlay;
pub mod serve;
pub mod source;

pub use chain::{ChainPaths, ChainSpec, GoldenRef, LayerFile};
pub use extents::{Extent, ExtentMap, Kind};
pub use ids::DiskId;

/// Bytes of a page: the unit in which a disk travels.
pub const PAGE: u64 = ramet_memory::PAGE_SIZE as u64;
/// The largest disk.
pub const MAX_DISK: u64 = 16 << 40;

/// Pages of a disk of this many bytes. The last one may be part of a page; it travels filled up with zeros.
#[must_use]
pub const fn pages(size: u64) -> u64 {
    size.div_ceil(PAGE)
}

fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
