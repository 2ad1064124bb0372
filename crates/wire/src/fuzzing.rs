//! What the fuzz targets and the property tests both run: whatever the bytes, decoding keeps its promises.

use crate::{Descriptor, Frame, Message, descriptor, frame};
use ramet_memory::{LayerId, PAGE_SIZE};

/// A stream of frames. Decoding never panics; a decoded frame encodes to the bytes that it was decoded from; no prefix
/// of it decodes to a frame; the pages of a frame lie inside it, and its runs hold the same pages as its entries.
///
/// # Panics
/// When a promise is broken.
pub fn frame(data: &[u8]) {
    let mut rest = data;
    while let Ok(Some((decoded, len))) = Frame::decode(rest) {
        assert!((frame::HEADER_LEN..=frame::HEADER_LEN + frame::MAX_PAYLOAD).contains(&len));
        let mut again = Vec::new();
        decoded.encode(&mut again);
        assert_eq!(again, &rest[..len], "{decoded:?}");
        assert_eq!(Frame::decode(&again), Ok(Some((decoded, len))));
        assert_eq!(Frame::decode(&again[..len - 1]), Ok(None));
        if let Message::Pages(pages) = decoded.message {
            check_pages(&pages);
        }
        rest = &rest[len..];
    }
}

fn check_pages(pages: &frame::Pages<'_>) {
    assert!(pages.len() <= frame::MAX_ENTRIES);
    assert_eq!(pages.iter().count(), pages.len());
    assert!(pages.runs().flat_map(|run| run.entries()).eq(pages.iter()));
    let layer = LayerId::from_u128(1);
    let mut page = [0; PAGE_SIZE];
    for run in pages.runs() {
        let entries: Vec<_> = run.entries().collect();
        assert_eq!(entries.len() as u64, run.pages.len);
        assert_eq!(run.data.len(), entries.iter().map(|e| e.data.len()).sum::<usize>());
        for (n, entry) in entries.iter().enumerate() {
            assert_eq!((entry.page.0, entry.encoding), (run.pages.start.0 + n as u64, run.encoding));
        }
        if run.encoding == frame::Encoding::Raw {
            assert_eq!(run.data.len(), entries.len() * PAGE_SIZE);
        }
        // Checking in place and unpacking agree, except that packed pages can only be unpacked.
        let unpacked = entries.iter().try_for_each(|e| e.decompress_into(layer, &mut page));
        if run.encoding != frame::Encoding::Lz4 {
            assert_eq!(run.verify(layer), unpacked);
        }
    }
}

/// A descriptor. Decoding never panics, and takes memory in proportion to the bytes; a decoded descriptor encodes to one
/// that decodes the same; every prefix and every longer string is refused.
///
/// # Panics
/// When a promise is broken.
pub fn descriptor(data: &[u8]) {
    let Ok(decoded) = Descriptor::decode(data) else { return };
    assert!(data.len() <= descriptor::MAX_ENCODED);
    assert!(decoded.device_state.len() <= data.len() * 255);
    let again = decoded.encode().expect("what was decoded is within the limits");
    assert_eq!(Descriptor::decode(&again).as_ref(), Ok(&decoded));
    assert!(Descriptor::decode(&data[..data.len() - 1]).is_err());
    assert!(Descriptor::decode(&[data, &[0]].concat()).is_err());
    // Decoding the memory section is the memory crate's promise.
    let _ = decoded.image_spec();
}

/// As [`descriptor`], of the bytes with a length and a checksum that fit: what lies behind them is tested too.
///
/// # Panics
/// When a promise is broken.
pub fn resealed_descriptor(data: &[u8]) {
    let mut data = data.to_vec();
    descriptor::reseal(&mut data);
    descriptor(&data);
}
