//! Supervision of pagers: one process a family, which lives on when the daemon dies and is started again when it dies
//! itself. Its VMs wait meanwhile; the next pager takes them over from the family's directory.

mod control;

use std::{
    collections::BTreeMap,
    fs,
    os::fd::OwnedFd,
    os::unix::process::CommandExt as _,
    path::PathBuf,
    process::{Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::Context as _;
use ramet_memory::FamilyId;
use ramet_pager::control::StatsReport;
use rustix::process::{Pid, PidfdFlags, Signal, WaitIdOptions};
use tokio::sync::Notify;

pub use control::{Control, PagerError};

use crate::{
    config::Config,
    peers::tls::Files,
    stats::{Stats, lock},
};

/// How long a new pager may take until it answers.
const START: Duration = Duration::from_secs(10);
/// A pager that lived this long begins without back-off.
const HEALTHY: Duration = Duration::from_secs(30);
const MAX_BACKOFF: Duration = Duration::from_secs(5);

/// What kind of process serves a family.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Program {
    /// `ramet-pager`: memory.
    Pager,
    /// `ramet-disk`: frozen disks.
    Disk,
}

impl Program {
    fn name(self) -> &'static str {
        match self {
            Self::Pager => "ramet-pager",
            Self::Disk => "ramet-disk",
        }
    }

    /// For logs and counters.
    fn word(self) -> &'static str {
        match self {
            Self::Pager => "pager",
            Self::Disk => "disk_server",
        }
    }

    /// The counter of its restarts.
    fn restarts(self) -> &'static str {
        match self {
            Self::Pager => "pager_restarts",
            Self::Disk => "disk_server_restarts",
        }
    }

    /// Where its families have their directories.
    fn root(self, config: &Config) -> PathBuf {
        match self {
            Self::Pager => config.pages(),
            Self::Disk => config.disk_servers(),
        }
    }
}

/// A family's pager, or its server of frozen disks.
#[derive(Debug)]
pub struct Pager {
    /// What it is.
    program: Program,
    /// Its family.
    pub family: FamilyId,
    /// Calls to it.
    pub control: Control,
    dir: PathBuf,
    socket: PathBuf,
    /// 0: none at this moment.
    pid: AtomicU32,
    restarts: AtomicU32,
    /// It is to end: not started again.
    ending: AtomicBool,
    ended: Notify,
}

impl Pager {
    /// Its process id; none while it is being started.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        Some(self.pid.load(Ordering::Acquire)).filter(|&pid| pid != 0)
    }
    /// How often it was started again.
    #[must_use]
    pub fn restarts(&self) -> u32 {
        self.restarts.load(Ordering::Relaxed)
    }
    /// The family's directory.
    #[must_use]
    pub fn dir(&self) -> &PathBuf {
        &self.dir
    }
}

/// All pagers of the host, or all its servers of frozen disks.
#[derive(Debug)]
pub struct Pagers {
    program: Program,
    config: Arc<Config>,
    stats: Arc<Stats>,
    map: Mutex<BTreeMap<FamilyId, Arc<Pager>>>,
    starting: tokio::sync::Mutex<()>,
}

impl Pagers {
    /// None yet.
    #[must_use]
    pub fn new(program: Program, config: Arc<Config>, stats: Arc<Stats>) -> Self {
        Self { program, config, stats, map: Mutex::default(), starting: tokio::sync::Mutex::default() }
    }

    /// The family's pager, if it has one.
    #[must_use]
    pub fn get(&self, family: FamilyId) -> Option<Arc<Pager>> {
        lock(&self.map).get(&family).cloned()
    }

    /// All of them.
    #[must_use]
    pub fn all(&self) -> Vec<Arc<Pager>> {
        lock(&self.map).values().cloned().collect()
    }

    /// The family's pager: the one that runs, also from before the daemon's own start, or a new one.
    ///
    /// # Errors
    /// When it can't be started; says where its log is.
    pub async fn ensure(&self, family: FamilyId) -> anyhow::Result<Arc<Pager>> {
        if let Some(pager) = self.get(family) {
            return Ok(pager);
        }
        let _one_at_a_time = self.starting.lock().await;
        if let Some(pager) = self.get(family) {
            return Ok(pager);
        }
        let dir = self.program.root(&self.config).join(family.to_string());
        fs::create_dir_all(&dir).with_context(|| format!("Failed to make {}", dir.display()))?;
        let socket = dir.join("control.sock");
        let pager = Arc::new(Pager {
            program: self.program,
            family,
            control: Control::new(&socket),
            dir,
            socket,
            pid: AtomicU32::new(0),
            restarts: AtomicU32::new(0),
            ending: AtomicBool::new(false),
            ended: Notify::new(),
        });
        // Without a socket there is no pager of the daemon before.
        let found = match pager.socket.exists() {
            true => pager.control.ping(Duration::from_millis(200)).await.ok(),
            false => None,
        };
        if let Some(warning) = found.as_ref().and_then(|pong| other_version(&pong.version)) {
            tracing::warn!(%family, "{warning}");
        }
        let found = found.map(|pong| pong.pid);
        let pidfd = match found.and_then(|pid| open(pid).map(|fd| (pid, fd))) {
            Some((pid, fd)) => {
                tracing::info!(%family, pid, "found the pager");
                pager.pid.store(pid, Ordering::Release);
                fd
            }
            None => {
                let fd = self.start(&pager)?;
                let answer = pager.control.ping(START).await;
                if let Err(err) = answer {
                    self.kill(&pager);
                    reap(&fd).await;
                    anyhow::bail!("{err}; its log is {}", self.log(&pager).display());
                }
                fd
            }
        };
        lock(&self.map).insert(family, pager.clone());
        tokio::spawn(supervise(self.config.clone(), self.stats.clone(), pager.clone(), pidfd));
        Ok(pager)
    }

    fn log(&self, pager: &Pager) -> PathBuf {
        log_file(&self.config, pager)
    }

    fn start(&self, pager: &Pager) -> anyhow::Result<OwnedFd> {
        start(&self.config, pager)
    }

    fn kill(&self, pager: &Pager) {
        if let Some(fd) = pager.pid().and_then(open) {
            let _ = rustix::process::pidfd_send_signal(&fd, Signal::KILL);
        }
    }

    /// Where other hosts' pagers reach this one. A pager that was started before trust was set up is started anew.
    ///
    /// # Errors
    /// When this host has no address, or the pager does not come up.
    pub async fn listen(&self, pager: &Pager) -> anyhow::Result<String> {
        if let Some(listen) = pager.control.ping(START).await?.listen {
            return Ok(listen);
        }
        let trusted = self.config.listen.is_some() && Files::new(self.config.tls()).trusted();
        anyhow::ensure!(
            trusted,
            "This host serves no pages to others: start rametd with --listen, and see `ramet host init`"
        );
        let before = pager.pid();
        self.kill(pager);
        let deadline = Instant::now() + START;
        loop {
            let pong = pager.control.ping(START).await?;
            if let (true, Some(listen)) = (Some(pong.pid) != before, pong.listen) {
                return Ok(listen);
            }
            anyhow::ensure!(
                Instant::now() < deadline,
                "The pager does not listen; its log is {}",
                self.log(pager).display()
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Ends a family's pager and removes its pages.
    pub async fn end(&self, family: FamilyId) {
        let Some(pager) = lock(&self.map).remove(&family) else { return };
        let ended = pager.ended.notified();
        tokio::pin!(ended);
        ended.as_mut().enable();
        pager.ending.store(true, Ordering::Release);
        if pager.control.shutdown().await.is_err() {
            self.kill(&pager);
        }
        if tokio::time::timeout(Duration::from_secs(5), ended.as_mut()).await.is_err() {
            self.kill(&pager);
            let _ = tokio::time::timeout(Duration::from_secs(5), ended).await;
        }
        if let Err(err) = fs::remove_dir_all(&pager.dir)
            && err.kind() != std::io::ErrorKind::NotFound
        {
            tracing::warn!(%family, error = %err, "pages of a family are left");
        }
        let _ = fs::remove_file(self.log(&pager));
    }

    /// The statistics of all pagers that answer in time.
    pub async fn stats(&self, wait: Duration) -> Vec<(Arc<Pager>, Result<StatsReport, PagerError>)> {
        let mut tasks = tokio::task::JoinSet::new();
        for pager in self.all() {
            tasks.spawn(async move {
                let report = pager.control.stats(wait).await;
                (pager, report)
            });
        }
        let mut reports = tasks.join_all().await;
        reports.sort_by_key(|(pager, _)| pager.family);
        reports
    }
}

/// What to say of a pager of another release than this daemon's, which began under the daemon before.
fn other_version(pager: &str) -> Option<String> {
    let ours = env!("CARGO_PKG_VERSION");
    (pager != ours).then(|| {
        format!(
            "The pager that runs is of version {pager}, this rametd of version {ours}: they may not understand each \
             other. Remove the family's VMs and checkpoints to end it, or run the rametd that started it"
        )
    })
}

fn log_file(config: &Config, pager: &Pager) -> PathBuf {
    config.logs().join(format!("{}-{}.log", pager.program.word(), pager.family.short()))
}

/// Starts the process, in a process group of its own: it survives the daemon, and a Ctrl-C meant for it.
fn start(config: &Config, pager: &Pager) -> anyhow::Result<OwnedFd> {
    let program = config.bin_dir.join(pager.program.name());
    let path = log_file(config, pager);
    let _ = fs::create_dir_all(config.logs());
    let log = fs::OpenOptions::new().create(true).append(true).open(&path);
    let log = log.with_context(|| format!("Failed to open {}", path.display()))?;
    let _ = fs::remove_file(&pager.socket);
    let mut command = Command::new(&program);
    match pager.program {
        Program::Pager => command.arg("--family-dir").arg(&pager.dir),
        Program::Disk => command.arg("--family").arg(pager.family.to_string()).arg("--dir").arg(&pager.dir),
    };
    command.arg("--control").arg(&pager.socket).arg("--host").arg(&config.name);
    if let Some(listen) = config.listen
        && Files::new(config.tls()).trusted()
    {
        command.arg("--listen").arg(format!("{}:0", ip_text(listen.ip()))).arg("--tls").arg(config.tls());
    }
    command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).process_group(0);
    let child = command.spawn().with_context(|| format!("Failed to start {}", program.display()))?;
    let pid = child.id();
    pager.pid.store(pid, Ordering::Release);
    open(pid).with_context(|| format!("The pager died at once; its log is {}", path.display()))
}

fn ip_text(ip: std::net::IpAddr) -> String {
    match ip {
        std::net::IpAddr::V4(ip) => ip.to_string(),
        std::net::IpAddr::V6(ip) => format!("[{ip}]"),
    }
}

fn open(pid: u32) -> Option<OwnedFd> {
    let pid = Pid::from_raw(i32::try_from(pid).ok()?)?;
    rustix::process::pidfd_open(pid, PidfdFlags::NONBLOCK).ok()
}

/// Waits for the end of a process, and takes its exit status when it is a child.
async fn reap(pidfd: &OwnedFd) {
    let (ended, end) = tokio::sync::oneshot::channel();
    if let Ok(fd) = pidfd.try_clone() {
        let wait = move || {
            use std::os::fd::AsFd as _;
            let _ = ramet_kernel::pidfd_wait(fd.as_fd(), None);
            let _ = ended.send(());
        };
        // A thread of its own: it may wait for days, and must not hold up the runtime's end.
        if std::thread::Builder::new().name("pager-watch".into()).spawn(wait).is_ok() {
            let _ = end.await;
        }
    }
    use std::os::fd::AsFd as _;
    let _ = rustix::process::waitid(
        rustix::process::WaitId::PidFd(pidfd.as_fd()),
        WaitIdOptions::EXITED | WaitIdOptions::NOHANG,
    );
}

async fn supervise(config: Arc<Config>, stats: Arc<Stats>, pager: Arc<Pager>, mut pidfd: OwnedFd) {
    let mut backoff = Duration::ZERO;
    let mut started = Instant::now();
    loop {
        reap(&pidfd).await;
        pager.pid.store(0, Ordering::Release);
        if pager.ending.load(Ordering::Acquire) {
            pager.ended.notify_waiters();
            return;
        }
        if started.elapsed() > HEALTHY {
            backoff = Duration::ZERO;
        }
        let program = pager.program.name();
        tracing::warn!(program, family = %pager.family, after_ms = backoff.as_millis(), "it died; starting the next one");
        stats.count(pager.program.restarts());
        pager.restarts.fetch_add(1, Ordering::Relaxed);
        loop {
            tokio::time::sleep(backoff).await;
            backoff = (backoff * 2).clamp(Duration::from_millis(50), MAX_BACKOFF);
            if pager.ending.load(Ordering::Acquire) {
                pager.ended.notify_waiters();
                return;
            }
            match start(&config, &pager) {
                Ok(fd) => {
                    pidfd = fd;
                    break;
                }
                Err(err) => tracing::error!(family = %pager.family, "{err:#}"),
            }
        }
        started = Instant::now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pager_of_another_release_is_named_with_both_versions() {
        assert_eq!(other_version(env!("CARGO_PKG_VERSION")), None);
        let warning = other_version("9.8.7").unwrap();
        assert!(warning.contains("9.8.7") && warning.contains(env!("CARGO_PKG_VERSION")), "{warning}");
    }
}
