//! What the daemon remembers over its own death: VMs, checkpoints and families, in one file that is replaced atomically.
//!
//! One file, so that a whole change - eight clones that come up together - takes effect at once or not at all.

use std::{
    collections::BTreeMap,
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    sync::Mutex,
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, bail};
use ramet_client::api::{PeerBoot, VmState};
use ramet_disk::DiskId;
use ramet_memory::{ByteSize, FamilyId, ImageId, LayerId, VmId};
use ramet_net::{Egress, Member, Proto};
use ramet_vmm::MachineSpec;
use serde::{Deserialize, Serialize};

use crate::stats::lock;

/// Version of the file. A daemon reads no other.
const VERSION: u32 = 1;

/// Milliseconds since 1970.
#[must_use]
pub fn now_unix_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| u64::try_from(d.as_millis()).unwrap_or(u64::MAX))
}

/// A VM.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct VmRecord {
    /// Its id.
    pub id: VmId,
    /// Its name.
    pub name: String,
    /// Never `Stalled` or `Paused`: these are found out when asked for. `Starting`: half-made, undone at the next start.
    pub state: VmState,
    /// Why it stopped or crashed; of one that runs: why it does not answer.
    #[serde(default)]
    pub reason: Option<String>,
    /// Guest image of its root VM.
    pub image: String,
    /// `linux` or `tiny`.
    pub guest: String,
    /// Its machine.
    pub spec: MachineSpec,
    /// Its family.
    pub family: FamilyId,
    /// The VM it is a clone of.
    #[serde(default)]
    pub parent: Option<VmId>,
    /// The checkpoint it is a clone of; none: it was booted, or has booted anew since.
    #[serde(default)]
    pub checkpoint: Option<ImageId>,
    /// Its newest checkpoint, or else the one it is a clone of.
    #[serde(default)]
    pub base: Option<ImageId>,
    /// Its number in its fork call; 0: a root VM.
    pub clone_number: u32,
    /// Forks since the root VM.
    pub generation: u32,
    /// When it was made.
    pub created_unix_ms: u64,
    /// When its time ends.
    #[serde(default)]
    pub expires_unix_ms: Option<u64>,
    /// The lease that it lives with.
    #[serde(default)]
    pub lease: Option<String>,
    /// The fork call that makes it, until that is committed.
    #[serde(default)]
    pub call: Option<String>,
    /// Where its VMM's files are.
    #[serde(default)]
    pub dir: PathBuf,
    /// The pager serves its memory.
    #[serde(default)]
    pub attached: bool,
    /// Its agent has answered.
    #[serde(default)]
    pub agent: bool,
    /// Its disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<VmDisk>,
    /// Its place in the family's network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub nic: Option<VmNic>,
    /// Ports of this host that lead to it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub published: Vec<Publish>,
    /// Its places in networks with a name, card by card after that of its family.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub joined: Vec<Joined>,
    /// What it boots from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<PeerBoot>,
    /// It boots anew, and its QEMU is being replaced by one that can.
    #[serde(default, skip_serializing_if = "is_false")]
    pub rebooting: bool,
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_false(value: &bool) -> bool {
    !value
}

/// A VM's place in a network with a name.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Joined {
    /// The network.
    pub network: FamilyId,
    /// The place.
    pub nic: VmNic,
}

/// A network that has a name, for VMs of any family that are told to join it. On this host only.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct NamedNetwork {
    /// What it is known by inside.
    pub id: FamilyId,
    /// The range of its members' addresses, of which it has one to itself: so a VM can have cards in several.
    pub range: u8,
    /// The network.
    pub network: FamilyNetwork,
}

/// What lies below a disk that is written to: frozen, and the same for all who have it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FrozenDisk {
    /// Its size as guests see it.
    pub size: ByteSize,
    /// The golden image at the bottom.
    pub golden: Golden,
    /// A frozen disk of another host in the place of the golden image: this host reads it through its `ramet-disk`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub origin: Option<Origin>,
    /// Overlays on this host, oldest first.
    #[serde(default)]
    pub layers: Vec<DiskId>,
    /// Images whose disks are data volumes.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub volumes: Vec<Golden>,
}

/// An image's disk, known by its contents.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Golden {
    /// The image's name where it was first used.
    pub image: String,
    /// The hash of the disk.
    pub hash: String,
}

/// A frozen disk of another host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// Its name.
    pub disk: DiskId,
    /// Where this host's `ramet-disk` serves it.
    pub socket: PathBuf,
}

/// A VM's disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmDisk {
    /// What lies below.
    pub frozen: FrozenDisk,
    /// The overlay that it writes to.
    pub active: DiskId,
    /// Its QEMU may use one merged layer instead of several of the frozen ones already.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub merging: Option<Merging>,
}

/// One layer that takes the place of several, and shows the same.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Merging {
    /// Those that go: they follow one another, and are not the uppermost.
    pub old: Vec<DiskId>,
    /// What comes.
    pub merged: DiskId,
}

impl VmDisk {
    /// The disk of a VM that begins with what is frozen.
    #[must_use]
    pub fn over(frozen: FrozenDisk) -> Self {
        Self { frozen, active: DiskId::random(), merging: None }
    }

    /// Where in the chain those lie that the merged layer takes the place of. None: they are not there, or there is no
    /// frozen one above them.
    #[must_use]
    pub fn place_of(&self, old: &[DiskId]) -> Option<usize> {
        let layers = &self.frozen.layers;
        let at = layers.iter().position(|layer| Some(layer) == old.first())?;
        (layers.get(at..at + old.len()) == Some(old) && at + old.len() < layers.len()).then_some(at)
    }

    /// The same once its QEMU uses the merged layer.
    pub fn merged(&mut self) {
        if let Some(Merging { old, merged }) = self.merging.take()
            && let Some(at) = self.place_of(&old)
        {
            self.frozen.layers.splice(at..at + old.len(), [merged]);
        }
    }

    /// The same after its overlay was frozen and these took its place, each that of the one before.
    #[must_use]
    pub fn followed_by(mut self, next: &[DiskId]) -> Self {
        for &next in next {
            self.frozen.layers.push(std::mem::replace(&mut self.active, next));
        }
        self
    }

    /// All overlays that it needs.
    pub fn overlays(&self) -> impl Iterator<Item = DiskId> {
        let merged = self.merging.as_ref().map(|m| m.merged);
        self.frozen.layers.iter().copied().chain([self.active]).chain(merged)
    }
}

/// A VM's place in its family's network.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmNic {
    /// The host whose range its number is of.
    pub range: u8,
    /// Its number in that range.
    pub index: u16,
    /// Its address.
    pub member: Member,
    /// Its device.
    #[serde(default)]
    pub tap: String,
}

/// A port of the host that leads to a VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Publish {
    /// TCP or UDP.
    pub proto: Proto,
    /// The host's port.
    pub host_port: u16,
    /// The guest's port.
    pub port: u16,
}

impl VmRecord {
    /// Whether this call is making it.
    #[must_use]
    pub fn of_call(&self, call: &str) -> bool {
        self.state == VmState::Starting && self.call.as_deref() == Some(call)
    }

    /// Its cards in order: network and place.
    pub fn nics(&self) -> impl Iterator<Item = (FamilyId, &VmNic)> {
        let own = self.nic.as_ref().map(|nic| (self.family, nic));
        own.into_iter().chain(self.joined.iter().map(|j| (j.network, &j.nic)))
    }

    /// Whether it was forked, and not booted.
    #[must_use]
    pub fn is_clone(&self) -> bool {
        self.parent.is_some()
    }

    /// Whether its QEMU was started with the state of a checkpoint, and has no kernel.
    #[must_use]
    pub fn was_loaded(&self) -> bool {
        self.checkpoint.is_some()
    }

    /// Whether it has, or should have, a QEMU.
    #[must_use]
    pub fn alive(&self) -> bool {
        !matches!(self.state, VmState::Stopped | VmState::Crashed)
    }
}

/// A checkpoint of this host, or the copy of another host's that clones here are views of.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CheckpointRecord {
    /// Its id, which is its image's.
    pub id: ImageId,
    /// The user's note.
    #[serde(default)]
    pub note: Option<String>,
    /// The host that holds it; none: this one.
    #[serde(default)]
    pub origin: Option<String>,
    /// Its family.
    pub family: FamilyId,
    /// The VM it was taken of.
    pub vm: VmId,
    /// That VM's name then.
    pub vm_name: String,
    /// The checkpoint before it.
    #[serde(default)]
    pub base: Option<ImageId>,
    /// Generation of that VM.
    pub generation: u32,
    /// Guest image of the root VM.
    pub image: String,
    /// `linux` or `tiny`.
    pub guest: String,
    /// The machine.
    pub spec: MachineSpec,
    /// Layers, oldest first; the last one is its own.
    pub layers: Vec<LayerId>,
    /// When it was made.
    pub created_unix_ms: u64,
    /// Size of the devices' state.
    pub state_bytes: u64,
    /// The parent's pause.
    pub pause_us: u64,
    /// Hosts that were sent its descriptor, and may have clones.
    #[serde(default)]
    pub peers: Vec<String>,
    /// Made by a fork that has not succeeded yet: undone at the next start.
    #[serde(default)]
    pub pending: bool,
    /// Its disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<FrozenDisk>,
    /// Its applications stand still in it, until a clone has an identity.
    #[serde(default)]
    pub frozen: bool,
    /// Networks with a name that its clones join.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub joined: Vec<FamilyId>,
    /// What its clones boot from when they boot anew.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot: Option<PeerBoot>,
    /// The agent of its VM had answered: that of its clones will.
    #[serde(default = "yes")]
    pub agent: bool,
}

fn yes() -> bool {
    true
}

/// A family: it has a pager.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FamilyRecord {
    /// Its id.
    pub id: FamilyId,
    /// Its private network.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<FamilyNetwork>,
}

/// A family's private network, as this host knows it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct FamilyNetwork {
    /// The network's number in tunnels, the same on all hosts.
    pub vni: u32,
    /// What may leave it.
    pub egress: Egress,
    /// Bits a second in and out of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate: Option<u64>,
    /// The number given last out of this host's range.
    #[serde(default)]
    pub last_index: u16,
    /// Hosts that have the family, and its members there. This host is not among them.
    #[serde(default)]
    pub hosts: BTreeMap<String, Vec<Member>>,
}

/// All that is remembered.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct State {
    /// The VMs.
    #[serde(default)]
    pub vms: BTreeMap<VmId, VmRecord>,
    /// The checkpoints.
    #[serde(default)]
    pub checkpoints: BTreeMap<ImageId, CheckpointRecord>,
    /// The families.
    #[serde(default)]
    pub families: BTreeMap<FamilyId, FamilyRecord>,
    /// Networks with a name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub networks: BTreeMap<String, NamedNetwork>,
    /// No new VMs are taken.
    #[serde(default)]
    pub draining: bool,
}

impl State {
    /// A network: a family's, or one with a name.
    #[must_use]
    pub fn network(&self, id: FamilyId) -> Option<&FamilyNetwork> {
        let named = || self.networks.values().find(|n| n.id == id).map(|n| &n.network);
        self.families.get(&id).and_then(|f| f.network.as_ref()).or_else(named)
    }

    /// The same, to be changed.
    pub fn network_mut(&mut self, id: FamilyId) -> Option<&mut FamilyNetwork> {
        if let Some(network) = self.families.get_mut(&id).and_then(|f| f.network.as_mut()) {
            return Some(network);
        }
        self.networks.values_mut().find(|n| n.id == id).map(|n| &mut n.network)
    }

    /// The VM of this name.
    #[must_use]
    pub fn vm_named(&self, name: &str) -> Option<&VmRecord> {
        self.vms.values().find(|vm| vm.name == name)
    }

    /// Checkpoints that need the newest layer of this one, itself left out.
    pub fn children(&self, checkpoint: &CheckpointRecord) -> impl Iterator<Item = &CheckpointRecord> {
        let (own, top) = (checkpoint.id, checkpoint.layers.last().copied());
        self.checkpoints.values().filter(move |c| c.id != own && top.is_some_and(|t| c.layers.contains(&t)))
    }

    /// VMs with a QEMU whose memory shows this checkpoint's image.
    pub fn views(&self, checkpoint: ImageId) -> impl Iterator<Item = &VmRecord> {
        self.vms.values().filter(move |vm| vm.checkpoint == Some(checkpoint) && vm.alive())
    }

    /// Whether anything of the family is left.
    #[must_use]
    pub fn family_used(&self, family: FamilyId) -> bool {
        self.vms.values().any(|vm| vm.family == family && vm.alive())
            || self.checkpoints.values().any(|c| c.family == family)
    }
}

#[derive(Serialize)]
struct FileRef<'a> {
    version: u32,
    #[serde(flatten)]
    state: &'a State,
}

/// The state in memory and on disk.
#[derive(Debug)]
pub struct Store {
    path: PathBuf,
    state: Mutex<State>,
}

impl Store {
    /// Reads the file, or begins an empty one. What an interrupted write left behind is removed.
    ///
    /// # Errors
    /// When the file is of another version or damaged: names it and the remedy.
    pub fn open(path: impl Into<PathBuf>) -> anyhow::Result<Self> {
        let path = path.into();
        let _ = fs::remove_file(temp(&path));
        let state = match fs::read(&path) {
            Ok(bytes) => read(&path, &bytes)?,
            Err(err) if err.kind() == std::io::ErrorKind::NotFound => State::default(),
            Err(err) => return Err(err).with_context(|| format!("Failed to read {}", path.display())),
        };
        Ok(Self { path, state: Mutex::new(state) })
    }

    /// Looks at the state.
    pub fn read<T>(&self, look: impl FnOnce(&State) -> T) -> T {
        look(&lock(&self.state))
    }

    /// Changes the state. The change is on disk when this returns; when it can't be written, or `change` fails, the
    /// state is as before.
    ///
    /// # Errors
    /// That of `change`, or of the disk.
    pub fn update<T, E: From<anyhow::Error>>(&self, change: impl FnOnce(&mut State) -> Result<T, E>) -> Result<T, E> {
        let mut state = lock(&self.state);
        let mut next = state.clone();
        let result = change(&mut next)?;
        if next != *state {
            write(&self.path, &next)?;
            *state = next;
        }
        Ok(result)
    }

    /// Changes what the next daemon finds out anew: on disk with the next change that is worth a write.
    pub fn note<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut lock(&self.state))
    }

    /// Changes the state where nothing can be done about a full disk: that is logged, and the change holds in memory.
    pub fn amend(&self, change: impl FnOnce(&mut State)) {
        let mut state = lock(&self.state);
        let before = state.clone();
        change(&mut state);
        if *state != before
            && let Err(err) = write(&self.path, &state)
        {
            tracing::error!("{err:#}");
        }
    }
}

fn temp(path: &Path) -> PathBuf {
    path.with_extension("new")
}

fn read(path: &Path, bytes: &[u8]) -> anyhow::Result<State> {
    let name = path.display();
    let remedy = "move it away to begin anew; running VMs are then ended";
    let value: serde_json::Value =
        serde_json::from_slice(bytes).with_context(|| format!("{name} is damaged; {remedy}"))?;
    match value.get("version").and_then(serde_json::Value::as_u64) {
        Some(version) if version == u64::from(VERSION) => {}
        version => bail!(
            "{name} has version {}, this rametd reads version {VERSION}: run the rametd that wrote it, or {remedy}",
            version.map_or("none".to_owned(), |v| v.to_string())
        ),
    }
    serde_json::from_value(value).with_context(|| format!("{name} is damaged; {remedy}"))
}

/// Writes beside the file, then renames: whoever reads it finds the old or the new one, whole.
fn write(path: &Path, state: &State) -> anyhow::Result<()> {
    let write = || -> anyhow::Result<()> {
        let temp = temp(path);
        let mut file = fs::File::create(&temp)?;
        file.write_all(&serde_json::to_vec(&FileRef { version: VERSION, state })?)?;
        fs::rename(&temp, path)?;
        Ok(())
    };
    write().with_context(|| format!("Failed to write {}; is its disk full?", path.display()))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn vm(name: &str) -> VmRecord {
        VmRecord {
            id: VmId::random(),
            name: name.to_owned(),
            state: VmState::Running,
            reason: None,
            image: "default".to_owned(),
            guest: "linux".to_owned(),
            spec: spec(),
            family: FamilyId::from_u128(1),
            parent: None,
            checkpoint: None,
            base: None,
            clone_number: 0,
            generation: 0,
            created_unix_ms: 1,
            expires_unix_ms: None,
            lease: None,
            call: None,
            dir: PathBuf::new(),
            attached: false,
            agent: false,
            disk: None,
            nic: None,
            published: Vec::new(),
            joined: Vec::new(),
            boot: None,
            rebooting: false,
        }
    }

    pub(crate) fn spec() -> MachineSpec {
        crate::backend::machine_spec(
            "pc-i440fx-7.2",
            ramet_memory::ByteSize::mib(64),
            1,
            ramet_vmm::Accel::Tcg,
            None,
            true,
        )
    }

    pub(crate) fn checkpoint(layers: &[u128]) -> CheckpointRecord {
        CheckpointRecord {
            id: ImageId::random(),
            note: None,
            origin: None,
            family: FamilyId::from_u128(1),
            vm: VmId::random(),
            vm_name: "web".to_owned(),
            base: None,
            generation: 0,
            image: "default".to_owned(),
            guest: "linux".to_owned(),
            spec: spec(),
            layers: layers.iter().map(|&n| LayerId::from_u128(n)).collect(),
            created_unix_ms: 1,
            state_bytes: 0,
            pause_us: 0,
            peers: Vec::new(),
            pending: false,
            disk: None,
            frozen: false,
            joined: Vec::new(),
            boot: None,
            agent: true,
        }
    }

    fn add(store: &Store, vm: VmRecord) {
        store
            .update(|s| -> anyhow::Result<()> {
                s.vms.insert(vm.id, vm);
                Ok(())
            })
            .unwrap();
    }

    #[test]
    fn what_was_written_is_found_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        let store = Store::open(&path).unwrap();
        let record = vm("web");
        add(&store, record.clone());
        store.amend(|s| {
            let c = checkpoint(&[1, 2]);
            s.checkpoints.insert(c.id, c);
        });
        // A write that was interrupted leaves a file that is not looked at.
        fs::write(temp(&path), b"{\"version\":1,\"vms\":{").unwrap();
        let again = Store::open(&path).unwrap();
        assert_eq!(again.read(Clone::clone), store.read(Clone::clone));
        assert_eq!(again.read(|s| s.vm_named("web").cloned()), Some(record));
        assert!(!temp(&path).exists());
    }

    #[test]
    fn a_change_that_fails_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::open(dir.path().join("state.json")).unwrap();
        let failed: anyhow::Result<()> = store.update(|s| {
            s.draining = true;
            anyhow::bail!("no")
        });
        assert!(failed.is_err());
        assert!(!store.read(|s| s.draining));
        // Nor does one that can't be written.
        let gone = Store::open(dir.path().join("missing/state.json")).unwrap();
        let failed: anyhow::Result<()> = gone.update(|s| {
            s.draining = true;
            Ok(())
        });
        assert!(format!("{:#}", failed.unwrap_err()).contains("missing/state.json"));
        assert!(!gone.read(|s| s.draining));
    }

    #[test]
    fn other_versions_and_damage_are_refused_with_a_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state.json");
        for (content, expected) in [("{\"version\":7}", "version 7"), ("{}", "version none"), ("{\"ver", "damaged")] {
            fs::write(&path, content).unwrap();
            let err = format!("{:#}", Store::open(&path).unwrap_err());
            assert!(err.contains(expected) && err.contains("move it away") && err.contains("state.json"), "{err}");
        }
    }

    #[test]
    fn a_checkpoint_is_used_by_whoever_has_its_layer() {
        let mut state = State::default();
        let (first, second, other) = (checkpoint(&[1]), checkpoint(&[1, 2]), checkpoint(&[3]));
        for c in [&first, &second, &other] {
            state.checkpoints.insert(c.id, c.clone());
        }
        assert_eq!(state.children(&first).map(|c| c.id).collect::<Vec<_>>(), [second.id]);
        assert_eq!(state.children(&second).count(), 0);

        let mut clone = vm("web-c1");
        clone.checkpoint = Some(second.id);
        state.vms.insert(clone.id, clone.clone());
        assert_eq!(state.views(second.id).count(), 1);
        state.vms.entry(clone.id).and_modify(|vm| vm.state = VmState::Crashed);
        assert_eq!(state.views(second.id).count(), 0, "a dead VM needs no image");
    }
}
