//! What Ramet needs of the Linux kernel and std does not offer: userfaultfd, page maps of other processes, pidfds, shared
//! mappings. With the preload object the only crate that holds `unsafe`; everything outside is safe to call.
//!
//! Constants and structures are defined here, since the headers of supported distributions are older than the features.
#![allow(unsafe_code, reason = "system calls that std does not wrap; each block says why it is sound")]
#![warn(missing_docs)]

mod memory;
mod pagemap;
mod pidfd;
mod process;
pub mod shim;
mod uffd;

pub use memory::{PrivateMapping, SharedAtomics, SharedMapping};
pub use pagemap::PagemapScanner;
pub use pidfd::{pidfd_open, pidfd_send_signal, pidfd_wait};
pub use process::{MemStats, mem_stats, process_read};
pub use uffd::{CopyError, CopyMode, Event, Features, Mode, Uffd};

use std::io;

/// The result of a system call as an `io::Result`.
fn check(rc: libc::c_int) -> io::Result<libc::c_int> {
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(rc) }
}
