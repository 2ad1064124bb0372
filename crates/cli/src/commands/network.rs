//! Networks with a name, and topologies of VMs on them.

use std::{collections::BTreeMap, path::Path};

use anyhow::{Context as _, Result, bail, ensure};
use ramet_client::{
    Client,
    api::{Egress, ErrorCode, NetworkList, NetworkRequest, RunRequest, VmInfo},
};
use ramet_memory::ByteSize;
use serde::{Deserialize, Serialize};

use super::each;
use crate::{
    args::{NetworkCommand, NetworkKind, TopologyCommand},
    context::Context,
    output::{self, Rows},
};

pub(crate) async fn run(context: &Context, command: &NetworkCommand) -> Result<()> {
    let client = &context.client()?;
    match command {
        NetworkCommand::Create { name, network, rate } => {
            let request = NetworkRequest { name: name.clone(), egress: (*network).into(), rate: *rate };
            context.out.show(&client.create_network(&request).await?, |made| format!("{} {}", made.name, made.subnet))
        }
        NetworkCommand::Ls => context.out.show(&client.networks().await?, table),
        NetworkCommand::Rm { names } => {
            each(names, |name| async move {
                client.remove_network(name).await?;
                context.out.show(&serde_json::json!({ "removed": name }), |_| name.to_owned())
            })
            .await
        }
    }
}

fn table(list: &NetworkList) -> String {
    let mut rows = Rows::new(&["NAME", "ADDRESSES", "MEMBERS", "NAMESPACE"]);
    for network in &list.networks {
        let members: Vec<_> = network.members.iter().map(|m| format!("{} {}", m.vm, m.ip)).collect();
        rows.add([
            network.name.clone(),
            network.subnet.clone(),
            if members.is_empty() { "-".to_owned() } else { members.join(", ") },
            network.namespace.clone(),
        ]);
    }
    rows.text()
}

/// A file of networks and of the VMs on them.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Topology {
    #[serde(default)]
    networks: BTreeMap<String, NetworkEntry>,
    vms: BTreeMap<String, VmEntry>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct NetworkEntry {
    #[serde(default)]
    egress: Outward,
    rate: Option<String>,
}

/// What leaves a network.
#[derive(Debug, Default, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Outward {
    #[default]
    None,
    Nat,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct VmEntry {
    #[serde(default = "default_image")]
    image: String,
    memory: Option<String>,
    cpus: Option<u8>,
    disk: Option<String>,
    append: Option<String>,
    /// Networks of this file, a card for each.
    #[serde(default)]
    networks: Vec<String>,
    /// The network of its family besides these: `off` unless told otherwise.
    #[serde(default)]
    own: Own,
    /// As `-p` of `ramet run`; needs a network of its own.
    #[serde(default)]
    publish: Vec<String>,
}

#[derive(Debug, Default, Clone, Copy, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Own {
    #[default]
    Off,
    None,
    Nat,
}

fn default_image() -> String {
    "default".to_owned()
}

impl Topology {
    fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read_to_string(path).with_context(|| format!("Can't read {}", path.display()))?;
        let topology: Self = toml::from_str(&text).with_context(|| format!("{} is no topology", path.display()))?;
        for (name, vm) in &topology.vms {
            for network in &vm.networks {
                ensure!(
                    topology.networks.contains_key(network),
                    "{}: VM '{name}' is on network '{network}', which the file does not have",
                    path.display()
                );
            }
            vm.request(name).with_context(|| format!("{}: VM '{name}'", path.display()))?;
        }
        for (name, network) in &topology.networks {
            network.request(name).with_context(|| format!("{}: network '{name}'", path.display()))?;
        }
        Ok(topology)
    }
}

impl NetworkEntry {
    fn request(&self, name: &str) -> Result<NetworkRequest> {
        let egress = match self.egress {
            Outward::None => Egress::None,
            Outward::Nat => Egress::Nat,
        };
        let rate = self.rate.as_deref().map(|r| r.parse::<ramet_lab::Rate>().map(|r| r.0)).transpose()?;
        Ok(NetworkRequest { name: name.to_owned(), egress, rate })
    }
}

impl VmEntry {
    fn request(&self, name: &str) -> Result<RunRequest> {
        let mut request = RunRequest::new(self.image.clone());
        request.name = Some(name.to_owned());
        if let Some(memory) = &self.memory {
            request.memory = memory.parse::<ByteSize>().map_err(|e| anyhow::anyhow!("memory: {e}"))?;
        }
        request.cpus = self.cpus.unwrap_or(1);
        request.disk.clone_from(&self.disk);
        request.append.clone_from(&self.append);
        request.network = Some(match self.own {
            Own::Off => Egress::Off,
            Own::None => Egress::None,
            Own::Nat => Egress::Nat,
        });
        let port =
            |text: &String| crate::args::parse_publish(text).map_err(|e| anyhow::anyhow!("publish '{text}': {e}"));
        request.publish = self.publish.iter().map(port).collect::<Result<_>>()?;
        request.join.clone_from(&self.networks);
        Ok(request)
    }
}

/// What a topology is made of, as far as it is there.
#[derive(Debug, Serialize)]
struct Made {
    networks: Vec<String>,
    vms: Vec<VmInfo>,
}

pub(crate) async fn topology(context: &Context, command: &TopologyCommand) -> Result<()> {
    let client = context.client()?;
    match command {
        TopologyCommand::Up { file } => {
            let topology = Topology::read(file)?;
            let mut made = Made { networks: Vec::new(), vms: Vec::new() };
            if let Err(err) = up(&client, &topology, &mut made).await {
                output::note("undoing what was made");
                for vm in &made.vms {
                    client.remove_vm(&vm.id.to_string(), true).await?;
                }
                for network in &made.networks {
                    client.remove_network(network).await?;
                }
                return Err(err);
            }
            context.out.show(&made, |made| {
                let mut rows = Rows::new(&["VM", "IMAGE", "NETWORKS"]);
                for vm in &made.vms {
                    let on = topology.vms.get(&vm.name).map(|entry| entry.networks.join(", "));
                    rows.add([vm.name.clone(), vm.image.clone(), on.unwrap_or_default()]);
                }
                rows.text()
            })
        }
        TopologyCommand::Down { file } => {
            let topology = Topology::read(file)?;
            let mut removed = Vec::new();
            for name in topology.vms.keys() {
                removed.extend(gone(client.remove_vm(name, true).await, name)?);
            }
            for name in topology.networks.keys() {
                removed.extend(gone(client.remove_network(name).await, name)?);
            }
            context.out.show(&serde_json::json!({ "removed": removed }), |_| removed.join("\n"))
        }
    }
}

async fn up(client: &Client, topology: &Topology, made: &mut Made) -> Result<()> {
    for (name, entry) in &topology.networks {
        client.create_network(&entry.request(name)?).await.with_context(|| format!("Network '{name}'"))?;
        made.networks.push(name.clone());
    }
    let count = topology.vms.len();
    for (number, (name, entry)) in (1..).zip(&topology.vms) {
        output::note(&format!("booting {name} ({number} of {count})"));
        let vm = client.run(&entry.request(name)?).await.with_context(|| format!("VM '{name}'"))?;
        let answers = vm.agent;
        made.vms.push(vm);
        if !answers {
            bail!("VM '{name}' does not answer: without its agent it has no addresses");
        }
    }
    Ok(())
}

/// What was not there is gone as well.
fn gone(result: Result<(), ramet_client::Error>, name: &str) -> Result<Option<String>> {
    match result {
        Ok(()) => Ok(Some(name.to_owned())),
        Err(err) if err.code() == Some(ErrorCode::NotFound) => Ok(None),
        Err(err) => Err(err.into()),
    }
}

impl From<NetworkKind> for Egress {
    fn from(kind: NetworkKind) -> Self {
        match kind {
            NetworkKind::Off => Self::Off,
            NetworkKind::None => Self::None,
            NetworkKind::Nat => Self::Nat,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Topology> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.toml");
        std::fs::write(&path, text).unwrap();
        Topology::read(&path)
    }

    #[test]
    fn a_topology_names_networks_and_who_is_on_them() {
        let topology = read(
            "[networks.lan]\n[networks.dmz]\negress = \"nat\"\nrate = \"10mbit\"\n\
             [vms.router]\nnetworks = [\"lan\", \"dmz\"]\nmemory = \"128M\"\n\
             [vms.client]\nimage = \"web\"\nnetworks = [\"lan\"]\nown = \"nat\"\npublish = [\"8080:80\"]\n",
        )
        .unwrap();
        let router = topology.vms["router"].request("router").unwrap();
        assert_eq!(
            (router.join.as_slice(), router.network),
            (["lan".to_owned(), "dmz".to_owned()].as_slice(), Some(Egress::Off))
        );
        assert_eq!(topology.vms["client"].request("client").unwrap().publish[0].host_port, 8080);
        assert_eq!(topology.networks["dmz"].request("dmz").unwrap().rate, Some(10_000_000));
    }

    #[test]
    fn what_is_wrong_with_a_topology_is_named() {
        let error = |text: &str| format!("{:#}", read(text).unwrap_err());
        assert!(error("[vms.a]\nnetworks = [\"x\"]\n").contains("network 'x'"));
        assert!(error("[vms.a]\nmemory = \"lots\"\n").contains("VM 'a'"));
        assert!(error("[vms.a]\ncolour = 1\n").contains("colour"));
        assert!(error("[networks.n]\nrate = \"fast\"\n[vms.a]\n").contains("network 'n'"));
        assert!(read("[networks.n]\n").is_err(), "no VMs");
    }
}
