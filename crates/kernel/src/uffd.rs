//! userfaultfd: faults of another process, as events.

use crate::check;
use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    time::Duration,
};

const UFFD_API: u64 = 0xaa;
const PAGE: u64 = 4096;

// ioctl numbers: _IOWR(0xaa, n, struct) and _IOR for the two that only read.
const fn iowr(number: u64, size: usize) -> u64 {
    (3 << 30) | ((size as u64) << 16) | (0xaa << 8) | number
}
const fn ior(number: u64, size: usize) -> u64 {
    (2 << 30) | ((size as u64) << 16) | (0xaa << 8) | number
}
const UFFDIO_API: u64 = iowr(0x3f, 24);
const UFFDIO_REGISTER: u64 = iowr(0x00, 32);
const UFFDIO_UNREGISTER: u64 = ior(0x01, 16);
const UFFDIO_WAKE: u64 = ior(0x02, 16);
const UFFDIO_COPY: u64 = iowr(0x03, 40);
const UFFDIO_ZEROPAGE: u64 = iowr(0x04, 32);
const UFFDIO_WRITEPROTECT: u64 = iowr(0x06, 24);
const UFFDIO_CONTINUE: u64 = iowr(0x07, 32);
const USERFAULTFD_IOC_NEW: u64 = 0xaa00;

const MODE_MISSING: u64 = 1;
const MODE_WP: u64 = 2;
const MODE_MINOR: u64 = 4;
const DONT_WAKE: u64 = 1;
const COPY_WP: u64 = 2;
const WP_ON: u64 = 1;
const WP_DONT_WAKE: u64 = 2;
const EVENT_PAGEFAULT: u8 = 0x12;
const FAULT_WRITE: u64 = 1;
const FAULT_WP: u64 = 2;
const FAULT_MINOR: u64 = 4;

/// Features of the kernel's userfaultfd, as bits of `UFFDIO_API`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Features(pub u64);

impl Features {
    /// Write protection of anonymous memory reports which thread faulted and the exact address.
    pub const PAGEFAULT_FLAG_WP: Self = Self(1);
    /// Missing pages of tmpfs files.
    pub const MISSING_SHMEM: Self = Self(1 << 5);
    /// Minor faults of tmpfs files.
    pub const MINOR_SHMEM: Self = Self(1 << 10);
    /// Addresses are exact, not rounded to pages.
    pub const EXACT_ADDRESS: Self = Self(1 << 11);
    /// Write protection of tmpfs files (5.19).
    pub const WP_HUGETLBFS_SHMEM: Self = Self(1 << 12);
    /// Write protection of anonymous pages that are not there yet (6.4).
    pub const WP_UNPOPULATED: Self = Self(1 << 13);

    /// Whether all of `other` are among these.
    #[must_use]
    pub const fn has(self, other: Self) -> bool {
        self.0 & other.0 == other.0
    }
}

/// What a range is registered for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Mode {
    /// Missing pages.
    pub missing: bool,
    /// Writes to protected pages.
    pub wp: bool,
    /// Pages that are in the page cache and not mapped yet.
    pub minor: bool,
}

/// How pages are copied in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct CopyMode {
    /// Install them write-protected.
    pub wp: bool,
    /// Leave waiting threads asleep.
    pub dont_wake: bool,
}

/// Why pages could not be installed.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// A page is there already: somebody was faster.
    #[error("The page is there already")]
    Exists,
    /// The address space is changing: drain the events, then go on after `copied` bytes.
    #[error("The address space is changing; {copied} bytes were installed")]
    Again {
        /// Bytes installed.
        copied: usize,
    },
    /// The process is gone.
    #[error("The process is gone")]
    Gone,
    /// Anything else.
    #[error("Failed to install pages")]
    Io(#[source] io::Error),
}

impl From<CopyError> for io::Error {
    fn from(err: CopyError) -> Self {
        match err {
            CopyError::Gone => Self::from_raw_os_error(libc::ESRCH),
            CopyError::Io(err) => err,
            CopyError::Exists => Self::from_raw_os_error(libc::EEXIST),
            CopyError::Again { .. } => Self::from_raw_os_error(libc::EAGAIN),
        }
    }
}

/// What a userfaultfd tells.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Event {
    /// A thread waits for a page.
    Pagefault {
        /// The address, rounded down to a page.
        addr: u64,
        /// It wants to write.
        write: bool,
        /// The page is there and write-protected.
        wp: bool,
        /// The page is in the page cache.
        minor: bool,
    },
    /// An event that was not asked for.
    #[default]
    Other,
}

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    thread: u64,
}
const _: () = assert!(size_of::<Message>() == 32);

/// Events read by one call.
const MOST_EVENTS: usize = 16;

/// A userfaultfd. Works on the address space of the process that made it, whoever holds it.
#[derive(Debug)]
pub struct Uffd(OwnedFd);

impl From<OwnedFd> for Uffd {
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Uffd {
    /// Makes a userfaultfd for this process, non-blocking, which also serves faults taken inside the kernel. Uses
    /// `/dev/userfaultfd` where it can, else the system call.
    ///
    /// # Errors
    /// Without the right: be root, or have access to `/dev/userfaultfd`, or set `vm.unprivileged_userfaultfd=1`.
    pub fn create() -> io::Result<Self> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let fd = match std::fs::File::open("/dev/userfaultfd") {
            // SAFETY: the ioctl takes flags by value and returns a new descriptor.
            Ok(device) => check(unsafe { libc::ioctl(device.as_raw_fd(), USERFAULTFD_IOC_NEW, flags) })?,
            Err(_) => {
                // SAFETY: the call takes flags by value and returns a new descriptor.
                let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
                check(i32::try_from(fd).unwrap_or(-1))?
            }
        };
        // SAFETY: the kernel has just returned this descriptor and nobody else owns it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    fn ioctl<T>(&self, number: u64, argument: &mut T) -> io::Result<()> {
        // SAFETY: every caller passes the structure that belongs to the ioctl's number, whose size the number contains;
        // it outlives the call. The kernel checks addresses in it against the registered address space, which is not
        // taken to be ours: no reference of this process points into a registered range (see `memory`).
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), number, std::ptr::from_mut(argument)) }).map(drop)
    }

    /// Agrees on the interface; to be called once in a userfaultfd's life. Succeeds too when it was done before, by
    /// another process that held this descriptor: then the features are unknown (0).
    ///
    /// # Errors
    /// When the kernel lacks a wanted feature.
    pub fn api(&self, wanted: Features) -> io::Result<Features> {
        let mut argument = [UFFD_API, wanted.0, 0u64];
        match self.ioctl(UFFDIO_API, &mut argument) {
            Ok(()) => Ok(Features(argument[1])),
            // EPERM: kernels since 6.? for a second call; EINVAL before. A first call with a feature that the kernel
            // lacks gives EINVAL as well, so ask what a fresh one says.
            Err(err) if matches!(err.raw_os_error(), Some(libc::EINVAL | libc::EPERM)) => {
                let fresh = Self::create()?;
                let mut argument = [UFFD_API, wanted.0, 0u64];
                fresh.ioctl(UFFDIO_API, &mut argument).map_err(|_| err)?;
                Ok(Features(0))
            }
            Err(err) => Err(err),
        }
    }

    /// The features that this kernel has.
    ///
    /// # Errors
    /// As [`Uffd::create`].
    pub fn supported() -> io::Result<Features> {
        Self::create()?.api(Features(0))
    }

    /// Registers a range of whole pages. Registering it again changes the mode.
    ///
    /// # Errors
    /// When the range holds a mapping that can't be registered so.
    pub fn register(&self, addr: u64, len: u64, mode: Mode) -> io::Result<()> {
        let mut bits = 0;
        bits |= if mode.missing { MODE_MISSING } else { 0 };
        bits |= if mode.wp { MODE_WP } else { 0 };
        bits |= if mode.minor { MODE_MINOR } else { 0 };
        self.ioctl(UFFDIO_REGISTER, &mut [addr, len, bits, 0])
    }

    /// Unregisters a range.
    ///
    /// # Errors
    /// When it is not registered.
    pub fn unregister(&self, addr: u64, len: u64) -> io::Result<()> {
        self.ioctl(UFFDIO_UNREGISTER, &mut [addr, len])
    }

    /// Wakes the threads that wait for a page of the range: they fault again.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn wake(&self, addr: u64, len: u64) -> io::Result<()> {
        self.ioctl(UFFDIO_WAKE, &mut [addr, len])
    }

    /// Installs private copies of whole pages at `addr` and wakes their waiters. Returns the bytes installed.
    ///
    /// # Errors
    /// [`CopyError`].
    pub fn copy(&self, addr: u64, bytes: &[u8], mode: CopyMode) -> Result<usize, CopyError> {
        let flags = if mode.wp { COPY_WP } else { 0 } | if mode.dont_wake { DONT_WAKE } else { 0 };
        let mut argument = [addr, bytes.as_ptr() as u64, bytes.len() as u64, flags, 0];
        let done = self.ioctl(UFFDIO_COPY, &mut argument);
        installed(done, argument[4])
    }

    /// Installs zero pages. Returns the bytes installed.
    ///
    /// # Errors
    /// [`CopyError`].
    pub fn zeropage(&self, addr: u64, len: u64, dont_wake: bool) -> Result<usize, CopyError> {
        let mut argument = [addr, len, u64::from(dont_wake), 0];
        let done = self.ioctl(UFFDIO_ZEROPAGE, &mut argument);
        installed(done, argument[3])
    }

    /// Maps pages that are in the page cache (minor faults). Returns the bytes mapped.
    ///
    /// # Errors
    /// [`CopyError`].
    pub fn continue_(&self, addr: u64, len: u64) -> Result<usize, CopyError> {
        let mut argument = [addr, len, 0, 0];
        let done = self.ioctl(UFFDIO_CONTINUE, &mut argument);
        installed(done, argument[3])
    }

    /// Protects a range from writes, or (`on` false) makes it writable and wakes the threads that wait to write.
    ///
    /// # Errors
    /// `WouldBlock` while the address space is changing: try again.
    pub fn write_protect(&self, addr: u64, len: u64, on: bool, dont_wake: bool) -> io::Result<()> {
        let mode = if on { WP_ON } else { 0 } | if dont_wake { WP_DONT_WAKE } else { 0 };
        self.ioctl(UFFDIO_WRITEPROTECT, &mut [addr, len, mode])
    }

    /// Reads up to 16 events without waiting or allocating; 0 when there are none.
    ///
    /// # Errors
    /// When the descriptor fails.
    pub fn read_events(&self, events: &mut [Event]) -> io::Result<usize> {
        let mut messages = [Message::default(); MOST_EVENTS];
        let most = events.len().min(MOST_EVENTS);
        let len = most * size_of::<Message>();
        // SAFETY: the buffer is `len` bytes long at least, and any bytes are a valid `Message`.
        let read = unsafe { libc::read(self.0.as_raw_fd(), messages.as_mut_ptr().cast(), len) };
        if read < 0 {
            let err = io::Error::last_os_error();
            return match err.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => Ok(0),
                _ => Err(err),
            };
        }
        let count = read.cast_unsigned() / size_of::<Message>();
        for (event, message) in events.iter_mut().zip(&messages[..count]) {
            *event = if message.event == EVENT_PAGEFAULT {
                Event::Pagefault {
                    addr: message.address & !(PAGE - 1),
                    write: message.flags & FAULT_WRITE != 0,
                    wp: message.flags & FAULT_WP != 0,
                    minor: message.flags & FAULT_MINOR != 0,
                }
            } else {
                Event::Other
            };
        }
        Ok(count)
    }

    /// Waits for an event; false when none came in time.
    ///
    /// # Errors
    /// When the descriptor fails.
    pub fn poll(&self, limit: Option<Duration>) -> io::Result<bool> {
        crate::pidfd::poll_in(self.0.as_fd(), limit)
    }
}

fn installed(done: io::Result<()>, bytes: u64) -> Result<usize, CopyError> {
    let Err(err) = done else { return Ok(usize::try_from(bytes).unwrap_or(0)) };
    // The kernel reports partial progress in the structure, and the errno negated there when there was none.
    let copied = usize::try_from(bytes.cast_signed()).unwrap_or(0);
    match err.raw_os_error() {
        Some(libc::EEXIST) if copied == 0 => Err(CopyError::Exists),
        Some(libc::EAGAIN | libc::EEXIST) => Err(CopyError::Again { copied }),
        Some(libc::ESRCH) => Err(CopyError::Gone),
        _ => Err(CopyError::Io(err)),
    }
}
