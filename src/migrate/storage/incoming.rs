//! The images of a machine that arrives.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::ops::Range;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use block::{Backend, FileImage, FileOptions, Qcow2Image};
use engine::MachineResult;
use engine::lease::{self, Id, Lease, Mark, NotTaken, Record, State};
use engine::storage::{Disk, IncomingDisks};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::{ImageIo, Place, folder_of, only_the_lease_tells, places};
use crate::machine::{Resources, try_while_locked};
use crate::vmm::{LAST_REQUESTS, Vmm, marks, ownership};

/// After so much the disk is asked to write what it has: the stop then waits for little.
const SYNC_BYTES: u64 = 64 << 20;

/// A guest brings its images.
#[derive(Clone, Copy, Debug)]
pub struct ImagesCome {
    /// What is in their place is given up for them.
    pub overwrite: bool,
}

/// What was in the place of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Found {
    Nothing,
    /// A file of this length, all holes.
    Empty {
        length_bytes: u64,
    },
    /// Something that is given up for what comes: a file of it stands `aside` until the first of that is here, a device is as it was.
    Something {
        aside: Option<PathBuf>,
    },
}

struct Image {
    place: Place,
    found: Found,
    is_blank: bool,
    /// Somebody else came to use it.
    is_anothers: bool,
    /// Where its mark is, and what was said there before.
    mark: Option<(PathBuf, Option<Mark>)>,
    /// Once the machine for it is there.
    backend: Option<Arc<dyn Backend>>,
}

/// The images that a guest brings, from an attempt's beginning to its end.
pub struct Incoming {
    vmm: Arc<Vmm>,
    session: Id,
    lease: Option<Lease>,
    /// What it said of that which is given up for what comes: of a guest, or of images that an attempt before left unfinished.
    before: Option<Record>,
    generation: u64,
    /// What is said beside each image.
    mark: Mark,
    images: Vec<Image>,
    io: ImageIo,
    unsynced_bytes: u64,
    has_begun: bool,
    is_owned: bool,
}

impl Incoming {
    /// Says beside them that they are nobody's, then makes the images that come in `session`.
    ///
    /// # Errors
    /// They are others than those of the machine of `vmm`; there is something in their place; there is no room. Nothing is left of it.
    pub fn make(vmm: &Arc<Vmm>, come: ImagesCome, session: &Id, disks: &[Disk]) -> anyhow::Result<Self> {
        let places = places(&vmm.spec);
        let ours: Vec<_> = places.iter().map(|place| (place.name.as_str(), place.format)).collect();
        let theirs: Vec<_> = disks.iter().map(|disk| (disk.name.as_str(), disk.format.as_str())).collect();
        ensure!(ours == theirs, "{} come, and {} are expected", list(&theirs), list(&ours));
        let overlay = places.iter().find(|place| place.is_overlay);
        if let Some(Place { name, format, .. }) = overlay {
            bail!("image {name} comes as a whole, without a base: declare it here as {format}");
        }
        let path = ownership::lease_path(&vmm.spec)?.context("there is no image that a guest could bring")?;
        let (was_there, io) = (path.try_exists()?, ImageIo::new()?);
        let mut lease = Lease::open(&path, ownership::owner(&vmm.spec)?)?;
        let expected = lease.expect(session, come.overwrite).map_err(|error| match error {
            lease::Error::Moved { .. } => anyhow::Error::new(error)
                .context("there is a guest, or was one: --overwrite gives it up for one that comes"),
            lease::Error::Held { .. } => anyhow::Error::new(error).context(
                "a guest that brings its images has a lease at either end: name another here with --lease",
            ),
            error => error.into(),
        });
        let (generation, before) = match expected {
            Ok(expected) => expected,
            Err(error) => {
                if !was_there {
                    lease.forget_blank();
                }
                return Err(error);
            }
        };
        let mark = lease.mark(State::Incoming { session: *session })?;
        // We are the only one present at the record: whoever wrote it before is gone, but for its last requests.
        let patience = before.as_ref().map_or(Duration::ZERO, |_| LAST_REQUESTS);
        let mut incoming = Self {
            vmm: Arc::clone(vmm),
            session: *session,
            lease: Some(lease),
            before,
            generation,
            mark,
            images: Vec::new(),
            io,
            unsynced_bytes: 0,
            has_begun: false,
            is_owned: false,
        };
        // All are looked at before the first is touched.
        let mut found = Vec::with_capacity(places.len());
        for place in &places {
            let seen = look(place, come.overwrite, patience);
            found.push(seen.with_context(|| format!("cannot make {}", place.path.display()))?);
        }
        for ((place, disk), found) in places.into_iter().zip(disks).zip(found) {
            let name = place.path.display().to_string();
            let image = make(place, disk, found, &incoming.mark);
            incoming.images.push(image.with_context(|| format!("cannot make {name}"))?);
        }
        Ok(incoming)
    }

    /// Takes the images of the machine that was built on them.
    ///
    /// # Errors
    /// One cannot be locked, or not be made stable.
    pub fn open(&mut self, resources: &Resources) -> anyhow::Result<()> {
        for image in &mut self.images {
            let disk = resources.disks().get(image.place.controller);
            let found = disk.map(|disk| disk.subsystem.images()).unwrap_or_default();
            let found = found.into_iter().find(|(nsid, _)| *nsid == image.place.nsid);
            let (_, backend) = found.with_context(|| format!("there is no image {}", image.place.name))?;
            if let Err(error) = backend.acquire() {
                // Whoever has it since we made it keeps it.
                image.is_anothers = matches!(error, block::Error::Locked { .. });
                return Err(error.into());
            }
            // Its length, and its name: the stop has nothing to do with them.
            backend.sync()?;
            if image.is_new_file() {
                File::open(folder_of(&image.place.path))?.sync_all()?;
            }
            image.backend = Some(backend);
        }
        Ok(())
    }

    fn backend(&self, disk: usize) -> anyhow::Result<Arc<dyn Backend>> {
        let image = self.images.get(disk).and_then(|image| image.backend.clone());
        image.with_context(|| format!("there is no image {disk}"))
    }

    fn sync_all(&mut self) -> anyhow::Result<()> {
        for backend in self.images.iter().filter_map(|image| image.backend.as_ref()) {
            backend.sync()?;
        }
        self.unsynced_bytes = 0;
        Ok(())
    }

    /// Notes that something was written.
    fn wrote(&mut self, length_bytes: u64) -> anyhow::Result<()> {
        self.unsynced_bytes = self.unsynced_bytes.saturating_add(length_bytes);
        if self.unsynced_bytes >= SYNC_BYTES { self.sync_all() } else { Ok(()) }
    }

    /// Undoes what [`make`](Self::make) did. Before anything came, that is all of it; afterwards what was given up is gone.
    fn give_up(&mut self) {
        let Some(mut lease) = self.lease.take() else { return };
        for image in &self.images {
            if let Some(Err(error)) = image.backend.as_ref().map(|backend| backend.release()) {
                log::warn!("an image that did not come is still held: {error}");
            }
        }
        match lease.is_expecting(&self.session) {
            Ok(true) => {}
            // It may say that the guest is here: then these are its only images.
            Ok(false) => {
                return log::error!(
                    "{}: the images that came stay, since it tells otherwise",
                    lease.path().display()
                );
            }
            Err(error) => {
                return log::error!(
                    "the images that came stay, since whose they are cannot be read: {error}"
                );
            }
        }
        let mut is_undone = true;
        for image in &self.images {
            if let Err(error) = image.undo(self.has_begun) {
                is_undone = false;
                let path = image.place.path.display();
                log::error!("the image {path}, which is not all here, cannot be given up: {error}");
            }
        }
        // What is gone must not come back with the power when its record does not.
        let folders: BTreeSet<_> = self.images.iter().map(|image| folder_of(&image.place.path)).collect();
        for folder in folders {
            if let Err(error) = File::open(folder).and_then(|folder| folder.sync_all()) {
                is_undone = false;
                log::error!("{}: {error}", folder.display());
            }
        }
        if is_undone {
            let mut images = self.images.iter();
            if let Err(error) = images.try_for_each(|image| image.unmark(&self.mark, self.has_begun)) {
                is_undone = false;
                log::error!("{:#}", anyhow::Error::new(error));
            }
        }
        let said = match self.before.take() {
            _ if !is_undone => lease.leave(),
            Some(before) if !self.has_begun => lease.restore(&self.session, before),
            Some(_) | None => lease.forget(&self.session),
        };
        if let Err(error) = said {
            log::warn!("{error}");
        }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if !self.is_owned {
            return self.give_up();
        }
        for (path, _) in self.images.iter().filter_map(|image| image.mark.as_ref()) {
            if let Err(error) = self.mark.remove(path) {
                // The lease says that it is here, as long as it is this guest's.
                log::error!("{:#}", anyhow::Error::new(error));
            }
        }
    }
}

impl IncomingDisks for Incoming {
    fn is_blank(&self, disk: usize) -> bool {
        self.images.get(disk).is_some_and(|image| image.is_blank)
    }

    fn begin(&mut self) -> MachineResult<()> {
        self.has_begun = true;
        for path in self.images.iter().filter_map(Image::aside) {
            if let Err(error) = remove(path) {
                log::warn!("{}, which was given up, cannot be removed: {error}", path.display());
            }
        }
        Ok(())
    }

    fn write(&mut self, disk: usize, offset_bytes: u64, contents: &[u8]) -> MachineResult<()> {
        let backend = self.backend(disk)?;
        self.io.write(&*backend, offset_bytes, contents)?;
        Ok(self.wrote(contents.len() as u64)?)
    }

    fn write_zeroes(&mut self, disk: usize, range: Range<u64>) -> MachineResult<()> {
        let backend = self.backend(disk)?;
        let length_bytes = range.end - range.start;
        self.io.write_zeroes(&*backend, range.start, length_bytes)?;
        Ok(self.wrote(length_bytes)?)
    }

    fn sync(&mut self) -> MachineResult<()> {
        Ok(self.sync_all()?)
    }

    fn own(&mut self, session: &Id, open: &mut dyn FnMut() -> Result<(), String>) -> Result<(), NotTaken> {
        let nobody =
            || NotTaken::Refused(lease::Error::Condition { reason: "the images were given up".to_owned() });
        self.lease.as_mut().ok_or_else(nobody)?.take(session, self.generation, open)?;
        self.is_owned = true;
        self.vmm.return_lease(self.lease.take());
        Ok(())
    }

    fn disown(&mut self, session: &Id) -> MachineResult<()> {
        let lease = self.lease.as_mut().ok_or("the images are the guest's by now")?;
        Ok(lease.expect_again(session)?)
    }
}

fn list(images: &[(&str, &str)]) -> String {
    let names: Vec<_> = images.iter().map(|(name, format)| format!("{name} ({format})")).collect();
    if names.is_empty() { "no images".to_owned() } else { format!("images {}", names.join(", ")) }
}

impl Image {
    /// Where that stands which was in its place.
    fn aside(&self) -> Option<&PathBuf> {
        match &self.found {
            Found::Something { aside } => aside.as_ref(),
            Found::Nothing | Found::Empty { .. } => None,
        }
    }

    fn is_new_file(&self) -> bool {
        matches!(self.found, Found::Nothing) || self.aside().is_some()
    }

    /// Says beside it that it is nobody's.
    fn mark(&mut self, mark: &Mark) -> Result<(), lease::Error> {
        let Some(path) = marks::place(&self.place.path) else {
            log::warn!("{}", only_the_lease_tells(&self.place.path));
            return Ok(());
        };
        let before = Mark::read(&path)?;
        self.mark = Some((path.clone(), before));
        mark.write(&path)
    }

    /// Says again what was said before of what is there again, or nothing of what is gone.
    fn unmark(&self, mark: &Mark, has_begun: bool) -> Result<(), lease::Error> {
        match &self.mark {
            Some((path, Some(before))) if !has_begun => before.write(path),
            Some((path, _)) => mark.remove(path),
            None => Ok(()),
        }
    }

    /// Makes the place as it was; once something `has_begun` to come, what was given up is gone.
    fn undo(&self, has_begun: bool) -> std::io::Result<()> {
        let path = &self.place.path;
        match &self.found {
            _ if self.is_anothers => Err(std::io::Error::other("another process uses it")),
            Found::Nothing => remove(path),
            Found::Empty { length_bytes } => empty(path, *length_bytes),
            // Over what is there of the one that came.
            Found::Something { aside: Some(aside) } if !has_begun => fs::rename(aside, path),
            Found::Something { aside: Some(_) } => remove(path),
            Found::Something { aside: None } if !has_begun => Ok(()),
            Found::Something { aside: None } => Err(std::io::Error::other("a device cannot be removed")),
        }
    }
}

/// Removes a file, if it is there.
fn remove(path: &Path) -> std::io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

/// What is in a place, if it may be given up. It waits for so long for a process that was killed, whose locks stay until the kernel has
/// finished its requests.
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
        _ if is_device => Ok(Found::Something { aside: None }),
        _ => Ok(Found::Something { aside: Some(aside) }),
    }
}

/// Where something stands that is given up, until what comes for it is here.
fn given_up(path: &Path) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(".given-up");
    name.into()
}

/// Makes one image, all holes, where there is nothing, or nothing in it, or where that is given up: whatever the
/// record said of it, it may be a guest's, of whose other images an attempt that was cut off had made nothing yet. Nothing has changed when
/// it fails.
fn make(place: Place, disk: &Disk, found: Found, mark: &Mark) -> anyhow::Result<Image> {
    let path = &place.path;
    let found = match found {
        Found::Something { aside: None } => {
            let mut image =
                Image { place, found, is_blank: false, is_anothers: false, mark: None, backend: None };
            image.mark(mark)?;
            return Ok(image);
        }
        Found::Something { aside: Some(aside) } => {
            fs::rename(path, &aside)?;
            Found::Something { aside: Some(aside) }
        }
        found => found,
    };
    let mut image = Image { found, is_blank: true, is_anothers: false, mark: None, backend: None, place };
    let path = image.place.path.clone();
    let opened =
        OpenOptions::new().read(true).write(true).mode(0o600).create_new(image.is_new_file()).open(&path);
    let made = match opened {
        // The file is ours by now, and holds nothing yet.
        Ok(file) => image
            .mark(mark)
            .map_err(anyhow::Error::from)
            .and_then(|()| fill(file, &image.place, disk.length_bytes)),
        Err(error) => {
            // Whatever is there by now is somebody else's.
            if let (Some(aside), false) = (image.aside(), path.try_exists()?) {
                fs::rename(aside, &path)?;
            }
            return Err(error.into());
        }
    };
    match made {
        Ok(()) => Ok(image),
        Err(error) => {
            let undone = image.undo(false).map_err(anyhow::Error::from);
            if let Err(undo) = undone.and_then(|()| Ok(image.unmark(mark, false)?)) {
                log::error!("{} is not as it was: {undo:#}", path.display());
            }
            Err(error)
        }
    }
}

/// Makes an image of holes in a file.
fn fill(file: File, place: &Place, length_bytes: u64) -> anyhow::Result<()> {
    file.set_len(0)?;
    match place.format {
        "qcow2" => drop(Qcow2Image::create(file, &place.path, length_bytes)?),
        _ => file.set_len(length_bytes)?,
    }
    Ok(())
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
