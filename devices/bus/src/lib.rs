//! Buses and the words that every device model shares.
//!
//! A *bus* maps an address to a device; a device model knows offsets, never addresses, and never a hypervisor.
//! vCPU threads reach devices through [`Bus`]; devices reach the guest through [`GuestMemory`] and [`InterruptLine`].
//!
//! Invariants: ranges on one bus never overlap; an access never spans two devices.
//! Absent: KVM, threads, event loops, the PCI configuration space (crate `pci`).
#![forbid(unsafe_code)]

mod bus;
mod interrupt;
mod memory;

pub use bus::{Bus, BusDevice, Error};
pub use interrupt::InterruptLine;
pub use memory::{GuestBitmap, GuestMapping, GuestMemory, GuestRange, GuestRegion, in_one_region};
