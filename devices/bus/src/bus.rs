//! An address space of devices.

use std::collections::BTreeMap;
use std::sync::{Arc, RwLock};

/// A device model on a bus. Called on vCPU threads, several at once: a device has its own interior locking.
///
/// `offset` is relative to the start of the range that was registered; `offset + data.len()` never exceeds the
/// range. Neither call may panic, block for long, or trust the guest.
pub trait BusDevice: Send + Sync {
    /// The guest reads `data.len()` bytes (1, 2, 4 or 8) at `offset`. All of `data` must be written.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// The guest writes `data` (1, 2, 4 or 8 bytes) at `offset`.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Why a range could not be registered or removed.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// The range is empty or wraps around the address space.
    #[error("bus range {base:#x} with length {length_bytes:#x} is empty or wraps around")]
    BadRange {
        /// First address.
        base: u64,
        /// Length in bytes.
        length_bytes: u64,
    },
    /// Another device is there.
    #[error("bus range {base:#x} with length {length_bytes:#x} overlaps the device at {other:#x}")]
    Overlap {
        /// First address.
        base: u64,
        /// Length in bytes.
        length_bytes: u64,
        /// Base of the device that is there.
        other: u64,
    },
    /// Nothing is registered at this base.
    #[error("no device is registered at bus address {base:#x}")]
    NotFound {
        /// The address asked for.
        base: u64,
    },
}

struct Entry {
    length_bytes: u64,
    device: Arc<dyn BusDevice>,
}

/// Maps addresses (MMIO or port) to devices. Reads of unclaimed addresses give all ones, writes are dropped, as on
/// real hardware.
#[derive(Default)]
pub struct Bus {
    entries: RwLock<BTreeMap<u64, Entry>>,
}

impl Bus {
    /// An empty bus.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts `device` at `[base, base + length_bytes)`.
    ///
    /// # Errors
    /// [`Error::BadRange`] and [`Error::Overlap`]; the bus is unchanged then.
    pub fn insert(&self, base: u64, length_bytes: u64, device: Arc<dyn BusDevice>) -> Result<(), Error> {
        let last = length_bytes.checked_sub(1).and_then(|n| base.checked_add(n));
        let Some(last) = last else { return Err(Error::BadRange { base, length_bytes }) };
        let mut entries = self.write_entries();
        if let Some((&other, entry)) = entries.range(..=last).next_back()
            && other.saturating_add(entry.length_bytes - 1) >= base
        {
            return Err(Error::Overlap { base, length_bytes, other });
        }
        entries.insert(base, Entry { length_bytes, device });
        Ok(())
    }

    /// Removes the device whose range starts at `base`.
    ///
    /// # Errors
    /// [`Error::NotFound`] if no range starts there.
    pub fn remove(&self, base: u64) -> Result<(), Error> {
        self.write_entries().remove(&base).map(|_| ()).ok_or(Error::NotFound { base })
    }

    /// Serves a guest read; `false` means that nobody claimed it and `data` is all ones.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                device.read(offset, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// Serves a guest write; `false` means that nobody claimed it.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address, data.len()) {
            Some((offset, device)) => {
                device.write(offset, data);
                true
            }
            None => false,
        }
    }

    fn find(&self, address: u64, length: usize) -> Option<(u64, Arc<dyn BusDevice>)> {
        let entries = self.entries.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        let (&base, entry) = entries.range(..=address).next_back()?;
        let offset = address - base;
        let end = offset.checked_add(length as u64)?;
        (end <= entry.length_bytes).then(|| (offset, Arc::clone(&entry.device)))
    }

    fn write_entries(&self) -> std::sync::RwLockWriteGuard<'_, BTreeMap<u64, Entry>> {
        self.entries.write().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Default)]
    struct Recorder(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Recorder {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(offset as u8);
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    #[test]
    fn routes_by_offset_and_refuses_accesses_across_the_end() {
        let bus = Bus::new();
        let device = Arc::new(Recorder::default());
        bus.insert(0x1000, 0x10, device.clone()).unwrap();
        let mut data = [0; 4];
        assert!(bus.read(0x100c, &mut data));
        assert_eq!(data, [0xc; 4]);
        assert!(!bus.read(0x100d, &mut data));
        assert_eq!(data, [0xff; 4]);
        assert!(bus.write(0x1004, &[1, 2]));
        assert!(!bus.write(0x1010, &[1]));
        assert_eq!(*device.0.lock().unwrap(), vec![(4, vec![1, 2])]);
    }

    #[test]
    fn overlaps_and_bad_ranges_change_nothing() {
        let bus = Bus::new();
        let device = Arc::new(Recorder::default());
        bus.insert(0x1000, 0x1000, device.clone()).unwrap();
        for (base, length_bytes) in [(0x1000, 1), (0xfff, 2), (0x1fff, 1), (0, u64::MAX), (0x1800, 0x1000)] {
            let error = bus.insert(base, length_bytes, device.clone()).unwrap_err();
            assert!(matches!(error, Error::Overlap { other: 0x1000, .. }), "{base:#x}: {error}");
        }
        assert!(matches!(bus.insert(0, 0, device.clone()), Err(Error::BadRange { .. })));
        assert!(matches!(bus.insert(u64::MAX, 2, device.clone()), Err(Error::BadRange { .. })));
        bus.insert(0x2000, 1, device.clone()).unwrap();
        bus.remove(0x1000).unwrap();
        assert_eq!(bus.remove(0x1000), Err(Error::NotFound { base: 0x1000 }));
        bus.insert(0x1800, 0x800, device).unwrap();
    }
}
