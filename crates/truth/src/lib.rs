//! The truth about a guest's pages, to hold color maps against: what the guest's own kernel says.
//!
//! The program `ramet-truth` runs in the guest. It reads `/proc/kpageflags`, `/proc/kpagecount`, every process's `pagemap` and a
//! few texts into memory of its own that it has touched before, and then sleeps. So the guest can be stopped right there, and
//! neither the reading nor the handing over changes what was read: whoever holds the guest's memory finds the pages by their
//! headers ([`page`]) and puts them together (`observer`). For tests and benches; no clone needs it.
//! `guest` runs such guests by QEMU alone.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

#[cfg(feature = "observer")]
pub mod guest;
pub mod numbers;
#[cfg(feature = "observer")]
pub mod observer;
pub mod page;
#[cfg(feature = "observer")]
pub mod qmp;
