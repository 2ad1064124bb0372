//! A server that gives a disk to read.
//!
//! What can be read at once is answered by the thread that reads requests. What must be waited for goes to workers, so
//! that it holds nothing else up. A client can hold at most [`WORKERS`] threads and [`CHUNK`] bytes in each.

use super::*;
use rustix::event::{PollFd, PollFlags, Timespec};
use std::{
    collections::{HashMap, VecDeque},
    fs,
    io::{BufReader, Write},
    net::Shutdown,
    os::unix::{
        fs::PermissionsExt,
        net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Condvar, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

/// Most connections at a time: more than a host has VMs.
const MAX_CLIENTS: usize = 384;
/// Most reads that wait at a time on one connection.
const WORKERS: usize = 32;
/// Bytes that are read and sent at a time.
const CHUNK: usize = 256 << 10;
/// Bytes of a reply before its data.
const REPLY: usize = 16;
/// How often a thread that waits for a worker looks whether its client is there.
const LOOK: Duration = Duration::from_millis(200);
/// Time limit of the negotiation.
const NEGOTIATION: Duration = Duration::from_secs(10);

/// What a [`Server`] gives to read.
pub trait Disk: Send + Sync + 'static {
    /// Its size in bytes.
    fn size(&self) -> u64;

    /// Reads all of `buffer`, without waiting for another host.
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] when it must be waited for ([`Self::wait`]). Any other ends the connection: a guest
    /// never sees an error for what may be read later.
    fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;

    /// Waits until these bytes can be read, or until nobody wants them any more: `gone` says so, and is asked a few times
    /// a second.
    ///
    /// # Errors
    /// When nobody wants them any more, or the disk ends.
    fn wait(&self, offset: u64, len: u64, gone: &dyn Fn() -> bool) -> io::Result<()>;

    /// A read was asked for.
    fn count(&self, bytes: u64);
}

/// A server on a Unix socket. It ends when it is dropped.
#[derive(Debug)]
pub struct Server {
    path: PathBuf,
    listener: Arc<UnixListener>,
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    ending: AtomicBool,
    next: AtomicU64,
    clients: Mutex<HashMap<u64, Arc<Client>>>,
}

/// One connection.
#[derive(Debug)]
struct Client {
    stream: UnixStream,
    /// Replies are written whole.
    writing: Mutex<()>,
    gone: AtomicBool,
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    reads: VecDeque<Wanted>,
    workers: usize,
    idle: usize,
}

#[derive(Debug, Clone, Copy)]
struct Wanted {
    cookie: u64,
    offset: u64,
    len: u32,
}

impl Server {
    /// Serves `disk` at `path`, where every local user may connect. A socket that is there already is replaced.
    ///
    /// # Errors
    /// When the socket cannot be made, as when its path is too long.
    pub fn start(path: &Path, disk: Arc<impl Disk>) -> io::Result<Self> {
        // Made beside it and moved: the path never names a socket that nobody may use.
        let new = path.with_extension("new");
        let _ = fs::remove_file(&new);
        let listener = Arc::new(UnixListener::bind(&new)?);
        fs::set_permissions(&new, fs::Permissions::from_mode(0o666))?;
        fs::rename(&new, path)?;
        let shared = Arc::new(Shared::default());
        let (l, s) = (listener.clone(), shared.clone());
        let thread = std::thread::Builder::new().name("nbd".into()).spawn(move || accept(&l, &s, &disk))?;
        Ok(Self { path: path.to_owned(), listener, shared, thread: Some(thread) })
    }

    /// Where it listens.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.ending.store(true, Ordering::Release);
        let _ = fs::remove_file(&self.path);
        // Wakes the thread that waits in accept(2).
        let _ = rustix::net::shutdown(&*self.listener, rustix::net::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        for client in crate::lock(&self.shared.clients).values() {
            client.end();
        }
    }
}

fn accept(listener: &UnixListener, shared: &Arc<Shared>, disk: &Arc<impl Disk>) {
    loop {
        let accepted = listener.accept();
        if shared.ending.load(Ordering::Acquire) {
            return;
        }
        let Ok((stream, _)) = accepted else {
            // A shortage of descriptors or memory passes.
            std::thread::sleep(Duration::from_millis(20));
            continue;
        };
        let client = Arc::new(Client {
            stream,
            writing: Mutex::default(),
            gone: AtomicBool::new(false),
            queue: Mutex::default(),
            changed: Condvar::new(),
        });
        let number = shared.next.fetch_add(1, Ordering::Relaxed);
        {
            let mut clients = crate::lock(&shared.clients);
            if clients.len() >= MAX_CLIENTS {
                tracing::warn!("an NBD client was refused: {MAX_CLIENTS} are connected");
                continue;
            }
            clients.insert(number, client.clone());
        }
        let (disk, all) = (disk.clone(), shared.clone());
        let spawned = std::thread::Builder::new().name("nbd-client".into()).spawn(move || {
            if let Err(err) = serve(&client, &disk)
                && !matches!(err.kind(), io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe)
            {
                tracing::warn!(error = %err, "an NBD connection ended");
            }
            client.end();
            // Its place is free when its workers are gone.
            let mut queue = crate::lock(&client.queue);
            while queue.workers > 0 {
                queue = client.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
            }
            drop(queue);
            crate::lock(&all.clients).remove(&number);
        });
        if spawned.is_err() {
            crate::lock(&shared.clients).remove(&number);
        }
    }
}

fn serve(client: &Arc<Client>, disk: &Arc<impl Disk>) -> io::Result<()> {
    client.stream.set_read_timeout(Some(NEGOTIATION))?;
    client.stream.set_write_timeout(Some(NEGOTIATION))?;
    let mut reader = BufReader::new(&client.stream);
    if !negotiate(&mut reader, &mut &client.stream, disk.size())? {
        return Ok(());
    }
    // QEMU may be idle, or stopped, for as long as it likes.
    client.stream.set_read_timeout(None)?;
    client.stream.set_write_timeout(None)?;
    let mut buffer = Vec::new();
    loop {
        let Some(read) = next_read(&mut reader, client, disk.size())? else { return Ok(()) };
        disk.count(u64::from(read.len));
        if !client.answer(read, disk, &mut buffer, false)? {
            client.enqueue(read, disk)?;
        }
    }
}

/// The handshake. False when the client has ended it.
fn negotiate(reader: &mut impl Read, writer: &mut impl Write, size: u64) -> io::Result<bool> {
    let mut hello = Vec::new();
    hello.extend(NBDMAGIC.to_be_bytes());
    hello.extend(IHAVEOPT.to_be_bytes());
    hello.extend((FIXED_NEWSTYLE | NO_ZEROES).to_be_bytes());
    writer.write_all(&hello)?;
    let flags = u32_of(reader)?;
    if flags & u32::from(FIXED_NEWSTYLE) == 0 || flags & !u32::from(FIXED_NEWSTYLE | NO_ZEROES) != 0 {
        return Err(bad("its flags"));
    }
    let transmission = HAS_FLAGS | READ_ONLY | SEND_FLUSH | CAN_MULTI_CONN;
    loop {
        if u64_of(reader)? != IHAVEOPT {
            return Err(bad("an option"));
        }
        let (option, len) = (u32_of(reader)?, u32_of(reader)?);
        if len > MAX_OPTION {
            return Err(bad("an option too long"));
        }
        let mut data = vec![0; len as usize];
        reader.read_exact(&mut data)?;
        let mut reply = |kind: u32, parts: &[&[u8]]| {
            let mut out = Vec::new();
            out.extend(OPTION_REPLY.to_be_bytes());
            out.extend(option.to_be_bytes());
            out.extend(kind.to_be_bytes());
            out.extend((parts.iter().map(|p| p.len()).sum::<usize>() as u32).to_be_bytes());
            parts.iter().for_each(|part| out.extend(*part));
            writer.write_all(&out)
        };
        match option {
            OPT_EXPORT_NAME => {
                let mut out = Vec::new();
                out.extend(size.to_be_bytes());
                out.extend(transmission.to_be_bytes());
                if flags & u32::from(NO_ZEROES) == 0 {
                    out.extend([0; 124]);
                }
                writer.write_all(&out)?;
                return Ok(true);
            }
            OPT_ABORT => {
                // The client may be gone already.
                let _ = reply(REP_ACK, &[]);
                return Ok(false);
            }
            OPT_LIST if data.is_empty() => {
                // One export, whose name is empty.
                reply(REP_SERVER, &[&0u32.to_be_bytes()])?;
                reply(REP_ACK, &[])?;
            }
            OPT_INFO | OPT_GO if is_info(&data) => {
                reply(REP_INFO, &[&INFO_EXPORT.to_be_bytes(), &size.to_be_bytes(), &transmission.to_be_bytes()])?;
                let sizes = [1u32, 4096, MAX_READ].map(u32::to_be_bytes);
                reply(REP_INFO, &[&INFO_BLOCK_SIZE.to_be_bytes(), sizes.as_flattened()])?;
                reply(REP_ACK, &[])?;
                if option == OPT_GO {
                    return Ok(true);
                }
            }
            OPT_LIST | OPT_INFO | OPT_GO => reply(REP_ERR_INVALID, &[])?,
            _ => reply(REP_ERR_UNSUP, &[])?,
        }
    }
}

/// Whether this is a name and a list of wishes.
fn is_info(data: &[u8]) -> bool {
    let mut rest = data;
    let Ok(name) = u32_of(&mut rest) else { return false };
    let Some(mut rest) = rest.get(name as usize..) else { return false };
    u16_of(&mut rest).is_ok_and(|wishes| rest.len() == 2 * usize::from(wishes))
}

/// The next read that makes sense; requests that do not, and others, are answered here. `None`: the client has ended.
fn next_read(reader: &mut impl Read, client: &Client, size: u64) -> io::Result<Option<Wanted>> {
    loop {
        if u32_of(reader)? != REQUEST {
            return Err(bad("a request"));
        }
        let (_flags, kind) = (u16_of(reader)?, u16_of(reader)?);
        let (cookie, offset, len) = (u64_of(reader)?, u64_of(reader)?, u32_of(reader)?);
        match kind {
            CMD_READ if len > 0 && len <= MAX_READ && offset.checked_add(len.into()).is_some_and(|e| e <= size) => {
                return Ok(Some(Wanted { cookie, offset, len }));
            }
            CMD_DISC => return Ok(None),
            CMD_FLUSH => client.reply(cookie, 0)?,
            CMD_WRITE => {
                if len > MAX_READ {
                    return Err(bad("a write too long"));
                }
                io::copy(&mut reader.take(len.into()), &mut io::sink())?;
                client.reply(cookie, EPERM)?;
            }
            CMD_TRIM | CMD_WRITE_ZEROES => client.reply(cookie, EPERM)?,
            _ => client.reply(cookie, EINVAL)?,
        }
    }
}

impl Client {
    fn reply(&self, cookie: u64, error: u32) -> io::Result<()> {
        let _writing = crate::lock(&self.writing);
        (&self.stream).write_all(&header(cookie, error))
    }

    /// Answers a read. False when it would have to wait and may not.
    fn answer(&self, read: Wanted, disk: &Arc<impl Disk>, buffer: &mut Vec<u8>, patient: bool) -> io::Result<bool> {
        let end = read.offset + u64::from(read.len);
        // Of a long read the first bytes may be there and others not: it is a worker's, so that nothing waits here.
        if !patient && read.len as usize > CHUNK {
            return Ok(false);
        }
        if patient {
            disk.wait(read.offset, read.len.into(), &|| self.is_gone())?;
        }
        let mut at = read.offset;
        let mut writing = None;
        while at < end {
            let len = usize::try_from(end - at).unwrap_or(CHUNK).min(CHUNK);
            // Grows to what is asked for; a client that asks for 4 KiB costs no more.
            buffer.resize(REPLY + len, 0);
            let begun = writing.is_some();
            match disk.read(at, &mut buffer[REPLY..]) {
                Ok(()) => {}
                Err(err) if err.kind() == io::ErrorKind::WouldBlock => {
                    if !patient && !begun {
                        return Ok(false);
                    }
                    disk.wait(at, len as u64, &|| self.is_gone())?;
                    continue;
                }
                Err(err) => return Err(err),
            }
            if !begun {
                buffer[..REPLY].copy_from_slice(&header(read.cookie, 0));
            }
            let writing = writing.get_or_insert_with(|| crate::lock(&self.writing));
            let _: &mut std::sync::MutexGuard<'_, ()> = writing;
            (&self.stream).write_all(&buffer[if begun { REPLY } else { 0 }..])?;
            at += len as u64;
        }
        Ok(true)
    }

    /// Leaves a read to a worker. Waits for one when all are busy.
    fn enqueue(self: &Arc<Self>, read: Wanted, disk: &Arc<impl Disk>) -> io::Result<()> {
        let mut queue = crate::lock(&self.queue);
        while queue.reads.len() >= WORKERS {
            if self.is_gone() {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            queue = self.changed.wait_timeout(queue, LOOK).unwrap_or_else(PoisonError::into_inner).0;
        }
        queue.reads.push_back(read);
        if queue.idle < queue.reads.len() && queue.workers < WORKERS {
            let (client, disk) = (self.clone(), disk.clone());
            std::thread::Builder::new().name("nbd-read".into()).spawn(move || client.work(&disk))?;
            queue.workers += 1;
        }
        drop(queue);
        self.changed.notify_all();
        Ok(())
    }

    fn work(&self, disk: &Arc<impl Disk>) {
        let mut buffer = Vec::new();
        let mut queue = crate::lock(&self.queue);
        while !self.gone.load(Ordering::Acquire) {
            let Some(read) = queue.reads.pop_front() else {
                queue.idle += 1;
                queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
                queue.idle -= 1;
                continue;
            };
            drop(queue);
            self.changed.notify_all();
            if let Err(err) = self.answer(read, disk, &mut buffer, true) {
                tracing::debug!(error = %err, "a read was not answered");
                self.end();
            }
            queue = crate::lock(&self.queue);
        }
        queue.workers -= 1;
        drop(queue);
        self.changed.notify_all();
    }

    /// Whether the connection has ended, at this end or the other. The thread that reads requests does not notice while
    /// it waits for a worker.
    fn is_gone(&self) -> bool {
        let mut polled = [PollFd::new(&self.stream, PollFlags::empty())];
        self.gone.load(Ordering::Acquire)
            || rustix::event::poll(&mut polled, Some(&Timespec::default())).is_ok()
                && polled[0].revents().intersects(PollFlags::HUP | PollFlags::ERR)
    }

    /// Ends the connection; whoever waits for it notices.
    fn end(&self) {
        {
            let _queue = crate::lock(&self.queue);
            self.gone.store(true, Ordering::Release);
        }
        let _ = self.stream.shutdown(Shutdown::Both);
        self.changed.notify_all();
    }
}

fn header(cookie: u64, error: u32) -> [u8; REPLY] {
    let mut out = [0; REPLY];
    out[..4].copy_from_slice(&SIMPLE_REPLY.to_be_bytes());
    out[4..8].copy_from_slice(&error.to_be_bytes());
    out[8..].copy_from_slice(&cookie.to_be_bytes());
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Instant;

    /// Byte n of the disk is n % 251. Reads at or past `wet` wait until `dry`.
    struct Test {
        size: u64,
        wet: u64,
        dry: Mutex<bool>,
        changed: Condvar,
    }

    impl Disk for Test {
        fn size(&self) -> u64 {
            self.size
        }

        fn read(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
            if offset + buffer.len() as u64 > self.wet && !*self.dry.lock().unwrap() {
                return Err(io::ErrorKind::WouldBlock.into());
            }
            buffer.iter_mut().zip(offset..).for_each(|(b, n)| *b = (n % 251) as u8);
            Ok(())
        }

        fn wait(&self, offset: u64, len: u64, gone: &dyn Fn() -> bool) -> io::Result<()> {
            let mut dry = self.dry.lock().unwrap();
            while !*dry && offset + len > self.wet {
                if gone() {
                    return Err(io::ErrorKind::NotConnected.into());
                }
                dry = self.changed.wait_timeout(dry, Duration::from_millis(10)).unwrap().0;
            }
            Ok(())
        }

        fn count(&self, _: u64) {}
    }

    fn start(wet: u64) -> (tempfile::TempDir, Arc<Test>, Server) {
        let dir = tempfile::tempdir().unwrap();
        let disk = Arc::new(Test { size: 4 << 20, wet, dry: Mutex::new(false), changed: Condvar::new() });
        let server = Server::start(&dir.path().join("s.nbd"), disk.clone()).unwrap();
        (dir, disk, server)
    }

    fn client(server: &Server) -> super::super::Client {
        super::super::Client::connect(server.path(), "", Duration::from_secs(5)).unwrap()
    }

    #[test]
    fn bytes_come_as_they_are() {
        let (_dir, _disk, server) = start(u64::MAX);
        let mut client = client(&server);
        assert_eq!(client.size(), 4 << 20);
        for (offset, len) in [(0u64, 1usize), (5, 100_000), (1, 4 << 18), ((4 << 20) - 7, 7), (0, 4 << 20)] {
            let mut bytes = vec![0; len];
            client.read(offset, &mut bytes).unwrap();
            assert!(bytes.iter().zip(offset..).all(|(b, n)| *b == (n % 251) as u8), "{offset} {len}");
        }
        // Past the end, and too long.
        assert_eq!(client.read(4 << 20, &mut [0]).unwrap_err().kind(), io::ErrorKind::Other);
        assert_eq!(client.read(u64::MAX, &mut [0]).unwrap_err().kind(), io::ErrorKind::Other);
        let mut too_long = vec![0; MAX_READ as usize + 1];
        assert_eq!(client.read(0, &mut too_long).unwrap_err().kind(), io::ErrorKind::Other);
        client.read(0, &mut [0; 10]).unwrap();
        let path = server.path().to_owned();
        drop(server);
        assert!(client.read(0, &mut [0]).is_err() && !path.exists());
    }

    fn request(kind: u16, cookie: u64, offset: u64, len: u32) -> Vec<u8> {
        let mut out = REQUEST.to_be_bytes().to_vec();
        out.extend([0, 0]);
        out.extend(kind.to_be_bytes());
        out.extend(cookie.to_be_bytes());
        out.extend(offset.to_be_bytes());
        out.extend(len.to_be_bytes());
        out
    }

    /// A connection past its negotiation, by the oldest way.
    fn raw(server: &Server) -> UnixStream {
        let mut s = UnixStream::connect(server.path()).unwrap();
        s.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let _: [u8; 18] = array(&mut s).unwrap();
        s.write_all(&3u32.to_be_bytes()).unwrap();
        s.write_all(&IHAVEOPT.to_be_bytes()).unwrap();
        s.write_all(&[0, 0, 0, 1, 0, 0, 0, 0]).unwrap();
        let _: [u8; 10] = array(&mut s).unwrap();
        s
    }

    fn answer(s: &mut UnixStream) -> (u64, u32) {
        assert_eq!(u32_of(s).unwrap(), SIMPLE_REPLY);
        let error = u32_of(s).unwrap();
        (u64_of(s).unwrap(), error)
    }

    #[test]
    fn a_read_that_waits_holds_nothing_up_and_writes_are_refused() {
        let (_dir, disk, server) = start(1 << 20);
        let mut s = raw(&server);
        s.write_all(&request(CMD_READ, 1, 1 << 19, 1 << 20)).unwrap();
        s.write_all(&request(CMD_READ, 2, 0, 10)).unwrap();
        assert_eq!(answer(&mut s), (2, 0));
        let _: [u8; 10] = array(&mut s).unwrap();
        s.write_all(&request(CMD_WRITE, 3, 0, 1000)).unwrap();
        s.write_all(&[7; 1000]).unwrap();
        s.write_all(&request(CMD_TRIM, 4, 0, 512)).unwrap();
        s.write_all(&request(CMD_FLUSH, 5, 0, 0)).unwrap();
        s.write_all(&request(77, 6, 0, 0)).unwrap();
        for wanted in [(3, EPERM), (4, EPERM), (5, 0), (6, EINVAL)] {
            assert_eq!(answer(&mut s), wanted);
        }
        *disk.dry.lock().unwrap() = true;
        disk.changed.notify_all();
        assert_eq!(answer(&mut s), (1, 0));
    }

    #[test]
    fn a_client_that_goes_takes_its_workers_along() {
        let (_dir, _disk, server) = start(0);
        for _ in 0..3 {
            let mut s = raw(&server);
            for n in 0..200 {
                s.write_all(&request(CMD_READ, n, 0, MAX_READ.min(4 << 20))).unwrap();
            }
            std::thread::sleep(Duration::from_millis(30));
            let workers: usize =
                crate::lock(&server.shared.clients).values().map(|c| crate::lock(&c.queue).workers).sum();
            assert!(workers <= WORKERS, "{workers}");
            drop(s);
            let deadline = Instant::now() + Duration::from_secs(5);
            while !crate::lock(&server.shared.clients).is_empty() {
                assert!(Instant::now() < deadline);
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }

    #[test]
    fn too_many_clients_are_refused() {
        let (_dir, _disk, server) = start(0);
        let _held: Vec<_> = (0..MAX_CLIENTS).map(|_| raw(&server)).collect();
        let mut s = UnixStream::connect(server.path()).unwrap();
        assert!(u64_of(&mut s).is_err());
    }

    proptest! {
        #[test]
        fn random_bytes_are_refused(bytes in prop::collection::vec(any::<u8>(), 0..300), good in 0usize..4) {
            let mut input = vec![];
            if good > 0 {
                input.extend(3u32.to_be_bytes());
            }
            if good > 1 {
                input.extend(IHAVEOPT.to_be_bytes());
                input.extend([0, 0, 0, [1, 3, 6, 7][bytes.len() % 4]]);
            }
            if good > 2 {
                input.extend((bytes.len() as u32).to_be_bytes());
            }
            input.extend(bytes);
            let mut out = Vec::new();
            let _ = negotiate(&mut &input[..], &mut out, 1 << 20);
            prop_assert!(out.len() < 10_000);
            let _ = is_info(&input);
        }
    }

    #[test]
    fn hostile_requests_end_their_connection_only() {
        let (_dir, _disk, server) = start(u64::MAX);
        let mut seed = 12345u64;
        for round in 0..40u64 {
            let mut s = raw(&server);
            let noise: Vec<u8> = (0..200)
                .map(|_| {
                    seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                    (seed >> 40) as u8
                })
                .collect();
            if round % 2 == 0 {
                let _ = s.write_all(&request(CMD_WRITE, 1, 0, u32::MAX));
            }
            let _ = s.write_all(&noise);
            let _ = s.shutdown(Shutdown::Write);
            let _ = io::copy(&mut s, &mut io::sink());
        }
        client(&server).read(3, &mut [0; 99]).unwrap();
    }
}
