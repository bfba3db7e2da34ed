//! How much memory hostile bytes can take, in whatever they are read as: at most 1 MiB and 16 times the input, counted by the allocator.
//!
//! Crates `vmstate` and `stream` count their own readers; here are the states of real devices, QEMU's controller, and all that is
//! printed of files. Two files that are compared are the exception: see [`comparing_ends_at_limits_of_its_own`].

#![allow(clippy::unwrap_used)] // tests, their helpers among them

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::io;

use ferry::inspect::{Diff, Input, Tree, write_json};
use fuzz::inspect::{Way, way};
use fuzz::mapped::Sparse;
use fuzz::mutate::{Random, mutate};
use fuzz::{TARGETS, Target};
use serde_json::{Value as Json, json};
use stream::{Description, ReadAt};

/// The system's allocator, which also counts what each thread holds and has held at most.
struct Counting;

thread_local! {
    static HELD: Cell<isize> = const { Cell::new(0) };
    static MOST: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    // A thread that ends frees memory after its counter is gone.
    let _uncounted = HELD.try_with(|held| {
        held.set(held.get() + bytes);
        let _uncounted = MOST.try_with(|most| most.set(most.get().max(held.get())));
    });
}

// SAFETY: both calls are passed on as they are; counting touches no memory of the caller's and, since the counters are plain
// numbers that need no initialisation, allocates nothing. Reallocation is the trait's own: it allocates, copies and frees, so that
// both places count.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: the caller's promises are the same as ours.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: as above; `place` came from `System`.
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

const MIB: usize = 1 << 20;
/// Of each target.
const MUTATIONS: u64 = 300;

/// The result, and the bytes that were held at most while it was made.
fn most_held<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = HELD.get();
    MOST.set(before);
    let result = work();
    (result, (MOST.get() - before) as usize)
}

/// Holds what `work` takes against the limit for `input_bytes`.
fn bounded<T>(what: &str, input_bytes: usize, work: impl FnOnce() -> T) -> T {
    let (result, most) = most_held(work);
    println!("{what}: {most} bytes at most for {input_bytes} bytes of input");
    assert!(most <= MIB + 16 * input_bytes, "{what}: {most} bytes for {input_bytes} bytes of input");
    result
}

/// Prints a file for people and for programs.
fn printed(what: &str, file: &[u8], description: Option<&[u8]>) -> anyhow::Result<()> {
    let description_bytes = description.map_or(0, <[u8]>::len);
    bounded(what, file.len() + description_bytes, || {
        let input = Input::new(file, description.map(Description::parse).transpose()?)?;
        serde_json::to_writer(io::sink(), input.trailer())?;
        let tree = input.walk(&mut Tree::new(io::sink())).1;
        let json = write_json(&input, io::sink(), |_| true, true);
        assert_eq!(tree.is_ok(), json.is_ok(), "{tree:?} but {json:?}");
        tree
    })
}

fn device(entries: &Json) -> Json {
    json!({ "name": "x", "instance_id": 0, "vmsd_name": "x", "version": 1, "fields": entries })
}

/// A file with this trailer and what it may describe.
fn file(sections: &[u8], trailer: &str) -> Vec<u8> {
    let length = (trailer.len() as u32).to_be_bytes();
    [b"QEVM\0\0\0\x03".as_slice(), sections, b"\0\x06", &length, trailer.as_bytes()].concat()
}

/// A section that makes up a file, or is one.
fn section(payload: &[u8]) -> Vec<u8> {
    [b"\x04\0\0\0\x01\x01x\0\0\0\0\0\0\0\x01".as_slice(), payload, b"\x7e\0\0\0\x01"].concat()
}

/// Hostile sections with what describes them, and whether they can be printed.
fn sections() -> Vec<(&'static str, Json, Vec<u8>, bool)> {
    let field = |kind: &str, size: usize| json!({ "name": "f", "type": kind, "size": size });
    let queue = |element: usize| {
        let mut entry = field("qtailq", 200_000 * (1 + element) + 1);
        entry["fields"] = json!([{ "name": "e", "type": "buffer", "size": element }]);
        let elements = [&[1][..], &vec![7; element]].concat().repeat(200_000);
        (json!([entry]), [elements.as_slice(), &[0]].concat())
    };
    let structure = |count: usize, inner: Json| {
        let mut entry = field("struct", 1);
        entry["array_len"] = json!(count);
        entry["struct"] = json!({ "vmsd_name": "s", "version": 1, "fields": inner });
        json!([entry])
    };
    let nested = (0..30).fold(json!([field("uint8", 1)]), |inner, _| structure(1, inner));
    let hollow: Vec<_> = std::iter::repeat_n(field("buffer", 0), 2000).chain([field("uint8", 1)]).collect();
    let run = json!([{ "name": "f", "type": "uint8", "size": 1, "array_len": 1_000_000 }]);
    let lists = |entries: [Json; 2], marks: [u8; 2]| {
        let mut list: Vec<_> = entries.iter().cycle().take(100_000).cloned().collect();
        list.push(field("list-marker", 1));
        (json!(list), [marks.repeat(50_000), vec![0]].concat())
    };
    let (small, three) = (queue(3), queue(8));
    let list = lists([field("list-marker", 1), field("uint8", 1)], [1, 7]);
    let slots = json!(vec![field("ptr-marker", 1); 100_000]);
    vec![
        ("a list of three bytes each", small.0, small.1, true),
        ("a list of eight bytes each", three.0, three.1, true),
        ("empty slots", slots, vec![b'0'; 100_000], true),
        ("a list of ours", list.0, list.1, true),
        ("entries", json!(vec![field("uint8", 1); 100_000]), vec![9; 100_000], true),
        ("numbers", run, vec![3; 1_000_000], true),
        ("structs of one byte", structure(1_000_000, json!([field("uint8", 1)])), vec![4; 1_000_000], true),
        ("structs in structs", nested, vec![1], true),
        ("hollow structs", structure(1000, json!(hollow)), (0..1000).map(|n| n as u8).collect(), true),
        ("a buffer", json!([field("buffer", 2_000_000)]), vec![0xfe; 2_000_000], true),
        ("text", json!([field("buffer", 2_000_000)]), vec![b'a'; 2_000_000], true),
        ("bits", json!([field("bitmap", 2_000_000)]), vec![0x55; 2_000_000], true),
        ("too large", json!([field("buffer", 1 << 40)]), vec![1; 100], false),
    ]
}

#[test]
fn sections_are_printed_within_the_bound() {
    for (what, entries, payload, is_printed) in sections() {
        let (device, section) = (device(&entries), section(&payload));
        let whole = file(&section, &json!({ "devices": [device] }).to_string());
        let result = printed(what, &whole, None);
        assert_eq!(result.is_ok(), is_printed, "{what}: {result:?}");
        let result = printed(what, &section, Some(device.to_string().as_bytes()));
        assert_eq!(result.is_ok(), is_printed, "{what}: {result:?}");
    }
}

#[test]
fn trailers_and_streams_are_printed_within_the_bound() {
    for element in ["[]", "0", "{}", r#"{"":0}"#, r#"{"fields":[],"instance_id":0,"name":""}"#, r#""\u0001""#]
    {
        let elements = vec![element; 200_000].join(",");
        for trailer in [format!("[{elements}]"), format!(r#"{{"devices":[{elements}]}}"#)] {
            let is_device = trailer.len() > 7_000_000 && trailer.starts_with('{');
            let result = printed(element, &file(&[], &trailer), None);
            // The section that they all describe is not there.
            assert_eq!(result.unwrap_err().to_string().starts_with("missing"), is_device, "{element}");
            printed(element, b"QEVM\0\0\0\x03\0", Some(trailer.as_bytes())).unwrap_err();
        }
    }
    let mut sections = Vec::new();
    let mut devices = Vec::new();
    for id in 0..4000_u32 {
        let (mark, id_bytes) = (b"\x04".as_slice(), id.to_be_bytes());
        sections.extend([mark, &id_bytes, b"\x01x", &id_bytes, &[0; 4], b"\x7e", &id_bytes].concat());
        devices.push(json!({ "name": "x", "instance_id": id, "fields": [] }));
    }
    let trailer = json!({ "devices": devices }).to_string();
    printed("empty sections", &file(&sections, &trailer), None).unwrap();

    let mut ram = b"\x01\0\0\0\x01\x03ram\0\0\0\0\0\0\0\x04".to_vec();
    let names: Vec<_> = (0..50_000).map(|number| format!("{number:05}")).collect();
    ram.extend(((names.len() as u64) << 12 | 4).to_be_bytes());
    names.iter().for_each(|name| ram.extend([&[5], name.as_bytes(), &4096_u64.to_be_bytes()].concat()));
    let end = [&16_u64.to_be_bytes(), b"\x7e\0\0\0\x01".as_slice()].concat();
    ram.extend([&end, b"\x03\0\0\0\x01".as_slice(), &end].concat());
    printed("blocks of RAM", &file(&ram, r#"{"devices":[]}"#), None)
        .map_err(|error| println!("{error:#}"))
        .ok();
}

/// What is compared is kept: a hash of each page, the sections, and the values of one section after the other. That is bounded too,
/// but not by the size of the files: a value of one byte has a path, and a description may stand for many.
#[test]
fn comparing_ends_at_limits_of_its_own() {
    for (what, entries, payload, _) in sections() {
        let whole = file(&section(&payload), &json!({ "devices": [device(&entries)] }).to_string());
        let mut other = whole.clone();
        other[30] ^= 1;
        let (result, most) = most_held(|| {
            let (one, other) = (Input::new(&whole[..], None)?, Input::new(&other[..], None)?);
            Diff::print(&one, &other, |_| true, &mut io::sink())
        });
        println!("{what}: {most} bytes at most for {} bytes of input: {result:?}", 2 * whole.len());
        assert!(most <= 512 * MIB + 16 * 2 * whole.len(), "{what}: {most} bytes");
    }
}

/// Every section of a machine of ours and the one of QEMU's, with a good start and far too much behind it: a count that is cut
/// anywhere goes on as a large one, and its elements follow.
#[test]
fn sections_of_devices_stay_within_the_bound() {
    for target in TARGETS.iter().filter(|target| ["devices", "qemu_nvme"].contains(&target.name)) {
        for seed in (target.seeds)() {
            (target.run)(&seed); // what is made once and kept
            for filling in [&[0][..], &[1], b"0", b"1", &[1, 0], &[b'1', 0], &[0xff], &[5, 13]] {
                for cut in (0..seed.len()).step_by(1 + seed.len() / 50) {
                    let mut input = seed[..cut].to_vec();
                    input.extend(filling.iter().cycle().take(50_000));
                    let ((), most) = most_held(|| (target.run)(&input));
                    let bytes = input.len();
                    assert!(
                        most <= MIB + 16 * bytes,
                        "{}: {most} bytes for {bytes} bytes of input",
                        target.name
                    );
                }
            }
        }
    }
}

/// What a target holds for an input without anything in it: a machine is there before its guest does a thing, and twice while it moves.
fn fixed_bytes(target: &Target) -> usize {
    if target.name.starts_with("guest_") { most_held(|| (target.run)(&[])).1 } else { 0 }
}

/// The bytes of the file that an input stands for.
fn input_bytes(target: &Target, input: &[u8]) -> usize {
    match (target.name, way(input)) {
        ("mapped", _) => Sparse::new(input).length_bytes().unwrap() as usize,
        ("inspect", Some((Way::Mapped, list))) => Sparse::new(list).length_bytes().unwrap() as usize,
        _ => input.len(),
    }
}

#[test]
fn whatever_is_read_stays_within_the_bound() {
    for target in TARGETS {
        let inputs = (target.seeds)();
        // What a target makes once and keeps is not what the input takes.
        inputs.iter().for_each(|input| (target.run)(input));
        let (mut random, mut most_of_all, fixed) = (Random::new(2), 0, fixed_bytes(target));
        for round in 0..MUTATIONS {
            let mut input = inputs[random.below(inputs.len())].clone();
            if round >= inputs.len() as u64 {
                mutate(&mut input, &inputs[random.below(inputs.len())], &mut random);
            }
            let ((), most) = most_held(|| (target.run)(&input));
            let bytes = input_bytes(target, &input);
            assert!(
                most <= fixed + MIB + 16 * bytes,
                "{}: {most} bytes for {bytes} bytes of input, and {fixed} for none",
                target.name
            );
            most_of_all = most_of_all.max(most);
        }
        println!("{}: {most_of_all} bytes at most, {fixed} of them for no input", target.name);
    }
}

#[test]
fn counter_sees_what_is_held() {
    let (list, most) = most_held(|| {
        drop(vec![0_u8; MIB]);
        vec![0_u64; MIB / 16]
    });
    assert_eq!((most, list.len()), (MIB, MIB / 16));
}
