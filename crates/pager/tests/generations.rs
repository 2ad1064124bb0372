//! Memory written by one VM never shows in another or in an image: random histories against a model.

#![allow(clippy::unwrap_used, reason = "a failure ends the test")]

mod support;

use proptest::prelude::*;
use ramet_memory::{ByteSize, FamilyId, ImageId};
use ramet_pager::control::View;
use std::collections::BTreeMap;
use support::{MemoryVm, Tmpfs, checkpoint, family};

const PAGES: u64 = 256;

#[derive(Debug, Clone)]
enum Step {
    Write { vm: usize, page: u64, len: u64, value: u64 },
    Read { vm: usize, page: u64 },
    Checkpoint { vm: usize },
    Clone { image: usize },
    Kill { vm: usize },
    DropImage { image: usize },
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => (0usize..8, 0..PAGES, 1u64..40, 0u64..4).prop_map(|(vm, page, len, value)| Step::Write { vm, page, len, value }),
        3 => (0usize..8, 0..PAGES).prop_map(|(vm, page)| Step::Read { vm, page }),
        3 => (0usize..8).prop_map(|vm| Step::Checkpoint { vm }),
        3 => (0usize..8).prop_map(|image| Step::Clone { image }),
        1 => (1usize..8).prop_map(|vm| Step::Kill { vm }),
        1 => (0usize..8).prop_map(|image| Step::DropImage { image }),
    ]
}

type Memory = BTreeMap<u64, u64>;

fn run(dir: &std::path::Path, steps: &[Step]) {
    let memory = ByteSize(PAGES * 4096);
    let family = family(dir, FamilyId::random(), None);
    let first = MemoryVm::start(dir, memory, "boot");
    first.attach(&family, View::Anonymous);
    let mut vms: Vec<(MemoryVm, Memory)> = vec![(first, Memory::new())];
    let mut images: Vec<(ImageId, Memory)> = Vec::new();
    for step in steps {
        match *step {
            Step::Write { vm, page, len, value } => {
                let at = vm % vms.len();
                let (vm, model) = &mut vms[at];
                for page in page..(page + len).min(PAGES) {
                    vm.write(page, value);
                    model.insert(page, value);
                }
            }
            Step::Read { vm, page } => {
                let at = vm % vms.len();
                let (vm, model) = &mut vms[at];
                assert_eq!(vm.read(page), model.get(&page).copied().unwrap_or(0).to_string(), "page {page}");
            }
            Step::Checkpoint { vm } => {
                let (vm, model) = &vms[vm % vms.len()];
                images.push((checkpoint(&family, vm.id), model.clone()));
            }
            Step::Clone { image } if !images.is_empty() && vms.len() < 6 => {
                let (image, model) = &images[image % images.len()];
                let vm = MemoryVm::start(dir, memory, "late");
                vm.attach(&family, View::Image(*image));
                vms.push((vm, model.clone()));
            }
            Step::Kill { vm } if vms.len() > 1 => {
                let at = vm % vms.len();
                family.detach(vms[at].0.id).unwrap();
                vms.remove(at);
            }
            Step::DropImage { image } if !images.is_empty() => {
                let at = image % images.len();
                // Refused while a VM shows it, which is checked elsewhere.
                if family.drop_image(images[at].0).is_ok() {
                    images.remove(at);
                }
            }
            _ => {}
        }
    }
    for (vm, model) in &mut vms {
        for page in 0..PAGES {
            assert_eq!(vm.read(page), model.get(&page).copied().unwrap_or(0).to_string(), "page {page} in the end");
        }
    }
    for (image, model) in &images {
        let mut vm = MemoryVm::start(dir, memory, "late");
        vm.attach(&family, View::Image(*image));
        for page in 0..PAGES {
            assert_eq!(vm.read(page), model.get(&page).copied().unwrap_or(0).to_string(), "page {page} of an image");
        }
        family.detach(vm.id).unwrap();
    }
}

#[test]
fn random_histories_agree_with_the_model() {
    let Some(tmpfs) = Tmpfs::mount("huge=never") else { return };
    let config =
        ProptestConfig { cases: 24, max_shrink_iters: 40, failure_persistence: None, ..ProptestConfig::default() };
    let mut runner = proptest::test_runner::TestRunner::new(config);
    runner
        .run(&prop::collection::vec(step(), 1..60), |steps| {
            run(tmpfs.path(), &steps);
            Ok(())
        })
        .unwrap();
}

#[test]
fn a_deep_chain_shows_every_generation() {
    let Some(tmpfs) = Tmpfs::mount("huge=never") else { return };
    let memory = ByteSize(PAGES * 4096);
    let family = family(tmpfs.path(), FamilyId::random(), None);
    let mut vm = MemoryVm::start(tmpfs.path(), memory, "boot");
    vm.attach(&family, View::Anonymous);
    vm.write(0, 1000);
    for generation in 1..30u64 {
        // One page of its own, one that every generation changes, one that is cleared again.
        vm.write(generation * 5, generation);
        vm.write(200, generation);
        vm.write(generation * 5 - 4, 0);
        let image = checkpoint(&family, vm.id);
        vm.write(200, 7777);
        let clone = MemoryVm::start(tmpfs.path(), memory, "late");
        clone.attach(&family, View::Image(image));
        family.detach(vm.id).unwrap();
        vm = clone;
    }
    assert_eq!(vm.read(0), "1000");
    assert_eq!(vm.read(200), "29");
    for generation in 1..30u64 {
        assert_eq!(vm.read(generation * 5), generation.to_string());
    }
    assert_eq!(vm.read(255), "0");
}
