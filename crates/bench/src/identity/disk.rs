//! What a disk and a network cost: the parent's pause, and the bytes that a clone elsewhere fetches.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    os::unix::net::UnixStream,
    path::Path,
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use ramet_client::{Client, api};
use ramet_disk::control::{DiskKind, Request, Response, StatusReply};
use ramet_lab::Lab;
use ramet_memory::ByteSize;

use super::{
    MIB, boot, build_aside, drop_checkpoints, fork, images, median, ms, one, remove_unless_used, request, say, sh,
    wait_for_apache, warm,
};
use crate::report::{Goal, Measured, Report};

/// As in the image `web`.
const PACKAGES: &[&str] = &["apache2", "curl", "python3-minimal"];
const SIZES: [(&str, ByteSize); 2] = [("identity-1g", ByteSize::mib(1024)), ("identity-10g", ByteSize::mib(10_240))];

/// What a parent writes to its own disk.
const OWN_MIB: u64 = 16;

/// Of a parent, what its pause is made of.
const PHASES: [&str; 3] = ["save", "commit", "resume"];

/// One checkpoint: the parent's pause in ms.
async fn checkpoint(home: &Client, vm: &str) -> Result<f64> {
    Ok(checkpoint_phases(home, vm).await?[0])
}

/// One checkpoint: the parent's pause in ms, and its [`PHASES`].
async fn checkpoint_phases(home: &Client, vm: &str) -> Result<[f64; 4]> {
    let made = home.checkpoint(vm, &api::CheckpointRequest { wait: true, ..Default::default() }).await?;
    remove_unless_used(home, &made.checkpoint.id.to_string()).await?;
    let [save, commit, resume] = PHASES.map(|name| ms(made.timeline.phase_us(name).unwrap_or(0)));
    Ok([ms(made.pause_us), save, commit, resume])
}

/// Pauses of two VMs that differ in nothing else.
pub(super) async fn pause(lab: &Lab, quick: bool, report: &mut Report) -> Result<()> {
    let home = lab.client(1);
    let with = api::RunRequest {
        disk: Some(super::WEB.into()),
        network: Some(api::Egress::Nat),
        ..request("with", super::DEFAULT)
    };
    let without = api::RunRequest { network: Some(api::Egress::Off), ..request("without", super::DEFAULT) };
    let names = [boot(&home, &with).await?.name, boot(&home, &without).await?.name];
    let mut pauses = [Vec::new(), Vec::new()];
    // The first of each attaches the memory to the pager.
    for name in &names {
        checkpoint(&home, name).await?;
    }
    for _ in 0..if quick { 12 } else { 40 } {
        for (name, pauses) in names.iter().zip(&mut pauses) {
            pauses.push(checkpoint_phases(&home, name).await?);
        }
    }
    for name in names {
        home.remove_vm(&name, true).await?;
    }
    drop_checkpoints(&home).await?;
    let column = |of: &[[f64; 4]], at: usize| of.iter().map(|sample| sample[at]).collect::<Vec<_>>();
    let [with, without] = &pauses;
    report.goals.push(Goal::at_most(
        "parent's pause with a disk and a network / without",
        median(&column(with, 0)) / median(&column(without, 0)),
        1.3,
    ));
    for (what, samples) in [("with a disk and a network", with), ("without", without)] {
        report.results.push(Measured::of(format!("pause {what}"), "ms", column(samples, 0)));
        for (at, phase) in (1..).zip(PHASES) {
            report.results.push(Measured::of(format!("pause {what}: of that, {phase}"), "ms", column(samples, at)));
        }
    }
    Ok(())
}

/// The images for [`image_size`].
pub(super) async fn sized_images() -> Result<()> {
    for (name, size) in SIZES {
        build_aside(name, None, PACKAGES, Some(size)).await?;
    }
    Ok(())
}

/// Pauses and clones of two VMs whose golden images differ only in size.
pub(super) async fn image_size(lab: &Lab, quick: bool, report: &mut Report) -> Result<()> {
    let home = lab.client(1);
    let mut checkpoints = Vec::new();
    for (name, _) in SIZES {
        let vm = boot(&home, &request(name, name)).await?.name;
        wait_for_apache(&home, &vm).await?;
        let made = home.checkpoint(&vm, &api::CheckpointRequest { wait: true, ..Default::default() }).await?;
        checkpoints.push(made.checkpoint.id.to_string());
    }
    let (mut pauses, mut running) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    for _ in 0..if quick { 12 } else { 30 } {
        for (number, (vm, _)) in SIZES.iter().enumerate() {
            pauses[number].push(checkpoint(&home, vm).await?);
            warm(&home, &checkpoints[number], 0, "h1").await?;
            warm(&home, vm, 1, "h1").await?;
            let clones = api::CloneRequest { wait_agent_s: 120, ..api::CloneRequest::new(1) };
            let made = home.clone_checkpoint(&checkpoints[number], &clones).await?.clones;
            let clone = made.first().context("No clone")?;
            running[number].push(ms(clone.running_us));
            home.remove_vm(&clone.vm.name, true).await?;
        }
    }
    for (vm, _) in SIZES {
        home.remove_vm(vm, true).await?;
    }
    drop_checkpoints(&home).await?;
    for (what, [small, large]) in [("parent's pause", pauses), ("clone out of the pool, request to running", running)] {
        let ratio = median(&large) / median(&small);
        report.goals.push(Goal::at_most(format!("{what}: golden image of 10 GiB / of 1 GiB"), ratio, 1.1));
        report.results.push(Measured::of(format!("{what}: golden image of 1 GiB"), "ms", small));
        report.results.push(Measured::of(format!("{what}: golden image of 10 GiB"), "ms", large));
    }
    Ok(())
}

/// Asks a `ramet-disk` how it stands.
pub(super) fn status(socket: &Path) -> Result<StatusReply> {
    let stream = UnixStream::connect(socket).with_context(|| format!("Can't connect to {}", socket.display()))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    writeln!(&stream, "{}", serde_json::to_string(&Request::Status)?)?;
    let mut line = String::new();
    BufReader::new(&stream).read_line(&mut line)?;
    match serde_json::from_str(&line)? {
        Response::Ok(value) => Ok(serde_json::from_value(value)?),
        Response::Error(err) => bail!("ramet-disk says: {err}"),
    }
}

/// Bytes of disks that came from other hosts.
fn fetched(socket: &Path) -> Result<u64> {
    let remote = status(socket)?.disks.into_iter().filter(|d| d.kind == DiskKind::Remote);
    Ok(remote.map(|d| d.fetched_bytes).sum())
}

/// What the first clone on another host fetches, and its sibling.
pub(super) async fn bytes_fetched(lab: &Lab, quick: bool, report: &mut Report) -> Result<()> {
    let (home, there) = (lab.client(1), lab.client(2));
    let image = images()?.load(super::WEB)?;
    let stored = image.manifest.disk.as_ref().context("The image has no disk")?.stored;
    let (mut first, mut second, mut control, mut second_read) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for round in 0..if quick { 2 } else { 5 } {
        say(&format!("a clone elsewhere and its sibling, {}", round + 1));
        // A family of its own each time: nothing of it is on the other host.
        let parent = boot(&home, &request("parent", super::WEB)).await?;
        wait_for_apache(&home, &parent.name).await?;
        // Its own disk has something that is in no golden image.
        let own =
            format!("dd if=/dev/urandom of=/var/tmp/own bs=1M count={OWN_MIB} 2>/dev/null; sync; md5sum /var/tmp/own");
        let sum = sh(&home, &parent.name, &own).await?;
        let socket = lab.dir().join(format!("h2/disk/{}/control.sock", parent.family));
        let made = fork(&home, &parent.name, 1, &["h2"], api::Quiesce::default()).await?;
        let clone = made.clones.first().context("No clone")?.vm.name.clone();
        wait_for_apache(&there, &clone).await?;
        let until_answer = fetched(&socket)?;
        let checkpoint = made.parent.checkpoint.id.to_string();
        // That bytes are counted is seen when it reads what it has from its parent's disk alone.
        let read = "echo 3 >/proc/sys/vm/drop_caches; md5sum /var/tmp/own";
        ensure!(sh(&there, &clone, read).await? == sum, "A clone elsewhere reads other bytes than its parent wrote");
        // What the first one still fetches for itself is none of its sibling's.
        tokio::time::sleep(Duration::from_secs(3)).await;
        let before = fetched(&socket)?;
        let grown = before.saturating_sub(until_answer);
        ensure!(grown >= OWN_MIB << 20, "Reading {OWN_MIB} MiB of the parent's disk fetched {grown} bytes only");
        control.push(grown as f64);
        let request = api::CloneRequest { hosts: vec!["h2".into()], wait_agent_s: 300, ..api::CloneRequest::new(1) };
        let sibling = home.clone_checkpoint(&checkpoint, &request).await?.clones;
        let sibling = sibling.first().context("No clone")?.vm.name.clone();
        wait_for_apache(&there, &sibling).await?;
        first.push(until_answer as f64);
        let until_answer = fetched(&socket)?;
        second.push(until_answer.saturating_sub(before) as f64);
        ensure!(sh(&there, &sibling, read).await? == sum, "A sibling reads other bytes than its parent wrote");
        second_read.push(fetched(&socket)?.saturating_sub(until_answer) as f64);
        for vm in [clone, sibling] {
            there.remove_vm(&vm, true).await?;
        }
        home.remove_vm(&parent.name, true).await?;
        drop_checkpoints(&home).await?;
    }
    report.goals.push(Goal::at_most(
        "disk bytes that a clone on another host fetches until its Apache answers / bytes stored of its image",
        median(&first) / stored as f64,
        0.01,
    ));
    report.goals.push(Goal::at_most(
        "disk bytes that its sibling there fetches more",
        second.iter().copied().fold(0.0, f64::max),
        0.0,
    ));
    let mib = |values: Vec<f64>| values.into_iter().map(|bytes| bytes / MIB).collect();
    report.results.extend([
        Measured::of("clone elsewhere: disk bytes fetched until its Apache answers", "MiB", mib(first)),
        Measured::of("its sibling: disk bytes fetched until its Apache answers", "MiB", mib(second)),
        Measured::of(
            format!("clone elsewhere: fetched to read {OWN_MIB} MiB that its parent wrote"),
            "MiB",
            mib(control),
        ),
        Measured::of("its sibling: fetched to read the same", "MiB", mib(second_read)),
        one("image: bytes stored", "MiB", stored as f64 / MIB),
    ]);
    Ok(())
}
