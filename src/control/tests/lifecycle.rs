//! The socket file, and how a server ends.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use serde_json::json;

use super::*;

#[test]
fn the_socket_is_its_owners_alone_and_goes_away() {
    let mut setup = Setup::new();
    assert_eq!(fs::metadata(&setup.path).unwrap().permissions().mode() & 0o777, 0o600);
    let mut raw = setup.negotiated();
    setup.server = None;
    assert!(!setup.path.exists());
    assert_eq!(raw.read(), Value::Null);
}

#[test]
fn a_living_socket_and_another_file_are_left_alone() {
    let setup = Setup::new();
    let again = Server::start(&setup.path, setup.machine.clone(), setup.events.clone());
    assert!(matches!(again, Err(Error::Listen(_))));
    setup.negotiated();

    let file = setup.path.with_extension("file");
    fs::write(&file, "contents").unwrap();
    assert!(Server::start(&file, setup.machine.clone(), setup.events.clone()).is_err());
    assert_eq!(fs::read_to_string(&file).unwrap(), "contents");
}

#[test]
fn the_answer_to_quit_and_the_event_leave_before_the_end() {
    for _ in 0..20 {
        let mut setup = Setup::new();
        let (mut raw, mut other) = (setup.negotiated(), setup.negotiated());
        raw.send(br#"{"execute":"quit"}"#);
        let event = raw.read();
        setup.server = None;
        assert_eq!(event["event"], "SHUTDOWN");
        assert_eq!(event["data"], json!({ "guest": false, "reason": "host-qmp-quit" }));
        assert_eq!(raw.read(), json!({ "return": {} }));
        assert_eq!(raw.read(), Value::Null);
        assert_eq!(other.read()["event"], "SHUTDOWN");
        assert_eq!(other.read(), Value::Null);
    }
}

#[test]
fn a_client_that_does_not_read_does_not_keep_the_server_from_ending() {
    let mut setup = Setup::new();
    let mut slow = setup.negotiated();
    slow.stream.get_ref().set_nonblocking(true).unwrap();
    while slow.stream.get_mut().write_all(br#"{"execute":"query-status"}"#).is_ok() {}
    setup.server = None;
    assert!(!setup.path.exists());
}
