//! What this machine can do.

use std::{path::Path, process::ExitCode};

use anyhow::Result;
use ramet_client::api::{DoctorReport, Finding, FindingStatus};

use ramet_image::ImageStore;
use ramet_vmm::{
    QEMU_UID,
    doctor::{DoctorConfig, Status},
};

use crate::{args::ImageDirArg, context::Context, output, terminal};

/// The QEMU that is used, looked for in PATH.
const QEMU: &str = "qemu-system-x86_64";

pub(crate) async fn run(context: &Context, args: &ImageDirArg) -> Result<ExitCode> {
    output::note("Looking at this machine; the trial of KVM may take some seconds.");
    let report = DoctorReport { findings: probe(&args.dir()?).await };
    let bad = report.findings.iter().any(|f| f.status == FindingStatus::Fail);
    context.out.show(&report, |report| text(report, terminal::size().is_some()))?;
    Ok(if bad { ExitCode::FAILURE } else { ExitCode::SUCCESS })
}

/// The daemon's own probe, run from here: it works before there is a daemon.
async fn probe(image_dir: &Path) -> Vec<Finding> {
    let tiny = ImageStore::new(image_dir).load(ramet_image::TINY_NAME).ok();
    // As rametd does it by default.
    let user = rustix::process::geteuid().is_root().then_some((QEMU_UID, QEMU_UID));
    let config = DoctorConfig { qemu: QEMU.into(), tiny_guest: tiny.map(|image| image.kernel()), user };
    let finding = |f: ramet_vmm::doctor::Finding| Finding {
        name: f.name,
        status: match f.status {
            Status::Ok => FindingStatus::Ok,
            Status::Warn => FindingStatus::Warn,
            Status::Fail => FindingStatus::Fail,
        },
        detail: f.detail,
        remedy: f.remedy,
    };
    ramet_vmm::doctor::probe(&config).await.into_iter().map(finding).collect()
}

fn text(report: &DoctorReport, color: bool) -> String {
    let width = report.findings.iter().map(|f| f.name.len()).max().unwrap_or(0);
    let mut text = String::new();
    for finding in &report.findings {
        let (word, code) = match finding.status {
            FindingStatus::Ok => ("ok  ", "32"),
            FindingStatus::Warn => ("warn", "33"),
            FindingStatus::Fail => ("FAIL", "31"),
        };
        let word = if color { format!("\x1b[{code}m{word}\x1b[0m") } else { word.to_owned() };
        text.push_str(&format!("{word}  {:width$}  {}\n", finding.name, finding.detail));
        if !finding.remedy.is_empty() {
            text.push_str(&format!("      {:width$}  -> {}\n", "", finding.remedy));
        }
    }
    let count = |status| report.findings.iter().filter(|f| f.status == status).count();
    let verdict = match (count(FindingStatus::Fail), count(FindingStatus::Warn)) {
        (0, 0) => "Ramet works here.".to_owned(),
        (0, warnings) => {
            format!("Ramet works here, less well than it could: {} to read above.", things(warnings, "remark"))
        }
        (failures, _) => format!("Ramet can't work here yet: {} to mend.", things(failures, "thing")),
    };
    text.push_str(&format!("\n{verdict}\n"));
    text
}

fn things(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn findings_come_with_their_remedies() {
        let finding = |name: &str, status, remedy: &str| Finding {
            name: name.into(),
            status,
            detail: "found".into(),
            remedy: remedy.into(),
        };
        let mut report = DoctorReport { findings: vec![finding("kvm", FindingStatus::Warn, "load the module")] };
        let shown = text(&report, false);
        assert!(shown.contains("warn  kvm  found\n") && shown.contains("-> load the module"), "{shown}");
        assert!(shown.ends_with("1 remark to read above.\n"), "{shown}");
        report.findings.push(finding("userfaultfd", FindingStatus::Fail, "x"));
        assert!(text(&report, false).contains("can't work here"));
    }
}
