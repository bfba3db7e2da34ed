//! The devices from the guest's side.

mod power;
mod rtc;
mod serial;
mod state;
