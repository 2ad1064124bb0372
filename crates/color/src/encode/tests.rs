use super::*;
use crate::map::{FileFacts, KernelFacts, MAX_PROCESSES, Method, ProcessFacts, SuperblockFacts};
use proptest::prelude::*;

const FILES: u32 = 5;
const CACHES: u32 = 3;
const PROCESSES: u16 = 4;

/// A map with tables of the sizes above and nothing known of its pages.
fn tables(pages: u64, texts: &[String]) -> ColorMap {
    let text = |n: usize, max| bytes::clip(&texts[n % texts.len()], max).to_owned();
    ColorMap {
        method: Method::Full,
        kernel: Some(KernelFacts {
            release: text(0, 127),
            build: text(1, 127),
            levels: 4,
            image: 1 << 24,
            image_pages: 9000,
        }),
        poisons_free: true,
        files: (0..FILES)
            .map(|n| FileFacts {
                mapping: 0xffff_8880_0000_1238 ^ u64::from(n) << 13,
                inode: u64::from(n * 77),
                superblock: n % 2,
                swap_backed: n == 3,
                path: text(n as usize, 255),
            })
            .collect(),
        superblocks: (0..2)
            .map(|n| SuperblockFacts { id: text(n, 31), kind: text(n + 1, 31), device: 7 << 20 })
            .collect(),
        processes: (0..PROCESSES)
            .map(|n| ProcessFacts { root: 0x1000 * u64::from(n), pid: n.into(), command: text(n.into(), 15) })
            .collect(),
        caches: (0..CACHES).map(|n| text(n as usize, 63)).collect(),
        ..ColorMap::unknown(PageCount(pages), text(2, 1000))
    }
}

fn any_place() -> impl Strategy<Value = RawPlace> {
    let at = || prop_oneof![0..40_u32, any::<u32>()];
    prop_oneof![
        Just(RawPlace::NONE),
        (0..FILES, at()).prop_map(|(file, at)| RawPlace::new(Place::File(FileId(file), at))),
        (0..CACHES).prop_map(|cache| RawPlace::new(Place::Slab(CacheId(cache)))),
        (1..=5_u8).prop_map(|level| RawPlace::new(Place::PageTable(level))),
        at().prop_map(|at| RawPlace::new(Place::KernelImage(at))),
        at().prop_map(|at| RawPlace::new(Place::FrameTable(at))),
    ]
}

fn any_mapping() -> impl Strategy<Value = RawMapping> {
    prop::option::of((0..PROCESSES, prop_oneof![0..99_u64, 0..MAX_VIRTUAL_PAGE])).prop_map(|mapping| {
        mapping
            .map_or(RawMapping::NONE, |(process, page)| RawMapping::new(Mapping { process: ProcessId(process), page }))
    })
}

fn any_lru() -> impl Strategy<Value = RawLru> {
    prop::option::of((0..255_u8, prop_oneof![0..99_u32, 0..=MAX_POSITION]))
        .prop_map(|place| place.map_or(RawLru::NONE, |(list, position)| RawLru::new(LruPlace { list, position })))
}

/// A run of a column: its length, step and first value.
fn any_run<T: std::fmt::Debug>(value: impl Strategy<Value = T>) -> impl Strategy<Value = (usize, i32, T)> {
    (prop_oneof![Just(1), 1..40_usize], -1..=1_i32, value)
}

type Runs<T> = Vec<(usize, i32, T)>;

/// Fills a column by runs, as long as their values are in range.
fn fill<T: Copy>(all: &mut [T], runs: &Runs<T>, next: impl Fn(T, i32) -> Option<T>) {
    let mut at = 0;
    for &(len, step, value) in runs {
        let mut value = Some(value);
        for _ in 0..len {
            let (Some(this), Some(slot)) = (value, all.get_mut(at)) else { break };
            *slot = this;
            value = next(this, step);
            at += 1;
        }
    }
}

fn next_place(place: RawPlace, step: i32) -> Option<RawPlace> {
    let step = |at: u32| at.checked_add_signed(step);
    Some(match place.get() {
        Some(Place::File(file, at)) => RawPlace::new(Place::File(file, step(at)?)),
        Some(Place::KernelImage(at)) => RawPlace::new(Place::KernelImage(step(at)?)),
        Some(Place::FrameTable(at)) => RawPlace::new(Place::FrameTable(step(at)?)),
        _ => place,
    })
}

fn next_mapping(mapping: RawMapping, step: i32) -> Option<RawMapping> {
    let Some(Mapping { process, page }) = mapping.get() else { return Some(mapping) };
    let page = page.checked_add_signed(step.into()).filter(|&page| page < MAX_VIRTUAL_PAGE)?;
    Some(RawMapping::new(Mapping { process, page }))
}

fn next_lru(lru: RawLru, step: i32) -> Option<RawLru> {
    let Some(LruPlace { list, position }) = lru.get() else { return Some(lru) };
    let position = position.checked_add_signed(step).filter(|&position| position <= MAX_POSITION)?;
    Some(RawLru::new(LruPlace { list, position }))
}

fn any_map() -> impl Strategy<Value = ColorMap> {
    let color = (0..11_u8).prop_map(|n| Color::from_number(n).unwrap());
    let columns = (
        prop::collection::vec(any_run(any_place()), 0..60),
        prop::collection::vec(any_run(any_mapping()), 0..60),
        prop::collection::vec(any_run(any_lru()), 0..60),
        prop::collection::vec(any_run(color), 0..60),
        prop::collection::vec(any_run(any::<u8>()), 0..60),
    );
    let texts = prop::collection::vec("[ab]{0,3}[ä/]{0,300}[a-z€]{0,20}", 1..6);
    (0..600_u64, texts, columns).prop_map(|(pages, texts, (places, mappings, lru, colors, flags))| {
        let mut map = tables(pages, &texts);
        fill(&mut map.places, &places, next_place);
        fill(&mut map.mappings, &mappings, next_mapping);
        fill(&mut map.lru, &lru, next_lru);
        fill(&mut map.colors, &colors, |color, _| Some(color));
        let flags = flags.into_iter().map(|(len, step, flags)| (len, step, PageFlags(flags))).collect();
        fill(&mut map.flags, &flags, |flags, _| Some(flags));
        map
    })
}

/// The body that a map's bytes hold.
fn body_of(map: &ColorMap) -> Vec<u8> {
    open(&map.encode(), map.pages()).unwrap()
}

proptest! {
    #[test]
    fn encoding_round_trips(map in any_map()) {
        prop_assert_eq!(ColorMap::decode(&map.encode(), map.pages()), Ok(map));
    }

    #[test]
    fn damaged_bytes_are_refused(map in any_map(), at in any::<prop::sample::Index>(), bit in 0u8..8, cut in any::<prop::sample::Index>()) {
        let good = map.encode();
        let mut bad = good.clone();
        bad[at.index(good.len())] ^= 1 << bit;
        prop_assert!(ColorMap::decode(&bad, map.pages()).is_err());
        prop_assert!(ColorMap::decode(&good[..cut.index(good.len())], map.pages()).is_err());
        bad.clone_from(&good);
        bad.push(0);
        prop_assert!(ColorMap::decode(&bad, map.pages()).is_err());
    }

    #[test]
    fn another_number_of_pages_is_refused(map in any_map(), more in 1..9_u64) {
        let (found, expected) = (map.pages().0, map.pages().0 + more);
        prop_assert_eq!(ColorMap::decode(&map.encode(), PageCount(expected)), Err(MapError::Pages { found, expected }));
    }

    #[test]
    fn arbitrary_bytes_do_not_panic(data in prop::collection::vec(any::<u8>(), 0..300)) {
        fuzz_map(&data);
    }

    /// What lies behind the checksum: bodies that are right but for a few bytes.
    #[test]
    fn damaged_bodies_do_not_panic(
        map in any_map(),
        damage in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..5),
        more in 0..2_u16,
    ) {
        let mut body = body_of(&map);
        for (at, byte) in damage {
            let at = at.index(body.len());
            body[at] = byte;
        }
        fuzz_map(&[&(map.pages().0 as u16 + more).to_le_bytes()[..], &body].concat());
    }
}

#[test]
fn wrong_version_and_size_are_named() {
    let map = tables(4, &["x".to_owned()]);
    let mut bytes = map.encode();
    let err = ColorMap::decode(&bytes, PageCount(5)).unwrap_err().to_string();
    assert!(err.contains("4 pages") && err.contains("has 5"), "{err}");
    bytes[4] = 9;
    let err = ColorMap::decode(&bytes, PageCount(4)).unwrap_err().to_string();
    assert!(err.contains('9') && err.contains("version 1"), "{err}");
}

#[test]
fn long_texts_are_cut_and_dangling_numbers_left_out() {
    let mut map = tables(3, &["x".to_owned()]);
    map.files[1].path = "é".repeat(200);
    map.places[0] = RawPlace::new(Place::File(FileId(FILES), 1));
    map.places[1] = RawPlace::new(Place::PageTable(6));
    map.places[2] = RawPlace::new(Place::Slab(CacheId(CACHES)));
    map.mappings[0] = RawMapping::new(Mapping { process: ProcessId(PROCESSES), page: 1 });
    let read = ColorMap::decode(&map.encode(), PageCount(3)).unwrap();
    assert_eq!(read.files[1].path, "é".repeat(127));
    assert_eq!(read.places, [RawPlace::NONE; 3]);
    assert_eq!(read.mappings, [RawMapping::NONE; 3]);
}

#[test]
fn superblocks_are_checked() {
    let mut map = tables(3, &["x".to_owned()]);
    map.files[1].superblock = 2;
    assert_eq!(ColorMap::decode(&map.encode(), PageCount(3)), Err(MapError::Malformed("superblock")));
    map.superblocks.clear();
    map.files.iter_mut().for_each(|file| file.superblock = 0);
    assert_eq!(ColorMap::decode(&map.encode(), PageCount(3)), Ok(map));
}

#[test]
fn a_map_that_is_too_large_becomes_an_unknown_one() {
    let mut map = tables(3, &["x".to_owned()]);
    map.processes.resize(MAX_PROCESSES + 1, ProcessFacts::default());
    let read = ColorMap::decode(&map.encode(), PageCount(3)).unwrap();
    assert_eq!((read.method, read.trouble.is_empty()), (Method::None, false));
}

/// A few bytes that claim much are refused before memory is taken.
#[test]
fn claims_are_bounded() {
    let pages = MAX_PAGES;
    let mut body = tables(3, &["x".to_owned()]).body();
    assert!(matches!(ColorMap::decode(&seal(pages, &body), PageCount(pages)), Err(MapError::Malformed(_))));
    assert_eq!(ColorMap::decode(&seal(pages + 1, &body), PageCount(pages + 1)), Err(MapError::TooLarge));
    let mut bytes = seal(3, &body);
    bytes[24..28].copy_from_slice(&(1_u32 << 25).to_le_bytes());
    let sum = xxh3_64(&bytes[UNSUMMED..]).to_le_bytes();
    bytes[8..16].copy_from_slice(&sum);
    assert_eq!(ColorMap::decode(&bytes, PageCount(3)), Err(MapError::TooLarge));
    body.clear();
    assert_eq!(ColorMap::decode(&seal(0, &body), PageCount(0)), Err(MapError::Length));
}

/// Random numbers that are always the same.
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 33) % n as u64) as usize
    }
}

/// A guest that ran for a while: its memory was handed out in pieces, as fragmented free lists do.
struct Guest {
    random: Random,
    map: ColorMap,
    /// Free pages, the next one last.
    free: Vec<usize>,
    /// Pages in the order in which they came onto the LRU lists of files and anonymous memory.
    lists: [Vec<usize>; 2],
}

impl Guest {
    fn new(pages: usize, files: usize) -> Self {
        let texts = ["ext4_inode_cache", "kmalloc-64", "dentry", "vda1", "python3"].map(str::to_owned);
        let mut map = tables(pages as u64, &texts);
        map.caches = (0..150).map(|n| format!("{}-{n}", texts[n % 3])).collect();
        map.processes.resize(80, map.processes[2].clone());
        let mut random = Random(7);
        map.files = (0..files).map(|n| file(&mut random, n)).collect();
        map.files.sort_by(|a, b| a.path.cmp(&b.path));
        let mut guest = Self { random, map, free: Vec::new(), lists: Default::default() };
        guest.fragment(pages);
        guest
    }

    /// The kernel at the start of memory, and the rest free: in pieces of 1 to 1024 pages, some in descending order.
    fn fragment(&mut self, pages: usize) {
        let kernel = pages / 12;
        for page in 0..kernel {
            let (color, place) = match page * 5 / kernel {
                0 | 1 => (Color::KernelCode, Place::KernelImage(page as u32)),
                2 => (Color::KernelOther, Place::KernelImage(page as u32)),
                _ => (Color::KernelOther, Place::FrameTable((page - kernel * 3 / 5) as u32)),
            };
            self.map.colors[page] = color;
            self.map.places[page] = RawPlace::new(place);
        }
        let mut pieces = Vec::new();
        let mut at = kernel;
        while at < pages {
            let order = self.random.below(11).min(self.random.below(11));
            let end = (at + (1 << order)).min(pages);
            pieces.push(at..end);
            at = end;
        }
        while !pieces.is_empty() {
            let last = pieces.len();
            let piece = pieces.swap_remove(self.random.below(last));
            let down = self.random.below(4) == 0;
            self.free.extend(piece.clone());
            if !down {
                let tail = self.free.len() - piece.len();
                self.free[tail..].reverse();
            }
        }
        for &page in &self.free {
            self.map.colors[page] = Color::Free;
        }
    }

    fn page(&mut self, color: Color) -> Option<usize> {
        let page = self.free.pop()?;
        self.map.colors[page] = color;
        Some(page)
    }

    /// Reads a part of a file, and maybe maps some of it.
    fn read(&mut self, file: usize, start: usize, len: usize) {
        let mapped = self.random.below(3) == 0;
        let process = ProcessId(self.random.below(80) as u16);
        for at in start..start + len {
            let Some(page) = self.page(if mapped { Color::CacheCode } else { Color::CacheData }) else { return };
            self.map.places[page] = RawPlace::new(Place::File(FileId(file as u32), at as u32));
            self.lists[0].push(page);
            if mapped && at % 32 < 16 {
                let base = 0x7_f000_0000 + file as u64 * 5000;
                self.map.mappings[page] = RawMapping::new(Mapping { process, page: base + at as u64 });
                self.map.flags[page] = PageFlags(if self.random.below(8) == 0 { 9 } else { 11 });
            }
        }
    }

    /// A process touches some more of its memory.
    fn touch(&mut self, process: usize, from: &mut u64) {
        *from += self.random.below(6) as u64 / 4;
        for _ in 0..1 + self.random.below(24) {
            let Some(page) = self.page(Color::UserData) else { return };
            *from += 1;
            self.map.mappings[page] = RawMapping::new(Mapping { process: ProcessId(process as u16), page: *from });
            self.map.flags[page] = PageFlags(if self.random.below(20) == 0 { 5 } else { 7 });
            self.lists[1].push(page);
        }
    }

    fn kernel(&mut self) {
        let cache = CacheId(self.random.below(150) as u32);
        for _ in 0..1 << self.random.below(4) {
            let Some(page) = self.page(Color::Slab) else { return };
            self.map.places[page] = RawPlace::new(Place::Slab(cache));
        }
        match self.random.below(4) {
            0 => {
                if let Some(page) = self.page(Color::PageTables) {
                    self.map.places[page] = RawPlace::new(Place::PageTable(1));
                }
            }
            1 => _ = [(); 4].map(|()| self.page(Color::Vmalloc)),
            2 => _ = self.page(Color::Unknown),
            _ => {}
        }
    }

    /// Uses nine tenths of memory.
    fn run(mut self) -> ColorMap {
        let spare = self.map.colors.len() / 10;
        let mut heaps: Vec<u64> = (0..80).map(|n| 0x5_5550_0000 + n * 0x1_2345).collect();
        let mut file = 0;
        while self.free.len() > spare {
            let len = 1 + self.random.below(6).pow(2) * self.random.below(5);
            if file < self.map.files.len() {
                // Sorted by their paths, but used in another order, except that neighbours are often used together.
                self.read((file / 8 * 8 * 37 + file % 8) % self.map.files.len(), 0, len);
                file += 1;
            }
            for _ in 0..1 + self.random.below(2) {
                let process = self.random.below(80);
                self.touch(process, &mut heaps[process]);
            }
            if self.random.below(3) == 0 {
                self.kernel();
            }
        }
        for (list, pages) in self.lists.iter().enumerate() {
            for (position, &page) in pages.iter().rev().enumerate() {
                self.map.lru[page] =
                    RawLru::new(LruPlace { list: list as u8, position: (position as u32).min(MAX_POSITION) });
            }
        }
        self.map
    }
}

fn file(random: &mut Random, n: usize) -> FileFacts {
    const WORDS: [&str; 24] = [
        "lib",
        "python3",
        "share",
        "x86_64-linux-gnu",
        "site",
        "test",
        "core",
        "http",
        "io",
        "data",
        "utils",
        "systemd",
        "perl",
        "locale",
        "main",
        "net",
        "parse",
        "config",
        "dist-packages",
        "gconv",
        "base",
        "kernel",
        "drivers",
        "init",
    ];
    // A dozen files lie in a directory, and directories beside each other.
    let (top, dir) = (n / 400, n / 12);
    let path = format!(
        "usr/{}/{}-{top}/{}{}/{}_{}{}",
        WORDS[top % 5],
        WORDS[top * 7 % 24],
        WORDS[dir * 5 % 24],
        dir % 40,
        WORDS[random.below(24)],
        WORDS[random.below(24)],
        [".py", ".so.6", ".conf", "", ".cpython-311.pyc"][random.below(5)]
    );
    let slab = random.below(200) as u64 * 0x3_8000;
    FileFacts {
        mapping: 0xffff_8880_0300_0178 + slab + random.below(30) as u64 * 1088,
        inode: 260_000 + (n + random.below(20)) as u64,
        superblock: 0,
        swap_backed: false,
        path,
    }
}

/// A guest of 512 MiB with 5000 files, two thirds of it in use by files and processes, in pieces of some pages.
#[test]
fn a_guest_of_512_mib_is_small() {
    let map = Guest::new(131_072, 5_000).run();
    let bytes = map.encode();
    let count = |color| map.colors.iter().filter(|&&c| c == color).count();
    let [data, code, anonymous, free] = [Color::CacheData, Color::CacheCode, Color::UserData, Color::Free].map(count);
    println!(
        "{} bytes for {} pages: {data} + {code} of files, {anonymous} anonymous, {free} free",
        bytes.len(),
        map.colors.len()
    );
    let tables = ColorMap { files: map.files.clone(), ..ColorMap::unknown(map.pages(), "") };
    println!("{} bytes for the files alone", tables.encode().len());
    let body = body_of(&map);
    let mut reader = Reader(&body);
    let lengths: Vec<_> = (0..STREAMS).map(|_| reader.varint().unwrap()).collect();
    println!("body {} bytes, streams {lengths:?}", body.len());
    assert_eq!(ColorMap::decode(&bytes, map.pages()), Ok(map));
    assert!(bytes.len() < 150_000);
}
