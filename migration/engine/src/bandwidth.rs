//! A limit on the bytes a second, as a token bucket with the clock passed in.

use std::time::{Duration, Instant};

/// How much may be sent in one go after a pause.
const BURST: Duration = Duration::from_millis(50);

/// Bytes may be taken as fast as the rate fills the bucket; taking more than there is makes debt, and debt is waited for.
#[derive(Debug)]
pub struct TokenBucket {
    tokens_bytes: f64,
    filled_at: Instant,
}

impl TokenBucket {
    /// An empty bucket.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self { tokens_bytes: 0.0, filled_at: now }
    }

    /// Takes `bytes` at `bytes_per_second` (0: no limit) and says how long to wait before the next go. The rate may differ
    /// from call to call.
    pub fn take(&mut self, bytes: u64, bytes_per_second: u64, now: Instant) -> Duration {
        let elapsed = now.saturating_duration_since(self.filled_at);
        self.filled_at = now;
        if bytes_per_second == 0 {
            self.tokens_bytes = 0.0;
            return Duration::ZERO;
        }
        let rate = bytes_per_second as f64;
        let filled = self.tokens_bytes + elapsed.as_secs_f64() * rate;
        self.tokens_bytes = filled.min(BURST.as_secs_f64() * rate) - bytes as f64;
        if self.tokens_bytes >= 0.0 {
            return Duration::ZERO;
        }
        Duration::try_from_secs_f64(-self.tokens_bytes / rate).unwrap_or(Duration::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_holds_over_time() {
        let start = Instant::now();
        let mut now = start;
        let mut bucket = TokenBucket::new(now);
        for _ in 0..100 {
            now += bucket.take(100_000, 1_000_000, now);
        }
        let seconds = (now - start).as_secs_f64();
        assert!((9.9..10.1).contains(&seconds), "{seconds}");
    }

    #[test]
    fn a_pause_allows_a_burst_and_no_more() {
        let start = Instant::now();
        let mut bucket = TokenBucket::new(start);
        let later = start + Duration::from_secs(100);
        assert_eq!(bucket.take(50_000, 1_000_000, later), Duration::ZERO);
        assert!(bucket.take(10_000, 1_000_000, later) > Duration::from_millis(9));
    }

    #[test]
    fn no_limit_means_no_wait_and_forgets_debt() {
        let now = Instant::now();
        let mut bucket = TokenBucket::new(now);
        assert!(bucket.take(1 << 40, 1, now) > Duration::from_secs(1 << 30));
        assert_eq!(bucket.take(1 << 40, 0, now), Duration::ZERO);
        assert_eq!(bucket.take(0, 1, now), Duration::ZERO);
    }
}
