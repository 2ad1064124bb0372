//! All disks that a process `ramet-disk` knows, and the record of them.

use crate::{
    ChainPaths, DiskId, ExtentMap,
    cache::{Cache, FETCH_PAGES},
    control::{
        ControlError, DiskKind, DiskStatus, ExtentsReply, FrozenReply, MAX_SOURCES, RemoteReply, SourceAddress,
        StatusReply,
    },
    export::kill_leftovers,
    nbd::Server,
    serve::{Disks, Frozen, Served},
    source::{SourceConfig, Upstream},
};
use ramet_memory::LayerId;
use serde::{Deserialize, Serialize};
use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::{DirBuilderExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, Weak,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

/// Longest path of a Unix socket.
const SOCKET_PATH: usize = 107;
/// How often exports are looked at.
const TIDY: Duration = Duration::from_secs(1);

/// How a host's disks behave.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Pages that are fetched at once.
    pub fetch_pages: u64,
    /// An export that nobody reads for this long ends.
    pub idle: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Self { fetch_pages: FETCH_PAGES, idle: Duration::from_secs(60) }
    }
}

/// The disks of one family on this host.
#[derive(Debug)]
pub struct Host {
    dir: PathBuf,
    config: SourceConfig,
    settings: Settings,
    disks: Mutex<BTreeMap<DiskId, Entry>>,
    bad_peers: AtomicU64,
    /// Held for as long as this process uses the directory.
    _lock: fs::File,
}

#[derive(Debug)]
enum Entry {
    Frozen(Arc<Frozen>),
    Remote(Remote),
}

/// A disk of another host.
#[derive(Debug)]
struct Remote {
    /// Ends first: nobody asks any more.
    server: Server,
    cache: Arc<Cache>,
    upstream: Arc<Upstream>,
    golden: Option<PathBuf>,
}

impl Remote {
    fn end(self) {
        self.cache.end();
        self.upstream.end();
        drop(self.server);
        self.cache.remove();
    }
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Record {
    Frozen {
        disk: DiskId,
        chain: ChainPaths,
    },
    Remote {
        disk: DiskId,
        size: u64,
        golden: Option<PathBuf>,
        extents: ExtentMap,
        sources: Vec<SourceAddress>,
        socket: PathBuf,
    },
}

type Result<T> = std::result::Result<T, ControlError>;

fn internal(what: &str, err: &dyn std::fmt::Display) -> ControlError {
    ControlError::new("internal", format!("{what}: {err}"))
}

fn no_such(disk: DiskId) -> ControlError {
    ControlError::new("no_such_disk", format!("no disk {disk} is known here"))
}

impl Host {
    /// Opens a directory, which is made where it is missing, and serves again what is on record there.
    ///
    /// # Errors
    /// When another process uses the directory, or it cannot be read. A disk that cannot be served again is logged and
    /// left out.
    pub fn open(dir: &Path, config: SourceConfig, settings: Settings) -> io::Result<Arc<Self>> {
        fs::DirBuilder::new().recursive(true).mode(0o711).create(dir)?;
        let dir = fs::canonicalize(dir)?;
        fs::set_permissions(&dir, fs::Permissions::from_mode(0o711))?;
        let lock = fs::File::create(dir.join("lock"))?;
        hold(&lock)?;
        kill_leftovers(&dir);
        let cache = dir.join("cache");
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&cache)?;
        let host = Arc::new(Self {
            dir,
            config,
            settings,
            disks: Mutex::default(),
            bad_peers: AtomicU64::new(0),
            _lock: lock,
        });
        host.restore()?;
        let (weak, idle) = (Arc::downgrade(&host), host.settings.idle);
        std::thread::Builder::new().name("tidy".into()).spawn(move || tidy(&weak, idle))?;
        Ok(host)
    }

    fn restore(&self) -> io::Result<()> {
        let records: Vec<serde_json::Value> = match fs::read(self.dir.join("record.json")) {
            Ok(bytes) => serde_json::from_slice(&bytes).unwrap_or_else(|err| {
                tracing::error!(error = %err, "the record cannot be read: nothing is served until it is added again");
                Vec::new()
            }),
            Err(err) if err.kind() == io::ErrorKind::NotFound => Vec::new(),
            Err(err) => return Err(err),
        };
        let mut disks = crate::lock(&self.disks);
        for record in records {
            let restored = serde_json::from_value(record).map_err(io::Error::other).and_then(|record| match record {
                Record::Frozen { disk, chain } => Ok((disk, self.frozen(disk, chain))),
                Record::Remote { disk, size: _, golden, extents, sources, socket } => {
                    let remote = self.remote(disk, golden.as_deref(), extents, sources, &socket)?;
                    Ok((disk, Entry::Remote(remote)))
                }
            });
            match restored {
                Ok((disk, entry)) => drop(disks.insert(disk, entry)),
                Err(err) => tracing::error!(error = %err, "a disk on record cannot be served again"),
            }
        }
        self.sweep(&disks);
        Ok(())
    }

    /// Removes files of disks that are not on record.
    fn sweep(&self, disks: &BTreeMap<DiskId, Entry>) {
        for entry in fs::read_dir(self.dir.join("cache")).into_iter().flatten().flatten() {
            let disk = entry.path().file_stem().and_then(|s| s.to_str()).and_then(|s| s.parse::<DiskId>().ok());
            if !disk.is_some_and(|disk| matches!(disks.get(&disk), Some(Entry::Remote(_)))) {
                let _ = fs::remove_file(entry.path());
            }
        }
        let used: Vec<_> = disks.values().filter_map(Entry::socket).collect();
        for entry in fs::read_dir(&self.dir).into_iter().flatten().flatten() {
            let path = entry.path();
            let kind = path.extension().and_then(|e| e.to_str());
            if matches!(kind, Some("nbd" | "new" | "qsd" | "qsd-log")) && !used.contains(&path.as_path()) {
                let _ = fs::remove_file(path);
            }
        }
    }

    fn frozen(&self, disk: DiskId, chain: ChainPaths) -> Entry {
        // Two disks with the same first digits share nothing that matters but this name; so it is the whole number where
        // the path allows that.
        let whole = self.dir.join(disk.to_string());
        let stem = if whole.as_os_str().len() + 4 <= SOCKET_PATH { whole } else { self.dir.join(disk.short()) };
        Entry::Frozen(Arc::new(Frozen::new(disk, chain, &stem)))
    }

    fn remote(
        &self,
        disk: DiskId,
        golden: Option<&Path>,
        extents: ExtentMap,
        sources: Vec<SourceAddress>,
        socket: &Path,
    ) -> io::Result<Remote> {
        let cache = Arc::new(Cache::open(&self.dir.join("cache"), disk, extents, self.settings.fetch_pages)?);
        let mut used = None;
        if let Some(path) = golden {
            match cache.set_golden(path) {
                Ok(()) => used = Some(path.to_owned()),
                // It is fetched then.
                Err(err) => tracing::error!(path = %path.display(), error = %err, "the golden image cannot be used"),
            }
        }
        let upstream = Upstream::start(disk, self.config.clone(), sources, Arc::downgrade(&cache))?;
        cache.set_upstream(upstream.clone());
        match Server::start(socket, cache.clone()) {
            Ok(server) => Ok(Remote { server, cache, upstream, golden: used }),
            Err(err) => {
                upstream.end();
                Err(err)
            }
        }
    }

    /// Replaces the record.
    fn record(&self, disks: &BTreeMap<DiskId, Entry>) -> Result<()> {
        let records: Vec<_> = disks
            .iter()
            .map(|(&disk, entry)| match entry {
                Entry::Frozen(frozen) => Record::Frozen { disk, chain: frozen.export().chain() },
                Entry::Remote(remote) => Record::Remote {
                    disk,
                    size: remote.cache.extents.size(),
                    golden: remote.golden.clone(),
                    extents: remote.cache.extents.clone(),
                    sources: remote.upstream.sources(),
                    socket: remote.server.path().to_owned(),
                },
            })
            .collect();
        let (path, new) = (self.dir.join("record.json"), self.dir.join("record.json.tmp"));
        let bytes = serde_json::to_vec(&records).map_err(|err| internal("the record", &err))?;
        fs::write(&new, bytes)
            .and_then(|()| fs::rename(&new, &path))
            .map_err(|err| internal(&format!("cannot write {}: is there room?", path.display()), &err))
    }

    /// See [`crate::control::Request::FrozenAdd`].
    ///
    /// # Errors
    /// When its files are not there, or the disk is known as one of another host.
    pub fn add_frozen(&self, disk: DiskId, chain: ChainPaths) -> Result<FrozenReply> {
        chain.check().map_err(|err| ControlError::new("bad_request", describe(&err)))?;
        let size = chain.size;
        let mut disks = crate::lock(&self.disks);
        let new = !disks.contains_key(&disk);
        match disks.get(&disk) {
            Some(Entry::Remote(_)) => {
                let text = format!("disk {disk} is known here as one of another host: drop it first");
                return Err(ControlError::new("exists", text));
            }
            Some(Entry::Frozen(frozen)) if frozen.size != size => return Err(another_size(disk, frozen.size)),
            Some(Entry::Frozen(frozen)) => frozen.export().set_chain(chain),
            None => drop(disks.insert(disk, self.frozen(disk, chain))),
        }
        if let Err(err) = self.record(&disks) {
            if new {
                disks.remove(&disk);
            }
            return Err(err);
        }
        Ok(FrozenReply { size })
    }

    /// See [`crate::control::Request::Extents`].
    ///
    /// # Errors
    /// When the disk is not known, or its chain cannot be read.
    pub fn extents(&self, disk: DiskId) -> Result<ExtentsReply> {
        let (frozen, origin) = {
            let disks = crate::lock(&self.disks);
            match disks.get(&disk) {
                None => return Err(no_such(disk)),
                Some(Entry::Remote(remote)) => {
                    let extents = remote.cache.extents.clone();
                    return Ok(ExtentsReply { size: extents.size(), extents });
                }
                Some(Entry::Frozen(frozen)) => (frozen.clone(), origin_map(&disks, &frozen.export().chain())),
            }
        };
        let extents = frozen.extents(origin.as_ref()).map_err(|err| ControlError::new("internal", describe(&err)))?;
        Ok(ExtentsReply { size: frozen.size, extents: (*extents).clone() })
    }

    /// See [`crate::control::Request::RemoteAdd`].
    ///
    /// # Errors
    /// When the request makes no sense, the disk is here, or its server cannot be made.
    pub fn add_remote(
        &self,
        disk: DiskId,
        size: u64,
        golden: Option<&Path>,
        extents: ExtentMap,
        sources: Vec<SourceAddress>,
    ) -> Result<RemoteReply> {
        let bad = |text: String| ControlError::new("bad_request", text);
        if extents.size() != size || !size.is_multiple_of(512) {
            return Err(bad(format!("disk {disk} has {size} bytes, its map is of {}", extents.size())));
        }
        check_sources(&sources)?;
        let mut disks = crate::lock(&self.disks);
        let new = !disks.contains_key(&disk);
        match disks.get_mut(&disk) {
            Some(Entry::Frozen(_)) => {
                return Err(ControlError::new("exists", format!("all files of disk {disk} are here: open them")));
            }
            Some(Entry::Remote(remote)) => {
                if remote.cache.extents.size() != size {
                    return Err(another_size(disk, remote.cache.extents.size()));
                }
                if let Some(path) = golden {
                    remote.cache.set_golden(path).map_err(|err| bad(golden_text(path, &err)))?;
                    remote.golden = Some(path.to_owned());
                }
                remote.upstream.set_sources(sources);
            }
            None => {
                if let Some(path) = golden {
                    fs::File::open(path).map_err(|err| bad(golden_text(path, &err)))?;
                }
                let socket = self.socket(disk, &disks)?;
                let remote = self
                    .remote(disk, golden, extents, sources, &socket)
                    .map_err(|err| internal(&format!("cannot serve disk {disk} at {}", socket.display()), &err))?;
                if golden.is_some() && remote.golden.is_none() {
                    remote.end();
                    return Err(bad(
                        "the golden image is shorter than the disk's golden pages: it is another one".into()
                    ));
                }
                disks.insert(disk, Entry::Remote(remote));
            }
        }
        if let Err(err) = self.record(&disks) {
            // It would be gone after a restart, unannounced.
            if new && let Some(Entry::Remote(remote)) = disks.remove(&disk) {
                remote.end();
            }
            return Err(err);
        }
        match disks.get(&disk).and_then(Entry::socket) {
            Some(socket) => Ok(RemoteReply { socket: socket.to_owned() }),
            None => Err(no_such(disk)),
        }
    }

    /// See [`crate::control::Request::Sources`].
    ///
    /// # Errors
    /// When the disk is not known as another host's, or the sources make no sense.
    pub fn set_sources(&self, disk: DiskId, sources: Vec<SourceAddress>) -> Result<()> {
        check_sources(&sources)?;
        let disks = crate::lock(&self.disks);
        let Some(Entry::Remote(remote)) = disks.get(&disk) else { return Err(no_such(disk)) };
        if remote.upstream.sources() == sources {
            return Ok(());
        }
        remote.upstream.set_sources(sources);
        self.record(&disks)
    }

    /// A path for a disk's socket: its first digits, or all where another disk has the same.
    fn socket(&self, disk: DiskId, disks: &BTreeMap<DiskId, Entry>) -> Result<PathBuf> {
        let short = self.dir.join(format!("{}.nbd", disk.short()));
        let taken = disks.values().any(|entry| entry.socket() == Some(&short));
        let path = if taken { self.dir.join(format!("{disk}.nbd")) } else { short };
        if path.as_os_str().len() > SOCKET_PATH {
            let text = format!("{} is too long for a socket: give rametd a shorter --state-dir", path.display());
            return Err(ControlError::new("bad_request", text));
        }
        Ok(path)
    }

    /// See [`crate::control::Request::Drop`].
    ///
    /// # Errors
    /// When the disk is not known.
    pub fn drop_disk(&self, disk: DiskId) -> Result<()> {
        let mut disks = crate::lock(&self.disks);
        let entry = disks.remove(&disk).ok_or_else(|| no_such(disk))?;
        let recorded = self.record(&disks);
        drop(disks);
        match entry {
            Entry::Frozen(frozen) => frozen.end(),
            Entry::Remote(remote) => remote.end(),
        }
        recorded
    }

    /// See [`crate::control::Request::Status`].
    #[must_use]
    pub fn status(&self) -> StatusReply {
        let disks = crate::lock(&self.disks);
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let disks = disks.iter().map(|(&disk, entry)| match entry {
            Entry::Frozen(frozen) => DiskStatus {
                disk,
                kind: DiskKind::Frozen,
                size: frozen.size,
                fetched_bytes: 0,
                served_bytes: get(&frozen.served),
                cached_bytes: 0,
                passed_on_bytes: 0,
                sources: Vec::new(),
                golden_bytes: 0,
                requests: get(&frozen.requests),
                damaged_pages: 0,
                waiting: 0,
                stalled: None,
                socket: None,
                export_pid: frozen.export().pid(),
            },
            Entry::Remote(remote) => {
                let (waiting, stalled) = remote.cache.waiting();
                let counters = &remote.cache.counters;
                DiskStatus {
                    disk,
                    kind: DiskKind::Remote,
                    size: remote.cache.extents.size(),
                    fetched_bytes: get(&counters.fetched),
                    served_bytes: get(&counters.served),
                    cached_bytes: remote.cache.cached(),
                    passed_on_bytes: get(&counters.passed_on),
                    sources: remote.upstream.sources(),
                    golden_bytes: get(&counters.golden),
                    requests: get(&counters.requests),
                    damaged_pages: remote.upstream.damaged(),
                    waiting,
                    stalled,
                    socket: Some(remote.server.path().to_owned()),
                    export_pid: None,
                }
            }
        });
        StatusReply { disks: disks.collect(), bad_peers: get(&self.bad_peers) }
    }

    /// Ends all exports, before the process ends.
    pub fn end_exports(&self) {
        for frozen in self.all_frozen() {
            frozen.export().stop();
        }
    }

    fn all_frozen(&self) -> Vec<Arc<Frozen>> {
        let disks = crate::lock(&self.disks);
        let frozen = disks.values().filter_map(|entry| match entry {
            Entry::Frozen(frozen) => Some(frozen.clone()),
            Entry::Remote(_) => None,
        });
        frozen.collect()
    }
}

impl Entry {
    fn socket(&self) -> Option<&Path> {
        match self {
            Self::Frozen(_) => None,
            Self::Remote(remote) => Some(remote.server.path()),
        }
    }
}

impl Disks for Host {
    fn open(&self, layer: LayerId) -> Option<Served> {
        Some(match crate::lock(&self.disks).get(&DiskId::from_layer(layer))? {
            Entry::Frozen(frozen) => Served::Whole(frozen.clone()),
            Entry::Remote(remote) => Served::Part(remote.cache.clone()),
        })
    }

    fn bad_peer(&self) {
        self.bad_peers.fetch_add(1, Ordering::Relaxed);
    }
}

/// The map of a chain's origin, which is a disk of another host that is served here.
fn origin_map(disks: &BTreeMap<DiskId, Entry>, chain: &ChainPaths) -> Option<ExtentMap> {
    let socket = chain.origin.as_deref()?;
    disks.values().find_map(|entry| match entry {
        Entry::Remote(remote) if remote.server.path() == socket => Some(remote.cache.extents.clone()),
        _ => None,
    })
}

fn tidy(host: &Weak<Host>, idle: Duration) {
    loop {
        std::thread::sleep(TIDY.min(idle));
        let Some(host) = host.upgrade() else { return };
        for frozen in host.all_frozen() {
            frozen.export().tidy(idle);
        }
    }
}

/// Waits for a moment for a process that is ending.
fn hold(lock: &fs::File) -> io::Result<()> {
    for _ in 0..100 {
        if rustix::fs::flock(lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).is_ok() {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Err(io::Error::other("another ramet-disk uses this directory: end it first"))
}

fn check_sources(sources: &[SourceAddress]) -> Result<()> {
    let bad = |text: String| Err(ControlError::new("bad_request", text));
    if sources.len() > MAX_SOURCES {
        return bad(format!("{} sources are too many, the limit is {MAX_SOURCES}", sources.len()));
    }
    match sources.iter().find(|s| s.addr.parse::<std::net::SocketAddr>().is_err()) {
        Some(wrong) => bad(format!("'{}' is no IP:PORT", wrong.addr)),
        None => Ok(()),
    }
}

fn another_size(disk: DiskId, size: u64) -> ControlError {
    ControlError::new("bad_request", format!("disk {disk} is known with {size} bytes: it is another disk"))
}

fn golden_text(path: &Path, err: &io::Error) -> String {
    format!("the golden image {} cannot be used: {err}", path.display())
}

fn describe(err: &dyn std::error::Error) -> String {
    err.source().map_or_else(|| err.to_string(), |cause| format!("{err}: {cause}"))
}
