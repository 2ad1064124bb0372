//! The client of a guest's agent: one connection to the socket of a virtual machine's agent port, any number of
//! commands, files and questions at a time over it.
//!
//! QEMU serves one connection of a port at a time, so a host keeps one [`AgentClient`] per virtual machine and clones
//! the handle. A new connection is a new session: the guest *detaches* the commands of the older one (they run on,
//! their output is dropped, their input ends, their terminals hang up).

mod channel;
mod error;
mod exec;
mod file;

pub use error::AgentError;
pub use exec::{ExecControl, ExecEvent, ExecEvents, ExecInput, ExecOutput, ExecRequest, ExecSession};

use crate::protocol::{
    self, Decoder, Freeze, FreezeAck, HelloAck, Identity, IdentityAck, MAX_PAYLOAD, Release, ReleaseAck, ThawAck, kind,
};
use channel::{Channel, Sink};
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::UnixStream;
use tokio::sync::oneshot;
use tokio::time::{Instant, sleep, timeout, timeout_at};

/// How soon the handshake is repeated when the agent does not answer; then ever later, up to [`HELLO_LATEST`]. A guest
/// that is slow must not have to read its own questions' repetitions before it can answer one.
pub const HELLO_INTERVAL: Duration = Duration::from_millis(100);
/// The longest pause between two handshakes.
pub const HELLO_LATEST: Duration = Duration::from_secs(1);
/// How often connecting is tried while there is no socket yet.
const CONNECT_INTERVAL: Duration = Duration::from_millis(5);
/// How long an answer, or any progress of a file, is waited for.
const DEFAULT_LIMIT: Duration = Duration::from_secs(10);

/// The clocks of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GuestTime {
    /// Nanoseconds since 1970.
    pub realtime_ns: u64,
    /// Nanoseconds since the guest booted.
    pub monotonic_ns: u64,
}

/// A connection to the agent of one guest. Cheap to clone; the connection closes when the last handle (and the last
/// session) is dropped.
#[derive(Clone, Debug)]
pub struct AgentClient {
    channel: Arc<Channel>,
    hello: Arc<HelloAck>,
    limit: Duration,
}

impl AgentClient {
    /// Connects to the Unix socket of an agent port and waits for the agent's answer, for `limit` in all. The socket
    /// need not exist yet, and the guest may still boot.
    pub async fn connect(path: impl AsRef<Path>, limit: Duration) -> Result<Self, AgentError> {
        let path = path.as_ref();
        let deadline = Instant::now() + limit;
        loop {
            let socket = connect_socket(path, deadline, limit).await?;
            match Self::hello(socket, deadline, limit).await {
                // QEMU may not have opened its port yet, or be about to replace it.
                Err(AgentError::Disconnected { .. }) if Instant::now() < deadline => sleep(CONNECT_INTERVAL).await,
                other => return other,
            }
        }
    }

    /// Like [`AgentClient::connect`] over a socket that is connected already: connecting before a clone's CPUs start
    /// saves its first answer some time.
    pub async fn over(socket: UnixStream, limit: Duration) -> Result<Self, AgentError> {
        Self::hello(socket, Instant::now() + limit, limit).await
    }

    async fn hello(socket: UnixStream, deadline: Instant, limit: Duration) -> Result<Self, AgentError> {
        let session = random_u64();
        let (decoder, hello) = shake_hands(&socket, session, deadline, limit).await?;
        let channel = Channel::start(socket, decoder, session);
        Ok(Self { channel, hello: Arc::new(hello), limit: DEFAULT_LIMIT })
    }

    /// The same connection with another limit for each answer (and for each stretch without progress of a file). The
    /// default is 10 s.
    #[must_use]
    pub fn with_limit(&self, limit: Duration) -> Self {
        Self { limit, ..self.clone() }
    }

    /// What the agent said of itself.
    pub fn guest(&self) -> &HelloAck {
        &self.hello
    }

    /// Whether the connection has ended.
    pub fn is_closed(&self) -> bool {
        self.channel.is_closed()
    }

    /// Waits until the connection has ended.
    pub async fn closed(&self) {
        self.channel.wait_closed().await;
    }

    /// Ends the connection now, for all handles and sessions.
    pub fn close(&self) {
        self.channel.fail(AgentError::disconnected("the client was closed"));
    }

    /// Sends a ping and gives the time until its answer.
    pub async fn ping(&self) -> Result<Duration, AgentError> {
        let begun = std::time::Instant::now();
        let sent = random_u64().to_le_bytes();
        let back = self.ask("ping", kind::PING, &sent, kind::PONG).await?;
        let took = begun.elapsed();
        if back == sent { Ok(took) } else { Err(AgentError::protocol("a ping came back with other bytes")) }
    }

    /// Reads the guest's clocks.
    pub async fn time(&self) -> Result<GuestTime, AgentError> {
        let answer = self.ask("time", kind::TIME, &[], kind::TIME_ACK).await?;
        match answer.as_chunks::<8>() {
            ([realtime, monotonic], []) => Ok(GuestTime {
                realtime_ns: u64::from_le_bytes(*realtime),
                monotonic_ns: u64::from_le_bytes(*monotonic),
            }),
            _ => Err(AgentError::protocol("a malformed time")),
        }
    }

    /// Tells the guest who it is, sets its clock and reseeds its random generator. A clone whose acknowledgement is
    /// not `ok` must not be used: check it.
    pub async fn identity(&self, identity: &Identity) -> Result<IdentityAck, AgentError> {
        let answer = self.ask("identity", kind::IDENTITY, &to_json(identity)?, kind::IDENTITY_ACK).await?;
        from_json(&answer)
    }

    /// Makes the guest ready for a checkpoint. The answer is waited for as long as the request may take and this
    /// client's limit besides. If this fails or its future is dropped, send [`AgentClient::thaw`]: that also ends what
    /// is still under way. An answer that is not `ok` has left nothing frozen.
    pub async fn freeze(&self, request: &Freeze) -> Result<FreezeAck, AgentError> {
        let limit = self.limit.saturating_add(Duration::from_millis(request.limit_ms));
        from_json(&self.ask_within("freeze", kind::FREEZE, &to_json(request)?, kind::FREEZE_ACK, limit).await?)
    }

    /// Lets all applications run again, and ends a [`AgentClient::freeze`] that is under way. May be repeated.
    pub async fn thaw(&self) -> Result<ThawAck, AgentError> {
        from_json(&self.ask("thaw", kind::THAW, &[], kind::THAW_ACK).await?)
    }

    /// Lets a clone go to work, when it has its identity and its network. The answer is waited for as long as the
    /// request may take and this client's limit besides.
    pub async fn release(&self, request: &Release) -> Result<ReleaseAck, AgentError> {
        let limit = self.limit.saturating_add(Duration::from_millis(request.limit_ms));
        from_json(&self.ask_within("release", kind::RELEASE, &to_json(request)?, kind::RELEASE_ACK, limit).await?)
    }

    /// Has the guest power itself off in good order. Returns when that has begun; the virtual machine ends later.
    pub async fn shutdown(&self) -> Result<(), AgentError> {
        self.ask("shutdown", kind::SHUTDOWN, &[], kind::EXIT).await.map(drop)
    }

    /// One question, one answer.
    async fn ask(&self, what: &'static str, kind: u8, payload: &[u8], want: u8) -> Result<Vec<u8>, AgentError> {
        self.ask_within(what, kind, payload, want, self.limit).await
    }

    async fn ask_within(
        &self,
        what: &'static str,
        kind: u8,
        payload: &[u8],
        want: u8,
        limit: Duration,
    ) -> Result<Vec<u8>, AgentError> {
        let (to, answer) = oneshot::channel();
        let stream = self.channel.open(kind, payload, Sink::Answer(to))?;
        let _forget = Forget { channel: &self.channel, stream };
        let (got, payload) = match timeout(limit, answer).await {
            Ok(Ok(event)) => event?,
            Ok(Err(_)) => return Err(self.channel.why_closed()),
            Err(_) => return Err(AgentError::TimedOut { what, limit }),
        };
        if got == want { Ok(payload) } else { Err(unexpected(got)) }
    }
}

/// Forgets a question also when its future is dropped.
struct Forget<'a> {
    channel: &'a Channel,
    stream: u32,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.channel.forget(self.stream);
    }
}

fn unexpected(kind: u8) -> AgentError {
    AgentError::protocol(format!("an unexpected frame of kind {kind:#04x}"))
}

fn to_json(value: &impl serde::Serialize) -> Result<Vec<u8>, AgentError> {
    let json = serde_json::to_vec(value)
        .map_err(|error| AgentError::Host { what: "writing a request as JSON", reason: error.to_string() })?;
    if json.len() > MAX_PAYLOAD { Err(protocol::TooLong(json.len()).into()) } else { Ok(json) }
}

fn from_json<T: serde::de::DeserializeOwned>(bytes: &[u8]) -> Result<T, AgentError> {
    serde_json::from_slice(bytes).map_err(|error| AgentError::protocol(format!("malformed JSON: {error}")))
}

/// Different at each call; no secret.
fn random_u64() -> u64 {
    RandomState::new().build_hasher().finish()
}

async fn connect_socket(path: &Path, deadline: Instant, limit: Duration) -> Result<UnixStream, AgentError> {
    let mut reason = "no answer".to_owned();
    loop {
        match timeout_at(deadline, UnixStream::connect(path)).await {
            Ok(Ok(socket)) => return Ok(socket),
            Ok(Err(error)) => {
                let passes = matches!(
                    error.kind(),
                    io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused | io::ErrorKind::WouldBlock
                );
                reason = error.to_string();
                if passes && Instant::now() + CONNECT_INTERVAL < deadline {
                    sleep(CONNECT_INTERVAL).await;
                    continue;
                }
            }
            Err(_) => {}
        }
        return Err(AgentError::Connect { path: path.to_owned(), limit, reason });
    }
}

/// Says `HELLO` until its acknowledgement comes. What was in the channel before is dropped.
async fn shake_hands(
    socket: &UnixStream,
    session: u64,
    deadline: Instant,
    limit: Duration,
) -> Result<(Decoder, HelloAck), AgentError> {
    let hello = protocol::encoded(kind::HELLO, 0, &session.to_le_bytes())?;
    let mut decoder = Decoder::new();
    let mut buffer = vec![0; 32 * 1024];
    let mut next_hello = Instant::now();
    let mut interval = HELLO_INTERVAL;
    loop {
        if Instant::now() >= next_hello {
            match socket.try_write(&hello) {
                // A part of a frame does no harm: the next one begins with a delimiter. A full socket has enough.
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(AgentError::disconnected(error)),
            }
            next_hello = Instant::now() + interval;
            interval = (interval * 3 / 2).min(HELLO_LATEST);
        }
        if timeout_at(next_hello.min(deadline), socket.readable()).await.is_err() {
            if Instant::now() >= deadline {
                return Err(AgentError::NoHello { limit });
            }
            continue;
        }
        match socket.try_read(&mut buffer) {
            Ok(0) => return Err(AgentError::disconnected("the other side ended it")),
            Ok(length) => {
                let mut answer = None;
                decoder.push(&buffer[..length], |frame| {
                    if frame.kind == kind::HELLO_ACK
                        && let Some((of, json)) = frame.split_u64()
                        && of == session
                    {
                        answer = Some(json.to_vec());
                    }
                });
                if let Some(json) = answer {
                    return Ok((decoder, from_json(&json)?));
                }
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => return Err(AgentError::disconnected(error)),
        }
        if Instant::now() >= deadline {
            return Err(AgentError::NoHello { limit });
        }
    }
}
