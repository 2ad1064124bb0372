//! Clones made before anybody asks: QEMUs that show a checkpoint's memory and have its devices loaded, their CPUs stopped.
//! A clone of that checkpoint takes one and only has to let it go on.
//!
//! They are on no record: the pager knows them by an id that no VM has, so the next daemon removes them as it does all
//! that is on no record. Only the checkpoint's own host prepares: what comes over the network comes when it is needed.

use std::{
    collections::{BTreeSet, HashMap},
    fs,
    path::PathBuf,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

use ramet_client::api::{ErrorCode, PoolEntry, PoolStatus};
use ramet_memory::{FamilyId, ImageId, VmId};
use ramet_pager::control::View;
use ramet_vmm::VmProcess;
use tokio::{net::UnixStream, sync::Notify};

use crate::{
    backend,
    daemon::{Daemon, all},
    error::{ApiError, ApiResult},
    memory::needed_by_clones,
    state::{VmDisk, VmNic},
    stats::lock,
};

/// Most of them altogether: each is a QEMU that waits.
const MOST: usize = 16;
/// How long no clone must have been asked for before one is prepared: that takes a core which clones need more.
const QUIET: Duration = Duration::from_millis(1500);
/// How long they may take to be ready when somebody waits for them.
const WAIT: Duration = Duration::from_secs(60);

/// A clone that only has to go on.
#[derive(Debug)]
pub(crate) struct Prepared {
    /// Its name with the pager.
    pub(crate) id: VmId,
    pub(crate) family: FamilyId,
    pub(crate) process: Arc<dyn VmProcess>,
    pub(crate) dir: PathBuf,
    /// Connected to the agent's port.
    pub(crate) agent: Option<UnixStream>,
    pub(crate) disk: Option<VmDisk>,
    pub(crate) nic: Option<VmNic>,
}

/// What is prepared, and what is to be.
#[derive(Debug, Default)]
pub(crate) struct Shelf {
    inner: Mutex<Inner>,
    /// There is something to do.
    wake: Notify,
    /// What is being prepared is not wanted any more.
    stop: Notify,
    /// Held while one is prepared.
    turn: tokio::sync::Mutex<()>,
}

/// How many clones of a checkpoint are to be ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Wanted {
    image: ImageId,
    count: usize,
    /// Somebody asked for this number.
    exactly: bool,
}

#[derive(Debug, Default)]
struct Inner {
    /// Used longest ago first.
    wanted: Vec<Wanted>,
    ready: HashMap<ImageId, Vec<Prepared>>,
    /// Being removed: not to be prepared, whoever asks.
    barred: BTreeSet<ImageId>,
    making: Option<ImageId>,
    last_use: Option<Instant>,
    closed: bool,
}

impl Inner {
    /// The next one to prepare: of the checkpoint used last.
    fn missing(&self) -> Option<ImageId> {
        let ready = |image: &ImageId| self.ready.get(image).map_or(0, Vec::len);
        self.wanted.iter().rev().find(|w| ready(&w.image) < w.count).map(|w| w.image)
    }

    fn refuses(&self, image: ImageId) -> bool {
        self.closed || self.barred.contains(&image)
    }

    /// Wants so many of a checkpoint: `exactly`, as long as nobody says otherwise, or at least. Returns those that have to
    /// go for it.
    fn want(&mut self, image: ImageId, count: usize, exactly: bool) -> Vec<Prepared> {
        if self.refuses(image) {
            return Vec::new();
        }
        let before = self.wanted.iter().position(|w| w.image == image).map(|at| self.wanted.remove(at));
        let new = match before {
            _ if exactly => Wanted { image, count, exactly },
            Some(before) if before.exactly => before,
            before => Wanted { image, count: count.max(before.map_or(0, |b| b.count)), exactly },
        };
        self.wanted.push(new);
        let ready = self.ready.entry(image).or_default();
        let mut over = ready.split_off(ready.len().min(new.count));
        while self.wanted.iter().map(|w| w.count).sum::<usize>() > MOST && self.wanted.len() > 1 {
            let oldest = self.wanted.remove(0);
            over.extend(self.ready.remove(&oldest.image).unwrap_or_default());
        }
        over
    }

    fn forget(&mut self, image: ImageId) -> Vec<Prepared> {
        self.wanted.retain(|w| w.image != image);
        self.ready.remove(&image).unwrap_or_default()
    }
}

impl Shelf {
    /// Takes a clone of this checkpoint off the shelf.
    pub(crate) fn take(&self, image: ImageId) -> Option<Prepared> {
        let mut inner = lock(&self.inner);
        inner.last_use = Some(Instant::now());
        inner.ready.get_mut(&image)?.pop()
    }

    /// Places in the family's network that prepared clones have.
    pub(crate) fn nics(&self, family: FamilyId) -> Vec<VmNic> {
        let inner = lock(&self.inner);
        let ready = inner.ready.values().flatten().filter(|made| made.family == family);
        ready.filter_map(|made| made.nic.clone()).collect()
    }

    fn ready(&self, image: ImageId) -> usize {
        lock(&self.inner).ready.get(&image).map_or(0, Vec::len)
    }
}

impl Daemon {
    /// Prepares clones whenever it is quiet, until the shelf is closed: for as long as the daemon lives.
    pub(crate) async fn prepare_clones(self: Arc<Self>) {
        loop {
            let (next, rest) = {
                let inner = lock(&self.shelf.inner);
                if inner.closed {
                    return;
                }
                (inner.missing(), inner.last_use.map_or(Duration::ZERO, |at| QUIET.saturating_sub(at.elapsed())))
            };
            let Some(image) = next else {
                self.shelf.wake.notified().await;
                continue;
            };
            if !rest.is_zero() {
                tokio::time::sleep(rest).await;
                continue;
            }
            let _turn = self.shelf.turn.lock().await;
            // It may have been forgotten meanwhile; from here on that is waited for.
            {
                let mut inner = lock(&self.shelf.inner);
                if inner.missing() != Some(image) {
                    continue;
                }
                inner.making = Some(image);
            }
            let made = self.prepare(image).await;
            let mut inner = lock(&self.shelf.inner);
            inner.making = None;
            match made {
                Ok(made) => inner.ready.entry(image).or_default().push(made),
                Err(err) => {
                    tracing::warn!(checkpoint = %image, "no clone can be prepared: {err}");
                    inner.wanted.retain(|w| w.image != image);
                }
            }
        }
    }

    /// Clones of a checkpoint of this host were made: has so many prepared for the next call, when it is quiet.
    pub(crate) fn expect_clones(self: &Arc<Self>, image: ImageId, count: usize) {
        if count > 0 {
            self.want_prepared(image, count, false);
        }
    }

    fn want_prepared(self: &Arc<Self>, image: ImageId, count: usize, exactly: bool) {
        let over = lock(&self.shelf.inner).want(image, count, exactly);
        let daemon = self.clone();
        if !over.is_empty() {
            tokio::spawn(async move { daemon.discard_prepared(over).await });
        }
        self.shelf.wake.notify_one();
    }

    /// Keeps so many clones of a checkpoint of this host prepared from now on, and begins at once.
    ///
    /// # Errors
    /// When they can't be made.
    pub(crate) async fn warm_checkpoint(
        self: &Arc<Self>,
        image: ImageId,
        count: u32,
        wait: bool,
    ) -> ApiResult<PoolStatus> {
        self.check_not_draining()?;
        let count = count as usize;
        if count > MOST {
            return Err(ApiError::new(
                ErrorCode::LimitReached,
                format!("{count} prepared clones are over the limit of {MOST}"),
            )
            .remedy("ask for fewer"));
        }
        lock(&self.shelf.inner).last_use = None;
        self.want_prepared(image, count, true);
        let deadline = Instant::now() + WAIT;
        while wait && self.shelf.ready(image) < count {
            let given_up = !lock(&self.shelf.inner).wanted.iter().any(|w| w.image == image);
            if given_up || Instant::now() > deadline {
                let ready = self.shelf.ready(image);
                return Err(ApiError::internal(format!("{ready} of {count} clones could be prepared"))
                    .remedy("see rametd's log for the reason"));
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(PoolStatus { entries: vec![self.prepared_entry(image, self.shelf.ready(image))] })
    }

    /// What is prepared, of each checkpoint.
    pub(crate) fn prepared_entries(&self) -> Vec<PoolEntry> {
        let ready: Vec<_> = lock(&self.shelf.inner).ready.iter().map(|(image, list)| (*image, list.len())).collect();
        ready.into_iter().filter(|(_, n)| *n > 0).map(|(image, n)| self.prepared_entry(image, n)).collect()
    }

    fn prepared_entry(&self, image: ImageId, ready: usize) -> PoolEntry {
        PoolEntry {
            host: self.config.name.clone(),
            shape: format!("clone of checkpoint {image}"),
            ready: u32::try_from(ready).unwrap_or(u32::MAX),
        }
    }

    /// Makes one. What fails is undone.
    async fn prepare(self: &Arc<Self>, image: ImageId) -> ApiResult<Prepared> {
        let stopped = self.shelf.stop.notified();
        tokio::pin!(stopped);
        // From here on no stop is missed; one that was before has left its mark.
        stopped.as_mut().enable();
        if lock(&self.shelf.inner).refuses(image) {
            return Err(ApiError::internal("it is not wanted any more"));
        }
        let record = self.store.read(|s| s.checkpoints.get(&image).filter(|c| !c.pending).cloned());
        let record = record.ok_or_else(|| ApiError::new(ErrorCode::NotFound, "it is being made or removed"))?;
        if !record.joined.is_empty() {
            return Err(ApiError::internal("clones that join networks with a name are not prepared"));
        }
        self.check_not_draining()?;
        self.check_memory("a prepared clone", needed_by_clones(record.spec.memory, 1))?;
        let state = self.device_state(&record)?;
        let pager = self.pager(record.family).await?;
        let claimed = backend::claim(&self.pool, &record.spec).await?;
        let agent = UnixStream::connect(claimed.process.agent_socket()).await.ok();
        let id = VmId::random();
        let family = record.family;
        let disk = record.disk.clone().map(VmDisk::over);
        let mut made = Prepared { id, family, process: claimed.process, dir: claimed.dir, agent, disk, nic: None };
        let parts = async {
            if let Some(disk) = &made.disk {
                self.attach_disk(&made.process, family, disk).await?;
            }
            if record.spec.nics == 0 {
                return ApiResult::Ok(None);
            }
            let nic = self.store.update(|s| self.new_member(s, family, &[]))?;
            let tap = self.plug(family, &made.process, 0, &nic, false).await?;
            Ok(Some(VmNic { tap, ..nic }))
        };
        match parts.await {
            Ok(nic) => made.nic = nic,
            Err(err) => {
                self.discard_prepared(vec![made]).await;
                return Err(err);
            }
        }
        let load = async {
            let (shim, pid) = (made.process.shim_socket(), made.process.pid());
            let attached = pager.control.attach(made.id, shim, pid, View::Image(image)).await;
            attached.map_err(|e| ApiError::failed("The pager could not take its memory up", e))?;
            backend::load_state(&made.process, &state).await
        };
        // A page of its memory may not come for long.
        let loaded = tokio::select! {
            loaded = load => loaded,
            () = stopped => Err(ApiError::internal("it is not wanted any more")),
        };
        match loaded {
            Ok(()) => Ok(made),
            Err(err) => {
                self.discard_prepared(vec![made]).await;
                Err(err)
            }
        }
    }

    /// Ends prepared clones.
    pub(crate) async fn discard_prepared(self: &Arc<Self>, prepared: Vec<Prepared>) {
        all(prepared.into_iter().map(|made| {
            let daemon = self.clone();
            async move {
                if let Err(err) = made.process.kill().await {
                    tracing::error!(dir = %made.dir.display(), error = %err, "QEMU could not be ended");
                }
                if let Some(pager) = daemon.pagers.get(made.family)
                    && let Err(err) = pager.control.detach(made.id).await
                {
                    tracing::warn!(dir = %made.dir.display(), error = %err, "the pager did not let go of a prepared clone");
                }
                let _ = fs::remove_dir_all(&made.dir);
                if let Some(nic) = &made.nic {
                    daemon.unplug(made.family, nic).await;
                }
                if let Some(disk) = &made.disk {
                    daemon.overlay_settled(disk.active);
                    daemon.sweep_disks(made.family);
                }
            }
        }))
        .await;
    }

    /// Removes all that is prepared of a checkpoint, and prepares no more until [`Daemon::allow_prepared`]: nothing of
    /// it may show the image when that is dropped.
    pub(crate) async fn bar_prepared(self: &Arc<Self>, image: ImageId) {
        let making = {
            let mut inner = lock(&self.shelf.inner);
            inner.barred.insert(image);
            inner.wanted.retain(|w| w.image != image);
            inner.making == Some(image)
        };
        if making {
            self.shelf.stop.notify_waiters();
        }
        let turn = self.shelf.turn.lock().await;
        let ready = lock(&self.shelf.inner).forget(image);
        drop(turn);
        self.discard_prepared(ready).await;
    }

    /// It is removed, or stays.
    pub(crate) fn allow_prepared(&self, image: ImageId) {
        lock(&self.shelf.inner).barred.remove(&image);
    }

    /// Ends all prepared clones, and prepares no more.
    pub(crate) async fn close_shelf(self: &Arc<Self>) {
        {
            let mut inner = lock(&self.shelf.inner);
            inner.closed = true;
            inner.wanted.clear();
        }
        self.shelf.stop.notify_waiters();
        self.shelf.wake.notify_one();
        let turn = self.shelf.turn.lock().await;
        let ready = lock(&self.shelf.inner).ready.drain().flat_map(|(_, list)| list).collect();
        drop(turn);
        self.discard_prepared(ready).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_checkpoint_used_last_comes_first_and_the_oldest_gives_way() {
        let [a, b, c] = [1, 2, 3].map(ImageId::from_u128);
        let mut inner = Inner::default();
        assert_eq!(inner.missing(), None);
        inner.want(a, 10, false);
        inner.want(b, 4, false);
        assert_eq!(inner.missing(), Some(b));
        inner.want(a, 1, false);
        let counts = |inner: &Inner| inner.wanted.iter().map(|w| (w.image, w.count)).collect::<Vec<_>>();
        assert_eq!((inner.missing(), counts(&inner)), (Some(a), vec![(b, 4), (a, 10)]));
        inner.want(c, 8, false);
        assert_eq!(counts(&inner), [(c, 8)], "both others were over the limit together");
        inner.want(c, 0, true);
        inner.want(c, 5, false);
        assert_eq!((inner.missing(), counts(&inner)), (None, vec![(c, 0)]), "that is what was asked for");
        inner.want(c, 1, true);
        inner.barred.insert(b);
        inner.want(b, 1, true);
        assert_eq!((inner.missing(), counts(&inner)), (Some(c), vec![(c, 1)]));
        inner.forget(c);
        assert_eq!(inner.missing(), None);
    }
}
