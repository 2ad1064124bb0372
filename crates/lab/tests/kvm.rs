//! Fork, demand paging and write protection under KVM, with the tiny guest: it runs even where `/dev/kvm` only emulates,
//! some thousand times slower than a processor, so it is given little to do.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use ramet_client::api;
use std::os::unix::fs::PermissionsExt as _;
use support::*;

#[tokio::test]
async fn a_guest_under_kvm_is_forked_here_and_elsewhere() {
    if let Err(err) = std::fs::File::options().read(true).write(true).open("/dev/kvm") {
        eprintln!("\n!!! NOT TESTED: fork under KVM, because /dev/kvm can't be opened here ({err}) !!!\n");
        return;
    }
    // Where only root may use KVM, QEMU has to run as root; elsewhere as always.
    let open_to_group = std::fs::metadata("/dev/kvm").unwrap().permissions().mode() & 0o060 == 0o060;
    let mut options = ramet_lab::LabOptions::for_test("kvm").unwrap().hosts(2).daemon_arg("--pool").daemon_arg("0");
    // The probe would rightly advise against it where the processor is emulated.
    options = options.daemon_arg("--accel").daemon_arg("kvm");
    if !open_to_group {
        options = options.daemon_arg("--qemu-user").daemon_arg("0");
    }
    let lab = ramet_lab::Lab::up(&options).await.unwrap();
    let (home, away) = (lab.client(1), lab.client(2));
    let request = api::RunRequest {
        accel: Some(api::AccelKind::Kvm),
        cpus: 2,
        // Where the processor is emulated QEMU's `host` model fails.
        cpu: Some("qemu64".into()),
        ..tiny_request("web")
    };
    match home.run(&request).await {
        Ok(vm) if vm.agent => {}
        other => {
            eprintln!(
                "\n!!! NOT TESTED: fork under KVM, because even the tiny guest does not run under it here: {other:?} !!!\n"
            );
            return;
        }
    }
    fill(&home, "web", 5, FIRST, 60).await;
    let (_, clones) = fork(&home, "web", 2, &["h1", "h2"]).await;
    // Write protection: the parent's new bytes are not the clones'. Demand paging: here from the image, there over TCP.
    fill(&home, "web", 6, FIRST, 20).await;
    for (number, (name, client)) in (1..).zip([(&clones[0], &home), (&clones[1], &away)]) {
        assert!(holds(client, name, 5, FIRST, 60).await, "{name}");
        assert_eq!(tiny_ok(client, name, &["id"]).await, number.to_string());
        assert_eq!(tiny_ok(client, name, &["smp"]).await, "2");
    }
    // Two processors that miss the same pages, and write into them.
    let place = (FIRST + 100).to_string();
    for command in ["fill-smp", "check-smp"] {
        tiny_ok(&away, &clones[1], &[command, "9", &place, "20"]).await;
    }
    // A fork of a fork, of what was written since.
    fill(&away, &clones[1], 7, FIRST, 10).await;
    let (_, second) = fork(&away, &clones[1], 1, &["h1"]).await;
    fill(&away, &clones[1], 8, FIRST, 10).await;
    assert!(holds(&home, &second[0], 7, FIRST, 10).await && holds(&home, &second[0], 5, FIRST + 10, 50).await);
    assert!(holds(&home, "web", 6, FIRST, 20).await && holds(&home, "web", 5, FIRST + 20, 40).await);
    assert!(holds(&home, &clones[0], 5, FIRST, 60).await);
    lab.down().await.unwrap();
}
