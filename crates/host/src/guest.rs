//! Talking to guests: the agent (identity, commands, files, clocks) and the serial console.

use std::{
    io,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use ramet_client::{
    api::{CloneOptions, ErrorCode, GuestTime, PingReply, Quiesce, VmState},
    exec::{self, ExecRequest, Kind},
};
use ramet_guest::{
    host::{AgentClient, AgentError, ExecEvent, ExecSession},
    protocol::{Exec, Freeze, HookResult, Identity, NicIdentity, Release},
};
use ramet_memory::{FamilyId, VmId};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::UnixStream,
};

use crate::{
    daemon::Daemon,
    error::{ApiError, ApiResult},
    names::shown,
    state::{VmNic, VmRecord},
    vms::Running,
};

/// How long a guest that has answered before may take for its handshake.
pub(crate) const CONNECT: Duration = Duration::from_secs(5);

/// How long one is looked for that may well not be there.
pub(crate) const GLANCE: Duration = Duration::from_secs(2);

/// How long a guest without the agent may take to let a network card go.
const LET_GO: Duration = Duration::from_secs(60);

/// How long a guest may take to boot anew.
const REBOOT: Duration = Duration::from_secs(600);

/// An agent's error as the API tells it.
pub(crate) fn agent_failed(vm: &str, err: &AgentError) -> ApiError {
    let message = format!("VM '{vm}': {err}");
    match err {
        AgentError::Guest { .. } | AgentError::TooLarge(_) => ApiError::new(ErrorCode::BadRequest, message),
        AgentError::Connect { .. }
        | AgentError::NoHello { .. }
        | AgentError::TimedOut { .. }
        | AgentError::Disconnected { .. } => ApiError::new(ErrorCode::AgentSilent, message)
            .remedy(format!("`ramet ps` tells whether it runs, `ramet console {vm}` shows what it does")),
        _ => ApiError::internal(message),
    }
}

fn unix_ns() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_nanos()).unwrap_or(u64::MAX))
}

/// What helps when a clone's kernel did not take fresh entropy.
const UNSEEDED: &str = "its random numbers may be those of its siblings, so it was not released; --allow-unseeded releases \
    it all the same";

/// A VM's name as a host's name.
fn host_name(name: &str) -> String {
    let fits = |c: char| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' };
    name.chars().map(fits).collect::<String>().trim_matches('-').to_owned()
}

/// What hooks that failed have said.
fn told(hooks: &[HookResult]) -> String {
    let failed = hooks.iter().filter(|hook| !hook.ok);
    let tell = |hook: &HookResult| {
        let how = hook.remark.clone().or_else(|| hook.exit.map(|code| format!("exit code {code}")));
        let words = hook.output.trim().lines().last().map(|l| format!(", \"{}\"", shown(l))).unwrap_or_default();
        format!("; {}: {}{words}", shown(&hook.name), how.unwrap_or_else(|| "it failed".to_owned()))
    };
    failed.map(tell).collect()
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// A connection that nothing else of its kind may have beside it; the flag falls when it goes.
#[derive(Debug)]
pub struct Only {
    stream: UnixStream,
    flag: Arc<std::sync::atomic::AtomicBool>,
}

impl Only {
    /// The connection.
    pub fn stream(&mut self) -> &mut UnixStream {
        &mut self.stream
    }
}

impl Drop for Only {
    fn drop(&mut self) {
        self.flag.store(false, Ordering::Release);
    }
}

impl Daemon {
    /// A VM that runs, by name, id or prefix.
    ///
    /// # Errors
    /// [`ErrorCode::NotFound`], [`ErrorCode::WrongState`].
    pub fn find_running(&self, wanted: &str) -> ApiResult<(VmRecord, Arc<Running>)> {
        let vm = self.find_vm(wanted)?;
        match self.running(vm.id) {
            Some(running) => Ok((vm, running)),
            None if vm.state == VmState::Running => {
                Err(ApiError::new(ErrorCode::WrongState, format!("The QEMU of VM '{}' does not answer", vm.name))
                    .remedy("`ramet ps` shows why; `ramet rm --force` ends it all the same"))
            }
            None => Err(ApiError::new(ErrorCode::WrongState, format!("VM '{}' does not run", vm.name))
                .remedy("`ramet ps` shows what runs, and why others do not")),
        }
    }

    /// The connection to a VM's agent: the one that stands, or a new one.
    ///
    /// # Errors
    /// [`ErrorCode::AgentSilent`].
    pub(crate) async fn agent(&self, running: &Running, name: &str, limit: Duration) -> ApiResult<AgentClient> {
        // Somebody may be connecting to a guest that boots, with more patience.
        let begin = Instant::now();
        let Ok(mut agent) = tokio::time::timeout(limit, running.agent.lock()).await else {
            let silent = AgentError::NoHello { limit };
            return Err(agent_failed(name, &silent));
        };
        let limit = limit.saturating_sub(begin.elapsed());
        if let Some(client) = agent.as_ref().filter(|client| !client.is_closed()) {
            return Ok(client.as_ref().clone());
        }
        let client = AgentClient::connect(running.process.agent_socket(), limit).await;
        let client = client.map_err(|e| agent_failed(name, &e))?;
        // Its next QEMU listens at the same place, and has one connection for all: whoever asked the one before must not
        // keep that.
        if !self.is_current(running) {
            client.close();
            return Err(ApiError::new(ErrorCode::AgentSilent, format!("VM '{name}' boots anew in another QEMU"))
                .remedy("try again"));
        }
        *agent = Some(Arc::new(client.clone()));
        Ok(client)
    }

    /// Tells a guest who it is, with fresh entropy and the time, and waits for its answer. Says whether the kernel took the
    /// entropy.
    ///
    /// # Errors
    /// [`ErrorCode::AgentSilent`]; an internal error when the guest could not take it up.
    async fn introduce(&self, running: &Running, limit: Duration, options: &CloneOptions) -> ApiResult<()> {
        let find = || self.store.read(|s| s.vms.get(&running.id).cloned());
        let vm = find().ok_or_else(|| ApiError::new(ErrorCode::NotFound, format!("VM {} was removed", running.id)))?;
        let client = self.agent(running, &vm.name, limit).await?;
        let mut entropy = [0; 64];
        getrandom::fill(&mut entropy)
            .map_err(|e| ApiError::internal(format!("No random numbers for '{}': {e}", vm.name)))?;
        let clone = vm.is_clone();
        // A guest on a disk is a machine of its own; one in memory alone has no such names.
        let somebody = vm.disk.is_some() || vm.nics().next().is_some();
        let identity = Identity {
            clone_number: vm.clone_number,
            generation: vm.generation,
            family: vm.family.to_string(),
            parent: vm.parent.map(|p| p.to_string()),
            vm_id: vm.id.to_string(),
            name: vm.name.clone(),
            entropy: hex(&entropy),
            realtime_ns: unix_ns(),
            nics: (0..)
                .zip(vm.nics())
                .map(|(index, (network, nic))| self.nic_identity(&vm, index, network, nic))
                .collect(),
            hostname: somebody.then(|| host_name(&vm.name)),
            machine_id: somebody.then(|| vm.id.to_string()),
            ssh_host_keys: options.ssh_host_keys,
            kill_sockets: clone,
        };
        let answer = client.with_limit(limit).identity(&identity).await.map_err(|e| agent_failed(&vm.name, &e))?;
        let steps: Vec<_> = answer.steps.iter().map(|step| format!("{} {}", step.name, step.us)).collect();
        tracing::debug!(vm = %vm.id, steps = steps.join(", "), "took its identity up (steps in us)");
        if !answer.reseeded && options.allow_unseeded {
            tracing::warn!(vm = %vm.id, "released without fresh entropy, as it was asked for");
        } else if !answer.ok {
            let why = answer.error.unwrap_or_else(|| "no reason given".to_owned());
            let err = ApiError::internal(format!("VM '{}' could not take its identity up: {why}", vm.name));
            return Err(if answer.reseeded { err } else { err.remedy(UNSEEDED) });
        }
        self.agent_answers(running.id, true);
        Ok(())
    }

    fn nic_identity(&self, vm: &VmRecord, index: u32, network: FamilyId, nic: &VmNic) -> NicIdentity {
        let plan = self.nets.plan();
        let prefix = if network == vm.family { plan.prefix() } else { crate::nets::NAMED_PREFIX };
        // One way out: by the family's network, or else by the first one.
        let gateway = (index == 0).then(|| plan.gateway());
        NicIdentity {
            index,
            mac: nic.member.mac.to_string(),
            ip: nic.member.ip.to_string(),
            prefix,
            gateway: gateway.map(|g| g.ip.to_string()),
            gateway_mac: gateway.map(|g| g.mac.to_string()),
            dns: match index {
                0 => self.name_servers_of(network).iter().map(ToString::to_string).collect(),
                _ => Vec::new(),
            },
            mtu: Some(u32::from(crate::nets::MTU)),
            ..NicIdentity::default()
        }
    }

    /// Makes a clone somebody: identity, then its cable, then its hooks, and then its applications run. `lap` is told of
    /// each part that is done.
    ///
    /// # Errors
    /// As [`Daemon::introduce`]; an internal error when a hook fails. The clone has no network then, or its applications
    /// stand still.
    pub(crate) async fn settle_in(
        &self,
        running: &Running,
        limit: Duration,
        options: &CloneOptions,
        lap: &mut (dyn FnMut(&'static str) + Send),
    ) -> ApiResult<()> {
        self.introduce(running, limit, options).await?;
        lap("identity");
        let vm = self.store.read(|s| s.vms.get(&running.id).cloned());
        let vm = vm.ok_or_else(|| ApiError::new(ErrorCode::NotFound, format!("VM {} was removed", running.id)))?;
        for (network, nic) in vm.nics() {
            self.plug_in(network, nic).await?;
            lap("link");
        }
        if vm.guest != "linux" {
            return Ok(());
        }
        let client = self.agent(running, &vm.name, limit).await?;
        let request =
            Release { hooks: options.hooks, signal: true, limit_ms: options.hook_limit_s.saturating_mul(1000) };
        let answer = client.with_limit(limit).release(&request).await.map_err(|e| agent_failed(&vm.name, &e))?;
        lap("release");
        if answer.ok {
            return Ok(());
        }
        let why = answer.error.unwrap_or_else(|| "no reason given".to_owned());
        Err(ApiError::internal(format!("VM '{}' could not be released: {why}{}", vm.name, told(&answer.hooks)))
            .remedy("mend the hook in /etc/ramet/clone.d of the parent, or do without hooks (--no-hooks)"))
    }

    fn agent_answers(&self, id: VmId, answers: bool) {
        self.store.amend(|s| {
            if let Some(vm) = s.vms.get_mut(&id) {
                vm.agent = answers;
            }
        });
    }

    /// Whether a VM's agent has answered, or does so now. A guest of another kind than Linux needs none.
    pub(crate) async fn look_for_agent(&self, vm: &VmRecord, limit: Duration) -> bool {
        let known = || self.store.read(|s| s.vms.get(&vm.id).is_some_and(|vm| vm.agent));
        if vm.guest != "linux" || known() {
            return true;
        }
        let Some(running) = self.running(vm.id) else { return false };
        let answers = self.agent(&running, &vm.name, limit).await.is_ok();
        if answers {
            self.agent_answers(vm.id, true);
        }
        answers
    }

    /// Lets a clone go that has no agent: nobody in it can be told who it is. Its cards are replaced by new ones, with its
    /// own MAC addresses, and a guest that asks for its address by DHCP then gets its own.
    ///
    /// # Errors
    /// When the guest does not let its cards go: it has no network then.
    pub(crate) async fn release_untold(&self, running: &Running) -> ApiResult<()> {
        let vm = self.store.read(|s| s.vms.get(&running.id).cloned());
        let vm = vm.ok_or_else(|| ApiError::new(ErrorCode::NotFound, format!("VM {} was removed", running.id)))?;
        tracing::warn!(vm = %vm.id, name = vm.name, "released without an agent, and without fresh entropy, as it was asked for");
        for (index, (network, nic)) in (0..).zip(vm.nics()) {
            let replaced = running.process.replace_nic(index, &nic.member.mac.to_string(), LET_GO).await;
            replaced.map_err(|e| {
                ApiError::failed("The guest has no agent, and did not let its network card go", e)
                    .remedy("its kernel must know how to unplug PCI devices (CONFIG_HOTPLUG_PCI_ACPI), and have booted")
            })?;
            self.plug_in(network, nic).await?;
        }
        Ok(())
    }

    /// Introduces itself to a guest that may take long to boot; that it does not answer is no error.
    pub(crate) async fn greet(&self, running: &Running, limit: Duration, options: &CloneOptions) {
        if limit.is_zero() {
            return;
        }
        let clone = self.store.read(|s| s.vms.get(&running.id).is_some_and(VmRecord::is_clone));
        let greeted = match clone {
            true => self.settle_in(running, limit, options, &mut |_| {}).await,
            false => self.introduce(running, limit, options).await,
        };
        if let Err(err) = greeted {
            tracing::warn!(vm = %running.id, "{err}");
        }
    }

    /// The same to a guest that boots anew: it has forgotten all that it was told. No hooks: they are for a clone that
    /// becomes one.
    pub(crate) async fn greet_again(&self, running: &Running) {
        self.agent_answers(running.id, false);
        // Whatever waits for an answer of the agent before would wait for ever.
        if let Some(before) = running.agent.lock().await.take() {
            before.close();
        }
        self.greet(running, REBOOT, &CloneOptions { hooks: false, ..CloneOptions::default() }).await;
    }

    /// The same to a guest that booted, or began to, while there was no daemon to tell it who it is.
    pub(crate) async fn greet_untold(&self, running: &Running) {
        let Some(vm) = self.store.read(|s| s.vms.get(&running.id).cloned()) else { return };
        if vm.guest != "linux" {
            return;
        }
        if vm.agent {
            // One that is silent may only have much to do.
            let Ok(client) = self.agent(running, &vm.name, REBOOT).await else { return };
            if client.guest().generation.is_some() {
                return;
            }
            tracing::info!(vm = %vm.id, name = vm.name, "the guest has booted anew meanwhile");
        }
        self.greet_again(running).await;
    }

    // ------------------------------------------------------------------------------------- before a checkpoint

    /// Whether the guest can be asked to make ready for a checkpoint.
    fn can_quiesce(vm: &VmRecord) -> bool {
        vm.guest == "linux" && vm.agent
    }

    async fn ask_to_freeze(&self, running: &Running, vm: &VmRecord, request: &Freeze) -> ApiResult<bool> {
        let limit = Duration::from_millis(request.limit_ms);
        let hint = "without its agent: --no-hooks, and no --freeze";
        let client = self.agent(running, &vm.name, limit).await.map_err(|e| e.remedy(hint))?;
        match client.freeze(request).await {
            Ok(answer) if answer.ok => Ok(answer.frozen),
            Ok(answer) => {
                let why = answer.error.unwrap_or_else(|| "no reason given".to_owned());
                Err(ApiError::internal(format!("The guest did not make ready: {why}{}", told(&answer.hooks)))
                    .remedy("mend the hook in /etc/ramet/checkpoint.d, or do without hooks (--no-hooks)"))
            }
            Err(err) => {
                // Whatever was begun is undone, as far as the agent still hears.
                let _ = client.with_limit(CONNECT).thaw().await;
                Err(agent_failed(&vm.name, &err).remedy(hint))
            }
        }
    }

    /// Has the guest run its hooks and write its file systems, while it runs. Returns whether it was asked.
    ///
    /// # Errors
    /// When a hook fails or the agent does not answer; the guest goes on.
    pub(crate) async fn quiesce(&self, running: &Running, vm: &VmRecord, wanted: &Quiesce) -> ApiResult<bool> {
        if !Self::can_quiesce(vm) {
            if wanted.freeze || wanted.sync {
                return Err(ApiError::new(
                    ErrorCode::WrongState,
                    format!("The agent of VM '{}' has not answered: it can't be asked to stand still", vm.name),
                ));
            }
            return Ok(false);
        }
        if !(wanted.hooks || wanted.sync) {
            return Ok(false);
        }
        let limit_ms = wanted.limit_s.saturating_mul(1000);
        let request = Freeze { hooks: wanted.hooks, freeze: false, sync: wanted.sync, limit_ms };
        self.ask_to_freeze(running, vm, &request).await.map(|_| true)
    }

    /// Has the guest's applications stand still. Returns whether they do.
    ///
    /// # Errors
    /// When they can't be stopped; they go on.
    pub(crate) async fn freeze(&self, running: &Running, vm: &VmRecord, wanted: &Quiesce) -> ApiResult<bool> {
        if !wanted.freeze {
            return Ok(false);
        }
        let limit_ms = wanted.limit_s.saturating_mul(1000);
        let request = Freeze { hooks: false, freeze: true, sync: false, limit_ms };
        self.ask_to_freeze(running, vm, &request).await
    }

    /// Has them go on, in the background: the checkpoint is taken, or has failed.
    pub(crate) fn thaw(self: &Arc<Self>, running: &Arc<Running>, vm: &VmRecord) {
        let (daemon, running, name) = (self.clone(), running.clone(), vm.name.clone());
        tokio::spawn(async move {
            for _ in 0..10 {
                let thawed = match daemon.agent(&running, &name, CONNECT).await {
                    Ok(client) => client.with_limit(CONNECT).thaw().await.map(|ack| ack.ok).unwrap_or(false),
                    Err(_) => false,
                };
                if thawed || running.ending.load(Ordering::Acquire) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(300)).await;
            }
            tracing::error!(vm = %running.id, "the guest's applications stand still, and its agent does not answer");
        });
    }

    /// Has the guest shut down, and waits for its QEMU to end.
    pub(crate) async fn ask_to_shut_down(&self, running: &Running, grace: Duration) {
        let asked = async {
            let client = self.agent(running, "?", grace.min(CONNECT)).await.ok()?;
            // Its channel may break before its answer.
            let _ = client.with_limit(grace).shutdown().await;
            running.process.wait_exit().await;
            Some(())
        };
        let _ = tokio::time::timeout(grace, asked).await;
    }

    /// `GET /v1/vms/{vm}/ping`.
    ///
    /// # Errors
    /// [`ErrorCode::AgentSilent`].
    pub async fn ping(&self, wanted: &str) -> ApiResult<PingReply> {
        let (vm, running) = self.find_running(wanted)?;
        let client = self.agent(&running, &vm.name, CONNECT).await?;
        let rtt = client.ping().await.map_err(|e| agent_failed(&vm.name, &e))?;
        Ok(PingReply { rtt_us: crate::stats::us(rtt) })
    }

    /// `GET /v1/vms/{vm}/time`.
    ///
    /// # Errors
    /// [`ErrorCode::AgentSilent`].
    pub async fn guest_time(&self, wanted: &str) -> ApiResult<GuestTime> {
        let (vm, running) = self.find_running(wanted)?;
        let client = self.agent(&running, &vm.name, CONNECT).await?;
        let before = unix_ns();
        let time = client.time().await.map_err(|e| agent_failed(&vm.name, &e))?;
        let middle = before / 2 + unix_ns() / 2;
        let offset_ns = i64::try_from(i128::from(time.realtime_ns) - i128::from(middle)).unwrap_or(i64::MAX);
        Ok(GuestTime { realtime_ns: time.realtime_ns, monotonic_ns: time.monotonic_ns, offset_ns })
    }

    /// A connection to the agent of a VM that runs.
    ///
    /// # Errors
    /// [`ErrorCode::NotFound`], [`ErrorCode::WrongState`], [`ErrorCode::AgentSilent`].
    pub async fn agent_of(&self, wanted: &str) -> ApiResult<(VmRecord, AgentClient)> {
        let (vm, running) = self.find_running(wanted)?;
        let client = self.agent(&running, &vm.name, CONNECT).await?;
        Ok((vm, client))
    }

    /// The serial console of a VM: one user at a time.
    ///
    /// # Errors
    /// [`ErrorCode::InUse`] when somebody else has it.
    pub async fn console(&self, wanted: &str) -> ApiResult<Only> {
        let (vm, running) = self.find_running(wanted)?;
        let flag = running.console.clone();
        if flag.swap(true, Ordering::AcqRel) {
            return Err(ApiError::new(ErrorCode::InUse, format!("Somebody else has the console of VM '{}'", vm.name))
                .remedy("wait until they leave it"));
        }
        match UnixStream::connect(running.process.console_socket()).await {
            Ok(stream) => Ok(Only { stream, flag }),
            Err(err) => {
                flag.store(false, Ordering::Release);
                Err(ApiError::failed(format!("Failed to open the console of VM '{}'", vm.name), err))
            }
        }
    }
}

/// Runs a command over an upgraded connection: the first frame says which, the last how it ended. A connection that
/// breaks ends the command.
///
/// # Errors
/// Those of the connection.
pub async fn serve_exec<S: AsyncRead + AsyncWrite + Send>(client: AgentClient, stream: S) -> io::Result<()> {
    let (mut input, mut output) = tokio::io::split(stream);
    let request: ExecRequest = match exec::read_frame(&mut input).await? {
        Some((Kind::Request, json)) => match serde_json::from_slice(&json) {
            Ok(request) => request,
            Err(err) => {
                return exec::write_frame(&mut output, Kind::Error, format!("Bad request: {err}").as_bytes()).await;
            }
        },
        _ => return exec::write_frame(&mut output, Kind::Error, b"The first frame is no request").await,
    };
    let session = client.exec(ramet_guest::host::ExecRequest {
        exec: Exec {
            argv: request.argv,
            env: request.env.into_iter().collect(),
            cwd: request.cwd,
            tty: request.tty,
            stdin: request.stdin,
            rows: request.rows,
            cols: request.cols,
        },
        limit: None,
        kill_on_drop: true,
    });
    let ExecSession { mut stdin, mut events, control } = match session {
        Ok(session) => session,
        Err(err) => return exec::write_frame(&mut output, Kind::Error, err.to_string().as_bytes()).await,
    };
    let feed = async {
        while let Some((kind, payload)) = exec::read_frame(&mut input).await? {
            match kind {
                Kind::Stdin => {
                    // A command that has closed its input goes on all the same.
                    if let Some(to) = &mut stdin
                        && to.write_all(&payload).await.is_err()
                    {
                        stdin = None;
                    }
                }
                Kind::StdinEof => stdin = None,
                Kind::Signal if payload.len() == 1 => drop(control.signal(payload[0])),
                Kind::Resize => {
                    if let [r0, r1, c0, c1] = payload[..] {
                        let _ = control.resize(u16::from_le_bytes([r0, r1]), u16::from_le_bytes([c0, c1]));
                    }
                }
                _ => {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "Unexpected exec frame"));
                }
            }
        }
        io::Result::Ok(())
    };
    let drain = async {
        loop {
            match events.next().await {
                Ok(Some(ExecEvent::Stdout(bytes))) => exec::write_frame(&mut output, Kind::Stdout, &bytes).await?,
                Ok(Some(ExecEvent::Stderr(bytes))) => exec::write_frame(&mut output, Kind::Stderr, &bytes).await?,
                Ok(Some(ExecEvent::Exit(code))) => {
                    return exec::write_frame(&mut output, Kind::Exit, &code.to_le_bytes()).await;
                }
                Ok(None) => return exec::write_frame(&mut output, Kind::Error, b"The guest has gone away").await,
                Err(err) => return exec::write_frame(&mut output, Kind::Error, err.to_string().as_bytes()).await,
            }
        }
    };
    // The end of the caller's side is the end of the command, too: `events` is dropped.
    tokio::select! {
        fed = feed => fed,
        drained = drain => drained,
    }
}
