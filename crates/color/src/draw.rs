//! A color map as a picture, as in Kaleidoscope's Figure 3: pages from left to right, in rows that go on one below the
//! other.
//!
//! Every cell is one page of up to a million pages (4 GiB). Of larger guests a cell stands for several consecutive pages
//! and has the color that most of them have, of several colors the one with the lower number: areas stay true, single
//! pages are lost. The legend always counts pages. The axis on the left tells where in RAM a row begins; that is not the
//! guest-physical address for memory above the PCI hole.
//!
//! Colors are those of the paper's legend, page cache in yellow, data of users and the kernel in light and dark blue,
//! their code in light and dark red, and free pages in black; what is told apart further has shades of its own.

mod canvas;
mod grid;
mod png;
mod scene;
mod svg;
#[cfg(test)]
mod tests;

use ramet_memory::PageSet;

pub use self::png::PngError;
use self::scene::Scene;
use crate::{Color, ColorMap};

/// What to draw besides the map.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options<'a> {
    /// The line at the top: what this is a map of. Cut where the picture ends.
    pub title: &'a str,
    /// Draw only these pages, on a light background: what differs from another checkpoint. Pages outside the map are
    /// passed over. Of a cell for several pages, only those in the set count.
    pub changed: Option<&'a PageSet>,
}

/// The picture as an SVG.
///
/// At most 1600 by 1250 pixels at its natural size. Never larger than about 16 bytes a cell, of which there are at most
/// a million; usually much smaller, since neighbors of one color are drawn as one.
#[must_use]
pub fn svg(map: &ColorMap, options: &Options<'_>) -> String {
    svg::write(&Scene::of(map, options))
}

/// The picture as a PNG with a palette.
///
/// At most 1600 by 1250 pixels. Characters of the title beyond Latin-1 are drawn as question marks.
///
/// # Errors
/// The picture could not be encoded, which only a lack of memory explains.
pub fn png(map: &ColorMap, options: &Options<'_>) -> Result<Vec<u8>, PngError> {
    png::write(&Scene::of(map, options))
}

/// What a picture is painted in: an index of its palette.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Ink(u8);

impl Ink {
    const PAPER: Self = Self(11);
    /// Pages that did not change.
    const LIGHT: Self = Self(12);
    const TEXT: Self = Self(13);
    /// Frames and ticks.
    const RULE: Self = Self(14);

    const fn of(color: Color) -> Self {
        Self(color as u8)
    }

    /// Its red, green and blue.
    fn rgb(self) -> [u8; 3] {
        PALETTE.get(usize::from(self.0)).copied().unwrap_or_default()
    }
}

/// Red, green and blue of every color by its number, then of the other inks.
const PALETTE: [[u8; 3]; 15] = [
    [0x9a, 0x9a, 0x9a],
    [0xa0, 0x12, 0x12],
    [0x27, 0x5b, 0xd6],
    [0x6d, 0x3f, 0xb8],
    [0x12, 0x86, 0x96],
    [0x1a, 0x37, 0x8c],
    [0xff, 0x7d, 0x7d],
    [0x86, 0xc5, 0xfa],
    [0xf2, 0x9f, 0x05],
    [0xff, 0xe1, 0x4d],
    [0x00, 0x00, 0x00],
    [0xff, 0xff, 0xff],
    [0xee, 0xee, 0xe8],
    [0x20, 0x20, 0x20],
    [0x70, 0x70, 0x70],
];

/// The red, green and blue that a color is drawn in.
#[must_use]
pub fn rgb(color: Color) -> [u8; 3] {
    Ink::of(color).rgb()
}
