//! Threads that stand in for io_uring where the kernel has none or does not let this process use it.
//!
//! The same state machine decides what to do; a thread makes its system calls one after the other, always through the
//! bounce buffer. Slower, but the same behaviour.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use bus::GuestMemory;
use rustix::io::ReadWriteFlags;
use vmm_sys_util::eventfd::EventFd;

use crate::file::OpenFile;
use crate::transfer::{Distortion, Progress, Step, Transfer};
use crate::{Completion, Failure, Request};

/// Threads of one context.
const THREADS: u32 = 4;

#[derive(Debug, Default)]
struct Work {
    jobs: VecDeque<Transfer>,
    done: Vec<(Transfer, Result<(), Failure>)>,
    stopping: bool,
}

#[derive(Debug)]
struct Shared {
    memory: GuestMemory,
    event: EventFd,
    work: Mutex<Work>,
    wake: Condvar,
}

impl Shared {
    fn work(&self) -> MutexGuard<'_, Work> {
        self.work.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The threads and the requests of one context.
#[derive(Debug)]
pub(crate) struct Pool {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    free: Vec<Transfer>,
    queued: Vec<Transfer>,
}

impl Pool {
    /// Threads for `depth` requests that signal `event`.
    pub(crate) fn new(memory: GuestMemory, depth: u32, event: &EventFd) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            memory,
            event: event.try_clone()?,
            work: Mutex::new(Work::default()),
            wake: Condvar::new(),
        });
        let mut pool = Self {
            shared,
            threads: Vec::new(),
            free: (0..depth).map(|_| Transfer::new(true)).collect(),
            queued: Vec::with_capacity(depth as usize),
        };
        for number in 0..THREADS.min(depth) {
            let shared = Arc::clone(&pool.shared);
            let name = format!("block-{number}");
            pool.threads.push(std::thread::Builder::new().name(name).spawn(move || run(&shared))?);
        }
        Ok(pool)
    }

    /// Queues `request`.
    pub(crate) fn start(
        &mut self,
        file: Arc<OpenFile>,
        request: &Request<'_>,
        distortion: Distortion,
    ) -> Result<(), Failure> {
        let mut transfer = self.free.pop().ok_or(Failure::Io(libc::EAGAIN))?;
        let begun = transfer.begin(&self.shared.memory, file, request, distortion);
        if begun.is_ok() {
            self.queued.push(transfer)
        } else {
            self.free.push(transfer)
        }
        begun
    }

    /// Hands what is queued to the threads.
    pub(crate) fn enter(&mut self) {
        if !self.queued.is_empty() {
            self.shared.work().jobs.extend(self.queued.drain(..));
            self.shared.wake.notify_all();
        }
    }

    /// Takes what has completed.
    pub(crate) fn reap(&mut self, completions: &mut Vec<Completion>) {
        for (transfer, result) in self.shared.work().done.drain(..) {
            let (token, lost) = transfer.token();
            if !lost {
                completions.push(Completion { token, result });
            }
            self.free.push(transfer);
        }
    }
}

impl Drop for Pool {
    /// Lets the threads finish what they were given.
    fn drop(&mut self) {
        self.enter();
        self.shared.work().stopping = true;
        self.shared.wake.notify_all();
        for thread in self.threads.drain(..) {
            // A thread that panicked has nothing left to finish.
            let _ = thread.join();
        }
    }
}

/// What a thread does until it is stopped and nothing is left to do.
fn run(shared: &Shared) {
    let mut work = shared.work();
    loop {
        if let Some(mut transfer) = work.jobs.pop_front() {
            drop(work);
            let result = carry_out(&mut transfer, &shared.memory);
            work = shared.work();
            work.done.push((transfer, result));
            // Fails only when the counter is full, and then it is readable anyway.
            let _ = shared.event.write(1);
        } else if work.stopping {
            return;
        } else {
            work = shared.wake.wait(work).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// Makes the system calls of one request until it ends.
fn carry_out(transfer: &mut Transfer, memory: &GuestMemory) -> Result<(), Failure> {
    let file = transfer.file().ok_or(Failure::Released)?;
    loop {
        let result = match call(transfer, memory, &file) {
            Ok(result) => result,
            Err(failure) => match transfer.give_up(memory, failure) {
                Progress::Done(result) => return result,
                Progress::Again => continue,
            },
        };
        let result = result.unwrap_or_else(|error| -error.raw_os_error());
        if let Progress::Done(result) = transfer.advance(memory, result) {
            return result;
        }
    }
}

/// Makes the next system call.
fn call(
    transfer: &mut Transfer,
    memory: &GuestMemory,
    file: &OpenFile,
) -> Result<rustix::io::Result<i32>, Failure> {
    let file = file.file();
    let length = |segments: &[crate::transfer::Segment]| segments.iter().map(|segment| segment.length).sum();
    Ok(match transfer.step(memory)? {
        Step::Read { segments, offset_bytes } => {
            let length: usize = length(segments);
            let bytes = IoSliceMut::new(&mut transfer.bounce_bytes()[..length]);
            rustix::io::preadv(file, &mut [bytes], offset_bytes).map(|count| count as i32)
        }
        Step::Write { segments, offset_bytes, stable } => {
            let length: usize = length(segments);
            let flags = if stable { ReadWriteFlags::DSYNC } else { ReadWriteFlags::empty() };
            let bytes = IoSlice::new(&transfer.bounce_bytes()[..length]);
            rustix::io::pwritev2(file, &[bytes], offset_bytes, flags).map(|count| count as i32)
        }
        Step::Allocate { mode, offset_bytes, length_bytes } => {
            rustix::fs::fallocate(file, mode, offset_bytes, length_bytes).map(|()| 0)
        }
        Step::Synchronize => rustix::fs::fdatasync(file).map(|()| 0),
    })
}
