//! Hosts, guests and frames for tests on the real kernel.
#![allow(clippy::unwrap_used, reason = "a failure here is the test's failure")]

use std::fs::File;
use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use ramet_net::{
    AddressPlan, Egress, HostNet, HostNetOptions, MacAddr, Member, Network, NetworkSpec, SecureOptions, SecurePeer,
    Tap, TunnelOptions, TunnelSecret, secure_address,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

pub(crate) const VNI: u32 = 7001;
pub(crate) const INTERNET: Ipv4Addr = Ipv4Addr::new(10, 77, 0, 100);

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Runs a program; its output.
pub(crate) fn sh(script: &str) -> String {
    let output = Command::new("sh").arg("-ec").arg(script).stdin(Stdio::null()).output().unwrap();
    assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs `work` within the namespace mounted at `path`.
pub(crate) fn within<T: Send>(path: &str, work: impl FnOnce() -> T + Send) -> T {
    let file = File::open(path).unwrap();
    thread::scope(|scope| {
        let thread = scope.spawn(|| {
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network)).unwrap();
            work()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// A namespace of a test, removed when dropped.
pub(crate) struct Place {
    pub(crate) name: String,
}

impl Place {
    pub(crate) fn new(what: &str) -> Self {
        let name = format!("rnt-{}-{}-{what}", std::process::id(), NEXT.fetch_add(1, Ordering::SeqCst));
        sh(&format!("ip netns add {name}; ip -n {name} link set lo up"));
        Self { name }
    }

    pub(crate) fn path(&self) -> String {
        format!("/run/netns/{}", self.name)
    }

    pub(crate) fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        within(&self.path(), work)
    }

    pub(crate) fn sh(&self, script: &str) -> String {
        self.run(|| sh(script))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

/// A switch between hosts, which counts what is in the tunnel.
pub(crate) struct Fabric {
    pub(crate) place: Place,
}

impl Fabric {
    pub(crate) fn new() -> Self {
        let place = Place::new("fabric");
        place.sh("ip link add sw0 type bridge; ip link set sw0 up");
        // Behind UDP (8 bytes) and VXLAN (8): the inner frame's destination, and its type.
        place.sh("nft 'table bridge watch {
               counter packets_seen { }
               counter secure_seen { }
               counter arp_seen { }
               counter group_seen { }
               chain pre { type filter hook prerouting priority 0; policy accept;
                 udp dport 4789 counter name packets_seen
                 udp dport 7392 counter name secure_seen
                 udp dport 4789 @th,224,16 0x0806 counter name arp_seen
                 udp dport 4789 @th,128,8 & 1 == 1 counter name group_seen
               }
             }'");
        Self { place }
    }

    pub(crate) fn count(&self, counter: &str) -> u64 {
        let text = self.place.sh(&format!("nft list counter bridge watch {counter}_seen"));
        let packets = text.split("packets ").nth(1).unwrap();
        packets.split_whitespace().next().unwrap().parse().unwrap()
    }

    /// A namespace with `10.77.0.number` on this switch, by `eth0`.
    pub(crate) fn place(&self, what: &str, number: u8) -> Place {
        let place = Place::new(what);
        let fabric = &self.place.name;
        sh(&format!(
            "ip -n {0} link add eth0 type veth peer name p{number} netns {fabric}
             ip -n {fabric} link set p{number} master sw0 up
             ip -n {0} addr add 10.77.0.{number}/24 dev eth0
             ip -n {0} link set eth0 up",
            place.name
        ));
        place
    }
}

/// A host with its networks.
pub(crate) struct Host {
    pub(crate) place: Place,
    pub(crate) address: Ipv4Addr,
    pub(crate) number: u8,
    pub(crate) net: HostNet,
    pub(crate) directory: tempfile::TempDir,
}

pub(crate) fn options(directory: &std::path::Path, number: u8) -> HostNetOptions {
    HostNetOptions {
        state_dir: directory.to_owned(),
        tag: "t".to_owned(),
        tunnel: Some(TunnelOptions::new(Ipv4Addr::new(10, 77, 0, number))),
        secure: None,
        plan: AddressPlan::default(),
    }
}

/// The same, encrypted.
pub(crate) fn secure_options(directory: &std::path::Path, number: u8) -> HostNetOptions {
    let secure = SecureOptions { secret: secret(number), fabric: Ipv4Addr::new(10, 77, 0, number) };
    let tunnel = Some(TunnelOptions::new(secure_address(number)));
    HostNetOptions { tunnel, secure: Some(secure), ..options(directory, number) }
}

fn secret(number: u8) -> TunnelSecret {
    TunnelSecret::from_bytes([number; 32])
}

/// A host as others know it whose tunnels are encrypted.
pub(crate) fn secure_peer(number: u8) -> SecurePeer {
    let fabric = Ipv4Addr::new(10, 77, 0, number);
    SecurePeer { fabric, tunnel: secure_address(number), key: secret(number).public() }
}

impl Host {
    /// One whose tunnels are encrypted.
    pub(crate) fn secure(fabric: &Fabric, number: u8) -> Self {
        let place = fabric.place("host", number);
        let directory = tempfile::tempdir().unwrap();
        let net = place.run(|| HostNet::open(secure_options(directory.path(), number)).unwrap());
        Self { place, address: secure_address(number), number, net, directory }
    }

    /// Lets a host in, as all in the group do.
    pub(crate) fn befriend(&self, number: u8) {
        let peer = secure_peer(number);
        self.net.set_peers(&[peer.fabric]).unwrap();
        self.net.set_secure_peers(&[peer]).unwrap();
    }

    pub(crate) fn new(fabric: &Fabric, number: u8) -> Self {
        let place = fabric.place("host", number);
        let directory = tempfile::tempdir().unwrap();
        let net = place.run(|| HostNet::open(options(directory.path(), number)).unwrap());
        Self { place, address: Ipv4Addr::new(10, 77, 0, number), number, net, directory }
    }

    pub(crate) fn open_again(&mut self) {
        let options = if self.address == secure_address(self.number) { secure_options } else { options };
        self.net = self.place.run(|| HostNet::open(options(self.directory.path(), self.number)).unwrap());
    }

    pub(crate) fn family(&self, name: &str, vni: u32, egress: Egress) -> Network {
        self.net.ensure(&spec(name, vni, egress)).unwrap()
    }

    pub(crate) fn family_path(&self, name: &str) -> String {
        self.directory.path().join("net").join(name).to_str().unwrap().to_owned()
    }

    /// An admitted guest.
    pub(crate) fn guest(&self, network: &Network, tap: &str, index: u16) -> Guest {
        let member = self.net.plan().member(self.number, index).unwrap();
        let tap = network.open_tap(tap).unwrap();
        network.admit(&tap.name, member).unwrap();
        Guest::new(tap, member)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        for name in self.net.names().unwrap_or_default() {
            let removed = self.net.remove(&name);
            if !thread::panicking() {
                removed.unwrap();
            }
        }
    }
}

pub(crate) fn spec(name: &str, vni: u32, egress: Egress) -> NetworkSpec {
    NetworkSpec { name: name.to_owned(), vni, egress, rate: None, mtu: 1450 }
}

/// A guest: this process at the end of a tap.
pub(crate) struct Guest {
    pub(crate) file: File,
    pub(crate) member: Member,
    pub(crate) tap: String,
}

/// Bytes of `virtio_net_hdr`.
const HEADER: usize = 10;

impl Guest {
    pub(crate) fn new(tap: Tap, member: Member) -> Self {
        rustix::io::ioctl_fionbio(&tap.fd, true).unwrap();
        Self { file: File::from(tap.fd), member, tap: tap.name }
    }

    pub(crate) fn send(&self, frame: &[u8]) {
        self.try_send(frame).unwrap();
    }

    /// Fails at a tap whose cable is out.
    pub(crate) fn try_send(&self, frame: &[u8]) -> std::io::Result<()> {
        let mut bytes = vec![0; HEADER];
        bytes.extend_from_slice(frame);
        (&self.file).write_all(&bytes)
    }

    /// The next frame, or none within `wait`.
    pub(crate) fn receive(&self, wait: Duration) -> Option<Vec<u8>> {
        let mut buffer = [0; 4096];
        let end = Instant::now() + wait;
        loop {
            match (&self.file).read(&mut buffer) {
                Ok(length) => return Some(buffer[HEADER..length].to_vec()),
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                Err(error) => panic!("{error}"),
            }
            let left = end.checked_duration_since(Instant::now())?;
            let wait = Timespec { tv_sec: 0, tv_nsec: i64::try_from(left.as_nanos().min(500_000_000)).unwrap() };
            // Interrupted or not: looked at again.
            let _ = poll(&mut [PollFd::new(&self.file, PollFlags::IN)], Some(&wait));
        }
    }

    /// The next frame that fits, or none within `wait`; others are passed over.
    pub(crate) fn find(&self, wait: Duration, fits: impl Fn(&[u8]) -> bool) -> Option<Vec<u8>> {
        let end = Instant::now() + wait;
        while let Some(frame) = self.receive(end.saturating_duration_since(Instant::now())) {
            if fits(&frame) {
                return Some(frame);
            }
        }
        None
    }

    pub(crate) fn drain(&self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        while let Some(frame) = self.receive(Duration::from_millis(60)) {
            frames.push(frame);
        }
        frames
    }

    /// The MAC address that ARP finds for `ip`.
    pub(crate) fn arp(&self, ip: Ipv4Addr) -> Option<MacAddr> {
        self.send(&arp(MacAddr::BROADCAST, self.member.mac, 1, self.member, MacAddr([0; 6]), ip));
        let reply = self.find(Duration::from_millis(500), |frame| {
            frame.len() >= 42 && frame[12..14] == [8, 6] && frame[20..22] == [0, 2] && frame[28..32] == ip.octets()
        })?;
        Some(MacAddr(reply[22..28].try_into().unwrap()))
    }

    /// A frame with a UDP datagram to a member of its network.
    pub(crate) fn datagram(&self, to: Member, text: &[u8]) -> Vec<u8> {
        udp(to.mac, self.member, to.ip, 1000, 2000, text)
    }

    /// Whether a datagram with `text` reaches `to`.
    pub(crate) fn reaches(&self, to: &Guest, text: &[u8]) -> bool {
        self.send(&self.datagram(to.member, text));
        to.find(Duration::from_millis(400), |frame| frame.ends_with(text)).is_some()
    }
}

pub(crate) fn ethernet(to: MacAddr, from: MacAddr, kind: u16, payload: &[u8]) -> Vec<u8> {
    let mut frame = [&to.0[..], &from.0, &kind.to_be_bytes(), payload].concat();
    frame.resize(frame.len().max(60), 0);
    frame
}

pub(crate) fn arp(to: MacAddr, from: MacAddr, operation: u8, sender: Member, target: MacAddr, ip: Ipv4Addr) -> Vec<u8> {
    let body =
        [&[0, 1, 8, 0, 6, 4, 0, operation][..], &sender.mac.0, &sender.ip.octets(), &target.0, &ip.octets()].concat();
    ethernet(to, from, 0x0806, &body)
}

fn sum(bytes: &[u8]) -> u32 {
    bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum()
}

fn fold(mut sum: u32) -> [u8; 2] {
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_be_bytes()
}

pub(crate) fn ipv4(from: Ipv4Addr, to: Ipv4Addr, protocol: u8, payload: &[u8]) -> Vec<u8> {
    let length = u16::try_from(20 + payload.len()).unwrap().to_be_bytes();
    let mut packet =
        [&[0x45, 0][..], &length, &[0, 0, 0, 0, 64, protocol, 0, 0], &from.octets(), &to.octets()].concat();
    let check = fold(sum(&packet));
    packet[10..12].copy_from_slice(&check);
    packet.extend_from_slice(payload);
    packet
}

/// An Ethernet frame without padding, so that its end is the text's.
pub(crate) fn ip_frame(to: MacAddr, from: MacAddr, packet: &[u8]) -> Vec<u8> {
    [&to.0[..], &from.0, &[8, 0], packet].concat()
}

pub(crate) fn udp_packet(from: Ipv4Addr, to: Ipv4Addr, source: u16, port: u16, text: &[u8]) -> Vec<u8> {
    let length = u16::try_from(8 + text.len()).unwrap().to_be_bytes();
    let datagram = [&source.to_be_bytes()[..], &port.to_be_bytes(), &length, &[0, 0], text].concat();
    ipv4(from, to, 17, &datagram)
}

pub(crate) fn udp(mac: MacAddr, from: Member, to: Ipv4Addr, source: u16, port: u16, text: &[u8]) -> Vec<u8> {
    ip_frame(mac, from.mac, &udp_packet(from.ip, to, source, port, text))
}

pub(crate) const SYN: u8 = 2;
pub(crate) const SYN_ACK: u8 = 0x12;

pub(crate) fn tcp(mac: MacAddr, from: Member, to: Ipv4Addr, ports: (u16, u16), flags: u8, ack: u32) -> Vec<u8> {
    let mut segment = [
        &ports.0.to_be_bytes()[..],
        &ports.1.to_be_bytes(),
        &100u32.to_be_bytes(),
        &ack.to_be_bytes(),
        &[0x50, flags, 0x20, 0, 0, 0, 0, 0],
    ]
    .concat();
    let pseudo = [&from.ip.octets()[..], &to.octets(), &[0, 6, 0, 20]].concat();
    let check = fold(sum(&pseudo) + sum(&segment));
    segment[16..18].copy_from_slice(&check);
    ip_frame(mac, from.mac, &ipv4(from.ip, to, 6, &segment))
}

/// A tunnel packet's payload.
pub(crate) fn vxlan(vni: u32, frame: &[u8]) -> Vec<u8> {
    [&[8, 0, 0, 0][..], &(vni << 8).to_be_bytes(), frame].concat()
}

/// The next datagram, none if the socket's time-out passes.
pub(crate) fn datagram(socket: &UdpSocket) -> Option<(Vec<u8>, SocketAddr)> {
    let mut buffer = [0; 2048];
    loop {
        match socket.recv_from(&mut buffer) {
            Ok((length, from)) => return Some((buffer[..length].to_vec(), from)),
            // A wait with a time-out is not started again when the machine was stopped meanwhile.
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) if error.kind() == ErrorKind::WouldBlock => return None,
            Err(error) => panic!("{error}"),
        }
    }
}
