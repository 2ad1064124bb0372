//! Running a guest by QEMU alone, to look at its memory from outside: its RAM is a file, its console a socket on which a shell
//! takes commands, and it can be stopped, looked at, overwritten and let go on. No part of Ramet's daemon is involved.

use crate::{
    numbers::Numbers,
    observer::{Comparison, Truth},
    qmp::Qmp,
};
use anyhow::{Context as _, Result, bail, ensure};
use ramet_color::{ColorMap, CpuRoot, GuestMemory, color};
use ramet_memory::{ByteSize, PAGE_SIZE, PageCount, PageIndex};
use rustix::fs::SeekFrom;
use serde_json::{Value, json};
use std::{
    fs::{self, File},
    io::{self, Read as _, Write as _},
    os::{
        fd::AsRawFd as _,
        unix::{fs::FileExt as _, net::UnixStream},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// How long QEMU may take to answer.
const ANSWER: Duration = Duration::from_secs(60);
/// How long a guest may take to boot.
const BOOT: Duration = Duration::from_secs(120);
/// How long the program in the guest may take to write down what its kernel says.
const TRUTH: Duration = Duration::from_secs(400);
/// How long a guest is left alone before it is stopped: until the program that says it is ready sleeps.
const REST: Duration = Duration::from_millis(200);
/// How long a silent console is waited for before it is sent an empty line.
const NUDGE: Duration = Duration::from_secs(5);
/// How often the console is looked at.
const LOOK: Duration = Duration::from_millis(20);
/// What an error shows of the console.
const TAIL: usize = 4000;

/// What a guest is started with.
#[derive(Debug, Clone)]
pub struct GuestOptions {
    /// Directory of an image of `ramet image build`.
    pub image: PathBuf,
    /// Its RAM.
    pub memory: ByteSize,
    /// Number of its CPUs.
    pub cpus: u32,
    /// More for the kernel's command line.
    pub cmdline: String,
    /// QEMU's CPU model with its features.
    pub cpu: String,
    /// A raw disk that the guest sees as `/dev/vda`, and can't write to.
    pub disk: Option<PathBuf>,
    /// A directory on a tmpfs, for the RAM.
    pub tmpfs: PathBuf,
}

impl GuestOptions {
    /// A guest of this image and size with one CPU, its RAM on `/dev/shm`.
    #[must_use]
    pub fn new(image: impl Into<PathBuf>, memory: ByteSize) -> Self {
        Self {
            image: image.into(),
            memory,
            cpus: 1,
            cmdline: String::new(),
            cpu: CPU.into(),
            disk: None,
            tmpfs: "/dev/shm".into(),
        }
    }
}

/// QEMU's CPU model. QEMU 7.2 sometimes returns from CMPXCHG16B with arbitrary flags under TCG, of which kernels die that use it (6.12
/// and later do, in their slab allocator): so without.
pub const CPU: &str = "max,cx16=off";
/// How often a guest is asked until it is at rest.
const TRIES: u32 = 4;

/// What free pages are overwritten with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fill {
    /// Bytes without an order.
    Garbage,
    /// Zeros.
    Zeros,
    /// What a kernel with `page_poison=1` puts there.
    Poison,
}

/// A stopped guest, as it was colored and as its own kernel has it.
#[derive(Debug)]
pub struct Observed {
    /// What every page is, from outside.
    pub map: ColorMap,
    /// What the guest's kernel says.
    pub truth: Truth,
    /// The one held against the other.
    pub comparison: Comparison,
}

/// A running guest. QEMU ends, and its memory goes, when this is dropped and also when the thread that started it ends.
#[derive(Debug)]
pub struct Guest {
    qemu: Child,
    qmp: Qmp,
    console: UnixStream,
    said: Arc<Mutex<Vec<u8>>>,
    ram: RamFile,
    commands: u32,
    stopped: bool,
}

impl Guest {
    /// Boots a guest and waits until its shell takes commands.
    ///
    /// # Errors
    /// When something is missing (and what), or the guest does not come up; with the end of its console.
    pub fn start(options: &GuestOptions) -> Result<Self> {
        let image = &options.image;
        let manifest = fs::read(image.join("image.json")).with_context(|| {
            let name = image.file_name().unwrap_or_default().to_string_lossy();
            let dir = image.display();
            format!("There is no guest image at {dir}: `cargo xtask setup` builds '{name}', `cargo xtask test` too")
        })?;
        let manifest: Value = serde_json::from_slice(&manifest)?;
        let cmdline = manifest["cmdline"].as_str().unwrap_or("console=ttyS0");
        let dir = tempfile::Builder::new()
            .prefix("ramet-truth-")
            .tempdir_in(&options.tmpfs)
            .with_context(|| format!("Can't write to {}: the guest's RAM needs a tmpfs", options.tmpfs.display()))?;
        let ram = RamFile::create(&dir.path().join("ram"), options.memory)?;
        let (qmp, console) = (dir.path().join("qmp"), dir.path().join("console"));
        let mut qemu = command(options, dir.path(), &format!("{cmdline} {}", options.cmdline))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(dir.path().join("stderr"))?)
            .spawn()
            .context("Can't start setpriv and qemu-system-x86_64: install util-linux and qemu-system-x86")?;
        let connected = Qmp::connect(&qmp, &mut qemu, ANSWER).and_then(|qmp| Ok((qmp, UnixStream::connect(console)?)));
        let (qmp, console) = match connected {
            Ok(connected) => connected,
            Err(err) => {
                let _ = qemu.kill();
                let _ = qemu.wait();
                let stderr = fs::read_to_string(dir.path().join("stderr")).unwrap_or_default();
                return Err(err.context(format!("QEMU did not start: {}", stderr.trim())));
            }
        };
        let said = Arc::default();
        let mut guest = Self { qemu, qmp, console, said, ram, commands: 0, stopped: false };
        // QEMU has everything open by now, and so nothing stays behind, however this process ends.
        drop(dir);
        guest.listen()?;
        // From now on commands are not echoed, and no prompt stands between their output.
        guest.await_text("# ", BOOT)?;
        let deadline = Instant::now() + BOOT;
        loop {
            guest.say("[ -e /tmp/.console ] || { >/tmp/.console; stty -echo; echo @re\"\"ady; cat | sh 2>&1; }\n")?;
            match guest.await_text("@ready\n", NUDGE) {
                Ok(_) => break,
                // A shell that is about to take a line forgets what came before.
                Err(err) if Instant::now() > deadline || !guest.runs() => return Err(err),
                Err(_) => {}
            }
        }
        guest.sh("true", BOOT)?;
        Ok(guest)
    }

    /// Collects what the console says, until QEMU ends.
    fn listen(&self) -> Result<()> {
        let (mut console, said) = (self.console.try_clone()?, Arc::clone(&self.said));
        let listen = move || {
            let mut bytes = [0; 4096];
            while let Ok(len @ 1..) = console.read(&mut bytes) {
                said.lock().unwrap_or_else(PoisonError::into_inner).extend(&bytes[..len]);
            }
        };
        std::thread::Builder::new().name("console".into()).spawn(listen)?;
        Ok(())
    }

    fn say(&mut self, text: &str) -> Result<()> {
        self.console.write_all(text.as_bytes()).context("The guest's console is closed")
    }

    fn said(&self) -> String {
        let said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        String::from_utf8_lossy(&said).replace('\r', "")
    }

    /// The end of what the console said.
    #[must_use]
    pub fn tail(&self) -> String {
        let said = self.said();
        let skip = said.chars().count().saturating_sub(TAIL);
        said.chars().skip(skip).collect()
    }

    fn runs(&mut self) -> bool {
        matches!(self.qemu.try_wait(), Ok(None))
    }

    /// Waits until the console said something, and returns what it said before that.
    fn await_text(&mut self, text: &str, limit: Duration) -> Result<String> {
        let deadline = Instant::now() + limit;
        loop {
            let said = self.said();
            if let Some((before, _)) = said.split_once(text) {
                return Ok(before.to_owned());
            }
            if let Some(status) = self.qemu.try_wait()? {
                bail!("QEMU ended ({status}); the guest's console said last:\n{}", self.tail());
            }
            let seconds = limit.as_secs();
            ensure!(
                Instant::now() < deadline,
                "The guest did not say {text:?} within {seconds} s; its console said last:\n{}",
                self.tail()
            );
            std::thread::sleep(LOOK);
        }
    }

    /// Has the guest's shell run a command (one line or more, of less than 4000 bytes each) and returns what it printed.
    ///
    /// # Errors
    /// When it fails, or does not end in time; with the end of the console.
    pub fn sh(&mut self, command: &str, limit: Duration) -> Result<String> {
        self.commands += 1;
        let number = self.commands;
        self.said.lock().unwrap_or_else(PoisonError::into_inner).clear();
        self.say(&format!("( {command}\n) </dev/null; echo \"@end{number} $? @\"\n"))?;
        let end = format!("@end{number} ");
        let deadline = Instant::now() + limit;
        while let Err(err) = self.await_text(&end, NUDGE.min(limit)) {
            if Instant::now() > deadline || !self.runs() {
                return Err(err.context(format!("The guest's shell did not finish `{command}` in {limit:?}")));
            }
            // An emulated serial port may lose the interrupt of what came; one more byte brings both.
            self.say("\n")?;
        }
        self.await_text(" @\n", ANSWER)?;
        let said = self.said();
        let (output, rest) = said.split_once(&end).context("the console lost a line")?;
        let status = rest.split(' ').next().unwrap_or_default();
        ensure!(status == "0", "In the guest `{command}` failed ({status}):\n{output}");
        Ok(output.trim().to_owned())
    }

    /// Has the program in the guest write down what its kernel says of every page, and stops the guest right after.
    ///
    /// # Errors
    /// When the image lacks the program, or it does not get ready.
    pub fn tell_truth(&mut self) -> Result<()> {
        // Nothing may wait for it in the guest: what waits would end after the truth was told.
        self.sh("command -v ramet-truth >/dev/null && { ramet-truth & }", ANSWER)?;
        self.await_text("TRUTH\n", TRUTH)?;
        std::thread::sleep(REST);
        self.stop()
    }

    /// Stops the guest with its kernel's words in its memory, colors it, and holds the one against the other.
    ///
    /// A kernel gives pages back to its allocator now and then, by a timer. Where that was between its words and the stop, pages are
    /// free that were said not to be: then the guest goes on and says it anew, some times at most. A page that is wrongly called
    /// free is so every time.
    ///
    /// # Errors
    /// When the guest does not answer, or its memory can't be read.
    pub fn observe(&mut self) -> Result<Observed> {
        let mut tries = TRIES;
        loop {
            self.tell_truth()?;
            let roots = self.roots()?;
            let map = color(self.memory(), &roots, None)?;
            let truth =
                Truth::find(self.memory())?.context("What the guest's kernel says is not complete in its memory")?;
            let comparison = truth.compare(&map, self.memory());
            tries -= 1;
            if comparison.wrongly_free.is_empty() || tries == 0 {
                return Ok(Observed { map, truth, comparison });
            }
            self.cont()?;
            self.forget_truth()?;
        }
    }

    /// Ends the program that wrote down what the kernel says, and so gives back its memory.
    ///
    /// # Errors
    /// When the shell does not answer.
    pub fn forget_truth(&mut self) -> Result<()> {
        self.sh("for p in $(pidof ramet-truth); do grep -q hold /proc/$p/cmdline || kill $p; done", ANSWER).map(drop)
    }

    /// Stops all CPUs.
    ///
    /// # Errors
    /// When QEMU is gone.
    pub fn stop(&mut self) -> Result<()> {
        self.qmp.call("stop", &json!({}))?;
        self.stopped = true;
        Ok(())
    }

    /// Lets the CPUs go on.
    ///
    /// # Errors
    /// When QEMU is gone.
    pub fn cont(&mut self) -> Result<()> {
        self.stopped = false;
        self.qmp.call("cont", &json!({})).map(drop)
    }

    /// The CPUs' page-table roots.
    ///
    /// # Errors
    /// When QEMU does not tell them.
    pub fn roots(&mut self) -> Result<Vec<CpuRoot>> {
        let reply = self.qmp.call("human-monitor-command", &json!({ "command-line": "info registers -a" }))?;
        let text = reply.as_str().context("QEMU tells no registers")?;
        let register = |text: &str, name: &str| {
            let hex = text.split_once(name)?.1.split_whitespace().next()?;
            u64::from_str_radix(hex, 16).ok()
        };
        let root = |text: &str| Some(CpuRoot { cr3: register(text, "CR3=")?, cr4: register(text, "CR4=")? });
        let roots: Vec<_> = text.split("CR0=").skip(1).filter_map(root).collect();
        ensure!(!roots.is_empty(), "QEMU tells no CR3: {text}");
        Ok(roots)
    }

    /// The guest's memory. It stands still only while the guest is stopped.
    #[must_use]
    pub fn memory(&self) -> &RamFile {
        &self.ram
    }

    /// Writes over every page of a stopped guest that a clone may be given zeros for; returns how many there are.
    ///
    /// # Errors
    /// As [`Guest::overwrite`].
    pub fn overwrite_free(&self, map: &ColorMap, with: Fill) -> Result<u64> {
        let (mut count, mut numbers) = (0, Numbers::new(0x9e37_79b9_7f4a_7c15));
        let mut bytes = [if with == Fill::Poison { 0xaa } else { 0 }; PAGE_SIZE];
        for page in (0..map.pages().0).map(PageIndex).filter(|&page| map.may_be_zero(page)) {
            if with == Fill::Garbage {
                numbers.fill(&mut bytes);
            }
            self.overwrite(page, &bytes)?;
            count += 1;
        }
        Ok(count)
    }

    /// Writes over a page of a stopped guest.
    ///
    /// # Errors
    /// When the guest runs, or the tmpfs is full.
    pub fn overwrite(&self, page: PageIndex, bytes: &[u8; PAGE_SIZE]) -> Result<()> {
        ensure!(self.stopped, "the guest must be stopped before its memory is written to");
        ensure!(page.0 < self.ram.pages.0, "the guest has no page {}", page.0);
        self.ram.file.write_all_at(bytes, page.offset()).context("Can't write to the guest's RAM: is the tmpfs full?")
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // Both fail only when it has ended.
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

fn command(options: &GuestOptions, dir: &Path, cmdline: &str) -> Command {
    let mebibytes = options.memory.bytes() >> 20;
    let socket = |id: &str| format!("socket,id={id},path={},server=on,wait=off", dir.join(id).display());
    let ram = dir.join("ram");
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", "--", "qemu-system-x86_64"])
        // A kernel that panics ends QEMU, and so is told at once.
        .args(["-no-reboot", "-nodefaults", "-no-user-config", "-vga", "none", "-display", "none"])
        .args(["-accel", "tcg,thread=multi", "-cpu", &options.cpu, "-smp", &options.cpus.to_string()])
        .args(["-m", &format!("{mebibytes}M"), "-machine", "pc-i440fx-7.2,memory-backend=ram,graphics=off"])
        .arg("-object")
        .arg(format!("memory-backend-file,id=ram,size={mebibytes}M,mem-path={},share=on", ram.display()))
        .args(["-chardev", &socket("console"), "-serial", "chardev:console"])
        .args(["-chardev", &socket("qmp"), "-mon", "chardev=qmp,mode=control"])
        // For the agent in the guest: without it, it tells the console about that.
        .args(["-device", "virtio-serial-pci", "-chardev", &socket("agent")])
        .args(["-device", "virtserialport,chardev=agent,name=ramet.agent"])
        .arg("-kernel")
        .arg(options.image.join("kernel"))
        .arg("-initrd")
        .arg(options.image.join("initrd"))
        .args(["-append", cmdline]);
    if let Some(disk) = &options.disk {
        command.args(["-drive", &format!("file={},format=raw,if=none,id=disk,readonly=on", disk.display())]);
        command.args(["-device", "virtio-blk-pci,drive=disk"]);
    }
    command
}

/// A guest's RAM in a file. Reading it changes nothing, and takes no memory for pages that the guest never used.
#[derive(Debug)]
pub struct RamFile {
    file: File,
    pages: PageCount,
}

impl RamFile {
    fn create(path: &Path, size: ByteSize) -> Result<Self> {
        let file = File::options().create_new(true).read(true).write(true).open(path)?;
        file.set_len(size.bytes())?;
        Ok(Self { file, pages: size.pages() })
    }

    /// Opens the file of a guest.
    ///
    /// # Errors
    /// When it is not there.
    pub fn open(path: &Path, size: ByteSize) -> Result<Self> {
        let file = File::open(path).with_context(|| format!("Can't open the guest's RAM {}", path.display()))?;
        Ok(Self { file, pages: size.pages() })
    }

    /// Where another process can open it, for as long as this is open. Its name in the tmpfs is gone.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.file.as_raw_fd()).into()
    }
}

impl GuestMemory for RamFile {
    fn pages(&self) -> PageCount {
        self.pages
    }

    fn read(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(bytes, offset)
    }

    fn next_data(&self, page: PageIndex) -> Option<PageIndex> {
        if page.0 >= self.pages.0 {
            return None;
        }
        match rustix::fs::seek(&self.file, SeekFrom::Data(page.offset())) {
            Ok(offset) => Some(PageIndex::of_offset(offset)).filter(|next| next.0 < self.pages.0),
            // None: nothing but holes from here on.
            Err(rustix::io::Errno::NXIO) => None,
            // A file system that does not tell.
            Err(_) => Some(page),
        }
    }
}
