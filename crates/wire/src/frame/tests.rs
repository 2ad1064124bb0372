use super::*;
use crate::fuzzing;
use proptest::prelude::*;

const LAYER: LayerId = LayerId::from_u128(0xfeed);

fn encode(req: u32, message: Message<'_>) -> Vec<u8> {
    let mut out = Vec::new();
    Frame { req, message }.encode(&mut out);
    out
}

fn pages_of(bytes: &[u8]) -> Pages<'_> {
    match Frame::decode(bytes).unwrap().unwrap().0.message {
        Message::Pages(pages) => pages,
        other => panic!("{other:?}"),
    }
}

fn push(writer: &mut PagesWriter, page: u64, bytes: &[u8; PAGE_SIZE]) {
    let page = PageIndex(page);
    writer.push_raw_or_lz4(page, bytes, page_checksum(LAYER, page, bytes)).unwrap();
}

/// A page that does not pack.
fn noise(seed: u64) -> [u8; PAGE_SIZE] {
    let mut state = seed ^ 0x9E37_79B9_7F4A_7C15;
    std::array::from_fn(|_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    })
}

#[test]
fn the_layout_of_a_frame_is_fixed() {
    let frame = encode(
        0x0403_0201,
        Message::GetPages { handle: 7, start: PageIndex(0x1122), count: 64, priority: Priority::Prefetch },
    );
    let expected = [
        b'R', b'P', b'G', b'E', 1, 5, 0, 0, 15, 0, 0, 0, 1, 2, 3, 4, // header
        7, 0, 0, 0, 0x22, 0x11, 0, 0, 0, 0, 0, 0, 64, 0, 1, // payload
    ];
    assert_eq!(frame, expected);
}

#[test]
fn a_pages_frame_keeps_neighbouring_raw_pages_side_by_side() {
    let mut writer = PagesWriter::new();
    writer.start(3, 8);
    let (a, b, c) = (noise(1), noise(2), noise(3));
    push(&mut writer, 10, &a);
    push(&mut writer, 11, &b);
    push(&mut writer, 13, &c);
    push(&mut writer, 14, &[0; PAGE_SIZE]);
    push(&mut writer, 15, &[0; PAGE_SIZE]);
    writer.push_absent(PageIndex(16)).unwrap();
    let frame = writer.finish(true).to_vec();
    let pages = pages_of(&frame);
    assert_eq!((pages.handle, pages.last, pages.len()), (8, true, 6));
    let runs: Vec<_> = pages.runs().map(|r| (r.pages.start.0, r.pages.len, r.encoding, r.data.to_vec())).collect();
    use Encoding::{Absent, Raw, Zero};
    let raw = [a, b].concat();
    assert_eq!(runs, [(10, 2, Raw, raw), (13, 1, Raw, c.to_vec()), (14, 2, Zero, vec![]), (16, 1, Absent, vec![])]);
    let verdicts: Vec<_> = pages.runs().map(|r| r.verify(LAYER)).collect();
    let absent = WireError::Absent { layer: LAYER, page: PageIndex(16) };
    assert_eq!(verdicts, [Ok(()), Ok(()), Ok(()), Err(absent)]);
}

#[test]
fn a_corrupted_page_is_detected_in_every_encoding() {
    let mut text = [b'x'; PAGE_SIZE];
    text[1000] = b'y';
    for (bytes, encoding) in [(noise(5), Encoding::Raw), (text, Encoding::Lz4)] {
        let mut writer = PagesWriter::new();
        push(&mut writer, 20, &bytes);
        let good = writer.finish(true).to_vec();
        let len = pages_of(&good).iter().next().unwrap().data.len();
        let (mut out, mut detected) = ([0; PAGE_SIZE], 0);
        for at in 0..len {
            let mut bad = good.clone();
            bad[HEADER_LEN + PAGES_HEAD + at] ^= 0x10;
            let entry = pages_of(&bad).iter().next().unwrap();
            assert_eq!(entry.encoding, encoding);
            match entry.decompress_into(LAYER, &mut out) {
                // In a packed page a match may be found at several places: then nothing is wrong with the page.
                Ok(()) => assert!(encoding == Encoding::Lz4 && out == bytes, "byte {at}"),
                Err(error) => {
                    assert!(error.to_string().contains("Page 20"), "{error}");
                    detected += 1;
                }
            }
        }
        assert!(detected > len / 2, "{detected} of {len}");
    }
}

#[test]
fn a_zero_page_that_should_not_be_one_is_detected() {
    let mut writer = PagesWriter::new();
    writer.push_zero(PageIndex(4), page_checksum(LAYER, PageIndex(4), &noise(1))).unwrap();
    let frame = writer.finish(true).to_vec();
    let entry = pages_of(&frame).iter().next().unwrap();
    assert!(matches!(entry.decompress_into(LAYER, &mut [0; PAGE_SIZE]), Err(WireError::Checksum { .. })));
    assert!(pages_of(&frame).runs().next().unwrap().verify(LAYER).is_err());
}

#[test]
fn a_page_at_another_index_or_of_another_layer_is_detected() {
    let mut writer = PagesWriter::new();
    push(&mut writer, 20, &noise(6));
    let mut frame = writer.finish(true).to_vec();
    let mut out = [0; PAGE_SIZE];
    let entry = pages_of(&frame).iter().next().unwrap();
    assert_eq!(entry.decompress_into(LAYER, &mut out), Ok(()));
    let other = LayerId::from_u128(0xfeee);
    assert!(matches!(entry.decompress_into(other, &mut out), Err(WireError::Checksum { .. })));
    let table = HEADER_LEN + PAGES_HEAD + PAGE_SIZE;
    frame[table] = 21;
    let moved = pages_of(&frame).iter().next().unwrap();
    assert_eq!(moved.page, PageIndex(21));
    assert!(matches!(moved.decompress_into(LAYER, &mut out), Err(WireError::Checksum { .. })));
}

#[test]
fn headers_that_are_none_are_refused_before_the_payload_comes() {
    let good = encode(1, Message::Ping { token: 5 });
    let with = |at: usize, value: u8| {
        let mut bad = good[..HEADER_LEN].to_vec();
        bad[at] = value;
        Frame::decode(&bad).unwrap_err()
    };
    assert!(matches!(with(0, b'G'), WireError::Magic { .. }));
    assert_eq!(with(4, 2), WireError::Version { found: 2 });
    assert_eq!(with(5, 77), WireError::Kind { kind: 77 });
    assert!(matches!(with(6, 1), WireError::Malformed { message: "Ping", .. }));
    assert_eq!(with(11, 1), WireError::TooLong { len: (1 << 24) + 8 });
    let text = with(4, 2).to_string();
    assert!(text.contains("version 2") && text.contains("version 1") && text.contains("same ramet release"), "{text}");
}

#[test]
fn payloads_that_make_no_sense_are_refused() {
    let ask = |start, count| {
        encode(1, Message::GetPages { handle: 1, start: PageIndex(start), count, priority: Priority::Demand })
    };
    assert!(Frame::decode(&ask(0, 512)).is_ok());
    for (start, count) in [(0, 0), (0, 513), (u64::MAX, 1), (1 << 40, 1)] {
        assert!(Frame::decode(&ask(start, count)).is_err(), "{start} {count}");
    }
    let mut long = encode(1, Message::Pong { token: 1 });
    long.push(0);
    long[8] += 1;
    assert!(matches!(Frame::decode(&long), Err(WireError::Malformed { message: "Pong", .. })));
    let mut text = encode(1, Message::HelloAck { version: 1, host: "h1" });
    *text.last_mut().unwrap() = 0xff;
    assert!(matches!(Frame::decode(&text), Err(WireError::Malformed { message: "HelloAck", .. })));

    let mut writer = PagesWriter::new();
    push(&mut writer, 1, &noise(1));
    let good = writer.finish(true).to_vec();
    let table = HEADER_LEN + PAGES_HEAD + PAGE_SIZE;
    for (at, value) in [(table + 16, 1), (table + 18, 1), (table + 18, 9), (table + 7, 1), (HEADER_LEN + 4, 2)] {
        let mut bad = good.clone();
        bad[at] = value;
        assert!(matches!(Frame::decode(&bad), Err(WireError::Malformed { message: "Pages", .. })), "{at} {value}");
    }
}

#[test]
fn long_texts_are_cut_at_a_character() {
    let long = "\u{e9}".repeat(200);
    let frame = encode(1, Message::Error { code: ErrorCode::Busy, message: &long });
    let Message::Error { message, .. } = Frame::decode(&frame).unwrap().unwrap().0.message else { panic!() };
    assert_eq!(message, "\u{e9}".repeat(127));
}

/// A frame that is not a Pages frame. The text may be used or not.
fn any_message(text: &str) -> impl Strategy<Value = Message<'_>> {
    let code = prop::sample::select(&[ErrorCode::Version, ErrorCode::Layer, ErrorCode::Damaged][..]);
    let status = prop::sample::select(&[LayerStatus::Ok, LayerStatus::Unknown, LayerStatus::TooMany][..]);
    let priority = prop::sample::select(&[Priority::Demand, Priority::Prefetch][..]);
    prop_oneof![
        any::<(u128, u8)>().prop_map(move |(family, version)| Message::Hello {
            family: FamilyId::from_u128(family),
            version,
            host: text
        }),
        any::<u8>().prop_map(move |version| Message::HelloAck { version, host: text }),
        any::<(u32, u128)>()
            .prop_map(|(handle, layer)| Message::OpenLayer { handle, layer: LayerId::from_u128(layer) }),
        (any::<u32>(), status).prop_map(|(handle, status)| Message::LayerOpened { handle, status }),
        (any::<u32>(), 0u64..1 << 30, 1u16..=512, priority).prop_map(|(handle, start, count, priority)| {
            Message::GetPages { handle, start: PageIndex(start), count, priority }
        }),
        code.prop_map(move |code| Message::Error { code, message: text }),
        any::<u64>().prop_map(|token| Message::Ping { token }),
        any::<u64>().prop_map(|token| Message::Pong { token }),
    ]
}

/// A Pages frame of a few pages of all kinds.
fn any_pages() -> impl Strategy<Value = Vec<u8>> {
    let page = (0u64..1 << 20, 0u8..4, any::<u64>());
    (any::<(u32, u32, bool)>(), prop::collection::vec(page, 0..6)).prop_map(|((req, handle, last), entries)| {
        let mut writer = PagesWriter::new();
        writer.start(req, handle);
        for (page, kind, seed) in entries {
            match kind {
                0 => push(&mut writer, page, &[0; PAGE_SIZE]),
                1 => push(&mut writer, page, &[seed as u8 | 1; PAGE_SIZE]),
                2 => push(&mut writer, page, &noise(seed)),
                _ => writer.push_absent(PageIndex(page)).unwrap(),
            }
        }
        writer.finish(last).to_vec()
    })
}

fn any_frames() -> impl Strategy<Value = Vec<u8>> {
    let message = any_message("host-1").prop_map(|m| encode(9, m));
    prop::collection::vec(prop_oneof![3 => message, 1 => any_pages()], 1..4).prop_map(|frames| frames.concat())
}

proptest! {
    #[test]
    fn messages_round_trip(message in any_message("h\u{fc}"), req in any::<u32>()) {
        let bytes = encode(req, message);
        prop_assert_eq!(Frame::decode(&bytes), Ok(Some((Frame { req, message }, bytes.len()))));
    }

    #[test]
    fn streams_of_frames_are_decoded_to_the_end(bytes in any_frames()) {
        fuzzing::frame(&bytes);
        let mut rest = &bytes[..];
        while let Some((_, len)) = Frame::decode(rest).unwrap() {
            rest = &rest[len..];
        }
        prop_assert!(rest.is_empty());
    }

    #[test]
    fn changed_frames_break_no_promise(
        bytes in any_frames(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = bytes;
        for (at, value) in changes {
            // Most changes go to the headers and tables, which a page's bytes would otherwise hide.
            let at = at.index(bytes.len());
            let at = if value & 1 == 0 { at } else { at % 64 };
            let len = bytes.len();
            bytes[at % len] = value;
        }
        fuzzing::frame(&bytes);
        fuzzing::frame(&bytes[..cut.index(bytes.len())]);
    }

    #[test]
    fn arbitrary_bytes_break_no_promise(kind in any::<u8>(), data in prop::collection::vec(any::<u8>(), 0..300)) {
        fuzzing::frame(&data);
        let len = (data.len() as u32).to_le_bytes();
        fuzzing::frame(&[&b"RPGE\x01"[..], &[kind % 10, 0, 0], &len, &[0; 4], &data].concat());
    }

    #[test]
    fn pages_arrive_as_they_left(
        pages in prop::collection::vec((0u64..1 << 20, 0u8..3, any::<u64>()), 1..40),
        fast in any::<bool>(),
    ) {
        let mut writer = PagesWriter::new();
        writer.set_link_speed(fast.then_some(u64::MAX));
        let sent: Vec<(u64, [u8; PAGE_SIZE])> = pages.iter().map(|&(page, kind, seed)| (page, match kind {
            0 => [0; PAGE_SIZE],
            1 => [seed as u8; PAGE_SIZE],
            _ => noise(seed),
        })).collect();
        for (page, bytes) in &sent {
            push(&mut writer, *page, bytes);
        }
        let frame = writer.finish(true).to_vec();
        let mut out = [0; PAGE_SIZE];
        let got = pages_of(&frame);
        prop_assert_eq!(got.len(), sent.len());
        for (entry, (page, bytes)) in got.iter().zip(&sent) {
            prop_assert_eq!(entry.decompress_into(LAYER, &mut out), Ok(()));
            prop_assert_eq!((entry.page.0, &out), (*page, bytes));
        }
    }
}
