//! Where pages of the page file stand in the guest's physical address space.

use crate::{ByteSize, Gpa, PageIndex};

/// The guest-physical layout of a PC's RAM: one block, split around the PCI hole below 4 GiB.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct MemoryLayout {
    size: u64,
    below_4g: u64,
}

const FOUR_GIB: u64 = 4 << 30;

impl MemoryLayout {
    /// The layout of QEMU's `pc` machines: RAM of 3.5 GiB and more keeps 3 GiB below the hole (`pc_init1`, "gigabyte
    /// align"), smaller RAM lies below it whole.
    #[must_use]
    pub const fn pc(size: ByteSize) -> Self {
        let size = size.bytes();
        let below_4g = if size >= 0xe000_0000 { 0xc000_0000 } else { size };
        Self { size, below_4g }
    }

    /// The guest-physical address of a page; `None` outside RAM.
    #[must_use]
    pub const fn gpa(self, page: PageIndex) -> Option<Gpa> {
        let offset = page.offset();
        if offset >= self.size {
            None
        } else if offset < self.below_4g {
            Some(Gpa(offset))
        } else {
            Some(Gpa(FOUR_GIB + offset - self.below_4g))
        }
    }

    /// The page at a guest-physical address; `None` where there is no RAM (the hole, beyond the end).
    #[must_use]
    pub const fn page(self, gpa: Gpa) -> Option<PageIndex> {
        if gpa.0 < self.below_4g {
            Some(PageIndex::of_offset(gpa.0))
        } else if gpa.0 >= FOUR_GIB && gpa.0 - FOUR_GIB < self.size - self.below_4g {
            Some(PageIndex::of_offset(gpa.0 - FOUR_GIB + self.below_4g))
        } else {
            None
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn ram_above_the_hole_moves_to_4g() {
        let layout = MemoryLayout::pc(ByteSize(4 << 30));
        assert_eq!(layout.gpa(PageIndex(0xc0000)), Some(Gpa(FOUR_GIB)));
        assert_eq!(layout.page(Gpa(0xd000_0000)), None);
        assert_eq!(layout.gpa(PageIndex(0x100000)), None);
    }

    proptest! {
        #[test]
        fn gpa_and_page_are_inverse(size_mib in 1u64..16384, page in 0u64..(5 << 20)) {
            let layout = MemoryLayout::pc(ByteSize::mib(size_mib));
            match layout.gpa(PageIndex(page)) {
                Some(gpa) => prop_assert_eq!(layout.page(gpa), Some(PageIndex(page))),
                None => prop_assert!(page * 4096 >= size_mib << 20),
            }
        }
    }
}
