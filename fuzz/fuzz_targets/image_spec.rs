//! Descriptions of images.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ramet_memory::image::fuzz_spec(data));
