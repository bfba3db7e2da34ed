//! The only place that speaks to `/dev/kvm`.
//!
//! [`Host`] is the opened device and what it can do; [`Vm`] one virtual machine with its in-kernel interrupt
//! controllers and timer, and with one of two ways to find the pages that vCPUs write ([`DirtyTracking`]); [`MsiRouter`] and [`MsixFunction`] turn a PCI function's MSI-X vectors into irqfds;
//! [`IrqLine`] is a wired interrupt; [`ClockState`] guest time. Running vCPUs is [`crate::vcpu`]'s; this module only
//! lends it the few accesses that need `unsafe`.
//!
//! Invariants: a memory slot is registered only for a mapping that the [`Vm`] keeps alive; saved state is plain data
//! and is checked before the kernel sees it; a route table always holds the wired interrupts' routes too.
//!
//! Absent: nested virtualisation, SMM, the split irqchip.

mod clock;
mod dirty_log;
mod dirty_ring;
mod error;
mod host;
mod irqchip;
mod line;
mod msi;
mod pit;
pub(crate) mod run;
#[cfg(test)]
mod tests;
mod tracking;
pub(crate) mod tsc_offset;
#[cfg(test)]
mod turn;
mod vm;
pub(crate) mod xsave;

pub(crate) use clock::boot_id;
pub use clock::{ClockPlan, ClockState, GuestTime, HostTime, is_same_tsc_frequency};
pub use error::Error;
pub use host::Host;
pub use irqchip::{IoApicState, IrqchipState, PicState};
pub use line::{IrqLine, pci_pins};
pub use msi::{MsiRouter, MsixFunction};
pub use pit::{PitChannelState, PitState};
pub use tracking::DirtyTracking;
pub use vm::Vm;
