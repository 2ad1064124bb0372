//! Commands in the guest.

use super::channel::{Channel, Event, Outstanding, Sink};
use super::{AgentClient, AgentError, to_json, unexpected};
use crate::protocol::{Exec, INITIAL_CREDIT, MAX_PAYLOAD, kind};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::sync::{Semaphore, mpsc};
use tokio::time::{Instant, timeout_at};

/// A command to run, and for how long it may.
#[derive(Clone, Debug, Default)]
pub struct ExecRequest {
    /// The command.
    pub exec: Exec,
    /// After that time the command is killed and [`AgentError::TimedOut`] returned; `None` for no limit.
    pub limit: Option<Duration>,
    /// Kill the command when its session is dropped before its end. Otherwise it runs on without a listener.
    pub kill_on_drop: bool,
}

impl ExecRequest {
    /// A command without input, terminal or limit.
    pub fn new<S: Into<String>>(argv: impl IntoIterator<Item = S>) -> Self {
        let argv = argv.into_iter().map(Into::into).collect();
        Self { exec: Exec { argv, ..Exec::default() }, ..Self::default() }
    }

    /// With standard input from the host.
    #[must_use]
    pub fn stdin(mut self) -> Self {
        self.exec.stdin = true;
        self
    }

    /// With input from the host and a terminal of that size (0: the default).
    #[must_use]
    pub fn tty(mut self, rows: u16, cols: u16) -> Self {
        self.exec = Exec { tty: true, stdin: true, rows, cols, ..self.exec };
        self
    }

    /// With a limit for the whole command.
    #[must_use]
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = Some(limit);
        self
    }

    /// With one more variable of the environment.
    #[must_use]
    pub fn env(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.exec.env.push((name.into(), value.into()));
        self
    }
}

/// What a command does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ExecEvent {
    /// It wrote to its standard output.
    Stdout(Vec<u8>),
    /// It wrote to its standard error.
    Stderr(Vec<u8>),
    /// It ended, with this exit code (128 and more: by that signal). The last event.
    Exit(i32),
}

/// All that a command wrote, and its exit code.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ExecOutput {
    /// The exit code (128 and more: by that signal).
    pub code: i32,
    /// Standard output.
    pub stdout: Vec<u8>,
    /// Standard error.
    pub stderr: Vec<u8>,
}

/// A running command. Dropped before its end, the command runs on without a listener (or is killed, if its request
/// says so).
#[derive(Debug)]
pub struct ExecSession {
    /// Its standard input, if the request asked for it.
    pub stdin: Option<ExecInput>,
    /// What it does.
    pub events: ExecEvents,
    /// Signals and the size of its terminal.
    pub control: ExecControl,
}

/// The standard input of a command. Dropping it closes it.
#[derive(Debug)]
pub struct ExecInput {
    stream: u32,
    channel: Arc<Channel>,
    credit: Arc<Semaphore>,
}

/// The events of a command.
#[derive(Debug)]
pub struct ExecEvents {
    stream: u32,
    channel: Arc<Channel>,
    events: mpsc::UnboundedReceiver<Event>,
    outstanding: Outstanding,
    deadline: Option<(Instant, Duration)>,
    ended: bool,
    kill_on_drop: bool,
    ungranted: u32,
}

/// Signals for a command. Cheap to clone; does nothing once the command has ended.
#[derive(Clone, Debug)]
pub struct ExecControl {
    stream: u32,
    channel: Arc<Channel>,
}

impl AgentClient {
    /// Starts a command. Whether it could be started shows in the first event.
    pub fn exec(&self, request: ExecRequest) -> Result<ExecSession, AgentError> {
        let json = to_json(&request.exec)?;
        let (stdin, mut events, control) = self.open_stream(kind::EXEC, &json)?;
        events.deadline = request.limit.map(|limit| (Instant::now() + limit, limit));
        events.kill_on_drop = request.kill_on_drop;
        let stdin = request.exec.stdin.then_some(stdin);
        Ok(ExecSession { stdin, events, control })
    }

    /// Runs a command with this input to its end and collects at most `most` bytes of its output; more is an error.
    pub async fn run(&self, mut request: ExecRequest, input: &[u8], most: usize) -> Result<ExecOutput, AgentError> {
        request.exec.stdin |= !input.is_empty();
        request.kill_on_drop = true;
        let mut session = self.exec(request)?;
        let stdin = session.stdin.take();
        let feed = async {
            if let Some(mut stdin) = stdin {
                // A command need not read all of its input.
                drop(stdin.write_all(input).await);
            }
        };
        let collect = async {
            let mut output = ExecOutput::default();
            while let Some(event) = session.events.next().await? {
                match event {
                    ExecEvent::Stdout(bytes) => output.stdout.extend(bytes),
                    ExecEvent::Stderr(bytes) => output.stderr.extend(bytes),
                    ExecEvent::Exit(code) => output.code = code,
                }
                if output.stdout.len() + output.stderr.len() > most {
                    return Err(AgentError::Host {
                        what: "collecting the command's output",
                        reason: format!("it wrote more than {most} bytes; redirect it to a file in the guest"),
                    });
                }
            }
            Ok(output)
        };
        tokio::pin!(feed, collect);
        tokio::select! {
            biased;
            output = &mut collect => output,
            () = &mut feed => collect.await,
        }
    }

    pub(super) fn open_stream(
        &self,
        kind: u8,
        json: &[u8],
    ) -> Result<(ExecInput, ExecEvents, ExecControl), AgentError> {
        let (to, events) = mpsc::unbounded_channel();
        let outstanding = Outstanding::default();
        let credit = Arc::new(Semaphore::new(INITIAL_CREDIT as usize));
        let sink = Sink::Events(to, Arc::clone(&outstanding), Arc::clone(&credit));
        let stream = self.channel.open(kind, json, sink)?;
        let channel = || Arc::clone(&self.channel);
        Ok((
            ExecInput { stream, channel: channel(), credit },
            ExecEvents {
                stream,
                channel: channel(),
                events,
                outstanding,
                deadline: None,
                ended: false,
                kill_on_drop: false,
                ungranted: 0,
            },
            ExecControl { stream, channel: channel() },
        ))
    }
}

impl ExecInput {
    /// Writes some of `bytes` as soon as the guest has room, and tells how many. Nothing is lost when the future is
    /// dropped.
    pub async fn write(&mut self, bytes: &[u8]) -> Result<usize, AgentError> {
        if bytes.is_empty() {
            return Ok(0);
        }
        let first = self.credit.acquire().await.map_err(|_| AgentError::InputClosed)?;
        first.forget();
        let more = bytes.len().min(MAX_PAYLOAD) - 1;
        let more = self.credit.forget_permits(more);
        self.channel.send(kind::DATA, self.stream, &bytes[..=more])?;
        Ok(more + 1)
    }

    /// Writes all of `bytes`.
    pub async fn write_all(&mut self, mut bytes: &[u8]) -> Result<(), AgentError> {
        while !bytes.is_empty() {
            let written = self.write(bytes).await?;
            bytes = &bytes[written..];
        }
        Ok(())
    }
}

impl Drop for ExecInput {
    fn drop(&mut self) {
        // A closed channel has ended the input already.
        drop(self.channel.send(kind::EOF, self.stream, &[]));
    }
}

impl ExecControl {
    /// Sends a signal (its Linux number) to the command's process group.
    pub fn signal(&self, number: u8) -> Result<(), AgentError> {
        self.channel.send(kind::SIGNAL, self.stream, &[number])
    }

    /// Tells the command's terminal its new size.
    pub fn resize(&self, rows: u16, cols: u16) -> Result<(), AgentError> {
        let ([r0, r1], [c0, c1]) = (rows.to_le_bytes(), cols.to_le_bytes());
        self.channel.send(kind::RESIZE, self.stream, &[r0, r1, c0, c1])
    }
}

impl ExecSession {
    /// The next event; see [`ExecEvents::next`].
    pub async fn next(&mut self) -> Result<Option<ExecEvent>, AgentError> {
        self.events.next().await
    }
}

impl ExecEvents {
    /// The next event; `None` after [`ExecEvent::Exit`]. An error is the end, too. Nothing is lost when the future is
    /// dropped. The guest is held back while no one calls this.
    pub async fn next(&mut self) -> Result<Option<ExecEvent>, AgentError> {
        let Some((kind, payload)) = self.next_frame("exec").await? else { return Ok(None) };
        match kind {
            kind::STDOUT => Ok(Some(ExecEvent::Stdout(payload))),
            kind::STDERR => Ok(Some(ExecEvent::Stderr(payload))),
            kind::EXIT => Ok(Some(ExecEvent::Exit(exit_code(&payload)?))),
            other => Err(unexpected(other)),
        }
    }

    /// The next frame of the stream; `None` after its end.
    pub(super) async fn next_frame(&mut self, what: &'static str) -> Result<Option<(u8, Vec<u8>)>, AgentError> {
        if self.ended {
            return Ok(None);
        }
        let next = match self.deadline {
            None => self.events.recv().await,
            Some((deadline, limit)) => match timeout_at(deadline, self.events.recv()).await {
                Ok(next) => next,
                Err(_) => {
                    self.kill();
                    return Err(AgentError::TimedOut { what, limit });
                }
            },
        };
        let event = next.unwrap_or_else(|| Err(self.channel.why_closed()));
        match &event {
            Ok((kind::STDOUT | kind::STDERR, payload)) => self.grant(payload.len()),
            Ok((kind::EXIT, _)) | Err(_) => self.ended = true,
            Ok(_) => {}
        }
        event.map(Some)
    }

    /// Limits the whole of what is still to come.
    pub(super) fn set_deadline(&mut self, limit: Duration) {
        self.deadline = Some((Instant::now() + limit, limit));
    }

    fn grant(&mut self, bytes: usize) {
        self.ungranted += u32::try_from(bytes).unwrap_or(0);
        if self.ungranted >= INITIAL_CREDIT / 4 {
            let grant = std::mem::take(&mut self.ungranted);
            // Before the guest can know of it, or it would seem to send too much.
            self.outstanding.fetch_sub(grant, Ordering::AcqRel);
            drop(self.channel.send(kind::CREDIT, self.stream, &grant.to_le_bytes()));
        }
    }

    fn kill(&mut self) {
        drop(self.channel.send(kind::SIGNAL, self.stream, &[9]));
        self.abandon();
    }

    fn abandon(&mut self) {
        if !self.ended {
            self.ended = true;
            self.channel.drain(self.stream, &self.outstanding);
        }
    }
}

impl Drop for ExecEvents {
    fn drop(&mut self) {
        if self.kill_on_drop && !self.ended {
            self.kill();
        }
        self.abandon();
    }
}

fn exit_code(payload: &[u8]) -> Result<i32, AgentError> {
    payload.try_into().map(i32::from_le_bytes).map_err(|_| AgentError::protocol("a malformed exit code"))
}
