//! Building a Linux image: kernel, modules, busybox, agent, packages, files; all packed into an initramfs.

use crate::apt::{Apt, Deb, check_suite};
use crate::cpio::Lz4;
use crate::error::{ImageError, Named};
use crate::modules::{Available, Module};
use crate::store::{Image, ImageStore, check_name};
use crate::tree::Tree;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::BufWriter;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// The kernel's command line. The console is the serial port; a panic ends the VM instead of hanging it.
pub(crate) const CMDLINE: &str = "console=ttyS0 quiet panic=-1 reboot=t no_timer_check";

/// Packages that bring the kernel, the first that the distribution has: Debian's for clouds, Ubuntu's, any Debian's.
const KERNELS: [&str; 3] = ["linux-image-cloud-amd64", "linux-image-virtual", "linux-image-amd64"];
/// Modules that are loaded while booting.
const BOOT_MODULES: [&str; 3] = ["virtio_pci", "virtio_console", "vmgenid"];
/// Modules that are there for `modprobe`.
const MORE_MODULES: [&str; 8] =
    ["virtio_net", "virtio_blk", "virtio_rng", "ext4", "overlay", "af_packet", "tcp_diag", "udp_diag"];
/// What packages have and a guest without people reading in it does not need.
const LEFT_OUT: [&str; 8] = [
    "usr/share/doc",
    "usr/share/man",
    "usr/share/info",
    "usr/share/locale",
    "usr/share/lintian",
    "usr/share/bug",
    "usr/share/doc-base",
    "boot",
];

/// What an image is made of.
#[derive(Clone, Debug)]
pub struct BuildOptions {
    /// Its name.
    pub name: String,
    /// Packages of the distribution, besides the kernel and busybox.
    pub packages: Vec<String>,
    /// The distribution's suite that the kernel and all packages come from; by default what this machine has.
    pub suite: Option<String>,
    /// Files and directories of the host, and where they go in the guest; see [`parse_add`].
    pub add: Vec<(PathBuf, String)>,
    /// The agent, linked statically.
    pub agent: PathBuf,
    /// Replace an image of the same name.
    pub replace: bool,
}

/// What a build is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Reading what packages the suite has, when it is not this machine's.
    Updating,
    /// Asking the distribution what the packages need.
    Resolving,
    /// Downloading packages.
    Downloading,
    /// Unpacking packages.
    Unpacking,
    /// Installing packages.
    Installing,
    /// Writing the initramfs.
    Packing,
    /// Making the disk.
    Formatting,
}

impl std::fmt::Display for Stage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Updating => "reading the suite's package lists",
            Self::Resolving => "resolving packages",
            Self::Downloading => "downloading packages",
            Self::Unpacking => "unpacking packages",
            Self::Installing => "installing packages",
            Self::Formatting => "making the disk",
            Self::Packing => "packing the initramfs",
        })
    }
}

/// How far a build is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Progress {
    /// What it is doing.
    pub stage: Stage,
    /// How much of that is done, 0 to 1.
    pub fraction: f64,
}

/// Understands `HOST[:GUEST]`: a path of the host and the absolute path that it gets in the guest (the same when left
/// out).
///
/// # Errors
/// [`ImageError::BadAdd`] when there is no such file, or the guest's path is not absolute.
pub fn parse_add(text: &str) -> Result<(PathBuf, String), ImageError> {
    let bad = |reason: &str| ImageError::BadAdd { what: text.to_owned(), reason: reason.to_owned() };
    let (host, guest) = match text.rsplit_once(":/") {
        Some((host, guest)) => (PathBuf::from(host), format!("/{guest}")),
        None => (PathBuf::from(text), text.to_owned()),
    };
    if !host.exists() {
        return Err(bad(&format!("there is no {}", host.display())));
    }
    if !guest.starts_with('/') || guest.split('/').any(|part| part == "..") {
        return Err(bad(&format!("{guest:?} is not an absolute path")));
    }
    Ok((host, guest))
}

impl ImageStore {
    /// Builds a Linux image. Takes seconds to minutes; `progress` is told of every step.
    ///
    /// # Errors
    /// Names what is missing; nothing half-made stays behind, and an older image of the name stays as it was.
    pub fn build(&self, options: &BuildOptions, progress: &mut dyn FnMut(Progress)) -> Result<Image, ImageError> {
        check_name(&options.name)?;
        let suite = options.suite.as_deref();
        suite.map(check_suite).transpose()?;
        check_agent(&options.agent)?;
        let _lock = self.lock()?;
        if !options.replace && self.dir().join(&options.name).exists() {
            return Err(ImageError::Exists { name: options.name.clone() });
        }
        let work = self.workplace()?;
        let scratch =
            tempfile::Builder::new().prefix(".build-").tempdir_in(self.dir()).named("write to", self.dir())?;
        let apt = Apt::new(&self.cache_dir(), scratch.path(), suite)?;
        apt.update(progress)?;
        progress(Progress { stage: Stage::Resolving, fraction: 0.0 });
        let kernel = kernel_package(&apt)?;
        let mut wanted: Vec<&str> = vec!["busybox-static"];
        wanted.extend(options.packages.iter().map(String::as_str));
        let debs = apt.resolve(&wanted)?;
        // Of the kernel only the kernel: no boot loader, no maker of initramfs.
        let kernel_debs: Vec<Deb> = apt.resolve(&[kernel])?.into_iter().filter(is_kernel).collect();
        progress(Progress { stage: Stage::Downloading, fraction: 0.0 });
        apt.download(&wanted, progress)?;
        apt.download(&[kernel], progress)?;

        let all: Vec<&Deb> = kernel_debs.iter().chain(&debs).collect();
        for (number, deb) in all.iter().enumerate() {
            progress(Progress { stage: Stage::Unpacking, fraction: number as f64 / all.len() as f64 });
            let side = if number < kernel_debs.len() { "kernel".to_owned() } else { format!("package-{}", deb.name()) };
            apt.unpack(deb, &scratch.path().join(side))?;
        }
        let (vmlinuz, version) = find_kernel(&scratch.path().join("kernel"), kernel)?;
        fs::copy(&vmlinuz, work.path().join("kernel")).named("copy", &vmlinuz)?;

        let mut tree = Tree::new();
        for deb in &debs {
            let dir = scratch.path().join(format!("package-{}", deb.name()));
            tree.add_host(&dir, "", true, &|path| !LEFT_OUT.iter().any(|out| is_under(path, out)))?;
        }
        add_modules(&mut tree, &scratch.path().join("kernel"), &version)?;
        add_base(&mut tree, scratch.path())?;
        tree.file("/usr/bin/ramet-agent", 0o755, &options.agent);
        for (host, guest) in &options.add {
            tree.add_host(host, guest, false, &|_| true)?;
        }
        progress(Progress { stage: Stage::Packing, fraction: 0.0 });
        let path = work.path().join("initrd");
        let file = BufWriter::new(File::create(&path).named("write", &path)?);
        let packed = tree.write(Lz4::new(file).named("write", &path)?, &path)?;
        packed.finish().named("write", &path)?;
        let contents = all.iter().map(|deb| deb.title()).collect();
        let manifest =
            Self::linux_manifest(work.path(), &options.name, CMDLINE, &options.packages, contents, version, suite)?;
        self.publish(work, manifest)
    }
}

/// The files of the guest that are ours, and busybox's commands.
fn add_base(tree: &mut Tree, scratch: &Path) -> Result<(), ImageError> {
    for (path, mode) in
        [("/dev", 0o755), ("/proc", 0o555), ("/sys", 0o555), ("/run", 0o755), ("/tmp", 0o1777), ("/root", 0o700)]
    {
        tree.dir(path, mode);
    }
    for path in ["/mnt", "/var/tmp", "/var/log", "/var/lib", "/var/cache", "/var/spool", "/etc/ramet"] {
        tree.dir(path, 0o755);
    }
    if !tree.has("/var/run") {
        tree.link("/var/run", "/run");
    }
    tree.char_device("/dev/console", 0o600, 5, 1);
    tree.char_device("/dev/null", 0o666, 1, 3);
    tree.link("/init", "usr/bin/busybox");
    for (path, text) in [
        ("/etc/inittab", include_str!("guest/inittab")),
        ("/etc/passwd", include_str!("guest/passwd")),
        ("/etc/group", include_str!("guest/group")),
        ("/etc/hosts", "127.0.0.1 localhost\n::1 localhost\n"),
        ("/etc/hostname", "ramet\n"),
        ("/etc/profile", "export PS1='\\h:\\w\\$ ' HOME=/root TERM=linux\ncd\n"),
        ("/etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n"),
    ] {
        if !tree.has(path) {
            tree.bytes(path, 0o644, text);
        }
    }
    tree.bytes("/etc/ramet/boot", 0o755, include_str!("guest/boot"));
    let busybox =
        [scratch.join("package-busybox-static/usr/bin/busybox"), scratch.join("package-busybox-static/bin/busybox")]
            .into_iter()
            .find(|path| path.exists());
    let Some(busybox) = busybox else {
        return Err(ImageError::NoPackage { package: "busybox-static (with bin/busybox in it)".into() });
    };
    let output = Command::new(&busybox)
        .arg("--list")
        .stdin(Stdio::null())
        .output()
        .map_err(|source| ImageError::Tool { tool: busybox.display().to_string(), source })?;
    // Where packages bring the real tools, these are used.
    for command in
        String::from_utf8_lossy(&output.stdout).lines().filter(|name| !name.contains('/') && !name.is_empty())
    {
        let there = ["/usr/bin/", "/usr/sbin/"].iter().any(|dir| tree.has(&format!("{dir}{command}")));
        if !there {
            tree.link(&format!("/usr/bin/{command}"), "busybox");
        }
    }
    Ok(())
}

/// Modules in the usual place, with what busybox's `modprobe` needs, and the list of those that are loaded at boot.
fn add_modules(tree: &mut Tree, kernel: &Path, version: &str) -> Result<(), ImageError> {
    let dir = kernel_dir(kernel, "modules").join(version);
    let available = if dir.is_dir() { Available::find(&dir)? } else { Available::none() };
    let boot = available.closure(&BOOT_MODULES)?;
    let wanted: Vec<&str> = BOOT_MODULES.iter().chain(&MORE_MODULES).copied().collect();
    let all = available.closure(&wanted)?;
    let place = format!("/usr/lib/modules/{version}");
    for module in &all {
        tree.bytes(&format!("{place}/{}.ko", module.name), 0o644, module.bytes.clone());
    }
    tree.bytes(&format!("{place}/modules.dep"), 0o644, modules_dep(&all));
    let line = |module: &Module| format!("{place}/{}.ko\n", module.name);
    tree.bytes("/etc/ramet/modules", 0o644, boot.iter().map(line).collect::<String>());
    Ok(())
}

/// `modules.dep`, out of modules each of which comes after what it needs. busybox's `modprobe` loads no more than a
/// line names, the last first: so a line has all that is needed, directly or not.
fn modules_dep(modules: &[Module]) -> String {
    let mut text = String::new();
    for (number, module) in modules.iter().enumerate() {
        text.push_str(&format!("{}.ko:", module.name));
        let mut needed: BTreeSet<String> = names_of(&module.depends).collect();
        for below in modules[..number].iter().rev() {
            if needed.contains(&below.name) {
                text.push_str(&format!(" {}.ko", below.name));
                needed.extend(names_of(&below.depends));
            }
        }
        text.push('\n');
    }
    text
}

/// Names of modules as [`Module::name`] has them.
fn names_of(depends: &[String]) -> impl Iterator<Item = String> {
    depends.iter().map(|name| name.replace('-', "_"))
}

/// The first of the kernels that the distribution has.
pub(crate) fn kernel_package(apt: &Apt) -> Result<&'static str, ImageError> {
    KERNELS.into_iter().find(|name| apt.has(name)).ok_or_else(|| {
        let all = KERNELS.join(", ");
        match apt.suite() {
            Some(suite) => ImageError::Failed {
                what: format!("find a kernel in the suite {suite:?}"),
                reason: format!("none of {all} can be had; use a suite that is complete, such as a release's name"),
            },
            None => ImageError::Apt {
                what: "find a kernel".into(),
                reason: format!(
                    "none of {all} can be had: the package lists may be empty, `apt-get update` fills them"
                ),
            },
        }
    })
}

/// Whether a package has the kernel or its modules. Newer suites have `vmlinuz` in `linux-binary-VERSION`, and
/// `linux-image-VERSION` does no more than depend on the parts.
pub(crate) fn is_kernel(deb: &Deb) -> bool {
    ["linux-image-", "linux-binary-", "linux-modules-"].iter().any(|start| deb.name().starts_with(start))
}

/// `/lib/WHAT` of a kernel's packages, wherever their distribution has it.
pub(crate) fn kernel_dir(kernel: &Path, what: &str) -> PathBuf {
    let merged = kernel.join("usr/lib").join(what);
    if merged.is_dir() { merged } else { kernel.join("lib").join(what) }
}

/// The kernel and its version: `/boot/vmlinuz-VERSION`, or in newer suites `vmlinuz` beside its modules.
pub(crate) fn find_kernel(root: &Path, package: &str) -> Result<(PathBuf, String), ImageError> {
    let mut found = Vec::new();
    for name in names_in(&root.join("boot"))? {
        if let Some(version) = name.strip_prefix("vmlinuz-") {
            found.push((root.join("boot").join(&name), version.to_owned()));
        }
    }
    if found.is_empty() {
        let modules = kernel_dir(root, "modules");
        let kernels = names_in(&modules)?.into_iter().map(|version| (modules.join(&version).join("vmlinuz"), version));
        found.extend(kernels.filter(|(path, _)| path.is_file()));
    }
    found.sort();
    found.pop().ok_or_else(|| ImageError::NoPackage { package: format!("{package} (with vmlinuz in it)") })
}

/// The names in a directory, none if it does not exist.
fn names_in(dir: &Path) -> Result<Vec<String>, ImageError> {
    if !dir.is_dir() {
        return Ok(Vec::new());
    }
    let entries = fs::read_dir(dir).named("read", dir)?.flatten();
    Ok(entries.filter_map(|entry| entry.file_name().into_string().ok()).collect())
}

fn is_under(path: &str, dir: &str) -> bool {
    path.strip_prefix(dir).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
}

/// Only an agent that needs no library runs in every guest.
pub(crate) fn check_agent(path: &Path) -> Result<(), ImageError> {
    let bad = |reason: &str| ImageError::Agent { path: path.to_owned(), reason: reason.to_owned() };
    let bytes = fs::read(path).map_err(|error| bad(&error.to_string()))?;
    let word = |at: usize, len: usize| -> Option<u64> {
        let mut value = [0; 8];
        value[..len].copy_from_slice(bytes.get(at..at + len)?);
        Some(u64::from_le_bytes(value))
    };
    // An ELF file of 64 bits for x86-64 (<elf.h>).
    if !bytes.starts_with(b"\x7fELF\x02\x01") || word(18, 2) != Some(62) {
        return Err(bad("it is no program for x86-64"));
    }
    const PT_INTERP: u64 = 3;
    let table = word(32, 8).and_then(|at| usize::try_from(at).ok());
    let (Some(table), Some(size), Some(count)) = (table, word(54, 2), word(56, 2)) else {
        return Err(bad("it is cut short"));
    };
    for number in 0..count {
        let at = usize::try_from(number * size).ok().and_then(|offset| table.checked_add(offset));
        match at.filter(|at| at.checked_add(4).is_some()).and_then(|at| word(at, 4)) {
            Some(PT_INTERP) => return Err(bad("it is not linked statically")),
            Some(_) => {}
            None => return Err(bad("it is cut short")),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_added_has_a_place_in_the_guest() {
        let dir = tempfile::tempdir().unwrap();
        let host = dir.path().to_str().unwrap();
        assert_eq!(parse_add(host).unwrap(), (dir.path().to_owned(), host.to_owned()));
        assert_eq!(parse_add(&format!("{host}:/srv/x")).unwrap(), (dir.path().to_owned(), "/srv/x".to_owned()));
        for bad in ["/no/such/file/here", "relative", &format!("{host}:/a/../b"), ""] {
            assert!(matches!(parse_add(bad), Err(ImageError::BadAdd { .. })), "{bad:?}");
        }
    }

    #[test]
    fn an_agent_that_needs_libraries_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("agent");
        let text = |bytes: &[u8]| {
            fs::write(&path, bytes).unwrap();
            check_agent(&path).unwrap_err().to_string()
        };
        assert!(text(b"#!/bin/sh\n").contains("no program"));
        let own = fs::read(std::env::current_exe().unwrap()).unwrap();
        assert!(text(&own).contains("statically"), "tests are linked dynamically");
        assert!(text(&own[..60]).contains("cut short"));
        assert!(check_agent(&dir.path().join("nosuch")).unwrap_err().to_string().contains("nosuch"));
    }

    #[test]
    fn all_parts_of_a_kernel_are_taken() {
        let is = |name: &str| is_kernel(&Deb { file: format!("{name}_7.2.13-1_amd64.deb") });
        for name in ["linux-image-cloud-amd64", "linux-image-6.1", "linux-binary-7.2", "linux-modules-7.2"] {
            assert!(is(name), "{name}");
        }
        for name in ["linux-base", "linux-headers-7.2", "initramfs-tools", "kmod", "grub-pc"] {
            assert!(!is(name), "{name}");
        }
    }

    #[test]
    fn a_kernel_is_found_in_its_old_and_its_new_place() {
        let dir = tempfile::tempdir().unwrap();
        let put = |path: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(&path, "").unwrap();
            path
        };
        let error = find_kernel(dir.path(), "linux-image-x").unwrap_err().to_string();
        assert!(error.contains("linux-image-x"), "{error}");
        put("usr/lib/modules/6.9/kernel/x.ko");
        let new = put("usr/lib/modules/7.2/vmlinuz");
        assert_eq!(find_kernel(dir.path(), "x").unwrap(), (new, "7.2".to_owned()));
        put("boot/config-6.1");
        let old = put("boot/vmlinuz-6.1");
        assert_eq!(find_kernel(dir.path(), "x").unwrap(), (old, "6.1".to_owned()));
    }

    #[test]
    fn modprobe_is_told_of_all_that_a_module_needs() {
        let module = |name: &str, depends: &[&str]| Module {
            name: name.to_owned(),
            bytes: Vec::new(),
            depends: depends.iter().map(|name| (*name).to_owned()).collect(),
        };
        let all = [
            module("failover", &[]),
            module("virtio", &[]),
            module("net_failover", &["failover"]),
            module("virtio_net", &["net-failover", "virtio", "built_in"]),
        ];
        let text = "failover.ko:\nvirtio.ko:\nnet_failover.ko: failover.ko\n\
                    virtio_net.ko: net_failover.ko virtio.ko failover.ko\n";
        assert_eq!(modules_dep(&all), text);
        assert_eq!(modules_dep(&[]), "");
    }

    #[test]
    fn directories_are_left_out_as_a_whole() {
        assert!(is_under("usr/share/doc", "usr/share/doc") && is_under("usr/share/doc/x", "usr/share/doc"));
        assert!(!is_under("usr/share/docs", "usr/share/doc"));
    }
}
