//! A DHCP responder for guests without our agent.
//!
//! It reads a tap of its own, the only port of the bridge that broadcasts are flooded to, and writes its answers into it;
//! they go to the asking member's MAC address. The filter lets DHCP requests in from admitted taps only, each with its own
//! MAC address, so the address says who asks. Leases have no end, since the filter gives each member one address for as
//! long as it is admitted; so no guest ever renews.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Write};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::io::Errno;

use crate::network::{Members, locked};
use crate::{AddressPlan, DhcpOptions, Error, Lease, Result};
use crate::{MacAddr, Member};

/// Answers per second to one member, and as many at once.
const ANSWERS_PER_SECOND: f64 = 10.0;
/// Name servers told.
const MOST_DNS: usize = 8;
/// Bytes of Ethernet, IP and UDP headers before the message.
const HEADERS: usize = 14 + 20 + 8;
/// Bytes of a message before its options.
const FIXED: usize = 240;
const COOKIE: [u8; 4] = [99, 130, 83, 99];

/// What all answers say.
#[derive(Clone, Debug)]
pub(crate) struct Terms {
    pub(crate) plan: AddressPlan,
    pub(crate) mtu: u16,
    pub(crate) options: DhcpOptions,
}

/// What one member has had.
#[derive(Debug)]
struct Client {
    tokens: f64,
    at: Instant,
    acks: u64,
}

/// The state that the thread shares with the network.
#[derive(Debug)]
struct Shared {
    terms: Mutex<Terms>,
    clients: Mutex<HashMap<Member, Client>>,
}

/// The responder; it ends when dropped.
#[derive(Debug)]
pub(crate) struct Responder {
    shared: Arc<Shared>,
    stop: Arc<OwnedFd>,
    thread: Option<JoinHandle<()>>,
}

impl Responder {
    /// Starts one on `tap`.
    pub(crate) fn start(name: &str, tap: OwnedFd, terms: Terms, members: Arc<Mutex<Members>>) -> Result<Self> {
        let failed = |source: std::io::Error| Error::kernel(format!("start the DHCP responder of {name}"), source);
        rustix::io::ioctl_fionbio(&tap, true).map_err(|errno| failed(errno.into()))?;
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).map_err(|errno| failed(errno.into()))?);
        let shared = Arc::new(Shared { terms: Mutex::new(terms), clients: Mutex::default() });
        let (theirs, ends) = (Arc::clone(&shared), Arc::clone(&stop));
        let thread = thread::Builder::new()
            .name(format!("dhcp-{name}"))
            .spawn(move || serve(File::from(tap), &ends, &theirs, &members))
            .map_err(failed)?;
        Ok(Self { shared, stop, thread: Some(thread) })
    }

    /// Tells other things from now on.
    pub(crate) fn set(&self, terms: Terms) {
        *locked(&self.shared.terms) = terms;
    }

    /// Who was given an address.
    pub(crate) fn leases(&self) -> Vec<Lease> {
        let mut leases: Vec<_> = locked(&self.shared.clients)
            .iter()
            .filter(|(_, client)| client.acks > 0)
            .map(|(member, client)| Lease { member: *member, acks: client.acks })
            .collect();
        leases.sort_by_key(|lease| lease.member);
        leases
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        let _ = rustix::io::write(&*self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn serve(mut tap: File, stop: &OwnedFd, shared: &Shared, members: &Mutex<Members>) {
    let mut buffer = [0u8; 2048];
    loop {
        let mut fds = [PollFd::new(&tap, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
        match poll(&mut fds, None) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(_) => return,
        }
        let (readable, stopped) = (fds[0].revents(), !fds[1].revents().is_empty());
        if stopped || readable.intersects(PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL) {
            return;
        }
        if !readable.contains(PollFlags::IN) {
            continue;
        }
        let length = match tap.read(&mut buffer) {
            Ok(length) => length,
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => continue,
            // The device is gone: the network was removed.
            Err(_) => return,
        };
        let Some(query) = Query::read(&buffer[..length]) else { continue };
        let Some(member) = locked(members).of_mac(query.mac) else { continue };
        let terms = locked(&shared.terms).clone();
        let Some(kind) = query.answer(member, &terms) else { continue };
        {
            let mut clients = locked(&shared.clients);
            if clients.len() > 4 * usize::from(AddressPlan::LAST_INDEX) {
                clients.clear();
            }
            let now = Instant::now();
            let client = clients.entry(member).or_insert(Client { tokens: ANSWERS_PER_SECOND, at: now, acks: 0 });
            let earned = now.duration_since(client.at).as_secs_f64() * ANSWERS_PER_SECOND;
            client.tokens = (client.tokens + earned).min(ANSWERS_PER_SECOND);
            client.at = now;
            if client.tokens < 1.0 {
                continue;
            }
            client.tokens -= 1.0;
            if kind == ACK {
                client.acks += 1;
            }
        }
        // A full queue drops the answer; the guest asks again.
        let _ = tap.write(&query.reply(kind, member, &terms));
    }
}

const DISCOVER: u8 = 1;
const OFFER: u8 = 2;
const REQUEST: u8 = 3;
const ACK: u8 = 5;
const NAK: u8 = 6;
const INFORM: u8 = 8;

/// A question, of which nothing but the MAC address is believed.
#[derive(Debug, PartialEq, Eq)]
struct Query {
    mac: MacAddr,
    transaction: [u8; 4],
    flags: [u8; 2],
    client_ip: Ipv4Addr,
    kind: u8,
    wanted: Option<Ipv4Addr>,
    server: Option<Ipv4Addr>,
}

impl Query {
    /// Reads an Ethernet frame; `None` for all but a whole, sane DHCP question.
    fn read(frame: &[u8]) -> Option<Self> {
        let (ethernet, packet) = frame.split_at_checked(14)?;
        let mac = MacAddr(ethernet[6..12].try_into().ok()?);
        if ethernet[12..14] != [0x08, 0x00] || packet.len() < 20 || packet[0] >> 4 != 4 {
            return None;
        }
        let header = usize::from(packet[0] & 15) * 4;
        let total = usize::from(u16::from_be_bytes([packet[2], packet[3]]));
        let fragment = u16::from_be_bytes([packet[6], packet[7]]) & 0x3fff;
        if header < 20 || packet[9] != 17 || fragment != 0 || total > packet.len() {
            return None;
        }
        let datagram = packet.get(header..total)?;
        let (udp, _) = datagram.split_at_checked(8)?;
        let length = usize::from(u16::from_be_bytes([udp[4], udp[5]]));
        if udp[0..4] != [0, 68, 0, 67] {
            return None;
        }
        let message = datagram.get(8..length)?;
        let (fixed, mut options) = message.split_at_checked(FIXED)?;
        let address = |bytes: &[u8]| <[u8; 4]>::try_from(bytes).ok().map(Ipv4Addr::from);
        // A question of an Ethernet station about itself, not passed on by a relay.
        if fixed[0..3] != [1, 1, 6] || fixed[28..34] != mac.0 || fixed[24..28] != [0; 4] || fixed[236..240] != COOKIE {
            return None;
        }
        let mut query = Self {
            mac,
            transaction: fixed[4..8].try_into().ok()?,
            flags: [fixed[10] & 0x80, 0],
            client_ip: address(&fixed[12..16])?,
            kind: 0,
            wanted: None,
            server: None,
        };
        while let Some((&code, rest)) = options.split_first() {
            match code {
                0 => options = rest,
                255 => break,
                _ => {
                    let (&length, rest) = rest.split_first()?;
                    let (value, rest) = rest.split_at_checked(usize::from(length))?;
                    match code {
                        50 => query.wanted = Some(address(value)?),
                        53 if value.len() == 1 => query.kind = value[0],
                        54 => query.server = Some(address(value)?),
                        _ => {}
                    }
                    options = rest;
                }
            }
        }
        Some(query)
    }

    /// The kind of the answer, if there is to be one.
    fn answer(&self, member: Member, terms: &Terms) -> Option<u8> {
        if self.server.is_some_and(|server| server != terms.plan.gateway().ip) {
            return None;
        }
        match self.kind {
            DISCOVER => Some(OFFER),
            REQUEST => {
                let wanted = self.wanted.or((!self.client_ip.is_unspecified()).then_some(self.client_ip));
                Some(if wanted.is_none_or(|ip| ip == member.ip) { ACK } else { NAK })
            }
            INFORM => Some(ACK),
            _ => None,
        }
    }

    /// The answer's Ethernet frame.
    fn reply(&self, kind: u8, member: Member, terms: &Terms) -> Vec<u8> {
        let gateway = terms.plan.gateway();
        let mut message = vec![0u8; FIXED];
        message[0..3].copy_from_slice(&[2, 1, 6]);
        message[4..8].copy_from_slice(&self.transaction);
        message[10..12].copy_from_slice(&self.flags);
        if kind != NAK {
            if self.kind == INFORM {
                message[12..16].copy_from_slice(&member.ip.octets());
            } else {
                message[16..20].copy_from_slice(&member.ip.octets());
            }
        }
        message[28..34].copy_from_slice(&member.mac.0);
        message[236..240].copy_from_slice(&COOKIE);
        let mut option = |code: u8, value: &[u8]| {
            message.push(code);
            message.push(u8::try_from(value.len()).unwrap_or(0));
            message.extend_from_slice(value);
        };
        option(53, &[kind]);
        option(54, &gateway.ip.octets());
        if kind != NAK {
            if self.kind != INFORM {
                option(51, &u32::MAX.to_be_bytes());
            }
            option(1, &terms.plan.netmask().octets());
            option(3, &gateway.ip.octets());
            option(26, &terms.mtu.to_be_bytes());
            let dns: Vec<u8> = terms.options.dns.iter().take(MOST_DNS).flat_map(Ipv4Addr::octets).collect();
            if !dns.is_empty() {
                option(6, &dns);
            }
        }
        message.push(255);
        message.resize(message.len().max(300), 0);
        // A guest that cannot take packets for its address yet says so by the flag; the frame is for it alone all the same.
        let to = if self.flags[0] != 0 || kind == NAK { Ipv4Addr::BROADCAST } else { member.ip };
        frame(gateway, member.mac, to, &message)
    }
}

/// An Ethernet frame with a UDP datagram from port 67 to port 68.
fn frame(from: Member, mac: MacAddr, to: Ipv4Addr, message: &[u8]) -> Vec<u8> {
    let length = |bytes: usize| u16::try_from(bytes).unwrap_or(u16::MAX).to_be_bytes();
    let mut frame = Vec::with_capacity(HEADERS + message.len());
    frame.extend_from_slice(&mac.0);
    frame.extend_from_slice(&from.mac.0);
    frame.extend_from_slice(&[0x08, 0x00, 0x45, 0]);
    frame.extend_from_slice(&length(28 + message.len()));
    frame.extend_from_slice(&[0, 0, 0, 0, 64, 17, 0, 0]);
    frame.extend_from_slice(&from.ip.octets());
    frame.extend_from_slice(&to.octets());
    let sum = checksum(0, &frame[14..34]);
    frame[24..26].copy_from_slice(&sum);
    let mut udp = vec![0, 67, 0, 68];
    udp.extend_from_slice(&length(8 + message.len()));
    udp.extend_from_slice(&[0, 0]);
    udp.extend_from_slice(message);
    let mut pseudo = frame[26..34].to_vec();
    pseudo.extend_from_slice(&[0, 17]);
    pseudo.extend_from_slice(&length(udp.len()));
    let sum = match checksum(words(&pseudo), &udp) {
        [0, 0] => [0xff, 0xff],
        sum => sum,
    };
    udp[6..8].copy_from_slice(&sum);
    frame.extend_from_slice(&udp);
    frame
}

fn words(bytes: &[u8]) -> u32 {
    bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(pair.get(1).copied().unwrap_or(0))).sum()
}

fn checksum(start: u32, bytes: &[u8]) -> [u8; 2] {
    let mut sum = start + words(bytes);
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum & 0xffff)).to_be_bytes()[2..].try_into().unwrap_or([0; 2])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn terms() -> Terms {
        let options = DhcpOptions { dns: vec![Ipv4Addr::new(9, 9, 9, 9)] };
        Terms { plan: AddressPlan::default(), mtu: 1450, options }
    }

    fn question(kind: u8, extra: &[u8]) -> Vec<u8> {
        let member = terms().plan.member(0, 2).unwrap();
        let mut message = vec![0u8; FIXED];
        message[0..3].copy_from_slice(&[1, 1, 6]);
        message[4..8].copy_from_slice(b"abcd");
        message[28..34].copy_from_slice(&member.mac.0);
        message[236..240].copy_from_slice(&COOKIE);
        message.extend_from_slice(&[53, 1, kind]);
        message.extend_from_slice(extra);
        message.push(255);
        let asking = Member { mac: member.mac, ip: Ipv4Addr::UNSPECIFIED };
        let mut frame = frame(asking, MacAddr::BROADCAST, Ipv4Addr::BROADCAST, &message);
        frame[34..38].copy_from_slice(&[0, 68, 0, 67]);
        frame
    }

    #[test]
    fn answers_follow_the_questions() {
        let (terms, member) = (terms(), terms().plan.member(0, 2).unwrap());
        let answer = |frame: &[u8]| Query::read(frame).unwrap().answer(member, &terms);
        assert_eq!(answer(&question(DISCOVER, &[])), Some(OFFER));
        assert_eq!(answer(&question(REQUEST, &[50, 4, 100, 64, 0, 2])), Some(ACK));
        assert_eq!(answer(&question(REQUEST, &[50, 4, 100, 64, 0, 3])), Some(NAK));
        assert_eq!(answer(&question(REQUEST, &[54, 4, 1, 2, 3, 4])), None);
        assert_eq!(answer(&question(4, &[])), None);
        assert_eq!(answer(&question(0, &[])), None);
        let reply = Query::read(&question(DISCOVER, &[])).unwrap().reply(OFFER, member, &terms);
        assert_eq!(reply[0..6], member.mac.0);
        assert_eq!(reply[HEADERS + 16..HEADERS + 20], member.ip.octets());
        assert_eq!(checksum(0, &reply[14..34]), [0, 0]);
    }

    #[test]
    fn odd_options_are_no_question() {
        for extra in [&[50, 3, 1, 2, 3][..], &[50, 200, 1], &[12], &[54, 0]] {
            let mut frame = question(DISCOVER, extra);
            // Without the end mark, so that the length runs over.
            frame.pop();
            let length = u16::try_from(frame.len() - 14).unwrap();
            frame[16..18].copy_from_slice(&length.to_be_bytes());
            frame[38..40].copy_from_slice(&(length - 20).to_be_bytes());
            assert_eq!(Query::read(&frame), None, "{extra:?}");
        }
        let relayed = {
            let mut f = question(DISCOVER, &[]);
            f[HEADERS + 24] = 1;
            f
        };
        assert_eq!(Query::read(&relayed), None);
    }

    proptest! {
        #[test]
        fn no_bytes_break_the_reader(bytes in proptest::collection::vec(any::<u8>(), 0..700)) {
            let _ = Query::read(&bytes);
        }

        #[test]
        fn no_change_breaks_the_reader(at in 0usize..300, byte in any::<u8>(), cut in 0usize..400) {
            let mut frame = question(REQUEST, &[50, 4, 100, 64, 0, 2, 12, 3, 1, 2, 3]);
            let at = at.min(frame.len() - 1);
            frame[at] = byte;
            frame.truncate(cut);
            if let Some(query) = Query::read(&frame) {
                let member = terms().plan.member(0, 2).unwrap();
                prop_assert!(query.reply(OFFER, member, &terms()).len() < 600);
            }
        }
    }
}
