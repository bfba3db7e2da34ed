//! PCI as a guest sees it: one root bus with functions, their configuration spaces, BARs and MSI-X.
//!
//! A device model implements [`PciFunction`] and builds it from an [`Endpoint`], which keeps a [`ConfigSpace`] and an
//! [`Msix`] in agreement. The machine puts functions on a [`RootBus`]. A vCPU reaches configuration space through the
//! [`ConfigPorts`] (0xcf8/0xcfc) or the [`Ecam`] window; when such a write moves a BAR or switches memory decoding,
//! the root bus maps or unmaps that BAR on the MMIO [`bus::Bus`], and from then on the guest's accesses arrive at
//! [`PciFunction::bar_read`] and [`PciFunction::bar_write`]. Interrupts leave through an [`MsixSink`] or, while MSI-X is off, through the
//! [`bus::InterruptLine`] of the function's pin.
//!
//! Invariants:
//! - A BAR is on the MMIO bus exactly when the function decodes memory, the whole BAR lies in one of the root bus'
//!   windows, and no other device is there. A guest that arranges it otherwise loses access to that BAR, no more.
//! - Only bits that hardware would let the guest write ever change; a saved state that differs in any other bit, in a
//!   BAR's size or in the number of vectors is refused.
//! - When a write that masks a vector has returned, no message of that vector follows.
//! - Locks are taken in the order root bus, configuration space, MSI-X table or pin; the sink is called with the table
//!   locked, and must not call back.
//!
//! Absent: bridges and further buses, multi-function slots, I/O BARs, expansion ROMs, pins but INTA#, plain MSI, extended
//! capabilities, hotplug, function-level reset. No KVM, no threads.
#![forbid(unsafe_code)]

mod bar;
mod config;
mod endpoint;
mod error;
mod msix;
mod pin;
mod root;
mod state;
#[cfg(test)]
mod tests;

pub use bar::{BarKind, BarWindow};
pub use config::{ConfigSpace, Identity};
pub use endpoint::Endpoint;
pub use error::Error;
pub use msix::{MAX_VECTORS, MsiMessage, Msix, MsixLayout, MsixSink};
pub use root::{ConfigPorts, Ecam, PciFunction, RootBus, SLOTS};
pub use state::{EndpointState, MsixEntryState, MsixState, PciState, RootBusState};
