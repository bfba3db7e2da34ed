//! vCPUs: a thread each, their CPUID, and their state.
//!
//! [`VcpuManager`] owns the threads. Each creates its vCPU, and from then on is the only one to touch it: everything
//! else is a command that runs there. A thread is paused or runs the guest; the accesses that KVM hands over are served
//! on the buses, on that thread. A kick (signal) makes it look at its commands; pausing completes the access that was
//! in progress, so that no half-done instruction is saved.
//!
//! [`VcpuState`] is all that a vCPU is. Its CPUID goes with the guest, which so keeps the processor that it has seen; what a
//! host must have for that is in [`Requirements`] and [`Offer`], compared before any RAM moves. Which processor a guest sees
//! first is a [`CpuModel`].
//!
//! Absent: hotplug, SMM, nested virtualisation.

mod boot;
mod cpuid;
mod manager;
mod msr;
mod requirements;
mod state;
#[cfg(test)]
pub(crate) mod tests;
mod thread;
mod throttle;

pub use boot::{BootProtocol, BootRegisters};
pub use cpuid::{CpuModel, names as feature_names};
pub use manager::{Processors, VcpuManager};
pub use requirements::{Offer, Requirements};
pub use state::{
    CpuidLeaf, DebugRegisters, DescriptorTable, EventState, ExtendedControl, Msr, Registers, Segment,
    SystemRegisters, VcpuState,
};
pub use thread::{Buses, EventHandler, VcpuEvent};
