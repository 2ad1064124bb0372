//! Checkpoints: make, list, show, remove.

use anyhow::{Context as _, Result};
use ramet_client::api::{CheckpointInfo, CheckpointList, CheckpointRequest};

use super::each;
use crate::{
    args::{CheckpointArgs, CheckpointCommand},
    context::Context,
    output::{self, Rows, us},
};

pub(crate) async fn run(context: &Context, args: &CheckpointArgs) -> Result<()> {
    let client = &context.client()?;
    match &args.command {
        None => {
            let vm = args.vm.as_deref().context("Which VM? `ramet checkpoint VM`")?;
            let request = CheckpointRequest {
                note: args.note.clone(),
                wait: args.wait,
                quiesce: args.quiesce.request(args.no_hooks, args.hook_limit.unwrap_or(30)),
            };
            let made = client.checkpoint(vm, &request).await?;
            context.out.show(&made, |made| {
                output::note(&format!("{} stood still for {}", made.checkpoint.vm_name, us(made.pause_us)));
                made.checkpoint.id.to_string()
            })
        }
        Some(CheckpointCommand::Ls) => context.out.show(&client.checkpoints().await?, table),
        Some(CheckpointCommand::Show { checkpoint }) => {
            context.out.show(&client.checkpoint_info(checkpoint).await?, details)
        }
        Some(CheckpointCommand::Rm { checkpoints }) => {
            each(checkpoints, |checkpoint| async move {
                client.remove_checkpoint(checkpoint).await?;
                context.out.show(&serde_json::json!({ "removed": checkpoint }), |_| checkpoint.to_owned())
            })
            .await
        }
    }
}

fn table(list: &CheckpointList) -> String {
    let titles = ["ID", "VM", ">GEN", ">MEMORY", ">LAYERS", ">NEWEST", ">STATE", ">PAUSE", ">USERS", "AGE", "NOTE"];
    let mut rows = Rows::new(&titles);
    for c in &list.checkpoints {
        let newest = c.layers.last().map_or(0, |l| l.bytes);
        rows.add([
            output::short(c.id),
            c.vm_name.clone(),
            c.generation.to_string(),
            c.memory.to_string(),
            c.layers.len().to_string(),
            format!("{}{}", output::bytes(newest), progress(c)),
            output::bytes(c.state_bytes),
            us(c.pause_us),
            c.users.len().to_string(),
            output::age(c.created_unix_ms),
            c.note.clone().unwrap_or_default(),
        ]);
    }
    rows.text()
}

/// What is wrong with the newest layer, if anything.
fn progress(c: &CheckpointInfo) -> &'static str {
    match (&c.broken, c.complete) {
        (Some(_), _) => " broken",
        (None, false) => " copying",
        (None, true) => "",
    }
}

fn details(c: &CheckpointInfo) -> String {
    let mut pairs = vec![
        ("id", c.id.to_string()),
        ("host", c.host.clone()),
        ("vm", format!("{} ({})", c.vm_name, output::short(c.vm))),
        ("family", c.family.to_string()),
        ("generation", c.generation.to_string()),
        ("base", c.base.map_or_else(|| "none".to_owned(), |b| b.to_string())),
        ("image", c.image.clone()),
        ("memory", c.memory.to_string()),
        ("device state", output::bytes(c.state_bytes)),
        ("parent's pause", us(c.pause_us)),
        ("made", format!("{} ago", output::age(c.created_unix_ms))),
        ("complete", if c.complete { "yes" } else { "no: the newest layer is still being copied" }.to_owned()),
    ];
    if let Some(broken) = &c.broken {
        pairs.push(("broken", broken.clone()));
    }
    if let Some(note) = &c.note {
        pairs.push(("note", note.clone()));
    }
    let mut text = output::fields(&pairs);
    let mut layers = Rows::new(&["LAYER", ">PAGES", ">SIZE", ">STORED", "ALSO IN"]);
    for layer in &c.layers {
        let others: Vec<_> = layer.checkpoints.iter().filter(|id| **id != c.id).map(output::short).collect();
        layers.add([
            output::short(layer.id),
            layer.pages.to_string(),
            output::bytes(layer.bytes),
            output::bytes(layer.stored_bytes),
            if others.is_empty() { "-".to_owned() } else { others.join(" ") },
        ]);
    }
    text.push_str(&format!("\n{}", layers.text()));
    if !c.users.is_empty() {
        let mut users = Rows::new(&["USED BY", "NAME", "HOST"]);
        for user in &c.users {
            users.add([user.kind.clone(), user.name.clone(), user.host.clone()]);
        }
        text.push_str(&format!("\n{}", users.text()));
    }
    text
}
