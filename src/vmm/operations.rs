//! What control clients may ask, answered by the process.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::ensure;
use engine::{SnapshotOptions, Word};

use super::{Despite, Request, Vmm, marks, ownership};
use crate::config::NamespaceOption;
use crate::control::{
    AccessScope, AccessState, Event, FerryLease, FerryOwnership, FerryStart, FerryStatus, MigrationInfo,
    MigrationParameters, MigrationTarget, NamespaceChange, Operations, Refusal, RunState as QmpRunState,
};
use crate::machine::{Action, Machine, RunState};
use crate::migrate::Job;
use crate::startup;

impl Vmm {
    /// The process as the control socket sees it.
    #[must_use]
    pub fn operations(self: &Arc<Self>) -> Arc<dyn Operations> {
        Arc::new(Control(Arc::clone(self)))
    }
}

struct Control(Arc<Vmm>);

impl Control {
    /// Whoever changes a controller may wait for a thread that waits for memory, and nobody may wait for that.
    fn refuse_without_memory(&self, what: &str) -> Result<(), Refusal> {
        match self.0.migrations.guest_lacks_memory() {
            true => Err(Refusal(format!("cannot {what}: some memory of the guest is still to come"))),
            false => Ok(()),
        }
    }

    /// Does something to a namespace and tells clients of it. A destination has been told what there is: nothing changes meanwhile.
    fn change_namespace<T>(
        &self,
        controller: &str,
        nsid: u32,
        effect: impl FnOnce(&Machine) -> anyhow::Result<T>,
        change: impl FnOnce(&T) -> NamespaceChange,
    ) -> Result<T, Refusal> {
        self.refuse_without_memory("change namespaces")?;
        // Here and not before: none begins meanwhile.
        let effect = |machine: &Machine| {
            ensure!(!self.0.migrations.is_leaving(), "cannot change namespaces: a migration is under way");
            effect(machine)
        };
        let (_, value) = self.0.act(Action::ChangeNamespaces, effect).map_err(|error| refusal(&error))?;
        let change = change(&value);
        self.0.events.emit(Event::Namespace { controller: controller.to_owned(), nsid, change });
        Ok(value)
    }

    fn stop_guest(&self, lacks_memory: bool) -> Result<(), Refusal> {
        // The state is looked at when nobody else can change it.
        let effect = |machine: &Machine| {
            if self.0.run_state().is_running() {
                let stopped = if lacks_memory { machine.hold() } else { machine.pause().map(drop) };
                if lacks_memory && stopped.is_err() {
                    // What stands still by now runs on, as the state goes on to say; a failed pause does that itself.
                    machine.let_go()?;
                }
                stopped?;
                // A guest that is stopped may be so for long. What fails fails again at the next barrier, which tells the guest.
                if let Err(error) = machine.resources().sync_regions() {
                    log::warn!("the guest is stopped, but: {error}");
                }
            }
            Ok(())
        };
        self.0.act(Action::Stop, effect).map(drop).map_err(|error| refusal(&error))
    }

    fn cont_guest(&self, lacks_memory: bool) -> Result<(), Refusal> {
        let effect = |machine: &Machine| match self.0.run_state() {
            // It goes on when its memory does.
            RunState::LacksMemory { .. } => Ok(()),
            // A vCPU that waits for memory does not answer. And one that runs and is held all the same is so for the end of the process,
            // which is not to be undone.
            RunState::Running if lacks_memory => Ok(()),
            _ if lacks_memory => machine.let_go(),
            _ => {
                // A failed migration may have left it without its images, because someone else held them, or since what lies beside
                // them could not be written.
                self.0.take_images_back()?;
                machine.resources().acquire_images()?;
                machine.resume()
            }
        };
        self.0.act(Action::Continue, effect).map(drop).map_err(|error| refusal(&error))
    }
}

/// The whole chain in one sentence.
fn refusal(error: &anyhow::Error) -> Refusal {
    Refusal(format!("{error:#}"))
}

fn microseconds(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

fn qmp_run_state(state: RunState) -> QmpRunState {
    match state {
        RunState::Prelaunch => QmpRunState::Prelaunch,
        RunState::InMigrate => QmpRunState::Inmigrate,
        RunState::Running => QmpRunState::Running,
        RunState::Paused | RunState::LacksMemory { .. } => QmpRunState::Paused,
        RunState::FinishMigrate { .. } => QmpRunState::FinishMigrate,
        RunState::HandoverUnknown { .. } | RunState::PostMigrate => QmpRunState::Postmigrate,
        RunState::Shutdown => QmpRunState::Shutdown,
        RunState::InternalError => QmpRunState::InternalError,
    }
}

fn who_owns(state: RunState) -> FerryOwnership {
    match state {
        RunState::InMigrate => FerryOwnership::Incoming,
        RunState::HandoverUnknown { .. } => FerryOwnership::HandoverUnknown,
        RunState::PostMigrate => FerryOwnership::GivenAway,
        RunState::Prelaunch
        | RunState::Running
        | RunState::Paused
        | RunState::LacksMemory { .. }
        | RunState::FinishMigrate { .. }
        | RunState::Shutdown
        | RunState::InternalError => FerryOwnership::Owned,
    }
}

impl Operations for Control {
    fn run_state(&self) -> QmpRunState {
        qmp_run_state(self.0.run_state())
    }

    fn stop(&self) -> Result<(), Refusal> {
        // Asked before: a guest that has had all of its memory since stands still as well.
        self.stop_guest(self.0.migrations.guest_lacks_memory())
    }

    fn cont(&self) -> Result<(), Refusal> {
        self.cont_guest(self.0.migrations.guest_lacks_memory())
    }

    fn system_reset(&self) -> Result<(), Refusal> {
        self.0.ask_for_reset().map_err(|refused| Refusal(refused.to_string()))
    }

    fn quit(&self, force: bool) -> Result<(), Refusal> {
        if !force && let Some(reason) = self.0.migrations.guest_needs_this_process() {
            return Err(Refusal(reason));
        }
        self.0.request(Request::Quit);
        Ok(())
    }

    fn migrate(&self, target: MigrationTarget) -> Result<(), Refusal> {
        self.0.migrations.start(&self.0, target).map_err(|error| refusal(&error))
    }

    fn snapshot(&self, path: &Path, options: SnapshotOptions) -> Result<(), Refusal> {
        let job = Job::Snapshot { path: path.to_owned(), options };
        self.0.migrations.begin(&self.0, job).map_err(|error| refusal(&error))
    }

    fn migrate_cancel(&self) -> Result<(), Refusal> {
        self.0.migrations.cancel();
        Ok(())
    }

    fn migrate_start_postcopy(&self) -> Result<(), Refusal> {
        self.0.migrations.start_postcopy().map_err(|error| refusal(&error))
    }

    fn migrate_recover(&self, uri: Option<&str>) -> Result<(), Refusal> {
        self.0.migrations.recover(uri).map_err(|error| refusal(&error))
    }

    fn postcopy_ram(&self) -> bool {
        self.0.migrations.may_follow()
    }

    fn set_postcopy_ram(&self, on: bool) {
        self.0.migrations.set_may_follow(on);
    }

    fn decide_handover(&self, word: Word) -> Result<(), Refusal> {
        self.0.migrations.decide(&self.0, word).map_err(|error| refusal(&error))
    }

    fn migration(&self) -> Option<MigrationInfo> {
        self.0.migrations.info()
    }

    fn migration_blockers(&self) -> Vec<String> {
        self.0.migration_blockers()
    }

    fn migration_parameters(&self) -> MigrationParameters {
        self.0.migrations.limits()
    }

    fn set_migration_parameters(&self, parameters: MigrationParameters) -> Result<(), Refusal> {
        self.0.migrations.set_limits(parameters).map_err(|error| refusal(&error))
    }

    fn add_namespace(&self, option: &NamespaceOption) -> Result<(), Refusal> {
        let NamespaceOption { controller, namespace } = option;
        let add = |machine: &Machine| {
            if let Some(image) = namespace.backend.path().filter(|_| !namespace.read_only) {
                marks::check_image(&self.0.spec, image, Despite::default())?;
            }
            machine.add_namespace(controller, namespace)
        };
        self.change_namespace(controller, namespace.nsid, add, |()| NamespaceChange::Added)
    }

    fn remove_namespace(&self, controller: &str, nsid: u32) -> Result<bool, Refusal> {
        let remove = |machine: &Machine| machine.remove_namespace(controller, nsid);
        self.change_namespace(controller, nsid, remove, |_| NamespaceChange::Removed)
    }

    fn resize_namespace(&self, controller: &str, nsid: u32, size_bytes: Option<u64>) -> Result<u64, Refusal> {
        let resize = |machine: &Machine| machine.resize_namespace(controller, nsid, size_bytes);
        self.change_namespace(controller, nsid, resize, |&capacity_bytes| NamespaceChange::Resized {
            capacity_bytes,
        })
    }

    fn set_access(&self, controller: &str, scope: AccessScope, state: AccessState) -> Result<u32, Refusal> {
        let set = |machine: &Machine| machine.set_access(controller, scope, state);
        self.refuse_without_memory("change the access to namespaces")?;
        // A part of the controller's state, which a destination takes as it is when the guest stops.
        let (_, group) = self.0.act(Action::ChangeNamespaces, set).map_err(|error| refusal(&error))?;
        self.0.events.emit(Event::Access { controller: controller.to_owned(), group, state });
        Ok(group)
    }

    fn ferry_status(&self) -> FerryStatus {
        // In this order: a guest that is taken or given away meanwhile is never told to be where it was, beside what has become of it since.
        // Reading the lease waits for whoever is taking the guest.
        let migration = self.0.migrations.detail();
        let lease = ownership::record(&self.0.spec).map(|(path, record)| FerryLease {
            path: path.display().to_string(),
            state: record.state.to_string(),
            generation: record.generation,
            owner: record.owner.to_string(),
        });
        let state = self.0.run_state();
        FerryStatus {
            name: self.0.spec.name.clone(),
            process_id: std::process::id(),
            status: qmp_run_state(state),
            ownership: who_owns(state),
            lease,
            blocked_reasons: self.0.migration_blockers(),
            cpu: self.0.machine().map(|machine| machine.processor()),
            vcpu_exits: self.0.machine().map(|machine| machine.vcpu_exits()).unwrap_or_default(),
            disks: self.0.machine().map(|machine| machine.disk_counters()).unwrap_or_default(),
            migration,
            start: startup::report().map(|report| FerryStart {
                total: microseconds(report.total),
                first_memory_slot: microseconds(report.first_memory_slot),
                process: microseconds(report.process),
                machine: microseconds(report.machine),
                file: microseconds(report.file),
                memory: microseconds(report.memory),
                devices: microseconds(report.devices),
                ownership: microseconds(report.ownership),
                resume: microseconds(report.resume),
            }),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::machine::Resources;
    use crate::vmm::tests::{process_with, running};

    #[test]
    fn no_migration_begins_while_namespaces_change_and_none_change_during_one() {
        let (vmm, requests) = running();
        let control = Control(Arc::clone(&vmm));
        let folder = tempfile::tempdir().unwrap();
        let uri = format!("unix:{}", folder.path().join("silent").display());
        let silent = transport::Listener::bind(&uri.parse().unwrap()).unwrap();
        let migrate = || vmm.operations().migrate(uri.as_str().into());
        std::thread::scope(|scope| {
            let change = |_: &Machine| {
                let migration = scope.spawn(migrate);
                // One that did not wait would have begun by then.
                for _ in 0..50_000 {
                    assert!(!vmm.migrations.is_leaving());
                    std::thread::yield_now();
                }
                Ok(migration)
            };
            let changed = control.change_namespace("a", 1, change, |_| NamespaceChange::Added);
            changed.unwrap().join().unwrap().unwrap();
        });
        let change = |_: &Machine| -> anyhow::Result<()> { panic!("the destination knows nothing of it") };
        let refused = control.change_namespace("a", 1, change, |()| NamespaceChange::Removed);
        assert_eq!(refused.unwrap_err().0, "cannot change namespaces: a migration is under way");
        drop(silent);
        assert!(matches!(requests.recv(), Ok(Request::MigrationEnded)));
    }

    /// The first vCPU does not answer, as one that waits for memory and of which nobody has noted that; the other shows what becomes of
    /// them.
    #[test]
    fn a_guest_that_lacks_memory_runs_on_when_it_cannot_be_stopped() {
        let (vmm, _requests) = process_with(&["--cpus", "2"]);
        let machine = vmm.prepare_machine(Arc::new(Resources::open(&vmm.spec, false).unwrap())).unwrap();
        let owners = Arc::strong_count(&vmm);
        // The first comes here with an event: there is nothing where it begins. The second waits for its start-up message.
        let pending = vmm.pending.lock().unwrap();
        vmm.install(machine, Action::Start, Machine::resume).unwrap();
        let begun = Instant::now();
        while Arc::strong_count(&vmm) == owners {
            assert!(begun.elapsed() < Duration::from_secs(30), "the first vCPU brings no event");
            std::thread::yield_now();
        }
        let refused = Control(Arc::clone(&vmm)).stop_guest(true);
        let machine = vmm.machine().unwrap();
        let exits = machine.vcpu_exits();
        drop(pending);
        assert!(refused.unwrap_err().0.contains("vCPU 0"));
        assert_eq!(vmm.run_state(), RunState::Running);
        // Only a vCPU that runs has to come back from KVM to be stopped.
        machine.halt().unwrap();
        assert!(machine.vcpu_exits() > exits);
    }

    /// As the end of the process holds it, and asks nobody: the state goes on to say that it runs.
    #[test]
    fn cont_lets_no_guest_go_that_is_held_for_the_end_of_its_process() {
        let (vmm, requests) = running();
        let control = Control(Arc::clone(&vmm));
        let machine = vmm.machine().unwrap();
        machine.hold().unwrap();
        control.cont_guest(true).unwrap();
        assert_eq!(vmm.run_state(), RunState::Running);
        // A vCPU that was told to run would do so first, and have come back from KVM at least once.
        machine.halt().unwrap();
        assert_eq!(machine.vcpu_exits(), 0);
        assert!(requests.try_recv().is_err());
    }
}
