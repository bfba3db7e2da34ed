//! The images that belong to a snapshot, and how they are copied at one instant.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, bail, ensure};
use block::Base;
use engine::{Image, ImageCopy};
use rustix::fs::{SeekFrom, copy_file_range, ioctl_ficlone, seek};
use rustix::io::Errno;

use crate::config::{BackendSpec, MachineSpec};
use crate::machine::Machine;

/// The images of the machine of `spec` that its guest may write. Those that it only reads stay where they are.
///
/// # Errors
/// The guest may write something that is no image of the host's, or there are other namespaces than those of `spec`.
pub fn of(spec: &MachineSpec, machine: &Machine) -> anyhow::Result<Vec<Image>> {
    for (controller, disk) in spec.controllers.iter().zip(machine.resources().disks()) {
        let serial = &controller.serial;
        ensure!(
            controller.subsystem.is_none(),
            "the folder of subsystem {serial} cannot be copied yet: what its guest created there would be missing"
        );
        if !disk.is_first() {
            continue;
        }
        let now: Vec<u32> = disk.subsystem.images().into_iter().map(|(nsid, _)| nsid).collect();
        let mut declared: Vec<u32> = controller.namespaces.iter().map(|namespace| namespace.nsid).collect();
        declared.sort_unstable();
        if now != declared {
            bail!(
                "namespaces of {serial} were added or removed since the start: {declared:?} then, {now:?} now"
            );
        }
    }
    let image = |image: Writable<'_>| Image {
        name: image.name(),
        path: image.path.to_owned(),
        base: image.base.map(|base| base.path.clone()),
    };
    Ok(writable(spec).into_iter().map(image).collect())
}

/// An image that the guest may write.
#[derive(Debug)]
pub struct Writable<'a> {
    /// What the name of a copy begins with.
    pub stem: String,
    /// Where it is.
    pub path: &'a Path,
    /// What it lies over. A copy of it lies over the same, which nobody writes.
    pub base: Option<&'a Base>,
    kind: &'static str,
}

impl Writable<'_> {
    /// The name that a copy has.
    #[must_use]
    pub fn name(&self) -> String {
        format!("{}.{}", self.stem, self.kind)
    }
}

/// The images of `spec` that are not only read.
#[must_use]
pub fn writable(spec: &MachineSpec) -> Vec<Writable<'_>> {
    let mut images = Vec::new();
    for controller in &spec.controllers {
        let serial = &controller.serial;
        for namespace in controller.namespaces.iter().filter(|namespace| !namespace.read_only) {
            let (path, base, kind) = match &namespace.backend {
                BackendSpec::File(path) => (path, None, "raw"),
                BackendSpec::Qcow2(path) => (path, None, "qcow2"),
                BackendSpec::Overlay { path, base } => (path, Some(base), "qcow2"),
                // In guest memory, or nowhere.
                BackendSpec::Memory { .. } | BackendSpec::Null { .. } => continue,
            };
            // A serial number may have any printable character.
            let plain = |letter: char| if letter.is_ascii_alphanumeric() { letter } else { '_' };
            let serial: String = serial.chars().map(plain).collect();
            images.push(Writable { stem: format!("{serial}-{}", namespace.nsid), path, base, kind });
        }
    }
    images
}

/// Makes the empty file `into` what the image is.
///
/// # Errors
/// The file system cannot do it, or there is no room.
pub fn copy(image: &Path, into: &File, how: ImageCopy) -> anyhow::Result<()> {
    let from = File::open(image).with_context(|| format!("cannot open {}", image.display()))?;
    match how {
        ImageCopy::Reflink => ioctl_ficlone(into, &from).with_context(|| {
            format!(
                "the file system of {} cannot share its blocks with a copy; --copy-disks copies them while the guest stands still",
                image.display()
            )
        }),
        ImageCopy::Bytes => {
            copy_data(&from, into).with_context(|| format!("cannot copy {}", image.display()))
        }
    }
}

/// What is read and written at a time where the kernel does not copy.
const PIECE_BYTES: u64 = 1 << 20;

/// Copies what is no hole.
fn copy_data(from: &File, into: &File) -> io::Result<()> {
    // Not by its metadata: a block device has a length only at its end.
    let length_bytes = seek(from, SeekFrom::End(0))?;
    into.set_len(length_bytes)?;
    let mut end = 0;
    while end < length_bytes {
        let mut start = match seek(from, SeekFrom::Data(end)) {
            Ok(start) => start,
            Err(Errno::NXIO) => return Ok(()),
            // A block device has no holes that it tells of.
            Err(Errno::INVAL) => end,
            Err(errno) => return Err(errno.into()),
        };
        end = match seek(from, SeekFrom::Hole(start)) {
            Err(Errno::INVAL) => length_bytes,
            hole => hole?,
        };
        while start < end {
            start += copy_piece(from, into, start, end - start)?;
        }
    }
    Ok(())
}

/// Copies some of `left_bytes` from `start` on, and says how many; by the kernel, which can share blocks, where it does so.
fn copy_piece(from: &File, into: &File, start: u64, left_bytes: u64) -> io::Result<u64> {
    let (mut read_at, mut write_at) = (start, start);
    let left = usize::try_from(left_bytes).unwrap_or(usize::MAX);
    match copy_file_range(from, Some(&mut read_at), into, Some(&mut write_at), left) {
        Ok(0) => Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(count) => Ok(count as u64),
        // They are on different file systems, or on one that does not copy (copy_file_range(2)).
        Err(Errno::XDEV | Errno::INVAL | Errno::OPNOTSUPP | Errno::NOSYS) => {
            let mut piece = vec![0; left_bytes.min(PIECE_BYTES) as usize];
            from.read_exact_at(&mut piece, start)?;
            into.write_all_at(&piece, start)?;
            Ok(piece.len() as u64)
        }
        Err(errno) => Err(errno.into()),
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Seek};
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_copy_is_what_the_image_is_and_has_its_holes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        let image = File::create(&path).unwrap();
        image.set_len(64 << 20).unwrap();
        image.write_all_at(&[7; 70_000], 3 << 20).unwrap();
        image.write_all_at(&[9; 10], (64 << 20) - 10).unwrap();
        let copied =
            File::options().read(true).write(true).create_new(true).open(folder.path().join("copy")).unwrap();
        copy(&path, &copied, ImageCopy::Bytes).unwrap();
        assert_eq!(copied.metadata().unwrap().len(), 64 << 20);
        assert!(copied.metadata().unwrap().blocks() * 512 < 1 << 20, "its holes are holes");
        let byte = |at| {
            let mut byte = [0];
            copied.read_exact_at(&mut byte, at).unwrap();
            byte[0]
        };
        assert_eq!(
            [0, 3 << 20, (3 << 20) + 69_999, (3 << 20) + 70_000, (64 << 20) - 1].map(byte),
            [0, 7, 7, 0, 9]
        );
    }

    /// A snapshot may lie elsewhere than the images.
    #[test]
    fn a_copy_on_another_file_system_is_what_the_image_is() {
        let mut image = tempfile::tempfile().unwrap();
        image.set_len(5 << 20).unwrap();
        image.write_all_at(&[7; (2 << 20) + 5], 1 << 20).unwrap();
        let copied = File::from(rustix::fs::memfd_create("copy", rustix::fs::MemfdFlags::CLOEXEC).unwrap());
        copy_data(&image, &copied).unwrap();
        let contents = |file: &mut File| {
            let mut bytes = Vec::new();
            file.rewind().unwrap();
            file.read_to_end(&mut bytes).unwrap();
            bytes
        };
        assert!(copied.metadata().unwrap().blocks() * 512 < 3 << 20, "its holes are holes");
        assert!(contents(&mut image) == contents(&mut { copied }));
    }

    #[test]
    fn an_image_that_cannot_be_shared_says_what_to_do() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        std::fs::write(&path, [1; 8192]).unwrap();
        // A memfd shares blocks with no file.
        let memfd = rustix::fs::memfd_create("copy", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let error = copy(&path, &File::from(memfd), ImageCopy::Reflink).unwrap_err();
        assert!(format!("{error:#}").contains("--copy-disks"), "{error:#}");
    }
}
