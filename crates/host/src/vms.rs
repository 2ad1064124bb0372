//! VMs: booting, listing, stopping, removing, watching them die.

use std::{
    fs,
    path::PathBuf,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use ramet_client::api::{
    CloneOptions, Counters, Egress, ErrorCode, MemoryUse, PeerBoot, RemoveVmQuery, RunRequest, StopRequest, Timeline,
    UnreachableHost, VmInfo, VmList, VmState, VmStats,
};
use ramet_guest::host::AgentClient;
use ramet_memory::{FamilyId, VmId};
use ramet_pager::control::{StatsReport, VmReport};
use ramet_vmm::{Boot, VmProcess};

use crate::{
    backend,
    daemon::{Daemon, all, to_the_end, within},
    error::{ApiError, ApiResult},
    memory::{needed_by_root, stored_bytes},
    names::{check_vm_name, default_clone_name, shown},
    peers::ask,
    state::{FamilyRecord, FrozenDisk, Golden, VmDisk, VmRecord, now_unix_ms},
    stats::{Clock, lock},
};

/// How long pagers may take to tell their counters when VMs are listed.
const STATS_WAIT: Duration = Duration::from_millis(500);
/// How long another host may take to list its VMs.
const LIST_WAIT: Duration = Duration::from_secs(3);
/// Longest time to live: ten years.
const MAX_TTL_S: u64 = 10 * 365 * 86400;

/// A VM's process and the daemon's connections to it.
pub struct Running {
    /// The VM.
    pub id: VmId,
    /// Its VMM.
    pub process: Arc<dyn VmProcess>,
    /// Held by whoever checkpoints or stops it, or removes a checkpoint of it: the next one may be taken over that.
    pub busy: Arc<tokio::sync::Mutex<()>>,
    pub(crate) agent: tokio::sync::Mutex<Option<Arc<AgentClient>>>,
    pub(crate) console: Arc<AtomicBool>,
    /// Its end is wanted: no crash.
    pub(crate) ending: AtomicBool,
    /// A checkpoint, or the keeping of its disk, has it stand still.
    pub(crate) paused: AtomicBool,
    pub(crate) timeline: Mutex<Option<Timeline>>,
    /// Its disk's layers are being merged.
    pub(crate) merging: AtomicBool,
    /// How far the keeping of its disk is, which has it stand still.
    pub(crate) keeping: Mutex<Option<String>>,
    /// Why it stands still, when its disk failed.
    pub(crate) disk_trouble: Mutex<Option<String>>,
}

impl std::fmt::Debug for Running {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Running").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Daemon {
    // ------------------------------------------------------------------------------------------------------ run

    /// Boots a VM.
    ///
    /// # Errors
    /// When the request breaks a rule or a limit, the image can't be used, memory is short, or QEMU fails. Nothing is left
    /// then.
    pub async fn run_vm(self: &Arc<Self>, request: RunRequest) -> ApiResult<VmInfo> {
        let daemon = self.clone();
        to_the_end(async move { daemon.run_to_the_end(request).await }).await
    }

    async fn run_to_the_end(self: &Arc<Self>, request: RunRequest) -> ApiResult<VmInfo> {
        self.check_not_draining()?;
        self.check_vm_limit(1)?;
        self.check_shape(&request)?;
        self.leases.check(request.lease.as_deref())?;
        let image = backend::load_image(&self.images, &request.image).await?;
        let accel = match request.accel {
            Some(kind) => backend::accel(kind),
            None => self.accel().await,
        };
        let machine = request.machine.as_deref().unwrap_or(&self.config.machine);
        let mut spec =
            backend::machine_spec(machine, request.memory, request.cpus, accel, request.cpu.clone(), image.tiny);
        let disk = self.root_disk(&request, &image).await?;
        let egress = request.network.clone().unwrap_or(if disk.is_some() { Egress::Nat } else { Egress::Off });
        let egress = crate::nets::egress(&egress)?;
        self.check_network(&request, egress.is_some())?;
        spec.disk = disk.as_ref().map(|d| d.frozen.size);
        spec.volumes = u8::try_from(request.volumes.len()).unwrap_or(u8::MAX);
        spec.nics = u8::from(egress.is_some()).saturating_add(u8::try_from(request.join.len()).unwrap_or(u8::MAX));
        spec.check().map_err(|e| ApiError::new(ErrorCode::BadRequest, e.to_string()))?;
        let id = VmId::random();
        let name = self.reserve_root(id, &request, &image, &spec, disk, egress)?;
        let booted = async {
            self.check_memory(&format!("VM '{name}'"), needed_by_root(request.memory))?;
            let dir = self.config.vms().join(id.to_string());
            fs::create_dir_all(&dir).map_err(|e| ApiError::failed(format!("Failed to make {}", dir.display()), e))?;
            self.store.amend(|s| {
                s.vms.entry(id).and_modify(|vm| vm.dir.clone_from(&dir));
            });
            let cmdline = cmdline(&request, &image);
            let boot = Boot::Kernel { kernel: image.kernel.clone(), initrd: image.initrd.clone(), cmdline };
            let process = self.vmm.launch(&spec, boot, &dir).await;
            let process = process.map_err(|e| ApiError::failed(format!("Failed to start VM '{name}'"), e))?;
            let running = self.adopt(id, Arc::from(process));
            self.give_parts(&running, true, true).await?;
            backend::cont(&running.process).await?;
            self.store.update(|s| -> ApiResult<()> {
                let vm = s.vms.get_mut(&id).ok_or_else(|| ApiError::internal(format!("VM '{name}' was removed")))?;
                vm.state = VmState::Running;
                Ok(())
            })?;
            Ok(running)
        };
        let running = match booted.await {
            Ok(running) => running,
            Err(err) => {
                self.discard(id).await;
                return Err(err);
            }
        };
        self.arm_ttl(id);
        if let Some(lease) = &request.lease
            && !self.leases.is_open(lease)
        {
            self.end_vm(id).await;
            return Err(ApiError::new(ErrorCode::NotFound, "The lease has ended, and the VM with it"));
        }
        tracing::info!(vm = %id, name, "booted");
        self.greet(&running, Duration::from_secs(request.wait_agent_s), &CloneOptions::default()).await;
        self.warm_pool(&spec);
        self.vm_info(&id.to_string()).await
    }

    /// The disk that a request asks for.
    async fn root_disk(&self, request: &RunRequest, image: &backend::BootImage) -> ApiResult<Option<VmDisk>> {
        let named = match &request.disk {
            Some(name) => {
                let other = backend::load_image(&self.images, name).await?;
                Some((name.clone(), other.disk.ok_or_else(|| no_disk(name))?))
            }
            None => image.disk.clone().map(|disk| (request.image.clone(), disk)),
        };
        let mut volumes = Vec::new();
        for name in &request.volumes {
            let volume = backend::load_image(&self.images, name).await?.disk.ok_or_else(|| no_disk(name))?;
            volumes.push(Golden { image: name.clone(), hash: volume.hash });
        }
        let Some((image, disk)) = named else {
            if request.disk_size.is_some() || !volumes.is_empty() {
                return Err(ApiError::new(
                    ErrorCode::BadRequest,
                    format!("Image '{}' has no disk, and --disk names none", shown(&request.image)),
                )
                .remedy("name an image with a disk by --disk; `ramet image build NAME --debian` makes one"));
            }
            return Ok(None);
        };
        let size = request.disk_size.unwrap_or(disk.size);
        if size < disk.size || !size.bytes().is_multiple_of(4096) {
            return Err(ApiError::new(
                ErrorCode::BadRequest,
                format!("The disk of '{image}' has {}, not {size}", disk.size),
            )
            .remedy("--disk-size can only make it larger, by whole pages of 4 KiB"));
        }
        let golden = Golden { image, hash: disk.hash };
        let frozen = FrozenDisk { size, golden, origin: None, layers: Vec::new(), volumes };
        Ok(Some(VmDisk::over(frozen)))
    }

    fn check_network(&self, request: &RunRequest, network: bool) -> ApiResult<()> {
        let without = !request.publish.is_empty() || request.rate.is_some();
        if without && !network {
            return Err(ApiError::new(ErrorCode::BadRequest, "Ports and a rate need a network")
                .remedy("give --network nat, or --network none for one that nothing leaves"));
        }
        if request.publish.iter().any(|p| p.host_port == 0 || p.guest_port == 0) {
            return Err(ApiError::new(ErrorCode::BadRequest, "Port 0 can't be published").remedy("give 1 to 65535"));
        }
        Ok(())
    }

    /// Gives a VM that does not run yet its disk and its network card, both as they are on record. `new`: the overlay that
    /// it writes to is not there yet. `cable`: the card's is plugged in from the beginning.
    pub(crate) async fn give_parts(self: &Arc<Self>, running: &Running, new: bool, cable: bool) -> ApiResult<()> {
        let vm = self.store.read(|s| s.vms.get(&running.id).cloned());
        let vm = vm.ok_or_else(|| ApiError::internal("it was removed while it was made"))?;
        let disk = async {
            match &vm.disk {
                Some(disk) if !new => self.attach_chain(&running.process, vm.family, disk).await,
                Some(disk) => {
                    let attached = self.attach_disk(&running.process, vm.family, disk).await;
                    // It is on record.
                    self.overlay_settled(disk.active);
                    attached
                }
                None => Ok(()),
            }
        };
        let nic = async {
            for (index, (network, nic)) in (0..).zip(vm.nics()) {
                let tap = self.plug(network, &running.process, index, nic, cable).await?;
                self.tap_is(running.id, index, tap);
                self.spare_taps(network);
            }
            match &vm.nic {
                Some(nic) => self.publish(vm.family, nic, &vm.published).await,
                None => Ok(()),
            }
        };
        let (disk, nic) = tokio::join!(disk, nic);
        disk.and(nic)
    }

    /// Puts a VM's tap on record.
    fn tap_is(&self, id: VmId, index: u8, tap: String) {
        self.store.note(|s| {
            let Some(vm) = s.vms.get_mut(&id) else { return };
            let mut nics = vm.nic.iter_mut().chain(vm.joined.iter_mut().map(|j| &mut j.nic));
            if let Some(nic) = nics.nth(index.into()) {
                nic.tap = tap;
            }
        });
    }

    /// Limits that a request must keep.
    fn check_shape(&self, request: &RunRequest) -> ApiResult<()> {
        let limits = &self.config.limits;
        let too = |what: String, remedy: &str| Err(ApiError::new(ErrorCode::LimitReached, what).remedy(remedy));
        let bad = |what: String, remedy: &str| Err(ApiError::new(ErrorCode::BadRequest, what).remedy(remedy));
        if let Some(name) = &request.name {
            check_vm_name(name)?;
        }
        if request.memory > limits.vm_memory {
            return too(
                format!("{} of memory is over this host's limit of {}", request.memory, limits.vm_memory),
                "ask for less, or start rametd with a higher --max-memory",
            );
        }
        if request.memory.bytes() < 16 << 20 || !request.memory.bytes().is_multiple_of(1 << 20) {
            return bad(
                format!("A VM can't have {} of memory", request.memory),
                "give a whole number of MB, at least 16M",
            );
        }
        if request.cpus == 0 {
            return bad("A VM needs a CPU".to_owned(), "give --cpus 1 or more");
        }
        let word = |text: &str, also: &[u8]| {
            text.bytes().all(|b| b.is_ascii_alphanumeric() || b"-_.+=".contains(&b) || also.contains(&b))
                && !text.is_empty()
        };
        // Features of a CPU follow its name after commas, and nothing else can: it is an argument of its own.
        for (what, text, also) in [("machine type", &request.machine, &b""[..]), ("CPU model", &request.cpu, &b","[..])]
        {
            if let Some(text) = text
                && !word(text, also)
            {
                return bad(
                    format!("'{}' is no {what}", shown(text)),
                    "see `qemu-system-x86_64 -machine help` and `-cpu help`",
                );
            }
        }
        check_ttl(request.ttl_s)
    }

    /// Puts a root VM on record, so that its name is taken and a daemon that dies now has it undone.
    fn reserve_root(
        &self,
        id: VmId,
        request: &RunRequest,
        image: &backend::BootImage,
        spec: &ramet_vmm::MachineSpec,
        disk: Option<VmDisk>,
        egress: Option<ramet_net::Egress>,
    ) -> ApiResult<String> {
        let family = FamilyId::random();
        self.store.update(|s| {
            let name = match &request.name {
                Some(name) => name.clone(),
                None => {
                    let taken = s.vms.values().map(|vm| vm.name.clone()).collect();
                    default_clone_name(&request.image, &taken).replacen("-c", "-", 1)
                }
            };
            check_vm_name(&name)?;
            check_free(s, &name, &self.config.name)?;
            let record = VmRecord {
                id,
                name: name.clone(),
                state: VmState::Starting,
                reason: None,
                image: request.image.clone(),
                guest: image.guest.clone(),
                spec: spec.clone(),
                family,
                parent: None,
                checkpoint: None,
                base: None,
                clone_number: 0,
                generation: 0,
                created_unix_ms: now_unix_ms(),
                expires_unix_ms: request.ttl_s.map(|ttl| now_unix_ms() + ttl * 1000),
                lease: request.lease.clone(),
                call: None,
                dir: PathBuf::new(),
                attached: false,
                agent: false,
                disk,
                nic: None,
                published: crate::nets::published(&request.publish),
                joined: self.join_named(s, &request.join)?,
                boot: Some(PeerBoot { cmdline: cmdline(request, image), ..image.files.clone() }),
                rebooting: false,
            };
            s.vms.insert(id, record);
            if let Some(egress) = egress {
                let network = Some(self.new_network(s, egress, request.rate)?);
                s.families.insert(family, FamilyRecord { id: family, network });
                let nic = self.new_member(s, family, &[])?;
                if let Some(vm) = s.vms.get_mut(&id) {
                    vm.nic = Some(nic);
                }
            }
            Ok(name)
        })
    }

    /// Has QEMUs of this shape made ready, now that a VM of it runs and may be forked.
    pub(crate) fn warm_pool(&self, spec: &ramet_vmm::MachineSpec) {
        if self.config.pool > 0 {
            self.pool.warm(spec, self.config.pool as usize);
        }
    }

    // -------------------------------------------------------------------------------------------------- watching

    /// Takes a VMM's process into care: from now on its death is noticed.
    pub(crate) fn adopt(self: &Arc<Self>, id: VmId, process: Arc<dyn VmProcess>) -> Arc<Running> {
        self.adopt_held(id, process, Arc::default())
    }

    /// The same in the place of another process of this VM, which somebody holds by `busy`.
    pub(crate) fn adopt_held(
        self: &Arc<Self>,
        id: VmId,
        process: Arc<dyn VmProcess>,
        busy: Arc<tokio::sync::Mutex<()>>,
    ) -> Arc<Running> {
        let running = Arc::new(Running {
            id,
            process,
            busy,
            agent: tokio::sync::Mutex::default(),
            console: Arc::default(),
            ending: AtomicBool::new(false),
            paused: AtomicBool::new(false),
            timeline: Mutex::default(),
            merging: AtomicBool::new(false),
            keeping: Mutex::default(),
            disk_trouble: Mutex::default(),
        });
        lock(&self.running).insert(id, running.clone());
        if running.process.spec().disk.is_some() || running.process.spec().volumes > 0 {
            tokio::spawn(Self::watch_disk(running.clone()));
        }
        tokio::spawn(self.clone().watch_resets(running.clone()));
        let (daemon, watched) = (self.clone(), running.clone());
        tokio::spawn(async move {
            let exit = watched.process.wait_exit().await;
            if !watched.ending.load(Ordering::Acquire) {
                let (state, reason) = backend::judge_exit(&exit, &watched.process.stderr_tail());
                daemon.died(&watched, state, reason).await;
            }
        });
        running
    }

    /// Holds a VM that runs: none has, or takes, a checkpoint of it, stops it, or boots it anew.
    pub(crate) async fn hold(&self, id: VmId) -> Option<(Arc<Running>, tokio::sync::OwnedMutexGuard<()>)> {
        loop {
            let running = self.running(id)?;
            let held = running.busy.clone().lock_owned().await;
            // It may have got another QEMU meanwhile.
            if self.is_current(&running) {
                return Some((running, held));
            }
        }
    }

    /// Whether this is still the VM's process.
    pub(crate) fn is_current(&self, running: &Running) -> bool {
        self.running(running.id).is_some_and(|now| std::ptr::eq(&*now, running))
    }

    /// Tells a guest that boots anew who it is, for as long as its QEMU lives. One whose QEMU can't boot gets another.
    async fn watch_resets(self: Arc<Self>, running: Arc<Running>) {
        loop {
            tokio::select! {
                () = running.process.reset() => {}
                _ = running.process.wait_exit() => return,
            }
            tracing::info!(vm = %running.id, "the guest boots anew");
            if self.store.read(|s| s.vms.get(&running.id).is_some_and(VmRecord::was_loaded)) {
                return self.boot_anew(running).await;
            }
            let (daemon, running) = (self.clone(), running.clone());
            tokio::spawn(async move { daemon.greet_again(&running).await });
        }
    }

    /// A VM's QEMU has ended by itself.
    async fn died(self: &Arc<Self>, running: &Arc<Running>, state: VmState, reason: String) {
        let id = running.id;
        if state == VmState::Crashed {
            self.stats.count("vm_crashes");
        }
        tracing::warn!(vm = %id, reason, "VM ended");
        let half_made = self.store.read(|s| s.vms.get(&id).is_none_or(|vm| vm.state == VmState::Starting));
        if !half_made {
            self.mark_dead(id, state, Some(reason));
        }
        // A half-made one is undone by whoever makes it; its process and pager state go either way.
        self.release(id).await;
    }

    pub(crate) fn mark_dead(&self, id: VmId, state: VmState, reason: Option<String>) {
        self.store.amend(|s| {
            if let Some(vm) = s.vms.get_mut(&id) {
                vm.state = state;
                vm.reason = reason;
            }
        });
    }

    /// Ends a VM's process if it has one, has the pager forget it, and removes its files. The record stays.
    pub(crate) async fn release(self: &Arc<Self>, id: VmId) {
        let running = lock(&self.running).remove(&id);
        if let Some(running) = running {
            running.ending.store(true, Ordering::Release);
            if let Err(err) = running.process.kill().await {
                tracing::error!(vm = %id, error = %err, "QEMU could not be ended");
            }
        }
        let record = self.store.read(|s| s.vms.get(&id).cloned());
        let Some(record) = record else { return };
        // One that does not answer since this daemon was started is none of `running`.
        if record.dir.starts_with(&self.config.state_dir)
            && let Err(err) = self.vmm.kill(&record.dir).await
        {
            tracing::error!(vm = %id, error = %err, "QEMU could not be ended");
        }
        // Also when it is not on record as attached: a daemon may have died in between.
        if let Some(pager) = self.pagers.get(record.family)
            && let Err(err) = pager.control.detach(id).await
        {
            tracing::warn!(vm = %id, error = %err, "the pager did not let go of a VM");
        }
        if record.dir.starts_with(&self.config.state_dir) {
            let _ = fs::remove_dir_all(&record.dir);
        }
        self.unpublish(record.family, &record.published).await;
        for (network, nic) in record.nics() {
            self.unplug(network, nic).await;
        }
        self.store.amend(|s| {
            if let Some(vm) = s.vms.get_mut(&id) {
                vm.attached = false;
                if vm.alive() && vm.state != VmState::Starting {
                    vm.state = VmState::Stopped;
                }
            }
        });
        if let Some(image) = record.checkpoint {
            self.image_lost_a_user(image);
        }
        if record.disk.is_some() {
            self.sweep_disks(record.family);
        }
        if record.nic.is_some() {
            self.announce(record.family);
        }
        let starting = self.store.read(|s| s.vms.get(&id).is_some_and(VmRecord::alive));
        if !starting {
            self.tidy(record.family).await;
        }
    }

    /// Ends a VM that nothing depends on, such as a half-made one, and forgets it. [`Daemon::end_vm`] is for others.
    pub(crate) async fn discard(self: &Arc<Self>, id: VmId) {
        let Some(family) = self.store.read(|s| s.vms.get(&id).map(|vm| vm.family)) else { return };
        self.release(id).await;
        self.store.amend(|s| {
            s.vms.remove(&id);
        });
        self.tidy(family).await;
    }

    /// Removes the VM when its time ends.
    pub(crate) fn arm_ttl(self: &Arc<Self>, id: VmId) {
        let end = move |d: &Self| d.store.read(|s| s.vms.get(&id)?.expires_unix_ms);
        let Some(expires) = end(self) else { return };
        let daemon = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(expires.saturating_sub(now_unix_ms()))).await;
            if end(&daemon) == Some(expires) {
                tracing::info!(vm = %id, "time to live has ended");
                daemon.end_vm(id).await;
            }
        });
    }

    // -------------------------------------------------------------------------------------------- stop and remove

    /// Shuts a VM down. Its record stays.
    ///
    /// # Errors
    /// [`ErrorCode::NotFound`].
    pub async fn stop_vm(self: &Arc<Self>, wanted: &str, request: &StopRequest) -> ApiResult<VmInfo> {
        let id = self.find_vm(wanted)?.id;
        let (daemon, grace) = (self.clone(), Duration::from_secs(request.grace_s.min(3600)));
        to_the_end(async move {
            daemon.halt(id, grace).await;
            Ok(())
        })
        .await?;
        self.vm_info(&id.to_string()).await
    }

    async fn halt(self: &Arc<Self>, id: VmId, grace: Duration) {
        let (running, _busy) = self.hold(id).await.unzip();
        // Without a process it is ended or half-made, or it does not answer since this daemon was started.
        let state = self.store.read(|s| s.vms.get(&id).filter(|vm| vm.alive()).map(|vm| vm.state));
        if state.is_none() || (running.is_none() && state != Some(VmState::Running)) {
            return;
        }
        self.settle_checkpoints(id).await;
        if let Some(running) = &running {
            running.ending.store(true, Ordering::Release);
            if !grace.is_zero() {
                self.ask_to_shut_down(running, grace).await;
            }
        }
        self.mark_dead(id, VmState::Stopped, None);
        self.release(id).await;
    }

    /// Ends a VM at once and forgets it. Its checkpoints, which others may need, have all their pages first.
    pub(crate) async fn end_vm(self: &Arc<Self>, id: VmId) {
        self.halt(id, Duration::ZERO).await;
        self.discard(id).await;
    }

    /// Removes a VM, once its disk is an image of its own if that is wanted.
    ///
    /// # Errors
    /// [`ErrorCode::NotFound`]; [`ErrorCode::InUse`] when it runs and `force` is not given; when its disk can't be kept.
    pub async fn remove_vm(self: &Arc<Self>, wanted: &str, query: &RemoveVmQuery) -> ApiResult<()> {
        let vm = self.find_vm(wanted)?;
        if let Some(image) = query.keep_disk.clone() {
            let (daemon, force) = (self.clone(), query.force);
            return to_the_end(async move {
                daemon.keep_disk(vm.id, &image, force).await?;
                daemon.end_vm(vm.id).await;
                Ok(())
            })
            .await;
        }
        if vm.alive() && !query.force {
            return Err(ApiError::new(ErrorCode::InUse, format!("VM '{}' runs", vm.name))
                .remedy(format!("`ramet stop {0}` first, or `ramet rm --force {0}`", vm.name)));
        }
        let daemon = self.clone();
        to_the_end(async move {
            daemon.end_vm(vm.id).await;
            Ok(())
        })
        .await
    }

    // ------------------------------------------------------------------------------------------------------ list

    /// All VMs, here or everywhere.
    pub async fn list_vms(self: &Arc<Self>, all_hosts: bool) -> VmList {
        let mut list = VmList { vms: self.vm_infos().await, unreachable: Vec::new() };
        if !all_hosts {
            return list;
        }
        let answers = all(self.peers.others().into_iter().map(|host| {
            let daemon = self.clone();
            async move {
                let answer = daemon.vms_of(&host).await;
                (host, answer)
            }
        }))
        .await;
        for (host, answer) in answers {
            match answer {
                Ok(vms) => list.vms.extend(vms),
                Err(err) => list.unreachable.push(UnreachableHost { host, error: err.to_string() }),
            }
        }
        list
    }

    /// The VMs of another host.
    ///
    /// # Errors
    /// When it is unknown or does not answer.
    pub(crate) async fn vms_of(&self, host: &str) -> ApiResult<Vec<VmInfo>> {
        let client = self.peers.client(host)?;
        Ok(ask(host, LIST_WAIT, client.vms(false)).await?.vms)
    }

    async fn vm_infos(&self) -> Vec<VmInfo> {
        let mut records: Vec<_> = self.store.read(|s| s.vms.values().cloned().collect());
        records.sort_by_key(|vm| (vm.created_unix_ms, vm.clone_number, vm.id));
        let stalls = if records.iter().any(|vm| vm.attached) { self.stalls().await } else { Vec::new() };
        let disks = self.remote_disks(&records).await;
        records
            .iter()
            .map(|vm| {
                let stalled =
                    stalls.iter().find(|(id, family, _)| *id == Some(vm.id) || (id.is_none() && *family == vm.family));
                let stalled = stalled.map(|(_, _, reason)| reason.clone());
                let disk =
                    || vm.disk.as_ref().and_then(|disk| stalled_disk(disks.get(&disk.frozen.origin.as_ref()?.disk)?));
                self.info_of(vm, stalled.or_else(disk))
            })
            .collect()
    }

    /// VMs that wait for pages, with the reason; no id: all VMs of a family whose pager does not answer.
    async fn stalls(&self) -> Vec<(Option<VmId>, FamilyId, String)> {
        let mut stalls = Vec::new();
        for (pager, report) in self.pagers.stats(STATS_WAIT).await {
            match report {
                Ok(report) => {
                    let vms = report.vms.into_iter().filter_map(|vm| Some((Some(vm.vm), pager.family, vm.stalled?)));
                    stalls.extend(vms);
                }
                Err(err) => stalls.push((None, pager.family, err.to_string())),
            }
        }
        stalls
    }

    /// One VM.
    ///
    /// # Errors
    /// [`ErrorCode::NotFound`], [`ErrorCode::Ambiguous`].
    pub async fn vm_info(&self, wanted: &str) -> ApiResult<VmInfo> {
        let record = self.find_vm(wanted)?;
        let stalled = match self.pager_report(&record).await {
            Some(Ok(report)) => report.vms.into_iter().find(|vm| vm.vm == record.id).and_then(|vm| vm.stalled),
            Some(Err(reason)) => Some(reason),
            None => None,
        };
        let disk = self.remote_disk(&record).await;
        Ok(self.info_of(&record, stalled.or_else(|| stalled_disk(&disk?))))
    }

    async fn pager_report(&self, vm: &VmRecord) -> Option<Result<StatsReport, String>> {
        let pager = vm.attached.then(|| self.pagers.get(vm.family)).flatten()?;
        Some(pager.control.stats(STATS_WAIT).await.map_err(|e| e.to_string()))
    }

    pub(crate) fn info_of(&self, vm: &VmRecord, stalled: Option<String>) -> VmInfo {
        let running = self.running(vm.id);
        let paused = running.as_ref().is_some_and(|r| r.paused.load(Ordering::Acquire));
        let stalled = stalled.filter(|_| vm.attached);
        let stalled = stalled.or_else(|| running.as_ref().and_then(|r| lock(&r.disk_trouble).clone()));
        let (state, state_reason) = match (vm.state, stalled) {
            (VmState::Running, Some(reason)) => (VmState::Stalled, Some(reason)),
            // A daemon before this one started it.
            (VmState::Running, _) if running.is_none() => (VmState::Stalled, vm.reason.clone()),
            (VmState::Running, _) if paused => {
                let keeping = running.as_ref().and_then(|r| lock(&r.keeping).clone());
                (VmState::Paused, keeping.or_else(|| Some("a checkpoint is being taken".to_owned())))
            }
            (state, _) => (state, vm.reason.clone()),
        };
        VmInfo {
            id: vm.id,
            name: vm.name.clone(),
            host: self.config.name.clone(),
            state,
            state_reason,
            image: vm.image.clone(),
            guest: vm.guest.clone(),
            memory: vm.spec.memory,
            cpus: vm.spec.cpus,
            accel: backend::accel_kind(vm.spec.accel),
            machine: vm.spec.machine.clone(),
            family: vm.family,
            parent: vm.parent,
            checkpoint: vm.checkpoint,
            clone_number: vm.clone_number,
            generation: vm.generation,
            created_unix_ms: vm.created_unix_ms,
            expires_unix_ms: vm.expires_unix_ms,
            lease: vm.lease.clone(),
            pid: running.map(|r| r.process.pid()),
            agent: vm.agent,
            network: crate::nets::describe(vm),
            disk: vm.disk.as_ref().map(|disk| ramet_client::api::VmDisk {
                image: disk.frozen.golden.image.clone(),
                size: disk.frozen.size,
                layers: u32::try_from(disk.frozen.layers.len()).unwrap_or(u32::MAX),
                written_bytes: stored_bytes(&self.overlay_path(vm.family, disk.active)),
                remote: disk.frozen.origin.is_some(),
            }),
        }
    }

    /// Memory, counters and latencies of a VM.
    ///
    /// # Errors
    /// [`ErrorCode::NotFound`], [`ErrorCode::Ambiguous`].
    pub async fn vm_stats(&self, wanted: &str) -> ApiResult<VmStats> {
        let record = self.find_vm(wanted)?;
        let report = self.pager_report(&record).await;
        let (mut stalled, mut mine) = (None, None);
        match report {
            Some(Ok(report)) => mine = report.vms.into_iter().find(|vm| vm.vm == record.id),
            Some(Err(reason)) => stalled = Some(reason),
            None => {}
        }
        if let Some(vm) = &mine {
            stalled.clone_from(&vm.stalled);
        }
        let disk = self.remote_disk(&record).await;
        let stalled = stalled.or_else(|| stalled_disk(disk.as_ref()?));
        let running = self.running(record.id);
        let memory = match (&mine, &running) {
            (Some(vm), _) => Some(memory_of(vm)),
            (None, Some(running)) => memory_of_process(running).await,
            (None, None) => None,
        };
        Ok(VmStats {
            memory,
            pager: mine.as_ref().map_or_else(Counters::default, crate::metrics::vm_counters),
            timeline: running.and_then(|r| lock(&r.timeline).clone()),
            disk: disk.as_ref().map(|disk| crate::metrics::disk_counters([disk])),
            vm: self.info_of(&record, stalled.clone()),
            stalled,
        })
    }

    /// Keeps a timeline for `ramet stats`, and counts it.
    pub(crate) fn keep_timeline(&self, running: &Running, prefix: &str, clock: Clock) -> Timeline {
        let timeline = clock.timeline();
        self.stats.record_timeline(prefix, &timeline);
        *lock(&running.timeline) = Some(timeline.clone());
        timeline
    }

    /// Ends everything: for a daemon that is told to leave nothing behind.
    pub async fn stop_all(self: &Arc<Self>) {
        self.close_shelf().await;
        self.pool.drain().await;
        let vms: Vec<_> = self.store.read(|s| s.vms.values().filter(|vm| vm.alive()).map(|vm| vm.id).collect());
        let begin = Instant::now();
        let stopped = all(vms.into_iter().map(|id| {
            let daemon = self.clone();
            async move {
                daemon.mark_dead(id, VmState::Stopped, Some("rametd was told to stop all VMs".to_owned()));
                within(Duration::from_secs(20), "Ending a VM", daemon.release(id)).await
            }
        }))
        .await;
        for err in stopped.into_iter().filter_map(Result::err) {
            tracing::error!("{err}");
        }
        for servers in [&self.pagers, &self.disk_servers] {
            for server in servers.all() {
                servers.end(server.family).await;
            }
        }
        self.close_networks().await;
        // Their pages are gone.
        self.store.amend(|s| {
            s.checkpoints.clear();
            s.families.clear();
        });
        self.sweep_lost_disks();
        let _ = fs::remove_dir_all(self.config.checkpoints());
        tracing::info!(ms = begin.elapsed().as_millis(), "all VMs and pagers have ended");
    }
}

/// The command line of a VM that is asked for.
fn cmdline(request: &RunRequest, image: &backend::BootImage) -> String {
    match &request.append {
        Some(more) => format!("{} {more}", image.cmdline),
        None => image.cmdline.clone(),
    }
}

/// Why readers of a disk of another host wait.
fn stalled_disk(disk: &ramet_disk::control::DiskStatus) -> Option<String> {
    disk.stalled.as_ref().map(|stalled| format!("its disk waits for another host: {}", stalled.reason))
}

fn no_disk(image: &str) -> ApiError {
    ApiError::new(ErrorCode::BadRequest, format!("Image '{}' has no disk", shown(image)))
        .remedy("`ramet image ls` shows which have one; `ramet image build NAME --debian` makes one")
}

/// Refuses a name that a VM of this host has, and says which.
pub(crate) fn check_free(state: &crate::state::State, name: &str, host: &str) -> ApiResult<()> {
    let Some(holder) = state.vm_named(name) else { return Ok(()) };
    let what = if holder.alive() { "a VM" } else { "a VM that has ended" };
    Err(ApiError::new(
        ErrorCode::NameTaken,
        format!("The name '{name}' is taken by {what} on host '{host}' ({})", holder.id.short()),
    )
    .remedy(format!("choose another name, or `ramet rm {name}`")))
}

/// Refuses times to live that make no sense.
pub(crate) fn check_ttl(ttl_s: Option<u64>) -> ApiResult<()> {
    match ttl_s {
        Some(ttl) if !(1..=MAX_TTL_S).contains(&ttl) => {
            Err(ApiError::new(ErrorCode::BadRequest, format!("{ttl} s is no time to live"))
                .remedy(format!("give 1 to {MAX_TTL_S}")))
        }
        _ => Ok(()),
    }
}

fn memory_of(vm: &VmReport) -> MemoryUse {
    MemoryUse { ram_pss_bytes: vm.ram_pss_bytes, ram_private_bytes: vm.private_bytes, vmm_pss_bytes: vm.vmm_pss_bytes }
}

/// The same of a VM that no pager serves yet.
async fn memory_of_process(running: &Running) -> Option<MemoryUse> {
    let (pid, socket) = (running.process.pid(), running.process.shim_socket().to_owned());
    let ask = move || -> std::io::Result<MemoryUse> {
        let info = ramet_kernel::shim::ShimClient::connect(&socket)?.info()?;
        let stats = ramet_kernel::mem_stats(pid, info.ram_addr, info.ram_len)?;
        Ok(MemoryUse {
            ram_pss_bytes: stats.ram_pss_bytes,
            ram_private_bytes: stats.private_bytes,
            vmm_pss_bytes: stats.vmm_pss_bytes,
        })
    };
    match tokio::task::spawn_blocking(ask).await {
        Ok(Ok(memory)) => Some(memory),
        Ok(Err(err)) => {
            tracing::warn!(pid, error = %err, "a VM's memory could not be measured");
            None
        }
        Err(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{State, tests::vm};

    #[test]
    fn a_taken_name_names_its_holder() {
        let mut state = State::default();
        let web = vm("web");
        state.vms.insert(web.id, web.clone());
        let err = check_free(&state, "web", "h1").unwrap_err();
        assert_eq!(err.code(), ErrorCode::NameTaken);
        assert!(err.to_string().contains(&web.id.short()) && err.to_string().contains("h1"), "{err}");
        check_free(&state, "web2", "h1").unwrap();
        // The record of a dead VM holds its name until it is removed.
        state.vms.entry(web.id).and_modify(|vm| vm.state = VmState::Crashed);
        assert!(check_free(&state, "web", "h1").unwrap_err().to_string().contains("has ended"));
    }

    #[test]
    fn times_to_live_have_limits() {
        check_ttl(None).unwrap();
        check_ttl(Some(1)).unwrap();
        for bad in [0, MAX_TTL_S + 1, u64::MAX] {
            assert_eq!(check_ttl(Some(bad)).unwrap_err().code(), ErrorCode::BadRequest);
        }
    }
}
