//! What the guest sees in BAR 0 and in the vendor capabilities (virtio 1.2, 4.1.4).

use pci::{BarKind, ConfigSpace, Identity, MsixLayout};

pub(crate) const BAR: u8 = 0;
const BAR_BYTES: u64 = 0x4000;
/// Common configuration (4.1.4.3).
pub(crate) const COMMON: u64 = 0x0000;
pub(crate) const COMMON_BYTES: usize = 0x38;
/// ISR status, one byte that reading clears (4.1.4.5).
pub(crate) const ISR: u64 = 0x0800;
/// Doorbells, one every four bytes (4.1.4.4).
pub(crate) const NOTIFY: u64 = 0x1000;
pub(crate) const NOTIFY_STRIDE: u64 = 4;
const MSIX_TABLE: u32 = 0x2000;
const MSIX_PENDING: u32 = 0x3000;

/// Offsets in the common configuration.
pub(crate) mod common {
    pub const DEVICE_FEATURE_SELECT: usize = 0x00;
    pub const DEVICE_FEATURE: usize = 0x04;
    pub const DRIVER_FEATURE_SELECT: usize = 0x08;
    pub const DRIVER_FEATURE: usize = 0x0c;
    pub const CONFIG_VECTOR: usize = 0x10;
    pub const QUEUE_COUNT: usize = 0x12;
    pub const STATUS: usize = 0x14;
    pub const QUEUE_SELECT: usize = 0x16;
    pub const QUEUE_SIZE: usize = 0x18;
    pub const QUEUE_VECTOR: usize = 0x1a;
    pub const QUEUE_ENABLE: usize = 0x1c;
    pub const QUEUE_NOTIFY_OFFSET: usize = 0x1e;
    pub const QUEUE_DESCRIPTORS: usize = 0x20;
    pub const QUEUE_DRIVER: usize = 0x28;
    pub const QUEUE_DEVICE: usize = 0x30;
}

/// Device status bits (2.1).
pub(crate) mod status {
    pub const ACKNOWLEDGE: u8 = 1;
    pub const DRIVER: u8 = 2;
    pub const DRIVER_OK: u8 = 4;
    pub const FEATURES_OK: u8 = 8;
    pub const NEEDS_RESET: u8 = 64;
    pub const FAILED: u8 = 128;
    pub const WRITABLE: u8 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;
}

/// ISR bits.
pub(crate) const ISR_QUEUE: u8 = 1;
pub(crate) const ISR_CONFIG: u8 = 2;

/// VIRTIO_F_VERSION_1: the device is not a legacy one. Offered always, and demanded.
pub(crate) const FEATURE_VERSION_1: u64 = 1 << 32;
/// No vector.
pub(crate) const NO_VECTOR: u16 = 0xffff;

const VENDOR: u16 = 0x1af4;
/// Plus the device type (4.1.2.1).
const FIRST_DEVICE: u16 = 0x1040;
const TYPE_COMMON: u8 = 1;
const TYPE_NOTIFY: u8 = 2;
const TYPE_ISR: u8 = 3;
const TYPE_CONFIG_ACCESS: u8 = 5;

/// Offsets in the capability that reaches BARs through configuration space (4.1.4.9).
pub(crate) mod access {
    pub const BAR: u16 = 4;
    pub const OFFSET: u16 = 8;
    pub const LENGTH: u16 = 12;
    pub const DATA: u16 = 16;
}

/// A capability from its length byte on.
fn capability<const N: usize>(kind: u8, offset: u64, length_bytes: u64) -> [u8; N] {
    let mut body = [0; N];
    // Two header bytes come before.
    body[0] = N as u8 + 2;
    body[1] = kind;
    body[2] = BAR;
    // Constants of this file, below 2^32.
    body[6..10].copy_from_slice(&(offset as u32).to_le_bytes());
    body[10..14].copy_from_slice(&(length_bytes as u32).to_le_bytes());
    body
}

/// The configuration space of a virtio device, and the offset of its configuration access capability.
pub(crate) fn config_space(
    device_type: u16,
    class: [u8; 3],
    queues: u16,
) -> Result<(ConfigSpace, u16), pci::Error> {
    let mut config = ConfigSpace::new(&Identity {
        vendor: VENDOR,
        device: FIRST_DEVICE.saturating_add(device_type),
        // "Drivers MUST match any Revision ID value"; modern devices have 1 or more (4.1.2.1).
        revision: 1,
        class,
        subsystem_vendor: VENDOR,
        // 0x40 or more says that the device is not transitional.
        subsystem: FIRST_DEVICE.saturating_add(device_type),
    });
    config.add_bar(BAR, BarKind::Memory64, BAR_BYTES)?;
    // One vector a queue, and one for configuration changes.
    config.add_msix(MsixLayout {
        vectors: queues.saturating_add(1),
        bar: BAR,
        table_offset: MSIX_TABLE,
        pending_offset: MSIX_PENDING,
    })?;
    config.add_vendor_capability(&capability::<14>(TYPE_COMMON, COMMON, COMMON_BYTES as u64), &[])?;
    config.add_vendor_capability(&capability::<14>(TYPE_ISR, ISR, 1), &[])?;
    let mut notify = capability::<18>(TYPE_NOTIFY, NOTIFY, NOTIFY_STRIDE * u64::from(queues));
    notify[14..18].copy_from_slice(&(NOTIFY_STRIDE as u32).to_le_bytes());
    config.add_vendor_capability(&notify, &[])?;
    // The driver chooses BAR, offset and length; the data window is served by the transport and holds nothing.
    let mut writable = [0; 14];
    writable[2] = 0xff;
    writable[6..14].fill(0xff);
    let access = config.add_vendor_capability(&capability::<18>(TYPE_CONFIG_ACCESS, 0, 0), &writable)?;
    config.add_express()?;
    Ok((config, access))
}
