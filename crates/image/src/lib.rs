//! Guest images: what a virtual machine boots from.
//!
//! An image is a directory `NAME/` of an [`ImageStore`] with `image.json` ([`Manifest`]), a kernel and (for Linux
//! guests) an initramfs. [`ImageStore::build`] makes one from the distribution's own packages without installing any:
//! the cloud kernel, busybox, the static agent, and the packages that the user named. Everything runs from memory.
//!
//! [`ImageStore::build_debian`] installs the packages as on any machine, with systemd, on a disk that the image has
//! besides.

mod apt;
mod build;
mod cpio;
mod debian;
mod error;
mod ext4;
mod modules;
mod store;
mod tree;

pub use build::{BuildOptions, Progress, Stage, parse_add};
pub use debian::DEFAULT_DISK_SIZE;
pub use error::ImageError;
pub use store::{DiskRecord, FileRecord, Image, ImageStore, Kind, Manifest, NewImage};

/// Name of the image that is used when none is given.
pub const DEFAULT_NAME: &str = "default";
/// Name of the image of the tiny guest.
pub const TINY_NAME: &str = "tiny";
