//! One image that comes: what is in its place, and how it is made there and undone.

use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use block::{Backend, FileImage, FileOptions, Qcow2Image};
use engine::lease::{self, Mark};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::{Place, only_the_lease_tells};
use crate::machine::try_while_locked;
use crate::vmm::marks;

/// What was in the place of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Found {
    Nothing,
    /// A file of this length, all holes.
    Empty {
        length_bytes: u64,
    },
    /// A file that is given up for what comes, and stands aside until the first of that is here.
    File {
        aside: PathBuf,
    },
    /// A device that is given up for what comes. It is as it was until then.
    Device,
}

/// An image that comes.
pub struct Image {
    pub place: Place,
    length_bytes: u64,
    found: Found,
    is_made: bool,
    /// Somebody else came to use it.
    is_anothers: bool,
    /// Where its mark is, and what was said there before.
    mark: Option<(PathBuf, Option<Mark>)>,
    /// Once the machine for it is there.
    pub backend: Option<Arc<dyn Backend>>,
}

impl Image {
    /// Looks at what is in a place, which may be given up or not. It waits for so long for a process that was killed, whose locks stay until
    /// the kernel has finished its requests.
    ///
    /// # Errors
    /// It is not given up.
    pub fn look(place: Place, length_bytes: u64, give_up: bool, patience: Duration) -> anyhow::Result<Self> {
        let found = look(&place, give_up, patience);
        let found = found.with_context(|| format!("cannot make {}", place.path.display()))?;
        Ok(Self { place, length_bytes, found, is_made: false, is_anothers: false, mark: None, backend: None })
    }

    /// Whether all of it is holes, once it is made.
    pub fn is_blank(&self) -> bool {
        self.found != Found::Device
    }

    fn is_new_file(&self) -> bool {
        matches!(self.found, Found::Nothing | Found::File { .. })
    }

    /// Where that stands which was in its place.
    pub fn aside(&self) -> Option<&PathBuf> {
        match &self.found {
            Found::File { aside } => Some(aside),
            Found::Nothing | Found::Empty { .. } | Found::Device => None,
        }
    }

    /// A file in memory that is like it once it is made, if it is none that is there.
    ///
    /// # Errors
    /// There is no memory for it.
    pub fn stand_in(&self) -> anyhow::Result<Option<File>> {
        if self.found == Found::Device {
            return Ok(None);
        }
        let file = File::from(rustix::fs::memfd_create("image", rustix::fs::MemfdFlags::CLOEXEC)?);
        self.fill(file.try_clone()?)?;
        Ok(Some(file))
    }

    /// Makes it, all holes, where there is nothing, or nothing in it, or where that is given up, and says `mark` beside it. Nothing has
    /// changed when it fails.
    ///
    /// # Errors
    /// There is something by now, or no room.
    pub fn make(&mut self, mark: &Mark) -> anyhow::Result<()> {
        self.try_to_make(mark).with_context(|| format!("cannot make {}", self.place.path.display()))
    }

    fn try_to_make(&mut self, mark: &Mark) -> anyhow::Result<()> {
        let path = self.place.path.clone();
        if self.found == Found::Device {
            log::warn!("{}", only_the_lease_tells(&path));
            self.is_made = true;
            return Ok(());
        }
        if let Some(aside) = self.aside() {
            fs::rename(&path, aside)?;
        }
        let opened =
            OpenOptions::new().read(true).write(true).mode(0o600).create_new(self.is_new_file()).open(&path);
        let file = match opened {
            Ok(file) => file,
            Err(error) => {
                // Whatever is there by now is somebody else's.
                if let (Some(aside), false) = (self.aside(), path.try_exists()?) {
                    fs::rename(aside, &path)?;
                }
                return Err(error.into());
            }
        };
        self.is_made = true;
        // The file is ours by now, and holds nothing yet.
        let filled = self.mark(mark).map_err(anyhow::Error::from).and_then(|()| self.fill(file));
        filled.inspect_err(|_| {
            let undone = self.undo(false).map_err(anyhow::Error::from);
            if let Err(undo) = undone.and_then(|()| Ok(self.unmark(mark, false)?)) {
                log::error!("{} is not as it was: {undo:#}", path.display());
            }
            self.is_made = false;
        })
    }

    /// Makes an image of holes in a file.
    fn fill(&self, file: File) -> anyhow::Result<()> {
        file.set_len(0)?;
        match self.place.format {
            "qcow2" => drop(Qcow2Image::create(file, &self.place.path, self.length_bytes)?),
            _ => file.set_len(self.length_bytes)?,
        }
        Ok(())
    }

    /// Says beside it that it is nobody's.
    fn mark(&mut self, mark: &Mark) -> Result<(), lease::Error> {
        let Some(path) = marks::place(&self.place.path) else { return Ok(()) };
        let before = Mark::read(&path)?;
        self.mark = Some((path.clone(), before));
        mark.write(&path)
    }

    /// Holds it, as the machine that was built on it has it, and makes it stable.
    ///
    /// # Errors
    /// Somebody else holds it.
    pub fn open(&mut self, backend: Arc<dyn Backend>) -> anyhow::Result<()> {
        if let Err(error) = backend.acquire() {
            // Whoever has it since we made it keeps it.
            self.is_anothers = matches!(error, block::Error::Locked { .. });
            return Err(error.into());
        }
        // Its length, and its name: the stop has nothing to do with them.
        backend.sync()?;
        if self.is_new_file() {
            engine::sync_folder_of(&self.place.path)?;
        }
        self.backend = Some(backend);
        Ok(())
    }

    /// Makes the place as it was; once something `has_begun` to come, what was given up is gone.
    ///
    /// # Errors
    /// It is not.
    pub fn undo(&self, has_begun: bool) -> std::io::Result<()> {
        let path = &self.place.path;
        match &self.found {
            _ if !self.is_made => Ok(()),
            _ if self.is_anothers => Err(std::io::Error::other("another process uses it")),
            Found::Nothing => remove(path),
            Found::Empty { length_bytes } => empty(path, *length_bytes),
            // Over what is there of the one that came.
            Found::File { aside } if !has_begun => fs::rename(aside, path),
            Found::File { .. } => remove(path),
            Found::Device if !has_begun => Ok(()),
            Found::Device => Err(std::io::Error::other("a device cannot be removed")),
        }
    }

    /// Says again what was said before of what is there again, or nothing of what is gone.
    ///
    /// # Errors
    /// It may still be said that it is nobody's.
    pub fn unmark(&self, mark: &Mark, has_begun: bool) -> Result<(), lease::Error> {
        match &self.mark {
            Some((path, Some(before))) if !has_begun => before.write(path),
            Some((path, _)) => mark.remove(path),
            None => Ok(()),
        }
    }
}

/// Removes a file, if it is there.
pub fn remove(path: &Path) -> std::io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// What is in a place, whatever a record says of it: it may be a guest's, of whose other images an attempt that was cut off had made
/// nothing yet.
fn look(place: &Place, give_up: bool, patience: Duration) -> anyhow::Result<Found> {
    let path = &place.path;
    let aside = given_up(path);
    ensure!(
        fs::symlink_metadata(&aside).is_err(),
        "what was there stands aside as {}: an earlier attempt was cut off before anything came (move it back, or remove it)",
        aside.display()
    );
    let metadata = match fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Found::Nothing),
        metadata => metadata?,
    };
    let is_device = metadata.file_type().is_block_device();
    ensure!(is_device || metadata.is_file(), "it is neither a file nor a block device");
    ensure!(!is_device || place.format == "raw", "a block device holds no {}", place.format);
    // Whoever uses it is left alone, whatever may be given up.
    let options = FileOptions { direct: false, ..FileOptions::default() };
    try_while_locked(patience, |_| true, || FileImage::open(path, options))?;
    match metadata.len() {
        length_bytes if !is_device && is_hole(&File::open(path)?)? => Ok(Found::Empty { length_bytes }),
        _ if !give_up => {
            bail!("there is something already: --overwrite gives it up for the guest that comes")
        }
        _ if is_device => Ok(Found::Device),
        _ => Ok(Found::File { aside }),
    }
}

/// Where something stands that is given up, until what comes for it is here.
fn given_up(path: &Path) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(".given-up");
    name.into()
}

/// Whether nothing of a file is data.
fn is_hole(file: &File) -> anyhow::Result<bool> {
    match seek(file, SeekFrom::Data(0)) {
        Ok(_) => Ok(false),
        Err(Errno::NXIO) => Ok(true),
        // The file system does not tell: what is there counts.
        Err(Errno::INVAL) => Ok(file.metadata()?.len() == 0),
        Err(errno) => Err(errno.into()),
    }
}

/// Makes a file holes again.
fn empty(path: &PathBuf, length_bytes: u64) -> std::io::Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    file.set_len(0)?;
    file.set_len(length_bytes)?;
    file.sync_all()
}
