//! After a restart: finding again what runs, undoing what is half-made, reporting what has died.

use std::{collections::BTreeSet, fs, path::Path, sync::Arc, time::Duration};

use ramet_client::api::VmState;
use ramet_memory::FamilyId;

use crate::{
    backend,
    daemon::{Daemon, Ending, all},
    pagers::Control,
    state::VmRecord,
};

impl Daemon {
    /// Takes over what the daemon before this one left, and cleans up after it.
    pub async fn recover(self: &Arc<Self>) {
        // Before anything is started anew: what is there now and on no record is a stray.
        self.remove_strays().await;
        let (families, vms) = self.store.read(|s| (s.families.keys().copied().collect::<Vec<_>>(), s.vms.clone()));
        all(families.into_iter().map(|family| {
            let daemon = self.clone();
            async move {
                if let Err(err) = daemon.pager(family).await {
                    tracing::error!("{err}");
                }
            }
        }))
        .await;
        all(vms.into_values().filter(VmRecord::alive).map(|vm| {
            let daemon = self.clone();
            async move { daemon.recover_vm(vm).await }
        }))
        .await;
        self.recover_checkpoints().await;
        let left: Vec<_> = self.store.read(|s| s.families.keys().copied().collect());
        for family in left {
            self.tidy(family).await;
        }
        // Copies of other hosts' images whose last view went meanwhile.
        let copies: Vec<_> =
            self.store.read(|s| s.checkpoints.values().filter(|c| c.origin.is_some()).map(|c| c.id).collect());
        for image in copies {
            self.image_lost_a_user(image);
        }
        if self.peers.files().trusted() {
            crate::peers::join::catch_up(&self.peers);
        }
    }

    async fn recover_vm(self: &Arc<Self>, vm: VmRecord) {
        let half_made = vm.state == VmState::Starting;
        let process = backend::reattach(&self.vmm, &vm.dir).await;
        let running = match process {
            Ok(process) => Some(self.adopt(vm.id, process)),
            Err(err) => {
                tracing::warn!(vm = %vm.id, name = vm.name, error = %err, "VM is gone");
                None
            }
        };
        if half_made || vm.lease.is_some() {
            // Its maker, or the caller that it was to live with, is gone with the daemon before.
            self.discard(vm.id).await;
            return;
        }
        let Some(running) = running else {
            self.stats.count("vm_crashes");
            self.mark_dead(vm.id, VmState::Crashed, Some("its QEMU died while rametd was away".to_owned()));
            self.release(vm.id).await;
            return;
        };
        // The daemon before may have died in the middle of a checkpoint: the parent runs on.
        if let Some(pager) = self.pagers.get(vm.family) {
            let _ = pager.control.checkpoint_abort(vm.id).await;
        }
        if let Err(err) = running.process.cont().await {
            tracing::warn!(vm = %vm.id, error = %err, "a VM could not be continued");
        }
        tracing::info!(vm = %vm.id, name = vm.name, pid = running.process.pid(), "found the VM again");
        self.arm_ttl(vm.id);
        self.warm_pool(&vm.spec);
    }

    /// Checkpoints of forks that did not succeed go; so do those whose pages are gone (the machine was restarted), and
    /// images that a pager has and nobody knows.
    async fn recover_checkpoints(self: &Arc<Self>) {
        let records: Vec<_> = self.store.read(|s| s.checkpoints.values().cloned().collect());
        for record in records {
            let there = match self.pager(record.family).await {
                Ok(pager) => match pager.control.image_status(record.id).await {
                    Err(err) if err.code() == Some("no_such_image") => false,
                    Err(err) => {
                        tracing::error!(checkpoint = %record.id, "{err}");
                        true
                    }
                    Ok(_) => true,
                },
                Err(_) => true,
            };
            if !there || record.pending {
                tracing::warn!(checkpoint = %record.id, there, "removing a checkpoint that is half-made or lost");
                if let Err(err) = self.drop_checkpoint(&record).await {
                    tracing::error!("{err}");
                    self.store.amend(|s| {
                        s.checkpoints.remove(&record.id);
                    });
                }
            }
        }
        for (pager, report) in self.pagers.stats(Duration::from_secs(5)).await {
            let Ok(report) = report else { continue };
            for image in report.images {
                if self.store.read(|s| !s.checkpoints.contains_key(&image.image)) {
                    tracing::warn!(image = %image.image, "removing an image that belongs to nothing");
                    let _ = pager.control.image_drop(image.image).await;
                }
            }
            for vm in report.vms {
                if self.running(vm.vm).is_none() {
                    let _ = pager.control.detach(vm.vm).await;
                }
            }
        }
    }

    /// Directories of VMs and families that are on no record, with the processes that may still be there.
    async fn remove_strays(self: &Arc<Self>) {
        let (dirs, families): (BTreeSet<_>, BTreeSet<FamilyId>) = self
            .store
            .read(|s| (s.vms.values().map(|vm| vm.dir.clone()).collect(), s.families.keys().copied().collect()));
        for path in entries(&self.config.vms()).into_iter().chain(entries(&self.config.pool_dir())) {
            if !dirs.contains(&path) {
                tracing::warn!(dir = %path.display(), "removing what is left of a VM");
                if let Ok(process) = backend::reattach(&self.vmm, &path).await {
                    let _ = process.kill().await;
                }
                let _ = fs::remove_dir_all(&path);
            }
        }
        for path in entries(&self.config.pages()) {
            let family = path.file_name().and_then(|n| n.to_str()).and_then(|n| n.parse::<FamilyId>().ok());
            if family.is_none_or(|f| !families.contains(&f)) {
                tracing::warn!(dir = %path.display(), "removing what is left of a family");
                let control = Control::new(&path.join("control.sock"));
                if control.ping(Duration::from_millis(100)).await.is_ok() {
                    let _ = control.shutdown().await;
                }
                let _ = fs::remove_dir_all(&path);
            }
        }
        let states: BTreeSet<_> = self.store.read(|s| s.checkpoints.keys().map(|&c| self.state_file(c)).collect());
        for path in entries(&self.config.checkpoints()) {
            if !states.contains(&path) {
                let _ = fs::remove_file(&path);
            }
        }
    }

    /// Ends as it was told: VMs go on, or all end.
    pub async fn close(self: &Arc<Self>, how: Ending) {
        match how {
            Ending::LeaveVms => {
                // Pre-started QEMUs serve nobody without a daemon.
                self.pool.drain().await;
            }
            Ending::StopVms => {
                self.stop_all().await;
                if let Err(err) = crate::memory::unmount_pages(&self.config.pages()) {
                    tracing::error!("{err:#}");
                }
            }
        }
        let _ = fs::remove_file(&self.config.socket);
    }
}

fn entries(dir: &Path) -> Vec<std::path::PathBuf> {
    fs::read_dir(dir).map(|d| d.filter_map(Result::ok).map(|e| e.path()).collect()).unwrap_or_default()
}
