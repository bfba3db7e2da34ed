//! The controller against a driver-side model. No hypervisor, no threads but this one.

mod admin;
mod driver;
mod init;
mod io;
mod migrate;
mod queues;
