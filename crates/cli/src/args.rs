//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use ramet_client::api::{AccelKind, Egress, Protocol, PublishedPort, Quiesce};
use ramet_memory::ByteSize;

/// Exit codes, as the help tells them.
const EXIT_CODES: &str = "\
Exit codes:
  0    done
  1    failed: the message says what and why
  2    wrong usage
  3    the daemon can't be reached
  125  `exec`: the command could not be run; otherwise `exec` ends with the command's own code
  130  interrupted by Ctrl-C";

/// Fork a running VM: copies here and on other hosts that go on from the very next instruction.
#[derive(Debug, Parser)]
#[command(name = "ramet", version, about, propagate_version = true, after_help = EXIT_CODES)]
#[command(arg_required_else_help = true, subcommand_required = true, max_term_width = 110)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// Options of every command.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Global options")]
pub(crate) struct Global {
    /// Print JSON instead of tables.
    #[arg(long, global = true)]
    pub(crate) json: bool,
    /// The daemon's Unix socket [default: /run/ramet/rametd.sock].
    #[arg(long, global = true, env = "RAMET_SOCKET", value_name = "PATH", conflicts_with = "lab")]
    pub(crate) socket: Option<PathBuf>,
    /// Talk to the first host of this lab.
    #[arg(long, global = true, env = "RAMET_LAB", value_name = "NAME")]
    pub(crate) lab: Option<String>,
    /// Have the daemon pass the command on to this host of its group.
    #[arg(long, global = true, env = "RAMET_HOST", value_name = "NAME")]
    pub(crate) host: Option<String>,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Tell what this machine can do, and what to do about what it can't.
    Doctor(ImageDirArg),
    /// Guest images of this machine.
    #[command(subcommand)]
    Image(ImageCommand),
    /// Boot a VM.
    Run(RunArgs),
    /// List VMs.
    Ps(PsArgs),
    /// Run a command in a VM's guest.
    Exec(ExecArgs),
    /// Copy a file into or out of a guest: one side is VM:PATH.
    Cp(CpArgs),
    /// Attach to a VM's serial console; Ctrl-] leaves.
    Console(VmArg),
    /// Shut VMs down.
    Stop(StopArgs),
    /// Remove VMs.
    Rm(RmArgs),
    /// Memory, page faults and latencies of a VM, or of the host.
    Stats(StatsArgs),
    /// Checkpoint a VM, which goes on; or list, show and remove checkpoints.
    Checkpoint(CheckpointArgs),
    /// Show what memory is used for: kernel, processes, files, free.
    Colors(ColorsArgs),
    /// Make clones of a checkpoint.
    Clone(CloneArgs),
    /// Checkpoint a VM and make clones, in one step.
    Fork(ForkArgs),
    /// Have what clones need made ready before they are asked for.
    Warm(WarmArgs),
    /// Networks with a name, which VMs join by `ramet run --join`.
    #[command(subcommand)]
    Network(NetworkCommand),
    /// Several VMs on several networks, out of one file.
    #[command(subcommand)]
    Topology(TopologyCommand),
    /// Hosts that clone VMs to each other.
    #[command(subcommand)]
    Host(HostCommand),
    /// Several hosts on this machine, to try and test things.
    #[command(subcommand)]
    Lab(LabCommand),
    /// Print completions for a shell.
    Completion(CompletionArgs),
    /// Print the versions of this program and of the daemon.
    Version,
    /// Print this reference as Markdown.
    #[command(hide = true)]
    Reference,
}

/// `ramet image`
#[derive(Debug, Subcommand)]
pub(crate) enum ImageCommand {
    /// Build a guest image out of the distribution's packages.
    Build(ImageBuildArgs),
    /// List images.
    Ls(ImageDirArg),
    /// Remove images.
    Rm(ImageRmArgs),
}

/// Where images are.
#[derive(Debug, Clone, Args)]
pub(crate) struct ImageDirArg {
    /// Directory of the images [default: `images` beside this program's directory, or else /var/lib/ramet/images].
    #[arg(long, env = "RAMET_IMAGE_DIR", value_name = "DIR")]
    pub(crate) image_dir: Option<PathBuf>,
}

impl ImageDirArg {
    pub(crate) fn dir(&self) -> anyhow::Result<PathBuf> {
        match &self.image_dir {
            Some(dir) => Ok(dir.clone()),
            None => Ok(ramet_lab::image_dir(&program_dir()?)),
        }
    }

    pub(crate) fn store(&self) -> anyhow::Result<ramet_image::ImageStore> {
        Ok(ramet_image::ImageStore::new(&self.dir()?))
    }
}

/// The directory of this program.
pub(crate) fn program_dir() -> anyhow::Result<PathBuf> {
    use anyhow::Context as _;
    let program = std::env::current_exe().context("Can't tell where this program is")?;
    Ok(program.parent().map(PathBuf::from).unwrap_or_default())
}

/// `ramet image build`
#[derive(Debug, Args)]
pub(crate) struct ImageBuildArgs {
    /// Name of the image.
    #[arg(default_value = "default")]
    pub(crate) name: String,
    /// Packages of the distribution to add, with what they depend on: python3,nginx.
    #[arg(long, value_delimiter = ',', value_name = "NAME,...")]
    pub(crate) packages: Vec<String>,
    /// Take the kernel and all packages from this suite of the distribution instead of this machine's: trixie,
    /// trixie-backports, sid.
    #[arg(long, value_name = "SUITE")]
    pub(crate) suite: Option<String>,
    /// Install the packages, with systemd, on a disk of the image, instead of unpacking them into memory: services run
    /// as on any Debian machine. Only root can do it.
    #[arg(long)]
    pub(crate) debian: bool,
    /// Size of that disk. What is never written takes no room.
    #[arg(long, default_value = "2G", value_name = "SIZE", requires = "debian")]
    pub(crate) size: ByteSize,
    /// A file or directory of this machine to add.
    #[arg(long, value_name = "PATH:GUESTPATH")]
    pub(crate) add: Vec<String>,
    /// The guest's agent [default: ramet-agent-static or ramet-agent beside this program].
    #[arg(long, value_name = "FILE")]
    pub(crate) agent: Option<PathBuf>,
    /// Make an image of the bare-metal test guest in this file, instead of a Linux one.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["packages", "suite", "debian", "size", "add", "agent"])]
    pub(crate) tiny: Option<PathBuf>,
    /// Replace an image of this name.
    #[arg(long)]
    pub(crate) replace: bool,
    #[command(flatten)]
    pub(crate) dir: ImageDirArg,
}

/// `ramet image rm`
#[derive(Debug, Args)]
pub(crate) struct ImageRmArgs {
    /// Names of images.
    #[arg(required = true)]
    pub(crate) names: Vec<String>,
    #[command(flatten)]
    pub(crate) dir: ImageDirArg,
}

/// One VM.
#[derive(Debug, Args)]
pub(crate) struct VmArg {
    /// Name, id, or the first digits of the id.
    #[arg(value_name = "VM")]
    pub(crate) vm: String,
}

/// What a VM is run on.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Accel {
    /// QEMU's own emulation.
    Tcg,
    /// The kernel's hypervisor.
    Kvm,
}

impl From<Accel> for AccelKind {
    fn from(accel: Accel) -> Self {
        match accel {
            Accel::Tcg => Self::Tcg,
            Accel::Kvm => Self::Kvm,
        }
    }
}

/// How long VMs live.
#[derive(Debug, Clone, Args)]
pub(crate) struct LifeArgs {
    /// Remove the VM after this time, such as 90s, 10m or 2h.
    #[arg(long, value_name = "TIME", value_parser = parse_seconds)]
    pub(crate) ttl: Option<u64>,
    /// Stay, and have what was made removed when this command ends, in whatever way.
    #[arg(long)]
    pub(crate) hold: bool,
}

/// `ramet run`
#[derive(Debug, Args)]
pub(crate) struct RunArgs {
    /// The guest image.
    #[arg(default_value = "default")]
    pub(crate) image: String,
    /// Name of the VM [default: the image's, with a number].
    #[arg(long, short)]
    pub(crate) name: Option<String>,
    /// Guest memory.
    #[arg(long, short, default_value = "512M", value_name = "SIZE")]
    pub(crate) memory: ByteSize,
    /// Virtual CPUs.
    #[arg(long, short, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u8).range(1..))]
    pub(crate) cpus: u8,
    /// QEMU machine type [default: the daemon's].
    #[arg(long, value_name = "TYPE")]
    pub(crate) machine: Option<String>,
    /// What runs the CPUs [default: kvm when usable, else tcg].
    #[arg(long)]
    pub(crate) accel: Option<Accel>,
    /// QEMU CPU model.
    #[arg(long, value_name = "MODEL")]
    pub(crate) cpu: Option<String>,
    /// Words to append to the kernel's command line.
    #[arg(long, value_name = "WORDS")]
    pub(crate) append: Option<String>,
    /// The image whose disk is the root disk, copy-on-write [default: the image's own, when it has one].
    #[arg(long, value_name = "IMAGE")]
    pub(crate) disk: Option<String>,
    /// Size of the root disk, to make it larger than the image's.
    #[arg(long, value_name = "SIZE")]
    pub(crate) disk_size: Option<ByteSize>,
    /// An image whose disk is a data volume: shared by all, and only read.
    #[arg(long, value_name = "IMAGE")]
    pub(crate) volume: Vec<String>,
    /// The private network of the VM and its clones: `nat` (connections outward with the host's address), `none` (nothing
    /// leaves), `off` (no network card) [default: nat with a root disk, off without].
    #[arg(long, value_name = "KIND", conflicts_with = "allow")]
    pub(crate) network: Option<NetworkKind>,
    /// Let connections out to this destination only, such as 10.1.0.0/16:443; may be repeated.
    #[arg(long, value_name = "IP[/PREFIX][:PORT]")]
    pub(crate) allow: Vec<String>,
    /// Limit of what goes in and out of the network, on each host, such as 100mbit.
    #[arg(long, value_name = "SPEED", value_parser = parse_rate)]
    pub(crate) rate: Option<u64>,
    /// Join a network with a name, by a card of its own; may be repeated.
    #[arg(long, value_name = "NETWORK")]
    pub(crate) join: Vec<String>,
    /// Lead a port of the host to the VM: HOSTPORT:PORT, with /udp for UDP.
    #[arg(long, short, value_name = "HOSTPORT:PORT[/udp]", value_parser = parse_publish)]
    pub(crate) publish: Vec<PublishedPort>,
    /// How long to wait for the guest's agent; 0 waits not at all.
    #[arg(long, value_name = "TIME", default_value = "120s", value_parser = parse_seconds)]
    pub(crate) wait: u64,
    #[command(flatten)]
    pub(crate) life: LifeArgs,
}

/// What a network lets out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum NetworkKind {
    /// No network card.
    Off,
    /// Nothing.
    None,
    /// Connections, with the host's address.
    Nat,
}

impl RunArgs {
    /// What the request says of the network.
    pub(crate) fn egress(&self) -> Option<Egress> {
        if !self.allow.is_empty() {
            return Some(Egress::List(self.allow.clone()));
        }
        self.network.map(|kind| match kind {
            NetworkKind::Off => Egress::Off,
            NetworkKind::None => Egress::None,
            NetworkKind::Nat => Egress::Nat,
        })
    }
}

/// What a guest does before a checkpoint.
#[derive(Debug, Clone, Args)]
pub(crate) struct QuiesceArgs {
    /// Have the guest's applications stand still until, in the parent, the checkpoint is taken, and in clones the kernel has
    /// fresh entropy: no two clones then draw equal random numbers.
    #[arg(long)]
    pub(crate) freeze: bool,
    /// Have the guest write its file systems to their disks before.
    #[arg(long)]
    pub(crate) sync: bool,
}

impl QuiesceArgs {
    pub(crate) fn request(&self, no_hooks: bool, limit_s: u64) -> Quiesce {
        Quiesce { hooks: !no_hooks, freeze: self.freeze, sync: self.sync, limit_s }
    }
}

/// `ramet ps`
#[derive(Debug, Args)]
pub(crate) struct PsArgs {
    /// VMs of all hosts.
    #[arg(long, short)]
    pub(crate) all_hosts: bool,
    /// Only names.
    #[arg(long, short)]
    pub(crate) quiet: bool,
}

/// `ramet exec`
#[derive(Debug, Args)]
pub(crate) struct ExecArgs {
    /// Pass standard input on.
    #[arg(long, short)]
    pub(crate) interactive: bool,
    /// Give the command a terminal.
    #[arg(long, short)]
    pub(crate) tty: bool,
    /// Set a variable of the environment.
    #[arg(long, short, value_name = "NAME=VALUE", value_parser = parse_pair)]
    pub(crate) env: Vec<(String, String)>,
    /// Directory to run it in.
    #[arg(long, short, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
    /// The VM: name, id, or the first digits of the id.
    pub(crate) vm: String,
    /// The command and its arguments.
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true, value_name = "COMMAND")]
    pub(crate) command: Vec<String>,
}

/// `ramet cp`
#[derive(Debug, Args)]
pub(crate) struct CpArgs {
    /// From: PATH or VM:PATH.
    pub(crate) source: String,
    /// To: VM:PATH, PATH, or - for standard output.
    pub(crate) target: String,
}

/// `ramet stop`
#[derive(Debug, Args)]
pub(crate) struct StopArgs {
    /// VMs: names, ids, or the first digits of ids.
    #[arg(required = true, value_name = "VM")]
    pub(crate) vms: Vec<String>,
    /// How long a guest may take before its QEMU is ended; 0 ends it at once.
    #[arg(long, value_name = "TIME", default_value = "10s", value_parser = parse_seconds)]
    pub(crate) grace: u64,
}

/// `ramet rm`
#[derive(Debug, Args)]
pub(crate) struct RmArgs {
    /// VMs: names, ids, or the first digits of ids.
    #[arg(required = true, value_name = "VM")]
    pub(crate) vms: Vec<String>,
    /// Remove them even while they run. With `--keep-disk`: do not ask the guest to write its file systems out.
    #[arg(long, short)]
    pub(crate) force: bool,
    /// Keep the disk of a VM that runs, as it is now, as a new image of its host. If that fails, the VM goes on.
    #[arg(long, value_name = "IMAGE")]
    pub(crate) keep_disk: Option<String>,
}

/// `ramet stats`
#[derive(Debug, Args)]
pub(crate) struct StatsArgs {
    /// The VM; the host when left out.
    pub(crate) vm: Option<String>,
    /// Print anew every second, until Ctrl-C.
    #[arg(long, short)]
    pub(crate) watch: bool,
}

/// `ramet checkpoint`
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, arg_required_else_help = true)]
pub(crate) struct CheckpointArgs {
    /// The VM to checkpoint (by its id, when its name is one of these commands).
    pub(crate) vm: Option<String>,
    /// A note to find it again by.
    #[arg(long, requires = "vm")]
    pub(crate) note: Option<String>,
    /// Return only when the copy of what changed has ended, not already when the VM runs again.
    #[arg(long, requires = "vm")]
    pub(crate) wait: bool,
    #[command(flatten)]
    pub(crate) quiesce: QuiesceArgs,
    /// Run no hooks (/etc/ramet/checkpoint.d in the guest).
    #[arg(long)]
    pub(crate) no_hooks: bool,
    /// How long hooks and freezing may take [default: 30s].
    #[arg(long, value_name = "TIME", value_parser = parse_seconds)]
    pub(crate) hook_limit: Option<u64>,
    #[command(subcommand)]
    pub(crate) command: Option<CheckpointCommand>,
}

/// `ramet checkpoint ls|show|rm`
#[derive(Debug, Subcommand)]
pub(crate) enum CheckpointCommand {
    /// List checkpoints.
    Ls,
    /// Show a checkpoint: its layers, sizes, and who uses it.
    Show {
        /// Id, or its first digits.
        checkpoint: String,
    },
    /// Remove checkpoints that nothing uses.
    Rm {
        /// Ids, or their first digits.
        #[arg(required = true, value_name = "CHECKPOINT")]
        checkpoints: Vec<String>,
    },
}

/// How clones are made.
#[derive(Debug, Clone, Args)]
pub(crate) struct SpreadArgs {
    /// How many clones.
    #[arg(long, short = 'n', default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) number: u32,
    /// Hosts to run them on, in turn [default: the checkpoint's].
    #[arg(long, value_delimiter = ',', value_name = "HOST,...")]
    pub(crate) on: Vec<String>,
    /// Names of the clones [default: PARENT-c1, PARENT-c2, ...].
    #[arg(long, value_delimiter = ',', value_name = "NAME,...")]
    pub(crate) name: Vec<String>,
    /// How long to wait for every clone's agent; 0 waits not at all.
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = parse_seconds)]
    pub(crate) wait: u64,
    /// Show where the time went, phase by phase.
    #[arg(long)]
    pub(crate) timeline: bool,
    /// Make new SSH host keys in every clone.
    #[arg(long)]
    pub(crate) ssh_host_keys: bool,
    /// Run no hooks (/etc/ramet/clone.d, and with `fork` /etc/ramet/checkpoint.d, in the guest).
    #[arg(long)]
    pub(crate) no_hooks: bool,
    /// How long hooks may take.
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = parse_seconds)]
    pub(crate) hook_limit: u64,
    /// Release clones even when their kernels can't confirm that they took fresh entropy: their random numbers may then be
    /// those of their siblings. Also of guests without the agent, which get another network card and need a DHCP client.
    #[arg(long)]
    pub(crate) allow_unseeded: bool,
    #[command(flatten)]
    pub(crate) life: LifeArgs,
}

/// `ramet clone`
#[derive(Debug, Args)]
pub(crate) struct CloneArgs {
    /// The checkpoint: id, or its first digits.
    pub(crate) checkpoint: String,
    #[command(flatten)]
    pub(crate) spread: SpreadArgs,
}

/// `ramet warm`
#[derive(Debug, Args)]
pub(crate) struct WarmArgs {
    /// A VM: QEMUs of its shape wait for its forks. Or a checkpoint: clones of it are loaded on its host, and only have
    /// to go on.
    pub(crate) like: String,
    /// How many to keep ready from now on.
    #[arg(long, short = 'n', default_value_t = 1, value_name = "N")]
    pub(crate) number: u32,
    /// Hosts that are to have them [default: the daemon's own].
    #[arg(long, value_delimiter = ',', value_name = "HOST,...")]
    pub(crate) on: Vec<String>,
}

/// `ramet colors`
#[derive(Debug, Args)]
pub(crate) struct ColorsArgs {
    /// A checkpoint: its id, or the first digits of it. Or a VM: a checkpoint of it is made for this, and removed.
    #[arg(value_name = "CHECKPOINT|VM")]
    pub(crate) what: String,
    /// Show what has changed since this checkpoint of the same family instead.
    #[arg(long, value_name = "CHECKPOINT")]
    pub(crate) diff: Option<String>,
    /// Draw the map as a PNG file: a point for each page. With --diff only pages that changed are drawn.
    #[arg(long, value_name = "FILE")]
    pub(crate) png: Option<PathBuf>,
    /// Draw the map as an SVG file.
    #[arg(long, value_name = "FILE")]
    pub(crate) svg: Option<PathBuf>,
    /// How many of the largest files, processes and slab caches to list.
    #[arg(long, default_value_t = 10, value_name = "N")]
    pub(crate) largest: usize,
}

/// `ramet fork`
#[derive(Debug, Args)]
pub(crate) struct ForkArgs {
    /// The VM: name, id, or the first digits of the id.
    pub(crate) vm: String,
    /// A note for the checkpoint.
    #[arg(long)]
    pub(crate) note: Option<String>,
    #[command(flatten)]
    pub(crate) quiesce: QuiesceArgs,
    #[command(flatten)]
    pub(crate) spread: SpreadArgs,
}

/// `ramet host`
#[derive(Debug, Subcommand)]
pub(crate) enum HostCommand {
    /// Make the certificate authority of a new group, with this host as its first.
    Init {
        /// IP:PORT that other hosts reach this one at [default: what rametd listens on].
        #[arg(long)]
        address: Option<String>,
    },
    /// Make a token with which one more host can join.
    Token {
        /// How long it can be used.
        #[arg(long, value_name = "TIME", default_value = "10m", value_parser = parse_seconds)]
        ttl: u64,
    },
    /// Make this host a member of the token's group.
    Join {
        /// From `ramet host token` on a host of the group; - reads it from standard input.
        token: String,
        /// IP:PORT that other hosts reach this one at [default: what rametd listens on].
        #[arg(long)]
        address: Option<String>,
    },
    /// List hosts, and whether they answer.
    Ls,
    /// Have a host take no new VMs, and tell what is left on it.
    Drain {
        /// The host [default: this one].
        name: Option<String>,
        /// Take new VMs again.
        #[arg(long)]
        undo: bool,
    },
}

/// `ramet network`
#[derive(Debug, Subcommand)]
pub(crate) enum NetworkCommand {
    /// Make a network on this host.
    Create {
        /// Its name.
        name: String,
        /// What it lets out.
        #[arg(long, default_value = "none", value_name = "KIND")]
        network: NetworkKind,
        /// Limit of what goes in and out of it, such as 100mbit.
        #[arg(long, value_name = "SPEED", value_parser = parse_rate)]
        rate: Option<u64>,
    },
    /// List networks with a name, and who has joined them.
    Ls,
    /// Remove networks that no VM has joined.
    Rm {
        /// Names of networks.
        #[arg(required = true, value_name = "NAME")]
        names: Vec<String>,
    },
}

/// `ramet topology`
#[derive(Debug, Subcommand)]
pub(crate) enum TopologyCommand {
    /// Make the networks of a file and boot its VMs: all, or nothing.
    Up {
        /// The file (TOML): tables `[networks.NAME]` and `[vms.NAME]`.
        file: PathBuf,
    },
    /// Remove the VMs of a file and its networks.
    Down {
        /// The file.
        file: PathBuf,
    },
}

/// `ramet lab`
#[derive(Debug, Subcommand)]
pub(crate) enum LabCommand {
    /// Make hosts as network namespaces on this machine, each with its own rametd.
    Up {
        /// Name of the lab.
        #[arg(long, short, default_value = "lab")]
        name: String,
        /// How many hosts.
        #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=64))]
        hosts: u8,
        /// Speed of each host's link, such as 1gbit.
        #[arg(long, value_name = "SPEED")]
        link: Option<ramet_lab::Rate>,
        /// Delay of each host's link, one way, such as 2ms.
        #[arg(long, value_name = "TIME", value_parser = ramet_lab::parse_delay)]
        delay: Option<std::time::Duration>,
        /// Directory of the guest images.
        #[arg(long, env = "RAMET_IMAGE_DIR", value_name = "DIR")]
        image_dir: Option<PathBuf>,
    },
    /// End a lab with all its VMs, and remove every trace.
    Down {
        /// Name of the lab.
        #[arg(long, short, default_value = "lab")]
        name: String,
        /// Only the labs of programs that were killed.
        #[arg(long, conflicts_with = "name")]
        stale: bool,
    },
    /// List labs.
    Ls,
}

/// `ramet completion`
#[derive(Debug, Args)]
pub(crate) struct CompletionArgs {
    /// The shell.
    pub(crate) shell: clap_complete::Shell,
}

fn parse_pair(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("expected NAME=VALUE".to_owned()),
    }
}

/// `8080:80`, `53:53/udp`.
pub(crate) fn parse_publish(text: &str) -> Result<PublishedPort, String> {
    let wrong = || "expected HOSTPORT:PORT, such as 8080:80 or 53:53/udp".to_owned();
    let (ports, protocol) = match text.split_once('/') {
        None => (text, Protocol::Tcp),
        Some((ports, "tcp")) => (ports, Protocol::Tcp),
        Some((ports, "udp")) => (ports, Protocol::Udp),
        Some(_) => return Err(wrong()),
    };
    let (host, guest) = ports.split_once(':').ok_or_else(wrong)?;
    let port = |text: &str| text.parse::<u16>().ok().filter(|p| *p > 0).ok_or_else(wrong);
    Ok(PublishedPort { protocol, host_port: port(host)?, guest_port: port(guest)? })
}

/// Bits a second of `100mbit`, `1gbit`.
fn parse_rate(text: &str) -> Result<u64, String> {
    text.parse::<ramet_lab::Rate>().map(|rate| rate.0).map_err(|err| err.to_string())
}

/// Seconds of `90`, `90s`, `10m`, `2h`, `1d`.
fn parse_seconds(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "" | "s" => 1,
        "m" => 60,
        "h" => 3600,
        "d" => 86400,
        _ => return Err("expected a time such as 90s, 10m or 2h".to_owned()),
    };
    let number: u64 = digits.parse().map_err(|_| "expected a time such as 90s, 10m or 2h".to_owned())?;
    number.checked_mul(unit).ok_or_else(|| "too long".to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory as _;

    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split_whitespace())
    }

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn options_of_the_guests_command_are_its_own() {
        let Command::Exec(exec) = parse("ramet exec -i web -- ls -l --json").unwrap().command else { panic!() };
        assert!(exec.interactive && !exec.tty);
        assert_eq!(exec.command, ["ls", "-l", "--json"]);
        let cli = parse("ramet exec web ls --json").unwrap();
        assert!(!cli.global.json, "what follows the command is the command's");
    }

    #[test]
    fn a_checkpoint_is_made_or_asked_about() {
        let Command::Checkpoint(made) = parse("ramet checkpoint web --wait").unwrap().command else { panic!() };
        assert_eq!((made.vm.as_deref(), made.wait), (Some("web"), true));
        let Command::Checkpoint(asked) = parse("ramet checkpoint rm abcd ef01").unwrap().command else { panic!() };
        assert!(matches!(asked.command, Some(CheckpointCommand::Rm { checkpoints }) if checkpoints.len() == 2));
        assert!(parse("ramet checkpoint").is_err());
    }

    #[test]
    fn forks_are_spread_over_hosts() {
        let Command::Fork(fork) = parse("ramet fork web -n 8 --on h1,h2 --on h3 --ttl 10m --timeline").unwrap().command
        else {
            panic!()
        };
        assert_eq!(fork.spread.number, 8);
        assert_eq!(fork.spread.on, ["h1", "h2", "h3"]);
        assert_eq!(fork.spread.life.ttl, Some(600));
        assert!(parse("ramet fork web -n 0").is_err());
    }

    #[test]
    fn networks_and_ports_are_understood() {
        let Command::Run(run) =
            parse("ramet run web --network none -p 8080:80 -p 53:5353/udp --rate 10mbit").unwrap().command
        else {
            panic!()
        };
        assert_eq!(run.egress(), Some(Egress::None));
        assert_eq!(
            (run.publish[1].host_port, run.publish[1].guest_port, run.publish[1].protocol),
            (53, 5353, Protocol::Udp)
        );
        assert_eq!(run.rate, Some(10_000_000));
        let Command::Run(run) = parse("ramet run web --allow 10.0.0.0/8:443").unwrap().command else { panic!() };
        assert_eq!(run.egress(), Some(Egress::List(vec!["10.0.0.0/8:443".to_owned()])));
        for bad in ["80", "0:80", "8080:80/icmp", "8080:70000"] {
            assert!(parse(&format!("ramet run -p {bad}")).is_err(), "{bad}");
        }
        assert!(parse("ramet run --allow 10.0.0.1 --network nat").is_err());
    }

    #[test]
    fn times_have_units() {
        for (text, seconds) in [("90", 90), ("90s", 90), ("10m", 600), ("2h", 7200), ("1d", 86400), ("0", 0)] {
            assert_eq!(parse_seconds(text), Ok(seconds));
        }
        for bad in ["", "s", "1w", "-1s", "1.5h", "99999999999999999d"] {
            assert!(parse_seconds(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_size_is_a_disks() {
        let build = |line: &str| match parse(line).map(|cli| cli.command) {
            Ok(Command::Image(ImageCommand::Build(args))) => Some(args),
            _ => None,
        };
        let plain = build("ramet image build web --packages nginx").unwrap();
        assert!(!plain.debian);
        let debian = build("ramet image build web --debian --packages apache2,php-fpm --suite trixie").unwrap();
        assert!(debian.debian && debian.packages == ["apache2", "php-fpm"]);
        assert_eq!(debian.size.bytes(), ramet_image::DEFAULT_DISK_SIZE);
        assert_eq!(build("ramet image build --debian --size 512M").unwrap().size, ByteSize::mib(512));
        assert!(build("ramet image build tiny --tiny /x").is_some());
        for bad in ["--size 1G", "--debian --size much", "--debian --tiny /x"] {
            assert!(build(&format!("ramet image build x {bad}")).is_none(), "{bad}");
        }
    }

    #[test]
    fn one_daemon_at_a_time() {
        assert!(parse("ramet ps --socket /x --lab y").is_err());
        assert!(parse("ramet run --memory lots").is_err());
        assert!(parse("ramet run --cpus 0").is_err());
    }
}
