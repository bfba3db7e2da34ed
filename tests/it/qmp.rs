//! The control socket of a real machine.

use std::os::unix::fs::PermissionsExt;

use serde_json::json;

use crate::guest::{EXERCISER, bed, one_disk};

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
