//! Images on their way in.

use std::fmt;
use std::ops::Range;

use super::wire::{DigestTable, Kind, Run};
use super::{Disk, IncomingDisks, described};
use crate::headway::Brought;
use crate::lease::{Id, NotTaken};
use crate::protocol::Hello;
use crate::{Description, DestinationFactory, Error, PageBitmap, Statistics, features};

/// The step, in errors.
const DOING: &str = "receiving images";

/// The images of a guest that comes. Dropping it gives them up, unless they are owned.
pub(crate) struct Arriving {
    disks: Vec<Disk>,
    images: Box<dyn IncomingDisks>,
    has_begun: bool,
    /// Blocks that were spoken of, for each image: at the end all were.
    came: Vec<PageBitmap>,
    brought: Brought,
    /// Blocks that may be no zeroes.
    filled: Vec<PageBitmap>,
    table: DigestTable,
}

impl fmt::Debug for Arriving {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Arriving").field("disks", &self.disks).finish_non_exhaustive()
    }
}

impl Arriving {
    /// Makes room for what `hello` says that comes, if any, and takes that out of its description.
    pub fn of<F: DestinationFactory>(
        factory: &mut F,
        hello: &Hello,
        source: &mut Description,
        statistics: &Statistics,
    ) -> Result<Option<Self>, Error> {
        if hello.features & features::STORAGE == 0 {
            return Ok(None);
        }
        let refused = |reason: String| Error::Refused { reasons: vec![reason] };
        let disks = described(source).map_err(refused)?;
        let images = factory
            .receive_disks(&hello.session, &disks)
            .map_err(|source| refused(Error::Machine { doing: "receive the images", source }.chain()))?;
        let total_bytes = disks.iter().map(|disk| disk.length_bytes).sum();
        statistics.update(|s| {
            s.storage = Some(crate::Storage { total_bytes, ..crate::Storage::default() });
        });
        Ok(Some(Self::new(disks, images)))
    }

    /// Of `disks` nothing has come.
    pub fn new(disks: Vec<Disk>, images: Box<dyn IncomingDisks>) -> Self {
        let none = |disk: &Disk| PageBitmap::new(disk.blocks());
        let filled = |(index, disk): (usize, &Disk)| {
            let mut filled = none(disk);
            if !images.is_blank(index) {
                filled.set_range(0..disk.blocks());
            }
            filled
        };
        Self {
            came: disks.iter().map(none).collect(),
            brought: Brought::default(),
            filled: disks.iter().enumerate().map(filled).collect(),
            table: DigestTable::new(&disks),
            disks,
            images,
            has_begun: false,
        }
    }

    /// Places a run of blocks.
    pub fn place(&mut self, body: &[u8], statistics: &Statistics) -> Result<(), Error> {
        let (run, contents) = Run::decode(body, &self.disks).map_err(wrong)?;
        let index = usize::from(run.disk);
        let (Some(came), Some(filled)) = (self.came.get_mut(index), self.filled.get_mut(index)) else {
            return Ok(());
        };
        if !std::mem::replace(&mut self.has_begun, true) {
            self.images.begin().map_err(Error::machine("give up what was in the place of the images"))?;
        }
        if run.kind == Kind::Data {
            // A few: contents are shorter than a frame.
            let again = run.blocks().filter(|block| came.contains(*block)).count() as u64;
            let length_bytes = run.length_bytes();
            let new_bytes = length_bytes.saturating_sub(again * super::BLOCK_BYTES);
            self.brought = self.brought + Brought { bytes: length_bytes, new_bytes };
        }
        came.set_range(run.blocks());
        let written = match run.kind {
            Kind::Data => {
                filled.set_range(run.blocks());
                self.images.write(index, run.range.start, contents)
            }
            Kind::Zeroes => {
                // What is no zeroes by now. Holes stay holes, and nobody has to look.
                let mut from = run.blocks().start;
                let mut written = Ok(());
                while written.is_ok()
                    && let Some(blocks) = next_of(filled, from..run.blocks().end)
                {
                    from = blocks.end;
                    filled.clear_range(blocks.clone());
                    let end = (blocks.end * super::BLOCK_BYTES).min(run.range.end);
                    written = self.images.write_zeroes(index, blocks.start * super::BLOCK_BYTES..end);
                }
                written
            }
        };
        written.map_err(|source| Error::Machine { doing: "write an image", source })?;
        self.table.add(&run);
        statistics.update(|s| {
            if let Some(storage) = &mut s.storage {
                storage.transferred_bytes += body.len() as u64;
            }
        });
        Ok(())
    }

    /// What has come of contents. Blocks of which it was said before that they are zero do not count as new.
    pub fn brought(&self) -> Brought {
        self.brought
    }

    /// Makes stable what has come so far, while the guest still runs elsewhere: little is left for when it stands still.
    pub fn settle(&mut self) -> Result<(), Error> {
        self.images.sync().map_err(Error::machine("make the images stable"))
    }

    /// Everything has come: makes it stable. Returns the digest of all of it.
    pub fn finish(&mut self) -> Result<u64, Error> {
        for (disk, came) in self.disks.iter().zip(&self.came) {
            let missing = disk.blocks() - came.count();
            if missing > 0 {
                return Err(wrong(format!("{missing} blocks of image {} did not come", disk.name)));
            }
        }
        self.settle()?;
        Ok(self.table.digest())
    }

    /// See [`IncomingDisks::own`].
    pub fn own(
        &mut self,
        session: &Id,
        open: &mut dyn FnMut() -> Result<(), String>,
    ) -> Result<(), NotTaken> {
        self.images.own(session, open)
    }

    /// See [`IncomingDisks::disown`].
    pub fn disown(&mut self, session: &Id) -> Result<(), Error> {
        self.images.disown(session).map_err(Error::machine("give the images up"))
    }
}

/// The next blocks of `filled` in `range`.
fn next_of(filled: &PageBitmap, range: Range<u64>) -> Option<Range<u64>> {
    let run = filled.run_from(range.start, u64::MAX)?;
    (run.start < range.end).then(|| run.start..run.end.min(range.end))
}

fn wrong(reason: String) -> Error {
    Error::Protocol { doing: DOING, reason }
}

#[cfg(test)]
mod tests {
    use super::super::{BLOCK_BYTES, CHUNK_BYTES};
    use super::*;
    use crate::MachineResult;

    /// What was written, in order.
    #[derive(Default)]
    struct Written(Vec<(usize, Range<u64>, u8)>);

    impl IncomingDisks for &'static std::sync::Mutex<Written> {
        fn is_blank(&self, disk: usize) -> bool {
            disk == 0
        }

        fn begin(&mut self) -> MachineResult<()> {
            Ok(())
        }

        fn write(&mut self, disk: usize, offset_bytes: u64, contents: &[u8]) -> MachineResult<()> {
            let range = offset_bytes..offset_bytes + contents.len() as u64;
            self.lock().unwrap().0.push((disk, range, contents[0]));
            Ok(())
        }

        fn write_zeroes(&mut self, disk: usize, range: Range<u64>) -> MachineResult<()> {
            self.lock().unwrap().0.push((disk, range, 0));
            Ok(())
        }

        fn sync(&mut self) -> MachineResult<()> {
            Ok(())
        }

        fn own(&mut self, _: &Id, _: &mut dyn FnMut() -> Result<(), String>) -> Result<(), NotTaken> {
            Ok(())
        }

        fn disown(&mut self, _: &Id) -> MachineResult<()> {
            Ok(())
        }
    }

    /// Two images of two chunks and a bit, the first of which is blank.
    fn arriving() -> (Arriving, &'static std::sync::Mutex<Written>) {
        let written: &'static _ = Box::leak(Box::default());
        let disk = |name: &str| Disk {
            name: name.to_owned(),
            length_bytes: 2 * CHUNK_BYTES + 512,
            format: "raw".to_owned(),
        };
        let disks = vec![disk("a"), disk("b")];
        let none = PageBitmap::new(disks[0].blocks());
        let mut all = none.clone();
        all.set_range(0..disks[0].blocks());
        let arriving = Arriving {
            has_begun: false,
            came: vec![none.clone(), none.clone()],
            brought: Brought::default(),
            filled: vec![none, all],
            table: DigestTable::new(&disks),
            disks,
            images: Box::new(written),
        };
        (arriving, written)
    }

    fn place(arriving: &mut Arriving, run: &Run, contents: &[u8]) {
        let body = [run.encode().as_slice(), contents].concat();
        arriving.place(&body, &Statistics::new()).unwrap();
    }

    #[test]
    fn zeroes_are_written_only_where_something_may_be() {
        let (mut arriving, written) = arriving();
        let end = 2 * CHUNK_BYTES + 512;
        let block = vec![7; BLOCK_BYTES as usize];
        place(&mut arriving, &Run::zeroes(0, 0..end), &[]);
        place(&mut arriving, &Run::data(0, CHUNK_BYTES, &block), &block);
        place(&mut arriving, &Run::zeroes(0, 0..end), &[]);
        place(&mut arriving, &Run::zeroes(0, 0..end), &[]);
        place(&mut arriving, &Run::zeroes(1, CHUNK_BYTES..end), &[]);
        let block = CHUNK_BYTES..CHUNK_BYTES + BLOCK_BYTES;
        assert_eq!(
            written.lock().unwrap().0,
            [(0, block.clone(), 7), (0, block, 0), (1, CHUNK_BYTES..end, 0)]
        );
    }

    #[test]
    fn blocks_that_did_not_come_are_missed() {
        let (mut arriving, _) = arriving();
        let end = 2 * CHUNK_BYTES + 512;
        place(&mut arriving, &Run::zeroes(0, 0..end), &[]);
        place(&mut arriving, &Run::zeroes(1, 0..2 * CHUNK_BYTES), &[]);
        let error = arriving.finish().unwrap_err().to_string();
        assert!(error.contains("1 blocks of image b did not come"), "{error}");
        place(&mut arriving, &Run::data(1, 2 * CHUNK_BYTES, &[5; 512]), &[5; 512]);
        assert_ne!(arriving.finish().unwrap(), 0);
    }
}
