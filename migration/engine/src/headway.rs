//! How long a source may take until it has brought its guest.
//!
//! Every message has its deadline, and so has a source that brings nothing. One that brings the same again and again, because it is
//! broken or means harm, keeps all of them for ever. From here it looks as one does whose guest dirties its memory as fast as the link
//! takes it, and which honestly goes on until its user has enough of that: each of their rounds could be the other's, so neither a
//! number of rounds nor an amount of bytes tells them apart, and what a source says of itself does not either. So time decides, and is
//! given out by what nobody can bring twice:
//!
//! - contents of a page, or of a block of an image, that has not come before buy as much time as they take on the slowest link that the
//!   deadlines of messages put up with: [`PIECE_BYTES`] each [`Patience::silence`];
//! - beside that there is [`Patience::repetition`], once, for all rounds over what was here before.
//!
//! So the whole is bounded by what the machine has of memory and images; rounds that shrink end long before.

use std::ops::Add;
use std::time::{Duration, Instant};

use crate::link::PIECE_BYTES;
use crate::{Error, Patience};

/// Contents of memory and images that have come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Brought {
    /// All of them.
    pub bytes: u64,
    /// Those of pages and blocks that had not come before.
    pub new_bytes: u64,
}

impl Add for Brought {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            bytes: self.bytes.saturating_add(other.bytes),
            new_bytes: self.new_bytes.saturating_add(other.new_bytes),
        }
    }
}

/// From the moment when a source may begin.
pub(crate) struct Headway {
    since: Instant,
    patience: Patience,
}

impl Headway {
    /// It may begin now.
    pub fn new(patience: &Patience) -> Self {
        Self { since: Instant::now(), patience: *patience }
    }

    /// Refuses a source that has taken longer than what it `brought` allows.
    ///
    /// # Errors
    /// [`Error::NoHeadway`].
    pub fn check(&self, brought: Brought) -> Result<(), Error> {
        let allowed = allowed(brought, &self.patience);
        if self.since.elapsed() <= allowed {
            return Ok(());
        }
        let Brought { bytes, new_bytes } = brought;
        Err(Error::NoHeadway { allowed, bytes, again_bytes: bytes.saturating_sub(new_bytes) })
    }
}

fn allowed(brought: Brought, patience: &Patience) -> Duration {
    let pieces = brought.new_bytes.div_ceil(PIECE_BYTES as u64);
    // There are not so many in all that a machine can have.
    let pieces = u32::try_from(pieces).unwrap_or(u32::MAX);
    patience.repetition.saturating_add(patience.silence.saturating_mul(pieces))
}

#[cfg(test)]
mod tests {
    use super::*;

    const DAY: Duration = Duration::from_secs(24 * 3600);

    fn after(bytes: u64, new_bytes: u64) -> Duration {
        allowed(Brought { bytes, new_bytes }, &Patience::default())
    }

    #[test]
    fn only_what_was_not_here_before_buys_time() {
        let week = Patience::default().repetition;
        assert_eq!(week, 7 * DAY);
        assert_eq!(after(0, 0), week);
        assert_eq!(after(u64::MAX, 0), week, "however much comes again");
        assert_eq!(after(1 << 30, 1 << 30), week + 4096 * Patience::default().silence);
        assert_eq!(after(u64::MAX, 1 << 30), after(1 << 30, 1 << 30));
        assert!(after(1, 1) > week);
    }

    /// Its first pass, at the least that any deadline or limit of bandwidth allows, takes none of the time for the later ones.
    #[test]
    fn the_slowest_source_has_all_of_the_time_for_its_rounds() {
        let slowest = PIECE_BYTES as u64 / Patience::default().silence.as_secs();
        assert!(slowest < crate::Parameters::MAX_BANDWIDTH_LEAST);
        for length_bytes in [1 << 20, 1 << 30, 1 << 40, crate::storage::IMAGES_BYTES_MAX] {
            let first_pass = Duration::from_secs(length_bytes / (slowest + 1));
            let left = after(length_bytes, length_bytes) - first_pass;
            assert!(left >= 7 * DAY, "{length_bytes}: {left:?}");
        }
    }

    #[test]
    fn a_source_whose_time_is_over_is_told_what_it_did_with_it() {
        let mut headway = Headway::new(&Patience { repetition: DAY, ..Patience::default() });
        let brought = Brought { bytes: 5000, new_bytes: 0 } + Brought { bytes: 4096, new_bytes: 4096 };
        headway.check(brought).unwrap();
        headway.patience =
            Patience { repetition: Duration::ZERO, silence: Duration::ZERO, ..headway.patience };
        // The clock may not have gone on yet.
        let error = loop {
            if let Err(error) = headway.check(brought) {
                break error.to_string();
            }
        };
        assert!(
            error.contains("within 0ns") && error.contains("9096 bytes") && error.contains("5000"),
            "{error}"
        );
    }
}
