//! Missing pages whose bytes are on another host: asked for, with their neighbours, and not waited for.

use super::{FETCH_AROUND, MAX_FETCH_WINDOW, MappedSegment, Streams, Vm, clip};
use crate::image::Image;
use crate::layer::{Layer, PageState};
use crate::source::{Fetch, Source};
use ramet_memory::{PAGE_SIZE, PageIndex, PageRun};
use std::io;
use std::sync::Arc;
use std::time::Instant;

impl Vm {
    pub(super) fn fetch(
        self: &Arc<Self>,
        image: &Image,
        segment: &MappedSegment,
        owner: &Arc<Layer>,
        page: PageIndex,
        since: Instant,
        streams: &mut Streams,
    ) -> io::Result<()> {
        let source = owner.required_source()?;
        streams.remote += 1;
        let (start, window) = if page.0 == streams.fetch_next {
            streams.fetch_window = (streams.fetch_window * 2).clamp(FETCH_AROUND, MAX_FETCH_WINDOW);
            (page.0, streams.fetch_window)
        } else {
            streams.fetch_window = FETCH_AROUND;
            (page.0 - page.0 % FETCH_AROUND, FETCH_AROUND)
        };
        let around = clip(PageRun { start: PageIndex(start), len: window }, segment.run);
        streams.fetch_next = around.end().0;
        if segment.file.change(page, PageState::Absent, PageState::InFlight) {
            self.note_wait(page, since);
            let fetch = Fetch {
                owner: owner.clone(),
                file: segment.file.clone(),
                run: PageRun { start: page, len: 1 },
                demand: Some(since),
                vm: Some(self.clone()),
            };
            fetch.ask_with_more(&source);
        } else if segment.file.state(page) == PageState::Same {
            // A page is `Same` only as one that is here. To fetch it into this file would make this layer its owner.
            return Err(io::Error::other(format!("the page below it is gone from layer {}", owner.id)));
        } else {
            // It came, or somebody asked for it, just now. If it came, its wake may have passed before this fault.
            let _ = self.uffd.wake(self.ram_addr + page.offset(), PAGE_SIZE as u64);
        }
        self.prefetch(image, segment, around);
        // Often sent by now, with its neighbours.
        source.flush();
        Ok(())
    }

    pub(super) fn fetch_ahead(
        self: &Arc<Self>,
        image: &Image,
        segment: &MappedSegment,
        page: PageIndex,
        streams: &mut Streams,
    ) {
        let behind = streams.fetch_next.saturating_sub(page.0);
        if streams.fetch_window < 4 * FETCH_AROUND || behind == 0 || behind > streams.fetch_window {
            return;
        }
        let ahead = PageRun { start: PageIndex(streams.fetch_next), len: streams.fetch_window };
        let ahead = clip(ahead, segment.run);
        streams.fetch_next = ahead.end().0.max(streams.fetch_next);
        self.prefetch(image, segment, ahead);
    }

    /// Asks for the pages of a run that nobody has asked for, in runs of one owner, each where its owner comes from.
    pub(super) fn prefetch(self: &Arc<Self>, image: &Image, segment: &MappedSegment, run: PageRun) {
        let mut at = run.start.0;
        let mut unsent: Option<Arc<Source>> = None;
        while at < run.end().0 {
            let from = at;
            // Without a source the page is reported when it is touched.
            let found = image.owner(PageIndex(at)).and_then(|o| Some((o, o.source.load_full()?)));
            if let Some((owner, source)) = found {
                let wanted = |p: u64| {
                    let page = PageIndex(p);
                    image.owner(page).is_some_and(|other| Arc::ptr_eq(owner, other))
                        && matches!(owner.state(page), PageState::Absent)
                        && segment.file.change(page, PageState::Absent, PageState::InFlight)
                };
                while at < run.end().0 && wanted(at) {
                    at += 1;
                }
                if at > from {
                    let fetch = Fetch {
                        owner: owner.clone(),
                        file: segment.file.clone(),
                        run: PageRun { start: PageIndex(from), len: at - from },
                        demand: None,
                        vm: Some(self.clone()),
                    };
                    fetch.ask_with_more(&source);
                    if let Some(before) = unsent.take_if(|s| !Arc::ptr_eq(s, &source)) {
                        before.flush();
                    }
                    unsent = Some(source);
                    continue;
                }
            }
            at += 1;
        }
        if let Some(source) = unsent {
            source.flush();
        }
    }
}
