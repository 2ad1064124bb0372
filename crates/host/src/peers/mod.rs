//! Other hosts: who they are, how they are reached, how a host becomes one of them.

pub mod join;
pub mod proxy;
pub mod tls;

use std::{
    collections::{BTreeMap, HashMap},
    fs, io,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::Context as _;
use ramet_client::{
    Client,
    api::{ErrorCode, HostEntry, PeerAddress},
    transport::{BoxIo, Connect, Connecting},
};
use ramet_net::{SecurePeer, TunnelKey, secure_address};
use rustls::ClientConfig;
use rustls_pki_types::ServerName;
use serde::{Deserialize, Serialize};
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

use crate::{
    error::{ApiError, ApiResult, from_peer},
    names::shown,
    stats::{lock, us},
    tunnel,
};

/// How long a host may take to say that it lives.
const LIVENESS: Duration = Duration::from_secs(2);

/// Connections to one host by mutual TLS.
#[derive(Debug)]
pub struct Tls {
    /// `IP:PORT`.
    pub address: String,
    /// The name that its certificate must have.
    pub name: String,
    /// Who we are, and whom we trust.
    pub config: Arc<ClientConfig>,
}

impl Connect for Tls {
    fn connect(&self) -> Connecting<'_> {
        Box::pin(async {
            let name = ServerName::try_from(self.name.clone()).map_err(io::Error::other)?;
            let tcp = TcpStream::connect(&self.address).await?;
            tcp.set_nodelay(true)?;
            Ok(BoxIo::new(TlsConnector::from(self.config.clone()).connect(name, tcp).await?))
        })
    }
    fn target(&self) -> String {
        format!("{} ({})", self.name, self.address)
    }
}

/// Waits for another host's answer, at most so long.
///
/// # Errors
/// The host's own; [`ErrorCode::HostUnreachable`] when there is no answer in time.
pub(crate) async fn ask<T>(
    host: &str,
    limit: Duration,
    answer: impl Future<Output = Result<T, ramet_client::Error>>,
) -> ApiResult<T> {
    match tokio::time::timeout(limit, answer).await {
        Ok(answer) => answer.map_err(|e| from_peer(host, e)),
        Err(_) => Err(ApiError::new(
            ErrorCode::HostUnreachable,
            format!("Host '{host}' did not answer within {} s", limit.as_secs()),
        )),
    }
}

/// What is known of a host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Known {
    address: String,
    number: u8,
    /// Its key for encrypted tunnels, once it has told it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tunnel_key: Option<String>,
}

/// The other hosts of the group.
#[derive(Debug)]
pub struct Peers {
    name: String,
    files: tls::Files,
    path: PathBuf,
    known: Mutex<BTreeMap<String, Known>>,
    clients: Mutex<HashMap<String, Client>>,
}

impl Peers {
    /// Reads who is known.
    ///
    /// # Errors
    /// When the file is damaged.
    pub fn open(name: &str, files: tls::Files, path: PathBuf) -> anyhow::Result<Self> {
        let known = match fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).with_context(|| {
                format!("{} is damaged: remove it, and learn the hosts again by `ramet host join`", path.display())
            })?,
            Err(err) if err.kind() == io::ErrorKind::NotFound => BTreeMap::new(),
            Err(err) => return Err(err).with_context(|| format!("Failed to read {}", path.display())),
        };
        Ok(Self { name: name.to_owned(), files, path, known: Mutex::new(known), clients: Mutex::default() })
    }

    /// The certificates.
    #[must_use]
    pub fn files(&self) -> &tls::Files {
        &self.files
    }

    /// All hosts of the group with their addresses, this one included once trust is set up.
    pub fn hosts(&self) -> Vec<PeerAddress> {
        lock(&self.known)
            .iter()
            .map(|(name, k)| PeerAddress { name: name.clone(), address: k.address.clone(), number: k.number })
            .collect()
    }

    /// This host's number in its group; 0 before trust is set up, and for the group's first host.
    pub fn own_number(&self) -> u8 {
        lock(&self.known).get(&self.name).map_or(0, |k| k.number)
    }

    /// The IP addresses of the other hosts, by name.
    pub fn addresses(&self) -> BTreeMap<String, IpAddr> {
        let known = lock(&self.known);
        let others = known.iter().filter(|(name, _)| **name != self.name);
        others.filter_map(|(name, k)| Some((name.clone(), k.address.parse::<SocketAddr>().ok()?.ip()))).collect()
    }

    /// A number that no host has.
    fn free_number(&self) -> Option<u8> {
        let known = lock(&self.known);
        (0..=u8::MAX).find(|n| known.values().all(|k| k.number != *n))
    }

    /// The names of the other hosts.
    pub fn others(&self) -> Vec<String> {
        lock(&self.known).keys().filter(|name| **name != self.name).cloned().collect()
    }

    /// This host's own address.
    pub fn own_address(&self) -> Option<String> {
        lock(&self.known).get(&self.name).map(|k| k.address.clone())
    }

    /// Takes note of hosts, and returns whether anything was new.
    ///
    /// # Errors
    /// When that can't be written down.
    pub fn learn(&self, hosts: &[PeerAddress]) -> anyhow::Result<bool> {
        let mut known = lock(&self.known);
        let mut next = known.clone();
        for host in hosts {
            let tunnel_key = known.get(&host.name).and_then(|k| k.tunnel_key.clone());
            next.insert(host.name.clone(), Known { address: host.address.clone(), number: host.number, tunnel_key });
        }
        if next == *known {
            return Ok(false);
        }
        self.write(&next)?;
        *known = next;
        // Addresses may have changed.
        lock(&self.clients).clear();
        Ok(true)
    }

    fn write(&self, known: &BTreeMap<String, Known>) -> anyhow::Result<()> {
        let temp = self.path.with_extension("new");
        fs::write(&temp, serde_json::to_vec_pretty(known)?)
            .and_then(|()| fs::rename(&temp, &self.path))
            .with_context(|| format!("Failed to write {}", self.path.display()))
    }

    /// Takes note of a host's key for encrypted tunnels, and returns whether it was new. That of a host that is not known
    /// is not kept.
    ///
    /// # Errors
    /// When that can't be written down.
    pub(crate) fn set_tunnel_key(&self, host: &str, key: TunnelKey) -> anyhow::Result<bool> {
        let mut known = lock(&self.known);
        let mut next = known.clone();
        let Some(entry) = next.get_mut(host) else { return Ok(false) };
        entry.tunnel_key = Some(tunnel::encode(key));
        if next == *known {
            return Ok(false);
        }
        self.write(&next)?;
        *known = next;
        Ok(true)
    }

    /// The other hosts that have told a key for encrypted tunnels, by name.
    pub(crate) fn secure_peers(&self) -> BTreeMap<String, SecurePeer> {
        let known = lock(&self.known);
        let peer = |k: &Known| match k.address.parse::<SocketAddr>().ok()?.ip() {
            IpAddr::V4(fabric) => {
                let key = tunnel::decode(k.tunnel_key.as_deref()?)?;
                Some(SecurePeer { fabric, tunnel: secure_address(k.number), key })
            }
            IpAddr::V6(_) => None,
        };
        let others = known.iter().filter(|(name, _)| **name != self.name);
        others.filter_map(|(name, k)| Some((name.clone(), peer(k)?))).collect()
    }

    /// A client of that host.
    ///
    /// # Errors
    /// [`ErrorCode::NotFound`] when there is no such host; [`ErrorCode::Trust`] when trust is not set up.
    pub fn client(&self, host: &str) -> ApiResult<Client> {
        let address = lock(&self.known).get(host).map(|k| k.address.clone());
        let Some(address) = address else {
            let known = self.others();
            let hint = if known.is_empty() {
                "this host knows no others: see `ramet host init` and `ramet host join`".to_owned()
            } else {
                format!("known hosts: {}; `ramet host ls` lists them", known.join(", "))
            };
            return Err(ApiError::new(ErrorCode::NotFound, format!("No host '{}'", shown(host))).remedy(hint));
        };
        if let Some(client) = lock(&self.clients).get(host) {
            return Ok(client.clone());
        }
        let config = self.files.client_config().map_err(|e| ApiError::failed("Can't talk to other hosts", e))?;
        let client = Client::with_connector(Tls { address, name: host.to_owned(), config });
        lock(&self.clients).insert(host.to_owned(), client.clone());
        Ok(client)
    }

    /// Asks a host how it is.
    pub async fn entry(&self, peer: PeerAddress) -> HostEntry {
        let begin = std::time::Instant::now();
        let asked = async {
            let client = self.client(&peer.name)?;
            ask(&peer.name, LIVENESS, client.info()).await
        };
        let mut entry = HostEntry {
            name: peer.name.clone(),
            address: peer.address.clone(),
            this: false,
            alive: false,
            error: None,
            rtt_us: None,
            draining: false,
            vms: 0,
            version: None,
            accel: None,
        };
        match asked.await {
            Ok(info) => {
                entry.alive = true;
                entry.rtt_us = Some(us(begin.elapsed()));
                entry.draining = info.draining;
                entry.vms = info.vms;
                entry.version = Some(info.version);
                entry.accel = Some(info.accel);
            }
            Err(err) => entry.error = Some(err.to_string()),
        }
        entry
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn peers(dir: &tempfile::TempDir) -> Peers {
        Peers::open("h1", tls::Files::new(dir.path().join("tls")), dir.path().join("peers.json")).unwrap()
    }

    #[test]
    fn hosts_are_remembered_and_unknown_ones_named() {
        let dir = tempfile::tempdir().unwrap();
        let first = peers(&dir);
        let err = first.client("h9").unwrap_err();
        assert_eq!(err.code(), ErrorCode::NotFound);
        assert!(err.to_string().contains("No host 'h9'") && err.to_string().contains("host init"), "{err}");

        let h2 = PeerAddress { name: "h2".into(), address: "10.0.0.2:7391".into(), number: 1 };
        assert!(first.learn(std::slice::from_ref(&h2)).unwrap());
        assert!(!first.learn(std::slice::from_ref(&h2)).unwrap(), "nothing new");
        let again = peers(&dir);
        assert_eq!(again.hosts(), [h2]);
        assert!(again.client("h9").unwrap_err().to_string().contains("known hosts: h2"));
    }

    #[test]
    fn keys_stay_with_their_hosts() {
        let dir = tempfile::tempdir().unwrap();
        let first = peers(&dir);
        let (key, at) = (TunnelKey([3; 32]), |port: u16| PeerAddress {
            name: "h2".into(),
            address: format!("10.0.0.2:{port}"),
            number: 1,
        });
        assert!(!first.set_tunnel_key("h2", key).unwrap(), "a host that is not known");
        first.learn(&[at(1)]).unwrap();
        assert!(first.secure_peers().is_empty());
        assert!(first.set_tunnel_key("h2", key).unwrap());
        assert!(!first.set_tunnel_key("h2", key).unwrap(), "nothing new");
        first.learn(&[at(2)]).unwrap();
        let again = peers(&dir).secure_peers();
        let peer = SecurePeer { fabric: "10.0.0.2".parse().unwrap(), tunnel: secure_address(1), key };
        assert_eq!(again, BTreeMap::from([("h2".to_owned(), peer)]));
    }

    #[tokio::test]
    async fn a_host_that_is_silent_is_not_waited_for() {
        let limit = Duration::from_secs(1);
        let err = ask("h2", limit, std::future::pending::<Result<(), _>>()).await.unwrap_err();
        assert_eq!(err.code(), ErrorCode::HostUnreachable);
        assert!(err.to_string().contains("Host 'h2' did not answer within 1 s (see `ramet host ls`"), "{err}");
    }

    #[tokio::test]
    async fn a_host_that_does_not_answer_is_listed_as_such() {
        let dir = tempfile::tempdir().unwrap();
        let peers = peers(&dir);
        peers.files().init("h1", "127.0.0.1".parse().unwrap()).unwrap();
        // A port that was free a moment ago: nobody listens.
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let h2 = PeerAddress { name: "h2".into(), address: format!("127.0.0.1:{port}"), number: 1 };
        peers.learn(std::slice::from_ref(&h2)).unwrap();
        let entry = peers.entry(h2).await;
        assert!(!entry.alive);
        assert!(entry.error.unwrap().contains("h2"));
    }
}
