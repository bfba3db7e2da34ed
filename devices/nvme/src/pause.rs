//! How controllers are brought to a standstill.
//!
//! Those of one subsystem leave work for each other: a command that has changed the namespaces is complete when every controller has
//! followed, and an operation that goes on elsewhere changes them once more. So all are stopped together, and each is looked at again
//! until all are quiet at once.

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use crate::Error;
use crate::controller::{Controller, Progress};
use crate::shared::lock;

/// How long a pause lets the backends work before it looks again.
const PAUSE_POLL: Duration = Duration::from_micros(20);

/// What was going on when a pause began.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PauseReport {
    /// Commands that backends were working on.
    pub in_flight_at_start: u32,
}

impl Controller {
    /// Stops fetching commands. Returns at once; what is in flight goes on, and [`Controller::process`] still reaps it.
    pub fn begin_pause(&self) {
        self.pool.shared.paused.store(true, Ordering::SeqCst);
    }

    /// Whether nothing is in flight and no reset, shutdown or deletion is half done.
    pub fn is_quiet(&self) -> bool {
        let admin = lock(&self.admin);
        let workers_are = (0..self.pool.workers.len()).all(|index| {
            let worker = self.pool.worker(index);
            worker.in_flight() == 0 && worker.admin_ended.is_empty()
        });
        workers_are && admin.is_quiet(&self.pool)
    }

    /// Stops fetching and waits until the backends have finished what is in flight; completions are posted as far as their
    /// queues have room and guest memory may be written, and interrupts raised. Returns with the controller held still:
    /// nothing touches guest memory until [`Controller::resume`]. The vCPUs are stopped before. Needs no worker thread, but
    /// tolerates them. Controllers of one subsystem are paused by [`Controller::pause_all`].
    ///
    /// # Errors
    /// [`Error::PauseTimeout`] at `deadline`. The controller still fetches nothing: the caller resumes it.
    pub fn pause(&self, deadline: Instant) -> Result<PauseReport, Error> {
        Self::pause_all(&[self], deadline)
    }

    /// As [`Controller::pause`], for all controllers of a machine.
    ///
    /// # Errors
    /// [`Error::PauseTimeout`] at `deadline`. None of the controllers fetches anything: the caller resumes them.
    pub fn pause_all(controllers: &[&Self], deadline: Instant) -> Result<PauseReport, Error> {
        controllers.iter().for_each(|controller| controller.begin_pause());
        let in_flight = |controller: &&Self| -> u32 {
            (0..controller.pool.workers.len()).map(|index| controller.pool.worker(index).in_flight()).sum()
        };
        let in_flight_at_start = controllers.iter().map(in_flight).sum();
        loop {
            let mut more = false;
            for controller in controllers {
                for index in 0..controller.pool.workers.len() {
                    more |= controller.process(index) == Progress::More;
                }
            }
            // Once all are, nothing is left that could make one of them busy again.
            if controllers.iter().all(|controller| controller.is_quiet()) {
                let now = Instant::now();
                controllers.iter().for_each(|controller| lock(&controller.admin).paused_at = Some(now));
                return Ok(PauseReport { in_flight_at_start });
            }
            if Instant::now() >= deadline {
                let in_flight = controllers.iter().map(|controller| controller.pool.shared.in_flight()).sum();
                return Err(Error::PauseTimeout { in_flight });
            }
            if !more {
                std::thread::sleep(PAUSE_POLL);
            }
        }
    }
}
