//! The lease of a snapshot: of a guest that goes on, and of its copy in a file.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::record::FILE_BYTES;
use super::{Error, Id, Lease, Record, State, rules};

/// The generation that a snapshot keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kept {
    /// Which lease.
    pub lease: Id,
    /// Which generation of it.
    pub generation: u64,
}

impl Lease {
    /// The guest goes on in the next generation; returns the one that it leaves, which a snapshot keeps.
    ///
    /// # Errors
    /// [`Error::Moved`]: it is not ours.
    pub fn advance(&mut self) -> Result<Kept, Error> {
        let mut locked = self.locked()?;
        let record = locked.current("take a snapshot of the guest")?;
        if !rules::holds(&record, &self.owner.id) {
            return Err(locked.moved("take a snapshot of the guest", record));
        }
        let next = self.next(record.generation)?;
        locked.write(record.lease, next, State::Owned)?;
        Ok(Kept { lease: record.lease, generation: record.generation })
    }

    /// Writes into a new file a record for the copies of the images: their guest of `generation` is in the file of this digest.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn write_copy(&self, file: &File, kept: &Kept, digest: u64) -> io::Result<()> {
        let Kept { lease, generation } = *kept;
        let record = Record { lease, generation, state: State::InFile { digest }, owner: self.owner.clone() };
        file.write_all_at(&[0; FILE_BYTES], 0)?;
        file.write_all_at(&record.to_slot(1), 0)?;
        file.sync_all()
    }
}
