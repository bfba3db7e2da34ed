//! The file that a subsystem's state is kept in, and its replacement at once.
//!
//! ```text
//! "FERRYNVS" | be32 version 1 | be32 length of the body | body: [`Kept`], encoded by vmstate | be32 CRC-32 of all before
//! ```
//! A new state is written beside the old one, made stable, and renamed over it; then the folder is made stable. So whatever moment
//! the power fails at, the name leads to the old state or to the new one, whole.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nvme::SubsystemState;
use vmstate::VmState;

/// Name of the file in its folder.
pub(super) const STATE: &str = "state";
/// Name of a state that is being written.
pub(super) const NEW_STATE: &str = "state.new";

const MAGIC: &[u8; 8] = b"FERRYNVS";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 16;
const CHECKSUM_BYTES: usize = 4;
/// Above what a thousand namespaces take, each attached to all controllers, and 256 controllers with full logs. Only a guest that marks
/// blocks as uncorrectable by the million comes so far, and it is refused that: what could not be read again is not written.
const MAX_BODY_BYTES: usize = 32 << 20;

/// What is in the file.
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "subsystem-file", version = 1)]
pub struct Kept {
    /// Drawn when the subsystem was made: the same folder has the same, wherever it is mounted.
    pub id: [u8; 16],
    /// Grows with every state that is written.
    pub sequence: u64,
    /// Serial number of the subsystem, padded with spaces.
    pub serial: [u8; 20],
    /// The state.
    pub state: SubsystemState,
}

/// Why a state cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system failed.
    #[error("{}: cannot {action}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The file is something else, or was damaged.
    #[error("{} is no state of a subsystem: {reason}", path.display())]
    NotAState {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// It would be longer than what is read.
    #[error("{}: a state of {length_bytes} bytes is not written, since at most {MAX_BODY_BYTES} are read again", path.display())]
    TooLong {
        /// The file.
        path: PathBuf,
        /// Bytes of the body.
        length_bytes: usize,
    },
    /// A region with contents of another size.
    #[error("{} has {found_bytes} bytes, and the persistent memory region (pmr) is to have {length_bytes}", path.display())]
    RegionSize {
        /// The file.
        path: PathBuf,
        /// Its size.
        found_bytes: u64,
        /// That of the region.
        length_bytes: u64,
    },
    /// The folder belongs to nobody, or to somebody else.
    #[error("{} is not this process's to write to", path.display())]
    NotHeld {
        /// The folder.
        path: PathBuf,
    },
    /// The contents of a region are another file than they were.
    #[error("{} was replaced while this process had it mapped", path.display())]
    Replaced {
        /// The file.
        path: PathBuf,
    },
    /// The memory of a region cannot become its file.
    #[error(transparent)]
    Memory(#[from] crate::memory::Error),
    /// The bytes do not make a state.
    #[error("{} is no state of a subsystem", path.display())]
    Content {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        source: vmstate::Error,
    },
}

/// Puts words to a failure of the operating system.
pub(super) fn failed<'a>(path: &'a Path, action: &'static str) -> impl FnOnce(io::Error) -> Error + 'a {
    move |source| Error::Io { path: path.to_owned(), action, source }
}

/// Reads the state in `folder`; `None` if there never was one.
pub(super) fn read(folder: &Path) -> Result<Option<Kept>, Error> {
    let path = folder.join(STATE);
    let length = match fs::metadata(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        metadata => metadata.map_err(failed(&path, "look at it"))?.len(),
    };
    if length > (HEADER_BYTES + MAX_BODY_BYTES + CHECKSUM_BYTES) as u64 {
        return Err(Error::NotAState { path, reason: format!("no state has {length} bytes") });
    }
    let bytes = fs::read(&path).map_err(failed(&path, "read it"))?;
    decode(&bytes, &path).map(Some)
}

/// How files are made that only their owner may read.
pub(super) fn private() -> OpenOptions {
    let mut options = File::options();
    options.mode(0o600);
    options
}

/// Replaces the state in `folder`, which is stable when the [folder](sync_folder) is. If this fails, it is as before.
pub(super) fn replace(folder: &Path, kept: &Kept) -> Result<(), Error> {
    let new = folder.join(NEW_STATE);
    let bytes = encode(kept, &folder.join(STATE))?;
    let file = private().write(true).create(true).truncate(true).open(&new);
    let mut file = file.map_err(failed(&new, "make it"))?;
    file.write_all(&bytes).map_err(failed(&new, "write it"))?;
    file.sync_all().map_err(failed(&new, "make it stable"))?;
    drop(file);
    let path = folder.join(STATE);
    fs::rename(&new, &path).map_err(failed(&path, "replace it"))
}

/// Makes the names in `folder` stable.
pub(super) fn sync_folder(folder: &Path) -> Result<(), Error> {
    let synced = File::open(folder).and_then(|folder| folder.sync_all());
    synced.map_err(failed(folder, "make its names stable"))
}

fn encode(kept: &Kept, path: &Path) -> Result<Vec<u8>, Error> {
    let body = vmstate::to_bytes(kept);
    if body.len() > MAX_BODY_BYTES {
        return Err(Error::TooLong { path: path.to_owned(), length_bytes: body.len() });
    }
    let mut bytes = [&MAGIC[..], &VERSION.to_be_bytes(), &(body.len() as u32).to_be_bytes(), &body].concat();
    let checksum = crc32fast::hash(&bytes);
    bytes.extend(checksum.to_be_bytes());
    Ok(bytes)
}

fn decode(bytes: &[u8], path: &Path) -> Result<Kept, Error> {
    let refuse = |reason: String| Err(Error::NotAState { path: path.to_owned(), reason });
    let Some((all, checksum)) = bytes.split_last_chunk::<CHECKSUM_BYTES>() else {
        return refuse(format!("it has {} bytes only", bytes.len()));
    };
    let [m0, m1, m2, m3, m4, m5, m6, m7, v0, v1, v2, v3, l0, l1, l2, l3, body @ ..] = all else {
        return refuse(format!("it has {} bytes only", bytes.len()));
    };
    if [*m0, *m1, *m2, *m3, *m4, *m5, *m6, *m7] != *MAGIC {
        return refuse("it begins otherwise".to_owned());
    }
    let version = u32::from_be_bytes([*v0, *v1, *v2, *v3]);
    if version != VERSION {
        return refuse(format!("its version is {version}, and this ferry knows version {VERSION}"));
    }
    let length = u32::from_be_bytes([*l0, *l1, *l2, *l3]);
    if length as usize != body.len() {
        return refuse(format!("its body has {} bytes instead of {length}", body.len()));
    }
    if crc32fast::hash(all) != u32::from_be_bytes(*checksum) {
        return refuse("its checksum is wrong".to_owned());
    }
    vmstate::from_bytes(body, Kept::VERSION)
        .map_err(|source| Error::Content { path: path.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(sequence: u64) -> Kept {
        Kept { id: [7; 16], sequence, serial: *b"SERIAL              ", state: SubsystemState::default() }
    }

    fn encoded(sequence: u64) -> Vec<u8> {
        encode(&kept(sequence), Path::new(STATE)).unwrap()
    }

    /// A state whose allocations are as many records of 256 controllers as there can be, and as many times more.
    fn long(times: usize) -> Kept {
        let shape = nvme::NamespaceShape {
            nsid: 1,
            block_shift: 9,
            blocks: 8,
            read_only: false,
            uuid: [1; 16],
            backend: *b"file    ",
            metadata: None,
        };
        let attached: Vec<u16> = (0..nvme::MAX_CONTROLLERS as u16).collect();
        let record = nvme::AllocatedState {
            shape,
            created: true,
            shared: true,
            attached_count: attached.len() as u32,
            attached,
            protection: None,
            uncorrectable: None,
        };
        let namespaces = vec![record; times * nvme::MAX_NAMESPACES as usize];
        let count = namespaces.len() as u32;
        let allocations = nvme::AllocationsState { created_ever: 1, namespace_count: count, namespaces };
        Kept { state: SubsystemState { allocations, ..SubsystemState::default() }, ..kept(2) }
    }

    #[test]
    fn what_could_not_be_read_again_is_not_written() {
        let folder = tempfile::tempdir().unwrap();
        replace(folder.path(), &long(1)).unwrap();
        assert_eq!(read(folder.path()).unwrap(), Some(long(1)));
        let error = replace(folder.path(), &long(64)).unwrap_err().to_string();
        assert!(error.contains("is not written, since at most 33554432 are read again"), "{error}");
        assert_eq!(read(folder.path()).unwrap(), Some(long(1)), "the one before is still there");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1, "nothing was begun");
    }

    #[test]
    fn a_state_is_found_again_and_its_successor_replaces_it() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(read(folder.path()).unwrap(), None);
        for sequence in [1, 2] {
            replace(folder.path(), &kept(sequence)).unwrap();
            assert_eq!(read(folder.path()).unwrap(), Some(kept(sequence)));
        }
        let names = fs::read_dir(folder.path()).unwrap().count();
        assert_eq!(names, 1, "nothing else is left");
    }

    #[test]
    fn a_state_that_was_being_written_when_the_power_failed_is_as_if_it_had_never_been() {
        let folder = tempfile::tempdir().unwrap();
        replace(folder.path(), &kept(1)).unwrap();
        let next = encoded(2);
        for length in 0..=next.len() {
            fs::write(folder.path().join(NEW_STATE), &next[..length]).unwrap();
            assert_eq!(read(folder.path()).unwrap(), Some(kept(1)), "after {length} bytes");
        }
        replace(folder.path(), &kept(3)).unwrap();
        assert_eq!(read(folder.path()).unwrap(), Some(kept(3)));
    }

    #[test]
    fn a_state_that_cannot_be_replaced_stays() {
        let folder = tempfile::tempdir().unwrap();
        replace(folder.path(), &kept(1)).unwrap();
        // Where the new one would be written is a folder.
        fs::create_dir(folder.path().join(NEW_STATE)).unwrap();
        let error = replace(folder.path(), &kept(2)).unwrap_err().to_string();
        assert!(error.contains("state.new: cannot make it"), "{error}");
        assert_eq!(read(folder.path()).unwrap(), Some(kept(1)));
    }

    #[test]
    fn damage_anywhere_is_noticed() {
        let good = encoded(1);
        let path = Path::new("folder/state");
        assert_eq!(decode(&good, path).unwrap(), kept(1));
        for length in 0..good.len() {
            assert!(decode(&good[..length], path).is_err(), "{length} bytes");
        }
        for bit in 0..good.len() * 8 {
            let mut bytes = good.clone();
            bytes[bit / 8] ^= 1 << (bit % 8);
            let error = decode(&bytes, path).unwrap_err().to_string();
            assert!(error.contains("folder/state"), "{error}");
        }
    }

    #[test]
    fn a_version_that_is_not_known_is_named() {
        let mut bytes = encoded(1);
        bytes[11] = 2;
        let error = decode(&bytes, Path::new("state")).unwrap_err().to_string();
        assert!(error.contains("its version is 2, and this ferry knows version 1"), "{error}");
    }

    #[test]
    fn a_file_without_end_is_not_read() {
        let folder = tempfile::tempdir().unwrap();
        File::create(folder.path().join(STATE)).unwrap().set_len(1 << 40).unwrap();
        let error = read(folder.path()).unwrap_err().to_string();
        assert!(error.contains("no state has 1099511627776 bytes"), "{error}");
    }
}
