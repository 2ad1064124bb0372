//! VMMs that are started and wait: a clone takes one instead of starting it.

use crate::{Boot, MachineSpec, VmProcess, Vmm, VmmError};
use ramet_memory::VmId;
use std::{
    collections::HashMap,
    fs,
    path::PathBuf,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::sync::Notify;

/// Settings of a pool.
#[derive(Debug, Clone)]
pub struct PoolConfig {
    /// Where members have their directories.
    pub dir: PathBuf,
    /// Most members altogether.
    pub most: usize,
    /// How long no clone must have been claimed before the pool is refilled: starting a VMM takes a core that clones
    /// need more.
    pub quiet: Duration,
}

/// A VMM for a clone.
#[derive(Debug)]
pub struct Claimed {
    /// It waits for [`VmProcess::load_state`].
    pub process: Box<dyn VmProcess>,
    /// Whether it had been started before it was asked for.
    pub was_warm: bool,
}

/// Waiting VMMs, by machine.
#[derive(Debug)]
pub struct Pool {
    vmm: Arc<dyn Vmm>,
    config: PoolConfig,
    inner: Mutex<Inner>,
    changed: Notify,
    ending: AtomicBool,
}

#[derive(Debug)]
struct Inner {
    members: HashMap<MachineSpec, Vec<Box<dyn VmProcess>>>,
    /// How many are wanted of a machine, the machine wanted last at the end.
    wanted: Vec<(MachineSpec, usize)>,
    last_claim: Option<Instant>,
    starting: usize,
}

impl Pool {
    /// An empty pool, which fills itself in the background once it is told what is wanted. To be made inside a runtime.
    pub fn new(vmm: Arc<dyn Vmm>, config: PoolConfig) -> Arc<Self> {
        let inner = Inner { members: HashMap::new(), wanted: Vec::new(), last_claim: None, starting: 0 };
        let pool = Arc::new(Self {
            vmm,
            config,
            inner: Mutex::new(inner),
            changed: Notify::new(),
            ending: AtomicBool::new(false),
        });
        let weak = Arc::downgrade(&pool);
        tokio::spawn(async move {
            while let Some(pool) = weak.upgrade() {
                if pool.ending.load(Ordering::Acquire) {
                    return;
                }
                let pause = pool.refill_one().await;
                let wait = tokio::time::timeout(pause, pool.changed.notified());
                let _ = wait.await;
            }
        });
        pool
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps `count` members of a machine ready from now on. Machines that were wanted longest ago give way when there
    /// would be too many.
    pub fn warm(&self, spec: &MachineSpec, count: usize) {
        let mut inner = self.lock();
        let before = inner.wanted.iter().position(|(s, _)| s == spec);
        let count = before.map_or(count, |i| inner.wanted.remove(i).1.max(count));
        inner.wanted.push((spec.clone(), count.min(self.config.most)));
        while inner.wanted.iter().map(|(_, n)| n).sum::<usize>() > self.config.most && inner.wanted.len() > 1 {
            inner.wanted.remove(0);
        }
        drop(inner);
        self.changed.notify_one();
    }

    /// How many members of a machine are ready.
    #[must_use]
    pub fn ready(&self, spec: &MachineSpec) -> usize {
        self.lock().members.get(spec).map_or(0, Vec::len)
    }

    /// Takes a member, or starts a VMM when none is ready.
    ///
    /// # Errors
    /// As [`Vmm::launch`].
    pub async fn claim(&self, spec: &MachineSpec) -> Result<Claimed, VmmError> {
        loop {
            let member = {
                let mut inner = self.lock();
                inner.last_claim = Some(Instant::now());
                inner.members.get_mut(spec).and_then(Vec::pop)
            };
            let Some(process) = member else { break };
            // A member may have died while it waited. One that hangs is found out by what it is asked to do next.
            if process.is_alive() {
                return Ok(Claimed { process, was_warm: true });
            }
            discard(process).await;
        }
        let process = self.vmm.launch(spec, Boot::Incoming, &self.member_dir()).await?;
        self.lock().last_claim = Some(Instant::now());
        Ok(Claimed { process, was_warm: false })
    }

    fn member_dir(&self) -> PathBuf {
        self.config.dir.join(VmId::random().to_string())
    }

    /// Starts one member, or ends one that is not wanted, if it is quiet. Returns how long to wait before the next.
    async fn refill_one(&self) -> Duration {
        const LONG: Duration = Duration::from_secs(3600);
        let (surplus, missing) = {
            let mut inner = self.lock();
            if let Some(quiet) = inner.last_claim.map(|at| at.elapsed())
                && quiet < self.config.quiet
            {
                return self.config.quiet.saturating_sub(quiet);
            }
            let Inner { members, wanted, .. } = &mut *inner;
            let number = |spec: &MachineSpec| wanted.iter().find(|(s, _)| s == spec).map_or(0, |(_, n)| *n);
            let surplus =
                members.iter_mut().find(|(spec, list)| list.len() > number(spec)).and_then(|(_, list)| list.pop());
            let missing = wanted
                .iter()
                .rev()
                .find(|(spec, n)| members.get(spec).map_or(0, Vec::len) < *n)
                .map(|(s, _)| s.clone());
            if missing.is_some() {
                inner.starting += 1;
            }
            (surplus, missing)
        };
        let idle = surplus.is_none() && missing.is_none();
        if let Some(process) = surplus {
            discard(process).await;
        }
        if let Some(spec) = missing {
            let started = self.vmm.launch(&spec, Boot::Incoming, &self.member_dir()).await;
            let late = {
                let mut inner = self.lock();
                inner.starting -= 1;
                match started {
                    Ok(process) if !self.ending.load(Ordering::Acquire) => {
                        inner.members.entry(spec).or_default().push(process);
                        None
                    }
                    Ok(process) => Some(process),
                    Err(err) => {
                        tracing::warn!(error = %err, "a VMM for the pool could not be started");
                        return Duration::from_secs(2);
                    }
                }
            };
            if let Some(process) = late {
                discard(process).await;
            }
        }
        if idle { LONG } else { Duration::ZERO }
    }

    /// Ends all members and refills no more.
    pub async fn drain(&self) {
        self.ending.store(true, Ordering::Release);
        self.changed.notify_one();
        loop {
            let members: Vec<_> = {
                let mut inner = self.lock();
                inner.wanted.clear();
                inner.members.drain().flat_map(|(_, list)| list).collect()
            };
            for process in members {
                discard(process).await;
            }
            if self.lock().starting == 0 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

async fn discard(process: Box<dyn VmProcess>) {
    if let Err(err) = process.kill().await {
        tracing::warn!(error = %err, "a VMM of the pool does not end");
    }
    let _ = fs::remove_dir_all(&process.paths().dir);
}
