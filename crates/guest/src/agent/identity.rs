//! Who this machine is. A clone has its parent's memory, the state of the kernel's random generator with it: before
//! anything else, the generator gets fresh entropy. If the kernel refuses, the host is told so and nothing is glossed
//! over.

use crate::control::{Control, clip};
use crate::network::Card;
use crate::paths::Paths;
use crate::threads::Priority;
use crate::{names, network};
use ramet_guest::protocol::{
    GuestId, GuestNic, Identity, IdentityAck, IdentityStep, MAX_PAYLOAD, MIN_ENTROPY, NicIdentity, from_hex,
};
use rustix::time::{ClockId, Timespec, clock_settime};
use std::fs::File;
use std::io;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Instant;

/// The answer to what is no identity.
pub(crate) fn not_understood(error: &serde_json::Error) -> IdentityAck {
    IdentityAck { error: Some(format!("cannot understand the identity: {error}")), ..IdentityAck::default() }
}

/// The steps of an identity, as they are done.
#[derive(Debug)]
struct Steps(Vec<IdentityStep>, Instant);

impl Steps {
    /// Notes one, and gives whether it is done.
    fn note(&mut self, name: impl Into<String>, result: io::Result<network::Remark>) -> bool {
        let ok = result.is_ok();
        let (remark, error) = match result {
            Ok(remark) => (remark, None),
            Err(error) => (None, Some(error.to_string())),
        };
        let [remark, error] = [remark, error].map(|text| text.map(|text| clip(&text)));
        let us = u64::try_from(self.1.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.1 = Instant::now();
        self.0.push(IdentityStep { name: name.into(), ok, error, remark, us });
        ok
    }

    fn into_ack(mut self, reseeded: bool) -> IdentityAck {
        let failed = self.0.iter().filter_map(|step| Some(format!("{}: {}", step.name, step.error.as_ref()?)));
        let failed: Vec<String> = failed.collect();
        let error = (!failed.is_empty()).then(|| clip(&failed.join("; ")));
        // Of very many interfaces, not every step can be told.
        while serde_json::to_vec(&self.0).is_ok_and(|json| json.len() > MAX_PAYLOAD - 4096) {
            let half = self.0.len() / 2;
            self.0.truncate(half);
        }
        IdentityAck { ok: failed.is_empty(), reseeded, error, steps: self.0 }
    }
}

/// Takes on an identity.
pub(crate) fn take(control: &Arc<Control>, identity: &Identity) -> IdentityAck {
    let begun = Instant::now();
    // Until a machine is itself, nothing that others do in it is of use.
    let _first = (identity.clone_number > 0).then(Priority::first);
    let paths = &control.paths;
    let mut steps = Steps(Vec::new(), begun);
    let reseeded = steps.note("reseed", reseed(&identity.entropy).map(|()| None));
    let before = control.who();
    // Held until it is done, so that nobody gives an interface addresses of before.
    let mut cards = control.cards();
    let nics = take_nics(paths, identity, before.as_ref(), &mut cards, &mut steps);
    drop(cards);
    names::take(paths, identity, &mut |name, result| {
        steps.note(name, result);
    });
    control.watch_cards();
    let id = guest_id(identity, reseeded, nics);
    // Files can wait until the clone is released, and must not keep it from its network.
    if identity.clone_number == 0 {
        names::write(paths, identity, &mut |name, result| {
            steps.note(name, result);
        });
        names::write_id(paths, &id, &mut |name, result| {
            steps.note(name, result);
        });
    } else {
        control.write_later(identity);
    }
    control.become_machine(id);
    // Last: whoever waits for the clock to be changed, such as systemd, wants the CPU then.
    if identity.realtime_ns > 0 {
        let since = u64::try_from(begun.elapsed().as_nanos()).unwrap_or(u64::MAX);
        steps.note("clock", set_clock(identity.realtime_ns.saturating_add(since)).map(|()| None));
    }
    steps.into_ack(reseeded)
}

/// The network. Gives the interfaces as they are now.
fn take_nics(
    paths: &Paths,
    identity: &Identity,
    before: Option<&GuestId>,
    cards: &mut Vec<Card>,
    steps: &mut Steps,
) -> Vec<GuestNic> {
    let known = std::mem::take(cards);
    // A clone that boots anew has forgotten that it is one.
    let boots = identity.clone_number == 0 || before.is_none();
    // All are found before one is changed.
    let before = before.map(|id| &id.nics[..]).filter(|_| !boots).unwrap_or_default();
    let name = |nic: &NicIdentity| Some(before.iter().find(|b| b.index == nic.index)?.name.as_str());
    let known_of = |nic: &NicIdentity| known.iter().find(|k| k.nic.index == nic.index && nic.name.is_none());
    let find = |nic: &NicIdentity| match known_of(nic) {
        Some(card) => Ok(card.name.clone()),
        None => network::find(paths, nic, boots, name(nic)),
    };
    let found: Vec<(&NicIdentity, io::Result<String>)> = identity.nics.iter().map(|nic| (nic, find(nic))).collect();
    let mut lost = Vec::new();
    let mut nics = Vec::new();
    for (nic, name) in found {
        let name = match name {
            Ok(name) => name,
            Err(error) => {
                steps.note(format!("nic {}", nic.index), Err(error));
                continue;
            }
        };
        let (left, card) = network::take(&name, nic, known_of(nic), &mut |part, result| {
            steps.note(format!("{name}: {part}"), result);
        });
        lost.extend(left);
        if let Some(index) = card {
            cards.push(Card { nic: nic.clone(), name: name.clone(), index });
        }
        let (mac, ip, prefix, gateway) = (nic.mac.clone(), nic.ip.clone(), nic.prefix, nic.gateway.clone());
        nics.push(GuestNic { index: nic.index, name, mac, ip, prefix, gateway });
    }
    let servers = name_servers(identity.nics.iter());
    // Those of its parent, mostly. To look at the file takes longer than all addresses.
    if !servers.is_empty() && servers != name_servers(known.iter().map(|card| &card.nic)) {
        steps.note("dns", network::set_dns(paths, &servers));
    }
    if identity.kill_sockets {
        // An address that moved to another interface is still ours.
        lost.retain(|lost| !nics.iter().any(|nic| nic.ip == lost.to_string()));
        steps.note("sockets", network::kill_sockets(&lost));
    }
    nics
}

fn name_servers<'a>(nics: impl Iterator<Item = &'a NicIdentity>) -> Vec<&'a String> {
    let mut servers: Vec<&String> = Vec::new();
    for server in nics.flat_map(|nic| &nic.dns) {
        if !servers.contains(&server) {
            servers.push(server);
        }
    }
    servers
}

fn guest_id(identity: &Identity, reseeded: bool, nics: Vec<GuestNic>) -> GuestId {
    GuestId {
        clone_number: identity.clone_number,
        generation: identity.generation,
        family: identity.family.clone(),
        parent: identity.parent.clone(),
        vm_id: identity.vm_id.clone(),
        name: identity.name.clone(),
        reseeded,
        hostname: identity.hostname.clone(),
        nics,
    }
}

fn reseed(entropy: &str) -> io::Result<()> {
    let invalid = |text: &str| io::Error::new(io::ErrorKind::InvalidInput, text);
    let mut entropy = from_hex(entropy).ok_or_else(|| invalid("the entropy is not hexadecimal"))?;
    if entropy.len() < MIN_ENTROPY {
        return Err(invalid("too little entropy was given"));
    }
    let device = File::options().read(true).write(true).open("/dev/random")?;
    let result = random::add_entropy(&device, &entropy).and_then(|()| random::reseed(&device));
    entropy.fill(0);
    std::hint::black_box(&entropy);
    Ok(result?)
}

fn set_clock(realtime_ns: u64) -> io::Result<()> {
    let invalid = |_| io::Error::new(io::ErrorKind::InvalidInput, "the time is out of range");
    let time = Timespec {
        tv_sec: i64::try_from(realtime_ns / 1_000_000_000).map_err(invalid)?,
        tv_nsec: i64::try_from(realtime_ns % 1_000_000_000).map_err(invalid)?,
    };
    Ok(clock_settime(ClockId::Realtime, time)?)
}

/// `ramet-agent id`.
pub(crate) fn show(paths: &Paths, json: bool) -> ExitCode {
    let path = paths.id();
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) => {
            eprintln!("ramet-agent: this machine has not been told yet who it is ({}: {error})", path.display());
            return ExitCode::FAILURE;
        }
    };
    if json {
        print!("{text}");
        return ExitCode::SUCCESS;
    }
    match serde_json::from_slice::<GuestId>(text.as_bytes()) {
        Ok(id) => {
            println!("name        {}", id.name);
            println!("clone       {}", id.clone_number);
            println!("generation  {}", id.generation);
            println!("vm          {}", id.vm_id);
            println!("parent      {}", id.parent.as_deref().unwrap_or("-"));
            println!("family      {}", id.family);
            println!("reseeded    {}", if id.reseeded { "yes" } else { "NO" });
            if let Some(hostname) = &id.hostname {
                println!("hostname    {hostname}");
            }
            for nic in &id.nics {
                let gateway = nic.gateway.as_ref().map_or(String::new(), |gateway| format!(" by {gateway}"));
                println!("{:<11} {}/{}{gateway}, {}", nic.name, nic.ip, nic.prefix, nic.mac);
            }
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("ramet-agent: cannot understand {}: {error}", path.display());
            ExitCode::FAILURE
        }
    }
}

/// The two requests of `random(4)` that no safe library has.
#[allow(unsafe_code, reason = "two ioctls of /dev/random")]
mod random {
    use rustix::io::Errno;
    use rustix::ioctl::{NoArg, Setter, ioctl, opcode};
    use std::ffi::c_int;
    use std::os::fd::AsFd;

    /// Bytes in one [`PoolInfo`].
    const CHUNK: usize = 64;

    /// `struct rand_pool_info` with its buffer.
    #[repr(C)]
    struct PoolInfo {
        /// Bits to credit.
        entropy_count: c_int,
        /// Bytes in `buffer`.
        buf_size: c_int,
        buffer: [u8; CHUNK],
    }

    // `_IOW('R', 0x03, int[2])` and `_IO('R', 0x07)` of <linux/random.h>.
    const RNDADDENTROPY: rustix::ioctl::Opcode = opcode::write::<[c_int; 2]>(b'R', 0x03);
    const RNDRESEEDCRNG: rustix::ioctl::Opcode = opcode::none(b'R', 0x07);

    /// Mixes bytes into the kernel's pool and credits them.
    pub(super) fn add_entropy(device: impl AsFd, bytes: &[u8]) -> Result<(), Errno> {
        for chunk in bytes.chunks(CHUNK) {
            let size = c_int::try_from(chunk.len()).map_err(|_| Errno::INVAL)?;
            let mut info = PoolInfo { entropy_count: size * 8, buf_size: size, buffer: [0; CHUNK] };
            info.buffer[..chunk.len()].copy_from_slice(chunk);
            // SAFETY: RNDADDENTROPY reads `struct rand_pool_info` and `buf_size` bytes after it, which is what
            // `PoolInfo` is (`repr(C)`, `buf_size` at most `CHUNK`); it writes nothing to our memory.
            unsafe { ioctl(&device, Setter::<RNDADDENTROPY, PoolInfo>::new(info)) }?;
        }
        Ok(())
    }

    /// Makes the generator take the pool's new contents now, on all CPUs.
    pub(super) fn reseed(device: impl AsFd) -> Result<(), Errno> {
        // SAFETY: RNDRESEEDCRNG takes no argument and touches none of our memory.
        unsafe { ioctl(&device, NoArg::<RNDRESEEDCRNG>::new()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn identity() -> Identity {
        Identity {
            clone_number: 3,
            generation: 1,
            family: "f".into(),
            parent: Some("p".into()),
            vm_id: "v".into(),
            name: "web-3".into(),
            entropy: "00".repeat(64),
            realtime_ns: 1,
            ..Identity::default()
        }
    }

    #[test]
    fn the_file_has_everything_but_the_entropy() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths::new(dir.path());
        let nic = GuestNic { name: "eth0".into(), ip: "10.0.0.3".into(), prefix: 24, ..GuestNic::default() };
        names::write_id(&paths, &guest_id(&identity(), true, vec![nic.clone()]), &mut |what, done| {
            done.unwrap_or_else(|error| panic!("{what}: {error}"));
        });
        let text = std::fs::read_to_string(dir.path().join("run/ramet/id")).unwrap();
        assert!(!text.contains("entropy") && !text.contains(&"00".repeat(64)));
        let id: GuestId = serde_json::from_str(&text).unwrap();
        assert_eq!((id.clone_number, id.name.as_str(), id.reseeded), (3, "web-3", true));
        assert_eq!(id.nics, [nic]);
    }

    #[test]
    fn bad_entropy_is_refused() {
        assert!(reseed("zz").is_err());
        assert!(reseed("").is_err());
        assert!(reseed(&"00".repeat(MIN_ENTROPY - 1)).is_err());
    }

    #[test]
    fn one_failed_step_makes_the_whole_not_ok() {
        let mut steps = Steps(Vec::new(), Instant::now());
        assert!(steps.note("a", Ok(Some("as it was".into()))));
        assert!(!steps.note("b", Err(io::ErrorKind::NotFound.into())));
        let ack = steps.into_ack(true);
        assert!(!ack.ok && ack.reseeded && ack.error.unwrap().starts_with("b: "));
        assert_eq!(ack.steps[0].remark.as_deref(), Some("as it was"));
        assert!(Steps(Vec::new(), Instant::now()).into_ack(false).ok);
    }

    #[test]
    fn an_answer_about_very_many_interfaces_fits_into_a_frame() {
        let mut steps = Steps(Vec::new(), Instant::now());
        for _ in 0..1000 {
            steps.note("x", Err(io::Error::other("\u{1}".repeat(2000))));
        }
        assert!(serde_json::to_vec(&steps.into_ack(true)).unwrap().len() <= MAX_PAYLOAD);
    }
}
