//! Writing a stream.

use std::io::{IoSlice, Write};

use serde_json::Value as Json;
use vmstate::Value;

use crate::command::{Command, PackagePart};
use crate::configuration::{self, Configuration, check_name};
use crate::digest::{self, Digests};
use crate::ram::{self, PAGE_BYTES, RamBlock, flag};
use crate::section::DeviceSection;
use crate::wire::{self, mark, write_all_vectored};
use crate::{Error, trailer};

/// Pages written with one call.
const PAGES_PER_WRITE: usize = 64;

/// Writes a stream, part by part, in the order of the calls.
///
/// `out` sees writes of very different sizes; give it a buffer if they are expensive. Runs of pages are written with vectored calls.
#[derive(Debug)]
pub struct StreamWriter<W> {
    pub(crate) out: W,
    configuration: Json,
    devices: Vec<Json>,
    pub(crate) digests: Digests,
    next_id: u32,
    is_mapped: bool,
}

impl<W: Write> StreamWriter<W> {
    /// Starts a stream: header and configuration.
    ///
    /// # Errors
    ///
    /// If the configuration has names that cannot be written, or `out` fails.
    pub fn new(mut out: W, configuration: &Configuration) -> Result<Self, Error> {
        let state = configuration::Wire::new(configuration)?;
        let payload = vmstate::to_bytes(&state);
        let mut bytes = Vec::new();
        wire::MAGIC.save(&mut bytes);
        wire::VERSION.save(&mut bytes);
        bytes.push(mark::CONFIGURATION);
        bytes.extend(&payload);
        out.write_all(&bytes).map_err(Error::write("the configuration"))?;
        let mut digests = Digests::default();
        digests.configuration(&payload);
        let is_mapped = configuration.is_mapped();
        let (configuration, devices) = (state.describe(), Vec::new());
        Ok(StreamWriter { out, configuration, devices, digests, next_id: 1, is_mapped })
    }

    /// Starts the RAM section: the list of blocks.
    ///
    /// # Errors
    ///
    /// If the blocks cannot be written (names, lengths that are not whole pages), or `out` fails.
    pub fn start_ram(&mut self, blocks: &[RamBlock]) -> Result<RamWriter, Error> {
        self.check_layout(false)?;
        let id = self.next_id;
        let bytes =
            self.section(mark::SECTION_START, ram::NAME, 0, ram::VERSION, &ram::save_blocks(blocks)?)?;
        self.digests.section(id, ram::NAME, &bytes);
        self.digests.ram_blocks(blocks, false)?;
        self.finish_section(bytes, id)?;
        Ok(RamWriter { id, blocks: blocks.to_vec() })
    }

    /// Makes sure that RAM is written as the configuration said.
    pub(crate) fn check_layout(&self, is_mapped: bool) -> Result<(), Error> {
        match (self.is_mapped, is_mapped) {
            (true, false) => Err(Error::Ram("the configuration says that RAM is mapped".into())),
            (false, true) => Err(Error::Ram("the configuration does not say that RAM is mapped".into())),
            _ => Ok(()),
        }
    }

    /// Writes the state of a device. Its description, if it has one, goes into the trailer.
    ///
    /// # Errors
    ///
    /// If its name cannot be written, its payload is too long, or `out` fails.
    pub fn device(&mut self, section: &DeviceSection) -> Result<(), Error> {
        let bytes = self.device_bytes(section)?;
        self.out.write_all(&bytes).map_err(Error::write("a section"))
    }

    /// A device's section with its footer.
    fn device_bytes(&mut self, section: &DeviceSection) -> Result<Vec<u8>, Error> {
        let DeviceSection { name, instance_id, version, payload, description } = section;
        if payload.len() > wire::SECTION_BYTES_MAX {
            let (value, maximum) = (payload.len() as u64, wire::SECTION_BYTES_MAX as u64);
            return Err(Error::AboveMaximum { what: "length of a section", value, maximum });
        }
        if name == ram::NAME || name == digest::NAME {
            return Err(Error::Unexpected { name: name.clone(), instance_id: *instance_id });
        }
        let id = self.next_id;
        let mut bytes = self.section(mark::SECTION_FULL, name, *instance_id, *version, payload)?;
        self.digests.section(id, name, &bytes);
        if !description.is_null() {
            self.devices.push(trailer::device(section));
        }
        save_footer(id, &mut bytes);
        Ok(bytes)
    }

    /// Writes a command.
    ///
    /// # Errors
    ///
    /// If it is a package (see [`package`](Self::package)), has a name that cannot be written or too much data, or `out` fails.
    pub fn command(&mut self, command: &Command) -> Result<(), Error> {
        let bytes = command_bytes(command)?;
        self.digests.command(&bytes);
        self.out.write_all(&bytes).map_err(Error::write("a command"))
    }

    /// Writes sections and commands as one package.
    ///
    /// # Errors
    ///
    /// As [`device`](Self::device) and [`command`](Self::command), and if the package is too long.
    pub fn package(&mut self, parts: &[PackagePart<'_>]) -> Result<(), Error> {
        let (mut package, mut commands) = (Vec::new(), Vec::new());
        for part in parts {
            let bytes = match part {
                PackagePart::Device(section) => self.device_bytes(section)?,
                PackagePart::Command(command) => {
                    let bytes = command_bytes(command)?;
                    commands.push(bytes.clone());
                    bytes
                }
            };
            package.extend(bytes);
        }
        let (value, maximum) = (package.len() as u64, u64::from(wire::PACKAGE_BYTES_MAX));
        if value > maximum {
            return Err(Error::AboveMaximum { what: "length of a package", value, maximum });
        }
        let mut bytes = any_command_bytes(&Command::Packaged { length_bytes: value as u32 })?;
        // In the order in which a reader sees them.
        self.digests.command(&bytes);
        commands.iter().for_each(|command| self.digests.command(command));
        bytes.extend(package);
        self.out.write_all(&bytes).map_err(Error::write("a package"))
    }

    /// Where the bytes go, to be flushed or asked. Bytes written past the writer break the stream.
    pub fn get_mut(&mut self) -> &mut W {
        &mut self.out
    }

    /// One number for everything written so far.
    pub fn digest(&self) -> u64 {
        self.digests.combined()
    }

    /// Ends a stream on a live connection: digests and the end mark. Returns the writer, flushed.
    ///
    /// # Errors
    ///
    /// If `out` fails.
    pub fn finish_live(self) -> Result<W, Error> {
        self.end(&[], None)
    }

    /// Ends a file: digests, the end mark and the trailer. Returns the writer, flushed.
    ///
    /// # Errors
    ///
    /// If the trailer is too long or `out` fails.
    pub fn finish_file(mut self) -> Result<W, Error> {
        // What the trailer says of the section does not depend on the digests in it, so that one of them can be the trailer's.
        let integrity = DeviceSection::save(digest::NAME, 0, &self.digests.to_state(Some(0)));
        self.devices.push(trailer::device(&integrity));
        let text = trailer::text(&self.configuration, &self.devices)?;
        self.end(&trailer::save(&text), Some(digest::of_bytes(&text)))
    }

    fn end(mut self, trailer: &[u8], trailer_digest: Option<u64>) -> Result<W, Error> {
        let state = self.digests.to_state(trailer_digest);
        let integrity = DeviceSection::save_bare(digest::NAME, 0, &state);
        let id = self.next_id;
        let bytes =
            self.section(mark::SECTION_FULL, digest::NAME, 0, integrity.version, &integrity.payload)?;
        self.finish_section(bytes, id)?;
        self.out.write_all(&[mark::END]).map_err(Error::write("the end"))?;
        self.out.write_all(trailer).map_err(Error::write("the trailer"))?;
        self.out.flush().map_err(Error::write("the end"))?;
        Ok(self.out)
    }

    /// The id of the next section.
    pub(crate) fn next_id(&self) -> u32 {
        self.next_id
    }

    /// Head and payload of a section.
    pub(crate) fn section(
        &mut self,
        mark: u8,
        name: &str,
        instance_id: u32,
        version: u32,
        payload: &[u8],
    ) -> Result<Vec<u8>, Error> {
        check_name("a section", name)?;
        if self.next_id as usize > wire::SECTIONS_MAX {
            let (value, maximum) = (u64::from(self.next_id), wire::SECTIONS_MAX as u64);
            return Err(Error::AboveMaximum { what: "number of sections", value, maximum });
        }
        let mut bytes = Vec::with_capacity(payload.len() + name.len() + 32);
        bytes.push(mark);
        self.next_id.save(&mut bytes);
        ram::save_name(name, &mut bytes);
        instance_id.save(&mut bytes);
        version.save(&mut bytes);
        bytes.extend_from_slice(payload);
        self.next_id += 1;
        Ok(bytes)
    }

    /// Writes a section with its footer.
    pub(crate) fn finish_section(&mut self, mut bytes: Vec<u8>, id: u32) -> Result<(), Error> {
        save_footer(id, &mut bytes);
        self.out.write_all(&bytes).map_err(Error::write("a section"))
    }
}

fn command_bytes(command: &Command) -> Result<Vec<u8>, Error> {
    match command {
        Command::Packaged { .. } => {
            Err(Error::Data { what: command.name(), why: "it is written with its parts".into() })
        }
        command => any_command_bytes(command),
    }
}

fn any_command_bytes(command: &Command) -> Result<Vec<u8>, Error> {
    let data = command.encode()?;
    let length = u16::try_from(data.len()).map_err(|_| {
        let (value, maximum) = (data.len() as u64, u16::MAX.into());
        Error::AboveMaximum { what: "length of a command", value, maximum }
    })?;
    let mut bytes = vec![mark::COMMAND];
    command.number().save(&mut bytes);
    length.save(&mut bytes);
    bytes.extend(data);
    Ok(bytes)
}

/// Appends the footer of a section.
pub(crate) fn save_footer(id: u32, out: &mut Vec<u8>) {
    out.push(mark::FOOTER);
    id.save(out);
}

/// The RAM section of a stream: its id and its blocks.
#[derive(Debug)]
pub struct RamWriter {
    id: u32,
    blocks: Vec<RamBlock>,
}

impl RamWriter {
    /// Starts a round that others will follow.
    ///
    /// # Errors
    ///
    /// If the stream cannot be written.
    pub fn round<'a, W: Write>(
        &'a mut self,
        stream: &'a mut StreamWriter<W>,
    ) -> Result<RamRound<'a, W>, Error> {
        RamRound::start(self, stream, mark::SECTION_PART)
    }

    /// Starts the last round, with the VM stopped.
    ///
    /// # Errors
    ///
    /// If the stream cannot be written.
    pub fn last_round<'a, W: Write>(
        &'a mut self,
        stream: &'a mut StreamWriter<W>,
    ) -> Result<RamRound<'a, W>, Error> {
        RamRound::start(self, stream, mark::SECTION_END)
    }
}

/// A round of RAM records, which must be finished.
#[derive(Debug)]
#[must_use = "a round that is not finished breaks the stream"]
pub struct RamRound<'a, W> {
    ram: &'a RamWriter,
    stream: &'a mut StreamWriter<W>,
    current: Option<usize>,
}

impl<'a, W: Write> RamRound<'a, W> {
    fn start(ram: &'a RamWriter, stream: &'a mut StreamWriter<W>, mark: u8) -> Result<Self, Error> {
        let mut head = vec![mark];
        ram.id.save(&mut head);
        stream.out.write_all(&head).map_err(Error::write("RAM"))?;
        Ok(RamRound { ram, stream, current: None })
    }

    /// Writes whole pages that follow each other, from `offset` of block number `block` on.
    ///
    /// The bytes must not change during the call: copy what a running guest may write to.
    ///
    /// # Errors
    ///
    /// If the pages are not whole or not inside the block, or the stream cannot be written.
    pub fn pages(&mut self, block: usize, offset: u64, pages: &[u8]) -> Result<(), Error> {
        self.check(block, offset, pages.len() as u64)?;
        let (pages, _) = pages.as_chunks::<PAGE_BYTES>();
        let mut offset = offset;
        for run in pages.chunks(PAGES_PER_WRITE) {
            let (mut names, mut words) = (Vec::with_capacity(run.len()), Vec::with_capacity(run.len()));
            for page in run {
                self.stream.digests.ram_page(block, offset, page);
                let (word, name) = self.head(block, offset, flag::PAGE);
                words.push(word);
                names.push(name);
                offset += PAGE_BYTES as u64;
            }
            let records = words.iter().zip(&names).zip(run);
            let mut slices: Vec<_> = records
                .flat_map(|((word, name), page)| [word, name.as_slice(), page])
                .map(IoSlice::new)
                .collect();
            write_all_vectored(&mut self.stream.out, &mut slices).map_err(Error::write("RAM"))?;
        }
        Ok(())
    }

    /// Writes that `length_bytes` from `offset` of block number `block` on are zeros.
    ///
    /// # Errors
    ///
    /// As [`pages`](Self::pages).
    pub fn zeros(&mut self, block: usize, offset: u64, length_bytes: u64) -> Result<(), Error> {
        self.check(block, offset, length_bytes)?;
        let mut records = Vec::new();
        for offset in (offset..offset + length_bytes).step_by(PAGE_BYTES) {
            self.stream.digests.ram_zero(block, offset);
            let (word, name) = self.head(block, offset, flag::ZERO);
            records.extend(word);
            records.extend(name);
            records.push(0);
            if records.len() >= PAGES_PER_WRITE * PAGE_BYTES {
                self.stream.out.write_all(&records).map_err(Error::write("RAM"))?;
                records.clear();
            }
        }
        self.stream.out.write_all(&records).map_err(Error::write("RAM"))
    }

    /// Ends the round.
    ///
    /// # Errors
    ///
    /// If the stream cannot be written.
    pub fn finish(self) -> Result<(), Error> {
        let mut tail = Vec::new();
        flag::END.save(&mut tail);
        save_footer(self.ram.id, &mut tail);
        self.stream.out.write_all(&tail).map_err(Error::write("RAM"))
    }

    /// A record without its page: the word, and the name of the block unless the record before had it.
    fn head(&mut self, block: usize, offset: u64, flags: u64) -> ([u8; 8], Vec<u8>) {
        if self.current == Some(block) {
            return ((offset | flags | flag::CONTINUE).to_be_bytes(), Vec::new());
        }
        self.current = Some(block);
        let mut name = Vec::new();
        ram::save_name(&self.ram.blocks[block].name, &mut name);
        ((offset | flags).to_be_bytes(), name)
    }

    fn check(&self, block: usize, offset: u64, length: u64) -> Result<(), Error> {
        ram::check_pages(&self.ram.blocks, block, offset, length)
    }
}
