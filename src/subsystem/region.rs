//! The persistent memory region of a controller, whose contents are a file in the folder of its subsystem.
//!
//! ```text
//! DIR/pmr-<controller identifier>   the contents, as long as the region, without holes
//! ```
//! The owner of the guest has the file mapped in the place of the region's memory, so that what the guest writes is in the file, and
//! durable once the file is ([`Region::flush`]: the write barrier, shutdown, pause, hand-over).
//!
//! A guest that arrives brings the contents with its RAM. They come into memory that is nobody's file: the folder is shared, and until
//! the guest is ours a store into a mapping of the file, as precopy makes thousands, would be a write to what the source's guest is
//! working with, which may go on with it. Only when the guest is ours, just before it runs, [`Region::attach`] makes the memory the file.
//! Where the folder is shared the file holds the same already, since the source has made it durable before it gave the guest up, and
//! nothing is written; where it is a copy, or the guest lay in a file meanwhile, a new file replaces it at once.
//!
//! Without a folder the contents live as long as the virtual machine.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::FallocateFlags;

use super::state_file::{failed, private, sync_folder};
use super::{Directory, Error};
use crate::memory::RamBlock;

/// What names of the files begin with, before the controller's identifier.
const PREFIX: &str = "pmr-";
/// What the name of one that is being written ends with.
const NEW_SUFFIX: &str = ".new";
/// Bytes that are compared or written at once.
const PIECE_BYTES: usize = 256 << 10;

/// Whether a file of this name in a folder is one that was not finished.
pub(super) fn is_unfinished(name: &str) -> bool {
    name.starts_with(PREFIX) && name.ends_with(NEW_SUFFIX)
}

/// The region of one controller.
#[derive(Debug)]
pub struct Region {
    block: RamBlock,
    place: Option<Place>,
}

#[derive(Debug)]
struct Place {
    directory: Arc<Directory>,
    path: PathBuf,
    /// Held while the block becomes the file.
    attaching: Mutex<()>,
}

impl Region {
    /// The region of controller `id` in `block`, which is nobody's file yet. Looks only.
    ///
    /// # Errors
    /// There are contents of another size.
    pub fn new(block: RamBlock, directory: Option<Arc<Directory>>, id: u16) -> Result<Self, Error> {
        let place = directory.map(|directory| Place {
            path: directory.path().join(format!("{PREFIX}{id}")),
            directory,
            attaching: Mutex::default(),
        });
        if let Some(Place { path, .. }) = &place {
            match fs::metadata(path) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                found => {
                    let found = found.map_err(failed(path, "look at it"))?;
                    check_size(path, found.len(), block.length_bytes())?;
                }
            }
        }
        Ok(Self { block, place })
    }

    /// The memory.
    #[must_use]
    pub fn block(&self) -> &RamBlock {
        &self.block
    }

    /// Whether the contents are `file`, as far as can be said without opening anything.
    #[must_use]
    pub fn is_at(&self, file: &fs::Metadata) -> bool {
        let found = self.place.as_ref().and_then(|place| fs::metadata(&place.path).ok());
        let identity = |found: &fs::Metadata| (found.dev(), found.ino(), found.len());
        file.len() == self.block.length_bytes()
            && found.is_some_and(|found| identity(&found) == identity(file))
    }

    /// Makes the memory the file, whose contents count unless the guest came with its own. Done before the guest runs, and by nobody but
    /// its owner. Harmless if it is done; then the file is looked at: it must be the one that it was.
    ///
    /// # Errors
    /// The folder is not held, or the file cannot be made or mapped. The guest must not run then.
    pub fn attach(&self) -> Result<(), Error> {
        let Some(Place { directory, path, attaching }) = &self.place else { return Ok(()) };
        let _attaching = attaching.lock().unwrap_or_else(PoisonError::into_inner);
        if !directory.is_held() {
            return Err(Error::NotHeld { path: directory.path().to_owned() });
        }
        if let Some(file) = self.block.file() {
            let identity = |found: fs::Metadata| (found.dev(), found.ino(), found.len());
            let ours = file.metadata().map_err(failed(path, "look at it"))?;
            let there = fs::metadata(path).map_err(failed(path, "look at it"))?;
            return match identity(ours) == identity(there) {
                true => Ok(()),
                false => Err(Error::Replaced { path: path.clone() }),
            };
        }
        let open = || File::options().read(true).write(true).open(path);
        let file = match open() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            file => Some(file.map_err(failed(path, "open it"))?),
        };
        let file = match file {
            Some(file) if !directory.arrives() || self.is_in(&file, path)? => file,
            _ => {
                self.write_anew(directory, path)?;
                open().map_err(failed(path, "open it"))?
            }
        };
        let found_bytes = file.metadata().map_err(failed(path, "look at it"))?.len();
        check_size(path, found_bytes, self.block.length_bytes())?;
        fill_holes(&file, found_bytes).map_err(failed(path, "give it its blocks"))?;
        Ok(self.block.attach(file)?)
    }

    /// Makes what was written durable.
    ///
    /// # Errors
    /// Something may be lost.
    pub fn flush(&self) -> io::Result<()> {
        self.block.sync()
    }

    /// Whether `file` has what the memory has.
    fn is_in(&self, mut file: &File, path: &Path) -> Result<bool, Error> {
        let (mut here, mut there) = (vec![0; PIECE_BYTES], vec![0; PIECE_BYTES]);
        let found = file.metadata().map_err(failed(path, "look at it"))?;
        check_size(path, found.len(), self.block.length_bytes())?;
        if self.block.is_passed(&found) {
            return Ok(true);
        }
        for (offset, length) in pieces(self.block.length_bytes()) {
            self.block.read(offset, &mut here[..length])?;
            file.read_exact(&mut there[..length]).map_err(failed(path, "read it"))?;
            if here[..length] != there[..length] {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Replaces the file by one with what the memory has, at once: whatever moment the power fails at, it is the old one or the new one.
    fn write_anew(&self, directory: &Directory, path: &Path) -> Result<(), Error> {
        let mut name = path.as_os_str().to_owned();
        name.push(NEW_SUFFIX);
        let new = PathBuf::from(name);
        let file = private().write(true).create(true).truncate(true).open(&new);
        let mut file = file.map_err(failed(&new, "make it"))?;
        let mut piece = vec![0; PIECE_BYTES];
        for (offset, length) in pieces(self.block.length_bytes()) {
            self.block.read(offset, &mut piece[..length])?;
            file.write_all(&piece[..length]).map_err(failed(&new, "write it"))?;
        }
        file.sync_all().map_err(failed(&new, "make it stable"))?;
        fs::rename(&new, path).map_err(failed(path, "replace it"))?;
        sync_folder(directory.path())
    }
}

fn check_size(path: &Path, found_bytes: u64, length_bytes: u64) -> Result<(), Error> {
    match found_bytes == length_bytes {
        true => Ok(()),
        false => Err(Error::RegionSize { path: path.to_owned(), found_bytes, length_bytes }),
    }
}

/// Offsets and lengths of the pieces of so many bytes.
fn pieces(length_bytes: u64) -> impl Iterator<Item = (u64, usize)> {
    // At most a piece.
    let length = move |offset: u64| (length_bytes - offset).min(PIECE_BYTES as u64) as usize;
    (0..length_bytes).step_by(PIECE_BYTES).map(move |offset| (offset, length(offset)))
}

/// Gives a file that was copied with holes its blocks: a store into a hole of a full file system would end the process. A file system that
/// cannot do that has no better place for them either.
fn fill_holes(file: &File, length_bytes: u64) -> io::Result<()> {
    match rustix::fs::fallocate(file, FallocateFlags::empty(), 0, length_bytes) {
        Err(rustix::io::Errno::OPNOTSUPP) => Ok(()),
        result => Ok(result?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::GuestRam;

    const BYTES: u64 = 512 << 10;

    /// A region of a process that waits for a guest, or starts one.
    fn region(folder: &Path, arrives: bool) -> (Arc<Directory>, Region) {
        let directory = Arc::new(Directory::open(folder, "S", 0, arrives).unwrap());
        let region = Region::new(block(BYTES), Some(Arc::clone(&directory)), 0).unwrap();
        (directory, region)
    }

    fn block(bytes: u64) -> RamBlock {
        GuestRam::with_buffers(4096, &[], &[("region".into(), bytes)])
            .unwrap()
            .block("region")
            .unwrap()
            .clone()
    }

    /// A folder that has an owner's contents, `fill` in all of them.
    fn kept(folder: &Path, fill: u8) {
        let (directory, region) = region(folder, false);
        directory.acquire().unwrap();
        nvme::Store::write(&*directory, &nvme::SubsystemState::default()).unwrap();
        region.attach().unwrap();
        region.block().write(0, &vec![fill; BYTES as usize]).unwrap();
        region.flush().unwrap();
        directory.release().unwrap();
    }

    fn byte(region: &Region, offset: u64) -> u8 {
        let mut data = [0];
        region.block().read(offset, &mut data).unwrap();
        data[0]
    }

    #[test]
    fn contents_are_there_again_after_the_process() {
        let folder = tempfile::tempdir().unwrap();
        kept(folder.path(), 7);
        let (directory, region) = region(folder.path(), false);
        assert!(matches!(region.attach(), Err(Error::NotHeld { .. })), "not before it is ours");
        directory.acquire().unwrap();
        region.attach().unwrap();
        assert_eq!((byte(&region, 0), byte(&region, BYTES - 1)), (7, 7));
        region.block().write(1000, &[8]).unwrap();
        region.attach().unwrap();
        assert_eq!(byte(&region, 1000), 8);
        assert_eq!(fs::read(folder.path().join("pmr-0")).unwrap()[999..1002], [7, 8, 7]);
    }

    #[test]
    fn what_arrives_touches_no_file_before_the_guest_is_ours_and_counts_then() {
        for (arriving, same) in [(7, true), (9, false)] {
            let folder = tempfile::tempdir().unwrap();
            kept(folder.path(), 7);
            let path = folder.path().join("pmr-0");
            let before = fs::metadata(&path).unwrap().ino();
            let (directory, region) = region(folder.path(), true);
            region.block().write(0, &vec![arriving; BYTES as usize]).unwrap();
            region.flush().unwrap();
            assert_eq!(fs::read(&path).unwrap(), vec![7; BYTES as usize]);
            directory.acquire().unwrap();
            region.attach().unwrap();
            assert_eq!(fs::read(&path).unwrap(), vec![arriving; BYTES as usize]);
            assert_eq!((byte(&region, 0), byte(&region, BYTES - 1)), (arriving, arriving));
            let after = fs::metadata(&path).unwrap().ino();
            assert_eq!(before == after, same, "what is the same is not written anew");
            region.block().write(5, &[1]).unwrap();
            assert_eq!(fs::read(&path).unwrap()[4..7], [arriving, 1, arriving]);
        }
    }

    #[test]
    fn contents_of_another_size_are_refused_and_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        kept(folder.path(), 7);
        let directory = Arc::new(Directory::open(folder.path(), "S", 0, false).unwrap());
        let error = Region::new(block(BYTES / 2), Some(directory), 0).unwrap_err().to_string();
        assert!(error.contains("pmr-0 has 524288 bytes") && error.contains("262144"), "{error}");
        assert_eq!(fs::read(folder.path().join("pmr-0")).unwrap().len() as u64, BYTES);
    }

    #[test]
    fn a_file_that_was_replaced_meanwhile_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let (directory, region) = region(folder.path(), false);
        directory.acquire().unwrap();
        region.attach().unwrap();
        let path = folder.path().join("pmr-0");
        fs::copy(&path, folder.path().join("copy")).unwrap();
        fs::rename(folder.path().join("copy"), &path).unwrap();
        assert!(matches!(region.attach(), Err(Error::Replaced { .. })));
    }

    #[test]
    fn what_a_crash_has_left_of_a_new_file_is_removed() {
        let folder = tempfile::tempdir().unwrap();
        kept(folder.path(), 7);
        let unfinished = folder.path().join("pmr-0.new");
        fs::write(&unfinished, "half").unwrap();
        let (directory, region) = region(folder.path(), false);
        directory.acquire().unwrap();
        assert!(!unfinished.exists());
        region.attach().unwrap();
        assert_eq!(byte(&region, 0), 7);
    }

    #[test]
    fn without_a_folder_there_is_no_file() {
        let region = Region::new(block(BYTES), None, 0).unwrap();
        region.attach().unwrap();
        region.block().write(0, &[3]).unwrap();
        region.flush().unwrap();
        assert!(region.block().file().is_none());
    }
}
