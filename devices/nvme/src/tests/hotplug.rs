//! Namespaces that the host adds, removes and resizes while the guest runs.

use std::io::Write;
use std::sync::Arc;
use std::time::Duration;

use block::{Backend, Fault, FaultControl, FaultImage, FileImage, FileOptions, Target};
use nvme_spec::event::Event;
use nvme_spec::identify::{IdentifyNamespace, cns};
use nvme_spec::opcode::{admin, nvm};
use nvme_spec::{Status, SubmissionEntry};

use super::driver::{Guest, PATIENCE, memory_image, namespace, transfer};
use super::namespaces::{changed, list, listen};
use super::store::{Memory, managed};
use crate::{ControllerConfig, Error, NamespaceConfig};

fn ready() -> Guest {
    let mut guest = Guest::ready(ControllerConfig::new("HOT"), vec![namespace(2, 64)]);
    guest.create_pair(1, 16);
    guest
}

fn read(guest: &mut Guest, nsid: u32, lba: u64) -> Result<(), Status> {
    let page = guest.pages(1);
    guest.io(1, transfer(nvm::READ, nsid, lba, 1, page))
}

/// A file of `bytes` bytes as a namespace.
fn file(nsid: u32, bytes: u64) -> (tempfile::NamedTempFile, NamespaceConfig) {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(bytes).unwrap();
    let backend = Arc::new(FileImage::open(file.path(), FileOptions::default()).unwrap());
    (file, NamespaceConfig { nsid, block_bytes: 512, metadata: None, backend })
}

#[test]
fn a_namespace_that_is_added_is_told_of_and_works_until_it_is_removed() {
    let mut guest = ready();
    let subsystem = Arc::clone(guest.controller.subsystem());
    let request = listen(&mut guest);
    assert_eq!(read(&mut guest, 7, 0), Err(Status::INVALID_FIELD));
    subsystem.add(&namespace(7, 32)).unwrap();
    guest.run();
    let event = guest.reap(0)[0];
    assert_eq!((event.cid, event.dw0), (request, Event::NAMESPACE_CHANGED.to_dword()));
    assert_eq!(changed(&mut guest), [7]);
    assert_eq!(list(&mut guest, cns::ACTIVE_NAMESPACES), [2, 7]);
    read(&mut guest, 7, 31).unwrap();
    // The guest is elsewhere before the removal: its destination was started with all of them.
    guest.namespaces.push(namespace(7, 32));
    guest.migrate(2);
    let subsystem = Arc::clone(guest.controller.subsystem());
    // Nobody runs the controller meanwhile, so it has not followed; when it has, the image is let go.
    assert!(!subsystem.remove(7, Duration::ZERO).unwrap());
    let images = || subsystem.images().len();
    guest.run();
    assert_eq!(images(), 1);
    assert_eq!(read(&mut guest, 7, 0), Err(Status::INVALID_FIELD));
    subsystem.add(&namespace(7, 8)).unwrap();
    guest.run();
    assert_eq!(read(&mut guest, 7, 8), Err(Status::LBA_OUT_OF_RANGE), "the new one is smaller");
}

#[test]
fn a_removal_waits_for_commands_and_nothing_comes_after() {
    let mut guest = ready();
    let subsystem = Arc::clone(guest.controller.subsystem());
    let control = Arc::new(FaultControl::default());
    let image = Arc::new(FaultImage::new(memory_image(64 * 512), Arc::clone(&control)));
    let backend = Arc::clone(&image) as Arc<dyn Backend>;
    subsystem.add(&NamespaceConfig { nsid: 7, block_bytes: 512, metadata: None, backend }).unwrap();
    guest.run();
    let page = guest.pages(1);
    control.inject(Target::Any, 0, 1, Fault::Hold);
    guest.push(1, transfer(nvm::WRITE, 7, 0, 1, page));
    guest.ring(1);
    guest.run();
    std::thread::scope(|scope| {
        let remover = scope.spawn(|| subsystem.remove(7, PATIENCE).unwrap());
        guest.run_until("the removal", |guest| list(guest, cns::ACTIVE_NAMESPACES) == [2]);
        assert!(!remover.is_finished() && Arc::strong_count(&image) > 1, "the command is still there");
        assert!(subsystem.add(&namespace(7, 8)).unwrap_err().to_string().contains("still in flight"));
        control.release_held();
        guest.run_until("the end of the command", |guest| guest.reap(1).len() == 1);
        guest.run_until("the release", |_| Arc::strong_count(&image) == 1);
        assert!(remover.join().unwrap());
    });
    assert_eq!(control.seen(), 1);
}

#[test]
fn what_grew_is_taken_over_at_a_command_and_told() {
    let mut guest = ready();
    let subsystem = Arc::clone(guest.controller.subsystem());
    let (mut image, config) = file(7, 8 * 512);
    subsystem.add(&config).unwrap();
    guest.run();
    changed(&mut guest);
    image.write_all(&[1; 16 * 512]).unwrap();
    assert_eq!(read(&mut guest, 7, 8), Err(Status::LBA_OUT_OF_RANGE), "it has grown, but nobody has said so");
    let request = listen(&mut guest);
    assert_eq!(subsystem.resize(7, None).unwrap(), 16 * 512);
    guest.run();
    assert_eq!(guest.reap(0)[0].cid, request);
    assert_eq!(changed(&mut guest), [7]);
    read(&mut guest, 7, 15).unwrap();
    // Or it is made to grow.
    assert_eq!(subsystem.resize(7, Some(32 * 512)).unwrap(), 32 * 512);
    guest.run();
    assert_eq!(image.as_file().metadata().unwrap().len(), 32 * 512);
    let page = guest.identify(cns::NAMESPACE, 7).unwrap();
    assert_eq!(IdentifyNamespace::from_bytes(&page).nsze, 32);
    // What it has grown to is what a destination must have.
    let moved = Arc::new(FileImage::inspect(image.path(), FileOptions::default()).unwrap());
    guest.namespaces.push(NamespaceConfig { backend: moved, ..config.clone() });
    config.backend.release().unwrap();
    guest.migrate(1);
    guest.controller.subsystem().images().iter().for_each(|(_, image)| image.acquire().unwrap());
    read(&mut guest, 7, 31).unwrap();

    let subsystem = guest.controller.subsystem();
    let refused = |bytes| subsystem.resize(7, bytes).unwrap_err().to_string();
    assert!(refused(Some(16 * 512)).contains("cannot shrink"));
    assert!(refused(Some(33 * 512 + 1)).contains("not a whole number of blocks"));
    image.as_file().set_len(512).unwrap();
    let error = subsystem.resize(7, None).unwrap_err();
    assert!(matches!(error, Error::Resize { nsid: 7, source: block::Error::Shrunk { .. } }), "{error}");
    let error = subsystem.resize(2, None).unwrap_err();
    assert!(matches!(error, Error::Resize { nsid: 2, source: block::Error::FixedSize { .. } }), "{error}");
}

#[test]
fn what_the_guest_has_created_is_not_the_hosts() {
    let store = Memory::new(1 << 20);
    let mut guest = managed(&ControllerConfig::new("HOT"), &[namespace(2, 64)], &store);
    let data = guest.pages(1);
    guest.clear(data, 4096);
    guest.write_bytes(data, &8u64.to_le_bytes());
    guest.write_bytes(data + 8, &8u64.to_le_bytes());
    let create =
        SubmissionEntry { opcode: admin::NAMESPACE_MANAGEMENT, prp1: data, ..SubmissionEntry::default() };
    assert_eq!(guest.admin(create), Ok(1));
    let subsystem = Arc::clone(guest.controller.subsystem());
    let said = |error: Error| error.to_string();
    assert!(said(subsystem.remove(1, Duration::ZERO).unwrap_err()).contains("the guest has created it"));
    assert!(said(subsystem.resize(1, None).unwrap_err()).contains("the guest has created it"));
    assert!(said(subsystem.add(&namespace(1, 8)).unwrap_err()).contains("the identifier is taken"));
    assert!(said(subsystem.remove(9, Duration::ZERO).unwrap_err()).contains("there is none"));
    assert!(said(subsystem.resize(1025, None).unwrap_err()).contains("there is none"));
    let quota = subsystem.capacity_bytes().1;
    subsystem.remove(2, Duration::ZERO).unwrap();
    assert_eq!(subsystem.capacity_bytes().1, quota, "it has nothing of the guest's place before it is gone");
    guest.run();
    let records = store.state().unwrap().allocations.namespaces;
    assert_eq!(records.iter().map(|record| record.shape.nsid).collect::<Vec<_>>(), [1]);
}
