//! What the exerciser says on a console.

use std::time::Duration;

use anyhow::{bail, ensure};
use exerciser::report::{Counters, DONE, ERROR, Line};

use super::Process;

/// How long the exerciser may take for whatever it is waited for, on a busy host.
pub const WATCHDOG: Duration = Duration::from_secs(120);

/// The image that this program was built with.
pub const IMAGE: &[u8] = include_bytes!(env!("FERRY_EXERCISER"));

/// A look at the lines of one console, from its beginning on.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reader {
    next: usize,
}

impl Reader {
    /// From the first line on.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Waits for counters, of a `progress` or the `done` line, that `accept` takes.
    ///
    /// # Errors
    /// The exerciser reported an error, or its process ended, or they did not come; with the end of console and log.
    pub fn wait_for(
        &mut self,
        process: &Process,
        what: &str,
        mut accept: impl FnMut(&Counters) -> bool,
    ) -> anyhow::Result<Counters> {
        self.wait(process, what, |line| Counters::from_line(&line).filter(|counters| accept(counters)))
    }

    /// Waits until at least `count` I/Os have been verified.
    ///
    /// # Errors
    /// As [`Self::wait_for`].
    pub fn wait_for_verified(&mut self, process: &Process, count: u64) -> anyhow::Result<Counters> {
        self.wait_for(process, &format!("{count} verified I/Os"), |counters| counters.verified >= count)
    }

    /// Types `q` and waits for the end of the run: the counters of its last line, which shows no error.
    ///
    /// # Errors
    /// As [`Self::wait_for`], or the last line counts errors.
    pub fn finish(&mut self, process: &mut Process) -> anyhow::Result<Counters> {
        process.type_in("q")?;
        self.wait_for_done(process)
    }

    /// Waits for the end of a run that ends by itself: the counters of its last line, which shows no error.
    ///
    /// # Errors
    /// As [`Self::finish`].
    pub fn wait_for_done(&mut self, process: &Process) -> anyhow::Result<Counters> {
        let done = self.wait(process, "the end of the run", |line| {
            (line.kind == DONE).then(|| Counters::from_line(&line)).flatten()
        })?;
        ensure!(done.errors == 0, process.describe(&format!("{} errors in the run of", done.errors)));
        Ok(done)
    }

    fn wait<T>(
        &mut self,
        process: &Process,
        what: &str,
        mut select: impl FnMut(Line<'_>) -> Option<T>,
    ) -> anyhow::Result<T> {
        let (found, next) = process.wait_for_line(what, self.next, WATCHDOG, |text| {
            let line = Line::parse(text);
            if line.kind == ERROR { Some(None) } else { select(line).map(Some) }
        })?;
        self.next = next;
        match found {
            Some(found) => Ok(found),
            None => bail!(process.describe("the guest reported an error:")),
        }
    }
}

/// All counters that a console has shown so far, in order.
#[must_use]
pub fn history(process: &Process) -> Vec<Counters> {
    process.console.all().iter().filter_map(|line| Counters::from_line(&Line::parse(line))).collect()
}

/// The time that the guest did not see pass, by its own clock, when it moved: microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Gap {
    /// The largest gap in the time stamp counter between the last line of the source and the first of the destination.
    pub largest: u64,
    /// The largest gap in any line before: what the host does to a guest that does not move.
    pub before: u64,
    /// What the move added.
    pub added: u64,
}

impl Gap {
    /// From the lines `before` the move and the first line `after` it.
    #[must_use]
    pub fn new(before: &[Counters], after: &Counters) -> Self {
        let (largest, before) = (after.gap_us, before.iter().map(|line| line.gap_us).max().unwrap_or(0));
        Self { largest, before, added: largest.saturating_sub(before) }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn guest(lines: &str) -> Process {
        Process::spawn("guest", Path::new("/bin/echo"), [lines]).unwrap()
    }

    fn counters(verified: u64, errors: u64) -> Counters {
        Counters { verified, errors, ..Counters::default() }
    }

    #[test]
    fn counters_are_found_in_order() {
        let (few, many) = (counters(10, 0), counters(2000, 0));
        let process = guest(&format!("rogress seq=1\nprogress {few}\nprogress {many}\ndone {many}"));
        let mut reader = Reader::new();
        assert_eq!(reader.wait_for_verified(&process, 1000).unwrap(), many);
        assert_eq!(reader.wait_for_done(&process).unwrap(), many);
        assert_eq!(history(&process), [few, many, many]);
        let error = reader.wait_for_done(&process).unwrap_err().to_string();
        assert!(error.contains("waited"), "{error}");
    }

    #[test]
    fn the_gap_of_a_move_is_what_it_adds() {
        let line = |gap_us| Counters { gap_us, ..Counters::default() };
        let gap = Gap::new(&[line(200), line(900), line(300)], &line(15_000));
        assert_eq!(gap, Gap { largest: 15_000, before: 900, added: 14_100 });
        assert_eq!(Gap::new(&[line(2_000)], &line(1_500)).added, 0);
        assert_eq!(Gap::new(&[], &line(7)).added, 7);
    }

    #[test]
    fn an_error_of_the_guest_ends_the_wait() {
        let process = guest(&format!("error kind=block\nprogress {}", counters(2000, 1)));
        let error = Reader::new().wait_for_verified(&process, 1000).unwrap_err().to_string();
        assert!(error.contains("reported an error") && error.contains("kind=block"), "{error}");
        let process = guest(&format!("done {}", counters(2000, 1)));
        assert!(Reader::new().wait_for_done(&process).unwrap_err().to_string().contains("1 errors"));
    }
}
