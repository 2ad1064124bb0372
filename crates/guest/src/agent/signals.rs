//! Signals as a login would have them.

/// Undoes what whoever started the agent had ignored: an ignored signal stays so in every command, and control-C on a
/// terminal would do nothing.
#[allow(unsafe_code, reason = "no safe library gives a signal its default action back")]
pub(crate) fn reset() {
    for signal in
        [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM, libc::SIGTSTP, libc::SIGTTIN, libc::SIGTTOU]
    {
        // SAFETY: the default action runs no code of ours, and no other thread has been started yet.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}
