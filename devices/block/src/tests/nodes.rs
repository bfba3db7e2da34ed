//! Images that are opened by descriptors of their very files, which another process passes.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use super::files::Loop;
use super::*;
use crate::{Base, BaseFormat, Error, create_overlay};

/// An image of one process, and the same in another that waits for it.
struct Pair {
    folder: tempfile::TempDir,
    held: Box<dyn Backend>,
    waiting: Box<dyn Backend>,
    /// Of its files, in order.
    names: Vec<PathBuf>,
}

impl Pair {
    /// `open` makes the image in a folder, and `inspect` looks at what it has made.
    fn new(
        names: &[&str],
        make: impl Fn(&[PathBuf]),
        inspect: impl Fn(&[PathBuf]) -> Box<dyn Backend>,
    ) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let names: Vec<_> = names.iter().map(|name| folder.path().join(name)).collect();
        make(&names);
        let (held, waiting) = (inspect(&names), inspect(&names));
        held.acquire().unwrap();
        Self { folder, held, waiting, names }
    }

    fn raw() -> Self {
        Self::new(
            &["image"],
            |names| File::create_new(&names[0]).unwrap().set_len(CAPACITY).unwrap(),
            |names| Box::new(FileImage::inspect(&names[0], FileOptions::default()).unwrap()),
        )
    }

    fn qcow2() -> Self {
        Self::new(
            &["image"],
            |names| drop(qcow2::temporary_qcow2(CAPACITY).persist(&names[0]).unwrap()),
            |names| Box::new(Qcow2Image::inspect(&names[0], false).unwrap()),
        )
    }

    fn overlay() -> Self {
        let base = |names: &[PathBuf]| Base { path: names[1].clone(), format: BaseFormat::Raw };
        Self::new(
            &["image", "base"],
            |names| {
                std::fs::write(&names[1], Numbers(3).bytes(CAPACITY)).unwrap();
                let overlay = File::options().read(true).write(true).create_new(true).open(&names[0]);
                create_overlay(&overlay.unwrap(), &names[0], &base(names)).unwrap();
            },
            |names| Box::new(Qcow2Image::inspect_over(&names[0], base(names), false).unwrap()),
        )
    }

    fn all() -> [(&'static str, Self); 3] {
        [("raw", Self::raw()), ("qcow2", Self::qcow2()), ("overlay", Self::overlay())]
    }

    fn pass(&self) {
        let (files, nodes) = (self.waiting.files(), self.held.nodes().unwrap());
        let paths: Vec<_> = files.iter().map(|file| file.path()).collect();
        assert!(paths == self.names && nodes.len() == files.len(), "{paths:?} {nodes:?}");
        files.iter().zip(nodes).for_each(|(file, node)| file.adopt(node).unwrap());
    }

    /// Every file has another name now, and its old one leads to another file.
    fn replace(&self) {
        for name in &self.names {
            std::fs::rename(name, name.with_extension("moved")).unwrap();
            std::fs::write(name, "another").unwrap();
        }
    }
}

fn write(context: &mut IoContext, image: &dyn Backend, contents: &[u8]) {
    let memory = [range(0x1000, contents.len() as u64)];
    poke(context.memory(), &memory, contents);
    run(context, image, Operation::Write { fua: true }, 4096, contents.len() as u64, &memory).unwrap();
}

fn read(context: &mut IoContext, image: &dyn Backend) -> Vec<u8> {
    let memory = [range(0x4000, 4096)];
    run(context, image, Operation::Read, 4096, 4096, &memory).unwrap();
    peek(context.memory(), &memory)
}

#[test]
fn an_image_goes_on_to_be_the_file_that_was_passed_whatever_its_name_leads_to() {
    for (kind, pair) in Pair::all() {
        let mut context = IoContext::new(guest(), 1).unwrap();
        write(&mut context, &*pair.held, &[1; 4096]);
        pair.pass();
        pair.replace();
        pair.held.release().unwrap();
        pair.waiting.acquire().unwrap_or_else(|error| panic!("{kind}: {error}"));
        assert_eq!(read(&mut context, &*pair.waiting), [1; 4096], "{kind}");
        write(&mut context, &*pair.waiting, &[2; 4096]);
        assert!(pair.names.iter().all(|name| std::fs::read(name).unwrap() == b"another"), "{kind}");
        // And so it is in the process that had it, should it come back there.
        pair.waiting.release().unwrap();
        pair.held.acquire().unwrap_or_else(|error| panic!("{kind}: {error}"));
        assert_eq!(read(&mut context, &*pair.held), [2; 4096], "{kind}");
        assert_eq!(pair.held.nodes().unwrap().len(), pair.names.len(), "{kind}");
    }
}

#[test]
fn a_name_that_was_not_passed_is_asked_again() {
    for (kind, pair) in Pair::all() {
        pair.replace();
        pair.held.release().unwrap();
        assert!(pair.waiting.acquire().is_err(), "{kind}");
    }
}

#[test]
fn no_lock_goes_along_and_each_has_its_own() {
    for (kind, pair) in Pair::all() {
        pair.pass();
        let more = pair.held.nodes().unwrap();
        assert!(matches!(pair.waiting.acquire(), Err(Error::Locked { .. })), "{kind}");
        // Not by giving it up: as at the end of its process, when the other still has what was passed.
        let Pair { held, waiting, folder, .. } = pair;
        drop(held);
        waiting.acquire().unwrap_or_else(|error| panic!("{kind}: {error}"));
        let other = || FileImage::open(folder.path().join("image"), FileOptions::default());
        assert!(matches!(other(), Err(Error::Locked { .. })), "{kind}");
        waiting.release().unwrap();
        other().unwrap_or_else(|error| panic!("{kind}: {error}"));
        drop(more);
    }
}

#[test]
fn what_is_passed_can_be_neither_read_nor_written() {
    let pair = Pair::raw();
    let mut file = File::from(pair.held.nodes().unwrap().remove(0));
    assert!(file.read(&mut [0; 1]).is_err() && file.set_len(1).is_err());
    pair.held.release().unwrap();
    assert!(pair.held.nodes().unwrap().is_empty(), "it may be another's by now");
}

fn node(path: &Path) -> OwnedFd {
    rustix::fs::open(path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty()).unwrap()
}

/// As a peer would pass them to have this process open or hold what it must not; its own files stay usable by their names.
#[test]
fn what_is_not_a_node_of_the_very_file_is_refused() {
    let pair = Pair::overlay();
    let path = |name: &str| pair.folder.path().join(name);
    nix::unistd::mkfifo(&path("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    std::os::unix::fs::symlink(path("image"), path("link")).unwrap();
    std::fs::copy(path("image"), path("image.copy")).unwrap();
    std::fs::copy(path("base"), path("base.copy")).unwrap();
    let files = pair.waiting.files();
    let [image, base] = files.as_slice() else { panic!("an overlay and its base") };
    let neither = "what came is neither a regular file nor a block device";
    let another = |name: &str| format!("{:?} came, which is another file (device ", path(name));
    let open = || OwnedFd::from(File::open(path("image")).unwrap());
    let cases = [
        (image, open(), "what came is open, and could have a lock".to_owned()),
        (image, node(&path("pipe")), neither.to_owned()),
        (image, node(&path("link")), neither.to_owned()),
        (image, node(pair.folder.path()), neither.to_owned()),
        (image, node(Path::new("/dev/null")), neither.to_owned()),
        (image, node(&path("image.copy")), another("image.copy")),
        (image, node(&path("base")), another("base")),
        (base, node(&path("base.copy")), another("base.copy")),
    ];
    for (file, passed, reason) in cases {
        let error = file.adopt(passed).unwrap_err();
        assert!(matches!(error, Error::Passed { .. }), "{error}");
        let (text, name) = (error.to_string(), file.path().to_str().unwrap());
        assert!(text.contains(&reason) && text.contains(name), "{reason}: {text}");
    }
    pair.held.release().unwrap();
    pair.waiting.acquire().unwrap();
    image.adopt(node(&path("image"))).unwrap();
    assert!(image.adopt(node(&path("image"))).unwrap_err().to_string().contains("one was passed before"));
}

#[test]
fn a_block_device_is_opened_by_its_node() {
    let file = temporary_file(MIB);
    let Some(device) = Loop::over(file.path()) else { return };
    let options = FileOptions { direct: false, ..FileOptions::default() };
    let held = FileImage::open(&device.0, options).unwrap();
    let waiting = FileImage::inspect(&device.0, options).unwrap();
    let mut context = IoContext::new(guest(), 1).unwrap();
    write(&mut context, &held, &[5; 4096]);
    waiting.files()[0].adopt(held.nodes().unwrap().remove(0)).unwrap();
    held.release().unwrap();
    waiting.acquire().unwrap();
    assert_eq!(read(&mut context, &waiting), [5; 4096]);
}
