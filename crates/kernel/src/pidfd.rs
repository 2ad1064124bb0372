//! Processes held by descriptors: no confusion with a later process of the same number.

use crate::check;
use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd},
    time::Duration,
};

/// A descriptor of a process. It becomes readable when the process ends.
///
/// # Errors
/// When there is no such process.
pub fn pidfd_open(pid: u32) -> io::Result<OwnedFd> {
    let pid = libc::pid_t::try_from(pid).map_err(io::Error::other)?;
    // SAFETY: the call takes numbers and returns a new descriptor.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = check(i32::try_from(fd).unwrap_or(-1))?;
    // SAFETY: the kernel has just returned this descriptor and nobody else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sends a signal.
///
/// # Errors
/// When the process is gone or not ours.
pub fn pidfd_send_signal(pidfd: BorrowedFd<'_>, signal: i32) -> io::Result<()> {
    let none = std::ptr::null::<libc::siginfo_t>();
    // SAFETY: a null `siginfo` is allowed; the rest are numbers.
    let rc = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, none, 0) };
    check(i32::try_from(rc).unwrap_or(-1)).map(drop)
}

/// Waits for the process to end; false when it did not in time.
///
/// # Errors
/// When the descriptor is no pidfd.
pub fn pidfd_wait(pidfd: BorrowedFd<'_>, limit: Option<Duration>) -> io::Result<bool> {
    poll_in(pidfd, limit)
}

pub(crate) fn poll_in(fd: BorrowedFd<'_>, limit: Option<Duration>) -> io::Result<bool> {
    let mut entry = libc::pollfd { fd: fd.as_raw_fd(), events: libc::POLLIN, revents: 0 };
    let millis = limit.map_or(-1, |l| i32::try_from(l.as_millis()).unwrap_or(i32::MAX));
    // SAFETY: one valid entry is passed, and its number is 1.
    match check(unsafe { libc::poll(&raw mut entry, 1, millis) }) {
        Ok(count) => Ok(count > 0),
        Err(err) if err.kind() == io::ErrorKind::Interrupted => Ok(false),
        Err(err) => Err(err),
    }
}
