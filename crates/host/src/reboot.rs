//! Clones that boot anew.
//!
//! The QEMU of a clone was started with the devices of a checkpoint, and without a kernel, which would cost every clone the
//! memory for it. So a clone that boots anew gets another QEMU, with the kernel, the initial file system and the command
//! line that its root VM was booted with. Its disk, its cards and their addresses, its id and name stay as they are; its
//! memory is no view of a checkpoint any more.
//!
//! ```text
//! files     here, or of another host: before anything is ended
//! settle    its checkpoints have all their pages out of the memory that goes
//! record    `rebooting`: from here on a daemon that starts anew begins here, with no QEMU
//! end       the old QEMU, in order, so that its disk is whole; pager and filter forget it
//! boot      a QEMU with a kernel, the disk and cards of the record
//! record    not `rebooting`, no `checkpoint`: a VM like one that was booted
//! ```

use std::{
    collections::BTreeSet,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use anyhow::Context as _;
use ramet_client::api::{ErrorCode, PeerBoot, VmState};
use ramet_memory::VmId;
use ramet_vmm::Boot;
use tokio::sync::Mutex;

use crate::{
    backend,
    daemon::Daemon,
    error::{ApiError, ApiResult},
    memory::needed_by_root,
    names::shown,
    peers::ask,
    state::VmRecord,
    vms::Running,
};

/// Largest file that VMs boot from, of those that hosts give each other.
const LARGEST: u64 = 192 << 20;
/// How long another host may take to send one.
const SEND: Duration = Duration::from_secs(60);
/// How soon it is asked again whether a clone that is being made stays.
const AGAIN: Duration = Duration::from_millis(50);

fn hash(bytes: &[u8]) -> String {
    format!("{:016x}", xxhash_rust::xxh3::xxh3_64(bytes))
}

/// Whether a text can be such a hash, and so part of a path.
fn is_hash(text: &str) -> bool {
    text.len() == 16 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
}

/// Reads a file of no more than so many bytes, if its contents are these.
fn read_whole(path: &Path, wanted: &str) -> anyhow::Result<Vec<u8>> {
    let size = fs::metadata(path).with_context(|| format!("Failed to read {}", path.display()))?.len();
    anyhow::ensure!(size <= LARGEST, "{} has {size} bytes, more than {LARGEST}", path.display());
    let bytes = fs::read(path).with_context(|| format!("Failed to read {}", path.display()))?;
    anyhow::ensure!(hash(&bytes) == wanted, "{} has other contents than its hash says", path.display());
    Ok(bytes)
}

/// Writes such a file, whole or not at all.
fn keep(dir: &Path, name: &str, bytes: &[u8]) -> anyhow::Result<PathBuf> {
    let (path, temp) = (dir.join(name), dir.join(format!("{name}-{}", VmId::random().short())));
    let write = || -> std::io::Result<()> {
        fs::create_dir_all(dir)?;
        fs::set_permissions(dir, fs::Permissions::from_mode(0o700))?;
        fs::write(&temp, bytes)?;
        // QEMU opens it by the descriptor that it inherits, with its own rights.
        fs::set_permissions(&temp, fs::Permissions::from_mode(0o444))?;
        fs::rename(&temp, &path)
    };
    write()
        .inspect_err(|_| drop(fs::remove_file(&temp)))
        .with_context(|| format!("Failed to write {}", path.display()))?;
    Ok(path)
}

impl Daemon {
    /// The guest of a clone that has been loaded boots anew: its QEMU is replaced by one that can.
    pub(crate) async fn boot_anew(self: &Arc<Self>, before: Arc<Running>) {
        let id = before.id;
        // One that is still being made is somebody else's.
        let state = || self.store.read(|s| s.vms.get(&id).map(|vm| vm.state));
        while state() == Some(VmState::Starting) {
            tokio::time::sleep(AGAIN).await;
        }
        let held = before.busy.clone().lock_owned().await;
        let vm = self.store.read(|s| s.vms.get(&id).filter(|vm| vm.alive()).cloned());
        let Some(vm) = vm.filter(|_| self.is_current(&before)) else { return };
        let booted = match self.boot_of(&vm).await {
            Ok(boot) => {
                self.settle_checkpoints(id).await;
                self.replace(&vm, boot, Some(&before), before.busy.clone()).await
            }
            Err(err) => Err(err),
        };
        // What was known of the one before, a connection to its agent perhaps, is of no use to anybody.
        drop(before);
        self.booted(&vm, booted.map(|running| (running, held))).await;
    }

    /// Goes on with what [`Daemon::boot_anew`] began in the daemon before.
    pub(crate) async fn boot_on(self: &Arc<Self>, id: VmId) {
        let Some(vm) = self.store.read(|s| s.vms.get(&id).filter(|vm| vm.alive()).cloned()) else { return };
        let booted = match self.boot_of(&vm).await {
            Ok(boot) => {
                let busy = Arc::new(Mutex::new(()));
                let held = busy.clone().lock_owned().await;
                self.replace(&vm, boot, None, busy).await.map(|running| (running, held))
            }
            Err(err) => Err(err),
        };
        self.booted(&vm, booted).await;
    }

    async fn booted<T>(self: &Arc<Self>, vm: &VmRecord, booted: ApiResult<(Arc<Running>, T)>) {
        match booted {
            Ok((running, held)) => {
                drop(held);
                tracing::info!(vm = %vm.id, name = vm.name, pid = running.process.pid(), "the clone has another QEMU, and boots");
                self.greet_again(&running).await;
            }
            // Whoever ended it meanwhile has said why.
            Err(_) if !self.store.read(|s| s.vms.get(&vm.id).is_some_and(VmRecord::alive)) => self.release(vm.id).await,
            Err(err) => {
                tracing::error!(vm = %vm.id, name = vm.name, "a clone could not boot anew: {err}");
                self.stats.count("vm_crashes");
                self.mark_dead(vm.id, VmState::Crashed, Some(format!("it was rebooted, and could not boot: {err}")));
                self.release(vm.id).await;
            }
        }
    }

    /// Ends the QEMU that a VM has, if it has one, and starts one that boots.
    async fn replace(
        self: &Arc<Self>,
        vm: &VmRecord,
        boot: Boot,
        before: Option<&Running>,
        busy: Arc<Mutex<()>>,
    ) -> ApiResult<Arc<Running>> {
        let id = vm.id;
        let failed = |what: &str, e: ramet_vmm::VmmError| ApiError::failed(what.to_owned(), e);
        self.store.update(|s| -> ApiResult<()> {
            if let Some(vm) = s.vms.get_mut(&id) {
                vm.rebooting = true;
            }
            Ok(())
        })?;
        if let Some(before) = before {
            before.ending.store(true, Ordering::Release);
            // Who connects to it just now finds nobody.
            if let Ok(mut agent) = before.agent.try_lock()
                && let Some(agent) = agent.take()
            {
                agent.close();
            }
            before.process.quit().await.map_err(|e| failed("Its QEMU could not be ended", e))?;
        }
        // That of a daemon before.
        self.vmm.kill(&vm.dir).await.map_err(|e| failed("Its QEMU could not be ended", e))?;
        if let Some(pager) = self.pagers.get(vm.family) {
            let detached = pager.control.detach(id).await;
            detached.map_err(|e| ApiError::failed("The pager did not let go of its memory", e))?;
        }
        self.unpublish(vm.family, &vm.published).await;
        for (network, nic) in vm.nics() {
            self.unplug(network, nic).await;
        }
        self.store.update(|s| -> ApiResult<()> {
            let vm = s.vms.get_mut(&id).filter(|vm| vm.alive()).ok_or_else(|| ended(&vm.name))?;
            (vm.checkpoint, vm.base, vm.attached, vm.agent) = (None, None, false, false);
            let nics = vm.nic.iter_mut().chain(vm.joined.iter_mut().map(|j| &mut j.nic));
            nics.for_each(|nic| nic.tap.clear());
            Ok(())
        })?;
        if let Some(image) = vm.checkpoint {
            self.image_lost_a_user(image);
        }
        self.check_memory(&format!("VM '{}'", vm.name), needed_by_root(vm.spec.memory))?;
        let process = self.vmm.launch(&vm.spec, boot, &vm.dir).await;
        let process = process.map_err(|e| failed("QEMU could not be started", e))?;
        let running = self.adopt_held(id, Arc::from(process), busy);
        self.give_parts(&running, false, true).await?;
        backend::cont(&running.process).await?;
        self.store.update(|s| -> ApiResult<()> {
            let vm = s.vms.get_mut(&id).filter(|vm| vm.alive()).ok_or_else(|| ended(&vm.name))?;
            vm.rebooting = false;
            vm.reason = None;
            Ok(())
        })?;
        self.announce(vm.family);
        Ok(running)
    }

    // ---------------------------------------------------------------------------------------------------- its files

    /// What a VM boots from, its files on this host.
    async fn boot_of(&self, vm: &VmRecord) -> ApiResult<Boot> {
        let Some(files) = vm.boot.clone() else {
            // Of a daemon that did not put it on record.
            let image = backend::load_image(&self.images, &vm.image).await?;
            return Ok(Boot::Kernel { kernel: image.kernel, initrd: image.initrd, cmdline: image.cmdline });
        };
        let kernel = self.boot_file(vm, &files.kernel).await?;
        let initrd = match &files.initrd {
            Some(initrd) => Some(self.boot_file(vm, initrd).await?),
            None => None,
        };
        Ok(Boot::Kernel { kernel, initrd, cmdline: files.cmdline })
    }

    /// The file with these contents: of an image of this host, or one that another host sent, now or before.
    async fn boot_file(&self, vm: &VmRecord, wanted: &str) -> ApiResult<PathBuf> {
        if let Some(path) = self.boot_file_here(wanted).await? {
            return Ok(path);
        }
        let origin = self.store.read(|s| s.checkpoints.get(&vm.checkpoint?)?.origin.clone());
        let mut hosts: Vec<String> = self.peers.others();
        // The host that it came from has it, or knows it of another one.
        hosts.sort_by_key(|host| Some(host) != origin.as_ref());
        let mut why = Vec::new();
        for host in hosts {
            let asked = async { ask(&host, SEND, self.peers.client(&host)?.peer_boot(wanted)).await };
            match asked.await {
                Ok(bytes) if bytes.len() as u64 <= LARGEST && hash(&bytes) == wanted => {
                    let dir = self.config.boot_files();
                    tracing::info!(vm = %vm.id, image = vm.image, host, bytes = bytes.len(), "has a file to boot from");
                    return keep(&dir, wanted, &bytes).map_err(ApiError::from);
                }
                Ok(_) => why.push(format!("host '{host}' sends other contents")),
                Err(err) => why.push(err.body().message.clone()),
            }
        }
        let why = if why.is_empty() { String::new() } else { format!(" ({})", why.join("; ")) };
        Err(ApiError::new(
            ErrorCode::NotFound,
            format!(
                "Host '{}' has not the kernel of image '{}' that it was booted with, and no other host gives it{why}",
                self.config.name,
                shown(&vm.image)
            ),
        )
        .remedy(
            "copy the image's directory to this host's image directory, as `ramet image ls` names it, and fork again",
        ))
    }

    async fn boot_file_here(&self, wanted: &str) -> ApiResult<Option<PathBuf>> {
        if !is_hash(wanted) {
            return Err(ApiError::new(ErrorCode::BadRequest, format!("'{}' is no hash", shown(wanted))));
        }
        if let Some(path) = backend::find_boot_file(&self.images, wanted).await? {
            return Ok(Some(path));
        }
        let (path, wanted) = (self.config.boot_files().join(wanted), wanted.to_owned());
        let check = move || match read_whole(&path, &wanted) {
            Ok(_) => Some(path),
            Err(_) => None,
        };
        Ok(tokio::task::spawn_blocking(check).await.ok().flatten())
    }

    /// `GET /v1/peer/boot/{hash}`.
    ///
    /// # Errors
    /// [`ErrorCode::NotFound`].
    pub async fn peer_boot(&self, wanted: &str) -> ApiResult<Vec<u8>> {
        let found = self.boot_file_here(wanted).await?.ok_or_else(|| {
            ApiError::new(ErrorCode::NotFound, format!("Host '{}' has no file with these contents", self.config.name))
        })?;
        let wanted = wanted.to_owned();
        let read = tokio::task::spawn_blocking(move || read_whole(&found, &wanted)).await;
        Ok(read.map_err(anyhow::Error::from).flatten()?)
    }

    /// Removes what other hosts sent that no VM or checkpoint boots from.
    pub(crate) fn sweep_boot_files(&self) {
        let names = |b: &PeerBoot| [Some(b.kernel.clone()), b.initrd.clone()];
        let needed: BTreeSet<String> = self.store.read(|s| {
            let vms = s.vms.values().filter(|vm| vm.alive()).filter_map(|vm| vm.boot.as_ref());
            let all = vms.chain(s.checkpoints.values().filter_map(|c| c.boot.as_ref()));
            all.flat_map(names).flatten().collect()
        });
        for entry in fs::read_dir(self.config.boot_files()).into_iter().flatten().flatten() {
            if entry.file_name().to_str().is_none_or(|name| !needed.contains(name)) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

fn ended(name: &str) -> ApiError {
    ApiError::new(ErrorCode::WrongState, format!("VM '{name}' was ended while it booted anew"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_kept_whole_and_found_by_its_contents_only() {
        let dir = tempfile::tempdir().unwrap();
        let (dir, name) = (dir.path().join("boot"), hash(b"kernel"));
        let path = keep(&dir, &name, b"kernel").unwrap();
        assert_eq!(read_whole(&path, &name).unwrap(), b"kernel");
        assert!(read_whole(&path, &hash(b"other")).unwrap_err().to_string().contains("other contents"));
        keep(&dir, &name, b"kernel").unwrap();
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1, "nothing half-written is left");
    }

    #[test]
    fn what_is_no_hash_leads_nowhere() {
        assert!(is_hash(&hash(b"x")));
        for bad in ["", "../../etc/passwd", "0123456789ABCDEF", "0123456789abcde/"] {
            assert!(!is_hash(bad), "{bad}");
        }
    }
}
