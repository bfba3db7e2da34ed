//! Asynchronous events and the error log (Base 5.2, 5.16.1.2).

use std::collections::VecDeque;

use nvme_spec::Status;
use nvme_spec::event::Event;
use nvme_spec::log::ErrorEntry;

/// Entries of the error log (Identify Controller ELPE + 1).
pub(crate) const ERROR_LOG_ENTRIES: usize = 64;
/// Events that are kept until the host asks; equal ones are kept once, so there are never more kinds than this.
pub(crate) const MAX_QUEUED_EVENTS: usize = 32;

/// Events that wait for an Asynchronous Event Request, and the errors that they speak of.
#[derive(Debug, Default)]
pub(crate) struct Events {
    pub queued: VecDeque<Event>,
    /// Bit n: events of type n were reported and their log page has not been read since ("automatically masked").
    pub masked: u8,
    /// Newest first.
    pub errors: VecDeque<ErrorEntry>,
    /// Errors ever logged.
    pub error_count: u64,
}

impl Events {
    /// Keeps `event` until it can be reported. `true`: it is new.
    pub fn queue(&mut self, event: Event) -> bool {
        if self.queued.contains(&event) || self.queued.len() == MAX_QUEUED_EVENTS {
            return false;
        }
        self.queued.push_back(event);
        true
    }

    /// The next event that may be reported; its type is masked from now on.
    pub fn take(&mut self) -> Option<Event> {
        let position = self.queued.iter().position(|event| self.masked & (1 << event.kind) == 0)?;
        let event = self.queued.remove(position)?;
        self.masked |= 1 << event.kind;
        Some(event)
    }

    /// The host has read the log page of events of this `kind`.
    pub fn unmask(&mut self, kind: u8) {
        self.masked &= !(1 << kind);
    }

    /// Adds an entry to the error log.
    pub fn log_error(&mut self, entry: ErrorEntry) {
        self.error_count = self.error_count.saturating_add(1);
        self.errors.truncate(ERROR_LOG_ENTRIES - 1);
        self.errors.push_front(ErrorEntry { error_count: self.error_count, ..entry });
    }

    /// Queues the event of a doorbell write that no correct driver makes, and logs the error once for each event.
    pub fn bad_doorbell(&mut self, event: Event, queue: u16) -> bool {
        let new = self.queue(event);
        if new {
            self.log_error(ErrorEntry {
                sq_id: queue,
                cid: 0xffff,
                status: Status::INVALID_FIELD.0 << 1,
                parameter_location: 0xffff,
                ..ErrorEntry::default()
            });
        }
        new
    }

    /// Forgets what belongs to one enabling of the controller. The error log stays.
    pub fn reset(&mut self) {
        self.queued.clear();
        self.masked = 0;
    }
}
