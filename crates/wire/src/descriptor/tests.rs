use super::*;
use crate::fuzzing;
use proptest::prelude::*;
use ramet_memory::{ByteSize, LayerId, LayerSpec, PageIndex, PageRun, PageSet};

fn sample() -> Descriptor {
    Descriptor {
        checkpoint: ImageId::from_u128(1),
        family: FamilyId::from_u128(2),
        parent_vm: VmId::from_u128(3),
        generation: 4,
        depth: 5,
        spec_json: b"{\"machine\":\"pc\"}".to_vec(),
        guest_kind: "linux".into(),
        name_hint: "web \"\u{fc}\" \u{0}".into(),
        device_state: firmware_like(370_000),
        memory: memory_of(1024, 1),
        colors: (0..=255).collect(),
        page_source: Some(PageSource { addr: "10.77.0.1:40000".into(), name: "h1".into() }),
    }
}

/// Half noise, half zeros: about as compressible as ROMs.
fn firmware_like(len: usize) -> Vec<u8> {
    let mut state = 1u64;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    };
    (0..len).map(|n| if n / 4096 % 2 == 0 { next() } else { 0 }).collect()
}

/// Every second page is owned: the worst case for the run form.
fn memory_of(mib: u64, image: u128) -> Vec<u8> {
    let memory = ByteSize::mib(mib);
    let mut owned = PageSet::new(memory.pages());
    for page in (0..memory.pages().0).step_by(2) {
        owned.insert_run(PageRun { start: PageIndex(page), len: 1 });
    }
    let layers = vec![LayerSpec { id: LayerId::from_u128(9), owned }];
    ImageSpec { image: ImageId::from_u128(image), memory, layers }.encode()
}

#[test]
fn it_round_trips() {
    let with = sample();
    assert_eq!(Descriptor::decode(&with.encode().unwrap()), Ok(with.clone()));
    let without = Descriptor {
        page_source: None,
        device_state: vec![],
        spec_json: vec![],
        memory: vec![],
        colors: vec![],
        ..with
    };
    assert_eq!(Descriptor::decode(&without.encode().unwrap()), Ok(without.clone()));
}

#[test]
fn a_gigabyte_guest_fits_the_budget() {
    // 256 KB and one bit for each of the 262,144 pages.
    let encoded = sample().encode().unwrap();
    assert!(encoded.len() <= (256 << 10) + (262_144 / 8), "{} bytes", encoded.len());
}

#[test]
fn another_version_is_refused_by_name() {
    let mut bytes = sample().encode().unwrap();
    bytes[4] = 9;
    let error = Descriptor::decode(&bytes).unwrap_err();
    assert_eq!(error, DescriptorError::Version { found: 9 });
    let text = error.to_string();
    assert!(text.contains("version 9") && text.contains("version 2") && text.contains("same ramet release"), "{text}");
    // Even if that version is laid out otherwise.
    assert_eq!(Descriptor::decode(b"RDSC\x03\0").unwrap_err(), DescriptorError::Version { found: 3 });
}

#[test]
fn other_bytes_are_told_from_damaged_ones() {
    assert_eq!(Descriptor::decode(b"{\"json\": 1}"), Err(DescriptorError::Magic));
    assert_eq!(Descriptor::decode(b""), Err(DescriptorError::Length { have: 0, want: HEADER }));
    let good = sample().encode().unwrap();
    assert_eq!(Descriptor::decode(&good[..1000]), Err(DescriptorError::Length { have: 1000, want: good.len() }));
    let mut bad = good;
    let last = bad.len() - 1;
    bad[last] ^= 1;
    assert_eq!(Descriptor::decode(&bad), Err(DescriptorError::Checksum));
}

#[test]
fn contents_beyond_the_limits_are_named() {
    let long = Descriptor { name_hint: "x".repeat(256), ..sample() };
    assert_eq!(long.encode(), Err(DescriptorError::TooLarge { section: "name", len: 256, limit: 255 }));
    let large = Descriptor { spec_json: vec![b' '; (256 << 10) + 1], ..sample() };
    assert!(large.encode().unwrap_err().to_string().contains("machine is too large"));
}

#[test]
fn a_packed_section_that_claims_too_much_is_refused_before_memory_is_taken() {
    let mut bytes = sample().encode().unwrap();
    let claim = HEADER + DEVICES * TABLE_ENTRY + 8;
    for (len, expected) in [(u32::MAX, "too large"), (64 << 20, "lengths do not fit"), (400_000, "unpacks to less")] {
        bytes[claim..claim + 4].copy_from_slice(&len.to_le_bytes());
        reseal(&mut bytes);
        let text = Descriptor::decode(&bytes).unwrap_err().to_string();
        assert!(text.contains("device state") && text.contains(expected), "{len}: {text}");
    }
}

#[test]
fn the_memory_section_must_be_the_checkpoints_own() {
    let good = sample();
    assert_eq!(good.image_spec().unwrap().memory, ByteSize::mib(1024));
    let other = Descriptor { memory: memory_of(8, 77), ..sample() };
    assert!(matches!(other.image_spec(), Err(DescriptorError::OtherImage { .. })));
    let none = Descriptor { memory: b"RIMG".to_vec(), ..sample() };
    assert!(matches!(none.image_spec(), Err(DescriptorError::Memory(_))));
}

fn any_descriptor() -> impl Strategy<Value = Descriptor> {
    let bytes = || prop::collection::vec(prop_oneof![Just(0u8), any::<u8>()], 0..600);
    let source = prop::option::of((".{0,40}", "[a-z0-9.-]{0,40}").prop_map(|(addr, name)| PageSource { addr, name }));
    (any::<(u128, u128, u128, u32, u32)>(), bytes(), bytes(), (bytes(), bytes()), ".{0,40}", ".{0,40}", source)
        .prop_map(|(ids, spec_json, device_state, (memory, colors), guest_kind, name_hint, page_source)| Descriptor {
            checkpoint: ImageId::from_u128(ids.0),
            family: FamilyId::from_u128(ids.1),
            parent_vm: VmId::from_u128(ids.2),
            generation: ids.3,
            depth: ids.4,
            spec_json,
            guest_kind,
            name_hint,
            device_state,
            memory,
            colors,
            page_source,
        })
}

proptest! {
    #[test]
    fn every_descriptor_round_trips(descriptor in any_descriptor()) {
        let encoded = descriptor.encode().unwrap();
        prop_assert_eq!(Descriptor::decode(&encoded), Ok(descriptor));
        fuzzing::descriptor(&encoded);
    }

    #[test]
    fn every_flipped_bit_is_noticed(descriptor in any_descriptor(), at in any::<prop::sample::Index>(), bit in 0u8..8) {
        let mut bytes = descriptor.encode().unwrap();
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        prop_assert!(Descriptor::decode(&bytes).is_err(), "byte {at}");
    }

    /// Behind a right checksum too, changed bytes break no promise.
    #[test]
    fn resealed_damage_breaks_no_promise(
        descriptor in any_descriptor(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
    ) {
        let mut bytes = descriptor.encode().unwrap();
        for (at, value) in changes {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        fuzzing::descriptor(&bytes);
        fuzzing::resealed_descriptor(&bytes);
    }

    #[test]
    fn arbitrary_bytes_break_no_promise(data in prop::collection::vec(any::<u8>(), 0..400)) {
        fuzzing::descriptor(&data);
        fuzzing::resealed_descriptor(&[&b"RDSC\x01\0\x04\0"[..], &[0; 16], &data].concat());
    }
}
