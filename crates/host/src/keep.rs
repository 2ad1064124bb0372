//! Keeping a VM's disk: at the VM's end, as a new image.
//!
//! The VM stands still from before the first byte is read until it ends, so nobody writes meanwhile, and if anything fails it
//! goes on as if nothing had been. `qemu-img` reads the same files as the VM's QEMU, which has written all it had to.

use std::{
    path::Path,
    process::Stdio,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use ramet_client::api::{ErrorCode, Quiesce, VmState};
use ramet_disk::ChainPaths;
use ramet_image::{Image, ImageError, NewImage};
use ramet_memory::{ByteSize, VmId};
use tokio::{io::AsyncReadExt as _, process::Command};

use crate::{
    checkpoints::busy,
    daemon::Daemon,
    error::{ApiError, ApiResult},
    memory,
    names::shown,
    state::{VmDisk, VmRecord},
    stats::lock,
    vms::Running,
};

/// Room that is left to others in the directory of images.
const LEAVES: u64 = 64 << 20;
/// How long a disk may wait for another host before the keeping is given up: the VM stands still.
const STALLED: Duration = Duration::from_secs(30);

impl Daemon {
    /// Writes the disk of a VM that runs as a new image. The VM stands still afterwards, to be ended.
    ///
    /// # Errors
    /// When the VM does not run or has no disk, the name is no image's or taken, there is no room, its guest can't write its
    /// file systems out (not with `force`), or the disk can't be read. The VM goes on, and there is no image.
    pub(crate) async fn keep_disk(self: &Arc<Self>, id: VmId, name: &str, force: bool) -> ApiResult<()> {
        let vm = self.find_vm(&id.to_string())?;
        let Some(disk) = &vm.disk else { return Err(no_disk(&vm)) };
        let Some(running) = self.running(id).filter(|_| vm.state == VmState::Running) else { return Err(ended(&vm)) };
        let new = self.begin_image(&vm, disk, name).await?;

        let _busy = busy(Some(&running)).await;
        // It may have another layer by now, or none.
        let vm = self.find_vm(&id.to_string())?;
        let Some(disk) = &vm.disk else { return Err(no_disk(&vm)) };
        if vm.state != VmState::Running || running.ending.load(Ordering::Acquire) {
            return Err(ended(&vm));
        }
        let files = self.disk_files(vm.family, disk).await?;
        self.check_image_room(&files)?;
        if !force {
            let wanted = Quiesce { sync: true, ..Quiesce::default() };
            self.quiesce(&running, &vm, &wanted).await.map_err(|err| {
                err.context(format!("The disk of VM '{}' is not kept", vm.name))
                    .remedy("with `--force` it is kept without asking the guest, as after a loss of power")
            })?;
        }
        *lock(&running.keeping) = Some(format!("its disk is being kept as image '{name}'"));
        running.paused.store(true, Ordering::Release);
        let kept = self.stop_and_write(&running, &vm, name, &files, new).await;
        match &kept {
            // Nobody takes a checkpoint of it any more.
            Ok(()) => running.ending.store(true, Ordering::Release),
            Err(err) => {
                tracing::warn!(vm = %id, image = name, error = %err, "a disk was not kept");
                if let Err(err) = running.process.cont().await {
                    tracing::error!(vm = %id, error = %err, "a VM could not be continued after its disk was not kept");
                }
                running.paused.store(false, Ordering::Release);
                *lock(&running.keeping) = None;
            }
        }
        kept
    }

    /// The image in the making, with the kernel of the VM's.
    async fn begin_image(&self, vm: &VmRecord, disk: &VmDisk, name: &str) -> ApiResult<NewImage> {
        let (images, name, of, golden) =
            (self.images.clone(), name.to_owned(), vm.image.clone(), disk.frozen.golden.clone());
        let host = self.config.name.clone();
        let begin = move || -> ApiResult<NewImage> {
            let image = images.load(&of).map_err(|err| {
                ApiError::failed(format!("The kernel of image '{}' can't be had", shown(&of)), err)
                    .remedy("the new image gets the kernel of the VM's: have that image on the VM's host")
            })?;
            if of == golden.image && hash(&image) != Some(&*golden.hash) {
                return Err(ApiError::new(
                    ErrorCode::WrongState,
                    format!("Image '{}' on host '{host}' is another one than when the VM was booted", shown(&of)),
                )
                .remedy("its kernel may not fit the VM's disk: have the image that the VM was booted from there"));
            }
            images.begin_with_disk(&name, &image).map_err(|err| match err {
                ImageError::Exists { .. } => ApiError::new(
                    ErrorCode::NameTaken,
                    format!("There is an image '{}' on host '{host}' already", shown(&name)),
                )
                .remedy(format!("choose another name, or `ramet image rm {name}`")),
                err @ ImageError::BadName { .. } => ApiError::new(ErrorCode::BadName, err.to_string()),
                err => ApiError::failed("No image can be made on this host", err),
            })
        };
        let begun = tokio::task::spawn_blocking(begin).await;
        begun.map_err(|err| ApiError::internal(format!("Beginning an image broke: {err}")))?
    }

    /// Refuses when all that the files hold may not fit. A disk of another host is not counted.
    fn check_image_room(&self, files: &ChainPaths) -> ApiResult<()> {
        let held: u64 = files.golden.iter().chain(&files.layers).map(|path| memory::stored_bytes(path)).sum();
        let needed = held.min(files.size).saturating_add(LEAVES);
        let dir = self.images.dir();
        let room = memory::room(dir).map_err(|err| ApiError::failed("The room for images can't be told", err))?;
        if room.bytes() < needed {
            return Err(ApiError::new(
                ErrorCode::LimitReached,
                format!(
                    "There is no room for the disk: {} in {}, up to {} are needed",
                    room,
                    dir.display(),
                    ByteSize(needed)
                ),
            )
            .remedy("`ramet image ls` shows what images take, `ramet image rm` removes them"));
        }
        Ok(())
    }

    async fn stop_and_write(
        &self,
        running: &Arc<Running>,
        vm: &VmRecord,
        name: &str,
        files: &ChainPaths,
        new: NewImage,
    ) -> ApiResult<()> {
        let begin = Instant::now();
        let stopped = running.process.stop().await;
        stopped.map_err(|err| ApiError::failed(format!("VM '{}' can't be stopped", vm.name), err))?;
        self.write_disk(running, vm, name, files, &new.disk()).await?;
        *lock(&running.keeping) = Some(format!("its disk is being kept as image '{name}': checking"));
        let finished = tokio::task::spawn_blocking(move || new.finish()).await;
        let image = finished
            .map_err(|err| ApiError::internal(format!("Finishing an image broke: {err}")))?
            .map_err(|err| ApiError::failed("The disk is written, but no image can be made of it", err))?;
        tracing::info!(vm = %vm.id, image = name, bytes = image.size(), took = ?begin.elapsed(), "kept a disk");
        Ok(())
    }

    /// Writes the whole disk to a raw file, with holes where there is nothing.
    async fn write_disk(
        &self,
        running: &Running,
        vm: &VmRecord,
        name: &str,
        files: &ChainPaths,
        to: &Path,
    ) -> ApiResult<()> {
        let failed =
            |err: anyhow::Error| ApiError::failed(format!("The disk of VM '{}' can't be copied", vm.name), err);
        let from = files.whole().map_err(|err| failed(err.into()))?;
        let mut child = Command::new("qemu-img")
            // Another process has the files open: its own.
            .args(["convert", "-p", "-U", "-O", "raw", "-S", "4k"])
            .arg(from)
            .arg(to)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .map_err(|err| ApiError::failed("Cannot run qemu-img: install the package qemu-utils", err))?;
        let (mut progress, mut errors) = (child.stdout.take(), child.stderr.take());
        let read_errors = async {
            let mut said = Vec::new();
            if let Some(errors) = &mut errors {
                let _ = errors.read_to_end(&mut said).await;
            }
            String::from_utf8_lossy(&said).trim().to_owned()
        };
        let watch = async {
            let mut buffer = [0; 4096];
            let mut waits_since = None;
            while let Some(progress) = &mut progress {
                match tokio::time::timeout(Duration::from_secs(1), progress.read(&mut buffer)).await {
                    Ok(Ok(0) | Err(_)) => break,
                    Ok(Ok(n)) => {
                        if let Some(percent) = percent(&buffer[..n]) {
                            *lock(&running.keeping) =
                                Some(format!("its disk is being kept as image '{name}': {percent}%"));
                        }
                        waits_since = None;
                    }
                    Err(_) if files.origin.is_some() => {
                        let stalled = self.remote_disk(vm).await.and_then(|disk| disk.stalled);
                        let Some(stalled) = stalled else { continue };
                        if waits_since.get_or_insert_with(Instant::now).elapsed() > STALLED {
                            let _ = child.start_kill();
                            return Some(stalled.reason);
                        }
                    }
                    Err(_) => {}
                }
            }
            None
        };
        let (given_up, said) = tokio::join!(watch, read_errors);
        if let Some(reason) = given_up {
            return Err(failed(anyhow::anyhow!("it waits for another host: {reason}")));
        }
        let status = child.wait().await.map_err(|err| failed(err.into()))?;
        if !status.success() {
            return Err(failed(anyhow::anyhow!("qemu-img: {said}")));
        }
        Ok(())
    }
}

fn hash(image: &Image) -> Option<&str> {
    image.manifest.disk.as_ref().map(|disk| &*disk.xxh3_128)
}

fn no_disk(vm: &VmRecord) -> ApiError {
    ApiError::new(ErrorCode::BadRequest, format!("VM '{}' has no disk to keep", vm.name))
        .remedy("`ramet run --disk IMAGE` gives a VM one; `ramet rm --force` removes a VM without one")
}

fn ended(vm: &VmRecord) -> ApiError {
    ApiError::new(ErrorCode::WrongState, format!("VM '{}' does not run: there is no disk of it any more", vm.name))
        .remedy("a disk goes with its VM's end: keep it while the VM runs")
}

/// The last of what `qemu-img -p` says: `(12.34/100%)`.
fn percent(said: &[u8]) -> Option<u32> {
    let said = String::from_utf8_lossy(said);
    let number = said.rsplit('(').find_map(|part| part.split_once('/'))?.0;
    number.trim().split('.').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::percent;

    #[test]
    fn the_last_progress_counts() {
        assert_eq!(percent(b"    (0.00/100%)\r    (41.97/100%)\r"), Some(41));
        assert_eq!(percent(b"    (100.00/100%)\r"), Some(100));
        for odd in [&b""[..], b"(", b"(x/100%)", b"qemu-img: \xff"] {
            assert_eq!(percent(odd), None);
        }
    }
}
