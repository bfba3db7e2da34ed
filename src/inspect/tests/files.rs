//! Whole files: printed, compared, verified.

use std::io::Read as _;
use std::path::Path;

use serde_json::Value as Json;
use stream::{Configuration, Description, DeviceSection, PAGE_BYTES, RamBlock, StreamWriter};
use vmstate::{Slots, VmState};

use crate::inspect::{Contents, Diff, Input, Section, Tree, Visitor, write_json};

#[derive(VmState, Clone)]
#[vmstate(name = "controller", version = 2)]
pub struct Controller {
    pub enabled: bool,
    pub serial: [u8; 20],
    pub levels: [u32; 3],
    pub sq_count: u16,
    #[vmstate(len = "sq_count", max = 16)]
    pub sq: Slots<Queue>,
    #[vmstate(subsection)]
    pub doorbells: Option<Doorbells>,
}

#[derive(VmState, Clone)]
#[vmstate(name = "queue")]
pub struct Queue {
    pub base: u64,
    pub size: u32,
}

#[derive(VmState, Clone)]
#[vmstate(name = "controller/doorbells")]
pub struct Doorbells {
    pub address: u64,
}

pub fn controller() -> Controller {
    let mut sq = Slots::empty(6);
    sq.put(0, Queue { base: 0x1000, size: 32 });
    sq.put(3, Queue { base: 0x2000, size: 8 });
    let mut serial = [0; 20];
    serial[..3].copy_from_slice(b"d0!");
    Controller {
        enabled: true,
        serial,
        levels: [1, 2, 3],
        sq_count: 0,
        sq,
        doorbells: Some(Doorbells { address: 0x3000 }),
    }
}

/// A file of this controller, with 64 KiB of RAM of which two pages are `fill` and one is zero.
pub fn file(state: &Controller, fill: u8) -> Vec<u8> {
    let mut writer = StreamWriter::new(Vec::new(), &Configuration::new("ferry")).unwrap();
    let mut ram =
        writer.start_ram(&[RamBlock::new("low", 60 << 10), RamBlock::new("high", 4 << 10)]).unwrap();
    let mut round = ram.last_round(&mut writer).unwrap();
    round.pages(0, 0, &[fill; 2 * PAGE_BYTES]).unwrap();
    round.zeros(1, 0, 4 << 10).unwrap();
    round.finish().unwrap();
    writer.device(&DeviceSection::save("0000:00:02.0/nvme", 0, state)).unwrap();
    writer.finish_file().unwrap()
}

pub fn input(bytes: &[u8]) -> anyhow::Result<Input<&[u8]>> {
    Input::new(bytes, None)
}

/// The tree and what else came; the tree has what came before an error.
pub fn tree(bytes: &[u8]) -> (String, anyhow::Result<Contents>) {
    let mut out = Vec::new();
    let result = input(bytes).and_then(|input| {
        let (contents, result) = input.walk(&mut Tree::new(&mut out));
        result.map(|()| contents)
    });
    (String::from_utf8(out).unwrap(), result)
}

pub fn json(bytes: &[u8]) -> (Option<Json>, anyhow::Result<Contents>) {
    let mut out = Vec::new();
    let result = input(bytes).and_then(|input| write_json(&input, &mut out, |_| true, true));
    let json = (!out.is_empty()).then(|| serde_json::from_slice(&out).expect("JSON, whatever the file is"));
    (json, result)
}

pub fn diff(a: &[u8], b: &[u8]) -> anyhow::Result<Vec<String>> {
    let mut out = Vec::new();
    let count = Diff::print(&input(a)?, &input(b)?, |_| true, &mut out)?;
    let lines: Vec<_> = String::from_utf8(out)?.lines().map(str::to_owned).collect();
    assert_eq!(lines.len() as u64, count);
    Ok(lines)
}

pub fn golden(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/qemu-11.1.3").join(name);
    std::fs::read(path).unwrap()
}

/// The stream of a whole QEMU machine.
pub fn foreign() -> Vec<u8> {
    let mut bytes = Vec::new();
    let packed = golden("devices-only.stream.gz");
    flate2::read::GzDecoder::new(packed.as_slice()).read_to_end(&mut bytes).unwrap();
    bytes
}

#[test]
fn a_file_of_ours_is_a_tree() {
    let (tree, contents) = tree(&file(&controller(), 7));
    let expected = "\
machine ferry
RAM, sent in 1 round
  low   61440 bytes  2 pages  0 zero pages
  high   4096 bytes  0 pages  1 zero pages
section 0000:00:02.0/nvme instance 0 version 2: 99 bytes from byte 8356
  enabled   true
  serial    \"d0!\", 20 bytes
  levels    1 2 3
  sq_count  6
  sq        6 slots, 2 present
    [0]  queue
      base  4096 (0x1000)
      size  32 (0x20)
    [1-2]  empty
    [3]  queue
      base  8192 (0x2000)
      size  8
    [4-5]  empty
  subsection controller/doorbells version 1
    address  12288 (0x3000)
";
    assert_eq!(tree, expected);
    let contents = contents.unwrap();
    assert!(contents.verified);
    assert_eq!((contents.sections, contents.rounds, contents.blocks.len()), (1, 1, 2));
}

#[test]
fn a_file_of_ours_is_json_with_stable_keys() {
    let (json, contents) = json(&file(&controller(), 7));
    let json = json.unwrap();
    contents.unwrap();
    let keys = |json: &Json| json.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    assert_eq!(keys(&json), ["commands", "configuration", "error", "ram", "sections", "verified"]);
    assert_eq!((&json["verified"], &json["error"]), (&Json::Bool(true), &Json::Null));
    let blocks = serde_json::json!([
        { "name": "low", "length_bytes": 61440, "pages": 2, "zero_pages": 0 },
        { "name": "high", "length_bytes": 4096, "pages": 0, "zero_pages": 1 },
    ]);
    assert_eq!(json["ram"], serde_json::json!({ "rounds": 1, "pages_read": true, "blocks": blocks }));
    let section = &json["sections"][0];
    assert_eq!(keys(section), ["instance_id", "name", "offset", "size", "state", "version"]);
    let state = &section["state"];
    assert_eq!(keys(state), ["fields", "subsections", "version", "vmsd_name"]);
    assert_eq!(
        state["fields"][1],
        serde_json::json!({
            "name": "serial", "type": "buffer", "offset": 8357,
            "value": { "hex": "6430210000000000000000000000000000000000", "text": "d0!" },
        })
    );
    let sq = &state["fields"][4]["value"];
    assert_eq!(sq.as_array().unwrap().len(), 6);
    assert_eq!((&sq[1], &sq[3]["fields"][1]["value"]), (&Json::Null, &Json::from(8)));
    assert_eq!(state["subsections"][0]["fields"][0]["value"], 0x3000);
}

#[test]
fn files_differ_field_by_field() {
    let old = file(&controller(), 7);
    assert_eq!(diff(&old, &old).unwrap(), Vec::<String>::new());
    let mut changed = controller();
    changed.enabled = false;
    changed.levels[2] = 4;
    changed.serial[19] = 1;
    changed.sq.put(3, None);
    changed.sq.put(5, Queue { base: 1, size: 2 });
    changed.doorbells = None;
    let nvme = |line: &str| format!("0000:00:02.0/nvme: {line}");
    let expected = [
        "RAM low: 2 pages differ".to_owned(),
        nvme("enabled: true -> false"),
        nvme("serial: 1 of 20 bytes differ, the first is byte 19: 00 -> 01"),
        nvme("levels[2]: 3 -> 4"),
        nvme("sq[3]: present -> empty"),
        nvme("sq[3].base: 8192 (0x2000), only in the first file"),
        nvme("sq[3].size: 8, only in the first file"),
        nvme("sq[5]: empty -> present"),
        nvme("controller/doorbells: version 1, only in the first file"),
        nvme("controller/doorbells.address: 12288 (0x3000), only in the first file"),
        nvme("sq[5].base: 1, only in the second file"),
        nvme("sq[5].size: 2, only in the second file"),
    ];
    assert_eq!(diff(&old, &file(&changed, 8)).unwrap(), expected);
    let lines = diff(&old, &foreign()).unwrap();
    assert_eq!(lines[0], "machine: ferry -> pc-q35-11.1");
    assert!(lines.contains(&nvme("only in the first file")));
    assert!(lines.contains(&"dma instance 1: only in the second file".to_owned()), "{lines:?}");
}

#[test]
fn a_whole_machine_of_qemu_is_printed() {
    let (tree, contents) = tree(&foreign());
    let contents = contents.unwrap();
    assert_eq!((contents.sections, contents.verified), (32, false));
    for line in [
        "machine pc-q35-11.1",
        "section 0000:00:01.0/nvme instance 0 version 1: 22458 bytes from byte 32500",
        "    [2-64]  empty",
        "  subsection cpu/tsc_khz version 1",
        "  runstate              \"running\", 32 bytes",
    ] {
        assert!(tree.lines().any(|printed| printed == line), "{line} is missing in\n{tree}");
    }
}

#[test]
fn bare_sections_are_printed_with_their_description() {
    for (name, slots) in [("firmware", 65), ("linux", 9)] {
        let description = golden(&format!("nvme-{name}.vmdesc.json"));
        let description = || Some(Description::parse(&description).unwrap());
        let section = golden(&format!("nvme-{name}.section"));
        let mut out = Vec::new();
        let input = Input::new(section.as_slice(), description()).unwrap();
        let (contents, result) = input.walk(&mut Tree::new(&mut out));
        result.unwrap();
        assert_eq!(contents.sections, 1);
        let tree = String::from_utf8(out).unwrap();
        assert!(tree.contains(&format!(" {slots} slots, ")), "{tree}");

        let walk = |section: &[u8]| {
            let input = Input::new(section, description()).unwrap();
            input.walk(&mut Tree::new(std::io::sink())).1.map_err(|error| format!("{error:#}"))
        };
        let mut longer = section.clone();
        longer.insert(section.len() - 5, 0);
        let error = walk(&longer).unwrap_err();
        assert!(
            error.starts_with("at byte 31: ") && error.contains("are described, but there are"),
            "{error}"
        );
        let mut other = section.clone();
        other[8] = b'7';
        let error = walk(&other).unwrap_err();
        assert_eq!(error, "the description is of \"0000:00:01.0/nvme\" 0, not of \"0070:00:01.0/nvme\" 0");
        for length in [0, 1, 10, 31, 35, section.len() - 1] {
            walk(&section[..length]).unwrap_err();
        }
    }
}

/// A file in the mapped layout, of which two pages of the second MiB are present.
fn mapped() -> Vec<u8> {
    let out = std::io::Cursor::new(Vec::new());
    let mut writer = StreamWriter::new(out, &Configuration::mapped("ferry")).unwrap();
    let mut ram = writer.start_mapped_ram(&[RamBlock::new("low", 2 << 20)]).unwrap();
    ram.pages(&mut writer, 0, 1 << 20, &[7; 2 * PAGE_BYTES]).unwrap();
    ram.finish(&mut writer).unwrap();
    writer.device(&DeviceSection::save("0000:00:02.0/nvme", 0, &controller())).unwrap();
    writer.finish_file().unwrap().into_inner()
}

/// Wants pages, and counts them.
#[derive(Default)]
struct Pages(Vec<(usize, u64, u8)>);

impl Visitor for Pages {
    fn wants_pages(&self) -> bool {
        true
    }

    fn page(&mut self, block: usize, offset: u64, bytes: Option<&[u8]>) {
        self.0.push((block, offset, bytes.map_or(0, |bytes| bytes[0])));
    }

    fn section(&mut self, _section: &Section<'_>) -> anyhow::Result<()> {
        Ok(())
    }
}

#[test]
fn pages_of_mapped_files_are_read_only_if_they_are_wanted() {
    let mut bytes = mapped();
    let (printed, contents) = tree(&bytes);
    let contents = contents.unwrap();
    assert!(contents.verified && contents.are_pages_unread);
    assert!(printed.starts_with("machine ferry, mapped-ram\nsection 0000:00:02.0/nvme "), "{printed}");
    let last = printed.lines().last();
    assert_eq!(last, Some("  low  2097152 bytes  2 pages  0 zero pages"), "{printed}");

    let mut pages = Pages::default();
    let (contents, result) = input(&bytes).unwrap().walk(&mut pages);
    result.unwrap();
    assert!(contents.verified && !contents.are_pages_unread);
    assert_eq!(pages.0, [(0, 1 << 20, 7), (0, (1 << 20) + 4096, 7)]);

    let old = bytes.clone();
    let page = bytes.windows(64).position(|window| window == [7; 64]).unwrap();
    bytes[page + 5000] ^= 1;
    assert!(tree(&bytes).1.is_ok(), "nobody has looked");
    let error = format!("{:#}", input(&bytes).unwrap().walk(&mut Pages::default()).1.unwrap_err());
    assert!(error.starts_with("MiB 1 of RAM block \"low\" is damaged: "), "{error}");
    assert!(diff(&old, &bytes).is_err());
    assert_eq!(diff(&old, &old).unwrap(), Vec::<String>::new());
    assert_eq!(diff(&file(&controller(), 7), &old).unwrap()[0], "machine: ferry -> ferry, mapped-ram");
}
