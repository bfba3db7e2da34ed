//! The server against a machine that only remembers what it was asked, through raw sockets, our own client, and the
//! Python package that QEMU's users have.

mod client;
mod follow;
mod hostile;
mod lifecycle;
mod protocol;
mod python;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use engine::SnapshotOptions;
use serde_json::Value;
use tempfile::TempDir;

use super::*;
use crate::config::NamespaceOption;

/// Ten times and more what any of these tests takes.
const WATCHDOG: Duration = Duration::from_secs(60);

/// A machine that does what it is told and tells the bus.
struct Machine {
    events: Arc<EventBus>,
    state: Mutex<State>,
}

#[derive(Clone)]
struct State {
    run_state: RunState,
    asked: Vec<String>,
    migration: Option<MigrationInfo>,
    blockers: Vec<String>,
    parameters: MigrationParameters,
    postcopy_ram: bool,
}

impl Machine {
    fn asked(&self) -> Vec<String> {
        self.state.lock().unwrap().asked.clone()
    }

    fn set(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state.lock().unwrap());
    }

    fn did(&self, what: &str, run_state: RunState, event: Event) -> Result<(), Refusal> {
        self.set(|state| {
            state.asked.push(what.to_owned());
            state.run_state = run_state;
        });
        self.events.emit(event);
        Ok(())
    }
}

impl Operations for Machine {
    fn run_state(&self) -> RunState {
        self.state.lock().unwrap().run_state
    }

    fn stop(&self) -> Result<(), Refusal> {
        self.did("stop", RunState::Paused, Event::Stop)
    }

    fn cont(&self) -> Result<(), Refusal> {
        if self.run_state() == RunState::Postmigrate {
            return Err(Refusal("the guest runs elsewhere".to_owned()));
        }
        self.did("cont", RunState::Running, Event::Resume)
    }

    fn system_reset(&self) -> Result<(), Refusal> {
        self.set(|state| state.asked.push("system_reset".to_owned()));
        Ok(())
    }

    fn quit(&self, force: bool) -> Result<(), Refusal> {
        let event = Event::Shutdown { reason: ShutdownCause::HostQmpQuit };
        self.did(if force { "quit by force" } else { "quit" }, RunState::Shutdown, event)
    }

    fn migrate_start_postcopy(&self) -> Result<(), Refusal> {
        self.set(|state| state.asked.push("start postcopy".to_owned()));
        Ok(())
    }

    fn migrate_recover(&self, uri: Option<&str>) -> Result<(), Refusal> {
        self.set(|state| state.asked.push(format!("recover {uri:?}")));
        Ok(())
    }

    fn postcopy_ram(&self) -> bool {
        self.state.lock().unwrap().postcopy_ram
    }

    fn set_postcopy_ram(&self, on: bool) {
        self.set(|state| state.postcopy_ram = on);
    }

    fn migrate(&self, target: MigrationTarget) -> Result<(), Refusal> {
        let MigrationTarget { uri, tls_dir, insecure, descriptor, local, postcopy, storage } = target;
        let folder = tls_dir.as_ref().map(|folder| format!(" with {}", folder.display()));
        let what: String =
            [uri.as_str(), &*folder.unwrap_or_default(), if insecure { " insecurely" } else { "" }].concat();
        let said =
            descriptor.map(|descriptor| std::io::read_to_string(std::fs::File::from(descriptor)).unwrap());
        let what = what + &said.map(|said| format!(" where one hears {said}")).unwrap_or_default();
        let what = what + if local { " locally" } else { "" };
        let what = what + if storage { " with its images" } else { "" };
        let what = what + &postcopy.map(|start| format!(", memory follows {start:?}")).unwrap_or_default();
        let status = MigrationStatus::Setup;
        self.set(|state| state.migration = Some(MigrationInfo::new(status)));
        self.did(&format!("migrate {what}"), RunState::Running, Event::Migration { status })
    }

    fn snapshot(&self, path: &std::path::Path, options: SnapshotOptions) -> Result<(), Refusal> {
        self.set(|state| state.asked.push(format!("snapshot {}: {options:?}", path.display())));
        Ok(())
    }

    fn migrate_cancel(&self) -> Result<(), Refusal> {
        let status = MigrationStatus::Cancelled;
        self.set(|state| state.migration = Some(MigrationInfo::new(status)));
        self.did("migrate_cancel", RunState::Running, Event::Migration { status })
    }

    fn decide_handover(&self, word: engine::Word) -> Result<(), Refusal> {
        if self.run_state() != RunState::Postmigrate {
            return Err(Refusal("nothing is undecided".to_owned()));
        }
        let status = match word {
            engine::Word::Confirm => MigrationStatus::Completed,
            engine::Word::Reclaim => MigrationStatus::Failed,
        };
        self.set(|state| state.migration = Some(MigrationInfo::new(status)));
        let run_state = if word == engine::Word::Confirm { RunState::Postmigrate } else { RunState::Running };
        self.did(&format!("{word:?}"), run_state, Event::Migration { status })
    }

    fn migration(&self) -> Option<MigrationInfo> {
        self.state.lock().unwrap().migration.clone()
    }

    fn migration_blockers(&self) -> Vec<String> {
        self.state.lock().unwrap().blockers.clone()
    }

    fn migration_parameters(&self) -> MigrationParameters {
        self.state.lock().unwrap().parameters
    }

    fn set_migration_parameters(&self, parameters: MigrationParameters) -> Result<(), Refusal> {
        self.set(|state| state.parameters = parameters);
        Ok(())
    }

    fn add_namespace(&self, option: &NamespaceOption) -> Result<(), Refusal> {
        self.set(|state| state.asked.push(format!("add {option:?}")));
        Ok(())
    }

    fn remove_namespace(&self, controller: &str, nsid: u32) -> Result<bool, Refusal> {
        self.set(|state| state.asked.push(format!("remove {controller} {nsid}")));
        Ok(nsid != 9)
    }

    fn resize_namespace(&self, controller: &str, nsid: u32, size_bytes: Option<u64>) -> Result<u64, Refusal> {
        self.set(|state| state.asked.push(format!("resize {controller} {nsid} {size_bytes:?}")));
        size_bytes.ok_or_else(|| Refusal("the image is what it was".to_owned()))
    }

    fn set_access(&self, controller: &str, scope: AccessScope, state: AccessState) -> Result<u32, Refusal> {
        self.set(|machine| machine.asked.push(format!("access {controller} {scope:?} {state:?}")));
        match scope {
            AccessScope::Group(group) => Ok(group),
            AccessScope::Namespace(_) => Err(Refusal("nothing is shared".to_owned())),
        }
    }

    fn ferry_status(&self) -> FerryStatus {
        FerryStatus {
            name: "mock".to_owned(),
            process_id: std::process::id(),
            status: self.run_state(),
            ownership: FerryOwnership::Owned,
            lease: None,
            blocked_reasons: self.migration_blockers(),
            cpu: None,
            vcpu_exits: 0,
            disks: Vec::new(),
            migration: None,
            start: None,
        }
    }
}

/// A server and its machine.
struct Setup {
    _folder: TempDir,
    path: PathBuf,
    machine: Arc<Machine>,
    events: Arc<EventBus>,
    server: Option<Server>,
}

impl Setup {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("api");
        let events = Arc::new(EventBus::new());
        let state = State {
            run_state: RunState::Running,
            asked: Vec::new(),
            migration: None,
            blockers: Vec::new(),
            parameters: MigrationParameters::default(),
            postcopy_ram: false,
        };
        let machine = Arc::new(Machine { events: events.clone(), state: Mutex::new(state) });
        let server = Some(Server::start(&path, machine.clone(), events.clone()).unwrap());
        Self { _folder: folder, path, machine, events, server }
    }

    fn raw(&self) -> Raw {
        Raw::new(UnixStream::connect(&self.path).unwrap())
    }

    /// A raw client that has read the greeting and negotiated.
    fn negotiated(&self) -> Raw {
        let mut raw = self.raw();
        assert!(raw.read().get("QMP").is_some());
        assert_eq!(raw.ask(r#"{"execute":"qmp_capabilities"}"#), serde_json::json!({ "return": {} }));
        raw
    }
}

/// A client that sends bytes as they are.
struct Raw {
    stream: BufReader<UnixStream>,
}

impl Raw {
    fn new(stream: UnixStream) -> Self {
        stream.set_read_timeout(Some(WATCHDOG)).unwrap();
        Self { stream: BufReader::new(stream) }
    }

    fn send(&mut self, bytes: &[u8]) {
        self.stream.get_mut().write_all(bytes).unwrap();
    }

    /// The next line; `Null` at the end.
    fn read(&mut self) -> Value {
        let mut line = String::new();
        match self.stream.read_line(&mut line).unwrap() {
            0 => Value::Null,
            _ => serde_json::from_str(&line).unwrap(),
        }
    }

    fn ask(&mut self, text: &str) -> Value {
        self.send(text.as_bytes());
        self.read()
    }
}
