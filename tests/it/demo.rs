//! `ferry demo`, as whoever tries ferry for the first time meets it.

use std::path::Path;
use std::time::Duration;

use ferry::drive::Process;
use rustix::process::Signal;
use serde_json::Value;
use tempfile::TempDir;

use crate::guest::bed;

const WATCHDOG: Duration = Duration::from_secs(240);

/// Starts the demonstration with a temporary folder of its own.
fn start(folder: &TempDir, flags: &str) -> Process {
    let script =
        format!("TMPDIR={} exec {} demo {flags}", folder.path().display(), env!("CARGO_BIN_EXE_ferry"));
    Process::spawn("demo", Path::new("/bin/sh"), ["-c", &script]).expect("a shell starts")
}

fn entries(folder: &TempDir) -> usize {
    std::fs::read_dir(folder.path()).expect("the folder is there").count()
}

#[test]
fn the_demonstration_reports_a_move_and_leaves_nothing() {
    let _turn = bed();
    let folder = TempDir::new().unwrap();
    let mut demo = start(&folder, "--json");
    let exit = demo.wait(WATCHDOG).unwrap();
    assert!(exit.success(), "{}", demo.describe("badly ended"));
    let report: Value = serde_json::from_str(&demo.console.tail(1)).unwrap();
    for path in ["/verified/before", "/verified/after"] {
        assert!(report.pointer(path).and_then(Value::as_u64).unwrap() >= 1000, "{path} in {report}");
    }
    for path in
        ["/ram-checked/before", "/ram-checked/after", "/rounds", "/downtime/total", "/guest-gap/largest"]
    {
        assert!(report.pointer(path).and_then(Value::as_u64).unwrap() > 0, "{path} in {report}");
    }
    assert_eq!(entries(&folder), 0);
}

#[test]
fn an_interrupted_demonstration_leaves_nothing() {
    let _turn = bed();
    let folder = TempDir::new().unwrap();
    let mut demo = start(&folder, "");
    let number = |line: &str| line.split_once("in process ")?.1.split(':').next()?.parse::<u32>().ok();
    let (child, _) = demo.log.wait_for(0, WATCHDOG, number).expect("the demonstration says what runs");
    demo.signal(Signal::INT).unwrap();
    let exit = demo.wait(WATCHDOG).unwrap();
    assert_eq!(exit.code(), Some(1), "{}", demo.describe("not interrupted:"));
    assert!(demo.log.tail(1).contains("ended by signal 2"), "{}", demo.describe("not interrupted:"));
    assert_eq!(entries(&folder), 0);
    let command = std::fs::read_to_string(format!("/proc/{child}/cmdline")).unwrap_or_default();
    assert!(!command.contains("source.api"), "process {child} is left: {command}");
}

#[test]
fn the_guest_can_be_exported() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("exerciser.elf");
    let exit = start(&folder, &format!("--export-guest {}", path.display())).wait(WATCHDOG).unwrap();
    assert!(exit.success());
    assert!(std::fs::read(path).unwrap().starts_with(b"\x7fELF"));
}
