//! The two ways to read a page map agree with each other and with what was done to the pages.

#![allow(clippy::unwrap_used, reason = "a failure ends the test")]

mod support;

use proptest::{prelude::*, test_runner::TestRunner};
use ramet_kernel::{CopyMode, PagemapScanner};
use std::fs::File;
use support::{MISSING_WP, PAGE, Tmpfs, Touch, Watched, bytes, fill, page_of, small_pages};

/// More than the 512 entries that are read at a time, and with every other page private more than 128 regions.
const PAGES: u64 = 1200;

/// What is done to a run of pages, if it can be done.
#[derive(Debug, Clone, Copy)]
enum Step {
    /// Fill the page file: nothing, in a memory without one.
    Fill,
    Read,
    Write,
    Zero,
    Copy,
    Protect,
    Unprotect,
}

/// What a page is: the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Nothing,
    ZeroPage,
    Shared,
    Private,
}

fn step() -> impl Strategy<Value = (Step, u64, u64, u64)> {
    let what = prop_oneof![
        Just(Step::Fill),
        Just(Step::Read),
        Just(Step::Write),
        Just(Step::Zero),
        Just(Step::Copy),
        Just(Step::Protect),
        Just(Step::Unprotect),
    ];
    // Runs, and every second or third page of runs.
    (what, 0..PAGES, prop_oneof![1u64..8, 1..PAGES], 1u64..4)
}

struct Model<'a> {
    memory: Watched,
    file: Option<&'a File>,
    states: Vec<State>,
    filled: Vec<bool>,
}

impl<'a> Model<'a> {
    fn new(file: Option<&'a File>) -> Self {
        let memory = match file {
            Some(file) => Watched::of_file(file, PAGES, MISSING_WP),
            None => Watched::anonymous(PAGES, MISSING_WP),
        };
        let pages = usize::try_from(PAGES).unwrap();
        Self { memory, file, states: vec![State::Nothing; pages], filled: vec![false; pages] }
    }

    /// Nothing here faults: pages that are missing are not touched, protected ones are made writable first.
    fn apply(&mut self, step: Step, page: u64) {
        let at = usize::try_from(page).unwrap();
        let word = at * 512;
        let memory = &self.memory;
        let there = self.states[at] != State::Nothing || self.filled[at];
        match step {
            Step::Fill if self.file.is_some() => {
                fill(self.file.unwrap(), page, 1, 1);
                self.filled[at] = true;
            }
            Step::Fill => {}
            Step::Read if there => {
                let _ = memory.memory.read_u64(word);
                if self.states[at] == State::Nothing {
                    self.states[at] = State::Shared;
                }
            }
            Step::Write if there => {
                memory.unprotect(page, 1);
                memory.memory.write_u64(word, 0);
                self.states[at] = State::Private;
            }
            Step::Read | Step::Write => {}
            Step::Zero => {
                // The zero page does not come over a mark of protection.
                if self.states[at] == State::Nothing {
                    memory.unprotect(page, 1);
                }
                if memory.uffd.zeropage(memory.addr(page), PAGE, false).is_ok() {
                    assert_eq!(self.states[at], State::Nothing);
                    self.states[at] = State::ZeroPage;
                }
            }
            Step::Copy => {
                let mode = CopyMode { wp: page.is_multiple_of(2), dont_wake: false };
                if memory.uffd.copy(memory.addr(page), &page_of(page % 3), mode).is_ok() {
                    assert_eq!(self.states[at], State::Nothing);
                    self.states[at] = State::Private;
                }
            }
            Step::Protect => memory.protect(page, 1),
            Step::Unprotect => memory.unprotect(page, 1),
        }
    }

    fn pages(&self, of: impl Fn(State) -> bool) -> Vec<u64> {
        (0..PAGES).zip(&self.states).filter(|(_, state)| of(**state)).map(|(page, _)| page).collect()
    }

    fn check(&self, from: u64, len: u64) {
        let inside = |pages: Vec<u64>| -> Vec<u64> {
            pages.into_iter().filter(|page| (from..from + len).contains(page)).collect()
        };
        let private = inside(self.pages(|state| state == State::Private));
        if PagemapScanner::supported() {
            assert_eq!(self.scan(false, from, len), private, "PAGEMAP_SCAN, pages {from} and {len} on");
        }
        // The older way can't tell the zero page from a page of zeros.
        let with_zeros = inside(self.pages(|state| matches!(state, State::Private | State::ZeroPage)));
        assert_eq!(self.scan(true, from, len), with_zeros, "pagemap entries, pages {from} and {len} on");
    }

    /// The private pages of a stretch, from runs that are in order, not empty and inside it.
    fn scan(&self, slow: bool, from: u64, len: u64) -> Vec<u64> {
        let scanner = PagemapScanner::open(std::process::id()).unwrap();
        let scanner = if slow { scanner.without_scan() } else { scanner };
        let mut pages = Vec::new();
        let mut end = from;
        let found = |addr: u64, bytes: u64| {
            assert_eq!((addr % PAGE, bytes % PAGE), (0, 0));
            let start = (addr - self.memory.memory.addr()) / PAGE;
            assert!(start >= end && bytes > 0, "run of {bytes} bytes from page {start} after page {end}");
            end = start + bytes / PAGE;
            assert!(end <= from + len);
            pages.extend(start..end);
        };
        scanner.private_pages(self.memory.addr(from), len * PAGE, found).unwrap();
        pages
    }
}

fn agree(file: Option<&File>, steps: &[(Step, u64, u64, u64)], (from, len): (u64, u64)) {
    let mut model = Model::new(file);
    for &(step, start, len, stride) in steps {
        let end = (start + len).min(PAGES);
        (start..end).step_by(usize::try_from(stride).unwrap()).for_each(|page| model.apply(step, page));
    }
    model.check(0, PAGES);
    model.check(from, len.min(PAGES - from));
}

fn random_patterns(file: impl Fn() -> Option<File>) {
    if !PagemapScanner::supported() {
        eprintln!("\n!!! SKIPPED, NOT PROVED: this kernel has no PAGEMAP_SCAN; only the older way is tested !!!\n");
    }
    let config = ProptestConfig { cases: 100, failure_persistence: None, ..ProptestConfig::default() };
    let steps = (prop::collection::vec(step(), 1..24), (0..PAGES, 0..PAGES));
    TestRunner::new(config)
        .run(&steps, |(steps, part)| {
            agree(file().as_ref(), &steps, part);
            Ok(())
        })
        .unwrap();
}

#[test]
fn anonymous_memory_in_random_patterns() {
    small_pages();
    random_patterns(|| None);
}

#[test]
fn memory_of_a_page_file_in_random_patterns() {
    let tmpfs = Tmpfs::mount("huge=never");
    let path = tmpfs.path().join("pages");
    random_patterns(|| {
        let _ = std::fs::remove_file(&path);
        Some(tmpfs.sparse("pages", PAGES))
    });
}

#[test]
fn more_regions_than_one_call_returns() {
    small_pages();
    for stride in [2, 3] {
        agree(None, &[(Step::Copy, 0, PAGES, stride)], (1, PAGES - 2));
        // Private and merely protected pages in turn: the latter look swapped out to the scan.
        agree(None, &[(Step::Copy, 0, PAGES, stride), (Step::Protect, 1, PAGES, stride)], (511, 2));
    }
    agree(None, &[(Step::Protect, 0, PAGES, 1)], (0, PAGES));
    agree(None, &[(Step::Copy, 0, PAGES, 1)], (PAGES - 1, 1));
}

#[test]
fn a_page_file_that_is_only_read_leaves_no_private_page() {
    let tmpfs = Tmpfs::mount("huge=never");
    let file = tmpfs.sparse("pages", PAGES);
    fill(&file, 0, PAGES, 1);
    let model = Model::new(Some(&file));
    model.check(0, PAGES);
    for page in (0..PAGES).step_by(50) {
        assert_eq!(model.memory.touch_quietly(page, Touch::Read), 1);
    }
    model.check(0, PAGES);
    assert_eq!(model.scan(true, 0, PAGES), []);
}

#[test]
fn without_privilege_no_private_page_is_left_out() {
    small_pages();
    let model = Model::new(None);
    for page in (0..PAGES).step_by(3) {
        assert_eq!(
            model.memory.uffd.copy(model.memory.addr(page), &page_of(1), CopyMode::default()).unwrap(),
            bytes(1)
        );
    }
    model.memory.protect(0, PAGES);
    let private: Vec<_> = (0..PAGES).step_by(3).collect();
    assert_eq!(model.scan(true, 0, PAGES), private);
    // In a thread, whose rights are its own. Without CAP_SYS_ADMIN the kernel does not tell a page that is only protected
    // from one that is swapped out.
    let scans = std::thread::scope(|scope| {
        let body = || {
            let mut sets = rustix::thread::capabilities(None).unwrap();
            sets.effective.remove(rustix::thread::CapabilitySet::SYS_ADMIN);
            rustix::thread::set_capabilities(None, sets).unwrap();
            [false, true].map(|slow| model.scan(slow, 0, PAGES))
        };
        scope.spawn(body).join().unwrap()
    });
    for scan in scans {
        eprintln!("{} of {}", scan.len(), private.len());
        assert!(private.iter().all(|page| scan.contains(page)));
    }
}

#[test]
fn a_process_that_is_gone_is_an_error() {
    let mut child = std::process::Command::new("true").spawn().unwrap();
    let pid = child.id();
    child.wait().unwrap();
    assert!(PagemapScanner::open(pid).is_err());
}
