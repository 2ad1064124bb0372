//! Programs of the machine's owner that run before a checkpoint (the write barrier) and in a new clone.
//!
//! A hook that ends well may leave children behind; what these write to the hook's output after its end is lost, and
//! ends them as any broken pipe does. So a hook that starts a service gives it an output of its own.

use crate::child;
use ramet_guest::protocol::{GuestId, HookResult, MAX_HOOK_OUTPUT, MAX_HOOKS};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, geteuid, kill_process_group, pidfd_open};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

/// Between SIGTERM and SIGKILL.
const GRACE: Duration = Duration::from_millis(500);
/// How often a hook that runs is asked whether it still may.
const LOOK: Duration = Duration::from_millis(20);

/// What hooks learn about the machine.
pub(crate) fn environment(id: Option<&GuestId>, hook: &str) -> Vec<(&'static str, String)> {
    let mut env = vec![("RAMET_HOOK", hook.to_owned())];
    let Some(id) = id else { return env };
    env.push(("RAMET_CLONE_NUMBER", id.clone_number.to_string()));
    env.push(("RAMET_GENERATION", id.generation.to_string()));
    env.push(("RAMET_FAMILY", id.family.clone()));
    env.push(("RAMET_VM_ID", id.vm_id.clone()));
    env.push(("RAMET_NAME", id.name.clone()));
    env.push(("RAMET_PARENT", id.parent.clone().unwrap_or_default()));
    let nic = id.nics.first().cloned().unwrap_or_default();
    env.push(("RAMET_IP", nic.ip));
    env.push(("RAMET_MAC", nic.mac));
    env.push(("RAMET_GATEWAY", nic.gateway.unwrap_or_default()));
    env
}

/// How hooks are run.
#[derive(Clone, Copy)]
pub(crate) struct Run<'a> {
    /// No hook runs longer.
    pub(crate) deadline: Instant,
    /// No one waits for the hooks any more.
    pub(crate) is_cancelled: &'a dyn Fn() -> bool,
    /// Run none after one that failed.
    pub(crate) stop_at_failure: bool,
}

/// Runs the programs of a directory, one after another, in the order of their names. What is not executable is left
/// out; so are hidden files. `Err` means that no hook was run.
pub(crate) fn run_all(dir: &Path, env: &[(&str, String)], run: Run<'_>) -> io::Result<Vec<HookResult>> {
    let mut results = Vec::new();
    for (name, path) in list(dir)? {
        let mut result = match why_skipped(&path) {
            Ok(Some(why)) => HookResult { ok: true, remark: Some(format!("skipped: {why}")), ..HookResult::default() },
            Ok(None) => run_one(&path, env, run),
            Err(error) => HookResult { remark: Some(error.to_string()), ..HookResult::default() },
        };
        result.name = name;
        let failed = !result.ok;
        results.push(result);
        if failed && run.stop_at_failure {
            break;
        }
    }
    Ok(results)
}

fn list(dir: &Path) -> io::Result<Vec<(String, PathBuf)>> {
    let entries = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let is_program =
            std::fs::metadata(entry.path()).is_ok_and(|found| found.is_file() && found.mode() & 0o111 != 0);
        if is_program && !name.starts_with('.') {
            found.push((name, entry.path()));
        }
    }
    if found.len() > MAX_HOOKS {
        let text = format!("{} has more than {MAX_HOOKS} programs", dir.display());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
    }
    found.sort();
    Ok(found)
}

/// Whoever may write a hook is as good as root.
fn why_skipped(path: &Path) -> io::Result<Option<String>> {
    let found = std::fs::metadata(path)?;
    if found.mode() & 0o002 != 0 {
        return Ok(Some("everybody may write it".to_owned()));
    }
    if found.uid() != 0 && found.uid() != geteuid().as_raw() {
        return Ok(Some(format!("it belongs to user {}, not to root", found.uid())));
    }
    Ok(None)
}

fn run_one(path: &Path, env: &[(&str, String)], run: Run<'_>) -> HookResult {
    let begun = Instant::now();
    let mut result = if (run.is_cancelled)() || begun >= run.deadline {
        HookResult { remark: Some("not run: no time was left".to_owned()), ..HookResult::default() }
    } else {
        match start(path, env) {
            Ok((child, output)) => watch(child, output, run),
            Err(error) => HookResult { remark: Some(format!("cannot run it: {error}")), ..HookResult::default() },
        }
    };
    result.ms = u64::try_from(begun.elapsed().as_millis()).unwrap_or(u64::MAX);
    result
}

fn start(path: &Path, env: &[(&str, String)]) -> io::Result<(Child, File)> {
    let (ours, theirs) = io::pipe()?;
    let mut command = Command::new(path);
    command.envs(env.iter().map(|(name, value)| (name, value))).current_dir("/").process_group(0);
    command.stdin(Stdio::null()).stdout(theirs.try_clone()?).stderr(theirs);
    if std::env::var_os("PATH").is_none() {
        command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    }
    child::own(&mut command);
    let mut tries = 0;
    let child = loop {
        match command.spawn() {
            // Somebody has just written it, and a child of ours still has his descriptor.
            Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy && tries < 20 => {
                tries += 1;
                std::thread::sleep(Duration::from_millis(10));
            }
            other => break other?,
        }
    };
    // `command` holds the other end of the pipe until here.
    drop(command);
    Ok((child, File::from(OwnedFd::from(ours))))
}

/// Follows a hook to its end, or ends it.
fn watch(mut child: Child, mut output: File, run: Run<'_>) -> HookResult {
    let mut tail = Vec::new();
    let mut open = true;
    let mut remark = None;
    let pid = Pid::from_raw(child.id().cast_signed());
    let process = pid.ok_or(rustix::io::Errno::SRCH).and_then(|pid| pidfd_open(pid, PidfdFlags::empty()));
    let (Some(pid), Ok(process)) = (pid, process) else {
        // Without a handle it cannot be watched in time.
        drop(child.kill());
        drop(child.wait());
        return HookResult { remark: Some("it cannot be watched".to_owned()), ..HookResult::default() };
    };
    let mut kill_at = None;
    loop {
        let now = Instant::now();
        if kill_at.is_none() && (now >= run.deadline || (run.is_cancelled)()) {
            remark = Some(if now >= run.deadline { "killed at the time limit" } else { "killed: no longer wanted" });
            // The group exists for as long as its leader was not waited for.
            let _ = kill_process_group(pid, Signal::TERM);
            kill_at = Some(now + GRACE);
        }
        if kill_at.is_some_and(|at| now >= at) {
            break;
        }
        match wait(&process, open.then_some(&output)) {
            (true, _) => break,
            (false, true) => open = read_some(&mut output, &mut tail),
            (false, false) => {}
        }
    }
    if kill_at.is_some() {
        // Also those of its children that have not listened.
        let _ = kill_process_group(pid, Signal::KILL);
    }
    let status = child.wait();
    // What it has written lies in the pipe by now. Children that it left behind may go on.
    let mut rest = 0;
    while open && rest < 64 && is_readable(&output) {
        open = read_some(&mut output, &mut tail);
        rest += 1;
    }
    let exit = status.ok().map(|status| status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)));
    let ok = remark.is_none() && exit == Some(0);
    HookResult { ok, exit, output: to_text(&tail), remark: remark.map(str::to_owned), ..HookResult::default() }
}

/// Waits a little: whether the process has ended, and whether there is output.
fn wait(process: &OwnedFd, output: Option<&File>) -> (bool, bool) {
    let mut polled = vec![PollFd::new(process, PollFlags::IN)];
    polled.extend(output.map(|output| PollFd::new(output, PollFlags::IN)));
    let pause = Timespec { tv_sec: 0, tv_nsec: i64::from(LOOK.subsec_nanos()) };
    if poll(&mut polled, Some(&pause)).is_err() {
        return (false, false);
    }
    let is_ready = |at: usize| polled.get(at).is_some_and(|fd: &PollFd<'_>| !fd.revents().is_empty());
    (is_ready(0), is_ready(1))
}

fn is_readable(output: &File) -> bool {
    let mut polled = [PollFd::from_borrowed_fd(output.as_fd(), PollFlags::IN)];
    poll(&mut polled, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

/// Reads what is there and keeps the end of all. False at the end.
fn read_some(output: &mut File, tail: &mut Vec<u8>) -> bool {
    let mut buffer = [0; 4096];
    match output.read(&mut buffer) {
        Ok(0) => false,
        Ok(length) => {
            tail.extend_from_slice(&buffer[..length]);
            tail.drain(..tail.len().saturating_sub(MAX_HOOK_OUTPUT));
            true
        }
        Err(error) => error.kind() == io::ErrorKind::Interrupted,
    }
}

fn to_text(tail: &[u8]) -> String {
    let text = String::from_utf8_lossy(tail);
    last(&text, MAX_HOOK_OUTPUT).to_owned()
}

/// The last bytes of a text, at most that many, without a part of a character.
fn last(text: &str, most: usize) -> &str {
    let mut from = text.len().saturating_sub(most);
    while !text.is_char_boundary(from) {
        from += 1;
    }
    &text[from..]
}

/// Shortens outputs until an answer with these results has no more than `most` bytes as JSON: those of hooks that went
/// well first.
pub(crate) fn fit(results: &mut [HookResult], most: usize) {
    let length = |results: &[HookResult]| serde_json::to_vec(results).map_or(0, |json| json.len());
    for result in results.iter_mut() {
        result.name = last(&result.name, 64).to_owned();
        result.remark = result.remark.take().map(|remark| last(&remark, 128).to_owned());
    }
    let mut keep = MAX_HOOK_OUTPUT;
    for only_good in [true, false] {
        while length(results) > most && keep > 0 {
            keep /= 2;
            for result in results.iter_mut().filter(|result| result.ok || !only_good) {
                result.output = last(&result.output, keep).to_owned();
            }
        }
        keep = MAX_HOOK_OUTPUT;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    const LIMIT: Duration = Duration::from_secs(30);

    fn put(dir: &Path, name: &str, mode: u32, script: &str) {
        let path = dir.join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
    }

    fn run(limit: Duration) -> Run<'static> {
        Run { deadline: Instant::now() + limit, is_cancelled: &|| false, stop_at_failure: false }
    }

    #[test]
    fn hooks_run_in_the_order_of_their_names_and_know_who_they_are() {
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join(".log");
        let note = |text: &str| format!("echo {text} >> {}", log.display());
        put(dir.path(), "20-b", 0o755, &note("b $RAMET_CLONE_NUMBER $RAMET_IP $RAMET_GATEWAY $RAMET_PARENT"));
        put(dir.path(), "10-a", 0o755, &note("a $RAMET_HOOK $RAMET_GENERATION"));
        put(dir.path(), "30-c", 0o700, "cat; echo out; echo err >&2; exit 3");
        put(dir.path(), "40-data", 0o644, &note("never"));
        put(dir.path(), ".hidden", 0o755, &note("never"));
        put(dir.path(), "50-open", 0o757, &note("never"));
        put(dir.path(), "60-foreign", 0o755, &note("never"));
        put(dir.path(), "70-last", 0o755, "kill -9 $$");
        let is_root = geteuid().is_root();
        if is_root {
            std::os::unix::fs::chown(dir.path().join("60-foreign"), Some(65534), None).unwrap();
        } else {
            std::fs::remove_file(dir.path().join("60-foreign")).unwrap();
        }
        let id = GuestId {
            clone_number: 3,
            generation: 2,
            parent: Some("p".into()),
            nics: vec![ramet_guest::protocol::GuestNic {
                ip: "10.0.0.3".into(),
                gateway: Some("10.0.0.1".into()),
                ..Default::default()
            }],
            ..GuestId::default()
        };
        let env = environment(Some(&id), "clone");
        let results = run_all(dir.path(), &env, run(LIMIT)).unwrap();
        assert_eq!(std::fs::read_to_string(&log).unwrap(), "a clone 2\nb 3 10.0.0.3 10.0.0.1 p\n");
        let of = |name: &str| results.iter().find(|result| result.name == name).unwrap();
        assert!(of("10-a").ok && of("10-a").exit == Some(0));
        assert_eq!((of("30-c").ok, of("30-c").exit, of("30-c").output.as_str()), (false, Some(3), "out\nerr\n"));
        assert!(of("50-open").ok && of("50-open").exit.is_none());
        assert!(of("50-open").remark.as_ref().unwrap().contains("write"));
        if is_root {
            assert!(of("60-foreign").remark.as_ref().unwrap().contains("65534"));
        }
        assert_eq!((of("70-last").ok, of("70-last").exit), (false, Some(137)));
        assert_eq!(results.len(), if is_root { 6 } else { 5 });

        let stopped = run_all(dir.path(), &env, Run { stop_at_failure: true, ..run(LIMIT) }).unwrap();
        assert_eq!(stopped.last().unwrap().name, "30-c");
        assert!(run_all(&dir.path().join("none"), &env, run(LIMIT)).unwrap().is_empty());
    }

    #[test]
    fn a_hook_that_forks_is_killed_whole_at_the_limit() {
        let dir = tempfile::tempdir().unwrap();
        let pids = dir.path().join(".pids");
        let script = format!(
            "trap '' TERM; (trap '' TERM; sh -c 'echo $$ >> {0}; exec sleep 600') & echo $$ >> {0}; echo begun; \
             while :; do sleep 600; done",
            pids.display()
        );
        put(dir.path(), "stubborn", 0o755, &script);
        put(dir.path(), "thereafter", 0o755, "true");
        let begun = Instant::now();
        // The limit comes when both have noted who they are.
        let both = || std::fs::read_to_string(&pids).is_ok_and(|text| text.lines().count() == 2);
        let is_cancelled = || both() || begun.elapsed() > LIMIT;
        let results = run_all(dir.path(), &[], Run { is_cancelled: &is_cancelled, ..run(LIMIT * 2) }).unwrap();
        assert_eq!(results.len(), 2);
        assert!(!results[0].ok && results[0].remark.as_ref().unwrap().contains("killed"), "{results:?}");
        assert_eq!((results[0].exit, results[0].output.as_str()), (Some(137), "begun\n"));
        assert!(!results[1].ok && results[1].exit.is_none(), "no time is left for the next one");
        let text = std::fs::read_to_string(&pids).unwrap();
        assert_eq!(text.lines().count(), 2);
        for pid in text.lines() {
            // It may be a zombie until its new parent has waited for it.
            let stands = || {
                let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
                !stat.is_empty() && !stat.contains(") Z ")
            };
            while stands() {
                assert!(begun.elapsed() < LIMIT * 2, "{pid} lives on");
                std::thread::sleep(Duration::from_millis(5));
            }
        }
        let late = run_all(dir.path(), &[], run(Duration::ZERO)).unwrap();
        assert!(late.iter().all(|result| !result.ok && result.exit.is_none()));
    }

    #[test]
    fn a_hook_past_its_deadline_is_told_so() {
        let dir = tempfile::tempdir().unwrap();
        put(dir.path(), "sleeper", 0o755, "exec sleep 600");
        let results = run_all(dir.path(), &[], run(Duration::from_millis(30))).unwrap();
        assert_eq!((results[0].ok, results[0].exit), (false, Some(128 + 15)));
        assert!(results[0].remark.as_ref().unwrap().contains("limit"));
    }

    #[test]
    fn output_is_bounded_and_its_end_kept() {
        let dir = tempfile::tempdir().unwrap();
        put(dir.path(), "loud", 0o755, "head -c 1000000 /dev/zero | tr '\\0' x; echo; echo the end");
        put(dir.path(), "parent", 0o755, "sleep 600 & echo $! > \"$DIR/.pid\"; echo left");
        let env = [("DIR", dir.path().display().to_string())];
        let results = run_all(dir.path(), &env, run(LIMIT)).unwrap();
        assert!(results[0].ok && results[0].output.len() <= MAX_HOOK_OUTPUT);
        assert!(results[0].output.ends_with("xx\nthe end\n"));
        // A child that holds the output open does not hold the hook.
        assert!(results[1].ok && results[1].output == "left\n", "{:?}", results[1]);
        let pid = std::fs::read_to_string(dir.path().join(".pid")).unwrap();
        let alive = Command::new("kill").arg(pid.trim()).status().unwrap();
        assert!(alive.success(), "what a hook started in good order lives on");
    }

    #[test]
    fn results_fit_into_a_frame() {
        let hook = |ok| HookResult { ok, output: "\u{1}".repeat(MAX_HOOK_OUTPUT), ..HookResult::default() };
        let mut results: Vec<_> = (0..MAX_HOOKS).map(|at| hook(at != 5)).collect();
        fit(&mut results, 14_000);
        assert!(serde_json::to_vec(&results).unwrap().len() <= 14_000);
        assert!(results[0].output.len() < results[5].output.len(), "those that failed say more");
        assert_eq!(last("aä", 1), "");
    }
}
