//! Ctrl-C and its relatives, for a program that drives others.

use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::Context;
use rustix::process::{Signal, pidfd_send_signal};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::Process;

/// From its making on, SIGINT, SIGTERM and SIGHUP end the processes that it covers instead of this one: whoever waits for
/// them then fails, cleans up and returns. A second signal ends this process.
#[derive(Debug)]
pub struct Interruption(Arc<Mutex<State>>);

#[derive(Debug, Default)]
struct State {
    signal: Option<i32>,
    covered: Vec<OwnedFd>,
}

impl Interruption {
    /// Takes the signals.
    ///
    /// # Errors
    /// The handlers or their thread cannot be made.
    pub fn take() -> anyhow::Result<Self> {
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("cannot handle signals")?;
        let state = Arc::new(Mutex::new(State::default()));
        let shared = Arc::clone(&state);
        std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
            for signal in signals.forever() {
                let mut state = lock(&shared);
                if state.signal.replace(signal).is_some() {
                    std::process::exit(128 + signal);
                }
                state.covered.iter().for_each(end);
            }
        })?;
        Ok(Self(state))
    }

    /// Covers `process`; after a signal it is ended at once.
    ///
    /// # Errors
    /// No descriptor is left.
    pub fn cover(&self, process: &Process) -> anyhow::Result<()> {
        let handle = process.handle()?;
        let mut state = lock(&self.0);
        if state.signal.is_some() {
            end(&handle);
        }
        state.covered.push(handle);
        Ok(())
    }

    /// The signal that came, if one did.
    #[must_use]
    pub fn signal(&self) -> Option<i32> {
        lock(&self.0).signal
    }
}

fn end(process: &OwnedFd) {
    // An error means that it has ended already.
    let _ = pidfd_send_signal(process, Signal::KILL);
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_process_that_is_covered_too_late_is_ended() {
        let sleeper = || Process::spawn("sleeper", Path::new("/bin/sleep"), ["1000"]).unwrap();
        let interruption = Interruption(Arc::default());
        let (mut early, mut late) = (sleeper(), sleeper());
        interruption.cover(&early).unwrap();
        assert!(!early.has_ended().unwrap());
        lock(&interruption.0).signal = Some(SIGINT);
        interruption.cover(&late).unwrap();
        assert_eq!(late.wait(Duration::from_secs(30)).unwrap().to_string(), "signal 9");
        assert_eq!(interruption.signal(), Some(SIGINT));
    }
}
