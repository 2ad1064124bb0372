//! Descriptors of checkpoints. The checksum is made right first: a fuzzer would never get behind it.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    ramet_wire::fuzzing::descriptor(data);
    ramet_wire::fuzzing::resealed_descriptor(data);
});
