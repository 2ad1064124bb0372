//! Sizes, page numbers and guest-physical addresses.

use std::{fmt, str::FromStr};

/// Bytes in a page: the 4 KiB page of x86-64.
pub const PAGE_SIZE: usize = 4096;
const PAGE: u64 = PAGE_SIZE as u64;

/// Text that is no size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is not a size: expected a number with an optional K, M, G or T, such as 512M")]
pub struct UnitError {
    text: String,
}

/// A number of bytes. Written `512M`, `1G`; in JSON a plain number of bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct ByteSize(pub u64);

impl ByteSize {
    /// `n` mebibytes.
    #[must_use]
    pub const fn mib(n: u64) -> Self {
        Self(n << 20)
    }

    /// The number of bytes.
    #[must_use]
    pub const fn bytes(self) -> u64 {
        self.0
    }

    /// Whole pages in this size (a rest is dropped).
    #[must_use]
    pub const fn pages(self) -> PageCount {
        PageCount(self.0 / PAGE)
    }
}

impl fmt::Display for ByteSize {
    /// Exact when a whole number of a unit, else with one decimal.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(u64, &str); 4] = [(1 << 40, "T"), (1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K")];
        for (unit, name) in UNITS {
            if self.0 >= unit {
                return if self.0.is_multiple_of(unit) {
                    write!(f, "{}{name}", self.0 / unit)
                } else {
                    write!(f, "{:.1}{name}", self.0 as f64 / unit as f64)
                };
            }
        }
        write!(f, "{}", self.0)
    }
}

impl FromStr for ByteSize {
    type Err = UnitError;
    fn from_str(text: &str) -> Result<Self, UnitError> {
        let bad = || UnitError { text: text.chars().take(64).collect() };
        let trimmed = text.trim();
        let lower = trimmed.trim_end_matches("iB").trim_end_matches(['B', 'b']);
        let digits = lower.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let shift = match &lower[digits.len()..] {
            "" => 0,
            "K" | "k" => 10,
            "M" | "m" => 20,
            "G" | "g" => 30,
            "T" | "t" => 40,
            _ => return Err(bad()),
        };
        if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
            return Err(bad());
        }
        let number: u64 = digits.parse().map_err(|_| bad())?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(bad)
    }
}

/// A page of guest RAM by its place in the page file: 0 is the first page of RAM.
///
/// Not a guest-physical page number: the two differ above the PCI hole, see [`crate::MemoryLayout`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct PageIndex(pub u64);

impl PageIndex {
    /// Byte offset of the page in the page file and in the VM's RAM mapping.
    #[must_use]
    pub const fn offset(self) -> u64 {
        self.0 * PAGE
    }

    /// The page that holds byte `offset` of RAM.
    #[must_use]
    pub const fn of_offset(offset: u64) -> Self {
        Self(offset / PAGE)
    }
}

/// A number of pages.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct PageCount(pub u64);

impl PageCount {
    /// The size of this many pages.
    #[must_use]
    pub const fn size(self) -> ByteSize {
        ByteSize(self.0 * PAGE)
    }
}

/// A guest-physical address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Gpa(pub u64);

/// `len` consecutive pages from `start`. Never empty when it comes from a [`crate::PageSet`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct PageRun {
    /// The first page.
    pub start: PageIndex,
    /// How many pages.
    pub len: u64,
}

impl PageRun {
    /// The page after the last one.
    #[must_use]
    pub const fn end(self) -> PageIndex {
        PageIndex(self.start.0 + self.len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_and_written() {
        for (text, bytes) in
            [("0", 0), ("4096", 4096), ("512M", 512 << 20), ("1G", 1 << 30), ("2GiB", 2 << 30), ("8kb", 8192)]
        {
            assert_eq!(text.parse::<ByteSize>().unwrap().bytes(), bytes, "{text}");
        }
        for bad in ["", "M", "-1", "1.5G", "99999999999T", "1 G", "7X", "é"] {
            assert!(bad.parse::<ByteSize>().is_err(), "{bad}");
        }
        assert_eq!(ByteSize::mib(512).to_string(), "512M");
        assert_eq!(ByteSize(1536 << 20).to_string(), "1.5G");
    }
}
