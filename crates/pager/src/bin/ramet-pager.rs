//! `ramet-pager`: serves one family's memory on one host. Started and supervised by rametd.

use anyhow::Context;
use clap::Parser;
use ramet_memory::FamilyId;
use ramet_pager::{family::Family, listener, server, source::SourceConfig};
use ramet_wire::stream::{Listener, Options, TlsFiles};
use std::{net::SocketAddr, path::PathBuf};

/// Serves the memory of one family of VMs on this host.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Directory of the family, named by its identifier, on a tmpfs without huge pages.
    #[arg(long)]
    family_dir: PathBuf,
    /// Unix socket for rametd.
    #[arg(long)]
    control: PathBuf,
    /// Address to serve pages at; port 0 chooses one, and keeps it over restarts.
    #[arg(long, requires = "tls")]
    listen: Option<SocketAddr>,
    /// Directory of this host's certificates: ca.pem, host.pem, host.key.
    #[arg(long)]
    tls: Option<PathBuf>,
    /// This host's name.
    #[arg(long, default_value = "localhost")]
    host: String,
}

fn main() -> anyhow::Result<()> {
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::try_from_env("RAMET_LOG").unwrap_or_else(|_| "info".into()))
        .with_writer(std::io::stderr)
        .init();
    let arguments = Arguments::parse();
    let id: FamilyId = arguments
        .family_dir
        .file_name()
        .and_then(|n| n.to_str())
        .context("the family's directory has no name")?
        .parse()
        .context("read the family from its directory's name")?;
    let options = Options::default();
    let tls =
        arguments.tls.as_deref().map(|dir| TlsFiles::in_dir(dir).load()).transpose().context("load certificates")?;
    let sources = SourceConfig { family: id, host: arguments.host.clone(), tls: tls.clone(), options: options.clone() };
    let family = Family::open(&arguments.family_dir, sources)?;
    family.restore().context("take over from the pager before")?;
    let mut listen = None;
    if let (Some(addr), Some(tls)) = (arguments.listen, tls) {
        let page_listener = Listener::bind_again(addr, &arguments.family_dir, &tls, &options)
            .with_context(|| format!("listen at {addr}"))?;
        listen = Some(page_listener.local_addr().to_string());
        let (family, host) = (family.clone(), arguments.host);
        std::thread::Builder::new()
            .name("accept".into())
            .spawn(move || server::serve(&page_listener, &family, id, &host))
            .context("start the page server")?;
    }
    tracing::info!(family = %id, listen, "pager is ready");
    listener::serve(&arguments.control, &family, listen.as_deref()).context("serve the control socket")
}
