//! What can go wrong with images.

use std::io;
use std::path::{Path, PathBuf};

/// A failure to build, find or load an image.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// No image of that name.
    #[error("there is no image {name:?}; build it with `ramet image build {name}`, or see `ramet image ls`")]
    Missing {
        /// The name.
        name: String,
    },
    /// A name that cannot be one.
    #[error(
        "{name:?} cannot be the name of an image: use 1 to 64 of a-z, 0-9, `-`, `_`, `.`, beginning with a letter or digit"
    )]
    BadName {
        /// The name.
        name: String,
    },
    /// An image of that name exists already.
    #[error("there is an image {name:?} already; remove it with `ramet image rm {name}`, or build with `--replace`")]
    Exists {
        /// The name.
        name: String,
    },
    /// A file of the image is missing, truncated or changed.
    #[error("image {name:?} is damaged: {} {what}; build it again with `ramet image build {name} --replace`", file.display())]
    Damaged {
        /// The image.
        name: String,
        /// The file.
        file: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The image was made by another version.
    #[error(
        "image {name:?} has format {found}, this version of Ramet knows {known}; build it again with `ramet image build {name} --replace`"
    )]
    Format {
        /// The image.
        name: String,
        /// Its format.
        found: u32,
        /// Our format.
        known: u32,
    },
    /// A tool of the distribution is missing.
    #[error("cannot run `{tool}`: {source}; images are built on Debian or Ubuntu, with `apt` and `dpkg` installed")]
    Tool {
        /// The tool.
        tool: String,
        /// Why.
        source: io::Error,
    },
    /// A program that Debian images need is missing.
    #[error("cannot run `{tool}`, which makes Debian images; install it with `apt-get install {package}`")]
    NoTool {
        /// The program.
        tool: String,
        /// The package that brings it.
        package: String,
        /// Why.
        source: io::Error,
    },
    /// Something that only root may do.
    #[error(
        "only root can {what}, since packages are installed as their owners; run it as root, for example with `sudo`"
    )]
    NotRoot {
        /// What was tried.
        what: String,
    },
    /// Packages that cannot be installed.
    #[error("cannot install the packages: {reason}; try with fewer packages to find the one that fails")]
    Install {
        /// What the installation said.
        reason: String,
    },
    /// The disk has no room for the system.
    #[error(
        "a disk of {} MiB has no room for the system; use `--size {}M` or more",
        size >> 20,
        needed >> 20
    )]
    DiskTooSmall {
        /// Bytes of the disk.
        size: u64,
        /// Bytes that are needed.
        needed: u64,
    },
    /// No such package.
    #[error("the distribution has no package {package:?}; check the name with `apt-cache search`")]
    NoPackage {
        /// The package.
        package: String,
    },
    /// No such package in the suite.
    #[error(
        "the distribution's suite {suite:?} has no package {package:?}; check the name, or build without `--suite` or \
         with another one"
    )]
    NoSuitePackage {
        /// The package.
        package: String,
        /// The suite.
        suite: String,
    },
    /// A name that cannot be a suite's.
    #[error(
        "{suite:?} cannot be the name of a suite: use 1 to 40 of a-z, 0-9, `-`, not beginning with `-`, such as trixie or \
         trixie-backports"
    )]
    BadSuite {
        /// The name.
        suite: String,
    },
    /// The distribution does not have that suite.
    #[error(
        "the distribution has no suite {suite:?} at {mirror}; see {mirror}/dists for those that it has, and use such a \
         name with `--suite`"
    )]
    NoSuite {
        /// The suite.
        suite: String,
        /// Where it was looked for.
        mirror: String,
    },
    /// The suite is not signed with the distribution's keys.
    #[error(
        "the distribution's suite {suite:?} cannot be trusted: no key in {} has signed it ({reason}); a newer version of \
         this machine's package of archive keys may have the key",
        keyring.display()
    )]
    Untrusted {
        /// The suite.
        suite: String,
        /// The distribution's keys.
        keyring: PathBuf,
        /// What apt said.
        reason: String,
    },
    /// Packages cannot be resolved or downloaded.
    #[error("cannot {what}: {reason}; check the network and /etc/apt/sources.list*, then try again")]
    Apt {
        /// What was tried.
        what: String,
        /// What apt said.
        reason: String,
    },
    /// A tool failed.
    #[error("cannot {what}: {reason}")]
    Failed {
        /// What was tried.
        what: String,
        /// Why.
        reason: String,
    },
    /// The agent's binary is missing or not what guests need.
    #[error(
        "{} cannot be the guest's agent: {reason}; build it with `RUSTFLAGS=-Ctarget-feature=+crt-static cargo build \
         --profile guest -p ramet-guest --bin ramet-agent --no-default-features --target x86_64-unknown-linux-gnu \
         --target-dir target/guest`",
        path.display()
    )]
    Agent {
        /// The binary.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// A path to add that cannot be added.
    #[error(
        "cannot add {what:?} to the image: {reason}; use HOST[:GUEST] with an existing file or directory and an absolute path in the guest"
    )]
    BadAdd {
        /// What was to be added.
        what: String,
        /// Why not.
        reason: String,
    },
    /// A file of the host cannot be read or written.
    #[error("cannot {verb} {}: {source}", path.display())]
    Io {
        /// What was tried.
        verb: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

impl ImageError {
    /// A tool that cannot be run, and the package that brings it.
    pub(crate) fn missing_tool(tool: &str, package: &str, source: io::Error) -> Self {
        Self::NoTool { tool: tool.to_owned(), package: package.to_owned(), source }
    }
}

/// Names the file in an error.
pub(crate) trait Named<T> {
    fn named(self, verb: &'static str, path: &Path) -> Result<T, ImageError>;
}

impl<T> Named<T> for io::Result<T> {
    fn named(self, verb: &'static str, path: &Path) -> Result<T, ImageError> {
        self.map_err(|source| ImageError::Io { verb, path: path.to_owned(), source })
    }
}
