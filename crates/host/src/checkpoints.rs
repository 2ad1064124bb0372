//! Checkpoints: taking one of a running VM, showing them, removing them.

use std::{
    fs,
    path::PathBuf,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

use ramet_client::api::{
    CheckpointInfo, CheckpointRequest, CheckpointResult, ErrorCode, LayerInfo, Quiesce, Timeline, UserInfo, VmState,
};
use ramet_disk::DiskId;
use ramet_memory::{ByteSize, ImageId, LayerId, PageCount, VmId};
use ramet_pager::control::{ImageReport, View};

use crate::{
    backend,
    daemon::{Daemon, all, to_the_end},
    disks::NextOverlay,
    error::{ApiError, ApiResult},
    memory,
    pagers::{Pager, PagerError},
    peers::ask,
    state::{CheckpointRecord, State, VmRecord, now_unix_ms},
    stats::{Clock, us},
    vms::Running,
};

/// How long another host may take to say who uses an image there.
const ASK_WAIT: Duration = Duration::from_secs(3);
/// How long the copy of another host's image stays when its last user has gone.
const LINGER: Duration = Duration::from_secs(60);

/// What helps when a pager went away.
const AGAIN: &str = "try again: a pager that dies is followed by another";

/// A checkpoint that was just taken.
#[derive(Debug, Clone)]
pub struct Taken {
    /// Its record.
    pub record: CheckpointRecord,
    /// The devices' state.
    pub state: Arc<Vec<u8>>,
    /// The parent's pause.
    pub pause_us: u64,
    /// The parent's phases.
    pub timeline: Timeline,
}

/// A pager's refusal as the API tells it.
pub(crate) fn pager_failed(what: &str, err: PagerError) -> ApiError {
    let code = match err.code() {
        Some("in_use") => ErrorCode::InUse,
        Some("no_such_image") => ErrorCode::NotFound,
        Some("state") => ErrorCode::WrongState,
        _ => ErrorCode::Internal,
    };
    let away = matches!(err, PagerError::Unreachable { .. } | PagerError::Lost { .. });
    let error = ApiError::new(code, format!("{what}: {err}"));
    if away { error.remedy(AGAIN) } else { error }
}

impl Daemon {
    // ---------------------------------------------------------------------------------------------------- taking

    /// Checkpoints a VM, which goes on.
    ///
    /// # Errors
    /// When the VM does not run or something fails; the VM goes on then, too, and nothing is left of the checkpoint.
    pub async fn checkpoint(self: &Arc<Self>, wanted: &str, request: CheckpointRequest) -> ApiResult<CheckpointResult> {
        let begin = Instant::now();
        let vm = self.find_vm(wanted)?;
        let daemon = self.clone();
        let taken = to_the_end(async move {
            daemon.look_for_agent(&vm, crate::guest::GLANCE).await;
            let (image, quiesce) = (ImageId::random(), request.quiesce);
            daemon.take_checkpoint(vm.id, image, request.note, &quiesce, false, begin).await
        })
        .await?;
        if request.wait {
            self.wait_complete(&taken.record).await?;
        }
        let checkpoint = self.info_of_taken(&taken.record).await;
        Ok(CheckpointResult { checkpoint, pause_us: taken.pause_us, timeline: taken.timeline })
    }

    /// Takes a checkpoint named `image`. `pending`: it belongs to a fork that may yet fail.
    pub(crate) async fn take_checkpoint(
        self: &Arc<Self>,
        id: VmId,
        image: ImageId,
        note: Option<String>,
        quiesce: &Quiesce,
        pending: bool,
        begin: Instant,
    ) -> ApiResult<Taken> {
        let find = |d: &Self| d.store.read(|s| s.vms.get(&id).cloned());
        let gone = || ApiError::new(ErrorCode::NotFound, format!("VM {id} has gone"));
        let Some((running, _busy)) = self.hold(id).await else {
            return Err(match find(self) {
                Some(vm) => not_running(&vm),
                None => gone(),
            });
        };
        let mut clock = Clock::new(begin);
        let vm = find(self).ok_or_else(gone)?;
        if vm.state != VmState::Running {
            return Err(not_running(&vm));
        }
        let what = format!("Failed to checkpoint VM '{}'", vm.name);
        if self.quiesce(&running, &vm, quiesce).await.map_err(|e| e.context(&what))? {
            clock.lap("quiesce");
        }
        let pager = self.pager(vm.family).await?;
        if !vm.attached {
            self.attach(&running, &vm, &pager, View::Anonymous).await.map_err(|e| e.context(&what))?;
            clock.lap("attach");
        }
        let prepared = pager.control.checkpoint_prepare(id, image, LayerId::random()).await;
        let prepared = match prepared {
            Ok(prepared) => prepared,
            Err(err) => {
                let _ = pager.control.checkpoint_abort(id).await;
                return Err(pager_failed(&what, err));
            }
        };
        clock.lap("prepare");
        if let Err(err) = self.check_room(&vm, PageCount(prepared.candidate_pages).size()) {
            let _ = pager.control.checkpoint_abort(id).await;
            return Err(err);
        }
        let next = self.next_overlay(&vm).await;
        let next = match next {
            Ok(next) => next,
            Err(err) => {
                let _ = pager.control.checkpoint_abort(id).await;
                return Err(err.context(&what));
            }
        };
        clock.lap("overlay");
        let frozen = match self.freeze(&running, &vm, quiesce).await {
            Ok(frozen) => frozen,
            Err(err) => {
                let _ = pager.control.checkpoint_abort(id).await;
                if let Some(next) = &next {
                    self.settle_overlay(&running, next).await;
                }
                return Err(err.context(&what));
            }
        };
        if frozen {
            clock.lap("freeze");
        }
        let paused = self.pause_and_commit(&running, &pager, image, next.as_ref(), &mut clock).await;
        if frozen {
            self.thaw(&running, &vm);
        }
        let (saved, pause_us) = match paused {
            Ok(saved) => saved,
            Err(err) => {
                if let Some(next) = &next {
                    self.settle_overlay(&running, next).await;
                }
                return Err(err.context(&what));
            }
        };
        // The parent runs again. From here on, what fails takes the checkpoint back.
        let state = saved.bytes;
        let overlays = next.as_ref().map(|next| self.used_overlays(next, saved.second_overlay)).unwrap_or_default();
        let record = CheckpointRecord {
            id: image,
            note,
            origin: None,
            family: vm.family,
            vm: id,
            vm_name: vm.name.clone(),
            base: vm.base,
            generation: vm.generation,
            image: vm.image.clone(),
            guest: vm.guest.clone(),
            spec: vm.spec.clone(),
            layers: Vec::new(),
            created_unix_ms: now_unix_ms(),
            state_bytes: state.len() as u64,
            pause_us,
            peers: Vec::new(),
            pending,
            disk: vm.disk.as_ref().map(|disk| self.freeze_disk(vm.family, disk, overlays)),
            frozen,
            joined: vm.joined.iter().map(|j| j.network).collect(),
            boot: vm.boot.clone(),
            agent: vm.agent,
        };
        let on_record = self.put_on_record(&pager, record, &state, overlays).await;
        match &next {
            Some(next) if on_record.is_err() => self.settle_overlay(&running, next).await,
            _ => overlays.iter().for_each(|id| self.overlay_settled(*id)),
        }
        let record = match on_record {
            Ok(record) => record,
            Err(err) => {
                let _ = pager.control.image_drop(image).await;
                let _ = fs::remove_file(self.state_file(image));
                return Err(err.context(&what));
            }
        };
        self.stats.count("checkpoints");
        self.color_behind(image);
        self.merge_behind(&running);
        let timeline = self.keep_timeline(&running, "parent", clock);
        Ok(Taken { record, state: Arc::new(state), pause_us, timeline })
    }

    async fn put_on_record(
        &self,
        pager: &Pager,
        mut record: CheckpointRecord,
        state: &[u8],
        overlays: &[DiskId],
    ) -> ApiResult<CheckpointRecord> {
        let failed = |what: &str, e: std::io::Error| ApiError::failed(what.to_owned(), e);
        let (path, temp) = (self.state_file(record.id), self.state_file(record.id).with_extension("new"));
        fs::write(&temp, state)
            .and_then(|()| fs::rename(&temp, &path))
            .map_err(|e| failed("Failed to keep the devices' state", e))?;
        let report =
            pager.control.image_status(record.id).await.map_err(|e| pager_failed("The image is not there", e))?;
        record.layers = report.layers.iter().map(|l| l.id).collect();
        let kept = record.clone();
        self.store.update(move |s| -> ApiResult<()> {
            if let Some(vm) = s.vms.get_mut(&kept.vm) {
                vm.base = Some(kept.id);
                if let Some(disk) = vm.disk.take() {
                    vm.disk = Some(disk.followed_by(overlays));
                }
            }
            s.checkpoints.insert(kept.id, kept);
            Ok(())
        })?;
        Ok(record)
    }

    /// Has the pager serve a VM's memory, and puts that on record.
    pub(crate) async fn attach(
        &self,
        running: &Running,
        vm: &VmRecord,
        pager: &Pager,
        view: View,
    ) -> ApiResult<ramet_pager::control::AttachReply> {
        let process = &running.process;
        let reply = pager.control.attach(vm.id, process.shim_socket(), process.pid(), view).await;
        let reply = reply.map_err(|e| pager_failed("The pager could not take the VM's memory up", e))?;
        let attached = |s: &mut State| {
            if let Some(vm) = s.vms.get_mut(&vm.id) {
                vm.attached = true;
            }
        };
        if vm.state == VmState::Starting {
            // It would be undone, with its pager's share.
            self.store.note(attached);
        } else {
            self.store.amend(attached);
        }
        Ok(reply)
    }

    /// Saves the devices, has the pager commit, lets the VM go on: between STOP and RESUME is nothing else. Whatever
    /// fails, the VM goes on.
    async fn pause_and_commit(
        &self,
        running: &Running,
        pager: &Pager,
        image: ImageId,
        next: Option<&NextOverlay>,
        clock: &mut Clock,
    ) -> ApiResult<(backend::Saved, u64)> {
        running.paused.store(true, Ordering::Release);
        let result = self.pause_and_commit_inner(running, pager, next, clock).await;
        // Before the pager is told, which may be away. Does no harm to a VM that runs.
        if result.is_err()
            && let Err(err) = running.process.cont().await
        {
            tracing::error!(vm = %running.id, error = %err, "a VM could not be continued after a failed checkpoint");
        }
        running.paused.store(false, Ordering::Release);
        if result.is_err() {
            let _ = pager.control.checkpoint_abort(running.id).await;
            // Had it been committed, and only the answer been lost, it is an image of nobody.
            let _ = pager.control.image_drop(image).await;
        }
        result
    }

    async fn pause_and_commit_inner(
        &self,
        running: &Running,
        pager: &Pager,
        next: Option<&NextOverlay>,
        clock: &mut Clock,
    ) -> ApiResult<(backend::Saved, u64)> {
        let saved = backend::save_state(&running.process, next.map(NextOverlay::paths)).await?;
        clock.lap("save");
        pager
            .control
            .checkpoint_commit(running.id)
            .await
            .map_err(|e| pager_failed("The memory could not be fixed", e).remedy(AGAIN))?;
        clock.lap("commit");
        let resumed = backend::cont(&running.process).await?;
        clock.lap("resume");
        let pause = resumed.duration_since(saved.stopped).unwrap_or_default();
        let end = Instant::now();
        clock.span("pause", end.checked_sub(pause).unwrap_or(end), end);
        Ok((saved, us(pause)))
    }

    /// Refuses a checkpoint whose pages may not fit.
    fn check_room(&self, vm: &VmRecord, needed: ByteSize) -> ApiResult<()> {
        let pages = self.config.pages();
        let room = memory::room(&pages)
            .map_err(|e| ApiError::failed(format!("Failed to ask for the room in {}", pages.display()), e))?;
        if needed <= room {
            return Ok(());
        }
        Err(ApiError::new(
            ErrorCode::NoMemory,
            format!(
                "No memory left for a checkpoint of VM '{}': up to {needed} needed, {room} available in {}",
                vm.name,
                pages.display()
            ),
        )
        .remedy("remove checkpoints (`ramet checkpoint ls`), or start rametd with a larger --pages-size"))
    }

    pub(crate) fn state_file(&self, image: ImageId) -> PathBuf {
        self.config.checkpoints().join(format!("{image}.state"))
    }

    /// The devices' state of a checkpoint.
    pub(crate) fn device_state(&self, record: &CheckpointRecord) -> ApiResult<Arc<Vec<u8>>> {
        let path = self.state_file(record.id);
        let bytes = fs::read(&path).map_err(|e| ApiError::failed(format!("Failed to read {}", path.display()), e))?;
        if bytes.len() as u64 != record.state_bytes {
            return Err(ApiError::internal(format!(
                "{} has {} bytes instead of {}: it is damaged",
                path.display(),
                bytes.len(),
                record.state_bytes
            ))
            .remedy("remove the checkpoint and take it again"));
        }
        Ok(Arc::new(bytes))
    }

    // --------------------------------------------------------------------------------------------------- waiting

    /// Waits until the checkpoint's pages have been copied out of its parent.
    pub(crate) async fn wait_complete(&self, record: &CheckpointRecord) -> ApiResult<ImageReport> {
        let pager = self.pager(record.family).await?;
        let report = pager.control.image_wait(record.id).await;
        report.map_err(|e| pager_failed(&format!("Checkpoint {} can't be completed", record.id), e))
    }

    /// Before a VM ends: its checkpoints must have all their pages out of it.
    pub(crate) async fn settle_checkpoints(&self, vm: VmId) {
        let newest = self.store.read(|s| {
            let base = s.vms.get(&vm)?.base?;
            s.checkpoints.get(&base).filter(|c| c.vm == vm).cloned()
        });
        if let Some(record) = newest
            && let Err(err) = self.wait_complete(&record).await
        {
            tracing::error!("{err}");
        }
    }

    /// `GET /v1/checkpoints/{id}/wait`.
    ///
    /// # Errors
    /// [`ErrorCode::NotFound`]; an internal error when the pages are lost.
    pub async fn checkpoint_wait(&self, wanted: &str) -> ApiResult<CheckpointInfo> {
        let record = self.find_checkpoint(wanted)?;
        self.wait_complete(&record).await?;
        self.checkpoint_info(&record, false).await
    }

    // --------------------------------------------------------------------------------------------------- showing

    /// All checkpoints of this host, with their users everywhere.
    pub async fn list_checkpoints(self: &Arc<Self>) -> Vec<CheckpointInfo> {
        let mut records: Vec<_> =
            self.store.read(|s| s.checkpoints.values().filter(|c| c.origin.is_none() && !c.pending).cloned().collect());
        records.sort_by_key(|c: &CheckpointRecord| (c.created_unix_ms, c.id));
        let infos = all(records.into_iter().map(|record| {
            let daemon = self.clone();
            async move { daemon.checkpoint_info(&record, true).await }
        }));
        infos.await.into_iter().filter_map(Result::ok).collect()
    }

    /// One checkpoint.
    ///
    /// # Errors
    /// [`ErrorCode::NotFound`], [`ErrorCode::Ambiguous`].
    pub async fn show_checkpoint(&self, wanted: &str) -> ApiResult<CheckpointInfo> {
        let record = self.find_checkpoint(wanted)?;
        self.checkpoint_info(&record, true).await
    }

    pub(crate) async fn checkpoint_info(
        &self,
        record: &CheckpointRecord,
        ask_peers: bool,
    ) -> ApiResult<CheckpointInfo> {
        let pager = self.pager(record.family).await?;
        let report = pager.control.image_status(record.id).await;
        let report = report.map_err(|e| pager_failed(&format!("Checkpoint {}", record.id), e))?;
        let mut users = self.users_here(record);
        if ask_peers {
            for (host, answer) in self.users_elsewhere(record).await {
                match answer {
                    Ok(more) => users.extend(more),
                    Err(err) => users.push(UserInfo { kind: "host".to_owned(), name: err.to_string(), host }),
                }
            }
        }
        let mut info = self.store.read(|s| describe(record, Some(&report), s, &self.config.name, users));
        info.colors_bytes = fs::metadata(self.colors_file(record.id)).ok().map(|m| m.len());
        Ok(info)
    }

    /// The same of a checkpoint that has just been taken: that is no failure because its pager went away afterwards. What
    /// the pager would tell is left out then.
    pub(crate) async fn info_of_taken(&self, record: &CheckpointRecord) -> CheckpointInfo {
        match self.checkpoint_info(record, false).await {
            Ok(info) => info,
            Err(err) => {
                tracing::warn!(checkpoint = %record.id, "{err}");
                let users = self.users_here(record);
                self.store.read(|s| describe(record, None, s, &self.config.name, users))
            }
        }
    }

    /// Who needs an image on this host: VMs that show it, checkpoints over it.
    pub(crate) fn users_here(&self, record: &CheckpointRecord) -> Vec<UserInfo> {
        let host = || self.config.name.clone();
        self.store.read(|s| {
            let vms =
                s.views(record.id).map(|vm| UserInfo { kind: "vm".to_owned(), name: vm.name.clone(), host: host() });
            let own = s.children(record).filter(|c| c.origin.is_none());
            let children =
                own.map(|c| UserInfo { kind: "checkpoint".to_owned(), name: c.id.to_string(), host: host() });
            vms.chain(children).collect()
        })
    }

    pub(crate) async fn users_elsewhere(&self, record: &CheckpointRecord) -> Vec<(String, ApiResult<Vec<UserInfo>>)> {
        let id = record.id.to_string();
        all(record.peers.iter().map(|host| {
            let (host, id, client) = (host.clone(), id.clone(), self.peers.client(host));
            async move {
                let answer = async { Ok(ask(&host, ASK_WAIT, client?.peer_image(&id)).await?.users) }.await;
                (host, answer)
            }
        }))
        .await
    }

    // -------------------------------------------------------------------------------------------------- removing

    /// Removes a checkpoint that nothing uses.
    ///
    /// # Errors
    /// [`ErrorCode::InUse`] naming the users; [`ErrorCode::HostUnreachable`] when a host that may have clones can't be
    /// asked.
    pub async fn remove_checkpoint(self: &Arc<Self>, wanted: &str) -> ApiResult<()> {
        let record = self.find_checkpoint(wanted)?;
        let mut users = self.users_here(&record);
        for (host, answer) in self.users_elsewhere(&record).await {
            users.extend(answer.map_err(|e| {
                e.context(format!("Host '{host}' may have clones of checkpoint {}", record.id.short()))
            })?);
        }
        refuse_users(&record, &users)?;
        let daemon = self.clone();
        to_the_end(async move {
            let parent = daemon.running(record.vm);
            let _busy = busy(parent.as_ref()).await;
            // Whoever held the VM may have removed it, or taken the next one over it.
            let record = daemon.find_checkpoint(&record.id.to_string())?;
            refuse_users(&record, &daemon.users_here(&record))?;
            daemon.drop_unlocked(&record).await
        })
        .await
    }

    /// Removes a checkpoint, here and where copies of it are, once no other one is being taken of its VM.
    pub(crate) async fn drop_checkpoint(self: &Arc<Self>, record: &CheckpointRecord) -> ApiResult<()> {
        let parent = self.running(record.vm);
        let _busy = busy(parent.as_ref()).await;
        self.drop_unlocked(record).await
    }

    /// The same while the caller holds the VM.
    async fn drop_unlocked(self: &Arc<Self>, record: &CheckpointRecord) -> ApiResult<()> {
        self.bar_prepared(record.id).await;
        let result = self.drop_unused(record).await;
        self.allow_prepared(record.id);
        result
    }

    async fn drop_unused(self: &Arc<Self>, record: &CheckpointRecord) -> ApiResult<()> {
        let id = record.id.to_string();
        let dropped = all(record.peers.iter().map(|host| {
            let (host, id, client) = (host.clone(), id.clone(), self.peers.client(host));
            async move { ask(&host, ASK_WAIT, client?.peer_image_drop(&id)).await }
        }))
        .await;
        for result in dropped {
            result?;
        }
        let pager = self.pager(record.family).await?;
        pager.control.image_drop(record.id).await.map_err(|e| pager_failed("The image can't be dropped", e))?;
        let image = record.id;
        self.store.update(|s| -> ApiResult<()> {
            s.checkpoints.remove(&image);
            for vm in s.vms.values_mut().filter(|vm| vm.base == Some(image)) {
                vm.base = vm.checkpoint;
            }
            Ok(())
        })?;
        let _ = fs::remove_file(self.state_file(image));
        let _ = fs::remove_file(self.colors_file(image));
        if record.disk.is_some() {
            self.sweep_disks(record.family);
        }
        self.tidy(record.family).await;
        Ok(())
    }

    // ------------------------------------------------------------------------------------- images of other hosts

    /// A view of an image has gone: the copy of another host's goes, too, unless another view comes soon.
    pub(crate) fn image_lost_a_user(self: &Arc<Self>, image: ImageId) {
        let copy = move |d: &Self| {
            let record = d.store.read(|s| s.checkpoints.get(&image).filter(|c| c.origin.is_some()).cloned())?;
            d.users_here(&record).is_empty().then_some(record)
        };
        if copy(self).is_none() {
            return;
        }
        let daemon = self.clone();
        tokio::spawn(async move {
            tokio::time::sleep(LINGER).await;
            if let Some(record) = copy(&daemon)
                && let Err(err) = daemon.drop_checkpoint(&record).await
            {
                tracing::warn!(image = %image, "{err}");
            }
        });
    }

    /// Who uses another host's checkpoint here; none when there is no copy of it.
    #[must_use]
    pub fn peer_image_users(&self, image: ImageId) -> Vec<UserInfo> {
        let record = self.store.read(|s| s.checkpoints.get(&image).cloned());
        record.map_or_else(Vec::new, |record| self.users_here(&record))
    }

    /// Drops the copy of another host's checkpoint.
    ///
    /// # Errors
    /// [`ErrorCode::InUse`] naming the users.
    pub async fn drop_peer_image(self: &Arc<Self>, image: ImageId) -> ApiResult<()> {
        let record = self.store.read(|s| s.checkpoints.get(&image).filter(|c| c.origin.is_some()).cloned());
        let Some(record) = record else { return Ok(()) };
        let users = self.users_here(&record);
        if let Some(user) = users.first() {
            return Err(ApiError::new(
                ErrorCode::InUse,
                format!("Checkpoint {} is in use by {} '{}' on {}", image.short(), user.kind, user.name, user.host),
            ));
        }
        self.drop_checkpoint(&record).await
    }
}

/// Holds a VM that runs.
pub(crate) async fn busy(running: Option<&Arc<Running>>) -> Option<tokio::sync::MutexGuard<'_, ()>> {
    match running {
        Some(running) => Some(running.busy.lock().await),
        None => None,
    }
}

/// Refuses to remove a checkpoint that is needed.
fn refuse_users(record: &CheckpointRecord, users: &[UserInfo]) -> ApiResult<()> {
    if users.is_empty() {
        return Ok(());
    }
    let named: Vec<_> = users.iter().map(|u| format!("{} '{}' on {}", u.kind, u.name, u.host)).collect();
    Err(ApiError::new(ErrorCode::InUse, format!("Checkpoint {} is in use by {}", record.id.short(), named.join(", ")))
        .remedy("remove these first: `ramet rm --force VM`, `ramet checkpoint rm ID`"))
}

/// A checkpoint as the API tells of it. Without a pager's report it is what is on record.
fn describe(
    record: &CheckpointRecord,
    report: Option<&ImageReport>,
    state: &State,
    this_host: &str,
    users: Vec<UserInfo>,
) -> CheckpointInfo {
    let layer = |id: LayerId, pages: u64, stored_bytes: u64| {
        let ours = state.checkpoints.values().filter(|c| c.origin.is_none() && c.layers.contains(&id));
        LayerInfo {
            id,
            pages,
            bytes: PageCount(pages).size().bytes(),
            stored_bytes,
            checkpoints: ours.map(|c| c.id).collect(),
        }
    };
    let layers = match report {
        Some(report) => report.layers.iter().map(|l| layer(l.id, l.owned_pages, l.stored_bytes)).collect(),
        None => record.layers.iter().map(|&id| layer(id, 0, 0)).collect(),
    };
    CheckpointInfo {
        id: record.id,
        note: record.note.clone(),
        host: record.origin.clone().unwrap_or_else(|| this_host.to_owned()),
        family: record.family,
        vm: record.vm,
        vm_name: record.vm_name.clone(),
        base: record.base,
        generation: record.generation,
        image: record.image.clone(),
        memory: record.spec.memory,
        created_unix_ms: record.created_unix_ms,
        state_bytes: record.state_bytes,
        pause_us: record.pause_us,
        complete: report.is_some_and(|r| r.complete),
        broken: report.and_then(|r| r.broken.clone()),
        colors_bytes: None,
        layers,
        users,
    }
}

fn not_running(vm: &VmRecord) -> ApiError {
    let state = match vm.state {
        VmState::Starting => "is being started",
        VmState::Crashed => "has crashed",
        // Its record says so, and no process is known: see `Daemon::recover`.
        VmState::Running => "does not answer",
        _ => "is stopped",
    };
    ApiError::new(ErrorCode::WrongState, format!("VM '{}' {state}: it can't be checkpointed", vm.name))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::tests::checkpoint;

    #[test]
    fn a_checkpoint_can_be_told_of_while_its_pager_is_away() {
        let mut state = State::default();
        let record = CheckpointRecord { state_bytes: 7, pause_us: 9, ..checkpoint(&[1, 2]) };
        state.checkpoints.insert(record.id, record.clone());
        let info = describe(&record, None, &state, "h1", Vec::new());
        assert_eq!((info.id, info.host.as_str(), info.state_bytes, info.pause_us), (record.id, "h1", 7, 9));
        assert_eq!(info.layers.iter().map(|l| l.id).collect::<Vec<_>>(), record.layers);
        assert_eq!(info.layers[0].checkpoints, [record.id]);
        assert!(!info.complete && info.broken.is_none(), "not known");
    }

    #[test]
    fn a_pager_that_went_away_is_worth_another_try() {
        let lost = PagerError::Lost { path: "/p".into(), message: "gone".into() };
        let err = pager_failed("The memory could not be fixed", lost);
        assert_eq!(err.code(), ErrorCode::Internal);
        assert!(err.to_string().contains("try again"), "{err}");
    }
}
