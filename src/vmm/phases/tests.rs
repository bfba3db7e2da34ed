//! The table is true.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::net::UnixListener;
use std::path::Path;

use engine::{SnapshotOptions, Word};

use super::is_released_at_the_end;
use crate::config::NamespaceOption;
use crate::control::{AccessScope, AccessState, MigrationStatus, Operations, Refusal, command_names};
use crate::machine::{Action, GuestEvent, RunState};
use crate::vmm::tests::running;
use crate::vmm::{Request, lock};

/// Cells by row and column.
type Table = BTreeMap<(String, String), String>;

fn table() -> Table {
    let mut lines = include_str!("../phases.md").lines().filter(|line| line.starts_with('|'));
    let cells = |line: &str| -> Vec<String> {
        let line = line.trim_matches('|');
        line.split('|').map(|cell| cell.trim().replace('`', "")).collect()
    };
    let columns = cells(lines.next().unwrap());
    let mut table = Table::new();
    for line in lines.skip(1) {
        let row = cells(line);
        assert_eq!(row.len(), columns.len(), "{line}");
        for (column, cell) in columns.iter().zip(&row).skip(1) {
            table.insert((row[0].clone(), column.clone()), cell.clone());
        }
    }
    table
}

fn column(state: RunState) -> &'static str {
    match state {
        RunState::HandoverUnknown { .. } => "handover-unknown",
        RunState::LacksMemory { .. } => "postcopy-paused",
        other => other.qmp_name(),
    }
}

const ROWS: [(&str, Action); 14] = [
    ("cont", Action::Continue),
    ("stop", Action::Stop),
    ("migrate", Action::BeginMigration),
    ("x-ferry-snapshot", Action::BeginMigration),
    ("system_reset", Action::Reset),
    ("x-ferry-confirm", Action::Decide(Word::Confirm)),
    ("x-ferry-reclaim", Action::Decide(Word::Reclaim)),
    ("x-ferry-namespace-add", Action::ChangeNamespaces),
    ("x-ferry-namespace-remove", Action::ChangeNamespaces),
    ("x-ferry-namespace-resize", Action::ChangeNamespaces),
    ("x-ferry-ana-set", Action::ChangeNamespaces),
    ("the guest resets", Action::Reset),
    ("the guest powers off", Action::PowerOff),
    ("a vCPU cannot go on", Action::Fail),
];

#[test]
fn run_states_move_as_the_table_says() {
    let table = table();
    for (row, action) in ROWS {
        for state in RunState::ALL {
            let cell = table[&(row.to_owned(), column(state).to_owned())].as_str();
            let what = format!("{row} in {state:?}");
            match (cell, state.next(action)) {
                ("refused" | "none" | "cancels", Err(_)) => {}
                ("done" | "nothing", Ok(after)) => assert_eq!(after, state, "{what}"),
                (cell, Ok(after)) => assert_eq!(column(after), cell, "{what}"),
                (cell, Err(refused)) => panic!("{what} is {cell}: {refused}"),
            }
        }
    }
}

#[test]
fn every_command_is_in_the_table_or_only_asks() {
    let table = table();
    let only_asks = |name: &str| {
        let settings =
            ["migrate-set-parameters", "migrate-set-capabilities", "x-ferry-status", "getfd", "closefd"];
        name.starts_with("query-") || settings.contains(&name)
    };
    for name in command_names().filter(|name| !only_asks(name)) {
        let row = if name == "quit" { "quit, a signal" } else { name };
        assert!(table.contains_key(&(row.to_owned(), "running".to_owned())), "{name} has no row");
    }
}

fn ask(client: &dyn Operations, row: &str) -> Result<(), Refusal> {
    let new: NamespaceOption = "controller=a,nsid=7,backend=null,size=4096".parse().unwrap();
    match row {
        "cont" => client.cont(),
        "stop" => client.stop(),
        "migrate" => client.migrate("unix:/nowhere".into()),
        "x-ferry-snapshot" => client.snapshot(Path::new("/nowhere/kept"), SnapshotOptions::default()),
        "system_reset" => client.system_reset(),
        "migrate_cancel" => client.migrate_cancel(),
        "migrate-start-postcopy" => client.migrate_start_postcopy(),
        "migrate-recover" => client.migrate_recover(None),
        "x-ferry-confirm" => client.decide_handover(Word::Confirm),
        "x-ferry-reclaim" => client.decide_handover(Word::Reclaim),
        "x-ferry-namespace-add" => client.add_namespace(&new),
        "x-ferry-namespace-remove" => client.remove_namespace("a", 7).map(drop),
        "x-ferry-namespace-resize" => client.resize_namespace("a", 7, None).map(drop),
        "x-ferry-ana-set" => client.set_access("a", AccessScope::Group(1), AccessState::Optimized).map(drop),
        other => panic!("{other} is no command"),
    }
}

const COMMANDS: [&str; 14] = [
    "cont",
    "stop",
    "migrate",
    "x-ferry-snapshot",
    "system_reset",
    "migrate_cancel",
    "migrate-start-postcopy",
    "migrate-recover",
    "x-ferry-confirm",
    "x-ferry-reclaim",
    "x-ferry-namespace-add",
    "x-ferry-namespace-remove",
    "x-ferry-namespace-resize",
    "x-ferry-ana-set",
];

/// In every state that a test can put a process in: what would change it, `run_states_move_as_the_table_says` has.
#[test]
fn the_process_refuses_what_the_table_refuses() {
    let table = table();
    let (vmm, _requests) = running();
    let client = vmm.operations();
    for state in RunState::ALL {
        for row in COMMANDS {
            *lock(&vmm.run_state) = state;
            let (cell, what) =
                (&table[&(row.to_owned(), column(state).to_owned())], format!("{row} in {state:?}"));
            match cell.as_str() {
                "refused" => {
                    ask(&*client, row).expect_err(&what);
                }
                "done" if row.starts_with("x-ferry-c") || row.starts_with("x-ferry-r") => {
                    ask(&*client, row).expect(&what);
                }
                "nothing" | "cancels" if row == "migrate_cancel" => ask(&*client, row).expect(&what),
                _ => continue,
            }
            assert_eq!(vmm.run_state(), state, "{what}");
        }
        let at_the_end = &table[&("quit, a signal".to_owned(), column(state).to_owned())];
        let released = is_released_at_the_end(state);
        match at_the_end.as_str() {
            "releases" => assert!(released, "{state:?}"),
            "leaves" | "ends" => assert!(!released, "{state:?}"),
            // The end of the process waits for the migration, and with it the state is another one.
            other => assert_eq!((other, column(state)), ("cancels", "finish-migrate")),
        }
    }
    *lock(&vmm.run_state) = RunState::Running;
}

/// The peer greets and is silent, so that the migration goes no further.
#[test]
fn a_machine_whose_memory_moves_does_as_the_table_says() {
    let table = table();
    let cell = |row: &str| table[&(row.to_owned(), "migrating".to_owned())].as_str();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("peer");
    let uri = format!("unix:{}", path.display());
    let listener = UnixListener::bind(&path).unwrap();
    let (vmm, requests) = running();
    let client = vmm.operations();
    for end in ["migrate_cancel", "system_reset", "the guest resets", "the guest powers off"] {
        client.migrate(uri.as_str().into()).unwrap();
        let (mut peer, _) = listener.accept().unwrap();
        peer.write_all(&stream::frame::encode_preamble()).unwrap();
        for row in COMMANDS.into_iter().filter(|row| cell(row) == "refused") {
            ask(&*client, row).expect_err(row);
        }
        assert_eq!((vmm.run_state(), cell(end)), (RunState::Running, "cancels"), "{end}");
        let event = match end {
            "the guest resets" => Some(GuestEvent::Reset),
            "the guest powers off" => Some(GuestEvent::PowerOff),
            _ => None,
        };
        if event.is_some() {
            *lock(&vmm.pending) = event;
            assert!(vmm.serve_guest_event().unwrap().is_none(), "{end}: the migration comes first");
        } else {
            ask(&*client, end).unwrap();
        }
        if end == "system_reset" {
            assert!(matches!(requests.recv(), Ok(Request::GuestEvent)), "{end}");
            assert!(vmm.serve_guest_event().unwrap().is_none(), "{end}: the migration comes first");
        }
        assert!(matches!(requests.recv(), Ok(Request::MigrationEnded)), "{end}");
        assert_eq!(client.migration().unwrap().status, MigrationStatus::Cancelled, "{end}");
        assert_eq!(vmm.guest_waits_for().is_some(), end != "migrate_cancel", "{end}: it is served next");
        *lock(&vmm.pending) = None;
    }
    for row in ["cont", "stop", "x-ferry-ana-set"] {
        assert_eq!(cell(row), table[&(row.to_owned(), "running".to_owned())], "{row}");
    }
}
