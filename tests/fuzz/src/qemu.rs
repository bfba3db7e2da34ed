//! The controller that QEMU 11.1 writes.

use nvme::qemu::{QemuDevice, QemuSection};

/// The device that wrote the seed.
const DEVICE: QemuDevice = QemuDevice { max_ioqpairs: 8, msix_qsize: 9, aerl: 3 };
/// A section with its header and footer.
const LINUX: &[u8] = include_bytes!("../../golden/qemu-11.1.3/nvme-linux.section");
/// Type, identifier, name and its length, instance, version.
const HEADER_BYTES: usize = 1 + 4 + 1 + "0000:00:04.0/nvme".len() + 4 + 4;
const FOOTER_BYTES: usize = 5;

/// Reads a section, which must be written as it was read.
pub fn nvme(data: &[u8]) {
    if let Ok(section) = QemuSection::from_bytes(data, &DEVICE) {
        assert_eq!(section.to_bytes(), data, "a section is written as it was read");
    }
}

/// The section of a controller that a Linux guest used.
#[must_use]
pub fn nvme_seeds() -> Vec<Vec<u8>> {
    vec![LINUX[HEADER_BYTES..LINUX.len() - FOOTER_BYTES].to_vec()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seed_is_read() {
        QemuSection::from_bytes(&nvme_seeds()[0], &DEVICE).unwrap();
    }
}
