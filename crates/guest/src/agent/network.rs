//! A clone's addresses. Until here the interface has those of the parent; the host lets no frame through before this is
//! done. Each interface has never two IPv4 addresses at a time, and no IPv6.

use crate::netlink::{Message, Netlink, PUT, attributes, u32_at};
use crate::paths::{Paths, replace};
use ramet_guest::protocol::{NicIdentity, from_hex};
use rustix::io::Errno;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::time::{Duration, Instant};

const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const RTM_SETLINK: u16 = 19;
const RTM_NEWADDR: u16 = 20;
const RTM_DELADDR: u16 = 21;
const RTM_GETADDR: u16 = 22;
const RTM_NEWROUTE: u16 = 24;
const RTM_NEWNEIGH: u16 = 28;
const AF_INET: u8 = 2;
const AF_INET6: u8 = 10;
const IFF_UP: u32 = 1;

/// How long a machine that boots may take to find its interfaces.
const BOOT: Duration = Duration::from_secs(3);

/// A remark, or nothing.
pub(crate) type Remark = Option<String>;

/// A MAC.
type Mac = [u8; 6];

fn invalid(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, text.into())
}

/// The name of the interface that is meant; `before`: what it was when this machine was another one. A machine that boots (`boots`) may still be looking for its devices.
pub(crate) fn find(paths: &Paths, nic: &NicIdentity, boots: bool, before: Option<&str>) -> io::Result<String> {
    let begun = Instant::now();
    let class = paths.at("sys/class/net");
    // A clone's cards are those of its parent, and so are their names.
    if let Some(before) = before.filter(|name| nic.name.is_none() && class.join(name).exists()) {
        return Ok(before.to_owned());
    }
    loop {
        let found = match &nic.name {
            Some(name) if name.is_empty() || name.len() > 15 || name.contains('/') || name.starts_with('.') => {
                return Err(invalid(format!("{name:?} is no name of an interface")));
            }
            Some(name) => Link::find(&mut Netlink::route()?, name)?.map(|link| link.name),
            None => virtio_nics(&class)?.into_iter().nth(nic.index as usize),
        };
        if let Some(name) = found {
            return Ok(name);
        }
        if !boots || begun.elapsed() > BOOT {
            return Err(io::Error::new(io::ErrorKind::NotFound, "there is no such interface"));
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// The virtio NICs in the order of their PCI addresses.
fn virtio_nics(class: &Path) -> io::Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(class)? {
        let entry = entry?;
        let Ok(device) = entry.path().join("device").canonicalize() else { continue };
        let driver = device.join("driver").canonicalize().unwrap_or_default();
        if driver.file_name().is_some_and(|name| name == "virtio_net") {
            found.push((place(&device), entry.file_name().to_string_lossy().into_owned()));
        }
    }
    found.sort();
    Ok(found.into_iter().map(|(_, name)| name).collect())
}

/// By what a device is sorted: the PCI address nearest to it, then the number of the virtio device.
fn place(device: &Path) -> (String, u32) {
    let is_pci = |name: &&str| name.len() >= 12 && name.matches(':').count() == 2 && name.contains('.');
    let names: Vec<&str> = device.iter().filter_map(|name| name.to_str()).collect();
    let pci = names.iter().rev().copied().find(is_pci).unwrap_or_default();
    let number = names.last().and_then(|name| name.strip_prefix("virtio")).and_then(|n| n.parse().ok());
    (pci.to_owned(), number.unwrap_or(0))
}

/// An interface.
#[derive(Debug)]
struct Link {
    index: u32,
    name: String,
    mac: Vec<u8>,
    mtu: u32,
    is_up: bool,
}

impl Link {
    fn find(netlink: &mut Netlink, wanted: &str) -> io::Result<Option<Self>> {
        Ok(Self::all(netlink)?.into_iter().find(|link| link.name == wanted))
    }

    fn all(netlink: &mut Netlink) -> io::Result<Vec<Self>> {
        let mut found = Vec::new();
        netlink
            .dump(Message::new(RTM_GETLINK, 0, &[0; 16]), |kind, content| found.extend(Self::parse(kind, content)))?;
        Ok(found)
    }

    /// An interface that was given an address before; what may have been changed since is as if it were not there.
    fn of(card: &Card) -> Self {
        let mtu = card.nic.mtu.unwrap_or(0);
        Self { index: card.index, name: card.name.clone(), mac: Vec::new(), mtu, is_up: false }
    }

    /// Whether the interface of this number still has this name. One that comes anew has another number.
    fn is_there(&self, netlink: &Netlink) -> bool {
        rustix::net::netdevice::name_to_index(netlink, &self.name).is_ok_and(|index| index == self.index)
    }

    fn parse(kind: u16, content: &[u8]) -> Option<Self> {
        const ADDRESS: u16 = 1;
        const NAME: u16 = 3;
        const MTU: u16 = 4;
        if kind != RTM_NEWLINK {
            return None;
        }
        let (index, flags, rest) = (u32_at(content, 4)?, u32_at(content, 8)?, content.get(16..)?);
        let mut link = Self { index, name: String::new(), mac: Vec::new(), mtu: 0, is_up: flags & IFF_UP != 0 };
        for (kind, value) in attributes(rest) {
            match kind {
                ADDRESS => link.mac = value.to_vec(),
                NAME => link.name = String::from_utf8_lossy(value).trim_end_matches('\0').to_owned(),
                MTU => link.mtu = u32_at(value, 0).unwrap_or(0),
                _ => {}
            }
        }
        Some(link)
    }

    fn message(&self, flags: u32, change: u32) -> Message {
        let mut fixed = [0; 16];
        fixed[4..8].copy_from_slice(&self.index.to_ne_bytes());
        fixed[8..12].copy_from_slice(&flags.to_ne_bytes());
        fixed[12..].copy_from_slice(&change.to_ne_bytes());
        Message::new(RTM_SETLINK, 0, &fixed)
    }

    fn set_up(&mut self, netlink: &mut Netlink, up: bool) -> io::Result<()> {
        netlink.request(self.message(if up { IFF_UP } else { 0 }, IFF_UP))?;
        self.is_up = up;
        Ok(())
    }

    fn set_mac(&mut self, netlink: &mut Netlink, mac: Mac) -> io::Result<()> {
        if self.mac == mac {
            return Ok(());
        }
        let change = |link: &Self| link.message(0, 0).attribute(1, &mac);
        match netlink.request(change(self)) {
            // A driver that cannot do it while the interface is up.
            Err(error) if error.raw_os_error() == Some(Errno::BUSY.raw_os_error()) => {
                self.set_up(netlink, false)?;
                netlink.request(change(self))
            }
            other => other,
        }
    }

    fn set_mtu(&self, netlink: &mut Netlink, mtu: u32) -> io::Result<()> {
        if self.mtu == mtu {
            return Ok(());
        }
        netlink.request(self.message(0, 0).attribute(4, &mtu.to_ne_bytes()))
    }

    fn address(&self, kind: u16, flags: u16, address: IpAddr, prefix: u8) -> Message {
        let (family, bytes) = match address {
            IpAddr::V4(v4) => (AF_INET, v4.octets().to_vec()),
            IpAddr::V6(v6) => (AF_INET6, v6.octets().to_vec()),
        };
        let mut fixed = [family, prefix, 0, 0, 0, 0, 0, 0];
        fixed[4..].copy_from_slice(&self.index.to_ne_bytes());
        Message::new(kind, flags, &fixed).attribute(2, &bytes).attribute(1, &bytes)
    }

    /// All addresses, with their prefixes. `family`: 0 is all families.
    fn addresses(&self, netlink: &mut Netlink, family: u8) -> io::Result<Vec<(IpAddr, u8)>> {
        let mut found = Vec::new();
        netlink.dump(Message::new(RTM_GETADDR, 0, &[family, 0, 0, 0, 0, 0, 0, 0]), |kind, content| {
            let (&[_, prefix, ..], Some(rest)) = (content, content.get(8..)) else { return };
            if kind != RTM_NEWADDR || u32_at(content, 4) != Some(self.index) {
                return;
            }
            // The local address where there is one, else the address.
            let address = attributes(rest).filter(|(kind, _)| matches!(kind, 1 | 2)).max_by_key(|(kind, _)| *kind);
            found.extend(address.and_then(|(_, bytes)| to_address(bytes)).map(|address| (address, prefix)));
        })?;
        Ok(found)
    }
}

fn to_address(bytes: &[u8]) -> Option<IpAddr> {
    let v4 = || <[u8; 4]>::try_from(bytes).ok().map(|bytes| Ipv4Addr::from(bytes).into());
    v4().or_else(|| <[u8; 16]>::try_from(bytes).ok().map(|bytes| Ipv6Addr::from(bytes).into()))
}

/// A MAC from its text.
fn parse_mac(text: &str) -> Option<Mac> {
    let mut mac = [0; 6];
    let mut parts = text.split(':');
    for byte in &mut mac {
        let &[value] = from_hex(parts.next()?)?.as_slice() else { return None };
        *byte = value;
    }
    // The lowest bit of the first byte is for groups.
    (parts.next().is_none() && mac[0] & 1 == 0).then_some(mac)
}

/// A [`NicIdentity`], checked.
#[derive(Debug)]
struct Wanted {
    mac: Mac,
    ip: Ipv4Addr,
    prefix: u8,
    gateway: Option<(Ipv4Addr, Option<Mac>)>,
}

impl Wanted {
    fn parse(nic: &NicIdentity) -> io::Result<Self> {
        let mac = |text: &String| parse_mac(text).ok_or_else(|| invalid(format!("{text:?} is no MAC")));
        let ip = |text: &String| text.parse().map_err(|_| invalid(format!("{text:?} is no IPv4 address")));
        if nic.prefix > 32 {
            return Err(invalid(format!("{} is no length of a prefix", nic.prefix)));
        }
        let gateway_mac = nic.gateway_mac.as_ref().map(mac).transpose()?;
        let gateway = nic.gateway.as_ref().map(ip).transpose()?.map(|gateway| (gateway, gateway_mac));
        Ok(Self { mac: mac(&nic.mac)?, ip: ip(&nic.ip)?, prefix: nic.prefix, gateway })
    }

    fn mask(&self) -> u32 {
        u32::MAX.checked_shl(32 - u32::from(self.prefix)).unwrap_or(0)
    }

    fn covers(&self, other: Ipv4Addr) -> bool {
        (u32::from(self.ip) ^ u32::from(other)) & self.mask() == 0
    }
}

/// Gives one interface its address. `known`: what is known of it, by an agent that has given it an address before. Each part
/// is told to `step`. Gives the addresses that it has lost, and the interface's index.
pub(crate) fn take(
    name: &str,
    nic: &NicIdentity,
    known: Option<&Card>,
    step: &mut dyn FnMut(&str, io::Result<Remark>),
) -> (Vec<IpAddr>, Option<u32>) {
    let mut lost = Vec::new();
    let index = try_take(name, nic, known, &mut lost, step).map_err(|error| step("interface", Err(error))).ok();
    lost.retain(|address| !address.is_loopback());
    (lost, index)
}

fn try_take(
    name: &str,
    nic: &NicIdentity,
    known: Option<&Card>,
    lost: &mut Vec<IpAddr>,
    step: &mut dyn FnMut(&str, io::Result<Remark>),
) -> io::Result<u32> {
    let wanted = Wanted::parse(nic)?;
    let old: Option<IpAddr> =
        nic.old_ip.as_ref().map(|ip| ip.parse().map_err(|_| invalid(format!("{ip:?} is no address")))).transpose()?;
    lost.extend(old.filter(|ip| *ip != IpAddr::V4(wanted.ip)));
    let mut netlink = Netlink::route()?;
    let netlink = &mut netlink;
    let missing = || io::Error::new(io::ErrorKind::NotFound, "there is no such interface");
    // One that had an address has no IPv6 any more, and all that the kernel would tell of it at length is known: a clone
    // waits for that longer than for anything else here.
    let known = known.map(Link::of).filter(|link| link.is_there(netlink));
    let family = if known.is_some() { AF_INET } else { 0 };
    let link = known.map_or_else(|| Link::find(netlink, name), |link| Ok(Some(link)))?;
    let mut link = link.ok_or_else(missing)?;

    let before = link.addresses(netlink, family)?;
    step("before", Ok(None));
    let is_kept = |(ip, prefix): &(IpAddr, u8)| *ip == IpAddr::V4(wanted.ip) && *prefix == wanted.prefix;
    let kept = before.iter().any(is_kept);
    lost.extend(
        before
            .iter()
            .map(|(ip, _)| *ip)
            .filter(|ip| *ip != IpAddr::V4(wanted.ip) && !lost.contains(ip))
            .collect::<Vec<_>>(),
    );

    if family != AF_INET {
        step("ipv6", disable_ipv6(name));
    }
    // The old addresses go first: there must be no frame with a new MAC and an old address.
    let removed = before.iter().filter(|a| a.0.is_ipv4() && !is_kept(a)).try_for_each(|(ip, prefix)| {
        match netlink.request(link.address(RTM_DELADDR, 0, *ip, *prefix)) {
            // It went with another one.
            Err(error) if error.raw_os_error() == Some(Errno::ADDRNOTAVAIL.raw_os_error()) => Ok(()),
            other => other,
        }
    });
    let is_clear = removed.is_ok();
    step("old address", removed.map(|()| None));
    step("mac", link.set_mac(netlink, wanted.mac).map(|()| None));
    if let Some(mtu) = nic.mtu {
        step("mtu", link.set_mtu(netlink, mtu).map(|()| None));
    }
    if !link.is_up {
        step("up", link.set_up(netlink, true).map(|()| None));
    }
    if !is_clear {
        return Ok(link.index);
    }
    if !kept {
        let mut message = link.address(RTM_NEWADDR, PUT, wanted.ip.into(), wanted.prefix);
        if wanted.prefix < 31 {
            message = message.attribute(4, &(u32::from(wanted.ip) | !wanted.mask()).to_be_bytes());
        }
        step("address", netlink.request(message).map(|()| None));
    }
    if let Some((gateway, mac)) = wanted.gateway {
        const MAIN: u8 = 254;
        const STATIC: u8 = 4;
        const UNICAST: u8 = 1;
        const ONLINK: u8 = 4;
        const PERMANENT: u8 = 0x80;
        let onlink = if wanted.covers(gateway) { 0 } else { ONLINK };
        let mut fixed = [AF_INET, 0, 0, 0, MAIN, STATIC, 0, UNICAST, 0, 0, 0, 0];
        fixed[8..].copy_from_slice(&u32::from(onlink).to_ne_bytes());
        let route = Message::new(RTM_NEWROUTE, PUT, &fixed)
            .attribute(4, &link.index.to_ne_bytes())
            .attribute(5, &gateway.octets())
            // Each interface has a default route of its own; the first one's is used.
            .attribute(6, &nic.index.to_ne_bytes());
        step("route", netlink.request(route).map(|()| None));
        if let Some(mac) = mac {
            let mut fixed = [AF_INET, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
            fixed[4..8].copy_from_slice(&link.index.to_ne_bytes());
            fixed[8..10].copy_from_slice(&u16::from(PERMANENT).to_ne_bytes());
            let neighbour = Message::new(RTM_NEWNEIGH, PUT, &fixed).attribute(1, &gateway.octets()).attribute(2, &mac);
            step("neighbour", netlink.request(neighbour).map(|()| None));
        }
    }
    Ok(link.index)
}

/// An interface that has the addresses of an identity.
#[derive(Debug, Clone)]
pub(crate) struct Card {
    pub(crate) nic: NicIdentity,
    pub(crate) name: String,
    /// The number that the kernel gave it: another one when it comes again.
    pub(crate) index: u32,
}

/// Gives interfaces of an identity that went away and have come again, as when their driver was bound anew, their addresses
/// back. Whatever else was done to an interface is its owner's business.
pub(crate) fn restore(paths: &Paths, cards: &mut [Card]) -> io::Result<()> {
    let class = paths.at("sys/class/net");
    for at in 0..cards.len() {
        let mut links = Link::all(&mut Netlink::route()?)?;
        let card = &cards[at];
        if links.iter().any(|link| link.index == card.index) {
            continue;
        }
        let ours = virtio_nics(&class)?;
        links.retain(|link| ours.contains(&link.name) && cards.iter().all(|card| card.index != link.index));
        let mac = parse_mac(&card.nic.mac);
        let is_it = |link: &&Link| link.name == card.name || mac.is_some_and(|mac| link.mac == mac);
        let Some(link) = links.iter().find(is_it) else { continue };
        let (index, name) = (link.index, settled_name(link.index, &link.name, &card.name)?);
        let nic = card.nic.clone();
        take(&name, &nic, None, &mut |part, result| {
            if let Err(error) = result {
                eprintln!("ramet-agent: {name} came again: {part}: {error}");
            }
        });
        eprintln!("ramet-agent: {name} came again and has {} back", nic.ip);
        cards[at] = Card { nic, name, index };
    }
    Ok(())
}

/// The name of an interface that is new: whoever gives names may still be about to, and can't once it is up.
fn settled_name(index: u32, now: &str, before: &str) -> io::Result<String> {
    let begun = Instant::now();
    let mut name = now.to_owned();
    while name != before && begun.elapsed() < BOOT {
        std::thread::sleep(Duration::from_millis(50));
        let link = Link::all(&mut Netlink::route()?)?.into_iter().find(|link| link.index == index);
        name = link.ok_or_else(|| io::Error::from(io::ErrorKind::NotFound))?.name;
    }
    Ok(name)
}

/// The link-local address is made of the parent's MAC, and families have no IPv6.
fn disable_ipv6(name: &str) -> io::Result<Remark> {
    let path = format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6");
    // It was switched off in the parent: looking is quicker.
    if std::fs::read_to_string(&path).is_ok_and(|text| text.trim() == "1") {
        return Ok(None);
    }
    match std::fs::write(path, "1") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Some("this kernel has no IPv6".to_owned())),
        other => other.map(|()| None),
    }
}

/// Writes the name servers into `/etc/resolv.conf`, and keeps its other lines.
pub(crate) fn set_dns(paths: &Paths, servers: &[&String]) -> io::Result<Remark> {
    if let Some(bad) = servers.iter().find(|server| server.parse::<IpAddr>().is_err()) {
        return Err(invalid(format!("{bad:?} is no address of a name server")));
    }
    let path = paths.at("etc/resolv.conf");
    if std::fs::read_link(&path).is_ok_and(|to| to.to_string_lossy().contains("systemd")) {
        return Ok(Some("systemd-resolved has it".to_owned()));
    }
    let before = std::fs::read_to_string(&path).unwrap_or_default();
    let mut text = String::new();
    for line in before.lines().filter(|line| line.split_ascii_whitespace().next() != Some("nameserver")) {
        text += line;
        text.push('\n');
    }
    for server in servers {
        text += &format!("nameserver {server}\n");
    }
    // A clone's are those of its parent. Writing to a disk is slow.
    if text == before { Ok(None) } else { where_writable(replace(&path, text.as_bytes())) }
}

/// A file system that is not writable is no error, but worth a remark.
pub(crate) fn where_writable(result: io::Result<()>) -> io::Result<Remark> {
    match result {
        Err(error) if matches!(error.kind(), io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::NotFound) => {
            Ok(Some(format!("left as it is: {error}")))
        }
        other => other.map(|()| None),
    }
}

/// Ends all connections whose local address is one of these, and gives their number as a remark.
pub(crate) fn kill_sockets(addresses: &[IpAddr]) -> io::Result<Remark> {
    const TCP: u8 = 6;
    const UDP: u8 = 17;
    const ESTABLISHED: u32 = 1 << 1;
    /// All but TIME_WAIT, CLOSE and LISTEN.
    const CONNECTED: u32 = 0xffe & !(1 << 6 | 1 << 7 | 1 << 10);
    if addresses.is_empty() {
        return Ok(Some("no address was lost".to_owned()));
    }
    let mut netlink = Netlink::sock_diag()?;
    let (mut killed, mut missing) = (0, Vec::new());
    for (what, protocol, states) in [("TCP", TCP, CONNECTED), ("UDP", UDP, ESTABLISHED)] {
        // Sockets of IPv6 may have IPv4 addresses, too.
        for family in [AF_INET, AF_INET6] {
            match kill_some(&mut netlink, family, protocol, states, addresses) {
                Ok(number) => killed += number,
                // No listing of this protocol, no ending of sockets.
                Err(error) if is_missing(&error) => missing.push(what),
                Err(error) => return Err(error),
            }
        }
    }
    missing.dedup();
    let skipped =
        if missing.is_empty() { String::new() } else { format!("; this kernel cannot end those of {missing:?}") };
    Ok(Some(format!("ended {killed}{skipped}")))
}

fn is_missing(error: &io::Error) -> bool {
    let code = error.raw_os_error();
    [Errno::NOENT, Errno::OPNOTSUPP, Errno::PROTONOSUPPORT].iter().any(|errno| code == Some(errno.raw_os_error()))
}

/// `struct inet_diag_sockid`.
const SOCKET_ID: usize = 48;

fn diag_request(kind: u16, family: u8, protocol: u8, states: u32, id: &[u8; SOCKET_ID]) -> Message {
    let mut fixed = [0; 8 + SOCKET_ID];
    fixed[0] = family;
    fixed[1] = protocol;
    fixed[4..8].copy_from_slice(&states.to_ne_bytes());
    fixed[8..].copy_from_slice(id);
    Message::new(kind, 0, &fixed)
}

/// The identity of a socket in a listing, and its local address.
fn diag_answer(family: u8, content: &[u8]) -> Option<([u8; SOCKET_ID], IpAddr)> {
    let id: [u8; SOCKET_ID] = *content.get(4..)?.first_chunk()?;
    let length = if family == AF_INET { 4 } else { 16 };
    Some((id, to_address(&id[4..4 + length])?.to_canonical()))
}

fn kill_some(netlink: &mut Netlink, family: u8, protocol: u8, states: u32, addresses: &[IpAddr]) -> io::Result<u32> {
    const LIST: u16 = 20;
    const DESTROY: u16 = 21;
    let mut found = Vec::new();
    netlink.dump(diag_request(LIST, family, protocol, states, &[0; SOCKET_ID]), |_, content| {
        found.extend(diag_answer(family, content).filter(|(_, local)| addresses.contains(local)).map(|(id, _)| id));
    })?;
    let mut killed = 0;
    for id in found {
        match netlink.request(diag_request(DESTROY, family, protocol, 0, &id)) {
            Ok(()) => killed += 1,
            // It ended by itself.
            Err(error) if error.raw_os_error() == Some(Errno::NOENT.raw_os_error()) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(killed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn nics_are_counted_in_the_order_of_their_pci_addresses() {
        let dir = tempfile::tempdir().unwrap();
        let class = dir.path().join("class");
        for (name, device, driver) in [
            ("lo", None, ""),
            ("eth0", Some("pci0000:00/0000:00:10.0/virtio1"), "virtio_net"),
            ("eth1", Some("pci0000:00/0000:00:03.0/virtio7"), "virtio_net"),
            ("wlan0", Some("pci0000:00/0000:00:01.0"), "other"),
            // Behind a root port of q35.
            ("ens1", Some("pci0000:00/0000:00:02.0/0000:01:00.0/virtio3"), "virtio_net"),
        ] {
            std::fs::create_dir_all(class.join(name)).unwrap();
            let Some(device) = device else { continue };
            let (device, driver) = (dir.path().join(device), dir.path().join("drivers").join(driver));
            std::fs::create_dir_all(&device).unwrap();
            std::fs::create_dir_all(&driver).unwrap();
            symlink(&driver, device.join("driver")).unwrap();
            symlink(&device, class.join(name).join("device")).unwrap();
        }
        assert_eq!(virtio_nics(&class).unwrap(), ["eth1", "eth0", "ens1"]);
        // Without PCI: ten comes after nine.
        let place = |path: &str| place(Path::new(path));
        assert!(place("/sys/devices/platform/virtio9") < place("/sys/devices/platform/virtio10"));
    }

    #[test]
    fn macs_are_read_strictly() {
        assert_eq!(parse_mac("02:00:aB:00:00:ff"), Some([2, 0, 0xab, 0, 0, 0xff]));
        for bad in
            ["", "02:00:00:00:00", "02:00:00:00:00:00:00", "2:0:0:0:0:0", "02:00:00:00:00:+1", "01:00:00:00:00:00"]
        {
            assert_eq!(parse_mac(bad), None, "{bad}");
        }
    }

    #[test]
    fn prefixes_of_any_length() {
        let nic = |ip: &str, prefix| NicIdentity {
            mac: "02:00:00:00:00:01".into(),
            ip: ip.into(),
            prefix,
            ..NicIdentity::default()
        };
        let covers =
            |prefix, other: &str| Wanted::parse(&nic("10.1.2.3", prefix)).unwrap().covers(other.parse().unwrap());
        assert!(covers(24, "10.1.2.254") && !covers(24, "10.1.3.1"));
        assert!(covers(32, "10.1.2.3") && !covers(32, "10.1.2.2"));
        assert!(covers(0, "192.168.0.1"));
        assert!(Wanted::parse(&nic("10.1.2.3", 33)).is_err());
    }

    #[test]
    fn a_listed_socket_is_known_by_its_local_address() {
        let mut content = [0; 72];
        content[4..8].copy_from_slice(&[0, 80, 0x9c, 0x40]);
        content[8..12].copy_from_slice(&[10, 0, 0, 2]);
        let (id, local) = diag_answer(AF_INET, &content).unwrap();
        assert_eq!((local, &id[..4]), ("10.0.0.2".parse().unwrap(), &[0, 80, 0x9c, 0x40][..]));
        // A socket of IPv6 that talks IPv4.
        content[8..24].copy_from_slice(&[0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 0, 2]);
        assert_eq!(diag_answer(AF_INET6, &content).unwrap().1, local);
        assert!(diag_answer(AF_INET, &content[..40]).is_none());
        let request = format!("{:?}", diag_request(21, AF_INET, 6, 0x0a, &id));
        assert!(request.contains("10, 0, 0, 2"), "{request}");
    }

    #[test]
    fn name_servers_are_left_to_systemd_and_other_lines_stay() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::new(dir.path());
        let server = "10.0.0.1".to_owned();
        assert!(set_dns(&paths, &[&server]).unwrap().unwrap().contains("left"), "no /etc");
        std::fs::create_dir(dir.path().join("etc")).unwrap();
        let path = dir.path().join("etc/resolv.conf");
        assert_eq!(set_dns(&paths, &[&server]).unwrap(), None);
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "nameserver 10.0.0.1\n");
        assert!(set_dns(&paths, &[&"host".to_owned()]).is_err());
        std::fs::remove_file(&path).unwrap();
        symlink("../run/systemd/resolve/stub-resolv.conf", &path).unwrap();
        assert!(set_dns(&paths, &[&server]).unwrap().unwrap().contains("systemd"));
    }
}
