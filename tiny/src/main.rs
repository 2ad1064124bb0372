//! The tiny guest: a 64-bit machine's worth of memory that can be filled, checked and counted in, and nothing else.
//!
//! It boots by multiboot in a millisecond, says so on the first serial port, answers the agent's protocol on the second, and
//! sleeps in between. Everything in it is memory and CPU state, so that a clone which goes on correctly was cloned correctly.
#![no_std]
#![no_main]
#![allow(unsafe_code)]

mod boot;
mod pattern;
mod port;
mod smp;

use boot::Gate;
use core::{arch::asm, ptr};
use port::{Frames, Serial, in8, out8, send};
use smp::Work;

const CONSOLE: Serial = Serial(0x3f8);
const AGENT: Serial = Serial(0x2f8);
const PAGE: u64 = 4096;
/// Pages below this one are the guest's own.
const FIRST_PAGE: u64 = 1024;

#[unsafe(no_mangle)]
static mut IDT: [Gate; 48] = [Gate::NONE; 48];

/// Everything that changes as the guest runs.
struct Guest {
    counter: u64,
    clone_number: u64,
    pages: u64,
}

#[unsafe(no_mangle)]
extern "C" fn main(info: u32) -> ! {
    let (memory, probe) = boot_information(info);
    start_interrupts();
    CONSOLE.start(false);
    AGENT.start(true);
    smp::start();
    let mut guest = Guest { counter: 0, clone_number: 0, pages: memory / PAGE };
    if probe {
        let good = guest.fill(7, FIRST_PAGE, 2048) && guest.check(7, FIRST_PAGE, 2048);
        CONSOLE.print(if good { "RAMET-TINY end\n" } else { "RAMET-TINY broken memory\n" });
    }
    CONSOLE.print("RAMET-TINY ready\n");
    let mut frames = Frames::new();
    loop {
        while let Some(byte) = AGENT.receive() {
            frames.take(byte, |kind, stream, payload| guest.answer(kind, stream, payload));
        }
        guest.counter += 1;
        // For a byte for the agent, or the next tick.
        sleep();
    }
}

/// Waits for an interrupt. They come here and nowhere else.
fn sleep() {
    // SAFETY: the handlers restore all that they use.
    unsafe { asm!("sti", "hlt", "cli") };
}

/// Memory in bytes and whether the command line says `probe`, from multiboot's structure.
fn boot_information(info: u32) -> (u64, bool) {
    // SAFETY: the boot loader's structure lies in identity-mapped memory that nothing has overwritten yet.
    let word = |at: u64| unsafe { ptr::read_volatile((info as u64 + at) as *const u32) };
    let kib = if word(0) & 1 != 0 { word(8) } else { 0 };
    let mut probe = false;
    if word(0) & 4 != 0 {
        let line = word(16) as u64;
        // SAFETY: as above; the string ends with a zero, and no more than 256 bytes are read.
        let byte = |i: u64| unsafe { ptr::read_volatile((line + i) as *const u8) };
        let len = (0..256).take_while(|&i| byte(i) != 0).count() as u64;
        probe = (0..len.saturating_sub(4)).any(|i| b"probe".iter().zip(i..).all(|(&b, i)| byte(i) == b));
    }
    ((1 << 20) + kib as u64 * 1024, probe)
}

fn start_interrupts() {
    for number in [32, 35, 36, 39, smp::WAKE as usize] {
        let handler = if number == smp::WAKE as usize { boot::wake } else { boot::tick };
        // SAFETY: one CPU runs, interrupts are off, and the table is not loaded into use before they are on.
        unsafe { IDT[number] = Gate::to(handler as *const () as u64) };
    }
    // The interrupt controllers: from vector 32; the timer and the second serial port only.
    for (port, value) in [
        (0x20, 0x11),
        (0xa0, 0x11),
        (0x21, 32),
        (0xa1, 40),
        (0x21, 4),
        (0xa1, 2),
        (0x21, 1),
        (0xa1, 1),
        (0x21, 0xf6),
        (0xa1, 0xff),
    ] {
        out8(port, value);
    }
    // The timer: 50 ticks a second.
    out8(0x43, 0x34);
    out8(0x40, (23864u16 & 0xff) as u8);
    out8(0x40, (23864u16 >> 8) as u8);
    let _ = in8(0x2f8);
}

fn address(page: u64, index: u64) -> *mut u64 {
    (page * PAGE + index * 8) as *mut u64
}

impl Guest {
    fn inside(&self, first: u64, count: u64) -> bool {
        first >= FIRST_PAGE && count <= self.pages && first <= self.pages - count
    }

    fn fill(&mut self, seed: u64, first: u64, count: u64) -> bool {
        if !self.inside(first, count) {
            return false;
        }
        for page in first..first + count {
            for index in 0..pattern::WORDS {
                // SAFETY: memory beyond the guest's own, as just checked.
                unsafe { ptr::write_volatile(address(page, index), pattern::word(seed, page, index)) };
            }
        }
        true
    }

    fn check(&self, seed: u64, first: u64, count: u64) -> bool {
        self.inside(first, count)
            && (first..first + count).all(|page| {
                // SAFETY: as for `fill`.
                (0..pattern::WORDS)
                    .all(|i| unsafe { ptr::read_volatile(address(page, i)) } == pattern::word(seed, page, i))
            })
    }

    fn sum(&self, first: u64, count: u64) -> Option<u64> {
        if !self.inside(first, count) {
            return None;
        }
        let mut sum = pattern::SUM;
        for page in first..first + count {
            for index in 0..pattern::WORDS {
                // SAFETY: as for `fill`.
                sum = pattern::sum(sum, unsafe { ptr::read_volatile(address(page, index)) });
            }
        }
        Some(sum)
    }

    /// Lets all processors do this to the same pages at the same time; the exit code.
    fn together(&self, work: Work, first: u64, count: u64) -> i32 {
        if !self.inside(first, count) {
            return 1;
        }
        // SAFETY: memory beyond the guest's own, as just checked.
        match unsafe { smp::together(work, first, count) } {
            Some(good) => !good as i32,
            None => 2,
        }
    }

    fn answer(&mut self, kind: u8, stream: u32, payload: &[u8]) {
        match kind {
            1 => {
                let session = payload.get(..8).unwrap_or(&[0; 8]);
                send(AGENT, 0x81, 0, &[session, br#"{"agent":"0.1.0","guest":"tiny","boot_id":""}"#]);
            }
            2 => send(AGENT, 0x82, stream, &[payload]),
            4 => {
                self.clone_number = number_after(payload, b"\"clone_number\":").unwrap_or(0);
                send(AGENT, 0x84, stream, &[br#"{"ok":true,"reseeded":true,"error":null}"#]);
            }
            5 => self.exec(stream, payload),
            // Input and credit of commands, which take none and print little.
            6..=9 => {}
            _ => send(AGENT, 0x89, stream, &[b"the tiny guest can't do that"]),
        }
    }

    fn exec(&mut self, stream: u32, json: &[u8]) {
        let mut words = [""; 8];
        let count = arguments(json, &mut words);
        let number = |i: usize| words.get(i).filter(|_| i < count).and_then(|w| parse(w));
        let mut text = Text { bytes: [0; 64], len: 0 };
        let code = match (words[0], number(1), number(2), number(3)) {
            ("fill", Some(seed), Some(first), Some(n)) => Some(!self.fill(seed, first, n) as i32),
            ("check", Some(seed), Some(first), Some(n)) => Some(!self.check(seed, first, n) as i32),
            ("sum", Some(first), Some(n), _) => self.sum(first, n).map(|sum| {
                text.put(sum, 16, 16);
                0
            }),
            ("touch", Some(first), Some(n), stride) => {
                let stride = stride.unwrap_or(1).max(1);
                let last = n.checked_mul(stride).and_then(|n| n.checked_add(first));
                let inside = last.is_some_and(|last| self.inside(first, last - first));
                if inside {
                    // SAFETY: as for `fill`.
                    (0..n).for_each(|i| _ = unsafe { ptr::read_volatile(address(first + i * stride, 0)) });
                }
                Some(!inside as i32)
            }
            ("touch-smp", Some(first), Some(n), _) => Some(self.together(Work::Touch, first, n)),
            ("fill-smp", Some(seed), Some(first), Some(n)) => Some(self.together(Work::Fill(seed), first, n)),
            ("check-smp", Some(seed), Some(first), Some(n)) => Some(self.together(Work::Check(seed), first, n)),
            ("smp", ..) => {
                text.put(smp::up() as u64, 10, 1);
                Some(0)
            }
            ("peek", Some(page), index, _) if self.inside(page, 1) => {
                // SAFETY: as for `fill`; the index stays inside the page.
                let word = unsafe { ptr::read_volatile(address(page, index.unwrap_or(0) % pattern::WORDS)) };
                text.put(word, 10, 1);
                Some(0)
            }
            ("poke", Some(page), Some(value), _) if self.inside(page, 1) => {
                // SAFETY: as for `fill`.
                unsafe { ptr::write_volatile(address(page, 0), value) };
                Some(0)
            }
            ("count", ..) => {
                text.put(self.counter, 10, 1);
                Some(0)
            }
            ("id", ..) => {
                text.put(self.clone_number, 10, 1);
                Some(0)
            }
            ("pages", ..) => {
                text.put(FIRST_PAGE, 10, 1);
                text.put(self.pages, 10, 1);
                Some(0)
            }
            _ => None,
        };
        match code {
            Some(code) => {
                if text.len > 0 {
                    send(AGENT, 0x86, stream, &[&text.bytes[..text.len]]);
                }
                send(AGENT, 0x88, stream, &[&code.to_le_bytes()]);
            }
            None => {
                let known = b"the tiny guest knows: fill check sum touch (also with -smp) peek poke count id pages smp";
                send(AGENT, 0x89, stream, &[known])
            }
        }
    }
}

struct Text {
    bytes: [u8; 64],
    len: usize,
}

impl Text {
    /// Adds a number of at least `width` digits, and a line's end. (The core library's own formatting uses SSE.)
    fn put(&mut self, mut number: u64, base: u64, width: usize) {
        let mut digits = [0u8; 20];
        let mut count = 0;
        while number > 0 || count < width {
            digits[count] = b"0123456789abcdef"[(number % base) as usize];
            number /= base;
            count += 1;
        }
        for i in 0..=count {
            self.bytes[self.len] = if i < count { digits[count - 1 - i] } else { b'\n' };
            self.len += 1;
        }
    }
}

fn parse(text: &str) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    text.bytes().try_fold(0u64, |n, b| {
        let digit = b.is_ascii_digit().then(|| (b - b'0') as u64)?;
        n.checked_mul(10)?.checked_add(digit)
    })
}

fn find(text: &[u8], key: &[u8]) -> Option<usize> {
    (0..text.len().checked_sub(key.len())? + 1).find(|&i| &text[i..i + key.len()] == key).map(|i| i + key.len())
}

fn number_after(json: &[u8], key: &[u8]) -> Option<u64> {
    let rest = &json[find(json, key)?..];
    let len = rest.iter().take_while(|b| b.is_ascii_digit()).count();
    parse(core::str::from_utf8(&rest[..len]).ok()?)
}

/// The strings of the JSON array `argv`, without escapes; how many there are.
fn arguments<'a>(json: &'a [u8], words: &mut [&'a str; 8]) -> usize {
    let Some(mut at) = find(json, b"\"argv\":[") else { return 0 };
    let mut count = 0;
    while count < words.len() && json.get(at) == Some(&b'"') {
        let rest = &json[at + 1..];
        let len = rest.iter().take_while(|&&b| b != b'"').count();
        words[count] = core::str::from_utf8(&rest[..len]).unwrap_or("");
        count += 1;
        at += len + 2;
        if json.get(at) == Some(&b',') {
            at += 1;
        }
    }
    count
}

#[panic_handler]
fn panic(_: &core::panic::PanicInfo) -> ! {
    CONSOLE.print("RAMET-TINY panic\n");
    loop {
        // SAFETY: stops this CPU; interrupts are off.
        unsafe { asm!("cli", "hlt") };
    }
}

/// # Safety
/// As C's `memcpy`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    // SAFETY: the caller's duty.
    unsafe { asm!("rep movsb", inout("rdi") to => _, inout("rsi") from => _, inout("rcx") len => _, options(nostack)) };
    to
}

/// # Safety
/// As C's `memmove`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8 {
    if (to as usize).wrapping_sub(from as usize) >= len {
        // SAFETY: copying upwards does not overwrite what is still to be read.
        return unsafe { memcpy(to, from, len) };
    }
    for i in (0..len).rev() {
        // SAFETY: the caller's duty. Volatile, or the compiler would make this loop a call of memmove.
        unsafe { to.add(i).write_volatile(from.add(i).read_volatile()) };
    }
    to
}

/// # Safety
/// As C's `memset`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memset(to: *mut u8, byte: i32, len: usize) -> *mut u8 {
    // SAFETY: the caller's duty.
    unsafe { asm!("rep stosb", inout("rdi") to => _, in("al") byte as u8, inout("rcx") len => _, options(nostack)) };
    to
}

/// # Safety
/// As C's `memcmp`.
#[unsafe(no_mangle)]
unsafe extern "C" fn memcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
    for i in 0..len {
        // SAFETY: the caller's duty.
        let (a, b) = unsafe { (a.add(i).read_volatile(), b.add(i).read_volatile()) };
        if a != b {
            return a as i32 - b as i32;
        }
    }
    0
}

/// # Safety
/// As C's `bcmp`.
#[unsafe(no_mangle)]
unsafe extern "C" fn bcmp(a: *const u8, b: *const u8, len: usize) -> i32 {
    // SAFETY: the caller's duty.
    unsafe { memcmp(a, b, len) }
}

/// Named by unwinding tables of the core library, never called: panics abort.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}
