//! Processes: their page tables, what they map, and who they are.

use crate::{
    ColorMap, ProcessFacts, ProcessId,
    frames::FrameTable,
    kernel::{Types, same_kernel},
    map::{Color, MAX_PROCESSES, MAX_VIRTUAL_PAGE, Mapping, PageFlags, RawMapping},
    memory::{ColorError, Physical, Table},
    paging::{BY_CPU, Half, KernelSpace, Leaf, MARKS, Visitor, printable, walk},
};
use ramet_memory::{PAGE_SIZE, PageIndex, PageSet};

/// Bytes of a command's name (`TASK_COMM_LEN`).
const COMMAND: usize = 16;

/// The roots of page tables among `candidates`: what maps the kernel as its own root does.
pub(crate) fn find_roots(
    physical: &Physical<'_>,
    own_root: u64,
    candidates: impl Iterator<Item = PageIndex>,
) -> Result<Vec<PageIndex>, ColorError> {
    let Some(own) = physical.table(own_root)? else { return Ok(Vec::new()) };
    let mut roots = Vec::new();
    // The last entry maps the kernel's image: one look settles nearly all.
    let last = own[511] & !BY_CPU;
    for page in candidates {
        let gpa = physical.gpa(page);
        let mut bytes = [0; 8];
        if gpa == own_root || !physical.read(gpa + 511 * 8, &mut bytes)? {
            continue;
        }
        if u64::from_le_bytes(bytes) & !BY_CPU == last && is_root(physical, &own, gpa)? {
            roots.push(page);
            if roots.len() == MAX_PROCESSES {
                break;
            }
        }
    }
    Ok(roots)
}

fn is_root(physical: &Physical<'_>, own: &Table, gpa: u64) -> Result<bool, ColorError> {
    Ok(physical.table(gpa)?.is_some_and(|table| same_kernel(own, &table)))
}

/// What is walked and marked.
pub(crate) struct Walker<'a> {
    physical: &'a Physical<'a>,
    map: &'a mut ColorMap,
    seen: PageSet,
    marks: u64,
    process: ProcessId,
    /// Pages that are both free and a process's, or a page table: there are none in a sound guest.
    pub(crate) conflicts: u64,
    /// Whether some of the work was left out for being too much.
    pub(crate) incomplete: bool,
}

impl<'a> Walker<'a> {
    pub(crate) fn new(physical: &'a Physical<'a>, map: &'a mut ColorMap) -> Self {
        Self {
            physical,
            map,
            seen: PageSet::new(physical.pages()),
            marks: physical.pages().0.saturating_mul(MARKS),
            process: ProcessId(0),
            conflicts: 0,
            incomplete: false,
        }
    }

    /// Walks what one process maps.
    pub(crate) fn process(&mut self, facts: ProcessFacts, levels: u8) -> Result<(), ColorError> {
        self.process = ProcessId(self.map.processes.len() as u16);
        let root = facts.root;
        self.map.processes.push(facts);
        walk(self.physical, root, levels, Half::Lower, self)
    }

    fn mark(&mut self, page: PageIndex, leaf: &Leaf, virtual_page: u64) {
        let at = page.0 as usize;
        let flags = &mut self.map.flags[at];
        flags.set(PageFlags::MAPPED);
        if leaf.accessed {
            flags.set(PageFlags::ACCESSED);
        }
        if leaf.dirty {
            flags.set(PageFlags::DIRTY);
        }
        if leaf.execute {
            flags.set(PageFlags::EXECUTABLE);
        }
        let tables_only = self.map.method == crate::Method::PageTables;
        let color = &mut self.map.colors[at];
        *color = match *color {
            Color::UserData if leaf.execute => Color::UserCode,
            Color::CacheData if leaf.execute => Color::CacheCode,
            Color::Unknown if tables_only && leaf.execute => Color::UserCode,
            Color::Unknown if tables_only => Color::UserData,
            Color::Free => {
                self.conflicts += 1;
                Color::Unknown
            }
            other => other,
        };
        if self.map.mappings[at] == RawMapping::NONE && virtual_page < MAX_VIRTUAL_PAGE {
            self.map.mappings[at] = RawMapping::new(Mapping { process: self.process, page: virtual_page });
        }
    }
}

impl Visitor for Walker<'_> {
    fn table(&mut self, page: PageIndex, level: u8) -> bool {
        if !self.seen.insert(page) {
            return false;
        }
        self.conflicts += u64::from(self.map.set_table(page, level));
        true
    }

    fn leaf(&mut self, leaf: Leaf) -> bool {
        if !leaf.user {
            return true;
        }
        let pages = leaf.len / PAGE_SIZE as u64;
        let Some(left) = self.marks.checked_sub(pages) else {
            self.incomplete = true;
            return false;
        };
        self.marks = left;
        for number in 0..pages {
            if let Some(page) = self.physical.page(leaf.gpa + number * PAGE_SIZE as u64) {
                self.mark(page, &leaf, leaf.va / PAGE_SIZE as u64 + number);
            }
        }
        true
    }
}

/// Who has a root, as the kernel tells. `None` when the kernel does not know the root: it is left from one that ended.
pub(crate) fn identify(
    space: &KernelSpace<'_>,
    table: FrameTable,
    types: &Types,
    root: PageIndex,
) -> Result<Option<ProcessFacts>, ColorError> {
    let gpa = space.physical.gpa(root);
    let mut facts = ProcessFacts { root: gpa, ..ProcessFacts::default() };
    let (Some(page_mm), Some(mm_pgd)) = (types.page_mm, types.mm_pgd) else { return Ok(Some(facts)) };
    let Some(frame) = table.frame(space, root)? else { return Ok(None) };
    let Some(mm) = frame.get(page_mm..).and_then(|b| b.first_chunk()).map(|b| u64::from_le_bytes(*b)) else {
        return Ok(None);
    };
    if space.u64(mm.wrapping_add(mm_pgd))? != Some(space.direct_map.wrapping_add(gpa)) {
        return Ok(None);
    }
    let (Some(owner), Some(task_mm), Some(tgid), Some(comm)) =
        (types.mm_owner, types.task_mm, types.task_tgid, types.task_comm)
    else {
        return Ok(Some(facts));
    };
    let Some(task) = space.u64(mm.wrapping_add(owner))?.filter(|&task| space.direct_page(task).is_some()) else {
        return Ok(Some(facts));
    };
    if space.u64(task.wrapping_add(task_mm))? != Some(mm) {
        return Ok(Some(facts));
    }
    facts.pid = space.u64(task.wrapping_add(tgid))?.unwrap_or(0) as u32;
    let mut name = [0; COMMAND];
    if space.read(task.wrapping_add(comm), &mut name)? {
        facts.command = printable(&name[..COMMAND - 1]).unwrap_or_default();
    }
    Ok(Some(facts))
}
