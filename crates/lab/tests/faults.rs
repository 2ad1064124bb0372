//! Faults that are made by killing and cutting off real things.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use ramet_client::api::{self, VmState};
use std::time::Duration;
use support::*;

#[tokio::test]
async fn a_pager_that_is_killed_while_clones_fault_is_followed_by_another_and_no_byte_is_wrong() {
    let mut options = ramet_lab::LabOptions::for_test("pager").unwrap().hosts(2);
    // Slow enough for the kill to hit clones that wait.
    options.link = Some("200mbit".parse().unwrap());
    let lab = ramet_lab::Lab::up(&options.daemon_arg("--pool").daemon_arg("0")).await.unwrap();
    let (home, away) = (lab.client(1), lab.client(2));
    run_tiny(&home, "web").await;
    fill(&home, "web", 6, FIRST, 12_000).await;
    let (_, clones) = fork(&home, "web", 3, &["h1", "h2", "h2"]).await;
    let work: Vec<_> =
        [(home.clone(), clones[0].clone()), (away.clone(), clones[1].clone()), (away.clone(), clones[2].clone())]
            .into_iter()
            .map(|(client, name)| tokio::spawn(async move { holds(&client, &name, 6, FIRST, 12_000).await }))
            .collect();
    let mut killed = 0;
    for round in 0..3 {
        tokio::time::sleep(Duration::from_millis(60)).await;
        for host in [2, 1] {
            for pid in pids(&lab, host, "ramet-pager") {
                kill(pid);
                killed += 1;
            }
            if round < 2 {
                break;
            }
        }
        until("a new pager serves", || async { !pids(&lab, 2, "ramet-pager").is_empty() }).await;
    }
    assert!(killed >= 4);
    for task in work {
        assert!(tokio::time::timeout(LIMIT, task).await.unwrap().unwrap(), "a clone read a wrong byte");
    }
    // All goes on: memory, checkpoints, forks of what was taken over.
    let restarts: u32 = away.stats().await.unwrap().pagers.iter().map(|p| p.restarts).sum();
    assert!(restarts >= 1);
    fill(&away, &clones[1], 7, FIRST, 100).await;
    let (_, next) = fork(&away, &clones[1], 1, &["h1"]).await;
    assert!(holds(&home, &next[0], 7, FIRST, 100).await && holds(&home, &next[0], 6, FIRST + 100, 11_900).await);
    assert!(holds(&home, "web", 6, FIRST, 12_000).await);
    lab.down().await.unwrap();
}

#[tokio::test]
async fn a_daemon_that_is_killed_finds_everything_again() {
    let mut lab = lab("daemon", 2).await;
    let (home, away) = (lab.client(1), lab.client(2));
    run_tiny(&home, "web").await;
    fill(&home, "web", 2, FIRST, 3000).await;
    let (made, clones) = fork(&home, "web", 2, &["h1", "h2"]).await;
    let before = vm(&home, "web").await;
    let pagers = (pids(&lab, 1, "ramet-pager"), pids(&lab, 2, "ramet-pager"));
    lab.kill_host_daemon(1).unwrap();
    lab.kill_host_daemon(2).unwrap();
    assert_eq!(pids(&lab, 1, "qemu").len(), 2, "VMs go on without the daemon");
    lab.restart_host_daemon(1).await.unwrap();
    lab.restart_host_daemon(2).await.unwrap();
    let after = vm(&home, "web").await;
    assert_eq!((after.id, after.pid, after.state), (before.id, before.pid, VmState::Running));
    assert_eq!((pids(&lab, 1, "ramet-pager"), pids(&lab, 2, "ramet-pager")), pagers, "the same pagers serve");
    assert!(holds(&home, "web", 2, FIRST, 3000).await);
    assert!(holds(&home, &clones[0], 2, FIRST, 3000).await);
    assert!(holds(&away, &clones[1], 2, FIRST, 3000).await);
    // What was there can be used and removed as if nothing had happened.
    let checkpoint = made.parent.checkpoint.id.to_string();
    let more = home.clone_checkpoint(&checkpoint, &clones_on(&["h2"])).await.unwrap();
    assert!(holds(&away, &more.clones[0].vm.name, 2, FIRST, 3000).await);
    let (_, again) = fork(&home, "web", 1, &[]).await;
    assert!(holds(&home, &again[0], 2, FIRST, 3000).await);
    lab.down().await.unwrap();
}

fn clones_on(hosts: &[&str]) -> api::CloneRequest {
    clones(u32::try_from(hosts.len()).unwrap(), hosts)
}

#[tokio::test]
async fn a_qemu_that_is_killed_is_reported_and_cleaned_up() {
    let lab = lab("qemu", 1).await;
    let host = lab.client(1);
    run_tiny(&host, "web").await;
    fill(&host, "web", 4, FIRST, 500).await;
    let (_, clones) = fork(&host, "web", 2, &[]).await;
    kill(vm(&host, &clones[0]).await.pid.unwrap());
    until("the clone is reported as crashed", || async { vm(&host, &clones[0]).await.state == VmState::Crashed }).await;
    let info = vm(&host, &clones[0]).await;
    let reason = info.state_reason.unwrap_or_default();
    assert!(reason.contains('9') || reason.to_lowercase().contains("kill"), "{reason}");
    assert!(holds(&host, &clones[1], 4, FIRST, 500).await && holds(&host, "web", 4, FIRST, 500).await);
    // The parent's death leaves a complete checkpoint and its clones as they are.
    let checkpoint = host.checkpoints().await.unwrap().checkpoints[0].id.to_string();
    host.checkpoint_wait(&checkpoint).await.unwrap();
    kill(vm(&host, "web").await.pid.unwrap());
    until("the parent is reported as crashed", || async { vm(&host, "web").await.state == VmState::Crashed }).await;
    let late = host.clone_checkpoint(&checkpoint, &api::CloneRequest::new(1)).await.unwrap();
    assert!(holds(&host, &late.clones[0].vm.name, 4, FIRST, 500).await);
    for name in names(&host).await {
        host.remove_vm(&name, true).await.unwrap();
    }
    host.remove_checkpoint(&checkpoint).await.unwrap();
    assert_nothing_left(&lab, 1).await;
    lab.down().await.unwrap();
}

#[tokio::test]
async fn clones_stall_while_the_checkpoints_host_is_out_of_reach_and_go_on_when_it_is_back() {
    let lab = lab("cut", 2).await;
    let (home, away) = (lab.client(1), lab.client(2));
    run_tiny(&home, "web").await;
    fill(&home, "web", 8, FIRST, 10_000).await;
    let (_, clones) = fork(&home, "web", 1, &["h2"]).await;
    lab.cut(1).unwrap();
    let name = clones[0].clone();
    let work = {
        let (away, name) = (away.clone(), name.clone());
        tokio::spawn(async move { holds(&away, &name, 8, FIRST, 10_000).await })
    };
    until("the clone is stalled", || async { vm(&away, &name).await.state == VmState::Stalled }).await;
    let stats = away.vm_stats(&name).await.unwrap();
    let reason = stats.stalled.unwrap_or_default();
    assert!(reason.contains("h1") || reason.contains("10."), "the reason names the host: {reason:?}");
    assert!(!work.is_finished(), "it waits");
    lab.heal(1).unwrap();
    assert!(tokio::time::timeout(LIMIT, work).await.unwrap().unwrap(), "a clone read a wrong byte");
    until("the clone runs", || async { vm(&away, &name).await.state == VmState::Running }).await;
    lab.down().await.unwrap();
}

#[tokio::test]
async fn clones_outlive_a_checkpoints_host_whose_daemon_is_gone() {
    // Its pager still serves.
    let mut lab = lab("nodaemon", 2).await;
    let (home, away) = (lab.client(1), lab.client(2));
    run_tiny(&home, "web").await;
    fill(&home, "web", 8, FIRST, 4000).await;
    let (_, clones) = fork(&home, "web", 1, &["h2"]).await;
    lab.kill_host_daemon(1).unwrap();
    assert!(holds(&away, &clones[0], 8, FIRST, 4000).await);
    lab.restart_host_daemon(1).await.unwrap();
    lab.down().await.unwrap();
}
