//! Clones that are made before anybody asks for them.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use ramet_client::Client;
use ramet_client::api::{self, ErrorCode};
use support::*;

async fn prepare(client: &Client, checkpoint: &str, count: u32) {
    let request = api::PoolRequest { like: checkpoint.into(), count, hosts: Vec::new(), wait: true };
    let status = client.warm(&request).await.unwrap();
    assert_eq!(status.entries.iter().map(|e| e.ready).sum::<u32>(), count, "{status:?}");
}

async fn take(client: &Client, vm: &str) -> String {
    client.checkpoint(vm, &api::CheckpointRequest::default()).await.unwrap().checkpoint.id.to_string()
}

async fn clone(client: &Client, checkpoint: &str, count: u32) -> Vec<api::CloneResult> {
    client.clone_checkpoint(checkpoint, &clones(count, &[])).await.unwrap().clones
}

#[tokio::test]
async fn a_prepared_clone_is_a_clone_like_others() {
    let lab = lab("shelf", 1).await;
    let home = lab.client(1);
    run_tiny(&home, "web").await;
    fill(&home, "web", 1, FIRST, 3000).await;
    let checkpoint = take(&home, "web").await;
    prepare(&home, &checkpoint, 2).await;
    // What the parent does from now on is none of theirs.
    fill(&home, "web", 2, FIRST, 3000).await;
    assert_eq!(names(&home).await, ["web"], "it is no VM yet");
    let made = clone(&home, &checkpoint, 3).await;
    assert_eq!(made.iter().filter(|c| c.prepared).count(), 2, "the third one is made as ever");
    for clone in &made {
        assert!(clone.timeline.phases.iter().any(|p| p.name == "load") != clone.prepared);
        assert!(holds(&home, &clone.vm.name, 1, FIRST, 3000).await);
        fill(&home, &clone.vm.name, 7 + u64::from(clone.vm.clone_number), FIRST, 1000).await;
    }
    for clone in &made {
        let seed = 7 + u64::from(clone.vm.clone_number);
        assert!(holds(&home, &clone.vm.name, seed, FIRST, 1000).await, "no sibling wrote there");
        assert!(holds(&home, &clone.vm.name, 1, FIRST + 1000, 2000).await);
    }
    assert!(holds(&home, "web", 2, FIRST, 3000).await);
    // They can be forked, stopped and removed.
    let (_, next) = fork(&home, &made[0].vm.name, 1, &[]).await;
    assert!(holds(&home, &next[0], 8, FIRST, 1000).await);
    for name in names(&home).await {
        home.remove_vm(&name, true).await.unwrap();
    }
    // What is prepared is no user of its checkpoint, and goes with it.
    prepare(&home, &checkpoint, 2).await;
    for info in home.checkpoints().await.unwrap().checkpoints.iter().rev() {
        home.remove_checkpoint(&info.id.to_string()).await.unwrap();
    }
    assert_nothing_left(&lab, 1).await;
    lab.down().await.unwrap();
}

#[tokio::test]
async fn prepared_clones_outlive_their_pager_and_not_their_daemon() {
    let mut lab = lab("shelfkill", 1).await;
    let home = lab.client(1);
    run_tiny(&home, "web").await;
    fill(&home, "web", 3, FIRST, 3000).await;
    let checkpoint = take(&home, "web").await;
    home.checkpoint_wait(&checkpoint).await.unwrap();
    prepare(&home, &checkpoint, 2).await;
    let pager = pids(&lab, 1, "ramet-pager");
    pager.iter().copied().for_each(kill);
    until("another pager serves", || async {
        let now = pids(&lab, 1, "ramet-pager");
        !now.is_empty() && now != pager
    })
    .await;
    let made = clone(&home, &checkpoint, 1).await;
    assert!(made[0].prepared);
    assert!(holds(&home, &made[0].vm.name, 3, FIRST, 3000).await);
    // A dead one is not given away.
    let mut vms = Vec::new();
    for name in names(&home).await {
        vms.push(vm(&home, &name).await.pid.unwrap());
    }
    let shelved: Vec<_> = pids(&lab, 1, "qemu").into_iter().filter(|pid| !vms.contains(pid)).collect();
    assert_eq!(shelved.len(), 1);
    shelved.iter().copied().for_each(kill);
    until("it is dead", || async { !std::fs::exists(format!("/proc/{}", shelved[0])).unwrap() }).await;
    let made = clone(&home, &checkpoint, 1).await;
    assert!(!made[0].prepared && holds(&home, &made[0].vm.name, 3, FIRST, 3000).await);

    prepare(&home, &checkpoint, 2).await;
    assert_eq!(pids(&lab, 1, "qemu").len(), 3 + 2);
    lab.kill_host_daemon(1).unwrap();
    lab.restart_host_daemon(1).await.unwrap();
    until("the VMs' QEMUs are left", || async { pids(&lab, 1, "qemu").len() == 3 }).await;
    let made = clone(&home, &checkpoint, 1).await;
    assert!(!made[0].prepared && holds(&home, &made[0].vm.name, 3, FIRST, 3000).await);
    for name in names(&home).await {
        home.remove_vm(&name, true).await.unwrap();
    }
    home.remove_checkpoint(&checkpoint).await.unwrap();
    assert_nothing_left(&lab, 1).await;
    lab.down().await.unwrap();
}

#[tokio::test]
async fn a_checkpoint_is_removed_while_clones_of_it_are_prepared() {
    let lab = lab("shelfrm", 1).await;
    let home = lab.client(1);
    run_tiny(&home, "web").await;
    for round in 0..4_u64 {
        let checkpoint = take(&home, "web").await;
        let request = api::PoolRequest { like: checkpoint.clone(), count: 3, hosts: Vec::new(), wait: false };
        home.warm(&request).await.unwrap();
        tokio::time::sleep(std::time::Duration::from_millis(60 * round)).await;
        home.remove_checkpoint(&checkpoint).await.unwrap();
        let (code, text) = refused(home.warm(&request).await);
        assert!(code == ErrorCode::NotFound, "{text}");
    }
    let many = api::PoolRequest { like: take(&home, "web").await, count: 1000, hosts: Vec::new(), wait: false };
    let (code, text) = refused(home.warm(&many).await);
    assert!(code == ErrorCode::LimitReached && text.contains("1000"), "{text}");
    home.remove_vm("web", true).await.unwrap();
    home.remove_checkpoint(&many.like).await.unwrap();
    assert_nothing_left(&lab, 1).await;
    lab.down().await.unwrap();
}
