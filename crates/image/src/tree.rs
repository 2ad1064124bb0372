//! The guest's file system while it is put together: paths in the guest and where their bytes come from.
//!
//! `/bin`, `/sbin` and `/lib*` are links into `/usr`, as in the distributions, whatever a package's own paths are.

use crate::cpio::{Entry, Writer};
use crate::error::{ImageError, Named};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Directories of the root that are links into `/usr`.
const MERGED: [&str; 4] = ["bin", "sbin", "lib", "lib64"];

const TYPE_DIR: u32 = 0o040_000;
const TYPE_FILE: u32 = 0o100_000;
const TYPE_LINK: u32 = 0o120_000;
const TYPE_CHAR: u32 = 0o020_000;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Node {
    Dir,
    Link(String),
    Bytes(Vec<u8>),
    File(PathBuf),
    Char(u32, u32),
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Item {
    node: Node,
    mode: u32,
    owner: (u32, u32),
}

/// A file system in the making. The keys are paths without a leading `/`; parents sort before their children.
#[derive(Debug, Default)]
pub(crate) struct Tree {
    items: BTreeMap<String, Item>,
}

impl Tree {
    /// A tree with the links into `/usr`.
    pub(crate) fn new() -> Self {
        let mut tree = Self::default();
        for name in MERGED {
            tree.dir(&format!("usr/{name}"), 0o755);
            tree.put(name.to_owned(), Node::Link(format!("usr/{name}")), 0o777, (0, 0));
        }
        tree
    }

    pub(crate) fn dir(&mut self, path: &str, mode: u32) {
        self.put(merged(path), Node::Dir, mode, (0, 0));
    }

    pub(crate) fn bytes(&mut self, path: &str, mode: u32, bytes: impl Into<Vec<u8>>) {
        self.put(merged(path), Node::Bytes(bytes.into()), mode, (0, 0));
    }

    pub(crate) fn file(&mut self, path: &str, mode: u32, from: &Path) {
        self.put(merged(path), Node::File(from.to_owned()), mode, (0, 0));
    }

    pub(crate) fn link(&mut self, path: &str, target: &str) {
        self.put(merged(path), Node::Link(target.to_owned()), 0o777, (0, 0));
    }

    pub(crate) fn char_device(&mut self, path: &str, mode: u32, major: u32, minor: u32) {
        self.put(merged(path), Node::Char(major, minor), mode, (0, 0));
    }

    pub(crate) fn has(&self, path: &str) -> bool {
        self.items.contains_key(&merged(path))
    }

    fn put(&mut self, path: String, node: Node, mode: u32, owner: (u32, u32)) {
        if path.is_empty() {
            return;
        }
        if let Some((parent, _)) = path.rsplit_once('/')
            && !self.items.contains_key(parent)
        {
            self.put(parent.to_owned(), Node::Dir, 0o755, (0, 0));
        }
        // A directory is not replaced by a directory's later attributes only when it is one of the links above.
        let links_dir = self.items.get(&path).is_some_and(|old| matches!(old.node, Node::Link(_)));
        if !(links_dir && node == Node::Dir) {
            self.items.insert(path, Item { node, mode, owner });
        }
    }

    /// Adds what lies under `from` on the host as `to` in the guest. `keep` says which guest paths to take; owners are
    /// taken over only if asked for.
    pub(crate) fn add_host(
        &mut self,
        from: &Path,
        to: &str,
        owners: bool,
        keep: &dyn Fn(&str) -> bool,
    ) -> Result<(), ImageError> {
        let path = merged(to);
        if !keep(&path) {
            return Ok(());
        }
        let metadata = fs::symlink_metadata(from).named("read", from)?;
        let owner = if owners { (metadata.uid(), metadata.gid()) } else { (0, 0) };
        let mode = metadata.permissions().mode() & 0o7777;
        let kind = metadata.file_type();
        if kind.is_dir() {
            self.put(path, Node::Dir, mode, owner);
            let mut names = Vec::new();
            for entry in fs::read_dir(from).named("read", from)? {
                names.push(entry.named("read", from)?.file_name());
            }
            names.sort();
            for name in names {
                let Some(text) = name.to_str() else {
                    let what = from.join(&name).display().to_string();
                    return Err(ImageError::BadAdd { what, reason: "its name is not UTF-8".into() });
                };
                self.add_host(&from.join(text), &format!("{to}/{text}"), owners, keep)?;
            }
        } else if kind.is_symlink() {
            let target = fs::read_link(from).named("read", from)?;
            self.put(path, Node::Link(target.to_string_lossy().into_owned()), 0o777, owner);
        } else if kind.is_file() {
            self.put(path, Node::File(from.to_owned()), mode, owner);
        } else if !kind.is_socket() {
            let what = from.display().to_string();
            return Err(ImageError::BadAdd { what, reason: "it is a device or a pipe".into() });
        }
        Ok(())
    }

    /// Lays everything over the directory `root`. What is there and is no directory is replaced; directories that are
    /// there stay as they are. Links of directories count as in the guest: nothing outside `root` is touched.
    pub(crate) fn lay_over(&self, root: &Path) -> Result<(), ImageError> {
        for (path, item) in &self.items {
            let (parent, name) = path.rsplit_once('/').unwrap_or(("", path));
            let to = inside(root, parent, 0).named("follow", &root.join(parent))?.join(name);
            if item.node == Node::Dir && inside(root, path, 0).is_ok_and(|dir| dir.is_dir()) {
                continue;
            }
            match fs::symlink_metadata(&to) {
                // The links of a merged root.
                Ok(there) if there.is_dir() && matches!(item.node, Node::Link(_)) => continue,
                Ok(_) => fs::remove_file(&to).named("replace", &to)?,
                Err(_) => {}
            }
            match &item.node {
                Node::Dir => fs::create_dir(&to).named("make", &to)?,
                Node::Link(target) => std::os::unix::fs::symlink(target, &to).named("make", &to)?,
                Node::Bytes(bytes) => fs::write(&to, bytes).named("write", &to)?,
                Node::File(from) => {
                    fs::copy(from, &to).named("copy", from)?;
                    let modified = fs::metadata(from).and_then(|metadata| metadata.modified()).named("read", from)?;
                    let set = File::options().write(true).open(&to).and_then(|file| file.set_modified(modified));
                    set.named("write", &to)?;
                }
                Node::Char(..) => continue,
            }
            let (uid, gid) = item.owner;
            std::os::unix::fs::lchown(&to, Some(uid), Some(gid)).named("change the owner of", &to)?;
            if !matches!(item.node, Node::Link(_)) {
                fs::set_permissions(&to, fs::Permissions::from_mode(item.mode)).named("change", &to)?;
            }
        }
        Ok(())
    }

    /// Writes everything.
    pub(crate) fn write<W: Write>(&self, to: W, path_of_archive: &Path) -> Result<W, ImageError> {
        let mut writer = Writer::new(to);
        for (path, item) in &self.items {
            let (uid, gid) = item.owner;
            let entry = Entry { path, uid, gid, ..Entry::default() };
            let result = match &item.node {
                Node::Dir => writer.add(Entry { mode: TYPE_DIR | item.mode, ..entry }, &[]),
                Node::Link(target) => writer.add(Entry { mode: TYPE_LINK | item.mode, ..entry }, target.as_bytes()),
                Node::Bytes(bytes) => writer.add(Entry { mode: TYPE_FILE | item.mode, ..entry }, bytes),
                Node::Char(major, minor) => {
                    writer.add(Entry { mode: TYPE_CHAR | item.mode, device: (*major, *minor), ..entry }, &[])
                }
                Node::File(from) => {
                    let bytes = fs::read(from).named("read", from)?;
                    writer.add(Entry { mode: TYPE_FILE | item.mode, ..entry }, &bytes)
                }
            };
            result.named("write", path_of_archive)?;
        }
        writer.finish().named("write", path_of_archive)
    }
}

/// Where a path of the guest is on the host: all its links followed as if `root` were the root.
fn inside(root: &Path, path: &str, depth: u8) -> io::Result<PathBuf> {
    if depth > 40 {
        return Err(io::Error::other("too many links"));
    }
    // Within the root, without a leading `/`.
    let mut at = PathBuf::new();
    for part in path.split('/').filter(|part| !part.is_empty() && *part != ".") {
        if part == ".." {
            at.pop();
            continue;
        }
        match fs::read_link(root.join(&at).join(part)) {
            Ok(target) => {
                let base = if target.is_absolute() { Path::new("") } else { &at };
                let target = target.to_str().ok_or_else(|| io::Error::other("a link that is not UTF-8"))?;
                let next = format!("{}/{target}", base.display());
                at = inside(root, &next, depth + 1)?.strip_prefix(root).map_err(io::Error::other)?.to_owned();
            }
            Err(_) => at.push(part),
        }
    }
    Ok(root.join(at))
}

/// The path without leading `/` and `.`, and with `/bin` and the like under `/usr`.
fn merged(path: &str) -> String {
    let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
    let plain = parts.join("/");
    match parts.first() {
        Some(first) if parts.len() > 1 && MERGED.contains(first) => format!("usr/{plain}"),
        _ => plain,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(tree: &Tree) -> Vec<&str> {
        tree.items.keys().map(String::as_str).collect()
    }

    #[test]
    fn packages_of_old_layout_end_up_under_usr() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("bin")).unwrap();
        fs::create_dir_all(dir.path().join("usr/share/doc/x")).unwrap();
        fs::write(dir.path().join("bin/tool"), b"x").unwrap();
        fs::write(dir.path().join("usr/share/doc/x/copyright"), b"x").unwrap();
        let mut tree = Tree::new();
        tree.add_host(dir.path(), "", false, &|path| !path.starts_with("usr/share/doc")).unwrap();
        assert!(tree.has("usr/bin/tool") && tree.has("/bin/tool") && !tree.has("usr/share/doc"));
        assert_eq!(tree.items["bin"].node, Node::Link("usr/bin".into()), "the link survives a package's directory");
        assert_eq!(tree.items["usr/bin/tool"].node, Node::File(dir.path().join("bin/tool")));
    }

    #[test]
    fn parents_are_made_and_come_first_and_the_same_tree_gives_the_same_bytes() {
        let make = |reverse: bool| {
            let mut tree = Tree::default();
            let mut files = [("a/b/c", "1"), ("a/b-d", "2"), ("z", "3")];
            if reverse {
                files.reverse();
            }
            for (path, text) in files {
                tree.bytes(path, 0o644, text);
            }
            tree
        };
        assert_eq!(keys(&make(false)), ["a", "a/b", "a/b-d", "a/b/c", "z"]);
        let bytes = |tree: Tree| tree.write(Vec::new(), Path::new("x")).unwrap();
        assert_eq!(bytes(make(false)), bytes(make(true)));
    }

    #[test]
    fn a_tree_is_laid_over_another_and_replaces_links_instead_of_what_they_point_to() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        fs::create_dir_all(root.join("usr/bin")).unwrap();
        fs::create_dir(root.join("etc")).unwrap();
        std::os::unix::fs::symlink("usr/bin", root.join("bin")).unwrap();
        fs::write(dir.path().join("outside"), "mine").unwrap();
        std::os::unix::fs::symlink(dir.path().join("outside"), root.join("etc/resolv.conf")).unwrap();
        let mut tree = Tree::default();
        tree.bytes("/etc/resolv.conf", 0o600, "new");
        tree.bytes("/bin/tool", 0o755, "tool");
        tree.link("/etc/unit", "/dev/null");
        tree.dir("/srv/deep", 0o700);
        // Such links are in every Debian system; they must not lead out of it.
        std::os::unix::fs::symlink("/run", root.join("var-run")).unwrap();
        std::os::unix::fs::symlink("../../../../run", root.join("etc/up")).unwrap();
        fs::create_dir(root.join("run")).unwrap();
        tree.bytes("/var-run/ramet-test-one", 0o644, "one");
        tree.bytes("/etc/up/ramet-test-two", 0o644, "two");
        if !rustix::process::geteuid().is_root() {
            return;
        }
        for _ in 0..2 {
            tree.lay_over(&root).unwrap();
            assert_eq!(fs::read(root.join("etc/resolv.conf")).unwrap(), b"new");
            assert_eq!(fs::read(dir.path().join("outside")).unwrap(), b"mine");
            assert_eq!(fs::metadata(root.join("usr/bin/tool")).unwrap().permissions().mode() & 0o7777, 0o755);
            assert_eq!(fs::metadata(root.join("srv/deep")).unwrap().permissions().mode() & 0o7777, 0o700);
            assert_eq!(fs::read(root.join("run/ramet-test-one")).unwrap(), b"one");
            assert_eq!(fs::read(root.join("run/ramet-test-two")).unwrap(), b"two");
            assert!(!Path::new("/run/ramet-test-one").exists() && !Path::new("/run/ramet-test-two").exists());
            assert_eq!(fs::read_link(root.join("etc/unit")).unwrap(), Path::new("/dev/null"));
        }
    }

    #[test]
    fn devices_cannot_be_added() {
        let error = Tree::new().add_host(Path::new("/dev/null"), "/x", false, &|_| true).unwrap_err();
        assert!(matches!(error, ImageError::BadAdd { .. }), "{error}");
    }
}
