//! The real agent and the real client, over a socket pair instead of a virtio port.
#![allow(clippy::unwrap_used, reason = "helpers of tests, too")]

use ramet_guest::host::{AgentClient, AgentError, ExecEvent, ExecRequest};
use ramet_guest::protocol::{self, Decoder, HelloAck, INITIAL_CREDIT, MAX_PAYLOAD, kind};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream as StdStream;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

const LIMIT: Duration = Duration::from_secs(20);
const MOST: usize = 8 << 20;
const AGENT: &str = env!("CARGO_BIN_EXE_ramet-agent");

/// An agent that serves one end of a socket pair, with a root of its own; killed at the end.
struct Agent {
    child: Child,
    _root: tempfile::TempDir,
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn start() -> (Agent, UnixStream) {
    let root = tempfile::tempdir().unwrap();
    let (ours, theirs) = StdStream::pair().unwrap();
    // As from a script's background, where interrupts are ignored.
    let child = Command::new("sh")
        .args(["-c", "trap '' INT QUIT; exec \"$0\" --root \"$1\" serve --stdin", AGENT])
        .arg(root.path())
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .spawn()
        .unwrap();
    ours.set_nonblocking(true).unwrap();
    (Agent { child, _root: root }, UnixStream::from_std(ours).unwrap())
}

async fn client() -> (Agent, AgentClient) {
    let (agent, socket) = start();
    (agent, AgentClient::over(socket, LIMIT).await.unwrap())
}

fn sh(script: &str) -> ExecRequest {
    ExecRequest::new(["sh", "-c", script]).limit(LIMIT)
}

#[tokio::test]
async fn handshake_ping_and_time() {
    let (_agent, client) = client().await;
    assert_eq!(client.guest().guest, "linux");
    assert_eq!(client.guest().agent, env!("CARGO_PKG_VERSION"));
    assert!(client.ping().await.unwrap() < LIMIT);
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap();
    let time = client.time().await.unwrap();
    assert!(Duration::from_nanos(time.realtime_ns).abs_diff(now) < Duration::from_secs(5));
    assert!(time.monotonic_ns > 0);
}

#[tokio::test]
async fn a_command_gets_its_input_and_gives_output_and_code() {
    let (_agent, client) = client().await;
    let out = client.run(sh("cat; echo oops >&2; exit 7"), b"hello", MOST).await.unwrap();
    assert_eq!((out.code, &out.stdout[..], &out.stderr[..]), (7, &b"hello"[..], &b"oops\n"[..]));
    let out = client.run(sh("cat; echo \"$X\"; pwd").env("X", "y z"), b"", MOST).await.unwrap();
    assert!(String::from_utf8(out.stdout).unwrap().starts_with("y z\n/"));
}

#[tokio::test]
async fn megabytes_flow_both_ways_at_once() {
    let (_agent, client) = client().await;
    let bytes: Vec<u8> = (0..4_000_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let out = client.run(ExecRequest::new(["cat"]).limit(LIMIT), &bytes, MOST).await.unwrap();
    assert_eq!(out.code, 0);
    assert!(out.stdout == bytes);
}

#[tokio::test]
async fn a_reader_that_sleeps_holds_back_only_its_own_stream() {
    let (_agent, client) = client().await;
    let mut slow = client.exec(sh("yes")).unwrap();
    assert!(matches!(slow.next().await.unwrap(), Some(ExecEvent::Stdout(_))));
    let mut writer = client.exec(ExecRequest::new(["sleep", "60"]).stdin()).unwrap();
    let mut stdin = writer.stdin.take().unwrap();
    // `sleep` reads nothing: the pipe and the credit fill, then the writer waits.
    let filled = tokio::time::timeout(Duration::from_millis(300), stdin.write_all(&vec![1; 1 << 20])).await;
    assert!(filled.is_err(), "credit must hold the writer back");
    for _ in 0..20 {
        client.ping().await.unwrap();
    }
    assert_eq!(client.run(sh("echo quick"), b"", MOST).await.unwrap().stdout, b"quick\n");
    writer.control.signal(15).unwrap();
    assert_eq!(writer.next().await.unwrap(), Some(ExecEvent::Exit(128 + 15)));
    assert_eq!(writer.next().await.unwrap(), None);
    slow.control.signal(9).unwrap();
    loop {
        match slow.next().await.unwrap() {
            Some(ExecEvent::Exit(code)) => break assert_eq!(code, 128 + 9),
            Some(_) => {}
            None => panic!("no exit code"),
        }
    }
}

#[tokio::test]
async fn a_terminal_is_one() {
    let (_agent, client) = client().await;
    let request = ExecRequest::new(["sh", "-c", "test -t 0 && test -t 1 && stty size; read x; echo got $x; exit 3"]);
    let mut session = client.exec(request.tty(33, 101).limit(LIMIT)).unwrap();
    session.stdin.as_mut().unwrap().write_all(b"word\n").await.unwrap();
    let mut text = Vec::new();
    let code = loop {
        match session.next().await.unwrap().unwrap() {
            ExecEvent::Stdout(bytes) => text.extend(bytes),
            ExecEvent::Stderr(_) => panic!("a terminal has one output"),
            ExecEvent::Exit(code) => break code,
        }
    };
    let text = String::from_utf8(text).unwrap();
    assert!(text.contains("33 101\r\n") && text.contains("got word\r\n"), "{text:?}");
    assert_eq!(code, 3);

    let mut session = client.exec(sh("echo ready; exec sleep 60").tty(0, 0)).unwrap();
    assert!(matches!(session.next().await.unwrap(), Some(ExecEvent::Stdout(_))));
    // More than once: a shell that is about to become another program loses the first.
    let mut stdin = session.stdin.take().unwrap();
    let typing = tokio::spawn(async move {
        while stdin.write_all(b"\x03").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
    loop {
        match session.next().await.unwrap().unwrap() {
            ExecEvent::Exit(code) => break assert_eq!(code, 128 + 2, "control-C interrupts"),
            other => drop(other),
        }
    }
    typing.abort();
}

#[tokio::test]
async fn a_background_child_does_not_hold_the_exit_code_back() {
    let (_agent, client) = client().await;
    let begun = Instant::now();
    let out = client.run(sh("sleep 30 & echo $!; exit 4"), b"", MOST).await.unwrap();
    assert_eq!(out.code, 4);
    assert!(begun.elapsed() < Duration::from_secs(10));
    let pid = String::from_utf8(out.stdout).unwrap();
    let out = client.run(sh(&format!("kill {}", pid.trim())), b"", MOST).await.unwrap();
    assert_eq!(out.code, 0, "the child runs on");
    let out = client.run(sh("yes > /dev/stderr & echo $!"), b"", MOST).await.unwrap();
    assert_eq!(out.code, 0, "a child that writes for ever does not either");
    let pid = String::from_utf8(out.stdout).unwrap();
    assert_eq!(client.run(sh(&format!("kill {}", pid.trim())), b"", MOST).await.unwrap().code, 0);
}

#[tokio::test]
async fn failures_name_the_thing() {
    let (_agent, client) = client().await;
    let message = |error: AgentError| error.to_string();
    let error = client.run(ExecRequest::new(["no-such-program"]), b"", MOST).await.unwrap_err();
    assert!(message(error).contains("no-such-program"));
    let error = client.get_file("/no/such/file", Vec::new()).await.unwrap_err();
    assert!(message(error).contains("/no/such/file"));
    let error = client.put_file("/no/such/dir/file", 0o644, 1, &b"x"[..]).await.unwrap_err();
    assert!(message(error).contains("/no/such/dir/file"));
    let error = client.put_file("relative", 0o644, 1, &b"x"[..]).await.unwrap_err();
    assert!(message(error).contains("relative"));
    let error = client.run(ExecRequest::new(["sleep", "60"]).limit(Duration::from_millis(50)), b"", MOST).await;
    assert!(matches!(error, Err(AgentError::TimedOut { .. })));
    let error = client.run(sh("yes"), b"", 100_000).await.unwrap_err();
    assert!(message(error).contains("100000"));
    let error = client.run(ExecRequest::new(["x".repeat(MAX_PAYLOAD)]), b"", MOST).await.unwrap_err();
    assert!(matches!(error, AgentError::TooLarge(_)));
    // Nothing of that has harmed the channel.
    client.ping().await.unwrap();
}

#[tokio::test]
async fn files_keep_bytes_and_mode() {
    let (_agent, client) = client().await;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file").to_str().unwrap().to_owned();
    let bytes: Vec<u8> = (0..1_000_003u32).map(|i| (i / 3) as u8).collect();
    client.put_file(&path, 0o750, bytes.len() as u64, &bytes[..]).await.unwrap();
    let mut back = Vec::new();
    let info = client.get_file(&path, &mut back).await.unwrap();
    assert!(back == bytes);
    assert_eq!((info.mode, info.size), (0o750, bytes.len() as u64));
    client.put_file(&path, 0o600, 0, &b""[..]).await.unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().len(), 0);

    // A source that ends early leaves the old file, and nothing half-made.
    let error = client.put_file(&path, 0o600, 100, &b"short"[..]).await.unwrap_err();
    assert!(error.to_string().contains("95 bytes"), "{error}");
    client.ping().await.unwrap();
    let begun = Instant::now();
    while std::fs::read_dir(dir.path()).unwrap().count() > 1 {
        assert!(begun.elapsed() < LIMIT, "a partial file stayed");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let error = client.get_file(dir.path().to_str().unwrap(), Vec::new()).await.unwrap_err();
    assert!(matches!(error, AgentError::Guest { .. }));
}

#[tokio::test]
async fn dropped_sessions_run_on_or_die_as_asked() {
    let (_agent, client) = client().await;
    let dir = tempfile::tempdir().unwrap();
    let mark = dir.path().join("mark");
    // More output than there is credit: it must be drained for the command to come to its end.
    let script = format!(
        "echo; i=0; while [ $i -lt 9000 ]; do echo 0123456789abcdef; i=$((i+1)); done; echo > {}",
        mark.display()
    );
    let mut session = client.exec(sh(&script)).unwrap();
    session.next().await.unwrap();
    drop(session);
    let begun = Instant::now();
    while !mark.exists() {
        assert!(begun.elapsed() < LIMIT, "the command did not run on");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }

    let mut request = sh("echo $$; exec sleep 60");
    request.kill_on_drop = true;
    let mut session = client.exec(request).unwrap();
    let Some(ExecEvent::Stdout(pid)) = session.next().await.unwrap() else { panic!("no output") };
    drop(session);
    let pid = String::from_utf8(pid).unwrap();
    let begun = Instant::now();
    while std::path::Path::new(&format!("/proc/{}", pid.trim())).exists() {
        assert!(begun.elapsed() < LIMIT, "the command was not killed");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A raw channel to an agent, to be rude on.
struct Raw {
    socket: UnixStream,
    decoder: Decoder,
    frames: Vec<(u8, u32, Vec<u8>)>,
}

impl Raw {
    fn new(socket: UnixStream) -> Self {
        Self { socket, decoder: Decoder::new(), frames: Vec::new() }
    }

    async fn send(&mut self, kind: u8, stream: u32, payload: &[u8]) {
        self.socket.write_all(&protocol::encoded(kind, stream, payload).unwrap()).await.unwrap();
    }

    async fn wait_for(&mut self, what: impl Fn(&(u8, u32, Vec<u8>)) -> bool) -> (u8, u32, Vec<u8>) {
        tokio::time::timeout(LIMIT, async {
            loop {
                if let Some(at) = self.frames.iter().position(&what) {
                    return self.frames.remove(at);
                }
                let mut buffer = [0; 1000];
                let length = self.socket.read(&mut buffer).await.unwrap();
                assert!(length > 0, "the agent has gone");
                self.decoder.push(&buffer[..length], |f| self.frames.push((f.kind, f.stream, f.payload.to_vec())));
            }
        })
        .await
        .expect("no such frame came")
    }
}

#[tokio::test]
async fn the_agent_survives_rude_hosts() {
    let (_agent, socket) = start();
    let mut raw = Raw::new(socket);
    raw.socket.write_all(&[0x55; 100_000]).await.unwrap();
    for kind in 0..=255u8 {
        // Not these: they would change the machine that runs the test.
        if ![kind::SHUTDOWN, kind::IDENTITY].contains(&kind) {
            raw.send(kind, 9, b"{garbage").await;
            raw.send(kind, 9, b"").await;
        }
    }
    raw.send(kind::PING, 10, b"alive").await;
    raw.wait_for(|f| *f == (kind::PONG, 10, b"alive".to_vec())).await;
    let refused = raw.wait_for(|f| f.0 == kind::ERROR && f.1 == 9).await;
    assert!(!refused.2.is_empty());

    // More than the credit: the stream ends with an error, the agent does not grow and goes on.
    raw.send(kind::EXEC, 11, br#"{"argv":["sleep","5"],"stdin":true}"#).await;
    for _ in 0..(INITIAL_CREDIT as usize / MAX_PAYLOAD + 8) {
        raw.send(kind::DATA, 11, &vec![7; MAX_PAYLOAD]).await;
    }
    let refused = raw.wait_for(|f| f.0 == kind::ERROR && f.1 == 11).await;
    assert!(String::from_utf8_lossy(&refused.2).contains("credit"));

    // A number in use is refused, and so is one stream too many.
    let sleep = br#"{"argv":["sleep","60"],"stdin":true}"#;
    raw.send(kind::EXEC, 12, sleep).await;
    raw.send(kind::EXEC, 12, sleep).await;
    raw.wait_for(|f| f.0 == kind::ERROR && f.1 == 12).await;
    raw.send(kind::SIGNAL, 12, &[9]).await;
    raw.wait_for(|f| f.0 == kind::EXIT && f.1 == 12).await;
    raw.send(kind::PING, 13, b"still").await;
    raw.wait_for(|f| f.0 == kind::PONG && f.1 == 13).await;
}

#[tokio::test]
async fn a_new_session_detaches_the_commands_of_the_old_one() {
    let (_agent, socket) = start();
    let dir = tempfile::tempdir().unwrap();
    let mark = dir.path().join("mark");
    let mut raw = Raw::new(socket);
    raw.send(kind::HELLO, 0, &1u64.to_le_bytes()).await;
    raw.wait_for(|f| f.0 == kind::HELLO_ACK).await;
    // It writes far more than its credit, then sees the end of its input, then leaves a mark.
    let script = format!("head -c 1000000 /dev/zero; cat; echo end > {}", mark.display());
    let exec = serde_json::json!({"argv": ["sh", "-c", script], "stdin": true}).to_string();
    raw.send(kind::EXEC, 5, exec.as_bytes()).await;
    raw.wait_for(|f| f.0 == kind::STDOUT && f.1 == 5).await;
    // Repeated HELLOs of the same session change nothing.
    raw.send(kind::HELLO, 0, &1u64.to_le_bytes()).await;
    raw.wait_for(|f| f.0 == kind::HELLO_ACK).await;
    assert!(!mark.exists());
    // The clone's host says HELLO in the middle of a frame that the parent's host had begun.
    let half = protocol::encoded(kind::DATA, 5, &[9; 500]).unwrap();
    raw.socket.write_all(&half[..300]).await.unwrap();
    raw.send(kind::HELLO, 0, &2u64.to_le_bytes()).await;
    let ack = raw.wait_for(|f| f.0 == kind::HELLO_ACK && f.2[..8] == 2u64.to_le_bytes()).await;
    let hello: HelloAck = serde_json::from_slice(&ack.2[8..]).unwrap();
    assert_eq!(hello.guest, "linux");
    let begun = Instant::now();
    while !mark.exists() {
        assert!(begun.elapsed() < LIMIT, "the command did not run on");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // The number is free again, and nothing of the old stream comes any more.
    raw.frames.clear();
    raw.send(kind::EXEC, 5, br#"{"argv":["echo","new"]}"#).await;
    let first = raw.wait_for(|f| f.1 == 5).await;
    assert_eq!(first, (kind::STDOUT, 5, b"new\n".to_vec()));
}

#[tokio::test]
async fn connecting_waits_for_the_socket_and_then_for_the_agent() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("agent.sock");
    let error = AgentClient::connect(&path, Duration::from_millis(40)).await.unwrap_err();
    assert!(matches!(&error, AgentError::Connect { path: named, .. } if *named == path), "{error}");
    let listener = UnixListener::bind(&path).unwrap();
    let error = AgentClient::connect(&path, Duration::from_millis(80)).await.unwrap_err();
    assert!(matches!(error, AgentError::NoHello { .. }), "{error}");
    drop(listener.accept().await.unwrap());

    // A port that closes at first, then sends the middle of a frame, then repeats an answer to another session.
    let serve = async {
        drop(listener.accept().await.unwrap());
        let (mut socket, _) = listener.accept().await.unwrap();
        let mut stale = protocol::encoded(kind::STDOUT, 3, &[7; 900]).unwrap().split_off(50);
        let answer = |session: u64| {
            let mut payload = session.to_le_bytes().to_vec();
            payload.extend(br#"{"agent":"1","guest":"tiny"}"#);
            protocol::encoded(kind::HELLO_ACK, 0, &payload).unwrap()
        };
        stale.extend(answer(0));
        socket.write_all(&stale).await.unwrap();
        let (mut decoder, mut hellos, mut buffer) = (Decoder::new(), Vec::new(), [0; 64]);
        while hellos.len() < 3 {
            let length = socket.read(&mut buffer).await.unwrap();
            decoder.push(&buffer[..length], |f| hellos.push(f.split_u64().unwrap().0));
        }
        assert!(hellos.iter().all(|&s| s == hellos[0]), "HELLO is repeated with one session");
        socket.write_all(&answer(hellos[0])).await.unwrap();
        socket
    };
    let (client, socket) = tokio::join!(AgentClient::connect(&path, LIMIT), serve);
    let client = client.unwrap();
    assert_eq!(client.guest().guest, "tiny");

    let waiting = tokio::spawn({
        let client = client.clone();
        async move { client.ping().await }
    });
    tokio::time::sleep(Duration::from_millis(20)).await;
    drop(socket);
    assert!(matches!(waiting.await.unwrap(), Err(AgentError::Disconnected { .. })));
    client.closed().await;
    assert!(client.is_closed());
    assert!(client.exec(sh("true")).is_err_and(|e| e.is_channel()));
}

#[tokio::test]
async fn a_silent_agent_meets_the_limit_and_a_rude_one_is_cut_off() {
    let (ours, theirs) = StdStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    theirs.set_nonblocking(true).unwrap();
    let mut fake = Raw::new(UnixStream::from_std(theirs).unwrap());
    let answer = async {
        let (_, _, session) = fake.wait_for(|f| f.0 == kind::HELLO).await;
        let mut payload = session;
        payload.extend(br#"{"agent":"1","guest":"fake"}"#);
        fake.send(kind::HELLO_ACK, 0, &payload).await;
    };
    let (client, ()) = tokio::join!(AgentClient::over(UnixStream::from_std(ours).unwrap(), LIMIT), answer);
    let client = client.unwrap();
    let quick = client.with_limit(Duration::from_millis(50));
    assert!(matches!(quick.ping().await, Err(AgentError::TimedOut { what: "ping", .. })));

    // Output beyond the credit is not taken, whoever sends it.
    let mut session = client.exec(sh("x")).unwrap();
    let (_, stream, _) = fake.wait_for(|f| f.0 == kind::EXEC).await;
    for _ in 0..=(INITIAL_CREDIT as usize / MAX_PAYLOAD) {
        fake.send(kind::STDOUT, stream, &vec![1; MAX_PAYLOAD]).await;
    }
    fake.wait_for(|f| f.0 == kind::SIGNAL && f.1 == stream).await;
    let error = loop {
        match session.next().await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("no error"),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, AgentError::Protocol { .. }));

    // So is credit without bounds, and an answer of the wrong kind.
    let mut session = client.exec(sh("x").stdin()).unwrap();
    let (_, stream, _) = fake.wait_for(|f| f.0 == kind::EXEC).await;
    fake.send(kind::GUEST_CREDIT, stream, &u32::MAX.to_le_bytes()).await;
    assert!(matches!(session.next().await, Err(AgentError::Protocol { .. })));
    let (answer, ()) = tokio::join!(client.time(), async {
        let (_, stream, _) = fake.wait_for(|f| f.0 == kind::TIME).await;
        fake.send(kind::TIME_ACK, stream, b"short").await;
    });
    assert!(matches!(answer, Err(AgentError::Protocol { .. })));
}
