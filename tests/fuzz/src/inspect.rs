//! What `ferry inspect` prints of files, whatever is in them. The first byte of the input says how they are looked at: a file alone,
//! with a description, two files, a file in the mapped layout as [`Sparse`] lists it, or two schemas. Where there are two parts, the
//! first has a be32 length.

use std::io;

use ferry::inspect::{Comparison, Diff, Input, Limited, Tree, compare, write_json};
use serde_json::{Value as Json, json};
use stream::{Description, DeviceSection, ReadAt, find_trailer};

use crate::mapped::Sparse;
use crate::seeds;
use crate::streams::{self, Device};

/// More than any file of the corpus needs, so that what is printed takes bounded time.
const OUTPUT_BYTES_MAX: u64 = 1 << 20;

/// How files are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// One, which describes itself.
    File,
    /// A description, and a section or a stream.
    Described,
    /// Two of them.
    Diff,
    /// A list of what is not a hole.
    Mapped,
    /// Two texts.
    Schemas,
}

const WAYS: [Way; 5] = [Way::File, Way::Described, Way::Diff, Way::Mapped, Way::Schemas];

/// How an input is looked at, and the rest of it.
#[must_use]
pub fn way(data: &[u8]) -> Option<(Way, &[u8])> {
    let (first, rest) = data.split_first()?;
    Some((*WAYS.get(usize::from(*first) % WAYS.len())?, rest))
}

/// Looks at it every way that there is for it.
pub fn inspect(data: &[u8]) {
    let Some((way, rest)) = way(data) else { return };
    match way {
        Way::File => show(rest, None),
        Way::Mapped => show(Sparse::new(rest), None),
        Way::Described => {
            let (description, file) = halves(rest);
            let Ok(description) = Description::parse(description) else { return };
            show(file, Some(description));
        }
        Way::Diff => {
            let (one, other) = halves(rest);
            let (Ok(one), Ok(other)) = (Input::new(one, None), Input::new(other, None)) else { return };
            let _refused = differences(&one, &other);
        }
        Way::Schemas => {
            let (old, new) = halves(rest);
            let (Ok(old), Ok(new)) = (serde_json::from_slice(old), serde_json::from_slice(new)) else {
                return;
            };
            schemas(&old, &new);
        }
    }
}

/// Prints a file for people and for programs, with and without its pages. It does not differ from itself.
fn show<R: ReadAt>(file: R, description: Option<Description>) {
    let Ok(input) = Input::new(file, description) else { return };
    let mut tree = Tree::new(limited());
    // All may refuse it, each with an error.
    let (_, _refused) = input.walk(&mut tree);
    for wants_pages in [false, true] {
        let _refused = write_json(&input, limited(), |_| true, wants_pages);
    }
    if let Ok(count) = differences(&input, &input) {
        assert_eq!(count, 0, "a file differs from itself");
    }
    serde_json::to_writer(io::sink(), input.trailer()).expect("JSON that was read can be written");
}

fn limited() -> Limited<io::Sink> {
    Limited::new(io::sink(), OUTPUT_BYTES_MAX)
}

fn differences<A: ReadAt, B: ReadAt>(one: &Input<A>, other: &Input<B>) -> anyhow::Result<u64> {
    Diff::print(one, other, |_| true, &mut limited())
}

fn schemas(old: &Json, new: &Json) {
    let Ok(comparison) = compare(old, new) else { return };
    let back = compare(new, old).expect("both are schemas");
    // The other way round there are as many reasons, in other words.
    let count = |comparison: &Comparison| (comparison.old_in_new.len(), comparison.new_in_old.len());
    let (there, here) = count(&back);
    assert_eq!(count(&comparison), (here, there));
    assert_eq!(compare(old, old).expect("it is a schema").differences, [""; 0]);
    assert!(!comparison.to_string().is_empty());
}

/// What has a length, and what follows it.
fn halves(data: &[u8]) -> (&[u8], &[u8]) {
    let Some((length, rest)) = data.split_first_chunk::<4>() else { return (data, &[]) };
    let length = usize::try_from(u32::from_be_bytes(*length)).unwrap_or(usize::MAX);
    rest.split_at(length.min(rest.len()))
}

fn input(way: Way, parts: [&[u8]; 2]) -> Vec<u8> {
    let mut input = vec![way as u8];
    if let [first, second @ [_, ..]] = parts {
        input.extend((first.len() as u32).to_be_bytes());
        input.extend(first);
        input.extend(second);
    } else {
        input.extend(parts[0]);
    }
    input
}

/// A section without a stream around it.
fn bare(name: &str, version: u32, payload: &[u8]) -> Vec<u8> {
    let mut section = vec![0x04, 0, 0, 0, 7, name.len() as u8];
    section.extend(name.as_bytes());
    section.extend([0_u32.to_be_bytes(), version.to_be_bytes()].concat());
    section.extend(payload);
    section.extend([0x7e, 0, 0, 0, 7]);
    section
}

/// For each way valid inputs; among them a list as QEMU describes it, which has one entry for all its elements.
///
/// # Panics
///
/// If no trailer is found in a file of our own.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let files = seeds::files();
    let mut inputs: Vec<_> = files.iter().map(|file| input(Way::File, [file, &[]])).collect();
    inputs.extend(seeds::mapped().iter().map(|list| input(Way::Mapped, [list, &[]])));
    for pair in files.windows(2) {
        inputs.push(input(Way::Diff, [&pair[0], &pair[1]]));
    }
    let device = DeviceSection::save("device", 0, &streams::device(0, true));
    let mut description = device.description.clone();
    description["name"] = json!("device");
    description["instance_id"] = json!(0);
    let section = bare("device", device.version, &device.payload);
    inputs.push(input(Way::Described, [description.to_string().as_bytes(), &section]));
    // A whole stream with the description of each of its sections, as the trailer of the file of the same machine has it.
    for (stream, file) in seeds::lives().iter().zip(&files) {
        let trailer = find_trailer(file).ok().flatten().expect("our own files have one");
        let trailer = serde_json::to_vec(&trailer).expect("JSON that was read can be written");
        inputs.push(input(Way::Described, [&trailer, stream]));
    }
    let queue = json!({ "name": "q", "instance_id": 0, "vmsd_name": "q", "version": 1, "fields": [
        { "name": "count", "type": "uint16", "size": 2 },
        { "name": "requests", "type": "qtailq", "size": 13, "vmsd_name": "request", "version": 1, "fields": [
            { "name": "tag", "type": "uint32", "size": 4 }, { "name": "done", "type": "bool", "size": 1 }] },
    ] });
    let payload = [[0, 2].as_slice(), &[1, 0, 0, 0, 5, 1], &[1, 0, 0, 0, 6, 0], &[0]].concat();
    inputs.push(input(Way::Described, [queue.to_string().as_bytes(), &bare("q", 1, &payload)]));
    let schema = vmstate::schema::<Device>().to_json();
    let mut newer = schema.clone();
    newer["version"] = json!(2);
    let (schema, newer) = (schema.to_string(), newer.to_string());
    inputs.push(input(Way::Schemas, [schema.as_bytes(), newer.as_bytes()]));
    inputs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_seeds_are_printed_to_their_end() {
        let mut seen = Vec::new();
        for seed in seeds() {
            let (way, rest) = way(&seed).unwrap();
            seen.push(way);
            let walked = match way {
                Way::File => Input::new(rest, None).unwrap().walk(&mut Tree::new(io::sink())),
                Way::Mapped => Input::new(Sparse::new(rest), None).unwrap().walk(&mut Tree::new(io::sink())),
                Way::Described => {
                    let (description, file) = halves(rest);
                    let description = Description::parse(description).unwrap();
                    Input::new(file, Some(description)).unwrap().walk(&mut Tree::new(io::sink()))
                }
                Way::Diff => {
                    let (one, other) = halves(rest);
                    let (one, other) = (Input::new(one, None).unwrap(), Input::new(other, None).unwrap());
                    assert!(differences(&one, &other).unwrap() > 0);
                    continue;
                }
                Way::Schemas => {
                    let (old, new) = halves(rest);
                    let [old, new] = [old, new].map(|text| serde_json::from_slice(text).unwrap());
                    assert_eq!(compare(&old, &new).unwrap().new_in_old.len(), 1);
                    continue;
                }
            };
            walked.1.unwrap_or_else(|error| panic!("{way:?}: {error:#}"));
            assert!(walked.0.sections > 0, "{way:?}");
        }
        assert!(WAYS.iter().all(|way| seen.contains(way)), "{seen:?}");
    }
}
