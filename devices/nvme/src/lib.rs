//! An NVM Express controller as a model: it knows guest memory, block backends and interrupts, and nothing of hypervisors, processes,
//! threads or event loops. The VMM, other front ends and the tests drive the same code.
//!
//! ```text
//! vCPU threads        PciFunction::bar_write -> pci.rs -> doorbell.rs (atomics)  -> Host::wake(worker)
//!                                                      -> regs.rs (what is wanted) -> Host::wake(0)
//! worker threads      Controller::process(worker)
//!                       worker 0: admin.rs (enable, reset, shutdown; command/: the admin commands; maintenance.rs: self-test, format, sanitize)
//!                       every worker: worker.rs (fetch -> command/io.rs -> Backend::submit -> reap -> post -> interrupt)
//! migration thread    Controller::pause -> save -> state.rs ... Controller::load -> resume
//!                       (or, from and to QEMU, qemu/: section.rs <- join.rs, section.rs -> split.rs)
//! ```
//!
//! A [`Subsystem`] owns the namespaces; its controllers' workers have copies of those that are attached ([`Controller::new`] makes a
//! subsystem of its own for one controller). A [`Controller`] has as many workers as it was given I/O contexts. A completion queue and all submission queues that use it belong
//! to one worker; the admin queue belongs to none, and is served on worker 0's thread, since its commands reach into all of them.
//! The terms and the numbers in comments are those of the NVM Express Base Specification 2.0 ("Base") and the NVM Command Set
//! Specification 1.0 ("NVM").
//!
//! # Invariants
//!
//! - A worker's lock is taken once for a pass over its queues; on that path nothing allocates once buffers have grown, and nothing is
//!   locked or called in the kernel for a single command. Locks are taken in the order admin, workers, subsystem, queues of the pin,
//!   events, registers.
//! - No guest input panics, hangs, allocates without bound or reaches outside guest memory. Lists end with the length that they
//!   describe; what a worker has in flight is bounded by its context's depth.
//! - A command ends once. What finds a full completion queue waits, and its submission queues are not fetched meanwhile.
//! - A fused pair is alone in its range (`exclusion`): no worker of the subsystem has anything in flight there meanwhile. The lock of the
//!   claims is taken last, and only while there are any.
//! - A worker goes to sleep only after it has told the guest (EventIdx) and looked again: no wake-up is lost, in no interleaving (the
//!   tests of `wakeup`).
//! - While the guest does not let the controller be a bus master nothing is fetched, posted or signalled, and nothing is lost.
//! - After CSTS.RDY is 0, or CSTS.SHST says complete, or a pause has returned, nothing is in flight.
//! - A saved state is a plain struct and is not trusted. Its queues are made by the functions that serve the guest's Create commands.
//!
//! # Absent
//!
//! Metadata and the persistent memory region; namespace management and state that outlives the process without a [`Store`].
//! None of them is claimed in Identify, and their commands are refused.
#![forbid(unsafe_code)]

mod admin;
mod allocations;
mod ana;
mod arbitration;
mod cmb;
mod command;
mod config;
mod controller;
mod data;
mod doorbell;
mod error;
mod event;
mod exclusion;
mod firmware;
mod follow;
mod gate;
mod hotplug;
mod interrupt;
mod inventory;
mod maintenance;
mod management;
mod namespace;
mod non_volatile;
mod pci;
mod persistent;
mod preempt;
mod prp;
pub mod qemu;
mod queue;
mod regs;
mod reservation;
mod reservations;
mod restore;
mod save;
mod sgl;
mod shared;
mod slot;
mod smart;
mod state;
mod store;
mod subsystem;
#[cfg(test)]
mod tests;
mod uncorrectable;
mod wakeup;
mod worker;

pub use ana::{ACCESS_GROUPS, AccessState};
pub use cmb::memory_with_buffer;
pub use config::{ControllerConfig, MAX_NAMESPACES, MAX_QUEUE_ENTRIES, NamespaceConfig};
pub use controller::{Controller, PauseReport, Progress, Statistics};
pub use error::Error;
pub use inventory::{Inventory, NamespaceShape, Shape};
pub use non_volatile::{KeptFormatState, KeptState, NonVolatile};
pub use shared::Host;
pub use state::{
    AccessGroupsState, BufferState, CompletionQueueState, DoorbellBuffersState, EndedState, EventsState,
    FeaturesState, FirmwareState, FormatState, MoreFeaturesState, NamespaceState, NvmeState,
    PersistentEventsState, RegistersState, RegistrantState, ReservationMaskState, ReservationNoticeState,
    ReservationNoticesState, ReservationState, ReservationsState, SanitizeState, SavedFeaturesState,
    SelfTestState, SmartState, SubmissionQueueState, SweepState, UncorrectableRunState, UncorrectableState,
    WarningsState, WriteProtectionState,
};
pub use store::{
    AllocatedProtectionState, AllocatedState, AllocationsState, ControllerKeptState, ControllerRecord,
    KeptReservationsState, MAX_CONTROLLERS, Store, StoreError, SubsystemState,
};
pub use subsystem::Subsystem;
