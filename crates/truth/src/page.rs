//! How the program in the guest writes down what it read: pages that can be recognised one by one.
//!
//! ```text
//! magic 16 bytes | number of the page u32 | 1 on page 0 when all is complete u32 | random number of the run u64 | payload
//! payloads together: sections of tag u32, 0 u32, length u64, bytes; ended by tag 0
//! ```
//!
//! All numbers are little endian.

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Bytes of a page's header.
pub const HEADER: usize = 32;
/// Bytes of a page's payload: a multiple of 8.
pub const PAYLOAD: usize = PAGE - HEADER;
/// Flags of `/proc/kpageflags` that change by being looked at or by time alone: referenced, up to date, dirty, active,
/// writeback, idle.
pub const PASSING: u64 = 1 << 2 | 1 << 3 | 1 << 4 | 1 << 6 | 1 << 8 | 1 << 25;
/// How a page begins. Written turned round, so that the program's own image holds no such page.
pub const MAGIC_REVERSED: [u8; 16] = *b"\nEGAP-HTURT-TEMR";

/// How a page begins.
#[must_use]
pub fn magic() -> [u8; 16] {
    let mut magic = MAGIC_REVERSED;
    magic.reverse();
    magic
}

/// What a section holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Section {
    /// `/proc/kpageflags`: a u64 for each page frame.
    Flags = 1,
    /// `/proc/kpagecount`: a u64 for each page frame.
    Counts = 2,
    /// `/proc/kpageflags` again, read last: what differs was not at rest.
    FlagsAgain = 3,
    /// What processes map: [`Mapped`] records.
    Mappings = 4,
    /// `/proc/meminfo`.
    Meminfo = 5,
    /// `/proc/iomem`.
    Iomem = 6,
    /// Processes: pid u32, length of the name u32, name padded to 16 bytes.
    Processes = 7,
    /// `/proc/slabinfo`.
    Slabinfo = 8,
}

/// A page that a process has mapped: 24 bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapped {
    /// The process.
    pub pid: u32,
    /// 1: the mapping is executable; 2: the page is a file's or shared.
    pub flags: u32,
    /// Virtual address, in pages.
    pub page: u64,
    /// Page frame number.
    pub frame: u64,
}

impl Mapped {
    /// Bytes of a record.
    pub const LEN: usize = 24;

    /// As bytes.
    #[must_use]
    pub fn to_bytes(self) -> [u8; Self::LEN] {
        let mut bytes = [0; Self::LEN];
        bytes[..4].copy_from_slice(&self.pid.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.flags.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.page.to_le_bytes());
        bytes[16..].copy_from_slice(&self.frame.to_le_bytes());
        bytes
    }

    /// From bytes.
    #[must_use]
    pub fn from_bytes(bytes: &[u8; Self::LEN]) -> Self {
        let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        Self { pid: word(0), flags: word(4), page: long(8), frame: long(16) }
    }
}
