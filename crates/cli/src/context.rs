//! What every command needs: which daemon, and how to print.

use std::path::{Path, PathBuf};

use anyhow::Result;
use ramet_client::Client;

use crate::{args::Global, output::Output};

/// Where a packaged daemon listens.
const SOCKET: &str = "/run/ramet/rametd.sock";

/// What every command needs.
#[derive(Debug)]
pub(crate) struct Context {
    socket: PathBuf,
    host: Option<String>,
    pub(crate) out: Output,
}

impl Context {
    pub(crate) fn new(global: &Global) -> Self {
        let socket = match (&global.lab, &global.socket) {
            (Some(lab), _) => Path::new(ramet_lab::ROOT).join(lab).join("h1/rametd.sock"),
            (None, Some(socket)) => socket.clone(),
            (None, None) => SOCKET.into(),
        };
        Self { socket, host: global.host.clone(), out: Output::new(global.json) }
    }

    /// The daemon, or with `--host` the one that it passes calls on to.
    pub(crate) fn client(&self) -> Result<Client> {
        let client = self.local_client();
        match &self.host {
            Some(host) => Ok(client.on_host(host)?),
            None => Ok(client),
        }
    }

    /// The daemon behind the socket, whatever `--host` says.
    pub(crate) fn local_client(&self) -> Client {
        Client::unix(&self.socket)
    }
}
