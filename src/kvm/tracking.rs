//! How KVM tells which pages vCPUs write: decided when a VM is made, since KVM knows only one way for each VM.
//!
//! Measured on the reference host, one vCPU, medians in microseconds; neither costs a guest anything that is not migrated (the same passes
//! over 16,384 pages took 0.6-0.7 s with either):
//!
//! | | log, 1 GiB | ring, 1 GiB | log, 8 GiB | ring, 8 GiB |
//! | --- | --- | --- | --- | --- |
//! | begin | 2,500 | 140-5,500 | 41,000-56,000 | 3,300-8,200 |
//! | collect 256 pages | 51 | 53 | 391 | 325 |
//! | collect 16,384 pages | 209 | 516 | 574 | 878 |
//! | collect 60,000 pages | 620 | 1,339 | 1,034 | 1,811 |
//! | last, stopped, 256 pages | 40 | 31 | 355 | 243 |
//!
//! All of it with what this process wrote, whose bitmap was then looked at word by word. Now it is taken in the time of what is in it
//! (crate `dirty_bitmap`), which brought the whole last pass of a guest of 8 GiB from 0.8 to 0.4 ms, with the log.
//!
//! The log takes half the time for a busy guest, and its beginning is in pieces between which the guest gets on; a ring saves a tenth of a
//! millisecond of downtime in 8 GiB, and can be overrun by a guest that KVM interprets. So the log is what is chosen.

use std::fmt;

use kvm_bindings as kvm;
use kvm_ioctls::VmFd;

use super::Error;
use super::dirty_ring::DirtyRings;

/// Entries of a dirty ring, if KVM allows as many: 1 MiB for each vCPU from its start. A vCPU that writes to more pages (256 MiB) between
/// two looks makes room itself.
const RING_ENTRIES: u32 = 64 << 10;
/// Bytes of an entry.
const ENTRY_BYTES: u32 = size_of::<kvm::kvm_dirty_gfn>() as u32;

/// How dirty pages are to be found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum DirtyTracking {
    /// By the log, where KVM lets it be cleared in parts; otherwise by rings.
    #[default]
    Auto,
    /// By a bitmap for each memory slot.
    Log,
    /// By a list of pages for each vCPU.
    Ring,
}

impl fmt::Display for DirtyTracking {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Log => "log",
            Self::Ring => "ring",
        })
    }
}

/// How dirty pages are found.
#[derive(Debug)]
pub(super) enum Tracking {
    /// The log, with manual protection.
    Log {
        /// Whether it starts with every page dirty, so that nothing is write-protected when it is switched on.
        starts_full: bool,
    },
    /// Rings.
    Ring(DirtyRings),
}

impl Tracking {
    /// Switches on what is `wanted` and there, before the first vCPU is made.
    pub(super) fn enable(fd: &VmFd, wanted: DirtyTracking, ring_entries: Option<u32>) -> Result<Self, Error> {
        let log = || Self::enable_log(fd);
        let ring = || Self::enable_ring(fd, ring_entries.unwrap_or(RING_ENTRIES));
        let found = match wanted {
            DirtyTracking::Auto => match log()? {
                Some(found) => Some(found),
                None => ring()?,
            },
            DirtyTracking::Log => log()?,
            DirtyTracking::Ring => ring()?,
        };
        found.ok_or_else(|| {
            let (log, ring) = ("KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2", "KVM_CAP_DIRTY_LOG_RING");
            let missing = match wanted {
                DirtyTracking::Auto => format!("{log} or {ring}"),
                DirtyTracking::Log => format!("{log}, for --dirty-tracking {wanted}"),
                DirtyTracking::Ring => format!("{ring}, for --dirty-tracking {wanted}"),
            };
            Error::MissingCapabilities { path: "/dev/kvm".into(), missing }
        })
    }

    fn enable_log(fd: &VmFd) -> Result<Option<Self>, Error> {
        let offered = fd.check_extension_raw(kvm::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into());
        let wanted = kvm::KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE | kvm::KVM_DIRTY_LOG_INITIALLY_SET;
        let flags = u32::try_from(offered).unwrap_or(0) & wanted;
        if flags & kvm::KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE == 0 {
            return Ok(None);
        }
        let what = format!("enable manual dirty log protection ({flags:#x})");
        enable(fd, kvm::KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, flags, what)?;
        Ok(Some(Self::Log { starts_full: flags & kvm::KVM_DIRTY_LOG_INITIALLY_SET != 0 }))
    }

    /// Manual protection must stay off with rings: a log that starts full protects nothing, and no entry would ever be made.
    fn enable_ring(fd: &VmFd, entries: u32) -> Result<Option<Self>, Error> {
        // The second is the name of the same on hosts whose memory is ordered less strictly, and of newer ones with x86's.
        for capability in [kvm::KVM_CAP_DIRTY_LOG_RING, kvm::KVM_CAP_DIRTY_LOG_RING_ACQ_REL] {
            let most_bytes = u32::try_from(fd.check_extension_raw(capability.into())).unwrap_or(0);
            if most_bytes >= ENTRY_BYTES {
                let bytes = most_bytes.min(entries * ENTRY_BYTES);
                enable(fd, capability, bytes, format!("enable dirty rings of {bytes} bytes"))?;
                return Ok(Some(Self::Ring(DirtyRings::new(bytes / ENTRY_BYTES))));
            }
        }
        Ok(None)
    }
}

fn enable(fd: &VmFd, cap: u32, argument: u32, what: String) -> Result<(), Error> {
    let request = kvm::kvm_enable_cap { cap, args: [argument.into(), 0, 0, 0], ..Default::default() };
    fd.enable_cap(&request).map_err(Error::call(what))
}
