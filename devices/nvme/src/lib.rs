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
//! # What it does
//!
//! Clauses are of Base, of the NVM Command Set ("NVM") or of the PCIe transport ("PCIe"); tests are files of `tests/`.
//!
//! | part | clause | where | tests |
//! | --- | --- | --- | --- |
//! | registers, any width, at any time | 3.1 | `regs` | `registers`, `init` |
//! | enable, reset, NSSR, shutdown | 3.5, 3.6, 3.7 | `admin` | `init` |
//! | MSI-X, the pin, coalescing | PCIe 3.5; 5.27.1.6 | `interrupt` | `messages`, `interrupts` |
//! | queues in one run or in pages, several SQs a CQ, full CQs | 3.3, 5.4 to 5.7 | `queue`, `command/queues` | `queues`, `many_queues` |
//! | arbitration: round robin, weighted with urgent | 3.4.4 | `arbitration` | `arbitration` |
//! | shadow doorbells | 5.8 | `doorbell`, `wakeup` | `queues`, `wakeup/tests` (every interleaving), `polling` |
//! | PRPs | 4.1.1 | `prp` | `io`, `hostile` |
//! | SGLs of I/O commands | 4.1.2 | `sgl` | `sgl`, `random` |
//! | metadata, in blocks or apart; MPTR | NVM 5.3, 4.1.1 | `metadata` | `metadata/*` |
//! | protection information, types 1 to 3 | NVM 5.2 | `metadata/protection` | `metadata/*` |
//! | Flush, Read, Write, Write Zeroes, Dataset Management | 7.1, NVM 3.2 | `command/io` | `io`, `random`, `durability` |
//! | Compare, Verify, Copy, Write Uncorrectable | NVM 3.2 | `command/io`, `command/copy`, `uncorrectable` | `commands`, `random` |
//! | fused Compare and Write | 3.4.2 | `command/fused`, `exclusion` | `fused`, `random` |
//! | reservations | 7.2 to 7.5, 8.19 | `reservation`, `command/reservations`, `gate` | `reservations`, `shared` |
//! | Identify, Get Log Page | 5.16, 5.17 | `command/identify`, `command/lists`, `command/logs` | `admin`, `lists` |
//! | features with SEL, saved ones | 5.15, 5.27 | `command/features` | `admin`, `saved` |
//! | asynchronous events, error and SMART logs | 5.2, 5.16.1 | `event`, `smart` | `admin`, `warnings`, `shutdowns`, `migrate` |
//! | persistent events | 5.16.1.14 | `persistent`, `common` | `persistent`, `shared` |
//! | Abort, Keep Alive | 5.1, 5.18 | `command/admin` | `admin`, `queues` |
//! | Device Self-test | 5.9 | `command/self_test` | `self_test`, `background` |
//! | Format NVM | 5.14 | `command/format` | `format`, `background` |
//! | Sanitize: block erase, overwrite | 5.24 | `command/sanitize`, `common` | `sanitize`, `background`, `shared`, `together` |
//! | firmware slots | 5.11, 5.12 | `firmware`, `common` | `firmware`, `shared` |
//! | namespace write protection | 8.12 | `namespace` | `protection` |
//! | Namespace Management and Attachment | 5.22, 5.23 | `command/namespaces`, `management` | `namespaces` |
//! | namespaces of the host's: added, removed, grown | 5.16.1.5 | `hotplug` | `hotplug` |
//! | what outlives the power | | `store`, `non_volatile` | `store`, `saved` |
//! | several controllers, asymmetric access | 2.4.1, 8.1 | `subsystem`, `common`, `ana`, `pause` | `subsystem`, `shared`, `together`, `random/pair` |
//! | controller memory buffer | 8.5 | `cmb`, `window` | `cmb`, `windows` |
//! | persistent memory region | 3.1.3.22 to 3.1.3.28, 8.14 | `pmr`, `window` | `pmr`, `windows` |
//!
//! # Absent
//!
//! Guards of more than 16 bits and storage tags; namespace management and state that outlives the process
//! without a [`Store`]. A namespace with metadata cannot be resized, and not be moved to or from QEMU.
//! None of them is claimed in Identify, and their commands are refused.
#![forbid(unsafe_code)]

mod admin;
mod allocated;
mod allocations;
mod ana;
mod arbitration;
mod cmb;
mod command;
mod common;
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
mod metadata;
mod namespace;
mod non_volatile;
mod pause;
mod pci;
mod persistent;
mod pmr;
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
mod window;
mod worker;

pub use ana::{ACCESS_GROUPS, AccessState, group_of};
pub use cmb::memory_with_buffer;
pub use config::{ControllerConfig, MAX_NAMESPACES, MAX_QUEUE_ENTRIES, MetadataConfig, NamespaceConfig};
pub use controller::{Controller, Progress, Statistics};
pub use error::Error;
pub use inventory::{Inventory, MetadataShape, NamespaceShape, Shape};
pub use non_volatile::{KeptFormatState, KeptMetadataState, KeptState, NonVolatile};
pub use pause::PauseReport;
pub use pmr::memory_with_region;
pub use shared::Host;
pub use state::{
    AccessGroupsState, BufferState, CompletionQueueState, DoorbellBuffersState, EndedState, EventsState,
    FeaturesState, FirmwareState, FormatSettingsState, FormatState, MoreFeaturesState, NamespaceState,
    NvmeState, PersistentEventsState, RegionState, RegistersState, RegistrantState, ReservationMaskState,
    ReservationNoticeState, ReservationNoticesState, ReservationState, ReservationsState, SanitizeAskedState,
    SanitizeState, SavedFeaturesState, SelfTestState, SmartState, SubmissionQueueState, SweepState,
    UncorrectableRunState, UncorrectableState, UnsafeShutdownsState, WarningsState, WriteProtectionState,
};
pub use store::{
    AllocatedMarksState, AllocatedProtectionState, AllocatedState, AllocationsState, ControllerKeptState,
    ControllerRecord, ControllerRunningState, KeptReservationsState, MAX_CONTROLLERS, Store, StoreError,
    SubsystemState,
};
pub use subsystem::Subsystem;
