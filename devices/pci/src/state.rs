//! What is saved of a function. Plain and untrusted: only [`Endpoint::restore`](crate::Endpoint::restore) and its
//! parts turn it into a device.

use vmstate::VmState;

use crate::bar::BAR_COUNT;
use crate::config::CONFIG_BYTES;

/// The configuration space of one function.
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "pci-function", version = 1)]
pub struct PciState {
    /// The first 256 bytes, read-only ones included: they say which device this was.
    pub bytes: [u8; CONFIG_BYTES],
    /// Sizes of the BARs in bytes, 0 where there is none (or the upper half of a 64-bit BAR).
    pub bar_length_bytes: [u64; BAR_COUNT],
}

/// One vector of an MSI-X table.
#[derive(VmState, Clone, Copy, Debug, Default, PartialEq, Eq)]
#[vmstate(name = "msix-vector", version = 1)]
pub struct MsixEntryState {
    /// Message address.
    pub address: u64,
    /// Message data.
    pub data: u32,
    /// Masked by the guest.
    pub masked: bool,
    /// A message is due as soon as the mask goes.
    pub pending: bool,
}

/// The MSI-X table and its pending bits. Enable and function mask are in the configuration space.
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "msix", version = 1)]
pub struct MsixState {
    /// Number of vectors.
    pub count: u16,
    /// The vectors.
    #[vmstate(len = "count", max = 2048)]
    pub entries: Vec<MsixEntryState>,
}

/// Everything that an [`Endpoint`](crate::Endpoint) holds.
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "pci-endpoint", version = 1)]
pub struct EndpointState {
    /// Configuration space.
    pub config: PciState,
    /// MSI-X.
    pub msix: MsixState,
}

/// The root bus itself: what is not part of any device model.
#[derive(VmState, Clone, Debug, PartialEq, Eq)]
#[vmstate(name = "pci-root", version = 1)]
pub struct RootBusState {
    /// The configuration address port, 0xcf8.
    pub config_address: u32,
    /// The host bridge in slot 0.
    pub host_bridge: PciState,
}
