//! Merged layers against QEMU's own tools and a plain model.
#![allow(clippy::unwrap_used, reason = "a failure ends the test")]

mod support;

use ramet_disk::{ChainPaths, chain, merge::MergeError, overlay::Templates};
use std::{
    fs::{self, File},
    os::unix::fs::{FileExt, MetadataExt},
    path::{Path, PathBuf},
    process::Command,
};
use support::{Random, run};

fn merge(layers: &[PathBuf], size: u64, path: &Path) -> Result<(), MergeError> {
    let target = File::create_new(path).unwrap();
    ramet_disk::merge::merge(layers, size, &target, &|| true)
}

/// A chain as a name for QEMU's tools: a raw base, and layers.
fn name(base: Option<&Path>, layers: &[&Path]) -> String {
    let file = |path: &Path| format!(r#"{{"driver":"file","filename":"{}"}}"#, path.display());
    let mut below = base.map_or("null".to_owned(), |path| format!(r#"{{"driver":"raw","file":{}}}"#, file(path)));
    for layer in layers {
        below = format!(r#"{{"driver":"qcow2","discard":"unmap","backing":{below},"file":{}}}"#, file(layer));
    }
    format!("json:{below}")
}

fn show(dir: &Path, base: Option<&Path>, layers: &[&Path]) -> Vec<u8> {
    let raw = dir.join("shown");
    run(Command::new("qemu-img").args(["convert", "-U", "-O", "raw", &name(base, layers)]).arg(&raw));
    fs::read(raw).unwrap()
}

fn check(path: &Path) {
    let told = run(Command::new("qemu-img").args(["check", "-f", "qcow2"]).arg(path));
    assert!(told.contains("No errors were found"), "{told}");
}

/// Layers of random writes, zeros, discards and holes over random bytes. What they show, at the end.
fn layers(dir: &Path, size: u64, count: usize, random: &mut Random, plain: bool) -> (PathBuf, Vec<PathBuf>, Vec<u8>) {
    let base = dir.join("base");
    let mut truth: Vec<u8> = (0..size.div_ceil(8)).flat_map(|_| random.below(1 << 50).to_le_bytes()).collect();
    truth.truncate(size as usize);
    fs::write(&base, &truth).unwrap();
    let templates = Templates::new(dir.join("templates"));
    let mut layers: Vec<PathBuf> = Vec::new();
    for number in 0..count {
        let path = dir.join(format!("{number}.qcow2"));
        if plain && number % 2 == 0 {
            run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&path).arg(size.to_string()));
        } else {
            templates.create(&path, size).unwrap();
        }
        layers.push(path);
        let all: Vec<_> = layers.iter().map(PathBuf::as_path).collect();
        let mut command = Command::new("qemu-io");
        for _ in 0..random.below(25) {
            let len = (512 << random.below(10)).min(size);
            let start = random.below((size - len) / 512 + 1) * 512;
            let bytes = &mut truth[start as usize..][..len as usize];
            match random.below(6) {
                0 => {
                    command.args(["-c", &format!("write -q -z {start} {len}")]);
                    bytes.fill(0);
                }
                1 => {
                    command.args(["-c", &format!("write -q -z -u {start} {len}")]);
                    bytes.fill(0);
                }
                2 => {
                    // As data.
                    command.args(["-c", &format!("write -q -P 0 {start} {len}")]);
                    bytes.fill(0);
                }
                // Whole clusters only: what else is discarded is up to QEMU.
                3 if start.is_multiple_of(65536) && len.is_multiple_of(65536) => {
                    command.args(["-c", &format!("discard -q {start} {len}")]);
                    bytes.fill(0);
                }
                _ => {
                    let pattern = 1 + random.below(255) as u8;
                    command.args(["-c", &format!("write -q -P {pattern} {start} {len}")]);
                    bytes.fill(pattern);
                }
            }
        }
        run(command.args(["-d", "unmap"]).arg(name(Some(&base), &all)));
    }
    (base, layers, truth)
}

#[test]
fn a_merged_layer_shows_the_same_over_everything() {
    for seed in 1..=20 {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path();
        let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ seed);
        // Some end in the middle of a cluster, or of a subcluster.
        let size = (1 << 20) + random.below(4096) * 512;
        let count = 2 + random.below(6) as usize;
        let (base, layers, truth) = layers(dir, size, count, &mut random, seed % 8 == 0);
        let all: Vec<_> = layers.iter().map(PathBuf::as_path).collect();
        assert!(show(dir, Some(&base), &all) == truth, "the model is right: {seed}");
        // Any of them that follow one another.
        let from = random.below(count as u64 - 1) as usize;
        let to = from + 2 + random.below((count - from - 1) as u64) as usize;
        let merged = dir.join("merged.qcow2");
        merge(&layers[from..to], size, &merged).unwrap();
        check(&merged);
        let mut chain = all.clone();
        chain.splice(from..to, [merged.as_path()]);
        assert!(show(dir, Some(&base), &chain) == truth, "{seed}: {from}..{to} of {count}");
        // Over nothing, and over another disk: holes are holes, zeros are zeros.
        assert!(show(dir, None, &chain) == show(dir, None, &all), "{seed}");
        let other = dir.join("other");
        fs::write(&other, vec![0xa5; size as usize]).unwrap();
        assert!(show(dir, Some(&other), &chain) == show(dir, Some(&other), &all), "{seed}");
        // What other hosts are told.
        let paths = |layers: &[&Path]| ChainPaths {
            size,
            golden: Some(base.clone()),
            origin: None,
            layers: layers.iter().map(|p| (*p).to_owned()).collect(),
        };
        let (before, after) =
            (chain::extents(&paths(&all), None).unwrap(), chain::extents(&paths(&chain), None).unwrap());
        let golden = |map: &ramet_disk::ExtentMap| map.bytes(ramet_disk::Kind::Golden);
        assert_eq!(golden(&before), golden(&after), "{seed}");
        assert!(before.bytes(ramet_disk::Kind::Data) >= after.bytes(ramet_disk::Kind::Data), "{seed}");
        // Merged ones are merged again.
        let again = dir.join("again.qcow2");
        let rest: Vec<_> = chain.iter().map(|p| (*p).to_owned()).collect();
        merge(&rest, size, &again).unwrap();
        check(&again);
        assert!(show(dir, Some(&base), &[&again]) == truth, "{seed}");
        // QEMU writes over it as over any.
        let over = dir.join("over.qcow2");
        Templates::new(dir.join("templates")).create(&over, size).unwrap();
        run(Command::new("qemu-io").args(["-c", "write -q -P 7 1000k 9k"]).arg(name(Some(&base), &[&again, &over])));
        let mut more = truth;
        more[1000 << 10..1009 << 10].fill(7);
        assert!(show(dir, Some(&base), &[&again, &over]) == more, "{seed}");
    }
}

#[test]
fn a_large_sparse_disk_takes_little() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    // Several L1 entries, several refcount blocks would be 2 GiB of data: those are not tried.
    let size = 3 << 40;
    let templates = Templates::new(dir.join("templates"));
    let mut layers = Vec::new();
    for (number, at) in [0, 100 << 30, (2 << 40) + 4096, size - 512].into_iter().enumerate() {
        let path = dir.join(format!("{number}.qcow2"));
        templates.create(&path, size).unwrap();
        run(Command::new("qemu-io")
            .args(["-c", &format!("write -q -P {} {at} 512", number + 1)])
            .arg(name(None, &[&path])));
        layers.push(path);
    }
    let merged = dir.join("merged.qcow2");
    let begin = std::time::Instant::now();
    merge(&layers, size, &merged).unwrap();
    assert!(begin.elapsed().as_secs() < 20, "{:?}", begin.elapsed());
    check(&merged);
    assert!(merged.metadata().unwrap().blocks() * 512 < 1 << 20);
    for (number, at) in [0, 100 << 30, (2 << 40) + 4096, size - 512].into_iter().enumerate() {
        let read = format!("read -P {} {at} 512", number + 1);
        let told = run(Command::new("qemu-io").args(["-r", "-c", &read]).arg(name(None, &[&merged])));
        assert!(!told.contains("failed"), "{told}");
    }
}

#[test]
fn what_is_no_layer_is_refused_and_what_is_stopped_is_no_overlay() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut random = Random(77);
    let size = 1 << 20;
    let (base, layers, _) = layers(dir, size, 2, &mut random, false);
    let refused = |layers: &[PathBuf], size: u64| {
        let path = dir.join("refused");
        let err = merge(layers, size, &path).unwrap_err();
        fs::remove_file(path).unwrap();
        err
    };
    assert!(matches!(refused(&[layers[0].clone(), base], size), MergeError::Layer { .. }));
    assert!(matches!(refused(&layers, size + 512), MergeError::Layer { .. }), "another size");
    assert!(matches!(refused(&[dir.join("none")], size), MergeError::Read { .. }));
    let small = dir.join("small.qcow2");
    run(Command::new("qemu-img")
        .args(["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k"])
        .arg(&small)
        .arg(size.to_string()));
    assert!(matches!(refused(&[small], size), MergeError::Layer { .. }));

    // No room.
    let full = File::options().write(true).open("/dev/full").unwrap();
    let written = ramet_disk::merge::merge(&layers, size, &full, &|| true);
    assert!(matches!(written, Err(MergeError::Write(_))), "{written:?}");

    let path = dir.join("stopped");
    let target = File::create_new(&path).unwrap();
    let stopped = ramet_disk::merge::merge(&layers, size, &target, &|| false);
    assert!(matches!(stopped, Err(MergeError::Stopped)));
    let mut magic = [0; 4];
    assert_ne!((target.read_at(&mut magic, 0).unwrap(), &magic), (4, b"QFI\xfb"));
}

/// Whatever stands in a file: an error or an overlay, never an end of the program.
#[test]
fn damaged_tables_do_no_harm() {
    let dir = tempfile::tempdir().unwrap();
    let dir = dir.path();
    let mut random = Random(99);
    let size = 1 << 20;
    let (_, layers, _) = layers(dir, size, 3, &mut random, false);
    let whole = fs::read(&layers[1]).unwrap();
    let damaged = dir.join("damaged.qcow2");
    let target = dir.join("target.qcow2");
    for _ in 0..3000 {
        let mut bytes = whole.clone();
        for _ in 0..1 + random.below(3) {
            // In the header, or a whole word anywhere.
            let at = if random.below(2) == 0 { random.below(112) } else { random.below(whole.len() as u64 / 8) * 8 };
            bytes[at as usize] = random.below(256) as u8;
        }
        fs::write(&damaged, bytes).unwrap();
        let _ = fs::remove_file(&target);
        let _ = merge(&[layers[0].clone(), damaged.clone(), layers[2].clone()], size, &target);
    }
}
