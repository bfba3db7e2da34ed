//! One `ferry run`.

use std::ffi::OsString;
use std::time::{Duration, Instant};

use exerciser::report::Counters;
use ferry::control::{Client, FerryOwnership, FerryStatus, MigrationInfo, MigrationStatus, RunState};
use ferry::drive::{Exit, Ferry};
use rustix::process::{Pid, Signal, WaitOptions, waitpid};
use serde_json::{Value, json};

use crate::{Finding, TestBed, exerciser_line};

/// Ten times what the longest wait of an exerciser takes on a host that has other work.
pub const WATCHDOG: Duration = Duration::from_secs(120);

/// A process that runs a guest, or waits for one. Dropping it ends it.
#[derive(Debug)]
pub struct Vm {
    /// The process.
    pub process: Ferry,
    uri: Option<String>,
    /// Lines of the console up to here have been looked at.
    seen: usize,
}

impl Vm {
    /// Starts `ferry run` with `flags` and a control socket; returns when it answers there.
    #[must_use]
    pub fn start(bed: &TestBed, name: &str, flags: Vec<String>) -> Self {
        let api = bed.path(&format!("{name}.api"));
        let flags = flags.into_iter().map(OsString::from);
        let process =
            Ferry::start(bed.program(), name, &api, flags).unwrap_or_else(|error| panic!("{error:#}"));
        bed.remember(&process);
        Self { process, uri: None, seen: 0 }
    }

    pub(crate) fn wait_until_it_started(&mut self) {
        let started = |status: FerryStatus| (status.status != RunState::Prelaunch).then_some(());
        self.process.wait_until("a start", started).unwrap_or_else(|error| panic!("{error:#}"));
    }

    pub(crate) fn wait_until_it_listens(&mut self) {
        let peer = |status: FerryStatus| status.migration.map(|migration| migration.peer);
        let uri = self.process.wait_until("readiness", peer).unwrap_or_else(|error| panic!("{error:#}"));
        self.uri = Some(uri);
    }

    /// Where it waits for a guest; the port that the system chose instead of 0.
    #[must_use]
    pub fn uri(&self) -> &str {
        self.uri.as_deref().expect("this machine was started to wait for a guest")
    }

    /// The control socket.
    pub fn client(&mut self) -> &mut Client {
        &mut self.process.control
    }

    /// Runs a control command that must succeed.
    pub fn execute(&mut self, command: &str, arguments: Value) -> Value {
        let name = self.process.name().to_owned();
        self.client().execute(command, arguments).unwrap_or_else(|error| panic!("{name}: {error}"))
    }

    /// Runs a control command that must be refused, and says why.
    pub fn refused(&mut self, command: &str, arguments: Value) -> String {
        match self.client().execute(command, arguments) {
            Ok(value) => panic!("{} did {command} and answered {value}", self.process.name()),
            Err(error) => error.to_string(),
        }
    }

    /// `x-ferry-status`.
    pub fn status(&mut self) -> FerryStatus {
        self.client().query("x-ferry-status").expect("the machine tells its status")
    }

    /// Whether it owns a guest that runs.
    pub fn owns_a_running_guest(&mut self) -> bool {
        let status = self.status();
        status.ownership == FerryOwnership::Owned && status.status == RunState::Running
    }

    /// Begins to migrate to `uri`.
    pub fn migrate(&mut self, uri: &str) {
        self.migrate_with(json!({ "uri": uri }));
    }

    /// Begins to hand the guest over at `uri`, with its memory itself.
    pub fn hand_over(&mut self, uri: &str) {
        self.migrate_with(json!({ "uri": uri, "x-ferry-local": true }));
    }

    /// Begins to migrate as the arguments of `migrate` say.
    pub fn migrate_with(&mut self, target: Value) {
        let events = json!({ "capabilities": [{ "capability": "events", "state": true }] });
        self.execute("migrate-set-capabilities", events);
        self.execute("migrate", target);
    }

    /// Waits until the migration has ended.
    pub fn end_of_migration(&mut self) -> MigrationInfo {
        self.wait_for_migration("an end", |info| info.status.is_final())
    }

    /// Waits until the migration has ended, well.
    pub fn migrated(&mut self) -> MigrationInfo {
        let info = self.end_of_migration();
        assert_eq!(info.status, MigrationStatus::Completed, "{:?}", info.error_desc);
        info
    }

    /// Waits until the migration has ended with the guest still here, and says why.
    pub fn not_migrated(&mut self) -> String {
        let info = self.end_of_migration();
        assert_eq!(info.status, MigrationStatus::Failed);
        info.error_desc.expect("a migration that failed says why")
    }

    /// Waits until the latest migration is as `expected`; it is asked at every event, and now and then for figures.
    pub fn wait_for_migration(
        &mut self,
        what: &str,
        expected: impl Fn(&MigrationInfo) -> bool,
    ) -> MigrationInfo {
        let deadline = Instant::now() + WATCHDOG;
        loop {
            let value = self.execute("query-migrate", json!({}));
            let info = serde_json::from_value::<MigrationInfo>(value);
            match info {
                Ok(info) if expected(&info) => return info,
                _ if Instant::now() > deadline => {
                    panic!(
                        "{}",
                        self.process.describe(&format!("waited in vain for {what} of the migration of"))
                    )
                }
                _ => {
                    let glance = Duration::from_millis(20);
                    self.client().event(glance).expect("the machine is there");
                }
            }
        }
    }

    /// Waits for an event of this name.
    pub fn event(&mut self, name: &str) -> Value {
        let deadline = Instant::now() + WATCHDOG;
        while let Some(left) = deadline.checked_duration_since(Instant::now()) {
            match self.client().event(left).expect("the machine is there") {
                Some(event) if event["event"] == name => return event,
                _ => {}
            }
        }
        panic!("{}", self.process.describe(&format!("waited in vain for {name} from")));
    }

    /// Waits for progress of the exerciser that `enough` likes; an error of the exerciser fails the test.
    pub fn progress(&mut self, what: &str, enough: impl Fn(&Counters) -> bool) -> Counters {
        let found = |line: &str| match exerciser_line(line)? {
            Finding::Progress(counters) if enough(&counters) => Some(Ok(counters)),
            Finding::Progress(_) => None,
            other => Some(Err(other)),
        };
        let (found, next) = self
            .process
            .wait_for_line(what, self.seen, WATCHDOG, found)
            .unwrap_or_else(|error| panic!("{error}"));
        self.seen = next;
        found.unwrap_or_else(|other| panic!("waiting for {what}, the guest said {other:?}"))
    }

    /// The latest progress that the console shows, without waiting.
    #[must_use]
    pub fn latest(&self) -> Option<Counters> {
        self.process.console.all().iter().rev().find_map(|line| match exerciser_line(line)? {
            Finding::Progress(counters) => Some(counters),
            other => panic!("the guest said {other:?}"),
        })
    }

    /// Waits until the exerciser has verified `count` reads more than `before`.
    pub fn verifies(&mut self, before: u64, count: u64) -> Counters {
        self.progress(&format!("{count} verified reads after {before}"), |now| now.verified >= before + count)
    }

    /// Ends the exerciser, which then looks at everything once more: it must be content, and the process end with status 0.
    pub fn finish(mut self) -> Counters {
        self.process.type_in("q").expect("the console takes input");
        let counters = self.done();
        assert_eq!(counters.errors, 0);
        assert_eq!(self.exit().code(), Some(0));
        counters
    }

    /// Waits for the `done` line of the exerciser.
    pub fn done(&mut self) -> Counters {
        let found = |line: &str| match exerciser_line(line)? {
            Finding::Progress(_) => None,
            Finding::Done(counters) => Some(Ok(counters)),
            Finding::Error(error) => Some(Err(error)),
        };
        let (found, next) = self
            .process
            .wait_for_line("the end of the guest", self.seen, WATCHDOG, found)
            .unwrap_or_else(|error| panic!("{error}"));
        self.seen = next;
        found.unwrap_or_else(|error| panic!("the guest said {error}"))
    }

    /// Waits for the end of the process.
    pub fn exit(&mut self) -> Exit {
        self.process.wait(WATCHDOG).unwrap_or_else(|error| panic!("{error}"))
    }

    /// Stops the process, as if its host had no time for it, and waits until all its threads stand still.
    pub fn freeze(&self) {
        self.begin_to_freeze();
        let id = Pid::from_raw(i32::try_from(self.process.id()).expect("a process number")).expect("not 0");
        let status = waitpid(Some(id), WaitOptions::UNTRACED).expect("it is our child");
        assert!(status.is_some_and(|(_, status)| status.stopped()), "it stands still");
    }

    /// The same without waiting: a thread that waits for guest memory, which is to come through a link that stands still, cannot stand
    /// still before it has come.
    pub fn begin_to_freeze(&self) {
        self.process.signal(Signal::STOP).expect("it runs");
    }

    /// Lets a frozen process go on.
    pub fn thaw(&self) {
        self.process.signal(Signal::CONT).expect("it is there");
    }

    /// Ends the process as a broken host would, and waits until it is gone.
    pub fn kill(mut self) {
        self.process.signal(Signal::KILL).expect("it runs");
        self.exit();
    }
}
