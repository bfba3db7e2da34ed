//! When to stop the guest: a pure function.
//!
//! Rounds go on while they pay: each sends what the guest dirtied during the one before. Once the rest fits into the
//! downtime limit, further rounds are still made as long as each at least halves the rest; so the stop is as short as
//! the guest's behaviour allows, at the cost of a few short rounds. Where the rest never fits, the rounds go on until the
//! user raises the limit, cancels, or the configured number of rounds is used up.

use std::time::Duration;

/// What is known after a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Situation {
    /// Rounds completed, the first (all memory) included.
    pub rounds: u32,
    /// What the guest dirtied during the last round: what another round or the stop must send, in bytes.
    pub remaining_bytes: u64,
    /// The same after the round before.
    pub previous_remaining_bytes: u64,
    /// How fast guest memory goes when nothing limits it, in bytes of guest memory a second: the unit of what remains.
    pub bytes_per_second: u64,
    /// How long the guest may stand still.
    pub downtime_limit: Duration,
    /// The part of the stop that does not depend on RAM: stopping, device state, the switch.
    pub fixed_cost: Duration,
    /// After how many rounds without convergence to give up; `None`: never.
    pub rounds_limit: Option<u32>,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Send the rest while the guest runs.
    AnotherRound,
    /// Stop the guest and send the rest.
    Stop,
    /// It does not converge, and the user did not want to wait for ever.
    GiveUp,
}

/// How little is not worth another round: the round itself (taking the bitmaps, protecting the pages again) costs the
/// guest more.
const SMALL_BYTES: u64 = 512 << 10;

impl Situation {
    /// How long the guest would stand still if it were stopped now.
    #[must_use]
    pub fn expected_downtime(&self) -> Duration {
        let seconds = self.remaining_bytes as f64 / self.bytes_per_second.max(1) as f64;
        // A link that hardly moves would overflow the type; a day is as good as never.
        self.fixed_cost + Duration::from_secs_f64(seconds.min(86_400.0))
    }
}

/// Decides what follows on a round.
#[must_use]
pub fn converge(situation: &Situation) -> Decision {
    if situation.remaining_bytes == 0 {
        return Decision::Stop;
    }
    if situation.expected_downtime() <= situation.downtime_limit {
        let pays = situation.remaining_bytes > SMALL_BYTES
            && situation.remaining_bytes <= situation.previous_remaining_bytes / 2;
        return if pays { Decision::AnotherRound } else { Decision::Stop };
    }
    match situation.rounds_limit {
        Some(limit) if situation.rounds >= limit => Decision::GiveUp,
        _ => Decision::AnotherRound,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn situation(previous_remaining_bytes: u64, remaining_bytes: u64) -> Situation {
        Situation {
            rounds: 2,
            remaining_bytes,
            previous_remaining_bytes,
            bytes_per_second: 1000 * MIB,
            downtime_limit: Duration::from_millis(300),
            fixed_cost: Duration::from_millis(5),
            rounds_limit: None,
        }
    }

    #[test]
    fn an_idle_guest_is_stopped_at_once() {
        assert_eq!(converge(&situation(1024 * MIB, 0)), Decision::Stop);
        assert_eq!(converge(&situation(1024 * MIB, MIB / 4)), Decision::Stop);
    }

    #[test]
    fn rounds_that_halve_the_rest_go_on_below_the_limit() {
        assert_eq!(converge(&situation(1024 * MIB, 200 * MIB)), Decision::AnotherRound);
        assert_eq!(converge(&situation(200 * MIB, 100 * MIB)), Decision::AnotherRound);
        assert_eq!(converge(&situation(100 * MIB, 60 * MIB)), Decision::Stop);
    }

    #[test]
    fn above_the_limit_it_never_stops() {
        assert_eq!(converge(&situation(400 * MIB, 296 * MIB)), Decision::AnotherRound);
        assert_eq!(converge(&situation(400 * MIB, 295 * MIB)), Decision::Stop, "the limit itself is allowed");
        let strict = Situation { downtime_limit: Duration::from_millis(4), ..situation(MIB, MIB / 4) };
        assert_eq!(converge(&strict), Decision::AnotherRound, "the fixed cost alone exceeds the limit");
        let dead = Situation { bytes_per_second: 0, ..situation(MIB, MIB) };
        assert_eq!(converge(&dead), Decision::AnotherRound);
    }

    #[test]
    fn it_gives_up_only_as_configured() {
        let hot = Situation { rounds: 30, rounds_limit: Some(30), ..situation(900 * MIB, 900 * MIB) };
        assert_eq!(converge(&hot), Decision::GiveUp);
        assert_eq!(converge(&Situation { rounds: 29, ..hot }), Decision::AnotherRound);
        assert_eq!(converge(&Situation { rounds_limit: None, ..hot }), Decision::AnotherRound);
        let just_fits = Situation { remaining_bytes: 10 * MIB, previous_remaining_bytes: 10 * MIB, ..hot };
        assert_eq!(converge(&just_fits), Decision::Stop);
    }
}
