//! Reading a frozen chain: by a `qemu-storage-daemon`, since qcow2 is QEMU's business.
//!
//! It is started when something is first read, started again when it dies, and ended when nothing is read for a while.

use crate::{ChainPaths, DiskId, PAGE, nbd::Client};
use std::{
    fs, io,
    os::unix::process::CommandExt,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex, OnceLock,
        atomic::{AtomicU32, Ordering},
        mpsc,
    },
    time::{Duration, Instant},
};

/// How long a daemon may take to come up, and to answer a read.
const ANSWER: Duration = Duration::from_secs(10);
/// How often a read is tried, with a new daemon each time.
const TRIES: usize = 3;
const PROGRAM: &str = "qemu-storage-daemon";

/// A frozen chain that can be read.
#[derive(Debug)]
pub struct Export {
    name: String,
    chain: Mutex<ChainPaths>,
    socket: PathBuf,
    log: PathBuf,
    /// Of the daemon that runs, else 0: known also while one is being started.
    pid: Arc<AtomicU32>,
    running: Mutex<Running>,
}

#[derive(Debug, Default)]
struct Running {
    pid: Arc<AtomicU32>,
    child: Option<Child>,
    /// Counts daemons: a connection to an earlier one is of no use.
    number: u64,
    idle: Vec<Client>,
    busy: usize,
    used: Option<Instant>,
}

impl Export {
    /// Nothing is started yet. The daemon's socket and log will be `stem` with `.qsd` and `.qsd-log`. It will be asked for
    /// the disk by its number: should another one answer there, it is not taken for this disk.
    #[must_use]
    pub fn new(disk: DiskId, chain: ChainPaths, stem: &Path) -> Self {
        let (socket, log) = (stem.with_extension("qsd"), stem.with_extension("qsd-log"));
        let pid = Arc::<AtomicU32>::default();
        let running = Running { pid: pid.clone(), ..Running::default() };
        Self { name: disk.to_string(), chain: Mutex::new(chain), socket, log, pid, running: Mutex::new(running) }
    }

    /// The chain.
    #[must_use]
    pub fn chain(&self) -> ChainPaths {
        crate::lock(&self.chain).clone()
    }

    /// Its files lie elsewhere from now on.
    pub fn set_chain(&self, chain: ChainPaths) {
        let mut now = crate::lock(&self.chain);
        if *now != chain {
            *now = chain;
            drop(now);
            self.stop();
        }
    }

    /// The daemon's process, while one runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        Some(self.pid.load(Ordering::Acquire)).filter(|&pid| pid != 0)
    }

    /// Reads whole pages. What lies past the end of the disk is zero.
    ///
    /// # Errors
    /// When the chain cannot be read, also by a new daemon.
    pub fn read(&self, page: u64, buffer: &mut [u8]) -> io::Result<()> {
        let mut tries = 0;
        loop {
            let (mut client, number) = self.client()?;
            let offset = page * PAGE;
            let there = usize::try_from(client.size().saturating_sub(offset)).unwrap_or(usize::MAX).min(buffer.len());
            let (wanted, beyond) = buffer.split_at_mut(there);
            beyond.fill(0);
            let read = if wanted.is_empty() { Ok(()) } else { client.read(offset, wanted) };
            let mut running = crate::lock(&self.running);
            running.busy = running.busy.saturating_sub(1);
            running.used = Some(Instant::now());
            let same = running.number == number;
            match read {
                Err(err) if err.kind() != io::ErrorKind::Other => {
                    tries += 1;
                    tracing::warn!(socket = %self.socket.display(), error = %err, "the export of a frozen disk failed");
                    if same {
                        running.stop();
                    }
                    if tries == TRIES {
                        return Err(err);
                    }
                }
                done => {
                    if same {
                        running.idle.push(client);
                    }
                    return done;
                }
            }
        }
    }

    /// Ends the daemon when nothing was read for `idle`; notices when it has died.
    pub fn tidy(&self, idle: Duration) {
        let mut running = crate::lock(&self.running);
        if !running.alive() || running.busy == 0 && running.used.is_none_or(|used| used.elapsed() > idle) {
            running.stop();
        }
    }

    /// Ends the daemon.
    pub fn stop(&self) {
        crate::lock(&self.running).stop();
    }

    /// Ends the daemon and removes what it left.
    pub fn remove(&self) {
        self.stop();
        for path in [&self.socket, &self.log] {
            let _ = fs::remove_file(path);
        }
    }

    /// A connection to the daemon, which is started where none runs.
    fn client(&self) -> io::Result<(Client, u64)> {
        let mut running = crate::lock(&self.running);
        if !running.alive() {
            running.stop();
            let child = self.spawn()?;
            self.pid.store(child.id(), Ordering::Release);
            running.child = Some(child);
            running.number += 1;
            if let Err(err) = self.wait_up(&mut running) {
                running.stop();
                return Err(err);
            }
        }
        running.used = Some(Instant::now());
        let client = match running.idle.pop() {
            Some(client) => client,
            None => Client::connect(&self.socket, &self.name, ANSWER)?,
        };
        running.busy += 1;
        Ok((client, running.number))
    }

    fn spawn(&self) -> io::Result<Child> {
        let nodes = crate::lock(&self.chain).nodes("n").map_err(io::Error::other)?;
        let _ = fs::remove_file(&self.socket);
        let log = fs::File::create(&self.log)?;
        // It dies with this process, however that ends.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", PROGRAM]);
        for node in nodes {
            command.arg("--blockdev").arg(node.to_string());
        }
        command
            .arg("--nbd-server")
            // QEMU wants commas doubled.
            .arg(format!("addr.type=unix,addr.path={}", self.socket.display().to_string().replace(',', ",,")))
            .arg("--export")
            .arg(format!("type=nbd,id=disk,node-name=n-top,name={},writable=off", self.name))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            // A signal to this process's group is not for it.
            .process_group(0);
        keeper_spawn(command).map_err(|err| {
            let text = format!("cannot run setpriv and {PROGRAM}: install util-linux and qemu-system-common: {err}");
            io::Error::new(err.kind(), text)
        })
    }

    fn wait_up(&self, running: &mut Running) -> io::Result<()> {
        let begin = Instant::now();
        loop {
            if let Ok(client) = Client::connect(&self.socket, &self.name, ANSWER) {
                running.idle.push(client);
                tracing::info!(socket = %self.socket.display(), ms = begin.elapsed().as_millis() as u64, "export is up");
                return Ok(());
            }
            if !running.alive() || begin.elapsed() > ANSWER {
                let said = fs::read_to_string(&self.log).unwrap_or_default();
                let said =
                    said.lines().last().unwrap_or("it says nothing; is qemu-storage-daemon installed?").to_owned();
                return Err(io::Error::other(format!("{PROGRAM} did not come up: {said}")));
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Running {
    fn alive(&mut self) -> bool {
        self.child.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    fn stop(&mut self) {
        self.idle.clear();
        self.number += 1;
        if let Some(mut child) = self.child.take() {
            // It writes nothing: there is nothing to finish.
            let _ = child.kill();
            let _ = child.wait();
        }
        self.pid.store(0, Ordering::Release);
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        self.stop();
    }
}

type Order = (Command, mpsc::Sender<io::Result<Child>>);

/// Starts a program from a thread that never ends: the death signal comes when the thread ends that started it.
fn keeper_spawn(command: Command) -> io::Result<Child> {
    static KEEPER: OnceLock<Option<Mutex<mpsc::Sender<Order>>>> = OnceLock::new();
    let keeper = KEEPER.get_or_init(|| {
        let (send, orders) = mpsc::channel::<Order>();
        let body = move || {
            for (mut command, answer) in orders {
                let _ = answer.send(command.spawn());
            }
        };
        std::thread::Builder::new().name("keeper".into()).spawn(body).ok().map(|_| Mutex::new(send))
    });
    let gone = || io::Error::other("the thread that starts programs is gone");
    let (answer, child) = mpsc::channel();
    let keeper = keeper.as_ref().ok_or_else(gone)?;
    crate::lock(keeper).send((command, answer)).map_err(|_| gone())?;
    child.recv().map_err(|_| gone())?
}

/// Kills daemons that an earlier process with this directory left: they die with it, but for a moment at their start.
pub fn kill_leftovers(dir: &Path) {
    let Some(dir) = dir.to_str() else { return };
    let sign = format!("addr.type=unix,addr.path={}/", dir.replace(',', ",,"));
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|n| n.parse::<i32>().ok()) else { continue };
        let Some(pid) = rustix::process::Pid::from_raw(pid) else { continue };
        let is_ours = || {
            fs::read(entry.path().join("cmdline")).is_ok_and(|line| {
                line.split(|b| *b == 0).any(|arg| arg == PROGRAM.as_bytes())
                    && line.split(|b| *b == 0).any(|arg| arg.starts_with(sign.as_bytes()))
            })
        };
        if !is_ours() {
            continue;
        }
        // Looked at again with the process held: its number may be another's by now.
        if let Ok(held) = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())
            && is_ours()
        {
            tracing::warn!(pid = pid.as_raw_nonzero().get(), "an export of an earlier process is ended");
            let _ = rustix::process::pidfd_send_signal(&held, rustix::process::Signal::KILL);
        }
    }
}
