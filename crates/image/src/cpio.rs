//! The initramfs: a cpio archive ("newc"), compressed as the kernel's LZ4 ("legacy frame").
//!
//! LZ4 costs an emulated CPU little, and leaves less of the archive's bytes behind in the guest's free memory than
//! no compression would. The same tree always gives the same bytes.

use std::io::{self, Write};

/// One entry of an archive.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Entry<'a> {
    /// Path without a leading `/`.
    pub(crate) path: &'a str,
    /// File type and permission bits.
    pub(crate) mode: u32,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Major and minor number of a device.
    pub(crate) device: (u32, u32),
}

/// Writes an archive.
#[derive(Debug)]
pub(crate) struct Writer<W> {
    to: W,
    entries: u32,
}

impl<W: Write> Writer<W> {
    pub(crate) fn new(to: W) -> Self {
        Self { to, entries: 0 }
    }

    /// Adds an entry with its bytes (for a symbolic link, its target).
    pub(crate) fn add(&mut self, entry: Entry<'_>, bytes: &[u8]) -> io::Result<()> {
        let too_long =
            |_| io::Error::new(io::ErrorKind::FileTooLarge, "a file of 4 GiB or more does not fit an initramfs");
        let size = u32::try_from(bytes.len()).map_err(too_long)?;
        let name_size = u32::try_from(entry.path.len() + 1).map_err(too_long)?;
        self.entries += 1;
        // Inode, mode, uid, gid, links, time, size, device (2), device of a device file (2), length of the name, check.
        let (major, minor) = entry.device;
        let fields = [self.entries, entry.mode, entry.uid, entry.gid, 1, 0, size, 0, 0, major, minor, name_size, 0];
        let mut head = String::from("070701");
        for field in fields {
            head.push_str(&format!("{field:08x}"));
        }
        head.push_str(entry.path);
        head.push('\0');
        self.padded(head.as_bytes())?;
        self.padded(bytes)
    }

    fn padded(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.to.write_all(bytes)?;
        self.to.write_all(&[0; 3][..bytes.len().next_multiple_of(4) - bytes.len()])
    }

    /// Ends the archive.
    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.add(Entry { path: "TRAILER!!!", ..Entry::default() }, &[])?;
        Ok(self.to)
    }
}

/// Compresses what is written as the kernel's unpacker wants LZ4: a magic number, then blocks of 8 MiB, each with the
/// length of its compressed form.
#[derive(Debug)]
pub(crate) struct Lz4<W> {
    to: W,
    block: Vec<u8>,
}

const LZ4_MAGIC: u32 = 0x184c_2102;
const LZ4_BLOCK: usize = 8 << 20;

impl<W: Write> Lz4<W> {
    pub(crate) fn new(mut to: W) -> io::Result<Self> {
        to.write_all(&LZ4_MAGIC.to_le_bytes())?;
        Ok(Self { to, block: Vec::new() })
    }

    fn end_block(&mut self) -> io::Result<()> {
        if !self.block.is_empty() {
            let bytes = lz4_flex::block::compress(&self.block);
            self.to.write_all(&u32::try_from(bytes.len()).map_err(io::Error::other)?.to_le_bytes())?;
            self.to.write_all(&bytes)?;
            self.block.clear();
        }
        Ok(())
    }

    pub(crate) fn finish(mut self) -> io::Result<W> {
        self.end_block()?;
        self.to.flush()?;
        Ok(self.to)
    }
}

impl<W: Write> Write for Lz4<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(LZ4_BLOCK - self.block.len());
        self.block.extend_from_slice(&bytes[..taken]);
        if self.block.len() == LZ4_BLOCK {
            self.end_block()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.to.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// A reader of its own: path, mode, bytes of each entry.
    fn read(mut archive: &[u8]) -> Vec<(String, u32, Vec<u8>)> {
        let mut found = Vec::new();
        loop {
            assert_eq!(&archive[..6], b"070701");
            let field = |n: usize| {
                let text = std::str::from_utf8(&archive[6 + 8 * n..14 + 8 * n]).unwrap();
                u32::from_str_radix(text, 16).unwrap()
            };
            let (mode, size, name_size) = (field(1), field(6) as usize, field(11) as usize);
            let name = String::from_utf8(archive[110..110 + name_size - 1].to_vec()).unwrap();
            let data = (110 + name_size).next_multiple_of(4);
            let end = (data + size).next_multiple_of(4);
            if name == "TRAILER!!!" {
                assert_eq!(archive.len(), end);
                return found;
            }
            found.push((name, mode, archive[data..data + size].to_vec()));
            archive = &archive[end..];
        }
    }

    proptest! {
        #[test]
        fn archives_hold_what_was_added(
            entries in prop::collection::vec(("[a-z/]{1,20}", any::<u32>(), prop::collection::vec(any::<u8>(), 0..50)), 0..8),
        ) {
            let mut writer = Writer::new(Vec::new());
            for (path, mode, bytes) in &entries {
                writer.add(Entry { path, mode: *mode, ..Entry::default() }, bytes).unwrap();
            }
            prop_assert_eq!(read(&writer.finish().unwrap()), entries);
        }
    }

    #[test]
    fn lz4_blocks_decompress_to_what_was_written() {
        let bytes: Vec<u8> = (0..LZ4_BLOCK + 12_345).map(|i| (i / 700) as u8).collect();
        let mut lz4 = Lz4::new(Vec::new()).unwrap();
        for part in bytes.chunks(1 << 20) {
            lz4.write_all(part).unwrap();
        }
        let packed = lz4.finish().unwrap();
        assert_eq!(packed[..4], LZ4_MAGIC.to_le_bytes());
        let (mut rest, mut back) = (&packed[4..], Vec::new());
        while let Some((length, more)) = rest.split_first_chunk::<4>() {
            let (block, more) = more.split_at(u32::from_le_bytes(*length) as usize);
            back.extend(lz4_flex::block::decompress(block, LZ4_BLOCK).unwrap());
            rest = more;
        }
        assert!(back == bytes);
        assert!(packed.len() < bytes.len() / 10);
    }
}
