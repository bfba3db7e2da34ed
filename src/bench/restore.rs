//! Guests that come out of a file: how soon they run again.
//!
//! For each size of RAM one guest fills its RAM, is suspended into a file in the mapped layout, and restored from it by a process of its
//! own, again and again. Each process says itself how long it took from `main` to its first `KVM_RUN` and where that went; from outside
//! it is watched when the guest gets on, which needs its memory. References of the same minutes: a process that boots a guest of the same
//! machine, where nothing is read; and the file itself, read from its beginning to its end.

use std::collections::BTreeMap;
use std::fmt;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use indicatif::HumanBytes;
use serde::Serialize;

use super::case::{Case, Lists};
use super::host::{Host, available_bytes};
use super::spread::Spread;
use crate::config::display_size;
use crate::control::{FerryStart, MigrateRequest, MigrationStatus};
use crate::drive::exerciser::{IMAGE, Reader};
use crate::drive::{Ferry, Machine, Stage};

/// Verified I/Os before a guest is suspended.
const ENOUGH: u64 = 100;
/// Milliseconds between two lines of the guest, by its clock.
const LINE_MILLISECONDS: u64 = 20;
/// Bytes of one read of the file.
const READ_BYTES: usize = 1 << 20;

/// What to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Number of restores of each guest, from 1.
    pub runs: u32,
    /// The guests' RAM.
    pub memory_bytes: Vec<u64>,
    /// Where the file lies; a temporary folder unless it is said.
    pub folder: Option<PathBuf>,
}

/// One restore.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Run {
    /// What the process says of its start. Microseconds.
    pub start: FerryStart,
    /// From the start of the process to the guest's first line, seen from outside.
    pub first_line_milliseconds: f64,
    /// What a process says that boots an empty guest of the same machine. Microseconds.
    pub boot: FerryStart,
    /// Reading all of the file.
    pub read_milliseconds: f64,
}

/// All of them.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Results {
    /// Where it was measured.
    pub host: Host,
    /// Guest by guest.
    pub rows: Vec<Row>,
}

/// The restores of one guest. Times in milliseconds.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Row {
    /// The guest's RAM.
    pub memory_bytes: u64,
    /// Bytes of it that the guest had filled; the rest is not in the file.
    pub filled_bytes: u64,
    /// From `main` to the first `KVM_RUN`, KVM's first memory slot apart.
    pub running_milliseconds: Spread,
    /// KVM's first memory slot.
    pub first_memory_slot_milliseconds: Spread,
    /// The parts of both together.
    pub part_milliseconds: BTreeMap<&'static str, Spread>,
    /// From the start of the process to the guest's first line.
    pub first_line_milliseconds: Spread,
    /// From `main` to the first `KVM_RUN` of a process that boots an empty guest, the first memory slot apart.
    pub boot_milliseconds: Spread,
    /// Reading all of the file.
    pub read_milliseconds: Spread,
    /// One by one.
    pub runs: Vec<Run>,
}

/// Measures; `progress` sees each guest before its first restore, then each of them.
///
/// # Errors
/// A process failed or the guest found an error; with what it wrote last.
pub fn run(
    stage: &mut Stage,
    plan: &Plan,
    mut progress: impl FnMut(&str, Option<&Run>),
) -> anyhow::Result<Results> {
    ensure!(plan.runs > 0 && !plan.memory_bytes.is_empty(), "no runs: nothing to measure");
    let [plain] = Case::all(&Lists::default())[..] else { unreachable!("lists of one element each") };
    let cases: Vec<Case> =
        plan.memory_bytes.iter().map(|&memory_bytes| Case { memory_bytes, ..plain }).collect();
    cases.iter().try_for_each(check)?;
    let mut rows = Vec::new();
    for (number, case) in cases.iter().enumerate() {
        let name = format!("{} of RAM", display_size(case.memory_bytes));
        progress(&name, None);
        let runs = measure(stage, number, plan, case, |run| progress(&name, Some(run)));
        let row = Row::new(case, runs.with_context(|| name.clone())?);
        rows.push(row.context("there are no runs")?);
    }
    Ok(Results { host: Host::this(), rows })
}

/// The guest's memory is there once, and its file in the page cache.
fn check(case: &Case) -> anyhow::Result<()> {
    let filled = case.filled_bytes();
    ensure!(filled > 0, "{} of RAM are too few for the guest", HumanBytes(case.memory_bytes));
    let left = available_bytes().unwrap_or(u64::MAX);
    ensure!(
        2 * filled <= left,
        "{} of RAM: that takes {} of memory, and the host has {} left",
        display_size(case.memory_bytes),
        HumanBytes(2 * filled),
        HumanBytes(left),
    );
    Ok(())
}

fn measure(
    stage: &mut Stage,
    number: usize,
    plan: &Plan,
    case: &Case,
    mut progress: impl FnMut(&Run),
) -> anyhow::Result<Vec<Run>> {
    let scratch = match &plan.folder {
        Some(folder) => tempfile::tempdir_in(folder),
        None => tempfile::tempdir(),
    };
    let scratch = scratch.context("cannot make a folder for the file of the guest")?;
    let file = scratch.path().join("guest.ferry");
    let kernel = scratch.path().join("exerciser.elf");
    let machines = ["suspended", "empty"].map(|name| {
        let folder = scratch.path().join(name);
        std::fs::create_dir(&folder).and_then(|()| std::fs::write(&kernel, IMAGE))?;
        let (flags, files) = case.machine(&folder, number);
        files.iter().try_for_each(|(path, bytes)| File::create(path)?.set_len(*bytes))?;
        Ok::<_, std::io::Error>(stage.machine(flags))
    });
    let [machine, empty] = machines.map(|machine| machine.context("cannot make the guest's files"));
    let (machine, empty) = (machine?, empty?);

    let words = format!("{} report={LINE_MILLISECONDS}", case.words());
    let mut guest = machine.boot(&format!("restore-{number}-0"), &kernel, &words)?;
    stage.enter(&guest)?;
    let mut reader = Reader::new();
    reader.wait_for_verified(&guest, ENOUGH)?;
    let mut done = Vec::new();
    for turn in 1..=plan.runs {
        suspend(guest, &file)?;
        let read_milliseconds = read(&file)?;
        let boot = boot(stage, &empty, &kernel, &format!("empty-{number}-{turn}"))?;
        let begun = Instant::now();
        let incoming = ["--incoming".into(), format!("file:{}", file.display()).into()];
        guest = machine.start(&format!("restore-{number}-{turn}"), incoming)?;
        stage.enter(&guest)?;
        let mut reader = Reader::new();
        let first = reader.wait_for(&guest, "a first line", |_| true)?;
        let first_line_milliseconds = milliseconds(begun.elapsed());
        let run = Run { start: start(&mut guest)?, first_line_milliseconds, boot, read_milliseconds };
        progress(&run);
        done.push(run);
        // Its memory is used meanwhile.
        reader.wait_for_verified(&guest, first.verified + ENOUGH)?;
    }
    Reader::new().finish(&mut guest)?;
    guest.wait_for_end()?;
    Ok(done)
}

/// Puts the guest into `file`, and ends its process. The file that it came out of is worth nothing any more.
fn suspend(mut guest: Ferry, file: &Path) -> anyhow::Result<()> {
    match std::fs::remove_file(file) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot remove {}", file.display()));
        }
        _ => {}
    }
    let request = MigrateRequest { uri: format!("file:{}", file.display()), ..MigrateRequest::default() };
    let finished = guest.try_migrate(&request, |_| {})?;
    ensure!(
        finished.info.status == MigrationStatus::Completed,
        guest.describe(finished.info.error_desc.as_deref().unwrap_or("not suspended:"))
    );
    guest.quit()
}

/// Reads all of it, which is what a restore would do that had the memory first; milliseconds.
fn read(file: &Path) -> anyhow::Result<f64> {
    let mut open = File::open(file).with_context(|| format!("cannot open {}", file.display()))?;
    let mut buffer = vec![0; READ_BYTES];
    let begun = Instant::now();
    while open.read(&mut buffer).with_context(|| format!("cannot read {}", file.display()))? > 0 {}
    Ok(milliseconds(begun.elapsed()))
}

/// A guest that does nothing, started and ended.
fn boot(stage: &mut Stage, machine: &Machine, kernel: &Path, name: &str) -> anyhow::Result<FerryStart> {
    let mut guest = machine.boot(name, kernel, "mode=idle check=0 report=20")?;
    stage.enter(&guest)?;
    Reader::new().wait_for(&guest, "a first line", |_| true)?;
    let start = start(&mut guest)?;
    guest.quit()?;
    Ok(start)
}

fn start(guest: &mut Ferry) -> anyhow::Result<FerryStart> {
    guest.status()?.start.context("a guest has run, and its process does not say since when")
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Where the time went, in microseconds.
fn parts(start: &FerryStart) -> [(&'static str, u64); 7] {
    let FerryStart {
        total: _,
        first_memory_slot: _,
        process,
        machine,
        file,
        memory,
        devices,
        ownership,
        resume,
    } = *start;
    [
        ("process", process),
        ("machine", machine),
        ("file", file),
        ("memory", memory),
        ("devices", devices),
        ("ownership", ownership),
        ("resume", resume),
    ]
}

/// The first memory slot apart: milliseconds.
fn without_slot(start: &FerryStart) -> f64 {
    start.total.saturating_sub(start.first_memory_slot) as f64 / 1e3
}

impl Row {
    fn new(case: &Case, runs: Vec<Run>) -> Option<Self> {
        let spread = |figure: fn(&Run) -> f64| Spread::of(runs.iter().map(figure));
        let mut figures = BTreeMap::<_, Vec<f64>>::new();
        for (name, time) in runs.iter().flat_map(|run| parts(&run.start)) {
            figures.entry(name).or_default().push(time as f64 / 1e3);
        }
        let part = |(name, figures)| Some((name, Spread::of(figures)?));
        Some(Self {
            memory_bytes: case.memory_bytes,
            filled_bytes: case.filled_bytes(),
            running_milliseconds: spread(|run| without_slot(&run.start))?,
            first_memory_slot_milliseconds: spread(|run| run.start.first_memory_slot as f64 / 1e3)?,
            part_milliseconds: figures.into_iter().filter_map(part).collect(),
            first_line_milliseconds: spread(|run| run.first_line_milliseconds)?,
            boot_milliseconds: spread(|run| without_slot(&run.boot))?,
            read_milliseconds: spread(|run| run.read_milliseconds)?,
            runs,
        })
    }
}

impl fmt::Display for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let slot = self.start.first_memory_slot as f64 / 1e3;
        write!(
            f,
            "runs after {:5.1} ms and {slot:.1} for the first memory slot (",
            without_slot(&self.start)
        )?;
        for (index, (name, time)) in parts(&self.start).into_iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(f, "{comma}{name} {:.1}", time as f64 / 1e3)?;
        }
        write!(
            f,
            "), first line after {:.1} ms, boots after {:.1}, file read in {:.0}",
            self.first_line_milliseconds,
            without_slot(&self.boot),
            self.read_milliseconds
        )
    }
}

impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let memory = display_size(self.memory_bytes);
        writeln!(f, "{memory} of RAM, {} filled", HumanBytes(self.filled_bytes))?;
        writeln!(f, "  {:<46}{:>10}{:>10}{:>10}", "ms", "median", "min", "max")?;
        let mut row = |name: &str, Spread { median, min, max }: &Spread| {
            writeln!(f, "  {name:<46}{median:>10.1}{min:>10.1}{max:>10.1}")
        };
        row("main to the first KVM_RUN, without the slot", &self.running_milliseconds)?;
        row("KVM's first memory slot", &self.first_memory_slot_milliseconds)?;
        let Some(first) = self.runs.first() else { return Ok(()) };
        for (name, _) in parts(&first.start) {
            let Some(part) = self.part_milliseconds.get(name) else { continue };
            row(&format!("  {name}{}", if name == "machine" { ", with the slot" } else { "" }), part)?;
        }
        row("start of the process to the guest's first line", &self.first_line_milliseconds)?;
        row("the same machine booted empty, without the slot", &self.boot_milliseconds)?;
        row("reading all of the file", &self.read_milliseconds)
    }
}

impl fmt::Display for Results {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let runs = self.rows.first().map_or(0, |row| row.runs.len());
        writeln!(f, "{runs} restores of each guest from a file in the mapped layout\n{}", self.host)?;
        self.rows.iter().try_for_each(|row| write!(f, "\n{row}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(devices: u64) -> Run {
        let start =
            FerryStart { total: 7_000 + devices, first_memory_slot: 6_000, devices, ..FerryStart::default() };
        let boot = FerryStart { total: 9_000, first_memory_slot: 6_500, ..FerryStart::default() };
        Run { start, first_line_milliseconds: 40.0, boot, read_milliseconds: 900.0 }
    }

    fn row() -> Row {
        let [case] = Case::all(&Lists { memory_bytes: vec![4 << 30], ..Lists::default() })[..] else {
            panic!("one case")
        };
        assert!(Row::new(&case, Vec::new()).is_none());
        Row::new(&case, [2_000, 1_000, 5_000].map(sample).to_vec()).unwrap()
    }

    #[test]
    fn the_first_memory_slot_is_told_apart() {
        let row = row();
        assert_eq!(row.running_milliseconds, Spread { median: 3.0, min: 2.0, max: 6.0 });
        assert_eq!(row.first_memory_slot_milliseconds.median, 6.0);
        assert_eq!(row.part_milliseconds["devices"], Spread { median: 2.0, min: 1.0, max: 5.0 });
        assert_eq!((row.boot_milliseconds.median, row.read_milliseconds.median), (2.5, 900.0));
    }

    #[test]
    fn results_are_shown_guest_by_guest() {
        let results = Results { host: Host::this(), rows: vec![row()] };
        let text = results.to_string();
        assert!(text.starts_with("3 restores of each guest") && text.contains("4G of RAM, 2.50 GiB filled"));
        let line = |start: &str| text.lines().find(|line| line.trim_start().starts_with(start)).unwrap();
        let words = |start: &str| line(start).split_whitespace().rev().take(3).collect::<Vec<_>>();
        assert_eq!(words("main to"), ["6.0", "2.0", "3.0"]);
        assert_eq!(words("devices"), ["5.0", "1.0", "2.0"]);
        assert_eq!(words("reading"), ["900.0", "900.0", "900.0"]);
        let json = serde_json::to_value(&results).unwrap();
        assert_eq!(json["rows"][0]["running-milliseconds"]["median"], 3.0);
        assert_eq!(json["rows"][0]["runs"][2]["start"]["devices"], 5_000);
    }

    #[test]
    fn a_run_is_one_line() {
        let text = sample(2_000).to_string();
        assert!(
            text.starts_with("runs after   3.0 ms and 6.0 for the first memory slot (process 0.0, machine")
        );
        assert!(text.ends_with("first line after 40.0 ms, boots after 2.5, file read in 900"), "{text}");
        assert!(!text.contains('\n'));
    }

    #[test]
    fn a_guest_that_is_too_small_is_refused() {
        let [plain] = Case::all(&Lists::default())[..] else { panic!("one case") };
        let error = check(&Case { memory_bytes: 16 << 20, ..plain }).unwrap_err().to_string();
        assert!(error.contains("too few"), "{error}");
    }
}
