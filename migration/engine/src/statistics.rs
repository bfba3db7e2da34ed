//! What the user sees of a migration, on either side.

use std::fmt;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::PAGE_BYTES;
use crate::lease::Id;
use crate::protocol::Progress;
use crate::speed::Contents;

/// Where a migration is, by the names of QEMU's `MigrationStatus`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Status {
    /// There was none yet.
    #[default]
    None,
    /// Connecting, agreeing, building the machine of the destination.
    Setup,
    /// RAM moves, the guest runs.
    Active,
    /// The guest is stopped; last pages, device state, the switch.
    Device,
    /// The guest was handed over, and nobody has said yet whether it runs at the destination.
    HandoverUnknown,
    /// The guest runs at the destination, and the rest of its memory follows.
    PostcopyActive,
    /// The same, and the link is lost.
    PostcopyPaused,
    /// The link comes about again.
    PostcopyRecover,
    /// The guest runs at the destination.
    Completed,
    /// It failed; the guest runs at the source.
    Failed,
    /// The user asked for the end.
    Cancelling,
    /// It ended as the user asked; the guest runs at the source.
    Cancelled,
}

impl Status {
    /// Whether the guest runs at the destination without all of its memory.
    #[must_use]
    pub fn is_postcopy(self) -> bool {
        matches!(self, Self::PostcopyActive | Self::PostcopyPaused | Self::PostcopyRecover)
    }

    /// QEMU's name, where it has the status.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Setup => "setup",
            Self::Active => "active",
            Self::Device => "device",
            Self::HandoverUnknown => "handover-unknown",
            Self::PostcopyActive => "postcopy-active",
            Self::PostcopyPaused => "postcopy-paused",
            Self::PostcopyRecover => "postcopy-recover",
            Self::Completed => "completed",
            Self::Failed => "failed",
            Self::Cancelling => "cancelling",
            Self::Cancelled => "cancelled",
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Where the time of the stop went. Durations that a side did not see are zero until the other side told them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Downtime {
    /// From the first vCPU kick to the first moment the guest could run again. From one host to another: until the answer came.
    pub total: Duration,
    /// Stopping vCPUs and devices.
    pub stop: Duration,
    /// Reading the state of vCPUs and devices.
    pub device_save: Duration,
    /// Taking the last dirty bitmap and sending its pages.
    pub last_pass: Duration,
    /// From the end of the last pass until the destination had loaded, its loading not counted.
    pub transfer: Duration,
    /// Loading and building devices at the destination.
    pub load: Duration,
    /// The lease at the source, once the destination had answered.
    pub handover: Duration,
    /// Lease, image locks, images and start at the destination, until the last vCPU was about to enter the guest.
    pub resume: Duration,
}

/// Memory that follows after the guest. What a side does not see is zero there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Postcopy {
    /// Pages that the destination asked for.
    pub requests: u64,
    /// Pages of holes that were touched and only had to be cleared.
    pub zero_faults: u64,
    /// Bytes that were sent, or placed, since the guest was handed over.
    pub bytes: u64,
    /// Time in which anybody waited for a page.
    pub blocktime: Duration,
    /// How long each thread waited, by name.
    pub threads: Vec<(String, Duration)>,
    /// Half of the waits were shorter.
    pub latency_median: Duration,
    /// The longest wait.
    pub latency_max: Duration,
    /// Times that a lost link was replaced.
    pub recoveries: u32,
    /// Why nothing comes at present.
    pub paused: Option<String>,
}

/// Images that go with the guest. What a side does not see is zero there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Storage {
    /// Of all images, holes included.
    pub total_bytes: u64,
    /// On the link so far, or received.
    pub transferred_bytes: u64,
    /// What is known to be left.
    pub remaining_bytes: u64,
    /// Begun, the last with the guest stopped not counted.
    pub rounds: u32,
    /// What of the images was left when the guest was stopped.
    pub downtime_bytes: u64,
}

/// All figures at one moment.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Where it is.
    pub status: Status,
    /// All RAM of the guest, in bytes.
    pub total_bytes: u64,
    /// Bytes on the link so far, everything included.
    pub transferred_bytes: u64,
    /// What is left of this round, in bytes.
    pub remaining_bytes: u64,
    /// What of [`total_bytes`](Self::total_bytes) went as memory itself to a process of the same host, and so was not sent.
    pub handed_over_bytes: u64,
    /// Pages sent with contents.
    pub normal_pages: u64,
    /// Pages sent as zero.
    pub zero_pages: u64,
    /// Pages of [`normal_pages`](Self::normal_pages) that were compressed.
    pub compressed_pages: u64,
    /// What became of them, in bytes.
    pub compressed_bytes: u64,
    /// What of [`transferred_bytes`](Self::transferred_bytes) went over each channel; none: guest memory goes over the link.
    pub channel_bytes: Vec<u64>,
    /// Pages that went over each of them, those that are zero included.
    pub channel_pages: Vec<u64>,
    /// State of vCPUs and devices, as it stands in the sections: none of it is guest memory.
    pub device_bytes: u64,
    /// What of [`transferred_bytes`](Self::transferred_bytes) was sent with the guest stopped.
    pub downtime_bytes: u64,
    /// Rounds begun (QEMU's `dirty-sync-count`).
    pub rounds: u32,
    /// How fast the guest dirtied pages during the last round.
    pub dirty_pages_per_second: u64,
    /// How fast the link was in the last round, or is in the first, in bytes a second.
    pub bytes_per_second: u64,
    /// What the vCPUs are slowed down by, or were until they were stopped, in percent of their time.
    pub throttle_percent: u8,
    /// How long the guest would stand still if it were stopped now.
    pub expected_downtime: Duration,
    /// From the start to the first page.
    pub setup: Duration,
    /// From the first page until the last that did not follow after the guest, or until now.
    pub moving: Duration,
    /// From the start until now, or until the end.
    pub elapsed: Duration,
    /// The stop; zero before.
    pub downtime: Downtime,
    /// What is special where memory follows the guest.
    pub postcopy: Option<Postcopy>,
    /// The images, where they go with the guest.
    pub storage: Option<Storage>,
    /// Why the guest stayed, and what else went wrong with that.
    pub error: Option<String>,
    /// The answer to COMMIT is outstanding and nothing else has decided: what is known.
    pub handover_unknown: Option<String>,
    /// The session of a guest that is here, and whose source has not said that it knows.
    pub unacknowledged: Option<Id>,
}

impl Snapshot {
    /// How fast each channel was, in bytes a second of the time in which memory moved.
    #[must_use]
    pub fn channel_bytes_per_second(&self) -> Vec<u64> {
        let seconds = self.moving.as_secs_f64();
        let speed = |bytes: &u64| if seconds > 0.0 { (*bytes as f64 / seconds) as u64 } else { 0 };
        self.channel_bytes.iter().map(speed).collect()
    }

    /// Counts a batch of channel number `index`.
    pub(crate) fn add_to_channel(&mut self, index: usize, bytes: u64, pages: u64) {
        if let Some((all_bytes, all_pages)) =
            self.channel_bytes.get_mut(index).zip(self.channel_pages.get_mut(index))
        {
            *all_bytes += bytes;
            *all_pages += pages;
        }
    }
}

type Listener = Box<dyn Fn(Status) + Send + Sync>;

/// The figures, shared between the migration thread that writes and the control socket that reads.
#[derive(Default)]
pub struct Statistics {
    inner: Mutex<Inner>,
    listener: Option<Listener>,
}

#[derive(Default)]
struct Inner {
    snapshot: Snapshot,
    started: Option<Instant>,
    ended: bool,
}

impl Statistics {
    /// Nothing yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Calls `listener` on every change of status, on the migration thread.
    #[must_use]
    pub fn with_listener(listener: impl Fn(Status) + Send + Sync + 'static) -> Self {
        Self { inner: Mutex::default(), listener: Some(Box::new(listener)) }
    }

    /// The figures now.
    #[must_use]
    pub fn snapshot(&self) -> Snapshot {
        let inner = self.lock();
        let mut snapshot = inner.snapshot.clone();
        if let Some(started) = inner.started
            && !inner.ended
        {
            snapshot.elapsed = started.elapsed();
        }
        if snapshot.moving.is_zero() && !snapshot.setup.is_zero() {
            snapshot.moving = snapshot.elapsed.saturating_sub(snapshot.setup);
        }
        if snapshot.status == Status::Active && snapshot.bytes_per_second == 0 && !snapshot.moving.is_zero() {
            let bytes_per_second = snapshot.transferred_bytes as f64 / snapshot.moving.as_secs_f64();
            snapshot.bytes_per_second = bytes_per_second as u64;
        }
        snapshot
    }

    /// A new attempt: everything starts from nothing.
    pub(crate) fn start(&self) {
        *self.lock() = Inner { started: Some(Instant::now()), ..Inner::default() };
        self.set_status(Status::Setup);
    }

    /// Since the start.
    pub(crate) fn elapsed(&self) -> Duration {
        self.lock().started.map(|started| started.elapsed()).unwrap_or_default()
    }

    /// Pages with contents that went until now.
    pub(crate) fn contents(&self) -> Contents {
        let Snapshot { normal_pages, compressed_pages, compressed_bytes, .. } = self.lock().snapshot;
        let whole_pages = normal_pages.saturating_sub(compressed_pages);
        let bytes = whole_pages.saturating_mul(PAGE_BYTES).saturating_add(compressed_bytes);
        Contents { pages: normal_pages, bytes }
    }

    pub(crate) fn update(&self, change: impl FnOnce(&mut Snapshot)) {
        change(&mut self.lock().snapshot);
    }

    /// Guest memory goes over so many channels.
    pub(crate) fn start_channels(&self, count: usize) {
        self.update(|s| (s.channel_bytes, s.channel_pages) = (vec![0; count], vec![0; count]));
    }

    /// All of memory that does not follow after the guest has gone, or come.
    pub(crate) fn has_moved(&self) {
        let elapsed = self.elapsed();
        self.update(|s| s.moving = elapsed.saturating_sub(s.setup));
    }

    /// Says where the migration stands, and tells the listener if that is news.
    pub fn set_status(&self, status: Status) {
        {
            let mut inner = self.lock();
            if inner.snapshot.status == status {
                return;
            }
            inner.snapshot.status = status;
            let elapsed = inner.started.map(|started| started.elapsed()).unwrap_or_default();
            match status {
                Status::Active => inner.snapshot.setup = elapsed,
                Status::Completed | Status::Failed | Status::Cancelled => {
                    inner.snapshot.elapsed = elapsed;
                    inner.snapshot.handover_unknown = None;
                    inner.ended = true;
                }
                _ => {}
            }
        }
        if let Some(listener) = &self.listener {
            listener(status);
        }
    }

    /// Links that were lost are about to be replaced: who asks next must not hear that they are lost, as if that had failed already.
    pub fn begin_recovery(&self) {
        let is_lost = self.lock().snapshot.status == Status::PostcopyPaused;
        if is_lost {
            self.set_status(Status::PostcopyRecover);
        }
    }

    /// What the other side's user wants to know.
    pub(crate) fn progress(&self) -> Progress {
        let snapshot = self.snapshot();
        let Downtime { total, stop, device_save, last_pass, transfer, load, handover, resume } =
            snapshot.downtime;
        Progress {
            total_bytes: snapshot.total_bytes,
            transferred_bytes: snapshot.transferred_bytes,
            remaining_bytes: snapshot.remaining_bytes,
            rounds: snapshot.rounds,
            dirty_pages_per_second: snapshot.dirty_pages_per_second,
            bytes_per_second: snapshot.bytes_per_second,
            downtime_ns: [total, stop, device_save, last_pass, transfer, load, handover, resume]
                .map(|duration| u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)),
        }
    }

    /// What the other side told.
    pub(crate) fn told(&self, progress: &Progress) {
        let [total, stop, device_save, last_pass, transfer, load, handover, resume] =
            progress.downtime_ns.map(Duration::from_nanos);
        self.update(|snapshot| {
            snapshot.total_bytes = progress.total_bytes;
            snapshot.transferred_bytes = progress.transferred_bytes;
            snapshot.remaining_bytes = progress.remaining_bytes;
            snapshot.rounds = progress.rounds;
            snapshot.dirty_pages_per_second = progress.dirty_pages_per_second;
            snapshot.bytes_per_second = progress.bytes_per_second;
            snapshot.downtime =
                Downtime { total, stop, device_save, last_pass, transfer, load, handover, resume };
        });
    }

    pub(crate) fn fail(&self, cause: &str) {
        self.update(|snapshot| snapshot.error = Some(cause.to_owned()));
        self.set_status(Status::Failed);
    }

    /// It ended by the user's wish. `cause` says that too, and what else there is to know.
    pub(crate) fn cancelled(&self, cause: &str) {
        self.update(|snapshot| snapshot.error = Some(cause.to_owned()));
        self.set_status(Status::Cancelled);
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl fmt::Debug for Statistics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Statistics").field(&self.snapshot()).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    #[test]
    fn every_change_of_status_is_told_once_and_figures_start_anew() {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let sink = Arc::clone(&seen);
        let statistics = Statistics::with_listener(move |status| sink.lock().unwrap().push(status.name()));
        statistics.start();
        statistics.set_status(Status::Active);
        statistics.set_status(Status::Active);
        statistics.update(|snapshot| snapshot.rounds = 7);
        statistics.fail("the cable broke");
        let failed = statistics.snapshot();
        assert_eq!((failed.rounds, failed.error.as_deref()), (7, Some("the cable broke")));
        assert_eq!(statistics.snapshot().elapsed, failed.elapsed, "time stands still after the end");
        statistics.start();
        assert_eq!((statistics.snapshot().rounds, statistics.snapshot().error), (0, None));
        assert_eq!(*seen.lock().unwrap(), ["setup", "active", "failed", "setup"]);
    }

    #[test]
    fn only_links_that_are_lost_are_replaced() {
        let statistics = Statistics::new();
        for (before, after) in [
            (Status::PostcopyPaused, Status::PostcopyRecover),
            (Status::PostcopyActive, Status::PostcopyActive),
            (Status::Completed, Status::Completed),
        ] {
            statistics.set_status(before);
            statistics.begin_recovery();
            assert_eq!(statistics.snapshot().status, after);
        }
    }

    #[test]
    fn channels_are_counted_apart_and_their_speed_is_that_of_the_time_in_which_memory_moved() {
        let statistics = Statistics::new();
        statistics.start();
        statistics.start_channels(2);
        statistics.update(|s| s.add_to_channel(1, 3000, 7));
        assert_eq!(statistics.snapshot().channel_bytes_per_second(), [0, 0], "none has begun to move");
        statistics.set_status(Status::Active);
        assert!(statistics.snapshot().channel_bytes_per_second()[1] > 0);
        statistics.update(|s| {
            s.add_to_channel(0, 500, 1);
            s.add_to_channel(1, 1000, 2);
            s.add_to_channel(2, 1, 1);
        });
        statistics.has_moved();
        let moving = statistics.snapshot().moving;
        statistics.set_status(Status::Completed);
        let mut snapshot = statistics.snapshot();
        assert_eq!(snapshot.moving, moving, "what follows is not counted");
        assert_eq!((&*snapshot.channel_bytes, &*snapshot.channel_pages), (&[500, 4000][..], &[1, 9][..]));
        snapshot.moving = Duration::from_millis(500);
        assert_eq!(snapshot.channel_bytes_per_second(), [1000, 8000]);
    }

    #[test]
    fn the_first_round_has_a_speed_before_its_end() {
        let statistics = Statistics::new();
        statistics.start();
        statistics.update(|snapshot| snapshot.transferred_bytes = 1 << 40);
        assert_eq!(statistics.snapshot().bytes_per_second, 0, "nothing is sent yet");
        statistics.set_status(Status::Active);
        assert!(statistics.snapshot().bytes_per_second > 0);
        statistics.update(|snapshot| snapshot.bytes_per_second = 5);
        assert_eq!(statistics.snapshot().bytes_per_second, 5);
    }
}
