//! Fetching pages of one disk from other hosts, by the page protocol.
//!
//! [`Upstream::ask`] notes what is wanted, sends it and returns. One thread keeps the connection, receives pages, checks
//! each, and hands it to the [`Sink`]. A request ends only with its pages: when a source is dead, silent, refuses, sends
//! damaged pages, or has none of what is still wanted, everything under way is asked of the next one, round and round, with
//! pauses.

use crate::{DiskId, PAGE, control::SourceAddress};
use ramet_memory::{FamilyId, PAGE_SIZE, PageIndex};
use ramet_wire::{
    Connection, Encoding, Frame, LayerStatus, Message, Options, Pages, Priority, Receiver, Sender, StreamError,
    TlsConfig,
    frame::{MAX_PAGES_PER_REQUEST, VERSION},
    stream::with_causes,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    io,
    net::SocketAddr,
    sync::{
        Arc, Condvar, Mutex, PoisonError, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// Pause after all sources have failed, at first and at most.
const BACKOFF: [Duration; 2] = [Duration::from_millis(50), Duration::from_secs(1)];
/// How often a connection without requests is looked at.
const IDLE: Duration = Duration::from_secs(1);
/// Bytes of requests that may be sent without anybody reading the answers.
const MANY: usize = 32 << 10;
/// Most bytes of pages that came packed and are written together.
const UNPACKED: usize = 256 << 10;

/// What all upstreams of a process have in common.
#[derive(Debug, Clone)]
pub struct SourceConfig {
    /// The family whose disks are asked for.
    pub family: FamilyId,
    /// This host's name.
    pub host: String,
    /// This host's identity; without it no source can be reached.
    pub tls: Option<TlsConfig>,
    /// Time limits of connections.
    pub options: Options,
    /// A source that owes an answer and says nothing for this long is left for the next one.
    pub silent: Duration,
}

impl SourceConfig {
    /// The silence that is borne where nothing else is said.
    pub const SILENT: Duration = Duration::from_secs(4);
}

/// Consecutive pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// The first page.
    pub start: u64,
    /// How many, at most [`Self::MOST`].
    pub pages: u64,
}

impl Run {
    /// Most pages of a request.
    pub const MOST: u64 = MAX_PAGES_PER_REQUEST as u64;
}

/// Where pages go that have come and were checked.
pub trait Sink: Send + Sync {
    /// Keeps pages.
    ///
    /// # Errors
    /// When it cannot, as for want of room: they will be asked for again.
    fn store(&self, start: u64, bytes: &[u8]) -> io::Result<()>;

    /// Notes that pages are zero.
    ///
    /// # Errors
    /// As [`Self::store`].
    fn zero(&self, start: u64, pages: u64) -> io::Result<()>;

    /// Whether all of these have come.
    fn has(&self, run: Run) -> bool;

    /// All pages of a request have come.
    fn done(&self, run: Run);
}

/// The sources of one disk. [`Self::end`] ends it.
#[derive(Debug)]
pub struct Upstream {
    disk: DiskId,
    config: SourceConfig,
    state: Mutex<State>,
    wake: Condvar,
    damaged: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    sources: Vec<SourceAddress>,
    /// What is under way, by its number.
    pending: BTreeMap<u32, Run>,
    last: u32,
    link: Option<Sender>,
    /// Whom the link leads to, or whom the thread is trying.
    current: Option<SourceAddress>,
    /// When a page last came, or became wanted where none was.
    progress: Option<Instant>,
    error: Option<String>,
    ending: bool,
}

/// How it went with a source.
#[derive(Debug, Default)]
struct Talk {
    /// It answered a request.
    useful: bool,
    /// Requests of which it has not all pages.
    lacking: BTreeSet<u32>,
}

impl Upstream {
    /// Starts; connects when a page is first wanted.
    ///
    /// # Errors
    /// When no thread can be started.
    pub fn start<S: Sink + 'static>(
        disk: DiskId,
        config: SourceConfig,
        sources: Vec<SourceAddress>,
        sink: Weak<S>,
    ) -> io::Result<Arc<Self>> {
        let state = State { sources, ..State::default() };
        let upstream =
            Arc::new(Self { disk, config, state: Mutex::new(state), wake: Condvar::new(), damaged: AtomicU64::new(0) });
        let body = upstream.clone();
        std::thread::Builder::new().name("source".into()).spawn(move || body.run(&sink))?;
        Ok(upstream)
    }

    /// Asks for pages. Each must be asked for once only until [`Sink::done`] says that it came.
    pub fn ask(&self, runs: &[Run]) {
        let mut frames = Vec::new();
        let link = {
            let mut state = crate::lock(&self.state);
            if state.pending.is_empty() {
                state.progress = Some(Instant::now());
            }
            for run in runs {
                state.last = state.last.wrapping_add(1).max(1);
                let number = state.last;
                state.pending.insert(number, *run);
                request(number, *run, &mut frames);
            }
            state.link.clone()
        };
        match link {
            // The receiving thread notices the same, and sends everything again over the next connection.
            Some(link) if link.send(&frames).is_err() => link.close(),
            Some(_) => {}
            None => self.wake.notify_all(),
        }
    }

    /// Replaces the sources. A connection to one that is no longer among them ends.
    pub fn set_sources(&self, sources: Vec<SourceAddress>) {
        let mut state = crate::lock(&self.state);
        if let (Some(link), Some(current)) = (&state.link, &state.current)
            && !sources.contains(current)
        {
            link.close();
        }
        state.sources = sources;
        drop(state);
        self.wake.notify_all();
    }

    /// Where pages come from.
    #[must_use]
    pub fn sources(&self) -> Vec<SourceAddress> {
        crate::lock(&self.state).sources.clone()
    }

    /// Why pages do not come, in words.
    #[must_use]
    pub fn trouble(&self) -> String {
        let state = crate::lock(&self.state);
        let name = state.current.as_ref().map_or_else(|| "a source".to_owned(), |s| format!("{} ({})", s.name, s.addr));
        match &state.error {
            Some(error) => error.clone(),
            None if state.sources.is_empty() => "no host is known that has this disk".to_owned(),
            None => format!("{name} has not answered yet"),
        }
    }

    /// Pages that arrived damaged.
    #[must_use]
    pub fn damaged(&self) -> u64 {
        self.damaged.load(Ordering::Relaxed)
    }

    /// Ends its connection and its thread.
    pub fn end(&self) {
        let mut state = crate::lock(&self.state);
        state.ending = true;
        if let Some(link) = &state.link {
            link.close();
        }
        drop(state);
        self.wake.notify_all();
    }

    fn run<S: Sink>(&self, sink: &Weak<S>) {
        let mut turn = 0;
        let mut failures = 0u32;
        loop {
            let source = {
                let mut state = crate::lock(&self.state);
                while !state.ending && (state.pending.is_empty() || state.sources.is_empty()) {
                    state = self.wake.wait(state).unwrap_or_else(PoisonError::into_inner);
                }
                if state.ending {
                    return;
                }
                let source = state.sources[turn % state.sources.len()].clone();
                state.current = Some(source.clone());
                source
            };
            let (error, talk) = self.converse(&source, sink);
            let mut state = crate::lock(&self.state);
            if let Some(link) = state.link.take() {
                link.close();
            }
            if state.ending || sink.strong_count() == 0 {
                return;
            }
            let text = format!("{} ({}): {}", source.name, source.addr, with_causes(&error));
            tracing::info!(disk = %self.disk, source = text, "left a source of pages");
            state.error = Some(text);
            // A source that was of use is tried again first: it may only have been started anew. But one that has not what is
            // wanted will not have it soon.
            let again = talk.useful && talk.lacking.is_empty();
            failures = if talk.useful { 1 } else { failures + 1 };
            if !again {
                turn += 1;
            }
            let sources = state.sources.len().max(1) as u32;
            if failures.is_multiple_of(sources) || again {
                let pause = (BACKOFF[0] * 2u32.pow((failures / sources).min(10))).min(BACKOFF[1]);
                drop(self.wake.wait_timeout(state, pause));
            }
        }
    }

    /// Talks to a source until it fails, or has nothing more that is wanted.
    fn converse<S: Sink>(&self, source: &SourceAddress, sink: &Weak<S>) -> (StreamError, Talk) {
        let mut talk = Talk::default();
        let result =
            self.connect(source).and_then(|(sender, receiver)| self.receive(&sender, receiver, sink, &mut talk));
        (result.err().unwrap_or(StreamError::Closed), talk)
    }

    fn connect(&self, source: &SourceAddress) -> Result<(Sender, Receiver), StreamError> {
        let addr: SocketAddr = source.addr.parse().map_err(|_| refused("its address is no IP:PORT"))?;
        let no_identity = "this host has no certificate: run `ramet host init` or `ramet host join`";
        let tls = self.config.tls.as_ref().ok_or_else(|| refused(no_identity))?;
        let (sender, mut receiver) = Connection::connect(addr, &source.name, tls, &self.config.options)?.split();
        let mut frames = Vec::new();
        let hello = Message::Hello { family: self.config.family, version: VERSION, host: &self.config.host };
        Frame { req: 0, message: hello }.encode(&mut frames);
        Frame { req: 0, message: Message::OpenLayer { handle: 0, layer: self.disk.layer() } }.encode(&mut frames);
        sender.send(&frames)?;
        let deadline = Instant::now() + self.config.silent;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let Some(frame) = receiver.recv_timeout(left)? else {
                sender.close();
                return Err(refused("it says nothing"));
            };
            match frame.message {
                Message::HelloAck { .. } => {}
                Message::LayerOpened { status: LayerStatus::Ok, .. } => return Ok((sender, receiver)),
                Message::LayerOpened { status, .. } => {
                    let text = format!("it does not have disk {} ({status:?})", self.disk);
                    sender.close();
                    return Err(refused(&text));
                }
                Message::Error { message, .. } => return Err(refused(message)),
                _ => return Err(refused("it sent a frame that only an asker sends")),
            }
        }
    }

    fn receive<S: Sink>(
        &self,
        sender: &Sender,
        mut receiver: Receiver,
        sink: &Weak<S>,
        talk: &mut Talk,
    ) -> Result<(), StreamError> {
        let mut frames = Vec::new();
        {
            let mut state = crate::lock(&self.state);
            if state.ending {
                return Err(StreamError::Closed);
            }
            state.pending.iter().for_each(|(number, run)| request(*number, *run, &mut frames));
            state.link = Some(sender.clone());
            state.progress = Some(Instant::now());
        }
        // A source that answers while it is still being asked must find a reader.
        if frames.len() > MANY {
            let sender = sender.clone();
            let ask = move || {
                if sender.send(&frames).is_err() {
                    sender.close();
                }
            };
            let spawned = std::thread::Builder::new().name("ask-again".into()).spawn(ask);
            spawned.map_err(|source| StreamError::Io { what: "starting a thread", source })?;
        } else {
            sender.send(&frames)?;
        }
        let step = (self.config.silent / 4).min(IDLE);
        loop {
            let received = receiver.recv_timeout(step)?;
            let sink = sink.upgrade().ok_or(StreamError::Closed)?;
            let Some(frame) = received else {
                let state = crate::lock(&self.state);
                let silent = state.progress.filter(|_| !state.pending.is_empty()).map(|p| p.elapsed());
                if silent.is_some_and(|silent| silent > self.config.silent) {
                    return Err(refused("it says nothing, though it owes pages"));
                }
                continue;
            };
            match frame.message {
                Message::Pages(pages) => self.take(frame.req, &pages, &*sink, talk)?,
                Message::Error { message, .. } => return Err(refused(message)),
                Message::Pong { .. } | Message::LayerOpened { .. } => {}
                _ => return Err(refused("it sent a frame that only an asker sends")),
            }
        }
    }

    /// Checks and keeps pages.
    fn take(&self, number: u32, pages: &Pages<'_>, sink: &impl Sink, talk: &mut Talk) -> Result<(), StreamError> {
        let Some(run) = crate::lock(&self.state).pending.get(&number).copied() else { return Ok(()) };
        let layer = self.disk.layer();
        let room = |err: io::Error| StreamError::Io { what: "writing to the cache (is there room?)", source: err };
        let damaged = |err: ramet_wire::WireError| {
            self.damaged.fetch_add(1, Ordering::Relaxed);
            StreamError::Wire(err)
        };
        // Neighbours that came packed are written with one call.
        let (mut begin, mut unpacked) = (0, Vec::new());
        for part in pages.runs() {
            let first = part.pages.start.0;
            if first < run.start || part.pages.end().0 > run.start + run.pages {
                return Err(refused("it sent pages that were not asked for"));
            }
            let next = begin + (unpacked.len() / PAGE_SIZE) as u64;
            if !unpacked.is_empty() && (part.encoding != Encoding::Lz4 || first != next || unpacked.len() >= UNPACKED) {
                sink.store(begin, &unpacked).map_err(room)?;
                unpacked.clear();
            }
            match part.encoding {
                Encoding::Raw => {
                    part.verify(layer).map_err(damaged)?;
                    sink.store(first, part.data).map_err(room)?;
                }
                Encoding::Zero => {
                    part.verify(layer).map_err(damaged)?;
                    sink.zero(first, part.pages.len).map_err(room)?;
                }
                Encoding::Lz4 => {
                    for entry in part.entries() {
                        if unpacked.is_empty() {
                            begin = entry.page.0;
                        }
                        let mut page = [0; PAGE_SIZE];
                        entry.decompress_into(layer, &mut page).map_err(damaged)?;
                        unpacked.extend_from_slice(&page);
                    }
                }
                Encoding::Absent => drop(talk.lacking.insert(number)),
            }
        }
        if !unpacked.is_empty() {
            sink.store(begin, &unpacked).map_err(room)?;
        }
        let mut state = crate::lock(&self.state);
        // Who only says what it has not says nothing.
        if !talk.lacking.contains(&number) {
            state.progress = Some(Instant::now());
        }
        if !pages.last {
            return Ok(());
        }
        let complete = sink.has(run);
        if complete {
            talk.useful = true;
            talk.lacking.remove(&number);
            state.pending.remove(&number);
            state.error = None;
        } else if !talk.lacking.contains(&number) {
            return Err(refused("it did not send all pages that were asked for"));
        }
        let wanted = state.pending.values().next().filter(|_| state.pending.keys().all(|n| talk.lacking.contains(n)));
        let left = wanted.map(|run| run.start * PAGE);
        drop(state);
        if complete {
            sink.done(run);
        }
        left.map_or(Ok(()), |from| Err(refused(&format!("it does not have the disk's bytes from {from} on"))))
    }
}

fn request(number: u32, run: Run, out: &mut Vec<u8>) {
    let (start, count) = (PageIndex(run.start), run.pages as u16);
    let message = Message::GetPages { handle: 0, start, count, priority: Priority::Demand };
    Frame { req: number, message }.encode(out);
}

fn refused(message: &str) -> StreamError {
    StreamError::Io { what: "asking for pages", source: io::Error::other(message.to_owned()) }
}
