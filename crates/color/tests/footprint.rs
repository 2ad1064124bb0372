//! How much memory coloring takes. In a program of its own, for it counts all that is allocated.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::RECORDED;
use ramet_color::{Base, color};
use ramet_memory::PageSet;

#[global_allocator]
static ALLOCATED: cap::Cap<std::alloc::System> = cap::Cap::new(std::alloc::System, usize::MAX);

/// The share of a guest's memory that coloring it may take at its peak, map and all: one part in so many, 2%.
const PART: usize = 50;

#[test]
fn coloring_takes_a_small_part_of_the_guests_memory() {
    for recorded in &RECORDED {
        let fixture = &recorded.fixture;
        let memory = fixture.memory();
        let size = fixture.pages.size().bytes() as usize;
        let (before, peak_before) = (ALLOCATED.allocated(), ALLOCATED.max_allocated());
        // What unpacking took at its peak is more than coloring takes: fill up to there, so that a higher peak shows.
        let filler = vec![0u8; peak_before - before];
        let map = color(&memory, &[fixture.cpu], None).unwrap();
        let peak = ALLOCATED.max_allocated() - peak_before;
        println!("{}: {peak} bytes, {:.3}% of memory", recorded.file, peak as f64 * 100.0 / size as f64);
        assert!(peak > size / 4096 * 20 && peak <= size / PART, "{}: {peak} bytes", recorded.file);
        drop(filler);
        // Once more, on top of the first map: what is known is not searched for again.
        let (before, peak_before) = (ALLOCATED.allocated(), ALLOCATED.max_allocated());
        let filler = vec![0u8; peak_before - before];
        let changed = PageSet::new(fixture.pages);
        let again = color(&memory, &[fixture.cpu], Some(Base { map: &map, changed: &changed })).unwrap();
        let peak = ALLOCATED.max_allocated() - peak_before;
        println!("{}: {peak} bytes with a base, {:.3}% of memory", recorded.file, peak as f64 * 100.0 / size as f64);
        assert!(peak <= size / PART, "{}: {peak} bytes with a base", recorded.file);
        drop((filler, again));
    }
}
