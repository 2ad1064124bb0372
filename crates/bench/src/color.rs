//! `bench color`: whether the coloring of guests is right, what it costs, and whether a guest does without its free pages.
//!
//! Real guests run under plain QEMU (TCG, so it needs no KVM) with work in their memory. Each is stopped, colored from outside,
//! and held against what its own kernel wrote down right before. Then its free pages are overwritten, and it has to go on.

use crate::report::{Goal, Measured, Report};
use anyhow::{Context as _, Result, bail, ensure};
use ramet_color::{Base, ColorMap, CpuRoot, GuestMemory, color};
use ramet_image::{BuildOptions, ImageStore};
use ramet_memory::{ByteSize, LayerId, PAGE_SIZE, PageIndex, PageSet, page_checksum};
use ramet_truth::{
    guest::{CPU, Fill, Guest, GuestOptions, Observed, RamFile},
    numbers::Numbers,
    observer::{Class, Comparison},
};
use serde::{Deserialize, Serialize};
use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader, Write as _},
    os::fd::AsRawFd as _,
    path::{Path, PathBuf},
    process::{Child, ChildStdin, ChildStdout, Command, Stdio},
    time::{Duration, Instant},
};

const LIMIT: Duration = Duration::from_secs(300);
/// Where guests' RAM goes.
const TMPFS: &str = "/dev/shm";
/// Files on the guests' disk.
const FILES: u64 = 4000;
const PACKAGES: [&str; 2] = ["lighttpd", "python3-minimal"];
/// Times that a stopped guest is colored.
const ROUNDS: usize = 7;
const MIB: f64 = 1_048_576.0;
const GB: f64 = 1e9;

/// The kernels that everything is asked of: the suite and what it is called.
const FULL: [(Option<&str>, &str); 2] = [(None, "default suite"), (Some("trixie"), "trixie")];
/// More kernels of which only the colors are asked.
const MORE: [(Option<&str>, &str); 3] =
    [(Some("bullseye"), "bullseye"), (Some("trixie-backports"), "trixie-backports"), (Some("sid"), "sid")];

/// A heap of Python's that was used for a while, and a promise to look at it again when asked.
const PYTHON: &str = r#"
import os, random, time
random.seed(7)
d = {i: [str(j) * (i % 40) for j in range(8)] for i in range(12000)}
l = [bytes([i % 256]) * random.randrange(10, 20000) for i in range(2500)]
for i in random.sample(range(12000), 6000): del d[i]
for i in sorted(random.sample(range(2500), 1200), reverse=True): del l[i]
def total(): return hash((tuple((k, tuple(v)) for k, v in sorted(d.items())), tuple(l)))
t = total()
open('/tmp/python', 'w').write('ready')
while not os.path.exists('/tmp/python.ask'): time.sleep(1)
open('/tmp/python.right' if total() == t else '/tmp/python.wrong', 'w').write('x')
"#;

/// Runs the bench; `quick` takes two kernels instead of five, and no large guest.
///
/// # Errors
/// When an image can't be built, or a guest does not come up.
pub fn run(quick: bool) -> Result<Report> {
    let mut report = Report::new("color");
    let place = Place::prepare()?;
    let mut right = 0;
    for (suite, name) in FULL {
        let good = full(&place, suite, name, &mut report);
        right += usize::from(kept(good, name, &mut report).unwrap_or(false));
    }
    if !quick {
        for (suite, name) in MORE {
            eprintln!("color: {name}");
            let mut guest = place.boot(suite, 384, 48, |_| {})?;
            let seen = guest.observe()?;
            right += usize::from(all_right(name, &seen));
            measure(
                &mut report,
                format!("{name}: pages of {}", release(&seen.map)),
                "pages",
                seen.map.pages().0 as f64,
            );
        }
        report.goals.push(Goal::at_least("kernels on which every class is right", right as f64, 5.0));
        let done = large(&place, &mut report);
        kept(done, "4 GiB", &mut report);
    }
    Ok(report)
}

/// What a guest that fails leaves out of the report is a goal that is not met: the rest is still told.
fn kept<T>(done: Result<T>, name: &str, report: &mut Report) -> Option<T> {
    match done {
        Ok(done) => Some(done),
        Err(err) => {
            eprintln!("color: {name}: {err:#}");
            report.goals.push(Goal::at_least(format!("{name}: all of it could be measured"), 0.0, 1.0));
            None
        }
    }
}

/// A guest beyond the hole below 4 GiB, with two CPUs, 4-level page tables and a user's half of its own.
fn large(place: &Place, report: &mut Report) -> Result<()> {
    eprintln!("color: 4 GiB");
    let mut guest = place.boot(None, 4096, 300, |options| {
        options.cpus = 2;
        options.cpu = format!("{CPU},la57=off");
        options.cmdline = "pti=on".into();
    })?;
    let seen = guest.observe()?;
    let name = "4 GiB, 2 CPUs, 4 levels, page-table isolation";
    let good = all_right(name, &seen);
    report.goals.push(Goal::at_least(format!("{name}: every class is right"), f64::from(u8::from(good)), 1.0));
    guest.cont()?;
    cost(&mut guest, name, report)
}

/// Everything of one kernel; whether every class is right.
fn full(place: &Place, suite: Option<&str>, name: &str, report: &mut Report) -> Result<bool> {
    eprintln!("color: {name}");
    let mut guest = place.boot(suite, 768, 200, |_| {})?;
    let seen = guest.observe()?;
    let good = all_right(name, &seen);
    truth_goals(name, &seen, report);
    eprintln!("color: {name}: its free pages overwritten");
    let pages = guest.overwrite_free(&seen.map, Fill::Garbage)?;
    measure(report, format!("{name}: free pages overwritten with garbage"), "pages", pages as f64);
    let passed = check_self(&mut guest);
    report.goals.push(passed_goal(format!("{name}: goes on over garbage and is right"), passed, pages));
    cost(&mut guest, name, report)?;
    drop(guest);

    eprintln!("color: {name}: init_on_free=1");
    let mut guest = place.boot(suite, 512, 100, |options| options.cmdline = "init_on_free=1 init_on_alloc=0".into())?;
    let seen = guest.observe()?;
    let pages = guest.overwrite_free(&seen.map, Fill::Zeros)?;
    measure(report, format!("{name}: free pages overwritten with zeros, init_on_free=1"), "pages", pages as f64);
    let passed = check_self(&mut guest);
    report.goals.push(passed_goal(format!("{name}: init_on_free=1 goes on over zeros and is right"), passed, pages));

    // Debian's kernels are built without page poisoning: what it does is done from outside.
    let seen = guest.observe()?;
    guest.overwrite_free(&seen.map, Fill::Poison)?;
    let roots = guest.roots()?;
    let map = color(guest.memory(), &roots, None)?;
    let pages = (0..map.pages().0).filter(|&page| map.may_be_zero(PageIndex(page))).count();
    let what = "free pages filled as by page_poison=1: pages that may be zero";
    report.goals.push(Goal::at_most(format!("{name}: {what}"), pages as f64, 0.0));
    Ok(good)
}

fn passed_goal(name: String, passed: Result<()>, pages: u64) -> Goal {
    let passed = passed.and_then(|()| {
        ensure!(pages > 1000, "only {pages} pages were overwritten");
        Ok(())
    });
    if let Err(err) = &passed {
        eprintln!("color: {name}: {err:#}");
    }
    Goal::at_least(name, f64::from(u8::from(passed.is_ok())), 1.0)
}

fn measure(report: &mut Report, name: String, unit: &'static str, value: f64) {
    report.results.push(Measured::of(name, unit, vec![value]));
}

/// A disk with files of many sizes. Its name is gone, so that it goes with this process however that ends.
fn disk() -> Result<File> {
    let dir = tempfile::Builder::new().prefix("ramet-bench-color-").tempdir()?;
    let (tree, image) = (dir.path().join("tree"), dir.path().join("disk"));
    let (mut numbers, mut bytes) = (Numbers::new(0x2545_f491_4f6c_dd1d), vec![0; 64 << 10]);
    for number in 0..FILES {
        let dir = tree.join(format!("d{}", number % 40));
        fs::create_dir_all(&dir)?;
        let len = numbers.draw() as usize % bytes.len() / (1 + number as usize % 3);
        numbers.fill(&mut bytes[..len]);
        fs::write(dir.join(format!("f{number}")), &bytes[..len])?;
    }
    let made = Command::new("mkfs.ext4")
        .args(["-q", "-F", "-m", "0", "-N", "8192", "-d"])
        .args([&tree, &image])
        .arg("160M")
        .stdout(Stdio::null())
        .status()
        .context("Can't start mkfs.ext4: install e2fsprogs")?;
    ensure!(made.success(), "mkfs.ext4 could not make a disk with files ({made})");
    Ok(File::open(image)?)
}

/// What guests are made of.
struct Place {
    images: ImageStore,
    programs: PathBuf,
    disk: File,
}

impl Place {
    fn prepare() -> Result<Self> {
        let images = std::env::var_os("RAMET_IMAGE_DIR")
            .context("RAMET_IMAGE_DIR is not set: run this by `cargo xtask bench color`, which sets it")?;
        let programs = std::env::current_exe()?.parent().context("this program lies in no directory")?.to_owned();
        Ok(Self { images: ImageStore::new(images), programs, disk: disk()? })
    }

    /// Where QEMU can open the disk, which has no name.
    fn disk_path(&self) -> PathBuf {
        format!("/proc/{}/fd/{}", std::process::id(), self.disk.as_raw_fd()).into()
    }

    /// The image of a suite's kernel, built when there is none or its programs are newer.
    fn image(&self, suite: Option<&str>) -> Result<PathBuf> {
        let name = suite.map_or_else(|| "color".to_owned(), |suite| format!("color-{suite}"));
        let [agent, truth] = ["ramet-agent-static", "ramet-truth-static"].map(|name| self.programs.join(name));
        let made = self.images.dir().join(&name).join("image.json");
        let modified = |path: &Path| fs::metadata(path).and_then(|data| data.modified());
        let newest = modified(&truth).and_then(|truth| Ok(truth.max(modified(&agent)?)));
        let newest = newest.with_context(|| {
            format!(
                "{} or {} is not there: `cargo xtask setup --release` builds them",
                truth.display(),
                agent.display()
            )
        })?;
        if !modified(&made).is_ok_and(|made| made >= newest) {
            eprintln!("color: building the guest image {name}");
            let options = BuildOptions {
                name: name.clone(),
                packages: PACKAGES.map(str::to_owned).to_vec(),
                suite: suite.map(str::to_owned),
                add: vec![(truth, "/usr/bin/ramet-truth".into())],
                agent,
                replace: true,
            };
            self.images.build(&options, &mut |_| {}).with_context(|| format!("Can't build the guest image {name}"))?;
        }
        Ok(self.images.dir().join(name))
    }

    /// Boots a guest and puts work into its memory, of which `aged` MiB are aged memory.
    fn boot(
        &self,
        suite: Option<&str>,
        mebibytes: u64,
        aged: u64,
        change: impl FnOnce(&mut GuestOptions),
    ) -> Result<Guest> {
        let mut options = GuestOptions::new(self.image(suite)?, ByteSize::mib(mebibytes));
        options.disk = Some(self.disk_path());
        options.tmpfs = TMPFS.into();
        change(&mut options);
        let work = || {
            let mut guest = Guest::start(&options)?;
            load(&mut guest, aged)?;
            Ok(guest)
        };
        // Nothing has been done to this guest yet: where QEMU's emulation fails it, another is as good.
        work().or_else(|err: anyhow::Error| {
            eprintln!("color: a guest failed by itself, and is started again: {err:#}");
            work()
        })
    }
}

/// Puts work into a guest's memory: a disk's files, a web server, Python's heap, `mebibytes` of aged memory, shared memory.
fn load(guest: &mut Guest, mebibytes: u64) -> Result<()> {
    guest.sh("modprobe virtio_blk; modprobe ext4; mkdir -p /disk && mount -o ro /dev/vda /disk", LIMIT)?;
    guest.sh("find /disk -type f | sort | xargs cat | md5sum >/tmp/disk.sum", LIMIT)?;
    guest.sh("find /disk -type f | wc -l | grep -qx 4000", LIMIT)?;
    guest.sh("find /usr /etc /var -xdev -type f 2>/dev/null | xargs cat >/dev/null 2>&1; true", LIMIT)?;
    guest.sh(
        "dd if=/dev/urandom of=/dev/shm/shared bs=1M count=12 2>/dev/null; md5sum </dev/shm/shared >/tmp/shared.sum",
        LIMIT,
    )?;
    guest.sh("mkdir -p /tmp/small; i=0; while [ $i -lt 200 ]; do head -c $((i*97+100)) /dev/urandom >/tmp/small/$i; i=$((i+1)); done; cat /tmp/small/* | md5sum >/tmp/small.sum", LIMIT)?;
    guest.sh(
        "printf 'server.document-root=\"/disk\"\\nserver.port=8080\\nserver.bind=\"127.0.0.1\"\\n' >/tmp/lighttpd.conf; \
         lighttpd -f /tmp/lighttpd.conf || exit 9; \
         i=0; until wget -q -O /dev/null http://127.0.0.1:8080/d0/f0; do sleep 0.5; i=$((i+1)); [ $i -lt 200 ] || exit 9; done; \
         i=0; while [ $i -lt 40 ]; do cat /disk/d$i/f$i; i=$((i+1)); done | md5sum >/tmp/web.sum",
        LIMIT,
    )?;
    for line in PYTHON.trim().lines() {
        guest.sh(&format!("cat >>/tmp/load.py <<'ENDE'\n{line}\nENDE"), LIMIT)?;
    }
    guest.sh(
        &format!(
            "i=0; while [ $i -lt 40 ]; do wget -q -O /dev/null http://127.0.0.1:8080/d$i/f$i || exit 9; i=$((i+1)); done; \
             python3 /tmp/load.py >/tmp/python.log 2>&1 & ramet-truth hold {mebibytes} /tmp/held & sleep 10000 & true"
        ),
        LIMIT,
    )?;
    guest.sh(
        "i=0; while [ ! -e /tmp/held ] || [ ! -e /tmp/python ]; do sleep 0.5; i=$((i+1)); [ $i -lt 400 ] || { cat /tmp/python.log; exit 9; }; done",
        LIMIT,
    )?;
    Ok(())
}

fn release(map: &ColorMap) -> &str {
    map.kernel.as_ref().map_or("a kernel that was not found", |kernel| &kernel.release)
}

/// The shares that have to be right: what of, how much is, how much there is, and how much has to be.
fn shares(comparison: &Comparison) -> Vec<(String, f64, u64, f64)> {
    let class = |(class, share): (&Class, &ramet_truth::observer::Share)| {
        let bound = if *class == Class::Buddy { 0.999 } else { 0.995 };
        (format!("{} right", class.name()), share.ratio(), share.all, bound)
    };
    let mut shares: Vec<_> = comparison.classes.iter().map(class).collect();
    for (name, share) in [
        ("user code called code", comparison.user_code),
        ("called code is user code", comparison.called_code),
        ("process and address of mapped pages", comparison.mapped),
    ] {
        shares.push((name.to_owned(), share.ratio(), share.all, 0.995));
    }
    shares
}

fn all_right(name: &str, seen: &Observed) -> bool {
    let good = seen.comparison.wrongly_free.is_empty()
        && shares(&seen.comparison).iter().all(|(_, ratio, all, bound)| ratio >= bound && *all > 0);
    let word = if good { "every class is right" } else { "NOT every class is right" };
    eprintln!("color: {name}: {}: {word} {}", release(&seen.map), seen.map.trouble);
    eprint!("{}", seen.comparison.text());
    good
}

fn truth_goals(name: &str, seen: &Observed, report: &mut Report) {
    let name = format!("{name} ({})", release(&seen.map));
    for (what, ratio, pages, bound) in shares(&seen.comparison) {
        measure(report, format!("{name}: {what}, of so many"), "pages", pages as f64);
        report.goals.push(Goal::at_least(format!("{name}: {what}"), ratio, bound));
    }
    let wrong = seen.comparison.wrongly_free.len();
    report.goals.push(Goal::at_most(format!("{name}: pages in use that are called free"), wrong as f64, 0.0));
    measure(report, format!("{name}: not at rest, left out"), "pages", seen.comparison.restless as f64);
    for (field, (ours, theirs)) in &seen.comparison.totals {
        let off = (*ours as f64 / *theirs as f64 - 1.0).abs();
        measure(report, format!("{name}: {field}, the map"), "KiB", *ours as f64);
        measure(report, format!("{name}: {field}, the guest"), "KiB", *theirs as f64);
        let field = match *field {
            "Slab" => "Slab of /proc/meminfo, which counts large kmallocs with the slabs",
            "Slab by slabinfo" => "Slab by /proc/slabinfo, which does not",
            other => other,
        };
        report.goals.push(Goal::at_most(format!("{name}: {field}: |map / guest - 1|"), off, 0.01));
    }
}

/// Lets a guest go on, and fails unless everything in it is right: what it had in memory, and what it does anew.
fn check_self(guest: &mut Guest) -> Result<()> {
    guest.cont()?;
    guest.forget_truth()?;
    for (what, command) in [
        ("cached files", "find /disk -type f | sort | xargs cat | md5sum | cmp - /tmp/disk.sum"),
        (
            "shared memory",
            "md5sum </dev/shm/shared | cmp - /tmp/shared.sum && cat /tmp/small/* | md5sum | cmp - /tmp/small.sum",
        ),
        (
            "a process's aged memory",
            "touch /tmp/held.ask; while ! ls /tmp/held.* | grep -qE 'right|wrong'; do sleep 0.2; done; [ -e /tmp/held.right ]",
        ),
        (
            "Python's heap",
            "touch /tmp/python.ask; while ! ls /tmp/python.* | grep -qE 'right|wrong'; do sleep 0.2; done; [ -e /tmp/python.right ]",
        ),
        ("processes that were there", "pidof lighttpd && pidof sleep"),
        ("fresh memory", "ramet-truth check 200"),
        (
            "new files",
            "dd if=/dev/zero of=/tmp/new bs=1M count=60 2>/dev/null; [ \"$(md5sum </tmp/new)\" = \"$(head -c 62914560 /dev/zero | md5sum)\" ]; e=$?; rm /tmp/new; [ $e = 0 ]",
        ),
        (
            "files read anew",
            "echo 3 >/proc/sys/vm/drop_caches; find /disk -type f | sort | xargs cat | md5sum | cmp - /tmp/disk.sum",
        ),
        (
            "new processes",
            "i=0; while [ $i -lt 100 ]; do busybox true || exit 1; i=$((i+1)); done; python3 -c 'assert sum(range(1000)) == 499500'",
        ),
        (
            "the web server",
            "i=0; while [ $i -lt 40 ]; do wget -q -O - http://127.0.0.1:8080/d$i/f$i || exit 9; i=$((i+1)); done >/tmp/web && md5sum </tmp/web | cmp - /tmp/web.sum",
        ),
        (
            "the kernel's log",
            "! dmesg | grep -v 'ommand line' | grep -iE 'bad page|bug:|oops:|corrupt|general protection|segfault'",
        ),
    ] {
        guest.sh(command, LIMIT).with_context(|| format!("Not right after its free pages were overwritten: {what}"))?;
    }
    Ok(())
}

/// What a child that colors a guest found out.
#[derive(Debug, Serialize, Deserialize)]
struct Costs {
    /// Seconds of each coloring.
    color: Vec<f64>,
    /// Seconds of each encoding.
    encode: Vec<f64>,
    /// Bytes of the encoded map.
    encoded: usize,
    /// Bytes of memory that the first coloring took at most.
    peak: u64,
}

/// The same after a while.
#[derive(Debug, Serialize, Deserialize)]
struct Later {
    /// Pages that had changed.
    changed: u64,
    /// Seconds of each coloring with the map before as its base.
    color: Vec<f64>,
    /// Whether the map is the one that is had without a base.
    same: bool,
}

/// What coloring a guest costs. In a process of its own, whose peak of memory is nothing else's.
fn cost(guest: &mut Guest, name: &str, report: &mut Report) -> Result<()> {
    eprintln!("color: {name}: what it costs");
    std::thread::sleep(Duration::from_secs(2));
    guest.stop()?;
    let size = guest.memory().pages().size();
    let mut child = Colorer::start(&guest.memory().path(), size)?;
    let costs: Costs = child.ask(&guest.roots()?)?;
    guest.cont()?;
    guest.sh("md5sum </dev/shm/shared >/dev/null; busybox true; head -c 4000000 /dev/urandom >/tmp/again", LIMIT)?;
    guest.stop()?;
    let later: Later = child.ask(&guest.roots()?)?;
    guest.cont()?;
    let bytes = size.bytes() as f64;
    let speed = Measured::of(
        format!("{name}: coloring a stopped guest of {} MiB, one core", size.bytes() >> 20),
        "GB/s",
        costs.color.iter().map(|seconds| bytes / GB / seconds).collect(),
    );
    let milliseconds = |samples: &[f64]| samples.iter().map(|seconds| seconds * 1e3).collect::<Vec<_>>();
    let [full, base, encode] = [
        ("coloring", &costs.color),
        ("coloring with an earlier map as base", &later.color),
        ("encoding the map", &costs.encode),
    ]
    .map(|(what, samples)| Measured::of(format!("{name}: {what}"), "ms", milliseconds(samples)));
    let size_goal = costs.encoded as f64 / 1e6 / (bytes / GB);
    report.goals.extend([
        Goal::at_least(format!("{name}: guest memory colored a second on one core, GB"), speed.median, 1.0),
        Goal::at_most(format!("{name}: peak memory of coloring / guest memory"), costs.peak as f64 / bytes, 0.02),
        Goal::at_most(format!("{name}: encoded map, MB per GB of guest memory"), size_goal, 1.0),
        Goal::at_least(format!("{name}: with a base the map is the same"), f64::from(u8::from(later.same)), 1.0),
    ]);
    report.results.extend([speed, full, base, encode]);
    measure(report, format!("{name}: pages changed since the base"), "pages", later.changed as f64);
    measure(report, format!("{name}: peak memory of coloring"), "MiB", costs.peak as f64 / MIB);
    measure(report, format!("{name}: encoded map"), "KiB", costs.encoded as f64 / 1024.0);
    Ok(())
}

/// This program once more, with one thread, that colors what it is told to.
struct Colorer {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Colorer {
    fn start(ram: &Path, size: ByteSize) -> Result<Self> {
        let mut child = Command::new(std::env::current_exe()?)
            .arg("color-child")
            .arg(ram)
            .arg(size.bytes().to_string())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("Can't start this program again")?;
        let input = child.stdin.take().context("no pipe to the child")?;
        let output = BufReader::new(child.stdout.take().context("no pipe from the child")?);
        Ok(Self { child, input, output })
    }

    fn ask<T: serde::de::DeserializeOwned>(&mut self, cpus: &[CpuRoot]) -> Result<T> {
        let cpus: Vec<_> = cpus.iter().map(|cpu| (cpu.cr3, cpu.cr4)).collect();
        writeln!(self.input, "{}", serde_json::to_string(&cpus)?)?;
        let mut line = String::new();
        self.output.read_line(&mut line)?;
        serde_json::from_str(&line).context("The process that colors a guest broke; see above")
    }
}

impl Drop for Colorer {
    fn drop(&mut self) {
        // Both fail only when it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Colors a stopped guest, and again when it has run for a while. Asked and answered in lines of JSON.
///
/// # Errors
/// When memory can't be read.
pub fn child(ram: &Path, bytes: u64) -> Result<()> {
    let memory = RamFile::open(ram, ByteSize(bytes))?;
    let mut lines = std::io::stdin().lock().lines();
    let mut asked = || -> Result<Vec<CpuRoot>> {
        let line = lines.next().context("Nobody asks")??;
        let cpus: Vec<(u64, u64)> = serde_json::from_str(&line)?;
        Ok(cpus.into_iter().map(|(cr3, cr4)| CpuRoot { cr3, cr4 }).collect())
    };
    let answer = |line: String| writeln!(std::io::stdout(), "{line}");

    let cpus = asked()?;
    let before = peak()?;
    let mut costs = Costs { color: vec![], encode: vec![], encoded: 0, peak: 0 };
    let mut earlier = timed(&mut costs.color, || color(&memory, &cpus, None))?;
    costs.peak = peak()?.saturating_sub(before);
    for _ in 1..ROUNDS {
        earlier = timed(&mut costs.color, || color(&memory, &cpus, None))?;
        costs.encoded = timed(&mut costs.encode, || Ok::<_, anyhow::Error>(earlier.encode()))?.len();
    }
    let sums = sums(&memory)?;
    answer(serde_json::to_string(&costs)?)?;

    let cpus = asked()?;
    let mut changed = PageSet::new(memory.pages());
    for (page, (then, now)) in (0..).map(PageIndex).zip(sums.iter().zip(&self::sums(&memory)?)) {
        if then != now {
            changed.insert(page);
        }
    }
    ensure!(earlier.kernel.is_some(), "no kernel was understood: {}", earlier.trouble);
    let base = Base { map: &earlier, changed: &changed };
    let mut later = Later { changed: changed.count().0, color: vec![], same: true };
    for _ in 0..ROUNDS {
        let map = timed(&mut later.color, || color(&memory, &cpus, Some(base)))?;
        if later.color.len() == ROUNDS {
            later.same = map == color(&memory, &cpus, None)?;
        }
    }
    answer(serde_json::to_string(&later)?)?;
    Ok(())
}

fn timed<T, E>(samples: &mut Vec<f64>, work: impl FnOnce() -> std::result::Result<T, E>) -> std::result::Result<T, E> {
    let began = Instant::now();
    let done = work();
    samples.push(began.elapsed().as_secs_f64());
    done
}

/// Checksums of all pages.
fn sums(memory: &RamFile) -> Result<Vec<u64>> {
    let mut bytes = [0; PAGE_SIZE];
    let mut sum = |page: u64| -> Result<u64> {
        memory.read(PageIndex(page).offset(), &mut bytes)?;
        Ok(page_checksum(LayerId::from_u128(1), PageIndex(page), &bytes))
    };
    (0..memory.pages().0).map(&mut sum).collect()
}

/// The most memory that this process has had.
fn peak() -> Result<u64> {
    let file = BufReader::new(File::open("/proc/self/status")?);
    for line in file.lines() {
        if let Some(kibibytes) = line?.strip_prefix("VmHWM:") {
            return Ok(kibibytes.trim().trim_end_matches(" kB").parse::<u64>()? << 10);
        }
    }
    bail!("/proc/self/status has no VmHWM")
}
