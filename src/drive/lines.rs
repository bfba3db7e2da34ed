//! Lines that a process writes, as they come.

use std::io::Read;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// A line longer than this is cut into several: a guest that never ends its line must not fill our memory.
const MAX_LINE_BYTES: usize = 4096;

/// Everything that came so far, and a way to wait for more. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Lines(Arc<Shared>);

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    lines: Vec<String>,
    ended: bool,
}

impl Lines {
    /// Collects the lines of `source`, on a thread of its own, until its end.
    ///
    /// # Errors
    /// The thread cannot be started.
    pub fn collect(source: impl Read + Send + 'static, name: &str) -> std::io::Result<Self> {
        let lines = Self::default();
        let shared = lines.clone();
        std::thread::Builder::new().name(name.to_owned()).spawn(move || shared.read_all(source))?;
        Ok(lines)
    }

    /// Waits for a line, at or after index `from`, of which `select` makes something: that, and the index after the line.
    /// `None`: the source ended or `timeout` passed without one.
    pub fn wait_for<T>(
        &self,
        from: usize,
        timeout: Duration,
        mut select: impl FnMut(&str) -> Option<T>,
    ) -> Option<(T, usize)> {
        let deadline = Instant::now() + timeout;
        let mut state = self.lock();
        let mut next = from;
        loop {
            // Not under the lock: `select` may look at the lines itself, to say what is wrong with this one.
            while let Some(line) = state.lines.get(next).cloned() {
                next += 1;
                drop(state);
                if let Some(found) = select(&line) {
                    return Some((found, next));
                }
                state = self.lock();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if state.ended || left.is_zero() {
                return None;
            }
            state = self.0.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Whether the source has ended.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        self.lock().ended
    }

    /// Waits for the end of the source.
    pub fn wait_for_end(&self, timeout: Duration) {
        self.wait_for(self.count(), timeout, |_| None::<()>);
    }

    /// Number of lines so far.
    #[must_use]
    pub fn count(&self) -> usize {
        self.lock().lines.len()
    }

    /// All lines so far.
    #[must_use]
    pub fn all(&self) -> Vec<String> {
        self.lock().lines.clone()
    }

    /// The last `count` lines so far, for an error message.
    #[must_use]
    pub fn tail(&self, count: usize) -> String {
        let state = self.lock();
        state.lines[state.lines.len().saturating_sub(count)..].join("\n")
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_all(&self, mut source: impl Read) {
        let mut partial = Vec::new();
        let mut buffer = [0; 4096];
        loop {
            let length = match source.read(&mut buffer) {
                Ok(0) => break,
                Ok(length) => length,
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(_) => break,
            };
            for &byte in &buffer[..length] {
                match byte {
                    b'\n' => self.push(&mut partial),
                    b'\r' => {}
                    _ => partial.push(byte),
                }
                if partial.len() == MAX_LINE_BYTES {
                    self.push(&mut partial);
                }
            }
        }
        if !partial.is_empty() {
            self.push(&mut partial);
        }
        self.lock().ended = true;
        self.0.changed.notify_all();
    }

    fn push(&self, partial: &mut Vec<u8>) {
        self.lock().lines.push(String::from_utf8_lossy(partial).into_owned());
        partial.clear();
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const WATCHDOG: Duration = Duration::from_secs(30);

    #[test]
    fn lines_are_found_in_order_and_the_end_is_noticed() {
        let (reader, mut writer) = std::io::pipe().unwrap();
        let lines = Lines::collect(reader, "test").unwrap();
        let number = |line: &str| line.strip_prefix("n=").and_then(|text| text.parse::<u32>().ok());
        std::io::Write::write_all(&mut writer, b"boot\r\nn=1\nn=2\npart").unwrap();
        let (first, next) = lines.wait_for(0, WATCHDOG, number).unwrap();
        let (second, next) = lines.wait_for(next, WATCHDOG, number).unwrap();
        assert_eq!((first, second, next), (1, 2, 3));
        drop(writer);
        assert_eq!(lines.wait_for(next, WATCHDOG, number), None);
        assert_eq!(lines.all(), ["boot", "n=1", "n=2", "part"]);
        assert_eq!(lines.tail(2), "n=2\npart");
    }

    #[test]
    fn who_looks_at_a_line_can_look_at_all() {
        let lines = Lines::collect(std::io::Cursor::new(b"one\ntwo\n"), "test").unwrap();
        let found = lines.wait_for(0, WATCHDOG, |line| (line == "two").then(|| lines.tail(1)));
        assert_eq!(found, Some(("two".to_owned(), 2)));
    }

    #[test]
    fn an_endless_line_is_cut() {
        let data = vec![b'x'; 2 * MAX_LINE_BYTES + 1];
        let lines = Lines::collect(std::io::Cursor::new(data), "test").unwrap();
        assert!(lines.wait_for(0, WATCHDOG, |line| (line.len() == 1).then_some(())).is_some());
        assert_eq!(lines.count(), 3);
    }
}
