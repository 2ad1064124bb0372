//! The agent inside a guest: serves the host over the virtio port `ramet.agent`. Threads, no tokio, little memory: the
//! pages that the first answer of a clone touches are the pages that a clone on another host has to fetch first.

mod child;
mod control;
mod exec;
mod file;
mod freezer;
mod hooks;
mod identity;
mod names;
mod netlink;
mod network;
mod paths;
mod port;
mod serve;
mod signals;
mod stream;
mod subscribers;
mod threads;

use paths::Paths;
use std::path::PathBuf;
use std::process::ExitCode;

const USAGE: &str = "\
The Ramet agent: lets the host work inside this guest, and tells programs in the guest which clone they run in.

Usage:
  ramet-agent serve [--device PATH | --stdin]   serve the host (the virtio port `ramet.agent` unless told otherwise)
  ramet-agent id [--json]                       show who this machine is: clone number, generation, parent
  ramet-agent wait-clone                        wait until this machine has become a clone, print the event (JSON)
  ramet-agent subscribe -- COMMAND [ARG...]     run a command that gets SIGRTMIN+10, with the clone's number as its
                                                value, in each clone; it must handle the signal, which ends it else
  ramet-agent --version

With --root DIR before the command, DIR is taken for the root of the file system (for tests).
";

fn main() -> ExitCode {
    signals::reset();
    let args: Vec<String> = std::env::args_os().skip(1).map(|a| a.to_string_lossy().into_owned()).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let (paths, args) = match args.as_slice() {
        ["--root", root, rest @ ..] => (Paths::new(*root), rest),
        all => (Paths::new("/"), all),
    };
    match args {
        ["serve"] => serve::run(paths, &port::Source::find()),
        ["serve", "--stdin"] => serve::run(paths, &port::Source::Stdin),
        ["serve", "--device", path] => serve::run(paths, &port::Source::Device(PathBuf::from(path))),
        ["id"] => identity::show(&paths, false),
        ["id", "--json"] => identity::show(&paths, true),
        ["wait-clone"] => subscribers::wait_clone(&paths),
        ["subscribe", "--", argv @ ..] if !argv.is_empty() => subscribers::subscribe_and_run(&paths, argv),
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
