//! Columns of pages as runs.

use super::{
    MapError,
    bytes::{Reader, put_delta, put_varint},
    order::{Order, Segment},
};

/// Where a page stands: a number in a group, such as an offset in a file or an address in a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Spot {
    pub(super) group: u32,
    pub(super) value: u64,
}

/// Pages, one after the other in some order, whose values go up or down by 1 or stay, or that have none.
#[derive(Debug, Clone, Copy)]
pub(super) struct Run {
    /// Of the first page.
    pub(super) spot: Option<Spot>,
    pub(super) step: i64,
    pub(super) len: usize,
    /// The first page.
    pub(super) page: usize,
}

impl Run {
    /// Of the page after the first `done`.
    fn value(&self, done: usize) -> u64 {
        self.spot.map_or(0, |spot| spot.value.wrapping_add_signed(self.step.wrapping_mul(done as i64)))
    }

    /// What the `len` pages after the first `done` are sorted by.
    pub(super) fn key(&self, done: usize, len: usize) -> (u32, u64) {
        match self.spot {
            Some(spot) => (spot.group + 1, self.value(done).min(self.value(done + len - 1))),
            None => (u32::MAX, 0),
        }
    }

    /// Makes the run longer by a page, when it goes on there.
    fn grow(&mut self, spot: Option<Spot>) -> bool {
        let goes_on = match (self.spot, spot) {
            (None, None) => true,
            (Some(a), Some(b)) if a.group == b.group && self.len == 1 => {
                self.step = b.value.wrapping_sub(a.value).cast_signed();
                (-1..=1).contains(&self.step)
            }
            (Some(a), Some(b)) => a.group == b.group && b.value == self.value(self.len),
            _ => false,
        };
        self.len += usize::from(goes_on);
        goes_on
    }
}

/// The runs of a column.
pub(super) fn find(order: &Order, spot_of: impl Fn(usize) -> Option<Spot>) -> Vec<Run> {
    let mut runs = Vec::new();
    let mut run = Run { spot: None, step: 0, len: 0, page: 0 };
    for segment in order.segments() {
        for page in segment.pages() {
            let spot = spot_of(page);
            if run.len > 0 && run.grow(spot) {
                continue;
            }
            if run.len > 0 {
                runs.push(run);
            }
            run = Run { spot, step: 0, len: 1, page };
        }
    }
    if run.len > 0 {
        runs.push(run);
    }
    runs
}

/// A column: streams of bytes, one for each kind of thing that is told of its runs.
#[derive(Debug, Default)]
pub(super) struct Column {
    /// A byte for each run: what sort it is, and its length if short.
    pub(super) heads: Vec<u8>,
    /// Lengths of long runs.
    pub(super) lengths: Vec<u8>,
    pub(super) groups: Vec<u8>,
    pub(super) values: Vec<u8>,
}

/// A [`Column`] as it is read.
#[derive(Debug, Clone, Copy)]
pub(super) struct ColumnReader<'a> {
    heads: Reader<'a>,
    lengths: Reader<'a>,
    groups: Reader<'a>,
    values: Reader<'a>,
}

/// Longer runs have their length elsewhere than in the head.
const SHORT: usize = 15;
/// The sort of a run with a byte that is not among the usual.
const UNUSUAL: u8 = 15;
/// Sorts of runs with values: 1 for those that stay, 2 up, 3 down. Added for another group than the run before, and for
/// a value that is not as expected.
const OTHER_GROUP: u8 = 3;
const UNEXPECTED: u8 = 6;

impl Column {
    pub(super) fn streams(self) -> [Vec<u8>; 4] {
        [self.heads, self.lengths, self.groups, self.values]
    }

    pub(super) const fn len(&self) -> usize {
        self.heads.len() + self.lengths.len() + self.groups.len() + self.values.len()
    }

    fn put_head(&mut self, sort: u8, len: usize) {
        let short = (len - 1).min(SHORT);
        self.heads.push(sort << 4 | short as u8);
        if short == SHORT {
            put_varint(&mut self.lengths, (len - 1 - SHORT) as u64);
        }
    }

    /// Writes runs of which each says where its pages stand.
    pub(super) fn of_spots(runs: &[Run], mut expect: Expect<impl Fn(usize) -> Option<u64>>) -> Self {
        let mut column = Self::default();
        for run in runs {
            let Some(spot) = run.spot else {
                column.put_head(0, run.len);
                continue;
            };
            let run = Run { step: expect.step(run, spot), ..*run };
            let expected = expect.value(spot.group, run.page);
            let other = spot.group != expect.group;
            let unexpected = spot.value != expected;
            let step = [1, 2, 3][run.step.rem_euclid(3) as usize];
            let sort = step + OTHER_GROUP * u8::from(other) + UNEXPECTED * u8::from(unexpected);
            column.put_head(sort, run.len);
            if other {
                put_delta(&mut column.groups, expect.group.into(), spot.group.into());
            }
            if unexpected {
                put_delta(&mut column.values, expected, spot.value);
            }
            expect.note(&run, spot);
        }
        column
    }

    /// Writes a byte for each page.
    pub(super) fn of_bytes(order: &Order, byte_of: impl Fn(usize) -> u8) -> Self {
        let runs = find(order, |page| Some(Spot { group: byte_of(page).into(), value: 0 }));
        let bytes: Vec<_> = runs.iter().map(|run| (run.spot.map_or(0, |spot| spot.group as u8), run.len)).collect();
        let usual = by_use(&bytes);
        let mut place = [0; 256];
        for (n, &byte) in usual.iter().enumerate() {
            place[usize::from(byte)] = n as u8;
        }
        let mut column = Self::default();
        for (byte, len) in bytes {
            let place = place[usize::from(byte)];
            column.put_head(place.min(UNUSUAL), len);
            if place >= UNUSUAL {
                column.groups.push(place);
            }
        }
        column.values = usual;
        column
    }
}

/// The bytes that occur, the one with most runs first.
fn by_use(runs: &[(u8, usize)]) -> Vec<u8> {
    let mut uses = [0_usize; 256];
    for &(byte, _) in runs {
        uses[usize::from(byte)] += 1;
    }
    let mut bytes: Vec<u8> = (0..=u8::MAX).filter(|&byte| uses[usize::from(byte)] > 0).collect();
    bytes.sort_by_key(|&byte| std::cmp::Reverse(uses[usize::from(byte)]));
    bytes
}

impl<'a> ColumnReader<'a> {
    pub(super) const fn new([heads, lengths, groups, values]: [Reader<'a>; 4]) -> Self {
        Self { heads, lengths, groups, values }
    }

    fn head(&mut self) -> Result<(u8, usize), MapError> {
        let head = self.heads.byte()?;
        let mut len = usize::from(head & 15) + 1;
        if len > SHORT {
            let more = usize::try_from(self.lengths.varint()?).unwrap_or(usize::MAX);
            len = len.saturating_add(more);
        }
        Ok((head >> 4, len))
    }

    fn finish(self) -> Result<(), MapError> {
        [self.heads, self.lengths, self.groups, self.values].into_iter().try_for_each(Reader::finish)
    }

    /// Checks that the runs are as many pages as the guest has. Nothing but the runs' lengths is looked at.
    pub(super) fn check_pages(mut self, pages: usize) -> Result<(), MapError> {
        let mut sum = 0_usize;
        while !self.heads.0.is_empty() {
            sum = sum.saturating_add(self.head()?.1);
        }
        self.lengths.finish()?;
        if sum == pages { Ok(()) } else { Err(MapError::Malformed("runs are not as many pages as the guest has")) }
    }

    /// Reads runs that [`Column::of_spots`] wrote along `order`. Groups are `groups` at most, and no value in a group is
    /// over what `most` says. `put` gets the pages that have a value: with the first one's, and the step.
    pub(super) fn spots(
        mut self,
        order: &Order,
        mut expect: Expect<impl Fn(usize) -> Option<u64>>,
        most: impl Fn(u32) -> u64,
        mut put: impl FnMut(Segment, Spot, i64),
    ) -> Result<Vec<Run>, MapError> {
        let mut walk = order.walk();
        let mut runs = Vec::new();
        while !self.heads.0.is_empty() {
            let run = self.run(walk.peek(), &mut expect, &most)?;
            let mut done = 0;
            while done < run.len {
                let piece = walk.take(run.len - done);
                if piece.len == 0 {
                    return Err(MapError::Malformed("a run lies outside memory"));
                }
                if let Some(spot) = run.spot {
                    put(piece, Spot { value: run.value(done), ..spot }, run.step);
                }
                done += piece.len;
            }
            runs.push(run);
        }
        self.finish()?;
        Ok(runs)
    }

    fn run(
        &mut self,
        page: usize,
        expect: &mut Expect<impl Fn(usize) -> Option<u64>>,
        most: impl Fn(u32) -> u64,
    ) -> Result<Run, MapError> {
        let (sort, len) = self.head()?;
        let Some(sort) = sort.checked_sub(1) else { return Ok(Run { spot: None, step: 0, len, page }) };
        if sort >= 2 * UNEXPECTED {
            return Err(MapError::Malformed("sort of run"));
        }
        let step = [0, 1, -1][usize::from(sort % OTHER_GROUP)];
        let mut group = expect.group;
        if sort % UNEXPECTED >= OTHER_GROUP {
            group = u32::try_from(self.groups.delta(group.into())?).unwrap_or(u32::MAX);
        }
        if group as usize >= expect.groups.len() {
            return Err(MapError::Malformed("a page refers to what is not there"));
        }
        let mut value = expect.value(group, page);
        if sort >= UNEXPECTED {
            value = self.values.delta(value)?;
        }
        let spot = Spot { group, value };
        let run = Run { spot: Some(spot), step, len, page };
        let most = most(group);
        if value > most || run.value(len - 1) > most {
            return Err(MapError::Malformed("a page's place"));
        }
        expect.note(&run, spot);
        Ok(run)
    }

    /// Reads runs that [`Column::of_bytes`] wrote along `order`, of bytes that `known` knows.
    pub(super) fn bytes<T: Copy + Default>(
        mut self,
        order: &Order,
        pages: usize,
        known: impl Fn(u8) -> Option<T>,
    ) -> Result<Vec<T>, MapError> {
        let usual = std::mem::take(&mut self.values.0);
        let usual: Option<Vec<T>> = usual.iter().map(|&byte| known(byte)).collect();
        let usual = usual.ok_or(MapError::Malformed("color"))?;
        let mut all = vec![T::default(); pages];
        let mut walk = order.walk();
        while !self.heads.0.is_empty() {
            let (sort, mut left) = self.head()?;
            let place = if sort == UNUSUAL { self.groups.byte()? } else { sort };
            let value = *usual.get(usize::from(place)).ok_or(MapError::Malformed("color"))?;
            while left > 0 {
                let piece = walk.take(left);
                if piece.len == 0 {
                    return Err(MapError::Malformed("a run lies outside memory"));
                }
                all[piece.range()].fill(value);
                left -= piece.len;
            }
        }
        self.finish()?;
        Ok(all)
    }
}

/// What the next run of each group is expected to begin with, by what was seen so far.
#[derive(Debug)]
pub(super) struct Expect<A> {
    groups: Vec<Expected>,
    /// The group of the run before.
    group: u32,
    /// Numbers of pages along which values go, where there are such: a file's pages are mapped along their offsets.
    along: A,
    /// The step of a group's first run when it is of one page.
    step: i64,
}

#[derive(Debug, Clone, Copy, Default)]
struct Expected {
    next: u64,
    /// Value less the number along which it goes.
    ahead: u64,
    /// Of the run before.
    step: i64,
    seen: bool,
}

impl<A: Fn(usize) -> Option<u64>> Expect<A> {
    pub(super) fn new(groups: usize, step: i64, along: A) -> Self {
        Self { groups: vec![Expected::default(); groups], group: 0, along, step }
    }

    fn get(&self, group: u32) -> Expected {
        self.groups.get(group as usize).copied().unwrap_or_default()
    }

    fn value(&self, group: u32, page: usize) -> u64 {
        let expected = self.get(group);
        (self.along)(page).map_or(expected.next, |number| expected.ahead.wrapping_add(number))
    }

    fn note(&mut self, run: &Run, spot: Spot) {
        self.group = spot.group;
        let along = (self.along)(run.page);
        if let Some(expected) = self.groups.get_mut(spot.group as usize) {
            expected.seen = true;
            expected.step = run.step;
            match along {
                Some(number) => expected.ahead = spot.value.wrapping_sub(number),
                None => expected.next = run.value(run.len),
            }
        }
    }

    /// The step to write for a run: one of a single page may have any, and gets the likeliest.
    fn step(&self, run: &Run, spot: Spot) -> i64 {
        if run.len > 1 {
            return run.step;
        }
        let expected = self.get(spot.group);
        if !expected.seen {
            return self.step;
        }
        if spot.value == expected.next {
            return expected.step;
        }
        spot.value.cmp(&expected.next.wrapping_add_signed(-expected.step)) as i64
    }
}
