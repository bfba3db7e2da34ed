//! Guest memory that arrives after its guest.
//!
//! Rounds that never end, or are not wanted at all, end here: the guest is stopped, handed over as always and runs at the
//! destination at once, while the source keeps what the destination lacks and sends it.
//!
//! ```text
//! source                                        destination
//!   guest runs   MISSING ... LISTED ------------> drops its old copies of these pages
//!                        <---------------- LISTED
//!   stopped      MISSING ... LISTED ------------> as well (few: dirtied since), watches for who touches one
//!                device sections, PREPARE ------> loads
//!                PREPARED, COMMIT, RUNNING as without
//!   background   PAGES ... ---------------------> places them                          on the main link
//!   `source`             <---------- PAGE REQUEST `destination`: somebody waits        on a link of their own,
//!                PAGES -------------------------> places it, who waits goes on         from AGREE on
//!                        <-------------- RECEIVED all of them are there                on the second
//!                PROGRESS ----------------------> both are done
//! ```
//!
//! A lost link stops the guest, which would otherwise run on until it lacks a page, one thread of it after the other
//! ([`MissingPages::hold`](crate::MissingPages::hold)). Both sides wait (`postcopy-paused`) until an operator has the source dial
//! again: RECOVER names the session, the destination names what it still lacks, and all goes on. Only a destination that can no longer
//! hear who waits does not wait for anybody: it gives the guest up, and tells the source why.
//!
//! - `sets`: which pages, without I/O. `message`: how they are told.
//! - `source`: keeps all pages until RECEIVED, answers requests and sends the rest in the background.
//! - `destination`: brings what is missing, over lost links and new ones. `shared`: who waits for what; places pages. `blocktime`: what
//!   the waiting cost.
//!
//! Invariants: a page that is there is never written again by its arrival ([`MissingPages::place`](crate::MissingPages::place)). From the moment on at which
//! the guest is the destination's, nobody reads zeros for a page that has not come: if the process cannot have it, who touches it waits
//! until the process ends. Before that moment a lost link ends the wait, and the attempt. While the guest stands still for a lost link
//! nothing of it goes on, whatever page arrives. The source only reads.
//!
//! The price, which no protocol takes away: between RUNNING and RECEIVED the guest needs both processes. The end of either is its end.

mod arrival;
mod blocktime;
mod destination;
mod message;
mod sets;
mod shared;
mod source;

pub use blocktime::Blocktime;
pub(crate) use destination::{Announced, Late};
pub(crate) use message::{MISSING_BYTES_MAX, PAGES_BYTES_MAX};
pub use message::{Missing, PageRequest, Recover, RunRequest};
#[cfg(test)]
pub(crate) use sets::PageSets;
pub(crate) use source::{Followers, Remainder, announce, offered, open};

use crate::RamBlock;

/// What the other side numbers: the blocks of `blocks` in the order of their names, as places in `blocks`.
pub(crate) fn order_by_name(blocks: &[RamBlock]) -> Vec<usize> {
    let mut order: Vec<_> = (0..blocks.len()).collect();
    order.sort_by(|one, other| {
        let name = |index: &usize| blocks.get(*index).map(|block| &block.name);
        name(one).cmp(&name(other))
    });
    order
}
