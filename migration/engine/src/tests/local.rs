//! Memory that goes itself: when it does, who may write to it when, and what a destination refuses to take for it.

use std::fs::File;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};

use super::migrate::{assert_moved, step, with_destination};
use super::mock::{Source, Trouble, World};
use super::{Ending, Play, patience};
use crate::lease::State;
use crate::link::Link;
use crate::protocol::{Commit, Hello, MemoryBlocks, Message, Prepare, Properties};
use crate::{
    Context, MemoryDescriptors, Outcome, Parameters, RamBlock, SaveFor, SourceMachine, Statistics, features,
};

/// All blocks of the mock machine.
const RAM_BYTES: u64 = 640 * 4096;

pub fn local(world: &World) -> Play {
    let mut play = Play::new(world);
    play.source.passes_memory = true;
    play.parameters.set_local(true);
    play
}

#[test]
fn the_memory_itself_moves_and_nothing_of_it_is_sent() {
    let world = World::new();
    let mut play = local(&world);
    play.source.preparation = Some(Box::new(|guest| guest.write(0, 300, 0xabcd)));
    let ending = play.run();
    assert_moved(&world, &ending);
    assert_eq!(world.running(), ["destination"]);
    for statistics in [&ending.source_statistics, &ending.destination_statistics] {
        assert_eq!((statistics.handed_over_bytes, statistics.total_bytes), (RAM_BYTES, RAM_BYTES));
        assert_eq!((statistics.rounds, statistics.normal_pages, statistics.zero_pages), (0, 0, 0));
        assert!(statistics.transferred_bytes < 4096, "{statistics:?}");
    }
    let (_, source) = ending.source.as_ref().unwrap();
    source.guest.write(1, 3, 0x1234);
    assert!(
        source.guest.contents() == ending.arrived.as_ref().unwrap().machine.0.contents(),
        "what one writes the other sees"
    );
}

#[test]
fn it_can_be_read_before_the_stop_and_written_when_the_lease_says_so() {
    let world = World::new();
    local(&world).run();
    let log = world.log();
    let wanted = [
        "destination: build",
        "destination: map memory",
        "destination: adopt image files",
        "source: prepare stop",
        "source: stop",
        "source: save",
        "destination: load",
        "source: release image",
        "destination: take image",
        "destination: open image",
        "destination: adopt memory",
        "destination: start",
        "destination: runs",
        "source: finish",
    ];
    let mut rest = log.iter();
    for step in wanted {
        assert!(rest.any(|entry| entry == step), "{step} is missing or early in {log:#?}");
    }
    for step in ["source: start tracking", "source: populated", "source: collect"] {
        assert!(!log.iter().any(|entry| entry == step), "{step}: there are no rounds");
    }
}

#[test]
fn a_step_that_fails_leaves_the_source_running_with_its_memory_as_it_was() {
    for (step, both_know) in [
        ("map memory", true),
        ("adopt image files", true),
        ("load", true),
        ("take image", true),
        ("adopt memory", true),
    ] {
        let world = World::new();
        let mut play = local(&world);
        play.factory.trouble = Some(Trouble::Fail(step));
        let ending = play.run();
        world.assert_sound(step);
        assert_eq!(world.running(), ["source"], "{step}");
        let cause = ending.source_statistics.error.unwrap();
        assert!(cause.contains(&format!("{step} fails")), "{step}: {cause}");
        assert_eq!(ending.destination_statistics.error == Some(cause), both_know, "{step}");
    }
    for (step, stopped) in
        [("map memory", false), ("adopt image files", false), ("load", true), ("adopt memory", true)]
    {
        let world = World::new();
        let mut play = local(&world);
        play.factory.trouble = Some(Trouble::Kill(step));
        let ending = play.run();
        world.assert_sound(step);
        assert!(ending.destination_killed, "{step}");
        assert_eq!(world.running(), ["source"], "{step}");
        let was_stopped = world.log().iter().any(|entry| entry == "source: stop");
        assert_eq!(was_stopped, stopped, "{step}");
    }
}

/// Contents are sent, in rounds, wherever the memory itself cannot go or is not to.
fn is_copied(why: &str, prepare: impl FnOnce(&mut Play)) -> Ending {
    let world = World::new();
    let mut play = local(&world);
    prepare(&mut play);
    let ending = play.run();
    assert_moved(&world, &ending);
    let statistics = &ending.source_statistics;
    assert_eq!(
        (statistics.handed_over_bytes, ending.destination_statistics.handed_over_bytes),
        (0, 0),
        "{why}"
    );
    assert!(statistics.rounds >= 2 && statistics.normal_pages > 300, "{why}: {statistics:?}");
    ending
}

#[test]
fn contents_are_sent_where_the_memory_itself_cannot_go() {
    is_copied("the user wants a copy", |play| play.parameters.set_local(false));
    is_copied("a machine that has none to pass", |play| play.source.passes_memory = false);
    is_copied("a machine that takes none", |play| play.factory.takes_memory = false);
    is_copied("a tunnel", |play| play.tunnel = true);
}

/// A source by hand, up to AGREE.
pub struct Hand {
    pub link: Link,
    pub source: Source,
}

impl Hand {
    fn agreed(connect: &mut dyn FnMut() -> Link, world: &World, token: bool) -> (Self, u64) {
        Self::agreed_on(features::LOCAL, connect, world, token)
    }

    /// The same with an offer of these features.
    pub fn agreed_on(
        features: u64,
        connect: &mut dyn FnMut() -> Link,
        world: &World,
        token: bool,
    ) -> (Self, u64) {
        let mut source = Source::new(world, "source");
        source.passes_memory = true;
        let mut link = connect();
        let description = Properties::try_from(&source.description().unwrap()).unwrap();
        let lease = world.lease("reader").read().unwrap().map(|record| record.lease);
        let mut hello = Hello::new([1; 16], lease, description);
        hello.features = features;
        let tokens: Vec<_> = token.then(|| eventfd(0, EventfdFlags::CLOEXEC).unwrap()).into_iter().collect();
        link.send_with(&Message::Hello(Box::new(hello)), &tokens, step()).unwrap();
        match link.receive(step()).unwrap() {
            Message::Agree(agree) => (Self { link, source }, agree.features),
            other => panic!("{other:?}"),
        }
    }

    fn descriptors(&mut self) -> Vec<MemoryDescriptors> {
        self.source.memory_descriptors().unwrap().unwrap()
    }

    pub fn readable(&mut self) -> Vec<OwnedFd> {
        self.descriptors().into_iter().map(|block| block.readable).collect()
    }

    fn writable(&mut self) -> Vec<OwnedFd> {
        self.descriptors().into_iter().map(|block| block.writable).collect()
    }

    pub fn passes(&mut self, blocks: &[RamBlock], descriptors: &[OwnedFd]) -> Message {
        self.link.send_with(&Message::Memory(MemoryBlocks::new(blocks)), descriptors, step()).unwrap();
        self.link.receive(step()).unwrap()
    }

    /// Sends the devices, and a page of each block beside them if `pages` says so.
    fn sends(&mut self, pages: bool) -> Message {
        let (parameters, statistics) = (Parameters::new(), Statistics::new());
        let patience = patience();
        let context = Context { lease: None, parameters: &parameters, statistics: &statistics, patience };
        let blocks = if pages { self.source.ram_blocks() } else { Vec::new() };
        let sink = crate::sink::Sink::new(&mut self.link, &context);
        let mut ram = crate::ram::Sender::start(sink, "ferry", &blocks, &statistics, "test").unwrap();
        let bitmaps: Vec<_> = blocks
            .iter()
            .map(|block| {
                let mut bitmap = crate::PageBitmap::for_bytes(block.length_bytes());
                bitmap.set_bytes(0..4096);
                bitmap
            })
            .collect();
        ram.last_round(&bitmaps).unwrap();
        for section in self.source.save_devices(SaveFor::Connection).unwrap() {
            ram.device(&section).unwrap();
        }
        let digest = ram.finish_live().unwrap();
        let prepare = Message::Prepare(Prepare { digest, running: true });
        let _it_may_have_been_rejected_already = self.link.send(&prepare, step());
        self.link.receive(step()).unwrap()
    }
}

pub fn reason(answer: Message) -> String {
    match answer {
        Message::Reject(reasons) => reasons.sentences().join("; "),
        Message::Never(never) => String::from(&never.reason),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_hello_whose_token_did_not_arrive_is_granted_nothing() {
    let world = World::new();
    world.lease("source").claim().unwrap();
    for token in [true, false] {
        with_destination(&world, patience(), |connect| {
            let (_hand, features) = Hand::agreed(connect, &world, token);
            assert_eq!(features & features::LOCAL != 0, token);
        });
    }
}

#[test]
fn memory_that_is_not_this_machines_is_refused() {
    type Change = fn(&mut Vec<RamBlock>, &mut Vec<OwnedFd>);
    let cases: [(&str, Change); 6] = [
        ("1 descriptors of memory came for 2 blocks", |_, descriptors| drop(descriptors.pop())),
        ("0 descriptors of memory came for 2 blocks", |_, descriptors| descriptors.clear()),
        ("3 descriptors of memory came for 2 blocks", |_, descriptors| {
            descriptors.push(eventfd(0, EventfdFlags::CLOEXEC).unwrap());
        }),
        ("1 blocks of memory came, this machine has 2", |blocks, _| drop(blocks.pop())),
        ("no memory came for block \"namespace\"", |blocks, _| blocks[1].name = "other".to_owned()),
        ("memory block \"namespace\" has 163840 bytes here, 2457600 came", |blocks, _| {
            blocks[1].mapping = std::sync::Arc::clone(&blocks[0].mapping);
        }),
    ];
    for (expected, change) in cases {
        let world = World::new();
        world.lease("source").claim().unwrap();
        let arrived = with_destination(&world, patience(), |connect| {
            let (mut hand, _) = Hand::agreed(connect, &world, true);
            let (mut blocks, mut descriptors) = (hand.source.ram_blocks(), hand.readable());
            change(&mut blocks, &mut descriptors);
            let reason = reason(hand.passes(&blocks, &descriptors));
            assert!(reason.contains(expected), "{expected}: {reason}");
        });
        assert!(arrived.is_none());
    }
}

#[test]
fn a_page_of_memory_that_was_handed_over_is_refused_and_not_written() {
    let world = World::new();
    world.lease("source").claim().unwrap();
    with_destination(&world, patience(), |connect| {
        let (mut hand, _) = Hand::agreed(connect, &world, true);
        let (blocks, descriptors) = (hand.source.ram_blocks(), hand.readable());
        assert_eq!(hand.passes(&blocks, &descriptors), Message::Mapped);
        let reason = reason(hand.sends(true));
        assert!(reason.contains("RAM in bytes: 2621440 is above 0"), "{reason}");
    });
}

/// The offer is there and the guest could be had, but not its memory: then it is not taken.
#[test]
fn a_commit_without_the_memory_that_was_mapped_takes_nothing() {
    type Change = fn(&mut Vec<OwnedFd>, &mut Hand);
    let cases: [(&str, Change); 4] = [
        ("0 descriptors of memory came for 2 blocks", |descriptors, _| descriptors.clear()),
        ("another memory came for namespace", |descriptors, _| descriptors.swap(0, 1)),
        ("another memory came for namespace", |descriptors, hand| *descriptors = hand.readable()),
        ("another memory came for namespace", |descriptors, _| {
            let file = File::open(format!("/proc/self/fd/{}", descriptors[0].as_raw_fd())).unwrap();
            descriptors[1] = file.into();
        }),
    ];
    for (expected, change) in cases {
        let world = World::new();
        let mut lease = world.lease("source");
        lease.claim().unwrap();
        let arrived = with_destination(&world, patience(), |connect| {
            let (mut hand, _) = Hand::agreed(connect, &world, true);
            let (blocks, descriptors) = (hand.source.ram_blocks(), hand.readable());
            assert_eq!(hand.passes(&blocks, &descriptors), Message::Mapped);
            let answer = hand.sends(false);
            assert!(matches!(answer, Message::Prepared(_)), "{answer:?}");
            hand.source.release_image_locks().unwrap();
            let generation = lease.offer(&[1; 16], "destination").unwrap();
            let mut descriptors = hand.writable();
            change(&mut descriptors, &mut hand);
            let commit = Message::Commit(Commit { session: [1; 16], generation });
            hand.link.send_with(&commit, &descriptors, step()).unwrap();
            let reason = reason(hand.link.receive(step()).unwrap());
            assert!(reason.contains(expected), "{expected}: {reason}");
        });
        assert!(arrived.is_none(), "{expected}");
        let record = lease.read().unwrap().unwrap();
        assert!(matches!(record.state, State::Offered { .. }), "{expected}: {record}");
        world.assert_sound(expected);
    }
}

/// A guest that came so goes on so.
#[test]
fn a_guest_that_was_handed_over_can_be_handed_over_again() {
    let world = World::new();
    let Ending { arrived, .. } = local(&world).run();
    let mut play = Play::new(&World::new());
    play.with_lease = false;
    play.world = world.clone();
    play.source = Source::arrived(arrived.unwrap().machine);
    play.source.passes_memory = true;
    play.parameters.set_local(true);
    play.factory = super::mock::Factory::new(&world, "third");
    let ending = play.run();
    assert!(matches!(ending.source, Some((Outcome::Completed { note: None }, _))));
    assert_eq!(ending.source_statistics.handed_over_bytes, RAM_BYTES);
    assert_eq!(world.running(), ["third"]);
    world.assert_sound("twice");
}
