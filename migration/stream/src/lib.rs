//! The migration stream: a codec between saved states and bytes.
//!
//! A stream is what a snapshot file holds and what travels in the stream frames of a live connection: a configuration, the
//! contents of RAM, a section for every device, digests of all of it and, in a file, the description of what the bytes mean. The
//! layout is QEMU's, so that `analyze-migration.py` prints ours.
//!
//! - [`StreamWriter`] writes to any [`std::io::Write`]; [`Decoder`] turns bytes, in pieces of any size, into [`Event`]s and does no
//!   I/O; [`StreamReader`] feeds it from a [`std::io::Read`].
//! - [`DeviceSection`] is one saved state with its name; [`SectionSet`] hands the received ones out, each exactly once.
//! - [`Expected`] is what a destination knows beforehand: which sections, of which types, and how much RAM. Sections carry no
//!   length on the wire; it follows from the type (or, for a foreign file, from its trailer).
//! - [`MappedReader`] and [`StreamWriter::start_mapped_ram`] are for files whose pages lie at fixed places.
//! - [`frame`] is the framing of a live connection. [`Command`] and [`return_path`] are what QEMU has in its place.
//! - [`described`] reads the values of a section by its description, whoever wrote it.
//!
//! ```
//! use stream::{Configuration, DeviceSection, Event, Expected, RamBlock, SectionSet, StreamReader, StreamWriter};
//!
//! #[derive(vmstate::VmState, Debug, PartialEq)]
//! #[vmstate(name = "clock")]
//! struct Clock {
//!     nanoseconds: u64,
//! }
//!
//! let mut writer = StreamWriter::new(Vec::new(), &Configuration::new("ferry-1"))?;
//! let mut ram = writer.start_ram(&[RamBlock::new("ram", 8192)])?;
//! let mut round = ram.last_round(&mut writer)?;
//! round.pages(0, 0, &[7; 4096])?;
//! round.zeros(0, 4096, 4096)?;
//! round.finish()?;
//! writer.device(&DeviceSection::save("clock", 0, &Clock { nanoseconds: 5 }))?;
//! let file = writer.finish_file()?;
//!
//! let expected = Expected::new(vec![RamBlock::new("ram", 8192)]).section::<Clock>("clock", 0);
//! let mut reader = StreamReader::file(file.as_slice(), expected);
//! let mut sections = SectionSet::default();
//! let mut pages = 0;
//! loop {
//!     match reader.next_event()? {
//!         Event::RamPage { bytes, .. } => pages += usize::from(bytes[0] == 7),
//!         Event::Device(section) => sections.insert(section)?,
//!         Event::End => break,
//!         _ => {}
//!     }
//! }
//! assert_eq!(pages, 1);
//! assert_eq!(sections.take::<Clock>("clock", 0)?, Clock { nanoseconds: 5 });
//! sections.finish()?;
//! # Ok::<(), stream::Error>(())
//! ```
//!
//! # Mapped files
//!
//! In the mapped layout a page lies at a place of its own and a page of zeros is a hole of the file, so that memory can be read when
//! it is needed. The sections, the bitmaps of the pages and the table of their digests are verified first; pages are read and verified
//! a [chunk](CHUNK_BYTES) at a time.
//!
//! ```
//! use std::io::Cursor;
//! use stream::{CHUNK_BYTES, Configuration, Event, Expected, MappedReader, RamBlock, StreamWriter};
//!
//! let blocks = vec![RamBlock::new("ram", 4 << 20)];
//! let mut writer = StreamWriter::new(Cursor::new(Vec::new()), &Configuration::mapped("ferry-1"))?;
//! let mut ram = writer.start_mapped_ram(&blocks)?;
//! ram.pages(&mut writer, 0, 3 << 20, &[7; 8192])?;
//! ram.pages(&mut writer, 0, 0, &[0; 4096])?; // stays a hole
//! ram.finish(&mut writer)?;
//! let file = writer.finish_file()?.into_inner();
//!
//! let mut reader = MappedReader::open(file.as_slice(), Expected::new(blocks))?;
//! while !matches!(reader.next_event()?, Event::End) {}
//! let ram = reader.into_ram()?; // the bitmaps agree
//! assert!(ram.extents(0).eq([3 << 20..(3 << 20) + 8192]));
//!
//! let mut chunk = vec![0; CHUNK_BYTES as usize];
//! ram.read_chunk(0, 3, &mut chunk)?; // its pages agree
//! assert_eq!((chunk[0], chunk[8191], chunk[8192]), (7, 7, 0));
//! # Ok::<(), stream::Error>(())
//! ```
//!
//! # Invariants
//!
//! - Every length is compared with a maximum before anything is allocated for it. No bytes make the reader panic or loop, or hold more
//!   than 1 MiB and 16 times what it was given: `tests/memory.rs` counts it.
//! - Every bit of a file is covered: a stream that was changed anywhere is refused (the holes of a mapped file are not read).
//! - The reader never asks for more bytes than the stream still has, so on a connection it does not wait for what nobody sends: what a
//!   section is known to lack is the least that its type allows. (One that would take more memory than its bytes allow may be that of a
//!   longer section; it is refused when the bytes are there that decide, or the input ends.)
//! - A stream that ends early, misses a section, has one twice or one too many, or whose digests differ, is refused and the error
//!   says which section or which MiB of which block.
//!
//! # Absent
//!
//! - No I/O policy (buffering of the output, bandwidth, timeouts), no devices, no knowledge of what a section means.
//! - Sections that come in parts are read only if they are RAM. Nothing on the wire says how long the parts of others are, so they are
//!   refused by name; files do not have them.
//! - RAM records with compressed pages or differences of pages (XBZRLE) are refused by name.
//! - Commands and the return path are a codec: nobody here answers a ping or runs a postcopy.
//! - A section without a length is measured again when as much of it has come as it was known to lack. What is known grows with what
//!   has come, so the bytes of a large section, fed one by one, are looked at some hundred times, not once for each of its elements.
//!   Lists carry no length: each element of one is another look.

#![forbid(unsafe_code)]

mod canonical;
mod command;
mod configuration;
mod decoder;
pub mod described;
pub mod description;
mod digest;
mod error;
mod expected;
pub mod frame;
mod mapped;
mod mapped_reader;
mod mapped_writer;
mod page_map;
mod parser;
mod ram;
mod reader;
pub mod return_path;
mod schemas;
mod section;
mod trailer;
mod wire;
mod writer;

#[cfg(test)]
mod tests;

pub use command::{Command, PackagePart, PageSizes};
pub use configuration::Configuration;
pub use decoder::{Decoder, Event};
pub use description::Description;
pub use digest::CHUNK_BYTES;
pub use error::Error;
pub use expected::Expected;
pub use mapped::MappedBlock;
pub use mapped_reader::{MappedRam, MappedReader, ReadAt};
pub use mapped_writer::MappedRamWriter;
pub use ram::{PAGE_BYTES, RamBlock};
pub use reader::StreamReader;
pub use schemas::schemas;
pub use section::{DeviceSection, SectionSet};
pub use trailer::find as find_trailer;
pub use writer::{RamRound, RamWriter, StreamWriter};
