//! `ferry`: a KVM virtual machine monitor whose guests move to another `ferry` process with their NVMe I/O running.
//!
//! # The story of a virtual machine
//!
//! 1. [`cli`] parses what was typed; [`config`] turns it into a [`MachineSpec`](config::MachineSpec) that makes sense.
//! 2. [`vmm`] is the process: it opens KVM ([`kvm`]), the console ([`console`]), the control socket ([`control`]) and the
//!    lease, and becomes the owner of the guest.
//! 3. [`machine`] opens memory and images ([`memory`], `block`), makes vCPU threads ([`vcpu`]) and I/O threads
//!    ([`io_thread`], [`io_poll`]), puts the devices (`legacy`, `pci`, `nvme`, `virtio`) on their buses, and loads the kernel ([`boot`]).
//! 4. vCPUs run. An access that is no RAM arrives on a bus and at a device; a doorbell calls an I/O thread, and what the
//!    disk completes comes back as an interrupt through an irqfd. No command runs on a vCPU thread.
//! 5. `migrate` starts a thread that runs the engine (crate `engine`) on this machine ([`mod@migrate`], [`dirty`]), until the
//!    guest runs elsewhere; there, `ferry run --incoming` has prepared the same machine and fills it.
//!
//! What a disk keeps without power, and what its guest creates on it, lies in a folder ([`subsystem`]).
//!
//! [`inspect`] reads the files that guests are suspended into, without a machine.
//!
//! [`demo`] and [`mod@bench`] are users of all that: they run `ferry` processes through [`drive`], and look at the guests.
//!
//! # Invariants
//!
//! - vCPUs run in one run state only, and [`RunState::next`](machine::RunState::next) is the only way into it.
//! - A process that may have given its guest away never runs it again, unless the lease says so.
//! - Only this package knows KVM; only [`kvm`], [`memory`] and [`userfault`] hold `unsafe` code.
//!
//! # Absent
//!
//! Firmware, hotplug of devices (namespaces come and go: `ferry namespace`), networking, nested virtualisation, other architectures than x86-64.
#![deny(unsafe_code)]

#[cfg(test)]
mod attack;
pub mod bench;
pub mod boot;
pub mod cli;
pub mod config;
pub mod console;
pub mod control;
pub mod demo;
pub mod dirty;
pub mod drive;
pub mod inspect;
pub mod io_poll;
pub mod io_thread;
pub mod kvm;
pub mod layout;
pub mod machine;
pub mod memory;
pub mod migrate;
pub mod startup;
pub mod subsystem;
pub mod userfault;
pub mod vcpu;
pub mod vmm;
