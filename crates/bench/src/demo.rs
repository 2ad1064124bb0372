//! The demo: a VM with work in its memory becomes eight running copies on three hosts.
//!
//! The parent holds random data in eight shards with their checksums, a process that counts, and a file that this process
//! holds open though it is deleted. After the fork every clone checks one shard, so it needs an eighth of the data; at the
//! end one clone checks all of them. What came over the network is read from the links of the hosts themselves.

use std::{fmt::Write as _, time::Instant};

use anyhow::{Context as _, Result, bail, ensure};
use comfy_table::{CellAlignment, Table, presets::UTF8_FULL_CONDENSED};
use ramet_client::{Client, api};
use ramet_lab::{Lab, LabOptions};
use ramet_memory::ByteSize;
use serde::Serialize;

const SHARDS: u32 = 8;
const CLONES: u32 = 8;
const HOSTS: u8 = 3;
const MEMORY: ByteSize = ByteSize::mib(512);

/// What the demo saw.
#[derive(Debug, Serialize)]
pub struct Demo {
    /// The parent.
    pub parent: Parent,
    /// The clones by number.
    pub clones: Vec<CloneSeen>,
    /// Bytes over the links.
    pub network: Network,
    /// The fork call, from the request to the last clone's answer.
    pub fork_ms: f64,
    /// The clone that checked all of the data at the end.
    pub full_check: FullCheck,
}

/// The VM that is forked.
#[derive(Debug, Serialize)]
pub struct Parent {
    /// Its host.
    pub host: String,
    /// What it says of itself.
    pub system: String,
    /// What runs its CPUs.
    pub accel: String,
    /// Guest memory.
    pub memory_bytes: u64,
    /// Memory that it has touched.
    pub touched_bytes: u64,
    /// Random data in its memory.
    pub data_bytes: u64,
    /// From the request to its agent's answer.
    pub boot_s: f64,
    /// How long it took to make the data.
    pub work_s: f64,
    /// Its counter just before the fork.
    pub counter: u64,
    /// How long it stood still.
    pub pause_ms: f64,
}

/// One clone.
#[derive(Debug, Serialize)]
pub struct CloneSeen {
    /// Its number, as its own agent tells it.
    pub number: u32,
    /// Its host.
    pub host: String,
    /// From the request to its CPUs running.
    pub running_ms: f64,
    /// From the request to its agent's answer: identity set, entropy reseeded.
    pub answered_ms: f64,
    /// Pages that came over the network for it, until it had answered.
    pub fetched_to_answer: u64,
    /// Pages that came over the network for it, until it had done its work.
    pub fetched: u64,
    /// Its own pages: what it has written.
    pub own_bytes: u64,
    /// Its share of the host's memory: its own pages and its part of those that it shares.
    pub share_bytes: u64,
    /// The shard that it checked has the parent's checksum.
    pub verified: bool,
    /// The first value of its counter that was seen.
    pub counter_first: u64,
    /// The last value of its counter that was seen.
    pub counter_last: u64,
    /// The deleted file that its process holds open has a line for every count.
    pub file_open: bool,
}

/// Bytes over the links of the hosts, everything included.
#[derive(Debug, Serialize)]
pub struct Network {
    /// Came in at the hosts that don't have the parent, until all clones had answered.
    pub moved_to_answer_bytes: u64,
    /// Until all clones had checked their shards.
    pub moved_bytes: u64,
    /// What the clones on other hosts would have needed if each had been sent the parent's touched memory.
    pub copy_each_bytes: u64,
    /// The same, sent once to each of these hosts.
    pub copy_once_bytes: u64,
}

/// A clone that checks everything.
#[derive(Debug, Serialize)]
pub struct FullCheck {
    /// Its host.
    pub host: String,
    /// All shards have the parent's checksums.
    pub verified: bool,
    /// Pages that came over the network for it in all.
    pub fetched: u64,
}

/// Runs it; `quick` with less data. Everything is gone afterwards, whatever happens.
///
/// # Errors
/// When a step fails: says which.
pub async fn run(quick: bool) -> Result<Demo> {
    let shard = if quick { ByteSize::mib(8) } else { ByteSize::mib(32) };
    say("Bringing up a lab of three hosts");
    let lab = Lab::up(&LabOptions::for_test("demo")?.hosts(HOSTS)).await?;
    let result = play(&lab, shard).await;
    say("Taking the lab down");
    let down = lab.down().await;
    let demo = result?;
    down.map(|()| demo)
}

fn say(text: &str) {
    eprintln!("--> {text}");
}

async fn play(lab: &Lab, shard: ByteSize) -> Result<Demo> {
    let home = lab.client(1);
    say("Booting the guest on h1");
    let began = Instant::now();
    let request = api::RunRequest {
        name: Some("parent".into()),
        memory: MEMORY,
        wait_agent_s: 300,
        ..api::RunRequest::new("default")
    };
    let vm = home.run(&request).await.context("Can't boot the guest")?;
    ensure!(vm.agent, "The guest's agent did not answer: see its console log in {}", lab.dir().display());
    let boot_s = began.elapsed().as_secs_f64();

    say(&format!("Having it fill {} of its memory with random data", ByteSize(shard.bytes() * u64::from(SHARDS))));
    let began = Instant::now();
    let counting = begin_work(&home, shard).await?;
    let work_s = began.elapsed().as_secs_f64();

    let hosts: Vec<String> = lab.hosts().iter().map(|h| h.name.clone()).collect();
    let each = CLONES.div_ceil(u32::from(HOSTS));
    say("Having pre-started QEMUs made ready");
    let pool = api::PoolRequest { like: "parent".into(), count: each, hosts: hosts.clone(), wait: true };
    home.warm(&pool).await.context("Can't fill the pools")?;

    let system = guest(&home, "parent", &["uname", "-sr"]).await?;
    let parent_stats = home.vm_stats("parent").await?;
    let counter = seen(&home, "parent", counting).await?.0;
    let before = received(lab)?;
    say("Forking it to eight clones on three hosts");
    let clones = api::CloneRequest { hosts, wait_agent_s: 120, ..api::CloneRequest::new(CLONES) };
    let fork =
        home.fork("parent", &api::ForkRequest { clones, note: Some("demo".into()), ..Default::default() }).await?;
    let at_answer = received(lab)?;

    let mut to_answer = Vec::new();
    for clone in &fork.clones {
        to_answer.push(fetched(&client_of(lab, &clone.vm.host)?.vm_stats(&clone.vm.name).await?));
    }
    say("Having every clone check its share of the data, and looking at its counter");
    let mut seen_clones = Vec::new();
    for (clone, fetched_to_answer) in fork.clones.iter().zip(to_answer) {
        seen_clones.push(look_at(lab, clone, fetched_to_answer, counting).await?);
    }
    let after = received(lab)?;
    let touched = parent_stats.memory.as_ref().map_or(0, |m| m.ram_private_bytes);
    let remote = fork.clones.iter().filter(|c| c.vm.host != vm.host).count() as u64;

    say("Having the last clone check all of the data");
    let last = fork.clones.last().context("No clone")?;
    let full_check = check_all(lab, last).await?;
    Ok(Demo {
        parent: Parent {
            host: vm.host,
            system,
            accel: match vm.accel {
                api::AccelKind::Tcg => "TCG".to_owned(),
                api::AccelKind::Kvm => "KVM".to_owned(),
            },
            memory_bytes: MEMORY.bytes(),
            touched_bytes: touched,
            data_bytes: shard.bytes() * u64::from(SHARDS),
            boot_s,
            work_s,
            counter,
            pause_ms: ms(fork.parent.pause_us),
        },
        clones: seen_clones,
        network: Network {
            moved_to_answer_bytes: at_answer.saturating_sub(before),
            moved_bytes: after.saturating_sub(before),
            copy_each_bytes: remote * touched,
            copy_once_bytes: u64::from(HOSTS - 1) * touched,
        },
        fork_ms: ms(fork.total_us),
        full_check,
    })
}

/// Fills the parent's memory and starts the counting process; returns its pid in the guest.
async fn begin_work(home: &Client, shard: ByteSize) -> Result<u32> {
    let mib = shard.bytes() >> 20;
    let script = format!(
        "set -e; mkdir -p /work; mount -t tmpfs -o size=95% work /work; cd /work
        n=0; while [ $n -lt {SHARDS} ]; do dd if=/dev/urandom of=shard$n bs=1M count={mib} 2>/dev/null; n=$((n+1)); done
        md5sum shard* >sums
        cat >count <<'END'
exec 9>/work/log; rm /work/log; n=0
while :; do n=$((n+1)); echo $n >&9; echo $n >/work/new; mv /work/new /work/counter; sleep 0.2; done
END
        setsid sh ./count </dev/null >/dev/null 2>&1 & echo $!"
    );
    let pid = guest(home, "parent", &["sh", "-c", &script]).await.context("The parent can't do its work")?;
    pid.parse().with_context(|| format!("'{pid}' is no process id"))
}

/// Runs a command in a guest; what it printed.
async fn guest(client: &Client, vm: &str, argv: &[&str]) -> Result<String> {
    let outcome = client.exec_collect(vm, argv.iter().copied()).await?;
    if outcome.code != 0 {
        bail!("A command in {vm} failed ({}): {}", outcome.code, String::from_utf8_lossy(&outcome.stderr).trim());
    }
    Ok(outcome.text())
}

/// The counter, and the number of lines in the deleted file.
async fn seen(client: &Client, vm: &str, counting: u32) -> Result<(u64, u64)> {
    let script =
        format!("while ! test -s /work/counter; do sleep 0.1; done; cat /work/counter; wc -l </proc/{counting}/fd/9");
    let text = guest(client, vm, &["sh", "-c", &script]).await?;
    let mut numbers = text.lines().map(|l| l.trim().parse::<u64>());
    match (numbers.next(), numbers.next()) {
        (Some(Ok(counter)), Some(Ok(lines))) => Ok((counter, lines)),
        _ => bail!("The counter of {vm} says '{text}'"),
    }
}

async fn look_at(lab: &Lab, clone: &api::CloneResult, fetched_to_answer: u64, counting: u32) -> Result<CloneSeen> {
    let name = clone.vm.name.as_str();
    let client = client_of(lab, &clone.vm.host)?;
    let number = clone.vm.clone_number;
    let (counter_first, _) = seen(&client, name, counting).await?;
    let id = guest(&client, name, &["ramet-agent", "id", "--json"]).await?;
    let id: serde_json::Value = serde_json::from_str(&id).with_context(|| format!("{name} says '{id}' of itself"))?;
    ensure!(id["clone_number"] == number, "{name} is clone {number} and takes itself for {}", id["clone_number"]);
    let shard = (number - 1) % SHARDS;
    let check = format!("cd /work; grep 'shard{shard}$' sums | md5sum -c - >/dev/null 2>&1 && echo good || echo bad");
    let verified = guest(&client, name, &["sh", "-c", &check]).await? == "good";
    let (counter_last, lines) = seen(&client, name, counting).await?;
    let stats = client.vm_stats(name).await?;
    let memory = stats.memory.clone().unwrap_or_default();
    Ok(CloneSeen {
        number,
        host: clone.vm.host.clone(),
        running_ms: ms(clone.running_us),
        answered_ms: clone.answered_us.map_or(f64::NAN, ms),
        fetched_to_answer,
        fetched: fetched(&stats),
        own_bytes: memory.ram_private_bytes,
        share_bytes: memory.ram_pss_bytes,
        verified,
        counter_first,
        counter_last,
        // The process may be between its two writes.
        file_open: lines.abs_diff(counter_last) <= 3,
    })
}

async fn check_all(lab: &Lab, clone: &api::CloneResult) -> Result<FullCheck> {
    let client = client_of(lab, &clone.vm.host)?;
    let check = "cd /work; md5sum -c sums >/dev/null 2>&1 && echo good || echo bad";
    let verified = guest(&client, &clone.vm.name, &["sh", "-c", check]).await? == "good";
    let stats = client.vm_stats(&clone.vm.name).await?;
    Ok(FullCheck { host: clone.vm.host.clone(), verified, fetched: fetched(&stats) })
}

fn fetched(stats: &api::VmStats) -> u64 {
    stats.pager.get("demand_pages") + stats.pager.get("prefetched_pages")
}

fn client_of(lab: &Lab, host: &str) -> Result<Client> {
    let number = lab.hosts().iter().position(|h| h.name == host).with_context(|| format!("No host {host}"))?;
    Ok(lab.client(number + 1))
}

/// Bytes that have come in at all hosts but the parent's.
fn received(lab: &Lab) -> Result<u64> {
    (2..=usize::from(HOSTS)).map(|host| lab.received_bytes(host)).sum()
}

fn ms(us: u64) -> f64 {
    us as f64 / 1e3
}

impl Demo {
    /// Whether everything was as it should be: sums right, counters going on, files open.
    #[must_use]
    pub fn good(&self) -> bool {
        self.full_check.verified
            && self.clones.len() == CLONES as usize
            && self.clones.iter().all(|c| self.clone_good(c))
    }

    fn clone_good(&self, c: &CloneSeen) -> bool {
        c.verified && c.file_open && c.counter_first >= self.parent.counter && c.counter_last >= c.counter_first
    }

    /// One screen that tells it.
    #[must_use]
    pub fn screen(&self) -> String {
        let size = |bytes: u64| ByteSize(bytes >> 10 << 10).to_string();
        let p = &self.parent;
        let mut text = String::new();
        let _ = writeln!(text, "One running VM became {} on {HOSTS} hosts\n", self.clones.len());
        let _ = writeln!(
            text,
            "  parent   {} on {}, {} memory ({} touched) under {}; {} of random data, counter at {}, an open file",
            p.system,
            p.host,
            size(p.memory_bytes),
            size(p.touched_bytes),
            p.accel,
            size(p.data_bytes),
            p.counter
        );
        let _ = writeln!(text, "  pause    the parent stood still for {:.1} ms", p.pause_ms);
        let _ = writeln!(text, "  fork     {:.0} ms from the call to the last clone's answer\n", self.fork_ms);
        text.push_str(&self.table().to_string());
        let n = &self.network;
        let ratio = n.copy_each_bytes as f64 / n.moved_bytes.max(1) as f64;
        let _ = writeln!(
            text,
            "\n\n  moved    {} over the network until all had answered, {} until all had checked their data",
            size(n.moved_to_answer_bytes),
            size(n.moved_bytes)
        );
        let _ = writeln!(
            text,
            "  copying  {} if each clone elsewhere were sent the touched memory ({ratio:.1} times as much), {} if each host",
            size(n.copy_each_bytes),
            size(n.copy_once_bytes)
        );
        let f = &self.full_check;
        let verdict = if f.verified { "right" } else { "WRONG" };
        let _ = writeln!(
            text,
            "  check    the last clone, on {}, then read all {}: every sum {verdict}; {} pages in all came for it",
            f.host,
            size(p.data_bytes),
            f.fetched
        );
        if !self.good() {
            text.push_str("\n  NOT EVERYTHING IS RIGHT: see the table\n");
        }
        text
    }

    fn table(&self) -> Table {
        let size = |bytes: u64| ByteSize(bytes >> 10 << 10).to_string();
        let mut table = Table::new();
        table.load_style(UTF8_FULL_CONDENSED).set_header([
            "clone",
            "host",
            "running",
            "answered",
            "pages fetched\nto answer",
            "pages fetched\nin all",
            "own\nmemory",
            "share of\nmemory",
            "checksum",
            "counter",
            "open file",
        ]);
        for c in &self.clones {
            let counter = if c.counter_first >= self.parent.counter && c.counter_last >= c.counter_first {
                format!("{} -> {}", c.counter_first, c.counter_last)
            } else {
                format!("{} -> {}: WRONG", c.counter_first, c.counter_last)
            };
            table.add_row([
                c.number.to_string(),
                c.host.clone(),
                format!("{:.1} ms", c.running_ms),
                format!("{:.1} ms", c.answered_ms),
                c.fetched_to_answer.to_string(),
                c.fetched.to_string(),
                size(c.own_bytes),
                size(c.share_bytes),
                if c.verified { "right" } else { "WRONG" }.to_owned(),
                counter,
                if c.file_open { "goes on" } else { "LOST" }.to_owned(),
            ]);
        }
        for column in [0, 2, 3, 4, 5, 6, 7] {
            if let Some(column) = table.column_mut(column) {
                column.set_cell_alignment(CellAlignment::Right);
            }
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clone(number: u32) -> CloneSeen {
        CloneSeen {
            number,
            host: "h2".into(),
            running_ms: 5.0,
            answered_ms: 20.0,
            fetched_to_answer: 100,
            fetched: 9000,
            own_bytes: 1 << 20,
            share_bytes: 40 << 20,
            verified: true,
            counter_first: 11,
            counter_last: 15,
            file_open: true,
        }
    }

    fn demo() -> Demo {
        Demo {
            parent: Parent {
                host: "h1".into(),
                system: "Linux 6.1".into(),
                accel: "TCG".into(),
                memory_bytes: 512 << 20,
                touched_bytes: 300 << 20,
                data_bytes: 256 << 20,
                boot_s: 4.0,
                work_s: 9.0,
                counter: 10,
                pause_ms: 6.0,
            },
            clones: (1..=CLONES).map(clone).collect(),
            network: Network {
                moved_to_answer_bytes: 10 << 20,
                moved_bytes: 200 << 20,
                copy_each_bytes: 1500 << 20,
                copy_once_bytes: 600 << 20,
            },
            fork_ms: 90.0,
            full_check: FullCheck { host: "h2".into(), verified: true, fetched: 65536 },
        }
    }

    #[test]
    fn anything_wrong_is_told() {
        assert!(demo().good());
        let broken: [fn(&mut Demo); 5] = [
            |d| d.clones[3].verified = false,
            |d| d.clones[0].counter_first = 9,
            |d| d.clones[7].file_open = false,
            |d| d.full_check.verified = false,
            |d| drop(d.clones.pop()),
        ];
        for break_it in broken {
            let mut demo = demo();
            break_it(&mut demo);
            assert!(!demo.good());
            assert!(demo.screen().contains("NOT EVERYTHING IS RIGHT"));
        }
    }

    #[test]
    fn the_screen_is_one_screen() {
        let screen = demo().screen();
        assert!(screen.lines().all(|l| l.chars().count() <= 125), "{screen}");
        assert!(screen.lines().count() < 30, "{screen}");
    }
}
