//! The control socket of a real machine.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use ferry::drive::Process;
use serde_json::json;
use support::WATCHDOG;

use crate::guest::{EXERCISER, bed, begins, one_disk};

#[test]
fn a_machine_is_stopped_continued_and_ended_by_its_socket() {
    let bed = bed();
    let mut vm = one_disk(&bed).boot(&bed, "vm", EXERCISER, "queues=1");
    let mode = bed.path("vm.api").metadata().expect("the socket is there").permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let before = vm.verifies(0, 100);
    let status = vm.execute("query-status", json!({}));
    assert_eq!((&status["status"], &status["running"]), (&json!("running"), &json!(true)), "{status}");

    vm.execute("stop", json!({}));
    vm.event("STOP");
    let status = vm.execute("query-status", json!({}));
    assert_eq!((&status["status"], &status["running"]), (&json!("paused"), &json!(false)), "{status}");

    vm.execute("cont", json!({}));
    vm.event("RESUME");
    vm.verifies(before.verified, 1000);

    assert!(vm.refused("migrate", json!({ "uri": "nowhere" })).contains("nowhere"));
    assert!(vm.refused("no-such-command", json!({})).contains("no-such-command"));

    vm.execute("quit", json!({}));
    let event = vm.event("SHUTDOWN");
    assert_eq!(event["data"], json!({ "guest": false, "reason": "host-qmp-quit" }));
    assert_eq!(vm.exit().code(), Some(0));
    assert_eq!(bed.files(), ["a.img", "a.img.ferry-lease"]);
}

#[test]
fn a_guest_is_reset_by_the_socket_and_stays_paused_if_it_was() {
    let bed = bed();
    let mut vm = one_disk(&bed).boot(&bed, "vm", EXERCISER, "queues=1");
    vm.verifies(0, 1000);
    vm.execute("system_reset", json!({}));
    begins(&vm, 2);

    vm.execute("stop", json!({}));
    vm.execute("system_reset", json!({}));
    assert_eq!(vm.execute("query-status", json!({}))["status"], "paused");
    vm.execute("cont", json!({}));
    begins(&vm, 3);
    vm.finish();
}

/// `ferry limits | head -1`, whose reader goes away first.
#[test]
fn words_that_nobody_reads_are_no_failure() {
    let bed = bed();
    let vm = one_disk(&bed).boot(&bed, "vm", EXERCISER, "queues=1");
    let api = bed.path("vm.api").display().to_string();
    for words in ["limits", "limits --json", "status", "stop", "stop --json", "cont"] {
        let (reader, writer) = std::io::pipe().expect("a pipe");
        drop(reader);
        let mut command = Command::new(bed.program());
        command.args(words.split(' ')).args(["--api", &api]).stdout(writer).stderr(Stdio::piped());
        let output = command.output().expect("ferry starts");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && said.is_empty(), "{words}: {}: {said}", output.status);
    }
    // Nor is anything else lost: the guest is not here to be moved to nowhere, and the status says so.
    let (reader, writer) = std::io::pipe().expect("a pipe");
    drop(reader);
    let mut command = Command::new(bed.program());
    let nowhere = format!("unix:{}", bed.path("nowhere").display());
    command.args(["migrate", "--api", &api, &nowhere]).stderr(writer);
    assert_eq!(command.output().expect("ferry starts").status.code(), Some(1));
    vm.finish();
}

/// As scripts of QEMU's users have it.
#[test]
fn the_python_package_of_qemu_moves_a_guest() {
    let bed = bed();
    let machine = one_disk(&bed);
    let mut source = machine.boot(&bed, "source", EXERCISER, "queues=1");
    let before = source.verifies(0, 100);
    let mut destination = machine.expect(&bed, "destination", &format!("unix:{}", bed.path("to").display()));
    let run = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/support/qmp/run");
    let sockets = ["source.api", "destination.api"].map(|name| bed.path(name).display().to_string());
    let [from, to] = sockets.each_ref().map(String::as_str);
    let mut script =
        Process::spawn("script", &run, ["migration.py", from, to, destination.uri()]).expect("bash");
    let exit = script.wait(WATCHDOG).unwrap_or_else(|error| panic!("{error}"));
    assert!(exit.success(), "{}", script.describe("not content:"));
    assert_eq!(source.exit().code(), Some(0));
    let arrived = destination.progress("the guest at the destination", |_| true);
    assert!(arrived.verified >= before.verified, "{arrived}");
    destination.verifies(arrived.verified, 100);
    destination.finish();
}
