//! Memory of the host: is there enough for what is asked for; and the file system of the page files.

use std::{fs, io, path::Path};

use anyhow::Context as _;
use ramet_client::api::ErrorCode;
use ramet_memory::ByteSize;
use rustix::{
    io::Errno,
    mount::{MountFlags, UnmountFlags},
};

use crate::error::{ApiError, ApiResult};

/// What QEMU itself weighs, at most.
pub const VMM_WEIGHT: ByteSize = ByteSize::mib(48);
/// Left free for everything else on the host.
const RESERVE: ByteSize = ByteSize::mib(128);

/// The host's memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HostMemory {
    /// All of it.
    pub total: ByteSize,
    /// What can be had without swapping.
    pub available: ByteSize,
}

impl HostMemory {
    /// As the kernel tells.
    ///
    /// # Errors
    /// When /proc/meminfo can't be read.
    pub fn read() -> io::Result<Self> {
        Self::parse(&fs::read_to_string("/proc/meminfo")?)
            .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "/proc/meminfo has no MemAvailable"))
    }

    fn parse(text: &str) -> Option<Self> {
        let field = |name: &str| {
            let line = text.lines().find_map(|l| l.strip_prefix(name)?.strip_prefix(':'))?;
            let kib: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
            kib.checked_mul(1024).map(ByteSize)
        };
        Some(Self { total: field("MemTotal")?, available: field("MemAvailable")? })
    }

    /// Refuses what the host has no memory for.
    ///
    /// # Errors
    /// [`ErrorCode::NoMemory`], which names what is needed and what there is.
    pub fn check(&self, what: &str, needed: ByteSize) -> ApiResult<()> {
        let usable = ByteSize(self.available.bytes().saturating_sub(RESERVE.bytes()));
        if needed <= usable {
            return Ok(());
        }
        Err(ApiError::new(
            ErrorCode::NoMemory,
            format!("No memory left for {what}: {needed} needed, {usable} available on this host"),
        ))
    }
}

/// What a new root VM needs: all of its memory, since it may write to all of it.
#[must_use]
pub fn needed_by_root(memory: ByteSize) -> ByteSize {
    ByteSize(memory.bytes().saturating_add(VMM_WEIGHT.bytes()))
}

/// What `count` clones need to begin with: their QEMUs, and a sixteenth of their memory for first writes. The rest they
/// share with the image until they write to it.
#[must_use]
pub fn needed_by_clones(memory: ByteSize, count: u64) -> ByteSize {
    ByteSize((memory.bytes() / 16 + VMM_WEIGHT.bytes()).saturating_mul(count))
}

/// Bytes that still fit on the file system of `dir`.
///
/// # Errors
/// When it can't be asked.
pub fn room(dir: &Path) -> io::Result<ByteSize> {
    let fs = rustix::fs::statvfs(dir)?;
    Ok(ByteSize(fs.f_bavail.saturating_mul(fs.f_frsize)))
}

/// Bytes that a file takes on its disk; none for one that can't be asked for.
pub(crate) fn stored_bytes(path: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    fs::metadata(path).map_or(0, |m| m.blocks() * 512)
}

/// Mounts the page files' own tmpfs, without huge pages and for the owner only, unless it is there from before.
///
/// # Errors
/// When it can't be mounted, or what is there may use huge pages.
pub fn mount_pages(dir: &Path, size: Option<ByteSize>) -> anyhow::Result<()> {
    fs::create_dir_all(dir).with_context(|| format!("Failed to make {}", dir.display()))?;
    if !is_mount(dir)? {
        let size = size.map_or("75%".to_owned(), |s| s.bytes().to_string());
        let options = std::ffi::CString::new(format!("huge=never,mode=0700,size={size}"))?;
        rustix::mount::mount(
            "ramet",
            dir,
            "tmpfs",
            MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC,
            &*options,
        )
        .map_err(|err| match err {
            Errno::PERM | Errno::ACCESS => anyhow::anyhow!("{err}: run rametd as root"),
            err => err.into(),
        })
        .with_context(|| format!("Failed to mount a tmpfs at {}", dir.display()))?;
    }
    ramet_memory::check_page_file_mount(dir)?;
    Ok(())
}

/// Takes the page files' tmpfs away.
///
/// # Errors
/// When something still uses it.
pub fn unmount_pages(dir: &Path) -> anyhow::Result<()> {
    if is_mount(dir)? {
        rustix::mount::unmount(dir, UnmountFlags::empty())
            .with_context(|| format!("Failed to unmount {}", dir.display()))?;
    }
    Ok(())
}

/// Whether something is mounted right here.
fn is_mount(dir: &Path) -> io::Result<bool> {
    let real = dir.canonicalize()?;
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    Ok(table.lines().filter_map(|line| line.split(' ').nth(4)).any(|point| Path::new(&unescape(point)) == real))
}

/// Undoes mountinfo's octal escapes of blanks.
fn unescape(text: &str) -> String {
    text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn too_much_is_refused_with_numbers() {
        let text = "MemTotal:       2048000 kB\nMemFree: 1 kB\nMemAvailable:    1048576 kB\n";
        let memory = HostMemory::parse(text).unwrap();
        assert_eq!(memory.available, ByteSize::mib(1024));
        memory.check("VM 'web'", ByteSize::mib(512)).unwrap();
        let err = memory.check("VM 'web'", needed_by_root(ByteSize::mib(1024))).unwrap_err();
        assert_eq!(err.code(), ErrorCode::NoMemory);
        assert!(err.to_string().contains("VM 'web': 1.0G needed, 896M available"), "{err}");
        assert!(HostMemory::parse("MemTotal: x kB").is_none());
    }

    #[test]
    fn clones_need_little_and_their_number_can_not_overflow() {
        assert_eq!(needed_by_clones(ByteSize::mib(1024), 8), ByteSize::mib(8 * (64 + 48)));
        assert_eq!(needed_by_clones(ByteSize(1 << 60), u64::MAX).bytes(), u64::MAX);
    }

    #[test]
    fn mounts_are_told_from_plain_directories() {
        assert!(is_mount(Path::new("/proc")).unwrap());
        assert!(!is_mount(tempfile::tempdir().unwrap().path()).unwrap());
        assert!(HostMemory::read().unwrap().total.bytes() > 0);
    }
}
