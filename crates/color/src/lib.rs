//! VM state coloring: what every page of a running guest is, told from outside.
//!
//! Kaleidoscope (section 4) told the pages of a VM apart by its page tables and its kernel's frame table. This crate does so
//! for today's 64-bit Linux, 5.10 to 7.3 and unchanged from one to the next: no agent in the guest, no symbol file, nothing but
//! a memory image and the CPUs' page-table roots. It reads memory through [`GuestMemory`], and does nothing else.
//!
//! # How
//!
//! 1. The kernel's notes for crash dumps lie in its memory ([`vmcoreinfo`]). They tell where its page tables and its frame
//!    table are. They are believed only when the page tables that they name are those that the CPUs run on ([`kernel`]).
//! 2. The kernel's half of the page tables gives its address space, with the mapping of all memory in it ([`paging`]).
//! 3. Its own type information tells offsets of members by name ([`btf`]).
//! 4. The frame table says what each page is used for ([`frames`]); files are checked and named ([`files`]); links between
//!    pages give their order in the LRU lists ([`lru`]).
//! 5. Roots of processes' page tables are found among the kernel's pages, and walked ([`processes`]).
//!
//! # What may be relied on
//!
//! Guest memory is hostile. Every number out of it is checked before it is used, every walk is bounded by the size of
//! memory. A page is [`Color::Free`] only if the frame table has no free block that makes no sense, the files in memory have the
//! number of pages that their kernel says, and neither a process nor a page table uses the page. Where that does not hold,
//! nothing is called free. Whoever gives a clone zeros for free pages asks [`ColorMap::may_be_zero`].
//!
//! A user of the guest can make pages that look like a kernel's notes, but not page tables that a CPU runs on: so give
//! [`color`] the CPUs' roots whenever they are known.
//!
//! ```no_run
//! use ramet_color::{Color, FileMemory, color};
//! use ramet_memory::ByteSize;
//! let memory = FileMemory::open("ram".as_ref(), ByteSize::mib(512).pages()).unwrap();
//! let map = color(&memory, &[], None).unwrap();
//! println!("{} pages are free", map.colors().iter().filter(|c| **c == Color::Free).count());
//! ```
#![forbid(unsafe_code)]
#![warn(missing_docs)]
#![allow(rustdoc::private_intra_doc_links, reason = "the modules are named for readers of the code")]

mod btf;
mod coloring;
#[cfg(feature = "draw")]
pub mod draw;
mod encode;
mod files;
mod frames;
mod fuzzing;
mod kernel;
mod kernel_pages;
mod lru;
mod map;
mod memory;
mod paging;
mod processes;
mod summary;
mod tables_only;
mod vmcoreinfo;

pub use coloring::{Base, color};
pub use encode::{MapError, fuzz_map};
pub use fuzzing::fuzz_color;
pub use map::{
    CacheId, Color, ColorMap, FileFacts, FileId, KernelFacts, LruPlace, Mapping, Method, PageFlags, Place,
    ProcessFacts, ProcessId, SuperblockFacts,
};
pub use memory::{ColorError, FileMemory, GuestMemory};
pub use paging::CpuRoot;
pub use summary::{
    CacheSummary, ColorDiff, ColorSummary, Diff, FileDiff, FileSummary, MapsDiffer, ProcessDiff, ProcessSummary,
    Summary, Transition,
};
