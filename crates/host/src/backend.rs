//! How QEMU and guest images are used: the only module that knows `ramet_vmm` and `ramet_image` in detail.

use std::{
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant, SystemTime},
};

use ramet_client::api::{
    AccelKind, DoctorReport, ErrorCode, Finding, FindingStatus, GuestImage, PeerBoot, PoolEntry, VmState,
};
use ramet_image::ImageStore;
use ramet_memory::ByteSize;
use ramet_vmm::{
    Accel, AgentPort, ExitInfo, MachineSpec, NextOverlays, Pool, PoolConfig, VmProcess, Vmm, VmmConfig, VmmError,
    doctor as probe,
};

use crate::{
    config::Config,
    error::{ApiError, ApiResult},
    names::shown,
};

/// Most pre-started QEMUs, of all shapes.
const POOL_MOST: usize = 64;
/// How long no clone must have been asked for before the pool is refilled.
const POOL_QUIET: Duration = Duration::from_millis(500);
/// How long pre-started QEMUs may take to be ready.
const WARM_LIMIT: Duration = Duration::from_secs(120);

/// How QEMU is started.
#[must_use]
pub fn vmm_config(config: &Config) -> VmmConfig {
    VmmConfig {
        qemu: config.qemu.clone(),
        shim: Some(config.bin_dir.join("libramet_shim.so")),
        user: config.qemu_user,
        sandbox: config.sandbox,
    }
}

/// How pre-started QEMUs are kept.
#[must_use]
pub fn pool_config(config: &Config) -> PoolConfig {
    PoolConfig { dir: config.pool_dir(), most: POOL_MOST, quiet: POOL_QUIET }
}

/// The API's word for an accelerator.
#[must_use]
pub fn accel_kind(accel: Accel) -> AccelKind {
    match accel {
        Accel::Tcg => AccelKind::Tcg,
        Accel::Kvm => AccelKind::Kvm,
    }
}

/// The accelerator that a request names.
#[must_use]
pub fn accel(kind: AccelKind) -> Accel {
    match kind {
        AccelKind::Tcg => Accel::Tcg,
        AccelKind::Kvm => Accel::Kvm,
    }
}

/// A machine. A tiny guest has its agent on the second serial port, and needs no more than a plain CPU.
#[must_use]
pub fn machine_spec(
    machine: &str,
    memory: ByteSize,
    cpus: u8,
    accel: Accel,
    cpu: Option<String>,
    tiny: bool,
) -> MachineSpec {
    MachineSpec {
        machine: machine.to_owned(),
        memory,
        cpus,
        accel,
        cpu: cpu.or_else(|| tiny.then(|| "qemu64".to_owned())),
        agent: if tiny { AgentPort::IsaSerial } else { AgentPort::VirtioSerial },
        disk: None,
        volumes: 0,
        nics: 0,
    }
}

// ---------------------------------------------------------------------------------------------------- processes

fn failed(what: &str, err: impl std::error::Error + Send + Sync + 'static) -> ApiError {
    ApiError::failed(what.to_owned(), err)
}

/// What a checkpoint saves of a VMM.
#[derive(Debug)]
pub struct Saved {
    /// The devices' state.
    pub bytes: Vec<u8>,
    /// When the CPUs stopped, by QEMU's clock.
    pub stopped: SystemTime,
    /// The second of the overlays for its disk is in use.
    pub second_overlay: bool,
}

/// Saves a VM's devices. The VM stands still afterwards. `next`: the overlays that take its disk's place.
///
/// # Errors
/// When QEMU fails; the VM may stand still or run.
pub async fn save_state(process: &Arc<dyn VmProcess>, next: Option<NextOverlays<'_>>) -> ApiResult<Saved> {
    let saved = process.save_state(next).await.map_err(|e| failed("The devices could not be saved", e))?;
    Ok(Saved { bytes: saved.bytes, stopped: saved.stopped_at, second_overlay: saved.second_overlay })
}

/// Lets a VM go on, and tells when it did, by QEMU's clock.
///
/// # Errors
/// When QEMU fails.
pub async fn cont(process: &Arc<dyn VmProcess>) -> ApiResult<SystemTime> {
    process.cont().await.map(|resumed| resumed.at).map_err(|e| failed("QEMU could not go on", e))
}

/// Has a VM go on by itself once its devices are loaded.
///
/// # Errors
/// When QEMU fails.
pub async fn start_when_loaded(process: &Arc<dyn VmProcess>) -> ApiResult<()> {
    process.start_when_loaded().await.map_err(|e| failed("QEMU could not be prepared", e))
}

/// Loads a VM's devices.
///
/// # Errors
/// When QEMU does not take them.
pub async fn load_state(process: &Arc<dyn VmProcess>, state: &[u8]) -> ApiResult<()> {
    process.load_state(state).await.map_err(|e| failed("The devices could not be loaded", e))
}

/// A VMM that was started before, once it answers.
#[derive(Debug)]
pub enum Reattached {
    /// It runs, and answers.
    Answers(Arc<dyn VmProcess>),
    /// It runs, and does not answer: why not.
    Silent(String),
    /// It runs no more.
    Gone,
}

/// Looks for a VMM that was started before, and waits at most `limit` for its answer.
pub async fn reattach(vmm: &Arc<dyn Vmm>, dir: &Path, limit: Duration) -> Reattached {
    match vmm.reattach(dir, limit).await {
        Ok(process) => Reattached::Answers(Arc::from(process)),
        Err(VmmError::Gone { .. }) => Reattached::Gone,
        Err(err) => Reattached::Silent(format!("{:#}", anyhow::Error::from(err))),
    }
}

/// A QEMU out of the pool.
pub struct FromPool {
    /// Its process.
    pub process: Arc<dyn VmProcess>,
    /// Its files.
    pub dir: PathBuf,
    /// It was ready.
    pub warm: bool,
}

impl std::fmt::Debug for FromPool {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FromPool").field("dir", &self.dir).field("warm", &self.warm).finish_non_exhaustive()
    }
}

/// Takes a QEMU of this shape: one that is ready, or a new one.
///
/// # Errors
/// When QEMU does not start.
pub async fn claim(pool: &Pool, spec: &MachineSpec) -> ApiResult<FromPool> {
    let claimed = pool.claim(spec).await.map_err(|e| failed("No QEMU could be had", e))?;
    let dir = claimed.process.paths().dir.clone();
    Ok(FromPool { process: Arc::from(claimed.process), dir, warm: claimed.was_warm })
}

/// Has QEMUs of this shape made ready.
///
/// # Errors
/// When they are not ready in time.
pub async fn warm(pool: &Pool, spec: &MachineSpec, count: u32, wait: bool) -> ApiResult<()> {
    let count = count as usize;
    if count > POOL_MOST {
        return Err(ApiError::new(
            ErrorCode::LimitReached,
            format!("{count} QEMUs are over the pool's limit of {POOL_MOST}"),
        )
        .remedy("ask for fewer"));
    }
    spec.check().map_err(|e| ApiError::new(ErrorCode::BadRequest, e.to_string()))?;
    pool.warm(spec, count);
    let deadline = Instant::now() + WARM_LIMIT;
    while wait && pool.ready(spec) < count {
        if Instant::now() > deadline {
            return Err(ApiError::internal(format!("{} of {count} QEMUs were ready in time", pool.ready(spec))));
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    Ok(())
}

/// What is in the pool of these shapes.
pub fn pool_entries(pool: &Pool, host: &str, shapes: impl IntoIterator<Item = MachineSpec>) -> Vec<PoolEntry> {
    let entry = |spec: MachineSpec| PoolEntry {
        host: host.to_owned(),
        shape: format!("{} {} {} CPU {:?}", spec.machine, spec.memory, spec.cpus, spec.accel).to_lowercase(),
        ready: u32::try_from(pool.ready(&spec)).unwrap_or(u32::MAX),
    };
    shapes.into_iter().map(entry).collect()
}

/// What the end of a QEMU that nobody wanted means.
#[must_use]
pub fn judge_exit(exit: &ExitInfo, stderr: &str) -> (VmState, String) {
    if exit.code == Some(0) {
        return (VmState::Stopped, "the guest shut down".to_owned());
    }
    let how = match (exit.code, exit.signal) {
        (_, Some(signal)) => format!("QEMU was ended by signal {signal}"),
        (Some(code), _) => format!("QEMU ended with exit code {code}"),
        // Only its parent learns how a process ended, and that was the daemon before.
        _ => "QEMU ended".to_owned(),
    };
    let last = stderr.lines().rev().find(|l| !l.trim().is_empty() && *l != "none").map(shown);
    (VmState::Crashed, last.map_or(how.clone(), |line| format!("{how}: {line}")))
}

// ------------------------------------------------------------------------------------------------------- doctor

/// KVM when it is really usable, else TCG.
pub async fn choose_accel(config: &Config) -> Accel {
    probe::choose_accel(&doctor_config(config)).await
}

fn doctor_config(config: &Config) -> probe::DoctorConfig {
    let tiny = ImageStore::new(&config.image_dir).load("tiny").ok().map(|image| image.kernel());
    probe::DoctorConfig { qemu: config.qemu.clone(), tiny_guest: tiny, user: config.qemu_user }
}

/// What this host can do.
pub async fn doctor(config: &Config) -> DoctorReport {
    let findings = probe::probe(&doctor_config(config)).await.into_iter().map(|f| Finding {
        name: f.name,
        status: match f.status {
            probe::Status::Ok => FindingStatus::Ok,
            probe::Status::Warn => FindingStatus::Warn,
            probe::Status::Fail => FindingStatus::Fail,
        },
        detail: f.detail,
        remedy: f.remedy,
    });
    DoctorReport { findings: findings.collect() }
}

// ------------------------------------------------------------------------------------------------- guest images

/// What a VM is booted from.
#[derive(Debug, Clone)]
pub struct BootImage {
    /// `linux` or `tiny`.
    pub guest: String,
    /// The tiny guest.
    pub tiny: bool,
    /// Kernel.
    pub kernel: PathBuf,
    /// Initial RAM file system.
    pub initrd: Option<PathBuf>,
    /// Kernel command line.
    pub cmdline: String,
    /// The root disk.
    pub disk: Option<GoldenDisk>,
    /// Kernel and initial RAM file system by their contents.
    pub files: PeerBoot,
}

/// An image's disk.
#[derive(Debug, Clone)]
pub struct GoldenDisk {
    /// The raw file.
    pub path: PathBuf,
    /// Its size.
    pub size: ByteSize,
    /// The hash of its contents.
    pub hash: String,
}

fn golden_disk(image: &ramet_image::Image) -> Option<GoldenDisk> {
    let record = image.manifest.disk.as_ref()?;
    Some(GoldenDisk { path: image.disk()?, size: ByteSize(record.size), hash: record.xxh3_128.clone() })
}

/// The file of the disk with these contents: of the image of this name, or of another one.
///
/// # Errors
/// When images can't be listed.
pub async fn find_disk(store: &Arc<ImageStore>, image: &str, hash: &str) -> ApiResult<Option<PathBuf>> {
    let (images, image, hash) = (store.clone(), image.to_owned(), hash.to_owned());
    let find = move || -> anyhow::Result<Option<PathBuf>> {
        let of = |name: &str| images.load(name).ok().and_then(|i| golden_disk(&i)).filter(|d| d.hash == hash);
        if let Some(disk) = of(&image) {
            return Ok(Some(disk.path));
        }
        let others = images.list()?.into_iter().filter(|m| m.disk.as_ref().is_some_and(|d| d.xxh3_128 == hash));
        Ok(others.filter_map(|m| of(&m.name)).map(|d| d.path).next())
    };
    let found = tokio::task::spawn_blocking(find).await;
    found
        .map_err(|e| ApiError::internal(format!("Looking for a disk broke: {e}")))?
        .map_err(|e| ApiError::failed("Failed to list images", e))
}

/// The kernel or initial file system with these contents, of any image.
///
/// # Errors
/// When images can't be listed.
pub async fn find_boot_file(store: &Arc<ImageStore>, hash: &str) -> ApiResult<Option<PathBuf>> {
    let (images, hash) = (store.clone(), hash.to_owned());
    let find = move || -> anyhow::Result<Option<PathBuf>> {
        let of = |image: &ramet_image::Image| {
            let (kernel, initrd) = (&image.manifest.kernel, image.manifest.initrd.as_ref());
            let is_initrd = initrd.is_some_and(|f| f.xxh3 == hash);
            if kernel.xxh3 == hash { Some(image.kernel()) } else { is_initrd.then(|| image.initrd()).flatten() }
        };
        let has = |m: &ramet_image::Manifest| {
            m.kernel.xxh3 == hash || m.initrd.as_ref().is_some_and(|initrd| initrd.xxh3 == hash)
        };
        let found = images.list()?.into_iter().filter(has);
        // Loading holds them against their hashes.
        Ok(found.filter_map(|m| of(&images.load(&m.name).ok()?)).next())
    };
    let found = tokio::task::spawn_blocking(find).await;
    found
        .map_err(|e| ApiError::internal(format!("Looking for a kernel broke: {e}")))?
        .map_err(|e| ApiError::failed("Failed to list images", e))
}

/// Looks an image up, and checks that its files are whole.
///
/// # Errors
/// [`ErrorCode::NotFound`] when there is none of that name; an error that names the file when one is missing or cut.
pub async fn load_image(store: &Arc<ImageStore>, name: &str) -> ApiResult<BootImage> {
    let (images, wanted) = (store.clone(), name.to_owned());
    let loaded = tokio::task::spawn_blocking(move || images.load(&wanted)).await;
    let loaded = loaded.map_err(|e| ApiError::internal(format!("Reading image '{}' broke: {e}", shown(name))))?;
    let image = loaded.map_err(|e| {
        let mut text = e.to_string();
        if let Some(first) = text.get_mut(..1) {
            first.make_ascii_uppercase();
        }
        ApiError::new(ErrorCode::NotFound, text)
            .remedy("`ramet image ls` lists images, `ramet image build` makes the default one")
    })?;
    let tiny = matches!(image.manifest.kind, ramet_image::Kind::Tiny);
    Ok(BootImage {
        guest: image.manifest.kind.to_string(),
        tiny,
        kernel: image.kernel(),
        initrd: image.initrd(),
        disk: golden_disk(&image),
        files: PeerBoot {
            kernel: image.manifest.kernel.xxh3.clone(),
            initrd: image.manifest.initrd.as_ref().map(|f| f.xxh3.clone()),
            cmdline: image.manifest.cmdline.clone(),
        },
        cmdline: image.manifest.cmdline,
    })
}

/// All images, the unusable ones with the reason.
///
/// # Errors
/// When the directory can't be read.
pub async fn list_images(store: &Arc<ImageStore>) -> ApiResult<Vec<GuestImage>> {
    let images = store.clone();
    let list = move || -> anyhow::Result<Vec<GuestImage>> {
        let described = images.list()?.into_iter().map(|manifest| match images.load(&manifest.name) {
            Ok(image) => {
                GuestImage { guest: manifest.kind.to_string(), bytes: image.size(), name: manifest.name, error: None }
            }
            Err(err) => {
                GuestImage { guest: String::new(), bytes: 0, name: manifest.name, error: Some(err.to_string()) }
            }
        });
        Ok(described.collect())
    };
    let listed = tokio::task::spawn_blocking(list).await;
    listed
        .map_err(|e| ApiError::internal(format!("Listing images broke: {e}")))?
        .map_err(|e| ApiError::failed("Failed to list images", e))
}
