//! `ferry inspect` on files of ours and of QEMU's.

use std::ffi::OsStr;
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;

use ferry::drive::Process;
use flate2::read::GzDecoder;
use serde_json::{Value, json};
use support::WATCHDOG;

use crate::guest::{EXERCISER, bed, many_disks};

/// What `ferry inspect` answered.
#[derive(Debug)]
pub struct Answer {
    pub code: Option<i32>,
    pub output: String,
    pub error: String,
}

impl Answer {
    /// Its output as JSON.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.output).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }
}

/// Runs `ferry inspect`.
pub fn inspect<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Answer {
    let output = Command::new(env!("CARGO_BIN_EXE_ferry")).arg("inspect").args(arguments).output();
    let output = output.expect("ferry starts");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("text");
    Answer { code: output.status.code(), output: text(output.stdout), error: text(output.stderr) }
}

/// The same, where it must succeed.
pub fn inspected<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Answer {
    let answer = inspect(arguments);
    assert_eq!((answer.code, answer.error.as_str()), (Some(0), ""), "{}", answer.output);
    answer
}

/// The same, where it must fail; what it says.
fn refused<A: AsRef<OsStr>>(arguments: impl IntoIterator<Item = A>) -> Answer {
    let answer = inspect(arguments);
    assert_eq!(answer.code, Some(1), "{answer:?}");
    assert!(answer.error.starts_with("ferry: ") && answer.error.lines().count() == 1, "{answer:?}");
    answer
}

pub fn arguments<'a>(file: &'a Path, more: &'a [&'a str]) -> Vec<&'a OsStr> {
    std::iter::once(file.as_os_str()).chain(more.iter().map(OsStr::new)).collect()
}

pub fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name)
}

fn lines_with<'a>(text: &'a str, word: &str) -> Vec<&'a str> {
    text.lines().filter(|line| line.contains(word)).collect()
}

#[test]
fn a_suspended_guest_is_printed_verified_and_compared() {
    let bed = bed();
    // The first page of a huge one may be of zeros, and it is a page with contents that is damaged below.
    let machine = many_disks(&bed).switch("--hugepages=off");
    let options = "queues=4 inflight=16 doorbells=shadow completion=msix";
    let mut vm = machine.boot(&bed, "before", EXERCISER, options);
    vm.verifies(0, 500);
    let file = bed.path("first.ferry");
    vm.migrate(&format!("file:{},layout=stream", file.display()));
    vm.migrated();
    vm.execute("quit", json!({}));
    vm.exit();

    let tree = inspected([&file]).output;
    assert!(tree.starts_with("machine ferry\nsection ferry instance 0 "), "{tree}");
    assert_eq!(lines_with(&tree, "section 0000:00:02.0/nvme instance 0 version 2: ").len(), 1, "{tree}");
    // Eight queues and the admin queue, of which the guest uses four; namespaces 1, 4 and 9.
    assert!(lines_with(&tree, "9 slots, 5 present").len() >= 2, "{tree}");
    assert!(!lines_with(&tree, "  [5-8]  empty").is_empty(), "{tree}");
    assert!(!lines_with(&tree, "  ram-low ").is_empty(), "{tree}");
    let last = tree.lines().last().expect("a line");
    assert!(last.starts_with("the digests of ") && last.ends_with(" MiB of RAM agree"), "{last}");

    let document = inspected(arguments(&file, &["--format", "json", "--section", "nvme"])).json();
    assert_eq!(
        (&document["verified"], &document["configuration"]["machine"]),
        (&json!(true), &json!("ferry"))
    );
    let names: Vec<_> =
        document["sections"].as_array().expect("sections").iter().map(|one| &one["name"]).collect();
    assert_eq!(names, ["0000:00:02.0/nvme", "0000:00:03.0/nvme"]);
    let fields = document["sections"][0]["state"]["fields"].as_array().expect("fields");
    let field = |name: &str| &fields.iter().find(|field| field["name"] == name).expect("a field")["value"];
    let present = |name: &str| -> Vec<usize> {
        let slots = field(name).as_array().expect("slots").iter().enumerate();
        slots.filter(|(_, slot)| !slot.is_null()).map(|(index, _)| index).collect()
    };
    assert_eq!(present("sq"), [0, 1, 2, 3, 4]);
    assert_eq!(present("namespaces"), [0, 3, 8]);
    let pages = document["ram"]["blocks"][0]["pages"].as_u64().expect("a number");
    assert!(pages > 50, "{}", document["ram"]);

    let whole = inspected(arguments(&file, &["--verify"])).output;
    assert_eq!(whole.trim_end(), last);
    damaged_files_say_where(&file, &document, &bed.path("damaged.ferry"));

    // The same guest, later.
    let incoming = machine.clone().flag("--incoming", format!("file:{}", file.display()));
    let mut vm = support::Vm::start(&bed, "after", incoming.flags().to_vec());
    // It had verified more than it had said when it was stopped: what counts is what it does after its first line here.
    let arrived = vm.progress("the guest that was restored", |_| true).verified;
    vm.verifies(arrived, 500);
    let later = bed.path("later.ferry");
    vm.migrate(&format!("file:{},layout=stream", later.display()));
    vm.migrated();
    vm.execute("quit", json!({}));
    vm.exit();
    let same = inspected([OsStr::new("--diff"), file.as_os_str(), file.as_os_str()]);
    assert_eq!(same.output, "");
    let differ = refused([OsStr::new("--diff"), file.as_os_str(), later.as_os_str()]);
    let differences = &differ.output;
    assert!(differences.contains("ferry: generation: 1 -> 2\n"), "{differences}");
    assert!(differences.starts_with("RAM ram-low: "), "{differences}");
    // Any one queue may by chance stand where it stood, as it is a ring; hardly all of them.
    let moved =
        |queue: usize| !lines_with(differences, &format!("0000:00:02.0/nvme: sq[{queue}].")).is_empty();
    assert!((1..=4).any(moved), "{differences}");
    assert!(lines_with(differences, "only in").is_empty(), "the machines are alike: {differences}");
    assert!(differ.error.contains(" differ in "), "{}", differ.error);
}

/// One changed byte, in a page and in a section, is found and named.
fn damaged_files_say_where(file: &Path, document: &Value, damaged: &Path) {
    let whole = fs::read(file).expect("the file can be read");
    let section = document["sections"][0]["offset"].as_u64().expect("an offset") as usize;
    let cases = [
        (section + 2, "section \"0000:00:02.0/nvme\" is damaged"),
        (middle_of_a_page(&whole), " of RAM block \"ram-low\""),
    ];
    for (at, named) in cases {
        let mut bytes = whole.clone();
        bytes[at] ^= 0x10;
        fs::write(damaged, &bytes).expect("a file can be written");
        let answer = refused(arguments(damaged, &["--verify"]));
        assert!(answer.error.contains(named), "byte {at}: {}", answer.error);
        let printed = refused([damaged]);
        assert!(printed.output.contains("section clock instance 0"), "all is printed: {}", printed.output);
        assert_eq!(printed.error, answer.error);
        let told = refused(arguments(damaged, &["--format", "json"])).json();
        assert!(told["error"].as_str().is_some_and(|error| error.contains(named)), "{}", told["error"]);
    }
    fs::write(damaged, &whole[..whole.len() / 2]).expect("a file can be written");
    let answer = refused(arguments(damaged, &["--verify"]));
    assert!(answer.error.contains(&format!("ends at byte {}", whole.len() / 2)), "{}", answer.error);
}

/// The middle of a page of RAM. The first page that a part of the RAM section has of a block follows flags and the block's name: be64
/// (offset | flags), of which `0x08` is a page, u8 length + name.
fn middle_of_a_page(file: &[u8]) -> usize {
    const NAME: &[u8] = b"\x07ram-low";
    let named = |&start: &usize| file[start..].starts_with(NAME) && file[start - 1] & 0x08 != 0;
    (8..file.len()).find(named).expect("a page") + NAME.len() + 2048
}

#[test]
fn fixtures_of_qemu_11_are_printed() {
    let folder = tempfile::tempdir().expect("a folder");
    let packed = golden("qemu-11.1.3/devices-only.stream.gz");
    let answer = refused([&packed]);
    assert!(answer.error.contains("gunzip"), "{}", answer.error);
    let mut bytes = Vec::new();
    let mut packed = GzDecoder::new(fs::File::open(packed).expect("the fixture is there"));
    packed.read_to_end(&mut bytes).expect("it can be unpacked");
    let file = folder.path().join("devices-only.stream");
    fs::write(&file, bytes).expect("a file can be written");
    let tree = inspected([&file]).output;
    assert!(tree.starts_with("machine pc-q35-11.1\n"), "{tree}");
    assert_eq!(lines_with(&tree, "section ").iter().filter(|line| line.starts_with("section ")).count(), 32);
    assert!(!lines_with(&tree, "65 slots, 2 present").is_empty(), "{tree}");
    let answer = refused(arguments(&file, &["--verify"]));
    assert!(answer.error.contains("holds no digests"), "{}", answer.error);
    let answer = refused(arguments(&file, &["--section", "nothing"]));
    assert!(answer.error.contains("there is no section nothing; there are apic, timer"), "{}", answer.error);
    let schema = inspected(arguments(&file, &["--schema", "--section", "nvme"])).json();
    assert_eq!(schema["devices"][0]["name"], "0000:00:01.0/nvme");

    for (name, slots) in [("firmware", "65 slots, 2 present"), ("linux", "9 slots, 3 present")] {
        let section = golden(&format!("qemu-11.1.3/nvme-{name}.section"));
        let description = golden(&format!("qemu-11.1.3/nvme-{name}.vmdesc.json")).display().to_string();
        let tree = inspected(arguments(&section, &["--description", &description])).output;
        assert_eq!(lines_with(&tree, slots).len(), 2, "submission and completion queues: {tree}");
        let answer = refused([&section]);
        assert!(answer.error.contains("--description"), "{}", answer.error);
    }
}

/// Lets an installed QEMU write a stream of a machine that has not begun to run. Returns QEMU's version.
fn qemu_writes(stream: &Path) -> String {
    let arguments = ["-M", "q35", "-accel", "tcg", "-m", "32M", "-S", "-display", "none", "-qmp", "stdio"];
    let program = Path::new("qemu-system-x86_64");
    let mut qemu = Process::spawn("qemu", program, arguments)
        .unwrap_or_else(|error| panic!("{error:#}: resources/setup installs it"));
    let mut next = 0;
    let mut wait = |qemu: &Process, what: &str, wanted: &dyn Fn(&Value) -> bool| -> Value {
        let wanted = |line: &str| serde_json::from_str(line).ok().filter(|value| wanted(value));
        let (value, after) =
            qemu.wait_for_line(what, next, WATCHDOG, wanted).unwrap_or_else(|error| panic!("{error:#}"));
        next = after;
        value
    };
    let greeting = wait(&qemu, "a greeting", &|value| value.get("QMP").is_some());
    let events = json!([{ "capability": "events", "state": true }]);
    for (command, arguments) in [
        ("qmp_capabilities", json!({})),
        ("migrate-set-capabilities", json!({ "capabilities": events })),
        ("migrate", json!({ "uri": format!("exec:cat >'{}'", stream.display()) })),
    ] {
        qemu.type_in(&format!("{}\n", json!({ "execute": command, "arguments": arguments })))
            .expect("it listens");
        wait(&qemu, command, &|value| value.get("return").is_some());
    }
    let ended = |value: &Value| {
        value["event"] == "MIGRATION"
            && ["completed", "failed"].contains(&value["data"]["status"].as_str().unwrap_or_default())
    };
    let end = wait(&qemu, "the end of its migration", &ended);
    assert_eq!(end["data"]["status"], "completed");
    qemu.type_in(&format!("{}\n", json!({ "execute": "quit" }))).expect("it listens");
    assert_eq!(qemu.wait(WATCHDOG).expect("it ends").code(), Some(0));
    let version = &greeting["QMP"]["version"]["qemu"];
    format!("{}.{}.{}", version["major"], version["minor"], version["micro"])
}

#[test]
fn a_stream_that_an_installed_qemu_writes_is_printed() {
    let folder = tempfile::tempdir().expect("a folder");
    let stream = folder.path().join("qemu.stream");
    let version = qemu_writes(&stream);
    println!("measured: the stream is QEMU's {version}");
    let tree = inspected([&stream]).output;
    assert!(tree.starts_with("machine pc-q35-"), "{tree}");
    let ram = lines_with(&tree, "  pc.ram ");
    assert!(ram.len() == 1 && ram[0].contains(" 33554432 bytes "), "{tree}");
    for section in ["cpu", "0000:00:00.0/mch", "mc146818rtc", "i8254"] {
        assert_eq!(
            lines_with(&tree, &format!("section {section} instance 0 ")).len(),
            1,
            "{section}: {tree}"
        );
    }
    let document = inspected(arguments(&stream, &["--format", "json"])).json();
    let sections = document["sections"].as_array().expect("sections");
    let schema = inspected(arguments(&stream, &["--schema"])).json();
    assert_eq!(sections.len(), schema["devices"].as_array().expect("devices").len());
    let cpu = sections.iter().find(|section| section["name"] == "cpu").expect("a processor");
    let eip =
        cpu["state"]["fields"].as_array().expect("fields").iter().find(|field| field["name"] == "env.eip");
    assert_eq!(eip.expect("a field")["value"], 0xfff0, "nothing has run");
    assert_eq!(document["ram"]["blocks"][0]["length_bytes"], 32 << 20);

    // A byte of the processor's footer.
    let mut bytes = fs::read(&stream).expect("the stream can be read");
    let end = cpu["offset"].as_u64().expect("a number") + cpu["size"].as_u64().expect("a number");
    bytes[end as usize] ^= 1;
    fs::write(&stream, bytes).expect("a file can be written");
    let answer = refused([&stream]);
    assert!(answer.error.contains(&format!("at byte {end}, not by its footer")), "{}", answer.error);
}

#[test]
fn compatibility_is_told_in_both_directions() {
    let folder = tempfile::tempdir().expect("a folder");
    let write = |name: &str, schema: &Value| {
        let path = folder.path().join(name);
        fs::write(&path, schema.to_string()).expect("a file can be written");
        path
    };
    let ours = inspected(["--schema"]).json();
    let old = write("old.json", &ours);
    let check = |a: &Path, b: &Path| inspect([OsStr::new("--check-compat"), a.as_os_str(), b.as_os_str()]);
    let same = check(&old, &old);
    assert_eq!(same.code, Some(0), "{same:?}");
    assert!(same.output.starts_with("no difference\n"), "{}", same.output);

    let mut newer = ours.clone();
    let devices = newer["devices"].as_array_mut().expect("devices");
    let rtc = devices.iter_mut().find(|device| device["name"] == "rtc").expect("a clock");
    let version = rtc["version"].as_u64().expect("a version");
    rtc["version"] = json!(version + 1);
    let added = json!({ "name": "alarm", "type": "uint8", "size": 1, "since": version + 1 });
    rtc["fields"].as_array_mut().expect("fields").push(added);
    let new = write("new.json", &newer);
    let forwards = check(&old, &new);
    assert_eq!(forwards.code, Some(0), "{forwards:?}");
    assert!(forwards.output.contains("rtc.alarm: only in the new schema\n"), "{}", forwards.output);
    assert!(forwards.output.contains("streams of the old schema load in the new one: yes\n"));
    assert!(forwards.output.contains("streams of the new schema load in the old one: no\n"));
    let backwards = check(&new, &old);
    assert_eq!(backwards.code, Some(1), "{backwards:?}");
    assert!(backwards.error.contains("new.json do not load in "), "{}", backwards.error);

    // The same without a new version.
    let rtc =
        newer["devices"].as_array_mut().expect("devices").iter_mut().find(|device| device["name"] == "rtc");
    let rtc = rtc.expect("a clock");
    rtc["version"] = json!(version);
    rtc["fields"].as_array_mut().expect("fields").last_mut().expect("a field")["since"] = json!(version);
    let wrong = write("wrong.json", &newer);
    for (a, b, reason) in [
        (&old, &wrong, "rtc.alarm: it is read, but not written"),
        (&wrong, &old, "rtc.alarm: it is written, but not read"),
    ] {
        let answer = check(a, b);
        assert_eq!(answer.code, Some(1), "{answer:?}");
        assert!(answer.output.contains(reason), "{}", answer.output);
    }
    let answer = inspect([
        OsStr::new("--format=json"),
        OsStr::new("--check-compat"),
        old.as_os_str(),
        wrong.as_os_str(),
    ]);
    assert_eq!(answer.json()["old_in_new"]["loads"], false);
}

#[test]
fn output_that_nobody_reads_to_its_end_is_no_error() {
    let command = format!("'{}' inspect --schema | head -n 1", env!("CARGO_BIN_EXE_ferry"));
    let output =
        Command::new("bash").args(["-o", "pipefail", "-c", &command]).output().expect("a shell starts");
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(0), b"{\n".as_slice()), "{output:?}");
}
