//! What a machine is, in words that two processes can compare before any RAM moves.

use std::collections::BTreeMap;

use crate::RamBlock;

/// An inventory: property by property, each a name and a value. Names are paths that a user understands, such as
/// `cpus`, `nvme.disk0.queues` or `nvme.disk0.ns.3.capacity_bytes`; RAM blocks are added as `ram.NAME.length_bytes`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Description {
    properties: BTreeMap<String, String>,
}

impl Description {
    /// An empty inventory.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a property; a second value for the same name replaces the first.
    pub fn set(&mut self, name: impl Into<String>, value: impl ToString) {
        self.properties.insert(name.into(), value.to_string());
    }

    /// The value of a property.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.properties.get(name).map(String::as_str)
    }

    /// Takes a property out, to compare it by rules of its own.
    pub fn remove(&mut self, name: &str) -> Option<String> {
        self.properties.remove(name)
    }

    /// All properties, by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.properties.iter().map(|(name, value)| (name.as_str(), value.as_str()))
    }

    /// Adds the lengths of RAM blocks.
    pub fn add_ram(&mut self, blocks: &[RamBlock]) {
        for block in blocks {
            self.set(format!("ram.{}.length_bytes", block.name), block.length_bytes());
        }
    }

    /// Every difference between a source (`self`) and a `destination`, in one line each.
    #[must_use]
    pub fn differences(&self, destination: &Self) -> Vec<String> {
        let mut reasons = Vec::new();
        for (name, here) in &self.properties {
            match destination.properties.get(name) {
                Some(there) if there == here => {}
                Some(there) => {
                    reasons.push(format!("{name}: the source has {here}, the destination {there}"))
                }
                None => {
                    reasons.push(format!("{name}: the source has {here}, the destination has no such thing"))
                }
            }
        }
        for (name, there) in &destination.properties {
            if !self.properties.contains_key(name) {
                reasons.push(format!("{name}: the destination has {there}, the source has no such thing"));
            }
        }
        reasons
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(properties: &[(&str, &str)]) -> Description {
        let mut description = Description::new();
        properties.iter().for_each(|(name, value)| description.set(*name, value));
        description
    }

    #[test]
    fn every_difference_is_told_at_once() {
        let source =
            machine(&[("cpus", "2"), ("nvme.a.queues", "64"), ("nvme.a.ns.1", "file"), ("ram.low", "9")]);
        let destination =
            machine(&[("cpus", "2"), ("nvme.a.queues", "8"), ("ram.low", "4"), ("virtio.rng", "yes")]);
        assert_eq!(
            source.differences(&destination),
            [
                "nvme.a.ns.1: the source has file, the destination has no such thing",
                "nvme.a.queues: the source has 64, the destination 8",
                "ram.low: the source has 9, the destination 4",
                "virtio.rng: the destination has yes, the source has no such thing",
            ]
        );
        assert!(source.differences(&source.clone()).is_empty());
    }
}
