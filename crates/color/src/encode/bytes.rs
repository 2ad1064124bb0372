//! Numbers and texts as bytes.

use super::MapError;

/// Appends a LEB128 number.
pub(super) fn put_varint(out: &mut Vec<u8>, mut n: u64) {
    while n >= 0x80 {
        out.push((n & 0x7f) as u8 | 0x80);
        n >>= 7;
    }
    out.push(n as u8);
}

/// Appends the way from `from` to `to`, short when it is short in either direction.
pub(super) fn put_delta(out: &mut Vec<u8>, from: u64, to: u64) {
    let way = to.wrapping_sub(from).cast_signed();
    put_varint(out, ((way << 1) ^ (way >> 63)).cast_unsigned());
}

/// Appends a text, cut to at most `max` bytes.
pub(super) fn put_text(out: &mut Vec<u8>, text: &str, max: usize) {
    let text = clip(text, max);
    put_varint(out, text.len() as u64);
    out.extend(text.as_bytes());
}

/// The text's beginning, of at most `max` bytes and whole characters.
pub(super) fn clip(text: &str, max: usize) -> &str {
    let mut end = max.min(text.len());
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text[..end]
}

/// What is left to read of a stream.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'a> Reader<'a> {
    pub(super) fn take<const N: usize>(&mut self) -> Result<[u8; N], MapError> {
        let (head, tail) = self.0.split_first_chunk::<N>().ok_or(MapError::Length)?;
        self.0 = tail;
        Ok(*head)
    }

    pub(super) fn bytes(&mut self, len: usize) -> Result<&'a [u8], MapError> {
        self.0.split_off(..len).ok_or(MapError::Length)
    }

    pub(super) fn byte(&mut self) -> Result<u8, MapError> {
        self.take::<1>().map(|[byte]| byte)
    }

    pub(super) fn flag(&mut self) -> Result<bool, MapError> {
        match self.byte()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(MapError::Malformed("flag")),
        }
    }

    pub(super) fn varint(&mut self) -> Result<u64, MapError> {
        let mut n = 0;
        for shift in (0..64).step_by(7) {
            let byte = self.byte()?;
            if shift == 63 && byte > 1 {
                break;
            }
            n |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(n);
            }
        }
        Err(MapError::Malformed("number"))
    }

    pub(super) fn varint_u32(&mut self) -> Result<u32, MapError> {
        u32::try_from(self.varint()?).map_err(|_| MapError::Malformed("number"))
    }

    /// What [`put_delta`] wrote, seen from the same `from`.
    pub(super) fn delta(&mut self, from: u64) -> Result<u64, MapError> {
        let n = self.varint()?;
        Ok(from.wrapping_add((n >> 1) ^ (n & 1).wrapping_neg()))
    }

    pub(super) fn text(&mut self, max: usize) -> Result<String, MapError> {
        let len = usize::try_from(self.varint()?).unwrap_or(usize::MAX);
        if len > max {
            return Err(MapError::Malformed("a text is too long"));
        }
        text(self.bytes(len)?.to_vec())
    }

    /// Refuses bytes behind what was read.
    pub(super) fn finish(self) -> Result<(), MapError> {
        if self.0.is_empty() { Ok(()) } else { Err(MapError::Length) }
    }
}

pub(super) fn text(bytes: Vec<u8>) -> Result<String, MapError> {
    String::from_utf8(bytes).map_err(|_| MapError::Malformed("a text is not UTF-8"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_round_trip() {
        let numbers = [0, 1, 127, 128, 300, u64::from(u32::MAX), 1 << 63, u64::MAX - 1, u64::MAX];
        for from in numbers {
            for to in numbers {
                let mut out = Vec::new();
                put_varint(&mut out, to);
                put_delta(&mut out, from, to);
                let mut reader = Reader(&out);
                assert_eq!(reader.varint(), Ok(to));
                assert_eq!(reader.delta(from), Ok(to));
                assert_eq!(reader.finish(), Ok(()));
            }
        }
        assert!(Reader(&[0xff; 10]).varint().is_err());
    }

    #[test]
    fn texts_are_cut_between_characters() {
        assert_eq!(clip("aäb", 2), "a");
        assert_eq!(clip("aäb", 3), "aä");
        assert_eq!(clip("aäb", 9), "aäb");
    }
}
