//! Virtual machine monitors: starting, freezing, loading, ending.
//!
//! [`Vmm`] and [`VmProcess`] are what the rest of Ramet knows of a VMM; [`Qemu`] is the one that exists (stock QEMU 7.2 and
//! newer, under KVM or TCG, with the preload object as the only change). [`Pool`] keeps VMMs started and waiting for a
//! clone's state, since starting one takes longer than all the rest of a clone.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod cpus;
mod devices;
pub mod doctor;
mod error;
mod machine;
mod pool;
mod process;
mod qemu;
pub mod qmp;
mod record;

pub use cpus::ControlRegisters;
pub use devices::{Base, DiskChain, LayerSwap, MAX_NODE_NAME, Nic};
pub use error::VmmError;
pub use machine::{Accel, AgentPort, Boot, DEFAULT_MACHINE, MOST_CARDS, MachineSpec, VmPaths};
pub use pool::{Claimed, Pool, PoolConfig};
pub use process::ExitInfo;
pub use qemu::{Qemu, VmmConfig};

/// The unprivileged user and group that VMMs run as, unless told otherwise: the one that Debian reserves for QEMU.
pub const QEMU_UID: u32 = 64055;

use async_trait::async_trait;
use std::{
    fmt,
    path::Path,
    time::{Duration, SystemTime},
};

/// A kind of virtual machine monitor.
#[async_trait]
pub trait Vmm: fmt::Debug + Send + Sync {
    /// Starts a VM whose files live in `dir`, which is made. Its CPUs are stopped: first everything that its machine has is
    /// attached, then [`VmProcess::cont`] boots the kernel, or [`VmProcess::load_state`] gives it another VM's state.
    ///
    /// # Errors
    /// [`VmmError`]; nothing is left behind but `dir` with the log.
    async fn launch(&self, spec: &MachineSpec, boot: Boot, dir: &Path) -> Result<Box<dyn VmProcess>, VmmError>;

    /// Finds a VM again that was started in `dir` by a daemon before this one, and waits at most `limit` until it answers:
    /// one whose own thread waits for a page of its memory does not.
    ///
    /// # Errors
    /// [`VmmError::Gone`] when it no longer runs. With every other error it does.
    async fn reattach(&self, dir: &Path, limit: Duration) -> Result<Box<dyn VmProcess>, VmmError>;

    /// Ends the VM that was started in `dir`, also when it does not answer. No error when there is none.
    ///
    /// # Errors
    /// When the process does not end.
    async fn kill(&self, dir: &Path) -> Result<(), VmmError>;
}

/// A running VMM. Dropping it leaves the VM running.
#[async_trait]
pub trait VmProcess: fmt::Debug + Send + Sync {
    /// The process.
    fn pid(&self) -> u32;
    /// The machine.
    fn spec(&self) -> &MachineSpec;
    /// Its files.
    fn paths(&self) -> &VmPaths;
    /// The socket of the agent's port.
    fn agent_socket(&self) -> &Path {
        &self.paths().agent
    }
    /// The socket of the console.
    fn console_socket(&self) -> &Path {
        &self.paths().console
    }
    /// The socket of the preload object.
    fn shim_socket(&self) -> &Path {
        &self.paths().shim
    }
    /// Gives a VM that has not run yet its root disk.
    ///
    /// # Errors
    /// [`VmmError`]; the VM is good for nothing then.
    async fn attach_disk(&self, disk: &DiskChain) -> Result<(), VmmError>;
    /// Gives a VM that has not run yet a data volume, a raw file that is only read.
    ///
    /// # Errors
    /// [`VmmError`]; the VM is good for nothing then.
    async fn attach_volume(&self, index: u8, file: &Path) -> Result<(), VmmError>;
    /// Gives a VM that has not run yet a network card.
    ///
    /// # Errors
    /// [`VmmError`]; the VM is good for nothing then.
    async fn attach_nic(&self, nic: Nic) -> Result<(), VmmError>;
    /// Takes a network card out of a VM that runs, and puts one with this MAC address into its place: to the guest it is
    /// another card. The guest has to let the old one go.
    ///
    /// # Errors
    /// [`VmmError`]; [`VmmError::Timeout`] when the guest does not let go. The VM may have no such card then.
    async fn replace_nic(&self, index: u8, mac: &str, limit: Duration) -> Result<(), VmmError>;
    /// The name of the disk's node that the guest writes to: [`DiskChain::node`], or that of a later layer.
    ///
    /// # Errors
    /// [`VmmError`].
    async fn disk_node(&self) -> Result<String, VmmError>;
    /// Puts one layer in the place of several of the disk's frozen ones, which shows the same, and closes those. The guest
    /// runs on, but for the moment that it takes; nothing that it writes to is touched. Not to be called while a state is
    /// saved. What was done before is not done again, so it may be called until it succeeds.
    ///
    /// # Errors
    /// [`VmmError`]; with [`VmmError::Refused`] the disk is as before, with others it may be either.
    async fn swap_layers(&self, swap: &LayerSwap) -> Result<(), VmmError>;
    /// Waits until the guest stands still because its disk failed, and returns why. [`VmProcess::cont`] tries again.
    async fn disk_failure(&self) -> String;
    /// Waits until the guest is reset: it boots anew.
    async fn reset(&self);
    /// Stops the guest and saves its devices' state, without memory. It stands still when this returns: call
    /// [`VmProcess::cont`]. `next`: for a machine with a disk, which is frozen at the same instant; the guest writes to one
    /// of these from then on.
    ///
    /// # Errors
    /// [`VmmError`]; the guest runs on. [`VmProcess::disk_node`] tells which overlay it writes to.
    async fn save_state(&self, next: Option<NextOverlays<'_>>) -> Result<SavedState, VmmError>;
    /// Has the CPUs of a VM that waits for a state, and has its disk, start by themselves once the state is loaded. Asked
    /// for beforehand, that costs no time between the two.
    ///
    /// # Errors
    /// [`VmmError`].
    async fn start_when_loaded(&self) -> Result<(), VmmError>;
    /// Loads devices' state into a VM that waits for it. Its CPUs are stopped when this returns, or run after
    /// [`VmProcess::start_when_loaded`].
    ///
    /// # Errors
    /// [`VmmError`], with the VMM's last words; the VM is good for nothing then.
    async fn load_state(&self, state: &[u8]) -> Result<(), VmmError>;
    /// Stops the CPUs. Returns when no request of the guest is under way and all that it wrote is in the disk's files, so
    /// that others may read them until [`VmProcess::cont`].
    ///
    /// # Errors
    /// [`VmmError`].
    async fn stop(&self) -> Result<(), VmmError>;
    /// Starts the CPUs. Returns when they run.
    ///
    /// # Errors
    /// [`VmmError`].
    async fn cont(&self) -> Result<Resumed, VmmError>;
    /// The VM generation ID that the guest sees, as 36 characters: another in every VMM.
    ///
    /// # Errors
    /// [`VmmError`].
    async fn generation_id(&self) -> Result<String, VmmError>;
    /// Whether the process runs.
    fn is_alive(&self) -> bool;
    /// The VMM's word for its state: `running`, `paused`, `inmigrate`, ...
    ///
    /// # Errors
    /// [`VmmError`].
    async fn query_status(&self) -> Result<String, VmmError>;
    /// The same as [`VmProcess::kill`], but the disk is whole afterwards: what the guest has written is in its files.
    ///
    /// # Errors
    /// When the process does not end.
    async fn quit(&self) -> Result<(), VmmError>;
    /// Ends the VMM at once and removes its files. The guest is not asked. Does nothing the second time.
    ///
    /// # Errors
    /// When the process does not end.
    async fn kill(&self) -> Result<(), VmmError>;
    /// Waits until the process has ended.
    async fn wait_exit(&self) -> ExitInfo;
    /// The last lines that the VMM wrote to its log.
    fn stderr_tail(&self) -> String;
}

/// Empty overlays for a disk that is about to be frozen.
///
/// To put an overlay on top takes QEMU longer than all that a pause is made of. So `first` is put there while the guest
/// still runs. If the guest has written nothing to it when it stands still, the disk of that instant is what lies below.
/// Otherwise `first` belongs to the disk of that instant, too, and `second` takes its place, within the pause.
#[derive(Debug, Clone, Copy)]
pub struct NextOverlays<'a> {
    /// Put on top before the pause.
    pub first: &'a Path,
    /// Not used for a guest that writes nothing at that moment.
    pub second: &'a Path,
}

/// Devices' state.
#[derive(Debug, Clone)]
pub struct SavedState {
    /// The VMM's own format; loads into a VMM of the same kind, version and machine.
    pub bytes: Vec<u8>,
    /// When the CPUs stopped, by the VMM's clock.
    pub stopped_at: SystemTime,
    /// From the request to the stop of the CPUs.
    pub before_stop: Duration,
    /// From the stop of the CPUs to the end of saving.
    pub saving: Duration,
    /// The guest had written to [`NextOverlays::first`], which is frozen, too; it writes to the second one from now on.
    pub second_overlay: bool,
}

/// A start of CPUs.
#[derive(Debug, Clone, Copy)]
pub struct Resumed {
    /// When, by the VMM's clock.
    pub at: SystemTime,
}
