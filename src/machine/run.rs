//! Run states and their legal moves.
//!
//! The run state says whether vCPUs may run, and who owns the guest. Every command and every guest event is an
//! [`Action`]; [`RunState::next`] is the only place that says what an action does in a state. In particular no command
//! makes a guest run that may have been handed over ("Live migration", who owns the guest, rule 5).

use engine::Word;

/// What the virtual machine is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RunState {
    /// Built, never started.
    Prelaunch,
    /// Waiting for a guest to arrive; this process does not own one.
    InMigrate,
    /// vCPUs run.
    Running,
    /// Stopped by a command; `cont` goes on.
    Paused,
    /// Some of the guest's memory is still to come from where it was, and the link to there is lost: it stands still until there is
    /// another.
    LacksMemory {
        /// Whether it goes on then.
        was_running: bool,
    },
    /// Stopped by a migration for its last pass; the guest is still ours.
    FinishMigrate {
        /// Whether the guest ran before, and runs again if the migration fails.
        was_running: bool,
    },
    /// The hand-over was sent and not answered: nobody may run the guest here until it is settled.
    HandoverUnknown {
        /// Whether the guest ran before the stop.
        was_running: bool,
    },
    /// The guest lives elsewhere now, or in a file.
    PostMigrate,
    /// The guest powered itself off.
    Shutdown,
    /// A vCPU cannot go on.
    InternalError,
}

/// What is asked of the virtual machine, by a command, the guest, or the migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Action {
    /// First start of a guest that was booted here.
    Start,
    /// `stop`.
    Stop,
    /// `cont`.
    Continue,
    /// The guest asked for a reset.
    Reset,
    /// The guest asked to be powered off.
    PowerOff,
    /// A vCPU cannot go on.
    Fail,
    /// Namespaces are added, removed or resized, or the access to them is another.
    ChangeNamespaces,
    /// A migration begins; the guest keeps running.
    BeginMigration,
    /// The migration stops the guest for its last pass.
    StopForMigration,
    /// The migration failed before the hand-over, or the lease gave the guest back.
    TakeBack {
        /// Whether it goes on; it stays paused if its images cannot be had back.
        running: bool,
    },
    /// The first byte of the hand-over is about to be sent.
    HandOver,
    /// The destination runs the guest (or holds it paused).
    HandedOver,
    /// An operator says where the guest is, when nothing else can tell.
    Decide(Word),
    /// The link is lost on which memory came after the guest.
    LoseMemory,
    /// It comes again, or there is nothing that could.
    FindMemory,
    /// An incoming guest is ours now.
    Arrive {
        /// Whether it runs, or arrives paused.
        running: bool,
    },
}

/// Why an action is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot {action}: the virtual machine is {state}", action = .action.describe(), state = .state.describe())]
pub struct Refused {
    /// What was asked.
    pub action: Action,
    /// The state it was asked in.
    pub state: RunState,
}

impl RunState {
    /// The state after `action`.
    ///
    /// # Errors
    /// [`Refused`] when the action has no meaning in this state; nothing has changed then.
    pub fn next(self, action: Action) -> Result<Self, Refused> {
        use Action as A;
        use RunState as S;
        match (self, action) {
            // Until its machine is built there is nothing that a command could start or stop.
            (S::Prelaunch, A::Start) => Ok(S::Running),
            (S::Running | S::Paused, A::Stop) => Ok(S::Paused),
            (S::Paused | S::Running, A::Continue) => Ok(S::Running),

            // A reset keeps the run state: a paused guest is reset and stays paused.
            (S::Running | S::Paused, A::Reset) => Ok(self),
            (S::Running | S::Paused, A::PowerOff) => Ok(S::Shutdown),
            (S::Running | S::Paused, A::Fail) => Ok(S::InternalError),

            (S::Running, A::LoseMemory) => Ok(S::LacksMemory { was_running: true }),
            (S::Paused, A::LoseMemory) => Ok(S::LacksMemory { was_running: false }),
            (S::LacksMemory { was_running }, A::FindMemory) => {
                Ok(if was_running { S::Running } else { S::Paused })
            }
            (S::LacksMemory { .. }, A::Stop) => Ok(S::LacksMemory { was_running: false }),
            (S::LacksMemory { .. }, A::Continue) => Ok(S::LacksMemory { was_running: true }),
            // It is noted, and done when all memory is here.
            (S::LacksMemory { .. }, A::Reset) => Ok(self),
            (S::LacksMemory { .. }, A::Fail) => Ok(S::InternalError),

            (S::Running | S::Paused, A::ChangeNamespaces | A::BeginMigration) => Ok(self),
            (S::Running, A::StopForMigration) => Ok(S::FinishMigrate { was_running: true }),
            (S::Paused, A::StopForMigration) => Ok(S::FinishMigrate { was_running: false }),
            (S::FinishMigrate { was_running }, A::HandOver) => Ok(S::HandoverUnknown { was_running }),
            (
                S::FinishMigrate { was_running } | S::HandoverUnknown { was_running },
                A::TakeBack { running },
            ) => Ok(if was_running && running { S::Running } else { S::Paused }),
            // A failure before the stop has nothing to take back, and what was given back paused stays so.
            (S::Running | S::Paused, A::TakeBack { .. }) => Ok(self),
            // A guest that went into a file has left, even if its images could not be given up.
            (S::FinishMigrate { .. } | S::HandoverUnknown { .. }, A::HandedOver) => Ok(S::PostMigrate),

            // Who does what he says is the migration, by one of the two above.
            (S::HandoverUnknown { .. }, A::Decide(_)) => Ok(self),

            (S::InMigrate, A::Arrive { running }) => Ok(if running { S::Running } else { S::Paused }),

            (state, action) => Err(Refused { action, state }),
        }
    }

    /// Whether vCPUs run in this state.
    #[must_use]
    pub fn is_running(self) -> bool {
        self == Self::Running
    }

    /// The name that QMP's `query-status` gives it.
    #[must_use]
    pub fn qmp_name(self) -> &'static str {
        match self {
            Self::Prelaunch => "prelaunch",
            Self::InMigrate => "inmigrate",
            Self::Running => "running",
            Self::Paused | Self::LacksMemory { .. } => "paused",
            Self::FinishMigrate { .. } => "finish-migrate",
            Self::HandoverUnknown { .. } | Self::PostMigrate => "postmigrate",
            Self::Shutdown => "shutdown",
            Self::InternalError => "internal-error",
        }
    }

    fn describe(self) -> &'static str {
        match self {
            Self::Prelaunch => "not started yet",
            Self::InMigrate => "waiting for an incoming migration, so there is no guest here yet",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::LacksMemory { .. } => {
                "waiting for memory that does not come, since its link is lost (migrate-recover)"
            }
            Self::FinishMigrate { .. } => "stopped by a migration in its last pass",
            Self::HandoverUnknown { .. } => {
                "handed over without an answer: it may run on the destination, and must not run twice"
            }
            Self::PostMigrate => "gone: the guest was migrated and lives elsewhere",
            Self::Shutdown => "powered off",
            Self::InternalError => "stopped by an internal error",
        }
    }
}

impl Action {
    fn describe(self) -> &'static str {
        match self {
            Self::Start => "start",
            Self::Stop => "stop",
            Self::Continue => "continue",
            Self::Reset => "reset",
            Self::PowerOff => "power off",
            Self::Fail => "report a failure",
            Self::ChangeNamespaces => "change namespaces",
            Self::BeginMigration => "migrate",
            Self::StopForMigration => "stop for the migration",
            Self::TakeBack { .. } => "take the guest back",
            Self::HandOver => "hand the guest over",
            Self::HandedOver => "finish the hand-over",
            Self::Decide(Word::Confirm) => "confirm a hand-over",
            Self::Decide(Word::Reclaim) => "reclaim a guest",
            Self::LoseMemory => "wait for memory",
            Self::FindMemory => "go on with memory that comes again",
            Self::Arrive { .. } => "take over an incoming guest",
        }
    }
}

#[cfg(test)]
impl RunState {
    /// Every state that there is.
    pub const ALL: [RunState; 13] = [
        RunState::Prelaunch,
        RunState::InMigrate,
        RunState::Running,
        RunState::Paused,
        RunState::LacksMemory { was_running: true },
        RunState::LacksMemory { was_running: false },
        RunState::FinishMigrate { was_running: true },
        RunState::FinishMigrate { was_running: false },
        RunState::HandoverUnknown { was_running: true },
        RunState::HandoverUnknown { was_running: false },
        RunState::PostMigrate,
        RunState::Shutdown,
        RunState::InternalError,
    ];
}

#[cfg(test)]
mod tests {
    use super::*;

    const ACTIONS: [Action; 19] = [
        Action::Start,
        Action::Stop,
        Action::Continue,
        Action::Reset,
        Action::PowerOff,
        Action::Fail,
        Action::ChangeNamespaces,
        Action::BeginMigration,
        Action::StopForMigration,
        Action::TakeBack { running: true },
        Action::TakeBack { running: false },
        Action::HandOver,
        Action::HandedOver,
        Action::Decide(Word::Confirm),
        Action::Decide(Word::Reclaim),
        Action::LoseMemory,
        Action::FindMemory,
        Action::Arrive { running: true },
        Action::Arrive { running: false },
    ];

    /// The states from which the guest may run here again without the protocol's word.
    fn owned(state: RunState) -> bool {
        matches!(
            state,
            RunState::Prelaunch
                | RunState::Running
                | RunState::Paused
                | RunState::LacksMemory { .. }
                | RunState::FinishMigrate { .. }
        )
    }

    #[test]
    fn only_the_protocol_makes_a_guest_run_that_is_not_owned() {
        for state in RunState::ALL.into_iter().filter(|&state| !owned(state)) {
            for action in ACTIONS {
                if state.next(action).is_ok_and(owned) {
                    let by_protocol = matches!(
                        (state, action),
                        (RunState::HandoverUnknown { .. }, Action::TakeBack { .. })
                            | (RunState::InMigrate, Action::Arrive { .. })
                    );
                    assert!(by_protocol, "{action:?} revives {state:?}");
                }
            }
        }
    }

    #[test]
    fn the_run_state_travels_through_a_failed_migration() {
        for (start, end) in [(RunState::Running, RunState::Running), (RunState::Paused, RunState::Paused)] {
            for (running, end) in [(true, end), (false, RunState::Paused)] {
                let back = Action::TakeBack { running };
                let actions = [Action::BeginMigration, Action::StopForMigration, Action::HandOver, back];
                let state = actions.into_iter().try_fold(start, RunState::next).unwrap();
                assert_eq!(state, end);
            }
        }
    }

    #[test]
    fn a_guest_goes_on_with_its_memory_as_it_was_or_as_it_is_told_meanwhile() {
        for start in [RunState::Running, RunState::Paused] {
            let after = |meanwhile: &[Action]| {
                let actions = [&[Action::LoseMemory][..], meanwhile, &[Action::FindMemory]].concat();
                actions.into_iter().try_fold(start, RunState::next).unwrap()
            };
            assert_eq!(after(&[]), start);
            assert_eq!(after(&[Action::Stop]), RunState::Paused);
            assert_eq!(after(&[Action::Stop, Action::Continue]), RunState::Running);
        }
        let lacking = RunState::LacksMemory { was_running: true };
        assert!(!lacking.is_running());
        let refusal = lacking.next(Action::BeginMigration).unwrap_err().to_string();
        assert!(refusal.ends_with("its link is lost (migrate-recover)"), "{refusal}");
    }

    #[test]
    fn what_is_over_stays_over() {
        for state in [RunState::PostMigrate, RunState::Shutdown, RunState::InternalError] {
            for action in ACTIONS {
                assert_eq!(state.next(action), Err(Refused { action, state }));
            }
        }
    }

    #[test]
    fn a_refusal_says_why() {
        let error = RunState::PostMigrate.next(Action::Continue).unwrap_err().to_string();
        assert_eq!(
            error,
            "cannot continue: the virtual machine is gone: the guest was migrated and lives elsewhere"
        );
    }
}
