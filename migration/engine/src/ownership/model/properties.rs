//! What must never be, and what must come in the end.

use super::record::{Entry, Lease};
use super::world::{Giving, Leases, Side, State, World};
use crate::ownership::source;

/// Why this must never be, if so.
pub fn violation(state: &State) -> Option<&'static str> {
    let State { source, destination, .. } = state;
    let at_source = after_a_crash(state, Side::Source);
    let at_destination = after_a_crash(state, Side::Destination);
    let reason = if let Some(violation) = state.violation {
        violation
    } else if source.runs && destination.runs {
        "the guest runs twice"
    } else if source.runs && state.ran {
        "the guest runs at the source after it ran at the destination"
    } else if source.runs && state.ram == Side::Destination {
        "the guest goes on at the source in RAM that the destination has written"
    } else if destination.runs && source.alive && !state.released {
        "the guest runs at the destination while the source may write its images"
    } else if source.runs && at_source.iter().any(|lease| !lease.is_of(Side::Source)) {
        "the guest runs at the source and the lease does not say so"
    } else if destination.runs && at_destination.iter().any(|lease| !lease.is_of(Side::Destination)) {
        "the guest runs at the destination and the lease does not say so"
    } else if state.has_one_each()
        && at_source.iter().any(|lease| lease.lets_start())
        && at_destination.iter().any(|lease| lease.lets_start())
    {
        "both ends let the guest start"
    } else {
        return None;
    };
    Some(reason)
}

/// What may stand in the lease of `side` after a crash.
fn after_a_crash(state: &State, side: Side) -> Vec<&Lease> {
    state.disk(side).into_iter().flat_map(|disk| disk.after_a_crash()).collect()
}

/// Whether it is decided where the guest is, and who has it not knows that.
pub fn is_settled(world: &World, state: &State) -> bool {
    let State { source, destination, .. } = state;
    // Nobody is left to tell, and no lease that both see.
    let undecided = world.leases != Leases::Common && !world.operator && source.machine.needs_word();
    match (source.alive, destination.alive) {
        (true, true) if state.is_anew_there() => state.gone || undecided,
        (true, true) if source.runs => !destination.runs && is_left_as_it_was(world, state),
        (true, true) => destination.runs && state.gone,
        // The guest may have died with its owner, and the source knows it.
        (true, false) => source.runs || (state.gone && state.taken) || undecided,
        // The guest runs, or died with its owner.
        (false, true) => destination.runs || (state.is_listening() && !state.taken),
        (false, false) => true,
    }
}

/// Nothing is at the destination of a guest that did not come; what could not be written there stays.
fn is_left_as_it_was(world: &World, state: &State) -> bool {
    !state.has_one_each()
        || world.lease_fails
        || state.lease(Side::Destination).is_some_and(|lease| lease.state == Entry::Nothing)
}

/// The guest runs at the source, and may leave again: another attempt must be able to succeed, whatever became of those before.
pub fn may_leave(world: &World, state: &State) -> bool {
    let State { source, destination, session, .. } = state;
    let rests = source.action == Giving::Does(source::Action::Resume);
    source.alive && destination.alive && source.runs && rests && *session < world.attempts
}
