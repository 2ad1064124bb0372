//! Processes: told apart by pid and start time, found by what they belong to, killed without hitting another.

use std::{
    fs,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, PidfdFlags, Signal};
use serde::{Deserialize, Serialize};

/// A process that can't be mistaken for a later one of the same pid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stamp {
    pub(crate) pid: u32,
    /// In clock ticks since boot.
    start: u64,
}

impl Stamp {
    pub(crate) fn of(pid: u32) -> Result<Self> {
        let start = start_time(pid).with_context(|| format!("No process {pid}"))?;
        Ok(Self { pid, start })
    }

    /// Whether it runs: it exists, is the same, and is no zombie.
    pub(crate) fn alive(self) -> bool {
        start_time(self.pid) == Some(self.start)
    }

    /// Sends SIGKILL, unless it has ended.
    pub(crate) fn kill(self) {
        let Some(pid) = i32::try_from(self.pid).ok().and_then(Pid::from_raw) else { return };
        let Ok(fd) = rustix::process::pidfd_open(pid, PidfdFlags::empty()) else { return };
        // The descriptor names one process for ever; only now is it certain that it is the right one.
        if self.alive() {
            // It can only have ended by itself.
            let _ = rustix::process::pidfd_send_signal(&fd, Signal::KILL);
        }
    }
}

/// Start time of a process that exists and is no zombie.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    parse_stat(&stat)
}

fn parse_stat(stat: &str) -> Option<u64> {
    // The name in brackets may hold anything.
    let fields: Vec<&str> = stat[stat.rfind(')')? + 1..].split_whitespace().collect();
    if matches!(*fields.first()?, "Z" | "X") {
        return None;
    }
    fields.get(19)?.parse().ok()
}

/// One of a lab's processes.
#[derive(Debug, Clone)]
pub struct Process {
    /// Its process id.
    pub pid: u32,
    /// `rametd`, `ramet-pager` or `qemu-system-x86_64`.
    pub program: String,
    pub(crate) stamp: Stamp,
}

/// What makes a process one of a lab's.
#[derive(Debug)]
pub(crate) struct Membership {
    /// Device and inode of the network namespaces.
    namespaces: Vec<(u64, u64)>,
    /// Directory that its command line names.
    dir: PathBuf,
}

impl Membership {
    /// Those of these namespaces (those that exist), or with a path below `dir` on their command line.
    pub(crate) fn new(netns: impl IntoIterator<Item = String>, dir: &Path) -> Self {
        let namespaces = netns
            .into_iter()
            .filter_map(|name| fs::metadata(Path::new("/run/netns").join(name)).ok())
            .map(|m| (m.dev(), m.ino()))
            .collect();
        Self { namespaces, dir: dir.to_owned() }
    }

    fn has(&self, pid: u32) -> bool {
        let inside =
            fs::metadata(format!("/proc/{pid}/ns/net")).is_ok_and(|m| self.namespaces.contains(&(m.dev(), m.ino())));
        inside || fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| names_path_below(&line, &self.dir))
    }

    /// The processes of our programs that belong here. A user's shell in one of the namespaces is none.
    pub(crate) fn processes(&self) -> Vec<Process> {
        let pids =
            fs::read_dir("/proc").into_iter().flatten().filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok());
        let mut found: Vec<Process> = pids
            .filter_map(|pid: u32| {
                let program = program(pid)?;
                let stamp = Stamp::of(pid).ok()?;
                self.has(pid).then_some(Process { pid, program, stamp })
            })
            .collect();
        found.sort_by_key(|p| p.pid);
        found
    }
}

/// Whether an argument of the command line (`/proc/PID/cmdline`) holds a path below `dir`.
fn names_path_below(line: &[u8], dir: &Path) -> bool {
    let mut below = dir.as_os_str().as_encoded_bytes().to_vec();
    below.push(b'/');
    line.windows(below.len()).any(|w| w == below)
}

/// The name of one of our programs, when the process runs one.
fn program(pid: u32) -> Option<String> {
    let exe = fs::read_link(format!("/proc/{pid}/exe")).ok()?;
    let name = exe.file_name()?.to_str()?;
    // A program that was built anew while it ran.
    let name = name.strip_suffix(" (deleted)").unwrap_or(name);
    let ours = ["rametd", "ramet-pager", "ramet-disk", "qemu-storage-daemon"].contains(&name)
        || name.starts_with("qemu-system-");
    ours.then(|| name.to_owned())
}

/// Kills all members, daemons first so that they start nothing anew, and waits until they are gone.
///
/// # Errors
/// When something is still there after 15 s.
pub(crate) fn kill_all(members: &Membership) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(15);
    loop {
        let left = members.processes();
        if left.is_empty() {
            return Ok(());
        }
        if Instant::now() > deadline {
            let names: Vec<_> = left.iter().map(|p| format!("{} {}", p.program, p.pid)).collect();
            bail!("These processes do not end: {}", names.join(", "));
        }
        let daemons: Vec<_> = left.iter().filter(|p| p.program == "rametd").collect();
        for process in if daemons.is_empty() { left.iter().collect() } else { daemons } {
            process.stamp.kill();
        }
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn stat_lines_with_odd_names_are_read() {
        let line = |state: &str| format!("7 (a) b) {state} {} 4242 0 0", ["0"; 18].join(" "));
        assert_eq!(parse_stat(&line("S")), Some(4242));
        assert_eq!(parse_stat(&line("Z")), None, "a zombie");
        assert_eq!(parse_stat("nonsense"), None);
    }

    #[test]
    fn a_stamp_tells_a_process_from_a_later_one() {
        let mut child = Command::new("sleep").arg("60").stdin(Stdio::null()).spawn().unwrap();
        let stamp = Stamp::of(child.id()).unwrap();
        assert!(stamp.alive());
        let other = Stamp { start: stamp.start + 1, ..stamp };
        assert!(!other.alive());
        other.kill();
        assert!(stamp.alive(), "killed by the stamp of another");
        stamp.kill();
        child.wait().unwrap();
        assert!(!stamp.alive());
    }

    #[test]
    fn only_our_programs_below_the_directory_are_members() {
        let dir = Path::new("/run/ramet-lab/no-such-lab");
        // `sleep` takes the path as an argument but is no program of ours.
        let mut child = Command::new("sh").args(["-c", "sleep 60", "/run/ramet-lab/no-such-lab/h1/x"]).spawn().unwrap();
        assert!(Membership::new([], dir).processes().is_empty());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(names_path_below(b"qemu\0-x\0path=/run/ramet-lab/no-such-lab/h1,y", dir));
        assert!(!names_path_below(b"qemu\0/run/ramet-lab/no-such-lab2/h1", dir));
    }
}
