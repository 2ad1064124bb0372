//! Recorded guests: what `record` of `ramet-truth` wrote, as memory that can be altered.
#![allow(dead_code, reason = "every test program uses a part of it")]

use ramet_color::{Color, CpuRoot, GuestMemory};
use ramet_memory::{PAGE_SIZE, PageCount, PageIndex};
use std::{
    cell::Cell,
    collections::{BTreeMap, HashMap},
    fs::File,
    io::{self, BufReader, Read as _},
    sync::LazyLock,
};

/// A page.
pub(crate) type Page = [u8; PAGE_SIZE];

/// A kernel that was recorded.
#[derive(Debug)]
pub(crate) struct Recorded {
    pub(crate) file: &'static str,
    pub(crate) release: &'static str,
    pub(crate) build: &'static str,
    pub(crate) fixture: LazyLock<Fixture>,
}

/// All of them. A newly recorded one has a build of its own.
pub(crate) static RECORDED: [Recorded; 3] = [
    Recorded {
        file: "linux-5.10.xz",
        release: "5.10.0-32-cloud-amd64",
        build: "e0c94673e97d58a386e99a20572aa7d597d5aa5c",
        fixture: LazyLock::new(|| Fixture::read("linux-5.10.xz")),
    },
    Recorded {
        file: "linux-7.2.xz",
        release: "7.2.13+deb14-cloud-amd64",
        build: "8a55a05d35a15fe072cfd7e22593672daae112af",
        fixture: LazyLock::new(|| Fixture::read("linux-7.2.xz")),
    },
    Recorded {
        file: "linux-7.3.xz",
        release: "7.3.4+deb13-cloud-amd64",
        build: "1fe9968467f2755292a45806719b9bba136b0cc8",
        fixture: LazyLock::new(|| Fixture::read("linux-7.3.xz")),
    },
];

/// A guest's memory, as far as coloring reads it, and what its kernel said of its pages.
#[derive(Debug)]
pub(crate) struct Fixture {
    pub(crate) pages: PageCount,
    pub(crate) cpu: CpuRoot,
    /// For each page its class, or none when it was not at rest; and whether a process maps it executable.
    pub(crate) truth: Vec<(Option<Class>, bool)>,
    pub(crate) processes: BTreeMap<u32, String>,
    pub(crate) content: BTreeMap<u64, Box<Page>>,
}

/// What a page is, as the guest's kernel has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Class {
    Buddy,
    Slab,
    Table,
    Anonymous,
    File,
    Shared,
    KernelCode,
    Other,
}

impl Class {
    const ALL: [Self; 8] = [
        Self::Buddy,
        Self::Slab,
        Self::Table,
        Self::Anonymous,
        Self::File,
        Self::Shared,
        Self::KernelCode,
        Self::Other,
    ];

    /// Whether a color is right for it.
    pub(crate) fn fits(self, color: Color) -> bool {
        match self {
            Self::Buddy => color == Color::Free,
            Self::Slab => color == Color::Slab,
            Self::Table => color == Color::PageTables,
            Self::Anonymous => matches!(color, Color::UserData | Color::UserCode),
            Self::File | Self::Shared => color.is_cache(),
            Self::KernelCode => color == Color::KernelCode,
            Self::Other => color.is_kernel() || color == Color::Unknown,
        }
    }
}

impl Fixture {
    fn read(file: &str) -> Self {
        let path = format!("{}/fixtures/{file}", env!("CARGO_MANIFEST_DIR"));
        let packed = BufReader::new(File::open(&path).expect("fixtures lie beside the tests"));
        let mut bytes = Vec::new();
        lzma_rust2::XzReader::new(packed, false).read_to_end(&mut bytes).expect("a fixture is packed with xz");
        Self::parse(&bytes)
    }

    fn parse(mut bytes: &[u8]) -> Self {
        let mut take = |len: usize| {
            let (now, rest) = bytes.split_at(len);
            bytes = rest;
            now
        };
        let u64 = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("8 bytes"));
        let u32 = |bytes: &[u8]| u32::from_le_bytes(bytes.try_into().expect("4 bytes"));
        assert_eq!(take(8), b"RMTFIX01", "another form of fixtures");
        let pages = PageCount(u64(take(8)));
        let cpu = CpuRoot { cr3: u64(take(8)), cr4: u64(take(8)) };
        let truth = take(pages.0 as usize)
            .iter()
            .map(|byte| (Class::ALL.get(usize::from(byte & 0xf)).copied(), byte & 0x10 != 0))
            .collect();
        let mut processes = BTreeMap::new();
        for _ in 0..u32(take(4)) {
            let pid = u32(take(4));
            let len = usize::from(take(1)[0]);
            processes.insert(pid, String::from_utf8_lossy(take(len)).into_owned());
        }
        let count = u32(take(4)) as usize;
        let numbers: Vec<u64> = take(4 * count).chunks_exact(4).map(|number| u32(number).into()).collect();
        let content = numbers.into_iter().map(|page| (page, Box::new(take(PAGE_SIZE).try_into().expect("a page"))));
        Self { pages, cpu, truth, processes, content: content.collect() }
    }

    /// Its memory, unaltered.
    pub(crate) fn memory(&self) -> Memory<'_> {
        Memory { fixture: self, altered: HashMap::new(), fill: HashMap::new(), bytes_read: Cell::new(0) }
    }

    /// What the kernel said of a page.
    pub(crate) fn class(&self, page: u64) -> Option<Class> {
        self.truth[page as usize].0
    }
}

/// A recorded guest's memory with alterations: zeros wherever nothing was recorded.
#[derive(Debug, Clone)]
pub(crate) struct Memory<'a> {
    fixture: &'a Fixture,
    altered: HashMap<u64, Box<Page>>,
    fill: HashMap<u64, u8>,
    /// How much was read.
    pub(crate) bytes_read: Cell<u64>,
}

impl Memory<'_> {
    /// A page's content.
    pub(crate) fn page(&self, page: u64) -> Page {
        let mut bytes = [0; PAGE_SIZE];
        self.fill_in(page, 0, &mut bytes);
        bytes
    }

    fn fill_in(&self, page: u64, within: usize, bytes: &mut [u8]) {
        let whole = self.altered.get(&page).or_else(|| self.fixture.content.get(&page));
        match whole {
            Some(whole) => bytes.copy_from_slice(&whole[within..within + bytes.len()]),
            None => bytes.fill(self.fill.get(&page).copied().unwrap_or(0)),
        }
    }

    /// Fills a page of which nothing was recorded.
    pub(crate) fn fill(&mut self, page: u64, byte: u8) {
        self.fill.insert(page, byte);
    }

    /// Overwrites some bytes; they may not go over the end of the page.
    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) {
        let number = offset / PAGE_SIZE as u64;
        let within = (offset % PAGE_SIZE as u64) as usize;
        let mut page = self.page(number);
        page[within..within + bytes.len()].copy_from_slice(bytes);
        self.altered.insert(number, Box::new(page));
    }
}

impl GuestMemory for Memory<'_> {
    fn pages(&self) -> PageCount {
        self.fixture.pages
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        assert!(offset + bytes.len() as u64 <= self.pages().size().bytes(), "a read beyond the end");
        self.bytes_read.set(self.bytes_read.get() + bytes.len() as u64);
        let mut at = 0;
        while at < bytes.len() {
            let from = offset + at as u64;
            let within = (from % PAGE_SIZE as u64) as usize;
            let end = bytes.len().min(at + PAGE_SIZE - within);
            self.fill_in(PageIndex::of_offset(from).0, within, &mut bytes[at..end]);
            at = end;
        }
        Ok(())
    }
}

/// Where fields of `struct page` are: so on all recorded kernels, as their notes say.
pub(crate) mod frame {
    pub(crate) const LEN: u64 = 64;
    pub(crate) const PRIVATE: u64 = 40;
    pub(crate) const KIND: u64 = 48;
    pub(crate) const REFERENCES: u64 = 52;
}

/// A little reader of a recorded kernel's frame table, of its own: where the table is comes from the map of the unaltered
/// guest, the rest from memory.
#[derive(Debug)]
pub(crate) struct Frames {
    /// Pages of memory that hold the table, by page of the table.
    pub(crate) table: HashMap<u64, u64>,
    buddy: u32,
}

impl Frames {
    pub(crate) fn new(fixture: &Fixture, map: &ramet_color::ColorMap) -> Self {
        let own = |page: u64| match map.place(PageIndex(page)) {
            Some(ramet_color::Place::FrameTable(own)) => Some((u64::from(own), page)),
            _ => None,
        };
        let notes = String::from_utf8_lossy(&fixture.memory().page(notes_page(fixture))[..]).into_owned();
        let offset = |name: &str| note(&notes, &format!("OFFSET(page.{name})")).expect("an offset") as u64;
        let offsets = [offset("private"), offset("_mapcount"), offset("_refcount")];
        assert_eq!(offsets, [frame::PRIVATE, frame::KIND, frame::REFERENCES]);
        Self {
            table: (0..fixture.pages.0).filter_map(own).collect(),
            buddy: note(&notes, "NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)").expect("the mark of free pages") as u32,
        }
    }

    /// Where in memory the frame of a page is (guests this small have no hole).
    pub(crate) fn at(&self, page: u64) -> Option<u64> {
        let at = page * frame::LEN;
        Some(self.table.get(&(at / PAGE_SIZE as u64))? * PAGE_SIZE as u64 + at % PAGE_SIZE as u64)
    }

    /// The order of the sound free block that begins at a page, if one does.
    pub(crate) fn block(&self, memory: &Memory<'_>, page: u64) -> Option<u64> {
        let at = self.at(page)?;
        let bytes = memory.page(at / PAGE_SIZE as u64);
        let field = |field: u64| {
            let from = (at % PAGE_SIZE as u64 + field) as usize;
            u64::from_le_bytes(bytes[from..from + 8].try_into().expect("8 bytes"))
        };
        let (kind, references) = (field(frame::KIND) as u32, (field(frame::KIND) >> 32) as u32);
        let marked = if self.buddy & 0x00ff_ffff == 0 { kind >> 24 == self.buddy >> 24 } else { kind == self.buddy };
        let order = field(frame::PRIVATE);
        (marked && references == 0 && order <= 10 && page.is_multiple_of(1 << order)).then_some(order)
    }

    /// Whether a page lies in some sound free block.
    pub(crate) fn is_free(&self, memory: &Memory<'_>, page: u64) -> bool {
        (0..=10).any(|order| {
            let head = page & !((1 << order) - 1);
            self.block(memory, head).is_some_and(|order| head + (1 << order) > page)
        })
    }
}

/// The page with the kernel's notes.
pub(crate) fn notes_page(fixture: &Fixture) -> u64 {
    let mut notes = fixture.content.iter().filter(|(_, page)| page.starts_with(b"OSRELEASE="));
    *notes.next().expect("the kernel's notes").0
}

fn note(notes: &str, key: &str) -> Option<i64> {
    notes.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('=')?.parse().ok())
}
