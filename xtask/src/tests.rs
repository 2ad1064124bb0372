//! `cargo xtask test`: the set-up, every test, and one closing line.

use std::{path::Path, process::ExitCode};

use anyhow::{Result, bail};

use crate::{
    run::{Tool, is_root, need_sudo, print, step},
    setup::{self, Profile},
};

/// Sums over the lines `test result: ok. 3 passed; 0 failed; 1 ignored; ...`.
#[derive(Debug, Default, PartialEq, Eq)]
struct Sum {
    passed: u64,
    failed: u64,
    ignored: u64,
}

impl Sum {
    fn add(&mut self, line: &str) {
        let Some(rest) = line.strip_prefix("test result: ") else { return };
        for part in rest.split([';', '.']) {
            let Some((number, word)) = part.trim().split_once(' ') else { continue };
            let Ok(number) = number.parse::<u64>() else { continue };
            match word {
                "passed" => self.passed += number,
                "failed" => self.failed += number,
                "ignored" => self.ignored += number,
                _ => {}
            }
        }
    }
}

/// Runs the tests whose names contain one of `filters`, or all.
pub(crate) fn all(root: &Path, filters: &[String]) -> Result<ExitCode> {
    if let Some(flag) = filters.iter().find(|f| f.starts_with('-')) {
        bail!("No option '{flag}': `cargo xtask test` takes parts of test names");
    }
    let built = setup::all(root, Profile::Dev)?;
    let reason = "because the tests serve page faults of VMs and make network namespaces and a tmpfs";
    let mut sum = Sum::default();
    let mut good = true;
    // Documentation first, so that the last lines are those of the tests proper.
    for (what, targets) in [("documentation's examples", &["--doc"][..]), ("tests", &["--tests"][..])] {
        step(&format!("Running the {what}"));
        let mut tool = Tool::cargo(root)
            .args(["test", "--workspace", "--no-fail-fast"])
            .args(targets)
            .env("RAMET_IMAGE_DIR", &built.images);
        if !is_root() {
            need_sudo(reason)?;
            tool = tool.env("CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER", "sudo --preserve-env");
        }
        tool = tool.arg("--").args(filters);
        good &= tool.lines(|line| {
            print(line);
            sum.add(line);
        })?;
    }
    // What a test left when it was killed.
    let swept = Tool::new(built.bin("ramet")).args(["lab", "down", "--stale"]).through_root(reason)?.run();
    if let Err(err) = swept {
        crate::run::say(&format!("warning: {err:#}"));
    }
    if sum.passed == 0 && sum.failed == 0 && filters.is_empty() {
        bail!("No test ran");
    }
    print(&format!("{} passed, {} failed, {} skipped", sum.passed, sum.failed, sum.ignored));
    Ok(if good && sum.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

#[cfg(test)]
mod unit {
    use super::*;

    #[test]
    fn results_are_summed_up() {
        let mut sum = Sum::default();
        sum.add("running 3 tests");
        sum.add("test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 2 filtered out; finished in 0.10s");
        sum.add("test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.10s");
        assert_eq!(sum, Sum { passed: 4, failed: 2, ignored: 1 });
    }
}
