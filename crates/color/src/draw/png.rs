//! A picture as a PNG: 4 bits a pixel and a palette.

use png::{BitDepth, ColorType, Compression, Encoder, Filter};

use super::canvas::Canvas;
use super::scene::Scene;
use super::{Ink, PALETTE};

/// A picture that could not be encoded.
#[derive(Debug, thiserror::Error)]
#[error("cannot encode the picture as a PNG")]
pub struct PngError(#[from] png::EncodingError);

pub(super) fn write(scene: &Scene) -> Result<Vec<u8>, PngError> {
    let canvas = Canvas::of(scene);
    let mut file = Vec::new();
    let mut encoder = Encoder::new(&mut file, canvas.width, canvas.height);
    encoder.set_color(ColorType::Indexed);
    encoder.set_depth(BitDepth::Four);
    encoder.set_palette(PALETTE.as_flattened());
    encoder.set_compression(Compression::Balanced);
    // Filters make indices of a palette larger, not smaller; after the compression, since that sets a filter too.
    encoder.set_filter(Filter::NoFilter);
    let mut writer = encoder.write_header()?;
    let packed: Vec<u8> = canvas.rows().flat_map(|row| row.chunks(2).map(pack)).collect();
    writer.write_image_data(&packed)?;
    writer.finish()?;
    Ok(file)
}

/// Two pixels, or the last one of a row, in a byte.
fn pack(pixels: &[Ink]) -> u8 {
    let second = pixels.get(1).map_or(0, |ink| ink.0);
    pixels.first().map_or(0, |ink| ink.0) << 4 | second
}
