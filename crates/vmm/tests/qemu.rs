//! Real QEMU under TCG: started, saved, loaded, found again, killed.
#![allow(clippy::unwrap_used, reason = "a failure ends the test")]

mod support;

use ramet_memory::ByteSize;
use ramet_vmm::{Accel, Boot, MachineSpec, Pool, PoolConfig, Qemu, VmProcess, Vmm, VmmConfig, VmmError};
use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::Duration,
};
use support::{copy_memory, dir, vmm};

/// Longer than any QEMU takes to answer.
const LIMIT: Duration = Duration::from_secs(30);

/// `None`, said loudly, where QEMU is missing.
fn qemu() -> Option<Arc<dyn Vmm>> {
    if Command::new("qemu-system-x86_64").arg("--version").output().is_err() {
        eprintln!("SKIPPED: QEMU is not installed");
        return None;
    }
    Some(Arc::new(vmm()))
}

fn spec() -> MachineSpec {
    MachineSpec::new(ByteSize::mib(32), 1, Accel::Tcg)
}

/// A machine without a guest: it runs its firmware.
async fn firmware(vmm: &Arc<dyn Vmm>, dir: &Path) -> Box<dyn VmProcess> {
    let vm = vmm.launch(&spec(), Boot::Incoming, &dir.join("member")).await.unwrap();
    vm.kill().await.unwrap();
    // Any file does as a kernel that the firmware then refuses.
    let kernel = dir.join("kernel");
    let mut header = vec![0u8; 8192];
    header[510..512].copy_from_slice(&[0x55, 0xaa]);
    header[514..518].copy_from_slice(b"HdrS");
    header[518..520].copy_from_slice(&[0x0c, 0x02]);
    header[497] = 4;
    header[529] = 1;
    std::fs::write(&kernel, header).unwrap();
    let boot = Boot::Kernel { kernel, initrd: None, cmdline: String::new() };
    let vm = vmm.launch(&spec(), boot, &dir.join("parent")).await.unwrap();
    vm.cont().await.unwrap();
    vm
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_is_saved_again_and_again_and_loads() {
    let Some(vmm) = qemu() else { return };
    let dir = dir();
    let parent = firmware(&vmm, dir.path()).await;
    for _ in 0..3 {
        let saved = parent.save_state(None).await.unwrap();
        assert!(
            (10_000..2_000_000).contains(&saved.bytes.len()),
            "{} bytes: memory must not be in it",
            saved.bytes.len()
        );
        assert_eq!(parent.query_status().await.unwrap(), "paused");
        let clone = vmm.launch(&spec(), Boot::Incoming, &dir.path().join("clone")).await.unwrap();
        copy_memory(&*parent, &*clone, &dir.path().join("memory"));
        parent.cont().await.unwrap();
        assert_eq!(parent.query_status().await.unwrap(), "running");
        clone.load_state(&saved.bytes).await.unwrap();
        assert_eq!(clone.query_status().await.unwrap(), "paused");
        let second = clone.load_state(&saved.bytes).await.unwrap_err().to_string();
        assert!(second.contains("does not wait"), "{second}");
        clone.kill().await.unwrap();
        let hasty = vmm.launch(&spec(), Boot::Incoming, &dir.path().join("hasty")).await.unwrap();
        copy_memory(&*parent, &*hasty, &dir.path().join("memory"));
        hasty.start_when_loaded().await.unwrap();
        assert_eq!(hasty.query_status().await.unwrap(), "inmigrate");
        hasty.load_state(&saved.bytes).await.unwrap();
        assert_eq!(hasty.query_status().await.unwrap(), "running");
        hasty.kill().await.unwrap();
    }
    parent.kill().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_broken_state_is_refused_with_the_reason() {
    let Some(vmm) = qemu() else { return };
    let dir = dir();
    let clone = vmm.launch(&spec(), Boot::Incoming, &dir.path().join("clone")).await.unwrap();
    let err = clone.load_state(b"this is no state").await.unwrap_err().to_string();
    assert!(err.contains("load"), "{err}");
    clone.kill().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_outlives_its_daemon_and_is_found_again() {
    let Some(vmm) = qemu() else { return };
    let dir = dir();
    let parent = firmware(&vmm, dir.path()).await;
    let (pid, place) = (parent.pid(), parent.paths().dir.clone());
    drop(parent);
    let again = vmm.reattach(&place, LIMIT).await.unwrap();
    assert_eq!(again.pid(), pid);
    assert_eq!(again.query_status().await.unwrap(), "running");
    again.kill().await.unwrap();
    assert!(matches!(vmm.reattach(&place, LIMIT).await, Err(VmmError::Gone { .. })));
    let left: Vec<_> = std::fs::read_dir(&place).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert!(left.iter().all(|n| n.to_str().is_some_and(|n| n.ends_with(".log"))), "{left:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_vm_that_does_not_answer_is_not_gone_and_can_be_ended() {
    let Some(vmm) = qemu() else { return };
    let dir = dir();
    let vm = firmware(&vmm, dir.path()).await;
    let (pid, place) = (vm.pid(), vm.paths().dir.clone());
    drop(vm);
    assert!(Command::new("kill").args(["-STOP", &pid.to_string()]).status().unwrap().success());
    for _ in 0..4 {
        let err = vmm.reattach(&place, Duration::from_millis(300)).await.unwrap_err();
        assert!(!matches!(err, VmmError::Gone { .. }), "{err}");
    }
    assert!(Command::new("kill").args(["-CONT", &pid.to_string()]).status().unwrap().success());
    let again = vmm.reattach(&place, LIMIT).await.unwrap();
    assert_eq!(again.pid(), pid);
    assert!(Command::new("kill").args(["-STOP", &pid.to_string()]).status().unwrap().success());
    vmm.kill(&place).await.unwrap();
    assert!(matches!(vmm.reattach(&place, LIMIT).await, Err(VmmError::Gone { .. })));
    vmm.kill(&place).await.unwrap();
    vmm.kill(&dir.path().join("nosuch")).await.unwrap();
    // One whose daemon died before it was on record.
    let vm = firmware(&vmm, dir.path()).await;
    std::fs::remove_file(&vm.paths().record).unwrap();
    vmm.kill(&place).await.unwrap();
    vm.wait_exit().await;
    assert!(!vm.is_alive());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_vmm_is_noticed() {
    let Some(vmm) = qemu() else { return };
    let dir = dir();
    let vm = vmm.launch(&spec(), Boot::Incoming, &dir.path().join("vm")).await.unwrap();
    assert!(Command::new("kill").args(["-9", &vm.pid().to_string()]).status().unwrap().success());
    let exit = tokio::time::timeout(Duration::from_secs(10), vm.wait_exit()).await.unwrap();
    assert_eq!(exit.signal, Some(9));
    let err = vm.query_status().await.unwrap_err().to_string();
    assert!(err.contains("signal 9"), "{err}");
    vm.kill().await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_program_names_its_package() {
    let config = VmmConfig { qemu: "/nowhere/qemu".into(), shim: None, user: None, sandbox: false };
    let dir = dir();
    let err = Qemu::new(config).launch(&spec(), Boot::Incoming, &dir.path().join("vm")).await.unwrap_err().to_string();
    assert!(err.contains("/nowhere/qemu") && err.contains("apt-get install"), "{err}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_fills_is_claimed_and_leaves_nothing() {
    let Some(vmm) = qemu() else { return };
    let dir = dir();
    let place: PathBuf = dir.path().join("pool");
    std::fs::create_dir(&place).unwrap();
    let pool = Pool::new(vmm, PoolConfig { dir: place.clone(), most: 2, quiet: Duration::from_millis(50) });
    pool.warm(&spec(), 2);
    for _ in 0..1000 {
        if pool.ready(&spec()) == 2 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    assert_eq!(pool.ready(&spec()), 2);
    let warm = pool.claim(&spec()).await.unwrap();
    assert!(warm.was_warm);
    let other = MachineSpec { memory: ByteSize::mib(48), ..spec() };
    let cold = pool.claim(&other).await.unwrap();
    assert!(!cold.was_warm);
    for claimed in [warm, cold] {
        claimed.process.kill().await.unwrap();
        std::fs::remove_dir_all(&claimed.process.paths().dir).unwrap();
    }
    pool.drain().await;
    assert_eq!(std::fs::read_dir(&place).unwrap().count(), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_machine_has_a_generation_id_of_its_own() {
    let Some(vmm) = qemu() else { return };
    let dir = dir();
    let mut seen = std::collections::BTreeSet::new();
    for name in ["a", "b", "c"] {
        let vm = vmm.launch(&spec(), Boot::Incoming, &dir.path().join(name)).await.unwrap();
        let id = vm.generation_id().await.unwrap();
        assert_eq!(id.len(), 36, "{id}");
        assert!(seen.insert(id), "two machines have the same");
        vm.kill().await.unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kernel_that_qemus_user_cannot_reach_boots_all_the_same() {
    let Some(vmm) = qemu() else { return };
    let dir = dir();
    let hidden = dir.path().join("hidden");
    std::fs::create_dir(&hidden).unwrap();
    let parent = firmware(&vmm, dir.path()).await;
    parent.kill().await.unwrap();
    std::fs::rename(dir.path().join("kernel"), hidden.join("kernel")).unwrap();
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(&hidden, std::fs::Permissions::from_mode(0o700)).unwrap();
    let boot = Boot::Kernel { kernel: hidden.join("kernel"), initrd: None, cmdline: String::new() };
    let vm = vmm.launch(&spec(), boot, &dir.path().join("again")).await.unwrap();
    vm.cont().await.unwrap();
    assert_eq!(vm.query_status().await.unwrap(), "running");
    vm.kill().await.unwrap();
}
