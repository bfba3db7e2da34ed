//! Our own client.

use std::os::unix::net::UnixListener;
use std::thread;

use serde_json::{Value, json};

use super::*;

#[test]
fn asks_and_hears_events_in_between() {
    let setup = Setup::new();
    let mut client = Client::connect(&setup.path).unwrap();
    assert_eq!(
        client.execute("query-status", json!({})).unwrap(),
        json!({ "running": true, "status": "running" })
    );
    client.execute("stop", json!({})).unwrap();
    assert_eq!(client.event(WATCHDOG).unwrap().unwrap()["event"], "STOP");
    assert_eq!(client.event(Duration::from_millis(1)).unwrap(), None);
    let status: FerryStatus = client.query("x-ferry-status").unwrap();
    assert_eq!(status, setup.machine.ferry_status());
    setup.events.emit(Event::Resume);
    assert_eq!(client.event(WATCHDOG).unwrap().unwrap()["event"], "RESUME");
}

#[test]
fn a_refusal_names_the_command_and_the_reason() {
    let setup = Setup::new();
    setup.machine.set(|state| state.run_state = RunState::Postmigrate);
    let error = Client::connect(&setup.path).unwrap().execute("cont", json!({})).unwrap_err();
    assert_eq!(error.to_string(), "cont was refused: the guest runs elsewhere");
}

#[test]
fn the_end_of_the_server_is_an_error_and_not_a_wait() {
    let mut setup = Setup::new();
    let mut client = Client::connect(&setup.path).unwrap();
    setup.server = None;
    assert!(matches!(client.event(WATCHDOG), Err(Error::Closed { .. })));
    assert!(matches!(Client::connect(&setup.path), Err(Error::Connect { .. })));
}

#[test]
fn a_server_that_is_none_is_named() {
    for (greeting, detail) in [("{}\n", "no greeting"), ("SSH-2.0\n", "expected value")] {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let server = thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.write_all(greeting.as_bytes()).unwrap();
        });
        let error = Client::connect(&path).unwrap_err();
        server.join().unwrap();
        assert!(matches!(&error, Error::NotQmp { detail: found, .. } if found.contains(detail)), "{error}");
    }
}

/// QEMU's `getfd`: what came with a request is a name's for the connection that it came on, once.
#[test]
fn a_descriptor_that_is_given_can_be_used_once_and_by_its_giver_only() {
    let setup = Setup::new();
    let mut client = Client::connect(&setup.path).unwrap();
    let refused = |client: &mut Client, command: &str, arguments: Value| {
        client.execute(command, arguments).unwrap_err().to_string()
    };
    let name = json!({ "fdname": "way" });
    assert!(refused(&mut client, "getfd", name.clone()).contains("No file descriptor supplied"));
    let (mut far, near) = std::os::unix::net::UnixStream::pair().unwrap();
    client.give(&near, "way").unwrap();
    drop(near);
    let target = json!({ "uri": "fd:way" });
    let mut other = Client::connect(&setup.path).unwrap();
    assert!(refused(&mut other, "migrate", target.clone()).contains("'way' not found"));
    std::io::Write::write_all(&mut far, b"steps").unwrap();
    far.shutdown(std::net::Shutdown::Write).unwrap();
    client.execute("migrate", target.clone()).unwrap();
    assert_eq!(setup.machine.asked(), ["migrate fd:way where one hears steps"]);
    assert!(refused(&mut client, "migrate", target).contains("'way' not found"));

    client.give(&far, "way").unwrap();
    client.execute("closefd", name.clone()).unwrap();
    assert!(refused(&mut client, "closefd", name).contains("'way' not found"));
    let error = client.give(&far, "7th").unwrap_err().to_string();
    assert!(error.contains("a name not starting with a digit"), "{error}");
    for number in 0..16 {
        client.give(&far, &format!("n{number}")).unwrap();
    }
    let error = client.give(&far, "one-more").unwrap_err().to_string();
    assert!(error.contains("16 file descriptors are there already"), "{error}");
    client.give(&far, "n3").unwrap();
}
