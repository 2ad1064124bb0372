//! The pages of one remote disk that this host has: those of its golden image, and those fetched so far.
//!
//! # Files
//!
//! ```text
//! ID.pages   page n at n * 4096; sparse
//! ID.have    header (4096 bytes: magic, boot id, disk, size) | a bit for each page that is there
//! ```
//!
//! A page is written before its bit. So after the death of this process the bits are right, whenever it died. After a
//! crash of the machine they may not be: then the boot id is another one, and both files are made anew.

use crate::{
    DiskId, Extent, ExtentMap, Kind, PAGE,
    control::Stalled,
    nbd::Disk,
    source::{Run, Sink, Upstream},
};
use arc_swap::ArcSwapOption;
use std::{
    collections::BTreeMap,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// Pages of a fetch where nothing else is said: 32 KiB.
pub const FETCH_PAGES: u64 = 8;
/// A reader that has waited for this long is stalled.
const STALLED: Duration = Duration::from_secs(1);
/// How often a waiting reader looks whether it is still wanted.
const LOOK: Duration = Duration::from_millis(200);

const HEADER: usize = 4096;
const MAGIC: &[u8; 8] = b"RDCACHE1";

/// Counters of a cache, since it was opened.
#[derive(Debug, Default)]
pub struct Counters {
    /// Bytes of pages that came from other hosts.
    pub fetched: AtomicU64,
    /// Bytes given to readers.
    pub served: AtomicU64,
    /// Bytes of these that were read from the golden image.
    pub golden: AtomicU64,
    /// Reads.
    pub requests: AtomicU64,
    /// Bytes given to other hosts.
    pub passed_on: AtomicU64,
}

/// A remote disk's pages on this host. See the module's documentation.
#[derive(Debug)]
pub struct Cache {
    /// The disk.
    pub disk: DiskId,
    /// Its map.
    pub extents: ExtentMap,
    /// What it did.
    pub counters: Counters,
    paths: [PathBuf; 2],
    golden: ArcSwapOption<File>,
    data: File,
    have: File,
    unit: u64,
    state: Mutex<State>,
    changed: Condvar,
    ending: AtomicBool,
    upstream: OnceLock<Arc<Upstream>>,
}

#[derive(Debug)]
struct State {
    /// A bit for each page: it is in the file.
    present: Vec<u64>,
    /// A bit for each page: it was asked for and has not come.
    asked: Vec<u64>,
    count: u64,
    /// When those who wait began to.
    waiting: BTreeMap<u64, Instant>,
    next_wait: u64,
}

fn get(bits: &[u64], n: u64) -> bool {
    bits.get((n / 64) as usize).is_some_and(|word| word >> (n % 64) & 1 == 1)
}

fn set(bits: &mut [u64], n: u64, value: bool) {
    if let Some(word) = bits.get_mut((n / 64) as usize) {
        *word = *word & !(1 << (n % 64)) | u64::from(value) << (n % 64);
    }
}

impl Cache {
    /// Opens the cache of a disk in `dir`, with what an earlier process left there, as far as it can be trusted. `unit`
    /// is how many pages are fetched at once.
    ///
    /// # Errors
    /// When the files cannot be made or read.
    pub fn open(dir: &Path, disk: DiskId, extents: ExtentMap, unit: u64) -> io::Result<Self> {
        let paths = [dir.join(format!("{disk}.pages")), dir.join(format!("{disk}.have"))];
        let open =
            |path: &Path| OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(0o600).open(path);
        let (data, have) = (open(&paths[0])?, open(&paths[1])?);
        let words = usize::try_from(extents.pages().div_ceil(64)).map_err(io::Error::other)?;
        let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
        let mut header = Vec::from(MAGIC);
        header.extend(disk.as_u128().to_le_bytes());
        header.extend(extents.size().to_le_bytes());
        header.extend(boot.trim().as_bytes());
        header.resize(HEADER, 0);
        let mut before = vec![0; HEADER];
        let good = data.metadata()?.len() == extents.pages() * PAGE
            && have.metadata()?.len() == (HEADER + words * 8) as u64
            && have.read_exact_at(&mut before, 0).is_ok()
            && before == header;
        let mut present = vec![0u64; words];
        if good {
            let mut bytes = vec![0; 1 << 16];
            for (number, part) in present.chunks_mut(bytes.len() / 8).enumerate() {
                let bytes = &mut bytes[..part.len() * 8];
                have.read_exact_at(bytes, (HEADER + number * (1 << 16)) as u64)?;
                for (word, bytes) in part.iter_mut().zip(bytes.as_chunks().0) {
                    *word = u64::from_le_bytes(*bytes);
                }
            }
        } else {
            // The header last: half-made files are made anew.
            have.set_len(0)?;
            data.set_len(0)?;
            data.set_len(extents.pages() * PAGE)?;
            have.set_len((HEADER + words * 8) as u64)?;
            have.write_all_at(&header, 0)?;
        }
        let count = present.iter().map(|word| u64::from(word.count_ones())).sum();
        Ok(Self {
            disk,
            counters: Counters::default(),
            paths,
            golden: ArcSwapOption::empty(),
            data,
            have,
            unit: unit.clamp(1, Run::MOST),
            state: Mutex::new(State {
                asked: vec![0; present.len()],
                present,
                count,
                waiting: BTreeMap::new(),
                next_wait: 0,
            }),
            changed: Condvar::new(),
            ending: AtomicBool::new(false),
            upstream: OnceLock::new(),
            extents,
        })
    }

    /// Who is asked for pages from now on. Only the first call counts.
    pub fn set_upstream(&self, upstream: Arc<Upstream>) {
        let _ = self.upstream.set(upstream);
    }

    /// Golden pages are read from this file from now on.
    ///
    /// # Errors
    /// When it cannot be read, or is shorter than the golden pages of the map.
    pub fn set_golden(&self, path: &Path) -> io::Result<()> {
        let file = File::open(path)?;
        let len = file.metadata()?.len();
        let last = self.extents.iter().filter(|e| e.kind == Kind::Golden).last().map_or(0, |e| e.end() - 1);
        if last > 0 && len <= last * PAGE {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{} has {len} bytes, the disk's golden image has more: it is another one", path.display()),
            ));
        }
        self.golden.store(Some(Arc::new(file)));
        self.changed.notify_all();
        Ok(())
    }

    /// Bytes of pages in the cache.
    #[must_use]
    pub fn cached(&self) -> u64 {
        crate::lock(&self.state).count * PAGE
    }

    /// How many readers wait, and why, if they do for long.
    #[must_use]
    pub fn waiting(&self) -> (u64, Option<Stalled>) {
        let (count, oldest) = {
            let state = crate::lock(&self.state);
            (state.waiting.len() as u64, state.waiting.values().next().map(Instant::elapsed))
        };
        let stalled = oldest.filter(|since| *since >= STALLED).map(|since| Stalled {
            since_ms: since.as_millis() as u64,
            reason: self.upstream.get().map_or_else(|| "nobody is asked yet".to_owned(), |u| u.trouble()),
        });
        (count, stalled)
    }

    /// Ends waiting, for ever.
    pub fn end(&self) {
        self.ending.store(true, Ordering::Release);
        self.changed.notify_all();
    }

    /// Removes its files.
    pub fn remove(&self) {
        for path in &self.paths {
            if let Err(err) = fs::remove_file(path) {
                tracing::warn!(path = %path.display(), error = %err, "a cache's file stays");
            }
        }
    }

    /// Whether pages of this kind come from other hosts.
    fn fetched(&self, kind: Kind) -> bool {
        kind == Kind::Data || kind == Kind::Golden && self.golden.load().is_none()
    }

    /// Marks what is missing between two pages as asked for, with what belongs to the same fetch. Returns whether
    /// anything is missing, and what must be asked for.
    fn claim(&self, state: &mut State, start: u64, end: u64) -> (bool, Vec<Run>) {
        let mut missing = false;
        let mut runs: Vec<Run> = Vec::new();
        for part in self.extents.between(start, end).filter(|part| self.fetched(part.kind)) {
            let mut page = part.start;
            while page < part.end() {
                if get(&state.present, page) {
                    page += 1;
                    continue;
                }
                missing = true;
                if get(&state.asked, page) {
                    page += 1;
                    continue;
                }
                // Its fetch: the aligned pages around it, as far as they are of the same extent.
                let Some(whole) = self.extents.at(page) else { break };
                let from = (page / self.unit * self.unit).max(whole.start);
                let to = (page / self.unit * self.unit + self.unit).min(whole.end());
                for page in from..to {
                    if get(&state.present, page) || get(&state.asked, page) {
                        continue;
                    }
                    set(&mut state.asked, page, true);
                    match runs.last_mut() {
                        Some(last) if last.start + last.pages == page && last.pages < Run::MOST => last.pages += 1,
                        _ => runs.push(Run { start: page, pages: 1 }),
                    }
                }
                page = to;
            }
        }
        (missing, runs)
    }

    fn store(&self, start: u64, pages: u64, bytes: Option<&[u8]>) -> io::Result<()> {
        let end = start + pages;
        if end > self.extents.pages() {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        if let Some(bytes) = bytes {
            self.data.write_all_at(bytes, start * PAGE)?;
        }
        let mut state = crate::lock(&self.state);
        // First on disk, then in memory: what was given to a reader is not fetched again.
        let (first, last) = ((start / 64) as usize, ((end - 1) / 64) as usize);
        let mut words = state.present[first..=last].to_vec();
        let mut new = 0;
        for page in start..end {
            let at = page - first as u64 * 64;
            new += u64::from(!get(&words, at));
            set(&mut words, at, true);
        }
        let raw: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.have.write_all_at(&raw, (HEADER + first * 8) as u64)?;
        state.present[first..=last].copy_from_slice(&words);
        state.count += new;
        self.counters.fetched.fetch_add(pages * PAGE, Ordering::Relaxed);
        Ok(())
    }

    fn read_golden(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let Some(golden) = &*self.golden.load() else { return Err(io::ErrorKind::WouldBlock.into()) };
        let mut at = 0;
        while at < buffer.len() {
            match golden.read_at(&mut buffer[at..], offset + at as u64) {
                Ok(0) => {
                    buffer[at..].fill(0);
                    break;
                }
                Ok(n) => at += n,
                Err(err) if err.kind() == io::ErrorKind::Interrupted => {}
                Err(err) => {
                    tracing::error!(disk = %self.disk, error = %err, "the golden image cannot be read: its pages are fetched");
                    self.golden.store(None);
                    return Err(io::ErrorKind::WouldBlock.into());
                }
            }
        }
        self.counters.golden.fetch_add(buffer.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    /// Reads whole pages for another host, and adds to `here` for each whether it is in this cache. Nothing is fetched.
    ///
    /// # Errors
    /// When the cache has ended, or its files cannot be read.
    pub fn read_present(&self, page: u64, buffer: &mut [u8], here: &mut Vec<bool>) -> io::Result<()> {
        if self.ending.load(Ordering::Acquire) {
            return Err(io::Error::other("the disk was dropped"));
        }
        let read = |offset: u64, part: &mut [u8]| match Disk::read(self, offset, part) {
            Ok(()) => Ok(true),
            Err(err) if err.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(err) => Err(err),
        };
        let pages = buffer.len() / PAGE as usize;
        if read(page * PAGE, buffer)? {
            here.resize(here.len() + pages, true);
            return Ok(());
        }
        for (part, page) in buffer.chunks_mut(PAGE as usize).zip(page..) {
            here.push(read(page * PAGE, part)?);
        }
        Ok(())
    }

    fn span(offset: u64, len: u64) -> (u64, u64) {
        (offset / PAGE, (offset + len).div_ceil(PAGE))
    }

    fn wait_for(&self, start: u64, end: u64, gone: &dyn Fn() -> bool) -> io::Result<()> {
        let mut state = crate::lock(&self.state);
        loop {
            if self.ending.load(Ordering::Acquire) || gone() {
                return Err(io::ErrorKind::NotConnected.into());
            }
            let (missing, runs) = self.claim(&mut state, start, end);
            if !missing {
                return Ok(());
            }
            if !runs.is_empty() {
                drop(state);
                if let Some(upstream) = self.upstream.get() {
                    upstream.ask(&runs);
                }
                state = crate::lock(&self.state);
                if !self.claim(&mut state, start, end).0 {
                    return Ok(());
                }
            }
            state = self.changed.wait_timeout(state, LOOK).unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Disk for Cache {
    fn size(&self) -> u64 {
        self.extents.size()
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let end = offset + buffer.len() as u64;
        let (first, last) = Self::span(offset, buffer.len() as u64);
        for Extent { start, pages, kind } in self.extents.between(first, last) {
            let (from, to) = ((start * PAGE).max(offset), ((start + pages) * PAGE).min(end));
            let part = &mut buffer[(from - offset) as usize..(to - offset) as usize];
            if kind == Kind::Zero {
                part.fill(0);
            } else if !self.fetched(kind) {
                self.read_golden(from, part)?;
            } else {
                let there = {
                    let state = crate::lock(&self.state);
                    (start..start + pages).all(|page| get(&state.present, page))
                };
                if !there {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                self.data.read_exact_at(part, from)?;
            }
        }
        Ok(())
    }

    fn wait(&self, offset: u64, len: u64, gone: &dyn Fn() -> bool) -> io::Result<()> {
        let (start, end) = Self::span(offset, len);
        let number = {
            let mut state = crate::lock(&self.state);
            state.next_wait += 1;
            let number = state.next_wait;
            state.waiting.insert(number, Instant::now());
            number
        };
        let waited = self.wait_for(start, end, gone);
        crate::lock(&self.state).waiting.remove(&number);
        waited
    }

    fn count(&self, bytes: u64) {
        self.counters.requests.fetch_add(1, Ordering::Relaxed);
        self.counters.served.fetch_add(bytes, Ordering::Relaxed);
    }
}

impl Sink for Cache {
    fn store(&self, start: u64, bytes: &[u8]) -> io::Result<()> {
        Self::store(self, start, bytes.len() as u64 / PAGE, Some(bytes))
    }

    fn zero(&self, start: u64, pages: u64) -> io::Result<()> {
        // The file has a hole there.
        Self::store(self, start, pages, None)
    }

    fn has(&self, run: Run) -> bool {
        let state = crate::lock(&self.state);
        (run.start..run.start + run.pages).all(|page| get(&state.present, page))
    }

    fn done(&self, run: Run) {
        let mut state = crate::lock(&self.state);
        for page in run.start..run.start + run.pages {
            set(&mut state.asked, page, false);
        }
        drop(state);
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map() -> ExtentMap {
        // 0..4 golden, 4..8 zero, 8..37 data, 37..40 golden
        let runs = [(4, Kind::Golden), (4, Kind::Zero), (29, Kind::Data), (3, Kind::Golden)];
        ExtentMap::from_runs(40 * PAGE - 512, runs).unwrap()
    }

    fn claim(cache: &Cache, start: u64, end: u64) -> (bool, Vec<(u64, u64)>) {
        let (missing, runs) = cache.claim(&mut crate::lock(&cache.state), start, end);
        (missing, runs.iter().map(|r| (r.start, r.pages)).collect())
    }

    #[test]
    fn a_fetch_is_aligned_stays_in_its_extent_and_is_made_once() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path(), DiskId::random(), map(), 8).unwrap();
        std::fs::write(dir.path().join("golden"), vec![9; 40 * 4096]).unwrap();
        cache.set_golden(&dir.path().join("golden")).unwrap();
        assert_eq!(claim(&cache, 0, 8), (false, vec![]));
        assert_eq!(claim(&cache, 20, 21), (true, vec![(16, 8)]));
        assert_eq!(claim(&cache, 23, 24), (true, vec![]));
        assert_eq!(claim(&cache, 0, 40), (true, vec![(8, 8), (24, 13)]));
        cache.store(16, 8, Some(&[7; 8 * 4096])).unwrap();
        cache.done(Run { start: 16, pages: 8 });
        assert_eq!(claim(&cache, 16, 24), (false, vec![]));
        let mut bytes = vec![1; 4096];
        cache.read(20 * PAGE + 5, &mut bytes).unwrap();
        assert_eq!(bytes, [7; 4096]);
        assert_eq!(cache.read(23 * PAGE + 5, &mut bytes).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        let mut all = vec![1; 8 * 4096];
        cache.read(0, &mut all).unwrap();
        assert!(all[..4 * 4096].iter().all(|b| *b == 9) && all[4 * 4096..].iter().all(|b| *b == 0));
    }

    #[test]
    fn without_a_golden_image_its_pages_are_fetched_and_a_short_one_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::open(dir.path(), DiskId::random(), map(), 8).unwrap();
        std::fs::write(dir.path().join("golden"), vec![9; 39 * 4096]).unwrap();
        assert!(cache.set_golden(&dir.path().join("golden")).is_err());
        assert_eq!(claim(&cache, 0, 9), (true, vec![(0, 4), (8, 8)]));
        assert_eq!(claim(&cache, 38, 40), (true, vec![(37, 3)]));
    }

    #[test]
    fn what_was_fetched_stays_over_a_restart_and_other_files_do_not() {
        let dir = tempfile::tempdir().unwrap();
        let disk = DiskId::random();
        let cache = Cache::open(dir.path(), disk, map(), 8).unwrap();
        cache.store(9, 2, Some(&[3; 8192])).unwrap();
        cache.zero(12, 1).unwrap();
        drop(cache);
        let cache = Cache::open(dir.path(), disk, map(), 8).unwrap();
        assert_eq!(cache.cached(), 3 * PAGE);
        let mut bytes = [1; 4096];
        cache.read(10 * PAGE, &mut bytes).unwrap();
        assert_eq!(bytes, [3; 4096]);
        cache.read(12 * PAGE, &mut bytes).unwrap();
        assert_eq!(bytes, [0; 4096]);
        // Another boot, or damage.
        cache.have.write_all_at(b"x", 40).unwrap();
        assert_eq!(Cache::open(dir.path(), disk, map(), 8).unwrap().cached(), 0);
        cache.remove();
        assert_eq!(Cache::open(dir.path(), disk, map(), 8).unwrap().cached(), 0);
    }
}
