//! Sources that never come to an end: they hold a destination only as long as it puts up with them.

use std::io::Write;
use std::time::Duration;

use stream::frame::{HEADER_BYTES, Kind};
use transport::Connection;

use super::disks::{IMAGES, Images};
use super::migrate::step;
use super::mock::{Factory, Source, World};
use super::{Door, connected, impatience, patiently};
use crate::channels::replay::record;
use crate::lease::Id;
use crate::link::Link;
use crate::postcopy::Missing;
use crate::protocol::{Agree, ChannelHello, Hello, Message, Progress, Properties};
use crate::ram::Sender;
use crate::source::MACHINE;
use crate::storage::{BLOCK_BYTES, replay};
use crate::{
    Compression, Description, Destination, DestinationFactory, PageBitmap, Parameters, Patience, RamBlock,
    SourceMachine, Statistics, features,
};

const SESSION: Id = [1; 16];

/// What a source says again and again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Again {
    /// A page, in the stream.
    Page,
    /// A batch, on a channel.
    Batch,
    /// A block of an image.
    Block,
    /// That a page is to follow, which is to be dropped.
    Missing,
}

/// One page of the guest's.
fn page_of(source: &Source) -> (Vec<RamBlock>, Vec<PageBitmap>) {
    let blocks = source.ram_blocks();
    let mut pages: Vec<_> = blocks.iter().map(|block| PageBitmap::for_bytes(block.length_bytes())).collect();
    pages[0].set(7);
    (blocks, pages)
}

/// The channel that was agreed on, and the batch that goes there.
fn channel(agree: &Agree, connect: &mut dyn FnMut() -> Link, source: &Source) -> (Connection, Vec<u8>) {
    let mut link = connect();
    let key = agree.key.as_ref().unwrap().key;
    let hello = ChannelHello { session: SESSION, key, index: 0, purpose: ChannelHello::MEMORY };
    link.send(&Message::Channel(hello), step()).unwrap();
    let (blocks, pages) = page_of(source);
    let mut batch = record(&blocks, &[&pages], Compression::None, 0, 1).unwrap();
    // The end of the channel: a head and a digest.
    batch.truncate(batch.len() - 24);
    (link.into_connection(), batch)
}

/// Says it until the destination says something. How often that was, and what it said.
fn say(
    again: Again,
    mut link: Link,
    agree: &Agree,
    connect: &mut dyn FnMut() -> Link,
    world: &World,
) -> (u64, Message) {
    let source = Source::new(world, "source");
    let (blocks, pages) = page_of(&source);
    let statistics = Statistics::new();
    let mut stream = Sender::start(Vec::new(), MACHINE, &blocks, &statistics, "test").unwrap();
    let mut channel = (again == Again::Batch).then(|| channel(agree, connect, &source));
    // Each takes a fiftieth of a second, in which an answer may come: far longer than any patience of this test.
    for times in 1..10_000 {
        // Whether it is taken is seen by whether an answer comes.
        let _sent = match again {
            Again::Page => {
                stream.round(&pages).unwrap();
                let bytes = std::mem::take(stream.out());
                link.send_frame(Kind::Stream, &mut [&[0; HEADER_BYTES], bytes.as_slice()].concat(), step())
            }
            Again::Batch => {
                let (connection, batch) = channel.as_mut().unwrap();
                let _taken = connection.write_all(batch);
                link.send(&Message::Progress(Progress::default()), step())
            }
            Again::Block => {
                let block = replay::data(0, 3 * BLOCK_BYTES, &[7; BLOCK_BYTES as usize]);
                link.send_frame(Kind::Blocks, &mut [&[0; HEADER_BYTES], block.as_slice()].concat(), step())
            }
            Again::Missing => {
                Missing::of(&pages).try_for_each(|missing| link.send(&Message::Missing(missing), step()))
            }
        };
        if link.is_spoken_to(step()).unwrap() {
            return (times, link.receive(step()).unwrap());
        }
    }
    panic!("{again:?}: it is heard for ever")
}

/// What such a source hears in the end, and after how many times.
fn ends(again: Again, patience: Patience) -> (u64, String) {
    let world = if again == Again::Block { World::with_images_of_each() } else { World::new() };
    let (links, arriving) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        let world = &world;
        let receiving = scope.spawn(move || {
            let mut factory = Factory::new(world, "destination");
            factory.images = (again == Again::Block).then(|| Images::none(world, "destination"));
            let (parameters, statistics) = (Parameters::new(), Statistics::new());
            let mut destination = Destination::new(None, &statistics, patience, &parameters).unwrap();
            let first: Connection = arriving.recv().unwrap();
            assert!(destination.serve_with(&mut factory, first, &Door(&arriving)).is_none());
            statistics.snapshot().error.unwrap()
        });
        let mut connect = || connected(&links);
        let mut link = connect();
        let mut description: Description = Factory::new(world, "source").description().unwrap();
        if again == Again::Block {
            IMAGES.iter().for_each(|(name, length)| {
                description.set(format!("storage.{name}.length_bytes"), length);
                description.set(format!("storage.{name}.format"), "raw");
            });
        }
        let mut hello = Hello::new(SESSION, None, Properties::try_from(&description).unwrap());
        hello.features = match again {
            Again::Batch => features::CHANNELS,
            Again::Block => features::STORAGE,
            Again::Page | Again::Missing => 0,
        };
        link.send(&Message::Hello(Box::new(hello)), step()).unwrap();
        let Message::Agree(agree) = link.receive(step()).unwrap() else { panic!("it agrees") };
        let (times, answer) = say(again, link, &agree, &mut connect, world);
        let Message::Reject(reasons) = answer else { panic!("{again:?}: {answer:?}") };
        let theirs = receiving.join().unwrap();
        assert_eq!(reasons.sentences(), [theirs.as_str()], "both tell the same");
        (times, theirs)
    })
}

#[test]
fn a_source_that_says_the_same_for_ever_is_refused_in_the_end() {
    for again in [Again::Page, Again::Batch, Again::Block, Again::Missing] {
        let impatience = Patience { repetition: Duration::from_millis(100), ..impatience() };
        let (times, cause) = patiently(impatience, |patience| {
            let (times, cause) = ends(again, patience);
            // On a host with other work it is the source that is too slow.
            let is_slow = cause.contains("took more than") || times < 4;
            (!is_slow).then_some((times, cause))
        });
        assert!(cause.contains("the guest did not come within"), "{again:?}, {times} times: {cause}");
        let came = match again {
            Again::Page | Again::Batch => crate::PAGE_BYTES,
            Again::Block => BLOCK_BYTES,
            Again::Missing => 0,
        };
        let figures = |times: u64| {
            format!(
                " {} bytes of its memory and images came, {} of them again",
                times * came,
                (times.max(1) - 1) * came
            )
        };
        assert!(
            (0..=times).any(|times| cause.contains(&figures(times))),
            "{again:?}, {times} times: {cause}"
        );
    }
}
