//! Printing: tables, JSON, and quantities as people write them. A closed pipe ends the program quietly.

use std::{fmt, io::Write as _};

use anyhow::Result;
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

/// Whoever read our output has gone away.
#[derive(Debug)]
pub(crate) struct StdoutClosed;

impl fmt::Display for StdoutClosed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Standard output is closed")
    }
}

impl std::error::Error for StdoutClosed {}

/// How results are printed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Output {
    json: bool,
}

impl Output {
    pub(crate) fn new(json: bool) -> Self {
        Self { json }
    }

    /// Whether JSON is wanted.
    pub(crate) fn json(self) -> bool {
        self.json
    }

    /// The value as JSON when that is wanted, else what `text` makes of it.
    pub(crate) fn show<T: Serialize>(self, value: &T, text: impl FnOnce(&T) -> String) -> Result<()> {
        if self.json {
            return self.text(&serde_json::to_string_pretty(value)?);
        }
        self.text(&text(value))
    }

    /// A result; an empty one prints nothing.
    pub(crate) fn text(self, text: &str) -> Result<()> {
        if text.is_empty() {
            return Ok(());
        }
        let end = if text.ends_with('\n') { "" } else { "\n" };
        write(format!("{text}{end}").as_bytes())
    }
}

/// Writes bytes to standard output as they are.
pub(crate) fn write(bytes: &[u8]) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match out.write_all(bytes).and_then(|()| out.flush()) {
        Ok(()) => Ok(()),
        Err(err) if err.kind() == std::io::ErrorKind::BrokenPipe => Err(StdoutClosed.into()),
        Err(err) => Err(anyhow::Error::new(err).context("Can't write to standard output")),
    }
}

/// A remark for the user, on stderr.
pub(crate) fn note(text: &str) {
    // Nobody reads it: not a reason to stop.
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// A table without lines. Columns whose title begins with `>` are aligned to the right.
#[derive(Debug)]
pub(crate) struct Rows {
    table: Table,
}

impl Rows {
    pub(crate) fn new(titles: &[&str]) -> Self {
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        table.set_header(titles.iter().map(|t| t.trim_start_matches('>').to_owned()));
        for (index, title) in titles.iter().enumerate() {
            if let Some(column) = table.column_mut(index) {
                column.set_padding((0, 2));
                if title.starts_with('>') {
                    column.set_cell_alignment(CellAlignment::Right);
                }
            }
        }
        Self { table }
    }

    pub(crate) fn add(&mut self, cells: impl IntoIterator<Item = impl Into<String>>) {
        self.table.add_row(cells.into_iter().map(Into::into).collect::<Vec<String>>());
    }

    pub(crate) fn text(&self) -> String {
        self.table.lines().map(|line| format!("{}\n", line.trim_end())).collect()
    }
}

/// Names with values, one a line.
pub(crate) fn fields(pairs: &[(&str, String)]) -> String {
    let width = pairs.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    pairs.iter().map(|(name, value)| format!("{name:width$}  {value}\n")).collect()
}

/// `412 us`, `3.61 ms`, `1.24 s`.
pub(crate) fn micros(us: f64) -> String {
    match us {
        us if us < 1e3 => format!("{us:.0} us"),
        us if us < 1e4 => format!("{:.2} ms", us / 1e3),
        us if us < 1e6 => format!("{:.1} ms", us / 1e3),
        us => format!("{:.2} s", us / 1e6),
    }
}

/// [`micros`] of a whole number.
pub(crate) fn us(us: u64) -> String {
    micros(us as f64)
}

/// `12.5M`: as the command line takes sizes.
pub(crate) fn bytes(bytes: u64) -> String {
    ramet_memory::ByteSize(bytes).to_string()
}

/// How long ago, of a time in milliseconds since 1970.
pub(crate) fn age(unix_ms: u64) -> String {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let now_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
    span(now_ms.saturating_sub(unix_ms) / 1000)
}

/// Seconds in their two largest units.
pub(crate) fn span(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m {}s", seconds / 60, seconds % 60),
        3600..86400 => format!("{}h {}m", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{}d {}h", seconds / 86400, seconds % 86400 / 3600),
    }
}

/// The first digits of an id: enough to name it.
pub(crate) fn short(id: impl fmt::Display) -> String {
    id.to_string().chars().take(12).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantities_read_well() {
        assert_eq!(us(412), "412 us");
        assert_eq!(us(3_612), "3.61 ms");
        assert_eq!(us(36_120), "36.1 ms");
        assert_eq!(us(1_240_000), "1.24 s");
        assert_eq!(bytes(512 << 20), "512M");
        assert_eq!((span(59), span(61), span(3661), span(90_000)).3, "1d 1h");
        assert_eq!(short("0123456789abcdef"), "0123456789ab");
    }

    #[test]
    fn tables_are_aligned_and_have_no_trailing_blanks() {
        let mut rows = Rows::new(&["NAME", ">SIZE"]);
        rows.add(["web", "1M"]);
        rows.add(["a-long-name", "100M"]);
        assert_eq!(rows.text(), "NAME         SIZE\nweb            1M\na-long-name  100M\n");
        assert_eq!(fields(&[("a", "1".into()), ("long", "2".into())]), "a     1\nlong  2\n");
    }
}
