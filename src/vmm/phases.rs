#![doc = include_str!("phases.md")]

use crate::machine::RunState;

/// Whether the guest is ours to release when the process ends.
pub(super) fn is_released_at_the_end(state: RunState) -> bool {
    matches!(
        state,
        RunState::Running
            | RunState::Paused
            | RunState::Prelaunch
            | RunState::Shutdown
            | RunState::InternalError
    )
}

#[cfg(test)]
mod tests;
