//! Serving the pages of frozen disks to other hosts, by the page protocol: those of the disks whose files are here, and what
//! is in the caches of others. A page that no cache has is answered as absent; it is not fetched for another host.
//!
//! Each connection has a thread of its own, which answers its requests in order. Peers prove who they are by mutual TLS
//! before the first frame; what they send is hostile input all the same: a malformed frame ends its connection.

use crate::{ChainPaths, DiskId, ExtentMap, Kind, PAGE, cache::Cache, chain, export::Export, pages};
use ramet_memory::{FamilyId, LayerId, PAGE_SIZE, PageIndex, page_checksum};
use ramet_wire::{
    Connection, ErrorCode, Frame, LayerStatus, Listener, Message, PagesWriter, Sender, StreamError, frame::VERSION,
};
use std::{
    collections::HashMap,
    io,
    path::Path,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

/// Most connections at a time.
const MAX_PEERS: usize = 256;
/// Most disks that a peer may open on one connection.
const MAX_OPEN: usize = 1024;
/// Pages in one frame of an answer.
const FRAME: u64 = 64;
/// How long a peer may take for its first frame.
const HELLO: Duration = Duration::from_secs(10);

/// A frozen disk whose files are here.
#[derive(Debug)]
pub struct Frozen {
    /// The disk.
    pub disk: DiskId,
    /// Its size in bytes.
    pub size: u64,
    /// Bytes of pages sent to other hosts, unpacked.
    pub served: AtomicU64,
    /// Requests of other hosts.
    pub requests: AtomicU64,
    export: Export,
    extents: Mutex<Option<Arc<ExtentMap>>>,
    ended: AtomicBool,
}

impl Frozen {
    /// A disk made of these files, which were checked. Files of its export begin with `stem`.
    #[must_use]
    pub fn new(disk: DiskId, chain: ChainPaths, stem: &Path) -> Self {
        Self {
            disk,
            size: chain.size,
            served: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            export: Export::new(disk, chain, stem),
            extents: Mutex::default(),
            ended: AtomicBool::new(false),
        }
    }

    /// What reads it.
    #[must_use]
    pub const fn export(&self) -> &Export {
        &self.export
    }

    /// Its map; made the first time. `origin`: the map of its chain's origin, if that is known.
    ///
    /// # Errors
    /// [`chain::ChainError`].
    pub fn extents(&self, origin: Option<&ExtentMap>) -> Result<Arc<ExtentMap>, chain::ChainError> {
        let mut extents = crate::lock(&self.extents);
        if let Some(extents) = &*extents {
            return Ok(extents.clone());
        }
        let made = Arc::new(chain::extents(&self.export.chain(), origin)?);
        *extents = Some(made.clone());
        Ok(made)
    }

    /// It is dropped: connections that have it open no longer serve it.
    pub fn end(&self) {
        self.ended.store(true, Ordering::Release);
        self.export.remove();
    }

    /// Reads whole pages, with the kinds of those that are known not to need reading.
    fn read(&self, page: u64, buffer: &mut [u8]) -> io::Result<()> {
        if self.ended.load(Ordering::Acquire) {
            return Err(io::Error::other("the disk was dropped"));
        }
        // Whoever makes the map holds its lock for long; reading does not wait for that.
        let extents = self.extents.try_lock().ok().and_then(|extents| extents.clone());
        let end = page + buffer.len() as u64 / PAGE;
        if extents.is_some_and(|map| map.between(page, end).all(|extent| extent.kind == Kind::Zero)) {
            buffer.fill(0);
            return Ok(());
        }
        self.export.read(page, buffer)
    }
}

/// A disk of which other hosts may read pages here.
#[derive(Debug, Clone)]
pub enum Served {
    /// All of it is here.
    Whole(Arc<Frozen>),
    /// Some of it is here.
    Part(Arc<Cache>),
}

impl Served {
    fn disk(&self) -> DiskId {
        match self {
            Self::Whole(frozen) => frozen.disk,
            Self::Part(cache) => cache.disk,
        }
    }

    fn size(&self) -> u64 {
        match self {
            Self::Whole(frozen) => frozen.size,
            Self::Part(cache) => cache.extents.size(),
        }
    }

    /// Reads whole pages, and notes for each whether it is here.
    fn read(&self, page: u64, buffer: &mut [u8], here: &mut Vec<bool>) -> io::Result<()> {
        here.clear();
        match self {
            Self::Whole(frozen) => {
                here.resize(buffer.len() / PAGE_SIZE, true);
                frozen.read(page, buffer)
            }
            Self::Part(cache) => cache.read_present(page, buffer, here),
        }
    }

    fn count(&self, bytes: u64) {
        match self {
            Self::Whole(frozen) => frozen.served.fetch_add(bytes, Ordering::Relaxed),
            Self::Part(cache) => cache.counters.passed_on.fetch_add(bytes, Ordering::Relaxed),
        };
    }
}

/// What a page server serves.
pub trait Disks: Send + Sync + 'static {
    /// The disk that travels as this layer, if any of it is here.
    fn open(&self, layer: LayerId) -> Option<Served>;

    /// A peer was refused, or ended for what it sent.
    fn bad_peer(&self);
}

/// Accepts connections until the listener is closed.
pub fn serve(listener: &Listener, disks: &Arc<impl Disks>, family: FamilyId, host: &str) {
    let bad = disks.clone();
    let (disks, host) = (disks.clone(), host.to_owned());
    listener.serve(MAX_PEERS, move || bad.bad_peer(), move |connection| converse(connection, &disks, family, &host));
}

/// Serves one connection, handshake done, until the peer closes it.
fn converse(connection: Connection, disks: &Arc<impl Disks>, family: FamilyId, host: &str) -> Result<(), StreamError> {
    let (sender, mut receiver) = connection.split();
    let mut peer = Peer {
        sender,
        open: HashMap::new(),
        writer: PagesWriter::new(),
        reply: Vec::new(),
        buffer: Vec::new(),
        here: Vec::new(),
    };
    match receiver.recv_timeout(HELLO)?.map(|f| f.message) {
        Some(Message::Hello { version: VERSION, family: asked, .. }) if asked == family => {
            peer.reply(0, Message::HelloAck { version: VERSION, host })?;
        }
        Some(Message::Hello { version: VERSION, .. }) => {
            disks.bad_peer();
            let message = "this ramet-disk serves another family";
            return peer.reply(0, Message::Error { code: ErrorCode::Family, message });
        }
        Some(Message::Hello { version, .. }) => {
            disks.bad_peer();
            let message =
                format!("page protocol version {version} is not spoken here, only {VERSION}: run the same release");
            return peer.reply(0, Message::Error { code: ErrorCode::Version, message: &message });
        }
        _ => return Ok(()),
    }
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
            Message::OpenLayer { handle, layer } => {
                let status = match disks.open(layer) {
                    None => LayerStatus::Unknown,
                    Some(_) if peer.open.len() >= MAX_OPEN => LayerStatus::TooMany,
                    Some(disk) => {
                        peer.open.insert(handle, disk);
                        LayerStatus::Ok
                    }
                };
                peer.reply(req, Message::LayerOpened { handle, status })?;
            }
            Message::GetPages { handle, start, count, .. } => peer.answer(req, handle, start.0, count.into())?,
            Message::Ping { token } => peer.reply(req, Message::Pong { token })?,
            _ => {
                disks.bad_peer();
                let message = "only an asker's frames are answered";
                return peer.reply(0, Message::Error { code: ErrorCode::Malformed, message });
            }
        }
    }
}

struct Peer {
    sender: Sender,
    open: HashMap<u32, Served>,
    writer: PagesWriter,
    reply: Vec<u8>,
    buffer: Vec<u8>,
    /// Which pages of the buffer are here.
    here: Vec<bool>,
}

impl Peer {
    fn reply(&mut self, req: u32, message: Message<'_>) -> Result<(), StreamError> {
        self.reply.clear();
        Frame { req, message }.encode(&mut self.reply);
        self.sender.send(&self.reply)
    }

    fn answer(&mut self, req: u32, handle: u32, start: u64, count: u64) -> Result<(), StreamError> {
        let Some(disk) = self.open.get(&handle).cloned() else {
            let message = "the disk is not here: was its checkpoint removed?";
            return self.reply(req, Message::Error { code: ErrorCode::Layer, message });
        };
        let Some(end) = start.checked_add(count).filter(|&end| end <= pages(disk.size())) else {
            let message = "pages beyond the end of the disk were asked for";
            return self.reply(req, Message::Error { code: ErrorCode::Malformed, message });
        };
        if let Served::Whole(frozen) = &disk {
            frozen.requests.fetch_add(1, Ordering::Relaxed);
        }
        self.writer.set_link_speed(self.sender.link_speed());
        let layer = disk.disk().layer();
        let mut at = start;
        while at < end {
            let len = FRAME.min(end - at);
            self.buffer.resize(len as usize * PAGE_SIZE, 0);
            if let Err(err) = disk.read(at, &mut self.buffer, &mut self.here) {
                tracing::warn!(disk = %disk.disk(), error = %err, "a frozen disk cannot be read");
                // At most four bytes each.
                let message: String = format!("the disk cannot be read there: {err}")
                    .chars()
                    .take(ramet_wire::frame::MAX_TEXT / 4)
                    .collect();
                return self.reply(req, Message::Error { code: ErrorCode::Internal, message: &message });
            }
            self.writer.start(req, handle);
            let mut sent = 0;
            for ((bytes, here), page) in self.buffer.as_chunks::<PAGE_SIZE>().0.iter().zip(&self.here).zip(at..) {
                let page = PageIndex(page);
                // A frame has room for so few.
                let _ = if *here {
                    sent += PAGE;
                    self.writer.push_raw_or_lz4(page, bytes, page_checksum(layer, page, bytes))
                } else {
                    self.writer.push_absent(page)
                };
            }
            at += len;
            disk.count(sent);
            self.sender.send(self.writer.finish(at == end))?;
        }
        Ok(())
    }
}
