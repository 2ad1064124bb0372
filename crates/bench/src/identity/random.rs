//! Whether clones draw the same random numbers.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use ramet_client::{Client, api};
use ramet_lab::Lab;

use super::{boot, build_aside, drop_checkpoints, fork, ms, put, request, say, sh, warm};
use crate::report::{Goal, Measured, Report};

/// The image with a kernel that has the driver for `vmgenid`.
const DRIVER: &str = "identity-trixie";
/// QEMU 7.2 emulates CMPXCHG16B wrongly, and Linux 6.12 falls over it.
const DRIVER_CPU: &str = "max,cx16=off";
/// Most bytes of one guest's draws.
const LIMIT: usize = 256 << 20;

/// Draws without pause until it is told to end. The time comes before the number, so that a number that was drawn before
/// the fork has the same time in all.
const DRAW: &str = "
import os, time
log = os.open('/dev/shm/draws', os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
while not os.path.exists('/dev/shm/enough'):
    for _ in range(64):
        at = time.monotonic_ns()
        os.write(log, b'%d %s\\n' % (at, os.urandom(16).hex().encode()))
open('/dev/shm/done', 'w').close()
";

/// The image for [`with_driver`].
pub(super) async fn driver_image() -> Result<()> {
    build_aside(DRIVER, Some("trixie"), &["python3-minimal"], None).await
}

/// On a kernel that does not learn from the machine that it was cloned.
pub(super) async fn without_driver(lab: &Lab, quick: bool, report: &mut Report) -> Result<()> {
    measure(lab, "Linux 6.1, no vmgenid driver", &request("draws", super::WEB), quick, report).await
}

/// On a kernel that does.
pub(super) async fn with_driver(lab: &Lab, quick: bool, report: &mut Report) -> Result<()> {
    let request =
        api::RunRequest { cpu: Some(DRIVER_CPU.into()), accel: Some(api::AccelKind::Tcg), ..request("draws", DRIVER) };
    measure(lab, "Linux 6.12, vmgenid driver", &request, quick, report).await
}

async fn measure(lab: &Lab, what: &str, wanted: &api::RunRequest, quick: bool, report: &mut Report) -> Result<()> {
    let home = lab.client(1);
    let parent = boot(&home, wanted).await?.name;
    let release = sh(&home, &parent, "uname -r").await?;
    say(&format!("{what}: {release}"));
    put(&home, &parent, "/root/draw.py", DRAW).await?;
    let rounds = if quick { 2 } else { 8 };
    let (mut equal, mut drawn, mut loose, mut freezing) = (0, Vec::new(), Vec::new(), Vec::new());
    for _ in 0..rounds {
        let round = Round::run(&home, &parent, true).await?;
        equal += round.equal;
        drawn.push(round.after as f64);
        freezing.push(round.freeze_ms.context("The parent's timeline has no phase 'freeze'")?);
    }
    for _ in 0..rounds {
        loose.push(Round::run(&home, &parent, false).await?.equal as f64);
    }
    report.goals.push(Goal::at_most(
        format!("{what}: equal random values after the fork in two of parent and two clones, applications frozen"),
        equal as f64,
        0.0,
    ));
    report.results.extend([
        Measured::of(format!("{what} ({release}): values drawn after each fork"), "values", drawn),
        Measured::of(format!("{what}: equal values after a fork, not frozen"), "values", loose),
        Measured::of(format!("{what}: freezing the applications"), "ms", freezing),
    ]);
    home.remove_vm(&parent, true).await?;
    drop_checkpoints(&home).await
}

/// One fork to two clones.
struct Round {
    equal: usize,
    after: usize,
    freeze_ms: Option<f64>,
}

impl Round {
    async fn run(home: &Client, parent: &str, freeze: bool) -> Result<Self> {
        warm(home, parent, 2, "h1").await?;
        let start = "rm -f /dev/shm/enough /dev/shm/done /dev/shm/draws; \
                     python3 /root/draw.py >/dev/shm/draw.log 2>&1 </dev/null &";
        sh(home, parent, start).await?;
        let wait =
            "i=0; until [ -s /dev/shm/draws ]; do i=$((i+1)); [ $i -lt 300 ] || exit 1; sleep 0.1; done; sleep 1";
        sh(home, parent, wait).await?;
        let made = fork(home, parent, 2, &["h1"], api::Quiesce { freeze, ..Default::default() }).await?;
        tokio::time::sleep(Duration::from_secs(2)).await;
        let mut logs = vec![draws(home, parent).await?];
        for clone in &made.clones {
            logs.push(draws(home, &clone.vm.name).await?);
            home.remove_vm(&clone.vm.name, true).await?;
        }
        super::remove_unless_used(home, &made.parent.checkpoint.id.to_string()).await?;
        let (equal, after) = compare(&logs);
        let least = after.iter().copied().min().unwrap_or(0);
        ensure!(after.len() == 3 && least > 0, "Not all drew after the fork: {after:?} values");
        Ok(Self { equal, after: least, freeze_ms: made.parent.timeline.phase_us("freeze").map(ms) })
    }
}

/// What a guest drew, each with its time.
async fn draws(home: &Client, vm: &str) -> Result<String> {
    let wait = "touch /dev/shm/enough; i=0; until [ -e /dev/shm/done ]; do \
                i=$((i+1)); [ $i -lt 300 ] || { cat /dev/shm/draw.log >&2; exit 1; }; sleep 0.1; done";
    sh(home, vm, wait).await?;
    let bytes = home.get_file(vm, "/dev/shm/draws").await?.read_to_end(LIMIT).await?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Of logs: how many values two of them have that are not from before the fork, and how many of each are from after it.
/// From before is what all have, with the same time.
fn compare(logs: &[String]) -> (usize, Vec<usize>) {
    let lines: Vec<BTreeSet<&str>> = logs.iter().map(|log| log.lines().collect()).collect();
    let before = |line: &str| lines.iter().all(|log| log.contains(line));
    let mut seen: BTreeMap<&str, BTreeSet<usize>> = BTreeMap::new();
    let mut after = vec![0; logs.len()];
    for (number, log) in lines.iter().enumerate() {
        for line in log.iter().filter(|line| !before(line)) {
            after[number] += 1;
            if let Some((_, value)) = line.split_once(' ') {
                seen.entry(value).or_default().insert(number);
            }
        }
    }
    // A value from before that comes again with another time was drawn again.
    let old: BTreeSet<&str> =
        lines.first().into_iter().flatten().filter(|l| before(l)).filter_map(|l| Some(l.split_once(' ')?.1)).collect();
    let equal = seen.iter().filter(|(value, who)| who.len() > 1 || old.contains(*value)).count();
    (equal, after)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_values_are_found() {
        let logs = |texts: [&str; 3]| texts.map(str::to_owned);
        assert_eq!(compare(&logs(["1 a\n2 b\n", "1 a\n2 c\n", "1 a\n2 d\n"])), (0, vec![1, 1, 1]));
        assert_eq!(compare(&logs(["1 a\n2 b\n", "1 a\n2 c\n", "1 a\n2 c\n"])).0, 1, "in both clones");
        assert_eq!(compare(&logs(["1 a\n2 b\n", "1 a\n3 b\n", "1 a\n2 c\n"])).0, 1, "at another time");
        assert_eq!(compare(&logs(["1 a\n2 b\n", "1 a\n5 a\n", "1 a\n2 c\n"])).0, 1, "again");
    }
}
