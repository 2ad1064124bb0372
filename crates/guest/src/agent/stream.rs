//! Streams: what the host sends waits in a bounded queue for the thread that takes it; what goes to the host goes
//! against credit. A stream of an older session is *detached*: its process runs on, its output is read and dropped,
//! its input ends.

use crate::port::Port;
use ramet_guest::protocol::{INITIAL_CREDIT, MAX_CREDIT, kind};
use rustix::process::{Pid, Signal};
use std::collections::{HashMap, VecDeque};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

#[derive(Debug, Default)]
struct State {
    input: VecDeque<Vec<u8>>,
    /// Bytes that the host may still send.
    room: u32,
    input_ended: bool,
    /// Bytes that we may still send.
    credit: u32,
    detached: bool,
    process: Process,
}

/// The process of a command, as far as signals go.
#[derive(Debug, Default)]
enum Process {
    /// Not started yet: signals wait.
    #[default]
    Coming,
    ComingWith(u8),
    Running(Pid),
    Gone,
}

/// One stream, shared by the threads that serve it.
#[derive(Debug)]
pub(crate) struct Stream {
    /// Its number, given by the host.
    pub(crate) id: u32,
    port: Arc<Port>,
    state: Mutex<State>,
    changed: Condvar,
    terminal: Mutex<Option<OwnedFd>>,
}

/// The host sent more than it had credit for.
#[derive(Debug)]
pub(crate) struct Overrun;

impl Stream {
    fn new(id: u32, port: Arc<Port>) -> Self {
        let state = State { room: INITIAL_CREDIT, credit: INITIAL_CREDIT, ..State::default() };
        Self { id, port, state: Mutex::new(state), changed: Condvar::new(), terminal: Mutex::new(None) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes bytes from the host.
    pub(crate) fn push(&self, bytes: &[u8]) -> Result<(), Overrun> {
        let mut state = self.lock();
        let length = u32::try_from(bytes.len()).map_err(|_| Overrun)?;
        state.room = state.room.checked_sub(length).ok_or(Overrun)?;
        if !state.input_ended && !bytes.is_empty() {
            state.input.push_back(bytes.to_vec());
            self.changed.notify_all();
        }
        Ok(())
    }

    /// No more bytes from the host.
    pub(crate) fn end_input(&self) {
        self.lock().input_ended = true;
        self.changed.notify_all();
    }

    /// Waits for bytes from the host; `None` at their end. Call [`Stream::took`] when they are used.
    pub(crate) fn next_input(&self) -> Option<Vec<u8>> {
        let mut state = self.lock();
        loop {
            if let Some(bytes) = state.input.pop_front() {
                return Some(bytes);
            }
            if state.input_ended {
                return None;
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Lets the host send that many more bytes.
    pub(crate) fn took(&self, bytes: usize) {
        let grant = u32::try_from(bytes).unwrap_or(0);
        self.lock().room += grant;
        self.send(kind::GUEST_CREDIT, &grant.to_le_bytes());
    }

    /// The host has room for more.
    pub(crate) fn grant(&self, bytes: u32) {
        let mut state = self.lock();
        state.credit = state.credit.saturating_add(bytes).min(MAX_CREDIT);
        self.changed.notify_all();
    }

    /// Waits until something may be sent, and takes up to `most` bytes of credit. `None` when detached: then read and
    /// drop.
    pub(crate) fn take_credit(&self, most: usize) -> Option<usize> {
        let mut state = self.lock();
        loop {
            if state.detached {
                return None;
            }
            if state.credit > 0 {
                let taken = state.credit.min(u32::try_from(most).unwrap_or(u32::MAX));
                state.credit -= taken;
                return Some(taken as usize);
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Gives back credit that was taken and not used.
    pub(crate) fn return_credit(&self, bytes: usize) {
        self.grant(u32::try_from(bytes).unwrap_or(0));
    }

    /// Sends a frame of this stream, unless it is detached.
    pub(crate) fn send(&self, kind: u8, payload: &[u8]) {
        if !self.is_detached() && self.port.send(kind, self.id, payload).is_err() {
            self.detach();
        }
    }

    /// Whether the host has forgotten this stream.
    pub(crate) fn is_detached(&self) -> bool {
        self.lock().detached
    }

    /// The host has forgotten this stream.
    pub(crate) fn detach(&self) {
        let mut state = self.lock();
        state.detached = true;
        state.input_ended = true;
        drop(state);
        self.changed.notify_all();
    }

    /// Signals the process group of the command, or remembers to.
    pub(crate) fn signal(&self, number: u8) {
        let mut state = self.lock();
        match state.process {
            Process::Coming | Process::ComingWith(_) => state.process = Process::ComingWith(number),
            Process::Running(pid) => signal_group(pid, number),
            Process::Gone => {}
        }
    }

    /// The process runs now (its own group), or (`None`) is about to be reaped: its number may not be used any more.
    pub(crate) fn set_process(&self, pid: Option<Pid>) {
        let mut state = self.lock();
        let waiting = if let Process::ComingWith(number) = state.process { Some(number) } else { None };
        state.process = pid.map_or(Process::Gone, Process::Running);
        if let (Some(pid), Some(number)) = (pid, waiting) {
            signal_group(pid, number);
        }
    }

    /// Sets the terminal that [`Stream::resize`] is about.
    pub(crate) fn set_terminal(&self, terminal: Option<OwnedFd>) {
        *self.terminal.lock().unwrap_or_else(PoisonError::into_inner) = terminal;
    }

    /// Sets the size of the command's terminal, if it has one.
    pub(crate) fn resize(&self, rows: u16, cols: u16) {
        if let Some(terminal) = &*self.terminal.lock().unwrap_or_else(PoisonError::into_inner) {
            let size = rustix::termios::Winsize { ws_row: rows, ws_col: cols, ws_xpixel: 0, ws_ypixel: 0 };
            // A terminal whose program has gone has no size to set.
            let _ = rustix::termios::tcsetwinsize(terminal, size);
        }
    }
}

fn signal_group(pid: Pid, number: u8) {
    if let Some(signal) = Signal::from_named_raw(i32::from(number)) {
        // The group may have ended in this moment; there is nothing to do then.
        let _ = rustix::process::kill_process_group(pid, signal);
    }
}

/// All open streams of the session.
#[derive(Debug, Default)]
pub(crate) struct Streams {
    open: Mutex<HashMap<u32, Arc<Stream>>>,
}

/// Why a stream could not be opened.
#[derive(Debug)]
pub(crate) enum NotOpened {
    /// The number is taken.
    Taken,
    /// There are too many.
    TooMany,
}

impl Streams {
    fn lock(&self) -> MutexGuard<'_, HashMap<u32, Arc<Stream>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn open(&self, id: u32, port: &Arc<Port>) -> Result<Arc<Stream>, NotOpened> {
        let mut open = self.lock();
        if open.contains_key(&id) {
            return Err(NotOpened::Taken);
        }
        if open.len() >= ramet_guest::protocol::MAX_STREAMS {
            return Err(NotOpened::TooMany);
        }
        let stream = Arc::new(Stream::new(id, Arc::clone(port)));
        open.insert(id, Arc::clone(&stream));
        Ok(stream)
    }

    pub(crate) fn get(&self, id: u32) -> Option<Arc<Stream>> {
        self.lock().get(&id).cloned()
    }

    /// Removes exactly this stream: its number may belong to a newer one by now.
    pub(crate) fn close(&self, stream: &Arc<Stream>) {
        let mut open = self.lock();
        if open.get(&stream.id).is_some_and(|known| Arc::ptr_eq(known, stream)) {
            open.remove(&stream.id);
        }
    }

    pub(crate) fn detach_all(&self) {
        for (_, stream) in self.lock().drain() {
            stream.detach();
        }
    }
}
