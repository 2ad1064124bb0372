//! What a lab is to be like.

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

/// Longest name of a lab: sockets below its directory must stay under the kernel's 108 bytes.
const MAX_NAME: usize = 24;
/// Most hosts of a lab.
const MAX_HOSTS: u8 = 64;

/// A link's speed in bits per second, as `tc` writes it: `1gbit`, `250mbit`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Rate(
    /// Bits per second.
    pub u64,
);

impl FromStr for Rate {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self> {
        let lower = text.trim().to_ascii_lowercase();
        let digits = lower.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let factor = match &lower[digits.len()..] {
            "bit" => 1,
            "kbit" => 1_000,
            "mbit" => 1_000_000,
            "gbit" => 1_000_000_000,
            _ => bail!("'{text}' is no link speed: write it like 1gbit or 250mbit"),
        };
        let number: u64 = digits.parse().with_context(|| format!("'{text}' is no link speed: write it like 1gbit"))?;
        let bits = number.checked_mul(factor).with_context(|| format!("'{text}' is too fast for a link"))?;
        if bits < 8_000 {
            bail!("'{text}' is too slow for a link: 8kbit is the least");
        }
        Ok(Self(bits))
    }
}

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (unit, name) in [(1_000_000_000, "gbit"), (1_000_000, "mbit"), (1_000, "kbit")] {
            if self.0.is_multiple_of(unit) && self.0 > 0 {
                return write!(f, "{}{name}", self.0 / unit);
            }
        }
        write!(f, "{}bit", self.0)
    }
}

/// Reads a delay such as `2ms` or `500us`.
///
/// # Errors
/// When it is none, or over 10 s.
pub fn parse_delay(text: &str) -> Result<Duration> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 = digits.parse().with_context(|| format!("'{text}' is no delay: write it like 2ms or 500us"))?;
    let micros = match &text[digits.len()..] {
        "us" => Some(number),
        "ms" => number.checked_mul(1_000),
        "s" => number.checked_mul(1_000_000),
        _ => bail!("'{text}' is no delay: write it like 2ms or 500us"),
    };
    match micros {
        Some(micros) if micros <= 10_000_000 => Ok(Duration::from_micros(micros)),
        _ => bail!("'{text}' is too long for a delay: 10s is the most"),
    }
}

/// What a lab is to be like.
#[derive(Debug, Clone)]
pub struct LabOptions {
    /// Its name: 1 to 24 of `a-z 0-9 -`, beginning with a letter.
    pub name: String,
    /// How many hosts.
    pub hosts: u8,
    /// Speed of each host's link, either way; none: as fast as the machine.
    pub link: Option<Rate>,
    /// Delay of each host's link, one way: two hosts are twice this delay apart, each way.
    pub delay: Option<Duration>,
    /// Directory of `rametd` and the programs beside it.
    pub bin_dir: PathBuf,
    /// Directory of the guest images.
    pub image_dir: PathBuf,
    /// Hosts, by number, that have a directory of images of their own, which is empty.
    pub without_images: Vec<u8>,
    /// Group that may use the daemons' sockets.
    pub group: Option<String>,
    /// Further arguments of every `rametd`.
    pub daemon_args: Vec<String>,
    /// The lab ends with this process: when it was killed, the next [`crate::Lab::sweep`] removes the lab.
    pub ephemeral: bool,
}

/// Where guest images are, for programs in `bin_dir`: `RAMET_IMAGE_DIR`, or `images` beside that directory (where this
/// repository's set-up puts them), or else `/var/lib/ramet/images`.
#[must_use]
pub fn image_dir(bin_dir: &Path) -> PathBuf {
    if let Some(dir) = std::env::var_os("RAMET_IMAGE_DIR") {
        return dir.into();
    }
    let beside = bin_dir.parent().unwrap_or(Path::new("/")).join("images");
    if beside.is_dir() { beside } else { "/var/lib/ramet/images".into() }
}

impl LabOptions {
    /// Three hosts, programs from the directory of the running program (or the one above its `deps`), images from
    /// [`image_dir`].
    ///
    /// # Errors
    /// When the running program's directory can't be found out.
    pub fn new(name: impl Into<String>) -> Result<Self> {
        let program = std::env::current_exe().context("Can't find out where this program is")?;
        let mut bin_dir = program.parent().unwrap_or(Path::new("/")).to_owned();
        if bin_dir.ends_with("deps") || bin_dir.ends_with("examples") {
            bin_dir.pop();
        }
        let image_dir = image_dir(&bin_dir);
        Ok(Self {
            name: name.into(),
            hosts: 3,
            link: None,
            delay: None,
            bin_dir,
            image_dir,
            without_images: Vec::new(),
            group: None,
            daemon_args: Vec::new(),
            ephemeral: false,
        })
    }

    /// The same for a test: the name is made unique and the lab ends with this process.
    ///
    /// # Errors
    /// As [`LabOptions::new`].
    pub fn for_test(name: &str) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let mut short: String = name.chars().take(10).collect();
        short = short.trim_end_matches('-').to_owned();
        Ok(Self { ephemeral: true, ..Self::new(format!("{short}-{}-{number}", std::process::id()))? })
    }

    /// The same with so many hosts.
    #[must_use]
    pub fn hosts(mut self, hosts: u8) -> Self {
        self.hosts = hosts;
        self
    }

    /// The same, but this host has no guest images.
    #[must_use]
    pub fn without_images(mut self, host: u8) -> Self {
        self.without_images.push(host);
        self
    }

    /// The same with one more argument for every `rametd`.
    #[must_use]
    pub fn daemon_arg(mut self, arg: impl Into<String>) -> Self {
        self.daemon_args.push(arg.into());
        self
    }

    pub(crate) fn check(&self) -> Result<()> {
        check_name(&self.name)?;
        if !(1..=MAX_HOSTS).contains(&self.hosts) {
            bail!("A lab has 1 to {MAX_HOSTS} hosts, not {}", self.hosts);
        }
        let daemon = self.bin_dir.join("rametd");
        if !daemon.is_file() {
            bail!(
                "{} is missing: build the workspace (`cargo xtask setup`), or name the directory of the programs",
                daemon.display()
            );
        }
        Ok(())
    }
}

/// Refuses what is no name of a lab: it becomes part of names of namespaces and directories.
pub(crate) fn check_name(name: &str) -> Result<()> {
    let good = (1..=MAX_NAME).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && name.as_bytes()[0].is_ascii_lowercase();
    if !good {
        bail!(
            "'{}' is no name for a lab: use 1 to {MAX_NAME} of a-z, 0-9 and '-', beginning with a letter",
            name.escape_debug()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rates_are_read_and_written() {
        for (text, bits) in [("1gbit", 1_000_000_000), ("250mbit", 250_000_000), ("64Kbit", 64_000)] {
            let rate: Rate = text.parse().unwrap();
            assert_eq!(rate.0, bits);
            assert_eq!(rate.to_string(), text.to_lowercase());
        }
        for bad in ["", "1", "1g", "fast", "-1gbit", "1.5gbit", "99999999999999gbit", "1bit"] {
            let err = bad.parse::<Rate>().unwrap_err().to_string();
            assert!(err.contains(bad), "{err}");
        }
    }

    #[test]
    fn delays_are_read() {
        assert_eq!(parse_delay("2ms").unwrap(), Duration::from_millis(2));
        assert_eq!(parse_delay("500us").unwrap(), Duration::from_micros(500));
        for bad in ["", "2", "ms", "-2ms", "11s", "2 ms", "99999999999999999999ms"] {
            assert!(parse_delay(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn names_that_would_leave_the_directory_are_refused() {
        for good in ["a", "lab", "lab-2"] {
            check_name(good).unwrap();
        }
        for bad in ["", "..", "a/b", "A", "1a", "-a", "a b", "a_b", &"x".repeat(25)] {
            assert!(check_name(bad).unwrap_err().to_string().contains("no name for a lab"), "{bad}");
        }
    }

    #[test]
    fn tests_get_legal_names_of_their_own() {
        let (a, b) = (LabOptions::for_test("a-very-long-name").unwrap(), LabOptions::for_test("x").unwrap());
        assert_ne!(a.name, b.name);
        check_name(&a.name).unwrap();
        check_name(&b.name).unwrap();
        assert!(a.ephemeral);
    }
}
