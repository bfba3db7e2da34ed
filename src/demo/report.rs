//! What a demonstration shows at its end.

use std::fmt;

use anyhow::Context;
use indicatif::{HumanBytes, HumanCount};
use serde::Serialize;

use crate::control::{FerryDowntime, Finished};
use crate::drive::exerciser::Gap;

/// A guest that moved, and what was checked on both sides. Times in microseconds unless they say otherwise.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Report {
    /// `exerciser` or `linux`.
    pub guest: &'static str,
    /// From the start of the process to the guest's init, where the guest has one.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub boot_milliseconds: Option<u64>,
    /// Passes over RAM, the last with the guest stopped.
    pub rounds: u32,
    /// Bytes sent.
    pub bytes: u64,
    /// How long the migration took.
    pub total_milliseconds: u64,
    /// How long the guest was stopped, by the host's clock, and where that went.
    pub downtime: FerryDowntime,
    /// The same by the guest's clock, of guests that watch it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub guest_gap: Option<Gap>,
    /// Disk commands in flight when the stop began.
    pub in_flight_at_stop: u32,
    /// I/Os whose data the guest compared.
    pub verified: Checked,
    /// Pages of RAM that the guest compared.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ram_checked: Option<Checked>,
}

/// What the guest found right in each process.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Checked {
    /// In the source.
    pub before: u64,
    /// In the destination.
    pub after: u64,
}

impl Report {
    /// What the source says of a migration that has succeeded; nothing checked yet.
    ///
    /// # Errors
    /// It does not say what the move cost.
    pub fn new(finished: &Finished, guest: &'static str) -> anyhow::Result<Self> {
        let Finished { info, details } = finished;
        let details = details.as_ref().context("the source says no details of the migration")?;
        let ram = info.ram.as_ref().context("the source says nothing of RAM")?;
        Ok(Self {
            guest,
            boot_milliseconds: None,
            rounds: details.rounds,
            bytes: ram.transferred,
            total_milliseconds: info.total_time.context("the source says no time")?,
            downtime: details.downtime.context("the source says no downtime")?,
            guest_gap: None,
            in_flight_at_stop: details.in_flight_at_stop,
            verified: Checked::default(),
            ram_checked: None,
        })
    }
}

/// Where the downtime went: what was done, and for how many microseconds.
#[must_use]
pub fn parts(downtime: &FerryDowntime) -> [(&'static str, u64); 7] {
    let FerryDowntime { total: _, stop, last_pass, device_save, transfer, load, handover, resume } =
        *downtime;
    [
        ("stop", stop),
        ("last pass over RAM", last_pass),
        ("device state", device_save),
        ("transfer", transfer),
        ("load", load),
        ("hand-over", handover),
        ("resume", resume),
    ]
}

/// The same in one line of milliseconds, the largest part first, without those that would show as 0.0.
#[must_use]
pub fn largest_parts(downtime: &FerryDowntime) -> String {
    let mut parts = parts(downtime);
    parts.sort_by_key(|(_, time)| std::cmp::Reverse(*time));
    let shown = parts.iter().filter(|(_, time)| *time >= 50);
    shown.map(|(name, time)| format!("{name} {}", milliseconds(*time))).collect::<Vec<_>>().join(", ")
}

fn milliseconds(microseconds: u64) -> String {
    format!("{:.1}", microseconds as f64 / 1e3)
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut row = |name: &str, value: String| writeln!(f, "  {name:<28}{value}");
        if let Some(time) = self.boot_milliseconds {
            row("start to init", format!("{:.1} s", time as f64 / 1e3))?;
        }
        row("rounds over RAM", self.rounds.to_string())?;
        row("bytes sent", HumanBytes(self.bytes).to_string())?;
        row("time of the migration", format!("{:.3} s", self.total_milliseconds as f64 / 1e3))?;
        row("downtime, host's clock", format!("{} ms", milliseconds(self.downtime.total)))?;
        row("", largest_parts(&self.downtime))?;
        if let Some(Gap { largest, before, added }) = self.guest_gap {
            let value = match added {
                0 => "hidden by what the host does to a guest that stays".to_owned(),
                added => format!("{} ms", milliseconds(added)),
            };
            row("downtime, guest's clock", value)?;
            let (largest, before) = (milliseconds(largest), milliseconds(before));
            row("", format!("largest gap {largest}, less the largest before the move, {before}"))?;
        }
        row("commands in flight at stop", self.in_flight_at_stop.to_string())?;
        writeln!(f)?;
        let mut checked =
            |name: &str, before: String, after: String| writeln!(f, "  {name:<28}{before:>10}{after:>12}");
        checked("checked by the guest", "before".to_owned(), "after".to_owned())?;
        let count = |count| HumanCount(count).to_string();
        let Checked { before, after } = self.verified;
        checked("  I/Os", count(before), count(after))?;
        if let Some(Checked { before, after }) = self.ram_checked {
            checked("  pages of RAM", count(before), count(after))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::{FerryMigration, MigrationInfo, MigrationStatus, RamStats};

    fn finished() -> Finished {
        let downtime = FerryDowntime {
            total: 9_950,
            stop: 300,
            last_pass: 4_100,
            transfer: 20,
            handover: 5_000,
            ..FerryDowntime::default()
        };
        let details = FerryMigration {
            rounds: 3,
            in_flight_at_stop: 5,
            downtime: Some(downtime),
            ..FerryMigration::default()
        };
        let ram = RamStats { transferred: 5 << 20, ..RamStats::default() };
        let info = MigrationInfo {
            ram: Some(ram),
            total_time: Some(250),
            ..MigrationInfo::new(MigrationStatus::Completed)
        };
        Finished { info, details: Some(details) }
    }

    #[test]
    fn a_report_says_all() {
        let report = Report {
            verified: Checked { before: 1234, after: 5678 },
            ram_checked: Some(Checked { before: 10, after: 20 }),
            guest_gap: Some(Gap { largest: 10_500, before: 400, added: 10_100 }),
            ..Report::new(&finished(), "exerciser").unwrap()
        };
        let lines: Vec<String> = report.to_string().lines().map(|line| line.trim().to_owned()).collect();
        let expected = [
            "rounds over RAM             3",
            "bytes sent                  5.00 MiB",
            "time of the migration       0.250 s",
            "downtime, host's clock      9.9 ms",
            "hand-over 5.0, last pass over RAM 4.1, stop 0.3",
            "downtime, guest's clock     10.1 ms",
            "largest gap 10.5, less the largest before the move, 0.4",
            "commands in flight at stop  5",
            "",
            "checked by the guest            before       after",
            "I/Os                           1,234       5,678",
            "pages of RAM                      10          20",
        ];
        assert_eq!(lines, expected);
        let busy = Report { guest_gap: Some(Gap { largest: 10_500, before: 20_000, added: 0 }), ..report };
        assert!(busy.to_string().contains("guest's clock     hidden by what"), "{busy}");
    }

    #[test]
    fn a_report_needs_the_details() {
        let bare = Finished { details: None, ..finished() };
        assert!(Report::new(&bare, "linux").unwrap_err().to_string().contains("no details"));
    }
}
