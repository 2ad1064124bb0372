//! The directory of images.

use crate::error::{ImageError, Named};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use xxhash_rust::xxh3::Xxh3;

/// Version of `image.json`.
const FORMAT: u32 = 1;
const MANIFEST: &str = "image.json";
/// Where downloads are kept between builds.
const CACHE: &str = ".cache";
/// Beginning of the names of directories in the making.
const BUILDING: &str = ".build-";

/// What runs in a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A distribution's kernel with an initramfs.
    Linux,
    /// Ramet's own tiny guest.
    Tiny,
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Linux => "linux",
            Self::Tiny => "tiny",
        })
    }
}

/// A file of an image, with what is needed to see whether it is whole.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Its name in the image's directory.
    pub file: String,
    /// Its size in bytes.
    pub size: u64,
    /// XXH3 (64 bits) of its bytes, as 16 hexadecimal digits.
    pub xxh3: String,
}

/// The disk of an image.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskRecord {
    /// Its name in the image's directory.
    pub file: String,
    /// Its size in bytes, as a guest sees it.
    pub size: u64,
    /// Bytes that it took on this host when it was made: what was never written takes none.
    pub stored: u64,
    /// XXH3 (128 bits) of all its bytes, as 32 hexadecimal digits: the same on every host that has this disk.
    pub xxh3_128: String,
    /// When its file was changed last: seconds since 1970. While file and record agree, the bytes need not be read.
    pub modified: u64,
}

/// `image.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// Version of this format.
    pub format: u32,
    /// Name of the image.
    pub name: String,
    /// What runs in it.
    pub kind: Kind,
    /// The kernel, for QEMU's `-kernel`.
    pub kernel: FileRecord,
    /// The initramfs, for QEMU's `-initrd`.
    pub initrd: Option<FileRecord>,
    /// The kernel's command line.
    pub cmdline: String,
    /// When it was made: seconds since 1970.
    pub created: u64,
    /// Packages that the user asked for.
    pub packages: Vec<String>,
    /// All packages in it, as `name version`.
    pub contents: Vec<String>,
    /// Version of the kernel.
    pub kernel_version: String,
    /// The distribution's suite that it was made of, when that is not the machine's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub suite: Option<String>,
    /// The disk, for images whose root is on one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<DiskRecord>,
}

impl Manifest {
    /// Bytes of all files, as they are stored.
    pub fn stored(&self) -> u64 {
        let initrd = self.initrd.as_ref().map_or(0, |record| record.size);
        self.kernel.size + initrd + self.disk.as_ref().map_or(0, |record| record.stored)
    }
}

/// What is wrong with a file that has the right size.
const CHANGED: &str = "has other bytes than when it was built";

/// An image whose files are whole.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Image {
    /// Its directory.
    pub dir: PathBuf,
    /// What is known of it.
    pub manifest: Manifest,
}

impl Image {
    /// Path of the kernel.
    pub fn kernel(&self) -> PathBuf {
        self.dir.join(&self.manifest.kernel.file)
    }

    /// Path of the initramfs.
    pub fn initrd(&self) -> Option<PathBuf> {
        self.manifest.initrd.as_ref().map(|record| self.dir.join(&record.file))
    }

    /// Path of the disk: raw, read-only, an ext4 file system without a partition table.
    pub fn disk(&self) -> Option<PathBuf> {
        self.manifest.disk.as_ref().map(|record| self.dir.join(&record.file))
    }

    /// Bytes of all files, as they are stored.
    pub fn size(&self) -> u64 {
        self.manifest.stored()
    }

    /// Reads all files and holds them against the manifest. Loading does so for all but the disk.
    ///
    /// # Errors
    /// [`ImageError::Damaged`] with the first file that is not as it was built.
    pub fn verify(&self) -> Result<(), ImageError> {
        for record in std::iter::once(&self.manifest.kernel).chain(&self.manifest.initrd) {
            self.check(record)?;
        }
        self.manifest.disk.as_ref().map_or(Ok(()), |record| self.check_disk(record))
    }

    fn damaged(&self, file: &str, what: String) -> ImageError {
        ImageError::Damaged { name: self.manifest.name.clone(), file: self.dir.join(file), what }
    }

    /// What an error of reading a file of the image means.
    fn unreadable(&self, file: &str, error: ImageError) -> ImageError {
        match error {
            ImageError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                self.damaged(file, "is missing".into())
            }
            other => other,
        }
    }

    fn check(&self, record: &FileRecord) -> Result<(), ImageError> {
        let found = record_of(&self.dir, &record.file).map_err(|error| self.unreadable(&record.file, error))?;
        if found.size != record.size {
            return Err(self.damaged(&record.file, format!("has {} bytes instead of {}", found.size, record.size)));
        }
        if found.xxh3 != record.xxh3 {
            return Err(self.damaged(&record.file, CHANGED.into()));
        }
        Ok(())
    }

    /// Size and time of the disk; its bytes only if the time is another. Such is a copy of an image: with the right
    /// bytes it gets the time back, if that may be written.
    fn glance(&self, record: &DiskRecord) -> Result<(), ImageError> {
        let path = self.dir.join(&record.file);
        let metadata =
            fs::metadata(&path).named("read", &path).map_err(|error| self.unreadable(&record.file, error))?;
        if metadata.len() == record.size && metadata.modified().is_ok_and(|time| seconds(time) == record.modified) {
            return Ok(());
        }
        self.check_disk(record)?;
        let _ = File::open(&path).and_then(|file| file.set_modified(UNIX_EPOCH + Duration::from_secs(record.modified)));
        Ok(())
    }

    fn check_disk(&self, record: &DiskRecord) -> Result<(), ImageError> {
        let path = self.dir.join(&record.file);
        let (size, hash) = hash_disk(&path).map_err(|error| self.unreadable(&record.file, error))?;
        if size != record.size {
            return Err(self.damaged(&record.file, format!("has {size} bytes instead of {}", record.size)));
        }
        if hash != record.xxh3_128 {
            return Err(self.damaged(&record.file, CHANGED.into()));
        }
        Ok(())
    }
}

/// An image in the making, of which nobody sees anything yet.
#[derive(Debug)]
pub struct NewImage {
    store: ImageStore,
    manifest: Manifest,
    work: tempfile::TempDir,
    _lock: File,
}

impl NewImage {
    const DISK: &'static str = "disk";

    /// Where its disk is to be written: a raw file, which is not there yet.
    pub fn disk(&self) -> PathBuf {
        self.work.path().join(Self::DISK)
    }

    /// Reads the disk once, to know it again, and shows the image to all.
    ///
    /// # Errors
    /// When the disk can't be read; no image is there then.
    pub fn finish(mut self) -> Result<Image, ImageError> {
        let path = self.disk();
        // It is all that is left of a machine.
        File::open(&path).and_then(|file| file.sync_all()).named("write", &path)?;
        self.manifest.disk = Some(disk_record_of(self.work.path(), Self::DISK, self.manifest.created)?);
        self.store.publish(self.work, self.manifest)
    }
}

/// A directory of images. Methods block; images are seen only when complete.
#[derive(Clone, Debug)]
pub struct ImageStore {
    dir: PathBuf,
}

impl ImageStore {
    /// The store in `dir`, which is made when first written to.
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }

    /// Its directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Where downloads are kept.
    pub fn cache_dir(&self) -> PathBuf {
        self.dir.join(CACHE)
    }

    /// What is known of all images, by name. Their files are not checked; an image that cannot be understood is left
    /// out (its own [`ImageStore::load`] tells why).
    pub fn list(&self) -> Result<Vec<Manifest>, ImageError> {
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error).named("read", &self.dir),
        };
        let mut found = Vec::new();
        for entry in entries {
            let name = entry.named("read", &self.dir)?.file_name().to_string_lossy().into_owned();
            if check_name(&name).is_ok()
                && let Ok(manifest) = self.manifest(&name)
            {
                found.push(manifest);
            }
        }
        found.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(found)
    }

    /// The image of that name, after a check of its files' sizes and checksums. Of a disk size and
    /// time are checked: [`Image::verify`] reads it.
    pub fn load(&self, name: &str) -> Result<Image, ImageError> {
        let manifest = self.manifest(name)?;
        let image = Image { dir: self.dir.join(name), manifest };
        for record in std::iter::once(&image.manifest.kernel).chain(&image.manifest.initrd) {
            image.check(record)?;
        }
        if let Some(record) = &image.manifest.disk {
            image.glance(record)?;
        }
        Ok(image)
    }

    /// Removes the image of that name.
    pub fn remove(&self, name: &str) -> Result<(), ImageError> {
        check_name(name)?;
        let dir = self.dir.join(name);
        if !dir.is_dir() {
            return Err(ImageError::Missing { name: name.to_owned() });
        }
        let _lock = self.lock()?;
        // First out of sight as a whole, then bit by bit.
        let doomed = self.workplace()?;
        fs::rename(&dir, doomed.path().join(name)).named("remove", &dir)?;
        doomed.close().named("remove", &dir)
    }

    /// Makes the image of the tiny guest, named [`TINY_NAME`](crate::TINY_NAME), from its binary. An older one is
    /// replaced.
    pub fn add_tiny(&self, binary: &Path) -> Result<Image, ImageError> {
        let _lock = self.lock()?;
        let work = self.workplace()?;
        fs::copy(binary, work.path().join("kernel")).named("copy", binary)?;
        let manifest = Manifest {
            format: FORMAT,
            name: crate::TINY_NAME.into(),
            kind: Kind::Tiny,
            kernel: record_of(work.path(), "kernel")?,
            initrd: None,
            cmdline: String::new(),
            created: now(),
            packages: Vec::new(),
            contents: Vec::new(),
            kernel_version: env!("CARGO_PKG_VERSION").into(),
            suite: None,
            disk: None,
        };
        self.publish(work, manifest)
    }

    /// Begins an image that has the kernel of another one and a disk that is still to be written. Keeps other writers of
    /// this store out until it is finished or dropped; after that nothing is left of one that was not finished.
    ///
    /// # Errors
    /// [`ImageError::BadName`], [`ImageError::Exists`], or when files can't be copied.
    pub fn begin_with_disk(&self, name: &str, of: &Image) -> Result<NewImage, ImageError> {
        check_name(name)?;
        let lock = self.lock()?;
        if self.dir.join(name).symlink_metadata().is_ok() {
            return Err(ImageError::Exists { name: name.to_owned() });
        }
        let work = self.workplace()?;
        for record in std::iter::once(&of.manifest.kernel).chain(&of.manifest.initrd) {
            let from = of.dir.join(&record.file);
            fs::copy(&from, work.path().join(&record.file)).named("copy", &from)?;
        }
        let manifest = Manifest { name: name.to_owned(), created: now(), disk: None, ..of.manifest.clone() };
        Ok(NewImage { store: self.clone(), manifest, work, _lock: lock })
    }

    fn manifest(&self, name: &str) -> Result<Manifest, ImageError> {
        check_name(name)?;
        let path = self.dir.join(name).join(MANIFEST);
        let damaged = |what: String| ImageError::Damaged { name: name.to_owned(), file: path.clone(), what };
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Err(ImageError::Missing { name: name.to_owned() });
            }
            Err(error) => return Err(error).named("read", &path),
        };
        /// Only what all formats have.
        #[derive(Deserialize)]
        struct Head {
            format: u32,
        }
        let unclear = |error: serde_json::Error| damaged(format!("cannot be understood ({error})"));
        let head: Head = serde_json::from_slice(&text).map_err(unclear)?;
        if head.format != FORMAT {
            return Err(ImageError::Format { name: name.to_owned(), found: head.format, known: FORMAT });
        }
        let manifest: Manifest = serde_json::from_slice(&text).map_err(unclear)?;
        let plain = |file: &str| !file.is_empty() && !file.contains('/') && file != "..";
        let files = std::iter::once(&manifest.kernel).chain(&manifest.initrd).map(|record| &record.file);
        if manifest.name != name
            || !files.chain(manifest.disk.as_ref().map(|record| &record.file)).all(|file| plain(file))
        {
            return Err(damaged("does not belong to this image".into()));
        }
        Ok(manifest)
    }

    /// Keeps other writers of this store out until it is dropped.
    pub(crate) fn lock(&self) -> Result<File, ImageError> {
        fs::create_dir_all(&self.dir).named("make", &self.dir)?;
        self.lock_by(rustix::fs::FlockOperation::LockExclusive)
    }

    fn lock_by(&self, operation: rustix::fs::FlockOperation) -> Result<File, ImageError> {
        let path = self.dir.join(".lock");
        let file = File::options().create(true).append(true).open(&path).named("open", &path)?;
        rustix::fs::flock(&file, operation).map_err(io::Error::from).named("lock", &path)?;
        Ok(file)
    }

    /// Removes what those left behind who were killed while they made an image. Nothing, while one is being made.
    ///
    /// # Errors
    /// When it cannot be removed.
    pub fn sweep(&self) -> Result<(), ImageError> {
        if !self.dir.is_dir() {
            return Ok(());
        }
        match self.lock_by(rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            Ok(_lock) => self.remove_unfinished(),
            Err(_) => Ok(()),
        }
    }

    fn remove_unfinished(&self) -> Result<(), ImageError> {
        for entry in fs::read_dir(&self.dir).named("read", &self.dir)?.flatten() {
            if entry.file_name().to_string_lossy().starts_with(BUILDING) {
                fs::remove_dir_all(entry.path()).named("remove", &entry.path())?;
            }
        }
        Ok(())
    }

    /// A new directory within the store; those that a killed build left behind are removed. Needs the lock.
    pub(crate) fn workplace(&self) -> Result<tempfile::TempDir, ImageError> {
        self.remove_unfinished()?;
        tempfile::Builder::new().prefix(BUILDING).tempdir_in(&self.dir).named("make a directory in", &self.dir)
    }

    /// Shows what was made in `work` as an image. Needs the lock.
    pub(crate) fn publish(&self, work: tempfile::TempDir, manifest: Manifest) -> Result<Image, ImageError> {
        use std::os::unix::fs::PermissionsExt;
        let path = work.path().join(MANIFEST);
        let json = serde_json::to_vec_pretty(&manifest)
            .map_err(|error| ImageError::Failed { what: "write the manifest".into(), reason: error.to_string() })?;
        fs::write(&path, json).named("write", &path)?;
        // QEMU runs as another user.
        fs::set_permissions(work.path(), fs::Permissions::from_mode(0o755)).named("open up", work.path())?;
        for record in std::iter::once(&manifest.kernel).chain(&manifest.initrd) {
            let path = work.path().join(&record.file);
            fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).named("open up", &path)?;
        }
        if let Some(record) = &manifest.disk {
            let path = work.path().join(&record.file);
            fs::set_permissions(&path, fs::Permissions::from_mode(0o444)).named("close", &path)?;
        }
        let dir = self.dir.join(&manifest.name);
        let cwd = rustix::fs::CWD;
        let exchange = rustix::fs::RenameFlags::EXCHANGE;
        match rustix::fs::renameat_with(cwd, work.path(), cwd, &dir, exchange) {
            // What `work` holds now is the old image: removed with it.
            Ok(()) => drop(work),
            Err(rustix::io::Errno::NOENT) => {
                fs::rename(work.path(), &dir).named("make", &dir)?;
                drop(work.keep());
            }
            Err(error) => return Err(io::Error::from(error)).named("replace", &dir),
        }
        Ok(Image { dir, manifest })
    }

    /// The manifest of a Linux image in the making, whose files are `kernel` and `initrd` in `work`.
    pub(crate) fn linux_manifest(
        work: &Path,
        name: &str,
        cmdline: &str,
        packages: &[String],
        contents: Vec<String>,
        kernel_version: String,
        suite: Option<&str>,
    ) -> Result<Manifest, ImageError> {
        Ok(Manifest {
            format: FORMAT,
            name: name.to_owned(),
            kind: Kind::Linux,
            kernel: record_of(work, "kernel")?,
            initrd: Some(record_of(work, "initrd")?),
            cmdline: cmdline.to_owned(),
            created: now(),
            packages: packages.to_vec(),
            contents,
            kernel_version,
            suite: suite.map(str::to_owned),
            disk: None,
        })
    }
}

/// Whether that can be the name of an image: it becomes a directory and part of commands.
pub(crate) fn check_name(name: &str) -> Result<(), ImageError> {
    let first = name.bytes().next().is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
    let rest = name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-_.".contains(&b));
    if first && rest && name.len() <= 64 { Ok(()) } else { Err(ImageError::BadName { name: name.to_owned() }) }
}

fn record_of(dir: &Path, file: &str) -> Result<FileRecord, ImageError> {
    let path = dir.join(file);
    let mut from = File::open(&path).named("open", &path)?;
    let mut hasher = Xxh3::new();
    let mut size = 0;
    let mut buffer = vec![0; 256 * 1024];
    loop {
        let read = from.read(&mut buffer).named("read", &path)?;
        if read == 0 {
            break;
        }
        hasher.update(&buffer[..read]);
        size += read as u64;
    }
    Ok(FileRecord { file: file.to_owned(), size, xxh3: format!("{:016x}", hasher.digest()) })
}

/// The record of the disk `file` in `dir`, which gets the time `modified`.
pub(crate) fn disk_record_of(dir: &Path, file: &str, modified: u64) -> Result<DiskRecord, ImageError> {
    use std::os::unix::fs::MetadataExt;
    let path = dir.join(file);
    let (size, xxh3_128) = hash_disk(&path)?;
    let time = UNIX_EPOCH + Duration::from_secs(modified);
    let set = File::options().write(true).open(&path).and_then(|file| file.set_modified(time));
    set.named("set the time of", &path)?;
    let stored = fs::metadata(&path).named("read", &path)?.blocks() * 512;
    Ok(DiskRecord { file: file.to_owned(), size, stored, xxh3_128, modified })
}

/// Size and XXH3 (128 bits) of a file. Of holes nothing is read.
fn hash_disk(path: &Path) -> Result<(u64, String), ImageError> {
    use rustix::fs::{SeekFrom, seek};
    use std::os::unix::fs::FileExt;
    let file = File::open(path).named("open", path)?;
    let size = file.metadata().named("read", path)?.len();
    let mut hasher = Xxh3::new();
    let (mut buffer, zeros) = (vec![0; 1 << 20], vec![0; 1 << 20]);
    let mut at = 0;
    while at < size {
        // A file system that does not tell holes has none.
        let data = match seek(&file, SeekFrom::Data(at)) {
            Ok(data) => data.min(size),
            Err(rustix::io::Errno::NXIO) => size,
            Err(_) => at,
        };
        while at < data {
            let length = (data - at).min(zeros.len() as u64) as usize;
            hasher.update(&zeros[..length]);
            at += length as u64;
        }
        let end = seek(&file, SeekFrom::Hole(at)).unwrap_or(size).min(size);
        while at < end {
            let length = (end - at).min(buffer.len() as u64) as usize;
            file.read_exact_at(&mut buffer[..length], at).named("read", path)?;
            hasher.update(&buffer[..length]);
            at += length as u64;
        }
    }
    Ok((size, format!("{:032x}", hasher.digest128())))
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
}

fn now() -> u64 {
    seconds(SystemTime::now())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, ImageStore) {
        let dir = tempfile::tempdir().unwrap();
        let binary = dir.path().join("tiny-binary");
        fs::write(&binary, vec![7; 100_000]).unwrap();
        let store = ImageStore::new(dir.path().join("images"));
        store.add_tiny(&binary).unwrap();
        (dir, store)
    }

    #[test]
    fn a_stored_image_loads_lists_and_goes() {
        let (_dir, store) = store();
        let image = store.load("tiny").unwrap();
        assert_eq!((image.manifest.kind, image.size(), image.initrd()), (Kind::Tiny, 100_000, None));
        assert_eq!(fs::read(image.kernel()).unwrap().len(), 100_000);
        assert_eq!(store.list().unwrap(), [image.manifest]);
        store.remove("tiny").unwrap();
        assert!(matches!(store.load("tiny"), Err(ImageError::Missing { .. })));
        assert!(matches!(store.remove("tiny"), Err(ImageError::Missing { .. })));
        assert!(store.list().unwrap().is_empty());
        assert_eq!(fs::read_dir(store.dir()).unwrap().count(), 1, "only the lock stays");
    }

    #[test]
    fn truncated_changed_and_missing_files_are_found() {
        let (_dir, store) = store();
        let kernel = store.dir().join("tiny/kernel");
        let text = |store: &ImageStore| store.load("tiny").unwrap_err().to_string();
        fs::write(&kernel, vec![7; 99_999]).unwrap();
        assert!(text(&store).contains("99999 bytes instead of 100000"));
        fs::write(&kernel, vec![8; 100_000]).unwrap();
        assert!(text(&store).contains("other bytes"));
        fs::remove_file(&kernel).unwrap();
        assert!(text(&store).contains("kernel is missing"));
        assert!(text(&store).contains("ramet image build"));
        let json = fs::read_to_string(store.dir().join("tiny/image.json")).unwrap();
        fs::write(store.dir().join("tiny/image.json"), &json[..json.len() / 2]).unwrap();
        assert!(text(&store).contains("cannot be understood"));
        fs::write(store.dir().join("tiny/image.json"), json.replace("\"format\": 1", "\"format\": 99")).unwrap();
        assert!(matches!(store.load("tiny"), Err(ImageError::Format { found: 99, known: FORMAT, .. })));
        fs::write(store.dir().join("tiny/image.json"), json.replace("\"kernel\",", "\"../../x\",")).unwrap();
        assert!(text(&store).contains("does not belong"));
    }

    #[test]
    fn a_manifest_need_not_name_a_suite() {
        let (_dir, store) = store();
        let path = store.dir().join("tiny/image.json");
        let json = fs::read_to_string(&path).unwrap();
        assert!(!json.contains("suite"), "so older images load as well");
        assert_eq!(store.load("tiny").unwrap().manifest.suite, None);
        fs::write(&path, json.replace("\"format\": 1,", "\"format\": 1, \"suite\": \"sid\",")).unwrap();
        assert_eq!(store.load("tiny").unwrap().manifest.suite.as_deref(), Some("sid"));
    }

    /// A store with an image that has a sparse disk.
    fn store_with_disk() -> (tempfile::TempDir, ImageStore) {
        let (dir, store) = store();
        let path = store.dir().join("tiny/disk");
        let disk = File::create(&path).unwrap();
        disk.set_len(8 << 20).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&disk, b"golden", 3 << 20).unwrap();
        let record = disk_record_of(&store.dir().join("tiny"), "disk", 1_600_000_000).unwrap();
        let mut manifest = store.load("tiny").unwrap().manifest;
        assert!(manifest.disk.is_none() && record.stored < 1 << 20);
        manifest.disk = Some(record);
        fs::write(store.dir().join("tiny/image.json"), serde_json::to_vec(&manifest).unwrap()).unwrap();
        (dir, store)
    }

    #[test]
    fn a_disk_is_known_by_its_bytes_and_not_read_at_each_load() {
        let (_dir, store) = store_with_disk();
        let image = store.load("tiny").unwrap();
        let record = image.manifest.disk.clone().unwrap();
        let path = image.disk().unwrap();
        let mut whole = vec![0; 8 << 20];
        whole[3 << 20..(3 << 20) + 6].copy_from_slice(b"golden");
        assert_eq!(record.xxh3_128, format!("{:032x}", xxhash_rust::xxh3::xxh3_128(&whole)));
        assert_eq!(image.size(), 100_000 + record.stored);
        image.verify().unwrap();
        let time = |seconds| {
            File::options().write(true).open(&path).unwrap().set_modified(UNIX_EPOCH + Duration::from_secs(seconds))
        };
        // Stored without holes and at another time: the same disk.
        fs::write(&path, &whole).unwrap();
        assert_eq!(store.load("tiny").unwrap(), image);
        assert_eq!(seconds(fs::metadata(&path).unwrap().modified().unwrap()), record.modified, "known again");
        whole[0] = 1;
        fs::write(&path, &whole).unwrap();
        assert!(store.load("tiny").unwrap_err().to_string().contains("other bytes"));
        time(record.modified).unwrap();
        store.load("tiny").unwrap();
        assert!(image.verify().unwrap_err().to_string().contains("disk has other bytes"));
        fs::write(&path, &whole[1..]).unwrap();
        assert!(store.load("tiny").unwrap_err().to_string().contains("bytes instead of"));
        fs::remove_file(&path).unwrap();
        assert!(store.load("tiny").unwrap_err().to_string().contains("is missing"));
    }

    #[test]
    fn an_image_with_another_disk_is_seen_when_it_is_whole() {
        let (_dir, store) = store_with_disk();
        let of = store.load("tiny").unwrap();
        let begin = |name: &str| store.begin_with_disk(name, &of);
        assert!(matches!(begin("tiny"), Err(ImageError::Exists { .. })));
        assert!(matches!(begin("../x"), Err(ImageError::BadName { .. })));
        // Given up: nothing stays.
        let before = fs::read_dir(store.dir()).unwrap().count();
        let new = begin("kept").unwrap();
        fs::write(new.disk(), [1; 4096]).unwrap();
        assert_eq!(store.list().unwrap().len(), 1);
        drop(new);
        assert_eq!(fs::read_dir(store.dir()).unwrap().count(), before);
        let new = begin("kept").unwrap();
        assert!(new.finish().is_err(), "it has no disk");
        assert_eq!(fs::read_dir(store.dir()).unwrap().count(), before);

        let new = begin("kept").unwrap();
        fs::write(new.disk(), [1; 4096]).unwrap();
        let made = new.finish().unwrap();
        let kept = store.load("kept").unwrap();
        kept.verify().unwrap();
        assert_eq!(kept, made);
        assert_eq!(fs::read(kept.disk().unwrap()).unwrap(), [1; 4096]);
        assert_eq!(fs::read(kept.kernel()).unwrap(), fs::read(of.kernel()).unwrap());
        assert_ne!(kept.manifest.disk, of.manifest.disk);
        of.verify().unwrap();
    }

    #[test]
    fn a_disk_cannot_be_outside_its_image() {
        let (_dir, store) = store_with_disk();
        let path = store.dir().join("tiny/image.json");
        let json = fs::read_to_string(&path).unwrap();
        fs::write(&path, json.replace("\"file\":\"disk\"", "\"file\":\"../disk\"")).unwrap();
        assert!(store.load("tiny").unwrap_err().to_string().contains("does not belong"));
    }

    #[test]
    fn an_image_is_replaced_as_a_whole() {
        let (dir, store) = store();
        let binary = dir.path().join("other");
        fs::write(&binary, b"other").unwrap();
        store.add_tiny(&binary).unwrap();
        assert_eq!(store.load("tiny").unwrap().size(), 5);
        assert_eq!(fs::read_dir(store.dir()).unwrap().count(), 2, "the lock and the image");
    }

    #[test]
    fn what_a_killed_build_left_is_swept_unless_one_is_under_way() {
        let (dir, store) = store();
        let left = store.dir().join(".build-left");
        fs::create_dir_all(left.join("tree")).unwrap();
        let lock = store.lock().unwrap();
        store.sweep().unwrap();
        assert!(left.exists(), "it may be in use");
        drop(lock);
        store.sweep().unwrap();
        assert!(!left.exists());
        assert_eq!(store.list().unwrap().len(), 1);
        ImageStore::new(dir.path().join("nosuch")).sweep().unwrap();
        assert!(!dir.path().join("nosuch").exists());
    }

    #[test]
    fn names_cannot_leave_the_store() {
        let (_dir, store) = store();
        for name in ["", "..", ".cache", "a/b", "/etc", "Upper", "-x", &"x".repeat(65)] {
            assert!(matches!(store.load(name), Err(ImageError::BadName { .. })), "{name:?}");
            assert!(matches!(store.remove(name), Err(ImageError::BadName { .. })), "{name:?}");
        }
        let error = store.load("nosuch").unwrap_err().to_string();
        assert!(error.contains("nosuch") && error.contains("ramet image build"));
    }
}
