//! Signals that end the process in order.

use std::sync::mpsc::Sender;

use anyhow::{Context, ensure};
use rustix::process::Signal;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use super::Request;

/// From here on SIGINT, SIGTERM and SIGHUP become requests; the second one ends the process at once.
///
/// # Errors
/// The handlers or their thread cannot be made.
pub fn forward(requests: Sender<Request>) -> anyhow::Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("cannot handle signals")?;
    std::thread::Builder::new().name("signals".to_owned()).spawn(move || {
        let mut pending = signals.forever();
        if let Some(signal) = pending.next() {
            // Without a main thread there is nothing left to end.
            let _ = requests.send(Request::Signal(signal));
        }
        if let Some(signal) = pending.next() {
            std::process::exit(128 + signal);
        }
    })?;
    Ok(())
}

/// From here on the end of the process that started this one, or of its thread that did, is the end of this one.
///
/// # Errors
/// The kernel cannot do it.
pub fn end_with_parent() -> anyhow::Result<()> {
    let parent = rustix::process::getppid();
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))
        .context("cannot end with the parent process")?;
    // It may have ended before: then someone else is the parent by now.
    ensure!(rustix::process::getppid() == parent, "the parent process has ended");
    Ok(())
}
