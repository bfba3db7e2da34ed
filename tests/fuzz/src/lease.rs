//! The lease file: whatever is in it, opening and reading it ends well.

use std::fs;
use std::path::PathBuf;

use engine::lease::{Lease, Owner};
use tempfile::TempDir;

thread_local! {
    static FOLDER: TempDir = folder();
}

/// In memory where that can be had: every change of a lease is synced, and nothing here survives anyway.
fn folder() -> TempDir {
    let in_memory = tempfile::tempdir_in("/dev/shm");
    in_memory.or_else(|_| tempfile::tempdir()).expect("a folder for lease files can be made")
}

fn path() -> PathBuf {
    FOLDER.with(|folder| folder.path().join("lease"))
}

fn owner() -> Owner {
    Owner { id: [7; 16], host: "host".into(), pid: 1, vm: "vm".into(), since_unix_seconds: 1_794_000_000 }
}

/// Reads and claims a lease file with these bytes.
///
/// # Panics
///
/// If the bytes cannot be put into a file, or the record that was written cannot be read.
pub fn lease(bytes: &[u8]) {
    let path = path();
    fs::write(&path, bytes).expect("the lease file can be written");
    let Ok(mut lease) = Lease::open_existing(&path, owner()) else { return };
    if let Ok(Some(record)) = lease.read() {
        assert!(!record.to_string().is_empty());
    }
    if let Ok((generation, _)) = lease.claim() {
        let record = lease.read().expect("it was written").expect("it was claimed");
        assert_eq!((record.generation, record.owner), (generation, owner()));
    }
}

/// Lease files as they come to be.
///
/// # Panics
///
/// If no lease can be made.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let path = path();
    let mut seeds = vec![Vec::new()];
    let _there_may_be_none = fs::remove_file(&path);
    let mut lease = Lease::open(&path, owner()).expect("a lease can be made");
    let mut keep = || seeds.push(fs::read(&path).expect("the lease can be read"));
    keep();
    lease.claim().expect("nobody has it");
    keep();
    lease.offer(&[5; 16], "unix:/x").expect("it is ours");
    keep();
    lease.settle(&[5; 16]).expect("nobody took it");
    keep();
    lease.release().expect("it is ours");
    keep();
    seeds
}
