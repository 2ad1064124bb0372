//! Pages are installed where none is, and never over one that is there: whoever was faster wins, and what a VM wrote stays.

#![allow(clippy::unwrap_used, reason = "a failure ends the test")]

mod support;

use ramet_kernel::{CopyError, CopyMode, Features, PrivateMapping, Uffd};
use std::io;
use support::{
    Fault, MISSING, MISSING_MINOR, MISSING_WP, PAGE, Tmpfs, Touch, WP, Watched, bytes, fill, page_of, small_pages,
    word_in,
};

const PAGES: u64 = 64;

fn copy(memory: &Watched, page: u64, pages: u64, value: u64) -> Result<usize, CopyError> {
    memory.uffd.copy(memory.addr(page), &page_of(value).repeat(bytes(pages) / bytes(1)), CopyMode::default())
}

fn zero(memory: &Watched, page: u64, pages: u64) -> Result<usize, CopyError> {
    memory.uffd.zeropage(memory.addr(page), pages * PAGE, false)
}

fn go_on(memory: &Watched, page: u64, pages: u64) -> Result<usize, CopyError> {
    memory.uffd.continue_(memory.addr(page), pages * PAGE)
}

#[track_caller]
fn exists(done: Result<usize, CopyError>) {
    assert!(matches!(done, Err(CopyError::Exists)), "{done:?}");
}

#[track_caller]
fn again(done: Result<usize, CopyError>, pages: u64) {
    assert!(matches!(done, Err(CopyError::Again { copied }) if copied == bytes(pages)), "{done:?}");
}

#[track_caller]
fn refused(done: Result<usize, CopyError>, errno: rustix::io::Errno) {
    match done {
        Err(CopyError::Io(err)) => assert_eq!(err.raw_os_error(), Some(errno.raw_os_error())),
        other => panic!("{other:?} instead of {errno}"),
    }
}

/// Installing over pages that are there, in both kinds of memory that VMs have. On return page 0 holds 1, page 1 zeros.
fn nothing_is_overwritten(memory: &Watched) {
    assert_eq!(copy(memory, 0, 1, 1).unwrap(), bytes(1));
    assert_eq!(zero(memory, 1, 1).unwrap(), bytes(1));
    for page in 0..2 {
        exists(copy(memory, page, 1, 99));
        exists(zero(memory, page, 1));
    }
    assert_eq!(memory.touch_quietly(0, Touch::Read), 1);
    assert_eq!(memory.touch_quietly(1, Touch::Read), 0);
    // What was written since, onto the zero page too.
    for page in 0..2 {
        memory.touch_quietly(page, Touch::Write(50 + page));
        exists(copy(memory, page, 1, 99));
        exists(zero(memory, page, 1));
        assert_eq!(memory.touch_quietly(page, Touch::Read), 50 + page);
    }

    // Up to a page that is there, which then is the first one.
    assert_eq!(copy(memory, 12, 1, 12).unwrap(), bytes(1));
    again(copy(memory, 10, 4, 10), 2);
    exists(copy(memory, 12, 2, 10));
    assert_eq!(copy(memory, 13, 1, 10).unwrap(), bytes(1));
    let values: Vec<_> = (10..14).map(|page| memory.touch_quietly(page, Touch::Read)).collect();
    assert_eq!(values, [10, 10, 12, 10]);
    assert_eq!(copy(memory, 23, 1, 23).unwrap(), bytes(1));
    again(zero(memory, 20, 8), 3);
    exists(zero(memory, 23, 5));
    assert_eq!(zero(memory, 24, 4).unwrap(), bytes(4));
    let values: Vec<_> = (20..28).map(|page| memory.touch_quietly(page, Touch::Read)).collect();
    assert_eq!(values, [0, 0, 0, 23, 0, 0, 0, 0]);
}

#[test]
fn anonymous_pages_are_never_overwritten() {
    small_pages();
    let memory = Watched::anonymous(PAGES, MISSING);
    nothing_is_overwritten(&memory);
    refused(go_on(&memory, 40, 1), rustix::io::Errno::INVAL);
}

#[test]
fn pages_of_a_clone_are_never_overwritten() {
    let tmpfs = Tmpfs::mount("huge=never");
    let file = tmpfs.sparse("pages", PAGES);
    let clone = Watched::of_file(&file, PAGES, MISSING);
    nothing_is_overwritten(&clone);
    assert_eq!((0..PAGES).map(|page| word_in(&file, page)).max(), Some(0), "the page file was written to");

    // A page of the page file that the clone has in its page table, and one that it has not.
    fill(&file, 30, 1, 0x30);
    fill(&file, 60, 1, 0x30);
    assert_eq!(clone.touch_quietly(30, Touch::Read), 0x30);
    exists(copy(&clone, 30, 1, 99));
    exists(zero(&clone, 30, 1));
    assert_eq!(clone.touch_quietly(30, Touch::Read), 0x30);
    // The latter is hidden by what is copied in: to be done for pages that are not filled only. (Far from page 30, since
    // a page's neighbours come along with it.)
    assert_eq!(copy(&clone, 60, 1, 99).unwrap(), bytes(1));
    assert_eq!(clone.touch_quietly(60, Touch::Read), 99);
    assert_eq!(word_in(&file, 60), 0x30);
}

#[test]
fn what_was_installed_is_the_clones_own() {
    let tmpfs = Tmpfs::mount("huge=never");
    let file = tmpfs.sparse("pages", PAGES);
    let [one, other] = [MISSING, MISSING].map(|mode| Watched::of_file(&file, PAGES, mode));
    copy(&one, 3, 1, 7).unwrap();
    zero(&one, 4, 1).unwrap();
    one.touch_quietly(4, Touch::Write(8));
    for page in [3, 4] {
        let (value, faults) = other.touch(page, Touch::Read, |_| assert_eq!(zero(&other, page, 1).unwrap(), bytes(1)));
        assert_eq!((value, faults), (0, vec![Fault::missing(page, false)]));
    }
    assert_eq!([one.peek(3), one.peek(4)], [7, 8]);
}

#[test]
fn continue_maps_what_is_in_the_page_file_and_nothing_else() {
    let tmpfs = Tmpfs::mount("huge=never");
    let file = tmpfs.sparse("pages", PAGES);
    let clone = Watched::of_file(&file, PAGES, MISSING_MINOR);
    fill(&file, 0, 4, 5);
    assert_eq!(go_on(&clone, 0, 2).unwrap(), bytes(2));
    assert_eq!(clone.touch_quietly(0, Touch::Read), 5);
    exists(go_on(&clone, 0, 1));
    // Not in the page file: no page of zeros is made up.
    refused(go_on(&clone, 8, 1), rustix::io::Errno::FAULT);
    assert_eq!(word_in(&file, 8), 0);
    // Up to a page that is not there, or that is there already.
    again(go_on(&clone, 2, 8), 2);
    fill(&file, 10, 4, 6);
    assert_eq!(go_on(&clone, 12, 1).unwrap(), bytes(1));
    again(go_on(&clone, 10, 4), 2);
    exists(go_on(&clone, 12, 2));
    // A write makes the page the clone's own, and nothing brings the shared one back.
    assert_eq!(clone.touch_quietly(1, Touch::Write(77)), 77);
    exists(go_on(&clone, 1, 1));
    assert_eq!(clone.touch_quietly(1, Touch::Read), 77);
    assert_eq!(word_in(&file, 1), 5);
    let (value, faults) = clone.touch(13, Touch::Write(78), |_| assert_eq!(go_on(&clone, 13, 1).unwrap(), bytes(1)));
    assert_eq!((value, faults), (78, vec![Fault::minor(13, true)]));
    assert_eq!(word_in(&file, 13), 6);
}

#[test]
fn protected_pages_are_never_overwritten() {
    small_pages();
    let tmpfs = Tmpfs::mount("huge=never");
    let file = tmpfs.sparse("pages", PAGES);
    for memory in [Watched::anonymous(PAGES, MISSING_WP), Watched::of_file(&file, PAGES, MISSING_WP)] {
        copy(&memory, 0, 1, 1).unwrap();
        zero(&memory, 1, 1).unwrap();
        memory.protect(0, PAGES);
        for page in 0..2 {
            exists(copy(&memory, page, 1, 99));
            exists(zero(&memory, page, 1));
        }
        // They are protected still.
        for (page, old) in [(0, 1), (1, 0)] {
            let (value, faults) = memory.touch(page, Touch::Write(5), |_| {
                assert_eq!(memory.peek(page), old);
                memory.unprotect(page, 1);
            });
            assert_eq!((value, faults), (5, vec![Fault::protected(page)]));
        }
        // Where there is nothing but the protection, a page can be copied in; the protection ends unless it is asked for.
        assert_eq!(copy(&memory, 2, 1, 3).unwrap(), bytes(1));
        assert_eq!(memory.touch_quietly(2, Touch::Write(4)), 4);
        let protected = CopyMode { wp: true, dont_wake: false };
        assert_eq!(memory.uffd.copy(memory.addr(3), &page_of(3), protected).unwrap(), bytes(1));
        let (value, faults) = memory.touch(3, Touch::Write(4), |_| memory.unprotect(3, 1));
        assert_eq!((value, faults), (4, vec![Fault::protected(3)]));
    }
}

#[test]
fn whoever_waits_gets_the_page_that_came_first() {
    small_pages();
    let memory = Watched::anonymous(PAGES, MISSING);
    let readers: Vec<_> = (0..4).map(|_| memory.start(6, Touch::Read)).collect();
    assert_eq!(memory.fault(), Fault::missing(6, false));
    memory.uffd.copy(memory.addr(6), &page_of(1), CopyMode { wp: false, dont_wake: true }).unwrap();
    exists(copy(&memory, 6, 1, 2));
    // A failed installation wakes nobody, so the pager does.
    memory.wake(6);
    let values: Vec<_> = readers.iter().map(support::Toucher::finish).collect();
    assert_eq!(values, [1; 4]);
}

#[test]
fn whole_pages_of_registered_memory_only() {
    let memory = Watched::anonymous(PAGES, MISSING);
    let page = page_of(1);
    let mode = CopyMode::default();
    refused(memory.uffd.copy(memory.addr(0) + 8, &page, mode), rustix::io::Errno::INVAL);
    refused(memory.uffd.copy(memory.addr(0), &page[..100], mode), rustix::io::Errno::INVAL);
    refused(memory.uffd.zeropage(memory.addr(0), 0, false), rustix::io::Errno::INVAL);
    let other = PrivateMapping::anonymous(bytes(1)).unwrap();
    refused(memory.uffd.copy(other.addr(), &page, mode), rustix::io::Errno::NOENT);
    assert_eq!(other.read_u64(0), 0);
    // Protected pages need memory registered for protection.
    refused(memory.uffd.copy(memory.addr(0), &page, CopyMode { wp: true, dont_wake: false }), rustix::io::Errno::INVAL);
    // Nothing came of all that.
    let (value, _) = memory.touch(0, Touch::Read, |_| assert_eq!(copy(&memory, 0, 1, 5).unwrap(), bytes(1)));
    assert_eq!(value, 5);
}

#[test]
fn the_interface_is_agreed_on_once() {
    let uffd = Uffd::create().unwrap();
    let all = Uffd::supported().unwrap();
    assert!(all.has(Features::MISSING_SHMEM));
    assert!(!all.has(Features(1 << 60)));
    let unknown = uffd.api(Features(1 << 60)).unwrap_err();
    assert_eq!(unknown.kind(), io::ErrorKind::InvalidInput, "{unknown}");
    assert!(uffd.api(Features::MISSING_SHMEM).unwrap().has(Features::MISSING_SHMEM), "a refusal spoils nothing");
    // A pager that takes over finds it agreed on; what it does not know, it says.
    assert_eq!(uffd.api(Features::MISSING_SHMEM).unwrap(), Features(0));
    assert!(uffd.api(Features(1 << 60)).is_err());
    // No agreement, no registration.
    let memory = PrivateMapping::anonymous(bytes(1)).unwrap();
    let fresh = Uffd::create().unwrap();
    assert!(fresh.register(memory.addr(), PAGE, WP).is_err());
    uffd.register(memory.addr(), PAGE, MISSING).unwrap();
    assert!(uffd.register(memory.addr() + 8, PAGE, MISSING).is_err());
}
