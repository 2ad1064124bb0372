//! The TLS handshake, within a time limit, and the hand-over of its keys to the two halves.

use super::{
    StreamError, record,
    record::{Decryptor, Encryptor, KeySchedule},
    socket::Socket,
};
use rustls::{
    ClientConfig, ServerConfig,
    client::{ClientConnectionData, UnbufferedClientConnection},
    kernel::KernelConnection,
    pki_types::ServerName,
    server::{ServerConnectionData, UnbufferedServerConnection},
    unbuffered::{ConnectionState, EncodeError, UnbufferedStatus},
};
use std::{
    io::{self, IoSlice},
    sync::{Arc, Mutex, atomic::AtomicBool},
    time::{Duration, Instant},
};

/// A handshake's flights are a few KiB; certificate chains may make them tens of KiB.
const MAX_FLIGHT: usize = 256 << 10;

/// By when the handshake must be done.
#[derive(Debug)]
pub(super) struct Limit {
    length: Duration,
    deadline: Instant,
}

impl Limit {
    pub(super) fn new(length: Duration) -> Self {
        Self { length, deadline: Instant::now() + length }
    }

    fn error(&self) -> StreamError {
        StreamError::Timeout { what: "The TLS handshake", limit: self.length }
    }
}

/// What a handshake leaves.
pub(super) struct Done {
    pub(super) encryptor: Encryptor,
    pub(super) decryptor: Decryptor,
    /// Application bytes that came along with the peer's last flight.
    pub(super) early: Vec<u8>,
}

/// Either side of a handshake.
trait Side {
    type Data;
    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;
}

impl Side for UnbufferedClientConnection {
    type Data = ClientConnectionData;
    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }
}

impl Side for UnbufferedServerConnection {
    type Data = ServerConnectionData;
    fn process<'c, 'i>(&'c mut self, incoming: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }
}

impl<Data: Send> KeySchedule for KernelConnection<Data> {
    fn next_sending(&mut self) -> Result<(u64, rustls::ConnectionTrafficSecrets), rustls::Error> {
        self.update_tx_secret()
    }

    fn next_receiving(&mut self) -> Result<(u64, rustls::ConnectionTrafficSecrets), rustls::Error> {
        self.update_rx_secret()
    }
}

pub(super) fn client(
    socket: &Socket,
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
    limit: &Limit,
    peer: String,
) -> Result<Done, StreamError> {
    let tls_error = |source| StreamError::Tls { peer: peer.clone(), source };
    let mut tls = UnbufferedClientConnection::new(config, name).map_err(tls_error)?;
    let left = drive(&mut tls, socket, limit, &tls_error)?;
    let (secrets, schedule) = tls.dangerous_into_kernel_connection().map_err(tls_error)?;
    let suite = schedule.negotiated_cipher_suite();
    hand_over(secrets, suite, schedule, left).map_err(tls_error)
}

pub(super) fn server(
    socket: &Socket,
    config: Arc<ServerConfig>,
    limit: &Limit,
    peer: String,
) -> Result<Done, StreamError> {
    let tls_error = |source| StreamError::Tls { peer: peer.clone(), source };
    let mut tls = UnbufferedServerConnection::new(config).map_err(tls_error)?;
    let left = drive(&mut tls, socket, limit, &tls_error)?;
    let (secrets, schedule) = tls.dangerous_into_kernel_connection().map_err(tls_error)?;
    let suite = schedule.negotiated_cipher_suite();
    hand_over(secrets, suite, schedule, left).map_err(tls_error)
}

fn hand_over(
    secrets: rustls::ExtractedSecrets,
    suite: rustls::SupportedCipherSuite,
    schedule: impl KeySchedule + 'static,
    left: Left,
) -> Result<Done, rustls::Error> {
    let suite = suite.tls13().ok_or_else(|| rustls::Error::General("not TLS 1.3".into()))?;
    let schedule: record::Schedule = Arc::new(Mutex::new(Box::new(schedule)));
    let asked = Arc::new(AtomicBool::new(false));
    Ok(Done {
        encryptor: Encryptor::new(suite, secrets.tx, Arc::clone(&schedule), Arc::clone(&asked))?,
        decryptor: Decryptor::new(suite, secrets.rx, schedule, asked, left.records)?,
        early: left.early,
    })
}

/// What was read beyond the handshake.
#[derive(Default)]
struct Left {
    records: Vec<u8>,
    early: Vec<u8>,
}

fn drive<S: Side>(
    tls: &mut S,
    socket: &Socket,
    limit: &Limit,
    tls_error: &dyn Fn(rustls::Error) -> StreamError,
) -> Result<Left, StreamError> {
    let mut left = Left::default();
    let mut flight = Vec::new();
    loop {
        let UnbufferedStatus { mut discard, state, .. } = tls.process(&mut left.records);
        let step = match state {
            Err(error) => {
                left.records.drain(..discard);
                send_alert(tls, socket, &mut left.records, limit);
                return Err(tls_error(error));
            }
            Ok(ConnectionState::EncodeTlsData(mut data)) => {
                encode(&mut data, &mut flight)?;
                Step::Again
            }
            Ok(ConnectionState::TransmitTlsData(data)) => {
                write(socket, &flight, limit)?;
                flight.clear();
                data.done();
                Step::Again
            }
            Ok(ConnectionState::BlockedHandshake) => Step::Read,
            Ok(ConnectionState::WriteTraffic(_)) => Step::Done,
            Ok(ConnectionState::ReadTraffic(mut data)) => {
                while let Some(record) = data.next_record() {
                    let record = record.map_err(tls_error)?;
                    discard += record.discard;
                    left.early.extend_from_slice(record.payload);
                }
                Step::Again
            }
            Ok(_) => return Err(StreamError::Closed),
        };
        left.records.drain(..discard);
        match step {
            Step::Again => {}
            Step::Done => {
                socket.set_write_limit(None).map_err(|e| StreamError::io("setting it up", e))?;
                return Ok(left);
            }
            Step::Read => read(socket, &mut left.records, limit)?,
        }
    }
}

enum Step {
    Again,
    Read,
    Done,
}

fn encode<D>(data: &mut rustls::unbuffered::EncodeTlsData<'_, D>, flight: &mut Vec<u8>) -> Result<(), StreamError> {
    let at = flight.len();
    flight.resize(at + 4096, 0);
    let encoded = match data.encode(&mut flight[at..]) {
        Err(EncodeError::InsufficientSize(need)) => {
            flight.resize(at + need.required_size, 0);
            data.encode(&mut flight[at..])
        }
        encoded => encoded,
    };
    let len = encoded.map_err(|e| StreamError::Io { what: "encoding the handshake", source: io::Error::other(e) })?;
    flight.truncate(at + len);
    Ok(())
}

/// Tells the peer why the handshake failed, as far as it still listens.
fn send_alert<S: Side>(tls: &mut S, socket: &Socket, records: &mut [u8], limit: &Limit) {
    // The next thing that rustls wants after an error is its alert. It is asked only once, and with the very records that
    // it refused: it keeps positions in them, and panics when they are gone.
    let mut flight = Vec::new();
    if let Ok(ConnectionState::EncodeTlsData(mut data)) = tls.process(records).state {
        // Failing to say why changes nothing: the peer sees the end.
        let _ = encode(&mut data, &mut flight).and_then(|()| write(socket, &flight, limit));
    }
    // What the peer has sent meanwhile must be read: closing with unread bytes would reset the connection, and the peer
    // would lose the alert.
    socket.shutdown(std::net::Shutdown::Write);
    let until = limit.deadline.min(Instant::now() + Duration::from_millis(500));
    let mut sink = [0; 4096];
    for _ in 0..64 {
        if !matches!(socket.read(&mut sink, Duration::ZERO, Some(until)), Ok(Some(1..))) {
            break;
        }
    }
}

fn write(socket: &Socket, bytes: &[u8], limit: &Limit) -> Result<(), StreamError> {
    let left = limit.deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        return Err(limit.error());
    }
    socket.set_write_limit(Some(left)).map_err(|e| StreamError::io("setting it up", e))?;
    socket.write_all(&mut [IoSlice::new(bytes)]).map_err(|e| match e.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => limit.error(),
        _ => StreamError::io("shaking hands", e),
    })
}

fn read(socket: &Socket, records: &mut Vec<u8>, limit: &Limit) -> Result<(), StreamError> {
    if records.len() > MAX_FLIGHT {
        let source = io::Error::new(io::ErrorKind::InvalidData, "the peer's handshake is too long");
        return Err(StreamError::Io { what: "shaking hands", source });
    }
    let mut chunk = [0; 8192];
    match socket.read(&mut chunk, Duration::ZERO, Some(limit.deadline)) {
        Ok(Some(0)) => Err(StreamError::Closed),
        Ok(Some(n)) => {
            records.extend_from_slice(&chunk[..n]);
            Ok(())
        }
        Ok(None) => Err(limit.error()),
        Err(e) => Err(StreamError::io("shaking hands", e)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream::tests::identity;
    use proptest::prelude::*;
    use std::{io::Write as _, os::unix::net::UnixStream};

    /// The first flight of an asker.
    fn hello() -> Vec<u8> {
        let mut tls = UnbufferedClientConnection::new(identity("h2").client, "h1".try_into().unwrap()).unwrap();
        let mut flight = Vec::new();
        let UnbufferedStatus { state: Ok(ConnectionState::EncodeTlsData(mut data)), .. } = tls.process(&mut []) else {
            panic!("no hello");
        };
        encode(&mut data, &mut flight).unwrap();
        flight
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(300))]

        /// Whatever a caller sends, it is refused: no panic, no endless wait.
        #[test]
        fn damaged_handshakes_are_refused(
            changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4),
            more in prop::collection::vec((20u8..25, prop::collection::vec(any::<u8>(), 0..80)), 0..4),
        ) {
            static HELLO: std::sync::OnceLock<(Arc<ServerConfig>, Vec<u8>)> = std::sync::OnceLock::new();
            let (config, hello) = HELLO.get_or_init(|| (identity("h1").server, hello()));
            let mut bytes = hello.clone();
            for (at, value) in changes {
                let at = at.index(bytes.len());
                bytes[at] = value;
            }
            for (typ, body) in more {
                bytes.extend([typ, 3, 3, 0, body.len() as u8]);
                bytes.extend(body);
            }
            let (near, mut far) = UnixStream::pair().unwrap();
            far.write_all(&bytes).unwrap();
            far.shutdown(std::net::Shutdown::Write).unwrap();
            let limit = Limit::new(Duration::from_secs(5));
            let error = server(&Socket::Unix(near), Arc::clone(config), &limit, "it".into()).err();
            prop_assert!(
                matches!(error, Some(StreamError::Tls { .. } | StreamError::Closed | StreamError::Io { .. })),
                "{error:?}"
            );
        }
    }
}
