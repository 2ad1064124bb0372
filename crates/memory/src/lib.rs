//! Page numbers, sizes, identifiers, page sets and image descriptions.
//!
//! The vocabulary of Ramet: everything that other crates say about guest memory they say with the types of this crate.
//! It starts no processes, opens no sockets and holds no `unsafe`; the only I/O is [`mount`]'s reading of mount options.
//!
//! An **image** is the memory of a checkpoint. It is a stack of **layers**; a layer holds the pages that changed over
//! the layers below it. A page that no layer of an image owns reads as zeros. A page is identified for ever by
//! (layer, page index): its bytes never change once the layer is sealed.
//!
//! ```
//! use ramet_memory::{ByteSize, PageIndex, PageSet};
//! let memory: ByteSize = "8M".parse().unwrap();
//! let mut owned = PageSet::new(memory.pages());
//! owned.insert(PageIndex(3));
//! assert_eq!(owned.runs().map(|r| (r.start.0, r.len)).collect::<Vec<_>>(), [(3, 1)]);
//! ```
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod checksum;
mod ids;
pub mod image;
mod layout;
pub mod mount;
mod pageset;
mod units;

pub use checksum::page_checksum;
pub use ids::{FamilyId, IdError, ImageId, LayerId, VmId};
pub use image::{ImageIndex, ImageSpec, LayerSpec, Segment, SpecError};
pub use layout::MemoryLayout;
pub use mount::{MountError, check_page_file_mount};
pub use pageset::PageSet;
pub use units::{ByteSize, Gpa, PAGE_SIZE, PageCount, PageIndex, PageRun, UnitError};
