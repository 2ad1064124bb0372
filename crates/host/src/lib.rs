//! rametd: one daemon per host. VMs, checkpoints, clones and forks, pagers, and trust between hosts, behind one HTTP API.
//!
//! Where to look:
//!
//! | module | what it does |
//! | --- | --- |
//! | [`api`] | the HTTP API: routes, who may do what, sockets, OpenAPI; thin |
//! | [`daemon`] | what lives as long as the process; finding things by name; limits |
//! | [`vms`], [`guest`] | booting, listing, stopping, watching VMs; talking to what runs inside |
//! | [`checkpoints`] | taking one of a running VM, who uses it, removing it |
//! | [`colors`] | what each page of a checkpoint is: made behind it, kept, sent along |
//! | [`clone`], [`local`], [`remote`] | forks: plan, make (here, on other hosts), commit or undo |
//! | `prepared` | clones of a checkpoint that are loaded before anybody asks for them |
//! | `reboot` | clones that boot anew: another QEMU, with the kernel of their image or of another host's |
//! | `disks` | overlays over golden images: frozen at checkpoints, served to other hosts, merged, removed |
//! | `keep` | a VM's disk as a new image, at the VM's end |
//! | `nets` | families' private networks: addresses, taps, published ports, what other hosts are told |
//! | `tunnel` | encrypted tunnels: this host's key, and how hosts learn each other's |
//! | [`leases`] | VMs that live as long as a connection |
//! | [`pagers`] | supervision of pagers, and the client of their control sockets |
//! | [`peers`] | other hosts: certificates, joining, passing requests on |
//! | [`state`], [`recover`] | what is remembered over a restart, and what is done with it |
//! | [`stats`], [`metrics`] | timelines, histograms, counters, Prometheus text |
//! | [`logs`] | logs of guests, QEMUs and pagers, kept short |
//! | [`backend`] | how QEMU and guest images are used: the only module that knows `ramet_vmm` in detail |
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod api;
pub mod backend;
pub mod checkpoints;
pub mod clone;
pub mod colors;
pub mod config;
pub mod daemon;
mod disks;
pub mod error;
pub mod guest;
mod keep;
pub mod leases;
pub mod local;
pub mod logs;
pub mod memory;
pub mod metrics;
pub mod names;
mod nets;
pub mod pagers;
pub mod peers;
mod plan;
mod prepared;
mod reboot;
pub mod recover;
pub mod remote;
mod served_disks;
pub mod state;
pub mod stats;
mod tunnel;
pub mod undo;
pub mod vms;
