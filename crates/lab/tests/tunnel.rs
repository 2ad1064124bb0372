//! Encrypted tunnels: members on different hosts speak, and the fabric between them hears nothing of it.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use ramet_client::{Client, api, api::ErrorCode};
use ramet_lab::{Lab, LabOptions};
use ramet_memory::ByteSize;
use std::time::Duration;
use support::*;

/// What members say to each other, and nobody else is to read.
const SECRET: &str = "between-us-only";
/// What is said in the open, so that a capture which hears nothing is not believed.
const OPEN: &str = "for-everybody";
const ARGS: [&str; 3] = ["--pool", "0", "--encrypt-tunnel"];

fn small(name: &str) -> api::RunRequest {
    api::RunRequest {
        name: Some(name.into()),
        memory: ByteSize::mib(128),
        accel: Some(api::AccelKind::Tcg),
        network: Some(api::Egress::None),
        wait_agent_s: 240,
        ..api::RunRequest::new("default")
    }
}

/// Waits until `from` is told the secret by the member at `to`.
async fn told(client: &Client, from: &str, to: &str) {
    let script = format!("nc -w 5 {to} 80 </dev/null 2>/dev/null || true");
    until(&format!("{from} reaches {to}"), || async { sh(client, from, &script).await == SECRET }).await;
}

/// A datagram from a host to another, in the open.
fn say(lab: &Lab, from: usize, to: usize, port: u16, hex: &str) {
    const SAY: &str = "import socket,sys
s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)
try: s.sendto(bytes.fromhex(sys.argv[3]),(sys.argv[1],int(sys.argv[2])))
except OSError: pass";
    let address = lab.hosts()[to - 1].address.to_string();
    told_within(&host_space(lab, from), &["python3", "-c", SAY, &address, &port.to_string(), hex]);
}

fn hex(text: &str) -> String {
    text.bytes().map(|byte| format!("{byte:02x}")).collect()
}

#[tokio::test]
async fn members_on_other_hosts_are_spoken_to_in_secret() {
    let mut options = LabOptions::for_test("tunnel").unwrap().hosts(3);
    options.daemon_args = ARGS.map(str::to_owned).to_vec();
    let mut lab = Lab::up(&options).await.unwrap();
    let clients = [1, 2, 3].map(|host| lab.client(host));
    let home = &clients[0];
    home.run(&small("web")).await.unwrap();

    // One host does not encrypt: refused from both sides, before anything is made.
    lab.set_daemon_args(["--pool", "0"]);
    lab.restart_host_daemon(3).await.unwrap();
    clients[2].run(&small("plain")).await.unwrap();
    for (client, vm, other) in [(home, "web", "h3"), (&clients[2], "plain", "h1")] {
        let (code, text) = refused(client.fork(vm, &fork_of(clones(1, &[other]))).await);
        assert_eq!(code, ErrorCode::Trust, "{text}");
        assert!(text.contains("'h3'") && text.contains("start rametd on 'h3' with --encrypt-tunnel"), "{text}");
        assert_eq!(names(client).await, [vm]);
        assert!(client.checkpoints().await.unwrap().checkpoints.is_empty());
    }
    clients[2].remove_vm("plain", true).await.unwrap();
    lab.set_daemon_args(ARGS);
    lab.restart_host_daemon(3).await.unwrap();

    let answer = format!("setsid nc -ll -p 80 -e echo {SECRET} >/dev/null 2>&1 </dev/null & sleep 0.3");
    sh(home, "web", &answer).await;
    let capture = Capture::new(&host_space(&lab, 2), &["-i", "eth0", "-A", "udp"]);
    let (made, forked) = fork(home, "web", 2, &["h2", "h3"]).await;
    let web = vm(home, "web").await;
    let far = [vm(&clients[1], &forked[0]).await, vm(&clients[2], &forked[1]).await];
    // Also those that did not make each other.
    let everybody = [(&clients[0], &web), (&clients[1], &far[0]), (&clients[2], &far[1])];
    let all = async || {
        for (client, from) in everybody {
            for (_, to) in everybody.iter().filter(|(_, to)| to.id != from.id) {
                told(client, &from.name, &ip(to)).await;
            }
        }
    };
    all().await;
    // Frames in the open, to VXLAN's port and as encrypted ones, from a host of the group.
    for port in [4789, 7392] {
        say(&lab, 1, 2, port, &format!("0400000000000000{}", "00".repeat(64)));
    }
    say(&lab, 1, 2, 9, &hex(OPEN));
    until("the capture hears what is in the open", || async { capture.lines().iter().any(|l| l.contains(OPEN)) }).await;
    let lines = capture.end();
    assert!(!lines.iter().any(|l| l.contains(SECRET)), "{lines:#?}");
    let packets: Vec<_> = lines.iter().filter(|l| l.contains(" > ") && l.contains("ethertype")).collect();
    let (secret, other): (Vec<_>, Vec<_>) = packets.into_iter().partition(|l| l.contains(".7392:"));
    assert!(secret.len() > 10, "{lines:#?}");
    assert!(other.iter().all(|l| l.contains(".9:")), "{other:#?}");

    // The daemon ends, and with it what encrypts: nothing is said in the open. The next one goes on.
    let capture = Capture::new(&host_space(&lab, 2), &["-i", "eth0", "-A", "udp"]);
    lab.kill_host_daemon(1).unwrap();
    let script = format!("nc -w 2 {} 80 </dev/null 2>/dev/null || true", ip(&web));
    assert_eq!(sh(&clients[1], &far[0].name, &script).await, "");
    lab.restart_host_daemon(1).await.unwrap();
    until_within(Duration::from_secs(30), "they speak again", || async {
        sh(&clients[1], &far[0].name, &script).await == SECRET
    })
    .await;
    until("it is found again", || async { vm(home, "web").await.state == api::VmState::Running }).await;
    all().await;
    let lines = capture.end();
    assert!(!lines.iter().any(|l| l.contains(SECRET) || l.contains(".4789:")), "{lines:#?}");

    home.remove_vm("web", true).await.unwrap();
    for (client, name) in [(&clients[1], &far[0].name), (&clients[2], &far[1].name)] {
        client.remove_vm(name, true).await.unwrap();
    }
    until("the checkpoint can go", || async {
        home.remove_checkpoint(&made.parent.checkpoint.id.to_string()).await.is_ok()
    })
    .await;
    for host in [1, 2, 3] {
        assert_nothing_left(&lab, host).await;
        assert_no_network_left(&lab, host).await;
    }
    lab.down().await.unwrap();
}
