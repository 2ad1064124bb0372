//! The commands, by group.

mod checkpoint;
mod colors;
mod console;
mod copy;
mod doctor;
mod exec;
mod host;
mod image;
mod lab;
mod network;
mod spread;
mod stats;
mod vm;

use std::process::ExitCode;

use anyhow::Result;
use clap::CommandFactory as _;

use crate::{
    args::{Cli, Command},
    context::Context,
    output,
};

/// Carries out a command.
pub(crate) async fn run(context: &Context, command: &Command) -> Result<ExitCode> {
    match command {
        Command::Doctor(args) => return doctor::run(context, args).await,
        Command::Image(command) => image::run(context, command).await?,
        Command::Run(args) => vm::run(context, args).await?,
        Command::Ps(args) => vm::ps(context, args).await?,
        Command::Exec(args) => return exec::run(context, args).await,
        Command::Cp(args) => copy::run(context, args).await?,
        Command::Console(args) => console::run(context, args).await?,
        Command::Stop(args) => vm::stop(context, args).await?,
        Command::Rm(args) => vm::rm(context, args).await?,
        Command::Stats(args) => stats::run(context, args).await?,
        Command::Checkpoint(args) => checkpoint::run(context, args).await?,
        Command::Colors(args) => colors::run(context, args).await?,
        Command::Clone(args) => spread::clone(context, args).await?,
        Command::Fork(args) => spread::fork(context, args).await?,
        Command::Warm(args) => spread::warm(context, args).await?,
        Command::Network(command) => network::run(context, command).await?,
        Command::Topology(command) => network::topology(context, command).await?,
        Command::Host(command) => host::run(context, command).await?,
        Command::Lab(command) => lab::run(context, command).await?,
        Command::Completion(args) => {
            let mut script = Vec::new();
            clap_complete::generate(args.shell, &mut Cli::command(), "ramet", &mut script);
            output::write(&script)?;
        }
        Command::Version => version(context).await?,
        Command::Reference => context.out.text(&crate::help::markdown())?,
    }
    Ok(ExitCode::SUCCESS)
}

#[derive(serde::Serialize)]
struct Versions {
    ramet: &'static str,
    rametd: Option<String>,
    host: Option<String>,
}

async fn version(context: &Context) -> Result<()> {
    // The daemon's version is welcome, not needed.
    let daemon = context.client()?.info().await.ok();
    let versions = Versions {
        ramet: env!("CARGO_PKG_VERSION"),
        rametd: daemon.as_ref().map(|d| d.version.clone()),
        host: daemon.map(|d| d.name),
    };
    context.out.show(&versions, |v| {
        let daemon = match (&v.rametd, &v.host) {
            (Some(version), Some(host)) => format!("{version} (host {host})"),
            _ => "not running".to_owned(),
        };
        format!("ramet {}\nrametd {daemon}", v.ramet)
    })
}

/// Does `what` to each, goes on after failures, and tells all but the last of them here.
pub(crate) async fn each<'a, F>(names: &'a [String], mut what: impl FnMut(&'a str) -> F) -> Result<()>
where
    F: Future<Output = Result<()>>,
{
    let mut last: Option<anyhow::Error> = None;
    for name in names {
        if let Err(err) = what(name).await
            && let Some(before) = last.replace(err)
        {
            output::note(&format!("error: {before:#}"));
        }
    }
    last.map_or(Ok(()), Err)
}
