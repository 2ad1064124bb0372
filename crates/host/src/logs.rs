//! Logs that guests, QEMUs and pagers write. They are in the state directory, which is memory, and a guest writes to its
//! console's as much as it likes: they are cut from time to time. All of them are written by appending.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{FileExt as _, MetadataExt as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use ramet_vmm::VmPaths;
use rustix::fs::{Mode, OFlags};

use crate::config::Config;

/// How often logs are looked at.
const PERIOD: Duration = Duration::from_secs(3);
/// What a log may have.
const MOST: u64 = 2 << 20;
/// What is kept of one that has more: its end.
const KEPT: u64 = 1 << 20;

/// Keeps the host's logs short, for ever.
pub async fn keep_short(config: Arc<Config>) {
    loop {
        tokio::time::sleep(PERIOD).await;
        let config = config.clone();
        let cut_all = move || {
            for log in logs(&config) {
                match cut(&log) {
                    Ok(()) => {}
                    // A VM has gone, or has not written anything yet.
                    Err(err) if err.kind() == io::ErrorKind::NotFound => {}
                    Err(err) => tracing::warn!(log = %log.display(), error = %err, "a log can't be cut"),
                }
            }
        };
        let _ = tokio::task::spawn_blocking(cut_all).await;
    }
}

/// All logs that others write.
fn logs(config: &Config) -> Vec<PathBuf> {
    let entries = |dir: &Path| fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path()).collect::<Vec<_>>();
    let vms = entries(&config.vms()).into_iter().chain(entries(&config.pool_dir())).flat_map(|dir| {
        let paths = VmPaths::new(&dir);
        [paths.console_log, paths.log]
    });
    vms.chain(entries(&config.logs())).collect()
}

/// Cuts a log that is too long. What is written to it at this very moment may be lost.
fn cut(path: &Path) -> io::Result<()> {
    // QEMU's user owns the directory, and may have put there what it likes: no links, and no waiting for a pipe's other end.
    let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    let found = file.metadata()?;
    if !found.is_file() || found.nlink() != 1 {
        return Err(io::Error::other("it is no plain file of its own"));
    }
    if found.len() <= MOST {
        return Ok(());
    }
    let mut end = vec![0; usize::try_from(KEPT).unwrap_or(0)];
    file.read_exact_at(&mut end, found.len() - KEPT)?;
    file.write_all_at(&end, 0)?;
    file.set_len(KEPT)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    #[test]
    fn a_long_log_keeps_its_end_and_is_appended_to() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("console.log");
        let mut writer = File::options().create(true).append(true).open(&path).unwrap();
        writer.write_all(b"short").unwrap();
        cut(&path).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"short");
        writer.write_all(&vec![b'x'; usize::try_from(MOST).unwrap()]).unwrap();
        writer.write_all(b"end").unwrap();
        cut(&path).unwrap();
        writer.write_all(b" and more").unwrap();
        let text = fs::read(&path).unwrap();
        assert_eq!(text.len() as u64, KEPT + 9);
        assert!(text.ends_with(b"xend and more") && !text.contains(&0));
    }

    #[test]
    fn links_and_pipes_are_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let file = |name: &str| dir.path().join(name);
        fs::write(file("secret"), vec![b's'; usize::try_from(MOST).unwrap() + 1]).unwrap();
        std::os::unix::fs::symlink(file("secret"), file("link")).unwrap();
        assert!(cut(&file("link")).is_err());
        fs::hard_link(file("secret"), file("hard")).unwrap();
        assert!(cut(&file("hard")).unwrap_err().to_string().contains("no plain file"));
        rustix::fs::mknodat(rustix::fs::CWD, file("pipe"), rustix::fs::FileType::Fifo, Mode::RWXU, 0).unwrap();
        assert!(cut(&file("pipe")).is_err());
        assert_eq!(fs::metadata(file("secret")).unwrap().len(), MOST + 1);
        assert_eq!(cut(&file("nosuch")).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
