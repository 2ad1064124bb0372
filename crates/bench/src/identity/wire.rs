//! Whether a frame with the parent's identity comes out of a clone.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::{self, File},
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use ramet_client::api;
use ramet_lab::Lab;
use rustix::process::{Pid, Signal, kill_process};

use super::{boot, client_of, drop_checkpoints, fork, in_space, one, put, request, say, sh, space_file};
use crate::report::{Goal, Report};

const HOSTS: [&str; 3] = ["h1", "h2", "h3"];
const CLONES: u32 = 8;
/// `LINKTYPE_LINUX_SLL2`.
const SLL2: u32 = 276;
/// Length of its header.
const SLL2_HEADER: usize = 20;
/// `PACKET_OUTGOING`: sent to the device, not received from it.
const OUTGOING: u8 = 4;
const IPV4: u16 = 0x0800;
const ARP: u16 = 0x0806;

/// Takes what is sent to it.
const SERVE: &str = "
import socket, threading
def take(c):
    try:
        while c.recv(65536): pass
    except OSError: pass
s = socket.socket()
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
s.bind(('0.0.0.0', 9000))
s.listen(64)
open('/dev/shm/serving', 'w').close()
while True:
    threading.Thread(target=take, args=(s.accept()[0],), daemon=True).start()
";

/// Sends to the gateway and, over a connection, to a sibling, every millisecond.
const SEND: &str = "
import socket, sys, time
gateway, sibling = sys.argv[1:]
packets = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
def connect():
    try: return socket.create_connection((sibling, 9000), 1)
    except OSError: return None
stream, number = connect(), 0
while True:
    number += 1
    try: packets.sendto(b'%d' % number, (gateway, 9))
    except OSError: pass
    try: stream.sendall(b'%d' % number)
    except (OSError, AttributeError): stream = connect()
    if number == 100: open('/dev/shm/sending', 'w').close()
    time.sleep(0.001)
";

/// A parent that sends without pause becomes eight clones on three hosts.
pub(super) async fn measure(lab: &Lab, report: &mut Report) -> Result<()> {
    let home = lab.client(1);
    let parent = boot(&home, &request("parent", super::WEB)).await?;
    put(&home, &parent.name, "/root/serve.py", SERVE).await?;
    put(&home, &parent.name, "/root/send.py", SEND).await?;
    sh(&home, &parent.name, "python3 /root/serve.py >/dev/null 2>&1 </dev/null &").await?;
    wait_for(lab, &parent, "/dev/shm/serving").await?;
    // One on each host, so that the family's namespaces are there before the fork that is watched.
    say("siblings on three hosts, to talk to");
    let siblings = fork(&home, &parent.name, 3, &HOSTS, api::Quiesce::default()).await?;
    let sibling = siblings.clones.get(1).context("No sibling")?.vm.network.clone().context("No network")?.ip;
    let gateway = sh(&home, &parent.name, "ip -4 route show default | cut -d' ' -f3").await?;
    let start = format!("python3 /root/send.py {gateway} {sibling} >/dev/null 2>&1 </dev/null &");
    sh(&home, &parent.name, &start).await?;
    wait_for(lab, &parent, "/dev/shm/sending").await?;
    let spaces: Vec<PathBuf> = (1..=HOSTS.len()).map(|host| space_file(lab, host, parent.family)).collect();
    let mut captures = Vec::new();
    for (number, space) in spaces.iter().enumerate() {
        captures.push(Capture::start(space, &lab.dir().join(format!("wire-h{}", number + 1)))?);
    }
    say("a fork to eight clones, watched");
    let made = fork(&home, &parent.name, CLONES, &HOSTS, api::Quiesce::default()).await;
    // Also when it failed: nothing of a capture may stay.
    tokio::time::sleep(Duration::from_secs(5)).await;
    let mut found = Found::default();
    let made = made?;
    let nics = |results: &[api::CloneResult]| -> Vec<api::VmNetwork> {
        results.iter().filter_map(|c| c.vm.network.clone()).collect()
    };
    let (clones, others) = (nics(&made.clones), nics(&siblings.clones));
    let parents = parent.network.clone().context("The parent has no network")?;
    let own = clones.iter().map(|n| Ok((n.tap.clone(), Identity::of(n)?))).collect::<Result<BTreeMap<_, _>>>()?;
    let identity = Identity::of(&parents)?;
    for (capture, space) in captures.into_iter().zip(&spaces) {
        let devices = devices(&in_space(space, &["ip", "-o", "link"])?);
        let bytes = capture.end()?;
        found.add(&frames(&bytes)?, &devices, &parents.tap, identity, &own);
    }
    let all: Vec<_> = clones.iter().chain([&parents]).collect();
    let shared = |of: &dyn Fn(&api::VmNetwork) -> String| {
        all.len() - all.iter().map(|nic| of(nic)).collect::<BTreeSet<_>>().len()
    };
    let shared = shared(&|n| n.ip.clone()) + shared(&|n| n.mac.clone());
    ensure!(all.len() == 9 && others.len() == 3, "Not all VMs have a network");

    let seen = found.own.len();
    let valid = found.parents > 0 && seen == clones.len();
    if !valid {
        eprintln!("identity: the capture has {} frames of the parent and {seen} clones' own", found.parents);
    }
    report.goals.push(Goal::at_most(
        "frames with the parent's MAC or IP out of eight clones on three hosts (before any filter)",
        if valid { found.leaked as f64 } else { f64::INFINITY },
        0.0,
    ));
    report.goals.push(Goal::at_most("MACs and IPs that two of the nine VMs share", shared as f64, 0.0));
    report.results.extend([
        one("capture: frames out of the parent's tap", "frames", found.parents as f64),
        one(
            "capture: frames out of clones' taps with their own address",
            "frames",
            found.own.values().sum::<u64>() as f64,
        ),
        one("capture: clones that sent such frames", "clones", seen as f64),
        one("capture: frames out of clones' taps with neither", "frames", found.neither as f64),
    ]);
    for result in made.clones.iter().chain(&siblings.clones) {
        client_of(lab, &result.vm)?.remove_vm(&result.vm.name, true).await?;
    }
    home.remove_vm(&parent.name, true).await?;
    drop_checkpoints(&home).await
}

async fn wait_for(lab: &Lab, vm: &api::VmInfo, file: &str) -> Result<()> {
    let wait = format!("i=0; until [ -e {file} ]; do i=$((i+1)); [ $i -lt 600 ] || exit 1; sleep 0.1; done");
    sh(&client_of(lab, vm)?, &vm.name, &wait).await.map(drop)
}

/// Who a VM is on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Identity {
    mac: [u8; 6],
    ip: Ipv4Addr,
}

impl Identity {
    fn of(nic: &api::VmNetwork) -> Result<Self> {
        let bytes: Vec<u8> = nic.mac.split(':').map(|part| u8::from_str_radix(part, 16)).collect::<Result<_, _>>()?;
        let mac = bytes.try_into().ok().with_context(|| format!("'{}' is no MAC", nic.mac))?;
        Ok(Self { mac, ip: nic.ip.parse()? })
    }
}

// ----------------------------------------------------------------------------------------------------------- the capture

/// A tcpdump that runs; killed when dropped.
struct Capture {
    child: Child,
    file: PathBuf,
}

impl Capture {
    /// `path`, with endings, is where its files go. Returns when it listens.
    fn start(space: &Path, path: &Path) -> Result<Self> {
        let (file, log) = (path.with_extension("pcap"), path.with_extension("log"));
        // As root, since the file is in root's directory.
        let child = Command::new("nsenter")
            .arg(format!("--net={}", space.display()))
            .args(["tcpdump", "--immediate-mode", "-U", "-n", "-s", "128", "-B", "16384", "-Z", "root"])
            .args(["-y", "LINUX_SLL2", "-i", "any", "-w"])
            .arg(&file)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(File::create(&log)?)
            .spawn()
            .context("Can't start nsenter: install util-linux")?;
        let mut capture = Self { child, file };
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let text = fs::read_to_string(&log)?;
            if text.contains("listening on") {
                return Ok(capture);
            }
            if let Some(status) = capture.child.try_wait()? {
                bail!("tcpdump ends with {status}: {}", text.trim());
            }
            ensure!(Instant::now() < deadline, "tcpdump does not begin: {}", text.trim());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// What it caught.
    fn end(mut self) -> Result<Vec<u8>> {
        let pid = i32::try_from(self.child.id()).ok().and_then(Pid::from_raw).context("tcpdump has no process")?;
        kill_process(pid, Signal::INT).context("tcpdump can't be ended")?;
        self.child.wait()?;
        Ok(fs::read(&self.file)?)
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        // Both fail only when it has been waited for already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Names of devices by their numbers, out of `ip -o link`.
fn devices(text: &str) -> BTreeMap<u32, String> {
    let device = |line: &str| {
        let (number, rest) = line.split_once(": ")?;
        let name = rest.split([':', '@']).next()?;
        Some((number.trim().parse().ok()?, name.to_owned()))
    };
    text.lines().filter_map(device).collect()
}

/// A frame, as far as it matters.
#[derive(Debug, PartialEq, Eq)]
struct Frame {
    device: u32,
    outgoing: bool,
    mac: Option<[u8; 6]>,
    ip: Option<Ipv4Addr>,
    /// An ARP sender's MAC.
    arp: Option<[u8; 6]>,
}

/// The frames of a capture.
fn frames(bytes: &[u8]) -> Result<Vec<Frame>> {
    let word =
        |bytes: &[u8], at: usize| -> Option<u32> { Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?)) };
    let magic = word(bytes, 0).context("The capture is empty")?;
    ensure!([0xa1b2_c3d4, 0xa1b2_3c4d].contains(&magic), "This is no capture: it begins with {magic:08x}");
    let kind = word(bytes, 20).context("The capture has no header")?;
    ensure!(kind & 0xffff == SLL2, "The capture's frames are of kind {kind}, not LINUX_SLL2");
    let (mut rest, mut frames) = (bytes.get(24..).unwrap_or_default(), Vec::new());
    while !rest.is_empty() {
        let length = word(rest, 8).context("The capture ends within a header")? as usize;
        let end = 16usize.checked_add(length).filter(|end| *end <= rest.len());
        let Some(end) = end else { bail!("The capture ends within a frame") };
        frames.extend(frame(&rest[16..end]));
        rest = &rest[end..];
    }
    Ok(frames)
}

fn frame(bytes: &[u8]) -> Option<Frame> {
    let (header, body) = bytes.split_at_checked(SLL2_HEADER)?;
    let ip = |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(body.get(at..at + 4)?).ok()?));
    let mac = |bytes: &[u8], at: usize| <[u8; 6]>::try_from(bytes.get(at..at + 6)?).ok();
    let protocol = u16::from_be_bytes([header[0], header[1]]);
    Some(Frame {
        device: u32::from_be_bytes([header[4], header[5], header[6], header[7]]),
        outgoing: header[10] == OUTGOING,
        mac: if header[11] == 6 { mac(header, 12) } else { None },
        ip: match protocol {
            IPV4 => ip(12),
            ARP => ip(14),
            _ => None,
        },
        arp: if protocol == ARP { mac(body, 8) } else { None },
    })
}

/// What came out of guests.
#[derive(Debug, Default)]
struct Found {
    /// Out of the parent's tap.
    parents: u64,
    /// Out of other taps, with the parent's identity.
    leaked: u64,
    /// Out of clones' taps, with their own address, by tap.
    own: BTreeMap<String, u64>,
    /// Out of clones' taps, with neither.
    neither: u64,
}

impl Found {
    fn add(
        &mut self,
        frames: &[Frame],
        devices: &BTreeMap<u32, String>,
        parents_tap: &str,
        parent: Identity,
        clones: &BTreeMap<String, Identity>,
    ) {
        for frame in frames.iter().filter(|f| !f.outgoing) {
            // What the bridge and the tunnel get has come out of a tap before.
            let Some(tap) = devices.get(&frame.device).filter(|name| is_tap(name)) else { continue };
            let is =
                |who: Identity| frame.mac == Some(who.mac) || frame.arp == Some(who.mac) || frame.ip == Some(who.ip);
            if tap == parents_tap {
                self.parents += u64::from(is(parent));
            } else if is(parent) {
                self.leaked += 1;
                eprintln!("identity: {tap}: {frame:?}");
            } else if let Some(own) = clones.get(tap) {
                // Right in both.
                if frame.mac == Some(own.mac) && frame.ip == Some(own.ip) {
                    *self.own.entry(tap.clone()).or_default() += 1;
                } else {
                    self.neither += 1;
                }
            }
        }
    }
}

/// The daemon's taps are `t` and 8 hexadecimal digits.
fn is_tap(name: &str) -> bool {
    name.strip_prefix('t').is_some_and(|rest| rest.len() == 8 && rest.bytes().all(|b| b.is_ascii_hexdigit()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: Identity = Identity { mac: [2, 0, 0, 0, 0, 1], ip: Ipv4Addr::new(100, 64, 0, 2) };
    const CLONE: Identity = Identity { mac: [2, 0, 0, 0, 0, 2], ip: Ipv4Addr::new(100, 64, 0, 3) };

    /// A capture of IPv4 frames: device, kind of packet, sender.
    fn capture(frames: &[(u32, u8, Identity)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for word in [0xa1b2_c3d4, 0x0004_0002, 0, 0, 128, SLL2] {
            bytes.extend(u32::to_le_bytes(word));
        }
        for (device, kind, who) in frames {
            for word in [1, 2, 40, 40] {
                bytes.extend(u32::to_le_bytes(word));
            }
            bytes.extend([8, 0, 0, 0]);
            bytes.extend(device.to_be_bytes());
            bytes.extend([0, 1, *kind, 6]);
            bytes.extend(who.mac);
            bytes.extend([0; 2 + 12]);
            bytes.extend(who.ip.octets());
            bytes.extend([0; 4]);
        }
        bytes
    }

    #[test]
    fn frames_of_clones_are_told_from_the_parents() {
        let devices = devices("1: lo: <UP>\n7: t00000001: <UP>\n8: t00000002: <UP>\n9: vx0@if3: <UP>\n");
        assert_eq!(devices.get(&9).map(String::as_str), Some("vx0"));
        let clones = BTreeMap::from([("t00000002".to_owned(), CLONE)]);
        let bytes = capture(&[
            (7, 0, PARENT),
            (8, 0, CLONE),
            (8, OUTGOING, PARENT),
            (9, 0, PARENT),
            (8, 0, PARENT),
            (8, 0, Identity { mac: CLONE.mac, ..PARENT }),
        ]);
        let mut found = Found::default();
        found.add(&frames(&bytes).unwrap(), &devices, "t00000001", PARENT, &clones);
        assert_eq!((found.parents, found.leaked, found.neither), (1, 2, 0));
        assert_eq!(found.own.get("t00000002"), Some(&1));
    }

    #[test]
    fn a_cut_capture_is_an_error() {
        let bytes = capture(&[(7, 0, PARENT)]);
        assert!(frames(&bytes[..bytes.len() - 1]).is_err());
        assert!(frames(&[]).is_err());
    }
}
