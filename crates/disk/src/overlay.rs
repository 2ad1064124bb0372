//! Empty overlays, made quickly: a copy of a template instead of a run of `qemu-img create` (10 ms).

use rustix::fs::{self as rfs, SeekFrom};
use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex},
};

/// Why no overlay was made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OverlayError {
    /// A size that no disk can have.
    #[error("No disk can have {size} bytes: take a multiple of 512, at most {} bytes", crate::MAX_DISK)]
    Size {
        /// The size.
        size: u64,
    },
    /// `qemu-img` is missing.
    #[error("Cannot run qemu-img: install the package qemu-utils")]
    NoQemuImg(#[source] io::Error),
    /// `qemu-img` failed.
    #[error("qemu-img could not make the template {path}: {message}")]
    QemuImg {
        /// The template.
        path: PathBuf,
        /// What it said.
        message: String,
    },
    /// A file could not be read or written.
    #[error("Cannot make the overlay {path}: check that its directory exists and has room")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Makes empty overlays. Of each size one is made by `qemu-img` and kept in a directory; the others are copies of it.
#[derive(Debug)]
pub struct Templates {
    dir: PathBuf,
    open: Mutex<HashMap<u64, Arc<File>>>,
}

impl Templates {
    /// Templates are kept in `dir`, which is made when it is missing. Several processes may use one directory.
    #[must_use]
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into(), open: Mutex::default() }
    }

    /// Makes an empty qcow2 overlay of `size` bytes at `path`, mode 0600. It has 64 KiB clusters with 2 KiB subclusters
    /// and names no backing file: say `backing` when it is opened.
    ///
    /// # Errors
    /// [`OverlayError`]; `path` is then as before. A file that is there already is an error.
    pub fn create(&self, path: &Path, size: u64) -> Result<(), OverlayError> {
        let template = self.template(size)?;
        let error = |source| OverlayError::Io { path: path.to_owned(), source };
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create_new(true).mode(0o600).open(path).map_err(error)?;
        copy(&template, &file).map_err(|source| {
            let _ = fs::remove_file(path);
            error(source)
        })
    }

    /// The same into an empty file that is open already, such as one of `O_TMPFILE` for QEMU's `add-fd`.
    ///
    /// # Errors
    /// [`OverlayError`].
    pub fn fill(&self, file: &File, size: u64) -> Result<(), OverlayError> {
        let template = self.template(size)?;
        copy(&template, file).map_err(|source| OverlayError::Io { path: self.path(size), source })
    }

    fn path(&self, size: u64) -> PathBuf {
        self.dir.join(format!("overlay-{size}.qcow2"))
    }

    fn template(&self, size: u64) -> Result<Arc<File>, OverlayError> {
        if size == 0 || !size.is_multiple_of(512) || size > crate::MAX_DISK {
            return Err(OverlayError::Size { size });
        }
        let mut open = crate::lock(&self.open);
        if let Some(file) = open.get(&size) {
            return Ok(file.clone());
        }
        let path = self.path(size);
        let error = |source| OverlayError::Io { path: path.clone(), source };
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(err) if err.kind() == io::ErrorKind::NotFound => {
                fs::create_dir_all(&self.dir).map_err(error)?;
                self.make(&path, size)?;
                File::open(&path).map_err(error)?
            }
            Err(err) => return Err(error(err)),
        };
        let file = Arc::new(file);
        open.insert(size, file.clone());
        Ok(file)
    }

    fn make(&self, path: &Path, size: u64) -> Result<(), OverlayError> {
        // Under another name first: nobody ever sees half a template.
        let new = self.dir.join(format!(".overlay-{size}-{}", std::process::id()));
        let output = Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "-o", "extended_l2=on,cluster_size=64k,lazy_refcounts=off"])
            .arg(&new)
            .arg(size.to_string())
            .stdin(Stdio::null())
            .output()
            .map_err(OverlayError::NoQemuImg)?;
        let done = if output.status.success() {
            fs::rename(&new, path).map_err(|source| OverlayError::Io { path: path.to_owned(), source })
        } else {
            let message = String::from_utf8_lossy(&output.stderr).trim().to_owned();
            Err(OverlayError::QemuImg { path: path.to_owned(), message })
        };
        if done.is_err() {
            let _ = fs::remove_file(&new);
        }
        done
    }
}

/// Copies a file with its holes; shares its blocks where the file system can.
fn copy(from: &File, to: &File) -> io::Result<()> {
    if rfs::ioctl_ficlone(to, from).is_ok() {
        return Ok(());
    }
    let len = from.metadata()?.len();
    let mut at = 0;
    // The position belongs to the shared open file: two threads at once must not use it, so it is only asked, and all
    // copying names its offsets.
    while let Ok(data) = rfs::seek(from, SeekFrom::Data(at)) {
        let hole = rfs::seek(from, SeekFrom::Hole(data))?;
        at = data;
        while at < hole {
            let (mut source, mut target) = (at, at);
            let wanted = usize::try_from(hole - at).unwrap_or(usize::MAX);
            match rfs::copy_file_range(from, Some(&mut source), to, Some(&mut target), wanted) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(n) => at += n as u64,
                Err(_) => {
                    // Another file system.
                    copy_plainly(from, to, at, hole)?;
                    at = hole;
                }
            }
        }
    }
    to.set_len(len)
}

fn copy_plainly(from: &File, to: &File, start: u64, end: u64) -> io::Result<()> {
    use std::os::unix::fs::FileExt;
    let mut buffer = vec![0; 64 << 10];
    let mut at = start;
    while at < end {
        let wanted = usize::try_from(end - at).unwrap_or(usize::MAX).min(buffer.len());
        let n = from.read_at(&mut buffer[..wanted], at)?;
        if n == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        to.write_all_at(&buffer[..n], at)?;
        at += n as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn copies_keep_bytes_and_holes() {
        use std::os::unix::fs::FileExt;
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        let from = File::options().read(true).write(true).create_new(true).open(&a).unwrap();
        from.set_len(4 << 20).unwrap();
        from.write_all_at(&[7; 10_000], 1 << 20).unwrap();
        let to = File::options().read(true).write(true).create_new(true).open(&b).unwrap();
        copy(&from, &to).unwrap();
        assert_eq!(fs::read(&a).unwrap(), fs::read(&b).unwrap());
        assert!(to.metadata().unwrap().blocks() * 512 < 1 << 20);
        let plain = File::options().read(true).write(true).create_new(true).open(dir.path().join("c")).unwrap();
        copy_plainly(&from, &plain, 0, 4 << 20).unwrap();
        assert_eq!(fs::read(&a).unwrap(), fs::read(dir.path().join("c")).unwrap());
    }

    #[test]
    fn sizes_that_no_disk_has_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let templates = Templates::new(dir.path());
        for size in [0, 511, 1000, crate::MAX_DISK + 512] {
            assert!(matches!(templates.create(&dir.path().join("x"), size), Err(OverlayError::Size { .. })));
        }
    }
}
