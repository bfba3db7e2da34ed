//! Migrations of a busy guest: for each case one guest, moved from process to process as often as asked for.
//!
//! The guest is the exerciser with its NVMe queues kept busy, one unless more are asked for, its RAM filled as far as it reaches, and some of it rewritten all the time;
//! it verifies its disk all the time, and all of its disk and RAM at the end. Between two moves it runs for a while, and the reference
//! copy is made. [`table`](super::table) shows what came out.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use exerciser::report::{Counters, Line};
use indicatif::HumanBytes;
use serde::Serialize;

use super::case::{Case, Transport};
use super::copy::Contents;
use super::difference::{Difference, differences};
use super::host::Host;
use super::spread::Spread;
use crate::control::{FerryDowntime, Limits, MigrateRequest, OnTimeout};
use crate::demo::{Report, largest_parts, parts};
use crate::drive::exerciser::{Gap, IMAGE, Reader, history};
use crate::drive::{Ferry, Process, Stage};
use crate::memory::PAGE_SIZE_BYTES;

/// Verified I/Os before the first move.
const ENOUGH: u64 = 1000;
/// Seconds of a migration after which a guest that dirties more than the link carries is stopped all the same.
const PATIENCE_SECONDS: u32 = 60;

/// What to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Number of migrations of each case, from 1.
    pub runs: u32,
    /// The rows of the table.
    pub cases: Vec<Case>,
    /// Credentials for the cases with TLS, which the address 127.0.0.1 has to be among the names of.
    pub tls_dir: Option<PathBuf>,
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
    /// What of them was state of vCPUs and devices.
    pub device_bytes: u64,
    /// Passes over RAM.
    pub rounds: u32,
    /// Disk commands in flight when the stop began.
    pub in_flight_at_stop: u32,
    /// What the guest rewrote of its RAM before it moved, in bytes a second by its clock.
    pub dirtied_bytes_per_second: f64,
    /// Bytes a second of the reference copy, which is of as many bytes as the guest has filled. None where memory is handed over.
    pub copy_bytes_per_second: Option<f64>,
}

impl Run {
    /// Bytes a second of the migration.
    #[must_use]
    pub fn bytes_per_second(&self) -> f64 {
        self.bytes as f64 * 1e3 / self.total_milliseconds.max(1) as f64
    }

    /// The same by those of the copy.
    #[must_use]
    pub fn throughput_ratio(&self) -> Option<f64> {
        self.copy_bytes_per_second.map(|copy| self.bytes_per_second() / copy)
    }
}

/// All of them.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Results {
    /// Where it was measured.
    pub host: Host,
    /// Case by case.
    pub rows: Vec<Row>,
    /// What TLS and larger controllers cost.
    pub differences: Vec<Difference>,
}

/// The migrations of one case.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Row {
    /// Which guest, and how it moved.
    #[serde(flatten)]
    pub case: Case,
    /// Bytes of RAM that the guest had filled; the rest was not populated.
    pub filled_bytes: u64,
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
    /// The one less the other: the downtime that the guest saw beyond that.
    pub added_gap_milliseconds: Spread,
    /// Times from the command to the end, in milliseconds.
    pub total_milliseconds: Spread,
    /// Bytes a second of the migrations.
    pub bytes_per_second: Spread,
    /// Bytes a second of the copies.
    pub copy_bytes_per_second: Option<Spread>,
    /// Bytes a second of the migration by those of the copy after it.
    pub throughput_ratio: Option<Spread>,
    /// State of vCPUs and devices, in bytes.
    pub device_bytes: Spread,
    /// Passes over RAM.
    pub rounds: Spread,
    /// Disk commands in flight when the stop began.
    pub in_flight_at_stop: Spread,
    /// What the guest rewrote, in bytes a second.
    pub dirtied_bytes_per_second: Spread,
    /// I/Os that the guest verified in all.
    pub verified: u64,
}

/// Measures; `progress` sees each case before its first run, then each run of it.
///
/// # Errors
/// A process failed or the guest found an error; with what both sides wrote last.
pub fn run(
    stage: &mut Stage,
    plan: &Plan,
    mut progress: impl FnMut(&Case, Option<&Run>),
) -> anyhow::Result<Results> {
    ensure!(plan.runs > 0 && !plan.cases.is_empty(), "no runs: nothing to measure");
    plan.cases.iter().try_for_each(Case::check)?;
    let mut contents: Option<Contents> = None;
    let mut rows = Vec::new();
    for (number, case) in plan.cases.iter().enumerate() {
        progress(case, None);
        let filled = case.filled_bytes();
        // Those of the case before go first.
        contents = contents.filter(|there| there.bytes() == filled);
        if contents.is_none() && case.transport.link().is_some() {
            contents = Some(Contents::new(filled)?);
        }
        let seen = |run: &Run| progress(case, Some(run));
        let row = measure(stage, number, plan, case, contents.as_ref(), seen);
        rows.push(row.with_context(|| case.to_string())?);
    }
    Ok(Results { host: Host::this(), differences: differences(&rows), rows })
}

fn measure(
    stage: &mut Stage,
    number: usize,
    plan: &Plan,
    case: &Case,
    contents: Option<&Contents>,
    mut progress: impl FnMut(&Run),
) -> anyhow::Result<Row> {
    let tls_dir =
        if case.tls { Some(plan.tls_dir.as_deref().context("TLS needs credentials")?) } else { None };
    let kernel = stage.folder().join("exerciser.elf");
    let (flags, files) = case.machine(stage.folder(), number);
    files
        .iter()
        .try_for_each(|(path, bytes)| File::create(path)?.set_len(*bytes))
        .and_then(|()| std::fs::write(&kernel, IMAGE))
        .with_context(|| format!("cannot make the guest's files in {}", stage.folder().display()))?;
    let machine = stage.machine(flags);
    let mut arrival = machine.clone();
    arrival
        .flags
        .extend(tls_dir.iter().flat_map(|folder| ["--tls-dir".into(), folder.as_os_str().to_owned()]));

    let mut source = machine.boot(&format!("case-{number}-0"), &kernel, &case.words())?;
    stage.enter(&source)?;
    let mut reader = Reader::new();
    reader.wait_for_verified(&source, ENOUGH)?;
    reader.wait_for(&source, "another line, which gives a rate", |_| true)?;
    let tsc_khz = tsc_khz(&source)?;
    let mut done = Vec::new();
    for turn in 1..=plan.runs {
        let name = format!("case-{number}-{turn}");
        let mut destination = match case.transport {
            Transport::Unix | Transport::Local => arrival.wait_for_guest(&name)?,
            Transport::Tcp => {
                let uri = transport::Uri::Tcp { host: "127.0.0.1".to_owned(), port: 0 };
                arrival.wait_for_guest_at(&name, &uri)?
            }
        };
        stage.enter(&destination)?;
        let mut run = move_once(source, &mut destination, (case, tls_dir), tsc_khz)?;
        if let (Some(contents), Some(link)) = (contents, case.transport.link()) {
            let time = contents.copy(&machine.program, link)?;
            run.copy_bytes_per_second = Some(contents.bytes() as f64 / time.as_secs_f64());
        }
        progress(&run);
        done.push(run);
        source = destination;
    }
    let last = Reader::new().finish(&mut source)?;
    source.wait_for_end()?;
    Row::new(case, done, last.verified).context("there are no runs")
}

/// Moves the guest, and lets it run.
fn move_once(
    mut source: Ferry,
    destination: &mut Ferry,
    (case, tls_dir): (&Case, Option<&Path>),
    tsc_khz: u64,
) -> anyhow::Result<Run> {
    let dirtied =
        dirtied_bytes_per_second(&history(&source), tsc_khz).context("the guest has said too little")?;
    let finished = match case.channels {
        Some(_) => {
            let limits = Limits {
                channels: case.channels,
                timeout: Some(PATIENCE_SECONDS),
                on_timeout: Some(OnTimeout::Force),
                ..Limits::default()
            };
            let tls_dir = tls_dir.map(Path::to_owned);
            source
                .migrate_with(MigrateRequest { limits, tls_dir, ..MigrateRequest::default() }, destination)?
        }
        None => source.hand_over_to(destination)?,
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
    Ok(Run {
        downtime: report.downtime,
        guest_gap: Gap::new(&before, &first),
        total_milliseconds: report.total_milliseconds,
        bytes: report.bytes,
        device_bytes: finished.details.as_ref().map_or(0, |details| details.device_bytes),
        rounds: report.rounds,
        in_flight_at_stop: report.in_flight_at_stop,
        dirtied_bytes_per_second: dirtied,
        copy_bytes_per_second: None,
    })
}

/// The frequency of the guest's clock, which it says when it boots.
fn tsc_khz(process: &Process) -> anyhow::Result<u64> {
    let lines = process.console.all();
    let clock = lines.iter().map(|line| Line::parse(line)).find(|line| line.kind == "clock");
    clock.and_then(|line| line.number("tsc_khz")).context("the guest does not say how fast its clock is")
}

/// What a guest rewrites of its RAM each second, from the first of its lines to the last.
fn dirtied_bytes_per_second(lines: &[Counters], tsc_khz: u64) -> Option<f64> {
    let (first, last) = (lines.first()?, lines.last()?);
    let milliseconds = last.tsc.checked_sub(first.tsc)? as f64 / tsc_khz as f64;
    let bytes = last.ram_dirtied.checked_sub(first.ram_dirtied)? as f64 * PAGE_SIZE_BYTES as f64;
    (milliseconds > 0.0).then(|| bytes * 1e3 / milliseconds)
}

impl Row {
    pub(super) fn new(case: &Case, runs: Vec<Run>, verified: u64) -> Option<Self> {
        let spread = |figure: fn(&Run) -> f64| Spread::of(runs.iter().map(figure));
        let known = |figure: fn(&Run) -> Option<f64>| Spread::of(runs.iter().filter_map(figure));
        Some(Self {
            case: *case,
            filled_bytes: case.filled_bytes(),
            downtime_milliseconds: spread(|run| run.downtime.total as f64 / 1e3)?,
            part_milliseconds: part_spreads(&runs),
            guest_gap_milliseconds: spread(|run| run.guest_gap.largest as f64 / 1e3)?,
            other_gap_milliseconds: spread(|run| run.guest_gap.before as f64 / 1e3)?,
            added_gap_milliseconds: spread(|run| run.guest_gap.added as f64 / 1e3)?,
            total_milliseconds: spread(|run| run.total_milliseconds as f64)?,
            bytes_per_second: spread(Run::bytes_per_second)?,
            copy_bytes_per_second: known(|run| run.copy_bytes_per_second),
            throughput_ratio: known(Run::throughput_ratio),
            device_bytes: spread(|run| run.device_bytes as f64)?,
            rounds: spread(|run| f64::from(run.rounds))?,
            in_flight_at_stop: spread(|run| f64::from(run.in_flight_at_stop))?,
            dirtied_bytes_per_second: spread(|run| run.dirtied_bytes_per_second)?,
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
            "downtime {:6.1} ms ({}), guest's clock {:.1} ms (before: {:.1}), {} in {:.3} s, {} rounds, {} in flight",
            self.downtime.total as f64 / 1e3,
            largest_parts(&self.downtime),
            self.guest_gap.largest as f64 / 1e3,
            self.guest_gap.before as f64 / 1e3,
            HumanBytes(self.bytes),
            self.total_milliseconds as f64 / 1e3,
            self.rounds,
            self.in_flight_at_stop,
        )?;
        self.copy_bytes_per_second.map_or(Ok(()), |copy| write!(f, ", copy {}/s", HumanBytes(copy as u64)))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::case::Lists;
    use super::*;

    /// A migration that took half a second.
    pub(in super::super) fn sample(downtime: u64) -> Run {
        Run {
            downtime: FerryDowntime { total: downtime, handover: downtime, ..FerryDowntime::default() },
            guest_gap: Gap { largest: downtime + 100, before: 100, added: downtime },
            total_milliseconds: 500,
            bytes: 1 << 29,
            device_bytes: 12 << 10,
            rounds: 2,
            in_flight_at_stop: 3,
            dirtied_bytes_per_second: f64::from(90 << 20),
            copy_bytes_per_second: Some(2.0 * f64::from(1 << 30)),
        }
    }

    #[test]
    fn a_rate_is_what_the_guest_did_by_its_clock() {
        let line = |tsc, ram_dirtied| Counters { tsc, ram_dirtied, ..Counters::default() };
        let lines = [line(1_000_000, 500), line(2_000_000, 600), line(5_000_000, 1_500)];
        // 1000 pages in 4 million counts of a clock of 2 MHz.
        assert_eq!(dirtied_bytes_per_second(&lines, 2_000), Some(500.0 * 4096.0));
        assert_eq!(dirtied_bytes_per_second(&lines[..1], 2_000), None);
        assert_eq!(dirtied_bytes_per_second(&[], 2_000), None);
    }

    #[test]
    fn a_row_sums_up_the_runs() {
        let tcp = Lists { transports: vec![Transport::Tcp], ..Lists::default() };
        let case = Case::all(&tcp)[0];
        assert!(Row::new(&case, Vec::new(), 0).is_none());
        let row = Row::new(&case, [9_000, 5_000, 30_000].map(sample).to_vec(), 4321).unwrap();
        assert_eq!(row.downtime_milliseconds, Spread { median: 9.0, min: 5.0, max: 30.0 });
        assert_eq!(row.bytes_per_second.median, f64::from(1 << 30));
        assert_eq!(row.throughput_ratio.unwrap().median, 0.5);
        let local = Case { transport: Transport::Local, ..case };
        let run = Run { copy_bytes_per_second: None, ..sample(2_000) };
        assert_eq!(Row::new(&local, vec![run], 1).unwrap().throughput_ratio, None);
    }

    #[test]
    fn a_run_is_one_line() {
        let text = sample(9_000).to_string();
        assert!(text.starts_with(
            "downtime    9.0 ms (hand-over 9.0), guest's clock 9.1 ms (before: 0.1), 512.00 MiB in"
        ));
        assert!(text.ends_with("3 in flight, copy 2.00 GiB/s") && !text.contains('\n'), "{text}");
    }
}
