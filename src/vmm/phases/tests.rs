//! The table is true: every cell is asked of a process that is in that phase, and is compared with what it does.

mod stage;

use std::collections::BTreeMap;

use super::is_released_at_the_end;
use crate::control::command_names;
use crate::machine::RunState;
use stage::{Guest, Stage};

/// Cells by row and column.
type Table = BTreeMap<(String, String), String>;

/// Every word that a cell may have.
const WORDS: [&str; 13] = [
    "running",
    "paused",
    "shutdown",
    "internal-error",
    "done",
    "nothing",
    "refused",
    "cancels",
    "waits",
    "none",
    "releases",
    "leaves",
    "ends",
];

fn table() -> Table {
    // As it is now, and not when this was compiled.
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/src/vmm/phases.md");
    let text = std::fs::read_to_string(path).expect("the table is beside its test");
    let lines: Vec<&str> = text.lines().collect();
    let cells = |line: &str| -> Vec<String> {
        let line = line.trim_matches('|');
        line.split('|').map(|cell| cell.trim().replace('`', "")).collect()
    };
    let mut table = Table::new();
    // There are two, and both have all rows.
    for lines in lines.split(|line| !line.starts_with('|')).filter(|lines| !lines.is_empty()) {
        let columns = cells(lines[0]);
        for line in &lines[2..] {
            let row = cells(line);
            assert_eq!(row.len(), columns.len(), "{line}");
            for (column, cell) in columns.iter().zip(&row).skip(1) {
                assert!(WORDS.contains(&cell.as_str()), "{cell} is no word: {line}");
                assert!(
                    table.insert((row[0].clone(), column.clone()), cell.clone()).is_none(),
                    "{column} comes twice"
                );
            }
        }
    }
    table
}

fn names(table: &Table, name: impl Fn(&(String, String)) -> &String) -> Vec<String> {
    let mut names: Vec<String> = table.keys().map(|key| name(key).clone()).collect();
    names.sort();
    names.dedup();
    names
}

/// Cells that are not as they should be, or that only one of the two has.
fn differences(table: &Table, seen: &Table) -> Vec<(String, String)> {
    let mut keys: Vec<_> = table.keys().chain(seen.keys()).cloned().collect();
    keys.sort();
    keys.dedup();
    keys.retain(|key| table.get(key) != seen.get(key));
    keys
}

/// What a process does in each phase that `table` knows, with every command and event.
fn ask_everything(table: &Table) -> Table {
    let mut seen = Table::new();
    for column in names(table, |(_, column)| column) {
        // One process for as long as it is in that phase.
        let mut stage = None;
        for row in names(table, |(row, _)| row) {
            let as_when_running = table[&(row.clone(), "running".to_owned())].as_str();
            let word = stage::ask(&mut stage, &column, &row, Guest::Runs, as_when_running);
            seen.insert((row, column.clone()), word);
        }
    }
    seen
}

#[test]
fn every_cell_is_what_the_process_does() {
    let table = table();
    let seen = ask_everything(&table);
    let told = |key: &(String, String)| {
        let at = |table: &Table| table.get(key).cloned().unwrap_or_default();
        format!("{} in {}: is {}, and does {}", key.0, key.1, at(&table), at(&seen))
    };
    let differences_now: Vec<String> = differences(&table, &seen).iter().map(told).collect();
    assert!(differences_now.is_empty(), "{differences_now:#?}");
    // No cell is left out: whichever becomes another word is noticed, and that one only.
    for key in table.keys() {
        for word in WORDS.into_iter().filter(|word| *word != table[key]) {
            let mut changed = table.clone();
            changed.insert(key.clone(), word.to_owned());
            assert_eq!(differences(&changed, &seen), std::slice::from_ref(key), "{word}");
        }
    }
}

/// It stays what it was told to be, wherever its memory is.
#[test]
fn a_guest_that_is_paused_continues_and_stops_as_the_table_says() {
    let table = table();
    let cell = |row: &str, column: &str| table[&(row.to_owned(), column.to_owned())].clone();
    for row in ["cont", "stop"] {
        let other = if row == "cont" { "stop" } else { "cont" };
        for column in ["migrating", "postcopy-active", "postcopy-paused"] {
            let word = stage::ask(&mut None, column, row, Guest::IsPaused, "");
            // When the link to its memory is lost it stands still anyway: either decides what it does afterwards.
            let as_told = if column == "postcopy-paused" { cell(other, column) } else { cell(row, "paused") };
            assert_eq!(word, as_told, "{row} in {column}");
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
    let rows = names(&table, |(row, _)| row);
    for column in names(&table, |(_, column)| column) {
        for row in &rows {
            assert!(table.contains_key(&(row.clone(), column.clone())), "{row} has nothing for {column}");
        }
    }
    for name in command_names().filter(|name| !only_asks(name)) {
        let row = if name == "quit" { "quit, a signal" } else { name };
        assert!(rows.iter().any(|known| known == row), "{name} has no row");
    }
}

/// Every run state is a column, or two, and a guest that may be elsewhere is never ours to release.
#[test]
fn every_run_state_has_its_end_in_the_table() {
    let table = table();
    for state in RunState::ALL {
        let column = match state {
            RunState::LacksMemory { .. } => "postcopy-paused",
            state => Stage::name(state),
        };
        let cell = table[&("quit, a signal".to_owned(), column.to_owned())].as_str();
        // The end of the process waits for a migration, and with it the state is another one.
        let released = ["releases", "cancels"].contains(&cell) && column != "finish-migrate";
        assert_eq!(is_released_at_the_end(state), released, "{state:?}");
    }
}
