//! Stock QEMU as a VMM.
//!
//! # How a VM is frozen and loaded
//!
//! `xen-save-devices-state` writes the devices and nothing else, in the format of a migration, on the thread that runs the
//! command; it asks nothing of Xen. A real migration would take a second thread through its states while the guest stands
//! still, and would close every layer of its disk and open it again (`bdrv_inactivate_all`), which grows with their number.
//! Memory is left out by both: the pager has it.
//!
//! A VM that waits for a state has its incoming migration open already, on a socket pair whose other end is here: loading
//! is writing bytes and waiting for the word that they were understood.

use crate::{
    Base, Boot, DiskChain, ExitInfo, LayerSwap, MachineSpec, NextOverlays, Nic, Resumed, SavedState, VmPaths,
    VmProcess, Vmm, VmmError, devices,
    error::file_error,
    machine::arguments,
    process::Process,
    qmp::{Event, Qmp},
    record::{Record, find, stray},
};
use async_trait::async_trait;
use serde_json::{Value, json};
use std::{
    fs::{self, File},
    io::{self, Read},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd},
        unix::{net::UnixStream as StdUnixStream, process::CommandExt},
    },
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant, SystemTime},
};
use tokio::{io::AsyncWriteExt, sync::broadcast};

/// Time limit of a command that QEMU answers at once unless its memory is not served.
const COMMAND: Duration = Duration::from_secs(20);
/// Time limit from the start to the first answer.
const START: Duration = Duration::from_secs(30);
/// Time limit for saving or loading devices.
const STATE: Duration = Duration::from_secs(60);
/// Time limit for a process that was asked to end.
const QUIT: Duration = Duration::from_secs(10);
/// How often a guest is asked to let a card go. QEMU forgets a request after a second.
const ASK_AGAIN: Duration = Duration::from_millis(1500);
/// Time limit for a killed process to go.
const KILL: Duration = Duration::from_secs(10);

/// Settings of QEMU on a host.
#[derive(Debug, Clone)]
pub struct VmmConfig {
    /// The program.
    pub qemu: PathBuf,
    /// The preload object; `None` only in tests of this crate.
    pub shim: Option<PathBuf>,
    /// User and group that QEMU runs as; `None` is this process's own.
    pub user: Option<(u32, u32)>,
    /// Whether QEMU restricts its own system calls.
    pub sandbox: bool,
}

impl VmmConfig {
    /// Debian's program, unprivileged and restricted.
    #[must_use]
    pub fn new(shim: PathBuf) -> Self {
        Self {
            qemu: "qemu-system-x86_64".into(),
            shim: Some(shim),
            user: Some((crate::QEMU_UID, crate::QEMU_UID)),
            sandbox: true,
        }
    }
}

/// Stock QEMU.
#[derive(Debug, Clone)]
pub struct Qemu {
    config: VmmConfig,
    /// `/dev/userfaultfd`, inherited by every QEMU, which may not open it. Open for ever and harmless: whoever has it can make
    /// a userfaultfd for its own memory.
    device: Option<Arc<File>>,
}

impl Qemu {
    /// QEMU with these settings.
    #[must_use]
    pub fn new(config: VmmConfig) -> Self {
        let device = File::open("/dev/userfaultfd").ok().and_then(|file| {
            rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::empty()).ok()?;
            Some(Arc::new(file))
        });
        Self { config, device }
    }

    /// The command, and the files that have to stay open until it has started.
    fn command(&self, spec: &MachineSpec, boot: &Boot, paths: &VmPaths) -> Result<(Command, Vec<Inherited>), VmmError> {
        // QEMU's user may not come to where these are, such as below a home directory.
        let mut inherited = Vec::new();
        let mut inherit = |path: &Path| -> Result<PathBuf, VmmError> {
            let file = Inherited::open(path)?;
            let path = file.path();
            inherited.push(file);
            Ok(path)
        };
        let boot = match boot {
            Boot::Kernel { kernel, initrd, cmdline } => Boot::Kernel {
                kernel: inherit(kernel)?,
                initrd: initrd.as_deref().map(&mut inherit).transpose()?,
                cmdline: cmdline.clone(),
            },
            Boot::Incoming => Boot::Incoming,
        };
        let shim = self.config.shim.as_deref().map(&mut inherit).transpose()?;
        let log = File::options().create(true).append(true).open(&paths.log).map_err(file_error("open", &paths.log))?;
        let log_too = log.try_clone().map_err(file_error("open", &paths.log))?;
        let name = paths.dir.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
        let mut command = Command::new(&self.config.qemu);
        command
            .args(arguments(spec, &boot, paths, self.config.sandbox, &name))
            .stdin(Stdio::null())
            .stdout(log)
            .stderr(log_too)
            .current_dir("/")
            // A signal to the daemon's terminal is not for VMs.
            .process_group(0);
        if let Some((uid, gid)) = self.config.user {
            command.uid(uid).gid(if spec.accel == crate::Accel::Kvm { kvm_group().unwrap_or(gid) } else { gid });
        }
        if let Some(shim) = shim {
            let mode = if boot == Boot::Incoming { "late" } else { "boot" };
            command
                .env("LD_PRELOAD", shim)
                .env("RAMET_SHIM_SOCK", &paths.shim)
                .env("RAMET_SHIM_RAM", &paths.ram)
                .env("RAMET_SHIM_MODE", mode);
            if let Some(device) = &self.device {
                command.env("RAMET_SHIM_UFFD_DEV", device.as_raw_fd().to_string());
            }
        }
        Ok((command, inherited))
    }

    fn prepare_dir(&self, spec: &MachineSpec, paths: &VmPaths) -> Result<(), VmmError> {
        fs::create_dir_all(&paths.dir).map_err(file_error("make", &paths.dir))?;
        let ram = File::create(&paths.ram).map_err(file_error("make", &paths.ram))?;
        ram.set_len(spec.memory.bytes()).map_err(file_error("make", &paths.ram))?;
        if let Some((uid, gid)) = self.config.user {
            for path in [&paths.dir, &paths.ram] {
                std::os::unix::fs::chown(path, Some(uid), Some(gid)).map_err(file_error("give QEMU's user", path))?;
            }
        }
        Ok(())
    }

    async fn start(&self, spec: &MachineSpec, boot: &Boot, paths: &VmPaths) -> Result<QemuProcess, VmmError> {
        spec.check()?;
        self.prepare_dir(spec, paths)?;
        let (mut command, inherited) = self.command(spec, boot, paths)?;
        let program = self.config.qemu.clone();
        let child = tokio::task::spawn_blocking(move || command.spawn()).await.map_err(io::Error::other).flatten();
        drop(inherited);
        let child = child.map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => VmmError::NotInstalled { program: program.clone() },
            _ => VmmError::Spawn { program, source },
        })?;
        let process = Process::watch(child.id()).map_err(file_error("watch the process of", &paths.dir))?;
        // Before anything else: whoever comes after a daemon that dies meanwhile finds it.
        let record = Record { pid: process.pid, started: process.started, spec: spec.clone() };
        let qmp = match record.write(&paths.record) {
            Ok(()) => connect(paths, &process, START).await,
            Err(err) => Err(file_error("write", &paths.record)(err)),
        };
        let qmp = match qmp {
            Ok(qmp) => qmp,
            Err(err) => {
                process.kill(KILL).await;
                return Err(err);
            }
        };
        let started = QemuProcess::new(paths.clone(), spec.clone(), process, qmp);
        if let Err(err) = started.set_up(boot).await {
            let _ = started.kill().await;
            return Err(err);
        }
        Ok(started)
    }
}

/// A file that a child opens by the number that it inherits it under.
#[derive(Debug)]
struct Inherited(File);

impl Inherited {
    fn open(path: &Path) -> Result<Self, VmmError> {
        let file = File::open(path).map_err(file_error("open", path))?;
        rustix::io::fcntl_setfd(&file, rustix::io::FdFlags::empty())
            .map_err(io::Error::from)
            .map_err(file_error("pass on", path))?;
        Ok(Self(file))
    }

    /// Its path in the child, which opens it anew: with its own rights to the file, but none needed on the way to it.
    fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.0.as_raw_fd()))
    }
}

/// The group that may use KVM.
pub(crate) fn kvm_group() -> Option<u32> {
    use std::os::unix::fs::MetadataExt;
    fs::metadata("/dev/kvm").ok().map(|m| m.gid())
}

async fn connect(paths: &VmPaths, process: &Process, limit: Duration) -> Result<Qmp, VmmError> {
    let begin = Instant::now();
    loop {
        match Qmp::connect(&paths.qmp, limit).await {
            Ok(qmp) => return Ok(qmp),
            Err(err) => {
                if let Some(exit) = process.exited() {
                    return Err(VmmError::Died { exit: exit.to_string(), words: tail(&paths.log) });
                }
                if begin.elapsed() > limit {
                    return Err(err);
                }
                let soon = begin.elapsed() < Duration::from_secs(2);
                tokio::time::sleep(Duration::from_millis(if soon { 3 } else { 100 })).await;
            }
        }
    }
}

#[async_trait]
impl Vmm for Qemu {
    async fn launch(&self, spec: &MachineSpec, boot: Boot, dir: &Path) -> Result<Box<dyn VmProcess>, VmmError> {
        Ok(Box::new(self.start(spec, &boot, &VmPaths::new(dir)).await?))
    }

    async fn reattach(&self, dir: &Path, limit: Duration) -> Result<Box<dyn VmProcess>, VmmError> {
        let paths = VmPaths::new(dir);
        let (process, spec) = find(&paths)?;
        let gone = |err| match err {
            VmmError::Died { .. } => VmmError::Gone { dir: dir.to_owned() },
            err => err,
        };
        let qmp = connect(&paths, &process, limit).await.map_err(gone)?;
        Ok(Box::new(QemuProcess::new(paths, spec, process, qmp)))
    }

    async fn kill(&self, dir: &Path) -> Result<(), VmmError> {
        let paths = VmPaths::new(dir);
        let process = match find(&paths) {
            Ok((process, _)) => process,
            Err(VmmError::Gone { .. }) => match stray(&paths) {
                Some(process) => process,
                None => return Ok(()),
            },
            Err(err) => return Err(err),
        };
        if process.kill(KILL).await {
            return Ok(());
        }
        Err(VmmError::Timeout { command: "SIGKILL".to_owned(), limit: KILL })
    }
}

#[derive(Debug)]
struct QemuProcess {
    paths: VmPaths,
    spec: MachineSpec,
    process: Process,
    qmp: Qmp,
    /// Where the state of a waiting VM is written to.
    incoming: Mutex<Option<StdUnixStream>>,
    /// QEMU's number of the descriptor that a state was last written to.
    state_set: Mutex<Option<u64>>,
}

impl QemuProcess {
    fn new(paths: VmPaths, spec: MachineSpec, process: Process, qmp: Qmp) -> Self {
        Self { paths, spec, process, qmp, incoming: Mutex::default(), state_set: Mutex::default() }
    }

    async fn execute(&self, command: &str, arguments: Value) -> Result<Value, VmmError> {
        self.qmp.execute(command, arguments, COMMAND).await.map_err(|err| self.died_instead(err))
    }

    /// A broken connection of a dead process is a dead process.
    fn died_instead(&self, err: VmmError) -> VmmError {
        match (err, self.process.exited()) {
            (VmmError::Connection(_), Some(exit)) => {
                VmmError::Died { exit: exit.to_string(), words: self.stderr_tail() }
            }
            (err, _) => err,
        }
    }

    async fn set_up(&self, boot: &Boot) -> Result<(), VmmError> {
        let on = |name: &str| json!({ "capability": name, "state": true });
        let capabilities = json!({ "capabilities": [on("x-ignore-shared"), on("events")] });
        self.execute("migrate-set-capabilities", capabilities).await?;
        // One that is given a disk and a network card is not ready for a state before that.
        if *boot == Boot::Incoming && !self.spec.has_attachments() {
            self.wait_for_state().await?;
        }
        Ok(())
    }

    async fn wait_for_state(&self) -> Result<(), VmmError> {
        let (ours, theirs) = pair()?;
        self.pass("incoming", theirs.as_fd()).await?;
        self.execute("migrate-incoming", json!({ "uri": "fd:incoming" })).await?;
        *self.incoming.lock().unwrap_or_else(PoisonError::into_inner) = Some(ours);
        Ok(())
    }

    /// Hands QEMU a descriptor under a name.
    async fn pass(&self, name: &str, fd: BorrowedFd<'_>) -> Result<(), VmmError> {
        self.with_fd("getfd", json!({ "fdname": name }), fd).await
    }

    async fn with_fd(&self, command: &str, arguments: Value, fd: BorrowedFd<'_>) -> Result<(), VmmError> {
        self.qmp.execute_with(command, arguments, fd, COMMAND).await.map_err(|err| self.died_instead(err))?;
        Ok(())
    }

    async fn add_node(&self, node: Value) -> Result<(), VmmError> {
        self.execute("blockdev-add", node).await.map(drop)
    }

    /// Opens a raw file for reading, as node `name`. QEMU need not be able to come to it.
    async fn add_raw(&self, name: &str, set: u32, path: &Path) -> Result<(), VmmError> {
        let opened = File::open(path).map_err(file_error("open", path))?;
        self.with_fd("add-fd", json!({ "fdset-id": set }), opened.as_fd()).await?;
        self.add_node(devices::raw(name, set)).await
    }

    /// Puts a node in the place of the one that a device was started with.
    async fn put_in(&self, device: &str, node: &str, instead_of: &str) -> Result<(), VmmError> {
        let path = format!("/machine/peripheral/{device}");
        self.execute("qom-set", json!({ "path": path, "property": "drive", "value": node })).await?;
        self.remove_node(instead_of).await
    }

    /// The names of all nodes of disks.
    async fn nodes(&self) -> Result<Vec<String>, VmmError> {
        let answer = self.execute("query-named-block-nodes", json!({ "flat": true })).await?;
        let nodes = answer.as_array().ok_or_else(|| devices::lacks("query-named-block-nodes", "nodes"))?;
        Ok(nodes.iter().filter_map(|n| n.get("node-name")?.as_str().map(str::to_owned)).collect())
    }

    async fn remove_node(&self, node: &str) -> Result<(), VmmError> {
        self.execute("blockdev-del", json!({ "node-name": node })).await.map(drop)
    }

    /// A file in memory that QEMU can write a state to.
    async fn state_file(&self) -> Result<StateFile, VmmError> {
        let what = |source| VmmError::File { what: "make", path: "a file in memory".into(), source };
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let file = File::from(rustix::fs::memfd_create("state", flags).map_err(|e| what(e.into()))?);
        // QEMU takes a descriptor only for just what it was opened for.
        let written = File::options().write(true).open(format!("/proc/self/fd/{}", file.as_raw_fd())).map_err(what)?;
        let answer = self.qmp.execute_with("add-fd", Value::Null, written.as_fd(), COMMAND).await;
        let answer = answer.map_err(|err| self.died_instead(err))?;
        let set = answer.get("fdset-id").and_then(Value::as_u64);
        let set = set.ok_or_else(|| devices::lacks("add-fd", "number"))?;
        *self.state_set.lock().unwrap_or_else(PoisonError::into_inner) = Some(set);
        Ok(StateFile { file, set })
    }

    /// Puts an overlay on top of the disk, whose uppermost node is frozen thereby.
    async fn put_on_top(&self, overlay: &Path, node: &str) -> Result<(), VmmError> {
        self.add_node(devices::active(overlay, None)).await?;
        let name = DiskChain::node(overlay);
        let put = async {
            devices::mark_untouched(overlay).map_err(file_error("mark", overlay))?;
            self.execute("blockdev-snapshot", json!({ "node": node, "overlay": name })).await
        };
        let Err(err) = put.await else { return Ok(()) };
        // Refused when it is in use all the same.
        let _ = self.remove_node(&name).await;
        Err(err)
    }

    /// Stops the CPUs, freezes the disk, writes the devices.
    async fn save_into(
        &self,
        state: &StateFile,
        next: Option<NextOverlays<'_>>,
        requested: SystemTime,
    ) -> Result<SavedState, VmmError> {
        let mut events = self.qmp.events();
        self.execute("stop", Value::Null).await?;
        let mut stopped = None;
        // The event was sent before the answer.
        while let Ok(event) = events.try_recv() {
            if event.name == "STOP" {
                stopped = Some(event.at);
            }
        }
        // One that stood still already has no such event.
        let stopped_at = stopped.unwrap_or_else(SystemTime::now);
        // The CPUs stand still, no request is under way, and all that was written is in the file.
        let mut second_overlay = false;
        if let Some(NextOverlays { first, second }) = next
            && !devices::is_untouched(first).map_err(file_error("ask for", first))?
        {
            self.put_on_top(second, &DiskChain::node(first)).await?;
            second_overlay = true;
        }
        // Not `live`: with that QEMU would give its disks up, for another that takes the VM over.
        let arguments = json!({ "filename": format!("/dev/fdset/{}", state.set), "live": false });
        let written = self.qmp.execute("xen-save-devices-state", arguments, STATE).await;
        written.map_err(|err| self.died_instead(err))?;
        let completed = SystemTime::now();
        let bytes = state.bytes().map_err(|err| VmmError::State {
            what: "save",
            message: format!("what QEMU wrote can't be read: {err}"),
            words: self.stderr_tail(),
        })?;
        let between = |a: SystemTime, b: SystemTime| b.duration_since(a).unwrap_or_default();
        let (before_stop, saving) = (between(requested, stopped_at), between(stopped_at, completed));
        Ok(SavedState { bytes, stopped_at, before_stop, saving, second_overlay })
    }

    /// Waits for the end of an incoming migration.
    async fn migrated(&self, events: &mut broadcast::Receiver<Event>) -> Result<(), String> {
        let wait = async {
            loop {
                match events.recv().await {
                    Ok(event) => match (event.name.as_str(), event.data.get("status").and_then(Value::as_str)) {
                        ("MIGRATION", Some("completed")) => return Ok(()),
                        ("MIGRATION", Some(status @ ("failed" | "cancelled"))) => return Err(status.to_owned()),
                        _ => {}
                    },
                    Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => return Err("the connection is lost".to_owned()),
                }
            }
        };
        tokio::select! {
            ended = tokio::time::timeout(STATE, wait) => ended.unwrap_or_else(|_| Err(format!("no end within {STATE:?}"))),
            exit = self.process.wait() => Err(format!("QEMU ended ({exit})")),
        }
    }

    async fn add_card(&self, index: u8, mac: &str) -> Result<(), VmmError> {
        let (bus, addr) = self.spec.nic_slot(index);
        let card = json!({
            "driver": "virtio-net-pci", "id": format!("nic{index}"), "netdev": format!("net{index}"), "mac": mac,
            "romfile": "", "bus": bus, "addr": addr, "disable-modern": self.spec.is_legacy(),
        });
        self.execute("device_add", card).await.map(drop)
    }

    async fn state_error(&self, what: &'static str, message: String) -> VmmError {
        let info = self.execute("query-migrate", Value::Null).await.ok();
        let reason = info.as_ref().and_then(|i| i.get("error-desc")).and_then(Value::as_str);
        let message = reason.map_or(message.clone(), |reason| format!("{message}: {reason}"));
        VmmError::State { what, message, words: self.stderr_tail() }
    }
}

/// Where QEMU writes a state to.
#[derive(Debug)]
struct StateFile {
    file: File,
    /// QEMU's number of it.
    set: u64,
}

impl StateFile {
    /// All that was written.
    fn bytes(&self) -> io::Result<Vec<u8>> {
        let mut bytes = Vec::with_capacity(512 << 10);
        // QEMU has a position of its own.
        (&self.file).read_to_end(&mut bytes)?;
        Ok(bytes)
    }
}

fn pair() -> Result<(StdUnixStream, StdUnixStream), VmmError> {
    let (ours, theirs) = StdUnixStream::pair().map_err(VmmError::Connection)?;
    // Room for a whole state, so that neither side waits for the other. More than the limit is cut to it.
    for end in [&ours, &theirs] {
        let _ = rustix::net::sockopt::set_socket_send_buffer_size_force(end, 1 << 20);
    }
    Ok((ours, theirs))
}

#[async_trait]
impl VmProcess for QemuProcess {
    fn pid(&self) -> u32 {
        self.process.pid
    }

    fn spec(&self) -> &MachineSpec {
        &self.spec
    }

    fn paths(&self) -> &VmPaths {
        &self.paths
    }

    async fn attach_disk(&self, disk: &DiskChain) -> Result<(), VmmError> {
        match (&disk.base, disk.base.node()) {
            (Base::Raw(file), Some(name)) => self.add_raw(name, 1, file).await?,
            (Base::Nbd(socket, export), Some(name)) => self.add_node(devices::nbd(name, socket, export)).await?,
            _ => {}
        }
        let mut below = disk.base.node().map(str::to_owned);
        for layer in &disk.layers {
            self.add_node(devices::frozen(layer, below.as_deref())).await?;
            below = Some(DiskChain::node(layer));
        }
        self.add_node(devices::active(&disk.active, below.as_deref())).await?;
        self.put_in("disk0", &DiskChain::node(&disk.active), "nothing").await
    }

    async fn attach_volume(&self, index: u8, file: &Path) -> Result<(), VmmError> {
        let name = format!("volume{index}");
        self.add_raw(&name, 100 + u32::from(index), file).await?;
        self.put_in(&name, &name, &format!("no{name}")).await
    }

    async fn attach_nic(&self, nic: Nic) -> Result<(), VmmError> {
        let Nic { index, mac, tap } = nic;
        let (name, net) = (format!("tap{index}"), format!("net{index}"));
        self.pass(&name, tap.as_fd()).await?;
        self.execute("netdev_add", json!({ "type": "tap", "id": net, "fd": name })).await?;
        self.add_card(index, &mac).await
    }

    async fn replace_nic(&self, index: u8, mac: &str, limit: Duration) -> Result<(), VmmError> {
        let card = format!("nic{index}");
        let mut events = self.qmp.events();
        let gone = async {
            loop {
                match events.recv().await {
                    Ok(event) if event.name == "DEVICE_DELETED" => {
                        if event.data.get("device").and_then(Value::as_str) == Some(&card) {
                            return Ok(());
                        }
                    }
                    Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                    Err(broadcast::error::RecvError::Closed) => {
                        return Err(VmmError::Connection(io::ErrorKind::UnexpectedEof.into()));
                    }
                }
            }
        };
        // A guest that boots is deaf to it at first. A refusal says that it has heard, and is about it.
        let ask = async {
            loop {
                match self.execute("device_del", json!({ "id": card })).await {
                    Ok(_) | Err(VmmError::Refused { .. }) => tokio::time::sleep(ASK_AGAIN).await,
                    Err(err) => return Err(err),
                }
            }
        };
        let both = async {
            tokio::select! {
                gone = gone => gone,
                failed = ask => failed,
            }
        };
        let command = "device_del".to_owned();
        tokio::time::timeout(limit, both).await.map_err(|_| VmmError::Timeout { command, limit })??;
        self.add_card(index, mac).await
    }

    async fn disk_node(&self) -> Result<String, VmmError> {
        let answer = self.execute("query-block", Value::Null).await?;
        devices::node_of(&answer, "disk0").ok_or_else(|| devices::lacks("query-block", "disk"))
    }

    async fn swap_layers(&self, swap: &LayerSwap) -> Result<(), VmmError> {
        let nodes = self.nodes().await?;
        let merged = DiskChain::node(&swap.merged);
        // It may have been begun before.
        if !nodes.contains(&merged) {
            let below = swap.below.as_deref().map(DiskChain::node);
            let base = || devices::BASES.into_iter().find(|base| nodes.iter().any(|node| node == base));
            let below = below.as_deref().or_else(base);
            self.add_node(devices::frozen(&swap.merged, below)).await?;
        }
        let above = devices::frozen(&swap.above, Some(&merged));
        match self.execute("blockdev-reopen", json!({ "options": [above] })).await {
            Ok(_) => {}
            // It has changed nothing; then nobody uses the new node, unless it was taken before.
            Err(err @ VmmError::Refused { .. }) => match self.remove_node(&merged).await {
                Ok(()) => return Err(err),
                Err(VmmError::Refused { .. }) => {}
                Err(lost) => return Err(lost),
            },
            Err(err) => return Err(err),
        }
        // Uppermost first: one below another is in use until that is gone.
        for layer in swap.old.iter().rev() {
            let old = DiskChain::node(layer);
            if nodes.contains(&old)
                && let Err(err) = self.remove_node(&old).await
            {
                // Nothing is read from it any more. Its room is not free before the VM ends.
                tracing::warn!(node = old, error = %err, "a merged layer can't be closed");
                break;
            }
        }
        Ok(())
    }

    async fn disk_failure(&self) -> String {
        let mut events = self.qmp.events();
        loop {
            match events.recv().await {
                Ok(event) => {
                    if let Some(why) = devices::failure(&event.name, &event.data) {
                        return why;
                    }
                }
                Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
            }
        }
    }

    async fn reset(&self) {
        let mut events = self.qmp.events();
        loop {
            match events.recv().await {
                Ok(event) if event.name == "RESET" => return,
                Ok(_) | Err(broadcast::error::RecvError::Lagged(_)) => {}
                Err(broadcast::error::RecvError::Closed) => std::future::pending().await,
            }
        }
    }

    async fn save_state(&self, next: Option<NextOverlays<'_>>) -> Result<SavedState, VmmError> {
        let requested = SystemTime::now();
        if let Some(next) = next {
            self.put_on_top(next.first, &self.disk_node().await?).await?;
        }
        let saved = match self.state_file().await {
            Ok(file) => self.save_into(&file, next, requested).await,
            Err(err) => Err(err),
        };
        if saved.is_err() {
            // The guest runs on, whatever happened.
            let _ = self.cont().await;
        }
        saved
    }

    async fn start_when_loaded(&self) -> Result<(), VmmError> {
        // While a state is waited for, this says what is to be done after it.
        self.execute("cont", Value::Null).await.map(drop)
    }

    async fn load_state(&self, state: &[u8]) -> Result<(), VmmError> {
        let take = || self.incoming.lock().unwrap_or_else(PoisonError::into_inner).take();
        let mut stream = take();
        if stream.is_none() && self.spec.has_attachments() {
            self.wait_for_state().await?;
            stream = take();
        }
        let Some(stream) = stream else {
            let message = "the VM does not wait for a state".to_owned();
            return Err(VmmError::State { what: "load", message, words: String::new() });
        };
        let mut events = self.qmp.events();
        let write = async {
            stream.set_nonblocking(true)?;
            let mut stream = tokio::net::UnixStream::from_std(stream)?;
            stream.write_all(state).await?;
            stream.shutdown().await
        };
        let loaded = self.migrated(&mut events);
        // What was not written is missed by QEMU, which says so.
        match tokio::join!(tokio::time::timeout(STATE, write), loaded).1 {
            Ok(()) => Ok(()),
            Err(message) => Err(self.state_error("load", message).await),
        }
    }

    async fn stop(&self) -> Result<(), VmmError> {
        self.execute("stop", Value::Null).await.map(drop)
    }

    async fn cont(&self) -> Result<Resumed, VmmError> {
        let mut events = self.qmp.events();
        self.execute("cont", Value::Null).await?;
        // The event was sent before the answer.
        let mut at = None;
        while let Ok(event) = events.try_recv() {
            if event.name == "RESUME" {
                at = Some(event.at);
            }
        }
        let resumed = Resumed { at: at.unwrap_or_else(SystemTime::now) };
        // Not while the guest stands still.
        let written = self.state_set.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(set) = written {
            self.execute("remove-fd", json!({ "fdset-id": set })).await?;
        }
        Ok(resumed)
    }

    async fn generation_id(&self) -> Result<String, VmmError> {
        let answer = self.execute("query-vm-generation-id", Value::Null).await?;
        Ok(answer.get("guid").and_then(Value::as_str).unwrap_or_default().to_owned())
    }

    fn is_alive(&self) -> bool {
        self.process.is_alive()
    }

    async fn query_status(&self) -> Result<String, VmmError> {
        let answer = self.execute("query-status", Value::Null).await?;
        Ok(answer.get("status").and_then(Value::as_str).unwrap_or("unknown").to_owned())
    }

    async fn quit(&self) -> Result<(), VmmError> {
        // It may be gone before its answer.
        let _ = self.execute("quit", Value::Null).await;
        let _ = tokio::time::timeout(QUIT, self.process.wait()).await;
        self.kill().await
    }

    async fn kill(&self) -> Result<(), VmmError> {
        if !self.process.kill(KILL).await {
            return Err(VmmError::Timeout { command: "SIGKILL".to_owned(), limit: KILL });
        }
        let VmPaths { qmp, agent, console, shim, ram, record, .. } = &self.paths;
        for path in [qmp, agent, console, shim, ram, record] {
            let _ = fs::remove_file(path);
        }
        Ok(())
    }

    async fn wait_exit(&self) -> ExitInfo {
        self.process.wait().await
    }

    fn stderr_tail(&self) -> String {
        tail(&self.paths.log)
    }
}

/// The last lines of a log, at most 2 KiB.
fn tail(log: &Path) -> String {
    let read = || -> io::Result<String> {
        use std::os::unix::fs::FileExt;
        let file = File::open(log)?;
        let len = file.metadata()?.len();
        let mut bytes = vec![0; usize::try_from(len.min(2048)).unwrap_or(2048)];
        let start = len - bytes.len() as u64;
        file.read_exact_at(&mut bytes, start)?;
        Ok(String::from_utf8_lossy(&bytes).trim().to_owned())
    };
    match read() {
        Ok(text) if !text.is_empty() => text,
        _ => "none".to_owned(),
    }
}
