//! The preload object: all the change that a stock VMM needs.
//!
//! Loaded into QEMU by `LD_PRELOAD`, it does three things, and nothing at all unless `RAMET_SHIM_SOCK` is set:
//!
//! 1. Its constructor makes a userfaultfd for the process and keeps it open for ever. (A userfaultfd belongs to the
//!    address space that made it. Were its last descriptor closed, the kernel would unregister all memory and missing pages
//!    would read as zeros.)
//! 2. It stands in front of `mmap` to learn where the VMM maps the file `RAMET_SHIM_RAM`. With `RAMET_SHIM_MODE=boot` it
//!    maps anonymous memory there instead, for a VM of its own; with `late` the mapping stays as it is until 3.
//! 3. A thread with all signals blocked serves requests on the socket: hand over the userfaultfd, and map files privately
//!    over RAM. The protocol is described with its client, `ramet_kernel::shim`.
//!
//! The VMM goes on believing that its RAM is a shared file, and so leaves it out of its saved state.
//!
//! Environment: `RAMET_SHIM_SOCK`, `RAMET_SHIM_RAM`, `RAMET_SHIM_MODE`, and `RAMET_SHIM_UFFD_DEV`, the number of an open
//! descriptor of `/dev/userfaultfd` (the VMM itself is unprivileged). All are removed from the environment.
#![allow(unsafe_code, reason = "an object that is loaded into a C program: its interfaces are C's")]

use libc::{c_char, c_int, c_void, off_t, size_t};
use std::{
    ffi::CStr,
    mem::{size_of, zeroed},
    ptr::null_mut,
    sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering},
};

const MAGIC: u32 = 0x4d48_5352;
const INFO: u32 = 1;
const MAP: u32 = 2;
const USERFAULTFD_IOC_NEW: libc::c_ulong = 0xaa00;
const MAX_FILES: usize = 253;
const MAX_SEGMENTS: u32 = 65_536;
const PAGE: u64 = 4096;

static UFFD: AtomicI32 = AtomicI32::new(-1);
static RAM_ADDR: AtomicU64 = AtomicU64::new(0);
static RAM_LEN: AtomicU64 = AtomicU64::new(0);
static RAM_DEV: AtomicU64 = AtomicU64::new(0);
static RAM_INO: AtomicU64 = AtomicU64::new(0);
static ACTIVE: AtomicBool = AtomicBool::new(false);
static BOOT: AtomicBool = AtomicBool::new(false);

#[repr(C)]
#[derive(Clone, Copy)]
struct Segment {
    guest_offset: u64,
    len: u64,
    file_offset: u64,
    fd_index: u32,
    flags: u32,
}

#[repr(C)]
struct Response {
    magic: u32,
    errno: i32,
    ram_addr: u64,
    ram_len: u64,
    pid: u32,
    pad: u32,
}
const _: () = assert!(size_of::<Segment>() == 32 && size_of::<Response>() == 32);

#[used]
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: extern "C" fn() = start;

fn env(name: &CStr) -> Option<&'static CStr> {
    // SAFETY: `name` ends with a zero; nobody changes the environment while constructors run.
    let value = unsafe { libc::getenv(name.as_ptr()) };
    if value.is_null() {
        return None;
    }
    // SAFETY: getenv returns a string that ends with a zero. It is used before this constructor removes it.
    Some(unsafe { CStr::from_ptr(value) })
}

fn errno() -> c_int {
    // SAFETY: the location is this thread's own.
    unsafe { *libc::__errno_location() }
}

fn die(what: &str) -> ! {
    let text = format!("ramet preload object: {what}: {}\n", std::io::Error::last_os_error());
    // SAFETY: writes from a live buffer of the given length.
    unsafe { libc::write(2, text.as_ptr().cast(), text.len()) };
    // SAFETY: ends the process at once; a VMM without its userfaultfd would run on wrong memory.
    unsafe { libc::_exit(112) }
}

extern "C" fn start() {
    let Some(path) = env(c"RAMET_SHIM_SOCK") else { return };
    let Some(ram) = env(c"RAMET_SHIM_RAM") else { die("RAMET_SHIM_RAM is not set") };
    // SAFETY: an all-zero `stat` is valid, and is overwritten.
    let mut stat: libc::stat = unsafe { zeroed() };
    // SAFETY: both pointers are valid for the call.
    if unsafe { libc::stat(ram.as_ptr(), &raw mut stat) } != 0 {
        die("RAMET_SHIM_RAM can't be read");
    }
    RAM_DEV.store(stat.st_dev, Ordering::Relaxed);
    RAM_INO.store(stat.st_ino, Ordering::Relaxed);
    BOOT.store(env(c"RAMET_SHIM_MODE").is_some_and(|m| m.to_bytes() == b"boot"), Ordering::Relaxed);
    UFFD.store(make_uffd(), Ordering::Relaxed);
    let listener = listen(path);
    for name in [c"RAMET_SHIM_SOCK", c"RAMET_SHIM_RAM", c"RAMET_SHIM_MODE", c"RAMET_SHIM_UFFD_DEV", c"LD_PRELOAD"] {
        // SAFETY: constructors run before any other thread.
        unsafe { libc::unsetenv(name.as_ptr()) };
    }
    ACTIVE.store(true, Ordering::Release);
    start_thread(listener);
}

fn make_uffd() -> c_int {
    // Not user-mode-only: KVM and system calls fault inside the kernel.
    let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
    let device = env(c"RAMET_SHIM_UFFD_DEV").and_then(|v| v.to_str().ok()?.parse::<c_int>().ok());
    if let Some(device) = device {
        // SAFETY: the ioctl takes flags by value; on a wrong descriptor it fails.
        let fd = unsafe { libc::ioctl(device, USERFAULTFD_IOC_NEW, flags) };
        // SAFETY: the launcher opened it for this use only.
        unsafe { libc::close(device) };
        if fd >= 0 {
            return fd;
        }
    }
    // SAFETY: takes flags by value.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, flags) };
    if fd < 0 {
        die("no userfaultfd: it needs /dev/userfaultfd, root, or vm.unprivileged_userfaultfd=1");
    }
    fd as c_int
}

fn listen(path: &CStr) -> c_int {
    // SAFETY: an all-zero address is valid.
    let mut address: libc::sockaddr_un = unsafe { zeroed() };
    address.sun_family = libc::AF_UNIX as libc::sa_family_t;
    let bytes = path.to_bytes();
    if bytes.len() >= address.sun_path.len() {
        die("RAMET_SHIM_SOCK is longer than 107 bytes");
    }
    for (to, from) in address.sun_path.iter_mut().zip(bytes) {
        *to = *from as c_char;
    }
    // SAFETY: takes numbers.
    let fd = unsafe { libc::socket(libc::AF_UNIX, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0) };
    // SAFETY: the path is a valid string.
    unsafe { libc::unlink(path.as_ptr()) };
    let len = size_of::<libc::sockaddr_un>() as libc::socklen_t;
    // SAFETY: the address is valid and of this length.
    let bound = unsafe { libc::bind(fd, (&raw const address).cast(), len) };
    // SAFETY: takes numbers.
    if fd < 0 || bound != 0 || unsafe { libc::listen(fd, 8) } != 0 {
        die("RAMET_SHIM_SOCK can't be listened at");
    }
    fd
}

fn start_thread(listener: c_int) {
    // SAFETY: all-zero sets are valid, and both are filled below.
    let (mut all, mut before): (libc::sigset_t, libc::sigset_t) = unsafe { (zeroed(), zeroed()) };
    // SAFETY: the set is ours.
    unsafe { libc::sigfillset(&raw mut all) };
    // The thread inherits the mask: the VMM's signals are never handled on it.
    // SAFETY: both sets are valid.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before) };
    let body = move || loop {
        // SAFETY: null addresses are allowed.
        let fd = unsafe { libc::accept4(listener, null_mut(), null_mut(), libc::SOCK_CLOEXEC) };
        if fd >= 0 {
            while serve(fd) {}
            // SAFETY: ours, and closed once.
            unsafe { libc::close(fd) };
        }
    };
    if std::thread::Builder::new().name("ramet-shim".into()).stack_size(256 << 10).spawn(body).is_err() {
        die("no thread can be started");
    }
    // SAFETY: the set was filled by the call above.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, null_mut()) };
}

/// Room for the files of one message, aligned as control messages are.
#[repr(C, align(8))]
struct Control([u8; 1056]);
const _: () = assert!(size_of::<Control>() >= size_of::<libc::cmsghdr>() + MAX_FILES * 4 + 8);

/// Serves one request; false when the connection is over.
fn serve(fd: c_int) -> bool {
    let mut head = [0u32; 4];
    let mut control = Control([0; 1056]);
    let mut part = libc::iovec { iov_base: head.as_mut_ptr().cast(), iov_len: 16 };
    // SAFETY: an all-zero header is valid.
    let mut message: libc::msghdr = unsafe { zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = control.0.len();
    // SAFETY: all parts of the message outlive the call.
    let got = unsafe { libc::recvmsg(fd, &raw mut message, libc::MSG_CMSG_CLOEXEC | libc::MSG_WAITALL) };
    if got <= 0 {
        return false;
    }
    let mut files = [-1; MAX_FILES];
    let count = received_files(&message, &mut files);
    let [magic, op, segments, wanted] = head;
    let good = got == 16 && magic == MAGIC && segments <= MAX_SEGMENTS && wanted as usize == count;
    let result = match op {
        _ if !good => libc::EPROTO,
        INFO => 0,
        MAP => map(fd, segments, &files[..count]),
        _ => libc::EOPNOTSUPP,
    };
    for &file in &files[..count] {
        // SAFETY: received by us, and closed once; the mappings stay.
        unsafe { libc::close(file) };
    }
    answer(fd, result, op == INFO && result == 0) && good
}

fn received_files(message: &libc::msghdr, files: &mut [c_int; MAX_FILES]) -> usize {
    let mut count = 0;
    // SAFETY: the kernel filled the message; the macros walk inside `msg_control`.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(message) };
    while !header.is_null() {
        // SAFETY: not null, and inside the buffer.
        let (level, kind, len) = unsafe { ((*header).cmsg_level, (*header).cmsg_type, (*header).cmsg_len) };
        if level == libc::SOL_SOCKET && kind == libc::SCM_RIGHTS {
            let bytes = len - size_of::<libc::cmsghdr>();
            for index in 0..bytes / 4 {
                // SAFETY: inside the message's data, which may be unaligned.
                let file = unsafe { libc::CMSG_DATA(header).cast::<c_int>().add(index).read_unaligned() };
                if count < MAX_FILES {
                    files[count] = file;
                    count += 1;
                }
            }
        }
        // SAFETY: as above.
        header = unsafe { libc::CMSG_NXTHDR(message, header) };
    }
    count
}

fn map(fd: c_int, count: u32, files: &[c_int]) -> c_int {
    let (ram, ram_len) = (RAM_ADDR.load(Ordering::Acquire), RAM_LEN.load(Ordering::Acquire));
    for _ in 0..count {
        let mut segment = Segment { guest_offset: 0, len: 0, file_offset: 0, fd_index: 0, flags: 0 };
        let len = size_of::<Segment>();
        // SAFETY: the buffer is of this length, and any bytes are a valid segment.
        let got = unsafe { libc::recv(fd, (&raw mut segment).cast(), len, libc::MSG_WAITALL) };
        if got != len as isize {
            return libc::EPROTO;
        }
        let Segment { guest_offset, len, file_offset, fd_index, flags } = segment;
        let anonymous = flags & 1 != 0;
        let file = if anonymous { Some(&-1) } else { files.get(fd_index as usize) };
        let inside = guest_offset.checked_add(len).is_some_and(|end| end <= ram_len);
        let aligned = (guest_offset | len | file_offset) % PAGE == 0;
        let (Some(&file), true, true, true) = (file, inside, aligned, len > 0 && file_offset <= i64::MAX as u64) else {
            return libc::EINVAL;
        };
        let flags =
            libc::MAP_PRIVATE | libc::MAP_FIXED | libc::MAP_NORESERVE | if anonymous { libc::MAP_ANONYMOUS } else { 0 };
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: replaces a part of the RAM mapping, as just checked, while the VMM is stopped and does not touch it.
        let done = unsafe {
            raw_mmap((ram + guest_offset) as *mut c_void, len as size_t, prot, flags, file, file_offset as off_t)
        };
        if done == libc::MAP_FAILED {
            return errno();
        }
    }
    0
}

fn answer(fd: c_int, result: c_int, with_uffd: bool) -> bool {
    // SAFETY: takes nothing.
    let pid = unsafe { libc::getpid() } as u32;
    let response = Response {
        magic: MAGIC,
        errno: result,
        ram_addr: RAM_ADDR.load(Ordering::Acquire),
        ram_len: RAM_LEN.load(Ordering::Acquire),
        pid,
        pad: 0,
    };
    let mut part = libc::iovec { iov_base: (&raw const response).cast_mut().cast(), iov_len: size_of::<Response>() };
    let mut control = Control([0; 1056]);
    // SAFETY: an all-zero header is valid.
    let mut message: libc::msghdr = unsafe { zeroed() };
    message.msg_iov = &raw mut part;
    message.msg_iovlen = 1;
    if with_uffd {
        message.msg_control = control.0.as_mut_ptr().cast();
        // SAFETY: pure arithmetic.
        message.msg_controllen = unsafe { libc::CMSG_SPACE(4) } as usize;
        // SAFETY: the buffer has room for one header, which is what is asked for.
        let header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
        // SAFETY: pure arithmetic.
        let len = unsafe { libc::CMSG_LEN(4) } as usize;
        // SAFETY: `header` points into `control`, which is aligned and large enough.
        unsafe {
            header.write(libc::cmsghdr { cmsg_len: len, cmsg_level: libc::SOL_SOCKET, cmsg_type: libc::SCM_RIGHTS });
        };
        // SAFETY: the data of the header just written.
        unsafe { libc::CMSG_DATA(header).cast::<c_int>().write_unaligned(UFFD.load(Ordering::Relaxed)) };
    }
    // SAFETY: all parts of the message outlive the call.
    unsafe { libc::sendmsg(fd, &raw const message, libc::MSG_NOSIGNAL) == size_of::<Response>() as isize }
}

/// The system call itself: also usable before symbols can be looked up.
///
/// # Safety
/// As `mmap`.
unsafe fn raw_mmap(addr: *mut c_void, len: size_t, prot: c_int, flags: c_int, fd: c_int, offset: off_t) -> *mut c_void {
    // SAFETY: the caller's duty.
    unsafe { libc::syscall(libc::SYS_mmap, addr, len, prot, flags, fd, offset) as *mut c_void }
}

fn is_ram(prot: c_int, fd: c_int) -> bool {
    if !ACTIVE.load(Ordering::Acquire) || fd < 0 || prot != libc::PROT_READ | libc::PROT_WRITE {
        return false;
    }
    // SAFETY: an all-zero `stat` is valid, and is overwritten.
    let mut stat: libc::stat = unsafe { zeroed() };
    // SAFETY: the pointer is valid; a wrong descriptor makes the call fail.
    let known = unsafe { libc::fstat(fd, &raw mut stat) } == 0;
    known && stat.st_dev == RAM_DEV.load(Ordering::Relaxed) && stat.st_ino == RAM_INO.load(Ordering::Relaxed)
}

/// Stands in front of the C library's `mmap`.
///
/// # Safety
/// As `mmap`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmap(
    addr: *mut c_void,
    len: size_t,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: off_t,
) -> *mut c_void {
    let ram = is_ram(prot, fd);
    let (flags, fd) = if ram && BOOT.load(Ordering::Relaxed) {
        let flags = flags & !(libc::MAP_SHARED | libc::MAP_SHARED_VALIDATE | libc::MAP_SYNC);
        (flags | libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE, -1)
    } else {
        (flags, fd)
    };
    // SAFETY: the caller's duty; for RAM the file is replaced by memory of the same length.
    let mapped = unsafe { raw_mmap(addr, len, prot, flags, fd, if fd < 0 { 0 } else { offset }) };
    if ram && mapped != libc::MAP_FAILED {
        RAM_ADDR.store(mapped as u64, Ordering::Release);
        RAM_LEN.store(len as u64, Ordering::Release);
    }
    mapped
}

/// The same under its other name.
///
/// # Safety
/// As `mmap`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn mmap64(
    addr: *mut c_void,
    len: size_t,
    prot: c_int,
    flags: c_int,
    fd: c_int,
    offset: off_t,
) -> *mut c_void {
    // SAFETY: the caller's duty.
    unsafe { mmap(addr, len, prot, flags, fd, offset) }
}
