//! VMs that are only memory, under the real preload object; tmpfs mounts; pagers in this process and outside it.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "each test file uses a part; a failure ends the test"
)]

use ramet_memory::{ByteSize, FamilyId, ImageId, LayerId, PageIndex, VmId};
use ramet_pager::{
    control::{SourceAddress, View},
    family::Family,
    server,
    source::SourceConfig,
};
use ramet_wire::stream::{Listener, Options, TlsConfig, TlsFiles};
use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{Arc, mpsc},
    time::{Duration, Instant},
};

/// The longest that anything here may take; a fault that nobody serves fails a test instead of hanging it.
pub const LIMIT: Duration = Duration::from_secs(20);

/// A tmpfs with chosen options, unmounted in the end.
pub struct Tmpfs(PathBuf);

impl Tmpfs {
    /// `None`, said loudly, where mounting is not permitted.
    pub fn mount(options: &str) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap().keep();
        let done = Command::new("mount").args(["-t", "tmpfs", "-o", options, "ramet-test"]).arg(&dir).status().unwrap();
        if done.success() {
            return Some(Self(dir));
        }
        eprintln!("SKIPPED: mounting a tmpfs needs root");
        None
    }

    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
        let _ = fs::remove_dir(&self.0);
    }
}

/// The directory of built programs.
pub fn built(name: &str) -> PathBuf {
    let exe = std::env::current_exe().unwrap();
    // target/debug/deps/test-123 -> target/debug
    let path = exe.ancestors().nth(2).unwrap().join(name);
    assert!(path.exists(), "{} is not built: run `cargo build --workspace --examples`", path.display());
    path
}

/// A VM that is only memory.
pub struct MemoryVm {
    pub id: VmId,
    child: Child,
    stdin: ChildStdin,
    answers: mpsc::Receiver<String>,
    pub shim_sock: PathBuf,
}

impl MemoryVm {
    pub fn start(dir: &Path, memory: ByteSize, mode: &str) -> Self {
        let id = VmId::random();
        let ram = dir.join(format!("{}.ram", id.short()));
        fs::File::create(&ram).unwrap().set_len(memory.bytes()).unwrap();
        let shim_sock = dir.join(format!("{}.shim", id.short()));
        let mut child = Command::new(built("examples/memory_vm"))
            .arg(&ram)
            .arg(memory.bytes().to_string())
            .env("LD_PRELOAD", built("libramet_shim.so"))
            .env("RAMET_SHIM_SOCK", &shim_sock)
            .env("RAMET_SHIM_RAM", &ram)
            .env("RAMET_SHIM_MODE", mode)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let (tell, answers) = mpsc::channel();
        std::thread::spawn(move || stdout.lines().map_while(Result::ok).all(|line| tell.send(line).is_ok()));
        let vm = Self { id, child, stdin, answers, shim_sock };
        assert_eq!(vm.answer().as_deref(), Some("ready"));
        vm
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    fn answer(&self) -> Option<String> {
        self.answers.recv_timeout(LIMIT).ok()
    }

    /// Sends a command without waiting for its answer.
    pub fn send(&mut self, command: &str) {
        writeln!(self.stdin, "{command}").unwrap();
    }

    /// The next answer, or `None` when it does not come in time.
    pub fn answer_within(&self, limit: Duration) -> Option<String> {
        self.answers.recv_timeout(limit).ok()
    }

    pub fn read(&mut self, page: u64) -> String {
        self.send(&format!("r {page}"));
        self.answer().unwrap_or_else(|| panic!("page {page} was never served"))
    }

    pub fn write(&mut self, page: u64, value: u64) {
        self.send(&format!("w {page} {value}"));
        assert_eq!(self.answer().as_deref(), Some("ok"), "page {page} could not be written");
    }

    /// kill -9.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub fn attach(&self, family: &Arc<Family>, view: View) {
        family.attach(self.id, &self.shim_sock, self.pid(), view).unwrap();
    }
}

impl Drop for MemoryVm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A checkpoint of a VM that is idle (its test waits).
pub fn checkpoint(family: &Arc<Family>, vm: VmId) -> ImageId {
    let image = ImageId::random();
    family.prepare(vm, image, LayerId::random()).unwrap();
    family.commit(vm).unwrap();
    image
}

/// A family on a "host" of its own that serves its pages.
pub struct Host {
    pub family: Arc<Family>,
    listener: Arc<Listener>,
}

impl Host {
    pub fn start(dir: &Path, id: FamilyId, tls: &TlsConfig, addr: &str) -> Self {
        fs::create_dir_all(dir).unwrap();
        let family = family(dir, id, Some(tls.clone()));
        let listener = Arc::new(Listener::bind(addr.parse().unwrap(), tls, &Options::default()).unwrap());
        let (l, f) = (listener.clone(), family.clone());
        std::thread::spawn(move || server::serve(&l, &f, id, "host"));
        Self { family, listener }
    }

    pub fn address(&self) -> SourceAddress {
        source_at(self.listener.local_addr())
    }

    pub fn take(&self, image: ImageId, from: &Host) {
        let spec = from.family.write_spec(image).unwrap();
        self.family.add_image(image, &spec, &from.address()).unwrap();
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.listener.close();
    }
}

/// How many entries a directory has.
pub fn count(dir: &Path) -> usize {
    fs::read_dir(dir).unwrap().count()
}

/// Waits until `found` finds something.
pub fn soon<T>(what: &str, found: impl Fn() -> Option<T>) -> T {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(found) = found() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}: it never was");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// A file that fills a tmpfs up.
pub struct Filler(fs::File);

impl Filler {
    /// Leaves room for `pages` pages.
    pub fn fill(dir: &Path, pages: u64) -> Self {
        let filler = Self(fs::File::create(dir.join("filler")).unwrap());
        filler.take_all();
        filler.give(pages);
        filler
    }

    /// Takes all the room that there is.
    pub fn take_all(&self) {
        let mut len = self.0.metadata().unwrap().len();
        while self.0.write_all_at(&[1; 4096], len).is_ok() {
            len += 4096;
        }
        self.0.set_len(len).unwrap();
    }

    /// Gives some room back.
    pub fn give(&self, pages: u64) {
        let len = self.0.metadata().unwrap().len();
        self.0.set_len(len - pages * 4096).unwrap();
    }

    /// Gives all the room back.
    pub fn empty(&self) {
        self.0.set_len(0).unwrap();
    }
}

/// Certificates of a CA and one host, `host`, in `dir`.
pub fn certificates(dir: &Path) -> TlsConfig {
    let ca_key = rcgen::KeyPair::generate().unwrap();
    let mut ca = rcgen::CertificateParams::new(vec![]).unwrap();
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca_cert = ca.self_signed(&ca_key).unwrap();
    let issuer = rcgen::Issuer::new(ca, ca_key);
    let key = rcgen::KeyPair::generate().unwrap();
    let cert = rcgen::CertificateParams::new(vec!["host".to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
    fs::create_dir_all(dir).unwrap();
    fs::write(dir.join("ca.pem"), ca_cert.pem()).unwrap();
    fs::write(dir.join("host.pem"), cert.pem()).unwrap();
    fs::write(dir.join("host.key"), key.serialize_pem()).unwrap();
    TlsFiles::in_dir(dir).load().unwrap()
}

/// A family in this process.
pub fn family(dir: &Path, id: FamilyId, tls: Option<TlsConfig>) -> Arc<Family> {
    let dir = dir.join(id.to_string());
    fs::create_dir_all(&dir).unwrap();
    let config = SourceConfig { family: id, host: "host".to_owned(), tls, options: Options::default() };
    Family::open(&dir, config).unwrap()
}

pub fn source_at(addr: impl ToString) -> SourceAddress {
    SourceAddress { addr: addr.to_string(), name: "host".to_owned() }
}

pub fn page(n: u64) -> PageIndex {
    PageIndex(n)
}
