//! The story of a guest that goes on, while a file keeps what it was.
//!
//! Memory is written while the guest runs: rounds of dirty pages write over what was written before, since every page has its place.
//! In the stop the last pages follow, and all images that the guest may write are fixed at that same instant. What makes the files
//! durable and gives them their names comes afterwards, with the guest running.
//!
//! ```text
//! lease: generation + 1 | rounds of RAM | stop, devices, last pages, images | resume | fsync, names: images, their lease, the file
//! ```
//!
//! With a parent ([`SnapshotOptions::parent`]) the rounds begin with the pages that were written since then, instead of with all. For
//! that the writes of the guest are noted between the two, from the stop of the parent on ([`SnapshotOptions::track`]). While they are,
//! the first write to each page after each look costs the guest a fault (2.6 microseconds on the reference host), and it has no huge
//! pages; without it nothing. The noting ends with the machine, with a reset, and when a migration begins, which looks for pages itself:
//! then there is no child any more, and whoever wants one is told so. Another snapshot changes nothing: what it finds is noted too.
//!
//! The file and the images belong together: beside the first image lies a lease of their own, which says that the guest of the
//! generation before is in this file. The guest that goes on is of the next generation, so nobody restores the file onto its images.
//!
//! Absent: images that are copied before they are written. The guest would go on in other files than those that its flags name.

use std::path::{Path, PathBuf};
use std::time::Instant;

use stream::{Configuration, DeviceSection, MappedRamWriter, StreamWriter};

use super::chain::FileParent;
use super::copies::{self, Copy};
use super::draft::Draft;
use super::suspend::read_back;
use super::write::{FileSink, copy_pages, populated};
use super::{FileImages, FileState, SECTION, expect_file};
use crate::lease::Id;
use crate::machine::ImageCopy;
use crate::source::{MACHINE, bring_back, bytes_of, told};
use crate::{
    Context, Error, PAGE_BYTES, PageBitmap, RamBlock, RunState, SaveFor, Since, SourceMachine, Status,
};

/// What fails, in errors.
const DOING: &str = "write the snapshot";
/// Rounds after which the guest is stopped, however much it dirties.
const ROUNDS_MAX: u32 = 8;
/// What may be left for the stop, in bytes: it is written to the page cache in about 10 ms.
const REST_BYTES: u64 = 16 << 20;

/// What a snapshot is to be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SnapshotOptions {
    /// How its images are copied.
    pub images: ImageCopy,
    /// The snapshot that it is based on: only what was written since then is in the file, which lies beside it.
    pub parent: Option<PathBuf>,
    /// What the guest writes from now on is noted, so that this one can be a parent.
    pub track: bool,
}

/// Why there is no snapshot. The guest goes on, unless it says otherwise.
#[derive(Debug)]
pub struct SnapshotFailed {
    /// What went wrong.
    pub error: Error,
    /// Why the guest stays paused, if it could not be resumed.
    pub paused: Option<String>,
}

/// Writes the guest into `path`, and its images beside it, and lets it go on.
///
/// # Errors
/// Nothing is left of what was written.
pub fn snapshot_to_file(
    machine: &mut dyn SourceMachine,
    path: &Path,
    options: &SnapshotOptions,
    context: &mut Context<'_>,
) -> Result<(), SnapshotFailed> {
    context.statistics.start();
    let mut attempt = Attempt::default();
    let taken = attempt.run(machine, path, options, context);
    attempt.leave_tracking(machine);
    let result = taken.map_err(|error| {
        let paused = bring_back(machine, false, attempt.stopped.is_some(), attempt.stopped).err();
        SnapshotFailed { error, paused }
    });
    match &result {
        Ok(()) => context.statistics.set_status(Status::Completed),
        Err(SnapshotFailed { error: Error::Cancelled, .. }) => {
            context.statistics.set_status(Status::Cancelled);
        }
        Err(SnapshotFailed { error, paused }) => {
            let paused = paused.as_ref().map(|why| format!("; the guest stays paused: {why}"));
            context.statistics.fail(&format!("{}{}", error.chain(), paused.unwrap_or_default()));
        }
    }
    result
}

/// What has been done so far, and so what must be undone.
#[derive(Default)]
struct Attempt {
    tracking: bool,
    /// What was written since an earlier snapshot, as far as it is known and wanted.
    since: Option<Since>,
    stopped: Option<RunState>,
}

impl Attempt {
    fn run(
        &mut self,
        machine: &mut dyn SourceMachine,
        path: &Path,
        options: &SnapshotOptions,
        context: &mut Context<'_>,
    ) -> Result<(), Error> {
        let reasons = machine.blockers();
        if !reasons.is_empty() {
            return Err(Error::Blocked { reasons });
        }
        let description = told(&machine.description().map_err(Error::machine("describe this machine"))?)?;
        let (how, blocks) = (options.images, machine.ram_blocks());
        // Before the guest stops: a path that cannot be written, or images that cannot be copied so, cost it nothing.
        let mut draft = Draft::create(path)?;
        let parent = options.parent.as_deref();
        let parent = parent
            .map(|parent| FileParent::of(parent, path, || expect_file(machine.expected()), &blocks))
            .transpose()?;
        self.begin_tracking(machine, options.parent.as_deref().zip(parent.as_ref()))?;
        let copies = copies::prepare(machine, path, how)?;
        let kept = match &mut context.lease {
            Some(lease) => Some(lease.advance()?),
            None => None,
        };

        let list: Vec<_> =
            blocks.iter().map(|block| stream::RamBlock::new(&block.name, block.length_bytes())).collect();
        let failed = Error::stream(DOING);
        let out =
            FileSink { draft: &mut draft, parameters: context.parameters, statistics: context.statistics };
        let mut writer = StreamWriter::new(out, &Configuration::mapped(MACHINE)).map_err(&failed)?;
        let ram = writer.start_mapped_ram(&list).map_err(&failed)?;
        context.statistics.set_status(Status::Active);
        let (mut ram, mut pages) = match parent {
            Some(_) => {
                self.collect(machine)?;
                (ram.layer(), self.since.iter().flat_map(|since| since.pages.clone()).collect())
            }
            None => (ram.following(), populated(machine, &blocks)?),
        };
        self.rounds(machine, &blocks, &mut writer, &mut ram, &mut pages, context)?;

        machine.prepare_stop();
        let start = Instant::now();
        let state = machine.stop().map_err(Error::machine("stop the guest"))?;
        self.stopped = Some(state);
        let stop = start.elapsed();
        let sections = machine.save_devices(SaveFor::File).map_err(Error::machine("save the devices"))?;
        let device_save = start.elapsed() - stop;
        let more = self.collect(machine)?;
        pages.iter_mut().zip(&more).for_each(|(bitmap, more)| bitmap.union(more));
        copy_pages(&blocks, &pages, &mut writer, &mut ram, DOING, context.statistics)?;
        let last_pass = start.elapsed() - stop - device_save;
        machine.quiesce_disks().map_err(Error::machine("make the images stable"))?;
        for Copy { image, draft, .. } in &copies {
            machine.copy_image(image, &draft.file, how).map_err(Error::machine("copy an image"))?;
        }
        if context.parameters.cancelled() {
            return Err(Error::Cancelled);
        }
        machine.resume(state).map_err(Error::machine("resume the guest"))?;
        self.stopped = None;
        context.statistics.update(|s| {
            s.device_bytes = bytes_of(&sections);
            s.downtime.stop = stop;
            s.downtime.device_save = device_save;
            s.downtime.last_pass = last_pass;
            s.downtime.total = start.elapsed();
        });

        let first = FileState {
            running: state == RunState::Running,
            has_lease: kept.is_some(),
            lease: kept.as_ref().map_or_else(Id::default, |kept| kept.lease),
            generation: kept.as_ref().map_or(0, |kept| kept.generation),
            description_length: 0,
            description: vmstate::to_bytes(&description),
            images: Some(FileImages {
                length: 0,
                copies: vmstate::to_bytes(&told(&copies::describe(&copies, how))?),
            }),
            parent,
        };
        read_back(machine, &first, &sections, context.statistics)?;
        ram.finish(&mut writer).map_err(&failed)?;
        writer.device(&DeviceSection::save(SECTION, 0, &first)).map_err(&failed)?;
        sections.iter().try_for_each(|section| writer.device(section)).map_err(&failed)?;
        let digest = writer.digest();
        writer.finish_file().map_err(&failed)?;
        draft.file.sync_all().map_err(draft.failed("sync"))?;
        for Copy { draft, .. } in &copies {
            draft.file.sync_all().map_err(draft.failed("sync"))?;
        }
        if !context.parameters.commit() {
            return Err(Error::Cancelled);
        }
        copies::publish(draft, copies, digest, context.lease.as_deref().zip(kept))?;
        if options.track {
            // What was found in the stop may not be noted a second time.
            self.since = Some(Since { snapshot: digest, pages: more });
        } else if options.parent.is_some() {
            self.since = None;
        }
        Ok(())
    }

    /// From here on every write is seen. With a parent, every write since then is known.
    fn begin_tracking(
        &mut self,
        machine: &mut dyn SourceMachine,
        parent: Option<(&Path, &FileParent)>,
    ) -> Result<(), Error> {
        self.since = machine.take_up_dirty_tracking();
        self.tracking = self.since.is_some();
        if let Some((path, parent)) = parent {
            let reason = match &self.since {
                Some(since) if since.snapshot == parent.digest => return Ok(()),
                Some(since) => format!(
                    "the guest's writes are noted since another one, whose digest is {:016x} and not {:016x}",
                    since.snapshot, parent.digest
                ),
                None => "the guest's writes since then are not noted: it was taken without tracking, or a child without tracking, a \
                         migration, a reset or another process has ended that; take one of all memory"
                    .to_owned(),
            };
            return Err(Error::NotTracked { parent: path.display().to_string(), reason });
        }
        if !self.tracking {
            machine.start_dirty_tracking().map_err(Error::machine("track dirty pages"))?;
            self.tracking = true;
        }
        Ok(())
    }

    /// The pages that were written since the last look.
    fn collect(&mut self, machine: &mut dyn SourceMachine) -> Result<Vec<PageBitmap>, Error> {
        // If it fails, some that were written since another snapshot are not known any more.
        let since = self.since.take();
        let pages = machine.collect_dirty().map_err(Error::machine("read the dirty pages"))?;
        self.since = since.map(|since| since.and(&pages));
        Ok(pages)
    }

    /// Ends the tracking, or leaves it to the next snapshot.
    fn leave_tracking(&mut self, machine: &mut dyn SourceMachine) {
        match self.since.take() {
            Some(since) => machine.keep_dirty_tracking(since),
            None if self.tracking => machine.stop_dirty_tracking(),
            None => {}
        }
    }

    /// Writes what is dirty until the rest is small, or does not become smaller. Leaves in `pages` what the stop must write.
    fn rounds(
        &mut self,
        machine: &mut dyn SourceMachine,
        blocks: &[RamBlock],
        writer: &mut StreamWriter<FileSink<'_>>,
        ram: &mut MappedRamWriter,
        pages: &mut Vec<PageBitmap>,
        context: &Context<'_>,
    ) -> Result<(), Error> {
        let bytes = |pages: &[PageBitmap]| pages.iter().map(PageBitmap::count).sum::<u64>() * PAGE_BYTES;
        let total = blocks.iter().map(RamBlock::length_bytes).sum();
        context.statistics.update(|s| s.total_bytes = total);
        let mut before = u64::MAX;
        for round in 1..=ROUNDS_MAX {
            let rest = bytes(pages);
            if rest <= REST_BYTES.min(before / 2) && round > 1 {
                break;
            }
            before = rest;
            context.statistics.update(|s| {
                s.rounds = round;
                s.remaining_bytes = rest;
            });
            copy_pages(blocks, pages, writer, ram, DOING, context.statistics)?;
            *pages = self.collect(machine)?;
        }
        Ok(())
    }
}
