//! QEMU's own way, as a yardstick: a plain QEMU with the same guest, stopped and copied to a file by `migrate`, and started
//! from that file by `-incoming`. Nothing of Ramet's is involved but the guest image and its agent.

use std::{
    fs::{self, File},
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, Result, bail, ensure};
use ramet_guest::host::AgentClient;
use ramet_memory::ByteSize;
use ramet_truth::qmp::Qmp;
use rustix::io::FdFlags;
use serde_json::json;

const LIMIT: Duration = Duration::from_secs(180);

/// What a plain QEMU is started with.
#[derive(Debug, Clone)]
pub(crate) struct Guest {
    pub(crate) kernel: PathBuf,
    pub(crate) initrd: PathBuf,
    pub(crate) cmdline: String,
    pub(crate) memory: ByteSize,
    pub(crate) machine: String,
    pub(crate) kvm: bool,
}

/// A running QEMU; killed when dropped.
#[derive(Debug)]
pub(crate) struct Qemu {
    child: Child,
    qmp: Qmp,
    agent: PathBuf,
}

/// How long stop-and-copy took.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Copied {
    /// From STOP to RESUME.
    pub(crate) pause: Duration,
    /// Size of the file.
    pub(crate) bytes: u64,
}

/// How long a restore took, from the start of QEMU.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Restored {
    /// Until its CPUs ran.
    pub(crate) running: Duration,
    /// Until its agent answered.
    pub(crate) answered: Duration,
    /// Without the start of the process: from the start of loading until its CPUs ran. At least this of `running` is
    /// the loading itself.
    pub(crate) loading: Duration,
}

impl Qemu {
    /// Boots the guest and waits for its agent.
    pub(crate) async fn boot(guest: &Guest, dir: &Path) -> Result<(Self, AgentClient)> {
        let mut qemu = Self::spawn(guest, dir, None)?;
        qemu.qmp.call("query-status", &json!({}))?;
        let agent = AgentClient::connect(&qemu.agent, LIMIT).await.context("The agent under plain QEMU is silent")?;
        Ok((qemu, agent))
    }

    fn spawn(guest: &Guest, dir: &Path, incoming: Option<&File>) -> Result<Self> {
        let _ = fs::remove_dir_all(dir);
        fs::create_dir_all(dir)?;
        let (qmp, agent) = (dir.join("qmp"), dir.join("agent"));
        let socket = |id: &str, path: &Path| format!("socket,id={id},path={},server=on,wait=off", path.display());
        let mut command = Command::new("qemu-system-x86_64");
        command
            .args(["-nodefaults", "-no-user-config", "-vga", "none", "-display", "none"])
            .args(["-accel", if guest.kvm { "kvm" } else { "tcg,thread=multi" }])
            .args(["-cpu", if guest.kvm { "host" } else { "max" }, "-machine", &guest.machine])
            .args(["-m", &format!("{}M", guest.memory.bytes() >> 20), "-smp", "1"])
            .args(["-device", "virtio-serial-pci,id=serial,addr=0x3"])
            .args(["-chardev", &socket("agent", &agent), "-device", "virtserialport,chardev=agent,name=ramet.agent"])
            .args(["-chardev", &format!("file,id=console,path={}", dir.join("console.log").display())])
            .args(["-serial", "chardev:console"])
            .args(["-chardev", &socket("qmp", &qmp), "-mon", "chardev=qmp,mode=control"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(dir.join("stderr"))?);
        match incoming {
            None => {
                command.arg("-kernel").arg(&guest.kernel).arg("-initrd").arg(&guest.initrd);
                command.args(["-append", &guest.cmdline]);
            }
            Some(file) => {
                // Inherited: the fastest way that QEMU has to read a file.
                rustix::io::fcntl_setfd(file, FdFlags::empty())?;
                command.args(["-incoming", &format!("fd:{}", file.as_raw_fd())]);
                // The machine has to be the same; what it loads comes from the file.
                command.arg("-kernel").arg(&guest.kernel).arg("-initrd").arg(&guest.initrd);
                command.args(["-append", &guest.cmdline]);
            }
        }
        let mut child = command.spawn().context("Can't start qemu-system-x86_64")?;
        match Qmp::connect(&qmp, &mut child, LIMIT) {
            Ok(qmp) => Ok(Self { child, qmp, agent }),
            Err(err) => {
                let _ = child.kill();
                let _ = child.wait();
                let stderr = fs::read_to_string(dir.join("stderr")).unwrap_or_default();
                Err(err.context(format!("Plain QEMU did not start: {}", stderr.trim())))
            }
        }
    }

    /// Stops the guest, copies all of it to `path`, lets it go on.
    pub(crate) fn stop_and_copy(&mut self, path: &Path) -> Result<Copied> {
        let file = File::options().create(true).truncate(true).write(true).open(path)?;
        // The default limit is 128 MiB/s.
        self.qmp.call("migrate-set-parameters", &json!({ "max-bandwidth": 1_u64 << 40 }))?;
        self.qmp.call_with_fd("getfd", &json!({ "fdname": "copy" }), &file)?;
        self.qmp.forget_events();
        self.qmp.call("stop", &json!({}))?;
        self.qmp.call("migrate", &json!({ "uri": "fd:copy" }))?;
        let deadline = Instant::now() + LIMIT;
        loop {
            let state = self.qmp.call("query-migrate", &json!({}))?;
            match state["status"].as_str() {
                Some("completed") => break,
                Some("failed" | "cancelled") => bail!("QEMU's own migrate failed: {state}"),
                _ => ensure!(Instant::now() < deadline, "QEMU's own migrate takes over {} s", LIMIT.as_secs()),
            }
            std::thread::sleep(Duration::from_micros(500));
        }
        self.qmp.call("cont", &json!({}))?;
        let (stop, resume) = (self.qmp.event("STOP")?, self.qmp.event("RESUME")?);
        Ok(Copied { pause: resume.saturating_sub(stop), bytes: fs::metadata(path)?.len() })
    }

    /// Starts a guest from the file.
    pub(crate) async fn restore(guest: &Guest, dir: &Path, path: &Path) -> Result<Restored> {
        let file = File::open(path)?;
        let began = Instant::now();
        let began_unix = SystemTime::now().duration_since(UNIX_EPOCH)?;
        let mut qemu = Self::spawn(guest, dir, Some(&file))?;
        drop(file);
        let ready = began.elapsed();
        // The copy is of a stopped machine, and comes back as one.
        let deadline = Instant::now() + LIMIT;
        loop {
            match qemu.qmp.call("query-status", &json!({}))?["status"].as_str() {
                Some("inmigrate") => ensure!(Instant::now() < deadline, "QEMU's own restore does not end"),
                Some("running") => break,
                _ => {
                    qemu.qmp.call("cont", &json!({}))?;
                    break;
                }
            }
            std::thread::sleep(Duration::from_micros(500));
        }
        let running_unix = qemu.qmp.event("RESUME")?;
        let answer =
            AgentClient::connect(&qemu.agent, LIMIT).await.context("The agent is silent after QEMU's restore")?;
        let answered = began.elapsed();
        answer.close();
        let running = running_unix.saturating_sub(began_unix);
        Ok(Restored { running, answered, loading: running.saturating_sub(ready) })
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        // Both fail only when it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
