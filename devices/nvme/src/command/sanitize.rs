//! Sanitize (Base 5.24, 8.20): every block of every namespace, attached or not, is erased or overwritten in the background, over resets
//! and migrations, and until that is done nothing reaches the namespaces. The operation is the subsystem's: all controllers say the same
//! of it and refuse the same, and any of them goes on with it. Persistent memory regions are erased
//! first, and none may be enabled when it begins.
//!
//! Block erase writes zeroes, and makes holes unless it must not deallocate. Overwrite writes its pattern, or the pattern and its
//! inverse in turn, as often as asked for, and gives the blocks back afterwards unless it must not. Each pass ends with a flush of
//! every namespace. There are no keys that a cryptographic erase could forget, and it is not offered.

use std::sync::atomic::Ordering;

use block::Operation;
use nvme_spec::event::Event;
use nvme_spec::log::{self, SanitizeStatusLog};
use nvme_spec::opcode::{self, admin};
use nvme_spec::persistent::{SanitizeCompletionEvent, SanitizeStartEvent, kind};
use nvme_spec::{NSID_BROADCAST, Status, SubmissionEntry, identify};

use crate::admin::{Admin, Answer, Phase, Pool};
use crate::common::Common;
use crate::maintenance::{Chunk, Next, Sweep};
use crate::namespace::{self, Namespace};
use crate::subsystem::Contents;
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
    /// The controller that was asked for it, and reports its end (Base 8.20: "shall be reported only by that controller").
    pub by: u16,
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

/// What is done to every block in the pass that is under way.
fn operation(command: u32, running: &Sanitizing) -> Operation {
    match overwrites(command) {
        0 => Operation::WriteZeroes { deallocate: command & opcode::SANITIZE_NO_DEALLOCATE == 0, fua: false },
        overwrites if running.pass < overwrites => {
            // "If set to '1', then the Overwrite Pattern shall be inverted between passes."
            let inverted = command & opcode::SANITIZE_INVERT_PATTERN != 0 && running.pass % 2 == 1;
            Operation::Fill { pattern: if inverted { !running.pattern } else { running.pattern } }
        }
        _ => Operation::Discard,
    }
}

impl Admin {
    /// Sanitize: completes when the operation has begun.
    pub fn start_sanitize(&mut self, pool: &Pool, entry: &SubmissionEntry) -> Result<Answer, Status> {
        let action = entry.cdw10 & 7;
        let before = self.common.sanitize();
        let restricted = before.command & opcode::SANITIZE_UNRESTRICTED_EXIT == 0;
        let failed = before.outcome == Outcome::Failed { exited: false };
        if before.running.is_some() {
            return Err(Status::SANITIZE_IN_PROGRESS.do_not_retry());
        }
        if !matches!(
            action,
            opcode::SANITIZE_EXIT_FAILURE_MODE | opcode::SANITIZE_BLOCK_ERASE | opcode::SANITIZE_OVERWRITE
        ) {
            return Err(Status::INVALID_FIELD.do_not_retry());
        }
        // It is about the namespaces of all controllers, and a reservation on any of them keeps it away.
        for namespace in namespace::active(&self.allocated) {
            pool.shared.gate.check_reserved(namespace.nsid)?;
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
                self.common.lock().sanitize.outcome = Outcome::Failed { exited: true };
                self.refuse_while_sanitizing(pool);
                self.keep();
            }
            return Ok(Answer::Now(0));
        }
        if self.common.lock().firmware.next != 0 {
            return Err(Status::FIRMWARE_NEEDS_CONTROLLER_RESET.do_not_retry());
        }
        if self.format.is_some() {
            return Err(Status::FORMAT_IN_PROGRESS);
        }
        if !pool.shared.subsystem.regions.hold() {
            return Err(Status::SANITIZE_PROHIBITED_BY_REGION.do_not_retry());
        }
        let (command, pattern, by) = (entry.cdw10 & COMMAND_BITS, entry.cdw11, pool.shared.controller_id);
        let common = self.common.clone();
        let begins = |contents: &Contents| {
            let sanitize = &mut common.lock().sanitize;
            // Another controller has begun an operation since, or protected a namespace.
            if sanitize.running.is_some() {
                return Err(Status::SANITIZE_IN_PROGRESS.do_not_retry());
            }
            for allocated in contents.allocated() {
                allocated.is_at_rest().or_else(|status| if failed { Ok(()) } else { Err(status) })?;
                if allocated.namespace.read_only {
                    return Err(Status::NAMESPACE_WRITE_PROTECTED.do_not_retry());
                }
            }
            (sanitize.command, sanitize.passes) = (command, 0);
            let sweep = Sweep::new(NSID_BROADCAST);
            sanitize.running = Some(Sanitizing { pattern, pass: 0, sweep, quiet: false, by });
            Ok(())
        };
        let refuses = |namespace: &mut Namespace| namespace.refusal = Some(Status::SANITIZE_IN_PROGRESS);
        if let Err(status) = self.change_namespaces_if(pool, NSID_BROADCAST, begins, refuses) {
            let held = self.common.sanitize().refusal().is_some();
            pool.shared.subsystem.regions.set_held(held);
            return Err(status);
        }
        let event = SanitizeStartEvent { sanicap: CAPABILITIES, command, pattern };
        self.log_event(pool, kind::SANITIZE_START, &event.to_bytes());
        self.keep();
        Ok(Answer::Now(0))
    }

    /// Nothing reaches namespaces and persistent memory regions any more: the regions are erased, whatever is done to blocks.
    pub(crate) fn begin_sanitizing(&mut self, pool: &Pool) {
        let (subsystem, id) = (&pool.shared.subsystem, pool.shared.controller_id);
        {
            // Another controller may be about to begin it, or through with it, since this one looked: then the regions are the guest's
            // again. One operation follows on another only by changes of the namespaces.
            let common = &mut *self.common.lock();
            let waits = common.sanitize.running.is_some_and(|running| !running.quiet);
            if !waits || common.sanitizer.is_some() || !self.following.is_newest(subsystem) {
                return;
            }
            common.sanitizer = Some(id);
        }
        if let Err(error) = subsystem.regions.erase() {
            ::log::error!("a sanitize operation cannot erase a persistent memory region: {error}");
            return self.end_sanitize(pool, Status::INTERNAL_ERROR);
        }
        let common = &mut *self.common.lock();
        common.sanitize.running.iter_mut().for_each(|running| running.quiet = true);
        common.sanitizer = None;
    }

    /// Has all namespaces answer what the operation, or its failure, asks for, and no persistent memory region become ready.
    pub(crate) fn refuse_while_sanitizing(&mut self, pool: &Pool) {
        let refusal = self.common.sanitize().refusal();
        pool.shared.subsystem.regions.set_held(refusal.is_some());
        self.change_namespaces(pool, NSID_BROADCAST, |namespace| namespace.refusal = refusal);
    }

    /// What every controller does when an operation has begun, whichever was asked for it (Base 8.20): it ends its self-test, and clears
    /// the event that the last operation has ended.
    pub(crate) fn follow_sanitize(&mut self, pool: &Pool) {
        if self.common.sanitize().running.is_some() {
            self.end_self_test(log::SELF_TEST_SANITIZED, None);
            pool.shared.events().queued.retain(|event| *event != Event::SANITIZE_COMPLETED);
        }
    }

    /// Tells of the end of an operation that this controller was asked for.
    pub(crate) fn tell_of_sanitize(&mut self, pool: &Pool) {
        let gate = &pool.shared.gate;
        if gate.sanitized.load(Ordering::SeqCst)
            && gate.sanitized.swap(false, Ordering::SeqCst)
            && self.phase == Phase::Ready
        {
            pool.shared.events().queue(Event::SANITIZE_COMPLETED);
        }
    }

    /// What controller `id` has to do for it: it goes on where the last request ended, whichever controller made that.
    pub(crate) fn next_of_sanitize(&self, id: u16) -> Next {
        let mut common = self.common.lock();
        let sanitize = common.sanitize;
        let Some(running) = &sanitize.running else { return Next::Nothing };
        if common.sanitizer.is_some_and(|by| by != id) {
            return Next::Nothing;
        }
        if !running.quiet {
            return Next::Quiet(running.sweep);
        }
        common.sanitizer = Some(id);
        let Some(chunk) = running.sweep.next_chunk(&self.allocated) else { return Next::End };
        let step = Step {
            nsid: chunk.nsid,
            operation: operation(sanitize.command, running),
            offset_bytes: chunk.offset_bytes,
            length_bytes: chunk.length_bytes,
        };
        let flush = chunk.is_last.then(|| flush_step(chunk.nsid));
        let metadata = self.metadata_after_overwrite(sanitize.command, running, &chunk);
        let steps = flush.into_iter().chain(metadata).chain([step]).collect();
        Next::Request { chunk, steps, write: true }
    }

    /// After the last overwrite metadata are as if they had never been written: the pattern is no protection information of its blocks.
    fn metadata_after_overwrite(&self, command: u32, running: &Sanitizing, chunk: &Chunk) -> Option<Step> {
        let namespace = namespace::find(&self.allocated, chunk.nsid).ok()?;
        let start = namespace.metadata.map(|_| namespace.metadata_start())?.max(chunk.offset_bytes);
        let end = chunk.offset_bytes + chunk.length_bytes;
        if running.pass + 1 != overwrites(command) || start >= end {
            return None;
        }
        let operation = Operation::WriteZeroes { deallocate: false, fua: false };
        Some(Step { nsid: chunk.nsid, operation, offset_bytes: start, length_bytes: end - start })
    }

    pub(crate) fn advance_sanitize(&mut self, chunk: &Chunk) {
        if let Ok(namespace) = namespace::find(&self.allocated, chunk.nsid)
            && chunk.is_last
        {
            namespace.uncorrectable.heal(0, u64::MAX);
        }
        let sanitize = &mut self.common.lock().sanitize;
        let command = sanitize.command;
        let Some(running) = &mut sanitize.running else { return };
        running.sweep.advance(chunk);
        if running.sweep.next_chunk(&self.allocated).is_none() {
            running.pass += 1;
            sanitize.passes = running.pass.min(overwrites(command));
            if running.pass < passes(command) {
                running.sweep = Sweep::new(NSID_BROADCAST);
            }
        }
    }

    pub(crate) fn end_sanitize(&mut self, pool: &Pool, status: Status) {
        let by = {
            let Common { sanitize, sanitizer, .. } = &mut *self.common.lock();
            *sanitizer = None;
            let Some(ended) = sanitize.running.take() else { return };
            sanitize.outcome = match status.is_success() {
                true => Outcome::Succeeded,
                false => Outcome::Failed { exited: false },
            };
            ended.by
        };
        self.refuse_while_sanitizing(pool);
        let log = self.sanitize_status();
        let event = SanitizeCompletionEvent { progress: log.progress, status: log.status, information: 0 };
        self.log_event(pool, kind::SANITIZE_COMPLETION, &event.to_bytes());
        pool.shared.subsystem.reservations.tell_of_sanitize(by);
        self.tell_of_sanitize(pool);
        self.keep();
    }

    /// The Sanitize Status log (Base 5.16.1.25). No times are estimated.
    pub(crate) fn sanitize_status(&self) -> SanitizeStatusLog {
        let sanitize = self.common.sanitize();
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
