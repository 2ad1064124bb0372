//! What a filled page holds, and the sum over pages. Also included by tests on the host.

/// 64-bit words in a page.
pub const WORDS: u64 = 512;

/// Word `index` of page `page` after `fill SEED`.
pub fn word(seed: u64, page: u64, index: u64) -> u64 {
    splitmix64(seed ^ page.wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ index)
}

fn splitmix64(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

/// The start of a sum.
pub const SUM: u64 = 0xcbf2_9ce4_8422_2325;

/// FNV-1a, a word at a time.
pub fn sum(before: u64, word: u64) -> u64 {
    (before ^ word).wrapping_mul(0x0000_0100_0000_01b3)
}
