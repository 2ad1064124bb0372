//! How pages and checkpoints travel between hosts.
//!
//! * [`frame`]: the page protocol, as bytes. Pure: no sockets, no allocation while decoding.
//! * [`stream`]: blocking, full-duplex connections that carry frames; mutual TLS over TCP.
//! * [`control`]: what frames the talk between rametd and the processes that serve pages on its host.
//! * [`descriptor`]: what a host needs to start a clone.
//!
//! Every page carries [`page_checksum`] from the copy out of its parent to the host that maps it. The checksum covers the
//! page's layer and number too, so a page that arrives intact at the wrong place is refused like a damaged one.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod control;
pub mod descriptor;
pub mod frame;
#[doc(hidden)]
pub mod fuzzing;
pub mod stream;

pub use descriptor::{Descriptor, DescriptorError, PageSource};
pub use frame::{
    Encoding, ErrorCode, Frame, LayerStatus, Message, PageEntry, Pages, PagesFull, PagesWriter, Priority, WireError,
};
pub use ramet_memory::page_checksum;
pub use stream::{Connection, Listener, Options, Pending, Receiver, Sender, StreamError, TlsConfig, TlsFiles};
