//! Threads of the agent, and their place among the guest's.

use rustix::process::{getpriority_process, setpriority_process};
use std::io;

/// Stack of a thread. Only what is touched is ever there.
const STACK: usize = 128 * 1024;

/// Starts a thread.
pub(crate) fn helper(work: impl FnOnce() + Send + 'static) -> io::Result<std::thread::JoinHandle<()>> {
    std::thread::Builder::new().stack_size(STACK).spawn(work)
}

/// While it lives, this thread has another place among the guest's that are not in real time.
#[derive(Debug)]
pub(crate) struct Priority(Option<i32>);

impl Priority {
    /// Before all others.
    pub(crate) fn first() -> Self {
        Self::nice(-20)
    }

    /// A quarter of what another one gets, so that work which can wait still comes to its end on a busy machine.
    pub(crate) fn modest() -> Self {
        Self::nice(6)
    }

    fn nice(value: i32) -> Self {
        let before = getpriority_process(None).ok();
        Self(before.filter(|_| setpriority_process(None, value).is_ok()))
    }
}

impl Drop for Priority {
    fn drop(&mut self) {
        if let Some(before) = self.0 {
            let _ = setpriority_process(None, before);
        }
    }
}
