//! Disks of VMs: overlays over golden images, frozen at checkpoints, served to other hosts.
//!
//! An overlay is a file `DISK_DIR/FAMILY/ID.qcow2`. One that is frozen carries the name of the frozen disk that it is the
//! uppermost part of, with which other hosts ask for it. Overlays that are on no record are removed ([`Daemon::sweep_disks`]),
//! so whoever needs one puts it on record first.

use std::{
    collections::{BTreeSet, HashMap},
    fs, io,
    os::unix::fs::PermissionsExt as _,
    path::PathBuf,
    pin::Pin,
    sync::{Arc, Mutex, atomic::Ordering},
    task::Poll,
    time::Duration,
};

use ramet_client::api::{ErrorCode, PeerDisk, PeerGolden};
use ramet_disk::{
    ChainPaths, DiskId,
    control::{DiskStatus, ExtentsReply, FrozenReply, RemoteReply, Request, SourceAddress, StatusReply},
    overlay::Templates,
};
use ramet_memory::{ByteSize, FamilyId, VmId};
use ramet_vmm::{Base, DiskChain, VmProcess};
use serde::de::DeserializeOwned;

use crate::{
    backend,
    checkpoints::{busy, pager_failed},
    daemon::Daemon,
    error::{ApiError, ApiResult},
    pagers::Pager,
    state::{CheckpointRecord, FrozenDisk, Golden, Origin, State, VmDisk, VmRecord},
    stats::lock,
    vms::Running,
};

/// How long a VM must have had no checkpoint before that: one would stop it, and it would begin anew.
const FLATTEN_QUIET: Duration = Duration::from_secs(1);
/// Layers at which that is no longer waited for.
const FLATTEN_NOW: usize = 32;
/// How long a request to a server of frozen disks may take.
const CALL: Duration = Duration::from_secs(30);
/// How soon a VM whose disk failed is continued.
const RETRY: Duration = Duration::from_millis(300);

type BoxFuture<'a> = Pin<Box<dyn Future<Output = String> + Send + 'a>>;

/// What the daemon keeps about disks.
#[derive(Debug)]
pub(crate) struct Disks {
    templates: Arc<Templates>,
    /// Golden images that were found, by hash.
    golden: Mutex<HashMap<String, PathBuf>>,
    /// Overlays, and disks of other hosts, that are on no record yet.
    making: Mutex<BTreeSet<DiskId>>,
}

impl Disks {
    pub(crate) fn new(config: &crate::config::Config) -> Self {
        Self {
            templates: Arc::new(Templates::new(config.disk_dir.join("templates"))),
            golden: Mutex::default(),
            making: Mutex::default(),
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
    pub(crate) async fn next_overlay(&self, running: &Running, vm: &VmRecord) -> ApiResult<Option<NextOverlay>> {
        let Some(disk) = &vm.disk else { return Ok(None) };
        if running.flattening.load(Ordering::Acquire) {
            let stopped = running.process.stop_flattening().await;
            stopped.map_err(|e| ApiError::failed("The merging of the disk's layers can't be stopped", e))?;
        }
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
                vm.disk = Some(next.iter().fold(disk, |disk, &next| disk.followed_by(next)));
            }
        });
    }

    /// After the daemon's restart: the daemon before may have died between the freezing and its record.
    pub(crate) async fn find_disk_again(self: &Arc<Self>, running: &Arc<Running>, vm: &VmRecord) {
        let Some(disk) = &vm.disk else { return };
        // Nobody waits for its end any more, and no checkpoint could be taken before that.
        let _ = running.process.stop_flattening().await;
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
        let after = next.iter().fold(disk.clone(), |disk, &next| disk.followed_by(next));
        for layer in &after.frozen.layers[before..] {
            let path = self.overlay_path(family, *layer);
            // QEMU has it open and only reads it from now on; nobody else may write to it.
            if let Err(err) = fs::set_permissions(&path, fs::Permissions::from_mode(0o444)) {
                tracing::warn!(path = %path.display(), error = %err, "a frozen overlay is still writable");
            }
        }
        after.frozen
    }

    /// Merges the layers below a VM's overlay into it, in the background, when they are many.
    pub(crate) fn flatten_behind(self: &Arc<Self>, running: &Arc<Running>) {
        let layers =
            |d: &Self, vm: VmId| d.store.read(|s| s.vms.get(&vm)?.disk.as_ref().map(|d| d.frozen.layers.clone()));
        let Some(most) = self.config.merge_layers else { return };
        if layers(self, running.id).is_none_or(|l| l.len() < most.get())
            || running.flattening.swap(true, Ordering::AcqRel)
        {
            return;
        }
        let (daemon, running) = (self.clone(), running.clone());
        tokio::spawn(async move {
            let mut merged = Vec::new();
            // Not beside a checkpoint: it would merge into an overlay that is frozen by then.
            let held = loop {
                tokio::time::sleep(FLATTEN_QUIET).await;
                let held = busy(Some(&running)).await;
                let before = std::mem::replace(&mut merged, layers(&daemon, running.id).unwrap_or_default());
                if before.len() == merged.len() || merged.len() >= FLATTEN_NOW {
                    break held;
                }
            };
            let begun = running.process.flatten_disk().await;
            drop(held);
            let flat = match begun {
                Ok(merging) => merging.await,
                Err(err) => Err(err),
            };
            running.flattening.store(false, Ordering::Release);
            match flat {
                Ok(()) => {
                    let _busy = busy(Some(&running)).await;
                    let mut family = None;
                    daemon.store.amend(|s| {
                        if let Some(vm) = s.vms.get_mut(&running.id)
                            && let Some(disk) = &mut vm.disk
                        {
                            disk.frozen.layers.retain(|l| !merged.contains(l));
                            family = Some(vm.family);
                        }
                    });
                    tracing::info!(vm = %running.id, layers = merged.len(), "merged the layers of a disk");
                    if let Some(family) = family {
                        daemon.sweep_disks(family);
                    }
                }
                // A checkpoint stops it; after that it begins anew.
                Err(err) => tracing::info!(vm = %running.id, error = %err, "the layers of a disk were not merged"),
            }
        });
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

    // ---------------------------------------------------------------------------------------------- other hosts

    async fn disk_server(&self, family: FamilyId) -> ApiResult<Arc<Pager>> {
        let server = self.disk_servers.ensure(family).await;
        server.map_err(|e| ApiError::failed("Failed to start the server of frozen disks", e))
    }

    async fn ask_disk_server<T: DeserializeOwned>(&self, server: &Pager, request: &Request) -> ApiResult<T> {
        let answer = server.control.call(request, true, CALL).await;
        answer.map_err(|e| pager_failed("The server of frozen disks", e))
    }

    /// What another host needs to open a checkpoint's disk.
    pub(crate) async fn offer_disk(&self, record: &CheckpointRecord) -> ApiResult<Option<PeerDisk>> {
        let Some(frozen) = &record.disk else { return Ok(None) };
        let Some(disk) = frozen.layers.last().copied() else {
            return Err(ApiError::internal("a checkpoint's disk has no layer"));
        };
        let server = self.disk_server(record.family).await?;
        let address = self.disk_servers.listen(&server).await;
        let address = address.map_err(|e| ApiError::failed("The disk can't be served to other hosts", e))?;
        let golden = match frozen.origin {
            Some(_) => None,
            None => Some(self.golden_file(&frozen.golden).await?),
        };
        let chain = ChainPaths {
            size: frozen.size.bytes(),
            golden,
            origin: frozen.origin.as_ref().map(|o| o.socket.clone()),
            layers: frozen.layers.iter().map(|l| self.overlay_path(record.family, *l)).collect(),
        };
        let _: FrozenReply = self.ask_disk_server(&server, &Request::FrozenAdd { disk, chain }).await?;
        let map: ExtentsReply = self.ask_disk_server(&server, &Request::Extents { disk }).await?;
        let extents = serde_json::to_value(&map.extents).ok().and_then(|v| v.as_str().map(str::to_owned));
        let peer = |g: &Golden| PeerGolden { image: g.image.clone(), hash: g.hash.clone() };
        Ok(Some(PeerDisk {
            disk: disk.to_string(),
            size: frozen.size.bytes(),
            golden: peer(&frozen.golden),
            volumes: frozen.volumes.iter().map(peer).collect(),
            extents: extents.ok_or_else(|| ApiError::internal("a map of extents is no text"))?,
            address,
        }))
    }

    /// Has this host serve another host's frozen disk to its QEMUs. Not forgotten until [`Daemon::overlay_settled`].
    pub(crate) async fn import_disk(&self, family: FamilyId, host: &str, offer: &PeerDisk) -> ApiResult<FrozenDisk> {
        let bad = |what: String| ApiError::new(ErrorCode::BadRequest, format!("The checkpoint's disk: {what}"));
        let disk: DiskId = offer.disk.parse().map_err(|e: ramet_memory::IdError| bad(e.to_string()))?;
        let extents = serde_json::from_value(serde_json::Value::String(offer.extents.clone()));
        let extents = extents.map_err(|e| bad(format!("its map is not understood: {e}")))?;
        let ours = |g: &PeerGolden| Golden { image: g.image.clone(), hash: g.hash.clone() };
        let golden = ours(&offer.golden);
        let volumes: Vec<_> = offer.volumes.iter().map(ours).collect();
        for volume in &volumes {
            self.golden_file(volume).await?;
        }
        let server = self.disk_server(family).await?;
        let sources = vec![SourceAddress { addr: offer.address.clone(), name: host.to_owned() }];
        // Without the image here, its part is fetched like the rest.
        let here = self.golden_file(&golden).await.ok();
        let request = Request::RemoteAdd { disk, size: offer.size, golden: here, extents, sources };
        lock(&self.disks.making).insert(disk);
        let reply: ApiResult<RemoteReply> = self.ask_disk_server(&server, &request).await;
        let reply = reply.inspect_err(|_| self.overlay_settled(disk))?;
        let origin = Some(Origin { disk, socket: reply.socket });
        Ok(FrozenDisk { size: ByteSize(offer.size), golden, origin, layers: Vec::new(), volumes })
    }

    /// What the family's server of frozen disks tells; none: it has none.
    pub(crate) async fn disk_server_status(&self, family: FamilyId) -> Option<StatusReply> {
        let server = self.disk_servers.get(family)?;
        server.control.call(&Request::Status, true, Duration::from_secs(1)).await.ok()
    }

    /// The disk of another host that a VM's lies over, if it does.
    pub(crate) async fn remote_disk(&self, vm: &VmRecord) -> Option<DiskStatus> {
        let origin = vm.disk.as_ref()?.frozen.origin.as_ref()?.disk;
        self.remote_disks(std::slice::from_ref(vm)).await.remove(&origin)
    }

    /// The disks of other hosts that living VMs' disks lie over.
    pub(crate) async fn remote_disks(&self, vms: &[VmRecord]) -> HashMap<DiskId, DiskStatus> {
        let over = |vm: &&VmRecord| vm.alive() && vm.disk.as_ref().is_some_and(|d| d.frozen.origin.is_some());
        let families: BTreeSet<_> = vms.iter().filter(over).map(|vm| vm.family).collect();
        let mut disks = HashMap::new();
        for family in families {
            let status = self.disk_server_status(family).await.unwrap_or_default();
            disks.extend(status.disks.into_iter().map(|disk| (disk.disk, disk)));
        }
        disks
    }

    /// Has the family's server forget disks that no record has any more.
    async fn forget_served(&self, family: FamilyId) {
        let Some(status) = self.disk_server_status(family).await else { return };
        // What is no longer being made is on record, or needed by nobody.
        let making = lock(&self.disks.making).clone();
        let needed = self.store.read(|s| served(s, family));
        for disk in status.disks.iter().map(|d| d.disk).filter(|d| !needed.contains(d) && !making.contains(d)) {
            if let Some(server) = self.disk_servers.get(family) {
                let dropped: ApiResult<serde_json::Value> =
                    self.ask_disk_server(&server, &Request::Drop { disk }).await;
                if let Err(err) = dropped {
                    tracing::warn!(%disk, "{err}");
                }
            }
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

    /// Overlays of families that are on no record.
    pub(crate) fn sweep_lost_disks(self: &Arc<Self>) {
        for entry in fs::read_dir(&self.config.disk_dir).into_iter().flatten().flatten() {
            let family = entry.file_name().to_str().and_then(|n| n.parse::<FamilyId>().ok());
            match family {
                Some(family) if self.store.read(|s| s.families.contains_key(&family)) => self.sweep_disks(family),
                Some(_) => {
                    let _ = fs::remove_dir_all(entry.path());
                }
                None => {}
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

/// Frozen disks that the family's server serves to QEMUs or to other hosts.
fn served(state: &State, family: FamilyId) -> BTreeSet<DiskId> {
    let vms = state.vms.values().filter(|vm| vm.family == family && vm.alive()).filter_map(|vm| vm.disk.as_ref());
    let checkpoints: Vec<_> =
        state.checkpoints.values().filter(|c| c.family == family).filter_map(|c| c.disk.as_ref()).collect();
    let origins =
        vms.map(|d| &d.frozen).chain(checkpoints.iter().copied()).filter_map(|d| Some(d.origin.as_ref()?.disk));
    origins.chain(checkpoints.iter().filter_map(|d| d.layers.last().copied())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::tests::{checkpoint, vm};

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
        web.disk = Some(VmDisk { frozen: frozen(&[1], None), active: DiskId::from_u128(2) });
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
    fn a_frozen_overlay_becomes_the_uppermost_layer() {
        let disk = VmDisk { frozen: frozen(&[1], None), active: DiskId::from_u128(2) };
        let next = disk.followed_by(DiskId::from_u128(3));
        assert_eq!(next.frozen.layers, [DiskId::from_u128(1), DiskId::from_u128(2)]);
        assert_eq!(next.active, DiskId::from_u128(3));
    }
}
