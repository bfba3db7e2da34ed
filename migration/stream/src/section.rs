//! Device sections: one saved state with its name.

use std::collections::BTreeMap;

use serde_json::Value as Json;
use vmstate::VmState;

use crate::Error;

/// One device's saved state, as it stands in a stream.
#[derive(Debug, Clone, PartialEq)]
pub struct DeviceSection {
    /// Under 128 bytes, for example `0000:00:04.0/nvme`.
    pub name: String,
    /// Tells several sections of one name apart.
    pub instance_id: u32,
    /// Of the description.
    pub version: u32,
    /// The state's bytes.
    pub payload: Vec<u8>,
    /// What the bytes mean, for the trailer; `null` where no trailer is written.
    pub description: Json,
}

impl DeviceSection {
    /// Saves a state with its description, for a file.
    pub fn save<T: VmState>(name: impl Into<String>, instance_id: u32, state: &T) -> Self {
        DeviceSection { description: vmstate::describe(state), ..Self::save_bare(name, instance_id, state) }
    }

    /// Saves a state without its description, for a live connection: nothing is done while the guest is stopped that the other
    /// side does not need.
    pub fn save_bare<T: VmState>(name: impl Into<String>, instance_id: u32, state: &T) -> Self {
        let payload = vmstate::to_bytes(state);
        DeviceSection {
            name: name.into(),
            instance_id,
            version: T::VERSION,
            payload,
            description: Json::Null,
        }
    }

    /// The state. It is well-formed, but not yet checked against the device.
    ///
    /// # Errors
    ///
    /// If the version is not read or the bytes do not fit the description; the error names the section.
    pub fn load<T: VmState>(&self) -> Result<T, Error> {
        let (name, version) = (self.name.clone(), self.version);
        vmstate::from_bytes(&self.payload, version).map_err(|source| Error::Section { name, version, source })
    }
}

/// The sections that arrived, to be handed out to the devices.
#[derive(Debug, Default)]
pub struct SectionSet {
    sections: BTreeMap<(String, u32), DeviceSection>,
}

impl SectionSet {
    /// Adds a section that arrived.
    ///
    /// # Errors
    ///
    /// If one of this name and instance is already there.
    pub fn insert(&mut self, section: DeviceSection) -> Result<(), Error> {
        let key = (section.name.clone(), section.instance_id);
        if self.sections.contains_key(&key) {
            return Err(Error::Repeated { name: key.0, instance_id: key.1 });
        }
        self.sections.insert(key, section);
        Ok(())
    }

    /// Takes the state of one device out.
    ///
    /// # Errors
    ///
    /// If there is none, or it does not load.
    pub fn take<T: VmState>(&mut self, name: &str, instance_id: u32) -> Result<T, Error> {
        let key = (name.to_owned(), instance_id);
        let section = self.sections.remove(&key).ok_or_else(|| Error::Missing(vec![label(&key)]))?;
        section.load()
    }

    /// The sections that have not been taken.
    pub fn iter(&self) -> impl Iterator<Item = &DeviceSection> {
        self.sections.values()
    }

    /// Makes sure that every section was taken.
    ///
    /// # Errors
    ///
    /// Names those that were not.
    pub fn finish(self) -> Result<(), Error> {
        if self.sections.is_empty() {
            Ok(())
        } else {
            Err(Error::LeftOver(self.sections.keys().map(label).collect()))
        }
    }
}

/// A section's name as errors print it.
pub(crate) fn label((name, instance_id): &(String, u32)) -> String {
    format!("{name:?} instance {instance_id}")
}
