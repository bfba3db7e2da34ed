//! The images of a machine that arrives.
//!
//! Nothing in their places is touched before the guest is known to fit: what is compared with it is a machine on stand-ins in memory.

use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use block::Backend;
use engine::MachineResult;
use engine::lease::{self, Id, Lease, Mark, NotTaken, Record, State};
use engine::storage::{Disk, IncomingDisks};

use super::image::Image;
use super::{ImageIo, Place, places};
use crate::config::BackendSpec;
use crate::machine::Resources;
use crate::vmm::{LAST_REQUESTS, Vmm, ownership};

/// After so much the disk is asked to write what it has: the stop then waits for little.
const SYNC_BYTES: u64 = 64 << 20;

/// A guest brings its images.
#[derive(Clone, Copy, Debug)]
pub struct ImagesCome {
    /// What is in their place is given up for them.
    pub overwrite: bool,
}

/// The images that a guest brings, from an attempt's beginning to its end.
pub struct Incoming {
    vmm: Arc<Vmm>,
    come: ImagesCome,
    session: Id,
    lease: Option<Lease>,
    /// The file of the lease was there before.
    had_lease: bool,
    /// What it said of that which is given up for what comes: of a guest, or of images that an attempt before left unfinished.
    before: Option<Record>,
    /// It says that they come, or may say so.
    is_said: bool,
    /// Once it says that they come: the one to take.
    generation: Option<u64>,
    /// What is said beside each image from then on.
    mark: Option<Mark>,
    images: Vec<Image>,
    io: ImageIo,
    unsynced_bytes: u64,
    has_begun: bool,
    is_owned: bool,
}

impl Incoming {
    /// Looks whether the images can come in `session`, and keeps others from starting what is in their places. Changes nothing.
    ///
    /// # Errors
    /// They are others than those of the machine of `vmm`; there is something in their place.
    pub fn expect(vmm: &Arc<Vmm>, come: ImagesCome, session: &Id, disks: &[Disk]) -> anyhow::Result<Self> {
        let places = places(&vmm.spec);
        let ours: Vec<_> = places.iter().map(|place| (place.name.as_str(), place.format)).collect();
        let theirs: Vec<_> = disks.iter().map(|disk| (disk.name.as_str(), disk.format.as_str())).collect();
        ensure!(ours == theirs, "{} come, and {} are expected", list(&theirs), list(&ours));
        let overlay = places.iter().find(|place| place.is_overlay);
        if let Some(Place { name, format, .. }) = overlay {
            bail!("image {name} comes as a whole, without a base: declare it here as {format}");
        }
        let path = ownership::lease_path(&vmm.spec)?.context("there is no image that a guest could bring")?;
        let (had_lease, io) = (path.try_exists()?, ImageIo::new()?);
        let lease = Lease::open(&path, ownership::owner(&vmm.spec)?)?;
        let mut incoming = Self {
            vmm: Arc::clone(vmm),
            come,
            session: *session,
            lease: Some(lease),
            had_lease,
            before: None,
            is_said: false,
            generation: None,
            mark: None,
            images: Vec::with_capacity(places.len()),
            io,
            unsynced_bytes: 0,
            has_begun: false,
            is_owned: false,
        };
        let attended = incoming.lease()?.attend(come.overwrite).map_err(|error| match error {
            lease::Error::Moved { .. } => anyhow::Error::new(error)
                .context("there is a guest, or was one: --overwrite gives it up for one that comes"),
            lease::Error::Held { .. } => anyhow::Error::new(error).context(
                "a guest that brings its images has a lease at either end: name another here with --lease",
            ),
            error => error.into(),
        });
        incoming.before = attended?;
        // We are the only one present at the record: whoever wrote it before is gone, but for its last requests.
        let patience = incoming.before.as_ref().map_or(Duration::ZERO, |_| LAST_REQUESTS);
        let end = Instant::now() + patience;
        let mut reasons = Vec::new();
        for (place, disk) in places.into_iter().zip(disks) {
            let patience = end.saturating_duration_since(Instant::now());
            match Image::look(place, disk.length_bytes, come.overwrite, patience) {
                Ok(image) => incoming.images.push(image),
                Err(error) => reasons.push(format!("{error:#}")),
            }
        }
        ensure!(reasons.is_empty(), "{}", reasons.join("; "));
        Ok(incoming)
    }

    /// What the machine has with the images, but in memory and empty: whether the guest fits is seen without touching what is there.
    ///
    /// # Errors
    /// There is no memory for it, or an image that is not replaced is not what it must be.
    pub fn stand_ins(&self) -> anyhow::Result<Resources> {
        let mut spec = self.vmm.spec.clone();
        // Open until they have been looked at.
        let mut files = Vec::with_capacity(self.images.len());
        for image in &self.images {
            let Some(file) = image.stand_in()? else { continue };
            let path = format!("/proc/self/fd/{}", file.as_raw_fd()).into();
            let namespaces =
                spec.controllers.get_mut(image.place.controller).map(|controller| &mut controller.namespaces);
            let namespace = namespaces
                .and_then(|all| all.iter_mut().find(|namespace| namespace.nsid == image.place.nsid))
                .with_context(|| format!("there is no image {}", image.place.name))?;
            namespace.backend = match image.place.format {
                "qcow2" => BackendSpec::Qcow2(path),
                _ => BackendSpec::File(path),
            };
            files.push(file);
        }
        Resources::open(&spec, true)
    }

    /// Says beside them that they are nobody's, and makes them.
    ///
    /// # Errors
    /// There is something in their place by now, or there is no room. Dropping this leaves nothing of it.
    pub fn make(&mut self) -> anyhow::Result<()> {
        let (session, overwrite) = (self.session, self.come.overwrite);
        // What cannot be written may be there all the same.
        self.is_said = true;
        let lease = self.lease()?;
        let (generation, before) = lease.expect(&session, overwrite)?;
        let mark = lease.mark(State::Incoming { session });
        (self.generation, self.before) = (Some(generation), before);
        let mark = self.mark.insert(mark?);
        self.images.iter_mut().try_for_each(|image| image.make(mark))
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
            image.open(backend)?;
        }
        Ok(())
    }

    fn lease(&mut self) -> anyhow::Result<&mut Lease> {
        self.lease.as_mut().context("the images were given up")
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
        if !self.is_said {
            if !self.had_lease {
                lease.forget_blank();
            }
            return;
        }
        for image in &self.images {
            if let Some(Err(error)) = image.backend.as_ref().map(|backend| backend.release()) {
                log::warn!("an image that did not come is still held: {error}");
            }
        }
        match lease.is_expecting(&self.session) {
            Ok(true) => {}
            // It was not said, and nothing was made.
            Ok(false) if self.generation.is_none() => {
                if !self.had_lease {
                    lease.forget_blank();
                }
                return;
            }
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
        for (image, mark) in self.images.iter_mut().zip(self.mark.iter().cycle()) {
            if let Err(error) = image.undo(mark, self.has_begun) {
                is_undone = false;
                let path = image.place.path.display();
                log::error!("the image {path}, which is not all here, cannot be given up: {error:#}");
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
        for (image, mark) in self.images.iter().zip(self.mark.iter().cycle()) {
            if let Err(error) = image.unmark(mark) {
                // The lease says that it is here, as long as it is this guest's.
                log::error!("{:#}", anyhow::Error::new(error));
            }
        }
    }
}

/// The images of an attempt, as the engine has them. Who builds the machine on them reaches them as long as they are there.
pub struct Shared(Arc<Mutex<Incoming>>);

impl Shared {
    /// Those of `incoming`, and the way to them.
    pub fn new(incoming: Incoming) -> (Self, Weak<Mutex<Incoming>>) {
        let incoming = Arc::new(Mutex::new(incoming));
        let way = Arc::downgrade(&incoming);
        (Self(incoming), way)
    }

    fn incoming(&self) -> MutexGuard<'_, Incoming> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl IncomingDisks for Shared {
    fn is_blank(&self, disk: usize) -> bool {
        self.incoming().images.get(disk).is_some_and(Image::is_blank)
    }

    fn begin(&mut self) -> MachineResult<()> {
        let mut incoming = self.incoming();
        incoming.has_begun = true;
        incoming.images.iter_mut().for_each(Image::begin);
        Ok(())
    }

    fn write(&mut self, disk: usize, offset_bytes: u64, contents: &[u8]) -> MachineResult<()> {
        let incoming = &mut *self.incoming();
        let backend = incoming.backend(disk)?;
        incoming.io.write(&*backend, offset_bytes, contents)?;
        Ok(incoming.wrote(contents.len() as u64)?)
    }

    fn write_zeroes(&mut self, disk: usize, range: Range<u64>) -> MachineResult<()> {
        let incoming = &mut *self.incoming();
        let backend = incoming.backend(disk)?;
        let length_bytes = range.end - range.start;
        incoming.io.write_zeroes(&*backend, range.start, length_bytes)?;
        Ok(incoming.wrote(length_bytes)?)
    }

    fn sync(&mut self) -> MachineResult<()> {
        Ok(self.incoming().sync_all()?)
    }

    fn own(&mut self, session: &Id, open: &mut dyn FnMut() -> Result<(), String>) -> Result<(), NotTaken> {
        let mut incoming = self.incoming();
        let generation = incoming.generation;
        let (Some(lease), Some(generation)) = (incoming.lease.as_mut(), generation) else {
            let reason = "the images were given up".to_owned();
            return Err(NotTaken::Refused(lease::Error::Condition { reason }));
        };
        lease.take(session, generation, open)?;
        incoming.is_owned = true;
        let lease = incoming.lease.take();
        incoming.vmm.return_lease(lease);
        Ok(())
    }

    fn disown(&mut self, session: &Id) -> MachineResult<()> {
        let mut incoming = self.incoming();
        let lease = incoming.lease.as_mut().ok_or("the images are the guest's by now")?;
        Ok(lease.expect_again(session)?)
    }
}

fn list(images: &[(&str, &str)]) -> String {
    let names: Vec<_> = images.iter().map(|(name, format)| format!("{name} ({format})")).collect();
    if names.is_empty() { "no images".to_owned() } else { format!("images {}", names.join(", ")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::vmm::tests::process_with;

    /// The disk broke under the record when it was on its way there.
    #[test]
    fn what_was_said_in_vain_is_taken_back() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("a.img");
        std::fs::write(&image, vec![7; 1 << 20]).unwrap();
        let (vmm, _requests) = process_with(&["--nvme", &format!("path={},serial=a", image.display())]);
        let mut guest = ownership::open_lease(&vmm.spec).unwrap().unwrap();
        guest.claim().unwrap();
        guest.release().unwrap();
        drop(guest);
        let before = ownership::record(&vmm.spec);

        let disk = Disk { name: "a-1".to_owned(), length_bytes: 1 << 20, format: "raw".to_owned() };
        let session = [3; 16];
        let mut incoming = Incoming::expect(&vmm, ImagesCome { overwrite: true }, &session, &[disk]).unwrap();
        incoming.is_said = true;
        incoming.lease().unwrap().expect(&session, true).unwrap();
        assert_ne!(ownership::record(&vmm.spec), before);
        drop(incoming);
        assert_eq!(ownership::record(&vmm.spec), before, "all of its guest is here");
        assert_eq!(std::fs::read(&image).unwrap(), vec![7; 1 << 20]);
    }
}
