//! Pages over the network: fetched once a host, refused when damaged, waited for when their host is away.

#![allow(clippy::unwrap_used, reason = "a failure ends the test")]

mod support;

use ramet_memory::{ByteSize, FamilyId, ImageId, LayerId};
use ramet_pager::control::{SourceAddress, View};
use ramet_wire::stream::TlsConfig;
use std::{
    fs,
    os::unix::fs::FileExt,
    path::Path,
    time::{Duration, Instant},
};
use support::{Host, LIMIT, MemoryVm, Tmpfs, certificates, checkpoint, count, source_at};

const PAGES: u64 = 1024;

fn memory() -> ByteSize {
    ByteSize(PAGES * 4096)
}

fn clone_of(host: &Host, dir: &Path, image: ImageId) -> MemoryVm {
    let vm = MemoryVm::start(dir, memory(), "late");
    vm.attach(&host.family, View::Image(image));
    vm
}

/// Two hosts, a parent on the first with pages `1..=filled` written, and its checkpoint.
struct Pair {
    tmpfs: Tmpfs,
    a: Host,
    b: Host,
    parent: MemoryVm,
    image: ImageId,
    tls: TlsConfig,
    id: FamilyId,
}

fn pair(filled: u64) -> Option<Pair> {
    let tmpfs = Tmpfs::mount("huge=never")?;
    let tls = certificates(&tmpfs.path().join("tls"));
    let id = FamilyId::random();
    let a = Host::start(&tmpfs.path().join("a"), id, &tls, "127.0.0.1:0");
    let b = Host::start(&tmpfs.path().join("b"), id, &tls, "127.0.0.1:0");
    let mut parent = MemoryVm::start(tmpfs.path(), memory(), "boot");
    parent.attach(&a.family, View::Anonymous);
    for page in 1..=filled {
        parent.write(page, page * 3);
    }
    let image = checkpoint(&a.family, parent.id);
    a.family.wait_image(image).unwrap();
    Some(Pair { tmpfs, a, b, parent, image, tls, id })
}

#[test]
fn a_page_is_fetched_once_for_all_clones_of_a_host() {
    let Some(mut t) = pair(600) else { return };
    t.b.take(t.image, &t.a);
    let mut clones: Vec<_> = (0..3).map(|_| clone_of(&t.b, t.tmpfs.path(), t.image)).collect();
    t.parent.write(5, 999);
    for clone in &mut clones {
        for page in [0, 5, 6, 300, 600, 601, 1000] {
            let expected = if (1..=600).contains(&page) { page * 3 } else { 0 };
            assert_eq!(clone.read(page), expected.to_string());
        }
        clone.write(300, 42);
    }
    let served = t.a.family.stats().served_pages;
    // Four places were touched; what came besides is the neighbourhood of each.
    assert!((4..=64).contains(&served), "{served} pages were served");
    for page in 1..=600 {
        clones[0].read(page);
    }
    let after_one = t.a.family.stats().served_pages;
    assert!(after_one <= 600 + 64, "{after_one} pages were served for 600");
    for page in (1..=600).filter(|&p| p != 300) {
        assert_eq!(clones[1].read(page), (page * 3).to_string());
    }
    assert_eq!(t.a.family.stats().served_pages, after_one, "a sibling's pages were fetched again");
}

#[test]
fn a_clone_of_a_clone_on_a_third_host_gets_both_layers() {
    let Some(t) = pair(100) else { return };
    t.b.take(t.image, &t.a);
    let mut middle = clone_of(&t.b, t.tmpfs.path(), t.image);
    middle.write(50, 5050);
    middle.write(700, 7070);
    let second = checkpoint(&t.b.family, middle.id);
    middle.write(50, 1);
    let c = Host::start(&t.tmpfs.path().join("c"), t.id, &t.tls, "127.0.0.1:0");
    c.take(second, &t.b);
    let mut last = clone_of(&c, t.tmpfs.path(), second);
    for (page, value) in [(50, 5050), (700, 7070), (20, 60), (100, 300), (101, 0)] {
        assert_eq!(last.read(page), value.to_string(), "page {page}");
    }
}

#[test]
fn a_damaged_page_is_never_mapped() {
    let Some(t) = pair(40) else { return };
    t.b.take(t.image, &t.a);
    let layer = t.a.family.report_image(t.image).unwrap().layers[0].id;
    let pages = t.tmpfs.path().join("a").join(t.id.to_string()).join("layers").join(layer.to_string()).join("pages");
    let file = fs::File::options().read(true).write(true).open(pages).unwrap();
    let mut good = [0; 8];
    file.read_exact_at(&mut good, 20 * 4096).unwrap();
    file.write_all_at(b"damaged!", 20 * 4096).unwrap();
    let mut clone = clone_of(&t.b, t.tmpfs.path(), t.image);
    clone.send("r 20");
    assert_eq!(clone.answer_within(Duration::from_millis(1500)), None, "the damaged page was mapped");
    let stats = t.b.family.stats();
    assert!(stats.sources[0].bad_checksums > 0);
    let stalled = stats.vms[0].stalled.clone().expect("the VM is stalled");
    assert!(stalled.contains("page 20") && stalled.contains("damaged"), "{stalled}");
    // Mended, it goes on.
    file.write_all_at(&good, 20 * 4096).unwrap();
    assert_eq!(clone.answer_within(LIMIT).as_deref(), Some("60"));
    assert_eq!(t.b.family.stats().vms[0].stalled, None);
}

#[test]
fn an_unreachable_source_stalls_clones_until_it_is_back() {
    let Some(t) = pair(40) else { return };
    t.b.take(t.image, &t.a);
    let mut clone = clone_of(&t.b, t.tmpfs.path(), t.image);
    assert_eq!(clone.read(1), "3");
    // The source's host moves to an address where nobody answers.
    let address = t.a.address();
    let nowhere = source_at("127.0.0.1:1");
    t.b.family.set_source(&address, &nowhere).unwrap();
    clone.send("r 30");
    assert_eq!(clone.answer_within(Duration::from_millis(1500)), None);
    let stalled = t.b.family.stats().vms[0].stalled.clone().expect("the VM is stalled");
    assert!(stalled.contains("127.0.0.1:1") && stalled.contains("unreachable"), "{stalled}");
    t.b.family.set_source(&nowhere, &address).unwrap();
    assert_eq!(clone.answer_within(LIMIT).as_deref(), Some("90"));
}

#[test]
fn pages_still_in_the_parent_are_served() {
    let Some(t) = pair(0) else { return };
    let mut parent = MemoryVm::start(t.tmpfs.path(), memory(), "boot");
    parent.attach(&t.a.family, View::Anonymous);
    for page in 0..PAGES {
        parent.write(page, 10_000 + page);
    }
    let image = ImageId::random();
    t.a.family.prepare(parent.id, image, LayerId::random()).unwrap();
    parent.write(3, 33);
    t.a.family.commit(parent.id).unwrap();
    t.b.take(image, &t.a);
    parent.write(PAGES - 1, 1);
    let mut clone = clone_of(&t.b, t.tmpfs.path(), image);
    assert_eq!(clone.read(PAGES - 1), (10_000 + PAGES - 1).to_string());
    assert_eq!(clone.read(3), "33");
    for page in 4..PAGES - 1 {
        assert_eq!(clone.read(page), (10_000 + page).to_string());
    }
}

#[test]
fn a_peer_of_another_family_gets_nothing() {
    let Some(t) = pair(10) else { return };
    let stranger = Host::start(&t.tmpfs.path().join("s"), FamilyId::random(), &t.tls, "127.0.0.1:0");
    stranger.take(t.image, &t.a);
    let mut clone = clone_of(&stranger, t.tmpfs.path(), t.image);
    clone.send("r 5");
    assert_eq!(clone.answer_within(Duration::from_millis(1500)), None);
    let deadline = Instant::now() + LIMIT;
    let told = || stranger.family.stats().sources[0].error.as_ref().is_some_and(|e| e.contains("another family"));
    while !told() {
        assert!(Instant::now() < deadline, "{:?}", stranger.family.stats().sources);
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(t.a.family.stats().served_pages, 0);
}

/// The family's directory on host `name`.
fn dir_of(t: &Pair, name: &str) -> std::path::PathBuf {
    t.tmpfs.path().join(name).join(t.id.to_string())
}

/// The same host under its next pager.
fn next_pager(t: &Pair, name: &str) -> Host {
    let host = Host::start(&t.tmpfs.path().join(name), t.id, &t.tls, "127.0.0.1:0");
    host.family.restore().unwrap();
    host
}

#[test]
fn layers_of_another_host_keep_their_source_over_a_restart() {
    let Some(t) = pair(100) else { return };
    t.b.take(t.image, &t.a);
    // The order in which records are read is that of their random names.
    for round in 0..5u64 {
        let host = next_pager(&t, "b");
        let mut middle = clone_of(&host, t.tmpfs.path(), t.image);
        middle.write(90, 9000 + round);
        let over = checkpoint(&host.family, middle.id);
        host.family.wait_image(over).unwrap();
        host.family.detach(middle.id).unwrap();
        if round == 4 {
            // What lies over it goes on needing its pages.
            host.family.drop_image(t.image).unwrap();
        }
        drop(host);
        let host = next_pager(&t, "b");
        let mut last = clone_of(&host, t.tmpfs.path(), over);
        let page = 8 + 16 * round;
        for (page, value) in [(page, page * 3), (90, 9000 + round)] {
            last.send(&format!("r {page}"));
            let got = last.answer_within(Duration::from_secs(3));
            assert_eq!(got, Some(value.to_string()), "{:?}", host.family.stats().vms[0].stalled);
        }
        host.family.detach(last.id).unwrap();
    }
}

#[test]
fn pages_without_a_source_stall_and_say_so() {
    let Some(t) = pair(100) else { return };
    t.b.take(t.image, &t.a);
    let record = dir_of(&t, "b").join("images").join(format!("{}.json", t.image));
    let mut json: serde_json::Value = serde_json::from_slice(&fs::read(&record).unwrap()).unwrap();
    json["source"] = serde_json::Value::Null;
    json["layer_sources"] = serde_json::json!({});
    fs::write(&record, json.to_string()).unwrap();
    let b = next_pager(&t, "b");
    let mut clone = clone_of(&b, t.tmpfs.path(), t.image);
    clone.send("r 20");
    // A third host asks for another page, through that host.
    let c = Host::start(&t.tmpfs.path().join("c"), t.id, &t.tls, "127.0.0.1:0");
    c.take(t.image, &b);
    let mut far = clone_of(&c, t.tmpfs.path(), t.image);
    far.send("r 40");
    assert_eq!(clone.answer_within(Duration::from_millis(1500)), None);
    let stalled = b.family.stats().vms[0].stalled.clone().expect("the VM is stalled");
    assert!(stalled.contains("page 20") && stalled.contains("no source for layer"), "{stalled}");
    assert_eq!(far.answer_within(Duration::from_millis(10)), None);
    let stalled = c.family.stats().vms[0].stalled.clone().expect("the far VM is stalled");
    assert!(stalled.contains("page 40") && stalled.contains("does not hold page"), "{stalled}");
    // Told where its pages are, all goes on.
    b.take(t.image, &t.a);
    assert_eq!(clone.answer_within(LIMIT).as_deref(), Some("60"));
    assert_eq!(far.answer_within(LIMIT).as_deref(), Some("120"));
    drop(b);
    let b = next_pager(&t, "b");
    assert_eq!(b.family.stats().sources[0].source, t.a.address());
}

#[test]
fn an_image_added_again_comes_from_its_new_address() {
    let Some(t) = pair(100) else { return };
    // First a name that is not the host's, then an address where nobody answers.
    for (round, wrong) in
        [SourceAddress { name: "stranger".into(), ..t.a.address() }, source_at("127.0.0.1:1")].iter().enumerate()
    {
        let host = Host::start(&t.tmpfs.path().join(format!("h{round}")), t.id, &t.tls, "127.0.0.1:0");
        let spec = t.a.family.write_spec(t.image).unwrap();
        host.family.add_image(t.image, &spec, wrong).unwrap();
        let err = host.family.add_image(t.image, &spec, wrong).unwrap_err();
        assert_eq!(err.code, "exists");
        let mut clone = clone_of(&host, t.tmpfs.path(), t.image);
        clone.send("r 30");
        assert_eq!(clone.answer_within(Duration::from_millis(500)), None);
        // What is under way is asked for at the new address.
        host.take(t.image, &t.a);
        assert_eq!(clone.answer_within(LIMIT).as_deref(), Some("90"));
        let sources = host.family.stats().sources;
        assert_eq!(sources.iter().map(|s| &s.source).collect::<Vec<_>>(), [&t.a.address()]);
        drop(host);
        let host = next_pager(&t, &format!("h{round}"));
        assert_eq!(host.family.stats().sources[0].source, t.a.address());
    }
}

#[test]
fn an_image_that_can_not_be_added_leaves_nothing() {
    let Some(mut t) = pair(40) else { return };
    t.parent.write(7, 77);
    let second = checkpoint(&t.a.family, t.parent.id);
    let layers = t.a.family.wait_image(second).unwrap().layers;
    let spec = t.a.family.write_spec(second).unwrap();
    let b = dir_of(&t, "b");
    for obstacle in [b.join("layers").join(layers[1].id.to_string()), b.join("images").join(format!("{second}.json"))] {
        fs::create_dir(&obstacle).unwrap();
        let err = t.b.family.add_image(second, &spec, &t.a.address()).unwrap_err();
        assert_eq!(err.code, "internal", "{err}");
        fs::remove_dir(&obstacle).unwrap();
        assert_eq!((count(&b.join("layers")), count(&b.join("images"))), (0, 0), "{err}");
        assert_eq!(t.b.family.stats().sources, []);
        assert!(layers.iter().all(|l| t.b.family.layer(l.id).is_none()));
    }
    t.b.take(second, &t.a);
    let mut clone = clone_of(&t.b, t.tmpfs.path(), second);
    assert_eq!((clone.read(7), clone.read(8)), ("77".into(), "24".into()));
}
