//! What a VM is given after its VMM was started: disks and network cards.

use crate::VmmError;
use serde_json::{Value, json};
use std::{
    fs::{self, File, FileTimes},
    io,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
    time::SystemTime,
};

/// Most characters of a node's name in QEMU.
pub const MAX_NODE_NAME: usize = 31;

/// Names of the nodes of bases: a raw file's, an NBD server's.
pub(crate) const BASES: [&str; 2] = ["golden", "origin"];

/// A copy-on-write disk as one VM opens it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DiskChain {
    /// What lies below all layers.
    pub base: Base,
    /// Frozen layers (qcow2 without a backing name), oldest first.
    pub layers: Vec<PathBuf>,
    /// The overlay (qcow2 without a backing name) that the VM writes to.
    pub active: PathBuf,
}

/// The lowest part of a disk.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Base {
    /// A raw file that is never written to.
    Raw(PathBuf),
    /// An NBD server on a Unix socket, with its export's name.
    Nbd(PathBuf, String),
    /// Nothing: zeros.
    None,
}

impl Base {
    /// The name of its node, if it has one.
    pub(crate) const fn node(&self) -> Option<&'static str> {
        match self {
            Self::Raw(_) => Some(BASES[0]),
            Self::Nbd(..) => Some(BASES[1]),
            Self::None => None,
        }
    }
}

/// One frozen layer of a disk instead of several: see [`crate::VmProcess::swap_layers`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerSwap {
    /// The frozen layer right below those that go; none: they are the lowest ones.
    pub below: Option<PathBuf>,
    /// Those that go, oldest first.
    pub old: Vec<PathBuf>,
    /// What comes (qcow2 without a backing name).
    pub merged: PathBuf,
    /// The frozen layer right above them.
    pub above: PathBuf,
}

impl DiskChain {
    /// The name of the node of an overlay: its file's name.
    #[must_use]
    pub fn node(overlay: &Path) -> String {
        let name = overlay.file_stem().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
        let letters = name.chars().filter(char::is_ascii_alphanumeric).take(MAX_NODE_NAME - 1);
        // A name begins with a letter.
        std::iter::once('d').chain(letters).collect()
    }
}

/// A network card.
#[derive(Debug)]
pub struct Nic {
    /// Which one, from 0.
    pub index: u8,
    /// Its address after a reset of the device; until then a clone's has that of its parent.
    pub mac: String,
    /// A tap device with `IFF_VNET_HDR`.
    pub tap: OwnedFd,
}

/// The node of a file. The host's page cache is kept at `cont`, which matters: else a clone begins with cold files.
fn file(path: &Path, read_only: bool) -> Value {
    json!({ "driver": "file", "filename": path, "read-only": read_only, "drop-cache": false, "aio": "threads" })
}

/// A raw file that is only read, handed over as set of descriptors `set`: its user may not be able to come to it.
pub(crate) fn raw(name: &str, set: u32) -> Value {
    let file = json!({
        "driver": "file", "filename": format!("/dev/fdset/{set}"), "read-only": true, "drop-cache": false, "locking": "off",
    });
    json!({ "driver": "raw", "node-name": name, "read-only": true, "file": file })
}

/// The export of an NBD server. Without a delay for reconnecting: the guest stops, and is continued by whoever knows more.
pub(crate) fn nbd(name: &str, socket: &Path, export: &str) -> Value {
    json!({
        "driver": "nbd", "node-name": name, "read-only": true, "export": export, "reconnect-delay": 0,
        "server": { "type": "unix", "path": socket },
    })
}

/// A layer that is only read.
pub(crate) fn frozen(layer: &Path, backing: Option<&str>) -> Value {
    json!({
        "driver": "qcow2", "node-name": DiskChain::node(layer), "read-only": true, "backing": backing,
        "file": file(layer, true),
    })
}

/// An overlay to write to. Its contents need not outlive the host, so nothing is flushed.
pub(crate) fn active(layer: &Path, backing: Option<&str>) -> Value {
    json!({
        "driver": "qcow2", "node-name": DiskChain::node(layer), "backing": backing, "discard": "unmap",
        "cache": { "no-flush": true },
        "file": {
            "driver": "file", "filename": layer, "drop-cache": false, "aio": "threads", "discard": "unmap",
            "cache": { "no-flush": true },
        },
    })
}

/// Dates an overlay that nothing was written to yet back to the beginning of time.
pub(crate) fn mark_untouched(overlay: &Path) -> io::Result<()> {
    File::options().write(true).open(overlay)?.set_times(FileTimes::new().set_modified(SystemTime::UNIX_EPOCH))
}

/// Whether nothing was written to it since. Whatever a guest writes, or discards, changes clusters or their tables, which
/// are in the file when QEMU has flushed it; and no write leaves a file's date so far back.
pub(crate) fn is_untouched(overlay: &Path) -> io::Result<bool> {
    Ok(fs::metadata(overlay)?.modified()? == SystemTime::UNIX_EPOCH)
}

/// The node that is attached to a device, in the answer to `query-block`.
pub(crate) fn node_of(answer: &Value, device: &str) -> Option<String> {
    let entries = answer.as_array()?;
    let path = format!("/machine/peripheral/{device}");
    let is_it = |entry: &&Value| {
        let qdev = entry.get("qdev").and_then(Value::as_str).unwrap_or_default();
        qdev == device || qdev.strip_prefix(&path).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
    };
    let inserted = entries.iter().find(is_it)?.get("inserted")?;
    inserted.get("node-name").and_then(Value::as_str).map(str::to_owned)
}

/// What an event says of a disk that failed; none: it is about something else, or the guest goes on.
pub(crate) fn failure(name: &str, data: &Value) -> Option<String> {
    if name != "BLOCK_IO_ERROR" || data.get("action").and_then(Value::as_str) != Some("stop") {
        return None;
    }
    if data.get("nospace").and_then(Value::as_bool) == Some(true) {
        return Some("no room is left on the host for what it writes to its disk".to_owned());
    }
    let operation = data.get("operation").and_then(Value::as_str).unwrap_or("use");
    let reason = data.get("reason").and_then(Value::as_str).unwrap_or("no reason given");
    Some(format!("its disk can't be {}: {reason}", if operation == "read" { "read" } else { "written" }))
}

/// An answer that lacks what it must have.
pub(crate) fn lacks(command: &str, what: &str) -> VmmError {
    VmmError::Refused { command: command.to_owned(), message: format!("the answer has no {what}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_node_has_the_name_of_its_file() {
        let name = DiskChain::node(Path::new("/x/0123456789abcdef0123456789abcdef.qcow2"));
        assert_eq!(name, "d0123456789abcdef0123456789abcd");
        assert!(name.len() <= MAX_NODE_NAME);
    }

    #[test]
    fn a_write_is_seen_however_soon_it_comes() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("overlay");
        fs::write(&file, b"header").unwrap();
        mark_untouched(&file).unwrap();
        assert!(is_untouched(&file).unwrap());
        // Neither larger nor with other blocks.
        std::os::unix::fs::FileExt::write_at(&File::options().write(true).open(&file).unwrap(), b"H", 0).unwrap();
        assert!(!is_untouched(&file).unwrap());
    }

    #[test]
    fn the_node_of_a_device_is_found() {
        let answer = json!([
            { "device": "x", "qdev": "/machine/peripheral/disk01/virtio-backend", "inserted": { "node-name": "no" } },
            { "device": "", "qdev": "/machine/peripheral/disk0/virtio-backend", "inserted": { "node-name": "yes" } },
        ]);
        assert_eq!(node_of(&answer, "disk0").as_deref(), Some("yes"));
        assert_eq!(node_of(&answer, "disk1"), None);
        assert_eq!(node_of(&json!({}), "disk0"), None);
    }

    #[test]
    fn a_full_host_is_told_from_a_broken_disk() {
        let event = |more: Value| {
            let mut data = json!({ "action": "stop", "operation": "write", "reason": "No space left" });
            data.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
            failure("BLOCK_IO_ERROR", &data)
        };
        assert!(event(json!({ "nospace": true })).unwrap().contains("no room"));
        assert!(event(json!({ "operation": "read", "reason": "Input/output error" })).unwrap().contains("read: Input"));
        assert_eq!(event(json!({ "action": "report" })), None);
        assert_eq!(failure("STOP", &json!({ "action": "stop" })), None);
    }
}
