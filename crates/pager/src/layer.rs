//! One layer on this host: its page file, what is known of each page, and the pages' checksums.
//!
//! # Files
//!
//! ```text
//! layers/ID/pages      the page file: sparse, as large as guest memory, page i at offset 4096 * i
//! layers/ID/states     one byte a page: its PageState (shared memory: survives a killed pager)
//! layers/ID/sums       one u64 a page: its checksum
//! layers/ID/layer.json the layer's base and size
//! layers/ID/owned      one bit a page: whether the layer owns it
//! ```
//!
//! Memory of the shared files is reserved before it is touched: on a full tmpfs a store into a hole ends the process.
//!
//! A layer's page file shows guest memory *as of that layer*: the pages that the layer owns and, filled in as they are
//! touched, pages of the layers below. What it shows of a page never changes once shown: a page file is only ever added
//! to, by whole-page writes, so a half-written page is never seen.
//!
//! # Life of a page
//!
//! ```text
//! Absent -> InFlight -> Present      owned by a layer of another host, or filled from a layer below
//!                    -> Zero
//! Owed -> Present | Zero | Same      owned by a layer whose parent VM runs here: copied out behind write protection
//! ```

use crate::session::CopySession;
use crate::source::Source;
use arc_swap::ArcSwapOption;
use ramet_kernel::SharedAtomics;
use ramet_memory::{LayerId, PAGE_SIZE, PageCount, PageIndex, PageRun, PageSet, page_checksum};
use rustix::fs::{FallocateFlags, fallocate};
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File},
    io,
    os::{
        fd::{AsFd, BorrowedFd},
        unix::fs::{FileExt, MetadataExt},
    },
    path::{Path, PathBuf},
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering},
    },
};

/// What a layer's page file has of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum PageState {
    /// Nothing: never asked for, or not owned and not filled.
    Absent = 0,
    /// Asked for from a source; the answer fills it.
    InFlight = 1,
    /// The page file holds its bytes.
    Present = 2,
    /// It is all zeros; the page file holds nothing.
    Zero = 3,
    /// It turned out to be the same as in the layers below, and is not stored again.
    Same = 4,
    /// Its bytes are still in the parent's memory, write-protected.
    Owed = 5,
}

impl PageState {
    const fn of(byte: u8) -> Self {
        match byte {
            1 => Self::InFlight,
            2 => Self::Present,
            3 => Self::Zero,
            4 => Self::Same,
            5 => Self::Owed,
            _ => Self::Absent,
        }
    }
}

/// Where the bytes of a page are.
#[derive(Debug, Clone)]
pub enum Located {
    /// All zeros.
    Zero,
    /// In this layer's page file.
    Stored(Arc<Layer>),
    /// In the memory of this layer's parent VM, not copied yet.
    Owed(Arc<Layer>),
    /// On another host, to be fetched as a page of this layer.
    Remote(Arc<Layer>),
}

#[derive(Debug, Serialize, Deserialize)]
struct Meta {
    base: Option<LayerId>,
    pages: u64,
    /// Whether another host made this layer.
    remote: bool,
}

/// A layer. See the module's documentation.
pub struct Layer {
    /// The layer's name.
    pub id: LayerId,
    /// The layer below; `None` at the bottom.
    pub base: Option<Arc<Layer>>,
    /// Pages of guest memory.
    pub pages: PageCount,
    dir: PathBuf,
    file: File,
    states: SharedAtomics,
    sums: SharedAtomics,
    /// One bit for each stretch of [`SUMS_STRETCH`] checksums whose memory is reserved.
    sums_reserved: Box<[AtomicU64]>,
    owned: OnceLock<PageSet>,
    settled: OnceLock<PageSet>,
    /// Where absent pages come from; `None` for a layer made here.
    pub source: ArcSwapOption<Source>,
    /// The copying of its pages out of the parent, while that goes on.
    pub session: ArcSwapOption<CopySession>,
    /// Whether another host made this layer.
    pub remote: bool,
    /// Pages fetched from another host.
    pub fetched: AtomicU64,
}

impl std::fmt::Debug for Layer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Layer").field("id", &self.id).field("pages", &self.pages).finish_non_exhaustive()
    }
}

/// Most pages that one read or write of a page file moves.
pub const BATCH: usize = 64;
/// Checksums in one page of memory.
const SUMS_STRETCH: u64 = PAGE_SIZE as u64 / 8;

/// Makes a file of shared numbers, or takes the one that is there, with memory for all of them.
pub(crate) fn reserve(path: &Path, words: usize) -> io::Result<()> {
    let file = File::options().write(true).create(true).truncate(false).open(path)?;
    reserve_bytes(&file, 0, words.max(1) as u64 * 8)
}

fn reserve_bytes(file: &File, start: u64, len: u64) -> io::Result<()> {
    loop {
        match fallocate(file, FallocateFlags::empty(), start, len) {
            Err(rustix::io::Errno::INTR) => {}
            // Not a tmpfs: only in tests.
            Err(rustix::io::Errno::OPNOTSUPP) => return file.set_len(file.metadata()?.len().max(start + len)),
            done => return Ok(done?),
        }
    }
}

impl Layer {
    /// Makes a new layer in `parent_dir/ID`.
    ///
    /// # Errors
    /// When files can't be made there; nothing is left.
    pub fn create(
        parent_dir: &Path,
        id: LayerId,
        base: Option<Arc<Self>>,
        pages: PageCount,
        remote: bool,
    ) -> io::Result<Arc<Self>> {
        let dir = parent_dir.join(id.to_string());
        fs::create_dir(&dir)?;
        let meta = Meta { base: base.as_ref().map(|b| b.id), pages: pages.0, remote };
        let made = fs::write(dir.join("layer.json"), serde_json::to_vec(&meta)?)
            .and_then(|()| Self::with_files(&dir, id, base, &meta, true));
        if made.is_err() {
            let _ = fs::remove_dir_all(&dir);
        }
        made
    }

    fn stored_meta(dir: &Path) -> io::Result<Meta> {
        Ok(serde_json::from_slice(&fs::read(dir.join("layer.json"))?)?)
    }

    /// Opens the layer that a pager before this one left in `parent_dir/ID`. Requests under way died with it.
    ///
    /// # Errors
    /// When a file is missing or has the wrong length.
    pub fn open(parent_dir: &Path, id: LayerId, base: Option<Arc<Self>>) -> io::Result<Arc<Self>> {
        let dir = parent_dir.join(id.to_string());
        let meta = Self::stored_meta(&dir)?;
        if meta.base != base.as_ref().map(|b| b.id) {
            return Err(io::Error::other(format!("layer {id} does not lie over the layer that its checkpoint names")));
        }
        let layer = Self::with_files(&dir, id, base, &meta, false)?;
        let words = fs::read(dir.join("owned"))?;
        if words.len() as u64 != layer.pages.0.div_ceil(64) * 8 {
            return Err(io::Error::other(format!("the list of pages of layer {id} is truncated")));
        }
        let words = words.chunks_exact(8).map(|w| u64::from_le_bytes(w.try_into().unwrap_or_default()));
        let _ = layer.owned.set(PageSet::from_words(layer.pages, words.collect()));
        let words = layer.states.len();
        for word in 0..words {
            let value = layer.states.get(word).load(Ordering::Relaxed);
            if value != 0 {
                for page in word as u64 * 8..word as u64 * 8 + 8 {
                    layer.change(PageIndex(page), PageState::InFlight, PageState::Absent);
                }
            }
        }
        Ok(layer)
    }

    fn with_files(
        dir: &Path,
        id: LayerId,
        base: Option<Arc<Self>>,
        meta: &Meta,
        create: bool,
    ) -> io::Result<Arc<Self>> {
        let pages = PageCount(meta.pages);
        let count = usize::try_from(pages.0).map_err(io::Error::other)?;
        let file = File::options().read(true).write(true).create_new(create).open(dir.join("pages"))?;
        if create {
            file.set_len(pages.size().bytes())?;
        } else if file.metadata()?.len() != pages.size().bytes() {
            return Err(io::Error::other(format!("page file of layer {id} is truncated")));
        }
        if create {
            reserve(&dir.join("states"), count.div_ceil(8))?;
        } else {
            for (name, words) in [("states", count.div_ceil(8)), ("sums", count)] {
                // Not to be made up for with zeros.
                if !dir.join(name).metadata().is_ok_and(|m| m.len() == words.max(1) as u64 * 8) {
                    return Err(io::Error::other(format!("file '{name}' of layer {id} is missing or truncated")));
                }
            }
        }
        let states = SharedAtomics::open(&dir.join("states"), count.div_ceil(8))?;
        let sums = SharedAtomics::open(&dir.join("sums"), count)?;
        Ok(Arc::new(Self {
            id,
            base,
            pages,
            dir: dir.to_owned(),
            file,
            states,
            sums,
            sums_reserved: (0..pages.0.div_ceil(SUMS_STRETCH * 64)).map(|_| AtomicU64::new(0)).collect(),
            owned: OnceLock::new(),
            settled: OnceLock::new(),
            source: ArcSwapOption::empty(),
            session: ArcSwapOption::empty(),
            remote: meta.remote,
            fetched: AtomicU64::new(0),
        }))
    }

    /// Removes the layer's files. VMs that map its page file keep what they map.
    ///
    /// # Errors
    /// When a file can't be removed.
    pub fn remove_files(&self) -> io::Result<()> {
        fs::remove_dir_all(&self.dir)
    }

    /// The pages that the layer owns; empty before [`Layer::set_owned`].
    #[must_use]
    pub fn owned(&self) -> Option<&PageSet> {
        self.owned.get()
    }

    /// Fixes which pages the layer owns, here and in its files. To be called once.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn set_owned(&self, owned: PageSet) -> io::Result<()> {
        let words: Vec<u8> = owned.words().iter().flat_map(|w| w.to_le_bytes()).collect();
        fs::write(self.dir.join("owned"), words)?;
        self.owned.set(owned).map_err(|_| io::Error::other("a layer's pages are fixed once"))
    }

    /// The layer and those below it, oldest first.
    #[must_use]
    pub fn stack(top: &Arc<Self>) -> Vec<Arc<Self>> {
        let mut layers: Vec<_> = std::iter::successors(Some(top), |l| l.base.as_ref()).cloned().collect();
        layers.reverse();
        layers
    }

    fn owns(&self, page: PageIndex) -> bool {
        self.owned.get().is_some_and(|o| o.contains(page))
    }

    /// The owned pages that the layer really holds: without those that turned out to be the same as below.
    #[must_use]
    pub fn settled(&self) -> PageSet {
        if self.remote || self.session.load().as_ref().is_some_and(|s| s.owed() > 0) {
            return self.owned.get().cloned().unwrap_or_default();
        }
        self.settled.get_or_init(|| self.settle()).clone()
    }

    fn settle(&self) -> PageSet {
        let mut set = PageSet::new(self.pages);
        for page in self.owned.get().iter().flat_map(|o| o.iter()) {
            if self.state(page) != PageState::Same {
                set.insert(page);
            }
        }
        set
    }

    fn place(&self, page: PageIndex) -> Option<(&AtomicU64, u32)> {
        (page.0 < self.pages.0).then(|| (self.states.get((page.0 / 8) as usize), (page.0 % 8) as u32 * 8))
    }

    /// What the page file has of `page`.
    #[must_use]
    pub fn state(&self, page: PageIndex) -> PageState {
        self.place(page)
            .map_or(PageState::Absent, |(word, shift)| PageState::of((word.load(Ordering::Acquire) >> shift) as u8))
    }

    /// Sets the state. Ordered after everything that this thread wrote before.
    pub fn set_state(&self, page: PageIndex, state: PageState) {
        if let Some((word, shift)) = self.place(page) {
            let _ = word.fetch_update(Ordering::AcqRel, Ordering::Acquire, |w| {
                Some((w & !(0xff << shift)) | (state as u64) << shift)
            });
        }
    }

    /// Changes the state if it is `from`; false if it was not.
    pub fn change(&self, page: PageIndex, from: PageState, to: PageState) -> bool {
        self.place(page).is_some_and(|(word, shift)| {
            word.fetch_update(Ordering::AcqRel, Ordering::Acquire, |w| {
                ((w >> shift) as u8 == from as u8).then_some((w & !(0xff << shift)) | (to as u64) << shift)
            })
            .is_ok()
        })
    }

    /// Sets the state of a run of pages that nobody else looks at yet.
    pub fn set_run(&self, run: PageRun, state: PageState) {
        let mut page = run.start.0;
        let end = run.end().0.min(self.pages.0);
        let all = u64::from_le_bytes([state as u8; 8]);
        while page < end {
            if page.is_multiple_of(8) && page + 8 <= end {
                self.states.get((page / 8) as usize).store(all, Ordering::Release);
                page += 8;
            } else {
                self.set_state(PageIndex(page), state);
                page += 1;
            }
        }
    }

    /// The checksum that the page was stored with.
    #[must_use]
    pub fn sum(&self, page: PageIndex) -> u64 {
        if page.0 < self.pages.0 { self.sums.get(page.0 as usize).load(Ordering::Relaxed) } else { 0 }
    }

    /// Finds the bytes of `page` as of this layer, going down where this layer does not own it. Two look-ups for pages
    /// of an image whose index names the owner; deeper only below a page that turned out unchanged.
    #[must_use]
    pub fn locate(self: &Arc<Self>, page: PageIndex) -> Located {
        let mut layer = self;
        loop {
            if layer.owns(page) {
                match layer.state(page) {
                    PageState::Present => return Located::Stored(layer.clone()),
                    PageState::Zero => return Located::Zero,
                    PageState::Owed => return Located::Owed(layer.clone()),
                    PageState::Absent | PageState::InFlight => return Located::Remote(layer.clone()),
                    PageState::Same => {}
                }
            }
            match &layer.base {
                Some(base) => layer = base,
                None => return Located::Zero,
            }
        }
    }

    /// Stores consecutive pages from `first` with their checksums, and then says that they are present.
    ///
    /// # Errors
    /// When the page file can't take them (no memory left on its tmpfs); no state changes.
    pub fn store(&self, first: PageIndex, bytes: &[u8], sums: impl Iterator<Item = u64>) -> io::Result<()> {
        debug_assert!(bytes.len().is_multiple_of(PAGE_SIZE));
        let count = (bytes.len() / PAGE_SIZE) as u64;
        self.reserve_sums(PageRun { start: first, len: count })?;
        self.file.write_all_at(bytes, first.offset())?;
        for (page, sum) in (first.0..first.0 + count).zip(sums) {
            self.sums.get(page as usize).store(sum, Ordering::Relaxed);
            self.set_state(PageIndex(page), PageState::Present);
        }
        Ok(())
    }

    /// Takes memory for the checksums of a run. One system call for each 2 MiB of a layer, the first time.
    fn reserve_sums(&self, run: PageRun) -> io::Result<()> {
        let end = run.end().0.min(self.pages.0);
        for stretch in run.start.0 / SUMS_STRETCH..end.div_ceil(SUMS_STRETCH) {
            let (word, bit) = (&self.sums_reserved[(stretch / 64) as usize], 1 << (stretch % 64));
            if word.load(Ordering::Relaxed) & bit == 0 {
                let start = stretch * SUMS_STRETCH;
                let len = SUMS_STRETCH.min(self.pages.0 - start);
                let file = File::options().write(true).open(self.dir.join("sums"))?;
                reserve_bytes(&file, start * 8, len * 8)?;
                word.fetch_or(bit, Ordering::Relaxed);
            }
        }
        Ok(())
    }

    /// Where absent pages come from.
    ///
    /// # Errors
    /// When nothing on record says so.
    pub fn required_source(&self) -> io::Result<Arc<Source>> {
        self.source.load_full().ok_or_else(|| {
            io::Error::other(format!(
                "no source for layer {}: no record says which host has its pages; add its checkpoint again from one that has",
                self.id
            ))
        })
    }

    /// Reads consecutive stored pages. Their checksums are not looked at.
    ///
    /// # Errors
    /// When the page file can't be read.
    pub fn read(&self, first: PageIndex, bytes: &mut [u8]) -> io::Result<()> {
        self.read_bytes(first.offset(), bytes)
    }

    /// Reads bytes of stored pages, from a byte of memory on. Their checksums are not looked at.
    ///
    /// # Errors
    /// When the page file can't be read.
    pub fn read_bytes(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(bytes, offset)
    }

    /// Reads one stored page and checks it.
    ///
    /// # Errors
    /// When it can't be read, or its checksum does not fit: the layer is damaged.
    pub fn read_checked(&self, page: PageIndex, bytes: &mut [u8; PAGE_SIZE]) -> io::Result<()> {
        self.read(page, bytes)?;
        if page_checksum(self.id, page, bytes) == self.sum(page) {
            Ok(())
        } else {
            Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("page {} of layer {} fails its checksum", page.0, self.id.short()),
            ))
        }
    }

    /// A read-only descriptor of the page file, to be mapped by a VMM.
    ///
    /// # Errors
    /// When it can't be opened.
    pub fn open_read_only(&self) -> io::Result<File> {
        File::open(self.dir.join("pages"))
    }

    /// The page file.
    #[must_use]
    pub fn page_file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Bytes that the page file takes in memory.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        self.file.metadata().map_or(0, |m| m.blocks() * 512)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(dir: &Path, base: Option<Arc<Layer>>, owned: &[u64]) -> Arc<Layer> {
        let layer = Layer::create(dir, LayerId::random(), base, PageCount(32), false).unwrap();
        let mut set = PageSet::new(PageCount(32));
        for &page in owned {
            set.insert(PageIndex(page));
        }
        layer.set_owned(set).unwrap();
        layer
    }

    #[test]
    fn pages_are_found_in_the_newest_layer_that_changed_them() {
        let dir = tempfile::tempdir().unwrap();
        let base = layer(dir.path(), None, &[1, 2, 3]);
        for page in 1..4 {
            base.store(PageIndex(page), &[page as u8; PAGE_SIZE], [7].into_iter()).unwrap();
        }
        let top = layer(dir.path(), Some(base.clone()), &[2, 3, 4]);
        top.set_state(PageIndex(2), PageState::Same);
        top.set_state(PageIndex(3), PageState::Zero);
        let stored_in = |page| match top.locate(PageIndex(page)) {
            Located::Stored(l) => Some(l.id),
            _ => None,
        };
        assert_eq!(stored_in(1), Some(base.id));
        assert_eq!(stored_in(2), Some(base.id));
        assert!(matches!(top.locate(PageIndex(3)), Located::Zero));
        assert!(matches!(top.locate(PageIndex(4)), Located::Remote(_)));
        assert!(matches!(top.locate(PageIndex(9)), Located::Zero));
        assert_eq!(top.settled().iter().map(|p| p.0).collect::<Vec<_>>(), [3, 4]);
    }

    #[test]
    fn a_damaged_page_is_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let layer = layer(dir.path(), None, &[5]);
        let page = PageIndex(5);
        let bytes = [9u8; PAGE_SIZE];
        layer.store(page, &bytes, [page_checksum(layer.id, page, &bytes)].into_iter()).unwrap();
        let mut out = [0u8; PAGE_SIZE];
        layer.read_checked(page, &mut out).unwrap();
        layer.file.write_all_at(&[1], page.offset() + 77).unwrap();
        let err = layer.read_checked(page, &mut out).unwrap_err().to_string();
        assert!(err.contains("page 5"), "{err}");
    }

    #[test]
    fn states_survive_the_pager_but_requests_under_way_do_not() {
        let dir = tempfile::tempdir().unwrap();
        let layer = layer(dir.path(), None, &[]);
        layer.set_run(PageRun { start: PageIndex(3), len: 20 }, PageState::Owed);
        assert!(layer.change(PageIndex(3), PageState::Owed, PageState::InFlight));
        assert!(!layer.change(PageIndex(3), PageState::Owed, PageState::Present));
        let id = layer.id;
        drop(layer);
        let again = Layer::open(dir.path(), id, None).unwrap();
        assert_eq!(again.state(PageIndex(2)), PageState::Absent);
        assert_eq!(again.state(PageIndex(3)), PageState::Absent);
        assert_eq!(again.state(PageIndex(22)), PageState::Owed);
        assert_eq!(again.state(PageIndex(23)), PageState::Absent);
        drop(again);
        let dir_of = dir.path().join(id.to_string());
        let owned = fs::read(dir_of.join("owned")).unwrap();
        let states = fs::read(dir_of.join("states")).unwrap();
        for (file, good) in [("owned", &owned[..]), ("states", &states), ("pages", &[])] {
            // Pages that no list names would read as zeros.
            fs::write(dir_of.join(file), &[0; 4096][..4]).unwrap();
            assert!(Layer::open(dir.path(), id, None).unwrap_err().to_string().contains("truncated"), "{file}");
            fs::write(dir_of.join(file), good).unwrap();
        }
        let err = Layer::open(dir.path(), id, Some(self::layer(dir.path(), None, &[]))).unwrap_err().to_string();
        assert!(err.contains("does not lie over"), "{err}");
    }
}
