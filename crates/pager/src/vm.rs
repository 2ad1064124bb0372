//! An attached VM: its userfaultfd, what its memory shows, and the thread that serves its faults.
//!
//! The fault path is [`Vm::serve`]: a plain thread that reads events, spins briefly after each and then blocks. It does not
//! allocate, and takes no lock that the control plane holds for longer than a few system calls.

mod missing;
mod remote;
mod writes;

use crate::{
    control::VmReport,
    histogram::Histogram,
    image::Image,
    layer::{BATCH, Layer, PageState},
    session::CopySession,
};
use arc_swap::ArcSwapOption;
use ramet_kernel::{Event, Features, Mode, PagemapScanner, SharedAtomics, Uffd};
use ramet_memory::{PAGE_SIZE, PageCount, PageIndex, PageRun, VmId};
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
