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
    collections::BTreeMap,
    sync::Arc,
    time::{Duration, Instant},
};

use ramet_client::api::{
    CloneFailure, CloneRequest, CloneResponse, CloneResult, ErrorCode, ForkRequest, ForkResponse, MemberNumber,
    PeerClone, PeerCommit, PeerDisk, VmState,
};
use ramet_memory::{FamilyId, ImageId};

use crate::{
    daemon::{Daemon, all, to_the_end},
    error::{ApiError, ApiResult, from_peer},
    local::{LocalClone, NewClone},
    plan::{Parent, Plan, Planned, Terms},
    state::{CheckpointRecord, State, VmNic, VmRecord},
    stats::us,
    undo::Undo,
};

/// How long an agent that has never answered may take to do so before a fork.
const LATE_AGENT: Duration = Duration::from_secs(30);

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
    use crate::plan::{
        assign, reserve,
        tests::{hosts, request, state_with},
    };
    use ramet_client::api::CloneOptions;

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
