//! Addresses: MAC addresses, members, and the plan that gives each member of a family its addresses.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::Error;

/// An Ethernet address.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MacAddr(pub [u8; 6]);

impl MacAddr {
    /// The address of all stations.
    pub const BROADCAST: Self = Self([0xff; 6]);

    /// Whether this is one station's address, so neither a group's nor all zeros.
    pub fn is_unicast(&self) -> bool {
        self.0[0] & 1 == 0 && self.0 != [0; 6]
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for MacAddr {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = || Error::BadAddress { what: "a MAC address such as 02:52:64:40:00:02", text: text.to_owned() };
        let mut bytes = [0u8; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(bad)?;
            if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(bad());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| bad())?;
        }
        if parts.next().is_some() { Err(bad()) } else { Ok(Self(bytes)) }
    }
}

impl Serialize for MacAddr {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for MacAddr {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// One VM's place in its family's network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Member {
    /// Its Ethernet address.
    pub mac: MacAddr,
    /// Its IPv4 address.
    pub ip: Ipv4Addr,
}

impl fmt::Display for Member {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at {}", self.ip, self.mac)
    }
}

/// An IPv4 network, such as `10.0.0.0/8`. Its host bits are zero.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Subnet {
    base: Ipv4Addr,
    prefix: u8,
}

impl Subnet {
    /// A network.
    ///
    /// # Errors
    /// [`Error::BadAddress`] if the prefix is longer than 32 or a host bit is set.
    pub fn new(base: Ipv4Addr, prefix: u8) -> Result<Self, Error> {
        let subnet = Self { base, prefix };
        if prefix > 32 || base.to_bits() & !subnet.mask_bits() != 0 {
            return Err(Error::BadAddress { what: "a network such as 10.0.0.0/8", text: format!("{base}/{prefix}") });
        }
        Ok(subnet)
    }

    /// Its first address.
    pub fn base(&self) -> Ipv4Addr {
        self.base
    }

    /// The number of leading bits that all its addresses share.
    pub fn prefix(&self) -> u8 {
        self.prefix
    }

    /// Its netmask.
    pub fn netmask(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.mask_bits())
    }

    /// Its last address.
    pub fn broadcast(&self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.base.to_bits() | !self.mask_bits())
    }

    /// Whether `ip` lies in it.
    pub fn contains(&self, ip: Ipv4Addr) -> bool {
        ip.to_bits() & self.mask_bits() == self.base.to_bits()
    }

    fn mask_bits(&self) -> u32 {
        u32::MAX.checked_shl(32 - u32::from(self.prefix.min(32))).unwrap_or(0)
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, self.prefix)
    }
}

impl fmt::Debug for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Subnet {
    type Err = Error;

    /// Reads `10.0.0.0/8`; a lone address is a network of one.
    fn from_str(text: &str) -> Result<Self, Error> {
        let bad = || Error::BadAddress { what: "a network such as 10.0.0.0/8", text: text.to_owned() };
        let (base, prefix) = match text.split_once('/') {
            Some((base, prefix)) => (base, prefix.parse().map_err(|_| bad())?),
            None => (text, 32),
        };
        Self::new(base.parse().map_err(|_| bad())?, prefix)
    }
}

impl Serialize for Subnet {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Subnet {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

/// Which member of a family has which addresses. Pure: hosts need not talk to agree.
///
/// An address is `network | host (8 bits) | index (14 bits)`. Every family uses the same addresses; families cannot reach
/// one another, so they need not differ.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AddressPlan {
    network: Subnet,
}

/// Bits of an address that number the host.
const HOST_BITS: u32 = 8;
/// Bits of an address that number the member on its host.
const INDEX_BITS: u32 = 14;
/// The first two bytes of every member's MAC address: locally administered, one station.
const MAC_HEAD: [u8; 2] = [0x02, 0x52];

impl Default for AddressPlan {
    /// `100.64.0.0/10`, the range for carriers' own use, which private networks seldom use.
    fn default() -> Self {
        Self { network: Subnet { base: Ipv4Addr::new(100, 64, 0, 0), prefix: 10 } }
    }
}

impl AddressPlan {
    /// Members per host with an address: indices 2 up to and without this one.
    pub const LAST_INDEX: u16 = (1 << INDEX_BITS) - 1;

    /// A plan within `network`, which must have room for 22 bits: its prefix is 10 or shorter.
    ///
    /// # Errors
    /// [`Error::BadAddress`] if it is smaller, or if its addresses are none that a host could have.
    pub fn new(network: Subnet) -> Result<Self, Error> {
        let first = network.base().octets()[0];
        if u32::from(network.prefix()) > 32 - HOST_BITS - INDEX_BITS
            || network.prefix() == 0
            || first == 0
            || first == 127
            || first >= 224
        {
            return Err(Error::BadAddress {
                what: "a unicast network of at least 22 bits, such as 100.64.0.0/10",
                text: network.to_string(),
            });
        }
        Ok(Self { network })
    }

    /// The network of every family.
    pub fn network(&self) -> Subnet {
        self.network
    }

    /// The length of the network's prefix, for a member's own configuration.
    pub fn prefix(&self) -> u8 {
        self.network.prefix()
    }

    /// The network's mask, for a member's own configuration.
    pub fn netmask(&self) -> Ipv4Addr {
        self.network.netmask()
    }

    /// The `index`th member on host number `host`; `None` for the indices 0, 1 and the last, which are reserved.
    pub fn member(&self, host: u8, index: u16) -> Option<Member> {
        if !(2..Self::LAST_INDEX).contains(&index) {
            return None;
        }
        let bits = self.network.base().to_bits() | (u32::from(host) << INDEX_BITS) | u32::from(index);
        let ip = Ipv4Addr::from_bits(bits);
        Some(Member { mac: Self::mac(ip), ip })
    }

    /// The gateway: the same addresses in every family and on every host.
    pub fn gateway(&self) -> Member {
        Member {
            mac: MacAddr([MAC_HEAD[0], MAC_HEAD[1], 0, 0, 0, 1]),
            ip: Ipv4Addr::from_bits(self.network.base().to_bits() | 1),
        }
    }

    fn mac(ip: Ipv4Addr) -> MacAddr {
        let [a, b, c, d] = ip.octets();
        MacAddr([MAC_HEAD[0], MAC_HEAD[1], a, b, c, d])
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn every_member_of_three_hosts_differs() {
        let plan = AddressPlan::default();
        let (mut ips, mut macs) = (HashSet::new(), HashSet::new());
        for host in [0, 1, 255] {
            for index in 0..=u16::MAX {
                if let Some(member) = plan.member(host, index) {
                    assert!(ips.insert(member.ip) && macs.insert(member.mac));
                }
            }
        }
        assert_eq!(ips.len(), 3 * (16384 - 3));
        assert!(!ips.contains(&plan.gateway().ip) && !macs.contains(&plan.gateway().mac));
        assert_eq!(plan.gateway().ip, Ipv4Addr::new(100, 64, 0, 1));
        assert_eq!(plan.gateway().mac.to_string(), "02:52:00:00:00:01");
        assert_eq!(plan.netmask(), Ipv4Addr::new(255, 192, 0, 0));
    }

    fn any_plan() -> impl Strategy<Value = AddressPlan> {
        (any::<u32>(), 1u8..=10).prop_filter_map("unicast", |(bits, prefix)| {
            let base = Ipv4Addr::from_bits(bits & (u32::MAX << (32 - u32::from(prefix))));
            AddressPlan::new(Subnet::new(base, prefix).ok()?).ok()
        })
    }

    proptest! {
        #[test]
        fn members_lie_in_the_network_and_differ(
            plan in any_plan(), a in any::<(u8, u16)>(), b in any::<(u8, u16)>(),
        ) {
            let (Some(x), Some(y)) = (plan.member(a.0, a.1), plan.member(b.0, b.1)) else { return Ok(()) };
            for member in [x, y] {
                prop_assert!(plan.network().contains(member.ip));
                prop_assert!(member.ip != plan.gateway().ip && member.ip != plan.network().broadcast());
                prop_assert!(member.ip != plan.network().base());
                prop_assert!(member.mac != plan.gateway().mac && member.mac.is_unicast());
            }
            prop_assert_eq!(a == b, x.ip == y.ip);
            prop_assert_eq!(a == b, x.mac == y.mac);
        }

        #[test]
        fn text_of_a_mac_reads_back(bytes in any::<[u8; 6]>()) {
            let mac = MacAddr(bytes);
            prop_assert_eq!(mac.to_string().parse::<MacAddr>().unwrap(), mac);
            let json = serde_json::to_string(&mac).unwrap();
            prop_assert_eq!(serde_json::from_str::<MacAddr>(&json).unwrap(), mac);
        }

        #[test]
        fn no_text_breaks_the_parsers(text in ".{0,24}") {
            let _ = text.parse::<MacAddr>();
            let _ = text.parse::<Subnet>();
        }
    }
}
