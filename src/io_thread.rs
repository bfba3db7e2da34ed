//! Threads that serve queues: one event-manager loop each.
//!
//! A *worker* is one share of a device's queues. It is driven by events only: its own wake-up descriptor (rung by a
//! doorbell, through KVM's ioeventfd or through [`WakeUp::ring`]) and the descriptors that it names itself (the completions
//! of its io_uring). A worker that has more to do than one turn allows rings itself again, so that workers on one
//! thread take turns. During a turn nothing is written to the wake-up's descriptor: a worker that looks for calls itself
//! ([`WakeUp::take_call`]) has no system call made for it.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use event_manager::{EventManager, EventOps, Events, MutEventSubscriber, RemoteEndpoint};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

/// One share of a device's queues.
pub trait Worker: Send {
    /// Serves what there is, within a bounded turn. `called`: by [`WakeUp::ring`] or at its deadline; otherwise by KVM or a completion.
    /// `true`: there is more, call again.
    fn turn(&mut self, called: bool) -> bool;

    /// Eventfds (not blocking) that call for a turn, besides the wake-up. They are drained before the turn.
    ///
    /// # Errors
    /// The process has no descriptors left.
    fn completion_events(&self) -> io::Result<Vec<EventFd>>;

    /// When the worker wants a turn even if nothing calls for it. Asked after every turn.
    fn deadline(&self) -> Option<Instant>;

    /// Time has passed in which it had [no turn](IoThread::hold), whatever called for one.
    fn stood_still(&mut self);
}

/// Calls a worker to its thread.
#[derive(Clone, Debug)]
pub struct WakeUp(Arc<Calls>);

#[derive(Debug)]
struct Calls {
    event: EventFd,
    /// Somebody has called since the worker looked last.
    called: AtomicBool,
    /// The worker is in its turn, and looks at `called` before that is over.
    in_turn: AtomicBool,
    /// Writes of this process to `event`: a system call each.
    written: AtomicU64,
    /// All writes to `event` that its thread has seen, those of KVM's ioeventfds included.
    drained: AtomicU64,
}

/// How often a worker was called through its descriptor.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct WakeUpStatistics {
    /// By this process, with a system call.
    pub written: u64,
    /// By KVM, for doorbells that the guest rang: the vCPU left the guest for each, though not the kernel.
    pub rung: u64,
}

impl WakeUp {
    /// A new one.
    ///
    /// # Errors
    /// The process has no descriptors left.
    pub fn new() -> io::Result<Self> {
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Self(Arc::new(Calls {
            event,
            called: AtomicBool::new(false),
            in_turn: AtomicBool::new(false),
            written: AtomicU64::new(0),
            drained: AtomicU64::new(0),
        })))
    }

    /// Calls the worker. Ringing several times before it looks is one call.
    pub fn ring(&self) {
        // Against `end_turn`, which does the same two steps the other way round: one of the two sees the other's write.
        self.0.called.store(true, Ordering::SeqCst);
        if !self.0.in_turn.load(Ordering::SeqCst) {
            self.write();
        }
    }

    /// Whether somebody has called since the last look: for the worker, in its turn.
    #[must_use]
    pub fn take_call(&self) -> bool {
        // Looked at first: most looks find nothing, and need not take the line from those who call.
        self.0.called.load(Ordering::Relaxed) && self.0.called.swap(false, Ordering::SeqCst)
    }

    /// The descriptor, for an ioeventfd.
    #[must_use]
    pub fn event_fd(&self) -> &EventFd {
        &self.0.event
    }

    /// The numbers now.
    #[must_use]
    pub fn statistics(&self) -> WakeUpStatistics {
        // Drained first: what is written meanwhile is not taken for KVM's.
        let drained = self.0.drained.load(Ordering::Acquire);
        let written = self.0.written.load(Ordering::Acquire);
        WakeUpStatistics { written, rung: drained.saturating_sub(written) }
    }

    /// Clears the descriptor, whose value is the number of writes since it was cleared last.
    fn drain(&self) {
        // Not blocking; an event that someone else has drained is fine.
        if let Ok(count) = self.0.event.read() {
            self.0.drained.fetch_add(count, Ordering::AcqRel);
        }
    }

    fn begin_turn(&self) {
        self.0.in_turn.store(true, Ordering::SeqCst);
    }

    /// From here on calls need the descriptor. One that came before is due, as is one of the worker itself, for `more`.
    fn end_turn(&self, more: bool) {
        self.0.in_turn.store(false, Ordering::SeqCst);
        if more || self.0.called.load(Ordering::SeqCst) {
            self.write();
        }
    }

    fn write(&self) {
        self.0.written.fetch_add(1, Ordering::AcqRel);
        // The only error is a full counter, which is a pending call all the same.
        let _ = self.0.event.write(1);
    }
}

type Manager = EventManager<Box<dyn MutEventSubscriber>>;

/// A running thread. Dropping it ends the thread after its current turn.
pub struct IoThread {
    endpoint: RemoteEndpoint<Box<dyn MutEventSubscriber>>,
    /// Its workers have no turns.
    held: Arc<AtomicBool>,
    wake_ups: Mutex<Vec<WakeUp>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl IoThread {
    /// Starts a thread that has no worker yet.
    ///
    /// # Errors
    /// The thread or its epoll descriptor could not be made.
    pub fn spawn(name: &str) -> io::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let (sender, receiver) = std::sync::mpsc::channel();
        let stop_in_thread = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            let mut manager = match Manager::new() {
                Ok(manager) => manager,
                Err(error) => {
                    let _ = sender.send(Err(io::Error::other(error)));
                    return;
                }
            };
            let _ = sender.send(Ok(manager.remote_endpoint()));
            while !stop_in_thread.load(Ordering::Acquire) {
                if let Err(error) = manager.run() {
                    log::error!("an I/O thread cannot wait for events: {error}");
                    return;
                }
            }
        })?;
        let endpoint = receiver.recv().map_err(io::Error::other)??;
        Ok(Self { endpoint, held: Arc::default(), wake_ups: Mutex::default(), stop, thread: Some(thread) })
    }

    /// No worker begins a turn until [`Self::go_on`]. Does not wait for a turn that goes on, which may wait for what comes only then.
    pub fn hold(&self) {
        self.held.store(true, Ordering::SeqCst);
    }

    /// Ends a [hold](Self::hold): every worker has a turn, in which it finds what called for it meanwhile. Harmless without.
    pub fn go_on(&self) {
        if self.held.swap(false, Ordering::SeqCst) {
            self.wake_ups.lock().unwrap_or_else(PoisonError::into_inner).iter().for_each(WakeUp::ring);
        }
    }

    /// Gives `worker` to this thread; it has a first turn at once.
    ///
    /// # Errors
    /// The thread has ended, or the process has no descriptors left.
    pub fn add(&self, worker: Box<dyn Worker>, wake_up: WakeUp) -> io::Result<()> {
        let completions = worker.completion_events()?;
        let timer = TimerFd::new()?;
        wake_up.ring();
        self.wake_ups.lock().unwrap_or_else(PoisonError::into_inner).push(wake_up.clone());
        let held = Arc::clone(&self.held);
        self.endpoint
            .call_blocking(move |operations| -> Result<(), event_manager::Error> {
                let subscriber =
                    Subscriber { worker, wake_up, completions, timer, armed: None, held, stood_still: false };
                operations.add_subscriber(Box::new(subscriber));
                Ok(())
            })
            .map_err(io::Error::other)
    }
}

impl Drop for IoThread {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        let _ = self.endpoint.kick();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

struct Subscriber {
    worker: Box<dyn Worker>,
    wake_up: WakeUp,
    completions: Vec<EventFd>,
    timer: TimerFd,
    /// When the timer goes off.
    armed: Option<Instant>,
    held: Arc<AtomicBool>,
    /// It was called while it was held.
    stood_still: bool,
}

impl Subscriber {
    fn events(&self) -> impl Iterator<Item = &EventFd> {
        self.completions.iter().chain([self.wake_up.event_fd()])
    }

    /// Makes the timer go off at the worker's deadline or before. A deadline that keeps moving away, as a keep alive timer's
    /// does, costs a system call only when the timer goes off too early.
    fn arm(&mut self) {
        let Some(deadline) = self.worker.deadline() else { return };
        if self.armed.is_some_and(|armed| armed <= deadline) {
            return;
        }
        // A timer of zero length would be switched off.
        let wait = deadline.saturating_duration_since(Instant::now()).max(Duration::from_micros(1));
        match self.timer.reset(wait, None) {
            Ok(()) => self.armed = Some(deadline),
            Err(error) => log::error!("an I/O thread cannot set its timer: {error}"),
        }
    }
}

impl MutEventSubscriber for Subscriber {
    fn init(&mut self, operations: &mut EventOps) {
        let watched = self.events().map(AsRawFd::as_raw_fd).chain([self.timer.as_raw_fd()]);
        for descriptor in watched {
            if let Err(error) = operations.add(Events::new_raw(descriptor, EventSet::IN)) {
                log::error!("an I/O thread cannot watch an event: {error}");
            }
        }
    }

    fn process(&mut self, events: Events, _: &mut EventOps) {
        let late = events.fd() == self.timer.as_raw_fd();
        if late {
            self.armed = None;
            let _ = self.timer.wait();
        } else if events.fd() == self.wake_up.event_fd().as_raw_fd() {
            self.wake_up.drain();
        } else if let Some(event) = self.completions.iter().find(|event| event.as_raw_fd() == events.fd()) {
            // As in `WakeUp::drain`.
            let _ = event.read();
        }
        if self.held.load(Ordering::SeqCst) {
            // All who are held are called when that ends.
            self.stood_still = true;
            return;
        }
        if std::mem::take(&mut self.stood_still) {
            self.worker.stood_still();
        }
        self.wake_up.begin_turn();
        let called = self.wake_up.take_call();
        let more = self.worker.turn(called || late);
        self.wake_up.end_turn(more);
        self.arm();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;
    use crate::machine::Waiters;
    use crate::memory::{GuestRam, PAGE_SIZE_BYTES, RamBlock};
    use crate::userfault::{Fault, Userfault};

    struct Countdown {
        turns: u32,
        /// The timer, not the worker, calls for the last turns.
        timed_turns: u32,
        report: mpsc::Sender<u32>,
    }

    impl Worker for Countdown {
        fn turn(&mut self, _: bool) -> bool {
            self.turns -= 1;
            self.report.send(self.turns).unwrap();
            self.turns > self.timed_turns
        }

        fn completion_events(&self) -> io::Result<Vec<EventFd>> {
            Ok(Vec::new())
        }

        fn deadline(&self) -> Option<Instant> {
            (self.turns == self.timed_turns).then(Instant::now)
        }

        fn stood_still(&mut self) {
            panic!("nobody held it");
        }
    }

    #[test]
    fn a_worker_has_turns_until_it_is_done_and_then_when_it_is_called() {
        let thread = IoThread::spawn("io-test").unwrap();
        let (report, reports) = mpsc::channel();
        let wake_up = WakeUp::new().unwrap();
        thread.add(Box::new(Countdown { turns: 3, timed_turns: 1, report }), wake_up.clone()).unwrap();
        assert_eq!(reports.iter().take(3).collect::<Vec<_>>(), [2, 1, 0]);
        drop(thread);
        assert!(reports.recv().is_err(), "the worker is gone with its thread");
        wake_up.ring();
    }

    /// Tells of every turn that it was called for.
    struct Echo(mpsc::Sender<()>);

    impl Worker for Echo {
        fn turn(&mut self, called: bool) -> bool {
            if called {
                self.0.send(()).unwrap();
            }
            false
        }

        fn completion_events(&self) -> io::Result<Vec<EventFd>> {
            Ok(Vec::new())
        }

        fn deadline(&self) -> Option<Instant> {
            None
        }

        fn stood_still(&mut self) {
            self.0.send(()).unwrap();
        }
    }

    #[test]
    fn a_worker_that_is_held_has_its_turn_afterwards_and_is_told() {
        let held = IoThread::spawn("io-test").unwrap();
        let ((report, reports), wake_up) = (mpsc::channel(), WakeUp::new().unwrap());
        held.add(Box::new(Echo(report)), wake_up.clone()).unwrap();
        reports.recv_timeout(Duration::from_secs(30)).unwrap();
        held.hold();
        wake_up.ring();
        // The thread does what it is asked after what it was called for before.
        let (report, _reports_of_another) = mpsc::channel();
        held.add(Box::new(Echo(report)), WakeUp::new().unwrap()).unwrap();
        assert!(reports.try_recv().is_err(), "it had a turn");
        held.go_on();
        let told = [(); 2].map(|()| reports.recv_timeout(Duration::from_secs(30)));
        assert_eq!(told, [Ok(()), Ok(())], "that it stood still, and a turn");
        held.go_on();
    }

    /// Reads a word of the next page of guest memory in each turn, as a command that is fetched from there.
    struct Reader {
        block: RamBlock,
        page: u64,
        report: mpsc::Sender<[u8; 4]>,
    }

    impl Worker for Reader {
        fn turn(&mut self, _: bool) -> bool {
            let mut word = [0; 4];
            self.block.read(self.page * PAGE_SIZE_BYTES, &mut word).unwrap();
            self.page += 1;
            self.report.send(word).unwrap();
            false
        }

        fn completion_events(&self) -> io::Result<Vec<EventFd>> {
            Ok(Vec::new())
        }

        fn deadline(&self) -> Option<Instant> {
            None
        }

        fn stood_still(&mut self) {
            panic!("nobody held it");
        }
    }

    /// As in a guest that has run ahead of its memory: one page stays away, and the others come when they are touched.
    #[test]
    fn a_thread_that_waits_for_memory_keeps_no_other_from_its_commands() {
        const AWAY: u64 = 200;
        const COMMANDS: usize = 100;
        let ram = GuestRam::new(1 << 20, &[]).unwrap();
        let userfault = Userfault::register(ram.blocks()).unwrap();
        let waiters = Waiters::default();
        let (waits, waited_for) = mpsc::channel();
        let bring = |page: u64| {
            userfault.place(0, page * PAGE_SIZE_BYTES, &[7; PAGE_SIZE_BYTES as usize]).unwrap();
            waiters.serve(0, &(page * PAGE_SIZE_BYTES..(page + 1) * PAGE_SIZE_BYTES));
        };
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut faults = Vec::new();
                loop {
                    faults.clear();
                    userfault.faults(&mut faults).unwrap();
                    if faults.is_empty() {
                        return;
                    }
                    for Fault { offset, thread, .. } in faults.iter().copied() {
                        waiters.add(thread, 0, offset);
                        match offset / PAGE_SIZE_BYTES {
                            AWAY => waits.send(thread).unwrap(),
                            page => bring(page),
                        }
                    }
                }
            });
            let (one, other) = (IoThread::spawn("io-one").unwrap(), IoThread::spawn("io-other").unwrap());
            let give = |thread: &IoThread, page: u64| {
                let ((report, reports), wake_up) = (mpsc::channel(), WakeUp::new().unwrap());
                let reader = Reader { block: ram.blocks()[0].clone(), page, report };
                thread.add(Box::new(reader), wake_up.clone()).unwrap();
                (reports, wake_up)
            };
            let (held, _) = give(&one, AWAY);
            let thread = waited_for.recv_timeout(Duration::from_secs(30)).unwrap();
            let (reports, wake_up) = give(&other, 0);
            let command = |_| {
                wake_up.ring();
                reports.recv_timeout(Duration::from_secs(30))
            };
            let done: Vec<_> = (0..COMMANDS).map_while(|number| command(number).ok()).collect();
            let (still_waits, nothing_came) = (waiters.has(thread), held.try_recv().is_err());
            // First this: a thread that waits cannot be joined.
            bring(AWAY);
            let came = held.recv_timeout(Duration::from_secs(30));
            drop((one, other));
            userfault.end();
            assert_eq!(done, [[7; 4]; COMMANDS]);
            assert!(still_waits && nothing_came);
            assert_eq!(came, Ok([7; 4]));
        });
    }

    #[test]
    fn a_call_is_never_lost_whenever_it_comes() {
        let thread = IoThread::spawn("io-test").unwrap();
        let (report, reports) = mpsc::channel();
        let wake_up = WakeUp::new().unwrap();
        thread.add(Box::new(Echo(report)), wake_up.clone()).unwrap();
        // Each ring comes at about the end of the turn that answered the one before.
        for round in 0..20_000 {
            let answer = reports.recv_timeout(Duration::from_secs(30));
            assert_eq!(answer, Ok(()), "call {round} is lost");
            wake_up.ring();
        }
    }

    #[test]
    fn a_worker_in_its_turn_is_called_without_its_descriptor() {
        let wake_up = WakeUp::new().unwrap();
        wake_up.begin_turn();
        wake_up.ring();
        assert!(wake_up.event_fd().read().is_err(), "nothing was written");
        assert!(wake_up.take_call() && !wake_up.take_call());
        wake_up.end_turn(false);
        assert!(wake_up.event_fd().read().is_err());
        wake_up.begin_turn();
        wake_up.ring();
        wake_up.end_turn(false);
        assert!(wake_up.event_fd().read().is_ok(), "a call that nobody took is due");
    }
}
