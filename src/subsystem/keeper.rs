//! The thread that writes counters from time to time, so that a crash costs the last moments of them only.

use std::io;
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use nvme::Controller;

use super::Directory;

/// Between two writes.
pub const INTERVAL: Duration = Duration::from_secs(30);

/// Keeps the state of controllers until it is dropped.
pub struct Keeper {
    stop: Arc<(Mutex<bool>, Condvar)>,
    thread: Option<JoinHandle<()>>,
    controllers: Arc<Vec<(Arc<Controller>, Arc<Directory>)>>,
}

impl Keeper {
    /// Begins; there is no thread if there is nothing to keep.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn start(
        controllers: Vec<(Arc<Controller>, Arc<Directory>)>,
        interval: Duration,
    ) -> io::Result<Self> {
        let (stop, controllers) = (Arc::new((Mutex::new(false), Condvar::new())), Arc::new(controllers));
        let thread = (!controllers.is_empty()).then(|| {
            let (stop, controllers) = (Arc::clone(&stop), Arc::clone(&controllers));
            std::thread::Builder::new().name("nvme-state".to_owned()).spawn(move || {
                while !wait(&stop, interval) {
                    keep(&controllers);
                }
            })
        });
        Ok(Self { stop, thread: thread.transpose()?, controllers })
    }

    /// Writes now: at reset and at shutdown.
    pub fn keep(&self) {
        keep(&self.controllers);
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        *self.stop.0.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.stop.1.notify_all();
        // It logs what goes wrong, and has nothing else to say.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

/// Waits for `interval`; says whether it was to end meanwhile.
fn wait((stop, changed): &(Mutex<bool>, Condvar), interval: Duration) -> bool {
    let stopped = stop.lock().unwrap_or_else(PoisonError::into_inner);
    let (stopped, _) = changed
        .wait_timeout_while(stopped, interval, |stopped| !*stopped)
        .unwrap_or_else(PoisonError::into_inner);
    *stopped
}

fn keep(controllers: &[(Arc<Controller>, Arc<Directory>)]) {
    for (controller, directory) in controllers {
        // Before the guest is here, and after it has left, the folder is another's.
        if directory.is_held()
            && let Err(error) = controller.persist()
            && directory.is_held()
        {
            let source =
                std::error::Error::source(&error).map(|source| format!(": {source}")).unwrap_or_default();
            log::warn!("{error}{source}; what was written before is still there");
        }
    }
}
