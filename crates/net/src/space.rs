//! Network namespaces, and work within them.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use rustix::mount::UnmountFlags;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::{Error, Result, sys};

/// `f_type` of the file system of namespaces.
const NSFS_MAGIC: u64 = 0x6e73_6673;

/// A network namespace, held open.
#[derive(Debug)]
pub(crate) struct Space {
    file: File,
}

impl Space {
    /// The calling thread's.
    pub(crate) fn current() -> Result<Self> {
        let path = "/proc/thread-self/ns/net";
        let file = File::open(path).map_err(|source| Error::kernel(format!("open {path}"), source))?;
        Ok(Self { file })
    }

    /// The one mounted at `path`; `None` if nothing is mounted there.
    pub(crate) fn mounted(path: &Path) -> Result<Option<Self>> {
        let failed = |source| Error::kernel(format!("open the namespace {}", path.display()), source);
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(failed(error)),
        };
        let kind = rustix::fs::fstatfs(&file).map_err(|errno| failed(errno.into()))?.f_type;
        Ok((kind as u64 == NSFS_MAGIC).then_some(Self { file }))
    }

    /// Makes one and mounts it at `path`.
    pub(crate) fn make(path: &Path) -> Result<Self> {
        let failed = |source: io::Error| Error::kernel(format!("make the namespace {}", path.display()), source);
        File::create(path).map_err(failed)?;
        let made = on_a_thread(|| {
            sys::unshare_network()?;
            rustix::mount::mount_bind("/proc/thread-self/ns/net", path).map_err(io::Error::from)
        });
        if let Err(error) = made {
            let _ = fs::remove_file(path);
            return Err(failed(error));
        }
        Self::mounted(path)?.ok_or_else(|| failed(io::ErrorKind::NotFound.into()))
    }

    /// Unmounts what is at `path` and removes the file. It ends when nobody holds it open.
    pub(crate) fn unmount(path: &Path) -> Result<()> {
        let failed = |source| Error::kernel(format!("remove the namespace {}", path.display()), source);
        // Unmounted until nothing is left: a crash between two attempts may have mounted twice.
        while let Some(space) = Self::mounted(path)? {
            drop(space);
            rustix::mount::unmount(path, UnmountFlags::DETACH).map_err(|errno| failed(errno.into()))?;
        }
        match fs::remove_file(path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed(error)),
            _ => Ok(()),
        }
    }

    /// Runs `work` on a thread of its own within it. Processes started there are within it too.
    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        on_a_thread(|| {
            move_into_link_name_space(self.file.as_fd(), Some(LinkNameSpaceType::Network))
                .map_err(|errno| Error::kernel("enter a network namespace", errno))?;
            work()
        })
    }
}

/// Runs `work` on a thread that ends with it.
pub(crate) fn on_a_thread<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| match scope.spawn(work).join() {
        Ok(value) => value,
        Err(panic) => std::panic::resume_unwind(panic),
    })
}

/// A program that work for a whole family runs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Program {
    name: &'static str,
    package: &'static str,
}

pub(crate) const IP: Program = Program { name: "ip", package: "iproute2" };
pub(crate) const TC: Program = Program { name: "tc", package: "iproute2" };
pub(crate) const NFT: Program = Program { name: "nft", package: "nftables" };

impl Program {
    /// Runs it, with `input` on its standard input, and returns its output.
    pub(crate) fn run(self, what: &str, arguments: &[&str], input: &str) -> Result<String> {
        let failed = |source: io::Error| match source.kind() {
            io::ErrorKind::NotFound => Error::MissingProgram { program: self.name, package: self.package },
            _ => Error::kernel(format!("run `{}` to {what}", self.name), source),
        };
        let mut child = Command::new(self.path())
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(failed)?;
        if let Some(mut stdin) = child.stdin.take() {
            // A program that ends early breaks the pipe, and its exit status says why.
            let _ = stdin.write_all(input.as_bytes());
        }
        let output = child.wait_with_output().map_err(failed)?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        Err(Error::Command {
            what: what.to_owned(),
            program: self.name,
            output: String::from_utf8_lossy(&output.stderr).trim().to_owned(),
        })
    }

    /// Where it is. Daemons are often started without the `sbin` directories in their path.
    fn path(self) -> PathBuf {
        let places = ["/usr/sbin", "/sbin", "/usr/bin", "/bin", "/usr/local/sbin"];
        places
            .iter()
            .map(|place| Path::new(place).join(self.name))
            .find(|path| path.exists())
            .unwrap_or_else(|| PathBuf::from(self.name))
    }
}

/// Runs a script of `ip` commands, one a line.
pub(crate) fn ip_batch(what: &str, lines: &[String]) -> Result<()> {
    IP.run(what, &["-batch", "-"], &(lines.join("\n") + "\n")).map(drop)
}

/// Runs a script of `nft`, all or nothing.
pub(crate) fn nft(what: &str, script: &str) -> Result<()> {
    NFT.run(what, &["-f", "-"], script).map(drop)
}

/// Sets a sysctl of the calling thread's namespace, such as `net/ipv4/ip_forward`. Those that this kernel lacks and
/// `optional` ones are left out.
pub(crate) fn sysctl(key: &str, value: &str, optional: bool) -> Result<()> {
    let path = format!("/proc/sys/{key}");
    // Written only if it differs, since some are read-only in containers although they are as we want them.
    if fs::read_to_string(&path).is_ok_and(|now| now.trim() == value) {
        return Ok(());
    }
    match OpenOptions::new().write(true).open(&path).and_then(|mut file| file.write_all(value.as_bytes())) {
        Err(error) if !(optional && error.kind() == io::ErrorKind::NotFound) => {
            Err(Error::kernel(format!("set {path} to {value}"), error))
        }
        _ => Ok(()),
    }
}
