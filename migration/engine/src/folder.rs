//! The folder that a file's name is in, which has to be made stable for the name to outlive the power.

use std::fs::File;
use std::io;
use std::path::Path;

/// The folder that the name of `path` is in.
#[must_use]
pub fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(folder) if !folder.as_os_str().is_empty() => folder,
        _ => Path::new("."),
    }
}

/// Makes stable that there is a file of the name `path`, or that there is none any more.
///
/// # Errors
/// The folder cannot be opened, or not be written.
pub fn sync_folder_of(path: &Path) -> io::Result<()> {
    File::open(folder_of(path))?.sync_all()
}
