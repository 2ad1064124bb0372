//! Ends: what must outlive a VM, a caller or a daemon that ends at a bad moment.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use ramet_client::api::{self, ErrorCode, VmState};
use ramet_memory::ByteSize;
use std::time::{Duration, SystemTime, UNIX_EPOCH};
use support::*;

/// Pages that a big guest fills: copying them out of it takes a while.
const MANY: u64 = 80_000;
/// Room for them.
const BIG: ByteSize = ByteSize::mib(400);

fn big_request(name: &str) -> api::RunRequest {
    api::RunRequest { memory: BIG, ..tiny_request(name) }
}

fn signal(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(i32::try_from(pid).unwrap()).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}

#[tokio::test]
async fn a_parent_whose_time_ends_right_after_a_fork_leaves_whole_clones() {
    let lab = lab("ttl", 2).await;
    let (home, away) = (lab.client(1), lab.client(2));
    let request = api::RunRequest { ttl_s: Some(25), ..big_request("web") };
    let parent = home.run(&request).await.unwrap();
    fill(&home, "web", 5, FIRST, MANY).await;
    // The fork begins so late that the parent's time is over while its pages are being copied.
    let expires = UNIX_EPOCH + Duration::from_millis(parent.expires_unix_ms.unwrap());
    let rest = expires.duration_since(SystemTime::now()).expect("the guest was filled in time");
    tokio::time::sleep(rest.saturating_sub(Duration::from_millis(400))).await;
    let (made, clones) = fork(&home, "web", 1, &["h2"]).await;
    until("the parent is gone", || async { names(&home).await.is_empty() }).await;
    assert!(holds(&away, &clones[0], 5, FIRST, MANY).await, "a clone read a wrong byte");
    let id = made.parent.checkpoint.id.to_string();
    let info = home.checkpoint_wait(&id).await.unwrap();
    assert!(info.complete && info.broken.is_none(), "{info:?}");
    lab.down().await.unwrap();
}

#[tokio::test]
async fn a_parent_whose_caller_dies_right_after_a_checkpoint_leaves_it_whole() {
    let lab = lab("caller", 1).await;
    let home = lab.client(1);
    let lease = home.lease().await.unwrap();
    let request = api::RunRequest { lease: Some(lease.id().to_owned()), ..big_request("web") };
    home.run(&request).await.unwrap();
    fill(&home, "web", 5, FIRST, MANY).await;
    let taken = home.checkpoint("web", &api::CheckpointRequest::default()).await.unwrap();
    drop(lease);
    until("the parent is gone", || async { names(&home).await.is_empty() }).await;
    let id = taken.checkpoint.id.to_string();
    let info = home.checkpoint_wait(&id).await.unwrap();
    assert!(info.complete && info.broken.is_none(), "{info:?}");
    let late = home.clone_checkpoint(&id, &clones(1, &[])).await.unwrap();
    assert!(holds(&home, &late.clones[0].vm.name, 5, FIRST, MANY).await, "a clone read a wrong byte");
    lab.down().await.unwrap();
}

#[tokio::test]
async fn the_last_checkpoint_can_be_removed_while_the_next_is_taken() {
    let lab = lab("rmlast", 1).await;
    let home = lab.client(1);
    home.run(&big_request("web")).await.unwrap();
    fill(&home, "web", 5, FIRST, MANY).await;
    let take = || async { home.checkpoint("web", &api::CheckpointRequest::default()).await.unwrap().checkpoint.id };
    let mut last = take().await;
    for round in 0..4_u64 {
        fill(&home, "web", 5 + round, FIRST, 2000).await;
        let id = last.to_string();
        // At different moments of the next checkpoint.
        let remove = async {
            tokio::time::sleep(Duration::from_millis(40 * round)).await;
            home.remove_checkpoint(&id).await
        };
        let (next, removed) = tokio::join!(take(), remove);
        if let Err(err) = removed {
            assert_eq!(refused::<()>(Err(err)).0, ErrorCode::InUse, "the next one is over it");
        }
        home.checkpoint_wait(&next.to_string()).await.unwrap();
        let clone = home.clone_checkpoint(&next.to_string(), &clones(1, &[])).await.unwrap().clones.remove(0).vm.name;
        assert!(holds(&home, &clone, 5 + round, FIRST, 2000).await, "round {round}");
        assert!(holds(&home, &clone, 5, FIRST + 2000, MANY - 2000).await, "round {round}");
        home.remove_vm(&clone, true).await.unwrap();
        last = next;
    }
    lab.down().await.unwrap();
}

#[tokio::test]
async fn a_qemu_that_does_not_answer_a_new_daemon_is_kept_until_it_does() {
    let mut lab = lab("silent", 1).await;
    let home = lab.client(1);
    for name in ["web", "other"] {
        run_tiny(&home, name).await;
        fill(&home, name, 3, FIRST, 1000).await;
    }
    let (made, clones) = fork(&home, "web", 1, &[]).await;
    let mut pid = Vec::new();
    for name in ["web", "other", &clones[0]] {
        pid.push(vm(&home, name).await.pid.unwrap());
    }
    // A process that stands still does not answer. Not before: the death of its parent would set it going.
    lab.kill_host_daemon(1).unwrap();
    for &pid in &pid {
        signal(pid, rustix::process::Signal::STOP);
    }
    lab.restart_host_daemon(1).await.unwrap();
    for name in ["web", "other", &clones[0]] {
        let info = vm(&home, name).await;
        let reason = info.state_reason.unwrap_or_default();
        assert_eq!(info.state, VmState::Stalled, "{name}: {reason}");
        assert!(reason.contains("does not answer"), "{reason}");
    }
    let (code, text) = refused(home.checkpoint("web", &api::CheckpointRequest::default()).await);
    assert_eq!(code, ErrorCode::WrongState, "{text}");
    assert!(text.contains("does not answer"), "{text}");
    // Its end can be had all the same, and its death is noticed.
    home.remove_vm("other", true).await.unwrap();
    kill(pid[2]);
    until("the clone has crashed", || async { vm(&home, &clones[0]).await.state == VmState::Crashed }).await;
    until("one QEMU is left", || async { pids(&lab, 1, "qemu") == [pid[0]] }).await;
    signal(pid[0], rustix::process::Signal::CONT);
    until("the VM runs", || async { vm(&home, "web").await.state == VmState::Running }).await;
    assert_eq!(vm(&home, "web").await.state_reason, None);
    assert!(holds(&home, "web", 3, FIRST, 1000).await);
    let checkpoint = made.parent.checkpoint.id.to_string();
    let again = home.clone_checkpoint(&checkpoint, &support::clones(1, &[])).await.unwrap();
    assert!(holds(&home, &again.clones[0].vm.name, 3, FIRST, 1000).await);
    for name in names(&home).await {
        home.remove_vm(&name, true).await.unwrap();
    }
    home.remove_checkpoint(&checkpoint).await.unwrap();
    assert_nothing_left(&lab, 1).await;
    lab.down().await.unwrap();
}

#[tokio::test]
async fn a_checkpoint_whose_clones_other_hosts_have_committed_outlives_its_daemons_death() {
    let mut lab = lab("window", 2).await;
    let (home, away) = (lab.client(1), lab.client(2));
    run_tiny(&home, "web").await;
    fill(&home, "web", 9, FIRST, 5000).await;
    let (kept, clones) = fork(&home, "web", 1, &["h2"]).await;
    fill(&home, "web", 10, FIRST, 1000).await;
    let (undone, others) = fork(&home, "web", 1, &["h2"]).await;
    away.remove_vm(&others[0], true).await.unwrap();
    let state = state_dir(&lab, 1).await;
    // As if it had died after h2's commits and before its own.
    lab.kill_host_daemon(1).unwrap();
    edit_state(&state, |state| {
        for made in [&kept, &undone] {
            let record = &mut state["checkpoints"][made.parent.checkpoint.id.to_string()];
            assert!(record.is_object());
            record["pending"] = true.into();
        }
    });
    lab.restart_host_daemon(1).await.unwrap();
    let listed =
        || async { home.checkpoints().await.unwrap().checkpoints.into_iter().map(|c| c.id).collect::<Vec<_>>() };
    until("the checkpoint that is in use is back", || async { listed().await == [kept.parent.checkpoint.id] }).await;
    assert!(holds(&away, &clones[0], 9, FIRST, 5000).await, "a clone read a wrong byte");
    assert!(holds(&home, "web", 10, FIRST, 1000).await);
    // The other one is gone with its state.
    let gone = undone.parent.checkpoint.id.to_string();
    let left = || {
        let files = std::fs::read_dir(state.join("checkpoints")).unwrap().flatten();
        files.filter(|f| f.file_name().to_string_lossy().starts_with(&gone)).count()
    };
    until("its state is removed", || async { left() == 0 }).await;
    assert_eq!(listed().await, [kept.parent.checkpoint.id]);
    let (code, text) = refused(home.remove_checkpoint(&kept.parent.checkpoint.id.to_string()).await);
    assert_eq!(code, ErrorCode::InUse, "{text}");
    away.remove_vm(&clones[0], true).await.unwrap();
    home.remove_checkpoint(&kept.parent.checkpoint.id.to_string()).await.unwrap();
    lab.down().await.unwrap();
}

#[tokio::test]
async fn logs_do_not_grow_without_bound() {
    let lab = lab("logs", 1).await;
    let home = lab.client(1);
    run_tiny(&home, "web").await;
    let dir = state_dir(&lab, 1).await.join("vms").join(vm(&home, "web").await.id.to_string());
    let append = |name: &str, text: &[u8]| {
        use std::io::Write as _;
        std::fs::File::options().append(true).open(dir.join(name)).unwrap().write_all(text).unwrap();
    };
    let len = |name: &str| std::fs::metadata(dir.join(name)).unwrap().len();
    for log in ["console.log", "qemu.log"] {
        let mut text = vec![b'x'; 6 << 20];
        text.extend_from_slice(b"\nlast words\n");
        append(log, &text);
        until("the log is cut", || async { len(log) <= 1 << 20 }).await;
        assert!(std::fs::read(dir.join(log)).unwrap().ends_with(b"last words\n"), "its end is kept");
    }
    // QEMU appends, too: what the guest writes next leaves no hole.
    let pid = vm(&home, "web").await.pid.unwrap();
    let open = std::fs::read_dir(format!("/proc/{pid}/fd")).unwrap().flatten();
    let logs: Vec<_> = open
        .filter(|fd| {
            std::fs::read_link(fd.path())
                .is_ok_and(|to| to.starts_with(&dir) && to.extension().is_some_and(|e| e == "log"))
        })
        .collect();
    assert!(logs.len() >= 2, "{logs:?}");
    for fd in logs {
        let info = std::fs::read_to_string(format!("/proc/{pid}/fdinfo/{}", fd.file_name().to_str().unwrap())).unwrap();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:")).unwrap();
        assert_ne!(u32::from_str_radix(flags.trim(), 8).unwrap() & 0o2000, 0, "{fd:?}: {info}");
    }
    lab.down().await.unwrap();
}

#[tokio::test]
async fn a_source_that_moved_is_told_to_hosts_that_know_the_checkpoint_already() {
    let lab = lab("moved", 2).await;
    let (home, away) = (lab.client(1), lab.client(2));
    run_tiny(&home, "web").await;
    fill(&home, "web", 4, FIRST, 6000).await;
    let (made, first) = fork(&home, "web", 1, &["h2"]).await;
    let checkpoint = made.parent.checkpoint.id.to_string();
    home.checkpoint_wait(&checkpoint).await.unwrap();
    // The next pager of h1 listens at another port.
    let family = state_dir(&lab, 1).await.join("pages").join(vm(&home, "web").await.family.to_string());
    let before = std::fs::read_to_string(family.join("listen")).unwrap();
    std::fs::remove_file(family.join("listen")).unwrap();
    let old = pids(&lab, 1, "ramet-pager");
    old.iter().copied().for_each(kill);
    until("the next pager serves", || async {
        std::fs::read_to_string(family.join("listen")).is_ok_and(|now| now != before && !now.is_empty())
    })
    .await;
    assert_ne!(pids(&lab, 1, "ramet-pager"), old);
    let more = home.clone_checkpoint(&checkpoint, &clones(1, &["h2"])).await.unwrap();
    assert!(holds(&away, &more.clones[0].vm.name, 4, FIRST, 6000).await);
    assert!(holds(&away, &first[0], 4, FIRST, 6000).await);
    lab.down().await.unwrap();
}
