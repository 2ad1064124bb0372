//! Networks on the real kernel. Needs root, `ip`, `bridge`, `tc` and `nft`. The guests are this process, at the taps' ends.

#![allow(clippy::unwrap_used, reason = "a failure here is the test's failure")]

mod support;

use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use ramet_net::{DhcpOptions, Egress, Error, HostNet, MacAddr, Member, Proto, SECURE_PORT};
use support::*;

const WAIT: Duration = Duration::from_millis(800);
const SHORT: Duration = Duration::from_millis(250);

/// Two hosts of one family, each with a guest.
struct Pair {
    fabric: Fabric,
    a: Host,
    b: Host,
}

impl Pair {
    fn new() -> Self {
        let fabric = Fabric::new();
        let (a, b) = (Host::new(&fabric, 1), Host::new(&fabric, 2));
        a.net.set_peers(&[b.address]).unwrap();
        b.net.set_peers(&[a.address]).unwrap();
        Self { fabric, a, b }
    }
}

#[test]
fn members_reach_one_another_on_one_host_and_over_the_tunnel() {
    let pair = Pair::new();
    let (on_a, on_b) = (pair.a.family("fam", VNI, Egress::None), pair.b.family("fam", VNI, Egress::None));
    let first = pair.a.guest(&on_a, "tap0", 2);
    let second = pair.a.guest(&on_a, "tap1", 3);
    let far = pair.b.guest(&on_b, "tap0", 2);
    assert!(!first.reaches(&far, b"before anybody said where the other is"));
    on_a.set_remote(&[(far.member, pair.b.address)]).unwrap();
    on_b.set_remote(&[(first.member, pair.a.address), (second.member, pair.a.address)]).unwrap();

    let gateway = pair.a.net.plan().gateway();
    assert_eq!(first.arp(second.member.ip), Some(second.member.mac));
    assert_eq!(second.arp(first.member.ip), Some(first.member.mac));
    assert_eq!(first.arp(far.member.ip), Some(far.member.mac));
    assert_eq!(far.arp(first.member.ip), Some(first.member.mac));
    assert_eq!(first.arp(gateway.ip), Some(gateway.mac));
    assert_eq!(far.arp(gateway.ip), Some(gateway.mac));
    assert_eq!(first.arp(Ipv4Addr::new(100, 64, 99, 99)), None);
    assert_eq!(pair.fabric.count("packets"), 0, "questions were answered on the spot");

    assert!(first.reaches(&second, b"here") && second.reaches(&first, b"and back"));
    assert!(first.reaches(&far, b"there") && far.reaches(&second, b"and back"));
    assert!(pair.fabric.count("packets") >= 2);
    assert_eq!((pair.fabric.count("arp"), pair.fabric.count("group")), (0, 0));

    // The gateway answers a ping.
    let echo = [8, 0, 0xf7, 0xff, 0, 0, 0, 0];
    first.send(&ip_frame(gateway.mac, first.member.mac, &ipv4(first.member.ip, gateway.ip, 1, &echo)));
    assert!(first.find(WAIT, |frame| frame[23] == 1 && frame[34] == 0).is_some());

    // Moved and gone members.
    on_a.set_remote(&[]).unwrap();
    assert!(!first.reaches(&far, b"no longer"));
    assert_eq!(first.arp(far.member.ip), None);
    assert!(!far.reaches(&first, b"from one that is no member any more"));
    on_a.set_remote(&[(far.member, pair.a.address)]).unwrap();
    on_a.set_remote(&[(far.member, pair.b.address)]).unwrap();
    assert!(first.reaches(&far, b"again") && far.reaches(&first, b"again too"));
    assert!(on_a.set_remote(&[(gateway, pair.b.address)]).is_err());
}

/// Waits for a connection between hosts, and sends until then.
fn reaches_in_time(from: &Guest, to: &Guest, text: &[u8]) -> bool {
    (0..20).any(|_| from.reaches(to, text))
}

#[test]
fn encrypted_tunnels_show_no_frame_and_take_none_from_strangers() {
    let fabric = Fabric::new();
    let (mut a, b) = (Host::secure(&fabric, 1), Host::secure(&fabric, 2));
    a.befriend(2);
    b.befriend(1);
    let (on_a, on_b) = (a.family("fam", VNI, Egress::None), b.family("fam", VNI, Egress::None));
    let (first, far) = (a.guest(&on_a, "tap0", 2), b.guest(&on_b, "tap0", 2));
    on_a.set_remote(&[(far.member, b.address)]).unwrap();
    on_b.set_remote(&[(first.member, a.address)]).unwrap();
    assert!(reaches_in_time(&first, &far, b"there") && far.reaches(&first, b"and back"));
    // The largest packet of a member: 1450 with its headers.
    let large: Vec<u8> = (0..1422).map(|n| n as u8).collect();
    assert!(first.reaches(&far, &large) && far.reaches(&first, &large));
    assert!(fabric.count("secure") >= 6);
    assert_eq!(fabric.count("packets"), 0, "none in the open");

    // A stranger: frames in the open, as itself, as the peer, and to the address in the tunnel; and encrypted by its own key.
    let right = vxlan(VNI, &udp(far.member.mac, first.member, far.member.ip, 1, 2, b"injected"));
    let arrives = || far.drain().iter().any(|frame| frame.ends_with(b"injected"));
    let mac = b.place.sh("ip -o link show eth0 | sed 's/.*ether \\([^ ]*\\).*/\\1/'");
    let mut stranger = Host::secure(&fabric, 3);
    stranger.place.sh(&format!(
        "ip addr add 10.77.0.1/32 dev eth0; ip neigh add 10.77.0.2 lladdr {} dev eth0 nud permanent; nft flush ruleset",
        mac.trim()
    ));
    b.place.sh("for f in all eth0; do echo 0 > /proc/sys/net/ipv4/conf/$f/rp_filter; done");
    let inject = |host: &Host, from: Ipv4Addr, to: (Ipv4Addr, u16), payload: &[u8]| {
        host.place.run(|| {
            let socket = UdpSocket::bind((from, if to.1 == SECURE_PORT { SECURE_PORT } else { 0 })).unwrap();
            for _ in 0..3 {
                let _ = socket.send_to(payload, to);
            }
        });
    };
    let open = Ipv4Addr::new(10, 77, 0, 2);
    for from in [Ipv4Addr::new(10, 77, 0, 3), Ipv4Addr::new(10, 77, 0, 1)] {
        let control = b.place.run(|| UdpSocket::bind((open, 9)).unwrap());
        control.set_read_timeout(Some(WAIT)).unwrap();
        inject(&stranger, from, (open, 9), b"control");
        assert_eq!(datagram(&control).unwrap().0, b"control", "from {from}");
        inject(&stranger, from, (open, 4789), &right);
        assert!(!arrives(), "in the open from {from}");
        for kind in 1..=4u8 {
            let forged = [&[kind, 0, 0, 0, 0, 1, 0, 0][..], &right, &[0; 148]].concat();
            for length in [32, 64, 92, 148, forged.len()] {
                inject(&stranger, from, (open, SECURE_PORT), &forged[..length.min(forged.len())]);
            }
        }
        assert!(!arrives(), "forged from {from}");
    }
    stranger.place.sh("ip addr add 169.254.190.2/32 dev eth0; ip route add 169.254.190.0/23 via 10.77.0.2");
    inject(&stranger, a.address, (b.address, 4789), &right);
    assert!(!arrives(), "to the address in the tunnel");
    stranger
        .place
        .sh("ip addr del 169.254.190.2/32 dev eth0; ip route del 169.254.190.0/23; ip addr del 10.77.0.1/32 dev eth0");
    stranger.open_again();
    stranger.befriend(2);
    let on_stranger = stranger.family("fam", VNI, Egress::None);
    let forger = stranger.guest(&on_stranger, "tap0", 2);
    on_stranger.set_remote(&[(far.member, b.address)]).unwrap();
    on_b.set_remote(&[(first.member, a.address), (forger.member, stranger.address)]).unwrap();
    assert!(!forger.reaches(&far, b"by its own key"));
    b.net.set_peers(&[Ipv4Addr::new(10, 77, 0, 1), Ipv4Addr::new(10, 77, 0, 3)]).unwrap();
    assert!(!forger.reaches(&far, b"when its address is let in"));
    b.net.set_secure_peers(&[secure_peer(1), secure_peer(3)]).unwrap();
    assert!(reaches_in_time(&forger, &far, b"when its key is"));
    assert!(first.reaches(&far, b"the old connection has gone on"));

    // While nobody encrypts, nothing leaves, whatever way there is.
    a.place.sh("ip link del rwt; ip route add default via 10.77.0.100");
    assert!(!first.reaches(&far, b"in the open") && !first.reaches(&far, b"by the default route"));
    assert_eq!(fabric.count("packets"), 9, "those of the stranger only");
    a.place.sh("ip route del default");
    a.befriend(2);
    assert!(reaches_in_time(&first, &far, b"with a new device") && far.reaches(&first, b"and back"));
    drop(on_a);
    a.open_again();
    a.befriend(2);
    let on_a = a.family("fam", VNI, Egress::None);
    on_a.set_remote(&[(far.member, b.address)]).unwrap();
    assert!(reaches_in_time(&first, &far, b"by the next daemon") && far.reaches(&first, b"and back"));
    assert_eq!(fabric.count("packets"), 9);
    drop((on_a, on_b, on_stranger));
    for host in [&a, &b, &stranger] {
        host.net.remove("fam").unwrap();
        assert!(!host.place.sh("ip -br link").contains("rwt"), "the device is gone with the last network");
    }
}

#[test]
fn a_tap_passes_nothing_before_it_is_admitted_and_after_it_is_expelled() {
    let fabric = Fabric::new();
    let host = Host::new(&fabric, 1);
    let network = host.family("fam", VNI, Egress::None);
    let first = host.guest(&network, "tap0", 2);
    let member = host.net.plan().member(1, 3).unwrap();
    let second = Guest::new(network.open_tap("tap1").unwrap(), member);
    assert!(!second.reaches(&first, b"early") && !first.reaches(&second, b"early too"));
    network.admit("tap1", member).unwrap();
    assert!(second.reaches(&first, b"now") && first.reaches(&second, b"and back"));
    assert!(matches!(network.admit("tap0", member), Err(Error::BadValue { .. })));
    assert!(first.reaches(&second, b"a refusal changes nothing"));
    network.expel("tap1", member).unwrap();
    network.expel("tap1", member).unwrap();
    network.expel("nothing", member).unwrap();
    assert!(!second.reaches(&first, b"late") && !first.reaches(&second, b"late too"));
    // The next member at the same tap; the former one's addresses are worth nothing.
    let next = host.net.plan().member(1, 4).unwrap();
    network.admit("tap1", member).unwrap();
    network.admit("tap1", next).unwrap();
    assert!(!second.reaches(&first, b"as the former"));
    let second = Guest { member: next, ..second };
    assert!(second.reaches(&first, b"as the next"));
    assert_eq!(network.admitted().len(), 2);
    assert!(network.open_tap("tap1").is_err());
    assert!(network.open_tap("br0").is_err() && network.open_tap("x".repeat(12).as_str()).is_err());
    assert!(network.admit("tap1", host.net.plan().gateway()).is_err());
}

#[test]
fn nothing_passes_a_tap_whose_cable_is_out() {
    let fabric = Fabric::new();
    let host = Host::new(&fabric, 1);
    let network = host.family("fam", VNI, Egress::None);
    let (first, second) = (host.guest(&network, "tap0", 2), host.guest(&network, "tap1", 3));
    assert!(first.reaches(&second, b"plugged in from the beginning"));
    network.set_cable("tap1", false).unwrap();
    network.set_cable("tap1", false).unwrap();
    assert!(!first.reaches(&second, b"in") && second.try_send(&[0; 60]).is_err());
    network.set_cable("tap1", true).unwrap();
    assert!(first.reaches(&second, b"in again") && second.reaches(&first, b"out again"));
    assert!(network.set_cable("tap9", true).is_err());
}

#[test]
fn attacks_reach_neither_a_sibling_nor_another_family() {
    let pair = Pair::new();
    let host = &pair.a;
    let (network, other) = (host.family("fam", VNI, Egress::None), host.family("other", VNI + 1, Egress::None));
    let far_network = pair.b.family("fam", VNI, Egress::None);
    let evil = host.guest(&network, "tap0", 2);
    let sibling = host.guest(&network, "tap1", 3);
    let twin = host.guest(&other, "tap1", 3);
    let third = host.guest(&other, "tap0", 2);
    let far = pair.b.guest(&far_network, "tap0", 2);
    network.set_remote(&[(far.member, pair.b.address)]).unwrap();
    far_network.set_remote(&[(evil.member, host.address), (sibling.member, host.address)]).unwrap();
    network.serve_dhcp(DhcpOptions::default()).unwrap();

    let (me, it, gateway) = (evil.member, sibling.member, host.net.plan().gateway());
    let stranger = Member { mac: MacAddr([2, 0x52, 9, 9, 9, 9]), ip: Ipv4Addr::new(100, 64, 200, 9) };
    let own = udp_packet(me.ip, it.ip, 5, 6, b"evil");
    let tagged = |tags: &[u8]| [&it.mac.0[..], &me.mac.0, tags, &[8, 0], &own].concat();
    let all = MacAddr::BROADCAST;
    let zero = MacAddr([0; 6]);
    let group = MacAddr([1, 0, 0x5e, 0, 0, 251]);
    let mut attacks: Vec<(&str, Vec<u8>)> = vec![
        ("802.1Q", tagged(&[0x81, 0, 0, 5])),
        ("802.1Q with VLAN 0", tagged(&[0x81, 0, 0, 0])),
        ("802.1Q with VLAN 1", tagged(&[0x81, 0, 0, 1])),
        ("QinQ", tagged(&[0x88, 0xa8, 0, 5, 0x81, 0, 0, 6])),
        ("802.1ad", tagged(&[0x88, 0xa8, 0, 5])),
        ("two 802.1Q", tagged(&[0x81, 0, 0, 1, 0x81, 0, 0, 1])),
        ("DHCP reply to the sibling", udp(it.mac, me, it.ip, 67, 68, b"evil")),
        ("DHCP reply to all", udp(all, me, Ipv4Addr::BROADCAST, 67, 68, b"evil")),
        ("broadcast", udp(all, me, Ipv4Addr::BROADCAST, 9, 9, b"evil")),
        ("broadcast of the network", udp(all, me, Ipv4Addr::new(100, 127, 255, 255), 9, 9, b"evil")),
        ("mDNS", udp(group, me, Ipv4Addr::new(224, 0, 0, 251), 5353, 5353, b"evil")),
        ("multicast to one", udp(it.mac, me, Ipv4Addr::new(224, 0, 0, 251), 5353, 5353, b"evil")),
        ("DHCP question with a foreign MAC", {
            let asking = Member { mac: it.mac, ip: Ipv4Addr::UNSPECIFIED };
            udp(all, asking, Ipv4Addr::BROADCAST, 68, 67, b"evil")
        }),
        ("DHCP question to the sibling", {
            let asking = Member { mac: me.mac, ip: Ipv4Addr::UNSPECIFIED };
            udp(it.mac, asking, Ipv4Addr::BROADCAST, 68, 67, b"evil")
        }),
        ("IPv6 router advertisement", ethernet(MacAddr([0x33, 0x33, 0, 0, 0, 1]), me.mac, 0x86dd, &[0x60; 60])),
        ("IPv6 to the sibling", ethernet(it.mac, me.mac, 0x86dd, &[0x60; 60])),
        ("STP", ethernet(MacAddr([1, 0x80, 0xc2, 0, 0, 0]), me.mac, 38, &[0x42, 0x42, 3, 0, 0])),
        ("LLDP", ethernet(MacAddr([1, 0x80, 0xc2, 0, 0, 0x0e]), me.mac, 0x88cc, &[2, 7, 4])),
        ("LLC to the sibling", ethernet(it.mac, me.mac, 46, &[0x42, 0x42, 3])),
        ("flow control", ethernet(MacAddr([1, 0x80, 0xc2, 0, 0, 1]), me.mac, 0x8808, &[0, 1, 0xff, 0xff])),
        ("gratuitous ARP for the sibling", arp(all, me.mac, 1, Member { mac: me.mac, ip: it.ip }, zero, it.ip)),
        (
            "gratuitous ARP for the gateway",
            arp(all, me.mac, 2, Member { mac: me.mac, ip: gateway.ip }, all, gateway.ip),
        ),
        ("own gratuitous ARP", arp(all, me.mac, 1, me, zero, me.ip)),
        ("forged ARP reply", arp(it.mac, me.mac, 2, Member { mac: me.mac, ip: gateway.ip }, it.mac, it.ip)),
        ("ARP with the sibling's pair", arp(it.mac, me.mac, 2, it, it.mac, it.ip)),
        ("ARP with a foreign frame address", arp(it.mac, stranger.mac, 2, me, it.mac, it.ip)),
        (
            "ARP with a foreign sender MAC",
            arp(it.mac, me.mac, 2, Member { mac: stranger.mac, ip: me.ip }, it.mac, it.ip),
        ),
        ("ARP probe", arp(all, me.mac, 1, Member { mac: me.mac, ip: Ipv4Addr::UNSPECIFIED }, zero, it.ip)),
        ("short ARP", ethernet(it.mac, me.mac, 0x0806, &[0, 1, 8, 0, 6, 4, 0, 2])),
        ("ARP with long addresses", {
            let mut frame = arp(it.mac, me.mac, 2, me, it.mac, it.ip);
            frame[18] = 7;
            frame
        }),
        ("RARP", {
            let mut frame = arp(it.mac, me.mac, 3, me, it.mac, it.ip);
            frame[12..14].copy_from_slice(&[0x80, 0x35]);
            frame
        }),
        ("short IPv4", ethernet(it.mac, me.mac, 0x0800, &[0x45])),
        ("IPv4 that says it is IPv6", ethernet(it.mac, me.mac, 0x86dd, &own)),
        ("the sibling's MAC to itself", ip_frame(it.mac, it.mac, &own)),
    ];
    for (name, mac) in [
        ("sibling", it.mac),
        ("gateway", gateway.mac),
        ("stranger", stranger.mac),
        ("group", group),
        ("far", far.member.mac),
    ] {
        attacks.push((name, ip_frame(it.mac, mac, &own)));
        attacks.push((name, ip_frame(far.member.mac, mac, &own)));
    }
    for ip in [
        it.ip,
        gateway.ip,
        stranger.ip,
        far.member.ip,
        Ipv4Addr::UNSPECIFIED,
        Ipv4Addr::new(8, 8, 8, 8),
        Ipv4Addr::LOCALHOST,
    ] {
        attacks.push(("foreign IP", ip_frame(it.mac, me.mac, &udp_packet(ip, it.ip, 5, 6, b"evil"))));
        attacks.push((
            "foreign IP over the tunnel",
            ip_frame(far.member.mac, me.mac, &udp_packet(ip, far.member.ip, 5, 6, b"evil")),
        ));
    }
    for kind in [0x0000u16, 0x05dc, 0x0600, 0x8847, 0x8863, 0x8864, 0x888e, 0x88e5, 0x88f7, 0x9000, 0x9100, 0xffff] {
        attacks.push(("unknown type", ethernet(it.mac, me.mac, kind, b"evil")));
        attacks.push(("unknown type to all", ethernet(all, me.mac, kind, b"evil")));
        attacks.push(("unknown type over the tunnel", ethernet(far.member.mac, me.mac, kind, b"evil")));
    }
    assert_eq!([&sibling, &twin, &third, &far].map(Guest::drain).concat(), Vec::<Vec<u8>>::new(), "before all");
    let control = |when: &str| {
        assert!(evil.reaches(&sibling, b"control"), "{when}");
        assert!(evil.reaches(&far, b"control"), "{when}, over the tunnel");
        assert!(third.reaches(&twin, b"control"), "{when}, in the other family");
    };
    let tunnelled = || pair.fabric.count("packets");
    for (name, attack) in &attacks {
        control(&format!("before {name}"));
        let before = tunnelled();
        evil.send(attack);
        for guest in [&sibling, &far, &twin, &third] {
            if let Some(frame) = guest.receive(Duration::from_millis(3)) {
                panic!("{name} arrived: {frame:02x?}");
            }
        }
        assert_eq!(tunnelled(), before, "{name} is in the tunnel");
    }
    for _ in 0..20_000 {
        evil.send(&arp(all, me.mac, 1, me, zero, it.ip));
    }
    for guest in [&sibling, &far, &twin, &third] {
        assert_eq!(guest.drain(), Vec::<Vec<u8>>::new(), "after all, and the ARP storm");
    }
    // What the storm's author was told: no more than its share.
    let told = evil.drain().len();
    assert!((1..2000).contains(&told), "{told} answers");
    control("after all");
    let counters = network.counters().unwrap();
    assert!(counters.storm > 15_000, "{counters:?}");
    assert!(counters.dropped >= 60, "{counters:?}");
    assert_eq!(other.counters().unwrap().dropped, 0);
    assert_eq!((pair.fabric.count("arp"), pair.fabric.count("group")), (0, 0));
}

#[test]
fn tunnel_packets_come_from_peers_only() {
    let pair = Pair::new();
    let on_a = pair.a.family("fam", VNI, Egress::None);
    let on_b = pair.b.family("fam", VNI, Egress::None);
    let bad_on_a = pair.a.family("bad", VNI + 1, Egress::Nat);
    let bad_on_b = pair.b.family("bad", VNI + 1, Egress::Nat);
    let victim = pair.b.guest(&on_b, "tap0", 2);
    let true_one = pair.a.guest(&on_a, "tap0", 2);
    on_a.set_remote(&[(victim.member, pair.b.address)]).unwrap();
    on_b.set_remote(&[(true_one.member, pair.a.address)]).unwrap();
    let right = vxlan(VNI, &udp(victim.member.mac, true_one.member, victim.member.ip, 1, 2, b"injected"));
    let inject = |from: Option<Ipv4Addr>, to: Ipv4Addr, payload: &[u8]| {
        let socket = UdpSocket::bind((from.unwrap_or(Ipv4Addr::UNSPECIFIED), 0)).unwrap();
        for _ in 0..3 {
            // The kernel may refuse; that is as good.
            let _ = socket.send_to(payload, (to, 4789));
        }
    };
    // All of them, so that a late one is not taken for the next attempt's.
    let arrives = || victim.drain().iter().any(|frame| frame.ends_with(b"injected"));
    let control = |when: &str| {
        assert!(true_one.reaches(&victim, b"control"), "{when}");
        pair.a.place.run(|| inject(None, pair.b.address, &right));
        assert!(arrives(), "{when}: forged by the true peer itself");
        victim.drain();
    };
    control("before all");

    // A guest of another family with a way out, on the same host as the victim and on the peer.
    for (host, network) in [(&pair.b, &bad_on_b), (&pair.a, &bad_on_a)] {
        let guest = host.guest(network, "tap0", 2);
        let gateway = host.net.plan().gateway();
        // It has a way out indeed.
        let internet = pair.fabric.place("out", 90 + host.number);
        let socket = internet.run(|| UdpSocket::bind("0.0.0.0:9").unwrap());
        socket.set_read_timeout(Some(WAIT)).unwrap();
        guest.send(&udp(gateway.mac, guest.member, Ipv4Addr::new(10, 77, 0, 90 + host.number), 4, 9, b"out"));
        assert_eq!(datagram(&socket).unwrap().0, b"out");
        for to in [pair.b.address, Ipv4Addr::LOCALHOST, Ipv4Addr::new(169, 254, 192, 1)] {
            guest.send(&udp(gateway.mac, guest.member, to, 4789, 4789, &right));
        }
        assert!(!arrives(), "from a guest on host {}", host.number);
        // And what has the whole namespace.
        within(&host.family_path("bad"), || {
            inject(None, pair.b.address, &right);
            let link = sh("ip route show default | cut -d' ' -f3").trim().parse().unwrap();
            inject(None, link, &right);
        });
        assert!(!arrives(), "from a family's namespace on host {}", host.number);
    }
    control("in between");

    // A host that is no peer; then it becomes one.
    let stranger = pair.fabric.place("stranger", 3);
    stranger.run(|| inject(None, pair.b.address, &right));
    assert!(!arrives(), "from no peer");
    pair.b.net.set_peers(&[pair.a.address, Ipv4Addr::new(10, 77, 0, 3)]).unwrap();
    stranger.run(|| inject(None, pair.b.address, &right));
    assert!(arrives(), "from a new peer");
    pair.b.net.set_peers(&[pair.a.address]).unwrap();

    // Another namespace of the victim's host, with its own address and with the peer's.
    let local = Place::new("local");
    sh(&format!(
        "ip -n {0} link add loc type veth peer name upl netns {1}
         ip -n {0} addr add 10.88.0.1/24 dev loc; ip -n {0} link set loc up
         ip -n {1} addr add 10.88.0.2/24 dev upl; ip -n {1} link set upl up
         ip -n {1} addr add 10.77.0.1/32 dev lo; ip -n {1} route add default via 10.88.0.1 dev upl",
        pair.b.place.name, local.name
    ));
    pair.b.place.sh("for f in all loc; do echo 0 > /proc/sys/net/ipv4/conf/$f/rp_filter; done");
    local.run(|| inject(None, pair.b.address, &right));
    local.run(|| inject(Some(pair.a.address), pair.b.address, &right));
    local.run(|| inject(Some(pair.a.address), Ipv4Addr::new(10, 88, 0, 1), &right));
    assert!(!arrives(), "from a namespace beside");
    pair.b.place.run(|| inject(None, pair.b.address, &right));
    pair.b.place.run(|| inject(None, Ipv4Addr::LOCALHOST, &right));
    assert!(!arrives(), "from the host itself");

    // A program of the true peer, as root and as somebody else.
    let file = pair.a.directory.path().join("packet");
    std::fs::write(&file, &right).unwrap();
    let as_user = |user: u32| {
        pair.a.place.run(|| {
            let script = format!("exec 3>/dev/udp/{}/4789; cat <&4 >&3 || true", pair.b.address);
            sh(&format!("setpriv --reuid={user} --clear-groups bash -c '{script}' 4<{}", file.display()));
        });
        arrives()
    };
    assert_eq!([as_user(0), as_user(65534)], [true, false]);

    // The true peer, with what is not its members'.
    let other = pair.a.net.plan().member(9, 9).unwrap();
    let gateway = pair.a.net.plan().gateway();
    let to = victim.member;
    for from in [
        other,
        gateway,
        to,
        Member { mac: true_one.member.mac, ip: other.ip },
        Member { mac: other.mac, ip: true_one.member.ip },
        Member { mac: true_one.member.mac, ip: gateway.ip },
    ] {
        let wrong = vxlan(VNI, &udp(to.mac, from, to.ip, 1, 2, b"injected"));
        pair.a.place.run(|| inject(None, pair.b.address, &wrong));
    }
    let me = true_one.member;
    for frame in [
        arp(to.mac, me.mac, 2, Member { mac: me.mac, ip: gateway.ip }, to.mac, to.ip),
        arp(MacAddr::BROADCAST, me.mac, 1, me, MacAddr([0; 6]), to.ip),
        udp(MacAddr::BROADCAST, me, Ipv4Addr::BROADCAST, 1, 2, b"injected"),
        udp(to.mac, me, to.ip, 67, 68, b"injected"),
        ethernet(to.mac, me.mac, 0x86dd, b"injected"),
    ] {
        pair.a.place.run(|| inject(None, pair.b.address, &vxlan(VNI, &frame)));
    }
    pair.a.place.run(|| inject(None, pair.b.address, &vxlan(VNI + 5, &right[8..])));
    assert_eq!(victim.drain(), Vec::<Vec<u8>>::new(), "wrong inner addresses");
    // So the counters that other tests want to be zero do count.
    assert!(pair.fabric.count("arp") >= 6 && pair.fabric.count("group") >= 6);
    control("after all");
    assert!(on_b.counters().unwrap().remote_dropped >= 18);
}

#[test]
fn members_reach_outside_what_they_may() {
    let fabric = Fabric::new();
    let host = Host::new(&fabric, 1);
    let internet = fabric.place("internet", 100);
    let beside = fabric.place("beside", 101);
    let beside_80 = beside.run(|| UdpSocket::bind("0.0.0.0:80").unwrap());
    let _beside_tcp = beside.run(|| TcpListener::bind("0.0.0.0:80").unwrap());
    let (udp_80, udp_81) =
        internet.run(|| (UdpSocket::bind("0.0.0.0:80").unwrap(), UdpSocket::bind("0.0.0.0:81").unwrap()));
    let _listeners = internet.run(|| [80, 81].map(|port| TcpListener::bind(("0.0.0.0", port)).unwrap()));
    for socket in [&udp_80, &udp_81, &beside_80] {
        socket.set_read_timeout(Some(SHORT)).unwrap();
    }
    let own = host.place.run(|| UdpSocket::bind("0.0.0.0:80").unwrap());
    own.set_read_timeout(Some(SHORT)).unwrap();
    let _own_tcp = host.place.run(|| TcpListener::bind("0.0.0.0:80").unwrap());
    let gateway = host.net.plan().gateway();
    let second = Ipv4Addr::new(10, 77, 0, 101);
    let list =
        Egress::List(vec![("10.77.0.100/32".parse().unwrap(), Some(80)), ("10.99.0.0/16".parse().unwrap(), None)]);
    for (name, egress, expected) in
        [("none", Egress::None, [false; 3]), ("nat", Egress::Nat, [true; 3]), ("list", list, [true, false, false])]
    {
        let network = host.family(name, VNI, egress);
        let guest = host.guest(&network, "tap0", 2);
        let mut source = 5000;
        let mut reaches = |to: Ipv4Addr, port: u16, socket: &UdpSocket| {
            source += 1;
            guest.send(&udp(gateway.mac, guest.member, to, source, port, b"hello"));
            let asked = datagram(socket);
            let there = asked.is_some();
            if let Some((_, from)) = asked {
                assert_eq!(from.ip(), host.address);
                socket.send_to(b"answer", from).unwrap();
                assert!(guest.find(WAIT, |frame| frame.ends_with(b"answer")).is_some());
            }
            guest.send(&tcp(gateway.mac, guest.member, to, (source, port), SYN, 0));
            let fits = |frame: &[u8]| frame[23] == 6 && frame[47] == SYN_ACK && frame[26..30] == to.octets();
            assert_eq!(guest.find(SHORT, fits).is_some(), there, "TCP is as UDP: {name} {to}:{port}");
            there
        };
        let found = [reaches(INTERNET, 80, &udp_80), reaches(INTERNET, 81, &udp_81), reaches(second, 80, &beside_80)];
        assert_eq!(found, expected, "{name}");
        // Never the host itself, by any of its addresses.
        let link = within(&host.family_path(name), || sh("ip route show default | cut -d' ' -f3"));
        for to in [host.address, link.trim().parse().unwrap(), Ipv4Addr::LOCALHOST, gateway.ip] {
            assert!(!reaches(to, 80, &own), "{name}: {to}");
        }
        host.net.remove(name).unwrap();
    }

    // Two families with a way out do not reach one another, not even by their veths' addresses.
    let (one, two) = (host.family("one", VNI, Egress::Nat), host.family("two", VNI + 1, Egress::Nat));
    let (first, second) = (host.guest(&one, "tap0", 2), host.guest(&two, "tap0", 3));
    two.publish(Proto::Udp, 8081, second.member.ip, 80).unwrap();
    let up = within(&host.family_path("two"), || sh("ip -4 -o addr show dev up0 | awk '{print $4}' | cut -d/ -f1"));
    for to in [up.trim().parse().unwrap(), second.member.ip, host.address] {
        for port in [80, 8081] {
            first.send(&udp(gateway.mac, first.member, to, 7, port, b"to another family"));
        }
    }
    assert_eq!(second.drain(), Vec::<Vec<u8>>::new());
}

#[test]
fn published_ports_are_reached_from_everywhere_but_families() {
    let fabric = Fabric::new();
    let host = Host::new(&fabric, 1);
    let client = fabric.place("client", 50);
    let network = host.family("fam", VNI, Egress::None);
    let other = host.family("other", VNI + 1, Egress::None);
    let guest = host.guest(&network, "tap0", 2);
    let gateway = host.net.plan().gateway();
    network.publish(Proto::Udp, 8080, guest.member.ip, 80).unwrap();
    network.publish(Proto::Tcp, 8080, guest.member.ip, 80).unwrap();
    network.publish(Proto::Tcp, 8080, guest.member.ip, 80).unwrap();

    let ask = |place: &Place, to: Ipv4Addr, port: u16| -> Option<Ipv4Addr> {
        let socket = place.run(|| UdpSocket::bind("0.0.0.0:0").unwrap());
        socket.set_read_timeout(Some(SHORT)).unwrap();
        let text = format!("question {}", socket.local_addr().unwrap().port());
        place.run(|| socket.send_to(text.as_bytes(), (to, port)).unwrap());
        let frame = guest.find(SHORT, |frame| frame.ends_with(text.as_bytes()))?;
        assert_eq!(frame[36..38], 80u16.to_be_bytes());
        let from = Ipv4Addr::from(<[u8; 4]>::try_from(&frame[26..30]).unwrap());
        let source = u16::from_be_bytes([frame[34], frame[35]]);
        guest.send(&udp(gateway.mac, guest.member, from, 80, source, b"answer"));
        assert_eq!(datagram(&socket).unwrap().0, b"answer");
        Some(from)
    };
    assert_eq!(ask(&client, host.address, 8080), Some(Ipv4Addr::new(10, 77, 0, 50)), "with its own address");
    assert_eq!(ask(&host.place, Ipv4Addr::LOCALHOST, 8080), Some(gateway.ip));
    assert!(ask(&host.place, host.address, 8080).is_some());
    assert_eq!(ask(&client, host.address, 8081), None);
    // From an address that the family takes for a member's.
    client.sh("ip addr add 100.64.7.7/32 dev lo; ip route replace 10.77.0.1/32 dev eth0 src 100.64.7.7");
    host.place.sh("ip route add 100.64.7.7/32 via 10.77.0.50");
    assert_eq!(ask(&client, host.address, 8080), Some(gateway.ip));
    client.sh("ip route del 10.77.0.1/32");

    // TCP: the guest answers the SYN, so that connecting succeeds.
    for (place, to) in [(&client, host.address), (&host.place, Ipv4Addr::LOCALHOST), (&host.place, host.address)] {
        std::thread::scope(|scope| {
            let connecting =
                scope.spawn(move || place.run(|| TcpStream::connect_timeout(&(to, 8080).into(), WAIT).map(drop)));
            let syn = guest.find(WAIT, |frame| frame[23] == 6 && frame[47] == SYN).expect("a SYN");
            let from = Ipv4Addr::from(<[u8; 4]>::try_from(&syn[26..30]).unwrap());
            let source = u16::from_be_bytes([syn[34], syn[35]]);
            let sequence = u32::from_be_bytes(syn[38..42].try_into().unwrap());
            guest.send(&tcp(gateway.mac, guest.member, from, (80, source), SYN_ACK, sequence.wrapping_add(1)));
            connecting.join().unwrap().unwrap();
        });
    }

    // Taken ports.
    let taken = |result: Result<(), Error>, by: Option<&str>| match result {
        Err(Error::PortTaken { by: found, .. }) => assert_eq!(found.as_deref(), by),
        other => panic!("{other:?}"),
    };
    taken(other.publish(Proto::Tcp, 8080, guest.member.ip, 80), Some("fam"));
    let program = host.place.run(|| TcpListener::bind("127.0.0.1:9090").unwrap());
    taken(network.publish(Proto::Tcp, 9090, guest.member.ip, 80), None);
    drop(program);
    network.publish(Proto::Tcp, 9090, guest.member.ip, 80).unwrap();
    assert!(host.place.run(|| TcpListener::bind("0.0.0.0:9090")).is_err());
    assert!(network.publish(Proto::Tcp, 9091, Ipv4Addr::new(10, 77, 0, 50), 80).is_err());

    // Another target, then none, then the other family.
    network.publish(Proto::Udp, 8080, host.net.plan().member(1, 5).unwrap().ip, 80).unwrap();
    assert_eq!(ask(&client, host.address, 8080), None);
    other.unpublish(Proto::Udp, 8080).unwrap();
    taken(other.publish(Proto::Udp, 8080, guest.member.ip, 80), Some("fam"));
    network.unpublish(Proto::Udp, 8080).unwrap();
    network.unpublish(Proto::Udp, 8080).unwrap();
    other.publish(Proto::Udp, 8080, guest.member.ip, 80).unwrap();
    assert_eq!(ask(&client, host.address, 8080), None, "not to the member with the same address in the first family");
    host.net.remove("other").unwrap();
    network.publish(Proto::Udp, 8080, guest.member.ip, 80).unwrap();
    assert!(ask(&client, host.address, 8080).is_some());
}

#[test]
fn rates_are_limited_both_ways() {
    let fabric = Fabric::new();
    let host = Host::new(&fabric, 1);
    let qdiscs = || {
        let outer = host.place.sh("tc qdisc show dev rmt-fam");
        let inner = within(&host.family_path("fam"), || sh("tc qdisc show dev up0"));
        [outer, inner].map(|text| text.contains("tbf") && text.contains("rate 20Mbit"))
    };
    let mut spec = spec("fam", VNI, Egress::Nat);
    spec.rate = Some(20_000_000);
    let network = host.net.ensure(&spec).unwrap();
    assert_eq!(qdiscs(), [true, true]);
    spec.rate = None;
    host.net.ensure(&spec).unwrap();
    assert_eq!(qdiscs(), [false, false]);
    drop(network);
    for rate in [0, 63_999, u64::MAX] {
        spec.rate = Some(rate);
        assert!(host.net.ensure(&spec).is_err());
    }
}

fn dhcp(guest: &Guest, kind: u8, extra: &[u8], broadcast: bool) -> Vec<u8> {
    let mut message = vec![0; 240];
    message[0..3].copy_from_slice(&[1, 1, 6]);
    message[4..8].copy_from_slice(b"abcd");
    message[10] = if broadcast { 0x80 } else { 0 };
    message[28..34].copy_from_slice(&guest.member.mac.0);
    message[236..240].copy_from_slice(&[99, 130, 83, 99]);
    message.extend_from_slice(&[53, 1, kind]);
    message.extend_from_slice(extra);
    message.push(255);
    let asking = Member { mac: guest.member.mac, ip: Ipv4Addr::UNSPECIFIED };
    udp(MacAddr::BROADCAST, asking, Ipv4Addr::BROADCAST, 68, 67, &message)
}

#[test]
fn guests_are_given_their_addresses_by_dhcp() {
    let fabric = Fabric::new();
    let host = Host::new(&fabric, 1);
    let network = host.family("fam", VNI, Egress::None);
    network.serve_dhcp(DhcpOptions { dns: vec![Ipv4Addr::new(9, 9, 9, 9)] }).unwrap();
    network.serve_dhcp(DhcpOptions { dns: vec![Ipv4Addr::new(1, 1, 1, 1)] }).unwrap();
    let (guest, other) = (host.guest(&network, "tap0", 2), host.guest(&network, "tap1", 3));
    let late = Guest::new(network.open_tap("tap2").unwrap(), host.net.plan().member(1, 4).unwrap());
    let answer = |guest: &Guest| guest.find(WAIT, |frame| frame[23] == 17 && frame[34..38] == [0, 67, 0, 68]);
    for broadcast in [false, true] {
        guest.send(&dhcp(&guest, 1, &[], broadcast));
        let offer = answer(&guest).expect("an offer");
        assert_eq!(offer[0..6], guest.member.mac.0);
        assert_eq!(offer[58..62], guest.member.ip.octets());
        assert_eq!(offer[284], 2);
        guest.send(&dhcp(&guest, 3, &[&[50, 4][..], &guest.member.ip.octets()].concat(), broadcast));
        let ack = answer(&guest).expect("an acknowledgement");
        assert_eq!(ack[284], 5);
        let has = |option: &[u8]| ack[282..].windows(option.len()).any(|window| window == option);
        assert!(has(&[6, 4, 1, 1, 1, 1]) && has(&[1, 4, 255, 192, 0, 0]) && has(&[3, 4, 100, 64, 0, 1]));
    }
    guest.send(&dhcp(&guest, 3, &[&[50, 4][..], &other.member.ip.octets()].concat(), true));
    assert_eq!(answer(&guest).expect("a refusal")[284], 6);
    let leases = network.leases();
    assert_eq!(leases.len(), 1);
    assert_eq!((leases[0].member, leases[0].acks), (guest.member, 2));
    late.send(&dhcp(&late, 1, &[], false));
    assert!(answer(&late).is_none(), "not admitted");

    // Hostile questions: none is answered to another, and none harms the responder.
    let whole = dhcp(&guest, 1, &[12, 3, 1, 2, 3], false);
    let mut forged = whole.clone();
    forged[42 + 28..42 + 34].copy_from_slice(&other.member.mac.0);
    guest.send(&forged);
    for cut in 14..whole.len() {
        guest.send(&whole[..cut]);
        let mut broken = whole.clone();
        broken[cut] = broken[cut].wrapping_mul(7).wrapping_add(101);
        guest.send(&broken);
        if cut % 20 == 0 {
            std::thread::sleep(Duration::from_millis(100));
        }
    }
    for length in [0, 1, 7, 239, 255] {
        guest.send(&dhcp(&guest, 1, &[12, length], false));
    }
    for _ in 0..5000 {
        guest.send(&whole);
    }
    assert!(guest.drain().len() < 100);
    assert_eq!(other.drain(), Vec::<Vec<u8>>::new());
    std::thread::sleep(Duration::from_millis(1100));
    other.send(&dhcp(&other, 1, &[], false));
    assert!(answer(&other).is_some());
    guest.send(&dhcp(&guest, 1, &[], false));
    assert!(answer(&guest).is_some());

    // It ends with the network.
    drop(network);
    let gone = (0..40).any(|_| {
        std::thread::sleep(Duration::from_millis(50));
        !within(&host.family_path("fam"), || sh("ip -o link show")).contains("dhcp0")
    });
    assert!(gone);
}

/// All that a family's namespace holds but counters.
fn state(host: &Host, name: &str) -> String {
    within(&host.family_path(name), || {
        sh("ip -o link show | grep -v '^1:' | sed 's/^[0-9]*: //; s/<[^>]*>//; s/ state [A-Z]*//'; bridge fdb show | grep -v permanent || true; ip neigh show nud permanent | sort
            nft -s list table bridge ramet; nft -s list table inet ramet")
    })
}

#[test]
fn nothing_remains_of_a_hundred_clones() {
    let fabric = Fabric::new();
    let host = Host::new(&fabric, 1);
    let network = host.family("fam", VNI, Egress::Nat);
    let before = state(&host, "fam");
    for round in 0..100 {
        let guest = host.guest(&network, &format!("tap{round}"), 2 + round);
        assert_eq!(network.admitted().len(), 1);
        if round % 2 == 0 {
            network.expel(&guest.tap, guest.member).unwrap();
            drop(guest);
        } else {
            let (tap, member) = (guest.tap.clone(), guest.member);
            drop(guest);
            network.expel(&tap, member).unwrap();
        }
    }
    // A program that another test starts holds our descriptors for a moment.
    for _ in 0..40 {
        if state(&host, "fam") == before {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(state(&host, "fam"), before);
    assert_eq!(network.admitted(), vec![]);

    // A tap that went without being expelled leaves nothing to the next of its name.
    let old = host.guest(&network, "tap0", 2);
    let other = host.guest(&network, "tap1", 3);
    let member = old.member;
    drop(old);
    let tap = (0..40).find_map(|_| {
        std::thread::sleep(Duration::from_millis(50));
        network.open_tap("tap0").ok()
    });
    let next = Guest::new(tap.unwrap(), member);
    assert!(!next.reaches(&other, b"with what the former had"));
    network.admit("tap0", member).unwrap();
    assert!(next.reaches(&other, b"as its own"));
}

#[test]
fn ensure_and_remove_may_be_said_twice_and_leave_nothing() {
    let fabric = Fabric::new();
    let host = Host::new(&fabric, 1);
    let links =
        || host.place.sh("ip -o link show | cut -d: -f2 | cut -d@ -f1; nft -s list ruleset; ip -4 -o addr show");
    let before = links();
    host.net.remove("fam").unwrap();
    let network = host.family("fam", VNI, Egress::Nat);
    let guest = host.guest(&network, "tap0", 2);
    let other = host.guest(&network, "tap1", 3);
    let inside = state(&host, "fam");
    assert!(inside.contains("100.64.64.2 dev br0 lladdr 02:52:64:40:40:02 PERMANENT"), "{inside}");
    let again = host.family("fam", VNI, Egress::Nat);
    assert_eq!(state(&host, "fam"), inside);
    assert_eq!(again.admitted(), network.admitted());
    assert!(guest.reaches(&other, b"still"));
    assert_eq!(host.net.names().unwrap(), ["fam"]);
    network.publish(Proto::Tcp, 8080, guest.member.ip, 80).unwrap();
    network.serve_dhcp(DhcpOptions::default()).unwrap();
    host.net.remove("fam").unwrap();
    host.net.remove("fam").unwrap();
    assert!(matches!(network.open_tap("tap9"), Err(Error::Gone { .. })));
    assert_eq!(host.net.names().unwrap(), Vec::<String>::new());
    assert_eq!(links(), before);
    drop((guest, other));

    // Half-made ones.
    let path = host.family_path("half");
    std::fs::write(&path, "").unwrap();
    host.place.sh("ip link add rmt-half type dummy || ip link add rmt-half type veth peer name x");
    assert_eq!(host.net.names().unwrap(), ["half"]);
    let network = host.family("half", VNI, Egress::Nat);
    let guest = host.guest(&network, "tap0", 2);
    assert_eq!(guest.arp(host.net.plan().gateway().ip), Some(host.net.plan().gateway().mac));
    drop((guest, network));
    within(&path, || sh("ip link del vx0; ip link del br0"));
    let network = host.family("half", VNI, Egress::Nat);
    drop(network);
    host.net.remove("half").unwrap();
    std::fs::write(&path, "").unwrap();
    host.net.remove("half").unwrap();
    assert!(!std::path::Path::new(&path).exists());
    assert_eq!(links(), before);

    for name in ["", "toolongna", "UP", "a/b", "..", "a b", "a\"b"] {
        assert!(host.net.ensure(&spec(name, VNI, Egress::None)).is_err());
        assert!(host.net.remove(name).is_err());
    }
    assert!(host.net.ensure(&spec("fam", 1 << 24, Egress::None)).is_err());
    assert_eq!(links(), before);
    host.net.clone().close().unwrap();
    assert!(!host.place.sh("nft list tables").contains("ramet"));
}

#[test]
fn a_daemon_that_starts_again_adopts_what_is_there() {
    let pair = Pair::new();
    let Pair { fabric, mut a, b } = pair;
    let network = a.family("fam", VNI, Egress::Nat);
    let far_network = b.family("fam", VNI, Egress::None);
    let (guest, other) = (a.guest(&network, "tap0", 2), a.guest(&network, "tap1", 3));
    let far = b.guest(&far_network, "tap0", 2);
    network.set_remote(&[(far.member, b.address)]).unwrap();
    far_network.set_remote(&[(guest.member, a.address)]).unwrap();
    network.publish(Proto::Udp, 8080, guest.member.ip, 80).unwrap();
    network.serve_dhcp(DhcpOptions::default()).unwrap();
    let admitted = network.admitted();
    drop(network);

    // QEMU lives on, and holds its taps.
    a.open_again();
    assert!(guest.reaches(&other, b"meanwhile") && guest.reaches(&far, b"over the tunnel meanwhile"));
    assert_eq!(a.net.names().unwrap(), ["fam"]);
    let network = a.family("fam", VNI, Egress::Nat);
    assert_eq!(network.admitted(), admitted);
    assert_eq!(guest.arp(other.member.ip), Some(other.member.mac));
    assert!(guest.reaches(&other, b"again") && guest.reaches(&far, b"over the tunnel"));
    assert!(far.reaches(&guest, b"peers were adopted"));
    network.publish(Proto::Udp, 8080, guest.member.ip, 80).unwrap();
    network.serve_dhcp(DhcpOptions::default()).unwrap();
    let client = fabric.place("client", 50);
    client.run(|| UdpSocket::bind("0.0.0.0:0").unwrap().send_to(b"published", (a.address, 8080)).unwrap());
    assert!(guest.find(WAIT, |frame| frame.ends_with(b"published")).is_some());
    assert_eq!(guest.arp(far.member.ip), Some(far.member.mac));
    network.set_remote(&[(far.member, b.address)]).unwrap();
    assert!(guest.reaches(&far, b"known again"));
    network.set_remote(&[]).unwrap();
    assert!(!guest.reaches(&far, b"no more"));
    network.expel("tap1", other.member).unwrap();
    assert!(!guest.reaches(&other, b"no more"));
    drop((guest, other));
}

#[test]
fn two_daemons_share_a_host_and_one_needs_no_tunnel() {
    let fabric = Fabric::new();
    let host = Host::new(&fabric, 1);
    let directory = tempfile::tempdir().unwrap();
    let mut lone = options(&directory.path().join("a directory"), 1);
    lone.tag = "u".to_owned();
    lone.tunnel = None;
    let second = host.place.run(|| HostNet::open(lone).unwrap());
    let network = host.family("fam", VNI, Egress::Nat);
    let alone = second.ensure(&spec("fam", VNI, Egress::Nat)).unwrap();
    let here = host.guest(&network, "tap0", 2);
    let (there, beside) = (host.guest(&alone, "tap0", 2), host.guest(&alone, "tap1", 3));
    let gateway = host.net.plan().gateway();
    // At once: a bridge that only now has its first port would not answer.
    assert_eq!(there.arp(gateway.ip), Some(gateway.mac));
    assert!(there.reaches(&beside, b"of one family"));
    assert!(matches!(alone.set_remote(&[(here.member, host.address)]), Err(Error::BadValue { .. })));
    alone.set_remote(&[]).unwrap();

    // Both have a way out, and none into the other, published ports included.
    alone.publish(Proto::Udp, 8080, beside.member.ip, 80).unwrap();
    assert!(matches!(network.publish(Proto::Udp, 8080, here.member.ip, 80), Err(Error::PortTaken { .. })));
    let internet = fabric.place("internet", 100);
    let socket = internet.run(|| UdpSocket::bind("0.0.0.0:9").unwrap());
    socket.set_read_timeout(Some(WAIT)).unwrap();
    for guest in [&here, &there] {
        guest.send(&udp(gateway.mac, guest.member, INTERNET, 4, 9, b"out"));
        assert_eq!(datagram(&socket).unwrap().0, b"out");
    }
    let up = within(directory.path().join("a directory/net/fam").to_str().unwrap(), || {
        sh("ip -4 -o addr show dev up0 | awk '{print $4}' | cut -d/ -f1")
    });
    for to in [up.trim().parse().unwrap(), host.address] {
        here.send(&udp(gateway.mac, here.member, to, 7, 8080, b"to another family"));
    }
    assert_eq!(beside.drain(), Vec::<Vec<u8>>::new());
    internet.run(|| UdpSocket::bind("0.0.0.0:0").unwrap().send_to(b"published", (host.address, 8080)).unwrap());
    assert!(beside.find(WAIT, |frame| frame.ends_with(b"published")).is_some());

    assert_eq!(host.net.names().unwrap(), ["fam"]);
    second.remove("fam").unwrap();
    assert_eq!(host.net.names().unwrap(), ["fam"]);
    assert_eq!(second.names().unwrap(), Vec::<String>::new());
    second.close().unwrap();
}
