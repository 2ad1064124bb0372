//! The two system calls that cannot be made safely through `rustix`.
#![allow(unsafe_code, reason = "one ioctl and one unshare; see each")]

use std::ffi::c_void;
use std::io;
use std::os::fd::AsFd;

use rustix::ioctl::{Ioctl, IoctlOutput, Opcode};
use rustix::thread::UnshareFlags;

/// `struct ifreq` as TUNSETIFF reads and writes it: a name, then flags in a union of 24 bytes.
#[repr(C, align(8))]
#[derive(Debug)]
struct IfReq {
    name: [u8; 16],
    flags: u16,
    rest: [u8; 22],
}

const _: () = assert!(size_of::<IfReq>() == 40);

const TUNSETIFF: Opcode = 0x4004_54ca;
/// A device of IP packets.
const IFF_TUN: u16 = 0x0001;
/// A device of Ethernet frames.
const IFF_TAP: u16 = 0x0002;
/// No header of packet information.
const IFF_NO_PI: u16 = 0x1000;
/// Each frame has a `virtio_net_hdr`.
const IFF_VNET_HDR: u16 = 0x4000;
/// Fail if there is a device of that name.
const IFF_TUN_EXCL: u16 = 0x8000;

struct SetIff<'a>(&'a mut IfReq);

// SAFETY: TUNSETIFF takes a pointer to a `struct ifreq`, of which `IfReq` has size and layout (asserted above), and which
// outlives the call. The kernel copies one back, to the same place; any bytes are a valid `IfReq`.
unsafe impl Ioctl for SetIff<'_> {
    type Output = ();
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        TUNSETIFF
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::from_mut(self.0).cast()
    }

    unsafe fn output_from_ptr(_: IoctlOutput, _: *mut c_void) -> rustix::io::Result<()> {
        Ok(())
    }
}

/// Makes the tap `name` and attaches it to `tun`, a descriptor of `/dev/net/tun`. The namespace is the one in which that
/// was opened.
pub(crate) fn attach_tap(tun: impl AsFd, name: &str, vnet_header: bool) -> io::Result<()> {
    attach(tun, name, if vnet_header { IFF_TAP | IFF_VNET_HDR } else { IFF_TAP })
}

/// Makes the device `name` of IP packets, as [`attach_tap`] does a tap.
pub(crate) fn attach_tun(tun: impl AsFd, name: &str) -> io::Result<()> {
    attach(tun, name, IFF_TUN)
}

fn attach(tun: impl AsFd, name: &str, flags: u16) -> io::Result<()> {
    let mut request = IfReq { name: [0; 16], flags: flags | IFF_NO_PI | IFF_TUN_EXCL, rest: [0; 22] };
    if name.len() >= request.name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: `SetIff` describes this request truly (see there), and `tun` is borrowed for the call.
    unsafe { rustix::ioctl::ioctl(tun, SetIff(&mut request)) }.map_err(io::Error::from)
}

/// Puts the calling thread into a new network namespace. Call it on a thread that ends soon.
pub(crate) fn unshare_network() -> io::Result<()> {
    // SAFETY: only the table of open files is dangerous to unshare; NEWNET leaves it shared.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }.map_err(io::Error::from)
}
