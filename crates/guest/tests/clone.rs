//! What the real agent does around a checkpoint: identity, freeze, hooks, signals. Below a root of its own, and in a
//! network namespace where it changes addresses.
#![allow(clippy::unwrap_used, reason = "helpers of tests, too")]

use ramet_guest::host::{AgentClient, AgentError, ExecRequest};
use ramet_guest::protocol::{CloneEvent, Freeze, HookResult, Identity, IdentityAck, NicIdentity, Release, SIGCLONE};
use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::os::unix::net::UnixStream as StdStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use tokio::net::UnixStream;

const LIMIT: Duration = Duration::from_secs(30);
const AGENT: &str = env!("CARGO_BIN_EXE_ramet-agent");

/// An agent with a root of its own; killed at the end.
struct Agent {
    child: Child,
    root: tempfile::TempDir,
}

impl Agent {
    fn at(&self, path: &str) -> PathBuf {
        self.root.path().join(path)
    }

    fn read(&self, path: &str) -> String {
        std::fs::read_to_string(self.at(path)).unwrap()
    }

    fn hook(&self, path: &str, script: &str) {
        put(&self.at("etc/ramet").join(path), &format!("#!/bin/sh\n{script}\n"));
        std::fs::set_permissions(self.at("etc/ramet").join(path), PermissionsExt::from_mode(0o755)).unwrap();
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn put(path: &Path, text: &str) {
    std::fs::create_dir_all(path.parent().unwrap()).unwrap();
    std::fs::write(path, text).unwrap();
}

/// Starts an agent by a command that runs another one.
async fn start_in(root: tempfile::TempDir, within: &[&str]) -> (Agent, AgentClient) {
    let (ours, theirs) = StdStream::pair().unwrap();
    let argv: Vec<&str> = within.iter().copied().chain([AGENT, "--root"]).collect();
    let child = Command::new(argv[0])
        .args(&argv[1..])
        .arg(root.path())
        .args(["serve", "--stdin"])
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .spawn()
        .unwrap();
    let agent = Agent { child, root };
    ours.set_nonblocking(true).unwrap();
    (agent, AgentClient::over(UnixStream::from_std(ours).unwrap(), LIMIT).await.unwrap())
}

async fn start() -> (Agent, AgentClient) {
    start_in(tempfile::tempdir().unwrap(), &[]).await
}

fn identity(number: u32) -> Identity {
    Identity {
        clone_number: number,
        generation: 4,
        family: "the-family".into(),
        parent: Some("the-parent".into()),
        vm_id: format!("vm-{number}"),
        name: format!("web-{number}"),
        entropy: "5a".repeat(64),
        ..Identity::default()
    }
}

/// All but the reseeding, for which one must be root.
fn assert_done(ack: &IdentityAck) {
    for step in &ack.steps {
        assert!(step.ok || (step.name == "reseed" && !is_root()), "{ack:#?}");
    }
    assert_eq!((ack.ok, ack.reseeded), (is_root(), is_root()), "{ack:#?}");
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

fn release() -> Release {
    Release { hooks: true, signal: true, limit_ms: 20_000 }
}

fn names(hooks: &[HookResult]) -> Vec<&str> {
    hooks.iter().map(|hook| hook.name.as_str()).collect()
}

async fn until(what: &str, mut done: impl FnMut() -> bool) {
    let begun = Instant::now();
    while !done() {
        assert!(begun.elapsed() < LIMIT, "{what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn hooks_run_around_a_checkpoint_and_the_agent_answers_meanwhile() {
    let (agent, client) = start().await;
    assert_eq!(client.guest().generation, None);
    let none = Freeze { limit_ms: 20_000, hooks: true, ..Freeze::default() };
    let ack = client.freeze(&none).await.unwrap();
    assert!(ack.ok && !ack.frozen && ack.hooks.is_empty(), "no hooks, nothing to do: {ack:?}");

    let go = agent.at("go");
    agent.hook("checkpoint.d/1-slow", &format!("while ! test -e {}; do sleep 0.01; done; echo barrier", go.display()));
    agent.hook("checkpoint.d/2-next", "echo $RAMET_HOOK");
    agent.hook("clone.d/1-bad", "echo to the log >&2; exit 7");
    agent.hook("clone.d/2-good", "echo $RAMET_HOOK $RAMET_CLONE_NUMBER $RAMET_NAME $RAMET_FAMILY $RAMET_VM_ID");
    let freezing = tokio::spawn({
        let client = client.clone();
        let request = Freeze { sync: true, ..none.clone() };
        async move { client.freeze(&request).await }
    });
    for _ in 0..20 {
        client.ping().await.unwrap();
    }
    assert!(!freezing.is_finished());
    std::fs::write(&go, "").unwrap();
    let ack = freezing.await.unwrap().unwrap();
    assert!(ack.ok && ack.error.is_none(), "{ack:?}");
    assert_eq!(names(&ack.hooks), ["1-slow", "2-next"]);
    assert_eq!(ack.hooks[0].output, "barrier\n");
    assert_eq!(ack.hooks[1].output, "checkpoint\n");

    // Where there is no SSH server there are no keys to make.
    let ack = client.identity(&Identity { ssh_host_keys: true, ..identity(3) }).await.unwrap();
    assert_done(&ack);
    assert!(!agent.at("run/ramet/generation").exists(), "files must not keep a clone from its network");
    let ack = client.release(&release()).await.unwrap();
    assert_eq!(agent.read("run/ramet/generation"), "4\n");
    assert!(!ack.ok && ack.thawed && ack.signalled == 0, "{ack:?}");
    assert!(ack.error.unwrap().contains("1-bad"));
    assert_eq!((ack.hooks[0].exit, ack.hooks[0].output.as_str()), (Some(7), "to the log\n"));
    assert_eq!(ack.hooks[1].output, "clone 3 web-3 the-family vm-3\n");

    // A failing hook ends the freeze, and so does a thaw, also in the middle of a hook.
    agent.hook("checkpoint.d/1-slow", "exit 1");
    let ack = client.freeze(&none).await.unwrap();
    assert!(!ack.ok && !ack.frozen && ack.error.unwrap().contains("1-slow"));
    assert_eq!(names(&ack.hooks), ["1-slow"]);
    let begun = agent.at("begun");
    agent.hook("checkpoint.d/1-slow", &format!("echo > {}; exec sleep 600", begun.display()));
    let freezing = tokio::spawn({
        let client = client.clone();
        let request = Freeze { limit_ms: 600_000, ..none };
        async move { client.freeze(&request).await }
    });
    until("the hook did not begin", || begun.exists()).await;
    let ack = client.thaw().await.unwrap();
    assert!(ack.ok, "{ack:?}");
    let ack = freezing.await.unwrap().unwrap();
    assert!(!ack.ok && ack.hooks[0].remark.as_ref().unwrap().contains("no longer wanted"), "{ack:?}");
    assert!(client.thaw().await.unwrap().ok, "a thaw may be repeated");
}

#[tokio::test]
async fn a_new_session_hears_of_the_generation_and_a_new_agent_knows_it_too() {
    let (mut agent, client) = start().await;
    client.identity(&identity(1)).await.unwrap();
    client.release(&release()).await.unwrap();
    client.close();
    until("the agent did not end", || agent.child.try_wait().unwrap().is_some()).await;
    let root = std::mem::replace(&mut agent.root, tempfile::tempdir().unwrap());
    let (agent, client) = start_in(root, &[]).await;
    assert_eq!(client.guest().generation, Some(4));
    let out = Command::new(AGENT).arg("--root").arg(agent.root.path()).args(["id", "--json"]).output().unwrap();
    assert!(String::from_utf8(out.stdout).unwrap().contains("\"web-1\""));
}

/// Removes a control group and ends what is in it.
struct Group(PathBuf);

impl Group {
    /// A new group, if there are groups of version 2 that may be written.
    fn new() -> Option<Self> {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
        let mount = mounts.lines().find(|line| line.contains(" - cgroup2 "))?.split(' ').nth(4)?;
        let path = Path::new(mount).join(format!("ramet-test-{}", std::process::id()));
        std::fs::create_dir(&path).ok()?;
        Some(Self(path))
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = std::fs::write(self.0.join("cgroup.kill"), "1");
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(5) {
            for entry in std::fs::read_dir(&self.0).into_iter().flatten().flatten() {
                let _ = std::fs::remove_dir(entry.path());
            }
            if std::fs::remove_dir(&self.0).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

#[tokio::test]
async fn applications_stand_still_from_the_freeze_to_the_release() {
    let Some(group) = Group::new() else {
        return println!("no control groups of version 2 that may be written: the freezer was not tested");
    };
    let root = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(root.path().join("sys/fs")).unwrap();
    symlink(&group.0, root.path().join("sys/fs/cgroup")).unwrap();
    let (agent, client) = start_in(root, &[]).await;

    // As a boot script starts it.
    let ticks = agent.at("ticks");
    std::fs::create_dir_all(group.0.join("ramet-apps")).unwrap();
    let script = format!(
        "echo 0 > {}/ramet-apps/cgroup.procs; while :; do echo >> {}; sleep 0.005; done",
        group.0.display(),
        ticks.display()
    );
    let mut app = Command::new("sh").args(["-c", &script]).spawn().unwrap();
    let count = || std::fs::metadata(&ticks).map_or(0, |found| found.len());
    let is_frozen =
        |name: &str| std::fs::read_to_string(group.0.join(name).join("cgroup.events")).unwrap().contains("frozen 1");
    until("the application does not run", || count() > 0).await;
    let group_of_exec = client.run(ExecRequest::new(["cat", "/proc/self/cgroup"]), b"", 10_000).await.unwrap();
    assert!(String::from_utf8(group_of_exec.stdout).unwrap().contains("/ramet-exec\n"));
    let limit_of_files = client.run(ExecRequest::new(["sh", "-c", "ulimit -n"]), b"", 100).await.unwrap();
    let own = Command::new("sh").args(["-c", "ulimit -n"]).output().unwrap();
    assert_eq!(limit_of_files.stdout, own.stdout);

    let request = Freeze { freeze: true, sync: true, hooks: true, limit_ms: 20_000 };
    agent.hook("checkpoint.d/barrier", "cat /proc/self/cgroup");
    let ack = client.freeze(&request).await.unwrap();
    assert!(ack.ok && ack.frozen, "{ack:?}");
    assert!(!ack.hooks[0].output.contains("ramet-exec") && !ack.hooks[0].output.contains("ramet-apps"));
    assert!(is_frozen("ramet-apps") && is_frozen("ramet-exec"));
    let frozen_at = count();
    for _ in 0..20 {
        client.ping().await.unwrap();
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(count(), frozen_at, "an application ran while frozen");
    // A command begins when all others do.
    let running = tokio::spawn({
        let client = client.clone();
        async move { client.run(ExecRequest::new(["echo", "late"]), b"", 100).await }
    });
    client.ping().await.unwrap();
    assert!(client.freeze(&request).await.unwrap().frozen, "a freeze may be repeated");
    assert!(!running.is_finished());

    // The hooks of a clone run before the applications do.
    let seen = agent.at("seen");
    agent.hook("clone.d/first", &format!("cp {} {}", ticks.display(), seen.display()));
    assert_done(&client.identity(&identity(2)).await.unwrap());
    assert!(is_frozen("ramet-apps"), "an identity lets nothing run");
    let ack = client.release(&release()).await.unwrap();
    assert!(ack.ok && ack.thawed, "{ack:?}");
    assert_eq!(std::fs::metadata(&seen).unwrap().len(), frozen_at);
    assert!(!is_frozen("ramet-apps"));
    until("the application does not run again", || count() > frozen_at).await;
    assert_eq!(running.await.unwrap().unwrap().stdout, b"late\n");

    // And the parent's.
    assert!(client.freeze(&request).await.unwrap().frozen);
    assert!(client.thaw().await.unwrap().ok);
    assert!(!is_frozen("ramet-apps"));
    // A freeze that fails leaves nothing frozen.
    agent.hook("checkpoint.d/barrier", "exit 1");
    assert!(!client.freeze(&request).await.unwrap().ok);
    assert!(!is_frozen("ramet-apps"));
    let no_time = Freeze { hooks: false, limit_ms: 0, ..request };
    let ack = client.freeze(&no_time).await.unwrap();
    assert!(!ack.ok && !ack.frozen, "{ack:?}");
    assert!(!is_frozen("ramet-apps"));
    app.kill().unwrap();
    app.wait().unwrap();
}

/// A network namespace's worth of a parent: `eth0` is a virtio NIC with an address.
const PARENT: &str = "\
set -e
ip link add eth0 address 02:00:00:00:00:02 type veth peer name far
ip link set lo up; ip link set far up; ip link set eth0 up
ip addr add 10.9.0.2/24 dev eth0
ip addr add 10.9.0.3/24 dev eth0
ip route add default via 10.9.0.1
hostname parent
shift 0; exec \"$@\"";

/// Puts a device with a driver where `sysfs` has it.
fn device(root: &Path, name: &str, pci: &str, virtio: &str, driver: &str) {
    let device = root.join("sys/devices/pci0000:00").join(pci).join(virtio);
    let driver = root.join("sys/bus/virtio/drivers").join(driver);
    let class = root.join("sys/class/net").join(name);
    for dir in [&device, &driver, &class] {
        std::fs::create_dir_all(dir).unwrap();
    }
    symlink(&driver, device.join("driver")).unwrap();
    symlink(&device, class.join("device")).unwrap();
}

/// A pair of connected TCP sockets on one address.
fn connection(to: &str) -> (TcpStream, TcpStream, TcpListener) {
    let listener = TcpListener::bind((to, 0)).unwrap();
    let ours = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (theirs, _) = listener.accept().unwrap();
    for stream in [&ours, &theirs] {
        stream.set_read_timeout(Some(LIMIT)).unwrap();
    }
    (ours, theirs, listener)
}

fn carries(ours: &mut TcpStream, theirs: &mut TcpStream) -> bool {
    let mut byte = [0];
    ours.write_all(b"x").is_ok() && theirs.read_exact(&mut byte).is_ok()
}

#[tokio::test]
async fn a_clone_gets_addresses_of_its_own_and_loses_the_connections_of_the_old() {
    let tools = Command::new("ip").arg("-V").stdout(Stdio::null()).status();
    let within = Command::new("unshare").args(["-n", "-u", "true"]).stderr(Stdio::null()).status();
    if !tools.is_ok_and(|s| s.success()) || !within.is_ok_and(|s| s.success()) {
        return println!("no `ip`, or no namespaces of its own: the network was not tested");
    }
    let root = tempfile::tempdir().unwrap();
    device(root.path(), "eth0", "0000:00:03.0", "virtio1", "virtio_net");
    device(root.path(), "disk", "0000:00:02.0", "virtio0", "virtio_blk");
    device(root.path(), "eth7", "0000:00:04.0", "virtio2", "virtio_net");
    put(&root.path().join("etc/hosts"), "127.0.0.1 localhost\n127.0.1.1 parent\n");
    put(&root.path().join("etc/hostname"), "parent\n");
    put(&root.path().join("etc/machine-id"), "old\n");
    put(&root.path().join("etc/resolv.conf"), "search lan\nnameserver 1.1.1.1\n");
    let (agent, client) = start_in(root, &["unshare", "-n", "-u", "sh", "-c", PARENT, "sh"]).await;
    let run = async |script: &str| {
        let out = client.run(ExecRequest::new(["sh", "-c", script]), b"", 100_000).await.unwrap();
        assert_eq!(out.code, 0, "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    };
    assert!(run("ip -o addr show dev eth0").await.contains("10.9.0.2/24"));

    // Sockets of the parent.
    let space = std::fs::File::open(format!("/proc/{}/ns/net", agent.child.id())).unwrap();
    let in_space = std::thread::spawn(move || {
        let kind = rustix::thread::LinkNameSpaceType::Network;
        rustix::thread::move_into_link_name_space(space.as_fd(), Some(kind)).unwrap();
        let udp = UdpSocket::bind("10.9.0.2:0").unwrap();
        udp.connect("10.9.0.2:9").unwrap();
        udp.set_nonblocking(true).unwrap();
        let mapped = TcpListener::bind("[::]:0").ok().map(|listener| {
            let ours = TcpStream::connect(("10.9.0.3", listener.local_addr().unwrap().port())).unwrap();
            (ours, listener.accept().unwrap().0)
        });
        (connection("10.9.0.2"), connection("127.0.0.1"), udp, mapped)
    });
    let ((mut ours, mut theirs, _listener), mut local, udp, mapped) = in_space.join().unwrap();
    assert!(carries(&mut ours, &mut theirs) && carries(&mut local.0, &mut local.1));

    let nic = NicIdentity {
        mac: "02:00:00:00:00:07".into(),
        ip: "10.9.0.7".into(),
        prefix: 24,
        gateway: Some("10.9.0.1".into()),
        gateway_mac: Some("02:00:00:00:00:01".into()),
        dns: vec!["10.9.0.1".into()],
        mtu: Some(1400),
        ..NicIdentity::default()
    };
    let wanted = Identity {
        nics: vec![nic.clone()],
        hostname: Some("web-7".into()),
        machine_id: Some("0123456789abcdef0123456789abcdef".into()),
        kill_sockets: true,
        ..identity(7)
    };
    let ack = client.identity(&wanted).await.unwrap();
    assert_done(&ack);
    assert_eq!(ack.steps[0].name, "reseed", "entropy comes first");

    let address = run("ip -o addr show dev eth0").await;
    assert_eq!(address.lines().count(), 1, "one address, and no IPv6: {address}");
    assert!(address.contains("10.9.0.7/24 brd 10.9.0.255"), "{address}");
    let link = run("ip link show dev eth0").await;
    assert!(link.contains("02:00:00:00:00:07") && link.contains("mtu 1400") && link.contains("UP"), "{link}");
    let route = run("ip route show default").await;
    assert!(route.starts_with("default via 10.9.0.1 dev eth0") && route.lines().count() == 1, "{route}");
    let neighbour = run("ip neigh show dev eth0").await;
    assert!(neighbour.contains("10.9.0.1 lladdr 02:00:00:00:00:01 PERMANENT"), "{neighbour}");
    assert_eq!(run("uname -n").await, "web-7\n");
    assert_eq!(agent.read("etc/hostname"), "parent\n", "a disk may be slow: files wait for the release");
    let released = client.release(&Release { hooks: false, ..release() }).await.unwrap();
    assert!(released.ok, "{released:?}");
    assert_eq!(agent.read("etc/hostname"), "web-7\n");
    assert_eq!(agent.read("etc/hosts"), "127.0.0.1 localhost\n127.0.1.1\tweb-7\n");
    assert_eq!(agent.read("etc/machine-id"), "0123456789abcdef0123456789abcdef\n");
    assert_eq!(agent.read("etc/resolv.conf"), "search lan\nnameserver 10.9.0.1\n");
    assert_eq!(agent.read("run/ramet/generation"), "4\n");
    let shown = Command::new(AGENT).arg("--root").arg(agent.root.path()).arg("id").output().unwrap();
    let shown = String::from_utf8(shown.stdout).unwrap();
    assert!(shown.contains("eth0        10.9.0.7/24 by 10.9.0.1, 02:00:00:00:00:07"), "{shown}");

    let killed = ack.steps.iter().find(|step| step.name == "sockets").unwrap().remark.clone().unwrap();
    println!("sockets: {killed}");
    if !killed.contains("cannot") {
        let aborted = |error: std::io::Error| assert_eq!(error.kind(), ErrorKind::ConnectionAborted, "{killed}");
        aborted(ours.read(&mut [0]).unwrap_err());
        aborted(theirs.read(&mut [0]).unwrap_err());
        aborted(udp.recv(&mut [0]).unwrap_err());
        if let Some((mut ours, mut theirs)) = mapped {
            aborted(ours.read(&mut [0]).unwrap_err());
            aborted(theirs.read(&mut [0]).unwrap_err());
        }
    }
    assert!(carries(&mut local.0, &mut local.1), "the machine's own connections stay");
    TcpStream::connect(local.2.local_addr().unwrap()).unwrap_err();

    // Once more the same: nothing is lost, since nothing is changed.
    let space = std::fs::File::open(format!("/proc/{}/ns/net", agent.child.id())).unwrap();
    let in_space = std::thread::spawn(move || {
        let kind = rustix::thread::LinkNameSpaceType::Network;
        rustix::thread::move_into_link_name_space(space.as_fd(), Some(kind)).unwrap();
        connection("10.9.0.7")
    });
    let (mut ours, mut theirs, _listener) = in_space.join().unwrap();
    let ack = client.identity(&wanted).await.unwrap();
    assert_done(&ack);
    assert!(carries(&mut ours, &mut theirs));
    assert!(run("ip route show default").await.contains("10.9.0.1"));

    // The name instead of the index; another network; an old address that was never there.
    let named = NicIdentity {
        name: Some("eth0".into()),
        index: 99,
        ip: "10.8.0.9".into(),
        prefix: 32,
        old_ip: Some("10.7.7.7".into()),
        gateway: Some("169.254.1.1".into()),
        ..nic.clone()
    };
    assert_done(&client.identity(&Identity { nics: vec![named], ..wanted.clone() }).await.unwrap());
    let address = run("ip -o addr show dev eth0").await;
    assert!(address.contains("10.8.0.9/32") && address.lines().count() == 1, "{address}");
    assert!(run("ip route show default").await.contains("via 169.254.1.1 dev eth0"));
    let lost = ours.read(&mut [0]).unwrap_err();
    assert!(killed.contains("cannot") || lost.kind() == ErrorKind::ConnectionAborted, "{lost}");

    // What cannot be done is said, and the rest is done.
    let bad = |change: &dyn Fn(&mut NicIdentity)| {
        let mut nic = nic.clone();
        change(&mut nic);
        Identity { nics: vec![nic], ..wanted.clone() }
    };
    for (bad, what) in [
        (bad(&|nic| nic.index = 5), "nic 5"),
        (bad(&|nic| nic.name = Some("../eth0".into())), "name"),
        (bad(&|nic| nic.mac = "02:00:00:00:00".into()), "MAC"),
        (bad(&|nic| nic.mac = "03:00:00:00:00:01".into()), "MAC"),
        (bad(&|nic| nic.ip = "10.9.0".into()), "IPv4"),
        (bad(&|nic| nic.prefix = 33), "prefix"),
        (bad(&|nic| nic.dns = vec!["x".into()]), "name server"),
        (Identity { hostname: Some("a b".into()), ..wanted.clone() }, "host name"),
        (Identity { machine_id: Some("short".into()), ..wanted.clone() }, "machine id"),
    ] {
        let ack = client.identity(&bad).await.unwrap();
        assert!(!ack.ok && ack.reseeded == is_root(), "{what}: {ack:?}");
        assert!(ack.error.as_ref().unwrap().contains(what), "{what}: {ack:?}");
        assert!(ack.steps.iter().any(|step| step.name == "reseed") && ack.steps.len() > 3, "{ack:?}");
    }
    client.release(&release()).await.unwrap();
    assert_eq!(agent.read("run/ramet/generation"), "4\n");
}

/// The program that another test starts as a subscriber: it tells what signals it gets. It is started with the signal
/// blocked.
#[test]
#[ignore = "a helper of the test of subscribers"]
#[allow(unsafe_code, reason = "no safe library waits for a real-time signal with its value")]
fn a_subscriber_of_signals() {
    println!("subscribed");
    loop {
        let mut set: libc::sigset_t = unsafe_free::empty();
        // SAFETY: `set` and `info` are valid for writes, and of the types that the calls want.
        let (number, code, value) = unsafe {
            libc::sigaddset(&raw mut set, SIGCLONE);
            let mut info: libc::siginfo_t = std::mem::zeroed();
            let number = libc::sigwaitinfo(&raw const set, &raw mut info);
            (number, info.si_code, info.si_value().sival_ptr as usize)
        };
        println!("signal {number} {} {value}", code == libc::SI_QUEUE);
    }
}

mod unsafe_free {
    /// No signals.
    #[allow(unsafe_code, reason = "a set of signals is made by a call")]
    pub(super) fn empty() -> libc::sigset_t {
        // SAFETY: all zeros is a set, and the call writes one.
        unsafe {
            let mut set = std::mem::zeroed();
            libc::sigemptyset(&raw mut set);
            set
        }
    }
}

/// Starts the helper above as a subscriber. Gives its lines.
#[allow(unsafe_code, reason = "a child with a signal blocked")]
fn subscriber(agent: &Agent) -> (Child, impl FnMut() -> String + use<>) {
    use std::os::unix::process::CommandExt;
    let mut command = Command::new(AGENT);
    command.arg("--root").arg(agent.root.path()).args(["subscribe", "--"]).arg(std::env::current_exe().unwrap());
    command.args(["--exact", "a_subscriber_of_signals", "--ignored", "--nocapture"]).stdout(Stdio::piped());
    let block = || {
        let mut set = unsafe_free::empty();
        // SAFETY: `set` is one, and no old mask is wanted.
        unsafe {
            libc::sigaddset(&raw mut set, SIGCLONE);
            libc::sigprocmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
        }
        Ok(())
    };
    // SAFETY: it only makes system calls on its own stack.
    unsafe { command.pre_exec(block) };
    let mut child = command.spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let next = move || {
        loop {
            // The harness puts its own words before.
            let line = lines.next().expect("a subscriber has ended").unwrap();
            if let Some(at) = line.find("signal ").or_else(|| line.find("subscribed")) {
                return line[at..].to_owned();
            }
        }
    };
    (child, next)
}

#[tokio::test]
async fn subscribers_and_no_others_are_told_of_a_clone() {
    let (agent, client) = start().await;
    let socket = agent.at("run/ramet/agent.sock");
    let mode = std::fs::metadata(&socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o666);
    let ack = client.release(&release()).await.unwrap();
    assert!(!ack.ok && ack.error.unwrap().contains("who it is"), "a machine without a number tells none");

    let (mut child, mut next_line) = subscriber(&agent);
    assert_eq!(next_line(), "subscribed");
    let mut waiting = Command::new(AGENT)
        .arg("--root")
        .arg(agent.root.path())
        .arg("wait-clone")
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let ask = |line: &str| {
        let mut stream = StdStream::connect(&socket).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        stream.write_all(line.as_bytes()).unwrap();
        let mut reader = BufReader::new(stream);
        let mut answer = String::new();
        // Who is cut off gets an error or nothing.
        drop(reader.read_line(&mut answer));
        (answer, reader)
    };
    let (answer, mut events) = ask("{\"subscribe\":\"events\"}\n");
    assert_eq!(answer, "{\"ok\":true}\n");
    for bad in ["{\"subscribe\":\"all\"}\n", "garbage\n", "{}\n"] {
        assert!(ask(bad).0.starts_with("{\"ok\":false,\"error\":"));
    }
    let (answer, _) = ask(&"x".repeat(4000));
    assert_eq!(answer, "", "a line without an end is cut off");

    client.identity(&identity(1234)).await.unwrap();
    // Until `wait-clone` has subscribed, too.
    let begun = Instant::now();
    let mut rounds = 0;
    loop {
        let ack = client.release(&release()).await.unwrap();
        assert!(ack.ok, "{ack:?}");
        rounds += 1;
        if ack.signalled == 3 {
            break;
        }
        assert!(begun.elapsed() < LIMIT && ack.signalled == 2, "{ack:?}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let mut printed = String::new();
    waiting.stdout.take().unwrap().read_to_string(&mut printed).unwrap();
    assert!(waiting.wait().unwrap().success());
    assert_eq!(printed, "{\"event\":\"clone\",\"number\":1234,\"generation\":4}\n");
    for _ in 0..rounds {
        assert_eq!(next_line(), format!("signal {SIGCLONE} true 1234"));
        let mut line = String::new();
        events.read_line(&mut line).unwrap();
        let event: CloneEvent = serde_json::from_str(&line).unwrap();
        assert_eq!((event.event.as_str(), event.number, event.generation), ("clone", 1234, 4));
    }

    // A process that has ended has no subscription, nor has a connection that was closed, nor who takes it back.
    child.kill().unwrap();
    child.wait().unwrap();
    let stream = events.get_mut();
    stream.write_all(b"{\"unsubscribe\":true}\n").unwrap();
    let mut answer = String::new();
    events.read_line(&mut answer).unwrap();
    assert_eq!(answer, "{\"ok\":true}\n");
    drop(ask("{\"subscribe\":\"events\"}\n"));
    let begun = Instant::now();
    while client.release(&release()).await.unwrap().signalled > 0 {
        assert!(begun.elapsed() < LIMIT, "somebody is still told");
    }
    let quiet = Release { signal: false, ..release() };
    assert!(client.release(&quiet).await.unwrap().ok);
}

#[tokio::test]
async fn requests_beyond_the_bound_are_refused_but_never_a_thaw() {
    let (agent, client) = start().await;
    agent.hook("checkpoint.d/wait", "exec sleep 600");
    // More than the agent works at: the others are refused, and a thaw that comes later ends all of them.
    let request = Freeze { hooks: true, limit_ms: 600_000, ..Freeze::default() };
    let mut tasks: Vec<_> = (0..12)
        .map(|_| {
            let (client, request) = (client.clone(), request.clone());
            tokio::spawn(async move { client.freeze(&request).await })
        })
        .collect();
    let refused = loop {
        let done = tasks.iter().position(|task| task.is_finished());
        if let Some(at) = done {
            break tasks.swap_remove(at).await.unwrap();
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    };
    assert!(matches!(refused, Err(AgentError::Guest { .. })), "{refused:?}");
    client.ping().await.unwrap();
    assert!(client.thaw().await.unwrap().ok, "a thaw is always taken");
    for task in tasks {
        assert!(!task.await.unwrap().is_ok_and(|ack| ack.ok));
    }
}
