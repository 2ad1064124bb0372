//! Memory under a userfaultfd, threads that touch it, tmpfs mounts that go away again.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "each test file uses a part; a failure ends the test"
)]

use ramet_kernel::{Event, Features, Mode, PrivateMapping, Uffd, process_read};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};
use std::{
    ffi::CString,
    fs::File,
    os::unix::fs::FileExt,
    path::Path,
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};
use tempfile::TempDir;

pub const PAGE: u64 = 4096;
const WORDS: usize = 512;

/// The longest that anything here may take: what is never served fails a test instead of hanging it.
pub const LIMIT: Duration = Duration::from_secs(20);

/// What `ramet-pager` asks for, on kernels that have all of it.
pub const PAGER_FEATURES: Features = Features(
    Features::PAGEFAULT_FLAG_WP.0
        | Features::MISSING_SHMEM.0
        | Features::WP_HUGETLBFS_SHMEM.0
        | Features::WP_UNPOPULATED.0,
);

/// For missing pages.
pub const MISSING: Mode = Mode { missing: true, wp: false, minor: false };
/// For writes to protected pages: a parent that was never a clone.
pub const WP: Mode = Mode { missing: false, wp: true, minor: false };
/// Both: a clone whose writes are tracked.
pub const MISSING_WP: Mode = Mode { missing: true, wp: true, minor: false };
/// Missing pages, and those that only the page table lacks.
pub const MISSING_MINOR: Mode = Mode { missing: true, wp: false, minor: true };

/// A tmpfs in a directory of its own; both go away in the end, a panic included.
pub struct Tmpfs(TempDir);

impl Tmpfs {
    pub fn try_mount(options: &str) -> rustix::io::Result<Self> {
        Self::try_mount_in(&std::env::temp_dir(), options)
    }

    pub fn try_mount_in(parent: &Path, options: &str) -> rustix::io::Result<Self> {
        let dir = tempfile::Builder::new().prefix("ramet-kernel-test.").tempdir_in(parent).unwrap();
        let options = CString::new(options).unwrap();
        mount("ramet-kernel-test", dir.path(), "tmpfs", MountFlags::empty(), options.as_c_str())?;
        Ok(Self(dir))
    }

    /// # Panics
    /// Where mounting is not permitted.
    pub fn mount(options: &str) -> Self {
        Self::try_mount(options).unwrap_or_else(|err| panic!("mount a tmpfs with `{options}` (root only): {err}"))
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    /// A new file of `pages` pages that are not there yet.
    pub fn sparse(&self, name: &str, pages: u64) -> File {
        let path = self.path().join(name);
        let file = File::options().read(true).write(true).create_new(true).open(path).unwrap();
        file.set_len(pages * PAGE).unwrap();
        file
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        if let Err(err) = unmount(self.path(), UnmountFlags::DETACH) {
            eprintln!("{} stays mounted: {err}", self.path().display());
        }
    }
}

/// A page full of `value`.
pub fn page_of(value: u64) -> [u8; PAGE as usize] {
    let mut bytes = [0; PAGE as usize];
    bytes.as_chunks_mut::<8>().0.fill(value.to_ne_bytes());
    bytes
}

/// Writes pages full of `value` into a page file, in one call: as the pager does.
pub fn fill(file: &File, page: u64, pages: u64, value: u64) {
    file.write_all_at(&page_of(value).repeat(usize::try_from(pages).unwrap()), page * PAGE).unwrap();
}

/// The first word of a page of a file.
pub fn word_in(file: &File, page: u64) -> u64 {
    let mut word = [0; 8];
    file.read_exact_at(&mut word, page * PAGE).unwrap();
    u64::from_ne_bytes(word)
}

/// What a thread does to the first word of a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Touch {
    Read,
    Write(u64),
}

/// A fault that was delivered, its page counted from the start of the memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    pub page: u64,
    pub write: bool,
    pub wp: bool,
    pub minor: bool,
}

impl Fault {
    pub const fn missing(page: u64, write: bool) -> Self {
        Self { page, write, wp: false, minor: false }
    }

    pub const fn protected(page: u64) -> Self {
        Self { page, write: true, wp: true, minor: false }
    }

    pub const fn minor(page: u64, write: bool) -> Self {
        Self { page, write, wp: false, minor: true }
    }
}

/// A thread that touches a page, and sends the word that it read (there) afterwards.
pub struct Toucher(mpsc::Receiver<u64>);

impl Toucher {
    pub fn start(work: impl FnOnce() -> u64 + Send + 'static) -> Self {
        let (tell, done) = mpsc::channel();
        // Not joined: one that waits for ever must not keep the test from failing.
        std::thread::spawn(move || tell.send(work()));
        Self(done)
    }

    /// Whether it has not got its page so far.
    pub fn waits(&self) -> bool {
        self.0.try_recv() == Err(mpsc::TryRecvError::Empty)
    }

    pub fn finish(&self) -> u64 {
        self.0.recv_timeout(LIMIT).expect("a page was never served")
    }
}

/// A private mapping in this process under a userfaultfd.
pub struct Watched {
    pub memory: Arc<PrivateMapping>,
    pub uffd: Uffd,
}

impl Watched {
    pub fn new(memory: PrivateMapping, features: Features, mode: Mode) -> Self {
        let uffd = Uffd::create().unwrap();
        uffd.api(features).unwrap();
        let watched = Self { memory: Arc::new(memory), uffd };
        watched.register(mode);
        watched
    }

    pub fn anonymous(pages: u64, mode: Mode) -> Self {
        Self::new(PrivateMapping::anonymous(bytes(pages)).unwrap(), PAGER_FEATURES, mode)
    }

    pub fn of_file(file: &File, pages: u64, mode: Mode) -> Self {
        Self::new(PrivateMapping::of_file(file, bytes(pages)).unwrap(), PAGER_FEATURES, mode)
    }

    pub fn register(&self, mode: Mode) {
        self.uffd.register(self.memory.addr(), self.memory.len() as u64, mode).unwrap();
    }

    pub fn addr(&self, page: u64) -> u64 {
        self.memory.addr() + page * PAGE
    }

    pub fn protect(&self, page: u64, pages: u64) {
        self.uffd.write_protect(self.addr(page), pages * PAGE, true, false).unwrap();
    }

    pub fn unprotect(&self, page: u64, pages: u64) {
        self.uffd.write_protect(self.addr(page), pages * PAGE, false, false).unwrap();
    }

    pub fn wake(&self, page: u64) {
        self.uffd.wake(self.addr(page), PAGE).unwrap();
    }

    /// The first word of a page, in the way of the pager's copier. Only of pages that are known to be there.
    pub fn peek(&self, page: u64) -> u64 {
        let mut word = [0; 8];
        process_read(std::process::id(), self.addr(page), &mut word).unwrap();
        u64::from_ne_bytes(word)
    }

    /// Starts a thread that touches a page.
    pub fn start(&self, page: u64, touch: Touch) -> Toucher {
        let memory = self.memory.clone();
        let word = usize::try_from(page).unwrap() * WORDS;
        Toucher::start(move || {
            if let Touch::Write(value) = touch {
                memory.write_u64(word, value);
            }
            memory.read_u64(word)
        })
    }

    /// The next fault.
    ///
    /// # Panics
    /// When none comes.
    pub fn fault(&self) -> Fault {
        assert!(self.uffd.poll(Some(LIMIT)).unwrap(), "no fault was delivered");
        self.try_fault().expect("a fault")
    }

    /// A fault that was delivered and not taken yet.
    pub fn try_fault(&self) -> Option<Fault> {
        let mut event = [Event::Other];
        match (self.uffd.read_events(&mut event).unwrap(), event[0]) {
            (0, _) => None,
            (_, Event::Pagefault { addr, write, wp, minor }) => {
                Some(Fault { page: (addr - self.memory.addr()) / PAGE, write, wp, minor })
            }
            (_, Event::Other) => panic!("an event that nobody asked for"),
        }
    }

    /// Touches a page and has `serve` resolve what faults that raises. Returns the word read in the end, and the faults.
    pub fn touch(&self, page: u64, touch: Touch, mut serve: impl FnMut(Fault)) -> (u64, Vec<Fault>) {
        let toucher = self.start(page, touch);
        let until = Instant::now() + LIMIT;
        let mut faults = Vec::new();
        loop {
            if let Some(fault) = self.try_fault() {
                faults.push(fault);
                serve(fault);
            }
            match toucher.0.recv_timeout(Duration::from_micros(50)) {
                Ok(value) => {
                    assert_eq!(self.try_fault(), None, "a fault that nobody waits for");
                    return (value, faults);
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => panic!("page {page} can't be touched"),
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    assert!(Instant::now() < until, "page {page} was never served; faults: {faults:?}");
                }
            }
        }
    }

    /// As [`Watched::touch`], of a page that must raise no fault.
    pub fn touch_quietly(&self, page: u64, touch: Touch) -> u64 {
        let (value, faults) = self.touch(page, touch, |fault| panic!("a fault for a page that is there: {fault:?}"));
        assert_eq!(faults, []);
        value
    }
}

pub fn bytes(pages: u64) -> usize {
    usize::try_from(pages * PAGE).unwrap()
}

/// The kernel must not put huge pages under what a test counts in small ones.
pub fn small_pages() {
    rustix::thread::disable_transparent_huge_pages(true).unwrap();
}
