//! A stand-in for a VMM in the pager's tests: a process that has "RAM" and nothing else.
//!
//! It runs under the real preload object, so that its memory is mapped, registered and protected as QEMU's is; the mock is
//! only the guest. Commands come on stdin, one a line, and are answered by one line:
//!
//! ```text
//! r PAGE           the page's value (its first u64); "torn" when the page's words are not all that value
//! w PAGE VALUE     fills the page with a value; "ok"
//! ```
//!
//! Arguments: the RAM file, its size in bytes.

use ramet_kernel::SharedMapping;
use std::io::{BufRead, Write};

const WORDS: u64 = 512;

fn main() -> std::io::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (Some(path), Some(len)) = (arguments.next(), arguments.next().and_then(|l| l.parse::<usize>().ok())) else {
        return Err(std::io::Error::other("usage: memory_vm RAM_FILE BYTES"));
    };
    let file = std::fs::File::options().read(true).write(true).open(path)?;
    let ram = SharedMapping::map(&file, len)?;
    let mut out = std::io::stdout().lock();
    writeln!(out, "ready")?;
    out.flush()?;
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let mut words = line.split(' ');
        let command = words.next();
        let numbers: Vec<u64> = words.filter_map(|w| w.parse().ok()).collect();
        match (command, &numbers[..]) {
            (Some("r"), &[page]) => {
                let value = ram.read_u64((page * WORDS) as usize);
                let whole = (1..WORDS).all(|i| ram.read_u64((page * WORDS + i) as usize) == value);
                if whole { writeln!(out, "{value}")? } else { writeln!(out, "torn")? }
            }
            (Some("w"), &[page, value]) => {
                for i in 0..WORDS {
                    ram.write_u64((page * WORDS + i) as usize, value);
                }
                writeln!(out, "ok")?;
            }
            _ => writeln!(out, "what?")?,
        }
        out.flush()?;
    }
    Ok(())
}
