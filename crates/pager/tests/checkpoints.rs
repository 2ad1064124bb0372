//! Checkpoints that do not go well: steps that fail, images removed meanwhile, no room for pages. No change is lost and
//! nothing half-made is left.

#![allow(clippy::unwrap_used, reason = "a failure ends the test")]

mod support;

use ramet_memory::{ByteSize, FamilyId, ImageId, LayerId, VmId};
use ramet_pager::{
    control::{ControlError, View},
    family::Family,
};
use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};
use support::{Filler, LIMIT, MemoryVm, Tmpfs, checkpoint, count, family, soon};

const PAGES: u64 = 512;

/// A family and a booted VM, whose own files lie elsewhere.
struct Setup {
    tmpfs: Tmpfs,
    elsewhere: tempfile::TempDir,
    family: Arc<Family>,
    dir: PathBuf,
    parent: MemoryVm,
}

fn memory() -> ByteSize {
    ByteSize(PAGES * 4096)
}

fn setup() -> Option<Setup> {
    let tmpfs = Tmpfs::mount("huge=never,size=32m")?;
    let elsewhere = tempfile::tempdir().unwrap();
    let id = FamilyId::random();
    let family = family(tmpfs.path(), id, None);
    let parent = MemoryVm::start(elsewhere.path(), memory(), "boot");
    parent.attach(&family, View::Anonymous);
    let dir = tmpfs.path().join(id.to_string());
    Some(Setup { tmpfs, elsewhere, family, dir, parent })
}

fn clone_of(family: &Arc<Family>, dir: &Path, image: ImageId) -> MemoryVm {
    let vm = MemoryVm::start(dir, memory(), "late");
    vm.attach(family, View::Image(image));
    vm
}

/// Why a VM is stalled.
fn stalled(family: &Family, vm: VmId) -> Option<String> {
    family.stats().vms.into_iter().find(|v| v.vm == vm)?.stalled
}

#[test]
fn a_commit_that_fails_loses_no_change() {
    let Some(mut t) = setup() else { return };
    t.parent.write(5, 1);
    t.parent.write(6, 6);
    checkpoint(&t.family, t.parent.id);
    for step in 0..3 {
        let value = 100 + step;
        t.parent.write(5, value);
        let (image, layer) = (ImageId::random(), LayerId::random());
        let kept = (count(&t.dir.join("layers")), count(&t.dir.join("images")));
        t.family.prepare(t.parent.id, image, layer).unwrap();
        // Late ones too.
        t.parent.write(7, value);
        let obstacle = match step {
            0 => t.dir.join("layers").join(layer.to_string()).join("owned"),
            1 => t.dir.join("images").join(format!("{image}.json")),
            _ => t.dir.join("vms").join(format!("{}.json", t.parent.id)),
        };
        let _ = fs::remove_file(&obstacle);
        fs::create_dir(&obstacle).unwrap();
        let err = t.family.commit(t.parent.id).unwrap_err();
        assert_eq!(err.code, "internal", "{err}");
        let _ = fs::remove_dir(&obstacle);
        // What a caller does that was told of a failure.
        assert_eq!(t.family.abort(t.parent.id).unwrap_err().code, "state");
        assert_eq!((count(&t.dir.join("layers")), count(&t.dir.join("images"))), kept, "{err}");
        assert_eq!(t.family.report_image(image).unwrap_err().code, "no_such_image");

        let image = checkpoint(&t.family, t.parent.id);
        let mut clone = clone_of(&t.family, t.elsewhere.path(), image);
        for (page, expected) in [(5, value), (6, 6), (7, value), (8, 0)] {
            assert_eq!(clone.read(page), expected.to_string(), "page {page} after {err}");
        }
        t.family.detach(clone.id).unwrap();
    }
}

#[test]
fn a_prepare_that_fails_leaves_no_layer() {
    let Some(mut t) = setup() else { return };
    t.parent.write(5, 1);
    let record = t.dir.join("vms").join(format!("{}.json", t.parent.id));
    fs::remove_file(&record).unwrap();
    fs::create_dir(&record).unwrap();
    let err = t.family.prepare(t.parent.id, ImageId::random(), LayerId::random()).unwrap_err();
    assert_eq!(err.code, "internal", "{err}");
    assert_eq!(count(&t.dir.join("layers")), 0);
    fs::remove_dir(&record).unwrap();
    let image = checkpoint(&t.family, t.parent.id);
    assert_eq!(clone_of(&t.family, t.elsewhere.path(), image).read(5), "1");
}

#[test]
fn the_layers_below_a_prepared_checkpoint_stay() {
    let Some(mut t) = setup() else { return };
    t.parent.write(5, 55);
    let first = checkpoint(&t.family, t.parent.id);
    t.family.wait_image(first).unwrap();
    t.parent.write(6, 66);
    let image = ImageId::random();
    t.family.prepare(t.parent.id, image, LayerId::random()).unwrap();
    t.family.drop_image(first).unwrap();
    t.family.commit(t.parent.id).unwrap();
    t.family.wait_image(image).unwrap();
    assert_eq!(count(&t.dir.join("layers")), 2);
    t.family.detach(t.parent.id).unwrap();
    let next = family(t.tmpfs.path(), t.dir.file_name().unwrap().to_str().unwrap().parse().unwrap(), None);
    next.restore().unwrap();
    let mut clone = clone_of(&next, t.elsewhere.path(), image);
    assert_eq!((clone.read(5), clone.read(6)), ("55".into(), "66".into()));
}

#[test]
fn a_checkpoint_given_up_after_its_base_was_removed_is_no_hindrance() {
    let Some(mut t) = setup() else { return };
    t.parent.write(5, 55);
    let first = checkpoint(&t.family, t.parent.id);
    t.family.wait_image(first).unwrap();
    t.parent.write(6, 66);
    t.family.prepare(t.parent.id, ImageId::random(), LayerId::random()).unwrap();
    t.family.drop_image(first).unwrap();
    t.family.abort(t.parent.id).unwrap();
    assert_eq!(count(&t.dir.join("layers")), 0);
    let image = checkpoint(&t.family, t.parent.id);
    assert_eq!(t.family.wait_image(image).unwrap().layers.len(), 1);
    let mut clone = clone_of(&t.family, t.elsewhere.path(), image);
    assert_eq!((clone.read(5), clone.read(6)), ("55".into(), "66".into()));
}

/// A checkpoint of all of memory for most of which there is no room, its copying stuck; page `i` holds `1000 + i`.
fn without_room(t: &mut Setup) -> (ImageId, Filler) {
    for page in 0..PAGES {
        t.parent.write(page, 1000 + page);
    }
    let image = ImageId::random();
    t.family.prepare(t.parent.id, image, LayerId::random()).unwrap();
    let filler = Filler::fill(t.tmpfs.path(), 40);
    t.family.commit(t.parent.id).unwrap();
    let reason = soon("the copying stops", || t.family.report_image(image).unwrap().stalled);
    assert!(reason.contains("No space left"), "{reason}");
    (image, filler)
}

#[test]
fn without_room_copying_waits_and_loses_nothing() {
    let Some(mut t) = setup() else { return };
    let (image, filler) = without_room(&mut t);
    // A VM takes some room itself, unless the copier is faster.
    let mut clone = MemoryVm::start(t.elsewhere.path(), memory(), "late");
    soon("a clone finds room", || {
        filler.give(3);
        t.family.attach(clone.id, &clone.shim_sock, clone.pid(), View::Image(image)).ok()
    });
    filler.take_all();
    // Neither may the parent overwrite what is not copied, nor a clone see anything else.
    t.parent.send(&format!("w {} 1", PAGES - 1));
    clone.send(&format!("r {}", PAGES - 2));
    assert_eq!(t.parent.answer_within(Duration::from_millis(900)), None);
    assert_eq!(clone.answer_within(Duration::from_millis(10)), None);
    for (vm, page) in [(t.parent.id, PAGES - 1), (clone.id, PAGES - 2)] {
        let reason = soon("the VM is stalled", || stalled(&t.family, vm));
        assert!(reason.contains(&format!("page {page} ")) && reason.contains("room"), "{reason}");
    }
    let report = t.family.report_image(image).unwrap();
    assert_eq!((report.complete, report.broken), (false, None));

    filler.empty();
    assert_eq!(t.parent.answer_within(LIMIT).as_deref(), Some("ok"));
    assert_eq!(clone.answer_within(LIMIT), Some((1000 + PAGES - 2).to_string()));
    let report = t.family.wait_image(image).unwrap();
    assert_eq!((report.complete, report.stalled), (true, None));
    for page in 0..PAGES {
        assert_eq!(clone.read(page), (1000 + page).to_string(), "page {page}");
    }
    assert_eq!(t.parent.read(PAGES - 1), "1");
    for vm in [t.parent.id, clone.id] {
        soon("the VM is not stalled any more", || stalled(&t.family, vm).is_none().then_some(()));
    }
}

#[test]
fn a_checkpoint_without_room_can_be_removed() {
    let Some(mut t) = setup() else { return };
    let (image, filler) = without_room(&mut t);
    t.parent.send(&format!("w {} 1", PAGES - 1));
    assert_eq!(t.parent.answer_within(Duration::from_millis(300)), None);
    // The next one waits for it, until it is given up.
    let (family, vm) = (t.family.clone(), t.parent.id);
    let next = std::thread::spawn(move || family.prepare(vm, ImageId::random(), LayerId::random()));
    soon("the next one can be given up", || t.family.abort(vm).ok());
    assert_eq!(next.join().unwrap().unwrap_err().code, "state");

    t.family.drop_image(image).unwrap();
    assert_eq!(t.parent.answer_within(LIMIT).as_deref(), Some("ok"));
    assert_eq!((count(&t.dir.join("layers")), count(&t.dir.join("images"))), (0, 0));
    // The parent is as it was, and can be checkpointed again where there is room.
    filler.empty();
    let image = checkpoint(&t.family, vm);
    let mut clone = clone_of(&t.family, t.elsewhere.path(), image);
    assert_eq!((clone.read(0), clone.read(PAGES - 1)), ("1000".into(), "1".into()));
}

#[test]
fn a_removed_checkpoint_gives_its_room_back() {
    let Some(mut t) = setup() else { return };
    let used = || {
        let fs = rustix::fs::statvfs(t.tmpfs.path()).unwrap();
        (fs.f_blocks - fs.f_bfree) * fs.f_frsize
    };
    // Those of the parent's own files that grow a little in the beginning are no matter.
    let empty = used() + memory().bytes() / 4;
    for value in 1..4 {
        for page in 0..PAGES {
            t.parent.write(page, value * 1000 + page);
        }
        let image = checkpoint(&t.family, t.parent.id);
        let mut clone = clone_of(&t.family, t.elsewhere.path(), image);
        assert_eq!(clone.read(7), (value * 1000 + 7).to_string());
        t.family.wait_image(image).unwrap();
        t.family.detach(clone.id).unwrap();
        clone.kill();
        assert!(used() >= empty + memory().bytes() / 2);
        t.family.drop_image(image).unwrap();
        soon("the room is there again", || (used() < empty).then_some(()));
    }
}

#[test]
fn a_base_that_breaks_while_it_is_waited_for_is_not_built_upon() {
    let Some(mut t) = setup() else { return };
    let (image, _filler) = without_room(&mut t);
    let (family, vm) = (t.family.clone(), t.parent.id);
    let next = std::thread::spawn(move || family.prepare(vm, ImageId::random(), LayerId::random()));
    std::thread::sleep(Duration::from_millis(100));
    assert!(!next.is_finished());
    t.parent.kill();
    let ControlError { code, message } = next.join().unwrap().unwrap_err();
    assert!(code == "broken" && message.contains("lost before it was copied"), "{code}: {message}");
    assert_eq!(count(&t.dir.join("layers")), 1);
    assert!(t.family.report_image(image).unwrap().broken.is_some());
}

#[test]
fn zeros_of_a_tracked_clone_are_counted_once() {
    let Some(mut t) = setup() else { return };
    t.parent.write(1, 1);
    let image = checkpoint(&t.family, t.parent.id);
    let mut clone = clone_of(&t.family, t.elsewhere.path(), image);
    checkpoint(&t.family, clone.id);
    for page in 100..164 {
        assert_eq!(clone.read(page), "0");
    }
    // The last one is counted after its waiter is woken.
    let counted = soon("all are counted", || {
        let report = t.family.stats().vms.into_iter().find(|v| v.vm == clone.id)?;
        (report.zero_pages >= 64).then_some((report.zero_pages, report.missing_faults))
    });
    assert_eq!(counted, (64, 64));
}

#[test]
fn descriptions_and_records_may_be_written_at_once() {
    let Some(mut t) = setup() else { return };
    for round in 0..20u64 {
        for page in (0..PAGES).step_by(2) {
            t.parent.write(page, round + 1);
        }
        let image = checkpoint(&t.family, t.parent.id);
        for _ in 0..50 {
            t.family.write_spec(image).unwrap();
        }
        t.family.wait_image(image).unwrap();
        // Once it has been waited for, the record says so.
        let json = fs::read(t.dir.join("images").join(format!("{image}.json"))).unwrap();
        let record: serde_json::Value = serde_json::from_slice(&json).unwrap();
        assert_eq!(record["parent"], serde_json::Value::Null);
        assert_eq!(count(&t.dir.join("images")), 2 * (round as usize + 1));
    }
}
