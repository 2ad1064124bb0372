//! Coloring a guest's memory, from beginning to end.

use crate::{
    ColorMap, FileFacts, FileId, KernelFacts, Method,
    files::{Earlier, Files},
    frames::{FrameTable, Pass, most_common_type},
    kernel::{self, Kernel, Knowledge, Layout, Search},
    kernel_pages::color_kernel,
    lru,
    map::{Color, MAX_PROCESSES, Place, RawPlace},
    memory::{ColorError, GuestMemory, Physical},
    paging::{CpuRoot, KernelSpace},
    processes::{Walker, find_roots, identify},
    tables_only::from_page_tables,
    vmcoreinfo::Vmcoreinfo,
};
use ramet_memory::{PAGE_SIZE, PageIndex, PageSet};

/// Files that may have another number of pages than was counted before no page is called free: one in so many, or a few
/// that were being changed when the guest stopped.
const FILES_PER_MISMATCH: usize = 100;
const MISMATCHES: usize = 2;
/// Pages that are free and in use at once, beyond which no page is called free: one in so many.
const FREE_PER_CONFLICT: u64 = 1000;
/// Free pages that are looked at for a pattern.
const SAMPLES: usize = 512;
/// What a kernel with `page_poison=1` fills free pages with.
const POISON: u8 = 0xaa;

/// An earlier map of the same guest, to make a later one with less work.
#[derive(Debug, Clone, Copy)]
pub struct Base<'a> {
    /// The map.
    pub map: &'a ColorMap,
    /// Pages that may have changed since.
    pub changed: &'a PageSet,
}

/// Tells what every page of a guest's memory is.
///
/// Looks at memory and the CPUs' page-table roots only. Takes time and memory in proportion to the guest's memory, whatever
/// is in it. Where the guest is not understood, the map says less, and why ([`ColorMap::method`], [`ColorMap::trouble`]).
/// With a `base` of the same guest, what has not changed since is not looked for again; the map is the same.
///
/// # Errors
/// When memory can't be read. A guest that makes no sense is no error.
pub fn color(memory: &dyn GuestMemory, cpus: &[CpuRoot], base: Option<Base<'_>>) -> Result<ColorMap, ColorError> {
    let physical = &Physical::new(memory);
    let base = base.filter(|base| base.map.pages() == physical.pages() && base.changed.universe() == physical.pages());
    // Known from the base only if it is the same boot of the same kernel: the layout of its structures holds then.
    let (kernel, base) = match known_kernel(physical, cpus, base)? {
        Some(kernel) => (kernel, base),
        None => match kernel::find(physical, cpus)? {
            Search::Found(kernel) => (*kernel, None),
            Search::Nothing(trouble) => return without_frames(physical, cpus, trouble),
        },
    };
    let space = &KernelSpace::new(physical, kernel.root, kernel.levels)?;
    let layout = match base.and_then(|base| base.map.knowledge.as_ref()) {
        Some(known) => known.layout.clone(),
        None => match Layout::find(space, &kernel)? {
            Ok(layout) => layout,
            Err(trouble) => return without_frames(physical, cpus, trouble),
        },
    };
    let table = match FrameTable::find(space, &kernel)? {
        Ok(table) => table,
        Err(trouble) => return without_frames(physical, cpus, trouble),
    };
    with_frames(space, &kernel, layout, table, base)
}

/// The kernel of the base, when its notes are where they were and it still fits the CPUs.
fn known_kernel(
    physical: &Physical<'_>,
    cpus: &[CpuRoot],
    base: Option<Base<'_>>,
) -> Result<Option<Kernel>, ColorError> {
    let Some(known) = base.and_then(|base| base.map.knowledge.as_ref()) else { return Ok(None) };
    let page = known.notes_page;
    if page.0 >= physical.pages().0 {
        return Ok(None);
    }
    let mut bytes = [0; PAGE_SIZE];
    physical.read_page_file(page.offset(), &mut bytes)?;
    match Vmcoreinfo::parse(&bytes) {
        Some(notes) if notes.sum() == known.notes => kernel::check(physical, page, notes, cpus),
        _ => Ok(None),
    }
}

fn without_frames(physical: &Physical<'_>, cpus: &[CpuRoot], trouble: String) -> Result<ColorMap, ColorError> {
    let mut map = ColorMap::unknown(physical.pages(), trouble);
    if !from_page_tables(physical, cpus, &mut map)? {
        map.trouble = match map.trouble.as_str() {
            "" => "no page tables of a kernel are known".into(),
            other => format!("{other}; and no page tables of a kernel are known"),
        };
    }
    Ok(map)
}

fn with_frames(
    space: &KernelSpace<'_>,
    kernel: &Kernel,
    layout: Layout,
    table: FrameTable,
    base: Option<Base<'_>>,
) -> Result<ColorMap, ColorError> {
    let physical = space.physical;
    let mut map = ColorMap::unknown(physical.pages(), "");
    let earlier = base.map(|base| Earlier::new(base.map, base.changed));
    let mut files = layout.types.as_ref().map(|types| Files::new(space, types, earlier));
    let pass = Pass::new(space, table, &layout, files.as_mut(), &mut map)?;
    let (findings, next, first) = pass.run()?;
    map.method = if files.is_some() { Method::Full } else { Method::FrameTable };
    map.kernel = Some(kernel_facts(space, kernel));
    lru::place(&mut map, &next, &first);
    drop((next, first));
    let mut doubts = Vec::new();
    if findings.bad_blocks > 0 {
        doubts.push(format!("{} free blocks make no sense", findings.bad_blocks));
    }
    match &mut files {
        Some(files) => {
            let (agreeing, all) = files.agreeing();
            let mismatches = all - agreeing;
            if mismatches > MISMATCHES.max(all / FILES_PER_MISMATCH) {
                doubts.push(format!("{mismatches} of {all} files have other pages than the kernel says"));
            }
            map.files = std::mem::take(&mut files.files);
            map.superblocks = std::mem::take(&mut files.superblocks);
        }
        None => doubts.push("the kernel has no type information (BTF) to check it by".into()),
    }
    map.caches = findings.caches;
    drop(files);
    sort_files(&mut map);
    let kernel_conflicts = color_kernel(space, kernel, table, &mut map)?;
    let conflicts = kernel_conflicts + processes(space, &layout, table, &findings.candidates, base, &mut map)?;
    tables_by_type(&findings.typed, &mut map);
    if !map.trouble.is_empty() {
        doubts.push("a process that was not looked at may use any page".to_owned());
    }
    if conflicts > findings.free / FREE_PER_CONFLICT {
        doubts.push(format!("{conflicts} free pages are in use"));
    }
    if doubts.is_empty() {
        map.poisons_free = match base {
            // A kernel is told when it boots.
            Some(base) if base.map.trouble.is_empty() => base.map.poisons_free,
            _ => has_pattern(physical, &map)?,
        };
    } else {
        map.call_nothing_free();
        let why = format!("no page is called free: {}", doubts.join("; "));
        map.trouble = if map.trouble.is_empty() { why } else { format!("{}; {why}", map.trouble) };
    }
    map.knowledge = Some(Knowledge { notes_page: kernel.notes_page, notes: kernel.notes.sum(), layout });
    Ok(map)
}

/// Numbers files by their file system and path: so neighbours in a directory are neighbours in number, two maps of a guest
/// look alike, and a map packs well.
fn sort_files(map: &mut ColorMap) {
    let key = |file: &FileFacts| (file.superblock, file.path.clone(), file.inode, file.mapping);
    let mut order: Vec<u32> = (0..).take(map.files.len()).collect();
    order.sort_by_cached_key(|&old| key(&map.files[old as usize]));
    let mut numbers = vec![0; order.len()];
    for (new, &old) in (0..).zip(&order) {
        numbers[old as usize] = new;
    }
    map.files = order.iter().map(|&old| std::mem::take(&mut map.files[old as usize])).collect();
    for place in &mut map.places {
        if let Some(Place::File(FileId(old), offset)) = place.get() {
            *place = RawPlace::new(Place::File(FileId(numbers[old as usize]), offset));
        }
    }
}

fn kernel_facts(space: &KernelSpace<'_>, kernel: &Kernel) -> KernelFacts {
    let anchor = kernel.image();
    let end = space.image().map(|(va, len)| va.saturating_add(len)).max().unwrap_or(anchor);
    KernelFacts {
        release: kernel.notes.text("OSRELEASE").unwrap_or("").chars().take(64).collect(),
        build: kernel.notes.text("BUILD-ID").unwrap_or("").chars().take(64).collect(),
        levels: kernel.levels,
        image: kernel.text_gpa - (kernel.text - anchor),
        image_pages: u32::try_from(end.saturating_sub(anchor) / PAGE_SIZE as u64).unwrap_or(u32::MAX),
    }
}

/// Walks the page tables of all processes; returns how many pages were free and in use at once.
fn processes(
    space: &KernelSpace<'_>,
    layout: &Layout,
    table: FrameTable,
    candidates: &[u32],
    base: Option<Base<'_>>,
    map: &mut ColorMap,
) -> Result<u64, ColorError> {
    let physical = space.physical;
    // A page that was no root, and of which neither the bytes nor the use have changed, is none. The bytes alone would not do: a root
    // that is given back and taken anew may look the same.
    let was_none = |page: PageIndex| {
        base.is_some_and(|base| {
            !base.changed.contains(page)
                && table.page_of_frame(space, page).is_some_and(|frames| !base.changed.contains(frames))
                && !matches!(base.map.place(page), Some(Place::PageTable(4 | 5)))
        })
    };
    let candidates = candidates.iter().map(|&page| PageIndex(u64::from(page)));
    let roots = find_roots(physical, space.root, candidates.filter(|&page| !was_none(page)))?;
    let mut walker = Walker::new(physical, map);
    for root in roots.into_iter().take(MAX_PROCESSES) {
        let facts = match &layout.types {
            Some(types) => identify(space, table, types, root)?,
            None => Some(crate::ProcessFacts { root: physical.gpa(root), ..Default::default() }),
        };
        if let Some(facts) = facts {
            walker.process(facts, space.levels)?;
        }
    }
    let (conflicts, incomplete) = (walker.conflicts, walker.incomplete);
    if incomplete {
        map.trouble = "processes map so much that some of it was left out".into();
    }
    Ok(conflicts)
}

/// Colors page tables that are in no tree: the kernel lays one by for each large page of a process. They have the type of those
/// that are in one.
fn tables_by_type(typed: &[(u32, u32)], map: &mut ColorMap) {
    let in_tree = |page: u32| matches!(map.places[page as usize].get(), Some(Place::PageTable(_)));
    let kinds = typed.iter().filter(|&&(page, _)| in_tree(page)).map(|&(_, kind)| kind);
    let Some(most) = most_common_type(kinds) else { return };
    for &(page, kind) in typed {
        let color = &mut map.colors[page as usize];
        if kind == most && *color == Color::KernelOther {
            *color = Color::PageTables;
        }
    }
}

/// Whether free pages are filled with the pattern that the kernel looks for when they are used again.
fn has_pattern(physical: &Physical<'_>, map: &ColorMap) -> Result<bool, ColorError> {
    let free = map.colors.iter().filter(|color| **color == Color::Free).count();
    let step = (free / SAMPLES).max(1);
    let pages = (0u64..).zip(&map.colors).filter(|(_, color)| **color == Color::Free).map(|(page, _)| page);
    let (mut looked_at, mut poisoned) = (0, 0);
    let mut bytes = [0; PAGE_SIZE];
    for page in pages.step_by(step) {
        physical.read_page_file(PageIndex(page).offset(), &mut bytes)?;
        looked_at += 1;
        poisoned += usize::from(bytes.iter().all(|&b| b == POISON));
    }
    // Few pages look like that by chance; a kernel that does it does it with nearly all.
    Ok(poisoned > 0 && poisoned * 4 >= looked_at)
}
