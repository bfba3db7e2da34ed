//! The demonstration: a guest that checks its disks moves between two real processes.
//!
//! ```text
//! boot in `source` -> enough verified -> migrate to `destination` -> enough verified -> end -> Report
//! ```
//!
//! Both processes are `ferry run` of this very program, driven from outside like any machine. [`exerciser`] and [`linux`]
//! are the guests; [`report`] is what is shown. Everything happens in a temporary folder that goes away.
//!
//! Absent: a judgement of the figures; the guest judges its data, and a guest that finds an error fails the demonstration.

mod exerciser;
mod linux;
mod report;

pub use exerciser::{IMAGE, run as run_exerciser};
pub use linux::run as run_linux;
pub use report::{Checked, Report, largest_parts, parts};

use crate::control::MigrationInfo;
use crate::drive::{Ferry, Machine, Stage};

/// What happens meanwhile, for whoever watches.
pub trait Audience {
    /// One sentence.
    fn hear(&mut self, sentence: &str);

    /// How the migration goes.
    fn see(&mut self, progress: &MigrationInfo);
}

/// Starts the process that the guest is to move to.
fn destination(stage: &mut Stage, machine: &Machine) -> anyhow::Result<Ferry> {
    let destination = machine.wait_for_guest("destination")?;
    stage.enter(&destination)?;
    Ok(destination)
}
