//! One family's network on this host.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, netdevice};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::dhcp::{Responder, Terms};
use crate::host::{HostInner, Port, check_name, delete_devices, device, devices, forward, set_elements};
use crate::netlink::{Element, Key, Message, PortFlags, Socket};
use crate::rules::{self, BRIDGE, DHCP, Published, TABLE, TUNNEL, UPLINK};
use crate::space::{IP, Space, TC, ip_batch, nft, sysctl};
use crate::{Error, MacAddr, Member, Result, Subnet, sys};

/// Descriptors of `/dev/net/tun` kept open: opening one takes a thread that enters the namespace.
const TUNS: usize = 8;
/// The most characters of a tap's name.
const TAP_NAME: usize = 11;
/// Names that no tap can have.
const RESERVED: [&str; 5] = [BRIDGE, TUNNEL, UPLINK, DHCP, "lo"];

/// What a network is to be.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkSpec {
    /// One to eight lower-case letters, digits and dashes, unique on this host: part of the names of devices.
    pub name: String,
    /// The network's number in the tunnel, below 2^24: the same on all hosts, another for each family.
    pub vni: u32,
    /// Where members may connect to outside of the network.
    pub egress: Egress,
    /// The most bits per second between the family and the outside, for each direction. Members among
    /// themselves are not held back.
    pub rate: Option<u64>,
    /// Bytes of the largest IP packet: the fabric's less 50 for the tunnel, such as 1450.
    pub mtu: u16,
}

/// Where members may connect to outside of their network.
///
/// Never to this host's own ports, to other families, to link-local addresses (such as a cloud's metadata service), or to
/// the tunnel's port of any host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Egress {
    /// Nowhere.
    None,
    /// Everywhere, with this host's address.
    Nat,
    /// These networks only, each at one port of TCP and UDP, or with any protocol; with this host's address.
    List(Vec<(Subnet, Option<u16>)>),
}

/// A protocol with ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Proto {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// An open tap: QEMU's end of a VM's network card.
///
/// The device is gone when its last descriptor is closed, which takes the closing thread 16 ms (the kernel waits for
/// readers): close it where that does not matter.
#[derive(Debug)]
pub struct Tap {
    /// For QEMU's `netdev_add type=tap fd=...`. Has `IFF_VNET_HDR`, and one queue.
    pub fd: OwnedFd,
    /// The device's name within the family's namespace.
    pub name: String,
}

/// What the DHCP responder tells guests besides their addresses.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DhcpOptions {
    /// Name servers, at most 8.
    pub dns: Vec<Ipv4Addr>,
}

/// An address that a guest has asked for and was given by DHCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lease {
    /// Whose address.
    pub member: Member,
    /// How often it was acknowledged.
    pub acks: u64,
}

/// Counts of one network on this host, since it was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// Frames from taps that were dropped: foreign addresses, kinds that no member may send.
    pub dropped: u64,
    /// Frames from taps that were dropped because there were too many ARP requests or broadcasts.
    pub storm: u64,
    /// Frames from other hosts that were dropped.
    pub remote_dropped: u64,
}

/// One family's network on this host. Clones of it are the same; the DHCP responder ends with the last.
///
/// Dropping it removes nothing from the kernel: [`crate::HostNet::remove`] does. It holds up to 20 descriptors, besides those
/// of taps.
#[derive(Clone, Debug)]
pub struct Network {
    inner: Arc<Inner>,
}

/// Locks, also after a panic elsewhere: what these locks guard is whole between any two statements that may panic.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Who is where.
#[derive(Debug, Default)]
pub(crate) struct Members {
    /// Tap to member.
    admitted: BTreeMap<String, Member>,
    /// Members on other hosts; [`Ipv4Addr::UNSPECIFIED`] for those of before a crash, whose host is not known.
    remote: BTreeMap<Member, Ipv4Addr>,
}

impl Members {
    /// The admitted member with an address.
    pub(crate) fn of_mac(&self, mac: MacAddr) -> Option<Member> {
        self.admitted.values().find(|member| member.mac == mac).copied()
    }
}

/// The two ends of a family's veth pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Link {
    host: Ipv4Addr,
    inner: Ipv4Addr,
}

impl Link {
    /// How many there are.
    const COUNT: u32 = 1 << 12;

    fn nth(number: u32) -> Self {
        let base = Ipv4Addr::new(169, 254, 192, 0).to_bits() + 4 * (number % Self::COUNT);
        Self { host: Ipv4Addr::from_bits(base + 1), inner: Ipv4Addr::from_bits(base + 2) }
    }

    /// The one whose host's end has an address.
    fn of_host(ip: Ipv4Addr) -> Option<Self> {
        let offset = ip.to_bits().checked_sub(Ipv4Addr::new(169, 254, 192, 0).to_bits())?;
        let link = Self::nth(offset / 4);
        (offset / 4 < Self::COUNT && link.host == ip).then_some(link)
    }
}

/// A network, its sockets, and what it knows.
#[derive(Debug)]
pub(crate) struct Inner {
    name: String,
    mtu: u16,
    host: Arc<HostInner>,
    space: Arc<Space>,
    link: Link,
    route: Socket,
    filter: Socket,
    /// For questions about devices.
    control: OwnedFd,
    bridge: u32,
    tunnel: Option<u32>,
    tuns: Arc<Mutex<Vec<OwnedFd>>>,
    members: Arc<Mutex<Members>>,
    /// The port for the DHCP responder. Kept open also without one, so that the bridge always has a port in use.
    own_tap: Mutex<Option<OwnedFd>>,
    dhcp: Mutex<Option<Responder>>,
    gone: AtomicBool,
}

/// Checks a spec.
fn check(spec: &NetworkSpec) -> Result<()> {
    check_name("a network", &spec.name, 8, &[])?;
    let bad = |what, value: String, remedy| Err(Error::BadValue { what, value, remedy });
    if spec.vni == 0 || spec.vni >= 1 << 24 {
        return bad("a network's number", spec.vni.to_string(), "use 1 to 16777215");
    }
    if !(576..=9000).contains(&spec.mtu) {
        return bad("the MTU of a network", spec.mtu.to_string(), "use 576 to 9000");
    }
    match spec.rate {
        Some(rate) if !(64_000..=1_000_000_000_000).contains(&rate) => {
            bad("a rate in bits per second", rate.to_string(), "use 64000 to 10^12, or none")
        }
        _ => Ok(()),
    }
}

/// Takes the fields of a concatenated element, as `nft -json` tells it.
fn fields(element: &Value) -> Vec<&str> {
    element["concat"].as_array().into_iter().flatten().filter_map(Value::as_str).collect()
}

/// Who the filter of the calling thread's namespace lets in.
fn adopt() -> Result<Members> {
    let mut members = Members::default();
    for element in set_elements("bridge", TABLE, "source")? {
        if let [tap, mac, ip] = fields(&element)[..]
            && let (Ok(mac), Ok(ip)) = (mac.parse(), ip.parse())
        {
            members.admitted.insert(tap.to_owned(), Member { mac, ip });
        }
    }
    for element in set_elements("bridge", TABLE, "remote")? {
        if let [mac, ip] = fields(&element)[..]
            && let (Ok(mac), Ok(ip)) = (mac.parse(), ip.parse())
        {
            members.remote.insert(Member { mac, ip }, Ipv4Addr::UNSPECIFIED);
        }
    }
    Ok(members)
}

impl Inner {
    /// Makes a network, or what of it is missing.
    pub(crate) fn make(
        host: &Arc<HostInner>,
        spec: &NetworkSpec,
        path: &Path,
        open: Option<Arc<Self>>,
    ) -> Result<Arc<Self>> {
        check(spec)?;
        let plan = host.options.plan;
        let space = match Space::mounted(path)? {
            Some(space) => space,
            None => Space::make(path)?,
        };
        // The rules come before the first device, and settings before both.
        let members = space.run(|| {
            settings()?;
            let mut script = rules::routing(plan, &spec.egress, &host.published(&spec.name));
            let members = if open.is_none() {
                let members = adopt()?;
                let admitted: Vec<_> = members.admitted.iter().map(|(tap, member)| (tap.clone(), *member)).collect();
                let remote: Vec<_> = members.remote.keys().copied().collect();
                script += &rules::filter(&admitted, &remote);
                Some(members)
            } else {
                None
            };
            nft("install a network's rules", &script)?;
            bridge(host, spec)?;
            Ok(members)
        })?;
        let link = veth(host, spec, path, &space)?;
        tunnel(host, spec, path, &space)?;
        if let Some(open) = open {
            return Ok(open);
        }
        let inner = space.run(|| {
            let failed = |source: io::Error| Error::kernel("open the sockets of a network", source);
            let control = rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
                .map_err(|errno| failed(errno.into()))?;
            let index = |name| {
                netdevice::name_to_index(&control, name).map_err(|errno| Error::kernel(format!("find {name}"), errno))
            };
            let bridge = index(BRIDGE)?;
            let tunnel = host.options.tunnel.map(|_| index(TUNNEL)).transpose()?;
            let route = Socket::route().map_err(failed)?;
            let members = members.unwrap_or_default();
            // What a crash, or a person, took from those whose taps are still there.
            let mut messages = Vec::new();
            for (tap, member) in &members.admitted {
                if let Ok(tap) = netdevice::name_to_index(&control, tap) {
                    messages.push(Message::add_fdb(tap, member.mac));
                    messages.push(Message::add_neighbour(bridge, member.ip, member.mac));
                }
            }
            route.send_all(messages).map_err(failed)?;
            let network = Self {
                name: spec.name.clone(),
                mtu: spec.mtu,
                host: Arc::clone(host),
                space: Arc::new(Space::current()?),
                link,
                route,
                filter: Socket::filter().map_err(failed)?,
                control,
                bridge,
                tunnel,
                tuns: Arc::new(Mutex::new(open_tuns()?)),
                members: Arc::new(Mutex::new(members)),
                own_tap: Mutex::default(),
                dhcp: Mutex::default(),
                gone: AtomicBool::new(false),
            };
            let own_tap = network.tap_in_time(DHCP)?;
            *locked(&network.own_tap) = Some(own_tap);
            // Only now: a bridge that is set up without a port in use drops what it sends, for up to a second after it
            // has one.
            network.route.send_all(vec![Message::up(bridge, true)]).map_err(failed)?;
            Ok(network)
        })?;
        Ok(Arc::new(inner))
    }

    /// Ends the responder, and bars further work.
    pub(crate) fn end(&self) {
        self.gone.store(true, Ordering::SeqCst);
        let responder = locked(&self.dhcp).take();
        drop(responder);
        locked(&self.own_tap).take();
        locked(&self.tuns).clear();
    }

    fn alive(&self) -> Result<()> {
        if self.gone.load(Ordering::SeqCst) { Err(Error::Gone { name: self.name.clone() }) } else { Ok(()) }
    }

    fn index(&self, device: &str) -> Result<u32, Errno> {
        netdevice::name_to_index(&self.control, device)
    }

    /// Takes a descriptor of `/dev/net/tun` off the stock, which a thread fills again before it is empty.
    fn tun(&self) -> Result<OwnedFd> {
        let (tun, left) = {
            let mut tuns = locked(&self.tuns);
            (tuns.pop(), tuns.len())
        };
        if left == TUNS / 2 {
            let (space, tuns) = (Arc::clone(&self.space), Arc::clone(&self.tuns));
            // Without it, the one who finds the stock empty fills it.
            let _ = thread::Builder::new().name(format!("tuns-{}", self.name)).spawn(move || {
                if let Ok(more) = space.run(open_tuns) {
                    locked(&tuns).extend(more);
                }
            });
        }
        if let Some(tun) = tun {
            return Ok(tun);
        }
        let mut more = self.space.run(open_tuns)?;
        let tun = more.pop();
        locked(&self.tuns).extend(more);
        tun.ok_or_else(|| Error::kernel("open /dev/net/tun", io::Error::from(io::ErrorKind::NotFound)))
    }

    /// Makes a tap that is a port of the bridge and up.
    fn tap(&self, name: &str, vnet_header: bool, flags: PortFlags) -> Result<OwnedFd> {
        let failed =
            |source: io::Error| Error::kernel(format!("make the tap {name} of the network {}", self.name), source);
        let fd = self.tun()?;
        sys::attach_tap(&fd, name, vnet_header).map_err(failed)?;
        let index = self.index(name).map_err(|errno| failed(errno.into()))?;
        self.route
            .send_all(vec![
                Message::enslave(index, self.bridge, self.mtu),
                Message::port_flags(index, flags),
                Message::up(index, true),
            ])
            .map_err(failed)?;
        Ok(fd)
    }

    /// Makes the network's own tap, also if the former one is still on its way out.
    fn tap_in_time(&self, name: &str) -> Result<OwnedFd> {
        let end = Instant::now() + Duration::from_secs(2);
        loop {
            match self.tap(name, false, PortFlags::default()) {
                Err(Error::Kernel { source, .. })
                    if source.kind() == io::ErrorKind::ResourceBusy && Instant::now() < end =>
                {
                    thread::sleep(Duration::from_millis(5));
                }
                other => return other,
            }
        }
    }

    /// Takes away what a member had at a tap.
    fn forget(&self, tap: &str, member: Member) -> Result<()> {
        let failed = |source: io::Error| {
            Error::kernel(format!("expel {member} from the tap {tap} of the network {}", self.name), source)
        };
        // The filter first: from here on, nothing of it passes.
        let elements = elements(tap, member);
        match self.filter.elements(TABLE, &elements, false) {
            Ok(()) => {}
            Err(error) if missing(&error) => {
                // All or none, and one was missing: so each on its own.
                for element in &elements {
                    match self.filter.elements(TABLE, std::slice::from_ref(element), false) {
                        Err(error) if !missing(&error) => return Err(failed(error)),
                        _ => {}
                    }
                }
            }
            Err(error) => return Err(failed(error)),
        }
        let mut messages = vec![Message::delete_neighbour(self.bridge, member.ip)];
        if let Ok(index) = self.index(tap) {
            messages.push(Message::delete_fdb(index, member.mac));
        }
        for answer in self.route.send(messages).map_err(failed)? {
            match answer {
                Err(errno) if !missing(&errno.into()) => return Err(failed(errno.into())),
                _ => {}
            }
        }
        Ok(())
    }
}

/// Whether the kernel said that what is to be taken away is not there.
fn missing(error: &io::Error) -> bool {
    let errno = Errno::from_io_error(error);
    [Errno::NOENT, Errno::NODEV, Errno::SRCH, Errno::NXIO].iter().any(|gone| errno == Some(*gone))
}

/// The filter's elements for a member at a tap.
fn elements(tap: &str, Member { mac, ip }: Member) -> Vec<Element> {
    let key = || Key::default().device(tap).mac(mac);
    vec![
        Element { set: "source", key: key().ip(ip) },
        Element { set: "arp_source", key: key().mac(mac).ip(ip) },
        Element { set: "dhcp_source", key: key() },
    ]
}

/// The filter's element for a member on another host.
fn remote_element(Member { mac, ip }: Member) -> Element {
    Element { set: "remote", key: Key::default().mac(mac).ip(ip) }
}

/// Opens a stock of `/dev/net/tun`. The taps made of them are in the calling thread's namespace.
fn open_tuns() -> Result<Vec<OwnedFd>> {
    let path = "/dev/net/tun";
    (0..TUNS)
        .map(|_| OpenOptions::new().read(true).write(true).open(path).map(OwnedFd::from))
        .collect::<io::Result<_>>()
        .map_err(|source| Error::kernel(format!("open {path}"), source))
}

/// Settings of the family's namespace.
fn settings() -> Result<()> {
    for group in ["all", "default"] {
        sysctl(&format!("net/ipv6/conf/{group}/disable_ipv6"), "1", true)?;
        sysctl(&format!("net/ipv4/conf/{group}/send_redirects"), "0", false)?;
        sysctl(&format!("net/ipv4/conf/{group}/accept_redirects"), "0", false)?;
        sysctl(&format!("net/ipv4/conf/{group}/rp_filter"), "1", false)?;
    }
    sysctl("net/ipv4/ip_forward", "1", false)?;
    // Set to 1 in a new namespace where `br_netfilter` is loaded: members' frames would go through the IP rules too.
    for key in ["bridge-nf-call-iptables", "bridge-nf-call-ip6tables", "bridge-nf-call-arptables"] {
        sysctl(&format!("net/bridge/{key}"), "0", true)?;
    }
    Ok(())
}

/// Makes the bridge with the gateway's addresses.
fn bridge(host: &HostInner, spec: &NetworkSpec) -> Result<()> {
    let (plan, mtu) = (host.options.plan, spec.mtu);
    let gateway = plan.gateway();
    let mut lines = Vec::new();
    let there = devices(&["-j", "link", "show"])?;
    let old = device(&there, BRIDGE);
    if old.is_none() {
        lines.push(format!("link add {BRIDGE} type bridge stp_state 0 forward_delay 0 mcast_snooping 0"));
    }
    // Setting the address, even to what it is, makes the kernel forget all neighbours, permanent ones too.
    if old.is_none_or(|bridge| bridge["address"] != gateway.mac.to_string()) {
        lines.push(format!("link set dev {BRIDGE} address {}", gateway.mac));
    }
    lines.push(format!("link set dev {BRIDGE} mtu {mtu}"));
    lines.push(format!("addr replace {}/{} dev {BRIDGE}", gateway.ip, plan.prefix()));
    lines.push("link set dev lo up".to_owned());
    ip_batch("make a network's bridge", &lines)
}

/// Makes the veth pair, with addresses, a route, and the rate.
fn veth(host: &HostInner, spec: &NetworkSpec, path: &Path, space: &Space) -> Result<Link> {
    let name = format!("{}{}", rules::veth_prefix(&host.options.tag), spec.name);
    let inside = space.run(|| devices(&["-j", "link", "show"]))?;
    let link = host.space.run(|| {
        let there = devices(&["-j", "-4", "addr", "show"])?;
        let addresses = |device: &Value| -> Vec<Ipv4Addr> {
            let list = device["addr_info"].as_array().into_iter().flatten();
            list.filter_map(|info| info["local"].as_str()?.parse().ok()).collect()
        };
        // Also those that have no address are to be seen, so not out of `there`.
        let whole = device(&devices(&["-j", "link", "show"])?, &name).is_some() && device(&inside, UPLINK).is_some();
        if !whole {
            space.run(|| delete_devices(&[UPLINK]))?;
            delete_devices(&[&name])?;
            let arguments =
                ["link", "add", &name, "type", "veth", "peer", "name", UPLINK, "netns", &path.to_string_lossy()];
            IP.run("make a network's veth pair", &arguments, "")?;
        }
        let own = device(&there, &name).map(addresses).unwrap_or_default();
        let link = match own.into_iter().find_map(Link::of_host).filter(|_| whole) {
            Some(link) => link,
            None => {
                let taken: Vec<_> = there.iter().flat_map(addresses).collect();
                // Starts where no other daemon of this host is likely to look at the same time.
                let start = name.bytes().fold(7u32, |sum, byte| sum.wrapping_mul(31).wrapping_add(byte.into()));
                (0..Link::COUNT)
                    .map(|step| Link::nth(start.wrapping_add(step)))
                    .find(|link| !taken.contains(&link.host) && !taken.contains(&link.inner))
                    .ok_or(Error::BadValue {
                        what: "one more network on this host",
                        value: Link::COUNT.to_string(),
                        remedy: "remove one",
                    })?
            }
        };
        sysctl(&format!("net/ipv6/conf/{name}/disable_ipv6"), "1", true)?;
        // So that the host's own connections to 127.0.0.1 can be forwarded. What families send there is dropped.
        sysctl(&format!("net/ipv4/conf/{name}/route_localnet"), "1", false)?;
        ip_batch(
            "set a network's veth up",
            &[format!("addr replace {}/30 dev {name}", link.host), format!("link set dev {name} mtu {} up", spec.mtu)],
        )?;
        rate(&name, spec.rate)?;
        Ok(link)
    })?;
    space.run(|| {
        ip_batch(
            "set a network's way out up",
            &[
                format!("addr replace {}/30 dev {UPLINK}", link.inner),
                format!("link set dev {UPLINK} mtu {} up", spec.mtu),
                format!("route replace default via {} dev {UPLINK}", link.host),
            ],
        )?;
        rate(UPLINK, spec.rate)
    })?;
    Ok(link)
}

/// Limits what leaves by a device, or lifts the limit.
fn rate(name: &str, rate: Option<u64>) -> Result<()> {
    match rate {
        Some(rate) => {
            // 20 ms at full rate, and never less than a few large packets.
            let (rate, burst) = (format!("{rate}bit"), (rate / 400).clamp(32 << 10, 256 << 20).to_string());
            let arguments = ["qdisc", "replace", "dev", name, "root", "tbf", "rate", &rate, "burst", &burst];
            TC.run("limit a network's rate", &[&arguments[..], &["latency", "50ms"]].concat(), "").map(drop)
        }
        None => {
            let there = devices(&["-j", "link", "show", "dev", name])?;
            if device(&there, name).is_some_and(|device| device["qdisc"] == "tbf") {
                TC.run("lift a network's rate limit", &["qdisc", "del", "dev", name, "root"], "")?;
            }
            Ok(())
        }
    }
}

/// Makes the VXLAN device in the host's namespace, where its socket stays, and moves it to the bridge.
fn tunnel(host: &HostInner, spec: &NetworkSpec, path: &Path, space: &Space) -> Result<()> {
    let there = space.run(|| devices(&["-j", "-d", "link", "show"]))?;
    let fits = |device: &Value| {
        let data = &device["linkinfo"]["info_data"];
        host.options.tunnel.is_some_and(|tunnel| {
            data["id"] == spec.vni && data["port"] == tunnel.port && data["local"] == tunnel.local.to_string()
        })
    };
    let fine = device(&there, TUNNEL).map(fits);
    if fine == Some(false) {
        space.run(|| delete_devices(&[TUNNEL]))?;
    }
    let Some(options) = host.options.tunnel else { return Ok(()) };
    if fine != Some(true) {
        let name = format!("{}{}", rules::tunnel_prefix(&host.options.tag), spec.name);
        host.space.run(|| {
            delete_devices(&[&name])?;
            let line = format!(
                "link add {name} type vxlan id {} local {} dstport {} nolearning ttl 64",
                spec.vni, options.local, options.port
            );
            ip_batch("make a network's tunnel", &[line])?;
            let arguments = ["link", "set", "dev", &name, "netns", &path.to_string_lossy(), "name", TUNNEL];
            IP.run("move a network's tunnel to it", &arguments, "").map(drop)
        })?;
    }
    space.run(|| {
        let failed = |source: io::Error| Error::kernel("make the tunnel a port of the bridge", source);
        let control = rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)
            .map_err(|errno| failed(errno.into()))?;
        let index = |name| netdevice::name_to_index(&control, name).map_err(|errno| failed(errno.into()));
        let (bridge, tunnel) = (index(BRIDGE)?, index(TUNNEL)?);
        Socket::route()
            .and_then(|route| {
                route.send_all(vec![
                    Message::enslave(tunnel, bridge, spec.mtu),
                    Message::port_flags(tunnel, PortFlags { neigh_suppress: true, ..PortFlags::default() }),
                    Message::up(tunnel, true),
                ])
            })
            .map_err(failed)
    })
}

impl Network {
    pub(crate) fn new(inner: Arc<Inner>) -> Self {
        Self { inner }
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Where its namespace is mounted.
    pub fn path(&self) -> PathBuf {
        self.inner.host.options.state_dir.join("net").join(&self.inner.name)
    }

    /// Makes a tap (a name of at most 11 characters) on the bridge, up, through which nothing passes yet.
    ///
    /// Elements that a former tap of this name left in the filter are removed first. The name is taken for up to 16 ms
    /// after the former tap's last descriptor was closed.
    ///
    /// # Errors
    /// When the name is taken or none, or the kernel refuses.
    pub fn open_tap(&self, name: &str) -> Result<Tap> {
        self.inner.alive()?;
        check_name("a tap", name, TAP_NAME, &RESERVED)?;
        let mut members = locked(&self.inner.members);
        if let Some(member) = members.admitted.get(name).copied() {
            // A tap that is there keeps its member: this call fails below.
            if self.inner.index(name).is_err() {
                self.inner.forget(name, member)?;
                members.admitted.remove(name);
            }
        }
        let flags = PortFlags { proxy_arp: true, ..PortFlags::default() };
        let fd = self.inner.tap(name, true, flags)?;
        Ok(Tap { fd, name: name.to_owned() })
    }

    /// Lets `member`, and nobody else, speak through `tap`. Another member admitted there before is expelled.
    ///
    /// # Errors
    /// When there is no such tap, or the member is admitted at another one that is still there, or its addresses are none
    /// that a member can have, or the kernel refuses.
    pub fn admit(&self, tap: &str, member: Member) -> Result<()> {
        let inner = &*self.inner;
        inner.alive()?;
        check_name("a tap", tap, TAP_NAME, &RESERVED)?;
        self.check_member(member)?;
        let failed = |source: io::Error| {
            Error::kernel(format!("admit {member} at the tap {tap} of the network {}", inner.name), source)
        };
        let mut members = locked(&inner.members);
        let index = inner.index(tap).map_err(|errno| failed(errno.into()))?;
        let rivals: Vec<_> = members
            .admitted
            .iter()
            .filter(|(at, who)| {
                at.as_str() == tap && **who != member
                    || at.as_str() != tap && (who.mac == member.mac || who.ip == member.ip)
            })
            .map(|(at, who)| (at.clone(), *who))
            .collect();
        if let Some((_, who)) = rivals.iter().find(|(at, _)| at != tap && inner.index(at).is_ok()) {
            return Err(Error::BadValue {
                what: "admitted at two taps",
                value: who.to_string(),
                remedy: "expel it from the other tap before",
            });
        }
        for (at, who) in rivals {
            inner.forget(&at, who)?;
            members.admitted.remove(&at);
        }
        // On record before it is in the kernel, so that whatever stays of a failure is taken away later.
        members.admitted.insert(tap.to_owned(), member);
        inner
            .route
            .send_all(vec![
                Message::add_fdb(index, member.mac),
                Message::add_neighbour(inner.bridge, member.ip, member.mac),
            ])
            .map_err(failed)?;
        inner.filter.elements(TABLE, &elements(tap, member), true).map_err(failed)
    }

    /// Plugs a tap's cable in (as it is from the beginning), or pulls it out. Nothing passes a tap whose cable is out, in
    /// either direction, not even to somebody who captures at it; the guest can't see it, and what it sends is lost.
    ///
    /// # Errors
    /// When there is no such tap, or the kernel refuses.
    pub fn set_cable(&self, tap: &str, plugged: bool) -> Result<()> {
        let inner = &*self.inner;
        inner.alive()?;
        check_name("a tap", tap, TAP_NAME, &RESERVED)?;
        let failed = |source: io::Error| {
            let what = if plugged { "plug in" } else { "pull out" };
            Error::kernel(format!("{what} the cable of the tap {tap} of the network {}", inner.name), source)
        };
        let index = inner.index(tap).map_err(|errno| failed(errno.into()))?;
        inner.route.send_all(vec![Message::up(index, plugged)]).map_err(failed)
    }

    /// Takes back what [`Network::admit`] gave. No error when it is gone, or the tap is.
    ///
    /// The next [`Network::admit`] of any network may wait some milliseconds until the kernel has freed what this took away.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn expel(&self, tap: &str, member: Member) -> Result<()> {
        self.inner.alive()?;
        check_name("a tap", tap, TAP_NAME, &RESERVED)?;
        let mut members = locked(&self.inner.members);
        // Admitted elsewhere by now: then the neighbour is that tap's.
        if members.admitted.iter().any(|(at, who)| at != tap && (who.mac == member.mac || who.ip == member.ip)) {
            return Ok(());
        }
        self.inner.forget(tap, member)?;
        if members.admitted.get(tap) == Some(&member) {
            members.admitted.remove(tap);
        }
        Ok(())
    }

    /// Who is admitted at which tap, also from before the daemon's crash. The taps may be gone.
    pub fn admitted(&self) -> Vec<(String, Member)> {
        locked(&self.inner.members).admitted.iter().map(|(tap, member)| (tap.clone(), *member)).collect()
    }

    /// The members on other hosts, each with its host's address in the tunnel. Replaces what was set before.
    ///
    /// Those that are also admitted here are left out: a member is where its tap is.
    ///
    /// # Errors
    /// When the host has no tunnel, or the kernel refuses.
    pub fn set_remote(&self, members: &[(Member, Ipv4Addr)]) -> Result<()> {
        let inner = &*self.inner;
        inner.alive()?;
        let failed =
            |source: io::Error| Error::kernel(format!("set the members of {} on other hosts", inner.name), source);
        let Some(tunnel) = inner.tunnel else {
            if members.is_empty() {
                return Ok(());
            }
            return Err(Error::BadValue {
                what: "members on other hosts",
                value: members.len().to_string(),
                remedy: "this host has no tunnel",
            });
        };
        let mut known = locked(&inner.members);
        let mut wanted = BTreeMap::new();
        for (member, host) in members {
            self.check_member(*member)?;
            if !known.admitted.values().any(|here| here.mac == member.mac || here.ip == member.ip) {
                wanted.insert(*member, *host);
            }
        }
        let old: Vec<_> = known.remote.keys().filter(|member| !wanted.contains_key(member)).copied().collect();
        let new: Vec<_> = wanted
            .iter()
            .filter(|(member, host)| known.remote.get(member) != Some(host))
            .map(|(member, host)| (*member, *host))
            .collect();
        if !old.is_empty() {
            let elements: Vec<_> = old.iter().copied().map(remote_element).collect();
            match inner.filter.elements(TABLE, &elements, false) {
                Err(error) if !missing(&error) => return Err(failed(error)),
                Err(_) => {
                    for element in elements {
                        match inner.filter.elements(TABLE, &[element], false) {
                            Err(error) if !missing(&error) => return Err(failed(error)),
                            _ => {}
                        }
                    }
                }
                Ok(()) => {}
            }
            let mut messages = Vec::new();
            for member in &old {
                messages.push(Message::delete_tunnel_fdb(tunnel, member.mac));
                // A member that is here by now has entries of its own under the same addresses.
                if !known.admitted.values().any(|here| here.mac == member.mac || here.ip == member.ip) {
                    messages.push(Message::delete_fdb(tunnel, member.mac));
                    messages.push(Message::delete_neighbour(inner.bridge, member.ip));
                }
            }
            for answer in inner.route.send(messages).map_err(failed)? {
                match answer {
                    Err(errno) if !missing(&errno.into()) => return Err(failed(errno.into())),
                    _ => {}
                }
            }
            for member in &old {
                known.remote.remove(member);
            }
        }
        if !new.is_empty() {
            let mut messages = Vec::new();
            for (member, host) in &new {
                // On record first, as one whose host is not known, so that a failure is repaired by the next call.
                known.remote.insert(*member, Ipv4Addr::UNSPECIFIED);
                messages.push(Message::add_tunnel_fdb(tunnel, member.mac, *host));
                messages.push(Message::add_fdb(tunnel, member.mac));
                messages.push(Message::add_neighbour(inner.bridge, member.ip, member.mac));
            }
            inner.route.send_all(messages).map_err(failed)?;
            let elements: Vec<_> = new.iter().map(|(member, _)| remote_element(*member)).collect();
            inner.filter.elements(TABLE, &elements, true).map_err(failed)?;
            known.remote.extend(new);
        }
        Ok(())
    }

    /// Forwards a port of this host to a member's.
    ///
    /// Holds a socket on the host's port, so that no other program takes it. The member sees the asking address, or the
    /// gateway's when that would be one that it cannot answer. Sets `net.ipv4.ip_forward` of the host.
    ///
    /// # Errors
    /// [`crate::Error::PortTaken`] when another program or family has the port.
    pub fn publish(&self, proto: Proto, host_port: u16, member: Ipv4Addr, port: u16) -> Result<()> {
        let inner = &*self.inner;
        inner.alive()?;
        if host_port == 0 || port == 0 {
            return Err(Error::BadValue { what: "a port", value: "0".to_owned(), remedy: "use 1 to 65535" });
        }
        let plan = inner.host.options.plan;
        if !plan.network().contains(member) || member == plan.gateway().ip {
            return Err(Error::BadAddress { what: "a member's address", text: member.to_string() });
        }
        let published = Published { proto, host_port, member, port };
        let mut ports = locked(&inner.host.ports);
        let old = ports.get(&(proto, host_port));
        if let Some(old) = old {
            if old.family != inner.name {
                return Err(Error::PortTaken { port: host_port, by: Some(old.family.clone()) });
            }
            if old.published == published {
                return Ok(());
            }
        }
        let socket = match old {
            Some(old) => Arc::clone(&old.socket),
            None => Arc::new(inner.host.hold(proto, host_port)?),
        };
        let (key, to) = published.inner();
        let (_, outer) = published.outer(inner.link.inner);
        let known = old.is_some().then_some(key.as_str());
        let table = inner.host.table();
        inner.space.run(|| nft("publish a port", &rules::replace_element(TABLE, known, Some((&key, &to)))))?;
        let forwarded = inner.host.space.run(|| {
            forward()?;
            nft("publish a port", &rules::replace_element(&table, known, Some((&key, &outer))))
        });
        if let Err(error) = forwarded {
            let undo = rules::replace_element(TABLE, Some(&key), None);
            let _ = inner.space.run(|| nft("unpublish a port", &undo));
            return Err(error);
        }
        ports.insert((proto, host_port), Port { family: inner.name.clone(), published, socket });
        Ok(())
    }

    /// Ends the forwarding of a port. No error when there is none. Open connections go on.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn unpublish(&self, proto: Proto, host_port: u16) -> Result<()> {
        let inner = &*self.inner;
        inner.alive()?;
        let mut ports = locked(&inner.host.ports);
        let Some(port) = ports.get(&(proto, host_port)).filter(|port| port.family == inner.name) else { return Ok(()) };
        let (key, _) = port.published.inner();
        let table = inner.host.table();
        inner.host.space.run(|| nft("unpublish a port", &rules::replace_element(&table, Some(&key), None)))?;
        ports.remove(&(proto, host_port));
        inner.space.run(|| nft("unpublish a port", &rules::replace_element(TABLE, Some(&key), None)))
    }

    /// Answers DHCP for admitted members, each with its own address, for guests without our agent.
    ///
    /// The responder is a thread of this process. Called again, it takes the new options.
    ///
    /// # Errors
    /// When its device or thread cannot be made.
    pub fn serve_dhcp(&self, options: DhcpOptions) -> Result<()> {
        let inner = &*self.inner;
        let mut dhcp = locked(&inner.dhcp);
        inner.alive()?;
        let terms = Terms { plan: inner.host.options.plan, mtu: inner.mtu, options };
        if let Some(responder) = &*dhcp {
            responder.set(terms);
            return Ok(());
        }
        let failed = |source: io::Error| Error::kernel(format!("serve DHCP in the network {}", inner.name), source);
        let own_tap = locked(&inner.own_tap).as_ref().map(OwnedFd::try_clone).transpose().map_err(failed)?;
        let tap = own_tap.ok_or_else(|| Error::Gone { name: inner.name.clone() })?;
        let index = inner.index(DHCP).map_err(|errno| failed(errno.into()))?;
        let flags = PortFlags { broadcasts: true, ..PortFlags::default() };
        inner.route.send_all(vec![Message::port_flags(index, flags)]).map_err(failed)?;
        *dhcp = Some(Responder::start(&inner.name, tap, terms, Arc::clone(&inner.members))?);
        Ok(())
    }

    /// Addresses that guests were given by DHCP.
    pub fn leases(&self) -> Vec<Lease> {
        locked(&self.inner.dhcp).as_ref().map(Responder::leases).unwrap_or_default()
    }

    /// Counts of dropped frames.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn counters(&self) -> Result<Counters> {
        self.inner.alive()?;
        let count = |name| {
            self.inner.filter.counter(TABLE, name).map_err(|source| {
                Error::kernel(format!("read the counters of the network {}", self.inner.name), source)
            })
        };
        Ok(Counters { dropped: count("dropped")?, storm: count("storm")?, remote_dropped: count("remote_dropped")? })
    }

    /// Whether a member can have these addresses.
    fn check_member(&self, member: Member) -> Result<()> {
        let plan = self.inner.host.options.plan;
        let network = plan.network();
        let fine = member.mac.is_unicast()
            && member.mac != plan.gateway().mac
            && network.contains(member.ip)
            && ![plan.gateway().ip, network.base(), network.broadcast()].contains(&member.ip);
        if fine { Ok(()) } else { Err(Error::BadAddress { what: "a member of the network", text: member.to_string() }) }
    }
}
