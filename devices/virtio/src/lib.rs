//! Virtio devices behind PCI (virtio 1.2, "modern" only): the transport, and the entropy device.
//!
//! [`VirtioPci`] is a [`pci::PciFunction`]. The guest's driver negotiates through the common configuration in BAR 0 and
//! rings a queue's doorbell, which calls [`QueueNotify::wake`]; an I/O thread of the VMM then calls
//! [`VirtioPci::process`], the device consumes buffers from the queue (crate virtio-queue), and the queue's MSI-X vector
//! tells the driver. A device model implements [`VirtioDevice`]; [`Rng`] is the one there is.
//!
//! Invariants:
//! - No queue is processed on a vCPU thread, before the driver says DRIVER_OK, after it has reset the device, while it does
//!   not let the device be a bus master, or while the device is paused.
//! - An enabled queue was valid when it was enabled: aligned, its rings in guest memory, its size a power of two no
//!   larger than offered. Restoring takes the same way.
//! - One call of `process` does a bounded amount of work whatever the descriptors say. What breaks the rules of a queue
//!   sets DEVICE_NEEDS_RESET, and the device then stands still until the driver resets it.
//! - Consumed buffers are always returned in the same call, so there is no request in flight to be saved.
//!
//! Absent: legacy and transitional interfaces, INTx, packed rings, event index, notification data, per-queue reset,
//! device-specific configuration. No KVM, no threads.
#![forbid(unsafe_code)]

mod error;
mod queue;
mod regs;
mod rng;
mod state;
#[cfg(test)]
mod tests;
mod transport;

pub use error::Error;
pub use rng::{Entropy, Rng};
pub use state::{QueueState, VirtioState};
pub use transport::{QueueNotify, VirtioDevice, VirtioPci, Work};
