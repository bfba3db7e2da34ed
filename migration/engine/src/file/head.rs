//! What is in a mapped file beside the pages of its memory.

use std::fs::File;

use stream::{DeviceSection, Event, Expected, MappedRam, MappedReader, SectionSet};

use super::SECTION;
use crate::Error;

/// What is done, in errors.
const DOING: &str = "restore RAM and devices";

/// Looks at each section as soon as it is there.
pub(super) type Inspect<'a> = dyn FnMut(&DeviceSection) -> Result<(), Error> + 'a;

/// Everything but the pages, verified. What it costs does not depend on the size of the memory, but for its bitmaps.
pub(super) struct Head {
    pub sections: SectionSet,
    /// Of the whole file.
    pub digest: u64,
    /// Where the pages are.
    pub ram: MappedRam<File>,
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

/// A file of ours says which machine is in it.
pub(super) fn no_section() -> Error {
    Error::Protocol { doing: "reading the file", reason: format!("it has no section {SECTION:?}") }
}
