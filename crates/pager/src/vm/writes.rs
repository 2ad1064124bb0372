//! Writes since the last checkpoint: first those to pages that are still to be copied, then which pages they changed.

use super::{MAX_WRITE_WINDOW, Streams, Vm, VmView};
use crate::session::CopySession;
use ramet_memory::{PAGE_SIZE, PageIndex, PageRun};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

impl Vm {
    pub(super) fn write_fault(&self, page: PageIndex, streams: &mut Streams) -> io::Result<()> {
        self.counters.writes.fetch_add(1, Ordering::Relaxed);
        streams.write_window =
            if page.0 == streams.write_next { (streams.write_window * 2).clamp(1, MAX_WRITE_WINDOW) } else { 1 };
        let run = self.private_run(page, streams.write_window.min(self.pages.0 - page.0));
        streams.write_next = run.end().0;
        let _tracking = self.lock();
        // The old bytes first: after the next line the guest may change them. Looked up under the lock, so that a commit
        // that has just protected this page is seen.
        if let Some(session) = &*self.session.load() {
            session.ensure_run(run)?;
        }
        self.mark_dirty(run);
        self.protect(run, false)
    }

    /// The pages from `page` that are private to the VM, at most `most` of them, and always `page` itself. Only such pages
    /// may be made writable along with it: reading a missing one later, in a copier, would wait for this very thread.
    pub(super) fn private_run(&self, page: PageIndex, most: u64) -> PageRun {
        let mut len = 1;
        if most > 1 {
            let next = self.ram_addr + PageIndex(page.0 + 1).offset();
            let _ = self.pagemap.private_pages(next, (most - 1) * PAGE_SIZE as u64, |start, bytes| {
                if start == next {
                    len += bytes / PAGE_SIZE as u64;
                }
            });
        }
        PageRun { start: page, len }
    }

    /// Passes on each run of pages that are private to the VM: all that it can have changed.
    ///
    /// # Errors
    /// When the VMM's page tables can't be read.
    pub fn private_pages(&self, mut found: impl FnMut(PageRun)) -> io::Result<()> {
        self.pagemap.private_pages(self.ram_addr, self.len(), |start, bytes| {
            let start = PageIndex::of_offset(start - self.ram_addr);
            found(PageRun { start, len: bytes / PAGE_SIZE as u64 });
        })
    }

    pub(super) fn mark_dirty(&self, run: PageRun) {
        for page in run.start.0..run.end().0 {
            self.dirty.get((page / 64) as usize).fetch_or(1 << (page % 64), Ordering::AcqRel);
        }
    }

    pub(super) fn protect(&self, run: PageRun, on: bool) -> io::Result<()> {
        let addr = self.ram_addr + run.start.offset();
        let len = run.len * PAGE_SIZE as u64;
        loop {
            match self.uffd.write_protect(addr, len, on, false) {
                // The address space is changing under us: the kernel asks to try again.
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => std::thread::yield_now(),
                done => return done,
            }
        }
    }

    /// Starts to track writes: from its return on, the first write to any page is seen. For a VM that is tracked already
    /// nothing happens. Returns whether it was not.
    ///
    /// # Errors
    /// When the kernel refuses; the VM stays untracked.
    pub fn track(&self) -> io::Result<bool> {
        if self.tracked.load(Ordering::Acquire) {
            return Ok(false);
        }
        {
            let _tracking = self.lock();
            for word in 0..self.dirty.len() {
                self.dirty.get(word).store(0, Ordering::Release);
            }
            self.tracked.store(true, Ordering::Release);
            if let Err(err) = self.register_mode() {
                self.tracked.store(false, Ordering::Release);
                return Err(err);
            }
        }
        // In pieces: the kernel holds the address space's lock for each, and vCPUs that fault wait for it.
        let piece = (64 << 20) / PAGE_SIZE as u64;
        let mut at = 0;
        while at < self.pages.0 {
            let len = piece.min(self.pages.0 - at);
            let _tracking = self.lock();
            self.protect(PageRun { start: PageIndex(at), len }, true)?;
            at += len;
        }
        Ok(true)
    }

    /// Forgets what was tracked: the next checkpoint looks at all of memory again.
    pub fn untrack(&self) {
        let _tracking = self.lock();
        if self.tracked.swap(false, Ordering::AcqRel) {
            let _ = self.protect(PageRun { start: PageIndex(0), len: self.pages.0 }, false);
        }
    }

    /// Takes the pages written since the last time, protecting them again, and passes each run to `found`.
    ///
    /// # Errors
    /// When the kernel refuses to protect. What was passed on, and only that, is to be given back
    /// ([`Vm::give_dirty_back`]).
    pub fn take_dirty(&self, mut found: impl FnMut(PageRun)) -> io::Result<()> {
        let mut word = 0;
        // Bits that are taken are passed on even then: they must not get lost.
        let mut protected = Ok(());
        let mut pass = |run: PageRun, protected: &mut io::Result<()>| {
            if protected.is_ok() {
                *protected = self.protect(run, true);
            }
            found(run);
        };
        while word < self.dirty.len() {
            if self.dirty.get(word).load(Ordering::Acquire) == 0 {
                word += 1;
                continue;
            }
            let _tracking = self.lock();
            // A few words at a time, so that runs over their borders are protected by one call.
            let mut pending: Option<PageRun> = None;
            let until = (word + 64).min(self.dirty.len());
            while word < until {
                let mut bits = self.dirty.get(word).swap(0, Ordering::AcqRel);
                while bits != 0 {
                    let low = u64::from(bits.trailing_zeros());
                    let len = u64::from((bits >> low).trailing_ones());
                    bits &= if low + len == 64 { 0 } else { u64::MAX << (low + len) };
                    let start = word as u64 * 64 + low;
                    match &mut pending {
                        Some(run) if run.end().0 == start => run.len += len,
                        _ => {
                            if let Some(run) = pending.replace(PageRun { start: PageIndex(start), len }) {
                                pass(run, &mut protected);
                            }
                        }
                    }
                }
                word += 1;
            }
            if let Some(run) = pending {
                pass(run, &mut protected);
            }
            if protected.is_err() {
                break;
            }
        }
        protected
    }

    /// Protects and passes on the private pages that [`Vm::take_dirty`] can't know: on kernels that do not report the first
    /// write to a new anonymous page. The VM is stopped. On newer kernels nothing happens.
    ///
    /// # Errors
    /// When the VMM's page tables can't be read, or the kernel refuses to protect.
    pub fn take_new(&self, mut found: impl FnMut(PageRun)) -> io::Result<()> {
        if self.sees_new_pages || matches!(self.view, VmView::Image { .. }) {
            return Ok(());
        }
        let mut runs = Vec::new();
        self.private_pages(|run| runs.push(run))?;
        for run in runs {
            self.protect(run, true)?;
            found(run);
        }
        Ok(())
    }

    /// Gives pages back that [`Vm::take_dirty`] took, when a checkpoint was given up.
    pub fn give_dirty_back(&self, run: PageRun) {
        let _tracking = self.lock();
        self.mark_dirty(run);
    }

    /// The session that copies this VM's last checkpoint.
    #[must_use]
    pub fn session(&self) -> Option<Arc<CopySession>> {
        self.session.load_full()
    }

    /// From now on a write to a protected page first has `session` copy it.
    pub fn set_session(&self, session: Option<Arc<CopySession>>) {
        let _tracking = self.lock();
        self.session.store(session);
    }
}
