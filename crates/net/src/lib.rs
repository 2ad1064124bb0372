//! A private Ethernet network for each family of VMs, over all hosts.
//!
//! On each host a family's network is one Linux network namespace with a bridge, a VXLAN device to the other hosts, one tap
//! for each VM, a filter, and a gateway whose way out is a veth pair to the host's namespace.
//!
//! ```text
//! host's namespace                          the family's namespace
//!   uplink <- udp/4789 -> (VXLAN socket) ...... vx0 --+-- br0 (gateway address)
//!   rmTAG-NAME (veth) ------------------------- up0 <-' routed  |-- tap of a VM --> fd, handed to its QEMU
//!   table inet ramet-TAG: NAT, isolation                        |-- dhcp0 --> fd, read by this process
//! ```
//!
//! A tap passes nothing until [`Network::admit`] says whose it is. From then on, it may speak with exactly that MAC and IPv4
//! address. Broadcasts are never flooded: the bridge answers ARP for the members that it knows. IPv6 is dropped
//! altogether in this version.
//!
//! All calls block; call them from a thread that may wait, and never from a thread of an async runtime. Work for one clone
//! ([`Network::open_tap`], [`Network::admit`], [`Network::expel`], [`Network::set_remote`]) starts no process. Work for one family starts `ip`, `tc`
//! and `nft`.
//!
//! VXLAN has no authentication: a peer is whoever sends from a peer's address. On an untrusted fabric it goes through
//! WireGuard ([`SecureOptions`]), which this process speaks itself; a peer is then whoever has its key.
#![warn(missing_docs)]

mod addr;
mod dhcp;
mod error;
mod host;
mod netlink;
mod network;
mod probe;
mod rules;
mod secure;
mod space;
mod sys;

pub use addr::{AddressPlan, MacAddr, Member, Subnet};
pub use error::{Error, Result};
pub use host::{HostNet, HostNetOptions, TunnelOptions};
pub use network::{Counters, DhcpOptions, Egress, Lease, Network, NetworkSpec, Proto, Tap};
pub use probe::{Trial, try_out};
pub use secure::{SECURE_PORT, SecureOptions, SecurePeer, TunnelKey, TunnelSecret, secure_address};
