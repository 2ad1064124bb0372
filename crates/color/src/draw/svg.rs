//! A picture as an SVG.

use std::fmt::Write as _;

use super::scene::{Scene, Side, Size, Text};
use super::{Ink, grid::Grid};
use crate::Color;

pub(super) fn write(scene: &Scene) -> String {
    let mut out = String::new();
    let (width, height) = (scene.width, scene.height);
    put(
        &mut out,
        format_args!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width}\" height=\"{height}\" \
             viewBox=\"0 0 {width} {height}\" font-family=\"monospace\" font-size=\"11\" fill=\"{}\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"{}\"/>\n",
            hex(Ink::TEXT),
            hex(Ink::PAPER)
        ),
    );
    for rect in &scene.rects {
        let (x, y, width, height) = (rect.x, rect.y, rect.width, rect.height);
        let fill = hex(rect.ink);
        let line = format_args!("<rect x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" fill=\"{fill}\"/>\n");
        put(&mut out, line);
    }
    cells(&mut out, scene);
    for line in &scene.texts {
        text(&mut out, line);
    }
    out.push_str("</svg>\n");
    out
}

/// Appends to a string, which cannot fail.
fn put(out: &mut String, text: std::fmt::Arguments<'_>) {
    let _ = out.write_fmt(text);
}

fn hex(ink: Ink) -> String {
    let [red, green, blue] = ink.rgb();
    format!("#{red:02x}{green:02x}{blue:02x}")
}

/// All cells, one path a color: a unit is a cell.
fn cells(out: &mut String, scene: &Scene) {
    let ((x, y), side) = (scene.origin, scene.grid.side);
    let group = format_args!(
        "<g transform=\"translate({x} {y}) scale({side})\" shape-rendering=\"crispEdges\" id=\"cells\">\n"
    );
    put(out, group);
    for color in Color::ALL {
        path(out, &scene.grid, color);
    }
    out.push_str("</g>\n");
}

/// The cells of one color: a rectangle for each run of them, its place told from the one before. Nothing when there are
/// none.
fn path(out: &mut String, grid: &Grid, color: Color) {
    let mut runs = grid.runs().filter(|run| run.color == Some(color)).peekable();
    if runs.peek().is_none() {
        return;
    }
    put(out, format_args!("<path fill=\"{}\" d=\"", hex(Ink::of(color))));
    let (mut column, mut row) = (0, 0);
    for run in runs {
        let (right, down) = (i64::from(run.column) - column, i64::from(run.row) - row);
        put(out, format_args!("m{right} {down}h{n}v1h-{n}z", n = run.cells));
        (column, row) = (run.column.into(), run.row.into());
    }
    out.push_str("\"/>\n");
}

fn text(out: &mut String, text: &Text) {
    let (x, baseline, style) = match text.size {
        Size::Title => (text.x, text.y + 15, " font-size=\"16\""),
        Size::Small => (text.x, text.y + 10, ""),
    };
    let anchor = if text.side == Side::End { " text-anchor=\"end\"" } else { "" };
    put(out, format_args!("<text x=\"{x}\" y=\"{baseline}\"{style}{anchor}>"));
    for c in text.text.chars() {
        match c {
            '<' => out.push_str("&lt;"),
            '>' => out.push_str("&gt;"),
            '&' => out.push_str("&amp;"),
            '"' => out.push_str("&quot;"),
            other => out.push(other),
        }
    }
    out.push_str("</text>\n");
}
