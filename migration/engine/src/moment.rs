//! When something happened, for two processes of one host: their monotonic clock is the same.
//!
//! The answer that the guest runs is on its way for a while, and both processes have to be woken for it. So the destination says when
//! that was, and the source need not guess it from the arrival of the word.

use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use vmstate::VmState;

use crate::Description;

/// Names the host in a [`Description`], where it is told.
pub const HOST: &str = "identity.host";

/// A moment by the monotonic clock of the host (`CLOCK_MONOTONIC`), which is also that of [`Instant`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, VmState)]
#[vmstate(name = "running/moment", version = 1)]
pub struct Moment {
    /// Nanoseconds since the clock began.
    pub monotonic_ns: u64,
}

impl Moment {
    /// When `instant` was. `None`: it is older than the clock.
    #[must_use]
    pub fn of(instant: Instant) -> Option<Self> {
        let now = clock_gettime(ClockId::Monotonic);
        let now = Duration::try_from(now).ok()?;
        let then = now.checked_sub(instant.elapsed())?;
        Some(Self { monotonic_ns: u64::try_from(then.as_nanos()).ok()? })
    }

    /// How long after `start` it was. `None` for what a peer says that cannot be: it was before, or is still to come.
    #[must_use]
    pub fn since(self, start: Instant) -> Option<Duration> {
        let passed = Duration::from_nanos(self.monotonic_ns.checked_sub(Self::of(start)?.monotonic_ns)?);
        (passed <= start.elapsed()).then_some(passed)
    }
}

/// Whether two machines say that they are on one host.
#[must_use]
pub fn is_same_host(one: &Description, other: &Description) -> bool {
    one.get(HOST).is_some_and(|host| other.get(HOST) == Some(host))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn a_moment_is_told_from_a_start_before_it_and_none_that_cannot_be() {
        let start = Instant::now().checked_sub(10 * SECOND).unwrap();
        let moment = Moment::of(start + 4 * SECOND).unwrap();
        let passed = moment.since(start).unwrap();
        // Clock and instant are read one after the other.
        assert!(passed.abs_diff(4 * SECOND) < SECOND, "{passed:?}");
        assert_eq!(moment.since(Instant::now()), None, "before the start");
        let later = Moment { monotonic_ns: moment.monotonic_ns + 3_600_000_000_000 };
        assert_eq!(later.since(start), None, "still to come");
        assert_eq!(Moment { monotonic_ns: u64::MAX }.since(start), None);
        assert_eq!(Moment { monotonic_ns: 0 }.since(start), None);
    }

    #[test]
    fn hosts_are_the_same_that_say_so() {
        let told = |host: &str| {
            let mut description = Description::new();
            description.set(HOST, host);
            description
        };
        assert!(is_same_host(&told("a"), &told("a")));
        assert!(!is_same_host(&told("a"), &told("b")));
        assert!(!is_same_host(&Description::new(), &Description::new()));
    }
}
