//! Memory and files of images that another process of this host passes on: what each block may be, and which file is which.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use anyhow::{Context, ensure};
use block::Backend;
use engine::ImageFile;

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

    /// The files that the images are made of, for another process. Those of an image that is not held are none of ours to pass.
    ///
    /// # Errors
    /// No descriptor is left; says for which.
    pub fn image_files(&self) -> Result<Vec<ImageFile>, block::Error> {
        let mut files = Vec::new();
        for (image, backend) in self.named_images() {
            let nodes = backend.nodes()?.into_iter().enumerate();
            files.extend(
                nodes.map(|(index, descriptor)| ImageFile { name: file_name(&image, index), descriptor }),
            );
        }
        Ok(files)
    }

    /// What the files that the images are made of are called between two processes.
    #[must_use]
    pub fn image_file_names(&self) -> Vec<String> {
        let images = self.named_images();
        let names = |(image, backend): &(String, Arc<dyn Backend>)| {
            (0..backend.files().len()).map(|index| file_name(image, index)).collect::<Vec<_>>()
        };
        images.iter().flat_map(names).collect()
    }

    /// Has images opened by files that another process passes, instead of their names. Nothing is opened yet.
    ///
    /// # Errors
    /// One is not what the name leads to; says which.
    pub fn adopt_image_files(&self, passed: Vec<ImageFile>) -> anyhow::Result<()> {
        let mut passed: BTreeMap<_, _> =
            passed.into_iter().map(|ImageFile { name, descriptor }| (name, descriptor)).collect();
        for (image, backend) in self.named_images() {
            for (index, file) in backend.files().into_iter().enumerate() {
                if let Some(descriptor) = passed.remove(&file_name(&image, index)) {
                    file.adopt(descriptor)?;
                }
            }
        }
        Ok(())
    }

    /// The images of the host's, and what they are called between two processes whose machines are alike.
    fn named_images(&self) -> Vec<(String, Arc<dyn Backend>)> {
        let of_disk = |disk: &super::Nvm| {
            let serial = disk.subsystem.serial().to_owned();
            let images = disk.subsystem.images().into_iter();
            images.map(move |(nsid, backend)| (format!("nvme.{serial}.ns.{nsid}"), backend))
        };
        self.disks().iter().filter(|disk| disk.is_first()).flat_map(of_disk).collect()
    }
}

/// A file of an image: its own is the first, then comes what it lies over.
fn file_name(image: &str, index: usize) -> String {
    format!("{image}.file.{index}")
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
        of_flags(&["--nvme", &device], arrives)
    }

    fn of_flags(flags: &[&str], arrives: bool) -> Resources {
        let line = ["ferry", "run", "--kernel", "none", "--memory", "16M"].iter().chain(flags);
        let Command::Run(arguments) = Arguments::parse_from(line).command else { panic!("it is run") };
        Resources::open(&arguments.machine().unwrap(), arrives).unwrap()
    }

    /// Two controllers with images of every kind in `folder`.
    fn with_images(folder: &Path, arrives: bool) -> Resources {
        let at = |name: &str| folder.join(name).display().to_string();
        let (raw, other) = (at("raw"), at("other"));
        let (overlay, base) = (at("overlay"), at("base"));
        let namespaces = [
            format!("controller=a,nsid=2,backend=file,path={raw}"),
            format!("controller=a,nsid=7,backend=qcow2,path={overlay},base={base}"),
            "controller=b,nsid=1,backend=memory,size=1M".to_owned(),
            format!("controller=b,nsid=3,backend=file,path={other},ro"),
        ];
        let controllers = ["--nvme", "serial=a,queues=1", "--nvme", "serial=b,queues=1"];
        let namespaces = namespaces.iter().flat_map(|namespace| ["--ns", namespace]);
        of_flags(&controllers.into_iter().chain(namespaces).collect::<Vec<_>>(), arrives)
    }

    fn make_images(folder: &Path) {
        for name in ["raw", "other", "base"] {
            File::create_new(folder.join(name)).unwrap().set_len(1 << 20).unwrap();
        }
        let (path, base) = (folder.join("overlay"), folder.join("base"));
        let file = File::options().read(true).write(true).create_new(true).open(&path).unwrap();
        block::create_overlay(&file, &path, &block::Base { path: base, format: block::BaseFormat::Raw })
            .unwrap();
    }

    #[test]
    fn images_are_opened_by_the_files_that_came_and_known_by_what_they_are() {
        let folder = tempfile::tempdir().unwrap();
        make_images(folder.path());
        let (source, destination) = (with_images(folder.path(), false), with_images(folder.path(), true));
        assert!(source.image_files().unwrap().is_empty(), "nothing is held yet");
        source.acquire_images().unwrap();
        let files = source.image_files().unwrap();
        let names: Vec<_> = files.iter().map(|file| file.name.clone()).collect();
        let expected =
            ["nvme.a.ns.2.file.0", "nvme.a.ns.7.file.0", "nvme.a.ns.7.file.1", "nvme.b.ns.3.file.0"];
        assert_eq!(
            (&names[..], destination.image_file_names()),
            (&expected.map(str::to_owned)[..], names.clone())
        );
        destination.adopt_image_files(files).unwrap();
        for name in ["raw", "other", "base", "overlay"] {
            fs::rename(folder.path().join(name), folder.path().join(format!("{name}.moved"))).unwrap();
        }
        assert!(destination.acquire_images().is_err(), "they are the source's");
        source.release_images().unwrap();
        destination.acquire_images().unwrap();
        assert!(source.acquire_images().is_err());
        destination.release_images().unwrap();
        source.acquire_images().unwrap();
    }

    #[test]
    fn a_file_that_is_not_this_machines_image_is_none_and_the_rest_is_opened_by_its_name() {
        let (folder, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        make_images(folder.path());
        make_images(other.path());
        let (source, destination) = (with_images(folder.path(), false), with_images(other.path(), true));
        source.acquire_images().unwrap();
        let mut files = source.image_files().unwrap();
        let error = destination.adopt_image_files(vec![files.remove(0)]).unwrap_err().to_string();
        for path in [folder.path().join("raw"), other.path().join("raw")] {
            assert!(error.contains(path.to_str().unwrap()), "{error}");
        }
        destination.acquire_images().unwrap();
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
