//! Why page files need a tmpfs without huge pages. Filling one page of a file on a tmpfs with huge pages brings 2 MiB, and
//! a clone then reads zeros where its parent had bytes: no fault tells the pager. The table of `check_page_file_mount`.

#![allow(clippy::unwrap_used, reason = "a failure ends the test")]

mod support;

use ramet_kernel::{CopyError, Mode};
use ramet_memory::{MountError, check_page_file_mount};
use std::{
    fs::{self, File},
    os::unix::fs::MetadataExt,
};
use support::{Fault, MISSING, MISSING_MINOR, MISSING_WP, PAGE, Tmpfs, Touch, Watched, fill, word_in};

/// Pages of a page file here: four huge ones.
const PAGES: u64 = 2048;
const HUGE: u64 = 512;
const EVERY: Mode = Mode { missing: true, wp: true, minor: true };

/// `force` puts huge pages on every tmpfs, `deny` on none: an administrator's setting, which tests leave alone.
fn shmem_enabled(setting: &str) -> bool {
    fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
        .is_ok_and(|text| text.contains(&format!("[{setting}]")))
}

/// A tmpfs with huge pages and a file there in which one page of 512 was filled, with the number of that page. `None`,
/// said loudly, where this kernel brings no huge page.
fn huge_file(options: &str, name: &str) -> Option<(Tmpfs, File, u64)> {
    let skip = |why: String| {
        eprintln!("\n!!! SKIPPED, NOT PROVED: silent zeros on a tmpfs with `{options}`: {why} !!!\n");
        None
    };
    if shmem_enabled("deny") {
        return skip("shmem_enabled is `deny`".into());
    }
    let tmpfs = match Tmpfs::try_mount(options) {
        Ok(tmpfs) => tmpfs,
        Err(err) => return skip(format!("this kernel can't mount it: {err}")),
    };
    let file = tmpfs.sparse(name, PAGES);
    // Memory may be too fragmented for one place and not for the next.
    for start in (0..PAGES).step_by(usize::try_from(HUGE).unwrap()) {
        let before = file.metadata().unwrap().blocks();
        fill(&file, start + 5, 1, 0x1111);
        let brought = (file.metadata().unwrap().blocks() - before) * 512;
        if brought == HUGE * PAGE {
            return Some((tmpfs, file, start + 5));
        }
    }
    skip("one page written brought one page".into())
}

#[test]
fn huge_pages_turn_missing_pages_into_zeros_without_a_fault() {
    for options in ["huge=always", "huge=within_size"] {
        for (name, mode) in [("missing", MISSING), ("tracked", MISSING_WP)] {
            let Some((_tmpfs, file, filled)) = huge_file(options, name) else { continue };
            let clone = Watched::of_file(&file, PAGES, mode);
            assert_eq!(clone.touch_quietly(filled, Touch::Read), 0x1111);
            for page in [filled - 5, filled - 1, filled + 1, filled + 2, filled + HUGE / 2, filled - 5 + HUGE - 1] {
                // Nobody ever filled this page: it is the parent's to give. Here it reads as zeros all the same.
                let (value, faults) = clone.touch(page, Touch::Read, |_| {
                    fill(&file, page, 1, page);
                    clone.wake(page);
                });
                assert_eq!((value, faults), (0, vec![]), "{options}, {name}: page {page} is right after all");
            }
            // No matter of a userfaultfd that does not work: the place of the next huge page raises a fault.
            let far = filled + HUGE;
            if far < PAGES {
                let (value, faults) = clone.touch(far, Touch::Read, |_| {
                    fill(&file, far, 1, 0x2222);
                    clone.wake(far);
                });
                assert_eq!((value, faults), (0x2222, vec![Fault::missing(far, false)]), "{options}, {name}");
            }
        }
    }
}

#[test]
fn minor_faults_tell_of_pages_that_came_along() {
    for options in ["huge=always", "huge=within_size"] {
        let Some((_tmpfs, file, filled)) = huge_file(options, "minor") else { continue };
        let clone = Watched::of_file(&file, PAGES, MISSING_MINOR);
        for page in [filled - 1, filled, filled + 1, filled + 300] {
            // With a record of its own of what it filled, the pager is asked in time and can put the bytes right.
            let (value, faults) = clone.touch(page, Touch::Read, |_| {
                fill(&file, page, 1, 0x3000 + page);
                if let Err(err) = clone.uffd.continue_(clone.addr(page), PAGE) {
                    // The kernel may tell of a fault again before the first answer to it has been seen.
                    assert!(matches!(err, CopyError::Exists), "{options}: {err}");
                    clone.wake(page);
                }
            });
            assert_eq!(value, 0x3000 + page, "{options}");
            assert!(
                !faults.is_empty() && faults.iter().all(|f| *f == Fault::minor(page, false)),
                "{options}: {faults:?}"
            );
        }
    }
}

/// Every page of a clone is touched: those that were filled show their bytes, each other raises a fault and then shows
/// what the pager brings.
fn every_page_is_right(options: &str, mode: Mode, write: bool) {
    let tmpfs = Tmpfs::mount(options);
    let file = tmpfs.sparse("pages", PAGES);
    // One page; a window of the prefetcher; across the places of huge pages; a whole huge page and one more.
    let filled = [(5, 1), (64, 16), (HUGE - 3, 7), (2 * HUGE, HUGE + 1)];
    for (page, pages) in filled {
        fill(&file, page, pages, 0x1111);
    }
    let is_filled = |page: u64| filled.iter().any(|&(start, pages)| (start..start + pages).contains(&page));
    let clone = Watched::of_file(&file, PAGES, mode);
    let near = |page: u64| (page.saturating_sub(1)..page + 2).any(|p| is_filled(p) != is_filled(page));
    for page in (0..PAGES).filter(|&page| page % 5 == 0 || near(page)) {
        let what = format!("`{options}`, {mode:?}, page {page}");
        let touch = if write { Touch::Write(0x4444) } else { Touch::Read };
        let (value, faults) = clone.touch(page, touch, |fault| {
            if fault.minor {
                clone.uffd.continue_(clone.addr(page), PAGE).unwrap();
            } else {
                fill(&file, page, 1, 0x2222);
                clone.wake(page);
            }
        });
        let bytes = if is_filled(page) { 0x1111 } else { 0x2222 };
        assert_eq!(value, if write { 0x4444 } else { bytes }, "{what}");
        let mut expected = Vec::new();
        if !is_filled(page) {
            expected.push(Fault::missing(page, write));
        }
        if mode.minor {
            expected.push(Fault::minor(page, write));
        }
        assert_eq!(faults, expected, "{what}");
        // What a clone writes is its own.
        assert_eq!(word_in(&file, page), bytes, "{what}");
    }
    // Only what was asked for came.
    let asked = (0..PAGES).filter(|&page| page % 5 == 0 || near(page) || is_filled(page)).count() as u64;
    assert_eq!(file.metadata().unwrap().blocks() * 512, asked * PAGE, "`{options}`, {mode:?}");
}

#[test]
fn without_huge_pages_every_missing_page_is_asked_for() {
    if shmem_enabled("force") {
        eprintln!("\n!!! SKIPPED, NOT PROVED: tmpfs without huge pages: shmem_enabled is `force` !!!\n");
        return;
    }
    for options in ["huge=never", "huge=advise", "size=64m"] {
        for mode in [MISSING, MISSING_WP, MISSING_MINOR, EVERY] {
            for write in [false, true] {
                every_page_is_right(options, mode, write);
            }
        }
    }
}

#[test]
fn the_check_refuses_mounts_that_corrupt_and_accepts_the_others() {
    for options in ["huge=always", "huge=within_size"] {
        let tmpfs = match Tmpfs::try_mount(options) {
            Ok(tmpfs) => tmpfs,
            Err(err) => {
                eprintln!(
                    "\n!!! SKIPPED, NOT PROVED: refusal of `{options}`, which this kernel can't mount: {err} !!!\n"
                );
                continue;
            }
        };
        let below = tmpfs.path().join("below");
        fs::create_dir(&below).unwrap();
        for dir in [tmpfs.path(), &below] {
            match check_page_file_mount(dir) {
                Err(MountError::HugePages { mount, option, .. }) => {
                    assert_eq!(mount, tmpfs.path().canonicalize().unwrap());
                    assert_eq!(option, options);
                }
                Err(MountError::Forced) if shmem_enabled("force") => {}
                other => panic!("`{options}` is not refused: {other:?}"),
            }
        }
        // The mount on top counts, whatever lies under it.
        if !shmem_enabled("force") {
            let inner = Tmpfs::try_mount_in(&below, "huge=never").unwrap();
            check_page_file_mount(inner.path()).unwrap();
        }
        assert!(check_page_file_mount(&below).is_err());
    }
    for options in ["huge=never", "huge=advise", "size=64m"] {
        let tmpfs = Tmpfs::mount(options);
        match check_page_file_mount(tmpfs.path()) {
            Err(MountError::Forced) => assert!(shmem_enabled("force")),
            other => other.unwrap_or_else(|err| panic!("`{options}`: {err}")),
        }
    }
    assert!(
        matches!(check_page_file_mount("/proc".as_ref()), Err(MountError::NotTmpfs { found, .. }) if found == "proc")
    );
}
