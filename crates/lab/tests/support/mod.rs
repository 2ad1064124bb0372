//! What the end-to-end tests have in common: a lab, and guests to talk to.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "each test program uses its own part")]

use ramet_client::api::{self, ErrorCode};
use ramet_client::{Client, Error};
use ramet_lab::{Lab, LabOptions};
use ramet_memory::ByteSize;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Longer than anything takes on a busy machine; only a hang gets there.
pub const LIMIT: Duration = Duration::from_secs(60);
/// First page that the tiny guest gives away.
pub const FIRST: u64 = 1024;
/// Memory of tiny guests.
pub const TINY: ByteSize = ByteSize::mib(64);

pub async fn lab(name: &str, hosts: u8) -> Lab {
    // VMs are started as they are needed: a pool would only take the tests' processor time.
    let options = LabOptions::for_test(name).unwrap().hosts(hosts).daemon_arg("--pool").daemon_arg("0");
    Lab::up(&options).await.unwrap()
}

pub fn tiny_request(name: &str) -> api::RunRequest {
    api::RunRequest {
        name: Some(name.into()),
        memory: TINY,
        accel: Some(api::AccelKind::Tcg),
        ..api::RunRequest::new("tiny")
    }
}

pub async fn run_tiny(client: &Client, name: &str) -> api::VmInfo {
    let vm = client.run(&tiny_request(name)).await.unwrap();
    assert!(vm.agent, "the tiny guest answers");
    vm
}

/// A command of the tiny guest: its code and what it printed.
pub async fn tiny(client: &Client, vm: &str, words: &[&str]) -> (i32, String) {
    let outcome = tokio::time::timeout(LIMIT, client.exec_collect(vm, words.iter().copied())).await;
    let outcome = outcome.unwrap_or_else(|_| panic!("{vm} does not answer {words:?}")).unwrap();
    (outcome.code, outcome.text().trim().to_owned())
}

/// A command of the tiny guest that must succeed.
pub async fn tiny_ok(client: &Client, vm: &str, words: &[&str]) -> String {
    let (code, text) = tiny(client, vm, words).await;
    assert_eq!(code, 0, "{vm}: {words:?} says {text:?}");
    text
}

pub async fn fill(client: &Client, vm: &str, seed: u64, first: u64, count: u64) {
    tiny_ok(client, vm, &["fill", &seed.to_string(), &first.to_string(), &count.to_string()]).await;
}

/// Whether the pages hold what `fill` put there.
pub async fn holds(client: &Client, vm: &str, seed: u64, first: u64, count: u64) -> bool {
    tiny(client, vm, &["check", &seed.to_string(), &first.to_string(), &count.to_string()]).await.0 == 0
}

pub async fn count(client: &Client, vm: &str) -> u64 {
    tiny_ok(client, vm, &["count"]).await.parse().unwrap()
}

/// Runs a shell command in a Linux guest: its output.
pub async fn sh(client: &Client, vm: &str, script: &str) -> String {
    let outcome = tokio::time::timeout(LIMIT, client.exec_collect(vm, ["sh", "-c", script])).await.unwrap().unwrap();
    assert_eq!(outcome.code, 0, "{vm}: {script}: {}", String::from_utf8_lossy(&outcome.stderr));
    outcome.text().trim().to_owned()
}

pub fn clones(count: u32, hosts: &[&str]) -> api::CloneRequest {
    api::CloneRequest { hosts: hosts.iter().map(|&h| h.to_owned()).collect(), ..api::CloneRequest::new(count) }
}

pub fn fork_of(clones: api::CloneRequest) -> api::ForkRequest {
    api::ForkRequest { clones, ..Default::default() }
}

/// Forks; the clones' names in order.
pub async fn fork(client: &Client, vm: &str, count: u32, hosts: &[&str]) -> (api::ForkResponse, Vec<String>) {
    let made = client.fork(vm, &fork_of(clones(count, hosts))).await.unwrap();
    let names = made.clones.iter().map(|c| c.vm.name.clone()).collect();
    (made, names)
}

/// Waits until it holds.
pub async fn until<F: Future<Output = bool>>(what: &str, holds: impl FnMut() -> F) {
    until_within(LIMIT, what, holds).await;
}

/// Waits until it holds, for so long.
pub async fn until_within<F: Future<Output = bool>>(limit: Duration, what: &str, mut holds: impl FnMut() -> F) {
    let deadline = Instant::now() + limit;
    while !holds().await {
        assert!(Instant::now() < deadline, "in {limit:?} it did not come to pass that {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The error of a call that must fail: its code, and message and remedy in one text.
pub fn refused<T: std::fmt::Debug>(result: Result<T, Error>) -> (ErrorCode, String) {
    let err = result.expect_err("this must be refused");
    let body = err.body().unwrap_or_else(|| panic!("not an answer of the daemon: {err}"));
    let remedy = body.remedy.clone().unwrap_or_default();
    assert!(!remedy.is_empty(), "an error without a remedy: {body:?}");
    (body.code, format!("{} / {remedy}", body.message))
}

/// The names of a host's VMs.
pub async fn names(client: &Client) -> Vec<String> {
    client.vms(false).await.unwrap().vms.into_iter().map(|vm| vm.name).collect()
}

/// The one VM of that name.
pub async fn vm(client: &Client, name: &str) -> api::VmInfo {
    client.vm(name).await.unwrap()
}

/// Processes of a host whose program begins so.
pub fn pids(lab: &Lab, host: usize, program: &str) -> Vec<u32> {
    lab.processes(host).unwrap().into_iter().filter(|p| p.program.starts_with(program)).map(|p| p.pid).collect()
}

/// SIGKILL to a process of the lab.
pub fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

/// After everything is removed nothing of it is left on the host: no VM, checkpoint, QEMU, page file.
pub async fn assert_nothing_left(lab: &Lab, host: usize) {
    let client = lab.client(host);
    assert_eq!(names(&client).await, Vec::<String>::new());
    assert!(client.checkpoints().await.unwrap().checkpoints.is_empty());
    until("no QEMU and no pager is left", || async {
        pids(lab, host, "qemu").is_empty() && pids(lab, host, "ramet-pager").is_empty()
    })
    .await;
    let info = client.info().await.unwrap();
    let pages = std::path::Path::new(&info.state_dir).join("pages");
    let left =
        || std::fs::read_dir(&pages).map(|dir| dir.flatten().map(|e| e.path()).collect::<Vec<_>>()).unwrap_or_default();
    until("no page file is left", || async { left().is_empty() }).await;
    let checkpoints = std::path::Path::new(&info.state_dir).join("checkpoints");
    assert_eq!(std::fs::read_dir(&checkpoints).unwrap().count(), 0, "in {}", checkpoints.display());
}

/// A guest with systemd, a web server, Python and a disk.
pub fn web_request(name: &str) -> api::RunRequest {
    api::RunRequest {
        name: Some(name.into()),
        memory: ByteSize::mib(512),
        accel: Some(api::AccelKind::Tcg),
        wait_agent_s: 240,
        ..api::RunRequest::new("web")
    }
}

/// Boots the guest of [`web_request`]. When this returns its web server answers.
pub async fn run_web(client: &Client, name: &str) -> api::VmInfo {
    let vm = client.run(&web_request(name)).await.unwrap();
    assert!(vm.agent, "the web guest answers");
    until("the web server answers", || async { sh(client, name, &fetch("127.0.0.1")).await == "200" }).await;
    vm
}

/// A guest's command that prints the code which a web server answers with.
pub fn fetch(ip: &str) -> String {
    format!("curl -s -m 10 -o /dev/null -w '%{{http_code}}' http://{ip}/ || true")
}

/// A VM's address.
pub fn ip(vm: &api::VmInfo) -> String {
    vm.network.as_ref().expect("it has a network").ip.clone()
}

/// A VM's hardware address.
pub fn mac(vm: &api::VmInfo) -> String {
    vm.network.as_ref().expect("it has a network").mac.clone()
}

/// Writes a file in a guest.
pub async fn put(client: &Client, vm: &str, path: &str, mode: u32, text: &str) {
    let bytes = text.as_bytes().to_vec();
    client.put_file(vm, path, mode, bytes.len() as u64, std::io::Cursor::new(bytes)).await.unwrap();
}

/// Starts a Python program in a guest that goes on by itself: `/tmp/NAME.py`, which prints to `/dev/shm/NAME.out`. Returns
/// its process number.
pub async fn python(client: &Client, vm: &str, name: &str, program: &str, args: &str) -> u32 {
    put(client, vm, &format!("/tmp/{name}.py"), 0o755, program).await;
    // In a slice of its own: what the agent itself runs is not frozen.
    let unit =
        format!("systemd-run -q --unit=t-{name} -p StandardOutput=file:/dev/shm/{name}.out -p StandardError=inherit");
    sh(client, vm, &format!("{unit} python3 -u /tmp/{name}.py {args}; systemctl show -p MainPID --value t-{name}"))
        .await
        .parse()
        .unwrap()
}

/// What a program of [`python`] has printed until now.
pub async fn printed(client: &Client, vm: &str, name: &str) -> String {
    sh(client, vm, &format!("cat /dev/shm/{name}.out 2>/dev/null || true")).await
}

/// A command on this machine: its output.
pub fn host_command(words: &[&str]) -> String {
    let output = std::process::Command::new(words[0]).args(&words[1..]).output().unwrap();
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// The file of a host's network namespace.
pub fn host_space(lab: &Lab, host: usize) -> PathBuf {
    Path::new("/run/netns").join(&lab.hosts()[host - 1].netns)
}

/// The file of a family's network namespace on a host.
pub fn family_space(lab: &Lab, host: usize, vm: &api::VmInfo) -> PathBuf {
    lab.hosts()[host - 1].state_dir.join("net").join(vm.family.short())
}

/// A command in a network namespace, to be started.
pub fn within(space: &Path, words: &[&str]) -> std::process::Command {
    let mut command = std::process::Command::new("nsenter");
    command.arg(format!("--net={}", space.display())).args(words);
    command
}

/// What a command in a network namespace prints.
pub fn told_within(space: &Path, words: &[&str]) -> String {
    let output = within(space, words).output().unwrap();
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Packets as `tcpdump` writes them, a line each, from when it is made on.
#[derive(Debug)]
pub struct Capture {
    child: std::process::Child,
    lines: std::sync::Arc<std::sync::Mutex<Vec<String>>>,
    reader: Option<std::thread::JoinHandle<()>>,
}

impl Capture {
    /// `wanted`: further arguments, such as the device.
    pub fn new(space: &Path, wanted: &[&str]) -> Self {
        use std::io::{BufRead as _, BufReader};
        let words = [&["tcpdump", "--immediate-mode", "-l", "-n", "-e", "-B", "16384"], wanted].concat();
        let pipe = std::process::Stdio::piped;
        let mut child = within(space, &words).stdout(pipe()).stderr(pipe()).spawn().unwrap();
        let mut said = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        // Nothing is missed from here on.
        while !line.contains("listening on") {
            line.clear();
            assert!(said.read_line(&mut line).unwrap() > 0, "tcpdump {wanted:?} does not listen");
        }
        std::thread::spawn(move || std::io::copy(&mut said, &mut std::io::sink()));
        let lines = std::sync::Arc::<std::sync::Mutex<Vec<String>>>::default();
        let (out, to) = (BufReader::new(child.stdout.take().unwrap()), lines.clone());
        let reader = std::thread::spawn(move || {
            for line in out.lines().map_while(Result::ok) {
                to.lock().unwrap().push(line);
            }
        });
        Self { child, lines, reader: Some(reader) }
    }

    /// What there is until now.
    pub fn lines(&self) -> Vec<String> {
        self.lines.lock().unwrap().clone()
    }

    /// Ends it: all there was.
    pub fn end(mut self) -> Vec<String> {
        self.stop();
        self.lines()
    }

    fn stop(&mut self) {
        if let Some(reader) = self.reader.take() {
            // By its own wish, so that it writes what it has.
            let pid = rustix::process::Pid::from_child(&self.child);
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::INT);
            let _ = self.child.wait();
            let _ = reader.join();
        }
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Whether a captured packet is one that a machine has sent as, or claims to be, `mac` or `ip`.
pub fn speaks_as(line: &str, mac: &str, ip: &str) -> bool {
    // What is asked for is nobody's own. Of `-i any` there is no " > " before it.
    let from = line.split(" > ").next().and_then(|from| from.split(" who-has ").next()).unwrap_or_default();
    from.contains(mac)
        || from.split([' ', ',']).any(|word| word == ip || word.starts_with(&format!("{ip}.")))
        || line.contains(&format!("tell {ip},"))
        || line.contains(&format!("Reply {ip} is-at"))
}

/// After everything is removed no network of a family is left on the host: no namespace, mount, device or published port.
pub async fn assert_no_network_left(lab: &Lab, host: usize) {
    let spaces = lab.hosts()[host - 1].state_dir.join("net");
    let names = || std::fs::read_dir(&spaces).map_or(0, |dir| dir.flatten().filter(|e| e.path().is_file()).count());
    until("no namespace is left", || async { names() == 0 }).await;
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(&spaces.display().to_string()), "{mounts}");
    let links = told_within(&host_space(lab, host), &["ip", "-br", "link"]);
    let left: Vec<_> = links.lines().filter(|l| !l.starts_with("lo") && !l.starts_with("eth0")).collect();
    assert!(left.is_empty(), "{left:?}");
    let rules = told_within(&host_space(lab, host), &["nft", "list", "ruleset"]);
    let published = rules.split("map published").nth(1).and_then(|r| r.split('}').next()).unwrap_or_default();
    assert!(!published.contains("elements"), "{published}");
}

/// Where a host's daemon keeps what it knows.
pub async fn state_dir(lab: &Lab, host: usize) -> PathBuf {
    lab.client(host).info().await.unwrap().state_dir.into()
}

/// What a host's daemon has on record.
pub fn recorded(state_dir: &Path) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(state_dir.join("state.json")).unwrap()).unwrap()
}

/// Changes what a host's daemon remembers, while it does not run.
pub fn edit_state(state_dir: &Path, edit: impl FnOnce(&mut serde_json::Value)) {
    let mut state = recorded(state_dir);
    edit(&mut state);
    std::fs::write(state_dir.join("state.json"), serde_json::to_vec(&state).unwrap()).unwrap();
}

/// Waits, without a pause that is worth mentioning, until it is on record.
pub async fn until_recorded(state_dir: &Path, what: &str, holds: impl Fn(&serde_json::Value) -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !holds(&recorded(state_dir)) {
        assert!(Instant::now() < deadline, "in {LIMIT:?} it did not come to be on record that {what}");
        tokio::time::sleep(Duration::from_micros(500)).await;
    }
}
