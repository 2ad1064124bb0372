//! Forks of a real Linux guest: what a clone shares, copies and changes, as programs inside see it.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use ramet_client::api;
use ramet_client::exec::ExecRequest;
use ramet_memory::ByteSize;
use std::time::Duration;
use support::*;

fn linux(name: &str, memory: ByteSize, cpus: u8) -> api::RunRequest {
    api::RunRequest { name: Some(name.into()), memory, cpus, wait_agent_s: 240, ..api::RunRequest::new("default") }
}

/// One boot for all that does not disturb another: booting is what takes time.
#[tokio::test]
async fn clones_of_a_linux_guest_are_somebody_and_go_on() {
    let lab = lab("linux", 2).await;
    let (home, away) = (lab.client(1), lab.client(2));
    let booted = home.run(&linux("web", ByteSize::mib(256), 2)).await.unwrap();
    assert!(booted.agent, "the agent answers");
    exec_and_files(&home).await;
    let mut console = home.console("web").await.unwrap();
    says(&mut console, "before").await;

    // State of all kinds: a file in memory, a deleted file that is open, a process that counts, a pipe, a socket.
    sh(&home, "web", "mkdir /w; dd if=/dev/urandom of=/w/data bs=1M count=48 2>/dev/null; md5sum </w/data >/w/sum")
        .await;
    let script = "exec 9>/w/log; rm /w/log; n=0; while :; do n=$((n+1)); echo $n >&9; echo $n >/w/n; sleep 0.1; done";
    let pid = sh(&home, "web", &format!("setsid sh -c '{script}' </dev/null >/dev/null 2>&1 & echo $!")).await;
    sh(
        &home,
        "web",
        "echo abc | (sleep 1; cat) >/dev/null; nc -l -p 5000 -e cat </dev/null >/dev/null 2>&1 & sleep 0.5",
    )
    .await;
    until("it counts", || async { sh(&home, "web", "cat /w/n 2>/dev/null || echo 0").await != "0" }).await;
    let cpus = sh(&home, "web", "nproc").await;
    assert_eq!(cpus, "2");
    let counted: u64 = sh(&home, "web", "cat /w/n").await.parse().unwrap();

    let (_, names) = fork(&home, "web", 3, &["h1", "h2", "h2"]).await;
    let mut random = vec![sh(&home, "web", "head -c 16 /dev/urandom | md5sum").await];
    for (number, name) in (1..).zip(&names) {
        let client = if number == 1 { &home } else { &away };
        // Memory, with what two processors and the virtio device miss at the same time.
        let sum = "md5sum </w/data | cmp - /w/sum && echo same";
        let both = format!("({sum}) >/tmp/a & {sum} >/tmp/b; wait; cat /tmp/a /tmp/b");
        assert_eq!(sh(client, name, &both).await, "same\nsame", "{name}");
        // Processes and open files.
        let now: u64 = sh(client, name, "cat /w/n").await.parse().unwrap();
        assert!(now >= counted, "{name} goes on from {counted}, not from {now}");
        let lines: u64 = sh(client, name, &format!("wc -l </proc/{pid}/fd/9")).await.parse().unwrap();
        assert!(lines >= counted, "{name}: the deleted file is open");
        until("its process goes on", || async { sh(client, name, "cat /w/n").await.parse::<u64>().unwrap() > now })
            .await;
        // A listening socket listens in every clone, each its own.
        assert_eq!(sh(client, name, &format!("echo {name} | nc -w 2 127.0.0.1 5000")).await, *name);
        // Identity.
        let id: serde_json::Value = serde_json::from_str(&sh(client, name, "ramet-agent id --json").await).unwrap();
        assert_eq!((id["clone_number"].as_u64(), id["name"].as_str()), (Some(number), Some(name.as_str())));
        assert_eq!((id["generation"].as_u64(), id["reseeded"].as_bool()), (Some(1), Some(true)));
        random.push(sh(client, name, "head -c 16 /dev/urandom | md5sum").await);
        // The clock is right.
        let time = client.time(name).await.unwrap();
        assert!(time.offset_ns.unsigned_abs() < 2_000_000_000, "{time:?}");
        // Files that one writes are its own.
        sh(client, name, &format!("echo {name} >/w/own")).await;
    }
    assert_eq!(sh(&home, "web", "test -e /w/own || echo none").await, "none");
    // A connection to the console stays the parent's; a clone's console is its own.
    let seen = says(&mut home.console(&names[0]).await.unwrap(), "clone").await;
    assert!(!seen.contains("parent"), "{seen}");
    let seen = says(&mut console, "parent").await;
    assert!(!seen.contains("clone"), "{seen}");
    let different: std::collections::BTreeSet<_> = random.iter().collect();
    assert_eq!(different.len(), random.len(), "clones return the same random bytes: {random:?}");

    // A VM shuts down when asked to.
    let stopped = home.stop(&names[0], &api::StopRequest { grace_s: 30 }).await.unwrap();
    assert_eq!(stopped.state, api::VmState::Stopped);
    lab.down().await.unwrap();
}

async fn exec_and_files(home: &ramet_client::Client) {
    // Input, output, errors and the code.
    let outcome = home.exec_collect("web", ["sh", "-c", "echo out; echo err >&2; exit 7"]).await.unwrap();
    assert_eq!((outcome.code, outcome.text().trim(), outcome.stderr.as_slice()), (7, "out", b"err\n".as_slice()));
    let request = ExecRequest { stdin: true, ..ExecRequest::new(["md5sum"]) };
    let mut session = home.exec("web", &request).await.unwrap();
    let bytes: Vec<u8> = (0..3_000_000u32).map(|n| ((n * 7) >> 3) as u8).collect();
    // md5sum prints nothing before its input ends, so nobody has to read meanwhile.
    for part in bytes.chunks(ramet_client::exec::MAX_PAYLOAD) {
        session.input.stdin(part).await.unwrap();
    }
    session.input.eof().await.unwrap();
    let sum = String::from_utf8(session.collect(1 << 20).await.unwrap().stdout).unwrap();
    // Files in and out; the guest sees the same bytes.
    home.put_file("web", "/tmp/in", 0o600, bytes.len() as u64, std::io::Cursor::new(bytes.clone())).await.unwrap();
    assert_eq!(sh(home, "web", "md5sum </tmp/in").await, sum.trim());
    let back = home.get_file("web", "/tmp/in").await.unwrap().read_to_end(8 << 20).await.unwrap();
    assert!(back == bytes, "the file comes back as it went in");
    let missing = home.get_file("web", "/no/such/file").await.err().map(|err| err.to_string()).unwrap_or_default();
    assert!(missing.contains("/no/such/file"), "{missing}");
    let failed = home.exec_collect("web", ["/no/such/program"]).await;
    let text = match failed {
        Ok(outcome) => {
            assert_ne!(outcome.code, 0);
            String::from_utf8_lossy(&outcome.stderr).into_owned()
        }
        Err(err) => err.to_string(),
    };
    assert!(text.contains("/no/such/program"), "{text}");
    assert!(home.ping("web").await.unwrap().rtt_us > 0);
}

/// Has a shell on a console say a word: all that was read until then.
async fn says(console: &mut ramet_client::transport::BoxIo, word: &str) -> String {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    console.write_all(format!("\necho {word}-$((40+2))-said\n").as_bytes()).await.unwrap();
    let mut seen = String::new();
    while !seen.contains(&format!("{word}-42-said")) {
        let mut buffer = [0; 4096];
        let read = tokio::time::timeout(Duration::from_secs(20), console.read(&mut buffer)).await.unwrap().unwrap();
        assert!(read > 0, "the console ended: {seen}");
        seen.push_str(&String::from_utf8_lossy(&buffer[..read]));
    }
    seen
}
