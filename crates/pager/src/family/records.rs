//! What of a family is on disk, and how the next pager takes it over.
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
//!
//! # Damage
//!
//! A record that can't be read costs the family that image or that VM, no more. The image is reported as broken, and VMs
//! that need it as stalled, each with the reason; they wait. As long as there is such an image no layer is taken for left
//! over, since the image may be added again, and then its VMs go on.

use super::{Family, Inner, Result, Unserved, internal, serve_faults};
use crate::{
    control::{ControlError, SourceAddress, View},
    image::Image,
    layer::{Layer, PageState},
    session::CopySession,
    vm::Vm,
};
use ramet_kernel::shim::ShimClient;
use ramet_memory::{ByteSize, ImageId, LayerId, PAGE_SIZE, Segment, VmId};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

/// `vms/ID.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct VmRecord {
    pub(super) shim_sock: PathBuf,
    pub(super) pid: u32,
    pub(super) view: View,
    pub(super) segments: Vec<Segment>,
    /// The image of the last checkpoint, over which changes are tracked.
    pub(super) last: Option<ImageId>,
    /// Whether a checkpoint is prepared and not committed: what it took from the dirty bits is lost with the pager.
    pub(super) unsettled: bool,
}

/// `images/ID.json`.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct ImageRecord {
    memory: ByteSize,
    /// Oldest first.
    layers: Vec<LayerId>,
    /// Where the image came from, if from another host.
    source: Option<SourceAddress>,
    /// Where the pages of its layers come from: an image made here may lie over layers of another host, whose own image
    /// may be gone.
    #[serde(default)]
    layer_sources: BTreeMap<LayerId, SourceAddress>,
    /// The VM whose memory is still being copied.
    parent: Option<VmId>,
}

/// Why a VM was not taken over.
enum Untaken {
    /// Its VMM is gone.
    Gone(io::Error),
    /// It is there, and waits.
    Unserved(String),
}

impl Unserved {
    /// Whether the VM's memory shows an image, as far as is known.
    pub(super) fn shows(&self, image: ImageId) -> bool {
        self.record.as_ref().is_some_and(|r| r.view == View::Image(image))
    }
}

impl Family {
    pub(super) fn save_vm(&self, vm: VmId, record: &VmRecord) -> Result<()> {
        save(&self.vm_file(vm, "json"), &to_json(record)).map_err(internal(format_args!("save VM {vm}")))
    }

    pub(super) fn remove_vm_files(&self, vm: VmId) {
        for extension in ["json", "dirty"] {
            let _ = fs::remove_file(self.vm_file(vm, extension));
        }
    }

    /// Puts an image on record. Its layers' own files are written before.
    pub(super) fn save_image(&self, inner: &Inner, image: &Image) -> Result<()> {
        let source_of = |l: &Arc<Layer>| Some((l.id, l.source.load().as_ref()?.address()));
        let record = ImageRecord {
            memory: image.memory,
            layers: image.layers.iter().map(|l| l.id).collect(),
            source: image.source.as_ref().map(|s| s.address()),
            layer_sources: image.layers.iter().filter_map(source_of).collect(),
            parent: inner.parents.get(&image.id).copied(),
        };
        save(&self.image_file(image.id, "json"), &to_json(&record))
            .map_err(internal(format_args!("save checkpoint {}", image.id)))
    }

    pub(super) fn remove_image_files(&self, image: ImageId) {
        for extension in ["json", "rimg"] {
            let _ = fs::remove_file(self.image_file(image, extension));
        }
    }

    /// Takes over what a pager before this one left: see the module's documentation. VMs whose VMM is gone are dropped.
    /// Images and VMs whose records are damaged are left out, and reported by [`Family::stats`].
    ///
    /// # Errors
    /// When the directory can't be read.
    pub fn restore(self: &Arc<Self>) -> anyhow::Result<()> {
        let images = self.restore_images()?;
        for id in ids::<VmId>(&self.dir.join("vms"), "json")? {
            match read_record(&self.vm_file(id, "json")) {
                Ok(record) => drop(self.restore_vm(id, record)),
                Err(err) => self.leave_unserved(id, None, err),
            }
        }
        self.restore_sessions(&images);
        // Not before: a write that is let through must know of the copying that it has to wait for.
        for vm in self.vms.load().iter() {
            serve_faults(vm)?;
            // Whoever waited for the pager before this one faults again.
            vm.wake_all();
        }
        let mut inner = self.lock();
        if inner.damaged.is_empty() {
            self.remove_strays(&inner)?;
        }
        self.collect(&mut inner);
        Ok(())
    }

    /// Opens all images; returns what is on record of those that could be.
    fn restore_images(&self) -> io::Result<Vec<(ImageId, ImageRecord)>> {
        let mut inner = self.lock();
        let mut opened = Vec::new();
        for id in ids::<ImageId>(&self.dir.join("images"), "json")? {
            let path = self.image_file(id, "json");
            let layers = read_record::<ImageRecord>(&path).and_then(|record| {
                let layers = self.restore_layers(&mut inner, &record);
                layers.map(|l| (record, l)).map_err(|err| format!("its layers can't be opened: {err}"))
            });
            match layers {
                Ok((record, layers)) => opened.push((id, record, layers)),
                Err(reason) => {
                    tracing::error!(image = %id, reason, "checkpoint is left out: add it again, or remove it");
                    inner.damaged.insert(id, reason);
                }
            }
        }
        // Sources after all layers: any record that has a layer may be the one that knows where it comes from.
        for (_, record, layers) in &opened {
            for layer in layers {
                self.restore_source(&mut inner, layer, record.layer_sources.get(&layer.id));
            }
        }
        for (_, record, layers) in &opened {
            for layer in layers {
                self.restore_source(&mut inner, layer, record.source.as_ref());
            }
        }
        let images = opened.into_iter().map(|(id, record, layers)| {
            // Without a certificate, say, it can't be reached: its VMs stall, and say so.
            let source = record.source.as_ref().and_then(|address| self.source(&mut inner, address).ok());
            let image = Image::new(id, record.memory, layers, source);
            inner.images.insert(id, image);
            (id, record)
        });
        Ok(images.collect())
    }

    /// Opens the layers of one image; those that were not open before are closed again when one can't be.
    fn restore_layers(&self, inner: &mut Inner, record: &ImageRecord) -> io::Result<Vec<Arc<Layer>>> {
        let mut layers: Vec<Arc<Layer>> = Vec::new();
        let mut new = Vec::new();
        let mut open = |id: LayerId, below: Option<Arc<Layer>>| {
            let below_id = below.as_ref().map(|b| b.id);
            let layer = match inner.layers.get(&id) {
                Some(layer) => layer.clone(),
                None => {
                    let layer = Layer::open(&self.layers_dir(), id, below)?;
                    inner.layers.insert(id, layer.clone());
                    new.push(id);
                    layer
                }
            };
            let fits = layer.pages == record.memory.pages() && layer.base.as_ref().map(|b| b.id) == below_id;
            if fits { Ok(layer) } else { Err(io::Error::other("it belongs to another image")) }
        };
        let mut opened = if record.layers.is_empty() { Err(io::Error::other("it has none")) } else { Ok(()) };
        for &id in &record.layers {
            match open(id, layers.last().cloned()) {
                Ok(layer) => layers.push(layer),
                Err(err) => {
                    opened = Err(io::Error::other(format!("layer {id}: {err}")));
                    break;
                }
            }
        }
        if opened.is_err() {
            inner.layers.retain(|id, _| !new.contains(id));
        }
        opened.map(|()| layers)
    }

    fn restore_source(&self, inner: &mut Inner, layer: &Layer, address: Option<&SourceAddress>) {
        let Some(address) = address.filter(|_| layer.remote && layer.source.load().is_none()) else { return };
        match self.source(inner, address) {
            Ok(source) => layer.source.store(Some(source)),
            Err(err) => tracing::error!(layer = %layer.id, error = %err, "a layer has no source"),
        }
    }

    /// Takes a VM over, or says why not: then it is forgotten if its VMM is gone, and waits otherwise.
    fn restore_vm(&self, id: VmId, record: VmRecord) -> Option<Arc<Vm>> {
        match self.take_over(id, record.clone()) {
            Ok(vm) => Some(vm),
            Err(Untaken::Gone(err)) => {
                tracing::warn!(vm = %id, error = %err, "VM could not be taken over: its VMM is gone");
                self.remove_vm_files(id);
                self.lock().unserved.remove(&id);
                None
            }
            Err(Untaken::Unserved(reason)) => {
                self.leave_unserved(id, Some(record), reason);
                None
            }
        }
    }

    fn leave_unserved(&self, id: VmId, record: Option<VmRecord>, reason: String) {
        tracing::error!(vm = %id, reason, "VM is not served: it waits");
        self.lock().unserved.insert(id, Unserved { record, reason });
    }

    fn take_over(&self, id: VmId, mut record: VmRecord) -> Result<Arc<Vm>, Untaken> {
        let mut shim = ShimClient::connect(&record.shim_sock).map_err(|err| match err.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Untaken::Gone(err),
            _ => Untaken::Unserved(format!("its VMM can't be reached: {err}: restart the pager to try again")),
        })?;
        let info = shim.info().map_err(|err| match err.kind() {
            io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => {
                Untaken::Gone(err)
            }
            _ => Untaken::Unserved(format!("its VMM does not answer: {err}: restart the pager to try again")),
        })?;
        let unserved = |err: ControlError| Untaken::Unserved(err.message);
        let image = match record.view {
            View::Anonymous => None,
            View::Image(image) => Some(self.image(image).map_err(unserved)?),
        };
        let tracked = record.last.is_some() || record.unsettled;
        // It also starts over when its last checkpoint is there no more, or damaged: there is nothing that a change is a
        // change of; and when its dirty bits are lost.
        let bits = self.vm_file(id, "dirty");
        let len = (info.ram_len / PAGE_SIZE as u64).div_ceil(64).max(1) * 8;
        let bits_there = bits.metadata().is_ok_and(|m| m.len() == len);
        if !bits_there {
            let _ = fs::remove_file(&bits);
        }
        let base_there = record.last.is_none_or(|last| self.image(last).is_ok());
        let start_over = record.unsettled || !base_there || !bits_there;
        if start_over {
            record.last = None;
            record.unsettled = false;
        }
        let vm = self.make_vm(id, info, image, &record, tracked).map_err(unserved)?;
        if start_over {
            vm.untrack();
            if let Err(err) = self.save_vm(id, &record) {
                // What is on record makes the next pager start over again.
                tracing::warn!(vm = %id, error = %err, "VM can't be put on record");
            }
        }
        self.lock().unserved.remove(&id);
        self.publish_vm(id, vm.clone(), record);
        Ok(vm)
    }

    /// Takes over the VMs that wait for an image which has been made whole.
    pub(super) fn serve_unserved(&self) {
        let waiting: Vec<_> = {
            let inner = self.lock();
            inner.unserved.iter().filter_map(|(&id, u)| Some((id, u.record.clone()?))).collect()
        };
        for (id, record) in waiting {
            let Some(vm) = self.restore_vm(id, record) else { continue };
            if let Err(err) = serve_faults(&vm) {
                tracing::error!(vm = %id, error = %err, "no fault thread: restart the pager");
            }
            vm.wake_all();
        }
    }

    /// Goes on with the copying of checkpoints whose pages are still in their parents' memory.
    fn restore_sessions(self: &Arc<Self>, records: &[(ImageId, ImageRecord)]) {
        for (id, record) in records {
            let (Some(parent), Ok(image)) = (record.parent, self.image(*id)) else { continue };
            let layer = image.top().clone();
            let owed = layer.owned().map_or(0, |o| o.iter().filter(|&p| layer.state(p) == PageState::Owed).count());
            let vm = {
                let mut inner = self.lock();
                inner.parents.insert(*id, parent);
                inner.vms.get(&parent).map(|s| s.vm.clone())
            };
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

    /// Removes layers of checkpoints that were prepared and not committed: they are on no record.
    fn remove_strays(&self, inner: &Inner) -> io::Result<()> {
        for entry in fs::read_dir(self.layers_dir())? {
            let path = entry?.path();
            let id = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.parse::<LayerId>().ok());
            if id.is_some_and(|id| inner.layers.contains_key(&id)) {
                continue;
            }
            if let Err(err) = fs::remove_dir_all(&path).or_else(|_| fs::remove_file(&path)) {
                tracing::warn!(path = %path.display(), error = %err, "a left-over layer can't be removed");
            }
        }
        Ok(())
    }
}

fn read_record<T: DeserializeOwned>(path: &Path) -> std::result::Result<T, String> {
    let damaged = |err: &dyn std::fmt::Display| format!("its record {} can't be read: {err}", path.display());
    let bytes = fs::read(path).map_err(|err| damaged(&err))?;
    serde_json::from_slice(&bytes).map_err(|err| damaged(&err))
}

/// The identifiers that name files of a directory.
fn ids<T: std::str::FromStr>(dir: &Path, extension: &str) -> io::Result<Vec<T>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir)? {
        let path = entry?.path();
        if path.extension().is_some_and(|e| e == UNFINISHED) {
            // A pager was killed while it wrote this.
            if let Err(err) = fs::remove_file(&path) {
                tracing::warn!(path = %path.display(), error = %err, "an unfinished file can't be removed");
            }
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

fn to_json(value: &impl Serialize) -> Vec<u8> {
    // These records hold nothing that JSON can't.
    serde_json::to_vec_pretty(value).unwrap_or_default()
}

/// Extension of files that are being written.
const UNFINISHED: &str = "unfinished";

/// Replaces a file as a whole: it is written beside and renamed over, so that it is there whole or not at all. Several may
/// do so at once, also with files that differ by their extension only.
pub(super) fn save(path: &Path, bytes: &[u8]) -> io::Result<()> {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let beside = path.with_extension(format!("{}-{number}.{UNFINISHED}", std::process::id()));
    let written = fs::write(&beside, bytes).and_then(|()| fs::rename(&beside, path));
    if written.is_err() {
        let _ = fs::remove_file(&beside);
    }
    written
}
