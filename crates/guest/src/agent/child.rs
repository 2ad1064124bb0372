//! What a child does between its birth and its program.

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use std::fs::File;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::OnceLock;

/// Files that the agent itself may have open: a pidfd and a connection for each subscriber, and its pipes.
const FILES: u64 = 4096;

/// The limit that children get: the one that the agent was started with.
static LIMIT: OnceLock<Rlimit> = OnceLock::new();
/// `cgroup.procs` of the group for commands of the host, if there is one.
static GROUP: OnceLock<Option<File>> = OnceLock::new();

/// Raises the agent's limit of open files, and remembers where commands of the host go. Call it once.
pub(crate) fn set_up(group: Option<File>) {
    let limit = LIMIT.get_or_init(|| getrlimit(Resource::Nofile));
    let current = limit.current.unwrap_or(u64::MAX).max(FILES);
    let raised = Rlimit { current: Some(limit.maximum.map_or(current, |most| current.min(most))), ..*limit };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        eprintln!("ramet-agent: cannot raise the limit of open files: {error}");
    }
    drop(GROUP.set(group));
}

/// For a child that belongs to the agent, such as a hook: only the limit is put back.
pub(crate) fn own(command: &mut Command) {
    before_exec(command, None);
}

/// For a command of the host: it goes into its own control group, so that it can be frozen.
pub(crate) fn of_host(command: &mut Command) {
    before_exec(command, GROUP.get().and_then(Option::as_ref));
}

#[allow(unsafe_code, reason = "no safe library moves a child into a control group before it runs")]
fn before_exec(command: &mut Command, group: Option<&'static File>) {
    let Some(limit) = LIMIT.get() else { return };
    let prepare = move || -> io::Result<()> {
        setrlimit(Resource::Nofile, *limit)?;
        if let Some(group) = group {
            // "0" is the writer itself. A command that cannot be moved runs all the same; it cannot be frozen.
            let _ = rustix::io::write(group, b"0");
        }
        Ok(())
    };
    // SAFETY: the closure makes two system calls on memory and a descriptor that live for ever. It does not allocate,
    // takes no lock, and does not panic, so it may run in a child that was forked from a process with threads.
    unsafe { command.pre_exec(prepare) };
}
