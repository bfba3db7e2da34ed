//! Signals that end the process in order.

use std::sync::mpsc::Sender;

use anyhow::Context;
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
