//! The controller against a driver-side model. No hypervisor; threads only in `threads`.

mod admin;
mod arbitration;
mod attack;
mod bus_master;
mod commands;
mod driver;
mod firmware;
mod format;
mod hostile;
mod init;
mod interrupts;
mod io;
mod many_queues;
mod messages;
mod migrate;
mod polling;
mod protection;
mod qemu;
mod queues;
mod random;
mod registers;
mod sanitize;
mod saved;
mod self_test;
mod sgl;
mod threads;
