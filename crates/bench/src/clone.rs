//! `bench clone`: fork and clone against QEMU's own stop-and-copy and restore, with the same guest in the same run.
//!
//! QEMU's way is `migrate` to a file on tmpfs with its bandwidth limit lifted, and a QEMU started with `-incoming` from that
//! file: both by an inherited descriptor, the fastest transport that it has. Ramet's way is a fork through the daemon's API,
//! as any caller would make it; what is compared with a restore is a clone of a checkpoint that
//! is there, as QEMU's file is. Times of Ramet's clones are those that the daemon reports, from the request on.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use ramet_client::{Client, api};
use ramet_image::ImageStore;
use ramet_lab::{Lab, LabOptions};
use ramet_memory::ByteSize;

use crate::{
    qemu::{Copied, Guest, Qemu, Restored},
    report::{Goal, Measured, Report},
};

/// The guest that is compared.
const MEMORY: ByteSize = ByteSize::mib(1024);
const TOUCHED_MIB: u64 = 512;
/// The guest whose pause must not grow with the memory that it has touched.
const LARGE: ByteSize = ByteSize::mib(2560);
const IMAGE: &str = "default";
const GENERATIONS: u32 = 50;
/// Of a clone, in their order.
const PHASES: [&str; 9] = ["plan", "claim", "remap", "attach", "load", "wait", "continue", "first_answer", "identity"];

/// How many samples of each.
#[derive(Debug, Clone, Copy)]
struct Samples {
    qemu: usize,
    forks: usize,
    eight: usize,
    pauses: usize,
    chain: usize,
}

impl Samples {
    fn new(quick: bool) -> Self {
        if quick {
            Self { qemu: 2, forks: 5, eight: 2, pauses: 2, chain: 3 }
        } else {
            Self { qemu: 5, forks: 30, eight: 8, pauses: 4, chain: 8 }
        }
    }
}

/// Runs the bench; `quick` takes fewer samples.
///
/// # Errors
/// When a step fails: says which. Nothing is left behind.
pub async fn run(quick: bool) -> Result<Report> {
    let samples = Samples::new(quick);
    let mut report = Report::new("clone");
    say("a lab of two hosts");
    let lab = Lab::up(&LabOptions::for_test("bench")?.hosts(2)).await?;
    let result = measure(&lab, samples, &mut report).await;
    let down = lab.down().await;
    result?;
    down?;
    Ok(report)
}

fn say(text: &str) {
    eprintln!("clone: {text}");
}

async fn measure(lab: &Lab, samples: Samples, report: &mut Report) -> Result<()> {
    let home = lab.client(1);
    let yardstick = yardstick(lab, &home, samples, report).await?;
    let parent = boot(&home, "parent", MEMORY).await?;
    touch(&home, &parent, TOUCHED_MIB).await?;
    remote(lab, &home, &parent, &yardstick, report).await?;
    forks(&home, &parent, samples, &yardstick, report).await?;
    idle_memory(&home, &parent, report).await?;
    home.remove_vm(&parent, true).await?;
    drop_checkpoints(&home).await?;
    pause_by_size(&home, samples, report).await?;
    chain(&home, samples, report).await
}

// ---------------------------------------------------------------------------------------------------------- QEMU's way

/// QEMU's own numbers: medians.
#[derive(Debug)]
struct Yardstick {
    pause_ms: f64,
    running_ms: f64,
    answered_ms: f64,
    file_bytes: u64,
}

async fn yardstick(lab: &Lab, home: &Client, samples: Samples, report: &mut Report) -> Result<Yardstick> {
    say("QEMU's own stop-and-copy and restore");
    let info = home.info().await?;
    let image = ImageStore::new(&info.image_dir).load(IMAGE).context("The guest image can't be loaded")?;
    let guest = Guest {
        kernel: image.kernel(),
        initrd: image.initrd().context("The guest image has no initrd")?,
        cmdline: image.manifest.cmdline.clone(),
        memory: MEMORY,
        machine: "pc-i440fx-7.2".into(),
        kvm: info.accel == api::AccelKind::Kvm,
    };
    // /run is a tmpfs on most machines, but not on all: the lab's page files always are.
    let tmpfs = Tmpfs::mount(lab.dir().join("yardstick"))?;
    let (mut qemu, agent) = Qemu::boot(&guest, &tmpfs.0.join("source")).await?;
    let script = fill_script(TOUCHED_MIB);
    let fill = ramet_guest::host::ExecRequest::new(["sh", "-c", &script]);
    let outcome = agent.run(fill, &[], 1 << 20).await.context("The guest under plain QEMU does not answer")?;
    let stderr = String::from_utf8_lossy(&outcome.stderr);
    ensure!(outcome.code == 0, "The guest under plain QEMU can't fill its memory: {}", stderr.trim());
    agent.close();
    let file = tmpfs.0.join("copy");
    let (mut copies, mut restores) = (Vec::<Copied>::new(), Vec::<Restored>::new());
    for _ in 0..samples.qemu {
        copies.push(qemu.stop_and_copy(&file)?);
    }
    drop(qemu);
    for _ in 0..samples.qemu {
        restores.push(Qemu::restore(&guest, &tmpfs.0.join("target"), &file).await?);
    }
    let of = |name: &str, values: Vec<Duration>| Measured::of(name, "ms", values.into_iter().map(millis).collect());
    let pause = of("QEMU: pause of stop-and-copy", copies.iter().map(|c| c.pause).collect());
    let running = of("QEMU: start and restore to running", restores.iter().map(|r| r.running).collect());
    let loading = of("QEMU: of that, loading", restores.iter().map(|r| r.loading).collect());
    let answered = of("QEMU: start and restore to agent's answer", restores.iter().map(|r| r.answered).collect());
    let bytes = copies.iter().map(|c| c.bytes).max().unwrap_or(0);
    let yardstick = Yardstick {
        pause_ms: pause.median,
        running_ms: running.median,
        answered_ms: answered.median,
        file_bytes: bytes,
    };
    report.results.extend([pause, running, loading, answered, mib("QEMU: file that restore reads", bytes)]);
    Ok(yardstick)
}

// --------------------------------------------------------------------------------------------------------- Ramet's way

/// The first clone on another host: nothing of the image is there yet.
async fn remote(lab: &Lab, home: &Client, parent: &str, yardstick: &Yardstick, report: &mut Report) -> Result<()> {
    say("a clone on another host");
    warm(home, parent, 1, "h2").await?;
    let before = lab.received_bytes(2)?;
    let fork = fork(home, parent, 1, &["h2"]).await?;
    let moved = lab.received_bytes(2)?.saturating_sub(before);
    let clone = fork.clones.first().context("No clone")?;
    report.results.push(Measured::of("clone elsewhere: to running", "ms", vec![ms(clone.running_us)]));
    report.results.push(Measured::of("clone elsewhere: to agent's answer", "ms", vec![answered(clone)?]));
    report.results.push(mib("clone elsewhere: bytes moved until it answers", moved));
    report.goals.push(Goal::at_most(
        "bytes moved by a clone elsewhere until it answers / bytes that QEMU's restore reads",
        moved as f64 / yardstick.file_bytes as f64,
        0.05,
    ));
    let descriptor = home.descriptor(&fork.parent.checkpoint.id.to_string()).await?.len();
    let bound = (256 << 10) + MEMORY.pages().0 / 8;
    report.results.push(Measured::of("descriptor", "KiB", vec![descriptor as f64 / 1024.0]));
    report.goals.push(Goal::at_most("descriptor, KiB", descriptor as f64 / 1024.0, bound as f64 / 1024.0));
    undo(lab, &fork).await
}

/// Pauses of forks; then clones of a checkpoint that is complete: what a clone call does from its request on.
async fn forks(
    home: &Client,
    parent: &str,
    samples: Samples,
    yardstick: &Yardstick,
    report: &mut Report,
) -> Result<()> {
    say("single forks on one host");
    let (mut pauses, mut running, mut ready) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..samples.forks {
        warm(home, parent, 1, "h1").await?;
        let fork = fork(home, parent, 1, &["h1"]).await?;
        let clone = fork.clones.first().context("No clone")?;
        pauses.push(ms(fork.parent.pause_us));
        running.push(ms(clone.running_us));
        ready.push(ms(clone.ready_us.context("A clone was not waited for")?));
        undo_here(home, &fork).await?;
    }
    let pause = Measured::of("fork: parent's pause", "ms", pauses);
    report.goals.push(Goal::at_most(
        "parent's pause / QEMU's stop-and-copy pause",
        pause.median / yardstick.pause_ms,
        1.0 / 20.0,
    ));
    report.results.extend([
        pause,
        Measured::of("fork: request to clone running", "ms", running),
        Measured::of("fork: request to clone ready (identity, entropy, clock)", "ms", ready),
    ]);

    let made = home.checkpoint(parent, &api::CheckpointRequest { wait: true, ..Default::default() }).await?;
    let checkpoint = made.checkpoint.id.to_string();
    say("clones of a checkpoint, prepared");
    let one = Clones::sample(home, &checkpoint, &checkpoint, 1, samples.forks).await?;
    say("eight clones of a checkpoint, prepared");
    let eight = Clones::sample(home, &checkpoint, &checkpoint, 8, samples.eight).await?;
    say("clones of a checkpoint, out of the pool");
    warm(home, &checkpoint, 0, "h1").await?;
    let pool = Clones::sample(home, parent, &checkpoint, 1, samples.forks).await?;
    say("eight clones of a checkpoint, out of the pool");
    let pool_eight = Clones::sample(home, parent, &checkpoint, 8, samples.eight).await?;
    remove_unless_used(home, &checkpoint).await?;
    let [running, answered] = [&one.running, &one.answered].map(|values| Measured::of("", "ms", values.clone()).median);
    let last = Measured::of("", "ms", eight.running.clone()).median;
    report.goals.extend([
        Goal::at_most("clone to running / QEMU's restore to running", running / yardstick.running_ms, 1.0 / 50.0),
        Goal::at_most("clone to answer / QEMU's restore to answer", answered / yardstick.answered_ms, 1.0 / 8.0),
        Goal::at_most("eight clones to running / one clone", last / running, 4.0),
    ]);
    one.tell("clone", report);
    eight.tell("last of eight clones", report);
    pool.tell("clone out of the pool", report);
    pool_eight.tell("last of eight clones out of the pool", report);
    Ok(())
}

/// Times of the last clone of each call, in ms.
#[derive(Debug, Default)]
struct Clones {
    running: Vec<f64>,
    answered: Vec<f64>,
    ready: Vec<f64>,
    phases: BTreeMap<String, Vec<f64>>,
}

impl Clones {
    /// Clones of a checkpoint. What is ready for them is ready for `like`: clones of the checkpoint, or QEMUs for any VM of
    /// that shape.
    async fn sample(home: &Client, like: &str, checkpoint: &str, count: u32, rounds: usize) -> Result<Self> {
        let mut all = Self::default();
        let prepared = like == checkpoint;
        let last = |of: &dyn Fn(&api::CloneResult) -> Option<u64>, made: &[api::CloneResult]| {
            made.iter().map(of).max().flatten().map(ms).context("A clone was not waited for")
        };
        for _ in 0..rounds {
            warm(home, like, count, "h1").await?;
            let request = api::CloneRequest { wait_agent_s: 120, ..api::CloneRequest::new(count) };
            let made = home.clone_checkpoint(checkpoint, &request).await?.clones;
            remove(home, &made).await?;
            ensure!(made.iter().all(|c| c.warm && c.prepared == prepared), "What is measured was not ready");
            all.running.push(last(&|c| Some(c.running_us), &made)?);
            all.answered.push(last(&|c| c.answered_us, &made)?);
            all.ready.push(last(&|c| c.ready_us, &made)?);
            for phase in made.iter().flat_map(|c| &c.timeline.phases) {
                all.phases.entry(phase.name.clone()).or_default().push(ms(phase.duration_us));
            }
        }
        Ok(all)
    }

    fn tell(self, what: &str, report: &mut Report) {
        let Self { running, answered, ready, mut phases } = self;
        report.results.push(Measured::of(format!("{what}: request to running"), "ms", running));
        report.results.push(Measured::of(format!("{what}: request to agent's first answer"), "ms", answered));
        report.results.push(Measured::of(format!("{what}: request to ready (identity, entropy, clock)"), "ms", ready));
        for name in PHASES {
            if let Some(values) = phases.remove(name) {
                report.results.push(Measured::of(format!("{what}: of that, {name}"), "ms", values));
            }
        }
    }
}

async fn remove(home: &Client, clones: &[api::CloneResult]) -> Result<()> {
    for clone in clones {
        home.remove_vm(&clone.vm.name, true).await?;
    }
    Ok(())
}

/// Memory that idle clones hold: the image's pages once, and each clone's own.
async fn idle_memory(home: &Client, parent: &str, report: &mut Report) -> Result<()> {
    say("memory of eight idle clones");
    let mut held = Vec::new();
    let mut own = Vec::new();
    for count in [1, 8] {
        warm(home, parent, count, "h1").await?;
        let fork = fork(home, parent, count, &["h1"]).await?;
        let checkpoint = home.checkpoint_wait(&fork.parent.checkpoint.id.to_string()).await?;
        tokio::time::sleep(Duration::from_secs(3)).await;
        let image: u64 = checkpoint.layers.iter().map(|l| l.stored_bytes).sum();
        let mut private = 0;
        for clone in &fork.clones {
            let stats = home.vm_stats(&clone.vm.name).await?;
            private += stats.memory.context("A clone has no memory statistics")?.ram_private_bytes;
        }
        held.push((image + private) as f64);
        own.push(private as f64 / f64::from(count) / f64::from(1 << 20));
        undo_here(home, &fork).await?;
    }
    report.results.push(Measured::of("one idle clone: image and own pages", "MiB", vec![held[0] / f64::from(1 << 20)]));
    report.results.push(Measured::of(
        "eight idle clones: image and own pages",
        "MiB",
        vec![held[1] / f64::from(1 << 20)],
    ));
    report.results.push(Measured::of("idle clones: own pages of each", "MiB", own));
    report.goals.push(Goal::at_most("memory of eight idle clones / of one", held[1] / held[0], 1.3));
    Ok(())
}

/// Every sample writes all of the touched memory anew, so that all of it has changed since the last checkpoint.
async fn pause_by_size(home: &Client, samples: Samples, report: &mut Report) -> Result<()> {
    let mut medians = Vec::new();
    for touched in [256, 2048] {
        say(&format!("pause with {touched} MiB touched"));
        let vm = boot(home, &format!("large-{touched}"), LARGE).await?;
        let mut pauses = Vec::new();
        for _ in 0..samples.pauses {
            touch(home, &vm, touched).await?;
            tokio::time::sleep(Duration::from_secs(1)).await;
            let made = home.checkpoint(&vm, &api::CheckpointRequest { wait: true, ..Default::default() }).await?;
            pauses.push(ms(made.pause_us));
        }
        home.remove_vm(&vm, true).await?;
        drop_checkpoints(home).await?;
        let measured = Measured::of(format!("pause with {touched} MiB changed"), "ms", pauses);
        medians.push(measured.median);
        report.results.push(measured);
    }
    report.goals.push(Goal::at_most("pause with 2 GiB touched / with 256 MiB", medians[1] / medians[0], 1.5));
    Ok(())
}

/// Forks of forks: the parent goes once its clone runs.
async fn chain(home: &Client, samples: Samples, report: &mut Report) -> Result<()> {
    say("a chain of fifty forks");
    let mut vm = boot(home, "chain", ByteSize::mib(512)).await?;
    touch(home, &vm, 64).await?;
    let mut ends = Vec::new();
    for generation in 1..=GENERATIONS {
        if generation == 1 || generation == GENERATIONS {
            ends.push(generation_samples(home, &vm, samples.chain).await?);
        }
        warm(home, &vm, 1, "h1").await?;
        let fork = fork(home, &vm, 1, &["h1"]).await?;
        let clone = fork.clones.first().context("No clone")?.vm.name.clone();
        home.remove_vm(&vm, true).await?;
        vm = clone;
    }
    home.remove_vm(&vm, true).await?;
    for (what, pick) in [("pause", 0), ("request to running", 1)] {
        let of = |end: usize| ends[end][pick].clone();
        let first = Measured::of(format!("generation 1: {what}"), "ms", of(0));
        let last = Measured::of(format!("generation {GENERATIONS}: {what}"), "ms", of(1));
        report.goals.push(Goal::at_most(
            format!("{what} at generation {GENERATIONS} / at generation 1"),
            last.median / first.median,
            1.2,
        ));
        report.results.extend([first, last]);
    }
    Ok(())
}

/// Pauses and times to running of forks of one VM.
async fn generation_samples(home: &Client, vm: &str, count: usize) -> Result<[Vec<f64>; 2]> {
    let (mut pauses, mut running) = (Vec::new(), Vec::new());
    for _ in 0..count {
        warm(home, vm, 1, "h1").await?;
        let fork = fork(home, vm, 1, &["h1"]).await?;
        pauses.push(ms(fork.parent.pause_us));
        running.push(ms(fork.clones.first().context("No clone")?.running_us));
        undo_here(home, &fork).await?;
    }
    Ok([pauses, running])
}

// ------------------------------------------------------------------------------------------------------------- helpers

async fn boot(home: &Client, name: &str, memory: ByteSize) -> Result<String> {
    let request = api::RunRequest { name: Some(name.into()), memory, wait_agent_s: 300, ..api::RunRequest::new(IMAGE) };
    let vm = home.run(&request).await.with_context(|| format!("Can't boot {name}"))?;
    ensure!(vm.agent, "The agent of {name} did not answer");
    Ok(vm.name)
}

/// Shell commands that write `mib` MiB of random bytes, always to the same pages: 16 MiB, repeated (the speed of the
/// guest's random numbers is not what is measured).
fn fill_script(mib: u64) -> String {
    format!(
        "set -e; if ! test -d /fill; then mkdir /fill; mount -t tmpfs -o size=95% fill /fill; fi; cd /fill
        dd if=/dev/urandom of=block bs=1M count=16 conv=notrunc 2>/dev/null
        n=0; while [ $n -lt {} ]; do dd if=block of=data bs=1M seek=$((n*16)) conv=notrunc 2>/dev/null; n=$((n+1)); done",
        mib / 16 - 1
    )
}

async fn touch(home: &Client, vm: &str, mib: u64) -> Result<()> {
    let outcome = home.exec_collect(vm, ["sh", "-c", &fill_script(mib)]).await?;
    let stderr = String::from_utf8_lossy(&outcome.stderr);
    ensure!(outcome.code == 0, "{vm} can't fill its memory: {}", stderr.trim());
    Ok(())
}

async fn warm(home: &Client, like: &str, count: u32, host: &str) -> Result<()> {
    let request = api::PoolRequest { like: like.into(), count, hosts: vec![host.into()], wait: true };
    home.warm(&request).await.context("The pool does not fill")?;
    Ok(())
}

async fn fork(home: &Client, vm: &str, count: u32, hosts: &[&str]) -> Result<api::ForkResponse> {
    let hosts = hosts.iter().map(|h| (*h).to_owned()).collect();
    let clones = api::CloneRequest { hosts, wait_agent_s: 120, ..api::CloneRequest::new(count) };
    Ok(home.fork(vm, &api::ForkRequest { clones, ..Default::default() }).await?)
}

/// Removes the clones, and the checkpoint unless the parent's next layers stand on it.
async fn undo_here(home: &Client, fork: &api::ForkResponse) -> Result<()> {
    for clone in &fork.clones {
        home.remove_vm(&clone.vm.name, true).await?;
    }
    remove_unless_used(home, &fork.parent.checkpoint.id.to_string()).await
}

async fn undo(lab: &Lab, fork: &api::ForkResponse) -> Result<()> {
    for clone in &fork.clones {
        let number = lab.hosts().iter().position(|h| h.name == clone.vm.host).context("No such host")?;
        lab.client(number + 1).remove_vm(&clone.vm.name, true).await?;
    }
    remove_unless_used(&lab.client(1), &fork.parent.checkpoint.id.to_string()).await
}

async fn remove_unless_used(home: &Client, checkpoint: &str) -> Result<()> {
    match home.remove_checkpoint(checkpoint).await {
        Err(err) if err.code() != Some(api::ErrorCode::InUse) => Err(err.into()),
        _ => Ok(()),
    }
}

/// Removes all checkpoints that nothing uses, newest first.
async fn drop_checkpoints(home: &Client) -> Result<()> {
    for checkpoint in home.checkpoints().await?.checkpoints.iter().rev() {
        remove_unless_used(home, &checkpoint.id.to_string()).await?;
    }
    Ok(())
}

fn answered(clone: &api::CloneResult) -> Result<f64> {
    Ok(ms(clone.answered_us.context("A clone was not waited for")?))
}

fn ms(us: u64) -> f64 {
    us as f64 / 1e3
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

fn mib(name: &str, bytes: u64) -> Measured {
    Measured::of(name, "MiB", vec![bytes as f64 / f64::from(1 << 20)])
}

/// A tmpfs; unmounted when dropped.
struct Tmpfs(PathBuf);

impl Tmpfs {
    fn mount(path: PathBuf) -> Result<Self> {
        std::fs::create_dir_all(&path)?;
        rustix::mount::mount("ramet-bench", &path, "tmpfs", rustix::mount::MountFlags::empty(), None)
            .with_context(|| format!("Can't mount a tmpfs at {}: that needs root", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let path: &Path = &self.0;
        // The lab's own clean-up does it otherwise.
        let _ = rustix::mount::unmount(path, rustix::mount::UnmountFlags::DETACH);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_script_fills_what_it_is_told() {
        let script = fill_script(512);
        assert!(script.contains("-lt 31 "), "16 MiB of blocks and 31 copies: {script}");
    }
}
