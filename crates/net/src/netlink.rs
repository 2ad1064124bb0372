//! The few requests of rtnetlink and nfnetlink that a clone takes, encoded by hand.
//!
//! The kernel works on a request within `send`. So all answers wait in the socket when `send` returns, and a socket that
//! has no answer left has told all.

use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::sync::Mutex;

use rustix::io::Errno;
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink};

use crate::MacAddr;

const NLMSG_ERROR: u16 = 2;
const F_REQUEST: u16 = 1;
const F_ACK: u16 = 4;
const F_REPLACE: u16 = 0x100;
const F_CREATE: u16 = 0x400;
const NESTED: u16 = 0x8000;

const AF_INET: u8 = 2;
const AF_BRIDGE: u8 = 7;
const RTM_NEWLINK: u16 = 16;
const RTM_SETLINK: u16 = 19;
const RTM_NEWNEIGH: u16 = 28;
const RTM_DELNEIGH: u16 = 29;
const IFF_UP: u32 = 1;
const IFLA_MTU: u16 = 4;
const IFLA_MASTER: u16 = 10;
const IFLA_PROTINFO: u16 = 12;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
const NUD_REACHABLE: u16 = 0x02;
const NUD_NOARP: u16 = 0x40;
const NUD_PERMANENT: u16 = 0x80;
const NTF_SELF: u8 = 0x02;
const NTF_MASTER: u8 = 0x04;

const NFNL_BATCH_BEGIN: u16 = 0x10;
const NFNL_BATCH_END: u16 = 0x11;
const NFT: u16 = 10 << 8;
const NFT_NEWSETELEM: u16 = NFT | 12;
const NFT_DELSETELEM: u16 = NFT | 14;
const NFT_GETOBJ: u16 = NFT | 19;
const NFT_NEWOBJ: u16 = NFT | 18;

/// Messages in one `send`: few enough that their answers fit the socket's buffer.
const CHUNK: usize = 64;

/// What a bridge does with frames for one of its ports.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct PortFlags {
    /// Broadcasts go to it.
    pub(crate) broadcasts: bool,
    /// The bridge answers ARP requests that come from it.
    pub(crate) proxy_arp: bool,
    /// The bridge answers ARP requests for members behind it, and lets none through to it.
    pub(crate) neigh_suppress: bool,
}

/// One message, without length and sequence number.
#[derive(Debug)]
pub(crate) struct Message(Vec<u8>);

impl Message {
    fn new(kind: u16, flags: u16, header: &[u8]) -> Self {
        let mut bytes = vec![0u8; 4];
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&(F_REQUEST | flags).to_ne_bytes());
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(header);
        Self(bytes)
    }

    fn attr(mut self, kind: u16, value: &[u8]) -> Self {
        let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
        self.0.extend_from_slice(&length.to_ne_bytes());
        self.0.extend_from_slice(&kind.to_ne_bytes());
        self.0.extend_from_slice(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// The attributes added by `fill`, as one attribute.
    fn nested(self, kind: u16, fill: impl FnOnce(Self) -> Self) -> Self {
        let inner = fill(Self(Vec::new()));
        self.attr(kind | NESTED, &inner.0)
    }

    fn name(self, kind: u16, name: &str) -> Self {
        let mut bytes = name.as_bytes().to_vec();
        bytes.push(0);
        self.attr(kind, &bytes)
    }

    /// `up`: sets the device up or down; none: leaves it as it is.
    fn link(kind: u16, family: u8, index: u32, up: Option<bool>) -> Self {
        let (flags, change) = up.map_or((0, 0), |up| (if up { IFF_UP } else { 0 }, IFF_UP));
        let mut header = vec![family, 0, 0, 0];
        for word in [index, flags, change] {
            header.extend_from_slice(&word.to_ne_bytes());
        }
        Self::new(kind, F_ACK, &header)
    }

    fn neighbour(kind: u16, flags: u16, family: u8, index: u32, state: u16, entry: u8) -> Self {
        let mut header = vec![family, 0, 0, 0];
        header.extend_from_slice(&index.to_ne_bytes());
        header.extend_from_slice(&state.to_ne_bytes());
        header.extend_from_slice(&[entry, 0]);
        Self::new(kind, F_ACK | flags, &header)
    }

    /// Makes a device a port of a bridge, and sets its MTU.
    pub(crate) fn enslave(port: u32, bridge: u32, mtu: u16) -> Self {
        Self::link(RTM_NEWLINK, 0, port, None)
            .attr(IFLA_MTU, &u32::from(mtu).to_ne_bytes())
            .attr(IFLA_MASTER, &bridge.to_ne_bytes())
    }

    /// Sets a device up or down.
    pub(crate) fn up(port: u32, up: bool) -> Self {
        Self::link(RTM_NEWLINK, 0, port, Some(up))
    }

    /// Sets a port's flags. It learns nothing, and nothing unknown or for groups is flooded to it.
    pub(crate) fn port_flags(port: u32, flags: PortFlags) -> Self {
        const LEARNING: u16 = 8;
        const UNICAST_FLOOD: u16 = 9;
        const PROXY_ARP: u16 = 10;
        const MULTICAST_FLOOD: u16 = 27;
        const BROADCAST_FLOOD: u16 = 30;
        const NEIGH_SUPPRESS: u16 = 32;
        Self::link(RTM_SETLINK, AF_BRIDGE, port, None).nested(IFLA_PROTINFO, |message| {
            message
                .attr(LEARNING, &[0])
                .attr(UNICAST_FLOOD, &[0])
                .attr(MULTICAST_FLOOD, &[0])
                .attr(BROADCAST_FLOOD, &[flags.broadcasts.into()])
                .attr(PROXY_ARP, &[flags.proxy_arp.into()])
                .attr(NEIGH_SUPPRESS, &[flags.neigh_suppress.into()])
        })
    }

    /// A static entry of the bridge: frames for `mac` leave by `port`.
    pub(crate) fn add_fdb(port: u32, mac: MacAddr) -> Self {
        Self::neighbour(RTM_NEWNEIGH, F_CREATE | F_REPLACE, AF_BRIDGE, port, NUD_NOARP | NUD_REACHABLE, NTF_MASTER)
            .attr(NDA_LLADDR, &mac.0)
    }

    /// Takes away what [`Message::add_fdb`] added.
    pub(crate) fn delete_fdb(port: u32, mac: MacAddr) -> Self {
        Self::neighbour(RTM_DELNEIGH, 0, AF_BRIDGE, port, 0, NTF_MASTER).attr(NDA_LLADDR, &mac.0)
    }

    /// An entry of a VXLAN device: frames for `mac` go to the host `to`.
    pub(crate) fn add_tunnel_fdb(device: u32, mac: MacAddr, to: Ipv4Addr) -> Self {
        Self::neighbour(RTM_NEWNEIGH, F_CREATE | F_REPLACE, AF_BRIDGE, device, NUD_NOARP | NUD_REACHABLE, NTF_SELF)
            .attr(NDA_LLADDR, &mac.0)
            .attr(NDA_DST, &to.octets())
    }

    /// Takes away what [`Message::add_tunnel_fdb`] added.
    pub(crate) fn delete_tunnel_fdb(device: u32, mac: MacAddr) -> Self {
        Self::neighbour(RTM_DELNEIGH, 0, AF_BRIDGE, device, 0, NTF_SELF).attr(NDA_LLADDR, &mac.0)
    }

    /// A permanent neighbour.
    pub(crate) fn add_neighbour(device: u32, ip: Ipv4Addr, mac: MacAddr) -> Self {
        Self::neighbour(RTM_NEWNEIGH, F_CREATE | F_REPLACE, AF_INET, device, NUD_PERMANENT, 0)
            .attr(NDA_DST, &ip.octets())
            .attr(NDA_LLADDR, &mac.0)
    }

    /// Takes a neighbour away.
    pub(crate) fn delete_neighbour(device: u32, ip: Ipv4Addr) -> Self {
        Self::neighbour(RTM_DELNEIGH, 0, AF_INET, device, 0, 0).attr(NDA_DST, &ip.octets())
    }
}

/// A key of a set of the filter: fields, each padded to four bytes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Key(Vec<u8>);

impl Key {
    /// Adds a device's name.
    pub(crate) fn device(mut self, name: &str) -> Self {
        let mut field = [0u8; 16];
        let length = name.len().min(15);
        field[..length].copy_from_slice(&name.as_bytes()[..length]);
        self.0.extend_from_slice(&field);
        self
    }

    /// Adds a MAC address.
    pub(crate) fn mac(mut self, mac: MacAddr) -> Self {
        self.0.extend_from_slice(&mac.0);
        self.0.extend_from_slice(&[0; 2]);
        self
    }

    /// Adds an IPv4 address.
    pub(crate) fn ip(mut self, ip: Ipv4Addr) -> Self {
        self.0.extend_from_slice(&ip.octets());
        self
    }
}

/// An element of a set of the bridge table, to be added or taken away.
#[derive(Clone, Debug)]
pub(crate) struct Element {
    pub(crate) set: &'static str,
    pub(crate) key: Key,
}

impl Element {
    fn message(&self, table: &str, add: bool) -> Message {
        let (kind, flags) = if add { (NFT_NEWSETELEM, F_ACK | F_CREATE) } else { (NFT_DELSETELEM, F_ACK) };
        Message::new(kind, flags, &[AF_BRIDGE, 0, 0, 0])
            .name(1, table)
            .name(2, self.set)
            .nested(3, |list| list.nested(1, |element| element.nested(1, |key| key.attr(1, &self.key.0))))
    }
}

/// A netlink socket. It belongs to the namespace in which it was opened, whichever thread uses it.
#[derive(Debug)]
pub(crate) struct Socket {
    fd: Mutex<OwnedFd>,
}

impl Socket {
    /// To devices, the bridge and neighbours.
    pub(crate) fn route() -> io::Result<Self> {
        // NETLINK_ROUTE is 0, the default.
        Self::open(None)
    }

    /// To the filter.
    pub(crate) fn filter() -> io::Result<Self> {
        Self::open(Some(netlink::NETFILTER))
    }

    fn open(protocol: Option<rustix::net::Protocol>) -> io::Result<Self> {
        let fd = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, protocol)?;
        rustix::net::bind(&fd, &SocketAddrNetlink::new(0, 0))?;
        Ok(Self { fd: Mutex::new(fd) })
    }

    /// Sends messages; returns the answer to each. All are tried.
    pub(crate) fn send(&self, messages: Vec<Message>) -> io::Result<Vec<Result<(), Errno>>> {
        let mut answers = Vec::with_capacity(messages.len());
        let mut messages = messages.into_iter().peekable();
        while messages.peek().is_some() {
            let chunk: Vec<_> = messages.by_ref().take(CHUNK).collect();
            let count = chunk.len();
            let mut chunk_answers = vec![None; count];
            self.exchange(chunk, |sequence, _, code| {
                if let (Some(answer), Some(code)) = (chunk_answers.get_mut(sequence), code) {
                    *answer = Some(code);
                }
            })?;
            for answer in chunk_answers {
                answers.push(answer.ok_or_else(|| io::Error::other("the kernel did not answer"))?);
            }
        }
        Ok(answers)
    }

    /// Sends messages; the first refusal is the error.
    pub(crate) fn send_all(&self, messages: Vec<Message>) -> io::Result<()> {
        self.send(messages)?.into_iter().collect::<Result<(), _>>().map_err(io::Error::from)
    }

    /// Adds or takes away elements, all or none of a chunk.
    pub(crate) fn elements(&self, table: &str, elements: &[Element], add: bool) -> io::Result<()> {
        for chunk in elements.chunks(CHUNK) {
            let batch = |kind| Message::new(kind, 0, &[0, 0, 0, 10]);
            let mut messages = vec![batch(NFNL_BATCH_BEGIN)];
            messages.extend(chunk.iter().map(|element| element.message(table, add)));
            messages.push(batch(NFNL_BATCH_END));
            let (mut acknowledged, mut refusal) = (0, None);
            self.exchange(messages, |_, _, code| match code {
                Some(Ok(())) => acknowledged += 1,
                Some(Err(errno)) => refusal = refusal.or(Some(errno)),
                None => {}
            })?;
            match refusal {
                Some(errno) => return Err(errno.into()),
                None if acknowledged != chunk.len() => return Err(io::Error::other("the kernel did not answer")),
                None => {}
            }
        }
        Ok(())
    }

    /// The packets that a named counter of the bridge table has counted.
    pub(crate) fn counter(&self, table: &str, name: &str) -> io::Result<u64> {
        let request = Message::new(NFT_GETOBJ, 0, &[AF_BRIDGE, 0, 0, 0])
            .name(1, table)
            .name(2, name)
            .attr(3, &1u32.to_be_bytes());
        let (mut packets, mut refusal) = (None, None);
        self.exchange(vec![request], |_, message, code| {
            if let Some(Err(errno)) = code {
                refusal = Some(errno);
            }
            if message.len() > 20 && u16::from_ne_bytes([message[4], message[5]]) == NFT_NEWOBJ {
                packets = attribute(&message[20..], 4)
                    .and_then(|data| attribute(data, 2))
                    .and_then(|value| value.try_into().ok())
                    .map(u64::from_be_bytes);
            }
        })?;
        match (packets, refusal) {
            (Some(packets), _) => Ok(packets),
            (None, Some(errno)) => Err(errno.into()),
            (None, None) => Err(io::Error::other("the kernel did not answer")),
        }
    }

    /// Sends messages in one go, then hands out each answer: the place of the message that it answers, its bytes, and the
    /// code if it is an acknowledgement.
    fn exchange(
        &self,
        messages: Vec<Message>,
        mut answer: impl FnMut(usize, &[u8], Option<Result<(), Errno>>),
    ) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(messages.len() * 128);
        for (place, Message(mut message)) in messages.into_iter().enumerate() {
            let length = u32::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
            message[0..4].copy_from_slice(&length.to_ne_bytes());
            message[8..12].copy_from_slice(&u32::try_from(place).unwrap_or(u32::MAX).to_ne_bytes());
            message.resize(message.len().next_multiple_of(4), 0);
            bytes.extend_from_slice(&message);
        }
        let fd = self.fd.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut buffer = vec![0u8; 32 * 1024];
        // An answer that a former exchange left would be taken for one of ours.
        while rustix::net::recv(&*fd, buffer.as_mut_slice(), RecvFlags::DONTWAIT).is_ok() {}
        rustix::net::sendto(&*fd, &bytes, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
        loop {
            let length = match rustix::net::recv(&*fd, buffer.as_mut_slice(), RecvFlags::DONTWAIT) {
                Ok((length, _)) => length,
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno.into()),
            };
            let mut rest = &buffer[..length.min(buffer.len())];
            while rest.len() >= 16 {
                let length = u32::from_ne_bytes([rest[0], rest[1], rest[2], rest[3]]) as usize;
                if length < 16 || length > rest.len() {
                    break;
                }
                let message = &rest[..length];
                let place = u32::from_ne_bytes([message[8], message[9], message[10], message[11]]) as usize;
                let code = (u16::from_ne_bytes([message[4], message[5]]) == NLMSG_ERROR && length >= 20).then(|| {
                    match i32::from_ne_bytes([message[16], message[17], message[18], message[19]]) {
                        0 => Ok(()),
                        code => Err(Errno::from_raw_os_error(code.saturating_neg())),
                    }
                });
                answer(place, message, code);
                rest = &rest[length.next_multiple_of(4).min(rest.len())..];
            }
        }
    }
}

/// The value of the first attribute of a kind.
fn attribute(mut bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    while bytes.len() >= 4 {
        let length = usize::from(u16::from_ne_bytes([bytes[0], bytes[1]]));
        let kind = u16::from_ne_bytes([bytes[2], bytes[3]]) & !NESTED;
        let value = bytes.get(4..length)?;
        if kind == wanted {
            return Some(value);
        }
        bytes = bytes.get(length.next_multiple_of(4)..)?;
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_what_nft_makes_of_it() {
        let key =
            Key::default().device("tap0").mac("02:52:64:40:00:02".parse().unwrap()).ip(Ipv4Addr::new(100, 64, 0, 2));
        // As `nft --debug=netlink` prints it, in the bytes' order.
        let expected = b"tap0\0\0\0\0\0\0\0\0\0\0\0\0\x02\x52\x64\x40\x00\x02\0\0\x64\x40\x00\x02";
        assert_eq!(key.0, expected);
    }

    #[test]
    fn attributes_are_found_and_short_ones_do_no_harm() {
        let message = Message(Vec::new()).attr(1, b"abc").nested(4, |m| m.attr(2, &7u64.to_be_bytes()));
        assert_eq!(attribute(&message.0, 1), Some(&b"abc"[..]));
        assert_eq!(attribute(attribute(&message.0, 4).unwrap(), 2), Some(&7u64.to_be_bytes()[..]));
        assert_eq!(attribute(&message.0, 3), None);
        for length in 0..message.0.len() {
            let _ = attribute(&message.0[..length], 4);
        }
        assert_eq!(attribute(&[0, 0, 1, 0], 2), None);
    }
}
