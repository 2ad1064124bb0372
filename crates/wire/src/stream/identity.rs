//! A host's certificate and key, and the TLS configurations made of them.

use super::StreamError;
use rustls::{
    ClientConfig, RootCertStore, ServerConfig, SupportedCipherSuite,
    client::Resumption,
    crypto::{CryptoProvider, ring},
    server::{NoServerSessionStorage, WebPkiClientVerifier},
    version::TLS13,
};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
};

/// The files of a host's identity, all PEM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The CA's certificates. Hosts with a certificate of one of these are trusted.
    pub ca: PathBuf,
    /// This host's certificate chain, its own certificate first.
    pub cert: PathBuf,
    /// The private key to it.
    pub key: PathBuf,
}

impl TlsFiles {
    /// `ca.pem`, `host.pem` and `host.key` in `dir`.
    #[must_use]
    pub fn in_dir(dir: &Path) -> Self {
        Self { ca: dir.join("ca.pem"), cert: dir.join("host.pem"), key: dir.join("host.key") }
    }

    /// Reads the files and checks that they fit together.
    ///
    /// # Errors
    /// [`StreamError::Identity`] names the file and what is wrong with it.
    pub fn load(&self) -> Result<TlsConfig, StreamError> {
        let bad = |path: &Path, what: &dyn fmt::Display| StreamError::Identity {
            path: path.to_owned(),
            what: what.to_string(),
        };
        let mut roots = RootCertStore::empty();
        for cert in certificates(&self.ca).map_err(|e| bad(&self.ca, &e))? {
            roots.add(cert).map_err(|e| bad(&self.ca, &e))?;
        }
        let roots = Arc::new(roots);
        let chain = certificates(&self.cert).map_err(|e| bad(&self.cert, &e))?;
        let key = PrivateKeyDer::from_pem_file(&self.key).map_err(|e| bad(&self.key, &e))?;

        let provider = Arc::new(provider());
        let versions = &[&TLS13];
        let mut client = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(versions)
            .map_err(|e| bad(&self.cert, &e))?
            .with_root_certificates(Arc::clone(&roots))
            .with_client_auth_cert(chain.clone(), key.clone_key())
            .map_err(|e| bad(&self.key, &e))?;
        let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider))
            .build()
            .map_err(|e| bad(&self.ca, &e))?;
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .map_err(|e| bad(&self.cert, &e))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, key)
            .map_err(|e| bad(&self.key, &e))?;
        // The halves of a connection own their keys (see `record`); no sessions are resumed, connections live long.
        client.enable_secret_extraction = true;
        client.resumption = Resumption::disabled();
        server.enable_secret_extraction = true;
        server.send_tls13_tickets = 0;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        Ok(TlsConfig { client: Arc::new(client), server: Arc::new(server) })
    }
}

/// A host's identity, ready for connecting and accepting. Cheap to clone.
#[derive(Clone)]
pub struct TlsConfig {
    pub(super) client: Arc<ClientConfig>,
    pub(super) server: Arc<ServerConfig>,
}

impl fmt::Debug for TlsConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("TlsConfig")
    }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, String> {
    let certs = CertificateDer::pem_file_iter(path)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(|e| e.to_string())?;
    if certs.is_empty() { Err("it holds no certificate".into()) } else { Ok(certs) }
}

/// ring, TLS 1.3 only, with the cipher first that is fastest on this CPU.
fn provider() -> CryptoProvider {
    let mut provider = ring::default_provider();
    provider.cipher_suites = suites(has_aes());
    provider
}

fn suites(aes: bool) -> Vec<SupportedCipherSuite> {
    use ring::cipher_suite::{TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256};
    if aes {
        vec![TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256]
    } else {
        vec![TLS13_CHACHA20_POLY1305_SHA256, TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384]
    }
}

#[cfg(target_arch = "x86_64")]
fn has_aes() -> bool {
    std::arch::is_x86_feature_detected!("aes") && std::arch::is_x86_feature_detected!("pclmulqdq")
}

#[cfg(not(target_arch = "x86_64"))]
const fn has_aes() -> bool {
    true
}
