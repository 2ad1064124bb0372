//! A disk that is frozen while its VM's QEMU has it open and goes on writing, and a clone's overlay over our NBD server.
#![allow(clippy::unwrap_used, reason = "a failure ends the test")]

mod support;

use ramet_disk::{ChainPaths, DiskId, overlay::Templates};
use serde_json::{Value, json};
use std::{
    fs,
    io::{BufRead, BufReader, Lines, Write},
    path::Path,
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
};
use support::{World, run};

const MIB: u64 = 1 << 20;

/// Block nodes as a VM has them, and their monitor; something writes through an NBD export instead of a guest.
struct Parent {
    child: Child,
    monitor: ChildStdin,
    answers: Lines<BufReader<ChildStdout>>,
}

impl Parent {
    fn start() -> Self {
        let mut child = Command::new("qemu-storage-daemon")
            .args(["--chardev", "stdio,id=m", "--monitor", "chardev=m"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let (monitor, answers) = (child.stdin.take().unwrap(), BufReader::new(child.stdout.take().unwrap()).lines());
        let mut parent = Self { child, monitor, answers };
        parent.ask("qmp_capabilities", json!({}));
        parent
    }

    fn ask(&mut self, command: &str, arguments: Value) {
        writeln!(self.monitor, "{}", json!({"execute": command, "arguments": arguments})).unwrap();
        loop {
            let answer: Value = serde_json::from_str(&self.answers.next().unwrap().unwrap()).unwrap();
            assert!(answer.get("error").is_none(), "{command}: {answer}");
            if answer.get("return").is_some() {
                return;
            }
        }
    }

    /// Adds an overlay as the design says.
    fn add(&mut self, node: &str, path: &Path, backing: Value) {
        self.ask(
            "blockdev-add",
            json!({"driver": "file", "node-name": format!("{node}-f"), "filename": path, "drop-cache": false}),
        );
        let file = format!("{node}-f");
        self.ask(
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": node, "file": file, "backing": backing, "discard": "unmap", "cache": {"no-flush": true}}),
        );
    }
}

impl Drop for Parent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn write(target: &str, truth: &mut [u8], writes: &[(u64, u64, u8)]) {
    let mut command = Command::new("qemu-io");
    for &(at, len, pattern) in writes {
        command.args(["-c", &format!("write -q -P {pattern} {at} {len}")]);
        truth[at as usize..][..len as usize].fill(pattern);
    }
    run(command.arg(target));
}

#[test]
fn a_frozen_disk_is_right_while_its_vm_goes_on_and_a_clone_writes_over_it() {
    let mut world = World::new(8 * MIB, 8 * MIB, 1, 41);
    let size = 8 * MIB;
    let dir = world.dir.path().to_owned();
    let templates = Templates::new(dir.join("templates"));
    let paths = [dir.join("r0.qcow2"), dir.join("r1.qcow2"), dir.join("r2.qcow2")];
    paths.iter().for_each(|path| templates.create(path, size).unwrap());
    let mut parent = Parent::start();
    let golden = world.chain.paths.golden.clone().unwrap();
    parent.ask("blockdev-add", json!({"driver": "raw", "node-name": "g", "read-only": true, "file": {"driver": "file", "filename": golden, "read-only": true, "drop-cache": false}}));
    let mut truth = fs::read(&golden).unwrap();
    parent.add("r0", &paths[0], json!("g"));
    let socket = dir.join("parent.sock");
    parent.ask("nbd-server-start", json!({"addr": {"type": "unix", "data": {"path": socket}}}));
    parent.ask("block-export-add", json!({"type": "nbd", "id": "e", "node-name": "r0", "name": "d", "writable": true}));
    let url = format!("nbd+unix:///d?socket={}", socket.display());
    write(&url, &mut truth, &[(0, 4096, 1), (399_872, 70_144, 2), (5 << 20, 300_032, 3)]);

    // Two checkpoints; what is written later is not in them.
    let mut frozen = Vec::new();
    for number in [0, 1] {
        let (below, above) = (format!("r{number}"), format!("r{}", number + 1));
        parent.add(&above, &paths[number + 1], Value::Null);
        parent.ask("blockdev-snapshot", json!({"node": below, "overlay": above}));
        let chain = ChainPaths { size, golden: Some(golden.clone()), origin: None, layers: paths[..=number].to_vec() };
        let disk = DiskId::random();
        world.a.ask(&ramet_disk::control::Request::FrozenAdd { disk, chain }).unwrap();
        let extents = world.a.extents(disk);
        let served = world.b.add_remote(disk, &extents, Some(&golden), &[world.a.address()]);
        frozen.push((served, truth.clone()));
        write(&url, &mut truth, &[(8192, 512, 9 + number as u8), (200_192, 66_048, 4), (6 << 20, 4096 << number, 5)]);
    }
    for (served, truth) in &frozen {
        world.chain.truth.clone_from(truth);
        fs::write(&world.chain.raw, truth).unwrap();
        world.compare(served);
        world.convert(served);
    }

    // A clone on the other host.
    let (served, mut truth) = frozen.pop().unwrap();
    let active = dir.join("clone.qcow2");
    templates.create(&active, size).unwrap();
    let chain = json!({
        "driver": "qcow2", "file": {"driver": "file", "filename": active},
        "backing": {"driver": "raw", "read-only": true, "file": {"driver": "nbd", "export": "", "server": {"type": "unix", "path": served}}},
    });
    let target = format!("json:{chain}");
    write(&target, &mut truth, &[(512, 512, 7), (8192, 65536, 8), (3 << 20, 5_120, 9)]);
    fs::write(&world.chain.raw, &truth).unwrap();
    run(Command::new("qemu-img").args(["compare", "-F", "raw", &target]).arg(&world.chain.raw));
}

#[test]
fn a_record_that_is_damaged_in_part_costs_that_part() {
    let mut world = World::new(2 * MIB, 2 * MIB, 1, 42);
    let socket = world.b.add_remote(world.disk, &world.extents, None, &[world.a.address()]);
    world.b.kill();
    let path = world.b.dir.join("record.json");
    let mut record: Vec<Value> = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let mut bad = record[0].clone();
    bad["remote"]["extents"] = json!("UlhNMQ==");
    record.insert(0, bad);
    record.insert(0, json!("rubbish"));
    fs::write(&path, serde_json::to_vec(&record).unwrap()).unwrap();
    // Half a cache: it is made anew.
    let cache = fs::read_dir(world.b.dir.join("cache"))
        .unwrap()
        .find(|e| e.as_ref().unwrap().path().extension().is_some_and(|e| e == "pages"));
    fs::write(cache.unwrap().unwrap().path(), b"short").unwrap();
    world.b.restart();
    world.compare(&socket);
    fs::write(&path, b"{").unwrap();
    world.b.restart();
    assert!(!socket.exists());
    assert_eq!(world.b.add_remote(world.disk, &world.extents, None, &[world.a.address()]), socket);
    world.compare(&socket);
}
