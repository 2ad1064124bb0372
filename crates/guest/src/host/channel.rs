//! The channel's two tasks, and the table of streams that they feed.

use super::AgentError;
use crate::protocol::{self, Decoder, Frame, INITIAL_CREDIT, MAX_CREDIT, kind};
use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::sync::{Semaphore, mpsc, oneshot, watch};

/// A frame from the guest for one stream.
pub(super) type Event = Result<(u8, Vec<u8>), AgentError>;

/// Bytes that the guest has sent and that were not granted again yet.
pub(super) type Outstanding = Arc<AtomicU32>;

/// What becomes of the frames of a stream.
#[derive(Debug)]
pub(super) enum Sink {
    /// One frame is awaited.
    Answer(oneshot::Sender<Event>),
    /// Frames until the end of the stream. Bounded by the credit that the guest has.
    Events(mpsc::UnboundedSender<Event>, Outstanding, Arc<Semaphore>),
    /// No one listens any more: the command runs on, its output is granted and dropped.
    Drain,
}

impl Sink {
    fn fail(self, error: &AgentError) {
        // A receiver that has gone does not want to know.
        match self {
            Self::Answer(to) => drop(to.send(Err(error.clone()))),
            Self::Events(to, _, credit) => {
                drop(to.send(Err(error.clone())));
                credit.close();
            }
            Self::Drain => {}
        }
    }
}

#[derive(Debug)]
struct Table {
    sinks: HashMap<u32, Sink>,
    /// Once set, no stream can be opened any more.
    failed: Option<AgentError>,
}

/// What the client, its sessions and the two tasks share.
#[derive(Debug)]
pub(super) struct Channel {
    table: Mutex<Table>,
    next: AtomicU32,
    /// Unbounded, but what is put in is bounded by credit and by the number of requests: if this could block, the
    /// reader could wait for the writer, the writer for the guest, and the guest for the reader.
    out: mpsc::UnboundedSender<Vec<u8>>,
    closed: watch::Sender<bool>,
}

impl Channel {
    /// Starts the tasks. `first` are bytes that were read already, `session` seeds the numbers of the streams, so that
    /// late frames of an older session hit none of ours.
    pub(super) fn start(socket: UnixStream, decoder: Decoder, session: u64) -> Arc<Self> {
        let (out, queue) = mpsc::unbounded_channel();
        let channel = Arc::new(Self {
            table: Mutex::new(Table { sinks: HashMap::new(), failed: None }),
            next: AtomicU32::new((session >> 16) as u32),
            out,
            closed: watch::Sender::new(false),
        });
        let (from, to) = socket.into_split();
        tokio::spawn(write_all(Arc::downgrade(&channel), to, queue, channel.closed.subscribe()));
        tokio::spawn(read_all(Arc::downgrade(&channel), from, decoder, channel.closed.subscribe()));
        channel
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Opens a stream for `sink` and sends its first frame.
    pub(super) fn open(&self, kind: u8, payload: &[u8], sink: Sink) -> Result<u32, AgentError> {
        let mut table = self.lock();
        if let Some(error) = &table.failed {
            return Err(error.clone());
        }
        let stream = loop {
            let stream = self.next.fetch_add(1, Ordering::Relaxed);
            if stream != 0 && !table.sinks.contains_key(&stream) {
                break stream;
            }
        };
        let frame = protocol::encoded(kind, stream, payload)?;
        table.sinks.insert(stream, sink);
        drop(table);
        self.send_bytes(frame)?;
        Ok(stream)
    }

    /// Sends a frame of an open stream.
    pub(super) fn send(&self, kind: u8, stream: u32, payload: &[u8]) -> Result<(), AgentError> {
        self.send_bytes(protocol::encoded(kind, stream, payload)?)
    }

    fn send_bytes(&self, frame: Vec<u8>) -> Result<(), AgentError> {
        self.out.send(frame).map_err(|_| self.why_closed())
    }

    pub(super) fn why_closed(&self) -> AgentError {
        self.lock().failed.clone().unwrap_or_else(|| AgentError::disconnected("the client was closed"))
    }

    /// Forgets a stream whose answer no one awaits any more.
    pub(super) fn forget(&self, stream: u32) {
        self.lock().sinks.remove(&stream);
    }

    /// Lets a stream run on without a listener.
    pub(super) fn drain(&self, stream: u32, outstanding: &Outstanding) {
        let mut table = self.lock();
        if let Some(sink) = table.sinks.get_mut(&stream) {
            *sink = Sink::Drain;
            drop(table);
            let granted = outstanding.swap(0, Ordering::AcqRel);
            if granted > 0 {
                // If the channel has closed there is nothing left to drain.
                drop(self.send(kind::CREDIT, stream, &granted.to_le_bytes()));
            }
        }
    }

    /// The channel cannot be used any more: tells all who wait.
    pub(super) fn fail(&self, error: AgentError) {
        let mut table = self.lock();
        let error = table.failed.get_or_insert(error).clone();
        let sinks = std::mem::take(&mut table.sinks);
        drop(table);
        for sink in sinks.into_values() {
            sink.fail(&error);
        }
        self.closed.send_replace(true);
    }

    /// Whether the channel has failed or was closed.
    pub(super) fn is_closed(&self) -> bool {
        *self.closed.borrow()
    }

    /// Waits until the channel has failed or was closed.
    pub(super) async fn wait_closed(&self) {
        // The sender lives in `self`, so this cannot fail.
        drop(self.closed.subscribe().wait_for(|closed| *closed).await);
    }

    fn dispatch(&self, frame: Frame<'_>) {
        let mut table = self.lock();
        let Some(sink) = table.sinks.get_mut(&frame.stream) else { return };
        let stream = frame.stream;
        let length = u32::try_from(frame.payload.len()).unwrap_or(u32::MAX);
        let is_output = matches!(frame.kind, kind::STDOUT | kind::STDERR);
        let is_end = matches!(frame.kind, kind::EXIT | kind::ERROR);
        let mut broken = None;
        match sink {
            Sink::Answer(_) => {
                if let Some(Sink::Answer(to)) = table.sinks.remove(&stream) {
                    drop(to.send(event(frame)));
                }
                return;
            }
            Sink::Events(_, _, credit) if frame.kind == kind::GUEST_CREDIT => {
                let grant = frame.as_u32().unwrap_or(0) as usize;
                if credit.available_permits().saturating_add(grant) > MAX_CREDIT as usize {
                    broken = Some("it granted more credit than there may be");
                } else {
                    credit.add_permits(grant);
                }
            }
            Sink::Events(to, outstanding, _) => {
                let before = if is_output { outstanding.fetch_add(length, Ordering::AcqRel) } else { 0 };
                if before.saturating_add(length) > INITIAL_CREDIT && is_output {
                    broken = Some("it sent more than it had credit for");
                } else {
                    drop(to.send(event(frame)));
                }
            }
            Sink::Drain if is_output => {
                drop(table);
                drop(self.send(kind::CREDIT, stream, &length.to_le_bytes()));
                return;
            }
            Sink::Drain => {}
        }
        if is_end || broken.is_some() {
            let sink = table.sinks.remove(&stream);
            drop(table);
            match (sink, broken) {
                (Some(sink), Some(what)) => {
                    sink.fail(&AgentError::protocol(what));
                    drop(self.send(kind::SIGNAL, stream, &[9]));
                }
                (Some(Sink::Events(_, _, credit)), None) => credit.close(),
                _ => {}
            }
        }
    }
}

fn event(frame: Frame<'_>) -> Event {
    if frame.kind == kind::ERROR {
        let message: String = String::from_utf8_lossy(frame.payload).chars().filter(|c| !c.is_control()).collect();
        return Err(AgentError::Guest { message });
    }
    Ok((frame.kind, frame.payload.to_vec()))
}

async fn write_all(
    channel: std::sync::Weak<Channel>,
    mut socket: OwnedWriteHalf,
    mut queue: mpsc::UnboundedReceiver<Vec<u8>>,
    mut closed: watch::Receiver<bool>,
) {
    use tokio::io::AsyncWriteExt;
    let write = async {
        while let Some(frame) = queue.recv().await {
            if let Err(error) = socket.write_all(&frame).await {
                return Some(error);
            }
        }
        None
    };
    tokio::select! {
        biased;
        failed = write => if let (Some(error), Some(channel)) = (failed, channel.upgrade()) {
            channel.fail(AgentError::disconnected(error));
        },
        // Closed: the socket must go now, since QEMU serves one at a time. (When all handles are gone there may still
        // be frames to write: that ends by itself.)
        () = async {
            if closed.wait_for(|closed| *closed).await.is_err() {
                std::future::pending::<()>().await;
            }
        } => {},
    }
}

async fn read_all(
    channel: std::sync::Weak<Channel>,
    socket: OwnedReadHalf,
    mut decoder: Decoder,
    mut closed: watch::Receiver<bool>,
) {
    let mut buffer = vec![0; 32 * 1024];
    loop {
        tokio::select! {
            // All handles are gone, or the client was closed.
            _ = closed.wait_for(|closed| *closed) => return,
            ready = socket.readable() => if let Err(error) = ready {
                if let Some(channel) = channel.upgrade() {
                    channel.fail(AgentError::disconnected(error));
                }
                return;
            },
        }
        let Some(channel) = channel.upgrade() else { return };
        match socket.try_read(&mut buffer) {
            Ok(0) => return channel.fail(AgentError::disconnected("the other side ended it")),
            Ok(length) => decoder.push(&buffer[..length], |frame| channel.dispatch(frame)),
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => return channel.fail(AgentError::disconnected(error)),
        }
    }
}
