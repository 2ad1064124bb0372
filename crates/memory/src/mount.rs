//! The check that stands before every page file: its tmpfs must never use huge pages.
//!
//! Filling one 4 KiB page of a file on a tmpfs with huge pages installs 2 MiB: the neighbours then read as zeros, with
//! no fault to tell the pager (reproduced on 6.18 with `huge=always` and `huge=within_size`). A clone would run on wrong
//! bytes, so such a mount is refused.

use std::{
    io,
    path::{Path, PathBuf},
};

/// Why a directory can't hold page files.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The directory is on another file system.
    #[error("Page files need a tmpfs, but {} is on {found}: mount one with `mount -t tmpfs -o huge=never tmpfs {0}`", dir.display())]
    NotTmpfs {
        /// The directory.
        dir: PathBuf,
        /// The file system's type.
        found: String,
    },
    /// Huge pages would silently corrupt clones.
    #[error("The tmpfs of {} has `{option}`: huge pages turn missing pages into zeros; remount it with `mount -o remount,huge=never {}`", dir.display(), mount.display())]
    HugePages {
        /// The directory.
        dir: PathBuf,
        /// Where its tmpfs is mounted.
        mount: PathBuf,
        /// The offending option.
        option: String,
    },
    /// `shmem_enabled` overrides every mount.
    #[error(
        "/sys/kernel/mm/transparent_hugepage/shmem_enabled is `force`, which puts huge pages on every tmpfs and corrupts clones: write `never` to it"
    )]
    Forced,
    /// The mount could not be found out.
    #[error("Failed to find the mount of {}", dir.display())]
    Unknown {
        /// The directory.
        dir: PathBuf,
        /// The cause.
        #[source]
        source: io::Error,
    },
}

/// Refuses `dir` unless it lies on a tmpfs with `huge=never` (or `advise`, which page files never ask for).
///
/// # Errors
/// [`MountError`], which names the mount and the remedy.
pub fn check_page_file_mount(dir: &Path) -> Result<(), MountError> {
    let unknown = |source| MountError::Unknown { dir: dir.to_owned(), source };
    let real = dir.canonicalize().map_err(unknown)?;
    let table = std::fs::read_to_string("/proc/self/mountinfo").map_err(unknown)?;
    let forced = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
        .is_ok_and(|text| text.contains("[force]"));
    judge(dir, &real, &table, forced)
}

fn judge(dir: &Path, real: &Path, mountinfo: &str, forced: bool) -> Result<(), MountError> {
    let mut best: Option<(PathBuf, &str, &str)> = None;
    for line in mountinfo.lines() {
        let Some((left, right)) = line.split_once(" - ") else { continue };
        let Some(point) = left.split(' ').nth(4) else { continue };
        let point = PathBuf::from(unescape(point));
        let mut fields = right.splitn(3, ' ');
        let (Some(kind), _, Some(options)) = (fields.next(), fields.next(), fields.next()) else { continue };
        // The last of the longest matching mounts is the one on top.
        if real.starts_with(&point)
            && best.as_ref().is_none_or(|(b, ..)| point.components().count() >= b.components().count())
        {
            best = Some((point, kind, options));
        }
    }
    let (mount, kind, options) = best.ok_or_else(|| MountError::Unknown {
        dir: dir.to_owned(),
        source: io::Error::new(io::ErrorKind::NotFound, "no entry in /proc/self/mountinfo"),
    })?;
    if kind != "tmpfs" {
        return Err(MountError::NotTmpfs { dir: dir.to_owned(), found: kind.to_owned() });
    }
    if forced {
        return Err(MountError::Forced);
    }
    match options.split(',').find(|o| o.starts_with("huge=") && !matches!(*o, "huge=never" | "huge=advise")) {
        Some(option) => Err(MountError::HugePages { dir: dir.to_owned(), mount, option: option.to_owned() }),
        None => Ok(()),
    }
}

/// Undoes the octal escapes of mountinfo (`\040` is a space).
fn unescape(text: &str) -> String {
    let mut out = Vec::with_capacity(text.len());
    let mut bytes = text.as_bytes();
    while let Some((&first, rest)) = bytes.split_first() {
        let code = (first == b'\\')
            .then(|| rest.get(..3))
            .flatten()
            .and_then(|d| std::str::from_utf8(d).ok())
            .and_then(|d| u8::from_str_radix(d, 8).ok());
        match code {
            Some(code) => {
                out.push(code);
                bytes = &rest[3..];
            }
            None => {
                out.push(first);
                bytes = rest;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &str = "22 1 254:0 / / rw - ext4 /dev/vda rw\n\
        30 22 0:26 / /run/a rw - tmpfs tmpfs rw,size=10k\n\
        31 22 0:27 / /run/a/big rw - tmpfs tmpfs rw,huge=always\n\
        32 22 0:28 / /run/with\\040space rw,nosuid shared:3 - tmpfs tmpfs rw,huge=never\n";

    fn check(path: &str, forced: bool) -> Result<(), MountError> {
        judge(Path::new(path), Path::new(path), TABLE, forced)
    }

    #[test]
    fn plain_tmpfs_and_huge_never_are_accepted() {
        check("/run/a/x", false).unwrap();
        check("/run/with space/x", false).unwrap();
    }

    #[test]
    fn huge_pages_are_refused_with_the_remedy() {
        let err = check("/run/a/big/x", false).unwrap_err().to_string();
        assert!(err.contains("huge=always") && err.contains("remount,huge=never /run/a/big"), "{err}");
        assert!(matches!(check("/run/a/x", true), Err(MountError::Forced)));
    }

    #[test]
    fn other_file_systems_are_refused() {
        let err = check("/home", false).unwrap_err().to_string();
        assert!(err.contains("ext4"), "{err}");
    }
}
