//! What the end-to-end tests have in common: a lab, and guests to talk to.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "each test program uses its own part")]

use ramet_client::api::{self, ErrorCode};
use ramet_client::{Client, Error};
use ramet_lab::{Lab, LabOptions};
use ramet_memory::ByteSize;
use std::future::Future;
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
pub async fn until<F: Future<Output = bool>>(what: &str, mut holds: impl FnMut() -> F) {
    let deadline = Instant::now() + LIMIT;
    while !holds().await {
        assert!(Instant::now() < deadline, "in {LIMIT:?} it did not come to pass that {what}");
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
