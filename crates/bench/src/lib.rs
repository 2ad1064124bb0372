//! Experiments that print tables and JSON.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod clone;
pub mod color;
pub mod demo;
pub mod fault;
pub mod identity;
mod qemu;
pub mod report;
