//! `rametd`: the daemon of one host.

use std::{net::SocketAddr, path::PathBuf, process::ExitCode};

use anyhow::Context as _;
use clap::{Parser, ValueEnum};
use ramet_client::api::AccelKind;
use ramet_host::{
    api::{Server, openapi, serve},
    backend,
    config::{Config, QEMU_UID},
    daemon::{Daemon, Ending},
};
use ramet_memory::ByteSize;
use tokio::signal::unix::{SignalKind, signal};

/// The port that hosts reach each other at, unless told otherwise.
const PORT: u16 = 7391;

/// What is logged unless told otherwise. To the WireGuard library a host that is down is an error.
const LOG: &str = "info,boringtun=off";

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Accel {
    Tcg,
    Kvm,
}

/// Forks running virtual machines: the daemon of one host.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// This host's name in its group. Default: the machine's hostname.
    #[arg(long, env = "RAMET_HOST_NAME")]
    name: Option<String>,
    /// Where state, sockets, page files and certificates are.
    #[arg(long, env = "RAMET_STATE_DIR", default_value = "/run/ramet")]
    state_dir: PathBuf,
    /// The API's Unix socket. Default: rametd.sock in the state directory.
    #[arg(long, env = "RAMET_SOCKET")]
    socket: Option<PathBuf>,
    /// Group that may use the socket, by name or number.
    #[arg(long)]
    group: Option<String>,
    /// IP or IP:PORT for other hosts, once trust is set up (`ramet host init`). Default port: 7391.
    #[arg(long, value_parser = listen_address)]
    listen: Option<SocketAddr>,
    /// Where guest images are. Default: /var/lib/ramet/images, as for `ramet image`.
    #[arg(long, env = "RAMET_IMAGE_DIR")]
    image_dir: Option<PathBuf>,
    /// Where overlays of VMs' disks are: on a disk with room, not in memory.
    #[arg(long, env = "RAMET_DISK_DIR")]
    disk_dir: Option<PathBuf>,
    /// Merge layers of a VM's disk into one, in the background, when they are this many; 0: never.
    #[arg(long, value_name = "N", default_value_t = ramet_host::config::MERGE_LAYERS)]
    merge_layers: usize,
    /// Network whose addresses VMs get, the same in every family: a prefix of 10 or shorter. Default: 100.64.0.0/10. All
    /// hosts of a group must have the same.
    #[arg(long, value_name = "NETWORK")]
    guest_network: Option<ramet_net::Subnet>,
    /// Encrypt what VMs on different hosts say to each other (WireGuard, UDP port 7392). All hosts of a group must do so,
    /// or none. Needs --listen with an IPv4 address.
    #[arg(long)]
    encrypt_tunnel: bool,
    /// Where ramet-pager and libramet_shim.so are. Default: where rametd is.
    #[arg(long)]
    bin_dir: Option<PathBuf>,
    /// QEMU's binary.
    #[arg(long, default_value = "qemu-system-x86_64")]
    qemu: PathBuf,
    /// User and group number that QEMU runs as. Default: 64055 when rametd runs as root.
    #[arg(long, value_name = "UID")]
    qemu_user: Option<u32>,
    /// Do not use QEMU's own sandbox.
    #[arg(long)]
    no_sandbox: bool,
    /// What new VMs run on. Default: KVM when it is usable, else TCG.
    #[arg(long)]
    accel: Option<Accel>,
    /// QEMU machine type of new VMs.
    #[arg(long)]
    machine: Option<String>,
    /// Pre-started QEMUs to keep for each shape of VM; 0: none.
    #[arg(long, default_value_t = 2)]
    pool: u32,
    /// Size of the file system of page files. Default: three quarters of memory.
    #[arg(long)]
    pages_size: Option<ByteSize>,
    /// Most clones of one call.
    #[arg(long)]
    max_clones: Option<u32>,
    /// Most VMs on this host.
    #[arg(long)]
    max_vms: Option<u32>,
    /// Most generations of clones of clones.
    #[arg(long)]
    max_depth: Option<u32>,
    /// Most memory of one VM.
    #[arg(long)]
    max_memory: Option<ByteSize>,
    /// End all VMs and pagers when told to end by a signal. Otherwise they go on without the daemon.
    #[arg(long)]
    stop_vms_on_exit: bool,
    /// Print the OpenAPI document and end.
    #[arg(long)]
    print_openapi: bool,
    /// Tell what this host can do, as JSON, and end.
    #[arg(long)]
    doctor: bool,
}

fn listen_address(text: &str) -> Result<SocketAddr, String> {
    text.parse()
        .or_else(|_| text.parse().map(|ip| SocketAddr::new(ip, PORT)))
        .map_err(|_| format!("'{text}' is neither IP nor IP:PORT"))
}

fn configure(arguments: Arguments) -> anyhow::Result<Config> {
    let name = match arguments.name {
        Some(name) => name,
        None => rustix::system::uname().nodename().to_string_lossy().to_ascii_lowercase().replace(['.', '_'], "-"),
    };
    let mut config = Config::new(name, arguments.state_dir)?;
    if let Some(socket) = arguments.socket {
        config.socket = socket;
    }
    if let Some(dir) = arguments.image_dir {
        config.image_dir = dir;
    }
    if let Some(dir) = arguments.disk_dir {
        config.disk_dir = dir;
    }
    config.merge_layers = arguments.merge_layers;
    if let Some(network) = arguments.guest_network {
        config.guest_network = network;
    }
    config.encrypt_tunnel = arguments.encrypt_tunnel;
    if let Some(dir) = arguments.bin_dir {
        config.bin_dir = dir;
    }
    if let Some(machine) = arguments.machine {
        config.machine = machine;
    }
    let root = rustix::process::geteuid().is_root();
    config.qemu_user = match arguments.qemu_user {
        Some(0) => None,
        Some(id) => Some((id, id)),
        None if root => Some((QEMU_UID, QEMU_UID)),
        None => None,
    };
    config.group = arguments.group;
    config.listen = arguments.listen;
    config.qemu = arguments.qemu;
    config.sandbox = !arguments.no_sandbox;
    config.accel = arguments.accel.map(|accel| match accel {
        Accel::Tcg => AccelKind::Tcg,
        Accel::Kvm => AccelKind::Kvm,
    });
    config.pool = arguments.pool;
    config.pages_size = arguments.pages_size;
    config.stop_vms_on_exit = arguments.stop_vms_on_exit;
    let limits = &mut config.limits;
    limits.clones_per_call = arguments.max_clones.unwrap_or(limits.clones_per_call);
    limits.vms = arguments.max_vms.unwrap_or(limits.vms);
    limits.depth = arguments.max_depth.unwrap_or(limits.depth);
    limits.vm_memory = arguments.max_memory.unwrap_or(limits.vm_memory);
    config.validate()
}

async fn run(config: Config) -> anyhow::Result<()> {
    let on_signal = if config.stop_vms_on_exit { Ending::StopVms } else { Ending::LeaveVms };
    std::fs::create_dir_all(&config.state_dir)
        .with_context(|| format!("Failed to make {}", config.state_dir.display()))?;
    let held = hold(&config)?;
    let daemon = Daemon::open(config)?;
    daemon.recover().await;
    let server = Server::open(daemon.clone())?;
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    tracing::info!(name = daemon.config.name, socket = %daemon.config.socket.display(), "rametd is ready");
    let ended = tokio::select! {
        served = serve(server) => served.map(|()| None),
        _ = term.recv() => Ok(Some(on_signal)),
        _ = int.recv() => Ok(Some(on_signal)),
    };
    let how = match &ended {
        Ok(Some(how)) => *how,
        Ok(None) => daemon.ended().await,
        Err(_) => Ending::LeaveVms,
    };
    daemon.close(how).await;
    drop(held);
    ended.map(drop)
}

/// Only one daemon at a time has a state directory.
fn hold(config: &Config) -> anyhow::Result<std::fs::File> {
    let path = config.state_dir.join("rametd.lock");
    let file = std::fs::File::create(&path).with_context(|| format!("Failed to open {}", path.display()))?;
    rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive)
        .with_context(|| format!("Another rametd has {}: stop it, or give --state-dir", config.state_dir.display()))?;
    Ok(file)
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.print_openapi {
        print!("{}", openapi::document());
        return ExitCode::SUCCESS;
    }
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::try_from_env("RAMET_LOG").unwrap_or_else(|_| LOG.into()))
        .with_writer(std::io::stderr)
        .init();
    let doctor = arguments.doctor;
    let result = configure(arguments).and_then(|config| {
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        if doctor {
            let report = runtime.block_on(backend::doctor(&config));
            println!("{}", serde_json::to_string_pretty(&report)?);
            return Ok(());
        }
        runtime.block_on(run(config))
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(err) => {
            eprintln!("rametd: {err:#}");
            ExitCode::FAILURE
        }
    }
}
