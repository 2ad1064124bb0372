//! A checkpoint's way: prepared while the VM runs, committed in its pause or given up, copied behind its back.

use super::{Family, Inner, LOOK, Result, VmState, internal, micros, no_vm, remove};
use crate::{
    control::{CommitReply, ControlError, PrepareReply, View},
    image::Image,
    layer::{Layer, PageState},
    session::CopySession,
    vm::Vm,
};
use ramet_memory::{ImageId, LayerId, PageIndex, PageRun, PageSet, VmId};
use std::{sync::Arc, time::Instant};

/// How far a VM's checkpoint is.
#[derive(Debug)]
pub(super) enum Stage {
    /// None is under way.
    Idle,
    /// Its memory is looked at.
    Preparing {
        /// The image below, which must stay.
        base: Option<Arc<Image>>,
        /// It was given up meanwhile.
        given_up: bool,
    },
    /// Between prepare and commit.
    Prepared(Prepared),
}

/// A checkpoint between prepare and commit.
#[derive(Debug)]
pub(super) struct Prepared {
    image: ImageId,
    layer: Arc<Layer>,
    candidates: PageSet,
}

impl Stage {
    /// Whether the checkpoint under way lies over this layer.
    pub(super) fn needs(&self, layer: LayerId) -> bool {
        match self {
            Self::Idle => false,
            Self::Preparing { base, .. } => base.iter().flat_map(|b| &b.layers).any(|l| l.id == layer),
            Self::Prepared(prepared) => Layer::stack(&prepared.layer).iter().any(|l| l.id == layer),
        }
    }

    pub(super) const fn is_idle(&self) -> bool {
        matches!(self, Self::Idle)
    }
}

impl Family {
    /// Prepares a checkpoint of a running VM: from its return on, every write is seen, and what may have changed since the
    /// last checkpoint is protected.
    ///
    /// # Errors
    /// `no_such_vm`, `state` when one is prepared already, `exists`, `broken`, `internal`: nothing of it is left.
    pub fn prepare(self: &Arc<Self>, id: VmId, image: ImageId, layer: LayerId) -> Result<PrepareReply> {
        let started = Instant::now();
        let (vm, base) = self.begin(id, image, layer)?;
        let made = self.make_prepared(id, &vm, base, image, layer);
        let mut inner = self.lock();
        let state = inner.vms.get_mut(&id).filter(|s| Arc::ptr_eq(&s.vm, &vm));
        let Some(state) = state else {
            if let Ok((prepared, _)) = made {
                remove(&prepared.layer);
            }
            return Err(no_vm(id));
        };
        let stage = std::mem::replace(&mut state.stage, Stage::Idle);
        match made {
            Ok((prepared, _)) if matches!(stage, Stage::Preparing { given_up: true, .. }) => {
                self.give_up(&mut inner, id, &prepared.layer);
                Err(ControlError::new("state", format!("the checkpoint of VM {id} was given up")))
            }
            Ok((prepared, full)) => {
                let candidate_pages = prepared.candidates.count().0;
                state.stage = Stage::Prepared(prepared);
                Ok(PrepareReply { candidate_pages, full, prepare_us: micros(started.elapsed()) })
            }
            Err(err) => {
                self.start_over_without_base(&mut inner, id);
                self.collect(&mut inner);
                Err(err)
            }
        }
    }

    /// Refuses what can be refused, and keeps the image below from being removed.
    fn begin(&self, id: VmId, image: ImageId, layer: LayerId) -> Result<(Arc<Vm>, Option<Arc<Image>>)> {
        let mut inner = self.lock();
        let state = inner.vm(id)?;
        if !state.stage.is_idle() {
            return Err(ControlError::new("state", format!("a checkpoint of VM {id} is under way: wait for it")));
        }
        let base = match (state.record.last, state.record.view) {
            (Some(last), _) | (None, View::Image(last)) => Some(last),
            (None, View::Anonymous) => None,
        };
        if inner.images.contains_key(&image) || inner.damaged.contains_key(&image) || inner.layers.contains_key(&layer)
        {
            return Err(ControlError::new("exists", format!("checkpoint {image} exists already")));
        }
        let base = base.map(|base| inner.image(base)).transpose()?;
        check_base(base.as_deref())?;
        let state = inner.vm(id)?;
        state.stage = Stage::Preparing { base: base.clone(), given_up: false };
        Ok((state.vm.clone(), base))
    }

    fn make_prepared(
        &self,
        id: VmId,
        vm: &Vm,
        base: Option<Arc<Image>>,
        image: ImageId,
        layer: LayerId,
    ) -> Result<(Prepared, bool)> {
        // One copying at a time: the one before must have all its pages before the guest may be protected anew.
        if let Some(session) = vm.session() {
            // Without room for it that takes as long as it takes.
            while !session.wait_for(LOOK) {
                let mut inner = self.lock();
                if matches!(inner.vm(id)?.stage, Stage::Preparing { given_up: true, .. }) {
                    return Err(ControlError::new("state", format!("the checkpoint of VM {id} was given up")));
                }
            }
        }
        // It may have failed while it was waited for.
        check_base(base.as_deref())?;
        let layer = Layer::create(&self.layers_dir(), layer, base.map(|b| b.top().clone()), vm.pages, false)
            .map_err(internal(format_args!("make a layer for VM {id}")))?;
        match self.find_candidates(id, vm) {
            Ok((candidates, full)) => {
                for run in candidates.runs() {
                    layer.set_run(run, PageState::Owed);
                }
                Ok((Prepared { image, layer, candidates }, full))
            }
            Err(err) => {
                remove(&layer);
                Err(err)
            }
        }
    }

    /// Protects what may have changed since the last checkpoint, and says whether that was all of memory.
    fn find_candidates(&self, id: VmId, vm: &Vm) -> Result<(PageSet, bool)> {
        let mut candidates = PageSet::new(vm.pages);
        {
            let mut inner = self.lock();
            let state = inner.vm(id)?;
            state.record.unsettled = true;
            self.save_vm(id, &state.record)?;
        }
        let found = vm.track().and_then(|full| {
            // Pages that became private while tracking began are found here; later writes are in the dirty bits.
            let take = |run| candidates.insert_run(run);
            if full { vm.private_pages(take) } else { vm.take_dirty(take) }.map(|()| full)
        });
        match found {
            Ok(full) => Ok((candidates, full)),
            Err(err) => {
                // It stays unsettled on record: the bits that were taken are lost, but the next look is a full one.
                vm.untrack();
                Err(internal(format_args!("protect the memory of VM {id}"))(err))
            }
        }
    }

    /// Fixes a prepared checkpoint. The VM is stopped: nothing writes to its memory.
    ///
    /// # Errors
    /// `no_such_vm`, `state` when none is prepared, `internal`: then it is given up as by [`Family::abort`], and the next
    /// checkpoint holds what this one would have.
    pub fn commit(self: &Arc<Self>, id: VmId) -> Result<CommitReply> {
        let started = Instant::now();
        let mut inner = self.lock();
        let state = inner.vm(id)?;
        let Prepared { image, layer, mut candidates } = take_prepared(state).ok_or_else(|| {
            ControlError::new("state", format!("no checkpoint of VM {id} is prepared: call checkpoint_prepare first"))
        })?;
        let vm = state.vm.clone();
        let mut record = state.record.clone();
        let mut late_pages = 0;
        let mut take = |run: PageRun| {
            late_pages += run.len;
            candidates.insert_run(run);
            layer.set_run(run, PageState::Owed);
        };
        let taken = vm.take_dirty(&mut take).and_then(|()| vm.take_new(&mut take));
        let taken = taken.map_err(internal(format_args!("protect the memory of VM {id}")));
        let owed_pages = candidates.count().0;
        let image = Image::new(image, vm.pages.size(), Layer::stack(&layer), None);
        record.last = Some(image.id);
        record.unsettled = false;
        // All of it on record before the VM may go on: a pager killed from now on is followed by one that copies on.
        inner.parents.insert(image.id, id);
        let saved = taken.and_then(|()| {
            layer.set_owned(candidates).map_err(internal(format_args!("save the pages of layer {}", layer.id)))?;
            self.save_image(&inner, &image)?;
            self.save_vm(id, &record)
        });
        if let Err(err) = saved {
            inner.parents.remove(&image.id);
            // The record before the layer that it names.
            self.remove_image_files(image.id);
            self.give_up(&mut inner, id, &layer);
            return Err(err);
        }
        inner.vm(id)?.record = record;
        let session = CopySession::new(layer.clone(), vm.pid, vm.ram_addr, owed_pages);
        layer.session.store(Some(session.clone()));
        vm.set_session(Some(session.clone()));
        inner.layers.insert(layer.id, layer);
        inner.images.insert(image.id, image.clone());
        drop(inner);
        self.start_copier(session, image);
        Ok(CommitReply { owed_pages, late_pages, commit_us: micros(started.elapsed()) })
    }

    pub(super) fn start_copier(self: &Arc<Self>, session: Arc<CopySession>, image: Arc<Image>) {
        let family = self.clone();
        let body = move || {
            family.copy(&session, &image);
            session.finish();
        };
        if let Err(err) = std::thread::Builder::new().name("copier".into()).spawn(body) {
            // Clones and the parent still copy what they touch.
            tracing::error!(error = %err, "no thread for the copier");
        }
    }

    /// The body of a copier thread: copies all, then replaces the image by what it turned out to be.
    fn copy(&self, session: &CopySession, image: &Image) {
        session.copy_all();
        if session.is_cancelled() {
            return;
        }
        if let Some(reason) = session.failure() {
            tracing::error!(image = %image.id, reason, "checkpoint is broken");
            return;
        }
        // They hold each other.
        session.layer().session.store(None);
        let mut inner = self.lock();
        // An image that was dropped must not come back as a record.
        let Some(entry) = inner.images.get_mut(&image.id) else { return };
        let settled = Image::new(image.id, image.memory, image.layers.clone(), image.source.clone());
        *entry = settled.clone();
        let parent = inner.parents.remove(&image.id);
        if let Err(err) = self.save_image(&inner, &settled) {
            // The next pager finds that nothing is owed, and tries again.
            tracing::error!(image = %image.id, error = %err, "checkpoint can't be put on record as copied");
            inner.parents.extend(parent.map(|parent| (image.id, parent)));
        }
    }

    /// Gives a prepared checkpoint up. One that is being prepared is given up as soon as it is.
    ///
    /// # Errors
    /// `no_such_vm`, `state` when none is prepared.
    pub fn abort(&self, id: VmId) -> Result<()> {
        let mut inner = self.lock();
        let state = inner.vm(id)?;
        if let Stage::Preparing { given_up, .. } = &mut state.stage {
            *given_up = true;
            return Ok(());
        }
        let prepared = take_prepared(state);
        let prepared =
            prepared.ok_or_else(|| ControlError::new("state", format!("no checkpoint of VM {id} is prepared")))?;
        self.give_up(&mut inner, id, &prepared.layer);
        Ok(())
    }

    /// Gives the pages that a checkpoint took back to the VM's dirty bits, and removes its layer. The checkpoint is on no
    /// record.
    fn give_up(&self, inner: &mut Inner, id: VmId, layer: &Layer) {
        if let Some(state) = inner.vms.get_mut(&id) {
            let mut run = PageRun { start: PageIndex(0), len: 0 };
            for page in 0..layer.pages.0 {
                if layer.state(PageIndex(page)) == PageState::Owed {
                    if run.end().0 != page {
                        state.vm.give_dirty_back(run);
                        run = PageRun { start: PageIndex(page), len: 0 };
                    }
                    run.len += 1;
                }
            }
            state.vm.give_dirty_back(run);
            state.record.unsettled = false;
            if let Err(err) = self.save_vm(id, &state.record) {
                // What is on record is safe: the next pager looks at all of its memory.
                tracing::warn!(vm = %id, error = %err, "VM stays unsettled on record");
            }
        }
        remove(layer);
        self.start_over_without_base(inner, id);
        self.collect(inner);
    }

    /// A VM whose last checkpoint was removed while the next one was under way, which came to nothing, starts over.
    fn start_over_without_base(&self, inner: &mut Inner, id: VmId) {
        let Inner { vms, images, .. } = inner;
        if let Some(state) = vms.get_mut(&id)
            && state.stage.is_idle()
            && state.record.last.is_some_and(|last| !images.contains_key(&last))
        {
            self.start_over(id, state);
        }
    }

    /// Ends the tracking of a VM's writes: the next checkpoint looks at all of its memory.
    pub(super) fn start_over(&self, id: VmId, state: &mut VmState) {
        state.vm.set_session(None);
        state.vm.untrack();
        state.record.last = None;
        if let Err(err) = self.save_vm(id, &state.record) {
            // The next pager finds that the checkpoint on record is gone, and starts over too.
            tracing::warn!(vm = %id, error = %err, "VM can't be put on record");
        }
    }
}

fn take_prepared(state: &mut VmState) -> Option<Prepared> {
    match std::mem::replace(&mut state.stage, Stage::Idle) {
        Stage::Prepared(prepared) => Some(prepared),
        other => {
            state.stage = other;
            None
        }
    }
}

fn check_base(base: Option<&Image>) -> Result<()> {
    let Some(base) = base else { return Ok(()) };
    if let Some(reason) = base.broken() {
        return Err(ControlError::new(
            "broken",
            format!("checkpoint {} below is broken ({reason}): remove it, and the next one starts afresh", base.id),
        ));
    }
    if base.layers.len() >= ramet_memory::image::MAX_LAYERS {
        return Err(ControlError::new("state", "too many layers: checkpoint a fresh boot instead"));
    }
    Ok(())
}
