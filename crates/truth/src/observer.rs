//! The observer's side: finding what the program in the guest wrote down, and holding a color map against it.

use crate::page::{HEADER, Mapped, PAGE, PASSING, PAYLOAD, Section, magic};
use anyhow::{Context as _, Result, ensure};
use ramet_color::{Color, ColorMap, GuestMemory, PageFlags};
use ramet_memory::PageIndex;
use std::collections::{BTreeMap, HashMap, HashSet};

/// Bits of `/proc/kpageflags` (`include/uapi/linux/kernel-page-flags.h`).
mod bit {
    pub(super) const LRU: u64 = 1 << 5;
    pub(super) const SLAB: u64 = 1 << 7;
    pub(super) const BUDDY: u64 = 1 << 10;
    pub(super) const ANON: u64 = 1 << 12;
    pub(super) const SWAP_BACKED: u64 = 1 << 14;
    pub(super) const NO_PAGE: u64 = 1 << 20;
    pub(super) const OFFLINE: u64 = 1 << 23;
    pub(super) const ZERO: u64 = 1 << 24;
    pub(super) const TABLE: u64 = 1 << 26;
    pub(super) const RESERVED: u64 = 1 << 32;
}

/// What a guest's kernel says.
#[derive(Debug, Default)]
pub struct Truth {
    /// By page frame number.
    pub flags: Vec<u64>,
    /// By page frame number.
    pub counts: Vec<u64>,
    /// The flags a moment later.
    pub flags_again: Vec<u64>,
    /// What processes map.
    pub mappings: Vec<Mapped>,
    /// `/proc/meminfo`, in KiB.
    pub meminfo: HashMap<String, u64>,
    /// Slab pages by `/proc/slabinfo`, in KiB.
    pub slabs: u64,
    /// Physical addresses of the kernel's code.
    pub kernel_code: Option<(u64, u64)>,
    /// Processes' names.
    pub processes: HashMap<u32, String>,
}

/// A class of pages as the guest's kernel has them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Class {
    /// In the buddy allocator.
    Buddy,
    /// Slab.
    Slab,
    /// Page tables.
    Table,
    /// Anonymous memory.
    Anonymous,
    /// Page cache of files.
    File,
    /// Shared memory and tmpfs.
    Shared,
    /// Code of the kernel's image.
    KernelCode,
    /// Anything else that the kernel uses or holds back.
    Other,
}

impl Class {
    /// For people.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Buddy => "buddy",
            Self::Slab => "slab",
            Self::Table => "page tables",
            Self::Anonymous => "anonymous",
            Self::File => "file",
            Self::Shared => "shared memory, tmpfs",
            Self::KernelCode => "kernel code",
            Self::Other => "other",
        }
    }

    /// Whether a color is right for it.
    #[must_use]
    pub fn fits(self, color: Color) -> bool {
        match self {
            Self::Buddy => color == Color::Free,
            Self::Slab => color == Color::Slab,
            Self::Table => color == Color::PageTables,
            Self::Anonymous => matches!(color, Color::UserData | Color::UserCode),
            Self::File | Self::Shared => color.is_cache(),
            Self::KernelCode => color == Color::KernelCode,
            // Kernels up to 6.12 do not say of all page tables that they are; what is on its way between uses is neither.
            Self::Other => color.is_kernel() || color == Color::Unknown,
        }
    }
}

/// How a map compares in one class.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Share {
    /// Pages of the class at rest.
    pub all: u64,
    /// Of these, pages with a right color.
    pub right: u64,
}

impl Share {
    /// The share that is right; 1 of an empty class.
    #[must_use]
    pub fn ratio(self) -> f64 {
        if self.all == 0 { 1.0 } else { self.right as f64 / self.all as f64 }
    }
}

/// How a map compares.
#[derive(Debug, Default)]
pub struct Comparison {
    /// By class.
    pub classes: BTreeMap<Class, Share>,
    /// Pages called free that are in use, at rest.
    pub wrongly_free: Vec<PageIndex>,
    /// Pages that were not at rest, left out.
    pub restless: u64,
    /// Wrong pages: class and color, and how many, with the first ones.
    pub wrong: BTreeMap<(Class, Color), (u64, Vec<PageIndex>)>,
    /// Pages that a process maps executable, and those of them that the map calls code.
    pub user_code: Share,
    /// Pages that the map calls user's or a file's code, and those of them that a process maps executable.
    pub called_code: Share,
    /// Mapped pages whose process and address the map has right (or another of those that map it).
    pub mapped: Share,
    /// Totals of the map and those of `/proc/meminfo`, by its field, in KiB. Its `Slab` also counts large allocations of
    /// `kmalloc`, which are no slabs; `/proc/slabinfo` does not.
    pub totals: BTreeMap<&'static str, (u64, u64)>,
}

impl Truth {
    /// Finds what the program wrote down in the memory of a guest that is stopped; `None` when it is not complete.
    ///
    /// # Errors
    /// When memory can't be read, or what was written makes no sense.
    pub fn find(memory: &dyn GuestMemory) -> Result<Option<Self>> {
        let mut pages: HashMap<u64, BTreeMap<u32, PageIndex>> = HashMap::new();
        let mut complete = None;
        let (magic, mut at) = (magic(), PageIndex(0));
        let mut chunk = vec![0; 64 * PAGE];
        while let Some(page) = memory.next_data(at) {
            let count = 64.min(memory.pages().0 - page.0);
            let bytes = &mut chunk[..count as usize * PAGE];
            memory.read(page.offset(), bytes)?;
            for (number, bytes) in (0..).zip(bytes.chunks_exact(PAGE)) {
                if bytes[..16] != magic {
                    continue;
                }
                let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
                let run = u64::from(word(24)) | u64::from(word(28)) << 32;
                pages.entry(run).or_default().insert(word(16), PageIndex(page.0 + number));
                if word(16) == 0 && word(20) == 1 {
                    complete = Some(run);
                }
            }
            at = PageIndex(page.0 + count);
        }
        let Some(run) = complete else { return Ok(None) };
        let mut bytes = Vec::new();
        for (expected, (number, page)) in (0..).zip(&pages[&run]) {
            ensure!(*number == expected, "page {expected} of the guest's notes is not in its memory");
            let mut payload = [0; PAYLOAD];
            memory.read(page.offset() + HEADER as u64, &mut payload)?;
            bytes.extend(payload);
        }
        Self::parse(&bytes).map(Some)
    }

    fn parse(mut bytes: &[u8]) -> Result<Self> {
        let mut truth = Self::default();
        let numbers =
            |bytes: &[u8]| bytes.as_chunks::<8>().0.iter().map(|b| u64::from_le_bytes(*b)).collect::<Vec<_>>();
        loop {
            let (head, rest) = bytes.split_first_chunk::<16>().context("the guest's notes end too early")?;
            let [tag, len] = [0, 8].map(|at| u64::from_le_bytes(std::array::from_fn(|i| head[at + i])));
            if tag == 0 {
                return Ok(truth);
            }
            let len = usize::try_from(len)?;
            ensure!(len <= rest.len(), "a section of the guest's notes is longer than all of them");
            let (body, rest) = rest.split_at(len);
            bytes = rest;
            match tag as u32 {
                t if t == Section::Flags as u32 => truth.flags = numbers(body),
                t if t == Section::Counts as u32 => truth.counts = numbers(body),
                t if t == Section::FlagsAgain as u32 => truth.flags_again = numbers(body),
                t if t == Section::Mappings as u32 => {
                    truth.mappings = body.as_chunks().0.iter().map(Mapped::from_bytes).collect();
                }
                t if t == Section::Meminfo as u32 => truth.meminfo = meminfo(&String::from_utf8_lossy(body)),
                t if t == Section::Slabinfo as u32 => truth.slabs = slabs(&String::from_utf8_lossy(body)),
                t if t == Section::Iomem as u32 => truth.kernel_code = kernel_code(&String::from_utf8_lossy(body)),
                t if t == Section::Processes as u32 => truth.processes = processes(body),
                _ => {}
            }
        }
    }

    /// The class of a page frame that was at rest.
    #[must_use]
    pub fn class(&self, frame: u64) -> Option<Class> {
        let at = usize::try_from(frame).ok()?;
        let (flags, again) = (*self.flags.get(at)?, *self.flags_again.get(at)?);
        if (flags ^ again) & !PASSING != 0 || flags & bit::NO_PAGE != 0 {
            return None;
        }
        let has = |bits| flags & bits != 0;
        let address = frame * PAGE as u64;
        let in_code =
            self.kernel_code.is_some_and(|(start, end)| (start..end + 1 - PAGE as u64 + 1).contains(&address));
        Some(if has(bit::BUDDY) {
            Class::Buddy
        } else if has(bit::SLAB) {
            Class::Slab
        } else if has(bit::TABLE) {
            Class::Table
        } else if has(bit::ANON) {
            Class::Anonymous
        } else if has(bit::OFFLINE | bit::ZERO) {
            Class::Other
        } else if has(bit::RESERVED) {
            if in_code { Class::KernelCode } else { Class::Other }
        } else if has(bit::LRU) {
            if has(bit::SWAP_BACKED) { Class::Shared } else { Class::File }
        } else {
            Class::Other
        })
    }

    /// Holds a map of the same moment against it.
    #[must_use]
    pub fn compare(&self, map: &ColorMap, memory: &dyn GuestMemory) -> Comparison {
        let layout = memory.layout();
        let mut result = Comparison::default();
        let mut frames: HashMap<u64, Vec<&Mapped>> = HashMap::new();
        for mapped in &self.mappings {
            frames.entry(mapped.frame).or_default().push(mapped);
        }
        let executable: HashSet<u64> = self.mappings.iter().filter(|m| m.flags & 1 != 0).map(|m| m.frame).collect();
        for page in (0..map.pages().0).map(PageIndex) {
            let Some(gpa) = layout.gpa(page) else { continue };
            let frame = gpa.0 / PAGE as u64;
            let color = map.color(page);
            let Some(class) = self.class(frame) else {
                result.restless += 1;
                continue;
            };
            let share = result.classes.entry(class).or_default();
            share.all += 1;
            if class.fits(color) {
                share.right += 1;
            } else {
                let (count, examples) = result.wrong.entry((class, color)).or_default();
                *count += 1;
                if examples.len() < 8 {
                    examples.push(page);
                }
            }
            if color == Color::Free && class != Class::Buddy {
                result.wrongly_free.push(page);
            }
            self.compare_code(class, frame, color, &executable, &mut result);
            if let Some(mapped) = frames.get(&frame)
                && matches!(class, Class::Anonymous | Class::File | Class::Shared)
            {
                result.mapped.all += 1;
                let found = map.mapping(page).and_then(|found| {
                    let pid = map.processes.get(usize::from(found.process.0))?.pid;
                    mapped.iter().find(|m| m.pid == pid && m.page == found.page)
                });
                result.mapped.right += u64::from(found.is_some() && map.flags(page).has(PageFlags::MAPPED));
            }
        }
        self.totals(map, &mut result);
        result
    }

    fn compare_code(&self, class: Class, frame: u64, color: Color, executable: &HashSet<u64>, result: &mut Comparison) {
        let user = matches!(class, Class::Anonymous | Class::File | Class::Shared);
        let (is, called) = (user && executable.contains(&frame), matches!(color, Color::UserCode | Color::CacheCode));
        result.user_code.all += u64::from(is);
        result.user_code.right += u64::from(is && called);
        result.called_code.all += u64::from(called);
        result.called_code.right += u64::from(is && called);
    }

    fn totals(&self, map: &ColorMap, result: &mut Comparison) {
        let count = |wanted: &[Color]| map.colors().iter().filter(|c| wanted.contains(c)).count() as u64 * 4;
        let field = |name: &str| self.meminfo.get(name).copied().unwrap_or(0);
        let slab = field("SReclaimable") + field("SUnreclaim");
        for (name, ours, theirs) in [
            ("AnonPages", count(&[Color::UserData, Color::UserCode]), field("AnonPages")),
            ("Cached + Buffers", count(&[Color::CacheData, Color::CacheCode]), field("Cached") + field("Buffers")),
            ("MemFree", count(&[Color::Free]), field("MemFree")),
            ("Slab", count(&[Color::Slab]), slab),
            ("Slab by slabinfo", count(&[Color::Slab]), self.slabs),
        ] {
            result.totals.insert(name, (ours, theirs));
        }
    }
}

fn meminfo(text: &str) -> HashMap<String, u64> {
    let line = |line: &str| {
        let (name, rest) = line.split_once(':')?;
        Some((name.to_owned(), rest.trim().split(' ').next()?.parse().ok()?))
    };
    text.lines().filter_map(line).collect()
}

/// Pages of all slabs, in KiB: `name ... pagesperslab : ... : slabdata active num shared`.
fn slabs(text: &str) -> u64 {
    let line = |line: &str| {
        let mut parts = line.split(" : ");
        let pages: u64 = parts.next()?.split_whitespace().nth(5)?.parse().ok()?;
        let slabs: u64 = parts.last()?.split_whitespace().nth(2)?.parse().ok()?;
        Some(pages * slabs * 4)
    };
    text.lines().filter_map(line).sum()
}

fn kernel_code(text: &str) -> Option<(u64, u64)> {
    let line = text.lines().find(|line| line.trim_end().ends_with(": Kernel code"))?;
    let (start, end) = line.trim().split_once(" :")?.0.split_once('-')?;
    Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
}

fn processes(bytes: &[u8]) -> HashMap<u32, String> {
    let record = |r: &[u8; 24]| {
        let word = |at: usize| u32::from_le_bytes([r[at], r[at + 1], r[at + 2], r[at + 3]]);
        let len = (word(4) as usize).min(16);
        (word(0), String::from_utf8_lossy(&r[8..8 + len]).into_owned())
    };
    bytes.as_chunks().0.iter().map(record).collect()
}

impl Comparison {
    /// A few lines for people.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::new();
        let mut line = |l: String| {
            text.push_str(&l);
            text.push('\n');
        };
        for (class, share) in &self.classes {
            line(format!("{:22} {:>8} of {:>8}  {:.5}", class.name(), share.right, share.all, share.ratio()));
        }
        for (name, share) in
            [("user code found", self.user_code), ("user code right", self.called_code), ("mappings", self.mapped)]
        {
            line(format!("{name:22} {:>8} of {:>8}  {:.5}", share.right, share.all, share.ratio()));
        }
        line(format!("called free, in use    {:>8}", self.wrongly_free.len()));
        line(format!("not at rest            {:>8}", self.restless));
        for (name, (ours, theirs)) in &self.totals {
            line(format!("{name:22} {ours:>8} of {theirs:>8} KiB"));
        }
        for ((class, color), (count, pages)) in &self.wrong {
            let pages: Vec<_> = pages.iter().map(|p| p.0).collect();
            line(format!("wrong: {} called {}: {count} {pages:?}", class.name(), color.name()));
        }
        text
    }
}
