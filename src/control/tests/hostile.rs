//! Clients that mean harm, or break.

use std::net::Shutdown;

use super::super::protocol::MAX_REQUEST_BYTES;
use super::super::server::MAX_CLIENTS;
use super::super::session::QUEUED_LINES;
use super::*;

const QUERY: &str = r#"{"execute":"query-status"}"#;

fn works(setup: &Setup) {
    assert_eq!(setup.negotiated().ask(QUERY)["return"]["status"], "running");
}

#[test]
fn bytes_that_are_no_json_are_answered() {
    let setup = Setup::new();
    let mut raw = setup.negotiated();
    for bytes in [
        &b"{]"[..],
        b"{\"execute\":\"query-status\" \"x\"}",
        b"{\"execute\":\"\xff\xfe\"}",
        b"{\"a\":\"\x00\"}",
        b"\x80\n",
        b"nonsense\n",
        b"}",
        b"{\"execute\":\"query-status\",\"id\":1e999}",
        b"{\"execute\":\"\\ud800\"}",
    ] {
        raw.send(bytes);
        let answer = raw.read();
        assert_eq!(answer["error"]["class"], "GenericError", "{bytes:?}");
        assert!(answer["error"]["desc"].as_str().unwrap().starts_with("JSON parse error"), "{answer}");
    }
    // And the client is still served.
    assert_eq!(raw.ask(QUERY)["return"]["status"], "running");
}

#[test]
fn deep_nesting_does_not_end_the_stack() {
    let setup = Setup::new();
    let mut raw = setup.negotiated();
    let depth = MAX_REQUEST_BYTES / 2;
    raw.send("[".repeat(depth).as_bytes());
    raw.send("]".repeat(depth).as_bytes());
    assert_eq!(raw.read()["error"]["class"], "GenericError");
    assert_eq!(raw.ask(QUERY)["return"]["status"], "running");
}

#[test]
fn a_request_of_the_greatest_length_is_served_and_a_longer_one_ends_the_connection() {
    let setup = Setup::new();
    let mut raw = setup.negotiated();
    let padding = MAX_REQUEST_BYTES - QUERY.len();
    raw.send(&QUERY.as_bytes()[..1]);
    raw.send(" ".repeat(padding).as_bytes());
    assert_eq!(raw.ask(&QUERY[1..])["return"]["status"], "running");

    raw.send(&QUERY.as_bytes()[..1]);
    raw.send(" ".repeat(MAX_REQUEST_BYTES).as_bytes());
    let refusal = raw.read();
    assert_eq!(refusal["error"]["desc"], format!("a request is longer than {MAX_REQUEST_BYTES} bytes"));
    assert_eq!(raw.read(), Value::Null);
    works(&setup);
}

#[test]
fn half_a_request_and_a_lost_connection_do_nothing() {
    let setup = Setup::new();
    setup.negotiated().send(br#"{"execute":"st"#);
    setup.raw().send(br#"{"execute":"qmp_capabilities"}{"execute":"stop""#);
    drop(setup.raw());
    works(&setup);
    assert_eq!(setup.machine.asked(), Vec::<String>::new());
}

#[test]
fn requests_sent_before_closing_are_answered() {
    let setup = Setup::new();
    let mut raw = setup.raw();
    raw.send(format!("{{\"execute\":\"qmp_capabilities\"}}{QUERY}").as_bytes());
    raw.stream.get_ref().shutdown(Shutdown::Write).unwrap();
    assert!(raw.read().get("QMP").is_some());
    assert!(raw.read().get("return").is_some());
    assert_eq!(raw.read()["return"]["status"], "running");
    assert_eq!(raw.read(), Value::Null);
}

#[test]
fn a_client_that_does_not_read_loses_its_connection_and_nobody_waits() {
    let setup = Setup::new();
    let mut slow = setup.negotiated();
    let mut quick = setup.negotiated();
    // More than the queue and the socket's buffer (some 200 KiB) hold. None of these calls may wait for `slow`.
    let rounds = QUEUED_LINES + 10_000;
    for _ in 0..rounds {
        setup.events.emit(Event::Stop);
        assert_eq!(quick.read()["event"], "STOP");
    }
    assert_eq!(quick.ask(QUERY)["return"]["status"], "running");
    let mut read = 0;
    while slow.stream.read_line(&mut String::new()).unwrap() > 0 {
        read += 1;
    }
    assert!(read >= QUEUED_LINES && read < rounds, "{read} of {rounds}");
}

#[test]
fn a_client_that_asks_and_does_not_read_holds_up_only_itself() {
    let setup = Setup::new();
    let mut slow = setup.negotiated();
    slow.stream.get_ref().set_nonblocking(true).unwrap();
    // Until its requests are not taken any more: its answers have filled the queue and the socket.
    while slow.stream.get_mut().write_all(QUERY.repeat(16).as_bytes()).is_ok() {}
    works(&setup);
    setup.events.emit(Event::Stop);
    works(&setup);
}

#[test]
fn no_more_clients_than_the_limit_and_a_place_is_free_again() {
    let setup = Setup::new();
    let mut clients: Vec<_> = (0..MAX_CLIENTS).map(|_| setup.negotiated()).collect();
    assert_eq!(setup.raw().read(), Value::Null);
    let mut last = clients.pop().unwrap();
    last.stream.get_ref().shutdown(Shutdown::Write).unwrap();
    assert_eq!(last.read(), Value::Null);
    drop(last);
    // The place is free once the server has noticed.
    while setup.raw().read().is_null() {
        std::thread::yield_now();
    }
}
