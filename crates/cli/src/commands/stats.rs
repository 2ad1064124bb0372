//! Statistics of VMs and hosts.

use std::{collections::BTreeMap, time::Duration};

use anyhow::Result;
use ramet_client::{
    Client,
    api::{Counters, HostStats, LatencySummary, VmStats},
};

use super::vm::state;
use crate::{
    args::StatsArgs,
    context::Context,
    output::{self, Rows, micros, us},
};

const EVERY: Duration = Duration::from_secs(1);

pub(crate) async fn run(context: &Context, args: &StatsArgs) -> Result<()> {
    let client = context.client()?;
    if !args.watch {
        return once(context, &client, args).await;
    }
    loop {
        if !context.out.json() && crate::terminal::size().is_some() {
            // Home, and clear to the end: no flicker.
            output::write(b"\x1b[H\x1b[J")?;
        }
        once(context, &client, args).await?;
        tokio::time::sleep(EVERY).await;
    }
}

async fn once(context: &Context, client: &Client, args: &StatsArgs) -> Result<()> {
    match &args.vm {
        Some(vm) => context.out.show(&client.vm_stats(vm).await?, of_vm),
        None => context.out.show(&client.stats().await?, of_host),
    }
}

fn of_vm(stats: &VmStats) -> String {
    let mut pairs =
        vec![("vm", stats.vm.name.clone()), ("state", state(&stats.vm)), ("memory", stats.vm.memory.to_string())];
    if let Some(reason) = &stats.stalled {
        pairs.push(("stalled", reason.clone()));
    }
    if let Some(memory) = &stats.memory {
        pairs.push(("its own pages", output::bytes(memory.ram_private_bytes)));
        pairs.push(("its share of all", output::bytes(memory.ram_pss_bytes)));
        pairs.push(("QEMU itself", output::bytes(memory.vmm_pss_bytes)));
    }
    let mut text = output::fields(&pairs);
    text.push_str(&counters(&stats.pager));
    if let Some(disk) = &stats.disk {
        text.push_str("\ndisk of another host\n");
        text.push_str(&counters(disk));
    }
    if let Some(timeline) = &stats.timeline {
        let mut rows = Rows::new(&["PHASE", ">BEGAN", ">TOOK"]);
        for phase in &timeline.phases {
            rows.add([phase.name.clone(), us(phase.start_us), us(phase.duration_us)]);
        }
        text.push_str(&format!("\n{}", rows.text()));
    }
    text
}

fn of_host(stats: &HostStats) -> String {
    let mut text = output::fields(&[("host", stats.host.clone())]);
    if !stats.events.is_empty() {
        text.push_str(&numbers(&stats.events));
    }
    text.push_str(&latencies(&stats.phases));
    for pager in &stats.pagers {
        text.push_str(&format!("\nfamily {}", pager.family));
        if let Some(pid) = pager.pid {
            text.push_str(&format!(", pager {pid}"));
        }
        if pager.restarts > 0 {
            text.push_str(&format!(", restarted {} times", pager.restarts));
        }
        if let Some(error) = &pager.error {
            text.push_str(&format!(": {error}"));
        }
        text.push('\n');
        text.push_str(&counters(&pager.counters));
        if let Some(disk) = &pager.disk {
            text.push_str("\ndisks\n");
            text.push_str(&counters(disk));
        }
    }
    text
}

fn counters(counters: &Counters) -> String {
    let mut text = String::new();
    if !counters.values.is_empty() {
        text.push_str(&numbers(&counters.values));
    }
    text.push_str(&latencies(&counters.latencies));
    text
}

fn numbers(values: &BTreeMap<String, u64>) -> String {
    let mut rows = Rows::new(&["COUNTER", ">VALUE"]);
    for (name, value) in values {
        let shown = if name.contains("bytes") { output::bytes(*value) } else { value.to_string() };
        rows.add([name.clone(), shown]);
    }
    format!("\n{}", rows.text())
}

fn latencies(latencies: &BTreeMap<String, LatencySummary>) -> String {
    let measured: Vec<_> = latencies.iter().filter(|(_, l)| l.count > 0).collect();
    if measured.is_empty() {
        return String::new();
    }
    let mut rows = Rows::new(&["LATENCY", ">COUNT", ">P50", ">P90", ">P99", ">MAX"]);
    for (name, l) in measured {
        let [p50, p99, max] = [l.p50_us, l.p99_us, l.max_us].map(micros);
        let p90 = l.p90_us.map_or_else(|| "-".to_owned(), micros);
        rows.add([name.clone(), l.count.to_string(), p50, p90, p99, max]);
    }
    format!("\n{}", rows.text())
}
