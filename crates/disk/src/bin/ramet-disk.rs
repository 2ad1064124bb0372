//! `ramet-disk`: serves one family's frozen disks on one host. Started and supervised by rametd.

use anyhow::Context;
use clap::Parser;
use ramet_disk::{
    host::{Host, Settings},
    listener, serve,
    source::SourceConfig,
};
use ramet_memory::FamilyId;
use ramet_wire::{Listener, Options, TlsFiles};
use std::{net::SocketAddr, path::PathBuf, time::Duration};

/// Serves the frozen disks of one family of VMs on this host.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// The family.
    #[arg(long)]
    family: FamilyId,
    /// Directory for sockets, caches and the record. It is made where it is missing.
    #[arg(long)]
    dir: PathBuf,
    /// Unix socket for rametd; `control.sock` in the directory where nothing is said.
    #[arg(long)]
    control: Option<PathBuf>,
    /// Address to serve pages at; port 0 chooses one, and keeps it over restarts.
    #[arg(long, requires = "tls")]
    listen: Option<SocketAddr>,
    /// Directory of this host's certificates: ca.pem, host.pem, host.key.
    #[arg(long, alias = "tls-dir")]
    tls: Option<PathBuf>,
    /// This host's name.
    #[arg(long, default_value = "localhost")]
    host: String,
    /// KiB that are fetched from another host at once.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u64).range(4..=2048))]
    fetch_kib: u64,
    /// Seconds without a read after which an export of a frozen disk ends.
    #[arg(long, default_value_t = 60)]
    idle_s: u64,
    /// Seconds after which a silent source is left for the next one.
    #[arg(long, default_value_t = SourceConfig::SILENT.as_secs(), value_parser = clap::value_parser!(u64).range(1..))]
    silent_s: u64,
}

fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::try_from_env("RAMET_LOG").unwrap_or_else(|_| "info".into()))
        .with_writer(std::io::stderr)
        .init();
    let arguments = Arguments::parse();
    let family = arguments.family;
    let options = Options::default();
    let tls =
        arguments.tls.as_deref().map(|dir| TlsFiles::in_dir(dir).load()).transpose().context("load certificates")?;
    let config = SourceConfig {
        family,
        host: arguments.host.clone(),
        tls: tls.clone(),
        options: options.clone(),
        silent: Duration::from_secs(arguments.silent_s),
    };
    let settings =
        Settings { fetch_pages: arguments.fetch_kib.div_ceil(4), idle: Duration::from_secs(arguments.idle_s.max(1)) };
    let disks = Host::open(&arguments.dir, config, settings)
        .with_context(|| format!("take over the disks of {}", arguments.dir.display()))?;
    let mut listen = None;
    if let (Some(addr), Some(tls)) = (arguments.listen, tls) {
        let page_listener =
            Listener::bind_again(addr, &arguments.dir, &tls, &options).with_context(|| format!("listen at {addr}"))?;
        listen = Some(page_listener.local_addr().to_string());
        let (disks, host) = (disks.clone(), arguments.host);
        std::thread::Builder::new()
            .name("accept".into())
            .spawn(move || serve::serve(&page_listener, &disks, family, &host))
            .context("start the page server")?;
    }
    tracing::info!(%family, listen, "disks are ready");
    let control = arguments.control.unwrap_or_else(|| arguments.dir.join("control.sock"));
    listener::serve(&control, &disks, listen.as_deref()).context("serve the control socket")
}
