//! `ferry bench`.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::anyhow;
use clap::{Args, Subcommand};

use crate::bench::migrate::{self, Plan, Transport};
use crate::bench::nvme;
use crate::config;
use crate::drive::Stage;
use crate::io_poll::IoPoll;

/// What to measure. Its help stands at [`super::Command::Bench`].
#[derive(Clone, Debug, Args)]
pub struct BenchArguments {
    /// What to measure.
    #[command(subcommand)]
    pub benchmark: Benchmark,
}

/// The benchmarks.
#[derive(Clone, Debug, Subcommand)]
pub enum Benchmark {
    /// Migrate a guest with a busy NVMe queue and filled RAM, again and again.
    ///
    /// One guest moves from process to process; each run says how long the guest stood still (by the host's clock, which
    /// is split into its parts, and by the guest's own), how long the whole migration took, and how its throughput
    /// compares with a plain copy of as many bytes through a Unix socket pair. The guest verifies its disk all the time, and
    /// disk and RAM at the end. Needs memory for the guest four times over.
    Migrate(MigrateBenchmark),
    /// Count the NVMe commands that a guest gets done each second.
    ///
    /// A test guest reads 4 KiB at random places: without a disk at all depths, queue counts and both ways to ring, and from a file, around
    /// the page cache and out of it, beside fio's io_uring on the same file at the same depth where fio is installed. On a host that others
    /// use, give it a real-time priority: chrt --rr 20 ferry bench nvme.
    ///
    /// Besides the rates it tells how long commands took, as the guest timed them, and how often a thousand of them left the guest (exits
    /// to the process, doorbells that KVM took), entered io_uring, woke a thread and interrupted the guest. A guest that is looked after
    /// without sleep does next to none of that, apart from what it prints: each byte on its console is an exit.
    Nvme(NvmeBenchmark),
}

/// How often, and which guest. Its help stands at [`Benchmark::Migrate`].
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  ferry bench migrate
  ferry bench migrate --memory 4G --runs 5 --transport tcp
  ferry bench migrate --memory 8G --transport local
  ferry bench migrate --json | jq .\"downtime-milliseconds\".median")]
pub struct MigrateBenchmark {
    /// Number of migrations.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub runs: u32,
    /// The guest's RAM, for example 512M or 3G.
    #[arg(long, value_name = "SIZE", default_value = "1G", value_parser = config::parse_size)]
    pub memory: u64,
    /// What connects the two processes.
    #[arg(long, value_enum, default_value_t)]
    pub transport: Transport,
    /// Print the results in JSON.
    #[arg(long)]
    pub json: bool,
}

/// How often, and how long. Its help stands at [`Benchmark::Nvme`].
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  ferry bench nvme
  ferry bench nvme --only file --folder /var/tmp --runs 9
  ferry bench nvme --json | jq '.cases[] | select(.image == \"null\") | .iops.median'")]
pub struct NvmeBenchmark {
    /// Samples of each case.
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub runs: u32,
    /// Milliseconds of a sample.
    #[arg(long, value_name = "MS", default_value_t = 500, value_parser = clap::value_parser!(u64).range(50..=60_000))]
    pub window: u64,
    /// What the I/O thread is started with, as ferry run takes it.
    #[arg(long, value_name = "MICROSECONDS|off", default_value = "50")]
    pub io_poll: String,
    /// Only the cases without a disk, or only those with a file.
    #[arg(long, value_enum)]
    pub only: Option<Part>,
    /// Where to make the file of 256 MiB [default: a temporary folder].
    #[arg(long, value_name = "PATH")]
    pub folder: Option<PathBuf>,
    /// Print the results in JSON.
    #[arg(long)]
    pub json: bool,
}

/// Some of the cases.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Part {
    /// Those without a disk.
    Null,
    /// Those with a file.
    File,
}

impl BenchArguments {
    /// Measures.
    ///
    /// # Errors
    /// Something went wrong; with what the processes wrote last.
    pub fn execute(&self) -> anyhow::Result<()> {
        match &self.benchmark {
            Benchmark::Migrate(benchmark) => benchmark.execute(),
            Benchmark::Nvme(benchmark) => benchmark.execute(),
        }
    }
}

impl MigrateBenchmark {
    fn execute(&self) -> anyhow::Result<()> {
        let Self { runs, memory: memory_bytes, transport, json } = *self;
        let mut stage = Stage::open()?;
        let mut number = 0;
        let result = migrate::run(&mut stage, &Plan { runs, memory_bytes, transport }, |run| {
            number += 1;
            eprintln!("{number:3}: {run}");
        });
        let results = stage.close(false, result)?;
        if json {
            println!("{}", serde_json::to_string(&results)?);
        } else {
            print!("\n{results}");
        }
        Ok(())
    }
}

impl NvmeBenchmark {
    fn execute(&self) -> anyhow::Result<()> {
        let Self { runs, window, io_poll, only, folder, json } = self.clone();
        io_poll.parse::<IoPoll>().map_err(|reason| anyhow!("--io-poll {io_poll}: {reason}"))?;
        let mut cases = nvme::cases();
        if let Some(part) = only {
            cases.retain(|case| (case.image == nvme::Image::Null) == (part == Part::Null));
        }
        let plan = nvme::Plan { runs, window: Duration::from_millis(window), io_poll, folder };
        let mut stage = Stage::open()?;
        eprintln!("{}", nvme::heads());
        let result = nvme::run(&mut stage, &plan, &cases, |outcome| eprintln!("{outcome}"));
        let results = stage.close(false, result)?;
        if json {
            println!("{}", serde_json::to_string(&results)?);
        } else {
            print!("\n{results}");
        }
        Ok(())
    }
}
