//! Memory of other processes.

use std::{fs, io};

/// Reads exactly `bytes.len()` bytes at `addr` of another process.
///
/// # Errors
/// When the process is gone, not ours to read, or has no memory there.
pub fn process_read(pid: u32, addr: u64, bytes: &mut [u8]) -> io::Result<()> {
    let pid = libc::pid_t::try_from(pid).map_err(io::Error::other)?;
    let mut done = 0;
    while done < bytes.len() {
        let rest = &mut bytes[done..];
        let local = libc::iovec { iov_base: rest.as_mut_ptr().cast(), iov_len: rest.len() };
        let remote = libc::iovec { iov_base: (addr + done as u64) as *mut libc::c_void, iov_len: rest.len() };
        // SAFETY: `local` describes `rest`, which outlives the call; `remote` is checked by the kernel.
        let read = unsafe { libc::process_vm_readv(pid, &raw const local, 1, &raw const remote, 1, 0) };
        match usize::try_from(read) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => done += read,
            Err(_) => {
                let err = io::Error::last_os_error();
                if err.kind() != io::ErrorKind::Interrupted {
                    return Err(err);
                }
            }
        }
    }
    Ok(())
}

/// Memory of a VMM, in bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemStats {
    /// Guest memory that only this VMM holds.
    pub private_bytes: u64,
    /// Guest memory held, shared pages divided among those who share them (PSS).
    pub ram_pss_bytes: u64,
    /// PSS of everything else: the VMM's own weight.
    pub vmm_pss_bytes: u64,
}

/// What the kernel says of the memory of process `pid`, whose RAM is mapped at `ram_addr`. Takes milliseconds.
///
/// # Errors
/// When the process is gone or not ours to read.
pub fn mem_stats(pid: u32, ram_addr: u64, ram_len: u64) -> io::Result<MemStats> {
    Ok(sum_smaps(&fs::read_to_string(format!("/proc/{pid}/smaps"))?, ram_addr, ram_len))
}

fn sum_smaps(text: &str, ram_addr: u64, ram_len: u64) -> MemStats {
    let mut stats = MemStats::default();
    let mut in_ram = false;
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        let Some(first) = words.next() else { continue };
        if let Some((start, end)) = first.split_once('-') {
            if let (Ok(start), Ok(_)) = (u64::from_str_radix(start, 16), u64::from_str_radix(end, 16)) {
                in_ram = start >= ram_addr && start < ram_addr + ram_len;
            }
            continue;
        }
        let kib = words.next().and_then(|w| w.parse::<u64>().ok()).unwrap_or(0) * 1024;
        match (first, in_ram) {
            ("Pss:", true) => stats.ram_pss_bytes += kib,
            ("Pss:", false) => stats.vmm_pss_bytes += kib,
            ("Anonymous:", true) => stats.private_bytes += kib,
            _ => {}
        }
    }
    stats
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn own_memory_can_be_read_and_holes_can_not() {
        let data = [7u8; 10_000];
        let mut out = [0u8; 10_000];
        process_read(std::process::id(), data.as_ptr() as u64, &mut out).unwrap();
        assert_eq!(out, data);
        assert!(process_read(std::process::id(), 0x1000, &mut out).is_err());
    }

    #[test]
    fn smaps_are_summed_by_place() {
        let text = "1000-3000 rw-p 00000000 00:1b 5 /x\nPss: 4 kB\nAnonymous: 3 kB\n3000-4000 r--p 0 0 0\nPss: 7 kB\nAnonymous: 1 kB\n";
        let stats = sum_smaps(text, 0x1000, 0x2000);
        assert_eq!(stats, MemStats { private_bytes: 3 << 10, ram_pss_bytes: 4 << 10, vmm_pss_bytes: 7 << 10 });
    }
}
