//! Threads of the agent, and their place among the guest's.

use rustix::process::{getpriority_process, setpriority_process};
use std::io;

/// Stack of a thread. Only what is touched is ever there.
const STACK: usize = 128 * 1024;

/// Starts a thread.
pub(crate) fn helper(work: impl FnOnce() + Send + 'static) -> io::Result<std::thread::JoinHandle<()>> {
    std::thread::Builder::new().stack_size(STACK).spawn(work)
}

/// While it lives, this thread comes before all others of the guest's that are not in real time.
#[derive(Debug)]
pub(crate) struct Urgent(Option<i32>);

impl Urgent {
    const NICE: i32 = -20;

    pub(crate) fn begin() -> Self {
        let before = getpriority_process(None).ok();
        Self(before.filter(|_| setpriority_process(None, Self::NICE).is_ok()))
    }
}

impl Drop for Urgent {
    fn drop(&mut self) {
        if let Some(before) = self.0 {
            let _ = setpriority_process(None, before);
        }
    }
}
