//! Why a saved state is refused.

/// An error of this crate.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A register holds what the guest could not have put there.
    #[error("saved {device} register {register} is {value:#x}: {reason}")]
    BadRegister {
        /// The device.
        device: &'static str,
        /// The register.
        register: &'static str,
        /// Its value.
        value: u64,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// More input bytes than the buffer holds, or a count that disagrees.
    #[error("saved serial {buffer} has {saved} bytes (declared {declared}), at most {most} are possible")]
    BadInput {
        /// Which buffer.
        buffer: &'static str,
        /// Bytes in the state.
        saved: usize,
        /// Its count field.
        declared: usize,
        /// Capacity in bytes.
        most: usize,
    },
}
