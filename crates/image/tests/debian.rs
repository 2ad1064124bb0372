//! A Debian image is built, booted by QEMU alone, and serves. Needs root, the distribution's packages and QEMU; what it
//! downloads stays in the target directory.
#![allow(clippy::unwrap_used, reason = "helpers of tests, too")]

use ramet_guest::host::{AgentClient, ExecRequest};
use ramet_image::{BuildOptions, Image, ImageError, ImageStore};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const LIMIT: Duration = Duration::from_secs(180);

/// What this needs and is not there.
fn missing() -> Option<&'static str> {
    let there = |tool: &str| Command::new(tool).arg("--version").output().is_ok();
    [
        (rustix::process::geteuid().is_root(), "root"),
        (there("mmdebstrap"), "mmdebstrap"),
        (there("qemu-system-x86_64"), "qemu-system-x86_64"),
        (agent().is_file(), "the static agent"),
    ]
    .into_iter()
    .find_map(|(good, what)| (!good).then_some(what))
}

fn tmp() -> &'static Path {
    Path::new(env!("CARGO_TARGET_TMPDIR"))
}

/// The agent as `cargo xtask` builds it for guests.
fn agent() -> PathBuf {
    tmp().parent().unwrap().join("guest/x86_64-unknown-linux-gnu/guest/ramet-agent")
}

fn options(name: &str, packages: &[&str]) -> BuildOptions {
    BuildOptions {
        name: name.into(),
        packages: packages.iter().map(|name| (*name).to_owned()).collect(),
        suite: None,
        add: vec![(Path::new(file!()).file_name().map(|name| Path::new("tests").join(name)).unwrap(), "/srv/x".into())],
        agent: agent(),
        replace: true,
    }
}

/// A machine that goes with the test.
struct Machine {
    qemu: Child,
    dir: tempfile::TempDir,
}

impl Drop for Machine {
    fn drop(&mut self) {
        let _ = self.qemu.kill();
        let _ = self.qemu.wait();
    }
}

fn boot(image: &Image) -> Machine {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).display().to_string();
    let disk = image.disk().unwrap().display().to_string();
    let qemu = Command::new("qemu-system-x86_64")
        .args(["-accel", "tcg", "-cpu", "max", "-m", "512M", "-display", "none", "-nodefaults", "-no-reboot"])
        .args(["-machine", "pc-i440fx-7.2,graphics=off", "-device", "vmgenid,guid=auto"])
        .arg("-kernel")
        .arg(image.kernel())
        .arg("-initrd")
        .arg(image.initrd().unwrap())
        .args(["-append", &image.manifest.cmdline])
        .args(["-drive", &format!("if=none,id=disk,format=raw,snapshot=on,file={disk}")])
        .args(["-device", "virtio-blk-pci,drive=disk", "-device", "virtio-serial-pci"])
        .args(["-chardev", &format!("socket,id=agent,server=on,wait=off,path={}", path("agent"))])
        .args(["-device", "virtserialport,chardev=agent,name=ramet.agent"])
        .args(["-netdev", "user,id=net,restrict=on", "-device", "virtio-net-pci,netdev=net,romfile="])
        .args(["-serial", &format!("file:{}", path("serial"))])
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    Machine { qemu, dir }
}

async fn sh(client: &AgentClient, script: &str) -> (i32, String) {
    let request = ExecRequest::new(["bash", "-c", script]).limit(LIMIT);
    let output = client.run(request, b"", 1 << 20).await.unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.code, text)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_installed_system_boots_from_its_disk_and_serves() {
    if let Some(what) = missing() {
        eprintln!("skipped: there is no {what}");
        return;
    }
    let store = ImageStore::new(tmp().join("debian-images"));
    let begun = Instant::now();
    let mut stages = Vec::new();
    let mut progress = |progress: ramet_image::Progress| {
        if stages.last().is_none_or(|(stage, _)| *stage != progress.stage) {
            stages.push((progress.stage, begun.elapsed()));
        }
    };
    let image = store.build_debian(&options("test", &["apache2"]), 1 << 30, &mut progress).unwrap();
    eprintln!("built in {:?}: {stages:?}", begun.elapsed());
    let record = image.manifest.disk.clone().unwrap();
    eprintln!("disk: {} bytes, {} stored, {}", record.size, record.stored, record.xxh3_128);
    assert!(record.size == 1 << 30 && record.stored < 600 << 20);
    assert_eq!(store.load("test").unwrap(), image);
    image.verify().unwrap();
    assert!(image.manifest.contents.iter().any(|title| title.starts_with("apache2 ")));
    let check = Command::new("e2fsck").args(["-f", "-n"]).arg(image.disk().unwrap()).output().unwrap();
    assert!(check.status.success(), "{}", String::from_utf8_lossy(&check.stdout));

    let begun = Instant::now();
    let mut machine = boot(&image);
    let serial_path = machine.dir.path().join("serial");
    let serial = || std::fs::read_to_string(&serial_path).unwrap_or_default();
    let client = match AgentClient::connect(machine.dir.path().join("agent"), LIMIT).await {
        Ok(client) => client.with_limit(LIMIT),
        Err(error) => panic!("{error}\n{}", serial()),
    };
    eprintln!("agent after {:?}", begun.elapsed());
    let page = r"for try in $(seq 300); do
            if exec 3<>/dev/tcp/127.0.0.1/80; then
                printf 'GET / HTTP/1.0\r\n\r\n' >&3 && head -1 <&3 && exit 0
            fi 2>/dev/null
            sleep 0.2
        done
        systemctl status apache2; exit 1";
    let (code, text) = sh(&client, page).await;
    eprintln!("apache after {:?}", begun.elapsed());
    assert!(code == 0 && text.contains("200 OK"), "{text}\n{}", serial());

    let (code, text) = sh(&client, "systemctl is-system-running --wait; systemctl --failed --no-legend").await;
    assert!(code == 0 && text.trim() == "running", "{text}");
    eprintln!("running after {:?}", begun.elapsed());
    let (_, text) =
        sh(&client, "cat /proc/$(pgrep -o ramet-agent)/cgroup /proc/self/cgroup; findmnt -no SOURCE,FSTYPE,OPTIONS /")
            .await;
    // What is frozen for a checkpoint is all but the agent: its commands, too.
    assert!(text.contains("/ramet.slice/ramet-agent.service") && text.contains("/ramet-exec"), "{text}");
    assert!(text.split_whitespace().collect::<Vec<_>>().join(" ").contains("/dev/vda ext4 rw,noatime"), "{text}");
    let (_, text) = sh(&client, "cat /etc/machine-id; cat /sys/class/net/eth0/operstate; ls /srv/x; hostname").await;
    let lines: Vec<&str> = text.lines().collect();
    assert!(matches!(lines[..], [id, "down", "/srv/x", "ramet"] if id.len() == 32), "{text}");
    // A file survives in the guest's file system, and the golden disk is as it was.
    let (code, text) =
        sh(&client, "dd if=/dev/urandom of=/var/tmp/new bs=1M count=20 && sync && modprobe overlay").await;
    assert_eq!(code, 0, "{text}");
    let (_, text) = sh(&client, "systemd-analyze; systemd-analyze blame --no-pager | head -15").await;
    eprintln!("{text}");
    client.shutdown().await.unwrap();
    let begun = Instant::now();
    while machine.qemu.try_wait().unwrap().is_none() {
        assert!(begun.elapsed() < LIMIT, "it does not power off\n{}", serial());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    eprintln!("off after {:?}", begun.elapsed());
    image.verify().unwrap();

    let again = store.build_debian(&options("test", &["apache2"]), 1 << 30, &mut |_| {}).unwrap();
    assert_eq!(again.manifest.disk, Some(record), "the same input, the same disk");
    store.remove("test").unwrap();
}

#[test]
fn what_cannot_be_built_leaves_nothing_behind() {
    if let Some(what) = missing() {
        eprintln!("skipped: there is no {what}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let store = ImageStore::new(dir.path().join("images"));
    let text = |options: &BuildOptions| {
        let error: ImageError = store.build_debian(options, 1 << 30, &mut |_| {}).unwrap_err();
        error.to_string()
    };
    assert!(text(&options("x", &["no-such-package-here"])).contains("\"no-such-package-here\""));
    assert!(text(&options("x", &["--yes"])).contains("\"--yes\""));
    assert!(text(&options("Bad", &[])).contains("\"Bad\""));
    let names: Vec<_> = std::fs::read_dir(store.dir()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert!(names.iter().all(|name| name == ".lock" || name == ".cache"), "{names:?}");
}
