//! What the host and the agent inside a guest say to each other.
//!
//! [`protocol`] holds the frames and messages, shared by both sides and strictly bounded: neither side trusts the
//! other. [`host`] (feature `host`, on by default) is the tokio client that hosts use. The agent itself is the binary
//! `ramet-agent` of this package, which uses threads and no tokio, so that it stays small and touches few pages.
//!
//! Around a checkpoint the host sends `FREEZE` (hooks, `sync`, and all applications stand still), takes the checkpoint,
//! and sends the parent `THAW`. A clone gets first of all its [`Identity`](protocol::Identity): entropy, clock,
//! addresses, names. Then, when the host has opened its network, `RELEASE`: hooks, a signal or an event for those
//! programs that asked for one, and the applications run.
//!
//! The static agent that goes into guest images is built by
//!
//! ```text
//! RUSTFLAGS="-C target-feature=+crt-static" cargo build --profile guest -p ramet-guest --bin ramet-agent \
//!     --no-default-features --target x86_64-unknown-linux-gnu --target-dir target/guest
//! ```
//!
//! and lies then in `target/guest/x86_64-unknown-linux-gnu/guest/ramet-agent`.

#[cfg(feature = "host")]
pub mod host;
pub mod protocol;
