//! What the pages of checkpoints are.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use ramet_client::Client;
use ramet_client::api::{self, ErrorCode};
use ramet_color::{Color, ColorMap, Diff, Method, Place};
use ramet_memory::{ByteSize, ImageId, PageIndex, PageRun, PageSet};
use std::time::Duration;
use support::*;

const MEMORY: ByteSize = ByteSize::mib(256);

async fn run_linux(client: &Client, name: &str) {
    let request = api::RunRequest {
        name: Some(name.into()),
        memory: MEMORY,
        wait_agent_s: 240,
        ..api::RunRequest::new("default")
    };
    let vm = client.run(&request).await.unwrap();
    assert!(vm.agent, "the guest answers");
}

async fn take(client: &Client, vm: &str) -> ImageId {
    client.checkpoint(vm, &api::CheckpointRequest::default()).await.unwrap().checkpoint.id
}

async fn map(client: &Client, checkpoint: ImageId) -> ColorMap {
    let bytes = client.color_map(&checkpoint.to_string()).await.unwrap();
    ColorMap::decode(&bytes, MEMORY.pages()).unwrap()
}

/// Pages of a file of this path in a map.
fn pages_of(map: &ColorMap, path: &str) -> u64 {
    let pages = (0..map.pages().0).map(PageIndex);
    let of_file = |page: &PageIndex| match map.place(*page) {
        Some(Place::File(file, _)) => map.files[file.0 as usize].path == path,
        _ => false,
    };
    pages.filter(of_file).count() as u64
}

/// What must hold of the map of any Linux guest that was understood.
fn assert_sound(map: &ColorMap) {
    assert_eq!((map.method, map.trouble.as_str()), (Method::Full, ""));
    assert!(map.processes.iter().any(|p| p.pid == 1 && p.command == "init"), "{:?}", map.processes);
    assert!(map.processes.iter().any(|p| p.command == "ramet-agent"), "{:?}", map.processes);
    for color in [Color::KernelCode, Color::Slab, Color::PageTables, Color::UserData, Color::CacheCode, Color::Free] {
        assert!(map.colors().contains(&color), "no {}", color.name());
    }
    assert!(!map.poisons_free);
}

#[tokio::test]
async fn what_a_guest_does_shows_in_its_colors_here_and_elsewhere() {
    let mut lab = lab("colors", 2).await;
    let (home, away) = (lab.client(1), lab.client(2));
    run_linux(&home, "web").await;
    let release = sh(&home, "web", "uname -r; dd if=/dev/urandom of=/first bs=64k count=64 2>/dev/null").await;
    let first = take(&home, "web").await;
    let before = map(&home, first).await;
    assert_sound(&before);
    assert_eq!(before.kernel.as_ref().unwrap().release, release);
    assert_eq!(pages_of(&before, "/first"), 1024);

    // What it does next shows against that.
    sh(&home, "web", "rm /first; dd if=/dev/urandom of=/second bs=64k count=32 2>/dev/null").await;
    let second = take(&home, "web").await;
    let after = map(&home, second).await;
    assert_sound(&after);
    assert_eq!((pages_of(&after, "/first"), pages_of(&after, "/second")), (0, 512));
    let changed = home.changed_pages(&second.to_string(), &first.to_string()).await.unwrap();
    let mut set = PageSet::new(MEMORY.pages());
    changed.runs.iter().for_each(|&[start, len]| set.insert_run(PageRun { start: PageIndex(start), len }));
    let diff = Diff::of(&before, &after, &set).unwrap();
    let written = diff.files.iter().find(|f| f.path == "/second").unwrap();
    assert_eq!(written.changed_pages, 512);
    // Of the 1024 pages that were freed the second file may have taken 512, and others some more.
    assert!(diff.transitions.iter().any(|t| t.from == Color::CacheData && t.to == Color::Free && t.pages > 300));
    assert!(diff.changed_pages < 20_000, "most of memory is as it was");

    // The map goes along to another host, with the descriptor or after it.
    let (made, names) = fork(&home, "web", 1, &["h2"]).await;
    let forked = made.parent.checkpoint.id;
    until("the map is on the other host", || async {
        home.color_map(&forked.to_string()).await.ok() == away.color_map(&forked.to_string()).await.ok()
    })
    .await;
    // A checkpoint of the clone there is colored there, by what has changed and what has not.
    sh(&away, &names[0], "dd if=/dev/urandom of=/third bs=64k count=16 2>/dev/null").await;
    let third = take(&away, &names[0]).await;
    let there = map(&away, third).await;
    assert_sound(&there);
    assert_eq!((pages_of(&there, "/second"), pages_of(&there, "/third")), (512, 256));

    // The summary of the API is that of the map.
    let colors = away.colors(&third.to_string(), Some(3)).await.unwrap();
    assert_eq!(colors.summary, ramet_color::Summary::of(&there, 3));
    assert_eq!(colors.summary.colors.iter().map(|c| c.pages).sum::<u64>(), MEMORY.pages().0);

    // Maps outlive the daemon.
    let kept = home.color_map(&second.to_string()).await.unwrap();
    lab.kill_host_daemon(1).unwrap();
    lab.restart_host_daemon(1).await.unwrap();
    assert_eq!(home.color_map(&second.to_string()).await.unwrap(), kept);
    lab.down().await.unwrap();
}

#[tokio::test]
async fn a_pager_that_dies_does_not_keep_a_checkpoint_from_being_colored() {
    let lab = lab("colorkill", 1).await;
    let home = lab.client(1);
    run_linux(&home, "web").await;
    let first = take(&home, "web").await;
    pids(&lab, 1, "ramet-pager").into_iter().for_each(kill);
    assert_sound(&map(&home, first).await);
    let second = take(&home, "web").await;
    tokio::time::sleep(Duration::from_millis(10)).await;
    pids(&lab, 1, "ramet-pager").into_iter().for_each(kill);
    assert_sound(&map(&home, second).await);
    // A map goes with its checkpoint.
    home.remove_vm("web", true).await.unwrap();
    for checkpoint in [second, first] {
        home.remove_checkpoint(&checkpoint.to_string()).await.unwrap();
        let (code, _) = refused(home.color_map(&checkpoint.to_string()).await);
        assert_eq!(code, ErrorCode::NotFound);
    }
    assert_nothing_left(&lab, 1).await;
    lab.down().await.unwrap();
}

#[tokio::test]
async fn a_guest_that_is_no_linux_has_no_page_called_free() {
    let lab = lab("colortiny", 1).await;
    let home = lab.client(1);
    run_tiny(&home, "a").await;
    run_tiny(&home, "b").await;
    let checkpoint = take(&home, "a").await;
    let colors = home.colors(&checkpoint.to_string(), None).await.unwrap();
    // So the CPU's page tables were found in QEMU's state.
    assert_eq!(colors.summary.method, Method::PageTables);
    assert!(colors.summary.colors.iter().find(|c| c.color == Color::PageTables).unwrap().pages > 0);
    assert!(colors.summary.trouble.contains("Linux"), "{}", colors.summary.trouble);
    assert_eq!(colors.summary.colors.iter().find(|c| c.color == Color::Free).unwrap().pages, 0);
    // Comparing makes sense within a family only.
    let other = take(&home, "b").await;
    let (code, text) = refused(home.changed_pages(&checkpoint.to_string(), &other.to_string()).await);
    assert!(code == ErrorCode::BadRequest && text.contains("different families"), "{text}");
    let (code, _) = refused(home.colors("0123456789", None).await);
    assert_eq!(code, ErrorCode::NotFound);
    lab.down().await.unwrap();
}
