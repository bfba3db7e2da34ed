//! The record in the lease file, and how a torn write is survived.

use std::fmt;
use std::io;
use std::time::{SystemTime, UNIX_EPOCH};

use rustix::rand::{GetRandomFlags, getrandom};
use vmstate::VmState;

/// Sixteen random bytes: a session, a process, a lease.
pub type Id = [u8; 16];

/// Draws an [`Id`].
///
/// # Errors
/// The kernel has no randomness.
pub fn random_id() -> io::Result<Id> {
    let mut id = [0; 16];
    // 16 bytes are never cut short (random(7): up to 256 bytes are given whole).
    getrandom(&mut id, GetRandomFlags::empty())?;
    Ok(id)
}

/// Writes an [`Id`] as hexadecimal digits.
#[must_use]
pub fn show_id(id: &Id) -> String {
    id.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Bytes of one of the two copies: a sector, which disks write whole.
pub(super) const SLOT_BYTES: usize = 512;
/// From one copy to the other: no sector, of whatever disk, holds both.
pub(super) const SLOT_STRIDE_BYTES: usize = 4096;
/// Of the file.
pub(super) const FILE_BYTES: usize = 2 * SLOT_STRIDE_BYTES;
const MAGIC: [u8; 8] = *b"FRRYLEAS";
const VERSION: u32 = 1;

/// Who holds a lease.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// Differs for every run of every process.
    pub id: Id,
    /// Host name.
    pub host: String,
    /// Process id on that host.
    pub pid: u32,
    /// What the user calls the VM.
    pub vm: String,
    /// Since when, in seconds since 1970.
    pub since_unix_seconds: u64,
}

impl Owner {
    /// This process, on behalf of the VM that the user calls `vm`.
    ///
    /// # Errors
    /// The kernel has no randomness.
    pub fn this_process(vm: &str) -> io::Result<Self> {
        let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok(Self {
            id: random_id()?,
            host: host.trim().to_owned(),
            pid: std::process::id(),
            vm: vm.to_owned(),
            since_unix_seconds: now.as_secs(),
        })
    }
}

impl fmt::Display for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, pid, vm, .. } = self;
        write!(f, "VM {vm:?} (host {host}, pid {pid}, since {})", utc(self.since_unix_seconds))
    }
}

/// What the record says about the guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// The owner runs it, or may.
    Owned,
    /// The owner stopped it and lets the destination of `session` take it.
    Offered {
        /// The migration.
        session: Id,
        /// The destination, for messages.
        peer: String,
    },
    /// The owner is the destination of `session` and runs it, or may.
    Taken {
        /// The migration.
        session: Id,
    },
    /// The destination of `session` took it, could not run it, never did, and never will: the source may have it back.
    Returned {
        /// The migration.
        session: Id,
    },
    /// Nobody runs it: the owner exited cleanly.
    Released,
    /// It lies in a file with this digest.
    InFile {
        /// [`crate::file`] says of what.
        digest: u64,
    },
    /// The images beside the record come from elsewhere in `session` and are nobody's until all of them is here.
    Incoming {
        /// The migration.
        session: Id,
    },
    /// The guest has gone to `peer` in `session` with all that is in its images, or may have: those beside the record are stale.
    Moved {
        /// The migration.
        session: Id,
        /// The destination, for messages.
        peer: String,
    },
}

impl State {
    fn code(&self) -> u8 {
        match self {
            Self::Owned => 1,
            Self::Offered { .. } => 2,
            Self::Taken { .. } => 3,
            Self::Returned { .. } => 4,
            Self::Released => 5,
            Self::InFile { .. } => 6,
            Self::Incoming { .. } => 7,
            Self::Moved { .. } => 8,
        }
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Owned => write!(f, "owned"),
            Self::Offered { session, peer } => write!(f, "offered to {peer} in session {}", show_id(session)),
            Self::Taken { session } => write!(f, "taken in session {}", show_id(session)),
            Self::Returned { session } => write!(f, "returned in session {}", show_id(session)),
            Self::Released => write!(f, "released"),
            Self::InFile { digest } => write!(f, "in a file with digest {digest:016x}"),
            Self::Incoming { session } => write!(f, "incoming in session {}", show_id(session)),
            Self::Moved { session, peer } => write!(f, "moved to {peer} in session {}", show_id(session)),
        }
    }
}

/// One version of the record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    /// Tells leases apart; drawn when the file is made.
    pub lease: Id,
    /// Grows with every change of owner.
    pub generation: u64,
    /// What it says.
    pub state: State,
    /// Who wrote it.
    pub owner: Owner,
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "generation {}, {}, by {}", self.generation, self.state, self.owner)
    }
}

/// The bytes of a slot before its checksum, padded with zeroes.
#[derive(VmState)]
#[vmstate(name = "lease", version = 1, oldest = 1)]
struct Slot {
    magic: [u8; 8],
    version: u32,
    sequence: u64,
    lease: [u8; 16],
    generation: u64,
    state: u8,
    session: [u8; 16],
    digest: u64,
    owner_id: [u8; 16],
    owner_pid: u32,
    owner_since: u64,
    owner_host: [u8; 64],
    owner_vm: [u8; 64],
    peer: [u8; 128],
}

impl Record {
    pub(super) fn is_in_file(&self) -> bool {
        matches!(self.state, State::InFile { .. })
    }

    /// Whether the images beside it are no guest's: not all of one yet, or what one was before it went elsewhere.
    #[must_use]
    pub fn is_without_guest(&self) -> bool {
        matches!(self.state, State::Incoming { .. } | State::Moved { .. })
    }

    pub(super) fn to_slot(&self, sequence: u64) -> [u8; SLOT_BYTES] {
        let (session, peer, digest) = match &self.state {
            State::Offered { session, peer } | State::Moved { session, peer } => (*session, peer.as_str(), 0),
            State::Taken { session } | State::Returned { session } | State::Incoming { session } => {
                (*session, "", 0)
            }
            State::InFile { digest } => ([0; 16], "", *digest),
            State::Owned | State::Released => ([0; 16], "", 0),
        };
        let bytes = vmstate::to_bytes(&Slot {
            magic: MAGIC,
            version: VERSION,
            sequence,
            lease: self.lease,
            generation: self.generation,
            state: self.state.code(),
            session,
            digest,
            owner_id: self.owner.id,
            owner_pid: self.owner.pid,
            owner_since: self.owner.since_unix_seconds,
            owner_host: fixed(&self.owner.host),
            owner_vm: fixed(&self.owner.vm),
            peer: fixed(peer),
        });
        let mut slot = [0; SLOT_BYTES];
        for (to, from) in slot.iter_mut().zip(&bytes) {
            *to = *from;
        }
        let crc = crc32fast::hash(&slot[..SLOT_BYTES - 4]);
        slot[SLOT_BYTES - 4..].copy_from_slice(&crc.to_be_bytes());
        slot
    }

    /// The record and its sequence number, if the slot was written whole.
    pub(super) fn from_slot(slot: &[u8; SLOT_BYTES]) -> Option<(u64, Self)> {
        let (body, crc) = slot.split_at(SLOT_BYTES - 4);
        if crc32fast::hash(body).to_be_bytes() != crc {
            return None;
        }
        let length = vmstate::to_bytes(&Slot::blank()).len();
        let slot: Slot = vmstate::from_bytes(body.get(..length)?, 1).ok()?;
        if slot.magic != MAGIC || slot.version != VERSION {
            return None;
        }
        let session = slot.session;
        let state = match slot.state {
            1 => State::Owned,
            2 => State::Offered { session, peer: text(&slot.peer) },
            3 => State::Taken { session },
            4 => State::Returned { session },
            5 => State::Released,
            6 => State::InFile { digest: slot.digest },
            7 => State::Incoming { session },
            8 => State::Moved { session, peer: text(&slot.peer) },
            _ => return None,
        };
        let owner = Owner {
            id: slot.owner_id,
            host: text(&slot.owner_host),
            pid: slot.owner_pid,
            vm: text(&slot.owner_vm),
            since_unix_seconds: slot.owner_since,
        };
        Some((slot.sequence, Self { lease: slot.lease, generation: slot.generation, state, owner }))
    }

    /// Whether the bytes were meant as a lease, readable or not.
    pub(super) fn has_magic(slot: &[u8; SLOT_BYTES]) -> bool {
        slot.starts_with(&MAGIC)
    }
}

impl Slot {
    fn blank() -> Self {
        Self {
            magic: [0; 8],
            version: 0,
            sequence: 0,
            lease: [0; 16],
            generation: 0,
            state: 0,
            session: [0; 16],
            digest: 0,
            owner_id: [0; 16],
            owner_pid: 0,
            owner_since: 0,
            owner_host: [0; 64],
            owner_vm: [0; 64],
            peer: [0; 128],
        }
    }
}

/// Text in a field of fixed size, cut at a character where it is too long, padded with NUL.
fn fixed<const N: usize>(text: &str) -> [u8; N] {
    let mut field = [0; N];
    let mut used = 0;
    for character in text.chars() {
        let end = used + character.len_utf8();
        let Some(place) = field.get_mut(used..end) else { break };
        character.encode_utf8(place);
        used = end;
    }
    field
}

fn text(field: &[u8]) -> String {
    let used = field.split(|byte| *byte == 0).next().unwrap_or_default();
    String::from_utf8_lossy(used).into_owned()
}

/// Seconds since 1970 as a date and time that a person reads. (Days to civil date: era arithmetic of 400 years.)
fn utc(unix_seconds: u64) -> String {
    let (days, second) = (unix_seconds / 86_400, unix_seconds % 86_400);
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = if month_from_march < 10 { month_from_march + 3 } else { month_from_march - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(state: State) -> Record {
        let owner = Owner {
            id: [7; 16],
            host: "alpha".into(),
            pid: 42,
            vm: "wörld".into(),
            since_unix_seconds: 951_782_400,
        };
        Record { lease: [9; 16], generation: 3, state, owner }
    }

    #[test]
    fn every_state_survives_its_slot() {
        let session = [5; 16];
        for state in [
            State::Owned,
            State::Offered { session, peer: "unix:/x".into() },
            State::Taken { session },
            State::Returned { session },
            State::Released,
            State::InFile { digest: 0x1234 },
            State::Incoming { session },
            State::Moved { session, peer: "tcp:x:1".into() },
        ] {
            let record = record(state);
            assert_eq!(Record::from_slot(&record.to_slot(11)), Some((11, record)));
        }
    }

    #[test]
    fn any_flipped_bit_makes_the_slot_unreadable() {
        let slot = record(State::Owned).to_slot(1);
        for bit in 0..SLOT_BYTES * 8 {
            let mut torn = slot;
            torn[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Record::from_slot(&torn), None, "bit {bit}");
        }
    }

    #[test]
    fn holders_are_named_for_people() {
        assert_eq!(
            record(State::Owned).to_string(),
            "generation 3, owned, by VM \"wörld\" (host alpha, pid 42, since 2000-02-29T00:00:00Z)"
        );
        assert_eq!(utc(1_794_000_000), "2026-11-06T21:20:00Z");
        let long = Record {
            owner: Owner { vm: "ö".repeat(100), ..record(State::Owned).owner },
            ..record(State::Owned)
        };
        let (_, back) = Record::from_slot(&long.to_slot(1)).unwrap();
        assert_eq!(back.owner.vm, "ö".repeat(32));
    }
}
