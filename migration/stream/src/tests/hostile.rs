//! The stream of a model machine, with every byte cut off and every bit turned.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use vmstate::{Bitmap, Slots, VmState};

use crate::digest::Integrity;
use crate::parser::Due;
use crate::*;

#[derive(VmState, Debug, Clone, PartialEq)]
#[vmstate(name = "controller")]
struct Controller {
    enabled: bool,
    sq_count: u8,
    #[vmstate(len = "sq_count", max = 16)]
    sq: Slots<Queue>,
    namespace_count: u32,
    #[vmstate(len = "namespace_count", max = 32)]
    namespaces: Slots<Namespace>,
    #[vmstate(subsection)]
    doorbells: Option<Doorbells>,
}

#[derive(VmState, Debug, Clone, PartialEq)]
#[vmstate(name = "queue")]
struct Queue {
    base: u64,
    #[vmstate(min = 2, max = 65536)]
    size: u32,
    #[vmstate(list, max = 4)]
    pending: Vec<u16>,
}

#[derive(VmState, Debug, Clone, PartialEq)]
#[vmstate(name = "namespace")]
struct Namespace {
    blocks: u64,
    read_only: bool,
}

#[derive(VmState, Debug, Clone, PartialEq)]
#[vmstate(name = "controller/doorbells")]
struct Doorbells {
    address: u64,
}

#[derive(VmState, Debug, Clone, PartialEq)]
#[vmstate(name = "timers", version = 3)]
struct Timers {
    #[vmstate(list, max = 8)]
    deadlines: Vec<i64>,
    line_count: u16,
    #[vmstate(len = "line_count", max = 100)]
    lines: Bitmap,
    scratch: [u8; 24],
}

const NVME: &str = "0000:00:04.0/nvme";

fn ram() -> Vec<RamBlock> {
    vec![RamBlock::new("low", 48 << 10), RamBlock::new("high", 16 << 10)]
}

fn expected() -> Expected {
    Expected::new(ram())
        .section::<Controller>(NVME, 0)
        .section::<Timers>("timers", 0)
        .section::<Timers>("timers", 1)
}

fn page() -> Vec<u8> {
    (1..=512_u64).map(|word| word.wrapping_mul(0x9e37_79b9_7f4a_7c15)).flat_map(u64::to_be_bytes).collect()
}

/// 64 KiB of RAM in two rounds, all but one page zeros, and three devices.
fn model() -> Vec<u8> {
    let mut writer = StreamWriter::new(Vec::new(), &Configuration::new("model-1")).unwrap();
    let mut ram = writer.start_ram(&ram()).unwrap();
    let mut round = ram.round(&mut writer).unwrap();
    round.zeros(0, 0, 48 << 10).unwrap();
    round.zeros(1, 0, 16 << 10).unwrap();
    round.finish().unwrap();
    let mut round = ram.last_round(&mut writer).unwrap();
    round.pages(1, 12 << 10, &page()).unwrap();
    round.zeros(0, 0, 4096).unwrap();
    round.finish().unwrap();

    let mut sq = Slots::empty(6);
    sq.put(0, Queue { base: 0x1000, size: 32, pending: vec![] });
    sq.put(3, Queue { base: 0x20_0000, size: 1024, pending: vec![7, 0, 65535] });
    let mut namespaces = Slots::empty(9);
    namespaces.put(8, Namespace { blocks: 1 << 20, read_only: true });
    let doorbells = Some(Doorbells { address: 0x3000 });
    let nvme = Controller { enabled: true, sq_count: 0, sq, namespace_count: 0, namespaces, doorbells };
    writer.device(&DeviceSection::save(NVME, 0, &nvme)).unwrap();
    for instance_id in 0..2 {
        let mut lines = Bitmap::new(70);
        lines.set(66, true);
        let deadlines = (0..instance_id).map(|timer| -1 - i64::from(timer)).collect();
        let timers = Timers { deadlines, line_count: 0, lines, scratch: [0x5a; 24] };
        writer.device(&DeviceSection::save("timers", instance_id, &timers)).unwrap();
    }
    writer.finish_file().unwrap()
}

/// What a stream said.
#[derive(Default)]
struct Said {
    configuration: Option<Configuration>,
    blocks: Vec<RamBlock>,
    /// Each with its records.
    rounds: Vec<Round>,
    devices: Vec<DeviceSection>,
}

#[derive(Default)]
struct Round {
    last: bool,
    records: Vec<(usize, u64, Option<Vec<u8>>)>,
}

/// Reads a whole file; the descriptions come from its trailer.
fn read(bytes: &[u8]) -> Result<Said, Error> {
    let mut decoder = Decoder::file(expected());
    decoder.feed(bytes);
    decoder.end_of_input();
    let (mut said, mut round) = (Said::default(), Round::default());
    for _step in 0..=bytes.len() {
        match decoder.next_event()?.expect("all bytes are there") {
            Event::Configuration(configuration) => said.configuration = Some(configuration),
            Event::RamBlocks(blocks) => said.blocks = blocks.to_vec(),
            Event::RamPage { block, offset, bytes } => {
                round.records.push((block, offset, Some(bytes.to_vec())))
            }
            Event::RamZero { block, offset } => round.records.push((block, offset, None)),
            Event::RamRound { last } => said.rounds.push(Round { last, ..std::mem::take(&mut round) }),
            Event::Device(section) => said.devices.push(section),
            Event::Trailer(text) => {
                let trailer: serde_json::Value = serde_json::from_str(text).unwrap();
                let described = trailer["devices"].as_array().unwrap();
                said.devices
                    .iter_mut()
                    .zip(described)
                    .for_each(|(device, json)| device.description = json.clone());
            }
            Event::Command(command) => panic!("{command:?}"),
            Event::End => return Ok(said),
        }
    }
    panic!("more events than bytes");
}

/// The same state, loaded and saved.
fn again<T: VmState>(section: &DeviceSection) -> DeviceSection {
    let state: T = section.load().expect("the reader has loaded it before");
    let description = section.description.clone();
    DeviceSection { description, ..DeviceSection::save_bare(&section.name, section.instance_id, &state) }
}

/// Says it again.
fn write(said: &Said) -> Vec<u8> {
    let configuration = said.configuration.as_ref().expect("every file has one");
    let mut writer = StreamWriter::new(Vec::new(), configuration).unwrap();
    let mut ram = writer.start_ram(&said.blocks).unwrap();
    for Round { last, records } in &said.rounds {
        let mut round = if *last { ram.last_round(&mut writer) } else { ram.round(&mut writer) }.unwrap();
        for (block, offset, page) in records {
            match page {
                Some(page) => round.pages(*block, *offset, page).unwrap(),
                None => round.zeros(*block, *offset, PAGE_BYTES as u64).unwrap(),
            }
        }
        round.finish().unwrap();
    }
    for section in &said.devices {
        let section = match section.name.as_str() {
            NVME => again::<Controller>(section),
            _ => again::<Timers>(section),
        };
        writer.device(&section).unwrap();
    }
    writer.finish_file().unwrap()
}

/// Where the integrity section begins, its payload, and the trailer's text.
fn places(model: &[u8]) -> (usize, usize, usize) {
    let name = position(model, b"\x09integrity");
    (name - 5, name + 10 + 8, model.iter().rposition(|byte| *byte == 0).unwrap() + 3)
}

/// Which bytes of the integrity section's payload are digests: those in which all zeros and all ones differ.
fn digest_bytes(state: &Integrity) -> impl Iterator<Item = bool> {
    let [zeros, ones] = [0, u64::MAX].map(|digest| vmstate::to_bytes(&state.with_all(digest)));
    zeros.into_iter().zip(ones).map(|(zero, one)| zero != one)
}

/// Writes the digests of what the bytes say over those that are there, and nothing else. An error says that nothing was read that far.
fn recompute(bytes: &mut [u8], (section, payload, text): (usize, usize, usize)) -> Result<(), Error> {
    let mut decoder = Decoder::file(expected());
    decoder.feed(&bytes[..section]);
    while decoder.next_event()?.is_some() {}
    if decoder.offset() != section as u64 || *decoder.parser().due() != Due::Section {
        return Ok(()); // the digests are read as something else
    }
    let length = u32::from_be_bytes(*bytes[..text].last_chunk().unwrap()) as usize;
    let trailer = digest::of_bytes(&bytes[text..bytes.len().min(text.saturating_add(length))]);
    let state: Integrity = decoder.parser_mut().digests().0.to_state(Some(trailer));
    let places = bytes[payload..].iter_mut().zip(digest_bytes(&state)).zip(vmstate::to_bytes(&state));
    places.filter(|((_, is_digest), _)| *is_digest).for_each(|((place, _), byte)| *place = byte);
    Ok(())
}

/// What became of a turned bit.
enum Fate {
    /// By the check with this name.
    Refused(String),
    Loaded,
}

/// Calls `look` with the model and every bit of it turned, and counts: turned bits, and how many were refused by which check.
fn turn_every_bit(
    model: &[u8],
    is_turned: impl Fn(usize) -> bool + Sync,
    look: impl Fn(&mut Vec<u8>, usize) -> Fate + Sync,
) -> (u64, BTreeMap<String, u64>) {
    let next = AtomicUsize::new(0);
    let work = || {
        let (mut turned, mut refused) = (0, BTreeMap::new());
        let mut bytes = model.to_vec();
        loop {
            let at = next.fetch_add(1, Ordering::Relaxed);
            if at >= model.len() {
                return (turned, refused);
            }
            for bit in (0..8).filter(|_| is_turned(at)) {
                bytes.copy_from_slice(model);
                bytes[at] ^= 1 << bit;
                turned += 1;
                if let Fate::Refused(check) = look(&mut bytes, at) {
                    *refused.entry(check).or_default() += 1;
                }
            }
        }
    };
    thread::scope(|scope| {
        let count = thread::available_parallelism().map_or(1, usize::from).min(8);
        let threads: Vec<_> = (0..count).map(|_| scope.spawn(work)).collect();
        let counts = threads.into_iter().map(|thread| thread.join().expect("it does not panic"));
        counts
            .reduce(|(mut turned, mut refused), (more, by_check)| {
                turned += more;
                by_check.into_iter().for_each(|(check, count)| *refused.entry(check).or_default() += count);
                (turned, refused)
            })
            .expect("one thread at least")
    })
}

/// The name of the check that refuses with `error`: the error's kind, and in a section the kind of the problem.
fn check(error: &Error) -> String {
    let word =
        |text: String| text.split(|one: char| !one.is_alphanumeric()).next().unwrap_or_default().to_owned();
    match error {
        Error::Section { source, .. } => format!("Section/{}", word(format!("{:?}", source.problem))),
        error => word(format!("{error:?}")),
    }
}

fn position(bytes: &[u8], part: &[u8]) -> usize {
    bytes.windows(part.len()).position(|window| window == part).expect("it is there")
}

#[test]
fn model_machine_loads_and_saves_the_same_bytes() {
    let model = model();
    assert_eq!(write(&read(&model).unwrap()), model);
    let mut recomputed = model.clone();
    recompute(&mut recomputed, places(&model)).unwrap();
    assert_eq!(recomputed, model);
}

#[test]
fn every_truncation_of_the_model_machine_is_refused() {
    let model = model();
    let places = places(&model);
    let mut under_new_digests = 0;
    for length in 0..model.len() {
        let mut bytes = model[..length].to_vec();
        let error = read(&bytes).err().expect("a shorter stream");
        assert!(matches!(error, Error::Truncated { .. }), "of {length}: {error:?}");
        // Before the trailer's text there are no digests, or nothing that they could hide.
        if length >= places.2 {
            recompute(&mut bytes, places).unwrap();
            let error = read(&bytes).err().expect("a shorter stream");
            assert!(matches!(error, Error::Truncated { .. }), "of {length}, new digests: {error:?}");
            under_new_digests += 1;
        }
    }
    println!(
        "measured: {} truncations of {} bytes, 100 % refused; and {under_new_digests} in the trailer under new digests",
        model.len(),
        model.len()
    );
}

#[test]
fn every_turned_bit_of_the_model_machine_is_refused() {
    let model = model();
    let (turned, refused) = turn_every_bit(
        &model,
        |_| true,
        |bytes, _| match read(bytes) {
            Ok(_) => Fate::Loaded,
            Err(error) => Fate::Refused(check(&error)),
        },
    );
    let count: u64 = refused.values().sum();
    println!("measured: digests as written: {count} of {turned} turned bits refused, by {refused:?}");
    assert_eq!((count, turned), (turned, model.len() as u64 * 8));
}

#[test]
fn every_turned_bit_under_new_digests_is_refused_by_its_check_or_saved_as_it_was_loaded() {
    let model = model();
    let places = places(&model);
    let page = position(&model, &page());
    let page = page..page + PAGE_BYTES;
    let state: Integrity = vmstate::from_bytes(&model[places.1..places.2 - 11], 1).unwrap();
    let digests: Vec<usize> = (places.1..)
        .zip(digest_bytes(&state))
        .filter(|(_, is_digest)| *is_digest)
        .map(|(at, _)| at)
        .collect();
    // A digest that is turned is written over; a page may hold anything, and is counted apart.
    for (what, is_counted) in [("in the page", true), ("elsewhere", false)] {
        let is_turned = |at: usize| !digests.contains(&at) && page.contains(&at) == is_counted;
        let (turned, refused) = turn_every_bit(&model, is_turned, |bytes, at| {
            match recompute(bytes, places).and_then(|()| read(bytes)) {
                Ok(said) => {
                    assert!(write(&said) == *bytes, "byte {at:#x} loads, and is saved as something else");
                    Fate::Loaded
                }
                Err(error) => Fate::Refused(check(&error)),
            }
        });
        let count: u64 = refused.values().sum();
        let share = count as f64 * 100.0 / turned as f64;
        println!(
            "measured: digests recomputed: {count} of {turned} turned bits {what} refused ({share:.1} %), the others saved as loaded; by {refused:?}"
        );
        assert!(!refused.contains_key("Damaged"), "{refused:?}");
        match is_counted {
            true => assert_eq!((count, turned), (0, 8 * PAGE_BYTES as u64)),
            false => assert!(count > turned / 2 && count < turned),
        }
    }
    let outside = 8 * (model.len() - digests.len() - PAGE_BYTES);
    println!("measured: {} bits of digests are not turned, {outside} are elsewhere", 8 * digests.len());
}
