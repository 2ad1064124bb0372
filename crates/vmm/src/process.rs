//! Processes: watched by pidfd, named by number and start time, reaped.

use ramet_kernel::{pidfd_open, pidfd_send_signal, pidfd_wait};
use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
    time::Duration,
};
use tokio::sync::watch;

/// How a process ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExitInfo {
    /// Its exit code; `None` when a signal ended it, or when it was not this daemon's child.
    pub code: Option<i32>,
    /// The signal that ended it.
    pub signal: Option<i32>,
}

impl std::fmt::Display for ExitInfo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match (self.code, self.signal) {
            (Some(code), _) => write!(f, "exit code {code}"),
            (None, Some(signal)) => write!(f, "signal {signal}"),
            (None, None) => f.write_str("ended"),
        }
    }
}

/// When a process was started, in clock ticks after boot: with its number this names it for ever.
///
/// # Errors
/// When there is no such process.
pub(crate) fn start_time(pid: u32) -> io::Result<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name stands in parentheses and may hold anything.
    let rest = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    rest.split_ascii_whitespace()
        .nth(19)
        .and_then(|field| field.parse().ok())
        .ok_or_else(|| io::Error::other("/proc/PID/stat can't be read"))
}

/// A process held by a pidfd. Its end is noticed and reaped in the background.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    pub(crate) started: u64,
    pidfd: OwnedFd,
    exit: watch::Receiver<Option<ExitInfo>>,
}

impl Process {
    /// Takes a process into care.
    pub(crate) fn watch(pid: u32) -> io::Result<Self> {
        let pidfd = pidfd_open(pid)?;
        let started = start_time(pid)?;
        let (tell, exit) = watch::channel(None);
        let waiting = pidfd.try_clone()?;
        // Sleeps in the kernel until the process ends.
        std::thread::Builder::new().name("watch".into()).stack_size(64 << 10).spawn(move || {
            while !pidfd_wait(waiting.as_fd(), None).unwrap_or(true) {}
            let _ = tell.send(Some(reap(pid)));
        })?;
        Ok(Self { pid, started, pidfd, exit })
    }

    pub(crate) async fn wait(&self) -> ExitInfo {
        let mut exit = self.exit.clone();
        let ended = exit.wait_for(Option::is_some).await.ok().and_then(|e| e.clone());
        ended.unwrap_or(ExitInfo { code: None, signal: None })
    }

    pub(crate) fn exited(&self) -> Option<ExitInfo> {
        self.exit.borrow().clone()
    }

    /// Whether it runs, as of now.
    pub(crate) fn is_alive(&self) -> bool {
        !pidfd_wait(self.pidfd.as_fd(), Some(Duration::ZERO)).unwrap_or(false)
    }

    /// Ends the process and waits; false when it does not end in time.
    pub(crate) async fn kill(&self, limit: Duration) -> bool {
        let _ = pidfd_send_signal(self.pidfd.as_fd(), 9);
        tokio::time::timeout(limit, self.wait()).await.is_ok()
    }
}

/// Collects the exit status, if the process is our child; others are reaped by their parent.
fn reap(pid: u32) -> ExitInfo {
    use rustix::process::{Pid, WaitOptions, waitpid};
    let none = ExitInfo { code: None, signal: None };
    let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) else { return none };
    match waitpid(Some(pid), WaitOptions::NOHANG) {
        Ok(Some((_, status))) => ExitInfo { code: status.exit_status(), signal: status.terminating_signal() },
        _ => none,
    }
}
