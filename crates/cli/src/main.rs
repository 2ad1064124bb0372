//! `ramet`: fork running VMs, from the command line.
//!
//! A thin client of `rametd`: it turns arguments into calls of its API and answers into tables, or into JSON with
//! `--json`. Only `doctor`, `image` and `lab` work without a daemon.
#![forbid(unsafe_code)]

mod args;
mod commands;
mod context;
mod failure;
mod help;
mod output;
mod terminal;

use std::process::ExitCode;

use clap::Parser as _;

use crate::{args::Cli, context::Context};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(err) => return failure::report(&anyhow::Error::new(err).context("Can't start"), &cli.command),
    };
    let context = Context::new(&cli.global);
    let result = runtime.block_on(commands::run(&context, &cli.command));
    // A thread that waits for the terminal's next key would hold up a plain shutdown.
    runtime.shutdown_background();
    match result {
        Ok(code) => code,
        Err(err) => failure::report(&err, &cli.command),
    }
}
