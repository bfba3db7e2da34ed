//! A raw image in a file or on a block device.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use arc_swap::ArcSwapOption;
use nix::fcntl::{FcntlArg, fcntl};
use rustix::fs::{AtFlags, OFlags, SeekFrom, StatxFlags};
use rustix::io::Errno;
use vmstate::Migratability;

use crate::image_file::{READING, WRITING};
use crate::{
    Backend, DirtyBlocks, Error, Failure, Identity, ImageFile, IoContext, Operation, Place, Request,
};

/// How to open an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileOptions {
    /// Refuse writes; several readers may share the image.
    pub read_only: bool,
    /// Go around the page cache where the file system can at `block_size_bytes`.
    pub direct: bool,
    /// Every request but flush starts at, and is as long as, a multiple of this power of two, in bytes.
    pub block_size_bytes: u32,
}

impl Default for FileOptions {
    fn default() -> Self {
        Self { read_only: false, direct: true, block_size_bytes: 512 }
    }
}

/// What must be the same when an image is opened again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    place: Place,
    capacity_bytes: u64,
}

/// An image in a file or on a block device, locked while it is held.
///
/// The lock is an open file description lock over the whole file: a writer excludes everyone, readers exclude writers.
/// It goes with the descriptor, so it ends with the process, however that ends; and with a process that was killed it
/// ends only when the kernel has finished the process's requests, so nothing of them arrives under the next holder.
#[derive(Debug)]
pub struct FileImage {
    file: ImageFile,
    options: FileOptions,
    /// What it was when it was looked at first, or has grown to since.
    capacity_bytes: AtomicU64,
    /// What direct I/O asks for, if the file can do it. Known before the image is acquired, which guests wait for.
    alignment: Option<Alignment>,
    dirty: Arc<DirtyBlocks>,
    held: ArcSwapOption<OpenFile>,
}

impl FileImage {
    /// Looks at the image without locking or writing: size and identity only. Requests fail with
    /// [`Failure::Released`] until [`Backend::acquire`].
    ///
    /// # Errors
    /// The file cannot be opened for reading, or is neither a regular file nor a block device.
    pub fn inspect(path: impl Into<PathBuf>, options: FileOptions) -> Result<Self, Error> {
        let (file, opened) = ImageFile::look(path.into())?;
        let capacity_bytes = AtomicU64::new(Stamp::of(&opened, file.path())?.capacity_bytes);
        let alignment = alignment(&opened, &options);
        let dirty = Arc::default();
        Ok(Self { file, options, capacity_bytes, alignment, dirty, held: ArcSwapOption::empty() })
    }

    /// Opens and locks the image.
    ///
    /// # Errors
    /// As [`FileImage::inspect`]; it cannot be opened for writing; someone else holds it.
    pub fn open(path: impl Into<PathBuf>, options: FileOptions) -> Result<Self, Error> {
        let image = Self::inspect(path, options)?;
        image.acquire()?;
        Ok(image)
    }

    /// Where the image is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.file.path()
    }

    fn stamp(&self) -> Stamp {
        Stamp { place: self.file.place(), capacity_bytes: self.capacity_bytes.load(Ordering::Acquire) }
    }

    /// The open file, while the image is held.
    #[cfg(test)]
    pub(crate) fn held_file(&self) -> Option<Arc<OpenFile>> {
        self.held.load_full()
    }

    fn start(&self, context: &mut IoContext, request: &Request<'_>) -> Result<(), Failure> {
        let file = self.held.load_full().ok_or(Failure::Released)?;
        request.check(&self.identity())?;
        let aligned = (request.offset_bits() | request.length_bytes).is_multiple_of(file.granule_bytes());
        if !aligned && request.operation != Operation::Flush {
            return Err(Failure::OutOfRange);
        }
        if request.length_bytes == 0 && request.operation != Operation::Flush {
            context.complete(request.token, Ok(()));
            return Ok(());
        }
        context.start(file, request)
    }
}

impl Backend for FileImage {
    fn identity(&self) -> Identity {
        Identity {
            kind: "file",
            capacity_bytes: self.capacity_bytes.load(Ordering::Acquire),
            read_only: self.options.read_only,
        }
    }

    fn place(&self) -> Option<Place> {
        Some(self.file.place())
    }

    fn files(&self) -> Vec<&ImageFile> {
        vec![&self.file]
    }

    fn nodes(&self) -> Result<Vec<OwnedFd>, Error> {
        match self.held.load_full() {
            Some(held) => Ok(vec![self.file.node_of(&held.file)?]),
            None => Ok(Vec::new()),
        }
    }

    fn migratability(&self) -> Migratability {
        Migratability::State
    }

    fn submit(&self, context: &mut IoContext, request: &Request<'_>) {
        if let Err(failure) = self.start(context, request) {
            context.complete(request.token, Err(failure));
        }
    }

    fn sync(&self) -> Result<(), Error> {
        let Some(file) = self.held.load_full().filter(|_| !self.options.read_only) else { return Ok(()) };
        file.sync().map_err(|source| Error::Flush { path: self.path().to_owned(), source })
    }

    fn release(&self) -> Result<(), Error> {
        let Some(file) = self.held.swap(None) else { return Ok(()) };
        // Requests hold the file: with one under way the lock must not go.
        let file = Arc::try_unwrap(file).map_err(|file| {
            self.held.store(Some(file));
            Error::InUse { path: self.path().to_owned() }
        })?;
        if !self.options.read_only
            && let Err(source) = file.sync()
        {
            self.held.store(Some(Arc::new(file)));
            return Err(Error::Flush { path: self.path().to_owned(), source });
        }
        // Not by closing the file alone: the kernel lets go of a request's file some time after it has told of its end.
        unlock(&file.file, self.path())
    }

    fn acquire(&self) -> Result<(), Error> {
        if self.held.load().is_some() {
            return Ok(());
        }
        let access = if self.options.read_only { READING } else { WRITING };
        let file = self.file.open_at_once(access)?;
        lock(&file, self.path(), access)?;
        let stamp = Stamp::of(&file, self.path())?;
        let before = self.stamp();
        if stamp != before {
            return Err(Error::Changed {
                path: self.path().to_owned(),
                before: before.to_string(),
                now: stamp.to_string(),
            });
        }
        let alignment = self.alignment.filter(|_| rustix::fs::fcntl_setfl(&file, OFlags::DIRECT).is_ok());
        if alignment.is_none() {
            // Requests would end before they are done.
            rustix::fs::fcntl_setfl(&file, OFlags::empty()).map_err(|errno| Error::Open {
                path: self.path().to_owned(),
                access,
                source: errno.into(),
            })?;
        }
        self.held.store(Some(Arc::new(OpenFile::new(file, alignment, Arc::clone(&self.dirty)))));
        Ok(())
    }

    fn dirty_blocks(&self) -> Option<&DirtyBlocks> {
        Some(&self.dirty)
    }

    fn next_data(&self, offset_bytes: u64) -> Result<Option<Range<u64>>, Error> {
        let capacity_bytes = self.capacity_bytes.load(Ordering::Acquire);
        let failed = |source| Error::Holes { path: self.path().to_owned(), source };
        let file = self.held.load_full().ok_or_else(|| failed(io::Error::other("it is not held")))?;
        if offset_bytes >= capacity_bytes {
            return Ok(None);
        }
        let start = match rustix::fs::seek(&file.file, SeekFrom::Data(offset_bytes)) {
            Ok(start) => start,
            // Nothing but a hole follows.
            Err(Errno::NXIO) => return Ok(None),
            // A block device has no holes that it tells of.
            Err(Errno::INVAL) => return Ok(Some(offset_bytes..capacity_bytes)),
            Err(errno) => return Err(failed(errno.into())),
        };
        let end =
            rustix::fs::seek(&file.file, SeekFrom::Hole(start)).map_err(|errno| failed(errno.into()))?;
        let end = end.min(capacity_bytes);
        // What was data a moment ago may have become a hole, which then is one more range.
        Ok((start < capacity_bytes).then_some(start..end.max(start)))
    }

    fn grow(&self, capacity_bytes: Option<u64>) -> Result<u64, Error> {
        let path = || self.path().to_owned();
        let failed = |capacity_bytes| move |source| Error::Grow { path: path(), capacity_bytes, source };
        let before_bytes = self.capacity_bytes.load(Ordering::Acquire);
        let released = || failed(capacity_bytes.unwrap_or(before_bytes))(io::Error::other("it is not held"));
        let file = self.held.load_full().ok_or_else(released)?;
        let found_bytes = Stamp::of(&file.file, self.path())?.capacity_bytes;
        let wanted_bytes = capacity_bytes.unwrap_or(found_bytes);
        let now_bytes = wanted_bytes.min(found_bytes);
        if now_bytes < before_bytes {
            return Err(Error::Shrunk { path: path(), before_bytes, now_bytes });
        }
        if wanted_bytes > found_bytes {
            let grown = file.file.set_len(wanted_bytes).and_then(|()| file.file.sync_all());
            grown.map_err(failed(wanted_bytes))?;
        }
        self.capacity_bytes.store(wanted_bytes, Ordering::Release);
        Ok(wanted_bytes)
    }
}

/// What direct I/O asks for.
#[derive(Clone, Copy, Debug)]
struct Alignment {
    /// Of addresses.
    memory_bytes: usize,
    /// Of positions and lengths.
    granule_bytes: u64,
}

/// The descriptor of a held image, shared by the requests that use it.
#[derive(Debug)]
pub(crate) struct OpenFile {
    file: File,
    /// `None`: through the page cache, where every alignment will do.
    alignment: Option<Alignment>,
    /// Something was written since the last [`OpenFile::sync`].
    written: AtomicBool,
    /// Of the image.
    dirty: Arc<DirtyBlocks>,
}

impl OpenFile {
    fn new(file: File, alignment: Option<Alignment>, dirty: Arc<DirtyBlocks>) -> Self {
        // Whoever held it before may have left something.
        Self { file, alignment, written: AtomicBool::new(true), dirty }
    }

    /// Makes stable what was written and has ended; costs nothing if that was done already.
    fn sync(&self) -> io::Result<()> {
        // Before the call: what ends meanwhile may have come too late for it.
        if !self.written.swap(false, Ordering::AcqRel) {
            return Ok(());
        }
        self.file.sync_data().inspect_err(|_| self.note_unsynced())
    }

    /// A request that writes to `range` has ended, or part of it may have arrived.
    pub(crate) fn note_write(&self, range: Range<u64>) {
        self.dirty.note(range);
        self.note_unsynced();
    }

    fn note_unsynced(&self) {
        // Looked at first: threads that all write would otherwise take the line from each other.
        if !self.written.load(Ordering::Relaxed) {
            self.written.store(true, Ordering::Release);
        }
    }

    #[cfg(test)]
    pub(crate) fn is_synced(&self) -> bool {
        !self.written.load(Ordering::Acquire)
    }

    /// A file whose device takes blocks of `granule_bytes` only, whatever the file system under the test says.
    #[cfg(test)]
    pub(crate) fn with_granule(file: File, granule_bytes: u64) -> Self {
        let alignment = Alignment { memory_bytes: granule_bytes as usize, granule_bytes };
        Self::new(file, Some(alignment), Arc::default())
    }

    /// The file.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// What positions and lengths must be multiples of.
    pub(crate) fn granule_bytes(&self) -> u64 {
        self.alignment.map_or(1, |alignment| alignment.granule_bytes)
    }

    /// Whether the device takes buffers whose addresses and whose lengths have these bits set.
    pub(crate) fn takes_buffers(&self, address_bits: usize, length_bits: usize) -> bool {
        self.alignment.is_none_or(|alignment| {
            address_bits.is_multiple_of(alignment.memory_bytes)
                && (length_bits as u64).is_multiple_of(alignment.granule_bytes)
        })
    }
}

impl Stamp {
    /// What `file` is.
    fn of(file: &File, path: &Path) -> Result<Self, Error> {
        let failed = |errno: rustix::io::Errno| Error::Open {
            path: path.to_owned(),
            access: READING,
            source: errno.into(),
        };
        let place = Place::of(file).map_err(failed)?;
        // Of a block device stat gives no size.
        let capacity_bytes = rustix::fs::seek(file, SeekFrom::End(0)).map_err(failed)?;
        Ok(Self { place, capacity_bytes })
    }
}

impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes ({})", self.capacity_bytes, self.place)
    }
}

/// Locks all of the file, now or not at all.
pub(crate) fn lock(file: &File, path: &Path, access: &'static str) -> Result<(), Error> {
    match set_lock(file, if access == WRITING { libc::F_WRLCK } else { libc::F_RDLCK }) {
        Ok(()) => Ok(()),
        Err(nix::Error::EAGAIN | nix::Error::EACCES) => Err(Error::Locked { path: path.to_owned(), access }),
        Err(errno) => Err(Error::Lock { path: path.to_owned(), source: errno.into() }),
    }
}

/// Lets go of the lock.
pub(crate) fn unlock(file: &File, path: &Path) -> Result<(), Error> {
    set_lock(file, libc::F_UNLCK).map_err(|errno| Error::Lock { path: path.to_owned(), source: errno.into() })
}

/// Sets or clears the lock of an open file description over all of the file, without waiting.
fn set_lock(file: &File, kind: i32) -> nix::Result<()> {
    let range =
        libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: 0, l_len: 0, l_pid: 0 };
    fcntl(file, FcntlArg::F_OFD_SETLK(&range)).map(drop)
}

/// What direct I/O on the file asks for, if it is wished and the file can do it in the blocks of the image.
fn alignment(file: &File, options: &FileOptions) -> Option<Alignment> {
    if !options.direct {
        return None;
    }
    let about = rustix::fs::statx(file, c"", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
    let (memory, granule) = (about.stx_dio_mem_align, about.stx_dio_offset_align);
    // Zero: the file system cannot, or the kernel (before 6.1) does not say.
    let known = about.stx_mask & StatxFlags::DIOALIGN.bits() != 0 && memory != 0 && granule != 0;
    let is_fit = known && granule <= options.block_size_bytes;
    is_fit.then(|| Alignment { memory_bytes: memory as usize, granule_bytes: u64::from(granule) })
}
