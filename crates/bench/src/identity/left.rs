//! What forks leave behind on their host.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};
use ramet_client::{Client, api};
use ramet_lab::Lab;

use super::{boot, drop_checkpoints, fork, in_space, remove_unless_used, request, say, warm};
use crate::report::{Goal, Measured, Report};

/// How long what goes in the background may take.
const LIMIT: Duration = Duration::from_secs(30);

/// Forks and kills in a row, and then looks what is there.
pub(super) async fn measure(lab: &Lab, quick: bool, report: &mut Report) -> Result<()> {
    let home = lab.client(1);
    let with_network = api::RunRequest {
        disk: Some(super::WEB.into()),
        network: Some(api::Egress::Nat),
        ..request("parent", super::DEFAULT)
    };
    // The host's own rules come with its first network, and stay: those are no leftovers.
    let first = boot(&home, &api::RunRequest { name: Some("first".into()), ..with_network.clone() }).await?.name;
    home.remove_vm(&first, true).await?;
    tokio::time::sleep(Duration::from_secs(2)).await;
    let before = Things::of(lab, &home).await?;
    let parent = boot(&home, &with_network).await?.name;
    let rounds = if quick { 20 } else { 100 };
    for round in 1..=rounds {
        if round % 20 == 0 {
            say(&format!("fork and kill {round} of {rounds}"));
        }
        let made =
            fork(&home, &parent, 1, &["h1"], api::Quiesce::default()).await.with_context(|| format!("fork {round}"))?;
        for clone in &made.clones {
            home.remove_vm(&clone.vm.name, true).await?;
        }
        remove_unless_used(&home, &made.parent.checkpoint.id.to_string()).await?;
    }
    // Pre-started QEMUs are no leftovers, and go.
    warm(&home, &parent, 0, "h1").await?;
    home.remove_vm(&parent, true).await?;
    drop_checkpoints(&home).await?;
    let deadline = Instant::now() + LIMIT;
    let left = loop {
        let left = Things::of(lab, &home).await?.more_than(&before);
        if left.is_empty() || Instant::now() > deadline {
            break left;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    for thing in &left {
        eprintln!("identity: left behind: {thing}");
    }
    report.goals.push(Goal::at_most(
        format!("things left on a host by {rounds} forks and kills, their parent gone too"),
        left.len() as f64,
        0.0,
    ));
    report.results.push(Measured::of("forks and kills in a row", "forks", vec![f64::from(rounds)]));
    Ok(())
}

/// What is on a host, each thing by a name.
struct Things(BTreeSet<String>);

impl Things {
    async fn of(lab: &Lab, home: &Client) -> Result<Self> {
        let mut things = BTreeSet::new();
        let state = lab.dir().join("h1");
        let pooled = pooled(&state.join("pool"));
        // NBD servers and pagers are processes, too.
        for process in lab.processes(1)? {
            let line = fs::read(format!("/proc/{}/cmdline", process.pid)).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            let ready = process.program.starts_with("qemu-system") && pooled.iter().any(|dir| line.contains(dir));
            if process.program != "rametd" && !ready {
                things.insert(format!("process {} {}", process.pid, process.program));
            }
        }
        for vm in home.vms(false).await?.vms {
            things.insert(format!("VM {}", vm.name));
        }
        for checkpoint in home.checkpoints().await?.checkpoints {
            things.insert(format!("checkpoint {}", checkpoint.id));
        }
        let host = lab.hosts().first().context("The lab has no host")?;
        let space = Path::new("/run/netns").join(&host.netns);
        for line in in_space(&space, &["ip", "-o", "link"])?.lines() {
            let name = line.split(": ").nth(1).unwrap_or(line).split('@').next().unwrap_or(line);
            if !["lo", "eth0"].contains(&name) {
                things.insert(format!("device {name}"));
            }
        }
        // Counters change by themselves.
        for line in in_space(&space, &["nft", "--stateless", "list", "ruleset"])?.lines() {
            things.insert(format!("rule {}", line.trim()));
        }
        for (dir, spared) in [
            ("net", None),
            ("disks", Some("templates")),
            ("vms", None),
            ("pages", None),
            ("disk", None),
            ("checkpoints", None),
        ] {
            for path in files(&state.join(dir)) {
                if spared.is_none_or(|spared| !path.starts_with(state.join(dir).join(spared))) {
                    things.insert(format!("file {}", path.display()));
                }
            }
        }
        Ok(Self(things))
    }

    /// All but the rules that were there before.
    fn more_than(self, before: &Self) -> Vec<String> {
        let known = |thing: &String| thing.starts_with("rule ") && before.0.contains(thing);
        self.0.into_iter().filter(|thing| !known(thing)).collect()
    }
}

/// Directories of QEMUs that are ready for the next clones.
fn pooled(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.map(|entry| format!("{}/", entry.path().display())).collect()
}

/// Everything below a directory, itself left out.
fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.extend(files(&path));
        }
        found.push(path);
    }
    found
}
