//! What the fuzz target and the property tests both run: a small guest made here, with bytes in it that are anything.

use crate::{Color, ColorMap, CpuRoot, GuestMemory, Method, color};
use ramet_memory::{PAGE_SIZE, PageCount};
use std::io;

/// Pages of the guest.
const PAGES: u64 = 1024;
/// Bytes of an alteration, before those that are written: page, offset, length.
const HEADER: usize = 5;

// Where its parts are, as pages of its memory.
const NOTES: u64 = 16;
const ROOT: u64 = 17;
const SECTIONS: u64 = 27;
const FRAMES: u64 = 32;
const TYPES: u64 = 64;
const OBJECTS: u64 = 80;
const FILE: u64 = 96;
const PROCESS: u64 = 100;
const FREE: u64 = 512;

// Its kernel's address space.
const IMAGE: u64 = 0xffff_ffff_8100_0000;
const DIRECT: u64 = 0xffff_8880_0000_0000;
const FRAME_TABLE: u64 = 0xffff_ea00_0000_0000;

const FREE_MARK: u32 = 0xffff_ff7f;
const SLAB_FLAG: u64 = 9;
const LRU_FLAG: u64 = 4;

const CPU: CpuRoot = CpuRoot { cr3: ROOT * 4096, cr4: 0 };

/// Shared by the fuzz target and the property tests: whatever is written over a guest, it is colored, and its map decodes
/// from what it encodes to.
///
/// # Panics
/// When that does not hold.
#[doc(hidden)]
pub fn fuzz_color(data: &[u8]) {
    let mut guest = guest();
    let mut rest = data;
    while let Some((header, bytes)) = rest.split_first_chunk::<HEADER>() {
        let number = u64::from(u16::from_le_bytes([header[0], header[1]]));
        // Every second one where the kernel's structures are.
        let page = if number % 2 == 0 { NOTES + number / 2 % (PROCESS - NOTES + 4) } else { number / 2 % PAGES };
        let within = u64::from(u16::from_le_bytes([header[2], header[3]])) % PAGE_SIZE as u64;
        let (now, later) = bytes.split_at(bytes.len().min(usize::from(header[4] % 32)));
        let room = (PAGES * PAGE_SIZE as u64 - page * PAGE_SIZE as u64 - within).min(now.len() as u64);
        guest.put(page * PAGE_SIZE as u64 + within, &now[..room as usize]);
        rest = later;
    }
    for cpus in [&[CPU][..], &[]] {
        let Ok(map) = color(&guest, cpus, None) else { panic!("memory that can be read") };
        assert_eq!(map.pages().0, PAGES);
        assert!(map.method == Method::Full || !map.colors().contains(&Color::Free));
        let again = ColorMap::decode(&map.encode(), map.pages());
        assert_eq!(again.as_ref().map(ColorMap::colors), Ok(map.colors()));
        // Bytes that change nothing that is looked at change nothing.
        assert!(data.len() >= HEADER || map.method == Method::Full);
    }
}

struct Guest(Vec<u8>);

impl GuestMemory for Guest {
    fn pages(&self) -> PageCount {
        PageCount(PAGES)
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let from = usize::try_from(offset).unwrap_or(usize::MAX);
        bytes.copy_from_slice(&self.0[from..from + bytes.len()]);
        Ok(())
    }
}

impl Guest {
    fn put(&mut self, at: u64, bytes: &[u8]) {
        self.0[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    }

    fn put_u64(&mut self, at: u64, value: u64) {
        self.put(at, &value.to_le_bytes());
    }

    /// An entry of a page table.
    fn entry(&mut self, table: u64, number: u64, page: u64, bits: u64) {
        self.put_u64(table * 4096 + number * 8, (page * 4096) | bits);
    }

    /// The frame of a page: flags, mapping, what stands in the place of `private`, kind, references.
    fn frame(&mut self, page: u64, flags: u64, mapping: u64, private: u64, kind: u32, references: u32) {
        let at = FRAMES * 4096 + page * 64;
        self.put_u64(at, 1 << 60 | flags);
        self.put_u64(at + 24, mapping);
        self.put_u64(at + 40, private);
        self.put(at + 48, &kind.to_le_bytes());
        self.put(at + 52, &references.to_le_bytes());
    }
}

/// A guest with a kernel, a file of two pages, a process, and free pages.
fn guest() -> Guest {
    let mut guest = Guest(vec![0; PAGES as usize * PAGE_SIZE]);
    notes(&mut guest);
    kernel_tables(&mut guest);
    guest.put(TYPES * 4096, &types());
    // One root of memory sections, and one section in it.
    guest.put_u64(SECTIONS * 4096, DIRECT + (SECTIONS + 1) * 4096);
    guest.put_u64((SECTIONS + 1) * 4096, FRAME_TABLE | 3);
    for page in 0..FREE {
        guest.frame(page, 1 << 12, 0, 0, u32::MAX, 1);
    }
    guest.frame(FREE, 0, 0, 9, FREE_MARK, 0);
    objects(&mut guest);
    process(&mut guest);
    guest
}

fn notes(guest: &mut Guest) {
    let mut text = format!(
        "OSRELEASE=6.1.0-fuzz\nBUILD-ID=0123456789abcdef\nPAGESIZE=4096\nSYMBOL(init_top_pgt)={:x}\nSYMBOL(_stext)={IMAGE:x}\n\
         SYMBOL(mem_section)={:x}\nSIZE(mem_section)=16\nSIZE(page)=64\nNUMBER(phys_base)={}\nNUMBER(pgtable_l5_enabled)=0\n\
         NUMBER(PAGE_BUDDY_MAPCOUNT_VALUE)=-129\nNUMBER(PG_slab)={SLAB_FLAG}\nNUMBER(PG_private)=13\n",
        IMAGE + ROOT * 4096,
        IMAGE + SECTIONS * 4096,
        -0x0100_0000,
    );
    let offsets = [("flags", 0), ("lru", 8), ("mapping", 24), ("private", 40), ("_mapcount", 48), ("_refcount", 52)];
    for (name, offset) in offsets {
        text.push_str(&format!("OFFSET(page.{name})={offset}\n"));
    }
    text.push_str("OFFSET(page.compound_head)=8\nCRASHTIME=0\n");
    guest.put(NOTES * 4096, text.as_bytes());
}

fn kernel_tables(guest: &mut Guest) {
    // The image and the mapping of all memory by large pages, the frame table by small ones.
    guest.entry(ROOT, 511, 18, 0x63);
    guest.entry(18, 510, 19, 0x63);
    guest.entry(19, 8, 0, 0xe3);
    guest.entry(ROOT, 273, 20, 0x63);
    guest.entry(20, 0, 21, 0x63);
    guest.entry(21, 0, 0, 0xe3 | 1 << 63);
    guest.entry(21, 1, 512, 0xe3 | 1 << 63);
    guest.entry(ROOT, 468, 22, 0x63);
    guest.entry(22, 0, 23, 0x63);
    guest.entry(23, 0, 24, 0x63);
    for number in 0..PAGES * 64 / 4096 {
        guest.entry(24, number, FRAMES + number, 0x63 | 1 << 63);
    }
}

/// Structures: names, sizes, members and their offsets.
type Structure = (&'static str, u32, &'static [(&'static str, u32)]);

const STRUCTURES: &[Structure] = &[
    ("page", 64, &[("flags", 0), ("lru", 8), ("mapping", 24), ("index", 32), ("slab_cache", 24), ("pt_mm", 24)]),
    ("address_space", 64, &[("host", 0), ("nrpages", 8)]),
    ("inode", 256, &[("i_mapping", 0), ("i_ino", 8), ("i_sb", 16), ("i_dentry", 24)]),
    ("dentry", 128, &[("d_u", 0), ("d_parent", 16), ("d_name", 24)]),
    ("qstr", 16, &[("name", 8)]),
    ("super_block", 128, &[("s_dev", 0), ("s_type", 8), ("s_id", 16)]),
    ("file_system_type", 16, &[("name", 0)]),
    ("kmem_cache", 64, &[("name", 8)]),
    ("mm_struct", 64, &[("pgd", 0), ("owner", 8)]),
    ("task_struct", 64, &[("mm", 0), ("tgid", 8), ("comm", 16)]),
];

/// Its type information.
fn types() -> Vec<u8> {
    fn name(strings: &mut Vec<u8>, text: &str) -> u32 {
        let whole = [&[0], text.as_bytes(), &[0]].concat();
        let at = strings.windows(whole.len()).position(|known| *known == *whole).map(|at| at + 1);
        at.unwrap_or_else(|| {
            strings.extend(&whole[1..]);
            strings.len() - text.len() - 1
        }) as u32
    }
    let (mut strings, mut words) = (vec![0], vec![0, 1 << 24, 8, 64]);
    for (of, size, members) in STRUCTURES {
        words.extend([name(&mut strings, of), 4 << 24 | members.len() as u32, *size]);
        for (member, offset) in *members {
            words.extend([name(&mut strings, member), 1, offset * 8]);
        }
    }
    let flags = ["PG_lru", "PG_reserved"];
    words.extend([name(&mut strings, "pageflags"), 6 << 24 | flags.len() as u32, 4]);
    for (flag, number) in flags.into_iter().zip([LRU_FLAG as u32, 12]) {
        words.extend([name(&mut strings, flag), number]);
    }
    let len = words.len() as u32 * 4;
    let header = [0x0001_eb9f, 24, 0, len, len, strings.len() as u32];
    let mut bytes: Vec<u8> = header.iter().chain(&words).flat_map(|word| word.to_le_bytes()).collect();
    bytes.extend(strings);
    bytes
}

/// A file of two pages with its inode, names, file system; in a page of a slab cache.
fn objects(guest: &mut Guest) {
    let (page, at) = (OBJECTS * 4096, DIRECT + OBJECTS * 4096);
    let [space, inode, dentry, root, superblock, kind, cache, texts] =
        [0, 0x100, 0x200, 0x300, 0x400, 0x500, 0x600, 0x700];
    for (offset, value) in [
        (space, at + inode),
        (space + 8, 2),
        (inode, at + space),
        (inode + 8, 7),
        (inode + 16, at + superblock),
        (inode + 24, at + dentry),
        (dentry + 16, at + root),
        (dentry + 32, at + texts),
        (root + 16, at + root),
        (superblock, 1),
        (superblock + 8, at + kind),
        (kind, at + texts + 0x10),
        (cache + 8, at + texts + 0x20),
    ] {
        guest.put_u64(page + offset, value);
    }
    for (offset, text) in [(texts, "file"), (texts + 0x10, "ext4"), (texts + 0x20, "objects"), (superblock + 16, "vda")]
    {
        guest.put(page + offset, text.as_bytes());
    }
    guest.frame(OBJECTS, 1 << SLAB_FLAG, at + cache, 0, u32::MAX, 1);
    // Two pages in a list whose head is among the objects.
    let frame = |page: u64| FRAME_TABLE + page * 64;
    for (number, next, previous) in [(0, frame(FILE + 1) + 8, at + 0x800), (1, at + 0x800, frame(FILE) + 8)] {
        guest.frame(FILE + number, 1 << LRU_FLAG, at + space, 0, 0, 2);
        for (offset, value) in [(8, next), (16, previous), (32, number)] {
            guest.put_u64(FRAMES * 4096 + (FILE + number) * 64 + offset, value);
        }
    }
}

/// A process that has the file's first page mapped, and one of its own.
fn process(guest: &mut Guest) {
    let (mm, task) = (DIRECT + OBJECTS * 4096 + 0x900, DIRECT + OBJECTS * 4096 + 0xa00);
    guest.put_u64(mm - DIRECT, DIRECT + PROCESS * 4096);
    guest.put_u64(mm - DIRECT + 8, task);
    guest.put_u64(task - DIRECT, mm);
    guest.put_u64(task - DIRECT + 8, 1);
    guest.put(task - DIRECT + 16, b"init");
    let upper = (ROOT * 4096 + 2048) as usize..(ROOT * 4096 + 4096) as usize;
    let upper = guest.0[upper].to_vec();
    guest.put(PROCESS * 4096 + 2048, &upper);
    for level in 0..3 {
        guest.entry(PROCESS + level, 0, PROCESS + level + 1, 0x67);
    }
    guest.entry(PROCESS + 3, 1, FILE, 0x25);
    guest.entry(PROCESS + 3, 2, PROCESS + 4, 0x67 | 1 << 63);
    for page in PROCESS..PROCESS + 4 {
        guest.frame(page, 0, if page == PROCESS { mm } else { 0 }, 0, u32::MAX, 1);
    }
    guest.frame(PROCESS + 4, 0, DIRECT + OBJECTS * 4096 + 0xb01, 0, 0, 1);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Mapping, Place, ProcessId};
    use ramet_memory::PageIndex;

    #[test]
    fn the_guest_is_one_that_is_understood() {
        let map = color(&guest(), &[CPU], None).unwrap();
        assert_eq!((map.method, map.trouble.as_str()), (Method::Full, ""));
        let colors = |color| (0..PAGES).filter(|&page| map.color(PageIndex(page)) == color).collect::<Vec<_>>();
        assert_eq!(colors(Color::Free), (FREE..PAGES).collect::<Vec<_>>());
        assert_eq!((colors(Color::CacheCode), colors(Color::CacheData)), (vec![FILE], vec![FILE + 1]));
        assert_eq!((colors(Color::UserData), colors(Color::Slab)), (vec![PROCESS + 4], vec![OBJECTS]));
        assert_eq!((map.files[0].path.as_str(), map.caches[0].as_str()), ("/file", "objects"));
        assert_eq!((map.superblocks[0].id.as_str(), map.superblocks[0].kind.as_str()), ("vda", "ext4"));
        assert_eq!((map.processes[0].pid, map.processes[0].command.as_str()), (1, "init"));
        assert_eq!(map.place(PageIndex(FILE + 1)), Some(Place::File(crate::FileId(0), 1)));
        assert_eq!(map.mapping(PageIndex(PROCESS + 4)), Some(Mapping { process: ProcessId(0), page: 2 }));
        let positions = [FILE, FILE + 1].map(|page| map.lru(PageIndex(page)).map(|lru| lru.position));
        assert_eq!(positions, [Some(0), Some(1)]);
    }
}
