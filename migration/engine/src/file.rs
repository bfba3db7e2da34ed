//! A guest in a file: suspended into it, restored from it.
//!
//! The file is a stream as crate `stream` writes it, with QEMU's layout, digests and trailer. Its first section, `ferry`,
//! says what machine it was and which generation of the lease it belongs to. The lease ties the file to the disks: it says
//! `in-file` with the digest of exactly this file, until somebody takes the guest out, once.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufWriter, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use nix::libc;
use rustix::fs::{AtFlags, CWD, RenameFlags, linkat, renameat_with};
use stream::{DeviceSection, Expected};
use vmstate::VmState;

use crate::handover::Handover;
use crate::lease::{Id, Lease, Record, State, random_id, show_id};
use crate::protocol::{DESCRIPTION_BYTES_MAX, Properties};
use crate::ram::{Receiver, Sender};
use crate::source::{MACHINE, bring_back, report, told};
use crate::{
    Context, Description, DestinationFactory, DestinationMachine, Error, Outcome, PageBitmap, Parameters,
    RunState, SaveFor, SourceMachine, Statistics, Status,
};

const SECTION: &str = "ferry";
/// [`Properties`] of every machine: the list has a mark at its end.
const DESCRIPTION_MAX_BYTES: usize = DESCRIPTION_BYTES_MAX + 1;
/// Bytes that are written or read at a time.
const PIECE_BYTES: usize = 1 << 20;

/// The first section of a file: which machine is in it, and which generation of the lease it belongs to. As foreign as the file.
#[derive(Clone, Debug, PartialEq, Eq, VmState)]
#[vmstate(name = "ferry", version = 1)]
pub struct FileState {
    /// Whether the guest was running.
    running: bool,
    has_lease: bool,
    lease: [u8; 16],
    /// Of the lease, when the guest went into the file.
    generation: u64,
    description_length: u32,
    /// [`Properties`], saved.
    #[vmstate(len = "description_length", max = DESCRIPTION_MAX_BYTES)]
    description: Vec<u8>,
}

/// The schema of the section that says which machine is in a file.
#[must_use]
pub fn file_schema() -> vmstate::Schema {
    vmstate::schema::<FileState>()
}

/// Expects that section beside those of the devices.
#[must_use]
pub fn expect_file(expected: Expected) -> Expected {
    expected.section::<FileState>(SECTION, 0)
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
}

/// Stops the guest and puts it into a file, which appears under its name only when it is whole. Afterwards it never runs
/// here again; after a failure it runs as if nothing had happened.
pub fn suspend_to_file(machine: &mut dyn SourceMachine, path: &Path, context: &mut Context<'_>) -> Outcome {
    context.statistics.start();
    let mut stopped = None;
    let outcome = match suspend(machine, path, context, &mut stopped) {
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
    };
    read_back(machine, &first, &sections, statistics)?;
    let digest = write(machine, &mut draft, context, &first, &sections)?;
    machine.quiesce_disks().map_err(Error::machine("make the images stable"))?;
    statistics.update(|s| {
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
fn read_back(
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

/// The contents of the file, on stable storage. Returns the digest.
fn write(
    machine: &mut dyn SourceMachine,
    draft: &mut Draft,
    context: &Context<'_>,
    first: &FileState,
    sections: &[DeviceSection],
) -> Result<u64, Error> {
    let blocks = machine.ram_blocks();
    let mut pages = Vec::with_capacity(blocks.len());
    for block in &blocks {
        let ranges = machine.populated(block).map_err(Error::machine("find the holes of guest memory"))?;
        let mut bitmap = PageBitmap::for_bytes(block.length_bytes());
        ranges.into_iter().for_each(|range| bitmap.set_bytes(range));
        pages.push(bitmap);
    }
    let statistics = context.statistics;
    statistics.update(|s| {
        s.rounds = 1;
        s.total_bytes = blocks.iter().map(|block| block.length_bytes()).sum();
        s.remaining_bytes = pages.iter().map(PageBitmap::count).sum::<u64>() * crate::PAGE_BYTES;
    });
    let out = FileSink { draft, parameters: context.parameters, statistics };
    let out = BufWriter::with_capacity(PIECE_BYTES, out);
    let writing = Sender::start(out, MACHINE, &blocks, statistics, "write the file");
    let mut writing = writing?;
    writing.device(&DeviceSection::save(SECTION, 0, first))?;
    writing.last_round(&pages)?;
    sections.iter().try_for_each(|section| writing.device(section))?;
    let (out, digest) = writing.finish_file()?;
    // `finish_file` has flushed it.
    drop(out);
    draft.file.sync_all().map_err(draft.failed("sync"))?;
    Ok(digest)
}

/// Counts what goes into the file, and hears the user's wish.
struct FileSink<'a> {
    draft: &'a mut Draft,
    parameters: &'a Parameters,
    statistics: &'a Statistics,
}

impl Write for FileSink<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.parameters.cancelled() {
            return Err(io::Error::other(Error::Cancelled));
        }
        let count = self.draft.file.write(bytes)?;
        self.statistics.update(|s| s.transferred_bytes += count as u64);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A file without a name, so that the kernel removes it with the process, however that ends: it holds guest memory. Where the
/// file system knows no such files it has a name that nobody looks for, and is removed when it is dropped.
struct Draft {
    file: File,
    name: Option<PathBuf>,
    path: PathBuf,
}

/// A whole file under its name. It may be the only copy of the guest: it stays unless it is removed in so many words.
#[derive(Debug)]
pub(crate) struct Published {
    path: PathBuf,
    digest: u64,
}

impl Published {
    /// Whether the guest is in this file, by the lease.
    pub fn is_said_by(&self, record: &Record) -> bool {
        record.state == State::InFile { digest: self.digest }
    }

    /// The guest is elsewhere, and nobody can restore this.
    pub fn remove(self) {
        if let Err(source) = fs::remove_file(&self.path) {
            let path = self.path.display().to_string();
            log::warn!("{}", Error::File { doing: "remove", path, source: source.into() }.chain());
        }
    }
}

impl fmt::Display for Published {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path.display().fmt(f)
    }
}

impl Draft {
    fn create(path: &Path) -> Result<Self, Error> {
        let failed = |doing| {
            let path = path.display().to_string();
            move |source: io::Error| Error::File { doing, path, source: source.into() }
        };
        // Not over anything: it may be one of the guest's images, or the only copy of another guest.
        if fs::symlink_metadata(path).is_ok() {
            return Err(failed("write over")(io::ErrorKind::AlreadyExists.into()));
        }
        if let Some(file) = Self::nameless(folder_of(path)) {
            return Ok(Self { file, name: None, path: path.to_owned() });
        }
        let id = random_id().map_err(failed("name a draft of"))?;
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}.draft", show_id(&id)));
        let name = path.with_file_name(name);
        let mut options = OpenOptions::new();
        let file = options.write(true).create_new(true).mode(0o600).open(&name).map_err(failed("create"))?;
        Ok(Self { file, name: Some(name), path: path.to_owned() })
    }

    /// Whatever is wrong, it shows again when a file with a name is made.
    fn nameless(folder: &Path) -> Option<File> {
        let mut options = OpenOptions::new();
        let file = options.write(true).custom_flags(libc::O_TMPFILE).mode(0o600).open(folder).ok()?;
        fs::symlink_metadata(descriptor_path(&file)).is_ok().then_some(file)
    }

    /// Gives the file its name.
    fn publish(mut self, digest: u64) -> Result<Published, Error> {
        let named = match &self.name {
            Some(name) => renameat_with(CWD, name, CWD, &self.path, RenameFlags::NOREPLACE),
            None => linkat(CWD, descriptor_path(&self.file), CWD, &self.path, AtFlags::SYMLINK_FOLLOW),
        };
        named.map_err(|errno| self.failed("give its name to")(errno.into()))?;
        self.name = None;
        let synced = File::open(folder_of(&self.path)).and_then(|folder| folder.sync_all());
        if let Err(source) = synced {
            // The lease does not know it: it is not the guest.
            Published { path: self.path.clone(), digest }.remove();
            return Err(self.failed("sync the folder of")(source));
        }
        Ok(Published { path: self.path.clone(), digest })
    }

    fn failed(&self, doing: &'static str) -> impl Fn(io::Error) -> Error + use<> {
        let path = self.path.display().to_string();
        move |source| Error::File { doing, path: path.clone(), source: source.into() }
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            let _gone_already = fs::remove_file(name);
        }
    }
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// Where a file that has no name can be found.
fn descriptor_path(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}

/// Builds the machine of a file and starts the guest: after everything was read and verified, and only if the lease says
/// that the guest is in exactly this file. `lease` is opened, not claimed.
///
/// # Errors
/// The file is damaged, of another machine, or its guest has been somewhere else since. Nothing has run, and the file and
/// the lease are as before.
pub fn restore_from_file<F: DestinationFactory>(
    factory: &mut F,
    path: &Path,
    lease: Option<&mut Lease>,
    parameters: &Parameters,
    statistics: &Statistics,
) -> Result<Restored<F::Machine>, Error> {
    statistics.start();
    let result = restore(factory, path, lease, parameters, statistics);
    match &result {
        Ok(_) => statistics.set_status(Status::Completed),
        Err(error) => statistics.fail(&error.chain()),
    }
    result
}

fn restore<F: DestinationFactory>(
    factory: &mut F,
    path: &Path,
    lease: Option<&mut Lease>,
    parameters: &Parameters,
    statistics: &Statistics,
) -> Result<Restored<F::Machine>, Error> {
    let failed = |doing| {
        let path = path.display().to_string();
        move |source: io::Error| Error::File { doing, path, source: source.into() }
    };
    let mut file = File::open(path).map_err(failed("open"))?;
    let own = factory.description().map_err(Error::machine("describe this machine"))?;
    let expected = expect_file(factory.expected());
    let mut machine = factory.build(&own).map_err(Error::machine("build the machine"))?;
    statistics.set_status(Status::Active);
    let blocks = machine.ram_blocks();
    statistics.update(|s| s.total_bytes = blocks.iter().map(|block| block.length_bytes()).sum());

    let mut first = None;
    let inspect = |section: &DeviceSection| {
        if section.name == SECTION {
            let state: FileState = section.load().map_err(Error::stream("read the file"))?;
            check_machine(factory, &state, &own)?;
            first = Some(state);
        }
        Ok(())
    };
    let mut receiver = Receiver::file(expected, blocks, Box::new(inspect));
    let mut piece = vec![0; PIECE_BYTES];
    loop {
        if parameters.cancelled() {
            return Err(Error::Cancelled);
        }
        match file.read(&mut piece) {
            Ok(0) => break,
            Ok(count) => receiver.feed(piece.get(..count).unwrap_or_default())?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(failed("read")(error)),
        }
    }
    let mut received = receiver.finish()?;
    let first = first.ok_or_else(|| Error::Protocol {
        doing: "reading the file",
        reason: format!("it has no section {SECTION:?}"),
    })?;
    // The devices take the rest.
    let _the_first: FileState = received.sections.take(SECTION, 0).map_err(Error::stream("read the file"))?;
    let start = Instant::now();
    machine.load_devices(received.sections).map_err(Error::machine("load the devices"))?;
    statistics.update(|s| s.downtime.load = start.elapsed());

    if !parameters.commit() {
        return Err(Error::Cancelled);
    }
    if let Err(error) = take(&mut machine, lease, &first, received.digest) {
        machine.release_images();
        return Err(error);
    }
    let state = RunState::from(first.running);
    Ok(match machine.start(state) {
        Ok(()) => Restored { machine, state, error: None },
        Err(source) => {
            let error = Error::Machine { doing: "start the guest", source };
            Restored { machine, state: RunState::Paused, error: Some(error) }
        }
    })
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

fn properties(first: &FileState) -> Result<Properties, Error> {
    vmstate::from_bytes(&first.description, 1).map_err(|error| Error::Protocol {
        doing: "reading the description of the machine in the file",
        reason: error.to_string(),
    })
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
