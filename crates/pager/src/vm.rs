//! An attached VM: its userfaultfd, what its memory shows, and the thread that serves its faults.
//!
//! The fault path is [`Vm::serve`]: a plain thread that reads events, spins briefly after each and then blocks. It does not
//! allocate, and takes no lock that the control plane holds for longer than a few system calls.

use crate::{
    control::VmReport,
    histogram::Histogram,
    image::Image,
    layer::{BATCH, Layer, Located, PageState},
    session::CopySession,
    source::{Fetch, Source},
};
use arc_swap::ArcSwapOption;
use ramet_kernel::{CopyError, CopyMode, Event, Features, Mode, PagemapScanner, SharedAtomics, Uffd};
use ramet_memory::{PAGE_SIZE, PageCount, PageIndex, PageRun, VmId, page_checksum};
use std::{
    io,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// Features used where the kernel has them.
const WANTED: Features = Features(
    Features::PAGEFAULT_FLAG_WP.0
        | Features::MISSING_SHMEM.0
        | Features::WP_HUGETLBFS_SHMEM.0
        | Features::WP_UNPOPULATED.0,
);
/// How long the fault thread spins for a next fault, when faults come in quick succession, before it blocks.
const SPIN: Duration = Duration::from_micros(40);
/// How long it blocks before it looks whether it should end, and before what could not be served is tried again.
const BLOCK: Duration = Duration::from_millis(500);
/// How long what was tried again has to fail again before the failure is taken to be over.
const PASSED: Duration = Duration::from_millis(50);
/// Most zero pages that one fault installs.
const MAX_ZERO_WINDOW: u64 = 512;
/// Most pages that one write to a protected page makes writable.
const MAX_WRITE_WINDOW: u64 = 32;
/// Pages fetched around a remote fault that continues no stream.
const FETCH_AROUND: u64 = 8;
/// Most pages that a stream of remote faults fetches ahead.
const MAX_FETCH_WINDOW: u64 = 512;
/// A remote fault that waits for longer makes its VM `stalled`.
const STALL: Duration = Duration::from_secs(1);

/// A stretch of memory mapped from one layer's page file.
#[derive(Debug, Clone)]
pub struct MappedSegment {
    /// The pages.
    pub run: PageRun,
    /// The layer whose page file is mapped.
    pub file: Arc<Layer>,
}

/// What a VM's memory shows.
#[derive(Debug)]
pub enum VmView {
    /// Anonymous memory of its own.
    Anonymous,
    /// A private view of an image.
    Image {
        /// The image.
        image: Arc<Image>,
        /// How it is mapped; covers all of memory.
        segments: Vec<MappedSegment>,
    },
}

/// Counters of a VM's paging; see [`VmReport`] for their meaning.
#[derive(Debug, Default)]
pub struct Counters {
    missing: AtomicU64,
    zero: AtomicU64,
    local: AtomicU64,
    writes: AtomicU64,
    /// Pages fetched on demand.
    pub demand: AtomicU64,
    /// Pages fetched around or ahead.
    pub prefetched: AtomicU64,
    /// Bytes received.
    pub network: AtomicU64,
}

/// An attached VM.
pub struct Vm {
    /// Its name.
    pub id: VmId,
    /// The VMM's process.
    pub pid: u32,
    /// Where its RAM is mapped in the VMM.
    pub ram_addr: u64,
    /// Pages of RAM.
    pub pages: PageCount,
    /// What its memory shows.
    pub view: VmView,
    uffd: Uffd,
    ending: AtomicBool,
    /// Counters.
    pub counters: Counters,
    local_fault: Histogram,
    /// Time of faults served from another host.
    pub remote_fault: Histogram,
    tracking: Mutex<Tracking>,
    /// Whether writes are tracked: the VM has been checkpointed.
    tracked: AtomicBool,
    /// Pages written since the last commit (bit set, page writable).
    dirty: SharedAtomics,
    /// Whether the kernel reports the first write to an anonymous page that was not there when it was protected (6.4).
    sees_new_pages: bool,
    session: ArcSwapOption<CopySession>,
    pagemap: PagemapScanner,
    failure: ArcSwapOption<String>,
    /// The page of the last fault that waits for another host, plus one, and when it came (nanoseconds after `started`).
    wait_page: AtomicU64,
    wait_since: AtomicU64,
    started: Instant,
}

/// Held while pages change between protected and writable, so that the dirty bits and the protection agree.
#[derive(Debug)]
struct Tracking;

impl std::fmt::Debug for Vm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vm").field("id", &self.id).field("pid", &self.pid).finish_non_exhaustive()
    }
}

/// What a fault thread remembers from one fault to the next: streams of faults widen its windows.
#[derive(Debug, Default)]
struct Streams {
    zero_next: u64,
    zero_window: u64,
    write_next: u64,
    write_window: u64,
    fetch_next: u64,
    fetch_window: u64,
    /// Pages asked for from other hosts.
    remote: u64,
    /// Neighbours of the last page filled from an older layer, to be filled while no fault waits.
    fill_next: u64,
    fill_end: u64,
}

/// What it takes to attach a VM.
#[derive(Debug)]
pub struct VmParts {
    /// Its name.
    pub id: VmId,
    /// The VMM's process.
    pub pid: u32,
    /// Where its RAM is mapped in the VMM.
    pub ram_addr: u64,
    /// Pages of RAM.
    pub pages: PageCount,
    /// What its memory shows.
    pub view: VmView,
    /// The VMM's userfaultfd.
    pub uffd: Uffd,
    /// One bit a page, in shared memory.
    pub dirty: SharedAtomics,
    /// Whether writes are tracked already, by the pager before this one.
    pub tracked: bool,
}

impl Vm {
    /// Registers the VM's memory for faults; [`Vm::serve`] is to be called next.
    ///
    /// # Errors
    /// When the kernel refuses the registration.
    pub fn register(parts: VmParts) -> io::Result<Arc<Self>> {
        let VmParts { id, pid, ram_addr, pages, view, uffd, dirty, tracked } = parts;
        let has = Uffd::supported()?;
        uffd.api(Features(has.0 & WANTED.0))?;
        let vm = Arc::new(Self {
            id,
            pid,
            ram_addr,
            pages,
            view,
            uffd,
            ending: AtomicBool::new(false),
            counters: Counters::default(),
            local_fault: Histogram::default(),
            remote_fault: Histogram::default(),
            tracking: Mutex::new(Tracking),
            tracked: AtomicBool::new(tracked),
            dirty,
            sees_new_pages: has.has(Features::WP_UNPOPULATED),
            session: ArcSwapOption::empty(),
            pagemap: PagemapScanner::open(pid)?,
            failure: ArcSwapOption::empty(),
            wait_page: AtomicU64::new(0),
            wait_since: AtomicU64::new(0),
            started: Instant::now(),
        });
        vm.register_mode()?;
        Ok(vm)
    }

    fn register_mode(&self) -> io::Result<()> {
        let missing = matches!(self.view, VmView::Image { .. });
        let wp = self.tracked.load(Ordering::Acquire);
        if missing || wp {
            self.uffd.register(self.ram_addr, self.len(), Mode { missing, wp, minor: false })?;
        }
        Ok(())
    }

    fn len(&self) -> u64 {
        self.pages.size().bytes()
    }

    /// Wakes every thread that waits for a page, so that it faults again.
    pub fn wake_all(&self) {
        let _ = self.uffd.wake(self.ram_addr, self.len());
    }

    /// Wakes threads that wait for a page of the run, if the run is mapped from `file`.
    pub fn wake(&self, file: &Arc<Layer>, run: PageRun) {
        let VmView::Image { segments, .. } = &self.view else { return };
        let end = run.end().0;
        let from = segments.partition_point(|s| s.run.end().0 <= run.start.0);
        for segment in segments[from..].iter().take_while(|s| s.run.start.0 < end) {
            if Arc::ptr_eq(&segment.file, file) {
                let a = segment.run.start.0.max(run.start.0);
                let b = segment.run.end().0.min(end);
                let _ = self.uffd.wake(self.ram_addr + PageIndex(a).offset(), (b - a) * PAGE_SIZE as u64);
            }
        }
    }

    /// Ends the fault thread soon.
    pub fn end(&self) {
        self.ending.store(true, Ordering::Release);
    }

    /// Whether [`Vm::end`] was called.
    #[must_use]
    pub fn ended(&self) -> bool {
        self.ending.load(Ordering::Acquire)
    }

    /// Serves faults until [`Vm::end`]: the body of the VM's fault thread.
    pub fn serve(self: &Arc<Self>) {
        let mut events = [Event::default(); 16];
        let mut streams = Streams::default();
        let mut quick = false;
        let mut retries = Retries::default();
        let mut last = Instant::now();
        while !self.ended() {
            let count = match self.uffd.read_events(&mut events) {
                Ok(count) => count,
                Err(err) if is_final(&err) => {
                    self.fail(format!("faults can't be read any more: {err}: restart the pager to have it taken over"));
                    tracing::error!(vm = %self.id, error = %err, "the fault thread ends");
                    return;
                }
                Err(err) => {
                    self.fail(format!("faults can't be read, tried again: {err}"));
                    retries.failed(Instant::now());
                    std::thread::sleep(PASSED);
                    0
                }
            };
            let now = Instant::now();
            match retries.due(now) {
                Due::Nothing => {}
                // What could not be served (no memory left for page files, say) is tried again.
                Due::Retry => self.wake_all(),
                Due::Passed => self.failure.store(None),
            }
            if count == 0 {
                if self.fill_pending(&mut streams) {
                    continue;
                }
                // Spinning pays where faults follow one another closely, and is a core lost where they do not.
                if !quick || now.duration_since(last) > SPIN {
                    quick = false;
                    if self.uffd.poll(Some(retries.within(now, BLOCK))).is_err() {
                        std::thread::sleep(PASSED);
                    }
                }
                continue;
            }
            quick = now.duration_since(last) < 8 * SPIN;
            let remote = streams.remote;
            for event in &events[..count] {
                if let Event::Pagefault { addr, write, wp, .. } = *event {
                    let Some(offset) = addr.checked_sub(self.ram_addr).filter(|&o| o < self.len()) else { continue };
                    let page = PageIndex::of_offset(offset);
                    let served = if wp {
                        self.write_fault(page, &mut streams)
                    } else {
                        self.missing_fault(page, write, now, &mut streams)
                    };
                    match served {
                        Ok(()) => {}
                        // Nobody waits any more.
                        Err(err) if err.raw_os_error() == Some(SRCH) => {
                            self.fail("its VMM is gone".to_owned());
                            return;
                        }
                        Err(err) => {
                            self.fail(format!("page {} can't be served: {err}", page.0));
                            retries.failed(Instant::now());
                        }
                    }
                }
            }
            // While pages are on their way over the network the cores have better to do.
            quick &= streams.remote == remote;
            last = Instant::now();
        }
    }

    fn fail(&self, reason: String) {
        self.failure.store(Some(Arc::new(reason)));
    }

    fn lock(&self) -> MutexGuard<'_, Tracking> {
        self.tracking.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // ---- missing pages -------------------------------------------------------------------------------------------

    fn missing_fault(
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
    fn find(&self, owner: &Arc<Layer>, page: PageIndex) -> io::Result<Located> {
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

    fn wake_page(&self, page: PageIndex) -> io::Result<()> {
        self.counters.local.fetch_add(1, Ordering::Relaxed);
        self.uffd.wake(self.ram_addr + page.offset(), PAGE_SIZE as u64)
    }

    /// Copies a page from the page file of an older layer, and leaves its neighbours for when no fault waits.
    fn fill_around(
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
    fn fill_pending(&self, streams: &mut Streams) -> bool {
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
    fn fill(&self, image: &Image, segment: &MappedSegment, page: PageIndex) -> io::Result<()> {
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
    fn fill_zeros(
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
    fn install(
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

    // ---- pages of other hosts ------------------------------------------------------------------------------------

    fn fetch(
        self: &Arc<Self>,
        image: &Image,
        segment: &MappedSegment,
        owner: &Arc<Layer>,
        page: PageIndex,
        since: Instant,
        streams: &mut Streams,
    ) -> io::Result<()> {
        let source = owner.required_source()?;
        streams.remote += 1;
        let (start, window) = if page.0 == streams.fetch_next {
            streams.fetch_window = (streams.fetch_window * 2).clamp(FETCH_AROUND, MAX_FETCH_WINDOW);
            (page.0, streams.fetch_window)
        } else {
            streams.fetch_window = FETCH_AROUND;
            (page.0 - page.0 % FETCH_AROUND, FETCH_AROUND)
        };
        let around = clip(PageRun { start: PageIndex(start), len: window }, segment.run);
        streams.fetch_next = around.end().0;
        if segment.file.change(page, PageState::Absent, PageState::InFlight) {
            self.note_wait(page, since);
            let fetch = Fetch {
                owner: owner.clone(),
                file: segment.file.clone(),
                run: PageRun { start: page, len: 1 },
                demand: Some(since),
                vm: Some(self.clone()),
            };
            fetch.ask(&source);
        } else if segment.file.state(page) == PageState::Same {
            // A page is `Same` only as one that is here. To fetch it into this file would make this layer its owner.
            return Err(io::Error::other(format!("the page below it is gone from layer {}", owner.id)));
        } else {
            // It came, or somebody asked for it, just now. If it came, its wake may have passed before this fault.
            let _ = self.uffd.wake(self.ram_addr + page.offset(), PAGE_SIZE as u64);
        }
        self.prefetch(image, segment, around);
        Ok(())
    }

    fn fetch_ahead(self: &Arc<Self>, image: &Image, segment: &MappedSegment, page: PageIndex, streams: &mut Streams) {
        let behind = streams.fetch_next.saturating_sub(page.0);
        if streams.fetch_window < 4 * FETCH_AROUND || behind == 0 || behind > streams.fetch_window {
            return;
        }
        let ahead = PageRun { start: PageIndex(streams.fetch_next), len: streams.fetch_window };
        let ahead = clip(ahead, segment.run);
        streams.fetch_next = ahead.end().0.max(streams.fetch_next);
        self.prefetch(image, segment, ahead);
    }

    /// Asks for the pages of a run that nobody has asked for, in runs of one owner, each where its owner comes from.
    fn prefetch(self: &Arc<Self>, image: &Image, segment: &MappedSegment, run: PageRun) {
        let mut at = run.start.0;
        let mut unsent: Option<Arc<Source>> = None;
        while at < run.end().0 {
            let from = at;
            // Without a source the page is reported when it is touched.
            let found = image.owner(PageIndex(at)).and_then(|o| Some((o, o.source.load_full()?)));
            if let Some((owner, source)) = found {
                let wanted = |p: u64| {
                    let page = PageIndex(p);
                    image.owner(page).is_some_and(|other| Arc::ptr_eq(owner, other))
                        && matches!(owner.state(page), PageState::Absent)
                        && segment.file.change(page, PageState::Absent, PageState::InFlight)
                };
                while at < run.end().0 && wanted(at) {
                    at += 1;
                }
                if at > from {
                    let fetch = Fetch {
                        owner: owner.clone(),
                        file: segment.file.clone(),
                        run: PageRun { start: PageIndex(from), len: at - from },
                        demand: None,
                        vm: Some(self.clone()),
                    };
                    fetch.ask_with_more(&source);
                    if let Some(before) = unsent.take_if(|s| !Arc::ptr_eq(s, &source)) {
                        before.flush();
                    }
                    unsent = Some(source);
                    continue;
                }
            }
            at += 1;
        }
        if let Some(source) = unsent {
            source.flush();
        }
    }

    // ---- writes after a checkpoint -------------------------------------------------------------------------------

    fn write_fault(&self, page: PageIndex, streams: &mut Streams) -> io::Result<()> {
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
    fn private_run(&self, page: PageIndex, most: u64) -> PageRun {
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

    fn mark_dirty(&self, run: PageRun) {
        for page in run.start.0..run.end().0 {
            self.dirty.get((page / 64) as usize).fetch_or(1 << (page % 64), Ordering::AcqRel);
        }
    }

    fn protect(&self, run: PageRun, on: bool) -> io::Result<()> {
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

    // ---- reports -------------------------------------------------------------------------------------------------

    fn note_wait(&self, page: PageIndex, since: Instant) {
        // Woken without its page, a CPU faults again: it has waited since the first time.
        if self.wait_page.load(Ordering::Relaxed) == page.0 + 1 {
            return;
        }
        let nanos = since.saturating_duration_since(self.started).as_nanos();
        self.wait_since.store(u64::try_from(nanos).unwrap_or(u64::MAX), Ordering::Relaxed);
        self.wait_page.store(page.0 + 1, Ordering::Release);
    }

    /// For how long the VM has waited for a page of another host, and why; `None` when it does not wait.
    fn waiting(&self) -> Option<(Duration, String)> {
        let page = PageIndex(self.wait_page.load(Ordering::Acquire).checked_sub(1)?);
        let VmView::Image { image, segments } = &self.view else { return None };
        let segment = segments.get(segments.partition_point(|s| s.run.end().0 <= page.0))?;
        if segment.file.state(page) != PageState::InFlight {
            return None;
        }
        let since = Duration::from_nanos(self.wait_since.load(Ordering::Relaxed));
        let waited = self.started.elapsed().saturating_sub(since);
        let source = image.owner(page).and_then(|o| o.source.load_full());
        let reason = source.map_or_else(|| "no source".to_owned(), |s| s.trouble());
        Some((waited, format!("page {} is missing for {:.1} s: {reason}", page.0, waited.as_secs_f64())))
    }

    /// What the VM's paging did so far; memory is what the kernel says now.
    #[must_use]
    pub fn report(&self) -> VmReport {
        let get = |c: &AtomicU64| c.load(Ordering::Relaxed);
        let memory = ramet_kernel::mem_stats(self.pid, self.ram_addr, self.len()).unwrap_or_default();
        let waiting = self.waiting();
        let stalled = waiting.as_ref().filter(|(waited, _)| *waited > STALL).map(|(_, reason)| reason.clone());
        VmReport {
            vm: self.id,
            image: match &self.view {
                VmView::Anonymous => None,
                VmView::Image { image, .. } => Some(image.id),
            },
            missing_faults: get(&self.counters.missing),
            zero_pages: get(&self.counters.zero),
            local_pages: get(&self.counters.local),
            demand_pages: get(&self.counters.demand),
            prefetched_pages: get(&self.counters.prefetched),
            network_bytes: get(&self.counters.network),
            write_faults: get(&self.counters.writes),
            waiting: u64::from(waiting.is_some()),
            stalled: self.failure.load_full().map(|f| (*f).clone()).or(stalled),
            private_bytes: memory.private_bytes,
            ram_pss_bytes: memory.ram_pss_bytes,
            vmm_pss_bytes: memory.vmm_pss_bytes,
            local_fault_us: self.local_fault.latency(),
            remote_fault_us: self.remote_fault.latency(),
        }
    }
}

static ZEROS: [u8; PAGE_SIZE] = [0; PAGE_SIZE];

/// "No such process": the VMM is gone.
const SRCH: i32 = rustix::io::Errno::SRCH.raw_os_error();

/// Whether reading faults fails for good: the descriptor, or the process behind it, is gone. Anything else (no memory
/// at the moment, a signal) passes.
fn is_final(err: &io::Error) -> bool {
    use rustix::io::Errno;
    let finals = [Errno::SRCH, Errno::BADF, Errno::INVAL, Errno::NODEV, Errno::NXIO];
    err.raw_os_error().is_some_and(|errno| finals.iter().any(|e| e.raw_os_error() == errno))
}

/// When what failed is tried again, and when it is taken to have passed.
#[derive(Debug, Default)]
struct Retries {
    retry_at: Option<Instant>,
    passed_at: Option<Instant>,
}

#[derive(Debug, PartialEq, Eq)]
enum Due {
    Nothing,
    Retry,
    Passed,
}

impl Retries {
    /// Something could not be served. Faults that can be served meanwhile do not put its retry off.
    fn failed(&mut self, now: Instant) {
        self.retry_at.get_or_insert(now + BLOCK);
        self.passed_at = None;
    }

    fn due(&mut self, now: Instant) -> Due {
        if self.retry_at.is_some_and(|at| at <= now) {
            self.retry_at = None;
            self.passed_at = Some(now + PASSED);
            return Due::Retry;
        }
        if self.passed_at.is_some_and(|at| at <= now) {
            self.passed_at = None;
            return Due::Passed;
        }
        Due::Nothing
    }

    /// How long to block so that neither is missed.
    fn within(&self, now: Instant, most: Duration) -> Duration {
        let next = self.retry_at.or(self.passed_at);
        next.map_or(most, |at| at.saturating_duration_since(now).min(most))
    }
}

/// The part of `run` that lies in `within`.
fn clip(run: PageRun, within: PageRun) -> PageRun {
    let start = run.start.0.max(within.start.0);
    let end = run.end().0.min(within.end().0);
    PageRun { start: PageIndex(start), len: end.saturating_sub(start) }
}

const _: () = assert!(FETCH_AROUND as usize <= BATCH);

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::io::Errno;

    #[test]
    fn only_a_descriptor_that_is_gone_ends_a_fault_thread() {
        for errno in [Errno::SRCH, Errno::BADF, Errno::INVAL] {
            assert!(is_final(&errno.into()), "{errno}");
        }
        for errno in [Errno::AGAIN, Errno::INTR, Errno::NOMEM, Errno::FAULT] {
            assert!(!is_final(&errno.into()), "{errno}");
        }
        assert!(!is_final(&io::Error::other("?")));
    }

    #[test]
    fn what_failed_is_tried_again_however_busy_the_vm_is() {
        let start = Instant::now();
        let mut retries = Retries::default();
        assert_eq!((retries.due(start), retries.within(start, BLOCK)), (Due::Nothing, BLOCK));
        retries.failed(start);
        retries.failed(start + BLOCK / 2);
        assert_eq!(retries.within(start + BLOCK / 2, BLOCK), BLOCK / 2);
        assert_eq!(retries.due(start + BLOCK), Due::Retry);
        // It failed again: not over.
        retries.failed(start + BLOCK);
        assert_eq!(retries.due(start + BLOCK + PASSED), Due::Nothing);
        assert_eq!(retries.due(start + 2 * BLOCK), Due::Retry);
        assert_eq!(retries.within(start + 2 * BLOCK, BLOCK), PASSED);
        assert_eq!(retries.due(start + 2 * BLOCK + PASSED), Due::Passed);
        assert_eq!(retries.due(start + 3 * BLOCK), Due::Nothing);
    }
}
