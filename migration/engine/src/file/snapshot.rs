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
//! The file and the images belong together: beside the first image lies a lease of their own, which says that the guest of the
//! generation before is in this file. The guest that goes on is of the next generation, so nobody restores the file onto its images.
//!
//! Absent: files that hold only what changed since another snapshot, and images that are copied before they are written.

use std::path::{Path, PathBuf};
use std::time::Instant;

use stream::{Configuration, DeviceSection, MappedRamWriter, StreamWriter};

use super::draft::{Draft, Published};
use super::suspend::read_back;
use super::write::{FileSink, copy_pages, populated};
use super::{FileImages, FileState, SECTION};
use crate::lease::{Id, Kept, Lease};
use crate::machine::{Image, ImageCopy};
use crate::source::{MACHINE, bring_back, told};
use crate::{
    Context, Description, Error, PAGE_BYTES, PageBitmap, RamBlock, RunState, SaveFor, SourceMachine, Status,
};

/// What fails, in errors.
const DOING: &str = "write the snapshot";
/// Rounds after which the guest is stopped, however much it dirties.
const ROUNDS_MAX: u32 = 8;
/// What may be left for the stop, in bytes: it is written to the page cache in about 10 ms.
const REST_BYTES: u64 = 16 << 20;
/// What the lease beside the first image is called; after the file, if there is no image.
const LEASE_SUFFIX: &str = ".ferry-lease";

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
    how: ImageCopy,
    context: &mut Context<'_>,
) -> Result<(), SnapshotFailed> {
    context.statistics.start();
    let mut attempt = Attempt::default();
    let taken = attempt.run(machine, path, how, context);
    if attempt.tracking {
        machine.stop_dirty_tracking();
    }
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
    stopped: Option<RunState>,
}

/// An image, and the file that becomes its copy.
struct Copy {
    image: Image,
    path: PathBuf,
    draft: Draft,
}

impl Attempt {
    fn run(
        &mut self,
        machine: &mut dyn SourceMachine,
        path: &Path,
        how: ImageCopy,
        context: &mut Context<'_>,
    ) -> Result<(), Error> {
        let reasons = machine.blockers();
        if !reasons.is_empty() {
            return Err(Error::Blocked { reasons });
        }
        let description = told(&machine.description().map_err(Error::machine("describe this machine"))?)?;
        // Before the guest stops: a path that cannot be written, or images that cannot be copied so, cost it nothing.
        let mut draft = Draft::create(path)?;
        let copies = prepare_copies(machine, path, how)?;
        let kept = match &mut context.lease {
            Some(lease) => Some(lease.advance()?),
            None => None,
        };

        let blocks = machine.ram_blocks();
        let list: Vec<_> =
            blocks.iter().map(|block| stream::RamBlock::new(&block.name, block.length_bytes())).collect();
        let failed = Error::stream(DOING);
        let out =
            FileSink { draft: &mut draft, parameters: context.parameters, statistics: context.statistics };
        let mut writer = StreamWriter::new(out, &Configuration::mapped(MACHINE)).map_err(&failed)?;
        let mut ram = writer.start_mapped_ram(&list).map_err(&failed)?.following();
        context.statistics.set_status(Status::Active);
        machine.start_dirty_tracking().map_err(Error::machine("track dirty pages"))?;
        self.tracking = true;
        let mut pages = populated(machine, &blocks)?;
        self.rounds(machine, &blocks, &mut writer, &mut ram, &mut pages, context)?;

        machine.prepare_stop();
        let start = Instant::now();
        let state = machine.stop().map_err(Error::machine("stop the guest"))?;
        self.stopped = Some(state);
        let stop = start.elapsed();
        let sections = machine.save_devices(SaveFor::File).map_err(Error::machine("save the devices"))?;
        let device_save = start.elapsed() - stop;
        let more = machine.collect_dirty().map_err(Error::machine("read the dirty pages"))?;
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
                copies: vmstate::to_bytes(&told(&describe(&copies, how))?),
            }),
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
        publish(draft, copies, digest, context.lease.as_deref().zip(kept))
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
            *pages = machine.collect_dirty().map_err(Error::machine("read the dirty pages"))?;
        }
        Ok(())
    }
}

/// Makes the files of the copies, and tries one of them the way it will be done in the stop.
fn prepare_copies(machine: &mut dyn SourceMachine, path: &Path, how: ImageCopy) -> Result<Vec<Copy>, Error> {
    let images = machine.images().map_err(Error::machine("copy the images"))?;
    let mut copies = Vec::with_capacity(images.len());
    for image in images {
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}", image.name));
        let path = path.with_file_name(name);
        if how == ImageCopy::Reflink {
            let trial = Draft::create(&path)?;
            machine.copy_image(&image, &trial.file, how).map_err(Error::machine("copy an image"))?;
        }
        let draft = Draft::create(&path)?;
        copies.push(Copy { image, path, draft });
    }
    Ok(copies)
}

/// What is beside the file, for whoever looks into it.
fn describe(copies: &[Copy], how: ImageCopy) -> Description {
    let mut description = Description::new();
    for Copy { image, path, .. } in copies {
        description.set(format!("{}.image", image.name), image.path.display());
        description.set(format!("{}.copy", image.name), path.display());
        description.set(format!("{}.how", image.name), how);
    }
    description
}

/// Gives the files their names, the one that says that there is a snapshot last. Takes them away again if one cannot have its own.
fn publish(draft: Draft, copies: Vec<Copy>, digest: u64, lease: Option<(&Lease, Kept)>) -> Result<(), Error> {
    let beside = copies.first().map_or(draft.path(), |copy| copy.path.as_path()).to_owned();
    let mut published: Vec<Published> = Vec::new();
    let named = || {
        for copy in copies {
            published.push(copy.draft.publish(0)?);
        }
        if let Some((lease, kept)) = &lease {
            let mut path = beside.into_os_string();
            path.push(LEASE_SUFFIX);
            let path = PathBuf::from(path);
            let draft = Draft::create(&path)?;
            lease.write_copy(&draft.file, kept, digest).map_err(draft.failed("write"))?;
            published.push(draft.publish(0)?);
        }
        draft.publish(digest).map(drop)
    };
    let result = named();
    if result.is_err() {
        published.into_iter().for_each(Published::remove);
    }
    result
}
