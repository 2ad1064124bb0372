//! Serial ports, and the agent's frames over the second one: `00 COBS(kind | stream | payload | crc32) 00`.

use core::arch::asm;

/// Longest frame, decoded, that is understood or sent.
pub const MAX_FRAME: usize = 4096;

pub fn out8(port: u16, value: u8) {
    // SAFETY: ports of devices that this guest owns; no memory is touched.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack)) };
}

pub fn out16(port: u16, value: u16) {
    // SAFETY: as above.
    unsafe { asm!("out dx, ax", in("dx") port, in("ax") value, options(nomem, nostack)) };
}

pub fn in8(port: u16) -> u8 {
    let value;
    // SAFETY: as above.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack)) };
    value
}

/// A 16550.
#[derive(Clone, Copy)]
pub struct Serial(pub u16);

impl Serial {
    /// Switches the port on; with interrupts on received bytes if wanted.
    pub fn start(self, interrupts: bool) {
        out8(self.0 + 3, 3);
        out8(self.0 + 2, 7);
        out8(self.0 + 4, 0x0b);
        out8(self.0 + 1, interrupts as u8);
        // What came before was just dropped, and QEMU held back the rest: only a read makes it look again.
        in8(self.0);
    }

    pub fn send(self, byte: u8) {
        while in8(self.0 + 5) & 0x20 == 0 {}
        out8(self.0, byte);
    }

    pub fn receive(self) -> Option<u8> {
        (in8(self.0 + 5) & 1 != 0).then(|| in8(self.0))
    }

    pub fn print(self, text: &str) {
        text.bytes().for_each(|b| self.send(b));
    }
}

pub fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0, |mut crc, &byte| {
        crc ^= byte as u32;
        for _ in 0..8 {
            crc = (crc >> 1) ^ (0xedb8_8320 & 0u32.wrapping_sub(crc & 1));
        }
        crc
    })
}

/// Collects bytes into frames.
pub struct Frames {
    bytes: [u8; MAX_FRAME + 64],
    len: usize,
    lost: bool,
}

impl Frames {
    pub const fn new() -> Self {
        Self { bytes: [0; MAX_FRAME + 64], len: 0, lost: false }
    }

    /// Takes a byte; at the end of a good frame, passes it on: kind, stream, payload.
    pub fn take(&mut self, byte: u8, found: impl FnOnce(u8, u32, &[u8])) {
        if byte != 0 {
            if self.len < self.bytes.len() {
                self.bytes[self.len] = byte;
                self.len += 1;
            } else {
                self.lost = true;
            }
            return;
        }
        let len = if self.lost { None } else { unstuff(&mut self.bytes, self.len) };
        (self.len, self.lost) = (0, false);
        let Some(frame) = len.and_then(|len| self.bytes.get(..len)) else { return };
        let Some((body, sum)) = frame.split_last_chunk::<4>() else { return };
        if body.len() >= 5 && crc32(body) == u32::from_le_bytes(*sum) {
            found(body[0], u32::from_le_bytes([body[1], body[2], body[3], body[4]]), &body[5..]);
        }
    }
}

/// Undoes COBS in place; the length, or `None` for bytes that are none.
fn unstuff(bytes: &mut [u8], len: usize) -> Option<usize> {
    let (mut from, mut to) = (0, 0);
    while from < len {
        let block = bytes[from] as usize;
        from += 1;
        if block == 0 || from + block - 1 > len {
            return None;
        }
        bytes.copy_within(from..from + block - 1, to);
        from += block - 1;
        to += block - 1;
        if block < 255 && from < len {
            bytes[to] = 0;
            to += 1;
        }
    }
    Some(to)
}

/// Sends a frame whose payload comes in parts.
pub fn send(port: Serial, kind: u8, stream: u32, parts: &[&[u8]]) {
    let mut body = [0u8; MAX_FRAME];
    body[0] = kind;
    body[1..5].copy_from_slice(&stream.to_le_bytes());
    let mut len = 5;
    for part in parts {
        let n = part.len().min(MAX_FRAME - 4 - len);
        body[len..len + n].copy_from_slice(&part[..n]);
        len += n;
    }
    let sum = crc32(&body[..len]).to_le_bytes();
    body[len..len + 4].copy_from_slice(&sum);
    len += 4;
    port.send(0);
    let mut rest = &body[..len];
    loop {
        let run = rest.iter().take(254).position(|&b| b == 0);
        match run {
            Some(n) => {
                port.send(n as u8 + 1);
                rest[..n].iter().for_each(|&b| port.send(b));
                rest = &rest[n + 1..];
            }
            None => {
                let n = rest.len().min(254);
                port.send(n as u8 + 1);
                rest[..n].iter().for_each(|&b| port.send(b));
                rest = &rest[n..];
                if rest.is_empty() {
                    break;
                }
            }
        }
    }
    port.send(0);
}
