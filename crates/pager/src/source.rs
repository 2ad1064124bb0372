//! A source of pages: the pager of another host, asked over the page protocol.
//!
//! # Overview
//!
//! Fault threads call [`Source::request`], which notes the request in a slot, sends it and returns: any number of requests
//! is under way. One thread per source keeps the connection, receives pages, checks each, writes it into its page file,
//! and wakes whoever waits for it.
//!
//! # Retries
//!
//! A request ends only with its pages. When the connection breaks, all requests under way are sent again over the next
//! one; a page that arrives damaged, or that the source does not hold, is asked for again after a pause. Meanwhile VMs
//! that wait are stalled ([`Source::trouble`] says why), and never run on wrong bytes.

use crate::{
    control::{SourceAddress, SourceReport},
    layer::{Layer, PageState},
    vm::Vm,
};
use arc_swap::{ArcSwap, ArcSwapOption};
use ramet_memory::{FamilyId, LayerId, PAGE_SIZE, PageIndex, PageRun, page_checksum};
use ramet_wire::frame::{Encoding, EntryRun, Frame, HEADER_LEN, LayerStatus, Message, Pages, Priority, VERSION};
use ramet_wire::stream::{Connection, Options, Receiver, Sender, StreamError, TlsConfig, with_causes};
use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// Bytes of requests that are sent together, at most.
const OUTGOING: usize = 4096;
/// Requests that may be under way.
const SLOTS: usize = 2048;
/// Of these, how many are kept for pages that somebody waits for.
const DEMAND_RESERVE: usize = 256;
/// Pause before a failed request is sent again.
const RETRY: Duration = Duration::from_millis(200);
/// Longest pause between attempts to connect.
const MAX_BACKOFF: Duration = Duration::from_secs(1);

/// What all sources of a pager have in common.
#[derive(Debug, Clone)]
pub struct SourceConfig {
    /// The family whose pages are asked for.
    pub family: FamilyId,
    /// This host's name.
    pub host: String,
    /// This host's identity; without it no source can be reached.
    pub tls: Option<TlsConfig>,
    /// Time limits of connections.
    pub options: Options,
}

/// A request for consecutive pages of one layer. Their states are [`PageState::InFlight`] already, set by the caller.
#[derive(Debug, Clone)]
pub struct Fetch {
    /// The layer that owns the pages, under which the source knows them.
    pub owner: Arc<Layer>,
    /// The layer whose page file they go into: the owner, or one above it.
    pub file: Arc<Layer>,
    /// The pages, at most [`ramet_wire::frame::MAX_PAGES_PER_REQUEST`].
    pub run: PageRun,
    /// When somebody began to wait for them; `None` when they are fetched ahead.
    pub demand: Option<Instant>,
    /// The VM that they are accounted to.
    pub vm: Option<Arc<Vm>>,
}

impl Fetch {
    /// Asks `source`, which the owner named a moment ago, or the source that has taken its place since.
    pub fn ask(self, source: &Arc<Source>) {
        self.ask_of(source, true);
    }

    /// The same, where more of it come at once: it may be kept back until [`Source::flush`], so that all travel together.
    pub fn ask_with_more(self, source: &Arc<Source>) {
        self.ask_of(source, false);
    }

    fn ask_of(self, source: &Arc<Source>, now: bool) {
        let owner = self.owner.clone();
        source.enlist(self, now);
        if let Some(now) = &*owner.source.load()
            && !Arc::ptr_eq(now, source)
        {
            source.hand_over(|layer| layer.id == owner.id, now);
        }
    }

    /// Whether every page has come.
    fn is_complete(&self) -> bool {
        (self.run.start.0..self.run.end().0).all(|p| self.file.state(PageIndex(p)) != PageState::InFlight)
    }
}

#[derive(Debug, Default)]
struct Slot {
    fetch: Option<Fetch>,
    /// Tells this request from those that had the slot before.
    serial: u64,
    retry_at: Option<Instant>,
}

#[derive(Debug)]
struct Slots {
    slots: Vec<Slot>,
    free: Vec<usize>,
    /// Requests so far.
    serial: u64,
    /// Layers that have a short name with this source: their place is the name.
    handles: Vec<LayerId>,
}

#[derive(Debug)]
struct Status {
    address: SourceAddress,
    socket: SocketAddr,
    error: Option<String>,
    disconnected: Option<Instant>,
}

/// A source of pages. See the module's documentation.
#[derive(Debug)]
pub struct Source {
    config: SourceConfig,
    vms: Arc<ArcSwap<Vec<Arc<Vm>>>>,
    slots: Mutex<Slots>,
    link: ArcSwapOption<Link>,
    outgoing: Mutex<Outgoing>,
    status: Mutex<Status>,
    ending: AtomicBool,
    retries: AtomicBool,
    pages: AtomicU64,
    bytes: AtomicU64,
    bad_checksums: AtomicU64,
}

/// A connection's sending half.
#[derive(Debug)]
struct Link {
    sender: Sender,
    /// Counts connections.
    number: u64,
}

#[derive(Debug, Default)]
struct Outgoing {
    buffer: Vec<u8>,
    /// The newest connection that anything was sent over, and how many of the layers' short names it was told.
    link: u64,
    opened: usize,
}

impl Outgoing {
    fn flush(&mut self, link: &Link) {
        if !self.buffer.is_empty() && link.sender.send(&self.buffer).is_err() {
            // The receiving thread sees the same, reconnects and sends everything again.
            link.sender.close();
        }
        self.buffer.clear();
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Source {
    /// Starts to connect, and returns at once.
    ///
    /// # Errors
    /// When the address makes no sense, this host has no identity, or no thread can be started.
    pub fn start(
        address: SourceAddress,
        config: SourceConfig,
        vms: Arc<ArcSwap<Vec<Arc<Vm>>>>,
    ) -> io::Result<Arc<Self>> {
        let source = Self::new(address, config, vms)?;
        let body = source.clone();
        std::thread::Builder::new().name("source".into()).spawn(move || body.run())?;
        Ok(source)
    }

    /// A source that does not connect.
    fn new(address: SourceAddress, config: SourceConfig, vms: Arc<ArcSwap<Vec<Arc<Vm>>>>) -> io::Result<Arc<Self>> {
        if config.tls.is_none() {
            return Err(io::Error::other("this host has no certificate: run `ramet host init` or `ramet host join`"));
        }
        let socket = parse(&address)?;
        Ok(Arc::new(Self {
            config,
            vms,
            slots: Mutex::new(Slots {
                slots: (0..SLOTS).map(|_| Slot::default()).collect(),
                free: (0..SLOTS).rev().collect(),
                serial: 0,
                handles: Vec::new(),
            }),
            link: ArcSwapOption::empty(),
            outgoing: Mutex::new(Outgoing { buffer: Vec::with_capacity(OUTGOING), link: 0, opened: 0 }),
            status: Mutex::new(Status { address, socket, error: None, disconnected: Some(Instant::now()) }),
            ending: AtomicBool::new(false),
            retries: AtomicBool::new(false),
            pages: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            bad_checksums: AtomicU64::new(0),
        }))
    }

    /// Where the source is.
    #[must_use]
    pub fn address(&self) -> SourceAddress {
        lock(&self.status).address.clone()
    }

    /// Replaces the VMs that are woken when pages arrive. For benches: a family keeps the list itself.
    #[doc(hidden)]
    pub fn set_vms(&self, vms: Vec<Arc<Vm>>) {
        self.vms.store(Arc::new(vms));
    }

    /// The source is at another address from now on. What is under way is asked for again there.
    ///
    /// # Errors
    /// When the address makes no sense.
    pub fn move_to(&self, address: SourceAddress) -> io::Result<()> {
        let socket = parse(&address)?;
        let mut status = lock(&self.status);
        status.socket = socket;
        status.address = address;
        drop(status);
        if let Some(link) = &*self.link.load() {
            link.sender.close();
        }
        Ok(())
    }

    /// Asks another source for what is under way of the chosen layers.
    pub fn hand_over(&self, chosen: impl Fn(&Layer) -> bool, to: &Self) {
        let mut fetches = Vec::new();
        {
            let mut slots = lock(&self.slots);
            for number in 0..SLOTS {
                if slots.slots[number].fetch.as_ref().is_some_and(|f| chosen(&f.owner)) {
                    fetches.extend(std::mem::take(&mut slots.slots[number]).fetch);
                    slots.free.push(number);
                }
            }
        }
        for fetch in fetches {
            to.request(fetch);
        }
    }

    /// Ends the connection and the source's thread.
    pub fn end(&self) {
        self.ending.store(true, Ordering::Release);
        if let Some(link) = &*self.link.load() {
            link.sender.close();
        }
    }

    /// Why pages do not come, in words.
    #[must_use]
    pub fn trouble(&self) -> String {
        let status = lock(&self.status);
        let name = format!("{} ({})", status.address.name, status.address.addr);
        match (&status.disconnected, &status.error) {
            (Some(since), error) => {
                let why = error.as_deref().unwrap_or("connecting");
                format!("source {name} is unreachable for {:.1} s: {why}", since.elapsed().as_secs_f64())
            }
            (None, Some(error)) => format!("source {name}: {error}"),
            (None, None) => format!("source {name} has not answered yet"),
        }
    }

    /// Counters and state.
    #[must_use]
    pub fn report(&self) -> SourceReport {
        let in_flight = {
            let slots = lock(&self.slots);
            (SLOTS - slots.free.len()) as u64
        };
        let status = lock(&self.status);
        SourceReport {
            source: status.address.clone(),
            connected: status.disconnected.is_none(),
            error: status.error.clone(),
            pages: self.pages.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            bad_checksums: self.bad_checksums.load(Ordering::Relaxed),
            in_flight,
        }
    }

    // ---- asking --------------------------------------------------------------------------------------------------

    /// Asks for pages and returns; see [`Fetch`]. Without a connection the request waits for one. When very much is under
    /// way a request that nobody waits for is dropped, and its pages are absent again.
    pub fn request(&self, fetch: Fetch) {
        self.enlist(fetch, true);
    }

    /// Sends the requests that [`Fetch::ask_with_more`] has kept back.
    pub fn flush(&self) {
        if let Some(link) = &*self.link.load() {
            let mut outgoing = lock(&self.outgoing);
            if link.number == outgoing.link {
                outgoing.flush(link);
            }
        }
    }

    fn enlist(&self, fetch: Fetch, now: bool) {
        let demand = fetch.demand.is_some();
        let run = fetch.run;
        let (slot, handle) = loop {
            let mut slots = lock(&self.slots);
            let spare = slots.free.len();
            if spare == 0 || (!demand && spare <= DEMAND_RESERVE) {
                drop(slots);
                if !demand {
                    for page in run.start.0..run.end().0 {
                        fetch.file.change(PageIndex(page), PageState::InFlight, PageState::Absent);
                    }
                    // Somebody may have begun to wait since.
                    self.wake(&fetch.file, run);
                    return;
                }
                std::thread::sleep(Duration::from_millis(1));
                continue;
            }
            let handle = slots.handle(fetch.owner.id);
            let Some(slot) = slots.free.pop() else { continue };
            slots.serial += 1;
            slots.slots[slot] = Slot { fetch: Some(fetch), serial: slots.serial, retry_at: None };
            break (slot, handle);
        };
        if let Some(link) = &*self.link.load() {
            self.send(link, slot, handle, run, demand, now);
        }
    }

    fn send(&self, link: &Link, slot: usize, handle: usize, run: PageRun, demand: bool, now: bool) {
        let mut outgoing = lock(&self.outgoing);
        let Outgoing { buffer, link: newest, opened } = &mut *outgoing;
        if link.number < *newest {
            // A connection has taken this one's place; it was sent everything that was under way then, this too.
            return;
        }
        if link.number > *newest {
            (*newest, *opened) = (link.number, 0);
            buffer.clear();
        }
        if handle >= *opened {
            let slots = lock(&self.slots);
            for (number, &layer) in slots.handles.iter().enumerate().skip(*opened) {
                Frame { req: 0, message: Message::OpenLayer { handle: number as u32, layer } }.encode(buffer);
            }
            *opened = slots.handles.len();
        }
        let message = Message::GetPages {
            handle: handle as u32,
            start: run.start,
            count: u16::try_from(run.len).unwrap_or(u16::MAX),
            priority: if demand { Priority::Demand } else { Priority::Prefetch },
        };
        Frame { req: slot as u32 + 1, message }.encode(buffer);
        if now || buffer.len() > OUTGOING / 2 {
            outgoing.flush(link);
        }
    }

    // ---- the connection ------------------------------------------------------------------------------------------

    fn run(self: &Arc<Self>) {
        let mut backoff = Duration::from_millis(20);
        let mut number = 0;
        while !self.ending.load(Ordering::Acquire) {
            let socket = lock(&self.status).socket;
            let failed = match self.connect(socket) {
                Ok((sender, mut receiver)) => {
                    backoff = Duration::from_millis(20);
                    number += 1;
                    let failed = self.converse(&Arc::new(Link { sender, number }), socket, &mut receiver);
                    self.link.store(None);
                    failed
                }
                Err(err) => err,
            };
            if self.ending.load(Ordering::Acquire) {
                return;
            }
            let mut status = lock(&self.status);
            status.error = Some(with_causes(&failed));
            status.disconnected.get_or_insert_with(Instant::now);
            drop(status);
            std::thread::sleep(backoff);
            backoff = (backoff * 2).min(MAX_BACKOFF);
        }
    }

    fn connect(&self, socket: SocketAddr) -> Result<(Sender, Receiver), StreamError> {
        let name = lock(&self.status).address.name.clone();
        let tls = self.config.tls.as_ref().ok_or(StreamError::Closed)?;
        let (sender, mut receiver) = Connection::connect(socket, &name, tls, &self.config.options)?.split();
        let mut hello = Vec::new();
        let message = Message::Hello { family: self.config.family, version: VERSION, host: &self.config.host };
        Frame { req: 0, message }.encode(&mut hello);
        sender.send(&hello)?;
        match receiver.recv_timeout(self.config.options.handshake)?.map(|f| f.message) {
            Some(Message::HelloAck { version: VERSION, .. }) => Ok((sender, receiver)),
            Some(Message::HelloAck { version, .. }) => Err(ramet_wire::WireError::Version { found: version }.into()),
            Some(Message::Error { message, .. }) => Err(refused(message)),
            _ => Err(refused("no greeting came")),
        }
    }

    fn converse(self: &Arc<Self>, link: &Arc<Link>, socket: SocketAddr, receiver: &mut Receiver) -> StreamError {
        self.link.store(Some(link.clone()));
        {
            let mut status = lock(&self.status);
            // Whoever moves or ends the source from now on finds the link and closes it; who did before did not.
            if status.socket != socket || self.ending.load(Ordering::Acquire) {
                return StreamError::Closed;
            }
            status.error = None;
            status.disconnected = None;
        }
        self.send_again(link, |_| true);
        loop {
            match receiver.recv_timeout(RETRY) {
                Ok(Some(frame)) => match frame.message {
                    Message::Pages(pages) => self.receive(frame.req, &pages),
                    Message::LayerOpened { status: LayerStatus::Ok, .. } | Message::Pong { .. } => {}
                    Message::LayerOpened { handle, status } => {
                        self.note(format!(
                            "layer {handle} is not served there ({status:?}): was the checkpoint removed?"
                        ));
                    }
                    Message::Error { message, .. } if frame.req != 0 => {
                        self.note(message.to_owned());
                        self.retry_later(frame.req);
                    }
                    Message::Error { message, .. } => return refused(message),
                    _ => return refused("it sent a frame that only an asker sends"),
                },
                Ok(None) => {}
                Err(err) => return err,
            }
            if self.retries.load(Ordering::Relaxed) {
                let now = Instant::now();
                self.send_again(link, |slot| slot.retry_at.is_some_and(|at| at <= now));
            }
        }
    }

    /// Sends the chosen requests again. A run may have been filled in part: what is there is written again, unchanged.
    fn send_again(&self, link: &Link, chosen: impl Fn(&Slot) -> bool) {
        let mut again = Vec::new();
        {
            let mut slots = lock(&self.slots);
            let mut waiting = false;
            for number in 0..SLOTS {
                let slot = &mut slots.slots[number];
                if slot.fetch.is_some() && chosen(slot) {
                    slot.retry_at = None;
                    if let Some(fetch) = &slot.fetch {
                        again.push((number, fetch.owner.id, fetch.run, fetch.demand.is_some()));
                    }
                }
                waiting |= slots.slots[number].retry_at.is_some();
            }
            self.retries.store(waiting, Ordering::Relaxed);
        }
        for (number, layer, run, demand) in again {
            let handle = lock(&self.slots).handle(layer);
            self.send(link, number, handle, run, demand, true);
        }
    }

    fn note(&self, error: String) {
        lock(&self.status).error = Some(error);
    }

    fn retry_later(&self, req: u32) {
        let mut slots = lock(&self.slots);
        if let Some(slot) = (req as usize).checked_sub(1).and_then(|n| slots.slots.get_mut(n))
            && slot.fetch.is_some()
        {
            slot.retry_at = Some(Instant::now() + RETRY);
            self.retries.store(true, Ordering::Relaxed);
        }
    }

    // ---- pages ---------------------------------------------------------------------------------------------------

    fn receive(&self, req: u32, pages: &Pages<'_>) {
        let number = (req as usize).wrapping_sub(1);
        let found = lock(&self.slots).slots.get(number).map(|s| (s.fetch.clone(), s.serial));
        // An answer that nobody asked for, or the second one to a request that was sent twice.
        let Some((Some(fetch), serial)) = found else { return };
        let mut bytes = HEADER_LEN as u64;
        let mut arrived = 0;
        let mut failed = None;
        for run in pages.runs() {
            bytes += 20 * run.pages.len + run.data.len() as u64;
            if run.pages.start.0 < fetch.run.start.0 || run.pages.end().0 > fetch.run.end().0 {
                failed = Some("it sent pages that were not asked for".to_owned());
                continue;
            }
            match keep(&fetch, &run) {
                Ok(()) => arrived += run.pages.len,
                Err(err) => {
                    if err.kind() == io::ErrorKind::InvalidData {
                        self.bad_checksums.fetch_add(run.pages.len, Ordering::Relaxed);
                    }
                    failed = Some(err.to_string());
                }
            }
        }
        self.wake(&fetch.file, fetch.run);
        self.pages.fetch_add(arrived, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        fetch.owner.fetched.fetch_add(arrived, Ordering::Relaxed);
        if let Some(vm) = &fetch.vm {
            let count = if fetch.demand.is_some() { &vm.counters.demand } else { &vm.counters.prefetched };
            count.fetch_add(arrived, Ordering::Relaxed);
            vm.counters.network.fetch_add(bytes, Ordering::Relaxed);
            if let (Some(since), true) = (fetch.demand, arrived > 0) {
                vm.remote_fault.record(since.elapsed());
            }
        }
        match failed {
            Some(error) => {
                self.note(error);
                self.retry_later(req);
            }
            // Unless an earlier frame of the answer failed, or this one answered an earlier request.
            None if pages.last && fetch.is_complete() => {
                let mut slots = lock(&self.slots);
                if slots.slots[number].serial != serial {
                    // It was handed over meanwhile.
                    return;
                }
                slots.slots[number] = Slot::default();
                slots.free.push(number);
                drop(slots);
                let mut status = lock(&self.status);
                if status.disconnected.is_none() {
                    status.error = None;
                }
            }
            None if pages.last => self.retry_later(req),
            None => {}
        }
    }

    fn wake(&self, file: &Arc<Layer>, run: PageRun) {
        for vm in self.vms.load().iter() {
            vm.wake(file, run);
        }
    }
}

impl Slots {
    fn handle(&mut self, layer: LayerId) -> usize {
        // A family has few layers, and the newest are asked for most.
        match self.handles.iter().rposition(|&l| l == layer) {
            Some(handle) => handle,
            None => {
                self.handles.push(layer);
                self.handles.len() - 1
            }
        }
    }
}

/// Checks pages that arrived and writes them into their page file.
fn keep(fetch: &Fetch, run: &EntryRun<'_>) -> io::Result<()> {
    let damaged = |err: ramet_wire::WireError| io::Error::new(io::ErrorKind::InvalidData, err.to_string());
    let owner = fetch.owner.id;
    let same = Arc::ptr_eq(&fetch.owner, &fetch.file);
    match run.encoding {
        Encoding::Raw => {
            run.verify(owner).map_err(damaged)?;
            if same {
                fetch.file.store(run.pages.start, run.data, run.entries().map(|e| e.checksum))
            } else {
                let pages = run.data.chunks_exact(PAGE_SIZE).zip(run.pages.start.0..);
                let sums = pages.map(|(bytes, page)| page_checksum(fetch.file.id, PageIndex(page), bytes));
                fetch.file.store(run.pages.start, run.data, sums)
            }
        }
        Encoding::Lz4 => {
            let mut bytes = [0; PAGE_SIZE];
            for entry in run.entries() {
                entry.decompress_into(owner, &mut bytes).map_err(damaged)?;
                let sum = if same { entry.checksum } else { page_checksum(fetch.file.id, entry.page, &bytes) };
                fetch.file.store(entry.page, &bytes, std::iter::once(sum))?;
            }
            Ok(())
        }
        Encoding::Zero => {
            run.verify(owner).map_err(damaged)?;
            for page in run.pages.start.0..run.pages.end().0 {
                fetch.file.change(PageIndex(page), PageState::InFlight, PageState::Zero);
            }
            Ok(())
        }
        Encoding::Absent => {
            Err(io::Error::other(format!("it does not hold page {} of layer {}", run.pages.start.0, owner.short())))
        }
    }
}

fn parse(address: &SourceAddress) -> io::Result<SocketAddr> {
    address.addr.parse().map_err(|_| io::Error::other(format!("'{}' is no IP:PORT", address.addr)))
}

fn refused(message: &str) -> StreamError {
    StreamError::Io { what: "asking for pages", source: io::Error::other(message.to_owned()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ramet_memory::{PageCount, PageSet};
    use ramet_wire::frame::PagesWriter;
    use ramet_wire::stream::{Listener, TlsFiles};

    fn identity(dir: &std::path::Path) -> TlsConfig {
        let ca_key = rcgen::KeyPair::generate().unwrap();
        let mut ca = rcgen::CertificateParams::new(vec![]).unwrap();
        ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let ca_cert = ca.self_signed(&ca_key).unwrap();
        let issuer = rcgen::Issuer::new(ca, ca_key);
        let key = rcgen::KeyPair::generate().unwrap();
        let cert = rcgen::CertificateParams::new(vec!["host".to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
        std::fs::write(dir.join("ca.pem"), ca_cert.pem()).unwrap();
        std::fs::write(dir.join("host.pem"), cert.pem()).unwrap();
        std::fs::write(dir.join("host.key"), key.serialize_pem()).unwrap();
        TlsFiles::in_dir(dir).load().unwrap()
    }

    /// A source without a thread, with a request for two pages of a layer in its first slot.
    struct Setup {
        source: Arc<Source>,
        listener: Arc<Listener>,
        layer: Arc<Layer>,
        run: PageRun,
        _dir: tempfile::TempDir,
    }

    fn setup() -> Setup {
        let dir = tempfile::tempdir().unwrap();
        let tls = identity(dir.path());
        let listener = Listener::bind("127.0.0.1:0".parse().unwrap(), &tls, &Options::default()).unwrap();
        let config = SourceConfig {
            family: FamilyId::random(),
            host: "host".to_owned(),
            tls: Some(tls),
            options: Options::default(),
        };
        let address = SourceAddress { addr: listener.local_addr().to_string(), name: "host".to_owned() };
        let source = Source::new(address, config, Arc::default()).unwrap();
        let layer = Layer::create(dir.path(), LayerId::random(), None, PageCount(8), true).unwrap();
        let run = PageRun { start: PageIndex(2), len: 2 };
        let mut owned = PageSet::new(PageCount(8));
        owned.insert_run(run);
        layer.set_owned(owned).unwrap();
        layer.set_run(run, PageState::InFlight);
        source.request(Fetch { owner: layer.clone(), file: layer.clone(), run, demand: None, vm: None });
        Setup { source, listener: Arc::new(listener), layer, run, _dir: dir }
    }

    impl Setup {
        /// A connection, its receiving half, and the other end.
        fn connect(&self, number: u64) -> (Link, Receiver, (Sender, Receiver)) {
            let listener = self.listener.clone();
            let accepted = std::thread::spawn(move || listener.accept().unwrap().handshake().unwrap().split());
            let tls = self.source.config.tls.as_ref().unwrap();
            let socket = self.listener.local_addr();
            let connection = Connection::connect(socket, "host", tls, &Options::default()).unwrap();
            let (sender, receiver) = connection.split();
            (Link { sender, number }, receiver, accepted.join().unwrap())
        }

        fn send(&self, link: &Link) {
            let slot = lock(&self.source.slots).slots.iter().position(|s| s.fetch.is_some()).unwrap();
            self.source.send(link, slot, 0, self.run, false, true);
        }
    }

    /// What came: `o` for a layer that was opened, `g` for pages asked for.
    fn came(receiver: &mut Receiver) -> String {
        let mut kinds = String::new();
        while let Some(frame) = receiver.recv_timeout(Duration::from_millis(100)).unwrap() {
            kinds.push(match frame.message {
                Message::OpenLayer { .. } => 'o',
                Message::GetPages { .. } => 'g',
                _ => '?',
            });
        }
        kinds
    }

    #[test]
    fn layers_are_opened_on_each_connection_whoever_still_holds_the_one_before() {
        let t = setup();
        let (first, _r, (_s, mut at_first)) = t.connect(1);
        t.send(&first);
        t.send(&first);
        assert_eq!(came(&mut at_first), "ogg");
        // A fault thread sends over the connection that it got hold of, when the next one stands already.
        let (second, _r, (_s, mut at_second)) = t.connect(2);
        t.send(&first);
        t.send(&second);
        t.send(&first);
        t.send(&second);
        assert_eq!(came(&mut at_second), "ogg");
    }

    #[test]
    fn a_request_ends_with_its_last_page_and_not_with_the_answer_to_another() {
        let t = setup();
        let (_link, mut receiver, (answers, _r)) = t.connect(1);
        let slot = lock(&t.source.slots).slots.iter().position(|s| s.fetch.is_some()).unwrap();
        let mut answer = |pages: std::ops::Range<u64>| {
            let mut writer = PagesWriter::new();
            writer.start(slot as u32 + 1, 0);
            for page in pages.map(PageIndex) {
                writer.push_zero(page, page_checksum(t.layer.id, page, &[0; PAGE_SIZE])).unwrap();
            }
            answers.send(writer.finish(true)).unwrap();
            let frame = receiver.recv().unwrap();
            let Message::Pages(pages) = frame.message else { panic!("no pages came") };
            t.source.receive(frame.req, &pages);
            t.source.report().in_flight
        };
        // What somebody asked for who had the slot before.
        assert_eq!(answer(3..4), 1);
        assert_eq!(t.layer.state(PageIndex(2)), PageState::InFlight);
        assert_eq!(answer(2..4), 0);
        assert_eq!(t.layer.state(PageIndex(2)), PageState::Zero);
        // The answer to a request that was sent twice.
        assert_eq!(answer(2..4), 0);
    }

    #[test]
    fn what_is_under_way_follows_a_layer_to_its_new_source() {
        let (old, new) = (setup(), setup());
        let before = new.source.report().in_flight;
        old.layer.source.store(Some(new.source.clone()));
        // Asked for by a thread that had looked the source up before.
        let run = PageRun { start: PageIndex(5), len: 1 };
        old.layer.set_run(run, PageState::InFlight);
        let fetch = Fetch { owner: old.layer.clone(), file: old.layer.clone(), run, demand: None, vm: None };
        fetch.ask(&old.source);
        assert_eq!((old.source.report().in_flight, new.source.report().in_flight), (0, before + 2));
    }
}
