//! Clones on other hosts: the checkpoint's host sends a descriptor, the other host makes the clones, and both agree at the
//! end whether they stay.

use std::{
    collections::BTreeSet,
    fs,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use ramet_client::api::{
    CloneResponse, CloneResult, ErrorCode, PeerCloneRequest, PeerCommit, PeerDisk, PeerPoolRequest, Phase, PoolRequest,
    PoolStatus, UserInfo,
};
use ramet_memory::ImageId;
use ramet_pager::control::SourceAddress;
use ramet_vmm::MachineSpec;
use ramet_wire::{Descriptor, DescriptorError, PageSource};

use crate::{
    backend,
    checkpoints::pager_failed,
    daemon::{Daemon, all, to_the_end},
    error::{ApiError, ApiResult, from_peer},
    local::LocalClone,
    names::check_vm_name,
    plan::{Parent, Planned, Terms, reserve},
    state::{CheckpointRecord, now_unix_ms},
    stats::{Clock, us},
    vms::{check_free, check_ttl},
};

/// Longest JSON before a descriptor.
const MAX_REQUEST: usize = 16 << 20;

/// A checkpoint for other hosts.
#[derive(Debug)]
pub(crate) struct Offer {
    /// The descriptor, encoded.
    pub(crate) bytes: Vec<u8>,
    /// The disk.
    pub(crate) disk: Option<PeerDisk>,
}

/// Tells a clone's phases from the asker's beginning: `way_us` of `send` come first.
pub(crate) fn shift(mut clone: CloneResult, before_us: u64, way_us: u64) -> CloneResult {
    let offset = before_us + way_us;
    for phase in &mut clone.timeline.phases {
        phase.start_us += offset;
    }
    clone.timeline.phases.insert(0, Phase { name: "send".to_owned(), start_us: before_us, duration_us: way_us });
    clone.timeline.total_us += offset;
    clone.running_us += offset;
    clone.answered_us = clone.answered_us.map(|us| us + offset);
    clone.ready_us = clone.ready_us.map(|us| us + offset);
    clone
}

/// A peer's request taken apart: JSON's length, JSON, descriptor.
fn split(body: &[u8]) -> ApiResult<(PeerCloneRequest, &[u8])> {
    let bad = |why: &str| {
        ApiError::new(ErrorCode::BadRequest, format!("Malformed request for clones: {why}"))
            .remedy("run the same ramet release on both hosts")
    };
    let (len, rest) = body.split_first_chunk::<4>().ok_or_else(|| bad("it is cut short"))?;
    let len = u32::from_le_bytes(*len) as usize;
    if len > MAX_REQUEST {
        return Err(bad("it is too long"));
    }
    let (json, descriptor) = rest.split_at_checked(len).ok_or_else(|| bad("it is cut short"))?;
    let request = serde_json::from_slice(json).map_err(|e| bad(&e.to_string()))?;
    Ok((request, descriptor))
}

fn bad_descriptor(err: &DescriptorError) -> ApiError {
    let code = match err {
        DescriptorError::Version { .. } => ErrorCode::VersionMismatch,
        _ => ErrorCode::BadRequest,
    };
    ApiError::new(code, err.to_string())
}

impl Daemon {
    // ---------------------------------------------------------------------------------- on the checkpoint's host

    /// What another host needs, besides pages, to make clones of a checkpoint.
    pub(crate) async fn offer(&self, record: &CheckpointRecord, state: &[u8]) -> ApiResult<Offer> {
        let (bytes, disk) = tokio::join!(self.descriptor(record, state), self.offer_disk(record));
        Ok(Offer { bytes: bytes?, disk: disk? })
    }

    /// The descriptor of a checkpoint of this host, encoded.
    async fn descriptor(&self, record: &CheckpointRecord, state: &[u8]) -> ApiResult<Vec<u8>> {
        let failed = |what: &str, e: anyhow::Error| ApiError::failed(what.to_owned(), e);
        let pager = self.pager(record.family).await?;
        let listen = self.pagers.listen(&pager).await;
        let listen = listen.map_err(|e| {
            ApiError::new(ErrorCode::Trust, format!("{e:#}"))
                .remedy("set up trust between the hosts: `ramet host init`")
        })?;
        let path =
            pager.control.image_spec(record.id).await.map_err(|e| pager_failed("The image can't be described", e))?;
        let memory = fs::read(&path).map_err(|e| failed("The image's description can't be read", e.into()))?;
        let descriptor = Descriptor {
            checkpoint: record.id,
            family: record.family,
            parent_vm: record.vm,
            generation: record.generation,
            depth: u32::try_from(record.layers.len()).unwrap_or(u32::MAX),
            spec_json: serde_json::to_vec(&record.spec)
                .map_err(|e| failed("The machine can't be described", e.into()))?,
            guest_kind: record.guest.clone(),
            name_hint: record.vm_name.clone(),
            device_state: state.to_vec(),
            memory,
            colors: self.ready_colors(record.id).unwrap_or_default(),
            page_source: Some(PageSource { addr: self.reachable(&listen), name: self.config.name.clone() }),
        };
        descriptor.encode().map_err(|e| failed("The descriptor can't be made", e.into()))
    }

    /// `GET /v1/checkpoints/{id}/descriptor`.
    ///
    /// # Errors
    /// When there is no such checkpoint, or pages are not served to other hosts.
    pub async fn encoded_descriptor(&self, wanted: &str) -> ApiResult<Vec<u8>> {
        let record = self.find_checkpoint(wanted)?;
        let state = self.device_state(&record)?;
        self.descriptor(&record, &state).await
    }

    /// A pager that listens on all addresses is reached at the one that other hosts know.
    pub(crate) fn reachable(&self, listen: &str) -> String {
        let known = self.peers.own_address().and_then(|a| a.parse::<SocketAddr>().ok());
        match (listen.parse::<SocketAddr>(), known) {
            (Ok(listen), Some(known)) if listen.ip().is_unspecified() => {
                SocketAddr::new(known.ip(), listen.port()).to_string()
            }
            _ => listen.to_owned(),
        }
    }

    // ----------------------------------------------------------------------------------------- on the other host

    /// `POST /v1/peer/clones`: makes clones of another host's checkpoint. They hang on the request's lease until
    /// [`Daemon::peer_commit`].
    ///
    /// # Errors
    /// When the request or the descriptor is malformed or of another version, a rule or limit is broken, or a clone does
    /// not come up: nothing is left then.
    pub async fn peer_clones(self: &Arc<Self>, sender: &str, body: &[u8]) -> ApiResult<CloneResponse> {
        let begin = Instant::now();
        let (request, descriptor) = split(body)?;
        if request.origin != sender {
            return Err(ApiError::new(
                ErrorCode::Forbidden,
                format!("Host '{sender}' speaks for host '{}'", request.origin),
            ));
        }
        let descriptor = Descriptor::decode(descriptor).map_err(|e| bad_descriptor(&e))?;
        let daemon = self.clone();
        to_the_end(async move {
            let call = request.lease.clone().unwrap_or_default();
            let made = daemon.import_and_make(request, descriptor, &call, begin).await;
            if made.is_err() {
                daemon.drop_starting(&call).await;
            }
            made
        })
        .await
    }

    async fn import_and_make(
        self: &Arc<Self>,
        request: PeerCloneRequest,
        descriptor: Descriptor,
        call: &str,
        begin: Instant,
    ) -> ApiResult<CloneResponse> {
        let mut clock = Clock::new(begin);
        check_ttl(request.ttl_s)?;
        let spec: MachineSpec = serde_json::from_slice(&descriptor.spec_json).map_err(|e| {
            ApiError::new(ErrorCode::VersionMismatch, format!("The checkpoint's machine is not understood: {e}"))
        })?;
        let own = self.accel().await;
        if backend::accel_kind(spec.accel) != backend::accel_kind(own) && spec.accel == ramet_vmm::Accel::Kvm {
            return Err(ApiError::new(
                ErrorCode::VersionMismatch,
                format!("The checkpoint was taken under KVM, which host '{}' can't use", self.config.name),
            )
            .remedy("see `ramet doctor` there, or boot the parent with --accel tcg"));
        }
        let image = descriptor.checkpoint;
        let record = CheckpointRecord {
            id: image,
            note: None,
            origin: Some(request.origin.clone()),
            family: descriptor.family,
            vm: descriptor.parent_vm,
            vm_name: descriptor.name_hint.clone(),
            base: None,
            generation: descriptor.generation,
            image: request.image.clone(),
            guest: descriptor.guest_kind.clone(),
            spec,
            layers: layers_of(&descriptor)?,
            created_unix_ms: now_unix_ms(),
            state_bytes: descriptor.device_state.len() as u64,
            pause_us: 0,
            peers: Vec::new(),
            pending: false,
            disk: None,
            frozen: request.frozen,
            joined: Vec::new(),
            agent: request.agent,
            boot: request.boot.clone(),
        };
        if record.spec.disk.is_some() != request.disk.is_some() || (record.spec.nics > 0) != request.network.is_some() {
            return Err(ApiError::new(ErrorCode::BadRequest, "The checkpoint's machine and its parts don't fit"));
        }
        if request.network.is_some() {
            self.check_tunnel(&request.origin)?;
        }
        let nics = request.clones.iter().map(|c| c.nic.map(|n| self.given_member(n)).transpose());
        let nics: Vec<_> = nics.collect::<ApiResult<_>>()?;
        let parent = Parent::of_checkpoint(&record);
        let host = || self.config.name.clone();
        let planned: Vec<_> = request
            .clones
            .iter()
            .zip(nics)
            .map(|(c, nic)| Planned {
                number: c.clone_number,
                name: c.name.clone(),
                host: host(),
                nic,
                joined: Vec::new(),
            })
            .collect();
        let terms = Terms {
            ttl_s: request.ttl_s,
            lease: Some(call.to_owned()),
            wait_agent: Duration::from_secs(request.wait_agent_s),
            options: request.options.clone(),
        };
        let limits = &self.config.limits;
        if planned.len() > limits.clones_per_call as usize || record.generation >= limits.depth {
            return Err(ApiError::new(
                ErrorCode::LimitReached,
                format!(
                    "{} clones of generation {} are over the limits of host '{}' ({} in a call, generation {})",
                    planned.len(),
                    u64::from(record.generation) + 1,
                    self.config.name,
                    limits.clones_per_call,
                    limits.depth
                ),
            )
            .remedy("ask for fewer, or start rametd there with higher limits"));
        }
        // With the clones on record the image stays, whatever ends meanwhile.
        self.store.update(|s| {
            // Under the state's lock: a lease that ends later finds these clones.
            self.leases.check(Some(call))?;
            let mut names = BTreeSet::new();
            for clone in &planned {
                check_vm_name(&clone.name)?;
                check_free(s, &clone.name, &self.config.name)?;
                if !names.insert(&clone.name) {
                    return Err(ApiError::new(
                        ErrorCode::NameTaken,
                        format!("The name '{}' is given twice", clone.name),
                    ));
                }
            }
            s.checkpoints.entry(image).or_insert_with(|| record.clone());
            if let Some(network) = &request.network {
                self.take_network(s, record.family, network)?;
            }
            reserve(s, &parent, &planned, image, &terms, call);
            ApiResult::Ok(())
        })?;
        self.check_share(&parent, planned.len())?;
        let import = async {
            let Some(offer) = &request.disk else { return ApiResult::Ok(record.clone()) };
            let disk = Some(self.import_disk(record.family, offer).await?);
            self.store.amend(|s| {
                if let Some(checkpoint) = s.checkpoints.get_mut(&image) {
                    checkpoint.disk.clone_from(&disk);
                }
            });
            if let Some(origin) = disk.as_ref().and_then(|d| d.origin.as_ref()) {
                self.overlay_settled(origin.disk);
            }
            Ok(CheckpointRecord { disk, ..record.clone() })
        };
        let network = async {
            if request.network.is_some() {
                self.ready_network(record.family).await?;
                self.apply_members(record.family).await?;
            }
            ApiResult::Ok(())
        };
        let (memory, with_disk, network) = tokio::join!(self.import(&record, &descriptor), import, network);
        memory?;
        network?;
        let record = with_disk?;
        // Not ready when it was sent, or not to be used: asked for behind the clones' backs.
        if descriptor.colors.is_empty() || self.keep_colors(&record, &descriptor.colors).is_err() {
            self.color_behind(image);
        }
        clock.lap("import");
        let import = clock.timeline();
        let new = self.reserved(call, &planned);
        let state = Arc::new(descriptor.device_state);
        let made = self.make_here(&record, state, new, &terms, begin).await;
        let made = made.map_err(|errors| {
            errors.into_iter().next().unwrap_or_else(|| ApiError::internal("A clone did not come up"))
        })?;
        let clones = made.into_iter().map(LocalClone::into_result).map(|mut clone| {
            clone.timeline.phases.splice(0..0, import.phases.iter().cloned());
            clone
        });
        Ok(CloneResponse { checkpoint: image, clones: clones.collect(), total_us: us(begin.elapsed()) })
    }

    /// Has the pager know an image of another host.
    async fn import(&self, record: &CheckpointRecord, descriptor: &Descriptor) -> ApiResult<()> {
        let pager = self.pager(record.family).await?;
        let source = descriptor.page_source.clone().ok_or_else(|| {
            ApiError::new(
                ErrorCode::BadRequest,
                format!("Checkpoint {} is not served to other hosts", record.id.short()),
            )
        })?;
        let spec_path = pager.dir().join(format!("{}-{}.rimg", record.id, ramet_memory::VmId::random().short()));
        let failed = |e: std::io::Error| ApiError::failed(format!("Failed to write {}", spec_path.display()), e);
        fs::write(&spec_path, &descriptor.memory).map_err(failed)?;
        let added = pager
            .control
            .image_add(record.id, &spec_path, SourceAddress { addr: source.addr, name: source.name })
            .await;
        let _ = fs::remove_file(&spec_path);
        added.map_err(|e| pager_failed("The image could not be added", e))
    }

    /// `POST /v1/peer/leases/{lease}/commit`: clones of a fork stay, now that all of it has come up.
    ///
    /// # Errors
    /// When the lease has ended or a clone has died.
    pub async fn peer_commit(self: &Arc<Self>, lease: &str, request: &PeerCommit) -> ApiResult<()> {
        self.leases.check(Some(lease))?;
        let clones: Vec<_> =
            self.store.read(|s| s.vms.values().filter(|vm| vm.of_call(lease)).map(|vm| vm.id).collect());
        let family = self.store.read(|s| s.vms.get(clones.first()?).map(|vm| vm.family));
        if let Some(family) = family.filter(|_| !request.members.is_empty()) {
            self.hear_members(family, &request.members)?;
            self.apply_members(family).await?;
            self.announce(family);
        }
        self.commit_here(lease, clones.len(), request.lease.as_deref(), None)?;
        for id in clones {
            self.arm_ttl(id);
        }
        Ok(())
    }

    /// `DELETE /v1/peer/leases/{lease}`: a fork has failed, and its clones go.
    pub async fn peer_abort(self: &Arc<Self>, lease: &str) {
        let (daemon, lease) = (self.clone(), lease.to_owned());
        let _ = to_the_end(async move {
            daemon.end_lease(&lease).await;
            Ok(())
        })
        .await;
    }

    /// `GET /v1/peer/images/{id}`.
    ///
    /// # Errors
    /// When the id is none.
    pub fn peer_image(&self, id: &str) -> ApiResult<Vec<UserInfo>> {
        Ok(self.peer_image_users(parse_image(id)?))
    }

    /// `DELETE /v1/peer/images/{id}`.
    ///
    /// # Errors
    /// [`ErrorCode::InUse`].
    pub async fn peer_image_drop(self: &Arc<Self>, id: &str) -> ApiResult<()> {
        self.drop_peer_image(parse_image(id)?).await
    }

    // ------------------------------------------------------------------------------------------------------ pool

    /// `POST /v1/pool`: has QEMUs made ready, here and on other hosts.
    ///
    /// # Errors
    /// When there is no such VM, checkpoint or host, or QEMU does not start.
    pub async fn warm(self: &Arc<Self>, request: PoolRequest) -> ApiResult<PoolStatus> {
        let (spec, checkpoint) = match self.find_vm(&request.like) {
            Ok(vm) => (vm.spec, None),
            Err(err) if err.code() == ErrorCode::NotFound => {
                let record = self.find_checkpoint(&request.like)?;
                (record.spec, Some(record.id))
            }
            Err(err) => return Err(err),
        };
        let hosts = if request.hosts.is_empty() { vec![self.config.name.clone()] } else { request.hosts };
        let there = PeerPoolRequest {
            spec: serde_json::to_value(&spec).map_err(|e| ApiError::failed("The machine can't be described", e))?,
            count: request.count,
            wait: request.wait,
        };
        let warmed = all(hosts.into_iter().map(|host| {
            let (daemon, there) = (self.clone(), there.clone());
            async move {
                if host == daemon.config.name {
                    return match checkpoint {
                        Some(image) => daemon.warm_checkpoint(image, there.count, there.wait).await,
                        None => daemon.warm_here(there).await,
                    };
                }
                daemon.peers.client(&host)?.peer_warm(&there).await.map_err(|e| from_peer(&host, e))
            }
        }))
        .await;
        let mut entries = Vec::new();
        for status in warmed {
            entries.extend(status?.entries);
        }
        Ok(PoolStatus { entries })
    }

    /// `POST /v1/peer/pool`.
    ///
    /// # Errors
    /// When the machine is not understood, or QEMU does not start.
    pub async fn warm_here(&self, request: PeerPoolRequest) -> ApiResult<PoolStatus> {
        let spec: MachineSpec = serde_json::from_value(request.spec)
            .map_err(|e| ApiError::new(ErrorCode::BadRequest, format!("The machine is not understood: {e}")))?;
        self.check_vm_limit(request.count)?;
        backend::warm(&self.pool, &spec, request.count, request.wait).await?;
        Ok(PoolStatus { entries: backend::pool_entries(&self.pool, &self.config.name, [spec]) })
    }

    /// `GET /v1/pool`.
    #[must_use]
    pub fn pool_status(&self) -> PoolStatus {
        // Shapes of what is here: nothing else is kept ready for long.
        let mut shapes: Vec<MachineSpec> = self.store.read(|s| {
            s.vms.values().map(|vm| vm.spec.clone()).chain(s.checkpoints.values().map(|c| c.spec.clone())).collect()
        });
        let mut seen = std::collections::HashSet::new();
        shapes.retain(|spec| seen.insert(spec.clone()));
        let mut entries = backend::pool_entries(&self.pool, &self.config.name, shapes);
        entries.extend(self.prepared_entries());
        PoolStatus { entries }
    }
}

fn layers_of(descriptor: &Descriptor) -> ApiResult<Vec<ramet_memory::LayerId>> {
    let spec = ramet_memory::ImageSpec::decode(&descriptor.memory)
        .map_err(|e| ApiError::new(ErrorCode::BadRequest, format!("The checkpoint's memory is not understood: {e}")))?;
    Ok(spec.layers.iter().map(|l| l.id).collect())
}

pub(crate) fn parse_image(id: &str) -> ApiResult<ImageId> {
    id.parse().map_err(|e: ramet_memory::IdError| ApiError::new(ErrorCode::BadRequest, e.to_string()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn body(request: &PeerCloneRequest, descriptor: &[u8]) -> Vec<u8> {
        let json = serde_json::to_vec(request).unwrap();
        let mut body = (json.len() as u32).to_le_bytes().to_vec();
        body.extend(json);
        body.extend(descriptor);
        body
    }

    #[test]
    fn a_request_comes_apart_as_it_was_put_together() {
        let request = PeerCloneRequest {
            origin: "h1".into(),
            clones: vec![],
            image: "default".into(),
            ttl_s: None,
            lease: None,
            wait_agent_s: 1,
            disk: None,
            network: None,
            frozen: false,
            agent: true,
            boot: None,
            options: ramet_client::api::CloneOptions::default(),
        };
        let whole = body(&request, b"descriptor");
        let (back, descriptor) = split(&whole).unwrap();
        assert_eq!((back.origin.as_str(), descriptor), ("h1", b"descriptor".as_slice()));
        for cut in 0..whole.len() - b"descriptor".len() {
            assert_eq!(split(&whole[..cut]).unwrap_err().code(), ErrorCode::BadRequest, "{cut}");
        }
        assert!(split(&[0xff; 64]).is_err(), "a length beyond all bounds");
    }

    #[test]
    fn another_version_is_told_as_such() {
        let err = bad_descriptor(&DescriptorError::Version { found: 9 });
        assert_eq!(err.code(), ErrorCode::VersionMismatch);
        assert!(err.to_string().contains("version 9"), "{err}");
        assert_eq!(bad_descriptor(&Descriptor::decode(b"junk").unwrap_err()).code(), ErrorCode::BadRequest);
    }

    #[test]
    fn the_way_to_another_host_comes_first_in_the_timeline() {
        let vm = serde_json::json!({
            "id": "00000000000000000000000000000001", "name": "c", "host": "h2", "state": "running", "image": "i",
            "guest": "linux", "memory": 1, "cpus": 1, "accel": "tcg", "machine": "pc",
            "family": "00000000000000000000000000000002", "clone_number": 1, "generation": 1, "created_unix_ms": 1,
            "agent": true
        });
        let phase = |name: &str, start_us, duration_us| Phase { name: name.to_owned(), start_us, duration_us };
        let clone = CloneResult {
            vm: serde_json::from_value(vm).unwrap(),
            running_us: 300,
            answered_us: Some(900),
            ready_us: None,
            warm: true,
            prepared: false,
            timeline: ramet_client::api::Timeline { phases: vec![phase("import", 0, 100)], total_us: 900 },
        };
        let shifted = shift(clone, 1000, 50);
        assert_eq!(shifted.timeline.phases, [phase("send", 1000, 50), phase("import", 1050, 100)]);
        assert_eq!((shifted.running_us, shifted.answered_us, shifted.timeline.total_us), (1350, Some(1950), 1950));
    }
}
