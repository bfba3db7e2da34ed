//! Overlays: what is read from the base, that it is never written, and which two do not belong together.

use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::Path;

use imago::FormatCreateBuilder;
use imago::qcow2::Qcow2;
use tempfile::TempDir;

use super::*;
use crate::{Base, BaseFormat, Error, create_overlay};

/// A base whose byte number n is n / 4096 + 1, and overlays over it.
struct Bed {
    folder: TempDir,
    base: Base,
}

fn contents() -> Vec<u8> {
    (0..CAPACITY).map(|at| (at / 4096 + 1) as u8).collect()
}

impl Bed {
    fn new(format: BaseFormat) -> Self {
        let folder = TempDir::new().unwrap();
        let base = Base { path: folder.path().join("base"), format };
        match format {
            BaseFormat::Raw => std::fs::write(&base.path, contents()).unwrap(),
            BaseFormat::Qcow2 => {
                let file = qcow2::temporary_qcow2(CAPACITY);
                let image = Qcow2Image::open(file.path(), false).unwrap();
                let mut context = IoContext::new(guest(), 1).unwrap();
                let memory = [range(0, MIB)];
                for (number, chunk) in contents().chunks(MIB as usize).enumerate() {
                    poke(context.memory(), &memory, chunk);
                    let write = Operation::Write { fua: false };
                    run(&mut context, &image, write, number as u64 * MIB, MIB, &memory).unwrap();
                }
                image.release().unwrap();
                std::fs::copy(file.path(), &base.path).unwrap();
            }
        }
        Self { folder, base }
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.folder.path().join(name)
    }

    /// A new overlay, open.
    fn overlay(&self, name: &str) -> Qcow2Image {
        let path = self.path(name);
        let file = std::fs::File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        create_overlay(&file, &path, &self.base).unwrap();
        self.reopened(name).unwrap()
    }

    fn reopened(&self, name: &str) -> Result<Qcow2Image, Error> {
        self.over(name, &self.base)
    }

    fn over(&self, name: &str, base: &Base) -> Result<Qcow2Image, Error> {
        let image = Qcow2Image::inspect_over(self.path(name), base.clone(), false)?;
        image.acquire()?;
        Ok(image)
    }
}

fn write(context: &mut IoContext, image: &Qcow2Image, offset: u64, bytes: &[u8]) {
    let memory = [range(0x1000, bytes.len() as u64)];
    poke(context.memory(), &memory, bytes);
    let operation = Operation::Write { fua: true };
    run(context, image, operation, offset, bytes.len() as u64, &memory).unwrap();
}

fn read_all(context: &mut IoContext, image: &Qcow2Image) -> Vec<u8> {
    let memory = [range(0, MIB)];
    let chunk = |number| {
        run(context, image, Operation::Read, number * MIB, MIB, &memory).unwrap();
        peek(context.memory(), &memory)
    };
    (0..CAPACITY / MIB).flat_map(chunk).collect()
}

#[test]
fn an_overlay_is_its_base_but_for_what_was_written() {
    for format in [BaseFormat::Raw, BaseFormat::Qcow2] {
        on_both_engines(4, |context| {
            let bed = Bed::new(format);
            let before = std::fs::read(&bed.base.path).unwrap();
            let overlay = bed.overlay("one");
            let identity = overlay.identity();
            let kind = if format == BaseFormat::Raw { "file" } else { "qcow2" };
            assert_eq!((identity.kind, identity.capacity_bytes), (kind, CAPACITY));
            assert!(std::fs::metadata(bed.path("one")).unwrap().len() < MIB, "it holds nothing yet");
            let mut expected = contents();
            assert!(read_all(context, &overlay) == expected);

            // Less than a cluster, more than one, and the end.
            for (offset, length, value) in
                [(70_144, 512, 0xa1), (3 * MIB + 4096, 200_704, 0xa2), (CAPACITY - 512, 512, 0xa3)]
            {
                write(context, &overlay, offset, &vec![value; length]);
                expected[offset as usize..][..length].fill(value);
            }
            let zeroes = Operation::WriteZeroes { deallocate: true, fua: false };
            run(context, &overlay, zeroes, 5 * MIB, 131_072, &[]).unwrap();
            expected[5 * MIB as usize..][..131_072].fill(0);
            assert!(read_all(context, &overlay) == expected);

            overlay.release().unwrap();
            drop(overlay);
            let overlay = bed.reopened("one").unwrap();
            assert!(read_all(context, &overlay) == expected, "as another process finds it");
            assert!(std::fs::read(&bed.base.path).unwrap() == before, "nothing was written to the base");
        });
    }
}

/// "Afterwards it reads as zeroes or as before": never as what the base has below what was written.
#[test]
fn what_is_discarded_does_not_show_the_base() {
    on_both_engines(4, |context| {
        let bed = Bed::new(BaseFormat::Raw);
        let overlay = bed.overlay("one");
        write(context, &overlay, MIB, &[0xa1; 131_072]);
        run(context, &overlay, Operation::Discard, MIB, 131_072, &[]).unwrap();
        run(context, &overlay, Operation::Discard, 2 * MIB, 131_072, &[]).unwrap();
        let found = read_all(context, &overlay);
        let written = &found[MIB as usize..][..131_072];
        assert!(written.iter().all(|byte| *byte == 0) || written.iter().all(|byte| *byte == 0xa1));
        let base = &found[2 * MIB as usize..][..131_072];
        assert!(base.iter().all(|byte| *byte == 0) || base == &contents()[2 * MIB as usize..][..131_072]);
    });
}

#[test]
fn several_overlays_share_a_base_that_nobody_can_write_meanwhile() {
    let bed = Bed::new(BaseFormat::Raw);
    let (one, two) = (bed.overlay("one"), bed.overlay("two"));
    let mut context = IoContext::new(guest(), 4).unwrap();
    write(&mut context, &one, 0, &[0xa1; 512]);
    write(&mut context, &two, 0, &[0xa2; 512]);
    assert_eq!(read_all(&mut context, &one)[..513], [&[0xa1; 512][..], &[1]].concat());
    assert_eq!(read_all(&mut context, &two)[..513], [&[0xa2; 512][..], &[1]].concat());

    let base = || FileImage::open(&bed.base.path, FileOptions::default());
    assert!(matches!(base(), Err(Error::Locked { .. })));
    assert!(matches!(bed.reopened("one"), Err(Error::Locked { .. })), "an overlay has one holder");
    one.release().unwrap();
    assert!(matches!(base(), Err(Error::Locked { .. })), "the other still reads it");
    two.release().unwrap();
    let writer = base().unwrap();
    let error = one.acquire().unwrap_err();
    assert!(matches!(&error, Error::Locked { path, .. } if *path == bed.base.path), "{error}");
    writer.release().unwrap();
    one.acquire().unwrap();
}

#[test]
fn a_base_that_is_not_what_it_was_is_refused() {
    let bed = Bed::new(BaseFormat::Raw);
    let overlay = bed.overlay("one");
    overlay.release().unwrap();
    let before = std::fs::metadata(&bed.base.path).unwrap().modified().unwrap();
    let base = std::fs::File::options().write(true).open(&bed.base.path).unwrap();
    base.write_all_at(&[0xff], 5000).unwrap();
    // Two writes may be in one tick of the clock of the file system.
    base.set_modified(before + Duration::from_nanos(1_000_000)).unwrap();
    for error in [overlay.acquire().unwrap_err(), bed.reopened("one").unwrap_err()] {
        let text = error.to_string();
        assert!(text.contains("not what it was when the overlay was made"), "{text}");
    }
    base.set_modified(before).unwrap();
    overlay.acquire().unwrap();
    overlay.release().unwrap();
    base.set_len(CAPACITY + 4096).unwrap();
    base.set_modified(before).unwrap();
    assert!(overlay.acquire().unwrap_err().to_string().contains("not what it was"));
}

/// What is said, with its cause.
fn refusal(result: Result<Qcow2Image, Error>) -> String {
    let error = result.unwrap_err();
    let source = std::error::Error::source(&error).map(|source| format!(": {source}"));
    format!("{error}{}", source.unwrap_or_default())
}

#[test]
fn only_who_opens_an_overlay_says_what_it_lies_over() {
    let bed = Bed::new(BaseFormat::Raw);
    drop(bed.overlay("one"));
    let text = refusal(Qcow2Image::open(bed.path("one"), false));
    assert!(text.contains("denied"), "nobody named a base: {text}");

    // A header that leads elsewhere leads nowhere.
    let secret = bed.path("secret");
    std::fs::write(&secret, vec![0xee; CAPACITY as usize]).unwrap();
    let mut bytes = std::fs::read(bed.path("one")).unwrap();
    let name = bed.base.path.to_str().unwrap().as_bytes();
    let at = bytes.windows(name.len()).position(|window| window == name).expect("the name is there");
    let other = secret.to_str().unwrap().as_bytes();
    bytes[at..at + other.len()].copy_from_slice(other);
    bytes[16..20].copy_from_slice(&(other.len() as u32).to_be_bytes());
    std::fs::write(bed.path("two"), bytes).unwrap();
    let mut context = IoContext::new(guest(), 4).unwrap();
    assert!(read_all(&mut context, &bed.reopened("two").unwrap()) == contents());

    let plain = qcow2::temporary_qcow2(CAPACITY);
    std::fs::copy(plain.path(), bed.path("three")).unwrap();
    let text = refusal(bed.reopened("three"));
    assert!(text.contains("not made as an overlay"), "{text}");
    let text = refusal(bed.over("one", &Base { path: secret, format: BaseFormat::Raw }));
    assert!(text.contains("not what it was"), "{text}");
}

#[test]
fn a_base_has_no_base() {
    let bed = Bed::new(BaseFormat::Raw);
    drop(bed.overlay("one"));
    let base = Base { path: bed.path("one"), format: BaseFormat::Qcow2 };
    let file =
        std::fs::File::options().read(true).write(true).create_new(true).open(bed.path("two")).unwrap();
    let error = create_overlay(&file, Path::new("two"), &base).unwrap_err();
    let text = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
    assert!(text.contains("denied"), "{error}: {text}");
}

#[test]
fn a_header_of_any_bytes_is_read_to_its_end() {
    let bed = Bed::new(BaseFormat::Raw);
    drop(bed.overlay("one"));
    let whole = std::fs::read(bed.path("one")).unwrap();
    for cut in (0..600).chain([whole.len() - 1]) {
        std::fs::write(bed.path("cut"), &whole[..cut]).unwrap();
        let _whatever = bed.reopened("cut");
    }
    for at in 4..600 {
        for bit in [0, 7] {
            let mut flipped = whole.clone();
            flipped[at] ^= 1 << bit;
            std::fs::File::create(bed.path("flipped")).unwrap().write_all(&flipped).unwrap();
            let _whatever = bed.reopened("flipped");
        }
    }
    // An extension that is as long as can be said.
    let mut long = whole;
    let first = u32::from_be_bytes(long[100..104].try_into().unwrap()) as usize;
    long[first + 4..first + 8].fill(0xff);
    std::fs::write(bed.path("long"), &long).unwrap();
    assert!(bed.reopened("long").is_err());
}

/// An overlay that another tool has made is not taken for one of ours.
#[test]
fn an_overlay_without_a_record_is_refused() {
    let bed = Bed::new(BaseFormat::Raw);
    let file =
        std::fs::File::options().read(true).write(true).create_new(true).open(bed.path("one")).unwrap();
    let storage = imago::file::File::try_from(file).unwrap();
    Qcow2::<imago::file::File>::create_builder(storage)
        .size(CAPACITY)
        .backing(bed.base.path.to_str().unwrap().to_owned(), "raw".to_owned())
        .create()
        .unwrap();
    let text = refusal(bed.reopened("one"));
    assert!(text.contains("not made as an overlay"), "{text}");
}
