//! `ferry bench`.

use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, anyhow, ensure};
use clap::{Args, Subcommand};

use super::output::{say, tell, write};
use crate::bench::case::{Case, Lists, NAMESPACES_MAX, QUEUE_PAIRS_MAX, Transport};
use crate::bench::migrate::{self, Plan};
use crate::bench::{copy, nvme, restore};
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
    /// For each combination of the lists one guest moves from process to process; each run says how long the guest stood still (by the
    /// host's clock, which is split into its parts, and by the guest's own), how long the whole migration took, and how its throughput
    /// compares with a plain copy of as many bytes, in writes of 1 MiB, to another process through a socket of the same kind. The guest
    /// verifies its disk all the time, and disk and RAM at the end. It fills its RAM up to 2.5 GiB, and more stays unpopulated; the table
    /// says how much is filled, and how much the guest found time to dirty. Needs memory for what is filled four times over.
    ///
    /// A guest that dirties more than goes is stopped after a minute all the same, which its downtime shows. On a host that others use,
    /// give it a real-time priority: chrt --rr 20 ferry bench migrate.
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
    /// Restore a guest from a file, again and again.
    ///
    /// A guest fills its RAM (up to 2.5 GiB; more stays unpopulated) and is suspended into a file in the mapped layout. Then a process of
    /// its own restores it. It tells the time from main() to the first KVM_RUN, KVM's first memory slot apart, since that is the host's
    /// and costs the same whatever the guest is; and the parts of it. Seen from outside is how long it takes until the guest says its
    /// first line, a fiftieth of a second after the last one by its clock. Beside it a process boots an empty guest of the same
    /// machine, and the file is read as a whole. Then the guest is suspended once more. Needs memory for what is filled twice over,
    /// with the file in the page cache.
    Restore(RestoreBenchmark),
    /// Take what a plain copy brings over standard input, a socket.
    #[command(hide = true)]
    Receive {
        /// How many bytes.
        bytes: u64,
    },
}

/// How often, and which guest. Its help stands at [`Benchmark::Migrate`].
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  ferry bench migrate
  ferry bench migrate --runs 5 --memory 256M,1G,4G,8G --dirty 0,100M,500M --channels 1,2 --transport unix,tcp,local
  ferry bench migrate --memory 8G --transport local
  ferry bench migrate --queues 1,64 --namespaces 1,256
  ferry bench migrate --transport tcp --tls-dir /etc/ferry
  ferry bench migrate --json | jq '.rows[] | [.\"memory-bytes\", .\"downtime-milliseconds\".median]'")]
pub struct MigrateBenchmark {
    /// Number of migrations of each guest.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub runs: u32,
    /// The guest's RAM, for example 512M or 3G.
    #[arg(long, value_name = "SIZE,..", default_value = "1G", value_delimiter = ',', value_parser = config::parse_size)]
    pub memory: Vec<u64>,
    /// What the guest rewrites of its RAM each second, for example 100M; it may not find time for more than some hundred.
    #[arg(long, value_name = "SIZE,..", default_value = "0", value_delimiter = ',', value_parser = config::parse_size)]
    pub dirty: Vec<u64>,
    /// Connections for guest memory beside that for everything else: 1 to 64, or 0 to send all over one.
    #[arg(long, value_name = "N,..", default_values_t = [engine::CHANNELS_DEFAULT], value_delimiter = ',', value_parser = clap::value_parser!(u16).range(0..=i64::from(engine::CHANNELS_MAX)))]
    pub channels: Vec<u16>,
    /// What connects the two processes.
    #[arg(long, value_enum, default_value = "unix", value_delimiter = ',')]
    pub transport: Vec<Transport>,
    /// I/O queue pairs that the guest uses in turn, with eight commands in flight in all.
    #[arg(long, value_name = "N,..", default_value = "1", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..=i64::from(QUEUE_PAIRS_MAX)))]
    pub queues: Vec<u16>,
    /// Namespaces of the controller, with holes between them. Beside the first, which is a file, of five one is a file, one null, and
    /// three are memory; the guest keeps all busy that can be written to. What a controller adds to the downtime of the first one is
    /// printed below the table.
    #[arg(long, value_name = "N,..", default_value = "1", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..=i64::from(NAMESPACES_MAX)))]
    pub namespaces: Vec<u32>,
    /// Measure TCP with TLS 1.3 too, with ca.pem, cert.pem and key.pem of this folder for both sides: cert.pem has to be valid for
    /// 127.0.0.1. What TLS costs is printed below the table.
    #[arg(long, value_name = "DIR")]
    pub tls_dir: Option<PathBuf>,
    /// Print the results in JSON.
    #[arg(long)]
    pub json: bool,
}

/// How often, and which guests. Its help stands at [`Benchmark::Restore`].
#[derive(Clone, Debug, Args)]
#[command(after_help = "\
Examples:
  ferry bench restore
  ferry bench restore --memory 256M,1G,4G,8G --runs 20
  ferry bench restore --memory 4G --json | jq '.rows[0].\"running-milliseconds\".median'")]
pub struct RestoreBenchmark {
    /// Number of restores of each guest.
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub runs: u32,
    /// The guest's RAM, for example 512M or 3G.
    #[arg(long, value_name = "SIZE,..", default_value = "4G", value_delimiter = ',', value_parser = config::parse_size)]
    pub memory: Vec<u64>,
    /// Where to make the file [default: a temporary folder].
    #[arg(long, value_name = "PATH")]
    pub folder: Option<PathBuf>,
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
            Benchmark::Restore(benchmark) => benchmark.execute(),
            Benchmark::Receive { bytes } => {
                let link = std::io::stdin().as_fd().try_clone_to_owned().context("no standard input")?;
                copy::receive(link, *bytes)
            }
        }
    }
}

impl MigrateBenchmark {
    fn execute(&self) -> anyhow::Result<()> {
        let Self { runs, memory, dirty, channels, transport, queues, namespaces, tls_dir, json } =
            self.clone();
        ensure!(
            tls_dir.is_none() || transport.contains(&Transport::Tcp),
            "--tls-dir: what goes over TLS is TCP: add --transport tcp"
        );
        let lists = Lists {
            memory_bytes: memory,
            dirty_bytes_per_second: dirty,
            channels,
            transports: transport,
            queue_pairs: queues,
            namespaces,
            tls: tls_dir.is_some(),
        };
        let tls_dir = tls_dir.map(|folder| std::path::absolute(&folder)).transpose()?;
        let plan = Plan { runs, cases: Case::all(&lists), tls_dir };
        let mut stage = Stage::open()?;
        let mut number = 0;
        let result = migrate::run(&mut stage, &plan, |case, run| match run {
            None => {
                number = 0;
                tell!("{case}");
            }
            Some(run) => {
                number += 1;
                tell!("{number:3}: {run}");
            }
        });
        let results = stage.close(false, result)?;
        if json {
            say!("{}", serde_json::to_string(&results)?)?;
        } else {
            write(format_args!("\n{results}"))?;
        }
        Ok(())
    }
}

impl RestoreBenchmark {
    fn execute(&self) -> anyhow::Result<()> {
        let Self { runs, memory, folder, json } = self.clone();
        let folder = folder.map(|folder| std::path::absolute(&folder)).transpose()?;
        let plan = restore::Plan { runs, memory_bytes: memory, folder };
        let mut stage = Stage::open()?;
        let mut number = 0;
        let result = restore::run(&mut stage, &plan, |guest, run| match run {
            None => {
                number = 0;
                tell!("{guest}");
            }
            Some(run) => {
                number += 1;
                tell!("{number:3}: {run}");
            }
        });
        let results = stage.close(false, result)?;
        if json {
            say!("{}", serde_json::to_string(&results)?)?;
        } else {
            write(format_args!("\n{results}"))?;
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
        tell!("{}", nvme::heads());
        let result = nvme::run(&mut stage, &plan, &cases, |outcome| tell!("{outcome}"));
        let results = stage.close(false, result)?;
        if json {
            say!("{}", serde_json::to_string(&results)?)?;
        } else {
            write(format_args!("\n{results}"))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::cli::{Arguments, Command};

    fn parse(words: &str) -> Result<MigrateBenchmark, String> {
        let words = "ferry bench migrate ".to_owned() + words;
        let arguments =
            Arguments::try_parse_from(words.split_whitespace()).map_err(|error| error.to_string())?;
        match arguments.command {
            Command::Bench(BenchArguments { benchmark: Benchmark::Migrate(benchmark) }) => Ok(benchmark),
            other => Err(format!("{other:?}")),
        }
    }

    #[test]
    fn what_to_migrate_is_given_in_lists() {
        let small = parse("").unwrap();
        assert_eq!((small.memory, small.dirty, small.channels), (vec![1 << 30], vec![0], vec![2]));
        assert_eq!((small.transport, small.runs), (vec![Transport::Unix], 10));
        let large =
            parse("--memory 256M,1G,4G,8G --dirty 0,100M --channels 1,2 --transport unix,tcp,local").unwrap();
        assert_eq!(large.memory, [256 << 20, 1 << 30, 4 << 30, 8 << 30]);
        assert_eq!((large.dirty, large.channels), (vec![0, 100 << 20], vec![1, 2]));
        assert_eq!(large.transport, [Transport::Unix, Transport::Tcp, Transport::Local]);
        assert_eq!((small.queues, small.namespaces, small.tls_dir), (vec![1], vec![1], None));
        let many = parse("--queues 1,64 --namespaces 1,256 --tls-dir keys --transport tcp").unwrap();
        assert_eq!((many.queues, many.namespaces), (vec![1, 64], vec![1, 256]));
        assert_eq!(many.tls_dir, Some("keys".into()));
    }

    #[test]
    fn tls_is_measured_over_tcp_only() {
        let error = parse("--tls-dir keys").unwrap().execute().unwrap_err().to_string();
        assert!(error.contains("--transport tcp"), "{error}");
    }

    #[test]
    fn a_bad_word_in_a_list_is_named() {
        for (words, named) in [
            ("--memory 1G,much", "much"),
            ("--dirty 1G,", "--dirty"),
            ("--channels 1,65", "65"),
            ("--transport unix,pigeon", "pigeon"),
            ("--queues 0", "--queues"),
            ("--namespaces 1,257", "257"),
        ] {
            let error = parse(words).unwrap_err();
            assert!(error.contains(named), "{words}: {error}");
        }
    }
}
