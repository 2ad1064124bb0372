//! Color maps of checkpoints: made in the background after each one, kept beside its devices' state, sent with its descriptor.
//!
//! A map is an aid. A checkpoint without one is as good for clones, so nothing waits for it but those who ask for it.

use std::{fs, path::PathBuf, sync::Arc, time::Duration};

use ramet_client::api::{ChangedPages, CheckpointColors, ErrorCode};
use ramet_color::{ColorMap, CpuRoot, Summary};
use ramet_memory::ImageId;
use ramet_pager::control::ColorBase;
use ramet_vmm::ControlRegisters;

use crate::{
    checkpoints::pager_failed,
    daemon::{Daemon, to_the_end},
    error::{ApiError, ApiResult, from_peer},
    state::CheckpointRecord,
    stats::lock,
};

/// Largest files, processes and slab caches that are told when the caller does not say how many.
const LARGEST: usize = 10;
/// Pauses between tries to color a checkpoint in the background.
const TRIES: [Duration; 6] = [
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(5),
    Duration::from_secs(10),
    Duration::from_secs(30),
];
/// The most that a caller may ask for.
const MOST: usize = 100_000;

impl Daemon {
    /// A checkpoint of this host, or by its whole id a copy of another host's: what its pages are is known here, too.
    fn find_colored(&self, wanted: &str) -> ApiResult<CheckpointRecord> {
        let whole = wanted.parse::<ImageId>().ok();
        let copy = whole.and_then(|id| self.store.read(|s| s.checkpoints.get(&id).filter(|c| !c.pending).cloned()));
        copy.map_or_else(|| self.find_checkpoint(wanted), Ok)
    }

    /// The file with a checkpoint's color map, when there is one.
    pub(crate) fn colors_file(&self, image: ImageId) -> PathBuf {
        self.config.checkpoints().join(format!("{image}.colors"))
    }

    /// Has a checkpoint colored, in the background.
    pub(crate) fn color_behind(self: &Arc<Self>, image: ImageId) {
        let daemon = self.clone();
        tokio::spawn(async move {
            for pause in TRIES {
                let Some(record) = daemon.store.read(|s| s.checkpoints.get(&image).cloned()) else { return };
                match daemon.ensure_colors(&record).await {
                    Ok(_) => return,
                    Err(err) => tracing::debug!(checkpoint = %image, "not colored yet: {err}"),
                }
                // The pager may be on its way back; another host tells nothing of a fork that has not ended.
                tokio::time::sleep(pause).await;
            }
            if daemon.store.read(|s| s.checkpoints.contains_key(&image)) {
                tracing::warn!(checkpoint = %image, "no color map of this checkpoint: asking for it says why");
            }
        });
    }

    /// Sees to it that there is a map of a checkpoint, and says where. Of a checkpoint of another host that host's is fetched.
    async fn ensure_colors(&self, record: &CheckpointRecord) -> ApiResult<PathBuf> {
        let path = self.colors_file(record.id);
        let turn = lock(&self.coloring).entry(record.id).or_default().clone();
        // One at a time: who comes second finds the first one's.
        let _turn = turn.lock().await;
        let made = match (path.exists(), &record.origin) {
            (true, _) => Ok(()),
            (false, Some(origin)) => self.fetch_colors(record, origin).await,
            (false, None) => self.make_colors(record).await,
        };
        // What was dropped meanwhile is not to come back.
        if !self.store.read(|s| s.checkpoints.contains_key(&record.id)) {
            let _ = fs::remove_file(&path);
        }
        drop(_turn);
        let mut coloring = lock(&self.coloring);
        if Arc::strong_count(&turn) <= 2 {
            coloring.remove(&record.id);
        }
        drop(coloring);
        made.map(|()| path)
    }

    async fn make_colors(&self, record: &CheckpointRecord) -> ApiResult<()> {
        let state = self.device_state(record)?;
        let root = |r: ControlRegisters| CpuRoot { cr3: r.cr3, cr4: r.cr4 };
        let cpus = ControlRegisters::of_state(&state).into_iter().map(root).collect();
        let base = record.base.map(|image| ColorBase { image, path: self.colors_file(image) });
        let pager = self.pager(record.family).await?;
        let made = pager.control.image_color(record.id, cpus, &self.colors_file(record.id), base).await;
        let made = made.map_err(|e| pager_failed(&format!("Checkpoint {} can't be colored", record.id), e))?;
        self.stats.count("colorings");
        let (bytes, took_us) = (made.bytes, made.color_us);
        tracing::debug!(checkpoint = %record.id, bytes, took_us, made.incremental, made.trouble, "colored");
        Ok(())
    }

    async fn fetch_colors(&self, record: &CheckpointRecord, origin: &str) -> ApiResult<()> {
        let map = self.peers.client(origin)?.color_map(&record.id.to_string()).await;
        self.keep_colors(record, &map.map_err(|e| from_peer(origin, e))?)
    }

    /// Keeps a map that another host made, if it is one.
    pub(crate) fn keep_colors(&self, record: &CheckpointRecord, encoded: &[u8]) -> ApiResult<()> {
        ColorMap::decode(encoded, record.spec.memory.pages()).map_err(|e| {
            ApiError::new(ErrorCode::BadRequest, format!("The color map of checkpoint {} is unusable: {e}", record.id))
        })?;
        let path = self.colors_file(record.id);
        let temp = path.with_extension("colors-new");
        fs::write(&temp, encoded)
            .and_then(|()| fs::rename(&temp, &path))
            .map_err(|e| ApiError::failed(format!("Failed to write {}", path.display()), e))
    }

    /// A checkpoint's map as it is kept, when it is ready. Never waits.
    pub(crate) fn ready_colors(&self, image: ImageId) -> Option<Vec<u8>> {
        fs::read(self.colors_file(image)).ok()
    }

    /// `GET /v1/checkpoints/{id}/colors/map`: the map as it is kept. Waits until there is one.
    ///
    /// # Errors
    /// [`ErrorCode::NotFound`]; when the memory can't be looked at.
    pub async fn encoded_colors(self: &Arc<Self>, wanted: &str) -> ApiResult<Vec<u8>> {
        let record = self.find_colored(wanted)?;
        let daemon = self.clone();
        to_the_end(async move {
            let path = daemon.ensure_colors(&record).await?;
            fs::read(&path).map_err(|e| ApiError::failed(format!("Failed to read {}", path.display()), e))
        })
        .await
    }

    /// `GET /v1/checkpoints/{id}/colors`: how much memory has which color, and who has most of it.
    ///
    /// # Errors
    /// As [`Daemon::encoded_colors`].
    pub async fn checkpoint_colors(
        self: &Arc<Self>,
        wanted: &str,
        largest: Option<usize>,
    ) -> ApiResult<CheckpointColors> {
        let record = self.find_colored(wanted)?;
        let encoded = self.encoded_colors(wanted).await?;
        let map = decode(&record, &encoded)?;
        Ok(CheckpointColors {
            checkpoint: record.id,
            vm_name: record.vm_name.clone(),
            host: record.origin.clone().unwrap_or_else(|| self.config.name.clone()),
            map_bytes: encoded.len() as u64,
            summary: Summary::of(&map, largest.unwrap_or(LARGEST).min(MOST)),
        })
    }

    /// `GET /v1/checkpoints/{id}/changed?since=ID`: the pages in which two checkpoints of a family differ.
    ///
    /// # Errors
    /// [`ErrorCode::NotFound`]; [`ErrorCode::BadRequest`] for checkpoints of different families or sizes.
    pub async fn changed_pages(&self, wanted: &str, since: &str) -> ApiResult<ChangedPages> {
        let (new, old) = (self.find_colored(wanted)?, self.find_colored(since)?);
        if new.family != old.family || new.spec.memory != old.spec.memory {
            return Err(ApiError::new(
                ErrorCode::BadRequest,
                format!("Checkpoints {} and {} are of different families", new.id.short(), old.id.short()),
            )
            .remedy("compare checkpoints of one VM, or of a VM and its clones"));
        }
        let pager = self.pager(new.family).await?;
        let runs = pager.control.image_changed(new.id, old.id).await;
        let runs = runs.map_err(|e| pager_failed("The checkpoints can't be compared", e))?;
        Ok(ChangedPages { checkpoint: new.id, since: old.id, pages: new.spec.memory.pages().0, runs })
    }
}

fn decode(record: &CheckpointRecord, encoded: &[u8]) -> ApiResult<ColorMap> {
    ColorMap::decode(encoded, record.spec.memory.pages()).map_err(|e| {
        ApiError::internal(format!("The color map of checkpoint {} is damaged: {e}", record.id))
            .remedy("restart rametd after removing its file, and it is made anew")
    })
}
