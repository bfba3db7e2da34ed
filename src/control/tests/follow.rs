//! A client that migrates, against a machine whose migration goes as the test says.

use std::os::unix::net::UnixListener;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use super::*;

fn request() -> MigrateRequest {
    MigrateRequest {
        uri: "unix:/there".to_owned(),
        limits: Limits {
            downtime_limit: Some(20),
            channels: Some(3),
            compress: Some(MultifdCompression::Zstd),
            ..Limits::default()
        },
        tls_dir: Some("/keys".into()),
        ..MigrateRequest::default()
    }
}

/// Migrates while `scenario` sees each report and changes the machine.
fn migrate(setup: &Setup, cancel: &AtomicBool, scenario: impl FnMut(&MigrationInfo)) -> Finished {
    Client::connect(&setup.path).unwrap().migrate(&request(), cancel, scenario).unwrap()
}

fn reach(setup: &Setup, info: MigrationInfo) {
    let status = info.status;
    setup.machine.set(|state| state.migration = Some(info));
    setup.events.emit(Event::Migration { status });
}

#[test]
fn a_migration_is_followed_to_its_end() {
    let setup = Setup::new();
    let mut seen = Vec::new();
    let finished = migrate(&setup, &AtomicBool::new(false), |info| {
        seen.push(info.status);
        match info.status {
            MigrationStatus::Setup => reach(&setup, MigrationInfo::new(MigrationStatus::Active)),
            MigrationStatus::Active => reach(&setup, MigrationInfo::new(MigrationStatus::Device)),
            MigrationStatus::Device => {
                let info = MigrationInfo::new(MigrationStatus::Completed);
                reach(&setup, MigrationInfo { downtime: Some(9), ..info });
            }
            _ => {}
        }
    });
    assert_eq!(finished.info.downtime, Some(9));
    use MigrationStatus::{Active, Completed, Device, Setup as Begun};
    assert_eq!(seen, [Begun, Active, Device, Completed]);
    assert_eq!(setup.machine.asked(), ["migrate unix:/there with /keys"]);
    // What was not asked for stays.
    assert_eq!(
        setup.machine.migration_parameters(),
        MigrationParameters {
            downtime_limit: 20,
            multifd_channels: 3,
            multifd_compression: MultifdCompression::Zstd,
            ..MigrationParameters::default()
        }
    );
}

#[test]
fn the_memory_itself_goes_only_where_that_is_wanted() {
    let setup = Setup::new();
    for local in [true, false] {
        let request = MigrateRequest { local, ..request() };
        let ends = |info: &MigrationInfo| {
            if !info.status.is_final() {
                reach(&setup, MigrationInfo::new(MigrationStatus::Completed));
            }
        };
        setup.machine.set(|state| state.migration = None);
        Client::connect(&setup.path).unwrap().migrate(&request, &AtomicBool::new(false), ends).unwrap();
    }
    assert_eq!(
        setup.machine.asked(),
        ["migrate unix:/there with /keys locally", "migrate unix:/there with /keys"]
    );
}

#[test]
fn a_failure_comes_with_the_machines_reason() {
    let setup = Setup::new();
    let reason = Some("the destination has fewer queues".to_owned());
    let finished = migrate(&setup, &AtomicBool::new(false), |info| {
        if info.status == MigrationStatus::Setup {
            let info = MigrationInfo::new(MigrationStatus::Failed);
            reach(&setup, MigrationInfo { error_desc: reason.clone(), ..info });
        }
    });
    assert_eq!(finished.info.status, MigrationStatus::Failed);
    assert_eq!(finished.info.error_desc, reason);
}

#[test]
fn cancelling_is_asked_for_once() {
    let setup = Setup::new();
    let cancel = AtomicBool::new(false);
    let finished = migrate(&setup, &cancel, |_| cancel.store(true, Ordering::Relaxed));
    assert_eq!(finished.info.status, MigrationStatus::Cancelled);
    assert_eq!(setup.machine.asked(), ["migrate unix:/there with /keys", "migrate_cancel"]);
}

/// Answers each request with the next of `answers`, then goes away.
fn scripted(answers: &'static [&'static str]) -> (TempDir, PathBuf, thread::JoinHandle<()>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("api");
    let listener = UnixListener::bind(&path).unwrap();
    let server = thread::spawn(move || {
        let mut raw = Raw::new(listener.accept().unwrap().0);
        raw.send(b"{\"QMP\":{}}\n");
        for answer in answers {
            raw.read();
            raw.send(answer.as_bytes());
        }
    });
    (folder, path, server)
}

const NOTHING: &str = "{\"return\":{}}\n";

#[test]
fn a_process_that_ends_after_completion_has_migrated() {
    let (_folder, path, server) = scripted(&[
        NOTHING, // qmp_capabilities
        NOTHING, // migrate-set-capabilities
        NOTHING, // migrate-set-parameters
        NOTHING, // migrate
        "{\"return\":{\"status\":\"active\"}}\n{\"event\":\"MIGRATION\",\"data\":{\"status\":\"completed\"}}\n",
    ]);
    let mut client = Client::connect(&path).unwrap();
    let finished = client.migrate(&request(), &AtomicBool::new(false), |_| {}).unwrap();
    server.join().unwrap();
    assert_eq!(finished.info.status, MigrationStatus::Completed);
}

#[test]
fn a_process_that_ends_before_completion_is_an_error() {
    let (_folder, path, server) =
        scripted(&[NOTHING, NOTHING, NOTHING, NOTHING, "{\"return\":{\"status\":\"active\"}}\n"]);
    let mut client = Client::connect(&path).unwrap();
    let error = client.migrate(&request(), &AtomicBool::new(false), |_| {}).unwrap_err();
    server.join().unwrap();
    assert!(matches!(error, Error::Closed { .. } | Error::Lost { .. }), "{error}");
}

#[test]
fn a_server_waits_for_its_clients_when_told_to() {
    let setup = Setup::new();
    let server = setup.server.as_ref().unwrap();
    let client = setup.negotiated();
    thread::scope(|scope| {
        let waiting = scope.spawn(|| server.wait_for_clients_to_leave(WATCHDOG));
        drop(client);
        waiting.join().unwrap();
    });
    // And not for ever: this client stays.
    let mut client = setup.negotiated();
    server.wait_for_clients_to_leave(Duration::from_millis(1));
    assert_eq!(client.ask(r#"{"execute":"query-status"}"#)["return"]["running"], true);
}

#[test]
fn an_operators_word_is_followed_to_what_it_decides() {
    let setup = Setup::new();
    let mut client = Client::connect(&setup.path).unwrap();
    let error = client.decide("x-ferry-reclaim").unwrap_err().to_string();
    assert_eq!(error, "x-ferry-reclaim was refused: nothing is undecided");
    for (command, status) in
        [("x-ferry-confirm", MigrationStatus::Completed), ("x-ferry-reclaim", MigrationStatus::Failed)]
    {
        setup.machine.set(|state| state.run_state = RunState::Postmigrate);
        assert_eq!(client.decide(command).unwrap().info.status, status);
    }
    assert_eq!(setup.machine.asked(), ["Confirm", "Reclaim"]);
}

/// Its memory may follow for long, or wait for somebody.
#[test]
fn a_guest_that_has_gone_ahead_of_its_memory_is_not_waited_for_by_who_cancels() {
    for status in ["postcopy-active", "postcopy-paused", "postcopy-recover"] {
        let answer = Box::leak(format!("{{\"return\":{{\"status\":\"{status}\"}}}}\n").into_boxed_str());
        let answers: &[&str] = Box::leak(Box::new([NOTHING, NOTHING, NOTHING, &*answer]));
        let (_folder, path, server) = scripted(answers);
        let seen = Client::connect(&path).unwrap().decide("migrate_cancel").unwrap();
        server.join().unwrap();
        assert!(seen.info.status.is_postcopy(), "{seen:?}");
    }
}
