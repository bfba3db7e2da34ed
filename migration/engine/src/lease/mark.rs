//! What is said beside one image, wherever the lease of its machine lies and whichever machine it is put into next.
//!
//! The lease speaks for all images of a machine, to who starts that machine. An image that goes with its guest has a *mark* besides, a
//! file `IMAGE.ferry-mark`, so that it is refused alone, in another order and in another machine too. A mark is whole or not there: it
//! is written under another name, made stable, and given its own.
//!
//! ```text
//! source       nothing --before the stop--> moved unless the lease says otherwise --it has gone--> moved
//!                 ^---------- it did not go ------------'
//! destination  nothing --before the image is made--> incoming unless the lease says otherwise --it is here--> nothing
//! ```
//! So a mark costs the stop nothing: the one write that moves the lease on decides about all images at once. The lease says otherwise
//! only as long as it is that of whoever wrote the mark: nobody else's record tells anything about the images of then.

use std::ffi::OsString;
use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::libc;

use super::record::SLOT_BYTES;
use super::{Error, Lease, Owner, Record, State};
use crate::folder::{folder_of, sync_folder_of};

const MAGIC: [u8; 8] = *b"FRRYMARK";
const HEAD_BYTES: usize = MAGIC.len() + SLOT_BYTES;
const CHECKSUM_BYTES: usize = 4;
/// The longest path that Linux takes (`PATH_MAX`) fits.
const FILE_BYTES_MAX: usize = HEAD_BYTES + 4096 + CHECKSUM_BYTES;

/// What is said beside an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark {
    /// [`State::Moved`] or [`State::Incoming`], and who says so.
    pub record: Record,
    /// The lease that may say otherwise.
    pub unless: Option<PathBuf>,
}

/// Where the mark of `image` is: beside the file itself, whatever links lead to it.
#[must_use]
pub fn mark_path(image: &Path) -> PathBuf {
    let real = fs::canonicalize(image).or_else(|_| {
        // It is to be made there.
        let name = image.file_name().ok_or(ErrorKind::InvalidInput)?;
        Ok::<_, io::Error>(fs::canonicalize(folder_of(image))?.join(name))
    });
    let mut name = OsString::from(real.as_deref().unwrap_or(image));
    name.push(".ferry-mark");
    name.into()
}

impl Mark {
    /// What the mark at `path` says, if there is one.
    ///
    /// # Errors
    /// It cannot be read, or is none.
    pub fn read(path: &Path) -> Result<Option<Self>, Error> {
        let mut bytes = Vec::new();
        match fs::metadata(path) {
            // Opening something else could wait, or do worse.
            Ok(found) if !found.is_file() => return Err(Error::DamagedMark { path: path.to_owned() }),
            Ok(_) => {}
            // Where no mark can be called so, none was ever written.
            Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::InvalidFilename) => {
                return Ok(None);
            }
            Err(error) => return Err(failed(path, "look at it")(error)),
        }
        // What comes there meanwhile is not waited for either.
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY).open(path);
        let read = file.and_then(|file| file.take(FILE_BYTES_MAX as u64 + 1).read_to_end(&mut bytes));
        match read {
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(failed(path, "read it")(error)),
            Ok(_) => {
                Self::from_bytes(&bytes).map(Some).ok_or_else(|| Error::DamagedMark { path: path.to_owned() })
            }
        }
    }

    /// Puts it at `path`, and returns when it is on stable storage.
    ///
    /// # Errors
    /// What was said before still is, or this is already.
    pub fn write(&self, path: &Path) -> Result<(), Error> {
        let mut draft = OsString::from(path);
        draft.push(".new");
        // What a process has left that was killed while it wrote; and nothing that a link there leads to is written over.
        match fs::remove_file(&draft) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(failed(path, "write it")(error)),
            _ => {}
        }
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&draft);
        let mut file = file.map_err(failed(path, "write it"))?;
        let written = file.write_all(&self.to_bytes()).and_then(|()| file.sync_all());
        let named = written.and_then(|()| fs::rename(&draft, path));
        named.map_err(|error| {
            let _what_failed_is_told = fs::remove_file(&draft);
            failed(path, "write it")(error)
        })?;
        sync_folder_of(path).map_err(failed(path, "sync the folder of it"))
    }

    /// Makes it hold whatever a lease says, if it is still at `path`; another's stays as it is.
    ///
    /// # Errors
    /// It may still be as it was.
    pub fn keep(&self, path: &Path) -> Result<(), Error> {
        if Self::read(path)?.as_ref() != Some(self) {
            return Ok(());
        }
        Self { record: self.record.clone(), unless: None }.write(path)
    }

    /// Removes it, if it is still at `path`, and returns when that is on stable storage; another's stays.
    ///
    /// # Errors
    /// It may still be there.
    pub fn remove(&self, path: &Path) -> Result<(), Error> {
        if Self::read(path)?.as_ref() == Some(self) {
            fs::remove_file(path).and_then(|()| sync_folder_of(path)).map_err(failed(path, "remove it"))?;
        }
        Ok(())
    }

    /// Whether what it says holds, as far as `reader` can see: a lease that cannot be read says nothing else.
    #[must_use]
    pub fn holds(&self, reader: Owner) -> bool {
        let Some(lease) = &self.unless else { return true };
        // Whoever may write beside the image says where that is: nothing else is opened there.
        if !fs::metadata(lease).is_ok_and(|found| found.is_file()) {
            return true;
        }
        let record = Lease::open_existing(lease, reader).and_then(|lease| lease.read());
        !record.is_ok_and(|record| record.is_some_and(|record| self.is_contradicted_by(&record)))
    }

    fn is_contradicted_by(&self, record: &Record) -> bool {
        let is_of_then = record.lease == self.record.lease && record.owner.id == self.record.owner.id;
        is_of_then && !record.is_without_guest()
    }

    fn to_bytes(&self) -> Vec<u8> {
        let lease = self.unless.as_ref().map(|path| path.as_os_str().as_bytes()).unwrap_or_default();
        let mut bytes = [&MAGIC, self.record.to_slot(1).as_slice(), lease].concat();
        bytes.extend(crc32fast::hash(&bytes).to_be_bytes());
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let (body, checksum) = bytes.split_last_chunk::<CHECKSUM_BYTES>()?;
        if bytes.len() > FILE_BYTES_MAX || crc32fast::hash(body).to_be_bytes() != *checksum {
            return None;
        }
        let (slot, lease) = body.strip_prefix(&MAGIC)?.split_first_chunk::<SLOT_BYTES>()?;
        let (_, record) = Record::from_slot(slot)?;
        let unless = (!lease.is_empty()).then(|| OsString::from_vec(lease.to_vec()).into());
        record.is_without_guest().then_some(Self { record, unless })
    }
}

impl Lease {
    /// What is to be said beside the images of this lease, which is ours, from now on: that they are in `state`, unless the lease says
    /// otherwise.
    ///
    /// # Errors
    /// [`Error::Moved`]: it is someone else's.
    pub fn mark(&self, state: State) -> Result<Mark, Error> {
        let action = "mark its images";
        let record = self.locked()?.current(action)?;
        let path = self.path.clone();
        if record.owner.id != self.owner.id {
            return Err(Error::Moved { path, action: action.to_owned(), record: Box::new(record) });
        }
        let unless = fs::canonicalize(&path).map_err(|source| self.io("find it", source))?;
        Ok(Mark { record: Record { state, ..record }, unless: Some(unless) })
    }
}

impl fmt::Display for Mark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, by {}", self.record.state, self.record.owner)?;
        match &self.unless {
            Some(lease) => write!(f, ", and the lease {} does not say otherwise", lease.display()),
            None => Ok(()),
        }
    }
}

fn failed(path: &Path, action: &'static str) -> impl FnOnce(io::Error) -> Error {
    let path = path.to_owned();
    move |source| Error::Mark { path, action, source }
}

#[cfg(test)]
mod tests {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};

    use super::*;
    use crate::lease::Id;

    const SESSION: Id = [3; 16];

    fn moved() -> State {
        State::Moved { session: SESSION, peer: "there".into() }
    }

    fn owner(vm: &str) -> Owner {
        Owner::this_process(vm).unwrap()
    }

    /// A folder with an image, and the lease of its machine elsewhere in it.
    struct Host {
        folder: tempfile::TempDir,
        image: PathBuf,
        mark: PathBuf,
    }

    impl Host {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let image = folder.path().join("second.img");
            fs::write(&image, "contents").unwrap();
            let mark = mark_path(&image);
            Self { folder, image, mark }
        }

        fn lease(&self) -> Lease {
            Lease::open(&self.folder.path().join("record"), owner("this")).unwrap()
        }

        /// Whether the image alone is refused, of whose machine nothing is known.
        fn is_refused(&self) -> bool {
            Mark::read(&self.mark).unwrap().is_some_and(|mark| mark.holds(owner("other")))
        }

        fn names(&self) -> Vec<String> {
            let names = fs::read_dir(self.folder.path()).unwrap();
            let mut names: Vec<_> =
                names.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort_unstable();
            names
        }
    }

    #[test]
    fn an_image_that_leaves_is_refused_alone_from_the_moment_its_lease_says_so() {
        let host = Host::new();
        let mut source = host.lease();
        source.claim().unwrap();
        assert!(!host.is_refused());
        let mark = source.mark(moved()).unwrap();
        assert!(!host.is_refused());
        mark.write(&host.mark).unwrap();
        assert!(!host.is_refused(), "its guest runs here still");
        source.mark_moved(&SESSION, "there").unwrap();
        assert!(host.is_refused(), "COMMIT may be on its way");
        drop(source);
        assert!(host.is_refused(), "the power was cut");
        // Somebody forces the machine without this image.
        let mut forced = host.lease();
        forced.claim_stale().unwrap();
        assert!(host.is_refused(), "what another says is nothing about this image");
        mark.keep(&host.mark).unwrap();
        drop(forced);
        fs::remove_file(host.folder.path().join("record")).unwrap();
        assert!(host.is_refused(), "the rest of its machine is gone");
        mark.remove(&host.mark).unwrap();
        assert!(host.is_refused(), "it is another by now");
        Mark { unless: None, ..mark }.remove(&host.mark).unwrap();
        assert!(!host.is_refused());
        assert_eq!(host.names(), ["second.img"]);
    }

    #[test]
    fn an_image_that_did_not_leave_is_not_refused_though_its_mark_is_still_there() {
        let host = Host::new();
        let mut source = host.lease();
        source.claim().unwrap();
        let mark = source.mark(moved()).unwrap();
        mark.write(&host.mark).unwrap();
        source.mark_moved(&SESSION, "there").unwrap();
        source.take_back(&SESSION).unwrap();
        assert!(!host.is_refused());
        source.advance().unwrap();
        source.release().unwrap();
        assert!(!host.is_refused(), "its guest has ended here");
        drop(source);
        host.lease().claim().unwrap();
        assert!(host.is_refused(), "nobody can tell any more");
    }

    #[test]
    fn an_image_that_comes_is_refused_alone_until_its_lease_says_that_it_is_here() {
        let host = Host::new();
        let mut destination = host.lease();
        let (generation, _) = destination.expect(&SESSION, false).unwrap();
        destination.mark(State::Incoming { session: SESSION }).unwrap().write(&host.mark).unwrap();
        assert!(host.is_refused());
        destination.take(&SESSION, generation, || Ok(())).unwrap();
        assert!(!host.is_refused());
        destination.expect_again(&SESSION).unwrap();
        assert!(host.is_refused());
        drop(destination);
        fs::remove_file(host.folder.path().join("record")).unwrap();
        assert!(host.is_refused(), "a lease that is gone says nothing else");
    }

    #[test]
    fn only_the_owner_of_a_lease_speaks_for_its_images() {
        let host = Host::new();
        host.lease().claim().unwrap();
        assert!(matches!(host.lease().mark(moved()), Err(Error::Moved { .. })));
    }

    #[test]
    fn a_mark_lies_beside_the_file_itself_and_is_replaced_as_a_whole() {
        let host = Host::new();
        let link = host.folder.path().join("link.img");
        std::os::unix::fs::symlink(&host.image, &link).unwrap();
        let source = &mut host.lease();
        source.claim().unwrap();
        let mark = source.mark(moved()).unwrap();
        // What a process has left that was killed while it wrote.
        fs::write(host.folder.path().join("second.img.ferry-mark.new"), "half").unwrap();
        mark.write(&mark_path(&link)).unwrap();
        assert_eq!(Mark::read(&mark_path(&host.image)).unwrap().as_ref(), Some(&mark));
        assert_eq!(host.names(), ["link.img", "record", "second.img", "second.img.ferry-mark"]);
        // It is where the image will be.
        fs::remove_file(&host.image).unwrap();
        assert_eq!(Mark::read(&mark_path(&host.image)).unwrap(), Some(mark));
        let nowhere = mark_path(&host.folder.path().join("no-folder/image"));
        assert_eq!(Mark::read(&nowhere).unwrap(), None);
    }

    #[test]
    fn writing_a_mark_follows_no_link_and_leaves_nothing_that_is_not_whole() {
        let host = Host::new();
        let mut source = host.lease();
        source.claim().unwrap();
        let mark = source.mark(moved()).unwrap();
        std::os::unix::fs::symlink(&host.image, host.folder.path().join("second.img.ferry-mark.new"))
            .unwrap();
        mark.write(&host.mark).unwrap();
        assert_eq!(fs::read_to_string(&host.image).unwrap(), "contents");
        assert_eq!(host.names(), ["record", "second.img", "second.img.ferry-mark"]);
        mark.remove(&host.mark).unwrap();
        // No name can be given where a folder is.
        fs::create_dir(&host.mark).unwrap();
        assert!(matches!(mark.write(&host.mark), Err(Error::Mark { .. })));
        assert_eq!(host.names(), ["record", "second.img", "second.img.ferry-mark"]);
    }

    #[test]
    fn an_image_whose_name_leaves_no_room_for_a_mark_has_none() {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("i".repeat(250));
        fs::write(&image, "contents").unwrap();
        assert_eq!(Mark::read(&mark_path(&image)).unwrap(), None);
    }

    /// Opening a device can do something, whatever is read from it.
    #[test]
    fn nothing_but_a_file_is_opened_for_a_mark_or_for_what_it_names() {
        let host = Host::new();
        let pipe = host.folder.path().join("pipe");
        nix::unistd::mkfifo(&pipe, nix::sys::stat::Mode::S_IRWXU).unwrap();
        // It hears that somebody was there who could have written.
        let reader = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(&pipe).unwrap();
        let mut source = host.lease();
        source.claim().unwrap();
        let mark = Mark { unless: Some(pipe.clone()), ..source.mark(moved()).unwrap() };
        assert!(mark.holds(owner("other")));
        std::os::unix::fs::symlink(&pipe, &host.mark).unwrap();
        assert!(matches!(Mark::read(&host.mark), Err(Error::DamagedMark { .. })));
        fs::remove_file(&host.mark).unwrap();
        std::os::unix::fs::symlink(host.folder.path(), &host.mark).unwrap();
        assert!(matches!(Mark::read(&host.mark), Err(Error::DamagedMark { .. })));
        let mut heard = [PollFd::new(&reader, PollFlags::IN)];
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        assert_eq!(poll(&mut heard, Some(&now)).unwrap(), 0, "somebody opened it to write: {heard:?}");
    }

    #[test]
    fn what_is_no_whole_mark_is_told_of_and_never_believed() {
        let host = Host::new();
        let mut lease = host.lease();
        lease.claim().unwrap();
        let mark = lease.mark(moved()).unwrap();
        let bytes = mark.to_bytes();
        assert_eq!(Mark::from_bytes(&bytes), Some(mark.clone()));
        for bit in 0..bytes.len() * 8 {
            let mut other = bytes.clone();
            other[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(Mark::from_bytes(&other), None, "bit {bit}");
        }
        for length in 0..bytes.len() {
            assert_eq!(Mark::from_bytes(&bytes[..length]), None, "{length} bytes");
        }
        let owned = Mark { record: Record { state: State::Owned, ..mark.record.clone() }, unless: None };
        let long = Mark { unless: Some("x".repeat(4097).into()), ..mark.clone() };
        for other in [owned.to_bytes(), long.to_bytes(), Vec::new()] {
            fs::write(&host.mark, other).unwrap();
            assert!(matches!(Mark::read(&host.mark), Err(Error::DamagedMark { .. })));
            assert!(mark.remove(&host.mark).is_err(), "it may be anybody's");
        }
        fs::remove_file(&host.mark).unwrap();
        nix::unistd::mkfifo(&host.mark, nix::sys::stat::Mode::S_IRUSR).unwrap();
        assert!(Mark::read(&host.mark).is_err(), "nobody writes there, and nobody waits for that");
        // Neither is taken for the other.
        mark.write(&host.mark).unwrap();
        assert!(matches!(Lease::open_existing(&host.mark, owner("x")), Err(Error::NotALease { .. })));
        assert_eq!(Mark::from_bytes(&fs::read(host.folder.path().join("record")).unwrap()), None);
    }
}
