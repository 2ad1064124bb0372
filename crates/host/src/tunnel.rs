//! Encrypted tunnels between hosts: this host's key, and how hosts learn each other's.
//!
//! A host tells its public key over the API between hosts, whose certificates say who tells it. Keys of others are kept
//! with their addresses, so a daemon that starts again need not ask before members reach each other.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::Path,
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use ramet_client::api::{ErrorCode, PeerTunnel};
use ramet_net::{TunnelKey, TunnelSecret, secure_address};

use crate::{
    config::Config,
    daemon::{Daemon, all},
    error::{ApiError, ApiResult},
    peers::ask,
};

/// How long another host may take to tell its key, when a fork needs it.
pub(crate) const NEEDED: Duration = Duration::from_secs(30);
/// How long it may take when it is one of several.
const TELL: Duration = Duration::from_secs(3);

/// A key as it is written.
pub(crate) fn encode(key: TunnelKey) -> String {
    STANDARD.encode(key.0)
}

/// A key that was written by [`encode`].
pub(crate) fn decode(text: &str) -> Option<TunnelKey> {
    Some(TunnelKey(STANDARD.decode(text).ok()?.try_into().ok()?))
}

/// The host's secret key, made when there is none.
///
/// # Errors
/// When the file is damaged or others may read it.
pub(crate) fn load_secret(path: &Path) -> anyhow::Result<TunnelSecret> {
    let shown = path.display();
    match File::open(path) {
        Ok(file) => read_secret(file, path),
        Err(err) if err.kind() == io::ErrorKind::NotFound => {
            let mut bytes = [0; 32];
            getrandom::fill(&mut bytes).map_err(|e| anyhow::anyhow!("Failed to make a key: {e}"))?;
            // A name of its own first: a crash leaves no half of a key.
            let temp = path.with_extension("new");
            let write = || {
                let _ = std::fs::remove_file(&temp);
                let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temp)?;
                file.write_all(STANDARD.encode(bytes).as_bytes())?;
                file.write_all(b"\n")?;
                std::fs::rename(&temp, path)
            };
            write().with_context(|| format!("Failed to write {shown}"))?;
            Ok(TunnelSecret::from_bytes(bytes))
        }
        Err(err) => Err(err).with_context(|| format!("Failed to read {shown}")),
    }
}

fn read_secret(mut file: File, path: &Path) -> anyhow::Result<TunnelSecret> {
    let shown = path.display();
    let failed = || format!("Failed to read {shown}");
    let mode = file.metadata().with_context(failed)?.mode() & 0o777;
    if mode & 0o077 != 0 {
        bail!(
            "{shown} has mode {mode:04o}, so others may know this host's key: remove it (a new key is made, and told to \
             the other hosts), or `chmod 600` it if nobody has read it"
        );
    }
    let mut text = String::new();
    file.read_to_string(&mut text).with_context(failed)?;
    let Some(TunnelKey(bytes)) = decode(text.trim_end()) else {
        bail!("{shown} is no key (32 bytes in base64): remove it, and a new key is made and told to the other hosts");
    };
    Ok(TunnelSecret::from_bytes(bytes))
}

/// The host's secret key, if its tunnels are to be encrypted.
///
/// # Errors
/// As [`load_secret`].
pub(crate) fn secret(config: &Config) -> anyhow::Result<Option<TunnelSecret>> {
    if !config.encrypt_tunnel {
        return Ok(None);
    }
    load_secret(&config.tls().join("tunnel.key")).map(Some)
}

fn not_both(encrypts: &str, other: &str) -> ApiError {
    ApiError::new(
        ErrorCode::Trust,
        format!("Host '{encrypts}' encrypts its tunnels and has no key of host '{other}', which does not"),
    )
    .remedy(format!("start rametd on '{other}' with --encrypt-tunnel"))
}

impl Daemon {
    /// This host's key, if it encrypts.
    fn own_key(&self) -> Option<TunnelKey> {
        self.nets.secret().map(TunnelSecret::public)
    }

    /// Tells another host this one's key, and learns that host's. Either both encrypt, or neither.
    ///
    /// # Errors
    /// [`ErrorCode::Trust`] when one host encrypts and the other does not; those of the call.
    pub(crate) async fn agree_on_tunnel(&self, host: &str, limit: Duration) -> ApiResult<()> {
        let own = self.own_key();
        if own.is_some() && self.nets.tunnel_address().is_some_and(|at| at != secure_address(self.peers.own_number())) {
            return Err(ApiError::new(
                ErrorCode::Trust,
                format!("The encrypted tunnel of host '{}' was made before it had its number", self.config.name),
            )
            .remedy("start its rametd again"));
        }
        let client = self.peers.client(host)?;
        let answer = ask(host, limit, client.peer_tunnel(&PeerTunnel { key: own.map(encode) })).await?;
        match (own, &answer.key) {
            (Some(_), Some(key)) => self.note_key(host, key).map(drop),
            (Some(_), None) => Err(not_both(&self.config.name, host)),
            (None, _) => Ok(()),
        }
    }

    fn note_key(&self, host: &str, key: &str) -> ApiResult<bool> {
        let key = decode(key)
            .ok_or_else(|| ApiError::new(ErrorCode::BadRequest, format!("What host '{host}' tells is no key")))?;
        self.peers.set_tunnel_key(host, key).map_err(|e| ApiError::failed("A host's key can't be kept", e))
    }

    /// Refuses what would send a family's packets to a host that has told no key.
    ///
    /// # Errors
    /// [`ErrorCode::Trust`].
    pub(crate) fn check_tunnel(&self, host: &str) -> ApiResult<()> {
        if self.own_key().is_none() || self.peers.secure_peers().contains_key(host) {
            return Ok(());
        }
        Err(not_both(&self.config.name, host))
    }

    /// Asks those of the hosts for their keys that have told none. Without them nothing is sent there.
    pub(crate) async fn ask_for_keys(self: &Arc<Self>, hosts: impl Iterator<Item = &String>) {
        if self.own_key().is_none() {
            return;
        }
        let known = self.peers.secure_peers();
        let missing: Vec<_> = hosts.filter(|host| !known.contains_key(*host)).cloned().collect();
        let asked = missing.into_iter().map(|host| {
            let daemon = self.clone();
            async move {
                if let Err(err) = daemon.agree_on_tunnel(&host, TELL).await {
                    tracing::warn!("nothing is sent to members on host '{host}': {err}");
                }
            }
        });
        all(asked).await;
    }

    /// `PUT /v1/peer/tunnel`.
    ///
    /// # Errors
    /// [`ErrorCode::Trust`] when this host encrypts and the sender does not.
    pub fn peer_tunnel(self: &Arc<Self>, sender: &str, request: &PeerTunnel) -> ApiResult<PeerTunnel> {
        let Some(own) = self.own_key() else { return Ok(PeerTunnel { key: None }) };
        let Some(key) = &request.key else { return Err(not_both(&self.config.name, sender)) };
        if self.note_key(sender, key)? {
            let daemon = self.clone();
            tokio::spawn(async move { daemon.apply_all_members().await });
        }
        Ok(PeerTunnel { key: Some(encode(own)) })
    }

    /// At the daemon's start: tells the others the key, which may be new. In the background.
    pub(crate) fn tell_key(self: &Arc<Self>) {
        if self.own_key().is_none() {
            return;
        }
        for host in self.peers.others() {
            let daemon = self.clone();
            tokio::spawn(async move {
                for pause in [0, 1, 5, 25] {
                    tokio::time::sleep(Duration::from_secs(pause)).await;
                    match daemon.agree_on_tunnel(&host, TELL).await {
                        Ok(()) => return daemon.apply_all_members().await,
                        Err(err) => tracing::info!("no key was agreed on: {err}"),
                    }
                }
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    fn refused(path: &Path) -> String {
        load_secret(path).unwrap_err().to_string()
    }

    #[test]
    fn a_key_is_made_once_and_only_for_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tunnel.key");
        let first = load_secret(&path).unwrap();
        assert_eq!(path.metadata().unwrap().mode() & 0o777, 0o600);
        assert_eq!(load_secret(&path).unwrap().public(), first.public());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no other file is left");
        std::fs::remove_file(&path).unwrap();
        assert_ne!(load_secret(&path).unwrap().public(), first.public(), "a new one is another");
    }

    #[test]
    fn a_key_that_others_may_read_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tunnel.key");
        load_secret(&path).unwrap();
        for mode in [0o640, 0o604, 0o644] {
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
            let text = refused(&path);
            assert!(text.contains("tunnel.key") && text.contains(&format!("{mode:04o}")), "{text}");
            assert!(text.contains("remove it"), "{text}");
        }
    }

    #[test]
    fn a_file_that_is_no_key_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("tunnel.key");
        for bad in ["", "x", &STANDARD.encode([1; 31]), &STANDARD.encode([1; 33]), &"=".repeat(44)] {
            let _ = std::fs::remove_file(&path);
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path).unwrap();
            file.write_all(bad.as_bytes()).unwrap();
            let text = refused(&path);
            assert!(text.contains("tunnel.key") && text.contains("32 bytes") && text.contains("remove it"), "{text}");
        }
    }

    #[test]
    fn public_keys_are_read_as_they_are_written() {
        let key = TunnelKey([9; 32]);
        assert_eq!(decode(&encode(key)), Some(key));
        assert_eq!(decode("short"), None);
    }
}
