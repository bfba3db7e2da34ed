//! The story of a guest that goes into a file.

use std::path::Path;
use std::time::Instant;

use stream::DeviceSection;
use transport::Layout;

use super::draft::{Draft, Published};
use super::write::{self, Sections};
use super::{FileState, SECTION, properties};
use crate::handover::Handover;
use crate::lease::Id;
use crate::ram::{Receiver, Sender};
use crate::source::{MACHINE, bring_back, bytes_of, report, told};
use crate::{Context, Error, Outcome, PageBitmap, RunState, SaveFor, SourceMachine, Statistics, Status};

/// Stops the guest and puts it into a file, which appears under its name only when it is whole. Afterwards it never runs
/// here again; after a failure it runs as if nothing had happened.
pub fn suspend_to_file(
    machine: &mut dyn SourceMachine,
    path: &Path,
    layout: Layout,
    context: &mut Context<'_>,
) -> Outcome {
    context.statistics.start();
    let mut stopped = None;
    let outcome = match suspend(machine, path, layout, context, &mut stopped) {
        Ok(written) => leave(machine, context, written),
        Err(error) => {
            let paused = bring_back(machine, false, stopped.is_some(), stopped).err();
            Outcome::Failed { error, paused }
        }
    };
    report(&outcome, context.statistics);
    outcome
}

/// The guest becomes the file.
fn leave(machine: &mut dyn SourceMachine, context: &mut Context<'_>, written: Written) -> Outcome {
    let Written { file, generation, state, since } = written;
    let said = match &mut context.lease {
        // The point of no return: a file that the lease does not know cannot be restored.
        Some(lease) => lease.suspend(generation, file.digest),
        None => Ok(()),
    };
    if let Err(error) = said {
        // It may have reached the disk all the same, and then the file is the guest.
        let handover = Handover::suspended(file, generation, state, since, error.into());
        let mut nobody = || Err(Error::Closed { doing: "asking a file" });
        return handover.resolve(machine, &mut nobody, context);
    }
    context.statistics.update(|s| s.downtime.total = since.elapsed());
    if let Err(source) = machine.release_image_locks() {
        // They end with the process at the latest, and the guest is in the file.
        log::warn!("{}", Error::Machine { doing: "release the image locks", source }.chain());
    }
    machine.finish();
    Outcome::Completed { note: None }
}

/// A guest whose file has its name, and that the lease does not know to be there yet.
struct Written {
    file: Published,
    generation: u64,
    state: RunState,
    since: Instant,
}

fn suspend(
    machine: &mut dyn SourceMachine,
    path: &Path,
    layout: Layout,
    context: &mut Context<'_>,
    stopped: &mut Option<RunState>,
) -> Result<Written, Error> {
    let reasons = machine.blockers();
    if !reasons.is_empty() {
        return Err(Error::Blocked { reasons });
    }
    let description = told(&machine.description().map_err(Error::machine("describe this machine"))?)?;
    let record = match &context.lease {
        Some(lease) => lease.read()?,
        None => None,
    };
    let generation = record.as_ref().map_or(0, |record| record.generation);
    // Before the guest stops: a path that cannot be written costs it nothing.
    let mut draft = Draft::create(path)?;
    let statistics = context.statistics;
    statistics.set_status(Status::Active);

    machine.prepare_stop();
    let start = Instant::now();
    let state = machine.stop().map_err(Error::machine("stop the guest"))?;
    *stopped = Some(state);
    statistics.set_status(Status::Device);
    let stop = start.elapsed();
    let sections = machine.save_devices(SaveFor::File).map_err(Error::machine("save the devices"))?;
    let device_save = start.elapsed() - stop;
    let first = FileState {
        running: state == RunState::Running,
        has_lease: record.is_some(),
        lease: record.as_ref().map_or_else(Id::default, |record| record.lease),
        generation,
        description_length: 0,
        description: vmstate::to_bytes(&description),
        images: None,
        parent: None,
    };
    read_back(machine, &first, &sections, statistics)?;
    let contents = Sections { first: &first, devices: &sections };
    let digest = write::contents(machine, &mut draft, layout, &contents, context)?;
    machine.quiesce_disks().map_err(Error::machine("make the images stable"))?;
    statistics.update(|s| {
        s.device_bytes = bytes_of(&sections);
        s.downtime.stop = stop;
        s.downtime.device_save = device_save;
        s.downtime.last_pass = start.elapsed() - stop - device_save;
    });

    // From here on it is too late to cancel.
    if !context.parameters.commit() {
        return Err(Error::Cancelled);
    }
    Ok(Written { file: draft.publish(digest)?, generation, state, since: start })
}

/// Makes sure that a restore will accept everything of the file except its pages, which any file can hold: nothing else would
/// be left of the guest if it did not.
pub(super) fn read_back(
    machine: &mut dyn SourceMachine,
    first: &FileState,
    sections: &[DeviceSection],
    statistics: &Statistics,
) -> Result<(), Error> {
    let blocks = machine.ram_blocks();
    let no_pages: Vec<_> = blocks.iter().map(|block| PageBitmap::for_bytes(block.length_bytes())).collect();
    let mut writing = Sender::start(Vec::new(), MACHINE, &blocks, statistics, "write the devices")?;
    writing.device(&DeviceSection::save(SECTION, 0, first))?;
    writing.last_round(&no_pages)?;
    sections.iter().try_for_each(|section| writing.device(section))?;
    let (bytes, _) = writing.finish_file()?;

    let inspect = |section: &DeviceSection| match section.name.as_str() {
        SECTION => properties(&section.load().map_err(Error::stream("read the file"))?).map(drop),
        _ => Ok(()),
    };
    let expected = machine.expected().section::<FileState>(SECTION, 0);
    let mut receiver = Receiver::file(expected, blocks.clone(), Box::new(inspect));
    let read = receiver.feed(&bytes).and_then(|()| receiver.finish());
    let unreadable = Error::machine("save a state that can be restored");
    read.map(drop).map_err(|error| unreadable(error.into()))
}
