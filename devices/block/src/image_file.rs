//! A file that an image is made of, and the two ways to it.
//!
//! Its name, which the user has given, says which file that is. A process of the same host that holds the image can pass the file itself
//! as a *node*: a descriptor that was opened with `O_PATH` (open(2)), "to indicate a location in the filesystem tree". From then on
//! the name is asked no more, on either side: whatever it leads to by now, the image goes on to be the file that it was.
//!
//! A node cannot be read, written or locked, so that no lock goes with it from one process to the other. Whoever opens it, by
//! `/proc/self/fd`, has an open file description of his own, with his own flags, rights and locks, as if he had opened the name.
//!
//! What a peer passes is looked at first. It must be a node and nothing more: a descriptor of an open file would share that one's lock, and
//! could keep it set here after the end of its owner. It must be a regular file or a block device: opening a pipe would wait,
//! opening a terminal or a tape could do worse. And it must be the file that the name led to when this process looked: which files
//! a process may write, its own user says and no peer, who could otherwise have it open with its rights what he cannot open himself. So a
//! name that leads nowhere, or to another file, is refused whatever was passed.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rustix::fs::{CWD, FileType, Mode, OFlags};
use rustix::io::Errno;

use crate::{Error, Place};

/// Kinds of access, as error messages call them.
pub(crate) const READING: &str = "reading";
pub(crate) const WRITING: &str = "writing";

/// See the module's documentation.
#[derive(Debug)]
pub struct ImageFile {
    path: PathBuf,
    /// Of when it was looked at first.
    place: Place,
    node: OnceLock<OwnedFd>,
}

impl ImageFile {
    /// The file that `path` leads to, open for reading.
    pub(crate) fn look(path: PathBuf) -> Result<(Self, File), Error> {
        let file = open_name(&path, READING)?;
        let place = place_of(&file, &path)?;
        Ok((Self { path, place, node: OnceLock::new() }, file))
    }

    /// Its name.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn place(&self) -> Place {
        self.place
    }

    /// Opens it.
    pub(crate) fn open(&self, access: &'static str) -> Result<File, Error> {
        match self.node.get() {
            // It is known to be an image.
            Some(node) => open(&way_to(node), access, OFlags::empty()).map_err(failed(&self.path, access)),
            None => open_name(&self.path, access),
        }
    }

    /// Opens it with `O_NONBLOCK`, while a guest may wait for it, and does not look at what the name leads to by now, which costs as much as
    /// opening it: with that flag not even a pipe would be waited for. The caller sees by [`place_of`] whether the file is the one that
    /// was looked at when it was named, before it reads or writes, and takes the flag off.
    pub(crate) fn open_at_once(&self, access: &'static str) -> Result<File, Error> {
        let way = self.node.get().map(way_to);
        let way = way.as_deref().unwrap_or(&self.path);
        open(way, access, OFlags::NONBLOCK).map_err(failed(&self.path, access))
    }

    /// A node of the file, which is open as `held`, for another process. This one, should it open the file again, goes by it as well.
    pub(crate) fn node_of(&self, held: &File) -> Result<OwnedFd, Error> {
        let failed = failed(&self.path, "passing on");
        if self.node.get().is_none() {
            let node = rustix::fs::open(way_to(held), OFlags::PATH | OFlags::CLOEXEC, Mode::empty());
            // Set meanwhile, it is of the same file.
            let _ = self.node.set(node.map_err(&failed)?);
        }
        let node = self.node.get().expect("it was set just now");
        rustix::io::fcntl_dupfd_cloexec(node, 0).map_err(failed)
    }

    /// Takes a node that another process passes, to open the file by it from now on.
    ///
    /// # Errors
    /// [`Error::Passed`]: it is no node, or not one of this file. Nothing has changed then.
    pub fn adopt(&self, passed: OwnedFd) -> Result<(), Error> {
        let refuse = |reason| Error::Passed { path: self.path.clone(), reason };
        let unseen = |errno: Errno| refuse(format!("it cannot be looked at: {errno}"));
        if !rustix::fs::fcntl_getfl(&passed).map_err(unseen)?.contains(OFlags::PATH) {
            return Err(refuse("what came is open, and could have a lock".to_owned()));
        }
        let (kind, place) = Place::with_kind(&passed, "").map_err(unseen)?;
        if !is_image(kind) {
            return Err(refuse("what came is neither a regular file nor a block device".to_owned()));
        }
        if place != self.place {
            // As the kernel knows it: the peer could say anything.
            let name = rustix::fs::readlink(way_to(&passed), Vec::new()).unwrap_or_default();
            let (name, ours) = (String::from_utf8_lossy(name.as_bytes()), self.place);
            return Err(refuse(format!("{name:?} came, which is another file ({place} and not {ours})")));
        }
        // While there is time: where /proc is not what it should be, the file could not be opened when it must be.
        let found = Place::with_kind(CWD, way_to(&passed)).map_err(unseen)?;
        if found != (kind, place) {
            return Err(refuse("/proc leads to another file".to_owned()));
        }
        self.node.set(passed).map_err(|_| refuse("one was passed before".to_owned()))
    }
}

/// The name by which the kernel opens what `descriptor` is of, anew.
fn way_to(descriptor: &impl AsRawFd) -> PathBuf {
    format!("/proc/self/fd/{}", descriptor.as_raw_fd()).into()
}

fn is_image(kind: FileType) -> bool {
    matches!(kind, FileType::RegularFile | FileType::BlockDevice)
}

fn failed(path: &Path, access: &'static str) -> impl Fn(Errno) -> Error {
    move |errno| Error::Open { path: path.to_owned(), access, source: errno.into() }
}

/// Opens `path` if it can be an image.
fn open_name(path: &Path, access: &'static str) -> Result<File, Error> {
    // Before it is opened: opening a pipe would wait, opening a terminal or a tape could do worse.
    let (kind, _) = Place::with_kind(CWD, path).map_err(failed(path, access))?;
    if !is_image(kind) {
        return Err(Error::NotAnImage { path: path.to_owned() });
    }
    open(path, access, OFlags::empty()).map_err(failed(path, access))
}

fn open(way: &Path, access: &'static str, flags: OFlags) -> rustix::io::Result<File> {
    let flags = flags | if access == WRITING { OFlags::RDWR } else { OFlags::RDONLY };
    Ok(rustix::fs::open(way, flags | OFlags::CLOEXEC | OFlags::NOCTTY, Mode::empty())?.into())
}

/// Which file `file`, which is at `path`, is.
pub(crate) fn place_of(file: &File, path: &Path) -> Result<Place, Error> {
    Place::of(file).map_err(failed(path, "looking at"))
}
