//! VMs: run, ps, stop, rm.

use std::time::Duration;

use anyhow::{Result, bail};
use indicatif::ProgressBar;
use ramet_client::{
    Client,
    api::{RunRequest, StopRequest, VmInfo, VmList, VmState},
};

use super::{each, spread::hold};
use crate::{
    args::{PsArgs, RmArgs, RunArgs, StopArgs},
    context::Context,
    output::{self, Rows},
};

pub(crate) async fn run(context: &Context, args: &RunArgs) -> Result<()> {
    let client = context.client()?;
    let lease = if args.life.hold { Some(client.lease().await?) } else { None };
    let request = RunRequest {
        name: args.name.clone(),
        memory: args.memory,
        cpus: args.cpus,
        machine: args.machine.clone(),
        accel: args.accel.map(Into::into),
        cpu: args.cpu.clone(),
        append: args.append.clone(),
        ttl_s: args.life.ttl,
        lease: lease.as_ref().map(|l| l.id().to_owned()),
        wait_agent_s: args.wait,
        disk: args.disk.clone(),
        disk_size: args.disk_size,
        volumes: args.volume.clone(),
        network: args.egress(),
        rate: args.rate,
        publish: args.publish.clone(),
        join: args.join.clone(),
        ..RunRequest::new(args.image.clone())
    };
    let vm = client.run(&request).await?;
    if args.wait > 0 && !vm.agent {
        output::note(&format!(
            "warning: the agent of {} did not answer within {}; `ramet console {}` shows what the guest does",
            vm.name,
            output::span(args.wait),
            vm.name
        ));
    }
    context.out.show(&vm, |vm| vm.name.clone())?;
    hold(lease).await
}

pub(crate) async fn ps(context: &Context, args: &PsArgs) -> Result<()> {
    let list = context.client()?.vms(args.all_hosts).await?;
    for host in &list.unreachable {
        output::note(&format!("warning: host {} does not answer: {}", host.host, host.error));
    }
    if args.quiet && !context.out.json() {
        return context.out.text(&list.vms.iter().map(|vm| format!("{}\n", vm.name)).collect::<String>());
    }
    context.out.show(&list, table)
}

fn table(list: &VmList) -> String {
    let mut rows =
        Rows::new(&["NAME", "STATE", "HOST", "IMAGE", "ADDRESS", ">MEMORY", ">CPUS", ">GEN", "CHECKPOINT", "AGE"]);
    for vm in &list.vms {
        rows.add([
            vm.name.clone(),
            state(vm),
            vm.host.clone(),
            vm.image.clone(),
            vm.network.as_ref().map_or_else(|| "-".to_owned(), |n| n.ip.clone()),
            vm.memory.to_string(),
            vm.cpus.to_string(),
            vm.generation.to_string(),
            vm.checkpoint.map_or_else(|| "-".to_owned(), output::short),
            output::age(vm.created_unix_ms),
        ]);
    }
    rows.text()
}

/// The state, with its reason when it needs one.
pub(crate) fn state(vm: &VmInfo) -> String {
    let word = match vm.state {
        VmState::Starting => "starting",
        VmState::Running => "running",
        VmState::Paused => "paused",
        VmState::Stalled => "stalled",
        VmState::Stopped => "stopped",
        VmState::Crashed => "crashed",
    };
    match &vm.state_reason {
        Some(reason) => format!("{word} ({reason})"),
        None => word.to_owned(),
    }
}

pub(crate) async fn stop(context: &Context, args: &StopArgs) -> Result<()> {
    let client = &context.client()?;
    each(&args.vms, |vm| async move {
        let stopped = client.stop(vm, &StopRequest { grace_s: args.grace }).await?;
        context.out.show(&stopped, |vm| vm.name.clone())
    })
    .await
}

pub(crate) async fn rm(context: &Context, args: &RmArgs) -> Result<()> {
    let client = &context.client()?;
    if let Some(image) = &args.keep_disk {
        let [vm] = &*args.vms else { bail!("--keep-disk IMAGE keeps the disk of one VM: name one") };
        keep_disk(client, vm, image, args.force).await?;
        return context.out.show(&serde_json::json!({ "removed": vm, "image": image }), |_| vm.to_owned());
    }
    each(&args.vms, |vm| async move {
        client.remove_vm(vm, args.force).await?;
        context.out.show(&serde_json::json!({ "removed": vm }), |_| vm.to_owned())
    })
    .await
}

/// Removes a VM and keeps its disk; tells how far that is.
async fn keep_disk(client: &Client, vm: &str, image: &str, force: bool) -> Result<()> {
    let bar = ProgressBar::new_spinner();
    bar.set_message(format!("keeping the disk of '{vm}' as image '{image}'"));
    bar.enable_steady_tick(Duration::from_millis(200));
    let mut removed = std::pin::pin!(client.remove_vm_keeping_disk(vm, image, force));
    let done = loop {
        tokio::select! {
            done = &mut removed => break done,
            () = tokio::time::sleep(Duration::from_millis(500)) => {
                if let Ok(info) = client.vm(vm).await
                    && let Some(reason) = info.state_reason
                {
                    bar.set_message(reason);
                }
            }
        }
    };
    bar.finish_and_clear();
    Ok(done?)
}
