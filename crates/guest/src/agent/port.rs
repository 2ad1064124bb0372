//! The byte channel to the host.
//!
//! A virtio port behaves in its own way while no one on the host is connected: `poll` reports a hang-up at once and
//! for ever, and `read` gives 0 at once. But a blocking *write* sleeps until the host connects. So [`Port::read`]'s 0
//! is followed by [`Port::wait_for_host`], which writes one delimiter: no timer, no spinning, and an answer to the
//! first `HELLO` as soon as the host is there.

use ramet_guest::protocol::{self, PORT_NAME};
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Where the channel is.
#[derive(Debug)]
pub(crate) enum Source {
    /// The virtio port named `ramet.agent`.
    Virtio,
    /// A serial port or terminal.
    Device(PathBuf),
    /// The standard input, used in both directions (a socket).
    Stdin,
}

impl Source {
    /// The virtio port, unless the kernel's command line says `ramet.agent=/dev/...`.
    pub(crate) fn find() -> Self {
        let cmdline = std::fs::read_to_string("/proc/cmdline").unwrap_or_default();
        let device = cmdline.split_ascii_whitespace().find_map(|word| word.strip_prefix("ramet.agent="));
        device.map_or(Self::Virtio, |path| Self::Device(PathBuf::from(path)))
    }

    /// Opens the channel, waiting for as long as there is none.
    pub(crate) fn open(&self) -> Port {
        let mut pause = Duration::from_millis(2);
        let mut said = false;
        let begun = Instant::now();
        loop {
            match self.try_open() {
                Ok(file) => return Port { file, frame: Mutex::new(Vec::new()), endless: !matches!(self, Self::Stdin) },
                Err(error) => {
                    if !said && begun.elapsed() > Duration::from_secs(5) {
                        eprintln!("ramet-agent: still waiting for {self:?}: {error}");
                        said = true;
                    }
                }
            }
            std::thread::sleep(pause);
            // Quick while the guest boots, seldom where there is no such port at all.
            if begun.elapsed() > Duration::from_secs(5) {
                pause = (pause * 2).min(Duration::from_secs(5));
            }
        }
    }

    fn try_open(&self) -> io::Result<File> {
        match self {
            Self::Stdin => Ok(File::from(io::stdin().as_fd().try_clone_to_owned()?)),
            Self::Virtio => open_both_ways(&find_virtio(Path::new("/sys/class/virtio-ports"))?),
            Self::Device(path) => {
                let file = open_both_ways(path)?;
                if let Ok(mut settings) = rustix::termios::tcgetattr(&file) {
                    settings.make_raw();
                    settings.set_speed(115_200)?;
                    rustix::termios::tcsetattr(&file, rustix::termios::OptionalActions::Now, &settings)?;
                }
                Ok(file)
            }
        }
    }
}

fn open_both_ways(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = rustix::fs::OFlags::NOCTTY.bits();
    OpenOptions::new().read(true).write(true).custom_flags(flags.cast_signed()).open(path)
}

fn find_virtio(class: &Path) -> io::Result<PathBuf> {
    for entry in std::fs::read_dir(class)? {
        let entry = entry?;
        if std::fs::read_to_string(entry.path().join("name")).is_ok_and(|name| name.trim_end() == PORT_NAME) {
            return Ok(Path::new("/dev").join(entry.file_name()));
        }
    }
    Err(io::Error::new(io::ErrorKind::NotFound, format!("no virtio port is named {PORT_NAME}")))
}

/// An open channel. One thread reads; any thread writes, a whole frame at a time.
#[derive(Debug)]
pub(crate) struct Port {
    file: File,
    /// Guards writing; holds the buffer for the frame, used again and again.
    frame: Mutex<Vec<u8>>,
    endless: bool,
}

impl Port {
    /// Whether end of file only means that the host has gone for now.
    pub(crate) fn is_endless(&self) -> bool {
        self.endless
    }

    /// Reads what has come, waiting for something. 0 means that no host is connected.
    pub(crate) fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(buffer)
    }

    /// Sends one frame whole. Sleeps while the host does not take it.
    pub(crate) fn send(&self, kind: u8, stream: u32, payload: &[u8]) -> io::Result<()> {
        let mut frame = self.frame.lock().unwrap_or_else(PoisonError::into_inner);
        frame.clear();
        protocol::encode(kind, stream, payload, &mut frame).map_err(io::Error::other)?;
        self.write(&frame)
    }

    /// Returns when a host is connected: see the top of this file.
    pub(crate) fn wait_for_host(&self) -> io::Result<()> {
        let guard = self.frame.lock().unwrap_or_else(PoisonError::into_inner);
        let begun = Instant::now();
        let result = self.write(&[0]);
        drop(guard);
        if begun.elapsed() < Duration::from_millis(1) {
            // Other devices than virtio ports do not sleep in a write: never spin.
            std::thread::sleep(Duration::from_millis(2));
        }
        result
    }

    fn write(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match (&self.file).write(bytes) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(written) => bytes = &bytes[written..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_pause(&error) => std::thread::sleep(Duration::from_millis(2)),
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// Errors of a device that pass when the host comes back.
fn is_pause(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_port_by_its_name() {
        let dir = tempfile::tempdir().unwrap();
        for (port, name) in [("vport1p1", "org.qemu.guest_agent.0\n"), ("vport1p2", "ramet.agent\n")] {
            std::fs::create_dir(dir.path().join(port)).unwrap();
            std::fs::write(dir.path().join(port).join("name"), name).unwrap();
        }
        assert_eq!(find_virtio(dir.path()).unwrap(), Path::new("/dev/vport1p2"));
        std::fs::remove_dir_all(dir.path().join("vport1p2")).unwrap();
        assert_eq!(find_virtio(dir.path()).unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
