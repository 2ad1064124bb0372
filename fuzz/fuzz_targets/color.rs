//! A small guest with bytes written over it.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| ramet_color::fuzz_color(data));
