//! Colors a raw memory image and holds the map against what the guest's kernel says, if that is in it.
//!
//! `hold-against FILE MEGABYTES [CR3 CR4]` (both hexadecimal)

use anyhow::{Context as _, Result};
use ramet_color::{CpuRoot, FileMemory, Summary, color};
use ramet_memory::ByteSize;
use ramet_truth::observer::Truth;
use std::time::Instant;

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().collect();
    let path = args.get(1).context("which file?")?;
    let size: u64 = args.get(2).context("how many megabytes?")?.parse()?;
    let hex = |text: &String| u64::from_str_radix(text, 16);
    let cpus = match (args.get(3), args.get(4)) {
        (Some(cr3), Some(cr4)) => vec![CpuRoot { cr3: hex(cr3)?, cr4: hex(cr4)? }],
        _ => Vec::new(),
    };
    let memory = FileMemory::open(path.as_ref(), ByteSize::mib(size).pages())?;
    let begin = Instant::now();
    let map = color(&memory, &cpus, None)?;
    let took = begin.elapsed();
    let begin = Instant::now();
    let encoded = map.encode();
    println!("colored in {took:?}, encoded to {} bytes in {:?}", encoded.len(), begin.elapsed());
    println!("{}", serde_json::to_string_pretty(&Summary::of(&map, 8))?);
    match Truth::find(&memory)? {
        Some(truth) => print!("{}", truth.compare(&map, &memory).text()),
        None => println!("the guest's kernel's own words are not in memory"),
    }
    Ok(())
}
