//! A folder over crashes, between owners, and of others.

use super::*;

use nvme::{AllocatedState, AllocationsState, NamespaceShape};

const UUID: [u8; 16] = [0xab; 16];

fn open(path: &Path) -> Directory {
    Directory::open(path, "S", 1 << 20, false).unwrap()
}

/// A state that names the image of `uuid`.
fn naming(uuid: [u8; 16]) -> SubsystemState {
    let shape = NamespaceShape {
        nsid: 1,
        block_shift: 9,
        blocks: 8,
        read_only: false,
        uuid,
        backend: *b"file    ",
        metadata: None,
    };
    let namespace = AllocatedState {
        shape,
        created: true,
        shared: false,
        attached_count: 0,
        attached: Vec::new(),
        protection: None,
        uncorrectable: None,
    };
    let allocations = AllocationsState { created_ever: 1, namespace_count: 1, namespaces: vec![namespace] };
    SubsystemState { allocations, ..SubsystemState::default() }
}

#[test]
fn a_folder_keeps_what_was_written_and_made_in_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("new");
    let directory = open(&path);
    assert_eq!(directory.state(), None);
    directory.acquire().unwrap();
    let image = directory.create(&UUID, 4096, 512).unwrap();
    assert_eq!(image.identity().capacity_bytes, 4096);
    directory.write(&naming(UUID)).unwrap();
    let id = directory.id();
    drop((directory, image));

    let directory = open(&path);
    assert_eq!((directory.state(), directory.id()), (Some(naming(UUID)), id));
    let image = Store::open(&directory, &UUID, 4096, 512).unwrap();
    directory.acquire().unwrap();
    image.acquire().unwrap();
    let error = Store::open(&directory, &UUID, 8192, 512).unwrap_err().to_string();
    assert!(error.contains("has 4096 bytes instead of 8192"), "{error}");
    assert!(Store::open(&directory, &[1; 16], 4096, 512).is_err());
    drop(image);
    directory.remove(&UUID);
    assert!(Store::open(&directory, &UUID, 4096, 512).is_err());
}

#[test]
fn what_a_crash_leaves_is_removed_and_nothing_else() {
    let folder = tempfile::tempdir().unwrap();
    let directory = open(folder.path());
    directory.acquire().unwrap();
    for uuid in [UUID, [2; 16]] {
        directory.create(&uuid, 4096, 512).unwrap();
    }
    // Created, and the power failed before the state said so; or deleted, and it failed before the image was gone.
    directory.write(&naming(UUID)).unwrap();
    fs::write(folder.path().join(NEW_STATE), "half").unwrap();
    fs::write(folder.path().join("mine.raw"), "of somebody else").unwrap();
    drop(directory);
    let directory = open(folder.path());
    let names = || {
        let names = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name());
        let mut names: Vec<_> = names.map(|name| name.into_string().unwrap()).collect();
        names.sort();
        names
    };
    assert_eq!(names().len(), 6, "looking changes nothing: {:?}", names());
    directory.acquire().unwrap();
    assert_eq!(names(), [&image_name(&UUID), LOCK, "mine.raw", "state"]);
}

#[test]
fn one_process_at_a_time_writes() {
    let folder = tempfile::tempdir().unwrap();
    let (first, second) = (open(folder.path()), open(folder.path()));
    first.acquire().unwrap();
    assert!(matches!(second.acquire().unwrap_err(), block::Error::Locked { .. }));
    assert!(second.write(&naming(UUID)).is_err());
    assert!(second.create(&UUID, 4096, 512).is_err());
    first.write(&naming(UUID)).unwrap();
    first.release().unwrap();
    assert!(first.write(&SubsystemState::default()).is_err(), "it has given that up");
    let error = second.acquire().unwrap_err().to_string();
    assert!(error.contains("is not what it was"), "it looked at a subsystem that was never made: {error}");
    let third = open(folder.path());
    first.acquire().unwrap();
    first.write(&naming(UUID)).unwrap();
    first.release().unwrap();
    let error = third.acquire().unwrap_err().to_string();
    assert!(error.contains("is not what it was"), "it looked at an older state: {error}");
    // Whose guest arrives has a newer state than any that lies here.
    let arriving = Directory::open(folder.path(), "S", 1 << 20, true).unwrap();
    first.acquire().unwrap();
    first.write(&naming([1; 16])).unwrap();
    first.release().unwrap();
    arriving.acquire().unwrap();
    arriving.write(&naming(UUID)).unwrap();
    arriving.release().unwrap();
    assert_eq!(open(folder.path()).state(), Some(naming(UUID)));
}

#[test]
fn the_folder_of_another_subsystem_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let error = Directory::open(folder.path(), "S", 0, true).unwrap_err().to_string();
    assert!(error.contains("there is none"), "{error}");
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "who waits for a guest makes nothing");
    let directory = open(folder.path());
    directory.acquire().unwrap();
    directory.write(&SubsystemState::default()).unwrap();
    let error = Directory::open(folder.path(), "T", 0, false).unwrap_err().to_string();
    assert!(error.contains(r#"it is that of "S", and the controller is "T""#), "{error}");
    directory.release().unwrap();
    // Replaced by another while nobody looked.
    let waiting = Directory::open(folder.path(), "S", 0, true).unwrap();
    let other = tempfile::tempdir().unwrap();
    let stranger = open(other.path());
    stranger.acquire().unwrap();
    stranger.write(&SubsystemState::default()).unwrap();
    fs::copy(other.path().join("state"), folder.path().join("state")).unwrap();
    let error = waiting.acquire().unwrap_err().to_string();
    assert!(error.contains("is not what it was") && !waiting.is_held(), "{error}");
}

#[test]
fn nobody_else_reads_what_the_guest_keeps() {
    use std::os::unix::fs::PermissionsExt;

    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("new");
    let directory = Arc::new(open(&path));
    directory.acquire().unwrap();
    directory.create(&UUID, 4096, 512).unwrap();
    directory.write(&naming(UUID)).unwrap();
    let ram = crate::memory::GuestRam::with_buffers(4096, &[], &[("region".into(), 4096)]).unwrap();
    let region = Region::new(ram.block("region").unwrap().clone(), Some(directory), 0).unwrap();
    region.attach().unwrap();
    let others = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o077;
    assert_eq!(others(&path), 0, "the folder");
    let files: Vec<PathBuf> = fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()).collect();
    assert_eq!(files.len(), 4, "lock, state, image and region: {files:?}");
    for file in files {
        assert_eq!(others(&file), 0, "{}", file.display());
    }
}

#[test]
fn a_state_that_may_not_be_stable_is_taken_back_and_no_image_goes_that_it_may_name() {
    let folder = tempfile::tempdir().unwrap();
    let mut directory = open(folder.path());
    directory.acquire().unwrap();
    directory.write(&SubsystemState::default()).unwrap();
    let image = folder.path().join(image_name(&UUID));
    // The new state is there, but who knows whether it is after a loss of power.
    directory.sync_names = |path| Err(failed(path, "make its names stable")(io::Error::other("broken")));
    directory.create(&UUID, 4096, 512).unwrap();
    let error = directory.write(&naming(UUID)).unwrap_err().to_string();
    assert!(error.contains("make its names stable"), "{error}");
    directory.remove(&UUID);
    assert!(image.exists(), "the power may bring back the state that names it");
    assert_eq!(
        read(folder.path()).unwrap().unwrap().state,
        SubsystemState::default(),
        "as the guest was told"
    );
    // The folder changes hands and comes back: it is the one that it was.
    directory.release().unwrap();
    directory.acquire().unwrap();
    assert!(!image.exists(), "a leftover");
    directory.sync_names = sync_folder;
    directory.write(&SubsystemState::default()).unwrap();
    directory.create(&[2; 16], 4096, 512).unwrap();
    directory.remove(&[2; 16]);
    assert!(!folder.path().join(image_name(&[2; 16])).exists(), "all is well again");
}
