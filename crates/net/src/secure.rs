//! The encrypted way between hosts: WireGuard, spoken by this process over a TUN device and a UDP socket.
//!
//! ```text
//! vx0 of a family --> kernel, route to SECURE_NETWORK --> rwTAG (TUN) --> this process --> UDP 7392 of the other host
//! ```
//!
//! Each host has one address in [`SECURE_NETWORK`], made of its number; VXLAN's packets go from one such address to the
//! other. The device and its route end with the process. The rules of the host stay, and let VXLAN's packets in and out by
//! this device only, so without it nothing leaves.
//!
//! A peer is found by the address that it sends from, and believed by its key. What it sends must come from its own address
//! within, to ours.
//!
//! The device's MTU is that of packets with full frames of members in them, 1500, so that VXLAN never fragments: what
//! fragments, on a fabric of 1500, are the encrypted datagrams of up to 1560. That halves the packets which are read,
//! encrypted and sent, and a fabric of 1560 or more is without fragments.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt as _;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use boringtun::noise::{Tunn, TunnResult};
use boringtun::x25519::{PublicKey, StaticSecret};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec};
use rustix::fs::OFlags;

use crate::network::locked;
use crate::rules;
use crate::space::{Space, ip_batch, sysctl};
use crate::{Error, Result, sys};

/// The UDP port of encrypted tunnels, the same on all hosts.
pub const SECURE_PORT: u16 = 7392;
/// The addresses of hosts within encrypted tunnels.
pub(crate) const SECURE_NETWORK: &str = "169.254.190.0/23";
/// Bytes of the largest packet of VXLAN: a member's largest, 1450, and 50 of headers.
const MTU: u16 = 1500;
/// Packets of one direction that are carried before the other one's turn.
const BATCH: usize = 64;
/// How often timers are looked at.
const TICK: Duration = Duration::from_millis(250);
/// Bytes of the largest packet, and what encryption may add.
const BUFFER: usize = 65_536 + 256;

/// The secret half of a host's key for encrypted tunnels.
#[derive(Clone)]
pub struct TunnelSecret(StaticSecret);

impl TunnelSecret {
    /// A key of 32 random bytes.
    pub fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(StaticSecret::from(bytes))
    }

    /// The public half.
    pub fn public(&self) -> TunnelKey {
        TunnelKey(PublicKey::from(&self.0).to_bytes())
    }
}

impl fmt::Debug for TunnelSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TunnelSecret")
    }
}

/// The public half of a host's key for encrypted tunnels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TunnelKey(
    /// The point's coordinate.
    pub [u8; 32],
);

/// How a host's tunnels are encrypted.
#[derive(Clone, Debug)]
pub struct SecureOptions {
    /// This host's key.
    pub secret: TunnelSecret,
    /// This host's address that the others send to, in the open.
    pub fabric: Ipv4Addr,
}

/// Another host, as encrypted tunnels need it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SecurePeer {
    /// Where it is reached.
    pub fabric: Ipv4Addr,
    /// Its address in tunnels: [`secure_address`] of its number.
    pub tunnel: Ipv4Addr,
    /// Its key.
    pub key: TunnelKey,
}

impl SecurePeer {
    fn endpoint(&self) -> SocketAddr {
        SocketAddr::new(IpAddr::V4(self.fabric), SECURE_PORT)
    }
}

/// The address in encrypted tunnels of the host with a number.
pub fn secure_address(number: u8) -> Ipv4Addr {
    // One further, since a network's first address is not for a host.
    Ipv4Addr::from_bits(Ipv4Addr::new(169, 254, 190, 1).to_bits() + u32::from(number))
}

/// A peer with the state of its connection.
struct Peer {
    spec: SecurePeer,
    connection: Tunn,
}

/// The device, the socket, and the thread between them. All end with it.
pub(crate) struct Engine {
    secret: TunnelSecret,
    peers: Arc<Mutex<Vec<Peer>>>,
    socket: Arc<UdpSocket>,
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
    /// Numbers of connections given out: each tells its own apart from those before.
    numbers: Mutex<u32>,
}

impl fmt::Debug for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Engine").finish_non_exhaustive()
    }
}

/// Makes the TUN device, also if that of the process before is still on its way out.
fn open_device(name: &str) -> Result<File> {
    let failed = |source: io::Error| Error::kernel(format!("make the device {name} of the encrypted tunnel"), source);
    let end = Instant::now() + Duration::from_secs(2);
    loop {
        let flags = i32::try_from(OFlags::NONBLOCK.bits()).unwrap_or_default();
        let device =
            OpenOptions::new().read(true).write(true).custom_flags(flags).open("/dev/net/tun").map_err(failed)?;
        match sys::attach_tun(&device, name) {
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy && Instant::now() < end => {
                thread::sleep(Duration::from_millis(20));
            }
            other => return other.map(|()| device).map_err(failed),
        }
    }
}

impl Engine {
    /// Makes the device in the host's namespace, and begins. `local`: this host's address in the tunnel.
    pub(crate) fn start(space: &Space, tag: &str, options: &SecureOptions, local: Ipv4Addr) -> Result<Self> {
        let name = rules::secure_device(tag);
        let (device, socket) = space.run(|| {
            let address = SocketAddr::new(IpAddr::V4(options.fabric), SECURE_PORT);
            let socket = UdpSocket::bind(address)
                .and_then(|socket| socket.set_nonblocking(true).map(|()| socket))
                .map_err(|source| Error::kernel(format!("take UDP {address} for the encrypted tunnel"), source))?;
            let device = open_device(&name)?;
            sysctl(&format!("net/ipv6/conf/{name}/disable_ipv6"), "1", true)?;
            let lines = [
                format!("address add {local}/32 dev {name}"),
                format!("link set dev {name} mtu {MTU} txqueuelen 1000 up"),
                format!("route add {SECURE_NETWORK} dev {name} src {local}"),
            ];
            ip_batch("set up the encrypted tunnel's device", &lines)?;
            Ok((device, socket))
        })?;
        let failed = |source: io::Error| Error::kernel("start the encrypted tunnel", source);
        let stop = rustix::event::eventfd(0, EventfdFlags::CLOEXEC).map_err(|errno| failed(errno.into()))?;
        let (socket, stop, peers) = (Arc::new(socket), Arc::new(stop), Arc::<Mutex<Vec<Peer>>>::default());
        let carrier = Carrier { local, device, socket: socket.clone(), stop: stop.clone(), peers: peers.clone(), name };
        let thread = thread::Builder::new().name("tunnel".to_owned()).spawn(move || carrier.run()).map_err(failed)?;
        let (secret, numbers) = (options.secret.clone(), Mutex::new(0));
        Ok(Self { secret, peers, socket, stop, thread: Some(thread), numbers })
    }

    /// Whether it still carries packets: it ends when somebody deletes its device.
    pub(crate) fn alive(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Who may send, and is sent to. Connections to those that were peers before, as they are now, go on; new ones begin
    /// at once, so that a host which has started again is not waited for.
    pub(crate) fn set_peers(&self, wanted: &[SecurePeer]) {
        let mut peers = locked(&self.peers);
        peers.retain(|peer| wanted.contains(&peer.spec));
        for spec in wanted {
            if peers.iter().any(|peer| peer.spec == *spec) {
                continue;
            }
            let number = {
                let mut numbers = locked(&self.numbers);
                *numbers = (*numbers + 1) % (1 << 24);
                *numbers
            };
            let key = PublicKey::from(spec.key.0);
            let mut connection = Tunn::new(self.secret.0.clone(), key, None, None, number, None);
            let mut out = [0; 256];
            if let TunnResult::WriteToNetwork(datagram) = connection.format_handshake_initiation(&mut out, false) {
                let _ = self.socket.send_to(datagram, spec.endpoint());
            }
            peers.push(Peer { spec: *spec, connection });
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _ = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// What the thread has.
struct Carrier {
    local: Ipv4Addr,
    device: File,
    socket: Arc<UdpSocket>,
    stop: Arc<OwnedFd>,
    peers: Arc<Mutex<Vec<Peer>>>,
    name: String,
}

impl Carrier {
    fn run(self) {
        let (mut packet, mut out) = (vec![0; BUFFER], vec![0; BUFFER + 256]);
        let mut ticked = Instant::now();
        let wait = Timespec { tv_sec: 0, tv_nsec: i64::from(TICK.subsec_nanos()) };
        loop {
            let stopped = {
                let fds = [self.device.as_fd(), self.socket.as_fd(), self.stop.as_fd()];
                let mut fds = fds.map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
                // A signal is as good as a tick.
                let _ = rustix::event::poll(&mut fds, Some(&wait));
                !fds[2].revents().is_empty()
            };
            if stopped {
                return;
            }
            let mut peers = locked(&self.peers);
            for _ in 0..BATCH {
                match (&self.device).read(&mut packet) {
                    Ok(length) => self.send(&mut peers, &packet[..length], &mut out),
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => {
                        tracing::error!(%error, device = self.name, "the device of the encrypted tunnel is gone");
                        return;
                    }
                }
            }
            for _ in 0..BATCH {
                // What fails here is of one datagram, and there is always another.
                let Ok((length, from)) = self.socket.recv_from(&mut packet) else { break };
                self.receive(&mut peers, &packet[..length], from, &mut out);
            }
            if ticked.elapsed() >= TICK {
                ticked = Instant::now();
                for peer in peers.iter_mut() {
                    if let TunnResult::WriteToNetwork(datagram) = peer.connection.update_timers(&mut out) {
                        let _ = self.socket.send_to(datagram, peer.spec.endpoint());
                    }
                }
            }
        }
    }

    /// Encrypts a packet for the host that it is for. One that can't be sent is lost, as on any network.
    fn send(&self, peers: &mut [Peer], packet: &[u8], out: &mut [u8]) {
        let Some(IpAddr::V4(to)) = Tunn::dst_address(packet) else { return };
        let Some(peer) = peers.iter_mut().find(|peer| peer.spec.tunnel == to) else { return };
        if let TunnResult::WriteToNetwork(datagram) = peer.connection.encapsulate(packet, out) {
            let _ = self.socket.send_to(datagram, peer.spec.endpoint());
        }
    }

    /// Takes a datagram. Whatever is not encrypted by a peer, for this host and from its own address, goes no further.
    fn receive(&self, peers: &mut [Peer], datagram: &[u8], from: SocketAddr, out: &mut [u8]) {
        let Some(peer) = peers.iter_mut().find(|peer| peer.spec.endpoint() == from) else { return };
        // To the library an empty one means: what else is to be sent?
        if datagram.is_empty() {
            return;
        }
        let mut rest = datagram;
        loop {
            match peer.connection.decapsulate(Some(from.ip()), rest, out) {
                // An answer; after it, packets may go out that waited for the connection.
                TunnResult::WriteToNetwork(answer) => {
                    let _ = self.socket.send_to(answer, from);
                    rest = &[];
                }
                TunnResult::WriteToTunnelV4(packet, source) => {
                    let to_us = Tunn::dst_address(packet) == Some(IpAddr::V4(self.local));
                    if to_us && source == peer.spec.tunnel {
                        let _ = (&self.device).write(packet);
                    }
                    return;
                }
                _ => return,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_host_has_an_address_of_its_own_in_the_network() {
        let network = Ipv4Addr::new(169, 254, 190, 0).to_bits();
        for number in 0..=u8::MAX {
            let address = secure_address(number);
            assert_eq!(address.to_bits() & !0x1ff, network, "{address}");
            assert_eq!(address.to_bits() - network, u32::from(number) + 1);
        }
    }

    #[test]
    fn a_secret_is_not_shown() {
        let secret = TunnelSecret::from_bytes([7; 32]);
        assert_eq!(format!("{secret:?}"), "TunnelSecret");
        assert_ne!(secret.public().0, [7; 32]);
    }
}
