//! Mappings, as safe types. No reference is ever made into a mapping that another process may write: access is by atomic or
//! volatile copies only.

use std::{
    fs::File,
    io,
    os::fd::AsRawFd,
    path::Path,
    ptr::NonNull,
    sync::atomic::{AtomicU64, Ordering},
};

/// A mapping, unmapped in the end.
#[derive(Debug)]
struct Mapping {
    addr: NonNull<u64>,
    words: usize,
}

// SAFETY: the mapping is plain memory that any thread may access; all access is atomic or volatile.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(file: Option<&File>, len: usize, flags: libc::c_int) -> io::Result<Self> {
        let fd = file.map_or(-1, File::as_raw_fd);
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping at an address that the kernel chooses touches nothing that exists.
        let addr = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, fd, 0) };
        if addr == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let addr = NonNull::new(addr.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        Ok(Self { addr, words: len / 8 })
    }

    fn word(&self, index: usize) -> *mut u64 {
        assert!(index < self.words, "word {index} of a mapping of {} words", self.words);
        // SAFETY: the index lies inside the mapping, as just checked.
        unsafe { self.addr.as_ptr().add(index) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours, and nothing that borrows from it outlives it.
        unsafe { libc::munmap(self.addr.as_ptr().cast(), self.words * 8) };
    }
}

/// An array of `AtomicU64` in a file on tmpfs: it survives the process, and starts as zeros.
#[derive(Debug)]
pub struct SharedAtomics(Mapping);

impl SharedAtomics {
    /// Maps the file at `path` with room for `len` numbers, making it when it is not there. Memory is taken as numbers
    /// are touched.
    ///
    /// # Errors
    /// When the file can't be made, or has another length.
    pub fn open(path: &Path, len: usize) -> io::Result<Self> {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path)?;
        let bytes = len.max(1) as u64 * 8;
        match file.metadata()?.len() {
            0 => file.set_len(bytes)?,
            found if found == bytes => {}
            found => return Err(io::Error::other(format!("{} has {found} bytes, not {bytes}", path.display()))),
        }
        Mapping::new(Some(&file), len.max(1) * 8, libc::MAP_SHARED).map(Self)
    }

    /// How many numbers.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.words
    }

    /// Never true.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// A number.
    ///
    /// # Panics
    /// Beyond the end.
    #[must_use]
    pub fn get(&self, index: usize) -> &AtomicU64 {
        // SAFETY: the pointer is aligned, inside the mapping and valid as long as `self`; everyone who maps the file
        // accesses it by atomics of this size only.
        unsafe { AtomicU64::from_ptr(self.0.word(index)) }
    }

    /// Reads a number without ordering.
    #[must_use]
    pub fn load(&self, index: usize) -> u64 {
        self.get(index).load(Ordering::Relaxed)
    }
}

macro_rules! volatile_words {
    ($name:ident) => {
        impl $name {
            /// The address in this process.
            #[must_use]
            pub fn addr(&self) -> u64 {
                self.0.addr.as_ptr() as u64
            }

            /// The length in bytes.
            #[must_use]
            pub fn len(&self) -> usize {
                self.0.words * 8
            }

            /// Never true.
            #[must_use]
            pub fn is_empty(&self) -> bool {
                self.0.words == 0
            }

            /// Reads a word. May wait for a page.
            ///
            /// # Panics
            /// Beyond the end.
            #[must_use]
            pub fn read_u64(&self, index: usize) -> u64 {
                // SAFETY: inside the mapping (checked), aligned, and no reference to it exists.
                unsafe { self.0.word(index).read_volatile() }
            }

            /// Writes a word. May wait for a page.
            ///
            /// # Panics
            /// Beyond the end.
            pub fn write_u64(&self, index: usize, value: u64) {
                // SAFETY: as for reading.
                unsafe { self.0.word(index).write_volatile(value) }
            }
        }
    };
}

/// A shared mapping of a file: what a VMM's RAM is.
#[derive(Debug)]
pub struct SharedMapping(Mapping);
volatile_words!(SharedMapping);

impl SharedMapping {
    /// Maps the first `len` bytes of a file.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn map(file: &File, len: usize) -> io::Result<Self> {
        Mapping::new(Some(file), len, libc::MAP_SHARED).map(Self)
    }
}

/// A private mapping, of a file or of zeros: what a clone's memory is.
#[derive(Debug)]
pub struct PrivateMapping(Mapping);
volatile_words!(PrivateMapping);

impl PrivateMapping {
    /// A private view of the first `len` bytes of a file.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn of_file(file: &File, len: usize) -> io::Result<Self> {
        Mapping::new(Some(file), len, libc::MAP_PRIVATE | libc::MAP_NORESERVE).map(Self)
    }

    /// Zeros.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn anonymous(len: usize) -> io::Result<Self> {
        Mapping::new(None, len, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE).map(Self)
    }
}
