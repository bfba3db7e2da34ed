//! Commands in a stream, packages, and sections that are not ours to read.

use proptest::prelude::*;
use vmstate::VmState;

use crate::wire::mark;
use crate::*;

#[derive(VmState, Debug, PartialEq)]
#[vmstate(name = "clock")]
struct Clock {
    nanoseconds: u64,
}

fn blocks() -> Vec<RamBlock> {
    vec![RamBlock::new("ram", 1 << 20), RamBlock::new("rom", 8192)]
}

/// A stream whose list of blocks has come.
fn started() -> StreamWriter<Vec<u8>> {
    let mut writer = StreamWriter::new(Vec::new(), &Configuration::new("ferry-1")).unwrap();
    writer.start_ram(&blocks()).unwrap();
    writer
}

fn expected() -> Expected {
    Expected::new(blocks()).section::<Clock>("clock", 0)
}

/// The commands and the names of the sections of a stream, in their order, up to its end or an error.
fn read(bytes: &[u8]) -> (Vec<Command>, Vec<String>, Result<(), Error>) {
    let mut reader = StreamReader::live(bytes, expected());
    let (mut commands, mut sections) = (Vec::new(), Vec::new());
    loop {
        match reader.next_event() {
            Ok(Event::Command(command)) => commands.push(command),
            Ok(Event::Device(section)) => sections.push(section.name),
            Ok(Event::End) => return (commands, sections, Ok(())),
            Ok(_) => {}
            Err(error) => return (commands, sections, Err(error)),
        }
    }
}

/// Why a command with this number and data is refused.
fn refusal(number: u16, data: &[u8]) -> String {
    let mut bytes = started().out;
    bytes.push(mark::COMMAND);
    bytes.extend(number.to_be_bytes());
    bytes.extend((data.len() as u16).to_be_bytes());
    bytes.extend(data);
    read(&bytes).2.unwrap_err().to_string()
}

fn discard() -> Command {
    Command::RamDiscard { block: "ram".into(), ranges: vec![0..4096, 0x8000..0x10_0000] }
}

#[test]
fn commands_have_their_bytes() {
    let advise = PageSizes { host_bytes_union: 0x20_1000, guest_bytes: 4096 };
    for (command, wire) in [
        (Command::OpenReturnPath, b"\x08\0\x01\0\0".as_slice()),
        (Command::Ping { value: 0x0102_0304 }, b"\x08\0\x02\0\x04\x01\x02\x03\x04"),
        (Command::PostcopyAdvise { pages: None }, b"\x08\0\x03\0\0"),
        (
            Command::PostcopyAdvise { pages: Some(advise) },
            b"\x08\0\x03\0\x10\0\0\0\0\0\x20\x10\0\0\0\0\0\0\0\x10\0",
        ),
        (Command::PostcopyListen, b"\x08\0\x04\0\0"),
        (Command::PostcopyRun, b"\x08\0\x05\0\0"),
        (
            discard(),
            b"\x08\0\x06\0\x26\0\x03ram\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x10\0\0\0\0\0\0\0\x80\0\0\0\0\0\0\x0f\x80\0",
        ),
        (Command::PostcopyResume, b"\x08\0\x09\0\0"),
        (Command::ReceivedBitmap { block: "rom".into() }, b"\x08\0\x0a\0\x04\x03rom"),
        (Command::SwitchoverStart, b"\x08\0\x0b\0\0"),
    ] {
        let mut writer = started();
        let before = writer.out.len();
        writer.command(&command).unwrap();
        assert_eq!(writer.out[before..], *wire, "{command:?}");
    }
}

#[test]
fn commands_come_back_and_are_covered_by_the_digests() {
    let commands = [
        Command::OpenReturnPath,
        Command::Ping { value: 1 },
        Command::PostcopyAdvise { pages: None },
        discard(),
        discard(),
        Command::PostcopyListen,
        Command::PostcopyRun,
        Command::PostcopyResume,
        Command::ReceivedBitmap { block: "rom".into() },
        Command::SwitchoverStart,
    ];
    let mut writer = StreamWriter::new(Vec::new(), &Configuration::new("ferry-1")).unwrap();
    let mut ram = writer.start_ram(&blocks()).unwrap();
    commands.iter().for_each(|command| writer.command(command).unwrap());
    ram.last_round(&mut writer).unwrap().finish().unwrap();
    writer.device(&DeviceSection::save_bare("clock", 0, &Clock { nanoseconds: 5 })).unwrap();
    let mut bytes = writer.finish_live().unwrap();
    let (came, sections, result) = read(&bytes);
    result.unwrap();
    assert_eq!((came.as_slice(), sections.len()), (commands.as_slice(), 1));

    let ping = bytes.windows(5).position(|window| window == b"\x08\0\x02\0\x04").unwrap();
    bytes[ping + 8] = 2;
    let error = read(&bytes).2.unwrap_err().to_string();
    assert!(error.starts_with("section \"commands\" is damaged"), "{error}");
}

#[test]
fn data_of_commands_is_checked() {
    assert_eq!(refusal(0, &[]), "unknown command 0");
    assert_eq!(refusal(8, &[]), "unknown command 8");
    assert_eq!(refusal(12, &[]), "unknown command 12");
    for (number, name) in
        [(1, "open return path"), (4, "postcopy listen"), (9, "postcopy resume"), (11, "switchover start")]
    {
        assert_eq!(refusal(number, &[0]), format!("{name}: 1 bytes are left over"));
    }
    assert_eq!(refusal(2, &[0; 3]), "ping: needs 4 bytes but only 3 are left");
    assert_eq!(refusal(2, &[0; 5]), "ping: 1 bytes are left over");
    assert_eq!(refusal(3, &[0; 8]), "postcopy advise: needs 8 bytes but only 0 are left");
    assert_eq!(refusal(3, &[0; 16]), "postcopy advise: pages of 0 bytes are not 4096");
    let advise = [0_u64.to_be_bytes(), 4096_u64.to_be_bytes()].concat();
    assert_eq!(refusal(3, &advise), "postcopy advise: 0x0 is no union of page sizes");
    assert_eq!(refusal(7, &[2, 0, 0, 1]), "length of a package: 33554433 is above 33554432");
    assert_eq!(refusal(10, b"\x03hdd"), "receive bitmap: there is no block \"hdd\"");
    assert_eq!(refusal(10, b"\x09hdd"), "receive bitmap: needs 9 bytes but only 3 are left");
    let discard = |head: &[u8], start: u64, length: u64| {
        refusal(6, &[head, &start.to_be_bytes(), &length.to_be_bytes()].concat())
    };
    assert_eq!(discard(b"\x01\x03ram\0", 0, 4096), "RAM discard: version 1 is not 0");
    assert_eq!(discard(b"\0\x03ram\x01", 0, 4096), "RAM discard: the name does not end with 0");
    assert_eq!(refusal(6, b"\0\x03ram\0"), "RAM discard: it discards nothing");
    for (start, length) in [(0, 0), (1, 4096), (0, 100), (4096, 1 << 20), (u64::MAX - 4095, 4096)] {
        let message = format!(
            "RAM discard: {length:#x} bytes at {start:#x} are not pages of block \"ram\" of 0x100000 bytes"
        );
        assert_eq!(discard(b"\0\x03ram\0", start, length), message);
    }
}

#[test]
fn postcopy_has_an_order() {
    for (before, number) in [
        (vec![], 4),
        (vec![], 5),
        (vec![Command::PostcopyAdvise { pages: None }], 3),
        (vec![Command::PostcopyAdvise { pages: None }], 5),
        (vec![Command::PostcopyAdvise { pages: None }, Command::PostcopyListen], 4),
    ] {
        let mut writer = started();
        before.iter().for_each(|command| writer.command(command).unwrap());
        writer.out.extend([mark::COMMAND, 0, number, 0, 0]);
        let (came, _, result) = read(&writer.out);
        assert_eq!(came, before);
        assert!(matches!(result, Err(Error::OutOfOrder { .. })), "{before:?} {number}: {result:?}");
    }
    let discard = [b"\0\x03rom\0".as_slice(), &[0; 14], &[0x10, 0]].concat();
    let at = started().out.len();
    assert_eq!(refusal(6, &discard), format!("RAM discard at byte {at} is out of order"));
}

#[test]
fn package_is_read_like_the_stream_and_holds_whole_sections() {
    let mut writer = StreamWriter::new(Vec::new(), &Configuration::new("ferry-1")).unwrap();
    let mut ram = writer.start_ram(&blocks()).unwrap();
    writer.command(&Command::PostcopyAdvise { pages: None }).unwrap();
    let clock = DeviceSection::save_bare("clock", 0, &Clock { nanoseconds: 5 });
    let (listen, run) = (Command::PostcopyListen, Command::PostcopyRun);
    let start = writer.out.len();
    let parts = [PackagePart::Command(&listen), PackagePart::Device(&clock), PackagePart::Command(&run)];
    writer.package(&parts).unwrap();
    let end = writer.out.len();
    ram.last_round(&mut writer).unwrap().finish().unwrap();
    let bytes = writer.finish_live().unwrap();
    let (came, sections, result) = read(&bytes);
    result.unwrap();
    let length_bytes = (end - start - 9) as u32;
    assert_eq!(came[1..], [Command::Packaged { length_bytes }, listen, run]);
    assert_eq!(sections, ["clock"]);

    let with_length = |length: u32| {
        let mut bytes = bytes.clone();
        bytes[start + 5..start + 9].copy_from_slice(&length.to_be_bytes());
        read(&bytes).2.unwrap_err().to_string()
    };
    // Inside of the last command; inside of the clock; behind the package, inside of the END of RAM.
    for length in [length_bytes - 1, length_bytes - 20, length_bytes + 3] {
        let at = start as u32 + 9 + length;
        assert_eq!(
            with_length(length),
            format!("the end of a package inside a section at byte {at} is out of order")
        );
    }
    let ended = [started().out.as_slice(), b"\x08\0\x07\0\x04\0\0\0\x01\0"].concat();
    let error = read(&ended).2.unwrap_err().to_string();
    assert!(error.starts_with("the end of the stream in a package at byte"), "{error}");
}

#[test]
fn package_holds_no_package() {
    let mut writer = started();
    let package = Command::Packaged { length_bytes: 9 };
    assert!(writer.command(&package).is_err());
    assert!(writer.package(&[PackagePart::Command(&package)]).is_err());
    let mut bytes = started().out;
    for _ in 0..2 {
        bytes.extend(b"\x08\0\x07\0\x04\0\0\0\x09");
    }
    let error = read(&bytes).2.unwrap_err().to_string();
    let second = started().out.len() + 9;
    assert_eq!(error, format!("a package in a package at byte {second} is out of order"));
}

#[test]
fn section_in_parts_that_is_not_ram_is_named() {
    let mut bytes = StreamWriter::new(Vec::new(), &Configuration::new("pc")).unwrap().out;
    let at = bytes.len();
    bytes.extend(b"\x01\0\0\0\x01\x0cdirty-bitmap\0\0\0\0\0\0\0\x01whatever");
    let error = read(&bytes).2.unwrap_err().to_string();
    let message = "comes in parts of unknown length; only RAM can be read that way";
    assert_eq!(error, format!("section \"dirty-bitmap\" at byte {at} {message}"));
}

#[test]
fn differences_of_pages_are_named() {
    let mut bytes = started().out;
    bytes.extend(b"\x02\0\0\0\x01\0\0\0\0\0\0\x30\x40\x03ram");
    let error = read(&bytes).2.unwrap_err().to_string();
    assert_eq!(error, "RAM: page 0x3000 is a difference (XBZRLE), which is not read");
}

proptest! {
    #[test]
    fn random_commands_never_panic(number in 0..13_u16, data in prop::collection::vec(any::<u8>(), 0..80)) {
        match Command::decode(number, &data, &blocks()) {
            Ok(command) => prop_assert_eq!(command.encode().unwrap(), data),
            Err(error) => prop_assert!(!error.to_string().is_empty()),
        }
    }
}
