//! What released versions wrote, and what this build may have changed since.
//!
//! `tests/golden/ferry-VERSION/` holds `schema.json`, as `ferry inspect --schema` printed it, and `machine.stream.gz`, a machine with
//! holes among its queues and namespaces that was suspended into a file. The folder of the version that is being worked on is
//! written anew by `FERRY_WRITE_GOLDEN=1 tests/run golden`; the folders of released versions stay as they are.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use ferry::inspect::{Block, Input, Section, Visitor, build_schema, compare};
use ferry::kvm::{ClockState, IrqchipState, PitState};
use ferry::vcpu::VcpuState;
use flate2::Compression;
use flate2::read::GzDecoder;
use flate2::write::GzEncoder;
use serde_json::{Value, json};
use stream::{DeviceSection, Event, Expected, RamBlock, StreamReader};
use support::Machine;
use vmstate::VmState;

use crate::guest::{EXERCISER, bed};
use crate::inspect::golden;

const WRITE_VARIABLE: &str = "FERRY_WRITE_GOLDEN";
const COMMAND: &str = "FERRY_WRITE_GOLDEN=1 tests/run golden";

/// The folders of all versions, by name.
fn versions() -> Vec<PathBuf> {
    let entries =
        fs::read_dir(golden("")).expect("the folder is there").map(|entry| entry.expect("an entry").path());
    let is_ours =
        |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("ferry-"));
    let mut folders: Vec<_> = entries.filter(is_ours).collect();
    folders.sort();
    folders
}

/// The folder of the version that is being worked on.
fn current() -> PathBuf {
    golden(&format!("ferry-{}", env!("CARGO_PKG_VERSION")))
}

fn is_writing() -> bool {
    std::env::var_os(WRITE_VARIABLE).is_some_and(|value| value == "1")
}

fn schema_of(folder: &Path) -> Value {
    let path = folder.join("schema.json");
    let text =
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}: {COMMAND}", path.display()));
    serde_json::from_str(&text).expect("JSON")
}

/// The descriptions of a schema with their names.
fn sections(schema: &Value) -> Vec<(String, Value)> {
    let devices = schema["devices"].as_array().expect("devices").iter();
    let devices = devices.map(|device| (device["name"].as_str().expect("a name").to_owned(), device.clone()));
    [("configuration".to_owned(), schema["configuration"].clone())].into_iter().chain(devices).collect()
}

/// What is wrong with a build that writes `now`, when `release` wrote `then`; and what to do about it.
fn complaints(release: &str, then: &Value, now: &Value) -> Vec<String> {
    let now = sections(now);
    let mut complaints = Vec::new();
    for (name, then) in sections(then) {
        let Some((_, now)) = now.iter().find(|(known, _)| *known == name) else {
            complaints.push(format!(
                "section {name} of {release} is gone, so its files cannot be restored any more"
            ));
            continue;
        };
        let comparison = compare(&then, now).expect("two schemas");
        if comparison.differences.is_empty() {
            continue;
        }
        let (was, is) = (&then["version"], &now["version"]);
        let told = comparison.differences.join("\n    ");
        if was == is {
            complaints.push(format!(
                "the description of section {name} has changed since {release}, but its version is still {is}:\n    {told}\n  \
                 If {release} is released: set `version` of its #[vmstate] to one more and leave `oldest = {is}`; give each new field \
                 `since` with that version and a `default`, each field that is gone `until = {is}`, and a struct inside that has \
                 changed a version of its own, named in `versions`; then run: {COMMAND}\n  \
                 If {release} is not released yet, only run: {COMMAND}"
            ));
        } else if !comparison.old_in_new.is_empty() {
            complaints.push(format!(
                "section {name} version {is} does not load what {release} wrote as version {was}:\n    {}\n  \
                 Keep `oldest` at {was}, and say with `since`, `until`, `default` and `versions` what version {was} had.",
                comparison.old_in_new.join("\n    ")
            ));
        }
    }
    complaints
}

#[test]
fn a_changed_description_has_a_new_version() {
    let now = build_schema();
    if is_writing() {
        fs::create_dir_all(current()).expect("a folder can be made");
        let text = format!("{:#}\n", now);
        fs::write(current().join("schema.json"), text).expect("a file can be written");
    }
    let mut found = Vec::new();
    for folder in versions() {
        let release = folder.file_name().expect("a name").to_string_lossy().into_owned();
        found.extend(complaints(&release, &schema_of(&folder), &now));
    }
    assert!(found.is_empty(), "\n{}\n", found.join("\n"));
    let written = schema_of(&current());
    assert_eq!(
        written, now,
        "the golden schema of this version is not what this build writes; run: {COMMAND}"
    );
}

#[test]
fn changes_of_descriptions_are_told_with_what_to_do() {
    let then = build_schema();
    let changed = |change: &dyn Fn(&mut Value)| {
        let mut now = then.clone();
        let devices = now["devices"].as_array_mut().expect("devices");
        change(devices.iter_mut().find(|device| device["name"] == "rtc").expect("a clock"));
        complaints("ferry-0.0.1", &then, &now)
    };
    assert_eq!(changed(&|_| {}), Vec::<String>::new());
    let field = |since: u32| json!({ "name": "alarm", "type": "uint8", "size": 1, "since": since });
    let add = |rtc: &mut Value, since: u32| rtc["fields"].as_array_mut().expect("fields").push(field(since));

    let found = changed(&|rtc| add(rtc, 1));
    assert_eq!(found.len(), 1);
    for words in [
        "section rtc has changed since ferry-0.0.1",
        "version is still 1",
        "rtc.alarm: only in the new",
        "`since`",
        COMMAND,
    ] {
        assert!(found[0].contains(words), "{words:?} is missing: {}", found[0]);
    }
    let found = changed(&|rtc| {
        add(rtc, 2);
        rtc["version"] = json!(2);
    });
    assert_eq!(found, Vec::<String>::new(), "a new version that reads the old one");
    let found = changed(&|rtc| {
        add(rtc, 1);
        rtc["version"] = json!(2);
    });
    assert!(
        found[0].contains("rtc version 2 does not load what ferry-0.0.1 wrote as version 1"),
        "{found:?}"
    );
    let found = changed(&|rtc| rtc["fields"][0]["type"] = json!("uint16"));
    assert!(found[0].contains("type: uint8 -> uint16"), "{found:?}");
    let found = changed(&|rtc| rtc["name"] = json!("cmos"));
    assert_eq!(found, ["section rtc of ferry-0.0.1 is gone, so its files cannot be restored any more"]);
}

/// How a kind of section is read.
struct Kind {
    expect: fn(Expected, &str, u32) -> Expected,
    /// Loads it and saves it again, as the version of this build.
    resave: fn(&DeviceSection) -> (u32, Vec<u8>),
}

fn of<T: VmState>() -> Kind {
    Kind {
        expect: |expected, name, instance_id| expected.section::<T>(name, instance_id),
        resave: |section| {
            let state: T = section.load().unwrap_or_else(|error| panic!("{}: {error:?}", section.name));
            (T::VERSION, vmstate::to_bytes(&state))
        },
    }
}

/// By the last part of a section's name.
fn kind(name: &str) -> Option<Kind> {
    Some(match name.rsplit('/').next()? {
        "clock" => of::<ClockState>(),
        "cpu" => of::<VcpuState>(),
        "irqchip" => of::<IrqchipState>(),
        "pit" => of::<PitState>(),
        "serial" => of::<legacy::SerialState>(),
        "rtc" => of::<legacy::RtcState>(),
        "acpi-pm" => of::<legacy::AcpiPmState>(),
        "pci" => of::<pci::RootBusState>(),
        "virtio-rng" => of::<virtio::VirtioState>(),
        "nvme" => of::<nvme::NvmeState>(),
        _ => return None,
    })
}

/// Notes what is in a file.
#[derive(Default)]
struct Noted {
    sections: Vec<(String, u32)>,
    blocks: Vec<Block>,
    /// Of the first controller: slots of submission queues, empty and present.
    queues: Vec<bool>,
}

impl Visitor for Noted {
    fn ram(&mut self, blocks: &[Block], _rounds: u64) -> anyhow::Result<()> {
        self.blocks = blocks.to_vec();
        Ok(())
    }

    fn section(&mut self, section: &Section<'_>) -> anyhow::Result<()> {
        self.sections.push((section.name.to_owned(), section.instance_id));
        for field in section.state.fields()? {
            if let ("sq", stream::described::Value::Slots(slots)) = (field.name, &field.value) {
                self.queues = slots.iter().map(Option::is_some).collect();
            }
        }
        Ok(())
    }
}

#[test]
fn streams_of_every_version_keep_loading() {
    if is_writing() {
        write_machine();
    }
    assert!(versions().contains(&current()), "this version has no golden stream; run: {COMMAND}");
    for folder in versions() {
        let path = folder.join("machine.stream.gz");
        let packed = File::open(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let mut bytes = Vec::new();
        GzDecoder::new(packed).read_to_end(&mut bytes).expect("it can be unpacked");

        // What is in it, by its own description; then the same by the types of this build.
        let mut noted = Noted::default();
        let (contents, result) = Input::new(bytes.as_slice(), None).expect("a stream").walk(&mut noted);
        result.unwrap_or_else(|error| panic!("{}: {error:#}", path.display()));
        assert!(contents.verified, "the digests of {}", path.display());
        assert!(
            noted.queues.contains(&true) && noted.queues.contains(&false),
            "there are holes: {:?}",
            noted.queues
        );
        let blocks =
            noted.blocks.iter().map(|block| RamBlock::new(&block.name, block.length_bytes)).collect();
        let mut expected = engine::expect_file(Expected::new(blocks));
        for (name, instance_id) in &noted.sections {
            match kind(name) {
                Some(kind) => expected = (kind.expect)(expected, name, *instance_id),
                None => assert_eq!(name, "ferry", "a section without a type"),
            }
        }
        let mut reader = StreamReader::file(bytes.as_slice(), expected);
        let mut loaded = 0;
        loop {
            match reader.next_event().unwrap_or_else(|error| panic!("{}: {error:?}", path.display())) {
                Event::Device(section) => {
                    loaded += 1;
                    if let Some(kind) = kind(&section.name) {
                        let (version, again) = (kind.resave)(&section);
                        let same = version != section.version || again == section.payload;
                        assert!(same, "{} is saved as other bytes than it was loaded from", section.name);
                    }
                }
                Event::End => break,
                _ => {}
            }
        }
        assert_eq!(loaded, noted.sections.len());
        assert!(loaded > 10, "{:?}", noted.sections);
    }
}

/// Suspends a small machine into the golden file of this version.
fn write_machine() {
    let bed = bed();
    let machine = Machine::new("16M")
        .controller("serial=d0,queues=8")
        .image("d0", 1, &bed.image("a.img", 16 << 20))
        .namespace("controller=d0,nsid=9,backend=null,size=1G,ro");
    let options = "queues=2 inflight=4 doorbells=shadow completion=msix events=2";
    let mut vm = machine.boot(&bed, "golden", EXERCISER, options);
    vm.verifies(0, 500);
    let file = bed.path("golden.ferry");
    vm.migrate(&format!("file:{},layout=stream", file.display()));
    vm.migrated();
    vm.execute("quit", json!({}));
    vm.exit();
    let bytes = fs::read(file).expect("the file can be read");
    fs::create_dir_all(current()).expect("a folder can be made");
    let packed = File::create(current().join("machine.stream.gz")).expect("a file can be made");
    let mut packed = GzEncoder::new(packed, Compression::best());
    packed.write_all(&bytes).and_then(|()| packed.try_finish()).expect("it can be written");
}
