//! The lab itself.

use std::{
    fs, io,
    path::PathBuf,
    process::Child,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use ramet_client::{Client, api};
use rustix::mount::MountFlags;
use serde::Serialize;

use crate::{
    HostRecord, LabOptions, Process, ROOT, daemon, net,
    process::{Membership, Stamp},
    record::{self, LabRecord, lab_dir},
    teardown,
};

/// A lab that is up. Dropping it takes it down, unless it was opened by name or [detached](Lab::detach).
#[derive(Debug)]
pub struct Lab {
    record: LabRecord,
    /// Daemons that this process started, by host.
    children: Vec<Option<Child>>,
    /// Take the lab down at the drop.
    armed: bool,
}

/// A lab as `ramet lab ls` shows it.
#[derive(Debug, Clone, Serialize)]
pub struct LabSummary {
    /// Its name.
    pub name: String,
    /// How many hosts.
    pub hosts: usize,
    /// How many of their daemons run.
    pub daemons: usize,
    /// How many QEMUs run.
    pub qemus: usize,
    /// Speed of the links, when limited.
    pub link: Option<String>,
    /// Socket of the first host's daemon.
    pub socket: PathBuf,
    /// Something is missing: it was not wholly made, or crashed. Take it down.
    pub broken: Option<String>,
}

impl Lab {
    /// Makes the namespaces, starts the daemons, joins them to one group, and waits until all see each other.
    ///
    /// # Errors
    /// When this is not root, the lab is up already, or a part can't be made: with what is missing and what to do. What
    /// was made until then is removed.
    pub async fn up(options: &LabOptions) -> Result<Self> {
        options.check()?;
        if !rustix::process::geteuid().is_root() {
            bail!("A lab needs root: for network namespaces, a tmpfs for page files, and userfaultfd");
        }
        Self::sweep();
        let mut lab = Self::create(options)?;
        lab.start().await.with_context(|| format!("Can't bring up the lab '{}'", options.name))?;
        Ok(lab)
    }

    /// The directory and the network.
    fn create(options: &LabOptions) -> Result<Self> {
        let name = &options.name;
        let record = LabRecord::new(options)?;
        let make = || fs::create_dir_all(ROOT).and_then(|()| fs::create_dir(lab_dir(name)));
        // The last lab that goes takes the directory of all labs along, maybe at this very moment.
        let again = |made: &io::Result<()>| made.as_ref().is_err_and(|err| err.kind() == io::ErrorKind::NotFound);
        let made = std::iter::repeat_with(make).take(100).find(|made| !again(made)).unwrap_or_else(make);
        // Whoever makes the directory has the name.
        match made {
            Ok(()) => {}
            Err(err) if err.kind() == io::ErrorKind::AlreadyExists => {
                bail!("The lab '{name}' is up already: `ramet lab down --name {name}` takes it down")
            }
            Err(err) => return Err(err).with_context(|| format!("Can't make {}", lab_dir(name).display())),
        }
        let children = record.hosts.iter().map(|_| None).collect();
        let lab = Self { record, children, armed: true };
        // What daemons keep in /run is in memory on every machine that has its own tmpfs there. Not all have.
        let dir = lab_dir(name);
        rustix::mount::mount("ramet", &dir, "tmpfs", MountFlags::NOSUID | MountFlags::NODEV, Some(c"mode=0755"))
            .with_context(|| format!("Can't mount a tmpfs at {}", dir.display()))?;
        lab.record.save()?;
        // Left by a lab whose directory was removed by hand.
        for stale in net::namespaces(name) {
            net::delete(&stale)?;
        }
        net::create(&lab.record)?;
        Ok(lab)
    }

    async fn start(&mut self) -> Result<()> {
        for index in 0..self.record.hosts.len() {
            self.spawn(index)?;
        }
        for (host, child) in self.record.hosts.iter().zip(&mut self.children) {
            if let Some(child) = child {
                daemon::wait_ready(host, child).await?;
            }
        }
        let first = self.client(1);
        first.host_init(&api::HostInitRequest::default()).await.context("`host init` on h1 failed")?;
        for number in 2..=self.record.hosts.len() {
            let token = first.host_token(&api::TokenRequest::default()).await.context("`host token` on h1 failed")?;
            let join = api::JoinRequest { token: token.token, address: None };
            self.client(number).host_join(&join).await.with_context(|| format!("`host join` on h{number} failed"))?;
        }
        self.wait_joined(Duration::from_secs(20)).await
    }

    /// Waits until every host sees all others.
    async fn wait_joined(&self, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        for number in 1..=self.record.hosts.len() {
            loop {
                let list = self.client(number).hosts().await?;
                let alive = list.hosts.iter().filter(|h| h.alive).count();
                if alive == self.record.hosts.len() {
                    break;
                }
                if Instant::now() > deadline {
                    let silent: Vec<_> = list.hosts.iter().filter(|h| !h.alive).map(|h| h.name.as_str()).collect();
                    bail!("h{number} sees {alive} of {} hosts; silent: {silent:?}", self.record.hosts.len());
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        Ok(())
    }

    fn spawn(&mut self, index: usize) -> Result<()> {
        let child = daemon::spawn(&self.record, &self.record.hosts[index])?;
        self.record.hosts[index].daemon = Stamp::of(child.id()).ok();
        self.children[index] = Some(child);
        self.record.save()
    }

    /// The lab of this name, which somebody brought up. Dropping this handle leaves it up.
    ///
    /// # Errors
    /// When there is none.
    pub fn open(name: &str) -> Result<Self> {
        let record = LabRecord::load(name)?;
        let children = record.hosts.iter().map(|_| None).collect();
        Ok(Self { record, children, armed: false })
    }

    /// Leaves the lab up when this handle is dropped.
    pub fn detach(mut self) {
        self.armed = false;
    }

    /// Takes the lab down: daemons, VMs, pagers, mounts, namespaces, files.
    ///
    /// # Errors
    /// Names what could not be removed.
    pub async fn down(mut self) -> Result<()> {
        // Still armed: when this future is dropped here, the drop does the work.
        teardown::ask(&self.record.name).await;
        self.armed = false;
        self.remove()
    }

    fn remove(&mut self) -> Result<()> {
        let result = teardown::remove(&self.record.name);
        for child in self.children.iter_mut().filter_map(Option::take) {
            reap(child);
        }
        result
    }

    /// Takes down the lab of this name, whatever state it is in. Returns whether there was anything.
    ///
    /// # Errors
    /// Names what could not be removed.
    pub async fn down_by_name(name: &str) -> Result<bool> {
        crate::options::check_name(name)?;
        let there = teardown::exists(name);
        if there {
            teardown::ask(name).await;
            teardown::remove(name)?;
        }
        Ok(there)
    }

    /// Removes the labs that were to end with a process that is gone. Returns their names.
    pub fn sweep() -> Vec<String> {
        let mut gone = record::names();
        gone.retain(|name| {
            LabRecord::load(name).is_ok_and(|r| r.owner.is_some_and(|o| !o.alive())) && teardown::remove(name).is_ok()
        });
        gone
    }

    /// All labs on this machine.
    #[must_use]
    pub fn ls() -> Vec<LabSummary> {
        let summary = |name: String| {
            let processes = teardown::membership(&name).processes();
            let count = |wanted: &str| processes.iter().filter(|p| p.program.starts_with(wanted)).count();
            let record = LabRecord::load(&name);
            let hosts = record.as_ref().map_or(0, |r| r.hosts.len());
            let daemons = count("rametd");
            let broken = match &record {
                Err(err) => Some(format!("{err:#}")),
                Ok(_) if daemons < hosts => Some(format!("{} of {hosts} daemons do not run", hosts - daemons)),
                Ok(_) => None,
            };
            LabSummary {
                socket: lab_dir(&name).join("h1/rametd.sock"),
                link: record.ok().and_then(|r| r.link).map(|l| l.to_string()),
                qemus: count("qemu"),
                hosts,
                daemons,
                broken,
                name,
            }
        };
        record::names().into_iter().map(summary).collect()
    }

    /// The lab's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.record.name
    }

    /// The lab's directory: state and logs of its daemons.
    #[must_use]
    pub fn dir(&self) -> PathBuf {
        self.record.dir()
    }

    /// Its hosts, `h1` first.
    #[must_use]
    pub fn hosts(&self) -> &[HostRecord] {
        &self.record.hosts
    }

    /// A client of the daemon of host `number` (from 1, as in `h1`). Of a host that the lab does not have, every call
    /// fails.
    #[must_use]
    pub fn client(&self, number: usize) -> Client {
        Client::unix(self.dir().join(format!("h{number}/rametd.sock")))
    }

    /// The processes of host `number` that run: `rametd`, its pagers and QEMUs.
    ///
    /// # Errors
    /// When there is no such host.
    pub fn processes(&self, number: usize) -> Result<Vec<Process>> {
        let host = self.record.host(number)?;
        Ok(Membership::new([host.netns.clone()], &host.state_dir).processes())
    }

    /// The last lines that the daemon of host `number` printed.
    ///
    /// # Errors
    /// When there is no such host.
    pub fn log_tail(&self, number: usize, lines: usize) -> Result<String> {
        Ok(daemon::log_tail(self.record.host(number)?, lines))
    }

    /// Bytes that have come in over the link of host `number` since the lab is up: everything, headers included.
    ///
    /// # Errors
    /// When there is no such host or nothing runs on it.
    pub fn received_bytes(&self, number: usize) -> Result<u64> {
        let processes = self.processes(number)?;
        let process = processes.first().with_context(|| format!("Nothing runs on h{number}"))?;
        let path = format!("/proc/{}/net/dev", process.pid);
        let table = fs::read_to_string(&path).with_context(|| format!("Can't read {path}"))?;
        net::received(&table, "eth0").with_context(|| format!("{path} has no eth0"))
    }

    /// Kills the daemon of host `number` with SIGKILL; its VMs and pagers stay.
    ///
    /// # Errors
    /// When there is no such host or its daemon does not run.
    pub fn kill_host_daemon(&mut self, number: usize) -> Result<()> {
        let stamp = self.record.host(number)?.daemon.filter(|d| d.alive());
        let stamp = stamp.with_context(|| format!("The daemon of h{number} does not run"))?;
        stamp.kill();
        if let Some(child) = self.children[number - 1].take() {
            reap(child);
        }
        let deadline = Instant::now() + Duration::from_secs(10);
        while stamp.alive() {
            if Instant::now() > deadline {
                bail!("The daemon of h{number} (process {}) does not end", stamp.pid);
            }
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// Starts the daemon of host `number` again (killing it when it runs), and waits until it answers.
    ///
    /// # Errors
    /// When there is no such host, or the daemon does not come up: with the end of its log.
    pub async fn restart_host_daemon(&mut self, number: usize) -> Result<()> {
        if self.record.host(number)?.daemon.is_some_and(Stamp::alive) {
            self.kill_host_daemon(number)?;
        }
        self.spawn(number - 1)?;
        match &mut self.children[number - 1] {
            Some(child) => daemon::wait_ready(&self.record.hosts[number - 1], child).await,
            None => Ok(()),
        }
    }

    /// Gives other further arguments to every `rametd` that is started from now on.
    pub fn set_daemon_args<T: Into<String>>(&mut self, args: impl IntoIterator<Item = T>) {
        self.record.daemon_args = args.into_iter().map(Into::into).collect();
    }

    /// Cuts host `number` off the others: packets are lost, no connection is told.
    ///
    /// # Errors
    /// When there is no such host.
    pub fn cut(&self, number: usize) -> Result<()> {
        net::set_link(&self.record, self.record.host(number)?, false)
    }

    /// Connects host `number` again.
    ///
    /// # Errors
    /// When there is no such host.
    pub fn heal(&self, number: usize) -> Result<()> {
        net::set_link(&self.record, self.record.host(number)?, true)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        if std::thread::panicking() {
            for host in &self.record.hosts {
                eprintln!("--- end of the log of {}:\n{}", host.name, daemon::log_tail(host, 30));
            }
        }
        if let Err(err) = self.remove() {
            eprintln!("{err:#}");
        }
    }
}

/// Waits for a child that was killed.
fn reap(mut child: Child) {
    // Both fail only when it has been waited for already.
    let _ = child.kill();
    let _ = child.wait();
}
