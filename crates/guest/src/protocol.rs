//! Frames and messages between the host and the agent, over any byte channel (virtio-serial, a serial port).
//!
//! A frame on the channel is `00 COBS(body) 00`, its body
//!
//! ```text
//! kind u8 | stream u32le | payload | crc32 (IEEE) u32le of all before
//! ```
//!
//! of at most [`MAX_FRAME`] bytes. Delimiters on both sides make the channel resynchronise by itself: the channel of
//! a clone may begin in the middle of a frame, and a writer may die in the middle of one. Bytes that form no valid
//! frame are dropped and counted, never trusted.
//!
//! Streams are numbered by the host. Bytes of a stream flow only against credit: each side may send
//! [`INITIAL_CREDIT`] bytes of `DATA` (host to guest) or of `STDOUT` and `STDERR` together (guest to host), and then
//! as many as the receiver grants by `CREDIT`. So a slow reader of one stream never blocks the others.

use serde::{Deserialize, Serialize};

/// Most bytes of a decoded frame: kind, stream, payload and checksum.
pub const MAX_FRAME: usize = 16 * 1024;
/// Bytes of a frame before the payload: kind and stream.
pub const HEADER: usize = 5;
/// Bytes of a frame after the payload: the checksum.
pub const TRAILER: usize = 4;
/// Most bytes of a frame's payload.
pub const MAX_PAYLOAD: usize = MAX_FRAME - HEADER - TRAILER;
/// Most bytes between two delimiters.
pub const MAX_ENCODED: usize = cobs_bound(MAX_FRAME);
/// Bytes that may be sent on a new stream, in each direction, before the receiver grants more.
pub const INITIAL_CREDIT: u32 = 64 * 1024;
/// Most bytes of credit that a sender may ever hold; a grant beyond it is a fault of the peer.
pub const MAX_CREDIT: u32 = 16 * 1024 * 1024;
/// Most streams open at a time; a guest refuses more.
pub const MAX_STREAMS: usize = 256;
/// Name of the virtio port that the agent serves.
pub const PORT_NAME: &str = "ramet.agent";
/// Least bytes of entropy in an [`Identity`].
pub const MIN_ENTROPY: usize = 32;
/// The signal that subscribers get in a clone: `SIGRTMIN+10` as glibc counts, sent by `sigqueue` with the number of
/// the clone as its value.
pub const SIGCLONE: i32 = 44;
/// Most hooks in one directory; a guest refuses to run more.
pub const MAX_HOOKS: usize = 64;
/// Most bytes of a hook's output that are kept: the last ones.
pub const MAX_HOOK_OUTPUT: usize = 4096;

/// The kinds of frames. Values below 0x80 go from host to guest, the others from guest to host.
pub mod kind {
    /// `session u64le`: the guest forgets the streams of other sessions and answers [`HELLO_ACK`].
    pub const HELLO: u8 = 0x01;
    /// Any bytes; answered by [`PONG`] with the same.
    pub const PING: u8 = 0x02;
    /// Empty; answered by [`TIME_ACK`].
    pub const TIME: u8 = 0x03;
    /// JSON of [`Identity`](super::Identity); answered by [`IDENTITY_ACK`].
    pub const IDENTITY: u8 = 0x04;
    /// JSON of [`Exec`](super::Exec): opens a stream.
    pub const EXEC: u8 = 0x05;
    /// Bytes for the standard input of a command, or of a file.
    pub const DATA: u8 = 0x06;
    /// No more [`DATA`].
    pub const EOF: u8 = 0x07;
    /// `signal u8`, for the process group of a command.
    pub const SIGNAL: u8 = 0x08;
    /// `bytes u32le`: the host has room for that many more bytes of this stream.
    pub const CREDIT: u8 = 0x09;
    /// JSON of [`FilePut`](super::FilePut): opens a stream; answered by [`EXIT`] 0 when the file is in place.
    pub const FILE_PUT: u8 = 0x0b;
    /// JSON of [`FileGet`](super::FileGet): opens a stream; answered by [`FILE_INFO`], [`STDOUT`], [`EXIT`] 0.
    pub const FILE_GET: u8 = 0x0c;
    /// `rows u16le, columns u16le`: the size of a command's terminal.
    pub const RESIZE: u8 = 0x0d;
    /// Empty: power off in good order; answered by [`EXIT`] 0 when it has begun.
    pub const SHUTDOWN: u8 = 0x0e;
    /// JSON of [`Freeze`](super::Freeze): make ready for a checkpoint; answered by [`FREEZE_ACK`].
    pub const FREEZE: u8 = 0x0f;
    /// Empty: let all applications run again. Also ends a [`FREEZE`] that is under way. Answered by [`THAW_ACK`].
    pub const THAW: u8 = 0x10;
    /// JSON of [`Release`](super::Release): a clone has its identity and its network; answered by [`RELEASE_ACK`].
    pub const RELEASE: u8 = 0x11;

    /// `session u64le` and the JSON of [`HelloAck`](super::HelloAck).
    pub const HELLO_ACK: u8 = 0x81;
    /// The bytes of a [`PING`].
    pub const PONG: u8 = 0x82;
    /// `realtime_ns u64le, monotonic_ns u64le`.
    pub const TIME_ACK: u8 = 0x83;
    /// JSON of [`IdentityAck`](super::IdentityAck).
    pub const IDENTITY_ACK: u8 = 0x84;
    /// Bytes from a command's standard output, or of a file.
    pub const STDOUT: u8 = 0x86;
    /// Bytes from a command's standard error.
    pub const STDERR: u8 = 0x87;
    /// `code i32le`: ends the stream.
    pub const EXIT: u8 = 0x88;
    /// UTF-8 text: what went wrong; ends the stream.
    pub const ERROR: u8 = 0x89;
    /// `bytes u32le`: the guest has room for that many more bytes of this stream.
    pub const GUEST_CREDIT: u8 = 0x8a;
    /// JSON of [`FileInfo`](super::FileInfo).
    pub const FILE_INFO: u8 = 0x8b;
    /// JSON of [`FreezeAck`](super::FreezeAck).
    pub const FREEZE_ACK: u8 = 0x8c;
    /// JSON of [`ThawAck`](super::ThawAck).
    pub const THAW_ACK: u8 = 0x8d;
    /// JSON of [`ReleaseAck`](super::ReleaseAck).
    pub const RELEASE_ACK: u8 = 0x8e;
}

/// A command to run. `env` adds to the agent's own environment.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exec {
    /// Program and arguments; the program is looked up in `PATH`.
    pub argv: Vec<String>,
    /// Names and values added to the environment.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub env: Vec<(String, String)>,
    /// Directory to start in; `/` or the home directory by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cwd: Option<String>,
    /// Give it a terminal of its own: then standard error comes with standard output.
    #[serde(default)]
    pub tty: bool,
    /// Whether the host will send its standard input; otherwise it is empty.
    #[serde(default)]
    pub stdin: bool,
    /// Rows of the terminal; 0 leaves the default.
    #[serde(default)]
    pub rows: u16,
    /// Columns of the terminal; 0 leaves the default.
    #[serde(default)]
    pub cols: u16,
}

/// A file to be written. It appears under its name only when complete, with its mode.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilePut {
    /// Absolute path in the guest.
    pub path: String,
    /// Permission bits, for example 0o644.
    pub mode: u32,
    /// Bytes that will follow; any other number is an error.
    pub size: u64,
}

/// A file to be read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileGet {
    /// Absolute path in the guest.
    pub path: String,
}

/// What a file is, sent before its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileInfo {
    /// Permission bits.
    pub mode: u32,
    /// Size in bytes when it was opened (0 for files of `/proc`, which have bytes all the same).
    pub size: u64,
}

/// Who a virtual machine is: sent to every clone before anything else runs in it on behalf of a user.
///
/// One message, one transaction, in this order: entropy, clock, network, hostname, machine id, SSH keys, and then the
/// files `/run/ramet/id` and `/run/ramet/generation`. A machine that was booted gets it too, with its first addresses.
#[derive(Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Identity {
    /// Number of the clone within its fork, from 1; 0 for a machine that was booted.
    pub clone_number: u32,
    /// Number of forks between this machine and the booted one.
    pub generation: u32,
    /// Family of machines, all of one booted ancestor.
    pub family: String,
    /// The machine that it was forked from.
    #[serde(default)]
    pub parent: Option<String>,
    /// This machine.
    pub vm_id: String,
    /// Its name on its host.
    pub name: String,
    /// Fresh random bytes in hexadecimal, at least [`MIN_ENTROPY`] of them, for the kernel's generator.
    pub entropy: String,
    /// Wall clock, nanoseconds since 1970; 0 leaves the clock as it is. The monotonic clock is never touched.
    pub realtime_ns: u64,
    /// Its network interfaces. Those that are not named here stay as they are.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nics: Vec<NicIdentity>,
    /// Its host name; `None` leaves it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// Its machine id, 32 hexadecimal digits; `None` leaves it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine_id: Option<String>,
    /// Make new SSH host keys. Slow; the answer comes when they are made.
    #[serde(default)]
    pub ssh_host_keys: bool,
    /// End the connections of TCP, and of connected UDP sockets, whose local address is one that a NIC had before.
    #[serde(default)]
    pub kill_sockets: bool,
}

/// The address of one network interface. The interface gets exactly this IPv4 address, all others are removed, and
/// IPv6 is switched off on it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NicIdentity {
    /// Which virtio NIC, from 0, in the order of PCI addresses.
    pub index: u32,
    /// The interface's name in the guest; when given, it is used instead of `index`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// As `02:00:00:00:00:01`.
    pub mac: String,
    /// IPv4 address.
    pub ip: String,
    /// Bits of the network's prefix.
    pub prefix: u8,
    /// IPv4 address of the default route; `None` sets no route.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<String>,
    /// The gateway's MAC, for a permanent neighbour entry.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway_mac: Option<String>,
    /// Name servers; empty leaves `/etc/resolv.conf` as it is.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub dns: Vec<String>,
    /// Largest packet; `None` leaves it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// An address that connections may still have, besides those found on the interface.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub old_ip: Option<String>,
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The entropy is a secret of the clone: it must not reach a log.
        f.debug_struct("Identity")
            .field("name", &self.name)
            .field("vm_id", &self.vm_id)
            .field("clone_number", &self.clone_number)
            .field("generation", &self.generation)
            .field("nics", &self.nics)
            .finish_non_exhaustive()
    }
}

/// What `ramet-agent id` shows, and what `/run/ramet/id` holds: an [`Identity`] without its secrets.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestId {
    /// See [`Identity::clone_number`].
    pub clone_number: u32,
    /// See [`Identity::generation`].
    pub generation: u32,
    /// See [`Identity::family`].
    pub family: String,
    /// See [`Identity::parent`].
    pub parent: Option<String>,
    /// See [`Identity::vm_id`].
    pub vm_id: String,
    /// See [`Identity::name`].
    pub name: String,
    /// Whether the kernel took fresh entropy when the machine became this one.
    pub reseeded: bool,
    /// Its host name, if it was given one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hostname: Option<String>,
    /// Its addresses.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub nics: Vec<GuestNic>,
}

/// The address of one network interface in a [`GuestId`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GuestNic {
    /// See [`NicIdentity::index`].
    #[serde(default)]
    pub index: u32,
    /// The interface's name in the guest.
    pub name: String,
    /// See [`NicIdentity::mac`].
    pub mac: String,
    /// See [`NicIdentity::ip`].
    pub ip: String,
    /// See [`NicIdentity::prefix`].
    pub prefix: u8,
    /// See [`NicIdentity::gateway`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<String>,
}

/// What became of an [`Identity`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdentityAck {
    /// Everything was done: all steps are.
    pub ok: bool,
    /// The kernel's random generator has the new entropy. When false, the clone's random numbers may be those of its
    /// siblings: do not use it.
    pub reseeded: bool,
    /// What went wrong.
    #[serde(default)]
    pub error: Option<String>,
    /// What was done, in order.
    #[serde(default)]
    pub steps: Vec<IdentityStep>,
}

/// One step of an [`Identity`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct IdentityStep {
    /// What it is, for example `reseed`, `clock`, `eth0: address`.
    pub name: String,
    /// It was done, or was not needed.
    pub ok: bool,
    /// What went wrong.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// What is worth knowing although nothing went wrong, for example why it was not needed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remark: Option<String>,
    /// Microseconds since the step before ended, by the guest's monotonic clock.
    #[serde(default)]
    pub us: u64,
}

/// Make ready for a checkpoint: hooks, then `sync`, then the freezer. If one fails, all that was frozen is thawed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Freeze {
    /// Run the hooks in `/etc/ramet/checkpoint.d`.
    pub hooks: bool,
    /// Stop all applications until [`kind::THAW`] or [`kind::RELEASE`].
    pub freeze: bool,
    /// Write all dirty pages of file systems to their disks.
    pub sync: bool,
    /// For all of it, in milliseconds.
    pub limit_ms: u64,
}

/// What became of a [`Freeze`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FreezeAck {
    /// Everything asked for was done.
    pub ok: bool,
    /// The applications stand still.
    pub frozen: bool,
    /// The hooks that ran, in order.
    #[serde(default)]
    pub hooks: Vec<HookResult>,
    /// What went wrong.
    #[serde(default)]
    pub error: Option<String>,
}

/// What became of a [`kind::THAW`]. It may be repeated, also when nothing is frozen.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ThawAck {
    /// Nothing is frozen any more.
    pub ok: bool,
    /// What went wrong.
    #[serde(default)]
    pub error: Option<String>,
}

/// Let a clone go to work: hooks, then [`SIGCLONE`] and events to those who subscribed, then the applications run
/// again. A hook that fails makes the answer not `ok`; the rest is done all the same.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Release {
    /// Run the hooks in `/etc/ramet/clone.d`.
    pub hooks: bool,
    /// Tell those who subscribed.
    pub signal: bool,
    /// For all of it, in milliseconds.
    pub limit_ms: u64,
}

/// What became of a [`Release`].
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReleaseAck {
    /// Everything was done.
    pub ok: bool,
    /// The hooks that ran, in order.
    #[serde(default)]
    pub hooks: Vec<HookResult>,
    /// How many were told, by signal or by event.
    #[serde(default)]
    pub signalled: u32,
    /// Nothing is frozen any more.
    #[serde(default)]
    pub thawed: bool,
    /// What went wrong.
    #[serde(default)]
    pub error: Option<String>,
}

/// What became of a hook.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HookResult {
    /// Its file's name.
    pub name: String,
    /// It ended with 0, or was skipped.
    pub ok: bool,
    /// Its exit code, 128 and the signal if one ended it; `None` if it was not run.
    #[serde(default)]
    pub exit: Option<i32>,
    /// How long it ran.
    #[serde(default)]
    pub ms: u64,
    /// The end of what it wrote to its standard output and error, at most [`MAX_HOOK_OUTPUT`] bytes.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub output: String,
    /// Why it was skipped, not run, or killed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub remark: Option<String>,
}

/// A line that a program in the guest sends to `/run/ramet/agent.sock`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subscription {
    /// `signal`: this process gets [`SIGCLONE`]. `events`: this connection gets [`CloneEvent`] lines.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subscribe: Option<String>,
    /// No more [`SIGCLONE`] for this process.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub unsubscribe: bool,
}

/// The answer to a [`Subscription`], one line.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SubscriptionAck {
    /// It was taken.
    pub ok: bool,
    /// Why not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// A line that a subscriber of events gets when this machine has become a clone.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CloneEvent {
    /// `clone`.
    pub event: String,
    /// See [`Identity::clone_number`].
    pub number: u32,
    /// See [`Identity::generation`].
    pub generation: u32,
}

/// The agent's side of the handshake.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct HelloAck {
    /// Version of the agent.
    pub agent: String,
    /// `linux`, or `tiny` for the tiny guest.
    pub guest: String,
    /// Random at each boot, so equal in all clones of one boot.
    #[serde(default)]
    pub boot_id: String,
    /// The generation that the agent believes in, if it was told one: in a clone that has no identity yet, and after
    /// a rewind, it is not the one that the host knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub generation: Option<u32>,
}

/// A frame whose checksum was right.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// One of [`kind`], or unknown.
    pub kind: u8,
    /// The stream, or 0.
    pub stream: u32,
    /// At most [`MAX_PAYLOAD`] bytes.
    pub payload: &'a [u8],
}

impl Frame<'_> {
    /// The payload as one `u32le`, if it is one.
    pub fn as_u32(&self) -> Option<u32> {
        Some(u32::from_le_bytes(self.payload.try_into().ok()?))
    }

    /// The first eight bytes of the payload as `u64le`, and the rest.
    pub fn split_u64(&self) -> Option<(u64, &[u8])> {
        let (head, rest) = self.payload.split_first_chunk::<8>()?;
        Some((u64::from_le_bytes(*head), rest))
    }
}

/// A payload that does not fit into a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "a payload of {0} bytes does not fit into a frame of the agent's protocol (at most {MAX_PAYLOAD}); send less at a time"
)]
pub struct TooLong(pub usize);

/// Appends one frame, with both delimiters, to `out`.
pub fn encode(kind: u8, stream: u32, payload: &[u8], out: &mut Vec<u8>) -> Result<(), TooLong> {
    if payload.len() > MAX_PAYLOAD {
        return Err(TooLong(payload.len()));
    }
    let mut head = [0u8; HEADER];
    head[0] = kind;
    head[1..].copy_from_slice(&stream.to_le_bytes());
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&head);
    hasher.update(payload);
    let crc = hasher.finalize().to_le_bytes();

    out.reserve(2 + cobs_bound(HEADER + payload.len() + TRAILER));
    out.push(0);
    cobs_encode(&[&head, payload, &crc], out);
    out.push(0);
    Ok(())
}

/// The frame as bytes of their own; see [`encode`].
pub fn encoded(kind: u8, stream: u32, payload: &[u8]) -> Result<Vec<u8>, TooLong> {
    let mut out = Vec::new();
    encode(kind, stream, payload, &mut out)?;
    Ok(out)
}

/// Finds frames in a channel's bytes, however they are cut. Holds at most [`MAX_ENCODED`] bytes.
#[derive(Debug, Default)]
pub struct Decoder {
    pending: Vec<u8>,
    /// The bytes up to the next delimiter are too many for a frame: skip them.
    skipping: bool,
    dropped: u64,
}

impl Decoder {
    /// A decoder for a channel that may begin anywhere, also in the middle of a frame.
    pub fn new() -> Self {
        Self::default()
    }

    /// Number of runs of bytes that were no frame.
    pub fn dropped(&self) -> u64 {
        self.dropped
    }

    /// Forgets a partial frame, as when the other side has gone.
    pub fn reset(&mut self) {
        self.pending.clear();
        self.skipping = false;
    }

    /// Takes bytes of the channel and calls `each` for every frame that they complete.
    pub fn push(&mut self, mut bytes: &[u8], mut each: impl FnMut(Frame<'_>)) {
        while let Some(end) = bytes.iter().position(|&b| b == 0) {
            self.keep(&bytes[..end]);
            bytes = &bytes[end + 1..];
            if self.skipping {
                self.skipping = false;
                self.dropped += 1;
            } else if !self.pending.is_empty() {
                match decode_body(&mut self.pending) {
                    Some(frame) => each(frame),
                    None => self.dropped += 1,
                }
            }
            self.pending.clear();
        }
        self.keep(bytes);
    }

    fn keep(&mut self, bytes: &[u8]) {
        if self.skipping {
            return;
        }
        if self.pending.len() + bytes.len() > MAX_ENCODED {
            self.skipping = true;
            self.pending.clear();
        } else {
            self.pending.extend_from_slice(bytes);
        }
    }
}

/// Decodes what lay between two delimiters, in place.
fn decode_body(bytes: &mut [u8]) -> Option<Frame<'_>> {
    let length = cobs_decode(bytes)?;
    if !(HEADER + TRAILER..=MAX_FRAME).contains(&length) {
        return None;
    }
    let (checked, crc) = bytes.get(..length)?.split_last_chunk::<TRAILER>()?;
    if crc32fast::hash(checked) != u32::from_le_bytes(*crc) {
        return None;
    }
    let (head, payload) = checked.split_first_chunk::<HEADER>()?;
    let [kind, s0, s1, s2, s3] = *head;
    Some(Frame { kind, stream: u32::from_le_bytes([s0, s1, s2, s3]), payload })
}

/// Most bytes that COBS makes of `length` bytes: one more for every 254 begun.
const fn cobs_bound(length: usize) -> usize {
    length + length / 254 + 1
}

/// Appends the COBS form of all `parts` together: the same bytes without zeros.
fn cobs_encode(parts: &[&[u8]], out: &mut Vec<u8>) {
    let mut code_at = out.len();
    out.push(1);
    for part in parts {
        let mut rest = *part;
        while !rest.is_empty() {
            if usize::from(out[code_at]) == 255 {
                code_at = out.len();
                out.push(1);
            }
            let room = (255 - usize::from(out[code_at])).min(rest.len());
            let run = rest[..room].iter().position(|&b| b == 0);
            let taken = run.unwrap_or(room);
            out.extend_from_slice(&rest[..taken]);
            // At most 254 in all, so this cannot overflow.
            out[code_at] += taken as u8;
            if run.is_some() {
                code_at = out.len();
                out.push(1);
                rest = &rest[taken + 1..];
            } else {
                rest = &rest[taken..];
            }
        }
    }
}

/// Decodes COBS in place and gives the number of bytes; `None` if it is not COBS.
fn cobs_decode(bytes: &mut [u8]) -> Option<usize> {
    let (mut from, mut to) = (0, 0);
    while let Some(&code) = bytes.get(from) {
        let run = usize::from(code).checked_sub(1)?;
        let start = from + 1;
        if start + run > bytes.len() {
            return None;
        }
        bytes.copy_within(start..start + run, to);
        to += run;
        from = start + run;
        if code != 255 && from < bytes.len() {
            // `to` stays behind `from`: a code byte was taken out for every byte put in.
            bytes[to] = 0;
            to += 1;
        }
    }
    Some(to)
}

/// Bytes as hexadecimal text.
pub fn to_hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    bytes.iter().flat_map(|b| [DIGITS[usize::from(b >> 4)], DIGITS[usize::from(b & 15)]]).map(char::from).collect()
}

/// Bytes from hexadecimal text; `None` if it is not that.
pub fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digit = |b: u8| char::from(b).to_digit(16).and_then(|d| u8::try_from(d).ok());
    let (pairs, []) = text.as_bytes().as_chunks::<2>() else { return None };
    pairs.iter().map(|&[high, low]| Some(digit(high)? << 4 | digit(low)?)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    type Owned = (u8, u32, Vec<u8>);

    fn decode_all(chunks: &[&[u8]]) -> (Vec<Owned>, u64) {
        let mut decoder = Decoder::new();
        let mut frames = Vec::new();
        for chunk in chunks {
            decoder.push(chunk, |f| frames.push((f.kind, f.stream, f.payload.to_vec())));
            assert!(decoder.pending.len() <= MAX_ENCODED);
        }
        (frames, decoder.dropped())
    }

    #[test]
    fn known_bytes_of_a_frame() {
        // Fixed by hand so that the tiny guest's own implementation and this one agree.
        let bytes = encoded(kind::PING, 1, b"hi").unwrap();
        let crc = crc32fast::hash(&[2, 1, 0, 0, 0, b'h', b'i']).to_le_bytes();
        let mut want = vec![0, 3, 2, 1, 1, 1];
        want.push(7);
        want.extend([b'h', b'i']);
        want.extend(crc);
        want.push(0);
        assert!(!crc.contains(&0), "pick other bytes for this test");
        assert_eq!(bytes, want);
        assert_eq!(crc32fast::hash(b"123456789"), 0xcbf4_3926, "the checksum is CRC-32/IEEE");
    }

    #[test]
    fn a_clone_channel_begins_in_mid_frame() {
        let first = encoded(kind::STDOUT, 7, &[1; 300]).unwrap();
        let second = encoded(kind::HELLO_ACK, 0, b"second").unwrap();
        for cut in 2..first.len() {
            let mut bytes = first[cut..].to_vec();
            bytes.extend(&second);
            let (frames, _) = decode_all(&[&bytes]);
            assert_eq!(frames.last(), Some(&(kind::HELLO_ACK, 0, b"second".to_vec())), "cut at {cut}");
            assert!(frames.len() == 1, "a frame that was cut must not decode");
        }
    }

    #[test]
    fn the_largest_payload_passes_and_a_larger_one_is_refused() {
        let bytes = encoded(kind::DATA, u32::MAX, &vec![0xab; MAX_PAYLOAD]).unwrap();
        assert_eq!(decode_all(&[&bytes]).0.len(), 1);
        assert_eq!(encoded(kind::DATA, 0, &vec![0; MAX_PAYLOAD + 1]), Err(TooLong(MAX_PAYLOAD + 1)));
    }

    #[test]
    fn an_endless_run_without_delimiter_is_dropped_and_bounded() {
        let mut decoder = Decoder::new();
        for _ in 0..100 {
            decoder.push(&[0x55; 4096], |_| panic!("no frame here"));
            assert!(decoder.pending.len() <= MAX_ENCODED);
        }
        let mut seen = 0;
        decoder.push(&encoded(kind::PING, 3, b"after").unwrap(), |_| seen += 1);
        assert_eq!((seen, decoder.dropped()), (1, 1));
    }

    #[test]
    fn a_debug_print_of_an_identity_hides_the_entropy() {
        let id = Identity {
            clone_number: 1,
            generation: 1,
            family: "f".into(),
            parent: None,
            vm_id: "v".into(),
            name: "n".into(),
            entropy: "deadbeef".into(),
            ..Identity::default()
        };
        assert!(!format!("{id:?}").contains("deadbeef"));
    }

    #[test]
    fn messages_of_older_hosts_and_agents_are_understood() {
        let id: Identity = serde_json::from_str(
            r#"{"clone_number":1,"generation":2,"family":"f","vm_id":"v","name":"n","entropy":"","realtime_ns":3}"#,
        )
        .unwrap();
        assert!(id.nics.is_empty() && id.hostname.is_none() && !id.kill_sockets && !id.ssh_host_keys);
        let ack: IdentityAck = serde_json::from_str(r#"{"ok":true,"reseeded":true}"#).unwrap();
        assert!(ack.ok && ack.steps.is_empty());
        let hello: HelloAck = serde_json::from_str(r#"{"agent":"1","guest":"tiny"}"#).unwrap();
        assert_eq!(hello.generation, None);
    }

    proptest! {
        #[test]
        fn frames_survive_any_cutting(
            frames in prop::collection::vec((any::<u8>(), any::<u32>(), prop::collection::vec(any::<u8>(), 0..700)), 0..8),
            size in 1usize..400,
        ) {
            let mut bytes = Vec::new();
            for (kind, stream, payload) in &frames {
                encode(*kind, *stream, payload, &mut bytes).unwrap();
            }
            let chunks: Vec<&[u8]> = bytes.chunks(size).collect();
            prop_assert_eq!(decode_all(&chunks), (frames, 0));
        }

        /// Against a simple model: split at zeros, decode each part whole, check the length and the checksum.
        #[test]
        fn any_bytes_decode_as_the_simple_model_says(
            parts in prop::collection::vec(
                prop_oneof![
                    prop::collection::vec(any::<u8>(), 0..60),
                    (any::<u8>(), any::<u32>(), prop::collection::vec(any::<u8>(), 0..40))
                        .prop_map(|(k, s, p)| encoded(k, s, &p).unwrap()),
                    (any::<u8>(), prop::collection::vec(any::<u8>(), 0..40), any::<prop::sample::Index>(), any::<u8>())
                        .prop_map(|(k, p, at, value)| {
                            let mut bytes = encoded(k, 9, &p).unwrap();
                            let at = at.index(bytes.len());
                            bytes[at] = value;
                            bytes
                        }),
                ],
                0..10,
            ),
            size in 1usize..50,
        ) {
            let bytes: Vec<u8> = parts.concat();
            let end = bytes.iter().rposition(|&b| b == 0).map_or(0, |at| at + 1);
            let mut want = Vec::new();
            for part in bytes[..end].split(|&b| b == 0).filter(|part| !part.is_empty()) {
                let Ok(body) = cobs::decode_vec(part) else { continue };
                if body.len() < HEADER + TRAILER {
                    continue;
                }
                let (checked, crc) = body.split_at(body.len() - TRAILER);
                if crc32fast::hash(checked).to_le_bytes() == crc {
                    let stream = u32::from_le_bytes(checked[1..5].try_into().unwrap());
                    want.push((checked[0], stream, checked[5..].to_vec()));
                }
            }
            let chunks: Vec<&[u8]> = bytes.chunks(size).collect();
            prop_assert_eq!(decode_all(&chunks).0, want);
        }

        /// Against the crate `cobs`, with runs around the length of 254 where implementations differ.
        #[test]
        fn cobs_is_what_others_make_of_it(
            runs in prop::collection::vec((prop_oneof![0usize..4, 250usize..260, 500usize..512], any::<u8>()), 0..6),
        ) {
            let bytes: Vec<u8> = runs.iter().flat_map(|&(n, b)| std::iter::repeat_n(b, n)).chain([5]).collect();
            let mut mine = Vec::new();
            let (a, b) = bytes.split_at(bytes.len() / 3);
            cobs_encode(&[a, b], &mut mine);
            prop_assert!(!mine.contains(&0));
            prop_assert!(mine.len() <= cobs_bound(bytes.len()));
            prop_assert_eq!(cobs::decode_vec(&mine).unwrap(), bytes.clone());
            let mut theirs = cobs::encode_vec(&bytes);
            let length = cobs_decode(&mut theirs);
            prop_assert_eq!(length.map(|n| &theirs[..n]), Some(&bytes[..]));
        }

        #[test]
        fn after_any_garbage_the_next_frames_arrive(garbage in prop::collection::vec(any::<u8>(), 0..40_000)) {
            let mut bytes = garbage;
            encode(kind::PING, 77, b"resync", &mut bytes).unwrap();
            let (frames, _) = decode_all(&[&bytes]);
            prop_assert_eq!(frames.last(), Some(&(kind::PING, 77, b"resync".to_vec())));
        }

        #[test]
        fn hex_is_its_own_inverse(bytes in prop::collection::vec(any::<u8>(), 0..80), text in ".{0,9}") {
            prop_assert_eq!(from_hex(&to_hex(&bytes)), Some(bytes));
            if let Some(back) = from_hex(&text) {
                prop_assert_eq!(to_hex(&back), text.to_lowercase());
            }
        }
    }
}
