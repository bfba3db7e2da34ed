//! Sanitize (Base 5.24, 8.20): every block of every namespace, attached or not, is erased or overwritten in the background, over resets
//! and migrations, and until that is done nothing reaches the namespaces.
//!
//! Block erase writes zeroes, and makes holes unless it must not deallocate. Overwrite writes its pattern, or the pattern and its
//! inverse in turn, as often as asked for, and gives the blocks back afterwards unless it must not. Each pass ends with a flush of
//! every namespace. There are no keys that a cryptographic erase could forget, and it is not offered.

use block::Operation;
use nvme_spec::event::Event;
use nvme_spec::log::{self, SanitizeStatusLog};
use nvme_spec::opcode::{self, admin};
use nvme_spec::persistent::{SanitizeCompletionEvent, SanitizeStartEvent, kind};
use nvme_spec::{NSID_BROADCAST, Status, SubmissionEntry, identify};

use crate::admin::{Admin, Answer, Pool};
use crate::maintenance::{Chunk, Next, Sweep};
use crate::namespace;
use crate::worker::{Step, flush_step};

/// Identify Controller SANICAP.
pub(crate) const CAPABILITIES: u32 = identify::SANICAP_BLOCK_ERASE
    | identify::SANICAP_OVERWRITE
    | identify::SANICAP_MEDIA_NOT_MODIFIED_AFTERWARDS;
/// Bits of CDW10 that mean something.
pub(crate) const COMMAND_BITS: u32 = 0x3ff;

/// How the most recent operation ended (Sanitize Status bits 2:0).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// There was none.
    Never,
    Succeeded,
    /// With `exited` the host has left the failure mode since.
    Failed {
        exited: bool,
    },
}

/// An operation that is not finished.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sanitizing {
    /// CDW11, Overwrite Pattern.
    pub pattern: u32,
    /// Passes over all namespaces that are complete.
    pub pass: u8,
    pub sweep: Sweep,
    /// No command that came before is in flight.
    pub quiet: bool,
}

/// What is known of sanitize operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Sanitize {
    /// CDW10 of the most recent one.
    pub command: u32,
    pub outcome: Outcome,
    /// Overwrites that the most recent one completed.
    pub passes: u8,
    pub running: Option<Sanitizing>,
}

impl Sanitize {
    pub fn new() -> Self {
        Self { command: 0, outcome: Outcome::Never, passes: 0, running: None }
    }

    /// What commands that may not be processed are answered with meanwhile.
    pub fn refusal(&self) -> Option<Status> {
        match (self.running, self.outcome) {
            (Some(_), _) => Some(Status::SANITIZE_IN_PROGRESS),
            (None, Outcome::Failed { exited: false }) => Some(Status::SANITIZE_FAILED),
            _ => None,
        }
    }

    /// Whether an admin command is processed all the same (Base figure "Sanitize Operations - Admin Commands Allowed").
    pub fn allows(&self, entry: &SubmissionEntry) -> bool {
        match entry.opcode {
            admin::ABORT
            | admin::ASYNC_EVENT_REQUEST
            | admin::CREATE_CQ
            | admin::CREATE_SQ
            | admin::DELETE_CQ
            | admin::DELETE_SQ
            | admin::DOORBELL_BUFFER_CONFIG
            | admin::GET_FEATURES
            | admin::IDENTIFY
            | admin::KEEP_ALIVE
            | admin::SET_FEATURES
            | admin::SANITIZE => true,
            // Those that the figure names, and those that a host needs to find them.
            admin::GET_LOG_PAGE => matches!(
                entry.cdw10 as u8,
                log::id::SUPPORTED_PAGES
                    | log::id::ERROR_INFORMATION
                    | log::id::SMART
                    | log::id::CHANGED_NAMESPACES
                    | log::id::COMMANDS_SUPPORTED
                    | log::id::ANA
                    | log::id::FEATURES_SUPPORTED
                    | log::id::RESERVATION_NOTIFICATION
                    | log::id::SANITIZE_STATUS
            ),
            _ => false,
        }
    }
}

/// The number of overwrites that a command asks for; 0 stands for 16.
fn overwrites(command: u32) -> u8 {
    match (command & 7, command >> 4 & 0xf) {
        (opcode::SANITIZE_OVERWRITE, 0) => 16,
        (opcode::SANITIZE_OVERWRITE, count) => count as u8,
        _ => 0,
    }
}

/// How often a command has all namespaces gone over: what was overwritten and may be deallocated is, at the end.
pub(crate) fn passes(command: u32) -> u8 {
    match overwrites(command) {
        0 => 1,
        count => count + u8::from(command & opcode::SANITIZE_NO_DEALLOCATE == 0),
    }
}

impl Admin {
    /// Sanitize: completes when the operation has begun.
    pub fn start_sanitize(&mut self, pool: &Pool, entry: &SubmissionEntry) -> Result<Answer, Status> {
        let action = entry.cdw10 & 7;
        let restricted = self.sanitize.command & opcode::SANITIZE_UNRESTRICTED_EXIT == 0;
        let failed = self.sanitize.outcome == Outcome::Failed { exited: false };
        if self.sanitize.running.is_some() {
            return Err(Status::SANITIZE_IN_PROGRESS.do_not_retry());
        }
        if !matches!(
            action,
            opcode::SANITIZE_EXIT_FAILURE_MODE | opcode::SANITIZE_BLOCK_ERASE | opcode::SANITIZE_OVERWRITE
        ) {
            return Err(Status::INVALID_FIELD.do_not_retry());
        }
        // "If the most recent sanitize operation failed in the restricted completion mode", only another restricted one leads on.
        if failed
            && restricted
            && (action == opcode::SANITIZE_EXIT_FAILURE_MODE
                || entry.cdw10 & opcode::SANITIZE_UNRESTRICTED_EXIT != 0)
        {
            return Err(Status::SANITIZE_FAILED.do_not_retry());
        }
        if action == opcode::SANITIZE_EXIT_FAILURE_MODE {
            if failed {
                self.sanitize.outcome = Outcome::Failed { exited: true };
                self.change_namespaces(pool, NSID_BROADCAST, |namespace| namespace.refusal = None);
                self.keep();
            }
            return Ok(Answer::Now(0));
        }
        if self.firmware.next != 0 {
            return Err(Status::FIRMWARE_NEEDS_CONTROLLER_RESET.do_not_retry());
        }
        if self.format.is_some() {
            return Err(Status::FORMAT_IN_PROGRESS);
        }
        if namespace::active(&self.allocated).any(|namespace| namespace.read_only) {
            return Err(Status::NAMESPACE_WRITE_PROTECTED.do_not_retry());
        }
        // Another controller's operation has one of them.
        let taken = namespace::active(&self.allocated).find_map(|ns| ns.refusal);
        if let Some(status) = taken.filter(|_| !failed) {
            return Err(status);
        }
        self.end_self_test(log::SELF_TEST_SANITIZED, None);
        let sweep = Sweep::new(NSID_BROADCAST);
        self.sanitize.command = entry.cdw10 & COMMAND_BITS;
        self.sanitize.passes = 0;
        self.sanitize.running = Some(Sanitizing { pattern: entry.cdw11, pass: 0, sweep, quiet: false });
        self.refuse_while_sanitizing(pool);
        let event = SanitizeStartEvent {
            sanicap: CAPABILITIES,
            command: self.sanitize.command,
            pattern: entry.cdw11,
        };
        self.log_event(pool, kind::SANITIZE_START, &event.to_bytes());
        self.keep();
        Ok(Answer::Now(0))
    }

    /// Has all namespaces answer what the operation, or its failure, asks for.
    pub(crate) fn refuse_while_sanitizing(&mut self, pool: &Pool) {
        let refusal = self.sanitize.refusal();
        self.change_namespaces(pool, NSID_BROADCAST, |namespace| namespace.refusal = refusal);
    }

    pub(crate) fn next_of_sanitize(&self) -> Next {
        let Some(running) = &self.sanitize.running else { return Next::Nothing };
        if !running.quiet {
            return Next::Quiet(running.sweep);
        }
        let Some(chunk) = running.sweep.next_chunk(&self.allocated) else { return Next::End };
        let step = Step {
            nsid: chunk.nsid,
            operation: self.sanitize_operation(running),
            offset_bytes: chunk.offset_bytes,
            length_bytes: chunk.length_bytes,
        };
        let flush = chunk.is_last.then(|| flush_step(chunk.nsid));
        let metadata = self.metadata_after_overwrite(running, &chunk);
        let steps = flush.into_iter().chain(metadata).chain([step]).collect();
        Next::Request { chunk, steps, write: true }
    }

    /// What is done to every block in the pass that is under way.
    fn sanitize_operation(&self, running: &Sanitizing) -> Operation {
        let command = self.sanitize.command;
        match overwrites(command) {
            0 => Operation::WriteZeroes {
                deallocate: command & opcode::SANITIZE_NO_DEALLOCATE == 0,
                fua: false,
            },
            overwrites if running.pass < overwrites => {
                // "If set to '1', then the Overwrite Pattern shall be inverted between passes."
                let inverted = command & opcode::SANITIZE_INVERT_PATTERN != 0 && running.pass % 2 == 1;
                Operation::Fill { pattern: if inverted { !running.pattern } else { running.pattern } }
            }
            _ => Operation::Discard,
        }
    }

    /// After the last overwrite metadata are as if they had never been written: the pattern is no protection information of its blocks.
    fn metadata_after_overwrite(&self, running: &Sanitizing, chunk: &Chunk) -> Option<Step> {
        let namespace = namespace::find(&self.allocated, chunk.nsid).ok()?;
        let start = namespace.metadata.map(|_| namespace.metadata_start())?.max(chunk.offset_bytes);
        let end = chunk.offset_bytes + chunk.length_bytes;
        if running.pass + 1 != overwrites(self.sanitize.command) || start >= end {
            return None;
        }
        let operation = Operation::WriteZeroes { deallocate: false, fua: false };
        Some(Step { nsid: chunk.nsid, operation, offset_bytes: start, length_bytes: end - start })
    }

    pub(crate) fn advance_sanitize(&mut self, chunk: &Chunk) {
        let command = self.sanitize.command;
        let Some(running) = &mut self.sanitize.running else { return };
        running.sweep.advance(chunk);
        if let Ok(namespace) = namespace::find(&self.allocated, chunk.nsid)
            && chunk.is_last
        {
            namespace.uncorrectable.heal(0, u64::MAX);
        }
        if running.sweep.next_chunk(&self.allocated).is_none() {
            running.pass += 1;
            self.sanitize.passes = running.pass.min(overwrites(command));
            if running.pass < passes(command) {
                running.sweep = Sweep::new(NSID_BROADCAST);
            }
        }
    }

    pub(crate) fn end_sanitize(&mut self, pool: &Pool, status: Status) {
        if self.sanitize.running.take().is_none() {
            return;
        }
        self.sanitize.outcome = match status.is_success() {
            true => Outcome::Succeeded,
            false => Outcome::Failed { exited: false },
        };
        self.refuse_while_sanitizing(pool);
        let log = self.sanitize_status();
        let event = SanitizeCompletionEvent { progress: log.progress, status: log.status, information: 0 };
        self.log_event(pool, kind::SANITIZE_COMPLETION, &event.to_bytes());
        pool.shared.events().queue(Event::SANITIZE_COMPLETED);
        self.keep();
    }

    /// The Sanitize Status log (Base 5.16.1.25). No times are estimated.
    pub(crate) fn sanitize_status(&self) -> SanitizeStatusLog {
        let sanitize = &self.sanitize;
        let progress = sanitize.running.map_or(0xffff, |running| {
            let all = u64::from(passes(sanitize.command));
            let whole = 0x1_0000 / all;
            (u64::from(running.pass) * whole + running.sweep.progress(&self.allocated, whole)).min(0xfffe)
        });
        let status = match (sanitize.running, sanitize.outcome) {
            (Some(_), _) => log::SANITIZE_IN_PROGRESS,
            (None, Outcome::Never) => log::SANITIZE_NEVER,
            (None, Outcome::Succeeded) => log::SANITIZE_SUCCEEDED,
            (None, Outcome::Failed { .. }) => log::SANITIZE_FAILED,
        };
        SanitizeStatusLog {
            progress: progress as u16,
            status: status | u16::from(sanitize.passes) << 3,
            command: sanitize.command,
            estimated_seconds: [log::NO_ESTIMATE; 6],
        }
    }
}
