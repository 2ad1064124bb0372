//! What checkpoints of a running VM rest on: a protected page tells of its first write, before the write, and of nothing
//! else, be it private, in the page file only, or not there at all. Without `WP_ASYNC`: each write is held up until the
//! old bytes are safe.

#![allow(clippy::unwrap_used, reason = "a failure ends the test")]

mod support;

use ramet_kernel::{CopyMode, Features, PagemapScanner, PrivateMapping, Uffd};
use support::{
    Fault, MISSING, MISSING_WP, PAGE, PAGER_FEATURES, Tmpfs, Touch, WP, Watched, bytes, fill, page_of, small_pages,
    word_in,
};

const PAGES: u64 = 64;

/// Kernels before 6.4 lack it, and the pager does without: then what it says of untouched pages can't be tested.
fn has_wp_unpopulated() -> bool {
    let has = Uffd::supported().unwrap().has(Features::WP_UNPOPULATED);
    if !has {
        eprintln!(
            "\n!!! SKIPPED, NOT PROVED: this kernel can't protect pages that are not there (WP_UNPOPULATED) !!!\n"
        );
    }
    has
}

fn private_pages(memory: &PrivateMapping) -> Vec<u64> {
    let mut pages = Vec::new();
    let scanner = PagemapScanner::open(std::process::id()).unwrap();
    let take = |addr, len| pages.extend((0..len / PAGE).map(|n| (addr - memory.addr()) / PAGE + n));
    scanner.private_pages(memory.addr(), memory.len() as u64, take).unwrap();
    pages
}

/// A write to the protected page `page` is held up, old bytes in view, until it is let go on; the next one is not.
fn write_is_held_up(parent: &Watched, page: u64, old: u64) {
    let writer = parent.start(page, Touch::Write(0x7777));
    assert_eq!(parent.fault(), Fault::protected(page));
    assert!(writer.waits(), "page {page} was written though it is protected");
    assert_eq!(parent.peek(page), old, "page {page} lost its bytes before the write was let go on");
    // A copier that read it has not unprotected it.
    assert!(writer.waits());
    parent.unprotect(page, 1);
    assert_eq!(writer.finish(), 0x7777);
    assert_eq!(parent.touch_quietly(page, Touch::Write(0x8888)), 0x8888, "page {page} is writable from now on");
}

#[test]
fn anonymous_pages_tell_of_their_first_write_only() {
    small_pages();
    if !has_wp_unpopulated() {
        return;
    }
    let parent = Watched::anonymous(PAGES, WP);
    for page in 0..8 {
        parent.touch_quietly(page, Touch::Write(page + 1));
    }
    // Page 8 was read, so the zero page is there; from 9 on there is nothing.
    assert_eq!(parent.touch_quietly(8, Touch::Read), 0);
    parent.protect(0, PAGES);
    for page in 0..4 {
        assert_eq!(parent.touch_quietly(page, Touch::Read), page + 1, "reads are free");
    }
    for page in 0..8 {
        write_is_held_up(&parent, page, page + 1);
    }
    write_is_held_up(&parent, 8, 0);
    write_is_held_up(&parent, 9, 0);
    // Read first, written then: the zero page that comes in between is protected as well.
    assert_eq!(parent.touch_quietly(10, Touch::Read), 0);
    write_is_held_up(&parent, 10, 0);
    assert_eq!(private_pages(&parent.memory), (0..=10).collect::<Vec<_>>());
    // Protected anew, at the next checkpoint.
    parent.protect(3, 1);
    write_is_held_up(&parent, 3, 0x8888);
}

#[test]
fn without_the_feature_the_first_write_to_a_new_anonymous_page_goes_unseen() {
    small_pages();
    // Why the pager looks for such pages itself where `WP_UNPOPULATED` lacks.
    let features = Features(PAGER_FEATURES.0 & !Features::WP_UNPOPULATED.0);
    let parent = Watched::new(PrivateMapping::anonymous(bytes(PAGES)).unwrap(), features, WP);
    parent.touch_quietly(1, Touch::Write(5));
    parent.protect(0, PAGES);
    write_is_held_up(&parent, 1, 5);
    assert_eq!(parent.touch_quietly(2, Touch::Write(6)), 6);
    assert_eq!(private_pages(&parent.memory), [1, 2]);
}

/// A clone of a page file in which pages 0 to 15 are filled: 0 to 3 are private to it, 4 to 7 it has read, 8 to 15 are in
/// the page file only. No page from 16 on was filled.
fn clone_of(file: &std::fs::File) -> Watched {
    for page in 0..16 {
        fill(file, page, 1, 0x100 + page);
    }
    let clone = Watched::of_file(file, PAGES, MISSING);
    for page in 0..4 {
        clone.touch_quietly(page, Touch::Write(0x200 + page));
    }
    for page in 4..8 {
        assert_eq!(clone.touch_quietly(page, Touch::Read), 0x100 + page);
    }
    // Writes are tracked from the first checkpoint on: the same memory is registered again.
    clone.register(MISSING_WP);
    clone.protect(0, PAGES);
    clone
}

#[test]
fn pages_of_a_page_file_tell_of_their_first_write_wherever_they_are() {
    let tmpfs = Tmpfs::mount("huge=never");
    let file = tmpfs.sparse("pages", PAGES);
    let clone = clone_of(&file);
    assert_eq!(private_pages(&clone.memory), [0, 1, 2, 3], "protecting makes no page private");
    for page in 0..4 {
        assert_eq!(clone.touch_quietly(page, Touch::Read), 0x200 + page);
        write_is_held_up(&clone, page, 0x200 + page);
    }
    for page in 4..12 {
        write_is_held_up(&clone, page, 0x100 + page);
    }
    for page in 12..16 {
        assert_eq!(clone.touch_quietly(page, Touch::Read), 0x100 + page);
        write_is_held_up(&clone, page, 0x100 + page);
    }
    assert_eq!(private_pages(&clone.memory), (0..16).collect::<Vec<_>>());
    for page in 0..16 {
        assert_eq!(word_in(&file, page), 0x100 + page, "a clone wrote to the page file");
    }
}

#[test]
fn a_missing_page_is_brought_first_and_is_protected_then() {
    let tmpfs = Tmpfs::mount("huge=never");
    let file = tmpfs.sparse("pages", PAGES);
    let clone = clone_of(&file);
    let serve = |fault: Fault| {
        if fault.wp {
            assert_eq!(clone.peek(fault.page), 0x300, "page {}", fault.page);
            clone.unprotect(fault.page, 1);
        } else {
            fill(&file, fault.page, 1, 0x300);
            clone.wake(fault.page);
        }
    };
    // Written at once: two faults, the page's bytes in view between them.
    let (value, faults) = clone.touch(20, Touch::Write(9), serve);
    assert_eq!((value, faults), (9, vec![Fault::missing(20, true), Fault::protected(20)]));
    // Read, then written.
    assert_eq!(clone.touch(21, Touch::Read, serve), (0x300, vec![Fault::missing(21, false)]));
    assert_eq!(clone.touch(21, Touch::Write(9), serve), (9, vec![Fault::protected(21)]));
    // Made writable before it came: still asked for, and its write no longer told of. This is why the pager makes only
    // private pages writable along with the one that is wanted.
    clone.unprotect(22, 1);
    assert_eq!(clone.touch(22, Touch::Write(9), serve), (9, vec![Fault::missing(22, true)]));
    assert_eq!(word_in(&file, 20), 0x300);
    assert_eq!(private_pages(&clone.memory), [0, 1, 2, 3, 20, 21, 22]);
}

#[test]
fn zeros_for_a_tracked_clone_are_copied_in_protected() {
    let tmpfs = Tmpfs::mount("huge=never");
    let file = tmpfs.sparse("pages", PAGES);
    let clone = clone_of(&file);
    let zeros = page_of(0);
    let copy = |page: u64, wp: bool| {
        let mode = CopyMode { wp, dont_wake: false };
        assert_eq!(clone.uffd.copy(clone.addr(page), &zeros, mode).unwrap(), zeros.len());
    };
    let (value, faults) = clone.touch(30, Touch::Read, |_| copy(30, true));
    assert_eq!((value, faults), (0, vec![Fault::missing(30, false)]));
    write_is_held_up(&clone, 30, 0);
    // For a write the pager notes it, and brings the page writable: one fault instead of two.
    let (value, faults) = clone.touch(31, Touch::Write(1), |_| copy(31, false));
    assert_eq!((value, faults), (1, vec![Fault::missing(31, true)]));
    assert_eq!(word_in(&file, 30), 0, "and no page is filled");
}

#[test]
fn protection_ends_with_the_pagers_tracking() {
    let tmpfs = Tmpfs::mount("huge=never");
    let file = tmpfs.sparse("pages", PAGES);
    let clone = clone_of(&file);
    clone.unprotect(0, PAGES);
    for page in 0..16 {
        assert_eq!(clone.touch_quietly(page, Touch::Write(1)), 1);
    }
    let (value, faults) = clone.touch(40, Touch::Write(1), |_| {
        // As for a clone that never was tracked.
        assert_eq!(clone.uffd.zeropage(clone.addr(40), PAGE, false).unwrap(), bytes(1));
    });
    assert_eq!((value, faults), (1, vec![Fault::missing(40, true)]));
}

#[test]
fn a_writer_that_is_not_woken_goes_on_when_it_is() {
    small_pages();
    let parent = Watched::anonymous(PAGES, WP);
    parent.touch_quietly(0, Touch::Write(1));
    parent.protect(0, 1);
    let writer = parent.start(0, Touch::Write(2));
    assert_eq!(parent.fault(), Fault::protected(0));
    parent.uffd.write_protect(parent.addr(0), PAGE, false, true).unwrap();
    parent.wake(0);
    assert_eq!(writer.finish(), 2);
    // Protecting wakes nobody, so the kernel takes no such wish.
    let err = parent.uffd.write_protect(parent.addr(0), PAGE, true, true).unwrap_err();
    assert_eq!(err.kind(), std::io::ErrorKind::InvalidInput);
}

#[test]
fn only_registered_memory_can_be_protected() {
    let parent = Watched::anonymous(PAGES, MISSING);
    let err = parent.uffd.write_protect(parent.addr(0), PAGE, true, false).unwrap_err();
    assert_eq!(err.kind(), std::io::ErrorKind::NotFound, "{err}");
    parent.uffd.unregister(parent.memory.addr(), parent.memory.len() as u64).unwrap();
    assert_eq!(parent.touch_quietly(0, Touch::Read), 0, "and memory that is not registered raises no fault");
}

#[test]
fn a_wake_without_a_change_raises_the_fault_again() {
    // How a pager that takes over learns of those that waited for the one before.
    small_pages();
    let parent = Watched::anonymous(PAGES, MISSING_WP);
    let mut times = 0;
    let (value, faults) = parent.touch(7, Touch::Read, |fault| {
        times += 1;
        if times < 3 {
            parent.uffd.wake(parent.memory.addr(), parent.memory.len() as u64).unwrap();
        } else {
            parent.uffd.copy(parent.addr(fault.page), &page_of(4), CopyMode::default()).unwrap();
        }
    });
    assert_eq!((value, faults), (4, vec![Fault::missing(7, false); 3]));
}
