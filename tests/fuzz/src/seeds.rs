//! Valid inputs, always the same.

use std::collections::BTreeMap;
use std::io::Cursor;

use stream::frame::{self, Kind};
use stream::return_path::{Message, ReturnPath};
use stream::{Command, Configuration, Error, PAGE_BYTES, PackagePart, StreamWriter};
use vmstate::{Bitmap, FieldSchema, Schema, VmState};

use crate::mapped::Sparse;
use crate::mutate::Random;
use crate::streams;

/// Seeds are made by our own writers, which refuse nothing here.
const WRITTEN: &str = "our own writer can write it";

/// Files of the model machine.
#[must_use]
pub fn files() -> Vec<Vec<u8>> {
    let file = |enabled| streams::model(enabled).and_then(StreamWriter::finish_file).expect(WRITTEN);
    vec![file(false), file(true)]
}

/// Live streams of the model machine, one with commands.
#[must_use]
pub fn lives() -> Vec<Vec<u8>> {
    let live = |enabled| streams::model(enabled).and_then(StreamWriter::finish_live).expect(WRITTEN);
    vec![live(false), live(true), commands().expect(WRITTEN)]
}

fn commands() -> Result<Vec<u8>, Error> {
    let mut writer = StreamWriter::new(Vec::new(), &Configuration::new("model"))?;
    let mut ram = writer.start_ram(&streams::blocks())?;
    for command in [
        Command::OpenReturnPath,
        Command::Ping { value: 1 },
        Command::PostcopyAdvise { pages: None },
        Command::RamDiscard { block: "low".into(), ranges: std::iter::once(4096..8192).collect() },
        Command::ReceivedBitmap { block: "high".into() },
    ] {
        writer.command(&command)?;
    }
    writer.package(&[
        PackagePart::Command(&Command::PostcopyListen),
        PackagePart::Command(&Command::PostcopyRun),
    ])?;
    ram.last_round(&mut writer)?.finish()?;
    streams::devices(&mut writer, true)?;
    writer.command(&Command::SwitchoverStart)?;
    writer.finish_live()
}

/// Connections.
#[must_use]
pub fn frames() -> Vec<Vec<u8>> {
    let mut link = Vec::new();
    for (index, kind) in Kind::ALL.iter().enumerate() {
        frame::write(&mut link, *kind, 0, &vec![index as u8; index * 3]).expect(WRITTEN);
    }
    vec![link, frame::encode_preamble().to_vec(), frame::encode_preamble().repeat(2)]
}

/// Return paths.
#[must_use]
pub fn return_paths() -> Vec<Vec<u8>> {
    let (mut path, mut bytes, mut pages) = (ReturnPath::new(streams::blocks()), Vec::new(), Bitmap::new(4));
    pages.set(2, true);
    for message in [
        Message::Pong { value: 1 },
        Message::RequestPages { block: 0, offset: 4096, length_bytes: 8192 },
        Message::RequestPages { block: 0, offset: 0, length_bytes: 4096 },
        Message::RequestPages { block: 1, offset: 0, length_bytes: 4096 },
        Message::ReceivedBitmap { block: 1, pages },
        Message::ResumeAck,
        Message::SwitchoverAck,
        Message::Shut { error: 0 },
    ] {
        path.encode(&message, &mut bytes).expect(WRITTEN);
    }
    vec![bytes]
}

/// Mapped files of the model machine.
#[must_use]
pub fn mapped() -> Vec<Vec<u8>> {
    let blocks = crate::mapped::blocks();
    let file = |enabled| -> Result<Vec<u8>, Error> {
        let mut writer = StreamWriter::new(Cursor::new(Vec::new()), &Configuration::mapped("model"))?;
        let mut ram = writer.start_mapped_ram(&blocks)?;
        if enabled {
            ram.pages(
                &mut writer,
                0,
                stream::CHUNK_BYTES + 4096,
                &[[1_u8; 16], [0; 16]].concat().repeat(PAGE_BYTES / 32),
            )?;
            ram.pages(&mut writer, 1, 0, &[1; PAGE_BYTES])?;
        }
        ram.finish(&mut writer)?;
        streams::devices(&mut writer, enabled)?;
        Ok(writer.finish_file()?.into_inner())
    };
    [false, true].map(|enabled| Sparse::list(&file(enabled).expect(WRITTEN))).to_vec()
}

/// Trailers alone: what a tool sees that reads the end of a file.
#[must_use]
pub fn trailers() -> Vec<Vec<u8>> {
    let trailer = |file: &Vec<u8>| {
        let nul = file.iter().rposition(|byte| *byte == 0).unwrap_or_default();
        file.get(nul.saturating_sub(4)..).unwrap_or_default().to_vec()
    };
    files().iter().map(trailer).collect()
}

/// Bytes of a state that follow from its schema: every count has its elements, numbers are within their bounds. A check that the
/// schema does not tell may still refuse them.
#[must_use]
pub fn state<T: VmState>(random: &mut Random) -> Vec<u8> {
    let mut out = Vec::new();
    structure(&vmstate::schema::<T>(), random, &mut out);
    out
}

fn structure(schema: &Schema, random: &mut Random, out: &mut Vec<u8>) {
    let is_there = |field: &&FieldSchema| {
        field.since.is_none_or(|since| since <= schema.version)
            && field.until.is_none_or(|until| schema.version <= until)
    };
    let mut counts = BTreeMap::new();
    for field in schema.fields.iter().filter(is_there) {
        if let Some(name) = field.count {
            let wanted = random.below(5).min(usize::try_from(field.max.unwrap_or(4)).unwrap_or(4));
            let count = counts.entry(name).or_insert(wanted);
            *count = wanted.min(*count);
        }
    }
    for field in schema.fields.iter().filter(is_there) {
        match (counts.get(field.name), field.count.and_then(|name| counts.get(name))) {
            (Some(count), _) => number(*count as u64, field.size, out),
            (_, Some(count)) => elements(field, *count, random, out),
            _ => elements(field, field.array_len.unwrap_or(1) as usize, random, out),
        }
    }
    for part in &schema.subsections {
        if random.below(2) == 0 {
            out.extend([5, part.name.len() as u8]);
            out.extend(part.name.as_bytes());
            out.extend(part.version.to_be_bytes());
            structure(part, random, out);
        }
    }
}

fn elements(field: &FieldSchema, count: usize, random: &mut Random, out: &mut Vec<u8>) {
    if field.kind == "bitmap" {
        let words = count.div_ceil(64);
        out.extend(vec![0; words * 8]);
        return;
    }
    if field.kind == "list-marker" {
        // Of a list of plain values the schema does not tell the size; an empty one is valid.
        if let Some(inner) = &field.structure {
            for _ in 0..random.below(3) {
                out.push(1);
                structure(inner, random, out);
            }
        }
        out.push(0);
        return;
    }
    let inner = field.count.and(field.array_len).unwrap_or(1) as usize; // arrays of arrays
    for _ in 0..count * inner {
        match (field.kind, &field.structure) {
            ("ptr-marker", Some(inner)) if random.below(2) == 0 => {
                out.push(b'1');
                structure(inner, random, out);
            }
            ("ptr-marker", _) => out.push(b'0'),
            (_, Some(inner)) => structure(inner, random, out),
            ("bool", _) => out.push(random.below(2) as u8),
            _ => {
                let minimum = field.min.and_then(|min| u64::try_from(min).ok()).unwrap_or_default();
                let maximum = field.max.and_then(|max| u64::try_from(max).ok()).unwrap_or(u64::MAX);
                let value = match random.below(3) {
                    0 => minimum,
                    1 => minimum.saturating_add(random.below(16) as u64),
                    _ => random.number(),
                };
                number(value.clamp(minimum, maximum), field.size, out);
            }
        }
    }
}

/// The last bytes of a number.
fn number(value: u64, size: Option<u64>, out: &mut Vec<u8>) {
    let bytes = value.to_be_bytes();
    let size = usize::try_from(size.unwrap_or(8)).unwrap_or(8).min(8);
    out.extend(&bytes[8 - size..]);
}
