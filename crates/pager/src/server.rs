//! Serving pages to the pagers of other hosts.
//!
//! Each connection has a thread of its own, which answers its requests in order. Peers prove who they are by mutual TLS
//! before the first frame; what they send is hostile input all the same: a malformed frame ends its connection.

use crate::{
    family::Family,
    layer::{Layer, Located, PageState},
    source::Fetch,
};
use ramet_memory::{FamilyId, PAGE_SIZE, PageIndex, PageRun, page_checksum};
use ramet_wire::frame::{ErrorCode, Frame, LayerStatus, Message, PagesWriter, Priority, VERSION};
use ramet_wire::stream::{Connection, Listener, Sender, StreamError};
use std::{
    collections::HashMap,
    sync::{Arc, atomic::Ordering},
    time::{Duration, Instant},
};

/// Most connections at a time.
const MAX_PEERS: usize = 256;
/// Most layers that a peer may open on one connection.
const MAX_OPEN_LAYERS: usize = 8192;
/// Pages in one frame of an answer that somebody waits for: the first ones arrive while the next are packed.
const DEMAND_FRAME: usize = 16;
/// Pages in one frame of other answers.
const PREFETCH_FRAME: usize = 64;
/// How long a page that must come from yet another host is waited for.
const RELAY: Duration = Duration::from_secs(10);

/// Accepts connections until the listener is closed.
pub fn serve(listener: &Listener, family: &Arc<Family>, id: FamilyId, host: &str) {
    let bad = family.clone();
    let (family, host) = (family.clone(), host.to_owned());
    listener.serve(
        MAX_PEERS,
        move || {
            bad.served.bad_peers.fetch_add(1, Ordering::Relaxed);
        },
        move |connection| serve_connection(connection, &family, id, &host),
    );
}

/// Serves one connection, handshake done, until the peer closes it.
///
/// # Errors
/// When the peer sends what is no frame, or the connection fails.
pub fn serve_connection(
    connection: Connection,
    family: &Arc<Family>,
    id: FamilyId,
    host: &str,
) -> Result<(), StreamError> {
    let (sender, mut receiver) = connection.split();
    let mut reply = Vec::new();
    match receiver.recv_timeout(RELAY)?.map(|f| f.message) {
        Some(Message::Hello { version: VERSION, family, .. }) if family == id => {
            Frame { req: 0, message: Message::HelloAck { version: VERSION, host } }.encode(&mut reply);
            sender.send(&reply)?;
        }
        Some(Message::Hello { version, .. }) => {
            let (code, message) = if version == VERSION {
                (ErrorCode::Family, "this pager serves another family".to_owned())
            } else {
                let text =
                    format!("page protocol version {version} is not spoken here, only {VERSION}: run the same release");
                (ErrorCode::Version, text)
            };
            Frame { req: 0, message: Message::Error { code, message: &message } }.encode(&mut reply);
            sender.send(&reply)?;
            return Ok(());
        }
        _ => return Ok(()),
    }
    let mut peer = Peer { family: family.clone(), sender, layers: HashMap::new(), writer: PagesWriter::new(), reply };
    loop {
        let frame = match receiver.recv() {
            Ok(frame) => frame,
            Err(StreamError::Wire(err)) => {
                peer.sender.refuse(0, &err);
                return Err(err.into());
            }
            Err(err) => return Err(err),
        };
        let req = frame.req;
        match frame.message {
            Message::OpenLayer { handle, layer } => peer.open(req, handle, family.layer(layer))?,
            Message::GetPages { handle, start, count, priority } => {
                peer.answer(req, handle, PageRun { start, len: u64::from(count) }, priority)?;
            }
            Message::Ping { token } => peer.reply(req, Message::Pong { token })?,
            _ => {
                peer.reply(
                    0,
                    Message::Error { code: ErrorCode::Malformed, message: "only an asker's frames are answered" },
                )?;
                return Ok(());
            }
        }
    }
}

struct Peer {
    family: Arc<Family>,
    sender: Sender,
    layers: HashMap<u32, Arc<Layer>>,
    writer: PagesWriter,
    reply: Vec<u8>,
}

impl Peer {
    fn reply(&mut self, req: u32, message: Message<'_>) -> Result<(), StreamError> {
        self.reply.clear();
        Frame { req, message }.encode(&mut self.reply);
        self.sender.send(&self.reply)
    }

    fn open(&mut self, req: u32, handle: u32, layer: Option<Arc<Layer>>) -> Result<(), StreamError> {
        let status = match layer {
            None => LayerStatus::Unknown,
            Some(_) if self.layers.len() >= MAX_OPEN_LAYERS => LayerStatus::TooMany,
            Some(layer) => {
                self.layers.insert(handle, layer);
                LayerStatus::Ok
            }
        };
        self.reply(req, Message::LayerOpened { handle, status })
    }

    fn answer(&mut self, req: u32, handle: u32, run: PageRun, priority: Priority) -> Result<(), StreamError> {
        let layer = match self.layers.get(&handle) {
            Some(layer) if run.end().0 <= layer.pages.0 => layer.clone(),
            Some(_) => {
                let message = "pages beyond the end of memory were asked for";
                return self.reply(req, Message::Error { code: ErrorCode::Malformed, message });
            }
            None => {
                let message = "the layer is not here: was its checkpoint removed?";
                return self.reply(req, Message::Error { code: ErrorCode::Layer, message });
            }
        };
        let frame_pages = match priority {
            Priority::Demand => DEMAND_FRAME,
            Priority::Prefetch => PREFETCH_FRAME,
        } as u64;
        self.writer.set_link_speed(self.sender.link_speed());
        let mut at = run.start.0;
        while at < run.end().0 {
            let len = frame_pages.min(run.end().0 - at);
            self.writer.start(req, handle);
            self.push(&layer, PageRun { start: PageIndex(at), len });
            at += len;
            let frame = self.writer.finish(at == run.end().0);
            self.family.served.bytes.fetch_add(frame.len() as u64, Ordering::Relaxed);
            self.family.served.pages.fetch_add(len, Ordering::Relaxed);
            self.sender.send(frame)?;
        }
        Ok(())
    }

    /// Adds the pages of a run to the frame; it has room for them all.
    fn push(&mut self, layer: &Arc<Layer>, run: PageRun) {
        let mut batch = [0u8; 16 * PAGE_SIZE];
        let mut at = run.start.0;
        while at < run.end().0 {
            let page = PageIndex(at);
            let most = (run.end().0 - at).min(16);
            // Neighbours that this very layer has are read with one call.
            let side_by_side = (at..at + most)
                .take_while(|&p| matches!(layer.locate(PageIndex(p)), Located::Stored(l) if Arc::ptr_eq(&l, layer)))
                .count();
            let bytes = &mut batch[..side_by_side.max(1) * PAGE_SIZE];
            if side_by_side > 0 && layer.read(page, bytes).is_ok() {
                for (bytes, p) in bytes.chunks_exact(PAGE_SIZE).zip(at..) {
                    self.push_bytes(PageIndex(p), bytes, layer.sum(PageIndex(p)));
                }
                at += side_by_side as u64;
                continue;
            }
            self.push_one(layer, page);
            at += 1;
        }
    }

    fn push_bytes(&mut self, page: PageIndex, bytes: &[u8], sum: u64) {
        if let Some(bytes) = bytes.first_chunk::<PAGE_SIZE>() {
            let _ = self.writer.push_raw_or_lz4(page, bytes, sum);
        }
    }

    fn push_one(&mut self, layer: &Arc<Layer>, page: PageIndex) {
        let mut bytes = [0u8; PAGE_SIZE];
        match obtain(layer, page) {
            Some(Located::Zero) => {
                let _ = self.writer.push_zero(page, page_checksum(layer.id, page, &bytes));
            }
            // The bytes of a lower layer travel as this layer's: checked here under their own name, then renamed.
            Some(Located::Stored(from)) if from.read_checked(page, &mut bytes).is_ok() => {
                let sum = page_checksum(layer.id, page, &bytes);
                self.push_bytes(page, &bytes, sum);
            }
            _ => {
                let _ = self.writer.push_absent(page);
            }
        }
    }
}

/// Finds a page's bytes, copying them out of their parent or fetching them from yet another host first; `None` when that
/// fails or takes too long.
pub(crate) fn obtain(layer: &Arc<Layer>, page: PageIndex) -> Option<Located> {
    let deadline = Instant::now() + RELAY;
    loop {
        match layer.locate(page) {
            Located::Owed(owner) => {
                match owner.session.load_full() {
                    Some(session) => session.ensure(page).ok()?,
                    // All is copied, since a moment ago: or the page was lost.
                    None if matches!(layer.locate(page), Located::Owed(_)) => return None,
                    None => {}
                }
            }
            Located::Remote(owner) => {
                // Before the state changes: nothing else would ever change it back.
                let source = owner.required_source().ok()?;
                if owner.change(page, PageState::Absent, PageState::InFlight) {
                    let fetch = Fetch {
                        owner: owner.clone(),
                        file: owner.clone(),
                        run: PageRun { start: page, len: 1 },
                        demand: Some(Instant::now()),
                        vm: None,
                    };
                    fetch.ask(&source);
                }
                if Instant::now() > deadline {
                    return None;
                }
                std::thread::sleep(Duration::from_micros(100));
            }
            found => return Some(found),
        }
    }
}
