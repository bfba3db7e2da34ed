//! What the controllers of a subsystem have in common beside its namespaces: firmware slots (Base 3.11: all controllers run the same
//! firmware), sanitize operations (8.20: "all enabled controllers in the NVM subsystem" are restricted), the persistent event log
//! (5.16.1.14), and how far formats are.
//!
//! It is here and not with a controller, so that each of them answers for all, and so that it is there again when the machine around a
//! controller builds it anew. Self-tests are a controller's own (5.9).

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};

use crate::command::format::Format;
use crate::command::sanitize::Sanitize;
use crate::firmware::{Firmware, Revision};
use crate::persistent::EventLog;
use crate::shared::lock;

/// See the module's text. Its lock is the last but that of the claims of fused operations, and held for a moment only.
#[derive(Debug)]
pub(crate) struct Common {
    pub firmware: Firmware,
    pub sanitize: Sanitize,
    /// The controller that begins or ends the sanitize operation or makes a request of it, until that is done: one at a time does.
    pub sanitizer: Option<u16>,
    pub events: EventLog,
    /// Formats that are in progress, by controller.
    pub formats: BTreeMap<u16, Format>,
    /// A saved state has been put here: those of other controllers must say the same.
    pub loaded: bool,
    /// What outlived the power has been put here.
    pub powered_on: bool,
}

/// How controllers hold it.
#[derive(Clone, Debug)]
pub(crate) struct CommonPlace(Arc<Mutex<Common>>);

impl CommonPlace {
    /// As it is when the subsystem leaves the factory.
    pub fn new() -> Self {
        Self(Arc::new(Mutex::new(Common {
            firmware: Firmware::new(),
            sanitize: Sanitize::new(),
            sanitizer: None,
            events: EventLog::default(),
            formats: BTreeMap::new(),
            loaded: false,
            powered_on: false,
        })))
    }

    /// It, while nobody changes it.
    pub fn lock(&self) -> MutexGuard<'_, Common> {
        lock(&self.0)
    }

    /// A copy of what is known of sanitize operations.
    pub fn sanitize(&self) -> Sanitize {
        self.lock().sanitize
    }

    /// The firmware that runs.
    pub fn revision(&self) -> Revision {
        self.lock().firmware.running
    }

    /// Controller `id` is gone, reset or built anew: nothing of it is in flight, and others may go on with what it did.
    pub fn give_up(&self, id: u16) {
        self.lock().sanitizer.take_if(|by| *by == id);
    }
}
