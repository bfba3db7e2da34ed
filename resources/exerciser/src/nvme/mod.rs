//! The NVMe driver: one command after the other on the admin queue, many in flight on the I/O queues.

pub mod controller;
pub mod doorbell;
pub mod queue;

pub use controller::{Controller, Namespace};
pub use queue::QueuePair;
