//! The main loop: reads frames and answers the short questions itself, so that the first answer of a clone needs one
//! thread only; commands and files have threads of their own.

use crate::control::{Control, Ticket};
use crate::freezer::Freezer;
use crate::paths::Paths;
use crate::port::{Port, Source};
use crate::stream::{NotOpened, Stream, Streams};
use crate::subscribers::Subscribers;
use crate::threads::helper;
use crate::{child, exec, file, identity};
use ramet_guest::protocol::{Decoder, Frame, Freeze, HelloAck, Identity, Release, kind};
use rustix::time::{ClockId, clock_gettime};
use std::io;
use std::process::{Command, ExitCode, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// Most requests that have a thread of their own and no stream, such as a freeze.
const MOST_WORK: usize = 8;

/// Serves the host until the end of a finite channel.
pub(crate) fn run(paths: Paths, source: &Source) -> ExitCode {
    let (freezer, exec_group) = Freezer::set_up(&paths);
    child::set_up(exec_group);
    let subscribers = Arc::<Subscribers>::default();
    if let Err(error) = subscribers.listen(&paths) {
        eprintln!("ramet-agent: no program can subscribe ({}): {error}", paths.socket().display());
    }
    let control = Arc::new(Control::new(paths, freezer, subscribers));
    loop {
        let port = Arc::new(source.open());
        let (hello, control) = (hello(), Arc::clone(&control));
        let agent =
            Agent { hello, control, streams: Arc::default(), port, session: None, due: None, work: Arc::default() };
        match agent.serve() {
            Ok(()) => return ExitCode::SUCCESS,
            Err(error) => {
                eprintln!("ramet-agent: the channel to the host failed, opening it again: {error}");
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

/// The handshake, made once but for the generation.
fn hello() -> HelloAck {
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    HelloAck {
        agent: env!("CARGO_PKG_VERSION").into(),
        guest: "linux".into(),
        boot_id: boot_id.trim_end().into(),
        generation: None,
    }
}

#[derive(Debug)]
struct Agent {
    hello: HelloAck,
    control: Arc<Control>,
    port: Arc<Port>,
    streams: Arc<Streams>,
    session: Option<u64>,
    /// A `HELLO` that is still to be answered: the host repeats them, one answer does.
    due: Option<u64>,
    /// How many requests work in threads of their own.
    work: Arc<AtomicUsize>,
}

impl Agent {
    fn serve(mut self) -> io::Result<()> {
        let result = self.read_frames();
        self.streams.detach_all();
        result
    }

    fn read_frames(&mut self) -> io::Result<()> {
        let port = Arc::clone(&self.port);
        let mut decoder = Decoder::new();
        let mut buffer = [0; 4096];
        loop {
            match port.read(&mut buffer) {
                Ok(0) if !port.is_endless() => return Ok(()),
                Ok(0) => {
                    decoder.reset();
                    port.wait_for_host()?;
                }
                Ok(length) => {
                    let mut result = Ok(());
                    decoder.push(&buffer[..length], |frame| {
                        if result.is_ok() {
                            result = self.take(frame);
                        }
                    });
                    result.and_then(|()| self.answer_hello())?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn answer_hello(&mut self) -> io::Result<()> {
        let Some(session) = self.due.take() else { return Ok(()) };
        self.hello.generation = self.control.who().map(|id| id.generation);
        let mut answer = session.to_le_bytes().to_vec();
        serde_json::to_writer(&mut answer, &self.hello).map_err(io::Error::other)?;
        self.port.send(kind::HELLO_ACK, 0, &answer)
    }

    /// Takes one frame. Errors are those of the channel; what is wrong with a frame is told to the host.
    fn take(&mut self, frame: Frame<'_>) -> io::Result<()> {
        if frame.kind == kind::HELLO {
            if let Some((session, _)) = frame.split_u64() {
                if self.session != Some(session) {
                    self.streams.detach_all();
                    self.session = Some(session);
                }
                self.due = Some(session);
            }
            return Ok(());
        }
        self.answer_hello()?;
        match frame.kind {
            kind::PING => self.port.send(kind::PONG, frame.stream, frame.payload),
            kind::TIME => {
                let mut answer = [0; 16];
                answer[..8].copy_from_slice(&nanoseconds(ClockId::Realtime).to_le_bytes());
                answer[8..].copy_from_slice(&nanoseconds(ClockId::Monotonic).to_le_bytes());
                self.port.send(kind::TIME_ACK, frame.stream, &answer)
            }
            kind::IDENTITY => self.take_identity(frame),
            kind::FREEZE => match serde_json::from_slice::<Freeze>(frame.payload) {
                Ok(request) => self.work(frame, kind::FREEZE_ACK, request.limit_ms, move |control, ticket| {
                    control.freeze(&request, ticket)
                }),
                Err(error) => self.refuse(frame.stream, &format!("cannot understand the request: {error}")),
            },
            kind::THAW => {
                self.control.call_off();
                self.work(frame, kind::THAW_ACK, 0, |control, _| control.thaw())
            }
            kind::RELEASE => match serde_json::from_slice::<Release>(frame.payload) {
                Ok(request) => {
                    self.control.call_off();
                    self.work(frame, kind::RELEASE_ACK, request.limit_ms, move |control, ticket| {
                        control.release(&request, ticket)
                    })
                }
                Err(error) => self.refuse(frame.stream, &format!("cannot understand the request: {error}")),
            },
            kind::EXEC => self.open(frame, exec::run),
            kind::FILE_PUT => self.open(frame, file::put),
            kind::FILE_GET => self.open(frame, file::get),
            kind::SHUTDOWN => {
                self.control.thaw_to_end();
                match power_off() {
                    Ok(()) => self.port.send(kind::EXIT, frame.stream, &0i32.to_le_bytes()),
                    Err(error) => self.refuse(frame.stream, &format!("cannot power off: {error}")),
                }
            }
            kind::DATA | kind::EOF | kind::SIGNAL | kind::CREDIT | kind::RESIZE => self.feed(frame),
            other if other < 0x80 => self.refuse(
                frame.stream,
                &format!("this agent does not know frames of kind {other:#04x}; rebuild the guest image"),
            ),
            _ => Ok(()),
        }
    }

    /// New keys take long; all else is done at once, so that a clone needs one thread only.
    fn take_identity(&self, frame: Frame<'_>) -> io::Result<()> {
        match serde_json::from_slice::<Identity>(frame.payload) {
            Ok(identity) if identity.ssh_host_keys => {
                self.work(frame, kind::IDENTITY_ACK, 0, move |control, _| identity::take(control, &identity))
            }
            Ok(identity) => {
                answer(&self.port, kind::IDENTITY_ACK, frame.stream, &identity::take(&self.control, &identity))
            }
            Err(error) => answer(&self.port, kind::IDENTITY_ACK, frame.stream, &identity::not_understood(&error)),
        }
    }

    /// Does one request in a thread of its own, and answers when it is done.
    fn work<A: serde::Serialize>(
        &self,
        frame: Frame<'_>,
        answer_kind: u8,
        limit_ms: u64,
        work: impl FnOnce(&Arc<Control>, Ticket) -> A + Send + 'static,
    ) -> io::Result<()> {
        // What lets a machine run again finds its place also when all others are taken.
        let most = if matches!(frame.kind, kind::THAW | kind::RELEASE) { 2 * MOST_WORK } else { MOST_WORK };
        if self.work.fetch_add(1, Ordering::AcqRel) >= most {
            self.work.fetch_sub(1, Ordering::AcqRel);
            return self.refuse(frame.stream, "too many requests at a time; wait for some to end");
        }
        let ticket = self.control.ticket(limit_ms);
        let (control, port, under_way) = (Arc::clone(&self.control), Arc::clone(&self.port), Arc::clone(&self.work));
        let stream = frame.stream;
        let started = helper(move || {
            let ack = work(&control, ticket);
            under_way.fetch_sub(1, Ordering::AcqRel);
            if let Err(error) = answer(&port, answer_kind, stream, &ack) {
                eprintln!("ramet-agent: an answer was lost: {error}");
            }
        });
        if let Err(error) = started {
            self.work.fetch_sub(1, Ordering::AcqRel);
            return self.refuse(frame.stream, &format!("cannot start a thread: {error}"));
        }
        Ok(())
    }

    /// A frame for an open stream; for any other it comes late and says nothing.
    fn feed(&self, frame: Frame<'_>) -> io::Result<()> {
        let Some(stream) = self.streams.get(frame.stream) else { return Ok(()) };
        match (frame.kind, frame.payload) {
            (kind::DATA, bytes) => {
                let pushed = stream.push(bytes);
                if pushed.is_err() {
                    self.streams.close(&stream);
                    stream.detach();
                    return self.refuse(frame.stream, "the host sent more than the stream's credit");
                }
            }
            (kind::EOF, _) => stream.end_input(),
            (kind::SIGNAL, &[number]) => stream.signal(number),
            (kind::RESIZE, &[r0, r1, c0, c1]) => {
                stream.resize(u16::from_le_bytes([r0, r1]), u16::from_le_bytes([c0, c1]));
            }
            (kind::CREDIT, _) => stream.grant(frame.as_u32().unwrap_or(0)),
            _ => {}
        }
        Ok(())
    }

    /// Opens a stream and gives it a thread.
    fn open<R>(&self, frame: Frame<'_>, work: fn(&Arc<Stream>, R, &dyn Fn())) -> io::Result<()>
    where
        R: serde::de::DeserializeOwned + Send + 'static,
    {
        let request = match serde_json::from_slice::<R>(frame.payload) {
            Ok(request) => request,
            Err(error) => return self.refuse(frame.stream, &format!("cannot understand the request: {error}")),
        };
        let stream = match self.streams.open(frame.stream, &self.port) {
            Ok(stream) => stream,
            Err(NotOpened::Taken) => return self.refuse(frame.stream, "this stream number is in use"),
            Err(NotOpened::TooMany) => {
                return self.refuse(frame.stream, "too many commands and files at a time; wait for some to end");
            }
        };
        let streams = Arc::clone(&self.streams);
        let of_thread = Arc::clone(&stream);
        let started = helper(move || {
            // The stream is closed before its end is told, so that the host may use the number again.
            work(&of_thread, request, &|| streams.close(&of_thread));
            streams.close(&of_thread);
        });
        if let Err(error) = started {
            self.streams.close(&stream);
            return self.refuse(frame.stream, &format!("cannot start a thread: {error}"));
        }
        Ok(())
    }

    fn refuse(&self, stream: u32, why: &str) -> io::Result<()> {
        self.port.send(kind::ERROR, stream, why.as_bytes())
    }
}

fn answer(port: &Port, kind: u8, stream: u32, ack: &impl serde::Serialize) -> io::Result<()> {
    port.send(kind, stream, &serde_json::to_vec(ack).map_err(io::Error::other)?)
}

fn nanoseconds(clock: ClockId) -> u64 {
    let time = clock_gettime(clock);
    u64::try_from(time.tv_sec).unwrap_or(0).saturating_mul(1_000_000_000) + u64::try_from(time.tv_nsec).unwrap_or(0)
}

/// Asks the init process for a power-off in good order; where there is no such command, does it at once.
fn power_off() -> io::Result<()> {
    let asked = Command::new("poweroff").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    match asked {
        Ok(status) if status.success() => Ok(()),
        _ => {
            rustix::fs::sync();
            Ok(rustix::system::reboot(rustix::system::RebootCommand::PowerOff)?)
        }
    }
}
