//! Where things are in the guest. Tests put all of it below a directory of their own.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// The root of everything that the agent reads and writes, but for `/dev` and `/proc`.
#[derive(Clone, Debug)]
pub(crate) struct Paths(PathBuf);

impl Paths {
    pub(crate) fn new(root: impl Into<PathBuf>) -> Self {
        Self(root.into())
    }

    /// The root itself, unless it is the machine's own.
    pub(crate) fn other_root(&self) -> Option<&Path> {
        (self.0 != Path::new("/")).then_some(&self.0)
    }

    /// A path given as seen from the root, without its first `/`.
    pub(crate) fn at(&self, path: &str) -> PathBuf {
        self.0.join(path)
    }

    /// Where programs find out who they are.
    pub(crate) fn id(&self) -> PathBuf {
        self.at("run/ramet/id")
    }

    /// A number that programs may poll.
    pub(crate) fn generation(&self) -> PathBuf {
        self.at("run/ramet/generation")
    }

    /// The socket for programs in the guest.
    pub(crate) fn socket(&self) -> PathBuf {
        self.at("run/ramet/agent.sock")
    }
}

/// Replaces a file as a whole, so that it can be watched and no one reads half of it. Keeps its mode, and follows a
/// link. Where the directory does not let it be replaced (a file that is a mount of its own), writes into it.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let path = path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let mut partial = path.clone().into_os_string();
    partial.push(".ramet-new");
    let mode = std::fs::metadata(&path).map_or(0o644, |found| found.permissions().mode() & 0o7777);
    let whole = std::fs::write(&partial, bytes)
        .and_then(|()| std::fs::set_permissions(&partial, std::fs::Permissions::from_mode(mode)))
        .and_then(|()| std::fs::rename(&partial, &path));
    let Err(error) = whole else { return Ok(()) };
    drop(std::fs::remove_file(&partial));
    if path.exists() { std::fs::write(&path, bytes) } else { Err(error) }
}
