//! When a clone's web server answers, and what the network of a clone costs its host.

use std::{
    collections::HashMap,
    fs::File,
    io::{Read as _, Write as _},
    net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpStream},
    os::fd::AsFd as _,
    process::Command,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow, ensure};
use ramet_client::{Client, api};
use ramet_lab::Lab;
use ramet_net::{AddressPlan, Egress, HostNet, HostNetOptions, NetworkSpec, TunnelOptions};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use serde::{Deserialize, Serialize};

use super::{boot, drop_checkpoints, millis, ms, request, say, sh, space_file, wait_for_apache, warm};
use crate::report::{Goal, Measured, Report};

/// How many addresses after the last one are asked: a prepared clone's, and those given meanwhile.
const CANDIDATES: u32 = 8;
/// How long a connection may take. Another one follows.
const CONNECT: Duration = Duration::from_millis(20);
/// After so long nothing goes on any more in a clone that is ready.
const REST: Duration = Duration::from_millis(500);

/// Times of clones of one checkpoint, and of their web servers.
pub(super) async fn measure(lab: &Lab, quick: bool, report: &mut Report) -> Result<()> {
    let home = lab.client(1);
    let parent = boot(&home, &request("parent", super::WEB)).await?;
    wait_for_apache(&home, &parent.name).await?;
    sh(&home, &parent.name, "for i in 1 2 3 4 5 6 7 8 9 10; do curl -s -o /dev/null http://127.0.0.1/; done").await?;
    let made = home.checkpoint(&parent.name, &api::CheckpointRequest { wait: true, ..Default::default() }).await?;
    let checkpoint = made.checkpoint.id.to_string();
    let space = space_file(lab, 1, parent.family);
    let file = File::open(&space).with_context(|| format!("No namespace {}", space.display()))?;
    let mut asking = Asking { home: home.clone(), space: file, last: address(&parent)? };
    let rounds = if quick { 6 } else { 30 };

    say("clones out of the pool");
    // No clone is prepared until somebody asked for one: the first clone is.
    let pool = asking.sample(&parent.name, &checkpoint, rounds).await?;
    say("prepared clones");
    let prepared = asking.sample(&checkpoint, &checkpoint, rounds).await?;
    report.goals.push(Goal::at_most(
        "prepared clone: from running to its Apache's answer / from running to its agent's first answer",
        prepared.ratio(),
        1.5,
    ));
    let answered = super::median(&prepared.since_running(&prepared.answered));
    prepared.tell("prepared clone", report);
    pool.tell("clone out of the pool", report);

    say("web servers alone");
    let alone = asking.alone(&checkpoint, rounds).await?;
    let least = (answered + super::median(&alone.first)) / answered;
    report.results.push(super::one(
        "prepared clone: ratio if identity and network took no time".to_owned(),
        "x",
        least,
    ));
    alone.tell(report);
    home.remove_vm(&parent.name, true).await?;
    drop_checkpoints(&home).await
}

fn address(vm: &api::VmInfo) -> Result<Ipv4Addr> {
    let network = vm.network.as_ref().with_context(|| format!("{} has no network", vm.name))?;
    Ok(network.ip.parse()?)
}

/// Makes clones and asks their web servers.
struct Asking {
    home: Client,
    space: File,
    /// The last address that a VM was given.
    last: Ipv4Addr,
}

impl Asking {
    /// What is ready for the clones is ready for `like`: the checkpoint, or a VM of its shape.
    async fn sample(&mut self, like: &str, checkpoint: &str, rounds: usize) -> Result<Times> {
        let prepared = like == checkpoint;
        let mut times = Times::default();
        let mut unseen = 0;
        while times.running.len() < rounds {
            if !prepared {
                // What the last clone had prepared is given up.
                warm(&self.home, checkpoint, 0, "h1").await?;
            }
            warm(&self.home, like, 1, "h1").await?;
            let watch = Watch::start(&self.space, self.last)?;
            let begin = Instant::now();
            let clones = api::CloneRequest { wait_agent_s: 120, ..api::CloneRequest::new(1) };
            let made = self.home.clone_checkpoint(checkpoint, &clones).await?.clones;
            let clone = made.first().context("No clone")?;
            let ip = address(&clone.vm)?;
            let seen = watch.answer_of(ip, Duration::from_secs(5)).await;
            self.last = self.last.max(ip);
            self.home.remove_vm(&clone.vm.name, true).await?;
            ensure!(clone.warm && clone.prepared == prepared, "What is measured was not ready");
            let Some(seen) = seen else {
                unseen += 1;
                ensure!(unseen < 5, "The web servers of {unseen} clones did not answer, the last at {ip}");
                continue;
            };
            times.running.push(ms(clone.running_us));
            times.answered.push(ms(clone.answered_us.context("A clone was not waited for")?));
            times.ready.push(ms(clone.ready_us.context("A clone was not waited for")?));
            times.http.push(millis(seen.saturating_duration_since(begin)));
            if let Some(link) = clone.timeline.phases.iter().find(|p| p.name == "link") {
                let open = ms(link.start_us + link.duration_us);
                times.since_link.push(millis(seen.saturating_duration_since(begin)) - open);
            }
            for phase in &clone.timeline.phases {
                match times.phases.iter_mut().find(|(name, _)| *name == phase.name) {
                    Some((_, values)) => values.push(ms(phase.duration_us)),
                    None => times.phases.push((phase.name.clone(), vec![ms(phase.duration_us)])),
                }
            }
        }
        Ok(times)
    }

    /// Clones that are ready and at rest before anybody asks their web server.
    async fn alone(&mut self, checkpoint: &str, rounds: usize) -> Result<Alone> {
        let mut alone = Alone::default();
        for _ in 0..rounds {
            let clones = api::CloneRequest { wait_agent_s: 120, ..api::CloneRequest::new(1) };
            let made = self.home.clone_checkpoint(checkpoint, &clones).await?.clones;
            let clone = made.first().context("No clone")?;
            let ip = address(&clone.vm)?;
            self.last = self.last.max(ip);
            tokio::time::sleep(REST).await;
            let space = self.space.try_clone()?;
            let ask = move || -> Result<[f64; 2]> {
                move_into_link_name_space(space.as_fd(), Some(LinkNameSpaceType::Network))?;
                let mut took = [0.0; 2];
                for took in &mut took {
                    let begin = Instant::now();
                    ensure!(answers(ip, Duration::from_secs(5)), "The web server at {ip} does not answer");
                    *took = millis(begin.elapsed());
                }
                Ok(took)
            };
            // A thread of its own: it stays in the namespace.
            let asked = std::thread::Builder::new().name("ask".into()).spawn(ask)?;
            let asked = tokio::task::spawn_blocking(move || asked.join()).await?;
            self.home.remove_vm(&clone.vm.name, true).await?;
            let [first, second] = asked.map_err(|_| anyhow!("The thread that asks {ip} panicked"))??;
            alone.first.push(first);
            alone.second.push(second);
        }
        Ok(alone)
    }
}

/// What a web server takes when nothing else is to be done in its clone, in ms: this much of an answer's time is neither the
/// identity's nor the network's.
#[derive(Debug, Default)]
struct Alone {
    first: Vec<f64>,
    second: Vec<f64>,
}

impl Alone {
    fn tell(self, report: &mut Report) {
        report.results.extend([
            Measured::of("clone at rest, ready: first request to Apache".to_owned(), "ms", self.first),
            Measured::of("clone at rest, ready: second request to Apache".to_owned(), "ms", self.second),
        ]);
    }
}

/// In ms from the request on; phases in their order.
#[derive(Debug, Default)]
struct Times {
    running: Vec<f64>,
    answered: Vec<f64>,
    ready: Vec<f64>,
    http: Vec<f64>,
    /// From the end of the phase in which its cable is plugged in.
    since_link: Vec<f64>,
    phases: Vec<(String, Vec<f64>)>,
}

impl Times {
    /// From running to `what`, of each clone.
    fn since_running(&self, what: &[f64]) -> Vec<f64> {
        what.iter().zip(&self.running).map(|(what, running)| what - running).collect()
    }

    fn ratio(&self) -> f64 {
        super::median(&self.since_running(&self.http)) / super::median(&self.since_running(&self.answered))
    }

    fn tell(self, what: &str, report: &mut Report) {
        let of = |name: &str, values: Vec<f64>| Measured::of(format!("{what}: {name}"), "ms", values);
        let whole: Vec<_> = self.http.iter().zip(&self.answered).map(|(http, answered)| http / answered).collect();
        let ratio = self.ratio();
        report.results.extend([
            of("running to Apache's answer", self.since_running(&self.http)),
            of("running to agent's first answer", self.since_running(&self.answered)),
            super::one(format!("{what}: ratio of these"), "x", ratio),
            of("request to running", self.running),
            of("request to agent's first answer", self.answered),
            of("request to ready (identity, entropy, clock)", self.ready),
            of("request to Apache's answer", self.http),
            of("cable plugged in to Apache's answer", self.since_link),
            Measured::of(format!("{what}: request to Apache's answer / request to agent's first answer"), "x", whole),
        ]);
        for (name, values) in self.phases {
            report.results.push(of(&format!("of that, {name}"), values));
        }
    }
}

/// Asks the addresses after the last one, in the family's namespace, each from a thread of its own.
struct Watch {
    seen: Arc<Mutex<HashMap<Ipv4Addr, Instant>>>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

impl Watch {
    fn start(space: &File, last: Ipv4Addr) -> Result<Self> {
        let (seen, stop) = (Arc::default(), Arc::new(AtomicBool::new(false)));
        let mut watch = Self { seen, stop, threads: Vec::new() };
        for step in 1..=CANDIDATES {
            let ip = Ipv4Addr::from_bits(last.to_bits() + step);
            let (space, seen, stop) = (space.try_clone()?, watch.seen.clone(), watch.stop.clone());
            let ask = move || {
                if let Err(err) = move_into_link_name_space(space.as_fd(), Some(LinkNameSpaceType::Network)) {
                    eprintln!("identity: the family's namespace can't be entered: {err}");
                    return;
                }
                while !stop.load(Ordering::Relaxed) {
                    if answers(ip, CONNECT) {
                        let now = Instant::now();
                        seen.lock().unwrap_or_else(PoisonError::into_inner).insert(ip, now);
                        return;
                    }
                    std::thread::sleep(Duration::from_millis(1));
                }
            };
            watch.threads.push(std::thread::Builder::new().name("ask".into()).spawn(ask)?);
        }
        Ok(watch)
    }

    /// When the server at this address first answered.
    async fn answer_of(self, ip: Ipv4Addr, limit: Duration) -> Option<Instant> {
        let deadline = Instant::now() + limit;
        loop {
            let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner).get(&ip).copied();
            if seen.is_some() || Instant::now() > deadline {
                return seen;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            // One that panicked has said so.
            let _ = thread.join();
        }
    }
}

/// Whether a web server at this address says 200, and takes the connection within `connect`.
fn answers(ip: Ipv4Addr, connect: Duration) -> bool {
    let Ok(mut stream) = TcpStream::connect_timeout(&SocketAddr::V4(SocketAddrV4::new(ip, 80)), connect) else {
        return false;
    };
    let mut status = [0; 12];
    let talk = stream
        .set_read_timeout(Some(Duration::from_secs(1)))
        .and_then(|()| stream.write_all(b"GET / HTTP/1.0\r\n\r\n"))
        .and_then(|()| stream.read_exact(&mut status));
    talk.is_ok() && status.ends_with(b" 200")
}

// ------------------------------------------------------------------------------------------------------- network set-up

/// What [`network_child`] measures, in us.
#[derive(Debug, Default, Serialize, Deserialize)]
struct NetworkTimes {
    tap: Vec<f64>,
    admit: Vec<f64>,
    both: Vec<f64>,
}

/// A network namespace that goes with its guard.
struct Scratch(String);

impl Drop for Scratch {
    fn drop(&mut self) {
        // What is left is seen by `ip netns`, and harms nobody.
        let _ = Command::new("ip").args(["netns", "del", &self.0]).status();
    }
}

/// The kernel's part of a clone's network, in a process of its own: its namespace is another one.
pub(super) fn network_work(quick: bool, report: &mut Report) -> Result<()> {
    let rounds = if quick { "60" } else { "300" };
    let child = Command::new(std::env::current_exe()?).args(["network-child", rounds]).output()?;
    let stderr = String::from_utf8_lossy(&child.stderr);
    ensure!(child.status.success(), "The network can't be measured: {}", stderr.trim());
    let NetworkTimes { tap, admit, both } = serde_json::from_slice(&child.stdout)?;
    let of = |name: &str, values: Vec<f64>| {
        Measured::of(format!("network of a clone: {name}"), "ms", values.into_iter().map(|us| us / 1e3).collect())
    };
    let both = of("tap and filter, host's work", both);
    report.goals.push(Goal::at_most("network of a clone: tap and filter, host's work, ms", both.median, 1.0));
    report.results.extend([both, of("of that, opening a tap", tap), of("with a spare tap: filter only", admit)]);
    Ok(())
}

/// What `identity` measures in a process of its own: prints the times as JSON.
///
/// # Errors
/// When a namespace or a network can't be made.
pub fn network_child(rounds: u16) -> Result<()> {
    let scratch = Scratch(format!("ramet-bench-{}", std::process::id()));
    let made = Command::new("ip").args(["netns", "add", &scratch.0]).status().context("Can't start ip")?;
    ensure!(made.success(), "No network namespace can be made: that needs root");
    let space = File::open(format!("/run/netns/{}", scratch.0))?;
    // No other thread is started before, so all of this process's work is there.
    move_into_link_name_space(space.as_fd(), Some(LinkNameSpaceType::Network))?;
    let directory = tempfile::tempdir()?;
    let plan = AddressPlan::default();
    let tunnel = Some(TunnelOptions::new(Ipv4Addr::LOCALHOST));
    let state_dir = directory.path().to_owned();
    let net = HostNet::open(HostNetOptions { state_dir, tag: "cost".to_owned(), tunnel, secure: None, plan })?;
    let spec = NetworkSpec { name: "fam".to_owned(), vni: 7, egress: Egress::Nat, rate: None, mtu: 1450 };
    let network = net.ensure(&spec)?;
    let mut times = NetworkTimes::default();
    let micros = |from: Instant, to: Instant| (to - from).as_secs_f64() * 1e6;
    let mut taps = Vec::new();
    for index in 2..2 + rounds {
        let member = plan.member(1, index).context("No such member")?;
        let begin = Instant::now();
        let tap = network.open_tap(&format!("tap{index}"))?;
        let middle = Instant::now();
        network.admit(&tap.name, member)?;
        let end = Instant::now();
        times.tap.push(micros(begin, middle));
        times.admit.push(micros(middle, end));
        times.both.push(micros(begin, end));
        taps.push((tap, member));
    }
    for (tap, member) in taps {
        network.expel(&tap.name, member)?;
    }
    net.remove("fam")?;
    net.close()?;
    println!("{}", serde_json::to_string(&times)?);
    Ok(())
}
