//! Streams, frames, the return path and trailers.

use std::io;

use stream::frame::{self, HEADER_BYTES, Header};
use stream::return_path::{Message, ReturnPath};
use stream::{
    Configuration, DeviceSection, Error, Event, Expected, PAGE_BYTES, RamBlock, SectionSet, StreamReader,
    StreamWriter, find_trailer,
};
use vmstate::{Bitmap, Slots, VmState};

/// A device of the model machine.
#[derive(VmState, Debug, PartialEq)]
#[vmstate(name = "device")]
pub struct Device {
    enabled: bool,
    slot_count: u16,
    #[vmstate(len = "slot_count", max = 64)]
    slots: Slots<Queue>,
    #[vmstate(list, max = 8)]
    timers: Vec<i64>,
    bit_count: u16,
    #[vmstate(len = "bit_count", max = 256)]
    bits: Bitmap,
    #[vmstate(subsection)]
    extra: Option<Extra>,
}

/// What its slots hold.
#[derive(VmState, Debug, PartialEq)]
#[vmstate(name = "queue")]
pub struct Queue {
    base: u64,
    #[vmstate(max = 65536)]
    size: u32,
}

/// A part of it.
#[derive(VmState, Debug, PartialEq)]
#[vmstate(name = "device/extra")]
pub struct Extra {
    bytes: [u8; 16],
}

/// The memory of the model machine.
#[must_use]
pub fn blocks() -> Vec<RamBlock> {
    vec![RamBlock::new("low", 48 << 10), RamBlock::new("high", 16 << 10)]
}

/// The model machine.
#[must_use]
pub fn expected() -> Expected {
    Expected::new(blocks()).section::<Device>("device", 0).section::<Device>("device", 1)
}

/// A file of the model machine.
pub fn file(bytes: &[u8]) {
    let _refused = read(StreamReader::file(bytes, expected()), bytes);
}

/// A live stream of the model machine.
pub fn live(bytes: &[u8]) {
    let _refused = read(StreamReader::live(bytes, expected()), bytes);
}

/// A file of whoever wrote it.
pub fn foreign(bytes: &[u8]) {
    let Ok(Some(trailer)) = find_trailer(bytes) else { return };
    let Ok(expected) = Expected::from_trailer(&trailer, 1 << 20) else { return };
    let mut reader = StreamReader::file(bytes, expected);
    for _step in 0..=bytes.len() {
        match reader.next_event() {
            Ok(Event::End) | Err(_) => return,
            Ok(_) => {}
        }
    }
    panic!("more events than bytes");
}

/// Reads all; what was loaded must be saved as it was.
fn read(mut reader: StreamReader<&[u8]>, bytes: &[u8]) -> Result<(), Error> {
    let mut sections = SectionSet::default();
    let mut pages = 0;
    for _step in 0..=bytes.len() {
        match reader.next_event()? {
            Event::Device(section) => {
                let state: Device = section.load()?;
                assert_eq!(vmstate::to_bytes(&state), section.payload, "saved as it was loaded");
                sections.insert(section)?;
            }
            Event::RamPage { block, offset, bytes } => {
                let block = &blocks()[block];
                assert!(offset + bytes.len() as u64 <= block.length_bytes && bytes.len() == PAGE_BYTES);
                pages += 1;
            }
            Event::RamZero { block, offset } => {
                assert!(offset < blocks()[block].length_bytes && offset.is_multiple_of(PAGE_BYTES as u64));
            }
            Event::End => {
                sections.take::<Device>("device", 0)?;
                sections.take::<Device>("device", 1)?;
                assert!(pages * PAGE_BYTES <= bytes.len());
                return sections.finish();
            }
            _ => {}
        }
    }
    panic!("more events than bytes");
}

/// Frames of a connection, one after the other.
pub fn frames(bytes: &[u8]) {
    let _peer = bytes.first_chunk().map(|first| frame::decode_preamble(*first));
    let (mut rest, mut body) = (bytes, Vec::new());
    loop {
        let Some(head) = rest.first_chunk::<HEADER_BYTES>() else { return };
        let decoded = Header::decode(*head);
        let mut input = rest;
        match (frame::read(&mut input, &mut body), decoded) {
            (Ok(header), Ok(decoded)) => {
                assert_eq!(header, decoded);
                let mut again = Vec::new();
                frame::write(&mut again, header.kind, header.flags, &body).expect("it was read");
                assert_eq!(again, rest[..again.len()]);
                rest = input;
            }
            (Err(Error::Read { source, .. }), _) if source.kind() == io::ErrorKind::UnexpectedEof => return,
            (Err(_), Err(_)) => return,
            (read, decoded) => panic!("{read:?} but {decoded:?}"),
        }
    }
}

/// Messages of the return path, one after the other.
pub fn return_path(bytes: &[u8]) {
    let (mut path, mut same) = (ReturnPath::new(blocks()), ReturnPath::new(blocks()));
    let mut rest = bytes;
    while let Ok(Some((message, length))) = path.decode(rest) {
        // A request may name the block of the last one again, which we do not.
        let mut again = Vec::new();
        same.encode(&message, &mut again).expect("it was read");
        let mut reader = path.clone();
        assert_eq!(reader.decode(&again).expect("it was written"), Some((message.clone(), again.len())));
        assert!(again == rest[..length] || matches!(message, Message::RequestPages { .. }));
        rest = &rest[length..];
    }
}

/// The trailer of a file, or what may stand in its place.
pub fn trailer(bytes: &[u8]) {
    if let Ok(Some(trailer)) = find_trailer(bytes) {
        let _refused = Expected::from_trailer(&trailer, 1 << 20);
    }
}

/// A stream of the model machine, from its start on; `enabled` makes two of them differ.
pub(crate) fn model(enabled: bool) -> Result<StreamWriter<Vec<u8>>, Error> {
    let mut writer = StreamWriter::new(Vec::new(), &Configuration::new("model"))?;
    let mut ram = writer.start_ram(&blocks())?;
    let mut round = ram.round(&mut writer)?;
    round.pages(0, 0, &[0x5a; PAGE_BYTES])?;
    round.zeros(1, 0, 16 << 10)?;
    round.finish()?;
    let mut round = ram.last_round(&mut writer)?;
    round.zeros(0, 0, 8192)?;
    round.finish()?;
    devices(&mut writer, enabled)?;
    Ok(writer)
}

/// The devices of the model machine.
pub(crate) fn devices<W: io::Write>(writer: &mut StreamWriter<W>, enabled: bool) -> Result<(), Error> {
    for instance_id in 0..2 {
        writer.device(&DeviceSection::save("device", instance_id, &device(instance_id, enabled)))?;
    }
    Ok(())
}

/// One of them.
pub(crate) fn device(instance_id: u32, enabled: bool) -> Device {
    let slots = (0..4).map(|slot| (slot == 2).then_some(Queue { base: 0x1000, size: 64 })).collect();
    let extra = enabled.then_some(Extra { bytes: [7; 16] });
    let (timers, bits) = (vec![-1; instance_id as usize], Bitmap::new(70));
    Device { enabled, slot_count: 0, slots, timers, bit_count: 0, bits, extra }
}
