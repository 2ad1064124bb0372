//! Runs in a guest. Without arguments: writes down what its kernel says about every page, and sleeps; see the crate's
//! documentation. Two more things let a guest prove that its memory is still right:
//!
//! - `ramet-truth hold MEBIBYTES FILE`: allocates blocks of many sizes and frees a third of them, writes `FILE` when the rest is
//!   filled, waits for `FILE.ask`, looks whether everything is as it was, and then writes `FILE.right` or `FILE.wrong`.
//! - `ramet-truth check MEBIBYTES`: allocates so much at once, and fails unless it is all zeros and takes what is written to it.
#![forbid(unsafe_code)]

use ramet_truth::numbers::Numbers;
use ramet_truth::page::{HEADER, Mapped, PAGE, PASSING, PAYLOAD, Section, magic};
use std::{
    fs::{self, File},
    io::{self, Read, Write as _},
    os::unix::fs::FileExt,
    time::Duration,
};

/// How long nothing must change before it is called at rest.
const PAUSE: Duration = Duration::from_millis(2500);
/// How often that is tried.
const ROUNDS: usize = 12;

fn main() -> io::Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let bad = || io::Error::new(io::ErrorKind::InvalidInput, "ramet-truth [hold MEBIBYTES FILE | check MEBIBYTES]");
    let size = |text: &str| text.parse::<usize>().map(|mebibytes| mebibytes << 20).map_err(|_| bad());
    match &args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        [] => tell(),
        ["hold", mebibytes, file] => hold(size(mebibytes)?, file),
        ["check", mebibytes] => check(size(mebibytes)?),
        _ => Err(bad()),
    }
}

fn fill(block: &mut [u64], seed: u64) {
    let mut numbers = Numbers::new(seed | 1);
    block.fill_with(|| numbers.draw());
}

fn is_filled(block: &[u64], seed: u64) -> bool {
    let mut numbers = Numbers::new(seed | 1);
    block.iter().all(|&word| word == numbers.draw())
}

fn hold(size: usize, file: &str) -> io::Result<()> {
    let mut numbers = Numbers::new(0x9e37_79b9_7f4a_7c15);
    let (mut blocks, mut held) = (Vec::new(), 0);
    while held < size {
        // 64 bytes to 128 KiB: some of the heap's, some mapped each by itself.
        let words = 8 << (numbers.draw() % 12);
        let mut block = vec![0u64; words];
        fill(&mut block, blocks.len() as u64);
        held += words * 8;
        blocks.push(Some(block));
    }
    // In another order than they were made.
    for _ in 0..blocks.len() / 3 {
        let at = (numbers.draw() % blocks.len() as u64) as usize;
        blocks[at] = None;
    }
    fs::write(file, "held\n")?;
    while !fs::exists(format!("{file}.ask"))? {
        std::thread::sleep(Duration::from_secs(1));
    }
    let right = (0..).zip(&blocks).all(|(seed, block)| block.as_ref().is_none_or(|block| is_filled(block, seed)));
    fs::write(format!("{file}.{}", if right { "right" } else { "wrong" }), "\n")
}

fn check(size: usize) -> io::Result<()> {
    let mut memory = vec![0u64; size / 8];
    if memory.iter().any(|&word| word != 0) {
        return Err(io::Error::other("fresh memory is not zero"));
    }
    fill(&mut memory, 7);
    if !is_filled(&memory, 7) {
        return Err(io::Error::other("memory does not hold what was written to it"));
    }
    println!("right");
    Ok(())
}

fn tell() -> io::Result<()> {
    let frames = frames()?;
    // Flags twice, counts, mappings of 24 bytes, and some room.
    let mut pages = Pages::new((frames * 56 + (2 << 20)) / PAYLOAD + 1);
    // Once to have everything in memory that the next time needs; and until the guest is at rest: kernels give back what each
    // CPU holds of free pages over some seconds.
    let mut pause = Duration::ZERO;
    for _ in 0..ROUNDS {
        pages.clear();
        let (flags, again) = read_all(&mut pages, frames, pause)?;
        let at_rest =
            (0..frames * 8).step_by(8).all(|at| (pages.word(flags + at) ^ pages.word(again + at)) & !PASSING == 0);
        if at_rest && !pause.is_zero() {
            break;
        }
        pause = PAUSE;
    }
    pages.complete();
    let _ = io::stdout().write_all(b"TRUTH\n");
    loop {
        std::thread::sleep(Duration::from_secs(3600));
    }
}

/// Page frames that the kernel tells about.
fn frames() -> io::Result<usize> {
    let file = File::open("/proc/kpageflags")?;
    let mut buffer = vec![0; 1 << 16];
    let mut at = 0;
    loop {
        match file.read_at(&mut buffer, at as u64)? {
            0 => return Ok(at / 8),
            n => at += n,
        }
    }
}

/// Reads everything, the flags again after a pause; returns where the flags stand, both times.
fn read_all(pages: &mut Pages, frames: usize, pause: Duration) -> io::Result<(usize, usize)> {
    let mut text = vec![0; 256 << 10];
    for (section, path) in
        [(Section::Meminfo, "/proc/meminfo"), (Section::Slabinfo, "/proc/slabinfo"), (Section::Iomem, "/proc/iomem")]
    {
        // Some kernels have no slabinfo.
        let len = read_text(path, &mut text).unwrap_or(0);
        pages.section(section, len);
        pages.put(&text[..len]);
    }
    processes(pages, &mut text)?;
    mappings(pages, &mut text)?;
    let mut numbers = |section, path| -> io::Result<usize> {
        pages.section(section, frames * 8);
        let start = pages.at;
        pages.read(&File::open(path)?, frames * 8)?;
        Ok(start)
    };
    let flags = numbers(Section::Flags, "/proc/kpageflags")?;
    numbers(Section::Counts, "/proc/kpagecount")?;
    std::thread::sleep(pause);
    let again = numbers(Section::FlagsAgain, "/proc/kpageflags")?;
    pages.section_raw(0, 0);
    Ok((flags, again))
}

fn read_text(path: &str, into: &mut [u8]) -> io::Result<usize> {
    let mut file = File::open(path)?;
    let mut len = 0;
    while len < into.len() {
        match file.read(&mut into[len..])? {
            0 => break,
            n => len += n,
        }
    }
    Ok(len)
}

fn pids() -> io::Result<Vec<u32>> {
    let entries = fs::read_dir("/proc")?.flatten();
    Ok(entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect())
}

fn processes(pages: &mut Pages, text: &mut [u8]) -> io::Result<()> {
    let pids = pids()?;
    pages.section(Section::Processes, pids.len() * 24);
    for pid in pids {
        let len = read_text(&format!("/proc/{pid}/comm"), text).unwrap_or(0).min(16);
        let name = &text[..len.saturating_sub(1)];
        let mut record = [0; 24];
        record[..4].copy_from_slice(&pid.to_le_bytes());
        record[4..8].copy_from_slice(&(name.len() as u32).to_le_bytes());
        record[8..8 + name.len()].copy_from_slice(name);
        pages.put(&record);
    }
    Ok(())
}

/// Every present page of every process.
fn mappings(pages: &mut Pages, text: &mut [u8]) -> io::Result<()> {
    let start = pages.section(Section::Mappings, 0);
    let before = pages.at;
    let mut entries = [0; 4096];
    for pid in pids()? {
        let Ok(len) = read_text(&format!("/proc/{pid}/maps"), text) else { continue };
        let Ok(pagemap) = File::open(format!("/proc/{pid}/pagemap")) else { continue };
        for line in text[..len].split(|&b| b == b'\n') {
            let Some((from, to, executable)) = std::str::from_utf8(line).ok().and_then(range) else { continue };
            let mut at = from;
            while at < to {
                let count = ((to - at) as usize).min(entries.len() / 8);
                let Ok(got) = pagemap.read_at(&mut entries[..count * 8], at * 8) else { break };
                if got < 8 {
                    break;
                }
                for (number, raw) in (0..).zip(entries[..got].as_chunks::<8>().0) {
                    let entry = u64::from_le_bytes(*raw);
                    if entry >> 63 != 0 {
                        let shared = (entry >> 61 & 1) as u32 * 2;
                        let flags = u32::from(executable) | shared;
                        let frame = entry & ((1 << 55) - 1);
                        pages.put(&Mapped { pid, flags, page: at + number, frame }.to_bytes());
                    }
                }
                at += got as u64 / 8;
            }
        }
    }
    let len = pages.at - before;
    pages.set_length(start, len as u64);
    Ok(())
}

/// `start-end perms ...`, in pages.
fn range(line: &str) -> Option<(u64, u64, bool)> {
    let (range, rest) = line.split_once(' ')?;
    let (from, to) = range.split_once('-')?;
    let address = |text| u64::from_str_radix(text, 16).ok().filter(|a| *a < 1 << 56).map(|a| a / PAGE as u64);
    Some((address(from)?, address(to)?, rest.as_bytes().get(2) == Some(&b'x')))
}

/// Pages with headers, written one payload after the other.
struct Pages {
    memory: Vec<u8>,
    /// Where the first page starts in `memory`.
    start: usize,
    count: usize,
    /// Bytes of payload written.
    at: usize,
}

impl Pages {
    fn new(count: usize) -> Self {
        let memory = vec![0; (count + 1) * PAGE];
        let start = memory.as_ptr().align_offset(PAGE);
        let mut pages = Self { memory, start, count, at: 0 };
        let mut run = [0; 8];
        let random = File::open("/dev/urandom").and_then(|mut file| file.read_exact(&mut run));
        if random.is_err() {
            run = std::process::id().to_le_bytes().repeat(2).try_into().unwrap_or([1; 8]);
        }
        for number in 0..count {
            let page = pages.page(number);
            // Every page is written to, so that it is there.
            page[HEADER..].fill(0xff);
            page[..16].copy_from_slice(&magic());
            page[16..20].copy_from_slice(&(number as u32).to_le_bytes());
            page[20..24].fill(0);
            page[24..32].copy_from_slice(&run);
        }
        pages
    }

    fn page(&mut self, number: usize) -> &mut [u8] {
        let at = self.start + number * PAGE;
        &mut self.memory[at..at + PAGE]
    }

    /// The number at byte `at` of what was written.
    fn word(&mut self, at: usize) -> u64 {
        let within = HEADER + at % PAYLOAD;
        let mut bytes = [0; 8];
        if let Some(whole) = self.page(at / PAYLOAD).get(within..within + 8) {
            bytes.copy_from_slice(whole);
            return u64::from_le_bytes(bytes);
        }
        for (at, byte) in (at..).zip(&mut bytes) {
            *byte = self.page(at / PAYLOAD)[HEADER + at % PAYLOAD];
        }
        u64::from_le_bytes(bytes)
    }

    fn clear(&mut self) {
        self.at = 0;
    }

    fn complete(&mut self) {
        self.page(0)[20..24].copy_from_slice(&1u32.to_le_bytes());
    }

    fn section(&mut self, section: Section, len: usize) -> usize {
        self.section_raw(section as u32, len as u64)
    }

    /// Begins a section; returns where its length stands.
    fn section_raw(&mut self, tag: u32, len: u64) -> usize {
        self.put(&u64::from(tag).to_le_bytes());
        let at = self.at;
        self.put(&len.to_le_bytes());
        at
    }

    fn set_length(&mut self, at: usize, len: u64) {
        let end = std::mem::replace(&mut self.at, at);
        self.put(&len.to_le_bytes());
        self.at = end;
    }

    /// Room of the page that is being written, of at most `len` bytes.
    fn room(&mut self, len: usize) -> &mut [u8] {
        let (number, within) = (self.at / PAYLOAD, self.at % PAYLOAD);
        assert!(number < self.count, "more is mapped than there is room for");
        let end = (within + len).min(PAYLOAD);
        &mut self.page(number)[HEADER + within..HEADER + end]
    }

    fn put(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let room = self.room(bytes.len());
            let len = room.len();
            room.copy_from_slice(&bytes[..len]);
            self.at += len;
            bytes = &bytes[len..];
        }
    }

    fn read(&mut self, file: &File, len: usize) -> io::Result<()> {
        let mut from = 0;
        // These files are read in whole numbers only.
        while from < len && !self.at.is_multiple_of(8) {
            let mut number = [0; 8];
            file.read_exact_at(&mut number, from as u64)?;
            self.put(&number);
            from += 8;
        }
        while from < len {
            let got = {
                let room = self.room(len - from);
                let whole = room.len() / 8 * 8;
                if whole == 0 { 0 } else { file.read_at(&mut room[..whole], from as u64)? }
            };
            if got == 0 {
                let mut number = [0; 8];
                file.read_exact_at(&mut number, from as u64)?;
                self.put(&number);
                from += 8;
            } else {
                self.at += got;
                from += got;
            }
        }
        Ok(())
    }
}
