//! A file system out of a directory, with the same bytes each time: `mke2fs` makes it, then the times that it took from
//! this machine are replaced.

use crate::error::{ImageError, Named};
use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::{Command, Stdio};

/// Bytes of a block.
const BLOCK: u64 = 4096;
/// Bytes of the journal.
const JOURNAL: u64 = 16 << 20;
/// The smallest size that has room for a journal and a system.
const SMALLEST: u64 = 64 << 20;

/// What tells one file system from another.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Identity {
    /// Its UUID, and the seed of its directories' hashes.
    pub(crate) id: u128,
    /// No file is newer than that: seconds since 1970.
    pub(crate) epoch: u32,
}

/// Makes the file system `disk` of `size` bytes out of `tree`. `scratch` is for what is needed on the way.
pub(crate) fn make(tree: &Path, disk: &Path, size: u64, identity: Identity, scratch: &Path) -> Result<(), ImageError> {
    let needed = needed(tree)?;
    let too_small = || ImageError::DiskTooSmall { size, needed: round_up(needed, 64 << 20) };
    if size < needed {
        return Err(too_small());
    }
    let config = scratch.join("mke2fs.conf");
    fs::write(&config, include_str!("debian/mke2fs.conf")).named("write", &config)?;
    let file = File::create(disk).named("make", disk)?;
    file.set_len(size / BLOCK * BLOCK).named("make", disk)?;
    drop(file);
    let uuid = uuid(identity.id);
    let output = Command::new("mke2fs")
        .env("MKE2FS_CONFIG", &config)
        .env("LC_ALL", "C")
        .args(["-q", "-F", "-t", "ext4", "-m", "0", "-E"])
        .arg(format!("hash_seed={uuid},root_owner=0:0,discard"))
        .arg("-J")
        .arg(format!("size={}", JOURNAL >> 20))
        .args(["-U", &uuid, "-d"])
        .arg(tree)
        .arg(disk)
        .stdin(Stdio::null())
        .output()
        .map_err(|source| ImageError::missing_tool("mke2fs", "e2fsprogs", source))?;
    let said = String::from_utf8_lossy(&output.stderr).trim().replace('\n', "; ");
    if !output.status.success() {
        let full = ["Could not allocate", "No free space", "ENOSPC", "No space left in"];
        if full.iter().any(|text| said.contains(text)) {
            return Err(too_small());
        }
        return Err(ImageError::Failed { what: "make the disk's file system".into(), reason: said });
    }
    settle(disk, identity.epoch).named("set the times of the files in", disk)
}

/// Bytes that a file system needs for the tree; with room to work.
fn needed(tree: &Path) -> Result<u64, ImageError> {
    let mut bytes = 0;
    let mut files = 0;
    let mut linked = BTreeSet::new();
    let mut todo = vec![tree.to_owned()];
    while let Some(dir) = todo.pop() {
        for entry in fs::read_dir(&dir).named("read", &dir)? {
            let entry = entry.named("read", &dir)?;
            let metadata = entry.metadata().named("read", &entry.path())?;
            files += 1;
            if metadata.is_dir() {
                todo.push(entry.path());
                bytes += BLOCK;
            } else if metadata.is_file() && (metadata.nlink() == 1 || linked.insert(metadata.ino())) {
                bytes += round_up(metadata.len().min(metadata.blocks() * 512), BLOCK);
            }
        }
    }
    // Inode tables have 256 bytes for each 16 KiB; a file needs an inode of those.
    Ok(((bytes + bytes / 32 + JOURNAL + (8 << 20)).max(files * 16384)).max(SMALLEST))
}

fn round_up(value: u64, to: u64) -> u64 {
    value.div_ceil(to) * to
}

/// The number as a UUID of version 8.
fn uuid(id: u128) -> String {
    let id = id & !(0xf << 76) & !(0x3 << 62) | (0x8 << 76) | (0x2 << 62);
    let hex = format!("{id:032x}");
    format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
}

/// Features under which nothing but the times need be written: any sum of metadata, tables that are not written yet,
/// long group descriptors and groups of descriptors are not among them.
const KNOWN_INCOMPAT: u32 = 0x2 | 0x40 | 0x200;
const SUMS: u32 = 0x10 | 0x400;

/// Has no inode and no superblock show a later time than `epoch`.
fn settle(disk: &Path, epoch: u32) -> io::Result<()> {
    let file = File::options().read(true).write(true).open(disk)?;
    let mut sup = [0; 1024];
    file.read_exact_at(&mut sup, 1024)?;
    let word = |at: usize| u32::from_le_bytes([sup[at], sup[at + 1], sup[at + 2], sup[at + 3]]);
    let half = |at: usize| u16::from_le_bytes([sup[at], sup[at + 1]]);
    let (inodes, blocks, block_size) = (word(0), word(4), 1024_u64 << word(0x18).min(16));
    let (per_group, group_blocks, inode_size) = (word(0x28), word(0x20), half(0x58));
    if half(0x38) != 0xef53
        || block_size != BLOCK
        || inode_size != 256
        || per_group == 0
        || group_blocks == 0
        || word(0x60) & !KNOWN_INCOMPAT != 0
        || word(0x64) & SUMS != 0
    {
        return Err(io::Error::other("mke2fs made another file system than it was asked for"));
    }
    let groups = u64::from(blocks.div_ceil(group_blocks));
    for group in 0..groups {
        // Copies of the superblock are at the beginning of some groups.
        let at = if group == 0 { 1024 } else { group * u64::from(group_blocks) * BLOCK };
        let mut copy = [0; 1024];
        file.read_exact_at(&mut copy, at)?;
        if copy[0x38..0x3a] == [0x53, 0xef] && copy[0x68..0x78] == sup[0x68..0x78] {
            // Times of mounting, writing, checking, making; and what it was mounted at last; bytes ever written.
            copy[0x2c..0x30].fill(0);
            for time in [0x30, 0x40, 0x108] {
                copy[time..time + 4].copy_from_slice(&epoch.to_le_bytes());
            }
            copy[0x178..0x180].fill(0);
            file.write_all_at(&copy, at)?;
        }
    }
    let mut descriptors = vec![0; usize::try_from(groups).map_err(io::Error::other)? * 32];
    file.read_exact_at(&mut descriptors, BLOCK)?;
    let mut bitmap = vec![0; BLOCK as usize];
    for (group, descriptor) in descriptors.chunks_exact(32).enumerate() {
        let block = |at: usize| u64::from(u32::from_le_bytes([0, 1, 2, 3].map(|byte| descriptor[at + byte]))) * BLOCK;
        file.read_exact_at(&mut bitmap, block(4))?;
        let left = inodes.saturating_sub(u32::try_from(group).unwrap_or(u32::MAX).saturating_mul(per_group));
        for number in 0..per_group.min(left) as usize {
            if bitmap[number / 8] & (1 << (number % 8)) == 0 {
                continue;
            }
            let at = block(8) + number as u64 * 256;
            let mut inode = [0; 256];
            file.read_exact_at(&mut inode, at)?;
            if settle_inode(&mut inode, epoch) {
                file.write_all_at(&inode, at)?;
            }
        }
    }
    Ok(())
}

/// Sets an inode's times; whether there is anything in it.
fn settle_inode(inode: &mut [u8; 256], epoch: u32) -> bool {
    // The list of bad blocks has times and nothing else.
    if inode[..0x14].iter().all(|&byte| byte == 0) {
        return false;
    }
    let modified = u32::from_le_bytes([0x10, 0x11, 0x12, 0x13].map(|at| inode[at]));
    if modified >= epoch {
        inode[0x10..0x14].copy_from_slice(&epoch.to_le_bytes());
        inode[0x88..0x8c].fill(0);
    }
    // Accessed, changed, made: with the parts below a second.
    for (time, more) in [(0x8, 0x8c), (0xc, 0x84), (0x90, 0x94)] {
        inode[time..time + 4].copy_from_slice(&epoch.to_le_bytes());
        inode[more..more + 4].fill(0);
    }
    true
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tree(dir: &Path) {
        use std::os::unix::fs::PermissionsExt;
        fs::create_dir_all(dir.join("etc/deep")).unwrap();
        for number in 0..300 {
            fs::write(dir.join(format!("etc/file-{number}")), vec![number as u8; number * 50]).unwrap();
        }
        fs::write(dir.join("etc/deep/run"), "x").unwrap();
        fs::set_permissions(dir.join("etc/deep/run"), fs::Permissions::from_mode(0o4755)).unwrap();
        std::os::unix::fs::symlink("etc/deep", dir.join("link")).unwrap();
        fs::hard_link(dir.join("etc/file-7"), dir.join("etc/same")).unwrap();
    }

    #[test]
    fn the_same_tree_gives_the_same_bytes_whatever_the_time() {
        let dir = tempfile::tempdir().unwrap();
        let identity = Identity { id: 7 << 64, epoch: 1_600_000_000 };
        let make = |name: &str| {
            let from = dir.path().join(name);
            tree(&from);
            let disk = dir.path().join(format!("{name}.disk"));
            make(&from, &disk, 128 << 20, identity, dir.path()).unwrap();
            disk
        };
        let one = make("one");
        std::thread::sleep(std::time::Duration::from_millis(1100));
        let two = make("two");
        assert!(fs::read(&one).unwrap() == fs::read(two).unwrap());
        assert!(fs::metadata(&one).unwrap().blocks() * 512 < 30 << 20, "sparse");
        let check = Command::new("e2fsck").args(["-f", "-n"]).arg(&one).output().unwrap();
        assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));
        let ask = |what: &str| {
            let output = Command::new("debugfs").args(["-R", what]).arg(&one).output().unwrap();
            String::from_utf8(output.stdout).unwrap()
        };
        let run = ask("stat etc/deep/run");
        assert!(run.contains("Mode:  04755") && run.contains("0x5f5e1000:00000000"), "{run}");
        assert!(ask("stat etc/same").contains("Links: 2"));
    }

    #[test]
    fn a_tree_that_does_not_fit_is_told_with_what_it_needs() {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("tree");
        fs::create_dir(&from).unwrap();
        fs::write(from.join("big"), vec![1; 100 << 20]).unwrap();
        let identity = Identity { id: 0, epoch: 1 };
        let error = make(&from, &dir.path().join("disk"), 100 << 20, identity, dir.path()).unwrap_err();
        let ImageError::DiskTooSmall { size, needed } = error else { panic!("{error}") };
        assert!(size == 100 << 20 && needed > 110 << 20, "{needed}");
        make(&from, &dir.path().join("disk"), needed, identity, dir.path()).unwrap();
    }

    #[test]
    fn identifiers_are_of_version_8() {
        assert_eq!(uuid(0), "00000000-0000-8000-8000-000000000000");
        assert_eq!(uuid(u128::MAX), "ffffffff-ffff-8fff-bfff-ffffffffffff");
    }
}
