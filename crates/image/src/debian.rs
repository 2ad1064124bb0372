//! Building a Debian image: packages installed as on any machine, on a disk of their own.
//!
//! Packages are resolved, checked and downloaded by the same apt as for images in memory. `mmdebstrap` then installs
//! them from there, without the network. The guest has systemd and no udev: its devices are few, fixed, and made by the
//! kernel. The initramfs loads their modules and hands over to the disk.

use crate::apt::{Apt, Deb, Lists, check_suite};
use crate::build::{
    BuildOptions, CMDLINE, Progress, Stage, check_agent, find_kernel, is_kernel, kernel_dir, kernel_package,
};
use crate::cpio::Lz4;
use crate::error::{ImageError, Named};
use crate::ext4;
use crate::modules::{Available, Module};
use crate::store::{Image, ImageStore, check_name, disk_record_of};
use crate::tree::Tree;
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, BufWriter};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use xxhash_rust::xxh3::Xxh3;

/// Bytes of a disk unless the user says otherwise.
pub const DEFAULT_DISK_SIZE: u64 = 2 << 30;

/// What the kernel is told besides [`CMDLINE`]. The NIC is `eth0` in every machine.
const ROOT: &str = "root=/dev/vda rw rootfstype=ext4 net.ifnames=0 systemd.show_status=0";
/// Packages of every guest, besides those that Debian cannot be without.
const BASE: [&str; 5] = ["systemd-sysv", "iproute2", "kmod", "netbase", "procps"];
/// Modules that are loaded before there is a root. Those that nobody needs for a root are here since there is no udev.
/// With the last two, which the kernel would load when a clone ends its parent's connections, no clone has to.
const BOOT_MODULES: [&str; 9] = [
    "virtio_pci",
    "virtio_blk",
    "ext4",
    "virtio_console",
    "virtio_net",
    "virtio_rng",
    "vmgenid",
    "tcp_diag",
    "udp_diag",
];
/// systemd starts each of these programs while it boots; none of them has anything to find.
const GENERATORS: [&str; 11] = [
    "bless-boot",
    "cryptsetup",
    "debug",
    "getty",
    "gpt-auto",
    "hibernate-resume",
    "integritysetup",
    "rc-local",
    "run",
    "system-update",
    "veritysetup",
];
/// Files of the guest that are the same in all.
const FILES: [(&str, &str); 10] = [
    ("/etc/hosts", "127.0.0.1 localhost\n127.0.1.1 ramet\n::1 localhost ip6-localhost ip6-loopback\n"),
    ("/etc/hostname", "ramet\n"),
    ("/etc/machine-id", ""),
    ("/etc/resolv.conf", ""),
    ("/etc/fstab", "/dev/vda / ext4 rw,noatime 0 0\n"),
    ("/etc/systemd/system/ramet-agent.service", include_str!("debian/ramet-agent.service")),
    ("/etc/systemd/journald.conf.d/ramet.conf", "[Journal]\nStorage=volatile\nRuntimeMaxUse=8M\nAudit=no\n"),
    (
        "/etc/systemd/system/console-getty.service.d/ramet.conf",
        "[Service]\nExecStart=\nExecStart=-/sbin/agetty --autologin root --noclear --keep-baud console 115200 vt220\n",
    ),
    ("/etc/dpkg/dpkg.cfg.d/ramet", include_str!("debian/dpkg.conf")),
    ("/root/.hushlogin", ""),
];
/// Links of the guest that are the same in all.
const LINKS: [(&str, &str); 3] = [
    ("/etc/systemd/system/default.target", "/lib/systemd/system/multi-user.target"),
    ("/etc/systemd/system/sysinit.target.wants/ramet-agent.service", "/etc/systemd/system/ramet-agent.service"),
    ("/etc/systemd/system/multi-user.target.wants/console-getty.service", "/lib/systemd/system/console-getty.service"),
];
/// Each machine makes its own keys at its first boot; the fast ones.
const SSH_KEYS: &str = "[Service]\nExecStartPre=\n\
    ExecStartPre=/bin/sh -c '[ -e /etc/ssh/ssh_host_ed25519_key ] || \
    ssh-keygen -q -t ed25519 -N \"\" -f /etc/ssh/ssh_host_ed25519_key'\n\
    ExecStartPre=/usr/sbin/sshd -t\n";

impl ImageStore {
    /// Builds a Debian image with a disk of `size` bytes. Takes a minute or so; `progress` is told of every step.
    /// The same packages, files and agent under the same name give the same disk on every host: times are those of the
    /// newest package, the file system's identifiers come from the contents. Not so for packages that make something
    /// random of their own while they are installed, such as keys or databases; host keys of `openssh-server` are left
    /// out, and made when a guest first starts it.
    ///
    /// # Errors
    /// Names what is missing; nothing half-made stays behind, and an older image of the name stays as it was.
    pub fn build_debian(
        &self,
        options: &BuildOptions,
        size: u64,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<Image, ImageError> {
        check_name(&options.name)?;
        let suite = options.suite.as_deref();
        suite.map(check_suite).transpose()?;
        check_agent(&options.agent)?;
        if !rustix::process::geteuid().is_root() {
            return Err(ImageError::NotRoot { what: "build Debian images".into() });
        }
        for (tool, package) in [("mmdebstrap", "mmdebstrap"), ("mke2fs", "e2fsprogs")] {
            present(tool).map_err(|source| ImageError::missing_tool(tool, package, source))?;
        }
        let mut added = Tree::default();
        for (host, guest) in &options.add {
            added.add_host(host, guest, false, &|_| true)?;
        }
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
        let mut wanted = BASE.to_vec();
        wanted.extend(options.packages.iter().map(String::as_str));
        let debs = apt.resolve_system(&wanted)?;
        // Of these only the kernel and busybox, for the initramfs.
        let boot_debs = apt.resolve(&[kernel, "busybox-static"])?;
        let kernel_debs: Vec<&Deb> = boot_debs.iter().filter(|deb| is_kernel(deb)).collect();
        progress(Progress { stage: Stage::Downloading, fraction: 0.0 });
        apt.download_system(&wanted, progress)?;
        apt.download(&[kernel, "busybox-static"], progress)?;

        progress(Progress { stage: Stage::Unpacking, fraction: 0.0 });
        let (kernel_root, busybox_root) = (scratch.path().join("kernel"), scratch.path().join("busybox"));
        for deb in &kernel_debs {
            apt.unpack(deb, &kernel_root)?;
        }
        for deb in boot_debs.iter().filter(|deb| deb.name() == "busybox-static") {
            apt.unpack(deb, &busybox_root)?;
        }
        let (vmlinuz, version) = find_kernel(&kernel_root, kernel)?;
        fs::copy(&vmlinuz, work.path().join("kernel")).named("copy", &vmlinuz)?;
        write_initrd(&work.path().join("initrd"), &kernel_root, &version, &busybox_root)?;

        let epoch = newest(debs.iter().chain(kernel_debs.iter().copied()).map(|deb| apt.path(deb)))?;
        let system = System { root: scratch.path().join("system"), scratch: scratch.path(), epoch };
        system.install(&apt, &debs, &wanted, progress)?;
        let lists = apt.lists()?;
        system.set_up(&lists, &options.packages, &options.agent)?;
        system.add_modules(&kernel_root, &version)?;
        added.lay_over(&system.root)?;
        let mut contents: Vec<String> = kernel_debs.iter().map(|deb| deb.title()).collect();
        contents.extend(system.contents()?);

        progress(Progress { stage: Stage::Formatting, fraction: 0.0 });
        let id = identify(&options.name, &contents);
        ext4::make(&system.root, &work.path().join("disk"), size, ext4::Identity { id, epoch }, scratch.path())?;
        progress(Progress { stage: Stage::Formatting, fraction: 0.8 });
        let disk = disk_record_of(work.path(), "disk", u64::from(epoch))?;
        let cmdline = format!("{CMDLINE} {ROOT}");
        let packages = &options.packages;
        let mut manifest =
            Self::linux_manifest(work.path(), &options.name, &cmdline, packages, contents, version, suite)?;
        manifest.disk = Some(disk);
        self.publish(work, manifest)
    }
}

/// Whether a program can be run.
fn present(tool: &str) -> io::Result<()> {
    Command::new(tool).arg("-V").stdin(Stdio::null()).output().map(drop)
}

/// When the newest of these files was changed: no later than when its distribution made it, however late it was
/// downloaded.
fn newest(files: impl Iterator<Item = PathBuf>) -> Result<u32, ImageError> {
    let mut newest = 0;
    for path in files {
        let time = fs::metadata(&path).named("read", &path)?.mtime();
        // Times that ext4 cannot tell without more bits are none of a package.
        newest = newest.max(u32::try_from(time).unwrap_or(0).min(i32::MAX.cast_unsigned()));
    }
    Ok(newest)
}

/// A number for what is in an image.
fn identify(name: &str, contents: &[String]) -> u128 {
    let mut hasher = Xxh3::new();
    for text in std::iter::once(name).chain(contents.iter().map(String::as_str)) {
        hasher.update(text.as_bytes());
        hasher.update(b"\n");
    }
    hasher.digest128()
}

/// The initramfs: busybox, modules, and the script that makes the disk the root.
fn write_initrd(path: &Path, kernel: &Path, version: &str, busybox: &Path) -> Result<(), ImageError> {
    let mut tree = Tree::new();
    for dir in ["/dev", "/mnt", "/etc/ramet"] {
        tree.dir(dir, 0o755);
    }
    tree.char_device("/dev/console", 0o600, 5, 1);
    tree.char_device("/dev/null", 0o666, 1, 3);
    let places = ["usr/bin/busybox", "bin/busybox"].map(|place| busybox.join(place));
    let Some(busybox) = places.iter().find(|path| path.is_file()) else {
        return Err(ImageError::NoPackage { package: "busybox-static (with bin/busybox in it)".into() });
    };
    tree.file("/usr/bin/busybox", 0o755, busybox);
    tree.link("/usr/bin/sh", "busybox");
    tree.bytes("/init", 0o755, include_str!("debian/init"));
    let dir = kernel_dir(kernel, "modules").join(version);
    let available = if dir.is_dir() { Available::find(&dir)? } else { Available::none() };
    let modules = available.closure(&BOOT_MODULES)?;
    let place = |module: &Module| format!("/usr/lib/modules/{}.ko", module.name);
    tree.bytes("/etc/ramet/modules", 0o644, modules.iter().map(|m| place(m) + "\n").collect::<String>());
    for module in modules {
        tree.bytes(&place(&module), 0o644, module.bytes);
    }
    let file = BufWriter::new(File::create(path).named("write", path)?);
    let packed = tree.write(Lz4::new(file).named("write", path)?, path)?;
    packed.finish().named("write", path).map(drop)
}

/// An installed system in the making.
struct System<'a> {
    root: PathBuf,
    scratch: &'a Path,
    /// The time that counts as now: seconds since 1970.
    epoch: u32,
}

impl System<'_> {
    /// Installs downloaded packages.
    fn install(
        &self,
        apt: &Apt,
        debs: &[Deb],
        wanted: &[&str],
        progress: &mut dyn FnMut(Progress),
    ) -> Result<(), ImageError> {
        progress(Progress { stage: Stage::Installing, fraction: 0.0 });
        let lists = apt.lists()?;
        let (archives, copies) = (self.root.join("var/cache/apt/archives"), self.root.join("var/lib/apt/lists"));
        for dir in [&archives, &copies] {
            fs::create_dir_all(dir.join("partial")).named("make", dir)?;
        }
        for deb in debs {
            let (from, to) = (apt.path(deb), archives.join(&deb.file));
            fs::hard_link(&from, &to).or_else(|_| fs::copy(&from, &to).map(drop)).named("copy", &from)?;
        }
        for entry in fs::read_dir(&lists.dir).named("read", &lists.dir)?.flatten() {
            if entry.file_type().is_ok_and(|kind| kind.is_file()) && entry.file_name() != "lock" {
                let to = copies.join(entry.file_name());
                fs::copy(entry.path(), to).named("copy", &entry.path())?;
            }
        }
        let (sources, said) = (self.scratch.join("all-sources.list"), self.scratch.join("said"));
        fs::write(&sources, &lists.sources).named("write", &sources)?;
        let stderr = File::create(&said).named("write", &said)?;
        // Whatever the packages start, and whatever is mounted for them, ends with it and with us.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]);
        command.args(["mmdebstrap", "--mode=root", "--variant=minbase", "--format=directory"]);
        command.arg("--skip=update,check/empty,check/signed-by,download/empty,essential/unlink");
        command.arg(format!("--include={}", wanted.join(",")));
        command.args(["--aptopt=APT::Install-Recommends \"false\"", "--dpkgopt=force-unsafe-io"]);
        for line in include_str!("debian/dpkg.conf").lines().filter(|line| line.starts_with("path-")) {
            command.arg(format!("--dpkgopt={line}"));
        }
        command.arg("").arg(&self.root).arg(&sources);
        // Nothing of this user's gets into the image, or into what makes it.
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("HOME", "/root").env("LC_ALL", "C");
        command.env("SOURCE_DATE_EPOCH", self.epoch.to_string());
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(stderr);
        let tool = |source| ImageError::Tool { tool: "mmdebstrap".into(), source };
        let mut child = command.spawn().map_err(tool)?;
        let status = self.root.join("var/lib/dpkg/status");
        let good = loop {
            if let Some(ended) = child.try_wait().map_err(tool)? {
                break ended.success();
            }
            std::thread::sleep(Duration::from_millis(200));
            let done = fs::read_to_string(&status).map_or(0.0, |text| installed(&text));
            let fraction = (done / debs.len().max(1) as f64).min(1.0);
            progress(Progress { stage: Stage::Installing, fraction });
        };
        if good {
            return Ok(());
        }
        let said = fs::read(&said).named("read", &said)?;
        Err(ImageError::Install { reason: what_failed(&String::from_utf8_lossy(&said)) })
    }

    /// Makes a guest of Ramet out of the system.
    fn set_up(&self, lists: &Lists, packages: &[String], agent: &Path) -> Result<(), ImageError> {
        for path in [
            "etc/dpkg/dpkg.cfg.d/99mmdebstrap",
            "etc/apt/apt.conf.d/99mmdebstrap",
            "etc/apt/sources.list.d/0000sources.list",
            "var/lib/dbus/machine-id",
            "var/log/alternatives.log",
            "var/log/dpkg.log",
            "var/cache/debconf/config.dat-old",
            "var/cache/debconf/templates.dat-old",
            "var/cache/ldconfig/aux-cache",
            "var/lib/dpkg/diversions-old",
            "var/lib/dpkg/statoverride-old",
            "var/lib/dpkg/status-old",
        ] {
            self.remove(Path::new(path))?;
        }
        for dir in ["var/log/apt", "var/lib/apt/lists"] {
            self.empty(dir, &|_| true)?;
        }
        self.empty("etc/ssh", &|name| name.starts_with("ssh_host_"))?;
        let mut tree = Tree::default();
        for (path, text) in FILES {
            tree.bytes(path, 0o644, text);
        }
        for (path, target) in LINKS {
            tree.link(path, target);
        }
        for unit in masked(packages) {
            tree.link(&format!("/etc/systemd/system/{unit}"), "/dev/null");
        }
        for name in GENERATORS {
            tree.link(&format!("/etc/systemd/system-generators/systemd-{name}-generator"), "/dev/null");
        }
        if self.root.join("etc/ssh/sshd_config").exists() {
            tree.bytes("/etc/systemd/system/ssh.service.d/ramet.conf", 0o644, SSH_KEYS);
        }
        if !lists.lasting.is_empty() {
            tree.bytes("/etc/apt/sources.list", 0o644, lists.lasting.as_str());
        }
        tree.file("/usr/bin/ramet-agent", 0o755, agent);
        tree.lay_over(&self.root)?;
        // The console logs root in without asking, as whoever has the console has the machine.
        let path = self.root.join("etc/shadow");
        let shadow = fs::read_to_string(&path).named("read", &path)?;
        fs::write(&path, without_password(&shadow)).named("write", &path)?;
        fs::set_permissions(&self.root, fs::Permissions::from_mode(0o755)).named("open up", &self.root)
    }

    /// All modules of the kernel, with what `modprobe` needs.
    fn add_modules(&self, kernel: &Path, version: &str) -> Result<(), ImageError> {
        let dir = kernel_dir(kernel, "modules").join(version);
        let mut tree = Tree::default();
        if dir.is_dir() {
            let keep =
                |path: &str| !path.ends_with("/build") && !path.ends_with("/source") && !path.ends_with("/vmlinuz");
            tree.add_host(&dir, &format!("/usr/lib/modules/{version}"), false, &keep)?;
            tree.lay_over(&self.root)?;
        }
        let output = Command::new("chroot")
            .arg(&self.root)
            .args(["depmod", version])
            .stdin(Stdio::null())
            .output()
            .map_err(|source| ImageError::missing_tool("chroot", "coreutils", source))?;
        if output.status.success() {
            return Ok(());
        }
        let reason = String::from_utf8_lossy(&output.stderr).trim().to_owned();
        Err(ImageError::Failed { what: "list the kernel's modules".into(), reason })
    }

    /// Everything that is installed, as `name version`.
    fn contents(&self) -> Result<Vec<String>, ImageError> {
        let path = self.root.join("var/lib/dpkg/status");
        Ok(titles(&fs::read_to_string(&path).named("read", &path)?))
    }

    fn remove(&self, path: &Path) -> Result<(), ImageError> {
        let path = self.root.join(path);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error).named("remove", &path),
            _ => Ok(()),
        }
    }

    /// Removes files of a directory.
    fn empty(&self, dir: &str, which: &dyn Fn(&str) -> bool) -> Result<(), ImageError> {
        let Ok(entries) = fs::read_dir(self.root.join(dir)) else { return Ok(()) };
        for entry in entries.flatten() {
            let file = entry.file_type().is_ok_and(|kind| !kind.is_dir());
            if file && entry.file_name().to_str().is_some_and(which) {
                self.remove(&Path::new(dir).join(entry.file_name()))?;
            }
        }
        Ok(())
    }
}

/// Units that are not to start. Who asks for a package by its name wants its unit.
fn masked(packages: &[String]) -> BTreeSet<&'static str> {
    let lines = include_str!("debian/masked").lines().map(str::trim);
    let unit = |line: &&str| {
        let stem = line.rsplit_once('.').map_or(*line, |(stem, _)| stem);
        !line.is_empty() && !line.starts_with('#') && !packages.iter().any(|package| package == stem)
    };
    lines.filter(unit).collect()
}

/// How many packages dpkg has dealt with; one that is only unpacked counts half.
fn installed(status: &str) -> f64 {
    status.lines().filter_map(|line| line.strip_prefix("Status: ")).fold(0.0, |sum, line| {
        sum + match line.rsplit(' ').next() {
            Some("installed") => 1.0,
            Some("unpacked" | "half-configured" | "triggers-pending" | "triggers-awaited") => 0.5,
            _ => 0.0,
        }
    })
}

/// Packages of dpkg's status, as `name version`, in the order of their names.
fn titles(status: &str) -> Vec<String> {
    let field = |paragraph: &str, name: &str| {
        paragraph.lines().find_map(|line| line.strip_prefix(name)).map(|value| value.trim().to_owned())
    };
    let mut found: Vec<String> = status
        .split("\n\n")
        .filter(|paragraph| field(paragraph, "Status:").is_some_and(|status| status.ends_with(" installed")))
        .filter_map(|paragraph| Some(format!("{} {}", field(paragraph, "Package:")?, field(paragraph, "Version:")?)))
        .collect();
    found.sort();
    found
}

/// `/etc/shadow` with no password for root.
fn without_password(shadow: &str) -> String {
    let line = |line: &str| match line.strip_prefix("root:").and_then(|rest| rest.split_once(':')) {
        Some((_, rest)) => format!("root::{rest}\n"),
        None => format!("{line}\n"),
    };
    shadow.lines().map(line).collect()
}

/// The lines of `mmdebstrap` and what it ran that tell what went wrong.
fn what_failed(said: &str) -> String {
    let lines: Vec<&str> = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    let tells = |line: &&&str| {
        let lower = line.to_lowercase();
        ["e:", "error", "cannot ", "failed", "no space"].iter().any(|mark| lower.contains(mark))
    };
    let mut found: Vec<&str> = lines.iter().filter(tells).copied().collect();
    if found.is_empty() {
        found = lines;
    }
    found.dedup();
    let from = found.len().saturating_sub(5);
    if found.is_empty() { "mmdebstrap ended without a word".into() } else { found[from..].join("; ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    const STATUS: &str = "\
Package: zlib1g
Status: install ok installed
Version: 1:1.2

Package: apt
Status: install ok unpacked
Version: 2.6

Package: bash
Status: install ok installed
Description: a shell
 Version: not this
Version: 5.2-1

Package: gone
Status: deinstall ok config-files
Version: 1
";

    #[test]
    fn the_status_of_packages_is_understood() {
        assert_eq!(titles(STATUS), ["bash 5.2-1", "zlib1g 1:1.2"]);
        assert_eq!(installed(STATUS), 2.5);
        assert!(titles("").is_empty() && installed("garbage") == 0.0);
    }

    #[test]
    fn units_of_packages_that_were_asked_for_are_not_masked() {
        let all = masked(&[]);
        assert!(all.contains("apt-daily.timer") && all.contains("systemd-logind.service") && all.len() > 40);
        assert!(all.iter().all(|unit| unit.contains('.') && !unit.contains([' ', '/', '#'])));
        for kept in
            ["systemd-journald.service", "systemd-tmpfiles-setup.service", "console-getty.service", "ssh.service"]
        {
            assert!(!all.contains(kept), "{kept}");
        }
        let some = masked(&["logrotate".into(), "systemd-timesyncd".into()]);
        assert!(all.contains("logrotate.timer") && !some.contains("logrotate.timer"));
        assert_eq!(some.len(), all.len() - 2);
    }

    #[test]
    fn root_gets_no_password_and_others_keep_theirs() {
        let shadow = "root:*:19675:0:99999:7:::\ndaemon:*:1:0:99999:7:::\nroots:!:1::::::\n";
        assert_eq!(without_password(shadow), "root::19675:0:99999:7:::\ndaemon:*:1:0:99999:7:::\nroots:!:1::::::\n");
    }

    #[test]
    fn failures_are_told_by_the_lines_that_tell_them() {
        let said = "I: extracting archives...\nSetting up x (1)\ndpkg: error processing package x (--configure):\n\
                    done.\nErrors were encountered while processing:\n x\nE: apt failed\n";
        let text = what_failed(said);
        assert!(text.starts_with("dpkg: error processing package x") && text.ends_with("E: apt failed"), "{text}");
        assert_eq!(what_failed("I: one\nI: two\n"), "I: one; I: two");
        assert!(what_failed("").contains("without a word"));
    }

    #[test]
    fn an_images_number_is_of_its_name_and_contents() {
        let of = |name: &str, contents: &[&str]| {
            identify(name, &contents.iter().map(|text| (*text).to_owned()).collect::<Vec<_>>())
        };
        assert_eq!(of("a", &["b 1"]), of("a", &["b 1"]));
        assert_ne!(of("a", &["b 1"]), of("a", &["b 2"]));
        assert_ne!(of("a", &["b 1"]), of("c", &["b 1"]));
    }

    #[test]
    fn the_kernel_is_told_of_the_disk() {
        let cmdline = format!("{CMDLINE} {ROOT}");
        for word in ["console=ttyS0", "root=/dev/vda", "rw", "rootfstype=ext4", "net.ifnames=0", "panic=-1"] {
            assert!(cmdline.split(' ').any(|given| given == word), "{word}");
        }
    }
}
