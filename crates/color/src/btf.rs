//! BTF, the kernel's type information in its own memory: offsets of structure members by name.
//!
//! The format is that of the kernel's `Documentation/bpf/btf.rst`. It is 3 to 6 MB, so it is read in passing and not kept:
//! once over the strings, to find those of the names that matter (each is there once), once over the types.

use crate::{memory::ColorError, paging::KernelSpace};
use std::collections::HashMap;

/// Magic number, version 1, no flags.
const MAGIC: [u8; 4] = [0x9f, 0xeb, 1, 0];
/// Lengths of the header that are believed: 24 so far, and later ones with more in it.
const HEADERS: std::ops::RangeInclusive<u32> = 24..=128;
/// Bytes read at a time.
const CHUNK: usize = 64 << 10;
/// Most bytes of the types and of the strings.
const MAX_SECTION: u32 = 64 << 20;
/// Most types.
const MAX_TYPES: usize = 1 << 21;
/// How deep unnamed structures and unions may lie within each other.
const MAX_DEPTH: u32 = 8;
/// Most members that are looked at for one name.
const MAX_STEPS: u32 = 20_000;

const STRUCT: u32 = 4;
const UNION: u32 = 5;
const ENUM: u32 = 6;

/// Bytes that follow a type's 12 bytes: fixed ones, and for each member.
fn tail(kind: u32) -> Option<(usize, usize)> {
    Some(match kind {
        1 | 14 | 17 => (4, 0),               // integer, variable, declaration tag
        2 | 7..=12 | 16 | 18 => (0, 0),      // pointer, forward, typedef, qualifiers, function, float, type tag
        3 => (12, 0),                        // array
        STRUCT | UNION | 15 | 19 => (0, 12), // and data section, 64-bit enumeration
        ENUM | 13 => (0, 8),                 // and function prototype
        _ => return None,
    })
}

/// The type information of a kernel.
pub(crate) struct Btf<'a> {
    space: &'a KernelSpace<'a>,
    types: u64,
    types_len: u32,
    /// Where the strings of names are.
    names: HashMap<&'static str, u32>,
    /// Where each type is, from type 1 on.
    index: Vec<u32>,
    /// Structures and enumerations by the string of their name.
    known: HashMap<u32, Known>,
}

#[derive(Debug, Clone, Copy)]
struct Known {
    at: u32,
    members: u32,
    size: u32,
}

impl<'a> Btf<'a> {
    /// Searches the kernel's image, and reads what is known of `names` (of structures, members, enumerators).
    pub(crate) fn find(space: &'a KernelSpace<'a>, names: &[&'static str]) -> Result<Option<Self>, ColorError> {
        let mut chunk = vec![0; CHUNK];
        let image: Vec<_> = space.image().collect();
        let mut tries = 16;
        // What looks like the kernel's image may be one page mapped again and again.
        let mut budget = space.physical.pages().size().bytes().saturating_mul(4).saturating_add(16 << 20);
        for (start, len) in image {
            let mut at = 0;
            while at < len {
                let now = usize::try_from(len - at).unwrap_or(CHUNK).min(CHUNK);
                let Some(left) = budget.checked_sub(now as u64) else { return Ok(None) };
                budget = left;
                if space.read(start + at, &mut chunk[..now])? {
                    for (number, word) in chunk[..now].as_chunks::<4>().0.iter().enumerate() {
                        if *word != MAGIC {
                            continue;
                        }
                        if let Some(btf) = Self::open(space, start + at + 4 * number as u64, names, &mut budget)? {
                            return Ok(Some(btf));
                        }
                        tries -= 1;
                        if tries == 0 {
                            return Ok(None);
                        }
                    }
                }
                at += now as u64;
            }
        }
        Ok(None)
    }

    /// The type information at an address, if it is that.
    fn open(
        space: &'a KernelSpace<'a>,
        va: u64,
        names: &[&'static str],
        budget: &mut u64,
    ) -> Result<Option<Self>, ColorError> {
        let mut header = [0; 24];
        if !space.read(va, &mut header)? {
            return Ok(None);
        }
        let word = |at: usize| u32::from_le_bytes([header[at], header[at + 1], header[at + 2], header[at + 3]]);
        let (header_len, types, types_len, strings, strings_len) = (word(4), word(8), word(12), word(16), word(20));
        let sane = HEADERS.contains(&header_len)
            && (12..=MAX_SECTION).contains(&types_len)
            && (2..=MAX_SECTION).contains(&strings_len)
            && types <= MAX_SECTION
            && strings <= 2 * MAX_SECTION;
        if !sane {
            return Ok(None);
        }
        let Some(left) = budget.checked_sub(u64::from(types_len) + u64::from(strings_len)) else { return Ok(None) };
        *budget = left;
        let body = va + u64::from(header_len);
        let mut btf = Self {
            space,
            types: body + u64::from(types),
            types_len,
            names: HashMap::new(),
            index: Vec::new(),
            known: HashMap::new(),
        };
        let good = btf.read_strings(body + u64::from(strings), strings_len, names)? && btf.read_types()?;
        Ok(good.then_some(btf))
    }

    /// Finds the strings of `names`.
    fn read_strings(&mut self, va: u64, len: u32, names: &[&'static str]) -> Result<bool, ColorError> {
        let wanted: HashMap<&[u8], &'static str> = names.iter().map(|name| (name.as_bytes(), *name)).collect();
        let longest = names.iter().map(|name| name.len()).max().unwrap_or(0);
        let mut chunk = vec![0; CHUNK];
        // The string that is being read, up to one byte more than the longest name.
        let (mut text, mut start): (Vec<u8>, u32) = (Vec::new(), 0);
        let mut at = 0;
        while at < len {
            let now = (len - at).min(CHUNK as u32);
            let bytes = &mut chunk[..now as usize];
            if !self.space.read(va + u64::from(at), bytes)? || (at == 0 && bytes[0] != 0) {
                return Ok(false);
            }
            for (offset, &byte) in (at..).zip(bytes.iter()) {
                if byte == 0 {
                    if let Some(name) = wanted.get(text.as_slice()) {
                        self.names.entry(name).or_insert(start);
                    }
                    text.clear();
                    start = offset + 1;
                } else if text.len() <= longest {
                    text.push(byte);
                }
            }
            at += now;
        }
        Ok(true)
    }

    /// Goes over all types once.
    fn read_types(&mut self) -> Result<bool, ColorError> {
        let names: std::collections::HashSet<u32> = self.names.values().copied().collect();
        let mut cursor = Cursor::new(self.space, self.types);
        let mut at = 0;
        while at + 12 <= self.types_len {
            if self.index.len() >= MAX_TYPES {
                return Ok(false);
            }
            let Some([name, info, size]) = cursor.words(at)? else { return Ok(false) };
            let (kind, members) = (info >> 24 & 0x1f, info & 0xffff);
            let Some((fixed, each)) = tail(kind) else { return Ok(false) };
            self.index.push(at);
            if matches!(kind, STRUCT | UNION | ENUM) && members > 0 && names.contains(&name) {
                let known = self.known.entry(name).or_insert(Known { at, members, size });
                if size > known.size {
                    // Drivers have small structures of their own by some of the names.
                    *known = Known { at, members, size };
                }
            }
            at += 12 + fixed as u32 + members * each as u32;
        }
        Ok(at == self.types_len)
    }

    fn known(&self, name: &str) -> Option<Known> {
        self.known.get(self.names.get(name)?).copied()
    }

    /// Offset of a member of a structure, in bytes. Members of unnamed structures and unions in it count as its own.
    pub(crate) fn offset(&self, of: &str, member: &str) -> Result<Option<u32>, ColorError> {
        let (Some(known), Some(&name)) = (self.known(of), self.names.get(member)) else { return Ok(None) };
        let mut cursor = Cursor::new(self.space, self.types);
        let mut steps = MAX_STEPS;
        let found = self.search(&mut cursor, known.at, name, MAX_DEPTH, &mut steps)?;
        Ok(found.map(|bits| bits / 8).filter(|&offset| offset < known.size))
    }

    fn search(
        &self,
        cursor: &mut Cursor<'_>,
        at: u32,
        wanted: u32,
        depth: u32,
        steps: &mut u32,
    ) -> Result<Option<u32>, ColorError> {
        let Some([_, info, _]) = cursor.words(at)? else { return Ok(None) };
        let with_widths = info >> 31 != 0;
        for number in 0..info & 0xffff {
            *steps = steps.saturating_sub(1);
            let Some([name, of, offset]) = cursor.words(at + 12 + 12 * number)? else { return Ok(None) };
            if *steps == 0 {
                return Ok(None);
            }
            let offset = if with_widths { offset & 0x00ff_ffff } else { offset };
            if name == wanted {
                return Ok(Some(offset));
            }
            if name != 0 || depth == 0 {
                continue;
            }
            let Some(&inner) = (of as usize).checked_sub(1).and_then(|of| self.index.get(of)) else { continue };
            let Some([_, info, _]) = cursor.words(inner)? else { return Ok(None) };
            if matches!(info >> 24 & 0x1f, STRUCT | UNION)
                && let Some(found) = self.search(cursor, inner, wanted, depth - 1, steps)?
            {
                return Ok(found.checked_add(offset));
            }
        }
        Ok(None)
    }

    /// Value of an enumerator.
    pub(crate) fn enumerator(&self, of: &str, name: &str) -> Result<Option<u32>, ColorError> {
        let (Some(known), Some(&name)) = (self.known(of), self.names.get(name)) else { return Ok(None) };
        let mut cursor = Cursor::new(self.space, self.types);
        for number in 0..known.members {
            match cursor.words(known.at + 12 + 8 * number)? {
                Some([found, value]) if found == name => return Ok(Some(value)),
                Some(_) => {}
                None => return Ok(None),
            }
        }
        Ok(None)
    }
}

/// Reads words from places that mostly ascend.
struct Cursor<'a> {
    space: &'a KernelSpace<'a>,
    base: u64,
    start: u32,
    have: usize,
    bytes: Vec<u8>,
}

impl<'a> Cursor<'a> {
    fn new(space: &'a KernelSpace<'a>, base: u64) -> Self {
        Self { space, base, start: 0, have: 0, bytes: vec![0; CHUNK] }
    }

    fn words<const N: usize>(&mut self, at: u32) -> Result<Option<[u32; N]>, ColorError> {
        let inside = |start: u32, have: usize| at.checked_sub(start).map(|o| o as usize).filter(|o| o + 4 * N <= have);
        if inside(self.start, self.have).is_none() {
            let va = self.base + u64::from(at);
            // As much as is mapped in one stretch; the types may end where the mapping does.
            let Some((_, mapped)) = self.space.translate(va) else { return Ok(None) };
            let len = usize::try_from(mapped).unwrap_or(CHUNK).min(CHUNK).max(4 * N);
            (self.start, self.have) = (at, 0);
            if !self.space.read(va, &mut self.bytes[..len])? {
                return Ok(None);
            }
            self.have = len;
        }
        let Some(offset) = inside(self.start, self.have) else { return Ok(None) };
        let mut words = [0; N];
        for (word, raw) in words.iter_mut().zip(self.bytes[offset..].as_chunks::<4>().0) {
            *word = u32::from_le_bytes(*raw);
        }
        Ok(Some(words))
    }
}
