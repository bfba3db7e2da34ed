//! Workers on threads of their own that sleep until they are woken: a lost wake-up is a command that never ends.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use nvme_spec::opcode::nvm;
use nvme_spec::{CompletionEntry, SubmissionEntry, regs};
use vmm_sys_util::eventfd::EventFd;

use super::driver::{Guest, Interrupts, PATIENCE, contexts, guest_memory, namespace, transfer};
use crate::{Controller, ControllerConfig, Host, Progress};

/// Wakes threads that block in `read`.
struct Threads {
    wakes: Vec<EventFd>,
    stop: AtomicBool,
}

impl Host for Threads {
    fn wake(&self, worker: usize) {
        self.wakes[worker].write(1).unwrap();
    }
    fn set_doorbell_event(&self, _bar_offset: u64, _worker: usize, _enabled: bool) {}
    fn show_region(&self, _ready: bool) {}
    fn flush_region(&self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A guest with two queue pairs whose workers run on threads of their own.
fn with_threads(shadow: bool, plays: impl FnOnce(&mut Guest)) {
    let config = ControllerConfig { queue_pairs: 2, vectors: 3, ..ControllerConfig::new("THREADS") };
    let namespaces = vec![namespace(1, 64)];
    let memory = guest_memory();
    let (contexts, _) = contexts(&memory, 2, 16);
    let wakes = (0..2).map(|_| EventFd::new(0).unwrap()).collect();
    let threads = Arc::new(Threads { wakes, stop: AtomicBool::new(false) });
    let controller = Controller::new(
        config.clone(),
        memory.clone(),
        &namespaces,
        contexts,
        Arc::new(Interrupts::default()),
        threads.clone(),
    );
    let controller = Arc::new(controller.unwrap());
    std::thread::scope(|scope| {
        for worker in 0..2 {
            let (controller, threads) = (&controller, &threads);
            scope.spawn(move || {
                while !threads.stop.load(Ordering::SeqCst) {
                    threads.wakes[worker].read().unwrap();
                    while controller.process(worker) == Progress::More {}
                }
            });
        }
        // A test that fails ends too.
        let _ends = Ends(&threads);
        // The driver's own loop finds nobody to run: the threads do it all.
        let mut guest = Guest::around(config, namespaces, memory, controller.clone());
        let start = Instant::now();
        guest.start_enable();
        while guest.read32(regs::CSTS) & 1 == 0 {
            assert!(start.elapsed() < PATIENCE, "never ready");
            std::thread::yield_now();
        }
        if shadow {
            guest.use_shadow_doorbells();
        }
        guest.create_pair(1, 8);
        guest.create_pair(2, 3);
        plays(&mut guest);
    });
}

/// Ends the threads when it goes.
struct Ends<'a>(&'a Threads);

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        self.0.stop.store(true, Ordering::SeqCst);
        self.0.wake(0);
        self.0.wake(1);
    }
}

fn play(shadow: bool) {
    const ROUNDS: u64 = 3000;
    with_threads(shadow, |guest| {
        let mut start = Instant::now();
        let page = guest.pages(1);
        let mut pending = [0u64; 3];
        let mut done = 0;
        for round in 0..ROUNDS {
            let queue = (1 + round % 2) as u16;
            guest.push(queue, transfer(nvm::READ, 1, round % 64, 1, page));
            guest.ring(queue);
            pending[usize::from(queue)] += 1;
            // Sometimes several are outstanding, sometimes the worker has long been asleep.
            while pending[usize::from(queue)] >= if round % 7 < 3 { 1 } else { 2 } {
                let reaped = guest.reap(queue).len() as u64;
                pending[usize::from(queue)] -= reaped;
                done += reaped;
                if reaped > 0 {
                    // A host that is busy takes its time for all of them, but not for one.
                    start = Instant::now();
                }
                assert!(start.elapsed() < PATIENCE, "lost after {done} commands, shadow {shadow}");
                std::thread::yield_now();
            }
        }
        assert_eq!(done + pending.iter().sum::<u64>(), ROUNDS);
    });
}

#[test]
fn sleeping_workers_are_woken_by_mmio() {
    play(false);
}

#[test]
fn sleeping_workers_are_woken_with_shadow_doorbells() {
    play(true);
}

#[test]
fn fused_pairs_of_two_threads_count_every_success_once() {
    const ROUNDS: usize = 300;
    with_threads(true, |guest| {
        let start = Instant::now();
        // The block's first byte counts; both queues try to raise it from what they last knew.
        let pages: Vec<u64> = (0..256).map(|_| guest.pages(1)).collect();
        for (value, &page) in pages.iter().enumerate() {
            guest.write_bytes(page, &[value as u8; 512]);
        }
        let (mut successes, mut rounds) = (0, 0);
        let mut waiting: [Vec<CompletionEntry>; 2] = [Vec::new(), Vec::new()];
        let mut outstanding = [false; 2];
        while rounds < ROUNDS || outstanding.contains(&true) {
            for (queue, (waiting, outstanding)) in (1..).zip(waiting.iter_mut().zip(&mut outstanding)) {
                if !*outstanding && rounds < ROUNDS {
                    rounds += 1;
                    *outstanding = true;
                    let (old, new) = (pages[successes % 256], pages[(successes + 1) % 256]);
                    for (flags, opcode, page) in [(1, nvm::COMPARE, old), (2, nvm::WRITE, new)] {
                        guest.push(queue, SubmissionEntry { flags, ..transfer(opcode, 1, 9, 1, page) });
                    }
                    guest.ring(queue);
                }
                waiting.extend(guest.reap(queue));
                if let [compare, write] = waiting[..] {
                    assert_eq!(compare.status().is_success(), write.status().is_success());
                    successes += usize::from(write.status().is_success());
                    waiting.clear();
                    *outstanding = false;
                }
            }
            assert!(start.elapsed() < PATIENCE, "lost after {rounds} pairs");
            std::thread::yield_now();
        }
        let page = guest.pages(1);
        guest.push(1, transfer(nvm::READ, 1, 9, 1, page));
        guest.ring(1);
        while guest.reap(1).is_empty() {
            assert!(start.elapsed() < PATIENCE);
            std::thread::yield_now();
        }
        assert_eq!(usize::from(guest.read_bytes(page, 1)[0]), successes % 256);
        assert!(successes > 0);
    });
}
