//! Frames of the page protocol.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ramet_wire::fuzzing::frame(data));
