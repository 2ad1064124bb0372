//! Files in and out. A file that comes in appears under its name only when it is complete.

use crate::stream::Stream;
use ramet_guest::protocol::{FileGet, FileInfo, FilePut, MAX_PAYLOAD, kind};
use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Permission bits that are taken and told.
const MODE: u32 = 0o7777;

/// Takes a file from the host.
pub(crate) fn put(stream: &Arc<Stream>, request: FilePut, close: &dyn Fn()) {
    let result = receive(stream, &request);
    close();
    finish(stream, &request.path, "write", result);
}

/// Gives a file to the host.
pub(crate) fn get(stream: &Arc<Stream>, request: FileGet, close: &dyn Fn()) {
    let result = send(stream, Path::new(&request.path));
    close();
    finish(stream, &request.path, "read", result);
}

fn finish(stream: &Arc<Stream>, path: &str, verb: &str, result: io::Result<()>) {
    match result {
        Ok(()) => stream.send(kind::EXIT, &0i32.to_le_bytes()),
        Err(error) => stream.send(kind::ERROR, format!("cannot {verb} {path} in the guest: {error}").as_bytes()),
    }
}

/// Removes a file that did not become whole.
struct Partial(Option<PathBuf>);

impl Drop for Partial {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            drop(std::fs::remove_file(path));
        }
    }
}

fn receive(stream: &Arc<Stream>, request: &FilePut) -> io::Result<()> {
    let path = Path::new(&request.path);
    let (Some(name), true) = (path.file_name(), path.is_absolute()) else {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "an absolute path of a file is wanted"));
    };
    if path.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    let mut name = std::ffi::OsString::from(name);
    name.push(format!(".ramet-{:08x}", stream.id));
    let partial_path = path.with_file_name(name);
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&partial_path)?;
    let mut partial = Partial(Some(partial_path.clone()));

    let mut written = 0u64;
    while let Some(bytes) = stream.next_input() {
        written += bytes.len() as u64;
        if written > request.size {
            break;
        }
        file.write_all(&bytes)?;
        stream.took(bytes.len());
    }
    if written != request.size {
        let text = format!("{} bytes were announced, {written} came", request.size);
        return Err(io::Error::new(io::ErrorKind::UnexpectedEof, text));
    }
    file.set_permissions(Permissions::from_mode(request.mode & MODE))?;
    std::fs::rename(&partial_path, path)?;
    partial.0 = None;
    Ok(())
}

fn send(stream: &Arc<Stream>, path: &Path) -> io::Result<()> {
    // A FIFO without a writer would block an open for reading.
    let flags = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    let mut file = OpenOptions::new().read(true).custom_flags(flags).open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    let info = FileInfo { mode: metadata.mode() & MODE, size: metadata.len() };
    stream.send(kind::FILE_INFO, &serde_json::to_vec(&info)?);
    copy(stream, &mut file)
}

fn copy(stream: &Arc<Stream>, file: &mut File) -> io::Result<()> {
    let mut buffer = vec![0; MAX_PAYLOAD];
    while let Some(room) = stream.take_credit(buffer.len()) {
        let read = file.read(&mut buffer[..room])?;
        stream.return_credit(room - read);
        if read == 0 {
            break;
        }
        stream.send(kind::STDOUT, &buffer[..read]);
    }
    Ok(())
}
