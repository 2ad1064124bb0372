//! Another process: its memory read, its faults served, its end waited for; and numbers that outlive a process.

#![allow(clippy::unwrap_used, reason = "a failure ends the test")]

mod support;

use ramet_kernel::{
    CopyError, CopyMode, Event, PrivateMapping, SharedAtomics, SharedMapping, Uffd, mem_stats, pidfd_open,
    pidfd_send_signal, pidfd_wait, process_read,
};
use rustix::process::{PidfdGetfdFlags, Signal, pidfd_getfd};
use std::{
    fs,
    io::{self, BufRead, BufReader, Write},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::fs::MetadataExt,
    },
    process::{Child, ChildStdin, Command, Stdio},
    sync::{atomic::Ordering, mpsc},
    time::Duration,
};
use support::{
    Fault, LIMIT, MISSING, PAGE, PAGER_FEATURES, Tmpfs, Touch, Toucher, Watched, bytes, fill, page_of, small_pages,
    word_in,
};

const PAGES: u64 = 16;
/// Says to the other process that it is one, and which file of numbers is to be counted up.
const NUMBERS: &str = "RAMET_KERNEL_TEST_NUMBERS";

/// The body of the other process: memory under a userfaultfd of its own, as QEMU has, and commands on its input.
#[test]
#[ignore = "run by the tests here, as a process of its own"]
fn other_process() {
    let Some(numbers) = std::env::var_os(NUMBERS) else { return };
    let memory = Watched::anonymous(PAGES, MISSING);
    let numbers = SharedAtomics::open(numbers.as_ref(), 8).unwrap();
    println!("\n@{} {}", memory.memory.addr(), memory.uffd.as_fd().as_raw_fd());
    for line in io::stdin().lines() {
        let line = line.unwrap();
        let (command, number) = line.split_once(' ').unwrap();
        let number: usize = number.parse().unwrap();
        let answer = match command {
            "read" => memory.memory.read_u64(number * 512),
            "count" => numbers.get(number).fetch_add(1, Ordering::AcqRel),
            _ => panic!("{line}"),
        };
        println!("\n@{answer}");
    }
}

/// That process, ended in the end.
struct Other {
    child: Child,
    stdin: ChildStdin,
    answers: mpsc::Receiver<String>,
    addr: u64,
    uffd: i32,
    _dir: tempfile::TempDir,
}

impl Other {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "other_process", "--ignored", "--nocapture"])
            .env(NUMBERS, dir.path().join("numbers"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let stdin = child.stdin.take().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        let (tell, answers) = mpsc::channel();
        std::thread::spawn(move || {
            let lines = stdout.lines().map_while(Result::ok);
            lines.filter_map(|line| Some(line.strip_prefix('@')?.to_owned())).all(|line| tell.send(line).is_ok())
        });
        let mut other = Self { child, stdin, answers, addr: 0, uffd: 0, _dir: dir };
        let first = other.answer();
        let (addr, uffd) = first.split_once(' ').unwrap();
        (other.addr, other.uffd) = (addr.parse().unwrap(), uffd.parse().unwrap());
        other
    }

    fn pid(&self) -> u32 {
        self.child.id()
    }

    fn pidfd(&self) -> OwnedFd {
        pidfd_open(self.pid()).unwrap()
    }

    fn send(&mut self, command: &str) {
        writeln!(self.stdin, "{command}").unwrap();
    }

    fn answer(&self) -> String {
        self.answers.recv_timeout(LIMIT).expect("the other process does not answer")
    }

    /// Its userfaultfd, in this process: what a pager takes over.
    fn take_over(&self) -> Uffd {
        let uffd = Uffd::from(pidfd_getfd(self.pidfd(), self.uffd, PidfdGetfdFlags::empty()).unwrap());
        uffd.api(PAGER_FEATURES).unwrap();
        uffd
    }

    fn fault_on(&self, uffd: &Uffd, page: u64) {
        assert!(uffd.poll(Some(LIMIT)).unwrap(), "no fault was delivered");
        let mut event = [Event::Other];
        assert_eq!(uffd.read_events(&mut event).unwrap(), 1);
        let addr = self.addr + page * PAGE;
        assert_eq!(event, [Event::Pagefault { addr, write: false, wp: false, minor: false }]);
    }
}

impl Drop for Other {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn a_pager_serves_another_process_and_another_pager_takes_over() {
    let mut other = Other::start();
    let first = other.take_over();
    other.send("read 3");
    other.fault_on(&first, 3);
    first.copy(other.addr + 3 * PAGE, &page_of(33), CopyMode::default()).unwrap();
    assert_eq!(other.answer(), "33");

    // A pager ends with a fault in its hands. The process holds its own descriptor, so it waits, and reads no zeros.
    other.send("read 4");
    other.fault_on(&first, 4);
    drop(first);
    let second = other.take_over();
    assert!(other.answers.try_recv().is_err(), "a page that nobody served was read");
    second.wake(other.addr, PAGES * PAGE).unwrap();
    other.fault_on(&second, 4);
    second.copy(other.addr + 4 * PAGE, &page_of(44), CopyMode::default()).unwrap();
    assert_eq!(other.answer(), "44");
    let mut words = [0; 16];
    process_read(other.pid(), other.addr + 4 * PAGE - 8, &mut words).unwrap();
    assert_eq!(words, [33u64.to_ne_bytes(), 44u64.to_ne_bytes()].concat()[..]);
}

#[test]
fn the_end_of_a_process_is_seen_and_told_from_other_failures() {
    let mut other = Other::start();
    let (pidfd, uffd) = (other.pidfd(), other.take_over());
    assert!(!pidfd_wait(pidfd.as_fd(), Some(Duration::ZERO)).unwrap(), "it runs");
    pidfd_send_signal(pidfd.as_fd(), Signal::STOP.as_raw()).unwrap();
    assert!(!pidfd_wait(pidfd.as_fd(), Some(Duration::from_millis(1))).unwrap(), "a stopped process has not ended");
    pidfd_send_signal(pidfd.as_fd(), Signal::CONT.as_raw()).unwrap();
    other.send("count 0");
    assert_eq!(other.answer(), "0");

    pidfd_send_signal(pidfd.as_fd(), Signal::KILL.as_raw()).unwrap();
    assert!(pidfd_wait(pidfd.as_fd(), Some(LIMIT)).unwrap());
    assert!(pidfd_wait(pidfd.as_fd(), None).unwrap(), "and it stays so");
    let copied = uffd.copy(other.addr, &page_of(1), CopyMode::default());
    assert!(matches!(copied, Err(CopyError::Gone)), "{copied:?}");
    let zeroed = uffd.zeropage(other.addr, PAGE, false);
    assert!(matches!(zeroed, Err(CopyError::Gone)), "{zeroed:?}");
    let gone = Some(rustix::io::Errno::SRCH.raw_os_error());
    assert_eq!(uffd.write_protect(other.addr, PAGE, true, false).unwrap_err().raw_os_error(), gone);
    assert_eq!(io::Error::from(CopyError::Gone).raw_os_error(), gone);
    assert_eq!(process_read(other.pid(), other.addr, &mut [0]).unwrap_err().raw_os_error(), gone);
    eprintln!("wake {:?} read {:?}", uffd.wake(other.addr, PAGE), uffd.read_events(&mut [Event::Other]));

    // It can still be signalled, to no effect, until its parent has heard of it.
    pidfd_send_signal(pidfd.as_fd(), Signal::KILL.as_raw()).unwrap();
    let status = other.child.wait().unwrap();
    assert_eq!(std::os::unix::process::ExitStatusExt::signal(&status), Some(Signal::KILL.as_raw()));
    assert_eq!(pidfd_send_signal(pidfd.as_fd(), Signal::KILL.as_raw()).unwrap_err().raw_os_error(), gone);
    assert!(pidfd_wait(pidfd.as_fd(), Some(Duration::ZERO)).unwrap());
}

#[test]
fn only_processes_have_pidfds() {
    assert!(pidfd_open(0).is_err());
    assert!(pidfd_open(u32::MAX).is_err());
    assert_eq!(
        pidfd_open(i32::MAX.cast_unsigned()).unwrap_err().raw_os_error(),
        Some(rustix::io::Errno::SRCH.raw_os_error())
    );
    let file = tempfile::tempfile().unwrap();
    assert!(pidfd_send_signal(file.as_fd(), 0).is_err());
}

/// The end of a mapping of a process with nothing mapped after it.
fn edge(pid: u32) -> u64 {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let number = |text: &str| u64::from_str_radix(text, 16).unwrap();
    let ranges: Vec<(u64, u64, bool)> = maps
        .lines()
        .map(|line| {
            let (range, rest) = line.split_once(' ').unwrap();
            let (start, end) = range.split_once('-').unwrap();
            // Not the special pages, nor the stack, which grows.
            let plain = rest.starts_with('r') && !rest.contains('[');
            (number(start), number(end), plain)
        })
        .collect();
    ranges.windows(2).find(|pair| pair[0].2 && pair[0].1 + PAGE < pair[1].0).map(|pair| pair[0].1).unwrap()
}

#[test]
fn a_read_that_meets_a_hole_fails_as_a_whole() {
    let other = Other::start();
    let edge = edge(other.pid());
    let mut before = [0; 64];
    process_read(other.pid(), edge - 64, &mut before).unwrap();
    let mut across = [0; 128];
    let fault = Some(rustix::io::Errno::FAULT.raw_os_error());
    assert_eq!(process_read(other.pid(), edge - 64, &mut across).unwrap_err().raw_os_error(), fault);
    assert_eq!(process_read(other.pid(), edge, &mut across).unwrap_err().raw_os_error(), fault);
    process_read(other.pid(), edge, &mut []).unwrap();
    // Nor is a mapping beyond the end of its file memory.
    let file = tempfile::tempfile().unwrap();
    file.set_len(PAGE).unwrap();
    let mapping = SharedMapping::map(&file, bytes(3)).unwrap();
    mapping.write_u64(511, 9);
    let mut all = vec![0; bytes(3)];
    process_read(std::process::id(), mapping.addr(), &mut all[..bytes(1)]).unwrap();
    assert_eq!(all[bytes(1) - 8], 9);
    assert_eq!(process_read(std::process::id(), mapping.addr(), &mut all).unwrap_err().raw_os_error(), fault);
}

#[test]
fn absent_pages_are_read_as_what_they_would_be() {
    small_pages();
    let memory = PrivateMapping::anonymous(bytes(3)).unwrap();
    memory.write_u64(512, 1);
    let mut all = vec![7; bytes(3)];
    process_read(std::process::id(), memory.addr(), &mut all).unwrap();
    let expected = [&[0; PAGE as usize][..], &1u64.to_ne_bytes(), &[0; 2 * PAGE as usize - 8]].concat();
    assert_eq!(all, expected);

    // Under a userfaultfd it is the reader, whatever process it is in, that waits for the page.
    let tmpfs = Tmpfs::mount("huge=never");
    let file = tmpfs.sparse("pages", PAGES);
    fill(&file, 0, 1, 5);
    let clone = Watched::of_file(&file, PAGES, MISSING);
    let (addr, len) = (clone.addr(0), bytes(2));
    let reader = Toucher::start(move || {
        let mut both = vec![0; len];
        process_read(std::process::id(), addr, &mut both).unwrap();
        both.as_chunks::<8>().0.iter().map(|word| u64::from_ne_bytes(*word)).sum()
    });
    assert_eq!(clone.fault(), Fault::missing(1, false));
    assert!(reader.waits());
    fill(&file, 1, 1, 6);
    clone.wake(1);
    assert_eq!(reader.finish(), 512 * (5 + 6));
}

#[test]
fn a_clones_own_memory_is_what_it_wrote() {
    let tmpfs = Tmpfs::mount("huge=never");
    let file = tmpfs.sparse("pages", PAGES);
    fill(&file, 0, PAGES, 5);
    let clone = PrivateMapping::of_file(&file, bytes(PAGES)).unwrap();
    let stats = || mem_stats(std::process::id(), clone.addr(), clone.len() as u64).unwrap();
    for page in 0..16 {
        assert_eq!(clone.read_u64(page * 512), 5);
    }
    assert_eq!(stats().private_bytes, 0);
    assert_eq!(stats().ram_pss_bytes, PAGES * PAGE);
    for page in 0..3 {
        clone.write_u64(page * 512, 6);
    }
    assert_eq!(stats().private_bytes, 3 * PAGE);
    assert!(stats().vmm_pss_bytes > 0);
    assert_eq!((0..PAGES).map(|page| word_in(&file, page)).max(), Some(5));
}

#[test]
fn numbers_survive_whoever_maps_them() {
    let tmpfs = Tmpfs::mount("huge=never");
    let path = tmpfs.path().join("numbers");
    let many = 1 << 20;
    {
        let numbers = SharedAtomics::open(&path, many).unwrap();
        assert_eq!((numbers.len(), numbers.load(0), numbers.load(many - 1)), (many, 0, 0));
        numbers.get(7).store(70, Ordering::Release);
        numbers.get(many - 1).fetch_or(1 << 63, Ordering::AcqRel);
        // Two views of the same numbers.
        let again = SharedAtomics::open(&path, many).unwrap();
        again.get(7).fetch_add(1, Ordering::AcqRel);
        assert_eq!(numbers.load(7), 71);
    }
    let numbers = SharedAtomics::open(&path, many).unwrap();
    assert_eq!([0, 7, 8, many - 1].map(|index| numbers.load(index)), [0, 71, 0, 1 << 63]);
    assert!(fs::metadata(&path).unwrap().blocks() * 512 <= 3 * PAGE, "memory is taken for numbers that nobody touched");

    // Another length is refused, and harms nothing.
    for len in [many - 1, many + 1, 0] {
        let err = SharedAtomics::open(&path, len).unwrap_err().to_string();
        assert!(err.contains(&(many * 8).to_string()), "{err}");
    }
    assert_eq!(numbers.load(7), 71);
    assert_eq!(SharedAtomics::open(&tmpfs.path().join("none"), 0).unwrap().len(), 1);
    assert!(SharedAtomics::open(&tmpfs.path().join("no/such/dir"), 1).is_err());
}

#[test]
fn numbers_are_one_for_two_processes_and_outlive_the_one_that_is_killed() {
    let mut other = Other::start();
    let path = other._dir.path().join("numbers");
    let numbers = SharedAtomics::open(&path, 8).unwrap();
    numbers.get(2).store(10, Ordering::Release);
    other.send("count 2");
    assert_eq!(other.answer(), "10");
    assert_eq!(numbers.load(2), 11);
    drop(numbers);
    pidfd_send_signal(other.pidfd().as_fd(), Signal::KILL.as_raw()).unwrap();
    assert!(pidfd_wait(other.pidfd().as_fd(), Some(LIMIT)).unwrap());
    assert_eq!(SharedAtomics::open(&path, 8).unwrap().load(2), 11);
}

#[test]
#[should_panic(expected = "word 8 of a mapping of 8 words")]
fn there_is_nothing_beyond_the_end() {
    let dir = tempfile::tempdir().unwrap();
    let numbers = SharedAtomics::open(&dir.path().join("numbers"), 8).unwrap();
    let _ = numbers.load(8);
}

#[test]
fn a_mapping_is_private_or_shared_as_it_says() {
    let tmpfs = Tmpfs::mount("huge=never");
    let file = tmpfs.sparse("pages", 2);
    let shared = SharedMapping::map(&file, bytes(2)).unwrap();
    let private = PrivateMapping::of_file(&file, bytes(2)).unwrap();
    shared.write_u64(0, 1);
    assert_eq!((word_in(&file, 0), private.read_u64(0)), (1, 1));
    private.write_u64(0, 2);
    assert_eq!((word_in(&file, 0), shared.read_u64(0)), (1, 1));
    // What the private page hides it hides for good.
    shared.write_u64(0, 3);
    assert_eq!(private.read_u64(0), 2);
    let quiet = Watched::of_file(&file, 2, MISSING);
    assert_eq!(quiet.touch_quietly(0, Touch::Read), 3);
}
