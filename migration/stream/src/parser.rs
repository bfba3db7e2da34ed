//! The grammar of a stream: what may come next, and what it means.

use std::collections::BTreeSet;
use std::ops::Range;

use serde_json::Value as Json;
use vmstate::{Reader, Value};

use crate::command::{Command, Postcopy};
use crate::configuration::{self, Configuration};
use crate::digest::{self, Digests, Integrity};
use crate::error::Stop;
use crate::expected::Expected;
use crate::mapped::{self, MappedBlock};
use crate::ram::{self, RamBlock};
use crate::section::DeviceSection;
use crate::wire::{self, mark};
use crate::{Error, canonical, trailer};

mod ram_section;

use ram_section::{Ram, Start};

/// An event; bytes are given as ranges of what was parsed.
#[derive(Debug)]
pub(crate) enum Parsed {
    Configuration(Configuration),
    RamBlocks,
    RamPage {
        block: usize,
        offset: u64,
        bytes: Range<usize>,
    },
    RamZero {
        block: usize,
        offset: u64,
    },
    RamRound {
        last: bool,
    },
    Command(Command),
    Device(DeviceSection),
    Trailer {
        text: Range<usize>,
    },
    /// The stream goes on elsewhere in the file.
    Jump {
        to: u64,
    },
    End,
}

impl Parsed {
    /// The same, with ranges that count from `by` bytes earlier.
    pub(crate) fn moved(self, by: usize) -> Self {
        let moved = |range: Range<usize>| range.start + by..range.end + by;
        match self {
            Parsed::RamPage { block, offset, bytes } => {
                Parsed::RamPage { block, offset, bytes: moved(bytes) }
            }
            Parsed::Trailer { text } => Parsed::Trailer { text: moved(text) },
            other => other,
        }
    }
}

/// Where the stream comes from, which decides what it may hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// It ends with its end mark.
    Connection,
    /// After the end mark comes the trailer.
    File,
    /// So many bytes; where its layout says so, the stream goes on elsewhere in it.
    MappedFile { file_bytes: u64 },
}

/// What is due next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Due {
    Header,
    Section,
    /// Of a mapped file.
    Block,
    Records {
        last: bool,
    },
    Footer {
        id: u32,
        name: String,
    },
    /// In a file.
    Trailer,
    EndOfFile,
    Nothing,
}

impl Due {
    /// For errors.
    pub(crate) fn what(&self) -> &'static str {
        match self {
            Due::Header => "the header",
            Due::Section => "a section",
            Due::Block => "the list of RAM blocks",
            Due::Records { .. } => "RAM records",
            Due::Footer { .. } => "a footer",
            Due::Trailer => "the trailer",
            Due::EndOfFile | Due::Nothing => "the end",
        }
    }
}

/// Everything about a stream but its bytes. It changes only when a part is complete, so that a part can be tried again.
#[derive(Debug)]
pub(crate) struct Parser {
    expected: Expected,
    source: Source,
    due: Due,
    digests: Digests,
    configured: bool,
    /// As the trailer of a file describes it.
    configuration: Json,
    /// The integrity section, once it has come and agreed.
    integrity: Option<Integrity>,
    ram: Ram,
    blocks: Vec<RamBlock>,
    /// The same in a mapped file.
    mapped: Vec<MappedBlock>,
    is_mapped: bool,
    start: Option<Start>,
    /// The block of the last RAM record.
    current_block: Option<usize>,
    /// Ids of the sections so far.
    ids: BTreeSet<u32>,
    postcopy: Postcopy,
    /// Where the package ends that the stream is in.
    package_end: Option<u64>,
    /// Name, instance, version and length of every section, for the trailer.
    came: Vec<canonical::Section>,
}

type Outcome = Result<(Option<Parsed>, usize), Stop>;

impl Parser {
    pub(crate) fn new(expected: Expected, source: Source) -> Self {
        Parser {
            expected,
            source,
            due: Due::Header,
            digests: Digests::default(),
            configured: false,
            configuration: Json::Null,
            integrity: None,
            ram: Ram::Absent,
            blocks: Vec::new(),
            mapped: Vec::new(),
            is_mapped: false,
            start: None,
            current_block: None,
            ids: BTreeSet::new(),
            postcopy: Postcopy::default(),
            package_end: None,
            came: Vec::new(),
        }
    }

    pub(crate) fn due(&self) -> &Due {
        &self.due
    }

    pub(crate) fn blocks(&self) -> &[RamBlock] {
        &self.blocks
    }

    pub(crate) fn is_verified(&self) -> bool {
        self.integrity.is_some()
    }

    pub(crate) fn mapped(&self) -> &[MappedBlock] {
        &self.mapped
    }

    /// The digests, and the integrity section if it has come.
    pub(crate) fn digests(&mut self) -> (&mut Digests, Option<&Integrity>) {
        (&mut self.digests, self.integrity.as_ref())
    }

    pub(crate) fn digest(&self) -> u64 {
        self.digests.combined()
    }

    /// Parses one part from the start of `bytes`, which are at `offset` of the stream; `is_all` if none will follow. Returns the
    /// event that it makes, if it makes one, and its length.
    pub(crate) fn parse(&mut self, bytes: &[u8], offset: u64, is_all: bool) -> Outcome {
        let left = self.package_end.map(|end| end.saturating_sub(offset));
        match left.map(|left| (left, bytes.split_at_checked(left as usize))) {
            Some((0, _)) if self.due == Due::Section => {
                self.package_end = None;
                self.part(bytes, offset, is_all)
            }
            Some((left, Some((inside, _)))) => match self.part(inside, offset, false) {
                Err(Stop::Needs(_)) => {
                    let what = "the end of a package inside a section";
                    Err(Error::OutOfOrder { what, offset: offset + left }.into())
                }
                outcome => outcome,
            },
            _ => self.part(bytes, offset, is_all),
        }
    }

    fn part(&mut self, bytes: &[u8], offset: u64, is_all: bool) -> Outcome {
        match self.due.clone() {
            Due::Header => self.header(bytes),
            Due::Section => self.section(bytes, offset),
            Due::Block => self.block(bytes, offset),
            Due::Records { last } => self.record(bytes, last),
            Due::Footer { id, name } => self.footer(bytes, offset, id, name),
            Due::Trailer => self.trailer(bytes, offset),
            Due::EndOfFile if bytes.is_empty() && is_all => {
                self.due = Due::Nothing;
                Ok((Some(Parsed::End), 0))
            }
            Due::EndOfFile if bytes.is_empty() => Err(Stop::Needs(1)),
            Due::EndOfFile => Err(Error::OutOfOrder { what: "more after the trailer", offset }.into()),
            Due::Nothing => Ok((Some(Parsed::End), 0)),
        }
    }

    fn header(&mut self, bytes: &[u8]) -> Outcome {
        let mut reader = Reader::partial(bytes);
        let (magic, version) = (u32::load(&mut reader, 0)?, u32::load(&mut reader, 0)?);
        if (magic, version) != (wire::MAGIC, wire::VERSION) {
            return Err(Error::NotAStream { magic, version }.into());
        }
        self.due = Due::Section;
        Ok((None, bytes.len() - reader.left()))
    }

    fn section(&mut self, bytes: &[u8], offset: u64) -> Outcome {
        let mut reader = Reader::partial(bytes);
        let mark = reader.byte()?;
        let out_of_order = |what| Stop::from(Error::OutOfOrder { what, offset });
        match mark {
            mark::END if self.package_end.is_some() => {
                Err(out_of_order("the end of the stream in a package"))
            }
            mark::END => {
                self.end()?;
                let parsed = (self.due == Due::Nothing).then_some(Parsed::End);
                Ok((parsed, 1))
            }
            _ if self.integrity.is_some() => Err(out_of_order("a section after the digests")),
            mark::CONFIGURATION if self.configured || !self.ids.is_empty() => {
                Err(out_of_order("the configuration"))
            }
            mark::CONFIGURATION => self.configuration(bytes),
            mark::SECTION_START => self.ram_start(bytes, offset),
            mark::SECTION_PART | mark::SECTION_END => {
                let id = u32::load(&mut reader, 0)?;
                if self.ram != (Ram::Started { id }) {
                    return Err(out_of_order("a part of a section that was not started"));
                }
                self.due = Due::Records { last: mark == mark::SECTION_END };
                Ok((None, bytes.len() - reader.left()))
            }
            mark::SECTION_FULL => self.device(bytes),
            mark::COMMAND => self.command(bytes, offset),
            mark => Err(Error::UnknownMark { mark, offset }.into()),
        }
    }

    /// The end mark: everything that must come has come.
    fn end(&mut self) -> Result<(), Error> {
        if matches!(self.ram, Ram::Started { .. }) {
            return Err(Error::Ram("the last round is missing".into()));
        }
        self.expected.finish(self.ram == Ram::Ended)?;
        if self.expected.needs_integrity() && self.integrity.is_none() {
            return Err(Error::NoIntegrity);
        }
        self.due = if self.source == Source::Connection { Due::Nothing } else { Due::Trailer };
        Ok(())
    }

    fn command(&mut self, bytes: &[u8], offset: u64) -> Outcome {
        let mut reader = Reader::partial(bytes);
        reader.byte()?;
        let (number, length) = (u16::load(&mut reader, 0)?, u16::load(&mut reader, 0)?);
        let command = Command::decode(number, reader.take(length.into())?, &self.blocks)?;
        let out_of_order = |what| Error::OutOfOrder { what, offset };
        self.postcopy = self.postcopy.after(&command).ok_or_else(|| out_of_order(command.name()))?;
        let length = bytes.len() - reader.left();
        if let Command::Packaged { length_bytes } = command {
            if self.package_end.is_some() {
                return Err(out_of_order("a package in a package").into());
            }
            self.package_end = Some(offset + length as u64 + u64::from(length_bytes));
        }
        self.digests.command(&bytes[..length]);
        Ok((Some(Parsed::Command(command)), length))
    }

    fn configuration(&mut self, bytes: &[u8]) -> Outcome {
        let malformed = |source| Error::Malformed { what: "the configuration", source };
        let payload = bytes.get(1..).unwrap_or_default();
        let length = vmstate::measure::<configuration::Wire>(payload, 1)
            .map_err(|error| Stop::in_part(error, malformed))?;
        let payload = payload.get(..length).unwrap_or_default();
        let state = vmstate::from_bytes::<configuration::Wire>(payload, 1).map_err(malformed)?;
        self.configuration = state.describe();
        let configuration = state.into_configuration()?;
        // Each of them changes the layout of what follows.
        let is_known = |capability: &str| {
            capability == mapped::CAPABILITY && matches!(self.source, Source::MappedFile { .. })
        };
        if let Some(capability) = configuration.capabilities.iter().find(|capability| !is_known(capability)) {
            return Err(Error::Capability(capability.clone()).into());
        }
        self.is_mapped = configuration.is_mapped();
        self.configured = true;
        self.digests.configuration(payload);
        Ok((Some(Parsed::Configuration(configuration)), 1 + length))
    }

    /// Mark, id, name, instance and version of a section.
    fn head<'a>(&self, reader: &mut Reader<'a>) -> Result<Head<'a>, Stop> {
        reader.byte()?;
        let id = u32::load(reader, 0)?;
        let name = ram::load_name(reader)?;
        let head = Head { id, name, instance_id: u32::load(reader, 0)?, version: u32::load(reader, 0)? };
        if self.ids.contains(&id) {
            return Err(Error::RepeatedId { name: name.into(), id }.into());
        }
        if self.ids.len() == wire::SECTIONS_MAX {
            let maximum = wire::SECTIONS_MAX as u64;
            return Err(
                Error::AboveMaximum { what: "number of sections", value: maximum + 1, maximum }.into()
            );
        }
        Ok(head)
    }

    /// A section is complete: notes it and waits for its footer.
    fn came(&mut self, head: &Head<'_>) {
        self.ids.insert(head.id);
        self.due = Due::Footer { id: head.id, name: head.name.to_owned() };
    }

    fn device(&mut self, bytes: &[u8]) -> Outcome {
        let mut reader = Reader::partial(bytes);
        let head = self.head(&mut reader)?;
        let start = bytes.len() - reader.left();
        let payload = &bytes[start..];
        if (head.name, head.instance_id) == (digest::NAME, 0) {
            let length = self.integrity(payload, &head)?;
            self.came(&head);
            return Ok((None, start + length));
        }
        let Head { id, name, instance_id, version } = head;
        let length = self.expected.measure(payload, name, instance_id, version)?;
        let end = start + length;
        self.expected.came(name, instance_id);
        self.digests.section(id, name, &bytes[..end]);
        self.came(&head);
        if self.expected.needs_integrity() && self.source != Source::Connection {
            self.came.push(canonical::Section {
                name: name.into(),
                instance_id,
                version,
                bytes: length as u64,
            });
        }
        let payload = payload[..length].to_vec();
        let section =
            DeviceSection { name: name.into(), instance_id, version, payload, description: Json::Null };
        Ok((Some(Parsed::Device(section)), end))
    }

    /// Compares the digests; returns the length of their section.
    fn integrity(&mut self, payload: &[u8], head: &Head<'_>) -> Result<usize, Stop> {
        let refusal = |source| Error::Section { name: digest::NAME.into(), version: head.version, source };
        let length = vmstate::measure::<Integrity>(payload, head.version)
            .map_err(|error| Stop::in_part(error, refusal))?;
        let written = vmstate::from_bytes(&payload[..length], head.version).map_err(refusal)?;
        self.digests.compare(&written, self.is_mapped)?;
        if written.trailer.is_some() && self.source == Source::Connection {
            return Err(Error::Coverage("a trailer, which only files have".into()).into());
        }
        if self.is_mapped {
            self.digests.believe(&written);
            self.digests.bitmaps(written.mapped.as_ref().map_or(0, |mapped| mapped.bitmaps));
        }
        self.came.push(canonical::Section {
            name: digest::NAME.into(),
            instance_id: 0,
            version: head.version,
            bytes: length as u64,
        });
        self.integrity = Some(written);
        Ok(length)
    }

    fn footer(&mut self, bytes: &[u8], offset: u64, id: u32, name: String) -> Outcome {
        let found: [u8; 5] = Reader::partial(bytes).array()?;
        let [mark, rest @ ..] = found;
        if mark != mark::FOOTER || u32::from_be_bytes(rest) != id {
            return Err(Error::Footer { name, found, offset }.into());
        }
        self.due = Due::Section;
        Ok((None, found.len()))
    }

    fn trailer(&mut self, bytes: &[u8], offset: u64) -> Outcome {
        let mut reader = Reader::partial(bytes);
        if reader.byte()? != mark::TRAILER {
            return Err(Error::OutOfOrder { what: "more after the end", offset }.into());
        }
        let length = u32::load(&mut reader, 0)?;
        if length as usize > wire::TRAILER_BYTES_MAX {
            let (value, maximum) = (u64::from(length), wire::TRAILER_BYTES_MAX as u64);
            return Err(Error::AboveMaximum { what: "length of the trailer", value, maximum }.into());
        }
        let text = reader.take(length as usize)?;
        if let Some(expected) = self.integrity.as_ref().and_then(|written| written.trailer.as_ref()) {
            digest::same(|| "the trailer".into(), digest::of_bytes(text), expected.text)?;
        }
        match &self.integrity {
            Some(written) if self.expected.needs_integrity() => {
                let integrity = DeviceSection::save(digest::NAME, 0, written);
                canonical::check(text, &self.came, &self.configuration, &trailer::device(&integrity))?;
            }
            _ => canonical::check_syntax(text)?,
        }
        self.due = Due::EndOfFile;
        let end = bytes.len() - reader.left();
        Ok((Some(Parsed::Trailer { text: end - text.len()..end }), end))
    }
}

/// The head of a section.
struct Head<'a> {
    id: u32,
    name: &'a str,
    instance_id: u32,
    version: u32,
}
