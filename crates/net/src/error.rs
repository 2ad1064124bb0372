//! The error of this crate.

use std::io;

/// Failure of an operation on a network.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A text that is no address.
    #[error("{text:?} is not {what}")]
    BadAddress {
        /// What it should be.
        what: &'static str,
        /// What it is.
        text: String,
    },
    /// A name that a device or namespace cannot have.
    #[error("{name:?} cannot be {what}: use 1 to {max} lower-case letters, digits and dashes that are not reserved")]
    BadName {
        /// What was to be named.
        what: &'static str,
        /// The name.
        name: String,
        /// The most characters.
        max: usize,
    },
    /// A number out of its range.
    #[error("{value} cannot be {what}: {remedy}")]
    BadValue {
        /// What was to be set.
        what: &'static str,
        /// The value.
        value: String,
        /// What can be set.
        remedy: &'static str,
    },
    /// A program that must be installed.
    #[error("`{program}` was not found: install the package {package} on this host")]
    MissingProgram {
        /// The program.
        program: &'static str,
        /// The package of Debian and most others that has it.
        package: &'static str,
    },
    /// A program that failed.
    #[error("Failed to {what}: `{program}` said: {output}")]
    Command {
        /// What it was to do.
        what: String,
        /// The program.
        program: &'static str,
        /// What it wrote on its standard error.
        output: String,
    },
    /// The kernel refused a request, or the request could not be made.
    #[error("Failed to {what}{}", remedy(source))]
    Kernel {
        /// What was to be done.
        what: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// Another program, or another family, has this port of the host.
    #[error("Port {port} of this host is taken{}: choose another port, or free it", holder(by))]
    PortTaken {
        /// The port.
        port: u16,
        /// The family that has it, if one has.
        by: Option<String>,
    },
    /// The network was removed.
    #[error("The network {name} was removed: make it anew")]
    Gone {
        /// Its name.
        name: String,
    },
}

fn remedy(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::PermissionDenied => ": run the daemon as root, or with CAP_NET_ADMIN and CAP_SYS_ADMIN",
        io::ErrorKind::NotFound => ": is it gone, or its kernel module missing?",
        _ => "",
    }
}

fn holder(by: &Option<String>) -> String {
    by.as_ref().map(|family| format!(" by the network {family}")).unwrap_or_default()
}

impl Error {
    /// A refused request of the kernel.
    pub(crate) fn kernel(what: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self::Kernel { what: what.into(), source: source.into() }
    }
}

/// Result of an operation on a network.
pub type Result<T, E = Error> = std::result::Result<T, E>;
