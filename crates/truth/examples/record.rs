//! Records a fixture for the tests of `ramet-color`: the pages of a stopped guest's memory that coloring it reads, and what
//! its kernel says of each page. See `crates/color/fixtures/README.md`; the tests' `common/mod.rs` reads it.
//!
//! `record FILE MEGABYTES CR3 CR4 OUTPUT` (CR3 and CR4 hexadecimal)

use anyhow::{Context as _, Result, bail, ensure};
use ramet_color::{Color, ColorMap, CpuRoot, FileMemory, GuestMemory, Place, color};
use ramet_memory::{ByteSize, PAGE_SIZE, PageCount, PageIndex, PageRun, PageSet};
use ramet_truth::observer::{Class, Truth};
use std::{cell::RefCell, io, ops::Range};

/// How a fixture begins, once it is unpacked.
const MAGIC: &[u8; 8] = b"RMTFIX01";
/// The class of a page that was not at rest.
const NOT_AT_REST: u8 = 0x0f;
/// A process maps the page executable.
const EXECUTABLE: u8 = 0x10;
/// Pages of the kernel's image that are left out together, if they can be.
const GROUP: usize = 128;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let arg = |number: usize, what: &'static str| args.get(number).context(what);
    let hex = |text: &String| u64::from_str_radix(text, 16);
    let size = ByteSize::mib(arg(2, "how many megabytes?")?.parse()?);
    let cpu = CpuRoot { cr3: hex(arg(3, "which CR3?")?)?, cr4: hex(arg(4, "which CR4?")?)? };
    let output = arg(5, "where to?")?;
    let memory = FileMemory::open(arg(1, "which file?")?.as_ref(), size.pages())?;

    let truth = Truth::find(&memory)?.context("the guest's kernel's own words are not in memory")?;
    let (map, pages) = needed(&memory, cpu)?;
    let comparison = truth.compare(&map, &memory);
    ensure!(
        comparison.wrongly_free.is_empty() && comparison.wrong.is_empty(),
        "the map is wrong: record another moment"
    );

    let bytes = encode(&memory, cpu, &truth, &pages)?;
    std::fs::write(output, &bytes)?;
    print!("{}", comparison.text());
    println!("{} of {} pages, {} bytes", pages.count().0, map.pages().0, bytes.len());
    Ok(())
}

/// The map of a guest, and pages of its memory that give the same map with nothing but zeros in all others.
fn needed(memory: &FileMemory, cpu: CpuRoot) -> Result<(ColorMap, PageSet)> {
    let noting = Noting { memory, read: RefCell::new(PageSet::new(memory.pages())) };
    let map = color(&noting, &[cpu], None)?;
    let mut pages = noting.read.into_inner();
    // Free pages are looked at for a pattern only, and the kernel's code is passed by on the way to its notes and types.
    for page in (0..map.pages().0).map(PageIndex) {
        if matches!(map.color(page), Color::Free | Color::KernelCode) {
            pages.remove(page);
        }
    }
    let same = |pages: &PageSet| -> Result<bool> {
        Ok(color(&Part { memory, pages }, &[cpu], None).map(|again| again == map)?)
    };
    ensure!(same(&pages)?, "free pages or the kernel's code matter for the map");
    // So is most of what it holds by the page, but for its types: these stay whole, whichever of them are asked for.
    let types = types(memory, &map)?;
    let passed: Vec<PageIndex> = pages.iter().filter(|&page| passed_by(&map, page, &types)).collect();
    for group in passed.chunks(GROUP) {
        leave_out(group, &mut pages, &same)?;
    }
    Ok((map, pages))
}

fn passed_by(map: &ColorMap, page: PageIndex, types: &Range<u32>) -> bool {
    match (map.place(page), map.color(page)) {
        (Some(Place::KernelImage(offset)), _) => !types.contains(&offset),
        (Some(Place::FrameTable(_)), _) | (_, Color::Slab | Color::PageTables) => false,
        _ => true,
    }
}

/// The pages of the kernel's image that hold its type information (BTF).
fn types(memory: &FileMemory, map: &ColorMap) -> Result<Range<u32>> {
    let mut bytes = [0; PAGE_SIZE];
    for page in (0..map.pages().0).map(PageIndex) {
        let (Some(Place::KernelImage(first)), Color::KernelOther) = (map.place(page), map.color(page)) else {
            continue;
        };
        memory.read(page.offset(), &mut bytes)?;
        let words: Vec<u32> = bytes.as_chunks().0.iter().map(|word| u32::from_le_bytes(*word)).collect();
        let starts = |words: &[u32]| words[..2] == [0x0001_eb9f, 24] && words[2] == 0 && words[3] == words[4];
        if let Some(at) = words.windows(6).position(starts) {
            let end = 4 * at + 24 + words[at + 4] as usize + words[at + 5] as usize;
            return Ok(first..first + u32::try_from(end.div_ceil(PAGE_SIZE))?);
        }
    }
    bail!("the kernel's type information is not in memory")
}

/// Leaves out what can be left out of some pages.
fn leave_out(group: &[PageIndex], pages: &mut PageSet, same: &impl Fn(&PageSet) -> Result<bool>) -> Result<()> {
    for &page in group {
        pages.remove(page);
    }
    if same(pages)? {
        return Ok(());
    }
    for &page in group {
        pages.insert(page);
    }
    if group.len() > 1 {
        let (first, second) = group.split_at(group.len() / 2);
        leave_out(first, pages, same)?;
        leave_out(second, pages, same)?;
    }
    Ok(())
}

fn encode(memory: &FileMemory, cpu: CpuRoot, truth: &Truth, pages: &PageSet) -> Result<Vec<u8>> {
    let layout = memory.layout();
    let executable: std::collections::HashSet<u64> =
        truth.mappings.iter().filter(|mapped| mapped.flags & 1 != 0).map(|mapped| mapped.frame).collect();
    let mut bytes = MAGIC.to_vec();
    for number in [memory.pages().0, cpu.cr3, cpu.cr4] {
        bytes.extend(number.to_le_bytes());
    }
    for page in (0..memory.pages().0).map(PageIndex) {
        let frame = layout.gpa(page).context("a page outside memory")?.0 / PAGE_SIZE as u64;
        let class = truth.class(frame).map_or(NOT_AT_REST, class_number);
        let user = matches!(truth.class(frame), Some(Class::Anonymous | Class::File | Class::Shared));
        bytes.push(class | if user && executable.contains(&frame) { EXECUTABLE } else { 0 });
    }
    let mut processes: Vec<_> = truth.processes.iter().collect();
    processes.sort_unstable();
    bytes.extend(u32::try_from(processes.len())?.to_le_bytes());
    for (pid, name) in processes {
        bytes.extend(pid.to_le_bytes());
        bytes.push(u8::try_from(name.len())?);
        bytes.extend(name.as_bytes());
    }
    bytes.extend(u32::try_from(pages.count().0)?.to_le_bytes());
    for page in pages.iter() {
        bytes.extend(u32::try_from(page.0)?.to_le_bytes());
    }
    for page in pages.iter() {
        let mut content = [0; PAGE_SIZE];
        memory.read(page.offset(), &mut content)?;
        bytes.extend(content);
    }
    Ok(bytes)
}

const fn class_number(class: Class) -> u8 {
    match class {
        Class::Buddy => 0,
        Class::Slab => 1,
        Class::Table => 2,
        Class::Anonymous => 3,
        Class::File => 4,
        Class::Shared => 5,
        Class::KernelCode => 6,
        Class::Other => 7,
    }
}

/// Notes which pages are read.
struct Noting<'a> {
    memory: &'a FileMemory,
    read: RefCell<PageSet>,
}

impl GuestMemory for Noting<'_> {
    fn pages(&self) -> PageCount {
        self.memory.pages()
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let first = offset / PAGE_SIZE as u64;
        let end = (offset + bytes.len() as u64).div_ceil(PAGE_SIZE as u64);
        self.read.borrow_mut().insert_run(PageRun { start: PageIndex(first), len: end - first });
        self.memory.read(offset, bytes)
    }
}

/// Zeros in all but some pages.
struct Part<'a> {
    memory: &'a FileMemory,
    pages: &'a PageSet,
}

impl GuestMemory for Part<'_> {
    fn pages(&self) -> PageCount {
        self.memory.pages()
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let mut at = 0;
        while at < bytes.len() {
            let from = offset + at as u64;
            let within = (from % PAGE_SIZE as u64) as usize;
            let end = bytes.len().min(at + PAGE_SIZE - within);
            let part = &mut bytes[at..end];
            if self.pages.contains(PageIndex::of_offset(from)) {
                self.memory.read(from, part)?;
            } else {
                part.fill(0);
            }
            at = end;
        }
        Ok(())
    }
}
