//! What can go wrong when a controller is built, paused or restored. Guest mistakes are not errors of this crate: they are
//! answered with NVMe status codes.

/// An error of this crate.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A configuration value that no controller can have.
    #[error("NVMe controller {serial:?}: {what} is {value}, which is not {allowed}")]
    Config {
        /// Serial number of the controller.
        serial: String,
        /// Name of the value.
        what: &'static str,
        /// Its value.
        value: u64,
        /// What would be accepted.
        allowed: &'static str,
    },
    /// The serial number is empty, too long or not printable ASCII.
    #[error("NVMe serial number {serial:?} is not 1 to 20 printable ASCII characters")]
    Serial {
        /// The serial number.
        serial: String,
    },
    /// A namespace that cannot be.
    #[error("NVMe namespace {nsid}: {reason}")]
    Namespace {
        /// Namespace identifier.
        nsid: u32,
        /// What is wrong.
        reason: String,
    },
    /// The image of a created namespace cannot be used.
    #[error("NVMe namespace {nsid}, which the guest has created: its image cannot be used")]
    NamespaceImage {
        /// Namespace identifier.
        nsid: u32,
        /// Why.
        source: crate::StoreError,
    },
    /// The image of a namespace cannot be grown.
    #[error("NVMe namespace {nsid}: its image cannot be grown")]
    Resize {
        /// Namespace identifier.
        nsid: u32,
        /// Why.
        source: block::Error,
    },
    /// The store of a subsystem failed.
    #[error("NVM subsystem {serial:?}: cannot {what}")]
    Store {
        /// Serial number of the subsystem.
        serial: String,
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: crate::StoreError,
    },
    /// A controller that cannot be in a subsystem.
    #[error(
        "NVM subsystem {serial:?}: controller {id} cannot join: another is there and nothing is shared, or there were too many"
    )]
    ControllerId {
        /// Serial number of the subsystem.
        serial: String,
        /// Controller identifier.
        id: u16,
    },
    /// A controller memory buffer that no controller can have.
    #[error(
        "a controller memory buffer of {length_bytes} bytes cannot be added to guest memory: its size must be a power of two from 4096 to \
         2147483648, and there can be one"
    )]
    Buffer {
        /// Its size.
        length_bytes: u64,
    },
    /// A persistent memory region that no controller can have.
    #[error(
        "a persistent memory region of {length_bytes} bytes cannot be added to guest memory: its size must be a power of two from 4096 to \
         2147483648, and there can be one"
    )]
    Region {
        /// Its size.
        length_bytes: u64,
    },
    /// There is no access to set.
    #[error(
        "NVM subsystem {serial:?}: no controller {controller} with an access group {group} to choose the way by"
    )]
    Access {
        /// Serial number of the subsystem.
        serial: String,
        /// Controller identifier.
        controller: u16,
        /// ANA group identifier.
        group: u32,
    },
    /// The PCI function could not be built.
    #[error("the PCI function of the NVMe controller cannot be built")]
    Pci(#[source] pci::Error),
    /// In-flight commands did not finish in time.
    #[error("{in_flight} NVMe commands were still in flight when the time to pause was over")]
    PauseTimeout {
        /// Commands that the backends have not finished.
        in_flight: u32,
    },
    /// A saved state that this controller cannot take.
    #[error("saved NVMe state: {field} is {value}: {reason}")]
    State {
        /// Path of the field, for example `sq[3].head`.
        field: String,
        /// Its value.
        value: u64,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A state was to be loaded into a controller that is in use.
    #[error("a saved NVMe state can only be loaded into a controller that nobody has used")]
    NotPristine,
    /// The saved PCI state does not fit.
    #[error("saved NVMe state: the PCI part cannot be restored")]
    PciState(#[source] pci::Error),
    /// Bytes that are not the section of such a QEMU device, or have a field that is beyond any controller of ours.
    #[error("QEMU's NVMe section cannot be read")]
    QemuBytes(#[source] vmstate::Error),
    /// A QEMU section that this controller cannot go on with.
    #[error("QEMU's NVMe section: {field} is {value}: {reason}")]
    QemuSection {
        /// Path of the field, for example `sq[3].head`.
        field: String,
        /// Its value.
        value: u64,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// A state that QEMU's controller cannot have.
    #[error("this NVMe controller cannot go on in QEMU")]
    BeyondQemu(#[source] crate::qemu::QemuLimit),
}
