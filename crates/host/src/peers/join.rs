//! How a host becomes one of a group: `host init` on the first, `host token` there, `host join TOKEN` on the next.
//!
//! A token holds the group's certificate of authority, where its holder listens, and a certificate with the role *join*
//! that ends soon and is good for one call: [`sign`]. So the TCP port never talks to anyone without a certificate.

use std::{
    collections::BTreeMap,
    fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use anyhow::Context as _;
use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
use ramet_client::{
    Client,
    api::{ErrorCode, PeerAddress, PeerJoinReply, PeerJoinRequest, TokenResponse},
};
use serde::{Deserialize, Serialize};

use super::{Peers, Tls, tls};
use crate::{
    error::{ApiError, ApiResult, from_peer},
    names::check_host_name,
    state::now_unix_ms,
    stats::lock,
};

const PREFIX: &str = "ramet1-";
const DEFAULT_TTL_S: u64 = 600;
const MAX_TTL_S: u64 = 86400;
/// Longest token that is looked at.
const MAX_TOKEN: usize = 16 << 10;

#[derive(Debug, Serialize, Deserialize)]
struct Token {
    name: String,
    address: String,
    ca_pem: String,
    cert_pem: String,
    key_pem: String,
}

impl Token {
    fn encode(&self) -> String {
        format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(serde_json::to_vec(self).unwrap_or_default()))
    }

    fn decode(text: &str) -> ApiResult<Self> {
        let bad = |why: &str| {
            ApiError::new(ErrorCode::BadRequest, format!("This is no token: {why}"))
                .remedy("get one by `ramet host token` on a host of the group, and paste all of it")
        };
        let text = text.trim();
        let body = text.strip_prefix(PREFIX).ok_or_else(|| bad(&format!("it does not begin with {PREFIX}")))?;
        if text.len() > MAX_TOKEN {
            return Err(bad("it is too long"));
        }
        let json = URL_SAFE_NO_PAD.decode(body).map_err(|_| bad("it is cut short or has other characters in it"))?;
        serde_json::from_slice(&json).map_err(|_| bad("it is cut short"))
    }
}

/// Tokens that were given out and not used: number and end.
#[derive(Debug)]
pub struct Tokens {
    path: PathBuf,
    open: Mutex<BTreeMap<String, u64>>,
}

impl Tokens {
    /// Reads which are open.
    ///
    /// # Errors
    /// When the file is damaged.
    pub fn open(path: &Path) -> anyhow::Result<Self> {
        let open = match fs::read(path) {
            Ok(bytes) => serde_json::from_slice(&bytes)
                .with_context(|| format!("{} is damaged: remove it, and make new tokens", path.display()))?,
            Err(_) => BTreeMap::new(),
        };
        Ok(Self { path: path.to_owned(), open: Mutex::new(open) })
    }

    fn change(&self, change: impl FnOnce(&mut BTreeMap<String, u64>)) -> anyhow::Result<()> {
        let mut open = lock(&self.open);
        let mut next = open.clone();
        next.retain(|_, end| *end > now_unix_ms());
        change(&mut next);
        let temp = self.path.with_extension("new");
        fs::write(&temp, serde_json::to_vec(&next)?)
            .and_then(|()| fs::rename(&temp, &self.path))
            .with_context(|| format!("Failed to write {}", self.path.display()))?;
        *open = next;
        Ok(())
    }

    /// Uses a token up; false: it was used, has ended, or was never given out.
    fn spend(&self, number: &str) -> anyhow::Result<bool> {
        let mut spent = false;
        self.change(|open| spent = open.remove(number).is_some())?;
        Ok(spent)
    }
}

fn trust(message: impl Into<String>) -> ApiError {
    ApiError::new(ErrorCode::Trust, message)
}

/// The address that other hosts are told.
fn address(asked: Option<&str>, listen: Option<SocketAddr>) -> ApiResult<SocketAddr> {
    let Some(listen) = listen else {
        return Err(trust("This rametd has no address for other hosts").remedy("start it with --listen IP:7391"));
    };
    let address = match asked {
        Some(text) => text.parse().map_err(|_| {
            ApiError::new(ErrorCode::BadRequest, format!("'{}' is no address", crate::names::shown(text)))
                .remedy("give IP:PORT, such as 10.0.0.1:7391")
        })?,
        None => listen,
    };
    if address.ip().is_unspecified() {
        return Err(ApiError::new(ErrorCode::BadRequest, format!("Other hosts can't reach {address}"))
            .remedy("name the address that they reach this host at: --address IP:PORT"));
    }
    Ok(address)
}

/// `host init`: this host becomes the first of a group.
///
/// # Errors
/// [`ErrorCode::Trust`] when it is in one already or has no address.
pub fn init(peers: &Peers, asked: Option<&str>, listen: Option<SocketAddr>) -> ApiResult<()> {
    let address = address(asked, listen)?;
    if peers.files.trusted() {
        return Err(trust("This host is in a group already").remedy("`ramet host ls` lists it"));
    }
    // First the list, then the certificates: with them, trust is set up.
    let own = PeerAddress { name: peers.name.clone(), address: address.to_string(), number: 0 };
    peers.learn(&[own]).map_err(|e| ApiError::failed("Failed to set up trust", e))?;
    peers.files.init(&peers.name, address.ip()).map_err(|e| ApiError::failed("Failed to set up trust", e))
}

/// `host token`.
///
/// # Errors
/// [`ErrorCode::Trust`] when this host can't sign.
pub fn token(peers: &Peers, tokens: &Tokens, ttl_s: Option<u64>) -> ApiResult<TokenResponse> {
    let ttl_s = ttl_s.unwrap_or(DEFAULT_TTL_S);
    if !(1..=MAX_TTL_S).contains(&ttl_s) {
        return Err(ApiError::new(ErrorCode::BadRequest, format!("A token can't hold {ttl_s} s"))
            .remedy(format!("choose 1 to {MAX_TTL_S} s")));
    }
    if !peers.files.is_authority() {
        let remedy = if peers.files.trusted() {
            "make it on the host where `ramet host init` was run: `ramet --host NAME host token`"
        } else {
            "run `ramet host init` first"
        };
        return Err(trust(format!("Host '{}' can't make tokens: it holds no certificate of authority", peers.name))
            .remedy(remedy));
    }
    let make = || -> anyhow::Result<TokenResponse> {
        let number = ramet_memory::VmId::random().to_string();
        let expires_unix_ms = now_unix_ms() + ttl_s * 1000;
        let (cert_pem, key_pem) = peers.files.sign_join(&number, Duration::from_secs(ttl_s))?;
        let address = peers.own_address().context("this host has no address")?;
        let token = Token { name: peers.name.clone(), address, ca_pem: peers.files.ca_pem()?, cert_pem, key_pem };
        tokens.change(|open| {
            open.insert(number, expires_unix_ms);
        })?;
        Ok(TokenResponse { token: token.encode(), expires_unix_ms })
    };
    make().map_err(|e| ApiError::failed("Failed to make a token", e))
}

/// `host join`: asks the token's maker for a certificate.
///
/// # Errors
/// When the token is bad or used, or its maker can't be reached; nothing is changed then.
pub async fn join(peers: &Peers, token: &str, asked: Option<&str>, listen: Option<SocketAddr>) -> ApiResult<()> {
    let address = address(asked, listen)?;
    let token = Token::decode(token)?;
    if peers.files.trusted() {
        return Err(trust("This host is in a group already").remedy(
            "to leave it, stop rametd with `--stop-vms-on-exit` and remove the `tls` directory and peers.json",
        ));
    }
    let failed = |e: anyhow::Error| ApiError::failed("Failed to join", e);
    let config = tls::client_config(&token.ca_pem, &token.cert_pem, &token.key_pem).map_err(failed)?;
    let maker = Client::with_connector(Tls { address: token.address, name: token.name.clone(), config });
    let request = tls::Request::new(&peers.name).map_err(failed)?;
    let asked = PeerJoinRequest { name: peers.name.clone(), address: address.to_string(), csr_pem: request.csr_pem };
    let reply = maker.peer_join(&asked).await.map_err(|err| {
        let ended = matches!(&err, ramet_client::Error::Connect { .. } | ramet_client::Error::Broken { .. });
        let err = from_peer(&token.name, err);
        if ended {
            err.remedy("is that host up? Has the token ended? Make a new one by `ramet host token` there")
        } else {
            err
        }
    })?;
    peers.learn(&reply.hosts).map_err(failed)?;
    peers.files.install(&reply.ca_pem, &reply.cert_pem, &request.key_pem).map_err(failed)
}

/// `POST /v1/peer/join`, on the token's maker: signs the new host's certificate.
///
/// # Errors
/// When the token was used before, or a living host has that name.
pub async fn sign(
    peers: &Arc<Peers>,
    tokens: &Tokens,
    number: &str,
    request: &PeerJoinRequest,
) -> ApiResult<PeerJoinReply> {
    check_host_name(&request.name)?;
    let address: SocketAddr = request.address.parse().map_err(|_| {
        ApiError::new(ErrorCode::BadRequest, format!("'{}' is no address", crate::names::shown(&request.address)))
    })?;
    let taken = request.name == peers.name || {
        let known = peers.hosts().into_iter().find(|h| h.name == request.name);
        match known {
            Some(host) if host.address != request.address => peers.entry(host).await.alive,
            _ => false,
        }
    };
    if taken {
        return Err(ApiError::new(ErrorCode::NameTaken, format!("The group has a host '{}' already", request.name))
            .remedy("start rametd with another --name"));
    }
    let failed = |e: anyhow::Error| ApiError::failed(format!("Failed to take up host '{}'", request.name), e);
    let cert_pem = peers.files.sign_host(&request.csr_pem, &request.name, address.ip()).map_err(failed)?;
    // The token is used up by what can succeed only.
    if !tokens.spend(number).map_err(failed)? {
        return Err(ApiError::new(ErrorCode::Forbidden, "This token has been used, or has ended")
            .remedy("make a new one by `ramet host token`"));
    }
    // One that joins again under its name keeps its number.
    let before = peers.hosts().into_iter().find(|h| h.name == request.name).map(|h| h.number);
    let number = before.or_else(|| peers.free_number()).ok_or_else(|| {
        ApiError::new(ErrorCode::LimitReached, "The group has 256 hosts, and no number for another one")
    })?;
    let new = PeerAddress { name: request.name.clone(), address: request.address.clone(), number };
    peers.learn(&[new]).map_err(failed)?;
    let hosts = peers.hosts();
    spread(peers, &request.name);
    Ok(PeerJoinReply { ca_pem: peers.files.ca_pem().map_err(failed)?, cert_pem, hosts })
}

/// Tells all other hosts but `except` whom this one knows. In the background, and best effort: a host that is away asks
/// when it is back ([`catch_up`]).
fn spread(peers: &Arc<Peers>, except: &str) {
    let request = ramet_client::api::PeerHosts { hosts: peers.hosts() };
    for host in peers.others().into_iter().filter(|h| h != except) {
        let (peers, request) = (peers.clone(), request.clone());
        tokio::spawn(async move {
            let Ok(client) = peers.client(&host) else { return };
            for pause in [0, 1, 5, 25] {
                tokio::time::sleep(Duration::from_secs(pause)).await;
                if client.peer_hosts(&request).await.is_ok() {
                    return;
                }
            }
            tracing::warn!(host, "a host could not be told about new hosts");
        });
    }
}

/// At the daemon's start: tells the others whom this host knows; they answer in kind when they know more.
pub fn catch_up(peers: &Arc<Peers>) {
    spread(peers, "");
}

/// `POST /v1/peer/hosts`: takes note, and tells the sender when this host knows hosts that the sender does not.
///
/// # Errors
/// When a name or address is bad, or it can't be written down.
pub fn heard(peers: &Arc<Peers>, sender: &str, hosts: &[PeerAddress]) -> ApiResult<()> {
    for host in hosts {
        check_host_name(&host.name)?;
        if host.address.parse::<SocketAddr>().is_err() {
            return Err(ApiError::new(
                ErrorCode::BadRequest,
                format!("'{}' is no address", crate::names::shown(&host.address)),
            ));
        }
    }
    // A host knows its own address best; others only tell of hosts that are new here, or of themselves.
    let known = peers.hosts();
    let news: Vec<_> = hosts
        .iter()
        .filter(|h| h.name != peers.name && (h.name == sender || !known.iter().any(|k| k.name == h.name)))
        .cloned()
        .collect();
    peers.learn(&news).map_err(|e| ApiError::failed("Failed to learn of hosts", e))?;
    if peers.hosts().iter().any(|k| !hosts.iter().any(|h| h.name == k.name)) {
        let (peers, sender) = (peers.clone(), sender.to_owned());
        tokio::spawn(async move {
            if let Ok(client) = peers.client(&sender) {
                let _ = client.peer_hosts(&ramet_client::api::PeerHosts { hosts: peers.hosts() }).await;
            }
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host(name: &str) -> (tempfile::TempDir, Arc<Peers>, Tokens) {
        let dir = tempfile::tempdir().unwrap();
        let files = tls::Files::new(dir.path().join("tls"));
        let peers = Arc::new(Peers::open(name, files, dir.path().join("peers.json")).unwrap());
        let tokens = Tokens::open(&dir.path().join("tokens.json")).unwrap();
        (dir, peers, tokens)
    }

    fn listen() -> Option<SocketAddr> {
        Some("127.0.0.1:7391".parse().unwrap())
    }

    fn number_of(token: &str) -> String {
        let token = Token::decode(token).unwrap();
        let (_, pem) = x509_parser::pem::parse_x509_pem(token.cert_pem.as_bytes()).unwrap();
        match tls::role_of(&pem.contents.into()).unwrap() {
            tls::Role::Join(number) => number,
            tls::Role::Host(_) => panic!("a host's certificate in a token"),
        }
    }

    fn wish(name: &str) -> PeerJoinRequest {
        let csr_pem = tls::Request::new(name).unwrap().csr_pem;
        PeerJoinRequest { name: name.to_owned(), address: "127.0.0.1:7392".to_owned(), csr_pem }
    }

    #[tokio::test]
    async fn a_token_is_good_for_one_host() {
        let (_dir, peers, tokens) = host("h1");
        init(&peers, None, listen()).unwrap();
        let made = token(&peers, &tokens, None).unwrap();
        let number = number_of(&made.token);
        let reply = sign(&peers, &tokens, &number, &wish("h2")).await.unwrap();
        assert_eq!(reply.hosts.iter().map(|h| h.name.as_str()).collect::<Vec<_>>(), ["h1", "h2"]);
        let err = sign(&peers, &tokens, &number, &wish("h3")).await.unwrap_err();
        assert_eq!(err.code(), ErrorCode::Forbidden);
        assert!(peers.hosts().iter().all(|h| h.name != "h3"), "nothing half-made");
        let err = sign(&peers, &tokens, "never-given-out", &wish("h3")).await.unwrap_err();
        assert_eq!(err.code(), ErrorCode::Forbidden);
    }

    #[tokio::test]
    async fn a_refused_join_does_not_use_the_token_up() {
        let (_dir, peers, tokens) = host("h1");
        init(&peers, None, listen()).unwrap();
        let number = number_of(&token(&peers, &tokens, None).unwrap().token);
        let mut bad = wish("h2");
        bad.csr_pem = "nonsense".to_owned();
        assert!(sign(&peers, &tokens, &number, &bad).await.is_err());
        assert_eq!(sign(&peers, &tokens, &number, &wish("h1")).await.unwrap_err().code(), ErrorCode::NameTaken);
        assert_eq!(sign(&peers, &tokens, &number, &wish("H 2")).await.unwrap_err().code(), ErrorCode::BadName);
        sign(&peers, &tokens, &number, &wish("h2")).await.unwrap();
    }

    #[test]
    fn tokens_end_and_survive_a_restart() {
        let (dir, peers, tokens) = host("h1");
        init(&peers, None, listen()).unwrap();
        let number = number_of(&token(&peers, &tokens, Some(60)).unwrap().token);
        let again = Tokens::open(&dir.path().join("tokens.json")).unwrap();
        assert!(again.spend(&number).unwrap());
        tokens
            .change(|open| {
                open.insert("old".to_owned(), now_unix_ms() - 1);
            })
            .unwrap();
        assert!(!tokens.spend("old").unwrap());
        for ttl in [0, MAX_TTL_S + 1] {
            assert_eq!(token(&peers, &tokens, Some(ttl)).unwrap_err().code(), ErrorCode::BadRequest);
        }
    }

    #[test]
    fn every_wrong_step_says_the_right_one() {
        let (_dir, peers, tokens) = host("h1");
        let remedy = |err: ApiError| err.body().remedy.clone().unwrap();
        assert!(remedy(token(&peers, &tokens, None).unwrap_err()).contains("host init"));
        assert!(remedy(init(&peers, None, None).unwrap_err()).contains("--listen"));
        assert!(remedy(init(&peers, None, "0.0.0.0:7391".parse().ok()).unwrap_err()).contains("--address"));
        assert!(remedy(init(&peers, Some("here"), listen()).unwrap_err()).contains("IP:PORT"));
        init(&peers, None, listen()).unwrap();
        assert!(remedy(init(&peers, None, listen()).unwrap_err()).contains("host ls"));
        for bad in ["", "ramet1-", "ramet1-####", "hello", &format!("ramet1-{}", "A".repeat(MAX_TOKEN))] {
            let err = Token::decode(bad).unwrap_err();
            assert_eq!(err.code(), ErrorCode::BadRequest, "{bad}");
        }
    }

    #[test]
    fn only_a_host_itself_changes_its_address() {
        let (_dir, peers, _tokens) = host("h1");
        let at =
            |name: &str, address: &str| PeerAddress { name: name.to_owned(), address: address.to_owned(), number: 0 };
        peers.learn(&[at("h1", "10.0.0.1:1"), at("h2", "10.0.0.2:1"), at("h3", "10.0.0.3:1")]).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let _in = runtime.enter();
        heard(
            &peers,
            "h2",
            &[at("h1", "6.6.6.6:1"), at("h2", "10.0.0.9:1"), at("h3", "6.6.6.6:1"), at("h4", "10.0.0.4:1")],
        )
        .unwrap();
        let hosts = peers.hosts();
        let expected = [at("h1", "10.0.0.1:1"), at("h2", "10.0.0.9:1"), at("h3", "10.0.0.3:1"), at("h4", "10.0.0.4:1")];
        assert_eq!(hosts, expected);
        assert!(heard(&peers, "h2", &[at("h5", "nowhere")]).is_err());
    }
}
