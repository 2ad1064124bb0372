use std::{
    fmt,
    path::PathBuf,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
    time::Duration,
};

use http_body_util::{BodyExt, Empty, Full, combinators::BoxBody};
use hyper::{
    Method, Request, Response, StatusCode,
    body::{Body, Bytes, Frame, Incoming},
    client::conn::http1::{self, SendRequest},
    header::{self, HeaderValue},
};
use hyper_util::rt::TokioIo;
use serde::{Serialize, de::DeserializeOwned};
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, BufReader, ReadBuf};

use crate::{
    Error,
    api::{self, ErrorBody, ErrorCode},
    exec::{self, ExecOutcome, ExecRequest, ExecSession},
    transport::{BoxIo, Connect, Unix},
};

pub(crate) type BoxError = Box<dyn std::error::Error + Send + Sync>;
pub(crate) type SendBody = BoxBody<Bytes, BoxError>;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Idle connections kept for the next call.
const KEPT: usize = 8;
/// Largest JSON answer.
const MAX_ANSWER: usize = 256 << 20;

/// A client of one daemon. Cheap to clone; clones share connections.
#[derive(Clone)]
pub struct Client {
    inner: Arc<Inner>,
    host: Option<HeaderValue>,
}

struct Inner {
    connect: Box<dyn Connect>,
    idle: Mutex<Vec<SendRequest<SendBody>>>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Client").field("target", &self.target()).field("host", &self.host).finish_non_exhaustive()
    }
}

/// Percent-encodes one segment of a path or a value of a query.
pub(crate) fn quote(text: &str) -> String {
    use std::fmt::Write as _;
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            out.push(char::from(byte));
        } else {
            let _ = write!(out, "%{byte:02X}");
        }
    }
    out
}

pub(crate) fn empty() -> SendBody {
    Empty::new().map_err(|never| match never {}).boxed()
}

pub(crate) fn full(bytes: impl Into<Bytes>) -> SendBody {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed()
}

impl Client {
    /// A client of the daemon behind this Unix socket. Connects at the first call.
    pub fn unix(path: impl Into<PathBuf>) -> Self {
        Self::with_connector(Unix(path.into()))
    }

    /// A client that gets its connections from `connect`.
    pub fn with_connector(connect: impl Connect + 'static) -> Self {
        Self { inner: Arc::new(Inner { connect: Box::new(connect), idle: Mutex::default() }), host: None }
    }

    /// The same client, but every call is passed on by the daemon to this host of its group.
    ///
    /// # Errors
    /// When the name can't be the value of a header.
    pub fn on_host(&self, host: &str) -> Result<Self, Error> {
        let value = HeaderValue::from_str(host).map_err(|_| {
            Error::Api(Box::new(ErrorBody {
                code: ErrorCode::BadName,
                message: format!("'{}' is no name of a host", host.escape_debug()),
                remedy: Some("`ramet host ls` lists the hosts".to_owned()),
                clones: Vec::new(),
            }))
        })?;
        Ok(Self { inner: Arc::clone(&self.inner), host: Some(value) })
    }

    /// Where the client connects to, in words.
    #[must_use]
    pub fn target(&self) -> String {
        self.inner.connect.target()
    }

    // -------------------------------------------------------------------------------------------------------- VMs

    /// Boots a VM.
    ///
    /// # Errors
    /// [`Error`], as from every call.
    pub async fn run(&self, request: &api::RunRequest) -> Result<api::VmInfo, Error> {
        self.json(Method::POST, "/v1/vms", request).await
    }

    /// The VMs on this host, or on all hosts.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn vms(&self, all_hosts: bool) -> Result<api::VmList, Error> {
        self.get(&format!("/v1/vms?all_hosts={all_hosts}")).await
    }

    /// One VM, by name, id or prefix of the id.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn vm(&self, vm: &str) -> Result<api::VmInfo, Error> {
        self.get(&format!("/v1/vms/{}", quote(vm))).await
    }

    /// Shuts a VM down; its record stays until [`Client::remove_vm`].
    ///
    /// # Errors
    /// [`Error`].
    pub async fn stop(&self, vm: &str, request: &api::StopRequest) -> Result<api::VmInfo, Error> {
        self.json(Method::POST, &format!("/v1/vms/{}/stop", quote(vm)), request).await
    }

    /// Removes a VM; one that runs only with `force`.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn remove_vm(&self, vm: &str, force: bool) -> Result<(), Error> {
        self.none(Method::DELETE, &format!("/v1/vms/{}?force={force}", quote(vm))).await
    }

    /// Removes a VM that runs and keeps its disk as the image `image` of its host. `force`: without asking its agent to
    /// write its file systems out. Meanwhile [`Client::vm`] tells how far it is.
    ///
    /// # Errors
    /// [`Error`]; the VM goes on then.
    pub async fn remove_vm_keeping_disk(&self, vm: &str, image: &str, force: bool) -> Result<(), Error> {
        let path = format!("/v1/vms/{}?force={force}&keep_disk={}", quote(vm), quote(image));
        self.none(Method::DELETE, &path).await
    }

    /// Memory, counters and latencies of a VM.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn vm_stats(&self, vm: &str) -> Result<api::VmStats, Error> {
        self.get(&format!("/v1/vms/{}/stats", quote(vm))).await
    }

    /// Round trip to the guest's agent.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn ping(&self, vm: &str) -> Result<api::PingReply, Error> {
        self.get(&format!("/v1/vms/{}/ping", quote(vm))).await
    }

    /// The guest's clocks.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn time(&self, vm: &str) -> Result<api::GuestTime, Error> {
        self.get(&format!("/v1/vms/{}/time", quote(vm))).await
    }

    /// Starts a command in the guest.
    ///
    /// # Errors
    /// [`Error`]; that the command does not exist comes as an event of the session.
    pub async fn exec(&self, vm: &str, request: &ExecRequest) -> Result<ExecSession, Error> {
        let path = format!("/v1/vms/{}/exec", quote(vm));
        let mut io = self.upgrade(Method::POST, &path, api::EXEC_PROTOCOL).await?;
        let json = serde_json::to_vec(request).map_err(|e| self.answer("a request", e))?;
        exec::write_frame(&mut io, exec::Kind::Request, &json).await.map_err(|e| self.broken(e))?;
        Ok(ExecSession::new(io))
    }

    /// Runs a command without input to its end, and returns what it wrote (at most 16 MiB of each stream).
    ///
    /// # Errors
    /// [`Error`], also when the command can't be run. An exit code other than 0 is no error.
    pub async fn exec_collect<S: Into<String>>(
        &self,
        vm: &str,
        argv: impl IntoIterator<Item = S>,
    ) -> Result<ExecOutcome, Error> {
        let session = self.exec(vm, &ExecRequest::new(argv)).await?;
        session.collect(16 << 20).await.map_err(|e| self.broken(e))
    }

    /// The serial console: raw bytes, both ways.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn console(&self, vm: &str) -> Result<BoxIo, Error> {
        self.upgrade(Method::GET, &format!("/v1/vms/{}/console", quote(vm)), api::CONSOLE_PROTOCOL).await
    }

    /// Writes a file in the guest. `mode`: permission bits.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn put_file(
        &self,
        vm: &str,
        path: &str,
        mode: u32,
        size: u64,
        content: impl AsyncRead + Send + Sync + Unpin + 'static,
    ) -> Result<(), Error> {
        let uri = format!("/v1/vms/{}/files?path={}&mode={mode}", quote(vm), quote(path));
        let body = ReaderBody { reader: content, buffer: vec![0; 32 << 10].into_boxed_slice() };
        let mut request = self.request(Method::PUT, &uri, BodyExt::boxed(body))?;
        request.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(size));
        self.send(request).await.map(drop)
    }

    /// Reads a file in the guest.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn get_file(&self, vm: &str, path: &str) -> Result<FileStream, Error> {
        let uri = format!("/v1/vms/{}/files?path={}", quote(vm), quote(path));
        let response = self.send(self.request(Method::GET, &uri, empty())?).await?;
        Ok(FileStream { body: response.into_body(), target: self.target() })
    }

    // --------------------------------------------------------------------------------------------------- networks

    /// Makes a network with a name.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn create_network(&self, request: &api::NetworkRequest) -> Result<api::NetworkInfo, Error> {
        self.json(Method::POST, "/v1/networks", request).await
    }

    /// The networks with a name.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn networks(&self) -> Result<api::NetworkList, Error> {
        self.get("/v1/networks").await
    }

    /// Removes a network with a name that no VM has joined.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn remove_network(&self, name: &str) -> Result<(), Error> {
        self.none(Method::DELETE, &format!("/v1/networks/{}", quote(name))).await
    }

    // ------------------------------------------------------------------------------------------------ checkpoints

    /// Checkpoints a VM, which goes on.
    ///
    /// # Errors
    /// [`Error`]; the VM goes on then, too.
    pub async fn checkpoint(&self, vm: &str, request: &api::CheckpointRequest) -> Result<api::CheckpointResult, Error> {
        self.json(Method::POST, &format!("/v1/vms/{}/checkpoints", quote(vm)), request).await
    }

    /// The checkpoints of this host.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn checkpoints(&self) -> Result<api::CheckpointList, Error> {
        self.get("/v1/checkpoints").await
    }

    /// One checkpoint, by id or prefix.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn checkpoint_info(&self, checkpoint: &str) -> Result<api::CheckpointInfo, Error> {
        self.get(&format!("/v1/checkpoints/{}", quote(checkpoint))).await
    }

    /// Waits until the background copy of the checkpoint's newest layer has ended.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn checkpoint_wait(&self, checkpoint: &str) -> Result<api::CheckpointInfo, Error> {
        self.get(&format!("/v1/checkpoints/{}/wait", quote(checkpoint))).await
    }

    /// Removes a checkpoint that nothing uses.
    ///
    /// # Errors
    /// [`Error`]; [`ErrorCode::InUse`] names the users.
    pub async fn remove_checkpoint(&self, checkpoint: &str) -> Result<(), Error> {
        self.none(Method::DELETE, &format!("/v1/checkpoints/{}", quote(checkpoint))).await
    }

    /// Clones of a checkpoint: all, or an error and none.
    ///
    /// # Errors
    /// [`Error`]; [`ErrorCode::ForkFailed`] says what became of each.
    pub async fn clone_checkpoint(
        &self,
        checkpoint: &str,
        request: &api::CloneRequest,
    ) -> Result<api::CloneResponse, Error> {
        self.json(Method::POST, &format!("/v1/checkpoints/{}/clones", quote(checkpoint)), request).await
    }

    /// Checkpoint and clones in one call: all, or an error and nothing.
    ///
    /// # Errors
    /// [`Error`]; [`ErrorCode::ForkFailed`] says what became of each.
    pub async fn fork(&self, vm: &str, request: &api::ForkRequest) -> Result<api::ForkResponse, Error> {
        self.json(Method::POST, &format!("/v1/vms/{}/fork", quote(vm)), request).await
    }

    /// What the pages of a checkpoint are; waits until that is known. `largest`: how many files, processes and slab caches.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn colors(&self, checkpoint: &str, largest: Option<usize>) -> Result<api::CheckpointColors, Error> {
        let largest = largest.map_or_else(String::new, |largest| format!("?largest={largest}"));
        self.get(&format!("/v1/checkpoints/{}/colors{largest}", quote(checkpoint))).await
    }

    /// The checkpoint's color map, encoded; waits until there is one.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn color_map(&self, checkpoint: &str) -> Result<Vec<u8>, Error> {
        let path = format!("/v1/checkpoints/{}/colors/map", quote(checkpoint));
        let response = self.send(self.request(Method::GET, &path, empty())?).await?;
        self.bytes(response.into_body()).await
    }

    /// The pages in which a checkpoint differs from another one of its family.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn changed_pages(&self, checkpoint: &str, since: &str) -> Result<api::ChangedPages, Error> {
        self.get(&format!("/v1/checkpoints/{}/changed?since={}", quote(checkpoint), quote(since))).await
    }

    /// The checkpoint's descriptor, as it goes to another host.
    ///
    /// # Errors
    /// [`Error`]; there is none while trust between hosts is not set up.
    pub async fn descriptor(&self, checkpoint: &str) -> Result<Vec<u8>, Error> {
        let path = format!("/v1/checkpoints/{}/descriptor", quote(checkpoint));
        let response = self.send(self.request(Method::GET, &path, empty())?).await?;
        self.bytes(response.into_body()).await
    }

    /// Opens a lease: VMs made with it are removed when it is dropped, or when this process dies.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn lease(&self) -> Result<Lease, Error> {
        let io = self.upgrade(Method::POST, "/v1/leases", api::LEASE_PROTOCOL).await?;
        let mut reader = BufReader::new(io).take(4096);
        let mut line = String::new();
        reader.read_line(&mut line).await.map_err(|e| self.broken(e))?;
        let info: api::LeaseInfo = serde_json::from_str(&line).map_err(|e| self.answer("a lease", e))?;
        Ok(Lease { id: info.lease, io: reader.into_inner().into_inner() })
    }

    // ------------------------------------------------------------------------------------------------------ hosts

    /// About the host.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn info(&self) -> Result<api::HostInfo, Error> {
        self.get("/v1/info").await
    }

    /// What the host can do.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn doctor(&self) -> Result<api::DoctorReport, Error> {
        self.get("/v1/doctor").await
    }

    /// The guest images on the host.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn images(&self) -> Result<api::GuestImageList, Error> {
        self.get("/v1/images").await
    }

    /// Counters and histograms of the host.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn stats(&self) -> Result<api::HostStats, Error> {
        self.get("/v1/stats").await
    }

    /// The same as Prometheus text.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn metrics(&self) -> Result<String, Error> {
        self.text("/metrics").await
    }

    /// The OpenAPI document.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn openapi(&self) -> Result<String, Error> {
        self.text("/openapi.json").await
    }

    /// The pool of pre-started QEMUs.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn pool(&self) -> Result<api::PoolStatus, Error> {
        self.get("/v1/pool").await
    }

    /// Has pre-started QEMUs made ready.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn warm(&self, request: &api::PoolRequest) -> Result<api::PoolStatus, Error> {
        self.json(Method::POST, "/v1/pool", request).await
    }

    /// Makes the certificate authority and this host's certificate; then the daemon listens on TCP.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn host_init(&self, request: &api::HostInitRequest) -> Result<api::HostList, Error> {
        self.json(Method::POST, "/v1/host/init", request).await
    }

    /// A token with which one more host can join.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn host_token(&self, request: &api::TokenRequest) -> Result<api::TokenResponse, Error> {
        self.json(Method::POST, "/v1/host/token", request).await
    }

    /// Makes this host a member of the token's group.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn host_join(&self, request: &api::JoinRequest) -> Result<api::HostList, Error> {
        self.json(Method::POST, "/v1/host/join", request).await
    }

    /// All hosts, with whether they answer.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn hosts(&self) -> Result<api::HostList, Error> {
        self.get("/v1/hosts").await
    }

    /// Has the host take no new VMs (or take them again), and tells what is left on it.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn drain(&self, request: &api::DrainRequest) -> Result<api::DrainReport, Error> {
        self.json(Method::POST, "/v1/host/drain", request).await
    }

    /// Ends the daemon.
    ///
    /// # Errors
    /// [`Error`].
    pub async fn shutdown(&self, request: &api::ShutdownRequest) -> Result<(), Error> {
        let bytes = serde_json::to_vec(request).map_err(|e| self.answer("a request", e))?;
        let request = self.json_request(Method::POST, "/v1/shutdown", bytes)?;
        self.send(request).await.map(drop)
    }

    // ------------------------------------------------------------------------------------------------- underneath

    /// Sends any request and returns the response as it comes, whatever its status: for passing requests on.
    ///
    /// # Errors
    /// When there is no connection or it breaks.
    pub async fn forward<B>(&self, request: Request<B>) -> Result<Response<Incoming>, Error>
    where
        B: Body<Data = Bytes> + Send + Sync + 'static,
        B::Error: Into<BoxError>,
    {
        self.transmit(request.map(|body| body.map_err(Into::into).boxed())).await
    }

    pub(crate) async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, Error> {
        self.decode(self.send(self.request(Method::GET, path, empty())?).await?).await
    }

    async fn text(&self, path: &str) -> Result<String, Error> {
        let response = self.send(self.request(Method::GET, path, empty())?).await?;
        let bytes = self.bytes(response.into_body()).await?;
        String::from_utf8(bytes).map_err(|e| self.answer("text", e))
    }

    pub(crate) async fn none(&self, method: Method, path: &str) -> Result<(), Error> {
        self.send(self.request(method, path, empty())?).await.map(drop)
    }

    pub(crate) async fn json<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &(impl Serialize + Sync),
    ) -> Result<T, Error> {
        let bytes = serde_json::to_vec(body).map_err(|e| self.answer("a request", e))?;
        self.decode(self.send(self.json_request(method, path, bytes)?).await?).await
    }

    pub(crate) fn json_request(&self, method: Method, path: &str, bytes: Vec<u8>) -> Result<Request<SendBody>, Error> {
        let mut request = self.request(method, path, full(bytes))?;
        request.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
        Ok(request)
    }

    pub(crate) fn request(&self, method: Method, path: &str, body: SendBody) -> Result<Request<SendBody>, Error> {
        let mut request = Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, "rametd")
            .body(body)
            .map_err(|e| self.broken(e))?;
        if let Some(host) = &self.host {
            request.headers_mut().insert(api::HOST_HEADER, host.clone());
        }
        Ok(request)
    }

    pub(crate) async fn decode<T: DeserializeOwned>(&self, response: Response<Incoming>) -> Result<T, Error> {
        let bytes = self.bytes(response.into_body()).await?;
        serde_json::from_slice(&bytes).map_err(|e| self.answer("JSON", e))
    }

    pub(crate) async fn bytes(&self, body: Incoming) -> Result<Vec<u8>, Error> {
        let body = http_body_util::Limited::new(body, MAX_ANSWER).collect().await.map_err(|e| self.broken(e))?;
        Ok(body.to_bytes().to_vec())
    }

    /// Sends, and makes an error of every status that is no success.
    pub(crate) async fn send(&self, request: Request<SendBody>) -> Result<Response<Incoming>, Error> {
        let response = self.transmit(request).await?;
        if response.status().is_success() || response.status() == StatusCode::SWITCHING_PROTOCOLS {
            return Ok(response);
        }
        let status = response.status();
        let bytes = self.bytes(response.into_body()).await?;
        Err(match serde_json::from_slice::<ErrorBody>(&bytes) {
            Ok(body) => Error::Api(Box::new(body)),
            Err(_) => Error::Answer {
                target: self.target(),
                what: "an error",
                message: format!("{status}: {}", String::from_utf8_lossy(&bytes[..bytes.len().min(400)])),
            },
        })
    }

    async fn upgrade(&self, method: Method, path: &str, protocol: &'static str) -> Result<BoxIo, Error> {
        let mut request = self.request(method, path, empty())?;
        request.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("upgrade"));
        request.headers_mut().insert(header::UPGRADE, HeaderValue::from_static(protocol));
        let response = self.send(request).await?;
        if response.status() != StatusCode::SWITCHING_PROTOCOLS {
            return Err(Error::Answer {
                target: self.target(),
                what: "an upgrade",
                message: format!("{} instead of 101", response.status()),
            });
        }
        let upgraded = hyper::upgrade::on(response).await.map_err(|e| self.broken(e))?;
        Ok(BoxIo::new(TokioIo::new(upgraded)))
    }

    /// Over a kept connection or a new one. A request that a kept connection could not even begin is sent again.
    async fn transmit(&self, mut request: Request<SendBody>) -> Result<Response<Incoming>, Error> {
        let keep = !request.headers().contains_key(header::UPGRADE);
        let kept = || self.inner.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        while let Some(mut sender) = kept() {
            if sender.ready().await.is_err() {
                continue;
            }
            match sender.try_send_request(request).await {
                Ok(response) => {
                    self.keep(sender, keep);
                    return Ok(response);
                }
                Err(mut err) => match err.take_message() {
                    Some(back) => request = back,
                    None => return Err(self.broken(err.into_error())),
                },
            }
        }
        let mut sender = self.open().await?;
        let response = sender.send_request(request).await.map_err(|e| self.broken(e))?;
        self.keep(sender, keep);
        Ok(response)
    }

    fn keep(&self, sender: SendRequest<SendBody>, keep: bool) {
        let mut idle = self.inner.idle.lock().unwrap_or_else(PoisonError::into_inner);
        if keep && idle.len() < KEPT && !sender.is_closed() {
            idle.push(sender);
        }
    }

    async fn open(&self) -> Result<SendRequest<SendBody>, Error> {
        let failed = |source| Error::Connect { target: self.target(), source };
        let io = tokio::time::timeout(CONNECT_TIMEOUT, self.inner.connect.connect())
            .await
            .map_err(|_| {
                failed(std::io::Error::new(
                    std::io::ErrorKind::TimedOut,
                    format!("no connection within {} s", CONNECT_TIMEOUT.as_secs()),
                ))
            })?
            .map_err(failed)?;
        let (sender, connection) = http1::handshake(TokioIo::new(io)).await.map_err(|e| self.broken(e))?;
        // Ends when the connection closes or the sender is dropped.
        tokio::spawn(connection.with_upgrades());
        Ok(sender)
    }

    fn broken(&self, err: impl fmt::Display) -> Error {
        Error::Broken { target: self.target(), message: err.to_string() }
    }

    pub(crate) fn answer(&self, what: &'static str, err: impl fmt::Display) -> Error {
        Error::Answer { target: self.target(), what, message: err.to_string() }
    }
}

/// A lease: while it lives, so do the VMs made with it. Dropping it removes them.
#[derive(Debug)]
pub struct Lease {
    id: String,
    io: BoxIo,
}

impl Lease {
    /// For [`api::CloneRequest::lease`] and [`api::RunRequest::lease`].
    #[must_use]
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Returns when the daemon has gone away and the lease with it.
    pub async fn lost(&mut self) {
        let mut byte = [0];
        while matches!(self.io.read(&mut byte).await, Ok(n) if n > 0) {}
    }
}

/// A file's content on its way from the guest.
#[derive(Debug)]
pub struct FileStream {
    body: Incoming,
    target: String,
}

impl FileStream {
    /// The next bytes; none at the end of the file.
    ///
    /// # Errors
    /// When the connection breaks: what came so far is then not the whole file.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Error> {
        while let Some(frame) = self.body.frame().await {
            let frame = frame.map_err(|e| Error::Broken { target: self.target.clone(), message: e.to_string() })?;
            if let Ok(data) = frame.into_data() {
                return Ok(Some(data));
            }
        }
        Ok(None)
    }

    /// The whole file, when it is no longer than `limit`.
    ///
    /// # Errors
    /// When the connection breaks or the file is longer.
    pub async fn read_to_end(mut self, limit: usize) -> Result<Vec<u8>, Error> {
        let mut out = Vec::new();
        while let Some(bytes) = self.next().await? {
            if out.len() + bytes.len() > limit {
                return Err(Error::Broken { target: self.target, message: format!("the file is over {limit} bytes") });
            }
            out.extend_from_slice(&bytes);
        }
        Ok(out)
    }
}

/// A reader as a request's body.
struct ReaderBody<R> {
    reader: R,
    buffer: Box<[u8]>,
}

impl<R: AsyncRead + Unpin> Body for ReaderBody<R> {
    type Data = Bytes;
    type Error = BoxError;
    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BoxError>>> {
        let this = self.get_mut();
        let mut buf = ReadBuf::new(&mut this.buffer);
        match Pin::new(&mut this.reader).poll_read(cx, &mut buf) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Err(err)) => Poll::Ready(Some(Err(err.into()))),
            Poll::Ready(Ok(())) if buf.filled().is_empty() => Poll::Ready(None),
            Poll::Ready(Ok(())) => Poll::Ready(Some(Ok(Frame::data(Bytes::copy_from_slice(buf.filled()))))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::Connecting;
    use tokio::io::AsyncWriteExt;

    #[test]
    fn paths_are_quoted() {
        assert_eq!(quote("web-1.x_~"), "web-1.x_~");
        assert_eq!(quote("/etc/a b&c"), "%2Fetc%2Fa%20b%26c");
        assert_eq!(quote("é"), "%C3%A9");
    }

    /// A daemon that answers every connection with the same bytes.
    struct Canned(&'static str);
    impl Connect for Canned {
        fn connect(&self) -> Connecting<'_> {
            let text = self.0;
            Box::pin(async move {
                let (ours, mut theirs) = tokio::io::duplex(1 << 16);
                tokio::spawn(async move {
                    let mut request = vec![0; 1 << 16];
                    let _ = theirs.read(&mut request).await;
                    let _ = theirs.write_all(text.as_bytes()).await;
                });
                Ok(BoxIo::new(ours))
            })
        }
        fn target(&self) -> String {
            "the test".to_owned()
        }
    }

    #[tokio::test]
    async fn the_daemons_error_comes_through() {
        let client = Client::with_connector(Canned(concat!(
            "HTTP/1.1 404 Not Found\r\ncontent-length: 68\r\n\r\n",
            r#"{"code":"not_found","message":"No VM 'x'","remedy":"try `ramet ps`"}"#
        )));
        let err = client.vm("x").await.unwrap_err();
        assert_eq!(err.code(), Some(ErrorCode::NotFound));
        assert_eq!(err.to_string(), "No VM 'x'");
        assert_eq!(err.remedy().unwrap(), "try `ramet ps`");
    }

    #[tokio::test]
    async fn an_answer_that_is_not_ours_is_named() {
        let client = Client::with_connector(Canned("HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n[]"));
        assert!(matches!(client.info().await, Err(Error::Answer { what: "JSON", .. })));
        let client = Client::with_connector(Canned("SSH-2.0-x\r\n"));
        assert!(matches!(client.info().await, Err(Error::Broken { .. })));
    }

    #[tokio::test]
    async fn a_missing_socket_has_a_remedy() {
        let err = Client::unix("/nonexistent/rametd.sock").info().await.unwrap_err();
        assert!(err.to_string().contains("/nonexistent/rametd.sock"), "{err}");
        assert!(err.remedy().unwrap().contains("--socket"));
    }
}
