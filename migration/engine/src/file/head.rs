//! What is in a mapped file beside the pages of its memory.

use std::fs::File;
use std::panic::resume_unwind;
use std::thread;

use stream::{DeviceSection, Event, Expected, MappedRam, MappedReader, SectionSet};

use super::{FileState, SECTION};
use crate::Error;

/// What is done, in errors.
const DOING: &str = "restore RAM and devices";

/// Looks at each section as soon as it is there.
type Inspect<'a> = dyn FnMut(&DeviceSection) -> Result<(), Error> + 'a;

/// Everything but the pages, verified. What it costs does not depend on the size of the memory, but for its bitmaps.
pub(super) struct Head {
    pub sections: SectionSet,
    /// Of the whole file.
    pub digest: u64,
    /// Where the pages are.
    pub ram: MappedRam<File>,
}

/// What a thread has made of a file.
pub(super) struct Seen {
    /// Its first section, if there is one: whose file it is explains an error of what follows.
    pub first: Option<FileState>,
    pub head: Result<Head, Error>,
}

impl Seen {
    /// Has a thread read `file`, as [`Head::read`] does, while `work` is done here.
    pub fn beside<T>(
        file: File,
        expected: Expected,
        work: impl FnOnce() -> Result<T, Error>,
    ) -> Result<(T, Self), Error> {
        thread::scope(|scope| {
            let reader = thread::Builder::new().name("file".to_owned()).spawn_scoped(scope, || {
                let mut first = None;
                let head = Head::read(file, expected, &mut |section| {
                    if let Some(state) = machine_in(section)? {
                        first = Some(state);
                    }
                    Ok(())
                });
                Self { first, head }
            });
            let reader =
                reader.map_err(|error| Error::machine("start a thread that reads the file")(error.into()))?;
            let done = work()?;
            Ok((done, reader.join().unwrap_or_else(|panic| resume_unwind(panic))))
        })
    }
}

impl Head {
    pub fn read(file: File, expected: Expected, inspect: &mut Inspect<'_>) -> Result<Self, Error> {
        let failed = Error::stream(DOING);
        let mut reader = MappedReader::open(file, expected).map_err(&failed)?;
        let mut sections = SectionSet::default();
        loop {
            match reader.next_event().map_err(&failed)? {
                Event::Device(section) => {
                    inspect(&section)?;
                    sections.insert(section).map_err(&failed)?;
                }
                Event::Command(command) => {
                    let reason = format!("the command {:?} is not ours", command.name());
                    return Err(Error::Protocol { doing: DOING, reason });
                }
                Event::End => break,
                Event::Configuration(_)
                | Event::RamBlocks(_)
                | Event::RamPage { .. }
                | Event::RamZero { .. }
                | Event::RamRound { .. }
                | Event::Trailer(_) => {}
            }
        }
        let digest = reader.digest();
        Ok(Self { sections, digest, ram: reader.into_ram().map_err(&failed)? })
    }
}

/// Which machine is in the file, if `section` is what says so.
pub(super) fn machine_in(section: &DeviceSection) -> Result<Option<FileState>, Error> {
    let is_it = section.name == SECTION;
    is_it.then(|| section.load().map_err(Error::stream("read the file"))).transpose()
}

/// A file of ours says which machine is in it.
pub(super) fn no_section() -> Error {
    Error::Protocol { doing: "reading the file", reason: format!("it has no section {SECTION:?}") }
}
