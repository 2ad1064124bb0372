//! Real QEMU under TCG with a copy-on-write disk: frozen with the devices, opened by a clone, its layers swapped.
#![allow(clippy::unwrap_used, reason = "a failure ends the test")]

mod support;

use ramet_memory::ByteSize;
use ramet_vmm::{Accel, Base, Boot, DiskChain, LayerSwap, MachineSpec, NextOverlays, Vmm, VmmError};
use std::{
    os::unix::fs::{FileExt, PermissionsExt},
    path::{Path, PathBuf},
    process::Command,
    sync::atomic::{AtomicBool, Ordering},
};
use support::{copy_memory, dir, vmm};

const SIZE: u64 = 16 << 20;

fn spec() -> MachineSpec {
    MachineSpec { disk: Some(ByteSize(SIZE)), ..MachineSpec::new(ByteSize::mib(32), 1, Accel::Tcg) }
}

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// An empty overlay that QEMU's user may write to.
fn overlay(dir: &Path, name: &str) -> PathBuf {
    let path = dir.join(format!("{name}.qcow2"));
    run("qemu-img", &["create", "-q", "-f", "qcow2", path.to_str().unwrap(), &SIZE.to_string()]);
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o666)).unwrap();
    path
}

#[tokio::test(flavor = "multi_thread")]
async fn a_disk_is_frozen_with_the_devices_and_opened_by_a_clone() {
    let vmm = vmm();
    let dir = dir();
    // Where QEMU's user can't come to.
    let hidden = dir.path().join("hidden");
    std::fs::create_dir(&hidden).unwrap();
    let golden = hidden.join("golden");
    std::fs::write(&golden, vec![7u8; SIZE as usize]).unwrap();
    std::fs::set_permissions(&golden, std::fs::Permissions::from_mode(0o444)).unwrap();
    let kernel = dir.path().join("kernel");
    std::fs::write(&kernel, vec![0; 8192]).unwrap();
    let base = Base::Raw(golden);

    let first = overlay(dir.path(), "first");
    let boot = Boot::Kernel { kernel, initrd: None, cmdline: String::new() };
    let parent = vmm.launch(&spec(), boot, &dir.path().join("parent")).await.unwrap();
    let disk = DiskChain { base: base.clone(), layers: vec![], active: first.clone() };
    parent.attach_disk(&disk).await.unwrap();
    parent.cont().await.unwrap();
    assert_eq!(parent.disk_node().await.unwrap(), DiskChain::node(&first));

    let mut layers = vec![first];
    for round in 0..3 {
        let next = overlay(dir.path(), &format!("next{round}"));
        let second = overlay(dir.path(), &format!("second{round}"));
        let saved = parent.save_state(Some(NextOverlays { first: &next, second: &second })).await.unwrap();
        assert!(!saved.second_overlay, "its firmware writes nothing");
        assert_eq!(parent.disk_node().await.unwrap(), DiskChain::node(&next), "it writes to the new one");
        let clone = vmm.launch(&spec(), Boot::Incoming, &dir.path().join(format!("clone{round}"))).await.unwrap();
        copy_memory(&*parent, &*clone, &dir.path().join("memory"));
        parent.cont().await.unwrap();
        assert_eq!(parent.query_status().await.unwrap(), "running");

        let own = overlay(dir.path(), &format!("own{round}"));
        let disk = DiskChain { base: base.clone(), layers: layers.clone(), active: own };
        clone.attach_disk(&disk).await.unwrap();
        clone.load_state(&saved.bytes).await.unwrap();
        clone.cont().await.unwrap();
        assert_eq!(clone.query_status().await.unwrap(), "running");
        clone.kill().await.unwrap();
        layers.push(next);
    }
    // An overlay that can't be opened: no checkpoint, and the VM goes on with what it has.
    let before = parent.disk_node().await.unwrap();
    let (missing, second) = (dir.path().join("missing.qcow2"), overlay(dir.path(), "unused"));
    parent.save_state(Some(NextOverlays { first: &missing, second: &second })).await.unwrap_err();
    assert_eq!(parent.disk_node().await.unwrap(), before);
    assert_eq!(parent.query_status().await.unwrap(), "running");

    // One layer in the place of the two below the uppermost; twice, as after a daemon that died in the middle.
    let swap = |below: Option<&PathBuf>, old: &[PathBuf], merged: &Path, above: &Path| LayerSwap {
        below: below.cloned(),
        old: old.to_vec(),
        merged: merged.to_owned(),
        above: above.to_owned(),
    };
    let merged = overlay(dir.path(), "merged");
    parent.swap_layers(&swap(None, &layers[..2], &merged, &layers[2])).await.unwrap();
    parent.swap_layers(&swap(None, &layers[..2], &merged, &layers[2])).await.unwrap();
    assert_eq!(parent.query_status().await.unwrap(), "running");
    // What can't be opened, or is not above, changes nothing.
    let missing = dir.path().join("missing.qcow2");
    for wrong in [swap(None, &layers[..2], &missing, &layers[2]), swap(None, &[], &layers[0], &missing)] {
        let err = parent.swap_layers(&wrong).await.unwrap_err();
        assert!(matches!(err, VmmError::Refused { .. }), "{err}");
    }
    // In the middle of a chain.
    let next = overlay(dir.path(), "next");
    parent.save_state(Some(NextOverlays { first: &next, second: &second })).await.unwrap();
    parent.cont().await.unwrap();
    let again = overlay(dir.path(), "again");
    parent.swap_layers(&swap(Some(&merged), &layers[2..3], &again, &layers[3])).await.unwrap();
    assert_eq!(parent.disk_node().await.unwrap(), DiskChain::node(&next), "the active overlay stays");
    let next = overlay(dir.path(), "last");
    parent.save_state(Some(NextOverlays { first: &next, second: &second })).await.unwrap();
    parent.cont().await.unwrap();
    parent.kill().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_until_the_cpus_stand_still_is_frozen_with_them() {
    let (vmm, dir) = (vmm(), dir());
    let kernel = dir.path().join("kernel");
    std::fs::write(&kernel, vec![0; 8192]).unwrap();
    let active = overlay(dir.path(), "active");
    let boot = Boot::Kernel { kernel, initrd: None, cmdline: String::new() };
    let parent = vmm.launch(&spec(), boot, &dir.path().join("parent")).await.unwrap();
    let disk = DiskChain { base: Base::None, layers: vec![], active: active.clone() };
    parent.attach_disk(&disk).await.unwrap();
    parent.cont().await.unwrap();

    // The firmware writes nothing, so somebody else does: the file's first byte as it is, which does no harm.
    let (first, second) = (overlay(dir.path(), "first"), overlay(dir.path(), "second"));
    let saved = {
        let (file, done) = (std::fs::File::options().write(true).open(&first).unwrap(), AtomicBool::new(false));
        let done = &done;
        std::thread::scope(|scope| {
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    file.write_all_at(b"Q", 0).unwrap();
                }
            });
            let saving = parent.save_state(Some(NextOverlays { first: &first, second: &second }));
            let saved = tokio::task::block_in_place(|| tokio::runtime::Handle::current().block_on(saving));
            done.store(true, Ordering::Relaxed);
            saved.unwrap()
        })
    };
    assert!(saved.second_overlay);
    assert_eq!(parent.disk_node().await.unwrap(), DiskChain::node(&second));

    let clone = vmm.launch(&spec(), Boot::Incoming, &dir.path().join("clone")).await.unwrap();
    copy_memory(&*parent, &*clone, &dir.path().join("memory"));
    parent.cont().await.unwrap();
    let disk = DiskChain { base: Base::None, layers: vec![active, first], active: overlay(dir.path(), "own") };
    clone.attach_disk(&disk).await.unwrap();
    clone.load_state(&saved.bytes).await.unwrap();
    clone.cont().await.unwrap();
    for vm in [parent, clone] {
        assert_eq!(vm.query_status().await.unwrap(), "running");
        vm.kill().await.unwrap();
    }
}
