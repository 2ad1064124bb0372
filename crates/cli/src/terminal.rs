//! The user's terminal in raw mode, given back as it was.

use std::io::IsTerminal as _;

use anyhow::{Context as _, Result, bail};
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcgetwinsize, tcsetattr};

/// The terminal in raw mode; as before when dropped.
pub(crate) struct RawMode {
    before: Termios,
}

impl RawMode {
    /// Puts standard input's terminal into raw mode.
    ///
    /// # Errors
    /// When standard input is no terminal.
    pub(crate) fn enter() -> Result<Self> {
        let stdin = std::io::stdin();
        if !stdin.is_terminal() {
            bail!("Standard input is no terminal");
        }
        let before = tcgetattr(&stdin).context("Can't read the terminal's mode")?;
        let mut raw = before.clone();
        raw.make_raw();
        tcsetattr(&stdin, OptionalActions::Now, &raw).context("Can't set the terminal's mode")?;
        Ok(Self { before })
    }
}

impl Drop for RawMode {
    fn drop(&mut self) {
        // The terminal is gone when this fails.
        let _ = tcsetattr(std::io::stdin(), OptionalActions::Drain, &self.before);
    }
}

/// Columns and lines of the terminal, when standard output is one.
pub(crate) fn size() -> Option<(u16, u16)> {
    let stdout = std::io::stdout();
    let size = stdout.is_terminal().then(|| tcgetwinsize(&stdout).ok())??;
    (size.ws_col > 0 && size.ws_row > 0).then_some((size.ws_col, size.ws_row))
}
