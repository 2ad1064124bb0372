//! The color map: what every page of a guest is.

use crate::kernel::Knowledge;
use ramet_memory::{ByteSize, PageCount, PageIndex};
use serde::{Deserialize, Serialize};

/// What a page is.
///
/// Kaleidoscope's colors (section 4), with the kernel's data told apart further.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
#[repr(u8)]
pub enum Color {
    /// Nothing is known of it, or it is on its way between two uses (on a CPU's list of free pages).
    #[default]
    Unknown = 0,
    /// Mapped executable by the kernel: its text, and that of its modules.
    KernelCode = 1,
    /// Objects of the kernel's slab allocator.
    Slab = 2,
    /// Page tables of the kernel and of processes.
    PageTables = 3,
    /// Mapped in the kernel's vmalloc area: stacks of threads, module data, large buffers.
    Vmalloc = 4,
    /// Other memory of the kernel: its image's data, the frame table, what drivers allocate by the page.
    KernelOther = 5,
    /// Mapped executable by a process and of no file.
    UserCode = 6,
    /// Memory of processes that is of no file: heaps, stacks.
    UserData = 7,
    /// Page of a file that some process maps executable.
    CacheCode = 8,
    /// Page of a file that none does.
    CacheData = 9,
    /// In the buddy allocator: the kernel itself does not know what it holds.
    Free = 10,
}

impl Color {
    /// All colors, in the order of their numbers.
    pub const ALL: [Self; 11] = [
        Self::Unknown,
        Self::KernelCode,
        Self::Slab,
        Self::PageTables,
        Self::Vmalloc,
        Self::KernelOther,
        Self::UserCode,
        Self::UserData,
        Self::CacheCode,
        Self::CacheData,
        Self::Free,
    ];

    /// The color of a number.
    #[must_use]
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.get(usize::from(number)).copied()
    }

    /// Its name, for people and programs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Unknown => "unknown",
            Self::KernelCode => "kernel code",
            Self::Slab => "kernel data: slab",
            Self::PageTables => "kernel data: page tables",
            Self::Vmalloc => "kernel data: stacks, vmalloc",
            Self::KernelOther => "kernel data: other",
            Self::UserCode => "user code",
            Self::UserData => "user data",
            Self::CacheCode => "page cache: code",
            Self::CacheData => "page cache: data",
            Self::Free => "free",
        }
    }

    /// Whether it is the kernel's own, code or data.
    #[must_use]
    pub const fn is_kernel(self) -> bool {
        matches!(self, Self::KernelCode | Self::Slab | Self::PageTables | Self::Vmalloc | Self::KernelOther)
    }

    /// Whether it is a page of a file.
    #[must_use]
    pub const fn is_cache(self) -> bool {
        matches!(self, Self::CacheCode | Self::CacheData)
    }
}

/// What is known of a page besides its color: a set of flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct PageFlags(pub u8);

impl PageFlags {
    /// A process maps it.
    pub const MAPPED: Self = Self(1);
    /// Some mapping's accessed bit is set. Useless as a positive hint; a mapped page without it was never touched there.
    pub const ACCESSED: Self = Self(2);
    /// Some mapping's dirty bit is set.
    pub const DIRTY: Self = Self(4);
    /// A process maps it executable.
    pub const EXECUTABLE: Self = Self(8);
    /// On one of the kernel's active lists (not set by kernels with the multi-generational LRU).
    pub const ACTIVE: Self = Self(16);
    /// The kernel noted a reference to it.
    pub const REFERENCED: Self = Self(32);
    /// Part of a larger page: a transparent huge page, a large folio.
    pub const COMPOUND: Self = Self(64);

    /// Whether all flags of `other` are set.
    #[must_use]
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }

    /// Sets the flags of `other`.
    pub const fn set(&mut self, other: Self) {
        self.0 |= other.0;
    }
}

/// Where a page stands within what it belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Place {
    /// In a file: its number in [`ColorMap::files`], and the page's offset in it, in pages.
    File(FileId, u32),
    /// In a slab cache: its number in [`ColorMap::caches`].
    Slab(CacheId),
    /// A page table of this level: 1 maps pages, 4 or 5 is a root.
    PageTable(u8),
    /// In the kernel's image: pages from its start.
    KernelImage(u32),
    /// In the kernel's frame table: pages from its start.
    FrameTable(u32),
}

/// A file's number in [`ColorMap::files`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct FileId(pub u32);

/// A slab cache's number in [`ColorMap::caches`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct CacheId(pub u32);

/// A process's number in [`ColorMap::processes`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProcessId(pub u16);

/// Where a process maps a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Mapping {
    /// The process. Where several map the page, the first that was found.
    pub process: ProcessId,
    /// The virtual address, in pages.
    pub page: u64,
}

/// Where a page stands in the kernel's LRU lists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LruPlace {
    /// The list: lists are numbered as they are found; 0 to 254.
    pub list: u8,
    /// Pages (or larger pages) before it, counted from the end where pages are added: 0 was added last.
    pub position: u32,
}

/// A file with pages in the guest's page cache.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct FileFacts {
    /// Guest-virtual address of its `struct address_space`: what tells files apart in one guest.
    pub mapping: u64,
    /// Its inode's number.
    pub inode: u64,
    /// Number of its superblock in [`ColorMap::superblocks`].
    pub superblock: u32,
    /// Whether its pages are swap's to keep: shared memory, tmpfs.
    pub swap_backed: bool,
    /// Path within its file system, or its last parts (after `…/`); empty when it has no name.
    pub path: String,
}

/// A mounted file system of the guest.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct SuperblockFacts {
    /// Its `s_id`: `vda1`, `tmpfs`.
    pub id: String,
    /// Its type's name: `ext4`, `tmpfs`.
    pub kind: String,
    /// Its device number, as the kernel keeps it (20 bits of minor number).
    pub device: u32,
}

/// A process, or whatever has page tables of its own.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ProcessFacts {
    /// Guest-physical address of its page-table root.
    pub root: u64,
    /// Its number in the guest (`tgid`); 0 when not known.
    pub pid: u32,
    /// Its command's name, at most 15 bytes; empty when not known.
    pub command: String,
}

/// How a map was made, and so what it can tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Method {
    /// Nothing was found out: all pages are unknown.
    #[default]
    None,
    /// From page tables alone: user pages and the kernel's code. No page is called free.
    PageTables,
    /// From the kernel's frame table, but without its type information: no files, and no page is called free.
    FrameTable,
    /// From the kernel's frame table and type information: everything.
    Full,
}

impl Method {
    /// For people.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::PageTables => "page tables only",
            Self::FrameTable => "frame table, without type information",
            Self::Full => "frame table",
        }
    }
}

/// The guest's kernel.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct KernelFacts {
    /// Its release: `6.1.0-28-amd64`.
    pub release: String,
    /// What tells its exact build: the build ID of its image, in hexadecimal; empty when not known.
    pub build: String,
    /// Levels of its page tables: 4 or 5.
    pub levels: u8,
    /// Guest-physical address of its image.
    pub image: u64,
    /// Pages of its image.
    pub image_pages: u32,
}

/// What every page of a guest's memory is, at one moment.
///
/// For each page a color, flags, and where known its place in what it belongs to, where a process maps it, and where it
/// stands in the LRU lists. 22 bytes a page in memory; see [`ColorMap::encode`] for its form elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ColorMap {
    /// How it was made.
    pub method: Method,
    /// Why no more could be found out; empty when everything was.
    pub trouble: String,
    /// The kernel, when it is a Linux that was understood.
    pub kernel: Option<KernelFacts>,
    /// Whether the guest fills free pages with a pattern that it checks later: then free pages must be kept as they are.
    pub poisons_free: bool,
    /// Files with pages in memory.
    pub files: Vec<FileFacts>,
    /// Their file systems.
    pub superblocks: Vec<SuperblockFacts>,
    /// Processes.
    pub processes: Vec<ProcessFacts>,
    /// Names of slab caches.
    pub caches: Vec<String>,
    /// What was learnt about the kernel, to make the next map with less work.
    pub(crate) knowledge: Option<Knowledge>,
    pub(crate) colors: Vec<Color>,
    pub(crate) flags: Vec<PageFlags>,
    pub(crate) places: Vec<RawPlace>,
    pub(crate) mappings: Vec<RawMapping>,
    pub(crate) lru: Vec<RawLru>,
}

/// [`Place`] in 8 bytes: a kind and number, and an offset. All ones: none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RawPlace {
    /// The kind in the upper 3 bits, the number of the file or cache or the level below.
    pub(crate) what: u32,
    pub(crate) offset: u32,
}

/// [`Mapping`] in 8 bytes: the process in the upper 16 bits, the page below. All ones: none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RawMapping(pub(crate) u64);

/// [`LruPlace`] in 4 bytes: the list in the upper 8 bits, the position below. All ones: none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RawLru(pub(crate) u32);

/// Most files and slab caches that a map can number.
pub(crate) const MAX_NUMBER: u32 = (1 << 29) - 2;
/// Most processes that a map can number.
pub(crate) const MAX_PROCESSES: usize = u16::MAX as usize;
/// Most LRU lists that a map can number.
pub(crate) const MAX_LISTS: usize = 255;
/// Virtual page numbers are below this: 57 bits of address.
pub(crate) const MAX_VIRTUAL_PAGE: u64 = 1 << 48;
/// Positions in an LRU list end here.
pub(crate) const MAX_POSITION: u32 = (1 << 24) - 1;

const FILE: u32 = 0;
const SLAB: u32 = 1;
const TABLE: u32 = 2;
const IMAGE: u32 = 3;
const FRAMES: u32 = 4;
const NUMBER: u32 = (1 << 29) - 1;

impl RawPlace {
    pub(crate) const NONE: Self = Self { what: u32::MAX, offset: u32::MAX };

    pub(crate) const fn new(place: Place) -> Self {
        let (kind, number, offset) = match place {
            Place::File(FileId(file), offset) => (FILE, file, offset),
            Place::Slab(CacheId(cache)) => (SLAB, cache, 0),
            Place::PageTable(level) => (TABLE, level as u32, 0),
            Place::KernelImage(offset) => (IMAGE, 0, offset),
            Place::FrameTable(offset) => (FRAMES, 0, offset),
        };
        Self { what: kind << 29 | (number & NUMBER), offset }
    }

    pub(crate) const fn get(self) -> Option<Place> {
        let number = self.what & NUMBER;
        match self.what >> 29 {
            FILE => Some(Place::File(FileId(number), self.offset)),
            SLAB => Some(Place::Slab(CacheId(number))),
            TABLE => Some(Place::PageTable(number as u8)),
            IMAGE => Some(Place::KernelImage(self.offset)),
            FRAMES => Some(Place::FrameTable(self.offset)),
            _ => None,
        }
    }
}

impl RawMapping {
    pub(crate) const NONE: Self = Self(u64::MAX);

    pub(crate) const fn new(mapping: Mapping) -> Self {
        Self((mapping.process.0 as u64) << 48 | (mapping.page & (MAX_VIRTUAL_PAGE - 1)))
    }

    pub(crate) const fn get(self) -> Option<Mapping> {
        if self.0 == Self::NONE.0 {
            return None;
        }
        Some(Mapping { process: ProcessId((self.0 >> 48) as u16), page: self.0 & (MAX_VIRTUAL_PAGE - 1) })
    }
}

impl RawLru {
    pub(crate) const NONE: Self = Self(u32::MAX);

    pub(crate) const fn new(place: LruPlace) -> Self {
        Self((place.list as u32) << 24 | (place.position & MAX_POSITION))
    }

    pub(crate) const fn get(self) -> Option<LruPlace> {
        if self.0 == Self::NONE.0 {
            return None;
        }
        Some(LruPlace { list: (self.0 >> 24) as u8, position: self.0 & MAX_POSITION })
    }
}

impl ColorMap {
    /// A map of `pages` pages of which nothing is known, and why.
    #[must_use]
    pub fn unknown(pages: PageCount, trouble: impl Into<String>) -> Self {
        let n = usize::try_from(pages.0).unwrap_or(0);
        Self {
            trouble: trouble.into(),
            colors: vec![Color::Unknown; n],
            flags: vec![PageFlags::default(); n],
            places: vec![RawPlace::NONE; n],
            mappings: vec![RawMapping::NONE; n],
            lru: vec![RawLru::NONE; n],
            ..Self::default()
        }
    }

    /// Number of pages of the guest.
    #[must_use]
    pub fn pages(&self) -> PageCount {
        PageCount(self.colors.len() as u64)
    }

    /// The guest's memory.
    #[must_use]
    pub fn memory(&self) -> ByteSize {
        self.pages().size()
    }

    /// A page's color; [`Color::Unknown`] outside memory.
    #[must_use]
    pub fn color(&self, page: PageIndex) -> Color {
        self.at(page).map_or(Color::Unknown, |at| self.colors[at])
    }

    /// All pages' colors, in order.
    #[must_use]
    pub fn colors(&self) -> &[Color] {
        &self.colors
    }

    /// A page's flags; none outside memory.
    #[must_use]
    pub fn flags(&self, page: PageIndex) -> PageFlags {
        self.at(page).map_or(PageFlags::default(), |at| self.flags[at])
    }

    /// Where a page stands in what it belongs to, when that is known.
    #[must_use]
    pub fn place(&self, page: PageIndex) -> Option<Place> {
        self.at(page).and_then(|at| self.places[at].get())
    }

    /// Where a process maps a page, when one does.
    #[must_use]
    pub fn mapping(&self, page: PageIndex) -> Option<Mapping> {
        self.at(page).and_then(|at| self.mappings[at].get())
    }

    /// Where a page stands in the LRU lists, when it is in one. Of a larger page all pages have its place.
    #[must_use]
    pub fn lru(&self, page: PageIndex) -> Option<LruPlace> {
        self.at(page).and_then(|at| self.lru[at].get())
    }

    /// Whether a clone may be given zeros for this page: the kernel holds it free and does not rely on what is in it.
    #[must_use]
    pub fn may_be_zero(&self, page: PageIndex) -> bool {
        !self.poisons_free && self.color(page) == Color::Free
    }

    /// The map for a later moment of the same guest, of which nothing could be found out, and why: most pages are still what they
    /// were, but none is called free.
    #[must_use]
    pub fn outdated(mut self, why: &str) -> Self {
        self.call_nothing_free();
        let when = "these are the colors of the checkpoint below";
        self.trouble = [why, when, &self.trouble].into_iter().filter(|t| !t.is_empty()).collect::<Vec<_>>().join("; ");
        self
    }

    /// There is a doubt about free pages: none is called that any more.
    pub(crate) fn call_nothing_free(&mut self) {
        self.colors.iter_mut().filter(|color| **color == Color::Free).for_each(|color| *color = Color::Unknown);
    }

    /// A page turns out to be a page table of a level. True when it was called free, which can't be: then nothing is known of it.
    pub(crate) fn set_table(&mut self, page: PageIndex, level: u8) -> bool {
        let Some(at) = self.at(page) else { return false };
        match self.colors[at] {
            Color::Free => {
                self.colors[at] = Color::Unknown;
                return true;
            }
            Color::KernelOther | Color::Unknown | Color::PageTables => {
                self.colors[at] = Color::PageTables;
                self.places[at] = RawPlace::new(Place::PageTable(level));
            }
            _ => {}
        }
        false
    }

    fn at(&self, page: PageIndex) -> Option<usize> {
        usize::try_from(page.0).ok().filter(|&at| at < self.colors.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn small_forms_hold_what_they_are_given() {
        for place in [
            Place::File(FileId(0), 0),
            Place::File(FileId(MAX_NUMBER), u32::MAX),
            Place::Slab(CacheId(7)),
            Place::PageTable(5),
            Place::KernelImage(9),
            Place::FrameTable(u32::MAX),
        ] {
            assert_eq!(RawPlace::new(place).get(), Some(place));
        }
        assert_eq!(RawPlace::NONE.get(), None);
        let mapping = Mapping { process: ProcessId(65534), page: MAX_VIRTUAL_PAGE - 1 };
        assert_eq!(RawMapping::new(mapping).get(), Some(mapping));
        assert_eq!(RawMapping::NONE.get(), None);
        let lru = LruPlace { list: 254, position: MAX_POSITION };
        assert_eq!(RawLru::new(lru).get(), Some(lru));
        assert_eq!(RawLru::NONE.get(), None);
    }

    #[test]
    fn numbers_of_colors_are_their_places() {
        for (number, color) in Color::ALL.into_iter().enumerate() {
            assert_eq!(Color::from_number(number as u8), Some(color));
            assert_eq!(color as usize, number);
        }
        assert_eq!(Color::from_number(11), None);
    }
}
