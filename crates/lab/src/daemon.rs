//! Starting a host's `rametd`.

use std::{
    fs::{self, File},
    os::{fd::AsFd as _, unix::process::CommandExt as _},
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use ramet_client::Client;
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::record::{HostRecord, LabRecord, PORT};

/// How long a daemon may take until it answers.
const READY: Duration = Duration::from_secs(30);

/// Starts the daemon of a host in its namespace; it may not answer yet.
pub(crate) fn spawn(record: &LabRecord, host: &HostRecord) -> Result<Child> {
    let netns = Path::new("/run/netns").join(&host.netns);
    let netns_file = File::open(&netns).with_context(|| format!("No network namespace {}", netns.display()))?;
    let log = File::options()
        .create(true)
        .append(true)
        .open(&host.log)
        .with_context(|| format!("Can't write {}", host.log.display()))?;
    fs::create_dir_all(&host.state_dir).with_context(|| format!("Can't make {}", host.state_dir.display()))?;
    let program = record.bin_dir.join("rametd");
    let mut command = Command::new(&program);
    command
        .arg("--name")
        .arg(&host.name)
        .arg("--state-dir")
        .arg(&host.state_dir)
        .arg("--socket")
        .arg(&host.socket)
        .arg("--listen")
        .arg(format!("{}:{PORT}", host.address))
        .arg("--image-dir")
        .arg(host.image_dir.as_ref().unwrap_or(&record.image_dir))
        .arg("--disk-dir")
        .arg(host.state_dir.join("disks"));
    if let Some(group) = &record.group {
        command.arg("--group").arg(group);
    }
    command
        .args(&record.daemon_args)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .current_dir("/")
        // Ctrl-C on our terminal is not for it.
        .process_group(0);
    // A thread of its own enters the namespace, its child stays in it. Only the network changes: the daemon's mounts
    // stay visible to its successor and to the clean-up.
    let enter_and_spawn = move || -> Result<Child> {
        move_into_link_name_space(netns_file.as_fd(), Some(LinkNameSpaceType::Network))
            .with_context(|| format!("Can't enter {}: that needs root", netns.display()))?;
        command.spawn().with_context(|| format!("Can't start {}", program.display()))
    };
    std::thread::spawn(enter_and_spawn).join().map_err(|_| anyhow::anyhow!("The thread that starts rametd panicked"))?
}

/// Waits until the daemon answers.
///
/// # Errors
/// When it ends, or does not answer in time: with the end of its log.
pub(crate) async fn wait_ready(host: &HostRecord, child: &mut Child) -> Result<()> {
    let client = Client::unix(&host.socket);
    let deadline = Instant::now() + READY;
    loop {
        let err = match client.info().await {
            Ok(_) => return Ok(()),
            Err(err) => err,
        };
        if let Some(status) = child.try_wait()? {
            bail!("rametd of {} ended at its start ({status}):\n{}", host.name, log_tail(host, 15));
        }
        if Instant::now() > deadline {
            bail!(
                "rametd of {} does not answer within {} s: {err}\n{}",
                host.name,
                READY.as_secs(),
                log_tail(host, 15)
            );
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// The last lines that a host's daemon printed.
pub(crate) fn log_tail(host: &HostRecord, lines: usize) -> String {
    let text = fs::read(&host.log).map(|b| String::from_utf8_lossy(&b).into_owned()).unwrap_or_default();
    let all: Vec<&str> = text.lines().collect();
    all[all.len().saturating_sub(lines)..].join("\n")
}
