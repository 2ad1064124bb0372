//! After a restart: finding again what runs, undoing what is half-made, reporting what has died.

use std::{
    collections::BTreeSet,
    fs,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use ramet_client::api::{UserInfo, VmInfo, VmState};
use ramet_memory::{FamilyId, ImageId};
use ramet_vmm::VmProcess;

use crate::{
    backend::{self, Reattached},
    daemon::{Daemon, Ending, all},
    pagers::Control,
    state::{CheckpointRecord, VmRecord},
};

/// How long a QEMU may take to answer until the daemon serves without it.
const ANSWER: Duration = Duration::from_secs(5);
/// How long one of these is waited for, at a time.
const LATER: Duration = Duration::from_secs(86_400);
/// How long other hosts may take to say, or to decide, whether they need the checkpoint of a fork that was not finished.
const UNDECIDED: Duration = Duration::from_secs(30);

/// What other hosts need of a checkpoint.
enum Need {
    /// Nothing.
    None,
    /// This clone stays.
    Committed(String),
    /// Not known yet: why.
    Unknown(String),
}

/// A user that is no clone in the making.
fn committed<'a>(users: &'a [UserInfo], vms: &[VmInfo]) -> Option<&'a str> {
    let starting = |user: &UserInfo| {
        user.kind == "vm" && vms.iter().any(|vm| vm.name == user.name && vm.state == VmState::Starting)
    };
    users.iter().find(|user| !starting(user)).map(|user| user.name.as_str())
}

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
                // Only a family of which a disk was served to, or by, another host has one.
                let serves = daemon.config.disk_servers().join(family.to_string()).exists();
                if serves && let Err(err) = daemon.disk_servers.ensure(family).await {
                    tracing::error!("{err:#}");
                }
            }
        }))
        .await;
        self.recover_networks().await;
        all(vms.into_values().filter(VmRecord::alive).map(|vm| {
            let daemon = self.clone();
            async move { daemon.recover_vm(vm).await }
        }))
        .await;
        self.recover_checkpoints().await;
        let uncolored: Vec<_> = self.store.read(|s| s.checkpoints.keys().copied().collect());
        for image in uncolored.into_iter().filter(|&image| !self.colors_file(image).exists()) {
            self.color_behind(image);
        }
        self.sweep_lost_disks();
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
            self.tell_key();
            let shared: Vec<_> = self.store.read(|s| s.checkpoints.keys().copied().collect());
            for image in shared {
                self.spread_sources(image);
            }
        }
        let images = self.images.clone();
        tokio::task::spawn_blocking(move || {
            // Of a disk that was being kept.
            if let Err(err) = images.sweep() {
                tracing::warn!("an image that was not finished is left: {err}");
            }
        });
        tokio::spawn(crate::logs::keep_short(self.config.clone()));
        tokio::spawn(self.clone().prepare_clones());
    }

    async fn recover_vm(self: &Arc<Self>, vm: VmRecord) {
        // Its maker, or the caller that it was to live with, is gone with the daemon before.
        if vm.state == VmState::Starting {
            self.discard(vm.id).await;
            return;
        }
        if vm.lease.is_some() {
            self.end_vm(vm.id).await;
            return;
        }
        if vm.rebooting {
            self.arm_ttl(vm.id);
            let daemon = self.clone();
            tokio::spawn(async move { daemon.boot_on(vm.id).await });
            return;
        }
        // The daemon before may have died in the middle of a checkpoint.
        if let Some(pager) = self.pagers.get(vm.family) {
            let _ = pager.control.checkpoint_abort(vm.id).await;
        }
        match backend::reattach(&self.vmm, &vm.dir, ANSWER).await {
            Reattached::Answers(process) => {
                self.found(&vm, process).await;
                self.arm_ttl(vm.id);
            }
            Reattached::Gone => self.lost(&vm).await,
            Reattached::Silent(why) => {
                tracing::warn!(vm = %vm.id, name = vm.name, why, "the VM does not answer; it is waited for");
                self.store.amend(|s| {
                    if let Some(vm) = s.vms.get_mut(&vm.id) {
                        vm.reason = Some("its QEMU does not answer rametd, which goes on asking".to_owned());
                    }
                });
                self.arm_ttl(vm.id);
                let daemon = self.clone();
                tokio::spawn(async move { daemon.await_answer(vm).await });
            }
        }
    }

    /// Waits until a QEMU answers, dies, or is removed. It may wait for a page of another host for days.
    async fn await_answer(self: &Arc<Self>, vm: VmRecord) {
        loop {
            let found = backend::reattach(&self.vmm, &vm.dir, LATER).await;
            if !self.store.read(|s| s.vms.get(&vm.id).is_some_and(VmRecord::alive)) {
                return;
            }
            match found {
                Reattached::Answers(process) => return self.found(&vm, process).await,
                Reattached::Gone => return self.lost(&vm).await,
                Reattached::Silent(why) => tracing::warn!(vm = %vm.id, name = vm.name, why, "the VM does not answer"),
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
    }

    /// A VM runs, and answers.
    async fn found(self: &Arc<Self>, vm: &VmRecord, process: Arc<dyn VmProcess>) {
        let running = self.adopt(vm.id, process);
        let mut alive = false;
        self.store.amend(|s| {
            if let Some(vm) = s.vms.get_mut(&vm.id).filter(|vm| vm.alive()) {
                vm.reason = None;
                alive = true;
            }
        });
        self.find_disk_again(&running, vm).await;
        if !alive {
            // Removed a moment ago.
            self.release(vm.id).await;
            return;
        }
        // In the middle of a checkpoint it stood still.
        if let Err(err) = running.process.cont().await {
            tracing::warn!(vm = %vm.id, error = %err, "a VM could not be continued");
        }
        tracing::info!(vm = %vm.id, name = vm.name, pid = running.process.pid(), "found the VM again");
        self.warm_pool(&vm.spec);
        let daemon = self.clone();
        tokio::spawn(async move { daemon.greet_untold(&running).await });
    }

    /// A VM has died while no daemon looked.
    async fn lost(self: &Arc<Self>, vm: &VmRecord) {
        tracing::warn!(vm = %vm.id, name = vm.name, "VM is gone");
        self.stats.count("vm_crashes");
        self.mark_dead(vm.id, VmState::Crashed, Some("its QEMU died while rametd was away".to_owned()));
        self.release(vm.id).await;
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
            if there && record.pending && !record.peers.is_empty() {
                let daemon = self.clone();
                tokio::spawn(async move { daemon.settle_pending(record).await });
            } else if !there || record.pending {
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
                // One that does not answer needs its memory all the same.
                if !self.store.read(|s| s.vms.get(&vm.vm).is_some_and(VmRecord::alive)) {
                    let _ = pager.control.detach(vm.vm).await;
                }
            }
        }
    }

    /// Decides on the checkpoint of a fork in the middle of which the daemon before died. Other hosts may have been told to
    /// commit their clones: then it stays, as a checkpoint like others. So it does when they can't be asked for long.
    async fn settle_pending(self: &Arc<Self>, record: CheckpointRecord) {
        let deadline = Instant::now() + UNDECIDED;
        let why = loop {
            let why = match self.need_elsewhere(&record).await {
                Need::Committed(user) => break format!("'{user}' is a clone of it"),
                Need::Unknown(why) => why,
                Need::None => match self.drop_checkpoint(&record).await {
                    Ok(()) => {
                        tracing::warn!(checkpoint = %record.id, "removed the checkpoint of a fork that was not finished");
                        return;
                    }
                    Err(err) => err.to_string(),
                },
            };
            if Instant::now() > deadline {
                break why;
            }
            tokio::time::sleep(Duration::from_millis(300)).await;
        };
        tracing::warn!(checkpoint = %record.id, "a fork was not finished, but its checkpoint is kept: {why}");
        self.store.amend(|s| {
            if let Some(checkpoint) = s.checkpoints.get_mut(&record.id) {
                checkpoint.pending = false;
            }
        });
    }

    /// Whether other hosts have clones of a checkpoint that stay.
    async fn need_elsewhere(&self, record: &CheckpointRecord) -> Need {
        let mut need = Need::None;
        for (host, answer) in self.users_elsewhere(record).await {
            let users = match answer {
                Ok(users) if users.is_empty() => continue,
                Ok(users) => users,
                Err(err) => {
                    need = Need::Unknown(err.to_string());
                    continue;
                }
            };
            match self.vms_of(&host).await {
                Ok(vms) => match committed(&users, &vms) {
                    Some(user) => return Need::Committed(user.to_owned()),
                    None => need = Need::Unknown(format!("host '{host}' has not yet removed its clones of it")),
                },
                Err(err) => need = Need::Unknown(err.to_string()),
            }
        }
        need
    }

    /// Directories of VMs and families that are on no record, with the processes that may still be there.
    async fn remove_strays(self: &Arc<Self>) {
        let (dirs, families): (BTreeSet<_>, BTreeSet<FamilyId>) = self
            .store
            .read(|s| (s.vms.values().map(|vm| vm.dir.clone()).collect(), s.families.keys().copied().collect()));
        for path in entries(&self.config.vms()).into_iter().chain(entries(&self.config.pool_dir())) {
            if !dirs.contains(&path) {
                tracing::warn!(dir = %path.display(), "removing what is left of a VM");
                if let Err(err) = self.vmm.kill(&path).await {
                    tracing::error!(dir = %path.display(), error = %err, "QEMU could not be ended");
                }
                let _ = fs::remove_dir_all(&path);
            }
        }
        for path in entries(&self.config.pages()).into_iter().chain(entries(&self.config.disk_servers())) {
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
        self.sweep_boot_files();
        let of = |&image: &ImageId| [self.state_file(image), self.colors_file(image)];
        let states: BTreeSet<_> = self.store.read(|s| s.checkpoints.keys().flat_map(of).collect());
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
                self.close_shelf().await;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clone_in_the_making_does_not_keep_a_checkpoint_and_others_do() {
        let user = |kind: &str, name: &str| UserInfo { kind: kind.into(), name: name.into(), host: "h2".into() };
        let vm = |name: &str, state: &str| -> VmInfo {
            serde_json::from_value(serde_json::json!({
                "id": "00000000000000000000000000000001", "name": name, "host": "h2", "state": state, "image": "i",
                "guest": "linux", "memory": 1, "cpus": 1, "accel": "tcg", "machine": "pc",
                "family": "00000000000000000000000000000002", "clone_number": 1, "generation": 1,
                "created_unix_ms": 1, "agent": true
            }))
            .unwrap()
        };
        let vms = [vm("a", "starting"), vm("b", "stalled")];
        assert_eq!(committed(&[user("vm", "a")], &vms), None);
        assert_eq!(committed(&[user("vm", "a"), user("vm", "b")], &vms), Some("b"));
        assert_eq!(committed(&[user("checkpoint", "a")], &vms), Some("a"));
        assert_eq!(committed(&[], &vms), None);
    }
}
