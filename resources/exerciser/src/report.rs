//! The lines that the exerciser prints, for those who print them and those who read them.
//!
//! A line is a kind and `name=value` fields, separated by one blank; a value with blanks is in double quotes.
//! Readers ignore lines of unknown kinds (firmware prints too) and fields they do not know. README.md lists them.

use core::fmt::{self, Display};

/// Version of the format, in the `boot` line. It changes when a field changes its meaning or goes away.
pub const VERSION: u32 = 1;

/// A line that was read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Line<'a> {
    /// First word.
    pub kind: &'a str,
    fields: &'a str,
}

impl<'a> Line<'a> {
    /// Splits a line. Never fails: what is no line of ours is of a kind that nobody asks for.
    pub fn parse(line: &'a str) -> Self {
        let line = line.trim();
        let (kind, fields) = line.split_once(' ').unwrap_or((line, ""));
        Self { kind, fields }
    }

    /// The fields in order. Stops at the first that is malformed.
    pub fn fields(&self) -> impl Iterator<Item = (&'a str, &'a str)> + use<'a> {
        let mut rest = self.fields;
        core::iter::from_fn(move || {
            let (name, after) = rest.trim_start().split_once('=')?;
            let (value, after) = match after.strip_prefix('"') {
                Some(quoted) => quoted.split_once('"')?,
                None => after.split_once(' ').unwrap_or((after, "")),
            };
            rest = after;
            (!name.contains(' ')).then_some((name, value))
        })
    }

    /// The value of a field.
    pub fn get(&self, name: &str) -> Option<&'a str> {
        self.fields().find(|(field, _)| *field == name).map(|(_, value)| value)
    }

    /// The value of a field that is a decimal or `0x` number.
    pub fn number(&self, name: &str) -> Option<u64> {
        let value = self.get(name)?;
        match value.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16).ok(),
            None => value.parse().ok(),
        }
    }
}

macro_rules! counters {
    ($($(#[$meta:meta])* $name:ident,)*) => {
        /// The fields of `progress` and `done` lines. All but `inflight` and the gap only grow.
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
        pub struct Counters {
            $($(#[$meta])* pub $name: u64,)*
        }

        impl Counters {
            /// Reads a `progress` or `done` line; None for other kinds or when a field is missing.
            pub fn from_line(line: &Line<'_>) -> Option<Self> {
                if !matches!(line.kind, PROGRESS | DONE) {
                    return None;
                }
                Some(Self { $($name: line.number(stringify!($name))?,)* })
            }
        }

        impl Display for Counters {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                let mut blank = "";
                $(
                    write!(f, concat!("{}", stringify!($name), "={}"), blank, self.$name)?;
                    blank = " ";
                )*
                let _ = blank;
                Ok(())
            }
        }
    };
}

/// Kind of the line with the counters so far.
pub const PROGRESS: &str = "progress";
/// The kind of a line with a leaf of CPUID.
pub const CPUID: &str = "cpuid";
/// Kind of the line with the counters at the end.
pub const DONE: &str = "done";
/// Kind of the lines that report a failure. A run without one, that ends with a `done` line, is good.
pub const ERROR: &str = "error";

counters! {
    /// Number of the line, from 0.
    seq,
    /// Reads whose every block was compared and was right.
    verified,
    /// Completed Write and Write Zeroes commands.
    writes,
    /// Completed Read commands.
    reads,
    /// Completed Flush commands.
    flushes,
    /// Commands with the controllers now.
    inflight,
    /// RAM pages compared.
    ram_checked,
    /// RAM pages rewritten.
    ram_dirtied,
    /// Interrupts of every kind.
    interrupts,
    /// `error` lines so far.
    errors,
    /// Microseconds of the largest gap in time since the line before.
    gap_us,
    /// Time stamp counter at the end of that gap.
    gap_tsc,
    /// Nanoseconds of KVM's clock, 0 without one.
    clock_ns,
    /// Time stamp counter now.
    tsc,
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::format;
    use std::vec::Vec;

    #[test]
    fn counters_are_read_as_they_were_printed() {
        let counters = Counters { seq: 3, verified: 1000, inflight: 8, tsc: u64::MAX, ..Counters::default() };
        for kind in [PROGRESS, DONE] {
            let text = format!("{kind} {counters}\r\n");
            assert_eq!(Counters::from_line(&Line::parse(&text)), Some(counters), "{text}");
        }
        assert_eq!(Counters::from_line(&Line::parse(&format!("start {counters}"))), None);
        assert_eq!(Counters::from_line(&Line::parse("progress seq=1")), None);
    }

    #[test]
    fn fields_may_be_quoted_and_hexadecimal() {
        let line = Line::parse("error kind=block address=0x10 reason=\"not what was written\" block=7");
        assert_eq!((line.kind, line.get("kind"), line.number("address")), ("error", Some("block"), Some(16)));
        assert_eq!((line.get("reason"), line.number("block")), (Some("not what was written"), Some(7)));
        assert_eq!((line.get("nothing"), line.number("reason")), (None, None));
    }

    #[test]
    fn other_text_is_no_line_of_ours() {
        for text in ["", " ", "SeaBIOS (version 1.16)", "x = y", "a b=\"c", "=", "boot ==", "é=é é=é"] {
            let line = Line::parse(text);
            assert_eq!(Counters::from_line(&line), None);
            let fields: Vec<_> = line.fields().collect();
            assert!(fields.len() <= 1, "{text}: {fields:?}");
        }
    }
}
