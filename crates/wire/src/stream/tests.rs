use super::*;
use crate::{PagesWriter, Priority};
use ramet_memory::{FamilyId, LayerId, PAGE_SIZE, PageIndex, page_checksum};
use std::{
    io::{Read as _, Write as _},
    path::Path,
    sync::{OnceLock, mpsc},
    thread::{self, JoinHandle},
};

const LAYER: LayerId = LayerId::from_u128(0x77);

/// A CA that exists only in a test.
struct Ca {
    issuer: rcgen::CertifiedIssuer<'static, rcgen::KeyPair>,
}

impl Ca {
    fn new() -> Self {
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let key = rcgen::KeyPair::generate().unwrap();
        Self { issuer: rcgen::CertifiedIssuer::self_signed(params, key).unwrap() }
    }

    /// Writes the identity of `host` to `dir`; its peers must come from `trusted`.
    fn write(&self, dir: &Path, host: &str, trusted: &Self) -> TlsFiles {
        let key = rcgen::KeyPair::generate().unwrap();
        let params = rcgen::CertificateParams::new(vec![host.to_owned()]).unwrap();
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        let files = TlsFiles::in_dir(dir);
        std::fs::write(&files.ca, trusted.issuer.pem()).unwrap();
        std::fs::write(&files.cert, cert.pem()).unwrap();
        std::fs::write(&files.key, key.serialize_pem()).unwrap();
        files
    }

    fn identity(&self, host: &str, trusted: &Self) -> TlsConfig {
        let dir = tempfile::tempdir().unwrap();
        self.write(dir.path(), host, trusted).load().unwrap()
    }
}

fn ca() -> &'static Ca {
    static CA: OnceLock<Ca> = OnceLock::new();
    CA.get_or_init(Ca::new)
}

/// The identity of `host`, from the CA of all tests.
pub(super) fn identity(host: &str) -> TlsConfig {
    ca().identity(host, ca())
}

fn options() -> Options {
    Options { spin: Duration::ZERO, ..Options::default() }
}

fn listener(tls: &TlsConfig, options: &Options) -> (Listener, SocketAddr) {
    let listener = Listener::bind("127.0.0.1:0".parse().unwrap(), tls, options).unwrap();
    let addr = listener.local_addr();
    (listener, addr)
}

/// Two ends of one connection over mutual TLS.
fn pair() -> (Connection, Connection) {
    let (listener, addr) = listener(&identity("h1"), &options());
    let source = thread::spawn(move || listener.accept().unwrap().handshake().unwrap());
    let asker = Connection::connect(addr, "h1", &identity("h2"), &options()).unwrap();
    (asker, source.join().unwrap())
}

fn send(sender: &Sender, req: u32, message: Message<'_>) -> Result<(), StreamError> {
    let mut frame = Vec::new();
    Frame { req, message }.encode(&mut frame);
    sender.send(&frame)
}

fn ping(token: u64) -> Message<'static> {
    Message::Ping { token }
}

/// A source of pages whose bytes are their number; `spoil` may damage a frame before it is sent. Peers that send
/// something else than frames are refused.
fn serve(connection: Connection, spoil: impl Fn(&mut Vec<u8>) + Send + 'static) -> JoinHandle<StreamError> {
    thread::spawn(move || {
        let (sender, mut receiver) = connection.split();
        let mut writer = PagesWriter::new();
        loop {
            let (req, handle, start, count) = match receiver.recv() {
                Ok(Frame { req, message: Message::GetPages { handle, start, count, .. } }) => {
                    (req, handle, start, count)
                }
                Ok(Frame { req, message: Message::Ping { token } }) => {
                    send(&sender, req, Message::Pong { token }).unwrap();
                    continue;
                }
                Ok(other) => panic!("{other:?}"),
                Err(error) => {
                    if let StreamError::Wire(wire) = &error {
                        sender.refuse(0, wire);
                    }
                    return error;
                }
            };
            writer.start(req, handle);
            for n in start.0..start.0 + u64::from(count) {
                if writer.is_full() {
                    sender.send(writer.finish(false)).unwrap();
                    writer.start(req, handle);
                }
                let (page, bytes) = (PageIndex(n), page_bytes(n));
                writer.push_raw_or_lz4(page, &bytes, page_checksum(LAYER, page, &bytes)).unwrap();
            }
            let mut frame = writer.finish(true).to_vec();
            spoil(&mut frame);
            sender.send(&frame).unwrap();
        }
    })
}

/// Does not pack.
fn page_bytes(n: u64) -> [u8; PAGE_SIZE] {
    let mut state = n ^ 0x9E37_79B9_7F4A_7C15;
    std::array::from_fn(|_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 56) as u8
    })
}

fn get(start: u64, count: u16) -> Message<'static> {
    Message::GetPages { handle: 1, start: PageIndex(start), count, priority: Priority::Demand }
}

#[test]
fn pages_come_over_tls() {
    let (asker, source) = pair();
    let source = serve(source, |_| {});
    let (sender, mut receiver) = asker.split();
    send(&sender, 5, get(100, 512)).unwrap();
    let (mut next, mut last) = (100, false);
    while !last {
        let frame = receiver.recv().unwrap();
        let Message::Pages(pages) = frame.message else { panic!("{frame:?}") };
        assert_eq!((frame.req, pages.handle), (5, 1));
        for entry in pages.iter() {
            let mut page = [0; PAGE_SIZE];
            entry.decompress_into(LAYER, &mut page).unwrap();
            assert_eq!((entry.page.0, page), (next, page_bytes(next)));
            next += 1;
        }
        last = pages.last;
    }
    assert_eq!(next, 612);
    sender.close();
    assert!(matches!(source.join().unwrap(), StreamError::Closed));
}

#[test]
fn a_page_corrupted_or_moved_on_the_way_is_detected() {
    const TABLE: usize = crate::frame::HEADER_LEN + 8 + PAGE_SIZE;
    for at in [100, TABLE] {
        let (asker, source) = pair();
        let source = serve(source, move |frame| frame[at] ^= 1);
        let (sender, mut receiver) = asker.split();
        send(&sender, 1, get(40, 1)).unwrap();
        let Message::Pages(pages) = receiver.recv().unwrap().message else { panic!() };
        let entry = pages.iter().next().unwrap();
        assert_eq!(entry.page.0, if at == TABLE { 41 } else { 40 });
        let error = entry.decompress_into(LAYER, &mut [0; PAGE_SIZE]).unwrap_err();
        assert!(matches!(error, WireError::Checksum { layer: LAYER, .. }), "{error}");
        // The connection itself is still good.
        send(&sender, 2, ping(3)).unwrap();
        assert_eq!(receiver.recv().unwrap().message, Message::Pong { token: 3 });
        sender.close();
        source.join().unwrap();
    }
}

#[test]
fn malformed_frames_get_an_error_and_the_end() {
    let mut other_version = Vec::new();
    Frame { req: 0, message: ping(1) }.encode(&mut other_version);
    other_version[4] = 200;
    let cases: [(&[u8], ErrorCode, &str); 3] = [
        (b"GET / HTTP/1.1\r\n\r\n", ErrorCode::Malformed, "page protocol"),
        (&other_version, ErrorCode::Version, "version 200"),
        (b"RPGE\x01\x05\0\0\xff\xff\xff\xff\0\0\0\0", ErrorCode::Malformed, "limit"),
    ];
    for (bytes, expected, text) in cases {
        let (asker, source) = pair();
        let source = serve(source, |_| {});
        let (sender, mut receiver) = asker.split();
        sender.send(bytes).unwrap();
        let Message::Error { code, message } = receiver.recv().unwrap().message else { panic!() };
        assert_eq!(code, expected);
        assert!(message.contains(text), "{message}");
        assert!(matches!(receiver.recv(), Err(StreamError::Closed)));
        assert!(matches!(source.join().unwrap(), StreamError::Wire(_)));
    }
}

/// What both sides of a handshake that must fail say. The asker may learn of it only at its first `recv`.
fn failing(server: &TlsConfig, client: &TlsConfig, name: &str) -> (Option<StreamError>, StreamError) {
    let (listener, addr) = listener(server, &options());
    let source = thread::spawn(move || listener.accept().unwrap().handshake().err());
    let asker = match Connection::connect(addr, name, client, &options()) {
        Err(error) => error,
        Ok(connection) => {
            let (sender, mut receiver) = connection.split();
            let _ = send(&sender, 1, ping(1));
            receiver.recv().unwrap_err()
        }
    };
    (source.join().unwrap(), asker)
}

#[test]
fn an_asker_of_another_ca_is_refused() {
    // It trusts the source, but its own certificate is from elsewhere.
    let stranger = Ca::new().identity("h2", ca());
    let (source, asker) = failing(&identity("h1"), &stranger, "h1");
    let source = source.expect("refused");
    assert!(matches!(source, StreamError::Tls { source: rustls::Error::InvalidCertificate(_), .. }), "{source:?}");
    assert!(matches!(asker, StreamError::Alert { .. }), "{asker:?}");
}

#[test]
fn an_asker_without_certificate_is_refused() {
    let mut anonymous = identity("h2");
    let mut roots = rustls::RootCertStore::empty();
    roots.add(ca().issuer.der().clone()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut client = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    client.enable_secret_extraction = true;
    anonymous.client = Arc::new(client);
    let (source, asker) = failing(&identity("h1"), &anonymous, "h1");
    let source = source.expect("refused");
    assert!(matches!(source, StreamError::Tls { source: rustls::Error::NoCertificatesPresented, .. }), "{source:?}");
    assert!(asker.to_string().contains("CertificateRequired"), "{asker:?}");
}

#[test]
fn a_source_of_another_ca_or_name_is_refused() {
    let foreign = Ca::new().identity("h1", ca());
    for (server, name) in [(&foreign, "h1"), (&identity("h3"), "h1")] {
        let (source, asker) = failing(server, &identity("h2"), name);
        assert!(matches!(asker, StreamError::Tls { source: rustls::Error::InvalidCertificate(_), .. }), "{asker:?}");
        assert!(asker.to_string().contains("h1 at 127.0.0.1"), "{asker}");
        assert!(matches!(source, Some(StreamError::Tls { .. })), "{source:?}");
    }
}

#[test]
fn a_caller_that_says_nothing_is_dropped_in_time_and_keeps_nobody_waiting() {
    let options = Options { handshake: Duration::from_millis(300), ..options() };
    let (listener, addr) = listener(&identity("h1"), &options);
    let source = thread::spawn(move || {
        let silent = listener.accept().unwrap();
        let silent = thread::spawn(move || (Instant::now(), silent.handshake().unwrap_err(), Instant::now()));
        let good = listener.accept().unwrap().handshake().map(drop);
        (good, silent.join().unwrap())
    });
    let silent = TcpStream::connect(addr).unwrap();
    Connection::connect(addr, "h1", &identity("h2"), &options).unwrap();
    let (good, (begin, error, end)) = source.join().unwrap();
    good.unwrap();
    assert!(matches!(error, StreamError::Timeout { .. }), "{error:?}");
    let took = end - begin;
    assert!((Duration::from_millis(250)..Duration::from_secs(5)).contains(&took), "{took:?}");
    drop(silent);
}

#[test]
fn a_caller_that_speaks_something_else_is_refused() {
    let (listener, addr) = listener(&identity("h1"), &options());
    let source = thread::spawn(move || listener.accept().unwrap().handshake().unwrap_err());
    let mut caller = TcpStream::connect(addr).unwrap();
    caller.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut answer = Vec::new();
    caller.read_to_end(&mut answer).unwrap();
    assert_eq!(answer.first(), Some(&21), "a TLS alert: {answer:?}");
    assert!(matches!(source.join().unwrap(), StreamError::Tls { .. }));
}

#[test]
fn a_sender_does_not_wait_for_a_receiver_asleep() {
    let (asker, source) = pair();
    let (sender, mut receiver) = asker.split();
    let (source_sender, mut source_receiver) = source.split();
    let (done, waiting) = mpsc::channel();
    let asleep = thread::spawn(move || {
        let token = receiver.recv().map(|frame| frame.message == ping(2));
        done.send(()).unwrap();
        token
    });
    thread::sleep(Duration::from_millis(50));
    send(&sender, 1, ping(1)).unwrap();
    assert_eq!(source_receiver.recv().unwrap().message, ping(1));
    assert!(waiting.try_recv().is_err());
    send(&source_sender, 1, ping(2)).unwrap();
    assert!(asleep.join().unwrap().unwrap());
}

#[test]
fn close_wakes_both_ends_and_the_listener() {
    let (asker, source) = pair();
    let (sender, mut receiver) = asker.split();
    let (_source_sender, mut source_receiver) = source.split();
    let here = thread::spawn(move || receiver.recv().map(drop));
    let there = thread::spawn(move || source_receiver.recv().map(drop));
    thread::sleep(Duration::from_millis(50));
    sender.close();
    assert!(matches!(here.join().unwrap(), Err(StreamError::Closed)));
    assert!(matches!(there.join().unwrap(), Err(StreamError::Closed)));
    assert!(matches!(send(&sender, 1, ping(1)), Err(StreamError::Closed)));

    let (listener, _) = listener(&identity("h1"), &options());
    thread::scope(|scope| {
        let accepting = scope.spawn(|| listener.accept().map(drop));
        thread::sleep(Duration::from_millis(50));
        listener.close();
        assert!(matches!(accepting.join().unwrap(), Err(StreamError::Closed)));
    });
    assert!(matches!(listener.accept(), Err(StreamError::Closed)));
}

#[test]
fn the_end_inside_a_frame_is_an_error() {
    let (asker, source) = pair();
    let (sender, _receiver) = asker.split();
    let mut frame = Vec::new();
    Frame { req: 1, message: ping(1) }.encode(&mut frame);
    sender.send(&frame[..10]).unwrap();
    sender.finish();
    let (_sender, mut receiver) = source.split();
    let error = receiver.recv().unwrap_err();
    assert!(matches!(error, StreamError::Io { .. }), "{error:?}");
}

#[test]
fn waiting_with_a_limit_loses_no_frame() {
    let (asker, source) = pair();
    let (sender, _receiver) = asker.split();
    let (_sender, mut receiver) = source.split();
    assert!(receiver.recv_timeout(Duration::from_millis(20)).unwrap().is_none());
    let mut frame = Vec::new();
    Frame { req: 1, message: ping(9) }.encode(&mut frame);
    sender.send(&frame[..20]).unwrap();
    assert!(receiver.recv_timeout(Duration::from_millis(20)).unwrap().is_none());
    sender.send(&frame[20..]).unwrap();
    assert_eq!(receiver.recv_timeout(Duration::from_secs(5)).unwrap().unwrap().message, ping(9));
}

#[test]
fn keys_are_renewed_without_losing_a_byte() {
    let (asker, source) = pair();
    let source = serve(source, |_| {});
    let (sender, mut receiver) = asker.split();
    for n in 0..100u64 {
        {
            let mut sending = sender.sending.lock().unwrap();
            let encryptor = sending.encryptor.as_mut().unwrap();
            match n {
                // Every few records from here on.
                40 => encryptor.renew_after(20),
                // The source has renewed nothing so far; now it is asked to.
                80 => {
                    assert_eq!(receiver.decryptor.as_ref().unwrap().renewed, 0);
                    encryptor.renew(true).unwrap();
                }
                _ => {}
            }
        }
        send(&sender, 1, ping(n)).unwrap();
        assert_eq!(receiver.recv().unwrap().message, Message::Pong { token: n });
    }
    assert_eq!(receiver.decryptor.as_ref().unwrap().renewed, 1);
    sender.close();
    source.join().unwrap();
}

#[test]
fn a_changed_record_ends_the_connection() {
    let (listener, addr) = listener(&identity("h1"), &options());
    // Between the two: passes everything on, but changes one byte of what the asker sends after the handshake.
    let between = TcpListener::bind("127.0.0.1:0").unwrap();
    let middle = between.local_addr().unwrap();
    let (spoil, spoil_now) = mpsc::channel::<()>();
    let relay = thread::spawn(move || {
        let (mut near, _) = between.accept().unwrap();
        let mut far = TcpStream::connect(addr).unwrap();
        let (mut back_from, mut back_to) = (far.try_clone().unwrap(), near.try_clone().unwrap());
        thread::spawn(move || std::io::copy(&mut back_from, &mut back_to));
        let mut buffer = [0; 4096];
        while let Ok(n @ 1..) = near.read(&mut buffer) {
            if spoil_now.try_recv().is_ok() {
                buffer[n - 1] ^= 1;
            }
            if far.write_all(&buffer[..n]).is_err() {
                break;
            }
        }
    });
    let source = thread::spawn(move || listener.accept().unwrap().handshake().unwrap());
    let (sender, _receiver) = Connection::connect(middle, "h1", &identity("h2"), &options()).unwrap().split();
    let (_source_sender, mut source) = source.join().unwrap().split();
    send(&sender, 1, ping(1)).unwrap();
    assert_eq!(source.recv().unwrap().message, ping(1));
    spoil.send(()).unwrap();
    send(&sender, 1, ping(2)).unwrap();
    let error = source.recv().unwrap_err();
    assert!(matches!(error, StreamError::Tls { source: rustls::Error::DecryptError, .. }), "{error:?}");
    sender.close();
    relay.join().unwrap();
}

#[test]
fn many_senders_share_a_connection_frame_by_frame() {
    let (asker, source) = pair();
    let (sender, _receiver) = asker.split();
    let (_source_sender, mut receiver) = source.split();
    let threads: Vec<_> = (0..4u64)
        .map(|thread| {
            let sender = sender.clone();
            thread::spawn(move || (0..200).for_each(|n| send(&sender, 1, ping(thread << 32 | n)).unwrap()))
        })
        .collect();
    let mut next = [0; 4];
    for _ in 0..800 {
        let Message::Ping { token } = receiver.recv().unwrap().message else { panic!() };
        let expected = &mut next[(token >> 32) as usize];
        assert_eq!(token & 0xffff_ffff, *expected);
        *expected += 1;
    }
    threads.into_iter().for_each(|thread| thread.join().unwrap());
}

#[test]
fn without_tls_for_benches_too() {
    let (near, far) = UnixStream::pair().unwrap();
    let source = serve(Connection::insecure_unix_for_bench(far, &options()), |_| {});
    let (sender, mut receiver) = Connection::insecure_unix_for_bench(near, &options()).split();
    send(&sender, 1, get(3, 2)).unwrap();
    let Message::Pages(pages) = receiver.recv().unwrap().message else { panic!() };
    assert_eq!(pages.len(), 2);
    pages.runs().try_for_each(|run| run.verify(LAYER)).unwrap();
    sender.close();
    source.join().unwrap();
}

#[test]
fn files_that_are_no_identity_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let files = ca().write(dir.path(), "h1", ca());
    let other = tempfile::tempdir().unwrap();
    let stranger = ca().write(other.path(), "h2", ca());
    let cases = [
        (TlsFiles { ca: dir.path().join("none.pem"), ..files.clone() }, "none.pem"),
        (TlsFiles { cert: files.key.clone(), ..files.clone() }, "host.key"),
        (TlsFiles { key: stranger.key, ..files }, "host.key"),
    ];
    for (files, name) in cases {
        let text = files.load().unwrap_err().to_string();
        assert!(text.contains(name) && text.contains("ramet host"), "{text}");
    }
}

#[test]
fn addresses_that_cannot_be_used_are_named() {
    let tls = identity("h1");
    let (taken, addr) = listener(&tls, &options());
    let text = Listener::bind(addr, &tls, &options()).unwrap_err().to_string();
    assert!(text.contains(&addr.to_string()), "{text}");
    drop(taken);
    // A port that the kernel gives to nobody by itself.
    let addr = "127.0.0.1:1".parse().unwrap();
    let error = Connection::connect(addr, "h1", &tls, &options()).unwrap_err();
    assert!(matches!(error, StreamError::Connect { .. }) && error.to_string().contains(&addr.to_string()), "{error}");
    let error = Connection::connect(addr, "not a name", &tls, &options()).unwrap_err();
    assert!(error.to_string().contains("'not a name'"), "{error}");
}

#[test]
fn the_speed_of_the_link_is_that_of_the_last_large_writes() {
    let mut window = Window::default();
    assert_eq!(window.add(4096, Duration::from_secs(1)), None);
    let millisecond = Duration::from_millis(1);
    let mut last = None;
    for _ in 0..100 {
        last = window.add(128 << 10, millisecond).or(last);
    }
    let expected = (128 << 10) * 1000;
    assert!(last.is_some_and(|speed: u64| speed.abs_diff(expected) < expected / 50), "{last:?}");
}

#[test]
fn a_frame_may_ride_with_the_last_flight_of_the_handshake() {
    let (listener, addr) = listener(&identity("h1"), &options());
    // Between the two: holds what the asker says back until its first frame has caught up with its last flight.
    let between = TcpListener::bind("127.0.0.1:0").unwrap();
    let middle = between.local_addr().unwrap();
    let relay = thread::spawn(move || {
        let (mut near, _) = between.accept().unwrap();
        let mut far = TcpStream::connect(addr).unwrap();
        let (mut back_from, mut back_to) = (far.try_clone().unwrap(), near.try_clone().unwrap());
        thread::spawn(move || std::io::copy(&mut back_from, &mut back_to));
        let mut buffer = [0; 16384];
        while let Ok(n @ 1..) = near.read(&mut buffer) {
            far.write_all(&buffer[..n]).unwrap();
            thread::sleep(Duration::from_millis(100));
        }
    });
    let asker = thread::spawn(move || {
        let (sender, receiver) = Connection::connect(middle, "h1", &identity("h2"), &options()).unwrap().split();
        let hello = Message::Hello { family: FamilyId::from_u128(4), version: 1, host: "h2" };
        send(&sender, 1, hello).unwrap();
        (sender, receiver)
    });
    let connection = listener.accept().unwrap().handshake().unwrap();
    assert!(!connection.receiver.plain.rest().is_empty(), "the frame did not ride along");
    let (_sender, mut receiver) = connection.split();
    let frame = receiver.recv().unwrap();
    assert!(matches!(frame.message, Message::Hello { host: "h2", .. }), "{frame:?}");
    asker.join().unwrap().0.close();
    relay.join().unwrap();
}
