//! The rules, as `nft` reads them.

use std::fmt::Write as _;
use std::net::Ipv4Addr;

use crate::{AddressPlan, Egress, Member, Proto, SECURE_PORT, TunnelOptions};

/// The table of the filter and that of routing in each family's namespace.
pub(crate) const TABLE: &str = "ramet";
/// The network of the veth pairs; each takes four addresses.
pub(crate) const LINKS: &str = "169.254.192.0/18";

/// Fixed names of devices in a family's namespace.
pub(crate) const BRIDGE: &str = "br0";
pub(crate) const TUNNEL: &str = "vx0";
pub(crate) const UPLINK: &str = "up0";
pub(crate) const DHCP: &str = "dhcp0";

/// Frames of one tap that are ARP or broadcasts: per second, and at once.
const STORM_RATE: u32 = 100;
const STORM_BURST: u32 = 50;

/// A published port within the family's namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Published {
    pub(crate) proto: Proto,
    pub(crate) host_port: u16,
    pub(crate) member: Ipv4Addr,
    pub(crate) port: u16,
}

impl Published {
    /// Key and value in the family's namespace.
    pub(crate) fn inner(&self) -> (String, String) {
        (self.key(), format!("{} . {}", self.member, self.port))
    }

    /// Key and value in the host's namespace.
    pub(crate) fn outer(&self, link: Ipv4Addr) -> (String, String) {
        (self.key(), format!("{link} . {}", self.host_port))
    }

    fn key(&self) -> String {
        let proto = match self.proto {
            Proto::Tcp => "tcp",
            Proto::Udp => "udp",
        };
        format!("{proto} . {}", self.host_port)
    }
}

/// The element list of a set, or nothing for an empty one.
fn elements(list: &[String]) -> String {
    if list.is_empty() { String::new() } else { format!("elements = {{ {} }};", list.join(", ")) }
}

/// The name of the host's table.
pub(crate) fn host_table(tag: &str) -> String {
    format!("ramet-{tag}")
}

/// The host's table, in place of the one that may be there. `fabric`: this host's address in the open, when its tunnels are
/// encrypted.
pub(crate) fn host(
    tag: &str,
    plan: AddressPlan,
    tunnel: Option<TunnelOptions>,
    fabric: Option<Ipv4Addr>,
    peers: &[Ipv4Addr],
) -> String {
    let table = host_table(tag);
    let veths = format!("\"{}*\"", veth_prefix(tag));
    let network = plan.network();
    let peers = elements(&peers.iter().map(Ipv4Addr::to_string).collect::<Vec<_>>());
    let (mut guard, mut own) = (String::new(), String::new());
    if let (Some(TunnelOptions { local, port }), Some(fabric)) = (tunnel, fabric) {
        // VXLAN by the encrypting device only, and by that nothing else. What is encrypted is taken from peers only, which
        // saves the work on others'; their keys decide.
        let device = secure_device(tag);
        let ports = format!("{{ {port}, {SECURE_PORT} }}");
        guard = format!(
            "iifname {veths} udp dport {ports} drop
             iifname \"lo\" udp dport {ports} drop
             meta nfproto ipv6 udp dport {ports} drop
             udp dport {port} iifname != \"{device}\" drop
             iifname \"{device}\" meta l4proto != udp drop
             iifname \"{device}\" udp dport != {port} drop
             iifname \"{device}\" ip daddr != {local} drop
             udp dport {SECURE_PORT} ip saddr != @peers drop
             udp dport {SECURE_PORT} ip daddr != {fabric} drop
             udp dport {SECURE_PORT} fib saddr . iif oif missing drop"
        );
        // Without the device, as after a crash, the route to it is gone too: nothing may go another way in the open.
        own = format!(
            "udp dport {port} meta skuid != 0 drop
             udp dport {port} oifname != \"{device}\" drop"
        );
    } else if let Some(TunnelOptions { local, port }) = tunnel {
        // VXLAN has no authentication, so only peers may send to its port, and only by the way that leads back to them.
        // A family's packet would leave with this host's address, which the others trust.
        guard = format!(
            "iifname {veths} udp dport {port} drop
             iifname \"lo\" udp dport {port} drop
             meta nfproto ipv6 udp dport {port} drop
             udp dport {port} ip saddr != @peers drop
             udp dport {port} ip daddr != {local} drop
             udp dport {port} fib saddr . iif oif missing drop"
        );
        // The kernel's own packets have no owner; root may do all anyway.
        own = format!("udp dport {port} meta skuid != 0 drop");
    }
    format!(
        "table inet {table} {{ }}
         delete table inet {table}
         table inet {table} {{
           set peers {{ type ipv4_addr; {peers} }}
           map published {{ type inet_proto . inet_service : ipv4_addr . inet_service; }}
           chain guard {{
             type filter hook prerouting priority -300; policy accept;
             {guard}
             iifname {veths} meta nfproto ipv6 drop
             iifname {veths} ip saddr != {LINKS} drop
             iifname {veths} ip daddr 127.0.0.0/8 drop
           }}
           chain to_host {{
             type filter hook input priority 0; policy accept;
             iifname {veths} ct state established,related accept
             iifname {veths} drop
           }}
           chain from_host {{
             type filter hook output priority 0; policy accept;
             {own}
           }}
           chain through {{
             type filter hook forward priority 0; policy accept;
             oifname {veths} iifname {veths} drop
             iifname {veths} ct state established,related accept
             iifname {veths} ip daddr 169.254.0.0/16 drop
             oifname {veths} ct state established,related accept
             oifname {veths} ct status dnat accept
             oifname {veths} drop
           }}
           chain arriving {{
             type nat hook prerouting priority -100; policy accept;
             iifname != {veths} fib daddr type local dnat ip to meta l4proto . th dport map @published
           }}
           chain own {{
             type nat hook output priority -100; policy accept;
             fib daddr type local dnat ip to meta l4proto . th dport map @published
           }}
           chain leaving {{
             type nat hook postrouting priority 100; policy accept;
             oifname {veths} ip saddr {{ 127.0.0.0/8, {network} }} masquerade
             iifname {veths} oifname != {veths} masquerade
           }}
         }}
         "
    )
}

/// What the names of a daemon's veths begin with.
pub(crate) fn veth_prefix(tag: &str) -> String {
    format!("rm{tag}-")
}

/// What the names of a daemon's tunnels begin with, until they are moved into their namespaces.
pub(crate) fn tunnel_prefix(tag: &str) -> String {
    format!("rv{tag}-")
}

/// The filter's elements for one member at one tap, as `nft` writes them: set and element.
fn member_elements(tap: &str, member: &Member) -> [(usize, String); 3] {
    let Member { mac, ip } = member;
    [
        (0, format!("\"{tap}\" . {mac} . {ip}")),
        (1, format!("\"{tap}\" . {mac} . {mac} . {ip}")),
        (2, format!("\"{tap}\" . {mac}")),
    ]
}

/// The filter of a family's bridge, in place of the one that may be there.
pub(crate) fn filter(admitted: &[(String, Member)], remote: &[Member]) -> String {
    let mut sets = [Vec::new(), Vec::new(), Vec::new()];
    for (tap, member) in admitted {
        for (set, element) in member_elements(tap, member) {
            sets[set].push(element);
        }
    }
    let [source, arp_source, dhcp_source] = sets.map(|set| elements(&set));
    let remote = elements(&remote.iter().map(|Member { mac, ip }| format!("{mac} . {ip}")).collect::<Vec<_>>());
    // A tag is taken off before this hook, and then `ether type` without `@ll` reads the type behind it.
    format!(
        "table bridge {TABLE} {{ }}
         delete table bridge {TABLE}
         table bridge {TABLE} {{
           counter dropped {{ }}
           counter storm {{ }}
           counter remote_dropped {{ }}
           set source {{ type ifname . ether_addr . ipv4_addr; {source} }}
           set arp_source {{ type ifname . ether_addr . ether_addr . ipv4_addr; {arp_source} }}
           set dhcp_source {{ type ifname . ether_addr; {dhcp_source} }}
           set remote {{ type ether_addr . ipv4_addr; {remote} }}
           set storms {{ type ifname; size 65535; flags dynamic,timeout; timeout 10s; }}
           chain refuse {{
             counter name dropped drop
           }}
           chain refuse_remote {{
             counter name remote_dropped drop
           }}
           chain stormy {{
             update @storms {{ iifname limit rate over {STORM_RATE}/second burst {STORM_BURST} packets }} counter name storm drop
           }}
           chain arp_frames {{
             ether daddr & 01:00:00:00:00:00 == 01:00:00:00:00:00 ether daddr != ff:ff:ff:ff:ff:ff goto refuse
             arp htype 1 arp ptype 0x0800 arp hlen 6 arp plen 4 arp operation {{ 1, 2 }} iifname . ether saddr . arp saddr ether . arp saddr ip @arp_source accept
             goto refuse
           }}
           chain broadcasts {{
             ip saddr 0.0.0.0 ip daddr 255.255.255.255 udp sport 68 udp dport 67 iifname . ether saddr @dhcp_source accept
             iifname . ether saddr . ip saddr @source ip daddr 255.255.255.255 udp sport 68 udp dport 67 accept
             goto refuse
           }}
           chain from_remote {{
             @ll,96,16 != 0x0800 goto refuse_remote
             ether daddr & 01:00:00:00:00:00 == 01:00:00:00:00:00 goto refuse_remote
             ip daddr & 224.0.0.0 == 224.0.0.0 goto refuse_remote
             udp sport 67 goto refuse_remote
             ether saddr . ip saddr @remote accept
             goto refuse_remote
           }}
           chain arriving {{
             type filter hook prerouting priority -300; policy drop;
             iifname \"{TUNNEL}\" goto from_remote
             iifname \"{DHCP}\" accept
             @ll,96,16 != {{ 0x0800, 0x0806 }} goto refuse
             @ll,96,16 0x0806 jump stormy
             @ll,96,16 0x0800 ether daddr & 01:00:00:00:00:00 == 01:00:00:00:00:00 jump stormy
             @ll,96,16 0x0806 goto arp_frames
             ether daddr ff:ff:ff:ff:ff:ff goto broadcasts
             ether daddr & 01:00:00:00:00:00 == 01:00:00:00:00:00 goto refuse
             ip daddr & 224.0.0.0 == 224.0.0.0 goto refuse
             udp sport 67 goto refuse
             iifname . ether saddr . ip saddr @source accept
             goto refuse
           }}
         }}
         "
    )
}

/// Routing of a family's namespace, in place of what may be there.
pub(crate) fn routing(plan: AddressPlan, egress: &Egress, published: &[Published]) -> String {
    let gateway = plan.gateway().ip;
    let published: Vec<_> = published.iter().map(Published::inner).map(|(key, to)| format!("{key} : {to}")).collect();
    let published = elements(&published);
    let mut out = String::new();
    match egress {
        Egress::None => {}
        Egress::Nat => out.push_str("accept"),
        Egress::List(list) => {
            for (network, port) in list {
                let _ = match port {
                    Some(port) => {
                        writeln!(out, "ip daddr {network} meta l4proto {{ tcp, udp }} th dport {port} accept")
                    }
                    None => writeln!(out, "ip daddr {network} accept"),
                };
            }
        }
    }
    format!(
        "table inet {TABLE} {{ }}
         delete table inet {TABLE}
         table inet {TABLE} {{
           map published {{ type inet_proto . inet_service : ipv4_addr . inet_service; {published} }}
           chain to_gateway {{
             type filter hook input priority 0; policy drop;
             ct state established,related accept
             iifname \"{BRIDGE}\" ip daddr {gateway} icmp type echo-request accept
           }}
           chain way_out {{
             {out}
           }}
           chain through {{
             type filter hook forward priority 0; policy drop;
             ct state established,related accept
             iifname \"{UPLINK}\" oifname \"{BRIDGE}\" ct status dnat accept
             iifname \"{BRIDGE}\" oifname \"{UPLINK}\" jump way_out
           }}
           chain arriving {{
             type nat hook prerouting priority -100; policy accept;
             iifname \"{UPLINK}\" dnat ip to meta l4proto . th dport map @published
           }}
           chain leaving {{
             type nat hook postrouting priority 100; policy accept;
             oifname \"{UPLINK}\" masquerade
             iifname \"{UPLINK}\" oifname \"{BRIDGE}\" ip saddr {LINKS} masquerade
           }}
         }}
         "
    )
}

/// Puts an element into a map, in place of `old`.
pub(crate) fn replace_element(table: &str, old: Option<&str>, new: Option<(&str, &str)>) -> String {
    let mut script = String::new();
    if let Some(key) = old {
        let _ = writeln!(script, "delete element inet {table} published {{ {key} }}");
    }
    if let Some((key, value)) = new {
        let _ = writeln!(script, "add element inet {table} published {{ {key} : {value} }}");
    }
    script
}

/// The device that encrypts a daemon's tunnels.
pub(crate) fn secure_device(tag: &str) -> String {
    format!("rw{tag}")
}
