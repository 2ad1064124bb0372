//! The directory of images.

use crate::error::{ImageError, Named};
use serde::{Deserialize, Serialize};
use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};
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
}

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

    /// Bytes of all files.
    pub fn size(&self) -> u64 {
        self.manifest.kernel.size + self.manifest.initrd.as_ref().map_or(0, |record| record.size)
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

    /// The image of that name, after a check of its files' sizes and checksums.
    pub fn load(&self, name: &str) -> Result<Image, ImageError> {
        let manifest = self.manifest(name)?;
        let image = Image { dir: self.dir.join(name), manifest };
        for record in std::iter::once(&image.manifest.kernel).chain(&image.manifest.initrd) {
            let path = image.dir.join(&record.file);
            let damaged = |what: String| ImageError::Damaged { name: name.to_owned(), file: path.clone(), what };
            let found = match record_of(&image.dir, &record.file) {
                Ok(found) => found,
                Err(ImageError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                    return Err(damaged("is missing".into()));
                }
                Err(error) => return Err(error),
            };
            if found.size != record.size {
                return Err(damaged(format!("has {} bytes instead of {}", found.size, record.size)));
            }
            if found.xxh3 != record.xxh3 {
                return Err(damaged("has other bytes than when it was built".into()));
            }
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
        };
        self.publish(work, manifest)
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
        let plain = |record: &FileRecord| !record.file.is_empty() && !record.file.contains('/') && record.file != "..";
        if manifest.name != name || !plain(&manifest.kernel) || !manifest.initrd.as_ref().is_none_or(plain) {
            return Err(damaged("does not belong to this image".into()));
        }
        Ok(manifest)
    }

    /// Keeps other writers of this store out until it is dropped.
    pub(crate) fn lock(&self) -> Result<File, ImageError> {
        fs::create_dir_all(&self.dir).named("make", &self.dir)?;
        let path = self.dir.join(".lock");
        let file = File::options().create(true).append(true).open(&path).named("open", &path)?;
        rustix::fs::flock(&file, rustix::fs::FlockOperation::LockExclusive)
            .map_err(io::Error::from)
            .named("lock", &path)?;
        Ok(file)
    }

    /// A new directory within the store; those that a killed build left behind are removed. Needs the lock.
    pub(crate) fn workplace(&self) -> Result<tempfile::TempDir, ImageError> {
        for entry in fs::read_dir(&self.dir).named("read", &self.dir)?.flatten() {
            if entry.file_name().to_string_lossy().starts_with(BUILDING) {
                fs::remove_dir_all(entry.path()).named("remove", &entry.path())?;
            }
        }
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

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs())
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
