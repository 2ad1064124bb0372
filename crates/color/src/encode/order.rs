//! Orders of a guest's pages: along page numbers, along files, along processes' memory.

use super::runs::Run;

/// Pages one after the other, upwards or downwards.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct Segment {
    /// The lowest page.
    page: usize,
    pub(super) len: usize,
    down: bool,
}

impl Segment {
    /// The page that comes first.
    pub(super) const fn first(self) -> usize {
        if self.down { self.page + self.len.saturating_sub(1) } else { self.page }
    }

    /// Its pages, in its order.
    pub(super) fn pages(self) -> impl Iterator<Item = usize> {
        let (first, down) = (self.first(), self.down);
        (0..self.len).map(move |n| if down { first - n } else { first + n })
    }

    /// Its pages, when their order does not matter.
    pub(super) const fn range(self) -> std::ops::Range<usize> {
        self.page..self.page + self.len
    }

    /// Cuts the first `len` pages off.
    const fn split_off(&mut self, len: usize) -> Self {
        let len = if len < self.len { len } else { self.len };
        let rest = self.len - len;
        let page = if self.down { self.page + rest } else { self.page };
        self.len = rest;
        self.page = if self.down { self.page } else { self.page + len };
        Self { page, len, down: self.down }
    }
}

/// All pages of a guest, each once.
#[derive(Debug)]
pub(super) struct Order(Vec<Segment>);

impl Order {
    /// Pages by their numbers.
    pub(super) fn plain(pages: usize) -> Self {
        Self(vec![Segment { page: 0, len: pages, down: false }])
    }

    /// The same pages sorted by what `runs`, which lie along this order, say of them; those of which they say nothing
    /// come last. The first `kept` pages stay as they are: a segment must end there.
    pub(super) fn sorted(&self, runs: &[Run], kept: usize) -> Self {
        let mut walk = self.walk();
        let mut keyed = Vec::with_capacity(runs.len());
        let mut at = 0;
        for run in runs {
            let mut done = 0;
            while done < run.len {
                let mut piece = walk.take(run.len - done);
                if piece.len == 0 {
                    break;
                }
                let stays = at < kept;
                piece.down ^= run.step < 0 && !stays;
                keyed.push((if stays { (0, 0) } else { run.key(done, piece.len) }, piece));
                done += piece.len;
                at += piece.len;
            }
        }
        keyed.sort_by_key(|&(key, _)| key);
        Self(keyed.into_iter().map(|(_, segment)| segment).collect())
    }

    pub(super) fn segments(&self) -> &[Segment] {
        &self.0
    }

    pub(super) fn walk(&self) -> Walk<'_> {
        Walk { rest: self.0.iter(), current: Segment::default() }
    }
}

/// A way along an [`Order`].
#[derive(Debug)]
pub(super) struct Walk<'a> {
    rest: std::slice::Iter<'a, Segment>,
    current: Segment,
}

impl Walk<'_> {
    /// The page that comes next; 0 at the end.
    pub(super) fn peek(&mut self) -> usize {
        self.fill();
        self.current.first()
    }

    /// The next pages, at most `max`; none at the end.
    pub(super) fn take(&mut self, max: usize) -> Segment {
        self.fill();
        self.current.split_off(max)
    }

    fn fill(&mut self) {
        while self.current.len == 0 {
            let Some(&next) = self.rest.next() else { break };
            self.current = next;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{super::runs::Spot, *};

    fn run(group: Option<u32>, value: u64, step: i64, len: usize) -> Run {
        Run { spot: group.map(|group| Spot { group, value }), step, len, page: 0 }
    }

    fn pages(order: &Order) -> Vec<usize> {
        order.segments().iter().flat_map(|s| s.pages()).collect()
    }

    #[test]
    fn pages_are_sorted_by_what_runs_say() {
        let order = Order::plain(10);
        let sorted = order.sorted(&[run(Some(2), 5, -1, 3), run(None, 0, 0, 2), run(Some(1), 7, 1, 5)], 0);
        assert_eq!(pages(&sorted), [5, 6, 7, 8, 9, 2, 1, 0, 3, 4]);
        // Along that order, runs that cut segments anew. The first five pages stay.
        let again = sorted.sorted(&[run(Some(9), 1, 1, 6), run(Some(3), 8, -1, 2), run(Some(3), 1, 1, 2)], 5);
        assert_eq!(pages(&again), [5, 6, 7, 8, 9, 3, 4, 0, 1, 2]);
    }

    #[test]
    fn walks_cut_segments() {
        let order = Order(vec![Segment { page: 4, len: 4, down: true }, Segment { page: 0, len: 4, down: false }]);
        let mut walk = order.walk();
        let mut seen = Vec::new();
        loop {
            let first = walk.peek();
            let piece = walk.take(3);
            if piece.len == 0 {
                break;
            }
            assert_eq!(first, piece.first());
            seen.extend(piece.pages());
        }
        assert_eq!(seen, [7, 6, 5, 4, 0, 1, 2, 3]);
    }
}
