//! Overlays: qcow2 images that hold only what was written since they were made, over a base that nobody writes to.
//!
//! The base is named by whoever opens the overlay, and never by the overlay, which is not trusted: the name in its header is for people
//! and for other tools. What is in its header beside that is what the base was when the overlay was made: its size, and when it was
//! written to last. A base that is not that any more is refused, since the two make no image.
//!
//! ```text
//! qcow2, "Header extensions": be32 type "fryb" | be32 length 20 | be64 bytes | be64 seconds | be32 nanoseconds | 4 bytes of padding
//! ```
//!
//! Absent: overlays over overlays. A base that is qcow2 has no base itself.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use imago::qcow2::Qcow2;
use imago::raw::Raw;
use imago::{DenyImplicitOpenGate, FormatAccess, FormatCreateBuilder, FormatDriverBuilder};

use crate::Error;
use crate::image_file::{ImageFile, READING};
use crate::qcow2::{Access, open_format};

/// "Unknown extensions can be safely ignored", and others keep them.
const RECORD_TYPE: u32 = u32::from_be_bytes(*b"fryb");
const RECORD_BYTES: usize = 20;
/// Header extensions lie in the first cluster; ours are made with this size of it.
const CLUSTER_BYTES: usize = 64 << 10;
/// "Length of the backing file name in bytes. Must not be longer than 1023 bytes."
const NAME_BYTES_MAX: usize = 1023;

/// How the bytes of a base are read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum BaseFormat {
    /// As they are.
    #[default]
    Raw,
    /// As qcow2 says.
    Qcow2,
}

impl BaseFormat {
    /// The kind of an image of this format, as [`Identity::kind`](crate::Identity::kind) has it.
    pub(crate) fn kind(self) -> &'static str {
        match self {
            Self::Raw => "file",
            Self::Qcow2 => "qcow2",
        }
    }
}

impl fmt::Display for BaseFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        })
    }
}

/// What an overlay lies over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Base {
    /// Where it is.
    pub path: PathBuf,
    /// Its format, which is not guessed: what a guest has written must not decide that.
    pub format: BaseFormat,
}

impl Base {
    /// What is in the base, which is open for reading as `file`. The lock is the caller's business.
    pub(crate) fn access(&self, file: &File) -> Result<Access, Error> {
        let again = file.try_clone().map_err(|source| self.unreadable(source))?;
        match self.format {
            BaseFormat::Qcow2 => open_format(again, &self.path, false, None),
            BaseFormat::Raw => {
                let opened = imago::file::File::try_from(again)
                    .and_then(|file| Raw::builder(file).open(DenyImplicitOpenGate::default()));
                Ok(FormatAccess::new(opened.map_err(|source| self.unreadable(source))?))
            }
        }
    }

    fn unreadable(&self, source: io::Error) -> Error {
        Error::Open { path: self.path.clone(), access: READING, source }
    }

    /// Whether `overlay`, which is at `path`, was made over what the base, open as `file`, is now.
    pub(crate) fn check(&self, file: &File, overlay: &File, path: &Path) -> Result<(), Error> {
        let wrong = |reason: String| Err(self.unfit(path, reason));
        let now = Record::of(file).map_err(|source| self.unreadable(source))?;
        let read = Record::read(overlay);
        match read.map_err(|source| Error::Open { path: path.to_owned(), access: READING, source })? {
            None => wrong("it was not made as an overlay here".to_owned()),
            Some(before) if before != now => wrong(format!(
                "that is not what it was when the overlay was made: {before} before, {now} now"
            )),
            Some(_) => Ok(()),
        }
    }

    pub(crate) fn unfit(&self, path: &Path, reason: String) -> Error {
        Error::Overlay { path: path.to_owned(), base: self.path.clone(), reason }
    }
}

/// Makes the empty file `into`, which is to be at `path`, an overlay over `base` to which nothing was written yet.
///
/// # Errors
/// The base cannot be read, or its name does not fit into the header; the overlay cannot be written.
pub fn create_overlay(into: &File, path: &Path, base: &Base) -> Result<(), Error> {
    let (_, file) = ImageFile::look(base.path.clone())?;
    let access = base.access(&file)?;
    let name = std::path::absolute(&base.path).map_err(|source| base.unreadable(source))?;
    let name = match name.to_str() {
        Some(name) if name.len() <= NAME_BYTES_MAX => name.to_owned(),
        _ => return Err(base.unfit(path, format!("its name is not UTF-8 of at most {NAME_BYTES_MAX} bytes"))),
    };
    let create = || -> io::Result<()> {
        let storage = imago::file::File::try_from(into.try_clone()?)?;
        Qcow2::<imago::file::File, Access>::create_builder(storage)
            .size(access.size())
            .backing(name, base.format.to_string())
            .create()?;
        Record::of(&file)?.write(into)
    };
    create().map_err(|source| Error::Create { path: path.to_owned(), source })
}

/// What a base was.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Record {
    length_bytes: u64,
    modified_seconds: i64,
    modified_nanoseconds: u32,
}

impl fmt::Display for Record {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { length_bytes, modified_seconds, modified_nanoseconds } = self;
        write!(f, "{length_bytes} bytes, last written to at {modified_seconds}.{modified_nanoseconds:09}")
    }
}

/// A field of a header; `None` if it ends before.
fn field<const N: usize>(header: &[u8], at: usize) -> Option<[u8; N]> {
    header.get(at..at.checked_add(N)?)?.try_into().ok()
}

fn be32(header: &[u8], at: usize) -> Option<usize> {
    usize::try_from(u32::from_be_bytes(field(header, at)?)).ok()
}

impl Record {
    fn of(file: &File) -> io::Result<Self> {
        let about = file.metadata()?;
        if !about.is_file() {
            // When it was written to last nobody can tell.
            return Err(io::Error::other("a base is a regular file"));
        }
        Ok(Self {
            length_bytes: about.len(),
            modified_seconds: about.mtime(),
            modified_nanoseconds: u32::try_from(about.mtime_nsec()).unwrap_or_default(),
        })
    }

    /// What the header of `overlay` says, if it does.
    fn read(overlay: &File) -> io::Result<Option<Self>> {
        let length_bytes = overlay.metadata()?.len().min(CLUSTER_BYTES as u64);
        let mut header = vec![0; length_bytes as usize];
        overlay.read_exact_at(&mut header, 0)?;
        Ok(Self::find(&header))
    }

    fn find(header: &[u8]) -> Option<Self> {
        // Version 2 has no field for its length, and is not made here.
        if u32::from_be_bytes(field(header, 4)?) != 3 {
            return None;
        }
        let mut at = be32(header, 100)?;
        loop {
            let (kind, length) = (u32::from_be_bytes(field(header, at)?), be32(header, at + 4)?);
            let data = at + 8;
            match kind {
                0 => return None,
                RECORD_TYPE if length == RECORD_BYTES => {
                    return Some(Self {
                        length_bytes: u64::from_be_bytes(field(header, data)?),
                        modified_seconds: i64::from_be_bytes(field(header, data + 8)?),
                        modified_nanoseconds: u32::from_be_bytes(field(header, data + 16)?),
                    });
                }
                _ => at = data.checked_add(length.checked_next_multiple_of(8)?)?,
            }
        }
    }

    /// Puts it into the header of a new overlay: behind the other extensions, and the name of the base, which follows them, behind it.
    fn write(&self, overlay: &File) -> io::Result<()> {
        let mut header = vec![0; CLUSTER_BYTES];
        overlay.read_exact_at(&mut header, 0)?;
        let unexpected = || io::Error::other("the new header is not as it is expected");
        let name_at = field(&header, 8).map(u64::from_be_bytes).and_then(|at| usize::try_from(at).ok());
        let name_bytes = be32(&header, 16);
        let name_at = name_at.ok_or_else(unexpected)?;
        let name = name_bytes.and_then(|bytes| header.get(name_at..name_at.checked_add(bytes)?));
        // The mark of their end.
        let end = name_at
            .checked_sub(8)
            .filter(|end| field(&header, *end) == Some([0; 8]))
            .ok_or_else(unexpected)?;
        let mut rest = [RECORD_TYPE.to_be_bytes(), (RECORD_BYTES as u32).to_be_bytes()].concat();
        rest.extend(self.length_bytes.to_be_bytes());
        rest.extend(self.modified_seconds.to_be_bytes());
        rest.extend(self.modified_nanoseconds.to_be_bytes());
        rest.extend([0; 4 + 8]);
        let new_name_at = (end + rest.len()) as u64;
        rest.extend(name.ok_or_else(unexpected)?);
        if end + rest.len() > CLUSTER_BYTES {
            return Err(unexpected());
        }
        overlay.write_all_at(&rest, end as u64)?;
        overlay.write_all_at(&new_name_at.to_be_bytes(), 8)
    }
}
