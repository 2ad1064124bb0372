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
    source::SourceConfig,
};
use ramet_wire::stream::{Options, TlsConfig, TlsFiles};
use std::{
    fs,
    io::{BufRead, BufReader, Write},
    path::{Path, PathBuf},
    process::{Child, ChildStdin, Command, Stdio},
    sync::{Arc, mpsc},
    time::Duration,
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
