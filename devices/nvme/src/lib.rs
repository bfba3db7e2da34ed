//! An NVM Express controller as a model: it knows guest memory, block backends and interrupts, and nothing else.
#![forbid(unsafe_code)]

mod admin;
mod command;
mod config;
mod controller;
mod doorbell;
mod error;
mod event;
mod inventory;
mod namespace;
mod pci;
mod prp;
mod queue;
mod regs;
mod restore;
mod save;
mod shared;
mod smart;
mod state;
#[cfg(test)]
mod tests;
mod worker;

pub use config::{ControllerConfig, MAX_NAMESPACES, MAX_QUEUE_ENTRIES, NamespaceConfig};
pub use controller::{Controller, PauseReport, Progress, Statistics};
pub use error::Error;
pub use inventory::{Inventory, NamespaceShape, Shape};
pub use shared::Host;
pub use state::{
    CompletionQueueState, DoorbellBuffersState, EndedState, EventsState, FeaturesState, NamespaceState,
    NvmeState, RegistersState, SmartState, SubmissionQueueState,
};
