//! A pager is killed while VMs fault and while a checkpoint is being copied; the next one takes over.

#![allow(clippy::unwrap_used, reason = "a failure ends the test")]

mod support;

use ramet_memory::{ByteSize, FamilyId, ImageId, LayerId, VmId};
use ramet_pager::control::{ControlError, Request, Response, StatsReport, View};
use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command},
    time::{Duration, Instant},
};
use support::{Host, LIMIT, MemoryVm, Tmpfs, built, certificates, checkpoint, count, soon};

struct Pager {
    child: Child,
    control: PathBuf,
}

impl Pager {
    fn start(dir: &Path, id: FamilyId) -> Self {
        Self::start_with(dir, id, None)
    }

    /// With an identity it reaches other hosts.
    fn start_with(dir: &Path, id: FamilyId, tls: Option<&Path>) -> Self {
        let family = dir.join(id.to_string());
        fs::create_dir_all(&family).unwrap();
        let control = dir.join("control");
        let child = Command::new(built("ramet-pager"))
            .arg("--family-dir")
            .arg(&family)
            .arg("--control")
            .arg(&control)
            .args(tls.into_iter().flat_map(|dir| [Path::new("--tls"), dir]))
            .args(["--host", "host"])
            .spawn()
            .unwrap();
        let pager = Self { child, control };
        let deadline = Instant::now() + LIMIT;
        while UnixStream::connect(&pager.control).is_err() {
            assert!(Instant::now() < deadline, "the pager did not start");
            std::thread::sleep(Duration::from_millis(5));
        }
        pager
    }

    fn ask(&self, request: &Request) -> Response {
        let mut stream = UnixStream::connect(&self.control).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        writeln!(stream, "{}", serde_json::to_string(request).unwrap()).unwrap();
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    fn done(&self, request: &Request) -> serde_json::Value {
        match self.ask(request) {
            Response::Ok(value) => value,
            Response::Error(err) => panic!("{request:?}: {err}"),
        }
    }

    fn attach(&self, vm: &MemoryVm, view: View) {
        self.done(&Request::Attach { vm: vm.id, shim_sock: vm.shim_sock.clone(), pid: vm.pid(), view });
    }

    fn checkpoint(&self, vm: VmId) -> ImageId {
        let image = ImageId::random();
        self.done(&Request::CheckpointPrepare { vm, image, layer: LayerId::random() });
        self.done(&Request::CheckpointCommit { vm });
        image
    }

    fn refused(&self, request: &Request) -> ControlError {
        match self.ask(request) {
            Response::Ok(value) => panic!("{request:?}: {value}"),
            Response::Error(err) => err,
        }
    }

    fn stats(&self) -> StatsReport {
        serde_json::from_value(self.done(&Request::Stats)).unwrap()
    }

    /// Why a VM is stalled.
    fn stalled(&self, vm: VmId) -> Option<String> {
        self.stats().vms.into_iter().find(|v| v.vm == vm).expect("the VM is reported").stalled
    }

    /// kill -9.
    fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn vms_wait_for_the_next_pager_and_read_right_bytes() {
    const PAGES: u64 = 16 << 10;
    let Some(tmpfs) = Tmpfs::mount("huge=never") else { return };
    let memory = ByteSize(PAGES * 4096);
    let id = FamilyId::random();
    let mut pager = Pager::start(tmpfs.path(), id);
    let mut parent = MemoryVm::start(tmpfs.path(), memory, "boot");
    pager.attach(&parent, View::Anonymous);
    for page in 0..PAGES {
        parent.write(page, page ^ 0x55);
    }
    // Killed with most of the pages still in the parent's memory.
    let image = pager.checkpoint(parent.id);
    let mut early = MemoryVm::start(tmpfs.path(), memory, "late");
    pager.attach(&early, View::Image(image));
    pager.kill();

    // A write of the parent and a read of the clone wait: neither may see or make a wrong byte.
    parent.send(&format!("w {} 1", PAGES - 1));
    early.send(&format!("r {}", PAGES - 2));
    let parent_waited = parent.answer_within(Duration::from_millis(300)).is_none();
    let clone_waited = early.answer_within(Duration::from_millis(300)).is_none();
    let pager = Pager::start(tmpfs.path(), id);
    if parent_waited {
        assert_eq!(parent.answer_within(LIMIT).as_deref(), Some("ok"));
    }
    if clone_waited {
        assert_eq!(early.answer_within(LIMIT).as_deref(), Some(&*((PAGES - 2) ^ 0x55).to_string()));
    }
    parent.write(7, 7);
    for page in 0..PAGES {
        assert_eq!(early.read(page), (page ^ 0x55).to_string(), "page {page}");
    }
    pager.done(&Request::ImageWait { image });

    // The parent's changes are still tracked: the next layer holds what changed, and little else.
    let next = pager.checkpoint(parent.id);
    let report = pager.done(&Request::ImageWait { image: next });
    let owned = report["layers"][1]["owned_pages"].as_u64().unwrap();
    assert!((1..1000).contains(&owned), "{report}");
    let mut clone = MemoryVm::start(tmpfs.path(), memory, "late");
    pager.attach(&clone, View::Image(next));
    assert_eq!(clone.read(PAGES - 1), "1");
    assert_eq!(clone.read(7), "7");
    assert_eq!(clone.read(8), (8 ^ 0x55u64).to_string());
}

#[test]
fn a_prepared_checkpoint_dies_with_its_pager_and_the_next_one_is_whole() {
    const PAGES: u64 = 512;
    let Some(tmpfs) = Tmpfs::mount("huge=never") else { return };
    let memory = ByteSize(PAGES * 4096);
    let id = FamilyId::random();
    let mut pager = Pager::start(tmpfs.path(), id);
    let mut parent = MemoryVm::start(tmpfs.path(), memory, "boot");
    pager.attach(&parent, View::Anonymous);
    parent.write(1, 11);
    pager.checkpoint(parent.id);
    parent.write(2, 22);
    let image = ImageId::random();
    pager.done(&Request::CheckpointPrepare { vm: parent.id, image, layer: LayerId::random() });
    pager.kill();
    let pager = Pager::start(tmpfs.path(), id);
    assert!(matches!(pager.ask(&Request::CheckpointCommit { vm: parent.id }), Response::Error(e) if e.code == "state"));
    parent.write(3, 33);
    let image = pager.checkpoint(parent.id);
    let mut clone = MemoryVm::start(tmpfs.path(), memory, "late");
    pager.attach(&clone, View::Image(image));
    for (page, value) in [(1, 11), (2, 22), (3, 33), (4, 0)] {
        assert_eq!(clone.read(page), value.to_string());
    }
    let layers = fs::read_dir(tmpfs.path().join(id.to_string()).join("layers")).unwrap().count();
    assert_eq!(layers, 2, "the layer of the lost checkpoint is still there");
}

#[test]
fn a_damaged_record_costs_its_own_vms_only() {
    const PAGES: u64 = 512;
    let Some(tmpfs) = Tmpfs::mount("huge=never") else { return };
    let memory = ByteSize(PAGES * 4096);
    let id = FamilyId::random();
    let dir = tmpfs.path().join(id.to_string());
    let mut pager = Pager::start(tmpfs.path(), id);
    let mut parent = MemoryVm::start(tmpfs.path(), memory, "boot");
    let other = MemoryVm::start(tmpfs.path(), memory, "boot");
    pager.attach(&parent, View::Anonymous);
    pager.attach(&other, View::Anonymous);
    let mut images = Vec::new();
    let mut clones = Vec::new();
    for value in 1..=2 {
        parent.write(1, value);
        parent.write(value, value);
        let image = pager.checkpoint(parent.id);
        pager.done(&Request::ImageWait { image });
        let clone = MemoryVm::start(tmpfs.path(), memory, "late");
        pager.attach(&clone, View::Image(image));
        images.push(image);
        clones.push(clone);
    }
    pager.kill();
    fs::write(dir.join("images").join(format!("{}.json", images[0])), "{ not").unwrap();
    fs::write(dir.join("vms").join(format!("{}.json", other.id)), "").unwrap();
    // Nor do files that belong to nothing.
    fs::write(dir.join("layers").join("stray"), "").unwrap();
    fs::create_dir_all(dir.join("images").join("x.unfinished")).unwrap();

    let mut pager = Pager::start(tmpfs.path(), id);
    let (damaged, stuck) = (images[0], clones[0].id);
    let report = pager.stats().images.into_iter().find(|i| i.image == damaged).expect("the image is reported");
    assert!(report.broken.as_ref().is_some_and(|r| r.contains("can't be read")), "{report:?}");
    assert_eq!((report.complete, &report.vms[..]), (false, &[stuck][..]));
    for vm in [stuck, other.id] {
        let reason = pager.stalled(vm).expect("the VM is stalled");
        assert!(reason.contains("can't be read"), "{reason}");
    }
    clones[0].send("r 300");
    assert_eq!(clones[0].answer_within(Duration::from_millis(300)), None);
    // All others go on.
    for (page, value) in [(1, 2), (2, 2), (300, 0)] {
        assert_eq!(clones[1].read(page), value.to_string());
    }
    parent.write(3, 3);
    let next = pager.checkpoint(parent.id);
    pager.done(&Request::ImageWait { image: next });
    let mut clone = MemoryVm::start(tmpfs.path(), memory, "late");
    pager.attach(&clone, View::Image(next));
    assert_eq!((clone.read(1), clone.read(3)), ("2".into(), "3".into()));
    // What is damaged is refused, with the reason, and can be removed.
    let view = View::Image(damaged);
    let attach = Request::Attach { vm: VmId::random(), shim_sock: clone.shim_sock.clone(), pid: clone.pid(), view };
    assert_eq!(pager.refused(&attach).code, "broken");
    assert_eq!(pager.refused(&Request::ImageDrop { image: damaged }).code, "in_use");
    let prepare = Request::CheckpointPrepare { vm: stuck, image: ImageId::random(), layer: LayerId::random() };
    assert_eq!(pager.refused(&prepare).code, "broken");
    for vm in [stuck, other.id] {
        pager.done(&Request::Detach { vm });
    }
    pager.done(&Request::ImageDrop { image: damaged });
    pager.kill();
    let pager = Pager::start(tmpfs.path(), id);
    let stats = pager.stats();
    assert!(stats.images.iter().all(|i| i.broken.is_none()) && stats.images.len() == 2, "{stats:?}");
    assert_eq!((stats.vms.len(), count(&dir.join("layers"))), (3, 3));
    assert_eq!((clones[1].read(1), clone.read(3)), ("2".into(), "3".into()));
}

#[test]
fn a_damaged_image_of_another_host_can_be_added_again() {
    const PAGES: u64 = 512;
    let Some(tmpfs) = Tmpfs::mount("huge=never") else { return };
    let memory = ByteSize(PAGES * 4096);
    let id = FamilyId::random();
    let certificate = tmpfs.path().join("tls");
    let tls = certificates(&certificate);
    let home = Host::start(&tmpfs.path().join("home"), id, &tls, "127.0.0.1:0");
    let mut parent = MemoryVm::start(tmpfs.path(), memory, "boot");
    parent.attach(&home.family, View::Anonymous);
    for page in 0..100 {
        parent.write(page, page * 3);
    }
    let image = checkpoint(&home.family, parent.id);
    home.family.wait_image(image).unwrap();
    let add = Request::ImageAdd { image, spec_path: home.family.write_spec(image).unwrap(), source: home.address() };

    let mut pager = Pager::start_with(tmpfs.path(), id, Some(&certificate));
    pager.done(&add);
    let mut clone = MemoryVm::start(tmpfs.path(), memory, "late");
    pager.attach(&clone, View::Image(image));
    assert_eq!(clone.read(20), "60");
    let layers = tmpfs.path().join(id.to_string()).join("layers");
    let states = layers.join(pager.stats().images[0].layers[0].id.to_string()).join("states");
    pager.kill();
    // Its layer is damaged, not its record: that it is added again does not help before the layer is mended.
    let good = fs::read(&states).unwrap();
    fs::write(&states, "").unwrap();
    let pager = Pager::start_with(tmpfs.path(), id, Some(&certificate));
    let reason = pager.stalled(clone.id).expect("the VM is stalled");
    assert!(reason.contains("truncated"), "{reason}");
    clone.send("r 50");
    let err = pager.refused(&add);
    assert!(err.code == "internal" && err.message.contains("truncated"), "{err}");
    assert_eq!(clone.answer_within(Duration::from_millis(300)), None);
    fs::write(&states, good).unwrap();
    pager.done(&add);
    assert_eq!(clone.answer_within(LIMIT).as_deref(), Some("150"));
    soon("the VM is not stalled", || pager.stalled(clone.id).is_none().then_some(()));
    assert_eq!(clone.read(20), "60");
}

#[test]
fn dirty_bits_that_are_lost_are_made_up_for() {
    const PAGES: u64 = 512;
    let Some(tmpfs) = Tmpfs::mount("huge=never") else { return };
    let memory = ByteSize(PAGES * 4096);
    let id = FamilyId::random();
    let mut pager = Pager::start(tmpfs.path(), id);
    let mut parent = MemoryVm::start(tmpfs.path(), memory, "boot");
    pager.attach(&parent, View::Anonymous);
    parent.write(1, 1);
    let image = pager.checkpoint(parent.id);
    pager.done(&Request::ImageWait { image });
    parent.write(1, 2);
    pager.kill();
    let bits = tmpfs.path().join(id.to_string()).join("vms").join(format!("{}.dirty", parent.id));
    fs::remove_file(bits).unwrap();
    let pager = Pager::start(tmpfs.path(), id);
    let image = pager.checkpoint(parent.id);
    let mut clone = MemoryVm::start(tmpfs.path(), memory, "late");
    pager.attach(&clone, View::Image(image));
    assert_eq!(clone.read(1), "2");
}

#[test]
fn huge_pages_are_refused_at_start() {
    let Some(tmpfs) = Tmpfs::mount("huge=always") else { return };
    let family = tmpfs.path().join(FamilyId::random().to_string());
    fs::create_dir(&family).unwrap();
    let out = Command::new(built("ramet-pager"))
        .arg("--family-dir")
        .arg(&family)
        .arg("--control")
        .arg(tmpfs.path().join("c"))
        .output()
        .unwrap();
    assert!(!out.status.success());
    let text = String::from_utf8_lossy(&out.stderr);
    assert!(text.contains("huge=never"), "{text}");
}
