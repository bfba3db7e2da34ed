//! What commands cost besides time: counted in the machine's process before and after, for a thousand of them.

use std::fmt;

use serde::Serialize;

use super::spread::Spread;
use crate::control::FerryStatus;

/// Counters of a machine and its first disk at some time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counted {
    /// Commands that ended.
    pub commands: u64,
    vcpu_exits: u64,
    doorbell_events: u64,
    io_uring_enters: u64,
    wake_ups: u64,
    interrupts: u64,
}

impl Counted {
    /// What a machine says; `None` without a disk.
    #[must_use]
    pub fn of(status: &FerryStatus) -> Option<Self> {
        let disk = status.disks.first()?;
        Some(Self {
            commands: disk.completed,
            vcpu_exits: status.vcpu_exits,
            doorbell_events: disk.doorbell_events,
            io_uring_enters: disk.io_uring_enters,
            wake_ups: disk.wake_ups,
            interrupts: disk.interrupts,
        })
    }

    /// For a thousand of the commands since `before`.
    #[must_use]
    pub fn costs_since(&self, before: &Self) -> Costs {
        let commands = self.commands.saturating_sub(before.commands).max(1) as f64;
        let per_thousand =
            |count: fn(&Self) -> u64| count(self).saturating_sub(count(before)) as f64 * 1000.0 / commands;
        Costs {
            vcpu_exits: per_thousand(|counted| counted.vcpu_exits),
            doorbell_events: per_thousand(|counted| counted.doorbell_events),
            io_uring_enters: per_thousand(|counted| counted.io_uring_enters),
            wake_ups: per_thousand(|counted| counted.wake_ups),
            interrupts: per_thousand(|counted| counted.interrupts),
        }
    }
}

/// Of a thousand commands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Costs<T = f64> {
    /// Times that a vCPU left the guest for the process: registers of the controller, and each byte that the guest prints.
    pub vcpu_exits: T,
    /// Times that it left the guest for a doorbell that KVM made a wake-up of.
    pub doorbell_events: T,
    /// Calls of io_uring_enter.
    pub io_uring_enters: T,
    /// Wake-ups by the process itself: writes to an eventfd.
    pub wake_ups: T,
    /// Interrupts sent: writes to an eventfd. None while the guest looks for completions itself.
    pub interrupts: T,
}

impl Costs<Spread> {
    /// Of several samples; `None` of none.
    #[must_use]
    pub fn of(samples: impl Iterator<Item = Costs> + Clone) -> Option<Self> {
        let spread = |cost: fn(Costs) -> f64| Spread::of(samples.clone().map(cost));
        Some(Self {
            vcpu_exits: spread(|costs| costs.vcpu_exits)?,
            doorbell_events: spread(|costs| costs.doorbell_events)?,
            io_uring_enters: spread(|costs| costs.io_uring_enters)?,
            wake_ups: spread(|costs| costs.wake_ups)?,
            interrupts: spread(|costs| costs.interrupts)?,
        })
    }
}

/// The heads of the columns that medians of [`Costs`] are printed in.
pub const HEADS: &str = "   exits doorbells   enters wake-ups  interr.";

impl fmt::Display for Costs<Spread> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { vcpu_exits, doorbell_events, io_uring_enters, wake_ups, interrupts } = self;
        write!(f, "{:>8.1}{:>10.1}", vcpu_exits.median, doorbell_events.median)?;
        write!(f, "{:>9.1}{:>9.1}{:>9.1}", io_uring_enters.median, wake_ups.median, interrupts.median)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costs_are_those_of_a_thousand_commands() {
        let before = Counted { commands: 500, vcpu_exits: 10, ..Counted::default() };
        let after = Counted { commands: 2500, vcpu_exits: 20, io_uring_enters: 500, ..before };
        let costs = after.costs_since(&before);
        let expected = Costs { vcpu_exits: 5.0, io_uring_enters: 250.0, ..Costs::default() };
        assert_eq!(costs, expected);
        let text = Costs::of([costs, costs].into_iter()).unwrap().to_string();
        assert_eq!(text, "     5.0       0.0    250.0      0.0      0.0");
        assert_eq!(text.len(), HEADS.len());
        assert_eq!(Costs::of(std::iter::empty()), None);
    }
}
