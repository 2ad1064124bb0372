//! The HTTP API of `rametd`: types of its requests and responses, and an async client.
//!
//! ```no_run
//! # async fn example() -> Result<(), ramet_client::Error> {
//! use ramet_client::{Client, api};
//! let client = Client::unix("/run/ramet/rametd.sock");
//! let fork = client.fork("web", &api::ForkRequest { clones: api::CloneRequest::new(8), ..Default::default() }).await?;
//! println!("the parent stood still for {} us", fork.parent.pause_us);
//! # Ok(()) }
//! ```
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod api;
mod client;
mod error;
pub mod exec;
mod peer;
pub mod transport;

pub use client::{Client, FileStream, Lease};
pub use error::Error;
