//! What may follow on what the record says. No I/O: [`Lease`](super::Lease) asks under the record lock, and the model of the
//! hand-over (`ownership`) asks the same.

use super::{Id, Record, State};

/// What is to be written next. Whoever writes it is its owner.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Change {
    pub generation: u64,
    pub state: State,
}

/// What becomes of a hand-over without an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Settle {
    /// The guest is ours: the record says so.
    Kept,
    /// It is, once this is written.
    Back(Change),
    /// It is someone else's.
    Gone,
}

/// What a record that only one side sees comes to, of a guest that goes with its images.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ruling {
    /// It says so, once this is written.
    Write(Change),
    /// It says so already.
    Stays,
    /// It says something else, which stays.
    Refused,
}

/// Whether the guest is with the process `me`, to be offered, suspended or released.
pub(crate) fn holds(record: &Record, me: &Id) -> bool {
    matches!(record.state, State::Owned | State::Taken { .. }) && record.owner.id == *me
}

/// `me` lets the destination of `session` take the guest.
pub(crate) fn offer(record: &Record, me: &Id, session: &Id, peer: &str) -> Option<Change> {
    let state = State::Offered { session: *session, peer: peer.to_owned() };
    holds(record, me).then_some(Change { generation: record.generation, state })
}

/// The destination `me` of `session` takes what COMMIT offered it, or what it has received beside its own record; again, if it did so
/// and could not tell.
pub(crate) fn take(record: &Record, me: &Id, session: &Id, generation: u64) -> Option<Change> {
    let offered = matches!(&record.state, State::Offered { session: s, .. } if s == session);
    // A record at the last generation can never move again.
    let next = generation.checked_add(1)?;
    (((offered || is_incoming(record, me, session)) && record.generation == generation)
        || (is_taken(record, me, session) && record.generation == next))
        .then_some(Change { generation: next, state: State::Taken { session: *session } })
}

/// Whether the record says that `me` receives the images beside it in `session`.
pub(crate) fn is_incoming(record: &Record, me: &Id, session: &Id) -> bool {
    record.state == State::Incoming { session: *session } && record.owner.id == *me
}

/// Whether the record says that `me` took the guest in `session`.
pub(crate) fn is_taken(record: &Record, me: &Id, session: &Id) -> bool {
    record.state == State::Taken { session: *session } && record.owner.id == *me
}

/// The destination `me` took the guest, and neither ran it nor ever will.
pub(crate) fn give_back(record: &Record, me: &Id, session: &Id) -> Option<Change> {
    is_taken(record, me, session)
        .then_some(Change { generation: record.generation, state: State::Returned { session: *session } })
}

/// The source `me` asks whose the guest is after `session`. `present`: it shows that it lives.
pub(crate) fn settle(record: &Record, me: &Id, present: bool, session: &Id) -> Settle {
    let ours = record.owner.id == *me;
    let back = match &record.state {
        State::Offered { session: s, .. } => s == session && ours,
        State::Returned { session: s } => s == session,
        // Suspending failed, though not in writing this.
        State::InFile { .. } => present && ours,
        State::Owned | State::Taken { .. } if ours => return Settle::Kept,
        State::Owned | State::Taken { .. } | State::Released => false,
        // Those of a guest that goes with its images are taken back otherwise: no record that both sides see decides about it.
        State::Incoming { .. } | State::Moved { .. } => false,
    };
    match record.generation.checked_add(1) {
        Some(generation) if back => Settle::Back(Change { generation, state: State::Owned }),
        _ => Settle::Gone,
    }
}

/// The source `me` says beside its images that they go to `peer`.
pub(crate) fn mark_moved(record: &Record, me: &Id, session: &Id, peer: &str) -> Ruling {
    let state = State::Moved { session: *session, peer: peer.to_owned() };
    if record.state == state && record.owner.id == *me {
        Ruling::Stays
    } else if holds(record, me) {
        Ruling::Write(Change { generation: record.generation, state })
    } else {
        Ruling::Refused
    }
}

/// The source `me` knows that the guest of `session` never runs elsewhere.
pub(crate) fn take_back(record: &Record, me: &Id, session: &Id) -> Ruling {
    if holds(record, me) {
        return Ruling::Stays;
    }
    match record.generation.checked_add(1) {
        Some(generation) if moved_by(record, me) == Some(session) => {
            Ruling::Write(Change { generation, state: State::Owned })
        }
        _ => Ruling::Refused,
    }
}

/// The session in which `me` has marked the images beside the record as moved, if it has.
pub(crate) fn moved_by<'a>(record: &'a Record, me: &Id) -> Option<&'a Id> {
    match &record.state {
        State::Moved { session, .. } if record.owner.id == *me => Some(session),
        _ => None,
    }
}

/// Whether images may be received beside `record`, if there is one. `replace`: a guest may be given up for them.
pub(crate) fn may_expect(record: Option<&Record>, replace: bool) -> bool {
    replace || record.is_none_or(|record| matches!(record.state, State::Incoming { .. }))
}

/// The destination `me` took the guest that came with its images, or may have, and neither ran it nor ever will.
pub(crate) fn expect_again(record: &Record, me: &Id, session: &Id) -> Ruling {
    if is_taken(record, me, session) {
        let state = State::Incoming { session: *session };
        Ruling::Write(Change { generation: record.generation, state })
    } else if is_incoming(record, me, session) {
        Ruling::Stays
    } else {
        Ruling::Refused
    }
}
