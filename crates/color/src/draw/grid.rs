//! A map's pages as cells in rows.

use ramet_memory::{PageCount, PageIndex, PageSet};

use crate::{Color, ColorMap};

/// Pixels of a cell's side, and cells to a row. A row is a power of two of pages, so rows begin at round addresses.
const SHAPES: [(u32, u32); 10] =
    [(32, 32), (24, 64), (16, 64), (12, 128), (8, 128), (6, 256), (4, 256), (3, 512), (2, 512), (1, 1024)];
/// The most pixels that the cells of a map take from top to bottom.
const MOST_HEIGHT: u64 = 1024;
/// The most cells: those of the last shape.
const MOST_CELLS: u64 = 1024 * MOST_HEIGHT;

/// The cells of a picture.
pub(super) struct Grid {
    /// Pixels of a cell's side.
    pub(super) side: u32,
    /// Cells to a row.
    pub(super) columns: u32,
    /// Pages to a cell.
    pub(super) pages_per_cell: u64,
    /// Cells row by row; none where no page is to be drawn.
    pub(super) cells: Vec<Option<Color>>,
}

impl Grid {
    /// The cells of a map, or of those of its pages that are in `only`: the largest that leave the picture wide rather
    /// than tall.
    pub(super) fn of(map: &ColorMap, only: Option<&PageSet>) -> Self {
        let pages_per_cell = map.pages().0.div_ceil(MOST_CELLS).max(1).next_power_of_two();
        let count = map.pages().0.div_ceil(pages_per_cell);
        let fits = |&(side, columns): &(u32, u32)| count.div_ceil(columns.into()) * u64::from(side) <= MOST_HEIGHT;
        let (side, columns) = SHAPES.into_iter().find(fits).unwrap_or((1, 1024));
        Self { side, columns, pages_per_cell, cells: cells(map, only, pages_per_cell) }
    }

    pub(super) fn rows(&self) -> u32 {
        self.cells.len().div_ceil(self.columns as usize) as u32
    }

    /// Pixels from left to right.
    pub(super) fn width(&self) -> u32 {
        self.columns * self.side
    }

    /// Pixels from top to bottom.
    pub(super) fn height(&self) -> u32 {
        self.rows() * self.side
    }

    /// Pages to a row.
    pub(super) fn row(&self) -> PageCount {
        PageCount(u64::from(self.columns) * self.pages_per_cell)
    }

    /// Cells of one color next to each other in a row, by row and then column.
    pub(super) fn runs(&self) -> impl Iterator<Item = Run> + '_ {
        let rows = self.cells.chunks(self.columns as usize).zip(0..);
        rows.flat_map(|(cells, row)| {
            let mut column = 0;
            cells.chunk_by(|a, b| a == b).filter_map(move |same| {
                let run = Run { color: same[0], row, column, cells: same.len() as u32 };
                column += run.cells;
                run.color.is_some().then_some(run)
            })
        })
    }
}

/// Cells of one color next to each other.
pub(super) struct Run {
    pub(super) color: Option<Color>,
    pub(super) row: u32,
    pub(super) column: u32,
    pub(super) cells: u32,
}

fn cells(map: &ColorMap, only: Option<&PageSet>, pages_per_cell: u64) -> Vec<Option<Color>> {
    let shown = |(&color, page): (&Color, u64)| only.is_none_or(|set| set.contains(PageIndex(page))).then_some(color);
    let chunks = map.colors().chunks(usize::try_from(pages_per_cell).unwrap_or(usize::MAX));
    chunks
        .zip((0..).step_by(usize::try_from(pages_per_cell).unwrap_or(usize::MAX)))
        .map(|(colors, first)| most_frequent(colors.iter().zip(first..).filter_map(shown)))
        .collect()
}

/// The most frequent color; of several the one with the lowest number.
fn most_frequent(colors: impl Iterator<Item = Color>) -> Option<Color> {
    let mut counts = [0u64; Color::ALL.len()];
    for color in colors {
        counts[color as usize] += 1;
    }
    let most = counts.into_iter().max().filter(|&most| most > 0)?;
    Color::ALL.into_iter().find(|&color| counts[color as usize] == most)
}
