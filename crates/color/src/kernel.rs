//! Finding the guest's kernel, and what its structures look like.

use crate::{
    btf::Btf,
    memory::{ColorError, Physical, Table},
    paging::{ADDRESS, BY_CPU, CpuRoot, IMAGE_START, KernelSpace, PRESENT},
    vmcoreinfo::{self, Vmcoreinfo},
};
use ramet_memory::PageIndex;
use serde::{Deserialize, Serialize};

/// Bytes of a `struct page`: the same on every kernel from 5.10 to 7.3.
pub(crate) const FRAME: usize = 64;
/// Entries of a root that are the kernel's.
const UPPER: std::ops::Range<usize> = 256..512;

/// A kernel that was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Kernel {
    /// Where its notes are.
    pub(crate) notes_page: PageIndex,
    pub(crate) notes: Vmcoreinfo,
    /// Guest-physical address of its own page-table root.
    pub(crate) root: u64,
    pub(crate) levels: u8,
    /// `_stext`.
    pub(crate) text: u64,
    /// Guest-physical address of `_stext`.
    pub(crate) text_gpa: u64,
}

impl Kernel {
    /// Where its image begins: its text, at a multiple of 2 MiB.
    pub(crate) const fn image(&self) -> u64 {
        self.text & !((2 << 20) - 1)
    }
}

/// What the search for a kernel came to.
pub(crate) enum Search {
    /// A kernel and its address space.
    Found(Box<Kernel>),
    /// Why there is none.
    Nothing(String),
}

/// Searches memory for a Linux kernel whose page tables the CPUs run on.
pub(crate) fn find(physical: &Physical<'_>, cpus: &[CpuRoot]) -> Result<Search, ColorError> {
    let mut others = 0;
    let found = vmcoreinfo::find(physical, |page, notes| {
        let found = check(physical, page, notes, cpus)?;
        others += u32::from(found.is_none());
        Ok(found)
    })?;
    Ok(match found {
        Some(kernel) => Search::Found(Box::new(kernel)),
        None if others > 0 => {
            Search::Nothing("the notes of a Linux kernel in memory do not fit the page tables that its CPUs use".into())
        }
        None => Search::Nothing("no notes of a Linux kernel (vmcoreinfo) are in memory".into()),
    })
}

/// Whether notes are those of a kernel that runs.
pub(crate) fn check(
    physical: &Physical<'_>,
    notes_page: PageIndex,
    notes: Vmcoreinfo,
    cpus: &[CpuRoot],
) -> Result<Option<Kernel>, ColorError> {
    let levels = match notes.number("pgtable_l5_enabled") {
        Some(0) | None => 4,
        Some(_) => 5,
    };
    let base = notes.number("phys_base");
    let physical_of = |va: u64| va.checked_sub(IMAGE_START)?.checked_add_signed(base?).filter(|gpa| *gpa <= ADDRESS);
    let (Some(table), Some(text)) = (notes.symbol("init_top_pgt"), notes.symbol("_stext")) else { return Ok(None) };
    let (Some(root), Some(text_gpa)) = (physical_of(table), physical_of(text)) else { return Ok(None) };
    let Some((gpa, execute)) = translate(physical, root, levels, text)? else { return Ok(None) };
    if gpa != text_gpa || !execute || !agrees_with_cpus(physical, root, levels, cpus)? {
        return Ok(None);
    }
    Ok(Some(Kernel { notes_page, notes, root, levels, text, text_gpa }))
}

/// Where one address is mapped, and whether it may be executed there.
fn translate(physical: &Physical<'_>, root: u64, levels: u8, va: u64) -> Result<Option<(u64, bool)>, ColorError> {
    let (mut table, mut execute) = (root, true);
    for level in (1..=levels).rev() {
        let shift = 12 + 9 * u32::from(level - 1);
        let mut bytes = [0; 8];
        if !physical.read((table & ADDRESS) + 8 * (va >> shift & 511), &mut bytes)? {
            return Ok(None);
        }
        let entry = u64::from_le_bytes(bytes);
        if entry & PRESENT == 0 {
            return Ok(None);
        }
        execute &= entry >> 63 == 0;
        if level == 1 || (entry & 0x80 != 0 && level <= 3) {
            let within = (1 << shift) - 1;
            return Ok(Some(((entry & ADDRESS & !within) | (va & within), execute)));
        }
        table = entry;
    }
    Ok(None)
}

/// Whether some CPU runs on the kernel's half of these tables. What a guest's user writes into memory can look like a kernel,
/// but no CPU runs on it. Without CPUs to ask, nothing speaks against it.
fn agrees_with_cpus(physical: &Physical<'_>, root: u64, levels: u8, cpus: &[CpuRoot]) -> Result<bool, ColorError> {
    if cpus.is_empty() {
        return Ok(true);
    }
    let Some(own) = physical.table(root)? else { return Ok(false) };
    for cpu in cpus.iter().filter(|cpu| cpu.levels() == levels) {
        // With page-table isolation user mode runs on a root of its own, behind the kernel's.
        for table in [cpu.root().0, cpu.root().0 & !0x1000] {
            if table == root || physical.table(table)?.is_some_and(|other| same_kernel(&own, &other)) {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// Whether a root has everything of the kernel's half that the kernel's own has.
pub(crate) fn same_kernel(own: &Table, other: &Table) -> bool {
    let mut some = false;
    let same = own[UPPER].iter().zip(&other[UPPER]).all(|(own, other)| {
        some |= own & PRESENT != 0;
        own & PRESENT == 0 || own & !BY_CPU == other & !BY_CPU
    });
    some && same
}

/// Kinds of pages that are told by the word that is also the count of mappings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum TypeMatch {
    /// All of it (until Linux 6.11).
    Word(u32),
    /// Its upper byte.
    Byte(u8),
}

impl TypeMatch {
    /// How `value` is to be compared, on a kernel whose mark of free pages is `buddy`.
    pub(crate) const fn new(value: u32, buddy: u32) -> Self {
        // From 6.12 on types are numbers in the upper byte, and the kernel's notes have nothing below.
        if buddy & 0x00ff_ffff == 0 { Self::Byte((value >> 24) as u8) } else { Self::Word(value) }
    }

    pub(crate) const fn is(self, word: u32) -> bool {
        match self {
            Self::Word(value) => word == value,
            Self::Byte(value) => (word >> 24) as u8 == value,
        }
    }
}

/// What was learnt about a guest's kernel while it was colored, for the next map of the same guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Knowledge {
    /// Where the kernel's notes are.
    pub(crate) notes_page: PageIndex,
    /// XXH3-64 of their text: another kernel, or another boot of the same, has others.
    pub(crate) notes: u64,
    pub(crate) layout: Layout,
}

impl Knowledge {
    /// Whether it makes sense: it may come from another host.
    pub(crate) fn is_sane(&self) -> bool {
        self.layout.is_sane()
    }
}

/// Where things are in the kernel's structures. Offsets are in bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Layout {
    pub(crate) flags: usize,
    pub(crate) lru: usize,
    pub(crate) head: usize,
    pub(crate) mapping: usize,
    pub(crate) index: usize,
    pub(crate) private: usize,
    pub(crate) mapcount: usize,
    pub(crate) refcount: usize,
    pub(crate) buddy: TypeMatch,
    pub(crate) buddy_value: u32,
    pub(crate) slab: Option<TypeMatch>,
    pub(crate) offline: Option<TypeMatch>,
    pub(crate) slab_flag: Option<u64>,
    pub(crate) reserved_flag: Option<u64>,
    pub(crate) lru_flag: Option<u64>,
    pub(crate) active_flag: Option<u64>,
    pub(crate) referenced_flag: Option<u64>,
    pub(crate) swap_backed_flag: Option<u64>,
    pub(crate) swap_cache_flag: Option<u64>,
    pub(crate) types: Option<Types>,
}

/// What only the kernel's type information tells.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Types {
    pub(crate) host: u64,
    pub(crate) nrpages: u64,
    pub(crate) i_mapping: u64,
    pub(crate) i_ino: u64,
    pub(crate) i_sb: u64,
    pub(crate) i_dentry: Option<u64>,
    pub(crate) dentry_alias: Option<u64>,
    pub(crate) dentry_parent: Option<u64>,
    pub(crate) dentry_name: Option<u64>,
    pub(crate) sb_id: Option<u64>,
    pub(crate) sb_dev: Option<u64>,
    pub(crate) sb_type: Option<u64>,
    pub(crate) type_name: Option<u64>,
    pub(crate) slab_cache: Option<usize>,
    pub(crate) cache_name: Option<u64>,
    pub(crate) page_mm: Option<usize>,
    pub(crate) mm_pgd: Option<u64>,
    pub(crate) mm_owner: Option<u64>,
    pub(crate) task_mm: Option<u64>,
    pub(crate) task_tgid: Option<u64>,
    pub(crate) task_comm: Option<u64>,
}

/// All names that are looked for in the type information.
const NAMES: &[&str] = &[
    "page",
    "index",
    "__folio_index",
    "slab_cache",
    "pt_mm",
    "slab",
    "ptdesc",
    "kmem_cache",
    "name",
    "address_space",
    "host",
    "nrpages",
    "inode",
    "i_mapping",
    "i_ino",
    "i_sb",
    "i_dentry",
    "dentry",
    "d_u",
    "d_alias",
    "d_parent",
    "d_name",
    "__d_name",
    "qstr",
    "super_block",
    "s_id",
    "s_dev",
    "s_type",
    "file_system_type",
    "mm_struct",
    "pgd",
    "owner",
    "task_struct",
    "mm",
    "tgid",
    "comm",
    "pageflags",
    "PG_reserved",
    "PG_active",
    "PG_referenced",
    "PG_swapbacked",
    "PG_swapcache",
    "PG_lru",
    "flags",
    "_refcount",
    "mapping",
    "private",
    "lru",
];

impl Layout {
    /// Whether every offset is one that a structure can have. One that was found is; one that was read may be anything.
    pub(crate) fn is_sane(&self) -> bool {
        let in_frame =
            [self.flags, self.lru, self.head, self.mapping, self.index, self.private, self.mapcount, self.refcount];
        let fits = |offset: usize| offset <= FRAME - 8;
        in_frame.into_iter().all(fits) && self.types.as_ref().is_none_or(Types::is_sane)
    }

    /// From the kernel's notes, and its type information where it has any. An error is why it can't be told.
    pub(crate) fn find(space: &KernelSpace<'_>, kernel: &Kernel) -> Result<Result<Self, String>, ColorError> {
        let btf = Btf::find(space, NAMES)?;
        Self::from(kernel, btf.as_ref())
    }

    fn from(kernel: &Kernel, btf: Option<&Btf<'_>>) -> Result<Result<Self, String>, ColorError> {
        let notes = &kernel.notes;
        if notes.size("page").is_some_and(|size| size as usize != FRAME) {
            return Ok(Err(format!("its struct page has {} bytes, not {FRAME}", notes.size("page").unwrap_or(0))));
        }
        // Eight bytes must fit in behind each of them.
        let offset = |name: &str| {
            notes.offset(&format!("page.{name}")).map(|o| o as usize).filter(|o| o + 8 <= FRAME && o % 4 == 0)
        };
        let fields = ("flags", "lru", "mapping", "private", "_mapcount", "_refcount");
        let (Some(flags), Some(lru), Some(mapping), Some(private), Some(mapcount), Some(refcount)) = (
            offset(fields.0),
            offset(fields.1),
            offset(fields.2),
            offset(fields.3),
            offset(fields.4),
            offset(fields.5),
        ) else {
            return Ok(Err("its notes do not tell how struct page is laid out".into()));
        };
        let head = offset("compound_info").or_else(|| offset("compound_head")).unwrap_or(lru);
        let Some(buddy_value) = notes.number("PAGE_BUDDY_MAPCOUNT_VALUE").map(|value| value as u32) else {
            return Ok(Err("its notes do not tell how free pages are marked".into()));
        };
        let by_type = |name: &str| notes.number(name).map(|value| TypeMatch::new(value as u32, buddy_value));
        let bit = |number: i64| u32::try_from(number).ok().and_then(|n| 1u64.checked_shl(n));
        let flag = |name: &str| -> Result<Option<u64>, ColorError> {
            let number = match btf {
                Some(btf) => btf.enumerator("pageflags", name)?.map(i64::from),
                None => None,
            };
            Ok(number.or_else(|| notes.number(name)).and_then(bit))
        };
        let slab = by_type("PAGE_SLAB_MAPCOUNT_VALUE");
        let types = match btf {
            Some(btf) => Types::find(btf)?,
            None => None,
        };
        let index = match btf {
            Some(btf) => match btf.offset("page", "index")? {
                None => btf.offset("page", "__folio_index")?,
                found => found,
            },
            None => None,
        };
        Ok(Ok(Self {
            flags,
            lru,
            head,
            mapping,
            index: index.map(|o| o as usize).filter(|o| o + 8 <= FRAME).unwrap_or(mapping + 8).min(FRAME - 8),
            private,
            mapcount,
            refcount,
            buddy: TypeMatch::new(buddy_value, buddy_value),
            buddy_value,
            slab,
            offline: by_type("PAGE_OFFLINE_MAPCOUNT_VALUE"),
            slab_flag: if slab.is_some() { None } else { notes.number("PG_slab").and_then(bit) },
            reserved_flag: match flag("PG_reserved")? {
                // It has been the one before PG_private for as long as both are there.
                None => notes.number("PG_private").and_then(|n| bit(n - 1)),
                found => found,
            },
            lru_flag: flag("PG_lru")?,
            active_flag: flag("PG_active")?,
            referenced_flag: flag("PG_referenced")?,
            swap_backed_flag: flag("PG_swapbacked")?,
            swap_cache_flag: flag("PG_swapcache")?,
            types,
        }))
    }
}

impl Types {
    fn is_sane(&self) -> bool {
        let needed = [self.host, self.nrpages, self.i_mapping, self.i_ino, self.i_sb].map(Some);
        let others = [
            self.i_dentry,
            self.dentry_alias,
            self.dentry_parent,
            self.dentry_name,
            self.sb_id,
            self.sb_dev,
            self.sb_type,
            self.type_name,
            self.cache_name,
            self.mm_pgd,
            self.mm_owner,
            self.task_mm,
            self.task_tgid,
            self.task_comm,
        ];
        let in_frame = [self.slab_cache, self.page_mm];
        needed.into_iter().chain(others).flatten().all(|offset| offset < 1 << 16)
            && in_frame.into_iter().flatten().all(|offset| offset <= FRAME - 8)
    }

    fn find(btf: &Btf<'_>) -> Result<Option<Self>, ColorError> {
        let at = |of: &str, member: &str| Ok(btf.offset(of, member)?.map(u64::from));
        let first = |a: Result<Option<u64>, ColorError>, b: Result<Option<u64>, ColorError>| match a {
            Ok(None) => b,
            other => other,
        };
        let in_page = |of: &str, member: &str| -> Result<Option<usize>, ColorError> {
            Ok(btf.offset(of, member)?.map(|o| o as usize).filter(|o| o + 8 <= FRAME))
        };
        let (Some(host), Some(nrpages), Some(i_mapping), Some(i_ino), Some(i_sb)) = (
            at("address_space", "host")?,
            at("address_space", "nrpages")?,
            at("inode", "i_mapping")?,
            at("inode", "i_ino")?,
            at("inode", "i_sb")?,
        ) else {
            return Ok(None);
        };
        let slab_cache = match in_page("slab", "slab_cache")? {
            None => in_page("page", "slab_cache")?,
            found => found,
        };
        let page_mm = match in_page("ptdesc", "pt_mm")? {
            None => in_page("page", "pt_mm")?,
            found => found,
        };
        let name_in_qstr = at("qstr", "name")?;
        let name = first(at("dentry", "d_name"), at("dentry", "__d_name"))?;
        Ok(Some(Self {
            host,
            nrpages,
            i_mapping,
            i_ino,
            i_sb,
            i_dentry: at("inode", "i_dentry")?,
            dentry_alias: first(at("dentry", "d_alias"), at("dentry", "d_u"))?,
            dentry_parent: at("dentry", "d_parent")?,
            dentry_name: name.zip(name_in_qstr).map(|(name, within)| name + within),
            sb_id: at("super_block", "s_id")?,
            sb_dev: at("super_block", "s_dev")?,
            sb_type: at("super_block", "s_type")?,
            type_name: at("file_system_type", "name")?,
            slab_cache,
            cache_name: at("kmem_cache", "name")?,
            page_mm,
            mm_pgd: at("mm_struct", "pgd")?,
            mm_owner: at("mm_struct", "owner")?,
            task_mm: at("task_struct", "mm")?,
            task_tgid: at("task_struct", "tgid")?,
            task_comm: at("task_struct", "comm")?,
        }))
    }
}
