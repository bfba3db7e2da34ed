//! The images of a machine that arrives.

use std::fs::{self, File, OpenOptions};
use std::io::ErrorKind;
use std::ops::Range;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use block::{Backend, FileImage, FileOptions, Qcow2Image};
use engine::MachineResult;
use engine::lease::{self, Id, Lease, NotTaken};
use engine::storage::{Disk, IncomingDisks};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::{ImageIo, Place, folder_of, places};
use crate::machine::{Resources, try_while_locked};
use crate::vmm::{LAST_REQUESTS, Vmm, ownership};

/// After so much the disk is asked to write what it has: the stop then waits for little.
const SYNC_BYTES: u64 = 64 << 20;

/// A guest brings its images.
#[derive(Clone, Copy, Debug)]
pub struct ImagesCome {
    /// What is in their place is given up for them.
    pub overwrite: bool,
}

/// What was in the place of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Found {
    Nothing,
    /// A file of this length, all holes.
    Empty {
        length_bytes: u64,
    },
    /// Something that was given up.
    Something,
}

struct Image {
    place: Place,
    found: Found,
    is_blank: bool,
    /// Once the machine for it is there.
    backend: Option<Arc<dyn Backend>>,
}

/// The images that a guest brings, from an attempt's beginning to its end.
pub struct Incoming {
    vmm: Arc<Vmm>,
    session: Id,
    lease: Option<Lease>,
    /// There was none before.
    is_new_lease: bool,
    generation: u64,
    images: Vec<Image>,
    io: ImageIo,
    unsynced_bytes: u64,
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
                drop(lease);
                if !was_there {
                    // Ours, and empty.
                    let _ = fs::remove_file(&path);
                }
                return Err(error);
            }
        };
        let mut incoming = Self {
            vmm: Arc::clone(vmm),
            session: *session,
            lease: Some(lease),
            is_new_lease: before.is_none(),
            generation,
            images: Vec::new(),
            io,
            unsynced_bytes: 0,
            is_owned: false,
        };
        // We are the only one present at the record: whoever wrote it before is gone, but for its last requests.
        let patience = before.map_or(Duration::ZERO, |_| LAST_REQUESTS);
        for (place, disk) in places.into_iter().zip(disks) {
            let name = place.path.display().to_string();
            let image = make(place, disk, come.overwrite, patience);
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
            backend.acquire()?;
            // Its length, and its name: the stop has nothing to do with them.
            backend.sync()?;
            if image.found == Found::Nothing {
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

    /// Notes that something was written.
    fn wrote(&mut self, backend: &Arc<dyn Backend>, length_bytes: u64) -> anyhow::Result<()> {
        self.unsynced_bytes = self.unsynced_bytes.saturating_add(length_bytes);
        if self.unsynced_bytes >= SYNC_BYTES {
            backend.sync()?;
            self.unsynced_bytes = 0;
        }
        Ok(())
    }

    /// Undoes what [`make`](Self::make) did, as far as it can be undone.
    fn give_up(&mut self) {
        let mut all_gone = true;
        for image in &self.images {
            if let Some(Err(error)) = image.backend.as_ref().map(|backend| backend.release()) {
                log::warn!("an image that did not come is still held: {error}");
            }
            let path = &image.place.path;
            let undone = match image.found {
                Found::Nothing => fs::remove_file(path),
                Found::Empty { length_bytes } => empty(path, length_bytes),
                Found::Something => {
                    all_gone = false;
                    continue;
                }
            };
            if let Err(error) = undone {
                all_gone = false;
                log::error!("cannot remove the image {}, which is not all here: {error}", path.display());
            }
        }
        let Some(mut lease) = self.lease.take() else { return };
        let said = match all_gone && self.is_new_lease {
            true => lease.forget(&self.session),
            false => lease.leave(),
        };
        if let Err(error) = said {
            log::warn!("{error}");
        }
    }
}

impl Drop for Incoming {
    fn drop(&mut self) {
        if !self.is_owned {
            self.give_up();
        }
    }
}

impl IncomingDisks for Incoming {
    fn is_blank(&self, disk: usize) -> bool {
        self.images.get(disk).is_some_and(|image| image.is_blank)
    }

    fn write(&mut self, disk: usize, offset_bytes: u64, contents: &[u8]) -> MachineResult<()> {
        let backend = self.backend(disk)?;
        self.io.write(&*backend, offset_bytes, contents)?;
        Ok(self.wrote(&backend, contents.len() as u64)?)
    }

    fn write_zeroes(&mut self, disk: usize, range: Range<u64>) -> MachineResult<()> {
        let backend = self.backend(disk)?;
        let length_bytes = range.end - range.start;
        self.io.write_zeroes(&*backend, range.start, length_bytes)?;
        Ok(self.wrote(&backend, length_bytes)?)
    }

    fn sync(&mut self) -> MachineResult<()> {
        for image in &self.images {
            if let Some(backend) = &image.backend {
                backend.sync()?;
            }
        }
        self.unsynced_bytes = 0;
        Ok(())
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

/// Makes one image, all holes, where there is nothing, or nothing in it, or where that is given up. It waits for so long for a process
/// that was killed, whose locks stay until the kernel has finished its requests.
fn make(place: Place, disk: &Disk, give_up: bool, patience: Duration) -> anyhow::Result<Image> {
    let length_bytes = disk.length_bytes;
    let path = &place.path;
    let metadata = match fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => None,
        metadata => Some(metadata?),
    };
    let is_device = metadata.as_ref().is_some_and(|metadata| metadata.file_type().is_block_device());
    let (file, found) = match metadata {
        None => {
            let options = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path);
            (options?, Found::Nothing)
        }
        Some(metadata) => {
            ensure!(is_device || metadata.is_file(), "it is neither a file nor a block device");
            // Whoever uses it is left alone, whatever may be given up.
            let options = FileOptions { direct: false, ..FileOptions::default() };
            try_while_locked(patience, |_| true, || FileImage::open(path, options))?;
            let file = OpenOptions::new().read(true).write(true).open(path)?;
            match metadata.len() {
                length_bytes if !is_device && is_hole(&file)? => (file, Found::Empty { length_bytes }),
                _ if give_up => (file, Found::Something),
                _ => bail!("there is something already: --overwrite gives it up for the guest that comes"),
            }
        }
    };
    let image = |place: Place, is_blank| Image { found, is_blank, backend: None, place };
    if is_device {
        ensure!(place.format == "raw", "a block device holds no {}", place.format);
        return Ok(image(place, false));
    }
    let made = file.set_len(0).map_err(anyhow::Error::from).and_then(|()| match place.format {
        "qcow2" => Ok(Qcow2Image::create(file, path, length_bytes)?),
        _ => Ok(file.set_len(length_bytes)?),
    });
    if let Err(error) = made {
        if found == Found::Nothing {
            let _ = fs::remove_file(path);
        }
        return Err(error);
    }
    Ok(image(place, true))
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
    file.set_len(length_bytes)
}
