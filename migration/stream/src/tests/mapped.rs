//! The mapped layout: where everything is, what is refused, and what is found when it is looked at.

use std::io::Cursor;

use proptest::prelude::*;
use vmstate::VmState;

use crate::*;

const MIB: u64 = 1 << 20;

#[derive(VmState, Debug, PartialEq)]
#[vmstate(name = "clock")]
struct Clock {
    nanoseconds: u64,
}

/// The second block ends inside of its second chunk.
fn blocks() -> Vec<RamBlock> {
    vec![RamBlock::new("ram", 3 * MIB), RamBlock::new("rom", MIB + 8192)]
}

fn expected() -> Expected {
    Expected::new(blocks()).section::<Clock>("clock", 0)
}

fn written(pages: &[(usize, u64, Vec<u8>)]) -> (Vec<u8>, u64) {
    let mut writer = StreamWriter::new(Cursor::new(Vec::new()), &Configuration::mapped("ferry-1")).unwrap();
    let mut ram = writer.start_mapped_ram(&blocks()).unwrap();
    for (block, offset, bytes) in pages {
        ram.pages(&mut writer, *block, *offset, bytes).unwrap();
    }
    ram.finish(&mut writer).unwrap();
    writer.device(&DeviceSection::save("clock", 0, &Clock { nanoseconds: 99 })).unwrap();
    let digest = writer.digest();
    (writer.finish_file().unwrap().into_inner(), digest)
}

/// Pages at both ends of the blocks, in no order, and one of zeros.
fn file() -> Vec<u8> {
    let pages = [
        (1, MIB + 4096, vec![0x44; 4096]),
        (0, 2 * MIB + 4096, [[0x22; 4096], [0; 4096], [0x33; 4096]].concat()),
        (0, 0, vec![0x11; 8192]),
    ];
    written(&pages).0
}

fn open(file: &[u8]) -> Result<MappedRam<&[u8]>, Error> {
    let mut reader = MappedReader::open(file, expected())?;
    let mut sections = SectionSet::default();
    loop {
        match reader.next_event()? {
            Event::Device(section) => sections.insert(section)?,
            Event::End => break,
            _ => {}
        }
    }
    assert_eq!(sections.take::<Clock>("clock", 0)?, Clock { nanoseconds: 99 });
    sections.finish()?;
    reader.into_ram()
}

fn refusal(file: &[u8]) -> String {
    open(file).and_then(|ram| ram.verify()).unwrap_err().to_string()
}

#[test]
fn everything_is_where_the_format_says() {
    let file = file();
    let mut start = b"QEVM\0\0\0\x03\x07\0\0\0\x07ferry-1".to_vec();
    start.extend(b"\x05\x1aconfiguration/capabilities\0\0\0\x01\0\0\0\x01\x0amapped-ram");
    start.extend(b"\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04\0\0\0\0\0\x40\x20\x04");
    start.extend(b"\x03ram\0\0\0\0\0\x30\0\0");
    let bitmap = (start.len() + 28) as u64;
    start.extend(b"\0\0\0\x01\0\0\0\0\0\0\x10\0");
    start.extend([bitmap.to_be_bytes(), MIB.to_be_bytes()].concat());
    // Pages 0 and 1; 513 and 515.
    start.extend([3]);
    start.extend([0; 63]);
    start.extend([0x0a]);
    start.extend([0; 31]);
    assert_eq!(file[..start.len()], start);
    assert!(file[start.len()..MIB as usize].iter().all(|byte| *byte == 0));
    let at = |offset: u64| file[offset as usize];
    assert_eq!([at(MIB), at(MIB + 8191), at(MIB + 8192)], [0x11, 0x11, 0]);
    assert_eq!([at(3 * MIB + 4096), at(3 * MIB + 8192), at(3 * MIB + 12288)], [0x22, 0, 0x33]);
    // The next block comes right behind.
    assert_eq!(file[4 * MIB as usize..][..12], *b"\x03rom\0\0\0\0\0\x10\x20\0");
    assert_eq!([at(5 * MIB), at(6 * MIB + 4096)], [0, 0x44]);
    let rest = b"\0\0\0\0\0\0\0\x10\x7e\0\0\0\x01\x03\0\0\0\x01\0\0\0\0\0\0\0\x10\x7e\0\0\0\x01\x04";
    assert_eq!(file[6 * MIB as usize + 8192..][..rest.len()], *rest);
    let trailer = serde_json::to_value(find_trailer(&file).unwrap().unwrap()).unwrap();
    assert_eq!(trailer["configuration"]["subsections"][0]["fields"][1]["type"], "capability");
}

#[test]
fn pages_come_back_chunk_by_chunk() {
    let file = file();
    let ram = open(&file).unwrap();
    let places: Vec<_> =
        ram.blocks().map(|mapped| (mapped.block.name.as_str(), mapped.pages_offset)).collect();
    assert_eq!(places, [("ram", MIB), ("rom", 5 * MIB)]);
    let extents = [0..8192, 2 * MIB + 4096..2 * MIB + 8192, 2 * MIB + 12288..2 * MIB + 16384];
    assert_eq!(ram.extents(0).collect::<Vec<_>>(), extents);
    assert!(ram.extents(1).eq(std::iter::once(MIB + 4096..MIB + 8192)));
    assert_eq!(ram.extents(2).count(), 0);
    assert!(ram.is_present(0, 4096) && !ram.is_present(0, 8192) && !ram.is_present(2, 0));

    let mut buffer = vec![0xff; MIB as usize];
    assert_eq!(ram.read_chunk(0, 2, &mut buffer).unwrap(), MIB as usize);
    assert_eq!([buffer[0], buffer[4096], buffer[8192], buffer[12288], buffer[16384]], [0, 0x22, 0, 0x33, 0]);
    assert_eq!(ram.read_chunk(1, 1, &mut buffer).unwrap(), 8192);
    assert_eq!([buffer[0], buffer[4096]], [0, 0x44]);
    ram.verify().unwrap();
    for (block, chunk) in [(0, 3), (1, 2), (2, 0), (0, u64::MAX)] {
        let message = format!("RAM: there is no chunk {chunk} of block number {block}");
        assert_eq!(ram.read_chunk(block, chunk, &mut buffer).unwrap_err().to_string(), message);
    }
    assert!(ram.read_chunk(0, 0, &mut buffer[1..]).is_err(), "the buffer is too short");
}

#[test]
fn both_sides_compute_one_digest_whatever_the_order() {
    let page = |fill| vec![fill; 4096];
    let (forth, digest) = written(&[(0, 0, page(1)), (0, 4096, page(2)), (1, 0, page(3))]);
    let (back, other) = written(&[(1, 0, page(3)), (0, 4096, page(2)), (0, 0, page(1))]);
    assert!(forth == back && digest == other);
    let mut reader = MappedReader::open(forth.as_slice(), expected()).unwrap();
    while !matches!(reader.next_event().unwrap(), Event::End) {}
    assert_eq!(reader.digest(), digest);
}

#[test]
fn damage_is_found_where_it_is() {
    let file = file();
    let damaged = |at: u64, flip: u8| {
        let mut file = file.clone();
        file[at as usize] ^= flip;
        refusal(&file)
    };
    let bitmap =
        (file.windows(11).position(|window| window == b"\x03ram\0\0\0\0\0\x30\0").unwrap() + 12 + 28) as u64;
    for (at, flip, what) in [
        (MIB + 5000, 1, "MiB 0 of RAM block \"ram\" is damaged"),
        (3 * MIB + 12288, 0x80, "MiB 2 of RAM block \"ram\" is damaged"),
        (6 * MIB + 8191, 1, "MiB 1 of RAM block \"rom\" is damaged"),
        (bitmap, 2, "the bitmap of RAM is damaged"),
        (bitmap + 50, 2, "the bitmap of RAM is damaged"),
    ] {
        assert!(damaged(at, flip).starts_with(what), "byte {at:#x}: {}", damaged(at, flip));
    }
    // A chunk that is not looked at does not matter yet.
    let mut one = file.clone();
    one[MIB as usize] ^= 1;
    let ram = open(&one).unwrap();
    let mut buffer = vec![0; MIB as usize];
    assert!(ram.read_chunk(0, 0, &mut buffer).is_err());
    ram.read_chunk(0, 2, &mut buffer).unwrap();
}

#[test]
fn places_are_checked() {
    let file = file();
    let header = file.windows(11).position(|window| window == b"\x03ram\0\0\0\0\0\x30\0").unwrap() + 12;
    let with = |at: usize, bytes: &[u8]| {
        let mut file = file.clone();
        file[header + at..][..bytes.len()].copy_from_slice(bytes);
        refusal(&file)
    };
    let behind = (header + 28) as u64;
    let place = "RAM: the place of block \"ram\"";
    assert_eq!(with(0, &2_u32.to_be_bytes()), format!("{place}: version 2 is not 1"));
    assert_eq!(with(4, &16384_u64.to_be_bytes()), format!("{place}: pages of 16384 bytes are not 4096"));
    let overlap = |at: u64| format!("{place}: the bitmap at {at:#x} overlaps the");
    assert_eq!(with(12, &(behind - 1).to_be_bytes()), format!("{} header", overlap(behind - 1)));
    for bitmap in [MIB - 95, MIB, u64::MAX] {
        assert_eq!(with(12, &bitmap.to_be_bytes()), format!("{} pages at 0x100000", overlap(bitmap)));
    }
    assert_eq!(with(20, &0_u64.to_be_bytes()), format!("{} pages at 0x0", overlap(behind)));
    assert_eq!(
        with(20, &(MIB + 4096).to_be_bytes()),
        format!("{place}: pages at 0x101000 are not at a whole MiB")
    );
    for pages in [5 * MIB, 1 << 62, u64::MAX << 20] {
        let message = format!("0x300000 bytes of pages at {pages:#x} go beyond the {:#x} bytes", file.len());
        assert_eq!(with(20, &pages.to_be_bytes()), format!("{place}: {message} of the file"));
    }
    // Another place that is well-formed: the digest of the section tells.
    let error = with(12, &(behind + 8).to_be_bytes());
    assert!(error.starts_with("section \"ram\" is damaged"), "{error}");
}

#[test]
fn every_truncation_is_refused() {
    let file = file();
    // Where nothing is read but pages and the holes between them, every 61st; all others.
    let parsed = [0..400, 4 << 20..(4 << 20) + 120, (6 << 20) + 8192..file.len()];
    let is_looked_at =
        |length: &usize| length.is_multiple_of(61) || parsed.iter().any(|part| part.contains(length));
    let lengths = (0..file.len()).filter(is_looked_at);
    let mut refused = 0;
    for length in lengths {
        assert!(open(&file[..length]).is_err(), "of {length:#x}");
        refused += 1;
    }
    println!("measured: mapped layout: {refused} truncations of {} bytes, 100 % refused", file.len());
}

#[test]
fn every_turned_bit_of_sections_and_bitmaps_is_refused() {
    let file = file();
    // Up to the end of each bitmap, and from the last page on.
    let header =
        |name: &[u8]| file.windows(name.len()).position(|window| window == name).unwrap() + name.len();
    let first = 0..header(b"\x03ram\0\0\0\0\0\x30\0\0") + 28 + 96;
    let second = 4 << 20..header(b"\x03rom\0\0\0\0\0\x10\x20\0") + 28 + 40;
    let mut turned = file.clone();
    for at in first.chain(second).chain((6 << 20) + 8192..file.len()) {
        for bit in 0..8 {
            turned[at] ^= 1 << bit;
            assert!(open(&turned).is_err(), "bit {bit} of byte {at:#x}");
            turned[at] ^= 1 << bit;
        }
    }
}

#[test]
fn pages_are_written_once_inside_of_their_block_and_before_the_devices() {
    let mut writer = StreamWriter::new(Cursor::new(Vec::new()), &Configuration::mapped("ferry-1")).unwrap();
    assert!(writer.start_ram(&blocks()).is_err(), "the layout is another");
    let mut ram = writer.start_mapped_ram(&blocks()).unwrap();
    ram.pages(&mut writer, 0, 4096, &[1; 8192]).unwrap();
    let error = ram.pages(&mut writer, 0, 0, &[1; 8192]).unwrap_err().to_string();
    assert_eq!(error, "RAM: page 0x1 of block \"ram\" is written a second time");
    for (block, offset, length) in
        [(2, 0, 4096), (1, MIB + 8192, 4096), (0, 1, 4096), (0, 0, 1), (0, u64::MAX - 4095, 4096)]
    {
        assert!(
            ram.pages(&mut writer, block, offset, &vec![1; length]).is_err(),
            "{block} {offset:#x} {length:#x}"
        );
    }
    let mut plain = StreamWriter::new(Cursor::new(Vec::new()), &Configuration::new("ferry-1")).unwrap();
    assert!(plain.start_mapped_ram(&blocks()).is_err(), "the layout is another");
}

#[test]
fn plain_file_is_read_as_well_and_has_no_mapped_memory() {
    let blocks = vec![RamBlock::new("ram", 8192)];
    let mut writer = StreamWriter::new(Vec::new(), &Configuration::new("ferry-1")).unwrap();
    let mut ram = writer.start_ram(&blocks).unwrap();
    let mut round = ram.last_round(&mut writer).unwrap();
    round.pages(0, 4096, &[5; 4096]).unwrap();
    round.finish().unwrap();
    let file = writer.finish_file().unwrap();
    let mut reader = MappedReader::open(file.as_slice(), Expected::new(blocks)).unwrap();
    let mut pages = 0;
    loop {
        match reader.next_event().unwrap() {
            Event::RamPage { offset, bytes, .. } => pages += usize::from((offset, bytes[0]) == (4096, 5)),
            Event::End => break,
            _ => {}
        }
    }
    assert_eq!(pages, 1);
    assert_eq!(reader.into_ram().unwrap().blocks().len(), 0);
}

#[test]
fn memory_waits_for_the_end_of_the_sections() {
    let file = file();
    let mut reader = MappedReader::open(file.as_slice(), expected()).unwrap();
    reader.next_event().unwrap();
    assert!(matches!(reader.into_ram(), Err(Error::OutOfOrder { .. })));
}

#[test]
fn page_among_the_sections_is_refused() {
    let mut file = file();
    let part = 6 * MIB as usize + 8192 + 13;
    file.truncate(part + 5);
    file.extend(b"\0\0\0\0\0\0\0\x08\x03ram");
    file.extend([7; 4096]);
    assert_eq!(refusal(&file), "RAM: a page among the sections of a mapped file");
}

#[test]
fn foreign_file_without_digests_is_read() {
    let file = file();
    let name = file.windows(11).rposition(|window| window == b"\x04\0\0\0\x03\x09integ").unwrap();
    let trailer =
        br#"{"configuration":{},"devices":[{"name":"clock","instance_id":0,"vmsd_name":"clock","version":1,
        "fields":[{"name":"nanoseconds","type":"uint64","size":8}]}]}"#;
    let mut foreign = file[..name].to_vec();
    foreign.push(0);
    foreign.push(6);
    foreign.extend((trailer.len() as u32).to_be_bytes());
    foreign.extend(trailer);
    assert!(matches!(open(&foreign), Err(Error::NoIntegrity)));
    let expected = Expected::from_trailer(&find_trailer(&foreign).unwrap().unwrap(), 1 << 30).unwrap();
    let mut reader = MappedReader::open(foreign.as_slice(), expected).unwrap();
    while !matches!(reader.next_event().unwrap(), Event::End) {}
    let ram = reader.into_ram().unwrap();
    ram.verify().unwrap();
    assert_eq!(ram.extents(0).count(), 3);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn any_pages_in_any_order_come_back(pages in prop::collection::btree_map((0..2_usize, 0..258_u64), any::<u8>(), 0..30), seed in any::<u64>()) {
        let mut order: Vec<_> = pages.iter().map(|((block, page), fill)| (*block, page * 4096, vec![*fill; 4096])).collect();
        order.sort_by_key(|(block, offset, _)| (*block as u64 + offset).wrapping_mul(seed | 1));
        let (file, _) = written(&order);
        let ram = open(&file).unwrap();
        ram.verify().unwrap();
        let mut buffer = vec![0; MIB as usize];
        for ((block, page), fill) in &pages {
            ram.read_chunk(*block, page / 256, &mut buffer).unwrap();
            let at = (page % 256 * 4096) as usize;
            prop_assert!(buffer[at..at + 4096].iter().all(|byte| byte == fill));
            prop_assert_eq!(ram.is_present(*block, page * 4096), *fill != 0);
        }
        let present = (0..2).flat_map(|block| ram.extents(block)).map(|run| (run.end - run.start) / 4096).sum::<u64>();
        prop_assert_eq!(present, pages.values().filter(|fill| **fill != 0).count() as u64);
    }

    #[test]
    fn mixed_up_starts_never_panic(changes in prop::collection::vec((0..240_usize, any::<u8>()), 1..4)) {
        let mut file = file();
        changes.iter().for_each(|(at, to)| file[*at] = *to);
        if let Ok(ram) = open(&file) {
            prop_assert!(ram.verify().is_ok());
        }
    }
}

/// What is not in it is not zero, so what is zero is in it.
#[test]
fn a_layer_has_pages_of_zeros() {
    let mut writer = StreamWriter::new(Cursor::new(Vec::new()), &Configuration::mapped("ferry-1")).unwrap();
    let mut ram = writer.start_mapped_ram(&blocks()).unwrap().layer();
    ram.pages(&mut writer, 0, 4096, &[[0x11; 4096], [0; 4096], [0x22; 4096]].concat()).unwrap();
    // Zeros over what was written, and the other way round.
    ram.pages(&mut writer, 0, 4096, &[[0; 4096], [0x33; 4096]].concat()).unwrap();
    ram.finish(&mut writer).unwrap();
    writer.device(&DeviceSection::save("clock", 0, &Clock { nanoseconds: 99 })).unwrap();
    let file = writer.finish_file().unwrap().into_inner();
    let ram = open(&file).unwrap();
    assert!(ram.extents(0).eq(std::iter::once(4096..16_384)));
    let mut buffer = vec![0xff; MIB as usize];
    ram.read_chunk(0, 0, &mut buffer).unwrap();
    assert_eq!([buffer[4096], buffer[8191], buffer[8192], buffer[12_288]], [0, 0, 0x33, 0x22]);
    ram.verify().unwrap();
    let mut damaged = file.clone();
    damaged[(MIB + 4096) as usize] = 1;
    assert!(open(&damaged).unwrap().verify().is_err(), "its zeros have a digest too");
}
