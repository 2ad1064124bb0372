//! What this host can do, and what to do about what it can't.

use crate::Accel;
use ramet_kernel::{Features, PagemapScanner, Uffd};
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::Stdio,
    time::{Duration, Instant},
};
use tokio::{io::AsyncReadExt, process::Command};

/// How long the tiny guest may take under KVM. Where KVM is real it takes milliseconds; where it is emulated a stock kernel
/// would take minutes.
const KVM_LIMIT: Duration = Duration::from_secs(2);

/// How good a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Status {
    /// As it should be.
    Ok,
    /// Ramet works, but less well.
    Warn,
    /// Ramet does not work.
    Fail,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What.
    pub name: String,
    /// How it is.
    pub status: Status,
    /// What was found.
    pub detail: String,
    /// What to do about it; empty when it is as it should be.
    pub remedy: String,
}

/// What the doctor needs to know.
#[derive(Debug, Clone)]
pub struct DoctorConfig {
    /// QEMU.
    pub qemu: PathBuf,
    /// The tiny guest, for the probe of KVM.
    pub tiny_guest: Option<PathBuf>,
    /// User and group that QEMU runs as; `None` is this process's own.
    pub user: Option<(u32, u32)>,
}

fn finding(name: &str, status: Status, detail: impl Into<String>, remedy: impl Into<String>) -> Finding {
    Finding { name: name.to_owned(), status, detail: detail.into(), remedy: remedy.into() }
}

fn ok_or(good: bool, bad: Status) -> Status {
    if good { Status::Ok } else { bad }
}

/// Looks at everything. Takes a few seconds at most.
pub async fn probe(config: &DoctorConfig) -> Vec<Finding> {
    let mut findings = vec![privileges(), qemu(&config.qemu).await, kvm(config).await];
    findings.extend(userfaultfd());
    findings.extend([pagemap_scan(), huge_pages(), tun(), memory()]);
    for (program, needed) in PROGRAMS {
        findings.push(program_found(program, needed).await);
    }
    let networks = tokio::task::spawn_blocking(ramet_net::try_out).await;
    findings.extend(networks.map_or_else(|_| Vec::new(), network_findings));
    findings
}

/// What is needed besides QEMU itself: the package that has it, and what goes without it.
struct Needed {
    package: &'static str,
    without: &'static str,
    status: Status,
}

/// Programs of others, by name.
const PROGRAMS: [(&str, Needed); 4] = [
    ("qemu-img", Needed { package: "qemu-utils", without: "VMs get no disk", status: Status::Fail }),
    (
        "qemu-storage-daemon",
        Needed { package: "qemu-utils", without: "disks can't be read by other hosts", status: Status::Fail },
    ),
    (
        "mmdebstrap",
        Needed { package: "mmdebstrap", without: "`ramet image build --debian` is refused", status: Status::Warn },
    ),
    (
        "mke2fs",
        Needed { package: "e2fsprogs", without: "`ramet image build --debian` is refused", status: Status::Warn },
    ),
];

async fn program_found(program: &str, needed: Needed) -> Finding {
    let version = if program == "mke2fs" { "-V" } else { "--version" };
    // Daemons are often started without the `sbin` directories in their path.
    let place = ["/usr/sbin", "/sbin"].iter().map(|dir| Path::new(dir).join(program)).find(|path| path.exists());
    let mut command = Command::new(place.unwrap_or_else(|| program.into()));
    let output = command.arg(version).stdin(Stdio::null()).kill_on_drop(true).output();
    let failed = match tokio::time::timeout(Duration::from_secs(10), output).await {
        Ok(Ok(output)) if output.status.success() => {
            let said = if output.stdout.is_empty() { output.stderr } else { output.stdout };
            let line = String::from_utf8_lossy(&said).lines().next().unwrap_or_default().to_owned();
            return finding(program, Status::Ok, line, "");
        }
        Ok(Ok(output)) => output.status.to_string(),
        Ok(Err(err)) => err.to_string(),
        Err(_) => "no answer".to_owned(),
    };
    let remedy = format!("{}; install it: `apt-get install {}`", needed.without, needed.package);
    finding(program, needed.status, format!("does not run: {failed}"), remedy)
}

fn network_findings(tried: ramet_net::Result<Vec<ramet_net::Trial>>) -> Vec<Finding> {
    let trials = match tried {
        Ok(trials) => trials,
        Err(err) => {
            let remedy = "VMs get no network: run it as root, on a kernel with CONFIG_NET_NS";
            return vec![finding("network namespaces", Status::Warn, err.to_string(), remedy)];
        }
    };
    let mut findings = vec![finding("network namespaces", Status::Ok, "one could be made", "")];
    findings.extend(trials.into_iter().map(|trial| match trial.result {
        Ok(()) => finding(trial.what, Status::Ok, "works", ""),
        Err(err @ ramet_net::Error::MissingProgram { .. }) => {
            finding(trial.what, Status::Warn, err.to_string(), trial.without)
        }
        Err(err) => {
            let module = trial.module.map(|module| format!("; `modprobe {module}`, or a kernel that has it"));
            let detail = err.to_string().lines().next().unwrap_or_default().to_owned();
            finding(trial.what, Status::Warn, detail, format!("{}{}", trial.without, module.unwrap_or_default()))
        }
    }));
    findings
}

fn privileges() -> Finding {
    let root = rustix::process::geteuid().is_root();
    let detail = if root { "running as root" } else { "not running as root" };
    let remedy = if root {
        ""
    } else {
        "run rametd as root: it mounts page files, serves faults of other users' processes and makes networks"
    };
    finding("privileges", ok_or(root, Status::Fail), detail, remedy)
}

async fn qemu(program: &Path) -> Finding {
    let install = "install it: `apt-get install qemu-system-x86`";
    let output = Command::new(program).arg("--version").stdin(Stdio::null()).kill_on_drop(true).output();
    let Ok(Ok(output)) = tokio::time::timeout(Duration::from_secs(10), output).await else {
        return finding("qemu", Status::Fail, format!("{} does not run", program.display()), install);
    };
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().next().unwrap_or_default().to_owned();
    let version = line.split("version ").nth(1).and_then(|v| {
        let mut parts = v.split(|c: char| !c.is_ascii_digit());
        Some((parts.next()?.parse::<u32>().ok()?, parts.next()?.parse::<u32>().ok()?))
    });
    match version {
        Some(version) if version >= (7, 2) => finding("qemu", Status::Ok, line, ""),
        Some(_) => finding("qemu", Status::Fail, line, "QEMU 7.2 or newer is needed: upgrade the distribution"),
        None => finding("qemu", Status::Fail, format!("{} tells no version", program.display()), install),
    }
}

async fn kvm(config: &DoctorConfig) -> Finding {
    let tcg = "VMs run under TCG, QEMU's translator: everything works, more slowly";
    if !Path::new("/dev/kvm").exists() {
        return finding(
            "kvm",
            Status::Warn,
            "no /dev/kvm",
            format!("{tcg}; enable virtualisation in the firmware or the outer VM, and load kvm_intel or kvm_amd"),
        );
    }
    if let Err(err) = File::options().read(true).write(true).open("/dev/kvm") {
        return finding(
            "kvm",
            Status::Warn,
            format!("/dev/kvm can't be opened: {err}"),
            format!("{tcg}; add the user to the group kvm"),
        );
    }
    let Some(tiny) = &config.tiny_guest else {
        return finding(
            "kvm",
            Status::Warn,
            "/dev/kvm exists, but the tiny guest that would try it is missing",
            format!("{tcg}; run `cargo xtask setup`"),
        );
    };
    match try_kvm(config, tiny).await {
        Ok(took) => finding("kvm", Status::Ok, format!("a guest ran under KVM in {} ms", took.as_millis()), ""),
        Err(Trouble { what, remedy }) => finding("kvm", Status::Warn, what, format!("{tcg}; {remedy}")),
    }
}

/// Why KVM can't be used.
struct Trouble {
    what: String,
    remedy: &'static str,
}

impl Trouble {
    fn new(what: impl Into<String>, remedy: &'static str) -> Self {
        Self { what: what.into(), remedy }
    }
}

/// Boots the tiny guest under KVM, as VMs are run: same user, same CPU model. It must come to its end in time.
async fn try_kvm(config: &DoctorConfig, tiny: &Path) -> Result<Duration, Trouble> {
    let started = Instant::now();
    let mut command = Command::new(&config.qemu);
    command
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-accel", "kvm", "-cpu", "host", "-m", "64M"])
        .args(["-serial", "stdio", "-append", "probe", "-no-reboot", "-kernel", "/dev/stdin"])
        .stdin(File::open(tiny).map_err(|err| Trouble::new(format!("{}: {err}", tiny.display()), "build it again"))?)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    if let Some((uid, gid)) = config.user {
        command.uid(uid).gid(crate::qemu::kvm_group().unwrap_or(gid));
    }
    let install = "install QEMU: `apt-get install qemu-system-x86`";
    let mut child = command.spawn().map_err(|err| Trouble::new(format!("QEMU can't be started: {err}"), install))?;
    let (out, err) = (child.stdout.take(), child.stderr.take());
    let (Some(mut out), Some(err)) = (out, err) else { return Err(Trouble::new("no output", install)) };
    let read = async {
        let mut text = Vec::new();
        let mut chunk = [0; 512];
        while let Ok(n @ 1..) = out.read(&mut chunk).await {
            text.extend_from_slice(&chunk[..n]);
            if text.windows(14).any(|w| w == b"RAMET-TINY end") || text.len() > 64 << 10 {
                return true;
            }
        }
        false
    };
    let ended = tokio::time::timeout(KVM_LIMIT, read).await;
    let _ = child.kill().await;
    match ended {
        Ok(true) => Ok(started.elapsed()),
        Ok(false) => {
            let mut words = Vec::new();
            let _ = tokio::time::timeout(Duration::from_secs(1), err.take(4096).read_to_end(&mut words)).await;
            let words = String::from_utf8_lossy(&words).into_owned();
            let last = words.lines().map(str::trim).rfind(|line| !line.is_empty()).unwrap_or("it said nothing");
            let remedy = if words.contains("Permission denied") {
                "give QEMU's user access: `chgrp kvm /dev/kvm; chmod 660 /dev/kvm`"
            } else {
                "this KVM is emulated or broken"
            };
            Err(Trouble::new(format!("/dev/kvm exists, but QEMU ends under it: {last}"), remedy))
        }
        Err(_) => Err(Trouble::new(
            format!("/dev/kvm exists, but a small guest did not end within {} s under it", KVM_LIMIT.as_secs()),
            "this KVM is emulated: a stock kernel would take minutes",
        )),
    }
}

/// What VMs should run under on this host: KVM where it really works.
pub async fn choose_accel(config: &DoctorConfig) -> Accel {
    if kvm(config).await.status == Status::Ok { Accel::Kvm } else { Accel::Tcg }
}

fn userfaultfd() -> Vec<Finding> {
    let made = match Uffd::create() {
        Ok(uffd) => uffd.api(Features(0)),
        Err(err) => Err(err),
    };
    let has = match made {
        Ok(has) => has,
        Err(err) => {
            let remedy = "be root, or give access to /dev/userfaultfd, or set vm.unprivileged_userfaultfd=1; the kernel needs CONFIG_USERFAULTFD";
            return vec![finding("userfaultfd", Status::Fail, format!("can't be made: {err}"), remedy)];
        }
    };
    let mut findings = vec![finding("userfaultfd", Status::Ok, "works, also for faults taken in the kernel", "")];
    let newer = |version: &str| format!("use Linux {version} or newer");
    for (name, feature, bad, detail, remedy) in [
        ("userfaultfd: tmpfs", Features::MISSING_SHMEM, Status::Fail, "missing pages of tmpfs files", newer("4.11")),
        (
            "userfaultfd: write protection",
            Features::WP_HUGETLBFS_SHMEM,
            Status::Fail,
            "write protection of tmpfs files",
            newer("5.19"),
        ),
        (
            "userfaultfd: new pages",
            Features::WP_UNPOPULATED,
            Status::Warn,
            "first writes to new pages are seen (else the pause of a booted VM's checkpoint grows with its memory)",
            newer("6.4"),
        ),
    ] {
        let good = has.has(feature);
        findings.push(finding(name, ok_or(good, bad), detail, if good { String::new() } else { remedy }));
    }
    if !Path::new("/dev/userfaultfd").exists() {
        findings.push(finding(
            "/dev/userfaultfd",
            Status::Warn,
            "missing: QEMU runs unprivileged and has to make its own userfaultfd",
            "use Linux 6.1 or newer, or set vm.unprivileged_userfaultfd=1",
        ));
    }
    findings
}

fn pagemap_scan() -> Finding {
    if PagemapScanner::supported() {
        finding("PAGEMAP_SCAN", Status::Ok, "works", "")
    } else {
        finding(
            "PAGEMAP_SCAN",
            Status::Warn,
            "not in this kernel: page maps are read entry by entry",
            "use Linux 6.7 or newer",
        )
    }
}

fn huge_pages() -> Finding {
    let file = "/sys/kernel/mm/transparent_hugepage/shmem_enabled";
    if fs::read_to_string(file).is_ok_and(|t| t.contains("[force]")) {
        return finding(
            "huge pages on tmpfs",
            Status::Fail,
            "forced on every tmpfs, which corrupts clones",
            format!("`echo never > {file}`"),
        );
    }
    finding("huge pages on tmpfs", Status::Ok, "not forced", "")
}

fn tun() -> Finding {
    match File::options().read(true).write(true).open("/dev/net/tun") {
        Ok(_) => finding("tun", Status::Ok, "/dev/net/tun can be opened", ""),
        Err(err) => finding("tun", Status::Warn, format!("/dev/net/tun: {err}"), "VMs get no network; `modprobe tun`"),
    }
}

fn memory() -> Finding {
    let text = fs::read_to_string("/proc/meminfo").unwrap_or_default();
    let mib = |name: &str| {
        let line = text.lines().find(|l| l.starts_with(name)).unwrap_or_default();
        line.split_ascii_whitespace().nth(1).and_then(|n| n.parse::<u64>().ok()).unwrap_or(0) / 1024
    };
    let (total, available) = (mib("MemTotal:"), mib("MemAvailable:"));
    let detail = format!("{available} MiB of {total} MiB available");
    let remedy =
        if available >= 1024 { "" } else { "end something: a guest of 512 MiB and its image need about 1 GiB" };
    finding("memory", ok_or(available >= 1024, Status::Warn), detail, remedy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_missing_comes_with_what_goes_without_it_and_the_package() {
        let needed = Needed { package: "some-package", without: "nothing works", status: Status::Warn };
        let missing = program_found("no-such-program", needed).await;
        assert_eq!(missing.status, Status::Warn);
        assert!(missing.remedy.contains("nothing works") && missing.remedy.contains("some-package"), "{missing:?}");

        let trial = |result| ramet_net::Trial { what: "VXLAN", module: Some("vxlan"), without: "no tunnels", result };
        let refused = || ramet_net::Error::MissingProgram { program: "ip", package: "iproute2" };
        let kernel =
            ramet_net::Error::Command { what: "x".into(), program: "ip", output: "Unknown device type".into() };
        let found = network_findings(Ok(vec![trial(Ok(())), trial(Err(refused())), trial(Err(kernel))]));
        let statuses: Vec<_> = found.iter().map(|f| f.status).collect();
        assert_eq!(statuses, [Status::Ok, Status::Ok, Status::Warn, Status::Warn]);
        assert!(found[2].detail.contains("iproute2"), "{found:?}");
        assert!(found[3].detail.contains("Unknown device") && found[3].remedy.contains("modprobe vxlan"), "{found:?}");
        let none = network_findings(Err(refused()));
        assert!(none.len() == 1 && !none[0].remedy.is_empty(), "{none:?}");
    }
}
