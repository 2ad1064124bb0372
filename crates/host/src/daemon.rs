//! The daemon: everything that lives as long as the process, and the operations that every part shares.

use std::{
    collections::HashMap,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::Context as _;
use ramet_client::api::{AccelKind, ErrorCode, HostInfo, HostList};
use ramet_image::ImageStore;
use ramet_memory::{FamilyId, ImageId, VmId};
use ramet_vmm::{Accel, Pool, Vmm};
use tokio::sync::{OnceCell, watch};

use crate::{
    config::Config,
    disks::Disks,
    error::{ApiError, ApiResult},
    leases::Leases,
    memory::{self, HostMemory},
    nets::Nets,
    pagers::{Pager, Pagers, Program},
    peers::{Peers, join::Tokens, tls::Files},
    prepared::Shelf,
    state::{FamilyRecord, Store},
    stats::{Stats, lock},
    vms::Running,
};

/// How the daemon is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ending {
    /// VMs and pagers go on; the next daemon finds them.
    LeaveVms,
    /// All VMs and pagers end, and the page files are unmounted.
    StopVms,
}

/// The daemon. Its operations are in the modules [`crate::vms`], [`crate::checkpoints`], [`crate::clone`],
/// [`crate::remote`], [`crate::leases`] and [`crate::recover`].
pub struct Daemon {
    /// What it was told.
    pub config: Arc<Config>,
    /// What it remembers.
    pub store: Store,
    /// What it counts.
    pub stats: Arc<Stats>,
    /// The pagers.
    pub pagers: Pagers,
    /// How VMs are run.
    pub vmm: Arc<dyn Vmm>,
    /// Pre-started VMMs.
    pub pool: Arc<Pool>,
    /// Guest images.
    pub images: Arc<ImageStore>,
    /// Other hosts.
    pub peers: Arc<Peers>,
    /// Tokens given out.
    pub tokens: Tokens,
    /// Leases.
    pub leases: Leases,
    /// Servers of frozen disks.
    pub disk_servers: Pagers,
    pub(crate) disks: Disks,
    pub(crate) nets: Nets,
    pub(crate) shelf: Shelf,
    /// Checkpoints that are being colored, each with its lock.
    pub(crate) coloring: Mutex<HashMap<ImageId, Arc<tokio::sync::Mutex<()>>>>,
    pub(crate) running: Mutex<HashMap<VmId, Arc<Running>>>,
    /// Held while a family is given a pager or loses it.
    families: tokio::sync::Mutex<()>,
    accel: OnceCell<Accel>,
    ending: watch::Sender<Option<Ending>>,
    trusted: watch::Sender<bool>,
    listening: watch::Sender<bool>,
}

impl std::fmt::Debug for Daemon {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Daemon").field("config", &self.config).finish_non_exhaustive()
    }
}

impl Daemon {
    /// Prepares directories and page files, and reads what the daemon before remembered. [`Daemon::recover`] comes next.
    ///
    /// # Errors
    /// When the state can't be read, or this machine can't hold page files.
    pub fn open(config: Config) -> anyhow::Result<Arc<Self>> {
        let config = Arc::new(config);
        // QEMU's user finds its own directory below these, and can't list them.
        for dir in
            [config.state_dir.clone(), config.vms(), config.pool_dir(), config.disk_dir.clone(), config.disk_servers()]
        {
            make_dir(&dir, 0o711)?;
        }
        for dir in [config.checkpoints(), config.tls(), config.logs()] {
            make_dir(&dir, 0o700)?;
        }
        // QEMU opens kernels itself.
        fs::create_dir_all(&config.image_dir)
            .with_context(|| format!("Failed to make {}", config.image_dir.display()))?;
        memory::mount_pages(&config.pages(), config.pages_size)?;
        let stats = Arc::new(Stats::default());
        let vmm: Arc<dyn Vmm> = Arc::new(ramet_vmm::Qemu::new(crate::backend::vmm_config(&config)));
        let pool = Pool::new(vmm.clone(), crate::backend::pool_config(&config));
        let files = Files::new(config.tls());
        let trusted = files.trusted();
        Ok(Arc::new(Self {
            store: Store::open(config.state_dir.join("state.json"))?,
            pagers: Pagers::new(Program::Pager, config.clone(), stats.clone()),
            disk_servers: Pagers::new(Program::Disk, config.clone(), stats.clone()),
            disks: Disks::new(&config),
            nets: Nets::new(&config)?,
            images: Arc::new(ImageStore::new(&config.image_dir)),
            peers: Arc::new(Peers::open(&config.name, files, config.state_dir.join("peers.json"))?),
            tokens: Tokens::open(&config.tls().join("tokens.json"))?,
            leases: Leases::default(),
            shelf: Shelf::default(),
            coloring: Mutex::default(),
            running: Mutex::default(),
            families: tokio::sync::Mutex::default(),
            accel: OnceCell::new(),
            ending: watch::Sender::new(None),
            trusted: watch::Sender::new(trusted),
            listening: watch::Sender::new(false),
            stats,
            vmm,
            pool,
            config,
        }))
    }

    /// Tells the daemon to end.
    pub fn end(&self, how: Ending) {
        self.ending.send_replace(Some(how));
    }

    /// Waits until it is told to end.
    pub async fn ended(&self) -> Ending {
        let mut ending = self.ending.subscribe();
        match ending.wait_for(Option::is_some).await {
            Ok(how) => (*how).unwrap_or(Ending::LeaveVms),
            Err(_) => Ending::LeaveVms,
        }
    }

    /// Waits until trust is set up.
    pub async fn trusted(&self) {
        let _ = self.trusted.subscribe().wait_for(|trusted| *trusted).await;
    }

    /// Trust has been set up: the TCP port opens. Returns when other hosts can connect.
    pub async fn trust_is_set_up(&self) {
        self.trusted.send_replace(true);
        if self.config.listen.is_some() {
            let open = async { self.listening.subscribe().wait_for(|open| *open).await.map(drop) };
            // A port that can't be opened ends the daemon, which says why.
            let _ = tokio::time::timeout(Duration::from_secs(5), open).await;
        }
    }

    /// The TCP port is open.
    pub fn port_is_open(&self) {
        self.listening.send_replace(true);
    }

    /// What new VMs run on. Probing may take seconds, the first time.
    pub async fn accel(&self) -> Accel {
        let probe = || async {
            match self.config.accel {
                Some(AccelKind::Tcg) => Accel::Tcg,
                Some(AccelKind::Kvm) => Accel::Kvm,
                None => crate::backend::choose_accel(&self.config).await,
            }
        };
        *self.accel.get_or_init(probe).await
    }

    /// The VM that is meant by a name, an id or a prefix.
    ///
    /// # Errors
    /// [`ErrorCode::NotFound`], [`ErrorCode::Ambiguous`].
    pub fn find_vm(&self, wanted: &str) -> ApiResult<crate::state::VmRecord> {
        self.store.read(|s| {
            let things = s.vms.values().map(|vm| (vm, vm.id.to_string(), Some(vm.name.as_str())));
            crate::names::resolve("VM", "ramet ps", wanted, things).cloned()
        })
    }

    /// The checkpoint of this host that is meant by an id or a prefix.
    ///
    /// # Errors
    /// [`ErrorCode::NotFound`], [`ErrorCode::Ambiguous`].
    pub fn find_checkpoint(&self, wanted: &str) -> ApiResult<crate::state::CheckpointRecord> {
        self.store.read(|s| {
            let ours = s.checkpoints.values().filter(|c| c.origin.is_none() && !c.pending);
            let things = ours.map(|c| (c, c.id.to_string(), None));
            crate::names::resolve("checkpoint", "ramet checkpoint ls", wanted, things).cloned()
        })
    }

    /// The pager of a family that something has been put on record for.
    ///
    /// # Errors
    /// When it can't be started.
    pub async fn pager(&self, family: FamilyId) -> ApiResult<Arc<Pager>> {
        if let Some(pager) = self.pagers.get(family) {
            return Ok(pager);
        }
        let _held = self.families.lock().await;
        self.store.amend(|s| {
            s.families.entry(family).or_insert(FamilyRecord { id: family, network: None });
        });
        self.pagers.ensure(family).await.map_err(|e| ApiError::failed("Failed to start the pager", e))
    }

    /// Ends the pager of a family of which nothing is left.
    pub async fn tidy(self: &Arc<Self>, family: FamilyId) {
        let _held = self.families.lock().await;
        if self.store.read(|s| s.family_used(family)) {
            return;
        }
        self.pagers.end(family).await;
        self.disk_servers.end(family).await;
        self.remove_network(family).await;
        self.sweep_disks(family);
        self.store.amend(|s| {
            s.families.remove(&family);
        });
    }

    /// Refuses new VMs while the host is drained.
    ///
    /// # Errors
    /// [`ErrorCode::Draining`].
    pub fn check_not_draining(&self) -> ApiResult<()> {
        if !self.store.read(|s| s.draining) {
            return Ok(());
        }
        Err(ApiError::new(ErrorCode::Draining, format!("Host '{}' is drained: it takes no new VMs", self.config.name))
            .remedy(format!("use another host, or `ramet host drain --undo {}`", self.config.name)))
    }

    /// Refuses `count` more VMs than the host may have.
    ///
    /// # Errors
    /// [`ErrorCode::LimitReached`].
    pub fn check_vm_limit(&self, count: u32) -> ApiResult<()> {
        let limit = self.config.limits.vms;
        let alive = self.store.read(|s| s.vms.values().filter(|vm| vm.alive()).count());
        if alive as u64 + u64::from(count) <= u64::from(limit) {
            return Ok(());
        }
        Err(ApiError::new(
            ErrorCode::LimitReached,
            format!("Host '{}' has {alive} VMs; {count} more would be over its limit of {limit}", self.config.name),
        )
        .remedy("remove VMs, use another host, or start rametd with a higher --max-vms"))
    }

    /// Refuses what the host has no memory for.
    ///
    /// # Errors
    /// [`ErrorCode::NoMemory`].
    pub fn check_memory(&self, what: &str, needed: ramet_memory::ByteSize) -> ApiResult<()> {
        HostMemory::read().map_err(|e| ApiError::failed("Failed to ask for the host's memory", e))?.check(what, needed)
    }

    /// `GET /v1/info`.
    ///
    /// # Errors
    /// When the machine can't be asked.
    pub async fn info(&self) -> ApiResult<HostInfo> {
        let failed = |e| ApiError::failed("Failed to ask for the host's memory", anyhow::Error::from(e));
        let memory = HostMemory::read().map_err(failed)?;
        let (vms, checkpoints, draining) = self.store.read(|s| {
            let checkpoints = s.checkpoints.values().filter(|c| c.origin.is_none()).count();
            (s.vms.values().filter(|vm| vm.alive()).count(), checkpoints, s.draining)
        });
        Ok(HostInfo {
            name: self.config.name.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            api_version: ramet_client::api::API_VERSION,
            accel: crate::backend::accel_kind(self.accel().await),
            address: self.peers.own_address(),
            draining,
            memory_available_bytes: memory.available.bytes(),
            memory_total_bytes: memory.total.bytes(),
            pages_available_bytes: memory::room(&self.config.pages()).map_err(failed)?.bytes(),
            vms: u32::try_from(vms).unwrap_or(u32::MAX),
            checkpoints: u32::try_from(checkpoints).unwrap_or(u32::MAX),
            limits: self.config.limits.clone(),
            pid: std::process::id(),
            state_dir: self.config.state_dir.display().to_string(),
            image_dir: self.config.image_dir.display().to_string(),
        })
    }

    /// `GET /v1/hosts`.
    ///
    /// # Errors
    /// When this machine can't be asked.
    pub async fn hosts(&self) -> ApiResult<HostList> {
        let own = self.info().await?;
        let mut hosts = vec![ramet_client::api::HostEntry {
            name: own.name,
            address: own.address.unwrap_or_default(),
            this: true,
            alive: true,
            error: None,
            rtt_us: None,
            draining: own.draining,
            vms: own.vms,
            version: Some(own.version),
            accel: Some(own.accel),
        }];
        let others = self.peers.hosts().into_iter().filter(|h| h.name != self.config.name);
        let asked = others.map(|peer| {
            let peers = self.peers.clone();
            async move { peers.entry(peer).await }
        });
        let mut others = asked.collect::<tokio::task::JoinSet<_>>().join_all().await;
        others.sort_by(|a, b| a.name.cmp(&b.name));
        hosts.extend(others);
        Ok(HostList { hosts })
    }

    /// The VM's process and connections, while it has a QEMU.
    #[must_use]
    pub fn running(&self, vm: VmId) -> Option<Arc<Running>> {
        lock(&self.running).get(&vm).cloned()
    }
}

/// Runs an operation to its end even when nobody waits for it any more: a caller that hangs up in the middle of a fork
/// leaves a whole one, or none.
///
/// # Errors
/// Those of the operation; an internal error when it panicked.
pub async fn to_the_end<T: Send + 'static>(
    operation: impl Future<Output = ApiResult<T>> + Send + 'static,
) -> ApiResult<T> {
    tokio::spawn(operation).await.unwrap_or_else(|err| Err(ApiError::internal(format!("The operation broke: {err}"))))
}

/// Runs all at the same time, and gives their results in order.
pub async fn all<T: Send + 'static>(
    futures: impl IntoIterator<Item = impl Future<Output = T> + Send + 'static>,
) -> Vec<T> {
    let tasks: Vec<_> = futures.into_iter().map(tokio::spawn).collect();
    let mut results = Vec::with_capacity(tasks.len());
    for task in tasks {
        match task.await {
            Ok(result) => results.push(result),
            Err(err) => match err.try_into_panic() {
                Ok(panic) => std::panic::resume_unwind(panic),
                // Nobody ends these tasks but the runtime, which then polls nobody any more.
                Err(_) => std::future::pending().await,
            },
        }
    }
    results
}

/// Waits for what may take long, at most so long.
///
/// # Errors
/// [`ErrorCode::Internal`] naming what took too long.
pub async fn within<T>(limit: Duration, what: &str, future: impl Future<Output = T>) -> ApiResult<T> {
    tokio::time::timeout(limit, future)
        .await
        .map_err(|_| ApiError::internal(format!("{what} took longer than {} s", limit.as_secs())))
}

fn make_dir(dir: &Path, mode: u32) -> anyhow::Result<()> {
    fs::create_dir_all(dir)
        .and_then(|()| fs::set_permissions(dir, fs::Permissions::from_mode(mode)))
        .with_context(|| format!("Failed to make {}", dir.display()))
}
