//! Recorded guests of several kernels: the map is what the kernel itself said of its pages, and nothing is called free where
//! anything speaks against it.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{Class, Frames, Memory, RECORDED, Recorded, frame};
use ramet_color::{Base, Color, ColorMap, CpuRoot, Method, PageFlags, Place, color};
use ramet_memory::{PageIndex, PageRun, PageSet};
use std::collections::BTreeMap;

fn colored(recorded: &Recorded) -> ColorMap {
    color(&recorded.fixture.memory(), &[recorded.fixture.cpu], None).unwrap()
}

fn free_pages(map: &ColorMap) -> Vec<u64> {
    (0..map.pages().0).filter(|&page| map.color(PageIndex(page)) == Color::Free).collect()
}

/// That nothing is called free, and the map says why.
#[track_caller]
fn assert_distrusted(map: &ColorMap, why: &str) {
    assert!(free_pages(map).is_empty(), "{}", map.trouble);
    assert!(map.trouble.contains("no page is called free") && map.trouble.contains(why), "{}", map.trouble);
}

#[test]
fn every_page_is_what_its_kernel_says() {
    for recorded in &RECORDED {
        let map = colored(recorded);
        assert_eq!(
            (map.method, map.trouble.as_str(), map.poisons_free),
            (Method::Full, "", false),
            "{}",
            recorded.file
        );
        let kernel = map.kernel.as_ref().unwrap();
        assert_eq!((kernel.release.as_str(), kernel.build.as_str()), (recorded.release, recorded.build));
        assert_eq!(kernel.levels, recorded.fixture.cpu.levels());
        for (page, &(class, executable)) in (0u64..).map(PageIndex).zip(&recorded.fixture.truth) {
            let color = map.color(page);
            let Some(class) = class else { continue };
            assert!(class.fits(color), "{}: {page:?} is {class:?}, called {color:?}", recorded.file);
            assert_eq!(color == Color::Free, class == Class::Buddy, "{}: {page:?}", recorded.file);
            let user_code = matches!(color, Color::UserCode | Color::CacheCode);
            assert_eq!(user_code, executable, "{}: {page:?} is {class:?}, called {color:?}", recorded.file);
            // The kernel maps pages of its own into processes, too.
            if !color.is_kernel() {
                assert_eq!(map.flags(page).has(PageFlags::EXECUTABLE), executable, "{}: {page:?}", recorded.file);
            }
            assert_eq!(map.may_be_zero(page), class == Class::Buddy);
        }
        assert!(free_pages(&map).len() > 1000 && map.colors().contains(&Color::Vmalloc), "{}", recorded.file);
    }
}

#[test]
fn files_and_processes_and_caches_have_their_names() {
    for recorded in &RECORDED {
        let map = colored(recorded);
        // What the guest's start made, and what was in its image.
        for (path, pages) in [("/srv/d/f39", 10), ("/usr/bin/busybox", 100), ("/usr/bin/ramet-truth", 50)] {
            let file = map.files.iter().position(|file| file.path == path).unwrap_or_else(|| panic!("{path}")) as u32;
            let offsets: Vec<u32> = (0..map.pages().0)
                .filter_map(|page| match map.place(PageIndex(page)) {
                    Some(Place::File(of, offset)) if of.0 == file => Some(offset),
                    _ => None,
                })
                .collect();
            assert!(offsets.len() >= pages, "{}: {path} has {} pages", recorded.file, offsets.len());
            assert_eq!(offsets.iter().collect::<std::collections::HashSet<_>>().len(), offsets.len(), "one page each");
        }
        assert!(map.superblocks.iter().any(|s| s.kind == "tmpfs" || s.kind == "rootfs"), "{:?}", map.superblocks);
        for (name, truth) in [("sleep", 1), ("awk", 1), ("ramet-truth", 1)] {
            let named = |process: &&ramet_color::ProcessFacts| process.command == name;
            assert!(map.processes.iter().filter(named).count() >= truth, "{}: {name}", recorded.file);
        }
        for process in map.processes.iter().filter(|process| process.pid != 0) {
            assert_eq!(recorded.fixture.processes.get(&process.pid), Some(&process.command), "{}", recorded.file);
        }
        for cache in ["dentry", "inode_cache", "task_struct", "vm_area_struct"] {
            assert!(map.caches.iter().any(|known| known == cache), "{}: {cache}", recorded.file);
        }
    }
}

#[test]
fn lists_of_pages_are_followed() {
    for recorded in &RECORDED {
        let map = colored(recorded);
        let mut lists: BTreeMap<u8, Vec<u32>> = BTreeMap::new();
        let (mut placed, mut all) = (0, 0);
        for (page, &(class, _)) in (0u64..).map(PageIndex).zip(&recorded.fixture.truth) {
            let (place, flags) = (map.lru(page), map.flags(page));
            if matches!(class, Some(Class::Anonymous | Class::File | Class::Shared)) {
                (placed, all) = (placed + u64::from(place.is_some()), all + 1);
            }
            if let Some(place) = place.filter(|_| !flags.has(PageFlags::COMPOUND)) {
                lists.entry(place.list).or_default().push(place.position);
            }
        }
        // Some are on a CPU's list of pages to be put into one.
        assert!(placed * 10 > all * 9, "{}: {placed} of {all}", recorded.file);
        assert!(lists.len() <= 32, "{}: {} lists", recorded.file, lists.len());
        assert!(lists.values().any(|positions| positions.len() > 500), "{}", recorded.file);
        for positions in lists.values_mut() {
            positions.sort_unstable();
            assert!(positions.windows(2).all(|two| two[0] < two[1]), "{}: a place for each", recorded.file);
        }
    }
}

#[test]
fn a_root_that_is_none_is_no_proof_of_a_kernel() {
    for recorded in &RECORDED {
        let memory = recorded.fixture.memory();
        // A page of zeros, one of objects, one beyond memory.
        let objects = recorded.fixture.truth.iter().position(|(class, _)| *class == Some(Class::Slab)).unwrap();
        for root in [0, objects as u64 * 4096, memory_end(recorded) + (1 << 30), u64::MAX] {
            let cpu = CpuRoot { cr3: root, cr4: recorded.fixture.cpu.cr4 };
            let map = color(&memory, &[cpu], None).unwrap();
            assert!(matches!(map.method, Method::None | Method::PageTables), "{root:#x}");
            assert!(map.kernel.is_none());
            assert!(free_pages(&map).is_empty());
            assert!(map.trouble.contains("do not fit the page tables"), "{}", map.trouble);
        }
        // Nor is a root whose tables have another number of levels.
        let cpu = CpuRoot { cr4: recorded.fixture.cpu.cr4 ^ (1 << 12), ..recorded.fixture.cpu };
        let map = color(&memory, &[cpu], None).unwrap();
        assert!(free_pages(&map).is_empty() && map.method != Method::Full, "{}: {}", recorded.file, map.trouble);
    }
}

fn memory_end(recorded: &Recorded) -> u64 {
    recorded.fixture.pages.size().bytes()
}

#[test]
fn without_roots_the_notes_are_believed() {
    for recorded in &RECORDED {
        let without = color(&recorded.fixture.memory(), &[], None).unwrap();
        assert_eq!(without, colored(recorded));
        // One CPU that runs on the kernel is enough: another may be on its way up.
        let cpus = [CpuRoot { cr3: 0, cr4: 0 }, recorded.fixture.cpu];
        assert_eq!(color(&recorded.fixture.memory(), &cpus, None).unwrap(), without);
    }
}

#[test]
fn an_earlier_map_saves_work_and_changes_nothing() {
    for recorded in &RECORDED {
        let fixture = &recorded.fixture;
        let first = colored(recorded);
        let none = PageSet::new(fixture.pages);
        let mut all = PageSet::new(fixture.pages);
        all.insert_run(PageRun { start: PageIndex(0), len: fixture.pages.0 });
        let mut read = Vec::new();
        // As it was made, and as it comes back from where it was kept.
        let kept = ColorMap::decode(&first.encode(), fixture.pages).unwrap();
        for (map, changed) in [(&first, &none), (&kept, &none), (&first, &all)] {
            let memory = fixture.memory();
            let again = color(&memory, &[fixture.cpu], Some(Base { map, changed })).unwrap();
            assert_eq!(again, first, "{}", recorded.file);
            read.push(memory.bytes_read.get());
        }
        let memory = fixture.memory();
        color(&memory, &[fixture.cpu], None).unwrap();
        assert_eq!(read[0], read[1]);
        assert!(read[1] < read[2] && read[2] < memory.bytes_read.get() / 2, "{read:?} {:?}", memory.bytes_read);
        // What is known of another kernel does not help, and does no harm.
        let other = colored(RECORDED.iter().find(|other| other.file != recorded.file).unwrap());
        // Nor does a map of another size.
        let small = ColorMap::unknown(ramet_memory::PageCount(7), "");
        for map in [&other, &small] {
            let again = color(&fixture.memory(), &[fixture.cpu], Some(Base { map, changed: &none })).unwrap();
            assert_eq!(again, first);
        }
    }
}

#[test]
fn what_changed_since_an_earlier_map_is_seen() {
    for recorded in &RECORDED {
        let fixture = &recorded.fixture;
        let first = colored(recorded);
        let frames = Frames::new(fixture, &first);
        // A page that was free belongs to the kernel now: marked in the frame table alone, and told as changed alone.
        let mut memory = fixture.memory();
        let page = single_free_page(&memory, &frames, &first);
        let at = frames.at(page).unwrap();
        memory.write(at + frame::KIND, &[0xff, 0xff, 0xff, 0xff, 1, 0, 0, 0]);
        let mut changed = PageSet::new(fixture.pages);
        changed.insert(PageIndex::of_offset(at));
        let base = Base { map: &first, changed: &changed };
        let map = color(&memory, &[fixture.cpu], Some(base)).unwrap();
        assert_eq!(map, color(&memory, &[fixture.cpu], None).unwrap());
        assert_eq!(map.color(PageIndex(page)), Color::KernelOther);
        assert_eq!(map.trouble, "");
        assert_eq!(free_pages(&map).len() + 1, free_pages(&first).len());
    }
}

/// A process's root that was given back and taken anew may hold the very bytes that it held before.
#[test]
fn a_root_that_looks_as_before_and_was_none_is_found() {
    for recorded in &RECORDED {
        let fixture = &recorded.fixture;
        let full = colored(recorded);
        let frames = Frames::new(fixture, &full);
        let init = full.processes.iter().find(|process| process.pid == 1).unwrap();
        let at = frames.at(init.root / 4096).unwrap();
        let mut earlier = fixture.memory();
        earlier.write(at + frame::KIND + 4, &[0; 4]);
        let before = color(&earlier, &[fixture.cpu], None).unwrap();
        assert!(!before.processes.contains(init), "a page without references is no root");
        let mut changed = PageSet::new(fixture.pages);
        changed.insert(PageIndex::of_offset(at));
        let base = Base { map: &before, changed: &changed };
        let map = color(&fixture.memory(), &[fixture.cpu], Some(base)).unwrap();
        assert!(map.processes.contains(init), "{}", recorded.file);
        assert_eq!(map, full);
    }
}

/// A free block of one page.
fn single_free_page(memory: &Memory<'_>, frames: &Frames, map: &ColorMap) -> u64 {
    free_pages(map).into_iter().find(|&page| frames.block(memory, page) == Some(0)).unwrap()
}

#[test]
fn a_free_block_that_makes_no_sense_makes_all_others_doubtful() {
    for recorded in &RECORDED {
        let fixture = &recorded.fixture;
        let map = colored(recorded);
        let frames = Frames::new(fixture, &map);
        let intact = fixture.memory();
        // An odd page whose block is one page: an order of 1 is misaligned.
        let odd = free_pages(&map).into_iter().find(|&page| page % 2 == 1 && frames.block(&intact, page) == Some(0));
        let head = frames.at(odd.unwrap()).unwrap();
        for (field, value) in [
            (frame::PRIVATE, &1u64.to_le_bytes()[..]),
            (frame::PRIVATE, &11u64.to_le_bytes()),
            (frame::PRIVATE, &u64::MAX.to_le_bytes()),
            (frame::REFERENCES, &1u32.to_le_bytes()),
            (frame::REFERENCES, &u32::MAX.to_le_bytes()),
        ] {
            let mut memory = fixture.memory();
            memory.write(head + field, value);
            let map = color(&memory, &[fixture.cpu], None).unwrap();
            assert_distrusted(&map, "1 free blocks make no sense");
            assert_eq!(map.method, Method::Full, "everything else is as it was");
        }
    }
}

#[test]
fn a_page_that_is_free_and_in_use_is_not_called_free() {
    for recorded in &RECORDED {
        let fixture = &recorded.fixture;
        let map = colored(recorded);
        let frames = Frames::new(fixture, &map);
        // Pages that a process maps, marked as free blocks: a few are left out, many make all doubtful.
        let mapped: Vec<u64> = (0..fixture.pages.0)
            .filter(|&page| map.color(PageIndex(page)) == Color::UserData && map.mapping(PageIndex(page)).is_some())
            .filter(|&page| !map.flags(PageIndex(page)).has(PageFlags::COMPOUND))
            .collect();
        let buddy = frames.at(free_pages(&map)[0]).unwrap();
        let buddy = fixture.memory().page(buddy / 4096)[(buddy % 4096 + frame::KIND) as usize..][..8].to_vec();
        for count in [1, 200] {
            let mut memory = fixture.memory();
            for &page in &mapped[..count] {
                let at = frames.at(page).unwrap();
                memory.write(at + frame::PRIVATE, &[0; 8]);
                memory.write(at + frame::KIND, &buddy);
            }
            let marked = color(&memory, &[fixture.cpu], None).unwrap();
            assert!(mapped[..count].iter().all(|&page| marked.color(PageIndex(page)) == Color::Unknown));
            if count == 1 {
                assert_eq!((marked.trouble.as_str(), free_pages(&marked)), ("", free_pages(&map)));
            } else {
                assert_distrusted(&marked, "200 free pages are in use");
            }
        }
    }
}

#[test]
fn page_tables_of_the_kernel_are_never_free() {
    for recorded in &RECORDED {
        let fixture = &recorded.fixture;
        let map = colored(recorded);
        let frames = Frames::new(fixture, &map);
        let buddy = frames.at(free_pages(&map)[0]).unwrap();
        let buddy = fixture.memory().page(buddy / 4096)[(buddy % 4096 + frame::KIND) as usize..][..8].to_vec();
        // A page table of the kernel alone: no process has it.
        let table = (0..fixture.pages.0)
            .find(|&page| {
                map.place(PageIndex(page)) == Some(Place::PageTable(1)) && fixture.class(page) != Some(Class::Table)
            })
            .or_else(|| (0..fixture.pages.0).find(|&page| map.place(PageIndex(page)) == Some(Place::PageTable(3))))
            .unwrap();
        let mut memory = fixture.memory();
        let at = frames.at(table).unwrap();
        memory.write(at + frame::PRIVATE, &[0; 8]);
        memory.write(at + frame::KIND, &buddy);
        let marked = color(&memory, &[fixture.cpu], None).unwrap();
        assert_ne!(marked.color(PageIndex(table)), Color::Free, "{}: {table}", recorded.file);
    }
}

#[test]
fn poisoned_free_pages_are_kept() {
    for recorded in &RECORDED {
        let fixture = &recorded.fixture;
        let map = colored(recorded);
        let free = free_pages(&map);
        for (byte, every, poisons) in [(0xaa, 1, true), (0xaa, 3, true), (0xaa, 17, false), (0xab, 1, false)] {
            let mut memory = fixture.memory();
            free.iter().step_by(every).for_each(|&page| memory.fill(page, byte));
            let poisoned = color(&memory, &[fixture.cpu], None).unwrap();
            assert_eq!(poisoned.poisons_free, poisons, "{byte:#x} in every {every}th");
            assert_eq!(free_pages(&poisoned), free);
            let may_be_zero = (0..fixture.pages.0).any(|page| poisoned.may_be_zero(PageIndex(page)));
            assert_eq!(may_be_zero, !poisons);
            assert_eq!(poisoned.trouble, "");
        }
    }
}
