//! A file, its description, and the way through it.

use std::collections::BTreeMap;
use std::io;

use anyhow::{Context, bail, ensure};
use stream::described::Described;
use stream::description::Node;
use stream::{
    CHUNK_BYTES, Configuration, Decoder, Description, DeviceSection, Event, Expected, MappedReader,
    PAGE_BYTES, RamBlock, ReadAt,
};
use vmstate::{Reader, Value};

/// Trailers are at the end of a file, and shorter.
const TAIL_BYTES: u64 = (10 << 20) + 16;
/// The longest file that holds but one section: the section, its head and its footer.
const BARE_BYTES_MAX: u64 = (64 << 20) + 256;
/// What a file may say of RAM: as much as digests can cover.
const RAM_BYTES_MAX: u64 = 4 << 40;
/// Bytes read at a time.
const PIECE_BYTES: u64 = 256 << 10;
const MAGIC: &[u8] = b"QEVM";
const GZIP: &[u8] = &[0x1f, 0x8b];
/// Marks of the sections with a head and a payload, and of their footers.
const SECTION_MARKS: [u8; 2] = [0x01, 0x04];
const FOOTER_MARK: u8 = 0x7e;

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    /// A stream with its trailer.
    File,
    /// A stream whose description was given; it ends with its end mark.
    Stream,
    /// One section.
    Section,
}

/// A file and what describes it.
#[derive(Debug)]
pub struct Input<R> {
    bytes: R,
    length_bytes: u64,
    layout: Layout,
    trailer: Description,
}

/// A section, its bytes still to be read by their description.
#[derive(Clone, Copy, Debug)]
pub struct Section<'a> {
    /// Its name.
    pub name: &'a str,
    /// Tells several of one name apart.
    pub instance_id: u32,
    /// In the section itself.
    pub version: u32,
    /// What it holds.
    pub state: Described<'a>,
    /// How it is described.
    pub description: Node<'a>,
}

/// A block of RAM, counted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Block {
    /// Its name.
    pub name: String,
    /// Its length.
    pub length_bytes: u64,
    /// Pages sent with their contents; a page that is sent again counts again.
    pub pages: u64,
    /// Pages sent as zeros.
    pub zero_pages: u64,
}

/// What a walk has come by, sections aside.
#[derive(Debug, Default, PartialEq)]
pub struct Contents {
    /// What machine the stream is for.
    pub configuration: Option<Configuration>,
    /// RAM.
    pub blocks: Vec<Block>,
    /// Rounds in which it was sent.
    pub rounds: u64,
    /// Commands to the destination: how many of each.
    pub commands: BTreeMap<u16, u64>,
    /// Number of sections with a state.
    pub sections: u64,
    /// Whether digests came and agree with all that was read.
    pub verified: bool,
    /// Of all of the file, as far as it has been read; of a file only.
    pub digest: u64,
    /// Pages of a file in the mapped layout are only read for a visitor who wants them.
    pub are_pages_unread: bool,
}

/// Who is shown a file.
pub trait Visitor {
    /// The machine.
    fn configuration(&mut self, _configuration: &Configuration) -> anyhow::Result<()> {
        Ok(())
    }

    /// Whether pages are to be read where they could be left out.
    fn wants_pages(&self) -> bool {
        false
    }

    /// A page of RAM; without bytes it is zeros.
    fn page(&mut self, _block: usize, _offset: u64, _bytes: Option<&[u8]>) {}

    /// RAM is complete, or will not become so.
    fn ram(&mut self, _blocks: &[Block], _rounds: u64) -> anyhow::Result<()> {
        Ok(())
    }

    /// A section.
    fn section(&mut self, section: &Section<'_>) -> anyhow::Result<()>;
}

impl<R: ReadAt> Input<R> {
    /// Finds out what `bytes` are. A `description` is that of a bare section, or a whole trailer.
    ///
    /// # Errors
    /// It is nothing that is read here, or nothing describes it.
    pub fn new(bytes: R, description: Option<Description>) -> anyhow::Result<Self> {
        let length_bytes = bytes.length_bytes().context("cannot find its end")?;
        let start = read(&bytes, 0, MAGIC.len() as u64).context("cannot read its start")?;
        let is_stream = start == MAGIC;
        let (layout, trailer) = match description {
            Some(description) if is_stream => (Layout::Stream, description.into_trailer()),
            Some(description) => (Layout::Section, description.into_trailer()),
            None if is_stream => (Layout::File, find_trailer(&bytes, length_bytes)?),
            None if start.starts_with(GZIP) => bail!("it is compressed: let gunzip write it out first"),
            None if start.first().is_some_and(|mark| SECTION_MARKS.contains(mark)) => {
                bail!("it starts like a section without a stream: give its description with --description")
            }
            None => bail!("it is no migration stream: it starts with {start:02x?}, not with \"QEVM\""),
        };
        Ok(Self { bytes, length_bytes, layout, trailer })
    }

    /// What describes the file.
    pub fn trailer(&self) -> &Description {
        &self.trailer
    }

    /// Shows the file to `visitor`. Returns what came before the end, or before the error.
    pub fn walk(&self, visitor: &mut dyn Visitor) -> (Contents, anyhow::Result<()>) {
        let mut contents = Contents::default();
        let expected = Expected::from_trailer(&self.trailer, RAM_BYTES_MAX).map_err(anyhow::Error::from);
        let result = match (self.layout, expected) {
            (Layout::Section, _) => self.walk_section(&mut contents, visitor),
            (_, Err(error)) => Err(error),
            (Layout::File, Ok(expected)) => self.walk_file(expected, &mut contents, visitor),
            (Layout::Stream, Ok(expected)) => self.walk_stream(expected, &mut contents, visitor),
        };
        (contents, result)
    }

    /// A file of either layout.
    fn walk_file(
        &self,
        expected: Expected,
        contents: &mut Contents,
        visitor: &mut dyn Visitor,
    ) -> anyhow::Result<()> {
        let mut reader = MappedReader::open(&self.bytes, expected)?;
        let mut walk = Walk { contents, visitor, devices: devices(&self.trailer), told: false };
        let result = loop {
            let event = match reader.next_event() {
                Ok(event) => event,
                Err(error) => break Err(refusal(error, reader.offset())),
            };
            let result = match event {
                Event::End => break Ok(()),
                Event::Device(section) => {
                    let end = reader.offset();
                    walk.device(&section, end)
                }
                event => walk.other(event),
            };
            if let Err(error) = result {
                break Err(error);
            }
        };
        walk.contents.verified = reader.is_verified();
        walk.contents.digest = reader.digest();
        let result = result.and_then(|()| walk.mapped(reader));
        walk.tell_ram()?;
        result
    }

    /// A stream whose description was given, up to its end mark.
    fn walk_stream(
        &self,
        expected: Expected,
        contents: &mut Contents,
        visitor: &mut dyn Visitor,
    ) -> anyhow::Result<()> {
        let mut decoder = Decoder::live(expected);
        let mut walk = Walk { contents, visitor, devices: devices(&self.trailer), told: false };
        let mut next = 0;
        let result = loop {
            let event = match decoder.next_event() {
                Ok(Some(event)) => event,
                Ok(None) => {
                    let piece = read(&self.bytes, next, PIECE_BYTES)
                        .with_context(|| format!("cannot read what follows byte {next}"))?;
                    next += piece.len() as u64;
                    if piece.is_empty() {
                        decoder.end_of_input()
                    } else {
                        decoder.feed(&piece)
                    }
                    continue;
                }
                Err(error) => break Err(refusal(error, decoder.offset())),
            };
            let result = match event {
                Event::End => break Ok(()),
                Event::Device(section) => {
                    let end = decoder.offset();
                    walk.device(&section, end)
                }
                event => walk.other(event),
            };
            if let Err(error) = result {
                break Err(error);
            }
        };
        walk.contents.verified = decoder.is_verified();
        walk.tell_ram()?;
        result
    }

    fn walk_section(&self, contents: &mut Contents, visitor: &mut dyn Visitor) -> anyhow::Result<()> {
        ensure!(
            self.length_bytes <= BARE_BYTES_MAX,
            "{} bytes are no single section: those have at most {BARE_BYTES_MAX}",
            self.length_bytes
        );
        let bytes = read(&self.bytes, 0, BARE_BYTES_MAX).context("cannot read the section")?;
        let head = section_head(&bytes).context("the head of the section, at byte 0, is cut off")?;
        let mark = bytes.first().copied().unwrap_or_default();
        ensure!(SECTION_MARKS.contains(&mark), "byte 0 is {mark:#04x}, which starts no section");
        let (rest, footer) = bytes.split_last_chunk::<5>().context("the section ends in its head")?;
        let (end, [footer_mark, id @ ..]) = (rest.len(), *footer);
        ensure!(
            footer_mark == FOOTER_MARK && id == head.id,
            "the section does not end with its footer: {footer:02x?} is at byte {end}"
        );
        let name =
            std::str::from_utf8(head.name).context("the name of the section, at byte 6, is no text")?;
        let payload = rest.get(head.length_bytes..).context("the section ends in its head")?;
        let devices = devices(&self.trailer);
        let key = (name, u64::from(head.instance_id));
        let description = *devices.get(&key).with_context(|| {
            let known: Vec<_> =
                devices.keys().map(|(name, instance)| format!("{name:?} {instance}")).collect();
            format!("the description is of {}, not of {name:?} {}", known.join(", "), head.instance_id)
        })?;
        let state = Described::new(description, payload, head.length_bytes as u64)?;
        contents.sections = 1;
        let (instance_id, version) = (head.instance_id, head.version);
        visitor.section(&Section { name, instance_id, version, state, description })
    }
}

/// What stands before a section's payload.
struct Head<'a> {
    id: [u8; 4],
    name: &'a [u8],
    instance_id: u32,
    version: u32,
    length_bytes: usize,
}

fn section_head(bytes: &[u8]) -> Option<Head<'_>> {
    let mut reader = Reader::new(bytes);
    reader.byte().ok()?;
    let id = reader.array().ok()?;
    let name = usize::from(reader.byte().ok()?);
    let name = reader.take(name).ok()?;
    let instance_id = u32::load(&mut reader, 0).ok()?;
    let version = u32::load(&mut reader, 0).ok()?;
    Some(Head { id, name, instance_id, version, length_bytes: bytes.len() - reader.left() })
}

/// Up to `length_bytes` from `offset` on; fewer only at the end.
fn read(bytes: &impl ReadAt, offset: u64, length_bytes: u64) -> io::Result<Vec<u8>> {
    let there = bytes.length_bytes()?.saturating_sub(offset).min(length_bytes);
    let mut piece = vec![0; usize::try_from(there).map_err(io::Error::other)?];
    let mut filled = 0;
    while let Some(space) = piece.get_mut(filled..).filter(|space| !space.is_empty()) {
        match bytes.read_at(space, offset + filled as u64) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    piece.truncate(filled);
    Ok(piece)
}

fn find_trailer(bytes: &impl ReadAt, length_bytes: u64) -> anyhow::Result<Description> {
    let tail =
        read(bytes, length_bytes.saturating_sub(TAIL_BYTES), TAIL_BYTES).context("cannot read its end")?;
    stream::find_trailer(&tail)?.with_context(|| {
        format!(
            "it ends at byte {length_bytes} without a trailer, which would say what its bytes mean: it is cut off, or was \
             never a file; give the trailer with --description"
        )
    })
}

/// The descriptions by name and instance.
pub(super) fn devices(trailer: &Description) -> BTreeMap<(&str, u64), Node<'_>> {
    let devices = trailer.root().list("devices").into_iter().flatten();
    devices
        .filter_map(|device| Some(((device.text("name")?, device.number("instance_id")?), device)))
        .collect()
}

/// A walk on its way.
struct Walk<'a> {
    contents: &'a mut Contents,
    visitor: &'a mut dyn Visitor,
    devices: BTreeMap<(&'a str, u64), Node<'a>>,
    /// The visitor knows of RAM.
    told: bool,
}

impl Walk<'_> {
    /// A section whose last byte is before `end`.
    fn device(&mut self, section: &DeviceSection, end: u64) -> anyhow::Result<()> {
        let DeviceSection { name, instance_id, version, payload, .. } = section;
        // The decoder passes on only sections that the same trailer describes.
        let description = self.devices.get(&(name.as_str(), u64::from(*instance_id)));
        let description = *description.context("a section without a description")?;
        self.contents.sections += 1;
        let state = Described::new(description, payload, end.saturating_sub(payload.len() as u64))
            .with_context(|| format!("section {name:?}"))?;
        let (instance_id, version) = (*instance_id, *version);
        self.visitor.section(&Section { name, instance_id, version, state, description })
    }

    fn other(&mut self, event: Event<'_>) -> anyhow::Result<()> {
        let contents = &mut *self.contents;
        match event {
            Event::Configuration(configuration) => {
                self.visitor.configuration(&configuration)?;
                contents.configuration = Some(configuration);
            }
            Event::RamBlocks(blocks) => contents.blocks = blocks.iter().map(counted).collect(),
            Event::RamPage { block, offset, bytes } => {
                contents.blocks.get_mut(block).into_iter().for_each(|block| block.pages += 1);
                self.visitor.page(block, offset, Some(bytes));
            }
            Event::RamZero { block, offset } => {
                contents.blocks.get_mut(block).into_iter().for_each(|block| block.zero_pages += 1);
                self.visitor.page(block, offset, None);
            }
            Event::RamRound { last } => {
                contents.rounds += 1;
                let are_pages_elsewhere =
                    contents.configuration.iter().any(|one| !one.capabilities.is_empty());
                if last && !are_pages_elsewhere {
                    self.tell_ram()?;
                }
            }
            Event::Command(command) => *contents.commands.entry(command.number()).or_default() += 1,
            Event::Device(_) | Event::Trailer(_) | Event::End => {}
        }
        Ok(())
    }

    /// The pages of a file in the mapped layout, which are beside the sections.
    fn mapped<R: ReadAt>(&mut self, reader: MappedReader<R>) -> anyhow::Result<()> {
        let ram = reader.into_ram()?;
        self.contents.are_pages_unread = ram.blocks().len() > 0 && !self.visitor.wants_pages();
        let mut buffer = vec![0; if self.visitor.wants_pages() { CHUNK_BYTES as usize } else { 0 }];
        for block in 0..ram.blocks().len() {
            let mut verified = None;
            for extent in ram.extents(block) {
                if let Some(counted) = self.contents.blocks.get_mut(block) {
                    counted.pages += (extent.end - extent.start) / PAGE_BYTES as u64;
                }
                if !self.visitor.wants_pages() {
                    continue;
                }
                for offset in extent.step_by(PAGE_BYTES) {
                    let chunk = offset / CHUNK_BYTES;
                    if verified != Some(chunk) {
                        ram.read_chunk(block, chunk, &mut buffer)?;
                        verified = Some(chunk);
                    }
                    let start = (offset % CHUNK_BYTES) as usize;
                    self.visitor.page(block, offset, buffer.get(start..start + PAGE_BYTES));
                }
            }
        }
        Ok(())
    }

    fn tell_ram(&mut self) -> anyhow::Result<()> {
        if !self.told && !self.contents.blocks.is_empty() {
            self.told = true;
            self.visitor.ram(&self.contents.blocks, self.contents.rounds)?;
        }
        Ok(())
    }
}

fn counted(block: &RamBlock) -> Block {
    let RamBlock { name, length_bytes } = block.clone();
    Block { name, length_bytes, pages: 0, zero_pages: 0 }
}

/// The decoder's error, with the place up to which all is well unless it names a place or speaks of the whole.
fn refusal(error: stream::Error, offset: u64) -> anyhow::Error {
    use stream::Error as E;
    let has_place = matches!(
        error,
        E::Truncated { .. }
            | E::UnknownMark { .. }
            | E::OutOfOrder { .. }
            | E::Footer { .. }
            | E::Unfit { .. }
    );
    let is_whole = matches!(error, E::Damaged { .. } | E::Coverage(_) | E::Missing(_) | E::NotAStream { .. });
    match has_place || is_whole {
        true => error.into(),
        false => anyhow::Error::from(error).context(format!("what follows byte {offset} cannot be read")),
    }
}
