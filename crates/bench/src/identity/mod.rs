//! `bench identity`: whether a clone is somebody of its own - addresses, random numbers, disk - what that costs, and whether
//! anything of it stays.
//!
//! Each part has a lab of its own, so that what fails in one is no other's trouble.

mod answer;
mod disk;
mod left;
mod random;
mod wire;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use ramet_client::{Client, api};
use ramet_image::{BuildOptions, ImageStore};
use ramet_lab::{Lab, LabOptions};
use ramet_memory::{ByteSize, FamilyId};

use crate::report::{Goal, Measured, Report};

pub use answer::network_child;

/// The guest with a disk, a web server and Python.
const WEB: &str = "web";
/// The guest that is all in memory.
const DEFAULT: &str = "default";
const MEMORY: ByteSize = ByteSize::mib(512);
const MIB: f64 = 1_048_576.0;

/// The parts, as they are named when one can't be measured.
#[derive(Debug, Clone, Copy)]
enum Part {
    Answer,
    NetworkWork,
    Random,
    RandomDriver,
    Pause,
    ImageSize,
    DiskBytes,
    Wire,
    Left,
}

impl Part {
    const ALL: [Self; 9] = [
        Self::Answer,
        Self::NetworkWork,
        Self::Random,
        Self::RandomDriver,
        Self::Pause,
        Self::ImageSize,
        Self::DiskBytes,
        Self::Wire,
        Self::Left,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Answer => "a clone's web server",
            Self::NetworkWork => "network set-up",
            Self::Random => "random numbers, 6.1",
            Self::RandomDriver => "random numbers, 6.12",
            Self::Pause => "the pause with a disk and a network",
            Self::ImageSize => "golden images of 1 and 10 GiB",
            Self::DiskBytes => "disk bytes fetched",
            Self::Wire => "frames with the parent's identity",
            Self::Left => "what forks leave behind",
        }
    }

    fn hosts(self) -> u8 {
        match self {
            Self::Answer | Self::Wire => 3,
            Self::DiskBytes => 2,
            Self::NetworkWork => 0,
            Self::Random | Self::RandomDriver | Self::Pause | Self::ImageSize | Self::Left => 1,
        }
    }

    /// Words by which one part can be asked for.
    fn word(self) -> &'static str {
        match self {
            Self::Answer => "answer",
            Self::NetworkWork => "network",
            Self::Random => "random",
            Self::RandomDriver => "random-driver",
            Self::Pause => "pause",
            Self::ImageSize => "image-size",
            Self::DiskBytes => "disk-bytes",
            Self::Wire => "wire",
            Self::Left => "left",
        }
    }
}

/// Runs the bench; `quick` takes fewer samples. `only` names parts to measure; empty: all.
///
/// # Errors
/// When a part of `only` is none. What can't be measured is told as a goal that is not met.
pub async fn run(quick: bool, only: &[String]) -> Result<Report> {
    let mut report = Report::new("identity");
    for word in only {
        let words = Part::ALL.map(Part::word);
        ensure!(words.contains(&word.as_str()), "No part '{word}': there are {}", words.join(", "));
    }
    for part in Part::ALL {
        if only.is_empty() || only.iter().any(|word| word == part.word()) {
            say(part.name());
            let done = measure(part, quick, &mut report).await;
            if let Err(err) = done {
                eprintln!("identity: {}: {err:#}", part.name());
                report.goals.push(Goal::at_least(format!("{}: all of it could be measured", part.name()), 0.0, 1.0));
            }
        }
    }
    Ok(report)
}

async fn measure(part: Part, quick: bool, report: &mut Report) -> Result<()> {
    if part.hosts() == 0 {
        return answer::network_work(quick, report);
    }
    match part {
        Part::RandomDriver => random::driver_image().await?,
        Part::ImageSize => disk::sized_images().await?,
        _ => {}
    }
    let lab = Lab::up(&LabOptions::for_test("bench")?.hosts(part.hosts())).await?;
    let done = match part {
        Part::Answer => answer::measure(&lab, quick, report).await,
        Part::Random => random::without_driver(&lab, quick, report).await,
        Part::RandomDriver => random::with_driver(&lab, quick, report).await,
        Part::Pause => disk::pause(&lab, quick, report).await,
        Part::ImageSize => disk::image_size(&lab, quick, report).await,
        Part::DiskBytes => disk::bytes_fetched(&lab, quick, report).await,
        Part::Wire => wire::measure(&lab, report).await,
        Part::Left => left::measure(&lab, quick, report).await,
        Part::NetworkWork => Ok(()),
    };
    if done.is_err() {
        for (number, host) in (1..).zip(lab.hosts()) {
            eprintln!("--- end of the log of {}:\n{}", host.name, lab.log_tail(number, 8).unwrap_or_default());
        }
    }
    let down = lab.down().await;
    done.and(down)
}

// ------------------------------------------------------------------------------------------------------------- helpers

fn say(text: &str) {
    eprintln!("identity: {text}");
}

fn request(name: &str, image: &str) -> api::RunRequest {
    api::RunRequest { name: Some(name.into()), memory: MEMORY, wait_agent_s: 600, ..api::RunRequest::new(image) }
}

async fn boot(home: &Client, request: &api::RunRequest) -> Result<api::VmInfo> {
    let name = request.name.clone().unwrap_or_default();
    let vm = home.run(request).await.with_context(|| format!("Can't boot {name}"))?;
    ensure!(vm.agent, "The agent of {name} did not answer");
    Ok(vm)
}

/// Runs a script in a guest: what it printed.
async fn sh(home: &Client, vm: &str, script: &str) -> Result<String> {
    let outcome = home.exec_collect(vm, ["sh", "-c", script]).await?;
    let stderr = String::from_utf8_lossy(&outcome.stderr);
    ensure!(outcome.code == 0, "{vm}: `{script}` ends with {}: {}", outcome.code, stderr.trim());
    Ok(outcome.text())
}

/// Writes a program into a guest.
async fn put(home: &Client, vm: &str, path: &str, text: &'static str) -> Result<()> {
    home.put_file(vm, path, 0o644, text.len() as u64, text.as_bytes()).await?;
    Ok(())
}

/// Waits until a guest's own web server answers it.
async fn wait_for_apache(home: &Client, vm: &str) -> Result<()> {
    let script = "i=0; until [ \"$(curl -s -o /dev/null -w '%{http_code}' http://127.0.0.1/)\" = 200 ]; do \
                  i=$((i+1)); [ $i -lt 300 ] || exit 1; sleep 0.2; done";
    sh(home, vm, script).await.map(drop)
}

async fn warm(home: &Client, like: &str, count: u32, host: &str) -> Result<()> {
    let request = api::PoolRequest { like: like.into(), count, hosts: vec![host.into()], wait: true };
    home.warm(&request).await.context("The pool does not fill")?;
    Ok(())
}

async fn fork(home: &Client, vm: &str, count: u32, hosts: &[&str], quiesce: api::Quiesce) -> Result<api::ForkResponse> {
    let hosts = hosts.iter().map(|h| (*h).to_owned()).collect();
    let clones = api::CloneRequest { hosts, wait_agent_s: 300, ..api::CloneRequest::new(count) };
    Ok(home.fork(vm, &api::ForkRequest { clones, quiesce, ..Default::default() }).await?)
}

/// The client of the host that a VM is on.
fn client_of(lab: &Lab, vm: &api::VmInfo) -> Result<Client> {
    let number = lab.hosts().iter().position(|h| h.name == vm.host).context("No such host")?;
    Ok(lab.client(number + 1))
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

/// The file that names a family's namespace on a host.
fn space_file(lab: &Lab, host: usize, family: FamilyId) -> PathBuf {
    lab.dir().join(format!("h{host}/net/{}", family.short()))
}

/// Runs a command in a network namespace: what it printed.
fn in_space(space: &Path, command: &[&str]) -> Result<String> {
    let mut line = Command::new("nsenter");
    line.arg(format!("--net={}", space.display())).args(command);
    let output = line.output().context("Can't start nsenter: install util-linux")?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{command:?} in {}: {}", space.display(), stderr.trim());
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Where images are, as the lab finds them.
fn images() -> Result<ImageStore> {
    Ok(ImageStore::new(LabOptions::new("x")?.image_dir))
}

/// Builds an image when there is none or the agent is newer. With `size` it has a disk.
fn build(name: &str, suite: Option<&str>, packages: &[&str], size: Option<ByteSize>) -> Result<()> {
    let store = images()?;
    let agent = LabOptions::new("x")?.bin_dir.join("ramet-agent-static");
    let modified = |path: &Path| fs::metadata(path).and_then(|data| data.modified());
    let newest = modified(&agent)
        .with_context(|| format!("{} is not there: `cargo xtask setup --release` builds it", agent.display()))?;
    if modified(&store.dir().join(name).join("image.json")).is_ok_and(|made| made >= newest) {
        return Ok(());
    }
    say(&format!("building the guest image {name}"));
    let options = BuildOptions {
        name: name.to_owned(),
        packages: packages.iter().map(|&p| p.to_owned()).collect(),
        suite: suite.map(str::to_owned),
        add: Vec::new(),
        agent,
        replace: true,
    };
    let built = match size {
        Some(size) => store.build_debian(&options, size.bytes(), &mut |_| {}),
        None => store.build(&options, &mut |_| {}),
    };
    built.with_context(|| format!("Can't build the guest image {name}"))?;
    Ok(())
}

/// The same, away from the threads that others' work waits for.
async fn build_aside(
    name: &'static str,
    suite: Option<&'static str>,
    packages: &'static [&'static str],
    size: Option<ByteSize>,
) -> Result<()> {
    tokio::task::spawn_blocking(move || build(name, suite, packages, size)).await?
}

fn one(name: impl Into<String>, unit: &'static str, value: f64) -> Measured {
    Measured::of(name, unit, vec![value])
}

fn median(samples: &[f64]) -> f64 {
    Measured::of("", "", samples.to_vec()).median
}

fn ms(us: u64) -> f64 {
    us as f64 / 1e3
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
