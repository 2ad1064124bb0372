//! Clones on this host: claim a QEMU, give it the image, load the devices, and - when all siblings are ready - go on.

use std::{
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use ramet_client::api::{CloneResult, ErrorCode, Timeline, VmInfo};
use ramet_guest::host::{AgentClient, AgentError};
use ramet_memory::{ImageId, VmId};
use ramet_pager::control::View;
use ramet_vmm::AgentPort;
use tokio::{net::UnixStream, task::JoinHandle};

use crate::{
    backend,
    daemon::{Daemon, all},
    error::{ApiError, ApiResult},
    pagers::Pager,
    plan::Terms,
    prepared::Prepared,
    state::{CheckpointRecord, VmDisk, VmRecord},
    stats::{Clock, us},
    vms::Running,
};

/// A clone that is to be: on record as starting.
#[derive(Debug, Clone)]
pub(crate) struct NewClone {
    pub(crate) id: VmId,
    pub(crate) name: String,
}

/// A clone that runs.
#[derive(Debug)]
pub(crate) struct LocalClone {
    pub(crate) vm: VmInfo,
    pub(crate) running_us: u64,
    pub(crate) answered_us: Option<u64>,
    pub(crate) ready_us: Option<u64>,
    pub(crate) warm: bool,
    pub(crate) prepared: bool,
    pub(crate) timeline: Timeline,
}

impl LocalClone {
    pub(crate) fn into_result(self) -> CloneResult {
        let Self { vm, running_us, answered_us, ready_us, warm, prepared, timeline } = self;
        CloneResult { vm, running_us, answered_us, ready_us, warm, prepared, timeline }
    }
}

/// A clone whose devices are loaded.
struct Loaded {
    clone: NewClone,
    running: Arc<Running>,
    agent: FirstQuestion,
    /// Its CPUs run already.
    runs: bool,
    warm: bool,
    prepared: bool,
    clock: Clock,
}

/// The first connection to a clone's agent.
enum FirstQuestion {
    /// Connected; nobody serves the other end yet.
    Connected(UnixStream),
    /// The question waits in the port.
    Asked(JoinHandle<Result<AgentClient, AgentError>>),
    /// It is left to whoever needs the agent.
    None,
}

impl FirstQuestion {
    fn ask(self, wait_agent: Duration) -> Self {
        match self {
            Self::Connected(_) if wait_agent.is_zero() => Self::None,
            Self::Connected(socket) => {
                Self::Asked(tokio::spawn(async move { AgentClient::over(socket, wait_agent).await }))
            }
            other => other,
        }
    }
}

impl Daemon {
    /// Makes clones on this host. On failure those that were made are left to the caller, who discards all that are on
    /// record as starting.
    pub(crate) async fn make_here(
        self: &Arc<Self>,
        record: &CheckpointRecord,
        state: Arc<Vec<u8>>,
        clones: Vec<NewClone>,
        terms: &Terms,
        begin: Instant,
    ) -> Result<Vec<LocalClone>, Vec<ApiError>> {
        let wait_agent = terms.wait_agent;
        let pager = self.pager(record.family).await.map_err(|e| vec![e])?;
        // One that waits for no sibling goes on at once. A serial port would take the first question before its state is
        // loaded, and lose it.
        let told = record.agent || record.guest != "linux";
        let at_once = clones.len() == 1 && record.spec.agent == AgentPort::VirtioSerial && told;
        let loaded = all(clones.into_iter().map(|clone| {
            let (daemon, record, state, pager) = (self.clone(), record.clone(), state.clone(), pager.clone());
            async move {
                let (id, context) = (clone.id, format!("Clone '{}'", clone.name));
                let loaded = daemon.load(&record, &state, clone, &pager, at_once.then_some(wait_agent), begin).await;
                if loaded.is_err() {
                    // Also when its record has gone meanwhile.
                    daemon.release(id).await;
                }
                loaded.map_err(|e| e.context(context))
            }
        }))
        .await;
        let loaded = all_or_errors(loaded)?;
        // All are ready: now they go on together.
        let gone_on = all(loaded.into_iter().map(|loaded| {
            let (daemon, terms) = (self.clone(), terms.clone());
            async move { daemon.go_on(loaded, &terms, told, begin).await }
        }))
        .await;
        let made = all_or_errors(gone_on)?;
        // The next fork of this shape finds QEMUs ready.
        self.warm_pool(&record.spec);
        Ok(made)
    }

    /// `at_once`: its CPUs are to start as soon as it is loaded, and its agent is asked before that, for so long.
    async fn load(
        self: &Arc<Self>,
        record: &CheckpointRecord,
        state: &[u8],
        clone: NewClone,
        pager: &Pager,
        at_once: Option<Duration>,
        begin: Instant,
    ) -> ApiResult<Loaded> {
        let mut clock = Clock::new(begin);
        clock.span("plan", begin, Instant::now());
        if let Some(made) = self.claim_prepared(record.id) {
            return self.take_over(made, clone, clock).await;
        }
        let claimed = backend::claim(&self.pool, &record.spec).await?;
        let running = self.adopt(clone.id, claimed.process);
        // A later daemon removes all VMs' directories that are on no record.
        let vm = self.store.note(|s| {
            let vm = s.vms.get_mut(&clone.id).ok_or_else(removed)?;
            vm.dir = claimed.dir;
            vm.disk = record.disk.clone().map(VmDisk::over);
            ApiResult::Ok(vm.clone())
        })?;
        // Before the devices are loaded: the guest then finds its host connected, as it was in the parent.
        let mut agent = match UnixStream::connect(running.process.agent_socket()).await {
            Ok(socket) => FirstQuestion::Connected(socket),
            Err(_) => FirstQuestion::None,
        };
        clock.lap("claim");
        let attach = self.attach(&running, &vm, pager, View::Image(record.id));
        let parts = async {
            let begin = Instant::now();
            self.give_parts(&running, true, false).await?;
            let took = begin.elapsed();
            // Not before: it makes the disk active, and what is attached to an active device must be, too.
            if at_once.is_some() {
                backend::start_when_loaded(&running.process).await?;
            }
            ApiResult::Ok(took)
        };
        if let Some(wait_agent) = at_once {
            agent = agent.ask(wait_agent);
        }
        let (attached, parts) = tokio::join!(attach, parts);
        let (attached, parts) = (attached?, parts?);
        if record.spec.has_attachments() {
            clock.part("parts", us(parts));
        }
        clock.part("remap", attached.remap_us);
        clock.lap("attach");
        backend::load_state(&running.process, state).await?;
        clock.lap("load");
        let (runs, warm) = (at_once.is_some(), claimed.warm);
        Ok(Loaded { clone, running, agent, runs, warm, prepared: false, clock })
    }

    /// A clone that is loaded already, if there is one.
    fn claim_prepared(self: &Arc<Self>, image: ImageId) -> Option<Prepared> {
        loop {
            let made = self.shelf.take(image)?;
            if made.process.is_alive() {
                return Some(made);
            }
            let daemon = self.clone();
            tokio::spawn(async move { daemon.discard_prepared(vec![made]).await });
        }
    }

    /// Makes a prepared clone this one, which gets the id that the pager knows it by.
    async fn take_over(self: &Arc<Self>, made: Prepared, clone: NewClone, mut clock: Clock) -> ApiResult<Loaded> {
        let there = self.store.note(|s| {
            let vm = s.vms.remove(&clone.id)?;
            let (disk, nic) = (made.disk.clone(), made.nic.clone());
            s.vms.insert(made.id, VmRecord { id: made.id, dir: made.dir.clone(), attached: true, disk, nic, ..vm });
            Some(())
        });
        if there.is_none() {
            self.discard_prepared(vec![made]).await;
            return Err(removed());
        }
        if let Some(disk) = &made.disk {
            self.overlay_settled(disk.active);
        }
        let running = self.adopt(made.id, made.process);
        let agent = made.agent.map_or(FirstQuestion::None, FirstQuestion::Connected);
        clock.lap("claim");
        let clone = NewClone { id: made.id, name: clone.name };
        Ok(Loaded { clone, running, agent, runs: false, warm: true, prepared: true, clock })
    }

    /// `told`: its agent is told who it is.
    async fn go_on(
        self: &Arc<Self>,
        loaded: Loaded,
        terms: &Terms,
        told: bool,
        begin: Instant,
    ) -> ApiResult<LocalClone> {
        let (wait_agent, options) = (terms.wait_agent, &terms.options);
        let Loaded { clone, running, agent, runs, warm, prepared, mut clock } = loaded;
        let context = format!("Clone '{}'", clone.name);
        clock.lap("wait");
        // The first question waits in the port when the CPUs start.
        let agent = if told { agent.ask(wait_agent) } else { FirstQuestion::None };
        let late = if runs {
            Duration::ZERO
        } else {
            let resumed = backend::cont(&running.process).await.map_err(|e| e.context(&context))?;
            // The word of it takes longer than the thing, with so many starting.
            SystemTime::now().duration_since(resumed).unwrap_or_default()
        };
        clock.lap("continue");
        let running_us = us(begin.elapsed().saturating_sub(late));
        let (mut answered_us, mut ready_us) = (None, None);
        if !told {
            if wait_agent.is_zero() {
                let (daemon, running) = (self.clone(), running.clone());
                tokio::spawn(async move {
                    if let Err(err) = daemon.release_untold(&running).await {
                        tracing::warn!(vm = %running.id, "{err}");
                    }
                });
            } else {
                self.release_untold(&running).await.map_err(|e| e.context(&context))?;
                clock.lap("cards");
                ready_us = Some(us(begin.elapsed()));
            }
        } else if wait_agent.is_zero() {
            let (daemon, running, options) = (self.clone(), running.clone(), options.clone());
            tokio::spawn(async move { daemon.greet(&running, Duration::from_secs(60), &options).await });
        } else {
            // Where this connection fails the next step makes another.
            if let FirstQuestion::Asked(asked) = agent
                && let Ok(Ok(client)) = asked.await
            {
                *running.agent.lock().await = Some(Arc::new(client));
            }
            let silent = |e: ApiError| e.context(&context);
            self.agent(&running, &clone.name, wait_agent).await.map_err(silent)?;
            clock.lap("first_answer");
            answered_us = Some(us(begin.elapsed()));
            self.settle_in(&running, wait_agent, options, &mut |phase| clock.lap(phase)).await.map_err(silent)?;
            ready_us = Some(us(begin.elapsed()));
        }
        let timeline = self.keep_timeline(&running, "clone", clock);
        let record = self.store.read(|s| s.vms.get(&clone.id).cloned());
        let record = record.ok_or_else(|| ApiError::new(ErrorCode::NotFound, format!("{context} was removed")))?;
        Ok(LocalClone { vm: self.info_of(&record, None), running_us, answered_us, ready_us, warm, prepared, timeline })
    }
}

fn removed() -> ApiError {
    ApiError::internal("it was removed while it was made")
}

/// All results, or all errors.
fn all_or_errors<T>(results: Vec<ApiResult<T>>) -> Result<Vec<T>, Vec<ApiError>> {
    let mut good = Vec::with_capacity(results.len());
    let mut bad = Vec::new();
    for result in results {
        match result {
            Ok(value) => good.push(value),
            Err(err) => bad.push(err),
        }
    }
    if bad.is_empty() { Ok(good) } else { Err(bad) }
}
