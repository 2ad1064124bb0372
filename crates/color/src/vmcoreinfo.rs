//! The kernel's notes for crash dumps: a page of text in its memory that tells symbols, offsets and sizes.
//!
//! `vmcoreinfo_data` of `kernel/vmcore_info.c` (`crash_core.c` before): lines such as `OSRELEASE=6.1.0`,
//! `SYMBOL(init_top_pgt)=ffffffff82e10000`, `OFFSET(page.flags)=0`, `NUMBER(phys_base)=-12345`.

use crate::memory::{ColorError, Physical};
use ramet_memory::{PAGE_SIZE, PageIndex};

const START: &[u8] = b"OSRELEASE=";
/// Pages read at a time while searching.
const CHUNK: u64 = 16;
/// The notes were seen at 19 to 26 MiB, or a little above 4 GiB: memory from here on is searched first.
const USUAL: u64 = 16 << 20;
/// Most pages that are looked at as notes: a guest's user may have many that look like them.
const MAX_CANDIDATES: usize = 64;

/// The text of a page of notes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Vmcoreinfo {
    text: String,
}

impl Vmcoreinfo {
    /// The notes in a page, if they look like that.
    pub(crate) fn parse(page: &[u8]) -> Option<Self> {
        if !page.starts_with(START) {
            return None;
        }
        let end = page.iter().position(|&b| b == 0).unwrap_or(page.len());
        let text = std::str::from_utf8(&page[..end]).ok()?;
        let good = text.len() > 500 && text.contains("\nPAGESIZE=4096\n") && text.contains("\nSYMBOL(mem_section)=");
        good.then(|| Self { text: text.to_owned() })
    }

    /// XXH3-64 of the text.
    pub(crate) fn sum(&self) -> u64 {
        xxhash_rust::xxh3::xxh3_64(self.text.as_bytes())
    }

    /// What stands behind `key=`.
    pub(crate) fn text(&self, key: &str) -> Option<&str> {
        self.text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
    }

    /// `SYMBOL(name)`: an address.
    pub(crate) fn symbol(&self, name: &str) -> Option<u64> {
        u64::from_str_radix(self.text(&format!("SYMBOL({name})"))?, 16).ok()
    }

    /// `NUMBER(name)`.
    pub(crate) fn number(&self, name: &str) -> Option<i64> {
        self.text(&format!("NUMBER({name})"))?.parse().ok()
    }

    /// `OFFSET(name)`, in bytes; refused where no structure is that large.
    pub(crate) fn offset(&self, name: &str) -> Option<u32> {
        self.text(&format!("OFFSET({name})"))?.parse().ok().filter(|&offset| offset < 1 << 16)
    }

    /// `SIZE(name)`, in bytes.
    pub(crate) fn size(&self, name: &str) -> Option<u32> {
        self.text(&format!("SIZE({name})"))?.parse().ok().filter(|&size| size < 1 << 16)
    }
}

/// Hands pages that look like notes to `take`, the likeliest first, until it says that it found what it wants.
pub(crate) fn find<T>(
    physical: &Physical<'_>,
    mut take: impl FnMut(PageIndex, Vmcoreinfo) -> Result<Option<T>, ColorError>,
) -> Result<Option<T>, ColorError> {
    let all = physical.pages().0;
    let usual = (USUAL / PAGE_SIZE as u64).min(all);
    let high = physical.page(4 << 30).map_or(all, |page| page.0);
    let mut left = MAX_CANDIDATES;
    let mut bytes = vec![0; CHUNK as usize * PAGE_SIZE];
    // Low memory to 64 MiB, what lies above 4 GiB, all the rest.
    let soon = (usual * 4).min(high);
    for (from, to) in [(usual, soon), (high, all), (soon, high), (0, usual)] {
        let mut at = from;
        while let Some(next) = physical.next_data(PageIndex(at)).filter(|next| next.0 < to) {
            let count = CHUNK.min(to - next.0);
            let chunk = &mut bytes[..count as usize * PAGE_SIZE];
            physical.read_page_file(next.offset(), chunk)?;
            for (number, page) in chunk.chunks_exact(PAGE_SIZE).enumerate() {
                let Some(notes) = Vmcoreinfo::parse(page) else { continue };
                if let Some(found) = take(PageIndex(next.0 + number as u64), notes)? {
                    return Ok(Some(found));
                }
                left -= 1;
                if left == 0 {
                    return Ok(None);
                }
            }
            at = next.0 + count;
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn notes_are_understood() {
        let mut text = "OSRELEASE=6.1.0\nBUILD-ID=abc\nPAGESIZE=4096\nSYMBOL(mem_section)=ffff88807ffd6000\n\
                        OFFSET(page.flags)=0\nOFFSET(page.lru)=99999999\nSIZE(page)=64\nNUMBER(phys_base)=-123\n"
            .to_owned();
        assert_eq!(Vmcoreinfo::parse(text.as_bytes()), None, "too short");
        text.push_str(&"x".repeat(500));
        let mut page = text.into_bytes();
        page.resize(PAGE_SIZE, 0);
        let notes = Vmcoreinfo::parse(&page).unwrap();
        assert_eq!(notes.text("OSRELEASE"), Some("6.1.0"));
        assert_eq!(notes.symbol("mem_section"), Some(0xffff_8880_7ffd_6000));
        assert_eq!((notes.offset("page.flags"), notes.offset("page.lru")), (Some(0), None));
        assert_eq!((notes.size("page"), notes.number("phys_base")), (Some(64), Some(-123)));
        assert_eq!(notes.symbol("nothing"), None);
    }
}
