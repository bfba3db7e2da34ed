//! What the exerciser says about itself.

use exerciser::report::{Counters, DONE, ERROR, Line, PROGRESS};

/// A line of the exerciser that a test looks at.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Finding {
    /// It goes on.
    Progress(Counters),
    /// It has ended.
    Done(Counters),
    /// Something is wrong.
    Error(String),
}

/// Reads a line; `None` for all others, and for the parts of one that was cut by a migration.
#[must_use]
pub fn exerciser_line(text: &str) -> Option<Finding> {
    let line = Line::parse(text);
    match line.kind {
        ERROR => Some(Finding::Error(text.to_owned())),
        PROGRESS => Counters::from_line(&line).map(Finding::Progress),
        DONE => Counters::from_line(&line).map(Finding::Done),
        _ => None,
    }
}
