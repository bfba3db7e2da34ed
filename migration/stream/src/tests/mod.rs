//! Whole streams: written, read, cut off, damaged, and one of QEMU's.

use std::error::Error as _;
use std::io::Read;
use std::path::Path;

use proptest::prelude::*;
use vmstate::{Slots, VmState};

use crate::*;

mod commands;
mod hostile;
mod mapped;
mod return_path;

#[derive(VmState, Debug, Clone, PartialEq)]
#[vmstate(name = "controller")]
struct Controller {
    enabled: bool,
    sq_count: u16,
    #[vmstate(len = "sq_count", max = 16)]
    sq: Slots<Queue>,
    #[vmstate(subsection)]
    doorbells: Option<Doorbells>,
}

#[derive(VmState, Debug, Clone, PartialEq)]
#[vmstate(name = "queue")]
struct Queue {
    base: u64,
    #[vmstate(max = 65536)]
    size: u32,
}

#[derive(VmState, Debug, Clone, PartialEq)]
#[vmstate(name = "controller/doorbells")]
struct Doorbells {
    address: u64,
}

#[derive(VmState, Debug, Clone, PartialEq)]
#[vmstate(name = "clock", version = 2)]
struct Clock {
    nanoseconds: u64,
}

fn controller() -> Controller {
    let mut sq = Slots::empty(5);
    sq.put(0, Queue { base: 0x1000, size: 32 });
    sq.put(3, Queue { base: 0x2000, size: 1024 });
    Controller { enabled: true, sq_count: 5, sq, doorbells: Some(Doorbells { address: 0x3000 }) }
}

const BLOCKS: [(&str, u64); 2] = [("ram", 3 << 20), ("rom", 8192)];

fn blocks() -> Vec<RamBlock> {
    BLOCKS.iter().map(|(name, length)| RamBlock::new(*name, *length)).collect()
}

fn expected() -> Expected {
    Expected::new(blocks()).section::<Controller>("0000:00:04.0/nvme", 0).section::<Clock>("clock", 1)
}

/// Everything but the end: two rounds of RAM and two devices.
fn started() -> StreamWriter<Vec<u8>> {
    let mut writer = StreamWriter::new(Vec::new(), &Configuration::new("ferry-1")).unwrap();
    let mut ram = writer.start_ram(&blocks()).unwrap();
    let mut round = ram.round(&mut writer).unwrap();
    round.pages(0, 0, &[0x11; 2 * PAGE_BYTES]).unwrap();
    round.zeros(1, 0, 8192).unwrap();
    round.finish().unwrap();
    let mut round = ram.last_round(&mut writer).unwrap();
    round.pages(0, (2 << 20) + 4096, &[0x22; PAGE_BYTES]).unwrap();
    round.pages(0, 0, &[0x33; PAGE_BYTES]).unwrap();
    round.finish().unwrap();
    writer.device(&DeviceSection::save("0000:00:04.0/nvme", 0, &controller())).unwrap();
    writer.device(&DeviceSection::save("clock", 1, &Clock { nanoseconds: 99 })).unwrap();
    writer
}

/// What a destination would have after reading.
#[derive(Debug, Default, PartialEq)]
struct Loaded {
    machine: String,
    ram: Vec<(usize, u64, u8)>,
    rounds: Vec<bool>,
    states: Option<(Controller, Clock)>,
    trailer: bool,
}

fn load(
    mut next: impl FnMut(&mut dyn FnMut(Event<'_>) -> Result<bool, Error>) -> Result<bool, Error>,
) -> Result<Loaded, Error> {
    let (mut loaded, mut sections) = (Loaded::default(), SectionSet::default());
    let mut take = |event: Event<'_>| {
        match event {
            Event::Configuration(configuration) => loaded.machine = configuration.machine,
            Event::RamBlocks(blocks) => assert_eq!(blocks, self::blocks()),
            Event::RamPage { block, offset, bytes } => {
                assert_eq!(bytes.len(), PAGE_BYTES);
                loaded.ram.push((block, offset, bytes[4095]));
            }
            Event::RamZero { block, offset } => loaded.ram.push((block, offset, 0)),
            Event::RamRound { last } => loaded.rounds.push(last),
            Event::Device(section) => sections.insert(section)?,
            Event::Trailer(_) => loaded.trailer = true,
            Event::Command(_) => {}
            Event::End => return Ok(false),
        }
        Ok(true)
    };
    while next(&mut take)? {}
    loaded.states = Some((sections.take("0000:00:04.0/nvme", 0)?, sections.take("clock", 1)?));
    sections.finish()?;
    Ok(loaded)
}

fn load_file(bytes: &[u8]) -> Result<Loaded, Error> {
    let mut reader = StreamReader::file(bytes, expected());
    load(|take| take(reader.next_event()?))
}

/// Loads a file without RAM.
fn load_devices(bytes: &[u8]) -> Result<Loaded, Error> {
    let expected =
        Expected::new(vec![]).section::<Controller>("0000:00:04.0/nvme", 0).section::<Clock>("clock", 1);
    let mut reader = StreamReader::file(bytes, expected);
    load(|take| take(reader.next_event()?))
}

fn everything(trailer: bool) -> Loaded {
    Loaded {
        machine: "ferry-1".into(),
        ram: vec![(0, 0, 0x11), (0, 4096, 0x11), (1, 0, 0), (1, 4096, 0), (0, 0x20_1000, 0x22), (0, 0, 0x33)],
        rounds: vec![false, true],
        states: Some((controller(), Clock { nanoseconds: 99 })),
        trailer,
    }
}

#[test]
fn file_gives_back_what_was_written() {
    assert_eq!(load_file(&started().finish_file().unwrap()).unwrap(), everything(true));
}

#[test]
fn first_bytes_are_as_the_format_says() {
    let bytes = started().finish_file().unwrap();
    let mut start = b"QEVM\0\0\0\x03\x07\0\0\0\x07ferry-1".to_vec();
    start.extend(b"\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04");
    start.extend(b"\0\0\0\0\0\x30\x20\x04\x03ram\0\0\0\0\0\x30\0\0\x03rom\0\0\0\0\0\0\x20\0\0\0\0\0\0\0\0\x10\x7e\0\0\0\x01");
    start.extend(b"\x02\0\0\0\x01\0\0\0\0\0\0\0\x08\x03ram\x11\x11");
    assert_eq!(bytes[..start.len()], start);
    // The second page continues the block, the first zero page names another one.
    let second = start.len() + 4094;
    assert_eq!(bytes[second..second + 9], *b"\0\0\0\0\0\0\x10\x28\x11");
    assert_eq!(bytes[second + 8 + 4096..][..13], *b"\0\0\0\0\0\0\0\x02\x03rom\0");
}

#[test]
fn live_stream_ends_with_its_last_byte_in_pieces_of_any_size() {
    let sent = started();
    let digest = sent.digest();
    let bytes = sent.finish_live().unwrap();
    for piece in [1, 7, 4096, bytes.len()] {
        let mut decoder = Decoder::live(expected());
        let mut pieces = bytes.chunks(piece);
        let loaded = load(|take| {
            loop {
                if let Some(event) = decoder.next_event()? {
                    return take(event);
                }
                decoder.feed(pieces.next().expect("the decoder asks for no byte after the last"));
            }
        });
        assert_eq!(loaded.unwrap(), everything(false));
        assert!(decoder.unused().is_empty() && pieces.next().is_none());
        assert_eq!(decoder.digest(), digest);
    }
}

#[test]
fn a_large_section_in_single_bytes_is_not_measured_for_every_element() {
    use std::cell::Cell;

    thread_local!(static MEASURED: Cell<usize> = const { Cell::new(0) });

    #[derive(VmState)]
    #[vmstate(name = "large")]
    struct Large {
        #[vmstate(check = "measured")]
        count: u32,
        #[vmstate(len = "count", max = 4096)]
        queues: Slots<Queue>,
        more: u32,
        #[vmstate(len = "more", max = 4096)]
        runs: Vec<Run>,
    }

    #[derive(VmState)]
    #[vmstate(name = "run")]
    struct Run {
        length: u8,
        #[vmstate(len = "length", max = 8)]
        bytes: Vec<u8>,
    }

    fn measured(_: &u32) -> Result<(), &'static str> {
        MEASURED.set(MEASURED.get() + 1);
        Ok(())
    }

    const ELEMENTS: usize = 4096;
    let mut queues = Slots::empty(ELEMENTS);
    for at in 0..ELEMENTS {
        queues.put(at, Queue { base: at as u64, size: 1 });
    }
    let runs = (0..ELEMENTS).map(|_| Run { length: 0, bytes: vec![7; 8] }).collect();
    let section = DeviceSection::save_bare("large", 0, &Large { count: 0, queues, more: 0, runs });
    let mut writer = StreamWriter::new(Vec::new(), &Configuration::new("ferry-1")).unwrap();
    writer.device(&section).unwrap();

    let mut decoder = Decoder::live(Expected::new(vec![]).section::<Large>("large", 0));
    let mut devices = 0;
    for byte in writer.finish_live().unwrap() {
        decoder.feed(&[byte]);
        while let Some(event) = decoder.next_event().unwrap() {
            match event {
                Event::Device(come) => devices += usize::from(come.payload == section.payload),
                Event::End => break,
                _ => {}
            }
        }
    }
    assert_eq!(devices, 1);
    assert!(MEASURED.get() < ELEMENTS / 16, "{} times", MEASURED.get());
}

#[test]
fn bytes_after_a_live_stream_are_left() {
    let mut decoder = Decoder::live(expected());
    let mut bytes = started().finish_live().unwrap();
    bytes.extend(b"next");
    decoder.feed(&bytes);
    load(|take| take(decoder.next_event()?.expect("all bytes are there"))).unwrap();
    assert_eq!(decoder.unused(), b"next");
}

/// Offsets worth looking at: all but most of the insides of pages and of the trailer.
fn offsets(bytes: &[u8]) -> impl Iterator<Item = usize> {
    let in_page =
        |at: usize| at > 8 && bytes[at - 8..at].iter().all(|byte| [0x11, 0x22, 0x33].contains(byte));
    let trailer = bytes.iter().rposition(|byte| *byte == 0).unwrap() + 8;
    (0..bytes.len()).filter(move |at| at % 127 == 0 || !in_page(*at) && *at < trailer)
}

#[test]
fn every_truncation_is_refused() {
    let bytes = started().finish_file().unwrap();
    for length in offsets(&bytes) {
        let error = load_file(&bytes[..length]).expect_err("a shorter stream");
        assert!(matches!(error, Error::Truncated { .. }), "of {length}: {error:?}");
    }
    let mut longer = bytes;
    longer.push(b' ');
    assert!(matches!(load_file(&longer), Err(Error::OutOfOrder { .. })));
}

#[test]
fn damage_is_named() {
    let bytes = started().finish_file().unwrap();
    let damaged = |at: usize, flip: u8| {
        let mut bytes = bytes.clone();
        bytes[at] ^= flip;
        load_file(&bytes).unwrap_err().to_string()
    };
    let page = bytes.windows(16).position(|window| window == [0x22; 16]).unwrap();
    assert!(damaged(page, 1).starts_with("MiB 2 of RAM block \"ram\" is damaged"), "{}", damaged(page, 1));
    let nvme = bytes.windows(13).position(|window| window == b"\0\0\0\0\0\0\x30\0\x7e\0\0\0\x02").unwrap();
    assert!(damaged(nvme, 1).starts_with("section \"0000:00:04.0/nvme\" is damaged"), "{}", damaged(nvme, 1));
}

#[test]
fn errors_in_a_state_carry_section_and_path() {
    let mut state = controller();
    state.sq.put(3, Queue { base: 0, size: 70000 });
    let section = DeviceSection::save_bare("0000:00:04.0/nvme", 0, &state);
    let error = section.load::<Controller>().unwrap_err();
    let chain = format!("{error}: {}", error.source().unwrap());
    assert_eq!(chain, "section \"0000:00:04.0/nvme\" v1: sq[3].size: 70000 is above 65536");

    let mut writer = StreamWriter::new(Vec::new(), &Configuration::new("ferry-1")).unwrap();
    writer.device(&section).unwrap();
    let error = load_devices(&writer.finish_file().unwrap()).unwrap_err();
    assert!(matches!(error, Error::Section { .. }), "{error:?}");
}

#[test]
fn every_section_comes_exactly_once() {
    let load = |devices: &[DeviceSection]| {
        let mut writer = StreamWriter::new(Vec::new(), &Configuration::new("ferry-1")).unwrap();
        devices.iter().for_each(|device| writer.device(device).unwrap());
        load_devices(&writer.finish_file().unwrap()).unwrap_err().to_string()
    };
    let clock = DeviceSection::save("clock", 1, &Clock { nanoseconds: 1 });
    assert_eq!(load(std::slice::from_ref(&clock)), "missing sections: \"0000:00:04.0/nvme\" instance 0");
    assert_eq!(load(&[clock.clone(), clock.clone()]), "section \"clock\" instance 1 comes twice");
    let other = DeviceSection { instance_id: 2, ..clock.clone() };
    assert_eq!(load(&[other]), "unexpected section \"clock\" instance 2");
    let newer = DeviceSection { version: 3, ..clock };
    assert_eq!(load(&[newer]), "section \"clock\" v3");
}

#[test]
fn section_set_names_what_is_missing_left_over_or_twice() {
    let clock = DeviceSection::save("clock", 1, &Clock { nanoseconds: 1 });
    let mut set = SectionSet::default();
    set.insert(clock.clone()).unwrap();
    assert_eq!(set.insert(clock).unwrap_err().to_string(), "section \"clock\" instance 1 comes twice");
    assert_eq!(
        set.take::<Clock>("clock", 0).unwrap_err().to_string(),
        "missing sections: \"clock\" instance 0"
    );
    assert_eq!(set.finish().unwrap_err().to_string(), "sections left over: \"clock\" instance 1");
}

#[test]
fn stream_without_digests_is_refused() {
    let mut bytes = started().finish_live().unwrap();
    let integrity = bytes.windows(10).position(|window| window == b"\x09integrity").unwrap() - 5;
    bytes.truncate(integrity);
    bytes.push(0);
    let mut reader = StreamReader::live(bytes.as_slice(), expected());
    let error = load(|take| take(reader.next_event()?)).unwrap_err();
    assert!(matches!(error, Error::NoIntegrity), "{error:?}");
}

#[test]
fn more_ram_than_the_machine_has_is_refused_before_it_is_believed() {
    let start = |list: &[u8]| {
        let mut bytes = b"QEVM\0\0\0\x03\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04".to_vec();
        bytes.extend(list);
        load_file(&bytes).unwrap_err().to_string()
    };
    assert_eq!(start(&[0x7f, 0, 0, 0, 0, 0, 0, 4]), "RAM in bytes: 9151314442816847872 is above 3153920");
    let list = b"\0\0\0\0\0\0\x20\x04\x03ram\xff\xff\xff\xff\xff\xff\xf0\0\0\0\0\0\0\0\0\x10";
    assert_eq!(start(list), "RAM: the blocks have 18446744073709547520 bytes but the list says 8192");
    let mut empty = b"\0\0\0\0\0\0\x20\x04".to_vec();
    (0..2000_u32).for_each(|index| {
        empty.push(4);
        empty.extend(format!("{index:04}").bytes());
        empty.extend([0; 8]);
    });
    assert_eq!(start(&empty), "number of RAM blocks: 1025 is above 1024");
}

#[test]
fn other_blocks_than_the_machines_are_refused() {
    let load = |length: u64| {
        let mut writer = StreamWriter::new(Vec::new(), &Configuration::new("ferry-1")).unwrap();
        let mut ram = writer.start_ram(&[RamBlock::new("ram", length)]).unwrap();
        ram.last_round(&mut writer).unwrap().finish().unwrap();
        let bytes = writer.finish_file().unwrap();
        let mut reader =
            StreamReader::file(bytes.as_slice(), Expected::new(vec![RamBlock::new("ram", 8192)]));
        load(|take| take(reader.next_event()?)).unwrap_err().to_string()
    };
    let message =
        "RAM: the stream has the blocks \"ram\" of 0x1000 bytes; the machine has \"ram\" of 0x2000 bytes";
    assert_eq!(load(4096), message);
    assert_eq!(load(12288), "RAM in bytes: 12288 is above 8192");
}

#[test]
fn pages_outside_of_a_block_are_refused_on_both_sides() {
    let mut writer = started();
    let mut ram = writer.start_ram(&blocks()).unwrap();
    let mut round = ram.round(&mut writer).unwrap();
    for (block, offset, length) in [
        (1, 8192, 4096),
        (1, 4096, 8192),
        (0, 1, 4096),
        (0, 0, 100),
        (2, 0, 4096),
        (0, u64::MAX - 4095, 4096),
    ] {
        assert!(round.pages(block, offset, &vec![0; length]).is_err(), "{block} {offset:#x} {length:#x}");
        assert!(round.zeros(block, offset, length as u64).is_err(), "{block} {offset:#x} {length:#x}");
    }
    round.finish().unwrap();

    let mut bytes = started().finish_live().unwrap();
    let record = bytes.windows(12).position(|window| window == b"\0\0\0\0\0\0\0\x02\x03rom").unwrap();
    bytes[record + 6] = 0x20;
    let mut reader = StreamReader::live(bytes.as_slice(), expected());
    let error = load(|take| take(reader.next_event()?)).unwrap_err();
    assert_eq!(error.to_string(), "RAM: page 0x2000 is outside of block \"rom\" of 0x2000 bytes");
}

#[test]
fn trailer_describes_every_section_and_can_be_found() {
    let bytes = started().finish_file().unwrap();
    let description = find_trailer(&bytes).unwrap().unwrap();
    let trailer = serde_json::to_value(&description).unwrap();
    assert_eq!(trailer["page_size"], 4096);
    assert_eq!(trailer["configuration"]["fields"][1]["name"], "name");
    let devices = trailer["devices"].as_array().unwrap();
    let names: Vec<_> = devices.iter().map(|device| device["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["0000:00:04.0/nvme", "clock", "integrity"]);
    let types: Vec<_> = devices[0]["fields"]
        .as_array()
        .unwrap()
        .iter()
        .map(|field| field["type"].as_str().unwrap())
        .collect();
    let marker = "ptr-marker";
    assert_eq!(types, ["bool", "uint16", marker, "struct", marker, marker, marker, "struct", marker]);

    // From the trailer alone the same bytes can be walked.
    let expected = Expected::from_trailer(&description, 1 << 30).unwrap();
    let mut reader = StreamReader::file(bytes.as_slice(), expected);
    assert_eq!(load(|take| take(reader.next_event()?)).unwrap(), everything(true));
}

#[test]
fn trailer_length_never_misleads_a_search_for_the_first_brace() {
    for machine in 1..127 {
        let configuration = Configuration::new("m".repeat(machine));
        let json = serde_json::json!({ "text": "x".repeat(machine) });
        let trailer = trailer::save(&trailer::text(&json, &[]).unwrap());
        let nul = trailer.iter().rposition(|byte| *byte == 0).unwrap();
        let brace = nul + trailer[nul..].iter().position(|byte| *byte == b'{').unwrap();
        assert_eq!(brace, 5, "{machine}");
        let file = StreamWriter::new(Vec::new(), &configuration).unwrap().finish_file().unwrap();
        assert!(find_trailer(&file).unwrap().is_some());
    }
}

#[test]
fn capabilities_have_their_bytes_and_are_refused_by_this_reader() {
    let configuration = Configuration { machine: "ferry-1".into(), capabilities: vec!["mapped-ram".into()] };
    let bytes = StreamWriter::new(Vec::new(), &configuration).unwrap().finish_file().unwrap();
    let expected = b"\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x01\x0amapped-ram";
    assert_eq!(bytes[20..20 + expected.len()], *expected);
    let trailer = serde_json::to_value(find_trailer(&bytes).unwrap().unwrap()).unwrap();
    let field = &trailer["configuration"]["subsections"][0]["fields"][1];
    assert_eq!(*field, serde_json::json!({ "name": "capabilities", "type": "capability", "size": 11 }));
    assert_eq!(
        load_file(&bytes).unwrap_err().to_string(),
        "the stream needs the capability \"mapped-ram\", which is not supported"
    );
}

#[test]
fn stream_of_another_vmm_is_walked_to_its_end() {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/golden/qemu-11.1.3/devices-only.stream.gz");
    let mut bytes = Vec::new();
    flate2::read::GzDecoder::new(std::fs::File::open(path).unwrap()).read_to_end(&mut bytes).unwrap();
    let trailer = find_trailer(&bytes).unwrap().unwrap();
    let described = trailer.root().list("devices").unwrap().len();
    let expected = Expected::from_trailer(&trailer, 0).unwrap();
    let mut reader = StreamReader::file(bytes.as_slice(), expected);
    let (mut machine, mut names, mut trailers) = (String::new(), Vec::new(), 0);
    loop {
        match reader.next_event().unwrap() {
            Event::Configuration(configuration) => machine = configuration.machine,
            Event::Device(section) => names.push(section.name),
            Event::Trailer(_) => trailers += 1,
            Event::End => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!((machine.as_str(), names.len(), trailers), ("pc-q35-11.1", described, 1));
    assert!(names.contains(&"0000:00:01.0/nvme".to_owned()) && names.len() == 32);
}

#[test]
fn frames_have_their_numbers_and_bounds() {
    use frame::{Header, Kind};
    let kinds: Vec<u16> = Kind::ALL.iter().map(|kind| *kind as u16).collect();
    assert_eq!(kinds, (1..=28).collect::<Vec<_>>());
    let header = Header { kind: Kind::Commit, flags: 2, length_bytes: 0x10_0000 };
    assert_eq!(header.encode(), [0, 8, 0, 2, 0, 0x10, 0, 0]);
    assert_eq!(Header::decode(header.encode()).unwrap(), header);
    for unknown in [0, 29, 0xff] {
        let decoded = Header::decode([0, unknown, 0, 0, 0, 0, 0, 0]);
        assert!(matches!(decoded, Err(Error::FrameKind(kind)) if kind == u16::from(unknown)));
    }
    assert!(matches!(Header::decode([0, 1, 0, 0, 0, 0x10, 0, 1]), Err(Error::AboveMaximum { .. })));
    assert!(frame::write(&mut Vec::new(), Kind::Hello, 0, &vec![0; frame::BODY_BYTES_MAX + 1]).is_err());
    assert_eq!(frame::encode_preamble(), *b"FRRY\0\x01\0\x01");
    assert_eq!(frame::decode_preamble(*b"FRRY\0\x02\0\x03").unwrap(), (2, 3));
    assert!(matches!(frame::decode_preamble(*b"GET / HT"), Err(Error::Preamble(_))));
}

#[test]
fn stream_travels_in_frames() {
    let mut writer =
        StreamWriter::new(frame::StreamBodies::new(Vec::new()), &Configuration::new("ferry-1")).unwrap();
    let mut ram = writer.start_ram(&[RamBlock::new("ram", 3 << 20)]).unwrap();
    let mut round = ram.last_round(&mut writer).unwrap();
    let page_of = |at: usize| (at / PAGE_BYTES) as u8;
    round.pages(0, 0, &(0..3 << 20).map(page_of).collect::<Vec<_>>()).unwrap();
    round.finish().unwrap();
    let link = writer.finish_live().unwrap().into_inner();

    let mut decoder = Decoder::live(Expected::new(vec![RamBlock::new("ram", 3 << 20)]));
    let (mut link, mut body, mut frames, mut pages) = (link.as_slice(), Vec::new(), 0, 0);
    'stream: loop {
        while let Some(event) = decoder.next_event().unwrap() {
            match event {
                Event::RamPage { offset, bytes, .. } => {
                    assert_eq!(bytes[0], page_of(offset as usize));
                    pages += 1;
                }
                Event::End => break 'stream,
                _ => {}
            }
        }
        assert_eq!(frame::read(&mut link, &mut body).unwrap().kind, frame::Kind::Stream);
        decoder.feed(&body);
        frames += 1;
    }
    assert_eq!((frames, pages, link.len()), (4, 768, 0));
}

proptest! {
    #[test]
    fn random_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(load_file(&bytes).is_err());
        let mut started = b"QEVM\0\0\0\x03".to_vec();
        started.extend(&bytes);
        prop_assert!(load_file(&started).is_err());
        let _ = find_trailer(&bytes);
    }

    #[test]
    fn mixed_up_streams_never_panic(cuts in prop::collection::vec((any::<prop::sample::Index>(), 0..300_usize), 1..6)) {
        let whole = started().finish_file().unwrap();
        let mut bytes = whole[..100].to_vec();
        for (start, length) in cuts {
            bytes.extend(whole[start.index(whole.len())..].iter().take(length));
        }
        prop_assert!(load_file(&bytes).is_err());
    }
}
