//! What one pager knows: the VMs, images, layers and sources of one family on this host, and the operations on them.
//!
//! # Files
//!
//! ```text
//! FAMILY/layers/ID/...     see the module `layer`
//! FAMILY/images/ID.json    the image's layers, where its pages come from, whether its parent's pages are all copied
//! FAMILY/vms/ID.json       how the VM is mapped, and the checkpoint under way
//! FAMILY/vms/ID.dirty      one bit a page: written since the last commit
//! FAMILY/listen            the address that pages are served at
//! ```
//!
//! # Crash safety
//!
//! Every file is complete before the operation that it belongs to is answered (written beside and renamed). A pager that
//! is killed leaves VMs waiting, never running on wrong bytes: their VMM keeps the userfaultfd open. The next pager reads
//! these files, takes the userfaultfds over, and wakes every waiting thread, which faults again ([`Family::restore`]).
//! A checkpoint that was not committed is forgotten and its VM starts over with a full look at its memory; the copying of
//! a committed one goes on.

use crate::{
    control::{
        AttachReply, CommitReply, ControlError, ImageReport, LayerReport, PrepareReply, SourceAddress, StatsReport,
        View,
    },
    image::Image,
    layer::{Layer, PageState},
    session::CopySession,
    source::{Source, SourceConfig},
    vm::{MappedSegment, Vm, VmParts, VmView},
};
use arc_swap::ArcSwap;
use ramet_kernel::{
    SharedAtomics,
    shim::{self, ShimClient, ShimInfo},
};
use ramet_memory::{ByteSize, ImageId, ImageSpec, LayerId, PAGE_SIZE, PageRun, PageSet, Segment, VmId};
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs, io,
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// Most pieces that a VM's memory is mapped in.
pub const MAX_SEGMENTS: usize = 192;

/// The VMs of a family: read by threads that wake them, without a lock.
pub type VmList = Arc<ArcSwap<Vec<Arc<Vm>>>>;

/// Everything that one pager serves. See the module's documentation.
#[derive(Debug)]
pub struct Family {
    dir: PathBuf,
    sources: SourceConfig,
    vms: VmList,
    inner: Mutex<Inner>,
    /// Pages and bytes served to other hosts, and peers that misbehaved.
    pub served: Served,
}

/// What was served to other hosts.
#[derive(Debug, Default)]
pub struct Served {
    /// Pages.
    pub pages: AtomicU64,
    /// Bytes, headers included.
    pub bytes: AtomicU64,
    /// Connections refused or ended for a malformed frame.
    pub bad_peers: AtomicU64,
}

#[derive(Debug, Default)]
struct Inner {
    layers: BTreeMap<LayerId, Arc<Layer>>,
    images: BTreeMap<ImageId, Arc<Image>>,
    vms: BTreeMap<VmId, VmState>,
    sources: Vec<Arc<Source>>,
}

#[derive(Debug)]
struct VmState {
    vm: Arc<Vm>,
    record: VmRecord,
    prepared: Option<Prepared>,
}

/// A checkpoint between prepare and commit.
#[derive(Debug)]
struct Prepared {
    image: ImageId,
    layer: Arc<Layer>,
    candidates: PageSet,
}

/// `vms/ID.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct VmRecord {
    shim_sock: PathBuf,
    pid: u32,
    view: View,
    segments: Vec<Segment>,
    /// The image of the last checkpoint, over which changes are tracked.
    last: Option<ImageId>,
    /// Whether a checkpoint is prepared and not committed: what it took from the dirty bits is lost with the pager.
    unsettled: bool,
}

/// `images/ID.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct ImageRecord {
    memory: ByteSize,
    /// Oldest first.
    layers: Vec<LayerId>,
    source: Option<SourceAddress>,
    /// The VM whose memory is still being copied.
    parent: Option<VmId>,
}

type Result<T, E = ControlError> = std::result::Result<T, E>;

fn internal(what: impl std::fmt::Display) -> impl FnOnce(io::Error) -> ControlError {
    move |err| ControlError::new("internal", format!("Failed to {what}: {err}"))
}

fn no_vm(vm: VmId) -> ControlError {
    ControlError::new("no_such_vm", format!("VM {vm} is not attached to this pager"))
}

fn no_image(image: ImageId) -> ControlError {
    ControlError::new("no_such_image", format!("checkpoint {image} is not on this host"))
}

impl Family {
    /// Opens a family's directory, which must lie on a tmpfs without huge pages.
    ///
    /// # Errors
    /// When it can't be used.
    pub fn open(dir: &Path, sources: SourceConfig) -> anyhow::Result<Arc<Self>> {
        ramet_memory::check_page_file_mount(dir)?;
        for sub in ["layers", "images", "vms"] {
            fs::create_dir_all(dir.join(sub))?;
        }
        Ok(Arc::new(Self {
            dir: dir.to_owned(),
            sources,
            vms: Arc::new(ArcSwap::from_pointee(Vec::new())),
            inner: Mutex::default(),
            served: Served::default(),
        }))
    }

    /// The VMs, for threads that wake them.
    #[must_use]
    pub fn vm_list(&self) -> VmList {
        self.vms.clone()
    }

    /// The layer, if this host has it.
    #[must_use]
    pub fn layer(&self, id: LayerId) -> Option<Arc<Layer>> {
        self.lock().layers.get(&id).cloned()
    }

    /// Takes a layer made elsewhere, and an image of it alone, into this family. Not on record: for benches.
    #[doc(hidden)]
    pub fn adopt(&self, id: ImageId, layer: Arc<Layer>) {
        let mut inner = self.lock();
        inner.layers.insert(layer.id, layer.clone());
        inner.images.insert(id, Image::new(id, layer.pages.size(), vec![layer], None));
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn layers_dir(&self) -> PathBuf {
        self.dir.join("layers")
    }

    fn image_file(&self, image: ImageId, extension: &str) -> PathBuf {
        self.dir.join("images").join(format!("{image}.{extension}"))
    }

    fn vm_file(&self, vm: VmId, extension: &str) -> PathBuf {
        self.dir.join("vms").join(format!("{vm}.{extension}"))
    }

    fn save_vm(&self, vm: VmId, record: &VmRecord) -> Result<()> {
        save(&self.vm_file(vm, "json"), &to_json(record)).map_err(internal(format_args!("save VM {vm}")))
    }

    /// Puts an image on record. Its layers' own files are written before.
    fn save_image(&self, image: &Image, parent: Option<VmId>) -> Result<()> {
        let record = ImageRecord {
            memory: image.memory,
            layers: image.layers.iter().map(|l| l.id).collect(),
            source: image.source.as_ref().map(|s| s.address()),
            parent,
        };
        save(&self.image_file(image.id, "json"), &to_json(&record))
            .map_err(internal(format_args!("save checkpoint {}", image.id)))
    }

    // ---- attaching -----------------------------------------------------------------------------------------------

    /// Maps a view into a VM's VMM and serves its faults from now on.
    ///
    /// # Errors
    /// `exists`, `no_such_image`, `bad_request` when the sizes differ, `internal` when the VMM or the kernel refuses.
    pub fn attach(self: &Arc<Self>, id: VmId, shim_sock: &Path, pid: u32, view: View) -> Result<AttachReply> {
        let image = {
            let inner = self.lock();
            if inner.vms.contains_key(&id) {
                return Err(ControlError::new("exists", format!("VM {id} is attached already")));
            }
            match view {
                View::Anonymous => None,
                View::Image(image) => Some(inner.images.get(&image).cloned().ok_or_else(|| no_image(image))?),
            }
        };
        if let Some(reason) = image.as_ref().and_then(|i| i.broken()) {
            return Err(ControlError::new(
                "broken",
                format!("checkpoint {} is broken: {reason}", image.map_or(ImageId::from_u128(0), |i| i.id)),
            ));
        }
        let segments = image.as_ref().map_or_else(Vec::new, |i| i.view(MAX_SEGMENTS));
        let record = VmRecord { shim_sock: shim_sock.to_owned(), pid, view, segments, last: None, unsettled: false };
        let started = Instant::now();
        let mut shim = ShimClient::connect(shim_sock).map_err(internal(format_args!("reach the VMM of VM {id}")))?;
        let info = shim.info().map_err(internal(format_args!("ask the VMM of VM {id} for its userfaultfd")))?;
        if let Some(image) = &image {
            if info.ram_len != image.memory.bytes() {
                return Err(ControlError::new(
                    "bad_request",
                    format!(
                        "VM {id} has {} of memory, checkpoint {} has {}",
                        ByteSize(info.ram_len),
                        image.id,
                        image.memory
                    ),
                ));
            }
            self.map_view(&mut shim, image, &record.segments)
                .map_err(internal(format_args!("map checkpoint {} into VM {id}", image.id)))?;
        }
        let remap_us = micros(started.elapsed());
        let started = Instant::now();
        let (ram_addr, ram_len, segments) = (info.ram_addr, info.ram_len, record.segments.len() as u64);
        let vm = self.register_vm(id, info, image, record, false)?;
        if let Err(err) = serve_faults(&vm) {
            let _ = self.detach(id);
            return Err(internal(format_args!("start the fault thread of VM {id}"))(err));
        }
        Ok(AttachReply { ram_addr, ram_len, remap_us, attach_us: micros(started.elapsed()), segments })
    }

    /// Hands the layers' page files to the VMM, which maps them privately over its RAM.
    fn map_view(&self, shim: &mut ShimClient, image: &Image, segments: &[Segment]) -> io::Result<()> {
        let mut files: Vec<(LayerId, fs::File)> = Vec::new();
        let mut requests = Vec::with_capacity(segments.len());
        for segment in segments {
            let fd_index = match files.iter().position(|(id, _)| *id == segment.file) {
                Some(index) => index,
                None => {
                    let layer = image.layers.iter().find(|l| l.id == segment.file);
                    let layer =
                        layer.ok_or_else(|| io::Error::other("the view names a layer that the image has not"))?;
                    files.push((layer.id, layer.open_read_only()?));
                    files.len() - 1
                }
            };
            requests.push(shim::Segment {
                guest_offset: segment.start.offset(),
                len: segment.len * PAGE_SIZE as u64,
                file_offset: segment.start.offset(),
                fd_index: u32::try_from(fd_index).map_err(io::Error::other)?,
                flags: 0,
            });
        }
        let fds: Vec<_> = files.iter().map(|(_, file)| file.as_fd()).collect();
        shim.map(&requests, &fds).map_err(io::Error::other)
    }

    /// Registers a VM whose memory is mapped and puts it on record. Its faults are not served yet.
    fn register_vm(
        self: &Arc<Self>,
        id: VmId,
        info: ShimInfo,
        image: Option<Arc<Image>>,
        record: VmRecord,
        tracked: bool,
    ) -> Result<Arc<Vm>> {
        let failed = |what: &str| internal(format!("{what} of VM {id}"));
        let pages = ByteSize(info.ram_len).pages();
        let words = usize::try_from(pages.0.div_ceil(64)).unwrap_or(0);
        let dirty = SharedAtomics::open(&self.vm_file(id, "dirty"), words).map_err(failed("make the dirty bits"))?;
        let view = match image {
            None => VmView::Anonymous,
            Some(image) => {
                let find = |s: &Segment| {
                    let file = image.layers.iter().find(|l| l.id == s.file)?.clone();
                    Some(MappedSegment { run: s.run(), file })
                };
                let segments = record.segments.iter().map(find).collect::<Option<Vec<_>>>();
                let segments = segments.ok_or_else(|| ControlError::new("internal", "a mapped layer is gone"))?;
                VmView::Image { image, segments }
            }
        };
        let parts =
            VmParts { id, pid: record.pid, ram_addr: info.ram_addr, pages, view, uffd: info.uffd, dirty, tracked };
        let vm = Vm::register(parts).map_err(failed("register the memory"))?;
        self.save_vm(id, &record)?;
        let mut inner = self.lock();
        inner.vms.insert(id, VmState { vm: vm.clone(), record, prepared: None });
        self.publish(&inner);
        Ok(vm)
    }

    fn publish(&self, inner: &Inner) {
        self.vms.store(Arc::new(inner.vms.values().map(|s| s.vm.clone()).collect()));
    }

    /// Forgets a VM that is gone or about to go. If its last checkpoint is still being copied, waits for that first.
    ///
    /// # Errors
    /// `no_such_vm`.
    pub fn detach(&self, id: VmId) -> Result<()> {
        let session = self.lock().vms.get(&id).ok_or_else(|| no_vm(id))?.vm.session();
        if let Some(session) = session {
            session.wait();
        }
        let _ = self.abort(id);
        let mut inner = self.lock();
        if let Some(state) = inner.vms.remove(&id) {
            state.vm.end();
        }
        self.publish(&inner);
        for extension in ["json", "dirty"] {
            let _ = fs::remove_file(self.vm_file(id, extension));
        }
        self.collect(&mut inner);
        Ok(())
    }

    // ---- checkpoints ---------------------------------------------------------------------------------------------

    /// Prepares a checkpoint of a running VM: from its return on, every write is seen, and what may have changed since the
    /// last checkpoint is protected.
    ///
    /// # Errors
    /// `no_such_vm`, `state` when one is prepared already, `exists`, `internal`.
    pub fn prepare(self: &Arc<Self>, id: VmId, image: ImageId, layer: LayerId) -> Result<PrepareReply> {
        let started = Instant::now();
        let (vm, base) = {
            let inner = self.lock();
            let state = inner.vms.get(&id).ok_or_else(|| no_vm(id))?;
            if state.prepared.is_some() {
                return Err(ControlError::new("state", format!("a checkpoint of VM {id} is under way: wait for it")));
            }
            if inner.images.contains_key(&image) || inner.layers.contains_key(&layer) {
                return Err(ControlError::new("exists", format!("checkpoint {image} exists already")));
            }
            let base = match (state.record.last, state.record.view) {
                (Some(last), _) | (None, View::Image(last)) => {
                    Some(inner.images.get(&last).cloned().ok_or_else(|| no_image(last))?)
                }
                (None, View::Anonymous) => None,
            };
            (state.vm.clone(), base)
        };
        if let Some(reason) = base.as_ref().and_then(|b| b.broken()) {
            return Err(ControlError::new("broken", format!("the checkpoint below is broken: {reason}")));
        }
        if base.as_ref().is_some_and(|b| b.layers.len() >= ramet_memory::image::MAX_LAYERS) {
            return Err(ControlError::new("state", "too many layers: checkpoint a fresh boot instead"));
        }
        // One copying at a time: the one before must have all its pages before the guest may be protected anew.
        if let Some(session) = vm.session() {
            session.wait();
        }
        let layer = Layer::create(&self.layers_dir(), layer, base.map(|b| b.top().clone()), vm.pages, false)
            .map_err(internal(format_args!("make a layer for VM {id}")))?;
        let mut candidates = PageSet::new(vm.pages);
        self.mark_unsettled(id, true)?;
        let found = vm.track().and_then(|full| {
            // Pages that became private while tracking began are found here; later writes are in the dirty bits.
            let take = |run| candidates.insert_run(run);
            if full { vm.private_pages(take) } else { vm.take_dirty(take) }.map(|()| full)
        });
        let full = match found {
            Ok(full) => full,
            Err(err) => {
                vm.untrack();
                let _ = layer.remove_files();
                return Err(internal(format_args!("protect the memory of VM {id}"))(err));
            }
        };
        for run in candidates.runs() {
            layer.set_run(run, PageState::Owed);
        }
        let candidate_pages = candidates.count().0;
        let mut inner = self.lock();
        let state = inner.vms.get_mut(&id).ok_or_else(|| no_vm(id))?;
        state.prepared = Some(Prepared { image, layer, candidates });
        Ok(PrepareReply { candidate_pages, full, prepare_us: micros(started.elapsed()) })
    }

    fn mark_unsettled(&self, id: VmId, unsettled: bool) -> Result<()> {
        let mut inner = self.lock();
        let state = inner.vms.get_mut(&id).ok_or_else(|| no_vm(id))?;
        state.record.unsettled = unsettled;
        self.save_vm(id, &state.record)
    }

    /// Fixes a prepared checkpoint. The VM is stopped: nothing writes to its memory.
    ///
    /// # Errors
    /// `no_such_vm`, `state` when none is prepared, `internal`: then it is given up.
    pub fn commit(self: &Arc<Self>, id: VmId) -> Result<CommitReply> {
        let started = Instant::now();
        let mut inner = self.lock();
        let state = inner.vms.get_mut(&id).ok_or_else(|| no_vm(id))?;
        let mut prepared = state.prepared.take().ok_or_else(|| {
            ControlError::new("state", format!("no checkpoint of VM {id} is prepared: call checkpoint_prepare first"))
        })?;
        let vm = state.vm.clone();
        let mut late_pages = 0;
        let mut take = |run: PageRun| {
            late_pages += run.len;
            prepared.candidates.insert_run(run);
            prepared.layer.set_run(run, PageState::Owed);
        };
        let taken = vm.take_dirty(&mut take).and_then(|()| vm.take_new(&mut take));
        if let Err(err) = taken {
            Self::undo(&vm, &prepared);
            return Err(internal(format_args!("protect the memory of VM {id}"))(err));
        }
        let Prepared { image, layer, candidates } = prepared;
        let owed_pages = candidates.count().0;
        // All of it on record before the VM may go on: a pager killed from now on is followed by one that copies on.
        let image = Image::new(image, vm.pages.size(), Layer::stack(&layer), None);
        let mut record = state.record.clone();
        record.last = Some(image.id);
        record.unsettled = false;
        layer.set_owned(candidates).map_err(internal("save the layer's pages"))?;
        self.save_image(&image, Some(id))?;
        self.save_vm(id, &record)?;
        state.record = record;
        let session = CopySession::new(layer.clone(), vm.pid, vm.ram_addr, owed_pages);
        layer.session.store(Some(session.clone()));
        vm.set_session(Some(session.clone()));
        inner.layers.insert(layer.id, layer);
        inner.images.insert(image.id, image.clone());
        drop(inner);
        self.start_copier(session, image);
        Ok(CommitReply { owed_pages, late_pages, commit_us: micros(started.elapsed()) })
    }

    fn start_copier(self: &Arc<Self>, session: Arc<CopySession>, image: Arc<Image>) {
        let family = self.clone();
        let body = move || family.copy(&session, &image);
        if let Err(err) = std::thread::Builder::new().name("copier".into()).spawn(body) {
            // Clones and the parent still copy what they touch.
            tracing::error!(error = %err, "no thread for the copier");
        }
    }

    /// The body of a copier thread: copies all, then replaces the image by what it turned out to be.
    fn copy(&self, session: &CopySession, image: &Image) {
        session.copy_all();
        if let Some(reason) = session.failure() {
            tracing::error!(image = %image.id, reason, "checkpoint is broken");
            return;
        }
        let settled = Image::new(image.id, image.memory, image.layers.clone(), image.source.clone());
        if let Err(err) = self.save_image(&settled, None) {
            tracing::error!(image = %image.id, error = %err, "checkpoint can't be put on record");
        }
        let mut inner = self.lock();
        if let Some(entry) = inner.images.get_mut(&image.id) {
            *entry = settled;
        }
    }

    fn undo(vm: &Vm, prepared: &Prepared) {
        for run in prepared.candidates.runs() {
            vm.give_dirty_back(run);
        }
        let _ = prepared.layer.remove_files();
    }

    /// Gives a prepared checkpoint up.
    ///
    /// # Errors
    /// `no_such_vm`, `state` when none is prepared.
    pub fn abort(&self, id: VmId) -> Result<()> {
        let mut inner = self.lock();
        let state = inner.vms.get_mut(&id).ok_or_else(|| no_vm(id))?;
        let prepared = state.prepared.take();
        let prepared =
            prepared.ok_or_else(|| ControlError::new("state", format!("no checkpoint of VM {id} is prepared")))?;
        Self::undo(&state.vm, &prepared);
        drop(inner);
        self.mark_unsettled(id, false)
    }

    // ---- images --------------------------------------------------------------------------------------------------

    fn image(&self, id: ImageId) -> Result<Arc<Image>> {
        self.lock().images.get(&id).cloned().ok_or_else(|| no_image(id))
    }

    /// Writes the image's description, as it is known now, and says where.
    ///
    /// # Errors
    /// `no_such_image`, `internal`.
    pub fn write_spec(&self, id: ImageId) -> Result<PathBuf> {
        let image = self.image(id)?;
        let path = self.image_file(id, "rimg");
        save(&path, &image.spec().encode()).map_err(internal("write the image's description"))?;
        Ok(path)
    }

    /// Adds an image of another host. Layers that are here already are shared.
    ///
    /// # Errors
    /// `exists`, `bad_request` when the file describes no such image, `internal`.
    pub fn add_image(self: &Arc<Self>, id: ImageId, spec_path: &Path, source: &SourceAddress) -> Result<()> {
        let bytes = fs::read(spec_path).map_err(internal(format_args!("read {}", spec_path.display())))?;
        let spec = ImageSpec::decode(&bytes).map_err(|err| ControlError::new("bad_request", err.to_string()))?;
        if spec.image != id {
            return Err(ControlError::new(
                "bad_request",
                format!("{} describes another checkpoint", spec_path.display()),
            ));
        }
        let source = self.source(source)?;
        let mut inner = self.lock();
        if inner.images.contains_key(&id) {
            return Err(ControlError::new("exists", format!("checkpoint {id} is on this host already")));
        }
        let mut layers: Vec<Arc<Layer>> = Vec::new();
        for layer_spec in &spec.layers {
            let layer = match inner.layers.get(&layer_spec.id) {
                Some(layer) if layer.pages == spec.memory.pages() => layer.clone(),
                Some(_) => return Err(ControlError::new("bad_request", "a layer of that name has another size here")),
                None => {
                    let below = layers.last().cloned();
                    let layer = Layer::create(&self.layers_dir(), layer_spec.id, below, spec.memory.pages(), true)
                        .and_then(|l| l.set_owned(layer_spec.owned.clone()).map(|()| l))
                        .map_err(internal(format_args!("make layer {}", layer_spec.id)))?;
                    layer.source.store(Some(source.clone()));
                    inner.layers.insert(layer.id, layer.clone());
                    layer
                }
            };
            layers.push(layer);
        }
        let image = Image::new(id, spec.memory, layers, Some(source));
        self.save_image(&image, None)?;
        inner.images.insert(id, image);
        Ok(())
    }

    /// The source at an address, connecting to it if this is the first image from there.
    fn source(self: &Arc<Self>, address: &SourceAddress) -> Result<Arc<Source>> {
        let mut inner = self.lock();
        if let Some(source) = inner.sources.iter().find(|s| s.address() == *address) {
            return Ok(source.clone());
        }
        let source = Source::start(address.clone(), self.sources.clone(), self.vm_list()).map_err(|err| {
            ControlError::new("bad_request", format!("source {} ({}): {err}", address.name, address.addr))
        })?;
        inner.sources.push(source.clone());
        Ok(source)
    }

    /// The host of some images has moved.
    ///
    /// # Errors
    /// `bad_request` for an address that makes no sense or is unknown.
    pub fn set_source(&self, old: &SourceAddress, new: &SourceAddress) -> Result<()> {
        let inner = self.lock();
        let source = inner.sources.iter().find(|s| s.address() == *old);
        let source =
            source.ok_or_else(|| ControlError::new("bad_request", format!("no images come from {}", old.addr)))?;
        source.move_to(new.clone()).map_err(|err| ControlError::new("bad_request", err.to_string()))?;
        for image in inner.images.values() {
            if image.source.as_ref().is_some_and(|s| Arc::ptr_eq(s, source)) {
                self.save_image(image, None)?;
            }
        }
        Ok(())
    }

    /// Drops an image, and the layers that nothing else needs.
    ///
    /// # Errors
    /// `no_such_image`, `in_use` naming the VMs that show it.
    pub fn drop_image(&self, id: ImageId) -> Result<()> {
        let image = self.image(id)?;
        let users = self.users(id);
        if !users.is_empty() {
            let names: Vec<_> = users.iter().map(VmId::to_string).collect();
            return Err(ControlError::new("in_use", format!("checkpoint {id} is in use by VMs {}", names.join(", "))));
        }
        for session in image.layers.iter().filter_map(|l| l.session.load_full()) {
            session.wait();
        }
        let mut inner = self.lock();
        inner.images.remove(&id);
        for extension in ["json", "rimg"] {
            let _ = fs::remove_file(self.image_file(id, extension));
        }
        // A parent that tracks its changes over this image starts over, rather than keep a copy of its memory alive.
        for (vm_id, state) in &mut inner.vms {
            if state.record.last == Some(id) && state.prepared.is_none() {
                state.vm.set_session(None);
                state.vm.untrack();
                state.record.last = None;
                let _ = self.save_vm(*vm_id, &state.record);
            }
        }
        self.collect(&mut inner);
        Ok(())
    }

    fn users(&self, id: ImageId) -> Vec<VmId> {
        let shows = |s: &&VmState| matches!(&s.vm.view, VmView::Image { image, .. } if image.id == id);
        self.lock().vms.values().filter(shows).map(|s| s.vm.id).collect()
    }

    /// Removes layers that no image and no VM needs any more, and sources that serve none.
    fn collect(&self, inner: &mut Inner) {
        let needed = |id: LayerId, inner: &Inner| {
            let shown = inner.vms.values().any(|s| match &s.vm.view {
                VmView::Image { image, .. } => image.layers.iter().any(|l| l.id == id),
                VmView::Anonymous => false,
            });
            shown || inner.images.values().any(|i| i.layers.iter().any(|l| l.id == id))
        };
        let gone: Vec<LayerId> = inner.layers.keys().copied().filter(|&id| !needed(id, inner)).collect();
        for id in gone {
            if let Some(layer) = inner.layers.remove(&id)
                && let Err(err) = layer.remove_files()
            {
                tracing::warn!(layer = %id, error = %err, "files of a layer are left");
            }
        }
        let Inner { layers, sources, .. } = inner;
        sources.retain(|source| {
            let used = layers.values().any(|l| l.source.load().as_ref().is_some_and(|s| Arc::ptr_eq(s, source)));
            if !used {
                source.end();
            }
            used
        });
    }

    /// What an image is and has on this host.
    ///
    /// # Errors
    /// `no_such_image`.
    pub fn report_image(&self, id: ImageId) -> Result<ImageReport> {
        let image = self.image(id)?;
        let layers = image.layers.iter().map(|l| LayerReport {
            id: l.id,
            owned_pages: l.owned().map_or(0, |o| o.count().0),
            stored_bytes: l.stored_bytes(),
            fetched_pages: l.fetched.load(Ordering::Relaxed),
        });
        Ok(ImageReport {
            image: id,
            memory: image.memory.bytes(),
            layers: layers.collect(),
            complete: image.complete(),
            broken: image.broken(),
            vms: self.users(id),
        })
    }

    /// Waits until every page of the image has been copied out of its parent.
    ///
    /// # Errors
    /// `no_such_image`, `broken`.
    pub fn wait_image(&self, id: ImageId) -> Result<ImageReport> {
        let image = self.image(id)?;
        for session in image.layers.iter().filter_map(|l| l.session.load_full()) {
            session.wait();
        }
        match image.broken() {
            Some(reason) => Err(ControlError::new("broken", format!("checkpoint {id} is broken: {reason}"))),
            None => self.report_image(id),
        }
    }

    /// Everything, counted.
    #[must_use]
    pub fn stats(&self) -> StatsReport {
        let (images, sources) = {
            let inner = self.lock();
            (inner.images.keys().copied().collect::<Vec<_>>(), inner.sources.clone())
        };
        StatsReport {
            vms: self.vms.load().iter().map(|vm| vm.report()).collect(),
            images: images.into_iter().filter_map(|id| self.report_image(id).ok()).collect(),
            sources: sources.iter().map(|s| s.report()).collect(),
            served_pages: self.served.pages.load(Ordering::Relaxed),
            served_bytes: self.served.bytes.load(Ordering::Relaxed),
            bad_peers: self.served.bad_peers.load(Ordering::Relaxed),
        }
    }

    /// How many VMs are attached.
    #[must_use]
    pub fn vm_count(&self) -> usize {
        self.lock().vms.len()
    }

    // ---- restart -------------------------------------------------------------------------------------------------

    /// Takes over what a pager before this one left: see the module's documentation. VMs whose VMM is gone are dropped.
    ///
    /// # Errors
    /// When the directory is damaged.
    pub fn restore(self: &Arc<Self>) -> anyhow::Result<()> {
        let mut records = Vec::new();
        for id in ids::<ImageId>(&self.dir.join("images"), "json")? {
            let record: ImageRecord = serde_json::from_slice(&fs::read(self.image_file(id, "json"))?)?;
            self.restore_image(id, &record)?;
            records.push((id, record));
        }
        for id in ids::<VmId>(&self.dir.join("vms"), "json")? {
            let record: VmRecord = serde_json::from_slice(&fs::read(self.vm_file(id, "json"))?)?;
            if let Err(err) = self.restore_vm(id, record) {
                tracing::warn!(vm = %id, error = %err, "VM could not be taken over");
                for extension in ["json", "dirty"] {
                    let _ = fs::remove_file(self.vm_file(id, extension));
                }
            }
        }
        self.restore_sessions(&records);
        // Not before: a write that is let through must know of the copying that it has to wait for.
        for vm in self.vms.load().iter() {
            serve_faults(vm)?;
            // Whoever waited for the pager before this one faults again.
            vm.wake_all();
        }
        let mut inner = self.lock();
        // Layers of checkpoints that were prepared and not committed are on no record.
        for entry in fs::read_dir(self.layers_dir())? {
            let entry = entry?;
            let known = entry
                .file_name()
                .to_str()
                .and_then(|n| n.parse().ok())
                .is_some_and(|id: LayerId| inner.layers.contains_key(&id));
            if !known {
                fs::remove_dir_all(entry.path())?;
            }
        }
        self.collect(&mut inner);
        Ok(())
    }

    fn restore_image(self: &Arc<Self>, id: ImageId, record: &ImageRecord) -> anyhow::Result<()> {
        let source = record.source.as_ref().map(|address| self.source(address)).transpose()?;
        let mut inner = self.lock();
        let mut layers: Vec<Arc<Layer>> = Vec::new();
        for &layer_id in &record.layers {
            let layer = match inner.layers.get(&layer_id) {
                Some(layer) => layer.clone(),
                None => {
                    let layer = Layer::open(&self.layers_dir(), layer_id, layers.last().cloned())?;
                    if layer.remote {
                        layer.source.store(source.clone());
                    }
                    inner.layers.insert(layer.id, layer.clone());
                    layer
                }
            };
            layers.push(layer);
        }
        inner.images.insert(id, Image::new(id, record.memory, layers, source));
        Ok(())
    }

    fn restore_vm(self: &Arc<Self>, id: VmId, mut record: VmRecord) -> Result<()> {
        let image = match record.view {
            View::Anonymous => None,
            View::Image(image) => Some(self.image(image)?),
        };
        let info = ShimClient::connect(&record.shim_sock).and_then(|mut shim| shim.info());
        let info = info.map_err(internal(format_args!("take over VM {id}")))?;
        let tracked = record.last.is_some() || record.unsettled;
        let start_over = record.unsettled;
        if start_over {
            record.last = None;
            record.unsettled = false;
        }
        let vm = self.register_vm(id, info, image, record, tracked)?;
        if start_over {
            vm.untrack();
        }
        Ok(())
    }

    /// Goes on with the copying of checkpoints whose pages are still in their parents' memory.
    fn restore_sessions(self: &Arc<Self>, records: &[(ImageId, ImageRecord)]) {
        for (id, record) in records {
            let (Some(parent), Ok(image)) = (record.parent, self.image(*id)) else { continue };
            let layer = image.top().clone();
            let owed = layer.owned().map_or(0, |o| o.iter().filter(|&p| layer.state(p) == PageState::Owed).count());
            let vm = self.lock().vms.get(&parent).map(|s| s.vm.clone());
            // Without its parent the copier fails at the first owed page, and says so.
            let (pid, ram_addr) = vm.as_ref().map_or((0, 0), |vm| (vm.pid, vm.ram_addr));
            let session = CopySession::new(layer.clone(), pid, ram_addr, owed as u64);
            layer.session.store(Some(session.clone()));
            if let Some(vm) = vm {
                vm.set_session(Some(session.clone()));
            }
            self.start_copier(session, image);
        }
    }
}

/// Starts the fault thread of a VM.
fn serve_faults(vm: &Arc<Vm>) -> io::Result<()> {
    let served = vm.clone();
    std::thread::Builder::new().name(format!("fault-{}", vm.id.short())).spawn(move || served.serve()).map(drop)
}

/// The identifiers that name files of a directory.
fn ids<T: std::str::FromStr>(dir: &Path, extension: &str) -> io::Result<Vec<T>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == UNFINISHED) {
            // A pager was killed while it wrote this.
            fs::remove_file(&path)?;
            continue;
        }
        if path.extension().is_some_and(|e| e == extension)
            && let Some(id) = path.file_stem().and_then(|s| s.to_str()).and_then(|s| s.parse().ok())
        {
            found.push(id);
        }
    }
    Ok(found)
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn to_json(value: &impl Serialize) -> Vec<u8> {
    // These records hold nothing that JSON can't.
    serde_json::to_vec_pretty(value).unwrap_or_default()
}

/// Writes a file beside and renames it over: it is there whole or not at all.
/// Extension of files that are being written.
const UNFINISHED: &str = "unfinished";

/// Replaces a file as a whole. Several may do so at once, also with files that differ by their extension only.
fn save(path: &Path, bytes: &[u8]) -> io::Result<()> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let beside = path.with_extension(format!("{}-{number}.{UNFINISHED}", std::process::id()));
    let written = fs::write(&beside, bytes).and_then(|()| fs::rename(&beside, path));
    if written.is_err() {
        let _ = fs::remove_file(&beside);
    }
    written
}
