//! A pager is killed while VMs fault and while a checkpoint is being copied; the next one takes over.

#![allow(clippy::unwrap_used, reason = "a failure ends the test")]

mod support;

use ramet_memory::{ByteSize, FamilyId, ImageId, LayerId, VmId};
use ramet_pager::control::{Request, Response, View};
use std::{
    fs,
    io::{BufRead, BufReader, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::{Child, Command},
    time::{Duration, Instant},
};
use support::{LIMIT, MemoryVm, Tmpfs, built};

struct Pager {
    child: Child,
    control: PathBuf,
}

impl Pager {
    fn start(dir: &Path, id: FamilyId) -> Self {
        let family = dir.join(id.to_string());
        fs::create_dir_all(&family).unwrap();
        let control = dir.join("control");
        let child = Command::new(built("ramet-pager"))
            .arg("--family-dir")
            .arg(&family)
            .arg("--control")
            .arg(&control)
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
