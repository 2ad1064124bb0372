//! Machines: what a VM consists of, and QEMU's command line for it.

use crate::VmmError;
use ramet_memory::ByteSize;
use serde::{Deserialize, Serialize};
use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

/// What runs the guest's instructions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Accel {
    /// QEMU's translator: works everywhere.
    Tcg,
    /// The CPU.
    Kvm,
}

/// How the guest's agent is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AgentPort {
    /// The virtio-serial port `ramet.agent`.
    VirtioSerial,
    /// The second serial port, for guests without virtio.
    IsaSerial,
}

/// A machine. Clones run on one equal to their parent's.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MachineSpec {
    /// QEMU's machine type with its version, which fixes what the guest sees: `pc-i440fx-7.2`.
    pub machine: String,
    /// The guest's memory.
    pub memory: ByteSize,
    /// Virtual CPUs.
    pub cpus: u8,
    /// What runs them.
    pub accel: Accel,
    /// How the agent is reached.
    pub agent: AgentPort,
    /// QEMU's CPU model; by default `max` under TCG and `host` under KVM.
    pub cpu: Option<String>,
    /// The root disk's size as the guest sees it; none: no disk. See [`VmProcess::attach_disk`](crate::VmProcess::attach_disk).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub disk: Option<ByteSize>,
    /// Data volumes, which the guest can only read. See [`VmProcess::attach_volume`](crate::VmProcess::attach_volume).
    #[serde(default, skip_serializing_if = "is_zero")]
    pub volumes: u8,
    /// Network cards. See [`VmProcess::attach_nic`](crate::VmProcess::attach_nic).
    #[serde(default, skip_serializing_if = "is_zero")]
    pub nics: u8,
}

/// Most data volumes and most network cards of a machine: each has an address of its own on the bus.
pub const MOST_CARDS: u8 = 8;

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
fn is_zero(number: &u8) -> bool {
    *number == 0
}

/// The machine type that VMs get unless told otherwise: NICs can be attached late, and QEMU 7.2 and newer have it.
pub const DEFAULT_MACHINE: &str = "pc-i440fx-7.2";

impl MachineSpec {
    /// A machine of the default type with a Linux guest's agent port.
    #[must_use]
    pub fn new(memory: ByteSize, cpus: u8, accel: Accel) -> Self {
        let machine = DEFAULT_MACHINE.to_owned();
        let agent = AgentPort::VirtioSerial;
        Self { machine, memory, cpus, accel, agent, cpu: None, disk: None, volumes: 0, nics: 0 }
    }

    /// Whether QEMU can be asked for such a machine.
    ///
    /// # Errors
    /// [`VmmError::Spec`], which names what is wrong.
    pub fn check(&self) -> Result<(), VmmError> {
        let known = |prefix: &str| {
            self.machine.strip_prefix(prefix).is_some_and(|v| v.bytes().all(|b| b.is_ascii_digit() || b == b'.'))
        };
        if !(known("pc-i440fx-") || known("pc-q35-")) {
            let found = &self.machine;
            return Err(VmmError::Spec(format!(
                "'{found}' is no machine type with a version: use for instance {DEFAULT_MACHINE}"
            )));
        }
        if self.cpus == 0 || self.cpus > 64 {
            return Err(VmmError::Spec(format!("{} CPUs: 1 to 64 are possible", self.cpus)));
        }
        let memory = self.memory.bytes();
        if memory < 16 << 20 || !memory.is_multiple_of(1 << 20) {
            return Err(VmmError::Spec(format!("{} of memory: whole mebibytes are needed, at least 16M", self.memory)));
        }
        for (what, number) in [("data volumes", self.volumes), ("network cards", self.nics)] {
            if number > MOST_CARDS {
                return Err(VmmError::Spec(format!("{number} {what}: at most {MOST_CARDS} are possible")));
            }
        }
        if self.disk.is_some_and(|size| size.bytes() == 0 || !size.bytes().is_multiple_of(4096)) {
            return Err(VmmError::Spec("a disk has whole pages of 4 KiB, at least one".to_owned()));
        }
        Ok(())
    }

    /// Whether anything is attached to it after its VMM was started.
    #[must_use]
    pub fn has_attachments(&self) -> bool {
        self.disk.is_some() || self.volumes > 0 || self.nics > 0
    }

    /// Bus and address of a network card.
    pub(crate) fn nic_slot(&self, index: u8) -> (String, String) {
        if self.is_q35() {
            (format!("port{index}"), "0x0".to_owned())
        } else {
            ("pci.0".to_owned(), format!("{:#x}", NICS + index))
        }
    }

    /// Whether its virtio devices are of the kind before version 1. What is saved of a device of the later kind has an
    /// entry for each of 1024 queues, there or not: 90 KB, and half of the pause for every two devices. Linux drives both,
    /// through ports that PCI Express has few of.
    pub(crate) fn is_legacy(&self) -> bool {
        !self.is_q35()
    }

    fn is_q35(&self) -> bool {
        self.machine.starts_with("pc-q35-")
    }
}

/// Addresses on the bus of the first network card and of the first data volume.
const NICS: u8 = 0x8;
const VOLUMES: u8 = 0x10;

/// How long a guest that finds nothing to boot from waits until it tries again.
const NO_KERNEL_MS: u32 = 3000;

/// How a VM begins.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Boot {
    /// With a kernel.
    Kernel {
        /// The kernel, or a multiboot image.
        kernel: PathBuf,
        /// Its initial file system.
        initrd: Option<PathBuf>,
        /// Its command line.
        cmdline: String,
    },
    /// With the state of another VM, which comes later.
    Incoming,
}

/// The files of a VM, all in one directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VmPaths {
    /// The directory.
    pub dir: PathBuf,
    /// Socket of the machine protocol.
    pub qmp: PathBuf,
    /// Socket of the agent's port.
    pub agent: PathBuf,
    /// Socket of the first serial port.
    pub console: PathBuf,
    /// What the guest wrote to it.
    pub console_log: PathBuf,
    /// Socket of the preload object.
    pub shim: PathBuf,
    /// The file that the VMM takes for its memory. Stays empty.
    pub ram: PathBuf,
    /// What the VMM wrote.
    pub log: PathBuf,
    /// What a later daemon needs to find the VM again.
    pub record: PathBuf,
}

impl VmPaths {
    /// The files of the VM in `dir`.
    #[must_use]
    pub fn new(dir: &Path) -> Self {
        let file = |name: &str| dir.join(name);
        Self {
            dir: dir.to_owned(),
            qmp: file("qmp.sock"),
            agent: file("agent.sock"),
            console: file("console.sock"),
            console_log: file("console.log"),
            shim: file("shim.sock"),
            ram: file("ram"),
            log: file("qemu.log"),
            record: file("vmm.json"),
        }
    }
}

/// A path in QEMU's options: a comma is doubled there.
fn escaped(path: &Path) -> String {
    path.display().to_string().replace(',', ",,")
}

/// The argument that tells QEMU where its control socket is, and others whose QEMU it is.
pub(crate) fn qmp_argument(paths: &VmPaths) -> String {
    format!("unix:{},server=on,wait=off", escaped(&paths.qmp))
}

/// QEMU's arguments. Addresses of devices are pinned, so that devices added later never move the others.
pub(crate) fn arguments(spec: &MachineSpec, boot: &Boot, paths: &VmPaths, sandbox: bool, name: &str) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = Vec::new();
    let mut add = |flag: &str, value: String| arguments.extend([OsString::from(flag), OsString::from(value)]);
    let path = escaped;
    let memory = spec.memory.bytes();
    let (accel, cpu) = match spec.accel {
        Accel::Tcg => ("tcg,thread=multi", "max"),
        Accel::Kvm => ("kvm", "host"),
    };
    add("-name", format!("guest={name},debug-threads=on"));
    add("-accel", accel.to_owned());
    add("-cpu", spec.cpu.clone().unwrap_or_else(|| cpu.to_owned()));
    add("-m", format!("size={memory}b"));
    add("-smp", spec.cpus.to_string());
    add("-object", format!("memory-backend-file,id=ram,size={memory},mem-path={},share=on", path(&paths.ram)));
    // A description of the state's own format is for tools; it would be a third of the state.
    add("-machine", format!("{},memory-backend=ram,graphics=off,suppress-vmdesc=on", spec.machine));
    add("-display", "none".to_owned());
    add("-vga", "none".to_owned());
    add("-rtc", "base=utc,clock=host".to_owned());
    add("-qmp", qmp_argument(paths));
    // Appending, so that whoever cuts the file short leaves no hole in it.
    let log = format!("logfile={},logappend=on", path(&paths.console_log));
    add("-chardev", format!("socket,id=console,path={},server=on,wait=off,{log}", path(&paths.console)));
    add("-device", "isa-serial,chardev=console,index=0".to_owned());
    add("-chardev", format!("socket,id=agent,path={},server=on,wait=off", path(&paths.agent)));
    let kind = if spec.is_legacy() { "disable-modern=on" } else { "disable-modern=off" };
    match spec.agent {
        AgentPort::VirtioSerial => {
            add("-device", format!("virtio-serial-pci,id=serial,addr=0x3,max_ports=4,{kind}"));
            add("-device", "virtserialport,bus=serial.0,nr=1,chardev=agent,name=ramet.agent".to_owned());
            add("-device", "vmgenid,guid=auto".to_owned());
        }
        AgentPort::IsaSerial => add("-device", "isa-serial,chardev=agent,index=1".to_owned()),
    }
    if spec.disk.is_some() || spec.volumes > 0 {
        // A request that needs a missing page of the guest's memory must not hold up the machine protocol.
        add("-object", "iothread,id=io0".to_owned());
    }
    if let Some(size) = spec.disk {
        // A disk of nothing, until the real one is attached.
        add("-blockdev", format!("driver=null-co,node-name=nothing,size={},read-zeroes=on", size.bytes()));
        let errors = "rerror=stop,werror=stop";
        add("-device", format!("virtio-blk-pci,id=disk0,drive=nothing,addr=0x4,iothread=io0,{kind},{errors}"));
    }
    for index in 0..spec.volumes {
        add("-blockdev", format!("driver=null-co,node-name=novolume{index},size=4096,read-zeroes=on,read-only=on"));
        let addr = VOLUMES + index;
        let more = format!("addr={addr:#x},iothread=io0,{kind},rerror=stop");
        add("-device", format!("virtio-blk-pci,id=volume{index},drive=novolume{index},{more}"));
    }
    if spec.is_q35() {
        for index in 0..spec.nics {
            let addr = NICS + index;
            add("-device", format!("pcie-root-port,id=port{index},chassis={},addr={addr:#x}", index + 1));
        }
    }
    if sandbox {
        add("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny".to_owned());
    }
    match boot {
        Boot::Kernel { kernel, initrd, cmdline } => {
            add("-kernel", kernel.display().to_string());
            if let Some(initrd) = initrd {
                add("-initrd", initrd.display().to_string());
            }
            add("-append", cmdline.clone());
        }
        Boot::Incoming => {
            add("-incoming", "defer".to_owned());
            // One that boots anew finds no kernel: it is reset again and again until somebody sees to it, who may have been
            // away at the first time.
            add("-boot", format!("reboot-timeout={NO_KERNEL_MS}"));
            add("-global", "migration.send-configuration=off".to_owned());
        }
    }
    for flag in ["-S", "-nodefaults", "-no-user-config"] {
        arguments.push(flag.into());
    }
    if *boot != Boot::Incoming {
        // The saved state is loaded without its configuration section, so it is saved without it.
        arguments.extend(["-global".into(), "migration.send-configuration=off".into()]);
    }
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn machines_that_make_no_sense_are_named() {
        let good = MachineSpec::new(ByteSize::mib(64), 1, Accel::Tcg);
        good.check().unwrap();
        for (bad, word) in [
            (MachineSpec { machine: "pc".into(), ..good.clone() }, "'pc'"),
            (MachineSpec { machine: "pc-i440fx-7.2,foo=1".into(), ..good.clone() }, "foo"),
            (MachineSpec { cpus: 0, ..good.clone() }, "0 CPUs"),
            (MachineSpec { memory: ByteSize(1), ..good }, "memory"),
        ] {
            let err = bad.check().unwrap_err().to_string();
            assert!(err.contains(word), "{err}");
        }
    }

    #[test]
    fn parent_and_clone_see_the_same_devices() {
        let spec = MachineSpec::new(ByteSize::mib(64), 2, Accel::Tcg);
        let paths = VmPaths::new(Path::new("/vm,1"));
        let boot = Boot::Kernel { kernel: "/k".into(), initrd: None, cmdline: "quiet".into() };
        let devices = |boot: &Boot| {
            let all = arguments(&spec, boot, &paths, true, "x");
            let mut pairs: Vec<_> = all
                .windows(2)
                .filter(|w| ["-device", "-machine", "-cpu", "-smp"].iter().any(|f| w[0] == *f))
                .map(<[_]>::to_vec)
                .collect();
            pairs.sort();
            pairs
        };
        assert_eq!(devices(&boot), devices(&Boot::Incoming));
        let all = arguments(&spec, &boot, &paths, true, "x");
        assert!(all.iter().any(|a| a.to_string_lossy().contains("path=/vm,,1/agent.sock")));
    }
}
