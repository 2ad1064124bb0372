//! TLS 1.3 records between a socket and the frames' plaintext.
//!
//! rustls makes the keys and holds the ciphers; each half of a connection owns one cipher and counts its own records, as
//! the kernel does with kTLS. So the halves share no lock, ciphertext is read in large pieces and decrypted in place, and
//! records are encrypted and handed to the kernel many at a time. The key schedule itself stays in rustls
//! ([`KeySchedule`]); it is needed only when keys are renewed, long before the cipher's limit on records.

use super::{Plain, StreamError, socket::Socket};
use rustls::{
    AlertDescription, ConnectionTrafficSecrets, ContentType, ProtocolVersion, Tls13CipherSuite,
    crypto::cipher::{
        AeadKey, InboundOpaqueMessage, Iv, MessageDecrypter, MessageEncrypter, OutboundChunks, OutboundPlainMessage,
    },
};
use std::{
    fmt,
    io::IoSlice,
    ops::Range,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

/// Bytes of a record's header.
const HEADER: usize = 5;
/// Most plaintext bytes of a record.
const MAX_PLAIN: usize = 1 << 14;
/// Most bytes after a record's header.
const MAX_CIPHER: usize = MAX_PLAIN + 256;
/// Ciphertext is read into a buffer of this size: a few records, so that they are still in the CPU's cache when they are
/// decrypted.
const CIPHER_BUFFER: usize = 256 << 10;
/// Records handed to the kernel at once.
const BATCH: usize = 16;
/// Plaintext is read in pieces of at most this size (without TLS).
const PLAIN_PIECE: usize = 256 << 10;

const KEY_UPDATE: u8 = 24;

/// Makes the next keys of a connection.
pub(super) trait KeySchedule: Send {
    fn next_sending(&mut self) -> Result<(u64, ConnectionTrafficSecrets), rustls::Error>;
    fn next_receiving(&mut self) -> Result<(u64, ConnectionTrafficSecrets), rustls::Error>;
}

/// Shared by both halves, used only when keys are renewed.
pub(super) type Schedule = Arc<Mutex<Box<dyn KeySchedule>>>;

/// What a read brought.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Received {
    /// Plaintext, or progress towards it.
    Bytes,
    /// Nothing by the deadline.
    Nothing,
    /// The end of the connection.
    End,
}

fn tls_error(source: rustls::Error) -> StreamError {
    StreamError::Tls { peer: "the peer".into(), source }
}

/// The sending half's cipher.
pub(super) struct Encryptor {
    suite: &'static Tls13CipherSuite,
    cipher: Box<dyn MessageEncrypter>,
    /// Number of the next record under these keys.
    seq: u64,
    /// Keys are renewed at this many records.
    renew_at: u64,
    schedule: Schedule,
    /// The peer asked for new keys.
    asked: Arc<AtomicBool>,
    /// Records made but not yet written; kept for its memory.
    batch: Vec<Vec<u8>>,
}

impl fmt::Debug for Encryptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Encryptor").field("seq", &self.seq).finish_non_exhaustive()
    }
}

type Write<'a> = &'a mut dyn FnMut(&mut [IoSlice<'_>]) -> Result<(), StreamError>;

impl Encryptor {
    pub(super) fn new(
        suite: &'static Tls13CipherSuite,
        (seq, secrets): (u64, ConnectionTrafficSecrets),
        schedule: Schedule,
        asked: Arc<AtomicBool>,
    ) -> Result<Self, rustls::Error> {
        let (key, iv) = split(secrets)?;
        Ok(Self {
            suite,
            cipher: suite.aead_alg.encrypter(key, iv),
            seq,
            renew_at: suite.common.confidentiality_limit.min(1 << 40) / 2,
            schedule,
            asked,
            batch: Vec::with_capacity(BATCH + 1),
        })
    }

    /// Encrypts `bytes` and writes the records.
    pub(super) fn send(&mut self, bytes: &[u8], write: Write<'_>) -> Result<(), StreamError> {
        for batch in bytes.chunks(MAX_PLAIN * BATCH) {
            if self.seq + BATCH as u64 >= self.renew_at || self.asked.swap(false, Ordering::AcqRel) {
                self.renew(false)?;
            }
            for plain in batch.chunks(MAX_PLAIN) {
                self.push(ContentType::ApplicationData, plain)?;
            }
            self.flush(write)?;
        }
        Ok(())
    }

    /// Tells the peer that nothing more will come.
    pub(super) fn close_notify(&mut self, write: Write<'_>) -> Result<(), StreamError> {
        self.push(ContentType::Alert, &[1, 0])?;
        self.flush(write)
    }

    fn push(&mut self, typ: ContentType, plain: &[u8]) -> Result<(), StreamError> {
        let payload = OutboundChunks::Single(plain);
        let message = OutboundPlainMessage { typ, version: ProtocolVersion::TLSv1_2, payload };
        let record = self.cipher.encrypt(message, self.seq).map_err(tls_error)?;
        self.seq += 1;
        self.batch.push(record.encode());
        Ok(())
    }

    fn flush(&mut self, write: Write<'_>) -> Result<(), StreamError> {
        let mut parts = [IoSlice::new(&[]); BATCH + 1];
        let parts = &mut parts[..self.batch.len()];
        for (part, record) in parts.iter_mut().zip(&self.batch) {
            *part = IoSlice::new(record);
        }
        let written = write(parts);
        self.batch.clear();
        written
    }

    /// Announces new keys under the old ones and takes them into use; `ask`s the peer to do the same.
    pub(super) fn renew(&mut self, ask: bool) -> Result<(), StreamError> {
        self.push(ContentType::Handshake, &[KEY_UPDATE, 0, 0, 1, u8::from(ask)])?;
        let next = self.schedule.lock().unwrap_or_else(PoisonError::into_inner).next_sending();
        let (seq, secrets) = next.map_err(tls_error)?;
        let (key, iv) = split(secrets).map_err(tls_error)?;
        self.cipher = self.suite.aead_alg.encrypter(key, iv);
        self.seq = seq;
        Ok(())
    }

    /// Renews so early that a test sees it.
    #[cfg(test)]
    pub(super) fn renew_after(&mut self, records: u64) {
        self.renew_at = records;
    }
}

/// The receiving half's cipher and the ciphertext that is not yet decrypted.
pub(super) struct Decryptor {
    suite: &'static Tls13CipherSuite,
    cipher: Box<dyn MessageDecrypter>,
    seq: u64,
    schedule: Schedule,
    asked: Arc<AtomicBool>,
    buffer: Vec<u8>,
    /// The undecrypted bytes of `buffer`.
    filled: Range<usize>,
    /// The peer said that nothing more comes.
    ended: bool,
    #[cfg(test)]
    pub(super) renewed: u32,
}

impl fmt::Debug for Decryptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Decryptor").field("seq", &self.seq).finish_non_exhaustive()
    }
}

impl Decryptor {
    pub(super) fn new(
        suite: &'static Tls13CipherSuite,
        (seq, secrets): (u64, ConnectionTrafficSecrets),
        schedule: Schedule,
        asked: Arc<AtomicBool>,
        mut left: Vec<u8>,
    ) -> Result<Self, rustls::Error> {
        let (key, iv) = split(secrets)?;
        let filled = 0..left.len();
        left.resize(left.len().max(CIPHER_BUFFER), 0);
        let cipher = suite.aead_alg.decrypter(key, iv);
        Ok(Self {
            suite,
            cipher,
            seq,
            schedule,
            asked,
            buffer: left,
            filled,
            ended: false,
            #[cfg(test)]
            renewed: 0,
        })
    }

    /// Adds the next records' plaintext to `plain`. Reads from the socket only when no whole record is there.
    pub(super) fn receive(
        &mut self,
        socket: &Socket,
        spin: Duration,
        deadline: Option<Instant>,
        plain: &mut Plain,
    ) -> Result<Received, StreamError> {
        if self.ended {
            return Ok(Received::End);
        }
        if let Some(record) = self.whole_record()? {
            self.decrypt(record, plain)?;
            return Ok(if self.ended { Received::End } else { Received::Bytes });
        }
        if self.filled.is_empty() {
            self.filled = 0..0;
        } else if self.buffer.len() - self.filled.start < HEADER + MAX_CIPHER {
            self.buffer.copy_within(self.filled.clone(), 0);
            self.filled = 0..self.filled.len();
        }
        match socket.read(&mut self.buffer[self.filled.end..], spin, deadline) {
            Ok(Some(0)) => Ok(Received::End),
            Ok(Some(n)) => {
                self.filled.end += n;
                Ok(Received::Bytes)
            }
            Ok(None) => Ok(Received::Nothing),
            Err(e) => Err(StreamError::io("receiving", e)),
        }
    }

    /// Where the next record lies, header included, once all of it is there.
    fn whole_record(&self) -> Result<Option<Range<usize>>, StreamError> {
        let bytes = &self.buffer[self.filled.clone()];
        let Some(header) = bytes.first_chunk::<HEADER>() else { return Ok(None) };
        let len = usize::from(u16::from_be_bytes([header[3], header[4]]));
        if len > MAX_CIPHER {
            return Err(tls_error(rustls::Error::PeerSentOversizedRecord));
        }
        let end = self.filled.start + HEADER + len;
        Ok((end <= self.filled.end).then_some(self.filled.start..end))
    }

    fn decrypt(&mut self, record: Range<usize>, plain: &mut Plain) -> Result<(), StreamError> {
        self.filled.start = record.end;
        let typ = ContentType::from(self.buffer[record.start]);
        if typ != ContentType::ApplicationData {
            // Everything after the handshake is encrypted, alerts too.
            return Err(tls_error(rustls::Error::DecryptError));
        }
        let body = &mut self.buffer[record.start + HEADER..record.end];
        let opaque = InboundOpaqueMessage::new(typ, ProtocolVersion::TLSv1_2, body);
        let message = self.cipher.decrypt(opaque, self.seq).map_err(tls_error)?;
        self.seq += 1;
        match message.typ {
            ContentType::ApplicationData => {
                plain.tidy(message.payload.len());
                plain.bytes.extend_from_slice(message.payload);
                Ok(())
            }
            ContentType::Alert => match message.payload {
                [_, 0] => {
                    self.ended = true;
                    Ok(())
                }
                [_, alert] => Err(StreamError::Alert { alert: format!("{:?}", AlertDescription::from(*alert)) }),
                _ => Err(tls_error(rustls::Error::DecryptError)),
            },
            ContentType::Handshake => match *message.payload {
                [KEY_UPDATE, 0, 0, 1, ask @ 0..=1] => {
                    if ask == 1 {
                        self.asked.store(true, Ordering::Release);
                    }
                    self.renew()
                }
                // Ramet sends no other message after the handshake, tickets included.
                _ => Err(unexpected()),
            },
            _ => Err(unexpected()),
        }
    }

    fn renew(&mut self) -> Result<(), StreamError> {
        let next = self.schedule.lock().unwrap_or_else(PoisonError::into_inner).next_receiving();
        let (seq, secrets) = next.map_err(tls_error)?;
        let (key, iv) = split(secrets).map_err(tls_error)?;
        self.cipher = self.suite.aead_alg.decrypter(key, iv);
        self.seq = seq;
        #[cfg(test)]
        {
            self.renewed += 1;
        }
        Ok(())
    }
}

/// As [`Decryptor::receive`], without TLS.
pub(super) fn receive_plain(
    socket: &Socket,
    spin: Duration,
    deadline: Option<Instant>,
    plain: &mut Plain,
) -> Result<Received, StreamError> {
    plain.tidy(PLAIN_PIECE);
    let at = plain.bytes.len();
    plain.bytes.resize(at + PLAIN_PIECE, 0);
    let read = socket.read(&mut plain.bytes[at..], spin, deadline);
    plain.bytes.truncate(at + read.as_ref().ok().copied().flatten().unwrap_or(0));
    match read {
        Ok(Some(0)) => Ok(Received::End),
        Ok(Some(_)) => Ok(Received::Bytes),
        Ok(None) => Ok(Received::Nothing),
        Err(e) => Err(StreamError::io("receiving", e)),
    }
}

fn unexpected() -> StreamError {
    tls_error(rustls::Error::General("unexpected message after the handshake".into()))
}

fn split(secrets: ConnectionTrafficSecrets) -> Result<(AeadKey, Iv), rustls::Error> {
    use ConnectionTrafficSecrets::{Aes128Gcm, Aes256Gcm, Chacha20Poly1305};
    match secrets {
        Aes128Gcm { key, iv } | Aes256Gcm { key, iv } | Chacha20Poly1305 { key, iv } => Ok((key, iv)),
        // The enum is open; `identity::suites` offers these three only.
        _ => Err(rustls::Error::General("a cipher that was not offered".into())),
    }
}
