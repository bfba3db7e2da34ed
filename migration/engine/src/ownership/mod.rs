//! Who has the guest, as two state machines without I/O.
//!
//! Each side of a hand-over asks its machine what to do next, does it, and tells the machine what came of it: `handover` and
//! `source` for [`source::Source`], `destination` for [`destination::Destination`]. The lease is asked by the rules of
//! [`crate::lease::rules`]. The `model` among the tests runs the same machines and the same rules, in every order in which
//! two processes, a link and a disk can get in each other's way.
//!
//! The rules ("Live migration", who owns the guest):
//!
//! 1. Before the first byte of COMMIT the source owns the guest, and any failure ends with it running there.
//! 2. The destination runs only what the lease offered to exactly its session and generation, and only once the record says
//!    `taken` on stable storage. Before it answers NEVER it fences the session: it will not run here, whatever comes.
//! 3. From the first byte of COMMIT the source does not resume by itself. It asks until it is answered, or until the lease
//!    tells; without a lease only the destination's word counts, or the operator's.
//! 4. What can fail at the destination fails before the record says `taken`: images are locked, opened and checked under the
//!    record lock, when the offer has been checked and the source can neither write nor settle. So a source that reads
//!    `taken` can let go of the guest for good, and no guest is ever between two processes that both have let go.
//! 5. RAM that is handed over itself is written by whose guest it is: not by the source from the offer on, and not by the
//!    destination before the record says `taken` on stable storage, so that a guest which goes back finds it as it was.
//!
//! Absent: what commands do in which run state; `ferry`'s `machine::run` has that.

pub(crate) mod destination;
#[cfg(test)]
mod model;
pub(crate) mod source;

/// What a destination says of a session. Every answer may be given again, and means the same each time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Answer {
    /// It has the guest.
    Running,
    /// It has not, and never will.
    Never,
}
