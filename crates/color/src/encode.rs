//! The encoding of color maps.
//!
//! ```text
//! "RCLR" | version u16 | 0 u16 | XXH3-64 of all after it u64 | pages u64 | body length u32 | packed body (LZ4 block)
//! body: 28 streams: the length of each (LEB128), then the streams
//! streams: facts | files (6) | places (4) | mappings (4) | colors (4) | flags (4) | order of LRU places u8
//!          | LRU places (4)
//! facts: method u8 | trouble | poisons free pages u8 | kernel known u8, then release, build, levels u8, image, pages
//!        | superblocks: count, each id, kind, device | processes: count, each root, pid, command | caches: count, names
//!        | what was learnt about the kernel, as JSON
//! files: addresses (turned right by 3 bits; deltas) | inodes (deltas) | superblock * 2 + swap backed
//!        | bytes that the path shares with the path before u8 | further bytes u8 | those bytes
//! ```
//!
//! Header numbers are little endian, others LEB128 unless their size is told. A delta is the way from the value before,
//! or from the value that is expected, as a zigzag number that wraps. A text is its length and UTF-8. Texts that are too
//! long are cut when written and refused when read. A reader refuses every other version.
//!
//! # Columns
//!
//! A column is runs of pages, and four streams:
//!
//! - heads: a byte for each run, of which the upper 4 bits are the sort, the lower 4 the length less 1
//! - lengths: for each run whose head says 15: the length less 16
//! - groups, values: as the sort of run demands
//!
//! *Places, mappings and LRU places* are numbers in groups: offsets in files, virtual pages in processes, positions in
//! lists. In a run the numbers stay, or go up or down by 1. The sort is 0 for pages without, else 1 for numbers that
//! stay, 2 up, 3 down; 3 more when the group is another than that of the run before (a delta in groups), and 6 more when
//! the first number is not the expected (a delta in values). Expected is the number that would continue the group's last
//! run; for mappings of file pages, the one at the same distance from the offset in the file as the process's last run
//! over file pages. Groups of places: 0 the kernel's image, 1 its frame table, 2 to 6 page tables by level, then slab
//! caches, then files.
//!
//! *Colors and flags* are bytes. The values stream lists the bytes that occur; the sort is a place in this list, or 15
//! for one that stands in groups.
//!
//! # Orders
//!
//! Memory is fragmented: what lies together in a file or process lies scattered over pages. So only the first column goes
//! along page numbers; it tells where the pages of files are, and the others follow the files:
//!
//! 1. Places go along page numbers.
//! 2. Mappings go along places: pages sorted by group and number, those without a place last, by page numbers. Runs are
//!    sorted as a whole, by their lowest number and otherwise as they come; one that goes down is turned round.
//! 3. Colors and flags go along places, then, for pages without, along mappings, and last, for those without either,
//!    along page numbers. What is sorted here are the pieces of the mappings' runs between the segments of order 2.
//! 4. LRU places go along page numbers (0) or as colors do (1), whichever takes fewer bytes: pages stand in the lists in
//!    the order of their allocation, which memory that is not fragmented shows better than files do.
//!
//! A guest of 512 MiB with 5000 files takes 100 to 150 KB so: half for the files, half for the pages.

mod bytes;
mod order;
mod runs;
mod tables;

use bytes::{Reader, put_varint};
use order::{Order, Segment};
use ramet_memory::PageCount;
use runs::{Column, ColumnReader, Expect, Run, Spot};
use xxhash_rust::xxh3::xxh3_64;

use crate::map::{
    CacheId, Color, ColorMap, FileId, LruPlace, MAX_LISTS, MAX_POSITION, MAX_VIRTUAL_PAGE, Mapping, PageFlags, Place,
    ProcessId, RawLru, RawMapping, RawPlace,
};

const MAGIC: [u8; 4] = *b"RCLR";
const VERSION: u16 = 1;
/// What the checksum does not cover: magic, version, itself.
const UNSUMMED: usize = 16;
const HEADER: usize = 28;
const STREAMS: usize = 28;
/// Largest guest that is accepted: 1 TiB.
const MAX_PAGES: u64 = 1 << 28;
/// Most superblocks and slab caches, and most files over one for each page.
const MAX_TABLE: usize = 1 << 16;
/// Most bytes of a body before packing.
const MAX_BODY: usize = 1 << 30;
/// As far as a guest's size allows: what tables take, and columns for each page.
const MAX_TABLES_BODY: usize = 64 << 20;
const MAX_PAGE_BODY: usize = 64;

/// Bytes that describe no color map.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MapError {
    /// Not a color map at all.
    #[error("Not a color map (bad magic): the file or message is something else or damaged")]
    Magic,
    /// Another version of the format.
    #[error(
        "Color map has version {found}, this ramet reads version {VERSION}: run the same ramet release on both hosts"
    )]
    Version {
        /// The version found.
        found: u16,
    },
    /// Cut short, or longer than it says.
    #[error("Color map is truncated or has trailing bytes")]
    Length,
    /// The checksum does not fit.
    #[error("Color map is damaged: checksum mismatch")]
    Checksum,
    /// The map of another guest.
    #[error("Color map is of {found} pages, but the guest's memory has {expected}")]
    Pages {
        /// Pages of the map.
        found: u64,
        /// Pages of the guest.
        expected: u64,
    },
    /// Larger than is accepted.
    #[error("Color map is too large")]
    TooLarge,
    /// Something that makes no sense.
    #[error("Color map is malformed: {0}")]
    Malformed(&'static str),
}

impl ColorMap {
    /// Encodes the map; see the module's documentation for the format.
    ///
    /// A page's place, mapping or LRU place that refers to what the map does not have is left out. A map that is larger
    /// than is accepted is written as one of which nothing is known.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let pages = self.colors.len();
        if !self.is_too_large() {
            let body = self.body();
            if body.len() <= most_body(pages) {
                return seal(pages as u64, &body);
            }
        }
        seal(pages as u64, &Self::unknown(self.pages(), "the color map is too large").body())
    }

    /// Decodes a map of a guest of `pages` pages. Hostile bytes cost at most about 700 bytes a page, and 200 MB.
    ///
    /// # Errors
    /// [`MapError`] when the bytes are no map of this version, or of a guest of another size.
    pub fn decode(bytes: &[u8], pages: PageCount) -> Result<Self, MapError> {
        let body = open(bytes, pages)?;
        Self::from_body(&body, usize::try_from(pages.0).map_err(|_| MapError::TooLarge)?)
    }

    fn is_too_large(&self) -> bool {
        self.files.len() > self.colors.len() + MAX_TABLE
            || self.superblocks.len() > MAX_TABLE
            || self.caches.len() > MAX_TABLE
            || self.processes.len() > crate::map::MAX_PROCESSES
    }

    fn body(&self) -> Vec<u8> {
        let mut facts = Vec::new();
        tables::put_facts(&mut facts, self);
        let mut streams = vec![facts];
        streams.extend(tables::files(&self.files));
        let sizes = Sizes::of(self);

        let plain = Order::plain(self.colors.len());
        let places = runs::find(&plain, |page| sizes.place_spot(self.places[page]));
        streams.extend(Column::of_spots(&places, sizes.expect_places()).streams());

        let by_place = plain.sorted(&places, 0);
        let mappings = runs::find(&by_place, |page| sizes.mapping_spot(self.mappings[page]));
        streams.extend(Column::of_spots(&mappings, sizes.expect_mappings(&self.places)).streams());

        let by_both = by_place.sorted(&mappings, placed(&places));
        streams.extend(Column::of_bytes(&by_both, |page| self.colors[page] as u8).streams());
        streams.extend(Column::of_bytes(&by_both, |page| self.flags[page].0).streams());
        let [along_pages, sorted] = [&plain, &by_both].map(|order| self.lru_column(order));
        let is_sorted = sorted.len() < along_pages.len();
        streams.push(vec![u8::from(is_sorted)]);
        streams.extend(if is_sorted { sorted } else { along_pages }.streams());

        let mut body = Vec::with_capacity(STREAMS * 3 + streams.iter().map(Vec::len).sum::<usize>());
        streams.iter().for_each(|stream| put_varint(&mut body, stream.len() as u64));
        streams.iter().for_each(|stream| body.extend(stream));
        body
    }

    fn lru_column(&self, order: &Order) -> Column {
        let runs = runs::find(order, |page| lru_spot(self.lru[page]));
        Column::of_spots(&runs, Expect::new(MAX_LISTS, -1, |_| None))
    }

    fn from_body(body: &[u8], pages: usize) -> Result<Self, MapError> {
        let mut streams = Streams::split(body)?;
        let mut map = tables::facts(streams.next())?;
        map.files = tables::read_files(streams.many(), map.superblocks.len(), pages.saturating_add(MAX_TABLE))?;
        let [places, mappings, colors, flags] = std::array::from_fn(|_| ColumnReader::new(streams.many()));
        let mut lru_order = streams.next();
        let lru_is_sorted = lru_order.flag()?;
        lru_order.finish()?;
        let lru = ColumnReader::new(streams.many());
        // Nothing is allocated for pages before this.
        [places, mappings, colors, flags, lru].iter().try_for_each(|column| column.check_pages(pages))?;
        let sizes = Sizes::of(&map);

        let plain = Order::plain(pages);
        map.places = vec![RawPlace::NONE; pages];
        let all = &mut map.places;
        let place_runs = places.spots(
            &plain,
            sizes.expect_places(),
            |group| sizes.most_place(group),
            put(all, |s| sizes.place(s)),
        )?;

        let by_place = plain.sorted(&place_runs, 0);
        map.mappings = vec![RawMapping::NONE; pages];
        let all = &mut map.mappings;
        let expect = sizes.expect_mappings(&map.places);
        let mapping_runs = mappings.spots(&by_place, expect, |_| MAX_VIRTUAL_PAGE - 1, put(all, mapping))?;

        let by_both = by_place.sorted(&mapping_runs, placed(&place_runs));
        map.colors = colors.bytes(&by_both, pages, Color::from_number)?;
        map.flags = flags.bytes(&by_both, pages, |flags| Some(PageFlags(flags)))?;
        map.lru = vec![RawLru::NONE; pages];
        let all = &mut map.lru;
        let order = if lru_is_sorted { &by_both } else { &plain };
        lru.spots(order, Expect::new(MAX_LISTS, -1, |_| None), |_| MAX_POSITION.into(), put(all, lru_place))?;
        Ok(map)
    }
}

/// Most bytes of the body of a map of so many pages.
fn most_body(pages: usize) -> usize {
    pages.saturating_mul(MAX_PAGE_BODY).saturating_add(MAX_TABLES_BODY).min(MAX_BODY)
}

/// Packs a body and writes the header.
fn seal(pages: u64, body: &[u8]) -> Vec<u8> {
    let packed = lz4_flex::block::compress(body);
    let mut out = Vec::with_capacity(HEADER + packed.len());
    out.extend(MAGIC);
    out.extend(VERSION.to_le_bytes());
    out.extend([0; 10]);
    out.extend(pages.to_le_bytes());
    out.extend((body.len() as u32).to_le_bytes());
    out.extend(packed);
    let sum = xxh3_64(&out[UNSUMMED..]);
    out[8..UNSUMMED].copy_from_slice(&sum.to_le_bytes());
    out
}

/// Checks the header and unpacks the body.
fn open(bytes: &[u8], pages: PageCount) -> Result<Vec<u8>, MapError> {
    let mut header = Reader(bytes.get(..HEADER).ok_or(MapError::Length)?);
    if header.take()? != MAGIC {
        return Err(MapError::Magic);
    }
    let version = u16::from_le_bytes(header.take()?);
    if version != VERSION {
        return Err(MapError::Version { found: version });
    }
    if header.take()? != [0; 2] {
        return Err(MapError::Malformed("reserved bytes"));
    }
    if u64::from_le_bytes(header.take()?) != xxh3_64(&bytes[UNSUMMED..]) {
        return Err(MapError::Checksum);
    }
    let found = u64::from_le_bytes(header.take()?);
    if found != pages.0 {
        return Err(MapError::Pages { found, expected: pages.0 });
    }
    let body_len = u32::from_le_bytes(header.take()?) as usize;
    let packed = &bytes[HEADER..];
    // LZ4 expands at most 255-fold: a larger claim is a lie, refused before the memory is taken.
    let most = most_body(usize::try_from(found).unwrap_or(usize::MAX)).min(packed.len().saturating_mul(255));
    if found > MAX_PAGES || body_len > most {
        return Err(MapError::TooLarge);
    }
    let body = lz4_flex::block::decompress(packed, body_len).map_err(|_| MapError::Malformed("packing"))?;
    if body.len() == body_len { Ok(body) } else { Err(MapError::Length) }
}

/// The streams of a body, taken one after the other.
struct Streams<'a>(std::array::IntoIter<Reader<'a>, STREAMS>);

impl<'a> Streams<'a> {
    fn split(body: &'a [u8]) -> Result<Self, MapError> {
        let mut body = Reader(body);
        let mut lengths = [0; STREAMS];
        for len in &mut lengths {
            *len = usize::try_from(body.varint()?).map_err(|_| MapError::Length)?;
        }
        let mut streams = [Reader::default(); STREAMS];
        for (stream, len) in streams.iter_mut().zip(lengths) {
            *stream = Reader(body.bytes(len)?);
        }
        body.finish()?;
        Ok(Self(streams.into_iter()))
    }

    fn next(&mut self) -> Reader<'a> {
        self.0.next().unwrap_or_default()
    }

    fn many<const N: usize>(&mut self) -> [Reader<'a>; N] {
        std::array::from_fn(|_| self.next())
    }
}

/// The group of the first kind of page table.
const TABLES: u32 = 2;
/// The groups before those of slab caches: the kernel's image, its frame table, five levels of page tables.
const FIXED: u32 = 7;

/// Sizes of a map's tables: what its columns can refer to.
#[derive(Debug, Clone, Copy)]
struct Sizes {
    files: u32,
    caches: u32,
    processes: u32,
}

impl Sizes {
    fn of(map: &ColorMap) -> Self {
        let [files, caches, processes] =
            [map.files.len(), map.caches.len(), map.processes.len()].map(|n| u32::try_from(n).unwrap_or(u32::MAX));
        Self { files, caches, processes }
    }

    fn place_spot(self, place: RawPlace) -> Option<Spot> {
        let (group, value) = match place.get()? {
            Place::KernelImage(at) => (0, at),
            Place::FrameTable(at) => (1, at),
            Place::PageTable(level @ 1..=5) => (TABLES + u32::from(level) - 1, 0),
            Place::Slab(CacheId(cache)) if cache < self.caches => (FIXED + cache, 0),
            Place::File(FileId(file), at) if file < self.files => (FIXED + self.caches + file, at),
            _ => return None,
        };
        Some(Spot { group, value: value.into() })
    }

    fn place(self, spot: Spot) -> RawPlace {
        let at = spot.value as u32;
        RawPlace::new(match spot.group {
            0 => Place::KernelImage(at),
            1 => Place::FrameTable(at),
            table if table < FIXED => Place::PageTable((table - TABLES + 1) as u8),
            cache if cache < FIXED + self.caches => Place::Slab(CacheId(cache - FIXED)),
            file => Place::File(FileId(file - FIXED - self.caches), at),
        })
    }

    fn most_place(self, group: u32) -> u64 {
        if (TABLES..FIXED + self.caches).contains(&group) { 0 } else { u32::MAX.into() }
    }

    fn expect_places(self) -> Expect<impl Fn(usize) -> Option<u64>> {
        Expect::new((FIXED + self.caches + self.files) as usize, 1, |_| None)
    }

    fn mapping_spot(self, mapping: RawMapping) -> Option<Spot> {
        let Mapping { process, page } = mapping.get()?;
        (u32::from(process.0) < self.processes).then_some(Spot { group: process.0.into(), value: page })
    }

    fn expect_mappings(self, places: &[RawPlace]) -> Expect<impl Fn(usize) -> Option<u64>> {
        Expect::new(self.processes as usize, 1, move |page| match places.get(page)?.get()? {
            Place::File(file, at) if file.0 < self.files => Some(at.into()),
            _ => None,
        })
    }
}

fn mapping(spot: Spot) -> RawMapping {
    RawMapping::new(Mapping { process: ProcessId(spot.group as u16), page: spot.value })
}

fn lru_spot(lru: RawLru) -> Option<Spot> {
    let LruPlace { list, position } = lru.get()?;
    (usize::from(list) < MAX_LISTS).then_some(Spot { group: list.into(), value: position.into() })
}

fn lru_place(spot: Spot) -> RawLru {
    RawLru::new(LruPlace { list: spot.group as u8, position: spot.value as u32 })
}

/// Pages that have a place.
fn placed(runs: &[Run]) -> usize {
    runs.iter().filter(|run| run.spot.is_some()).map(|run| run.len).sum()
}

/// Writes runs to where their pages are.
fn put<T>(all: &mut [T], raw: impl Fn(Spot) -> T) -> impl FnMut(Segment, Spot, i64) {
    move |piece, mut spot, step| {
        for page in piece.pages() {
            all[page] = raw(spot);
            spot.value = spot.value.wrapping_add_signed(step);
        }
    }
}

/// Shared by the fuzz target and the property tests: whatever decodes, encodes to something that decodes the same. The
/// bytes are read as a whole map, and as the body of one whose number of pages the first two bytes tell.
#[doc(hidden)]
pub fn fuzz_map(data: &[u8]) {
    if let Some(pages) = data.get(UNSUMMED..).and_then(<[u8]>::first_chunk) {
        fuzz_decode(data, u64::from_le_bytes(*pages).min(1 << 20));
    }
    if let Some((pages, body)) = data.split_first_chunk() {
        let pages = u16::from_le_bytes(*pages).into();
        fuzz_decode(&seal(pages, body), pages);
    }
}

fn fuzz_decode(data: &[u8], pages: u64) {
    if let Ok(map) = ColorMap::decode(data, PageCount(pages)) {
        assert_eq!(map.pages().0, pages);
        assert_eq!(ColorMap::decode(&map.encode(), PageCount(pages)).as_ref(), Ok(&map));
    }
}

#[cfg(test)]
mod tests;
