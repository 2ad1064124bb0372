//! The other processors: started at boot, asleep until all of them do the same to the same pages at the same time.

use crate::{address, boot, pattern, port, sleep};
use boot::MOST_CPUS;
use core::{
    ptr,
    sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::*},
};

/// The vector that processors wake each other with; also the one of spurious interrupts.
pub const WAKE: u32 = 47;
const LAPIC: u64 = 0xfee0_0000;
/// Interrupts after which a processor that does not answer is given up; they are the timer's mostly, 50 a second.
const PATIENCE: u32 = 2000;

/// What processors can do to pages together.
#[derive(Clone, Copy)]
pub enum Work {
    /// Read each page.
    Touch,
    /// Write one's own word of each page.
    Fill(u64),
    /// Compare every processor's word of each page.
    Check(u64),
}

/// What another processor says about a job: that it is ready for it, and how it ended.
struct Cpu {
    ready: AtomicU64,
    done: AtomicU64,
    good: AtomicBool,
}

static CPUS: [Cpu; MOST_CPUS] =
    [const { Cpu { ready: AtomicU64::new(0), done: AtomicU64::new(0), good: AtomicBool::new(false) } }; MOST_CPUS];
/// Processors that have come to 64-bit code, counted there.
#[unsafe(no_mangle)]
static UP: AtomicU32 = AtomicU32::new(0);
/// The newest job: kind, seed, first page, pages.
static JOB: [AtomicU64; 4] = [const { AtomicU64::new(0) }; 4];
/// Its number; written after it.
static NEWEST: AtomicU64 = AtomicU64::new(0);
/// The number of the newest job that everybody was ready for.
static BEGUN: AtomicU64 = AtomicU64::new(0);

/// How many processors run.
pub fn up() -> usize {
    (UP.load(Acquire) as usize).min(MOST_CPUS)
}

fn lapic(register: u64, value: u32) {
    // SAFETY: the processor's own interrupt controller, which is no memory; what is sent only starts or wakes others.
    unsafe { ptr::write_volatile((LAPIC + register) as *mut u32, value) };
}

fn wake_others() {
    lapic(0x300, 0xc4000 | WAKE);
}

/// Sleeps until something is so; false when it takes too long.
fn wait(so: impl Fn() -> bool) -> bool {
    for _ in 0..PATIENCE {
        if so() {
            return true;
        }
        sleep();
    }
    false
}

/// Starts the other processors.
pub fn start() {
    // QEMU tells their number at its configuration port, item 5.
    port::out16(0x510, 5);
    let cpus = u16::from_le_bytes([port::in8(0x511), port::in8(0x511)]) as usize;
    if !(2..=MOST_CPUS).contains(&cpus) {
        return;
    }
    // SAFETY: the code's own bounds, and a page that nothing else uses once multiboot's structure has been read.
    unsafe {
        let len = &raw const boot::trampoline_end as usize - &raw const boot::trampoline as usize;
        ptr::copy(&raw const boot::trampoline, boot::TRAMPOLINE as *mut u8, len);
    }
    lapic(0xf0, 0x100 | WAKE);
    // The old interrupt controllers stay this processor's.
    lapic(0x350, 0x700);
    lapic(0x300, 0xc4500);
    lapic(0x300, 0xc4600 | (boot::TRAMPOLINE >> 12) as u32);
    wait(|| up() == cpus);
}

/// The life of another processor.
#[unsafe(no_mangle)]
extern "C" fn processor(number: u32) -> ! {
    lapic(0xf0, 0x100 | WAKE);
    wake_others();
    let mut seen = 0;
    loop {
        let newest = NEWEST.load(Acquire);
        let Some(cpu) = CPUS.get(number as usize).filter(|_| newest != seen) else {
            sleep();
            continue;
        };
        seen = newest;
        cpu.ready.store(newest, Release);
        wake_others();
        while BEGUN.load(Acquire) < newest {
            core::hint::spin_loop();
        }
        let [kind, seed, first, count] = [0, 1, 2, 3].map(|i: usize| JOB[i].load(Relaxed));
        let work = match kind {
            0 => Work::Touch,
            1 => Work::Fill(seed),
            _ => Work::Check(seed),
        };
        // SAFETY: who gave the job has promised it.
        let good = unsafe { part(number as u64, work, first, count) };
        cpu.good.store(good, Relaxed);
        cpu.done.store(newest, Release);
        wake_others();
    }
}

/// Lets all processors do their part at the same time. Whether all was good; `None` if one of them does not come.
///
/// # Safety
/// The pages are free memory.
pub unsafe fn together(work: Work, first: u64, count: u64) -> Option<bool> {
    let (kind, seed) = match work {
        Work::Touch => (0, 0),
        Work::Fill(seed) => (1, seed),
        Work::Check(seed) => (2, seed),
    };
    for (to, value) in JOB.iter().zip([kind, seed, first, count]) {
        to.store(value, Relaxed);
    }
    let number = NEWEST.load(Relaxed) + 1;
    NEWEST.store(number, Release);
    let others = CPUS.get(1..up())?;
    if !others.is_empty() {
        wake_others();
    }
    let ready = wait(|| others.iter().all(|c| c.ready.load(Acquire) == number));
    BEGUN.store(number, Release);
    // SAFETY: the caller's duty.
    let good = unsafe { part(0, work, first, count) };
    let done = ready && wait(|| others.iter().all(|c| c.done.load(Acquire) == number));
    done.then(|| good && others.iter().all(|c| c.good.load(Relaxed)))
}

/// One processor's part.
///
/// # Safety
/// The pages are free memory.
unsafe fn part(own: u64, work: Work, first: u64, count: u64) -> bool {
    (first..first + count).all(|page| match work {
        Work::Touch => {
            // SAFETY: the caller's duty.
            unsafe { ptr::read_volatile(address(page, own)) };
            true
        }
        Work::Fill(seed) => {
            // SAFETY: the caller's duty. No two processors write the same word.
            unsafe { ptr::write_volatile(address(page, own), pattern::word(seed, page, own)) };
            true
        }
        Work::Check(seed) => (0..up() as u64).all(|i| {
            // SAFETY: the caller's duty. Nobody writes during this job.
            unsafe { ptr::read_volatile(address(page, i)) == pattern::word(seed, page, i) }
        }),
    })
}
