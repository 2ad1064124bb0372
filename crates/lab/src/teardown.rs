//! Taking a lab down, from its name alone.

use std::{
    fs, io,
    os::unix::ffi::OsStringExt as _,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use ramet_client::{Client, api::ShutdownRequest};
use rustix::mount::UnmountFlags;

use crate::{
    net,
    process::{Membership, kill_all},
    record::lab_dir,
};

/// How long the daemons may take to end their VMs.
const GRACE: Duration = Duration::from_secs(8);

pub(crate) fn membership(name: &str) -> Membership {
    Membership::new(net::namespaces(name), &lab_dir(name))
}

/// Whether anything of the lab of this name is there.
pub(crate) fn exists(name: &str) -> bool {
    lab_dir(name).exists() || !net::namespaces(name).is_empty()
}

/// Asks all daemons to end with their VMs, and waits until nothing runs or the grace is over.
pub(crate) async fn ask(name: &str) {
    let mut calls = Vec::new();
    for entry in fs::read_dir(lab_dir(name)).into_iter().flatten().flatten() {
        let socket = entry.path().join("rametd.sock");
        if socket.exists() {
            calls.push(tokio::spawn(async move {
                let call = async { Client::unix(socket).shutdown(&ShutdownRequest { stop_vms: true }).await };
                matches!(tokio::time::timeout(GRACE, call).await, Ok(Ok(())))
            }));
        }
    }
    let deadline = Instant::now() + GRACE;
    let mut heard = false;
    for call in calls {
        heard |= call.await.unwrap_or(false);
    }
    // A daemon that did not listen is killed at once.
    let members = membership(name);
    while heard && Instant::now() < deadline && !members.processes().is_empty() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Kills, unmounts and removes everything. What fails does not keep the rest from being done; the first error is told.
pub(crate) fn remove(name: &str) -> Result<()> {
    let dir = lab_dir(name);
    let mut result = kill_all(&membership(name));
    let mut note = |step: Result<()>| {
        if result.is_ok() {
            result = step;
        }
    };
    match fs::read("/proc/self/mountinfo") {
        Ok(table) => {
            for mount in mounts_below(&table, &dir) {
                note(
                    rustix::mount::unmount(&mount, UnmountFlags::DETACH)
                        .with_context(|| format!("Can't unmount {}", mount.display())),
                );
            }
        }
        Err(err) => note(Err(err).context("Can't read /proc/self/mountinfo")),
    }
    for netns in net::namespaces(name) {
        note(net::delete(&netns));
    }
    match fs::remove_dir_all(&dir) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => {
            note(Err(err).with_context(|| format!("Can't remove {}", dir.display())));
        }
        _ => {}
    }
    // Only when this was the last lab.
    let _ = fs::remove_dir(crate::ROOT);
    result.with_context(|| format!("The lab '{name}' is not wholly removed"))
}

/// Mount points below `dir` in the text of `/proc/self/mountinfo`, innermost first.
fn mounts_below(table: &[u8], dir: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = table
        .split(|b| *b == b'\n')
        .filter_map(|line| line.split(|b| *b == b' ').nth(4))
        .map(unescape)
        .filter(|mount| mount.starts_with(dir))
        .collect();
    found.sort_by_key(|m| std::cmp::Reverse(m.as_os_str().len()));
    found
}

/// The kernel writes blanks and the like as `\040`.
fn unescape(field: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&byte, tail)) = rest.split_first() {
        let code = (byte == b'\\')
            .then(|| std::str::from_utf8(tail.get(..3)?).ok())
            .flatten()
            .and_then(|octal| u8::from_str_radix(octal, 8).ok());
        match code {
            Some(code) => {
                out.push(code);
                rest = &tail[3..];
            }
            None => {
                out.push(byte);
                rest = tail;
            }
        }
    }
    std::ffi::OsString::from_vec(out).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_mounts_below_are_found_innermost_first() {
        let table = b"1 2 0:1 / / rw - ext4 /dev/x rw\n\
            3 1 0:2 / /run/ramet-lab/a/h1/pages rw - tmpfs t rw\n\
            4 3 0:3 / /run/ramet-lab/a/h1/pages/in\\040side rw - tmpfs t rw\n\
            5 1 0:4 / /run/ramet-lab/ab/h1/pages rw - tmpfs t rw\n";
        let found = mounts_below(table, Path::new("/run/ramet-lab/a"));
        assert_eq!(found, [Path::new("/run/ramet-lab/a/h1/pages/in side"), Path::new("/run/ramet-lab/a/h1/pages")]);
    }

    #[test]
    fn removing_what_is_not_there_is_no_error() {
        remove("no-such-lab-at-all").unwrap();
        assert!(!exists("no-such-lab-at-all"));
    }
}
