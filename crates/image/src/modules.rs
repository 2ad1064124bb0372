//! The kernel's modules that a guest needs, in the order of their dependencies, as told by the modules themselves.

use crate::error::{ImageError, Named};
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A module, unpacked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Module {
    /// Its name, with `_` for `-`.
    pub(crate) name: String,
    pub(crate) bytes: Vec<u8>,
    pub(crate) depends: Vec<String>,
}

/// All modules of a kernel, by name.
#[derive(Debug)]
pub(crate) struct Available {
    files: BTreeMap<String, PathBuf>,
}

impl Available {
    /// No modules: a kernel that has all built in.
    pub(crate) fn none() -> Self {
        Self { files: BTreeMap::new() }
    }

    /// Finds the modules under a directory such as `/lib/modules/VERSION`.
    pub(crate) fn find(dir: &Path) -> Result<Self, ImageError> {
        let mut files = BTreeMap::new();
        let mut todo = vec![dir.to_owned()];
        while let Some(dir) = todo.pop() {
            for entry in fs::read_dir(&dir).named("read", &dir)? {
                let entry = entry.named("read", &dir)?;
                let file_name = entry.file_name().to_string_lossy().into_owned();
                if entry.file_type().named("read", &entry.path())?.is_dir() {
                    todo.push(entry.path());
                } else if let Some((stem, "ko" | "ko.xz" | "ko.zst" | "ko.gz")) = file_name.split_once('.') {
                    files.insert(stem.replace('-', "_"), entry.path());
                }
            }
        }
        Ok(Self { files })
    }

    /// The wanted modules and all that they need, each after what it needs. Names that the kernel has built in, or
    /// does not have, are passed over.
    pub(crate) fn closure(&self, wanted: &[&str]) -> Result<Vec<Module>, ImageError> {
        let mut found = Vec::new();
        for name in wanted {
            self.visit(name, &mut Vec::new(), &mut found)?;
        }
        Ok(found)
    }

    fn visit(&self, name: &str, above: &mut Vec<String>, found: &mut Vec<Module>) -> Result<(), ImageError> {
        let name = name.replace('-', "_");
        if above.contains(&name) || found.iter().any(|module| module.name == name) {
            return Ok(());
        }
        let Some(path) = self.files.get(&name) else { return Ok(()) };
        let bytes = read_module(path)?;
        let depends = depends_of(&bytes);
        above.push(name.clone());
        for needed in &depends {
            self.visit(needed, above, found)?;
        }
        above.pop();
        found.push(Module { name, bytes, depends });
        Ok(())
    }
}

fn read_module(path: &Path) -> Result<Vec<u8>, ImageError> {
    let tool = match path.extension().and_then(|extension| extension.to_str()) {
        Some("xz") => "xz",
        Some("zst") => "zstd",
        Some("gz") => "gzip",
        _ => return fs::read(path).named("read", path),
    };
    let output = Command::new(tool)
        .args(["-d", "-c"])
        .arg(path)
        .stdin(Stdio::null())
        .output()
        .map_err(|source| ImageError::Tool { tool: tool.into(), source })?;
    if !output.status.success() {
        let reason = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        return Err(ImageError::Failed { what: format!("unpack {}", path.display()), reason });
    }
    Ok(output.stdout)
}

/// What a module says of itself in its section `.modinfo`: `NUL depends=a,b NUL`.
fn depends_of(module: &[u8]) -> Vec<String> {
    const KEY: &[u8] = b"\0depends=";
    let Some(at) = module.windows(KEY.len()).position(|window| window == KEY) else { return Vec::new() };
    let value = &module[at + KEY.len()..];
    let end = value.iter().position(|&b| b == 0).unwrap_or(value.len());
    let text = String::from_utf8_lossy(&value[..end]);
    text.split(',').filter(|name| !name.is_empty()).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_come_after_what_they_need() {
        let dir = tempfile::tempdir().unwrap();
        let module = |path: &str, depends: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("ELF\0license=GPL\0depends={depends}\0name=x\0")).unwrap();
        };
        module("kernel/a/virtio_console.ko", "virtio,virtio_ring");
        module("kernel/b/virtio.ko", "virtio_ring");
        module("kernel/b/virtio_ring.ko", "");
        module("kernel/c/loop-one.ko", "loop_two");
        module("kernel/c/loop-two.ko", "loop-one,built_in");
        let available = Available::find(dir.path()).unwrap();
        let names = |wanted: &[&str]| -> Vec<String> {
            available.closure(wanted).unwrap().into_iter().map(|module| module.name).collect()
        };
        assert_eq!(names(&["virtio_console", "virtio", "nosuch"]), ["virtio_ring", "virtio", "virtio_console"]);
        assert_eq!(names(&["loop_one"]), ["loop_two", "loop_one"]);
    }

    #[test]
    fn garbage_has_no_dependencies() {
        assert!(depends_of(b"").is_empty());
        assert!(depends_of(b"\0depends=").is_empty());
        assert_eq!(depends_of(b"\0depends=a"), ["a"]);
    }
}
