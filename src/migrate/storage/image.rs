//! One image that comes: what is in its place, and how it is made there and undone.

use std::ffi::OsString;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use block::{Backend, FileImage, FileOptions, Qcow2Image};
use engine::lease::{self, Mark};
use rustix::fs::{CWD, RenameFlags, SeekFrom, renameat_with, seek};
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

/// What is in a place, locked until it is touched or given up: whoever looks at it meanwhile finds that somebody has it.
struct Held {
    _image: FileImage,
    identity: (u64, u64),
}

impl Held {
    /// Whether a name still leads to it.
    fn is(&self, found: &Metadata) -> bool {
        self.identity == identity(found)
    }
}

fn identity(metadata: &Metadata) -> (u64, u64) {
    (metadata.dev(), metadata.ino())
}

/// An image that comes.
pub struct Image {
    pub place: Place,
    length_bytes: u64,
    found: Found,
    held: Option<Held>,
    /// What was there stands aside.
    is_aside: bool,
    is_made: bool,
    /// Somebody else came to use it.
    is_anothers: bool,
    /// Where its mark is, and what was said there before.
    mark: Option<(PathBuf, Option<Mark>)>,
    /// Once the machine for it is there.
    pub backend: Option<Arc<dyn Backend>>,
}

impl Image {
    /// Looks at what is in a place, which may be given up or not, and keeps others from it. It waits for so long for a process that was
    /// killed, whose locks stay until the kernel has finished its requests.
    ///
    /// # Errors
    /// It is not given up.
    pub fn look(
        mut place: Place,
        length_bytes: u64,
        give_up: bool,
        patience: Duration,
    ) -> anyhow::Result<Self> {
        let failed = format!("cannot make {}", place.path.display());
        if let Ok(real) = fs::canonicalize(&place.path) {
            // What is given up is the file itself, wherever links to it lie, and not the last of those.
            place.path = real;
        }
        let (found, held) = look(&place, give_up, patience).context(failed)?;
        Ok(Self {
            place,
            length_bytes,
            found,
            held,
            is_aside: false,
            is_made: false,
            is_anothers: false,
            mark: None,
            backend: None,
        })
    }

    /// Whether all of it is holes, once it is made.
    pub fn is_blank(&self) -> bool {
        self.found != Found::Device
    }

    fn is_new_file(&self) -> bool {
        matches!(self.found, Found::Nothing | Found::File { .. })
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

    /// Makes it, all holes, where there is nothing, or nothing in it, or where that is given up, and says `mark` beside it before. Nothing
    /// has changed when it fails.
    ///
    /// # Errors
    /// There is something by now, or no room.
    pub fn make(&mut self, mark: &Mark) -> anyhow::Result<()> {
        let made =
            self.try_to_make(mark).with_context(|| format!("cannot make {}", self.place.path.display()));
        made.inspect_err(|_| {
            if let Err(error) = self.undo(mark, false) {
                log::error!("{} is not as it was: {error:#}", self.place.path.display());
            }
        })
    }

    fn try_to_make(&mut self, mark: &Mark) -> anyhow::Result<()> {
        let path = self.place.path.clone();
        let is_what_was_locked = |found: &Metadata| self.held.as_ref().is_none_or(|held| held.is(found));
        match &self.found {
            Found::Device => {
                log::warn!("{}", only_the_lease_tells(&path));
                self.is_made = true;
                return Ok(());
            }
            Found::File { aside } => {
                ensure!(is_what_was_locked(&fs::symlink_metadata(&path)?), "it is another file by now");
                rename_to_nothing(&path, aside)?;
                self.is_aside = true;
            }
            Found::Empty { .. } => {
                ensure!(is_what_was_locked(&fs::symlink_metadata(&path)?), "it is another file by now");
            }
            Found::Nothing => {}
        }
        self.mark(mark)?;
        let is_new = self.is_new_file();
        // Whatever is there by now is somebody else's.
        let file = OpenOptions::new().read(true).write(true).mode(0o600).create_new(is_new).open(&path)?;
        self.is_made = true;
        self.fill(file)
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
        if !self.is_aside {
            // It is what the machine takes.
            self.held = None;
        }
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

    /// The first of what comes is here: what stands aside is given up.
    pub fn begin(&mut self) {
        if let (Found::File { aside }, true) = (&self.found, self.is_aside)
            && let Err(error) = remove(aside)
        {
            log::warn!("{}, which was given up, cannot be removed: {error}", aside.display());
        }
        // Its room is free from here on.
        self.held = None;
    }

    /// Makes the place as it was, and says again what was said before of what is there again, or nothing of what is gone; once something
    /// `has_begun` to come, what was given up is gone. What was there comes back last: it is said of nothing else that it is nobody's.
    /// Called again it goes on where it failed.
    ///
    /// # Errors
    /// It is not. It may still be said that it is nobody's.
    pub fn undo(&mut self, mark: &Mark, has_begun: bool) -> anyhow::Result<()> {
        let path = &self.place.path;
        if self.is_made {
            ensure!(!self.is_anothers, "another process uses it");
            match &self.found {
                Found::Nothing | Found::File { .. } => remove(path)?,
                Found::Empty { length_bytes } => empty(path, *length_bytes)?,
                Found::Device => ensure!(!has_begun, "a device cannot be removed"),
            }
            self.is_made = false;
        }
        if let Some((place, before)) = &self.mark {
            // What is gone must not come back with the power when what is said of it does not.
            engine::sync_folder_of(path)?;
            match before {
                Some(before) if !has_begun => before.write(place)?,
                _ => mark.remove(place)?,
            }
            self.mark = None;
        }
        if let (Found::File { aside }, true, false) = (&self.found, self.is_aside, has_begun) {
            rename_to_nothing(aside, path)?;
            engine::sync_folder_of(path)?;
            self.is_aside = false;
        }
        self.held = None;
        Ok(())
    }

    /// It is its guest's: nothing is said beside it any more.
    ///
    /// # Errors
    /// It may still be said that it is nobody's.
    pub fn unmark(&self, mark: &Mark) -> Result<(), lease::Error> {
        self.mark.as_ref().map_or(Ok(()), |(place, _)| mark.remove(place))
    }
}

/// Gives a file another name, under which there is nothing.
fn rename_to_nothing(from: &Path, to: &Path) -> io::Result<()> {
    match renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // The file system cannot tell.
        Err(Errno::INVAL) if is_nothing(to)? => fs::rename(from, to),
        renamed => Ok(renamed?),
    }
}

fn is_nothing(path: &Path) -> io::Result<bool> {
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(true),
        found => found.map(|_| false),
    }
}

/// Removes a file, if it is there.
fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// What is in a place, whatever a record says of it: it may be a guest's, of whose other images an attempt that was cut off had made
/// nothing yet.
fn look(place: &Place, give_up: bool, patience: Duration) -> anyhow::Result<(Found, Option<Held>)> {
    let path = &place.path;
    let aside = given_up(path);
    ensure!(
        is_nothing(&aside)?,
        "what was there stands aside as {}: an earlier attempt was cut off before anything came (move it back, or remove it)",
        aside.display()
    );
    let metadata = match fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok((Found::Nothing, None)),
        metadata => metadata?,
    };
    let is_device = metadata.file_type().is_block_device();
    ensure!(is_device || metadata.is_file(), "it is neither a file nor a block device");
    ensure!(!is_device || place.format == "raw", "a block device holds no {}", place.format);
    // Whoever uses it is left alone, whatever may be given up, and nobody comes to use it from here on.
    let options = FileOptions { direct: false, ..FileOptions::default() };
    let image = try_while_locked(patience, |_| true, || FileImage::open(path, options))?;
    let file = File::open(path)?;
    let held = Held { _image: image, identity: identity(&metadata) };
    let metadata = file.metadata()?;
    ensure!(is_device || held.is(&metadata), "it is another file by now");
    let found = match metadata.len() {
        length_bytes if !is_device && is_hole(&file)? => Found::Empty { length_bytes },
        _ if !give_up => {
            bail!("there is something already: --overwrite gives it up for the guest that comes")
        }
        _ if is_device => Found::Device,
        _ => Found::File { aside },
    };
    Ok((found, Some(held)))
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
fn empty(path: &PathBuf, length_bytes: u64) -> io::Result<()> {
    let file = OpenOptions::new().write(true).open(path)?;
    file.set_len(0)?;
    file.set_len(length_bytes)?;
    file.sync_all()
}
