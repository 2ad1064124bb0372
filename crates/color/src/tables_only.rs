//! What can be told from the CPUs' page tables when the kernel is not understood.

use crate::{
    ColorMap, Method, ProcessFacts,
    map::{Color, MAX_PROCESSES},
    memory::{ColorError, Physical},
    paging::{CpuRoot, Half, KernelSpace, Leaf, Visitor, kernel_marks, walk},
    processes::{Walker, find_roots},
};
use ramet_memory::{PAGE_SIZE, PageIndex, PageSet};

/// CPUs whose roots are tried where no kernel is understood: mostly the first will do.
const MAX_ROOTS: usize = 8;

/// Colors what can be told from the CPUs' page tables alone.
pub(crate) fn from_page_tables(
    physical: &Physical<'_>,
    cpus: &[CpuRoot],
    map: &mut ColorMap,
) -> Result<bool, ColorError> {
    // The root that a CPU has is the kernel's, or behind the kernel's.
    for cpu in cpus.iter().take(MAX_ROOTS) {
        for root in [cpu.root().0 & !0x1000, cpu.root().0] {
            let space = KernelSpace::new(physical, root, cpu.levels())?;
            if space.direct_map == 0 && space.image().next().is_none() {
                continue;
            }
            map.method = Method::PageTables;
            let (seen, marks) = (PageSet::new(physical.pages()), kernel_marks(physical.pages()));
            let mut kernel = KernelText { physical, map, seen, marks };
            walk(physical, root, cpu.levels(), Half::Upper, &mut kernel)?;
            let all = (0..physical.pages().0).map(PageIndex);
            let mut roots = find_roots(physical, root, all)?;
            roots.extend(physical.page(root));
            roots.truncate(MAX_PROCESSES);
            let mut walker = Walker::new(physical, map);
            for page in roots {
                let facts = ProcessFacts { root: physical.gpa(page), ..ProcessFacts::default() };
                walker.process(facts, cpu.levels())?;
            }
            return Ok(true);
        }
    }
    Ok(false)
}

struct KernelText<'a> {
    physical: &'a Physical<'a>,
    map: &'a mut ColorMap,
    seen: PageSet,
    marks: u64,
}

impl Visitor for KernelText<'_> {
    fn table(&mut self, page: PageIndex, level: u8) -> bool {
        let new = self.seen.insert(page);
        if new {
            self.map.set_table(page, level);
        }
        new
    }

    fn leaf(&mut self, leaf: Leaf) -> bool {
        if leaf.execute && !leaf.user && leaf.len < 1 << 30 {
            let Some(left) = self.marks.checked_sub(leaf.len / PAGE_SIZE as u64) else { return true };
            self.marks = left;
            for number in 0..leaf.len / PAGE_SIZE as u64 {
                if let Some(page) = self.physical.page(leaf.gpa + number * PAGE_SIZE as u64)
                    && self.map.colors[page.0 as usize] == Color::Unknown
                {
                    self.map.colors[page.0 as usize] = Color::KernelCode;
                }
            }
        }
        true
    }
}
