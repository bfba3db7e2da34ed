//! The images of a machine that leaves.

use std::ops::Range;
use std::sync::{Arc, Mutex};

use anyhow::Context;
use block::Backend;
use engine::lease::{Id, Lease, Mark, State, show_id};
use engine::storage::{BLOCK_BYTES, Disk, OutgoingDisks};
use engine::{MachineResult, PageBitmap};

use super::{ImageIo, Place, only_the_lease_tells, places};
use crate::machine::Machine;
use crate::migrate::{images, lock};
use crate::vmm::{Vmm, marks};

/// The images of the machine of a [`Vmm`], for one attempt. The lease is here meanwhile, and goes back in the end.
pub struct Outgoing {
    vmm: Arc<Vmm>,
    /// Shared with the machine, which says in the end that nobody is here any more.
    lease: Arc<Mutex<Option<Lease>>>,
    images: Vec<(Place, Arc<dyn Backend>)>,
    io: ImageIo,
    /// What is said beside each image.
    mark: Option<Mark>,
    /// The lease says, or may say, that they have gone.
    have_moved: bool,
}

impl Outgoing {
    /// Those of `machine`, which is that of `vmm`. The lease goes into `lease`.
    ///
    /// # Errors
    /// The guest may write something that is no image of the host's, or nobody has a lease.
    pub fn new(vmm: &Arc<Vmm>, machine: &Machine, lease: &Arc<Mutex<Option<Lease>>>) -> anyhow::Result<Self> {
        // What cannot be copied into a snapshot cannot go along either.
        images::of(&vmm.spec, machine)?;
        let backend = |place: Place| {
            let disk = machine.resources().disks().get(place.controller);
            let images = disk.map(|disk| disk.subsystem.images()).unwrap_or_default();
            let image = images.into_iter().find(|(nsid, _)| *nsid == place.nsid);
            let (_, image) = image.with_context(|| format!("there is no image {}", place.name))?;
            Ok((place, image))
        };
        let images = places(&vmm.spec).into_iter().map(backend).collect::<anyhow::Result<Vec<_>>>()?;
        let io = ImageIo::new()?;
        let found =
            vmm.take_lease().context("there is no lease record beside an image, to say where they went")?;
        *lock(lease) = Some(found);
        Ok(Self { vmm: Arc::clone(vmm), lease: Arc::clone(lease), images, io, mark: None, have_moved: false })
    }

    fn image(&self, disk: usize) -> anyhow::Result<(&Place, &Arc<dyn Backend>)> {
        let (place, image) = self.images.get(disk).with_context(|| format!("there is no image {disk}"))?;
        Ok((place, image))
    }

    fn with_lease<T>(
        &self,
        change: impl FnOnce(&mut Lease) -> Result<T, engine::lease::Error>,
    ) -> anyhow::Result<T> {
        let mut lease = lock(&self.lease);
        Ok(change(lease.as_mut().context("the lease is with somebody else")?)?)
    }

    /// Says beside each image for good what the lease says of all, or nothing any more.
    fn settle_marks(&self) {
        let Some(mark) = &self.mark else { return };
        for (place, _) in &self.images {
            let Some(path) = marks::place(&place.path) else { continue };
            let settled = if self.have_moved { mark.keep(&path) } else { mark.remove(&path) };
            if let Err(error) = settled {
                // The lease says the same, as long as it is this guest's.
                log::error!("{:#}", anyhow::Error::new(error));
            }
        }
    }
}

impl Drop for Outgoing {
    fn drop(&mut self) {
        for (_, image) in &self.images {
            if let Some(dirty) = image.dirty_blocks() {
                dirty.disarm();
            }
        }
        self.settle_marks();
        self.vmm.return_lease(lock(&self.lease).take());
    }
}

impl OutgoingDisks for Outgoing {
    fn disks(&self) -> Vec<Disk> {
        let disk = |(place, image): &(Place, Arc<dyn Backend>)| {
            let capacity_bytes = image.identity().capacity_bytes;
            Disk {
                name: place.name.clone(),
                length_bytes: capacity_bytes - capacity_bytes % place.block_bytes,
                format: place.format.to_owned(),
            }
        };
        self.images.iter().map(disk).collect()
    }

    fn start_tracking(&mut self) -> MachineResult<()> {
        for (place, image) in &self.images {
            let dirty = image.dirty_blocks();
            let dirty = dirty.with_context(|| format!("changes of image {} are not seen", place.name))?;
            dirty.arm(image.identity().capacity_bytes);
        }
        Ok(())
    }

    fn populated(&mut self, disk: usize) -> MachineResult<Vec<Range<u64>>> {
        let (_, image) = self.image(disk)?;
        Ok(whole_blocks(|from| image.next_data(from))?)
    }

    fn collect_dirty(&mut self) -> MachineResult<Vec<PageBitmap>> {
        let disks = self.disks();
        let collect = |((place, image), disk): (&(Place, Arc<dyn Backend>), &Disk)| {
            let words = image.dirty_blocks().and_then(block::DirtyBlocks::take);
            let words = words.with_context(|| format!("changes of image {} are not seen", place.name))?;
            Ok(PageBitmap::from_words(words, disk.blocks()))
        };
        Ok(self.images.iter().zip(&disks).map(collect).collect::<anyhow::Result<_>>()?)
    }

    fn read(&mut self, disk: usize, offset_bytes: u64, into: &mut [u8]) -> MachineResult<()> {
        let (place, image) = self.image(disk)?;
        let (name, image) = (place.name.clone(), Arc::clone(image));
        let read = self.io.read(&*image, offset_bytes, into);
        Ok(read.with_context(|| format!("cannot read image {name}"))?)
    }

    fn prepare_to_leave(&mut self, id: &Id, peer: &str) -> MachineResult<()> {
        let state = State::Moved { session: *id, peer: peer.to_owned() };
        let mark = self.with_lease(|lease| lease.mark(state))?;
        let mark = self.mark.insert(mark);
        for (place, _) in &self.images {
            match marks::place(&place.path) {
                Some(path) => mark.write(&path)?,
                None => log::warn!("{}", only_the_lease_tells(&place.path)),
            }
        }
        Ok(())
    }

    fn mark_moved(&mut self, id: &Id, peer: &str) -> MachineResult<()> {
        self.have_moved = true;
        Ok(self.with_lease(|lease| lease.mark_moved(id, peer))?)
    }

    fn take_back(&mut self, id: &Id) -> MachineResult<()> {
        let taken = self.with_lease(|lease| lease.take_back(id));
        taken.with_context(|| {
            format!("if session {} never ran elsewhere, start it again with --force-stale", show_id(id))
        })?;
        self.have_moved = false;
        Ok(())
    }
}

/// What `next` finds, in whole blocks: as many ranges as there are runs of those at most, however a guest has cut its image into pieces.
fn whole_blocks<E>(mut next: impl FnMut(u64) -> Result<Option<Range<u64>>, E>) -> Result<Vec<Range<u64>>, E> {
    let (mut ranges, mut from) = (Vec::<Range<u64>>::new(), 0);
    while let Some(data) = next(from)? {
        let start = data.start / BLOCK_BYTES * BLOCK_BYTES;
        // Nothing in the rest of a block has to be looked for.
        from = data.end.max(from).next_multiple_of(BLOCK_BYTES);
        match ranges.last_mut() {
            Some(last) if last.end >= start => last.end = from,
            _ => ranges.push(start..from),
        }
    }
    Ok(ranges)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_in_pieces_is_few_ranges_of_whole_blocks() {
        const PIECE: u64 = 4096;
        let found = |pieces: &[u64]| {
            let mut looked = 0;
            let ranges = whole_blocks(|from| {
                looked += 1;
                let piece = pieces.iter().find(|piece| (*piece + 1) * PIECE > from);
                Ok::<_, ()>(piece.map(|piece| (piece * PIECE).max(from)..(piece + 1) * PIECE))
            });
            (ranges.unwrap(), looked)
        };
        let every_second: Vec<_> = (0..4096).step_by(2).collect();
        let blocks = 4096 * PIECE / BLOCK_BYTES;
        assert_eq!(found(&every_second), (std::iter::once(0..4096 * PIECE).collect(), blocks + 1));
        assert_eq!(
            found(&[1, 40, 41, 47, 80]).0,
            [0..BLOCK_BYTES, 2 * BLOCK_BYTES..3 * BLOCK_BYTES, 5 * BLOCK_BYTES..6 * BLOCK_BYTES]
        );
        assert_eq!(found(&[]), (vec![], 1));
    }
}
