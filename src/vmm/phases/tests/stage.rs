//! Processes that are brought into a phase as processes come there, and what they do when something is asked of them then.

use std::fs::File;
use std::io::Write;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::mpsc::Receiver;
use std::sync::{Arc, Weak};

use anyhow::anyhow;
use engine::{Description, SnapshotOptions, Word};
use tempfile::TempDir;
use transport::{Endpoint, Security, Uri};

use crate::boot::tests::elf;
use crate::config::NamespaceOption;
use crate::control::{AccessScope, AccessState, Operations, Refusal};
use crate::machine::{GuestEvent, Machine, RunState};
use crate::migrate::staged::Staged;
use crate::vmm::tests::process_of;
use crate::vmm::{Despite, Request, Vmm, lock, ownership};

/// What the main thread ends with when it has nothing more to do.
const LAST: &str = "nothing more is asked";

/// What the guest does that is in a phase.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guest {
    /// It runs, or goes on when it can.
    Runs,
    /// It was stopped before.
    IsPaused,
}

/// What the machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Has {
    /// Two controllers of one subsystem, and an image that is only read: so there is no lease, and an operator may decide.
    Controllers,
    /// An image with a lease, to be released.
    Image,
}

/// A process in a phase. Its guest boots, and halts.
pub struct Stage {
    vmm: Arc<Vmm>,
    requests: Receiver<Request>,
    staged: Option<Staged>,
    /// One that greets and is silent, so that the migration goes no further.
    peer: Option<(UnixListener, UnixStream)>,
    folder: TempDir,
}

impl Drop for Stage {
    fn drop(&mut self) {
        self.vmm.migrations.stop();
    }
}

/// All that a command or an event may change.
#[derive(Debug, PartialEq)]
struct Trace {
    state: RunState,
    wish: Option<&'static str>,
    told: String,
    devices: String,
}

impl Stage {
    /// The column of a state, where it says nothing of memory.
    pub fn name(state: RunState) -> &'static str {
        match state {
            RunState::HandoverUnknown { .. } => "handover-unknown",
            other => other.qmp_name(),
        }
    }

    fn new(has: Has, incoming: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name).display().to_string();
        // Halts for ever. It begins at the seventeenth byte.
        let code = [&[0x90; 16][..], &[0xfa, 0xf4, 0xeb, 0xfd]].concat();
        std::fs::write(at("kernel"), elf(&code, 0, None)).unwrap();
        File::create(at("image")).unwrap().set_len(1 << 20).unwrap();
        let (kernel, disk) = (at("kernel"), format!("path={},serial=a", at("image")));
        let namespace = format!("controller=a,nsid=1,backend=file,path={},ro", at("image"));
        let uri = Uri::Unix(at("incoming").into());
        let address = uri.to_string();
        let start = if incoming { ["--incoming", &*address] } else { ["--kernel", &*kernel] };
        let disks = match has {
            Has::Controllers => {
                let other = "serial=b,queues=1,subsystem-of=a";
                vec!["--nvme", "serial=a,queues=1", "--nvme", other, "--ns", &*namespace]
            }
            Has::Image => vec!["--nvme", &*disk],
        };
        let (vmm, requests) = process_of(&[&start[..], &disks].concat());
        if incoming {
            vmm.migrations.expect(&vmm, &Endpoint { uri, security: Security::ThisHost }, None).unwrap();
        }
        Self { vmm, requests, staged: None, peer: None, folder }
    }

    /// A process in the phase `column`, in the last moment of which, or before which, `event` came: in it if its vCPUs run, and before
    /// they stop for it if they do not. None if there is no such process: nobody is there who could, or the phase does not come.
    fn enter(column: &str, guest: Guest, has: Has, mut event: Option<GuestEvent>) -> Option<Self> {
        let mut stage = Self::new(has, column == "inmigrate");
        if matches!(column, "prelaunch" | "inmigrate") {
            assert!(stage.vmm.machine().is_none(), "{column}: there is nothing that could have vCPUs");
            return event.is_none().then_some(stage);
        }
        stage.vmm.boot_first(Despite::default()).unwrap();
        if guest == Guest::IsPaused {
            stage.vmm.operations().stop().unwrap();
        }
        match column {
            "finish-migrate"
            | "handover-unknown"
            | "postmigrate"
            | "source postcopy-active"
            | "source postcopy-paused" => stage.staged = Some(Staged::leave(&stage.vmm)),
            "postcopy-active" | "postcopy-paused" => stage.staged = Some(Staged::arrive(&stage.vmm)),
            _ => {}
        }
        let is_over = matches!(column, "shutdown" | "internal-error");
        if !stage.vmm.run_state().is_running() || !(is_over || stage.runs_in(column)) {
            stage.note(event.take());
        }
        match column {
            "running" | "postcopy-active" => {}
            "paused" => stage.vmm.operations().stop().unwrap(),
            "migrating" => stage.peer = Some(stage.migrate()),
            "postcopy-paused" => {
                stage.staged().lose_link();
                stage.vmm.lose_memory().unwrap();
            }
            "shutdown" => stage.serve_event(GuestEvent::PowerOff).unwrap(),
            "internal-error" => drop(stage.serve_event(failure()).unwrap_err()),
            _ => stage.leave_for(column)?,
        }
        stage.note(event);
        Some(stage)
    }

    fn runs_in(&self, column: &str) -> bool {
        matches!(column, "running" | "migrating" | "postcopy-active")
    }

    /// From the stop on; None if there is none.
    fn leave_for(&self, column: &str) -> Option<()> {
        let staged = self.staged();
        staged.stop().ok()?;
        if column == "finish-migrate" {
            return Some(());
        }
        staged.hand_over();
        if column == "handover-unknown" {
            return Some(());
        }
        staged.go_ahead();
        match column {
            "source postcopy-active" => {}
            "source postcopy-paused" => staged.lose_link(),
            "postmigrate" => {
                staged.complete();
                // As ever, the process lets go of the machine.
                self.serve().unwrap_err();
            }
            other => panic!("{other} is no phase that a process can be brought into"),
        }
        Some(())
    }

    fn staged(&self) -> &Staged {
        self.staged.as_ref().expect("something moves")
    }

    /// Begins to move the guest to someone who greets and is silent.
    fn migrate(&self) -> (UnixListener, UnixStream) {
        let path = self.folder.path().join("peer");
        let listener = UnixListener::bind(&path).unwrap();
        let client = self.vmm.operations();
        client.set_postcopy_ram(true);
        client.migrate(Uri::Unix(path).to_string().as_str().into()).unwrap();
        let (mut peer, _) = listener.accept().unwrap();
        peer.write_all(&stream::frame::encode_preamble()).unwrap();
        (listener, peer)
    }

    /// As vCPUs do.
    fn note(&self, event: Option<GuestEvent>) {
        if let Some(event) = event {
            lock(&self.vmm.pending).get_or_insert(event);
        }
    }

    /// What the main thread does with all that was asked until now.
    fn serve(&self) -> anyhow::Result<()> {
        self.vmm.request(Request::IncomingFailed(anyhow!(LAST)));
        let served = self.vmm.serve(&self.requests);
        if served.as_ref().map_or_else(|error| error.to_string() != LAST, |()| true) {
            // It has ended before, and the rest is not for whoever serves next.
            while !matches!(self.requests.recv(), Ok(Request::IncomingFailed(_)) | Err(_)) {}
        }
        served
    }

    fn serve_event(&self, event: GuestEvent) -> anyhow::Result<()> {
        self.note(Some(event));
        self.vmm.request(Request::GuestEvent);
        self.serve()
    }

    fn trace(&self) -> Trace {
        let mut description = Description::default();
        let members = self.vmm.machine().map(|machine| {
            machine.describe(&mut description).unwrap();
            machine.disk_counters().into_iter().map(|disk| disk.member).collect::<Vec<_>>()
        });
        Trace {
            state: self.vmm.run_state(),
            wish: self.vmm.guest_waits_for(),
            told: self.vmm.migrations.told(),
            devices: format!("{description:?} {members:?}"),
        }
    }

    fn machine(&self) -> Weak<Machine> {
        self.vmm.machine().as_ref().map(Arc::downgrade).unwrap_or_default()
    }

    /// The word for what has become of the process, which was as `before` and had `machine`, and did not refuse what it was asked.
    fn word(&self, before: &Trace, machine: &Weak<Machine>) -> &'static str {
        let after = self.trace();
        let (was, is) = (Self::name(before.state), Self::name(after.state));
        if was != is {
            return is;
        }
        if self.vmm.migrations.is_cancelled() {
            return "cancels";
        }
        match after.wish {
            _ if !Weak::ptr_eq(&self.machine(), machine) => "done",
            _ if after == *before => "nothing",
            wish if wish != before.wish => "waits",
            _ => "done",
        }
    }

    /// A command, which is refused with an error and changes nothing then, or is not.
    fn ask(&self, row: &str) -> &'static str {
        let (before, machine) = (self.trace(), self.machine());
        if let Err(refusal) = command(&*self.vmm.operations(), row, self.folder.path()) {
            assert_eq!(self.trace(), before, "{row}: {refusal:?}");
            return "refused";
        }
        if row == "system_reset" {
            assert_eq!(self.serve().unwrap_err().to_string(), LAST);
        }
        self.word(&before, &machine)
    }

    /// What the guest did, and was noted.
    fn hear(&self) -> &'static str {
        let (before, machine) = (self.trace(), self.machine());
        self.vmm.request(Request::GuestEvent);
        match self.serve() {
            // The state knows of no vCPU that could.
            Err(error) if error.to_string() != LAST && self.vmm.run_state() == before.state => {
                assert_eq!(Trace { wish: None, ..self.trace() }, Trace { wish: None, ..before }, "{error:#}");
                "none"
            }
            _ => self.word(&Trace { wish: None, ..before }, &machine),
        }
    }

    /// What was put off for the end of the migration, and becomes of it at its end.
    fn after_the_migration(&self, word: &str) -> &'static str {
        assert!(self.vmm.guest_waits_for().is_some(), "it is forgotten");
        match &self.staged {
            None => self.vmm.migrations.wait_for_end(),
            Some(staged) if word == "cancels" => staged.end(),
            Some(staged) => {
                if let RunState::LacksMemory { .. } = self.vmm.run_state() {
                    self.vmm.find_memory().unwrap();
                }
                staged.complete();
            }
        }
        let (was, machine) = (Self::name(self.vmm.run_state()), self.machine());
        // What it ends with is told by the state.
        let _ = self.serve();
        let is = Self::name(self.vmm.run_state());
        match Weak::ptr_eq(&self.machine(), &machine) {
            _ if was != is => is,
            true => "nothing",
            false => "done",
        }
    }

    /// `quit`, or a signal.
    fn end(&self, column: &str, ask: impl FnOnce(&Self) -> Result<(), Refusal>) -> &'static str {
        let record = || ownership::record(&self.vmm.spec).map(|(_, record)| record);
        let trace = self.trace();
        if ask(self).is_err() {
            assert_eq!(self.trace(), trace);
            return "refused";
        }
        if column == "prelaunch" {
            // Who is to serve it builds the machine before.
            self.vmm.boot_first(Despite::default()).unwrap();
        }
        let before = record();
        if let Err(error) = self.serve() {
            assert_eq!((error.to_string().as_str(), self.trace()), (LAST, trace));
            return "refused";
        }
        assert!(!self.vmm.migrations.is_cancelled(), "it is not over yet");
        let leaves = self.vmm.migrations.is_leaving();
        let ended = self.vmm.end();
        let is_released = record().is_some_and(|record| record.state == engine::lease::State::Released);
        match ended {
            Err(error) => {
                assert!(format!("{error:#}").contains("lacks memory that does not come"), "{error:#}");
                assert_eq!(record(), before);
                "ends"
            }
            Ok(()) if !is_released => {
                assert_eq!((record(), self.vmm.run_state()), (before, trace.state));
                "leaves"
            }
            Ok(()) if leaves && self.vmm.migrations.is_cancelled() => "cancels",
            Ok(()) => "releases",
        }
    }
}

fn failure() -> GuestEvent {
    GuestEvent::Failed(anyhow!("it cannot go on"))
}

fn command(client: &dyn Operations, row: &str, folder: &Path) -> Result<(), Refusal> {
    let new: NamespaceOption = "controller=a,nsid=7,backend=null,size=4096".parse().unwrap();
    let elsewhere = || Uri::Unix(folder.join("elsewhere")).to_string();
    match row {
        "cont" => client.cont(),
        "stop" => client.stop(),
        "migrate" => client.migrate("unix:/nowhere".into()),
        "x-ferry-snapshot" => client.snapshot(Path::new("/nowhere/kept"), SnapshotOptions::default()),
        "system_reset" => client.system_reset(),
        "migrate_cancel" => client.migrate_cancel(),
        "migrate-start-postcopy" => client.migrate_start_postcopy(),
        "migrate-recover" => client.migrate_recover(Some(&elsewhere())),
        "x-ferry-confirm" => client.decide_handover(Word::Confirm),
        "x-ferry-reclaim" => client.decide_handover(Word::Reclaim),
        "x-ferry-namespace-add" => client.add_namespace(&new),
        "x-ferry-namespace-remove" => client.remove_namespace("a", 1).map(drop),
        "x-ferry-namespace-resize" => {
            // Its image has grown.
            File::options().write(true).open(folder.join("image")).unwrap().set_len(2 << 20).unwrap();
            client.resize_namespace("a", 1, None).map(drop)
        }
        "x-ferry-ana-set" => {
            client.set_access("a", AccessScope::Group(1), AccessState::NonOptimized).map(drop)
        }
        other => panic!("{other} is no command"),
    }
}

/// What a process in the phase `column` does when `row` is asked of it, or comes. `stage` is such a process, if there is one of which
/// nothing has become. What is put off until the migration ends is done then, and is `as_when_running`.
pub fn ask(
    stage: &mut Option<Stage>,
    column: &str,
    row: &str,
    guest: Guest,
    as_when_running: &str,
) -> String {
    if row == "quit, a signal" {
        let end = |by: fn(&Stage) -> Result<(), Refusal>| {
            Stage::enter(column, guest, Has::Image, None).unwrap().end(column, by)
        };
        let by_command = end(|stage| stage.vmm.operations().quit(false));
        let by_signal = end(|stage| {
            stage.vmm.request(Request::Signal(15));
            Ok(())
        });
        assert_eq!(by_command, by_signal, "{column}");
        return by_command.to_owned();
    }
    let event = match row {
        "the guest resets" => Some(GuestEvent::Reset),
        "the guest powers off" => Some(GuestEvent::PowerOff),
        "a vCPU cannot go on" => Some(failure()),
        _ => None,
    };
    let is_command = event.is_none();
    let kept = stage.take().filter(|_| is_command);
    let Some(entered) = kept.or_else(|| Stage::enter(column, guest, Has::Controllers, event)) else {
        return "none".to_owned();
    };
    let word = if is_command { entered.ask(row) } else { entered.hear() };
    if matches!(word, "cancels" | "waits") && row != "migrate_cancel" {
        assert_eq!(entered.after_the_migration(word), as_when_running, "{row} in {column}, afterwards");
    }
    if is_command && matches!(word, "refused" | "nothing") {
        *stage = Some(entered);
    }
    word.to_owned()
}
