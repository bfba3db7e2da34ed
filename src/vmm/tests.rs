//! What commands may do before there is a guest, while it waits for its reset, and at the end.

use block::FaultImage;
use clap::Parser;

use super::*;
use crate::cli::{Arguments, Command};

/// A process with a machine whose vCPUs were never started, but that counts as running.
pub(super) fn running() -> (Arc<Vmm>, Receiver<Request>) {
    let (vmm, requests) = process();
    let machine = vmm.prepare_machine(Arc::new(Resources::open(&vmm.spec, false).unwrap())).unwrap();
    assert!(vmm.operations().cont().is_err(), "there is no machine that is ours yet");
    vmm.install(machine, Action::Start, |_| Ok(())).unwrap();
    assert_eq!(vmm.run_state(), RunState::Running);
    (vmm, requests)
}

fn process() -> (Arc<Vmm>, Receiver<Request>) {
    process_with(&[])
}

/// A process that was told more.
pub(crate) fn process_with(more: &[&str]) -> (Arc<Vmm>, Receiver<Request>) {
    process_of(&[&["--kernel", "vmlinux"], more].concat())
}

/// A process of whatever machine.
pub(super) fn process_of(flags: &[&str]) -> (Arc<Vmm>, Receiver<Request>) {
    let line = ["ferry", "run", "--memory", "16M", "--serial", "null"];
    let line = line.iter().chain(flags);
    let Command::Run(arguments) = Arguments::parse_from(line).command else { panic!("it is run") };
    Vmm::new(arguments.machine().unwrap(), &arguments).unwrap()
}

#[test]
fn nothing_makes_a_guest_run_that_was_given_up() {
    let (vmm, _requests) = running();
    vmm.end().unwrap();
    let client = vmm.operations();
    assert!(client.cont().unwrap_err().0.contains("powered off"));
    assert!(client.migrate("unix:/nowhere".into()).unwrap_err().0.contains("the process is ending"));
    assert_eq!(vmm.run_state(), RunState::Shutdown);
}

#[test]
fn no_migration_begins_with_a_machine_that_is_to_be_replaced() {
    let (vmm, requests) = running();
    let client = vmm.operations();
    *lock(&vmm.pending) = Some(GuestEvent::Reset);
    assert!(client.migrate("unix:/nowhere".into()).unwrap_err().0.contains("the guest is to be reset"));
    *lock(&vmm.pending) = None;
    client.migrate("unix:/nowhere".into()).unwrap();
    assert!(matches!(requests.recv(), Ok(Request::MigrationEnded)));
    // Said to have ended, it no longer stands in the way of what the guest asks for.
    assert!(!vmm.migrations.cancel());
    assert_eq!(vmm.run_state(), RunState::Running);
}

/// What the end of a migration asks for is looked at later, when the next may have begun.
#[test]
fn the_end_of_a_migration_does_not_cancel_the_next() {
    let (vmm, requests) = running();
    let client = vmm.operations();
    let folder = tempfile::tempdir().unwrap();
    let uri = format!("unix:{}", folder.path().join("silent").display());
    let silent = transport::Listener::bind(&uri.parse().unwrap()).unwrap();
    client.migrate(uri.as_str().into()).unwrap();
    assert!(vmm.serve_guest_event().unwrap().is_none());
    drop(silent);
    assert!(matches!(requests.recv(), Ok(Request::MigrationEnded)));
    assert_eq!(client.migration().unwrap().status, crate::control::MigrationStatus::Failed);
    assert_eq!(vmm.run_state(), RunState::Running);
}

#[test]
fn a_device_that_cannot_move_is_told_of_before_a_migration_and_refuses_it() {
    let namespace = |nsid| format!("controller=a,nsid={nsid},backend=null,size=4096");
    let (vmm, requests) =
        process_with(&["--nvme", "serial=a,queues=1", "--ns", &namespace(3), "--ns", &namespace(9)]);
    let wrap = |image| -> Arc<dyn block::Backend> { Arc::new(FaultImage::new(image, Arc::default())) };
    let images = Resources::open_with(&vmm.spec, false, &wrap).unwrap();
    let machine = vmm.prepare_machine(Arc::new(images)).unwrap();
    vmm.install(machine, Action::Start, |_| Ok(())).unwrap();

    let client = vmm.operations();
    let reasons = [3, 9].map(|nsid| format!("nvme.a.ns.{nsid}: its faults come from a test in this process"));
    assert_eq!(client.migration_blockers(), reasons);
    assert_eq!(client.ferry_status().blocked_reasons, reasons);
    for uri in ["unix:/nowhere", "file:/nowhere/at/all"] {
        let refusal = client.migrate(uri.into()).unwrap_err().0;
        assert_eq!(refusal, format!("this machine cannot move: {}", reasons.join("; ")));
    }
    assert_eq!(client.migration(), None, "nothing has begun");
    assert!(requests.try_recv().is_err(), "and so nothing has ended");
    assert_eq!(vmm.run_state(), RunState::Running);
}

/// A failed migration let the guest stand still, since it could not say beside its images that they are the guest's again.
#[test]
fn a_guest_goes_on_or_leaves_only_when_its_images_are_its_own_again() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("disk.img");
    std::fs::File::create(&image).unwrap().set_len(1 << 20).unwrap();
    let disk = format!("path={},serial=a,queues=1", image.display());
    for goes_on in [true, false] {
        let (vmm, _requests) = process_with(&["--nvme", &disk]);
        let mut lease = ownership::open_lease(&vmm.spec).unwrap().unwrap();
        let path = lease.path().to_owned();
        lease.claim().unwrap();
        lease.mark_moved(&[3; 16], "there").unwrap();
        vmm.return_lease(Some(lease));
        let machine = vmm.prepare_machine(Arc::new(Resources::open(&vmm.spec, false).unwrap())).unwrap();
        vmm.install(machine, Action::Start, |_| Ok(())).unwrap();
        *lock(&vmm.run_state) = RunState::Paused;
        let client = vmm.operations();
        let leaves_or_goes_on =
            || if goes_on { client.cont() } else { client.migrate("unix:/nowhere".into()) };

        let record = std::fs::read(&path).unwrap();
        std::fs::write(&path, "nothing that can be read").unwrap();
        let refusal = leaves_or_goes_on().unwrap_err().0;
        assert!(refusal.contains("no lease"), "{refusal}");
        assert_eq!(vmm.run_state(), RunState::Paused);
        std::fs::write(&path, record).unwrap();
        leaves_or_goes_on().unwrap();
        let (_, record) = ownership::record(&vmm.spec).unwrap();
        assert_eq!(record.state, engine::lease::State::Owned, "{record}");
        vmm.migrations.stop();
    }
}

#[test]
fn only_a_disk_that_takes_its_time_is_waited_for() {
    let busy = anyhow::Error::new(nvme::Error::PauseTimeout { in_flight: 1 });
    assert!(disk_is_busy(&busy.context("cannot reset the guest")));
    assert!(!disk_is_busy(&anyhow::anyhow!("cannot reset the guest")));
}
