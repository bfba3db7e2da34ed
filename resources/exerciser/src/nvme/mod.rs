//! The NVMe driver: one command after the other on the admin queue, many in flight on the I/O queues.

mod admin;
mod buffer;
pub mod controller;
pub mod doorbell;
pub mod identity;
pub mod io_queue;
pub mod queue;

pub use controller::Controller;
pub use identity::Namespace;
pub use queue::QueuePair;
