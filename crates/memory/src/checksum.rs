//! The checksum that every page carries from the copy out of its parent to the last host.

use crate::{LayerId, PageIndex};

/// Checksum of one page's bytes *at its place*: XXH3-64, seeded with the layer and the page index.
///
/// A page that is delivered intact but as another page, or for another layer, therefore fails the check too.
/// It guards against corruption, not against an attacker: peers are authenticated by mutual TLS.
#[must_use]
pub fn page_checksum(layer: LayerId, page: PageIndex, bytes: &[u8]) -> u64 {
    let id = layer.as_u128();
    let low = (id & u128::from(u64::MAX)) as u64;
    let high = (id >> 64) as u64;
    let seed = low ^ high.rotate_left(32) ^ page.0.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    xxhash_rust::xxh3::xxh3_64_with_seed(bytes, seed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn checksum_depends_on_bytes_place_and_layer() {
        let a = LayerId::from_u128(7);
        let b = LayerId::from_u128(7 << 64);
        let mut page = vec![5u8; 4096];
        let sum = page_checksum(a, PageIndex(1), &page);
        assert_ne!(sum, page_checksum(a, PageIndex(2), &page));
        assert_ne!(sum, page_checksum(b, PageIndex(1), &page));
        page[4095] ^= 1;
        assert_ne!(sum, page_checksum(a, PageIndex(1), &page));
    }
}
