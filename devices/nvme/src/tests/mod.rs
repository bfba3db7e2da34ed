//! The controller against a driver-side model. No hypervisor; threads only in `threads`.

mod admin;
mod attack;
mod bus_master;
mod driver;
mod hostile;
mod init;
mod io;
mod messages;
mod migrate;
mod qemu;
mod queues;
mod random;
mod sgl;
mod threads;
