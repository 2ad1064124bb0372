//! The CPUs' page-table roots, out of the devices' state that QEMU saved.
//!
//! QEMU writes each CPU as a section `cpu`: its name's length and name, the CPU's number and the format's version, both as
//! 32-bit numbers, then fields one after the other, big-endian (`vmstate_x86_cpu` in `target/i386/machine.c`; version 12 for
//! as long as QEMU has had 64-bit guests). Asking QEMU for the registers instead would be a part of the pause, or too late.

/// The control registers of a CPU that tell where its page tables are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct ControlRegisters {
    /// CR0: whether paging is on, among others.
    pub cr0: u64,
    /// CR3: the root.
    pub cr3: u64,
    /// CR4: whether page tables have 5 levels, among others.
    pub cr4: u64,
}

const NAME: &[u8] = b"\x03cpu";
const VERSIONS: std::ops::RangeInclusive<u32> = 11..=12;
/// Bytes before CR0: 16 registers, instruction pointer, flags (64 and 32 bits), four 16-bit words and eight registers of the
/// FPU, ten segments of 20 bytes, and 20 bytes of SYSENTER's registers.
const BEFORE_CR0: usize = 16 * 8 + 8 + 8 + 4 + 4 * 2 + 8 * 10 + 10 * 20 + 20;
/// CR0: protected mode and paging.
const PROTECTED_PAGING: u64 = 1 << 31 | 1;
/// CR4: physical address extension, without which there is no 64-bit mode.
const LONG_PAGES: u64 = 1 << 5;
/// More CPUs than any machine has.
const MAX_CPUS: usize = 1024;

impl ControlRegisters {
    /// Those of each CPU that has paging on with 64-bit page tables, in the order of their numbers. Empty when the state is
    /// not understood: it may come from a QEMU that writes it in another way.
    #[must_use]
    pub fn of_state(state: &[u8]) -> Vec<Self> {
        let mut found: Vec<(u32, Self)> = Vec::new();
        let mut at = 0;
        while let Some(offset) = find(&state[at..], NAME) {
            at += offset + NAME.len();
            if let Some(cpu) = parse(&state[at..])
                && !found.iter().any(|(number, _)| *number == cpu.0)
                && found.len() < MAX_CPUS
            {
                found.push(cpu);
            }
        }
        found.sort_by_key(|(number, _)| *number);
        found.into_iter().map(|(_, registers)| registers).collect()
    }
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

fn parse(bytes: &[u8]) -> Option<(u32, ControlRegisters)> {
    let (number, rest) = bytes.split_first_chunk::<4>()?;
    let (version, fields) = rest.split_first_chunk::<4>()?;
    let number = u32::from_be_bytes(*number);
    if !VERSIONS.contains(&u32::from_be_bytes(*version)) || number as usize >= MAX_CPUS {
        return None;
    }
    let register =
        |n: usize| fields.get(BEFORE_CR0 + 8 * n..)?.first_chunk::<8>().map(|bytes| u64::from_be_bytes(*bytes));
    let registers = ControlRegisters { cr0: register(0)?, cr3: register(2)?, cr4: register(3)? };
    // Of any other bytes by this name it would be a great chance.
    let good = registers.cr0 & PROTECTED_PAGING == PROTECTED_PAGING
        && registers.cr4 & LONG_PAGES != 0
        && registers.cr4 >> 32 == 0
        && registers.cr0 >> 32 == 0
        && registers.cr3 >> 52 == 0;
    good.then_some((number, registers))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn section(number: u32, version: u32, cr0: u64, cr3: u64, cr4: u64) -> Vec<u8> {
        let mut bytes = b"\x04\0\0\0\x02\x03cpu".to_vec();
        bytes.extend(number.to_be_bytes());
        bytes.extend(version.to_be_bytes());
        bytes.extend([7; BEFORE_CR0]);
        bytes.extend([cr0, 0, cr3, cr4].iter().flat_map(|r| r.to_be_bytes()));
        bytes
    }

    #[test]
    fn every_cpu_with_paging_is_found() {
        let on = 0x8005_0033;
        let state = [
            b"QEVM stuff \x03cpu more stuff that is no CPU".to_vec(),
            section(1, 12, on, 0x2000, 0x20),
            section(0, 12, on, 0x1000, 0x1020),
            section(2, 12, 0x10, 0x3000, 0),
            section(3, 99, on, 0x3000, 0x20),
        ]
        .concat();
        let roots: Vec<_> = ControlRegisters::of_state(&state).iter().map(|r| (r.cr3, r.cr4)).collect();
        assert_eq!(roots, [(0x1000, 0x1020), (0x2000, 0x20)]);
    }

    #[test]
    fn cut_short_it_is_not_understood() {
        let state = section(0, 12, 0x8005_0033, 0x1000, 0x20);
        for len in 0..state.len() {
            assert_eq!(ControlRegisters::of_state(&state[..len]), []);
        }
    }
}
