//! What two processes can do beyond version 1.0, as bits of the hello and of the answer to it.
//!
//! The source offers what it can and is asked to use; the destination grants what it can as well. Both then do exactly what
//! was granted, so that a process of an older version is still a peer.

/// Guest memory goes over channels of its own, one or more.
pub const CHANNELS: u64 = 1 << 0;
/// Guest memory goes as descriptors to a process of the same host.
pub const LOCAL: u64 = 1 << 1;
/// Guest memory may follow after the guest.
pub const POSTCOPY: u64 = 1 << 2;
/// Images go with the guest.
pub const STORAGE: u64 = 1 << 3;
/// Channels compress with LZ4.
pub const LZ4: u64 = 1 << 4;
/// Channels compress with Zstandard.
pub const ZSTD: u64 = 1 << 5;
/// The destination says when all that was sent is in its place, before the guest stops.
pub const SETTLE: u64 = 1 << 6;
/// With guest memory, the files of images go as descriptors to a process of the same host.
pub const IMAGE_FILES: u64 = 1 << 7;
/// The destination says when the guest ran, by the clock of the host that both are on. Granted there only.
pub const MOMENT: u64 = 1 << 8;
/// Of memory that follows, several pages can be asked for at once.
pub const PAGE_RUNS: u64 = 1 << 9;

/// What this build can do.
pub const SUPPORTED: u64 =
    CHANNELS | LOCAL | POSTCOPY | STORAGE | LZ4 | ZSTD | SETTLE | IMAGE_FILES | MOMENT | PAGE_RUNS;

/// What this build knows of `features`: a source offers no more, and a destination hears of no more.
#[must_use]
pub fn known(features: u64) -> u64 {
    features & supported()
}

#[cfg(not(test))]
const fn supported() -> u64 {
    SUPPORTED
}

#[cfg(test)]
fn supported() -> u64 {
    SUPPORTED & !LACKING.get()
}

#[cfg(test)]
thread_local! {
    static LACKING: std::cell::Cell<u64> = const { std::cell::Cell::new(0) };
}

/// The side of a migration that is on this thread is of a build that knows nothing of `features`.
#[cfg(test)]
pub(crate) fn lack(features: u64) {
    LACKING.set(features);
}
