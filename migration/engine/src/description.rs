//! What a machine is, in words that two processes can compare before any RAM moves.

use std::collections::BTreeMap;
use std::ops::Bound;

use crate::RamBlock;

/// What the names of identities begin with.
const IDENTITY: &str = "identity";
/// Of a thing that one side lacks about so much is told.
const PROPERTIES_SHOWN_BYTES: usize = 100;

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

    /// Takes out what only tells which thing something is, and not what it is like: properties below `identity`. Not every process knows
    /// them, and they are true on one host, or at one time; so they are compared by rules of their own, where both sides tell them. What
    /// lies in a file has none.
    pub fn take_identities(&mut self) -> Self {
        let is_identity = |name: &str| name.strip_prefix(IDENTITY).is_some_and(|rest| rest.starts_with('.'));
        let all = std::mem::take(&mut self.properties).into_iter();
        let (identities, others) = all.partition(|(name, _)| is_identity(name));
        self.properties = others;
        Self { properties: identities }
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

    /// Every difference between a source (`self`) and a `destination`, in one line each: short names first, and a thing that
    /// one side lacks as a whole (a controller, a namespace, a vCPU) once, with all that is known of it.
    #[must_use]
    pub fn differences(&self, destination: &Self) -> Vec<String> {
        let mut reasons = Vec::new();
        for (name, here) in &self.properties {
            if let Some(there) = destination.properties.get(name).filter(|there| *there != here) {
                let reason = format!("{name}: the source has {here}, the destination {there}");
                reasons.push((depth(name), reason));
            }
        }
        for (thing, properties) in self.lacking_in(destination) {
            let reason = format!("{thing}: the source has {properties}, the destination has no such thing");
            reasons.push((depth(thing), reason));
        }
        for (thing, properties) in destination.lacking_in(self) {
            let reason = format!("{thing}: the destination has {properties}, the source has no such thing");
            reasons.push((depth(thing), reason));
        }
        reasons.sort();
        reasons.into_iter().map(|(_, reason)| reason).collect()
    }

    /// What `other` lacks: the shortest paths under which it has nothing, each with what is under it here.
    fn lacking_in(&self, other: &Self) -> BTreeMap<&str, String> {
        let mut lacking: BTreeMap<&str, String> = BTreeMap::new();
        for (name, value) in self.properties.iter().filter(|(name, _)| !other.properties.contains_key(*name))
        {
            let ends = name.match_indices('.').map(|(end, _)| end).chain([name.len()]);
            let thing = ends.map(|end| &name[..end]).find(|path| !other.has_under(path)).unwrap_or(name);
            let properties = lacking.entry(thing).or_default();
            if properties.len() > PROPERTIES_SHOWN_BYTES {
                continue;
            }
            let key = name[thing.len()..].trim_start_matches('.');
            let separator = if properties.is_empty() { "" } else { ", " };
            *properties += separator;
            *properties += &if key.is_empty() { value.clone() } else { format!("{key}={value}") };
            if properties.len() > PROPERTIES_SHOWN_BYTES {
                *properties += ", ...";
            }
        }
        lacking
    }

    /// Whether there is a property of this name, or one inside.
    fn has_under(&self, path: &str) -> bool {
        self.properties
            .range::<str, _>((Bound::Included(path), Bound::Unbounded))
            .take_while(|(name, _)| name.starts_with(path))
            .any(|(name, _)| name.len() == path.len() || name[path.len()..].starts_with('.'))
    }
}

fn depth(name: &str) -> usize {
    name.matches('.').count()
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
                "virtio: the destination has rng=yes, the source has no such thing",
                "ram.low: the source has 9, the destination 4",
                "nvme.a.ns: the source has 1=file, the destination has no such thing",
                "nvme.a.queues: the source has 64, the destination 8",
            ]
        );
        assert!(source.differences(&source.clone()).is_empty());
    }

    #[test]
    fn identities_are_taken_out_and_nothing_else() {
        let mut description = machine(&[("identity.host", "a"), ("identityless", "b"), ("cpus", "2")]);
        assert_eq!(description.take_identities(), machine(&[("identity.host", "a")]));
        assert_eq!(description, machine(&[("identityless", "b"), ("cpus", "2")]));
        assert_eq!(description.take_identities(), Description::new());
    }

    #[test]
    fn a_thing_that_is_missing_is_one_difference() {
        let leaves: Vec<_> = (0..100).map(|leaf| format!("cpu.1.cpuid.{leaf:08x}")).collect();
        let mut properties = vec![("cpus", "2"), ("cpu.0.x", "1"), ("cpu.10.x", "1"), ("nvme.a", "b")];
        properties.extend(leaves.iter().map(|leaf| (leaf.as_str(), "eax=0")));
        let source = machine(&properties);
        let destination = machine(&[("cpus", "1"), ("cpu.0.x", "1"), ("cpu.10.x", "1"), ("nvme.ab", "c")]);
        let differences = source.differences(&destination);
        assert_eq!(differences.len(), 4, "{differences:?}");
        assert_eq!(differences[0], "cpus: the source has 2, the destination 1");
        assert!(
            differences[1].starts_with("cpu.1: the source has cpuid.00000000=eax=0, "),
            "{differences:?}"
        );
        assert!(differences.iter().all(|difference| difference.len() < 250), "{differences:?}");
    }
}
