//! A frozen disk, read on another host, through QEMU's own NBD driver: real processes, loopback, mutual TLS.
#![allow(clippy::unwrap_used, reason = "a failure ends the test")]

mod support;

use ramet_disk::{ChainPaths, DiskId, ExtentMap, Kind, control::Request, nbd::Client, overlay::Templates};
use std::{
    fs,
    io::Write,
    os::unix::net::UnixStream,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};
use support::{LIMIT, Random, World, run};

const MIB: u64 = 1 << 20;

fn connect(socket: &Path) -> Client {
    Client::connect(socket, "", LIMIT).unwrap()
}

fn code(world: &World, request: &Request) -> String {
    world.b.ask(request).unwrap_err().code
}

#[test]
fn bytes_are_the_same_and_only_data_travels_once() {
    for seed in 1..=3 {
        // The golden image is smaller than the disk, and ends inside a page.
        let world = World::new(24 * MIB + 512, 16 * MIB + 1024, 2, 77 * seed);
        let data = world.extents.bytes(Kind::Data);
        assert!(data > 0 && data < 12 * MIB && world.extents.bytes(Kind::Golden) > 4 * MIB, "{:?}", world.extents);
        let socket = world.b.add_remote(world.disk, &world.extents, Some(&world.golden()), &[world.a.address()]);
        world.compare(&socket);
        let first = world.b.status(world.disk);
        assert_eq!((first.fetched_bytes, first.cached_bytes), (data, data));
        assert!(first.golden_bytes > 0 && first.requests > 0 && first.served_bytes >= 24 * MIB && first.waiting == 0);
        assert_eq!(world.a.status(world.disk).served_bytes, data);
        world.convert(&socket);
        assert_eq!(world.b.status(world.disk).fetched_bytes, data);
        // Odd pieces.
        let (mut client, mut random) = (connect(&socket), Random(seed));
        for _ in 0..300 {
            let len = 1 + random.below(20_000);
            let at = random.below(world.chain.paths.size - len);
            let mut bytes = vec![0; len as usize];
            client.read(at, &mut bytes).unwrap();
            assert!(bytes == world.chain.truth[at as usize..][..len as usize], "{len} at {at}");
        }
    }
}

#[test]
fn without_a_golden_image_there_everything_travels() {
    let world = World::new(8 * MIB, 8 * MIB, 2, 5);
    let socket = world.b.add_remote(world.disk, &world.extents, None, &[world.a.address()]);
    world.compare(&socket);
    let (data, golden) = (world.extents.bytes(Kind::Data), world.extents.bytes(Kind::Golden));
    assert_eq!(world.b.status(world.disk).fetched_bytes, data + golden);
    // And without a map, with the map's reading still to come.
    let other = world.a.add_frozen(&world.chain);
    let unknown = ExtentMap::uniform(8 * MIB, Kind::Data).unwrap();
    let socket = world.b.add_remote(other, &unknown, None, &[world.a.address()]);
    world.convert(&socket);
    assert_eq!(world.b.status(other).fetched_bytes, 8 * MIB);
}

#[test]
fn disks_of_other_shapes() {
    // Only overlays; only a golden image, larger and smaller than the disk.
    for (golden, overlays) in [(0, 1), (0, 3), (6 * MIB, 0), (2 * MIB, 0), (2 * MIB, 1)] {
        let world = World::new(4 * MIB, golden.min(4 * MIB), overlays, golden + overlays as u64 + 9);
        let golden = (golden > 0).then(|| world.golden());
        let socket = world.b.add_remote(world.disk, &world.extents, golden.as_deref(), &[world.a.address()]);
        world.compare(&socket);
        assert_eq!(world.b.status(world.disk).fetched_bytes, world.extents.bytes(Kind::Data));
        let socket = world.b.add_remote(world.disk, &world.extents, None, &[world.a.address()]);
        world.convert(&socket);
    }
}

#[test]
fn readers_at_the_same_time_cause_one_fetch() {
    let world = World::new(8 * MIB, 8 * MIB, 2, 21);
    let unknown = ExtentMap::uniform(8 * MIB, Kind::Data).unwrap();
    let socket = world.b.add_remote(world.disk, &unknown, None, &[world.a.address()]);
    std::thread::scope(|scope| {
        for reader in 0..8u64 {
            let (socket, truth) = (&socket, &world.chain.truth);
            scope.spawn(move || {
                let mut client = connect(socket);
                let mut bytes = vec![0; 4096 << (reader % 4)];
                for at in (0..8 * MIB).step_by(bytes.len()) {
                    client.read(at, &mut bytes).unwrap();
                    assert!(bytes == truth[at as usize..][..bytes.len()], "at {at}");
                }
            });
        }
    });
    assert_eq!(world.b.status(world.disk).fetched_bytes, 8 * MIB);
    assert_eq!(world.a.status(world.disk).served_bytes, 8 * MIB);
}

#[test]
fn hostile_clients_and_requests_do_no_harm() {
    let world = World::new(4 * MIB, 4 * MIB, 1, 33);
    let socket = world.b.add_remote(world.disk, &world.extents, None, &[world.a.address()]);
    let mut random = Random(3);
    for _ in 0..50 {
        let mut stream = UnixStream::connect(&socket).unwrap();
        let noise: Vec<u8> = (0..500).map(|_| random.below(256) as u8).collect();
        let _ = stream.write_all(&noise);
    }
    let (disk, extents) = (DiskId::random(), world.extents.clone());
    let remote = |size, golden: Option<&str>, addr: &str| Request::RemoteAdd {
        disk,
        size,
        golden: golden.map(Into::into),
        extents: extents.clone(),
        sources: vec![ramet_disk::control::SourceAddress { addr: addr.to_owned(), name: "host".to_owned() }],
    };
    assert_eq!(code(&world, &remote(MIB, None, "1.2.3.4:5")), "bad_request");
    assert_eq!(code(&world, &remote(4 * MIB, Some("/nowhere"), "1.2.3.4:5")), "bad_request");
    assert_eq!(code(&world, &remote(4 * MIB, Some("/etc/hostname"), "1.2.3.4:5")), "bad_request");
    assert_eq!(code(&world, &remote(4 * MIB, None, "nowhere")), "bad_request");
    assert_eq!(code(&world, &Request::Drop { disk }), "no_such_disk");
    assert_eq!(code(&world, &Request::Extents { disk }), "no_such_disk");
    let frozen = |disk, chain: &ChainPaths| Request::FrozenAdd { disk, chain: chain.clone() };
    assert_eq!(code(&world, &frozen(world.disk, &world.chain.paths)), "exists");
    let gone = ChainPaths { size: 4 * MIB, golden: None, origin: None, layers: vec!["/nowhere".into()] };
    assert_eq!(code(&world, &frozen(disk, &gone)), "bad_request");
    // The same again is no error; at its own host, its files may have moved.
    world.a.ask(&frozen(world.disk, &world.chain.paths)).unwrap();
    assert_eq!(world.b.add_remote(world.disk, &world.extents, None, &[world.a.address()]), socket);
    assert_eq!(fs::read_dir(world.b.dir.join("cache")).unwrap().count(), 2);
    world.compare(&socket);
}

#[test]
fn an_overlay_has_the_right_size_and_is_made_quickly() {
    let dir = tempfile::tempdir().unwrap();
    let templates = Templates::new(dir.path().join("templates"));
    for size in [64 * MIB, 10 << 30, 10 << 30] {
        let path = dir.path().join(format!("{}.qcow2", DiskId::random()));
        let begin = Instant::now();
        templates.create(&path, size).unwrap();
        eprintln!("overlay of {size} bytes: {:?}", begin.elapsed());
        let info = run(Command::new("qemu-img").args(["info", "--output=json"]).arg(&path));
        let info: serde_json::Value = serde_json::from_str(&info).unwrap();
        assert_eq!((&info["virtual-size"], &info["format"]), (&size.into(), &"qcow2".into()));
        assert_eq!(info["format-specific"]["data"]["extended-l2"], true);
        assert!(info["backing-filename"].is_null());
        run(Command::new("qemu-img").args(["check", "-q"]).arg(&path));
        assert!(templates.create(&path, size).is_err(), "it is there already");
    }
    let begin = Instant::now();
    for n in 0..100 {
        templates.create(&dir.path().join(n.to_string()), 10 << 30).unwrap();
    }
    eprintln!("100 overlays: {:?} each", begin.elapsed() / 100);
}

#[test]
fn figures() {
    let world = World::new(64 * MIB, 64 * MIB, 2, 91);
    let unknown = ExtentMap::uniform(64 * MIB, Kind::Data).unwrap();
    let socket = world.b.add_remote(world.disk, &unknown, None, &[world.a.address()]);
    let mut client = connect(&socket);
    client.read(0, &mut [0; 4096]).unwrap();
    let mut random = Random(17);
    let places: Vec<u64> = (0..300).map(|_| random.below(16384) * 4096).collect();
    let mut bytes = [0; 4096];
    for round in ["cold", "warm"] {
        let mut times: Vec<Duration> = places
            .iter()
            .map(|&at| {
                let begin = Instant::now();
                client.read(at, &mut bytes).unwrap();
                begin.elapsed()
            })
            .collect();
        times.sort();
        eprintln!("4 KiB {round}: p50 {:?} p99 {:?}", times[150], times[297]);
    }
    let begin = Instant::now();
    let mut all = vec![0; 32 << 20];
    client.read(0, &mut all).unwrap();
    client.read(32 << 20, &mut all).unwrap();
    eprintln!("64 MiB in two reads: {:?}", begin.elapsed());
    let begin = Instant::now();
    client.read(32 << 20, &mut all).unwrap();
    eprintln!("32 MiB again: {:?}", begin.elapsed());
}

#[test]
fn a_disk_over_one_of_another_host_goes_on_to_a_third_and_back() {
    let world = World::new(8 * MIB + 512, 6 * MIB + 1024, 2, 63);
    let here = world.golden();
    // What a clone on the second host wrote over the first one's disk.
    let socket = world.b.add_remote(world.disk, &world.extents, Some(&here), &[world.a.address()]);
    let mut truth = world.chain.truth.clone();
    let layer = world.dir.path().join("clone.qcow2");
    Templates::new(world.dir.path().join("templates")).create(&layer, 8 * MIB + 512).unwrap();
    let target = format!(
        r#"json:{{"driver":"qcow2","file":{{"driver":"file","filename":"{}"}},"backing":{{"driver":"nbd","export":"","server":{{"type":"unix","path":"{}"}}}}}}"#,
        layer.display(),
        socket.display()
    );
    let mut command = Command::new("qemu-io");
    for (at, len, pattern) in [(0, 2048, 7), (3 * MIB - 512, 70_144, 8), (8 * MIB, 512, 9)] {
        command.args(["-c", &format!("write -q -P {pattern} {at} {len}")]);
        truth[at as usize..][..len as usize].fill(pattern);
    }
    run(command.arg(target));
    let paths = ChainPaths { size: 8 * MIB + 512, golden: None, origin: Some(socket), layers: vec![layer] };
    let second = DiskId::random();
    world.b.ask(&Request::FrozenAdd { disk: second, chain: paths.clone() }).unwrap();
    let extents = world.b.extents(second);
    let bytes = |kind| (world.extents.bytes(kind), extents.bytes(kind));
    let (golden, data) = (bytes(Kind::Golden), bytes(Kind::Data));
    assert!(golden.1 > golden.0 / 2 && data.1 < data.0 + 128 * 1024, "what is golden stays so: {golden:?} {data:?}");

    let mut world = World { chain: support::Chain { truth, ..world.chain }, ..world };
    fs::write(&world.chain.raw, &world.chain.truth).unwrap();
    let c = world.process("c", world.family);
    for (host, golden) in [(&c, Some(here.as_path())), (&world.a, None)] {
        let socket = host.add_remote(second, &extents, golden, &[world.b.address()]);
        world.compare(&socket);
        world.convert(&socket);
    }
    assert_eq!(c.status(second).fetched_bytes, extents.bytes(Kind::Data));
    // It is on record; and without the origin's map all is right, too.
    world.b.restart();
    assert!(world.b.extents(second) == extents);
    let third = DiskId::random();
    let moved = world.dir.path().join("moved.nbd");
    fs::hard_link(paths.origin.as_ref().unwrap(), &moved).unwrap();
    let chain = ChainPaths { origin: Some(moved), ..paths.clone() };
    world.b.ask(&Request::FrozenAdd { disk: third, chain }).unwrap();
    let unknown = world.b.extents(third);
    assert_eq!(unknown.bytes(Kind::Golden), 0);
    let socket = c.add_remote(third, &unknown, Some(&here), &[world.b.address()]);
    world.compare(&socket);
    let gone = ChainPaths { origin: Some("/nowhere".into()), ..paths };
    assert_eq!(code(&world, &Request::FrozenAdd { disk: DiskId::random(), chain: gone }), "bad_request");
}
