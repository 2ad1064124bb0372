//! An image on this host: its layers, opened, and its flat index.

use crate::layer::{Layer, Located};
use crate::source::Source;
use ramet_memory::{ByteSize, ImageId, ImageIndex, ImageSpec, LayerSpec, PageIndex, Segment};
use std::sync::{Arc, OnceLock};

/// An image whose layers are open. Immutable, and replaced by a new one when its parent's pages are all copied: by then
/// pages may have turned out unchanged.
#[derive(Debug)]
pub struct Image {
    /// Its name.
    pub id: ImageId,
    /// The guest's memory.
    pub memory: ByteSize,
    /// Its layers, oldest first. Never empty.
    pub layers: Vec<Arc<Layer>>,
    /// Where its pages come from; `None` for an image made here.
    pub source: Option<Arc<Source>>,
    /// Made at the first use: not in the pause of the checkpoint.
    index: OnceLock<ImageIndex>,
}

impl Image {
    /// The image with these opened layers.
    #[must_use]
    pub fn new(id: ImageId, memory: ByteSize, layers: Vec<Arc<Layer>>, source: Option<Arc<Source>>) -> Arc<Self> {
        Arc::new(Self { id, memory, layers, source, index: OnceLock::new() })
    }

    /// The layer that owns `page`; `None` where it reads as zeros.
    #[must_use]
    pub fn owner(&self, page: PageIndex) -> Option<&Arc<Layer>> {
        self.index.get_or_init(|| self.spec().index()).owner(page).map(|o| &self.layers[o])
    }

    /// Where the bytes of `page` are.
    #[must_use]
    pub fn locate(&self, page: PageIndex) -> Located {
        self.owner(page).map_or(Located::Zero, |owner| owner.locate(page))
    }

    /// How a VM maps the image; see [`ImageSpec::view`].
    #[must_use]
    pub fn view(&self, max_segments: usize) -> Vec<Segment> {
        self.spec().view(max_segments)
    }

    /// The newest layer.
    #[must_use]
    pub fn top(&self) -> &Arc<Layer> {
        &self.layers[self.layers.len() - 1]
    }

    /// The image as others should see it now: without pages that turned out unchanged.
    #[must_use]
    pub fn spec(&self) -> ImageSpec {
        let layers = self.layers.iter().map(|l| LayerSpec { id: l.id, owned: l.settled() });
        ImageSpec { image: self.id, memory: self.memory, layers: layers.collect() }
    }

    /// Why the image can never be complete, if so.
    #[must_use]
    pub fn broken(&self) -> Option<String> {
        self.layers.iter().find_map(|l| l.session.load().as_ref().and_then(|s| s.failure().map(str::to_owned)))
    }

    /// Why its copying out of the parent does not get on at the moment, if so.
    #[must_use]
    pub fn stalled(&self) -> Option<String> {
        self.layers.iter().find_map(|l| l.session.load().as_ref().and_then(|s| s.trouble()))
    }

    /// Whether every page has been copied out of its parent.
    #[must_use]
    pub fn complete(&self) -> bool {
        self.layers.iter().all(|l| l.session.load().as_ref().is_none_or(|s| s.owed() == 0))
    }
}
