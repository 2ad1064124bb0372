//! `ramet lab`.

use std::{os::unix::process::CommandExt as _, process::Command};

use anyhow::{Context as _, Result, bail};
use ramet_lab::{Lab, LabOptions, LabSummary};

use crate::{args::LabCommand, context::Context, output, output::Rows};

pub(crate) async fn run(context: &Context, command: &LabCommand) -> Result<()> {
    match command {
        LabCommand::Up { name, hosts, link, delay, image_dir } => {
            through_root("to make network namespaces and a tmpfs for its hosts, and to serve page faults of its VMs")?;
            let mut options = LabOptions::new(name.clone())?.hosts(*hosts);
            options.link = *link;
            options.delay = *delay;
            if let Some(dir) = image_dir {
                options.image_dir.clone_from(dir);
            }
            // Whoever came here through sudo may use the lab without it.
            options.group = std::env::var("SUDO_GID").ok().filter(|gid| gid != "0");
            Lab::up(&options).await?.detach();
            let all = Lab::ls();
            let made = all.iter().find(|l| l.name == *name).context("The lab is gone again")?;
            context.out.show(made, |made| {
                output::note(&format!(
                    "{} hosts are up. Use them by `ramet --lab {name} ...` or RAMET_LAB={name}; `ramet lab down --name \
                     {name}` removes them.",
                    made.hosts
                ));
                String::new()
            })
        }
        LabCommand::Down { name, stale } => {
            through_root("to end the lab's processes and remove its network namespaces")?;
            if *stale {
                let swept = Lab::sweep();
                return context.out.show(&swept, |swept| swept.iter().map(|n| format!("{n}\n")).collect());
            }
            let there = Lab::down_by_name(name).await?;
            if !there {
                output::note(&format!("There is no lab '{name}'"));
            }
            context.out.show(&serde_json::json!({ "name": name, "removed": there }), |_| String::new())
        }
        LabCommand::Ls => context.out.show(&Lab::ls(), |labs| table(labs)),
    }
}

fn table(labs: &[LabSummary]) -> String {
    let mut rows = Rows::new(&["NAME", ">HOSTS", ">VMS' QEMUS", "LINK", "STATE"]);
    for lab in labs {
        rows.add([
            lab.name.clone(),
            lab.hosts.to_string(),
            lab.qemus.to_string(),
            lab.link.clone().unwrap_or_else(|| "unlimited".to_owned()),
            lab.broken.clone().unwrap_or_else(|| "up".to_owned()),
        ]);
    }
    rows.text()
}

/// Goes on as root: this process when it is root's, else the same command through sudo, which takes its place.
fn through_root(reason: &str) -> Result<()> {
    if rustix::process::geteuid().is_root() {
        return Ok(());
    }
    output::note(&format!("A lab needs root {reason}: sudo may ask for your password."));
    let program = std::env::current_exe().context("Can't find out where this program is")?;
    let mut command = Command::new("sudo");
    command.arg("--").arg("env");
    for name in ["RAMET_IMAGE_DIR", "RUST_LOG"] {
        if let Some(value) = std::env::var_os(name) {
            let mut pair = std::ffi::OsString::from(format!("{name}="));
            pair.push(value);
            command.arg(pair);
        }
    }
    let err = command.arg(program).args(std::env::args_os().skip(1)).exec();
    bail!("Can't become root by sudo ({err}): run this command as root")
}
