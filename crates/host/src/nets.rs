//! Families' private networks: members and their addresses, taps, what other hosts are told.
//!
//! A family has one network over all its hosts ([`ramet_net`]). Every member has a [`MemberNumber`], out of which its
//! addresses follow; the host that makes a clone gives it one out of its own range, so hosts need not ask each other. Each
//! host tells all others that have the family who its own members are, always all of them.

use std::{
    collections::{BTreeMap, HashMap},
    net::{IpAddr, Ipv4Addr},
    sync::{Arc, Mutex},
    time::Duration,
};

use ramet_client::api::{self, ErrorCode, MemberNumber, PeerMembers, PeerNetwork, Protocol, PublishedPort};
use ramet_memory::FamilyId;
use ramet_net::{
    AddressPlan, DhcpOptions, Egress, HostNet, HostNetOptions, Member, Network, NetworkSpec, Proto, SecureOptions,
    Subnet, Tap, TunnelOptions, TunnelSecret, secure_address,
};
use ramet_vmm::{Nic, VmProcess};

use crate::{
    config::Config,
    daemon::{Daemon, all},
    error::{ApiError, ApiResult},
    names::shown,
    peers::ask,
    state::{FamilyNetwork, Joined, NamedNetwork, Publish, State, VmNic, VmRecord},
    stats::lock,
};

/// Bytes of the largest packet of a member: those of the fabric less what the tunnel adds.
pub(crate) const MTU: u16 = 1450;
/// Length of the prefix of a named network's addresses: those of one range.
pub(crate) const NAMED_PREFIX: u8 = 18;
/// How long another host may take to take note of members.
const TELL: Duration = Duration::from_secs(3);

/// What the daemon keeps about networks.
pub(crate) struct Nets {
    plan: AddressPlan,
    /// This host's key, when its tunnels are encrypted.
    secret: Option<TunnelSecret>,
    host: tokio::sync::OnceCell<HostNet>,
    families: Mutex<HashMap<FamilyId, Arc<FamilyNet>>>,
    /// Held while a family's network is made.
    making: tokio::sync::Mutex<()>,
}

impl std::fmt::Debug for Nets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Nets").field("plan", &self.plan).finish_non_exhaustive()
    }
}

/// A family's network on this host.
struct FamilyNet {
    network: Network,
    /// Taps that nobody has yet.
    spare: Mutex<Vec<Tap>>,
}

impl Nets {
    /// # Errors
    /// When the addresses that the daemon was told make no sense, or the key of its tunnels can't be read.
    pub(crate) fn new(config: &Config) -> anyhow::Result<Self> {
        Ok(Self {
            plan: AddressPlan::new(config.guest_network)?,
            secret: crate::tunnel::secret(config)?,
            host: tokio::sync::OnceCell::new(),
            families: Mutex::default(),
            making: tokio::sync::Mutex::default(),
        })
    }

    pub(crate) fn plan(&self) -> AddressPlan {
        self.plan
    }

    /// This host's key, when its tunnels are encrypted.
    pub(crate) fn secret(&self) -> Option<&TunnelSecret> {
        self.secret.as_ref()
    }

    /// This host's address in tunnels, once there have been networks.
    pub(crate) fn tunnel_address(&self) -> Option<Ipv4Addr> {
        Some(self.host.get()?.tunnel()?.local)
    }
}

/// What this host's devices have in their names, so that two daemons in one namespace do not meet.
fn tag(config: &Config) -> String {
    let hash = xxhash_rust::xxh3::xxh3_64(config.state_dir.as_os_str().as_encoded_bytes());
    format!("{:04x}", hash & 0xffff)
}

fn failed(what: &str, err: impl Into<anyhow::Error>) -> ApiError {
    ApiError::failed(what, err)
}

/// Runs what talks to the kernel.
async fn blocking<T: Send + 'static>(
    what: &'static str,
    work: impl FnOnce() -> Result<T, ramet_net::Error> + Send + 'static,
) -> ApiResult<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(err)) => Err(network_failed(what, err)),
        Err(err) => Err(failed(what, err)),
    }
}

fn network_failed(what: &str, err: ramet_net::Error) -> ApiError {
    match err {
        ramet_net::Error::PortTaken { .. } => ApiError::new(ErrorCode::InUse, format!("{what}: {err}"))
            .remedy("choose another port of the host, or end what has it"),
        err => failed(what, err),
    }
}

/// The network's name on this host.
fn name_of(family: FamilyId) -> String {
    family.short()
}

/// Name servers for guests: the host's own, unless they are on the host itself.
fn name_servers() -> Vec<Ipv4Addr> {
    let text = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let named = text.lines().filter_map(|l| l.trim().strip_prefix("nameserver")?.trim().parse::<Ipv4Addr>().ok());
    named.filter(|ip| !ip.is_loopback() && !ip.is_unspecified()).take(3).collect()
}

/// What a request says about the way out, as the network has it; none: no network.
///
/// # Errors
/// [`ErrorCode::BadRequest`], which names what is wrong.
pub(crate) fn egress(wanted: &api::Egress) -> ApiResult<Option<Egress>> {
    let list = match wanted {
        api::Egress::Off => return Ok(None),
        api::Egress::None => return Ok(Some(Egress::None)),
        api::Egress::Nat => return Ok(Some(Egress::Nat)),
        api::Egress::List(list) => list,
    };
    let bad = |text: &str| {
        ApiError::new(ErrorCode::BadRequest, format!("'{}' is no destination", shown(text)))
            .remedy("give IP or IP/PREFIX, with :PORT or without, such as 10.1.0.0/16:443")
    };
    let parse = |text: &String| {
        let (net, port) = match text.rsplit_once(':') {
            Some((net, port)) => (net, Some(port.parse::<u16>().map_err(|_| bad(text))?)),
            None => (text.as_str(), None),
        };
        let (ip, prefix) = match net.split_once('/') {
            Some((ip, prefix)) => (ip, prefix.parse::<u8>().map_err(|_| bad(text))?),
            None => (net, 32),
        };
        let ip: Ipv4Addr = ip.parse().map_err(|_| bad(text))?;
        Ok((Subnet::new(ip, prefix).map_err(|_| bad(text))?, port))
    };
    Ok(Some(Egress::List(list.iter().map(parse).collect::<ApiResult<_>>()?)))
}

/// A request's ports as they are kept.
pub(crate) fn published(ports: &[PublishedPort]) -> Vec<Publish> {
    let proto = |p: Protocol| match p {
        Protocol::Tcp => Proto::Tcp,
        Protocol::Udp => Proto::Udp,
    };
    let publish = |p: &PublishedPort| Publish { proto: proto(p.protocol), host_port: p.host_port, port: p.guest_port };
    ports.iter().map(publish).collect()
}

/// A VM's network as the API tells of it.
pub(crate) fn describe(vm: &VmRecord) -> Option<api::VmNetwork> {
    let nic = vm.nic.as_ref()?;
    let port = |p: &Publish| PublishedPort {
        protocol: match p.proto {
            Proto::Tcp => Protocol::Tcp,
            Proto::Udp => Protocol::Udp,
        },
        host_port: p.host_port,
        guest_port: p.port,
    };
    Some(api::VmNetwork {
        ip: nic.member.ip.to_string(),
        mac: nic.member.mac.to_string(),
        tap: nic.tap.clone(),
        published: vm.published.iter().map(port).collect(),
    })
}

/// Places in a network that VMs of this host have.
fn places(state: &State, network: FamilyId) -> impl Iterator<Item = (&VmRecord, &VmNic)> {
    let vms = state.vms.values().filter(|vm| vm.alive());
    vms.flat_map(move |vm| vm.nics().filter(move |(of, _)| *of == network).map(move |(_, nic)| (vm, nic)))
}

/// A network's members on this host.
fn own_members(state: &State, network: FamilyId) -> Vec<MemberNumber> {
    places(state, network).map(|(_, nic)| MemberNumber { range: nic.range, index: nic.index }).collect()
}

/// A number that no member has, out of this host's range. Numbers go round, so that one is given again as late as can be.
fn free_number(
    state: &mut State,
    family: FamilyId,
    range: u8,
    plan: AddressPlan,
    also_taken: &[VmNic],
) -> ApiResult<VmNic> {
    let ours = own_members(state, family);
    let network = state.network_mut(family).ok_or_else(|| ApiError::internal("the family has no network"))?;
    let taken = |member: Member, number: MemberNumber| {
        ours.contains(&number)
            || also_taken.iter().any(|nic| nic.member == member)
            || network.hosts.values().flatten().any(|m| *m == member)
    };
    let all = u32::from(AddressPlan::LAST_INDEX);
    for step in 1..=all {
        let index = u16::try_from((u32::from(network.last_index) + step) % all).unwrap_or(0);
        let Some(member) = plan.member(range, index) else { continue };
        if !taken(member, MemberNumber { range, index }) {
            network.last_index = index;
            return Ok(VmNic { range, index, member, tap: String::new() });
        }
    }
    Err(ApiError::new(ErrorCode::LimitReached, "This host has no address left for another member of the family")
        .remedy("remove VMs of the family, or fork on another host"))
}

/// Refuses a network with the tunnel number of another one.
fn check_tunnel_number(state: &State, family: FamilyId, vni: u32, host: &str) -> ApiResult<()> {
    let families = state.families.values().filter(|f| f.id != family).filter_map(|f| f.network.as_ref());
    let mut others = families.chain(state.networks.values().map(|n| &n.network));
    if !others.any(|network| network.vni == vni) {
        return Ok(());
    }
    Err(ApiError::new(
        ErrorCode::WrongState,
        format!(
            "Host '{host}' has another family's network with the tunnel number of this one ({vni}), from a time when the \
             hosts did not know each other"
        ),
    )
    .remedy("remove the VMs of either family: a VM that is booted now gets a number that no other one has"))
}

impl Daemon {
    // ------------------------------------------------------------------------------------------------ addresses

    /// A place in the family's network for a new VM of this host, or for a clone that another host makes.
    /// `also_taken`: those that were given just now and are not on record yet.
    pub(crate) fn new_member(&self, state: &mut State, family: FamilyId, also_taken: &[VmNic]) -> ApiResult<VmNic> {
        let mut taken = self.shelf.nics(family);
        taken.extend_from_slice(also_taken);
        free_number(state, family, self.peers.own_number(), self.nets.plan(), &taken)
    }

    /// The place that another host gave.
    pub(crate) fn given_member(&self, number: MemberNumber) -> ApiResult<VmNic> {
        let MemberNumber { range, index } = number;
        let member = self.nets.plan().member(range, index);
        let member =
            member.ok_or_else(|| ApiError::new(ErrorCode::BadRequest, format!("No member has number {index}")))?;
        Ok(VmNic { range, index, member, tap: String::new() })
    }

    /// The network of a new family.
    pub(crate) fn new_network(&self, state: &State, egress: Egress, rate: Option<u64>) -> ApiResult<FamilyNetwork> {
        let named = state.networks.values().map(|n| n.network.vni);
        let families = state.families.values().filter_map(|f| f.network.as_ref());
        let used: Vec<_> = families.map(|n| n.vni).chain(named).collect();
        // The group numbers its hosts. One that is in none yet may meet another such host's networks later, so it begins anywhere.
        let range = u32::from(self.peers.own_number()) << 16;
        let mut start = [0; 2];
        getrandom::fill(&mut start).map_err(|e| ApiError::internal(format!("No random number for a network: {e}")))?;
        let start = u32::from(u16::from_ne_bytes(start));
        let vni = (0..0xffff).map(|n| range | ((start + n) % 0xffff + 1)).find(|vni| !used.contains(vni));
        let vni = vni.ok_or_else(|| ApiError::new(ErrorCode::LimitReached, "This host has made 65535 networks"))?;
        Ok(FamilyNetwork { vni, egress, rate, last_index: 1, hosts: BTreeMap::new() })
    }

    // ------------------------------------------------------------------------------------- networks with a name

    /// Makes a network with a name.
    ///
    /// # Errors
    /// When the name is taken or none, the way out is not understood, or the kernel refuses.
    pub async fn create_network(self: &Arc<Self>, request: &api::NetworkRequest) -> ApiResult<api::NetworkInfo> {
        crate::names::check_vm_name(&request.name)?;
        let Some(egress) = egress(&request.egress)? else {
            return Err(
                ApiError::new(ErrorCode::BadRequest, "A network that is off is none").remedy("give none or nat")
            );
        };
        let id = FamilyId::random();
        self.store.update(|s| {
            if s.networks.contains_key(&request.name) {
                return Err(ApiError::new(ErrorCode::NameTaken, format!("There is a network '{}'", request.name))
                    .remedy("choose another name; `ramet network ls` lists them"));
            }
            let range = (1..=u8::MAX).rev().find(|range| s.networks.values().all(|n| n.range != *range));
            let range =
                range.ok_or_else(|| ApiError::new(ErrorCode::LimitReached, "This host has 255 named networks"))?;
            let network = self.new_network(s, egress, request.rate)?;
            s.networks.insert(request.name.clone(), NamedNetwork { id, range, network });
            Ok(())
        })?;
        if let Err(err) = self.ready_network(id).await {
            self.remove_network(id).await;
            self.store.amend(|s| {
                s.networks.remove(&request.name);
            });
            return Err(err);
        }
        let found = self.named_networks().into_iter().find(|n| n.name == request.name);
        found.ok_or_else(|| no_network(&request.name))
    }

    /// The networks with a name.
    #[must_use]
    pub fn named_networks(&self) -> Vec<api::NetworkInfo> {
        self.store.read(|s| s.networks.iter().map(|(name, network)| self.describe_network(s, name, network)).collect())
    }

    fn describe_network(&self, state: &State, name: &str, network: &NamedNetwork) -> api::NetworkInfo {
        let range = u32::from(network.range) << (32 - u32::from(NAMED_PREFIX));
        let base = self.nets.plan().network().base().to_bits() | range;
        let member =
            |(vm, nic): (&VmRecord, &VmNic)| api::NetworkMember { vm: vm.name.clone(), ip: nic.member.ip.to_string() };
        api::NetworkInfo {
            name: name.to_owned(),
            subnet: format!("{}/{NAMED_PREFIX}", Ipv4Addr::from_bits(base)),
            namespace: self.config.state_dir.join("net").join(name_of(network.id)).display().to_string(),
            members: places(state, network.id).map(member).collect(),
        }
    }

    /// Removes a network with a name that no VM has joined.
    ///
    /// # Errors
    /// [`ErrorCode::NotFound`]; [`ErrorCode::InUse`] naming a VM or checkpoint.
    pub async fn remove_named_network(&self, name: &str) -> ApiResult<()> {
        let id = self.store.read(|s| {
            let id = s.networks.get(name).ok_or_else(|| no_network(name))?.id;
            let vm = places(s, id).map(|(vm, _)| format!("VM '{}'", vm.name)).next();
            let checkpoint = s.checkpoints.values().find(|c| c.joined.contains(&id));
            match vm.or(checkpoint.map(|c| format!("checkpoint {}", c.id.short()))) {
                Some(user) => Err(ApiError::new(ErrorCode::InUse, format!("{user} has joined network '{name}'"))),
                None => Ok(id),
            }
        })?;
        self.remove_network(id).await;
        self.store.amend(|s| {
            s.networks.remove(name);
        });
        Ok(())
    }

    /// A place in a network with a name.
    /// `also_taken`: as in [`Daemon::new_member`].
    pub(crate) fn join(&self, state: &mut State, network: FamilyId, also_taken: &[VmNic]) -> ApiResult<Joined> {
        let range = state.networks.values().find(|n| n.id == network).map(|n| n.range);
        let range =
            range.ok_or_else(|| ApiError::new(ErrorCode::NotFound, "A network that it has joined was removed"))?;
        Ok(Joined { network, nic: free_number(state, network, range, self.nets.plan(), also_taken)? })
    }

    /// Places in the networks of these names.
    pub(crate) fn join_named(&self, state: &mut State, names: &[String]) -> ApiResult<Vec<Joined>> {
        let mut joined = Vec::new();
        for name in names {
            let network = state.networks.get(name).ok_or_else(|| no_network(name))?.id;
            joined.push(self.join(state, network, &[])?);
        }
        Ok(joined)
    }

    // ---------------------------------------------------------------------------------------------- the kernel's

    async fn host_net(&self) -> ApiResult<&HostNet> {
        let open = || async {
            let local = match self.config.listen.map(|l| l.ip()) {
                Some(IpAddr::V4(ip)) if !ip.is_unspecified() => Some(TunnelOptions::new(ip)),
                _ => None,
            };
            let secure = self.nets.secret.clone().zip(local);
            let secure = secure.map(|(secret, open)| SecureOptions { secret, fabric: open.local });
            let tunnel = match &secure {
                Some(_) => Some(TunnelOptions::new(secure_address(self.peers.own_number()))),
                None => local,
            };
            let options = HostNetOptions {
                state_dir: self.config.state_dir.clone(),
                tag: tag(&self.config),
                tunnel,
                secure,
                plan: self.nets.plan,
            };
            blocking("This host can't have networks for VMs", move || HostNet::open(options)).await
        };
        self.nets.host.get_or_try_init(open).await
    }

    /// The family's network on this host, made when it is not there, with the members that are known.
    async fn family_net(&self, family: FamilyId) -> ApiResult<Arc<FamilyNet>> {
        let find = || lock(&self.nets.families).get(&family).cloned();
        if let Some(net) = find() {
            return Ok(net);
        }
        let _one_at_a_time = self.nets.making.lock().await;
        if let Some(net) = find() {
            return Ok(net);
        }
        let known = self.store.read(|s| s.network(family).cloned());
        let known = known.ok_or_else(|| ApiError::internal("the family has no network"))?;
        let host = self.host_net().await?.clone();
        let dns = if known.egress == Egress::None { Vec::new() } else { name_servers() };
        let spec = NetworkSpec {
            name: name_of(family),
            vni: known.vni,
            egress: known.egress.clone(),
            rate: known.rate,
            mtu: MTU,
        };
        let peers = self.peer_addresses();
        let secure: Vec<_> = self.peers.secure_peers().into_values().collect();
        let remote = self.remote_members(&known);
        let network = blocking("The family's network can't be made", move || {
            host.set_peers(&peers)?;
            host.set_secure_peers(&secure)?;
            let network = host.ensure(&spec)?;
            network.serve_dhcp(DhcpOptions { dns })?;
            network.set_remote(&remote)?;
            Ok(network)
        })
        .await?;
        let net = Arc::new(FamilyNet { network, spare: Mutex::default() });
        lock(&self.nets.families).insert(family, net.clone());
        Ok(net)
    }

    /// What guests of the family are told to ask for names.
    pub(crate) fn name_servers_of(&self, family: FamilyId) -> Vec<Ipv4Addr> {
        let egress = self.store.read(|s| s.network(family).map(|n| n.egress.clone()));
        match egress {
            Some(Egress::Nat | Egress::List(_)) => name_servers(),
            Some(Egress::None) | None => Vec::new(),
        }
    }

    /// Makes the family's network before somebody needs it.
    pub(crate) async fn ready_network(&self, family: FamilyId) -> ApiResult<()> {
        self.family_net(family).await.map(drop)
    }

    /// The other hosts' addresses in the open.
    fn open_addresses(&self) -> BTreeMap<String, Ipv4Addr> {
        let v4 = |(host, ip)| match ip {
            IpAddr::V4(ip) => Some((host, ip)),
            IpAddr::V6(_) => None,
        };
        self.peers.addresses().into_iter().filter_map(v4).collect()
    }

    fn peer_addresses(&self) -> Vec<Ipv4Addr> {
        self.open_addresses().into_values().collect()
    }

    /// The other hosts' addresses in tunnels. When these are encrypted, only those of hosts that have told their keys.
    fn tunnel_ends(&self) -> BTreeMap<String, Ipv4Addr> {
        if self.nets.secret.is_some() {
            return self.peers.secure_peers().into_iter().map(|(host, peer)| (host, peer.tunnel)).collect();
        }
        self.open_addresses()
    }

    fn remote_members(&self, network: &FamilyNetwork) -> Vec<(Member, Ipv4Addr)> {
        let ends = self.tunnel_ends();
        let mut members = Vec::new();
        for (host, list) in &network.hosts {
            if let Some(ip) = ends.get(host) {
                members.extend(list.iter().map(|m| (*m, *ip)));
            }
        }
        members
    }

    /// Has the kernel know the members on other hosts as they are on record.
    pub(crate) async fn apply_members(self: &Arc<Self>, family: FamilyId) -> ApiResult<()> {
        let known = self.store.read(|s| s.network(family).cloned());
        let net = lock(&self.nets.families).get(&family).cloned();
        let (Some(known), Some(net)) = (known, net) else { return Ok(()) };
        self.ask_for_keys(known.hosts.keys()).await;
        let host = self.host_net().await?.clone();
        let (remote, peers) = (self.remote_members(&known), self.peer_addresses());
        let secure: Vec<_> = self.peers.secure_peers().into_values().collect();
        blocking("Members on other hosts can't be told to the kernel", move || {
            host.set_peers(&peers)?;
            host.set_secure_peers(&secure)?;
            net.network.set_remote(&remote)
        })
        .await
    }

    /// The same for all families, after another host has told a new key.
    pub(crate) async fn apply_all_members(self: &Arc<Self>) {
        let families: Vec<_> = lock(&self.nets.families).keys().copied().collect();
        for family in families {
            if let Err(err) = self.apply_members(family).await {
                tracing::error!(%family, "{err}");
            }
        }
    }

    /// Gives a VM that does not run yet its network card number `index`, with the filter for its address in place. Returns
    /// the name of its tap. `cable`: it is plugged in from the beginning; else see [`Daemon::plug_in`].
    pub(crate) async fn plug(
        &self,
        family: FamilyId,
        process: &Arc<dyn VmProcess>,
        index: u8,
        nic: &VmNic,
        cable: bool,
    ) -> ApiResult<String> {
        let net = self.family_net(family).await?;
        let member = nic.member;
        let tap = blocking("The network card can't be made", move || {
            let spare = lock(&net.spare).pop();
            let tap = match spare {
                Some(tap) => tap,
                None => net.network.open_tap(&new_tap())?,
            };
            if !cable {
                net.network.set_cable(&tap.name, false)?;
            }
            net.network.admit(&tap.name, member)?;
            Ok(tap)
        })
        .await?;
        let name = tap.name.clone();
        let nic = Nic { index, mac: member.mac.to_string(), tap: tap.fd };
        process.attach_nic(nic).await.map_err(|e| failed("The network card can't be attached", e))?;
        Ok(name)
    }

    /// Plugs the cable of a VM's card in, now that the guest knows who it is. The guest sees nothing of it: its card had a
    /// cable all the time.
    pub(crate) async fn plug_in(&self, family: FamilyId, nic: &VmNic) -> ApiResult<()> {
        let (net, tap) = (self.family_net(family).await?, nic.tap.clone());
        blocking("The network card's cable can't be plugged in", move || net.network.set_cable(&tap, true)).await
    }

    /// Opens taps before somebody needs them.
    pub(crate) fn spare_taps(self: &Arc<Self>, family: FamilyId) {
        let Some(net) = lock(&self.nets.families).get(&family).cloned() else { return };
        let wanted = self.config.pool as usize;
        tokio::task::spawn_blocking(move || {
            while lock(&net.spare).len() < wanted {
                match net.network.open_tap(&new_tap()) {
                    Ok(tap) => lock(&net.spare).push(tap),
                    Err(err) => {
                        tracing::warn!(network = net.network.name(), error = %err, "no tap can be opened");
                        return;
                    }
                }
            }
        });
    }

    /// Takes a VM's address out of the filter again. Its tap goes with its QEMU.
    pub(crate) async fn unplug(&self, family: FamilyId, nic: &VmNic) {
        let net = lock(&self.nets.families).get(&family).cloned();
        let Some(net) = net.filter(|_| !nic.tap.is_empty()) else { return };
        let (tap, member) = (nic.tap.clone(), nic.member);
        let expelled = blocking("A VM's address can't be taken back", move || net.network.expel(&tap, member)).await;
        if let Err(err) = expelled {
            tracing::warn!("{err}");
        }
    }

    /// Opens a VM's ports on the host.
    pub(crate) async fn publish(&self, family: FamilyId, nic: &VmNic, ports: &[Publish]) -> ApiResult<()> {
        if ports.is_empty() {
            return Ok(());
        }
        let net = self.family_net(family).await?;
        let (ports, ip) = (ports.to_vec(), nic.member.ip);
        blocking("A port can't be published", move || {
            for (number, p) in ports.iter().enumerate() {
                if let Err(err) = net.network.publish(p.proto, p.host_port, ip, p.port) {
                    for done in &ports[..number] {
                        net.network.unpublish(done.proto, done.host_port)?;
                    }
                    return Err(err);
                }
            }
            Ok(())
        })
        .await
    }

    /// Closes them.
    pub(crate) async fn unpublish(&self, family: FamilyId, ports: &[Publish]) {
        let net = lock(&self.nets.families).get(&family).cloned();
        let Some(net) = net.filter(|_| !ports.is_empty()) else { return };
        let ports = ports.to_vec();
        let closed = blocking("A published port can't be closed", move || {
            ports.iter().try_for_each(|p| net.network.unpublish(p.proto, p.host_port))
        })
        .await;
        if let Err(err) = closed {
            tracing::warn!("{err}");
        }
    }

    /// Removes the family's network from this host.
    pub(crate) async fn remove_network(&self, family: FamilyId) {
        let net = lock(&self.nets.families).remove(&family);
        let had = net.is_some() || self.store.read(|s| s.network(family).is_some());
        if !had {
            return;
        }
        let Ok(host) = self.host_net().await.cloned() else { return };
        let removed = blocking("A family's network can't be removed", move || {
            drop(net);
            host.remove(&name_of(family))
        })
        .await;
        if let Err(err) = removed {
            tracing::error!("{err}");
        }
    }

    /// After the daemon's restart: networks of families on record are adopted with their members, others go.
    pub(crate) async fn recover_networks(self: &Arc<Self>) {
        let families = self.store.read(|s| {
            let families = s.families.values().filter(|f| f.network.is_some()).map(|f| f.id);
            families.chain(s.networks.values().map(|n| n.id)).collect::<Vec<_>>()
        });
        let left = self.config.state_dir.join("net").exists();
        if families.is_empty() && !left {
            return;
        }
        let host = match self.host_net().await {
            Ok(host) => host.clone(),
            Err(err) => return tracing::error!("{err}"),
        };
        let known: Vec<_> = families.iter().map(|f| name_of(*f)).collect();
        let strays = blocking("Networks can't be listed", move || {
            for name in host.names()?.into_iter().filter(|n| !known.contains(n)) {
                tracing::warn!(name, "removing what is left of a network");
                host.remove(&name)?;
            }
            Ok(())
        });
        if let Err(err) = strays.await {
            tracing::error!("{err}");
        }
        for family in families {
            if let Err(err) = self.recover_network(family).await {
                tracing::error!(%family, "{err}");
            }
        }
    }

    async fn recover_network(self: &Arc<Self>, family: FamilyId) -> ApiResult<()> {
        let net = self.family_net(family).await?;
        let vms: Vec<(VmRecord, VmNic)> =
            self.store.read(|s| places(s, family).map(|(vm, nic)| (vm.clone(), nic.clone())).collect());
        let admitted = net.network.admitted();
        for (vm, nic) in vms.iter().filter(|(_, nic)| !nic.tap.is_empty()) {
            let there = admitted.iter().any(|(tap, member)| *tap == nic.tap && *member == nic.member);
            if !there {
                let (net, nic) = (net.clone(), nic.clone());
                blocking("A VM's address can't be let in", move || net.network.admit(&nic.tap, nic.member)).await?;
            }
            if vm.family == family {
                self.publish(family, nic, &vm.published).await?;
            }
        }
        // Of VMs that have gone meanwhile.
        let alive = |tap: &str| vms.iter().any(|(_, nic)| nic.tap == tap);
        for (tap, member) in admitted.into_iter().filter(|(tap, _)| !alive(tap)) {
            let net = net.clone();
            blocking("A VM's address can't be taken back", move || net.network.expel(&tap, member)).await?;
        }
        self.announce(family);
        Ok(())
    }

    /// Ends all networks, with the daemon.
    pub(crate) async fn close_networks(&self) {
        let families: Vec<_> = lock(&self.nets.families).keys().copied().collect();
        for family in families {
            self.remove_network(family).await;
        }
        if let Some(host) = self.nets.host.get().cloned()
            && let Err(err) = blocking("The filter of the host can't be removed", move || host.close()).await
        {
            tracing::error!("{err}");
        }
    }

    // ---------------------------------------------------------------------------------------------- other hosts

    /// The family's network for a host that is to have clones of it.
    pub(crate) fn offer_network(&self, family: FamilyId) -> Option<PeerNetwork> {
        self.store.read(|s| {
            let network = s.families.get(&family)?.network.as_ref()?;
            let mut hosts: BTreeMap<_, _> =
                network.hosts.iter().map(|(host, list)| (host.clone(), self.numbers(list))).collect();
            hosts.insert(self.config.name.clone(), own_members(s, family));
            Some(PeerNetwork {
                vni: network.vni,
                egress: serde_json::to_value(&network.egress).unwrap_or_default(),
                rate: network.rate,
                hosts,
            })
        })
    }

    /// Members of the family on this host and on others, by host.
    pub(crate) fn all_members(&self, family: FamilyId) -> BTreeMap<String, Vec<MemberNumber>> {
        self.offer_network(family).map(|n| n.hosts).unwrap_or_default()
    }

    fn numbers(&self, members: &[Member]) -> Vec<MemberNumber> {
        members.iter().filter_map(|m| number_of(self.nets.plan(), *m)).collect()
    }

    /// Takes a family's network of another host over.
    pub(crate) fn take_network(&self, state: &mut State, family: FamilyId, offer: &PeerNetwork) -> ApiResult<()> {
        let egress = serde_json::from_value(offer.egress.clone()).map_err(|e| {
            ApiError::new(ErrorCode::BadRequest, format!("The family's network is not understood: {e}"))
        })?;
        check_tunnel_number(state, family, offer.vni, &self.config.name)?;
        let record = state.families.entry(family).or_insert(crate::state::FamilyRecord { id: family, network: None });
        let network = record.network.get_or_insert(FamilyNetwork {
            vni: offer.vni,
            egress,
            rate: offer.rate,
            last_index: 1,
            hosts: BTreeMap::new(),
        });
        self.note_members(network, &offer.hosts)
    }

    fn note_members(&self, network: &mut FamilyNetwork, hosts: &BTreeMap<String, Vec<MemberNumber>>) -> ApiResult<()> {
        for (host, numbers) in hosts.iter().filter(|(host, _)| **host != self.config.name) {
            let members: ApiResult<Vec<_>> = numbers.iter().map(|n| Ok(self.given_member(*n)?.member)).collect();
            network.hosts.insert(host.clone(), members?);
        }
        Ok(())
    }

    /// Takes note of members on other hosts.
    pub(crate) fn hear_members(&self, family: FamilyId, hosts: &BTreeMap<String, Vec<MemberNumber>>) -> ApiResult<()> {
        self.store.update(|s| match s.families.get_mut(&family).and_then(|f| f.network.as_mut()) {
            Some(network) => self.note_members(network, hosts),
            None => Ok(()),
        })
    }

    /// Tells all hosts that have the family who its members on this one are. In the background.
    pub(crate) fn announce(self: &Arc<Self>, family: FamilyId) {
        let (members, hosts) = self.store.read(|s| {
            let network = s.network(family);
            let hosts: Vec<_> = network.map(|n| n.hosts.keys().cloned().collect()).unwrap_or_default();
            (own_members(s, family), hosts)
        });
        if hosts.is_empty() {
            return;
        }
        let daemon = self.clone();
        tokio::spawn(async move {
            let told = all(hosts.iter().cloned().map(|host| {
                let daemon = daemon.clone();
                let others = hosts.iter().filter(|h| **h != host).cloned().chain([daemon.config.name.clone()]);
                let request = PeerMembers { members: members.clone(), hosts: others.collect() };
                async move {
                    let client = daemon.peers.client(&host)?;
                    ask(&host, TELL, client.peer_members(&family.to_string(), &request)).await
                }
            }));
            for err in told.await.into_iter().filter_map(Result::err) {
                tracing::info!(%family, "members were not told: {err}");
            }
        });
    }

    /// `PUT /v1/peer/families/{family}/members`.
    ///
    /// # Errors
    /// When the family's id or a member's number makes no sense.
    pub async fn peer_members(self: &Arc<Self>, sender: &str, family: &str, request: &PeerMembers) -> ApiResult<()> {
        let family: FamilyId =
            family.parse().map_err(|e: ramet_memory::IdError| ApiError::new(ErrorCode::BadRequest, e.to_string()))?;
        let mut hosts = BTreeMap::from([(sender.to_owned(), request.members.clone())]);
        let mut news = false;
        self.store.read(|s| {
            if let Some(network) = s.families.get(&family).and_then(|f| f.network.as_ref()) {
                // Hosts that this one did not know to have the family.
                for host in request.hosts.iter().filter(|h| **h != self.config.name && !network.hosts.contains_key(*h))
                {
                    hosts.entry(host.clone()).or_default();
                    news = true;
                }
                news |= !network.hosts.contains_key(sender);
            }
        });
        self.hear_members(family, &hosts)?;
        self.apply_members(family).await?;
        if news {
            self.announce(family);
        }
        Ok(())
    }
}

fn no_network(name: &str) -> ApiError {
    ApiError::new(ErrorCode::NotFound, format!("No network '{}'", shown(name)))
        .remedy("`ramet network ls` lists them, `ramet network create NAME` makes one")
}

fn number_of(plan: AddressPlan, member: Member) -> Option<MemberNumber> {
    let bits = member.ip.to_bits() & !(u32::MAX.checked_shl(u32::from(32 - plan.prefix())).unwrap_or(0));
    let range = u8::try_from(bits >> 14).ok()?;
    let index = u16::try_from(bits & 0x3fff).ok()?;
    (plan.member(range, index)? == member).then_some(MemberNumber { range, index })
}

/// A name for a tap that no other has.
fn new_tap() -> String {
    format!("t{}", ramet_memory::VmId::random().short())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::{FamilyRecord, tests::vm};

    fn state() -> (State, FamilyId) {
        let family = FamilyId::from_u128(1);
        let network = FamilyNetwork { vni: 1, egress: Egress::Nat, rate: None, last_index: 1, hosts: BTreeMap::new() };
        let mut state = State::default();
        state.families.insert(family, FamilyRecord { id: family, network: Some(network) });
        (state, family)
    }

    #[test]
    fn numbers_are_never_given_twice_and_go_round() {
        let (mut state, family) = state();
        let plan = AddressPlan::default();
        let first = free_number(&mut state, family, 3, plan, &[]).unwrap();
        assert_eq!((first.range, first.index), (3, 2));
        let mut web = vm("web");
        web.nic = Some(first.clone());
        state.vms.insert(web.id, web.clone());
        let network =
            |s: &mut State, last| s.families.get_mut(&family).unwrap().network.as_mut().unwrap().last_index = last;
        network(&mut state, AddressPlan::LAST_INDEX - 1);
        let prepared = VmNic { index: 3, member: plan.member(3, 3).unwrap(), ..first.clone() };
        let next = free_number(&mut state, family, 3, plan, std::slice::from_ref(&prepared)).unwrap();
        assert_eq!(next.index, 4, "one has 2, another is prepared with 3");
        // A member elsewhere that was given its number here.
        state
            .families
            .get_mut(&family)
            .unwrap()
            .network
            .as_mut()
            .unwrap()
            .hosts
            .insert("h2".into(), vec![plan.member(3, 5).unwrap()]);
        assert_eq!(free_number(&mut state, family, 3, plan, &[]).unwrap().index, 6);
    }

    #[test]
    fn two_families_never_share_a_tunnel_number() {
        let (mut state, family) = state();
        let vni = state.network(family).unwrap().vni;
        check_tunnel_number(&state, family, vni, "h2").unwrap();
        let other = FamilyId::from_u128(77);
        let err = check_tunnel_number(&state, other, vni, "h2").unwrap_err();
        assert!(err.to_string().contains("did not know each other"), "{err}");
        check_tunnel_number(&state, other, vni + 1, "h2").unwrap();
        state.families.clear();
        check_tunnel_number(&state, other, vni, "h2").unwrap();
    }

    #[test]
    fn a_host_without_addresses_says_so() {
        let (mut state, family) = state();
        let plan = AddressPlan::default();
        let all = (0..AddressPlan::LAST_INDEX).filter_map(|i| plan.member(0, i)).collect();
        state.families.get_mut(&family).unwrap().network.as_mut().unwrap().hosts.insert("h2".into(), all);
        let err = free_number(&mut state, family, 0, plan, &[]).unwrap_err();
        assert_eq!(err.code(), ErrorCode::LimitReached);
        assert!(err.to_string().contains("no address left"), "{err}");
    }

    #[test]
    fn a_number_is_found_again_in_the_address() {
        let plan = AddressPlan::default();
        for (range, index) in [(0, 2), (7, 4711), (255, AddressPlan::LAST_INDEX - 1)] {
            let member = plan.member(range, index).unwrap();
            assert_eq!(number_of(plan, member), Some(MemberNumber { range, index }));
        }
    }

    #[test]
    fn destinations_are_understood_or_named() {
        let list = |l: &[&str]| api::Egress::List(l.iter().map(|s| (*s).to_owned()).collect());
        let Some(Egress::List(good)) = egress(&list(&["10.1.0.0/16:443", "192.0.2.7"])).unwrap() else { panic!() };
        assert_eq!((good[0].0.prefix(), good[0].1, good[1].0.prefix(), good[1].1), (16, Some(443), 32, None));
        for bad in ["", "10.0.0.1:x", "10.0.0.0/33", "name:80"] {
            assert!(egress(&list(&[bad])).unwrap_err().to_string().contains("no destination"), "{bad}");
        }
        assert_eq!(egress(&api::Egress::Off).unwrap(), None);
    }
}
