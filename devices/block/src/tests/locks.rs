//! Who holds an image, and giving it away.

use super::*;
use crate::Error;

fn open(file: &NamedTempFile) -> Result<FileImage, Error> {
    FileImage::open(file.path(), FileOptions::default())
}

fn open_read_only(file: &NamedTempFile) -> Result<FileImage, Error> {
    FileImage::open(file.path(), FileOptions { read_only: true, ..FileOptions::default() })
}

#[test]
fn a_writer_excludes_everyone_and_says_so() {
    let file = temporary_file(MIB);
    let held = open(&file).unwrap();
    for second in [open(&file), open_read_only(&file)] {
        let error = second.unwrap_err();
        assert!(matches!(error, Error::Locked { .. }), "{error}");
        let message = error.to_string();
        assert!(message.contains(file.path().to_str().unwrap()), "{message}");
        assert!(message.contains("another process has it"), "{message}");
    }
    drop(held);
    let (one, two) = (open_read_only(&file).unwrap(), open_read_only(&file).unwrap());
    assert!(matches!(open(&file), Err(Error::Locked { .. })));
    drop((one, two));
    open(&file).unwrap();
}

#[test]
fn looking_takes_no_lock() {
    let file = temporary_file(MIB);
    let held = open(&file).unwrap();
    let looked = FileImage::inspect(file.path(), FileOptions::default()).unwrap();
    assert_eq!(looked.identity(), held.identity());
    assert_eq!(looked.identity().capacity_bytes, MIB);
    let mut context = IoContext::new(guest(), 1).unwrap();
    let read = |context: &mut _, image: &_| run(context, image, Operation::Read, 0, 512, &[range(0, 512)]);
    assert_eq!(read(&mut context, &looked), Err(Failure::Released));
    assert!(matches!(looked.acquire(), Err(Error::Locked { .. })));
    assert_eq!(read(&mut context, &looked), Err(Failure::Released));
    held.release().unwrap();
    looked.acquire().unwrap();
    assert_eq!(read(&mut context, &looked), Ok(()));
    assert_eq!(read(&mut context, &held), Err(Failure::Released));
    assert!(matches!(held.acquire(), Err(Error::Locked { .. })));
    looked.release().unwrap();
    looked.release().unwrap();
    held.acquire().unwrap();
    held.acquire().unwrap();
    assert_eq!(read(&mut context, &held), Ok(()));
}

#[test]
fn a_released_image_is_free_though_the_kernel_still_has_its_file() {
    let file = temporary_file(MIB);
    let held = open(&file).unwrap();
    let description = held.held_file().unwrap().file().try_clone().unwrap();
    held.release().unwrap();
    open(&file).unwrap();
    drop(description);
}

#[test]
fn an_image_is_synced_when_something_was_written_since() {
    on_both_engines(1, |context| {
        let file = temporary_file(MIB);
        let image = open(&file).unwrap();
        let is_synced = || image.held_file().unwrap().is_synced();
        assert!(!is_synced(), "nobody knows what the holder before left");
        image.sync().unwrap();
        let write = Operation::Write { fua: false };
        for (operation, wrote) in [
            (Operation::Read, false),
            (Operation::Flush, false),
            (write, true),
            (Operation::WriteZeroes { deallocate: false, fua: false }, true),
            (Operation::Discard, true),
        ] {
            let ranges = [range(0, 512)];
            let moves_data = matches!(operation, Operation::Read | Operation::Write { .. });
            let length_bytes = if operation == Operation::Flush { 0 } else { 512 };
            run(context, &image, operation, 0, length_bytes, &ranges[..usize::from(moves_data)]).unwrap();
            assert_eq!(!is_synced(), wrote, "{operation:?}");
            image.sync().unwrap();
            assert!(is_synced());
        }
    });
}

#[test]
fn memory_images_are_released_too() {
    let mut context = IoContext::new(guest(), 1).unwrap();
    let images: [&dyn Backend; 2] = [&MemoryImage::new(mapping(MIB)), &crate::NullImage::new(MIB)];
    for image in images {
        image.release().unwrap();
        let read = run(&mut context, image, Operation::Read, 0, 512, &[range(0, 512)]);
        assert_eq!(read, Err(Failure::Released));
        image.acquire().unwrap();
        run(&mut context, image, Operation::Read, 0, 512, &[range(0, 512)]).unwrap();
    }
}

#[test]
fn an_image_that_changed_is_not_acquired() {
    let file = temporary_file(MIB);
    let image = open(&file).unwrap();
    image.release().unwrap();
    file.as_file().set_len(2 * MIB).unwrap();
    let error = image.acquire().unwrap_err();
    assert!(
        error.to_string().contains("1048576 bytes") && error.to_string().contains("2097152 bytes"),
        "{error}"
    );
    open(&file).expect("a refused image is not locked");
    file.as_file().set_len(MIB).unwrap();
    image.acquire().unwrap();
    image.release().unwrap();
    // The same name and size, but another file.
    let other = temporary_file(MIB);
    std::fs::rename(other.path(), file.path()).unwrap();
    assert!(matches!(image.acquire(), Err(Error::Changed { .. })));
}

#[test]
fn an_image_with_requests_in_flight_is_not_released() {
    on_both_engines(2, |context| {
        let file = temporary_file(MIB);
        let image = open(&file).unwrap();
        queue(context, &image, 1, Operation::Read, 0, 512, &[range(0, 512)]);
        assert!(matches!(image.release(), Err(Error::InUse { .. })));
        assert!(matches!(open(&file), Err(Error::Locked { .. })));
        assert_eq!(collect(context, 1)[0].result, Ok(()));
        image.release().unwrap();
        open(&file).unwrap();
    });
}

#[test]
fn dropping_a_context_waits_for_the_kernel() {
    let file = temporary_file(CAPACITY);
    std::fs::write(file.path(), Numbers(5).bytes(CAPACITY)).unwrap();
    let image = open(&file).unwrap();
    for make in [IoContext::new, IoContext::with_threads] {
        let memory = guest();
        let mut context = make(memory.clone(), 64).unwrap();
        for token in 0..64 {
            let ranges = [range(token * 65_536, 65_536)];
            queue(&mut context, &image, token, Operation::Read, token * 65_536, 65_536, &ranges);
            if token == 40 {
                context.submit().unwrap();
            }
        }
        drop(context);
        assert!(peek(&memory, &[range(0, SEAM)]) == Numbers(5).bytes(SEAM), "all had arrived");
        image.release().expect("nothing uses the image any more");
        image.acquire().unwrap();
    }
}

#[test]
fn only_files_and_block_devices_are_images() {
    let directory = tempfile::tempdir().unwrap();
    let pipe = directory.path().join("pipe");
    nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
    for path in [directory.path(), &pipe, std::path::Path::new("/dev/null")] {
        let error = FileImage::open(path, FileOptions::default()).unwrap_err();
        assert!(matches!(error, Error::NotAnImage { .. }), "{error}");
    }
    let missing = directory.path().join("missing");
    let error = FileImage::open(&missing, FileOptions::default()).unwrap_err();
    assert!(error.to_string().contains("missing"), "{error}");
}

#[test]
fn what_has_come_in_the_place_of_an_image_is_not_waited_for_and_held_files_wait_for_their_requests() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image");
    std::fs::write(&path, vec![1; 8192]).unwrap();
    for direct in [true, false] {
        let image = FileImage::inspect(&path, FileOptions { direct, ..FileOptions::default() }).unwrap();
        image.acquire().unwrap();
        let flags = rustix::fs::fcntl_getfl(image.held_file().unwrap().file()).unwrap();
        assert!(!flags.contains(rustix::fs::OFlags::NONBLOCK), "{flags:?}");
        image.release().unwrap();
    }
    for read_only in [true, false] {
        let options = FileOptions { read_only, ..FileOptions::default() };
        let image = FileImage::inspect(&path, options).unwrap();
        std::fs::rename(&path, folder.path().join("aside")).unwrap();
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let error = image.acquire().unwrap_err();
        assert!(!matches!(error, Error::Locked { .. } | Error::InUse { .. }), "{error}");
        assert!(image.held_file().is_none());
        std::fs::rename(folder.path().join("aside"), &path).unwrap();
        image.acquire().unwrap();
        image.release().unwrap();
    }
}
