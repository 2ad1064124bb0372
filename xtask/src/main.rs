//! Everything that is done with this repository, as `cargo xtask COMMAND`.
//!
//! Each command does all its own set-up: Debian packages by apt when missing, the build, the guest images. What it does
//! is told on stderr; stdout carries only what was asked for, so that `--json` can be piped.

mod checks;
mod run;
mod setup;
mod tests;

use std::{path::PathBuf, process::ExitCode};

use anyhow::{Context as _, Result, bail};

use crate::{run::Tool, setup::Profile};

const USAGE: &str = "\
Usage: cargo xtask COMMAND

  demo [--json]                   a VM forked to eight clones on three hosts, on this machine
  test [FILTER...]                set-up, then every test of the workspace
  bench clone|fault|color|identity [--json] [--quick]
                                  the numbers that Ramet promises, measured side by side with their yardsticks
  setup [--release]               only the set-up: packages, build, guest images
  ci                              what CI runs: format, lints, documentation, tests
  docs                            write docs/openapi.json and docs/cli.md anew, out of the programs (also: openapi)
  fuzz [TARGET] [SECONDS]         fuzz the decoders (needs cargo-fuzz and a nightly toolchain)

A lab of several hosts on one machine needs root (network namespaces, a tmpfs, userfaultfd): as another user, the
commands that need it go through sudo and say so.";

fn main() -> ExitCode {
    match dispatch(std::env::args().skip(1).collect()) {
        Ok(code) => code,
        Err(err) => {
            run::say(&format!("error: {err:#}"));
            ExitCode::FAILURE
        }
    }
}

fn dispatch(args: Vec<String>) -> Result<ExitCode> {
    let root = root()?;
    let (command, rest) = match args.split_first() {
        Some((command, rest)) => (command.as_str(), rest),
        None => ("help", &[][..]),
    };
    match command {
        "setup" => {
            let [release] = flags(rest, ["--release"])?;
            setup::all(&root, if release { Profile::Release } else { Profile::Dev })?;
            run::say("Set up. Next: `cargo xtask demo` or `cargo xtask test`.");
            Ok(ExitCode::SUCCESS)
        }
        "demo" => program(&root, "demo", rest),
        "bench" => {
            let (name, rest) = rest
                .split_first()
                .context("bench what? `cargo xtask bench clone`, `... fault`, `... color` or `... identity`")?;
            if !["clone", "fault", "color", "identity"].contains(&name.as_str()) {
                bail!("No bench '{name}': there are clone, fault, color and identity");
            }
            program(&root, name, rest)
        }
        "test" => tests::all(&root, rest),
        "ci" => {
            no_more(rest)?;
            checks::all(&root)?;
            tests::all(&root, &[])
        }
        "docs" | "openapi" => {
            no_more(rest)?;
            checks::documents(&root)?;
            Ok(ExitCode::SUCCESS)
        }
        "fuzz" => checks::fuzz(&root, rest),
        "help" | "--help" | "-h" => {
            run::print(USAGE);
            Ok(ExitCode::SUCCESS)
        }
        other => bail!("No command '{other}'\n\n{USAGE}"),
    }
}

/// Runs `ramet-bench NAME ARGS` from a release build, as root.
fn program(root: &std::path::Path, name: &str, args: &[String]) -> Result<ExitCode> {
    let known = ["--json", "--quick"];
    if let Some(bad) = args.iter().find(|a| !known.contains(&a.as_str())) {
        bail!("No option '{bad}': there are {}", known.join(" and "));
    }
    let built = setup::all(root, Profile::Release)?;
    let code = Tool::new(built.bin("ramet-bench"))
        .arg(name)
        .args(args)
        .env("RAMET_IMAGE_DIR", &built.images)
        .through_root(
            "to make network namespaces and a tmpfs for the hosts of a lab, and to serve page faults of its VMs",
        )?
        .status()?;
    Ok(ExitCode::from(u8::try_from(code).unwrap_or(1)))
}

/// Which of the known flags were given.
fn flags<const N: usize>(args: &[String], known: [&str; N]) -> Result<[bool; N]> {
    if let Some(bad) = args.iter().find(|a| !known.contains(&a.as_str())) {
        bail!("No option '{bad}' here: there is {}", known.join(", "));
    }
    Ok(known.map(|flag| args.iter().any(|a| a == flag)))
}

fn no_more(args: &[String]) -> Result<()> {
    flags(args, []).map(drop)
}

/// The workspace's directory.
fn root() -> Result<PathBuf> {
    let here = std::env::var_os("CARGO_MANIFEST_DIR").context("CARGO_MANIFEST_DIR is not set: run `cargo xtask`")?;
    Ok(PathBuf::from(here).parent().context("xtask lies in no directory")?.to_owned())
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn unknown_options_are_named() {
        let given = |args: &[&str]| flags(&args.iter().map(|a| (*a).to_owned()).collect::<Vec<_>>(), ["--a", "--b"]);
        assert_eq!(given(&["--b"]).unwrap(), [false, true]);
        assert_eq!(given(&[]).unwrap(), [false, false]);
        assert!(given(&["--c"]).unwrap_err().to_string().contains("--c"));
    }
}
