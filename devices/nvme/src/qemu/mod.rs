//! A controller of QEMU 11.1 is one of ours, and the other way round.
//!
//! ```text
//! bytes --QemuSection::from_bytes--> QemuSection --split--> NvmeState + QemuResidue
//!                                                               | Controller::load: the checks that every state gets
//!                                                           Controller, which runs and is paused
//!                                                               | Controller::save
//! bytes <--QemuSection::to_bytes---- QemuSection <--join--- NvmeState + QemuResidue
//! ```
//!
//! [`Controller::load_qemu`] and [`Controller::save_qemu`] are the two ways in one call each. A section that nobody ran in between
//! comes back byte for byte. What [`NvmeState`] models is never remembered beside it: [`QemuResidue`] says what is, and why. On the way
//! back, [`QemuLimit`] says what a controller of ours can be and QEMU's cannot.
//!
//! # What the guest notices
//!
//! Registers, queues, doorbells (shadow doorbells too), the MSI-X table and its place in the BAR, the capabilities of configuration
//! space and their offsets, parked requests, events and the features that a guest can set go on as they were. Different is what a
//! controller says of itself, and a driver that has read it before believes the old:
//!
//! - Directives, namespace management and attachment, and Copy with descriptors that name a namespace, which QEMU offers, are refused here.
//! - **Pin interrupts** go on, but not one that the guest has still to take: QEMU says in other sections too that the pin is asserted. Such
//!   a section is refused, and so is such a state on the way back.
//! - The namespace's NGUID, EUI-64 and UUID are made from the serial number here, and QEMU's are not in its section. Linux compares them when
//!   it scans again, and then drops a namespace that seems to be another.
//! - CAP.TO, CAP.NSSRS, CAP.CRMS and VS, when they are read again. What limits the guest's requests (MQES, CQR, the doorbell stride,
//!   page sizes, command sets) is compared instead, and must be the same.
//! - Identify Controller: model, firmware, NQN, optional commands and logs.
//! - Configuration space: revision and subsystem identifiers; no function level reset, no link.
//! - The temperature; and the SMART counters and persistent events, which QEMU does not save either: they begin again with each process.
//!
//! # Speed
//!
//! Medians of one run of `chrt -f 20 cargo bench -p nvme --bench state -- --verbose` on the reference host with its other
//! core in use, for QEMU's own section of 22,458 bytes with 65 slots and two queue pairs. I/O contexts and images exist before and are not measured.
//!
//! | | microseconds |
//! | --- | --- |
//! | bytes to a checked controller with its queues, which [`Controller::new`] has built before | 9.1 |
//! | the same and [`Controller::new`] | 22 |
//! | of which: bytes to [`QemuSection`] | 2.1 |
//! | controller to bytes | 4.1 |

mod configuration;
mod join;
mod limit;
mod residue;
mod section;
mod split;

pub use limit::QemuLimit;
pub use residue::QemuResidue;
pub use section::QemuSection;

use nvme_spec::regs::Cap;

use crate::config::ControllerConfig;
use crate::controller::Controller;
use crate::{Error, NvmeState};

/// What QEMU keeps as properties of the device and not in its section. Source and destination must be configured alike.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct QemuDevice {
    /// I/O queue pairs.
    pub max_ioqpairs: u16,
    /// MSI-X vectors.
    pub msix_qsize: u16,
    /// Asynchronous Event Requests that can be outstanding, less one.
    pub aerl: u8,
}

impl QemuDevice {
    /// The QEMU device of the same shape as a controller of ours, all else at its defaults.
    #[must_use]
    pub fn of(config: &ControllerConfig) -> Self {
        Self { max_ioqpairs: config.queue_pairs, msix_qsize: config.vectors, aerl: 3 }
    }

    /// A slot for each queue, the admin queue included.
    fn slots(&self) -> usize {
        usize::from(self.max_ioqpairs) + 1
    }

    fn msix_bytes(&self) -> usize {
        let vectors = usize::from(self.msix_qsize);
        vectors * 16 + vectors.div_ceil(8)
    }

    fn msix_qsize(&self) -> u32 {
        self.msix_qsize.into()
    }

    fn max_ioqpairs(&self) -> u32 {
        self.max_ioqpairs.into()
    }
}

impl QemuSection {
    /// Reads the payload of a section: what lies between its header and its footer.
    ///
    /// # Errors
    /// [`Error::QemuBytes`]: it is not that of such a device, or a field has a value that no controller of ours can go on with.
    pub fn from_bytes(payload: &[u8], device: &QemuDevice) -> Result<Self, Error> {
        vmstate::from_bytes_with(payload, <Self as vmstate::VmState>::VERSION, device)
            .map_err(Error::QemuBytes)
    }

    /// The controller that can go on with this section, which has the serial number that QEMU's device has; MDTS, like it, is not
    /// in the section and at its default, which is QEMU's too.
    #[must_use]
    pub fn controller_config(&self, serial: &str) -> ControllerConfig {
        let cap = Cap(self.bar.cap);
        ControllerConfig {
            // Equal to those of the `QemuDevice` that it was read with.
            queue_pairs: self.conf_ioqpairs as u16,
            vectors: self.conf_msix_qsize as u16,
            // 0's based, of 16 bits.
            queue_entries: cap.mqes() as u32 + 1,
            contiguous_queues: cap.cqr() == 1,
            ..ControllerConfig::new(serial)
        }
    }

    /// The payload of the section.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        vmstate::to_bytes(self)
    }
}

impl Controller {
    /// [`QemuSection::split`] and [`Controller::load`] in one, with the section's names in the errors. The controller must be as
    /// [`Controller::new`] made it, and is paused afterwards. `clock_ms` is QEMU's virtual clock: the field `cpu_clock_offset`
    /// of the section `timer` in the same stream, which is in nanoseconds.
    ///
    /// # Errors
    /// [`Error::QemuSection`] and [`Error::NotPristine`]; the controller is then not usable.
    pub fn load_qemu(&self, section: QemuSection, clock_ms: u64) -> Result<QemuResidue, Error> {
        let (state, residue) = section.split(self.save(), clock_ms)?;
        self.load(&state).map_err(split::in_terms_of_the_section)?;
        Ok(residue)
    }

    /// [`Controller::save`] and [`QemuSection::join`] in one. The controller is paused; `clock_ms` is what QEMU's virtual clock says
    /// when it goes on there.
    ///
    /// # Errors
    /// [`Error::BeyondQemu`].
    pub fn save_qemu(
        &self,
        residue: &QemuResidue,
        device: &QemuDevice,
        clock_ms: u64,
    ) -> Result<QemuSection, Error> {
        QemuSection::join(&self.save(), residue, device, clock_ms)
    }
}

/// The refusal of a section for `field`.
fn refuse<T>(field: impl Into<String>, value: impl Into<u64>, reason: &'static str) -> Result<T, Error> {
    Err(Error::QemuSection { field: field.into(), value: value.into(), reason })
}

/// Whether entries wait for a guest that is called by the pin: MSI-X is off. QEMU keeps that in `irq_status` and, while nothing masks it,
/// in the levels of its PCI bus.
fn awaits_pin(state: &NvmeState) -> Result<bool, Error> {
    Ok(pending_queues(state) != 0 && !configuration::sends_messages(&state.pci)?)
}

/// QEMU counts the completion queues that may raise the interrupt pin and hold entries that the guest has not taken.
fn pending_queues(state: &NvmeState) -> i32 {
    state.cq.present().filter(|(_, cq)| cq.interrupts && cq.head != cq.tail).count() as i32
}
