//! Non-volatile memory of an NVM subsystem in a folder: `--nvme subsystem=DIR,capacity=SIZE`.
//!
//! ```text
//! DIR/state            the state (state_file): counters, saved features, firmware slots, namespaces
//! DIR/lock             locked by the process that owns the guest, as images are
//! DIR/ferry-lease      the lease record, if no image of the host's is written to
//! DIR/<uuid>.raw       the image of a namespace that the guest has created
//! DIR/pmr-<id>         what is in the persistent memory region of a controller (region)
//! ```
//!
//! Invariants:
//! - Only the owner of the guest writes here. Who waits for a guest to arrive looks only, until the guest is its own.
//! - An image is made before the state that names it is written, and removed after the state that does not name it is. What a crash
//!   leaves between the two is removed by the next owner.
//! - What is in here is the guest's: nobody else may read what this process makes.
//! - No I/O command waits for this: it is written by admin commands, at reset and shutdown, and every [`keeper::INTERVAL`] by a thread
//!   of its own.
//!
//! Without such a folder guests cannot manage namespaces: what they created would not be there after a power cycle, and where it would
//! take its capacity from nobody has said.

pub mod keeper;
mod region;
mod state_file;
#[cfg(test)]
mod tests;

use std::fs;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use block::{Backend, FileImage, FileOptions};
use nvme::{Store, StoreError, SubsystemState};

pub use keeper::Keeper;
pub use region::Region;
pub use state_file::{Error, Kept};
use state_file::{NEW_STATE, failed, private, read, replace, sync_folder};

/// Name of the file that is locked.
const LOCK: &str = "lock";
/// What names of images end with, after the UUID.
const IMAGE_SUFFIX: &str = ".raw";

/// The folder of one subsystem.
#[derive(Debug)]
pub struct Directory {
    path: PathBuf,
    capacity_bytes: u64,
    lock: FileImage,
    /// The state comes, or came, with the guest; what lies here may be older.
    arrives: bool,
    held: AtomicBool,
    /// After a loss of power the name of the state may lead to one that was taken back.
    unsettled: AtomicBool,
    /// Makes the name of the state stable; the tests have one that fails.
    sync_names: fn(&Path) -> Result<(), Error>,
    /// What was read or written last. Held while something is written.
    kept: Mutex<Kept>,
}

impl Directory {
    /// Looks at the folder of the subsystem `serial`; a guest that `arrives` must find it, another's is made. Nothing in it is changed
    /// before [`Directory::acquire`].
    ///
    /// # Errors
    /// It cannot be read or made, or is that of another subsystem.
    pub fn open(path: &Path, serial: &str, capacity_bytes: u64, arrives: bool) -> Result<Self, Error> {
        let refuse = |reason: String| Err(Error::NotAState { path: path.to_owned(), reason });
        let field = serial_field(serial);
        if !arrives {
            make_folder(path)?;
        }
        let kept = match read(path)? {
            Some(kept) if kept.serial != field => {
                let other = String::from_utf8_lossy(&kept.serial).trim_end().to_owned();
                return refuse(format!("it is that of {other:?}, and the controller is {serial:?}"));
            }
            Some(kept) => kept,
            None if arrives => return refuse("there is none, but a guest that arrives has one".to_owned()),
            None => {
                let id = engine::lease::random_id()
                    .map_err(|error| failed(path, "draw an identifier for it")(io::Error::other(error)))?;
                Kept { id, sequence: 0, serial: field, state: SubsystemState::default() }
            }
        };
        let lock = path.join(LOCK);
        let options = FileOptions { direct: false, ..FileOptions::default() };
        let lock = FileImage::inspect(&lock, options)
            .map_err(|error| failed(&lock, "look at it")(io::Error::other(error)))?;
        Ok(Self {
            path: path.to_owned(),
            capacity_bytes,
            lock,
            arrives,
            held: AtomicBool::new(false),
            unsettled: AtomicBool::new(false),
            sync_names: sync_folder,
            kept: Mutex::new(kept),
        })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether the guest comes with what it has here, from elsewhere.
    #[must_use]
    pub fn arrives(&self) -> bool {
        self.arrives
    }

    /// Identity of the subsystem.
    #[must_use]
    pub fn id(&self) -> [u8; 16] {
        self.kept().id
    }

    /// The state that was there when the folder was opened; `None` of a subsystem that is new.
    #[must_use]
    pub fn state(&self) -> Option<SubsystemState> {
        let kept = self.kept();
        (kept.sequence > 0).then(|| kept.state.clone())
    }

    /// Takes the lock and with it the right to write; removes what a crash has left. Harmless if it is held.
    ///
    /// # Errors
    /// Someone else has it, or had it since it was opened here.
    pub fn acquire(&self) -> Result<(), block::Error> {
        if self.is_held() {
            return Ok(());
        }
        self.lock.acquire()?;
        self.take_over().inspect_err(|_| {
            // Nothing was written, so nothing can be lost.
            let _ = self.lock.release();
        })
    }

    fn take_over(&self) -> Result<(), block::Error> {
        let mut kept = self.kept();
        let now = read(&self.path).map_err(|error| self.unusable(error))?;
        let (id, sequence) = now.as_ref().map_or((kept.id, 0), |now| (now.id, now.sequence));
        if id != kept.id || sequence != kept.sequence && !self.arrives {
            let state =
                |id, sequence| format!("state {sequence} of subsystem {}", engine::lease::show_id(&id));
            return Err(block::Error::Changed {
                path: self.path.clone(),
                before: state(kept.id, kept.sequence),
                now: state(id, sequence),
            });
        }
        kept.sequence = sequence;
        if let Some(now) = &now {
            self.remove_leftovers(&now.state);
        }
        self.held.store(true, Ordering::Release);
        Ok(())
    }

    /// Gives the right to write up.
    ///
    /// # Errors
    /// The lock cannot be given up.
    pub fn release(&self) -> Result<(), block::Error> {
        // What is being written is written to its end.
        let _kept = self.kept();
        self.held.store(false, Ordering::Release);
        self.lock.release()
    }

    /// Whether this process may write.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.held.load(Ordering::Acquire)
    }

    /// Images that no state names, and a state or a region that was not finished.
    fn remove_leftovers(&self, state: &SubsystemState) {
        let named = state.allocations.namespaces.iter().filter(|namespace| namespace.created);
        let named: Vec<String> = named.map(|namespace| image_name(&namespace.shape.uuid)).collect();
        let Ok(entries) = fs::read_dir(&self.path) else { return };
        for entry in entries.flatten() {
            let Ok(name) = entry.file_name().into_string() else { continue };
            let is_left = name == NEW_STATE
                || region::is_unfinished(&name)
                || is_image_name(&name) && !named.contains(&name);
            if is_left {
                log::info!("{} is left over from a crash and removed", entry.path().display());
                self.remove_file(&entry.path());
            }
        }
    }

    fn remove_file(&self, path: &Path) {
        if let Err(error) = fs::remove_file(path) {
            log::warn!("{} cannot be removed now, but at the next start: {error}", path.display());
        }
    }

    fn image_path(&self, uuid: &[u8; 16]) -> PathBuf {
        self.path.join(image_name(uuid))
    }

    fn unusable(&self, error: Error) -> block::Error {
        let access = "reading";
        block::Error::Open { path: self.path.clone(), access, source: io::Error::other(error) }
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store for Directory {
    fn capacity_bytes(&self) -> u64 {
        self.capacity_bytes
    }

    fn create(
        &self,
        uuid: &[u8; 16],
        size_bytes: u64,
        block_bytes: u32,
    ) -> Result<Arc<dyn Backend>, StoreError> {
        if !self.is_held() {
            return Err(not_held(&self.path));
        }
        let path = self.image_path(uuid);
        let made = make_image(&self.path, &path, size_bytes).map_err(StoreError::from).and_then(|()| {
            let image = FileImage::open(&path, options(block_bytes))?;
            Ok(Arc::new(image) as _)
        });
        if made.is_err() {
            let _ = fs::remove_file(&path);
        }
        made
    }

    fn open(
        &self,
        uuid: &[u8; 16],
        size_bytes: u64,
        block_bytes: u32,
    ) -> Result<Arc<dyn Backend>, StoreError> {
        let path = self.image_path(uuid);
        let image = FileImage::inspect(&path, options(block_bytes))?;
        let found_bytes = image.identity().capacity_bytes;
        if found_bytes != size_bytes {
            return Err(format!("{} has {found_bytes} bytes instead of {size_bytes}", path.display()).into());
        }
        Ok(Arc::new(image))
    }

    fn remove(&self, uuid: &[u8; 16]) {
        // One that a state may name, though that was taken back, is left to the next owner, who sees what the power has left.
        if self.is_held() && !self.unsettled.load(Ordering::Acquire) {
            self.remove_file(&self.image_path(uuid));
        }
    }

    fn write(&self, state: &SubsystemState) -> Result<(), StoreError> {
        let mut kept = self.kept();
        if !self.is_held() {
            return Err(not_held(&self.path));
        }
        let next = Kept { sequence: kept.sequence + 1, state: state.clone(), ..kept.clone() };
        replace(&self.path, &next)?;
        let before = std::mem::replace(&mut *kept, next);
        let synced = (self.sync_names)(&self.path);
        self.unsettled.store(synced.is_err(), Ordering::Release);
        let Err(error) = synced else { return Ok(()) };
        // The name leads to the new state, and the guest is told that there is none.
        let back = Kept { sequence: kept.sequence + 1, ..before };
        if replace(&self.path, &back).is_ok() {
            *kept = back;
            self.unsettled.store((self.sync_names)(&self.path).is_err(), Ordering::Release);
        }
        Err(error.into())
    }
}

/// The folder with the file that is locked, if they are not there yet.
fn make_folder(path: &Path) -> Result<(), Error> {
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        made => made.map_err(failed(path, "make the folder of a subsystem"))?,
    }
    let lock = path.join(LOCK);
    let opened = private().create(true).append(true).open(&lock);
    opened.map_err(failed(&lock, "make it")).map(drop)
}

fn make_image(folder: &Path, path: &Path, size_bytes: u64) -> Result<(), Error> {
    let file = private().write(true).create_new(true).open(path).map_err(failed(path, "make it"))?;
    file.set_len(size_bytes).map_err(failed(path, "give it its size"))?;
    file.sync_all().map_err(failed(path, "make it stable"))?;
    sync_folder(folder)
}

fn options(block_bytes: u32) -> FileOptions {
    FileOptions { block_size_bytes: block_bytes, ..FileOptions::default() }
}

fn not_held(path: &Path) -> StoreError {
    format!("{} is not this process's to write to", path.display()).into()
}

fn image_name(uuid: &[u8; 16]) -> String {
    let hex: String = uuid.iter().map(|byte| format!("{byte:02x}")).collect();
    hex + IMAGE_SUFFIX
}

fn is_image_name(name: &str) -> bool {
    let is_hex = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
    name.strip_suffix(IMAGE_SUFFIX).is_some_and(|uuid| uuid.len() == 32 && uuid.bytes().all(is_hex))
}

/// `serial` as the state has it.
fn serial_field(serial: &str) -> [u8; 20] {
    let mut field = [b' '; 20];
    field.iter_mut().zip(serial.bytes()).for_each(|(place, byte)| *place = byte);
    field
}
