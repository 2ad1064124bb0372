//! Forks of the tiny guest on a lab: what clones share and what they do not, on one host and over several.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use ramet_client::api::{self, ErrorCode, VmState};
use support::*;

#[tokio::test]
async fn clones_on_the_same_host_go_on_where_the_parent_was_and_never_see_each_other() {
    let lab = lab("same", 1).await;
    let host = lab.client(1);
    run_tiny(&host, "web").await;
    fill(&host, "web", 5, FIRST, 2000).await;
    let before = count(&host, "web").await;
    let (made, clones) = fork(&host, "web", 3, &[]).await;
    assert_eq!(clones, ["web-c1", "web-c2", "web-c3"]);

    // Every phase is on the timeline, and the daemon's histograms have them.
    for clone in &made.clones {
        for phase in ["claim", "remap", "attach", "load", "continue", "first_answer"] {
            assert!(clone.timeline.phase_us(phase).is_some(), "no {phase} in {:?}", clone.timeline);
        }
        assert!(clone.answered_us.unwrap() >= clone.running_us);
    }
    for phase in ["prepare", "save", "commit", "resume", "pause"] {
        assert!(made.parent.timeline.phase_us(phase).is_some(), "no {phase} in {:?}", made.parent.timeline);
    }
    let stats = host.stats().await.unwrap();
    for phase in ["claim", "remap", "attach", "load", "continue", "first_answer"] {
        assert_eq!(
            stats.phases.get(&format!("clone_{phase}")).map(|h| h.count),
            Some(3),
            "{phase} in {:?}",
            stats.phases.keys()
        );
    }
    assert!(made.parent.pause_us > 0);

    // Each has all of the parent's memory and state, and is somebody.
    for (number, name) in (1..).zip(&clones) {
        assert!(holds(&host, name, 5, FIRST, 2000).await, "{name}");
        assert!(count(&host, name).await >= before, "the counter goes on");
        assert_eq!(tiny_ok(&host, name, &["id"]).await, number.to_string());
        let info = vm(&host, name).await;
        assert_eq!((info.clone_number, info.generation, info.state), (number, 1, VmState::Running));
    }
    // Nobody sees another's writes.
    fill(&host, "web", 1, FIRST, 50).await;
    fill(&host, &clones[0], 2, FIRST, 50).await;
    fill(&host, &clones[1], 3, FIRST + 25, 50).await;
    assert!(holds(&host, "web", 1, FIRST, 50).await && holds(&host, "web", 5, FIRST + 50, 1950).await);
    assert!(holds(&host, &clones[0], 2, FIRST, 50).await && holds(&host, &clones[0], 5, FIRST + 50, 1950).await);
    assert!(holds(&host, &clones[1], 5, FIRST, 25).await && holds(&host, &clones[1], 3, FIRST + 25, 50).await);
    assert!(holds(&host, &clones[2], 5, FIRST, 2000).await);
    // Nor does a clone that is made of the image afterwards.
    let checkpoint = made.parent.checkpoint.id.to_string();
    let late = host.clone_checkpoint(&checkpoint, &api::CloneRequest::new(1)).await.unwrap();
    assert!(holds(&host, &late.clones[0].vm.name, 5, FIRST, 2000).await);

    // Clones share the image's pages physically: what is theirs alone is what they wrote, not the 2000 pages.
    let memory = host.vm_stats(&clones[2]).await.unwrap().memory.unwrap();
    assert!(memory.ram_private_bytes < 1000 * 4096, "{memory:?}");
    assert!(memory.vmm_pss_bytes > 0);
    let metrics = host.metrics().await.unwrap();
    assert!(metrics.contains("ramet_vm_local_pages"), "{metrics}");

    // A layer in use is never removed.
    let (code, text) = refused(host.remove_checkpoint(&checkpoint).await);
    assert_eq!(code, ErrorCode::InUse);
    assert!(text.contains("web-c"), "the error names a user: {text}");
    assert!(holds(&host, &clones[2], 5, FIRST, 2000).await);
    for name in names(&host).await {
        host.remove_vm(&name, true).await.unwrap();
    }
    host.remove_checkpoint(&checkpoint).await.unwrap();
    assert_nothing_left(&lab, 1).await;
    lab.down().await.unwrap();
}

#[tokio::test]
async fn clones_on_other_hosts_fetch_what_they_touch_once_for_each_host() {
    let lab = lab("others", 3).await;
    let home = lab.client(1);
    run_tiny(&home, "web").await;
    fill(&home, "web", 9, FIRST, 6000).await;
    let (made, clones) = fork(&home, "web", 4, &["h2", "h3"]).await;
    let hosts: Vec<_> = made.clones.iter().map(|c| c.vm.host.clone()).collect();
    assert_eq!(hosts, ["h2", "h3", "h2", "h3"]);
    for (number, name) in clones.iter().enumerate() {
        let client = lab.client(2 + number % 2);
        assert!(holds(&client, name, 9, FIRST, 1000).await, "{name}");
        assert_eq!(tiny_ok(&client, name, &["id"]).await, (number + 1).to_string());
    }
    // Both clones of a host touched the same 1000 pages, which came once; not all of the 6000 did.
    for host in [2, 3] {
        let client = lab.client(host);
        let stats = client.stats().await.unwrap();
        let received: u64 = stats.pagers.iter().map(|p| p.counters.get("received_pages")).sum();
        assert!((1000..2000).contains(&received), "h{host} received {received} pages");
        let moved = lab.received_bytes(host).unwrap();
        assert!(moved < 1900 * 4096, "h{host} received {moved} bytes in all");
    }
    // Written on one host, never seen on another, nor at home.
    fill(&lab.client(2), &clones[0], 1, FIRST, 100).await;
    assert!(holds(&lab.client(2), &clones[2], 9, FIRST, 100).await);
    assert!(holds(&lab.client(3), &clones[1], 9, FIRST, 6000).await);
    assert!(holds(&home, "web", 9, FIRST, 6000).await);

    // A clone elsewhere can be forked itself, also back to where it came from; the page sources then are two.
    let away = lab.client(2);
    fill(&away, &clones[0], 4, FIRST + 200, 50).await;
    let (_, second) = fork(&away, &clones[0], 3, &["h1", "h2", "h3"]).await;
    for (number, name) in second.iter().enumerate() {
        let client = lab.client(1 + number);
        assert!(holds(&client, name, 1, FIRST, 100).await, "{name}");
        assert!(holds(&client, name, 9, FIRST + 100, 100).await, "{name}");
        assert!(holds(&client, name, 4, FIRST + 200, 50).await, "{name}");
        assert!(holds(&client, name, 9, FIRST + 250, 5750).await, "{name}");
        assert_eq!(vm(&client, name).await.generation, 2);
    }
    // The checkpoint is in use by VMs on other hosts.
    let (code, text) = refused(home.remove_checkpoint(&made.parent.checkpoint.id.to_string()).await);
    assert_eq!(code, ErrorCode::InUse);
    assert!(text.contains("h2") || text.contains("h3"), "{text}");
    // In the end everything can go, in the order of its use.
    for host in 1..=3 {
        for name in names(&lab.client(host)).await {
            lab.client(host).remove_vm(&name, true).await.unwrap();
        }
    }
    for host in [2, 1] {
        for checkpoint in lab.client(host).checkpoints().await.unwrap().checkpoints.iter().rev() {
            lab.client(host).remove_checkpoint(&checkpoint.id.to_string()).await.unwrap();
        }
    }
    for host in 1..=3 {
        assert_nothing_left(&lab, host).await;
    }
    lab.down().await.unwrap();
}

#[tokio::test]
async fn a_second_checkpoint_stores_only_what_changed_since_the_first() {
    let lab = lab("layers", 1).await;
    let host = lab.client(1);
    run_tiny(&host, "db").await;
    fill(&host, "db", 1, FIRST, 4000).await;
    let take = api::CheckpointRequest { note: Some("first".into()), wait: true, ..Default::default() };
    let first = host.checkpoint("db", &take).await.unwrap().checkpoint;
    fill(&host, "db", 2, FIRST + 10, 30).await;
    let second =
        host.checkpoint("db", &api::CheckpointRequest { wait: true, ..Default::default() }).await.unwrap().checkpoint;
    assert_eq!(first.note.as_deref(), Some("first"));
    let all = host.checkpoints().await.unwrap().checkpoints;
    assert_eq!(all.iter().map(|c| c.id).collect::<Vec<_>>(), [first.id, second.id]);
    let show = |id: ramet_memory::ImageId| {
        let host = host.clone();
        async move { host.checkpoint_wait(&id.to_string()).await.unwrap() }
    };
    let (first, second) = (show(first.id).await, show(second.id).await);
    assert!(first.complete && second.complete);
    assert_eq!(second.layers.len(), first.layers.len() + 1);
    let new = second.layers.last().unwrap();
    assert!((30..500).contains(&new.pages), "{new:?}");
    assert!(new.stored_bytes < 500 * 4096, "{new:?}");
    assert!(first.layers.last().unwrap().pages >= 4000);
    assert_eq!(second.base, Some(first.id));

    // Each stands for its own time.
    fill(&host, "db", 3, FIRST, 4000).await;
    for (checkpoint, changed) in [(&first, false), (&second, true)] {
        let made = host.clone_checkpoint(&checkpoint.id.to_string(), &api::CloneRequest::new(1)).await.unwrap();
        let name = &made.clones[0].vm.name;
        assert!(holds(&host, name, 1, FIRST, 10).await);
        assert_eq!(holds(&host, name, 2, FIRST + 10, 30).await, changed);
        assert_eq!(holds(&host, name, 1, FIRST + 10, 30).await, !changed);
        assert!(holds(&host, name, 1, FIRST + 40, 3960).await);
        host.remove_vm(name, true).await.unwrap();
    }
    // The second stands on the first.
    assert_eq!(refused(host.remove_checkpoint(&first.id.to_string()).await).0, ErrorCode::InUse);
    host.remove_vm("db", true).await.unwrap();
    host.remove_checkpoint(&second.id.to_string()).await.unwrap();
    host.remove_checkpoint(&first.id.to_string()).await.unwrap();
    assert_nothing_left(&lab, 1).await;
    lab.down().await.unwrap();
}

#[tokio::test]
async fn forks_of_forks_are_right_to_any_depth() {
    // Against a model: at every generation a few random pages are written before and after the fork.
    let lab = lab("depth", 2).await;
    let mut random = 0x2545_f491_4f6c_dd1d_u64;
    let mut next = move |below: u64| {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random % below
    };
    let home = lab.client(1);
    run_tiny(&home, "gen0").await;
    fill(&home, "gen0", 77, FIRST, 400).await;
    // What each page's first word should be; the rest is as filled.
    let mut model: Vec<Option<u64>> = vec![None; 400];
    let mut at = ("gen0".to_owned(), 1);
    let mut past = Vec::new();
    for generation in 1..=12u64 {
        let client = lab.client(at.1);
        for _ in 0..6 {
            let (page, value) = (next(400), next(1 << 40) + 1);
            tiny_ok(&client, &at.0, &["poke", &(FIRST + page).to_string(), &value.to_string()]).await;
            model[page as usize] = Some(value);
        }
        let host = 1 + next(2) as usize;
        let (made, clones) = fork(&client, &at.0, 1, &[&format!("h{host}")]).await;
        assert_eq!(u64::from(made.clones[0].vm.generation), generation);
        past.push((at.clone(), model.clone()));
        // The parent goes its own way; its clone must not see it.
        for _ in 0..3 {
            let (page, value) = (next(400), next(1 << 40) + 1);
            tiny_ok(&client, &at.0, &["poke", &(FIRST + page).to_string(), &value.to_string()]).await;
            past.last_mut().unwrap().1[page as usize] = Some(value);
        }
        at = (clones[0].clone(), host);
    }
    past.push((at, model));
    for ((name, host), model) in past {
        let client = lab.client(host);
        for (page, value) in model.iter().enumerate() {
            let Some(value) = value else { continue };
            let found = tiny_ok(&client, &name, &["peek", &(FIRST + page as u64).to_string()]).await;
            assert_eq!(found, value.to_string(), "{name}, page {page}");
        }
        let untouched = model.iter().position(Option::is_none).unwrap() as u64;
        assert!(holds(&client, &name, 77, FIRST + untouched, 1).await);
    }
    lab.down().await.unwrap();
}

#[tokio::test]
async fn two_processors_that_miss_the_same_page_both_go_on() {
    let lab = lab("smp", 2).await;
    let home = lab.client(1);
    home.run(&api::RunRequest { cpus: 2, ..tiny_request("smp") }).await.unwrap();
    assert_eq!(tiny_ok(&home, "smp", &["smp"]).await, "2");
    fill(&home, "smp", 3, FIRST, 3000).await;
    let (_, clones) = fork(&home, "smp", 2, &["h2", "h1"]).await;
    for (name, client) in [(&clones[0], lab.client(2)), (&clones[1], lab.client(1))] {
        // First both read the same missing pages, then both write into each of the next ones.
        tiny_ok(&client, name, &["touch-smp", &FIRST.to_string(), "1000"]).await;
        assert!(holds(&client, name, 3, FIRST, 1000).await);
        let place = (FIRST + 1000).to_string();
        tiny_ok(&client, name, &["fill-smp", "8", &place, "1000"]).await;
        tiny_ok(&client, name, &["check-smp", "8", &place, "1000"]).await;
        assert!(holds(&client, name, 3, FIRST + 2000, 1000).await);
    }
    assert!(holds(&home, "smp", 3, FIRST, 3000).await);
    lab.down().await.unwrap();
}
