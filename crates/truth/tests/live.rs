//! Running kernels: what the coloring says of a stopped guest is held against what the guest's own kernel says, and a guest whose
//! free pages are overwritten goes on and is right. Needs QEMU and the images `truth` and `truth-trixie`, which
//! `cargo xtask test` builds.

#![allow(clippy::unwrap_used, reason = "tests")]

use ramet_color::{ColorMap, GuestMemory as _};
use ramet_memory::{ByteSize, PageIndex};
use ramet_truth::{
    guest::{CPU, Fill, Guest, GuestOptions, Observed},
    observer::Class,
};
use std::{path::PathBuf, time::Duration};

const LIMIT: Duration = Duration::from_secs(120);

fn image(name: &str) -> PathBuf {
    let dir = std::env::var_os("RAMET_IMAGE_DIR")
        .expect("RAMET_IMAGE_DIR is not set: run `cargo xtask test`, which builds the guest images and sets it");
    PathBuf::from(dir).join(name)
}

/// Some of everything: files, processes with aged heaps, shared memory.
fn load(guest: &mut Guest) {
    guest
        .sh(
            "find / -xdev -type f 2>/dev/null | head -2000 | xargs cat >/dev/null; \
             mkdir /tmp/files; i=0; while [ $i -lt 200 ]; do head -c $((i*97+100)) /dev/urandom >/tmp/files/$i; i=$((i+1)); done; \
             cat /tmp/files/* | md5sum >/tmp/sum; \
             ramet-truth hold 40 /tmp/held & \
             sleep 10000 & sleep 10000 & \
             while [ ! -e /tmp/held ]; do sleep 0.2; done",
            LIMIT,
        )
        .unwrap();
}

/// Stops the guest and checks what the coloring says of it.
fn check_truth(guest: &mut Guest) -> ColorMap {
    let Observed { map, comparison: found, .. } = guest.observe().unwrap();
    println!("{}", found.text());
    assert_eq!(map.trouble, "");
    assert_eq!(found.wrongly_free, [], "pages in use are called free\n{}", found.text());
    for (class, share) in &found.classes {
        let least = if *class == Class::Buddy { 0.999 } else { 0.995 };
        assert!(share.ratio() >= least, "{} is not right\n{}", class.name(), found.text());
    }
    for (name, share) in
        [("user code found", found.user_code), ("user code right", found.called_code), ("mappings", found.mapped)]
    {
        assert!(share.all > 0 && share.ratio() >= 0.995, "{name}\n{}", found.text());
    }
    for class in [Class::Buddy, Class::Slab, Class::Anonymous, Class::Shared, Class::KernelCode] {
        assert!(found.classes.get(&class).is_some_and(|share| share.all > 100), "no {}", class.name());
    }
    map
}

/// Lets the guest go on, and looks whether everything in it is right.
fn check_self(guest: &mut Guest) {
    guest.cont().unwrap();
    guest.forget_truth().unwrap();
    let said = guest
        .sh(
            "cat /tmp/files/* | md5sum | cmp - /tmp/sum || exit 1; \
             touch /tmp/held.ask; while [ ! -e /tmp/held.right ] && [ ! -e /tmp/held.wrong ]; do sleep 0.2; done; \
             [ -e /tmp/held.right ] || exit 2; \
             ramet-truth check 100 || exit 3; \
             i=0; while [ $i -lt 50 ]; do /bin/busybox true || exit 4; i=$((i+1)); done; \
             [ $(pidof sleep | wc -w) -ge 2 ] || exit 5; \
             dmesg | grep -iE 'bad page|bug:|oops:|corrupt|poison' | grep -v 'Command line' && exit 6; \
             echo all right",
            LIMIT,
        )
        .unwrap();
    assert!(said.ends_with("all right"), "{said}");
}

fn garbage(name: &str, options: impl FnOnce(&mut GuestOptions), with: Fill) {
    let mut chosen = GuestOptions::new(image(name), ByteSize::mib(256));
    options(&mut chosen);
    let mut guest = Guest::start(&chosen).unwrap();
    load(&mut guest);
    let map = check_truth(&mut guest);
    let count = guest.overwrite_free(&map, with).unwrap();
    assert!(count > 10_000, "only {count} pages are free");
    check_self(&mut guest);
}

#[test]
fn the_distributions_kernel_is_understood_and_does_without_what_was_in_its_free_pages() {
    garbage("truth", |_| {}, Fill::Garbage);
}

#[test]
fn a_newer_kernel_is_understood_and_does_without_what_was_in_its_free_pages() {
    garbage("truth-trixie", |options| options.cpus = 2, Fill::Garbage);
}

#[test]
fn a_kernel_that_clears_what_it_frees_finds_zeros_where_zeros_were_put() {
    garbage("truth-trixie", |options| options.cmdline = "init_on_free=1 init_on_alloc=0".into(), Fill::Zeros);
}

/// Memory on both sides of the hole below 4 GiB, with four-level page tables and a user's half of its own.
#[test]
fn a_guest_with_memory_above_the_hole_is_understood() {
    let mut options = GuestOptions::new(image("truth"), ByteSize::mib(3584));
    options.cpu = format!("{CPU},la57=off");
    options.cmdline = "pti=on".into();
    let mut guest = Guest::start(&options).unwrap();
    load(&mut guest);
    let map = check_truth(&mut guest);
    let above = guest.memory().layout().page(ramet_memory::Gpa(4 << 30)).expect("there is memory above the hole");
    let used = (above.0..map.pages().0).filter(|&page| !map.may_be_zero(PageIndex(page))).count();
    assert!(used > 1000, "only {used} pages above the hole are in use");
    assert_eq!(map.kernel.as_ref().unwrap().levels, 4);
}
