//! Certificates: the authority of a group of hosts, the hosts' own, and the short-lived ones inside tokens.
//!
//! Two authorities are kept apart. `ca` signs hosts; everybody trusts it, pagers too. `join-ca` signs only the
//! certificates inside tokens; only the API of the host that holds it trusts it, so a token opens no page port.
//! The role stands in the certificate's subject (OU), and is checked on every request.

use std::{
    fs, io::Write as _, net::IpAddr, os::unix::fs::OpenOptionsExt as _, path::PathBuf, sync::Arc, time::Duration,
};

use anyhow::{Context as _, bail};
use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};
use rustls::{ClientConfig, RootCertStore, ServerConfig, crypto::CryptoProvider, server::WebPkiClientVerifier};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use time::OffsetDateTime;

/// How long hosts' certificates hold. There is no renewal yet: a host joins again instead.
const HOST_VALIDITY: Duration = Duration::from_secs(10 * 365 * 86400);
/// Clocks may differ by this much.
const CLOCK_SKEW: Duration = Duration::from_secs(86400);
const OU_HOST: &str = "host";
const OU_JOIN: &str = "join";

/// Who a TLS client is, by its certificate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Role {
    /// A host of the group.
    Host(String),
    /// The holder of a token: may only join, once. The text is the token's number.
    Join(String),
}

/// Paths of the files.
#[derive(Debug, Clone)]
pub struct Files {
    dir: PathBuf,
}

impl Files {
    /// The files in this directory.
    #[must_use]
    pub fn new(dir: impl Into<PathBuf>) -> Self {
        Self { dir: dir.into() }
    }
    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }
    /// Trust is set up: this host has a certificate.
    #[must_use]
    pub fn trusted(&self) -> bool {
        self.path("host.pem").exists()
    }
    /// This host signs the others' certificates.
    #[must_use]
    pub fn is_authority(&self) -> bool {
        self.path("ca.key").exists()
    }
    /// The authority's certificate, PEM.
    ///
    /// # Errors
    /// When it can't be read.
    pub fn ca_pem(&self) -> anyhow::Result<String> {
        self.read("ca.pem")
    }
    fn read(&self, name: &str) -> anyhow::Result<String> {
        let path = self.path(name);
        fs::read_to_string(&path).with_context(|| format!("Failed to read {}", path.display()))
    }
    /// Replaces a file atomically; keys are for the owner only.
    fn write(&self, name: &str, content: &str) -> anyhow::Result<()> {
        let (path, temp) = (self.path(name), self.path(&format!("{name}.new")));
        let mode = if name.ends_with(".key") { 0o600 } else { 0o644 };
        let write = || -> std::io::Result<()> {
            fs::create_dir_all(&self.dir)?;
            let _ = fs::remove_file(&temp);
            let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(mode).open(&temp)?;
            file.write_all(content.as_bytes())?;
            fs::rename(&temp, &path)
        };
        write().with_context(|| format!("Failed to write {}", path.display()))
    }

    /// Makes the authorities and this host's certificate.
    ///
    /// # Errors
    /// When trust is set up already, or files can't be written.
    pub fn init(&self, host: &str, address: IpAddr) -> anyhow::Result<()> {
        if self.trusted() {
            bail!("This host has a certificate already");
        }
        for name in ["ca", "join-ca"] {
            let key = KeyPair::generate()?;
            let mut params = CertificateParams::default();
            params.distinguished_name.push(DnType::CommonName, format!("Ramet {name} of {host}"));
            params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
            params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
            valid_for(&mut params, HOST_VALIDITY);
            let cert = params.self_signed(&key)?;
            self.write(&format!("{name}.key"), &key.serialize_pem())?;
            self.write(&format!("{name}.pem"), &cert.pem())?;
        }
        let request = Request::new(host)?;
        let cert = self.sign_host(&request.csr_pem, host, address)?;
        self.install(&self.ca_pem()?, &cert, &request.key_pem)
    }

    /// Takes up a certificate that an authority has signed. The host's certificate is written last: with it, trust is
    /// set up.
    ///
    /// # Errors
    /// When files can't be written.
    pub fn install(&self, ca_pem: &str, cert_pem: &str, key_pem: &str) -> anyhow::Result<()> {
        self.write("ca.pem", ca_pem)?;
        self.write("host.key", key_pem)?;
        self.write("host.pem", cert_pem)
    }

    fn issuer(&self, name: &str) -> anyhow::Result<Issuer<'static, KeyPair>> {
        let key = KeyPair::from_pem(&self.read(&format!("{name}.key"))?)
            .with_context(|| format!("{} is damaged", self.path(&format!("{name}.key")).display()))?;
        let pem = self.read(&format!("{name}.pem"))?;
        Issuer::from_ca_cert_pem(&pem, key)
            .with_context(|| format!("{} is damaged", self.path(&format!("{name}.pem")).display()))
    }

    /// Signs a host's certificate. Of the request only the key is taken: name, address and role are the authority's.
    ///
    /// # Errors
    /// When the request is malformed or this host is no authority.
    pub fn sign_host(&self, csr_pem: &str, host: &str, address: IpAddr) -> anyhow::Result<String> {
        let csr = CertificateSigningRequestParams::from_pem(csr_pem).context("Bad certificate request")?;
        let mut params = leaf(host, OU_HOST, HOST_VALIDITY);
        params.subject_alt_names =
            vec![SanType::DnsName(host.try_into().context("Bad host name")?), SanType::IpAddress(address)];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        Ok(params.signed_by(&csr.public_key, &self.issuer("ca")?)?.pem())
    }

    /// A certificate and key for a token.
    ///
    /// # Errors
    /// When this host is no authority.
    pub fn sign_join(&self, number: &str, ttl: Duration) -> anyhow::Result<(String, String)> {
        let key = KeyPair::generate()?;
        let mut params = leaf(number, OU_JOIN, ttl);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        Ok((params.signed_by(&key, &self.issuer("join-ca")?)?.pem(), key.serialize_pem()))
    }

    /// TLS for the API's port: only clients with a certificate of either authority get in.
    ///
    /// # Errors
    /// When a file is missing or damaged.
    pub fn server_config(&self) -> anyhow::Result<Arc<ServerConfig>> {
        let mut roots = roots(&self.ca_pem()?)?;
        if self.is_authority() {
            for cert in certificates(&self.read("join-ca.pem")?)? {
                roots.add(cert)?;
            }
        }
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider()).build()?;
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_client_cert_verifier(verifier)
            .with_single_cert(certificates(&self.read("host.pem")?)?, private_key(&self.read("host.key")?)?)
            .context("The host's certificate and key do not fit")?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Arc::new(config))
    }

    /// TLS towards other hosts, as this host.
    ///
    /// # Errors
    /// When a file is missing or damaged.
    pub fn client_config(&self) -> anyhow::Result<Arc<ClientConfig>> {
        client_config(&self.ca_pem()?, &self.read("host.pem")?, &self.read("host.key")?)
    }
}

/// TLS towards a host of the authority `ca_pem`, as whoever `cert_pem` says.
///
/// # Errors
/// When something is damaged.
pub fn client_config(ca_pem: &str, cert_pem: &str, key_pem: &str) -> anyhow::Result<Arc<ClientConfig>> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_root_certificates(roots(ca_pem)?)
        .with_client_auth_cert(certificates(cert_pem)?, private_key(key_pem)?)
        .context("The certificate and key do not fit")?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// A host's wish for a certificate, and the key that never leaves it.
#[derive(Debug)]
pub struct Request {
    /// For the authority.
    pub csr_pem: String,
    /// For the host.
    pub key_pem: String,
}

impl Request {
    /// A new key, and a request for it.
    ///
    /// # Errors
    /// When no key can be made.
    pub fn new(host: &str) -> anyhow::Result<Self> {
        let key = KeyPair::generate()?;
        let params = leaf(host, OU_HOST, HOST_VALIDITY);
        Ok(Self { csr_pem: params.serialize_request(&key)?.pem()?, key_pem: key.serialize_pem() })
    }
}

fn leaf(common_name: &str, role: &str, validity: Duration) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.distinguished_name.push(DnType::OrganizationalUnitName, role);
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    valid_for(&mut params, validity);
    params
}

fn valid_for(params: &mut CertificateParams, validity: Duration) {
    let now = OffsetDateTime::now_utc();
    params.not_before = now - CLOCK_SKEW;
    params.not_after = now + validity;
}

/// The one crypto provider of this program.
fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn certificates(pem: &str) -> anyhow::Result<Vec<CertificateDer<'static>>> {
    let certs: Vec<_> = CertificateDer::pem_slice_iter(pem.as_bytes())
        .collect::<Result<_, _>>()
        .map_err(|e| anyhow::anyhow!("Bad certificate: {e}"))?;
    if certs.is_empty() {
        bail!("No certificate where one should be");
    }
    Ok(certs)
}

fn private_key(pem: &str) -> anyhow::Result<PrivateKeyDer<'static>> {
    PrivateKeyDer::from_pem_slice(pem.as_bytes()).map_err(|e| anyhow::anyhow!("Bad private key: {e}"))
}

fn roots(pem: &str) -> anyhow::Result<RootCertStore> {
    let mut roots = RootCertStore::empty();
    for cert in certificates(pem)? {
        roots.add(cert)?;
    }
    Ok(roots)
}

/// The role in a certificate that TLS has verified.
///
/// # Errors
/// When it says no role.
pub fn role_of(cert: &CertificateDer<'_>) -> anyhow::Result<Role> {
    let (_, cert) = x509_parser::parse_x509_certificate(cert).context("Bad certificate")?;
    let subject = cert.subject();
    let name = subject.iter_common_name().next().and_then(|n| n.as_str().ok()).context("No name")?.to_owned();
    let roles: Vec<_> = subject.iter_organizational_unit().filter_map(|ou| ou.as_str().ok()).collect();
    match roles.as_slice() {
        [OU_HOST] => Ok(Role::Host(name)),
        [OU_JOIN] => Ok(Role::Join(name)),
        other => bail!("The certificate of '{name}' has no role that is known here ({other:?})"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    const IP: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));

    fn group() -> (tempfile::TempDir, Files) {
        let dir = tempfile::tempdir().unwrap();
        let files = Files::new(dir.path().join("tls"));
        files.init("h1", IP).unwrap();
        (dir, files)
    }

    fn first(pem: &str) -> CertificateDer<'static> {
        certificates(pem).unwrap().remove(0)
    }

    /// Whether `client` can talk to `server` under this name, and as whom the server sees it.
    async fn talk(server: Arc<ServerConfig>, client: Arc<ClientConfig>, name: &'static str) -> anyhow::Result<Role> {
        let (a, b) = tokio::io::duplex(1 << 16);
        let accept = tokio::spawn(async move {
            let mut stream = tokio_rustls::TlsAcceptor::from(server).accept(a).await?;
            let role = role_of(&stream.get_ref().1.peer_certificates().context("no certificate")?[0])?;
            stream.write_all(b"x").await?;
            anyhow::Ok(role)
        });
        let mut stream = tokio_rustls::TlsConnector::from(client).connect(name.try_into()?, b).await?;
        stream.read_u8().await?;
        accept.await?
    }

    #[tokio::test]
    async fn hosts_know_each_other_by_the_authority() {
        let (_dir, files) = group();
        let other = tempfile::tempdir().unwrap();
        let second = Files::new(other.path());
        let request = Request::new("h2").unwrap();
        let cert = files.sign_host(&request.csr_pem, "h2", IP).unwrap();
        second.install(&files.ca_pem().unwrap(), &cert, &request.key_pem).unwrap();
        assert!(second.trusted() && !second.is_authority());

        let (server, client) = (files.server_config().unwrap(), second.client_config().unwrap());
        assert_eq!(talk(server.clone(), client.clone(), "h1").await.unwrap(), Role::Host("h2".to_owned()));
        assert!(talk(server, client, "h3").await.is_err(), "the server is not who was asked for");
        let back = talk(second.server_config().unwrap(), files.client_config().unwrap(), "h2").await;
        assert_eq!(back.unwrap(), Role::Host("h1".to_owned()));
    }

    #[tokio::test]
    async fn strangers_stay_outside() {
        let (_dir, files) = group();
        let (_other, stranger) = group();
        let client = client_config(
            &files.ca_pem().unwrap(),
            &stranger.read("host.pem").unwrap(),
            &stranger.read("host.key").unwrap(),
        );
        assert!(talk(files.server_config().unwrap(), client.unwrap(), "h1").await.is_err());
        let nobody = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots(&files.ca_pem().unwrap()).unwrap())
            .with_no_client_auth();
        assert!(talk(files.server_config().unwrap(), Arc::new(nobody), "h1").await.is_err());
    }

    #[tokio::test]
    async fn a_tokens_certificate_has_only_its_role_and_ends() {
        let (_dir, files) = group();
        let (cert, key) = files.sign_join("t1", Duration::from_secs(60)).unwrap();
        assert_eq!(role_of(&first(&cert)).unwrap(), Role::Join("t1".to_owned()));
        let client = client_config(&files.ca_pem().unwrap(), &cert, &key).unwrap();
        let role = talk(files.server_config().unwrap(), client.clone(), "h1").await.unwrap();
        assert_eq!(role, Role::Join("t1".to_owned()));

        // A host that does not hold the authority does not trust it, nor would a pager, which only knows ca.pem.
        let request = Request::new("h2").unwrap();
        let second = Files::new(files.dir.join("second"));
        let signed = files.sign_host(&request.csr_pem, "h2", IP).unwrap();
        second.install(&files.ca_pem().unwrap(), &signed, &request.key_pem).unwrap();
        assert!(talk(second.server_config().unwrap(), client, "h2").await.is_err());

        let mut params = leaf("t2", OU_JOIN, Duration::ZERO);
        params.not_after = OffsetDateTime::now_utc() - Duration::from_secs(5);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().unwrap();
        let ended = params.signed_by(&key, &files.issuer("join-ca").unwrap()).unwrap().pem();
        let client = client_config(&files.ca_pem().unwrap(), &ended, &key.serialize_pem()).unwrap();
        assert!(talk(files.server_config().unwrap(), client, "h1").await.is_err(), "expired");
    }

    #[test]
    fn a_request_can_not_choose_its_role_or_name() {
        let (_dir, files) = group();
        let key = KeyPair::generate().unwrap();
        let csr = leaf("root", OU_JOIN, HOST_VALIDITY).serialize_request(&key).unwrap().pem().unwrap();
        let cert = files.sign_host(&csr, "h2", IP).unwrap();
        assert_eq!(role_of(&first(&cert)).unwrap(), Role::Host("h2".to_owned()));
        assert!(files.sign_host("no request", "h2", IP).is_err());
    }

    #[test]
    fn keys_are_for_the_owner_and_init_is_not_repeated() {
        use std::os::unix::fs::PermissionsExt as _;
        let (_dir, files) = group();
        for key in ["ca.key", "join-ca.key", "host.key"] {
            assert_eq!(fs::metadata(files.path(key)).unwrap().permissions().mode() & 0o777, 0o600, "{key}");
        }
        assert!(files.init("h1", IP).is_err());
    }
}
