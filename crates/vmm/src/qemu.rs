//! Stock QEMU as a VMM.
//!
//! # How a VM is frozen and loaded
//!
//! Memory is a shared file as far as QEMU knows, and capability `x-ignore-shared` leaves such memory out of migration. So a
//! migration carries the devices' state only. It is started while the guest runs: QEMU stops the CPUs itself when nothing but
//! that state is left, so the set-up of a migration, which grows with memory, is not part of the pause.
//!
//! A VM that waits for a state has its incoming migration open already, on a socket pair whose other end is here: loading
//! is writing bytes and waiting for the word that they were understood.

use crate::{
    Boot, ExitInfo, MachineSpec, Resumed, SavedState, VmPaths, VmProcess, Vmm, VmmError,
    machine::arguments,
    process::{Process, start_time},
    qmp::{Event, Qmp},
};
use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use std::{
    fs::{self, File},
    io::{self, Read},
    os::{
        fd::{AsFd, AsRawFd},
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

/// `vmm.json`.
#[derive(Debug, Serialize, Deserialize)]
struct Record {
    pid: u32,
    started: u64,
    spec: MachineSpec,
}

fn file_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> VmmError {
    let path = path.to_owned();
    move |source| VmmError::File { what, path, source }
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
        let qmp = match connect(paths, &process, START).await {
            Ok(qmp) => qmp,
            Err(err) => {
                process.kill(KILL).await;
                return Err(err);
            }
        };
        let record = Record { pid: process.pid, started: process.started, spec: spec.clone() };
        let started = QemuProcess::new(paths.clone(), spec.clone(), process, qmp);
        let text = serde_json::to_vec(&record).map_err(io::Error::other).map_err(file_error("write", &paths.record))?;
        let ready = match fs::write(&paths.record, text).map_err(file_error("write", &paths.record)) {
            Ok(()) => started.set_up(boot).await,
            Err(err) => Err(err),
        };
        if let Err(err) = ready {
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

/// The process of a VM on record. Only one that runs no more is gone.
fn find(paths: &VmPaths) -> Result<(Process, MachineSpec), VmmError> {
    let gone = || VmmError::Gone { dir: paths.dir.clone() };
    let text = fs::read(&paths.record).map_err(|_| gone())?;
    let record: Record = serde_json::from_slice(&text).map_err(|_| gone())?;
    if start_time(record.pid).ok() != Some(record.started) {
        return Err(gone());
    }
    match Process::watch(record.pid) {
        // Another process may have the number by now.
        Ok(process) if process.started != record.started => Err(gone()),
        Ok(process) => Ok((process, record.spec)),
        Err(_) if start_time(record.pid).ok() != Some(record.started) => Err(gone()),
        Err(err) => Err(file_error("watch the process of", &paths.dir)(err)),
    }
}

#[async_trait]
impl Vmm for Qemu {
    async fn launch(&self, spec: &MachineSpec, boot: Boot, dir: &Path) -> Result<Box<dyn VmProcess>, VmmError> {
        let started = self.start(spec, &boot, &VmPaths::new(dir)).await?;
        if boot != Boot::Incoming
            && let Err(err) = started.cont().await
        {
            let _ = started.kill().await;
            return Err(err);
        }
        Ok(Box::new(started))
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
        match find(&VmPaths::new(dir)) {
            Ok((process, _)) if process.kill(KILL).await => Ok(()),
            Ok(_) => Err(VmmError::Timeout { command: "SIGKILL".to_owned(), limit: KILL }),
            Err(VmmError::Gone { .. }) => Ok(()),
            Err(err) => Err(err),
        }
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
}

impl QemuProcess {
    fn new(paths: VmPaths, spec: MachineSpec, process: Process, qmp: Qmp) -> Self {
        Self { paths, spec, process, qmp, incoming: Mutex::default() }
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
        // There is little to send; a limit would only make the pause longer.
        self.execute("migrate-set-parameters", json!({ "max-bandwidth": 1u64 << 40 })).await?;
        if *boot == Boot::Incoming {
            let (ours, theirs) = pair()?;
            self.pass("incoming", theirs).await?;
            self.execute("migrate-incoming", json!({ "uri": "fd:incoming" })).await?;
            *self.incoming.lock().unwrap_or_else(PoisonError::into_inner) = Some(ours);
        }
        Ok(())
    }

    /// Hands QEMU a descriptor under a name.
    async fn pass(&self, name: &str, fd: StdUnixStream) -> Result<(), VmmError> {
        let arguments = json!({ "fdname": name });
        self.qmp.execute_with("getfd", arguments, fd.as_fd(), COMMAND).await.map_err(|err| self.died_instead(err))?;
        Ok(())
    }

    /// Waits for the end of a migration.
    async fn migrated(
        &self,
        events: &mut broadcast::Receiver<Event>,
        stopped: &mut Option<SystemTime>,
    ) -> Result<SystemTime, String> {
        let wait = async {
            loop {
                match events.recv().await {
                    Ok(event) => match (event.name.as_str(), event.data.get("status").and_then(Value::as_str)) {
                        ("STOP", _) => *stopped = Some(event.at),
                        ("MIGRATION", Some("completed")) => return Ok(event.at),
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

    async fn state_error(&self, what: &'static str, message: String) -> VmmError {
        let info = self.execute("query-migrate", Value::Null).await.ok();
        let reason = info.as_ref().and_then(|i| i.get("error-desc")).and_then(Value::as_str);
        let message = reason.map_or(message.clone(), |reason| format!("{message}: {reason}"));
        VmmError::State { what, message, words: self.stderr_tail() }
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

    async fn save_state(&self) -> Result<SavedState, VmmError> {
        let requested = SystemTime::now();
        let (ours, theirs) = pair()?;
        let mut events = self.qmp.events();
        self.pass("outgoing", theirs).await?;
        let reader = tokio::task::spawn_blocking(move || {
            let mut bytes = Vec::with_capacity(512 << 10);
            let mut ours = ours;
            ours.set_read_timeout(Some(STATE))?;
            ours.read_to_end(&mut bytes).map(|_| bytes)
        });
        let mut stopped = None;
        let ended = match self.execute("migrate", json!({ "uri": "fd:outgoing" })).await {
            Ok(_) => self.migrated(&mut events, &mut stopped).await,
            Err(err) => {
                let _ = self.execute("closefd", json!({ "fdname": "outgoing" })).await;
                Err(err.to_string())
            }
        };
        let bytes = reader.await.map_err(io::Error::other).flatten();
        match (ended, bytes) {
            (Ok(completed), Ok(bytes)) => {
                let stopped_at = stopped.unwrap_or(completed);
                let between = |a: SystemTime, b: SystemTime| b.duration_since(a).unwrap_or_default();
                let before_stop = between(requested, stopped_at);
                Ok(SavedState { bytes, stopped_at, before_stop, saving: between(stopped_at, completed) })
            }
            (ended, bytes) => {
                let message = ended.err().or(bytes.err().map(|e| e.to_string())).unwrap_or_default();
                let err = self.state_error("save", message).await;
                // The guest runs on, whatever happened.
                let _ = self.execute("cont", Value::Null).await;
                Err(err)
            }
        }
    }

    async fn start_when_loaded(&self) -> Result<(), VmmError> {
        // While a state is waited for, this says what is to be done after it.
        self.execute("cont", Value::Null).await.map(drop)
    }

    async fn load_state(&self, state: &[u8]) -> Result<(), VmmError> {
        let stream = self.incoming.lock().unwrap_or_else(PoisonError::into_inner).take();
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
        let mut stopped = None;
        let loaded = self.migrated(&mut events, &mut stopped);
        // What was not written is missed by QEMU, which says so.
        match tokio::join!(tokio::time::timeout(STATE, write), loaded).1 {
            Ok(_) => Ok(()),
            Err(message) => Err(self.state_error("load", message).await),
        }
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
        Ok(Resumed { at: at.unwrap_or_else(SystemTime::now) })
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
