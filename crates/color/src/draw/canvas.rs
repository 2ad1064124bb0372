//! Pixels: one byte each, an index of the palette.

use std::convert::Infallible;

use embedded_graphics::{
    Drawable, Pixel,
    draw_target::DrawTarget,
    geometry::{OriginDimensions, Point, Size as Extent},
    mono_font::{
        MonoFont, MonoTextStyle,
        iso_8859_1::{FONT_7X13, FONT_10X20},
    },
    pixelcolor::PixelColor,
    text::{Alignment, Baseline, Text as Line, TextStyleBuilder},
};

use super::Ink;
use super::scene::{Rect, Scene, Side, Size, Text};

impl PixelColor for Ink {
    type Raw = ();
}

/// The pixels of a picture.
pub(super) struct Canvas {
    pub(super) width: u32,
    pub(super) height: u32,
    pixels: Vec<Ink>,
}

impl Canvas {
    /// The picture of a scene.
    pub(super) fn of(scene: &Scene) -> Self {
        let pixels = vec![Ink::PAPER; scene.width as usize * scene.height as usize];
        let mut canvas = Self { width: scene.width, height: scene.height, pixels };
        for &rect in &scene.rects {
            canvas.fill(rect);
        }
        canvas.cells(scene);
        for text in &scene.texts {
            let Ok(()) = canvas.write(text);
        }
        canvas
    }

    /// Rows of pixels, from top to bottom.
    pub(super) fn rows(&self) -> impl Iterator<Item = &[Ink]> {
        self.pixels.chunks_exact(self.width.max(1) as usize)
    }

    /// Fills a rectangle; what lies outside is left out.
    fn fill(&mut self, rect: Rect) {
        let (left, right) = (rect.x.min(self.width) as usize, (rect.x + rect.width).min(self.width) as usize);
        for y in rect.y.min(self.height)..(rect.y + rect.height).min(self.height) {
            let row = y as usize * self.width as usize;
            self.pixels[row + left..row + right].fill(rect.ink);
        }
    }

    fn cells(&mut self, scene: &Scene) {
        let (x, y, side) = (scene.origin.0, scene.origin.1, scene.grid.side);
        for run in scene.grid.runs() {
            self.fill(Rect {
                x: x + run.column * side,
                y: y + run.row * side,
                width: run.cells * side,
                height: side,
                ink: run.color.map_or(Ink::PAPER, Ink::of),
            });
        }
    }

    fn write(&mut self, text: &Text) -> Result<(), Infallible> {
        let style = MonoTextStyle::new(font(text.size), Ink::TEXT);
        let alignment = match text.side {
            Side::Begin => Alignment::Left,
            Side::End => Alignment::Right,
        };
        let place = TextStyleBuilder::new().alignment(alignment).baseline(Baseline::Top).build();
        let at = Point::new(text.x as i32, text.y as i32);
        Line::with_text_style(&text.text, at, style, place).draw(self).map(drop)
    }
}

fn font(size: Size) -> &'static MonoFont<'static> {
    match size {
        Size::Title => &FONT_10X20,
        Size::Small => &FONT_7X13,
    }
}

impl OriginDimensions for Canvas {
    fn size(&self) -> Extent {
        Extent::new(self.width, self.height)
    }
}

impl DrawTarget for Canvas {
    type Color = Ink;
    type Error = Infallible;

    fn draw_iter<I: IntoIterator<Item = Pixel<Ink>>>(&mut self, pixels: I) -> Result<(), Infallible> {
        for Pixel(point, ink) in pixels {
            let (Ok(x), Ok(y)) = (u32::try_from(point.x), u32::try_from(point.y)) else { continue };
            self.fill(Rect { x, y, width: 1, height: 1, ink });
        }
        Ok(())
    }
}
