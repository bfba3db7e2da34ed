//! What a controller of ours can be and QEMU's cannot.

/// The first limit of QEMU's controller that a state exceeds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QemuLimit {
    /// QEMU's device was configured otherwise.
    #[error("{what}: {here} here, {there} in QEMU's device")]
    Device {
        /// Name of the property.
        what: &'static str,
        /// In the state.
        here: u16,
        /// In QEMU's device.
        there: u16,
    },
    /// QEMU saves the controller's own namespace only.
    #[error("{count} namespaces, or one with another identifier than 1: QEMU saves the single namespace 1")]
    Namespaces {
        /// How many there are.
        count: usize,
    },
    /// QEMU's namespaces can be written.
    #[error("the namespace is read only")]
    ReadOnly,
    /// QEMU has no Write Uncorrectable.
    #[error("{count} runs of blocks are marked as uncorrectable")]
    Uncorrectable {
        /// How many.
        count: usize,
    },
    /// No format of QEMU's namespace has such blocks.
    #[error("QEMU's namespace has no format with blocks of 2^{block_shift} bytes")]
    BlockSize {
        /// log2 of the size of a block in bytes.
        block_shift: u8,
    },
    /// QEMU keeps metadata elsewhere in the image, and protection information as it is.
    #[error("the blocks have {bytes} bytes of metadata, which lie otherwise in QEMU's images")]
    Metadata {
        /// Of each block.
        bytes: u16,
    },
    /// The Changed Namespace List is not saved.
    #[error("{count} namespaces are in the Changed Namespace List")]
    ChangedNamespaces {
        /// How many.
        count: usize,
    },
    /// QEMU's CAP.CQR is 1.
    #[error("queues need not be contiguous (CAP.CQR is 0)")]
    Pieces,
    /// A queue that is not contiguous.
    #[error("queue {id} is not contiguous")]
    QueueInPieces {
        /// Its identifier.
        id: u16,
    },
    /// Priorities of submission queues are not saved.
    #[error("submission queue {id} has priority {priority}")]
    Priority {
        /// Its identifier.
        id: u16,
        /// Its priority class.
        priority: u8,
    },
    /// Commands that were aborted before they were fetched would be executed.
    #[error("submission queue {id} holds {count} aborted commands")]
    Aborted {
        /// Its identifier.
        id: u16,
        /// How many.
        count: usize,
    },
    /// Completions that wait for room do not say of which submission queue they are.
    #[error("{count} completions wait for room in completion queue {id}")]
    Backlog {
        /// Its identifier.
        id: u16,
        /// How many.
        count: usize,
    },
    /// A feature that QEMU's guest cannot set, or that is not saved.
    #[error("the guest has set feature {feature:#x}, {name}")]
    Feature {
        /// Feature identifier.
        feature: u8,
        /// Its name.
        name: &'static str,
    },
    /// QEMU's CAP.AMS is 0.
    #[error("submission queues are served by weight (CC.AMS is {ams})")]
    Arbitration {
        /// The mechanism that the guest has chosen.
        ams: u32,
    },
    /// That the interrupt pin is asserted is not in this section alone.
    #[error("{count} completion queues hold entries for a guest that is called by the interrupt pin")]
    PinInterrupt {
        /// How many.
        count: i32,
    },
    /// QEMU's error log is empty.
    #[error("{count} errors were logged")]
    ErrorLog {
        /// How many.
        count: u64,
    },
    /// More Asynchronous Event Requests than QEMU's device takes.
    #[error("{count} Asynchronous Event Requests are outstanding, QEMU's device takes {most}")]
    ParkedRequests {
        /// How many there are.
        count: usize,
        /// Its property `aerl` plus one.
        most: usize,
    },
    /// QEMU knows no subsystem reset and could not clear the bit.
    #[error("CSTS.NSSRO is set")]
    SubsystemReset,
    /// A timestamp of 0 is none in QEMU.
    #[error("the guest has set the timestamp to 0 this very millisecond")]
    ZeroTimestamp,
    /// Something that QEMU's controller does not have.
    #[error("the state has {what}, of which QEMU has none")]
    Part {
        /// What it is.
        what: &'static str,
    },
    /// The state's configuration space has not the capabilities of this build.
    #[error("the configuration space has no capability {id:#x}")]
    Capability {
        /// Capability identifier.
        id: u8,
    },
}
