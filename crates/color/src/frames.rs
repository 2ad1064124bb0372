//! The kernel's frame table: `struct page`, one for each page of memory.

use crate::{
    ColorMap,
    files::{Files, Lookup},
    kernel::{FRAME, Kernel, Layout, TypeMatch},
    lru::NO_PAGE,
    map::{CacheId, Color, MAX_NUMBER, PageFlags, Place, RawPlace},
    memory::ColorError,
    paging::KernelSpace,
};
use ramet_memory::{PAGE_SIZE, PageIndex, PageSet};
use std::collections::HashMap;

/// Bytes of memory that one section of the frame table stands for (`SECTION_SIZE_BITS`).
const SECTION: u64 = 1 << 27;
/// The largest block of the buddy allocator, as a power of two of pages (`MAX_ORDER`, `MAX_PAGE_ORDER`).
const MAX_ORDER: u64 = 10;
/// Pages in the largest compound page: 1 GiB.
const MAX_COMPOUND: u64 = 1 << 18;
/// Frames read at a time.
const CHUNK: usize = 1024;
/// Most slab caches.
const MAX_CACHES: usize = 16_384;
/// Most bytes of a slab cache's name.
const MAX_CACHE_NAME: usize = 63;

/// Where the frame table is in the kernel's address space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct FrameTable {
    /// Address of the frame of physical page 0. Every section's part of the table fits it.
    base: u64,
}

impl FrameTable {
    /// Finds it as `pfn_to_page` does (sparse memory with a virtual memory map).
    pub(crate) fn find(space: &KernelSpace<'_>, kernel: &Kernel) -> Result<Result<Self, String>, ColorError> {
        let Some(sections) = kernel.notes.symbol("mem_section") else {
            return Ok(Err("its notes do not tell where its memory sections are".into()));
        };
        let size = u64::from(kernel.notes.size("mem_section").filter(|s| (8..=256).contains(s)).unwrap_or(16));
        let offset = u64::from(kernel.notes.offset("mem_section.section_mem_map").unwrap_or(0));
        let per_root = PAGE_SIZE as u64 / size;
        let mut base = None;
        let mut at = 0;
        while at < space.physical.pages().0 {
            let gpa = space.physical.gpa(PageIndex(at));
            let section = gpa / SECTION;
            // The next page of memory in another section.
            at += ((section + 1) * SECTION - gpa) / PAGE_SIZE as u64;
            let Some(root) = space.u64(sections.wrapping_add(8 * (section / per_root)))?.filter(|&r| r != 0) else {
                continue;
            };
            let Some(map) = space.u64(root.wrapping_add(size * (section % per_root) + offset))? else { continue };
            if map & 1 == 0 {
                continue;
            }
            let map = map & !0xfff;
            if *base.get_or_insert(map) != map {
                return Ok(Err("its frame table is not in one piece".into()));
            }
        }
        Ok(base.map(|base| Self { base }).ok_or_else(|| "its memory sections lead to no frame table".into()))
    }

    fn va(self, frame: u64) -> u64 {
        self.base.wrapping_add(frame * FRAME as u64)
    }

    /// The page of memory whose frame is at an address.
    pub(crate) fn page_at(self, space: &KernelSpace<'_>, va: u64) -> Option<PageIndex> {
        let offset = va.wrapping_sub(self.base);
        if !offset.is_multiple_of(FRAME as u64) || offset >= 1 << 50 {
            return None;
        }
        space.physical.page(offset / FRAME as u64 * PAGE_SIZE as u64)
    }

    /// The frame of one page.
    pub(crate) fn frame(self, space: &KernelSpace<'_>, page: PageIndex) -> Result<Option<[u8; FRAME]>, ColorError> {
        let mut frame = [0; FRAME];
        Ok(space.read(self.va(space.physical.frame(page)), &mut frame)?.then_some(frame))
    }

    /// The page of memory that the frame of a page is in.
    pub(crate) fn page_of_frame(self, space: &KernelSpace<'_>, page: PageIndex) -> Option<PageIndex> {
        let (gpa, _) = space.translate(self.va(space.physical.frame(page)))?;
        space.physical.page(gpa)
    }

    /// Which page of the frame table an address is in.
    pub(crate) fn own_page(self, va: u64, frames: u64) -> Option<u32> {
        let offset = va.checked_sub(self.base)?;
        (offset < frames * FRAME as u64).then(|| u32::try_from(offset / PAGE_SIZE as u64).unwrap_or(u32::MAX))
    }
}

/// Fields of a `struct page`.
#[derive(Clone, Copy)]
pub(crate) struct Frame<'a> {
    bytes: &'a [u8; FRAME],
    layout: &'a Layout,
}

impl<'a> Frame<'a> {
    pub(crate) const fn new(bytes: &'a [u8; FRAME], layout: &'a Layout) -> Self {
        Self { bytes, layout }
    }

    /// The eight bytes at an offset; the layout has no offset that leaves the frame.
    pub(crate) fn u64(&self, at: usize) -> u64 {
        self.bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u64::from_le_bytes(*b))
    }

    fn u32(&self, at: usize) -> u32 {
        self.bytes.get(at..).and_then(|b| b.first_chunk()).map_or(0, |b| u32::from_le_bytes(*b))
    }

    fn has(&self, flag: Option<u64>) -> bool {
        flag.is_some_and(|flag| self.u64(self.layout.flags) & flag != 0)
    }

    /// The word that tells a page's type, or counts its mappings.
    pub(crate) fn kind(&self) -> u32 {
        self.u32(self.layout.mapcount)
    }

    pub(crate) fn references(&self) -> u32 {
        self.u32(self.layout.refcount)
    }

    fn is_buddy(&self) -> bool {
        self.layout.buddy.is(self.kind())
    }

    fn is_slab(&self) -> bool {
        self.has(self.layout.slab_flag) || self.layout.slab.is_some_and(|slab| slab.is(self.kind()))
    }

    /// Address of the head's frame, for a tail of a compound page whose own frame is at `va`.
    fn head(&self, va: u64) -> Option<u64> {
        let word = self.u64(self.layout.head);
        if word & 1 == 0 {
            return None;
        }
        let rest = word & !1;
        // Linux 7.1 and later store a mask instead of a pointer.
        let blocks = (!rest).wrapping_add(1);
        let is_mask = blocks.is_power_of_two() && (FRAME as u64..=FRAME as u64 * MAX_COMPOUND).contains(&blocks);
        Some(if is_mask { va & rest } else { rest })
    }

    /// The frames of its neighbours in its LRU list: next and previous.
    pub(crate) fn lru(&self) -> Option<(u64, u64)> {
        let at = self.layout.lru;
        // They point at each other's links.
        let neighbour = |link| self.u64(link).wrapping_sub(at as u64);
        self.has(self.layout.lru_flag).then(|| (neighbour(at), neighbour(at + 8)))
    }
}

/// What the pass over the frame table finds out besides colors.
#[derive(Debug, Default)]
pub(crate) struct Findings {
    /// Free blocks that no kernel makes: misaligned, or in use. There must be none.
    pub(crate) bad_blocks: u64,
    /// Free pages.
    pub(crate) free: u64,
    pub(crate) caches: Vec<String>,
    /// Pages of the kernel's that have a type which is not known, and the word that tells it.
    pub(crate) typed: Vec<(u32, u32)>,
    /// Pages that may be roots of page tables.
    pub(crate) candidates: Vec<u32>,
}

/// The pass.
pub(crate) struct Pass<'a, 'p> {
    pub(crate) space: &'a KernelSpace<'a>,
    pub(crate) table: FrameTable,
    pub(crate) layout: &'a Layout,
    pub(crate) files: Option<&'p mut Files<'a>>,
    pub(crate) map: &'p mut ColorMap,
    /// How page tables are typed, as those of the kernel show.
    tables: Option<TypeMatch>,
    /// For each page the next page in its LRU list: all ones for none.
    pub(crate) next: Vec<u32>,
    /// First pages of LRU lists.
    pub(crate) first: Vec<u32>,
    by_cache: HashMap<u64, Option<CacheId>>,
    /// Pages known to be slab, and known not to be.
    slab: PageSet,
    no_slab: PageSet,
    findings: Findings,
}

impl<'a, 'p> Pass<'a, 'p> {
    pub(crate) fn new(
        space: &'a KernelSpace<'a>,
        table: FrameTable,
        layout: &'a Layout,
        files: Option<&'p mut Files<'a>>,
        map: &'p mut ColorMap,
    ) -> Result<Self, ColorError> {
        let pages = space.physical.pages();
        Ok(Self {
            space,
            table,
            layout,
            files,
            map,
            tables: type_of_tables(space, table, layout)?,
            next: vec![NO_PAGE; usize::try_from(pages.0).unwrap_or(0)],
            first: Vec::new(),
            by_cache: HashMap::new(),
            slab: PageSet::new(pages),
            no_slab: PageSet::new(pages),
            findings: Findings::default(),
        })
    }

    /// Colors every page by its frame.
    pub(crate) fn run(mut self) -> Result<(Findings, Vec<u32>, Vec<u32>), ColorError> {
        let all = self.space.physical.pages().0;
        let mut bytes = vec![0; CHUNK * FRAME];
        let mut page = 0;
        let mut free_until = 0;
        while page < all {
            let frame = self.space.physical.frame(PageIndex(page));
            // Up to the end of the chunk, and not across the PCI hole.
            let mut count = (CHUNK as u64 - page % CHUNK as u64).min(all - page);
            if self.space.physical.frame(PageIndex(page + count - 1)) != frame + count - 1 {
                count = 1;
            }
            let chunk = &mut bytes[..count as usize * FRAME];
            let mapped = self.space.read(self.table.va(frame), chunk)?;
            if mapped {
                for (number, bytes) in (0..).zip(chunk.as_chunks::<FRAME>().0) {
                    let page = PageIndex(page + number);
                    if page.0 >= free_until {
                        let frame = Frame::new(bytes, self.layout);
                        free_until = self.one(page, frame)?.max(free_until);
                    }
                }
            }
            page += count;
        }
        Ok((self.findings, self.next, self.first))
    }

    /// Colors one page; says where a free block that it begins ends.
    fn one(&mut self, page: PageIndex, frame: Frame<'_>) -> Result<u64, ColorError> {
        if frame.is_buddy() {
            return Ok(self.free_block(page, frame));
        }
        let at = page.0 as usize;
        let va = self.table.va(self.space.physical.frame(page));
        if let Some(head) = frame.head(va) {
            self.tail(page, head);
            return Ok(0);
        }
        let color = self.head_color(page, frame)?;
        self.map.colors[at] = color;
        if frame.references() > 0 && matches!(color, Color::KernelOther | Color::PageTables) {
            self.findings.candidates.push(page.0 as u32);
        }
        let kind = frame.kind();
        if self.tables.is_none() && color == Color::KernelOther && is_type(kind) {
            self.findings.typed.push((page.0 as u32, kind));
        }
        if let Some((next, previous)) = frame.lru() {
            let flags = self.list_flags(frame);
            self.map.flags[at].set(flags);
            let in_table = |va| self.table.page_at(self.space, va);
            self.next[at] = in_table(next).map_or(NO_PAGE, |page| page.0 as u32);
            if in_table(previous).is_none() {
                self.first.push(page.0 as u32);
            }
        }
        Ok(0)
    }

    fn list_flags(&self, frame: Frame<'_>) -> PageFlags {
        let mut flags = PageFlags::default();
        if frame.has(self.layout.active_flag) {
            flags.set(PageFlags::ACTIVE);
        }
        if frame.has(self.layout.referenced_flag) {
            flags.set(PageFlags::REFERENCED);
        }
        flags
    }

    fn free_block(&mut self, page: PageIndex, frame: Frame<'_>) -> u64 {
        let order = frame.u64(self.layout.private);
        let number = self.space.physical.frame(page);
        if order > MAX_ORDER || !number.is_multiple_of(1 << order) || frame.references() != 0 {
            self.findings.bad_blocks += 1;
            return 0;
        }
        let end = (page.0 + (1 << order)).min(self.space.physical.pages().0);
        if self.space.physical.frame(PageIndex(end - 1)) != number + (end - 1 - page.0) {
            self.findings.bad_blocks += 1;
            return 0;
        }
        self.map.colors[page.0 as usize..end as usize].fill(Color::Free);
        self.findings.free += end - page.0;
        end
    }

    /// A tail is what its head is.
    fn tail(&mut self, page: PageIndex, head: u64) {
        let at = page.0 as usize;
        let Some(head) = self.table.page_at(self.space, head) else { return };
        let Some(behind) = page.0.checked_sub(head.0).filter(|&n| n > 0 && n < MAX_COMPOUND) else { return };
        let from = head.0 as usize;
        let color = self.map.colors[from];
        if color == Color::Free {
            return;
        }
        self.map.colors[at] = color;
        let mut flags = self.map.flags[from];
        flags.set(PageFlags::COMPOUND);
        self.map.flags[from].set(PageFlags::COMPOUND);
        self.map.flags[at] = flags;
        self.map.places[at] = match self.map.places[from].get() {
            Some(Place::File(file, offset)) => {
                if let Some(files) = &mut self.files {
                    files.count(file);
                }
                RawPlace::new(Place::File(file, offset.saturating_add(behind as u32)))
            }
            _ => self.map.places[from],
        };
    }

    fn head_color(&mut self, page: PageIndex, frame: Frame<'_>) -> Result<Color, ColorError> {
        if frame.is_slab() {
            self.place_slab(page, frame)?;
            return Ok(Color::Slab);
        }
        if self.tables.is_some_and(|tables| tables.is(frame.kind())) {
            return Ok(Color::PageTables);
        }
        let driver_holds = self.layout.offline.is_some_and(|offline| offline.is(frame.kind()));
        if driver_holds || frame.has(self.layout.reserved_flag) {
            return Ok(Color::KernelOther);
        }
        if frame.references() == 0 {
            // On its way between two uses; or the rest of a block that its owner holds without saying so.
            return Ok(Color::Unknown);
        }
        let mapping = frame.u64(self.layout.mapping);
        Ok(match mapping & 3 {
            1 if self.points_to_slab(mapping & !3)? => Color::UserData,
            // Merged with equal pages (KSM).
            3 if self.points_to_slab(mapping & !3)? => Color::UserData,
            0 if mapping != 0 => self.file_page(page, frame, mapping)?,
            0 if frame.has(self.layout.swap_cache_flag) && frame.has(self.layout.swap_backed_flag) => Color::CacheData,
            _ => Color::KernelOther,
        })
    }

    fn file_page(&mut self, page: PageIndex, frame: Frame<'_>, mapping: u64) -> Result<Color, ColorError> {
        let swap_backed = frame.has(self.layout.swap_backed_flag);
        let Some(files) = &mut self.files else {
            // Without type information it can't be checked: on a list of pages that may be given back is good enough.
            return Ok(if frame.lru().is_some() { Color::CacheData } else { Color::KernelOther });
        };
        match files.of(mapping, swap_backed)? {
            Lookup::File(file) => {
                files.count(file);
                let offset = u32::try_from(frame.u64(self.layout.index)).unwrap_or(u32::MAX);
                if file.0 <= MAX_NUMBER {
                    self.map.places[page.0 as usize] = RawPlace::new(Place::File(file, offset));
                }
                Ok(Color::CacheData)
            }
            Lookup::Uncounted => Ok(Color::CacheData),
            Lookup::No => Ok(Color::KernelOther),
        }
    }

    fn place_slab(&mut self, page: PageIndex, frame: Frame<'_>) -> Result<(), ColorError> {
        let Some(types) = &self.layout.types else { return Ok(()) };
        let (Some(at), Some(name)) = (types.slab_cache, types.cache_name) else { return Ok(()) };
        let cache = frame.u64(at);
        let known = match self.by_cache.get(&cache) {
            Some(known) => *known,
            None if self.by_cache.len() >= MAX_CACHES => None,
            None => {
                let text = match self.space.u64(cache.wrapping_add(name))? {
                    Some(text) => self.space.text(text, MAX_CACHE_NAME)?,
                    None => None,
                };
                let number = text.map(|text| {
                    // Caches of the same name count as one.
                    let number = self.findings.caches.iter().position(|known| *known == text);
                    CacheId(number.unwrap_or_else(|| {
                        self.findings.caches.push(text);
                        self.findings.caches.len() - 1
                    }) as u32)
                });
                self.by_cache.insert(cache, number);
                number
            }
        };
        if let Some(cache) = known {
            self.map.places[page.0 as usize] = RawPlace::new(Place::Slab(cache));
        }
        Ok(())
    }

    /// Whether an address is in a page of the slab allocator.
    fn points_to_slab(&mut self, va: u64) -> Result<bool, ColorError> {
        let Some(page) = self.space.direct_page(va) else { return Ok(false) };
        if self.slab.contains(page) {
            return Ok(true);
        }
        if self.no_slab.contains(page) {
            return Ok(false);
        }
        let is_slab = self.is_slab(page, true)?;
        if is_slab {
            self.slab.insert(page)
        } else {
            self.no_slab.insert(page)
        };
        Ok(is_slab)
    }

    fn is_slab(&self, page: PageIndex, go_to_head: bool) -> Result<bool, ColorError> {
        let Some(bytes) = self.table.frame(self.space, page)? else { return Ok(false) };
        let frame = Frame::new(&bytes, self.layout);
        let head = frame.head(self.table.va(self.space.physical.frame(page)));
        match head.and_then(|head| self.table.page_at(self.space, head)) {
            Some(head) if go_to_head => self.is_slab(head, false),
            Some(_) => Ok(false),
            None => Ok(frame.is_slab()),
        }
    }
}

/// Whether the word that is also the count of mappings is a type: counts start at -1.
const fn is_type(kind: u32) -> bool {
    (kind as i32) < -128
}

/// How the frames of page tables are typed: what most of the kernel's own have there. It differs from kernel to kernel.
fn type_of_tables(
    space: &KernelSpace<'_>,
    table: FrameTable,
    layout: &Layout,
) -> Result<Option<TypeMatch>, ColorError> {
    let mut kinds = Vec::new();
    for page in space.tables.iter().take(4096) {
        if let Some(bytes) = table.frame(space, page)? {
            let kind = Frame::new(&bytes, layout).kind();
            if is_type(kind) && !layout.buddy.is(kind) {
                kinds.push(kind);
            }
        }
    }
    Ok(most_common_type(kinds.into_iter()).map(|kind| TypeMatch::new(kind, layout.buddy_value)))
}

/// The type that most of some frames have; none when there are too few to tell.
pub(crate) fn most_common_type(kinds: impl Iterator<Item = u32>) -> Option<u32> {
    let mut counts: HashMap<u32, u32> = HashMap::new();
    kinds.for_each(|kind| *counts.entry(kind).or_default() += 1);
    let most = counts.into_iter().max_by_key(|&(kind, count)| (count, kind));
    most.filter(|&(_, count)| count >= 4).map(|(kind, _)| kind)
}
