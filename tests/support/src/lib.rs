//! Test beds for the integration tests: real processes, real guests, and a link between them that can be cut.
//!
//! ```text
//! TestBed      the host-wide KVM lock, a scratch folder, what every process said (printed when a test fails)
//!   Machine    the flags that a source and its destination share
//!   Vm         one `ferry run`: its console, its log, its control socket
//!   Proxy      a link that stands still at a place until the test says how it goes on
//! ```
//!
//! Invariants:
//!
//! - One test at a time opens /dev/kvm, whoever started it: guests that compete for processors make watchdogs bark.
//! - No process outlives its test, and nothing sleeps: every wait is for a line, an event, a frame or an end, with a watchdog of
//!   about ten times what it takes.
//! - A host without a usable /dev/kvm fails the test; nothing is skipped.
//!
//! Helpers panic: in a test that is the way to say that something is wrong.
//!
//! Absent: assertions about products. What must hold is said in the tests.
#![forbid(unsafe_code)]
#![allow(clippy::missing_panics_doc, reason = "helpers of tests panic instead of returning errors")]

mod bed;
mod counters;
mod huge_pages;
mod machine;
mod passing;
mod pieces;
mod proxy;
mod vm;

pub use bed::TestBed;
pub use counters::{Finding, exerciser_line};
pub use huge_pages::{has_huge_pages, has_transparent_huge_pages};
pub use machine::Machine;
pub use proxy::{Held, Place, Proxy, Verdict, Way};
pub use vm::{Vm, WATCHDOG};
