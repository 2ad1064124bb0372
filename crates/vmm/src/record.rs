//! Which process is a VM's: `vmm.json` in its directory, or, where a daemon died before it wrote that, the process itself.

use crate::{
    MachineSpec, VmPaths, VmmError,
    error::file_error,
    machine::qmp_argument,
    process::{Process, start_time},
};
use serde::{Deserialize, Serialize};
use std::{fs, io, path::Path};

/// `vmm.json`.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) pid: u32,
    pub(crate) started: u64,
    pub(crate) spec: MachineSpec,
}

impl Record {
    /// Whole, or not at all.
    pub(crate) fn write(&self, path: &Path) -> io::Result<()> {
        let new = path.with_extension("new");
        fs::write(&new, serde_json::to_vec(self)?)?;
        fs::rename(&new, path)
    }
}

/// The process of a VM on record. Only one that runs no more is gone.
pub(crate) fn find(paths: &VmPaths) -> Result<(Process, MachineSpec), VmmError> {
    let gone = || VmmError::Gone { dir: paths.dir.clone() };
    let text = fs::read(&paths.record).map_err(|_| gone())?;
    let record: Record = serde_json::from_slice(&text).map_err(|_| gone())?;
    if start_time(record.pid).ok() != Some(record.started) {
        return Err(gone());
    }
    match Process::watch(record.pid) {
        // Another process may have the number by now.
        Ok(process) if process.started != record.started => Err(gone()),
        Ok(process) => Ok((process, record.spec)),
        Err(_) if start_time(record.pid).ok() != Some(record.started) => Err(gone()),
        Err(err) => Err(file_error("watch the process of", &paths.dir)(err)),
    }
}

/// A VM's process that is not on record, since its daemon died right after it had started it.
pub(crate) fn stray(paths: &VmPaths) -> Option<Process> {
    let sign = qmp_argument(paths);
    let is_ours = |pid: u32| {
        let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
        line.split(|byte| *byte == 0).any(|word| word == sign.as_bytes())
    };
    let pids = fs::read_dir("/proc").ok()?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    // Looked at again with the process held: its number may be another's by now.
    pids.filter(|pid| is_ours(*pid)).find_map(|pid| Process::watch(pid).ok().filter(|_| is_ours(pid)))
}
