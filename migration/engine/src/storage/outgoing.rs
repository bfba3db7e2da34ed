//! Images on their way out.

use std::fmt;
use std::ops::Range;
use std::time::{Duration, Instant};

use stream::frame::{HEADER_BYTES, Kind as Frame};

use super::wire::{CONTENTS_BYTES_MAX, DigestTable, HEAD_BYTES, Kind, Run, ZEROES_BYTES_MAX};
use super::{BLOCK_BYTES, CHUNK_BYTES, Disk, OutgoingDisks, describe};
use crate::lease::Id;
use crate::ram::{PAGE_LENGTH, is_zero};
use crate::sink::Sink;
use crate::{Context, Description, Error, PageBitmap, SourceMachine, Statistics};

/// How often the destination's user hears of a round that takes long.
const REPORT_INTERVAL: Duration = Duration::from_secs(1);

/// The images of a guest that leaves, and what of them the destination lacks.
pub(crate) struct Leaving {
    disks: Vec<Disk>,
    images: Box<dyn OutgoingDisks>,
    /// To be read and sent, for each image.
    dirty: Vec<PageBitmap>,
    /// What nobody has to read, in the first round: the image, and where.
    holes: Vec<(u16, Range<u64>)>,
    table: DigestTable,
    frame: Vec<u8>,
    reported: Instant,
}

impl fmt::Debug for Leaving {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Leaving").field("disks", &self.disks).finish_non_exhaustive()
    }
}

impl Leaving {
    /// Those of `machine`, if they are to go. Nothing is tracked yet.
    pub fn of(machine: &mut dyn SourceMachine, context: &Context<'_>) -> Result<Option<Self>, Error> {
        if !context.parameters.storage() {
            return Ok(None);
        }
        let blocked = |reason: String| Error::Blocked { reasons: vec![reason] };
        if context.lease.is_some() {
            return Err(blocked(
                "a lease that both sides have says nothing of images that each has".to_owned(),
            ));
        }
        let images = machine
            .storage()
            .map_err(|source| blocked(Error::Machine { doing: "send its images", source }.chain()))?;
        let disks = images.disks();
        let total_bytes = disks.iter().map(|disk| disk.length_bytes).fold(0, u64::saturating_add);
        debug_assert!(disks.is_sorted_by_key(|disk| &disk.name), "numbers mean the same at both ends");
        if disks.is_empty() || total_bytes > super::IMAGES_BYTES_MAX {
            let count = disks.len();
            return Err(blocked(format!("{count} images of {total_bytes} bytes in all cannot go with it")));
        }
        context.statistics.update(|s| {
            s.storage = Some(crate::Storage { total_bytes, ..crate::Storage::default() });
        });
        Ok(Some(Self {
            dirty: disks.iter().map(|disk| PageBitmap::new(disk.blocks())).collect(),
            table: DigestTable::new(&disks),
            holes: Vec::new(),
            frame: Vec::with_capacity(HEADER_BYTES + HEAD_BYTES + CONTENTS_BYTES_MAX),
            reported: Instant::now(),
            disks,
            images,
        }))
    }

    /// Adds them to what the destination reads.
    pub fn describe(&self, description: &mut Description) {
        describe(&self.disks, description);
    }

    /// From here on changes are seen; all that is no hole is to be sent to `peer`.
    pub fn begin(&mut self, session: &Id, peer: &str) -> Result<(), Error> {
        let marked = self.images.prepare_to_leave(session, peer);
        marked.map_err(Error::machine("mark each image as one that leaves"))?;
        self.images.start_tracking().map_err(Error::machine("track changes of the images"))?;
        // Tracking comes first: what is written to a hole while the holes are looked for is dirty.
        for (index, (disk, dirty)) in (0_u16..).zip(self.disks.iter().zip(&mut self.dirty)) {
            let populated = self.images.populated(index.into());
            for Range { start, end } in populated.map_err(Error::machine("find the holes of an image"))? {
                dirty.set_range(start / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES));
            }
            let mut start = 0;
            while start < disk.blocks() {
                let run = dirty.run_from(start, u64::MAX).unwrap_or(disk.blocks()..disk.blocks());
                if start < run.start {
                    self.holes.push((index, bytes_of(disk, start..run.start)));
                }
                start = run.end;
            }
        }
        Ok(())
    }

    /// What is to be sent, as far as is known.
    pub fn remaining_bytes(&self) -> u64 {
        self.dirty.iter().map(PageBitmap::count).sum::<u64>() * BLOCK_BYTES
    }

    /// Takes what the guest has changed since the last look. Returns how much that is.
    pub fn look(&mut self, statistics: &Statistics) -> Result<u64, Error> {
        let more =
            self.images.collect_dirty().map_err(Error::machine("see what has changed in the images"))?;
        self.dirty.iter_mut().zip(&more).for_each(|(dirty, more)| dirty.union(more));
        let remaining_bytes = self.remaining_bytes();
        update(statistics, |s| s.remaining_bytes = remaining_bytes);
        Ok(more.iter().map(PageBitmap::count).sum::<u64>() * BLOCK_BYTES)
    }

    /// Sends what is dirty while the guest runs, as far as the time of the migration allows. Returns how much of the images that was.
    pub fn round(&mut self, context: &Context<'_>, sink: &mut Sink<'_>) -> Result<u64, Error> {
        let before = self.remaining_bytes();
        update(context.statistics, |s| s.rounds = s.rounds.saturating_add(1));
        let parameters = context.parameters;
        self.send(context.statistics, sink, &mut || {
            parameters.convergence().is_out_of_time(context.statistics.elapsed())
        })?;
        Ok(before - self.remaining_bytes())
    }

    /// Sends the last of it: the guest stands still, and nobody changes an image any more.
    pub fn last_round(&mut self, statistics: &Statistics, sink: &mut Sink<'_>) -> Result<(), Error> {
        self.look(statistics)?;
        update(statistics, |s| s.downtime_bytes = s.remaining_bytes);
        self.send(statistics, sink, &mut || false)
    }

    /// Of all that was sent.
    pub fn digest(&self) -> u64 {
        self.table.digest()
    }

    /// See [`OutgoingDisks::mark_moved`].
    pub fn mark_moved(&mut self, session: &Id, peer: &str) -> Result<(), Error> {
        self.images.mark_moved(session, peer).map_err(Error::machine("mark the images as moved"))
    }

    /// See [`OutgoingDisks::take_back`].
    pub fn take_back(&mut self, session: &Id) -> Result<(), Error> {
        self.images.take_back(session).map_err(Error::machine("say that the images are the guest's again"))
    }

    /// Until nothing is left, or `is_over` says so between two chunks.
    fn send(
        &mut self,
        statistics: &Statistics,
        sink: &mut Sink<'_>,
        is_over: &mut dyn FnMut() -> bool,
    ) -> Result<(), Error> {
        for (disk, hole) in std::mem::take(&mut self.holes) {
            self.send_zeroes(disk, hole, sink)?;
        }
        let mut remaining_bytes = self.remaining_bytes();
        for index in 0..self.disks.len() {
            let mut from = 0;
            while let Some(blocks) = self.next(index, from) {
                if is_over() {
                    return Ok(());
                }
                from = blocks.end;
                remaining_bytes -= (blocks.end - blocks.start) * BLOCK_BYTES;
                let sent_bytes = self.send_blocks(index, blocks, sink)?;
                update(statistics, |s| {
                    s.transferred_bytes += sent_bytes;
                    s.remaining_bytes = remaining_bytes;
                });
                if self.reported.elapsed() >= REPORT_INTERVAL {
                    self.reported = Instant::now();
                    sink.report(&statistics.progress())?;
                }
            }
        }
        Ok(())
    }

    /// The next blocks of an image, from one on, that are read in one go: in one chunk, and few enough for one frame.
    fn next(&self, index: usize, from: u64) -> Option<Range<u64>> {
        const CHUNK_BLOCKS: u64 = CHUNK_BYTES / BLOCK_BYTES;
        let run = self.dirty.get(index)?.run_from(from, CONTENTS_BYTES_MAX as u64 / BLOCK_BYTES)?;
        Some(run.start..run.end.min((run.start / CHUNK_BLOCKS + 1) * CHUNK_BLOCKS))
    }

    /// Reads blocks and sends them, those that are zero without contents. They are dirty no more. Returns how many bytes went.
    fn send_blocks(&mut self, index: usize, blocks: Range<u64>, sink: &mut Sink<'_>) -> Result<u64, Error> {
        let Some((disk, dirty)) = self.disks.get(index).zip(self.dirty.get_mut(index)) else { return Ok(0) };
        dirty.clear_range(blocks.clone());
        let range = bytes_of(disk, blocks);
        let number = index as u16;
        // Where the contents of a frame are: what is sent from there is not copied before.
        const START: usize = HEADER_BYTES + HEAD_BYTES;
        let mut frame = std::mem::take(&mut self.frame);
        frame.resize(START + (range.end - range.start) as usize, 0);
        let contents = frame.get_mut(START..).unwrap_or_default();
        self.images
            .read(index, range.start, contents)
            .map_err(|source| Error::Machine { doing: "read an image", source })?;
        let runs = runs_of(number, range.start, contents);
        let mut sent_bytes = 0;
        match runs.as_slice() {
            [run] if run.kind == Kind::Data => sent_bytes += self.send_frame(run, &mut frame, sink)?,
            runs => {
                for run in runs {
                    if run.kind == Kind::Zeroes {
                        sent_bytes += self.send_frame(run, &mut [0; START], sink)?;
                        continue;
                    }
                    let start = START + (run.range.start - range.start) as usize;
                    let part = frame.get(start..start + run.length_bytes() as usize).unwrap_or_default();
                    let mut part = [&[0; START], part].concat();
                    sent_bytes += self.send_frame(run, &mut part, sink)?;
                }
            }
        }
        self.frame = frame;
        Ok(sent_bytes)
    }

    fn send_zeroes(&mut self, disk: u16, range: Range<u64>, sink: &mut Sink<'_>) -> Result<(), Error> {
        let mut start = range.start;
        while start < range.end {
            let end = range.end.min(start + ZEROES_BYTES_MAX);
            self.send_frame(&Run::zeroes(disk, start..end), &mut [0; HEADER_BYTES + HEAD_BYTES], sink)?;
            start = end;
        }
        Ok(())
    }

    fn send_frame(&mut self, run: &Run, frame: &mut [u8], sink: &mut Sink<'_>) -> Result<u64, Error> {
        if let Some(place) = frame.get_mut(HEADER_BYTES..HEADER_BYTES + HEAD_BYTES) {
            place.copy_from_slice(&run.encode());
        }
        sink.send_frame(Frame::Blocks, frame)?;
        self.table.add(run);
        Ok(frame.len() as u64)
    }
}

fn update(statistics: &Statistics, change: impl FnOnce(&mut crate::Storage)) {
    statistics.update(|s| s.storage.as_mut().map(change).unwrap_or_default());
}

/// The bytes of blocks of an image, whose last block may be shorter.
fn bytes_of(disk: &Disk, blocks: Range<u64>) -> Range<u64> {
    blocks.start * BLOCK_BYTES..(blocks.end * BLOCK_BYTES).min(disk.length_bytes)
}

/// What contents at `offset_bytes` of an image are sent as: runs of blocks that are zero, and runs of others.
fn runs_of(disk: u16, offset_bytes: u64, contents: &[u8]) -> Vec<Run> {
    let mut runs: Vec<(bool, Range<usize>)> = Vec::new();
    let mut start = 0;
    for block in contents.chunks(BLOCK_BYTES as usize) {
        let (pages, rest) = block.as_chunks::<PAGE_LENGTH>();
        let is_zero = pages.iter().all(is_zero) && rest.iter().all(|byte| *byte == 0);
        let end = start + block.len();
        match runs.last_mut() {
            Some((zero, range)) if *zero == is_zero => range.end = end,
            _ => runs.push((is_zero, start..end)),
        }
        start = end;
    }
    let run = |(zero, range): (bool, Range<usize>)| {
        let at = offset_bytes + range.start as u64;
        match zero {
            true => Run::zeroes(disk, at..offset_bytes + range.end as u64),
            false => Run::data(disk, at, contents.get(range).unwrap_or_default()),
        }
    };
    runs.into_iter().map(run).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_of_zeroes_are_told_apart() {
        const BLOCK: usize = BLOCK_BYTES as usize;
        let mut contents = vec![0; 5 * BLOCK + 700];
        contents[2 * BLOCK + 5] = 1;
        contents[3 * BLOCK] = 1;
        contents[5 * BLOCK + 699] = 1;
        let runs = runs_of(3, CHUNK_BYTES, &contents);
        let kinds: Vec<_> = runs.iter().map(|run| (run.kind, run.range.start, run.length_bytes())).collect();
        let at = |block| CHUNK_BYTES + block * BLOCK_BYTES;
        assert_eq!(
            kinds,
            [
                (Kind::Zeroes, at(0), 2 * BLOCK_BYTES),
                (Kind::Data, at(2), 2 * BLOCK_BYTES),
                (Kind::Zeroes, at(4), BLOCK_BYTES),
                (Kind::Data, at(5), 700),
            ]
        );
        contents[5 * BLOCK + 699] = 0;
        assert_eq!(runs_of(3, 0, &contents).len(), 3, "the short end of an image is looked at as well");
    }
}
