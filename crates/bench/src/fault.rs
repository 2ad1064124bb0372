//! `bench fault`: what a missing page costs, against the least that the kernel and the network allow.
//!
//! Everything runs in this process, in pairs side by side: a bare userfaultfd echo (a thread that answers each event with one
//! `UFFDIO_COPY`) against the pager's fault thread; a bare TCP echo and a plain TCP copy against the page protocol with
//! mutual TLS and checksums. The pager's code is the product's own; only the guest is a thread that touches pages.

use crate::report::{Goal, Measured, Report};
use anyhow::{Context, Result, ensure};
use ramet_kernel::{CopyMode, Event, Features, Mode, PrivateMapping, SharedAtomics, Uffd};
use ramet_memory::{
    ByteSize, FamilyId, ImageId, LayerId, PAGE_SIZE, PageCount, PageIndex, PageRun, PageSet, VmId, page_checksum,
};
use ramet_pager::{
    Image,
    control::SourceAddress,
    family::Family,
    layer::{Layer, PageState},
    server,
    source::{Fetch, Source, SourceConfig},
    vm::{MappedSegment, Vm, VmParts, VmView},
};
use ramet_wire::stream::{Listener, Options, TlsConfig, TlsFiles};
use std::{
    fs,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    process::Command,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

/// Pages between two faults: beyond the neighbourhood that the pager fetches along.
const STRIDE: u64 = 9;
/// How long a bare handler spins before it blocks: as the pager's.
const SPIN: Duration = Duration::from_micros(40);

/// Runs the bench; `quick` takes fewer samples.
///
/// # Errors
/// Without root (it mounts a tmpfs), or when the kernel lacks userfaultfd.
pub fn run(quick: bool) -> Result<Report> {
    let faults: u64 = if quick { 1_000 } else { 8_000 };
    let rounds = if quick { 1 } else { 7 };
    let tmpfs = Tmpfs::mount()?;
    let mut report = Report::new("fault");
    let (mut echo, mut local, mut tcp_echo, mut tcp_fault) = (vec![], vec![], vec![], vec![]);
    for round in 0..rounds {
        let dir = tmpfs.0.join(format!("round{round}"));
        fs::create_dir(&dir)?;
        eprintln!("fault: round {} of {rounds}", round + 1);
        echo.extend(bare_echo(faults)?);
        local.extend(local_fill(&dir, faults)?);
        tcp_echo.extend(bare_tcp_echo(faults)?);
        tcp_fault.extend(remote_fault(&dir, faults)?);
        fs::remove_dir_all(&dir)?;
    }
    let (mut copy, mut fetch) = (vec![], vec![]);
    for round in 0..rounds.max(3) {
        let dir = tmpfs.0.join(format!("copy{round}"));
        fs::create_dir(&dir)?;
        copy.push(plain_tcp_copy(&dir)?);
        fetch.push(sequential_fetch(&dir)?);
        fs::remove_dir_all(&dir)?;
    }
    let echo = Measured::of("bare userfaultfd echo (spinning, UFFDIO_COPY)", "us", echo);
    let local = Measured::of("local fill (older layer's page, checked, written, woken)", "us", local);
    let tcp_echo = Measured::of("bare TCP echo of 4 KiB, loopback", "us", tcp_echo);
    let tcp_fault = Measured::of("fault over TCP loopback (mutual TLS, checked)", "us", tcp_fault);
    let copy = Measured::of("plain TCP copy of 256 MiB, file to file, loopback", "MiB/s", copy);
    let fetch =
        Measured::of("sequential fetch of 256 MiB by prefetching requests (mutual TLS, checked)", "MiB/s", fetch);
    report.goals = vec![
        Goal::at_most("local fill / bare userfaultfd echo", local.median / echo.median, 1.5),
        Goal::at_most(
            "(fault over TCP - 1.5 bare userfaultfd echoes) / bare TCP echo",
            (tcp_fault.median - 1.5 * echo.median) / tcp_echo.median,
            1.5,
        ),
        Goal::at_least("sequential fetch / plain TCP copy", fetch.median / copy.median, 0.6),
    ];
    report.results = vec![echo, local, tcp_echo, tcp_fault, copy, fetch];
    Ok(report)
}

struct Tmpfs(PathBuf);

impl Tmpfs {
    fn mount() -> Result<Self> {
        let dir = std::env::temp_dir().join(format!("ramet-bench-{}", std::process::id()));
        fs::create_dir_all(&dir)?;
        let done = Command::new("mount").args(["-t", "tmpfs", "-o", "huge=never", "ramet-bench"]).arg(&dir).status()?;
        ensure!(done.success(), "mounting a tmpfs for page files needs root");
        Ok(Self(dir))
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
        let _ = fs::remove_dir(&self.0);
    }
}

/// Makes sure that as many bytes of this machine's memory are free and really there: a machine that is itself a VM may have
/// given free memory back to its host, and gets it again slowly, page by page. Neither side of a pair is to pay for that.
fn warm_memory(dir: &Path, size: ByteSize) -> Result<()> {
    let path = dir.join("warm");
    let mut file = fs::File::create(&path)?;
    let block = vec![1; 1 << 20];
    for _ in 0..size.bytes() >> 20 {
        file.write_all(&block)?;
    }
    fs::remove_file(&path)?;
    Ok(())
}

/// Touches pages one by one and times each, in microseconds.
fn touch(
    memory: &PrivateMapping,
    pages: impl Iterator<Item = u64>,
    mut expected: impl FnMut(u64) -> u64,
) -> Result<Vec<f64>> {
    let mut samples = Vec::new();
    for page in pages {
        let started = Instant::now();
        let value = memory.read_u64(page as usize * (PAGE_SIZE / 8));
        samples.push(started.elapsed().as_secs_f64() * 1e6);
        ensure!(value == expected(page), "page {page} reads {value}");
    }
    Ok(samples)
}

fn bare_echo(faults: u64) -> Result<Vec<f64>> {
    let pages = faults * STRIDE;
    let memory = PrivateMapping::anonymous(pages as usize * PAGE_SIZE)?;
    let uffd = Uffd::create()?;
    uffd.api(Features(0))?;
    uffd.register(memory.addr(), memory.len() as u64, Mode { missing: true, ..Mode::default() })?;
    let ending = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let (uffd, stop) = (&uffd, &ending);
        let handler = scope.spawn(move || -> Result<()> {
            let page = [1u8; PAGE_SIZE];
            let mut events = [Event::default(); 16];
            let mut last = Instant::now();
            while !stop.load(Ordering::Relaxed) {
                let count = uffd.read_events(&mut events)?;
                if count == 0 {
                    if last.elapsed() > SPIN {
                        uffd.poll(Some(Duration::from_millis(20)))?;
                    }
                    continue;
                }
                for event in &events[..count] {
                    if let Event::Pagefault { addr, .. } = *event {
                        uffd.copy(addr, &page, CopyMode::default())?;
                    }
                }
                last = Instant::now();
            }
            Ok(())
        });
        let samples = touch(&memory, (0..faults).map(|i| i * STRIDE), |_| u64::from_le_bytes([1; 8]));
        ending.store(true, Ordering::Relaxed);
        handler.join().map_err(|_| anyhow::anyhow!("the handler failed"))??;
        samples
    })
}

fn value(page: u64) -> u64 {
    page.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1
}

/// A page of data that does not compress.
fn fill_page(page: u64, bytes: &mut [u8]) {
    let mut x = value(page);
    for word in bytes.chunks_exact_mut(8) {
        word.copy_from_slice(&x.to_le_bytes());
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
    }
}

/// A layer that owns all of `pages`, stored.
fn full_layer(dir: &Path, pages: u64) -> Result<Arc<Layer>> {
    let layer = Layer::create(dir, LayerId::random(), None, PageCount(pages), false)?;
    let mut owned = PageSet::new(PageCount(pages));
    owned.insert_run(PageRun { start: PageIndex(0), len: pages });
    layer.set_owned(owned)?;
    let mut bytes = vec![0; PAGE_SIZE];
    for page in 0..pages {
        fill_page(page, &mut bytes);
        layer.store(PageIndex(page), &bytes, std::iter::once(page_checksum(layer.id, PageIndex(page), &bytes)))?;
    }
    Ok(layer)
}

/// A "VM" in this process whose memory is a private view of `file`.
fn vm(dir: &Path, image: Arc<Image>, file: Arc<Layer>) -> Result<(PrivateMapping, Arc<Vm>)> {
    let pages = file.pages;
    let memory = PrivateMapping::of_file(&file.open_read_only()?, pages.size().bytes() as usize)?;
    let id = VmId::random();
    let segments = vec![MappedSegment { run: PageRun { start: PageIndex(0), len: pages.0 }, file }];
    let _ = image.owner(PageIndex(0));
    let vm = Vm::register(VmParts {
        id,
        pid: std::process::id(),
        ram_addr: memory.addr(),
        pages,
        view: VmView::Image { image, segments },
        uffd: Uffd::create()?,
        dirty: SharedAtomics::open(&dir.join(format!("{id}.dirty")), pages.0.div_ceil(64) as usize)?,
        tracked: false,
    })?;
    Ok((memory, vm))
}

fn serve_and_touch(memory: &PrivateMapping, vm: &Arc<Vm>, pages: impl Iterator<Item = u64>) -> Result<Vec<f64>> {
    let server = vm.clone();
    let handler = std::thread::spawn(move || server.serve());
    let samples = touch(memory, pages, value);
    vm.end();
    handler.join().map_err(|_| anyhow::anyhow!("the fault thread failed"))?;
    samples
}

fn local_fill(dir: &Path, faults: u64) -> Result<Vec<f64>> {
    let pages = faults * STRIDE;
    let layers = dir.join("local");
    fs::create_dir(&layers)?;
    let base = full_layer(&layers, pages)?;
    let top = Layer::create(&layers, LayerId::random(), Some(base.clone()), PageCount(pages), false)?;
    top.set_owned(PageSet::new(PageCount(pages)))?;
    let image = Image::new(ImageId::random(), PageCount(pages).size(), vec![base, top.clone()], None);
    let (memory, vm) = vm(&layers, image, top)?;
    serve_and_touch(&memory, &vm, (0..faults).map(|i| i * STRIDE))
}

fn bare_tcp_echo(count: u64) -> Result<Vec<f64>> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let addr = listener.local_addr()?;
    let echo = std::thread::spawn(move || -> Result<()> {
        let (mut stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        let mut page = [0; PAGE_SIZE];
        while stream.read_exact(&mut page).is_ok() {
            stream.write_all(&page)?;
        }
        Ok(())
    });
    let mut stream = TcpStream::connect(addr)?;
    stream.set_nodelay(true)?;
    let mut page = [7; PAGE_SIZE];
    let mut samples = Vec::new();
    for _ in 0..count {
        let started = Instant::now();
        stream.write_all(&page)?;
        stream.read_exact(&mut page)?;
        samples.push(started.elapsed().as_secs_f64() * 1e6);
    }
    drop(stream);
    echo.join().map_err(|_| anyhow::anyhow!("the echo failed"))??;
    Ok(samples)
}

/// Two pagers' families in this process: the first holds an image of `pages` pages, the second fetches from it.
struct Pair {
    image: Arc<Image>,
    file: Arc<Layer>,
    source: Arc<Source>,
    listener: Arc<Listener>,
    dir: PathBuf,
}

impl Pair {
    fn start(dir: &Path, pages: u64) -> Result<Self> {
        let tls = certificates(&dir.join("tls"))?;
        let id = FamilyId::random();
        let config =
            SourceConfig { family: id, host: "bench".into(), tls: Some(tls.clone()), options: Options::default() };
        let here = dir.join(id.to_string());
        fs::create_dir(&here)?;
        let family = Family::open(&here, config.clone())?;
        let stored = full_layer(&here.join("layers"), pages)?;
        family.adopt(ImageId::random(), stored.clone());
        let listener = Arc::new(Listener::bind("127.0.0.1:0".parse()?, &tls, &Options::default())?);
        let accepting = listener.clone();
        std::thread::spawn(move || server::serve(&accepting, &family, id, "bench"));
        let there = dir.join("there");
        fs::create_dir(&there)?;
        let file = Layer::create(&there, stored.id, None, PageCount(pages), true)?;
        let mut owned = PageSet::new(PageCount(pages));
        owned.insert_run(PageRun { start: PageIndex(0), len: pages });
        file.set_owned(owned)?;
        let address = SourceAddress { addr: listener.local_addr().to_string(), name: "bench".into() };
        let vms = Arc::new(arc_swap::ArcSwap::from_pointee(Vec::new()));
        let source = Source::start(address, config, vms.clone())?;
        file.source.store(Some(source.clone()));
        let image = Image::new(ImageId::random(), PageCount(pages).size(), vec![file.clone()], Some(source.clone()));
        let deadline = Instant::now() + Duration::from_secs(10);
        while !source.report().connected {
            ensure!(Instant::now() < deadline, "no connection: {}", source.trouble());
            std::thread::sleep(Duration::from_millis(2));
        }
        Ok(Self { image, file, source, listener, dir: there })
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.source.end();
        self.listener.close();
    }
}

fn remote_fault(dir: &Path, faults: u64) -> Result<Vec<f64>> {
    let pair = Pair::start(dir, faults * STRIDE)?;
    let (memory, vm) = vm(&pair.dir, pair.image.clone(), pair.file.clone())?;
    pair.source.set_vms(vec![vm.clone()]);
    warm_memory(dir, ByteSize::mib(64))?;
    serve_and_touch(&memory, &vm, (0..faults).map(|i| i * STRIDE))
}

const COPY: ByteSize = ByteSize::mib(256);

/// MiB a second.
fn speed(started: Instant) -> f64 {
    (COPY.bytes() >> 20) as f64 / started.elapsed().as_secs_f64()
}

fn plain_tcp_copy(dir: &Path) -> Result<f64> {
    let from = dir.join("from");
    let mut data = vec![0; 1 << 20];
    let file = fs::File::create(&from)?;
    for mib in 0..COPY.bytes() >> 20 {
        for (i, page) in data.chunks_exact_mut(PAGE_SIZE).enumerate() {
            fill_page(mib * 256 + i as u64, page);
        }
        file.write_all_at(&data, mib << 20)?;
    }
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let addr = listener.local_addr()?;
    let sender = std::thread::spawn(move || -> Result<()> {
        let (mut stream, _) = listener.accept()?;
        let mut file = fs::File::open(from)?;
        let mut buffer = vec![0; 256 << 10];
        loop {
            match file.read(&mut buffer)? {
                0 => return Ok(()),
                n => stream.write_all(&buffer[..n])?,
            }
        }
    });
    warm_memory(dir, COPY)?;
    let mut to = fs::File::create(dir.join("to"))?;
    let started = Instant::now();
    let mut stream = TcpStream::connect(addr)?;
    let mut buffer = vec![0; 256 << 10];
    loop {
        match stream.read(&mut buffer)? {
            0 => break,
            n => to.write_all(&buffer[..n])?,
        }
    }
    let speed = speed(started);
    fs::remove_file(dir.join("from"))?;
    fs::remove_file(dir.join("to"))?;
    sender.join().map_err(|_| anyhow::anyhow!("the sender failed"))??;
    Ok(speed)
}

fn sequential_fetch(dir: &Path) -> Result<f64> {
    let pages = COPY.pages().0;
    let pair = Pair::start(dir, pages)?;
    warm_memory(dir, COPY)?;
    let started = Instant::now();
    for start in (0..pages).step_by(512) {
        let run = PageRun { start: PageIndex(start), len: 512.min(pages - start) };
        pair.file.set_run(run, PageState::InFlight);
        let (owner, file) = (pair.file.clone(), pair.file.clone());
        pair.source.request(Fetch { owner, file, run, demand: None, vm: None });
    }
    while pair.source.report().pages < pages {
        ensure!(started.elapsed() < Duration::from_secs(60), "the fetch hangs: {}", pair.source.trouble());
        std::thread::sleep(Duration::from_micros(500));
    }
    let speed = speed(started);
    let missing = (0..pages).find(|&p| pair.file.state(PageIndex(p)) != PageState::Present);
    ensure!(missing.is_none(), "page {missing:?} did not arrive");
    Ok(speed)
}

/// A CA and one host, `bench`.
fn certificates(dir: &Path) -> Result<TlsConfig> {
    let ca_key = rcgen::KeyPair::generate()?;
    let mut ca = rcgen::CertificateParams::new(vec![])?;
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca_cert = ca.self_signed(&ca_key)?;
    let issuer = rcgen::Issuer::new(ca, ca_key);
    let key = rcgen::KeyPair::generate()?;
    let cert = rcgen::CertificateParams::new(vec!["bench".to_owned()])?.signed_by(&key, &issuer)?;
    fs::create_dir_all(dir)?;
    fs::write(dir.join("ca.pem"), ca_cert.pem())?;
    fs::write(dir.join("host.pem"), cert.pem())?;
    fs::write(dir.join("host.key"), key.serialize_pem())?;
    TlsFiles::in_dir(dir).load().context("load the bench's certificates")
}
