//! Who this machine is. A clone has its parent's memory, the state of the kernel's random generator with it: before
//! anything else, the generator gets fresh entropy. If the kernel refuses, the host is told so and nothing is glossed
//! over.

use ramet_guest::protocol::{GuestId, Identity, IdentityAck, MIN_ENTROPY, from_hex};
use rustix::time::{ClockId, Timespec, clock_settime};
use std::fs::File;
use std::io;
use std::path::Path;
use std::process::ExitCode;

/// Where programs in the guest find out who they are; replaced as a whole, so it can be watched.
const PATH: &str = "/run/ramet/id";

/// Takes on an identity.
pub(crate) fn take(json: &[u8]) -> IdentityAck {
    let identity: Identity = match serde_json::from_slice(json) {
        Ok(identity) => identity,
        Err(error) => {
            let error = Some(format!("cannot understand the identity: {error}"));
            return IdentityAck { error, ..IdentityAck::default() };
        }
    };
    let mut errors = Vec::new();
    let mut note = |what: &str, result: io::Result<()>| match result {
        Ok(()) => true,
        Err(error) => {
            errors.push(format!("{what}: {error}"));
            false
        }
    };
    let reseeded = note("cannot reseed the kernel's random generator", reseed(&identity.entropy));
    note("cannot set the clock", set_clock(identity.realtime_ns));
    note(&format!("cannot write {PATH}"), write(Path::new(PATH), &identity, reseeded));
    IdentityAck {
        ok: errors.is_empty(),
        reseeded,
        error: (!errors.is_empty()).then(|| errors.join("; ")),
        steps: Vec::new(),
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

fn write(path: &Path, identity: &Identity, reseeded: bool) -> io::Result<()> {
    let id = GuestId {
        clone_number: identity.clone_number,
        generation: identity.generation,
        family: identity.family.clone(),
        parent: identity.parent.clone(),
        vm_id: identity.vm_id.clone(),
        name: identity.name.clone(),
        reseeded,
        hostname: identity.hostname.clone(),
        nics: Vec::new(),
    };
    if let Some(dir) = path.parent() {
        std::fs::create_dir_all(dir)?;
    }
    let mut json = serde_json::to_vec(&id)?;
    json.push(b'\n');
    let partial = path.with_extension("new");
    std::fs::write(&partial, json)?;
    std::fs::rename(&partial, path)
}

/// `ramet-agent id`.
pub(crate) fn show(json: bool) -> ExitCode {
    let text = match std::fs::read_to_string(PATH) {
        Ok(text) => text,
        Err(error) => {
            eprintln!("ramet-agent: this machine has not been told yet who it is ({PATH}: {error})");
            return ExitCode::FAILURE;
        }
    };
    if json {
        print!("{text}");
        return ExitCode::SUCCESS;
    }
    match serde_json::from_str::<GuestId>(&text) {
        Ok(id) => {
            println!("name        {}", id.name);
            println!("clone       {}", id.clone_number);
            println!("generation  {}", id.generation);
            println!("vm          {}", id.vm_id);
            println!("parent      {}", id.parent.as_deref().unwrap_or("-"));
            println!("family      {}", id.family);
            println!("reseeded    {}", if id.reseeded { "yes" } else { "NO" });
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("ramet-agent: cannot understand {PATH}: {error}");
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
        let path = dir.path().join("ramet/id");
        write(&path, &identity(), true).unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert!(!text.contains("entropy") && !text.contains(&"00".repeat(64)));
        let id: GuestId = serde_json::from_str(&text).unwrap();
        assert_eq!((id.clone_number, id.name.as_str(), id.reseeded), (3, "web-3", true));
    }

    #[test]
    fn bad_entropy_is_refused() {
        assert!(reseed("zz").is_err());
        assert!(reseed("").is_err());
        assert!(reseed(&"00".repeat(MIN_ENTROPY - 1)).is_err());
    }

    #[test]
    fn an_identity_that_is_no_json_is_not_ok() {
        let ack = take(b"{");
        assert!(!ack.ok && !ack.reseeded && ack.error.is_some());
    }
}
