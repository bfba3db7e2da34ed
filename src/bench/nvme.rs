//! Commands a second that a guest gets done: the exerciser reads 4 KiB at random places, always with as many in flight.
//!
//! Every sample is a virtual machine of its own: what a guest finds on a busy host differs from boot to boot more than within one. The
//! first window warms up, the second counts, by the guest's time stamp counter and by the host's clock. On a file, each sample is followed
//! by one of fio's io_uring, so that what the host does meets both.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use exerciser::report::{ERROR, Line};
use rustix::fs::OFlags;
use serde::Serialize;

use super::costs::{self, Costs, Counted};
use super::fio::Fio;
use super::host::Host;
use super::spread::Spread;
use crate::drive::exerciser::{IMAGE, Reader, WATCHDOG};
use crate::drive::{Ferry, Stage};

/// Bytes of the file, and of each namespace that are read.
const SPAN_BYTES: usize = 256 << 20;

/// What to measure.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Samples of each case, from 1.
    pub runs: u32,
    /// Length of a sample.
    pub window: Duration,
    /// The value of `--io-poll`.
    pub io_poll: String,
    /// Where the file is made, if not in a temporary folder.
    pub folder: Option<PathBuf>,
}

/// What is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Image {
    /// Zeroes from nowhere.
    Null,
    /// A file, around the page cache.
    DirectFile,
    /// A file that is in the page cache.
    CachedFile,
}

/// How the guest rings.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Doorbells {
    /// Register writes.
    Mmio,
    /// In memory.
    Shadow,
}

/// One line of the results.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Case {
    /// What is read.
    pub image: Image,
    /// How the guest rings.
    pub doorbells: Doorbells,
    /// I/O queue pairs.
    pub queues: u16,
    /// Commands in flight, over all queues.
    pub depth: u32,
}

/// One sample.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Sample {
    /// Commands a second by the guest's time stamp counter.
    pub iops: f64,
    /// The same by the host's clock.
    pub wall_clock_iops: f64,
    /// Half of the commands that were timed, one at a time, took no longer than this.
    pub latency_median_microseconds: f64,
    /// 99 of a hundred took no longer than this.
    pub latency_99th_microseconds: f64,
    /// What a thousand commands cost besides.
    pub per_thousand: Costs,
    /// fio's rate on the same file just afterwards.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fio_iops: Option<f64>,
}

/// All samples of a case.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Outcome {
    /// Of what.
    #[serde(flatten)]
    pub case: Case,
    /// Commands a second by the guest's time stamp counter.
    pub iops: Spread,
    /// The same by the host's clock.
    pub wall_clock_iops: Spread,
    /// Mean time of a command, by the depth and the median rate.
    pub latency_mean_microseconds: f64,
    /// Medians of commands that the guest timed: from the entry in the queue until it saw the completion.
    pub latency_median_microseconds: Spread,
    /// What 99 of a hundred of them did not exceed.
    pub latency_99th_microseconds: Spread,
    /// What a thousand commands cost besides.
    pub per_thousand: Costs<Spread>,
    /// fio's rates.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fio_iops: Option<Spread>,
    /// The guest's rates by fio's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fio_ratio: Option<Spread>,
    /// One by one.
    pub samples: Vec<Sample>,
}

/// All cases.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Results {
    /// Where it was measured.
    pub host: Host,
    /// Which fio, if there is one.
    pub fio: Option<String>,
    /// The value of `--io-poll`.
    pub io_poll: String,
    /// One by one.
    pub cases: Vec<Outcome>,
}

/// The cases: all ways to ring at all depths without a disk, and files as a guest with shadow doorbells reads them.
#[must_use]
pub fn cases() -> Vec<Case> {
    let mut cases = Vec::new();
    for doorbells in [Doorbells::Mmio, Doorbells::Shadow] {
        for queues in [1, 4] {
            cases.extend([1, 32, 128].map(|depth| Case { image: Image::Null, doorbells, queues, depth }));
        }
    }
    for image in [Image::DirectFile, Image::CachedFile] {
        cases.extend([32, 128].map(|depth| Case { image, doorbells: Doorbells::Shadow, queues: 1, depth }));
    }
    cases
}

/// Measures all `cases`; `progress` sees each outcome.
///
/// # Errors
/// A process failed or the guest found an error; the folder cannot hold the file, or not go around the page cache.
pub fn run(
    stage: &mut Stage,
    plan: &Plan,
    cases: &[Case],
    mut progress: impl FnMut(&Outcome),
) -> anyhow::Result<Results> {
    ensure!(plan.runs > 0, "no runs: nothing to measure");
    let kernel = stage.folder().join("exerciser.elf");
    std::fs::write(&kernel, IMAGE).context("cannot write the guest's image")?;
    let folder = tempfile::Builder::new()
        .prefix("ferry-bench-")
        .tempdir_in(plan.folder.as_deref().unwrap_or(stage.folder()))
        .context("cannot make a folder for the file")?;
    let file = folder.path().join("disk.img");
    if cases.iter().any(|case| case.image != Image::Null) {
        make_file(&file)?;
    }
    let fio = Fio::find();
    let mut outcomes = Vec::new();
    for &case in cases {
        let mut samples = Vec::new();
        for _ in 0..plan.runs {
            samples.push(sample(stage, plan, case, &kernel, &file, fio.as_ref())?);
        }
        let outcome = Outcome::new(case, samples).context("there are no samples")?;
        progress(&outcome);
        outcomes.push(outcome);
    }
    let fio = fio.map(|fio| fio.version);
    Ok(Results { host: Host::this(), fio, io_poll: plan.io_poll.clone(), cases: outcomes })
}

/// Writes and reads the file, so that it has blocks and is in the page cache.
fn make_file(path: &Path) -> anyhow::Result<()> {
    let fill = || {
        let mut file = File::create_new(path)?;
        let mut chunk = vec![0x5a; 1 << 20];
        for number in 0..SPAN_BYTES / chunk.len() {
            chunk[..8].copy_from_slice(&number.to_le_bytes());
            file.write_all(&chunk)?;
        }
        file.sync_all()?;
        std::io::copy(&mut File::open(path)?.take(u64::MAX), &mut std::io::sink())
    };
    fill().with_context(|| format!("cannot make {}", path.display()))?;
    let flags = OFlags::DIRECT.bits() as i32;
    OpenOptions::new()
        .read(true)
        .custom_flags(flags)
        .open(path)
        .map(drop)
        .with_context(|| format!("no direct I/O on {}: name a folder of another file system", path.display()))
}

/// Boots a guest for one sample, and lets fio read the same file.
fn sample(
    stage: &mut Stage,
    plan: &Plan,
    case: Case,
    kernel: &Path,
    file: &Path,
    fio: Option<&Fio>,
) -> anyhow::Result<Sample> {
    let file_name = file.display();
    let backend = match case.image {
        Image::Null => format!("backend=null,size={SPAN_BYTES}"),
        Image::DirectFile => format!("backend=file,path={file_name}"),
        Image::CachedFile => format!("backend=file,path={file_name},buffered"),
    };
    let machine = stage.machine([
        "--memory".to_owned(),
        "256M".to_owned(),
        "--nvme".to_owned(),
        "serial=bench,queues=8".to_owned(),
        "--ns".to_owned(),
        format!("controller=bench,nsid=1,{backend}"),
        "--io-poll".to_owned(),
        plan.io_poll.clone(),
    ]);
    let words = format!(
        "mode=iops queues={} depth=256 inflight={} doorbells={} span={SPAN_BYTES} report={}",
        case.queues,
        case.depth,
        case.doorbells.word(),
        plan.window.as_millis()
    );
    let mut ferry = machine.boot("bench", kernel, &words)?;
    stage.enter(&ferry)?;
    let mut from = 0;
    rate_line(&ferry, &mut from)?;
    let (begun, before) = (Instant::now(), counters(&mut ferry)?);
    let Rate { iops, reads, median_ns, last_ns } = rate_line(&ferry, &mut from)?;
    let (time, after) = (begun.elapsed(), counters(&mut ferry)?);
    Reader::new().finish(&mut ferry)?;
    ferry.wait_for_end()?;
    ensure!(reads > 0.0, ferry.describe("no reads in the second window of"));
    let fio_iops = match fio {
        Some(fio) if case.image != Image::Null => {
            Some(fio.read_rate(file, case.image == Image::DirectFile, case.depth, plan.window)?)
        }
        _ => None,
    };
    Ok(Sample {
        iops,
        wall_clock_iops: reads / time.as_secs_f64(),
        latency_median_microseconds: median_ns / 1000.0,
        latency_99th_microseconds: last_ns / 1000.0,
        per_thousand: after.costs_since(&before),
        fio_iops,
    })
}

/// What the guest says of a window.
#[derive(Clone, Copy, Debug)]
struct Rate {
    iops: f64,
    reads: f64,
    median_ns: f64,
    last_ns: f64,
}

impl Rate {
    fn of(line: &Line<'_>) -> Option<Self> {
        let number = |name| line.number(name).map(|number| number as f64);
        Some(Self {
            iops: number("iops")?,
            reads: number("reads")?,
            median_ns: number("latency_50_ns")?,
            last_ns: number("latency_99_ns")?,
        })
    }
}

/// The next line with a rate.
fn rate_line(ferry: &Ferry, from: &mut usize) -> anyhow::Result<Rate> {
    let (found, next) = ferry.wait_for_line("a rate", *from, WATCHDOG, |text| {
        let line = Line::parse(text);
        match line.kind {
            "rate" => Some(Rate::of(&line)),
            ERROR => Some(None),
            _ => None,
        }
    })?;
    *from = next;
    found.with_context(|| ferry.describe("the guest reported an error:"))
}

fn counters(ferry: &mut Ferry) -> anyhow::Result<Counted> {
    Counted::of(&ferry.status()?).context("the machine has no disk")
}

impl Doorbells {
    /// As the exerciser's command line has it.
    fn word(self) -> &'static str {
        match self {
            Self::Mmio => "mmio",
            Self::Shadow => "shadow",
        }
    }
}

impl Outcome {
    fn new(case: Case, samples: Vec<Sample>) -> Option<Self> {
        let spread = |figure: fn(&Sample) -> f64| Spread::of(samples.iter().map(figure));
        let iops = spread(|sample| sample.iops)?;
        Some(Self {
            case,
            iops,
            wall_clock_iops: spread(|sample| sample.wall_clock_iops)?,
            latency_mean_microseconds: f64::from(case.depth) * 1e6 / iops.median.max(1.0),
            latency_median_microseconds: spread(|sample| sample.latency_median_microseconds)?,
            latency_99th_microseconds: spread(|sample| sample.latency_99th_microseconds)?,
            per_thousand: Costs::of(samples.iter().map(|sample| sample.per_thousand))?,
            fio_iops: Spread::of(samples.iter().filter_map(|sample| sample.fio_iops)),
            fio_ratio: Spread::of(samples.iter().filter_map(|sample| Some(sample.iops / sample.fio_iops?))),
            samples,
        })
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let image = match self.image {
            Image::Null => "null",
            Image::DirectFile => "O_DIRECT",
            Image::CachedFile => "page cache",
        };
        write!(f, "{image:<11}{:<8}{:>7}{:>7}", self.doorbells.word(), self.queues, self.depth)
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Spread { median, min, max } = self.iops;
        write!(
            f,
            "{}{median:>12.0}{min:>10.0}{max:>10.0}{:>12.0}{:>9.1}{:>9.1}{}",
            self.case,
            self.wall_clock_iops.median,
            self.latency_median_microseconds.median,
            self.latency_99th_microseconds.median,
            self.per_thousand
        )?;
        match (self.fio_iops, self.fio_ratio) {
            (Some(iops), Some(ratio)) => write!(f, "{:>10.0}{:>8.2}", iops.median, ratio.median),
            _ => Ok(()),
        }
    }
}

/// The heads of the columns that an [`Outcome`] is printed in; those of [`Costs`] are of a thousand commands.
#[must_use]
pub fn heads() -> String {
    let times =
        "image      rings    queues  depth IOPS median       min       max  wall clock   p50 us   p99 us";
    format!("{times}{}       fio   ratio", costs::HEADS)
}

impl fmt::Display for Results {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let fio = self.fio.as_deref().unwrap_or("no fio");
        writeln!(
            f,
            "4 KiB reads of a guest, --io-poll {}, {fio}\n{}\nexits to interrupts: of a thousand commands\n\n{}",
            self.io_poll,
            self.host,
            heads()
        )?;
        self.cases.iter().try_for_each(|outcome| writeln!(f, "{outcome}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample(iops: f64, fio_iops: Option<f64>) -> Sample {
        Sample {
            iops,
            wall_clock_iops: iops - 1.0,
            latency_median_microseconds: 2.0,
            latency_99th_microseconds: 9.0,
            per_thousand: Costs { vcpu_exits: 2.0, ..Costs::default() },
            fio_iops,
        }
    }

    #[test]
    fn outcomes_sum_up_their_samples() {
        let case = Case { image: Image::DirectFile, doorbells: Doorbells::Shadow, queues: 1, depth: 32 };
        assert!(Outcome::new(case, Vec::new()).is_none());
        let samples = [(90.0, 100.0), (50.0, 100.0), (100.0, 80.0)];
        let samples = samples.map(|(iops, fio)| sample(iops, Some(fio))).to_vec();
        let outcome = Outcome::new(case, samples).unwrap();
        assert_eq!(outcome.iops, Spread { median: 90.0, min: 50.0, max: 100.0 });
        assert_eq!(outcome.fio_ratio, Some(Spread { median: 0.9, min: 0.5, max: 1.25 }));
        assert_eq!(outcome.latency_mean_microseconds, 32.0 * 1e6 / 90.0);
        let text = outcome.to_string();
        assert!(text.starts_with("O_DIRECT   shadow        1     32          90"), "{text}");
        assert!(text.ends_with("100    0.90"), "{text}");
        let heads = heads();
        assert_eq!(text.len(), heads.len(), "{text}\n{heads}");
    }

    #[test]
    fn a_case_without_a_file_has_no_reference() {
        let case = Case { image: Image::Null, doorbells: Doorbells::Mmio, queues: 4, depth: 1 };
        let outcome = Outcome::new(case, vec![sample(10.0, None)]).unwrap();
        assert_eq!((outcome.fio_iops, outcome.fio_ratio), (None, None));
        let json = serde_json::to_value(&outcome).unwrap();
        assert_eq!((&json["image"], &json["doorbells"]), (&"null".into(), &"mmio".into()));
        assert!(json.get("fio-ratio").is_none());
    }

    #[test]
    fn every_way_to_ring_is_measured_at_every_depth() {
        let cases = cases();
        let null = cases.iter().filter(|case| case.image == Image::Null).count();
        assert_eq!((cases.len(), null), (16, 12));
        assert!(cases.iter().all(|case| case.image == Image::Null || case.doorbells == Doorbells::Shadow));
    }
}
