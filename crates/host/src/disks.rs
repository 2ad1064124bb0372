//! Disks of VMs: overlays over golden images, frozen at checkpoints. How other hosts get them: [`crate::served_disks`].
//!
//! An overlay is a file `DISK_DIR/FAMILY/ID.qcow2`. One that is frozen carries the name of the frozen disk that it is the
//! uppermost part of, with which other hosts ask for it. Overlays that are on no record are removed ([`Daemon::sweep_disks`]),
//! so whoever needs one puts it on record first.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs, io,
    ops::Range,
    os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    path::{Path, PathBuf},
    pin::Pin,
    sync::{Arc, Mutex, atomic::Ordering},
    task::Poll,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use ramet_client::api::{ErrorCode, VmState};
use ramet_disk::{ChainPaths, DiskId, overlay::Templates};
use ramet_memory::{ByteSize, FamilyId, ImageId, VmId};
use ramet_vmm::{Base, DiskChain, LayerSwap, VmProcess};

use crate::{
    backend,
    checkpoints::busy,
    daemon::Daemon,
    error::{ApiError, ApiResult},
    memory,
    state::{FrozenDisk, Golden, Merging, State, VmDisk, VmRecord},
    stats::lock,
    vms::Running,
};

/// How long after a checkpoint layers are merged: its clones come first.
const MERGE_LATER: Duration = Duration::from_secs(1);
/// How many times as many layers as are merged otherwise a VM has when those are merged, too, that other VMs read through.
const MERGE_SHARED: usize = 4;
/// Room that merging leaves to those who write.
const MERGE_LEAVES: u64 = 64 << 20;
/// How soon a VM whose disk failed is continued.
const RETRY: Duration = Duration::from_millis(300);

type BoxFuture<'a> = Pin<Box<dyn Future<Output = String> + Send + 'a>>;

/// What the daemon keeps about disks.
#[derive(Debug)]
pub(crate) struct Disks {
    templates: Arc<Templates>,
    /// Where the servers are of other hosts that fetch disks of this host's checkpoints.
    pub(crate) sources: Mutex<HashMap<ImageId, BTreeMap<String, String>>>,
    /// Golden images that were found, by hash.
    golden: Mutex<HashMap<String, PathBuf>>,
    /// Overlays, and disks of other hosts, that are on no record yet.
    pub(crate) making: Mutex<BTreeSet<DiskId>>,
    /// Held by whoever merges layers: one at a time.
    merging: tokio::sync::Mutex<()>,
}

impl Disks {
    pub(crate) fn new(config: &crate::config::Config) -> Self {
        Self {
            templates: Arc::new(Templates::new(config.disk_dir.join("templates"))),
            sources: Mutex::default(),
            golden: Mutex::default(),
            making: Mutex::default(),
            merging: tokio::sync::Mutex::default(),
        }
    }
}

/// What a disk whose overlay is about to be frozen is continued on: see [`ramet_vmm::NextOverlays`]. Their identifiers are
/// twins, so that whoever finds the second one in use knows what lies below it.
#[derive(Debug)]
pub(crate) struct NextOverlay {
    pub(crate) ids: [DiskId; 2],
    paths: [PathBuf; 2],
}

impl NextOverlay {
    pub(crate) fn paths(&self) -> ramet_vmm::NextOverlays<'_> {
        let [first, second] = &self.paths;
        ramet_vmm::NextOverlays { first, second }
    }
}

impl Daemon {
    fn family_disks(&self, family: FamilyId) -> PathBuf {
        self.config.disk_dir.join(family.to_string())
    }

    pub(crate) fn overlay_path(&self, family: FamilyId, disk: DiskId) -> PathBuf {
        self.family_disks(family).join(format!("{disk}.qcow2"))
    }

    /// A disk is on record from now on, or it is gone.
    pub(crate) fn overlay_settled(&self, disk: DiskId) {
        lock(&self.disks.making).remove(&disk);
    }

    /// An empty overlay that QEMU may write to. Not removed as a stray until [`Daemon::overlay_settled`].
    pub(crate) async fn make_overlay(&self, family: FamilyId, disk: DiskId, size: ByteSize) -> ApiResult<PathBuf> {
        let (dir, path) = (self.family_disks(family), self.overlay_path(family, disk));
        let (templates, user) = (self.disks.templates.clone(), self.config.qemu_user);
        lock(&self.disks.making).insert(disk);
        let make = move || -> anyhow::Result<PathBuf> {
            if !dir.is_dir() {
                fs::create_dir_all(&dir)?;
                fs::set_permissions(&dir, fs::Permissions::from_mode(0o711))?;
            }
            templates.create(&path, size.bytes())?;
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
            if let Some((uid, gid)) = user {
                std::os::unix::fs::chown(&path, Some(uid), Some(gid))?;
            }
            Ok(path)
        };
        let made = tokio::task::spawn_blocking(make).await.map_err(anyhow::Error::from).flatten();
        made.map_err(|e| {
            self.overlay_settled(disk);
            ApiError::failed("Failed to make an overlay for the disk", e)
        })
    }

    /// Where the image's disk lies on this host.
    ///
    /// # Errors
    /// [`ErrorCode::NotFound`].
    pub(crate) async fn golden_file(&self, golden: &Golden) -> ApiResult<PathBuf> {
        if let Some(path) = lock(&self.disks.golden).get(&golden.hash).filter(|p| p.exists()) {
            return Ok(path.clone());
        }
        let found = backend::find_disk(&self.images, &golden.image, &golden.hash).await?;
        let Some(path) = found else {
            return Err(ApiError::new(
                ErrorCode::NotFound,
                format!(
                    "No image on host '{}' has the disk of '{}' (contents {})",
                    self.config.name, golden.image, golden.hash
                ),
            )
            .remedy(
                "copy the image's directory to this host's image directory; `ramet image ls` lists what is there",
            ));
        };
        lock(&self.disks.golden).insert(golden.hash.clone(), path.clone());
        Ok(path)
    }

    /// The files of a disk.
    async fn chain(&self, family: FamilyId, disk: &VmDisk) -> ApiResult<DiskChain> {
        let base = match &disk.frozen.origin {
            Some(origin) => Base::Nbd(origin.socket.clone(), "disk".to_owned()),
            None => Base::Raw(self.golden_file(&disk.frozen.golden).await?),
        };
        let path = |id: &DiskId| self.overlay_path(family, *id);
        Ok(DiskChain { base, layers: disk.frozen.layers.iter().map(path).collect(), active: path(&disk.active) })
    }

    /// What a frozen disk is made of.
    pub(crate) async fn frozen_files(&self, family: FamilyId, frozen: &FrozenDisk) -> ApiResult<ChainPaths> {
        let golden = match frozen.origin {
            Some(_) => None,
            None => Some(self.golden_file(&frozen.golden).await?),
        };
        Ok(ChainPaths {
            size: frozen.size.bytes(),
            golden,
            origin: frozen.origin.as_ref().map(|o| o.socket.clone()),
            layers: frozen.layers.iter().map(|l| self.overlay_path(family, *l)).collect(),
        })
    }

    /// What a VM's disk is made of, its own overlay on top.
    pub(crate) async fn disk_files(&self, family: FamilyId, disk: &VmDisk) -> ApiResult<ChainPaths> {
        let mut files = self.frozen_files(family, &disk.frozen).await?;
        files.layers.push(self.overlay_path(family, disk.active));
        Ok(files)
    }

    /// Gives a VM that does not run yet its disk and data volumes. Its overlay is made here.
    pub(crate) async fn attach_disk(
        &self,
        process: &Arc<dyn VmProcess>,
        family: FamilyId,
        disk: &VmDisk,
    ) -> ApiResult<()> {
        self.make_overlay(family, disk.active, disk.frozen.size).await?;
        self.attach_chain(process, family, disk).await
    }

    /// The same where its overlay is there.
    pub(crate) async fn attach_chain(
        &self,
        process: &Arc<dyn VmProcess>,
        family: FamilyId,
        disk: &VmDisk,
    ) -> ApiResult<()> {
        let chain = self.chain(family, disk).await?;
        let failed = |e| ApiError::failed("The disk can't be attached", anyhow::Error::from(e));
        process.attach_disk(&chain).await.map_err(failed)?;
        for (index, volume) in (0u8..).zip(&disk.frozen.volumes) {
            process.attach_volume(index, &self.golden_file(volume).await?).await.map_err(failed)?;
        }
        Ok(())
    }

    // ----------------------------------------------------------------------------------------------- checkpoints

    /// Before the pause: the overlay that the VM will write to after it.
    pub(crate) async fn next_overlay(&self, vm: &VmRecord) -> ApiResult<Option<NextOverlay>> {
        let Some(disk) = &vm.disk else { return Ok(None) };
        let ids = DiskId::random_twins();
        let make = |id| self.make_overlay(vm.family, id, disk.frozen.size);
        match tokio::join!(make(ids[0]), make(ids[1])) {
            (Ok(first), Ok(second)) => Ok(Some(NextOverlay { ids, paths: [first, second] })),
            (first, second) => {
                for (id, path) in [(ids[0], &first), (ids[1], &second)] {
                    if let Ok(path) = path {
                        let _ = fs::remove_file(path);
                        self.overlay_settled(id);
                    }
                }
                first.and(second).map(|_| None)
            }
        }
    }

    /// Those of the overlays that are in use, the uppermost one last, once a checkpoint has been taken. The other goes.
    pub(crate) fn used_overlays<'a>(&self, next: &'a NextOverlay, second: bool) -> &'a [DiskId] {
        if second {
            return &next.ids;
        }
        let _ = fs::remove_file(&next.paths[1]);
        self.overlay_settled(next.ids[1]);
        &next.ids[..1]
    }

    /// After a checkpoint that failed: the VM may write to a new overlay all the same, and then that is how it is.
    pub(crate) async fn settle_overlay(&self, running: &Running, next: &NextOverlay) {
        let node = match running.process.disk_node().await {
            Ok(node) => node,
            // They stay until it is known: see `find_disk_again`.
            Err(err) => {
                tracing::warn!(vm = %running.id, error = %err, "a disk can't be asked for");
                return;
            }
        };
        let used = next.paths.iter().position(|path| node == DiskChain::node(path)).map_or(0, |at| at + 1);
        self.overlay_followed(running.id, &next.ids[..used]);
        for path in &next.paths[used..] {
            let _ = fs::remove_file(path);
        }
        for id in next.ids {
            self.overlay_settled(id);
        }
    }

    /// Puts on record that a VM's overlay is frozen and these took its place, each that of the one before.
    fn overlay_followed(&self, vm: VmId, next: &[DiskId]) {
        if next.is_empty() {
            return;
        }
        self.store.amend(|s| {
            if let Some(vm) = s.vms.get_mut(&vm)
                && let Some(disk) = vm.disk.take()
            {
                vm.disk = Some(disk.followed_by(next));
            }
        });
    }

    /// After the daemon's restart: the daemon before may have died between the freezing and its record.
    pub(crate) async fn find_disk_again(self: &Arc<Self>, running: &Arc<Running>, vm: &VmRecord) {
        let Some(disk) = &vm.disk else { return };
        if disk.merging.is_some() {
            self.merge_behind(running);
        }
        let Ok(node) = running.process.disk_node().await else { return };
        if node == DiskChain::node(&self.overlay_path(vm.family, disk.active)) {
            return;
        }
        let overlays = fs::read_dir(self.family_disks(vm.family)).into_iter().flatten().flatten();
        let found = overlays.map(|e| e.path()).find(|path| DiskChain::node(path) == node);
        match found.and_then(|p| p.file_stem()?.to_str()?.parse().ok()) {
            Some(next) => {
                let first: Option<DiskId> = Some(next).filter(|n: &DiskId| n.is_second_twin()).map(DiskId::twin);
                // The second one is only ever put over the first.
                let first =
                    first.filter(|first| *first != disk.active && self.overlay_path(vm.family, *first).exists());
                let followed: Vec<_> = first.into_iter().chain([next]).collect();
                self.overlay_followed(vm.id, &followed);
            }
            None => tracing::error!(vm = %vm.id, node, "the file that the VM writes its disk to is unknown"),
        }
    }

    /// The chain of a checkpoint: what the VM had, with what was just frozen on top. `next`: the overlays in use since.
    pub(crate) fn freeze_disk(&self, family: FamilyId, disk: &VmDisk, next: &[DiskId]) -> FrozenDisk {
        let before = disk.frozen.layers.len();
        let after = disk.clone().followed_by(next);
        for layer in &after.frozen.layers[before..] {
            let path = self.overlay_path(family, *layer);
            // QEMU has it open and only reads it from now on; nobody else may write to it.
            if let Err(err) = fs::set_permissions(&path, fs::Permissions::from_mode(0o444)) {
                tracing::warn!(path = %path.display(), error = %err, "a frozen overlay is still writable");
            }
        }
        after.frozen
    }

    // --------------------------------------------------------------------------------------------------- merging

    /// Merges frozen layers of a VM's disk into one, in the background, when they are many.
    ///
    /// What is frozen never changes, so a new file is made of it beside the running VM ([`ramet_disk::merge`]), which is
    /// not asked. Then, between checkpoints, its QEMU takes the new file instead. The uppermost layer is never among
    /// them, so there is always a frozen one right above the merged ones, whatever checkpoints are taken meanwhile, and
    /// the overlay that the guest writes to is left alone.
    pub(crate) fn merge_behind(self: &Arc<Self>, running: &Arc<Running>) {
        let begun = self.store.read(|s| s.vms.get(&running.id)?.disk.as_ref()?.merging.clone()).is_some();
        if (!begun && self.layers_to_merge(running.id).is_none()) || running.merging.swap(true, Ordering::AcqRel) {
            return;
        }
        let (daemon, running) = (self.clone(), running.clone());
        tokio::spawn(async move {
            let one = daemon.disks.merging.lock().await;
            tokio::time::sleep(MERGE_LATER).await;
            let merged = daemon.merge_layers(&running).await;
            running.merging.store(false, Ordering::Release);
            drop(one);
            match merged {
                Ok(layers) => {
                    tracing::info!(vm = %running.id, layers, "merged layers of a disk");
                    // There may have come more meanwhile.
                    daemon.merge_behind(&running);
                }
                // The next checkpoint tries again.
                Err(err) => {
                    tracing::info!(vm = %running.id, error = format!("{err:#}"), "layers of a disk were not merged");
                }
            }
        });
    }

    /// Which layers of a VM's disk are to be merged.
    fn layers_to_merge(&self, vm: VmId) -> Option<(FamilyId, Vec<DiskId>)> {
        let (family, layers, others) = self.store.read(|s| {
            let vm = s.vms.get(&vm)?;
            let others = s.vms.values().filter(|v| v.id != vm.id && v.family == vm.family && v.alive());
            let others: BTreeSet<_> = others.filter_map(|v| v.disk.as_ref()).flat_map(VmDisk::overlays).collect();
            Some((vm.family, vm.disk.as_ref()?.frozen.layers.clone(), others))
        })?;
        let shared = layers.iter().rposition(|layer| others.contains(layer)).map_or(0, |last| last + 1);
        let size = |layer: &DiskId| memory::stored_bytes(&self.overlay_path(family, *layer));
        let range = to_merge(layers.len(), shared, self.config.merge_layers, |at| size(&layers[at]))?;
        Some((family, layers[range].to_vec()))
    }

    async fn merge_layers(self: &Arc<Self>, running: &Arc<Running>) -> anyhow::Result<usize> {
        // What an earlier one, or the daemon before, did not bring to its end.
        let begun = self.store.read(|s| s.vms.get(&running.id)?.disk.as_ref()?.merging.clone());
        if let Some(merging) = begun {
            return self.swap_layers(running, merging).await;
        }
        let Some((family, old)) = self.layers_to_merge(running.id) else { anyhow::bail!("they are few by now") };
        let merged = DiskId::random();
        let path = self.overlay_path(family, merged);
        lock(&self.disks.making).insert(merged);
        let made = self.merge_files(running, family, &old, &path).await;
        let swapped = match made {
            Ok(()) => self.swap_layers(running, Merging { old, merged }).await,
            Err(err) => Err(err),
        };
        // It may have come into use even so: then it is on record.
        self.store.read(|s| {
            if !overlays(s, family).contains(&merged) {
                remove(&path);
            }
        });
        self.overlay_settled(merged);
        swapped
    }

    /// Makes the merged layer.
    async fn merge_files(
        &self,
        running: &Arc<Running>,
        family: FamilyId,
        old: &[DiskId],
        path: &Path,
    ) -> anyhow::Result<()> {
        let layers: Vec<_> = old.iter().map(|layer| self.overlay_path(family, *layer)).collect();
        let size = self.store.read(|s| Some(s.vms.get(&running.id)?.disk.as_ref()?.frozen.size));
        let size = size.context("the VM has gone")?;
        let held: u64 = layers.iter().map(|path| memory::stored_bytes(path)).sum();
        anyhow::ensure!(
            memory::room(&self.config.disk_dir)?.bytes() > held + MERGE_LEAVES,
            "there is no room for a copy of their {}",
            ByteSize(held)
        );
        let target = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        if let Some((uid, gid)) = self.config.qemu_user {
            std::os::unix::fs::fchown(&target, Some(uid), Some(gid))?;
        }
        let (done, ended) = tokio::sync::oneshot::channel();
        let running = running.clone();
        // A thread of its own: its priority is for ever.
        let merge = move || {
            let begin = Instant::now();
            if let Err(err) = rustix::process::setpriority_process(Some(rustix::thread::gettid()), 19) {
                tracing::debug!(error = %err, "merging of layers has no lower priority");
            }
            let go_on = || !running.ending.load(Ordering::Acquire) && running.process.is_alive();
            let merged = ramet_disk::merge::merge(&layers, size.bytes(), &target, &go_on);
            let sealed = merged
                .map_err(anyhow::Error::from)
                .and_then(|()| target.set_permissions(fs::Permissions::from_mode(0o444)).map_err(anyhow::Error::from));
            tracing::debug!(vm = %running.id, layers = layers.len(), held, took = ?begin.elapsed(), "wrote a merged layer");
            let _ = done.send(sealed);
        };
        std::thread::Builder::new().name("merge".to_owned()).spawn(merge)?;
        ended.await.context("the merging of layers broke off")?
    }

    /// Has a VM's QEMU take the merged layer, and puts that on record: before it, what is meant to be, so that whoever comes
    /// after a daemon that dies in the middle does it again.
    async fn swap_layers(self: &Arc<Self>, running: &Arc<Running>, merging: Merging) -> anyhow::Result<usize> {
        let _busy = busy(Some(running)).await;
        let vm = self.store.read(|s| s.vms.get(&running.id).cloned()).context("the VM has gone")?;
        anyhow::ensure!(vm.state == VmState::Running && !running.ending.load(Ordering::Acquire), "the VM does not run");
        let disk = vm.disk.as_ref().context("the VM has no disk")?;
        let at = disk.place_of(&merging.old).context("the disk has other layers by now")?;
        // QEMU first waits for all reads under way, and stands still as long as that takes.
        if let Some(remote) = self.remote_disk(&vm).await {
            anyhow::ensure!(remote.waiting == 0, "reads of the VM wait for another host");
        }
        let layers = &disk.frozen.layers;
        let path = |id: &DiskId| self.overlay_path(vm.family, *id);
        let swap = LayerSwap {
            below: at.checked_sub(1).map(|below| path(&layers[below])),
            old: merging.old.iter().map(path).collect(),
            merged: path(&merging.merged),
            above: path(&layers[at + merging.old.len()]),
        };
        let change = |change: fn(&mut VmDisk)| {
            move |s: &mut State| {
                if let Some(disk) = s.vms.get_mut(&running.id).and_then(|vm| vm.disk.as_mut()) {
                    change(disk);
                }
            }
        };
        self.store.update(|s| -> anyhow::Result<()> {
            let disk = s.vms.get_mut(&running.id).and_then(|vm| vm.disk.as_mut()).context("the VM has gone")?;
            disk.merging = Some(merging.clone());
            Ok(())
        })?;
        let begin = Instant::now();
        match running.process.swap_layers(&swap).await {
            Ok(()) => {
                tracing::debug!(vm = %vm.id, took = ?begin.elapsed(), "QEMU reads from a merged layer");
                self.store.amend(change(VmDisk::merged));
            }
            Err(err) => {
                if matches!(err, ramet_vmm::VmmError::Refused { .. }) {
                    self.store.amend(change(|disk| disk.merging = None));
                }
                return Err(err.into());
            }
        }
        self.sweep_disks(vm.family);
        Ok(merging.old.len())
    }

    // ------------------------------------------------------------------------------------------------- watching

    /// Continues a VM that stands still because its disk failed, again and again, until it goes on.
    pub(crate) async fn watch_disk(running: Arc<Running>) {
        let mut next = listening(running.process.disk_failure()).await;
        // It may have failed before anybody listened, as under the daemon before.
        let mut failed = running.process.query_status().await.is_ok_and(|status| status == "io-error");
        loop {
            let why = if failed { "its disk can't be used".to_owned() } else { next.await };
            failed = false;
            tracing::warn!(vm = %running.id, why, "the VM's disk failed; it waits");
            *lock(&running.disk_trouble) = Some(why);
            loop {
                tokio::time::sleep(RETRY).await;
                if running.ending.load(Ordering::Acquire) || !running.process.is_alive() {
                    return;
                }
                // Whoever takes a checkpoint continues it.
                if running.paused.load(Ordering::Acquire) {
                    continue;
                }
                // It may fail again at once.
                let mut failure = listening(running.process.disk_failure()).await;
                if running.process.cont().await.is_err() {
                    continue;
                }
                tokio::select! {
                    why = &mut failure => *lock(&running.disk_trouble) = Some(why),
                    () = tokio::time::sleep(RETRY) => {
                        next = failure;
                        break;
                    }
                }
            }
            *lock(&running.disk_trouble) = None;
            tracing::info!(vm = %running.id, "the VM's disk works again");
        }
    }

    // ------------------------------------------------------------------------------------------------- cleaning

    /// Removes the family's overlays that are on no record, and has its server forget what nobody needs.
    pub(crate) fn sweep_disks(self: &Arc<Self>, family: FamilyId) {
        let dir = self.family_disks(family);
        if dir.exists() {
            // Under the state's lock: whoever makes an overlay has it on record before.
            self.store.read(|s| {
                let (needed, making) = (overlays(s, family), lock(&self.disks.making).clone());
                let files = fs::read_dir(&dir).into_iter().flatten().flatten().map(|e| e.path());
                for path in files {
                    let id = path.file_stem().and_then(|n| n.to_str()).and_then(|n| n.parse::<DiskId>().ok());
                    if id.is_none_or(|id| !needed.contains(&id) && !making.contains(&id)) {
                        remove(&path);
                    }
                }
            });
            if self.store.read(|s| overlays(s, family).is_empty()) {
                // Only an empty one goes.
                let _ = fs::remove_dir(&dir);
            }
        }
        let daemon = self.clone();
        tokio::spawn(async move { daemon.forget_served(family).await });
    }

    /// The same of all families that have files here, also of those that are on no record.
    pub(crate) fn sweep_lost_disks(self: &Arc<Self>) {
        for entry in fs::read_dir(&self.config.disk_dir).into_iter().flatten().flatten() {
            if let Some(family) = entry.file_name().to_str().and_then(|n| n.parse::<FamilyId>().ok()) {
                self.sweep_disks(family);
            }
        }
    }
}

/// Polls it once, so that it hears what happens from now on.
async fn listening<'a>(mut failure: BoxFuture<'a>) -> BoxFuture<'a> {
    let heard = std::future::poll_fn(|context| Poll::Ready(failure.as_mut().poll(context))).await;
    match heard {
        Poll::Ready(why) => Box::pin(std::future::ready(why)),
        Poll::Pending => failure,
    }
}

fn remove(path: &std::path::Path) {
    match fs::remove_file(path) {
        Err(err) if err.kind() != io::ErrorKind::NotFound => {
            tracing::warn!(path = %path.display(), error = %err, "an overlay can't be removed");
        }
        _ => {}
    }
}

/// Overlays that VMs and checkpoints of the family need.
fn overlays(state: &State, family: FamilyId) -> BTreeSet<DiskId> {
    let vms = state.vms.values().filter(|vm| vm.family == family && vm.alive());
    let of_vms = vms.filter_map(|vm| vm.disk.as_ref()).flat_map(VmDisk::overlays);
    let checkpoints = state.checkpoints.values().filter(|c| c.family == family);
    of_vms.chain(checkpoints.filter_map(|c| c.disk.as_ref()).flat_map(|d| d.layers.iter().copied())).collect()
}

/// Which of so many layers are to be merged, when the lowest `shared` are read by other VMs, too, and `most` are not merged yet.
///
/// Layers that others read through stay as they are, since all then read the same file, unless there are very many. The
/// uppermost stays, too. All others become one, but for up to `most / 2 - 2` of the lowest, each as large as all above it:
/// so a byte that is old is not copied again at every merge.
fn to_merge(layers: usize, shared: usize, most: usize, size: impl Fn(usize) -> u64) -> Option<Range<usize>> {
    if most == 0 {
        return None;
    }
    let most = most.max(3);
    let first = match () {
        () if layers - shared >= most => shared,
        () if layers >= most * MERGE_SHARED => 0,
        () => return None,
    };
    let end = layers - 1;
    // The two uppermost, and whatever is not large beside what is above it.
    let mut start = end - 2;
    let mut above = size(start) + size(start + 1);
    while start > first && (start - first > (most / 2).saturating_sub(2) || size(start - 1) <= above) {
        start -= 1;
        above += size(start);
    }
    Some(start..end)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        served_disks::served,
        state::{
            Origin,
            tests::{checkpoint, vm},
        },
    };

    fn frozen(layers: &[u128], origin: Option<u128>) -> FrozenDisk {
        FrozenDisk {
            size: ByteSize::mib(64),
            golden: Golden { image: "debian".into(), hash: "h".into() },
            origin: origin.map(|n| Origin { disk: DiskId::from_u128(n), socket: "/s".into() }),
            layers: layers.iter().map(|n| DiskId::from_u128(*n)).collect(),
            volumes: Vec::new(),
        }
    }

    #[test]
    fn an_overlay_is_needed_by_whoever_reads_through_it() {
        let mut state = State::default();
        let mut web = vm("web");
        let family = web.family;
        web.disk = Some(VmDisk { active: DiskId::from_u128(2), ..VmDisk::over(frozen(&[1], None)) });
        state.vms.insert(web.id, web.clone());
        let mut taken = checkpoint(&[1]);
        taken.disk = Some(frozen(&[1, 7], Some(9)));
        state.checkpoints.insert(taken.id, taken);
        let ids = |n: &[u128]| n.iter().map(|n| DiskId::from_u128(*n)).collect::<BTreeSet<_>>();
        assert_eq!(overlays(&state, family), ids(&[1, 2, 7]));
        assert_eq!(served(&state, family), ids(&[7, 9]), "what it reads from others, and what others may read");
        state.vms.get_mut(&web.id).unwrap().state = ramet_client::api::VmState::Crashed;
        assert_eq!(overlays(&state, family), ids(&[1, 7]), "a dead VM's overlay goes");
        assert!(overlays(&state, FamilyId::from_u128(99)).is_empty());
    }

    #[test]
    fn layers_are_merged_when_they_are_many_and_old_ones_seldom() {
        let like = |sizes: &'static [u64]| move |at: usize| sizes[at];
        let same = |_: usize| 10;
        assert_eq!(to_merge(7, 0, 8, same), None);
        assert_eq!(to_merge(8, 0, 8, same), Some(0..7), "all but the uppermost");
        assert_eq!(to_merge(8, 0, 0, same), None, "never");
        assert_eq!(to_merge(8, 1, 8, same), None, "another VM reads through one");
        assert_eq!(to_merge(10, 2, 8, same), Some(2..9));
        assert_eq!(to_merge(32, 31, 8, same), Some(0..31), "very many");
        assert_eq!(to_merge(8, 0, 8, like(&[999, 1, 1, 1, 1, 1, 1, 1])), Some(1..7), "what is large stays");
        assert_eq!(to_merge(8, 0, 8, like(&[999, 99, 9, 1, 1, 1, 1, 1])), Some(2..7), "but only some");
        assert_eq!(to_merge(3, 0, 1, same), Some(0..2));
        // For ever: it stays short, and a byte is copied a few times.
        let (mut sizes, mut copied) = (Vec::new(), 0);
        for round in 0..1000 {
            sizes.push(1 + round % 3);
            if let Some(range) = to_merge(sizes.len(), 0, 8, |at| sizes[at]) {
                let merged = sizes[range.clone()].iter().sum();
                copied += merged;
                sizes.splice(range, [merged]);
                assert!(sizes.len() <= 4, "{sizes:?}");
            }
        }
        assert!(copied < 2000 * 20, "{copied}");
    }

    #[test]
    fn a_merged_layer_takes_the_place_of_those_that_it_was_made_of() {
        let ids = |n: &[u128]| n.iter().map(|n| DiskId::from_u128(*n)).collect::<Vec<_>>();
        let mut disk = VmDisk { active: DiskId::from_u128(9), ..VmDisk::over(frozen(&[1, 2, 3, 4], None)) };
        assert_eq!(disk.place_of(&ids(&[2, 3])), Some(1));
        for other in [&[3, 4][..], &[2, 4], &[5], &[4, 5], &[]] {
            assert_eq!(disk.place_of(&ids(other)), None, "{other:?}");
        }
        disk.merging = Some(Merging { old: ids(&[2, 3]), merged: DiskId::from_u128(7) });
        assert!(disk.overlays().any(|id| id == DiskId::from_u128(7)), "it is needed before it is in use");
        disk = disk.followed_by(&[DiskId::from_u128(10)]);
        disk.merged();
        assert_eq!(disk.frozen.layers, ids(&[1, 7, 4, 9]));
        assert_eq!((disk.merging, disk.active), (None, DiskId::from_u128(10)));
    }

    #[test]
    fn a_frozen_overlay_becomes_the_uppermost_layer() {
        let disk = VmDisk { active: DiskId::from_u128(2), ..VmDisk::over(frozen(&[1], None)) };
        let next = disk.followed_by(&[DiskId::from_u128(3)]);
        assert_eq!(next.frozen.layers, [DiskId::from_u128(1), DiskId::from_u128(2)]);
        assert_eq!(next.active, DiskId::from_u128(3));
    }
}
