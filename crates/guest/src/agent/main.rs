//! The agent inside a guest: serves the host over the virtio port `ramet.agent`. Threads, no tokio, little memory: the
//! pages that the first answer of a clone touches are the pages that a clone on another host has to fetch first.

mod exec;
mod file;
mod identity;
mod port;
mod serve;
mod signals;
mod stream;

use std::path::PathBuf;
use std::process::ExitCode;

const USAGE: &str = "\
The Ramet agent: lets the host work inside this guest, and tells programs in the guest which clone they run in.

Usage:
  ramet-agent serve [--device PATH | --stdin]   serve the host (the virtio port `ramet.agent` unless told otherwise)
  ramet-agent id [--json]                       show who this machine is: clone number, generation, parent
  ramet-agent --version
";

fn main() -> ExitCode {
    signals::reset();
    let args: Vec<String> = std::env::args_os().skip(1).map(|a| a.to_string_lossy().into_owned()).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args.as_slice() {
        ["serve"] => serve::run(&port::Source::find()),
        ["serve", "--stdin"] => serve::run(&port::Source::Stdin),
        ["serve", "--device", path] => serve::run(&port::Source::Device(PathBuf::from(path))),
        ["id"] => identity::show(false),
        ["id", "--json"] => identity::show(true),
        [exec::TTY_HELPER, argv @ ..] => exec::tty_helper(argv),
        ["--version" | "-V"] => {
            println!("ramet-agent {}", env!("CARGO_PKG_VERSION"));
            ExitCode::SUCCESS
        }
        ["--help" | "-h" | "help"] => {
            print!("{USAGE}");
            ExitCode::SUCCESS
        }
        _ => {
            eprint!("ramet-agent: cannot understand these arguments\n\n{USAGE}");
            ExitCode::from(2)
        }
    }
}
