//! Other `ferry` processes, driven from outside: started, watched by their console, told things over their control
//! socket, ended. The demonstration, the benchmarks and the integration tests all drive processes with this.
//!
//! ```text
//! Machine   the flags that the processes of one virtual machine share
//! Ferry     one of those processes: where the guest boots, or where it is to arrive
//! Process   any program: console, log, end
//! Stage     a folder that goes away, and an end for all of them when someone presses Ctrl-C
//! exerciser what the test guest says on a console
//! ```
//!
//! A driven process never outlives its [`Process`]: it is ended through a descriptor that names it and nobody else.
//! Waiting always has a watchdog, and every error of a process carries the end of its console and of its log.

pub mod exerciser;
mod ferry;
mod interruption;
mod lines;
mod machine;
mod process;
mod stage;

pub use ferry::Ferry;
pub use interruption::Interruption;
pub use lines::Lines;
pub use machine::Machine;
pub use process::{Exit, Process};
pub use stage::Stage;
