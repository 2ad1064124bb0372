//! The pager: faults in, pages out. The only data plane of a host.
//!
//! One pager process serves one *family* (a booted VM and all its descendants) on one host: the VMs' missing pages, the
//! copying of checkpoints out of running parents, and the requests of other hosts' pagers. These meet in one process because
//! a clone that wants a page which is still in its parent's memory is answered by copying it there and then. Families do
//! not share a pager, so a fault in one pager stalls one family at most, and the next pager takes over where it stopped.
//!
//! The way of a fault, from the event to the woken CPU:
//!
//! ```text
//! vm::Vm::serve -> missing_fault -> image::Image::owner -> layer::Layer::locate
//!     zeros:                 UFFDIO_ZEROPAGE
//!     in a page file:        UFFDIO_WAKE (the kernel finds it in the page cache)
//!     in a parent's memory:  session::CopySession::ensure, then UFFDIO_WAKE
//!     on another host:       source::Source::request ... source::receive -> Layer::store -> vm::Vm::wake
//! ```
//!
//! [`family::Family`] holds everything and is what the control protocol ([`control`]) acts on; [`server`] answers other
//! hosts.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod control;
pub mod family;
mod histogram;
mod image;
pub mod layer;
pub mod listener;
pub mod server;
pub mod session;
pub mod source;
pub mod vm;

pub use histogram::Histogram;
pub use image::Image;
