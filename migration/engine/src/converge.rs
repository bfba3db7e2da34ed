//! When to stop the guest: a pure function.
//!
//! Rounds go on while they pay: each sends what the guest dirtied during the one before. Once the rest fits into the
//! downtime limit, further rounds are still made as long as each at least halves the rest; so the stop is as short as
//! the guest's behaviour allows, at the cost of a few short rounds.
//!
//! Where the rest never fits, the guest dirties its memory as fast as the link takes it. With auto-converge its vCPUs are then
//! slowed down, step by step, until it fits. Otherwise, or where even that does not do, the rounds go on until the user raises the
//! limit or cancels, or until the rounds or the time that the user allowed are used up: then the migration is given up, or the
//! guest stopped whatever that costs, or moved ahead of its memory.

use std::time::Duration;

/// What the user wants done about a guest that dirties its memory faster than the link takes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Convergence {
    /// How many rounds may be made; `None`: as many as it takes.
    pub max_rounds: Option<u32>,
    /// How long the migration may take until the guest is stopped; `None`: as long as it takes.
    pub timeout: Option<Duration>,
    /// What follows when either is used up and the rest does not fit into the downtime limit.
    pub on_timeout: OnTimeout,
    /// Whether the vCPUs are slowed down.
    pub auto_converge: bool,
    /// How.
    pub throttle: ThrottleSteps,
}

/// What becomes of a migration that has used up its rounds or its time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnTimeout {
    /// It fails, and the guest runs on where it is.
    #[default]
    Cancel,
    /// The guest is stopped and moves, whatever downtime that costs.
    Force,
    /// The guest moves, and the rest of its memory follows.
    Postcopy,
}

/// Whether the guest may go ahead of its memory, and when that is wished.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Following {
    /// The two sides have not agreed on it, or it is wished for the end of time only ([`OnTimeout::Postcopy`]).
    Unasked,
    /// As soon as the rest does not fit into the downtime limit.
    WhereTheRestIsLong,
    /// Now.
    Now,
}

/// How vCPUs are slowed down, in percent of their time. The defaults are QEMU's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThrottleSteps {
    /// The first step.
    pub initial: u8,
    /// Each further one.
    pub increment: u8,
    /// The most that is taken from them, at most [`ThrottleSteps::MOST`].
    pub max: u8,
    /// A step is made when the guest dirties more than this part of what is sent meanwhile, in percent.
    pub trigger: u8,
}

impl ThrottleSteps {
    /// A guest that has no time at all cannot be slowed down, only stopped.
    pub const MOST: u8 = 99;

    /// What follows on `percent`, if the guest can be slowed down further.
    fn after(&self, percent: u8) -> Option<u8> {
        let next = if percent == 0 { self.initial } else { percent.saturating_add(self.increment) };
        let next = next.min(self.max).min(Self::MOST);
        (next > percent).then_some(next)
    }
}

impl Default for ThrottleSteps {
    fn default() -> Self {
        Self { initial: 20, increment: 10, max: 99, trigger: 50 }
    }
}

impl Default for Convergence {
    /// Rounds and time without limit, and vCPUs that are left alone.
    fn default() -> Self {
        Self {
            max_rounds: None,
            timeout: None,
            on_timeout: OnTimeout::default(),
            auto_converge: false,
            throttle: ThrottleSteps::default(),
        }
    }
}

impl Convergence {
    /// Whether the time is over.
    #[must_use]
    pub fn is_out_of_time(&self, elapsed: Duration) -> bool {
        self.timeout.is_some_and(|timeout| elapsed >= timeout)
    }

    fn is_used_up(&self, rounds: u32, elapsed: Duration) -> bool {
        self.max_rounds.is_some_and(|most| rounds >= most) || self.is_out_of_time(elapsed)
    }
}

/// What is known after a round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Situation {
    /// Rounds completed, the first (all memory) included.
    pub rounds: u32,
    /// Since the migration began.
    pub elapsed: Duration,
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
    /// What the vCPUs are slowed down by now, in percent.
    pub throttle_percent: u8,
    /// What the latest rounds have shown, if they went on for long enough to show something.
    pub trend: Option<Trend>,
    /// What the user wants.
    pub convergence: Convergence,
    /// Of memory that comes after the guest.
    pub following: Following,
}

/// How the guest and the link compare, over one or several rounds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Trend {
    /// Guest memory that was sent.
    pub sent_bytes: u64,
    /// Guest memory that was dirtied meanwhile.
    pub dirtied_bytes: u64,
}

impl Trend {
    fn exceeds(self, percent: u8) -> bool {
        u128::from(self.dirtied_bytes) * 100 > u128::from(self.sent_bytes) * u128::from(percent)
    }
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Decision {
    /// Send the rest while the guest runs.
    AnotherRound,
    /// The same, with vCPUs that are slowed down.
    Throttle {
        /// By this much of their time.
        percent: u8,
    },
    /// Stop the guest and send the rest.
    Stop,
    /// Let the guest go, and send the rest after it.
    Postcopy,
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

    /// Whether the guest is to be slowed down more, or by no more than the user now allows.
    fn throttle(&self) -> Option<u8> {
        let Convergence { auto_converge, throttle, .. } = &self.convergence;
        if !auto_converge {
            return None;
        }
        if self.throttle_percent > throttle.max {
            return Some(throttle.max);
        }
        let fast = self.trend.is_some_and(|trend| trend.exceeds(throttle.trigger));
        // The first round sends what nobody has touched for long, and shows nothing of those to come.
        if fast && self.rounds > 1 { throttle.after(self.throttle_percent) } else { None }
    }
}

/// Decides what follows on a round.
#[must_use]
pub fn converge(situation: &Situation) -> Decision {
    let Situation { rounds, elapsed, remaining_bytes, previous_remaining_bytes, convergence, .. } =
        *situation;
    let fits = situation.expected_downtime() <= situation.downtime_limit;
    match situation.following {
        Following::Now => return Decision::Postcopy,
        // What can be sent in the stop needs no guest that waits for its memory.
        Following::WhereTheRestIsLong if !fits && remaining_bytes > 0 => return Decision::Postcopy,
        Following::WhereTheRestIsLong | Following::Unasked => {}
    }
    if remaining_bytes == 0 {
        return Decision::Stop;
    }
    let used_up = convergence.is_used_up(rounds, elapsed);
    if fits {
        let pays =
            !used_up && remaining_bytes > SMALL_BYTES && remaining_bytes <= previous_remaining_bytes / 2;
        return if pays { Decision::AnotherRound } else { Decision::Stop };
    }
    if used_up {
        return match convergence.on_timeout {
            OnTimeout::Cancel => Decision::GiveUp,
            OnTimeout::Force => Decision::Stop,
            OnTimeout::Postcopy => Decision::Postcopy,
        };
    }
    situation.throttle().map_or(Decision::AnotherRound, |percent| Decision::Throttle { percent })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn situation(previous_remaining_bytes: u64, remaining_bytes: u64) -> Situation {
        Situation {
            rounds: 2,
            elapsed: Duration::from_secs(10),
            remaining_bytes,
            previous_remaining_bytes,
            bytes_per_second: 1000 * MIB,
            downtime_limit: Duration::from_millis(300),
            fixed_cost: Duration::from_millis(5),
            throttle_percent: 0,
            trend: Some(Trend { sent_bytes: previous_remaining_bytes, dirtied_bytes: remaining_bytes }),
            convergence: Convergence::default(),
            following: Following::Unasked,
        }
    }

    /// A guest that dirties as much as is sent, and a user who lets rounds or time end.
    fn hot(convergence: Convergence) -> Situation {
        Situation { rounds: 30, convergence, ..situation(900 * MIB, 900 * MIB) }
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
    fn it_ends_only_as_configured() {
        let minute = Some(Duration::from_secs(60));
        let rounds = Convergence { max_rounds: Some(30), ..Convergence::default() };
        let time = Convergence { timeout: minute, ..Convergence::default() };
        let ways = [
            (OnTimeout::Cancel, Decision::GiveUp),
            (OnTimeout::Force, Decision::Stop),
            (OnTimeout::Postcopy, Decision::Postcopy),
        ];
        for (on_timeout, decision) in ways {
            let by_rounds = hot(Convergence { on_timeout, ..rounds });
            assert_eq!(converge(&by_rounds), decision);
            assert_eq!(converge(&Situation { rounds: 29, ..by_rounds }), Decision::AnotherRound);
            let by_time = hot(Convergence { on_timeout, ..time });
            assert_eq!(converge(&by_time), Decision::AnotherRound);
            assert_eq!(converge(&Situation { elapsed: Duration::from_secs(60), ..by_time }), decision);
            assert_eq!(
                converge(&hot(Convergence { on_timeout, ..Convergence::default() })),
                Decision::AnotherRound
            );
            let fits = Situation { remaining_bytes: 10 * MIB, ..by_rounds };
            assert_eq!(converge(&fits), Decision::Stop, "what fits moves, and makes no more rounds");
        }
    }

    #[test]
    fn a_guest_goes_ahead_of_its_memory_when_that_is_wished() {
        let short = situation(400 * MIB, 100 * MIB);
        let auto = Convergence { auto_converge: true, ..Convergence::default() };
        let long = Situation { throttle_percent: 20, ..hot(auto) };
        let used_up = hot(Convergence { max_rounds: Some(1), ..Convergence::default() });
        let strict = Situation { downtime_limit: Duration::from_millis(4), ..situation(MIB, 0) };
        for (situation, otherwise) in [
            (short, Decision::AnotherRound),
            (long, Decision::Throttle { percent: 30 }),
            (used_up, Decision::GiveUp),
            // The fixed cost alone exceeds the limit, and nothing could follow.
            (strict, Decision::Stop),
        ] {
            let with = |following| converge(&Situation { following, ..situation });
            assert_eq!(with(Following::Unasked), otherwise);
            assert_eq!(with(Following::Now), Decision::Postcopy);
            let is_long =
                situation.remaining_bytes > 0 && situation.expected_downtime() > situation.downtime_limit;
            let expected = if is_long { Decision::Postcopy } else { otherwise };
            assert_eq!(with(Following::WhereTheRestIsLong), expected, "{situation:?}");
        }
    }

    #[test]
    fn vcpus_are_slowed_down_step_by_step() {
        let throttle = ThrottleSteps { initial: 30, increment: 25, max: 90, trigger: 50 };
        let wish = Convergence { auto_converge: true, throttle, ..Convergence::default() };
        let mut percent = 0;
        for expected in [30, 55, 80, 90] {
            let situation = Situation { throttle_percent: percent, ..hot(wish) };
            assert_eq!(converge(&situation), Decision::Throttle { percent: expected });
            percent = expected;
        }
        let most = Situation { throttle_percent: 90, ..hot(wish) };
        assert_eq!(converge(&most), Decision::AnotherRound, "there is no more");
        let lowered = ThrottleSteps { max: 40, ..throttle };
        let lowered = Situation { convergence: Convergence { throttle: lowered, ..wish }, ..most };
        assert_eq!(converge(&lowered), Decision::Throttle { percent: 40 }, "the user allows less by now");

        let left_alone = Convergence { auto_converge: false, ..wish };
        assert_eq!(converge(&hot(left_alone)), Decision::AnotherRound);
        assert_eq!(converge(&Situation { rounds: 1, ..hot(wish) }), Decision::AnotherRound);
        assert_eq!(
            converge(&Situation { trend: None, ..hot(wish) }),
            Decision::AnotherRound,
            "too early to say"
        );
        let half = Trend { sent_bytes: 900 * MIB, dirtied_bytes: 450 * MIB };
        assert_eq!(converge(&Situation { trend: Some(half), ..hot(wish) }), Decision::AnotherRound);
        let more = Trend { dirtied_bytes: half.dirtied_bytes + 1, ..half };
        assert_eq!(
            converge(&Situation { trend: Some(more), ..hot(wish) }),
            Decision::Throttle { percent: 30 }
        );
        let over = Convergence { max_rounds: Some(30), ..wish };
        assert_eq!(converge(&hot(over)), Decision::GiveUp, "what is used up comes first");
    }

    mod properties {
        use proptest::prelude::*;

        use super::*;

        fn convergence() -> impl Strategy<Value = Convergence> {
            let ways = vec![OnTimeout::Cancel, OnTimeout::Force, OnTimeout::Postcopy];
            let steps = (1..=99_u8, 1..=99_u8, 1..=99_u8, 1..=100_u8);
            (
                prop::option::of(1..50_u32),
                prop::option::of((0..100_u64).prop_map(Duration::from_secs)),
                prop::sample::select(ways),
                any::<bool>(),
                steps,
            )
                .prop_map(
                    |(max_rounds, timeout, on_timeout, auto_converge, (initial, increment, max, trigger))| {
                        let throttle = ThrottleSteps { initial, increment, max, trigger };
                        Convergence { max_rounds, timeout, on_timeout, auto_converge, throttle }
                    },
                )
        }

        prop_compose! {
            fn any_situation()(
                rounds in 1..60_u32,
                seconds in 0..120_u64,
                remaining_bytes in 0..4096 * MIB,
                previous_remaining_bytes in 0..4096 * MIB,
                bytes_per_second in 0..4096 * MIB,
                downtime_ms in 0..3000_u64,
                throttle_percent in 0..=99_u8,
                trend in prop::option::of((0..4096 * MIB, 0..4096 * MIB)),
                convergence in convergence(),
            ) -> Situation {
                let trend = trend.map(|(sent_bytes, dirtied_bytes)| Trend { sent_bytes, dirtied_bytes });
                Situation {
                    rounds,
                    elapsed: Duration::from_secs(seconds),
                    remaining_bytes,
                    previous_remaining_bytes,
                    bytes_per_second,
                    downtime_limit: Duration::from_millis(downtime_ms),
                    fixed_cost: Duration::from_millis(5),
                    throttle_percent,
                    trend,
                    convergence,
                    following: Following::Unasked,
                }
            }
        }

        proptest! {
            #[test]
            fn what_fits_moves_and_what_does_not_is_stopped_only_by_force(situation in any_situation()) {
                let decision = converge(&situation);
                let fits = situation.remaining_bytes == 0
                    || situation.expected_downtime() <= situation.downtime_limit;
                let Convergence { on_timeout, .. } = situation.convergence;
                let used_up = situation.convergence.is_used_up(situation.rounds, situation.elapsed);
                let allowed = match (fits, used_up) {
                    (true, true) => decision == Decision::Stop,
                    (true, false) => matches!(decision, Decision::Stop | Decision::AnotherRound),
                    (false, true) => decision == match on_timeout {
                        OnTimeout::Cancel => Decision::GiveUp,
                        OnTimeout::Force => Decision::Stop,
                        OnTimeout::Postcopy => Decision::Postcopy,
                    },
                    (false, false) => matches!(decision, Decision::AnotherRound | Decision::Throttle { .. }),
                };
                prop_assert!(allowed, "{decision:?}");
            }

            /// More downtime, a faster link: a stop stays a stop.
            #[test]
            fn a_user_who_allows_more_is_not_served_later(
                situation in any_situation(), more_ms in 0..3000_u64, faster in 0..4096 * MIB,
            ) {
                let better = Situation {
                    downtime_limit: situation.downtime_limit + Duration::from_millis(more_ms),
                    bytes_per_second: situation.bytes_per_second + faster,
                    ..situation
                };
                let (before, after) = (converge(&situation), converge(&better));
                prop_assert!(before != Decision::Stop || after == Decision::Stop, "{before:?} {after:?}");
            }

            /// Rounds and time go on: an end stays an end, and comes at the latest with the limit.
            #[test]
            fn an_end_stays_one(situation in any_situation(), rounds in 0..60_u32, seconds in 0..120_u64) {
                let later = Situation {
                    rounds: situation.rounds + rounds,
                    elapsed: situation.elapsed + Duration::from_secs(seconds),
                    ..situation
                };
                let goes_on = |decision| matches!(decision, Decision::AnotherRound | Decision::Throttle { .. });
                let (before, after) = (converge(&situation), converge(&later));
                prop_assert!(goes_on(before) || after == before, "{before:?} {after:?}");
                let limited = Convergence { max_rounds: Some(situation.rounds), ..situation.convergence };
                let at_the_limit = Situation { convergence: limited, ..situation };
                prop_assert!(!goes_on(converge(&at_the_limit)));
            }

            /// Each step slows the guest down more, as far as the user allows; it ends whatever the guest does.
            #[test]
            fn steps_lead_to_the_most_and_end_there(situation in any_situation()) {
                let Convergence { auto_converge, throttle, .. } = situation.convergence;
                let mut situation = situation;
                for _ in 0..=100 {
                    let Decision::Throttle { percent } = converge(&situation) else { return Ok(()) };
                    prop_assert!(auto_converge && (1..=throttle.max).contains(&percent));
                    let lowered = situation.throttle_percent > throttle.max && percent == throttle.max;
                    prop_assert!(percent > situation.throttle_percent || lowered);
                    situation.throttle_percent = percent;
                }
                prop_assert!(false, "it never ends");
            }

            /// A guest that dirties more is slowed down no later.
            #[test]
            fn a_guest_that_dirties_more_is_slowed_down_no_less(situation in any_situation(), more in 0..4096 * MIB) {
                let trend = situation.trend.map(|trend| Trend { dirtied_bytes: trend.dirtied_bytes + more, ..trend });
                let hotter = Situation { trend, ..situation };
                let slowed = |decision| matches!(decision, Decision::Throttle { .. });
                prop_assert!(!slowed(converge(&situation)) || slowed(converge(&hotter)));
            }
        }
    }
}
