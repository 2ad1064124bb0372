//! The `ramet` program as a user meets it: what it prints, its exit codes, its errors.
#![allow(clippy::unwrap_used, reason = "tests")]

use std::process::{Command, Output, Stdio};

use ramet_lab::{Lab, LabOptions};
use serde_json::Value;

fn ramet(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ramet"));
    command.args(args).stdin(Stdio::null());
    for name in ["RAMET_LAB", "RAMET_SOCKET", "RAMET_HOST"] {
        command.env_remove(name);
    }
    command
}

fn out(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn err(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn without_a_daemon_it_says_how_to_start_one() {
    let output = ramet(&["ps", "--socket", "/no/such/rametd.sock"]).output().unwrap();
    assert_eq!(output.status.code(), Some(3));
    let text = err(&output);
    assert!(text.contains("/no/such/rametd.sock") && text.contains("help:") && text.contains("rametd"), "{text}");
}

#[test]
fn wrong_usage_is_told_apart_from_failure() {
    for args in [&["no-such-command"][..], &["run", "--memory", "lots"], &["fork"], &["clone", "x", "-n", "0"]] {
        let output = ramet(args).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {}", err(&output));
        assert!(err(&output).contains("error:"));
    }
}

#[test]
fn it_completes_commands_and_documents_itself() {
    for shell in ["bash", "zsh", "fish"] {
        let output = ramet(&["completion", shell]).output().unwrap();
        assert!(output.status.success() && out(&output).contains("checkpoint"), "{shell}");
    }
    let reference = out(&ramet(&["reference"]).output().unwrap());
    let kept = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/cli.md");
    assert_eq!(std::fs::read_to_string(kept).unwrap(), reference, "docs/cli.md is old: run `cargo xtask docs`");
}

#[test]
fn images_have_errors_that_help() {
    let dir = tempfile::tempdir().unwrap();
    let at = dir.path().to_str().unwrap();
    let fails = |args: &[&str]| {
        let output = ramet(args).args(["--image-dir", at]).output().unwrap();
        assert_eq!(output.status.code(), Some(1), "{args:?}: {}", out(&output));
        err(&output)
    };
    assert!(fails(&["image", "rm", "nosuch"]).contains("\"nosuch\""));
    assert!(fails(&["image", "build", "x", "--add", "/no/such/file"]).contains("/no/such/file"));
    assert!(fails(&["image", "build", "x", "--agent", "/bin/sh"]).contains("statically"));
    assert!(fails(&["image", "build", "../x"]).contains("../x"));
    let listed = ramet(&["image", "ls", "--json", "--image-dir", at]).output().unwrap();
    assert_eq!(serde_json::from_slice::<Value>(&listed.stdout).unwrap(), Value::Array(Vec::new()));
    assert!(
        std::fs::read_dir(dir.path()).unwrap().flatten().all(|e| e.file_name() == ".lock"),
        "nothing half-made stays"
    );
}

#[test]
fn the_doctor_tells_of_everything_it_looked_at() {
    let images = LabOptions::new("x").unwrap().image_dir;
    let output = ramet(&["doctor", "--json", "--image-dir", images.to_str().unwrap()]).output().unwrap();
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    let findings = report["findings"].as_array().unwrap();
    let text = findings.iter().map(|f| f["name"].as_str().unwrap().to_lowercase()).collect::<Vec<_>>().join(" ");
    for thing in [
        "kvm",
        "userfaultfd",
        "pagemap",
        "tun",
        "memory",
        "privileges",
        "qemu-img",
        "storage-daemon",
        "mmdebstrap",
        "vxlan",
        "nftables",
    ] {
        assert!(text.contains(thing), "no finding about {thing}: {text}");
    }
    for finding in findings.iter().filter(|f| f["status"] != "ok") {
        assert!(!finding["remedy"].as_str().unwrap().is_empty(), "no remedy: {finding}");
    }
}

#[tokio::test]
async fn a_session_from_the_first_vm_to_the_last() {
    let options = LabOptions::for_test("cli").unwrap().hosts(2).daemon_arg("--pool").daemon_arg("0");
    let lab = Lab::up(&options).await.unwrap();
    let with = |args: &[&str]| ramet(args).env("RAMET_LAB", lab.name()).output().unwrap();
    let good = |args: &[&str]| {
        let output = with(args);
        assert!(output.status.success(), "{args:?}: {}", err(&output));
        out(&output)
    };
    let json = |args: &[&str]| serde_json::from_str::<Value>(&good(args)).unwrap();

    assert!(good(&["run", "tiny", "--name", "web", "--memory", "64M", "--accel", "tcg"]).contains("web"));
    assert_eq!(good(&["ps", "-q"]).trim(), "web");
    assert!(good(&["ps"]).contains("running"));
    good(&["exec", "web", "--", "fill", "5", "1024", "500"]);
    // The command's own exit code is that of `exec`.
    assert_eq!(with(&["exec", "web", "--", "check", "6", "1024", "1"]).status.code(), Some(1));
    assert_eq!(with(&["exec", "web", "--", "nonsense"]).status.code(), Some(125));
    let double = with(&["run", "tiny", "--name", "web", "--memory", "64M"]);
    assert_eq!(double.status.code(), Some(1));
    assert!(err(&double).contains("'web'") && err(&double).contains("help:"), "{}", err(&double));

    let forked = good(&["fork", "web", "-n", "3", "--on", "h1,h2", "--timeline", "--note", "first"]);
    for word in ["web-c1", "web-c3", "h2", "claim", "remap", "attach", "load", "continue", "first_answer", "pause"] {
        assert!(forked.contains(word), "no {word} in:\n{forked}");
    }
    assert_eq!(good(&["ps", "-q", "--all-hosts"]).lines().count(), 4);
    assert_eq!(good(&["--host", "h2", "exec", "web-c2", "--", "check", "5", "1024", "500"]), "");
    assert_eq!(good(&["--host", "h2", "exec", "web-c2", "--", "id"]).trim(), "2");
    let nowhere = with(&["--host", "h7", "ps"]);
    assert!(!nowhere.status.success() && err(&nowhere).contains("h7"), "{}", err(&nowhere));

    let list = json(&["checkpoint", "ls", "--json"]);
    let id = list["checkpoints"][0]["id"].as_str().unwrap().to_owned();
    assert_eq!(list["checkpoints"][0]["note"], "first");
    let shown = good(&["checkpoint", "show", &id[..8]]);
    assert!(shown.contains(&id) && shown.contains("web-c1") && shown.contains("first"), "{shown}");
    assert!(good(&["warm", "web", "-n", "1"]).contains("pc-"));
    assert!(good(&["warm", &id[..8], "-n", "1"]).contains(&id));
    let cloned = json(&["clone", &id[..8], "-n", "1", "--name", "mine", "--json"]);
    assert_eq!(cloned["clones"][0]["vm"]["name"], "mine");
    assert_eq!(cloned["clones"][0]["prepared"], true);
    let used = with(&["checkpoint", "rm", &id]);
    assert!(!used.status.success() && err(&used).contains("in use") | err(&used).contains("mine"), "{}", err(&used));
    assert!(json(&["stats", "mine", "--json"])["memory"]["ram_pss_bytes"].as_u64().unwrap() > 0);
    assert!(good(&["stats", "mine"]).contains("fault"));
    assert!(good(&["stats"]).contains("claim"));
    assert!(good(&["host", "ls"]).contains("h2"));
    assert_eq!(json(&["version", "--json"])["host"], "h1");
    assert!(good(&["lab", "ls"]).contains(lab.name()));

    // Clones that live as long as the command that asked for them.
    let mut held = ramet(&["fork", "web", "-n", "2", "--on", "h1,h2", "--hold"])
        .env("RAMET_LAB", lab.name())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let count = |wanted: usize| {
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while good(&["ps", "-q", "--all-hosts"]).lines().count() != wanted {
            assert!(std::time::Instant::now() < deadline, "never {wanted} VMs");
            std::thread::sleep(std::time::Duration::from_millis(50));
        }
    };
    count(7);
    held.kill().unwrap();
    held.wait().unwrap();
    count(5);

    let running = with(&["rm", "mine"]);
    assert!(!running.status.success() && err(&running).contains("force"), "{}", err(&running));
    good(&["stop", "mine", "--grace", "0"]);
    assert!(good(&["ps"]).contains("stopped"));
    good(&["rm", "mine"]);
    good(&["rm", "--force", "web", "web-c1", "web-c3"]);
    good(&["--host", "h2", "rm", "--force", "web-c2"]);
    for id in json(&["checkpoint", "ls", "--json"])["checkpoints"].as_array().unwrap().iter().rev() {
        good(&["checkpoint", "rm", id["id"].as_str().unwrap()]);
    }
    assert_eq!(good(&["ps", "-q", "--all-hosts"]), "");
    lab.down().await.unwrap();
}

#[tokio::test]
async fn an_image_with_a_package_and_a_file_boots_with_both() {
    let dir = tempfile::tempdir().unwrap();
    let images = dir.path().join("images");
    let note = dir.path().join("note");
    std::fs::write(&note, "added by the test\n").unwrap();
    let add = format!("{}:/opt/deep/note", note.display());
    let at = images.to_str().unwrap();
    let build = ["image", "build", "more", "--packages", "hello", "--add", &add, "--image-dir", at];
    let output = ramet(&build).output().unwrap();
    assert!(output.status.success(), "{}", err(&output));
    assert!(err(&output).contains("packages"), "it tells what it does: {}", err(&output));
    let listed = ramet(&["image", "ls", "--json", "--image-dir", at]).output().unwrap();
    let listed: Value = serde_json::from_slice(&listed.stdout).unwrap();
    assert_eq!(listed[0]["packages"][0], "hello");
    let again = ramet(&build).output().unwrap();
    assert!(!again.status.success() && err(&again).contains("--replace"), "{}", err(&again));

    let mut options = LabOptions::for_test("image").unwrap().hosts(1).daemon_arg("--pool").daemon_arg("0");
    options.image_dir = images;
    let lab = Lab::up(&options).await.unwrap();
    let good = |args: &[&str]| {
        let output = ramet(args).env("RAMET_LAB", lab.name()).output().unwrap();
        assert!(output.status.success(), "{args:?}: {}", err(&output));
        out(&output)
    };
    good(&["run", "more", "--name", "more", "--memory", "256M", "--accel", "tcg"]);
    assert_eq!(good(&["exec", "more", "--", "hello"]).trim(), "Hello, world!");
    assert_eq!(good(&["exec", "more", "--", "cat", "/opt/deep/note"]), "added by the test\n");
    // Files go in and come out again.
    let (there, back) = (dir.path().join("there"), dir.path().join("back"));
    std::fs::write(&there, vec![7; 300_000]).unwrap();
    good(&["cp", there.to_str().unwrap(), "more:/tmp/file"]);
    good(&["cp", "more:/tmp/file", back.to_str().unwrap()]);
    assert_eq!(std::fs::read(&back).unwrap(), vec![7; 300_000]);
    lab.down().await.unwrap();
}
