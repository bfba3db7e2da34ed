//! qcow2: the format on both engines, its lock, and files that are not to be believed.

use std::io::{Read, Seek, SeekFrom, Write};

use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatCreateBuilder};

use super::*;
use crate::{Error, Qcow2Image};

/// An empty qcow2 file.
pub fn temporary_qcow2(capacity: u64) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    let storage = imago::file::File::try_from(file.reopen().unwrap()).unwrap();
    Qcow2::<imago::file::File, Arc<FormatAccess<_>>>::create_builder(storage)
        .size(capacity)
        .create()
        .unwrap();
    file
}

fn overwrite(file: &NamedTempFile, offset: u64, bytes: &[u8]) {
    let mut file = file.reopen().unwrap();
    file.seek(SeekFrom::Start(offset)).unwrap();
    file.write_all(bytes).unwrap();
}

/// The error with its cause.
fn refusal(file: &NamedTempFile) -> String {
    let error = Qcow2Image::open(file.path(), false).unwrap_err();
    assert!(matches!(error, Error::Format { .. }), "{error}");
    format!("{error}: {}", std::error::Error::source(&error).unwrap())
}

#[test]
fn the_capacity_is_the_formats_and_not_the_files() {
    let file = temporary_qcow2(64 * MIB);
    assert!(file.as_file().metadata().unwrap().len() < MIB, "nothing is written yet");
    let image = Qcow2Image::inspect(file.path(), false).unwrap();
    let identity = image.identity();
    assert_eq!((identity.kind, identity.capacity_bytes, identity.read_only), ("qcow2", 64 * MIB, false));
}

#[test]
fn what_is_released_is_whole_for_the_next_holder() {
    on_both_engines(4, |context| {
        let file = temporary_qcow2(CAPACITY);
        let image = Qcow2Image::open(file.path(), false).unwrap();
        let other = Qcow2Image::inspect(file.path(), false).unwrap();
        let memory = [range(0x1000, 65_536)];
        for round in 1..4_u8 {
            let (holder, waiter) = if round % 2 == 1 { (&image, &other) } else { (&other, &image) };
            assert!(matches!(waiter.acquire(), Err(Error::Locked { .. })), "one at a time");
            poke(context.memory(), &memory, &vec![round; 65_536]);
            let offset = u64::from(round) * MIB;
            run(context, holder, Operation::Write { fua: false }, offset, 65_536, &memory).unwrap();
            let refused = run(context, waiter, Operation::Read, offset, 65_536, &memory);
            assert_eq!(refused, Err(Failure::Released));
            holder.release().unwrap();
            waiter.acquire().unwrap();
            for earlier in 1..=round {
                run(context, waiter, Operation::Read, u64::from(earlier) * MIB, 65_536, &memory).unwrap();
                assert!(peek(context.memory(), &memory).iter().all(|&byte| byte == earlier));
            }
        }
    });
}

#[test]
fn a_flush_writes_the_tables_of_the_file_too() {
    let file = temporary_qcow2(CAPACITY);
    let image = Qcow2Image::open(file.path(), false).unwrap();
    let mut context = IoContext::new(guest(), 4).unwrap();
    for (flush, value) in [(true, 1_u8), (false, 2)] {
        let memory = [range(0, 4096)];
        poke(context.memory(), &memory, &[value; 4096]);
        let offset = u64::from(value) * MIB;
        run(&mut context, &image, Operation::Write { fua: !flush }, offset, 4096, &memory).unwrap();
        if flush {
            run(&mut context, &image, Operation::Flush, 0, 0, &[]).unwrap();
        }
        // As after a crash of this process: another one that reads the file as it is.
        let copy = NamedTempFile::new().unwrap();
        let mut contents = Vec::new();
        file.reopen().unwrap().read_to_end(&mut contents).unwrap();
        overwrite(&copy, 0, &contents);
        let survivor = Qcow2Image::open(copy.path(), true).unwrap();
        run(&mut context, &survivor, Operation::Read, offset, 4096, &memory).unwrap();
        assert_eq!(peek(context.memory(), &memory), [value; 4096]);
    }
}

#[test]
fn damaged_files_are_refused_with_the_reason() {
    let text = refusal(&temporary_file(MIB));
    assert!(text.contains("is no qcow2 image that can be used"), "{text}");

    let version = temporary_qcow2(MIB);
    overwrite(&version, 4, &77_u32.to_be_bytes());
    assert!(refusal(&version).contains("77"), "{}", refusal(&version));

    let table = temporary_qcow2(MIB);
    overwrite(&table, 40, &u64::MAX.to_be_bytes());
    println!("{}", refusal(&table));

    let truncated = temporary_qcow2(MIB);
    truncated.as_file().set_len(40).unwrap();
    println!("{}", refusal(&truncated));
}

#[test]
fn a_file_that_names_others_is_refused() {
    let file = temporary_qcow2(MIB);
    let name = b"/etc/passwd";
    overwrite(&file, 1024, name);
    overwrite(&file, 8, &[&1024_u64.to_be_bytes()[..], &(name.len() as u32).to_be_bytes()].concat());
    let text = refusal(&file);
    assert!(text.contains("denied") || text.contains("format"), "{text}");
}

#[test]
fn a_read_only_image_is_shared_by_readers() {
    let file = temporary_qcow2(MIB);
    let one = Qcow2Image::open(file.path(), true).unwrap();
    let two = Qcow2Image::open(file.path(), true).unwrap();
    let mut context = IoContext::new(guest(), 1).unwrap();
    let write = run(&mut context, &one, Operation::Write { fua: false }, 0, 512, &[range(0, 512)]);
    assert_eq!(write, Err(Failure::ReadOnly));
    run(&mut context, &two, Operation::Read, 0, 512, &[range(0, 512)]).unwrap();
    assert!(matches!(Qcow2Image::open(file.path(), false), Err(Error::Locked { .. })));
}
