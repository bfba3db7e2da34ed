//! What commands say on standard output, and beside it on standard error.

use std::fmt::Display;
use std::io::{self, Write};

use anyhow::Context;

/// Writes words. What a command did is done, whoever reads them: one who has seen enough is no failure.
///
/// # Errors
/// They cannot be written.
pub(super) fn write(words: impl Display) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    let written = write!(out, "{words}").and_then(|()| out.flush());
    unless_closed(written.context("cannot write to standard output"))
}

/// The same result, but for one that says that nobody reads standard output any more.
///
/// # Errors
/// Every other.
pub(super) fn unless_closed(result: anyhow::Result<()>) -> anyhow::Result<()> {
    let is_pipe = |error: &anyhow::Error| {
        error.chain().any(|cause| {
            let io = cause.downcast_ref::<io::Error>().map(io::Error::kind);
            let json = cause.downcast_ref::<serde_json::Error>().and_then(serde_json::Error::io_error_kind);
            io.or(json) == Some(io::ErrorKind::BrokenPipe)
        })
    };
    match result {
        Err(error) if is_pipe(&error) => Ok(()),
        result => result,
    }
}

/// Writes a line, as `println!` does: see [`write()`].
macro_rules! say {
    ($($words:tt)+) => {
        $crate::cli::output::write(format_args!("{}\n", format_args!($($words)+)))
    };
}
pub(super) use say;

/// A line on standard error, for people: if nobody reads there, nobody misses it.
macro_rules! tell {
    ($($words:tt)+) => {{
        let _nobody_reads_it = std::io::Write::write_fmt(
            &mut std::io::stderr(),
            format_args!("{}\n", format_args!($($words)+)),
        );
    }};
}
pub(super) use tell;
