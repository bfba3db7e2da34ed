//! Threads for libraries that wait for the disk, and the way of what they finish back to a worker.

use std::fmt;
use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use vmm_sys_util::eventfd::EventFd;

use crate::{Completion, Failure};

/// Threads of one image.
const THREADS: u32 = 4;

type Job = Box<dyn FnOnce() + Send>;

/// The threads of one image. Dropping them lets them finish what they were given.
pub(crate) struct Blocking {
    jobs: Option<Sender<Job>>,
    threads: Vec<JoinHandle<()>>,
}

impl Blocking {
    /// Starts the threads.
    pub(crate) fn new() -> io::Result<Self> {
        let (sender, receiver) = channel();
        let receiver = Arc::new(Mutex::new(receiver));
        let mut blocking = Self { jobs: Some(sender), threads: Vec::new() };
        for number in 0..THREADS {
            let receiver = Arc::clone(&receiver);
            let name = format!("image-{number}");
            blocking.threads.push(std::thread::Builder::new().name(name).spawn(move || run(&receiver))?);
        }
        Ok(blocking)
    }

    /// Lets a thread do `job`.
    pub(crate) fn start(&self, job: Job) {
        // Without threads nobody takes it, and what it holds ends with it.
        let _ = self.jobs.as_ref().map(|jobs| jobs.send(job));
    }
}

fn run(receiver: &Mutex<Receiver<Job>>) {
    loop {
        let job = lock(receiver).recv();
        match job {
            Ok(job) => job(),
            Err(_) => return,
        }
    }
}

impl Drop for Blocking {
    fn drop(&mut self) {
        self.jobs = None;
        for thread in self.threads.drain(..) {
            // A thread that panicked has nothing left to finish.
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for Blocking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Blocking").field("threads", &self.threads.len()).finish()
    }
}

/// Where one context finds what threads have finished for it.
#[derive(Debug)]
pub(crate) struct Mailbox {
    letters: Mutex<Letters>,
    settled: Condvar,
    event: EventFd,
}

#[derive(Debug, Default)]
struct Letters {
    done: Vec<Completion>,
    /// Tickets that are out.
    expected: u32,
}

impl Mailbox {
    /// An empty one that signals `event`.
    pub(crate) fn new(event: &EventFd) -> io::Result<Arc<Self>> {
        let event = event.try_clone()?;
        Ok(Arc::new(Self { letters: Mutex::default(), settled: Condvar::new(), event }))
    }

    /// A promise to complete `token`; with `lost` nobody hears of it.
    pub(crate) fn ticket(self: &Arc<Self>, token: u64, lost: bool) -> Ticket {
        lock(&self.letters).expected += 1;
        Ticket { mailbox: Arc::clone(self), token, lost, result: Err(Failure::Io(libc::EIO)) }
    }

    /// Takes what has been finished.
    pub(crate) fn take(&self, completions: &mut Vec<Completion>) {
        completions.append(&mut lock(&self.letters).done);
    }

    /// Waits until no ticket is out.
    pub(crate) fn settle(&self) {
        let mut letters = lock(&self.letters);
        while letters.expected > 0 {
            letters = self.settled.wait(letters).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

/// A request on its way through a thread. It ends with this value, whatever happens to the thread.
#[derive(Debug)]
pub(crate) struct Ticket {
    mailbox: Arc<Mailbox>,
    token: u64,
    lost: bool,
    result: Result<(), Failure>,
}

impl Ticket {
    /// Ends the request.
    pub(crate) fn complete(mut self, result: Result<(), Failure>) {
        self.result = result;
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut letters = lock(&self.mailbox.letters);
        letters.expected -= 1;
        if !self.lost {
            letters.done.push(Completion { token: self.token, result: self.result });
        }
        drop(letters);
        self.mailbox.settled.notify_all();
        // Fails only when the counter is full, and then it is readable anyway.
        let _ = self.mailbox.event.write(1);
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
