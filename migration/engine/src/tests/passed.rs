//! Memory of the mock machines that can go from one to the other itself, and files of their images.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;

use dirty_bitmap::DirtyBitmap;
use rustix::fs::{MemfdFlags, Mode, OFlags, fcntl_getfl, ftruncate, memfd_create};
use vm_memory::FileOffset;
use vm_memory::bitmap::NewBitmap;
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};

use super::world::World;
use crate::{ImageFile, MachineResult, MemoryDescriptors, RamBlock};

/// The memory of one block.
#[derive(Debug)]
pub struct Memory {
    file: File,
    /// It came from another machine, and this one may not write to it yet.
    lent: bool,
}

impl Memory {
    /// A block of so many bytes, all of them holes.
    pub fn block(name: &str, length: usize) -> (RamBlock, Self) {
        let file = File::from(memfd_create(name, MemfdFlags::CLOEXEC).unwrap());
        ftruncate(&file, length as u64).unwrap();
        let region = MmapRegion::from_file(FileOffset::new(file.try_clone().unwrap(), 0), length).unwrap();
        (RamBlock { name: name.to_owned(), mapping: Arc::new(region) }, Self { file, lent: false })
    }

    pub fn descriptors(&self) -> MemoryDescriptors {
        let readable = File::open(format!("/proc/self/fd/{}", self.file.as_raw_fd())).unwrap();
        MemoryDescriptors { readable: readable.into(), writable: self.file.try_clone().unwrap().into() }
    }

    /// As the real machine does: a store into `block` ends the process from here on.
    pub fn map(&mut self, block: &mut RamBlock, passed: OwnedFd) -> MachineResult<()> {
        if access(&passed) != OFlags::RDONLY {
            return Err(format!("the source lets a stranger write to {}", block.name).into());
        }
        self.file = File::from(passed);
        self.lent = true;
        let length = block.mapping.size();
        if self.file.metadata()?.len() != length as u64 {
            return Err(format!("{} has another length", block.name).into());
        }
        let bitmap = DirtyBitmap::with_len(length);
        let region = MmapRegionBuilder::new_with_bitmap(length, bitmap)
            .with_file_offset(FileOffset::new(self.file.try_clone()?, 0))
            .with_mmap_prot(nix::libc::PROT_READ)
            .with_mmap_flags(nix::libc::MAP_SHARED | nix::libc::MAP_NORESERVE)
            .build()?;
        block.mapping = Arc::new(region);
        Ok(())
    }

    pub fn adopt(&mut self, block: &RamBlock, passed: OwnedFd) -> MachineResult<()> {
        let identity = |file: &File| file.metadata().map(|found| (found.dev(), found.ino()));
        let passed = File::from(passed);
        if identity(&passed)? != identity(&self.file)? || access(&passed) != OFlags::RDWR {
            return Err(format!("another memory came for {}", block.name).into());
        }
        self.file = passed;
        Ok(())
    }

    /// Whether `block` was another machine's before.
    pub fn make_writable(&mut self, block: &mut RamBlock) -> MachineResult<bool> {
        if self.lent {
            let length = block.mapping.size();
            block.mapping =
                Arc::new(MmapRegion::from_file(FileOffset::new(self.file.try_clone()?, 0), length)?);
        }
        Ok(std::mem::take(&mut self.lent))
    }
}

fn access(descriptor: &impl AsFd) -> OFlags {
    fcntl_getfl(descriptor).unwrap() & OFlags::RWMODE
}

/// The files of these names in the folder of `world`, to be passed.
pub fn image_files(world: &World, names: &[String]) -> Vec<ImageFile> {
    let file = |name: &String| {
        let path = world.path(name);
        File::options().create(true).append(true).open(&path).unwrap();
        let descriptor = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).unwrap();
        ImageFile { name: name.clone(), descriptor }
    };
    names.iter().map(file).collect()
}

/// As the real machine does: it must be the file that the name leads to here.
pub fn identify(world: &World, ImageFile { name, descriptor }: &ImageFile) -> MachineResult<()> {
    let (ours, theirs) = (std::fs::metadata(world.path(name))?, rustix::fs::fstat(descriptor)?);
    if (ours.dev(), ours.ino()) != (theirs.st_dev, theirs.st_ino) {
        return Err(format!("another file came for {name}").into());
    }
    assert!(fcntl_getfl(descriptor).unwrap().contains(OFlags::PATH), "it could have a lock");
    Ok(())
}
