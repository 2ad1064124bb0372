//! Color maps, and bodies of such behind a checksum that is right.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ramet_color::fuzz_map(data));
