//! `ramet-bench`: the demo and the benches, as `cargo xtask` runs them.
#![forbid(unsafe_code)]

use std::{io::Write as _, path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result};
use clap::{Parser, Subcommand};
use ramet_bench::{clone, color, demo, fault, identity, report::Report};
use tokio::signal::unix::{SignalKind, signal};

/// The demo and the benches of Ramet. All of them need root.
#[derive(Debug, Parser)]
#[command(name = "ramet-bench", version)]
struct Cli {
    /// Print one JSON object instead of tables.
    #[arg(long, global = true)]
    json: bool,
    /// Fewer samples.
    #[arg(long, global = true)]
    quick: bool,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// A VM with work in its memory becomes eight, on three hosts.
    Demo,
    /// Fork and clone, against QEMU's own stop-and-copy and restore.
    Clone,
    /// What a missing page costs, against the least that kernel and network allow.
    Fault,
    /// Whether the colors of running guests' pages are right, what they cost, and whether free pages are.
    Color,
    /// Whether clones are somebody of their own: addresses, random numbers, disks; and what that costs.
    Identity {
        /// Measure these parts only.
        #[arg(hide = true)]
        only: Vec<String>,
    },
    /// What `identity` measures in a process of its own.
    #[command(hide = true)]
    NetworkChild {
        /// How many times.
        rounds: u16,
    },
    /// What `color` measures in a process of its own.
    #[command(hide = true)]
    ColorChild {
        /// The guest's RAM.
        ram: PathBuf,
        /// Its size.
        bytes: u64,
    },
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    match run(&cli) {
        Ok(code) => code,
        Err(err) => {
            eprintln!("error: {err:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<ExitCode> {
    match &cli.command {
        Command::Fault => return print_report(cli, &fault::run(cli.quick)?),
        Command::Color => return print_report(cli, &color::run(cli.quick)?),
        Command::ColorChild { ram, bytes } => {
            color::child(ram, *bytes)?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::NetworkChild { rounds } => {
            identity::network_child(*rounds)?;
            return Ok(ExitCode::SUCCESS);
        }
        Command::Demo | Command::Clone | Command::Identity { .. } => {}
    }
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        let mut terminate = signal(SignalKind::terminate()).context("Can't wait for signals")?;
        let work = async {
            match &cli.command {
                Command::Demo => {
                    let shown = demo::run(cli.quick).await?;
                    print(&if cli.json { serde_json::to_string_pretty(&shown)? } else { shown.screen() })?;
                    Ok(if shown.good() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
                }
                Command::Identity { only } => print_report(cli, &identity::run(cli.quick, only).await?),
                _ => print_report(cli, &clone::run(cli.quick).await?),
            }
        };
        // Whichever ends first: the lab goes with its guard.
        tokio::select! {
            result = work => result,
            _ = tokio::signal::ctrl_c() => interrupted(),
            _ = terminate.recv() => interrupted(),
        }
    })
}

fn interrupted() -> Result<ExitCode> {
    eprintln!("Interrupted; the lab has been taken down.");
    Ok(ExitCode::from(130))
}

/// Prints a report; a goal that is not met is no failure of the program, so that the numbers can be looked at.
fn print_report(cli: &Cli, report: &Report) -> Result<ExitCode> {
    print(&if cli.json { report.json()? } else { report.table() })?;
    let missed = report.goals.iter().filter(|g| !g.met).count();
    if missed > 0 {
        eprintln!("{missed} of {} goals were not met.", report.goals.len());
    }
    Ok(ExitCode::SUCCESS)
}

fn print(text: &str) -> Result<()> {
    writeln!(std::io::stdout().lock(), "{text}").context("Can't write to standard output")
}
