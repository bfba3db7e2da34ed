//! The configuration: the first thing in a stream.

use serde_json::{Value as Json, json};
use vmstate::VmState;

use crate::Error;

/// What machine the stream is for, and which deviations from the plain layout it uses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Configuration {
    /// The machine type, for example `ferry-1`.
    pub machine: String,
    /// Capabilities that change the layout.
    pub capabilities: Vec<String>,
}

impl Configuration {
    /// A machine type and the plain layout.
    pub fn new(machine: impl Into<String>) -> Self {
        Configuration { machine: machine.into(), capabilities: Vec::new() }
    }
}

/// The same as it is on the wire. It has no section header, so its version is fixed.
#[derive(Debug, VmState)]
#[vmstate(name = "configuration")]
pub(crate) struct Wire {
    len: u32,
    #[vmstate(len = "len", max = 255)]
    name: Vec<u8>,
    #[vmstate(subsection)]
    page_bits: Option<PageBits>,
    #[vmstate(subsection)]
    capabilities: Option<Capabilities>,
    #[vmstate(subsection)]
    uuid: Option<Uuid>,
}

/// Only 4 KiB pages exist here.
#[derive(Debug, VmState)]
#[vmstate(name = "configuration/target-page-bits")]
struct PageBits {
    #[vmstate(min = 12, max = 12)]
    page_bits: u32,
}

#[derive(Debug, VmState)]
#[vmstate(name = "configuration/capabilities")]
struct Capabilities {
    caps_count: u32,
    #[vmstate(len = "caps_count", max = 64)]
    capabilities: Vec<Capability>,
}

#[derive(Debug, VmState)]
#[vmstate(name = "capability")]
struct Capability {
    len: u8,
    #[vmstate(len = "len", max = 255)]
    name: Vec<u8>,
}

#[derive(Debug, VmState)]
#[vmstate(name = "configuration/uuid")]
struct Uuid {
    uuid: [u8; 16],
}

impl Wire {
    pub(crate) fn new(configuration: &Configuration) -> Result<Self, Error> {
        let names = configuration.capabilities.iter();
        let capabilities = names
            .map(|name| Ok(Capability { len: 0, name: bytes("a capability", name)? }))
            .collect::<Result<Vec<_>, _>>()?;
        let capabilities = (!capabilities.is_empty()).then_some(Capabilities { caps_count: 0, capabilities });
        Ok(Wire {
            len: 0,
            name: bytes("the machine", &configuration.machine)?,
            page_bits: None,
            capabilities,
            uuid: None,
        })
    }

    pub(crate) fn into_configuration(self) -> Result<Configuration, Error> {
        let capabilities = self.capabilities.map(|all| all.capabilities).unwrap_or_default();
        Ok(Configuration {
            machine: name_from("the machine", &self.name)?.to_owned(),
            capabilities: capabilities
                .iter()
                .map(|one| name_from("a capability", &one.name).map(str::to_owned))
                .collect::<Result<_, _>>()?,
        })
    }

    /// The description in the trailer. Readers look for the field type `capability` to find out which layout a file has.
    pub(crate) fn describe(&self) -> Json {
        let mut json = vmstate::describe(self);
        let parts = json.get_mut("subsections").and_then(Json::as_array_mut);
        let part = parts.and_then(|parts| {
            parts.iter_mut().find(|part| part["vmsd_name"] == <Capabilities as VmState>::NAME)
        });
        if let (Some(capabilities), Some(part)) = (&self.capabilities, part) {
            let names = capabilities.capabilities.iter();
            let entries = names.map(
                |one| json!({ "name": "capabilities", "type": "capability", "size": 1 + one.name.len() }),
            );
            let count = json!({ "name": "caps_count", "type": "uint32", "size": 4 });
            part["fields"] = std::iter::once(count).chain(entries).collect();
        }
        json
    }
}

fn bytes(what: &'static str, name: &str) -> Result<Vec<u8>, Error> {
    check_name(what, name).map(|name| name.as_bytes().to_vec())
}

/// A name from a stream.
pub(crate) fn name_from<'a>(what: &'static str, bytes: &'a [u8]) -> Result<&'a str, Error> {
    match std::str::from_utf8(bytes) {
        Ok(name) => check_name(what, name),
        Err(_) => Err(Error::Name { what, name: String::from_utf8_lossy(bytes).into_owned() }),
    }
}

/// Names are short text without NUL: the trailer is found by the last NUL of a file.
pub(crate) fn check_name<'a>(what: &'static str, name: &'a str) -> Result<&'a str, Error> {
    if name.is_empty() || name.len() > crate::wire::NAME_BYTES_MAX || name.contains('\0') {
        return Err(Error::Name { what, name: name.into() });
    }
    Ok(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_are_described_wherever_they_stand_among_the_subsections() {
        let names = ["mapped-ram".to_owned()];
        let mut wire = Wire::new(&Configuration { machine: "m".into(), capabilities: names.into() }).unwrap();
        let alone = wire.describe()["subsections"][0].clone();
        assert_eq!(alone["fields"][1], json!({ "name": "capabilities", "type": "capability", "size": 11 }));

        wire.page_bits = Some(PageBits { page_bits: 12 });
        let page_bits = vmstate::describe(&wire)["subsections"][0].clone();
        assert_eq!(wire.describe()["subsections"], json!([page_bits, alone]));
    }
}
