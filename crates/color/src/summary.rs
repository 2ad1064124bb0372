//! A color map in numbers: what a guest's memory holds, and what became of it between two checkpoints.

mod diff;
#[cfg(test)]
mod tests;

use std::cmp::Reverse;

use ramet_memory::PageCount;
use serde::{Deserialize, Serialize};

pub use diff::{ColorDiff, Diff, FileDiff, MapsDiffer, ProcessDiff, Transition};

use crate::{Color, ColorMap, FileFacts, KernelFacts, Method, PageFlags, Place};

/// A color map in numbers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Summary {
    /// How the map was made, and so what it can tell.
    pub method: Method,
    /// Why no more could be found out; empty when everything was.
    pub trouble: String,
    /// The guest's kernel, when it is one that was understood.
    pub kernel: Option<KernelFacts>,
    /// Whether the guest fills free pages with a pattern that it checks later.
    pub poisons_free: bool,
    /// The guest's memory, in bytes.
    pub memory: u64,
    /// The guest's memory, in pages of 4 KiB.
    pub pages: u64,
    /// Every color, in the order of their numbers, those without pages too.
    pub colors: Vec<ColorSummary>,
    /// Number of files with pages in memory.
    pub files_total: u64,
    /// Those of them with the most pages in memory, largest first.
    pub files: Vec<FileSummary>,
    /// Number of processes.
    pub processes_total: u64,
    /// Those of them with the most pages, largest first.
    pub processes: Vec<ProcessSummary>,
    /// Number of slab caches.
    pub caches_total: u64,
    /// Those of them with the most pages, largest first.
    pub caches: Vec<CacheSummary>,
}

/// How much of a guest's memory is of one color.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ColorSummary {
    /// The color.
    pub color: Color,
    /// What is of this color, in pages of 4 KiB.
    pub pages: u64,
    /// What is of this color, in bytes.
    pub bytes: u64,
}

/// A file with pages in memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileSummary {
    /// Path within its file system, or its last parts (after `…/`); empty when it has no name.
    pub path: String,
    /// Its inode's number.
    pub inode: u64,
    /// Its superblock's `s_id`, such as `vda1`; empty when not known.
    pub superblock: String,
    /// Its file system's type, such as `ext4`; empty when not known.
    pub file_system: String,
    /// What is in memory of it, in pages of 4 KiB.
    pub pages: u64,
    /// What some process maps executable of that, in pages of 4 KiB.
    pub executable_pages: u64,
    /// What is on the kernel's active lists of that, in pages of 4 KiB. Always 0 with the multi-generational LRU.
    pub active_pages: u64,
}

/// A process. A page that several map counts for only one of them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessSummary {
    /// Its number in the guest; 0 when not known.
    pub pid: u32,
    /// Its command's name; empty when not known.
    pub command: String,
    /// Guest-physical address of its page-table root, in bytes.
    pub root: u64,
    /// All pages attributed to it, of whatever color, in pages of 4 KiB.
    pub pages: u64,
    /// Those that are user data, in pages of 4 KiB.
    pub data_pages: u64,
    /// Those that are in the page cache, in pages of 4 KiB.
    pub cache_pages: u64,
}

/// A cache of the kernel's slab allocator.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheSummary {
    /// Its name, such as `dentry`.
    pub name: String,
    /// What it takes, in pages of 4 KiB.
    pub pages: u64,
}

impl Summary {
    /// The numbers of a map, with at most `largest` files, processes and slab caches each.
    ///
    /// Takes time linear in the map's size. Of those with as many pages, the one with the lower number in the map comes
    /// first, so a map always gives the same summary.
    #[must_use]
    pub fn of(map: &ColorMap, largest: usize) -> Self {
        let counts = Counts::of(map);
        Self {
            method: map.method,
            trouble: map.trouble.clone(),
            kernel: map.kernel.clone(),
            poisons_free: map.poisons_free,
            memory: map.memory().bytes(),
            pages: map.pages().0,
            colors: Color::ALL.into_iter().map(|color| counts.color(color)).collect(),
            files_total: map.files.len() as u64,
            files: counts.largest_files(map, largest),
            processes_total: map.processes.len() as u64,
            processes: counts.largest_processes(map, largest),
            caches_total: map.caches.len() as u64,
            caches: counts.largest_caches(map, largest),
        }
    }
}

/// Pages of everything in a map, by the map's numbers.
struct Counts {
    colors: [u64; Color::ALL.len()],
    files: Vec<FileCount>,
    processes: Vec<ProcessCount>,
    caches: Vec<u64>,
}

#[derive(Clone, Default)]
struct FileCount {
    pages: u64,
    executable: u64,
    active: u64,
}

#[derive(Clone, Default)]
struct ProcessCount {
    pages: u64,
    data: u64,
    cache: u64,
}

impl Counts {
    fn of(map: &ColorMap) -> Self {
        let mut counts = Self {
            colors: [0; Color::ALL.len()],
            files: vec![FileCount::default(); map.files.len()],
            processes: vec![ProcessCount::default(); map.processes.len()],
            caches: vec![0; map.caches.len()],
        };
        for (at, &color) in map.colors.iter().enumerate() {
            counts.colors[color as usize] += 1;
            match map.places[at].get() {
                Some(Place::File(file, _)) => counts.count_file(file.0, color, map.flags[at]),
                Some(Place::Slab(cache)) => {
                    if let Some(pages) = counts.caches.get_mut(cache.0 as usize) {
                        *pages += 1;
                    }
                }
                _ => {}
            }
            if let Some(mapping) = map.mappings[at].get() {
                counts.count_process(mapping.process.0, color);
            }
        }
        counts
    }

    fn count_file(&mut self, file: u32, color: Color, flags: PageFlags) {
        let Some(file) = self.files.get_mut(file as usize) else { return };
        file.pages += 1;
        file.executable += u64::from(color == Color::CacheCode || flags.has(PageFlags::EXECUTABLE));
        file.active += u64::from(flags.has(PageFlags::ACTIVE));
    }

    fn count_process(&mut self, process: u16, color: Color) {
        let Some(process) = self.processes.get_mut(usize::from(process)) else { return };
        process.pages += 1;
        process.data += u64::from(color == Color::UserData);
        process.cache += u64::from(color.is_cache());
    }

    fn color(&self, color: Color) -> ColorSummary {
        let pages = self.colors[color as usize];
        ColorSummary { color, pages, bytes: PageCount(pages).size().bytes() }
    }

    fn largest_files(&self, map: &ColorMap, most: usize) -> Vec<FileSummary> {
        let summary = |number: usize| {
            let (file, count) = (&map.files[number], &self.files[number]);
            let (superblock, file_system) = file_system(map, file);
            FileSummary {
                path: file.path.clone(),
                inode: file.inode,
                superblock,
                file_system,
                pages: count.pages,
                executable_pages: count.executable,
                active_pages: count.active,
            }
        };
        largest(self.files.len(), most, |number| self.files[number].pages).into_iter().map(summary).collect()
    }

    fn largest_processes(&self, map: &ColorMap, most: usize) -> Vec<ProcessSummary> {
        let summary = |number: usize| {
            let (process, count) = (&map.processes[number], &self.processes[number]);
            ProcessSummary {
                pid: process.pid,
                command: process.command.clone(),
                root: process.root,
                pages: count.pages,
                data_pages: count.data,
                cache_pages: count.cache,
            }
        };
        largest(self.processes.len(), most, |number| self.processes[number].pages).into_iter().map(summary).collect()
    }

    fn largest_caches(&self, map: &ColorMap, most: usize) -> Vec<CacheSummary> {
        let summary = |number: usize| CacheSummary { name: map.caches[number].clone(), pages: self.caches[number] };
        largest(self.caches.len(), most, |number| self.caches[number]).into_iter().map(summary).collect()
    }
}

/// The `s_id` and type of a file's file system; both empty when not known.
fn file_system(map: &ColorMap, file: &FileFacts) -> (String, String) {
    let superblock = map.superblocks.get(file.superblock as usize);
    superblock.map(|found| (found.id.clone(), found.kind.clone())).unwrap_or_default()
}

/// Of the numbers `0..total`, the `most` with the largest size, largest first; ties by number. All are sorted only
/// when all are asked for.
fn largest(total: usize, most: usize, size: impl Fn(usize) -> u64) -> Vec<usize> {
    let key = |&number: &usize| (Reverse(size(number)), number);
    let mut numbers: Vec<usize> = (0..total).collect();
    if most < total {
        numbers.select_nth_unstable_by_key(most, key);
        numbers.truncate(most);
    }
    numbers.sort_unstable_by_key(key);
    numbers
}
