//! What became of a guest's memory between two checkpoints, in numbers.

use std::cmp::Reverse;

use ramet_memory::{PageCount, PageSet};
use serde::{Deserialize, Serialize};

use super::{file_system, largest};
use crate::{Color, ColorMap, Place};

const COLORS: usize = Color::ALL.len();

/// What became of a guest's memory between two checkpoints.
///
/// A page *changed* when its contents differ. That is apart from its color: a page can change and keep its color, and
/// another can be freed with nothing written to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Diff {
    /// The guest's memory, in pages of 4 KiB.
    pub pages: u64,
    /// What has other contents than before, in pages of 4 KiB.
    pub changed_pages: u64,
    /// What has another color than before, in pages of 4 KiB.
    pub recolored_pages: u64,
    /// Every color, in the order of their numbers, those without pages too.
    pub colors: Vec<ColorDiff>,
    /// Every change of color that some page made, the most frequent first.
    pub transitions: Vec<Transition>,
    /// Number of files (of the new map) with changed pages.
    pub files_total: u64,
    /// Those of them with the most changed pages, largest first; at most [`Diff::LARGEST`].
    pub files: Vec<FileDiff>,
    /// Number of processes (of the new map) with changed pages.
    pub processes_total: u64,
    /// Those of them with the most changed pages, largest first; at most [`Diff::LARGEST`].
    pub processes: Vec<ProcessDiff>,
}

/// What became of one color.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ColorDiff {
    /// The color.
    pub color: Color,
    /// What is of this color now, in pages of 4 KiB.
    pub pages: u64,
    /// What of that has other contents than before, in pages of 4 KiB.
    pub changed_pages: u64,
    /// What became this color, in pages of 4 KiB.
    pub gained_pages: u64,
    /// What stopped being this color, in pages of 4 KiB.
    pub lost_pages: u64,
}

/// Pages that went from one color to another.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transition {
    /// The color they had.
    pub from: Color,
    /// The color they have now.
    pub to: Color,
    /// How many they are, in pages of 4 KiB.
    pub pages: u64,
    /// How many of them have other contents than before, in pages of 4 KiB.
    pub changed_pages: u64,
}

/// A file with changed pages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileDiff {
    /// Path within its file system, or its last parts (after `…/`); empty when it has no name.
    pub path: String,
    /// Its inode's number.
    pub inode: u64,
    /// Its superblock's `s_id`, such as `vda1`; empty when not known.
    pub superblock: String,
    /// Its file system's type, such as `ext4`; empty when not known.
    pub file_system: String,
    /// What is in memory of it now and has other contents than those pages of memory had, in pages of 4 KiB.
    pub changed_pages: u64,
}

/// A process with changed pages.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProcessDiff {
    /// Its number in the guest; 0 when not known.
    pub pid: u32,
    /// Its command's name; empty when not known.
    pub command: String,
    /// Guest-physical address of its page-table root, in bytes.
    pub root: u64,
    /// What the new map attributes to it and has other contents than before, in pages of 4 KiB.
    pub changed_pages: u64,
}

/// Two maps, or a map and a set of pages, that are not of guests of one size.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "cannot compare: the old map has {old} pages, the new one {new}, and the set of changed pages is over {changed}"
)]
pub struct MapsDiffer {
    /// Pages of the old map.
    pub old: u64,
    /// Pages of the new map.
    pub new: u64,
    /// Pages that the set of changed pages is over.
    pub changed: u64,
}

impl Diff {
    /// The most files, and the most processes, that are listed.
    pub const LARGEST: usize = 32;

    /// What became of `old` in `new`, when the contents of just the pages in `changed` differ.
    ///
    /// Takes time linear in the maps' size. Ties are in the order of the maps' numbers, so two maps always give the
    /// same answer.
    ///
    /// # Errors
    /// The three are not of one size.
    pub fn of(old: &ColorMap, new: &ColorMap, changed: &PageSet) -> Result<Self, MapsDiffer> {
        let sizes = [old.pages(), new.pages(), changed.universe()];
        if sizes != [new.pages(); 3] {
            let [PageCount(old), PageCount(new), PageCount(changed)] = sizes;
            return Err(MapsDiffer { old, new, changed });
        }
        let moves = Moves::of(old, new, changed);
        let (files, processes) = changed_by_owner(new, changed);
        let transitions = moves.transitions();
        Ok(Self {
            pages: new.pages().0,
            changed_pages: changed.count().0,
            recolored_pages: transitions.iter().map(|transition| transition.pages).sum(),
            colors: Color::ALL.into_iter().map(|color| moves.color(color)).collect(),
            transitions,
            files_total: some(&files),
            files: largest_files(new, &files),
            processes_total: some(&processes),
            processes: largest_processes(new, &processes),
        })
    }
}

/// Pages of every pair of an old and a new color.
struct Moves {
    pages: [[u64; COLORS]; COLORS],
    changed: [[u64; COLORS]; COLORS],
}

impl Moves {
    fn of(old: &ColorMap, new: &ColorMap, changed: &PageSet) -> Self {
        let mut moves = Self { pages: [[0; COLORS]; COLORS], changed: [[0; COLORS]; COLORS] };
        for (&from, &to) in old.colors.iter().zip(&new.colors) {
            moves.pages[from as usize][to as usize] += 1;
        }
        for page in changed.iter() {
            moves.changed[old.color(page) as usize][new.color(page) as usize] += 1;
        }
        moves
    }

    fn color(&self, color: Color) -> ColorDiff {
        let (at, stayed) = (color as usize, self.pages[color as usize][color as usize]);
        let to = |pages: &[[u64; COLORS]; COLORS]| pages.iter().map(|from| from[at]).sum::<u64>();
        let pages = to(&self.pages);
        ColorDiff {
            color,
            pages,
            changed_pages: to(&self.changed),
            gained_pages: pages - stayed,
            lost_pages: self.pages[at].iter().sum::<u64>() - stayed,
        }
    }

    fn transitions(&self) -> Vec<Transition> {
        let pairs = Color::ALL.into_iter().flat_map(|from| Color::ALL.into_iter().map(move |to| (from, to)));
        let mut found: Vec<Transition> = pairs
            .filter(|(from, to)| from != to)
            .map(|(from, to)| Transition {
                from,
                to,
                pages: self.pages[from as usize][to as usize],
                changed_pages: self.changed[from as usize][to as usize],
            })
            .filter(|transition| transition.pages > 0)
            .collect();
        found.sort_by_key(|transition| (Reverse(transition.pages), transition.from, transition.to));
        found
    }
}

/// Changed pages of every file and of every process, by their numbers in the map.
fn changed_by_owner(map: &ColorMap, changed: &PageSet) -> (Vec<u64>, Vec<u64>) {
    let mut files = vec![0; map.files.len()];
    let mut processes = vec![0; map.processes.len()];
    for page in changed.iter() {
        if let Some(Place::File(file, _)) = map.place(page) {
            count(&mut files, file.0 as usize);
        }
        if let Some(mapping) = map.mapping(page) {
            count(&mut processes, usize::from(mapping.process.0));
        }
    }
    (files, processes)
}

fn count(counts: &mut [u64], number: usize) {
    if let Some(count) = counts.get_mut(number) {
        *count += 1;
    }
}

/// How many have any.
fn some(counts: &[u64]) -> u64 {
    counts.iter().filter(|&&count| count > 0).count() as u64
}

fn largest_files(map: &ColorMap, changed: &[u64]) -> Vec<FileDiff> {
    let diff = |number: usize| {
        let file = &map.files[number];
        let (superblock, file_system) = file_system(map, file);
        FileDiff { path: file.path.clone(), inode: file.inode, superblock, file_system, changed_pages: changed[number] }
    };
    largest_of(changed).map(diff).collect()
}

fn largest_processes(map: &ColorMap, changed: &[u64]) -> Vec<ProcessDiff> {
    let diff = |number: usize| {
        let process = &map.processes[number];
        let command = process.command.clone();
        ProcessDiff { pid: process.pid, command, root: process.root, changed_pages: changed[number] }
    };
    largest_of(changed).map(diff).collect()
}

/// The numbers of the largest counts that are not 0.
fn largest_of(counts: &[u64]) -> impl Iterator<Item = usize> {
    largest(counts.len(), Diff::LARGEST, |number| counts[number]).into_iter().filter(|&number| counts[number] > 0)
}
