//! Memory that another process of this host passes on: what each block may be.

use std::fs::File;
use std::os::fd::OwnedFd;

use anyhow::{Context, ensure};

use super::Resources;
use crate::memory::PassedKind;

impl Resources {
    /// Maps memory of a guest that is still another process's, for reading: one descriptor for each block, in their order.
    ///
    /// # Errors
    /// One is not what its block can be; says which.
    pub fn map_passed(&self, passed: Vec<OwnedFd>) -> anyhow::Result<()> {
        let blocks = self.ram().blocks();
        ensure!(passed.len() == blocks.len(), "{} descriptors for {} blocks", passed.len(), blocks.len());
        for (block, passed) in blocks.iter().zip(passed) {
            let passed = File::from(passed);
            let found = passed.metadata().with_context(|| format!("memory block {}", block.name))?;
            // The contents of a region in a shared folder: the file that it becomes here too, and as safe as that folder.
            let attached =
                self.regions().any(|region| region.block().name == block.name && region.is_at(&found));
            let kind = if attached { PassedKind::Attached } else { PassedKind::Memory };
            block.map_passed(passed.into(), kind)?;
        }
        Ok(())
    }

    /// Takes descriptors of the same memory that can write; the memory stays as it is until the guest is ours.
    ///
    /// # Errors
    /// One is of something else; says which.
    pub fn adopt_passed(&self, passed: Vec<OwnedFd>) -> anyhow::Result<()> {
        let blocks = self.ram().blocks();
        ensure!(passed.len() == blocks.len(), "{} descriptors for {} blocks", passed.len(), blocks.len());
        Ok(blocks.iter().zip(passed).try_for_each(|(block, passed)| block.adopt(passed))?)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use clap::Parser;

    use super::*;
    use crate::cli::{Arguments, Command};

    /// Memory of a controller with a buffer and a region whose contents are a file of `folder`.
    fn resources(folder: &Path, arrives: bool) -> Resources {
        let device = format!("serial=a,queues=1,cmb=1M,pmr=1M,subsystem={},capacity=1M", folder.display());
        let line = ["ferry", "run", "--kernel", "none", "--memory", "16M", "--nvme", &device];
        let Command::Run(arguments) = Arguments::parse_from(line).command else { panic!("it is run") };
        Resources::open(&arguments.machine().unwrap(), arrives).unwrap()
    }

    fn block<'a>(resources: &'a Resources, name: &str) -> &'a crate::memory::RamBlock {
        resources.ram().block(&format!("nvme/a/{name}")).unwrap()
    }

    fn byte(resources: &Resources, name: &str) -> u8 {
        let mut byte = [0];
        block(resources, name).read(0x5000, &mut byte).unwrap();
        byte[0]
    }

    fn descriptors(resources: &Resources) -> (Vec<OwnedFd>, Vec<OwnedFd>) {
        resources.ram().blocks().iter().map(|block| block.descriptors().unwrap()).unzip()
    }

    /// A guest that runs, with something in its buffer and its region.
    fn running(folder: &Path) -> Resources {
        let resources = resources(folder, false);
        resources.acquire_images().unwrap();
        let directory = resources.disks()[0].directory.as_ref().unwrap();
        nvme::Store::write(&**directory, &nvme::SubsystemState::default()).unwrap();
        resources.attach_regions().unwrap();
        block(&resources, "cmb").write(0x5000, &[6]).unwrap();
        block(&resources, "pmr").write(0x5000, &[7]).unwrap();
        resources
    }

    #[test]
    fn buffers_and_the_files_of_regions_go_over_and_are_written_only_by_their_owner() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("pmr-0");
        let source = running(folder.path());
        let destination = resources(folder.path(), true);
        let (readable, writable) = descriptors(&source);
        let inode = |path: &Path| std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).unwrap());
        let before = inode(&file);
        destination.map_passed(readable).unwrap();
        assert_eq!((byte(&destination, "cmb"), byte(&destination, "pmr")), (6, 7));
        block(&source, "pmr").write(0x5000, &[8]).unwrap();
        assert_eq!(byte(&destination, "pmr"), 8, "the guest goes on there");
        assert!(destination.acquire_images().is_err(), "the folder is the source's");
        assert!(destination.attach_regions().is_err(), "and so is the region");
        source.release_images().unwrap();
        destination.acquire_images().unwrap();
        destination.adopt_passed(writable).unwrap();
        destination.attach_regions().unwrap();
        drop(source);
        block(&destination, "cmb").write(0x5000, &[9]).unwrap();
        block(&destination, "pmr").write(0x5000, &[10]).unwrap();
        assert_eq!((byte(&destination, "cmb"), byte(&destination, "pmr")), (9, 10));
        assert_eq!((fs::read(&file).unwrap()[0x5000], inode(&file)), (10, before), "nothing was copied");
    }

    #[test]
    fn a_file_that_is_not_the_region_of_this_machine_is_no_memory() {
        let (folder, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let source = running(folder.path());
        // The same contents, in a folder of its own.
        for name in ["lock", "state", "pmr-0"] {
            fs::copy(folder.path().join(name), other.path().join(name)).unwrap();
        }
        let destination = resources(other.path(), true);
        let error = destination.map_passed(descriptors(&source).0).unwrap_err();
        let text = format!("{error:#}");
        assert!(text.contains("nvme/a/pmr") && text.ends_with("it is no memfd"), "{text}");

        // What is the region when it is mapped, and something else when the guest is given away.
        let destination = resources(folder.path(), true);
        destination.map_passed(descriptors(&source).0).unwrap();
        let (_, mut writable) = descriptors(&source);
        let place = source.ram().blocks().iter().position(|block| block.name == "nvme/a/pmr").unwrap();
        writable[place] =
            File::options().read(true).write(true).open(other.path().join("pmr-0")).unwrap().into();
        let error = destination.adopt_passed(writable).unwrap_err();
        assert!(format!("{error:#}").contains("is not what was mapped"), "{error:#}");
    }
}
