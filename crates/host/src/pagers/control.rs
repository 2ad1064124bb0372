//! The async client of a pager's control socket.
//!
//! Connections are kept for the next call; a call that finds none opens one, so calls do not wait for each other. A pager
//! that is being restarted is waited for. A request whose connection broke after it was sent may have been carried out:
//! it is sent again only when that does no harm.

use std::{
    path::{Path, PathBuf},
    sync::Mutex,
    time::Duration,
};

use ramet_color::CpuRoot;
use ramet_memory::{ImageId, LayerId, VmId};
use ramet_pager::control::{
    AttachReply, ChangedReply, ColorBase, ColorReply, CommitReply, ControlError, ImageReport, PingReply, PrepareReply,
    Request, Response, SourceAddress, SpecReply, StatsReport, View,
};
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader},
    net::UnixStream,
    time::{Instant, sleep, timeout_at},
};

use crate::stats::lock;

/// How long a pager that is being restarted is waited for.
const RECONNECT: Duration = Duration::from_secs(10);
/// How long a call may take, restart included.
const CALL: Duration = Duration::from_secs(30);
/// How long the copying of a layer may take.
const COPY: Duration = Duration::from_secs(600);
/// Longest answer: statistics of a big family.
const MAX_LINE: u64 = 64 << 20;
const KEPT: usize = 16;

/// Why a pager did not do what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum PagerError {
    /// It refused or failed: its own words.
    #[error("{0}")]
    Refused(#[from] ControlError),
    /// It could not be reached in time.
    #[error("The pager at {} can't be reached: {message}", path.display())]
    Unreachable {
        /// Its socket.
        path: PathBuf,
        /// The cause.
        message: String,
    },
    /// It went away, or did not answer in time; the request may have been carried out.
    #[error("The pager at {} went away during a request: {message}", path.display())]
    Lost {
        /// Its socket.
        path: PathBuf,
        /// The cause.
        message: String,
    },
}

impl PagerError {
    /// The pager's own code, when it refused.
    #[must_use]
    pub fn code(&self) -> Option<&str> {
        match self {
            Self::Refused(err) => Some(&err.code),
            _ => None,
        }
    }
}

type Result<T> = std::result::Result<T, PagerError>;

/// A client of one pager.
#[derive(Debug)]
pub struct Control {
    path: PathBuf,
    idle: Mutex<Vec<BufReader<UnixStream>>>,
}

impl Control {
    /// A client of the pager behind this socket. Connects at the first call.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self { path: path.to_owned(), idle: Mutex::default() }
    }

    /// Who is there? Waits at most `wait` for it.
    ///
    /// # Errors
    /// [`PagerError`].
    pub async fn ping(&self, wait: Duration) -> Result<PingReply> {
        self.call(&Request::Ping, true, wait).await
    }

    /// Maps a view into a VM.
    ///
    /// # Errors
    /// [`PagerError`].
    pub async fn attach(&self, vm: VmId, shim_sock: &Path, pid: u32, view: View) -> Result<AttachReply> {
        let request = Request::Attach { vm, shim_sock: shim_sock.to_owned(), pid, view };
        match self.call(&request, false, CALL).await {
            Err(PagerError::Lost { .. }) => {
                // The next pager may have it already: let go of it, and begin again.
                self.detach(vm).await?;
                self.call(&request, false, CALL).await
            }
            other => other,
        }
    }

    /// Forgets a VM. No error when it is not known.
    ///
    /// # Errors
    /// [`PagerError`].
    pub async fn detach(&self, vm: VmId) -> Result<()> {
        match self.call::<serde_json::Value>(&Request::Detach { vm }, true, COPY).await {
            Err(err) if err.code() == Some("no_such_vm") => Ok(()),
            other => other.map(drop),
        }
    }

    /// Prepares a checkpoint while the VM runs.
    ///
    /// # Errors
    /// [`PagerError`].
    pub async fn checkpoint_prepare(&self, vm: VmId, image: ImageId, layer: LayerId) -> Result<PrepareReply> {
        self.call(&Request::CheckpointPrepare { vm, image, layer }, false, COPY).await
    }

    /// Commits the prepared checkpoint. The VM stands still: no waiting for a pager that is gone.
    ///
    /// # Errors
    /// [`PagerError`].
    pub async fn checkpoint_commit(&self, vm: VmId) -> Result<CommitReply> {
        self.call_now(&Request::CheckpointCommit { vm }, false, CALL, Duration::ZERO).await
    }

    /// Gives the prepared checkpoint up. No error when there is none.
    ///
    /// # Errors
    /// [`PagerError`].
    pub async fn checkpoint_abort(&self, vm: VmId) -> Result<()> {
        match self.call::<serde_json::Value>(&Request::CheckpointAbort { vm }, true, CALL).await {
            Err(err) if matches!(err.code(), Some("state" | "no_such_vm")) => Ok(()),
            other => other.map(drop),
        }
    }

    /// Where the image's description has been written.
    ///
    /// # Errors
    /// [`PagerError`].
    pub async fn image_spec(&self, image: ImageId) -> Result<PathBuf> {
        self.call::<SpecReply>(&Request::ImageSpec { image }, true, CALL).await.map(|r| r.path)
    }

    /// Adds an image of another host. No error when it is there already: then the pager learns where its pages come from
    /// now.
    ///
    /// # Errors
    /// [`PagerError`].
    pub async fn image_add(&self, image: ImageId, spec_path: &Path, source: SourceAddress) -> Result<()> {
        let request = Request::ImageAdd { image, spec_path: spec_path.to_owned(), source };
        match self.call::<serde_json::Value>(&request, true, CALL).await {
            Err(err) if err.code() == Some("exists") => Ok(()),
            other => other.map(drop),
        }
    }

    /// Drops an image. No error when it is not there.
    ///
    /// # Errors
    /// [`PagerError`].
    pub async fn image_drop(&self, image: ImageId) -> Result<()> {
        match self.call::<serde_json::Value>(&Request::ImageDrop { image }, true, COPY).await {
            Err(err) if err.code() == Some("no_such_image") => Ok(()),
            other => other.map(drop),
        }
    }

    /// Waits for the end of the image's copying.
    ///
    /// # Errors
    /// [`PagerError`].
    pub async fn image_wait(&self, image: ImageId) -> Result<ImageReport> {
        self.call(&Request::ImageWait { image }, true, COPY).await
    }

    /// Has the image colored, once it is copied: its map is written to `path`.
    ///
    /// # Errors
    /// [`PagerError`].
    pub async fn image_color(
        &self,
        image: ImageId,
        cpus: Vec<CpuRoot>,
        path: &Path,
        base: Option<ColorBase>,
    ) -> Result<ColorReply> {
        let request = Request::ImageColor { image, cpus, path: path.to_owned(), base };
        self.call(&request, true, COPY).await
    }

    /// The pages in which two images differ.
    ///
    /// # Errors
    /// [`PagerError`].
    pub async fn image_changed(&self, image: ImageId, since: ImageId) -> Result<Vec<[u64; 2]>> {
        self.call::<ChangedReply>(&Request::ImageChanged { image, since }, true, COPY).await.map(|r| r.runs)
    }

    /// What the image has.
    ///
    /// # Errors
    /// [`PagerError`].
    pub async fn image_status(&self, image: ImageId) -> Result<ImageReport> {
        self.call(&Request::ImageStatus { image }, true, CALL).await
    }

    /// Everything, counted. A pager that does not answer within `wait` is not waited for.
    ///
    /// # Errors
    /// [`PagerError`].
    pub async fn stats(&self, wait: Duration) -> Result<StatsReport> {
        self.call(&Request::Stats, true, wait).await
    }

    /// Ends the pager, VMs or not.
    ///
    /// # Errors
    /// [`PagerError`].
    pub async fn shutdown(&self) -> Result<()> {
        match self.call::<serde_json::Value>(&Request::Shutdown { force: true }, false, Duration::from_secs(2)).await {
            // It may be gone before its answer.
            Err(PagerError::Lost { .. }) => Ok(()),
            other => other.map(drop),
        }
    }

    pub(crate) async fn call<T: DeserializeOwned>(
        &self,
        request: &(impl Serialize + Sync),
        again: bool,
        limit: Duration,
    ) -> Result<T> {
        self.call_now(request, again, limit, RECONNECT).await
    }

    /// The same, with another patience towards a pager that is not there.
    async fn call_now<T: DeserializeOwned>(
        &self,
        request: &(impl Serialize + Sync),
        again: bool,
        limit: Duration,
        patience: Duration,
    ) -> Result<T> {
        let deadline = Instant::now() + limit;
        let lost = |message: String| PagerError::Lost { path: self.path.clone(), message };
        let mut line = serde_json::to_vec(request).map_err(|e| lost(e.to_string()))?;
        line.push(b'\n');
        let mut kept = true;
        loop {
            let (mut connection, fresh) = self.connection(kept, deadline.min(Instant::now() + patience)).await?;
            match timeout_at(deadline, exchange(&mut connection, &line)).await {
                Ok(Ok(answer)) => {
                    let response =
                        serde_json::from_slice(&answer).map_err(|e| lost(format!("its answer makes no sense: {e}")))?;
                    let mut idle = lock(&self.idle);
                    if idle.len() < KEPT {
                        idle.push(connection);
                    }
                    drop(idle);
                    return match response {
                        Response::Ok(value) => {
                            serde_json::from_value(value).map_err(|e| lost(format!("its answer makes no sense: {e}")))
                        }
                        Response::Error(err) => Err(err.into()),
                    };
                }
                Ok(Err(err)) => {
                    // A kept connection that the pager had closed before: nothing was carried out.
                    let unsent = !fresh && err.kind() == std::io::ErrorKind::BrokenPipe;
                    if !(again || unsent) || Instant::now() >= deadline {
                        return Err(lost(err.to_string()));
                    }
                    lock(&self.idle).clear();
                    kept = false;
                }
                Err(_) => return Err(lost(format!("no answer within {} s", limit.as_secs_f32()))),
            }
        }
    }

    async fn connection(&self, kept: bool, deadline: Instant) -> Result<(BufReader<UnixStream>, bool)> {
        if kept {
            while let Some(connection) = lock(&self.idle).pop() {
                if alive(connection.get_ref()) {
                    return Ok((connection, false));
                }
            }
        }
        let mut pause = Duration::from_millis(1);
        loop {
            match UnixStream::connect(&self.path).await {
                Ok(stream) => return Ok((BufReader::new(stream), true)),
                Err(err) if Instant::now() + pause >= deadline => {
                    return Err(PagerError::Unreachable { path: self.path.clone(), message: err.to_string() });
                }
                Err(_) => {}
            }
            sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(50));
        }
    }
}

/// Whether the other side has not closed a connection on which nothing is due.
fn alive(stream: &UnixStream) -> bool {
    matches!(stream.try_read(&mut [0]), Err(err) if err.kind() == std::io::ErrorKind::WouldBlock)
}

async fn exchange(connection: &mut BufReader<UnixStream>, line: &[u8]) -> std::io::Result<Vec<u8>> {
    connection.get_mut().write_all(line).await?;
    let mut answer = Vec::new();
    (&mut *connection).take(MAX_LINE).read_until(b'\n', &mut answer).await?;
    if answer.last() != Some(&b'\n') {
        return Err(std::io::Error::new(std::io::ErrorKind::UnexpectedEof, "the connection ended"));
    }
    Ok(answer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::UnixListener;

    /// A pager that answers each connection's first request with the next text; `None`: closes without an answer.
    fn pager(path: &Path, answers: Vec<Option<&'static str>>) -> tokio::task::JoinHandle<Vec<String>> {
        let listener = UnixListener::bind(path).unwrap();
        tokio::spawn(async move {
            let mut requests = Vec::new();
            for answer in answers {
                let (stream, _) = listener.accept().await.unwrap();
                let mut stream = BufReader::new(stream);
                let mut line = String::new();
                stream.read_line(&mut line).await.unwrap();
                requests.push(line);
                if let Some(answer) = answer {
                    stream.get_mut().write_all(answer.as_bytes()).await.unwrap();
                }
            }
            requests
        })
    }

    const PONG: &str = "{\"ok\":{\"version\":\"1\",\"pid\":7,\"listen\":null}}\n";

    #[tokio::test]
    async fn a_harmless_request_is_sent_again_to_the_next_pager() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let served = pager(&path, vec![None, Some(PONG)]);
        let control = Control::new(&path);
        assert_eq!(control.ping(CALL).await.unwrap().pid, 7);
        assert_eq!(served.await.unwrap(), ["{\"op\":\"ping\"}\n", "{\"op\":\"ping\"}\n"]);
    }

    #[tokio::test]
    async fn a_commit_is_never_sent_twice() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let served = pager(&path, vec![None]);
        let err = Control::new(&path).checkpoint_commit(VmId::from_u128(1)).await.unwrap_err();
        assert!(matches!(err, PagerError::Lost { .. }), "{err}");
        assert_eq!(served.await.unwrap().len(), 1);
    }

    #[tokio::test]
    async fn a_commit_does_not_wait_for_a_pager_that_is_gone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let control = Control::new(&path);
        // Never there; then: gone, with its socket and a kept connection left behind.
        for _ in 0..2 {
            let begin = Instant::now();
            let err = control.checkpoint_commit(VmId::from_u128(1)).await.unwrap_err();
            assert!(matches!(err, PagerError::Unreachable { .. } | PagerError::Lost { .. }), "{err}");
            assert!(begin.elapsed() < Duration::from_secs(2), "the VM stands still meanwhile");
            let _ = std::fs::remove_file(&path);
            let served = pager(&path, vec![Some(PONG)]);
            control.ping(CALL).await.unwrap();
            served.await.unwrap();
        }
    }

    #[tokio::test]
    async fn refusals_keep_their_code() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let _served = pager(
            &path,
            vec![
                Some("{\"error\":{\"code\":\"in_use\",\"message\":\"by VM x\"}}\n"),
                Some("{\"error\":{\"code\":\"no_such_vm\",\"message\":\"?\"}}\n"),
                Some("what?\n"),
            ],
        );
        let control = Control::new(&path);
        let err = control.image_drop(ImageId::from_u128(1)).await.unwrap_err();
        assert_eq!((err.code(), err.to_string().as_str()), (Some("in_use"), "by VM x"));
        control.detach(VmId::from_u128(1)).await.unwrap();
        assert!(matches!(control.stats(CALL).await, Err(PagerError::Lost { .. })));
    }

    #[tokio::test]
    async fn a_pager_that_is_not_there_is_waited_for_and_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("late");
        let control = Control::new(&path);
        let err = control.ping(Duration::from_millis(30)).await.unwrap_err();
        assert!(err.to_string().contains("late"), "{err}");
        let waiting = tokio::spawn(async move { control.ping(CALL).await });
        sleep(Duration::from_millis(30)).await;
        let _served = pager(&path, vec![Some(PONG)]);
        assert_eq!(waiting.await.unwrap().unwrap().pid, 7);
    }
}
