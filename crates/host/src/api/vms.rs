//! `/v1/vms`.

use std::pin::Pin;

use axum::{
    Json,
    body::{Body as HttpBody, Bytes},
    extract::{Path, Request, State},
    http::{StatusCode, header},
    response::Response,
};
use ramet_client::api::{
    ErrorBody, ErrorCode, FileQuery, GuestTime, ListVmsQuery, PingReply, RemoveVmQuery, RunRequest, StopRequest,
    VmInfo, VmList, VmStats,
};
use tokio::io::{AsyncRead, AsyncReadExt as _, ReadBuf};

use super::{Answer, Body, Daemonic, Query};
use crate::{
    error::{ApiError, ApiResult},
    guest::agent_failed,
};

/// Boots a VM.
#[utoipa::path(post, path = "/v1/vms", tag = "vms", request_body = RunRequest,
    responses((status = 200, body = VmInfo), (status = "default", body = ErrorBody)))]
pub(super) async fn run(State(daemon): Daemonic, Body(request): Body<RunRequest>) -> Answer<VmInfo> {
    Ok(Json(daemon.run_vm(request).await?))
}

/// Lists VMs.
#[utoipa::path(get, path = "/v1/vms", tag = "vms", params(ListVmsQuery),
    responses((status = 200, body = VmList), (status = "default", body = ErrorBody)))]
pub(super) async fn list(State(daemon): Daemonic, Query(query): Query<ListVmsQuery>) -> Answer<VmList> {
    Ok(Json(daemon.list_vms(query.all_hosts).await))
}

/// Shows a VM.
#[utoipa::path(get, path = "/v1/vms/{vm}", tag = "vms", params(("vm" = String, Path, description = "Name, id, or prefix of the id")),
    responses((status = 200, body = VmInfo), (status = "default", body = ErrorBody)))]
pub(super) async fn show(State(daemon): Daemonic, Path(vm): Path<String>) -> Answer<VmInfo> {
    Ok(Json(daemon.vm_info(&vm).await?))
}

/// Removes a VM.
#[utoipa::path(delete, path = "/v1/vms/{vm}", tag = "vms",
    params(("vm" = String, Path, description = "Name, id, or prefix of the id"), RemoveVmQuery),
    responses((status = 204), (status = "default", body = ErrorBody)))]
pub(super) async fn remove(
    State(daemon): Daemonic,
    Path(vm): Path<String>,
    Query(query): Query<RemoveVmQuery>,
) -> ApiResult<StatusCode> {
    daemon.remove_vm(&vm, &query).await?;
    Ok(StatusCode::NO_CONTENT)
}

/// Shuts a VM down; its record stays.
#[utoipa::path(post, path = "/v1/vms/{vm}/stop", tag = "vms", params(("vm" = String, Path, description = "Name, id, or prefix of the id")),
    request_body = StopRequest, responses((status = 200, body = VmInfo), (status = "default", body = ErrorBody)))]
pub(super) async fn stop(
    State(daemon): Daemonic,
    Path(vm): Path<String>,
    Body(request): Body<StopRequest>,
) -> Answer<VmInfo> {
    Ok(Json(daemon.stop_vm(&vm, &request).await?))
}

/// Memory, counters and latencies of a VM.
#[utoipa::path(get, path = "/v1/vms/{vm}/stats", tag = "vms", params(("vm" = String, Path, description = "Name, id, or prefix of the id")),
    responses((status = 200, body = VmStats), (status = "default", body = ErrorBody)))]
pub(super) async fn stats(State(daemon): Daemonic, Path(vm): Path<String>) -> Answer<VmStats> {
    Ok(Json(daemon.vm_stats(&vm).await?))
}

/// Round trip to the guest's agent.
#[utoipa::path(get, path = "/v1/vms/{vm}/ping", tag = "guest", params(("vm" = String, Path, description = "Name, id, or prefix of the id")),
    responses((status = 200, body = PingReply), (status = "default", body = ErrorBody)))]
pub(super) async fn ping(State(daemon): Daemonic, Path(vm): Path<String>) -> Answer<PingReply> {
    Ok(Json(daemon.ping(&vm).await?))
}

/// The guest's clocks.
#[utoipa::path(get, path = "/v1/vms/{vm}/time", tag = "guest", params(("vm" = String, Path, description = "Name, id, or prefix of the id")),
    responses((status = 200, body = GuestTime), (status = "default", body = ErrorBody)))]
pub(super) async fn time(State(daemon): Daemonic, Path(vm): Path<String>) -> Answer<GuestTime> {
    Ok(Json(daemon.guest_time(&vm).await?))
}

/// Writes a file in the guest: the body is its content, and its length must be told.
#[utoipa::path(put, path = "/v1/vms/{vm}/files", tag = "guest",
    params(("vm" = String, Path, description = "Name, id, or prefix of the id"), FileQuery),
    request_body(content = Vec<u8>, content_type = "application/octet-stream"),
    responses((status = 204), (status = "default", body = ErrorBody)))]
pub(super) async fn put_file(
    State(daemon): Daemonic,
    Path(vm): Path<String>,
    Query(query): Query<FileQuery>,
    request: Request,
) -> ApiResult<StatusCode> {
    let size = request.headers().get(header::CONTENT_LENGTH).and_then(|v| v.to_str().ok()?.parse().ok());
    let size: u64 = size.ok_or_else(|| {
        ApiError::new(ErrorCode::BadRequest, "The file's size is missing").remedy("send the header content-length")
    })?;
    let (record, agent) = daemon.agent_of(&vm).await?;
    let content = BodyReader { body: request.into_body(), rest: Bytes::new() };
    agent
        .put_file(&query.path, query.mode.unwrap_or(0o644), size, content)
        .await
        .map_err(|e| agent_failed(&record.name, &e))?;
    Ok(StatusCode::NO_CONTENT)
}

/// Reads a file in the guest.
#[utoipa::path(get, path = "/v1/vms/{vm}/files", tag = "guest",
    params(("vm" = String, Path, description = "Name, id, or prefix of the id"), FileQuery),
    responses((status = 200, content_type = "application/octet-stream", body = Vec<u8>), (status = "default", body = ErrorBody)))]
pub(super) async fn get_file(
    State(daemon): Daemonic,
    Path(vm): Path<String>,
    Query(query): Query<FileQuery>,
) -> ApiResult<Response> {
    let (record, agent) = daemon.agent_of(&vm).await?;
    let (mut reader, writer) = tokio::io::duplex(64 << 10);
    let copying = tokio::spawn(async move { agent.get_file(&query.path, writer).await });
    // The first bytes tell whether there is such a file at all.
    let mut first = vec![0; 16 << 10];
    let got = reader.read(&mut first).await.unwrap_or(0);
    first.truncate(got);
    if got == 0 {
        let done = copying.await.map_err(|e| ApiError::internal(format!("Reading a file broke: {e}")))?;
        done.map_err(|e| agent_failed(&record.name, &e))?;
        return Ok(Response::new(HttpBody::empty()));
    }
    Ok(Response::new(HttpBody::new(FileBody { first: Some(first.into()), reader, copying: Some(copying) })))
}

/// A request's body as a reader.
struct BodyReader {
    body: HttpBody,
    rest: Bytes,
}

impl AsyncRead for BodyReader {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> std::task::Poll<std::io::Result<()>> {
        use std::task::Poll;
        while self.rest.is_empty() {
            match hyper::body::Body::poll_frame(Pin::new(&mut self.body), cx) {
                Poll::Pending => return Poll::Pending,
                Poll::Ready(None) => return Poll::Ready(Ok(())),
                Poll::Ready(Some(Err(err))) => return Poll::Ready(Err(std::io::Error::other(err))),
                Poll::Ready(Some(Ok(frame))) => self.rest = frame.into_data().unwrap_or_default(),
            }
        }
        let len = self.rest.len().min(buf.remaining());
        buf.put_slice(&self.rest.split_to(len));
        Poll::Ready(Ok(()))
    }
}

/// A guest's file as a response's body: broken off when the guest fails in the middle, never silently cut short.
struct FileBody {
    first: Option<Bytes>,
    reader: tokio::io::DuplexStream,
    copying: Option<tokio::task::JoinHandle<Result<ramet_guest::protocol::FileInfo, ramet_guest::host::AgentError>>>,
}

impl hyper::body::Body for FileBody {
    type Data = Bytes;
    type Error = std::io::Error;
    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<hyper::body::Frame<Bytes>, std::io::Error>>> {
        use std::task::{Poll, ready};
        if let Some(first) = self.first.take() {
            return Poll::Ready(Some(Ok(hyper::body::Frame::data(first))));
        }
        let mut space = [0; 16 << 10];
        let mut buf = ReadBuf::new(&mut space);
        ready!(Pin::new(&mut self.reader).poll_read(cx, &mut buf))?;
        if !buf.filled().is_empty() {
            return Poll::Ready(Some(Ok(hyper::body::Frame::data(Bytes::copy_from_slice(buf.filled())))));
        }
        let Some(copying) = &mut self.copying else { return Poll::Ready(None) };
        let done = ready!(Pin::new(copying).poll(cx));
        self.copying = None;
        match done {
            Ok(Ok(_)) => Poll::Ready(None),
            Ok(Err(err)) => Poll::Ready(Some(Err(std::io::Error::other(err)))),
            Err(err) => Poll::Ready(Some(Err(std::io::Error::other(err)))),
        }
    }
}
