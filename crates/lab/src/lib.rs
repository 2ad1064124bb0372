//! Several Ramet hosts on one machine: each a network namespace with its own `rametd`, joined by a bridge.
//!
//! `ramet lab`, the demo, the benches and the end-to-end tests use it. It needs root: network namespaces, a tmpfs for
//! page files and userfaultfd all do.
//!
//! ```text
//!        netns ramet-NAME-br                     bridge br0; a port for each host, rate-limited when asked for
//!        /        |        \
//!   netns ramet-NAME-h1   -h2   -h3              eth0 10.77.X.1 .2 .3, rametd, its pagers and QEMUs
//!
//!   /run/ramet-lab/NAME/lab.json                 what was made; written before it is made
//!   /run/ramet-lab/NAME/h1/, h1.log, ...         state of each rametd, and what it printed
//! ```
//!
//! # What it does not do
//! The hosts share the machine's processors, memory and file system; nothing but the network is separated. No address
//! leads out of a lab.
//!
//! # Clean-up
//! [`Lab::down`] asks every daemon to end with its VMs, then kills what is left of the lab's programs: those whose
//! network namespace is one of the lab's, or whose command line names the lab's directory. It works from the name alone,
//! so also after any crash, and as often as one likes. A [`Lab`] that is dropped does the same without asking first,
//! unless it was [detached](Lab::detach). Labs of tests that were killed are removed by [`Lab::sweep`], which
//! [`Lab::up`] begins with.
//!
//! ```no_run
//! # async fn example() -> anyhow::Result<()> {
//! use ramet_lab::{Lab, LabOptions};
//! let lab = Lab::up(&LabOptions::for_test("fork")?).await?;
//! println!("{} VMs on h2", lab.client(2).vms(false).await?.vms.len());
//! lab.down().await?;
//! # Ok(()) }
//! ```
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod daemon;
mod lab;
mod net;
mod options;
mod process;
mod record;
mod teardown;

pub use lab::{Lab, LabSummary};
pub use options::{LabOptions, Rate, image_dir, parse_delay};
pub use process::Process;
pub use record::HostRecord;

/// Where labs keep their state.
pub const ROOT: &str = "/run/ramet-lab";
