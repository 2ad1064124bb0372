//! What a daemon is told at its start, and where its files are.

use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use ramet_client::api::{AccelKind, Limits};
use ramet_memory::ByteSize;

/// Longest state directory: the paths of Unix sockets below it must stay under the kernel's 108 bytes.
const MAX_STATE_DIR: usize = 50;
pub use ramet_vmm::QEMU_UID;

/// Layers of a VM's disk at which some are merged. Each one that is opened costs a clone some 2 ms, and each read that goes
/// down to it a few us, so a chain should be short; merging copies what they hold, so it should not be done at every
/// checkpoint. A chain of a VM that is checkpointed for ever has 4 to 8.
pub const MERGE_LAYERS: usize = 8;

/// How a daemon runs. Everything below [`Config::state_dir`] is the daemon's own.
#[derive(Debug, Clone)]
pub struct Config {
    /// The host's name in its group.
    pub name: String,
    /// Where state, sockets and page files are.
    pub state_dir: PathBuf,
    /// The Unix socket of the API.
    pub socket: PathBuf,
    /// Group that may use the socket, by name or number.
    pub group: Option<String>,
    /// Where other hosts reach this one, once trust is set up.
    pub listen: Option<SocketAddr>,
    /// Guest images.
    pub image_dir: PathBuf,
    /// Overlays of VMs' disks.
    pub disk_dir: PathBuf,
    /// Layers below a VM's overlay at which some are merged into one, while it runs; 0: never. See [`MERGE_LAYERS`].
    pub merge_layers: usize,
    /// Addresses of families' members: the same in every family.
    pub guest_network: ramet_net::Subnet,
    /// Encrypt what goes between members on different hosts.
    pub encrypt_tunnel: bool,
    /// Limits in force.
    pub limits: Limits,
    /// QEMU's binary.
    pub qemu: PathBuf,
    /// User and group that QEMU runs as; none: the daemon's own.
    pub qemu_user: Option<(u32, u32)>,
    /// Run QEMU with its `-sandbox`.
    pub sandbox: bool,
    /// What new VMs run on; none: KVM when usable.
    pub accel: Option<AccelKind>,
    /// QEMU machine type of new VMs.
    pub machine: String,
    /// Pre-started QEMUs to keep for each shape in use.
    pub pool: u32,
    /// Size of the file system of the page files; none: three quarters of memory.
    pub pages_size: Option<ByteSize>,
    /// Where `ramet-pager` and `libramet_shim.so` are.
    pub bin_dir: PathBuf,
    /// End all VMs when the daemon is told to end by a signal.
    pub stop_vms_on_exit: bool,
}

impl Config {
    /// A daemon with this name and state directory, all else default.
    ///
    /// # Errors
    /// When the running program's directory can't be found out.
    pub fn new(name: impl Into<String>, state_dir: impl Into<PathBuf>) -> io::Result<Self> {
        let state_dir = state_dir.into();
        let program = std::env::current_exe()?;
        let mut bin_dir = program.parent().unwrap_or(Path::new("/")).to_owned();
        if bin_dir.ends_with("deps") {
            bin_dir.pop();
        }
        Ok(Self {
            name: name.into(),
            socket: state_dir.join("rametd.sock"),
            group: None,
            listen: None,
            image_dir: "/var/lib/ramet/images".into(),
            disk_dir: "/var/lib/ramet/disks".into(),
            merge_layers: MERGE_LAYERS,
            guest_network: ramet_net::AddressPlan::default().network(),
            encrypt_tunnel: false,
            limits: Limits::default(),
            qemu: "qemu-system-x86_64".into(),
            qemu_user: None,
            sandbox: true,
            accel: None,
            machine: "pc-i440fx-7.2".to_owned(),
            pool: 2,
            pages_size: None,
            bin_dir,
            stop_vms_on_exit: false,
            state_dir,
        })
    }

    /// The file systems of page files, one directory a family.
    #[must_use]
    pub fn pages(&self) -> PathBuf {
        self.state_dir.join("pages")
    }
    /// One directory for each VM that was booted.
    #[must_use]
    pub fn vms(&self) -> PathBuf {
        self.state_dir.join("vms")
    }
    /// Pre-started QEMUs, and the clones that came of them.
    #[must_use]
    pub fn pool_dir(&self) -> PathBuf {
        self.state_dir.join("pool")
    }
    /// Device state of the checkpoints.
    #[must_use]
    pub fn checkpoints(&self) -> PathBuf {
        self.state_dir.join("checkpoints")
    }
    /// What clones boot from whose image is on other hosts only.
    #[must_use]
    pub fn boot_files(&self) -> PathBuf {
        self.state_dir.join("boot")
    }
    /// Certificates and keys.
    #[must_use]
    pub fn tls(&self) -> PathBuf {
        self.state_dir.join("tls")
    }
    /// Servers of frozen disks, one directory a family.
    #[must_use]
    pub fn disk_servers(&self) -> PathBuf {
        self.state_dir.join("disk")
    }
    /// Logs of pagers.
    #[must_use]
    pub fn logs(&self) -> PathBuf {
        self.state_dir.join("log")
    }

    /// Checks what can be checked before anything is touched, and makes paths absolute.
    ///
    /// # Errors
    /// Names the option and the remedy.
    pub fn validate(mut self) -> anyhow::Result<Self> {
        crate::names::check_host_name(&self.name).context("--name")?;
        for path in [&mut self.state_dir, &mut self.socket, &mut self.image_dir, &mut self.bin_dir, &mut self.disk_dir]
        {
            *path = std::path::absolute(&*path)?;
        }
        let listens = self.listen.is_some_and(|l| l.is_ipv4() && !l.ip().is_unspecified());
        if self.encrypt_tunnel && !listens {
            bail!("--encrypt-tunnel needs --listen with this host's IPv4 address: tunnels begin and end there");
        }
        let len = self.state_dir.as_os_str().len();
        if len > MAX_STATE_DIR {
            bail!(
                "--state-dir {} has {len} characters, more than {MAX_STATE_DIR}: sockets below it would have too long \
                 names; choose a shorter path",
                self.state_dir.display()
            );
        }
        for file in ["ramet-pager", "ramet-disk", "libramet_shim.so"] {
            let path = self.bin_dir.join(file);
            if !path.exists() {
                bail!(
                    "{} is missing: build the whole workspace (`cargo build`), or name its place by --bin-dir",
                    path.display()
                );
            }
        }
        Ok(self)
    }
}

/// The number of a group given by name or number.
///
/// # Errors
/// When there is no such group.
pub fn group_id(group: &str) -> anyhow::Result<u32> {
    if let Ok(id) = group.parse() {
        return Ok(id);
    }
    let table = std::fs::read_to_string("/etc/group").context("Failed to read /etc/group")?;
    table
        .lines()
        .map(|line| line.split(':').collect::<Vec<_>>())
        .find(|fields| fields.first() == Some(&group))
        .and_then(|fields| fields.get(2)?.parse().ok())
        .with_context(|| {
            format!("No group '{group}' in /etc/group: make it by `groupadd {group}`, or leave --group out")
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_too_long_for_sockets_is_refused() {
        let config = Config::new("h1", format!("/run/{}", "x".repeat(60))).unwrap();
        let err = config.validate().unwrap_err().to_string();
        assert!(err.contains("--state-dir") && err.contains("shorter"), "{err}");
    }

    #[test]
    fn encrypted_tunnels_need_an_address() {
        for listen in [None, Some("0.0.0.0:1"), Some("[::1]:1")] {
            let mut config = Config::new("h1", "/run/x").unwrap();
            (config.encrypt_tunnel, config.listen) = (true, listen.map(|l| l.parse().unwrap()));
            let err = config.validate().unwrap_err().to_string();
            assert!(err.contains("--encrypt-tunnel needs --listen"), "{err}");
        }
    }

    #[test]
    fn a_bad_name_names_its_option() {
        let err = format!("{:#}", Config::new("Not A Host", "/run/x").unwrap().validate().unwrap_err());
        assert!(err.contains("--name") && err.contains("Not A Host"), "{err}");
    }

    #[test]
    fn groups_by_name_and_number() {
        assert_eq!(group_id("root").unwrap(), 0);
        assert_eq!(group_id("4711").unwrap(), 4711);
        assert!(group_id("no-such-group-here").unwrap_err().to_string().contains("groupadd"));
    }
}
