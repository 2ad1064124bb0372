//! Copy-on-write disks of clones: exact, private, fetched once, and patient.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use ramet_client::{
    Client,
    api::{self, ErrorCode, VmState},
};
use ramet_lab::{Lab, LabOptions};
use ramet_memory::ByteSize;
use rustix::process::Signal;
use std::{
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use support::*;

/// A guest in memory, with the disk of a Debian image.
fn guest(name: &str) -> api::RunRequest {
    api::RunRequest {
        name: Some(name.into()),
        memory: ByteSize::mib(160),
        disk: Some("web".into()),
        network: Some(api::Egress::Off),
        wait_agent_s: 240,
        ..api::RunRequest::new("default")
    }
}

/// Boots it, and mounts its disk.
async fn boot(client: &Client, request: &api::RunRequest) -> api::VmInfo {
    let vm = client.run(request).await.unwrap();
    assert!(vm.agent, "the agent answers");
    sh(client, &vm.name, "mkdir -p /d /sums && mount -t ext4 -o noatime /dev/vda /d && mkdir /d/t").await;
    vm
}

/// Files of so many MiB, whose sums are kept in memory.
async fn files(client: &Client, vm: &str, count: u32, mib: u32) {
    let make = format!("dd if=/dev/urandom of=/d/t/f$n bs=1M count={mib} 2>/dev/null || exit 1");
    let one = format!("{make}; md5sum </d/t/f$n >/sums/f$n");
    sh(client, vm, &format!("n=0; while [ $n -lt {count} ]; do {one}; n=$((n+1)); done; sync")).await;
}

/// Writes files, each flushed to the disk, until it is told to stop. A file with a sum is whole.
async fn write_on(client: &Client, vm: &str) {
    let one = "n=$((n+1)); k=w$((n%30)); head -c $((n*7919%200000+1)) /dev/urandom >/tmp/x; rm -f /sums/$k; \
               dd if=/tmp/x of=/d/t/$k bs=64k conv=fsync 2>/dev/null; md5sum </tmp/x >/sums/.$k; mv /sums/.$k /sums/$k";
    let script = format!("touch /writes; n=0; while [ ! -e /stop ]; do {one}; done; rm /writes");
    sh(client, vm, &format!("setsid sh -c '{script}' </dev/null >/dev/null 2>&1 & sleep 0.2")).await;
    until("it writes", || async { sh(client, vm, "ls /sums | wc -l").await != "0" }).await;
}

/// The same after [`right`].
async fn write_again(client: &Client, vm: &str) {
    sh(client, vm, "rm /stop").await;
    write_on(client, vm).await;
}

/// Whether all files with a sum are right on the disk, and the guest has seen no error; how many there are.
async fn right(client: &Client, vm: &str) -> u32 {
    sh(client, vm, "touch /stop").await;
    until("it no longer writes", || async { sh(client, vm, "[ ! -e /writes ] || echo writes").await.is_empty() }).await;
    let each = "[ \"$(md5sum </d/t/$k)\" = \"$(cat /sums/$k)\" ] || echo bad $k; n=$((n+1))";
    let script = format!("n=0; for k in $(ls /sums); do {each}; done; echo $n");
    let count = sh(client, vm, &format!("sync; echo 3 >/proc/sys/vm/drop_caches; {script}")).await;
    unharmed(client, vm).await;
    count.parse().unwrap_or_else(|_| panic!("{vm}: {count}"))
}

async fn unharmed(client: &Client, vm: &str) {
    let errors = sh(client, vm, "dmesg | grep -iE 'i/o error|ext4-fs (error|warning)|remount' || true").await;
    assert_eq!(errors, "", "{vm}");
}

/// Reads a file from the disk: whether it is right.
async fn reads(client: &Client, vm: &str, file: &str) -> bool {
    let script = format!(
        "echo 3 >/proc/sys/vm/drop_caches; echo >/reads; md5sum </d/t/{file} | cmp -s - /sums/{file} && echo same"
    );
    sh(client, vm, &script).await == "same"
}

/// The same in the background, once it has begun.
async fn reading(client: &Client, vm: &str, file: &'static str) -> tokio::task::JoinHandle<bool> {
    sh(client, vm, "rm -f /reads").await;
    let (reader, name) = (client.clone(), vm.to_owned());
    let task = tokio::spawn(async move { reads(&reader, &name, file).await });
    until("it reads", || async { !sh(client, vm, "ls /reads 2>/dev/null || true").await.is_empty() }).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    task
}

fn signal(pid: u32, signal: Signal) {
    rustix::process::kill_process(rustix::process::Pid::from_raw(pid.cast_signed()).unwrap(), signal).unwrap();
}

/// The overlays of a host.
fn overlays(state_dir: &Path) -> Vec<PathBuf> {
    let of = |dir: PathBuf| fs::read_dir(dir).into_iter().flatten().flatten().map(|e| e.path());
    let families = of(state_dir.join("disks")).filter(|p| !p.ends_with("templates"));
    families.flat_map(of).collect()
}

async fn fetched(client: &Client, vm: &str) -> u64 {
    client.vm_stats(vm).await.unwrap().disk.unwrap().get("fetched_bytes")
}

/// After everything is removed no file and no process of a disk is left.
async fn all_gone(lab: &Lab, hosts: &[usize]) {
    for &host in hosts {
        let client = lab.client(host);
        for name in names(&client).await {
            client.remove_vm(&name, true).await.unwrap();
        }
    }
    until("all checkpoints are removed", || async {
        let mut left = 0;
        for &host in hosts {
            let client = lab.client(host);
            for checkpoint in client.checkpoints().await.unwrap().checkpoints {
                left += 1;
                // Those of other hosts go with their originals.
                let _ = client.remove_checkpoint(&checkpoint.id.to_string()).await;
            }
        }
        left == 0
    })
    .await;
    for &host in hosts {
        assert_nothing_left(lab, host).await;
        let dir = state_dir(lab, host).await;
        until("no overlay is left", || async { overlays(&dir).is_empty() }).await;
        until("no server of disks is left", || async {
            pids(lab, host, "ramet-disk").is_empty() && pids(lab, host, "qemu-storage-daemon").is_empty()
        })
        .await;
        let left: Vec<_> = fs::read_dir(dir.join("disk")).into_iter().flatten().flatten().map(|e| e.path()).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

#[tokio::test]
async fn disks_of_clones_are_exact_and_private_on_all_hosts() {
    let lab = lab("disks", 3).await;
    let (h1, h2, h3) = (lab.client(1), lab.client(2), lab.client(3));
    // Without it the kernel fills a page before a disk does; with it a disk is the first to touch it.
    let request =
        api::RunRequest { append: Some("init_on_alloc=0".into()), volumes: vec!["web".into()], ..guest("web") };
    boot(&h1, &request).await;
    files(&h1, "web", 2, 12).await;
    write_on(&h1, "web").await;
    let volume = "dd if=/dev/vdb bs=64k count=64 2>/dev/null | md5sum";
    let golden = sh(&h1, "web", volume).await;

    // Under load.
    for _ in 0..2 {
        h1.checkpoint("web", &api::CheckpointRequest::default()).await.unwrap();
    }
    let (_, made) = fork(&h1, "web", 3, &["h1", "h2", "h2"]).await;
    let (_, later) = fork(&h1, "web", 1, &["h2"]).await;
    let all = [(&h1, &made[0]), (&h2, &made[1]), (&h2, &made[2]), (&h2, &later[0])];
    for (client, name) in all {
        assert!(right(client, name).await >= 2, "{name}");
        // Past the page cache, and what was never read here.
        let direct = "dd if=/d/t/f1 bs=1M iflag=direct 2>/dev/null | md5sum | cmp - /sums/f1 && echo same";
        assert_eq!(sh(client, name, direct).await, "same", "{name}");
        assert_eq!(sh(client, name, volume).await, golden, "{name}: its data volume");
        let write = "dd if=/dev/zero of=/dev/vdb bs=4k count=1 2>/dev/null && echo written || echo refused";
        assert_eq!(sh(client, name, write).await, "refused", "{name}: its data volume");
        sh(client, name, &format!("echo {name} >/d/own; sync")).await;
    }
    for (client, name) in all {
        let own = sh(client, name, "echo 3 >/proc/sys/vm/drop_caches; cat /d/own").await;
        assert_eq!(own, *name, "what one wrote is its own");
    }
    assert_eq!(sh(&h1, "web", "ls /d/own 2>/dev/null || echo none").await, "none");
    let disk = vm(&h2, &made[1]).await.disk.unwrap();
    assert!(disk.remote && disk.written_bytes > 0, "{disk:?}");

    // From host to host and back, each time with something new, while the one before reads.
    let busy = reading(&h2, &made[1], "f0").await;
    let (_, second) = fork(&h2, &made[1], 1, &["h3"]).await;
    assert!(busy.await.unwrap());
    write_again(&h3, &second[0]).await;
    let (_, third) = fork(&h3, &second[0], 2, &["h1", "h3"]).await;
    sh(&h1, &third[0], &format!("cat /d/own; echo {} >/d/third; sync", third[0])).await;
    // A server in the middle dies: its own host's clones and those of the next host wait for the next one.
    let (here, there) = (reading(&h2, &later[0], "f1").await, reading(&h3, &third[1], "f1").await);
    pids(&lab, 2, "ramet-disk").into_iter().for_each(kill);
    assert!(here.await.unwrap() && there.await.unwrap());
    for (client, name) in [(&h3, &second[0]), (&h1, &third[0]), (&h3, &third[1])] {
        assert!(right(client, name).await >= 2, "{name}");
        assert_eq!(sh(client, name, "cat /d/own").await, made[1], "of the clone that it is a clone of");
        assert_eq!(sh(client, name, volume).await, golden, "{name}: its data volume");
    }
    assert_eq!(sh(&h3, &third[1], "ls /d/third 2>/dev/null || echo none").await, "none");
    assert!(right(&h1, "web").await >= 2);

    // What a clone wrote goes with it.
    let dir = state_dir(&lab, 2).await;
    let before = overlays(&dir).len();
    h2.remove_vm(&made[2], true).await.unwrap();
    until("its overlay is gone", || async { overlays(&dir).len() == before - 1 }).await;
    assert!(reads(&h2, &made[1], "f1").await);
    all_gone(&lab, &[1, 2, 3]).await;
    lab.down().await.unwrap();
}

#[tokio::test]
async fn a_web_server_on_a_disk_fetches_little_and_its_sibling_nothing() {
    let lab = lab("web", 2).await;
    let (home, away) = (lab.client(1), lab.client(2));
    let request = api::RunRequest {
        name: Some("web".into()),
        network: Some(api::Egress::Off),
        wait_agent_s: 300,
        ..api::RunRequest::new("web")
    };
    assert!(home.run(&request).await.unwrap().agent, "the agent answers");
    let get = "curl -s -o /dev/null -w '%{http_code}' http://127.0.0.1/ || true";
    until("it serves", || async { sh(&home, "web", get).await == "200" }).await;
    let note =
        "head -c 3M /dev/urandom >/var/note; md5sum </var/note >/dev/shm/sum; sync; echo 3 >/proc/sys/vm/drop_caches";
    sh(&home, "web", note).await;
    let (_, made) = fork(&home, "web", 2, &["h2"]).await;
    assert_eq!(sh(&away, &made[0], get).await, "200");
    let first = fetched(&away, &made[0]).await;
    eprintln!("fetched from disk until the first answer: {first} bytes");
    assert!(first < 8 << 20, "{first} bytes of 2 GiB");
    assert_eq!(sh(&away, &made[1], get).await, "200");
    // All of what the other one read: nothing is fetched twice, nor what is as in the image.
    let read = "md5sum </var/note | cmp - /dev/shm/sum && cat /usr/lib/x86_64-linux-gnu/lib*.so* | wc -c";
    let size = sh(&away, &made[0], read).await;
    let before = fetched(&away, &made[0]).await;
    eprintln!("fetched for a file of 3 MiB and {size} bytes of libraries: {before} bytes");
    assert!((3 << 20..6 << 20).contains(&before) && size.parse::<u64>().unwrap() > 8 << 20, "{before} {size}");
    let stats = away.vm_stats(&made[0]).await.unwrap().disk.unwrap();
    assert!(stats.get("golden_bytes") > 8 << 20, "what is as in the image is read from this host's: {stats:?}");
    sh(&away, &made[1], "echo 3 >/proc/sys/vm/drop_caches").await;
    assert_eq!(sh(&away, &made[1], read).await, size);
    let after = fetched(&away, &made[1]).await;
    assert!(after < before + (256 << 10), "the sibling fetched {} bytes", after - before);
    let host = away.stats().await.unwrap();
    let family = host.pagers.iter().find_map(|p| p.disk.clone()).unwrap();
    assert!(family.get("fetched_bytes") >= after && family.get("remote_disks") == 1, "{family:?}");
    assert!(home.stats().await.unwrap().pagers[0].disk.as_ref().unwrap().get("served_bytes") >= after);
    lab.down().await.unwrap();
}

#[tokio::test]
async fn guests_wait_for_servers_of_disks_that_die_or_are_silent() {
    let lab = lab("diskfault", 2).await;
    let (home, away) = (lab.client(1), lab.client(2));
    boot(&home, &guest("web")).await;
    files(&home, "web", 4, 6).await;
    let (_, made) = fork(&home, "web", 1, &["h2"]).await;
    let name = made[0].as_str();
    let disk_server = |host: usize| pids(&lab, host, "ramet-disk")[0];

    // The source dies while it is read from.
    let server = disk_server(1);
    signal(server, Signal::STOP);
    let read = reading(&away, name, "f0").await;
    kill(server);
    assert!(read.await.unwrap());
    let is_another = || async { pids(&lab, 1, "ramet-disk").first().is_some_and(|pid| *pid != server) };
    until("another one serves", is_another).await;

    // It is silent, and goes on.
    let server = disk_server(1);
    signal(server, Signal::STOP);
    let read = reading(&away, name, "f1").await;
    until("the clone is stalled", || async { vm(&away, name).await.state == VmState::Stalled }).await;
    let info = vm(&away, name).await;
    assert!(info.state_reason.as_ref().unwrap().contains("disk"), "{info:?}");
    assert!(names(&away).await.contains(&made[0]) && !read.is_finished());
    signal(server, Signal::CONT);
    assert!(read.await.unwrap());
    until("the clone runs", || async { vm(&away, name).await.state == VmState::Running }).await;

    // The server on the clone's own host dies with reads under way: QEMU stops the guest, the daemon has it go on.
    let server = disk_server(2);
    signal(server, Signal::STOP);
    let read = reading(&away, name, "f2").await;
    kill(server);
    assert!(read.await.unwrap());
    assert!(lab.log_tail(2, 500).unwrap().contains("the VM's disk failed; it waits"), "it was stopped");
    until("the clone runs", || async { vm(&away, name).await.state == VmState::Running }).await;

    // Out of reach, for memory, too.
    lab.cut(1).unwrap();
    let (reader, clone) = (away.clone(), made[0].clone());
    let read = tokio::spawn(async move { reads(&reader, &clone, "f3").await });
    until("the clone is stalled", || async { vm(&away, name).await.state == VmState::Stalled }).await;
    lab.heal(1).unwrap();
    assert!(read.await.unwrap());
    assert_eq!(right(&away, name).await, 4);
    assert_eq!(right(&home, "web").await, 4);
    lab.down().await.unwrap();
}

#[tokio::test]
async fn hosts_get_from_one_another_what_they_have_of_a_disk_when_its_own_is_away() {
    let mut lab = lab("disksources", 3).await;
    let (home, near, far) = (lab.client(1), lab.client(2), lab.client(3));
    boot(&home, &guest("web")).await;
    files(&home, "web", 3, 6).await;
    let (made, first) = fork(&home, "web", 1, &["h2"]).await;
    assert!(reads(&near, &first[0], "f0").await);
    let id = made.parent.checkpoint.id.to_string();
    let later = home.clone_checkpoint(&id, &clones(1, &["h3"])).await.unwrap().clones.remove(0).vm.name;
    // Those before hear of those after them, and the other way round.
    let counter = |client: &Client, vm: &str, name: &'static str| {
        let (client, vm) = (client.clone(), vm.to_owned());
        async move { client.vm_stats(&vm).await.unwrap().disk.unwrap().get(name) }
    };
    for (client, name) in [(&near, &first[0]), (&far, &later)] {
        until("it knows of both", || async { counter(client, name, "sources").await == 2 }).await;
    }
    let server = pids(&lab, 1, "ramet-disk")[0];
    signal(server, Signal::STOP);
    assert!(reads(&far, &later, "f0").await, "what one has, the other gets");
    let passed_on = counter(&near, &first[0], "passed_on_bytes").await;
    assert!(passed_on >= 6 << 20, "{passed_on}");
    // And the other way round, while nobody has the rest: that is waited for.
    let read = reading(&near, &first[0], "f1").await;
    until("the clone is stalled", || async { vm(&near, &first[0]).await.state == VmState::Stalled }).await;
    assert!(!read.is_finished());
    // The daemon there dies, too, and finds again who has what.
    signal(server, Signal::CONT);
    assert!(read.await.unwrap());
    lab.kill_host_daemon(1).unwrap();
    lab.restart_host_daemon(1).await.unwrap();
    let home = lab.client(1);
    let third = home.clone_checkpoint(&id, &clones(1, &["h3"])).await.unwrap().clones.remove(0).vm.name;
    until("it knows of both", || async { counter(&far, &third, "sources").await == 2 }).await;
    signal(pids(&lab, 1, "ramet-disk")[0], Signal::STOP);
    assert!(reads(&far, &third, "f1").await);
    signal(pids(&lab, 1, "ramet-disk")[0], Signal::CONT);
    for (client, name) in [(&near, &first[0]), (&far, &later), (&far, &third)] {
        unharmed(client, name).await;
    }
    all_gone(&lab, &[1, 2, 3]).await;
    lab.down().await.unwrap();
}

#[tokio::test]
async fn a_host_without_room_for_a_disk_stalls_who_writes_and_nobody_else() {
    let lab = lab("diskfull", 1).await;
    let home = lab.client(1);
    let disks = state_dir(&lab, 1).await.join("disks");
    let mount = |options: &str| {
        let done =
            std::process::Command::new("mount").args(["-t", "tmpfs", "-o", options, "ramet-test"]).arg(&disks).status();
        assert!(done.unwrap().success());
    };
    fs::create_dir_all(&disks).unwrap();
    // The lab's end unmounts it.
    mount("size=24m,mode=0755");
    boot(&home, &guest("web")).await;
    files(&home, "web", 1, 2).await;
    let (_, made) = fork(&home, "web", 1, &[]).await;
    let (writer, name) = (home.clone(), made[0].clone());
    let write = tokio::spawn(async move { files(&writer, &name, 3, 10).await });
    until("it is stalled", || async { vm(&home, &made[0]).await.state == VmState::Stalled }).await;
    let reason = vm(&home, &made[0]).await.state_reason.unwrap();
    assert!(reason.contains("room"), "{reason}");
    assert!(reads(&home, "web", "f0").await, "others go on");
    assert_eq!(vm(&home, "web").await.state, VmState::Running);
    assert!(!write.is_finished());
    let before = overlays(&disks.join("..")).len();
    let (_, text) = refused(home.checkpoint("web", &api::CheckpointRequest::default()).await);
    assert!(text.contains("room") || text.contains("space"), "{text}");
    assert_eq!(overlays(&disks.join("..")).len(), before);
    mount("remount,size=96m");
    write.await.unwrap();
    until("it goes on", || async { vm(&home, &made[0]).await.state == VmState::Running }).await;
    assert_eq!(right(&home, &made[0]).await, 3);
    assert_eq!(right(&home, "web").await, 1);
    all_gone(&lab, &[1]).await;
    lab.down().await.unwrap();
}

/// Clones of some checkpoints, on both hosts, still are what they were; then all checkpoints go, the newest first.
async fn right_and_removed(home: &Client, away: &Client, taken: &[String], some: [&String; 2]) {
    for id in some {
        let clone = home.clone_checkpoint(id, &clones(2, &["h1", "h2"])).await.unwrap().clones;
        for (client, clone) in [(home, &clone[0]), (away, &clone[1])] {
            assert!(right(client, &clone.vm.name).await >= 1);
            client.remove_vm(&clone.vm.name, true).await.unwrap();
        }
    }
    for id in taken.iter().rev() {
        home.remove_checkpoint(id).await.unwrap();
    }
}

#[tokio::test]
async fn chains_of_checkpoints_are_right_and_failed_ones_leave_nothing() {
    let mut lab = lab("chain", 2).await;
    let (home, away) = (lab.client(1), lab.client(2));
    let dir = state_dir(&lab, 1).await;
    boot(&home, &guest("web")).await;
    files(&home, "web", 1, 8).await;
    write_on(&home, "web").await;
    let take = || async { home.checkpoint("web", &api::CheckpointRequest::default()).await };
    let layers = || async { vm(&home, "web").await.disk.unwrap().layers };
    let mut taken = Vec::new();
    for _ in 0..10 {
        taken.push(take().await.unwrap().checkpoint.id.to_string());
    }
    // The last ones come while layers are being merged.
    until("layers are merged", || async { layers().await < 8 }).await;
    // The first and the last still are what they were.
    right_and_removed(&home, &away, &taken, [&taken[0], &taken[9]]).await;
    // Merged again and again, while the guest writes and checkpoints are taken.
    let (mut taken, mut most) = (Vec::new(), 0);
    for _ in 0..30 {
        taken.push(take().await.unwrap().checkpoint.id.to_string());
        most = most.max(layers().await);
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    until("layers are merged", || async { layers().await < 8 }).await;
    let merges = lab.log_tail(1, 100_000).unwrap().matches("merged layers of a disk").count();
    eprintln!("{merges} merges of layers, {most} layers at most");
    assert!(merges >= 3 && most < 30, "{merges} merges, {most} layers");
    right_and_removed(&home, &away, &taken, [&taken[9], &taken[29]]).await;
    assert!(right(&home, "web").await >= 1);
    until("old layers are gone", || async { overlays(&dir).len() == layers().await as usize + 1 }).await;
    write_again(&home, "web").await;

    // A checkpoint fails before its pause: there is no place for the overlay.
    let family = dir.join("disks").join(vm(&home, "web").await.family.to_string());
    let aside = dir.join("disks-aside");
    fs::rename(&family, &aside).unwrap();
    fs::write(&family, "").unwrap();
    take().await.unwrap_err();
    fs::remove_file(&family).unwrap();
    fs::rename(&aside, &family).unwrap();
    // After it: there is none for the devices' state.
    let before = layers().await;
    let states = dir.join("checkpoints");
    fs::rename(&states, &aside).unwrap();
    take().await.unwrap_err();
    fs::rename(&aside, &states).unwrap();
    // Or to the one after it, when it wrote until it stood still.
    assert!((before + 1..=before + 2).contains(&layers().await), "the VM writes to the new overlay");
    // In the middle, wherever that is.
    for pause in [0, 40, 80, 120] {
        let kill_pager = async {
            tokio::time::sleep(Duration::from_millis(pause)).await;
            pids(&lab, 1, "ramet-pager").into_iter().for_each(kill);
        };
        let (taken, ()) = tokio::join!(take(), kill_pager);
        if let Ok(taken) = taken {
            home.remove_checkpoint(&taken.checkpoint.id.to_string()).await.unwrap();
        }
        until("a new pager serves", || async { !pids(&lab, 1, "ramet-pager").is_empty() }).await;
    }
    assert!(home.checkpoints().await.unwrap().checkpoints.is_empty());
    // Layers may be merged once more.
    tokio::time::sleep(Duration::from_secs(3)).await;
    until("only the VM's overlays are left", || async { overlays(&dir).len() == layers().await as usize + 1 }).await;

    // The daemon dies. What it had prepared goes, disks are found again.
    let (_, made) = fork(&home, "web", 2, &["h1", "h2"]).await;
    let id = home.checkpoints().await.unwrap().checkpoints[0].id.to_string();
    let request = api::PoolRequest { like: id.clone(), count: 2, hosts: vec!["h1".into()], wait: true };
    home.warm(&request).await.unwrap();
    let layers_before = layers().await as usize;
    assert_eq!(overlays(&dir).len(), layers_before + 4, "of the VM, its clone and two prepared ones");
    // Meanwhile the server of the clone's disk dies, with a read under way.
    let server = pids(&lab, 2, "ramet-disk")[0];
    signal(server, Signal::STOP);
    let read = "md5sum </d/t/f0 | cmp - /sums/f0 && touch /read";
    sh(
        &away,
        &made[1],
        &format!("echo 3 >/proc/sys/vm/drop_caches; setsid sh -c '{read}' </dev/null >/dev/null 2>&1 &"),
    )
    .await;
    tokio::time::sleep(Duration::from_millis(500)).await;
    lab.kill_host_daemon(1).unwrap();
    lab.kill_host_daemon(2).unwrap();
    kill(server);
    lab.restart_host_daemon(1).await.unwrap();
    lab.restart_host_daemon(2).await.unwrap();
    let (home, away) = (lab.client(1), lab.client(2));
    until("the read is done", || async { sh(&away, &made[1], "ls /read 2>/dev/null || true").await == "/read" }).await;
    until("the overlays of prepared clones are gone", || async { overlays(&dir).len() == layers_before + 2 }).await;
    let more = home.clone_checkpoint(&id, &clones(2, &["h1", "h2"])).await.unwrap().clones;
    for (client, name) in [(&home, &made[0]), (&away, &made[1]), (&home, &more[0].vm.name), (&away, &more[1].vm.name)] {
        assert!(right(client, name).await >= 1, "{name}");
    }
    home.checkpoint("web", &api::CheckpointRequest::default()).await.unwrap();
    assert!(right(&home, "web").await >= 1);
    // A chain over another host's disk.
    write_again(&away, &made[1]).await;
    for _ in 0..9 {
        away.checkpoint(&made[1], &api::CheckpointRequest::default()).await.unwrap();
    }
    until("layers are merged", || async { vm(&away, &made[1]).await.disk.unwrap().layers < 8 }).await;
    let (_, last) = fork(&away, &made[1], 1, &["h1"]).await;
    assert!(right(&home, &last[0]).await >= 1 && right(&away, &made[1]).await >= 1);
    all_gone(&lab, &[1, 2]).await;
    lab.down().await.unwrap();
}

/// A small tmpfs; it goes with this.
struct Small(tempfile::TempDir);

impl Small {
    fn new(size: &str) -> Self {
        let small = Self(tempfile::tempdir().unwrap());
        small.mount(&format!("size={size},mode=0755"));
        small
    }

    fn mount(&self, options: &str) {
        let words = ["-t", "tmpfs", "-o", options, "ramet-test"];
        assert!(std::process::Command::new("mount").args(words).arg(self.0.path()).status().unwrap().success());
    }
}

impl Drop for Small {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg("-l").arg(self.0.path()).status();
    }
}

/// Has a lab use a store of images of its own, with those that the tests need.
fn use_images_in(dir: &Path, options: &mut LabOptions) {
    for name in ["default", "web"] {
        std::os::unix::fs::symlink(options.image_dir.join(name), dir.join(name)).unwrap();
    }
    options.image_dir = dir.to_owned();
}

/// What is in a store of images.
fn stored(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap().flatten().map(|e| e.file_name().into_string().unwrap());
    let mut names: Vec<_> = names.filter(|name| name != ".lock").collect();
    names.sort();
    names
}

#[tokio::test]
async fn a_disk_that_is_kept_is_an_image_and_one_that_cannot_be_is_as_it_was() {
    // A store of images of its own, in which nothing has room.
    let images = Small::new("120m");
    let mut options = LabOptions::for_test("keep").unwrap().hosts(2).daemon_arg("--pool").daemon_arg("0");
    use_images_in(images.0.path(), &mut options);
    let lab = Lab::up(&options).await.unwrap();
    let (home, away) = (lab.client(1), lab.client(2));
    let stored = || stored(images.0.path());
    boot(&home, &guest("web")).await;
    files(&home, "web", 2, 6).await;
    home.run(&api::RunRequest { disk: None, ..guest("none") }).await.unwrap();
    let (_, made) = fork(&home, "web", 2, &["h2", "h1"]).await;
    let (far, near) = (&*made[0], &*made[1]);
    sh(&away, far, "echo far >/d/t/own; rm /d/t/f1 /sums/f1").await;

    // What can't be done, and everybody goes on.
    let keep = async |client: &Client, vm: &str, image: &str, force| {
        refused(client.remove_vm_keeping_disk(vm, image, force).await)
    };
    assert_eq!(keep(&home, "web", "web", false).await.0, ErrorCode::NameTaken);
    assert_eq!(keep(&home, "web", "../x", false).await.0, ErrorCode::BadName);
    assert_eq!(keep(&home, "none", "x", false).await.0, ErrorCode::BadRequest);
    let (code, text) = keep(&home, "web", "x", false).await;
    assert!(code == ErrorCode::LimitReached && text.contains("room"), "{code:?} {text}");
    // Here the room ends in the middle: what another host has is not counted before.
    let (_, text) = keep(&away, far, "x", false).await;
    assert!(text.contains("qemu-img") && text.contains("space"), "{text}");
    sh(&away, far, "mkdir -p /etc/ramet/checkpoint.d").await;
    put(&away, far, "/etc/ramet/checkpoint.d/50-no", 0o755, "#!/bin/sh\nexit 1\n").await;
    let (_, text) = keep(&away, far, "x", false).await;
    assert!(text.contains("50-no"), "{text}");
    home.stop(near, &api::StopRequest { grace_s: 0 }).await.unwrap();
    assert_eq!(keep(&home, near, "x", false).await.0, ErrorCode::WrongState);
    assert_eq!(stored(), ["default", "web"]);
    assert_eq!((right(&home, "web").await, right(&away, far).await), (2, 1));
    assert_eq!(vm(&away, far).await.state, VmState::Running);

    // A clone's disk over that of another host; then one here, while it writes.
    images.mount("remount,size=4g");
    sh(&away, far, "sync; rm /etc/ramet/checkpoint.d/50-no").await;
    let sum = sh(&away, far, "cat /sums/f0").await;
    // What the other host has does not come: the VM is not held up for ever.
    let server = pids(&lab, 1, "ramet-disk")[0];
    signal(server, Signal::STOP);
    let (_, text) = keep(&away, far, "x", true).await;
    signal(server, Signal::CONT);
    assert!(text.contains("it waits for another host"), "{text}");
    assert_eq!(right(&away, far).await, 1);
    assert_eq!(stored(), ["default", "web"]);
    away.remove_vm_keeping_disk(far, "far", false).await.unwrap();
    assert!(names(&away).await.is_empty());
    write_again(&home, "web").await;
    let (watcher, done) = (home.clone(), Arc::new(AtomicBool::new(false)));
    let ended = done.clone();
    let watch = tokio::spawn(async move {
        let mut seen = Vec::new();
        while !ended.load(Ordering::Acquire) {
            seen.extend(watcher.vm("web").await.ok().and_then(|vm| Some((vm.state, vm.state_reason?))));
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        seen
    });
    home.remove_vm_keeping_disk("web", "near", false).await.unwrap();
    done.store(true, Ordering::Release);
    let seen = watch.await.unwrap();
    assert!(seen.iter().any(|(state, why)| *state == VmState::Paused && why.contains("'near'")), "{seen:?}");
    assert_eq!(stored(), ["default", "far", "near", "web"]);
    for (client, name) in [(&home, "near"), (&away, "far")] {
        let request = api::RunRequest { disk: None, name: Some(name.into()), ..guest(name) };
        let vm = client.run(&api::RunRequest { image: name.into(), ..request }).await.unwrap();
        assert_eq!(vm.disk.unwrap().image, name);
        sh(client, name, "mkdir /d && mount -t ext4 /dev/vda /d").await;
        assert_eq!(sh(client, name, "md5sum </d/t/f0").await, sum);
    }
    assert_eq!(sh(&home, "near", "[ -s /d/t/f1 ] && [ ! -e /d/t/own ] && echo right").await, "right");
    assert_eq!(sh(&away, "far", "[ ! -e /d/t/f1 ] && cat /d/t/own").await, "far");
    all_gone(&lab, &[1, 2]).await;
    lab.down().await.unwrap();
}

/// Wherever in the keeping of a disk, or in the merging of layers: the VM goes on with the disk it had, and both can be done.
#[tokio::test]
async fn the_daemon_dies_while_a_disk_is_kept_or_layers_are_merged() {
    let images = tempfile::tempdir().unwrap();
    let mut options = LabOptions::for_test("midway").unwrap().hosts(1).daemon_arg("--pool").daemon_arg("0");
    use_images_in(images.path(), &mut options);
    options = options.daemon_arg("--merge-layers").daemon_arg("3");
    let mut lab = Lab::up(&options).await.unwrap();
    let home = lab.client(1);
    let dir = state_dir(&lab, 1).await;
    let web = boot(&home, &guest("web")).await.id.to_string();
    files(&home, "web", 2, 6).await;

    for part in ["'kept'", "%"] {
        let keeping = tokio::spawn({
            let home = home.clone();
            async move { home.remove_vm_keeping_disk("web", "kept", false).await }
        });
        until("the disk is being kept", || async {
            let now = vm(&home, "web").await;
            now.state == VmState::Paused && now.state_reason.is_some_and(|why| why.contains(part))
        })
        .await;
        lab.kill_host_daemon(1).unwrap();
        keeping.await.unwrap().unwrap_err();
        lab.restart_host_daemon(1).await.unwrap();
        until("it runs again", || async { vm(&home, "web").await.state == VmState::Running }).await;
        assert_eq!(right(&home, "web").await, 2);
        assert_eq!(stored(images.path()), ["default", "web"]);
    }

    let layers = || async { vm(&home, "web").await.disk.unwrap().layers };
    // From the beginning of a merged layer's file on, or from its record on.
    for (moment, pause) in [(0, 0), (1, 0), (0, 30), (1, 2), (1, 4), (1, 8)] {
        write_again(&home, "web").await;
        let mut taken = Vec::new();
        while layers().await < 3 || taken.is_empty() {
            taken.push(
                home.checkpoint("web", &api::CheckpointRequest::default()).await.unwrap().checkpoint.id.to_string(),
            );
        }
        if moment == 0 {
            let before = layers().await as usize + 1;
            until("a merged layer is being written", || async { overlays(&dir).len() > before }).await;
        } else {
            until_recorded(&dir, "a merged layer is to be used", |state| {
                !state["vms"][&web]["disk"]["merging"].is_null()
            })
            .await;
        }
        tokio::time::sleep(Duration::from_millis(pause)).await;
        lab.kill_host_daemon(1).unwrap();
        lab.restart_host_daemon(1).await.unwrap();
        until("it runs", || async { vm(&home, "web").await.state == VmState::Running }).await;
        assert!(right(&home, "web").await >= 2);
        for id in taken.iter().rev() {
            home.remove_checkpoint(id).await.unwrap();
        }
        // The next checkpoint has layers merged that were not.
        let last = home.checkpoint("web", &api::CheckpointRequest::default()).await.unwrap().checkpoint.id;
        until("layers are merged", || async { layers().await < 3 }).await;
        home.remove_checkpoint(&last.to_string()).await.unwrap();
        assert!(right(&home, "web").await >= 2);
        until("old layers are gone", || async { overlays(&dir).len() == layers().await as usize + 1 }).await;
    }
    home.remove_vm_keeping_disk("web", "kept", false).await.unwrap();
    assert!(images.path().join("kept").exists());
    all_gone(&lab, &[1]).await;
    lab.down().await.unwrap();
}
