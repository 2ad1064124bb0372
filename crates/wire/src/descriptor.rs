//! The descriptor of a checkpoint: what a host needs, besides pages, to start clones of it. It is sent first.
//!
//! # Encoding
//!
//! ```text
//! "RDSC" | version u16 | sections u16 (5) | length of all u32 | 0 u32 | checksum u64 | section table | sections, in order
//! table entry: kind u16 | packing u16 (0 none, 1 LZ4 block) | stored length u32 | length u32
//! sections: 1 facts (JSON), 2 machine (JSON, not looked at here), 3 device state (packed), 4 memory (packed by itself),
//!           5 color map (packed by itself, not looked at here; empty when there is none)
//! ```
//!
//! All numbers are little endian. The checksum is XXH3-64 of everything after it, seeded with version, sections and
//! length. A reader refuses every other version: a clone started from half-understood state would be worse than none.
//!
//! A `pc` machine's device state is about 370 KB, mostly ROMs, and packs to about 160 KB with LZ4 (zstd: 126 KB, in five
//! times the time and with a C library). The memory section is at most 1 bit per page and layer.

use ramet_memory::{FamilyId, ImageId, ImageSpec, SpecError, VmId};
use std::borrow::Cow;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// The version of the format that this release reads and writes.
pub const VERSION: u16 = 2;

const MAGIC: [u8; 4] = *b"RDSC";
const HEADER: usize = 24;
const TABLE_ENTRY: usize = 12;
const BODY: usize = HEADER + TABLE_ENTRY * SECTIONS.len();

/// The sections, in order: name and most bytes, both stored and unpacked.
const SECTIONS: [(&str, usize); 5] = [
    ("facts", 16 << 10),
    ("machine", 256 << 10),
    ("device state", 64 << 20),
    ("memory", 72 << 20),
    ("color map", 64 << 20),
];
const FACTS: usize = 0;
const DEVICES: usize = 2;
const COLORS: usize = 4;

/// Most bytes of each text (guest kind, name, address, source's name).
pub const MAX_TEXT: usize = 255;
/// Most bytes of an encoded descriptor.
pub const MAX_ENCODED: usize = BODY + SECTIONS[0].1 + SECTIONS[1].1 + SECTIONS[2].1 + SECTIONS[3].1 + SECTIONS[4].1;

const PLAIN: u16 = 0;
const LZ4: u16 = 1;

/// Where a checkpoint's pages are served.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PageSource {
    /// The pager's address, `IP:PORT`.
    pub addr: String,
    /// The name in its certificate.
    pub name: String,
}

/// What a host needs to start clones of a checkpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    /// The checkpoint; also the image of its memory.
    pub checkpoint: ImageId,
    /// The family that it belongs to.
    pub family: FamilyId,
    /// The VM that it was taken of.
    pub parent_vm: VmId,
    /// Forks between the family's root VM and the parent.
    pub generation: u32,
    /// Layers of the image.
    pub depth: u32,
    /// The machine, as JSON of `ramet_vmm`'s `MachineSpec`. Not looked at here.
    pub spec_json: Vec<u8>,
    /// The kind of guest: `linux` or `tiny`.
    pub guest_kind: String,
    /// The parent's name, for people.
    pub name_hint: String,
    /// The devices' state as QEMU saved it.
    pub device_state: Vec<u8>,
    /// The memory, as [`ImageSpec::encode`] writes it.
    pub memory: Vec<u8>,
    /// What each page is, as `ramet_color` encodes its maps; empty when that is not known yet.
    pub colors: Vec<u8>,
    /// Where the pages come from; `None` when they are served only on the checkpoint's own host.
    pub page_source: Option<PageSource>,
}

/// Bytes that are no descriptor, or contents that are too large for one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum DescriptorError {
    /// Something else altogether.
    #[error("Not a checkpoint descriptor (bad magic): the file or message is something else, or damaged")]
    Magic,
    /// Another version of the format.
    #[error(
        "Checkpoint descriptor has version {found}, this ramet reads version {VERSION}: install the same ramet release on both hosts, then take the checkpoint again"
    )]
    Version {
        /// The version found.
        found: u16,
    },
    /// Cut short, or with something behind it.
    #[error("Checkpoint descriptor is truncated or has trailing bytes ({have} bytes of {want}): send it again")]
    Length {
        /// Bytes there.
        have: usize,
        /// Bytes that it should have, as far as can be told.
        want: usize,
    },
    /// Damaged.
    #[error("Checkpoint descriptor is damaged (checksum mismatch): send it again, or take the checkpoint again")]
    Checksum,
    /// A part that makes no sense although the checksum fits.
    #[error("Checkpoint descriptor is malformed: {section}: {what}; it was made by a broken or foreign program")]
    Malformed {
        /// The section.
        section: &'static str,
        /// What is wrong with it.
        what: String,
    },
    /// A part beyond its limit.
    #[error("Checkpoint descriptor's {section} is too large: {len} bytes, the limit is {limit}")]
    TooLarge {
        /// The section or field.
        section: &'static str,
        /// Its bytes.
        len: usize,
        /// The limit.
        limit: usize,
    },
    /// The memory section describes no image.
    #[error("Checkpoint descriptor's memory section cannot be used")]
    Memory(#[from] SpecError),
    /// The memory section describes another image.
    #[error("Checkpoint descriptor is of {checkpoint}, its memory section of {image}: take the checkpoint again")]
    OtherImage {
        /// The descriptor's checkpoint.
        checkpoint: ImageId,
        /// The image in the memory section.
        image: ImageId,
    },
}

/// Section 1.
#[derive(serde::Serialize, serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Facts<'a> {
    checkpoint: ImageId,
    family: FamilyId,
    parent_vm: VmId,
    generation: u32,
    depth: u32,
    guest_kind: Cow<'a, str>,
    name_hint: Cow<'a, str>,
    page_source: Option<Cow<'a, PageSource>>,
}

impl Descriptor {
    /// Encodes the descriptor; see the module's documentation for the format.
    ///
    /// # Errors
    /// [`DescriptorError::TooLarge`] names the part beyond its limit.
    pub fn encode(&self) -> Result<Vec<u8>, DescriptorError> {
        self.check_texts()?;
        let facts = Facts {
            checkpoint: self.checkpoint,
            family: self.family,
            parent_vm: self.parent_vm,
            generation: self.generation,
            depth: self.depth,
            guest_kind: Cow::Borrowed(&self.guest_kind),
            name_hint: Cow::Borrowed(&self.name_hint),
            page_source: self.page_source.as_ref().map(Cow::Borrowed),
        };
        let facts = serde_json::to_vec(&facts).map_err(|e| malformed(FACTS, e.to_string()))?;
        let contents = [&facts, &self.spec_json, &self.device_state, &self.memory, &self.colors];
        for (bytes, (section, limit)) in contents.iter().zip(SECTIONS) {
            if bytes.len() > limit {
                return Err(DescriptorError::TooLarge { section, len: bytes.len(), limit });
            }
        }
        let packed = lz4_flex::block::compress(&self.device_state);
        let mut table = Vec::with_capacity(BODY - HEADER);
        let mut body = Vec::with_capacity(
            packed.len() + self.memory.len() + self.colors.len() + facts.len() + self.spec_json.len(),
        );
        for (index, bytes) in contents.into_iter().enumerate() {
            let pack = index == DEVICES && packed.len() < bytes.len();
            let stored = if pack { &packed } else { bytes };
            table.extend((index as u16 + 1).to_le_bytes());
            table.extend(if pack { LZ4 } else { PLAIN }.to_le_bytes());
            table.extend((stored.len() as u32).to_le_bytes());
            table.extend((bytes.len() as u32).to_le_bytes());
            body.extend_from_slice(stored);
        }
        let mut out = Vec::with_capacity(BODY + body.len());
        out.extend(MAGIC);
        out.extend(VERSION.to_le_bytes());
        out.extend((SECTIONS.len() as u16).to_le_bytes());
        out.extend(((BODY + body.len()) as u32).to_le_bytes());
        out.extend([0; 4]);
        out.extend([0; 8]);
        out.extend(table);
        out.extend(body);
        let sum = checksum(&out);
        out[16..HEADER].copy_from_slice(&sum.to_le_bytes());
        Ok(out)
    }

    /// Decodes a descriptor. Takes no more memory than the bytes can honestly stand for: damaged lengths are refused
    /// before any is taken.
    ///
    /// # Errors
    /// [`DescriptorError`] says what is wrong and what to do.
    pub fn decode(bytes: &[u8]) -> Result<Self, DescriptorError> {
        let have = bytes.len();
        if !bytes.starts_with(&MAGIC[..have.min(4)]) {
            return Err(DescriptorError::Magic);
        }
        // The version comes first, so that it can be named whatever a later version does to the rest.
        let mut rest = bytes.get(4..).ok_or(DescriptorError::Length { have, want: HEADER })?;
        let short = DescriptorError::Length { have, want: HEADER };
        let version = u16::from_le_bytes(take(&mut rest).ok_or(short.clone())?);
        if version != VERSION {
            return Err(DescriptorError::Version { found: version });
        }
        let sections = u16::from_le_bytes(take(&mut rest).ok_or(short.clone())?);
        let want = u32::from_le_bytes(take(&mut rest).ok_or(short.clone())?) as usize;
        let reserved: [u8; 4] = take(&mut rest).ok_or(short.clone())?;
        let sum = u64::from_le_bytes(take(&mut rest).ok_or(short)?);
        if have != want || have < BODY {
            return Err(DescriptorError::Length { have, want: want.max(BODY) });
        }
        if checksum(bytes) != sum {
            return Err(DescriptorError::Checksum);
        }
        if usize::from(sections) != SECTIONS.len() || reserved != [0; 4] {
            return Err(malformed(FACTS, format!("{sections} sections instead of {}", SECTIONS.len())));
        }
        let mut body = &bytes[BODY..];
        let mut contents: [Cow<'_, [u8]>; SECTIONS.len()] = Default::default();
        for (index, (content, (section, limit))) in contents.iter_mut().zip(SECTIONS).enumerate() {
            let entry = (take(&mut rest), take(&mut rest), take(&mut rest), take(&mut rest));
            let (Some(kind), Some(packing), Some(stored), Some(len)) = entry else {
                return Err(malformed(index, "no table entry".into()));
            };
            let (stored, len) = (u32::from_le_bytes(stored) as usize, u32::from_le_bytes(len) as usize);
            if usize::from(u16::from_le_bytes(kind)) != index + 1 {
                return Err(malformed(index, "not in its place".into()));
            }
            if len > limit || stored > limit {
                return Err(DescriptorError::TooLarge { section, len: len.max(stored), limit });
            }
            let stored = body.split_off(..stored).ok_or_else(|| malformed(index, "reaches beyond the end".into()))?;
            *content = unpack(index, u16::from_le_bytes(packing), stored, len)?;
        }
        if !body.is_empty() {
            return Err(malformed(COLORS, "bytes behind it".into()));
        }
        let [facts, machine, devices, memory, colors] = contents;
        let facts: Facts<'_> = serde_json::from_slice(&facts).map_err(|e| malformed(FACTS, e.to_string()))?;
        let descriptor = Self {
            checkpoint: facts.checkpoint,
            family: facts.family,
            parent_vm: facts.parent_vm,
            generation: facts.generation,
            depth: facts.depth,
            spec_json: machine.into_owned(),
            guest_kind: facts.guest_kind.into_owned(),
            name_hint: facts.name_hint.into_owned(),
            device_state: devices.into_owned(),
            memory: memory.into_owned(),
            colors: colors.into_owned(),
            page_source: facts.page_source.map(Cow::into_owned),
        };
        descriptor.check_texts()?;
        Ok(descriptor)
    }

    /// The image in the memory section.
    ///
    /// # Errors
    /// [`DescriptorError::Memory`] when there is none, [`DescriptorError::OtherImage`] when it is not the checkpoint's.
    pub fn image_spec(&self) -> Result<ImageSpec, DescriptorError> {
        let spec = ImageSpec::decode(&self.memory)?;
        if spec.image == self.checkpoint {
            Ok(spec)
        } else {
            Err(DescriptorError::OtherImage { checkpoint: self.checkpoint, image: spec.image })
        }
    }

    fn check_texts(&self) -> Result<(), DescriptorError> {
        let source =
            self.page_source.iter().flat_map(|s| [("page source's address", &s.addr), ("page source's name", &s.name)]);
        for (section, text) in [("guest kind", &self.guest_kind), ("name", &self.name_hint)].into_iter().chain(source) {
            if text.len() > MAX_TEXT {
                return Err(DescriptorError::TooLarge { section, len: text.len(), limit: MAX_TEXT });
            }
        }
        Ok(())
    }
}

/// Of an encoded descriptor of at least [`HEADER`] bytes.
fn checksum(bytes: &[u8]) -> u64 {
    let mut seed = [0; 8];
    seed.copy_from_slice(&bytes[4..12]);
    xxh3_64_with_seed(&bytes[HEADER..], u64::from_le_bytes(seed))
}

/// Puts the right length and checksum into bytes that may be a descriptor: what lies behind them can then be fuzzed.
pub(crate) fn reseal(bytes: &mut [u8]) {
    if bytes.len() >= HEADER {
        let len = bytes.len() as u32;
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        let sum = checksum(bytes);
        bytes[16..HEADER].copy_from_slice(&sum.to_le_bytes());
    }
}

fn unpack(index: usize, packing: u16, stored: &[u8], len: usize) -> Result<Cow<'_, [u8]>, DescriptorError> {
    match packing {
        PLAIN if stored.len() == len => Ok(Cow::Borrowed(stored)),
        // LZ4 expands at most 255-fold: a larger claim is a lie, refused before the memory is taken.
        LZ4 if len <= stored.len().saturating_mul(255) => {
            let bytes = lz4_flex::block::decompress(stored, len).map_err(|e| malformed(index, e.to_string()))?;
            if bytes.len() == len { Ok(Cow::Owned(bytes)) } else { Err(malformed(index, "unpacks to less".into())) }
        }
        PLAIN | LZ4 => Err(malformed(index, "its lengths do not fit".into())),
        _ => Err(malformed(index, format!("unknown packing {packing}"))),
    }
}

fn malformed(index: usize, what: String) -> DescriptorError {
    DescriptorError::Malformed { section: SECTIONS[index].0, what }
}

fn take<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (head, tail) = rest.split_first_chunk::<N>()?;
    *rest = tail;
    Some(*head)
}

#[cfg(test)]
mod tests;
