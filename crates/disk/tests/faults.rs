//! What dies, and what readers see of it: a wait at most, and never wrong bytes or an error.
#![allow(clippy::unwrap_used, reason = "a failure ends the test")]

mod support;

use ramet_disk::{
    DiskId, ExtentMap, Kind,
    control::{Request, SourceAddress},
    export::Export,
    nbd::Client,
};
use ramet_memory::{FamilyId, PageIndex, page_checksum};
use ramet_wire::{Frame, LayerStatus, Listener, Message, Options, PagesWriter, frame::VERSION};
use std::{
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};
use support::{LIMIT, Process, World, exports, run, soon};

const MIB: u64 = 1 << 20;

/// Reads the whole disk, connecting again where its connection breaks; the end says how often it did.
struct Reader {
    thread: JoinHandle<u64>,
    pages: Arc<AtomicU64>,
}

impl Reader {
    fn start(world: &World, socket: &Path, pause: Duration) -> Self {
        let (socket, truth) = (socket.to_owned(), world.chain.truth.clone());
        let pages = Arc::new(AtomicU64::new(0));
        let done = pages.clone();
        let thread = std::thread::spawn(move || {
            let mut broken = 0;
            let mut client = Client::connect(&socket, "", LIMIT).unwrap();
            let mut bytes = [0; 4096];
            for (page, wanted) in truth.chunks(4096).enumerate() {
                while client.read(page as u64 * 4096, &mut bytes[..wanted.len()]).is_err() {
                    broken += 1;
                    client = soon("the server is back", || Client::connect(&socket, "", LIMIT).ok());
                }
                assert!(bytes[..wanted.len()] == *wanted, "page {page} is wrong");
                done.fetch_add(1, Ordering::Relaxed);
                std::thread::sleep(pause);
            }
            broken
        });
        Self { thread, pages }
    }

    /// Waits until it has read some pages more.
    fn gets_on(&self, pages: u64) {
        let before = self.pages.load(Ordering::Relaxed);
        soon("the reader gets on", || (self.pages.load(Ordering::Relaxed) >= before + pages).then_some(()));
    }

    fn end(self) -> u64 {
        self.thread.join().unwrap()
    }
}

/// A disk of which everything must be fetched, and its socket.
fn world(seed: u64) -> (World, PathBuf) {
    let world = World::new(8 * MIB, 8 * MIB, 2, seed);
    let unknown = ExtentMap::uniform(8 * MIB, Kind::Data).unwrap();
    let socket = world.b.add_remote(world.disk, &unknown, None, &[world.a.address()]);
    (world, socket)
}

#[test]
fn the_host_of_the_checkpoint_is_killed_and_comes_back() {
    let (mut world, socket) = world(1);
    let reader = Reader::start(&world, &socket, Duration::from_millis(1));
    reader.gets_on(100);
    assert_eq!(world.a.exports(), 1);
    world.a.kill();
    soon("its export is gone with it", || (world.a.exports() == 0).then_some(()));
    let stalled = soon("it is stalled", || world.b.status(world.disk).stalled);
    assert!(stalled.since_ms >= 1000 && stalled.reason.contains("host (127.0.0.1:"), "{stalled:?}");
    world.a.restart();
    reader.gets_on(100);
    world.a.restart();
    assert_eq!(reader.end(), 0, "the reader's own connection never broke");
    let status = world.b.status(world.disk);
    assert_eq!((status.cached_bytes, &status.stalled), (8 * MIB, &None));
    world.compare(&socket);
}

#[test]
fn the_host_of_the_checkpoint_is_silent_for_a_while() {
    let (world, socket) = world(2);
    let reader = Reader::start(&world, &socket, Duration::from_millis(1));
    reader.gets_on(100);
    world.a.signal("-STOP");
    let stalled = soon("it is stalled for long", || world.b.status(world.disk).stalled.filter(|s| s.since_ms > 3000));
    assert!(!stalled.reason.is_empty());
    world.a.signal("-CONT");
    assert_eq!(reader.end(), 0);
    world.compare(&socket);
}

#[test]
fn another_source_takes_over() {
    let (world, socket) = world(3);
    let second = world.process("a2", world.family);
    second.ask(&Request::FrozenAdd { disk: world.disk, chain: world.chain.paths.clone() }).unwrap();
    let nobody = SourceAddress { addr: "127.0.0.1:1".to_owned(), name: "host".to_owned() };
    let unknown = ExtentMap::uniform(8 * MIB, Kind::Data).unwrap();
    let all = [nobody, world.a.address(), second.address()];
    world.b.add_remote(world.disk, &unknown, None, &all);
    let reader = Reader::start(&world, &socket, Duration::from_millis(1));
    reader.gets_on(100);
    world.a.signal("-STOP");
    assert_eq!(reader.end(), 0);
    assert!(second.status(world.disk).served_bytes > 0);
    world.a.signal("-CONT");
    world.compare(&socket);
}

#[test]
fn what_a_host_has_fetched_others_get_from_it_and_nothing_else() {
    let (world, socket) = world(12);
    let c = world.process("c", world.family);
    let pages = world.chain.truth.len() as u64 / 4096;
    let read = |client: &mut Client, page: u64| {
        let mut bytes = [0; 4096];
        client.read(page * 4096, &mut bytes).unwrap();
        assert!(bytes == world.chain.truth[page as usize * 4096..][..4096], "page {page} is wrong");
    };
    let mut first = Client::connect(&socket, "", LIMIT).unwrap();
    (0..pages / 2).for_each(|page| read(&mut first, page));
    // Nobody but the host with the cache: what it has comes, then readers wait.
    let unknown = ExtentMap::uniform(8 * MIB, Kind::Data).unwrap();
    let socket = c.add_remote(world.disk, &unknown, None, &[world.b.address()]);
    let reader = Reader::start(&world, &socket, Duration::ZERO);
    reader.gets_on(pages / 2);
    let stalled = soon("it is stalled", || c.status(world.disk).stalled);
    assert!(stalled.reason.contains("does not have"), "{stalled:?}");
    assert_eq!(world.b.status(world.disk).passed_on_bytes, 4 * MIB, "each once");
    // With the checkpoint's host the rest comes, from there.
    let fetched = |process: &Process| process.status(world.disk).fetched_bytes;
    let before = (fetched(&world.b), world.a.status(world.disk).served_bytes);
    let sources = vec![world.b.address(), world.a.address()];
    c.ask(&Request::Sources { disk: world.disk, sources: sources.clone() }).unwrap();
    assert_eq!(c.status(world.disk).sources, sources);
    assert_eq!(reader.end(), 0);
    world.compare(&socket);
    assert_eq!(fetched(&world.b), before.0, "a host fetches nothing for another");
    assert_eq!(world.a.status(world.disk).served_bytes - before.1, 4 * MIB);
    // And what came from both may be passed on, too.
    let d = world.process("d", world.family);
    let all = [world.a.address(), world.b.address(), c.address()];
    world.a.signal("-STOP");
    let socket = d.add_remote(world.disk, &unknown, None, &all);
    world.compare(&socket);
    world.a.signal("-CONT");
    c.ask(&Request::Drop { disk: world.disk }).unwrap();
    let gone = Request::Sources { disk: world.disk, sources };
    assert_eq!(c.ask(&gone).unwrap_err().code, "no_such_disk");
}

#[test]
fn the_reading_host_is_killed_and_serves_the_same_socket_again() {
    let (mut world, socket) = world(4);
    let reader = Reader::start(&world, &socket, Duration::from_millis(1));
    reader.gets_on(300);
    for _ in 0..3 {
        world.b.restart();
        reader.gets_on(100);
    }
    assert!(reader.end() >= 3);
    let status = world.b.status(world.disk);
    assert_eq!(status.cached_bytes, 8 * MIB);
    assert!(status.fetched_bytes < 7 * MIB, "what was there was fetched again: {status:?}");
    assert_eq!(status.socket.as_deref(), Some(&*socket));
    world.b.restart();
    world.compare(&socket);
    assert_eq!(world.b.status(world.disk).fetched_bytes, 0);
}

#[test]
fn another_family_gets_nothing() {
    let (world, socket) = world(5);
    let other = world.process("other", FamilyId::random());
    other.ask(&Request::FrozenAdd { disk: world.disk, chain: world.chain.paths.clone() }).unwrap();
    let unknown = ExtentMap::uniform(8 * MIB, Kind::Data).unwrap();
    world.b.add_remote(world.disk, &unknown, None, &[other.address()]);
    let reader = Reader::start(&world, &socket, Duration::ZERO);
    let stalled = soon("it is stalled", || world.b.status(world.disk).stalled);
    assert!(stalled.reason.contains("another family"), "{stalled:?}");
    assert_eq!(world.b.status(world.disk).waiting, 1);
    world.b.add_remote(world.disk, &unknown, None, &[world.a.address()]);
    assert_eq!(reader.end(), 0);
}

/// A source that opens every disk, and answers with bytes that it damages after their sums were made.
fn liar(world: &World, lies: &Arc<AtomicBool>) -> SourceAddress {
    let listener = Listener::bind("127.0.0.1:0".parse().unwrap(), &world.tls, &Options::default()).unwrap();
    let addr = listener.local_addr().to_string();
    let (truth, layer, lies) = (world.chain.truth.clone(), world.disk.layer(), lies.clone());
    std::thread::spawn(move || {
        while let Ok(pending) = listener.accept() {
            let Ok(connection) = pending.handshake() else { continue };
            let (sender, mut receiver) = connection.split();
            let mut writer = PagesWriter::new();
            while let Ok(frame) = receiver.recv() {
                let mut out = Vec::new();
                match frame.message {
                    Message::Hello { .. } => {
                        Frame { req: 0, message: Message::HelloAck { version: VERSION, host: "host" } }
                            .encode(&mut out);
                    }
                    Message::OpenLayer { handle, .. } => {
                        let message = Message::LayerOpened { handle, status: LayerStatus::Ok };
                        Frame { req: frame.req, message }.encode(&mut out);
                    }
                    Message::GetPages { handle, start, count, .. } => {
                        writer.start(frame.req, handle);
                        for page in start.0..start.0 + u64::from(count) {
                            let mut bytes = *truth[page as usize * 4096..].first_chunk::<4096>().unwrap();
                            let sum = page_checksum(layer, PageIndex(page), &bytes);
                            if page % 8 == 5 && lies.load(Ordering::Relaxed) {
                                bytes[77] ^= 1;
                            }
                            writer.push_raw_or_lz4(PageIndex(page), &bytes, sum).unwrap();
                        }
                        out.extend_from_slice(writer.finish(true));
                    }
                    _ => {}
                }
                if sender.send(&out).is_err() {
                    break;
                }
            }
        }
    });
    SourceAddress { addr, name: "host".to_owned() }
}

#[test]
fn a_damaged_page_is_never_served() {
    let (world, socket) = world(6);
    let lies = Arc::new(AtomicBool::new(true));
    let liar = liar(&world, &lies);
    let unknown = ExtentMap::uniform(8 * MIB, Kind::Data).unwrap();
    // Alone: readers wait.
    world.b.add_remote(world.disk, &unknown, None, std::slice::from_ref(&liar));
    let reader = Reader::start(&world, &socket, Duration::ZERO);
    let stalled = soon("it is stalled", || world.b.status(world.disk).stalled);
    assert!(stalled.reason.contains("damaged"), "{stalled:?}");
    assert!(world.b.status(world.disk).damaged_pages > 0);
    // It has come to its senses: the pages that wait come.
    lies.store(false, Ordering::Relaxed);
    reader.gets_on(8);
    lies.store(true, Ordering::Relaxed);
    // With an honest one: all come.
    world.b.add_remote(world.disk, &unknown, None, &[liar, world.a.address()]);
    assert_eq!(reader.end(), 0);
    world.compare(&socket);
}

#[test]
fn nothing_is_left_after_a_drop_or_an_end() {
    let (mut world, socket) = world(7);
    world.compare(&socket);
    assert_eq!((world.a.exports(), world.b.exports()), (1, 0));
    // QEMU's user may connect to the disk, and to nothing else.
    let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&socket), mode(&world.b.dir)), (0o666, 0o711));
    assert_eq!((mode(&world.b.dir.join("control.sock")), mode(&world.b.dir.join("cache"))), (0o600, 0o700));

    // Its export is killed: the next read starts another.
    let before = world.a.status(world.disk).export_pid.unwrap();
    run(Command::new("kill").args(["-9", &before.to_string()]));
    world.b.ask(&Request::Drop { disk: world.disk }).unwrap();
    let unknown = ExtentMap::uniform(8 * MIB, Kind::Data).unwrap();
    assert_eq!(world.b.add_remote(world.disk, &unknown, None, &[world.a.address()]), socket);
    world.compare(&socket);
    assert_ne!(world.a.status(world.disk).export_pid.unwrap(), before);
    let other = again(&world);
    world.compare(&other.1);

    // A reader that waits when its disk is dropped gets an error, not a wait for ever.
    let third = again(&world);
    world.a.signal("-STOP");
    let waiting = {
        let socket = third.1.clone();
        std::thread::spawn(move || Client::connect(&socket, "", LIMIT).unwrap().read(0, &mut [0; 4096]).is_err())
    };
    soon("it waits", || (world.b.status(third.0).waiting == 1).then_some(()));
    world.b.ask(&Request::Drop { disk: third.0 }).unwrap();
    assert!(waiting.join().unwrap());
    world.a.signal("-CONT");

    world.b.ask(&Request::Drop { disk: other.0 }).unwrap();
    world.b.ask(&Request::Drop { disk: world.disk }).unwrap();
    assert!(!socket.exists() && !other.1.exists());
    assert_eq!(std::fs::read_dir(world.b.dir.join("cache")).unwrap().count(), 0);
    for disk in [world.disk, other.0, third.0] {
        world.a.ask(&Request::Drop { disk }).unwrap();
    }
    soon("its export is gone", || (world.a.exports() == 0).then_some(()));
    let left = |dir: &Path| {
        let names = std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.collect();
        names.sort();
        names
    };
    let wanted: Vec<_> = ["cache", "control.sock", "listen", "lock", "record.json"].map(String::from).into();
    assert_eq!((left(&world.a.dir), left(&world.b.dir)), (wanted.clone(), wanted.clone()));

    // A shutdown ends the exports, and keeps the record.
    let disk = world.a.add_frozen(&world.chain);
    let unknown = ExtentMap::uniform(8 * MIB, Kind::Data).unwrap();
    let socket = world.b.add_remote(disk, &unknown, None, &[world.a.address()]);
    world.compare(&socket);
    assert_eq!(world.a.exports(), 1);
    world.a.ask(&Request::Shutdown).unwrap();
    world.a.wait();
    assert_eq!(exports(&world.a.dir), 0);
    world.a.restart();
    assert_eq!(world.a.status(disk).size, 8 * MIB);
}

/// A tmpfs, unmounted in the end.
struct Tmpfs(PathBuf);

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[test]
fn without_room_for_the_cache_readers_wait() {
    let world = World::new(8 * MIB, 8 * MIB, 1, 9);
    let small = Tmpfs(world.dir.path().join("small"));
    std::fs::create_dir(&small.0).unwrap();
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=4m", "ramet-test"]).arg(&small.0).status();
    if !mounted.unwrap().success() {
        eprintln!("SKIPPED: mounting a tmpfs needs root");
        return;
    }
    let c = world.process("small/c", world.family);
    let unknown = ExtentMap::uniform(8 * MIB, Kind::Data).unwrap();
    let socket = c.add_remote(world.disk, &unknown, None, &[world.a.address()]);
    let reader = Reader::start(&world, &socket, Duration::ZERO);
    let stalled = soon("it is stalled", || c.status(world.disk).stalled);
    assert!(stalled.reason.contains("room"), "{stalled:?}");
    run(Command::new("mount").args(["-o", "remount,size=64m"]).arg(&small.0));
    assert_eq!(reader.end(), 0);
}

#[test]
fn an_idle_export_ends_and_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let chain = support::Chain::make(&dir.path().join("chain"), 4 * MIB, 4 * MIB, 1, 8);
    let stem = dir.path().join("disk");
    let export = Export::new(DiskId::random(), chain.paths.clone(), &stem);
    let mut bytes = vec![0; 65536];
    for round in 0..2 {
        export.read(32 * round, &mut bytes).unwrap();
        assert!(bytes == chain.truth[(131_072 * round) as usize..][..65536]);
        let pid = export.pid().unwrap();
        export.tidy(Duration::from_secs(60));
        assert_eq!(export.pid(), Some(pid));
        std::thread::sleep(Duration::from_millis(20));
        export.tidy(Duration::from_millis(10));
        assert_eq!((export.pid(), exports(dir.path())), (None, 0));
    }
    // A file that is no overlay: an error that says what is wrong.
    let broken = ramet_disk::ChainPaths { size: 4 * MIB, golden: None, origin: None, layers: vec![chain.raw.clone()] };
    let export = Export::new(DiskId::random(), broken, &stem);
    let err = export.read(0, &mut bytes).unwrap_err().to_string();
    assert!(err.contains("qcow2"), "{err}");
    assert_eq!(exports(dir.path()), 0);
}

/// The same chain as another disk.
fn again(world: &World) -> (DiskId, PathBuf) {
    let disk = world.a.add_frozen(&world.chain);
    let unknown = ExtentMap::uniform(8 * MIB, Kind::Data).unwrap();
    (disk, world.b.add_remote(disk, &unknown, None, &[world.a.address()]))
}
