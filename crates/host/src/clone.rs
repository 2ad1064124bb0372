//! Clones and forks: one call, all or nothing, over any number of hosts.
//!
//! ```text
//! plan      names, hosts, limits, leases: everything that can be refused is refused here
//! (fork: checkpoint the parent, which goes on)
//! make      on every host at the same time; on one host all clones load, then all continue, then all answer
//! commit    other hosts first, then this one, in one write of the state: from here on the clones are there
//! ```
//!
//! Until the commit every clone is on record as *starting*, and those on other hosts hang on a lease of this fork. So
//! whatever dies in between - a clone, a daemon, a host - nothing half-made stays anywhere.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::{Duration, Instant},
};

use ramet_client::api::{
    CloneFailure, CloneOptions, CloneRequest, CloneResponse, CloneResult, ErrorCode, ForkRequest, ForkResponse,
    MemberNumber, PeerBoot, PeerClone, PeerCommit, PeerDisk, VmState,
};
use ramet_memory::{FamilyId, ImageId, VmId};

use crate::{
    daemon::{Daemon, all, to_the_end},
    error::{ApiError, ApiResult, from_peer},
    local::{LocalClone, NewClone},
    memory::needed_by_clones,
    names::{check_vm_name, default_clone_name, shown},
    state::{CheckpointRecord, Joined, State, VmNic, VmRecord, now_unix_ms},
    stats::us,
    tunnel,
    undo::Undo,
    vms::{check_free, check_ttl},
};

/// How long an agent that has never answered may take to do so before a fork.
const LATE_AGENT: Duration = Duration::from_secs(30);

/// One clone that is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Planned {
    pub(crate) number: u32,
    pub(crate) name: String,
    pub(crate) host: String,
    /// Its place in the family's network.
    pub(crate) nic: Option<VmNic>,
    /// Its places in networks with a name.
    pub(crate) joined: Vec<Joined>,
}

/// What the clones of one call have in common.
#[derive(Debug, Clone)]
pub(crate) struct Terms {
    pub(crate) ttl_s: Option<u64>,
    pub(crate) lease: Option<String>,
    pub(crate) wait_agent: Duration,
    pub(crate) options: CloneOptions,
}

/// A fork on its way: what was promised where.
#[derive(Debug)]
struct Plan {
    /// The call's own name: its clones carry it until they are committed.
    call: String,
    clones: Vec<Planned>,
    terms: Terms,
    /// Other hosts, each with this fork's lease there.
    leases: BTreeMap<String, ramet_client::Lease>,
}

/// The clone that every host makes of its own share.
type Share = Result<Vec<CloneResult>, Vec<ApiError>>;

impl Daemon {
    /// Clones a checkpoint.
    ///
    /// # Errors
    /// When the request breaks a rule or a limit; [`ErrorCode::ForkFailed`] when a clone does not come up: then all are
    /// undone.
    pub async fn clone_checkpoint(self: &Arc<Self>, wanted: &str, request: CloneRequest) -> ApiResult<CloneResponse> {
        let begin = Instant::now();
        let record = self.find_checkpoint(wanted)?;
        let daemon = self.clone();
        to_the_end(async move {
            let parent = Parent::of_checkpoint(&record);
            let plan = daemon.plan(&parent, &request, record.id).await?;
            let call = plan.call.clone();
            let made = async {
                let state = daemon.device_state(&record)?;
                daemon.make_and_commit(&record, state, plan, begin, None).await
            };
            let clones = match made.await {
                Ok(clones) => clones,
                Err(err) => {
                    daemon.drop_starting(&call).await;
                    daemon.stats.count("forks_failed");
                    return Err(err);
                }
            };
            daemon.stats.count("forks");
            // The next clones of it find theirs loaded.
            let here = clones.iter().filter(|c| c.vm.host == daemon.config.name).count();
            daemon.expect_clones(record.id, here.min(daemon.config.pool as usize));
            Ok(CloneResponse { checkpoint: record.id, clones, total_us: us(begin.elapsed()) })
        })
        .await
    }

    /// Checkpoints a VM and clones the checkpoint.
    ///
    /// # Errors
    /// As [`Daemon::clone_checkpoint`]; the checkpoint is then removed, too. The parent goes on in any case.
    pub async fn fork(self: &Arc<Self>, wanted: &str, request: ForkRequest) -> ApiResult<ForkResponse> {
        let begin = Instant::now();
        let vm = self.find_vm(wanted)?;
        let daemon = self.clone();
        to_the_end(async move {
            let result = daemon.fork_vm(&vm, request, begin).await;
            daemon.stats.count(if result.is_ok() { "forks" } else { "forks_failed" });
            result
        })
        .await
    }

    async fn fork_vm(self: &Arc<Self>, vm: &VmRecord, request: ForkRequest, begin: Instant) -> ApiResult<ForkResponse> {
        let image = ImageId::random();
        let patience = match request.clones.options.allow_unseeded {
            true => crate::guest::GLANCE,
            false => Duration::from_secs(request.clones.wait_agent_s).clamp(crate::guest::CONNECT, LATE_AGENT),
        };
        let agent = self.look_for_agent(vm, patience).await;
        let plan = self.plan(&Parent { agent, ..Parent::of_vm(vm) }, &request.clones, image).await?;
        let mut undo = Undo::new();
        let (daemon, call) = (self.clone(), plan.call.clone());
        undo.push("reserved clones", async move { daemon.drop_starting(&call).await });
        let forked = async {
            let taken = self.take_checkpoint(vm.id, image, request.note, &request.quiesce, true, begin).await?;
            let (daemon, record, call) = (self.clone(), taken.record.clone(), plan.call.clone());
            undo.push("checkpoint", async move {
                // Its clones go before it: their views hold it.
                daemon.drop_starting(&call).await;
                let peers =
                    daemon.store.read(|s| s.checkpoints.get(&image).map(|c| c.peers.clone())).unwrap_or_default();
                if let Err(err) = daemon.drop_checkpoint(&CheckpointRecord { peers, ..record }).await {
                    tracing::error!("A failed fork's checkpoint is left: {err}");
                }
            });
            let clones = self.make_and_commit(&taken.record, taken.state.clone(), plan, begin, Some(image)).await?;
            Ok((taken, clones))
        };
        match forked.await {
            Ok((taken, clones)) => {
                undo.commit();
                let checkpoint = self.info_of_taken(&CheckpointRecord { pending: false, ..taken.record }).await;
                let parent = ramet_client::api::CheckpointResult {
                    checkpoint,
                    pause_us: taken.pause_us,
                    timeline: taken.timeline,
                };
                Ok(ForkResponse { parent, clones, total_us: us(begin.elapsed()) })
            }
            Err(err) => {
                undo.run().await;
                Err(err)
            }
        }
    }

    // ------------------------------------------------------------------------------------------------------ plan

    /// Checks all that can be checked before anything is done, opens leases on the other hosts, and puts the clones of
    /// this host on record as starting.
    async fn plan(self: &Arc<Self>, parent: &Parent, request: &CloneRequest, image: ImageId) -> ApiResult<Plan> {
        self.check_request(parent, request)?;
        let hosts = self.check_hosts(&request.hosts)?;
        if !parent.joined.is_empty() && hosts.iter().any(|host| *host != self.config.name) {
            return Err(ApiError::new(
                ErrorCode::BadRequest,
                format!(
                    "'{}' has joined a network with a name, which is on host '{}' only",
                    parent.name, self.config.name
                ),
            )
            .remedy("clone it on this host, or boot it without --join"));
        }
        let elsewhere: BTreeSet<String> = hosts
            .iter()
            .cycle()
            .take(request.count as usize)
            .filter(|host| **host != self.config.name)
            .cloned()
            .collect();
        let networked = usize::from(parent.spec.nics) > parent.joined.len();
        let asked = all(elsewhere.into_iter().map(|host| {
            let daemon = self.clone();
            async move {
                let client = daemon.peers.client(&host)?;
                let tunnel =
                    async { if networked { daemon.agree_on_tunnel(&host, tunnel::NEEDED).await } else { Ok(()) } };
                let (vms, lease, tunnel) = tokio::join!(daemon.vms_of(&host), client.lease(), tunnel);
                tunnel?;
                let names = vms?.into_iter().map(|vm| (host.clone(), vm.name));
                Ok((names.collect::<Vec<_>>(), host.clone(), lease.map_err(|e| from_peer(&host, e))?))
            }
        }))
        .await;
        let (mut taken, mut leases) = (Vec::new(), BTreeMap::new());
        for answer in asked {
            let (names, host, lease) = answer.map_err(|e: ApiError| e)?;
            taken.extend(names);
            leases.insert(host, lease);
        }
        let terms = Terms {
            ttl_s: request.ttl_s,
            lease: request.lease.clone(),
            wait_agent: Duration::from_secs(request.wait_agent_s),
            options: request.options.clone(),
        };
        let call = VmId::random().to_string();
        let clones = self.store.update(|s| {
            let mut clones = assign(s, parent, request, &hosts, &self.config.name, &taken)?;
            let (mut nics, mut joined) = (Vec::new(), BTreeMap::<FamilyId, Vec<VmNic>>::new());
            for clone in &mut clones {
                if networked {
                    let nic = self.new_member(s, parent.family, &nics)?;
                    nics.push(nic.clone());
                    clone.nic = Some(nic);
                }
                for network in &parent.joined {
                    let taken = joined.entry(*network).or_default();
                    let place = self.join(s, *network, taken)?;
                    taken.push(place.nic.clone());
                    clone.joined.push(place);
                }
            }
            let ours: Vec<_> = clones.iter().filter(|c| c.host == self.config.name).cloned().collect();
            reserve(s, parent, &ours, image, &terms, &call);
            ApiResult::Ok(clones)
        })?;
        let plan = Plan { call, clones, terms, leases };
        let ours = plan.clones.iter().filter(|c| c.host == self.config.name).count();
        if let Err(err) = self.check_share(parent, ours) {
            self.drop_starting(&plan.call).await;
            return Err(err);
        }
        Ok(plan)
    }

    fn check_request(&self, parent: &Parent, request: &CloneRequest) -> ApiResult<()> {
        let limits = &self.config.limits;
        if request.count == 0 {
            return Err(ApiError::new(ErrorCode::BadRequest, "No clones are asked for").remedy("give -n 1 or more"));
        }
        if request.count > limits.clones_per_call {
            return Err(ApiError::new(
                ErrorCode::LimitReached,
                format!("{} clones are over the limit of {} for one call", request.count, limits.clones_per_call),
            )
            .remedy("ask for fewer, or start rametd with a higher --max-clones"));
        }
        if parent.generation >= limits.depth {
            return Err(ApiError::new(
                ErrorCode::LimitReached,
                format!(
                    "Clones of '{}' would be generation {}, over the limit of {}",
                    parent.name,
                    parent.generation + 1,
                    limits.depth
                ),
            )
            .remedy("fork a VM nearer to the root, or start rametd with a higher --max-depth"));
        }
        check_agent(parent, &request.options)?;
        check_ttl(request.ttl_s)?;
        self.leases.check(request.lease.as_deref())
    }

    /// The hosts to run on, every one of them known.
    fn check_hosts(&self, hosts: &[String]) -> ApiResult<Vec<String>> {
        if hosts.is_empty() {
            return Ok(vec![self.config.name.clone()]);
        }
        for host in hosts.iter().filter(|host| **host != self.config.name) {
            self.peers.client(host)?;
        }
        Ok(hosts.to_vec())
    }

    /// Limits of this host for its share of the clones, which is on record already.
    pub(crate) fn check_share(&self, parent: &Parent, count: usize) -> ApiResult<()> {
        if count == 0 {
            return Ok(());
        }
        self.check_not_draining()?;
        self.check_vm_limit(0)?;
        let what = format!("{count} clones of '{}'", parent.name);
        self.check_memory(&what, needed_by_clones(parent.spec.memory, count as u64))
    }

    /// Forgets the clones of a call that were not committed.
    pub(crate) async fn drop_starting(self: &Arc<Self>, call: &str) {
        let starting: Vec<_> =
            self.store.read(|s| s.vms.values().filter(|vm| vm.of_call(call)).map(|vm| vm.id).collect());
        all(starting.into_iter().map(|id| {
            let daemon = self.clone();
            async move { daemon.discard(id).await }
        }))
        .await;
    }

    // -------------------------------------------------------------------------------------------- make and commit

    /// Makes the planned clones, and commits them. On failure everything that was made is undone.
    async fn make_and_commit(
        self: &Arc<Self>,
        record: &CheckpointRecord,
        state: Arc<Vec<u8>>,
        plan: Plan,
        begin: Instant,
        pending: Option<ImageId>,
    ) -> ApiResult<Vec<CloneResult>> {
        let shares = self.make(record, state, &plan, begin).await;
        let failed = shares.values().any(Result::is_err);
        let mut outcome = if failed { Err(failure(&plan.clones, &shares)) } else { Ok(()) };
        if outcome.is_ok() {
            outcome = self.commit(&plan, pending, record.family, &shares).await;
        }
        if let Err(err) = outcome {
            self.take_back(plan, &shares).await;
            return Err(err);
        }
        if !plan.leases.is_empty() {
            self.spread_sources(record.id);
        }
        let mut clones: Vec<CloneResult> = shares.into_values().filter_map(Result::ok).flatten().collect();
        clones.sort_by_key(|c| c.vm.clone_number);
        for clone in &mut clones {
            self.stats.count("clones");
            self.stats.record("clone_running", clone.running_us);
            if let Some(answered) = clone.answered_us {
                self.stats.record("clone_answered", answered);
            }
            if let Some(ready) = clone.ready_us {
                self.stats.record("clone_ready", ready);
            }
            // As it is now: committed.
            if clone.vm.host == self.config.name
                && let Ok(vm) = self.find_vm(&clone.vm.id.to_string())
            {
                clone.vm = self.info_of(&vm, None);
                self.arm_ttl(vm.id);
            } else {
                clone.vm.state = VmState::Running;
                clone.vm.lease.clone_from(&plan.terms.lease);
            }
        }
        Ok(clones)
    }

    /// Every host makes its share, all at the same time.
    async fn make(
        self: &Arc<Self>,
        record: &CheckpointRecord,
        state: Arc<Vec<u8>>,
        plan: &Plan,
        begin: Instant,
    ) -> BTreeMap<String, Share> {
        let mut by_host: BTreeMap<String, Vec<Planned>> = BTreeMap::new();
        for clone in &plan.clones {
            by_host.entry(clone.host.clone()).or_default().push(clone.clone());
        }
        let remote = by_host.keys().any(|host| *host != self.config.name);
        let descriptor = if remote { Some(self.offer(record, &state).await.map(Arc::new)) } else { None };
        let shares = all(by_host.into_iter().map(|(host, clones)| {
            let (daemon, record, state, terms) = (self.clone(), record.clone(), state.clone(), plan.terms.clone());
            let lease = plan.leases.get(&host).map(|lease| lease.id().to_owned());
            let (descriptor, call) = (descriptor.clone(), plan.call.clone());
            async move {
                let share = match (lease, descriptor) {
                    (Some(lease), Some(Ok(descriptor))) => {
                        let order = daemon.order(&record, lease, &clones, &terms, &descriptor.disk);
                        daemon
                            .make_elsewhere(&host, &record, &descriptor.bytes, order, begin)
                            .await
                            .map_err(|e| vec![e])
                    }
                    (Some(_), Some(Err(err))) => Err(vec![err]),
                    _ => {
                        let new = daemon.reserved(&call, &clones);
                        daemon
                            .make_here(&record, state, new, &terms, begin)
                            .await
                            .map(|made| made.into_iter().map(LocalClone::into_result).collect())
                    }
                };
                (host, share)
            }
        }))
        .await;
        shares.into_iter().collect()
    }

    /// The records of planned clones on this host.
    pub(crate) fn reserved(&self, call: &str, clones: &[Planned]) -> Vec<NewClone> {
        self.store.read(|s| {
            let find = |name: &str| s.vms.values().find(|vm| vm.name == name && vm.of_call(call)).map(|vm| vm.id);
            clones.iter().filter_map(|c| Some(NewClone { id: find(&c.name)?, name: c.name.clone() })).collect()
        })
    }

    /// What another host is asked for.
    fn order(
        &self,
        record: &CheckpointRecord,
        lease: String,
        clones: &[Planned],
        terms: &Terms,
        disk: &Option<PeerDisk>,
    ) -> ramet_client::api::PeerCloneRequest {
        let number = |nic: &VmNic| MemberNumber { range: nic.range, index: nic.index };
        ramet_client::api::PeerCloneRequest {
            origin: self.config.name.clone(),
            clones: clones
                .iter()
                .map(|c| PeerClone { clone_number: c.number, name: c.name.clone(), nic: c.nic.as_ref().map(number) })
                .collect(),
            image: record.image.clone(),
            ttl_s: terms.ttl_s,
            lease: Some(lease),
            wait_agent_s: terms.wait_agent.as_secs(),
            disk: disk.clone(),
            network: self.offer_network(record.family),
            frozen: record.frozen,
            agent: record.agent,
            boot: record.boot.clone(),
            options: terms.options.clone(),
        }
    }

    async fn make_elsewhere(
        self: &Arc<Self>,
        host: &str,
        record: &CheckpointRecord,
        descriptor: &[u8],
        order: ramet_client::api::PeerCloneRequest,
        begin: Instant,
    ) -> ApiResult<Vec<CloneResult>> {
        // First on record: whoever wants to remove the checkpoint asks that host from now on.
        self.store.amend(|s| {
            if let Some(c) = s.checkpoints.get_mut(&record.id)
                && !c.peers.iter().any(|h| h == host)
            {
                c.peers.push(host.to_owned());
            }
        });
        let before_us = us(begin.elapsed());
        let sent = Instant::now();
        let response =
            self.peers.client(host)?.peer_clones(&order, descriptor).await.map_err(|e| from_peer(host, e))?;
        // What the other host did not account for was the way there and back.
        let way_us = us(sent.elapsed()).saturating_sub(response.total_us);
        Ok(response.clones.into_iter().map(|clone| crate::remote::shift(clone, before_us, way_us)).collect())
    }

    /// Makes the clones stay: on the other hosts, then here, in one write.
    async fn commit(
        self: &Arc<Self>,
        plan: &Plan,
        pending: Option<ImageId>,
        family: FamilyId,
        shares: &BTreeMap<String, Share>,
    ) -> ApiResult<()> {
        let leases: Vec<_> = plan.leases.iter().map(|(host, lease)| (host.clone(), lease.id().to_owned())).collect();
        let members = self.members_after(plan, family, shares).await?;
        for (host, lease) in leases {
            let theirs = match &plan.terms.lease {
                Some(ours) => Some(self.lease_on(ours, &host).await?),
                None => None,
            };
            let client = self.peers.client(&host)?;
            client
                .peer_commit(&lease, &PeerCommit { lease: theirs, members: members.clone() })
                .await
                .map_err(|e| from_peer(&host, e))?;
        }
        let ours = plan.clones.iter().filter(|c| c.host == self.config.name).count();
        self.commit_here(&plan.call, ours, plan.terms.lease.as_deref(), pending)?;
        self.announce(family);
        Ok(())
    }

    /// The family's members by host once the clones stay: those that a host had, and its new ones.
    async fn members_after(
        self: &Arc<Self>,
        plan: &Plan,
        family: FamilyId,
        shares: &BTreeMap<String, Share>,
    ) -> ApiResult<BTreeMap<String, Vec<MemberNumber>>> {
        let mut members = self.all_members(family);
        if members.is_empty() {
            return Ok(members);
        }
        for (host, share) in shares.iter().filter(|(host, _)| **host != self.config.name) {
            let list = members.entry(host.clone()).or_default();
            let made = share.as_ref().map_or(0, Vec::len);
            let planned = plan.clones.iter().filter(|c| c.host == *host).filter_map(|c| c.nic.as_ref());
            for nic in planned.take(made) {
                let number = MemberNumber { range: nic.range, index: nic.index };
                if !list.contains(&number) {
                    list.push(number);
                }
            }
        }
        self.hear_members(family, &members)?;
        self.apply_members(family).await?;
        Ok(members)
    }

    /// Makes the starting clones of a call stay, and the pending checkpoint with them.
    pub(crate) fn commit_here(
        &self,
        call: &str,
        count: usize,
        lease: Option<&str>,
        pending: Option<ImageId>,
    ) -> ApiResult<()> {
        self.store.update(|s| {
            // Under the state's lock: a lease that ends now finds these VMs running, and removes them.
            self.leases
                .check(lease)
                .map_err(|_| ApiError::new(ErrorCode::ForkFailed, "The caller has gone away, and its lease with it"))?;
            commit_clones(s, call, count, lease)?;
            if let Some(checkpoint) = pending.and_then(|id| s.checkpoints.get_mut(&id)) {
                checkpoint.pending = false;
            }
            Ok(())
        })
    }

    /// Undoes what hosts have made.
    async fn take_back(self: &Arc<Self>, plan: Plan, shares: &BTreeMap<String, Share>) {
        let call = plan.call;
        let aborted = all(plan.leases.into_iter().map(|(host, lease)| {
            let (daemon, made) =
                (self.clone(), shares.get(&host).and_then(|s| s.as_ref().ok()).cloned().unwrap_or_default());
            async move {
                if let Ok(client) = daemon.peers.client(&host) {
                    let _ = tokio::time::timeout(Duration::from_secs(10), client.peer_abort(lease.id())).await;
                    // Had that host committed already, the lease holds nothing any more.
                    for clone in made {
                        let id = clone.vm.id.to_string();
                        let _ = tokio::time::timeout(Duration::from_secs(10), client.remove_vm(&id, true)).await;
                    }
                }
                drop(lease);
            }
        }));
        tokio::join!(aborted, self.drop_starting(&call));
    }
}

/// What clones take from their parent.
#[derive(Debug, Clone)]
pub(crate) struct Parent {
    pub(crate) id: VmId,
    pub(crate) name: String,
    pub(crate) generation: u32,
    pub(crate) image: String,
    pub(crate) guest: String,
    pub(crate) spec: ramet_vmm::MachineSpec,
    pub(crate) family: ramet_memory::FamilyId,
    /// Networks with a name that it has joined.
    pub(crate) joined: Vec<FamilyId>,
    pub(crate) boot: Option<PeerBoot>,
    /// Its agent has answered.
    pub(crate) agent: bool,
}

impl Parent {
    pub(crate) fn of_vm(vm: &VmRecord) -> Self {
        Self {
            id: vm.id,
            name: vm.name.clone(),
            generation: vm.generation,
            image: vm.image.clone(),
            guest: vm.guest.clone(),
            spec: vm.spec.clone(),
            family: vm.family,
            joined: vm.joined.iter().map(|j| j.network).collect(),
            boot: vm.boot.clone(),
            agent: vm.agent,
        }
    }

    pub(crate) fn of_checkpoint(record: &CheckpointRecord) -> Self {
        Self {
            id: record.vm,
            name: record.vm_name.clone(),
            generation: record.generation,
            image: record.image.clone(),
            guest: record.guest.clone(),
            spec: record.spec.clone(),
            family: record.family,
            joined: record.joined.clone(),
            boot: record.boot.clone(),
            agent: record.agent,
        }
    }
}

/// Refuses clones of a guest in which nobody can confirm that they are machines of their own.
fn check_agent(parent: &Parent, options: &CloneOptions) -> ApiResult<()> {
    if parent.agent || parent.guest != "linux" || options.allow_unseeded {
        return Ok(());
    }
    Err(ApiError::new(
        ErrorCode::AgentSilent,
        format!(
            "The agent of '{}' has not answered: its clones could not confirm that their random numbers are their own",
            parent.name
        ),
    )
    .remedy(
        "wait until it has booted, or install ramet-agent in it; --allow-unseeded makes clones without an agent, which get \
         their addresses by DHCP",
    ))
}

/// Gives every clone its number, name and host. `taken`: names on other hosts.
fn assign(
    state: &State,
    parent: &Parent,
    request: &CloneRequest,
    hosts: &[String],
    this: &str,
    taken: &[(String, String)],
) -> ApiResult<Vec<Planned>> {
    if request.names.len() > request.count as usize {
        return Err(ApiError::new(
            ErrorCode::BadRequest,
            format!("{} names for {} clones", request.names.len(), request.count),
        )
        .remedy("give at most as many names as clones"));
    }
    let mut used: BTreeSet<String> = BTreeSet::new();
    let mut avoid: BTreeSet<String> = state.vms.values().map(|vm| vm.name.clone()).collect();
    avoid.extend(taken.iter().map(|(_, name)| name.clone()));
    avoid.extend(request.names.iter().cloned());
    let mut clones = Vec::new();
    for (number, host) in (1..=request.count).zip(hosts.iter().cycle()) {
        let name = match request.names.get(number as usize - 1) {
            Some(name) => {
                check_vm_name(name)?;
                if host == this {
                    check_free(state, name, this)?;
                } else if taken.iter().any(|(h, n)| h == host && n == name) {
                    return Err(ApiError::new(
                        ErrorCode::NameTaken,
                        format!("The name '{name}' is taken by a VM on host '{host}'"),
                    )
                    .remedy(format!("choose another name, or `ramet --host {host} rm {name}`")));
                }
                if !used.insert(name.clone()) {
                    return Err(ApiError::new(
                        ErrorCode::NameTaken,
                        format!("The name '{}' is given twice", shown(name)),
                    )
                    .remedy("give every clone a name of its own"));
                }
                name.clone()
            }
            None => default_clone_name(&parent.name, &avoid),
        };
        avoid.insert(name.clone());
        clones.push(Planned { number, name, host: host.clone(), nic: None, joined: Vec::new() });
    }
    Ok(clones)
}

/// Puts clones on record as starting.
pub(crate) fn reserve(
    state: &mut State,
    parent: &Parent,
    clones: &[Planned],
    image: ImageId,
    terms: &Terms,
    call: &str,
) {
    for clone in clones {
        let id = VmId::random();
        let record = VmRecord {
            id,
            name: clone.name.clone(),
            state: VmState::Starting,
            reason: None,
            image: parent.image.clone(),
            guest: parent.guest.clone(),
            spec: parent.spec.clone(),
            family: parent.family,
            parent: Some(parent.id),
            checkpoint: Some(image),
            base: Some(image),
            clone_number: clone.number,
            generation: parent.generation + 1,
            created_unix_ms: now_unix_ms(),
            expires_unix_ms: terms.ttl_s.map(|ttl| now_unix_ms() + ttl * 1000),
            lease: terms.lease.clone(),
            call: Some(call.to_owned()),
            dir: std::path::PathBuf::new(),
            attached: false,
            agent: false,
            disk: None,
            nic: clone.nic.clone(),
            published: Vec::new(),
            joined: clone.joined.clone(),
            boot: parent.boot.clone(),
            rebooting: false,
        };
        state.vms.insert(id, record);
    }
}

/// Makes the `count` starting clones of a call run for good, with this lease.
fn commit_clones(state: &mut State, call: &str, count: usize, lease: Option<&str>) -> ApiResult<()> {
    let mut found = 0;
    for vm in state.vms.values_mut().filter(|vm| vm.of_call(call)) {
        vm.state = VmState::Running;
        vm.call = None;
        vm.lease = lease.map(str::to_owned);
        found += 1;
    }
    if found == count {
        return Ok(());
    }
    Err(ApiError::new(
        ErrorCode::ForkFailed,
        format!("{} of {count} clones died before all had come up", count.abs_diff(found)),
    ))
}

/// The error of a fork: one message, and what became of each clone.
fn failure(plan: &[Planned], shares: &BTreeMap<String, Share>) -> ApiError {
    let first = |host: &str| match shares.get(host) {
        Some(Err(errors)) => errors.first().map(ToString::to_string),
        _ => None,
    };
    let mut errors = shares.values().filter_map(|s| s.as_ref().err()).flatten();
    let (code, message, remedy) = match errors.next() {
        // A single cause, such as a name taken on another host, keeps its own code.
        Some(err) if errors.next().is_none() && err.code() != ErrorCode::Internal => {
            (err.code(), err.body().message.clone(), err.body().remedy.clone())
        }
        Some(err) => (ErrorCode::ForkFailed, err.body().message.clone(), err.body().remedy.clone()),
        None => (ErrorCode::ForkFailed, "A clone did not come up".to_owned(), None),
    };
    let clones = plan
        .iter()
        .map(|c| CloneFailure {
            clone_number: c.number,
            name: c.name.clone(),
            host: c.host.clone(),
            error: first(&c.host),
        })
        .collect();
    let error = ApiError::new(code, format!("The fork failed and was undone: {message}")).clones(clones);
    match remedy {
        Some(remedy) => error.remedy(remedy),
        None => error,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::tests::vm;

    fn request(count: u32, names: &[&str]) -> CloneRequest {
        CloneRequest { names: names.iter().map(|&n| n.to_owned()).collect(), ..CloneRequest::new(count) }
    }

    fn hosts(names: &[&str]) -> Vec<String> {
        names.iter().map(|&n| n.to_owned()).collect()
    }

    fn state_with(names: &[&str]) -> (State, Parent) {
        let mut state = State::default();
        for name in names {
            let vm = vm(name);
            state.vms.insert(vm.id, vm);
        }
        (state, Parent::of_vm(&vm("web")))
    }

    #[test]
    fn clones_go_around_the_hosts_and_get_free_names() {
        let (state, parent) = state_with(&["web", "web-c1"]);
        let taken = [("h2".to_owned(), "web-c3".to_owned())];
        let plan = assign(&state, &parent, &request(5, &["mine"]), &hosts(&["h1", "h2"]), "h1", &taken).unwrap();
        let told: Vec<_> = plan.iter().map(|c| (c.number, c.name.as_str(), c.host.as_str())).collect();
        let expected =
            [(1, "mine", "h1"), (2, "web-c2", "h2"), (3, "web-c4", "h1"), (4, "web-c5", "h2"), (5, "web-c6", "h1")];
        assert_eq!(told, expected);
    }

    #[test]
    fn taken_double_and_bad_names_are_refused_before_anything_is_done() {
        let (state, parent) = state_with(&["web", "db"]);
        let taken = [("h2".to_owned(), "cache".to_owned())];
        let plan = |names: &[&str]| assign(&state, &parent, &request(2, names), &hosts(&["h1", "h2"]), "h1", &taken);
        assert!(plan(&["db"]).unwrap_err().to_string().contains("on host 'h1'"));
        let err = plan(&["a", "cache"]).unwrap_err();
        assert!(err.code() == ErrorCode::NameTaken && err.to_string().contains("on host 'h2'"), "{err}");
        assert!(plan(&["cache", "b"]).is_ok(), "names are unique on a host, not over all");
        assert_eq!(plan(&["a", "a"]).unwrap_err().code(), ErrorCode::NameTaken);
        assert_eq!(plan(&["a b"]).unwrap_err().code(), ErrorCode::BadName);
        assert_eq!(plan(&["a", "b", "c"]).unwrap_err().code(), ErrorCode::BadRequest);
    }

    #[test]
    fn a_default_name_is_never_one_that_is_given_to_a_sibling() {
        let (state, parent) = state_with(&["web"]);
        let mut wish = request(2, &[]);
        wish.names = vec!["web-c1".to_owned()];
        let plan = assign(&state, &parent, &wish, &hosts(&["h1"]), "h1", &[]).unwrap();
        assert_eq!(plan[1].name, "web-c2");
    }

    #[test]
    fn clones_that_nobody_can_confirm_are_refused_unless_they_are_wanted() {
        let (_, known) = state_with(&[]);
        let silent = Parent { agent: false, guest: "linux".to_owned(), ..known };
        let err = check_agent(&silent, &CloneOptions::default()).unwrap_err();
        assert_eq!(err.code(), ErrorCode::AgentSilent);
        assert!(err.to_string().contains("--allow-unseeded"), "{err}");
        check_agent(&silent, &CloneOptions { allow_unseeded: true, ..CloneOptions::default() }).unwrap();
        check_agent(&Parent { agent: true, ..silent.clone() }, &CloneOptions::default()).unwrap();
        check_agent(&Parent { guest: "tiny".to_owned(), ..silent }, &CloneOptions::default()).unwrap();
    }

    #[test]
    fn all_clones_are_committed_or_none() {
        let (mut state, parent) = state_with(&["web"]);
        let image = ImageId::random();
        let terms = Terms {
            ttl_s: None,
            lease: Some("fork".to_owned()),
            wait_agent: Duration::ZERO,
            options: CloneOptions::default(),
        };
        let plan = assign(&state, &parent, &request(2, &[]), &hosts(&["h1"]), "h1", &[]).unwrap();
        reserve(&mut state, &parent, &plan, image, &terms, "this");
        // Another call's clones of the same checkpoint are none of ours.
        let other = assign(&state, &parent, &request(1, &[]), &hosts(&["h1"]), "h1", &[]).unwrap();
        reserve(&mut state, &parent, &other, image, &terms, "other");
        assert_eq!(state.views(image).count(), 3);
        assert!(state.views(image).all(|vm| vm.state == VmState::Starting && vm.generation == 1));

        let err = commit_clones(&mut state.clone(), "this", 3, None).unwrap_err();
        assert!(err.to_string().contains("1 of 3"), "{err}");
        commit_clones(&mut state, "this", 2, None).unwrap();
        let (run, starting): (Vec<_>, Vec<_>) = state.views(image).partition(|vm| vm.state == VmState::Running);
        assert!(run.len() == 2 && run.iter().all(|vm| vm.lease.is_none() && vm.call.is_none()));
        assert!(starting.len() == 1 && starting[0].of_call("other"));
    }

    #[test]
    fn a_failed_fork_tells_of_each_clone() {
        let clone = |number, host: &str| Planned {
            number,
            name: format!("c{number}"),
            host: host.to_owned(),
            nic: None,
            joined: Vec::new(),
        };
        let plan = [clone(1, "h1"), clone(2, "h2")];
        let taken = ApiError::new(ErrorCode::NameTaken, "host 'h2': taken").remedy("another");
        let shares = BTreeMap::from([("h1".to_owned(), Ok(Vec::new())), ("h2".to_owned(), Err(vec![taken]))]);
        let err = failure(&plan, &shares);
        assert_eq!(err.code(), ErrorCode::NameTaken);
        assert_eq!(err.body().remedy.as_deref(), Some("another"));
        let told: Vec<_> = err.body().clones.iter().map(|c| c.error.is_some()).collect();
        assert_eq!(told, [false, true], "the sibling came up, and was undone");
    }
}
