//! `ferry bench`.

use clap::{Args, Subcommand};

use crate::bench::migrate::{self, Plan, Transport};
use crate::config;
use crate::drive::Stage;

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
}

/// How often, and which guest. Its help stands at [`Benchmark::Migrate`].
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  ferry bench migrate
  ferry bench migrate --memory 4G --runs 5 --transport tcp
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

impl BenchArguments {
    /// Measures.
    ///
    /// # Errors
    /// Something went wrong; with what the processes wrote last.
    pub fn execute(&self) -> anyhow::Result<()> {
        match &self.benchmark {
            Benchmark::Migrate(benchmark) => benchmark.execute(),
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
