//! What tests with a real QEMU have in common.

use ramet_kernel::shim::{Segment, ShimClient};
use ramet_vmm::{Qemu, VmProcess, VmmConfig};
use std::{
    os::{fd::AsFd, unix::fs::PermissionsExt},
    path::Path,
};

/// QEMU as the daemon uses it.
pub(crate) fn vmm() -> Qemu {
    let shim = std::env::current_exe().unwrap().ancestors().nth(2).unwrap().join("libramet_shim.so");
    assert!(shim.exists(), "build the workspace first: {} is missing", shim.display());
    let user = rustix::process::geteuid().is_root().then_some((ramet_vmm::QEMU_UID, ramet_vmm::QEMU_UID));
    Qemu::new(VmmConfig { user, ..VmmConfig::new(shim) })
}

/// A directory that QEMU's user can reach. The QEMUs of its VMs end with it, whatever became of the test.
#[derive(Debug)]
pub(crate) struct Dir(tempfile::TempDir);

pub(crate) fn dir() -> Dir {
    let dir = tempfile::tempdir().unwrap();
    std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    Dir(dir)
}

impl Dir {
    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        for vm in std::fs::read_dir(self.path()).into_iter().flatten().flatten() {
            let record = std::fs::read(vm.path().join("vmm.json")).unwrap_or_default();
            let record: serde_json::Value = serde_json::from_slice(&record).unwrap_or_default();
            let pid = record["pid"].as_i64().and_then(|pid| i32::try_from(pid).ok());
            // Another process may have the number by now.
            let is_its = |pid: &i32| {
                let words = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
                String::from_utf8_lossy(&words).contains(&*self.path().to_string_lossy())
            };
            if let Some(pid) = pid.filter(is_its).and_then(rustix::process::Pid::from_raw) {
                let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
            }
        }
    }
}

/// Gives a waiting VM a copy of a stopped VM's memory: loading devices looks into it.
pub(crate) fn copy_memory(from: &dyn VmProcess, to: &dyn VmProcess, file: &Path) {
    let info = ShimClient::connect(from.shim_socket()).unwrap().info().unwrap();
    let mut bytes = vec![0; usize::try_from(info.ram_len).unwrap()];
    ramet_kernel::process_read(info.pid, info.ram_addr, &mut bytes).unwrap();
    std::fs::write(file, bytes).unwrap();
    let file = std::fs::File::open(file).unwrap();
    let segment = Segment { guest_offset: 0, len: info.ram_len, file_offset: 0, fd_index: 0, flags: 0 };
    ShimClient::connect(to.shim_socket()).unwrap().map(&[segment], &[file.as_fd()]).unwrap();
}
