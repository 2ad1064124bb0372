//! Everything that a user can get wrong: refused with an error that names the thing and the remedy, and nothing stays.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use ramet_client::api::{self, ErrorCode, VmState};
use ramet_memory::ByteSize;
use support::*;

#[tokio::test]
async fn wrong_and_double_names_are_refused() {
    let lab = lab("names", 2).await;
    let host = lab.client(1);
    run_tiny(&host, "web").await;
    let (code, text) = refused(host.run(&tiny_request("web")).await);
    assert_eq!(code, ErrorCode::NameTaken);
    assert!(text.contains("'web'"), "{text}");
    for bad in ["", "a b", "../x", "-x", &"x".repeat(64)] {
        assert_eq!(refused(host.run(&tiny_request(bad)).await).0, ErrorCode::BadName, "{bad:?}");
    }
    for result in [
        host.vm("nosuch").await.map(drop),
        host.remove_vm("nosuch", false).await,
        host.vm_stats("nosuch").await.map(drop),
        host.fork("nosuch", &fork_of(clones(1, &[]))).await.map(drop),
        host.exec_collect("nosuch", ["true"]).await.map(drop),
        host.remove_checkpoint("00000000").await,
        host.clone_checkpoint("00000000", &clones(1, &[])).await.map(drop),
    ] {
        let (code, text) = refused(result);
        assert_eq!(code, ErrorCode::NotFound, "{text}");
        assert!(text.contains("nosuch") || text.contains("00000000"), "the error names it: {text}");
    }
    // Forks: a taken name, a name twice, more names than clones, a host that is none, nothing at all, too many.
    let named = |names: &[&str], hosts: &[&str]| api::CloneRequest {
        names: names.iter().map(|&n| n.to_owned()).collect(),
        ..clones(2, hosts)
    };
    for (request, code) in [
        (named(&["web"], &[]), ErrorCode::NameTaken),
        (named(&["a", "a"], &[]), ErrorCode::NameTaken),
        (named(&["a", "b", "c"], &[]), ErrorCode::BadRequest),
        (named(&["a/b"], &[]), ErrorCode::BadName),
        (clones(0, &[]), ErrorCode::BadRequest),
        (clones(1_000_000, &[]), ErrorCode::LimitReached),
        (clones(2, &["h1", "h9"]), ErrorCode::NotFound),
    ] {
        let (found, text) = refused(host.fork("web", &fork_of(request.clone())).await);
        assert_eq!(found, code, "{request:?}: {text}");
    }
    assert_eq!(names(&host).await, ["web"]);
    assert!(host.checkpoints().await.unwrap().checkpoints.is_empty(), "a refused fork leaves no checkpoint");
    assert_eq!(names(&lab.client(2)).await, Vec::<String>::new());
    // A running VM is not removed by accident.
    assert_eq!(refused(host.remove_vm("web", false).await).0, ErrorCode::InUse);
    host.remove_vm("web", true).await.unwrap();
    assert_nothing_left(&lab, 1).await;
    lab.down().await.unwrap();
}

#[tokio::test]
async fn a_name_taken_on_another_host_undoes_the_whole_fork() {
    let lab = lab("undo", 2).await;
    let (home, away) = (lab.client(1), lab.client(2));
    run_tiny(&home, "web").await;
    run_tiny(&away, "taken").await;
    let request = api::CloneRequest { names: vec!["mine".into(), "taken".into()], ..clones(2, &["h1", "h2"]) };
    let (code, text) = refused(home.fork("web", &fork_of(request)).await);
    assert_eq!(code, ErrorCode::NameTaken);
    assert!(text.contains("'taken'") && text.contains("h2"), "{text}");
    assert_eq!((names(&home).await, names(&away).await), (vec!["web".to_owned()], vec!["taken".to_owned()]));
    assert!(home.checkpoints().await.unwrap().checkpoints.is_empty());
    // A host that dies away in the middle: cut off, not refused.
    lab.cut(2).unwrap();
    let failed = tokio::time::timeout(LIMIT, home.fork("web", &fork_of(clones(2, &["h1", "h2"])))).await.unwrap();
    let (code, text) = refused(failed);
    assert!(matches!(code, ErrorCode::HostUnreachable | ErrorCode::ForkFailed), "{code:?} {text}");
    assert!(text.contains("h2"), "{text}");
    assert_eq!(names(&home).await, ["web"]);
    lab.heal(2).unwrap();
    assert_eq!(vm(&home, "web").await.state, VmState::Running);
    let before = count(&home, "web").await;
    until("the parent goes on", || async { count(&home, "web").await > before }).await;
    // And then it works.
    until("h2 is back", || async { home.fork("web", &fork_of(clones(2, &["h1", "h2"]))).await.is_ok() }).await;
    assert_eq!(names(&away).await.len(), 2);
    lab.down().await.unwrap();
}

#[tokio::test]
async fn memory_limits_and_depth_are_kept() {
    let options = ramet_lab::LabOptions::for_test("limits").unwrap().hosts(1).daemon_arg("--pool").daemon_arg("0");
    let options = options.daemon_arg("--max-depth").daemon_arg("2").daemon_arg("--max-clones").daemon_arg("3");
    let lab = ramet_lab::Lab::up(&options.daemon_arg("--max-memory").daemon_arg("32T")).await.unwrap();
    let host = lab.client(1);
    let huge = api::RunRequest { memory: ByteSize::mib(16 << 20), ..tiny_request("huge") };
    let (code, text) = refused(host.run(&huge).await);
    assert_eq!(code, ErrorCode::NoMemory, "{text}");
    assert!(text.contains("huge") && text.contains("16."), "{text}");
    let (code, text) =
        refused(host.run(&api::RunRequest { memory: ByteSize::mib(64 << 20), ..tiny_request("more") }).await);
    assert_eq!(code, ErrorCode::LimitReached, "{text}");
    for odd in [ByteSize(0), ByteSize(12_345)] {
        let (code, _) = refused(host.run(&api::RunRequest { memory: odd, ..tiny_request("odd") }).await);
        assert!(matches!(code, ErrorCode::BadRequest | ErrorCode::LimitReached), "{odd}: {code:?}");
    }
    assert_eq!(names(&host).await, Vec::<String>::new());
    run_tiny(&host, "a").await;
    assert_eq!(refused(host.fork("a", &fork_of(clones(4, &[]))).await).0, ErrorCode::LimitReached);
    let (_, b) = fork(&host, "a", 1, &[]).await;
    let (_, c) = fork(&host, &b[0], 1, &[]).await;
    let (code, text) = refused(host.fork(&c[0], &fork_of(clones(1, &[]))).await);
    assert_eq!(code, ErrorCode::LimitReached);
    assert!(text.contains("--max-depth"), "{text}");
    lab.down().await.unwrap();
}

#[tokio::test]
async fn images_that_are_missing_or_cut_short_are_refused() {
    let images = tempfile::tempdir().unwrap();
    let mut options = ramet_lab::LabOptions::for_test("images").unwrap().hosts(1).daemon_arg("--pool").daemon_arg("0");
    let whole = options.image_dir.join("tiny");
    assert!(whole.join("image.json").exists(), "the images are built: `cargo xtask setup`");
    for name in ["tiny", "cut"] {
        std::fs::create_dir(images.path().join(name)).unwrap();
        for file in ["kernel", "image.json"] {
            std::fs::copy(whole.join(file), images.path().join(name).join(file)).unwrap();
        }
    }
    let json = images.path().join("cut/image.json");
    std::fs::write(&json, std::fs::read_to_string(&json).unwrap().replace("\"name\": \"tiny\"", "\"name\": \"cut\""))
        .unwrap();
    options.image_dir = images.path().to_owned();
    let lab = ramet_lab::Lab::up(&options).await.unwrap();
    let host = lab.client(1);
    let kernel = std::fs::File::options().write(true).open(images.path().join("cut/kernel")).unwrap();
    kernel.set_len(1000).unwrap();
    let of = |image: &str| api::RunRequest { image: image.into(), ..tiny_request("x") };
    let (code, text) = refused(host.run(&of("nosuch")).await);
    assert_eq!(code, ErrorCode::NotFound);
    assert!(text.contains("nosuch") && text.contains("ramet image"), "{text}");
    let (_, text) = refused(host.run(&of("cut")).await);
    assert!(text.contains("kernel") && text.contains("1000 bytes") && text.contains("ramet image"), "{text}");
    assert_eq!(names(&host).await, Vec::<String>::new());
    let listed = host.images().await.unwrap().images;
    assert!(listed.iter().any(|i| i.name == "tiny" && i.error.is_none()), "{listed:?}");
    assert!(listed.iter().any(|i| i.name == "cut" && i.error.is_some()), "{listed:?}");
    run_tiny(&host, "works").await;
    lab.down().await.unwrap();
}

#[tokio::test]
async fn vms_go_when_their_time_or_their_caller_does() {
    let lab = lab("leases", 2).await;
    let home = lab.client(1);
    run_tiny(&home, "web").await;
    let lease = home.lease().await.unwrap();
    let held = api::CloneRequest { lease: Some(lease.id().to_owned()), ..clones(2, &["h1", "h2"]) };
    let made = home.fork("web", &fork_of(held)).await.unwrap();
    assert_eq!(made.clones.len(), 2);
    let short = api::CloneRequest { ttl_s: Some(1), ..clones(1, &["h2"]) };
    let brief = home.clone_checkpoint(&made.parent.checkpoint.id.to_string(), &short).await.unwrap();
    let name = brief.clones[0].vm.name.clone();
    until("the clone's time is over", || async { !names(&lab.client(2)).await.contains(&name) }).await;
    assert_eq!(names(&home).await.len(), 2);
    // The caller dies: its connection with it.
    drop(lease);
    until("the clones are gone on both hosts", || async {
        names(&home).await == ["web"] && names(&lab.client(2)).await.is_empty()
    })
    .await;
    until("no QEMU is left on h2", || async { pids(&lab, 2, "qemu").is_empty() }).await;
    // A lease that is gone can't be used.
    let stale = api::CloneRequest { lease: Some("nosuch".into()), ..clones(1, &[]) };
    assert_eq!(refused(home.fork("web", &fork_of(stale)).await).0, ErrorCode::NotFound);
    lab.down().await.unwrap();
}

#[tokio::test]
async fn hosts_do_not_talk_to_strangers() {
    let lab = lab("trust", 2).await;
    let home = lab.client(1);
    let address = home.info().await.unwrap().address.unwrap();
    // From inside the network: a connection without a certificate gets no answer to anything.
    let pid = lab.processes(2).unwrap().first().unwrap().pid;
    let script = format!(
        "exec 3<>/dev/tcp/{}; printf 'GET /v1/vms HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n' >&3; timeout 5 cat <&3",
        address.replace(':', "/")
    );
    let net = format!("--net=/proc/{pid}/ns/net");
    let output = std::process::Command::new("nsenter").args([&net, "bash", "-c", &script]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(!text.contains("HTTP/1.1 200") && !text.contains("vms"), "{text}");
    // A used or invented token is refused, and drained hosts take nothing new.
    let token = home.host_token(&api::TokenRequest::default()).await.unwrap().token;
    let joined = api::JoinRequest { token, address: None };
    let (code, _) = refused(lab.client(2).host_join(&joined).await);
    assert_eq!(code, ErrorCode::Trust, "h2 belongs to the group already");
    run_tiny(&home, "web").await;
    lab.client(2).drain(&api::DrainRequest { undo: false }).await.unwrap();
    let (code, text) = refused(home.fork("web", &fork_of(clones(1, &["h2"]))).await);
    assert_eq!(code, ErrorCode::Draining, "{text}");
    assert!(text.contains("h2"), "{text}");
    lab.client(2).drain(&api::DrainRequest { undo: true }).await.unwrap();
    fork(&home, "web", 1, &["h2"]).await;
    lab.down().await.unwrap();
}
