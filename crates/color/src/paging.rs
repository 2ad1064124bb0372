//! Page tables of x86-64: walking them, and the kernel's address space.

use crate::memory::{ColorError, Physical};
use ramet_memory::{Gpa, PAGE_SIZE, PageCount, PageIndex, PageSet};

pub(crate) const PRESENT: u64 = 1;
const WRITE_BIT: u64 = 2;
const USER_BIT: u64 = 4;
const ACCESSED_BIT: u64 = 0x20;
const DIRTY_BIT: u64 = 0x40;
const LARGE: u64 = 0x80;
const NO_EXECUTE: u64 = 1 << 63;
/// The physical address in an entry.
pub(crate) const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// Accessed and dirty: what a CPU changes by itself.
pub(crate) const BY_CPU: u64 = ACCESSED_BIT | DIRTY_BIT;

/// A CPU's page-table root.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, serde::Serialize, serde::Deserialize)]
pub struct CpuRoot {
    /// Its CR3.
    pub cr3: u64,
    /// Its CR4: whether its tables have 5 levels is in it (bit 12).
    pub cr4: u64,
}

impl CpuRoot {
    /// Guest-physical address of the root.
    #[must_use]
    pub const fn root(self) -> Gpa {
        Gpa(self.cr3 & ADDRESS)
    }

    /// Levels of its page tables: 4 or 5.
    #[must_use]
    pub const fn levels(self) -> u8 {
        if self.cr4 & (1 << 12) != 0 { 5 } else { 4 }
    }
}

/// Marks of mapped pages that are made at most, for each page of memory: so many processes may share all of it.
pub(crate) const MARKS: u64 = 256;
/// For the kernel's half so many at least: 64 GiB.
const MIN_KERNEL_MARKS: u64 = 1 << 24;

/// Pages that are marked at most for what the kernel maps in its half: large pages of devices are mapped there, too.
pub(crate) fn kernel_marks(pages: PageCount) -> u64 {
    pages.0.saturating_mul(MARKS).max(MIN_KERNEL_MARKS)
}

/// What an entry of the lowest level, or of a large page, maps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Leaf {
    /// Virtual address.
    pub(crate) va: u64,
    /// Guest-physical address.
    pub(crate) gpa: u64,
    /// Bytes: 4 KiB, 2 MiB or 1 GiB.
    pub(crate) len: u64,
    /// User mode may use it.
    pub(crate) user: bool,
    /// It may be executed.
    pub(crate) execute: bool,
    /// The CPU has used it.
    pub(crate) accessed: bool,
    /// The CPU has written to it.
    pub(crate) dirty: bool,
}

/// What a walk tells.
pub(crate) trait Visitor {
    /// A page table of a level, at a page of memory. False: it is not to be gone into.
    fn table(&mut self, page: PageIndex, level: u8) -> bool;
    /// A mapped page. False: the walk ends here.
    fn leaf(&mut self, leaf: Leaf) -> bool;
}

/// The halves of an address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Half {
    /// A process's.
    Lower,
    /// The kernel's.
    Upper,
}

/// Walks one half of the tables under `root`. A visitor that refuses tables that it has seen bounds the time by the size of
/// memory, whatever the tables say.
pub(crate) fn walk(
    physical: &Physical<'_>,
    root: u64,
    levels: u8,
    half: Half,
    visitor: &mut dyn Visitor,
) -> Result<(), ColorError> {
    let Some(page) = physical.page(root & ADDRESS) else { return Ok(()) };
    if !visitor.table(page, levels) {
        return Ok(());
    }
    let walk = Walk { physical, levels, half };
    walk.below(root & ADDRESS, levels, 0, Rights { user: true, execute: true }, visitor)?;
    Ok(())
}

#[derive(Clone, Copy)]
struct Rights {
    user: bool,
    execute: bool,
}

struct Walk<'a> {
    physical: &'a Physical<'a>,
    levels: u8,
    half: Half,
}

impl Walk<'_> {
    /// False when the visitor ended the walk.
    fn below(
        &self,
        table: u64,
        level: u8,
        base: u64,
        rights: Rights,
        visitor: &mut dyn Visitor,
    ) -> Result<bool, ColorError> {
        let Some(entries) = self.physical.table(table)? else { return Ok(true) };
        let shift = 12 + 9 * u32::from(level - 1);
        let top = level == self.levels;
        let range = match (top, self.half) {
            (true, Half::Lower) => 0..256,
            (true, Half::Upper) => 256..512,
            (false, _) => 0..512,
        };
        for number in range {
            let entry = entries[number];
            if entry & PRESENT == 0 {
                continue;
            }
            let mut va = base | (number as u64) << shift;
            if top && number >= 256 {
                // Sign-extended.
                va |= u64::MAX << (shift + 9);
            }
            // A kernel with page-table isolation forbids execution in the root that user mode does not run on.
            let execute = rights.execute && (entry & NO_EXECUTE == 0 || (top && self.half == Half::Lower));
            let rights = Rights { user: rights.user && entry & USER_BIT != 0, execute };
            let go_on = if level == 1 || (entry & LARGE != 0 && (level == 2 || level == 3)) {
                let len = 1 << shift;
                visitor.leaf(Leaf {
                    va,
                    gpa: entry & ADDRESS & !(len - 1),
                    len,
                    user: rights.user,
                    execute: rights.execute,
                    accessed: entry & ACCESSED_BIT != 0,
                    dirty: entry & DIRTY_BIT != 0 && entry & WRITE_BIT != 0,
                })
            } else {
                match self.physical.page(entry & ADDRESS) {
                    Some(page) if visitor.table(page, level - 1) => {
                        self.below(entry & ADDRESS, level - 1, va, rights, visitor)?
                    }
                    _ => true,
                }
            };
            if !go_on {
                return Ok(false);
            }
        }
        Ok(true)
    }
}

/// A stretch of the kernel's address space that is mapped to a stretch of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    va: u64,
    len: u64,
    gpa: u64,
}

/// The start of the mapping of the kernel's image (`__START_KERNEL_map`).
pub(crate) const IMAGE_START: u64 = 0xffff_ffff_8000_0000;
/// Above this lie mappings of other kinds: entry areas, firmware, the image, modules.
pub(crate) const VMALLOC_END: u64 = 0xffff_fe00_0000_0000;

/// The kernel's address space.
pub(crate) struct KernelSpace<'a> {
    pub(crate) physical: &'a Physical<'a>,
    ranges: Vec<Range>,
    /// Where the mapping of all memory starts.
    pub(crate) direct_map: u64,
    /// Root of the kernel's own tables.
    pub(crate) root: u64,
    /// Levels of its tables.
    pub(crate) levels: u8,
    /// Tables that it consists of.
    pub(crate) tables: PageSet,
}

impl<'a> KernelSpace<'a> {
    /// The address space under a root.
    pub(crate) fn new(physical: &'a Physical<'a>, root: u64, levels: u8) -> Result<Self, ColorError> {
        let mut collect = Collect {
            tables: PageSet::new(physical.pages()),
            ranges: Vec::new(),
            // A quarter of a percent of memory at most.
            room: usize::try_from(physical.pages().0 / 2).unwrap_or(0).max(4096),
            offsets: Vec::new(),
        };
        walk(physical, root, levels, Half::Upper, &mut collect)?;
        let Collect { tables, ranges, offsets, .. } = collect;
        let direct_map = offsets.iter().max_by_key(|(_, count)| *count).map_or(0, |(offset, _)| *offset);
        Ok(Self { physical, ranges, direct_map, root, levels, tables })
    }

    /// Where an address is mapped to, and for how many bytes from there on.
    pub(crate) fn translate(&self, va: u64) -> Option<(u64, u64)> {
        let at = self.ranges.partition_point(|range| range.va <= va).checked_sub(1)?;
        let range = self.ranges[at];
        let within = va - range.va;
        (within < range.len).then(|| (range.gpa + within, range.len - within))
    }

    /// Fills `bytes` from an address; false where nothing is mapped.
    pub(crate) fn read(&self, mut va: u64, mut bytes: &mut [u8]) -> Result<bool, ColorError> {
        while !bytes.is_empty() {
            let Some((gpa, len)) = self.translate(va) else { return Ok(false) };
            let len = len.min(bytes.len() as u64);
            let (now, rest) = bytes.split_at_mut(usize::try_from(len).unwrap_or(0));
            if !self.physical.read(gpa, now)? {
                return Ok(false);
            }
            va = va.wrapping_add(len);
            bytes = rest;
        }
        Ok(true)
    }

    /// The number at an address.
    pub(crate) fn u64(&self, va: u64) -> Result<Option<u64>, ColorError> {
        let mut bytes = [0; 8];
        Ok(self.read(va, &mut bytes)?.then(|| u64::from_le_bytes(bytes)))
    }

    /// The text at an address, up to a zero byte or `limit` bytes; nothing when it is empty or no printable text.
    pub(crate) fn text(&self, va: u64, limit: usize) -> Result<Option<String>, ColorError> {
        let mut bytes = [0; 256];
        // Not beyond what is mapped: text may end where a page ends.
        let Some((_, mapped)) = self.translate(va) else { return Ok(None) };
        let len = limit.min(bytes.len()).min(usize::try_from(mapped).unwrap_or(usize::MAX));
        if !self.read(va, &mut bytes[..len])? {
            return Ok(None);
        }
        Ok(printable(&bytes[..len]))
    }

    /// The page of memory that the direct map has at an address.
    pub(crate) fn direct_page(&self, va: u64) -> Option<PageIndex> {
        // Only what lies in the direct map: 64 TiB, or 32 PiB with 5 levels.
        let limit = if self.levels == 5 { 1 << 55 } else { 1 << 46 };
        self.physical.page(va.checked_sub(self.direct_map).filter(|&gpa| gpa < limit)?)
    }

    /// The mapped stretches of the kernel's image.
    pub(crate) fn image(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.ranges.iter().filter(|r| r.va >= IMAGE_START && r.va < IMAGE_START + (1 << 30)).map(|r| (r.va, r.len))
    }
}

/// Text of printable characters before the first zero byte.
pub(crate) fn printable(bytes: &[u8]) -> Option<String> {
    let end = bytes.iter().position(|&b| b == 0).unwrap_or(bytes.len());
    let text = std::str::from_utf8(&bytes[..end]).ok()?;
    (!text.is_empty() && !text.chars().any(char::is_control)).then(|| text.to_owned())
}

struct Collect {
    tables: PageSet,
    ranges: Vec<Range>,
    room: usize,
    /// Address minus physical address of large pages, and how many bytes have it.
    offsets: Vec<(u64, u64)>,
}

/// Most different offsets that are counted: the direct map's is there early, and far ahead.
const MAX_OFFSETS: usize = 256;

impl Visitor for Collect {
    fn table(&mut self, page: PageIndex, _: u8) -> bool {
        self.tables.insert(page)
    }

    fn leaf(&mut self, leaf: Leaf) -> bool {
        if leaf.len > PAGE_SIZE as u64 && leaf.va < VMALLOC_END {
            let offset = leaf.va.wrapping_sub(leaf.gpa);
            match self.offsets.iter_mut().find(|(known, _)| *known == offset) {
                Some((_, bytes)) => *bytes += leaf.len,
                None => {
                    if self.offsets.len() < MAX_OFFSETS {
                        self.offsets.push((offset, leaf.len));
                    }
                }
            }
        }
        match self.ranges.last_mut() {
            Some(last) if last.va.wrapping_add(last.len) == leaf.va && last.gpa.wrapping_add(last.len) == leaf.gpa => {
                last.len += leaf.len;
            }
            _ => {
                if self.ranges.len() < self.room {
                    self.ranges.push(Range { va: leaf.va, len: leaf.len, gpa: leaf.gpa });
                }
            }
        }
        true
    }
}
