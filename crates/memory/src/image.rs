//! Images: stacks of layers, their flat index, their encoding, and how a VM maps one.
//!
//! # Encoding
//!
//! The memory section of a descriptor, and the file that describes an image to a pager:
//!
//! ```text
//! "RIMG" | version u16 | 0 u16 | body length u32 | XXH3-64 of the packed body u64 | packed body (LZ4 block)
//! body: image id u128 | memory bytes u64 | layers u32 | per layer: id u128, form u8 (0 bitmap, 1 runs), length u32, data
//! ```
//!
//! All numbers are little endian. A bitmap is the set's words; runs are pairs of LEB128 numbers (gap, length). An encoder
//! picks the shorter form for each layer. A reader refuses every other version.

use crate::{ByteSize, ImageId, LayerId, PAGE_SIZE, PageCount, PageIndex, PageRun, PageSet};

const MAGIC: [u8; 4] = *b"RIMG";
const VERSION: u16 = 1;
const HEADER: usize = 20;
/// Largest guest memory that is accepted: 1 TiB.
const MAX_MEMORY: u64 = 1 << 40;
/// Most layers an image may have.
pub const MAX_LAYERS: usize = 4096;
/// Most bytes that all bitmaps of one decoded image may take together.
const MAX_BITMAPS: u64 = 512 << 20;
/// Most bytes of a body before packing.
const MAX_BODY: usize = 64 << 20;

/// One layer of an image, as the descriptor tells it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LayerSpec {
    /// The layer.
    pub id: LayerId,
    /// The pages that it holds. While the layer is still being copied out of its parent: those that it may hold.
    pub owned: PageSet,
}

/// What an image is made of: its size and its layers, the oldest first.
///
/// A page that no layer owns reads as zeros.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ImageSpec {
    /// The image.
    pub image: ImageId,
    /// The size of the guest's RAM.
    pub memory: ByteSize,
    /// The layers, oldest first. Never empty.
    pub layers: Vec<LayerSpec>,
}

/// Bytes that describe no image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// Not an image description at all.
    #[error("Not an image description (bad magic): the file or message is something else or damaged")]
    Magic,
    /// Another version of the format.
    #[error(
        "Image description has version {found}, this ramet reads version {VERSION}: run the same ramet release on both hosts"
    )]
    Version {
        /// The version found.
        found: u16,
    },
    /// Cut short, or longer than it says.
    #[error("Image description is truncated or has trailing bytes")]
    Length,
    /// The checksum does not fit.
    #[error("Image description is damaged: checksum mismatch")]
    Checksum,
    /// A number that makes no sense.
    #[error("Image description is malformed: {0}")]
    Malformed(&'static str),
}

impl ImageSpec {
    /// Encodes the image; see the module's documentation for the format.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut body = Vec::new();
        body.extend(self.image.as_u128().to_le_bytes());
        body.extend(self.memory.bytes().to_le_bytes());
        body.extend((self.layers.len() as u32).to_le_bytes());
        for layer in &self.layers {
            body.extend(layer.id.as_u128().to_le_bytes());
            let mut runs = Vec::new();
            let mut at = 0;
            let bitmap_len = layer.owned.words().len() * 8;
            for run in layer.owned.runs() {
                put_varint(&mut runs, run.start.0 - at);
                put_varint(&mut runs, run.len);
                at = run.end().0;
                if runs.len() > bitmap_len {
                    break;
                }
            }
            let (form, data) = if runs.len() <= bitmap_len {
                (1, runs)
            } else {
                (0, layer.owned.words().iter().flat_map(|w| w.to_le_bytes()).collect())
            };
            body.push(form);
            body.extend((data.len() as u32).to_le_bytes());
            body.extend(data);
        }
        let packed = lz4_flex::block::compress(&body);
        let mut out = Vec::with_capacity(HEADER + packed.len());
        out.extend(MAGIC);
        out.extend(VERSION.to_le_bytes());
        out.extend([0; 2]);
        out.extend((body.len() as u32).to_le_bytes());
        out.extend(xxhash_rust::xxh3::xxh3_64(&packed).to_le_bytes());
        out.extend(packed);
        out
    }

    /// Decodes an image. Hostile bytes cost at most 64 MiB and 512 MiB of bitmaps.
    ///
    /// # Errors
    /// [`SpecError`] when the bytes are no image of this version.
    pub fn decode(bytes: &[u8]) -> Result<Self, SpecError> {
        let header = bytes.get(..HEADER).ok_or(SpecError::Length)?;
        if header[..4] != MAGIC {
            return Err(SpecError::Magic);
        }
        let version = u16::from_le_bytes([header[4], header[5]]);
        if version != VERSION {
            return Err(SpecError::Version { found: version });
        }
        let mut rest = &header[8..];
        let body_len = u32::from_le_bytes(take(&mut rest)?) as usize;
        let sum = u64::from_le_bytes(take(&mut rest)?);
        let packed = &bytes[HEADER..];
        if xxhash_rust::xxh3::xxh3_64(packed) != sum {
            return Err(SpecError::Checksum);
        }
        // LZ4 expands at most 255-fold: a larger claim is a lie, refused before the memory is taken.
        if body_len > MAX_BODY || body_len > packed.len().saturating_mul(255) {
            return Err(SpecError::Malformed("too large"));
        }
        let body = lz4_flex::block::decompress(packed, body_len).map_err(|_| SpecError::Malformed("packing"))?;
        if body.len() != body_len {
            return Err(SpecError::Length);
        }
        Self::decode_body(&body)
    }

    fn decode_body(mut body: &[u8]) -> Result<Self, SpecError> {
        let body = &mut body;
        let image = ImageId::from_u128(u128::from_le_bytes(take(body)?));
        let memory = u64::from_le_bytes(take(body)?);
        if memory == 0 || memory > MAX_MEMORY || !memory.is_multiple_of(PAGE_SIZE as u64) {
            return Err(SpecError::Malformed("memory size"));
        }
        let memory = ByteSize(memory);
        let count = u32::from_le_bytes(take(body)?) as usize;
        if count == 0 || count > MAX_LAYERS || count as u64 * memory.pages().0.div_ceil(8) > MAX_BITMAPS {
            return Err(SpecError::Malformed("number of layers"));
        }
        let mut layers = Vec::new();
        for _ in 0..count {
            let id = LayerId::from_u128(u128::from_le_bytes(take(body)?));
            let [form] = take(body)?;
            let len = u32::from_le_bytes(take(body)?) as usize;
            let mut data = body.split_off(..len).ok_or(SpecError::Length)?;
            let owned = match form {
                0 if data.len() as u64 == memory.pages().0.div_ceil(64) * 8 => {
                    let words = data.chunks_exact(8).map(|c| u64::from_le_bytes(c.try_into().unwrap_or([0; 8])));
                    PageSet::from_words(memory.pages(), words.collect())
                }
                1 => get_runs(&mut data, memory.pages())?,
                _ => return Err(SpecError::Malformed("layer")),
            };
            if layers.iter().any(|l: &LayerSpec| l.id == id) {
                return Err(SpecError::Malformed("a layer stands twice"));
            }
            layers.push(LayerSpec { id, owned });
        }
        if body.is_empty() { Ok(Self { image, memory, layers }) } else { Err(SpecError::Length) }
    }

    /// The newest layer, which gives the image's own page file its name.
    #[must_use]
    pub fn top(&self) -> Option<LayerId> {
        self.layers.last().map(|l| l.id)
    }

    /// The flat index: for each page the layer that changed it last. Its look-up cost does not grow with depth.
    #[must_use]
    pub fn index(&self) -> ImageIndex {
        let pages = usize::try_from(self.memory.pages().0).unwrap_or(0);
        let mut owner = vec![NO_LAYER; pages];
        for (number, layer) in self.layers.iter().enumerate() {
            for run in layer.owned.runs() {
                let (a, b) = (run.start.0 as usize, (run.end().0 as usize).min(pages));
                owner[a..b].fill(number as u16);
            }
        }
        ImageIndex { layers: self.layers.iter().map(|l| l.id).collect(), owner }
    }

    /// How a VM maps the image: consecutive segments that cover all of its memory, at most `max_segments` of them.
    ///
    /// A segment names the layer whose page file is mapped there. A layer's page file shows *the memory as of that
    /// layer*: the pages that it owns, and any page of the layers below once it has been filled in. Where long stretches
    /// are unchanged since an older layer, that layer's file is mapped and so shared with every other image over it;
    /// where changed and unchanged pages alternate too finely for `max_segments`, the newest layer's file is mapped
    /// and the pages of older layers are copied in as they are touched.
    #[must_use]
    pub fn view(&self, max_segments: usize) -> Vec<Segment> {
        let index = self.index();
        let top = self.layers.len().saturating_sub(1);
        // Pages that read as zeros never come from a file: they join the segment before them.
        let mut exact: Vec<(u64, usize)> = Vec::new();
        for (page, &owner) in index.owner.iter().enumerate() {
            if owner != NO_LAYER && exact.last().is_none_or(|&(_, o)| o != usize::from(owner)) {
                let start = if exact.is_empty() { 0 } else { page as u64 };
                exact.push((start, usize::from(owner)));
            }
        }
        if exact.is_empty() {
            exact.push((0, top));
        }
        let pages = self.memory.pages().0;
        let mut shortest = 1;
        let mut segments = exact;
        while segments.len() > max_segments.max(1) {
            shortest *= 2;
            let mut merged: Vec<(u64, usize)> = Vec::new();
            for (i, &(start, owner)) in segments.iter().enumerate() {
                let end = segments.get(i + 1).map_or(pages, |s| s.0);
                let owner = if end - start < shortest { top } else { owner };
                if merged.last().is_none_or(|&(_, o)| o != owner) {
                    merged.push((start, owner));
                }
            }
            segments = merged;
        }
        (0..segments.len())
            .map(|i| {
                let (start, owner) = segments[i];
                let end = segments.get(i + 1).map_or(pages, |s| s.0);
                Segment { start: PageIndex(start), len: end - start, file: self.layers[owner].id }
            })
            .collect()
    }
}

/// A stretch of a VM's memory that is mapped from one layer's page file, at the same offset.
#[derive(Clone, Copy, PartialEq, Eq, Debug, serde::Serialize, serde::Deserialize)]
pub struct Segment {
    /// The first page.
    pub start: PageIndex,
    /// How many pages.
    pub len: u64,
    /// The layer whose page file is mapped.
    pub file: LayerId,
}

impl Segment {
    /// The pages of the segment.
    #[must_use]
    pub const fn run(&self) -> PageRun {
        PageRun { start: self.start, len: self.len }
    }
}

const NO_LAYER: u16 = u16::MAX;

/// For each page of an image the layer that owns it.
#[derive(Clone, Debug)]
pub struct ImageIndex {
    layers: Vec<LayerId>,
    owner: Vec<u16>,
}

impl ImageIndex {
    /// The position (0 = oldest) in the image's layers of the one that owns `page`; `None` where it reads as zeros.
    #[must_use]
    pub fn owner(&self, page: PageIndex) -> Option<usize> {
        let owner = *self.owner.get(usize::try_from(page.0).ok()?)?;
        (owner != NO_LAYER).then_some(usize::from(owner))
    }

    /// The layer that owns `page`; `None` where the page reads as zeros.
    #[must_use]
    pub fn layer(&self, page: PageIndex) -> Option<LayerId> {
        self.owner(page).map(|o| self.layers[o])
    }

    /// The image's layers, oldest first.
    #[must_use]
    pub fn layers(&self) -> &[LayerId] {
        &self.layers
    }

    /// Pages in the image.
    #[must_use]
    pub fn pages(&self) -> PageCount {
        PageCount(self.owner.len() as u64)
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> Result<[u8; N], SpecError> {
    let (head, tail) = rest.split_first_chunk::<N>().ok_or(SpecError::Length)?;
    *rest = tail;
    Ok(*head)
}

fn put_varint(out: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        out.push((n & 0x7f) as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

fn get_varint(data: &mut &[u8]) -> Result<u64, SpecError> {
    let mut n = 0u64;
    for shift in (0..63).step_by(7) {
        let [byte] = take(data)?;
        n |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(n);
        }
    }
    Err(SpecError::Malformed("number"))
}

fn get_runs(data: &mut &[u8], pages: PageCount) -> Result<PageSet, SpecError> {
    let mut set = PageSet::new(pages);
    let mut at = 0u64;
    while !data.is_empty() {
        let start = at.saturating_add(get_varint(data)?);
        let len = get_varint(data)?;
        let end = start.saturating_add(len);
        if len == 0 || end > pages.0 {
            return Err(SpecError::Malformed("a run lies outside memory"));
        }
        set.insert_run(PageRun { start: PageIndex(start), len });
        at = end;
    }
    Ok(set)
}

/// Shared by the fuzz target and the property tests: whatever decodes, encodes to something that decodes the same.
#[doc(hidden)]
pub fn fuzz_spec(data: &[u8]) {
    if let Ok(spec) = ImageSpec::decode(data) {
        assert_eq!(ImageSpec::decode(&spec.encode()).as_ref(), Ok(&spec));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn spec(pages: u64, layers: &[Vec<(u64, u64)>]) -> ImageSpec {
        let layers = layers.iter().map(|runs| {
            let mut owned = PageSet::new(PageCount(pages));
            for &(start, len) in runs {
                owned.insert_run(PageRun { start: PageIndex(start), len });
            }
            LayerSpec { id: LayerId::random(), owned }
        });
        ImageSpec { image: ImageId::random(), memory: PageCount(pages).size(), layers: layers.collect() }
    }

    fn any_spec() -> impl Strategy<Value = ImageSpec> {
        (1u64..600).prop_flat_map(|pages| {
            prop::collection::vec(prop::collection::vec((0..pages, 1u64..40), 0..30), 1..6)
                .prop_map(move |layers| spec(pages, &layers))
        })
    }

    proptest! {
        #[test]
        fn encoding_round_trips(spec in any_spec()) {
            prop_assert_eq!(ImageSpec::decode(&spec.encode()), Ok(spec));
        }

        #[test]
        fn damaged_bytes_are_refused(spec in any_spec(), at in any::<prop::sample::Index>(), bit in 0u8..8, cut in any::<prop::sample::Index>()) {
            let good = spec.encode();
            let mut bad = good.clone();
            let at = at.index(bad.len());
            bad[at] ^= 1 << bit;
            // The two reserved bytes are not read.
            prop_assert!(ImageSpec::decode(&bad).is_err() || (6..8).contains(&at));
            prop_assert!(ImageSpec::decode(&good[..cut.index(good.len())]).is_err());
        }

        #[test]
        fn arbitrary_bytes_do_not_panic(data in prop::collection::vec(any::<u8>(), 0..300)) {
            fuzz_spec(&data);
            let sum = xxhash_rust::xxh3::xxh3_64(&data).to_le_bytes();
            let framed = [&b"RIMG\x01\0\0\0"[..], &(data.len() as u32 * 3).to_le_bytes(), &sum, &data].concat();
            fuzz_spec(&framed);
        }

        #[test]
        fn index_agrees_with_a_search_from_the_newest(spec in any_spec()) {
            let index = spec.index();
            for page in (0..spec.memory.pages().0).map(PageIndex) {
                let found = spec.layers.iter().rev().find(|l| l.owned.contains(page)).map(|l| l.id);
                prop_assert_eq!(index.layer(page), found);
            }
        }

        /// Every page lies in exactly one segment, whose file shows the right bytes: the owner itself is mapped, or a
        /// layer at or above the owner that no other layer between changed.
        #[test]
        fn view_covers_memory_and_shows_the_right_layer(spec in any_spec(), max in 1usize..20) {
            let view = spec.view(max);
            prop_assert!(view.len() <= max);
            let mut at = 0;
            let index = spec.index();
            for segment in &view {
                prop_assert_eq!(segment.start.0, at);
                prop_assert!(segment.len > 0);
                at = segment.run().end().0;
                let file = spec.layers.iter().position(|l| l.id == segment.file).unwrap();
                for page in segment.start.0..at {
                    if let Some(owner) = index.owner(PageIndex(page)) {
                        prop_assert!(file >= owner);
                    }
                }
            }
            prop_assert_eq!(at, spec.memory.pages().0);
        }
    }

    #[test]
    fn long_unchanged_stretches_stay_shared() {
        let spec = spec(10_000, &[vec![(0, 10_000)], vec![(5_000, 4), (5_010, 4)]]);
        let (base, top) = (spec.layers[0].id, spec.layers[1].id);
        let files = |max| spec.view(max).iter().map(|s| (s.start.0, s.file)).collect::<Vec<_>>();
        assert_eq!(files(8), [(0, base), (5_000, top), (5_004, base), (5_010, top), (5_014, base)]);
        assert_eq!(files(3), [(0, base), (5_000, top), (5_014, base)]);
    }

    #[test]
    fn wrong_version_names_both() {
        let mut bytes = spec(4, &[vec![(0, 1)]]).encode();
        bytes[4] = 9;
        let err = ImageSpec::decode(&bytes).unwrap_err().to_string();
        assert!(err.contains('9') && err.contains("version 1"), "{err}");
    }
}
