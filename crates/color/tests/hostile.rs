//! Whatever is in a guest's memory: no panic, no more reading than memory is large, and no page called free that the guest's
//! kernel does not hold free.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{Fixture, Frames, Memory, Page, RECORDED, frame, notes_page};
use proptest::{
    prelude::*,
    test_runner::{Config, RngSeed},
};
use ramet_color::{Color, ColorError, ColorMap, CpuRoot, FileMemory, GuestMemory, Method, Place, color};
use ramet_memory::{PAGE_SIZE, PageCount, PageIndex};
use std::{cell::Cell, io, sync::LazyLock};

/// How many times all of memory may be read at most.
const READS: u64 = 40;

fn config(cases: u32) -> Config {
    Config { cases, rng_seed: RngSeed::Fixed(1), failure_persistence: None, ..Config::default() }
}

/// What is true of every map.
fn assert_sound(map: &ColorMap) {
    assert!(map.method == Method::Full || !map.colors().contains(&Color::Free), "{}", map.trouble);
    assert!(map.method == Method::Full || !map.trouble.is_empty() || map.method == Method::PageTables);
    let again = ColorMap::decode(&map.encode(), map.pages()).unwrap();
    assert_eq!(again.colors(), map.colors());
}

/// Colors an altered guest.
fn colored(memory: &Memory<'_>, cpus: &[CpuRoot]) -> ColorMap {
    let map = color(memory, cpus, None).unwrap();
    assert_sound(&map);
    assert!(memory.bytes_read.get() <= READS * memory.pages().size().bytes(), "{} bytes read", memory.bytes_read.get());
    map
}

/// What there is to alter in a recorded guest.
struct Targets {
    fixture: &'static Fixture,
    map: ColorMap,
    frames: Frames,
    notes: u64,
    /// Page tables, and by level.
    tables: Vec<(u64, u8)>,
    /// Pages that free blocks begin with.
    blocks: Vec<u64>,
    /// The frame table, the kernel's type information, its objects, all that was recorded.
    frame_table: Vec<u64>,
    types: Vec<u64>,
    objects: Vec<u64>,
    all: Vec<u64>,
}

static TARGETS: LazyLock<Vec<Targets>> = LazyLock::new(|| RECORDED.iter().map(|r| Targets::new(&r.fixture)).collect());

impl Targets {
    fn new(fixture: &'static Fixture) -> Self {
        let map = color(&fixture.memory(), &[fixture.cpu], None).unwrap();
        assert_eq!(map.method, Method::Full);
        let of = |wanted: &dyn Fn(u64, &Page) -> bool| -> Vec<u64> {
            fixture.content.iter().filter(|(page, content)| wanted(**page, content)).map(|(page, _)| *page).collect()
        };
        let place = |page: u64| map.place(PageIndex(page));
        let image = |page: u64| match place(page) {
            Some(Place::KernelImage(offset)) => Some(offset),
            _ => None,
        };
        let header = [0x9f, 0xeb, 1, 0, 24, 0, 0, 0];
        let begins = of(&|page, content| image(page).is_some() && content.windows(8).any(|bytes| bytes == header));
        let first = image(begins[0]).unwrap();
        let tables = (0..fixture.pages.0).filter_map(|page| match place(page) {
            Some(Place::PageTable(level)) if fixture.content.contains_key(&page) => Some((page, level)),
            _ => None,
        });
        let frames = Frames::new(fixture, &map);
        let memory = fixture.memory();
        Self {
            fixture,
            blocks: (0..fixture.pages.0).filter(|&page| frames.block(&memory, page).is_some()).collect(),
            frames,
            notes: notes_page(fixture),
            tables: tables.collect(),
            frame_table: of(&|page, _| matches!(place(page), Some(Place::FrameTable(_)))),
            types: of(&|page, _| image(page).is_some_and(|offset| (first..first + 600).contains(&offset))),
            objects: of(&|page, _| map.color(PageIndex(page)) == Color::Slab),
            all: fixture.content.keys().copied().collect(),
            map,
        }
    }

    /// One more alteration.
    fn alter(&self, memory: &mut Memory<'_>, Alteration { kind, which, at, how, value }: Alteration) {
        let pick = |pages: &[u64]| pages[which % pages.len()];
        let word = u64::from(at % 512) * 8;
        match kind {
            Kind::Notes => {
                let text = memory.page(self.notes);
                let len = text.iter().position(|&byte| byte == 0).unwrap();
                let byte = if how < 4 { b"0179af\n="[value as usize % 8] } else { value as u8 };
                memory.write(self.notes * 4096 + (which % len) as u64, &[byte]);
            }
            Kind::Tables => {
                let (page, _) = self.tables[which % self.tables.len()];
                let (other, _) = self.tables[value as usize % self.tables.len()];
                let gpa = |page: u64| page * 4096;
                let entry = match how {
                    0 => gpa(page) | 0x67,
                    1 => gpa(other) | 0x67,
                    2 => gpa(value % self.fixture.pages.0) | 0x67,
                    3 => gpa(value % self.fixture.pages.0) | 0xe7,
                    4 => (self.fixture.cpu.cr3 & !0xfff) | 0x67,
                    5 => 0,
                    _ => value,
                };
                // Of a table's entries mostly those matter that are used: the first ones, the last ones.
                let number = [at % 512, at % 4, 511 - at % 4, 256 + at % 256][usize::from(at >> 9) % 4];
                memory.write(gpa(page) + u64::from(number) * 8, &entry.to_le_bytes());
            }
            Kind::Frames => {
                let at = pick(&self.frame_table) * 4096 + word;
                self.change(memory, at, how, value);
            }
            Kind::Blocks => {
                let frame = self.frames.at(pick(&self.blocks)).unwrap();
                match at % 4 {
                    0 => memory.write(frame + frame::PRIVATE, &(value % 16).to_le_bytes()),
                    1 => memory.write(frame + frame::REFERENCES, &(value as u32 % 3).to_le_bytes()),
                    2 => memory.write(frame + frame::KIND, &(value as u32 | 0xff00_0000).to_le_bytes()),
                    _ => self.change(memory, frame + u64::from(at / 4 % 8) * 8, how, value),
                }
            }
            Kind::Types => {
                let at = pick(&self.types) * 4096 + word;
                self.change(memory, at, how, value);
            }
            Kind::Objects => {
                let at = pick(&self.objects) * 4096 + word;
                self.change(memory, at, how, value);
            }
            Kind::Any => {
                let at = pick(&self.all) * 4096 + word;
                self.change(memory, at, how, value);
            }
        }
    }

    /// Changes eight bytes: a bit, to what is elsewhere, to anything.
    fn change(&self, memory: &mut Memory<'_>, at: u64, how: u8, value: u64) {
        let read = |memory: &Memory<'_>, at: u64| {
            let page = memory.page(at / 4096);
            u64::from_le_bytes(page[(at % 4096) as usize..][..8].try_into().unwrap())
        };
        let old = read(memory, at);
        let elsewhere = self.all[value as usize % self.all.len()] * 4096 + (value >> 32) % 512 * 8;
        let new = match how {
            0 | 1 => old ^ 1 << (value % 64),
            2 => read(memory, elsewhere),
            3 => read(memory, at & !0xfff | ((value >> 32) % 512 * 8)),
            4 => old.wrapping_add(value % 8192).wrapping_sub(4096),
            5 => [0, u64::MAX, 1, 1 << 63][value as usize % 4],
            _ => value,
        };
        memory.write(at, &new.to_le_bytes());
    }
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Notes,
    Tables,
    Frames,
    Blocks,
    Types,
    Objects,
    Any,
}

#[derive(Debug, Clone, Copy)]
struct Alteration {
    kind: Kind,
    which: usize,
    at: u16,
    how: u8,
    value: u64,
}

fn alterations(kinds: &'static [Kind]) -> impl Strategy<Value = Vec<Alteration>> {
    let one = (prop::sample::select(kinds), any::<usize>(), any::<u16>(), 0..8u8, any::<u64>());
    let one = one.prop_map(|(kind, which, at, how, value)| Alteration { kind, which, at, how, value });
    prop_oneof![prop::collection::vec(one.clone(), 1..8), prop::collection::vec(one, 50..400)]
}

proptest! {
    #![proptest_config(config(48))]

    /// The kernel's notes and its page tables, and all else.
    #[test]
    fn an_altered_guest_is_colored(
        guest in 0..RECORDED.len(),
        with_cpu: bool,
        changes in alterations(&[Kind::Notes, Kind::Tables, Kind::Frames, Kind::Types, Kind::Objects, Kind::Any]),
    ) {
        let targets = &TARGETS[guest];
        let mut memory = targets.fixture.memory();
        changes.into_iter().for_each(|change| targets.alter(&mut memory, change));
        let cpus = [targets.fixture.cpu];
        colored(&memory, &cpus[..usize::from(with_cpu)]);
    }

    /// The notes alone, and the page tables alone.
    #[test]
    fn a_kernel_that_says_otherwise_is_colored(
        guest in 0..RECORDED.len(),
        notes in alterations(&[Kind::Notes]),
        tables in alterations(&[Kind::Tables]),
        both in 0..3,
    ) {
        let targets = &TARGETS[guest];
        let mut memory = targets.fixture.memory();
        let notes = notes.into_iter().take(if both == 1 { 0 } else { 7 });
        let tables = tables.into_iter().filter(|_| both != 0);
        notes.chain(tables).for_each(|change| targets.alter(&mut memory, change));
        colored(&memory, &[targets.fixture.cpu]);
    }

    /// With the notes and page tables as they were, the frame table is where it was: a free page is in a block that is sound,
    /// by another reader's word.
    #[test]
    fn what_is_called_free_is_in_a_sound_block(
        guest in 0..RECORDED.len(),
        changes in alterations(&[Kind::Blocks, Kind::Frames, Kind::Types, Kind::Objects]),
    ) {
        let targets = &TARGETS[guest];
        let mut memory = targets.fixture.memory();
        changes.into_iter().for_each(|change| targets.alter(&mut memory, change));
        let map = colored(&memory, &[targets.fixture.cpu]);
        for page in 0..targets.fixture.pages.0 {
            if map.color(PageIndex(page)) == Color::Free {
                prop_assert!(targets.frames.is_free(&memory, page), "page {page}");
            }
        }
    }

    #[test]
    fn memory_of_random_pages_is_colored(seed: u64, cr3: u64, five_levels: bool, pages in 1..1024u64) {
        let memory = Random { seed, pages };
        for cpus in [&[][..], &[CpuRoot { cr3: cr3 % (pages * 4096), cr4: u64::from(five_levels) << 12 }]] {
            let map = color(&memory, cpus, None).unwrap();
            assert_sound(&map);
            prop_assert!(!map.colors().contains(&Color::Free));
            prop_assert_eq!(map.pages().0, pages);
        }
    }

    /// A read that fails ends the coloring, and the error says where.
    #[test]
    fn a_read_that_fails_is_an_error(guest in 0..RECORDED.len(), which: usize) {
        let targets = &TARGETS[guest];
        let memory = targets.fixture.memory();
        let page = targets.all[which % targets.all.len()];
        let failing = Failing { memory: &memory, page, failed: Cell::new(None) };
        match color(&failing, &[targets.fixture.cpu], None) {
            Err(ColorError::Read { offset, source }) => {
                prop_assert_eq!(Some(offset), failing.failed.get());
                prop_assert_eq!(source.kind(), io::ErrorKind::UnexpectedEof);
            }
            Ok(map) => prop_assert!(failing.failed.get().is_none() && map == targets.map),
            Err(other) => prop_assert!(false, "{other}"),
        }
    }
}

proptest! {
    #![proptest_config(config(512))]

    /// What the fuzzer looks for.
    #[test]
    fn any_bytes_over_a_small_guest_are_colored(data in prop::collection::vec(any::<u8>(), 0..400)) {
        ramet_color::fuzz_color(&data);
    }
}

/// Numbers that look random, many of them like entries of page tables.
struct Random {
    seed: u64,
    pages: u64,
}

impl GuestMemory for Random {
    fn pages(&self) -> PageCount {
        PageCount(self.pages)
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        assert!(offset + bytes.len() as u64 <= self.pages * 4096, "a read beyond the end");
        for (at, byte) in (offset..).zip(bytes) {
            let mixed = (self.seed ^ (at / 8)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
            let mixed = (mixed ^ mixed >> 29).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let entry = mixed >> 32 & 1 == 0;
            let number = if entry { (mixed % self.pages * 4096) | 0x67 } else { mixed };
            *byte = (number >> (8 * (at % 8))) as u8;
        }
        Ok(())
    }
}

/// Memory of which one page can't be read.
struct Failing<'a> {
    memory: &'a Memory<'a>,
    page: u64,
    failed: Cell<Option<u64>>,
}

impl GuestMemory for Failing<'_> {
    fn pages(&self) -> PageCount {
        self.memory.pages()
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        if (offset / 4096..(offset + bytes.len() as u64).div_ceil(4096)).contains(&self.page) {
            self.failed.set(Some(offset));
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.memory.read(offset, bytes)
    }
}

#[test]
fn tables_that_lead_to_themselves_end() {
    for targets in TARGETS.iter() {
        for wanted in 1..=5 {
            // All tables of a level, whole: and the kernel's own are among them.
            let mut memory = targets.fixture.memory();
            for &(page, _) in targets.tables.iter().filter(|(_, level)| *level == wanted) {
                let entry = ((page * 4096) | 0x67).to_le_bytes();
                memory.write(page * 4096, &entry.repeat(512));
            }
            colored(&memory, &[targets.fixture.cpu]);
            colored(&memory, &[]);
            // The lower half of the roots only: the kernel stays.
            let mut memory = targets.fixture.memory();
            for &(page, _) in targets.tables.iter().filter(|(_, level)| *level == targets.fixture.cpu.levels()) {
                memory.write(page * 4096, &((page * 4096) | 0x67).to_le_bytes().repeat(256));
            }
            assert_eq!(colored(&memory, &[targets.fixture.cpu]).method, Method::Full);
        }
    }
}

/// Every page a page table that maps 1 GiB, for the kernel: so many pages can't be gone through.
#[test]
fn tables_that_map_all_too_much_take_no_long_time() {
    struct Tables;
    const PAGES: u64 = 1 << 15;
    impl GuestMemory for Tables {
        fn pages(&self) -> PageCount {
            PageCount(PAGES)
        }

        fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
            for (at, byte) in (offset..).zip(bytes) {
                let (page, entry) = (at / 4096, at % 4096 / 8);
                let number = match page {
                    // The root's upper half leads to 64 tables, and these to all others.
                    0 if entry >= 256 => ((1 + entry % 64) * 4096) | 0x63,
                    0 => 0,
                    1..=64 => (((page * 512 + entry) % PAGES) * 4096) | 0x63,
                    _ => 0xe3,
                };
                *byte = (number >> (8 * (at % 8))) as u8;
            }
            Ok(())
        }
    }
    let map = color(&Tables, &[CpuRoot { cr3: 0, cr4: 0 }], None).unwrap();
    assert_sound(&map);
    assert_eq!(map.method, Method::PageTables);
}

#[test]
fn a_frame_table_outside_memory_frees_nothing() {
    for targets in TARGETS.iter() {
        // What maps the frame table, by small pages or large ones.
        let mut memory = targets.fixture.memory();
        let mut changed = 0;
        for &(page, level) in &targets.tables {
            let content = memory.page(page);
            for (number, raw) in (0u64..).zip(content.as_chunks::<8>().0) {
                let entry = u64::from_le_bytes(*raw);
                let mapped = PageIndex((entry & 0x000f_ffff_ffff_f000) / 4096);
                let user_or_direct = level > 2 || (level == 2) != (entry & 0x80 != 0);
                let in_table = matches!(targets.map.place(mapped), Some(Place::FrameTable(_)));
                if entry & 1 != 0 && !user_or_direct && in_table && !is_direct_map(targets, page) {
                    let outside = (entry & !0x000f_ffff_ffff_f000) | 1 << 40;
                    memory.write(page * 4096 + number * 8, &outside.to_le_bytes());
                    changed += 1;
                }
            }
        }
        assert!(changed > 0);
        let map = colored(&memory, &[targets.fixture.cpu]);
        assert!(!map.colors().contains(&Color::Free), "{}", map.trouble);
    }
}

/// Whether a table maps memory in its order from the start: then it is of the mapping of all memory.
fn is_direct_map(targets: &Targets, page: u64) -> bool {
    let content = targets.fixture.memory().page(page);
    let mapped = content.as_chunks::<8>().0.iter().map(|raw| u64::from_le_bytes(*raw) & 0x000f_ffff_ffff_e000);
    let mapped: Vec<u64> = mapped.collect();
    let frees = mapped.iter().filter(|gpa| targets.map.color(PageIndex(**gpa / 4096)) == Color::Free).count();
    frees > 8
}

#[test]
fn a_lie_about_levels_frees_nothing() {
    for targets in TARGETS.iter() {
        let text = targets.fixture.memory().page(targets.notes);
        let key = b"NUMBER(pgtable_l5_enabled)=";
        let at = text.windows(key.len()).position(|bytes| bytes == key).unwrap() + key.len();
        let mut memory = targets.fixture.memory();
        memory.write(targets.notes * 4096 + at as u64, &[text[at] ^ 1]);
        for cpus in [&[targets.fixture.cpu][..], &[]] {
            let map = colored(&memory, cpus);
            assert!(map.method != Method::Full && !map.colors().contains(&Color::Free));
            assert!(map.trouble.contains("do not fit"), "{}", map.trouble);
        }
    }
}

#[test]
fn a_kernel_without_type_information_frees_nothing() {
    for targets in TARGETS.iter() {
        let mut memory = targets.fixture.memory();
        targets.types.iter().for_each(|page| memory.write(page * 4096, &[0; PAGE_SIZE]));
        let map = colored(&memory, &[targets.fixture.cpu]);
        assert_eq!(map.method, Method::FrameTable);
        assert!(!map.colors().contains(&Color::Free) && map.files.is_empty());
        assert!(map.trouble.contains("no type information"), "{}", map.trouble);
        // Slab and kernel code are told without it.
        for color in [Color::Slab, Color::KernelCode] {
            let count = |map: &ColorMap| map.colors().iter().filter(|c| **c == color).count();
            assert_eq!(count(&map), count(&targets.map));
        }
    }
}

#[test]
fn a_file_that_lost_its_pages_makes_free_pages_doubtful() {
    for targets in TARGETS.iter() {
        // The frames of files' pages say they are the kernel's: so do those of a guest whose frame table is misread.
        let mut memory = targets.fixture.memory();
        for page in
            (0..targets.fixture.pages.0).filter(|&page| targets.map.color(PageIndex(page)).is_cache()).step_by(2)
        {
            memory.write(targets.frames.at(page).unwrap() + 24, &[0; 8]);
        }
        let map = colored(&memory, &[targets.fixture.cpu]);
        assert!(!map.colors().contains(&Color::Free));
        assert!(map.trouble.contains("files have other pages than the kernel says"), "{}", map.trouble);
    }
}

#[test]
fn an_image_that_is_cut_short_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("ram");
    std::fs::write(&path, [0; 3 * PAGE_SIZE + 5]).unwrap();
    match FileMemory::open(&path, PageCount(4)) {
        Err(ColorError::Short { have, want, .. }) => assert_eq!((have, want), (12_293, 16_384)),
        other => panic!("{other:?}"),
    }
    let error = FileMemory::open(&path, PageCount(4)).unwrap_err().to_string();
    assert!(error.contains("12293") && error.contains("16384") && error.contains("ram"), "{error}");
    // One that was cut later fails when it is read.
    let memory = FileMemory::open(&path, PageCount(3)).unwrap();
    assert_eq!(color(&memory, &[], None).unwrap().method, Method::None);
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(PAGE_SIZE as u64).unwrap();
    assert!(matches!(color(&memory, &[], None), Err(ColorError::Read { .. })));
    assert!(matches!(FileMemory::open(&directory.path().join("none"), PageCount(1)), Err(ColorError::Open { .. })));
}
