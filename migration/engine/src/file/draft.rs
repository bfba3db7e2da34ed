//! A file that appears under its name when it is whole, or not at all.

use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use nix::libc;
use rustix::fs::{AtFlags, CWD, RenameFlags, linkat, renameat_with};

use crate::Error;
use crate::folder::{folder_of, sync_folder_of};
use crate::lease::{Record, State, random_id, show_id};

/// A file without a name, so that the kernel removes it with the process, however that ends: it holds guest memory. Where the
/// file system knows no such files it has a name that nobody looks for, and is removed when it is dropped.
pub(super) struct Draft {
    pub file: File,
    name: Option<PathBuf>,
    path: PathBuf,
}

/// A whole file under its name. It may be the only copy of the guest: it stays unless it is removed in so many words.
#[derive(Debug)]
pub(crate) struct Published {
    path: PathBuf,
    pub digest: u64,
}

impl Published {
    /// Whether the guest is in this file, by the lease.
    pub fn is_said_by(&self, record: &Record) -> bool {
        record.state == State::InFile { digest: self.digest }
    }

    /// The guest is elsewhere, and nobody can restore this.
    pub fn remove(self) {
        if let Err(source) = fs::remove_file(&self.path) {
            let path = self.path.display().to_string();
            log::warn!("{}", Error::File { doing: "remove", path, source: source.into() }.chain());
        }
    }
}

impl fmt::Display for Published {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.path.display().fmt(f)
    }
}

impl Draft {
    pub fn create(path: &Path) -> Result<Self, Error> {
        let failed = |doing| {
            let path = path.display().to_string();
            move |source: io::Error| Error::File { doing, path, source: source.into() }
        };
        // Not over anything: it may be one of the guest's images, or the only copy of another guest.
        if fs::symlink_metadata(path).is_ok() {
            return Err(failed("write over")(io::ErrorKind::AlreadyExists.into()));
        }
        if let Some(file) = Self::nameless(folder_of(path)) {
            return Ok(Self { file, name: None, path: path.to_owned() });
        }
        let id = random_id().map_err(failed("name a draft of"))?;
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(format!(".{}.draft", show_id(&id)));
        let name = path.with_file_name(name);
        let mut options = OpenOptions::new();
        let file = options.write(true).create_new(true).mode(0o600).open(&name).map_err(failed("create"))?;
        Ok(Self { file, name: Some(name), path: path.to_owned() })
    }

    /// The name that it will have.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whatever is wrong, it shows again when a file with a name is made.
    fn nameless(folder: &Path) -> Option<File> {
        let mut options = OpenOptions::new();
        let file = options.write(true).custom_flags(libc::O_TMPFILE).mode(0o600).open(folder).ok()?;
        fs::symlink_metadata(descriptor_path(&file)).is_ok().then_some(file)
    }

    /// Gives the file its name.
    pub fn publish(mut self, digest: u64) -> Result<Published, Error> {
        let named = match &self.name {
            Some(name) => renameat_with(CWD, name, CWD, &self.path, RenameFlags::NOREPLACE),
            None => linkat(CWD, descriptor_path(&self.file), CWD, &self.path, AtFlags::SYMLINK_FOLLOW),
        };
        named.map_err(|errno| self.failed("give its name to")(errno.into()))?;
        self.name = None;
        let synced = sync_folder_of(&self.path);
        if let Err(source) = synced {
            // The lease does not know it: it is not the guest.
            Published { path: self.path.clone(), digest }.remove();
            return Err(self.failed("sync the folder of")(source));
        }
        Ok(Published { path: self.path.clone(), digest })
    }

    pub fn failed(&self, doing: &'static str) -> impl Fn(io::Error) -> Error + use<> {
        let path = self.path.display().to_string();
        move |source| Error::File { doing, path: path.clone(), source: source.into() }
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        if let Some(name) = &self.name {
            let _gone_already = fs::remove_file(name);
        }
    }
}

/// Where a file that has no name can be found.
fn descriptor_path(file: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()))
}
