//! The kernel's own pages: what it maps outside the mapping of all memory.

use crate::{
    ColorMap,
    frames::FrameTable,
    kernel::Kernel,
    map::{Color, Place, RawPlace},
    memory::ColorError,
    paging::{Half, IMAGE_START, KernelSpace, Leaf, VMALLOC_END, Visitor, kernel_marks, walk},
};
use ramet_memory::{PAGE_SIZE, PageIndex, PageSet};

/// Colors what the kernel maps outside the mapping of all memory: its image, its frame table, its vmalloc area. Returns how
/// many of its page tables were called free.
pub(crate) fn color_kernel(
    space: &KernelSpace<'_>,
    kernel: &Kernel,
    table: FrameTable,
    map: &mut ColorMap,
) -> Result<u64, ColorError> {
    let pages = space.physical.pages();
    let last = space.physical.frame(PageIndex(pages.0.saturating_sub(1)));
    let mut visitor = KernelPages {
        space,
        map,
        table,
        anchor: kernel.image(),
        frames: last + 1,
        seen: PageSet::new(pages),
        direct: space.direct_map..space.direct_map.saturating_add((last + 1) * PAGE_SIZE as u64),
        conflicts: 0,
        marks: kernel_marks(pages),
    };
    walk(space.physical, space.root, space.levels, Half::Upper, &mut visitor)?;
    Ok(visitor.conflicts)
}

struct KernelPages<'a> {
    space: &'a KernelSpace<'a>,
    map: &'a mut ColorMap,
    table: FrameTable,
    anchor: u64,
    frames: u64,
    seen: PageSet,
    direct: std::ops::Range<u64>,
    conflicts: u64,
    marks: u64,
}

impl KernelPages<'_> {
    fn one(&mut self, page: PageIndex, va: u64, execute: bool) {
        let at = page.0 as usize;
        let color = &mut self.map.colors[at];
        if !matches!(color, Color::KernelOther | Color::Unknown) {
            return;
        }
        if (IMAGE_START..IMAGE_START + (1 << 30)).contains(&va) {
            *color = if execute { Color::KernelCode } else { Color::KernelOther };
            if let Some(offset) = va.checked_sub(self.anchor) {
                self.map.places[at] = RawPlace::new(Place::KernelImage((offset / PAGE_SIZE as u64) as u32));
            }
        } else if let Some(own) = self.table.own_page(va, self.frames) {
            *color = Color::KernelOther;
            self.map.places[at] = RawPlace::new(Place::FrameTable(own));
        } else if execute {
            *color = Color::KernelCode;
        } else if !(VMALLOC_END..IMAGE_START).contains(&va) {
            *color = Color::Vmalloc;
        }
    }
}

impl Visitor for KernelPages<'_> {
    fn table(&mut self, page: PageIndex, level: u8) -> bool {
        if !self.seen.insert(page) {
            return false;
        }
        self.conflicts += u64::from(self.map.set_table(page, level));
        true
    }

    fn leaf(&mut self, leaf: Leaf) -> bool {
        if leaf.user || self.direct.contains(&leaf.va) || leaf.len >= 1 << 30 {
            return true;
        }
        // Only tables made to waste time map so much.
        let Some(left) = self.marks.checked_sub(leaf.len / PAGE_SIZE as u64) else { return true };
        self.marks = left;
        for offset in (0..leaf.len).step_by(PAGE_SIZE) {
            if let Some(page) = self.space.physical.page(leaf.gpa + offset) {
                self.one(page, leaf.va + offset, leaf.execute);
            }
        }
        true
    }
}
