//! What is written down about a lab, and the names of its parts.

use std::{
    fs, io,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use crate::{LabOptions, ROOT, Rate, process::Stamp};

const VERSION: u32 = 1;
/// Port of every daemon.
pub(crate) const PORT: u16 = 7391;

/// One host of a lab.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HostRecord {
    /// `h1`, `h2`, ...
    pub name: String,
    /// Its address on the lab's bridge.
    pub address: Ipv4Addr,
    /// Its network namespace, for `ip netns exec`.
    pub netns: String,
    /// Its daemon's state.
    pub state_dir: PathBuf,
    /// Its daemon's Unix socket.
    pub socket: PathBuf,
    /// What its daemon prints.
    pub log: PathBuf,
    /// Its directory of guest images, where that is not the lab's.
    #[serde(default)]
    pub image_dir: Option<PathBuf>,
    /// Its daemon; none: not started yet.
    pub(crate) daemon: Option<Stamp>,
}

/// A lab, in `lab.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct LabRecord {
    version: u32,
    pub(crate) name: String,
    pub(crate) hosts: Vec<HostRecord>,
    pub(crate) link: Option<Rate>,
    pub(crate) delay: Option<Duration>,
    pub(crate) bin_dir: PathBuf,
    pub(crate) image_dir: PathBuf,
    pub(crate) group: Option<String>,
    pub(crate) daemon_args: Vec<String>,
    /// The process that it ends with.
    pub(crate) owner: Option<Stamp>,
}

/// The directory of the lab of this name.
pub(crate) fn lab_dir(name: &str) -> PathBuf {
    Path::new(ROOT).join(name)
}

/// The network namespace of the lab's bridge.
pub(crate) fn bridge_netns(name: &str) -> String {
    format!("ramet-{name}-br")
}

/// Whether `netns` belongs to the lab of this name.
pub(crate) fn is_netns_of(netns: &str, name: &str) -> bool {
    let Some(part) = netns.strip_prefix("ramet-").and_then(|n| n.strip_prefix(name)).and_then(|n| n.strip_prefix('-'))
    else {
        return false;
    };
    part == "br"
        || part
            .strip_prefix('h')
            .is_some_and(|n| !n.is_empty() && n.len() <= 3 && n.bytes().all(|b| b.is_ascii_digit()))
}

/// The third number of the lab's addresses. Labs are not connected, so two may have the same.
fn subnet(name: &str) -> u8 {
    let hash = name.bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    u8::try_from(hash % 254 + 1).unwrap_or(1)
}

/// Where a host has its images that has none at first.
fn own_images(dir: &Path, number: u8) -> PathBuf {
    dir.join(format!("h{number}-images"))
}

impl LabRecord {
    pub(crate) fn new(options: &LabOptions) -> Result<Self> {
        let name = &options.name;
        let dir = lab_dir(name);
        let host = |number: u8| {
            let host = format!("h{number}");
            let state_dir = dir.join(&host);
            HostRecord {
                address: Ipv4Addr::new(10, 77, subnet(name), number),
                netns: format!("ramet-{name}-{host}"),
                socket: state_dir.join("rametd.sock"),
                log: dir.join(format!("{host}.log")),
                state_dir,
                name: host,
                image_dir: options.without_images.contains(&number).then(|| own_images(&dir, number)),
                daemon: None,
            }
        };
        Ok(Self {
            version: VERSION,
            name: name.clone(),
            hosts: (1..=options.hosts).map(host).collect(),
            link: options.link,
            delay: options.delay,
            bin_dir: std::path::absolute(&options.bin_dir)?,
            image_dir: std::path::absolute(&options.image_dir)?,
            group: options.group.clone(),
            daemon_args: options.daemon_args.clone(),
            owner: if options.ephemeral { Some(Stamp::of(std::process::id())?) } else { None },
        })
    }

    pub(crate) fn dir(&self) -> PathBuf {
        lab_dir(&self.name)
    }

    /// Writes it whole or not at all.
    pub(crate) fn save(&self) -> Result<()> {
        let path = self.dir().join("lab.json");
        let new = self.dir().join("lab.json.new");
        let write = || -> io::Result<()> {
            fs::write(&new, serde_json::to_vec_pretty(self)?)?;
            fs::rename(&new, &path)
        };
        write().with_context(|| format!("Can't write {}", path.display()))
    }

    /// Reads the lab of this name.
    pub(crate) fn load(name: &str) -> Result<Self> {
        crate::options::check_name(name)?;
        let path = lab_dir(name).join("lab.json");
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(err) if err.kind() == io::ErrorKind::NotFound => {
                bail!("No lab '{name}': `ramet lab ls` lists them, `ramet lab up --name {name}` makes it")
            }
            Err(err) => return Err(err).with_context(|| format!("Can't read {}", path.display())),
        };
        let record: Self = serde_json::from_slice(&bytes).with_context(|| {
            format!("{} can't be understood: `ramet lab down --name {name}` removes the lab", path.display())
        })?;
        if record.version != VERSION {
            bail!("The lab '{name}' was made by another version: `ramet lab down --name {name}` removes it");
        }
        Ok(record)
    }

    /// The host of this number, from 1.
    pub(crate) fn host(&self, number: usize) -> Result<&HostRecord> {
        number.checked_sub(1).and_then(|i| self.hosts.get(i)).with_context(|| {
            format!("The lab '{}' has no host h{number}: it has h1 to h{}", self.name, self.hosts.len())
        })
    }
}

/// Names of all labs that left a directory, sorted.
pub(crate) fn names() -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(ROOT)
        .into_iter()
        .flatten()
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| crate::options::check_name(name).is_ok())
        .collect();
    names.sort();
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lab_owns_its_namespaces_and_no_other_labs() {
        assert!(is_netns_of("ramet-a-br", "a"));
        assert!(is_netns_of("ramet-a-h12", "a"));
        for other in ["ramet-a-h1-br", "ramet-ab-h1", "ramet-a-h", "ramet-a-hx", "a-h1", "ramet-a", "ramet-a-h1x"] {
            assert!(!is_netns_of(other, "a"), "{other}");
        }
        assert!(is_netns_of("ramet-a-h1-br", "a-h1"));
    }

    #[test]
    fn sockets_stay_short_enough_and_addresses_legal() {
        let options = LabOptions::new("x".repeat(24)).unwrap().hosts(64);
        let record = LabRecord::new(&options).unwrap();
        let last = record.hosts.last().unwrap();
        assert!(last.state_dir.as_os_str().len() <= 50);
        assert_eq!(last.address.octets()[3], 64);
        assert!((1..=254).contains(&last.address.octets()[2]));
        assert!(record.host(64).is_ok());
        assert!(record.host(0).is_err());
        assert!(record.host(65).unwrap_err().to_string().contains("h1 to h64"));
    }

    #[test]
    fn a_lab_that_is_not_there_is_named() {
        let err = LabRecord::load("no-such-lab").unwrap_err().to_string();
        assert!(err.contains("no-such-lab") && err.contains("ramet lab up"), "{err}");
    }
}
