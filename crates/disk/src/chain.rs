//! The files of a frozen disk, as QEMU and its tools are told of them.

use crate::{DiskId, ExtentMap, Kind, MAX_DISK, PAGE, extents::ExtentError, pages};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::{
    fs, io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

/// Most overlays of a chain. QEMU gets slow long before ([`ChainError::TooDeep`]).
pub const MAX_LAYERS: usize = 256;

/// Why a chain cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ChainError {
    /// A size that no disk can have.
    #[error("No disk can have {size} bytes: take a multiple of 512, at most {MAX_DISK} bytes")]
    Size {
        /// The size.
        size: u64,
    },
    /// Neither a golden image nor an overlay.
    #[error("The chain has no files: name its golden image or its overlays")]
    Empty,
    /// A golden image and a frozen disk of another host.
    #[error("The chain has two bases: name either a golden image or an origin")]
    TwoBases,
    /// Too many overlays.
    #[error("The chain has {layers} overlays, the limit is {MAX_LAYERS}: have them merged (`rametd --merge-layers`)")]
    TooDeep {
        /// How many it has.
        layers: usize,
    },
    /// A file that is not there.
    #[error("Cannot read {path}, a file of the frozen disk: was its checkpoint removed?")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A path that JSON cannot say.
    #[error("{path} is no text in UTF-8: give the disk's directory another name")]
    Path {
        /// The path.
        path: PathBuf,
    },
    /// `qemu-img` is missing.
    #[error("Cannot run qemu-img: install the package qemu-utils")]
    NoQemuImg(#[source] io::Error),
    /// `qemu-img` failed.
    #[error("qemu-img cannot read the frozen disk {path}: {message}")]
    QemuImg {
        /// The uppermost overlay.
        path: PathBuf,
        /// What it said.
        message: String,
    },
    /// Its answer makes no sense.
    #[error("qemu-img's map of {path} cannot be used")]
    Map {
        /// The uppermost overlay.
        path: PathBuf,
        /// Why.
        #[source]
        source: ExtentError,
    },
}

/// A golden image: a raw file that never changes, known by its content.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct GoldenRef {
    /// The hash of its content.
    pub hash: String,
    /// Its size in bytes. It may be smaller than the disk: what follows is zero.
    pub size: u64,
}

/// A frozen overlay.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LayerFile {
    /// The frozen disk whose uppermost overlay it is.
    pub disk: DiskId,
    /// The file, on the host of its checkpoint. Mode 0444.
    pub path: PathBuf,
}

/// What a frozen disk is made of, for records and descriptors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChainSpec {
    /// The disk's size in bytes.
    pub size: u64,
    /// What lies at the bottom; `None`: zeros.
    pub golden: Option<GoldenRef>,
    /// The overlays, oldest first.
    pub layers: Vec<LayerFile>,
}

impl ChainSpec {
    /// The files on this host, where the golden image lies at `golden`.
    #[must_use]
    pub fn paths(&self, golden: Option<&Path>) -> ChainPaths {
        ChainPaths {
            size: self.size,
            golden: golden.filter(|_| self.golden.is_some()).map(Path::to_owned),
            origin: None,
            layers: self.layers.iter().map(|layer| layer.path.clone()).collect(),
        }
    }
}

/// The files of a frozen disk on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChainPaths {
    /// The disk's size in bytes.
    pub size: u64,
    /// The golden image; `None`: zeros.
    pub golden: Option<PathBuf>,
    /// The socket of the NBD server of a frozen disk of another host, in the place of the golden image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<PathBuf>,
    /// The overlays, oldest first. None at all: the disk is its golden image.
    pub layers: Vec<PathBuf>,
}

impl ChainPaths {
    /// Checks that the chain makes sense and that its files are there.
    ///
    /// # Errors
    /// [`ChainError`].
    pub fn check(&self) -> Result<(), ChainError> {
        if self.size == 0 || !self.size.is_multiple_of(512) || self.size > MAX_DISK {
            return Err(ChainError::Size { size: self.size });
        }
        if self.layers.len() > MAX_LAYERS {
            return Err(ChainError::TooDeep { layers: self.layers.len() });
        }
        match (&self.golden, &self.origin) {
            (Some(_), Some(_)) => return Err(ChainError::TwoBases),
            (None, None) if self.layers.is_empty() => return Err(ChainError::Empty),
            _ => {}
        }
        let missing = |path: &Path| {
            let path = path.to_owned();
            |source| ChainError::File { path, source }
        };
        if let Some(socket) = &self.origin {
            fs::metadata(socket).map_err(missing(socket))?;
            text(socket)?;
        }
        for path in self.files() {
            fs::File::open(path).map_err(missing(path))?;
            text(path)?;
        }
        Ok(())
    }

    /// All files but a socket, lowest first.
    fn files(&self) -> impl Iterator<Item = &Path> {
        self.golden.iter().chain(&self.layers).map(PathBuf::as_path)
    }

    /// The chain as QEMU block nodes, lowest first, for `blockdev-add` or `--blockdev`. All are read-only, take no locks,
    /// and leave the host's page cache alone at `cont`. The uppermost node is called `PREFIX-top`.
    ///
    /// # Errors
    /// [`ChainError::Path`].
    pub fn nodes(&self, prefix: &str) -> Result<Vec<Value>, ChainError> {
        let mut nodes = Vec::new();
        let mut below = Value::Null;
        let above = usize::from(self.origin.is_some());
        let count = above + self.files().count();
        let name = |number: usize| match number + 1 == count {
            true => format!("{prefix}-top"),
            false => format!("{prefix}-{number}"),
        };
        if let Some(socket) = &self.origin {
            let name = name(0);
            nodes.push(json!({
                "node-name": name, "driver": "nbd", "read-only": true, "force-share": true, "export": "",
                "server": {"type": "unix", "path": text(socket)?},
            }));
            below = Value::String(name);
        }
        for (number, path) in (above..).zip(self.files()) {
            let raw = number == 0 && self.golden.is_some();
            let name = name(number);
            let mut node = json!({
                "node-name": name, "driver": if raw { "raw" } else { "qcow2" },
                "read-only": true, "force-share": true, "cache": {"direct": false},
                "file": {
                    "driver": "file", "filename": text(path)?, "read-only": true, "force-share": true,
                    "drop-cache": false, "cache": {"direct": false},
                },
            });
            if !raw {
                node["backing"] = below;
            } else if fs::metadata(path).is_ok_and(|m| !m.len().is_multiple_of(512)) {
                // QEMU rounds the size up and reads zeros there.
                tracing::debug!(path = %path.display(), "the golden image's size is no multiple of 512");
            }
            below = Value::String(name);
            nodes.push(node);
        }
        Ok(nodes)
    }

    /// The overlays without what lies below them, as a file name for `qemu-img`.
    fn overlays(&self) -> Result<String, ChainError> {
        self.over(Value::Null)
    }

    /// The whole disk, as a file name for `qemu-img -U`.
    ///
    /// # Errors
    /// [`ChainError`].
    pub fn whole(&self) -> Result<String, ChainError> {
        self.check()?;
        self.over(match (&self.origin, &self.golden) {
            (Some(socket), _) => {
                json!({"driver": "nbd", "export": "", "server": {"type": "unix", "path": text(socket)?}})
            }
            (None, Some(path)) => {
                json!({"driver": "raw", "file": {"driver": "file", "filename": text(path)?, "drop-cache": false}})
            }
            (None, None) => Value::Null,
        })
    }

    fn over(&self, mut below: Value) -> Result<String, ChainError> {
        for path in &self.layers {
            below = json!({
                "driver": "qcow2", "backing": below,
                "file": {"driver": "file", "filename": text(path)?, "drop-cache": false},
            });
        }
        Ok(format!("json:{below}"))
    }
}

fn text(path: &Path) -> Result<&str, ChainError> {
    path.to_str().ok_or_else(|| ChainError::Path { path: path.to_owned() })
}

/// A line of `qemu-img map --output=json`.
#[derive(Debug, Deserialize)]
struct Mapped {
    start: u64,
    length: u64,
    present: bool,
    zero: bool,
}

/// Which pages of a frozen disk are golden, zero or data. Looks at the overlays only, so its cost grows with what they
/// hold and not with the disk. `origin`: the map of the chain's origin; without it all that is read from there is data.
///
/// # Errors
/// [`ChainError`].
pub fn extents(chain: &ChainPaths, origin: Option<&ExtentMap>) -> Result<ExtentMap, ChainError> {
    chain.check()?;
    let base = below(chain, origin)?;
    let Some(top) = chain.layers.last() else { return Ok(base) };
    let output = Command::new("qemu-img")
        .args(["map", "-U", "--output=json"])
        .arg(chain.overlays()?)
        .stdin(Stdio::null())
        .output()
        .map_err(ChainError::NoQemuImg)?;
    let failed = |message: String| ChainError::QemuImg { path: top.clone(), message };
    if !output.status.success() {
        return Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned()));
    }
    let mapped: Vec<Mapped> = serde_json::from_slice(&output.stdout).map_err(|err| failed(err.to_string()))?;
    let end = mapped.last().map_or(0, |m| m.start.saturating_add(m.length));
    if end != chain.size {
        return Err(failed(format!("it has {end} bytes, {} were expected", chain.size)));
    }
    let runs = mapped.iter().map(|m| (m.start, m.length, m.present, m.zero));
    by_pages(&base, runs).map_err(|source| ChainError::Map { path: top.clone(), source })
}

/// The map of what lies below the overlays.
fn below(chain: &ChainPaths, origin: Option<&ExtentMap>) -> Result<ExtentMap, ChainError> {
    let map = match (&chain.origin, &chain.golden) {
        (Some(_), _) => match origin.filter(|map| map.size() == chain.size) {
            Some(map) => Ok(map.clone()),
            None => ExtentMap::uniform(chain.size, Kind::Data),
        },
        (None, golden) => {
            let size = match golden {
                Some(path) => {
                    let meta = fs::metadata(path).map_err(|source| ChainError::File { path: path.clone(), source });
                    meta?.len()
                }
                None => 0,
            };
            let golden = pages(size.min(chain.size));
            // What no overlay has is golden as far as the golden image reaches, and zero beyond.
            ExtentMap::from_runs(chain.size, [(golden, Kind::Golden), (pages(chain.size) - golden, Kind::Zero)])
        }
    };
    let path = chain.origin.as_ref().or(chain.golden.as_ref()).cloned().unwrap_or_default();
    map.map_err(|source| ChainError::Map { path, source })
}

/// Turns runs of bytes into runs of pages: a page that is not of one kind is data. What is in no overlay is as in `base`.
fn by_pages(base: &ExtentMap, mapped: impl Iterator<Item = (u64, u64, bool, bool)>) -> Result<ExtentMap, ExtentError> {
    let size = base.size();
    let mut runs: Vec<(u64, Kind)> = Vec::new();
    let mut covered = 0;
    let mut push = |end: u64, kind: Kind| {
        if end > covered {
            runs.push((end - covered, kind));
            covered = end;
        }
    };
    // The page that the run before ended inside, and the kind of its part, if it was one.
    let mut open: Option<(u64, Kind)> = None;
    for (start, length, present, zero) in mapped {
        let end = start + length;
        let below = base
            .between(start / PAGE, end.div_ceil(PAGE))
            .map(|e| ((e.start * PAGE).max(start), (e.end() * PAGE).min(end), e.kind));
        let parts: &mut dyn Iterator<Item = (u64, u64, Kind)> = match (present, zero) {
            (false, _) => &mut { below },
            (true, true) => &mut std::iter::once((start, end, Kind::Zero)),
            (true, false) => &mut std::iter::once((start, end, Kind::Data)),
        };
        for (start, end, kind) in parts {
            let mut first = start / PAGE;
            if let Some((page, before)) = open {
                let kind = if before == kind { kind } else { Kind::Data };
                if end < (page + 1) * PAGE && end < size {
                    open = Some((page, kind));
                    continue;
                }
                push(page + 1, kind);
                open = None;
                first = page + 1;
            }
            let last = if end == size { pages(size) } else { end / PAGE };
            if last > first {
                push(last, kind);
            }
            if end < size && !end.is_multiple_of(PAGE) && end / PAGE >= first {
                open = Some((end / PAGE, kind));
            }
        }
    }
    ExtentMap::from_runs(size, runs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn pages_of_several_kinds_are_data(
            runs in prop::collection::vec((1u64..30, 0u8..3), 1..40),
            base in prop::collection::vec((0u64..20, 0u8..3), 0..8),
        ) {
            let mut at = 0;
            let mut mapped = Vec::new();
            let mut model = Vec::new();
            for (sectors, kind) in runs {
                mapped.push((at * 512, sectors * 512, kind != 0, kind == 1));
                model.extend((at..at + sectors).map(|sector| (sector, kind)));
                at += sectors;
            }
            let base = base.iter().map(|&(len, k)| (len, [Kind::Golden, Kind::Zero, Kind::Data][usize::from(k)]));
            let mut left = pages(at * 512);
            let mut cut: Vec<_> = base.map(|(len, kind)| { let len = len.min(left); left -= len; (len, kind) }).collect();
            cut.push((left, Kind::Golden));
            let base = ExtentMap::from_runs(at * 512, cut).unwrap();
            let model: Vec<Kind> = model.into_iter().map(|(sector, kind)| match kind {
                0 => base.at(sector / 8).unwrap().kind,
                1 => Kind::Zero,
                _ => Kind::Data,
            }).collect();
            let map = by_pages(&base, mapped.into_iter()).unwrap();
            for (page, sectors) in model.chunks(8).enumerate() {
                let wanted = if sectors.iter().all(|k| *k == sectors[0]) { sectors[0] } else { Kind::Data };
                prop_assert_eq!(map.at(page as u64).unwrap().kind, wanted, "page {}", page);
            }
        }
    }

    #[test]
    fn a_chain_names_its_nodes_from_below() {
        let chain =
            ChainPaths { size: 512, golden: Some("/g".into()), origin: None, layers: vec!["/1".into(), "/2".into()] };
        let nodes = chain.nodes("n").unwrap();
        let names: Vec<_> = nodes.iter().map(|n| n["node-name"].as_str().unwrap()).collect();
        assert_eq!(names, ["n-0", "n-1", "n-top"]);
        assert_eq!((&nodes[1]["backing"], &nodes[2]["backing"]), (&json!("n-0"), &json!("n-1")));
        assert_eq!(nodes[0]["driver"], "raw");
        let alone = ChainPaths { golden: None, layers: vec!["/1".into()], ..chain };
        assert_eq!(alone.nodes("n").unwrap()[0]["backing"], Value::Null);
        let elsewhere = ChainPaths { origin: Some("/o".into()), ..alone.clone() };
        let nodes = elsewhere.nodes("n").unwrap();
        assert_eq!((&nodes[0]["driver"], &nodes[0]["node-name"]), (&json!("nbd"), &json!("n-0")));
        assert_eq!((&nodes[1]["node-name"], &nodes[1]["backing"]), (&json!("n-top"), &json!("n-0")));
        let both = ChainPaths { golden: Some("/g".into()), ..elsewhere };
        assert!(matches!(both.check(), Err(ChainError::TwoBases)));
        assert!(matches!(ChainPaths { layers: vec![], ..alone }.check(), Err(ChainError::Empty)));
    }
}
