//! The images on this host: their layers, where their pages come from, and what is removed when.

use super::{Family, Inner, LOOK, Result, broken, internal, no_image, records::save, remove};
use crate::{
    control::{ControlError, ImageReport, LayerReport, SourceAddress},
    image::Image,
    layer::Layer,
    session::CopySession,
    source::Source,
    vm::VmView,
};
use ramet_memory::{ImageId, ImageSpec, LayerId, LayerSpec, PageCount, VmId};
use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
};

impl Family {
    pub(super) fn image(&self, id: ImageId) -> Result<Arc<Image>> {
        self.lock().image(id)
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

    // ---- images of other hosts -----------------------------------------------------------------------------------

    /// Adds an image of another host. Layers that are here already are shared. For an image that is here already and came
    /// from another address, its pages come from the new one from now on; one whose record is damaged is made whole.
    ///
    /// # Errors
    /// `exists`, `bad_request` when the file describes no such image, `internal`: nothing half-made is left.
    pub fn add_image(self: &Arc<Self>, id: ImageId, spec_path: &Path, address: &SourceAddress) -> Result<()> {
        let bytes = fs::read(spec_path).map_err(internal(format_args!("read {}", spec_path.display())))?;
        let spec = ImageSpec::decode(&bytes).map_err(|err| ControlError::new("bad_request", err.to_string()))?;
        if spec.image != id {
            return Err(ControlError::new(
                "bad_request",
                format!("{} describes another checkpoint", spec_path.display()),
            ));
        }
        let mut inner = self.lock();
        if let Some(image) = inner.images.get(&id).cloned() {
            return self.renew_source(inner, &image, address);
        }
        let mut made = Vec::new();
        let added = self
            .source(&mut inner, address)
            .and_then(|source| self.make_image(&mut inner, &spec, &source, &mut made))
            .and_then(|image| self.save_image(&inner, &image).map(|()| image));
        match added {
            Ok(image) => {
                inner.images.insert(id, image);
                let was_damaged = inner.damaged.remove(&id).is_some();
                drop(inner);
                if was_damaged {
                    self.serve_unserved();
                }
                Ok(())
            }
            Err(err) => {
                for (layer, new) in made {
                    if let Some(layer) = inner.layers.remove(&layer)
                        && new
                    {
                        remove(&layer);
                    }
                }
                // A source that was started for this image alone ends.
                self.collect(&mut inner);
                Err(err)
            }
        }
    }

    /// Opens or makes the layers of another host's image. `made` gets those that were not open before, and whether they
    /// are new on this host.
    fn make_image(
        &self,
        inner: &mut Inner,
        spec: &ImageSpec,
        source: &Arc<Source>,
        made: &mut Vec<(LayerId, bool)>,
    ) -> Result<Arc<Image>> {
        let pages = spec.memory.pages();
        let mut layers: Vec<Arc<Layer>> = Vec::new();
        for layer_spec in &spec.layers {
            let layer = match inner.layers.get(&layer_spec.id) {
                Some(layer)
                    if layer.pages == pages
                        && layer.base.as_ref().map(|b| b.id) == layers.last().map(|l: &Arc<Layer>| l.id) =>
                {
                    layer.clone()
                }
                Some(_) => {
                    let message = format!("layer {} is here with another size or over another layer", layer_spec.id);
                    return Err(ControlError::new("bad_request", message));
                }
                None => {
                    let (layer, new) = self
                        .make_layer(layer_spec, layers.last().cloned(), pages)
                        .map_err(internal(format_args!("make layer {}", layer_spec.id)))?;
                    layer.source.store(Some(source.clone()));
                    inner.layers.insert(layer.id, layer.clone());
                    made.push((layer.id, new));
                    layer
                }
            };
            layers.push(layer);
        }
        Ok(Image::new(spec.image, spec.memory, layers, Some(source.clone())))
    }

    /// Makes a layer of another host. One of a damaged image may be on disk still, and mapped by VMs: it is used again,
    /// never replaced under them.
    fn make_layer(
        &self,
        spec: &LayerSpec,
        below: Option<Arc<Layer>>,
        pages: PageCount,
    ) -> io::Result<(Arc<Layer>, bool)> {
        if !self.layers_dir().join(spec.id.to_string()).exists() {
            let layer = Layer::create(&self.layers_dir(), spec.id, below, pages, true)?;
            if let Err(err) = layer.set_owned(spec.owned.clone()) {
                remove(&layer);
                return Err(err);
            }
            return Ok((layer, true));
        }
        let left = |err| io::Error::other(format!("one that was left here can't be used, remove its VMs: {err}"));
        let layer = Layer::open(&self.layers_dir(), spec.id, below).map_err(left)?;
        if !layer.remote || layer.pages != pages || layer.owned() != Some(&spec.owned) {
            return Err(io::Error::other("a layer of that name was left here, and differs"));
        }
        Ok((layer, false))
    }

    /// The image is here: what of it comes from elsewhere, or from nowhere, comes from `address` from now on.
    fn renew_source(
        &self,
        mut inner: std::sync::MutexGuard<'_, Inner>,
        image: &Arc<Image>,
        address: &SourceAddress,
    ) -> Result<()> {
        let old = image.source.clone().filter(|s| s.address() != *address);
        let lost = image.layers.iter().any(|l| l.remote && l.source.load().is_none());
        let moved = old.as_ref().is_some_and(|s| s.address().name == address.name);
        if old.is_none() && !lost {
            return Err(ControlError::new("exists", format!("checkpoint {} is on this host already", image.id)));
        }
        if let Some(old) = old.as_ref().filter(|_| moved) {
            // The same host: all that comes from it moves along.
            let before = old.address();
            self.move_source(&inner, old, address)?;
            tracing::info!(source = address.name, from = before.addr, to = address.addr, "a source has moved");
            if !lost {
                return Ok(());
            }
        }
        let new = match old.as_ref().filter(|_| moved) {
            Some(moved) => moved.clone(),
            None => self.source(&mut inner, address)?,
        };
        let of_old = |l: &Layer| l.source.load().as_ref().zip(old.as_ref()).is_some_and(|(a, b)| Arc::ptr_eq(a, b));
        let changed: Vec<_> =
            image.layers.iter().filter(|l| l.remote && (l.source.load().is_none() || of_old(l))).cloned().collect();
        for layer in &changed {
            layer.source.store(Some(new.clone()));
        }
        let renewed = Image::new(image.id, image.memory, image.layers.clone(), Some(new.clone()));
        inner.images.insert(image.id, renewed);
        let is_changed = |layer: &Layer| changed.iter().any(|c| c.id == layer.id);
        for image in inner.images.values().filter(|i| i.layers.iter().any(|l| is_changed(l))) {
            self.save_image(&inner, image)?;
        }
        self.collect(&mut inner);
        drop(inner);
        if let Some(old) = old.filter(|_| !moved) {
            old.hand_over(is_changed, &new);
        }
        Ok(())
    }

    /// The source at an address, connecting to it if this is the first image from there.
    pub(super) fn source(&self, inner: &mut Inner, address: &SourceAddress) -> Result<Arc<Source>> {
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
        self.move_source(&inner, source, new)
    }

    fn move_source(&self, inner: &Inner, source: &Arc<Source>, to: &SourceAddress) -> Result<()> {
        source.move_to(to.clone()).map_err(|err| ControlError::new("bad_request", err.to_string()))?;
        let comes = |l: &Arc<Layer>| l.source.load().as_ref().is_some_and(|s| Arc::ptr_eq(s, source));
        for image in inner.images.values().filter(|i| i.layers.iter().any(comes)) {
            self.save_image(inner, image)?;
        }
        Ok(())
    }

    // ---- removing ------------------------------------------------------------------------------------------------

    /// Drops an image, and the layers that nothing else needs. Its copying is waited for, unless there is no room for it.
    ///
    /// # Errors
    /// `no_such_image`, `in_use` naming the VMs that show it.
    pub fn drop_image(&self, id: ImageId) -> Result<()> {
        let image = {
            let inner = self.lock();
            check_unused(&inner, id)?;
            if inner.damaged.contains_key(&id) { None } else { Some(inner.image(id)?) }
        };
        for session in image.iter().flat_map(|i| &i.layers).filter_map(|l| l.session.load_full()) {
            self.settle(id, &session);
        }
        let mut inner = self.lock();
        check_unused(&inner, id)?;
        inner.images.remove(&id);
        inner.damaged.remove(&id);
        inner.parents.remove(&id);
        self.remove_image_files(id);
        // A parent that tracks its changes over this image starts over, rather than keep a copy of its memory alive.
        for (vm_id, state) in &mut inner.vms {
            let copied = state.vm.session().zip(image.as_ref()).is_some_and(|(s, i)| Arc::ptr_eq(s.layer(), i.top()));
            if (state.record.last == Some(id) || copied) && state.stage.is_idle() {
                self.start_over(*vm_id, state);
            }
        }
        self.collect(&mut inner);
        Ok(())
    }

    /// Waits until a layer of an image that is dropped is copied. Without room for it, it would keep the room that its
    /// removal makes: then it is cancelled, if nothing else needs the layer.
    fn settle(&self, id: ImageId, session: &CopySession) {
        while !session.wait_for(LOOK) {
            if session.trouble().is_some() && !self.lock().needs(session.layer().id, Some(id)) {
                session.cancel();
            }
        }
    }

    /// Removes layers that no image, no VM and no checkpoint under way needs any more, and sources that serve none.
    pub(super) fn collect(&self, inner: &mut Inner) {
        let gone: Vec<LayerId> = inner.layers.keys().copied().filter(|&id| !inner.needs(id, None)).collect();
        for id in gone {
            if let Some(layer) = inner.layers.remove(&id) {
                remove(&layer);
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

    // ---- reports -------------------------------------------------------------------------------------------------

    /// What an image is and has on this host.
    ///
    /// # Errors
    /// `no_such_image`.
    pub fn report_image(&self, id: ImageId) -> Result<ImageReport> {
        let (image, vms) = {
            let inner = self.lock();
            let vms = inner.users(id);
            match inner.images.get(&id) {
                Some(image) => (image.clone(), vms),
                None => {
                    let reason = inner.damaged.get(&id).cloned().ok_or_else(|| no_image(id))?;
                    return Ok(ImageReport {
                        image: id,
                        memory: 0,
                        layers: Vec::new(),
                        complete: false,
                        broken: Some(reason),
                        stalled: None,
                        vms,
                    });
                }
            }
        };
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
            stalled: image.stalled(),
            vms,
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
            Some(reason) => Err(broken(id, &reason)),
            None => self.report_image(id),
        }
    }
}

impl Inner {
    /// The VMs whose memory shows an image.
    fn users(&self, id: ImageId) -> Vec<VmId> {
        let shows = |vm: &VmView| matches!(vm, VmView::Image { image, .. } if image.id == id);
        let served = self.vms.values().filter(|s| shows(&s.vm.view)).map(|s| s.vm.id);
        let unserved = self.unserved.iter().filter(|(_, u)| u.shows(id)).map(|(&vm, _)| vm);
        served.chain(unserved).collect()
    }

    /// Whether an image (but `except`), a VM or a checkpoint under way needs a layer.
    fn needs(&self, layer: LayerId, except: Option<ImageId>) -> bool {
        let has = |image: &Image| image.layers.iter().any(|l| l.id == layer);
        self.images.values().any(|i| Some(i.id) != except && has(i))
            || self
                .vms
                .values()
                .any(|s| s.stage.needs(layer) || matches!(&s.vm.view, VmView::Image { image, .. } if has(image)))
    }
}

fn check_unused(inner: &Inner, id: ImageId) -> Result<()> {
    let users: Vec<_> = inner.users(id).iter().map(VmId::to_string).collect();
    if users.is_empty() {
        return Ok(());
    }
    Err(ControlError::new("in_use", format!("checkpoint {id} is in use by VMs {}", users.join(", "))))
}
