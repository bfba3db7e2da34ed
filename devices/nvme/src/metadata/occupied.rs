//! Blocks that commands are at. What a block holds is in two places of the image when it has metadata, and nobody may see or leave the
//! one without the other: a command that writes has its blocks for itself, those that read have them together.
//!
//! Workers of all controllers take part, through the copy that each has of the namespace. Of commands that want the same blocks the
//! oldest goes first, so that none waits for ever and no two wait for each other.

use std::sync::{Arc, Mutex};

use crate::shared::{Host, lock};

/// Names a place in the queue; none is given twice.
type Ticket = u64;

/// A command's place in the queue, which it leaves by dropping this: also where a whole controller goes away with all that it had begun.
#[derive(Debug)]
pub(crate) struct Place {
    occupied: Arc<Occupied>,
    ticket: Ticket,
}

impl Place {
    /// Queues for the blocks from `first` to before `end`.
    pub fn enter(occupied: &Arc<Occupied>, first: u64, end: u64, writes: bool) -> Self {
        Self { occupied: Arc::clone(occupied), ticket: occupied.enter(first, end, writes) }
    }

    /// Whether it is the command's turn. If not, the worker is woken when it may be.
    pub fn is_granted(&self, worker: impl FnOnce() -> (Arc<dyn Host>, usize)) -> bool {
        self.occupied.is_granted(self.ticket, worker)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.occupied.leave(self.ticket);
    }
}

/// See the module's text. Its lock is held for a few instructions, and no other is taken meanwhile.
#[derive(Default)]
pub(crate) struct Occupied {
    table: Mutex<Table>,
}

#[derive(Default)]
struct Table {
    given: Ticket,
    /// The oldest first.
    entries: Vec<Entry>,
}

struct Entry {
    ticket: Ticket,
    first: u64,
    /// Behind the last.
    end: u64,
    writes: bool,
    /// Whom to wake, while it waits.
    waits: Option<(Arc<dyn Host>, usize)>,
}

impl Entry {
    fn excludes(&self, other: &Self) -> bool {
        (self.writes || other.writes) && self.first < other.end && other.first < self.end
    }
}

impl std::fmt::Debug for Occupied {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Occupied").field("entries", &lock(&self.table).entries.len()).finish()
    }
}

impl Occupied {
    fn enter(&self, first: u64, end: u64, writes: bool) -> Ticket {
        let mut table = lock(&self.table);
        table.given += 1;
        let ticket = table.given;
        table.entries.push(Entry { ticket, first, end, writes, waits: None });
        ticket
    }

    fn is_granted(&self, ticket: Ticket, worker: impl FnOnce() -> (Arc<dyn Host>, usize)) -> bool {
        let mut table = lock(&self.table);
        let Some(position) = table.entries.iter().position(|entry| entry.ticket == ticket) else {
            return false;
        };
        let (older, [entry, ..]) = table.entries.split_at_mut(position) else { return false };
        if !older.iter().any(|older| older.excludes(entry)) {
            entry.waits = None;
            return true;
        }
        entry.waits.get_or_insert_with(worker);
        false
    }

    fn leave(&self, ticket: Ticket) {
        let waiting: Vec<_> = {
            let mut table = lock(&self.table);
            table.entries.retain(|entry| entry.ticket != ticket);
            table.entries.iter().filter_map(|entry| entry.waits.clone()).collect()
        };
        waiting.iter().for_each(|(host, worker)| host.wake(*worker));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::bells::Bells;

    #[test]
    fn readers_share_and_a_writer_is_alone_in_the_order_of_their_coming() {
        let (occupied, bells) = (Occupied::default(), Arc::new(Bells::default()));
        let granted = |ticket| occupied.is_granted(ticket, || (bells.clone(), ticket as usize));
        let [a, b, writer, c] = [(0, 8, false), (4, 9, false), (8, 9, true), (8, 12, false)]
            .map(|(f, e, w)| occupied.enter(f, e, w));
        let elsewhere = occupied.enter(12, 13, true);
        assert_eq!([a, b, writer, c, elsewhere].map(granted), [true, true, false, false, true]);
        occupied.leave(a);
        assert_eq!(bells.take(), [writer as usize, c as usize], "those who wait are woken");
        assert!(!granted(writer), "one reader is still there");
        occupied.leave(b);
        assert_eq!([writer, c].map(granted), [true, false]);
        occupied.leave(writer);
        assert!(granted(c));
        bells.take();
        occupied.leave(elsewhere);
        assert!(bells.take().is_empty(), "nobody waits any more");
    }
}
