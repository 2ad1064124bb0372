//! Building [`super::Message::Pages`] frames without an allocation for each page.

use super::{Encoding, HEADER_LEN, MAX_ENTRIES, MAX_PAYLOAD, PAGES_HEAD, PagesFull, TABLE_ENTRY, decode};
use ramet_memory::{PAGE_SIZE, PageIndex};

/// A packed page at least this long travels raw: unpacking it costs more than its bytes.
const WORTH_PACKING: usize = PAGE_SIZE / 8 * 7;
/// On links faster than this (bytes per second) packing costs more time than it saves: LZ4 takes about 5.4 us to pack a
/// page to half its size and 1.3 us to unpack it, which is the time that the saved 2 KiB take at about 300 MB/s.
const FAST_LINK: u64 = 300_000_000;
/// After pages that did not pack, at most this many are not even tried.
const MAX_SKIP: u32 = 64;

/// Builds the frames of an answer in a buffer that is used again for the next frame.
///
/// ```
/// use ramet_memory::{LayerId, PageIndex, page_checksum};
/// use ramet_wire::{Frame, Message, PagesWriter};
/// let (layer, page, bytes) = (LayerId::random(), PageIndex(7), [5; 4096]);
/// let mut writer = PagesWriter::new();
/// writer.start(1, 42);
/// writer.push_raw_or_lz4(page, &bytes, page_checksum(layer, page, &bytes)).unwrap();
/// let (frame, _) = Frame::decode(writer.finish(true)).unwrap().unwrap();
/// let Message::Pages(pages) = frame.message else { panic!() };
/// let mut arrived = [0; 4096];
/// pages.iter().next().unwrap().decompress_into(layer, &mut arrived).unwrap();
/// assert_eq!(arrived, bytes);
/// ```
#[derive(Debug)]
pub struct PagesWriter {
    /// Header, head and data of the frame under construction; after `finish` the table too.
    frame: Vec<u8>,
    table: Vec<u8>,
    entries: usize,
    finished: bool,
    packer: Packer,
}

impl Default for PagesWriter {
    fn default() -> Self {
        Self::new()
    }
}

impl PagesWriter {
    /// A writer with an empty frame. Its buffers grow to the largest frame, at most a little over 1 MiB.
    #[must_use]
    pub fn new() -> Self {
        let mut writer =
            Self { frame: Vec::new(), table: Vec::new(), entries: 0, finished: false, packer: Packer::default() };
        writer.start(0, 0);
        writer
    }

    /// Begins a frame that answers request `req` with pages of the layer opened as `handle`. What an unfinished frame
    /// held is forgotten.
    pub fn start(&mut self, req: u32, handle: u32) {
        self.frame.clear();
        self.table.clear();
        (self.entries, self.finished) = (0, false);
        decode::begin(&mut self.frame, decode::PAGES, req);
        self.frame.extend(handle.to_le_bytes());
        self.frame.extend([0; PAGES_HEAD - 4]);
    }

    /// Tells the writer how fast the link is, in bytes per second ([`crate::Sender::link_speed`]). Pages are packed only
    /// where that makes them arrive sooner; a link of unknown speed (`None`) is taken to be slow.
    pub const fn set_link_speed(&mut self, bytes_per_second: Option<u64>) {
        self.packer.fast_link = matches!(bytes_per_second, Some(speed) if speed > FAST_LINK);
    }

    /// Number of pages in the frame.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.entries
    }

    /// Whether the frame holds no page yet.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.entries == 0
    }

    /// Whether the next page may not fit: time to [`Self::finish`], send, and [`Self::start`] the next frame. About 254
    /// raw pages. A finished frame is full.
    #[must_use]
    pub const fn is_full(&self) -> bool {
        let payload = self.frame.len() - HEADER_LEN + self.table.len();
        self.finished || payload + PAGE_SIZE + TABLE_ENTRY > MAX_PAYLOAD || self.entries >= MAX_ENTRIES
    }

    /// Bytes of the frame so far.
    #[must_use]
    pub const fn bytes(&self) -> usize {
        self.frame.len() + self.table.len()
    }

    /// Adds a page: as a zero page when it is one, packed where that pays, else raw.
    ///
    /// `checksum` is the page's [`crate::page_checksum`] from when it was copied out of its parent. It is passed on, not
    /// computed here, so that damage anywhere on the way is found by the receiver.
    ///
    /// # Errors
    /// [`PagesFull`] when [`Self::is_full`]; the frame is as before.
    pub fn push_raw_or_lz4(
        &mut self,
        page: PageIndex,
        bytes: &[u8; PAGE_SIZE],
        checksum: u64,
    ) -> Result<(), PagesFull> {
        if self.is_full() {
            return Err(PagesFull);
        }
        if is_zero(bytes) {
            self.entry(page, checksum, 0, Encoding::Zero);
            return Ok(());
        }
        let before = self.frame.len();
        if self.packer.should_try() {
            // lz4_flex wants room for the worst case, whatever the page turns out to need.
            self.frame.resize(before + lz4_flex::block::get_maximum_output_size(PAGE_SIZE), 0);
            let packed = lz4_flex::block::compress_into(bytes, &mut self.frame[before..]).ok();
            let packed = packed.filter(|&len| len < WORTH_PACKING);
            self.packer.learn(packed.is_some());
            if let Some(len) = packed {
                self.frame.truncate(before + len);
                self.entry(page, checksum, len, Encoding::Lz4);
                return Ok(());
            }
            self.frame.truncate(before);
        }
        self.frame.extend_from_slice(bytes);
        self.entry(page, checksum, PAGE_SIZE, Encoding::Raw);
        Ok(())
    }

    /// Adds a page that is known to be all zeros.
    ///
    /// # Errors
    /// [`PagesFull`] when [`Self::is_full`]; the frame is as before.
    pub fn push_zero(&mut self, page: PageIndex, checksum: u64) -> Result<(), PagesFull> {
        if self.is_full() {
            return Err(PagesFull);
        }
        self.entry(page, checksum, 0, Encoding::Zero);
        Ok(())
    }

    /// Adds the news that this source does not hold the page.
    ///
    /// # Errors
    /// [`PagesFull`] when [`Self::is_full`]; the frame is as before.
    pub fn push_absent(&mut self, page: PageIndex) -> Result<(), PagesFull> {
        if self.is_full() {
            return Err(PagesFull);
        }
        self.entry(page, 0, 0, Encoding::Absent);
        Ok(())
    }

    /// Completes the frame; `last` says whether the answer ends with it. The bytes are ready to be sent.
    pub fn finish(&mut self, last: bool) -> &[u8] {
        let count = self.entries as u16;
        self.frame[HEADER_LEN + 4..HEADER_LEN + 6].copy_from_slice(&count.to_le_bytes());
        self.frame[HEADER_LEN + 6] = u8::from(last);
        self.frame.append(&mut self.table);
        self.finished = true;
        decode::end(&mut self.frame, 0);
        &self.frame
    }

    fn entry(&mut self, page: PageIndex, checksum: u64, len: usize, encoding: Encoding) {
        self.table.extend(page.0.to_le_bytes());
        self.table.extend(checksum.to_le_bytes());
        self.table.extend((len as u16).to_le_bytes());
        self.table.extend([encoding as u8, 0]);
        self.entries += 1;
    }
}

/// Decides whether packing the next page is worth a try.
#[derive(Debug, Default)]
struct Packer {
    fast_link: bool,
    /// Pages still to pass over.
    skip: u32,
    /// How many were passed over last time; doubles with every failure.
    last_skip: u32,
}

impl Packer {
    const fn should_try(&mut self) -> bool {
        if self.fast_link {
            return false;
        }
        if self.skip > 0 {
            self.skip -= 1;
            return false;
        }
        true
    }

    fn learn(&mut self, packed: bool) {
        // A single page that does not pack among others that do costs nothing but itself.
        self.last_skip = if packed { 0 } else { (self.last_skip * 2 + 1).min(MAX_SKIP) };
        self.skip = self.last_skip / 2;
    }
}

/// Whether all bytes are zero. Looks at 256 bytes at a time: most pages are decided by the first.
fn is_zero(bytes: &[u8; PAGE_SIZE]) -> bool {
    let (blocks, _) = bytes.as_chunks::<256>();
    blocks.iter().all(|block| block.iter().fold(0, |any, byte| any | byte) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Frame, Message};
    use ramet_memory::{LayerId, page_checksum};

    const LAYER: LayerId = LayerId::from_u128(3);

    fn noise(seed: u64) -> [u8; PAGE_SIZE] {
        let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
        std::array::from_fn(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 32) as u8
        })
    }

    fn encodings(writer: &mut PagesWriter) -> Vec<Encoding> {
        let (frame, _) = Frame::decode(writer.finish(true)).unwrap().unwrap();
        let Message::Pages(pages) = frame.message else { panic!("{frame:?}") };
        pages.iter().map(|e| e.encoding).collect()
    }

    fn push(writer: &mut PagesWriter, page: u64, bytes: &[u8; PAGE_SIZE]) {
        let page = PageIndex(page);
        writer.push_raw_or_lz4(page, bytes, page_checksum(LAYER, page, bytes)).unwrap();
    }

    #[test]
    fn each_page_travels_the_cheapest_way() {
        let mut writer = PagesWriter::new();
        writer.start(9, 1);
        push(&mut writer, 0, &[0; PAGE_SIZE]);
        push(&mut writer, 1, &[7; PAGE_SIZE]);
        push(&mut writer, 2, &noise(1));
        writer.push_absent(PageIndex(3)).unwrap();
        let mut almost = [0; PAGE_SIZE];
        almost[PAGE_SIZE - 1] = 1;
        push(&mut writer, 4, &almost);
        use Encoding::{Absent, Lz4, Raw, Zero};
        assert_eq!(encodings(&mut writer), [Zero, Lz4, Raw, Absent, Lz4]);
    }

    #[test]
    fn pages_that_do_not_pack_are_soon_not_tried_but_never_given_up() {
        let mut packer = Packer::default();
        let tries = (0..1000).filter(|_| packer.should_try().then(|| packer.learn(false)).is_some()).count();
        assert!((20..60).contains(&tries), "{tries} tries");
        while !packer.should_try() {}
        packer.learn(true);
        assert!(packer.should_try());
    }

    #[test]
    fn fast_links_get_raw_pages() {
        let mut writer = PagesWriter::new();
        for (speed, expected) in
            [(Some(2_000_000_000), Encoding::Raw), (Some(117_000_000), Encoding::Lz4), (None, Encoding::Lz4)]
        {
            writer.set_link_speed(speed);
            writer.start(1, 1);
            push(&mut writer, 0, &[7; PAGE_SIZE]);
            assert_eq!(encodings(&mut writer), [expected], "{speed:?}");
        }
    }

    #[test]
    fn a_full_frame_says_so_and_stays_within_the_limit() {
        let mut writer = PagesWriter::new();
        writer.start(1, 1);
        let page = noise(2);
        let mut pages = 0;
        while writer.push_raw_or_lz4(PageIndex(pages), &page, 1).is_ok() {
            pages += 1;
        }
        assert_eq!(pages, 254);
        assert_eq!(writer.push_absent(PageIndex(0)), Err(PagesFull));
        assert!(writer.finish(false).len() <= HEADER_LEN + MAX_PAYLOAD);
        assert!(writer.finish(false).len() > MAX_PAYLOAD - 2 * PAGE_SIZE);

        writer.start(1, 1);
        let zeros = (0..).take_while(|&n| writer.push_zero(PageIndex(n), 1).is_ok()).count();
        assert_eq!(zeros, MAX_ENTRIES);
        assert_eq!(encodings(&mut writer).len(), MAX_ENTRIES);
    }
}
