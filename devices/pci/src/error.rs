//! What can go wrong when functions are built, placed and restored. Nothing a running guest does ends here.

/// An error of this crate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A BAR that PCI cannot express: index, size or kind.
    #[error("BAR {bar} of {length_bytes:#x} bytes cannot be added: {reason}")]
    BadBar {
        /// Index of the BAR, 0 to 5.
        bar: u8,
        /// Its size in bytes.
        length_bytes: u64,
        /// What is wrong.
        reason: &'static str,
    },
    /// The 192 bytes for capabilities are used up, or the capability is empty.
    #[error(
        "capability {id:#x} of {length_bytes} bytes does not fit into configuration space at {offset:#x}"
    )]
    NoRoomForCapability {
        /// Capability id.
        id: u8,
        /// Its length in bytes.
        length_bytes: usize,
        /// Where it would begin.
        offset: usize,
    },
    /// The MSI-X table or the pending bits are not where they can be.
    #[error(
        "MSI-X with {vectors} vectors in BAR {bar} (table at {table_offset:#x}, pending bits at {pending_offset:#x}): {reason}"
    )]
    BadMsix {
        /// Number of vectors.
        vectors: u16,
        /// The BAR that holds both.
        bar: u8,
        /// Offset of the table in it.
        table_offset: u32,
        /// Offset of the pending bits in it.
        pending_offset: u32,
        /// What is wrong.
        reason: &'static str,
    },
    /// An endpoint was asked for without an MSI-X capability in its configuration space.
    #[error("the configuration space has no MSI-X capability")]
    NoMsix,
    /// The slot does not exist or is taken.
    #[error("PCI slot {slot} cannot be used: {reason}")]
    BadSlot {
        /// Slot (device) number.
        slot: u8,
        /// What is wrong.
        reason: &'static str,
    },
    /// BAR assignment ran out of addresses.
    #[error(
        "BAR {bar} of slot {slot} ({length_bytes:#x} bytes) does not fit into the window at {window_start:#x} ({window_length_bytes:#x} bytes)"
    )]
    WindowFull {
        /// Slot number.
        slot: u8,
        /// BAR index.
        bar: u8,
        /// Size of the BAR in bytes.
        length_bytes: u64,
        /// First address of the window.
        window_start: u64,
        /// Length of the window in bytes.
        window_length_bytes: u64,
    },
    /// A saved configuration space differs in bits that the guest cannot write: another device or another shape.
    #[error(
        "saved configuration space differs at offset {offset:#x}: saved {saved:#04x}, here {here:#04x}, guest-writable bits {writable:#04x}"
    )]
    ConfigMismatch {
        /// Offset of the first such byte.
        offset: usize,
        /// The byte in the state.
        saved: u8,
        /// The byte of this function.
        here: u8,
        /// Bits of it that may differ.
        writable: u8,
    },
    /// A saved BAR has another size.
    #[error("saved BAR {bar} has {saved:#x} bytes, here it has {here:#x}")]
    BarSizeMismatch {
        /// BAR index.
        bar: usize,
        /// Size in the state in bytes.
        saved: u64,
        /// Size here in bytes.
        here: u64,
    },
    /// A saved power state that the function does not have.
    #[error("saved power state D{state} is not supported")]
    BadPowerState {
        /// The value of PMCSR bits 1:0.
        state: u8,
    },
    /// A saved MSI-X table has another size.
    #[error("saved MSI-X table has {saved} vectors (declared {declared}), here there are {here}")]
    VectorCountMismatch {
        /// Entries in the state.
        saved: usize,
        /// The count field of the state.
        declared: u16,
        /// Vectors of this function.
        here: usize,
    },
    /// A saved vector is not one that the table could hold.
    #[error("saved MSI-X vector {vector}: {reason}")]
    BadVector {
        /// Vector index.
        vector: usize,
        /// What is wrong.
        reason: &'static str,
    },
    /// The saved value of the configuration address port has reserved bits set.
    #[error("saved configuration address {value:#010x} has reserved bits set")]
    BadConfigAddress {
        /// The value.
        value: u32,
    },
}
