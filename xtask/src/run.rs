//! Running other programs, and telling what happens.

use std::{
    ffi::{OsStr, OsString},
    io::{IsTerminal as _, Write as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicBool, Ordering},
};

use anyhow::{Context as _, Result, bail};

/// Tells the user something, on stderr.
pub(crate) fn say(text: &str) {
    // Nobody reads it any more: not a reason to stop.
    let _ = writeln!(std::io::stderr().lock(), "{text}");
}

/// Writes a result, on stdout.
pub(crate) fn print(text: &str) {
    let _ = writeln!(std::io::stdout().lock(), "{text}");
}

/// Announces a step.
pub(crate) fn step(text: &str) {
    let (bold, plain) = if std::io::stderr().is_terminal() { ("\x1b[1m", "\x1b[0m") } else { ("", "") };
    say(&format!("{bold}==> {text}{plain}"));
}

/// A program to run.
#[derive(Debug)]
pub(crate) struct Tool {
    program: OsString,
    args: Vec<OsString>,
    env: Vec<(OsString, OsString)>,
    unset: Vec<&'static str>,
    dir: Option<PathBuf>,
}

impl Tool {
    pub(crate) fn new(program: impl AsRef<OsStr>) -> Self {
        Self { program: program.as_ref().to_owned(), args: Vec::new(), env: Vec::new(), unset: Vec::new(), dir: None }
    }

    /// The cargo that runs this xtask.
    pub(crate) fn cargo(root: &Path) -> Self {
        Self::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())).dir(root)
    }

    #[must_use]
    pub(crate) fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    #[must_use]
    pub(crate) fn args(mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.args.extend(args.into_iter().map(|a| a.as_ref().to_owned()));
        self
    }

    #[must_use]
    pub(crate) fn env(mut self, name: &str, value: impl AsRef<OsStr>) -> Self {
        self.env.push((name.into(), value.as_ref().to_owned()));
        self
    }

    /// The same without a variable of this process's environment.
    #[must_use]
    pub(crate) fn without_env(mut self, name: &'static str) -> Self {
        self.unset.push(name);
        self
    }

    #[must_use]
    pub(crate) fn dir(mut self, dir: &Path) -> Self {
        self.dir = Some(dir.to_owned());
        self
    }

    /// The same as root: unchanged for root, else through sudo, and the user is told once what for.
    ///
    /// # Errors
    /// When this is not root and there is no sudo.
    pub(crate) fn through_root(self, reason: &str) -> Result<Self> {
        if is_root() {
            return Ok(self);
        }
        need_sudo(reason)?;
        // sudo drops the environment; `env` sets what matters again.
        let mut args: Vec<OsString> = vec!["--".into(), "env".into()];
        for (name, value) in self.env {
            let mut pair = name;
            pair.push("=");
            pair.push(value);
            args.push(pair);
        }
        args.push(self.program);
        args.extend(self.args);
        Ok(Self { program: "sudo".into(), args, env: Vec::new(), unset: Vec::new(), dir: self.dir })
    }

    fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        command.args(&self.args).envs(self.env.iter().map(|(k, v)| (k, v))).stdin(Stdio::null());
        for name in &self.unset {
            command.env_remove(name);
        }
        if let Some(dir) = &self.dir {
            command.current_dir(dir);
        }
        command
    }

    fn words(&self) -> String {
        let words: Vec<_> = std::iter::once(&self.program).chain(&self.args).map(|w| w.to_string_lossy()).collect();
        words.join(" ")
    }

    /// Runs it with everything it prints on stderr; a failure is an error.
    pub(crate) fn run(&self) -> Result<()> {
        let status = self
            .command()
            .stdout(std::io::stderr())
            .status()
            .with_context(|| format!("Can't start `{}`", self.words()))?;
        if !status.success() {
            bail!("`{}` failed ({status})", self.words());
        }
        Ok(())
    }

    /// Runs it on this terminal and returns its exit code.
    pub(crate) fn status(&self) -> Result<i32> {
        let status = self
            .command()
            .stdin(Stdio::inherit())
            .status()
            .with_context(|| format!("Can't start `{}`", self.words()))?;
        Ok(status.code().unwrap_or(1))
    }

    /// Runs it and hands every line of its stdout to `line`; returns whether it succeeded.
    pub(crate) fn lines(&self, mut line: impl FnMut(&str)) -> Result<bool> {
        use std::io::BufRead as _;
        let mut child =
            self.command().stdout(Stdio::piped()).spawn().with_context(|| format!("Can't start `{}`", self.words()))?;
        let stdout = child.stdout.take().context("No pipe from the child")?;
        let mut reader = std::io::BufReader::new(stdout);
        let mut buffer = Vec::new();
        while reader.read_until(b'\n', &mut buffer)? > 0 {
            line(String::from_utf8_lossy(&buffer).trim_end_matches('\n'));
            buffer.clear();
        }
        Ok(child.wait()?.success())
    }

    /// Runs it and returns what it printed on stdout; a failure is an error with what it printed on stderr.
    pub(crate) fn output(&self) -> Result<String> {
        let output = self.command().output().with_context(|| format!("Can't start `{}`", self.words()))?;
        if !output.status.success() {
            let stderr = String::from_utf8_lossy(&output.stderr);
            bail!("`{}` failed ({}): {}", self.words(), output.status, stderr.trim());
        }
        String::from_utf8(output.stdout).with_context(|| format!("`{}` printed no text", self.words()))
    }
}

/// Whether this process is root's.
pub(crate) fn is_root() -> bool {
    std::fs::read_to_string("/proc/self/status").is_ok_and(|status| {
        status.lines().find_map(|l| l.strip_prefix("Uid:")).and_then(|ids| ids.split_whitespace().nth(1)) == Some("0")
    })
}

/// Tells why root is needed, the first time; an error when there is no way to become root.
pub(crate) fn need_sudo(reason: &str) -> Result<()> {
    static TOLD: AtomicBool = AtomicBool::new(false);
    if find("sudo").is_none() {
        bail!("This needs root, {reason}, and there is no sudo: run it as root");
    }
    if !TOLD.swap(true, Ordering::Relaxed) {
        step(&format!("Root is needed {reason}: sudo may ask for your password"));
    }
    Ok(())
}

/// Where a program is, in PATH or one of the directories that a user's PATH may lack.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|p| p.is_file())
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn output_carries_the_programs_own_error() {
        assert_eq!(Tool::new("echo").arg("hi").output().unwrap(), "hi\n");
        let err = Tool::new("sh").args(["-c", "echo broken >&2; exit 3"]).output().unwrap_err().to_string();
        assert!(err.contains("broken") && err.contains('3'), "{err}");
        let err = format!("{:#}", Tool::new("no-such-program-here").run().unwrap_err());
        assert!(err.contains("no-such-program-here"), "{err}");
    }

    #[test]
    fn lines_come_one_by_one_and_failure_is_told() {
        let mut seen = Vec::new();
        let good = Tool::new("printf").arg("a\\nb").lines(|l| seen.push(l.to_owned())).unwrap();
        assert!(good);
        assert_eq!(seen, ["a", "b"]);
        assert!(!Tool::new("false").lines(|_| {}).unwrap());
    }

    #[test]
    fn programs_are_found_or_not() {
        assert!(find("sh").is_some());
        assert!(find("no-such-program-here").is_none());
    }
}
