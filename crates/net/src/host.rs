//! What all networks of a host share.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::io;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, Weak};

use serde_json::Value;

use crate::network::{Inner, locked};
use crate::rules::{self, Published};
use crate::secure::Engine;
use crate::space::{IP, NFT, Space, ip_batch, nft, sysctl};
use crate::{AddressPlan, Egress, Error, Network, NetworkSpec, Proto, Result, SecureOptions, SecurePeer};

/// How a host takes part.
#[derive(Clone, Debug)]
pub struct HostNetOptions {
    /// The daemon's directory: namespaces are mounted at `state_dir/net/NAME`.
    pub state_dir: PathBuf,
    /// One to four characters, different for each daemon in this namespace; part of the names of devices.
    pub tag: String,
    /// The tunnel to other hosts; without one every network stays on this host.
    pub tunnel: Option<TunnelOptions>,
    /// Encrypts the tunnel. Its `local` is then [`crate::secure_address`] of this host's number, and so are the addresses
    /// of hosts that [`Network::set_remote`] is told.
    pub secure: Option<SecureOptions>,
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
    inner: Arc<HostInner>,
}

/// What the networks need of their host.
#[derive(Debug)]
pub(crate) struct HostInner {
    pub(crate) options: HostNetOptions,
    pub(crate) space: Space,
    networks: Mutex<HashMap<String, Weak<Inner>>>,
    /// Ports of this host that are forwarded, and for whom.
    pub(crate) ports: Mutex<HashMap<(Proto, u16), Port>>,
    /// Encrypts the tunnel, while there is a network.
    engine: Mutex<Option<Engine>>,
    secure_peers: Mutex<Vec<SecurePeer>>,
    /// Held while a network is made or removed.
    work: Mutex<()>,
}

/// A forwarded port.
#[derive(Debug)]
pub(crate) struct Port {
    pub(crate) family: String,
    pub(crate) published: Published,
    /// Keeps other programs off it. Never served: packets are translated before they reach it.
    pub(crate) socket: Arc<Held>,
}

/// A socket that holds a port.
#[derive(Debug)]
#[expect(dead_code, reason = "held for their ports")]
pub(crate) enum Held {
    Tcp(TcpListener),
    Udp(UdpSocket),
}

impl HostInner {
    /// Takes a port of the host.
    pub(crate) fn hold(&self, proto: Proto, port: u16) -> Result<Held> {
        self.space.run(|| {
            let held = match proto {
                Proto::Tcp => TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).map(Held::Tcp),
                Proto::Udp => UdpSocket::bind((Ipv4Addr::UNSPECIFIED, port)).map(Held::Udp),
            };
            held.map_err(|source| match source.kind() {
                io::ErrorKind::AddrInUse => Error::PortTaken { port, by: None },
                _ => Error::kernel(format!("take port {port} of this host"), source),
            })
        })
    }

    /// What is published for one family.
    pub(crate) fn published(&self, family: &str) -> Vec<Published> {
        let ports = locked(&self.ports);
        let mut list: Vec<_> = ports.values().filter(|port| port.family == family).map(|port| port.published).collect();
        list.sort_by_key(|published| (published.proto, published.host_port));
        list
    }

    pub(crate) fn table(&self) -> String {
        rules::host_table(&self.options.tag)
    }

    fn directory(&self) -> PathBuf {
        self.options.state_dir.join("net")
    }
}

/// Lets the calling thread's namespace forward packets.
pub(crate) fn forward() -> Result<()> {
    sysctl("net/ipv4/ip_forward", "1", false)
}

/// Whether a name consists of what names may.
pub(crate) fn check_name(what: &'static str, name: &str, max: usize, reserved: &[&str]) -> Result<()> {
    let fine = (1..=max).contains(&name.len())
        && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-')
        && !reserved.contains(&name);
    if fine { Ok(()) } else { Err(Error::BadName { what, name: name.to_owned(), max }) }
}

/// The devices of the calling thread's namespace, as `ip -json` tells them.
pub(crate) fn devices(arguments: &[&str]) -> Result<Vec<Value>> {
    let text = IP.run("list devices", arguments, "")?;
    // No device at all is no output at all.
    if text.trim().is_empty() {
        return Ok(Vec::new());
    }
    serde_json::from_str(&text).map_err(|error| Error::Command {
        what: "list devices".to_owned(),
        program: "ip",
        output: format!("no JSON: {error}"),
    })
}

/// The device of a name, out of [`devices`].
pub(crate) fn device<'a>(devices: &'a [Value], name: &str) -> Option<&'a Value> {
    devices.iter().find(|device| device["ifname"] == name)
}

/// The elements of a set or map, as `nft -json` tells them; none when there is no such table.
pub(crate) fn set_elements(family: &str, table: &str, set: &str) -> Result<Vec<Value>> {
    let text = match NFT.run("read a set", &["-j", "list", "set", family, table, set], "") {
        Ok(text) => text,
        Err(Error::Command { .. }) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let value: Value = serde_json::from_str(&text).unwrap_or_default();
    let lists = value["nftables"].as_array().cloned().unwrap_or_default();
    Ok(lists.iter().filter_map(|entry| entry["set"]["elem"].as_array()).flatten().cloned().collect())
}

impl HostNet {
    /// Takes charge of the namespace that the calling thread is in, the host's.
    ///
    /// Installs the table `inet ramet-TAG`: it guards the tunnel's port, keeps families from one another and from the
    /// host's own ports, translates addresses for families with a way out, and forwards published ports. Opened again
    /// after a crash, it adopts peers and networks. Ports must be published again: their sockets died with the daemon.
    ///
    /// A tunnel packet must come in by the interface through which this host would answer its sender, so peers that are
    /// reached by one way and answer by another do not work.
    ///
    /// # Errors
    /// When `nft` is missing or refused, or the tag is none.
    pub fn open(options: HostNetOptions) -> Result<Self> {
        check_name("a tag", &options.tag, 4, &[])?;
        let space = Space::current()?;
        let table = rules::host_table(&options.tag);
        space.run(|| {
            let peers = set_elements("inet", &table, "peers")?;
            let peers: Vec<_> = peers.iter().filter_map(|peer| peer.as_str()?.parse().ok()).collect();
            let fabric = options.secure.as_ref().map(|secure| secure.fabric);
            nft("install the host's rules", &rules::host(&options.tag, options.plan, options.tunnel, fabric, &peers))
        })?;
        let inner = HostInner {
            options,
            space,
            networks: Mutex::default(),
            ports: Mutex::default(),
            engine: Mutex::default(),
            secure_peers: Mutex::default(),
            work: Mutex::default(),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Which member has which addresses.
    pub fn plan(&self) -> AddressPlan {
        self.inner.options.plan
    }

    /// The tunnel to other hosts.
    pub fn tunnel(&self) -> Option<TunnelOptions> {
        self.inner.options.tunnel
    }

    /// The hosts whose tunnel packets are let in; all others' are dropped. Replaces what was set before.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn set_peers(&self, peers: &[Ipv4Addr]) -> Result<()> {
        let table = self.inner.table();
        let mut script = format!("flush set inet {table} peers\n");
        if !peers.is_empty() {
            let peers: BTreeSet<_> = peers.iter().map(Ipv4Addr::to_string).collect();
            let peers = peers.into_iter().collect::<Vec<_>>().join(", ");
            script += &format!("add element inet {table} peers {{ {peers} }}\n");
        }
        self.inner.space.run(|| nft("set the peers of the tunnel", &script))
    }

    /// The hosts that encrypted tunnels lead to, in place of those before. Without [`HostNetOptions::secure`] none do.
    /// [`HostNet::set_peers`] is to have their addresses too.
    ///
    /// # Errors
    /// When what encrypts has ended, as it does when somebody deletes its device, and can't be started again.
    pub fn set_secure_peers(&self, peers: &[SecurePeer]) -> Result<()> {
        *locked(&self.inner.secure_peers) = peers.to_vec();
        match &*locked(&self.inner.engine) {
            Some(engine) if engine.alive() => engine.set_peers(peers),
            Some(_) => {}
            None => return Ok(()),
        }
        self.encrypt()
    }

    /// Encrypts, if this host is to and does not yet.
    fn encrypt(&self) -> Result<()> {
        let (Some(secure), Some(tunnel)) = (&self.inner.options.secure, self.inner.options.tunnel) else {
            return Ok(());
        };
        let mut engine = locked(&self.inner.engine);
        if engine.as_ref().is_some_and(Engine::alive) {
            return Ok(());
        }
        // What is left of one has the socket.
        engine.take();
        let started = Engine::start(&self.inner.space, &self.inner.options.tag, secure, tunnel.local)?;
        started.set_peers(&locked(&self.inner.secure_peers));
        *engine = Some(started);
        Ok(())
    }

    /// Makes a family's network on this host, or adopts the one of that name, or returns the one already open with the
    /// spec applied anew.
    ///
    /// Sets `net.ipv4.ip_forward` of the host if the family may reach out. Takes about 100 ms.
    ///
    /// Connections that members have open stay so when the spec takes their way out away.
    ///
    /// # Errors
    /// When a name or number is out of range, a program is missing, or the kernel refuses. What was made until then stays
    /// for the next attempt, or for [`HostNet::remove`].
    pub fn ensure(&self, spec: &NetworkSpec) -> Result<Network> {
        let _work = locked(&self.inner.work);
        let open = locked(&self.inner.networks).get(&spec.name).and_then(Weak::upgrade);
        let directory = self.inner.directory();
        fs::create_dir_all(&directory)
            .map_err(|source| Error::kernel(format!("make the directory {}", directory.display()), source))?;
        if spec.egress != Egress::None {
            self.inner.space.run(forward)?;
        }
        self.encrypt()?;
        let network = Inner::make(&self.inner, spec, &directory.join(&spec.name), open)?;
        locked(&self.inner.networks).insert(spec.name.clone(), Arc::downgrade(&network));
        Ok(Network::new(network))
    }

    /// The names of the networks on this host, also of half-made ones.
    ///
    /// # Errors
    /// When the directory cannot be read, or devices cannot be listed.
    pub fn names(&self) -> Result<Vec<String>> {
        let directory = self.inner.directory();
        let failed = |source| Error::kernel(format!("read the directory {}", directory.display()), source);
        let mut names = BTreeSet::new();
        match fs::read_dir(&directory) {
            Ok(entries) => {
                for entry in entries {
                    names.extend(entry.map_err(failed)?.file_name().into_string().ok());
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(failed(error)),
        }
        let prefix = rules::veth_prefix(&self.inner.options.tag);
        for device in self.inner.space.run(|| devices(&["-j", "link", "show"]))? {
            names.extend(device["ifname"].as_str().and_then(|name| name.strip_prefix(&prefix)).map(str::to_owned));
        }
        names.retain(|name| check_name("a network", name, 8, &[]).is_ok());
        Ok(names.into_iter().collect())
    }

    /// Removes everything of one network, also of a half-made one. No error when there is none.
    ///
    /// Taps whose QEMU still lives lose their network. A [`Network`] still held answers [`crate::Error::Gone`].
    ///
    /// # Errors
    /// When something is there that cannot be removed.
    pub fn remove(&self, name: &str) -> Result<()> {
        check_name("a network", name, 8, &[])?;
        let _work = locked(&self.inner.work);
        let open = locked(&self.inner.networks).remove(name).and_then(|network| network.upgrade());
        if let Some(network) = open {
            network.end();
        }
        if locked(&self.inner.networks).is_empty() {
            locked(&self.inner.engine).take();
        }
        let ports = self.inner.published(name);
        let table = self.inner.table();
        for published in ports {
            // The link's address does not matter for a key.
            let (key, _) = published.outer(Ipv4Addr::UNSPECIFIED);
            self.inner.space.run(|| nft("unpublish a port", &rules::replace_element(&table, Some(&key), None)))?;
            locked(&self.inner.ports).remove(&(published.proto, published.host_port));
        }
        let path = self.inner.directory().join(name);
        if let Some(space) = Space::mounted(&path)? {
            space.run(|| delete_devices(&[rules::TUNNEL, rules::BRIDGE, rules::UPLINK]))?;
        }
        let tag = &self.inner.options.tag;
        let veth = format!("{}{name}", rules::veth_prefix(tag));
        let tunnel = format!("{}{name}", rules::tunnel_prefix(tag));
        self.inner.space.run(|| delete_devices(&[&veth, &tunnel]))?;
        Space::unmount(&path)
    }

    /// Removes the host's table, and frees published ports. Networks stay; remove them before.
    ///
    /// # Errors
    /// When the kernel refuses.
    pub fn close(self) -> Result<()> {
        let table = self.inner.table();
        locked(&self.inner.ports).clear();
        locked(&self.inner.engine).take();
        self.inner
            .space
            .run(|| nft("remove the host's rules", &format!("table inet {table} {{ }}\ndelete table inet {table}\n")))
    }
}

/// Deletes those devices of the calling thread's namespace that are there.
pub(crate) fn delete_devices(names: &[&str]) -> Result<()> {
    let there = devices(&["-j", "link", "show"])?;
    let lines: Vec<_> = names
        .iter()
        .filter(|name| device(&there, name).is_some())
        .map(|name| format!("link delete dev {name}"))
        .collect();
    if lines.is_empty() { Ok(()) } else { ip_batch("delete devices", &lines) }
}
