//! The part of the NBD protocol that is spoken here: fixed newstyle negotiation, simple replies, reading.
//!
//! [`Server`] gives a [`Disk`] to QEMUs of this host. [`Client`] reads from a `qemu-storage-daemon`.

mod client;
mod server;

pub use client::Client;
pub use server::{Disk, Server};

use std::io::{self, Read};

/// Most bytes of one read.
pub const MAX_READ: u32 = 32 << 20;
/// Most bytes of an option's data; longer ones end the connection.
const MAX_OPTION: u32 = 4096 + 64;

const NBDMAGIC: u64 = u64::from_be_bytes(*b"NBDMAGIC");
const IHAVEOPT: u64 = u64::from_be_bytes(*b"IHAVEOPT");
const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
const REQUEST: u32 = 0x2560_9513;
const SIMPLE_REPLY: u32 = 0x6744_6698;

const FIXED_NEWSTYLE: u16 = 1;
const NO_ZEROES: u16 = 2;

const OPT_EXPORT_NAME: u32 = 1;
const OPT_ABORT: u32 = 2;
const OPT_LIST: u32 = 3;
const OPT_INFO: u32 = 6;
const OPT_GO: u32 = 7;

const REP_ACK: u32 = 1;
const REP_SERVER: u32 = 2;
const REP_INFO: u32 = 3;
const REP_ERROR: u32 = 1 << 31;
const REP_ERR_UNSUP: u32 = REP_ERROR + 1;
const REP_ERR_INVALID: u32 = REP_ERROR + 3;

const INFO_EXPORT: u16 = 0;
const INFO_BLOCK_SIZE: u16 = 3;

const HAS_FLAGS: u16 = 1;
const READ_ONLY: u16 = 1 << 1;
const SEND_FLUSH: u16 = 1 << 2;
const CAN_MULTI_CONN: u16 = 1 << 8;

const CMD_READ: u16 = 0;
const CMD_WRITE: u16 = 1;
const CMD_DISC: u16 = 2;
const CMD_FLUSH: u16 = 3;
const CMD_TRIM: u16 = 4;
const CMD_WRITE_ZEROES: u16 = 6;

const EPERM: u32 = 1;
const EINVAL: u32 = 22;

fn array<const N: usize>(from: &mut impl Read) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    from.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn u16_of(from: &mut impl Read) -> io::Result<u16> {
    array(from).map(u16::from_be_bytes)
}

fn u32_of(from: &mut impl Read) -> io::Result<u32> {
    array(from).map(u32::from_be_bytes)
}

fn u64_of(from: &mut impl Read) -> io::Result<u64> {
    array(from).map(u64::from_be_bytes)
}

fn bad(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the peer does not speak NBD as it should: {what}"))
}
