//! The freezer: control groups (version 2) with all that runs in the guest, except the init process, the agent, and
//! what the agent runs for itself.
//!
//! The kernel's own threads go on: so an open connection still acknowledges what it gets.
//!
//! Without systemd the agent makes the groups itself: `ramet-agent` for itself, `ramet-exec` for the host's commands,
//! `ramet-apps` for all else, since what is in the root group cannot be frozen. With systemd the agent is in a slice of
//! its own, `ramet.slice`, and only the host's commands are moved.

use crate::paths::Paths;
use std::collections::HashSet;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// `CGROUP2_SUPER_MAGIC` of <linux/magic.h>.
const CGROUP2: u64 = 0x6367_7270;
/// Groups that are never frozen: systemd itself, and the agent. All slices else are frozen as a whole, so that also
/// services that systemd starts meanwhile stand still.
const SPARED: [&str; 3] = ["init.scope", "ramet.slice", "ramet-agent"];
const EXEC: &str = "ramet-exec";
const APPS: &str = "ramet-apps";
const AGENT: &str = "ramet-agent";

/// The groups of this machine.
#[derive(Debug)]
pub(crate) struct Freezer {
    /// Where they are, or why there are none.
    root: Result<PathBuf, String>,
    /// The agent's own group.
    own: PathBuf,
    /// The agent was in the root group, so no one else looks after the groups.
    alone: bool,
}

impl Freezer {
    /// Finds the groups, and puts the agent into one of its own. Also gives `cgroup.procs` of the group for the host's
    /// commands.
    pub(crate) fn set_up(paths: &Paths) -> (Self, Option<File>) {
        let path = paths.at("sys/fs/cgroup");
        let none = |why: String| (Self { root: Err(why), own: PathBuf::new(), alone: false }, None);
        match rustix::fs::statfs(&path) {
            Ok(found) if u64::try_from(found.f_type).is_ok_and(|kind| kind == CGROUP2) => {}
            _ => return none(format!("{} has no control groups of version 2", path.display())),
        }
        let own = own_group();
        let alone = own.as_deref() == Some("");
        let made = make_group(&path, EXEC).and_then(|exec| {
            if alone {
                make_group(&path, APPS)?;
                let agent = make_group(&path, AGENT)?;
                std::fs::write(agent.join("cgroup.procs"), "0")?;
            }
            File::options().write(true).open(exec.join("cgroup.procs"))
        });
        let own = path.join(if alone { AGENT } else { own.as_deref().unwrap_or("") });
        match made {
            Ok(exec) => (Self { root: Ok(path), own, alone }, Some(exec)),
            Err(error) => none(format!("cannot make control groups in {}: {error}", path.display())),
        }
    }

    /// Stops all applications, and returns when they stand. On failure all run again.
    pub(crate) fn freeze(&self, deadline: Instant, is_cancelled: &dyn Fn() -> bool) -> Result<(), String> {
        let result = self.try_freeze(deadline, is_cancelled);
        if result.is_err() {
            self.thaw()?;
        }
        result
    }

    fn try_freeze(&self, deadline: Instant, is_cancelled: &dyn Fn() -> bool) -> Result<(), String> {
        let root = self.root.as_ref().map_err(|why| format!("the applications cannot be frozen: {why}"))?;
        if self.alone {
            gather(root);
        }
        let groups = self.groups(root).map_err(|error| format!("cannot list {}: {error}", root.display()))?;
        for group in &groups {
            set(group, true).map_err(|error| format!("cannot freeze {}: {error}", group.display()))?;
        }
        for group in &groups {
            loop {
                match is_frozen(group) {
                    Ok(true) => break,
                    Ok(false) => {}
                    // It went in this moment.
                    Err(_) if !group.exists() => break,
                    Err(error) => return Err(format!("cannot look at {}: {error}", group.display())),
                }
                if is_cancelled() {
                    return Err("the freeze is no longer wanted".to_owned());
                }
                if Instant::now() >= deadline {
                    return Err(format!("{} did not stand still in time", group.display()));
                }
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        Ok(())
    }

    /// Lets all applications run. Does nothing to those that run.
    pub(crate) fn thaw(&self) -> Result<(), String> {
        let Ok(root) = &self.root else { return Ok(()) };
        let groups = self.groups(root).map_err(|error| format!("cannot list {}: {error}", root.display()))?;
        let mut failed = Vec::new();
        for group in groups {
            if let Err(error) = set(&group, false)
                && group.exists()
            {
                failed.push(format!("cannot thaw {}: {error}", group.display()));
            }
        }
        if failed.is_empty() { Ok(()) } else { Err(failed.join("; ")) }
    }

    /// All groups to be frozen: those next to the path from the root to the agent's own.
    fn groups(&self, root: &Path) -> io::Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        let mut dirs = vec![root.to_owned()];
        while let Some(dir) = dirs.pop() {
            for entry in std::fs::read_dir(&dir)? {
                let entry = entry?;
                let path = entry.path();
                if !entry.file_type()?.is_dir() || self.own == path {
                    continue;
                }
                if dir == *root && SPARED.iter().any(|spared| entry.file_name() == *spared) {
                    continue;
                }
                if self.own.starts_with(&path) {
                    dirs.push(path);
                } else {
                    found.push(path);
                }
            }
        }
        found.sort();
        Ok(found)
    }
}

/// The agent's group in the hierarchy of version 2, without its first `/`.
fn own_group() -> Option<String> {
    let groups = std::fs::read_to_string("/proc/self/cgroup").ok()?;
    let own = groups.lines().find_map(|line| line.strip_prefix("0::/"))?;
    // An agent that was started again is where the first one put itself, or its parent.
    Some(if own == AGENT { String::new() } else { own.to_owned() })
}

/// Makes a group, unless it is there. One that is frozen stays so: an agent that was started again must not let a
/// clone go to work that has no identity yet.
fn make_group(root: &Path, name: &str) -> io::Result<PathBuf> {
    let path = root.join(name);
    match std::fs::create_dir(&path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(path),
    }
}

/// Moves what runs in the root group, where it could not be frozen, into the group for applications: all but kernel
/// threads and the init process.
fn gather(root: &Path) {
    // Only the root itself has no such file.
    if root.join("cgroup.freeze").exists() {
        return;
    }
    let to = root.join(APPS).join("cgroup.procs");
    let mut tried = HashSet::new();
    // What is moved may have had children in the meantime.
    for _ in 0..10 {
        let list = std::fs::read_to_string(root.join("cgroup.procs")).unwrap_or_default();
        let new: Vec<&str> = list.lines().filter(|pid| *pid != "1" && !tried.contains(*pid)).collect();
        if new.is_empty() {
            return;
        }
        for pid in &new {
            // Kernel threads have no program.
            if std::fs::read_link(format!("/proc/{pid}/exe")).is_ok() {
                // It may have ended.
                drop(std::fs::write(&to, pid));
            }
        }
        let new: Vec<String> = new.into_iter().map(str::to_owned).collect();
        tried.extend(new);
    }
}

fn set(group: &Path, frozen: bool) -> io::Result<()> {
    std::fs::write(group.join("cgroup.freeze"), if frozen { "1" } else { "0" })
}

fn is_frozen(group: &Path) -> io::Result<bool> {
    let events = std::fs::read_to_string(group.join("cgroup.events"))?;
    Ok(events.lines().any(|line| line == "frozen 1"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn all_groups_but_the_agents_own_and_inits_are_frozen() {
        let dir = tempfile::tempdir().unwrap();
        for group in [
            "init.scope",
            "ramet.slice/ramet-agent.service",
            "system.slice/a.service",
            "system.slice/agent.service/sub",
            "user.slice/user-1.slice",
            "machine.slice",
            "ramet-exec",
        ] {
            std::fs::create_dir_all(dir.path().join(group)).unwrap();
        }
        let named = |own: &str| {
            let root = dir.path().to_owned();
            let freezer = Freezer { own: root.join(own), root: Ok(root.clone()), alone: false };
            let groups = freezer.groups(&root).unwrap();
            groups.iter().map(|p| p.strip_prefix(&root).unwrap().to_str().unwrap().to_owned()).collect::<Vec<_>>()
        };
        let slices = ["machine.slice", "ramet-exec", "system.slice", "user.slice"];
        assert_eq!(named("ramet.slice/ramet-agent.service"), slices);
        let within = ["machine.slice", "ramet-exec", "system.slice/a.service", "user.slice"];
        assert_eq!(named("system.slice/agent.service"), within);
    }

    #[test]
    fn without_groups_a_freeze_fails_and_a_thaw_does_nothing() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("sys/fs/cgroup")).unwrap();
        symlink("/", dir.path().join("link")).unwrap();
        let (freezer, exec) = Freezer::set_up(&Paths::new(dir.path()));
        assert!(exec.is_none());
        let error = freezer.freeze(Instant::now(), &|| false).unwrap_err();
        assert!(error.contains("sys/fs/cgroup"), "{error}");
        freezer.thaw().unwrap();
    }
}
