//! Keeping vCPUs out of the guest for a part of the time, so that it dirties its memory less.
//!
//! Time is cut into periods. At the start of each one every vCPU is told to rest for its share: it leaves the guest and waits for
//! commands, as a paused one does, but only until the rest is over. So whatever is asked of it ends the wait, and a pause or the end of
//! the throttling ends the rest.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use super::manager::Thread;
use crate::kvm::Error;

/// Short enough that a guest's timers and peers notice little, long enough that leaving the guest costs little of it.
const PERIOD: Duration = Duration::from_millis(50);

/// Slows down some vCPUs until it is stopped or dropped.
pub(super) struct Throttle {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    vcpus: Vec<Arc<Thread>>,
    /// What is taken from them; 0: it has ended. Held while they are told, so that nothing that was told before an end comes after it.
    percent: Mutex<u8>,
    changed: Condvar,
}

impl Throttle {
    /// Keeps `vcpus` out of the guest for `percent` of the time.
    ///
    /// # Errors
    /// [`Error::Throttle`].
    pub(super) fn start(vcpus: &[Arc<Thread>], percent: u8) -> Result<Self, Error> {
        let (percent, vcpus) = (Mutex::new(percent), vcpus.to_vec());
        let shared = Arc::new(Shared { vcpus, percent, changed: Condvar::new() });
        let thread = Builder::new().name("throttle".to_owned()).spawn({
            let shared = Arc::clone(&shared);
            move || shared.serve()
        });
        Ok(Self { shared, thread: Some(thread.map_err(Error::Throttle)?) })
    }

    /// Changes the share, unless it has ended; says whether.
    pub(super) fn set(&self, percent: u8) -> bool {
        let mut now = self.shared.lock();
        if *now == 0 {
            return false;
        }
        *now = percent;
        self.shared.changed.notify_all();
        true
    }

    /// Ends it at once. The thread ends by itself.
    pub(super) fn stop(&self) {
        let mut percent = self.shared.lock();
        if *percent > 0 {
            *percent = 0;
            self.shared.tell(None);
            self.shared.changed.notify_all();
        }
    }
}

impl Shared {
    fn serve(&self) {
        let mut percent = self.lock();
        while *percent > 0 {
            let period = Instant::now();
            self.tell(Some(period + PERIOD * u32::from(*percent) / 100));
            let before = *percent;
            // A new share counts from now on, not from the next period.
            let waited = self.changed.wait_timeout_while(percent, PERIOD, |now| *now == before);
            percent = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Has every vCPU rest until then, or no longer.
    fn tell(&self, until: Option<Instant>) {
        for vcpu in &self.vcpus {
            // One that is gone needs no rest.
            let _nobody_waits = vcpu.ask(move |vcpu| vcpu.rest(until));
        }
    }

    fn lock(&self) -> MutexGuard<'_, u8> {
        self.percent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Throttle {
    fn drop(&mut self) {
        self.stop();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            log::error!("the thread that slows vCPUs down panicked");
        }
    }
}
