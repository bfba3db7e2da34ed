//! Who may run the guest: where the lease record lies, and what becomes of it at the start and the end.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;

use anyhow::{Context, ensure};
use engine::lease::{Error, Lease, Owner, Record, State};

use super::Despite;
use crate::config::MachineSpec;
use crate::machine::first_writable_file;

/// Opens the record that decides who owns the guest of `spec`, without claiming anything: the one that was named, or
/// `<first writable image>.ferry-lease`, or `ferry-lease` in the first folder of a subsystem. `None`: a machine that writes no file and names no record.
///
/// # Errors
/// The record cannot be opened or made, or lies beside a block device.
pub fn open_lease(spec: &MachineSpec) -> anyhow::Result<Option<Lease>> {
    let Some(path) = lease_path(spec)? else { return Ok(None) };
    Ok(Some(Lease::open(&path, owner(spec)?)?))
}

/// As [`open_lease`], for a guest that arrives: its record is there already, and a wrong path makes no new one.
///
/// # Errors
/// As [`open_lease`], or there is no such record.
pub fn open_existing_lease(spec: &MachineSpec) -> anyhow::Result<Option<Lease>> {
    let Some(path) = lease_path(spec)? else { return Ok(None) };
    let lease = Lease::open_existing(&path, owner(spec)?).map_err(|error| match &error {
        Error::Io { source, .. } if source.kind() == ErrorKind::NotFound => {
            let help = match &spec.lease {
                Some(_) => "the lease of a guest that arrives, or is restored, is the one that it had",
                None => {
                    "the images of a guest that arrives, or is restored, have its lease beside them, and these have none. (A guest brings \
                     images along only if both sides say --with-storage; a copy of a snapshot gets new ones with --clone)"
                }
            };
            anyhow::Error::new(error).context(help)
        }
        _ => error.into(),
    })?;
    Ok(Some(lease))
}

/// Why no operator may say where the guest of `spec` is, if so: there is a record, which alone decides.
#[must_use]
pub fn decides_alone(spec: &MachineSpec) -> Option<String> {
    if let Some((path, record)) = record(spec) {
        if matches!(record.state, State::Moved { .. }) {
            // It is this end's alone.
            return None;
        }
        return Some(format!("the lease {} decides alone, and says {record}", path.display()));
    }
    let path = lease_path(spec).ok()??;
    Some(format!("the lease {} decides alone, and cannot be read just now", path.display()))
}

/// The record of a machine that writes no image of the host's, in its folder.
const LEASE_IN_FOLDER: &str = "ferry-lease";

/// Who this process is in the record of `spec`.
///
/// # Errors
/// The kernel has no randomness.
pub fn owner(spec: &MachineSpec) -> anyhow::Result<Owner> {
    Owner::this_process(&spec.name).context("cannot name this process in the lease record")
}

/// What the record of `spec` says, and where it is, if there is one. Makes no file, and needs no lease: a migration may have it.
#[must_use]
pub fn record(spec: &MachineSpec) -> Option<(PathBuf, Record)> {
    let lease = open_existing_lease(spec).ok()??;
    let record = lease.read().ok()??;
    Some((lease.path().to_owned(), record))
}

/// Refuses early what [`claim`] would refuse, without touching an image: who starts a machine that is in use, or on its way
/// between two processes, disturbs nobody.
///
/// # Errors
/// A living process owns the guest, or a file holds it, or it went elsewhere, and `despite` does not give that up; or its images are not
/// all here.
pub fn check(spec: &MachineSpec, despite: Despite) -> anyhow::Result<()> {
    // A record that cannot be opened is told of by `open_lease`.
    let Ok(Some(lease)) = open_existing_lease(spec) else { return Ok(()) };
    match lease.check_claim() {
        Err(Error::Suspended { .. }) if despite.discard_suspended => Ok(()),
        Err(Error::WithoutGuest { record, .. })
            if despite.force_stale && matches!(record.state, State::Moved { .. }) =>
        {
            Ok(())
        }
        result => result.map_err(explain),
    }
}

/// Makes this process the owner of the guest, for a start from the beginning.
///
/// # Errors
/// As [`check`], or the record cannot be written.
pub fn claim(lease: &mut Lease, despite: Despite) -> anyhow::Result<()> {
    let claimed = match despite {
        Despite { discard_suspended: true, .. } => lease.claim_anew(),
        Despite { force_stale: true, .. } => lease.claim_stale(),
        Despite { .. } => lease.claim(),
    };
    claimed.map(drop).map_err(explain)
}

fn explain(error: Error) -> anyhow::Error {
    let help = match &error {
        Error::Held { record, .. } => format!("the guest of this disk belongs to {}", record.owner),
        Error::Suspended { .. } => {
            "restore it with --incoming file:PATH, or give it up with --discard-suspended".to_owned()
        }
        Error::WithoutGuest { record, .. } => match &record.state {
            State::Moved { peer, .. } => format!(
                "the guest of these images has gone to {peer} with all it had: run it there. Only if it never arrived, what is there \
                 still says incoming, and no process there waits for it any more, run what is here with --force-stale"
            ),
            _ => "these images never came whole: let the guest come again with --overwrite, or remove them (what they were to replace may \
                  stand beside as PATH.given-up)"
                .to_owned(),
        },
        _ => return error.into(),
    };
    anyhow::Error::new(error).context(help)
}

/// Whether the owner that the record of `spec` names ran the guest and is gone without a word, as far as can be told.
#[must_use]
pub fn is_orphaned(spec: &MachineSpec) -> bool {
    let Ok(Some(lease)) = open_existing_lease(spec) else { return false };
    lease.is_orphaned().unwrap_or(false)
}

/// Whether a record decides who owns the guest of `spec`.
///
/// # Errors
/// It would lie beside a block device.
pub fn has_lease(spec: &MachineSpec) -> anyhow::Result<bool> {
    Ok(lease_path(spec)?.is_some())
}

/// Where the record of `spec` is, if it has one.
///
/// # Errors
/// It would lie beside a block device.
pub fn lease_path(spec: &MachineSpec) -> anyhow::Result<Option<PathBuf>> {
    if let Some(path) = &spec.lease {
        return Ok(Some(path.clone()));
    }
    let Some(image) = first_writable_file(&spec.controllers) else {
        let folder = spec.controllers.iter().find_map(|controller| controller.subsystem.as_ref());
        return Ok(folder.map(|folder| folder.directory.join(LEASE_IN_FOLDER)));
    };
    let is_block_device =
        std::fs::metadata(image).is_ok_and(|metadata| metadata.file_type().is_block_device());
    ensure!(
        !is_block_device,
        "{} is a block device: say with --lease PATH where the record is kept that decides who owns the guest",
        image.display()
    );
    let mut name = OsString::from(image);
    name.push(".ferry-lease");
    Ok(Some(name.into()))
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::cli::{Arguments, Command};
    use clap::Parser;

    fn spec(flags: &[&str]) -> MachineSpec {
        let line = ["ferry", "run", "--kernel", "vmlinux"].iter().chain(flags);
        let Command::Run(arguments) = Arguments::parse_from(line).command else { panic!("it is run") };
        arguments.machine().unwrap()
    }

    #[test]
    fn the_record_lies_beside_the_first_writable_image_unless_it_is_named() {
        assert_eq!(lease_path(&spec(&[])).unwrap(), None);
        let disks = ["--nvme", "path=a.raw,serial=a,ro", "--nvme", "path=b.raw,serial=b"];
        assert_eq!(lease_path(&spec(&disks)).unwrap(), Some("b.raw.ferry-lease".into()));
        let folder = spec(&["--nvme", "path=a.raw,serial=a,ro", "--nvme", "serial=b,subsystem=d"]);
        assert_eq!(lease_path(&folder).unwrap(), Some("d/ferry-lease".into()));
        let named = spec(&[&disks[..], &["--lease", "record"]].concat());
        assert_eq!(lease_path(&named).unwrap(), Some("record".into()));
    }

    /// A node of a block device, which is looked at and never opened: one of this host's, or one made in `folder`.
    pub(crate) fn block_device(folder: &std::path::Path) -> PathBuf {
        use rustix::fs::{CWD, FileType, Mode, makedev, mknodat};

        let nodes = std::fs::read_dir("/dev").unwrap().map(|entry| entry.unwrap());
        let is_one = |entry: &std::fs::DirEntry| entry.file_type().is_ok_and(|kind| kind.is_block_device());
        nodes.into_iter().find(is_one).map(|entry| entry.path()).unwrap_or_else(|| {
            let node = folder.join("loop0");
            mknodat(CWD, &node, FileType::BlockDevice, Mode::RUSR, makedev(7, 0))
                .expect("a host without block devices lets root make one");
            node
        })
    }

    #[test]
    fn beside_a_block_device_there_is_no_place_for_the_record() {
        let folder = tempfile::tempdir().unwrap();
        let device = block_device(folder.path());
        let disk = format!("path={},serial=a", device.display());
        let error = lease_path(&spec(&["--nvme", &disk])).unwrap_err().to_string();
        assert!(error.contains("--lease PATH") && error.contains(&*device.to_string_lossy()), "{error}");
        let named = spec(&["--nvme", &disk, "--lease", "record"]);
        assert_eq!(lease_path(&named).unwrap(), Some("record".into()));
        let read_only = spec(&["--nvme", &format!("{disk},ro")]);
        assert_eq!(lease_path(&read_only).unwrap(), None, "what is only read needs no owner");
    }

    #[test]
    fn a_machine_without_images_has_no_record() {
        let disks = ["--nvme", "serial=a", "--ns", "controller=a,nsid=1,backend=memory,size=1M"];
        assert!(open_lease(&spec(&disks)).unwrap().is_none());
    }
}
