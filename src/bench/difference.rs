//! What one thing costs a migration: two rows that differ in it alone.

use std::collections::BTreeMap;
use std::fmt;

use serde::Serialize;

use super::case::Case;
use super::migrate::Row;
use super::spread::Spread;

/// A row beside the one that it is compared with: medians of the one less those of the other.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Difference {
    /// The row.
    #[serde(flatten)]
    pub case: Case,
    /// In what it differs.
    pub in_what: What,
    /// Milliseconds that the downtime is longer.
    pub downtime_milliseconds: f64,
    /// The same of each of its parts.
    pub part_milliseconds: BTreeMap<&'static str, f64>,
    /// Throughput by that of the other row.
    pub throughput_ratio: f64,
}

/// What two rows can differ in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum What {
    /// Queue pairs and namespaces: the other row has the first that were asked for.
    Controller,
    /// TLS, which the other row is without.
    Tls,
}

/// Each row beside the first that is like it but for its controller, and beside the one that is like it but for TLS.
#[must_use]
pub fn differences(rows: &[Row]) -> Vec<Difference> {
    let mut found = Vec::new();
    for (index, row) in rows.iter().enumerate() {
        let Case { queue_pairs, namespaces, .. } = row.case;
        let like = |other: &&Row| Case { queue_pairs, namespaces, ..other.case } == row.case;
        if let Some(first) = rows[..index].iter().find(like) {
            found.push(Difference::new(What::Controller, row, first));
        }
        let plain = |other: &&Row| row.case.tls && Case { tls: true, ..other.case } == row.case;
        if let Some(plain) = rows[..index].iter().find(plain) {
            found.push(Difference::new(What::Tls, row, plain));
        }
    }
    found
}

impl Difference {
    fn new(in_what: What, row: &Row, other: &Row) -> Self {
        let parts = row.part_milliseconds.iter();
        let part = |(name, spread): (&&'static str, &Spread)| {
            Some((*name, spread.median - other.part_milliseconds.get(name)?.median))
        };
        Self {
            case: row.case,
            in_what,
            downtime_milliseconds: row.downtime_milliseconds.median - other.downtime_milliseconds.median,
            part_milliseconds: parts.filter_map(part).collect(),
            throughput_ratio: row.bytes_per_second.median / other.bytes_per_second.median,
        }
    }
}

impl fmt::Display for Difference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: ", self.case)?;
        match self.in_what {
            What::Controller => f.write_str("that controller")?,
            What::Tls => f.write_str("TLS")?,
        }
        write!(f, " adds {:.2} ms to the downtime", self.downtime_milliseconds)?;
        let mut parts: Vec<_> =
            self.part_milliseconds.iter().filter(|(_, time)| time.abs() >= 0.05).collect();
        parts.sort_by(|(_, one), (_, other)| other.abs().total_cmp(&one.abs()));
        let parts: Vec<_> = parts.into_iter().map(|(name, time)| format!("{name} {time:+.2}")).collect();
        if !parts.is_empty() {
            write!(f, " ({})", parts.join(", "))?;
        }
        match self.in_what {
            What::Controller => Ok(()),
            What::Tls => write!(f, "; throughput {:.2} of that without", self.throughput_ratio),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::case::{Lists, Transport};
    use super::super::migrate::tests::sample;
    use super::*;

    fn rows(lists: &Lists) -> Vec<Row> {
        let row = |(index, case): (u64, Case)| Row::new(&case, vec![sample(1000 * (index + 1))], 1).unwrap();
        (0..).zip(Case::all(lists)).map(row).collect()
    }

    #[test]
    fn controllers_are_compared_with_the_first_of_the_same_machine() {
        let lists = Lists {
            queue_pairs: vec![1, 64],
            namespaces: vec![1, 256],
            channels: vec![1, 2],
            ..Lists::default()
        };
        let found = differences(&rows(&lists));
        let text: Vec<String> = found.iter().map(Difference::to_string).collect();
        assert_eq!(found.iter().filter(|found| found.in_what == What::Controller).count(), 6);
        assert_eq!(
            text[2],
            "1G of RAM, dirties 0/s, over a Unix socket, channels: 1, queue pairs: 64, namespaces: 256: that controller adds 3.00 ms to \
             the downtime (hand-over +3.00)"
        );
        assert!(text[3].contains("channels: 2") && text[3].contains("adds 1.00 ms"), "{}", text[3]);
        assert_eq!(found.len(), 6);
    }

    #[test]
    fn tls_is_compared_with_none() {
        let lists =
            Lists { transports: vec![Transport::Unix, Transport::Tcp], tls: true, ..Lists::default() };
        let found = differences(&rows(&lists));
        let [tls] = found.as_slice() else { panic!("{found:?}") };
        assert_eq!((tls.in_what, tls.downtime_milliseconds, tls.throughput_ratio), (What::Tls, 1.0, 1.0));
        assert!(tls.to_string().ends_with("; throughput 1.00 of that without"), "{tls}");
        assert!(differences(&rows(&Lists::default())).is_empty());
    }
}
