//! What stands where in a picture, whatever the picture is written as.

use ramet_memory::{PageCount, PageIndex};

use super::grid::Grid;
use super::{Ink, Options};
use crate::{Color, ColorMap};

const MARGIN: u32 = 10;
/// Left of the cells, for where rows begin.
const AXIS: u32 = 44;
/// Pixels between two ticks of the axis, at least.
const TICKS_APART: u32 = 48;
const TITLE_TOP: u32 = 12;
const NOTE_TOP: u32 = 37;
const GRID_TOP: u32 = 60;
/// A legend's entry: a swatch, a name, and two numbers that end at these places.
const ENTRY_WIDTH: u32 = 448;
const ENTRY_HEIGHT: u32 = 20;
const NAME_AT: u32 = 22;
const PAGES_END: u32 = 332;
const SIZE_END: u32 = 418;
const SWATCH: u32 = 13;

/// A picture: rectangles in order, cells over them, texts over those.
pub(super) struct Scene {
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) rects: Vec<Rect>,
    pub(super) texts: Vec<Text>,
    pub(super) grid: Grid,
    /// The upper left corner of the cells.
    pub(super) origin: (u32, u32),
}

/// A filled rectangle.
#[derive(Clone, Copy)]
pub(super) struct Rect {
    pub(super) x: u32,
    pub(super) y: u32,
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) ink: Ink,
}

/// One line of text.
pub(super) struct Text {
    /// Where it begins, or ends.
    pub(super) x: u32,
    /// Its upper edge.
    pub(super) y: u32,
    pub(super) size: Size,
    pub(super) side: Side,
    pub(super) text: String,
}

/// The size of a text.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Size {
    /// 10 by 20 pixels a character.
    Title,
    /// 7 by 13 pixels a character.
    Small,
}

/// Where a text's place is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Begin,
    End,
}

impl Size {
    pub(super) const fn char_width(self) -> u32 {
        match self {
            Self::Title => 10,
            Self::Small => 7,
        }
    }
}

impl Scene {
    pub(super) fn of(map: &ColorMap, options: &Options<'_>) -> Self {
        let grid = Grid::of(map, options.changed);
        let width = MARGIN + AXIS + grid.width() + MARGIN;
        let origin = (MARGIN + AXIS, GRID_TOP);
        let mut scene = Self { width, height: 0, rects: Vec::new(), texts: Vec::new(), grid, origin };
        let counts = counts(map, options);
        let shown = PageCount(counts.iter().sum());
        scene.text(MARGIN, TITLE_TOP, Size::Title, Side::Begin, options.title);
        let note = note(&scene.grid, map.pages(), options.changed.is_some().then_some(shown));
        scene.text(MARGIN, NOTE_TOP, Size::Small, Side::Begin, &note);
        let background = if options.changed.is_some() { Ink::LIGHT } else { Ink::PAPER };
        scene.frame(background);
        scene.axis();
        let mut entries = entries(&counts);
        if options.changed.is_some() {
            entries.push((Ink::LIGHT, "unchanged", PageCount(map.pages().0.saturating_sub(shown.0))));
        }
        scene.legend(&entries);
        scene
    }

    fn rect(&mut self, x: u32, y: u32, width: u32, height: u32, ink: Ink) {
        self.rects.push(Rect { x, y, width, height, ink });
    }

    /// A text, cut where the picture ends, with spaces for what cannot be drawn.
    fn text(&mut self, x: u32, y: u32, size: Size, side: Side, text: &str) {
        let room = (self.width - MARGIN).saturating_sub(if side == Side::Begin { x } else { 0 }) / size.char_width();
        self.texts.push(Text { x, y, size, side, text: clean(text, room as usize) });
    }

    /// The cells' frame and background.
    fn frame(&mut self, background: Ink) {
        let ((x, y), width, height) = (self.origin, self.grid.width(), self.grid.height());
        if height > 0 {
            self.rect(x - 1, y - 1, width + 2, height + 2, Ink::RULE);
            self.rect(x, y, width, height, background);
        }
    }

    /// Where in RAM rows begin.
    fn axis(&mut self) {
        let (x, y) = self.origin;
        let step = TICKS_APART.div_ceil(self.grid.side).next_power_of_two();
        let row = self.grid.row().size().bytes();
        let (unit, name) = unit(row.saturating_mul(step.into()));
        for at in (0..self.grid.rows()).step_by(step as usize) {
            let tick = y + at * self.grid.side;
            self.rect(x - 6, tick, 5, 1, Ink::RULE);
            let label = if at == 0 { "0".to_owned() } else { format!("{}{name}", row * u64::from(at) / unit) };
            self.text(x - 9, tick - 6, Size::Small, Side::End, &label);
        }
    }

    /// Names and numbers of what the picture shows, in columns; the picture ends below them.
    fn legend(&mut self, entries: &[(Ink, &str, PageCount)]) {
        let columns = (self.grid.width() / ENTRY_WIDTH).max(1);
        let rows = (entries.len() as u32).div_ceil(columns);
        let top = self.origin.1 + self.grid.height() + 18;
        for (&(ink, name, pages), number) in entries.iter().zip(0..) {
            let (x, y) = (self.origin.0 + number / rows * ENTRY_WIDTH, top + number % rows * ENTRY_HEIGHT);
            self.rect(x, y, SWATCH, SWATCH, Ink::RULE);
            self.rect(x + 1, y + 1, SWATCH - 2, SWATCH - 2, ink);
            self.text(x + NAME_AT, y, Size::Small, Side::Begin, name);
            self.text(x + PAGES_END, y, Size::Small, Side::End, &counted(pages));
            self.text(x + SIZE_END, y, Size::Small, Side::End, &megabytes(pages));
        }
        self.height = top + rows * ENTRY_HEIGHT + MARGIN;
    }
}

/// The legend's entries for the colors: unknown pages last.
fn entries(counts: &[u64; Color::ALL.len()]) -> Vec<(Ink, &'static str, PageCount)> {
    let known = Color::ALL.into_iter().filter(|&color| color != Color::Unknown);
    known
        .chain([Color::Unknown])
        .map(|color| (Ink::of(color), color.name(), PageCount(counts[color as usize])))
        .collect()
}

/// How many pages of each color are to be shown.
fn counts(map: &ColorMap, options: &Options<'_>) -> [u64; Color::ALL.len()] {
    let mut counts = [0; Color::ALL.len()];
    for (&color, page) in map.colors().iter().zip(0..) {
        if options.changed.is_none_or(|set| set.contains(PageIndex(page))) {
            counts[color as usize] += 1;
        }
    }
    counts
}

/// The line below the title: how to read the picture.
fn note(grid: &Grid, pages: PageCount, changed: Option<PageCount>) -> String {
    let what = match changed {
        Some(changed) => format!("{} of {} changed", changed.0, counted(pages)),
        None => counted(pages),
    };
    let cell = match grid.pages_per_cell {
        1 => "a cell is a page".to_owned(),
        many => format!("a cell is {many} pages, in the color of most of them"),
    };
    format!("{what}; {cell}; a row is {}", grid.row().size())
}

fn counted(pages: PageCount) -> String {
    format!("{} page{}", pages.0, if pages.0 == 1 { "" } else { "s" })
}

/// A number of pages in mebibytes, with one decimal: what is there at all is never shown as 0.
fn megabytes(pages: PageCount) -> String {
    let tenths = pages.0.saturating_mul(10).saturating_add(128) / 256;
    if tenths == 0 && pages.0 > 0 { "<0.1 MB".to_owned() } else { format!("{}.{} MB", tenths / 10, tenths % 10) }
}

/// The largest unit that divides `step`, a power of two.
fn unit(step: u64) -> (u64, &'static str) {
    match step {
        0x4000_0000.. => (1 << 30, "G"),
        0x10_0000.. => (1 << 20, "M"),
        _ => (1 << 10, "K"),
    }
}

/// At most `most` characters of a text, without any that XML does not know.
fn clean(text: &str, most: usize) -> String {
    let drawn = |c: char| if c.is_control() || matches!(c, '\u{fffe}' | '\u{ffff}') { ' ' } else { c };
    if text.chars().count() <= most {
        return text.chars().map(drawn).collect();
    }
    text.chars().map(drawn).take(most.saturating_sub(3)).chain("...".chars()).collect()
}
