//! The serial console.

use std::io::IsTerminal as _;

use anyhow::{Context as _, Result};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::{args::VmArg, context::Context, output, terminal::RawMode};

/// Ctrl-].
const LEAVE: u8 = 0x1d;

pub(crate) async fn run(context: &Context, args: &VmArg) -> Result<()> {
    let io = context.client()?.console(&args.vm).await?;
    let (mut from_guest, mut to_guest) = tokio::io::split(io);
    let raw = if std::io::stdin().is_terminal() {
        output::note(&format!("Console of {}; Ctrl-] leaves.", args.vm));
        Some(RawMode::enter()?)
    } else {
        None
    };
    let keys = tokio::spawn(async move {
        let mut stdin = tokio::io::stdin();
        let mut buffer = [0; 4096];
        loop {
            let count = stdin.read(&mut buffer).await.context("Can't read standard input")?;
            if count == 0 {
                // Input from a file has ended: what the guest says to it is still wanted.
                return std::future::pending().await;
            }
            let (bytes, leave) = until_leave(&buffer[..count]);
            to_guest.write_all(bytes).await.context("The console's connection broke")?;
            to_guest.flush().await.context("The console's connection broke")?;
            if leave {
                return Ok(());
            }
        }
    });
    let mut buffer = [0; 4096];
    let shown = async {
        loop {
            match from_guest.read(&mut buffer).await.context("The console's connection broke")? {
                0 => return Ok(()),
                count => output::write(&buffer[..count])?,
            }
        }
    };
    let result = tokio::select! {
        result = shown => result,
        left = keys => left.context("Reading keys failed")?,
    };
    drop(raw);
    output::note("");
    result
}

/// What to send of the keys, and whether the one that leaves is among them.
fn until_leave(keys: &[u8]) -> (&[u8], bool) {
    match keys.iter().position(|key| *key == LEAVE) {
        Some(at) => (&keys[..at], true),
        None => (keys, false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_before_the_one_that_leaves_are_sent() {
        assert_eq!(until_leave(b"ls\r"), (&b"ls\r"[..], false));
        assert_eq!(until_leave(b"a\x1db"), (&b"a"[..], true));
    }
}
