//! What CI checks besides the tests, generated files, and fuzzing.

use std::{path::Path, process::ExitCode};

use anyhow::{Context as _, Result, bail};

use crate::{
    run::{Tool, find, step},
    setup,
};

/// Format, lints, documentation.
pub(crate) fn all(root: &Path) -> Result<()> {
    setup::packages()?;
    step("Format");
    Tool::cargo(root).args(["fmt", "--all", "--check"]).run()?;
    step("Lints");
    Tool::cargo(root).args(["clippy", "--workspace", "--all-targets", "--quiet", "--", "-D", "warnings"]).run()?;
    step("Documentation");
    Tool::cargo(root).args(["doc", "--workspace", "--no-deps", "--quiet"]).env("RUSTDOCFLAGS", "-D warnings").run()
}

/// Writes the documents that are made of programs: the OpenAPI document, and the command line's reference.
pub(crate) fn documents(root: &Path) -> Result<()> {
    for (file, package, program, arg) in [
        ("docs/openapi.json", "ramet-host", "rametd", "--print-openapi"),
        ("docs/cli.md", "ramet-cli", "ramet", "reference"),
    ] {
        let text = Tool::cargo(root)
            .args(["run", "--quiet", "--package", package, "--bin", program, "--", arg])
            .output()
            .with_context(|| format!("Can't make {file}"))?;
        if text.trim().is_empty() {
            bail!("`{program} {arg}` printed nothing");
        }
        let path = root.join(file);
        std::fs::write(&path, text).with_context(|| format!("Can't write {}", path.display()))?;
        step(&format!("Wrote {file}"));
    }
    Ok(())
}

/// Runs one fuzz target, or each in turn, for some seconds.
pub(crate) fn fuzz(root: &Path, args: &[String]) -> Result<ExitCode> {
    if find("cargo-fuzz").is_none() {
        bail!(
            "cargo-fuzz is not installed: `cargo install cargo-fuzz` and `rustup toolchain install nightly`. The same \
             targets run as property tests in `cargo xtask test`"
        );
    }
    let targets = match args.first() {
        Some(target) => vec![target.clone()],
        None => Tool::cargo(root).args(["fuzz", "list"]).output()?.lines().map(str::to_owned).collect(),
    };
    let seconds: u32 = match args.get(1) {
        Some(text) => text.parse().with_context(|| format!("'{text}' is no number of seconds"))?,
        None => 60,
    };
    for target in targets {
        step(&format!("Fuzzing {target} for {seconds} s"));
        Tool::new("cargo")
            .dir(root)
            .args(["+nightly", "fuzz", "run", &target, "--", &format!("-max_total_time={seconds}")])
            .run()?;
    }
    Ok(ExitCode::SUCCESS)
}
