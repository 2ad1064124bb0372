//! From a fresh Debian or Ubuntu machine with Rust to built programs and guest images. Every step looks first whether
//! there is anything to do.

use std::{
    path::{Path, PathBuf},
    time::SystemTime,
};

use anyhow::{Context as _, Result, bail};

use crate::run::{Tool, find, say, step};

/// What has to be on the machine: a file or program that tells, and the package that brings it.
const NEEDED: [(Probe, &str, &str); 14] = [
    (Probe::Program("qemu-system-x86_64"), "qemu-system-x86", "runs the VMs"),
    (Probe::Program("qemu-img"), "qemu-utils", "makes overlays of disks"),
    (Probe::Program("nft"), "nftables", "keeps families' networks apart"),
    (Probe::Program("tcpdump"), "tcpdump", "shows tests and benches what is on the wire"),
    (Probe::Program("ip"), "iproute2", "makes the hosts of a lab"),
    (Probe::Program("dpkg-deb"), "dpkg", "unpacks the guest's packages"),
    (Probe::Program("xz"), "xz-utils", "unpacks them"),
    (Probe::Program("zstd"), "zstd", "unpacks them"),
    (Probe::Program("setpriv"), "util-linux", "ends the VMs of benches and tests with them"),
    (Probe::Program("mkfs.ext4"), "e2fsprogs", "makes disks of VMs"),
    (Probe::Program("mmdebstrap"), "mmdebstrap", "installs the packages of guests with a disk"),
    (Probe::Program("cc"), "gcc", "links Rust programs"),
    (Probe::Library("libc.a"), "libc6-dev", "links the guest's agent statically"),
    (Probe::File("/etc/ssl/certs/ca-certificates.crt"), "ca-certificates", "lets apt and cargo download"),
];

#[derive(Debug, Clone, Copy)]
enum Probe {
    Program(&'static str),
    Library(&'static str),
    File(&'static str),
}

impl Probe {
    fn present(self) -> bool {
        match self {
            Self::Program(name) => find(name).is_some(),
            Self::File(path) => Path::new(path).exists(),
            Self::Library(name) => {
                ["/usr/lib/x86_64-linux-gnu", "/usr/lib64", "/usr/lib"].iter().any(|d| Path::new(d).join(name).exists())
            }
        }
    }
}

/// How the programs are built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Profile {
    /// For tests.
    Dev,
    /// For demo and benches.
    Release,
}

impl Profile {
    fn directory(self) -> &'static str {
        match self {
            Self::Dev => "debug",
            Self::Release => "release",
        }
    }
}

/// What the set-up made.
#[derive(Debug)]
pub(crate) struct Built {
    bin_dir: PathBuf,
    /// Directory of the guest images.
    pub(crate) images: PathBuf,
}

impl Built {
    /// The path of one of the programs.
    pub(crate) fn bin(&self, name: &str) -> PathBuf {
        self.bin_dir.join(name)
    }
}

/// All of it.
pub(crate) fn all(root: &Path, profile: Profile) -> Result<Built> {
    packages()?;
    let built = build(root, profile)?;
    images(root, &built, profile)?;
    Ok(built)
}

/// Installs the Debian packages that are missing.
pub(crate) fn packages() -> Result<()> {
    if cfg!(not(all(target_os = "linux", target_arch = "x86_64"))) {
        bail!("Ramet runs on Linux on x86-64 only");
    }
    let missing: Vec<_> = NEEDED.iter().filter(|(probe, ..)| !probe.present()).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let names: Vec<_> = missing.iter().map(|(_, package, _)| *package).collect();
    step(&format!("Packages to install by apt: {}", names.join(" ")));
    for (_, package, what_for) in &missing {
        say(&format!("      {package}: {what_for}"));
    }
    if find("apt-get").is_none() {
        bail!("There is no apt-get on this machine: install what brings these by hand: {}", names.join(" "));
    }
    let reason = "to install packages";
    let apt =
        |args: &[&str]| Tool::new("apt-get").args(args).env("DEBIAN_FRONTEND", "noninteractive").through_root(reason);
    let mut install = vec!["install", "--yes", "--quiet", "--no-install-recommends"];
    install.extend(&names);
    // The package lists of a fresh machine are empty or old.
    apt(&["update", "--quiet"])?.run()?;
    apt(&install)?.run()?;
    if let Some((_, package, what_for)) = NEEDED.iter().find(|(probe, ..)| !probe.present()) {
        bail!("{package} ({what_for}) is installed and what it should bring is still not there");
    }
    Ok(())
}

/// Builds the workspace, the programs for guests (static) and the tiny guest.
fn build(root: &Path, profile: Profile) -> Result<Built> {
    let directory = profile.directory();
    step(&format!("Building Ramet ({directory})"));
    let with_profile = |tool: Tool| if profile == Profile::Release { tool.arg("--release") } else { tool };
    let tool = with_profile(Tool::cargo(root).args(["build", "--workspace", "--bins", "--lib"]));
    // Tests run some examples as programs of their own.
    if profile == Profile::Dev { tool.arg("--examples") } else { tool }.run()?;
    step("Building the guest's agent and the tests' program for guests (static), and the tiny guest");
    for (package, program) in GUEST_PROGRAMS {
        guest_build(root, package, program).run()?;
    }
    tiny_build(root).run()?;
    let built = Built { bin_dir: target(root).join(directory), images: target(root).join("images") };
    // Where `ramet image build` looks for the agent, and `ramet-bench color` for both.
    for (_, program) in GUEST_PROGRAMS {
        let (made, beside) = (guest_program(root, program), built.bin(&format!("{program}-static")));
        if !up_to_date(&beside, &made)? {
            std::fs::copy(made, &beside).with_context(|| format!("Can't write {}", beside.display()))?;
        }
    }
    Ok(built)
}

/// Programs that run in guests: package and name.
const GUEST_PROGRAMS: [(&str, &str); 2] = [("ramet-guest", "ramet-agent"), ("ramet-truth", "ramet-truth")];

/// What the image `web` has.
const WEB_PACKAGES: &str = "apache2,curl,python3-minimal";

/// A program for guests, as [`guest_build`] makes it.
fn guest_program(root: &Path, program: &str) -> PathBuf {
    target(root).join("guest/x86_64-unknown-linux-gnu/guest").join(program)
}

fn guest_build(root: &Path, package: &str, program: &str) -> Tool {
    Tool::cargo(root)
        .args(["build", "--profile", "guest", "--package", package, "--bin", program, "--no-default-features"])
        .args(["--target", "x86_64-unknown-linux-gnu", "--target-dir"])
        .arg(target(root).join("guest"))
        .env("RUSTFLAGS", "-C target-feature=+crt-static")
}

fn tiny_build(root: &Path) -> Tool {
    // In its own directory, so that its own .cargo/config.toml holds.
    // The flags of its configuration must not be replaced.
    Tool::cargo(&root.join("tiny"))
        .args(["build", "--release", "--target-dir"])
        .arg(target(root).join("tiny"))
        .without_env("RUSTFLAGS")
}

/// Cargo's target directory.
pub(crate) fn target(root: &Path) -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root.join("target"), |dir| root.join(dir))
}

/// Builds the guest images `default` and `tiny`, and those of tests for tests, unless they are newer than what they are made of.
fn images(root: &Path, built: &Built, profile: Profile) -> Result<()> {
    let (agent, truth) = (guest_program(root, "ramet-agent"), guest_program(root, "ramet-truth"));
    let tiny = target(root).join("tiny/release/ramet-tiny");
    let mut add = truth.clone().into_os_string();
    add.push(":/usr/bin/ramet-truth");
    image(built, "default", &[&agent], |tool| Ok(tool.arg("--agent").arg(&agent)))?;
    image(built, "tiny", &[&tiny], |tool| Ok(tool.arg("--tiny").arg(&tiny)))?;
    // A whole Debian with a server, for what is told of clones of real machines.
    image(built, "web", &[&agent], |tool| {
        let tool = tool.arg("--debian").arg("--packages").arg(WEB_PACKAGES).arg("--agent").arg(&agent);
        tool.through_root("to install Debian packages into the disk of a guest")
    })?;
    if profile == Profile::Dev {
        // A kernel of this machine's distribution, and a newer one.
        for (name, suite) in [("truth", &[][..]), ("truth-trixie", &["--suite", "trixie"])] {
            image(built, name, &[&agent, &truth], |tool| {
                Ok(tool.arg("--agent").arg(&agent).arg("--add").arg(&add).args(suite))
            })?;
        }
    }
    Ok(())
}

fn image(built: &Built, name: &str, parts: &[&Path], options: impl FnOnce(Tool) -> Result<Tool>) -> Result<()> {
    let made = built.images.join(name).join("image.json");
    for part in parts {
        if !up_to_date(&made, part)? {
            step(&format!("Building the guest image '{name}'"));
            let tool = Tool::new(built.bin("ramet")).args(["image", "build", name, "--replace", "--image-dir"]);
            return options(tool.arg(&built.images))?.run();
        }
    }
    Ok(())
}

/// Whether `made` exists and is no older than `part`.
fn up_to_date(made: &Path, part: &Path) -> Result<bool> {
    let part = modified(part).with_context(|| format!("{} was not built", part.display()))?;
    Ok(modified(made).is_ok_and(|made| made >= part))
}

fn modified(path: &Path) -> std::io::Result<SystemTime> {
    std::fs::metadata(path)?.modified()
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn an_image_older_than_its_parts_is_built_again() {
        let dir = std::env::temp_dir().join(format!("ramet-xtask-{}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        let (made, part) = (dir.join("made"), dir.join("part"));
        assert!(up_to_date(&made, &part).is_err(), "no part");
        std::fs::write(&part, "").unwrap();
        assert!(!up_to_date(&made, &part).unwrap(), "not made yet");
        std::fs::write(&made, "").unwrap();
        assert!(up_to_date(&made, &part).unwrap());
        let old = SystemTime::now() - std::time::Duration::from_secs(60);
        std::fs::File::options().write(true).open(&made).unwrap().set_modified(old).unwrap();
        assert!(!up_to_date(&made, &part).unwrap(), "older");
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
