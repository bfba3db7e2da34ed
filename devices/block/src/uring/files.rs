//! The files that a ring has registered: the kernel then need not look a descriptor up for each entry and count its users.

use std::collections::HashMap;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Weak};

use io_uring::IoUring;

use crate::file::OpenFile;

/// Places of the table, which starts empty: as many as a controller has namespaces.
const PLACES: u32 = 1024;

/// Which file is where in the ring's table.
///
/// A place is kept by a [`Weak`], so that a registered file does not count as used and can be released; its descriptor is closed
/// when the place is used again, or with the ring.
#[derive(Debug, Default)]
pub(super) struct Files {
    places: Vec<Weak<OpenFile>>,
    /// Places by the address of their [`OpenFile`], which nobody else can have while there is a [`Weak`].
    by_address: HashMap<usize, u32>,
    /// The file of the last request is often that of the next.
    last: Option<(usize, u32)>,
    capacity: u32,
}

impl Files {
    /// An empty table. Without places where the kernel has no such tables (before 5.19).
    pub(super) fn new(ring: &IoUring) -> Self {
        let capacity = ring.submitter().register_files_sparse(PLACES).map_or(0, |()| PLACES);
        Self { capacity, ..Self::default() }
    }

    /// The place of `file`, which gets one if there is one left.
    pub(super) fn place(&mut self, ring: &IoUring, file: &Arc<OpenFile>) -> Option<u32> {
        let address = Arc::as_ptr(file).addr();
        if let Some((last, place)) = self.last
            && last == address
        {
            return Some(place);
        }
        let place = match self.by_address.get(&address) {
            Some(&place) => place,
            None => self.register(ring, file, address)?,
        };
        self.last = Some((address, place));
        Some(place)
    }

    fn register(&mut self, ring: &IoUring, file: &Arc<OpenFile>, address: usize) -> Option<u32> {
        // No request can be on its way to a file that nobody holds.
        let gone = self.places.iter().position(|place| place.strong_count() == 0);
        let place = gone.unwrap_or(self.places.len());
        let number = u32::try_from(place).ok().filter(|number| *number < self.capacity)?;
        ring.submitter().register_files_update(number, &[file.file().as_raw_fd()]).ok()?;
        let kept = Arc::downgrade(file);
        match self.places.get_mut(place) {
            Some(old) => {
                self.by_address.remove(&old.as_ptr().addr());
                *old = kept;
            }
            None => self.places.push(kept),
        }
        self.by_address.insert(address, number);
        Some(number)
    }

    /// Places that were given.
    #[cfg(test)]
    pub(super) fn count(&self) -> usize {
        self.places.len()
    }
}
