//! How much memory hostile bytes can take: at most 1 MiB and 16 times the input, counted by the allocator.
//!
//! Guest RAM is not counted, and the reader holds none of it.

#![allow(clippy::unwrap_used)] // tests, their helpers among them

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io::Cursor;

use stream::frame::{self, Kind};
use stream::return_path::ReturnPath;
use stream::{
    Configuration, Decoder, Description, DeviceSection, Event, Expected, MappedReader, RamBlock,
    StreamReader, StreamWriter, find_trailer,
};
use vmstate::{Bitmap, Slots, VmState};

/// Counts what this thread holds.
struct Counting;

thread_local! {
    /// Bytes now, and the most there were.
    static HELD: Cell<(usize, usize)> = const { Cell::new((0, 0)) };
}

fn count(taken: usize, given: usize) {
    // A thread that ends frees memory after its counter is gone.
    let _uncounted = HELD.try_with(|held| {
        let (now, most) = held.get();
        let now = (now + taken).saturating_sub(given);
        held.set((now, most.max(now)));
    });
}

// SAFETY: every call goes to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: as the caller promised us.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size(), 0);
        // SAFETY: as the caller promised us.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(0, layout.size());
        // SAFETY: as the caller promised us.
        unsafe { System.dealloc(pointer, layout) }
    }

    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Both exist while one is copied to the other.
        count(size, 0);
        count(0, layout.size());
        // SAFETY: as the caller promised us.
        unsafe { System.realloc(pointer, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const MIB: usize = 1 << 20;
/// A trailer.
const NO_DEVICES: &[u8] = br#"{"devices":[]}"#;

/// Runs `work` on `input`, which it must not copy first, and holds what it takes against the bound.
fn bounded<T>(what: &str, input: &[u8], work: impl FnOnce(&[u8]) -> T) -> T {
    let before = HELD.with(|held| {
        let (now, _) = held.get();
        held.set((now, now));
        now
    });
    let result = work(input);
    let most = HELD.with(Cell::get).1 - before;
    println!("measured: {what}: {most} bytes at most for {} bytes of input", input.len());
    assert!(most <= MIB + 16 * input.len(), "{what}: {most} bytes for {} bytes of input", input.len());
    result
}

#[derive(VmState)]
#[vmstate(name = "device")]
struct Device {
    slot_count: u32,
    #[vmstate(len = "slot_count", max = 1 << 24)]
    slots: Slots<Queue>,
    bit_count: u32,
    #[vmstate(len = "bit_count", max = 1 << 28)]
    bits: Bitmap,
    byte_count: u32,
    #[vmstate(len = "byte_count", max = 1 << 28)]
    bytes: Vec<u8>,
    #[vmstate(list, max = 1 << 20)]
    list: Vec<u64>,
    #[vmstate(list, max = 1 << 20)]
    texts: Vec<Text>,
}

/// Takes much more memory than bytes.
#[derive(VmState, Clone)]
#[vmstate(name = "text")]
struct Text {
    byte_count: u8,
    #[vmstate(len = "byte_count", max = 255)]
    bytes: Vec<u8>,
}

#[derive(VmState)]
#[vmstate(name = "queue")]
struct Queue {
    base: u64,
    size: u32,
}

/// Far more than any input here.
const RAM_BYTES: u64 = 1 << 40;

fn blocks() -> Vec<RamBlock> {
    vec![RamBlock::new("ram", RAM_BYTES)]
}

fn expected() -> Expected {
    Expected::new(blocks()).section::<Device>("device", 0)
}

fn read(input: &[u8], expected: Expected, is_file: bool) -> Result<(), stream::Error> {
    let mut reader = match is_file {
        true => StreamReader::file(input, expected),
        false => StreamReader::live(input, expected),
    };
    while !matches!(reader.next_event()?, Event::End) {}
    Ok(())
}

/// Header, configuration and the list of RAM blocks.
fn started() -> StreamWriter<Vec<u8>> {
    let mut writer = StreamWriter::new(Vec::new(), &Configuration::new("model")).unwrap();
    writer.start_ram(&blocks()).unwrap();
    writer
}

fn device(count: usize) -> Device {
    let slots = (0..count).map(|slot| (slot % 3 == 0).then_some(Queue { base: 1, size: 2 })).collect();
    let (bits, bytes, list) = (Bitmap::new(count), vec![3; count], (0..count as u64).collect());
    let texts = vec![Text { byte_count: 0, bytes: vec![7; 30] }; count / 10];
    Device { slot_count: 0, slots, bit_count: 0, bits, byte_count: 0, bytes, list, texts }
}

fn whole(count: usize) -> Vec<u8> {
    let mut writer = StreamWriter::new(Vec::new(), &Configuration::new("model")).unwrap();
    let mut ram = writer.start_ram(&blocks()).unwrap();
    let mut round = ram.last_round(&mut writer).unwrap();
    for chunk in 0..count as u64 {
        round.zeros(0, chunk << 20, 4096).unwrap(); // a digest each
    }
    round.finish().unwrap();
    writer.device(&DeviceSection::save("device", 0, &device(count))).unwrap();
    writer.finish_file().unwrap()
}

/// A section of the device, up to where its payload goes on.
fn section(payload: &[u8]) -> Vec<u8> {
    let mut writer = started();
    let mut bytes = std::mem::take(writer.get_mut());
    bytes.extend(b"\x04\0\0\0\x02\x06device\0\0\0\0\0\0\0\x01");
    bytes.extend(payload);
    bytes
}

#[test]
fn valid_streams_take_little() {
    for count in [10, 1000, 20_000] {
        let file = whole(count);
        bounded("a file", &file, |file| read(file, expected(), true)).unwrap();
        bounded("a file in pieces", &file, |file| {
            let mut decoder = Decoder::file(expected());
            for piece in file.chunks(1000) {
                decoder.feed(piece);
                while decoder.next_event().unwrap().is_some() {}
            }
        });
    }
}

#[test]
fn announced_counts_take_nothing() {
    let count = |bytes: u32| bytes.to_be_bytes().to_vec();
    let texts = |number: usize| [[0; 13].as_slice(), &[1, 0].repeat(number)].concat();
    let mut lists = vec![0; 12];
    lists.extend((0..100_000).flat_map(|_| [1, 0, 0, 0, 0, 0, 0, 0, 0]));
    for (what, payload) in [
        ("slots", count(1 << 24)),
        ("some slots", [count(1 << 24), vec![b'0'; 200_000]].concat()),
        ("bits", [count(0), count(1 << 28)].concat()),
        ("bytes", [count(0), count(0), count(1 << 28)].concat()),
        ("a list", lists),
        ("slots and slots", [count(400_000), [b'1'; 13].repeat(400_000)].concat()),
        ("empty slots", [count(1 << 20), vec![b'0'; 1 << 20]].concat()),
        ("empty texts", texts(100_000)),
        ("many empty texts", texts(900_000)),
    ] {
        let input = section(&payload);
        bounded(what, &input, |input| read(input, expected(), false)).unwrap_err();
    }
}

#[test]
fn announced_ram_takes_nothing() {
    let any = || Expected::from_trailer(&Description::parse(NO_DEVICES).unwrap(), u64::MAX).unwrap();
    for length in [4096_u64, 1 << 30, 1 << 40, 1 << 42] {
        let mut bytes = b"QEVM\0\0\0\x03\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04".to_vec();
        bytes.extend((length | 4).to_be_bytes());
        bytes.extend(
            [b"\x03ram".as_slice(), &length.to_be_bytes(), &16_u64.to_be_bytes(), b"\x7e\0\0\0\x01"].concat(),
        );
        bytes.extend(b"\x03\0\0\0\x01");
        for page in 0..20_000_u64 {
            let word = ((page << 20) % length) | 2;
            bytes.extend([word.to_be_bytes().as_slice(), b"\x03ram\0"].concat());
        }
        bounded("records all over RAM", &bytes, |bytes| read(bytes, any(), false)).unwrap_err();
    }
}

#[test]
fn trailers_of_nothing_but_structure_take_little() {
    // A stream without a digest of its trailer, so that nothing is refused before the trailer is read.
    let blocks = vec![RamBlock::new("ram", 4096)];
    let mut writer = StreamWriter::new(Vec::new(), &Configuration::new("model")).unwrap();
    let mut ram = writer.start_ram(&blocks).unwrap();
    ram.last_round(&mut writer).unwrap().finish().unwrap();
    let mut file = writer.finish_live().unwrap();
    file.push(6);
    for (what, element) in [
        ("arrays", "[],"),
        ("numbers", "0,"),
        ("objects", r#"{"":0},"#),
        ("devices", r#"{"fields":[],"instance_id":0,"name":"","version":0,"vmsd_name":""},"#),
        ("fields", r#"{"name":"","size":0,"type":""},"#),
    ] {
        let elements = element.repeat(100_000);
        let elements = elements.trim_end_matches(',');
        let text = match what {
            "fields" => format!(
                r#"{{"configuration":{{"fields":[{elements}],"version":1,"vmsd_name":""}},"devices":[],"page_size":4096}}"#
            ),
            _ => format!(
                r#"{{"configuration":{{"fields":[],"version":1,"vmsd_name":""}},"devices":[{elements}],"page_size":4096}}"#
            ),
        };
        let trailer = [&(text.len() as u32).to_be_bytes(), text.as_bytes()].concat();
        let bytes = [file.as_slice(), &trailer].concat();
        let error =
            bounded(what, &bytes, |bytes| read(bytes, Expected::new(blocks.clone()), true)).unwrap_err();
        assert!(error.to_string().starts_with("the trailer is not a description"), "{error}");
        // A file whose trailer says that there is nothing.
        let foreign = [b"QEVM\0\0\0\x03\0\x06".as_slice(), &trailer].concat();
        let nothing = Expected::from_trailer(&Description::parse(NO_DEVICES).unwrap(), 0).unwrap();
        bounded(what, &foreign, |bytes| read(bytes, nothing, true)).unwrap();
        // For tools it is kept, and believed.
        bounded(what, &foreign, |bytes| {
            let trailer = find_trailer(bytes).unwrap().unwrap();
            let expected = Expected::from_trailer(&trailer, 0);
            assert_eq!(expected.is_ok(), ["devices", "fields"].contains(&what), "{what}");
        });
    }
}

#[test]
fn descriptions_take_little_more_than_their_text() {
    for element in
        ["[]", "0", "{}", r#"{"":0}"#, r#""""#, r#""\u0001""#, "-1", "1.5", "null", r#"",,,,,,,,""#, "[[0]]"]
    {
        let text = format!("[{}]", vec![element; 200_000].join(","));
        let description = bounded(element, text.as_bytes(), Description::parse).unwrap();
        drop(bounded(element, text.as_bytes(), |_| description.into_trailer()));
        // Neither does what is refused at its end.
        bounded(element, &text.as_bytes()[..text.len() - 1], Description::parse).unwrap_err();
    }
}

#[test]
fn commands_and_sections_take_little() {
    let mut pings = started();
    (0..50_000).for_each(|value| pings.command(&stream::Command::Ping { value }).unwrap());
    let pings = std::mem::take(pings.get_mut());
    bounded("pings", &pings, |bytes| read(bytes, expected(), false)).unwrap_err();

    let mut sections = b"QEVM\0\0\0\x03".to_vec();
    let mut devices = Vec::new();
    for id in 0..4000_u32 {
        sections
            .extend([b"\x04".as_slice(), &id.to_be_bytes(), b"\x01x", &id.to_be_bytes(), &[0; 4]].concat());
        sections.extend([b"\x7e".as_slice(), &id.to_be_bytes()].concat());
        devices.push(serde_json::json!({ "name": "x", "instance_id": id, "fields": [] }));
    }
    let trailer = serde_json::json!({ "devices": devices }).to_string();
    let expected = Expected::from_trailer(&Description::parse(trailer.as_bytes()).unwrap(), 0).unwrap();
    bounded("empty sections", &sections, |bytes| read(bytes, expected, false)).unwrap_err();
}

#[test]
fn frames_and_messages_take_their_bodies() {
    let mut frames = Vec::new();
    frame::write(&mut frames, Kind::Stream, 0, &[7; 300_000]).unwrap();
    frame::write(&mut frames, Kind::Stream, 0, &vec![7; 1 << 20]).unwrap();
    bounded("frames", &frames, |mut bytes| {
        let mut body = Vec::new();
        while !bytes.is_empty() {
            frame::read(&mut bytes, &mut body).unwrap();
        }
    });
    bounded("the header of a frame", b"\0\x04\0\0\0\x10\0\0", |mut bytes| {
        frame::read(&mut bytes, &mut Vec::new()).unwrap_err();
    });
    let mut path = ReturnPath::new(blocks());
    let bitmap = b"\0\x05\0\x04\x03ram\0\0\0\0\x02\0\0\0";
    assert_eq!(bounded("the head of a bitmap", bitmap, |bytes| path.decode(bytes)).unwrap(), None);
}

#[test]
fn mapped_files_take_what_is_asked_for() {
    let blocks = vec![RamBlock::new("ram", 40 << 20)];
    let mut writer = StreamWriter::new(Cursor::new(Vec::new()), &Configuration::mapped("model")).unwrap();
    let mut ram = writer.start_mapped_ram(&blocks).unwrap();
    ram.pages(&mut writer, 0, 39 << 20, &[1; 4096]).unwrap();
    ram.finish(&mut writer).unwrap();
    let mut file = writer.finish_file().unwrap().into_inner();
    // Next to nothing of the file is held: not even what lies in it.
    let read = |file: &[u8]| -> Result<(), stream::Error> {
        let mut reader = MappedReader::open(file, Expected::new(blocks.clone()))?;
        while !matches!(reader.next_event()?, Event::End) {}
        reader.into_ram()?.verify()
    };
    let most = |file: &[u8]| {
        let before = HELD.with(|held| held.replace((held.get().0, held.get().0)).0);
        let result = read(file);
        (HELD.with(Cell::get).1 - before, result)
    };
    let (bytes, result) = most(&file);
    result.unwrap();
    assert!(bytes < 2 * MIB, "{bytes} bytes of a mapped file of {} bytes", file.len());
    file.truncate(2 * MIB);
    let (bytes, result) = most(&file);
    result.unwrap_err();
    assert!(bytes < MIB, "{bytes} bytes of a cut file");
}

#[test]
fn counter_sees_what_is_held() {
    let took = std::panic::catch_unwind(|| bounded("too much", &[0; 16], |_| vec![0_u8; 2 * MIB]));
    assert!(took.is_err(), "2 MiB for 16 bytes");
    assert!(find_trailer(&[]).unwrap().is_none());
}
