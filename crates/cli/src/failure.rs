//! Errors as the user sees them, and exit codes.

use std::{io::Write as _, process::ExitCode};

use ramet_client::{Error, api::ErrorBody};

use crate::{args::Command, output::StdoutClosed};

const FAILED: u8 = 1;
const UNREACHABLE: u8 = 3;
const EXEC_FAILED: u8 = 125;

/// Prints the error with its remedy, and tells the exit code.
pub(crate) fn report(err: &anyhow::Error, command: &Command) -> ExitCode {
    if err.downcast_ref::<StdoutClosed>().is_some() {
        // The reader has seen enough.
        return ExitCode::SUCCESS;
    }
    // Nobody can be told when stderr is gone.
    let _ = write!(std::io::stderr().lock(), "{}", text(err));
    ExitCode::from(code(err, command))
}

fn code(err: &anyhow::Error, command: &Command) -> u8 {
    let unreachable = matches!(daemon_error(err), Some(Error::Connect { .. }));
    match command {
        Command::Exec(_) => EXEC_FAILED,
        _ if unreachable => UNREACHABLE,
        _ => FAILED,
    }
}

fn daemon_error(err: &anyhow::Error) -> Option<&Error> {
    err.chain().find_map(|e| e.downcast_ref::<Error>())
}

fn text(err: &anyhow::Error) -> String {
    let mut text = "error: ".to_owned();
    let mut causes: Vec<String> = Vec::new();
    for cause in err.chain() {
        let cause = cause.to_string();
        // Many errors repeat their cause in their own words.
        if !causes.iter().any(|c| c.ends_with(&cause)) {
            causes.push(cause);
        }
    }
    text.push_str(&causes.join(": "));
    text.push('\n');
    let Some(daemon) = daemon_error(err) else { return text };
    if let Some(body) = daemon.body() {
        text.push_str(&clones(body));
    }
    if let Some(remedy) = daemon.remedy() {
        text.push_str(&format!(" help: {remedy}\n"));
    }
    text
}

/// What became of each clone of a fork that failed.
fn clones(body: &ErrorBody) -> String {
    let line = |clone: &ramet_client::api::CloneFailure| {
        let outcome = clone.error.as_deref().unwrap_or("had come up; undone because another failed");
        format!("  clone {} ({} on {}): {outcome}\n", clone.clone_number, clone.name, clone.host)
    };
    body.clones.iter().map(line).collect()
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;
    use ramet_client::api::{CloneFailure, ErrorCode};

    use super::*;

    #[test]
    fn a_daemon_that_does_not_run_is_told_how_to_start() {
        let source = std::io::Error::from(std::io::ErrorKind::NotFound);
        let err = anyhow::Error::new(Error::Connect { target: "/run/x.sock".into(), source });
        let shown = text(&err);
        assert!(shown.contains("/run/x.sock") && shown.contains("help:") && shown.contains("rametd"), "{shown}");
        assert_eq!(code(&err, &Command::Version), UNREACHABLE);
    }

    #[test]
    fn a_failed_fork_lists_every_clone() {
        let failure = |number, error: Option<&str>| CloneFailure {
            clone_number: number,
            name: format!("web-c{number}"),
            host: "h2".into(),
            error: error.map(str::to_owned),
        };
        let body = ErrorBody {
            code: ErrorCode::ForkFailed,
            message: "1 of 2 clones failed".into(),
            remedy: Some("look".into()),
            clones: vec![failure(1, None), failure(2, Some("no memory"))],
        };
        let err = anyhow::Error::new(Error::Api(Box::new(body)));
        let shown = text(&err);
        assert!(shown.contains("clone 1 (web-c1 on h2): had come up"), "{shown}");
        assert!(shown.contains("clone 2 (web-c2 on h2): no memory"), "{shown}");
        assert!(shown.ends_with(" help: look\n"), "{shown}");
    }

    #[test]
    fn causes_are_told_once() {
        let err = Err::<(), _>(anyhow::anyhow!("b broke")).context("a failed: b broke").unwrap_err();
        assert_eq!(text(&err), "error: a failed: b broke\n");
        let err = Err::<(), _>(anyhow::anyhow!("b broke")).context("a failed").unwrap_err();
        assert_eq!(text(&err), "error: a failed: b broke\n");
    }
}
