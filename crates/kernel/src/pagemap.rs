//! Which pages of another process are its own.

use std::{
    fs::File,
    io,
    os::{fd::AsRawFd, unix::fs::FileExt},
};

const PAGE: u64 = 4096;
/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: u64 = (3 << 30) | ((size_of::<ScanArgument>() as u64) << 16) | ((b'f' as u64) << 8) | 16;
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;

#[repr(C)]
struct ScanArgument {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}
const _: () = assert!(size_of::<ScanArgument>() == 96);

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

/// Reads the page map of a process, by `PAGEMAP_SCAN` (6.7) or, on older kernels, from `/proc/PID/pagemap`.
#[derive(Debug)]
pub struct PagemapScanner {
    file: File,
    scan: bool,
}

impl PagemapScanner {
    /// Opens the page map of a process.
    ///
    /// # Errors
    /// When the process is gone or not ours to read.
    pub fn open(pid: u32) -> io::Result<Self> {
        Ok(Self { file: File::open(format!("/proc/{pid}/pagemap"))?, scan: Self::supported() })
    }

    /// Whether the kernel has `PAGEMAP_SCAN`.
    #[must_use]
    pub fn supported() -> bool {
        File::open("/proc/self/pagemap").is_ok_and(|file| {
            let scanner = Self { file, scan: true };
            scanner.by_scan(PAGE, PAGE, |_, _| {}).is_ok()
        })
    }

    /// The same process by the slower way, for tests that compare the two.
    #[must_use]
    pub fn without_scan(mut self) -> Self {
        self.scan = false;
        self
    }

    /// Passes on the start address and the length in bytes of each run of pages that are private to the process: written
    /// to since they were mapped. Zero pages are left out where the kernel can tell them.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn private_pages(&self, addr: u64, len: u64, mut found: impl FnMut(u64, u64)) -> io::Result<()> {
        if self.scan { self.by_scan(addr, len, found) } else { self.by_entries(addr, len, &mut found) }
    }

    fn by_scan(&self, addr: u64, len: u64, mut found: impl FnMut(u64, u64)) -> io::Result<()> {
        let mut regions = [Region::default(); 128];
        let mut at = addr;
        let end = addr + len;
        while at < end {
            let mut argument = ScanArgument {
                size: size_of::<ScanArgument>() as u64,
                flags: 0,
                start: at,
                end,
                walk_end: 0,
                vec: regions.as_mut_ptr() as u64,
                vec_len: regions.len() as u64,
                max_pages: 0,
                category_inverted: PAGE_IS_FILE | PAGE_IS_PFNZERO,
                category_mask: PAGE_IS_FILE | PAGE_IS_PFNZERO,
                category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
                return_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
            };
            // SAFETY: the structure has the size that the number names, and `vec` points to `vec_len` regions; both
            // outlive the call.
            let rc = unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, &raw mut argument) };
            let count = usize::try_from(rc).map_err(|_| io::Error::last_os_error())?;
            for region in &regions[..count.min(regions.len())] {
                if region.categories & PAGE_IS_PRESENT != 0 {
                    found(region.start, region.end - region.start);
                } else {
                    // Swapped out, or never there: a protected page without contents looks swapped to this call.
                    self.by_entries(region.start, region.end - region.start, &mut found)?;
                }
            }
            if argument.walk_end <= at {
                break;
            }
            at = argument.walk_end;
        }
        Ok(())
    }

    fn by_entries(&self, addr: u64, len: u64, found: &mut dyn FnMut(u64, u64)) -> io::Result<()> {
        let mut entries = [0u8; 8 * 512];
        let mut at = addr / PAGE;
        let end = (addr + len) / PAGE;
        let mut run: Option<(u64, u64)> = None;
        while at < end {
            let count = usize::try_from((end - at).min(512)).unwrap_or(512);
            self.file.read_exact_at(&mut entries[..count * 8], at * 8)?;
            for (entry, page) in entries[..count * 8].as_chunks::<8>().0.iter().zip(at..) {
                if is_private(u64::from_le_bytes(*entry)) {
                    match &mut run {
                        Some((_, pages)) => *pages += 1,
                        None => run = Some((page, 1)),
                    }
                } else if let Some((start, pages)) = run.take() {
                    found(start * PAGE, pages * PAGE);
                }
            }
            at += count as u64;
        }
        if let Some((start, pages)) = run {
            found(start * PAGE, pages * PAGE);
        }
        Ok(())
    }
}

/// Whether an entry of `/proc/PID/pagemap` is a page with contents of the process's own.
const fn is_private(entry: u64) -> bool {
    const PRESENT: u64 = 1 << 63;
    const SWAPPED: u64 = 1 << 62;
    const FILE_OR_SHARED: u64 = 1 << 61;
    /// The last swap type: an entry that only says "protected" where no page is (`SWP_PTE_MARKER`).
    const MARKER: u64 = 31;
    if entry & FILE_OR_SHARED != 0 {
        return false;
    }
    entry & PRESENT != 0 || (entry & SWAPPED != 0 && entry & 31 != MARKER)
}
