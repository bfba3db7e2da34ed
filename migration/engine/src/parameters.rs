//! What the user may change while a migration runs.

use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::{Compression, Convergence, Word};

/// Limits and the wish to cancel, shared between the control socket and the migration thread.
#[derive(Debug)]
pub struct Parameters {
    downtime_limit_ns: AtomicU64,
    max_bandwidth: AtomicU64,
    convergence: Mutex<Convergence>,
    local: AtomicBool,
    storage: AtomicBool,
    channels: AtomicU16,
    /// Its place in [`Compression::ALL`].
    compression: AtomicU8,
    /// [`OPEN`], [`CANCELLED`] or [`COMMITTED`]; the first to leave `OPEN` wins.
    end: AtomicU8,
    /// The end was asked for, in time or not.
    wished: AtomicBool,
    /// What the operator says of an undecided hand-over.
    word: Mutex<Option<Word>>,
    /// A [`PostcopyStart`].
    postcopy: AtomicU8,
    /// Memory is to follow the guest from now on.
    postcopy_wished: AtomicBool,
    /// The two sides have agreed on a migration whose guest brings all of its memory.
    postcopy_left_out: AtomicBool,
    /// A link that memory was lost on is to be replaced.
    recovery: AtomicBool,
    /// The process ends, whoever needs memory of it.
    abandoned: AtomicBool,
}

/// When guest memory begins to follow after the guest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PostcopyStart {
    /// Never: the destination need not even be able to.
    #[default]
    Never,
    /// When it is [asked for](Parameters::start_postcopy), or [`converge`](crate::converge()) says so.
    WhenAsked,
    /// After the first pass over memory, if the rest cannot be sent within the downtime limit.
    AfterFirstRound,
    /// Without any pass.
    AtOnce,
}

impl PostcopyStart {
    const ALL: [Self; 4] = [Self::Never, Self::WhenAsked, Self::AfterFirstRound, Self::AtOnce];
}

const OPEN: u8 = 0;
const CANCELLED: u8 = 1;
/// The first byte of COMMIT is next: from there on nothing can be taken back.
const COMMITTED: u8 = 2;

impl Default for Parameters {
    fn default() -> Self {
        Self {
            downtime_limit_ns: AtomicU64::new(300_000_000),
            max_bandwidth: AtomicU64::new(0),
            convergence: Mutex::default(),
            local: AtomicBool::new(false),
            storage: AtomicBool::new(false),
            channels: AtomicU16::new(crate::CHANNELS_DEFAULT),
            compression: AtomicU8::new(0),
            end: AtomicU8::new(OPEN),
            wished: AtomicBool::new(false),
            word: Mutex::default(),
            postcopy: AtomicU8::new(PostcopyStart::Never as u8),
            postcopy_wished: AtomicBool::new(false),
            postcopy_left_out: AtomicBool::new(false),
            recovery: AtomicBool::new(false),
            abandoned: AtomicBool::new(false),
        }
    }
}

impl Parameters {
    /// 300 ms, no bandwidth limit, rounds and time without limit, vCPUs that are left alone, contents of memory to whoever it is, over
    /// as many data channels as are [the default](crate::CHANNELS_DEFAULT) and without compression.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// How long the guest may stand still.
    #[must_use]
    pub fn downtime_limit(&self) -> Duration {
        Duration::from_nanos(self.downtime_limit_ns.load(Ordering::Relaxed))
    }

    /// See [`downtime_limit`](Self::downtime_limit).
    pub fn set_downtime_limit(&self, limit: Duration) {
        let nanoseconds = u64::try_from(limit.as_nanos()).unwrap_or(u64::MAX);
        self.downtime_limit_ns.store(nanoseconds, Ordering::Relaxed);
    }

    /// Bytes a second; 0 is no limit. It does not hold while the guest is stopped.
    #[must_use]
    pub fn max_bandwidth(&self) -> u64 {
        self.max_bandwidth.load(Ordering::Relaxed)
    }

    /// The least bandwidth that can be asked for, in bytes a second. With less, what is sent in one go would be paid for with a
    /// silence that the destination takes for the end.
    pub const MAX_BANDWIDTH_LEAST: u64 = 64 << 10;

    /// See [`max_bandwidth`](Self::max_bandwidth). Less than [the least](Self::MAX_BANDWIDTH_LEAST), but not 0, is the least.
    pub fn set_max_bandwidth(&self, bytes_per_second: u64) {
        let bytes_per_second = match bytes_per_second {
            0 => 0,
            limit => limit.max(Self::MAX_BANDWIDTH_LEAST),
        };
        self.max_bandwidth.store(bytes_per_second, Ordering::Relaxed);
    }

    /// What is done about a guest that dirties its memory faster than the link takes it.
    #[must_use]
    pub fn convergence(&self) -> Convergence {
        *self.convergence.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// See [`convergence`](Self::convergence).
    pub fn set_convergence(&self, convergence: Convergence) {
        *self.convergence.lock().unwrap_or_else(PoisonError::into_inner) = convergence;
    }

    /// Whether a process of the same host is to get the memory itself, and not its contents.
    #[must_use]
    pub fn local(&self) -> bool {
        self.local.load(Ordering::Relaxed)
    }

    /// See [`local`](Self::local). Counts for migrations that begin afterwards.
    pub fn set_local(&self, local: bool) {
        self.local.store(local, Ordering::Relaxed);
    }

    /// Whether the images go with the guest, to a process that has none of its own to see them on.
    #[must_use]
    pub fn storage(&self) -> bool {
        self.storage.load(Ordering::Relaxed)
    }

    /// See [`storage`](Self::storage). Counts for migrations that begin afterwards.
    pub fn set_storage(&self, storage: bool) {
        self.storage.store(storage, Ordering::Relaxed);
    }

    /// How many data channels a migration that begins asks for; 0: guest memory goes over the link.
    #[must_use]
    pub fn channels(&self) -> u16 {
        self.channels.load(Ordering::Relaxed)
    }

    /// See [`channels`](Self::channels). More than [there can be](crate::CHANNELS_MAX) are as many as there can be.
    pub fn set_channels(&self, channels: u16) {
        self.channels.store(channels.min(crate::CHANNELS_MAX), Ordering::Relaxed);
    }

    /// How the data channels of a migration that begins compress.
    #[must_use]
    pub fn compression(&self) -> Compression {
        let place = usize::from(self.compression.load(Ordering::Relaxed));
        Compression::ALL.get(place).copied().unwrap_or_default()
    }

    /// See [`compression`](Self::compression).
    pub fn set_compression(&self, compression: Compression) {
        let place = Compression::ALL.iter().position(|one| *one == compression).unwrap_or_default();
        self.compression.store(place as u8, Ordering::Relaxed);
    }

    /// Asks for the end of the migration. `false`: too late, COMMIT is on its way, and the answer decides.
    pub fn cancel(&self) -> bool {
        // First the wish: whoever opens again looks for it afterwards, so one of the two sees the other.
        self.wished.store(true, Ordering::SeqCst);
        self.leave_open(CANCELLED)
    }

    /// Whether the end was asked for.
    #[must_use]
    pub fn cancelled(&self) -> bool {
        self.end.load(Ordering::SeqCst) == CANCELLED
    }

    /// Whether the end was asked for, though it may have been too late to have it.
    pub(crate) fn end_is_wished(&self) -> bool {
        self.wished.load(Ordering::SeqCst)
    }

    /// Whether the point of no return is behind.
    #[must_use]
    pub fn committed(&self) -> bool {
        self.end.load(Ordering::SeqCst) == COMMITTED
    }

    /// A new attempt: neither cancelled nor committed. Called by whoever accepts the user's command, so that a cancel that
    /// comes before the migration thread runs is not lost.
    pub fn begin(&self) {
        self.wished.store(false, Ordering::SeqCst);
        self.end.store(OPEN, Ordering::SeqCst);
        *self.word() = None;
        self.postcopy_wished.store(false, Ordering::SeqCst);
        self.postcopy_left_out.store(false, Ordering::SeqCst);
        self.recovery.store(false, Ordering::SeqCst);
    }

    /// When memory may follow after the guest, in the next migration.
    #[must_use]
    pub fn postcopy(&self) -> PostcopyStart {
        let found = self.postcopy.load(Ordering::SeqCst);
        PostcopyStart::ALL.into_iter().find(|start| *start as u8 == found).unwrap_or_default()
    }

    /// See [`postcopy`](Self::postcopy).
    pub fn set_postcopy(&self, start: PostcopyStart) {
        self.postcopy.store(start as u8, Ordering::SeqCst);
    }

    /// Lets memory follow after the guest as soon as it can, in a migration for which [`postcopy`](Self::postcopy) allows it.
    pub fn start_postcopy(&self) {
        self.postcopy_wished.store(true, Ordering::SeqCst);
    }

    pub(crate) fn postcopy_is_wished(&self) -> bool {
        self.postcopy_wished.load(Ordering::SeqCst)
    }

    /// Whether it is too late for [`OnTimeout::Postcopy`](crate::OnTimeout::Postcopy) in the migration that runs: its source has not
    /// offered that memory follows.
    #[must_use]
    pub fn postcopy_is_left_out(&self) -> bool {
        self.postcopy_left_out.load(Ordering::SeqCst)
    }

    pub(crate) fn leave_postcopy_out(&self) {
        self.postcopy_left_out.store(true, Ordering::SeqCst);
    }

    /// Replaces the link that was lost while the guest's memory followed.
    pub fn recover(&self) {
        self.recovery.store(true, Ordering::SeqCst);
    }

    pub(crate) fn take_recovery(&self) -> bool {
        self.recovery.swap(false, Ordering::SeqCst)
    }

    /// The process ends: also if a guest elsewhere needs memory of it, which does not go on then.
    pub fn abandon(&self) {
        self.abandoned.store(true, Ordering::SeqCst);
    }

    pub(crate) fn is_abandoned(&self) -> bool {
        self.abandoned.load(Ordering::SeqCst)
    }

    /// The operator's word on a hand-over that nothing else can decide. It is used once, and only if the destination does not
    /// answer when it is asked again.
    pub fn say(&self, word: Word) {
        *self.word() = Some(word);
    }

    pub(crate) fn take_word(&self) -> Option<Word> {
        self.word().take()
    }

    fn word(&self) -> MutexGuard<'_, Option<Word>> {
        self.word.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The point of no return led nowhere, and the waiting goes on. A cancel that came too late for it counts now.
    pub(crate) fn reopen(&self) {
        self.end.store(OPEN, Ordering::SeqCst);
        if self.wished.load(Ordering::SeqCst) {
            self.leave_open(CANCELLED);
        }
    }

    /// The point of no return, for whoever hands the guest over; `false` if a cancel came first.
    pub fn commit(&self) -> bool {
        self.leave_open(COMMITTED)
    }

    fn leave_open(&self, end: u8) -> bool {
        match self.end.compare_exchange(OPEN, end, Ordering::SeqCst, Ordering::SeqCst) {
            Ok(_) => true,
            Err(found) => found == end,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_limit_makes_the_source_look_dead() {
        let parameters = Parameters::new();
        for (asked, limit) in [(0, 0), (1, 64 << 10), (8700, 64 << 10), (1 << 30, 1 << 30)] {
            parameters.set_max_bandwidth(asked);
            assert_eq!(parameters.max_bandwidth(), limit);
        }
        let longest = Duration::from_secs(crate::sink::BODY_BYTES as u64 / Parameters::MAX_BANDWIDTH_LEAST);
        assert!(longest * 4 < crate::Patience::default().silence, "{longest:?}");
    }

    #[test]
    fn cancel_and_commit_exclude_each_other() {
        let parameters = Parameters::new();
        assert!(parameters.cancel());
        assert!(!parameters.commit());
        assert!(parameters.cancelled() && parameters.cancel());
        let parameters = Parameters::new();
        assert!(parameters.commit());
        assert!(!parameters.cancel());
        assert!(!parameters.cancelled());
        parameters.reopen();
        assert!(parameters.cancelled(), "it came too late for that attempt, not for the next");
    }
}
