//! The migrations as a table: a line for each case, and where there is one case only, where its downtime went.

use std::fmt;

use indicatif::HumanBytes;

use super::migrate::{Results, Row};
use super::spread::Spread;
use crate::config::display_size;

const MEBIBYTE: f64 = (1 << 20) as f64;

/// A column: what stands above it, in two lines, and how wide it is.
const COLUMNS: [(&str, &str, usize); 17] = [
    ("", "RAM", 6),
    ("filled,", "MiB", 8),
    ("dirtied,", "MiB/s", 9),
    ("of", "asked", 7),
    ("", "over", 7),
    ("chan-", "nels", 6),
    ("queue", "pairs", 7),
    ("name-", "spaces", 7),
    ("downtime,", "ms", 10),
    ("", "min", 7),
    ("", "max", 7),
    ("total,", "ms", 8),
    ("", "MiB/s", 7),
    ("by plain", "copy", 9),
    ("", "rounds", 7),
    ("guest's", "gap, ms", 9),
    ("", "added", 7),
];
/// The last column.
const IN_FLIGHT: (&str, &str, usize) = ("in", "flight", 7);

fn line(f: &mut fmt::Formatter<'_>, cells: impl IntoIterator<Item = String>) -> fmt::Result {
    let columns = COLUMNS.iter().chain(std::iter::once(&IN_FLIGHT));
    let text: String = columns.zip(cells).map(|(&(_, _, width), cell)| format!("{cell:>width$}")).collect();
    writeln!(f, "{}", text.trim_end())
}

fn cells(row: &Row) -> [String; COLUMNS.len() + 1] {
    let dash = || "-".to_owned();
    let mebibytes = |bytes: f64| format!("{:.0}", bytes / MEBIBYTE);
    let Spread { median, min, max } = row.downtime_milliseconds;
    let copied = |figure: String| if row.throughput_ratio.is_some() { figure } else { dash() };
    [
        display_size(row.case.memory_bytes),
        mebibytes(row.filled_bytes as f64),
        mebibytes(row.dirtied_bytes_per_second.median),
        mebibytes(row.case.dirty_bytes_per_second as f64),
        if row.case.tls { "tls" } else { row.case.transport.name() }.to_owned(),
        row.case.channels.map_or_else(dash, |channels| channels.to_string()),
        row.case.queue_pairs.to_string(),
        row.case.namespaces.to_string(),
        format!("{median:.1}"),
        format!("{min:.1}"),
        format!("{max:.1}"),
        format!("{:.0}", row.total_milliseconds.median),
        copied(mebibytes(row.bytes_per_second.median)),
        row.throughput_ratio.map_or_else(dash, |ratio| format!("{:.2}", ratio.median)),
        format!("{:.0}", row.rounds.median),
        format!("{:.1}", row.guest_gap_milliseconds.median),
        format!("{:.1}", row.added_gap_milliseconds.median),
        format!("{:.0}", row.in_flight_at_stop.median),
    ]
}

impl fmt::Display for Results {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let runs = self.rows.first().map_or(0, |row| row.runs.len());
        writeln!(f, "medians of {runs} migrations of a guest with busy NVMe queues\n{}\n", self.host)?;
        let columns = || COLUMNS.iter().chain(std::iter::once(&IN_FLIGHT));
        line(f, columns().map(|(above, _, _)| (*above).to_owned()))?;
        line(f, columns().map(|(_, below, _)| (*below).to_owned()))?;
        self.rows.iter().try_for_each(|row| line(f, cells(row)))?;
        if let [row] = self.rows.as_slice() {
            write!(f, "\n{row}")?;
        }
        if !self.differences.is_empty() {
            writeln!(f)?;
        }
        self.differences.iter().try_for_each(|difference| writeln!(f, "{difference}"))?;
        let verified: u64 = self.rows.iter().map(|row| row.verified).sum();
        writeln!(f, "\n{verified} verified I/Os, no error")
    }
}

/// All spreads of a case.
impl fmt::Display for Row {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}, {} filled", self.case, HumanBytes(self.filled_bytes))?;
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
        row("  added by the move", &self.added_gap_milliseconds, 1.0, 1)?;
        row("time of the migration, ms", &self.total_milliseconds, 1.0, 0)?;
        row("vCPUs and devices, KiB", &self.device_bytes, 1024_f64.recip(), 1)?;
        if let (Some(copy), Some(ratio)) = (&self.copy_bytes_per_second, &self.throughput_ratio) {
            row("throughput, MiB/s", &self.bytes_per_second, MEBIBYTE.recip(), 0)?;
            row("  of a plain copy", copy, MEBIBYTE.recip(), 0)?;
            row("  the one by the other", ratio, 1.0, 2)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bench::case::{Case, Lists, Transport};
    use crate::bench::difference::differences;
    use crate::bench::host::Host;
    use crate::bench::migrate::Run;
    use crate::bench::migrate::tests::sample;

    fn results(transports: &[Transport]) -> Results {
        let lists = Lists {
            memory_bytes: vec![4 << 30],
            dirty_bytes_per_second: vec![100 << 20],
            channels: vec![2],
            transports: transports.to_vec(),
            ..Lists::default()
        };
        results_of(&lists)
    }

    fn results_of(lists: &Lists) -> Results {
        let rows = Case::all(lists).into_iter().map(|case| {
            let copied = |run: Run| Run {
                copy_bytes_per_second: run.copy_bytes_per_second.filter(|_| case.channels.is_some()),
                ..run
            };
            let runs = [9_000, 5_000, 30_000].map(sample).map(copied).to_vec();
            Row::new(&case, runs, 4321).unwrap()
        });
        let rows: Vec<Row> = rows.collect();
        Results { differences: differences(&rows), rows, host: Host::this() }
    }

    fn words(text: &str, start: &str) -> Vec<String> {
        let line = text.lines().find(|line| line.trim_start().starts_with(start));
        let line = line.unwrap_or_else(|| panic!("no line {start:?} in {text}"));
        line.trim_start()[start.len()..].split_whitespace().map(str::to_owned).collect()
    }

    #[test]
    fn a_table_has_a_line_for_each_case() {
        let text = results(&[Transport::Tcp, Transport::Local]).to_string();
        assert!(text.starts_with("medians of 3 migrations"), "{text}");
        let lines: Vec<&str> = text.lines().filter(|line| line.trim_start().starts_with("4G")).collect();
        let split = |line: &str| line.split_whitespace().collect::<Vec<_>>().join(" ");
        assert_eq!(split(lines[0]), "4G 2560 90 100 tcp 2 1 1 9.0 5.0 30.0 500 1024 0.50 2 9.1 9.0 3");
        assert_eq!(split(lines[1]), "4G 2560 90 100 local - 1 1 9.0 5.0 30.0 500 - - 2 9.1 9.0 3");
        assert_eq!(lines.len(), 2);
        let heads = text.lines().find(|line| line.contains("rounds")).unwrap();
        assert!(lines.iter().all(|line| line.len() == heads.len()), "{text}");
        assert!(text.ends_with("\n8642 verified I/Os, no error\n") && !text.contains("hand-over"), "{text}");
    }

    #[test]
    fn a_single_case_is_shown_in_its_parts() {
        let text = results(&[Transport::Tcp]).to_string();
        assert_eq!(words(&text, "downtime, ms"), ["9.0", "5.0", "30.0"]);
        assert_eq!(words(&text, "hand-over"), ["9.0", "5.0", "30.0"]);
        assert_eq!(words(&text, "resume"), ["0.0", "0.0", "0.0"]);
        assert_eq!(words(&text, "vCPUs and devices, KiB"), ["12.0", "12.0", "12.0"]);
        assert_eq!(words(&text, "throughput, MiB/s"), ["1024", "1024", "1024"]);
        assert_eq!(words(&text, "the one by the other"), ["0.50", "0.50", "0.50"]);
        let text = results(&[Transport::Local]).to_string();
        assert!(text.contains("over a Unix socket, handed over") && !text.contains("throughput"), "{text}");
    }

    #[test]
    fn what_tls_and_controllers_cost_stands_below_the_table() {
        let lists = Lists {
            transports: vec![Transport::Tcp],
            namespaces: vec![1, 256],
            tls: true,
            ..Lists::default()
        };
        let text = results_of(&lists).to_string();
        let lines: Vec<&str> = text.lines().filter(|line| line.contains("adds")).collect();
        assert_eq!(lines.len(), 4, "{text}");
        assert!(lines[0].contains("TLS adds 0.00 ms") && lines[1].contains("that controller adds 0.00 ms"));
        assert!(text.lines().any(|line| line.contains("  tls ") && line.contains(" 256 ")), "{text}");
    }

    #[test]
    fn json_has_every_figure_of_every_case() {
        let value = serde_json::to_value(results(&[Transport::Unix, Transport::Local])).unwrap();
        let [row, local] = value["rows"].as_array().unwrap().as_slice() else { panic!("{value}") };
        assert_eq!(row["memory-bytes"], 4_u64 << 30);
        assert_eq!(row["filled-bytes"], 5_u64 << 29);
        assert_eq!((&row["transport"], &row["channels"]), (&"unix".into(), &2.into()));
        assert_eq!(row["dirty-bytes-per-second"], 100 << 20);
        assert_eq!(row["downtime-milliseconds"]["median"], 9.0);
        assert_eq!(row["part-milliseconds"]["hand-over"]["max"], 30.0);
        for name in [
            "guest-gap-milliseconds",
            "other-gap-milliseconds",
            "added-gap-milliseconds",
            "total-milliseconds",
            "bytes-per-second",
            "copy-bytes-per-second",
            "throughput-ratio",
            "device-bytes",
            "rounds",
            "in-flight-at-stop",
            "dirtied-bytes-per-second",
        ] {
            assert!(row[name]["median"].is_number(), "{name} in {row}");
        }
        assert_eq!(row["runs"].as_array().unwrap().len(), 3);
        assert!(local["channels"].is_null() && local["throughput-ratio"].is_null(), "{local}");
        assert!(value["host"]["cores"].is_number());
        assert_eq!(
            (&row["queue-pairs"], &row["namespaces"], &row["tls"]),
            (&1.into(), &1.into(), &false.into())
        );
        let value = serde_json::to_value(results_of(&Lists { queue_pairs: vec![1, 64], ..Lists::default() }));
        let difference = &value.unwrap()["differences"][0];
        assert_eq!((&difference["in-what"], &difference["queue-pairs"]), (&"controller".into(), &64.into()));
        assert_eq!(difference["part-milliseconds"]["hand-over"], 0.0);
    }
}
