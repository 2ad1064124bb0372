//! What can go wrong with a VMM.

use std::{
    io,
    path::{Path, PathBuf},
    time::Duration,
};

/// A VMM did not do what was asked. The text names the thing and the remedy.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VmmError {
    /// The program is not there.
    #[error("{} is not installed: install QEMU (Debian, Ubuntu: `apt-get install qemu-system-x86`)", program.display())]
    NotInstalled {
        /// The program.
        program: PathBuf,
    },
    /// A file of the VM could not be made or read.
    #[error("Failed to {what} {}", path.display())]
    File {
        /// What was tried.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The process could not be started.
    #[error("Failed to start {}", program.display())]
    Spawn {
        /// The program.
        program: PathBuf,
        /// Why not.
        #[source]
        source: io::Error,
    },
    /// The process ended instead of coming up, or in the middle of a request.
    #[error("QEMU ended ({exit}). Its last words: {words}")]
    Died {
        /// How it ended.
        exit: String,
        /// The end of its log.
        words: String,
    },
    /// There is no such process any more.
    #[error("The VM in {} no longer runs", dir.display())]
    Gone {
        /// The VM's directory.
        dir: PathBuf,
    },
    /// The VMM refused a command.
    #[error("QEMU refused `{command}`: {message}")]
    Refused {
        /// The QMP command.
        command: String,
        /// QEMU's reason.
        message: String,
    },
    /// The VMM did not answer in time.
    #[error("QEMU did not answer `{command}` within {limit:?}: is its memory served? (`ramet stats` tells)")]
    Timeout {
        /// The QMP command.
        command: String,
        /// The limit.
        limit: Duration,
    },
    /// State could not be saved or loaded.
    #[error("Failed to {what} the devices' state: {message}. QEMU's last words: {words}")]
    State {
        /// `save` or `load`.
        what: &'static str,
        /// QEMU's reason.
        message: String,
        /// The end of its log.
        words: String,
    },
    /// The control connection failed.
    #[error("Lost the control connection to QEMU")]
    Connection(#[source] io::Error),
    /// A machine that can't be started.
    #[error("{0}")]
    Spec(String),
}

/// What cannot be done with a file.
pub(crate) fn file_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> VmmError {
    let path = path.to_owned();
    move |source| VmmError::File { what, path, source }
}
