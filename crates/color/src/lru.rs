//! Positions in the kernel's LRU lists.

use crate::{
    ColorMap,
    map::{LruPlace, MAX_LISTS, MAX_POSITION, PageFlags, RawLru},
};

/// No page.
pub(crate) const NO_PAGE: u32 = u32::MAX;

/// Follows each list from its first page on. A list that runs into itself or another ends there.
pub(crate) fn place(map: &mut ColorMap, next: &[u32], first: &[u32]) {
    for (list, &start) in first.iter().take(MAX_LISTS).enumerate() {
        let (mut at, mut position) = (start, 0);
        while at != NO_PAGE
            && let Some(lru) = map.lru.get_mut(at as usize)
            && *lru == RawLru::NONE
        {
            *lru = RawLru::new(LruPlace { list: list as u8, position });
            position = (position + 1).min(MAX_POSITION);
            at = next[at as usize];
        }
    }
    spread(map);
}

/// The pages of a larger page have its place.
fn spread(map: &mut ColorMap) {
    let mut last = RawLru::NONE;
    for at in 0..map.lru.len() {
        if map.lru[at] != RawLru::NONE {
            last = if map.flags[at].has(PageFlags::COMPOUND) { map.lru[at] } else { RawLru::NONE };
        } else if map.flags[at].has(PageFlags::COMPOUND) {
            map.lru[at] = last;
        } else {
            last = RawLru::NONE;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ramet_memory::{PageCount, PageIndex};

    #[test]
    fn lists_are_followed_and_loops_end() {
        let mut map = ColorMap::unknown(PageCount(6), "");
        // 4 -> 2 -> 0, and 1 -> 3 -> 1.
        let next = [NO_PAGE, 3, 0, 1, 2, NO_PAGE];
        place(&mut map, &next, &[4, 1]);
        let at = |page| map.lru(PageIndex(page)).map(|l| (l.list, l.position));
        assert_eq!(
            [0, 1, 2, 3, 4, 5].map(at),
            [Some((0, 2)), Some((1, 0)), Some((0, 1)), Some((1, 1)), Some((0, 0)), None]
        );
    }
}
