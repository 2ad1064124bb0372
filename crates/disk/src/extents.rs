//! Which pages of a frozen disk are as in its golden image, which are zero, and which must be fetched.
//!
//! # Encoding
//!
//! ```text
//! "RXM1" | size of the disk in bytes u64 (little endian) | runs: LEB128 of (pages << 2 | kind), to the end
//! ```
//!
//! Runs cover the disk from its first page to its last; neighbours differ in kind; at most [`MAX_RUNS`].

use crate::{MAX_DISK, PAGE, pages};
use base64::Engine;
use serde::{Deserialize, Serialize};
use std::fmt;

/// Most runs of a map. A disk with more is described more coarsely ([`ExtentMap::coarsen`]).
pub const MAX_RUNS: usize = 65_536;

const MAGIC: &[u8; 4] = b"RXM1";
const HEADER: usize = 12;

/// Where the bytes of a page are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// As in the golden image, zero past its end.
    Golden = 0,
    /// All zero.
    Zero = 1,
    /// In an overlay, as a whole or in part; or it is not known. Right for every page.
    Data = 2,
}

/// Consecutive pages of one kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Extent {
    /// The first page.
    pub start: u64,
    /// How many, at least one.
    pub pages: u64,
    /// Where their bytes are.
    pub kind: Kind,
}

impl Extent {
    /// The first page after it.
    #[must_use]
    pub const fn end(&self) -> u64 {
        self.start + self.pages
    }
}

/// What a map's encoding, or a list of runs, has wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "Not a map of a disk's extents: {what}; take it from `extents` of the disk's own host, of the same ramet release"
)]
pub struct ExtentError {
    what: &'static str,
}

/// The map of a disk.
#[derive(Clone, PartialEq, Eq)]
pub struct ExtentMap {
    size: u64,
    /// Ends and kinds, by their place.
    runs: Vec<(u64, Kind)>,
}

impl ExtentMap {
    /// A map that says the same of every page.
    ///
    /// # Errors
    /// When no disk can have this size.
    pub fn uniform(size: u64, kind: Kind) -> Result<Self, ExtentError> {
        Self::from_runs(size, [(pages(size), kind)])
    }

    /// A map of lengths in pages and kinds, from the first page on. Neighbours of one kind are joined; empty runs are
    /// left out.
    ///
    /// # Errors
    /// When the lengths do not sum up to the disk's.
    pub fn from_runs(size: u64, runs: impl IntoIterator<Item = (u64, Kind)>) -> Result<Self, ExtentError> {
        if size == 0 || size > MAX_DISK {
            return Err(ExtentError { what: "no disk has this size" });
        }
        let total = pages(size);
        let mut ends: Vec<(u64, Kind)> = Vec::new();
        let mut end = 0u64;
        for (len, kind) in runs.into_iter().filter(|run| run.0 > 0) {
            end = end
                .checked_add(len)
                .filter(|&end| end <= total)
                .ok_or(ExtentError { what: "it is longer than the disk" })?;
            match ends.last_mut() {
                Some(last) if last.1 == kind => last.0 = end,
                _ => ends.push((end, kind)),
            }
        }
        if end != total {
            return Err(ExtentError { what: "it is shorter than the disk" });
        }
        Ok(Self { size, runs: ends }.coarsen(MAX_RUNS))
    }

    /// The disk's size in bytes.
    #[must_use]
    pub const fn size(&self) -> u64 {
        self.size
    }

    /// The disk's size in pages.
    #[must_use]
    pub const fn pages(&self) -> u64 {
        pages(self.size)
    }

    /// The run that a page belongs to; `None` past the end of the disk.
    #[must_use]
    pub fn at(&self, page: u64) -> Option<Extent> {
        let index = self.runs.partition_point(|run| run.0 <= page);
        self.extent(index)
    }

    fn extent(&self, index: usize) -> Option<Extent> {
        let &(end, kind) = self.runs.get(index)?;
        let start = index.checked_sub(1).map_or(0, |before| self.runs[before].0);
        Some(Extent { start, pages: end - start, kind })
    }

    /// All runs.
    pub fn iter(&self) -> impl Iterator<Item = Extent> + '_ {
        (0..self.runs.len()).filter_map(|index| self.extent(index))
    }

    /// The runs, and parts of runs, between two pages.
    pub fn between(&self, start: u64, end: u64) -> impl Iterator<Item = Extent> + '_ {
        let first = self.runs.partition_point(|run| run.0 <= start);
        (first..self.runs.len()).map_while(move |index| {
            let extent = self.extent(index)?;
            let (from, to) = (extent.start.max(start), extent.end().min(end));
            (from < to).then(|| Extent { start: from, pages: to - from, kind: extent.kind })
        })
    }

    /// Bytes of pages of a kind. A page at the end of the disk counts in full.
    #[must_use]
    pub fn bytes(&self, kind: Kind) -> u64 {
        self.iter().filter(|extent| extent.kind == kind).map(|extent| extent.pages * PAGE).sum()
    }

    /// The same with at most `most` runs: short runs become data, which is right for every page.
    #[must_use]
    pub fn coarsen(mut self, most: usize) -> Self {
        let mut shortest = 2;
        while self.runs.len() > most.max(1) {
            let mut coarse: Vec<(u64, Kind)> = Vec::new();
            for extent in self.iter() {
                let kind = if extent.pages < shortest { Kind::Data } else { extent.kind };
                match coarse.last_mut() {
                    Some(last) if last.1 == kind => last.0 = extent.end(),
                    _ => coarse.push((extent.end(), kind)),
                }
            }
            self.runs = coarse;
            shortest *= 2;
        }
        self
    }

    /// The map as bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(HEADER + 3 * self.runs.len());
        out.extend(MAGIC);
        out.extend(self.size.to_le_bytes());
        for extent in self.iter() {
            let mut value = extent.pages << 2 | extent.kind as u64;
            while value >= 0x80 {
                out.push(value as u8 | 0x80);
                value >>= 7;
            }
            out.push(value as u8);
        }
        out
    }

    /// The map that these bytes are. They may be hostile: memory taken is bounded by [`MAX_RUNS`].
    ///
    /// # Errors
    /// When they are no map as [`Self::encode`] writes it.
    pub fn decode(bytes: &[u8]) -> Result<Self, ExtentError> {
        let bad = |what| ExtentError { what };
        let rest = bytes.strip_prefix(MAGIC).ok_or(bad("it does not begin with RXM1"))?;
        let (size, rest) = rest.split_first_chunk::<8>().ok_or(bad("it is cut short"))?;
        let size = u64::from_le_bytes(*size);
        if size == 0 || size > MAX_DISK {
            return Err(bad("no disk has this size"));
        }
        let (total, mut end) = (pages(size), 0);
        let mut runs: Vec<(u64, Kind)> = Vec::new();
        let (mut value, mut shift) = (0u64, 0);
        for &byte in rest {
            if shift > 56 || (shift > 0 && byte == 0) {
                return Err(bad("a number is too long"));
            }
            value |= u64::from(byte & 0x7f) << shift;
            shift += 7;
            if byte & 0x80 != 0 {
                continue;
            }
            let kind = match value & 3 {
                0 => Kind::Golden,
                1 => Kind::Zero,
                2 => Kind::Data,
                _ => return Err(bad("it has a run of unknown kind")),
            };
            let len = value >> 2;
            // Both are below 2^62.
            end += len;
            if len == 0 || end > total || runs.len() == MAX_RUNS || runs.last().is_some_and(|last| last.1 == kind) {
                return Err(bad("its runs are not in order"));
            }
            runs.push((end, kind));
            (value, shift) = (0, 0);
        }
        if end != total || shift != 0 {
            return Err(bad("it is cut short"));
        }
        Ok(Self { size, runs })
    }
}

impl fmt::Debug for ExtentMap {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExtentMap")
            .field("size", &self.size)
            .field("runs", &self.runs.len())
            .field("golden_bytes", &self.bytes(Kind::Golden))
            .field("data_bytes", &self.bytes(Kind::Data))
            .finish()
    }
}

impl Serialize for ExtentMap {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&base64::engine::general_purpose::STANDARD.encode(self.encode()))
    }
}

impl<'de> Deserialize<'de> for ExtentMap {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de::Error;
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        let bytes = base64::engine::general_purpose::STANDARD.decode(text.as_bytes()).map_err(D::Error::custom)?;
        Self::decode(&bytes).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn kind(n: u8) -> Kind {
        [Kind::Golden, Kind::Zero, Kind::Data][usize::from(n % 3)]
    }

    fn model(runs: &[(u64, u8)]) -> Vec<Kind> {
        runs.iter().flat_map(|&(len, k)| std::iter::repeat_n(kind(k), len as usize)).collect()
    }

    proptest! {
        #[test]
        fn lookup_is_as_in_a_plain_list(runs in prop::collection::vec((0u64..40, 0u8..3), 1..60), cut in 0u64..4096) {
            let model = model(&runs);
            prop_assume!(!model.is_empty());
            let size = model.len() as u64 * PAGE - cut;
            let map = ExtentMap::from_runs(size, runs.iter().map(|&(len, k)| (len, kind(k)))).unwrap();
            prop_assert_eq!(map.pages(), model.len() as u64);
            for (page, &kind) in model.iter().enumerate() {
                let extent = map.at(page as u64).unwrap();
                prop_assert_eq!(extent.kind, kind);
                prop_assert!((extent.start..extent.end()).contains(&(page as u64)));
            }
            prop_assert_eq!(map.at(model.len() as u64), None);
            prop_assert_eq!(ExtentMap::decode(&map.encode()), Ok(map.clone()));
            let json = serde_json::to_string(&map).unwrap();
            prop_assert_eq!(serde_json::from_str::<ExtentMap>(&json).unwrap(), map.clone());
            let (from, to) = (model.len() as u64 / 3, model.len() as u64 / 2);
            let part: Vec<_> = map.between(from, to).flat_map(|e| (e.start..e.end()).map(move |p| (p, e.kind))).collect();
            let wanted: Vec<_> = (from..to).map(|p| (p, model[p as usize])).collect();
            prop_assert_eq!(part, wanted);
        }

        #[test]
        fn a_coarser_map_says_data_or_the_same(runs in prop::collection::vec((1u64..40, 0u8..3), 1..60), most in 1usize..20) {
            let model = model(&runs);
            let map = ExtentMap::from_runs(model.len() as u64 * PAGE, runs.iter().map(|&(len, k)| (len, kind(k)))).unwrap();
            let coarse = map.coarsen(most);
            prop_assert!(coarse.iter().count() <= most);
            for (page, &kind) in model.iter().enumerate() {
                let found = coarse.at(page as u64).unwrap().kind;
                prop_assert!(found == kind || found == Kind::Data);
            }
        }

        #[test]
        fn hostile_bytes_are_refused_or_are_a_map(mut bytes in prop::collection::vec(any::<u8>(), 0..64), size in 1u64..1 << 30) {
            let _ = ExtentMap::decode(&bytes);
            let mut good = MAGIC.to_vec();
            good.extend(size.to_le_bytes());
            good.append(&mut bytes);
            if let Ok(map) = ExtentMap::decode(&good) {
                prop_assert_eq!(map.encode(), good);
            }
        }
    }

    #[test]
    fn lengths_must_fit_the_disk() {
        assert!(ExtentMap::from_runs(8192, [(1, Kind::Data)]).is_err());
        assert!(ExtentMap::from_runs(8192, [(u64::MAX, Kind::Data), (3, Kind::Zero)]).is_err());
        assert!(ExtentMap::uniform(0, Kind::Data).is_err());
        assert!(ExtentMap::uniform(MAX_DISK + 1, Kind::Data).is_err());
        assert!(ExtentMap::uniform(MAX_DISK, Kind::Data).is_ok());
    }
}
