//! Frozen disks between hosts: the checkpoint's host serves them, other hosts fetch from it, and from one another.
//!
//! The work is done by `ramet-disk`, a process for each family and host. The daemon tells it which disks to serve, and where
//! pages of others' are: first of all on the checkpoint's host, which has all of them, then on every host that has clones,
//! with what these have read. Each of them learns of the others after a fork.

use std::{
    collections::{BTreeSet, HashMap},
    sync::Arc,
    time::Duration,
};

use ramet_client::api::{ErrorCode, PeerDisk, PeerDiskServer, PeerDiskSources, PeerGolden, PeerSource};
use ramet_disk::{
    DiskId,
    control::{DiskStatus, ExtentsReply, FrozenReply, MAX_SOURCES, RemoteReply, Request, SourceAddress, StatusReply},
};
use ramet_memory::{ByteSize, FamilyId, ImageId};
use serde::de::DeserializeOwned;

use crate::{
    checkpoints::pager_failed,
    daemon::{Daemon, all},
    error::{ApiError, ApiResult},
    pagers::Pager,
    peers::ask,
    remote::parse_image,
    state::{CheckpointRecord, FrozenDisk, Golden, Origin, State, VmRecord},
    stats::lock,
};

/// How long a request to a server of frozen disks may take.
const CALL: Duration = Duration::from_secs(30);
/// How long another host may take to hear of sources.
const TELL: Duration = Duration::from_secs(5);

impl Daemon {
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
        let address = self.disk_address(&server).await?;
        let chain = self.frozen_files(record.family, frozen).await?;
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
            sources: self.sources_of(record.id, address),
        }))
    }

    /// Has this host serve another host's frozen disk to its QEMUs. Not forgotten until [`Daemon::overlay_settled`].
    pub(crate) async fn import_disk(&self, family: FamilyId, offer: &PeerDisk) -> ApiResult<FrozenDisk> {
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
        let sources = self.to_ask(&offer.sources);
        // Without the image here, its part is fetched like the rest.
        let here = self.golden_file(&golden).await.ok();
        let request = Request::RemoteAdd { disk, size: offer.size, golden: here, extents, sources };
        lock(&self.disks.making).insert(disk);
        let reply: ApiResult<RemoteReply> = self.ask_disk_server(&server, &request).await;
        let reply = reply.inspect_err(|_| self.overlay_settled(disk))?;
        let origin = Some(Origin { disk, socket: reply.socket });
        Ok(FrozenDisk { size: ByteSize(offer.size), golden, origin, layers: Vec::new(), volumes })
    }

    /// Where other hosts reach a server of frozen disks.
    async fn disk_address(&self, server: &Pager) -> ApiResult<String> {
        let address = self.disk_servers.listen(server).await;
        let address = address.map_err(|e| ApiError::failed("The disk can't be served to other hosts", e))?;
        Ok(self.reachable(&address))
    }

    // --------------------------------------------------------------------------------------- who has pages of a disk

    /// Who serves a checkpoint's disk: this host, which has all of it, then those that have fetched from it.
    fn sources_of(&self, checkpoint: ImageId, own: String) -> Vec<PeerSource> {
        let others = lock(&self.disks.sources).get(&checkpoint).cloned().unwrap_or_default();
        let others = others.into_iter().map(|(host, address)| PeerSource { host, address });
        std::iter::once(PeerSource { host: self.config.name.clone(), address: own }).chain(others).collect()
    }

    /// Sources as `ramet-disk` takes them: nobody asks itself.
    fn to_ask(&self, sources: &[PeerSource]) -> Vec<SourceAddress> {
        let others = sources.iter().filter(|source| source.host != self.config.name).take(MAX_SOURCES);
        others.map(|source| SourceAddress { addr: source.address.clone(), name: source.host.clone() }).collect()
    }

    /// Tells all hosts that have a checkpoint's disk of one another, behind the caller's back: should this host be away, they
    /// get from each other what they have.
    pub(crate) fn spread_sources(self: &Arc<Self>, checkpoint: ImageId) {
        let daemon = self.clone();
        tokio::spawn(async move {
            // First all tell where they are, then all hear of the others. A third time where one came meanwhile.
            for _ in 0..3 {
                match daemon.exchange_sources(checkpoint).await {
                    Ok(true) => {}
                    Ok(false) => return,
                    Err(err) => {
                        tracing::info!(%checkpoint, "hosts were not told who else has the disk: {err}");
                        return;
                    }
                }
            }
        });
    }

    /// One round of it. True when it brought news.
    async fn exchange_sources(self: &Arc<Self>, checkpoint: ImageId) -> ApiResult<bool> {
        let Some(record) = self.store.read(|s| s.checkpoints.get(&checkpoint).cloned()) else {
            lock(&self.disks.sources).remove(&checkpoint);
            return Ok(false);
        };
        let disk = record.disk.as_ref().and_then(|disk| disk.layers.last().copied());
        let (Some(disk), None, false) = (disk, &record.origin, record.peers.is_empty()) else { return Ok(false) };
        let server = self.disk_server(record.family).await?;
        let own = self.disk_address(&server).await?;
        let request = PeerDiskSources { disk: disk.to_string(), sources: self.sources_of(checkpoint, own) };
        let answers = all(record.peers.into_iter().map(|host| {
            let (client, request) = (self.peers.client(&host), request.clone());
            async move {
                let answer =
                    async { ask(&host, TELL, client?.peer_disk_sources(&checkpoint.to_string(), &request)).await };
                (answer.await, host)
            }
        }))
        .await;
        let mut known = lock(&self.disks.sources);
        let known = known.entry(checkpoint).or_default();
        let before = known.clone();
        for (answer, host) in answers {
            match answer {
                Ok(PeerDiskServer { address: Some(address) }) => drop(known.insert(host, address)),
                Ok(PeerDiskServer { address: None }) => drop(known.remove(&host)),
                // It may be back when it is needed.
                Err(err) => tracing::info!(%checkpoint, "{err}"),
            }
        }
        Ok(*known != before)
    }

    /// `PUT /v1/peer/images/{id}/disk`: who else has pages of the disk of the sender's checkpoint.
    ///
    /// # Errors
    /// When the id is none, or the server of frozen disks fails.
    pub async fn peer_disk_sources(
        &self,
        sender: &str,
        checkpoint: &str,
        request: &PeerDiskSources,
    ) -> ApiResult<PeerDiskServer> {
        let image = parse_image(checkpoint)?;
        let found = self.store.read(|s| {
            let record = s.checkpoints.get(&image).filter(|c| c.origin.as_deref() == Some(sender))?;
            Some((record.family, record.disk.as_ref()?.origin.as_ref()?.disk))
        });
        let Some((family, disk)) = found.filter(|(_, disk)| disk.to_string() == request.disk) else {
            return Ok(PeerDiskServer { address: None });
        };
        let server = self.disk_server(family).await?;
        let sources = self.to_ask(&request.sources);
        let _: serde_json::Value = self.ask_disk_server(&server, &Request::Sources { disk, sources }).await?;
        Ok(PeerDiskServer { address: Some(self.disk_address(&server).await?) })
    }

    // --------------------------------------------------------------------------------------------------- its state

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
    pub(crate) async fn forget_served(&self, family: FamilyId) {
        let Some(status) = self.disk_server_status(family).await else { return };
        // What is no longer being made is on record, or needed by nobody.
        let making = lock(&self.disks.making).clone();
        let needed = self.store.read(|s| {
            lock(&self.disks.sources).retain(|checkpoint, _| s.checkpoints.contains_key(checkpoint));
            served(s, family)
        });
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
}

/// Frozen disks that the family's server serves to QEMUs or to other hosts.
pub(crate) fn served(state: &State, family: FamilyId) -> BTreeSet<DiskId> {
    let vms = state.vms.values().filter(|vm| vm.family == family && vm.alive()).filter_map(|vm| vm.disk.as_ref());
    let checkpoints: Vec<_> =
        state.checkpoints.values().filter(|c| c.family == family).filter_map(|c| c.disk.as_ref()).collect();
    let origins =
        vms.map(|d| &d.frozen).chain(checkpoints.iter().copied()).filter_map(|d| Some(d.origin.as_ref()?.disk));
    origins.chain(checkpoints.iter().filter_map(|d| d.layers.last().copied())).collect()
}
