//! What keeps a controller's commands from its namespaces: one byte for each, which every worker of the controller reads before it
//! begins a command, and which is 0 as long as nothing does.
//!
//! Whoever changes a reservation writes the bytes of all controllers while it holds the lock of [`crate::reservations`], and whoever
//! changes an access state those of one controller under the lock of [`crate::ana`]; a worker takes no lock. A command that found its way free before the change goes on; a command that is fetched after the change has been
//! answered finds it.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, Ordering};

use nvme_spec::Status;
use nvme_spec::opcode::nvm;

use crate::ana::AccessState;
use crate::config::MAX_NAMESPACES;
use crate::reservation::Conflicts;

/// Bit 0: reads conflict with a reservation. Bit 1: writes do. Bits 7:4: the access state, if it keeps commands away.
const READS: u8 = 1 << 0;
const WRITES: u8 = 1 << 1;
const ACCESS_SHIFT: u32 = 4;

/// See the module's text. One for each controller.
pub(crate) struct Gate {
    /// By namespace identifier less one.
    namespaces: Box<[AtomicU8]>,
    /// A reservation notification waits to be told as an event.
    pub notified: AtomicBool,
    /// A change of access waits to be told as an event.
    pub access_changed: AtomicBool,
    /// A sanitize operation that this controller was asked for has ended.
    pub sanitized: AtomicBool,
    /// Another controller of the subsystem was written to NSSR: this one is reset too.
    pub subsystem_reset: AtomicBool,
    /// Counts Preempt and Abort commands that wait for commands of this controller.
    pub drains: AtomicU64,
}

impl Default for Gate {
    fn default() -> Self {
        Self {
            namespaces: (0..MAX_NAMESPACES).map(|_| AtomicU8::new(0)).collect(),
            notified: AtomicBool::new(false),
            access_changed: AtomicBool::new(false),
            sanitized: AtomicBool::new(false),
            subsystem_reset: AtomicBool::new(false),
            drains: AtomicU64::new(0),
        }
    }
}

impl Gate {
    /// What a reservation now keeps away.
    pub fn set_conflicts(&self, nsid: u32, conflicts: Conflicts) {
        let reads = if conflicts.reads { READS } else { 0 };
        let writes = if conflicts.writes { WRITES } else { 0 };
        self.put(nsid, READS | WRITES, reads | writes);
    }

    /// What the access state of its group now keeps away: nothing if there is a way to the namespace.
    pub fn set_access(&self, nsid: u32, state: AccessState) {
        let closed = match state {
            AccessState::Optimized | AccessState::NonOptimized => 0,
            closed => (closed as u8) << ACCESS_SHIFT,
        };
        self.put(nsid, !0 << ACCESS_SHIFT, closed);
    }

    fn put(&self, nsid: u32, mask: u8, bits: u8) {
        if let Some(byte) = (nsid as usize).checked_sub(1).and_then(|index| self.namespaces.get(index)) {
            // Always succeeds: the two halves of a byte have writers of their own.
            let _ =
                byte.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |before| Some(before & !mask | bits));
        }
    }

    /// Whether there is a way to the namespace (Base 8.1.3). Without Do Not Retry: another controller may have one.
    pub fn check_access(&self, nsid: u32) -> Result<(), Status> {
        match AccessState::from_value(self.of(nsid) >> ACCESS_SHIFT) {
            Some(AccessState::Inaccessible) => Err(Status::ACCESS_INACCESSIBLE),
            Some(AccessState::PersistentLoss) => Err(Status::ACCESS_PERSISTENT_LOSS),
            Some(AccessState::Change) => Err(Status::ACCESS_TRANSITION),
            _ => Ok(()),
        }
    }

    /// Whether an admin command may be processed that writes to the namespace or does away with it: Format NVM, Sanitize, Namespace
    /// Management, Namespace Attachment (Base 8.19, the write command group of "Command Behavior in the Presence of a Reservation").
    pub fn check_reserved(&self, nsid: u32) -> Result<(), Status> {
        if self.of(nsid) & WRITES == 0 { Ok(()) } else { Err(Status::RESERVATION_CONFLICT.do_not_retry()) }
    }

    /// Whether an I/O command may begin (Base 8.19, NVM 2.1.4: the figures "Command Behavior in the Presence of a Reservation"; and as
    /// [`Gate::check_access`]).
    pub fn check(&self, opcode: u8, nsid: u32) -> Result<(), Status> {
        match self.of(nsid) {
            0 => Ok(()),
            closed => {
                self.check_access(nsid)?;
                let reads = matches!(opcode, nvm::READ | nvm::COMPARE | nvm::VERIFY);
                let conflict = closed & if reads { READS } else { WRITES } != 0;
                if conflict { Err(Status::RESERVATION_CONFLICT.do_not_retry()) } else { Ok(()) }
            }
        }
    }

    fn of(&self, nsid: u32) -> u8 {
        let byte = (nsid as usize).checked_sub(1).and_then(|index| self.namespaces.get(index));
        byte.map_or(0, |byte| byte.load(Ordering::SeqCst))
    }
}
