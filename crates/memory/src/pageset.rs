//! A set of pages of one guest: a bitmap.

use crate::{PageCount, PageIndex, PageRun};

/// A set of the pages `0..n`, one bit each.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct PageSet {
    pages: u64,
    words: Vec<u64>,
}

impl PageSet {
    /// The empty set over `pages` pages.
    #[must_use]
    pub fn new(pages: PageCount) -> Self {
        let words = vec![0; usize::try_from(pages.0.div_ceil(64)).unwrap_or(0)];
        Self { pages: pages.0, words }
    }

    /// A set from its words, bit `i` of word `w` being page `64 * w + i`. Bits beyond `pages` are dropped, missing words
    /// are empty.
    #[must_use]
    pub fn from_words(pages: PageCount, mut words: Vec<u64>) -> Self {
        words.resize(usize::try_from(pages.0.div_ceil(64)).unwrap_or(0), 0);
        if let (Some(last), rest @ 1..) = (words.last_mut(), pages.0 % 64) {
            *last &= (1 << rest) - 1;
        }
        Self { pages: pages.0, words }
    }

    /// How many pages the set is *over* (not how many it holds).
    #[must_use]
    pub const fn universe(&self) -> PageCount {
        PageCount(self.pages)
    }

    /// The bitmap's words.
    #[must_use]
    pub fn words(&self) -> &[u64] {
        &self.words
    }

    fn place(&self, page: PageIndex) -> Option<(usize, u64)> {
        (page.0 < self.pages).then_some(((page.0 / 64) as usize, 1 << (page.0 % 64)))
    }

    /// Whether the set holds `page` (never, when outside the universe).
    #[must_use]
    pub fn contains(&self, page: PageIndex) -> bool {
        self.place(page).is_some_and(|(w, bit)| self.words[w] & bit != 0)
    }

    /// Adds `page`; false when it was there already or is outside the universe.
    pub fn insert(&mut self, page: PageIndex) -> bool {
        let Some((w, bit)) = self.place(page) else { return false };
        let new = self.words[w] & bit == 0;
        self.words[w] |= bit;
        new
    }

    /// Takes `page` out; false when it was not there.
    pub fn remove(&mut self, page: PageIndex) -> bool {
        let Some((w, bit)) = self.place(page) else { return false };
        let had = self.words[w] & bit != 0;
        self.words[w] &= !bit;
        had
    }

    /// Adds a run of pages; what lies outside the universe is left out.
    pub fn insert_run(&mut self, run: PageRun) {
        let end = run.start.0.saturating_add(run.len).min(self.pages);
        let mut page = run.start.0;
        while page < end {
            let (w, bit) = ((page / 64) as usize, page % 64);
            let n = (64 - bit).min(end - page);
            let mask = if n == 64 { u64::MAX } else { ((1 << n) - 1) << bit };
            self.words[w] |= mask;
            page += n;
        }
    }

    /// How many pages the set holds.
    #[must_use]
    pub fn count(&self) -> PageCount {
        PageCount(self.words.iter().map(|w| u64::from(w.count_ones())).sum())
    }

    /// Whether the set holds no page.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|&w| w == 0)
    }

    /// Adds every page of `other` (which is over the same universe).
    pub fn union_with(&mut self, other: &Self) {
        for (a, b) in self.words.iter_mut().zip(&other.words) {
            *a |= b;
        }
    }

    /// The maximal runs of consecutive pages, ascending.
    pub fn runs(&self) -> impl Iterator<Item = PageRun> + '_ {
        let mut at = 0;
        std::iter::from_fn(move || {
            let start = self.next(at, true)?;
            let end = self.next(start, false).unwrap_or(self.pages);
            at = end;
            Some(PageRun { start: PageIndex(start), len: end - start })
        })
    }

    /// The pages, ascending.
    pub fn iter(&self) -> impl Iterator<Item = PageIndex> + '_ {
        self.runs().flat_map(|run| (run.start.0..run.end().0).map(PageIndex))
    }

    /// The first page at or after `from` that is in the set (`wanted`) or not in it.
    fn next(&self, from: u64, wanted: bool) -> Option<u64> {
        if from >= self.pages {
            return None;
        }
        let flip = if wanted { 0 } else { u64::MAX };
        let mut w = (from / 64) as usize;
        let mut word = (self.words[w] ^ flip) & (u64::MAX << (from % 64));
        loop {
            if word != 0 {
                let page = w as u64 * 64 + u64::from(word.trailing_zeros());
                return (page < self.pages).then_some(page);
            }
            w += 1;
            word = *self.words.get(w)? ^ flip;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #[test]
        fn behaves_like_a_set(n in 1u64..300, ops in prop::collection::vec((0u8..3, 0u64..320, 0u64..90), 0..60)) {
            let mut set = PageSet::new(PageCount(n));
            let mut model = BTreeSet::new();
            for (op, page, len) in ops {
                match op {
                    0 => prop_assert_eq!(set.insert(PageIndex(page)), page < n && model.insert(page)),
                    1 => prop_assert_eq!(set.remove(PageIndex(page)), model.remove(&page)),
                    _ => {
                        set.insert_run(PageRun { start: PageIndex(page), len });
                        model.extend((page..page + len).filter(|&p| p < n));
                    }
                }
            }
            prop_assert_eq!(set.iter().map(|p| p.0).collect::<Vec<_>>(), model.iter().copied().collect::<Vec<_>>());
            prop_assert_eq!(set.count().0, model.len() as u64);
            prop_assert_eq!(set.is_empty(), model.is_empty());
            for pair in set.runs().collect::<Vec<_>>().windows(2) {
                prop_assert!(pair[0].end() < pair[1].start);
            }
            let again = PageSet::from_words(set.universe(), set.words().to_vec());
            prop_assert_eq!(again, set);
        }
    }

    #[test]
    fn words_beyond_the_universe_are_dropped() {
        let set = PageSet::from_words(PageCount(3), vec![u64::MAX, u64::MAX]);
        assert_eq!(set.count(), PageCount(3));
    }
}
