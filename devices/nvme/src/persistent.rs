//! The Persistent Event log (Base 5.16.1.14): what has befallen the controllers of the subsystem, newest first, while there is room.
//!
//! A host reads it through a context: a copy of the log that is taken when the context is established, so that what happens meanwhile
//! does not move what it reads. A controller has one context; it ends when the host releases it, or with a reset. Telemetry
//! and the events that go with it are absent.

use std::collections::VecDeque;
use std::time::Instant;

use nvme_spec::log::id;
use nvme_spec::persistent::{self, EventHeader, PersistentEventHeader, kind};
use nvme_spec::{Status, SubmissionEntry};

use crate::admin::{Admin, Pool};

/// Room for header and events, in the unit of Identify Controller PELS.
pub(crate) const LOG_BYTES: usize = 64 << 10;
/// Room for events.
pub(crate) const EVENTS_BYTES: usize = LOG_BYTES - PersistentEventHeader::SIZE_BYTES;
/// The event types that are logged.
const KINDS: [u8; 8] = [
    kind::SMART_SNAPSHOT,
    kind::FIRMWARE_COMMIT,
    kind::TIMESTAMP_CHANGE,
    kind::POWER_ON_OR_RESET,
    kind::FORMAT_START,
    kind::FORMAT_COMPLETION,
    kind::SANITIZE_START,
    kind::SANITIZE_COMPLETION,
];
/// Revision of their data.
const EVENT_REVISION: u8 = 1;

/// The events, which are those of all controllers of the subsystem.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct EventLog {
    /// Header and data, newest first.
    events: VecDeque<Box<[u8]>>,
    /// Bytes of all of them.
    bytes: usize,
    /// Counts events, and wraps.
    pub generation: u16,
}

impl EventLog {
    /// Adds an event and forgets the oldest ones that it leaves no room for.
    fn push(&mut self, header: &EventHeader, data: &[u8]) {
        let event = [&header.to_bytes(), data].concat().into_boxed_slice();
        self.bytes += event.len();
        self.events.push_front(event);
        while self.bytes > EVENTS_BYTES
            && let Some(oldest) = self.events.pop_back()
        {
            self.bytes -= oldest.len();
        }
        self.generation = self.generation.wrapping_add(1);
    }

    /// All events, newest first.
    pub fn to_bytes(&self) -> Vec<u8> {
        self.events.iter().flat_map(|event| event.iter().copied()).collect()
    }

    /// What [`EventLog::to_bytes`] gave of a log that has counted `generation`. The error says what no log of ours has.
    pub fn from_bytes(bytes: &[u8], generation: u16) -> Result<Self, &'static str> {
        let mut rest = bytes;
        let mut events = VecDeque::new();
        while !rest.is_empty() {
            let header = rest.first_chunk().map(EventHeader::from_bytes).ok_or("an event is cut")?;
            let length_bytes = EventHeader::SIZE_BYTES + usize::from(header.length);
            let event = rest.get(..length_bytes).ok_or("an event is cut")?;
            if !KINDS.contains(&header.kind) || header.header_length != persistent::EVENT_HEADER_LENGTH {
                return Err("there is no such event");
            }
            events.push_back(event.into());
            rest = &rest[length_bytes..];
        }
        Ok(Self { events, bytes: bytes.len(), generation })
    }

    /// Whether nothing has happened yet.
    pub fn is_empty(&self) -> bool {
        self.events.is_empty()
    }
}

/// What a controller has to do with the log.
#[derive(Debug)]
pub(crate) struct PersistentEvents {
    /// The copy that the host reads.
    pub context: Option<Vec<u8>>,
    /// The last power-on or reset has been logged, which happens with the next enable.
    pub knows_begin: bool,
    /// Milliseconds from the last reset to `since`.
    since_reset_ms: u64,
    since: Instant,
}

impl PersistentEvents {
    pub fn new() -> Self {
        Self { context: None, knows_begin: false, since_reset_ms: 0, since: Instant::now() }
    }

    /// How long ago the last reset was at `now`.
    pub fn since_reset_ms_at(&self, now: Instant) -> u64 {
        let elapsed = now.saturating_duration_since(self.since).as_millis();
        self.since_reset_ms.saturating_add(u64::try_from(elapsed).unwrap_or(u64::MAX))
    }

    /// Sets when the last reset was.
    pub fn set_since_reset(&mut self, milliseconds: u64, now: Instant) {
        (self.since_reset_ms, self.since) = (milliseconds, now);
    }
}

/// Whether a copy of the log is one that the host can have established.
pub(crate) fn is_context(bytes: &[u8]) -> bool {
    let Some(header) = bytes.first_chunk().map(PersistentEventHeader::from_bytes) else { return false };
    header.log_page == id::PERSISTENT_EVENT
        && header.length_bytes == bytes.len() as u64
        && EventLog::from_bytes(&bytes[PersistentEventHeader::SIZE_BYTES..], 0).is_ok()
}

impl Admin {
    /// Logs an event that has happened now.
    pub(crate) fn log_event(&mut self, pool: &Pool, kind: u8, data: &[u8]) {
        let header = EventHeader {
            kind,
            revision: EVENT_REVISION,
            header_length: persistent::EVENT_HEADER_LENGTH,
            controller: pool.shared.controller_id,
            timestamp: self.features.timestamp.value(),
            length: data.len() as u16,
            ..EventHeader::default()
        };
        self.common.lock().events.push(&header, data);
    }

    /// Logs that the controller was powered on or reset, and how it is. `activated`: other firmware runs since.
    pub(crate) fn log_power_on_or_reset(&mut self, pool: &Pool, activated: bool) {
        let now = Instant::now();
        let seconds = self.health.power_on_seconds_at(now);
        let event = persistent::PowerOnOrResetEvent {
            revision: self.common.revision(),
            controller: pool.shared.controller_id,
            activation: u8::from(activated),
            operation: u8::from(self.format.is_some())
                | u8::from(self.common.sanitize().running.is_some()) << 1,
            power_cycle: self.health.power_cycles as u32,
            power_on_ms: seconds.saturating_mul(1000),
            timestamp: self.features.timestamp.value(),
        };
        self.persistent.knows_begin = true;
        self.log_event(pool, kind::POWER_ON_OR_RESET, &event.to_bytes());
        let smart = self.smart(pool).to_bytes();
        self.log_event(pool, kind::SMART_SNAPSHOT, &smart);
    }

    /// Get Log Page for this log: what is to be returned, if anything is.
    pub(crate) fn persistent_event_log(
        &mut self,
        pool: &Pool,
        entry: &SubmissionEntry,
    ) -> Result<Option<Vec<u8>>, Status> {
        let sequence_error = Status::COMMAND_SEQUENCE_ERROR.do_not_retry();
        match entry.cdw10 >> 8 & 0x7f {
            persistent::ACTION_READ => self.persistent.context.clone().map(Some).ok_or(sequence_error),
            persistent::ACTION_ESTABLISH if self.persistent.context.is_some() => Err(sequence_error),
            persistent::ACTION_ESTABLISH => {
                let log = self.whole_log(pool);
                self.persistent.context = Some(log.clone());
                Ok(Some(log))
            }
            persistent::ACTION_RELEASE => {
                self.persistent.context = None;
                Ok(None)
            }
            _ => Err(Status::INVALID_FIELD.do_not_retry()),
        }
    }

    fn whole_log(&self, pool: &Pool) -> Vec<u8> {
        let identity = self.controller_identity(pool);
        let (events, count, generation) = {
            let log = &self.common.lock().events;
            (log.to_bytes(), log.events.len() as u32, log.generation)
        };
        let mut supported = [0; 32];
        KINDS.iter().for_each(|kind| supported[usize::from(kind / 8)] |= 1 << (kind % 8));
        let header = PersistentEventHeader {
            log_page: id::PERSISTENT_EVENT,
            events: count,
            length_bytes: (PersistentEventHeader::SIZE_BYTES + events.len()) as u64,
            revision: persistent::REVISION,
            header_length: persistent::HEADER_LENGTH,
            timestamp: self.features.timestamp.value(),
            power_on_hours: u128::from(self.health.power_on_seconds_at(Instant::now()) / 3600),
            power_cycles: self.health.power_cycles,
            vid: identity.vid,
            ssvid: identity.ssvid,
            sn: identity.sn,
            mn: identity.mn,
            subnqn: identity.subnqn,
            generation,
            context: persistent::CONTEXT_EXISTS,
            supported,
        };
        let mut log = header.to_bytes().to_vec();
        log.extend(events);
        log
    }
}
