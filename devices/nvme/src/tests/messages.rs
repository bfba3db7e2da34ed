//! What the controller writes to the log.

use std::cell::RefCell;
use std::sync::Once;

thread_local! {
    /// Warnings and errors that this thread has logged, while it listens.
    static MESSAGES: RefCell<Option<Vec<String>>> = const { RefCell::new(None) };
}

struct Listener;

impl log::Log for Listener {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::Level::Warn
    }
    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            MESSAGES.with_borrow_mut(|messages| {
                messages.iter_mut().for_each(|all| all.push(record.args().to_string()))
            });
        }
    }
    fn flush(&self) {}
}

/// The warnings and errors that `what` logs on this thread.
pub fn messages_of(what: impl FnOnce()) -> Vec<String> {
    static LISTENER: Once = Once::new();
    LISTENER.call_once(|| {
        log::set_logger(&Listener).unwrap();
        log::set_max_level(log::LevelFilter::Warn);
    });
    MESSAGES.set(Some(Vec::new()));
    what();
    MESSAGES.take().unwrap()
}
