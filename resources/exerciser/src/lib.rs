//! The exerciser: a freestanding guest that drives NVMe controllers and checks everything it can.
//!
//! This crate is its logic, without an instruction that needs a guest: the host builds it too, for the tests and
//! to read the lines that the guest prints. `guest/` holds what is below: the entry, ring 0, the allocator and
//! the implementation of [`machine::Machine`]; ferry's `build.rs` makes the image of both.
//!
//! ```text
//! start_info  PVH: command line and RAM        options   the words of the command line
//! run         the story: set up, work, conclude   console, report   the lines of the serial port
//! pci         find controllers, BARs, MSI-X     nvme      registers, queues, doorbells, admin commands
//! workload    disk: what every block must hold; worker: commands in flight; ram: pages written and checked
//! clock       frequency and gaps of the counter, KVM's clock       apic, power   the rest of the machine
//! ```
//!
//! Invariants: one thread; memory is allocated before the work begins and never given back; a pointer is a bus
//! address. A block is used by one command at a time, so what it must hold is always known. The first thing that
//! is wrong ends the run with an `error` line.
//!
//! Absent: more than one processor, SGLs, metadata, and PCI bridges.
#![no_std]
#![deny(unsafe_code)]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod apic;
pub mod clock;
pub mod console;
pub mod error;
pub mod machine;
pub mod memory;
pub mod mmio;
pub mod nvme;
pub mod options;
pub mod pattern;
pub mod pci;
pub mod power;
pub mod random;
pub mod report;
pub mod run;
pub mod start_info;
pub mod workload;

pub use run::run;
