//! The machine: its parts, how they are put together, and what they are doing.

mod run;

pub use run::{Action, Refused, RunState};
