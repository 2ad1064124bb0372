//! Families' networks: what gets out of a tap, what gets out of a family, and what is left in the end.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use ramet_client::{Client, api, api::ErrorCode};
use ramet_lab::Lab;
use ramet_memory::ByteSize;
use std::path::Path;
use support::*;

/// Legal datagrams to port 4001 of each address that it is given.
const CONTROL: &str = r#"
import socket, sys
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for ip in sys.argv[1:]: s.sendto(b"control", (ip, 4001))
"#;

/// Frames that must go nowhere: `attack.py own-mac own-ip parent-mac parent-ip victim-mac victim-ip gateway-mac gateway-ip`.
const ATTACK: &str = r#"
import socket, struct, sys, time
mac = lambda t: bytes(int(x, 16) for x in t.split(":"))
a = sys.argv[1:]
me, parent, victim, gate = [(mac(a[i]), socket.inet_aton(a[i + 1])) for i in (0, 2, 4, 6)]
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW); s.bind(("eth0", 0))
ALL = b"\xff" * 6
def sum16(b):
    n = sum(struct.unpack("!%dH" % (len(b) // 2), b)); n = (n & 0xffff) + (n >> 16); return ~(n + (n >> 16)) & 0xffff
def udp(src, dst, sport, dport, data=b"attack!!"):
    u = struct.pack("!4H", sport, dport, 8 + len(data), 0) + data
    h = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(u), 1, 0, 64, 17, 0, src, dst)
    return h[:10] + struct.pack("!H", sum16(h)) + h[12:] + u
def arp(op, sha, spa, tha, tpa): return struct.pack("!HHBBH6s4s6s4s", 1, 0x800, 6, 4, op, sha, spa, tha, tpa)
def eth(dst, src, kind, data): return dst + src + struct.pack("!H", kind) + data + b"\0" * max(0, 46 - len(data))
good = udp(me[1], victim[1], 4444, 4444)
other = b"\x02\x52\x99\x99\x99\x99"
frames = []
for to in (victim[0], ALL):
    for src in (parent[0], victim[0], gate[0], other): frames.append(eth(to, src, 0x800, good))
    for ip in (parent[1], victim[1], gate[1], b"\x0a\1\2\3", b"\x64\x41\0\7", b"\0\0\0\0", b"\x7f\0\0\1"):
        frames.append(eth(to, me[0], 0x800, udp(ip, victim[1], 4444, 4444)))
    frames.append(eth(to, parent[0], 0x800, udp(parent[1], victim[1], 4444, 4444)))
    frames.append(eth(to, me[0], 0x8100, struct.pack("!HH", 5, 0x800) + good))
    frames.append(eth(to, me[0], 0x8100, struct.pack("!HH", 0, 0x800) + good))
    frames.append(eth(to, me[0], 0x88a8, struct.pack("!HHHH", 5, 0x8100, 6, 0x800) + good))
    for sha in (me[0], parent[0]):
        for op in (1, 2):
            frames.append(eth(to, sha, 0x806, arp(op, sha, parent[1], ALL, parent[1])))
            frames.append(eth(to, me[0], 0x806, arp(op, sha, gate[1], victim[0], victim[1])))
    frames.append(eth(to, me[0], 0x806, arp(2, parent[0], me[1], victim[0], victim[1])))
    frames.append(eth(to, me[0], 0x800, udp(me[1], victim[1], 67, 68, b"\2\1\6\0" + b"\0" * 300)))
    frames.append(eth(to, gate[0], 0x800, udp(gate[1], b"\xff" * 4, 67, 68, b"\2\1\6\0" + b"\0" * 300)))
    frames.append(eth(to, me[0], 0x86dd, b"\x60\0\0\0\0\x08\x3a\xff" + b"\xfe\x80" + b"\0" * 13 + b"\1\xff\2" + b"\0" * 13 + b"\1" + b"\x86" + b"\0" * 7))
    for kind in (0x88b5, 0x88cc, 0x8863, 0x888e, 0x0842): frames.append(eth(to, me[0], kind, b"attack!!"))
frames.append(eth(ALL, me[0], 0x800, udp(me[1], b"\xff" * 4, 4444, 4444)))
frames.append(eth(b"\1\0\x5e\0\0\xfb", me[0], 0x800, udp(me[1], b"\xe0\0\0\xfb", 5353, 5353)))
frames.append(eth(b"\1\x80\xc2\0\0\0", me[0], 0x26, b"\x42\x42\3" + b"\0" * 35))
for f in frames: s.send(f)
for i in range(20000): s.send(eth(ALL, me[0], 0x806, arp(1, me[0], me[1], b"\0" * 6, struct.pack("!I", 0x64400000 + 9000 + i))))
print(len(frames), "frames", flush=True)
"#;

/// A datagram to the gateway and one to a sibling every few milliseconds, whatever happens.
const SEND: &str = r#"
import socket, sys, time
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
while True:
    for ip in sys.argv[1:]:
        try: s.sendto(b"still here", (ip, 4002))
        except OSError: pass
    time.sleep(0.003)
"#;

fn small(name: &str, network: api::Egress) -> api::RunRequest {
    api::RunRequest {
        name: Some(name.into()),
        memory: ByteSize::mib(128),
        accel: Some(api::AccelKind::Tcg),
        network: Some(network),
        wait_agent_s: 240,
        ..api::RunRequest::new("default")
    }
}

/// A host has some 16000 addresses for a family's members. All but one are given away here, on its record.
#[tokio::test]
async fn a_host_out_of_addresses_refuses_clones_and_harms_nobody() {
    let mut lab = lab("full", 1).await;
    let home = lab.client(1);
    let web = home.run(&small("web", api::Egress::None)).await.unwrap();
    let (_, first) = fork(&home, "web", 1, &[]).await;
    assert_eq!([ip(&web), ip(&vm(&home, &first[0]).await)], ["100.64.0.2", "100.64.0.3"]);
    let state = state_dir(&lab, 1).await;
    lab.kill_host_daemon(1).unwrap();
    edit_state(&state, |state| {
        let member = |[high, low]: [u8; 2]| serde_json::json!({ "mac": format!("02:52:64:40:{high:02x}:{low:02x}"), "ip": format!("100.64.{high}.{low}") });
        let taken: Vec<_> = (5..16384u16).map(|index| member(index.to_be_bytes())).collect();
        state["families"][web.family.to_string()]["network"]["hosts"]["away"] = taken.into();
    });
    lab.restart_host_daemon(1).await.unwrap();
    let home = lab.client(1);
    let (code, text) = refused(home.fork("web", &fork_of(clones(2, &[]))).await);
    assert_eq!(code, ErrorCode::LimitReached, "{text}");
    assert!(text.contains("no address left") && text.contains("another host"), "{text}");
    assert_eq!(names(&home).await.len(), 2, "nothing was made");
    assert_eq!(home.checkpoints().await.unwrap().checkpoints.len(), 1);
    // There is one left, and again when its VM has gone.
    for _ in 0..2 {
        let (_, last) = fork(&home, "web", 1, &[]).await;
        assert_eq!(ip(&vm(&home, &last[0]).await), "100.64.0.4");
        assert_eq!(refused(home.fork("web", &fork_of(clones(1, &[]))).await).0, ErrorCode::LimitReached);
        home.remove_vm(&last[0], true).await.unwrap();
    }
    // Another family has its own.
    home.run(&small("other", api::Egress::None)).await.unwrap();
    let (_, clone) = fork(&home, "other", 1, &[]).await;
    assert_eq!(sh(&home, &clone[0], "hostname").await, clone[0]);
    assert_eq!(sh(&home, &first[0], "hostname").await, first[0]);
    lab.down().await.unwrap();
}

#[tokio::test]
async fn nothing_leaves_a_tap_but_what_is_its_own() {
    let lab = lab("isolation", 2).await;
    let (home, away) = (lab.client(1), lab.client(2));
    // Another family, which has the same addresses.
    let other = home.run(&small("other", api::Egress::None)).await.unwrap();
    let parent = run_web(&home, "web").await;
    assert_eq!((ip(&parent), mac(&parent)), (ip(&other), mac(&other)));
    let gateway = sh(&home, "web", "ip route show default | awk '{print $3}'").await;
    python(&home, "web", "send", SEND, &gateway).await;
    let first = Capture::new(&family_space(&lab, 1, &parent), &["-i", "any"]);
    until("the parent sends", || async { first.lines().iter().any(|l| l.contains(".4002")) }).await;

    // A packet that a clone sends with the parent's address is seen at its tap, before any filter.
    let (_, clones) = fork(&home, "web", 2, &["h1", "h2"]).await;
    let (near, far) = (vm(&home, &clones[0]).await, vm(&away, &clones[1]).await);
    let second = Capture::new(&family_space(&lab, 2, &parent), &["-i", "any"]);
    for (space, clone) in [(&first, &near), (&second, &far)] {
        let tap = format!(" {} ", clone.network.as_ref().unwrap().tap);
        let sent =
            || space.lines().into_iter().filter(|l| l.contains(&tap) && !l.contains(" Out ")).collect::<Vec<_>>();
        until("the clone sends", || async { sent().iter().any(|l| speaks_as(l, &mac(clone), &ip(clone))) }).await;
        let leaked: Vec<_> = sent().into_iter().filter(|l| speaks_as(l, &mac(&parent), &ip(&parent))).collect();
        assert!(leaked.is_empty(), "{leaked:#?}");
    }
    drop(second);
    let lines = first.end();
    let tap = format!(" {} ", parent.network.as_ref().unwrap().tap);
    assert!(
        lines.iter().any(|l| l.contains(&tap) && speaks_as(l, &mac(&parent), &ip(&parent))),
        "the parent's are seen"
    );
    for (client, name) in [(&home, "web"), (&home, &*clones[0]), (&away, &*clones[1])] {
        sh(client, name, "systemctl stop t-send").await;
    }
    attack(&lab, &other, &parent, &near, &far).await;
    lab.down().await.unwrap();
}

/// `near` attacks the parent on its own host, and `far` on the other one.
async fn attack(lab: &Lab, other: &api::VmInfo, parent: &api::VmInfo, near: &api::VmInfo, far: &api::VmInfo) {
    let home = lab.client(1);
    put(&home, &near.name, "/tmp/control.py", 0o644, CONTROL).await;
    put(&home, &near.name, "/tmp/attack.py", 0o644, ATTACK).await;
    let tap = |vm: &api::VmInfo| vm.network.as_ref().unwrap().tap.clone();
    // What comes out of the bridge towards a machine.
    let at = |host, vm: &api::VmInfo| Capture::new(&family_space(lab, host, vm), &["-Q", "out", "-i", &tap(vm)]);
    let (at_parent, at_far, at_other) = (at(1, parent), at(2, far), at(1, other));
    let controls = |capture: &Capture| capture.lines().iter().filter(|l| l.contains(".4001:")).count();
    let control = format!("python3 /tmp/control.py {} {}", ip(parent), ip(far));
    let gateway = sh(&home, &near.name, "ip route show default | awk '{print $3}'").await;
    let gateway_mac = sh(&home, &near.name, &format!("ip neigh show {gateway} | awk '{{print $5}}'")).await;
    for (round, victim) in [parent, far].into_iter().enumerate() {
        sh(&home, &near.name, &control).await;
        until("the control comes through", || async { controls(&at_parent) > round && controls(&at_far) > round })
            .await;
        let addresses = [near, parent, victim].map(|vm| format!("{} {}", mac(vm), ip(vm))).join(" ");
        // To the parent as victim the parent's own address is the attack of another.
        sh(&home, &near.name, &format!("python3 /tmp/attack.py {addresses} {gateway_mac} {gateway}")).await;
    }
    // The storm has used up what it may.
    until("the control comes through", || async {
        sh(&home, &near.name, &control).await;
        controls(&at_parent) > 2 && controls(&at_far) > 2
    })
    .await;
    for capture in [at_parent, at_far] {
        let lines = capture.end();
        // The bridge answers who asks for the attacker's address, as it should.
        let told = format!("Reply {} is-at {}", ip(near), mac(near));
        let legal = |l: &str| l.is_empty() || l.contains(".4001:") || l.contains(&told);
        let through: Vec<_> = lines.iter().filter(|l| !legal(l)).collect();
        assert!(through.is_empty(), "{through:#?}");
    }
    let through: Vec<_> = at_other.end().into_iter().filter(|l| !l.is_empty()).collect();
    assert!(through.is_empty(), "{through:#?}");
}

/// A web server in a host's namespace; it ends with this.
struct Served(std::process::Child);

impl Served {
    fn new(space: &Path, port: u16) -> Self {
        const SERVE: &str = "import os,socket,sys
s=socket.socket();s.setsockopt(socket.SOL_SOCKET,socket.SO_REUSEADDR,1);s.bind(('',int(sys.argv[1])));s.listen()
os.write(1,b'up')
while True:
    c,_=s.accept()
    try: c.recv(4096);c.sendall(b'HTTP/1.0 200 OK\\r\\n\\r\\nserved')
    except OSError: pass
    c.close()";
        let mut command = within(space, &["python3", "-c", SERVE, &port.to_string()]);
        let mut child = command.stdout(std::process::Stdio::piped()).spawn().unwrap();
        let mut line = [0; 2];
        std::io::Read::read_exact(&mut child.stdout.take().unwrap(), &mut line).unwrap();
        Self(child)
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What a host gets from a port.
fn got(space: &Path, address: &str, port: u16) -> String {
    const GET: &str = "import socket,sys
try:
    s=socket.create_connection((sys.argv[1],int(sys.argv[2])),3);s.settimeout(3);print(s.recv(100).decode())
except OSError as e: print('failed:',e)";
    told_within(space, &["python3", "-c", GET, address, &port.to_string()]).trim().to_owned()
}

async fn tries(client: &Client, vm: &str, address: &str, port: u16) -> String {
    sh(client, vm, &format!("echo hello | nc -w 5 {address} {port} 2>&1 || true")).await
}

async fn reaches(client: &Client, vm: &str, address: &str, port: u16) {
    until(&format!("{vm} reaches {address}:{port}"), async || {
        let answer = tries(client, vm, address, port).await;
        if !answer.ends_with("served") {
            eprintln!("{vm} to {address}:{port}: {answer:?}");
        }
        answer.ends_with("served")
    })
    .await;
}

#[tokio::test]
async fn ways_in_and_out_are_those_that_were_asked_for() {
    let mut lab = lab("ways", 2).await;
    let (home, away) = (lab.client(1), lab.client(2));
    let spaces = [host_space(&lab, 1), host_space(&lab, 2)];
    let [here, there] = [1, 2].map(|n| lab.hosts()[n - 1].address.to_string());
    let _servers = [8080, 8081].map(|port| Served::new(&spaces[1], port));

    let list = api::Egress::List(vec![format!("{there}:8080")]);
    let publish = |guest_port| vec![api::PublishedPort { protocol: api::Protocol::Tcp, host_port: 7000, guest_port }];
    let web = api::RunRequest { publish: publish(80), ..small("web", api::Egress::Nat) };
    let (web, closed, chosen) =
        (home.run(&web).await.unwrap(), small("closed", api::Egress::None), small("chosen", list));
    reaches(&home, "web", &there, 8080).await;
    reaches(&home, "web", &there, 8081).await;
    home.run(&closed).await.unwrap();
    assert_eq!(tries(&home, "closed", &there, 8080).await.matches("served").count(), 0, "nothing leaves");
    home.remove_vm("closed", true).await.unwrap();
    home.run(&chosen).await.unwrap();
    reaches(&home, "chosen", &there, 8080).await;
    assert_eq!(tries(&home, "chosen", &there, 8081).await.matches("served").count(), 0, "this one is not on the list");
    home.remove_vm("chosen", true).await.unwrap();

    // The tunnel's port is closed to a guest that has a way out, here and there: not one such packet leaves its host.
    let tunnels = [0, 1].map(|n| Capture::new(&spaces[n], &["-i", "eth0", "udp", "portrange", "4789-4790"]));
    let sent = async |to: &str, port: u16| {
        sh(&home, "web", &format!("timeout 2 tftp -g -l /tmp/x -r x {to} {port} >/dev/null 2>&1 || true")).await;
    };
    for to in [&here, &there] {
        sent(to, 4789).await;
    }
    // The same to the next port gets out.
    let next = || tunnels[0].lines().iter().any(|l| l.contains(".4790:"));
    until("others are seen", || async {
        sent(&there, 4790).await;
        next()
    })
    .await;
    for capture in tunnels {
        let lines: Vec<_> = capture.end().into_iter().filter(|l| l.contains("4789")).collect();
        assert!(lines.is_empty(), "{lines:#?}");
    }

    // A published port, from another host and from the host itself.
    let greet = "setsid nc -ll -p 80 -e echo hello >/dev/null 2>&1 </dev/null & sleep 0.3";
    sh(&home, "web", greet).await;
    until("it is reached from another host", || async { got(&spaces[1], &here, 7000) == "hello" }).await;
    assert_eq!(got(&spaces[0], &here, 7000), "hello");
    until("one network is there", || async { network_count(&lab) == 1 }).await;
    let (code, text) =
        refused(home.run(&api::RunRequest { publish: publish(81), ..small("late", api::Egress::Nat) }).await);
    assert!(code == ErrorCode::InUse && text.contains("7000"), "{code:?} {text}");
    assert_eq!(names(&home).await, ["web"]);
    until("nothing of the other is left", || async { network_count(&lab) == 1 }).await;
    assert_eq!(got(&spaces[1], &here, 7000), "hello");

    // A clone on each host; the port is the parent's.
    let (made, clones) = fork(&home, "web", 2, &["h1", "h2"]).await;
    let (near, far) = (vm(&home, &clones[0]).await, vm(&away, &clones[1]).await);
    assert!(near.network.as_ref().unwrap().published.is_empty());
    let all = async |lab: &Lab| {
        let (home, away) = (lab.client(1), lab.client(2));
        for (client, from) in [(&home, "web"), (&home, &*near.name), (&away, &*far.name)] {
            for to in [&web, &near, &far].into_iter().filter(|to| to.name != from) {
                let script = format!("nc -w 5 {} 80 </dev/null", ip(to));
                until("they reach each other", || async { sh(client, from, &script).await == "hello" }).await;
            }
        }
        assert_eq!(got(&spaces[1], &here, 7000), "hello");
    };
    all(&lab).await;
    lab.kill_host_daemon(1).unwrap();
    assert_eq!(got(&spaces[1], &here, 7000), "hello", "without a daemon");
    lab.restart_host_daemon(1).await.unwrap();
    lab.restart_host_daemon(2).await.unwrap();
    for (client, name) in [(&home, "web"), (&home, &*near.name), (&away, &*far.name)] {
        until("it is found again", || async { vm(client, name).await.state == api::VmState::Running }).await;
    }
    all(&lab).await;
    let (code, _) =
        refused(home.run(&api::RunRequest { publish: publish(81), ..small("late", api::Egress::Nat) }).await);
    assert_eq!(code, ErrorCode::InUse, "it is known to be taken");
    assert_eq!(network_count(&lab), 1);

    home.remove_vm("web", true).await.unwrap();
    assert!(got(&spaces[1], &here, 7000).starts_with("failed"), "the port is closed");
    home.remove_vm(&near.name, true).await.unwrap();
    away.remove_vm(&far.name, true).await.unwrap();
    until("the checkpoint can go", || async {
        home.remove_checkpoint(&made.parent.checkpoint.id.to_string()).await.is_ok()
    })
    .await;
    for host in [1, 2] {
        assert_nothing_left(&lab, host).await;
        assert_no_network_left(&lab, host).await;
    }
    lab.down().await.unwrap();
}

fn network_count(lab: &Lab) -> usize {
    std::fs::read_dir(lab.hosts()[0].state_dir.join("net")).unwrap().count()
}

/// Tells its host name to whoever connects.
async fn greet(client: &Client, vm: &str) {
    sh(client, vm, "setsid nc -ll -p 80 -e hostname >/dev/null 2>&1 </dev/null & sleep 0.3").await;
}

/// What a VM gets from port 80 of an address; empty: nothing.
async fn greeted(client: &Client, vm: &str, address: &str) -> String {
    sh(client, vm, &format!("nc -w 2 {address} 80 </dev/null 2>/dev/null || true")).await
}

/// Where a VM is on a network with a name.
async fn place(client: &Client, network: &str, vm: &str) -> Option<String> {
    let networks = client.networks().await.unwrap().networks;
    let network = networks.into_iter().find(|n| n.name == network).unwrap();
    network.members.into_iter().find(|m| m.vm == vm).map(|m| m.ip)
}

#[tokio::test]
async fn members_of_named_networks_reach_those_on_the_same_and_down_leaves_nothing() {
    const FILE: &str = r#"
[networks.lan]
[networks.dmz]
[vms.router]
networks = ["lan", "dmz"]
memory = "128M"
own = "none"
[vms.client]
networks = ["lan"]
memory = "128M"
[vms.server]
networks = ["dmz"]
memory = "128M"
"#;
    let lab = lab("topology", 1).await;
    let home = lab.client(1);
    let dir = tempfile::tempdir().unwrap();
    let program = ramet_lab::LabOptions::new("x").unwrap().bin_dir.join("ramet");
    let ramet = |command: &'static str, text: &str| {
        let file = dir.path().join("t.toml");
        std::fs::write(&file, text).unwrap();
        let mut ramet = std::process::Command::new(&program);
        ramet.args(["topology", command]).arg(&file).env("RAMET_LAB", lab.name()).env_remove("RAMET_HOST");
        async move {
            let output = tokio::task::spawn_blocking(move || ramet.output().unwrap()).await.unwrap();
            (output.status.success(), String::from_utf8_lossy(&output.stderr).into_owned())
        }
    };
    // All or nothing: the last one has no image.
    let (done, text) = ramet("up", &format!("{FILE}[vms.zz]\nimage = \"no-such\"\n")).await;
    assert!(!done && text.contains("zz") && text.contains("no-such"), "{text}");
    assert!(names(&home).await.is_empty() && home.networks().await.unwrap().networks.is_empty());
    assert_no_network_left(&lab, 1).await;

    let (done, text) = ramet("up", FILE).await;
    assert!(done, "{text}");
    let (done, text) = ramet("up", FILE).await;
    assert!(!done && text.contains("There is a network"), "a second time: {text}");
    assert_eq!(names(&home).await.len(), 3);
    let at = async |network: &str, vm: &str| place(&home, network, vm).await.unwrap();
    let [lan_router, lan_client] = [at("lan", "router").await, at("lan", "client").await];
    let [dmz_router, dmz_server] = [at("dmz", "router").await, at("dmz", "server").await];
    assert_eq!((place(&home, "dmz", "client").await, place(&home, "lan", "server").await), (None, None));
    for vm in ["router", "client", "server"] {
        greet(&home, vm).await;
    }
    for (from, address, whose) in [
        ("client", &lan_router, "router"),
        ("router", &lan_client, "client"),
        ("router", &dmz_server, "server"),
        ("server", &dmz_router, "router"),
    ] {
        let name = sh(&home, whose, "hostname").await;
        until(&format!("{from} reaches {whose}"), || async { greeted(&home, from, address).await == name }).await;
    }
    // Nobody else, by whatever address: not on the other network, nor in the router's own family. Nor with a route.
    let own = ip(&vm(&home, "router").await);
    sh(&home, "client", &format!("ip route add {dmz_server}/32 via {lan_router}")).await;
    sh(&home, "router", "echo 1 >/proc/sys/net/ipv4/ip_forward").await;
    for (from, address) in
        [("client", &dmz_server), ("client", &dmz_router), ("client", &own), ("server", &lan_client), ("server", &own)]
    {
        assert_eq!(greeted(&home, from, address).await, "", "{from} reaches {address}");
    }

    // A clone of a member has places of its own, and answers at them.
    let (made, clones) = fork(&home, "router", 1, &["h1"]).await;
    let clone = &*clones[0];
    let places = [at("lan", clone).await, at("dmz", clone).await];
    assert!(places[0] != lan_router && places[1] != dmz_router, "{places:?}");
    let name = sh(&home, clone, "hostname").await;
    for (from, address) in [("client", &places[0]), ("server", &places[1])] {
        until("the clone is reached", || async { greeted(&home, from, address).await == name }).await;
    }
    let parent = sh(&home, "router", "hostname").await;
    for (from, address) in [("client", &lan_router), ("server", &dmz_router), (clone, &lan_router), (clone, &own)] {
        until("the parent is reached as before", || async { greeted(&home, from, address).await == parent }).await;
    }
    assert_eq!(greeted(&home, clone, &lan_client).await, sh(&home, "client", "hostname").await);
    let (code, _) = refused(home.remove_network("lan").await);
    assert_eq!(code, ErrorCode::InUse);

    home.remove_vm(clone, true).await.unwrap();
    home.remove_checkpoint(&made.parent.checkpoint.id.to_string()).await.unwrap();
    let (done, text) = ramet("down", FILE).await;
    assert!(done, "{text}");
    assert!(names(&home).await.is_empty() && home.networks().await.unwrap().networks.is_empty());
    assert_nothing_left(&lab, 1).await;
    assert_no_network_left(&lab, 1).await;
    let (done, text) = ramet("down", FILE).await;
    assert!(done, "what is gone is gone: {text}");
    lab.down().await.unwrap();
}
