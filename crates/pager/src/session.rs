//! Copying a checkpoint's pages out of the parent's memory, while the parent runs on behind write protection.
//!
//! At the commit every page that may have changed is write-protected and marked [`PageState::Owed`] in the new layer. From
//! then on three parties take pages out of that debt, each under the session's lock: the background copier, in order;
//! a write of the parent, which must not go on before the old bytes are safe; and a clone (or another host) that wants the
//! page now. A page is copied once, and its bytes are those at the commit whoever comes first.
//!
//! Where there is no room for a page, whoever wants it waits and tries again: the old bytes stay in the parent's memory,
//! still protected. Only a parent that is lost ends the copying for good.

use crate::layer::{BATCH, Layer, Located, PageState};
use arc_swap::ArcSwapOption;
use ramet_kernel::process_read;
use ramet_memory::{PAGE_SIZE, PageIndex, PageRun, page_checksum};
use std::{
    io,
    sync::{
        Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

/// Pages copied at a time by the background copier: short enough that a write of the parent hardly waits.
const COPIER_PAGES: u64 = 32;
/// Pages copied around one that is wanted now.
const WANTED_PAGES: u64 = 8;

/// How long the background copier rests after a batch during which a fault came.
const AFTER_FAULT: Duration = Duration::from_micros(100);
/// Pause before the background copier tries again to store a page for which there was no room.
const RETRY: Duration = Duration::from_millis(200);

/// One checkpoint's copying.
#[derive(Debug)]
pub struct CopySession {
    layer: Arc<Layer>,
    pid: u32,
    ram_addr: u64,
    owed: AtomicU64,
    /// Faults that wait for the lock: the background copier lets them go first.
    wanted: AtomicU64,
    /// Faults served so far.
    served: AtomicU64,
    buffers: Mutex<Buffers>,
    failed: OnceLock<String>,
    /// Why the background copier does not get on at the moment.
    trouble: ArcSwapOption<String>,
    cancelled: AtomicBool,
    finished: Mutex<bool>,
    changed: Condvar,
}

/// Why pages could not be copied.
#[derive(Debug)]
enum Failure {
    /// The parent's memory is gone: for good.
    Lost(io::Error),
    /// The page file can't take them now, or the kernel lacks memory: to be tried again.
    NoRoom(io::Error),
}

impl Failure {
    /// What `process_read` failed with.
    fn of_read(err: io::Error) -> Self {
        match err.kind() {
            io::ErrorKind::OutOfMemory | io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Self::NoRoom(err),
            _ => Self::Lost(err),
        }
    }
}

impl From<Failure> for io::Error {
    /// Never with an errno: that of a lost parent would be taken for one of the VM whose fault is served.
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Lost(err) => Self::other(format!("it can't be copied out of its parent any more: {err}")),
            Failure::NoRoom(err) => Self::new(err.kind(), no_room(&err)),
        }
    }
}

fn no_room(err: &io::Error) -> String {
    format!("no page can be copied out of the parent, tried again until there is room for page files: {err}")
}

#[derive(Debug)]
struct Buffers {
    parent: Box<[u8]>,
    below: Box<[u8; PAGE_SIZE]>,
}

impl CopySession {
    /// A session that copies `owed` pages of `layer` out of the process `pid`, whose RAM is mapped at `ram_addr`.
    #[must_use]
    pub fn new(layer: Arc<Layer>, pid: u32, ram_addr: u64, owed: u64) -> Arc<Self> {
        Arc::new(Self {
            layer,
            pid,
            ram_addr,
            owed: AtomicU64::new(owed),
            wanted: AtomicU64::new(0),
            served: AtomicU64::new(0),
            buffers: Mutex::new(Buffers {
                parent: vec![0; BATCH * PAGE_SIZE].into_boxed_slice(),
                below: Box::new([0; PAGE_SIZE]),
            }),
            failed: OnceLock::new(),
            trouble: ArcSwapOption::empty(),
            cancelled: AtomicBool::new(false),
            finished: Mutex::new(false),
            changed: Condvar::new(),
        })
    }

    /// The layer that is being filled.
    #[must_use]
    pub fn layer(&self) -> &Arc<Layer> {
        &self.layer
    }

    /// Pages still in the parent's memory only.
    #[must_use]
    pub fn owed(&self) -> u64 {
        self.owed.load(Ordering::Acquire)
    }

    /// Why the copying failed for good, if it did: the parent died with pages still owed.
    #[must_use]
    pub fn failure(&self) -> Option<&str> {
        self.failed.get().map(String::as_str)
    }

    /// Why the copying does not get on at the moment, if so: there is no room for page files. It is tried again.
    #[must_use]
    pub fn trouble(&self) -> Option<String> {
        self.trouble.load().as_ref().map(|reason| reason.as_str().to_owned())
    }

    /// Makes sure that `page` is copied, with a few of its neighbours. May wait for a batch under way; no allocation.
    ///
    /// # Errors
    /// When the parent's memory can't be read any more, or the page file is full.
    pub fn ensure(&self, page: PageIndex) -> io::Result<()> {
        let start = page.0 - page.0 % WANTED_PAGES;
        self.ensure_run(PageRun { start: PageIndex(start), len: WANTED_PAGES }).or_else(|_| {
            // A neighbour may have been in the way: zeros need no room.
            self.ensure_run(PageRun { start: page, len: 1 })
        })
    }

    /// Makes sure that every page of a run is copied.
    ///
    /// # Errors
    /// As [`CopySession::ensure`].
    pub fn ensure_run(&self, run: PageRun) -> io::Result<()> {
        if self.owed() == 0 {
            return Ok(());
        }
        self.wanted.fetch_add(1, Ordering::AcqRel);
        let mut buffers = self.lock();
        self.served.fetch_add(1, Ordering::Relaxed);
        self.wanted.fetch_sub(1, Ordering::AcqRel);
        Ok(self.copy(run, &mut buffers)?)
    }

    /// Lets faults go before the background copier: a mutex alone would go to whoever runs, which is the copier.
    fn give_way(&self, served: &mut u64) {
        while self.wanted.load(Ordering::Acquire) > 0 {
            std::thread::yield_now();
        }
        let now = self.served.load(Ordering::Relaxed);
        if std::mem::replace(served, now) != now {
            // More will come, and a vCPU needs this core to get to its next one.
            std::thread::sleep(AFTER_FAULT);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Buffers> {
        self.buffers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Copies everything: the body of the background copier. Returns when nothing is owed, the parent is lost or the
    /// copying was cancelled; [`CopySession::finish`] is to be called next. Where there is no room it tries again.
    pub fn copy_all(&self) {
        let mut served = 0;
        for run in self.layer.owned().iter().flat_map(|o| o.runs()) {
            let mut at = run.start.0;
            while at < run.end().0 {
                if self.is_cancelled() {
                    return;
                }
                let len = COPIER_PAGES.min(run.end().0 - at);
                self.give_way(&mut served);
                let copied = self.copy(PageRun { start: PageIndex(at), len }, &mut self.lock());
                match copied {
                    Ok(()) => {
                        at += len;
                        if self.trouble.load().is_some() {
                            self.trouble.store(None);
                        }
                    }
                    Err(Failure::NoRoom(err)) => {
                        if self.trouble.swap(Some(Arc::new(no_room(&err)))).is_none() {
                            tracing::warn!(layer = %self.layer.id, error = %err, "no room to copy a checkpoint: waiting");
                        }
                        let finished = self.finished.lock().unwrap_or_else(PoisonError::into_inner);
                        drop(self.changed.wait_timeout_while(finished, RETRY, |_| !self.is_cancelled()));
                    }
                    Err(Failure::Lost(err)) => {
                        let left = self.owed();
                        let _ = self.failed.set(format!(
                            "the parent's memory was lost before it was copied ({left} pages left): {err}"
                        ));
                        self.trouble.store(None);
                        return;
                    }
                }
            }
        }
    }

    /// Ends the background copier before its time: nobody wants the layer any more.
    pub fn cancel(&self) {
        let finished = self.finished.lock().unwrap_or_else(PoisonError::into_inner);
        self.cancelled.store(true, Ordering::Release);
        drop(finished);
        self.changed.notify_all();
    }

    /// Whether [`CopySession::cancel`] was called.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Acquire)
    }

    /// Lets those go on that [`CopySession::wait`]: the copier has ended, and what it did is on record.
    pub fn finish(&self) {
        *self.finished.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.changed.notify_all();
    }

    /// Waits until the background copier has ended, well or not.
    pub fn wait(&self) {
        while !self.wait_for(Duration::from_secs(3600)) {}
    }

    /// Waits until the background copier has ended, for at most `limit`; false when it has not.
    #[must_use]
    pub fn wait_for(&self, limit: Duration) -> bool {
        let finished = self.finished.lock().unwrap_or_else(PoisonError::into_inner);
        let waited = self.changed.wait_timeout_while(finished, limit, |finished| !*finished);
        *waited.unwrap_or_else(PoisonError::into_inner).0
    }

    /// Copies the owed pages of a run. The caller holds the lock.
    fn copy(&self, run: PageRun, buffers: &mut Buffers) -> Result<(), Failure> {
        let end = run.end().0.min(self.layer.pages.0);
        let mut at = run.start.0;
        while at < end {
            let owed = (at..end.min(at + BATCH as u64))
                .take_while(|&p| self.layer.state(PageIndex(p)) == PageState::Owed)
                .count();
            if owed == 0 {
                at += 1;
                continue;
            }
            if let Some(reason) = self.failure() {
                // Its process number may be another process's by now.
                return Err(Failure::Lost(io::Error::other(reason.to_owned())));
            }
            let bytes = &mut buffers.parent[..owed * PAGE_SIZE];
            process_read(self.pid, self.ram_addr + PageIndex(at).offset(), bytes).map_err(Failure::of_read)?;
            self.keep(PageIndex(at), owed, buffers).map_err(Failure::NoRoom)?;
            at += owed as u64;
        }
        Ok(())
    }

    /// Stores what was read: pages that differ from the layers below, in as few writes as they allow.
    fn keep(&self, first: PageIndex, count: usize, buffers: &mut Buffers) -> io::Result<()> {
        let Buffers { parent, below } = buffers;
        let mut pending: Option<usize> = None;
        for i in 0..=count {
            let state = (i < count).then(|| {
                let bytes = &parent[i * PAGE_SIZE..(i + 1) * PAGE_SIZE];
                self.classify(PageIndex(first.0 + i as u64), bytes, below)
            });
            if state == Some(PageState::Present) {
                pending.get_or_insert(i);
                continue;
            }
            if let Some(start) = pending.take() {
                let bytes = &parent[start * PAGE_SIZE..i * PAGE_SIZE];
                let at = PageIndex(first.0 + start as u64);
                let sums = bytes
                    .chunks_exact(PAGE_SIZE)
                    .enumerate()
                    .map(|(n, page)| page_checksum(self.layer.id, PageIndex(at.0 + n as u64), page));
                self.layer.store(at, bytes, sums)?;
                self.owed.fetch_sub((i - start) as u64, Ordering::AcqRel);
            }
            if let Some(state) = state {
                self.layer.set_state(PageIndex(first.0 + i as u64), state);
                self.owed.fetch_sub(1, Ordering::AcqRel);
            }
        }
        Ok(())
    }

    /// Whether a page is stored, zero, or the same as below. Where the bytes below are not on this host it is stored:
    /// fetching them only to compare would cost more than it saves.
    fn classify(&self, page: PageIndex, bytes: &[u8], below: &mut [u8; PAGE_SIZE]) -> PageState {
        let zero = is_zero(bytes);
        let mut base = self.layer.base.as_ref().map_or(Located::Zero, |b| b.locate(page));
        if let Located::Owed(owner) = &base {
            // The layer below is still being copied from its own parent: an older session, so locks nest one way only.
            let copied = owner.session.load().as_ref().is_none_or(|s| s.ensure(page).is_ok());
            base = if copied { owner.locate(page) } else { Located::Remote(owner.clone()) };
        }
        match base {
            Located::Zero if zero => PageState::Same,
            Located::Stored(owner) if !zero && owner.read(page, below).is_ok() && below[..] == *bytes => {
                PageState::Same
            }
            _ if zero => PageState::Zero,
            _ => PageState::Present,
        }
    }
}

/// Whether bytes are all zeros.
#[must_use]
pub fn is_zero(bytes: &[u8]) -> bool {
    // A fold over a cache line at a time lets the compiler use vectors, and leaves at the first line that differs.
    bytes.chunks(64).all(|line| line.iter().fold(0, |acc, b| acc | b) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use ramet_memory::{LayerId, PageCount, PageSet};

    /// The parent is this process: its "RAM" is a buffer.
    fn session(dir: &std::path::Path, ram: &[u8], base: Option<Arc<Layer>>, owed: &[u64]) -> Arc<CopySession> {
        let pages = PageCount((ram.len() / PAGE_SIZE) as u64);
        let layer = Layer::create(dir, LayerId::random(), base, pages, false).unwrap();
        let mut owned = PageSet::new(pages);
        for &p in owed {
            owned.insert(PageIndex(p));
            layer.set_state(PageIndex(p), PageState::Owed);
        }
        layer.set_owned(owned).unwrap();
        CopySession::new(layer, std::process::id(), ram.as_ptr() as u64, owed.len() as u64)
    }

    fn aligned(pages: usize) -> Vec<u8> {
        vec![0u8; pages * PAGE_SIZE]
    }

    #[test]
    fn pages_are_sorted_into_stored_zero_and_same() {
        let dir = tempfile::tempdir().unwrap();
        let mut ram = aligned(64);
        ram[3 * PAGE_SIZE] = 3;
        ram[4 * PAGE_SIZE + 9] = 4;
        let first = session(dir.path(), &ram, None, &[2, 3, 4]);
        first.copy_all();
        assert_eq!(first.owed(), 0);
        let states = |s: &CopySession| (2..6).map(|p| s.layer().state(PageIndex(p))).collect::<Vec<_>>();
        use PageState::{Absent, Present, Same, Zero};
        assert_eq!(states(&first), [Same, Present, Present, Absent]);

        ram[3 * PAGE_SIZE] = 0;
        ram[5 * PAGE_SIZE] = 5;
        let second = session(dir.path(), &ram, Some(first.layer().clone()), &[2, 3, 4, 5]);
        second.copy_all();
        assert_eq!(states(&second), [Same, Zero, Same, Present]);
        let mut page = [0; PAGE_SIZE];
        second.layer().read_checked(PageIndex(5), &mut page).unwrap();
        assert_eq!(page[0], 5);
    }

    #[test]
    fn a_wanted_page_is_copied_once_and_then_frozen() {
        let dir = tempfile::tempdir().unwrap();
        let mut ram = aligned(64);
        ram[40 * PAGE_SIZE] = 1;
        let s = session(dir.path(), &ram, None, &[0, 40]);
        s.ensure(PageIndex(40)).unwrap();
        assert_eq!(s.owed(), 1);
        ram[40 * PAGE_SIZE] = 2;
        s.copy_all();
        s.finish();
        s.wait();
        let mut page = [0; PAGE_SIZE];
        s.layer().read_checked(PageIndex(40), &mut page).unwrap();
        assert_eq!(page[0], 1);
    }

    #[test]
    fn a_lost_parent_is_reported_not_guessed() {
        let dir = tempfile::tempdir().unwrap();
        let ram = aligned(8);
        let s = session(dir.path(), &ram, None, &[1]);
        let lost = CopySession::new(s.layer().clone(), std::process::id(), 0x1000, 1);
        lost.copy_all();
        assert!(lost.failure().unwrap().contains("1 pages left"));
        // No errno: the fault thread of a clone would take it for the end of its own VMM.
        assert_eq!(lost.ensure(PageIndex(1)).unwrap_err().raw_os_error(), None);
        assert_eq!(s.layer().state(PageIndex(1)), PageState::Owed);
    }
}
