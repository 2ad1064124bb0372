//! One family's network on this host.

use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};

use crate::{Member, Result, Subnet};

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
/// Dropping it removes nothing from the kernel: [`crate::HostNet::remove`] does.
#[derive(Clone, Debug)]
pub struct Network {
    name: String,
}

impl Network {
    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Makes a tap (a name of at most 11 characters) on the bridge, up, through which nothing passes yet.
    ///
    /// Elements that a former tap of this name left in the filter are removed first.
    ///
    /// # Errors
    /// When the name is taken or none, or the kernel refuses.
    pub fn open_tap(&self, _name: &str) -> Result<Tap> {
        Err(crate::Error::Gone { name: self.name.clone() })
    }

    /// Lets `member`, and nobody else, speak through `tap`. Another member admitted there before is expelled.
    ///
    /// # Errors
    /// When there is no such tap, or the member is admitted at another one, or the kernel refuses.
    pub fn admit(&self, _tap: &str, _member: Member) -> Result<()> {
        Ok(())
    }

    /// Takes back what [`Network::admit`] gave. No error when it is gone, or the tap is.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn expel(&self, _tap: &str, _member: Member) -> Result<()> {
        Ok(())
    }

    /// Who is admitted at which tap, also from before the daemon's crash. The taps may be gone.
    pub fn admitted(&self) -> Vec<(String, Member)> {
        Vec::new()
    }

    /// The members on other hosts, each with its host's address in the tunnel. Replaces what was set before.
    ///
    /// # Errors
    /// When the host has no tunnel, or the kernel refuses.
    pub fn set_remote(&self, _members: &[(Member, Ipv4Addr)]) -> Result<()> {
        Ok(())
    }

    /// Forwards a port of this host to a member's.
    ///
    /// Holds a socket on the host's port, so that no other program takes it. The member sees the asking address, or the
    /// host's end of the family's veth when that would be one that it cannot answer.
    ///
    /// # Errors
    /// [`crate::Error::PortTaken`] when another program or family has the port.
    pub fn publish(&self, _proto: Proto, _host_port: u16, _member: Ipv4Addr, _port: u16) -> Result<()> {
        Ok(())
    }

    /// Ends the forwarding of a port. No error when there is none.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn unpublish(&self, _proto: Proto, _host_port: u16) -> Result<()> {
        Ok(())
    }

    /// Answers DHCP for admitted members, each with its own address, for guests without our agent.
    ///
    /// The responder is a thread of this process. Called again, it takes the new options.
    ///
    /// # Errors
    /// When its device or thread cannot be made.
    pub fn serve_dhcp(&self, _options: DhcpOptions) -> Result<()> {
        Ok(())
    }

    /// Addresses that guests were given by DHCP.
    pub fn leases(&self) -> Vec<Lease> {
        Vec::new()
    }

    /// Counts of dropped frames.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn counters(&self) -> Result<Counters> {
        Ok(Counters::default())
    }
}
