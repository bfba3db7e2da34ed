//! The io_uring of a context. The only module with `unsafe`: it gives the kernel addresses.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::{with_exposed_provenance, with_exposed_provenance_mut};
use std::sync::Arc;

use bus::GuestMemory;
use io_uring::{IoUring, Probe, opcode, squeue, types};
use vmm_sys_util::eventfd::EventFd;

use crate::file::OpenFile;
use crate::transfer::{Distortion, Progress, Segment, Step, Transfer};
use crate::{Completion, Failure, KernelCounters, Request};
use files::Files;

mod files;
#[cfg(test)]
pub(crate) mod journal;

/// Entries that the kernel has at least before more are gathered for one call.
const FIRST_ENTRIES: u32 = 4;

/// A ring and its requests. Slot `n` has at most one entry in the kernel, with user data `n`.
///
/// What an entry points to (guest memory, the slot's segments and bounce buffer, the file) lives until its completion
/// was reaped: `memory` is kept by a clone, slots are emptied only then, and `drop` waits.
pub(crate) struct Ring {
    ring: IoUring,
    memory: GuestMemory,
    slots: Vec<Transfer>,
    /// For each slot, the place of its file in the ring's table.
    places: Vec<Option<u32>>,
    free: Vec<u32>,
    files: Files,
    /// Entries that the kernel has not seen yet.
    queued: u32,
    /// Entries whose completion was not reaped, the queued ones included.
    outstanding: u32,
    counters: Arc<KernelCounters>,
    #[cfg(test)]
    journal: Option<journal::Journal>,
}

impl Ring {
    /// A ring for `depth` requests that signals `event`.
    ///
    /// # Errors
    /// The kernel has no io_uring, not this process, or lacks an operation (ENOSYS).
    pub(crate) fn new(
        memory: GuestMemory,
        depth: u32,
        event: &EventFd,
        counters: Arc<KernelCounters>,
    ) -> io::Result<Self> {
        // Completions wait until this thread is in the kernel anyway, or is told by a flag (`enter`), instead of interrupting it.
        let cooperative =
            IoUring::builder().dontfork().setup_coop_taskrun().setup_taskrun_flag().build(depth);
        let ring = match cooperative {
            // Before 5.19.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
                IoUring::builder().dontfork().build(depth)?
            }
            result => result?,
        };
        let mut probe = Probe::new();
        ring.submitter().register_probe(&mut probe).map_err(|error| match error.raw_os_error() {
            // Before 5.6 there are rings, but neither probes nor all of the operations.
            Some(libc::EINVAL) => io::Error::from_raw_os_error(libc::ENOSYS),
            _ => error,
        })?;
        let needed = [
            opcode::Read::CODE,
            opcode::Write::CODE,
            opcode::Readv::CODE,
            opcode::Writev::CODE,
            opcode::Fsync::CODE,
            opcode::Fallocate::CODE,
        ];
        if !needed.into_iter().all(|code| probe.is_supported(code)) {
            return Err(io::Error::from_raw_os_error(libc::ENOSYS));
        }
        ring.submitter().register_eventfd(event.as_raw_fd())?;
        Ok(Self {
            files: Files::new(&ring),
            ring,
            memory,
            slots: (0..depth).map(|_| Transfer::new(false)).collect(),
            places: (0..depth).map(|_| None).collect(),
            free: (0..depth).rev().collect(),
            queued: 0,
            outstanding: 0,
            counters,
            #[cfg(test)]
            journal: None,
        })
    }

    /// Notes from now on what the ring asks for and hears.
    #[cfg(test)]
    pub(crate) fn record(&mut self, journal: journal::Journal) {
        self.journal = Some(journal);
    }

    /// Files that were registered.
    #[cfg(test)]
    pub(crate) fn registered_files(&self) -> usize {
        self.files.count()
    }

    /// Queues the first step of `request`.
    pub(crate) fn start(
        &mut self,
        file: Arc<OpenFile>,
        request: &Request<'_>,
        distortion: Distortion,
    ) -> Result<(), Failure> {
        let index = self.free.pop().ok_or(Failure::Io(libc::EAGAIN))?;
        self.places[index as usize] = self.files.place(&self.ring, &file);
        let begun = self.slots[index as usize].begin(&self.memory, file, request, distortion);
        let begun = begun.and_then(|()| self.queue(index));
        if begun.is_err() {
            self.free.push(index);
        }
        begun
    }

    /// Queues the next step of slot `index`.
    fn queue(&mut self, index: u32) -> Result<(), Failure> {
        let slot = &mut self.slots[index as usize];
        // The place in the table takes the descriptor's in the entry, and a flag says so.
        let (descriptor, flags) = match self.places[index as usize] {
            Some(place) => (place as RawFd, squeue::Flags::FIXED_FILE),
            None => (slot.descriptor(), squeue::Flags::empty()),
        };
        let step = slot.step(&self.memory)?;
        #[cfg(test)]
        if let Some(journal) = &self.journal {
            journal.note_step(index, &step);
        }
        let entry = entry(types::Fd(descriptor), &step).flags(flags).user_data(u64::from(index));
        // SAFETY: the entry's file, segments and the memory that these name stay valid until its completion is
        // reaped (see `Ring`).
        let pushed = unsafe { self.ring.submission().push(&entry) };
        pushed.map_err(|_| Failure::Io(libc::EAGAIN))?;
        self.queued += 1;
        self.outstanding += 1;
        // A disk that has little of ours begins with that while the rest is still on its way: the kernel holds back (plugs) what comes in
        // one call until it has seen all of it. The more the disk has, the more is gathered for a call.
        if self.queued >= FIRST_ENTRIES.max(self.outstanding - self.queued) {
            // On failure the call that follows all of them says why.
            let _ = self.enter();
        }
        Ok(())
    }

    /// Hands what is queued to the kernel, and lets it tell of ends that wait for a system call of this thread. One call does both.
    ///
    /// # Errors
    /// `WouldBlock` if the kernel is short of memory: try again. Others are final.
    pub(crate) fn enter(&mut self) -> io::Result<()> {
        let mut wanted = self.queued > 0 || self.owes_ends();
        while wanted {
            self.counters.note_enter();
            match self.ring.submit() {
                Ok(count) => {
                    let count = (count as u32).min(self.queued);
                    self.counters.note_entries(count);
                    self.queued -= count;
                    wanted = self.queued > 0;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {
                    return Err(io::ErrorKind::WouldBlock.into());
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Whether the kernel has not seen everything yet.
    pub(crate) fn has_queued(&self) -> bool {
        self.queued > 0
    }

    /// Whether completions make the event readable. One that came while they did not never will.
    pub(crate) fn set_event(&mut self, enabled: bool) {
        let completion = self.ring.completion();
        if enabled { completion.enable_eventfd() } else { completion.disable_eventfd() }
    }

    /// Whether the kernel has ends to tell of and waits for a system call of this thread.
    fn owes_ends(&mut self) -> bool {
        self.outstanding > self.queued && self.ring.submission().taskrun()
    }

    /// Whether there is something to reap.
    pub(crate) fn has_completions(&mut self) -> bool {
        self.outstanding > self.queued
            && (!self.ring.completion().is_empty() || self.ring.submission().taskrun())
    }

    /// Takes what has completed. Requests that go on are queued again.
    pub(crate) fn reap(&mut self, completions: &mut Vec<Completion>) {
        // One look: what a resubmission completes meanwhile is for the next call.
        let count = self.ring.completion().len();
        for _ in 0..count {
            let Some(completed) = self.ring.completion().next() else { return };
            self.outstanding -= 1;
            let index = completed.user_data() as u32;
            #[cfg(test)]
            if let Some(journal) = &self.journal {
                journal.note(journal::Moment::Ended { slot: index, result: completed.result() });
            }
            let slot = &mut self.slots[index as usize];
            let mut progress = slot.advance(&self.memory, completed.result());
            if progress == Progress::Again
                && let Err(failure) = self.queue(index)
            {
                progress = self.slots[index as usize].give_up(&self.memory, failure);
            }
            if let Progress::Done(result) = progress {
                self.free.push(index);
                let (token, lost) = self.slots[index as usize].token();
                #[cfg(test)]
                if let Some(journal) = &self.journal {
                    journal.note(journal::Moment::Told { token, success: result.is_ok() });
                }
                if !lost {
                    completions.push(Completion { token, result });
                }
            }
        }
    }
}

/// The submission queue entry of a step.
fn entry(descriptor: types::Fd, step: &Step<'_>) -> squeue::Entry {
    /// `Segment` has the layout of `iovec`.
    fn vector(segments: &[Segment]) -> (*const libc::iovec, u32) {
        (segments.as_ptr().cast(), segments.len() as u32)
    }
    match *step {
        // One run of memory, as most requests have: the kernel need not fetch a vector.
        Step::Read { segments: &[Segment { address, length }], offset_bytes }
            if length <= u32::MAX as usize =>
        {
            opcode::Read::new(descriptor, with_exposed_provenance_mut(address), length as u32)
                .offset(offset_bytes)
                .build()
        }
        Step::Write { segments: &[Segment { address, length }], offset_bytes, stable }
            if length <= u32::MAX as usize =>
        {
            let flags = if stable { libc::RWF_DSYNC } else { 0 };
            opcode::Write::new(descriptor, with_exposed_provenance(address), length as u32)
                .offset(offset_bytes)
                .rw_flags(flags)
                .build()
        }
        Step::Read { segments, offset_bytes } => {
            let (vector, count) = vector(segments);
            opcode::Readv::new(descriptor, vector, count).offset(offset_bytes).build()
        }
        Step::Write { segments, offset_bytes, stable } => {
            let (vector, count) = vector(segments);
            let flags = if stable { libc::RWF_DSYNC } else { 0 };
            opcode::Writev::new(descriptor, vector, count).offset(offset_bytes).rw_flags(flags).build()
        }
        Step::Allocate { mode, offset_bytes, length_bytes } => {
            opcode::Fallocate::new(descriptor, length_bytes)
                .offset(offset_bytes)
                .mode(mode.bits() as i32)
                .build()
        }
        Step::Synchronize => opcode::Fsync::new(descriptor).flags(types::FsyncFlags::DATASYNC).build(),
    }
}

impl Drop for Ring {
    /// Waits for the kernel: until then it may write into guest memory and bounce buffers.
    fn drop(&mut self) {
        while self.outstanding > 0 {
            match self.ring.submit_and_wait(1) {
                Ok(_) => {
                    let done = self.ring.completion().count() as u32;
                    self.outstanding -= done;
                }
                Err(error)
                    if matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY)) => {}
                Err(error) => {
                    log::error!(
                        "cannot wait for {} requests in flight: {error}; their memory is kept",
                        self.outstanding
                    );
                    mem::forget(mem::take(&mut self.slots));
                    mem::forget(self.memory.clone());
                    return;
                }
            }
        }
    }
}

impl std::fmt::Debug for Ring {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ring")
            .field("slots", &self.slots.len())
            .field("outstanding", &self.outstanding)
            .finish()
    }
}
