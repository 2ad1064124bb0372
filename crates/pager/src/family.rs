//! What one pager knows: the VMs, images, layers and sources of one family on this host, and the operations on them.
//!
//! Here is what a family is, and attaching VMs; `checkpoints` has a checkpoint's way from prepare to copied, `images` what
//! images are here and where their pages come from, `records` what of all this is on disk and how the next pager takes it
//! over.

mod checkpoints;
mod colors;
mod images;
mod records;

use crate::{
    control::{AttachReply, ControlError, Latency, StatsReport, View, VmReport},
    image::Image,
    layer::{self, Layer},
    source::{Source, SourceConfig},
    vm::{MappedSegment, Vm, VmParts, VmView},
};
use arc_swap::ArcSwap;
use checkpoints::Stage;
use ramet_kernel::{
    SharedAtomics,
    shim::{self, ShimClient, ShimInfo},
};
use ramet_memory::{ByteSize, ImageId, LayerId, PAGE_SIZE, Segment, VmId};
use records::VmRecord;
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

/// How often a wait for the end of a copying looks around.
const LOOK: Duration = Duration::from_millis(100);

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
    /// Images on record that can't be read, and why.
    damaged: BTreeMap<ImageId, String>,
    /// VMs out of whose memory images are still to be copied.
    parents: BTreeMap<ImageId, VmId>,
    vms: BTreeMap<VmId, VmState>,
    /// VMs on record that could not be taken over.
    unserved: BTreeMap<VmId, Unserved>,
    sources: Vec<Arc<Source>>,
}

#[derive(Debug)]
struct VmState {
    vm: Arc<Vm>,
    record: VmRecord,
    stage: Stage,
}

/// A VM whose faults nobody serves: it waits, and says why.
#[derive(Debug)]
struct Unserved {
    /// As far as it can be read.
    record: Option<VmRecord>,
    reason: String,
}

impl Inner {
    fn image(&self, id: ImageId) -> Result<Arc<Image>> {
        match (self.images.get(&id), self.damaged.get(&id)) {
            (Some(image), _) => Ok(image.clone()),
            (None, Some(reason)) => Err(broken(id, reason)),
            (None, None) => Err(no_image(id)),
        }
    }

    fn vm(&mut self, id: VmId) -> Result<&mut VmState> {
        match (self.vms.get_mut(&id), self.unserved.get(&id)) {
            (Some(state), _) => Ok(state),
            (None, Some(unserved)) => {
                Err(ControlError::new("broken", format!("VM {id} is not served: {}", unserved.reason)))
            }
            (None, None) => Err(no_vm(id)),
        }
    }
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

fn broken(image: ImageId, reason: &str) -> ControlError {
    ControlError::new("broken", format!("checkpoint {image} is broken: {reason}"))
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

    // ---- attaching -----------------------------------------------------------------------------------------------

    /// Maps a view into a VM's VMM and serves its faults from now on.
    ///
    /// # Errors
    /// `exists`, `no_such_image`, `bad_request` when the sizes differ, `internal` when the VMM or the kernel refuses.
    pub fn attach(self: &Arc<Self>, id: VmId, shim_sock: &Path, pid: u32, view: View) -> Result<AttachReply> {
        let image = {
            let inner = self.lock();
            if inner.vms.contains_key(&id) || inner.unserved.contains_key(&id) {
                return Err(ControlError::new("exists", format!("VM {id} is attached already")));
            }
            match view {
                View::Anonymous => None,
                View::Image(image) => Some(inner.image(image)?),
            }
        };
        if let Some((image, reason)) = image.as_ref().and_then(|i| Some((i.id, i.broken()?))) {
            return Err(broken(image, &reason));
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
        let made = self.make_vm(id, info, image, &record, false);
        let vm = match made.and_then(|vm| self.save_vm(id, &record).map(|()| vm)) {
            Ok(vm) => vm,
            Err(err) => {
                self.remove_vm_files(id);
                return Err(err);
            }
        };
        self.publish_vm(id, vm.clone(), record);
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

    /// Registers a VM whose memory is mapped. Its faults are not served yet.
    fn make_vm(
        &self,
        id: VmId,
        info: ShimInfo,
        image: Option<Arc<Image>>,
        record: &VmRecord,
        tracked: bool,
    ) -> Result<Arc<Vm>> {
        let failed = |what: &str| internal(format!("{what} of VM {id}"));
        let pages = ByteSize(info.ram_len).pages();
        let words = usize::try_from(pages.0.div_ceil(64)).unwrap_or(0);
        let bits = self.vm_file(id, "dirty");
        layer::reserve(&bits, words).map_err(failed("make room for the dirty bits"))?;
        let dirty = SharedAtomics::open(&bits, words).map_err(failed("make the dirty bits"))?;
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
        Vm::register(parts).map_err(failed("register the memory"))
    }

    /// From now on the VM is known to all.
    fn publish_vm(&self, id: VmId, vm: Arc<Vm>, record: VmRecord) {
        let mut inner = self.lock();
        inner.vms.insert(id, VmState { vm, record, stage: Stage::Idle });
        self.publish(&inner);
    }

    fn publish(&self, inner: &Inner) {
        self.vms.store(Arc::new(inner.vms.values().map(|s| s.vm.clone()).collect()));
    }

    /// Forgets a VM that is gone or about to go. If its last checkpoint is still being copied, waits for that first.
    ///
    /// # Errors
    /// `no_such_vm`.
    pub fn detach(&self, id: VmId) -> Result<()> {
        let session = {
            let mut inner = self.lock();
            if inner.unserved.remove(&id).is_some() {
                self.remove_vm_files(id);
                self.collect(&mut inner);
                return Ok(());
            }
            inner.vm(id)?.vm.session()
        };
        if let Some(session) = session {
            session.wait();
        }
        let _ = self.abort(id);
        let mut inner = self.lock();
        if let Some(state) = inner.vms.remove(&id) {
            state.vm.end();
        }
        self.publish(&inner);
        self.remove_vm_files(id);
        self.collect(&mut inner);
        Ok(())
    }

    // ---- reports -------------------------------------------------------------------------------------------------

    /// Everything, counted.
    #[must_use]
    pub fn stats(&self) -> StatsReport {
        let (images, sources, unserved) = {
            let inner = self.lock();
            (
                inner.images.keys().chain(inner.damaged.keys()).copied().collect::<Vec<_>>(),
                inner.sources.clone(),
                inner.unserved.iter().map(|(&id, vm)| vm.report(id)).collect::<Vec<_>>(),
            )
        };
        StatsReport {
            vms: self.vms.load().iter().map(|vm| vm.report()).chain(unserved).collect(),
            images: images.into_iter().filter_map(|id| self.report_image(id).ok()).collect(),
            sources: sources.iter().map(|s| s.report()).collect(),
            served_pages: self.served.pages.load(Ordering::Relaxed),
            served_bytes: self.served.bytes.load(Ordering::Relaxed),
            bad_peers: self.served.bad_peers.load(Ordering::Relaxed),
        }
    }

    /// How many VMs are attached, those that could not be taken over included.
    #[must_use]
    pub fn vm_count(&self) -> usize {
        let inner = self.lock();
        inner.vms.len() + inner.unserved.len()
    }
}

impl Unserved {
    fn report(&self, id: VmId) -> VmReport {
        let view = self.record.as_ref().map(|r| r.view);
        VmReport {
            vm: id,
            image: view.and_then(|v| if let View::Image(image) = v { Some(image) } else { None }),
            missing_faults: 0,
            zero_pages: 0,
            local_pages: 0,
            demand_pages: 0,
            prefetched_pages: 0,
            network_bytes: 0,
            write_faults: 0,
            waiting: 0,
            stalled: Some(self.reason.clone()),
            private_bytes: 0,
            ram_pss_bytes: 0,
            vmm_pss_bytes: 0,
            local_fault_us: Latency::default(),
            remote_fault_us: Latency::default(),
        }
    }
}

/// Ends a layer that nothing needs any more.
fn remove(layer: &Layer) {
    // They hold each other: without this its pages would stay for as long as the pager.
    layer.session.store(None);
    if let Err(err) = layer.remove_files() {
        tracing::warn!(layer = %layer.id, error = %err, "files of a layer are left");
    }
}

/// Starts the fault thread of a VM.
fn serve_faults(vm: &Arc<Vm>) -> io::Result<()> {
    let served = vm.clone();
    std::thread::Builder::new().name(format!("fault-{}", vm.id.short())).spawn(move || served.serve()).map(drop)
}

fn micros(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
