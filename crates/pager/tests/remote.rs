//! Pages over the network: fetched once a host, refused when damaged, waited for when their host is away.

#![allow(clippy::unwrap_used, reason = "a failure ends the test")]

mod support;

use ramet_memory::{ByteSize, FamilyId, ImageId, LayerId};
use ramet_pager::{
    control::{SourceAddress, View},
    family::Family,
    server,
};
use ramet_wire::stream::{Listener, Options, TlsConfig};
use std::{
    fs,
    os::unix::fs::FileExt,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};
use support::{LIMIT, MemoryVm, Tmpfs, certificates, checkpoint, family, source_at};

const PAGES: u64 = 1024;

/// A family on a "host" of its own that serves its pages.
struct Host {
    family: Arc<Family>,
    listener: Arc<Listener>,
}

impl Host {
    fn start(dir: &Path, id: FamilyId, tls: &TlsConfig, addr: &str) -> Self {
        fs::create_dir_all(dir).unwrap();
        let family = family(dir, id, Some(tls.clone()));
        let listener = Arc::new(Listener::bind(addr.parse().unwrap(), tls, &Options::default()).unwrap());
        let (l, f) = (listener.clone(), family.clone());
        std::thread::spawn(move || server::serve(&l, &f, id, "host"));
        Self { family, listener }
    }

    fn address(&self) -> SourceAddress {
        source_at(self.listener.local_addr())
    }

    fn take(&self, image: ImageId, from: &Host) {
        let spec = from.family.write_spec(image).unwrap();
        self.family.add_image(image, &spec, &from.address()).unwrap();
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.listener.close();
    }
}

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
