//! What a fork is to become, before anything of it is made: which clones, with which names, addresses and hosts, under which
//! limits and leases. Everything that can be refused is refused here.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use ramet_client::api::{CloneOptions, CloneRequest, ErrorCode, PeerBoot, VmState};
use ramet_memory::{FamilyId, ImageId, VmId};

use crate::{
    daemon::{Daemon, all},
    error::{ApiError, ApiResult, from_peer},
    memory::needed_by_clones,
    names::{check_vm_name, default_clone_name, shown},
    state::{CheckpointRecord, Joined, State, VmNic, VmRecord, now_unix_ms},
    tunnel,
    vms::{check_free, check_ttl},
};

/// One clone that is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Planned {
    pub(crate) number: u32,
    pub(crate) name: String,
    pub(crate) host: String,
    /// Its place in the family's network.
    pub(crate) nic: Option<VmNic>,
    /// Its places in networks with a name.
    pub(crate) joined: Vec<Joined>,
}

/// What the clones of one call have in common.
#[derive(Debug, Clone)]
pub(crate) struct Terms {
    pub(crate) ttl_s: Option<u64>,
    pub(crate) lease: Option<String>,
    pub(crate) wait_agent: Duration,
    pub(crate) options: CloneOptions,
}

/// A fork on its way: what was promised where.
#[derive(Debug)]
pub(crate) struct Plan {
    /// The call's own name: its clones carry it until they are committed.
    pub(crate) call: String,
    pub(crate) clones: Vec<Planned>,
    pub(crate) terms: Terms,
    /// Other hosts, each with this fork's lease there.
    pub(crate) leases: BTreeMap<String, ramet_client::Lease>,
}

impl Daemon {
    /// Checks all that can be checked before anything is done, opens leases on the other hosts, and puts the clones of
    /// this host on record as starting.
    pub(crate) async fn plan(
        self: &Arc<Self>,
        parent: &Parent,
        request: &CloneRequest,
        image: ImageId,
    ) -> ApiResult<Plan> {
        self.check_request(parent, request)?;
        let hosts = self.check_hosts(&request.hosts)?;
        if !parent.joined.is_empty() && hosts.iter().any(|host| *host != self.config.name) {
            return Err(ApiError::new(
                ErrorCode::BadRequest,
                format!(
                    "'{}' has joined a network with a name, which is on host '{}' only",
                    parent.name, self.config.name
                ),
            )
            .remedy("clone it on this host, or boot it without --join"));
        }
        let elsewhere: BTreeSet<String> = hosts
            .iter()
            .cycle()
            .take(request.count as usize)
            .filter(|host| **host != self.config.name)
            .cloned()
            .collect();
        let networked = usize::from(parent.spec.nics) > parent.joined.len();
        let asked = all(elsewhere.into_iter().map(|host| {
            let daemon = self.clone();
            async move {
                let client = daemon.peers.client(&host)?;
                let tunnel =
                    async { if networked { daemon.agree_on_tunnel(&host, tunnel::NEEDED).await } else { Ok(()) } };
                let (vms, lease, tunnel) = tokio::join!(daemon.vms_of(&host), client.lease(), tunnel);
                tunnel?;
                let names = vms?.into_iter().map(|vm| (host.clone(), vm.name));
                Ok((names.collect::<Vec<_>>(), host.clone(), lease.map_err(|e| from_peer(&host, e))?))
            }
        }))
        .await;
        let (mut taken, mut leases) = (Vec::new(), BTreeMap::new());
        for answer in asked {
            let (names, host, lease) = answer.map_err(|e: ApiError| e)?;
            taken.extend(names);
            leases.insert(host, lease);
        }
        let terms = Terms {
            ttl_s: request.ttl_s,
            lease: request.lease.clone(),
            wait_agent: Duration::from_secs(request.wait_agent_s),
            options: request.options.clone(),
        };
        let call = VmId::random().to_string();
        let clones = self.store.update(|s| {
            let mut clones = assign(s, parent, request, &hosts, &self.config.name, &taken)?;
            let (mut nics, mut joined) = (Vec::new(), BTreeMap::<FamilyId, Vec<VmNic>>::new());
            for clone in &mut clones {
                if networked {
                    let nic = self.new_member(s, parent.family, &nics)?;
                    nics.push(nic.clone());
                    clone.nic = Some(nic);
                }
                for network in &parent.joined {
                    let taken = joined.entry(*network).or_default();
                    let place = self.join(s, *network, taken)?;
                    taken.push(place.nic.clone());
                    clone.joined.push(place);
                }
            }
            let ours: Vec<_> = clones.iter().filter(|c| c.host == self.config.name).cloned().collect();
            reserve(s, parent, &ours, image, &terms, &call);
            ApiResult::Ok(clones)
        })?;
        let plan = Plan { call, clones, terms, leases };
        let ours = plan.clones.iter().filter(|c| c.host == self.config.name).count();
        if let Err(err) = self.check_share(parent, ours) {
            self.drop_starting(&plan.call).await;
            return Err(err);
        }
        Ok(plan)
    }

    fn check_request(&self, parent: &Parent, request: &CloneRequest) -> ApiResult<()> {
        let limits = &self.config.limits;
        if request.count == 0 {
            return Err(ApiError::new(ErrorCode::BadRequest, "No clones are asked for").remedy("give -n 1 or more"));
        }
        if request.count > limits.clones_per_call {
            return Err(ApiError::new(
                ErrorCode::LimitReached,
                format!("{} clones are over the limit of {} for one call", request.count, limits.clones_per_call),
            )
            .remedy("ask for fewer, or start rametd with a higher --max-clones"));
        }
        if parent.generation >= limits.depth {
            return Err(ApiError::new(
                ErrorCode::LimitReached,
                format!(
                    "Clones of '{}' would be generation {}, over the limit of {}",
                    parent.name,
                    parent.generation + 1,
                    limits.depth
                ),
            )
            .remedy("fork a VM nearer to the root, or start rametd with a higher --max-depth"));
        }
        check_agent(parent, &request.options)?;
        check_ttl(request.ttl_s)?;
        self.leases.check(request.lease.as_deref())
    }

    /// The hosts to run on, every one of them known.
    fn check_hosts(&self, hosts: &[String]) -> ApiResult<Vec<String>> {
        if hosts.is_empty() {
            return Ok(vec![self.config.name.clone()]);
        }
        for host in hosts.iter().filter(|host| **host != self.config.name) {
            self.peers.client(host)?;
        }
        Ok(hosts.to_vec())
    }

    /// Limits of this host for its share of the clones, which is on record already.
    pub(crate) fn check_share(&self, parent: &Parent, count: usize) -> ApiResult<()> {
        if count == 0 {
            return Ok(());
        }
        self.check_not_draining()?;
        self.check_vm_limit(0)?;
        let what = format!("{count} clones of '{}'", parent.name);
        self.check_memory(&what, needed_by_clones(parent.spec.memory, count as u64))
    }
}

/// What clones take from their parent.
#[derive(Debug, Clone)]
pub(crate) struct Parent {
    pub(crate) id: VmId,
    pub(crate) name: String,
    pub(crate) generation: u32,
    pub(crate) image: String,
    pub(crate) guest: String,
    pub(crate) spec: ramet_vmm::MachineSpec,
    pub(crate) family: ramet_memory::FamilyId,
    /// Networks with a name that it has joined.
    pub(crate) joined: Vec<FamilyId>,
    pub(crate) boot: Option<PeerBoot>,
    /// Its agent has answered.
    pub(crate) agent: bool,
}

impl Parent {
    pub(crate) fn of_vm(vm: &VmRecord) -> Self {
        Self {
            id: vm.id,
            name: vm.name.clone(),
            generation: vm.generation,
            image: vm.image.clone(),
            guest: vm.guest.clone(),
            spec: vm.spec.clone(),
            family: vm.family,
            joined: vm.joined.iter().map(|j| j.network).collect(),
            boot: vm.boot.clone(),
            agent: vm.agent,
        }
    }

    pub(crate) fn of_checkpoint(record: &CheckpointRecord) -> Self {
        Self {
            id: record.vm,
            name: record.vm_name.clone(),
            generation: record.generation,
            image: record.image.clone(),
            guest: record.guest.clone(),
            spec: record.spec.clone(),
            family: record.family,
            joined: record.joined.clone(),
            boot: record.boot.clone(),
            agent: record.agent,
        }
    }
}

/// Refuses clones of a guest in which nobody can confirm that they are machines of their own.
fn check_agent(parent: &Parent, options: &CloneOptions) -> ApiResult<()> {
    if parent.agent || parent.guest != "linux" || options.allow_unseeded {
        return Ok(());
    }
    Err(ApiError::new(
        ErrorCode::AgentSilent,
        format!(
            "The agent of '{}' has not answered: its clones could not confirm that their random numbers are their own",
            parent.name
        ),
    )
    .remedy(
        "wait until it has booted, or install ramet-agent in it; --allow-unseeded makes clones without an agent, which get \
         their addresses by DHCP",
    ))
}

/// Gives every clone its number, name and host. `taken`: names on other hosts.
pub(crate) fn assign(
    state: &State,
    parent: &Parent,
    request: &CloneRequest,
    hosts: &[String],
    this: &str,
    taken: &[(String, String)],
) -> ApiResult<Vec<Planned>> {
    if request.names.len() > request.count as usize {
        return Err(ApiError::new(
            ErrorCode::BadRequest,
            format!("{} names for {} clones", request.names.len(), request.count),
        )
        .remedy("give at most as many names as clones"));
    }
    let mut used: BTreeSet<String> = BTreeSet::new();
    let mut avoid: BTreeSet<String> = state.vms.values().map(|vm| vm.name.clone()).collect();
    avoid.extend(taken.iter().map(|(_, name)| name.clone()));
    avoid.extend(request.names.iter().cloned());
    let mut clones = Vec::new();
    for (number, host) in (1..=request.count).zip(hosts.iter().cycle()) {
        let name = match request.names.get(number as usize - 1) {
            Some(name) => {
                check_vm_name(name)?;
                if host == this {
                    check_free(state, name, this)?;
                } else if taken.iter().any(|(h, n)| h == host && n == name) {
                    return Err(ApiError::new(
                        ErrorCode::NameTaken,
                        format!("The name '{name}' is taken by a VM on host '{host}'"),
                    )
                    .remedy(format!("choose another name, or `ramet --host {host} rm {name}`")));
                }
                if !used.insert(name.clone()) {
                    return Err(ApiError::new(
                        ErrorCode::NameTaken,
                        format!("The name '{}' is given twice", shown(name)),
                    )
                    .remedy("give every clone a name of its own"));
                }
                name.clone()
            }
            None => default_clone_name(&parent.name, &avoid),
        };
        avoid.insert(name.clone());
        clones.push(Planned { number, name, host: host.clone(), nic: None, joined: Vec::new() });
    }
    Ok(clones)
}

/// Puts clones on record as starting.
pub(crate) fn reserve(
    state: &mut State,
    parent: &Parent,
    clones: &[Planned],
    image: ImageId,
    terms: &Terms,
    call: &str,
) {
    for clone in clones {
        let id = VmId::random();
        let record = VmRecord {
            id,
            name: clone.name.clone(),
            state: VmState::Starting,
            reason: None,
            image: parent.image.clone(),
            guest: parent.guest.clone(),
            spec: parent.spec.clone(),
            family: parent.family,
            parent: Some(parent.id),
            checkpoint: Some(image),
            base: Some(image),
            clone_number: clone.number,
            generation: parent.generation + 1,
            created_unix_ms: now_unix_ms(),
            expires_unix_ms: terms.ttl_s.map(|ttl| now_unix_ms() + ttl * 1000),
            lease: terms.lease.clone(),
            call: Some(call.to_owned()),
            dir: std::path::PathBuf::new(),
            attached: false,
            agent: false,
            disk: None,
            nic: clone.nic.clone(),
            published: Vec::new(),
            joined: clone.joined.clone(),
            boot: parent.boot.clone(),
            rebooting: false,
        };
        state.vms.insert(id, record);
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::state::tests::vm;

    pub(crate) fn request(count: u32, names: &[&str]) -> CloneRequest {
        CloneRequest { names: names.iter().map(|&n| n.to_owned()).collect(), ..CloneRequest::new(count) }
    }

    pub(crate) fn hosts(names: &[&str]) -> Vec<String> {
        names.iter().map(|&n| n.to_owned()).collect()
    }

    pub(crate) fn state_with(names: &[&str]) -> (State, Parent) {
        let mut state = State::default();
        for name in names {
            let vm = vm(name);
            state.vms.insert(vm.id, vm);
        }
        (state, Parent::of_vm(&vm("web")))
    }

    #[test]
    fn clones_go_around_the_hosts_and_get_free_names() {
        let (state, parent) = state_with(&["web", "web-c1"]);
        let taken = [("h2".to_owned(), "web-c3".to_owned())];
        let plan = assign(&state, &parent, &request(5, &["mine"]), &hosts(&["h1", "h2"]), "h1", &taken).unwrap();
        let told: Vec<_> = plan.iter().map(|c| (c.number, c.name.as_str(), c.host.as_str())).collect();
        let expected =
            [(1, "mine", "h1"), (2, "web-c2", "h2"), (3, "web-c4", "h1"), (4, "web-c5", "h2"), (5, "web-c6", "h1")];
        assert_eq!(told, expected);
    }

    #[test]
    fn taken_double_and_bad_names_are_refused_before_anything_is_done() {
        let (state, parent) = state_with(&["web", "db"]);
        let taken = [("h2".to_owned(), "cache".to_owned())];
        let plan = |names: &[&str]| assign(&state, &parent, &request(2, names), &hosts(&["h1", "h2"]), "h1", &taken);
        assert!(plan(&["db"]).unwrap_err().to_string().contains("on host 'h1'"));
        let err = plan(&["a", "cache"]).unwrap_err();
        assert!(err.code() == ErrorCode::NameTaken && err.to_string().contains("on host 'h2'"), "{err}");
        assert!(plan(&["cache", "b"]).is_ok(), "names are unique on a host, not over all");
        assert_eq!(plan(&["a", "a"]).unwrap_err().code(), ErrorCode::NameTaken);
        assert_eq!(plan(&["a b"]).unwrap_err().code(), ErrorCode::BadName);
        assert_eq!(plan(&["a", "b", "c"]).unwrap_err().code(), ErrorCode::BadRequest);
    }

    #[test]
    fn a_default_name_is_never_one_that_is_given_to_a_sibling() {
        let (state, parent) = state_with(&["web"]);
        let mut wish = request(2, &[]);
        wish.names = vec!["web-c1".to_owned()];
        let plan = assign(&state, &parent, &wish, &hosts(&["h1"]), "h1", &[]).unwrap();
        assert_eq!(plan[1].name, "web-c2");
    }

    #[test]
    fn clones_that_nobody_can_confirm_are_refused_unless_they_are_wanted() {
        let (_, known) = state_with(&[]);
        let silent = Parent { agent: false, guest: "linux".to_owned(), ..known };
        let err = check_agent(&silent, &CloneOptions::default()).unwrap_err();
        assert_eq!(err.code(), ErrorCode::AgentSilent);
        assert!(err.to_string().contains("--allow-unseeded"), "{err}");
        check_agent(&silent, &CloneOptions { allow_unseeded: true, ..CloneOptions::default() }).unwrap();
        check_agent(&Parent { agent: true, ..silent.clone() }, &CloneOptions::default()).unwrap();
        check_agent(&Parent { guest: "tiny".to_owned(), ..silent }, &CloneOptions::default()).unwrap();
    }
}
