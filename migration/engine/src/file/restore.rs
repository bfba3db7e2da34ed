//! The story of a guest that comes out of a file.

use std::fs::File;
use std::io::{self, Read, Seek};
use std::path::Path;
use std::time::Instant;

use stream::{DeviceSection, Event, Expected, MappedReader, SectionSet};
use transport::Layout;

use super::head::{Head, Seen, machine_in, no_section};
use super::memory::{Layer, Memory};
use super::{FileState, Fill, PIECE_BYTES, SECTION, chain, expect_file, properties};
use crate::lease::{Lease, Record, State};
use crate::ram::Receiver;
use crate::source::bytes_of;
use crate::{
    Description, DestinationFactory, DestinationMachine, Error, Parameters, RunState, Statistics, Status,
};

/// When the memory of a mapped file is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Reading {
    /// When the guest touches it, and the rest while it runs, where the machine can do so.
    #[default]
    OnDemand,
    /// All of it before the guest runs, so that a file that is damaged anywhere is refused.
    First,
}

/// Whose the guest of a file becomes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Taking {
    /// It is taken out, once.
    #[default]
    Once,
    /// The file keeps it: a copy of it runs, on images that were copied from those of a snapshot for it alone.
    Clone {
        /// What the lease beside the snapshot's images said when they had been copied.
        images: Option<Record>,
    },
}

/// A guest that came out of a file. It is ours.
#[derive(Debug)]
pub struct Restored<M> {
    /// It.
    pub machine: M,
    /// What it does: as it was, or paused if it could not be started.
    pub state: RunState,
    /// Why it could not be started.
    pub error: Option<Error>,
    /// The memory that is still in the file. It is to be [run](Fill::run).
    pub fill: Option<Fill>,
}

/// Builds the machine of a file and starts the guest: after everything was read and verified (but pages of a mapped file that are read
/// [on demand](Reading)), and only if the lease says that the guest is in exactly this file. `lease` is opened, not claimed.
///
/// # Errors
/// The file is damaged, of another machine, or its guest has been somewhere else since. Nothing has run, and the file and
/// the lease are as before.
pub fn restore_from_file<F: DestinationFactory>(
    factory: &mut F,
    path: &Path,
    (reading, taking): (Reading, &Taking),
    lease: Option<&mut Lease>,
    parameters: &Parameters,
    statistics: &Statistics,
) -> Result<Restored<F::Machine>, Error> {
    statistics.start();
    let result = restore(factory, path, (reading, taking), lease, parameters, statistics);
    match &result {
        Ok(_) => statistics.set_status(Status::Completed),
        Err(error) => statistics.fail(&error.chain()),
    }
    result
}

fn restore<F: DestinationFactory>(
    factory: &mut F,
    path: &Path,
    (reading, taking): (Reading, &Taking),
    lease: Option<&mut Lease>,
    parameters: &Parameters,
    statistics: &Statistics,
) -> Result<Restored<F::Machine>, Error> {
    let file = File::open(path).map_err(failed("open", path))?;
    let layout = layout_of(&file)?;
    let expected = expect_file(factory.expected().map_err(Error::machine("describe this machine"))?);
    let (mut machine, contents) = match layout {
        Layout::Stream => plain(factory, file, path, expected, parameters, statistics)?,
        Layout::Mapped => mapped(factory, file, path, expected, reading, parameters, statistics)?,
    };
    let Contents { first, mut sections, digest, fill } = contents;
    // The devices take the rest.
    let _the_first: FileState = sections.take(SECTION, 0).map_err(Error::stream("read the file"))?;
    let device_bytes = bytes_of(sections.iter());
    let start = Instant::now();
    machine.load_devices(sections).map_err(Error::machine("load the devices"))?;
    // One that was suspended goes on where it stopped, once.
    if first.images.is_some() {
        machine.renew_generation().map_err(Error::machine("give the guest another generation ID"))?;
    }
    statistics.update(|s| (s.downtime.load, s.device_bytes) = (start.elapsed(), device_bytes));

    if !parameters.commit() {
        return Err(Error::Cancelled);
    }
    // What the devices looked at may have been damaged.
    fill.as_ref().map_or(Ok(()), Fill::guest_runs)?;
    let taken = match taking {
        Taking::Once => take(&mut machine, lease, &first, digest),
        Taking::Clone { images } => {
            is_still_there(&first, images.as_ref(), digest).and_then(|()| take_clone(&mut machine, lease))
        }
    };
    if let Err(error) = taken {
        machine.release_images();
        fill.iter().for_each(Fill::give_up);
        return Err(error);
    }
    let state = RunState::from(first.running);
    Ok(match machine.start(state) {
        Ok(_) => Restored { machine, state, error: None, fill },
        Err(source) => {
            let error = Error::Machine { doing: "start the guest", source };
            Restored { machine, state: RunState::Paused, error: Some(error), fill }
        }
    })
}

/// The machine, with its description.
fn build<F: DestinationFactory>(
    factory: &mut F,
    statistics: &Statistics,
) -> Result<(Description, F::Machine), Error> {
    let own = factory.description().map_err(Error::machine("describe this machine"))?;
    let machine = factory.build(&own).map_err(Error::machine("build the machine"))?;
    statistics.set_status(Status::Active);
    let total_bytes = machine.ram_blocks().iter().map(|block| block.length_bytes()).sum();
    statistics.update(|s| s.total_bytes = total_bytes);
    Ok((own, machine))
}

/// What is in a file beside memory, verified; and the memory that is yet to come.
struct Contents {
    /// Which machine is in it.
    first: FileState,
    sections: SectionSet,
    digest: u64,
    fill: Option<Fill>,
}

fn layout_of(file: &File) -> Result<Layout, Error> {
    let failed = Error::stream("read the file");
    let mut reader = MappedReader::open(file, Expected::new(Vec::new())).map_err(&failed)?;
    Ok(match reader.next_event().map_err(&failed)? {
        Event::Configuration(configuration) if configuration.is_mapped() => Layout::Mapped,
        _ => Layout::Stream,
    })
}

fn failed(doing: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Error {
    let path = path.display().to_string();
    move |source| Error::File { doing, path, source: source.into() }
}

/// Reads all of a file in the layout of a stream into a machine.
fn plain<F: DestinationFactory>(
    factory: &mut F,
    mut file: File,
    path: &Path,
    expected: Expected,
    parameters: &Parameters,
    statistics: &Statistics,
) -> Result<(F::Machine, Contents), Error> {
    let (own, machine) = build(factory, statistics)?;
    let mut first = None;
    let mut inspect = |section: &DeviceSection| {
        if let Some(state) = machine_in(section)? {
            // All of the memory may follow.
            check_machine(factory, &state, &own)?;
            first = Some(state);
        }
        Ok(())
    };
    file.rewind().map_err(failed("read", path))?;
    let mut receiver = Receiver::file(expected, machine.ram_blocks(), Box::new(&mut inspect));
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        if parameters.cancelled() {
            return Err(Error::Cancelled);
        }
        match file.read(&mut piece) {
            Ok(0) => break,
            Ok(count) => receiver.feed(piece.get(..count).unwrap_or_default())?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(source) => return Err(failed("read", path)(source)),
        }
    }
    let received = receiver.finish()?;
    let first = first.ok_or_else(no_section)?;
    if first.parent.is_some() {
        let reason = "it lacks the pages of a parent, which no file of its layout has".to_owned();
        return Err(Error::Protocol { doing: "reading the file", reason });
    }
    Ok((machine, Contents { first, sections: received.sections, digest: received.digest, fill: None }))
}

/// Reads a mapped file while its machine is built: each takes milliseconds, and neither needs the other.
fn mapped<F: DestinationFactory>(
    factory: &mut F,
    file: File,
    path: &Path,
    expected: Expected,
    reading: Reading,
    parameters: &Parameters,
    statistics: &Statistics,
) -> Result<(F::Machine, Contents), Error> {
    let ((own, mut machine), Seen { first, head }) =
        Seen::beside(file, expected.clone(), || build(factory, statistics))?;
    if let Some(first) = &first {
        check_machine(factory, first, &own)?;
    }
    let Head { sections, digest, ram } = head?;
    let first = first.ok_or_else(no_section)?;
    let below = match &first.parent {
        Some(parent) => chain::open(path, parent, || expected.clone())?,
        None => Vec::new(),
    };
    let top = Layer { ram, path: path.to_owned() };
    let memory = Memory::new(std::iter::once(top).chain(below), machine.ram_blocks())?;
    let fill = begin(memory, &mut machine, reading, parameters, statistics)?;
    machine.note_writes_since(digest).map_err(Error::machine("note what the guest writes"))?;
    Ok((machine, Contents { first, sections, digest, fill }))
}

/// Reads the memory that the machine cannot wait for, and begins to bring the rest on demand.
fn begin(
    memory: Memory,
    machine: &mut dyn DestinationMachine,
    reading: Reading,
    parameters: &Parameters,
    statistics: &Statistics,
) -> Result<Option<Fill>, Error> {
    let pages = match reading {
        Reading::First => None,
        Reading::OnDemand => machine.missing_pages(),
    };
    for block in 0..machine.ram_blocks().len() {
        if pages.as_ref().is_none_or(|pages| !pages.has(block)) {
            memory.read(block, parameters, statistics)?;
        }
    }
    pages.map(|pages| Fill::begin(memory, pages)).transpose()
}

/// Every reason why the guest of the file cannot run here.
fn check_machine<F: DestinationFactory>(
    factory: &mut F,
    first: &FileState,
    own: &Description,
) -> Result<(), Error> {
    let reasons = factory.differences(&Description::from(&properties(first)?), own);
    if reasons.is_empty() { Ok(()) } else { Err(Error::Refused { reasons }) }
}

/// Makes the guest ours. The lease comes last: once it has moved on, the file is worth nothing.
fn take(
    machine: &mut dyn DestinationMachine,
    lease: Option<&mut Lease>,
    first: &FileState,
    digest: u64,
) -> Result<(), Error> {
    machine.take_image_locks().map_err(Error::machine("take the image locks"))?;
    machine.open_images().map_err(Error::machine("open the images"))?;
    match (lease, first.has_lease) {
        (Some(lease), true) => {
            lease.claim_file(&first.lease, first.generation, digest)?;
            Ok(())
        }
        (None, false) => Ok(()),
        (Some(lease), false) => Err(Error::Refused {
            reasons: vec![format!(
                "lease: this machine has {}, the file was written without one",
                lease.path().display()
            )],
        }),
        (None, true) => Err(Error::Refused {
            reasons: vec!["lease: the file belongs to one, this machine was started without".to_owned()],
        }),
    }
}

/// Whether the images that a clone's were copied from are those of the file.
fn is_still_there(first: &FileState, images: Option<&Record>, digest: u64) -> Result<(), Error> {
    let refuse = |reason: String| Err(Error::Refused { reasons: vec![reason] });
    if first.images.is_none() {
        return refuse(
            "clone: a guest that was suspended is taken out once; only a snapshot has images for clones"
                .to_owned(),
        );
    }
    match images {
        None if first.has_lease => {
            refuse("clone: there is no lease beside the images of the snapshot".to_owned())
        }
        Some(record)
            if record.lease != first.lease
                || record.generation != first.generation
                || record.state != (State::InFile { digest }) =>
        {
            refuse(format!(
                "clone: the snapshot is of generation {}, and the lease of its images says {record}",
                first.generation
            ))
        }
        _ => Ok(()),
    }
}

/// Makes the clone ours: its images and its lease are new.
fn take_clone(machine: &mut dyn DestinationMachine, lease: Option<&mut Lease>) -> Result<(), Error> {
    machine.take_image_locks().map_err(Error::machine("take the image locks"))?;
    machine.open_images().map_err(Error::machine("open the images"))?;
    if let Some(lease) = lease {
        lease.claim()?;
    }
    Ok(())
}
