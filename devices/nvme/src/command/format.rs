//! Format NVM (Base 5.14): every block of a namespace, or of all, is erased, and the namespace gets the LBA format that is asked for.
//!
//! The erasure runs in the background; the command completes when it has ended. Until then commands to the namespaces that are not done
//! yet are answered Format In Progress. It goes on after a reset, when nobody is there any more to be answered. The erasure is the
//! same with and without secure erase: zeroes, and holes where the image can have them, on stable storage. There are no keys that a
//! cryptographic erase could forget, and it is not offered (Identify Controller FNA bit 2).
//!
//! The format is a state of the namespace, which is saved and taken over by whoever restores the controller; that its image was
//! opened with another block size says nothing then. A controller without a place for what outlives its power begins with the block size
//! that it was configured with.

use block::Operation;
use nvme_spec::log;
use nvme_spec::persistent::{FormatCompletionEvent, FormatStartEvent, kind};
use nvme_spec::{NSID_BROADCAST, Status, SubmissionEntry};

use crate::admin::{Admin, Answer, Pool};
use crate::maintenance::{Chunk, Next, Sweep};
use crate::metadata::BlockFormat;
use crate::namespace::{self, Namespace};
use crate::subsystem::Contents;
use crate::worker::{Step, flush_step};

/// CDW10 bits 11:9: no secure erase, or erase of user data.
const SECURE_ERASE_MAX: u32 = 1;

/// A format that is not finished.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Format {
    /// The command, if it can still be answered.
    pub cid: Option<u16>,
    /// What the namespaces get.
    pub format: BlockFormat,
    pub sweep: Sweep,
    /// No command that came before is in flight in its namespaces.
    pub quiet: bool,
}

impl Format {
    /// Whether the namespace waits for it.
    pub fn holds(&self, nsid: u32) -> bool {
        self.sweep.covers(nsid) && nsid >= self.sweep.nsid
    }
}

impl Admin {
    /// Format NVM.
    pub fn format_nvm(&mut self, pool: &Pool, entry: &SubmissionEntry) -> Result<Answer, Status> {
        let (format, secure_erase) = (entry.cdw10 & 0xf | entry.cdw10 >> 8 & 0x30, entry.cdw10 >> 9 & 7);
        let (extended, protection_type) = (entry.cdw10 & 1 << 4 != 0, (entry.cdw10 >> 5 & 7) as u8);
        let protection_first = entry.cdw10 & 1 << 8 != 0;
        if entry.nsid != NSID_BROADCAST {
            namespace::find(&self.namespaces, entry.nsid)?;
        }
        if self.format.is_some() {
            return Err(Status::FORMAT_IN_PROGRESS);
        }
        if secure_erase > SECURE_ERASE_MAX {
            return Err(Status::INVALID_FIELD.do_not_retry());
        }
        let sweep = Sweep::new(entry.nsid);
        for namespace in namespace::active(&self.namespaces).filter(|ns| sweep.covers(ns.nsid)) {
            pool.shared.gate.check_access(namespace.nsid)?;
            pool.shared.gate.check_reserved(namespace.nsid)?;
        }
        let concerned = || namespace::active(&self.namespaces).filter(|ns| sweep.covers(ns.nsid));
        // "Invalid Format": it does not exist, has no room for protection information, or the image has not a whole number of its blocks.
        let format = BlockFormat::new(format as usize, extended, protection_type, protection_first)
            .filter(|format| concerned().all(|namespace| namespace.can_have(format)))
            .ok_or(Status::INVALID_FORMAT.do_not_retry())?;
        let begun = Format { cid: Some(entry.cid), format, sweep, quiet: false };
        let (common, id) = (self.common.clone(), pool.shared.controller_id);
        let begins = |contents: &Contents| {
            for allocated in contents.allocated().filter(|allocated| sweep.covers(allocated.namespace.nsid)) {
                if allocated.attached.contains(&id) && allocated.namespace.read_only {
                    return Err(Status::NAMESPACE_WRITE_PROTECTED.do_not_retry());
                }
                // Another controller's operation has it.
                allocated.is_at_rest()?;
            }
            common.lock().formats.insert(id, begun);
            Ok(())
        };
        let refuses = |namespace: &mut Namespace| namespace.refusal = Some(Status::FORMAT_IN_PROGRESS);
        self.change_namespaces_if(pool, entry.nsid, begins, refuses)?;
        self.format = Some(begun);
        if self.self_test.running.is_some_and(|test| test.sweep.meets(&sweep)) {
            self.end_self_test(log::SELF_TEST_FORMATTED, None);
        }
        let event = FormatStartEvent { nsid: entry.nsid, fna: 0, command: entry.cdw10 };
        self.log_event(pool, kind::FORMAT_START, &event.to_bytes());
        Ok(Answer::Later)
    }

    /// Lets the other controllers know how far the format is, and one that is built anew in the place of this.
    pub(crate) fn tell_of_format(&self, pool: &Pool) {
        let formats = &mut self.common.lock().formats;
        match self.format {
            Some(format) => drop(formats.insert(pool.shared.controller_id, format)),
            None => drop(formats.remove(&pool.shared.controller_id)),
        }
    }

    pub(crate) fn next_of_format(&self) -> Next {
        let Some(format) = &self.format else { return Next::Nothing };
        if !format.quiet {
            return Next::Quiet(format.sweep);
        }
        let Some(chunk) = format.sweep.next_chunk(&self.namespaces) else { return Next::End };
        let erase = Step {
            nsid: chunk.nsid,
            operation: Operation::WriteZeroes { deallocate: true, fua: false },
            offset_bytes: chunk.offset_bytes,
            length_bytes: chunk.length_bytes,
        };
        let flush = chunk.is_last.then(|| flush_step(chunk.nsid));
        Next::Request { chunk, steps: flush.into_iter().chain([erase]).collect(), write: true }
    }

    pub(crate) fn advance_format(&mut self, pool: &Pool, chunk: &Chunk) {
        let Some(format) = &mut self.format else { return };
        format.sweep.advance(chunk);
        let format = format.format;
        self.tell_of_format(pool);
        if chunk.is_last {
            self.change_namespaces(pool, chunk.nsid, |namespace| {
                namespace.uncorrectable.heal(0, u64::MAX);
                namespace.set_format(&format);
                namespace.refusal = None;
            });
            self.tell_namespace_changed(pool, chunk.nsid);
        }
    }

    /// Those that were not reached keep their format, and their contents are undefined.
    pub(crate) fn end_format(&mut self, pool: &Pool, status: Status) {
        let remaining = self.format.and_then(|format| {
            let namespace = namespace::find(&self.namespaces, format.sweep.nsid).ok()?;
            Some(self.format_remaining(namespace))
        });
        let Some(format) = self.format.take() else { return };
        self.tell_of_format(pool);
        let event = FormatCompletionEvent {
            nsid: format.sweep.scope,
            smallest_fpi: remaining.unwrap_or(0),
            outcome: u8::from(!status.is_success()),
            information: 0,
            status: u32::from(status.0) << 1,
        };
        self.log_event(pool, kind::FORMAT_COMPLETION, &event.to_bytes());
        self.change_namespaces(pool, format.sweep.scope, |namespace| namespace.refusal = None);
        // A host that was told of success finds the format after a loss of power too.
        let kept = self.try_keep();
        if let Some(cid) = format.cid {
            self.end(cid, 0, if status.is_success() { kept.err().unwrap_or(status) } else { status });
        }
    }

    /// Identify Namespace FPI, without bit 7: percents that remain, rounded up.
    pub(crate) fn format_remaining(&self, namespace: &Namespace) -> u8 {
        let formats = self.common.lock().formats.clone();
        let Some(format) = formats.values().find(|format| format.holds(namespace.nsid)) else { return 0 };
        let here = format.sweep.nsid == namespace.nsid;
        let done_bytes = u128::from(if here { format.sweep.offset_bytes } else { 0 });
        let size_bytes = namespace.size_bytes();
        // At least one as long as it has not its new format.
        (size_bytes.saturating_sub(done_bytes) * 100).div_ceil(size_bytes.max(1)).clamp(1, 100) as u8
    }
}
