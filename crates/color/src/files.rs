//! Files of the page cache: checked, named, counted.

use crate::{
    ColorMap, FileFacts, FileId, SuperblockFacts,
    kernel::Types,
    memory::ColorError,
    paging::{KernelSpace, printable},
};
use ramet_memory::{PAGE_SIZE, PageSet};
use std::collections::HashMap;

/// Most bytes of a path.
pub(crate) const MAX_PATH: usize = 255;
/// Most directories that are gone up for a path.
const MAX_DEPTH: usize = 24;
/// Most superblocks.
const MAX_SUPERBLOCKS: usize = 4096;
/// Most bytes of a superblock's name and of its type's.
const MAX_NAME: usize = 31;
/// Most names of directories that are kept while files are named.
const MAX_DIRECTORIES: usize = 8192;

/// What a `mapping` of the frame table is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lookup {
    /// A file.
    File(FileId),
    /// A file beyond the number of files that are kept.
    Uncounted,
    /// No file.
    No,
}

/// An earlier map of the same guest, whose files need not be looked at again where their inodes are unchanged.
pub(crate) struct Earlier<'a> {
    map: &'a ColorMap,
    changed: &'a PageSet,
    by_mapping: HashMap<u64, u32>,
}

impl<'a> Earlier<'a> {
    pub(crate) fn new(map: &'a ColorMap, changed: &'a PageSet) -> Self {
        let by_mapping = (0..).zip(&map.files).map(|(number, file)| (file.mapping, number)).collect();
        Self { map, changed, by_mapping }
    }
}

/// The files found so far.
pub(crate) struct Files<'a> {
    space: &'a KernelSpace<'a>,
    types: &'a Types,
    earlier: Option<Earlier<'a>>,
    by_mapping: HashMap<u64, Option<FileId>>,
    pub(crate) files: Vec<FileFacts>,
    /// Pages that the kernel says each file has, and pages that were found.
    counts: Vec<(u64, u64)>,
    pub(crate) superblocks: Vec<SuperblockFacts>,
    by_superblock: HashMap<u64, u32>,
    directories: HashMap<u64, String>,
    limit: usize,
    /// The last answer: pages of a file are mostly together.
    last: (u64, Lookup),
}

impl<'a> Files<'a> {
    pub(crate) fn new(space: &'a KernelSpace<'a>, types: &'a Types, earlier: Option<Earlier<'a>>) -> Self {
        Self {
            space,
            types,
            earlier,
            by_mapping: HashMap::new(),
            files: Vec::new(),
            counts: Vec::new(),
            superblocks: Vec::new(),
            by_superblock: HashMap::new(),
            directories: HashMap::new(),
            // So that what is kept of files stays a small part of the guest's memory.
            limit: usize::try_from(space.physical.pages().0 / 4).unwrap_or(0).max(1024),
            last: (0, Lookup::No),
        }
    }

    /// What the `struct address_space` at an address is, for a page of it.
    pub(crate) fn of(&mut self, mapping: u64, swap_backed: bool) -> Result<Lookup, ColorError> {
        if self.last.0 != mapping {
            self.last = (mapping, self.look_up(mapping, swap_backed)?);
        }
        Ok(self.last.1)
    }

    /// Counts a page of a file.
    pub(crate) fn count(&mut self, file: FileId) {
        if let Some((_, found)) = self.counts.get_mut(file.0 as usize) {
            *found += 1;
        }
    }

    /// Files whose number of pages is what their kernel says, and all files.
    pub(crate) fn agreeing(&self) -> (usize, usize) {
        // Files of huge pages are counted in these by some kernels.
        let kind = |file: &FileFacts| self.superblocks.get(file.superblock as usize).map(|s| s.kind.as_str());
        let counted = || self.files.iter().zip(&self.counts).filter(|(file, _)| kind(file) != Some("hugetlbfs"));
        (counted().filter(|(_, (said, found))| said == found).count(), counted().count())
    }

    fn look_up(&mut self, mapping: u64, swap_backed: bool) -> Result<Lookup, ColorError> {
        if let Some(known) = self.by_mapping.get(&mapping) {
            return Ok(known.map_or(Lookup::No, Lookup::File));
        }
        let host = self.check(mapping)?;
        if self.by_mapping.len() >= self.limit {
            return Ok(if host.is_some() { Lookup::Uncounted } else { Lookup::No });
        }
        let Some(host) = host else {
            self.by_mapping.insert(mapping, None);
            return Ok(Lookup::No);
        };
        let said = self.space.u64(mapping + self.types.nrpages)?.unwrap_or(0);
        let facts = match self.known_earlier(mapping, host) {
            Some(facts) => facts,
            None => self.describe(mapping, host)?,
        };
        let file = FileId(self.files.len() as u32);
        self.files.push(FileFacts { swap_backed, ..facts });
        self.counts.push((said, 0));
        self.by_mapping.insert(mapping, Some(file));
        Ok(Lookup::File(file))
    }

    /// The inode of a mapping that is one: the two point at each other.
    fn check(&self, mapping: u64) -> Result<Option<u64>, ColorError> {
        let (space, types) = (self.space, self.types);
        if !mapping.is_multiple_of(8) || space.direct_page(mapping).is_none() {
            return Ok(None);
        }
        let Some(host) = space.u64(mapping.wrapping_add(types.host))? else { return Ok(None) };
        if space.direct_page(host).is_none() {
            return Ok(None);
        }
        let back = space.u64(host.wrapping_add(types.i_mapping))?;
        Ok((back == Some(mapping)).then_some(host))
    }

    /// What was found out about a file earlier, when its inode has not changed since.
    fn known_earlier(&mut self, mapping: u64, host: u64) -> Option<FileFacts> {
        let earlier = self.earlier.as_ref()?;
        let changed = |va: u64| self.space.direct_page(va).is_none_or(|page| earlier.changed.contains(page));
        let last = host + self.types.i_mapping.max(self.types.i_ino).max(self.types.i_sb) + 8;
        if (host..last).step_by(PAGE_SIZE).chain([last]).any(changed) {
            return None;
        }
        let facts = earlier.map.files.get(*earlier.by_mapping.get(&mapping)? as usize)?;
        let superblock = earlier.map.superblocks.get(facts.superblock as usize)?;
        let (facts, superblock) = (facts.clone(), superblock.clone());
        let number = match self.superblocks.iter().position(|known| *known == superblock) {
            Some(number) => number as u32,
            None if self.superblocks.len() < MAX_SUPERBLOCKS => {
                self.superblocks.push(superblock);
                self.superblocks.len() as u32 - 1
            }
            None => return None,
        };
        Some(FileFacts { superblock: number, ..facts })
    }

    fn describe(&mut self, mapping: u64, host: u64) -> Result<FileFacts, ColorError> {
        let inode = self.space.u64(host + self.types.i_ino)?.unwrap_or(0);
        let superblock = self.space.u64(host + self.types.i_sb)?.unwrap_or(0);
        let superblock = self.superblock(superblock)?;
        let path = self.path(host)?;
        Ok(FileFacts { mapping, inode, superblock, swap_backed: false, path })
    }

    fn superblock(&mut self, va: u64) -> Result<u32, ColorError> {
        if let Some(&number) = self.by_superblock.get(&va) {
            return Ok(number);
        }
        let (space, types) = (self.space, self.types);
        let mut facts = SuperblockFacts::default();
        if space.direct_page(va).is_some() {
            if let Some(id) = types.sb_id {
                facts.id = space.text(va + id, MAX_NAME)?.unwrap_or_default();
            }
            if let Some(dev) = types.sb_dev {
                facts.device = space.u64(va + dev)?.unwrap_or(0) as u32;
            }
            if let (Some(of), Some(name)) = (types.sb_type, types.type_name)
                && let Some(kind) = space.u64(va + of)?
                && let Some(name) = space.u64(kind.wrapping_add(name))?
            {
                facts.kind = space.text(name, MAX_NAME)?.unwrap_or_default();
            }
        }
        let number = match self.superblocks.iter().position(|known| *known == facts) {
            Some(number) => number,
            None if self.superblocks.len() < MAX_SUPERBLOCKS => {
                self.superblocks.push(facts);
                self.superblocks.len() - 1
            }
            None => MAX_SUPERBLOCKS - 1,
        } as u32;
        if self.by_superblock.len() < MAX_SUPERBLOCKS {
            self.by_superblock.insert(va, number);
        }
        Ok(number)
    }

    /// The path of an inode's first name, within its file system.
    fn path(&mut self, host: u64) -> Result<String, ColorError> {
        let types = self.types;
        let (Some(list), Some(alias), Some(parent), Some(name)) =
            (types.i_dentry, types.dentry_alias, types.dentry_parent, types.dentry_name)
        else {
            return Ok(String::new());
        };
        let Some(node) = self.space.u64(host + list)?.filter(|&node| node != 0) else { return Ok(String::new()) };
        let mut dentry = node.wrapping_sub(alias);
        let mut path = String::new();
        for depth in 0..MAX_DEPTH {
            if depth > 0
                && let Some(directory) = self.directories.get(&dentry)
            {
                return Ok(joined(directory, &path));
            }
            if self.space.direct_page(dentry).is_none() {
                return Ok(cut(path));
            }
            let Some(up) = self.space.u64(dentry.wrapping_add(parent))? else { return Ok(cut(path)) };
            if up == dentry {
                // The root of the file system.
                return Ok(if path.is_empty() { "/".into() } else { joined("", &path) });
            }
            let Some(part) = self.name(dentry.wrapping_add(name))? else { return Ok(cut(path)) };
            path = if path.is_empty() { part } else { format!("{part}/{path}") };
            if path.len() > MAX_PATH {
                return Ok(cut(path));
            }
            if depth == 0 && self.directories.len() < MAX_DIRECTORIES && !self.directories.contains_key(&up) {
                // The directory of one file is mostly that of the next ones.
                let directory = self.directory(up, parent, name)?;
                self.directories.insert(up, directory);
            }
            dentry = up;
        }
        Ok(cut(path))
    }

    /// The path of a directory, without a slash at its end.
    fn directory(&self, mut dentry: u64, parent: u64, name: u64) -> Result<String, ColorError> {
        let mut path = String::new();
        for _ in 0..MAX_DEPTH {
            let Some(up) = self.space.u64(dentry.wrapping_add(parent))? else { return Ok(cut(path)) };
            if up == dentry {
                return Ok(if path.is_empty() { path } else { format!("/{path}") });
            }
            let Some(part) = self.name(dentry.wrapping_add(name))? else { return Ok(cut(path)) };
            path = if path.is_empty() { part } else { format!("{part}/{path}") };
            if path.len() > MAX_PATH {
                break;
            }
            dentry = up;
        }
        Ok(cut(path))
    }

    fn name(&self, at: u64) -> Result<Option<String>, ColorError> {
        let Some(va) = self.space.u64(at)? else { return Ok(None) };
        let mut bytes = [0; 64];
        let Some((_, mapped)) = self.space.translate(va) else { return Ok(None) };
        let len = bytes.len().min(usize::try_from(mapped).unwrap_or(64));
        Ok(if self.space.read(va, &mut bytes[..len])? { printable(&bytes[..len]) } else { None })
    }
}

fn joined(directory: &str, path: &str) -> String {
    let all = format!("{directory}/{path}");
    if all.len() > MAX_PATH { cut(all) } else { all }
}

/// The last parts of a path that is too long, or whose beginning is not known.
fn cut(path: String) -> String {
    const MARK: &str = "…/";
    if path.is_empty() {
        return path;
    }
    let mut start = (path.len() + MARK.len()).saturating_sub(MAX_PATH);
    while !path.is_char_boundary(start) {
        start += 1;
    }
    let rest = path[start..].trim_start_matches(MARK);
    format!("{MARK}{rest}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_paths_keep_their_end() {
        assert_eq!(joined("/a/b", "c"), "/a/b/c");
        let long = joined(&format!("/{}", "ä".repeat(200)), "end");
        assert!(long.len() <= MAX_PATH && long.starts_with("…/") && long.ends_with("/end"), "{long}");
        assert_eq!(cut("x/y".into()), "…/x/y");
        assert_eq!(cut(String::new()), "");
    }
}
