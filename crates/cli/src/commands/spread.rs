//! Making clones: clone, fork, and what is ready for them.

use anyhow::{Context as _, Result, bail};
use ramet_client::{
    Lease,
    api::{CheckpointResult, CloneOptions, CloneRequest, CloneResult, ForkRequest, PoolRequest, Timeline},
};
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    args::{CloneArgs, ForkArgs, SpreadArgs, WarmArgs},
    context::Context,
    output::{self, Rows, us},
};

pub(crate) async fn clone(context: &Context, args: &CloneArgs) -> Result<()> {
    let client = context.client()?;
    let lease = if args.spread.life.hold { Some(client.lease().await?) } else { None };
    let request = request(&args.spread, lease.as_ref())?;
    let made = client.clone_checkpoint(&args.checkpoint, &request).await?;
    context.out.show(&made, |made| {
        let mut text = clones(&made.clones);
        if args.spread.timeline {
            text.push_str(&timelines(None, &made.clones));
        }
        text
    })?;
    hold(lease).await
}

pub(crate) async fn fork(context: &Context, args: &ForkArgs) -> Result<()> {
    let client = context.client()?;
    let lease = if args.spread.life.hold { Some(client.lease().await?) } else { None };
    let request = ForkRequest {
        clones: request(&args.spread, lease.as_ref())?,
        note: args.note.clone(),
        quiesce: args.quiesce.request(args.spread.no_hooks, args.spread.hook_limit),
    };
    let made = client.fork(&args.vm, &request).await?;
    context.out.show(&made, |made| {
        let checkpoint = &made.parent.checkpoint;
        let mut text = clones(&made.clones);
        text.push_str(&format!(
            "\ncheckpoint {}; {} stood still for {}\n",
            output::short(checkpoint.id),
            checkpoint.vm_name,
            us(made.parent.pause_us)
        ));
        if args.spread.timeline {
            text.push_str(&timelines(Some(&made.parent), &made.clones));
        }
        text
    })?;
    hold(lease).await
}

pub(crate) async fn warm(context: &Context, args: &WarmArgs) -> Result<()> {
    let request = PoolRequest { like: args.like.clone(), count: args.number, hosts: args.on.clone(), wait: true };
    let status = context.client()?.warm(&request).await?;
    context.out.show(&status, |status| {
        let mut rows = Rows::new(&["HOST", ">READY", "FOR"]);
        for entry in &status.entries {
            rows.add([entry.host.clone(), entry.ready.to_string(), entry.shape.clone()]);
        }
        rows.text()
    })
}

fn request(spread: &SpreadArgs, lease: Option<&Lease>) -> Result<CloneRequest> {
    if spread.name.len() > usize::try_from(spread.number)? {
        bail!("{} names for {} clones: give -n {}", spread.name.len(), spread.number, spread.name.len());
    }
    Ok(CloneRequest {
        count: spread.number,
        names: spread.name.clone(),
        hosts: spread.on.clone(),
        ttl_s: spread.life.ttl,
        lease: lease.map(|l| l.id().to_owned()),
        wait_agent_s: spread.wait,
        options: CloneOptions {
            ssh_host_keys: spread.ssh_host_keys,
            hooks: !spread.no_hooks,
            hook_limit_s: spread.hook_limit,
            allow_unseeded: spread.allow_unseeded,
        },
    })
}

fn clones(clones: &[CloneResult]) -> String {
    let mut rows = Rows::new(&[">#", "NAME", "HOST", "ADDRESS", ">RUNNING", ">ANSWERED", ">READY", "QEMU"]);
    for clone in clones {
        rows.add([
            clone.vm.clone_number.to_string(),
            clone.vm.name.clone(),
            clone.vm.host.clone(),
            clone.vm.network.as_ref().map_or_else(|| "-".to_owned(), |n| n.ip.clone()),
            us(clone.running_us),
            clone.answered_us.map_or_else(|| "-".to_owned(), us),
            clone.ready_us.map_or_else(|| "-".to_owned(), us),
            origin(clone).to_owned(),
        ]);
    }
    rows.text()
}

fn origin(clone: &CloneResult) -> &'static str {
    match (clone.prepared, clone.warm) {
        (true, _) => "prepared",
        (false, true) => "from the pool",
        (false, false) => "started for it",
    }
}

/// Where the time went: a table for the parent, and one for the clones with a column for each phase.
fn timelines(parent: Option<&CheckpointResult>, clones: &[CloneResult]) -> String {
    let mut text = String::new();
    if let Some(parent) = parent {
        text.push_str("\nparent\n");
        text.push_str(&columns(&[(parent.checkpoint.vm_name.as_str(), &parent.timeline)]));
    }
    text.push_str("\nclones\n");
    let named: Vec<_> = clones.iter().map(|c| (c.vm.name.as_str(), &c.timeline)).collect();
    text.push_str(&columns(&named));
    text
}

fn columns(timelines: &[(&str, &Timeline)]) -> String {
    // In the order in which they first come.
    let mut names: Vec<&str> = Vec::new();
    for phase in timelines.iter().flat_map(|(_, t)| &t.phases) {
        if !names.contains(&phase.name.as_str()) {
            names.push(&phase.name);
        }
    }
    let titles: Vec<String> = std::iter::once("NAME".to_owned())
        .chain(names.iter().map(|n| format!(">{n}")))
        .chain([">total".into()])
        .collect();
    let mut rows = Rows::new(&titles.iter().map(String::as_str).collect::<Vec<_>>());
    for (name, timeline) in timelines {
        let phases = names.iter().map(|n| timeline.phase_us(n).map_or_else(|| "-".to_owned(), us));
        rows.add(std::iter::once((*name).to_owned()).chain(phases).chain([us(timeline.total_us)]));
    }
    rows.text()
}

/// With a lease: stays until Ctrl-C, or until the daemon has gone away. What was made with it is removed then.
pub(crate) async fn hold(lease: Option<Lease>) -> Result<()> {
    let Some(mut lease) = lease else { return Ok(()) };
    let mut terminate = signal(SignalKind::terminate()).context("Can't wait for signals")?;
    output::note("Held until Ctrl-C; then it is removed.");
    tokio::select! {
        () = lease.lost() => bail!("The daemon went away, and with it the lease"),
        interrupted = tokio::signal::ctrl_c() => interrupted.context("Can't wait for Ctrl-C")?,
        _ = terminate.recv() => {}
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use ramet_client::api::Phase;

    use super::*;

    #[test]
    fn a_phase_that_only_one_clone_has_gets_a_column() {
        let timeline = |phases: &[(&str, u64)]| Timeline {
            phases: phases.iter().map(|(n, d)| Phase { name: (*n).into(), start_us: 0, duration_us: *d }).collect(),
            total_us: phases.iter().map(|(_, d)| d).sum(),
        };
        let (near, far) = (timeline(&[("claim", 10), ("load", 20)]), timeline(&[("send", 5), ("claim", 11)]));
        let text = columns(&[("a", &near), ("b", &far)]);
        let lines: Vec<Vec<&str>> =
            text.lines().map(|l| l.split("  ").map(str::trim).filter(|c| !c.is_empty()).collect()).collect();
        assert_eq!(lines[0], ["NAME", "claim", "load", "send", "total"]);
        assert_eq!(lines[1], ["a", "10 us", "20 us", "-", "30 us"]);
        assert_eq!(lines[2], ["b", "11 us", "-", "5 us", "16 us"]);
    }
}
