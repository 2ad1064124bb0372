//! Chains made by QEMU's own tools, `ramet-disk` processes, certificates.
#![allow(
    dead_code,
    unreachable_pub,
    clippy::unwrap_used,
    reason = "each test file uses a part; a failure ends the test"
)]

use ramet_disk::{
    ChainPaths, DiskId, ExtentMap,
    control::{
        ControlError, DiskStatus, ExtentsReply, PingReply, RemoteReply, Request, Response, SourceAddress, StatusReply,
    },
    overlay::Templates,
};
use ramet_memory::FamilyId;
use ramet_wire::{TlsConfig, TlsFiles};
use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::{
        fs::{FileExt, PermissionsExt},
        net::UnixStream,
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// The longest that anything here may take.
pub const LIMIT: Duration = Duration::from_secs(30);

/// Waits until `found` finds something.
pub fn soon<T>(what: &str, found: impl Fn() -> Option<T>) -> T {
    let deadline = Instant::now() + LIMIT;
    loop {
        if let Some(found) = found() {
            return found;
        }
        assert!(Instant::now() < deadline, "{what}: it never was");
        std::thread::sleep(Duration::from_millis(10));
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

pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % end
    }
}

pub fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|err| panic!("{command:?}: {err}: install qemu-utils"));
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{command:?}: {text}{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// A golden image and frozen overlays, with what the disk must show.
pub struct Chain {
    pub paths: ChainPaths,
    pub truth: Vec<u8>,
    pub raw: PathBuf,
}

impl Chain {
    /// `golden`: the image's size, which may be less than the disk's; 0: none.
    pub fn make(dir: &Path, size: u64, golden: u64, overlays: usize, seed: u64) -> Self {
        fs::create_dir_all(dir).unwrap();
        let mut random = Random(seed);
        let mut truth = vec![0; size as usize];
        let mut paths = ChainPaths { size, golden: None, origin: None, layers: vec![] };
        if golden > 0 {
            let path = dir.join("golden.raw");
            let file = fs::File::create(&path).unwrap();
            file.set_len(golden).unwrap();
            for block in 0..golden / 65536 {
                if random.below(3) > 0 {
                    let bytes: Vec<u8> = (0..8192).flat_map(|_| random.below(1 << 50).to_le_bytes()).collect();
                    file.write_all_at(&bytes, block * 65536).unwrap();
                    truth[(block * 65536) as usize..][..65536].copy_from_slice(&bytes);
                }
            }
            paths.golden = Some(path);
        }
        let templates = Templates::new(dir.join("templates"));
        for number in 0..overlays {
            let path = dir.join(format!("{number}.qcow2"));
            templates.create(&path, size).unwrap();
            let mut command = Command::new("qemu-io");
            // The chain with this overlay on top, to be written.
            let mut below = match &paths.golden {
                Some(path) => {
                    format!(r#"{{"driver":"raw","file":{{"driver":"file","filename":"{}"}}}}"#, path.display())
                }
                None => "null".to_owned(),
            };
            for layer in paths.layers.iter().chain([&path]) {
                below = format!(
                    r#"{{"driver":"qcow2","backing":{below},"file":{{"driver":"file","filename":"{}"}}}}"#,
                    layer.display()
                );
            }
            for _ in 0..30 {
                // Sizes as a guest writes them: a sector up to some clusters.
                let len = 512 << random.below(9);
                let start = random.below((size - len) / 512) * 512;
                let bytes = &mut truth[start as usize..][..len as usize];
                if random.below(5) == 0 {
                    command.args(["-c", &format!("write -q -z {start} {len}")]);
                    bytes.fill(0);
                } else {
                    let pattern = 1 + random.below(255) as u8;
                    command.args(["-c", &format!("write -q -P {pattern} {start} {len}")]);
                    bytes.fill(pattern);
                }
            }
            run(command.arg(format!("json:{below}")));
            fs::set_permissions(&path, fs::Permissions::from_mode(0o444)).unwrap();
            paths.layers.push(path);
        }
        let raw = dir.join("truth.raw");
        fs::write(&raw, &truth).unwrap();
        Self { paths, truth, raw }
    }
}

/// A process `ramet-disk`.
pub struct Process {
    pub dir: PathBuf,
    tls: PathBuf,
    family: FamilyId,
    child: Child,
}

impl Process {
    pub fn start(dir: &Path, tls: &Path, family: FamilyId) -> Self {
        let child = Self::spawn(dir, tls, family);
        let process = Self { dir: dir.to_owned(), tls: tls.to_owned(), family, child };
        process.up();
        process
    }

    fn spawn(dir: &Path, tls: &Path, family: FamilyId) -> Child {
        Command::new(env!("CARGO_BIN_EXE_ramet-disk"))
            .args(["--family", &family.to_string(), "--listen", "127.0.0.1:0", "--host", "host", "--silent-s", "1"])
            .arg("--dir")
            .arg(dir)
            .arg("--tls")
            .arg(tls)
            .env("RAMET_LOG", std::env::var("RAMET_LOG").unwrap_or_else(|_| "error".into()))
            .stdin(Stdio::null())
            .spawn()
            .unwrap()
    }

    fn up(&self) {
        let pid = self.child.id();
        soon("the process comes up", || {
            let reply = self.try_ask(&Request::Ping)?.ok()?;
            (serde_json::from_value::<PingReply>(reply).unwrap().pid == pid).then_some(())
        });
    }

    /// Kills it and starts it again.
    pub fn restart(&mut self) {
        self.kill();
        self.child = Self::spawn(&self.dir, &self.tls, self.family);
        self.up();
    }

    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits until it has ended.
    pub fn wait(&mut self) {
        self.child.wait().unwrap();
    }

    pub fn signal(&self, signal: &str) {
        run(Command::new("kill").arg(signal).arg(self.child.id().to_string()));
    }

    pub fn try_ask(&self, request: &Request) -> Option<Result<serde_json::Value, ControlError>> {
        let mut stream = UnixStream::connect(self.dir.join("control.sock")).ok()?;
        stream.set_read_timeout(Some(LIMIT)).ok()?;
        let mut line = serde_json::to_vec(request).unwrap();
        line.push(b'\n');
        stream.write_all(&line).ok()?;
        let mut answer = String::new();
        BufReader::new(&stream).read_line(&mut answer).ok()?;
        match serde_json::from_str(&answer).ok()? {
            Response::Ok(value) => Some(Ok(value)),
            Response::Error(err) => Some(Err(err)),
        }
    }

    pub fn ask(&self, request: &Request) -> Result<serde_json::Value, ControlError> {
        self.try_ask(request).expect("the process answers")
    }

    pub fn add_frozen(&self, chain: &Chain) -> DiskId {
        let disk = DiskId::random();
        self.ask(&Request::FrozenAdd { disk, chain: chain.paths.clone() }).unwrap();
        disk
    }

    pub fn extents(&self, disk: DiskId) -> ExtentMap {
        let reply: ExtentsReply = serde_json::from_value(self.ask(&Request::Extents { disk }).unwrap()).unwrap();
        reply.extents
    }

    pub fn address(&self) -> SourceAddress {
        let reply: PingReply = serde_json::from_value(self.ask(&Request::Ping).unwrap()).unwrap();
        SourceAddress { addr: reply.listen.unwrap(), name: "host".to_owned() }
    }

    /// Adds a disk of another host; the socket.
    pub fn add_remote(
        &self,
        disk: DiskId,
        extents: &ExtentMap,
        golden: Option<&Path>,
        sources: &[SourceAddress],
    ) -> PathBuf {
        let request = Request::RemoteAdd {
            disk,
            size: extents.size(),
            golden: golden.map(Path::to_owned),
            extents: extents.clone(),
            sources: sources.to_vec(),
        };
        let reply: RemoteReply = serde_json::from_value(self.ask(&request).unwrap()).unwrap();
        reply.socket
    }

    pub fn status(&self, disk: DiskId) -> DiskStatus {
        let reply: StatusReply = serde_json::from_value(self.ask(&Request::Status).unwrap()).unwrap();
        reply.disks.into_iter().find(|d| d.disk == disk).unwrap()
    }

    /// Exports that run for this directory.
    pub fn exports(&self) -> usize {
        exports(&self.dir)
    }
}

/// Running `qemu-storage-daemon`s whose sockets are in a directory.
pub fn exports(dir: &Path) -> usize {
    let sign = format!("addr.path={}/", fs::canonicalize(dir).unwrap().display());
    let lines = fs::read_dir("/proc").unwrap().flatten().filter_map(|e| fs::read(e.path().join("cmdline")).ok());
    lines.filter(|line| String::from_utf8_lossy(line).contains(&sign)).count()
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Two hosts and a frozen disk on the first.
pub struct World {
    pub dir: tempfile::TempDir,
    pub tls: TlsConfig,
    pub family: FamilyId,
    pub chain: Chain,
    pub disk: DiskId,
    pub extents: ExtentMap,
    pub a: Process,
    pub b: Process,
}

impl World {
    pub fn new(size: u64, golden: u64, overlays: usize, seed: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let tls = certificates(&dir.path().join("tls"));
        let chain = Chain::make(&dir.path().join("chain"), size, golden, overlays, seed);
        let family = FamilyId::random();
        let a = Process::start(&dir.path().join("a"), &dir.path().join("tls"), family);
        let b = Process::start(&dir.path().join("b"), &dir.path().join("tls"), family);
        let disk = a.add_frozen(&chain);
        let extents = a.extents(disk);
        Self { dir, tls, family, chain, disk, extents, a, b }
    }

    /// A copy of the golden image, as the other host has it.
    pub fn golden(&self) -> PathBuf {
        let copy = self.dir.path().join("golden-b.raw");
        fs::copy(self.chain.paths.golden.as_ref().unwrap(), &copy).unwrap();
        copy
    }

    pub fn process(&self, name: &str, family: FamilyId) -> Process {
        Process::start(&self.dir.path().join(name), &self.dir.path().join("tls"), family)
    }

    /// Reads the disk through QEMU's own driver, and compares.
    pub fn compare(&self, socket: &Path) {
        let url = format!("nbd+unix:///?socket={}", socket.display());
        run(Command::new("qemu-img").args(["compare", "-f", "raw", "-F", "raw", &url]).arg(&self.chain.raw));
    }

    /// Reads the disk with several reads at a time, and compares.
    pub fn convert(&self, socket: &Path) {
        let url = format!("nbd+unix:///?socket={}", socket.display());
        let copy = self.dir.path().join("copy.raw");
        run(Command::new("qemu-img").args(["convert", "-m", "16", "-W", "-f", "raw", "-O", "raw", &url]).arg(&copy));
        assert!(fs::read(copy).unwrap() == self.chain.truth);
    }
}
