//! Programs in the guest that want to know when they have become part of a clone. They say so on a Unix socket, one
//! JSON line ([`Subscription`]); one line ([`SubscriptionAck`]) answers.
//!
//! A real-time signal ends a process that does not expect it: so only those who asked get one, and a process is held by
//! its pidfd, which no other process can come to have. The connection of a subscriber of signals may be closed after
//! the answer; the subscription ends with the process.

use crate::paths::Paths;
use crate::threads::helper;
use ramet_guest::protocol::{CloneEvent, Subscription, SubscriptionAck};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Most subscribers, of both kinds together; also most open connections.
const MOST: usize = 1024;
/// How long a program waits for the agent to be there.
const BOOT: Duration = Duration::from_secs(30);
/// Most bytes of a line.
const LINE: usize = 1024;

#[derive(Debug, Default)]
struct Table {
    signals: Vec<(Pid, OwnedFd)>,
    events: Vec<Arc<UnixStream>>,
}

/// All subscribers.
#[derive(Debug, Default)]
pub(crate) struct Subscribers(Mutex<Table>);

impl Subscribers {
    fn lock(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Listens on the socket, in a thread of its own.
    pub(crate) fn listen(self: &Arc<Self>, paths: &Paths) -> io::Result<()> {
        let path = paths.socket();
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir)?;
        }
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(&path)?;
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666))?;
        listener.set_nonblocking(true)?;
        let this = Arc::clone(self);
        helper(move || this.serve(&listener)).map(drop)
    }

    fn serve(&self, listener: &UnixListener) {
        let mut connections: Vec<Connection> = Vec::new();
        loop {
            let mut polled: Vec<PollFd<'_>> =
                connections.iter().map(|c| PollFd::new(&*c.stream, PollFlags::IN)).collect();
            if connections.len() < MOST {
                polled.push(PollFd::new(listener, PollFlags::IN));
            }
            match poll(&mut polled, None) {
                Err(Errno::INTR) => continue,
                Err(error) => return eprintln!("ramet-agent: no subscribers any more: {error}"),
                Ok(_) => {}
            }
            let ready: Vec<bool> = polled.iter().map(|fd| !fd.revents().is_empty()).collect();
            drop(polled);
            let count = connections.len();
            for at in (0..count).rev() {
                if ready[at] && !connections[at].advance(self) {
                    self.forget(&connections.swap_remove(at).stream);
                }
            }
            if ready.get(count) == Some(&true) {
                match listener.accept() {
                    Ok((stream, _)) if stream.set_nonblocking(true).is_ok() => {
                        connections.push(Connection { stream: Arc::new(stream), line: Vec::new() });
                    }
                    // No descriptor is left, or the other side has gone.
                    _ => std::thread::sleep(Duration::from_millis(20)),
                }
            }
        }
    }

    fn forget(&self, stream: &Arc<UnixStream>) {
        self.lock().events.retain(|known| !Arc::ptr_eq(known, stream));
    }

    fn take(&self, stream: &Arc<UnixStream>, line: &[u8]) -> io::Result<()> {
        let wanted: Subscription = serde_json::from_slice(line)?;
        let pid = rustix::net::sockopt::socket_peercred(&**stream)?.pid;
        let mut table = self.lock();
        if wanted.unsubscribe {
            table.signals.retain(|(known, _)| *known != pid);
            table.events.retain(|known| !Arc::ptr_eq(known, stream));
            return Ok(());
        }
        table.signals.retain(|(_, process)| !has_ended(process));
        if table.signals.len() + table.events.len() >= MOST {
            return Err(io::Error::other("there are too many subscribers"));
        }
        match wanted.subscribe.as_deref() {
            Some("signal") => {
                let process = pidfd_open(pid, PidfdFlags::empty())?;
                // Whoever is still connected is still there, so the number is his and no one else's.
                if has_hung_up(stream) {
                    return Err(io::ErrorKind::BrokenPipe.into());
                }
                table.signals.retain(|(known, _)| *known != pid);
                table.signals.push((pid, process));
            }
            Some("events") => {
                if !table.events.iter().any(|known| Arc::ptr_eq(known, stream)) {
                    table.events.push(Arc::clone(stream));
                }
            }
            _ => return Err(io::Error::other("one can subscribe to `signal` or `events`")),
        }
        Ok(())
    }

    /// Tells all, and gives their number.
    pub(crate) fn tell(&self, number: u32, generation: u32) -> u32 {
        let event = CloneEvent { event: "clone".to_owned(), number, generation };
        let mut line = serde_json::to_vec(&event).unwrap_or_default();
        line.push(b'\n');
        let mut told = 0;
        let mut table = self.lock();
        table.signals.retain(|(_, process)| match signal::send(process, number) {
            Ok(()) => {
                told += 1;
                true
            }
            Err(Errno::SRCH) => false,
            Err(error) => {
                eprintln!("ramet-agent: a subscriber could not be signalled: {error}");
                true
            }
        });
        // Whoever does not read is cut off.
        table.events.retain(|stream| match (&**stream).write(&line) {
            Ok(length) if length == line.len() => {
                told += 1;
                true
            }
            _ => {
                drop(stream.shutdown(std::net::Shutdown::Both));
                false
            }
        });
        told
    }
}

/// Someone who is connected.
#[derive(Debug)]
struct Connection {
    stream: Arc<UnixStream>,
    line: Vec<u8>,
}

impl Connection {
    /// Reads and answers. False when it has ended.
    fn advance(&mut self, subscribers: &Subscribers) -> bool {
        let mut buffer = [0; 512];
        let length = match (&*self.stream).read(&mut buffer) {
            Ok(0) => return false,
            Ok(length) => length,
            Err(error) => return matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted),
        };
        self.line.extend_from_slice(&buffer[..length]);
        while let Some(end) = self.line.iter().position(|&b| b == b'\n') {
            let line: Vec<u8> = self.line.drain(..=end).collect();
            let error = subscribers.take(&self.stream, &line).err().map(|error| error.to_string());
            let mut answer = serde_json::to_vec(&SubscriptionAck { ok: error.is_none(), error }).unwrap_or_default();
            answer.push(b'\n');
            if (&*self.stream).write(&answer).ok() != Some(answer.len()) {
                return false;
            }
        }
        self.line.len() <= LINE
    }
}

fn has_ended(process: &OwnedFd) -> bool {
    poll(&mut [PollFd::new(process, PollFlags::IN)], Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

fn has_hung_up(stream: &UnixStream) -> bool {
    let mut polled = [PollFd::new(stream, PollFlags::empty())];
    poll(&mut polled, Some(&Timespec::default())).is_ok() && polled[0].revents().contains(PollFlags::HUP)
}

fn subscribe(paths: &Paths, to: &str) -> io::Result<BufReader<UnixStream>> {
    let begun = Instant::now();
    // Programs of the boot may be sooner than the agent.
    let mut stream = loop {
        match UnixStream::connect(paths.socket()) {
            Err(error)
                if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
                    && begun.elapsed() < BOOT =>
            {
                std::thread::sleep(Duration::from_millis(50));
            }
            other => break other?,
        }
    };
    let wanted = Subscription { subscribe: Some(to.to_owned()), unsubscribe: false };
    let mut line = serde_json::to_vec(&wanted)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let mut reader = BufReader::with_capacity(LINE, stream);
    let mut answer = String::new();
    reader.read_line(&mut answer)?;
    let answer: SubscriptionAck = serde_json::from_slice(answer.as_bytes())?;
    if answer.ok { Ok(reader) } else { Err(io::Error::other(answer.error.unwrap_or_default())) }
}

/// `ramet-agent subscribe -- COMMAND`.
pub(crate) fn subscribe_and_run(paths: &Paths, argv: &[&str]) -> ExitCode {
    let [program, args @ ..] = argv else { return ExitCode::from(2) };
    // The process stays the same when it becomes the command.
    if let Err(error) = subscribe(paths, "signal").map(drop) {
        eprintln!("ramet-agent: cannot subscribe ({}): {error}", paths.socket().display());
        return ExitCode::FAILURE;
    }
    let error = Command::new(program).args(args).exec();
    eprintln!("ramet-agent: cannot run {program:?}: {error}");
    ExitCode::from(127)
}

/// `ramet-agent wait-clone`.
pub(crate) fn wait_clone(paths: &Paths) -> ExitCode {
    let mut line = String::new();
    let read = subscribe(paths, "events").and_then(|mut reader| reader.read_line(&mut line));
    match read {
        Ok(length) if length > 0 => {
            print!("{line}");
            ExitCode::SUCCESS
        }
        other => {
            let why = other.err().map_or_else(|| "the agent has gone".to_owned(), |error| error.to_string());
            eprintln!("ramet-agent: cannot wait ({}): {why}", paths.socket().display());
            ExitCode::FAILURE
        }
    }
}

/// A signal with a value, which no safe library sends through a pidfd.
#[allow(unsafe_code, reason = "pidfd_send_signal with a siginfo")]
mod signal {
    use ramet_guest::protocol::SIGCLONE;
    use rustix::io::Errno;
    use std::os::fd::{AsRawFd, OwnedFd};

    /// `siginfo_t` of a queued signal, as the kernel has it on machines of 64 bits.
    #[repr(C)]
    struct Queued {
        number: i32,
        errno: i32,
        code: i32,
        pad: i32,
        pid: i32,
        uid: u32,
        /// `union sigval`: its `int` is the lower half.
        value: u64,
        rest: [u64; 12],
    }

    const _: () = assert!(size_of::<Queued>() == 128 && cfg!(target_endian = "little"));

    /// Queues [`SIGCLONE`] with a value.
    pub(super) fn send(process: &OwnedFd, value: u32) -> Result<(), Errno> {
        let info = Queued {
            number: SIGCLONE,
            errno: 0,
            code: libc::SI_QUEUE,
            pad: 0,
            pid: rustix::process::getpid().as_raw_nonzero().get(),
            uid: rustix::process::getuid().as_raw(),
            value: u64::from(value),
            rest: [0; 12],
        };
        // SAFETY: the call reads 128 bytes at `info`, which is exactly as long, and writes none of our memory.
        let result =
            unsafe { libc::syscall(libc::SYS_pidfd_send_signal, process.as_raw_fd(), SIGCLONE, &raw const info, 0) };
        if result == 0 {
            return Ok(());
        }
        Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO))
    }
}
