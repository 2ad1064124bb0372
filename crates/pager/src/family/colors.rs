//! Coloring an image: what each of its pages is, for whoever fetches pages by meaning.
//!
//! It is done when the image's pages have been copied out of its parent, by a thread that gives way to all others. Guest memory is
//! hostile: [`ramet_color`] bounds what it costs.

use super::{Family, LOOK, Result, internal, records::save};
use crate::{
    control::{ChangedReply, ColorBase, ColorReply, ControlError},
    image::Image,
    layer::{Located, PageState},
    server,
    source::Fetch,
};
use ramet_color::{Base, ColorMap, CpuRoot, GuestMemory, color};
use ramet_memory::{ImageId, PAGE_SIZE, PageCount, PageIndex, PageRun, PageSet};
use std::{
    fs, io,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

/// How little the coloring thread wants of a CPU: as little as can be said.
const NICE: i32 = 19;
/// How long a page of another host is waited for.
const PATIENCE: Duration = Duration::from_secs(20);

impl Family {
    /// Colors an image, and writes its map to `path`. Waits until it is copied out of its parent.
    ///
    /// # Errors
    /// `no_such_image`, `broken`, `internal`: then there is nothing at `path`.
    pub fn color_image(
        self: &Arc<Self>,
        id: ImageId,
        cpus: Vec<CpuRoot>,
        path: &Path,
        base: Option<ColorBase>,
    ) -> Result<ColorReply> {
        let image = self.copied_image(id)?;
        let (family, image_too) = (self.clone(), image.clone());
        let body = move || {
            // Of this thread alone, on Linux.
            let _ = rustix::process::setpriority_process(None, NICE);
            let begin = Instant::now();
            let (map, incremental) = family.color(&image_too, &cpus, base.as_ref())?;
            let encoded = map.encode();
            Ok((map, encoded, incremental, begin.elapsed()))
        };
        let thread = std::thread::Builder::new().name("colorer".into()).spawn(body);
        let ended = thread.map_err(internal("start a thread"))?.join();
        let (map, encoded, incremental, took) =
            ended.map_err(|_| ControlError::new("internal", "the coloring thread ended by a fault of its own"))??;
        // An image that was dropped meanwhile must leave nothing behind.
        let inner = self.lock();
        if !inner.images.contains_key(&id) {
            return Err(super::no_image(id));
        }
        save(path, &encoded).map_err(internal(format_args!("write {}", path.display())))?;
        drop(inner);
        Ok(ColorReply {
            bytes: encoded.len() as u64,
            color_us: super::micros(took),
            incremental,
            method: map.method,
            trouble: map.trouble,
        })
    }

    /// The image, with all its pages on this host or another, and none left in its parent.
    fn copied_image(&self, id: ImageId) -> Result<Arc<Image>> {
        loop {
            let image = self.image(id)?;
            if let Some(reason) = image.broken() {
                return Err(super::broken(id, &reason));
            }
            let session = image.layers.iter().find_map(|l| l.session.load_full());
            match session {
                // Without room for it that takes as long as it takes; the image may be dropped meanwhile.
                Some(session) => drop(session.wait_for(LOOK)),
                None => return Ok(image),
            }
        }
    }

    /// The image's map, and whether an earlier one saved work.
    fn color(&self, image: &Image, cpus: &[CpuRoot], base: Option<&ColorBase>) -> Result<(ColorMap, bool)> {
        let memory = ImageMemory { image };
        let base_map = base.and_then(|base| {
            let bytes = fs::read(&base.path).ok()?;
            ColorMap::decode(&bytes, memory.pages()).ok()
        });
        let earlier = base.and_then(|base| self.lock().images.get(&base.image).cloned());
        let changed = earlier.and_then(|earlier| changed_since(&earlier, image));
        let known = match (&base_map, &changed) {
            (Some(map), Some(changed)) => Some(Base { map, changed }),
            _ => None,
        };
        match color(&memory, cpus, known) {
            Ok(map) => Ok((map, known.is_some())),
            Err(err) if is_elsewhere(&err) => {
                let why = "pages that would tell are on another host that does not answer";
                Ok((base_map.map_or_else(|| ColorMap::unknown(memory.pages(), why), |map| map.outdated(why)), false))
            }
            Err(err) => Err(ControlError::new("internal", format!("Failed to color checkpoint {}: {err}", image.id))),
        }
    }

    /// The pages in which two images differ. Where the bytes of one are on another host, they are taken to differ unless they come
    /// from the same layer.
    ///
    /// # Errors
    /// `no_such_image`, `broken`, `bad_request` for images of different sizes, `internal`.
    pub fn compare_images(&self, id: ImageId, since: ImageId) -> Result<ChangedReply> {
        let (new, old) = (self.copied_image(id)?, self.copied_image(since)?);
        if new.memory != old.memory {
            return Err(ControlError::new("bad_request", format!("checkpoints {id} and {since} differ in size")));
        }
        let mut changed = PageSet::new(new.memory.pages());
        for page in (0..new.memory.pages().0).map(PageIndex) {
            if differs(&new, &old, page).map_err(internal(format_args!("compare page {}", page.0)))? {
                changed.insert(page);
            }
        }
        Ok(ChangedReply { runs: changed.runs().map(|run| [run.start.0, run.len]).collect() })
    }
}

/// Pages that may differ between an image and a later one over it; `None` when it is not over it.
fn changed_since(earlier: &Image, later: &Image) -> Option<PageSet> {
    let (below, above) = later.layers.split_at_checked(earlier.layers.len())?;
    if earlier.memory != later.memory || !earlier.layers.iter().zip(below).all(|(a, b)| a.id == b.id) {
        return None;
    }
    let mut changed = PageSet::new(later.memory.pages());
    for layer in above {
        changed.union_with(layer.owned()?);
    }
    Some(changed)
}

fn differs(new: &Image, old: &Image, page: PageIndex) -> io::Result<bool> {
    let (new, old) = (new.locate(page), old.locate(page));
    let layer = |located: &Located| match located {
        Located::Zero => None,
        Located::Stored(layer) | Located::Owed(layer) | Located::Remote(layer) => Some(layer.id),
    };
    if layer(&new) == layer(&old) {
        return Ok(false);
    }
    let mut pages = [[0; PAGE_SIZE]; 2];
    for (located, bytes) in [new, old].iter().zip(&mut pages) {
        match located {
            Located::Zero => {}
            Located::Stored(layer) => layer.read(page, bytes)?,
            Located::Owed(_) | Located::Remote(_) => return Ok(true),
        }
    }
    Ok(pages[0] != pages[1])
}

/// An image's bytes, as the coloring reads them. Pages of another host are fetched: what tells of the others is a few in a hundred,
/// and the next checkpoint finds them here.
struct ImageMemory<'a> {
    image: &'a Image,
}

/// Bytes that are on another host, which does not answer.
#[derive(Debug, thiserror::Error)]
#[error("page {page} is on another host")]
struct Elsewhere {
    page: u64,
}

fn is_elsewhere(err: &ramet_color::ColorError) -> bool {
    let ramet_color::ColorError::Read { source, .. } = err else { return false };
    source.get_ref().is_some_and(|inner| inner.is::<Elsewhere>())
}

impl ImageMemory<'_> {
    /// Asks for the pages of a run that are on other hosts, all at once; who needs one of them waits for it afterwards.
    fn ask_for(&self, run: PageRun) {
        let mut page = run.start.0;
        while page < run.end().0 {
            let start = page;
            page += 1;
            let Located::Remote(owner) = self.image.locate(PageIndex(start)) else { continue };
            let Ok(source) = owner.required_source() else { return };
            if !owner.change(PageIndex(start), PageState::Absent, PageState::InFlight) {
                continue;
            }
            while page < run.end().0
                && matches!(self.image.locate(PageIndex(page)), Located::Remote(next) if next.id == owner.id)
                && owner.change(PageIndex(page), PageState::Absent, PageState::InFlight)
            {
                page += 1;
            }
            let run = PageRun { start: PageIndex(start), len: page - start };
            Fetch { owner: owner.clone(), file: owner, run, demand: None, vm: None }.ask(&source);
        }
    }

    fn wait_for(&self, page: PageIndex) -> Option<Located> {
        let owner = self.image.owner(page)?;
        let begin = Instant::now();
        loop {
            match server::obtain(owner, page) {
                None if begin.elapsed() < PATIENCE => {}
                found => return found,
            }
        }
    }
}

impl GuestMemory for ImageMemory<'_> {
    fn pages(&self) -> PageCount {
        self.image.memory.pages()
    }

    fn read(&self, mut offset: u64, mut bytes: &mut [u8]) -> io::Result<()> {
        let mut asked = false;
        while !bytes.is_empty() {
            let page = PageIndex::of_offset(offset);
            let within = (offset - page.offset()) as usize;
            let len = (PAGE_SIZE - within).min(bytes.len());
            let left = (within + bytes.len()).div_ceil(PAGE_SIZE) as u64;
            let (now, rest) = bytes.split_at_mut(len);
            let mut located = self.image.locate(page);
            if matches!(located, Located::Remote(_)) {
                if !std::mem::replace(&mut asked, true) {
                    self.ask_for(PageRun { start: page, len: left });
                }
                located = self.wait_for(page).ok_or_else(|| io::Error::other(Elsewhere { page: page.0 }))?;
            }
            match located {
                Located::Zero => now.fill(0),
                Located::Stored(layer) => layer.read_bytes(offset, now)?,
                Located::Owed(_) | Located::Remote(_) => {
                    return Err(io::Error::other(Elsewhere { page: page.0 }));
                }
            }
            offset += len as u64;
            bytes = rest;
        }
        Ok(())
    }

    fn next_data(&self, from: PageIndex) -> Option<PageIndex> {
        (from.0..self.pages().0)
            .map(PageIndex)
            .find(|&page| self.image.owner(page).is_some_and(|owner| owner.state(page) != PageState::Zero))
    }
}
