use proptest::prelude::*;
use ramet_memory::{PageIndex, PageSet};

use super::*;
use crate::map::{RawMapping, RawPlace};
use crate::{CacheId, FileId, Mapping, ProcessFacts, ProcessId, SuperblockFacts};

/// A map with some files, processes and slab caches, its pages of these colors.
fn map(colors: &[Color]) -> ColorMap {
    let mut map = ColorMap::unknown(PageCount(colors.len() as u64), "");
    map.method = Method::Full;
    map.superblocks = vec![SuperblockFacts { id: "vda1".into(), kind: "ext4".into(), device: 1 }];
    map.files = (0..4)
        .map(|n| FileFacts {
            inode: 100 + n,
            superblock: u32::from(n == 3),
            path: format!("/f{n}"),
            ..FileFacts::default()
        })
        .collect();
    map.processes =
        (0..3).map(|n| ProcessFacts { root: 0x1000 * u64::from(n), pid: 10 + n, command: format!("p{n}") }).collect();
    map.caches = vec!["dentry".into(), "inode_cache".into()];
    map.colors = colors.to_vec();
    map
}

fn place(map: &mut ColorMap, page: usize, place: Place) {
    map.places[page] = RawPlace::new(place);
}

fn mapped(map: &mut ColorMap, page: usize, process: u16) {
    map.mappings[page] = RawMapping::new(Mapping { process: ProcessId(process), page: 7 });
}

fn set(pages: u64, held: &[u64]) -> PageSet {
    let mut set = PageSet::new(PageCount(pages));
    for &page in held {
        set.insert(PageIndex(page));
    }
    set
}

#[test]
fn a_summary_counts_what_the_map_holds() {
    use Color::{CacheCode, CacheData, Free, Slab, UserData};
    let mut map = map(&[CacheData, CacheCode, CacheData, UserData, UserData, Slab, Free, CacheData]);
    for (page, file) in [(0, 1), (1, 2), (2, 2), (7, 3)] {
        place(&mut map, page, Place::File(FileId(file), 0));
    }
    map.flags[2].set(PageFlags::ACTIVE);
    place(&mut map, 5, Place::Slab(CacheId(1)));
    for (page, process) in [(1, 2), (3, 2), (4, 1)] {
        mapped(&mut map, page, process);
    }

    let summary = Summary::of(&map, 3);
    assert_eq!((summary.memory, summary.pages), (8 * 4096, 8));
    assert_eq!((summary.files_total, summary.processes_total, summary.caches_total), (4, 3, 2));
    assert_eq!(summary.colors.len(), 11);
    let cache = ColorSummary { color: CacheData, pages: 3, bytes: 3 * 4096 };
    assert_eq!(summary.colors[CacheData as usize], cache);
    assert_eq!(summary.files.iter().map(|file| file.inode).collect::<Vec<_>>(), [102, 101, 103]);
    let first = &summary.files[0];
    assert_eq!((first.pages, first.executable_pages, first.active_pages), (2, 1, 1));
    assert_eq!((&*first.superblock, &*first.file_system), ("vda1", "ext4"));
    assert_eq!(summary.files[2].superblock, "", "an unknown superblock is no name");
    assert_eq!(summary.processes.iter().map(|process| process.pid).collect::<Vec<_>>(), [12, 11, 10]);
    let first = &summary.processes[0];
    assert_eq!((first.pages, first.data_pages, first.cache_pages, first.root), (2, 1, 1, 0x2000));
    assert_eq!(summary.caches[0], CacheSummary { name: "inode_cache".into(), pages: 1 });
}

#[test]
fn numbers_that_the_map_does_not_know_are_passed_over() {
    let mut map = map(&[Color::CacheData, Color::Slab]);
    place(&mut map, 0, Place::File(FileId(99), 0));
    place(&mut map, 1, Place::Slab(CacheId(99)));
    mapped(&mut map, 0, 99);
    let summary = Summary::of(&map, usize::MAX);
    assert_eq!((summary.files.len(), summary.processes.len(), summary.caches.len()), (4, 3, 2));
    assert!(summary.files.iter().all(|file| file.pages == 0));
    let diff = Diff::of(&map, &map, &set(2, &[0, 1])).unwrap();
    assert_eq!((diff.files_total, diff.processes_total), (0, 0));
}

#[test]
fn an_empty_map_has_a_summary_and_a_diff() {
    let empty = ColorMap::unknown(PageCount(0), "not a Linux");
    let summary = Summary::of(&empty, 10);
    assert_eq!((summary.memory, summary.colors.len(), &*summary.trouble), (0, 11, "not a Linux"));
    let diff = Diff::of(&empty, &empty, &set(0, &[])).unwrap();
    assert_eq!((diff.changed_pages, diff.transitions.len()), (0, 0));
}

#[test]
fn a_diff_tells_changes_of_contents_from_changes_of_color() {
    use Color::{CacheData, Free, UserData};
    let old = map(&[Free, Free, Free, UserData, CacheData, UserData]);
    let mut new = map(&[UserData, UserData, CacheData, Free, CacheData, UserData]);
    for (page, file) in [(2, 3), (4, 1)] {
        place(&mut new, page, Place::File(FileId(file), 0));
    }
    for page in [0, 1, 5] {
        mapped(&mut new, page, u16::from(page != 5));
    }

    let diff = Diff::of(&old, &new, &set(6, &[0, 1, 2, 5])).unwrap();
    assert_eq!((diff.pages, diff.changed_pages, diff.recolored_pages), (6, 4, 4));
    assert_eq!(
        diff.transitions,
        [
            Transition { from: Free, to: UserData, pages: 2, changed_pages: 2 },
            Transition { from: UserData, to: Free, pages: 1, changed_pages: 0 },
            Transition { from: Free, to: CacheData, pages: 1, changed_pages: 1 },
        ]
    );
    let user = &diff.colors[UserData as usize];
    assert_eq!((user.pages, user.changed_pages, user.gained_pages, user.lost_pages), (3, 3, 2, 1));
    let free = &diff.colors[Free as usize];
    assert_eq!((free.pages, free.changed_pages, free.gained_pages, free.lost_pages), (1, 0, 1, 3));
    assert_eq!((diff.files_total, diff.files[0].inode, diff.files[0].changed_pages), (1, 103, 1));
    assert_eq!(diff.processes.iter().map(|p| (p.pid, p.changed_pages)).collect::<Vec<_>>(), [(11, 2), (10, 1)]);
}

#[test]
fn maps_of_different_sizes_are_not_compared() {
    let (small, large) = (map(&[Color::Free]), map(&[Color::Free; 2]));
    for (old, new, universe) in [(&small, &large, 2), (&large, &small, 1), (&small, &small, 2)] {
        let error = Diff::of(old, new, &set(universe, &[])).unwrap_err();
        assert_eq!((error.old, error.new, error.changed), (old.pages().0, new.pages().0, universe));
    }
}

#[test]
fn names_in_json_are_plain() {
    let json = serde_json::to_value(Summary::of(&map(&[Color::CacheData]), 1)).unwrap();
    assert_eq!(json["colors"][9], serde_json::json!({ "color": "cache-data", "pages": 1, "bytes": 4096 }));
    assert_eq!(json["files"][0]["executable_pages"], 0);
    let again: Summary = serde_json::from_value(json).unwrap();
    assert_eq!(again, Summary::of(&map(&[Color::CacheData]), 1));
}

proptest! {
    #[test]
    fn the_largest_are_those_of_a_full_sort(sizes in prop::collection::vec(0u64..8, 0..60), most in 0usize..70) {
        let mut model: Vec<usize> = (0..sizes.len()).collect();
        model.sort_by(|&a, &b| sizes[b].cmp(&sizes[a]).then(a.cmp(&b)));
        model.truncate(most);
        prop_assert_eq!(largest(sizes.len(), most, |number| sizes[number]), model);
    }

    #[test]
    fn every_page_of_a_diff_is_counted_once(
        pages in prop::collection::vec((0u8..11, 0u8..11, any::<bool>()), 0..200),
    ) {
        let color = |number| Color::from_number(number).unwrap();
        let old = map(&pages.iter().map(|page| color(page.0)).collect::<Vec<_>>());
        let new = map(&pages.iter().map(|page| color(page.1)).collect::<Vec<_>>());
        let held: Vec<u64> = (0..pages.len() as u64).filter(|&page| pages[page as usize].2).collect();
        let diff = Diff::of(&old, &new, &set(pages.len() as u64, &held)).unwrap();
        let sum = |of: fn(&ColorDiff) -> u64| diff.colors.iter().map(of).sum::<u64>();
        prop_assert_eq!(sum(|color| color.pages), pages.len() as u64);
        prop_assert_eq!(sum(|color| color.changed_pages), held.len() as u64);
        prop_assert_eq!(sum(|color| color.gained_pages), diff.recolored_pages);
        prop_assert_eq!(sum(|color| color.lost_pages), diff.recolored_pages);
        for color in Summary::of(&new, 0).colors {
            prop_assert_eq!(color.pages, diff.colors[color.color as usize].pages);
        }
    }
}
