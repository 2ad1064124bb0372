//! What a machine calls itself, besides its addresses: host name, machine id, SSH keys, and the files that tell programs.

use crate::child;
use crate::network::{Remark, where_writable};
use crate::paths::{Paths, replace};
use ramet_guest::protocol::{GuestId, Identity};
use rustix::process::{Pid, Signal, kill_process};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// Takes on those names that the identity has, as far as that needs no disk. Each part is told to `step`.
pub(crate) fn take(paths: &Paths, identity: &Identity, step: &mut dyn FnMut(&str, io::Result<Remark>)) {
    if let Some(name) = &identity.hostname {
        step("hostname", set_hostname(name));
    }
    if let Some(id) = &identity.machine_id {
        step("machine-id", set_machine_id(&paths.at("run/machine-id"), id));
    }
}

/// Writes those names to the files that keep them. Each part is told to `step`.
pub(crate) fn write(paths: &Paths, identity: &Identity, step: &mut dyn FnMut(&str, io::Result<Remark>)) {
    if let Some(name) = &identity.hostname {
        step("files of the hostname", write_hostname(paths, name));
    }
    if let Some(id) = &identity.machine_id {
        step("file of the machine-id", set_machine_id(&paths.at("etc/machine-id"), id));
    }
    if identity.ssh_host_keys {
        step("ssh-host-keys", new_ssh_keys(paths));
    }
}

/// Writes the files by which programs find out who they are. Each part is told to `step`.
pub(crate) fn write_id(paths: &Paths, id: &GuestId, step: &mut dyn FnMut(&str, io::Result<Remark>)) {
    step("id", replace_id(paths, id).map(|()| None));
    step("generation", replace(&paths.generation(), format!("{}\n", id.generation).as_bytes()).map(|()| None));
}

fn replace_id(paths: &Paths, id: &GuestId) -> io::Result<()> {
    let path = paths.id();
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    let mut json = serde_json::to_vec(id)?;
    json.push(b'\n');
    replace(&path, &json)
}

fn invalid(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text.into())
}

fn set_hostname(name: &str) -> io::Result<Remark> {
    let is_good = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'.';
    if name.is_empty() || name.len() > 64 || !name.bytes().all(is_good) {
        return Err(invalid(format!("{name:?} is no host name")));
    }
    Ok(rustix::system::sethostname(name.as_bytes()).map(|()| None)?)
}

fn write_hostname(paths: &Paths, name: &str) -> io::Result<Remark> {
    let old = std::fs::read_to_string(paths.at("etc/hostname")).unwrap_or_default();
    let old = old.trim();
    let written = where_writable(replace(&paths.at("etc/hostname"), format!("{name}\n").as_bytes()))?;
    let path = paths.at("etc/hosts");
    let Ok(hosts) = std::fs::read_to_string(&path) else { return Ok(written) };
    let new = rename_in_hosts(&hosts, old, name);
    let replaced = if new == hosts { None } else { where_writable(replace(&path, new.as_bytes()))? };
    Ok(written.or(replaced))
}

/// The machine's own names in `/etc/hosts`: those of loopback addresses.
fn rename_in_hosts(hosts: &str, old: &str, new: &str) -> String {
    let mut text = String::new();
    let mut named = false;
    for line in hosts.lines() {
        let mut words = line.split_ascii_whitespace();
        let is_own = words.next().is_some_and(|address| address.starts_with("127.") || address == "::1");
        if is_own && words.any(|word| word == old || word == new) {
            named = true;
            let mut words = line.split_ascii_whitespace();
            text += words.next().unwrap_or_default();
            for word in words {
                text.push('\t');
                text += if word == old { new } else { word };
            }
        } else {
            text += line;
        }
        text.push('\n');
    }
    if !named {
        text += &format!("127.0.1.1\t{new}\n");
    }
    text
}

fn set_machine_id(path: &Path, id: &str) -> io::Result<Remark> {
    if id.len() != 32 || !id.bytes().all(|b| b.is_ascii_digit() || matches!(b, b'a'..=b'f')) {
        return Err(invalid(format!("{id:?} is no machine id: 32 digits 0 to 9 and a to f are wanted")));
    }
    if !path.exists() {
        return Ok(Some("there is no file of it".to_owned()));
    }
    where_writable(replace(path, format!("{id}\n").as_bytes()))
}

/// Replaces the keys by which this machine proves who it is. If that fails the old ones stay, and the step has failed.
fn new_ssh_keys(paths: &Paths) -> io::Result<Remark> {
    const OLD: &str = ".ramet-old";
    let dir = paths.at("etc/ssh");
    if !dir.is_dir() {
        return Ok(Some("there is no SSH server".to_owned()));
    }
    let mut moved: Vec<(PathBuf, PathBuf)> = Vec::new();
    let mut result = Ok(());
    for entry in std::fs::read_dir(&dir)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name.starts_with("ssh_host_") && !name.ends_with(OLD) && result.is_ok() {
            let away = dir.join(format!("{name}{OLD}"));
            result = std::fs::rename(entry.path(), &away);
            moved.push((entry.path(), away));
        }
    }
    let result = result.and_then(|()| generate(paths));
    for (path, away) in &moved {
        // One that is still away after a failure comes back.
        match &result {
            Ok(()) => drop(std::fs::remove_file(away)),
            Err(_) => drop(std::fs::rename(away, path)),
        }
    }
    result?;
    reload_sshd(paths)
}

fn generate(paths: &Paths) -> io::Result<()> {
    let mut command = Command::new("ssh-keygen");
    command.arg("-A").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::piped());
    if let Some(root) = paths.other_root() {
        command.arg("-f").arg(root);
    }
    child::own(&mut command);
    let output = command.output()?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(format!("ssh-keygen: {}", String::from_utf8_lossy(&output.stderr).trim_end())))
}

/// Has a server that runs read its keys again.
fn reload_sshd(paths: &Paths) -> io::Result<Remark> {
    let pid = ["run/sshd.pid", "var/run/sshd.pid"].map(|path| paths.at(path)).into_iter().find_map(|path| {
        let pid = std::fs::read_to_string(path).ok()?.trim().parse().ok()?;
        let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).ok()?;
        if name.trim_end() == "sshd" { Pid::from_raw(pid) } else { None }
    });
    match pid {
        Some(pid) => Ok(kill_process(pid, Signal::HUP).map(|()| None)?),
        None => Ok(Some("no SSH server runs".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machines_own_names_in_hosts_are_changed_and_no_others() {
        let hosts = "# old\n127.0.0.1 localhost\n127.0.1.1\told.lan old\n10.0.0.2 old\n";
        let want = "# old\n127.0.0.1 localhost\n127.0.1.1\told.lan\tnew\n10.0.0.2 old\n";
        assert_eq!(rename_in_hosts(hosts, "old", "new"), want);
        assert_eq!(rename_in_hosts(want, "new", "new"), want);
        assert_eq!(rename_in_hosts("127.0.0.1 localhost\n", "old", "new"), "127.0.0.1 localhost\n127.0.1.1\tnew\n");
    }

    #[test]
    fn a_machine_id_is_written_where_there_is_one() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::new(dir.path());
        let file = paths.at("etc/machine-id");
        for bad in ["", "0123", &"G".repeat(32), &"A".repeat(32)] {
            assert!(set_machine_id(&file, bad).is_err());
        }
        let id = "0123456789abcdef0123456789abcdef";
        assert!(set_machine_id(&file, id).unwrap().is_some());
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        std::fs::write(dir.path().join("etc/machine-id"), "old\n").unwrap();
        assert_eq!(set_machine_id(&file, id).unwrap(), None);
        assert_eq!(std::fs::read_to_string(dir.path().join("etc/machine-id")).unwrap(), format!("{id}\n"));
        assert_eq!(std::fs::read_dir(dir.path().join("etc")).unwrap().count(), 1);
    }

    #[test]
    fn new_ssh_keys_take_the_place_of_the_old() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::new(dir.path());
        assert!(new_ssh_keys(&paths).unwrap().unwrap().contains("no SSH"));
        let ssh = dir.path().join("etc/ssh");
        std::fs::create_dir_all(&ssh).unwrap();
        std::fs::write(ssh.join("ssh_host_ed25519_key"), "old").unwrap();
        std::fs::write(ssh.join("sshd_config"), "config").unwrap();
        let result = new_ssh_keys(&paths);
        let key = std::fs::read_to_string(ssh.join("ssh_host_ed25519_key")).unwrap();
        if Command::new("ssh-keygen").arg("-?").stderr(Stdio::null()).status().is_err() {
            assert!(result.is_err());
            assert_eq!(key, "old", "without a program for it, the old keys stay");
            return println!("ssh-keygen is not here: new keys were not tested");
        }
        result.unwrap();
        assert!(key.contains("PRIVATE KEY"), "{key}");
        assert_eq!(std::fs::read_to_string(ssh.join("sshd_config")).unwrap(), "config");
        let left = std::fs::read_dir(&ssh)
            .unwrap()
            .filter(|e| e.as_ref().unwrap().file_name().to_string_lossy().ends_with(".ramet-old"));
        assert_eq!(left.count(), 0);
    }
}
