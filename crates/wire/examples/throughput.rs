//! How fast pages travel over loopback: a plain TCP copy, the page protocol without TLS, and with it; and how long one
//! page takes to come. Run with `cargo run --release -p ramet-wire --example throughput [MiB]`.
//!
//! The source pushes raw pages (noise, so that LZ4 gives up), the asker verifies every checksum.

use ramet_memory::{FamilyId, LayerId, PAGE_SIZE, PageIndex, page_checksum};
use ramet_wire::{
    Connection, Frame, Listener, Message, Options, PagesWriter, Priority, Receiver, Sender, TlsConfig, TlsFiles,
};
use std::{
    error::Error,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    thread,
    time::{Duration, Instant},
};

type Result<T> = std::result::Result<T, Box<dyn Error + Send + Sync>>;

const LAYER: LayerId = LayerId::from_u128(0x1234);
const PER_REQUEST: u16 = 64;
const WINDOW: usize = 8;

fn main() -> Result<()> {
    let mib: usize = std::env::args().nth(1).map_or(Ok(256), |arg| arg.parse())?;
    let spin = std::env::args().nth(2).map_or(Ok(30), |arg| arg.parse())?;
    let options = Options { spin: Duration::from_micros(spin), ..Options::default() };
    let dir = tempfile::tempdir()?;
    let tls = identity(dir.path())?;

    for _ in 0..3 {
        let plain = plain_copy(mib)?;
        println!("plain TCP copy        {plain:8.0} MiB/s");
        for (name, tls) in [("frames, plain", None), ("frames, mutual TLS", Some(&tls))] {
            let (asker, source) = pair(tls, &options)?;
            let speed = stream_pages(asker, source, mib)?;
            println!("{name:20}  {speed:8.0} MiB/s  {:3.0} %", speed / plain * 100.0);
        }
    }
    let echo = tcp_echo()?;
    println!("TCP echo of 4 KiB, blocking    p50 {:6.1} us  p99 {:6.1} us", echo.0, echo.1);
    for (name, tls) in [("one page, plain", None), ("one page, mutual TLS", Some(&tls))] {
        for spin in [0, spin] {
            let options = Options { spin: Duration::from_micros(spin), ..Options::default() };
            let (asker, source) = pair(tls, &options)?;
            let (p50, p99) = one_page(asker, source)?;
            println!("{name:21} spin {spin:3}  p50 {p50:6.1} us  p99 {p99:6.1} us");
        }
    }
    Ok(())
}

fn identity(dir: &std::path::Path) -> Result<TlsConfig> {
    let mut ca = rcgen::CertificateParams::new(Vec::new())?;
    ca.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
    let ca = rcgen::CertifiedIssuer::self_signed(ca, rcgen::KeyPair::generate()?)?;
    let key = rcgen::KeyPair::generate()?;
    let cert = rcgen::CertificateParams::new(vec!["h1".into()])?.signed_by(&key, &ca)?;
    std::fs::write(dir.join("ca.pem"), ca.pem())?;
    std::fs::write(dir.join("host.pem"), cert.pem())?;
    std::fs::write(dir.join("host.key"), key.serialize_pem())?;
    Ok(TlsFiles::in_dir(dir).load()?)
}

fn pair(tls: Option<&TlsConfig>, options: &Options) -> Result<(Connection, Connection)> {
    let any = "127.0.0.1:0".parse()?;
    if let Some(tls) = tls {
        let listener = Listener::bind(any, tls, options)?;
        let addr = listener.local_addr();
        let source = thread::spawn(move || listener.accept()?.handshake());
        let asker = Connection::connect(addr, "h1", tls, options)?;
        return Ok((asker, source.join().map_err(|_| "source panicked")??));
    }
    let listener = TcpListener::bind::<std::net::SocketAddr>(any)?;
    let asker = TcpStream::connect(listener.local_addr()?)?;
    let (source, _) = listener.accept()?;
    Ok((Connection::insecure_for_bench(asker, options)?, Connection::insecure_for_bench(source, options)?))
}

fn plain_copy(mib: usize) -> Result<f64> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut out = TcpStream::connect(listener.local_addr()?)?;
    let (mut input, _) = listener.accept()?;
    let begin = Instant::now();
    let sender = thread::spawn(move || {
        let data = vec![7; 256 << 10];
        (0..mib * 4).try_for_each(|_| out.write_all(&data))
    });
    let mut buffer = vec![0; 256 << 10];
    let mut total = 0;
    while total < mib << 20 {
        total += input.read(&mut buffer)?;
    }
    let speed = mib as f64 / begin.elapsed().as_secs_f64();
    sender.join().map_err(|_| "sender panicked")??;
    Ok(speed)
}

fn noise() -> (Vec<[u8; PAGE_SIZE]>, Vec<u64>) {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    let pages: Vec<[u8; PAGE_SIZE]> = (0..1024)
        .map(|_| {
            std::array::from_fn(|_| {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
                state as u8
            })
        })
        .collect();
    let sums = pages.iter().enumerate().map(|(n, page)| page_checksum(LAYER, PageIndex(n as u64), page)).collect();
    (pages, sums)
}

/// Answers requests until the connection ends. Page n holds the bytes of page n mod 1024.
fn serve(sender: &Sender, mut receiver: Receiver) -> Result<()> {
    let (pages, _) = noise();
    let mut sums: Vec<u64> = Vec::new();
    let mut writer = PagesWriter::new();
    while let Ok(Frame { req, message }) = receiver.recv() {
        let Message::GetPages { handle, start, count, .. } = message else { continue };
        writer.set_link_speed(sender.link_speed());
        writer.start(req, handle);
        for n in start.0..start.0 + u64::from(count) {
            let bytes = &pages[n as usize % pages.len()];
            // Stands for the checksums that a real source keeps.
            if sums.len() <= n as usize {
                sums.push(page_checksum(LAYER, PageIndex(n), bytes));
            }
            if writer.is_full() {
                sender.send(writer.finish(false))?;
                writer.start(req, handle);
            }
            writer.push_raw_or_lz4(PageIndex(n), bytes, sums[n as usize])?;
        }
        sender.send(writer.finish(true))?;
    }
    Ok(())
}

fn ask(sender: &Sender, out: &mut Vec<u8>, req: u32, start: u64, count: u16) -> Result<()> {
    out.clear();
    let message = Message::GetPages { handle: 1, start: PageIndex(start), count, priority: Priority::Prefetch };
    Frame { req, message }.encode(out);
    Ok(sender.send(out)?)
}

fn stream_pages(asker: Connection, source: Connection, mib: usize) -> Result<f64> {
    let (source_sender, source_receiver) = source.split();
    let source = thread::spawn(move || serve(&source_sender, source_receiver));
    let (sender, mut receiver) = asker.split();
    let mut out = Vec::new();
    Frame { req: 0, message: Message::Hello { family: FamilyId::from_u128(1), version: 1, host: "h2" } }
        .encode(&mut out);
    sender.send(&out)?;
    let total = mib as u64 * 256;
    let (mut asked, mut got) = (0, 0);
    let begin = Instant::now();
    while got < total {
        while asked < total && asked < got + WINDOW as u64 * u64::from(PER_REQUEST) {
            ask(&sender, &mut out, 1, asked, PER_REQUEST)?;
            asked += u64::from(PER_REQUEST);
        }
        let Message::Pages(pages) = receiver.recv()?.message else { return Err("no pages".into()) };
        for run in pages.runs() {
            run.verify(LAYER)?;
            got += run.pages.len;
        }
    }
    let speed = mib as f64 / begin.elapsed().as_secs_f64();
    sender.close();
    source.join().map_err(|_| "source panicked")??;
    Ok(speed)
}

fn one_page(asker: Connection, source: Connection) -> Result<(f64, f64)> {
    let (source_sender, source_receiver) = source.split();
    let source = thread::spawn(move || serve(&source_sender, source_receiver));
    let (sender, mut receiver) = asker.split();
    let (mut out, mut page) = (Vec::new(), [0; PAGE_SIZE]);
    let mut times = Vec::new();
    for n in 0..5000 {
        let begin = Instant::now();
        ask(&sender, &mut out, n, u64::from(n), 1)?;
        let Message::Pages(pages) = receiver.recv()?.message else { return Err("no pages".into()) };
        for entry in pages.iter() {
            entry.decompress_into(LAYER, &mut page)?;
        }
        times.push(begin.elapsed().as_secs_f64() * 1e6);
    }
    sender.close();
    source.join().map_err(|_| "source panicked")??;
    Ok(percentiles(times))
}

fn tcp_echo() -> Result<(f64, f64)> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut near = TcpStream::connect(listener.local_addr()?)?;
    let (mut far, _) = listener.accept()?;
    near.set_nodelay(true)?;
    far.set_nodelay(true)?;
    let far = thread::spawn(move || {
        let mut buffer = [0; 4096];
        while far.read_exact(&mut buffer).is_ok() && far.write_all(&buffer).is_ok() {}
    });
    let mut buffer = [1; 4096];
    let mut times = Vec::new();
    for _ in 0..5000 {
        let begin = Instant::now();
        near.write_all(&buffer)?;
        near.read_exact(&mut buffer)?;
        times.push(begin.elapsed().as_secs_f64() * 1e6);
    }
    drop(near);
    far.join().map_err(|_| "echo panicked")?;
    Ok(percentiles(times))
}

fn percentiles(mut times: Vec<f64>) -> (f64, f64) {
    times.sort_by(f64::total_cmp);
    (times[times.len() / 2], times[times.len() * 99 / 100])
}
