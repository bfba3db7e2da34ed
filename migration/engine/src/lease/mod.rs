//! Who owns the guest: one small file that alone decides.
//!
//! The file holds two copies of a fixed-size [`Record`], each with a sequence number and a checksum. A change writes the
//! older copy and fsyncs it; a reader takes the newest copy that is whole. So a write that was torn by a crash never
//! happened, and whoever made it had not yet acted on it: every method here returns only after the fsync, and callers act
//! only after that.
//!
//! Two locks lie on the file, both of the open file description (they end with the process, and do not pass to
//! children that exec):
//!
//! - the *record lock*, exclusive, held while the record is read and rewritten, never longer;
//! - *presence*, shared, held by every process that the record calls owner for as long as it lives. It decides nothing
//!   about a migration; it only tells whoever starts a VM whether the owner in the record is still there. A record
//!   whose owner is gone without a word can be claimed; that moves the generation on, so that a message of an old
//!   migration finds another one.
//!
//! The record speaks for all images of a machine, to who starts that machine; a [`Mark`] beside an image that moves speaks for it alone.
//!
//! What may follow on what the record says is in `rules`, without I/O. Absent: when to write what; `ownership` and `file`
//! know that.

mod copy;
mod error;
mod mark;
mod moved;
mod record;
pub(crate) mod rules;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use crate::folder::sync_folder_of;
pub use copy::Kept;
pub use error::Error;
pub use mark::{Mark, mark_path};
use moved::refusal;
use record::{FILE_BYTES, SLOT_BYTES, SLOT_STRIDE_BYTES};
pub use record::{Id, Owner, Record, State, random_id, show_id};

/// How long to wait for the record lock. Its holders do a few writes and, at a destination, take image locks.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);
const LOCK_RETRY: Duration = Duration::from_millis(1);

const RECORD_RANGE: (i64, i64) = (0, FILE_BYTES as i64);
/// Beyond the contents: locks need no bytes behind them.
const PRESENCE_RANGE: (i64, i64) = (1 << 20, 1);

/// How an undecided handover was settled.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Settlement {
    /// The guest is ours, at this generation.
    Ours {
        /// The new generation.
        generation: u64,
    },
    /// Someone else has it; we never run it again.
    Theirs {
        /// What the record says.
        record: Box<Record>,
    },
}

/// Why a guest was not taken.
#[derive(Debug)]
pub enum NotTaken {
    /// It is not ours, and the record does not say that it is.
    Refused(Error),
    /// The record may say that it is ours: it could not be written, or not be read after that.
    Unknown(Error),
}

/// A process's handle on the lease file.
#[derive(Debug)]
pub struct Lease {
    file: File,
    path: PathBuf,
    owner: Owner,
    present: bool,
    /// The session of a `taken` that was written and may not be there.
    unsure: Option<Id>,
}

/// The record lock; dropping it releases it.
struct Locked<'a> {
    lease: &'a Lease,
    newest: Option<(u64, Record)>,
    /// Where the next version goes: not over the newest.
    next_slot: u64,
}

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        let _released_with_the_file_otherwise = self.lease.lock(libc::F_UNLCK, RECORD_RANGE);
    }
}

impl Lease {
    /// Opens or makes the file, claiming nothing.
    ///
    /// # Errors
    /// The file cannot be opened for writing, or is something else.
    pub fn open(path: &Path, owner: Owner) -> Result<Self, Error> {
        Self::open_with(path, owner, true)
    }

    /// Opens a file that is there, as a destination does: a wrong path leaves nothing behind.
    ///
    /// # Errors
    /// As [`open`](Self::open), or there is no such file.
    pub fn open_existing(path: &Path, owner: Owner) -> Result<Self, Error> {
        Self::open_with(path, owner, false)
    }

    fn open_with(path: &Path, owner: Owner, create: bool) -> Result<Self, Error> {
        let failed = |action| move |source| Error::Io { path: path.to_owned(), action, source };
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(create)
            .truncate(false)
            .mode(0o600)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
            .map_err(failed("open it"))?;
        if !file.metadata().map_err(failed("look at it"))?.is_file() {
            return Err(Error::NotALease { path: path.to_owned() });
        }
        let lease = Self { file, path: path.to_owned(), owner, present: false, unsure: None };
        lease.locked()?;
        Ok(lease)
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Who we are in the record.
    #[must_use]
    pub fn owner(&self) -> &Owner {
        &self.owner
    }

    /// What the record says now; `None` in a file that was just made.
    ///
    /// # Errors
    /// The file cannot be read, or nobody can tell.
    pub fn read(&self) -> Result<Option<Record>, Error> {
        Ok(self.locked()?.newest.clone().map(|(_, record)| record))
    }

    /// Whether the record's owner ran the guest and is gone without a word. Changes nothing; what it says may be over by the
    /// time that it is read.
    ///
    /// # Errors
    /// The record cannot be read, or the file system cannot tell who is there.
    pub fn is_orphaned(&self) -> Result<bool, Error> {
        let ran = |record: Record| matches!(record.state, State::Owned | State::Taken { .. });
        Ok(self.read()?.is_some_and(ran) && !self.is_someone_present()?)
    }

    /// Whether a process that may be the record's owner is there.
    fn is_someone_present(&self) -> Result<bool, Error> {
        let mut range = lock_of(libc::F_WRLCK, PRESENCE_RANGE);
        fcntl(&self.file, FcntlArg::F_OFD_GETLK(&mut range))
            .map_err(|errno| self.io("look for locks on it", errno.into()))?;
        Ok(i32::from(range.l_type) != libc::F_UNLCK)
    }

    /// At the start of a VM: makes us the owner, if nobody living is, no file holds the guest, and it has not gone elsewhere with its
    /// images. Returns our generation, and what the record said before.
    ///
    /// # Errors
    /// [`Error::Held`] names the holder; [`Error::Suspended`]; [`Error::WithoutGuest`].
    pub fn claim(&mut self) -> Result<(u64, Option<Record>), Error> {
        self.claim_unless(|record| record.is_in_file() || record.is_without_guest())
    }

    /// As [`Self::claim`], and gives up a guest that lies in a file: that cannot be restored any more.
    ///
    /// # Errors
    /// [`Error::Held`] names the holder; [`Error::WithoutGuest`].
    pub fn claim_anew(&mut self) -> Result<(u64, Option<Record>), Error> {
        self.claim_unless(Record::is_without_guest)
    }

    fn claim_unless(&mut self, refused: impl Fn(&Record) -> bool) -> Result<(u64, Option<Record>), Error> {
        self.claim_as(State::Owned, "start", |record| !record.is_some_and(&refused)).map_err(|error| {
            match error {
                Error::Moved { path, record, .. } => refusal(path, record),
                error => error,
            }
        })
    }

    /// Whether [`Self::claim`] would be refused now, without changing anything.
    ///
    /// # Errors
    /// Those of [`Self::claim`].
    pub fn check_claim(&self) -> Result<(), Error> {
        let (path, record) = (self.path.clone(), self.read()?.map(Box::new));
        match record {
            Some(record) if self.is_someone_present()? => Err(Error::Held { path, record }),
            Some(record) if record.is_in_file() || record.is_without_guest() => Err(refusal(path, record)),
            _ => Ok(()),
        }
    }

    /// At the restore of a file: makes us the owner, if the guest is still in the file of this digest and generation.
    ///
    /// # Errors
    /// [`Error::Held`], or [`Error::Moved`] that names both generations.
    pub fn claim_file(&mut self, lease: &Id, generation: u64, digest: u64) -> Result<u64, Error> {
        let action = format!("restore a file that was written at generation {generation}");
        let in_file = State::InFile { digest };
        let (generation, _) = self.claim_as(State::Owned, &action, |record| {
            record.is_some_and(|r| r.lease == *lease && r.generation == generation && r.state == in_file)
        })?;
        Ok(generation)
    }

    fn claim_as(
        &mut self,
        state: State,
        action: &str,
        allowed: impl Fn(Option<&Record>) -> bool,
    ) -> Result<(u64, Option<Record>), Error> {
        let claimed = {
            let mut locked = self.locked()?;
            let previous = self.be_alone(&locked, action, allowed)?;
            let generation = self.next(previous.as_ref().map_or(0, |record| record.generation))?;
            let lease = match &previous {
                Some(record) => record.lease,
                None => random_id().map_err(|source| self.io("draw its name", source))?,
            };
            locked.write(lease, generation, state)?;
            // From exclusive to shared in one step: nobody comes between.
            self.lock(libc::F_RDLCK, PRESENCE_RANGE)?;
            (generation, previous)
        };
        self.present = true;
        Ok(claimed)
    }

    /// Takes presence alone, if what the record says is `allowed`; returns that. Under the record lock, so that of two who find the
    /// owner gone only one goes on.
    fn be_alone(
        &self,
        locked: &Locked<'_>,
        action: &str,
        allowed: impl Fn(Option<&Record>) -> bool,
    ) -> Result<Option<Record>, Error> {
        let previous = locked.newest.as_ref().map(|(_, record)| record.clone());
        if !self.lock(libc::F_WRLCK, PRESENCE_RANGE)? {
            return Err(match previous {
                Some(record) => Error::Held { path: self.path.clone(), record: Box::new(record) },
                None => Error::Busy { path: self.path.clone(), waited: Duration::ZERO },
            });
        }
        if allowed(previous.as_ref()) {
            return Ok(previous);
        }
        self.lock(libc::F_UNLCK, PRESENCE_RANGE)?;
        Err(match previous {
            Some(record) => locked.moved(action, record),
            None => Error::NotALease { path: self.path.clone() },
        })
    }

    /// Source, before the first byte of COMMIT: lets the destination of `session` take the guest. Returns the generation
    /// that COMMIT carries.
    ///
    /// # Errors
    /// [`Error::Moved`]: the guest is not ours to give.
    pub fn offer(&mut self, session: &Id, peer: &str) -> Result<u64, Error> {
        let mut locked = self.locked()?;
        let record = locked.current("offer the guest")?;
        let Some(change) = rules::offer(&record, &self.owner.id, session, peer) else {
            return Err(locked.moved("offer the guest", record));
        };
        locked.write(record.lease, change.generation, change.state)?;
        Ok(record.generation)
    }

    /// Destination: makes us the owner, if the record offers us exactly this. `under_lock` runs between the check and the
    /// write (it takes the image locks and opens the images); if it fails the record stays. Returns the new generation. What is
    /// [not known](NotTaken::Unknown) becomes known by calling it again.
    ///
    /// # Errors
    /// [`Error::Moved`]: the source has settled otherwise. [`Error::Condition`]: `under_lock` failed.
    pub fn take(
        &mut self,
        session: &Id,
        generation: u64,
        under_lock: impl FnOnce() -> Result<(), String>,
    ) -> Result<u64, NotTaken> {
        let taken = self.try_to_take(session, generation, under_lock);
        self.unsure = match &taken {
            Err(NotTaken::Unknown(_)) => Some(*session),
            Ok(_) | Err(NotTaken::Refused(_)) => None,
        };
        match &taken {
            Ok(_) => self.present = true,
            // Whoever looks for the owner must not find us.
            Err(NotTaken::Refused(_)) => self.leave().map_err(NotTaken::Unknown)?,
            Err(NotTaken::Unknown(_)) => {}
        }
        taken
    }

    fn try_to_take(
        &self,
        session: &Id,
        generation: u64,
        under_lock: impl FnOnce() -> Result<(), String>,
    ) -> Result<u64, NotTaken> {
        let failed = |may_be_ours: bool| {
            move |error| if may_be_ours { NotTaken::Unknown(error) } else { NotTaken::Refused(error) }
        };
        let wrote_before = self.unsure == Some(*session);
        let mut locked = self.locked().map_err(failed(wrote_before))?;
        let action = format!("take generation {generation} in session {}", show_id(session));
        let record = locked.current(&action).map_err(failed(wrote_before))?;
        let Some(change) = rules::take(&record, &self.owner.id, session, generation) else {
            return Err(NotTaken::Refused(locked.moved(&action, record)));
        };
        let is_ours = rules::is_taken(&record, &self.owner.id, session);
        under_lock().map_err(|reason| failed(is_ours)(Error::Condition { reason }))?;
        if !self.lock(libc::F_RDLCK, PRESENCE_RANGE).map_err(failed(is_ours))? {
            // Only `claim` takes presence alone, and it holds the record lock while it does.
            return Err(failed(is_ours)(self.io("show presence on it", Errno::EAGAIN.into())));
        }
        // What fails from here on may have reached the disk.
        locked.write(record.lease, change.generation, change.state).map_err(NotTaken::Unknown)?;
        Ok(change.generation)
    }

    /// Destination: it was taken, but nothing ran and nothing ever will. The source may have it back.
    ///
    /// # Errors
    /// [`Error::Moved`]: the record is not our `taken` of this session.
    pub fn give_back(&mut self, session: &Id) -> Result<(), Error> {
        let moved = {
            let mut locked = self.locked()?;
            let record = locked.current("give the guest back")?;
            match rules::give_back(&record, &self.owner.id, session) {
                Some(change) => {
                    locked.write(record.lease, change.generation, change.state)?;
                    None
                }
                None => Some(locked.moved("give the guest back", record)),
            }
        };
        // Presence may have been shown before the record could not be written: whoever looks for its owner must not find us.
        self.leave()?;
        moved.map_or(Ok(()), Err)
    }

    /// Source: decides an attempt that ended without an answer. A record that is still our offer, that was returned to us, or
    /// that says we had put the guest into a file, becomes ours with a new generation, and a late COMMIT or restore finds
    /// that. Safe to call again.
    ///
    /// # Errors
    /// The record cannot be read or written: then nothing is decided.
    pub fn settle(&mut self, session: &Id) -> Result<Settlement, Error> {
        let mut locked = self.locked()?;
        let record = locked.current("settle a handover")?;
        match rules::settle(&record, &self.owner.id, self.present, session) {
            rules::Settle::Kept => Ok(Settlement::Ours { generation: record.generation }),
            rules::Settle::Gone => Ok(Settlement::Theirs { record: Box::new(record) }),
            rules::Settle::Back(change) => {
                let generation = change.generation;
                locked.write(record.lease, generation, change.state)?;
                Ok(Settlement::Ours { generation })
            }
        }
    }

    /// The guest goes into a file with this digest. Returns the generation (the file knows it already).
    ///
    /// # Errors
    /// [`Error::Moved`]: it is not ours.
    pub fn suspend(&mut self, generation: u64, digest: u64) -> Result<(), Error> {
        self.end(State::InFile { digest }, "suspend the guest", Some(generation))
    }

    /// At a clean exit: nobody runs the guest any more.
    ///
    /// # Errors
    /// [`Error::Moved`]: it is not ours.
    pub fn release(&mut self) -> Result<(), Error> {
        self.end(State::Released, "release the guest", None)
    }

    fn end(&mut self, state: State, action: &str, generation: Option<u64>) -> Result<(), Error> {
        {
            let mut locked = self.locked()?;
            let record = locked.current(action)?;
            let ours = rules::holds(&record, &self.owner.id);
            if !ours || generation.is_some_and(|generation| generation != record.generation) {
                return Err(locked.moved(action, record));
            }
            locked.write(record.lease, record.generation, state)?;
        }
        self.leave()
    }

    /// Withdraws our presence: the guest is someone else's.
    ///
    /// # Errors
    /// The lock could not be released.
    pub fn leave(&mut self) -> Result<(), Error> {
        self.lock(libc::F_UNLCK, PRESENCE_RANGE)?;
        self.present = false;
        Ok(())
    }

    /// Takes the record lock and reads the newest whole copy.
    fn locked(&self) -> Result<Locked<'_>, Error> {
        let start = Instant::now();
        while !self.lock(libc::F_WRLCK, RECORD_RANGE)? {
            if start.elapsed() > LOCK_PATIENCE {
                return Err(Error::Busy { path: self.path.clone(), waited: start.elapsed() });
            }
            std::thread::sleep(LOCK_RETRY);
        }
        let mut locked = Locked { lease: self, newest: None, next_slot: 0 };
        let metadata = self.file.metadata().map_err(|e| self.io("look at it", e))?;
        if metadata.nlink() == 0 {
            // What is said here nobody would read.
            return Err(self.io("lock it", io::Error::other("it was removed meanwhile")));
        }
        let length = metadata.len();
        let (mut whole, mut foreign, mut blank) = (false, false, true);
        for index in 0..2 {
            let mut slot = [0; SLOT_BYTES];
            let offset = index * SLOT_STRIDE_BYTES as u64;
            let count = read_fully(&self.file, &mut slot, offset).map_err(|e| self.io("read it", e))?;
            let empty = slot[..count].iter().all(|byte| *byte == 0);
            blank &= empty;
            if let Some((sequence, record)) = Record::from_slot(&slot) {
                whole = true;
                if locked.newest.as_ref().is_none_or(|(newest, _)| sequence > *newest) {
                    locked.newest = Some((sequence, record));
                    locked.next_slot = 1 - index;
                }
            } else if !empty && !Record::has_magic(&slot) {
                foreign = true;
            }
        }
        // Blank: just made, by us or by someone who crashed before the first record.
        let ours = length == FILE_BYTES as u64;
        if whole || length == 0 || (ours && blank) {
            return Ok(locked);
        }
        let path = self.path.clone();
        Err(if foreign || !ours { Error::NotALease { path } } else { Error::Damaged { path } })
    }

    /// Sets or clears a lock of this open file description; `false` if another one is in the way.
    fn lock(&self, kind: i32, range: (i64, i64)) -> Result<bool, Error> {
        let range = lock_of(kind, range);
        loop {
            match fcntl(&self.file, FcntlArg::F_OFD_SETLK(&range)) {
                Ok(_) => return Ok(true),
                Err(Errno::EAGAIN | Errno::EACCES) => return Ok(false),
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(self.io("lock it", errno.into())),
            }
        }
    }

    /// Numbers in the file are whoever's wrote it.
    fn next(&self, number: u64) -> Result<u64, Error> {
        number.checked_add(1).ok_or_else(|| Error::Condition {
            reason: format!("lease {}: its numbers have come to their end", self.path.display()),
        })
    }

    fn io(&self, action: &'static str, source: io::Error) -> Error {
        Error::Io { path: self.path.clone(), action, source }
    }
}

impl Locked<'_> {
    fn current(&self, action: &str) -> Result<Record, Error> {
        match &self.newest {
            Some((_, record)) => Ok(record.clone()),
            None => Err(Error::Condition {
                reason: format!("lease {}: cannot {action}: the file is empty", self.lease.path.display()),
            }),
        }
    }

    fn moved(&self, action: &str, record: Record) -> Error {
        Error::Moved { path: self.lease.path.clone(), action: action.to_owned(), record: Box::new(record) }
    }

    /// Writes the next version, by us, and returns when it is on stable storage.
    fn write(&mut self, lease: Id, generation: u64, state: State) -> Result<(), Error> {
        self.write_record(Record { lease, generation, state, owner: self.lease.owner.clone() })
    }

    fn write_record(&mut self, record: Record) -> Result<(), Error> {
        let sequence = self.lease.next(self.newest.as_ref().map_or(0, |(sequence, _)| *sequence))?;
        let first = self.newest.is_none();
        if first {
            // Both copies have their blocks from the start: later writes change no metadata, and fsync is cheap.
            self.lease.file.write_all_at(&[0; FILE_BYTES], 0).map_err(|e| self.lease.io("write it", e))?;
        }
        self.lease
            .file
            .write_all_at(&record.to_slot(sequence), self.next_slot * SLOT_STRIDE_BYTES as u64)
            .map_err(|e| self.lease.io("write it", e))?;
        self.lease.file.sync_data().map_err(|e| self.lease.io("sync it", e))?;
        if first {
            sync_folder_of(&self.lease.path).map_err(|e| self.lease.io("sync the folder of it", e))?;
        }
        self.newest = Some((sequence, record));
        self.next_slot = 1 - self.next_slot;
        Ok(())
    }
}

fn lock_of(kind: i32, (start, length): (i64, i64)) -> libc::flock {
    libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: start,
        l_len: length,
        l_pid: 0,
    }
}

fn read_fully(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut filled = 0;
    while let Some(rest) = buffer.get_mut(filled..)
        && !rest.is_empty()
    {
        match file.read_at(rest, offset + filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests;
