//! Running a command in a guest.

use std::{io::Write as _, process::ExitCode};

use anyhow::{Context as _, Result, bail};
use ramet_client::exec::{ExecEvent, ExecInput, ExecRequest};
use tokio::{io::AsyncReadExt as _, signal::unix::SignalKind};

use crate::{
    args::ExecArgs,
    context::Context,
    output,
    terminal::{self, RawMode},
};

pub(crate) async fn run(context: &Context, args: &ExecArgs) -> Result<ExitCode> {
    let mut request = ExecRequest::new(&args.command);
    request.env = args.env.iter().cloned().collect();
    request.cwd.clone_from(&args.workdir);
    request.tty = args.tty;
    request.stdin = args.interactive;
    if args.tty {
        let term = || std::env::var("TERM").unwrap_or_else(|_| "linux".to_owned());
        request.env.entry("TERM".to_owned()).or_insert_with(term);
        (request.cols, request.rows) = terminal::size().unwrap_or_default();
    }
    let session = context.client()?.exec(&args.vm, &request).await?;
    let raw = if args.tty && args.interactive { Some(RawMode::enter()?) } else { None };
    // A raw terminal sends Ctrl-C as a byte, which the guest's terminal makes a signal of.
    let pass_signals = raw.is_none();
    let input = tokio::spawn(feed(session.input, args.interactive, pass_signals, args.tty));
    let mut events = session.output;
    let code = loop {
        match events.next().await.context("The connection to the command broke")? {
            Some(ExecEvent::Stdout(bytes)) => output::write(&bytes)?,
            Some(ExecEvent::Stderr(bytes)) => {
                // Nobody reads it: not a reason to end the command.
                let _ = std::io::stderr().lock().write_all(&bytes);
            }
            Some(ExecEvent::Exit(code)) => break code,
            Some(ExecEvent::Error(text)) => bail!("{text}"),
            None => bail!("The connection ended before the command did"),
        }
    };
    input.abort();
    drop(raw);
    Ok(ExitCode::from(exit_code(code)))
}

/// The guest's exit code as one of this program: a code that does not fit is a failure.
fn exit_code(code: i32) -> u8 {
    u8::try_from(code).unwrap_or(1)
}

/// Passes standard input, signals and the terminal's size on, until the command has ended.
async fn feed(mut input: ExecInput, stdin: bool, pass_signals: bool, tty: bool) -> Result<()> {
    let mut interrupt = tokio::signal::unix::signal(SignalKind::interrupt())?;
    let mut terminate = tokio::signal::unix::signal(SignalKind::terminate())?;
    let mut resized = tokio::signal::unix::signal(SignalKind::window_change())?;
    let mut from = tokio::io::stdin();
    let mut buffer = vec![0; 16 << 10];
    let mut open = stdin;
    let mut interrupts = 0;
    loop {
        tokio::select! {
            count = from.read(&mut buffer), if open => match count.context("Can't read standard input")? {
                0 => {
                    open = false;
                    input.eof().await?;
                }
                count => input.stdin(&buffer[..count]).await?,
            },
            _ = interrupt.recv(), if pass_signals => {
                interrupts += 1;
                if interrupts > 2 {
                    // The guest does not listen: leave without it.
                    std::process::exit(130);
                }
                input.signal(2).await?;
            }
            _ = terminate.recv() => input.signal(15).await?,
            _ = resized.recv(), if tty => if let Some((columns, lines)) = terminal::size() {
                input.resize(lines, columns).await?;
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_of_the_guest_are_kept_or_are_failures() {
        assert_eq!((exit_code(0), exit_code(7), exit_code(137), exit_code(255)), (0, 7, 137, 255));
        assert_eq!((exit_code(-1), exit_code(256)), (1, 1), "never a success by truncation");
    }
}
