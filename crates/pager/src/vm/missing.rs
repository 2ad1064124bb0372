//! Missing pages whose bytes are on this host.

use super::{FETCH_AROUND, MAX_ZERO_WINDOW, MappedSegment, Streams, Vm, VmView, ZEROS, clip};
use crate::image::Image;
use crate::layer::{Layer, Located, PageState};
use ramet_kernel::{CopyError, CopyMode};
use ramet_memory::{PAGE_SIZE, PageIndex, PageRun, page_checksum};
use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

impl Vm {
    pub(super) fn missing_fault(
        self: &Arc<Self>,
        page: PageIndex,
        write: bool,
        since: Instant,
        streams: &mut Streams,
    ) -> io::Result<()> {
        self.counters.missing.fetch_add(1, Ordering::Relaxed);
        let VmView::Image { image, segments } = &self.view else {
            // A booted VM is never registered for missing pages.
            return self.uffd.wake(self.ram_addr + page.offset(), PAGE_SIZE as u64);
        };
        let Some(segment) = segments.get(segments.partition_point(|s| s.run.end().0 <= page.0)) else { return Ok(()) };
        let file = &segment.file;
        let Some(owner) = image.owner(page) else {
            self.fill_zeros(image, segment, page, write, streams)?;
            self.local_fault.record(since.elapsed());
            return Ok(());
        };
        match file.state(page) {
            PageState::Present => self.wake_page(page)?,
            PageState::Zero => self.fill_zeros(image, segment, page, write, streams)?,
            PageState::InFlight => {
                // Somebody on this host asked for it already; the answer wakes this VM too. A stream that has caught up
                // with what it asked for asks for more.
                self.note_wait(page, since);
                self.fetch_ahead(image, segment, page, streams);
                return Ok(());
            }
            PageState::Absent | PageState::Same | PageState::Owed => match self.find(owner, page)? {
                Located::Zero => self.fill_zeros(image, segment, page, write, streams)?,
                Located::Stored(from) if Arc::ptr_eq(&from, file) => self.wake_page(page)?,
                Located::Stored(_) => self.fill_around(image, segment, page, streams)?,
                Located::Owed(owner) => {
                    return Err(io::Error::other(format!(
                        "page of layer {} was lost with its parent",
                        owner.id.short()
                    )));
                }
                Located::Remote(owner) => {
                    return self.fetch(image, segment, &owner, page, since, streams);
                }
            },
        }
        self.local_fault.record(since.elapsed());
        Ok(())
    }

    /// Finds a page's bytes, copying them out of a parent's memory first where they still are there.
    pub(super) fn find(&self, owner: &Arc<Layer>, page: PageIndex) -> io::Result<Located> {
        match owner.locate(page) {
            Located::Owed(layer) => {
                if let Some(session) = &*layer.session.load() {
                    session.ensure(page)?;
                }
                Ok(owner.locate(page))
            }
            found => Ok(found),
        }
    }

    pub(super) fn wake_page(&self, page: PageIndex) -> io::Result<()> {
        self.counters.local.fetch_add(1, Ordering::Relaxed);
        self.uffd.wake(self.ram_addr + page.offset(), PAGE_SIZE as u64)
    }

    /// Copies a page from the page file of an older layer, and leaves its neighbours for when no fault waits.
    pub(super) fn fill_around(
        &self,
        image: &Image,
        segment: &MappedSegment,
        page: PageIndex,
        streams: &mut Streams,
    ) -> io::Result<()> {
        self.fill(image, segment, page)?;
        self.uffd.wake(self.ram_addr + page.offset(), PAGE_SIZE as u64)?;
        let around = PageRun { start: PageIndex(page.0 - page.0 % FETCH_AROUND), len: FETCH_AROUND };
        let run = clip(around, segment.run);
        (streams.fill_next, streams.fill_end) = (run.start.0, run.end().0);
        Ok(())
    }

    /// Fills one more neighbour; false when there is none.
    pub(super) fn fill_pending(&self, streams: &mut Streams) -> bool {
        let page = PageIndex(streams.fill_next);
        let VmView::Image { image, segments } = &self.view else { return false };
        if page.0 >= streams.fill_end {
            return false;
        }
        streams.fill_next += 1;
        if let Some(segment) = segments.get(segments.partition_point(|s| s.run.end().0 <= page.0)) {
            // A neighbour that can't be filled now fails again, and is reported, when it is touched.
            let _ = self.fill(image, segment, page);
        }
        true
    }

    /// Copies one page from the page file of an older layer, unless it is there or its bytes are elsewhere.
    pub(super) fn fill(&self, image: &Image, segment: &MappedSegment, page: PageIndex) -> io::Result<()> {
        let file = &segment.file;
        let mut bytes = [0; PAGE_SIZE];
        if matches!(file.state(page), PageState::Absent | PageState::Same)
            && let Some(owner) = image.owner(page)
            && let Located::Stored(from) = owner.locate(page)
            && !Arc::ptr_eq(&from, file)
        {
            from.read_checked(page, &mut bytes)?;
            file.store(page, &bytes, std::iter::once(page_checksum(file.id, page, &bytes)))?;
            self.counters.local.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Installs zeros at `page` and, when such faults come in a row, at the zero pages after it.
    pub(super) fn fill_zeros(
        &self,
        image: &Image,
        segment: &MappedSegment,
        page: PageIndex,
        write: bool,
        streams: &mut Streams,
    ) -> io::Result<()> {
        streams.zero_window =
            if page.0 == streams.zero_next { (streams.zero_window * 2).clamp(1, MAX_ZERO_WINDOW) } else { 1 };
        let most = if self.tracked.load(Ordering::Acquire) { 1 } else { streams.zero_window };
        let most = most.min(segment.run.end().0 - page.0);
        let is_zero = |p: u64| match image.owner(PageIndex(p)) {
            None => true,
            Some(_) => segment.file.state(PageIndex(p)) == PageState::Zero,
        };
        let count = 1 + (page.0 + 1..page.0 + most).take_while(|&p| is_zero(p)).count() as u64;
        let tracking = self.lock();
        let installed = if self.tracked.load(Ordering::Acquire) {
            // Where writes are tracked the zero page would come without protection, and a write to it go unseen.
            if write {
                self.mark_dirty(PageRun { start: page, len: 1 });
            }
            let mode = CopyMode { wp: !write, dont_wake: false };
            self.install(page, 1, |addr, _| self.uffd.copy(addr, &ZEROS[..], mode))
        } else {
            self.install(page, count, |addr, len| self.uffd.zeropage(addr, len, false))
        }?;
        drop(tracking);
        streams.zero_next = page.0 + installed;
        self.counters.zero.fetch_add(installed, Ordering::Relaxed);
        Ok(())
    }

    /// Installs pages until done or until one is there already. Returns how many were installed.
    pub(super) fn install(
        &self,
        page: PageIndex,
        count: u64,
        op: impl Fn(u64, u64) -> Result<usize, CopyError>,
    ) -> io::Result<u64> {
        let mut at = page.0;
        let end = page.0 + count;
        while at < end {
            match op(self.ram_addr + PageIndex(at).offset(), (end - at) * PAGE_SIZE as u64) {
                Ok(done) => at += (done / PAGE_SIZE).max(1) as u64,
                Err(CopyError::Exists) => break,
                Err(CopyError::Again { copied }) => at += (copied / PAGE_SIZE) as u64,
                Err(err) => return Err(err.into()),
            }
        }
        self.uffd.wake(self.ram_addr + page.offset(), PAGE_SIZE as u64)?;
        Ok(at - page.0)
    }
}
