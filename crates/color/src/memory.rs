//! Reading a guest's memory: the trait that its holder implements, and reads by address on top of it.

use ramet_memory::{Gpa, MemoryLayout, PAGE_SIZE, PageCount, PageIndex};
use std::{fs::File, io, os::unix::fs::FileExt, path::Path};

/// A guest's memory at one moment. It must not change while it is looked at; whatever is in it, looking is safe.
pub trait GuestMemory {
    /// Number of its pages.
    fn pages(&self) -> PageCount;

    /// Where they stand in the guest's physical address space.
    fn layout(&self) -> MemoryLayout {
        MemoryLayout::pc(self.pages().size())
    }

    /// Fills `bytes` from byte `offset` of memory, as it lies in the page file. Never asked for bytes beyond the end.
    ///
    /// # Errors
    /// When these bytes can't be had. The coloring ends then.
    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()>;

    /// The first page from `page` on that may hold anything but zeros. What lies between is not looked at.
    fn next_data(&self, page: PageIndex) -> Option<PageIndex> {
        (page.0 < self.pages().0).then_some(page)
    }
}

/// Memory that could not be colored.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ColorError {
    /// A read failed.
    #[error("Failed to read the guest's memory at byte {offset:#x}")]
    Read {
        /// Where.
        offset: u64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A file that is no memory image.
    #[error("Failed to open the memory image {path}")]
    Open {
        /// The file.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A memory image that ends too early.
    #[error("Memory image {path} is cut short: it has {have} bytes, the guest has {want}; copy it again as a whole")]
    Short {
        /// The file.
        path: String,
        /// Its length.
        have: u64,
        /// What it should be.
        want: u64,
    },
}

/// A raw memory image in a file: byte 0 is the first byte of RAM, with no gap for the PCI hole.
#[derive(Debug)]
pub struct FileMemory {
    file: File,
    pages: PageCount,
}

impl FileMemory {
    /// The image of a guest with `pages` pages.
    ///
    /// # Errors
    /// When it can't be opened, or holds less.
    pub fn open(path: &Path, pages: PageCount) -> Result<Self, ColorError> {
        let name = || path.display().to_string();
        let open = || File::open(path).and_then(|file| Ok((file.metadata()?.len(), file)));
        let (have, file) = open().map_err(|source| ColorError::Open { path: name(), source })?;
        let want = pages.size().bytes();
        if have < want {
            return Err(ColorError::Short { path: name(), have, want });
        }
        Ok(Self { file, pages })
    }
}

impl GuestMemory for FileMemory {
    fn pages(&self) -> PageCount {
        self.pages
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(bytes, offset)
    }
}

/// Reads by guest-physical address.
pub(crate) struct Physical<'a> {
    memory: &'a dyn GuestMemory,
    layout: MemoryLayout,
    pages: PageCount,
}

/// The 512 entries of a page table.
pub(crate) type Table = [u64; 512];

impl<'a> Physical<'a> {
    pub(crate) fn new(memory: &'a dyn GuestMemory) -> Self {
        Self { memory, layout: memory.layout(), pages: memory.pages() }
    }

    pub(crate) const fn pages(&self) -> PageCount {
        self.pages
    }

    pub(crate) fn next_data(&self, page: PageIndex) -> Option<PageIndex> {
        self.memory.next_data(page).filter(|next| next.0 >= page.0 && next.0 < self.pages.0)
    }

    /// The page of memory at an address.
    pub(crate) fn page(&self, gpa: u64) -> Option<PageIndex> {
        self.layout.page(Gpa(gpa)).filter(|page| page.0 < self.pages.0)
    }

    /// The address of a page of memory.
    pub(crate) fn gpa(&self, page: PageIndex) -> u64 {
        self.layout.gpa(page).map_or(u64::MAX, |gpa| gpa.0)
    }

    /// The same in whole pages.
    pub(crate) fn frame(&self, page: PageIndex) -> u64 {
        self.gpa(page) / PAGE_SIZE as u64
    }

    /// Bytes of a page file.
    pub(crate) fn read_page_file(&self, offset: u64, bytes: &mut [u8]) -> Result<(), ColorError> {
        self.memory.read(offset, bytes).map_err(|source| ColorError::Read { offset, source })
    }

    /// Fills `bytes` from an address; false where there is no memory.
    pub(crate) fn read(&self, mut gpa: u64, mut bytes: &mut [u8]) -> Result<bool, ColorError> {
        while !bytes.is_empty() {
            let Some(page) = self.page(gpa) else { return Ok(false) };
            // One page at a time knows no holes; pages that follow each other are the rule.
            let within = gpa % PAGE_SIZE as u64;
            let mut len = (PAGE_SIZE as u64 - within).min(bytes.len() as u64);
            while len < bytes.len() as u64
                && self.page(gpa + len).is_some_and(|p| p.offset() == page.offset() + within + len)
            {
                len = (len + PAGE_SIZE as u64).min(bytes.len() as u64);
            }
            let (now, rest) = bytes.split_at_mut(usize::try_from(len).unwrap_or(0));
            self.read_page_file(page.offset() + within, now)?;
            gpa += len;
            bytes = rest;
        }
        Ok(true)
    }

    /// The page table at an address.
    pub(crate) fn table(&self, gpa: u64) -> Result<Option<Box<Table>>, ColorError> {
        let mut bytes = [0; PAGE_SIZE];
        if !self.read(gpa & !0xfff, &mut bytes)? {
            return Ok(None);
        }
        let mut table = Box::new([0; 512]);
        for (entry, raw) in table.iter_mut().zip(bytes.as_chunks::<8>().0) {
            *entry = u64::from_le_bytes(*raw);
        }
        Ok(Some(table))
    }
}
