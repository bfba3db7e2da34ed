//! What a reader knows of a stream before it comes.

use std::collections::BTreeMap;

use vmstate::{Problem, VmState};

use crate::description::Description;
use crate::error::Stop;
use crate::section::label;
use crate::wire::SECTION_BYTES_MAX;
use crate::{Error, RamBlock, trailer};

/// How to find the end of a section.
#[derive(Debug, Clone, Copy)]
enum Layout {
    /// By the type it will be loaded as.
    Typed(fn(&[u8], u32) -> Result<usize, vmstate::Error>),
    /// By the sizes in the file's trailer.
    Described { bytes: u64 },
}

/// The RAM that is accepted.
#[derive(Debug, Clone)]
enum Ram {
    Exactly(Vec<RamBlock>),
    AtMost { bytes: u64 },
}

/// The RAM and the sections that must come, each once.
#[derive(Debug, Clone)]
pub struct Expected {
    sections: BTreeMap<(String, u32), Option<Layout>>,
    ram: Ram,
    /// Whether a stream without digests is refused.
    needs_integrity: bool,
}

impl Expected {
    /// Exactly these blocks of RAM (none: no RAM section), and no sections yet. The stream must carry digests.
    pub fn new(ram: Vec<RamBlock>) -> Self {
        Expected { sections: BTreeMap::new(), ram: Ram::Exactly(ram), needs_integrity: true }
    }

    /// The same sections and no RAM: it comes in another way.
    #[must_use]
    pub fn without_ram(mut self) -> Self {
        self.ram = Ram::Exactly(Vec::new());
        self
    }

    /// Expects a section of this name and instance, which holds a `T`.
    #[must_use]
    pub fn section<T: VmState>(mut self, name: impl Into<String>, instance_id: u32) -> Self {
        self.sections.insert((name.into(), instance_id), Some(Layout::Typed(vmstate::measure::<T>)));
        self
    }

    /// What the trailer of a file describes, of whoever wrote it, and any RAM up to a limit. Digests are checked if there are any.
    ///
    /// # Errors
    ///
    /// If the trailer is not a list of described devices.
    pub fn from_trailer(trailer: &Description, ram_limit_bytes: u64) -> Result<Self, Error> {
        let shape = |what: &str| Error::TrailerShape(what.into());
        let devices = trailer.root().list("devices").ok_or_else(|| shape("no devices"))?;
        let ram = Ram::AtMost { bytes: ram_limit_bytes };
        let mut expected = Expected { sections: BTreeMap::new(), ram, needs_integrity: false };
        for device in devices {
            let name = device.text("name").ok_or_else(|| shape("a nameless device"))?;
            let instance_id = device.number("instance_id").and_then(|id| u32::try_from(id).ok());
            let instance_id = instance_id.ok_or_else(|| shape("a device without instance"))?;
            let layout = Layout::Described { bytes: trailer::state_bytes(device)? };
            if name != crate::digest::NAME {
                expected.sections.insert((name.into(), instance_id), Some(layout));
            }
        }
        Ok(expected)
    }

    /// The most RAM that can be accepted.
    pub(crate) fn ram_limit_bytes(&self) -> u64 {
        match &self.ram {
            Ram::Exactly(blocks) => {
                blocks.iter().fold(0, |sum, block| sum.saturating_add(block.length_bytes))
            }
            Ram::AtMost { bytes } => *bytes,
        }
    }

    /// Makes sure that the blocks are those of the machine.
    pub(crate) fn check_ram(&self, blocks: &[RamBlock]) -> Result<(), Error> {
        match &self.ram {
            Ram::Exactly(ours) if ours != blocks => {
                let list = |blocks: &[RamBlock]| {
                    let each = blocks
                        .iter()
                        .map(|block| format!("{:?} of {:#x} bytes", block.name, block.length_bytes));
                    each.collect::<Vec<_>>().join(", ")
                };
                Err(Error::Ram(format!(
                    "the stream has the blocks {}; the machine has {}",
                    list(blocks),
                    list(ours)
                )))
            }
            _ => Ok(()),
        }
    }

    pub(crate) fn needs_integrity(&self) -> bool {
        self.needs_integrity
    }

    /// The length of the section at the start of `bytes`.
    pub(crate) fn measure(
        &self,
        bytes: &[u8],
        name: &str,
        instance_id: u32,
        version: u32,
    ) -> Result<usize, Stop> {
        let owned = || name.to_owned();
        let length = match self.sections.get(&(owned(), instance_id)) {
            None => return Err(Error::Unexpected { name: owned(), instance_id }.into()),
            Some(None) => return Err(Error::Repeated { name: owned(), instance_id }.into()),
            Some(Some(Layout::Described { bytes })) => *bytes,
            Some(Some(Layout::Typed(measure))) => {
                measure(bytes, version).map(|length| length as u64).or_else(|error| match error.problem {
                    Problem::Truncated { needed, left } => {
                        Ok(bytes.len() as u64 + needed.saturating_sub(left).max(1))
                    }
                    _ => Err(Error::Section { name: owned(), version, source: error }),
                })?
            }
        };
        if length > SECTION_BYTES_MAX as u64 {
            let maximum = SECTION_BYTES_MAX as u64;
            return Err(Error::AboveMaximum { what: "length of a section", value: length, maximum }.into());
        }
        match length.checked_sub(bytes.len() as u64) {
            None | Some(0) => Ok(length as usize),
            Some(more) => Err(Stop::Needs(more)),
        }
    }

    /// Notes that a section came.
    pub(crate) fn came(&mut self, name: &str, instance_id: u32) {
        self.sections.insert((name.to_owned(), instance_id), None);
    }

    /// Makes sure that all came.
    pub(crate) fn finish(&self, ram_came: bool) -> Result<(), Error> {
        if !ram_came {
            self.check_ram(&[])?;
        }
        let missing: Vec<_> =
            self.sections.iter().filter(|(_, layout)| layout.is_some()).map(|(key, _)| label(key)).collect();
        if missing.is_empty() { Ok(()) } else { Err(Error::Missing(missing)) }
    }
}
