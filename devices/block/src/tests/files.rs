//! What files and block devices make of holes, and how rings hold them.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::*;

fn allocated_bytes(file: &File) -> u64 {
    file.sync_all().unwrap();
    file.metadata().unwrap().blocks() * 512
}

/// Whether the file system of `file` makes holes.
fn makes_holes(file: &File) -> bool {
    let flags = rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(file, flags, 0, 4096).is_ok()
}

#[test]
fn deallocated_ranges_give_their_blocks_back() {
    on_both_engines(4, |context| {
        let file = temporary_file(MIB);
        let holes = makes_holes(file.as_file());
        println!("the file system of the temporary folder makes holes: {holes}");
        let image = FileImage::open(file.path(), FileOptions::default()).unwrap();
        let memory = [range(0, MIB)];
        poke(context.memory(), &memory, &vec![7; MIB as usize]);
        let fill = |context: &mut IoContext| {
            run(context, &image, Operation::Write { fua: true }, 0, MIB, &memory).unwrap();
            allocated_bytes(file.as_file())
        };
        let full = fill(context);
        assert!(full >= MIB, "{full}");
        for operation in [Operation::Discard, Operation::WriteZeroes { deallocate: true, fua: true }] {
            run(context, &image, operation, 65_536, MIB - 65_536, &[]).unwrap();
            let left = allocated_bytes(file.as_file());
            assert!(!holes || left <= full - (MIB - 65_536), "{operation:?} left {left} of {full}");
            assert_eq!(file.as_file().metadata().unwrap().len(), MIB, "the image is as long as before");
            assert_eq!(fill(context), full);
        }
        // Without leave to deallocate the blocks stay.
        let zeroes = Operation::WriteZeroes { deallocate: false, fua: true };
        run(context, &image, zeroes, 0, MIB, &[]).unwrap();
        assert_eq!(allocated_bytes(file.as_file()), full);
        run(context, &image, Operation::Read, 0, MIB, &memory).unwrap();
        assert!(peek(context.memory(), &memory).iter().all(|&byte| byte == 0));
    });
}

#[test]
fn a_ring_registers_each_file_once_and_lets_it_be_released() {
    let mut context = IoContext::new(guest(), 4).unwrap();
    let files: Vec<_> = (0..3).map(|_| temporary_file(MIB)).collect();
    let images: Vec<_> =
        files.iter().map(|file| FileImage::open(file.path(), FileOptions::default()).unwrap()).collect();
    let mut read = |image: &FileImage| {
        run(&mut context, image, Operation::Read, 0, 4096, &[range(0, 4096)]).unwrap();
        context.registered_files()
    };
    for round in 0..3 {
        for (index, image) in images.iter().enumerate() {
            let registered = read(image);
            if registered == 0 {
                println!("this kernel has no tables of registered files");
                return;
            }
            assert_eq!(registered, if round == 0 { index + 1 } else { 3 });
        }
    }
    // Another descriptor takes the place of the one that is gone, and no request goes to the file that was there before.
    images[1].release().unwrap();
    let other = temporary_file(MIB);
    let mut contents = other.as_file();
    std::io::Write::write_all(&mut contents, &[9; 4096]).unwrap();
    let image = FileImage::open(other.path(), FileOptions::default()).unwrap();
    assert_eq!(read(&image), 3);
    assert_eq!(peek(context.memory(), &[range(0, 4096)]), [9; 4096]);
    FileImage::open(files[1].path(), FileOptions::default()).expect("the lock is gone with the release");
}

#[test]
fn completions_without_an_event_are_told_of_when_it_is_wanted_again() {
    let file = temporary_file(MIB);
    let image =
        FileImage::open(file.path(), FileOptions { direct: false, ..FileOptions::default() }).unwrap();
    let mut context = IoContext::new(guest(), 4).unwrap();
    context.disable_event();
    for round in 0..10 {
        queue(&mut context, &image, round, Operation::Flush, 0, 0, &[]);
        context.submit().unwrap();
        let mut completions = Vec::new();
        while completions.is_empty() {
            context.completions(&mut completions);
            std::thread::yield_now();
        }
        assert_eq!(completions[0].token, round);
        assert!(context.event_fd().read().is_err(), "nobody wanted it");
    }
    queue(&mut context, &image, 10, Operation::Read, 0, 512, &[range(0, 512)]);
    context.submit().unwrap();
    // It may come before the switch or after it: one of both tells of it.
    let missed = context.enable_event();
    assert!(missed || wait_for_event(&context, 30));
    let mut completions = Vec::new();
    context.completions(&mut completions);
    assert_eq!(completions.len(), 1);
    assert!(!context.enable_event(), "nothing is left to tell of");
}

/// A block device over a file, gone with this value.
pub struct Loop(pub PathBuf);

impl Loop {
    pub fn over(file: &Path) -> Option<Self> {
        let made = Command::new("losetup").args(["--find", "--show"]).arg(file).output();
        match made {
            Ok(output) if output.status.success() => {
                Some(Self(String::from_utf8_lossy(&output.stdout).trim().into()))
            }
            Ok(output) => {
                println!("skipped: no loop device: {}", String::from_utf8_lossy(&output.stderr).trim());
                None
            }
            Err(error) => {
                println!("skipped: no losetup: {error}");
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

#[test]
fn a_block_device_is_an_image_with_holes() {
    let file = temporary_file(4 * MIB);
    let Some(device) = Loop::over(file.path()) else { return };
    on_both_engines(4, |context| {
        let image = FileImage::open(&device.0, FileOptions::default()).unwrap();
        assert_eq!(image.identity().capacity_bytes, 4 * MIB);
        let memory = [range(0, 2 * MIB)];
        let pattern = Numbers(3).bytes(2 * MIB);
        poke(context.memory(), &memory, &pattern);
        run(context, &image, Operation::Write { fua: true }, MIB, 2 * MIB, &memory).unwrap();
        let full = allocated_bytes(file.as_file());
        assert!(full >= 2 * MIB, "{full}");
        for operation in [
            Operation::WriteZeroes { deallocate: false, fua: true },
            Operation::WriteZeroes { deallocate: true, fua: true },
            Operation::Discard,
        ] {
            run(context, &image, operation, MIB, MIB, &[]).unwrap();
            run(context, &image, Operation::Flush, 0, 0, &[]).unwrap();
            run(context, &image, Operation::Read, MIB, 2 * MIB, &memory).unwrap();
            let found = peek(context.memory(), &memory);
            assert!(found[..MIB as usize].iter().all(|&byte| byte == 0), "{operation:?}");
            assert!(found[MIB as usize..] == pattern[MIB as usize..], "{operation:?} stays in its range");
        }
        let left = allocated_bytes(file.as_file());
        assert!(!makes_holes(file.as_file()) || left < full, "{left} of {full} are left");
        image.release().unwrap();
    });
}
