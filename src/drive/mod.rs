//! Other `ferry` processes, driven from outside: started, watched by their console, told things over their control
//! socket, ended. The demonstration, the benchmarks and the integration tests all drive processes with this.
//!
//! A driven process never outlives its [`Process`]: it is ended through a descriptor that names it and nobody else.
//! Waiting always has a watchdog, and every error of a process carries the end of its console and of its log.

mod lines;
mod process;

pub use lines::Lines;
pub use process::{Exit, Process};
