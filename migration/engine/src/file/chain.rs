//! Snapshots that hold only what the guest has written since another one, their parent.
//!
//! ```text
//! wednesday.ferry --> tuesday.ferry --> monday.ferry
//! written since       written since     all of it
//! ```
//!
//! A child says which file its parent was: its name in the folder of the child, and its digest, which covers every bit of it, its own
//! parent included. So a chain has no loops, and a file that took the parent's name is not taken for it. Whatever a file says, its
//! parent lies beside it: no file leads anywhere else. A chain is read like one file; what is wrong with any of its files, but for
//! pages, is found before the guest runs.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::libc;
use stream::Expected;
use vmstate::VmState;

use super::head::{Head, no_section};
use super::memory::Layer;
use super::{FileState, SECTION};
use crate::folder::folder_of;
use crate::ram::match_blocks;
use crate::{Error, RamBlock};

/// Files of a chain: each costs a descriptor, a bitmap and digests, and a look for every piece of memory.
pub(super) const LAYERS_MAX: u32 = 32;
const NAME_BYTES_MAX: usize = 255;
const DOING: &str = "reading the parent of a snapshot";

/// Which file the parent of a snapshot was. As foreign as the file that says it.
#[derive(Clone, Debug, PartialEq, Eq, VmState)]
#[vmstate(name = "ferry/parent", version = 1)]
pub struct FileParent {
    pub(super) digest: u64,
    /// Of the lease, when it was taken.
    generation: u64,
    /// Files below this one.
    #[vmstate(min = 1, max = LAYERS_MAX - 1)]
    depth: u32,
    name_length: u8,
    #[vmstate(len = "name_length", max = NAME_BYTES_MAX)]
    name: Vec<u8>,
}

impl FileParent {
    /// The snapshot at `path` as the parent of one that is to be at `child`, of a machine with `blocks`. All of its chain is looked at.
    pub(super) fn of(
        path: &Path,
        child: &Path,
        expected: impl Fn() -> Expected,
        blocks: &[RamBlock],
    ) -> Result<Self, Error> {
        let wrong = |source| unusable(child, path, source);
        let canonical = |path: &Path| {
            let failed = |source: io::Error| Error::File {
                doing: "find the folder of",
                path: path.display().to_string(),
                source: source.into(),
            };
            fs::canonicalize(folder_of(path)).map_err(failed)
        };
        if canonical(path).map_err(wrong)? != canonical(child)? {
            return Err(wrong(refused("a parent lies in the folder of its child".to_owned())));
        }
        let (layer, digest, state) = read(path, expected()).map_err(wrong)?;
        let theirs: Vec<_> = layer.ram.blocks().map(|place| place.block.clone()).collect();
        match_blocks(&theirs, blocks).map_err(|reason| wrong(refused(reason)))?;
        let below = match &state.parent {
            Some(parent) => open(path, parent, expected)?,
            None => Vec::new(),
        };
        let depth = below.len() as u32 + 1;
        if depth >= LAYERS_MAX {
            return Err(wrong(refused(format!(
                "it is the last of {depth} files that need each other, and there may be {LAYERS_MAX} at most: take one of all memory"
            ))));
        }
        let name = path.file_name().unwrap_or_default().as_bytes().to_vec();
        Ok(Self { digest, generation: state.generation, depth, name_length: 0, name })
    }

    /// Where it is to be: beside its child, whatever the child says.
    ///
    /// # Errors
    /// What the child says is no name.
    pub fn beside(&self, child: &Path) -> Result<PathBuf, Error> {
        let name = OsStr::from_bytes(&self.name);
        match Path::new(name).file_name() == Some(name) {
            true => Ok(child.with_file_name(name)),
            false => Err(refused(format!("{name:?} is no name of a file"))),
        }
    }

    /// Whether the file of this digest, in which `state` is, is the one.
    ///
    /// # Errors
    /// It is another.
    pub fn check(&self, digest: u64, state: &FileState) -> Result<(), Error> {
        if digest != self.digest {
            return Err(refused(format!(
                "it is another file: it is of generation {} and its digest is {digest:016x}, and the parent was of generation {} and had {:016x}",
                state.generation, self.generation, self.digest
            )));
        }
        let depth = state.parent.as_ref().map_or(0, |parent| parent.depth);
        if depth + 1 != self.depth {
            return Err(refused(format!(
                "{depth} files are below it, and the parent had {}",
                self.depth - 1
            )));
        }
        Ok(())
    }
}

/// The files below the one at `path`, whose parent is `parent`: the newest first, all of them verified but for their pages.
pub(super) fn open(
    path: &Path,
    parent: &FileParent,
    expected: impl Fn() -> Expected,
) -> Result<Vec<Layer>, Error> {
    let mut layers = Vec::new();
    let (mut child, mut link) = (path.to_owned(), Some(parent.clone()));
    // What a parent says of its own depth is compared, so this ends.
    while let Some(parent) = link {
        let path = parent.beside(&child)?;
        let wrong = |source| unusable(&child, &path, source);
        let (layer, digest, state) = read(&path, expected()).map_err(wrong)?;
        parent.check(digest, &state).map_err(wrong)?;
        layers.push(layer);
        (child, link) = (path, state.parent);
    }
    Ok(layers)
}

/// Reads all of a mapped file but its pages.
fn read(path: &Path, expected: Expected) -> Result<(Layer, u64, FileState), Error> {
    let failed = |source: io::Error| Error::File {
        doing: "open",
        path: path.display().to_string(),
        source: source.into(),
    };
    let file = open_regular(path).map_err(failed)?;
    let Head { mut sections, digest, ram } = Head::read(file, expected, &mut |_| Ok(()))?;
    if ram.blocks().len() == 0 {
        return Err(refused("it is no file of the mapped layout".to_owned()));
    }
    let state = sections.take(SECTION, 0).map_err(|_| no_section())?;
    Ok((Layer { ram, path: path.to_owned() }, digest, state))
}

/// Waits for nobody at the other end of a pipe.
fn open_regular(path: &Path) -> io::Result<File> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path)?;
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(io::Error::other("it is no regular file")),
    }
}

fn refused(reason: String) -> Error {
    Error::Protocol { doing: DOING, reason }
}

fn unusable(child: &Path, parent: &Path, source: Error) -> Error {
    Error::Parent {
        child: child.display().to_string(),
        parent: parent.display().to_string(),
        source: Box::new(source),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parent(name: &[u8]) -> FileParent {
        FileParent { digest: 7, generation: 1, depth: 2, name_length: 0, name: name.to_vec() }
    }

    fn state(parent: Option<FileParent>) -> FileState {
        FileState {
            running: true,
            has_lease: false,
            lease: [0; 16],
            generation: 1,
            description_length: 0,
            description: Vec::new(),
            images: None,
            parent,
        }
    }

    #[test]
    fn a_name_leads_nowhere_but_beside_the_child() {
        let child = Path::new("/snapshots/tuesday");
        assert_eq!(parent(b"monday").beside(child).unwrap(), Path::new("/snapshots/monday"));
        for name in
            [&b""[..], b".", b"..", b"/", b"/etc/passwd", b"../monday", b"a/b", b"monday/", b"./monday"]
        {
            let error = parent(name).beside(child).unwrap_err().to_string();
            assert!(error.contains("no name of a file"), "{error}");
        }
        let nul = parent(b"mon\0day").beside(child).unwrap();
        assert!(open_regular(&nul).is_err(), "the system takes no such name");
    }

    #[test]
    fn a_chain_that_says_another_length_than_it_has_is_refused() {
        let child = parent(b"monday");
        let middle = FileParent { depth: 1, ..child.clone() };
        child.check(7, &state(Some(middle.clone()))).unwrap();
        let error = child.check(8, &state(Some(middle))).unwrap_err().to_string();
        assert!(error.contains("another file") && error.contains("0000000000000007"), "{error}");
        for depth in [None, Some(2), Some(LAYERS_MAX - 1)] {
            let below = depth.map(|depth| FileParent { depth, ..child.clone() });
            let error = child.check(7, &state(below)).unwrap_err().to_string();
            assert!(error.contains("files are below it"), "{error}");
        }
    }

    #[test]
    fn a_pipe_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let pipe = folder.path().join("monday");
        rustix::fs::mknodat(rustix::fs::CWD, &pipe, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        assert!(open_regular(&pipe).unwrap_err().to_string().contains("no regular file"));
    }
}
