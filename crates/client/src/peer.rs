//! Calls between daemons.

use hyper::{
    Method,
    header::{self, HeaderValue},
};

use crate::{
    Client, Error, api,
    client::{empty, full, quote},
};

impl Client {
    /// Asks a host for membership (with a token's certificate).
    ///
    /// # Errors
    /// [`Error`].
    pub async fn peer_join(&self, request: &api::PeerJoinRequest) -> Result<api::PeerJoinReply, Error> {
        self.json(Method::POST, "/v1/peer/join", request).await
    }

    /// Tells a peer about hosts.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn peer_hosts(&self, request: &api::PeerHosts) -> Result<(), Error> {
        let bytes = serde_json::to_vec(request).map_err(|e| self.answer("a request", e))?;
        self.send(self.json_request(Method::POST, "/v1/peer/hosts", bytes)?).await.map(drop)
    }

    /// Has a peer make clones of a checkpoint described by `descriptor`.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn peer_clones(
        &self,
        request: &api::PeerCloneRequest,
        descriptor: &[u8],
    ) -> Result<api::CloneResponse, Error> {
        let json = serde_json::to_vec(request).map_err(|e| self.answer("a request", e))?;
        let mut body = Vec::with_capacity(4 + json.len() + descriptor.len());
        body.extend_from_slice(&(json.len() as u32).to_le_bytes());
        body.extend_from_slice(&json);
        body.extend_from_slice(descriptor);
        let mut request = self.request(Method::POST, "/v1/peer/clones", full(body))?;
        request.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/octet-stream"));
        self.decode(self.send(request).await?).await
    }

    /// Who uses this checkpoint's image on a peer.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn peer_image(&self, checkpoint: &str) -> Result<api::PeerImageUse, Error> {
        self.get(&format!("/v1/peer/images/{}", quote(checkpoint))).await
    }

    /// Has a peer drop its copy of a checkpoint's image.
    ///
    /// # Errors
    /// [`Error`]; `InUse` names the users.
    pub async fn peer_image_drop(&self, checkpoint: &str) -> Result<(), Error> {
        self.none(Method::DELETE, &format!("/v1/peer/images/{}", quote(checkpoint))).await
    }

    /// Tells a peer who else has pages of the disk of one of this host's checkpoints; it answers where it serves its own.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn peer_disk_sources(
        &self,
        checkpoint: &str,
        request: &api::PeerDiskSources,
    ) -> Result<api::PeerDiskServer, Error> {
        self.json(Method::PUT, &format!("/v1/peer/images/{}/disk", quote(checkpoint)), request).await
    }

    /// Has the clones made under `lease` stay on the peer.
    ///
    /// # Errors
    /// [`Error`]; the peer has lost the lease and removed the clones.
    pub async fn peer_commit(&self, lease: &str, request: &api::PeerCommit) -> Result<(), Error> {
        let bytes = serde_json::to_vec(request).map_err(|e| self.answer("a request", e))?;
        let path = format!("/v1/peer/leases/{}/commit", quote(lease));
        self.send(self.json_request(Method::POST, &path, bytes)?).await.map(drop)
    }

    /// Ends a lease on the peer, and waits until its VMs are gone.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn peer_abort(&self, lease: &str) -> Result<(), Error> {
        self.none(Method::DELETE, &format!("/v1/peer/leases/{}", quote(lease))).await
    }

    /// A file that VMs boot from, by its hash.
    ///
    /// # Errors
    /// [`Error`]; there may be none.
    pub async fn peer_boot(&self, hash: &str) -> Result<Vec<u8>, Error> {
        let path = format!("/v1/peer/boot/{}", quote(hash));
        let response = self.send(self.request(Method::GET, &path, empty())?).await?;
        self.bytes(response.into_body()).await
    }

    /// Tells a peer who this host's members of a family are.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn peer_members(&self, family: &str, request: &api::PeerMembers) -> Result<(), Error> {
        let bytes = serde_json::to_vec(request).map_err(|e| self.answer("a request", e))?;
        let path = format!("/v1/peer/families/{}/members", quote(family));
        self.send(self.json_request(Method::PUT, &path, bytes)?).await.map(drop)
    }

    /// Tells a peer this host's key for encrypted tunnels; it answers with its own.
    ///
    /// # Errors
    /// [`Error`]; the peer encrypts and this host does not.
    pub async fn peer_tunnel(&self, request: &api::PeerTunnel) -> Result<api::PeerTunnel, Error> {
        self.json(Method::PUT, "/v1/peer/tunnel", request).await
    }

    /// Has pre-started QEMUs made ready on the peer.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn peer_warm(&self, request: &api::PeerPoolRequest) -> Result<api::PoolStatus, Error> {
        self.json(Method::POST, "/v1/peer/pool", request).await
    }
}
