//! An image in a qcow2 file, by a library that knows the format.
//!
//! The library waits for the disk, so that requests run on threads of the image. It caches the tables of the file, so that a flush
//! writes these and then makes all stable.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use arc_swap::ArcSwapOption;
use bus::{GuestMemory, GuestRange};
use imago::qcow2::Qcow2;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder};
use vmstate::Migratability;

use crate::blocking::Blocking;
use crate::bounce::Bounce;
use crate::error::failure_of;
use crate::file;
use crate::guest::check_ranges;
use crate::image_file::{READING, WRITING, place_of};
use crate::{
    Backend, Base, DirtyBlocks, Error, Failure, Identity, ImageFile, IoContext, Operation, Place, Request,
};

/// An open image of any format.
pub(crate) type Access = FormatAccess<imago::file::File>;

/// An image in a qcow2 file, locked while it is held as a raw file is. Its capacity is what the format says, not the file's size.
///
/// Files with a backing file or an external data file are refused: their names are the file's own, and it is not trusted. An overlay is
/// opened [over the base](Self::inspect_over) that the caller names.
#[derive(Debug)]
pub struct Qcow2Image {
    file: ImageFile,
    read_only: bool,
    base: Option<(Base, ImageFile)>,
    capacity_bytes: u64,
    held: ArcSwapOption<Held>,
    dirty: Arc<DirtyBlocks>,
    threads: Blocking,
}

/// The open image.
#[derive(Debug)]
struct Held {
    access: RwLock<Access>,
    /// The same open file description, for the lock.
    file: File,
    /// The base, for its lock.
    base: Option<File>,
}

impl Qcow2Image {
    /// Looks at the image without locking or writing: that it can be read, and its capacity. Requests fail with
    /// [`Failure::Released`] until [`Backend::acquire`].
    ///
    /// # Errors
    /// The file cannot be opened for reading, or is no qcow2 image that can be used.
    pub fn inspect(path: impl Into<PathBuf>, read_only: bool) -> Result<Self, Error> {
        Self::look(path.into(), None, read_only)
    }

    /// As [`Qcow2Image::inspect`], of an overlay over `base`, which is held with it, locked for reading. To the guest it is an image of
    /// the kind that the base is, so that an overlay can be in the place of a copy.
    ///
    /// # Errors
    /// As [`Qcow2Image::inspect`], of either; it was not [made](crate::create_overlay) over what the base is.
    pub fn inspect_over(path: impl Into<PathBuf>, base: Base, read_only: bool) -> Result<Self, Error> {
        Self::look(path.into(), Some(base), read_only)
    }

    fn look(path: PathBuf, base: Option<Base>, read_only: bool) -> Result<Self, Error> {
        let (file, opened) = ImageFile::look(path)?;
        let (access, base) = match base {
            None => (open_format(opened, file.path(), false, None)?, None),
            Some(base) => {
                let (base_file, base_opened) = ImageFile::look(base.path.clone())?;
                let access = open_over(opened, file.path(), false, &base, &base_opened)?;
                (access, Some((base, base_file)))
            }
        };
        let threads = Blocking::new()
            .map_err(|source| Error::System { what: "start threads for a qcow2 image", source })?;
        Ok(Self {
            file,
            read_only,
            base,
            capacity_bytes: access.size(),
            held: ArcSwapOption::empty(),
            dirty: Arc::default(),
            threads,
        })
    }

    /// Makes `file`, which is at `path`, an image of `capacity_bytes` that has no contents. What was in there is lost.
    ///
    /// # Errors
    /// It cannot be written, or no such image can be.
    pub fn create(file: File, path: &Path, capacity_bytes: u64) -> Result<(), Error> {
        let created = imago::file::File::try_from(file)
            .and_then(|file| Qcow2::<imago::file::File>::create_builder(file).size(capacity_bytes).create());
        created.map_err(|source| Error::Format { path: path.to_owned(), format: "qcow2", source })
    }

    /// Opens and locks the image.
    ///
    /// # Errors
    /// As [`Qcow2Image::inspect`]; it cannot be opened for writing; someone else holds it.
    pub fn open(path: impl Into<PathBuf>, read_only: bool) -> Result<Self, Error> {
        let image = Self::inspect(path, read_only)?;
        image.acquire()?;
        Ok(image)
    }

    fn start(&self, context: &mut IoContext, request: &Request<'_>) -> Result<(), Failure> {
        let held = self.held.load_full().ok_or(Failure::Released)?;
        request.check(&self.identity())?;
        let ranges = request.buffers.ranges().to_vec();
        let memory = request.buffers.memory(context.memory()).clone();
        check_ranges(&memory, &ranges)?;
        let ticket = context.defer(request.token).map_err(|_| Failure::Io(libc::EMFILE))?;
        let Request { operation, offset_bytes, length_bytes, .. } = *request;
        let dirty = Arc::clone(&self.dirty);
        self.threads.start(Box::new(move || {
            let work = Work { memory, ranges, operation, offset_bytes, length_bytes };
            let result = work.carry_out(&held.access);
            if operation.writes() {
                // Whatever came of it: part of it may have.
                dirty.note(offset_bytes..offset_bytes + length_bytes);
            }
            // Whoever hears of the end may release the image at once.
            drop(held);
            ticket.complete(result);
        }));
        Ok(())
    }
}

/// Opens the format in `file`, over `base` if it is an overlay.
pub(crate) fn open_format(
    file: File,
    path: &Path,
    writable: bool,
    base: Option<Access>,
) -> Result<Access, Error> {
    let opened = imago::file::File::try_from(file).and_then(|file| {
        let builder = Qcow2::<imago::file::File>::builder(file).write(writable);
        let builder = if base.is_some() { builder.backing(base) } else { builder };
        builder.open(DenyImplicitOpenGate::default())
    });
    opened.map(FormatAccess::new).map_err(|source| Error::Format {
        path: path.to_owned(),
        format: "qcow2",
        source,
    })
}

/// Opens the overlay in `file` over `base`, which is open for reading as `base_file`.
fn open_over(
    file: File,
    path: &Path,
    writable: bool,
    base: &Base,
    base_file: &File,
) -> Result<Access, Error> {
    let base_access = base.access(base_file)?;
    base.check(base_file, &file, path)?;
    let base_bytes = base_access.size();
    let access = open_format(file, path, writable, Some(base_access))?;
    if access.size() != base_bytes {
        return Err(base.unfit(path, format!("it has {} bytes, and that {base_bytes}", access.size())));
    }
    Ok(access)
}

/// A request with all that it needs.
struct Work {
    memory: GuestMemory,
    ranges: Vec<GuestRange>,
    operation: Operation,
    offset_bytes: u64,
    length_bytes: u64,
}

impl Work {
    fn carry_out(&self, access: &RwLock<Access>) -> Result<(), Failure> {
        let shared = || access.read().unwrap_or_else(PoisonError::into_inner);
        let (offset, length) = (self.offset_bytes, self.length_bytes);
        let forced = match self.operation {
            Operation::Flush => true,
            Operation::Discard => {
                // The only change that needs the image for itself.
                let mut access = access.write().unwrap_or_else(PoisonError::into_inner);
                access.discard_to_zero(offset, length).or_else(leave_as_it_is)?;
                false
            }
            Operation::WriteZeroes { fua, .. } => {
                shared().write_zeroes(offset, length).map_err(failure)?;
                fua
            }
            Operation::Write { fua } | Operation::Copy { fua, .. } => {
                self.in_turns(&shared())?;
                fua
            }
            _ => {
                self.in_turns(&shared())?;
                false
            }
        };
        if forced { make_stable(&shared()).map_err(failure) } else { Ok(()) }
    }

    /// Moves the data through a bounce buffer.
    fn in_turns(&self, access: &Access) -> Result<(), Failure> {
        let mut bounce = Bounce::default();
        let mut done = 0;
        while done < self.length_bytes {
            bounce.prepare(self.length_bytes - done);
            let offset = self.offset_bytes + done;
            let count = bounce.bytes().len();
            match self.operation {
                Operation::Write { .. } => bounce.fill_from(&self.memory, &self.ranges, done)?,
                Operation::Fill { pattern } => {
                    let pattern = pattern.to_le_bytes();
                    bounce
                        .bytes()
                        .iter_mut()
                        .zip(pattern.iter().cycle())
                        .for_each(|(byte, &value)| *byte = value);
                }
                Operation::Copy { source_offset_bytes, .. } => {
                    access.read(bounce.bytes(), source_offset_bytes + done).map_err(failure)?;
                }
                _ => access.read(bounce.bytes(), offset).map_err(failure)?,
            }
            if self.operation.writes() {
                access.write(&*bounce.bytes(), offset).map_err(failure)?;
            }
            match self.operation {
                Operation::Read => bounce.empty_into(&self.memory, &self.ranges, done, count)?,
                Operation::Compare if !bounce.equals(&self.memory, &self.ranges, done, count)? => {
                    return Err(Failure::Miscompare);
                }
                _ => {}
            }
            done += count as u64;
        }
        Ok(())
    }
}

fn make_stable(access: &Access) -> std::io::Result<()> {
    access.flush()?;
    access.sync()
}

/// "Afterwards it reads as zeroes or as before": an image that cannot deallocate has done its duty.
fn leave_as_it_is(error: std::io::Error) -> Result<(), Failure> {
    if error.kind() == std::io::ErrorKind::Unsupported { Ok(()) } else { Err(failure(error)) }
}

/// What an error of the library is for a request. One without a number is of the format: the image is damaged.
fn failure(error: std::io::Error) -> Failure {
    log::debug!("a qcow2 image failed a request: {error}");
    failure_of(error.raw_os_error().unwrap_or(libc::EIO))
}

impl Backend for Qcow2Image {
    fn identity(&self) -> Identity {
        let kind = self.base.as_ref().map_or("qcow2", |(base, _)| base.format.kind());
        Identity { kind, capacity_bytes: self.capacity_bytes, read_only: self.read_only }
    }

    fn place(&self) -> Option<Place> {
        Some(self.file.place())
    }

    fn files(&self) -> Vec<&ImageFile> {
        std::iter::once(&self.file).chain(self.base.iter().map(|(_, base)| base)).collect()
    }

    fn nodes(&self) -> Result<Vec<OwnedFd>, Error> {
        let Some(held) = self.held.load_full() else { return Ok(Vec::new()) };
        let files = std::iter::once(&held.file).chain(&held.base);
        self.files().into_iter().zip(files).map(|(file, held)| file.node_of(held)).collect()
    }

    fn migratability(&self) -> Migratability {
        Migratability::State
    }

    fn submit(&self, context: &mut IoContext, request: &Request<'_>) {
        if let Err(failure) = self.start(context, request) {
            context.complete(request.token, Err(failure));
        }
    }

    fn dirty_blocks(&self) -> Option<&DirtyBlocks> {
        Some(&self.dirty)
    }

    fn sync(&self) -> Result<(), Error> {
        let Some(held) = self.held.load_full().filter(|_| !self.read_only) else { return Ok(()) };
        let access = held.access.read().unwrap_or_else(PoisonError::into_inner);
        make_stable(&access).map_err(|source| Error::Flush { path: self.file.path().to_owned(), source })
    }

    fn release(&self) -> Result<(), Error> {
        self.sync()?;
        let Some(held) = self.held.swap(None) else { return Ok(()) };
        // Requests hold it: with one under way the lock must not go.
        let Held { access, file, base } = Arc::try_unwrap(held).map_err(|held| {
            self.held.store(Some(held));
            Error::InUse { path: self.file.path().to_owned() }
        })?;
        // All of it is on the disk; nothing is written afterwards.
        drop(access);
        if let (Some(file), Some((base, _))) = (&base, &self.base) {
            file::unlock(file, &base.path)?;
        }
        file::unlock(&file, self.file.path())
    }

    fn acquire(&self) -> Result<(), Error> {
        if self.held.load().is_some() {
            return Ok(());
        }
        let access = if self.read_only { READING } else { WRITING };
        let path = self.file.path();
        let file = self.file.open(access)?;
        file::lock(&file, path, access)?;
        let again =
            file.try_clone().map_err(|source| Error::Open { path: path.to_owned(), access, source })?;
        // Only now: whoever held it before may have written its tables until the lock was free.
        let (format, base) = match &self.base {
            None => (open_format(again, path, !self.read_only, None)?, None),
            Some((base, file_of_base)) => {
                let base_file = file_of_base.open(READING)?;
                file::lock(&base_file, &base.path, READING)?;
                (open_over(again, path, !self.read_only, base, &base_file)?, Some(base_file))
            }
        };
        let (place, size_bytes) = (place_of(&file, path)?, format.size());
        if (size_bytes, place) != (self.capacity_bytes, self.file.place()) {
            return Err(Error::Changed {
                path: path.to_owned(),
                before: format!("{} bytes ({})", self.capacity_bytes, self.file.place()),
                now: format!("{size_bytes} bytes ({place})"),
            });
        }
        self.held.store(Some(Arc::new(Held { access: RwLock::new(format), file, base })));
        Ok(())
    }
}
