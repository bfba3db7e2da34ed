//! Migrations of a busy guest: one guest, moved from process to process as often as asked for.
//!
//! The guest is the exerciser with one NVMe queue kept busy and nearly all of its RAM filled; it verifies its disk all the
//! time, and all of its disk and RAM at the end. Between two moves it runs for a while, and the reference copy is made.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;

use anyhow::{Context, ensure};
use indicatif::HumanBytes;
use serde::Serialize;

use super::copy::Contents;
use super::host::Host;
use super::spread::Spread;
use crate::config::display_size;
use crate::control::FerryDowntime;
use crate::demo::{Report, largest_parts, parts};
use crate::drive::exerciser::{Gap, IMAGE, Reader, history};
use crate::drive::{Ferry, Stage};

/// Bytes of the one namespace, a file.
const DISK_BYTES: u64 = 64 << 20;
/// RAM that the exerciser needs for itself; the rest is filled.
const GUEST_BYTES: u64 = 32 << 20;
/// Verified I/Os before the first move.
const ENOUGH: u64 = 1000;

/// What to measure.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Number of migrations, from 1.
    pub runs: u32,
    /// The guest's RAM.
    pub memory_bytes: u64,
    /// How it moves.
    pub transport: Transport,
}

/// How the two processes are connected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum Transport {
    /// A Unix socket.
    #[default]
    Unix,
    /// TCP over loopback.
    Tcp,
    /// A Unix socket over which the memory itself goes.
    Local,
}

impl Transport {
    fn describe(self) -> &'static str {
        match self {
            Self::Unix => "a Unix socket",
            Self::Tcp => "TCP",
            Self::Local => "a Unix socket, handed over",
        }
    }
}

/// One migration. Times in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Run {
    /// How long the guest was stopped by the host's clock, and where that went.
    pub downtime: FerryDowntime,
    /// The same by the guest's clock.
    pub guest_gap: Gap,
    /// From the command to the end.
    pub total_milliseconds: u64,
    /// Bytes sent.
    pub bytes: u64,
    /// Passes over RAM.
    pub rounds: u32,
    /// Disk commands in flight when the stop began.
    pub in_flight_at_stop: u32,
    /// Time of the reference copy of as many bytes as the guest has RAM.
    pub copy_milliseconds: f64,
    /// Bytes a second of the migration by those of the copy.
    pub throughput_ratio: f64,
}

impl Run {
    fn bytes_per_second(&self) -> f64 {
        self.bytes as f64 * 1e3 / self.total_milliseconds.max(1) as f64
    }
}

/// All of them.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Results {
    /// Where it was measured.
    pub host: Host,
    /// The guest's RAM.
    pub memory_bytes: u64,
    /// How it moved.
    pub transport: Transport,
    /// One by one.
    pub runs: Vec<Run>,
    /// Downtimes in milliseconds, by the host's clock.
    pub downtime_milliseconds: Spread,
    /// The same for its parts.
    pub part_milliseconds: BTreeMap<&'static str, Spread>,
    /// The largest gaps in the guest's time when it moved, in milliseconds.
    pub guest_gap_milliseconds: Spread,
    /// The largest gaps when it did not move: what the host does to any guest.
    pub other_gap_milliseconds: Spread,
    /// Times from the command to the end, in milliseconds.
    pub total_milliseconds: Spread,
    /// Bytes a second of the migrations.
    pub bytes_per_second: Spread,
    /// Bytes a second of the migration by those of the copy.
    pub throughput_ratio: Spread,
    /// I/Os that the guest verified in all.
    pub verified: u64,
}

/// Measures; `progress` sees each run.
///
/// # Errors
/// A process failed or the guest found an error; with what both sides wrote last.
pub fn run(stage: &mut Stage, plan: &Plan, mut progress: impl FnMut(&Run)) -> anyhow::Result<Results> {
    ensure!(plan.runs > 0, "no runs: nothing to measure");
    let filled = plan.memory_bytes.saturating_sub(GUEST_BYTES);
    ensure!(filled > 0, "the guest needs more than {} of RAM", HumanBytes(GUEST_BYTES));
    let (disk, kernel) = (stage.folder().join("disk.img"), stage.folder().join("exerciser.elf"));
    File::create(&disk)
        .and_then(|file| file.set_len(DISK_BYTES))
        .and_then(|()| std::fs::write(&kernel, IMAGE))
        .with_context(|| format!("cannot make the guest's files in {}", stage.folder().display()))?;
    let machine = stage.machine([
        "--memory".to_owned(),
        display_size(plan.memory_bytes),
        "--nvme".to_owned(),
        format!("path={},serial=bench", disk.display()),
    ]);
    let contents = Contents::new(plan.memory_bytes)?;

    // Each line takes the guest several milliseconds, so there are few of them.
    let words = format!("queues=1 inflight=8 ram={filled} check=0 report=1000");
    let mut source = machine.boot("process-0", &kernel, &words)?;
    stage.enter(&source)?;
    Reader::new().wait_for_verified(&source, ENOUGH)?;
    let mut runs = Vec::new();
    for number in 1..=plan.runs {
        let name = format!("process-{number}");
        let mut destination = match plan.transport {
            Transport::Unix | Transport::Local => machine.wait_for_guest(&name)?,
            Transport::Tcp => {
                let uri = transport::Uri::Tcp { host: "127.0.0.1".to_owned(), port: 0 };
                machine.wait_for_guest_at(&name, &uri)?
            }
        };
        stage.enter(&destination)?;
        let run = move_once(source, &mut destination, plan.transport, &contents)?;
        progress(&run);
        runs.push(run);
        source = destination;
    }
    let done = Reader::new().finish(&mut source)?;
    source.wait_for_end()?;
    Results::new(plan, runs, done.verified).context("there are no runs")
}

/// Moves the guest, lets it run, and copies as much memory.
fn move_once(
    mut source: Ferry,
    destination: &mut Ferry,
    transport: Transport,
    contents: &Contents,
) -> anyhow::Result<Run> {
    let finished = match transport {
        Transport::Unix | Transport::Tcp => source.migrate_to(destination, |_| {})?,
        Transport::Local => source.hand_over_to(destination)?,
    };
    let mut before = history(&source);
    // The first line of a process that took the guest over tells of the move that brought it there.
    if source.listens_at().is_ok() {
        before.remove(0);
    }
    source.quit()?;
    let mut reader = Reader::new();
    let first = reader.wait_for(destination, "a line", |_| true)?;
    reader.wait_for(destination, "a line without a move in it", |_| true)?;
    let report = Report::new(&finished, "exerciser")?;
    let copy = contents.copy()?.as_secs_f64();
    let mut run = Run {
        downtime: report.downtime,
        guest_gap: Gap::new(&before, &first),
        total_milliseconds: report.total_milliseconds,
        bytes: report.bytes,
        rounds: report.rounds,
        in_flight_at_stop: report.in_flight_at_stop,
        copy_milliseconds: copy * 1e3,
        throughput_ratio: 0.0,
    };
    run.throughput_ratio = run.bytes_per_second() * copy / contents.bytes() as f64;
    Ok(run)
}

impl Results {
    fn new(plan: &Plan, runs: Vec<Run>, verified: u64) -> Option<Self> {
        let spread = |figure: fn(&Run) -> f64| Spread::of(runs.iter().map(figure));
        Some(Self {
            host: Host::this(),
            memory_bytes: plan.memory_bytes,
            transport: plan.transport,
            downtime_milliseconds: spread(|run| run.downtime.total as f64 / 1e3)?,
            part_milliseconds: part_spreads(&runs),
            guest_gap_milliseconds: spread(|run| run.guest_gap.largest as f64 / 1e3)?,
            other_gap_milliseconds: spread(|run| run.guest_gap.before as f64 / 1e3)?,
            total_milliseconds: spread(|run| run.total_milliseconds as f64)?,
            bytes_per_second: spread(Run::bytes_per_second)?,
            throughput_ratio: spread(|run| run.throughput_ratio)?,
            verified,
            runs,
        })
    }
}

fn part_spreads(runs: &[Run]) -> BTreeMap<&'static str, Spread> {
    let mut figures = BTreeMap::<_, Vec<f64>>::new();
    for (name, time) in runs.iter().flat_map(|run| parts(&run.downtime)) {
        figures.entry(name).or_default().push(time as f64 / 1e3);
    }
    figures.into_iter().filter_map(|(name, figures)| Some((name, Spread::of(figures)?))).collect()
}

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "downtime {:6.1} ms ({}), guest's clock {:.1} ms (before: {:.1}), {} in {:.3} s, {} rounds, {} in flight, copy {:.3} s",
            self.downtime.total as f64 / 1e3,
            largest_parts(&self.downtime),
            self.guest_gap.largest as f64 / 1e3,
            self.guest_gap.before as f64 / 1e3,
            HumanBytes(self.bytes),
            self.total_milliseconds as f64 / 1e3,
            self.rounds,
            self.in_flight_at_stop,
            self.copy_milliseconds / 1e3,
        )
    }
}

impl fmt::Display for Results {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mebibytes = 1.0 / f64::from(1 << 20);
        writeln!(
            f,
            "{} migrations of {} of RAM over {}, one busy NVMe queue\n{}\n",
            self.runs.len(),
            HumanBytes(self.memory_bytes),
            self.transport.describe(),
            self.host,
        )?;
        writeln!(f, "  {:<32}{:>10}{:>10}{:>10}", "", "median", "min", "max")?;
        let mut row = |name: &str, spread: &Spread, scale: f64, digits: usize| {
            let [median, min, max] = [spread.median, spread.min, spread.max].map(|figure| figure * scale);
            writeln!(f, "  {name:<32}{median:>10.digits$}{min:>10.digits$}{max:>10.digits$}")
        };
        row("downtime, ms", &self.downtime_milliseconds, 1.0, 1)?;
        for (name, spread) in &self.part_milliseconds {
            row(&format!("  {name}"), spread, 1.0, 1)?;
        }
        row("largest gap for the guest, ms", &self.guest_gap_milliseconds, 1.0, 1)?;
        row("  while it does not move", &self.other_gap_milliseconds, 1.0, 1)?;
        row("time of the migration, ms", &self.total_milliseconds, 1.0, 0)?;
        if self.transport != Transport::Local {
            row("throughput, MiB/s", &self.bytes_per_second, mebibytes, 0)?;
            row("  by that of a plain copy", &self.throughput_ratio, 1.0, 2)?;
        }
        writeln!(f, "\n{} verified I/Os, no error", self.verified)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(downtime: u64) -> Run {
        Run {
            downtime: FerryDowntime { total: downtime, handover: downtime, ..FerryDowntime::default() },
            guest_gap: Gap { largest: downtime + 100, before: 100, added: downtime },
            total_milliseconds: 500,
            bytes: 1 << 29,
            rounds: 2,
            in_flight_at_stop: 3,
            copy_milliseconds: 500.0,
            throughput_ratio: 0.5,
        }
    }

    #[test]
    fn results_sum_up_the_runs() {
        let plan = Plan { runs: 3, memory_bytes: 1 << 30, transport: Transport::Tcp };
        assert!(Results::new(&plan, Vec::new(), 0).is_none());
        let results = Results::new(&plan, [9_000, 5_000, 30_000].map(sample).to_vec(), 4321).unwrap();
        assert_eq!(results.downtime_milliseconds, Spread { median: 9.0, min: 5.0, max: 30.0 });
        assert_eq!(results.bytes_per_second.median, f64::from(1 << 30));
        let text = results.to_string();
        assert!(text.starts_with("3 migrations of 1.00 GiB of RAM over TCP"), "{text}");
        let row = |name: &str| {
            let line = text.lines().find(|line| line.trim_start().starts_with(name)).unwrap();
            line.replace(name, "").split_whitespace().map(str::to_owned).collect::<Vec<_>>()
        };
        assert_eq!(row("downtime, ms"), ["9.0", "5.0", "30.0"]);
        assert_eq!(row("hand-over"), ["9.0", "5.0", "30.0"]);
        assert_eq!(row("resume"), ["0.0", "0.0", "0.0"]);
        assert_eq!(row("throughput, MiB/s"), ["1024", "1024", "1024"]);
        assert!(text.ends_with("4321 verified I/Os, no error\n"), "{text}");
    }

    #[test]
    fn memory_that_is_handed_over_has_no_throughput() {
        let plan = Plan { runs: 1, memory_bytes: 1 << 30, transport: Transport::Local };
        let text = Results::new(&plan, vec![sample(2_000)], 1).unwrap().to_string();
        assert!(text.contains("over a Unix socket, handed over") && !text.contains("throughput"), "{text}");
    }

    #[test]
    fn a_run_is_one_line() {
        let text = sample(9_000).to_string();
        assert!(text.starts_with(
            "downtime    9.0 ms (hand-over 9.0), guest's clock 9.1 ms (before: 0.1), 512.00 MiB in"
        ));
        assert!(!text.contains('\n'));
    }
}
