//! Who a clone is: addresses, names, clocks, entropy, hooks, signals - as programs in a Debian guest see them.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use ramet_client::{Client, api};
use ramet_lab::{Lab, LabOptions};
use ramet_memory::ByteSize;
use std::{collections::BTreeSet, time::Duration};
use support::*;

/// Sends back what it gets.
const ECHO: &str = r#"
import socket
s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); s.bind(("", 7000)); s.listen()
while True:
    c, _ = s.accept()
    while True:
        b = c.recv(64)
        if not b: break
        c.sendall(b)
"#;

/// Talks over one connection for as long as that lives, and says how it ended.
const TALK: &str = r#"
import socket, sys, time
c = socket.create_connection((sys.argv[1], 7000))
n = 0
try:
    while True:
        c.sendall(b"x")
        if not c.recv(1): print("ended: closed", flush=True); break
        n += 1
        open("/dev/shm/talked", "w").write(str(n))
        time.sleep(0.1)
except OSError as e:
    print("ended:", e, flush=True)
time.sleep(100000)
"#;

/// Draws random numbers without pause.
const DRAW: &str = r#"
import os
f = open("/dev/shm/drawn", "w", buffering=1)
while True: f.write(os.urandom(16).hex() + "\n")
"#;

/// Says which signals it gets, after it has subscribed where it is told to.
const LISTEN: &str = r#"
import signal, socket, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [44])
if sys.argv[1] == "yes":
    s = socket.socket(socket.AF_UNIX); s.connect("/run/ramet/agent.sock"); s.sendall(b'{"subscribe":"signal"}\n')
    print(s.recv(256).decode().strip(), flush=True)
else:
    print("no", flush=True)
while True:
    i = signal.sigwaitinfo([44])
    # Where a child's status would be, a signal of sigqueue has its value.
    print("signal", i.si_signo, i.si_status, flush=True)
"#;

/// Has what its clone has without wanting to: a secret, a generator of its own, a socket at the address of before.
const KEEP: &str = r#"
import os, random, socket, sys, time
r = random.Random(os.urandom(16)); secret = os.urandom(16).hex()
s = socket.socket(); s.bind((sys.argv[1], 7001)); s.listen()
print("up", flush=True)
while not os.path.exists("/dev/shm/go"): time.sleep(0.1)
print("kept", secret, r.getrandbits(64), *s.getsockname(), flush=True)
time.sleep(100000)
"#;

/// Expects no signal at all.
const SLEEPER: &str = "import time\nprint('up', flush=True)\ntime.sleep(100000)\n";

async fn number(client: &Client, vm: &str, path: &str) -> u64 {
    sh(client, vm, &format!("cat {path} 2>/dev/null || echo 0")).await.parse().unwrap_or(0)
}

fn frozen(count: u32, hosts: &[&str]) -> api::ForkRequest {
    api::ForkRequest { quiesce: api::Quiesce { freeze: true, ..Default::default() }, ..fork_of(clones(count, hosts)) }
}

/// One boot for all of it: booting is what takes time.
#[tokio::test]
async fn clones_are_machines_of_their_own() {
    // The other host has not the image: what it needs of it comes from the first.
    let options = LabOptions::for_test("identity").unwrap().hosts(2).without_images(2);
    let lab = Lab::up(&options.daemon_arg("--pool").daemon_arg("0")).await.unwrap();
    let (home, away) = (lab.client(1), lab.client(2));
    let parent = run_web(&home, "web").await;
    // A sibling to talk with, on the other host.
    let (_, first) = fork(&home, "web", 1, &["h2"]).await;
    python(&away, &first[0], "echo", ECHO, "").await;
    let peer = ip(&vm(&away, &first[0]).await);
    until("it listens", || async { sh(&away, &first[0], "ss -ltn | grep -c :7000 || true").await != "0" }).await;
    python(&home, "web", "talk", TALK, &peer).await;
    python(&home, "web", "draw", DRAW, "").await;
    for (name, subscribes) in [("told", "yes"), ("untold", "no")] {
        python(&home, "web", name, LISTEN, subscribes).await;
        until("it is set up", || async { !printed(&home, "web", name).await.is_empty() }).await;
    }
    assert!(printed(&home, "web", "told").await.contains("\"ok\":true"));
    let sleeper = python(&home, "web", "sleeper", SLEEPER, "").await;
    python(&home, "web", "keep", KEEP, &ip(&parent)).await;
    until("it has it", || async { printed(&home, "web", "keep").await == "up" }).await;
    sh(&home, "web", "mkdir -p /etc/ssh; echo the key of web >/etc/ssh/ssh_host_x_key; echo password >/etc/secret")
        .await;
    let dir = "/etc/ramet/clone.d";
    sh(&home, "web", &format!("mkdir -p {dir}; touch {dir}/README")).await;
    let line = "echo \"$1 $RAMET_CLONE_NUMBER $RAMET_IP $RAMET_MAC $RAMET_PARENT $RAMET_NAME\" >>/run/hooks";
    for hook in ["20-second", "10-first"] {
        put(&home, "web", &format!("{dir}/{hook}"), 0o755, &format!("#!/bin/sh\n{}\n", line.replace("$1", hook))).await;
    }
    until("it talks", || async { number(&home, "web", "/dev/shm/talked").await > 3 }).await;
    until("it draws", || async { sh(&home, "web", "wc -l </dev/shm/drawn").await != "0" }).await;
    let before = home.time("web").await.unwrap();

    let made = home.fork("web", &frozen(2, &["h1", "h2"])).await.unwrap();
    let clones: Vec<_> = made.clones.iter().map(|c| c.vm.name.clone()).collect();
    let mut machines = vec![parent.clone()];
    for (number, name) in (1_u64..).zip(&clones) {
        let client = if number == 1 { &home } else { &away };
        let info = vm(client, name).await;
        who_it_is(client, &info, number, &parent).await;
        clock(client, name, &before).await;
        until("its hooks were run", || async {
            sh(client, name, "cat /run/hooks 2>/dev/null || true").await.lines().count() == 2
        })
        .await;
        let rest = format!("{number} {} {} {} {name}", ip(&info), mac(&info), parent.id);
        assert_eq!(sh(client, name, "cat /run/hooks").await, format!("10-first {rest}\n20-second {rest}"));
        let told = format!("signal 44 {number}");
        until("who subscribed is told", || async { printed(client, name, "told").await.contains(&told) }).await;
        assert_eq!(printed(client, name, "untold").await, "no", "who did not is not");
        assert_eq!(sh(client, name, &format!("cat /proc/{sleeper}/comm")).await, "python3", "and lives");
        let talk = || async { printed(client, name, "talk").await };
        until("the connection of the parent has ended in the clone", || async { talk().await.contains("ended") }).await;
        machines.push(info);
    }
    let signals = printed(&home, "web", "told").await;
    assert!(!signals.contains("signal"), "the parent is no clone: {signals}");
    let talked = number(&home, "web", "/dev/shm/talked").await;
    until("the connection lives on in the parent", || async {
        number(&home, "web", "/dev/shm/talked").await > talked + 3
    })
    .await;
    assert_eq!(printed(&home, "web", "talk").await, "");
    let different = |of: &dyn Fn(&api::VmInfo) -> String| machines.iter().map(of).collect::<BTreeSet<_>>().len();
    assert_eq!((different(&ip), different(&mac)), (3, 3), "{machines:?}");
    // Every one of them answers at its own address.
    for machine in &machines {
        let from = if machine.host == "h2" { (&home, "web") } else { (&away, first[0].as_str()) };
        assert_eq!(sh(from.0, from.1, &fetch(&ip(machine))).await, "200", "{} at {}", machine.name, ip(machine));
    }
    what_is_not_changed([(&home, "web"), (&home, &clones[0]), (&away, &clones[1])]).await;
    no_number_twice(&home, &away, &clones).await;
    new_driver_and_new_boot(&lab, &parent, &machines[1..]).await;
    lab.down().await.unwrap();
}

/// Secrets, keys, generators of programs and the addresses that sockets are bound to are the parent's in all of them.
async fn what_is_not_changed(machines: [(&Client, &str); 3]) {
    let mut kept = BTreeSet::new();
    for (client, name) in machines {
        sh(client, name, "touch /dev/shm/go").await;
        until("it tells", || async { printed(client, name, "keep").await.contains("kept") }).await;
        kept.insert(printed(client, name, "keep").await);
        assert_eq!(
            sh(client, name, "cat /etc/secret /etc/ssh/ssh_host_x_key").await,
            "password\nthe key of web",
            "{name}"
        );
    }
    assert_eq!(kept.len(), 1, "{kept:?}");
}

/// A clone's driver is bound anew, and then all of the machines boot anew: each speaks as itself or not at all, and is told
/// again who it is. One clone is where its parent is, one on a host that has not the image.
async fn new_driver_and_new_boot(lab: &Lab, parent: &api::VmInfo, machines: &[api::VmInfo]) {
    let home = lab.client(1);
    sh(&home, "web", "systemctl stop t-talk").await;
    // Whatever a clone says comes in at a tap; those of clones that boot anew are not there yet.
    let hear = |host| Capture::new(&family_space(lab, host, parent), &["-i", "any", "-Q", "in"]);
    let captures = [hear(1), hear(2)];
    let [one, _] = machines else { panic!("two clones") };
    let device = "d=$(basename $(readlink /sys/class/net/eth0/device)); cd /sys/bus/virtio/drivers/virtio_net";
    sh(&home, &one.name, &format!("{device}; echo $d >unbind; echo $d >bind")).await;
    let address = "cat /sys/class/net/eth0/address; ip -4 -o addr show dev eth0 | awk '{print $4}'";
    let there = || async { sh(&home, &one.name, address).await == format!("{}\n{}/10", mac(one), ip(one)) };
    until("the card is back, with its own addresses", there).await;
    until("it reaches its parent", || async { sh(&home, &one.name, &fetch(&ip(parent))).await == "200" }).await;
    until("it is reached", || async { sh(&home, "web", &fetch(&ip(one))).await == "200" }).await;

    let boot = "cat /proc/sys/kernel/random/boot_id";
    let before = sh(&home, "web", boot).await;
    for machine in machines {
        let client = lab.client(if machine.host == "h1" { 1 } else { 2 });
        let (name, before) = (machine.name.as_str(), sh(&client, &machine.name, boot).await);
        let pid = vm(&client, name).await.pid;
        sh(&client, name, "echo kept >/root/kept; sync").await;
        let _ = client.exec_collect(name, ["sh", "-c", "echo b >/proc/sysrq-trigger"]).await;
        boots_anew(&client, machine, &before).await;
        let now = vm(&client, name).await;
        assert_eq!(
            (now.state, now.id, ip(&now), mac(&now)),
            (api::VmState::Running, machine.id, ip(machine), mac(machine))
        );
        assert!(now.pid.is_some() && now.pid != pid, "another QEMU, which has a kernel");
        assert_eq!((now.parent, now.checkpoint), (machine.parent, None), "a clone, and no view of a checkpoint");
        assert_eq!(sh(&client, name, "hostname; cat /root/kept").await, format!("{name}\nkept"), "its own disk");
        assert_eq!(sh(&client, name, "cat /sys/class/net/eth0/address").await, mac(machine));
        until("it reaches its parent", || async { sh(&client, name, &fetch(&ip(parent))).await == "200" }).await;
        until("it is reached", || async { sh(&home, "web", &fetch(&ip(machine))).await == "200" }).await;
        let (_, made) = fork(&client, name, 1, &[]).await;
        let child = vm(&client, &made[0]).await;
        assert_eq!((child.generation, child.parent), (now.generation + 1, Some(now.id)));
        assert_eq!(sh(&client, &child.name, "hostname; cat /root/kept").await, format!("{}\nkept", child.name));
        assert_eq!(sh(&client, name, &fetch(&ip(&child))).await, "200", "a clone of it is a machine of its own");
    }
    let _ = home.exec_collect("web", ["sh", "-c", "echo b >/proc/sysrq-trigger"]).await;
    boots_anew(&home, parent, &before).await;
    until("it answers again", || async { sh(&home, "web", &fetch(&ip(parent))).await == "200" }).await;
    for capture in captures {
        let lines = capture.end();
        let leaked = as_parent(&lines, parent);
        assert!(leaked.is_empty(), "{leaked:#?}");
        assert!(machines.iter().any(|m| lines.iter().any(|l| speaks_as(l, &mac(m), &ip(m)))), "its own are seen");
    }
}

/// Wherever in the exchange of its QEMU: the clone boots, is told who it is, and nothing is left of the QEMU before.
#[tokio::test]
async fn a_clone_whose_daemon_dies_while_it_boots_anew_boots_all_the_same() {
    let mut lab = lab("anew", 1).await;
    let home = lab.client(1);
    let request = api::RunRequest {
        name: Some("web".into()),
        memory: ByteSize::mib(128),
        network: Some(api::Egress::None),
        wait_agent_s: 240,
        ..api::RunRequest::new("default")
    };
    home.run(&request).await.unwrap();
    let (_, made) = fork(&home, "web", 1, &[]).await;
    let machine = vm(&home, &made[0]).await;
    let state = state_dir(&lab, 1).await;
    for pause in [0, 40, 120, 250] {
        // Of a clone again, each time.
        let (_, made) = fork(&home, &machine.name, 1, &[]).await;
        let clone = vm(&home, &made[0]).await;
        let before = sh(&home, &clone.name, "cat /proc/sys/kernel/random/boot_id").await;
        let _ = home.exec_collect(&clone.name, ["sh", "-c", "echo b >/proc/sysrq-trigger"]).await;
        let id = clone.id.to_string();
        until_recorded(&state, "it gets another QEMU", |state| state["vms"][&id]["rebooting"] == true).await;
        tokio::time::sleep(Duration::from_millis(pause)).await;
        lab.kill_host_daemon(1).unwrap();
        lab.restart_host_daemon(1).await.unwrap();
        boots_anew(&home, &clone, &before).await;
        assert_eq!(sh(&home, &clone.name, "hostname").await, clone.name);
        assert_eq!(pids(&lab, 1, "qemu").len(), 3, "one for each VM");
        home.remove_vm(&clone.name, true).await.unwrap();
    }
    assert_eq!(sh(&home, &machine.name, "hostname").await, machine.name);

    // A guest that was booted boots anew by itself: while there is no daemon.
    let web = vm(&home, "web").await;
    let before = sh(&home, "web", "cat /proc/sys/kernel/random/boot_id").await;
    sh(&home, "web", "setsid sh -c 'sleep 1; echo b >/proc/sysrq-trigger' </dev/null >/dev/null 2>&1 &").await;
    lab.kill_host_daemon(1).unwrap();
    tokio::time::sleep(Duration::from_secs(3)).await;
    lab.restart_host_daemon(1).await.unwrap();
    boots_anew(&home, &web, &before).await;
    lab.down().await.unwrap();
}

/// Of what came in at all devices of a family's namespace: what came in at a clone's tap in its parent's name.
fn as_parent<'a>(lines: &'a [String], parent: &api::VmInfo) -> Vec<&'a String> {
    let tap = &parent.network.as_ref().unwrap().tap;
    let of_clone = |l: &&String| l.split(' ').nth(1).is_some_and(|i| i.starts_with('t') && i != tap);
    lines.iter().filter(of_clone).filter(|l| speaks_as(l, &mac(parent), &ip(parent))).collect()
}

/// Waits until a machine has booted since, and was told who it is.
async fn boots_anew(client: &Client, machine: &api::VmInfo, before: &str) {
    let who = "cat /proc/sys/kernel/random/boot_id /run/ramet/id";
    until_within(4 * LIMIT, "it has booted anew and knows who it is", || async {
        let info = vm(client, &machine.name).await;
        assert_eq!(info.state_reason.filter(|_| info.state == api::VmState::Crashed), None);
        let id = client.exec_collect(&machine.name, ["sh", "-c", who]).await;
        id.is_ok_and(|id| !id.text().contains(before) && id.text().contains(&format!("{}\"", ip(machine))))
    })
    .await;
}

async fn who_it_is(client: &Client, info: &api::VmInfo, number: u64, parent: &api::VmInfo) {
    let name = &info.name;
    let id: serde_json::Value = serde_json::from_str(&sh(client, name, "cat /run/ramet/id").await).unwrap();
    assert_eq!(id["clone_number"], number, "{id}");
    assert_eq!((&id["generation"], &id["reseeded"]), (&1.into(), &true.into()), "{id}");
    assert_eq!(
        (id["vm_id"].as_str().unwrap(), id["parent"].as_str().unwrap()),
        (&*info.id.to_string(), &*parent.id.to_string())
    );
    let nic = &id["nics"][0];
    assert_eq!((nic["ip"].as_str().unwrap(), nic["mac"].as_str().unwrap()), (&*ip(info), &*mac(info)));
    assert_eq!(sh(client, name, "cat /run/ramet/generation").await, "1");
    assert_eq!(sh(client, name, "hostname").await, *name);
    assert_eq!(sh(client, name, "cat /etc/machine-id").await, info.id.to_string());
    assert_eq!(sh(client, name, "cat /sys/class/net/eth0/address").await, mac(info));
    let addresses = sh(client, name, "ip -4 -o addr show dev eth0 | awk '{print $4}'").await;
    assert!(addresses.lines().count() == 1 && addresses.starts_with(&format!("{}/", ip(info))), "{addresses}");
    let gateway = sh(client, name, "ip route show default | awk '{print $3}'").await;
    let neighbour = sh(client, name, &format!("ip neigh show {gateway}")).await;
    assert!(neighbour.contains("PERMANENT"), "{neighbour}");
}

async fn clock(client: &Client, name: &str, before: &api::GuestTime) {
    let now = client.time(name).await.unwrap();
    assert!(now.offset_ns.unsigned_abs() < 2_000_000_000, "{now:?}");
    assert!(now.monotonic_ns >= before.monotonic_ns, "{now:?} {before:?}");
}

/// A value that two machines drew was drawn before they were two.
async fn no_number_twice(home: &Client, away: &Client, clones: &[String]) {
    let mut drawn = Vec::new();
    for (client, name) in [(home, "web"), (home, clones[0].as_str()), (away, clones[1].as_str())] {
        sh(client, name, "systemctl stop t-draw").await;
        let file = client.get_file(name, "/dev/shm/drawn").await.unwrap().read_to_end(256 << 20).await.unwrap();
        let text = String::from_utf8(file).unwrap();
        drawn.push(text.lines().filter(|l| l.len() == 32).map(str::to_owned).collect::<Vec<_>>());
    }
    let [parent, one, two] = &drawn[..] else { panic!("three") };
    let common = one.iter().zip(two).take_while(|(a, b)| a == b).count();
    let with_parent = one.iter().zip(parent).take_while(|(a, b)| a == b).count();
    // What stood still at the same point goes on from there, and no number that follows is anybody else's.
    let all: Vec<_> = [&parent[with_parent..], &one[common..], &two[common..]].concat();
    let set: BTreeSet<_> = all.iter().collect();
    assert_eq!(set.len(), all.len(), "a number was drawn twice");
    for (name, list) in [("parent", parent), ("one", one), ("two", two)] {
        assert!(list.len() > common.max(with_parent), "{name} drew after the fork");
    }
    assert_eq!(common, with_parent, "clones and parent part at the same number");
}

#[tokio::test]
async fn hooks_and_agents_that_fail_leave_everything_as_it_was() {
    let lab = lab("hooks", 1).await;
    let home = lab.client(1);
    run_web(&home, "web").await;
    let hook = |dir: &str, text: &str| {
        let (home, path, text) = (home.clone(), format!("/etc/ramet/{dir}.d/50-mine"), format!("#!/bin/sh\n{text}\n"));
        let dir = format!("mkdir -p /etc/ramet/{dir}.d");
        async move {
            sh(&home, "web", &dir).await;
            put(&home, "web", &path, 0o755, &text).await;
        }
    };
    let options = |limit| api::CloneOptions { hook_limit_s: limit, ..Default::default() };
    let with =
        |options| api::ForkRequest { clones: api::CloneRequest { options, ..clones(1, &[]) }, ..Default::default() };
    let untouched = || async {
        assert_eq!(names(&home).await, ["web"]);
        assert!(home.checkpoints().await.unwrap().checkpoints.is_empty());
        assert_eq!(vm(&home, "web").await.state, api::VmState::Running);
        assert_eq!(sh(&home, "web", &fetch("127.0.0.1")).await, "200", "its applications run");
    };

    hook("clone", "echo no disk left >&2; exit 3").await;
    let (_, text) = refused(home.fork("web", &with(options(30))).await);
    assert!(text.contains("50-mine") && text.contains("exit code 3") && text.contains("no disk left"), "{text}");
    untouched().await;
    hook("clone", "sleep 1000").await;
    let (_, text) = refused(home.fork("web", &with(options(2))).await);
    assert!(text.contains("50-mine") && text.contains("time limit"), "{text}");
    untouched().await;
    let made = home.fork("web", &with(api::CloneOptions { hooks: false, ..options(2) })).await.unwrap();
    assert_eq!(sh(&home, &made.clones[0].vm.name, "hostname").await, made.clones[0].vm.name);
    home.remove_vm(&made.clones[0].vm.name, true).await.unwrap();
    home.remove_checkpoint(&made.parent.checkpoint.id.to_string()).await.unwrap();
    sh(&home, "web", "rm -r /etc/ramet/clone.d").await;

    let checkpoint = |limit_s, hooks| api::CheckpointRequest {
        quiesce: api::Quiesce { freeze: true, limit_s, hooks, ..Default::default() },
        ..Default::default()
    };
    hook("checkpoint", "echo not now; exit 4").await;
    let (_, text) = refused(home.checkpoint("web", &checkpoint(30, true)).await);
    assert!(text.contains("50-mine") && text.contains("not now"), "{text}");
    untouched().await;
    hook("checkpoint", "sleep 1000").await;
    let begin = std::time::Instant::now();
    let (_, text) = refused(home.checkpoint("web", &checkpoint(2, true)).await);
    assert!(text.contains("50-mine") && text.contains("time limit"), "{text}");
    assert!(begin.elapsed().as_secs() < 30, "within the limit");
    untouched().await;
    sh(&home, "web", "rm -r /etc/ramet/checkpoint.d").await;

    unseeded(&home, &with).await;
    untouched().await;
    silent(&home, &checkpoint(2, true)).await;
    untouched().await;
    lab.down().await.unwrap();
}

/// A guest whose kernel can't be given entropy.
async fn unseeded(home: &Client, with: &dyn Fn(api::CloneOptions) -> api::ForkRequest) {
    sh(home, "web", "mount --bind /dev/null /dev/random").await;
    let (_, text) = refused(home.fork("web", &with(api::CloneOptions::default())).await);
    assert!(text.contains("reseed") && text.contains("allow-unseeded"), "{text}");
    assert_eq!(names(home).await, ["web"]);
    let unseeded = api::CloneOptions { allow_unseeded: true, ..Default::default() };
    let made = home.fork("web", &with(unseeded)).await.unwrap();
    let name = &made.clones[0].vm.name;
    assert!(sh(home, name, "cat /run/ramet/id").await.contains("\"reseeded\":false"));
    home.remove_vm(name, true).await.unwrap();
    home.remove_checkpoint(&made.parent.checkpoint.id.to_string()).await.unwrap();
    sh(home, "web", "umount /dev/random").await;
}

/// A guest whose agent does not answer.
async fn silent(home: &Client, checkpoint: &api::CheckpointRequest) {
    // It goes on by itself after a while, or nobody could set it going.
    let stop = "pid=$(systemctl show -p MainPID --value ramet-agent); kill -STOP $pid; sleep 25; kill -CONT $pid";
    sh(home, "web", &format!("systemd-run -q --slice=ramet.slice --unit=t-stop sh -c '{stop}'; sleep 0.1")).await;
    until("the agent is silent", || async { home.ping("web").await.is_err() }).await;
    let begin = std::time::Instant::now();
    let answer = home.checkpoint("web", checkpoint).await;
    let took = begin.elapsed();
    let (code, text) = refused(answer);
    assert_eq!(code, api::ErrorCode::AgentSilent, "{text}");
    assert!(took.as_secs() < 25, "it waits no longer than it was told");
    assert_eq!(vm(home, "web").await.state, api::VmState::Running);
    until("the agent answers again", || async { home.ping("web").await.is_ok() }).await;
}

/// Asks for an address by DHCP whenever the card is another one, as clients do that a distribution brings.
const DHCP: &str = r#"
import os, socket, struct, time
def card():
    try: return bytes.fromhex(open("/sys/class/net/eth0/address").read().strip().replace(":", ""))
    except OSError: return None
def ask(s, mac, kind, more):
    options = b"\x63\x82\x53\x63\x35\x01" + bytes([kind]) + more + b"\xff"
    bootp = struct.pack("!BBBBIHH16x", 1, 1, 6, 0, 7, 0, 0x8000) + mac + bytes(202) + options
    udp = struct.pack("!HHHH", 68, 67, 8 + len(bootp), 0) + bootp
    head = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0, bytes(4), b"\xff" * 4)
    total = sum(struct.unpack("!10H", head))
    total = (total & 0xffff) + (total >> 16)
    head = head[:10] + struct.pack("!H", ~total & 0xffff) + head[12:]
    s.sendto(head + udp, ("eth0", 0x0800, 0, 0, b"\xff" * 6))
    while True:
        p = s.recv(2048)
        p = p[(p[0] & 15) * 4:] if p[9] == 17 else b""
        if p[2:4] != b"\x00\x44" or len(p) < 250: continue
        said, rest = {}, p[8 + 240:]
        while rest and rest[0] != 255:
            said[rest[0]], rest = rest[2:2 + rest[1]], rest[2 + rest[1]:]
        return p[24:28], said
done = None
while True:
    mac = card()
    if mac and mac != done:
        try:
            os.system("ip link set eth0 up")
            s = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800))
            s.bind(("eth0", 0x0800)); s.settimeout(3)
            ip, said = ask(s, mac, 1, b"")
            ip, said = ask(s, mac, 3, b"\x32\x04" + ip + b"\x36\x04" + said[54])
            bits = bin(int.from_bytes(said[1], "big")).count("1")
            os.system("ip addr flush dev eth0; ip addr add %s/%d dev eth0" % (socket.inet_ntoa(ip), bits))
            os.system("ip route replace default via %s" % socket.inet_ntoa(said[3][:4]))
            done = mac
        except (OSError, KeyError) as e: print(e, flush=True)
    elif not mac: done = None
    time.sleep(0.3)
"#;

#[tokio::test]
async fn clones_without_an_agent_get_another_card_and_ask_for_their_address() {
    let lab = lab("untold", 2).await;
    let home = lab.client(1);
    let parent = run_web(&home, "web").await;
    put(&home, "web", "/root/dhcp.py", 0o755, DHCP).await;
    let unit = "[Service]\nExecStart=python3 -u /root/dhcp.py\n[Install]\nWantedBy=multi-user.target\n";
    put(&home, "web", "/etc/systemd/system/t-dhcp.service", 0o644, unit).await;
    let without = "systemctl enable -q t-dhcp; systemctl disable -q ramet-agent; rm -f /usr/bin/ramet-agent; sync";
    sh(&home, "web", without).await;
    let _ = home.exec_collect("web", ["sh", "-c", "echo b >/proc/sysrq-trigger"]).await;
    // As the gateway: nobody in the guest can be asked.
    let answers = |host: usize, vm: &api::VmInfo| {
        let words = ["sh", "-c", &fetch(&ip(vm))].map(str::to_owned);
        let space = family_space(&lab, host, vm);
        move || told_within(&space, &[&words[0], &words[1], &words[2]]).trim() == "200"
    };
    let parent_answers = answers(1, &parent);
    until("the parent is down", || async { !parent_answers() }).await;
    until_within(4 * LIMIT, "it has booted without an agent and asked for its address", || async { parent_answers() })
        .await;
    assert!(!vm(&home, "web").await.agent);

    let wish = |options| {
        let clones = api::CloneRequest { options, wait_agent_s: 5, ..clones(2, &["h1", "h2"]) };
        api::ForkRequest { clones, ..Default::default() }
    };
    let (code, text) = refused(home.fork("web", &wish(api::CloneOptions::default())).await);
    assert_eq!(code, api::ErrorCode::AgentSilent);
    assert!(text.contains("allow-unseeded") && text.contains("DHCP"), "{text}");
    assert_eq!(names(&home).await, ["web"], "nothing was made");
    assert!(home.checkpoints().await.unwrap().checkpoints.is_empty());

    let capture = Capture::new(&family_space(&lab, 1, &parent), &["-i", "any", "-Q", "in"]);
    let unseeded = api::CloneOptions { allow_unseeded: true, ..Default::default() };
    let made = home.fork("web", &wish(unseeded)).await.unwrap();
    for (host, clone) in (1..).zip(&made.clones) {
        assert!(!clone.vm.agent && clone.answered_us.is_none() && clone.ready_us.is_some(), "{clone:?}");
        let there = answers(host, &clone.vm);
        until("the clone has asked for its address and answers there", || async { there() }).await;
    }
    assert!(parent_answers(), "the parent goes on");
    let lines = capture.end();
    let leaked = as_parent(&lines, &parent);
    assert!(leaked.is_empty(), "{leaked:#?}");
    lab.down().await.unwrap();
}
