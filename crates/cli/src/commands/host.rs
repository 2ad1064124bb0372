//! Hosts and the trust between them.

use anyhow::{Context as _, Result, bail};
use ramet_client::api::{AccelKind, DrainReport, DrainRequest, HostInitRequest, HostList, JoinRequest, TokenRequest};
use tokio::io::AsyncReadExt as _;

use crate::{
    args::HostCommand,
    context::Context,
    output::{self, Rows, us},
};

pub(crate) async fn run(context: &Context, command: &HostCommand) -> Result<()> {
    let client = context.client()?;
    match command {
        HostCommand::Init { address } => {
            let list = client.host_init(&HostInitRequest { address: address.clone() }).await?;
            context.out.show(&list, table)
        }
        HostCommand::Token { ttl } => {
            let token = client.host_token(&TokenRequest { ttl_s: Some(*ttl) }).await?;
            context.out.show(&token, |token| {
                output::note("A secret that lets one host join, once: `ramet host join TOKEN` there.");
                token.token.clone()
            })
        }
        HostCommand::Join { token, address } => {
            let token = if token == "-" { from_stdin().await? } else { token.clone() };
            let list = client.host_join(&JoinRequest { token, address: address.clone() }).await?;
            context.out.show(&list, table)
        }
        HostCommand::Ls => context.out.show(&client.hosts().await?, table),
        HostCommand::Drain { name, undo } => {
            let client = match name {
                Some(name) => context.local_client().on_host(name)?,
                None => client,
            };
            let report = client.drain(&DrainRequest { undo: *undo }).await?;
            context.out.show(&report, drained)
        }
    }
}

/// A token that must not be seen in the list of processes.
async fn from_stdin() -> Result<String> {
    let mut text = String::new();
    tokio::io::stdin().take(64 << 10).read_to_string(&mut text).await.context("Can't read the token")?;
    let token = text.trim();
    if token.is_empty() {
        bail!("No token on standard input");
    }
    Ok(token.to_owned())
}

fn table(list: &HostList) -> String {
    let mut rows = Rows::new(&["NAME", "ADDRESS", "STATE", ">ROUND TRIP", ">VMS", "CPU", "VERSION"]);
    for host in &list.hosts {
        let state = match (&host.error, host.alive, host.draining) {
            (Some(error), false, _) => format!("silent ({error})"),
            (None, false, _) => "silent".to_owned(),
            (_, true, true) => "draining".to_owned(),
            (_, true, false) => "ready".to_owned(),
        };
        let accel = match host.accel {
            Some(AccelKind::Kvm) => "kvm",
            Some(AccelKind::Tcg) => "tcg",
            None => "-",
        };
        rows.add([
            if host.this { format!("{} (this)", host.name) } else { host.name.clone() },
            host.address.clone(),
            state,
            host.rtt_us.map_or_else(|| "-".to_owned(), us),
            host.vms.to_string(),
            accel.to_owned(),
            host.version.clone().unwrap_or_else(|| "-".to_owned()),
        ]);
    }
    rows.text()
}

fn drained(report: &DrainReport) -> String {
    if !report.draining {
        return format!("{} takes new VMs\n", report.host);
    }
    let mut text = format!("{} takes no new VMs\n", report.host);
    if report.vms.is_empty() && report.checkpoints.is_empty() {
        text.push_str("nothing is left on it\n");
    }
    for vm in &report.vms {
        text.push_str(&format!("  left: VM {} ({})\n", vm.name, super::vm::state(vm)));
    }
    for checkpoint in &report.checkpoints {
        let users = checkpoint.users.len();
        text.push_str(&format!("  left: checkpoint {} ({users} users)\n", output::short(checkpoint.id)));
    }
    text
}
