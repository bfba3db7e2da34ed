//! Tests with real guests of a few bytes, for this module and for the others that need one.

mod attack;
mod guest;
mod hold;
mod run;
mod save;
mod throttle;

pub(crate) use guest::{CODE, MMIO, TestGuest, WATCHDOG};
