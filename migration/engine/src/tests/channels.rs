//! Whole migrations whose guest memory goes over channels of its own.

use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use stream::frame::{HEADER_BYTES, Kind};
use transport::Connection;
use transport::faulty::{Fault, Part};

use super::migrate::{assert_moved, step, with_any_destination};
use super::mock::{Factory, Source, World};
use super::{Door, End, Ending, Play, connected, impatience, patience, patiently};
use crate::channels::replay::record;
use crate::lease::{Id, random_id};
use crate::link::Link;
use crate::protocol::{Agree, ChannelHello, Hello, Message, Properties, Query};
use crate::ram;
use crate::source::MACHINE;
use crate::{
    Compression, Context, Destination, DestinationFactory, Error, Outcome, PageBitmap, Parameters, Patience,
    SourceMachine, Statistics, features, migrate,
};

fn play(world: &World, channels: u16) -> Play {
    let mut play = Play::new(world);
    play.channels = channels;
    play
}

/// The guest runs on where it was, and both sides tell the same cause.
fn assert_stayed(world: &World, ending: &Ending) -> String {
    let Some((Outcome::Failed { paused: None, .. }, _)) = &ending.source else {
        panic!("{:?}\n{:#?}", ending.source.as_ref().map(|(outcome, _)| outcome), world.log());
    };
    world.assert_sound("stayed");
    assert_eq!(world.running(), ["source"]);
    let cause = ending.source_statistics.error.clone().unwrap();
    assert_eq!(ending.destination_statistics.error.as_ref(), Some(&cause), "both tell the same");
    cause
}

#[test]
fn a_running_guest_moves_over_any_number_of_channels() {
    for channels in [1, 2, 3, 64] {
        let world = World::new();
        let ending = play(&world, channels).run();
        assert_moved(&world, &ending);
        assert_eq!(world.running(), ["destination"]);
        let statistics = &ending.source_statistics;
        assert_eq!(statistics.channel_bytes.len(), usize::from(channels));
        let beside: u64 = statistics.channel_bytes.iter().sum();
        assert!(beside < statistics.transferred_bytes, "{statistics:?}");
        assert!(beside > 300 * 4096 && statistics.transferred_bytes - beside < 64 << 10, "{statistics:?}");
        assert!(statistics.downtime_bytes > 0 && statistics.downtime_bytes < beside, "{statistics:?}");
        assert!(statistics.zero_pages > 0 && statistics.normal_pages > 300, "{statistics:?}");
        assert_eq!(statistics.remaining_bytes, 0);
        let pages: u64 = statistics.channel_pages.iter().sum();
        assert_eq!(pages, statistics.normal_pages + statistics.zero_pages, "{statistics:?}");
        let there = &ending.destination_statistics;
        assert_eq!(there.channel_bytes, statistics.channel_bytes, "what one sends the other receives");
        assert_eq!(there.channel_pages, statistics.channel_pages);
        for statistics in [statistics, there] {
            let carried = |amounts: &[u64]| amounts.iter().map(|amount| *amount > 0).collect::<Vec<_>>();
            assert_eq!(carried(&statistics.channel_bytes_per_second()), carried(&statistics.channel_bytes));
        }
        // 600 and 40 pages are four chunks.
        let used = statistics.channel_bytes.iter().filter(|bytes| **bytes > 1000).count();
        assert!(used >= usize::from(channels).min(2), "{:?}", statistics.channel_bytes);
    }
}

/// In one channel, while the others go on.
#[test]
fn memory_that_cannot_be_filled_any_more_comes_in_another_way() {
    for fills in [0, 1, 100, 300] {
        for channels in [1, 3] {
            let world = World::new();
            world.lock().fills_before_failure = Some(fills);
            let ending = play(&world, channels).run();
            assert_moved(&world, &ending);
            assert_eq!(world.running(), ["destination"], "{fills}, {channels}");
        }
    }
}

#[test]
fn compressed_memory_is_less_and_the_same() {
    for (channels, compression) in [(1, Compression::Lz4), (1, Compression::Zstd), (2, Compression::Lz4)] {
        let world = World::new();
        let play = play(&world, channels);
        play.parameters.set_compression(compression);
        let ending = play.run();
        assert_moved(&world, &ending);
        let statistics = &ending.source_statistics;
        assert!(statistics.compressed_pages > 300, "{compression}: {statistics:?}");
        assert!(statistics.compressed_pages <= statistics.normal_pages, "{compression}: {statistics:?}");
        assert!(
            statistics.compressed_bytes < statistics.compressed_pages * 400,
            "{compression}: {statistics:?}"
        );
        assert!(statistics.transferred_bytes < 300 * 1000, "{compression}: {statistics:?}");
    }
}

#[test]
fn a_peer_that_grants_no_channels_gets_the_guest_over_the_link() {
    let world = World::new();
    let ending = play(&world, 0).run();
    assert_moved(&world, &ending);
    assert!(ending.source_statistics.channel_bytes.is_empty());
}

#[test]
fn a_paused_guest_moves_over_channels() {
    let world = World::new();
    let mut play = play(&world, 2);
    play.source.pause();
    let ending = play.run();
    assert_moved(&world, &ending);
    assert_eq!(world.running(), [""; 0]);
}

/// Plays a fault at every message of every channel, and gives each ending with what it was.
fn at_every_message(
    end: End,
    patience: Patience,
    fault: impl Fn() -> Fault,
    mut judge: impl FnMut(&World, &Ending, &str),
) {
    for dial in 1..=2 {
        for at in 0..40 {
            let (world, ending) = patiently(patience, |patience| {
                let world = World::new();
                let mut play = play(&world, 2);
                play.patience = patience;
                play.channel_fault = Some((end, dial, at, fault()));
                let ending = play.run().unless_cut_short()?;
                Some((world, ending))
            });
            let what = format!("{:?} at message {at} of the {end:?} on channel {dial}", fault());
            world.assert_sound(&what);
            if !ending.struck {
                assert_moved(&world, &ending);
                assert!(at > u32::from(end == End::Source), "{what}: too few messages");
                break;
            }
            assert!(at < 39, "{what}: too many messages");
            judge(&world, &ending, &what);
        }
    }
}

/// Whoever waits for a channel that does not come ends before the other stops listening for the reason.
fn patience_in_order() -> Patience {
    let (handshake, last_words) = (Duration::from_millis(500), Duration::from_secs(8));
    Patience { handshake, last_words, ..patience() }
}

#[test]
fn a_bit_that_is_flipped_on_a_channel_is_refused_and_the_guest_goes_on() {
    let mut refused = 0;
    for part in [Part::First, Part::Middle, Part::Last] {
        at_every_message(
            End::Source,
            patience_in_order(),
            || Fault::Damage(part),
            |world, ending, _| {
                // A page that came again was right then.
                if ending.arrived.is_some() {
                    return assert_moved(world, ending);
                }
                refused += u32::from(assert_stayed(world, ending).contains("unexpected data"));
            },
        );
    }
    assert!(refused > 20, "{refused}");
}

#[test]
fn a_channel_cut_at_any_message_leaves_the_guest_where_it_was() {
    for fault in [|| Fault::CutBefore, || Fault::CutMiddle] {
        at_every_message(End::Source, patience_in_order(), fault, |world, ending, _| {
            assert_stayed(world, ending);
        });
        at_every_message(End::Destination, patience_in_order(), fault, |world, ending, _| {
            assert_stayed(world, ending);
        });
    }
}

#[test]
fn silence_on_a_channel_leaves_the_guest_where_it_was() {
    at_every_message(
        End::Source,
        impatience(),
        || Fault::Swallow,
        |world, ending, what| {
            assert!(matches!(ending.source, Some((Outcome::Failed { paused: None, .. }, _))), "{what}");
            assert_eq!(world.running(), ["source"], "{what}");
        },
    );
}

#[test]
fn a_process_killed_by_a_thread_of_its_channels_leaves_what_the_lease_says() {
    for fault in [|| Fault::KillBefore, || Fault::KillAfter] {
        at_every_message(End::Source, patience(), fault, |world, ending, what| {
            assert!(ending.source.is_none() && ending.arrived.is_none(), "{what}");
            assert_eq!(world.running(), [""; 0], "{what}");
        });
    }
}

/// A link that takes nothing, and tells of every try.
struct Blocked(Connection, Sender<()>);

impl Read for Blocked {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Blocked {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // Preamble and hello are shorter than any batch.
        if bytes.len() < 100 {
            return self.0.write(bytes);
        }
        let _nobody_counts = self.1.send(());
        std::thread::sleep(Duration::from_millis(1));
        Err(io::ErrorKind::WouldBlock.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl transport::Link for Blocked {
    fn try_clone(&self) -> io::Result<Box<dyn transport::Link>> {
        Ok(Box::new(Self(self.0.try_clone()?, self.1.clone())))
    }
    fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.0.set_read_timeout(timeout)
    }
    fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.0.set_write_timeout(timeout)
    }
    fn shutdown(&self, how: Shutdown) -> io::Result<()> {
        self.0.shutdown(how)
    }
}

/// A destination that agrees to `channels` and then reads nothing of them, until the source goes.
fn deaf_destination(world: &World, links: &Receiver<Connection>, channels: u16) {
    let mut link = Link::new(links.recv().unwrap()).unwrap();
    link.greet(step()).unwrap();
    let Message::Hello(hello) = link.receive(step()).unwrap() else { panic!("no hello") };
    assert!(hello.features & features::CHANNELS != 0 && hello.channels == channels);
    let _built = Factory::new(world, "destination").build(&hello.description()).unwrap();
    let key = Some(crate::protocol::ChannelKey { key: [3; 16] });
    let agree = Agree { instance: [2; 16], features: features::CHANNELS, channels, key };
    link.send(&Message::Agree(agree), step()).unwrap();
    let mut open = Vec::new();
    for index in 0..channels {
        let mut channel = Link::new(links.recv().unwrap()).unwrap();
        channel.greet(step()).unwrap();
        let expected =
            ChannelHello { session: hello.session, key: [3; 16], index, purpose: ChannelHello::MEMORY };
        assert_eq!(channel.receive(step()).unwrap(), Message::Channel(expected));
        open.push(channel);
    }
    loop {
        match link.receive(step()) {
            Ok(Message::Cancel(reasons)) => {
                return assert!(reasons.sentences().concat().contains("cancelled"), "{reasons:?}");
            }
            Ok(Message::Stream | Message::Progress(_)) => {}
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_cancel_works_at_once_while_channels_are_blocked() {
    for channels in [1, 3] {
        let world = World::new();
        let mut play = play(&world, channels);
        let mut lease = world.lease("source");
        lease.claim().unwrap();
        let (links, arriving) = channel();
        let (told, tries) = channel();
        let (statistics, parameters) = (Statistics::new(), Arc::clone(&play.parameters));
        parameters.set_channels(channels);
        std::thread::scope(|scope| {
            let (world, parameters, statistics) = (&world, &parameters, &statistics);
            scope.spawn(move || deaf_destination(world, &arriving, channels));
            scope.spawn(move || {
                tries.recv().unwrap();
                assert!(parameters.cancel());
            });
            let mut dials = 0;
            let mut dial = || {
                let (near, far) = Connection::pair()?;
                links.send(far).unwrap();
                dials += 1;
                Ok(match dials {
                    1 => near,
                    _ => Connection::new(Box::new(Blocked(near, told.clone())), "blocked"),
                })
            };
            let mut context =
                Context { lease: Some(&mut lease), parameters, statistics, patience: patience() };
            let outcome = migrate(&mut play.source, &mut dial, &mut context);
            assert!(
                matches!(outcome, Outcome::Failed { error: Error::Cancelled, paused: None }),
                "{outcome:?}"
            );
        });
        assert_eq!(world.running(), ["source"]);
    }
}

/// At its limit the guest would take half a minute, on one channel or on many.
#[test]
fn the_limit_of_the_bandwidth_is_one_for_all_channels() {
    for channels in [1, 4] {
        let world = World::new();
        let mut play = play(&world, channels);
        let parameters = Arc::clone(&play.parameters);
        parameters.set_max_bandwidth(crate::Parameters::MAX_BANDWIDTH_LEAST);
        let (tally, writes) = channel();
        play.tally = Some(tally);
        play.patience.silence = Duration::from_secs(4);
        play.destination_patience = Some(patience());
        let ending = std::thread::scope(|scope| {
            scope.spawn(move || {
                // Preamble, hello, the begin of the stream with a report, and another report a second later.
                writes.iter().take(5).for_each(drop);
                parameters.cancel();
                writes.iter().for_each(drop);
            });
            play.run()
        });
        let Some((Outcome::Failed { error: Error::Cancelled, .. }, _)) = &ending.source else {
            panic!("{:?}", ending.source.as_ref().map(|(outcome, _)| outcome));
        };
        let statistics = &ending.source_statistics;
        assert!(statistics.remaining_bytes > 0 && statistics.rounds == 1, "{statistics:?}");
        // Each may have sent what it had in hand.
        let sent: u64 = statistics.channel_bytes.iter().sum();
        assert!(sent <= u64::from(channels) * (270 << 10), "{statistics:?}");
    }
}

/// A source that was granted `channels` of as many, with what it is to say on each.
fn agreed(link: &mut Link, world: &World, channels: u16) -> (Id, Id) {
    let session = random_id().unwrap();
    let description = Factory::new(world, "source").description().unwrap();
    let lease = world.lease("reader").read().unwrap().map(|record| record.lease);
    let mut hello = Hello::new(session, lease, Properties::try_from(&description).unwrap());
    (hello.features, hello.channels) = (features::CHANNELS, channels);
    link.send(&Message::Hello(Box::new(hello)), step()).unwrap();
    let Message::Agree(agree) = link.receive(step()).unwrap() else { panic!("not agreed") };
    assert_eq!((agree.features, agree.channels), (features::CHANNELS, channels));
    (session, agree.key.unwrap().key)
}

fn owned_world() -> World {
    let world = World::new();
    let mut lease = world.lease("source");
    lease.claim().unwrap();
    world
}

fn rejected(link: &mut Link) -> String {
    match link.receive(step()).unwrap() {
        Message::Reject(reasons) => reasons.sentences().concat(),
        other => panic!("{other:?}"),
    }
}

#[test]
fn channels_that_were_not_agreed_on_end_the_attempt() {
    let cases: [(&[(u16, u8)], &str); 5] = [
        (&[(0, 0), (0, 0)], "channel 0 came twice"),
        (&[(2, 0)], "channel 2 came, and 2 were agreed on"),
        (&[(u16::MAX, 0)], "channel 65535 came, and 2 were agreed on"),
        (&[(1, 9)], "channel 1 is for purpose 9"),
        (&[(0, ChannelHello::PAGES)], "channel 0 is for purpose 1"),
    ];
    for (channels, words) in cases {
        let world = owned_world();
        with_any_destination(&world, patience(), true, |connect| {
            let mut link = connect();
            let (session, key) = agreed(&mut link, &world, 2);
            let _open: Vec<_> = channels
                .iter()
                .map(|(index, purpose)| {
                    let mut channel = connect();
                    let hello = ChannelHello { session, key, index: *index, purpose: *purpose };
                    channel.send(&Message::Channel(hello), step()).unwrap();
                    channel
                })
                .collect();
            let cause = rejected(&mut link);
            assert!(cause.contains(words), "{cause}");
        });
    }
}

#[test]
fn strangers_disturb_no_attempt_and_get_no_channel() {
    let world = owned_world();
    with_any_destination(&world, patience(), true, |connect| {
        let mut link = connect();
        let (session, key) = agreed(&mut link, &world, 1);
        let _silent = connect();
        let wrong = [
            ChannelHello { session, key: [0; 16], index: 0, purpose: 0 },
            ChannelHello { session: [0; 16], key, index: 0, purpose: 0 },
        ];
        for hello in wrong {
            let mut stranger = connect();
            stranger.send(&Message::Channel(hello), step()).unwrap();
            assert!(matches!(stranger.receive(step()), Err(Error::Closed { .. })));
        }
        let mut asking = connect();
        let query = Query { session: [9; 16], instance: [9; 16] };
        asking.send(&Message::Query(query), step()).unwrap();
        assert!(matches!(asking.receive(step()), Ok(Message::Refuse(_))));
        // The attempt goes on, and what it says is heard.
        let mut channel = connect();
        let hello = ChannelHello { session, key, index: 0, purpose: 0 };
        channel.send(&Message::Channel(hello), step()).unwrap();
        let mut bytes = channel.into_connection();
        bytes.write_all(&[0xee; 16]).unwrap();
        let cause = rejected(&mut link);
        assert!(cause.contains("a batch begins with 0xee"), "{cause}");
    });
}

/// The channels have all of memory: what else touched it would wait there for ever.
#[test]
fn pages_on_the_link_beside_channels_end_the_attempt() {
    // One with contents, and one of zeros.
    for page in [7, 599] {
        let world = owned_world();
        with_any_destination(&world, patience(), true, |connect| {
            let mut link = connect();
            let (session, key) = agreed(&mut link, &world, 1);
            let mut silent = connect();
            let hello = ChannelHello { session, key, index: 0, purpose: ChannelHello::MEMORY };
            silent.send(&Message::Channel(hello), step()).unwrap();
            let source = Source::new(&world, "source");
            let blocks = source.ram_blocks();
            let mut pages: Vec<_> =
                blocks.iter().map(|block| PageBitmap::for_bytes(block.length_bytes())).collect();
            pages[0].set(page);
            let statistics = Statistics::new();
            let mut stream = ram::Sender::start(Vec::new(), MACHINE, &blocks, &statistics, "test").unwrap();
            stream.round(&pages).unwrap();
            let bytes = std::mem::take(stream.out());
            link.send_frame(Kind::Stream, &mut [&[0; HEADER_BYTES], bytes.as_slice()].concat(), step())
                .unwrap();
            let cause = rejected(&mut link);
            assert!(cause.contains("a page came on the link"), "{page}: {cause}");
        });
    }
}

/// On its link the source says something now and then only.
#[test]
fn memory_is_seen_to_come_as_soon_as_it_does() {
    let world = &owned_world();
    let (links, arriving) = channel();
    let (told, seen) = channel();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let statistics = Statistics::with_listener(move |status| {
                let _nobody_looks_any_more = told.send(status.name());
            });
            let (parameters, mut lease) = (Parameters::new(), world.lease("destination"));
            let mut factory = Factory::new(world, "destination");
            let mut destination =
                Destination::new(Some(&mut lease), &statistics, impatience(), &parameters).unwrap();
            let first: Connection = arriving.recv().unwrap();
            assert!(destination.serve_with(&mut factory, first, &Door(&arriving)).is_none());
        });
        let connect = || connected(&links);
        let mut link = connect();
        let (session, key) = agreed(&mut link, world, 1);
        let mut memory = connect();
        let hello = ChannelHello { session, key, index: 0, purpose: ChannelHello::MEMORY };
        memory.send(&Message::Channel(hello), step()).unwrap();
        let source = Source::new(world, "source");
        let mut pages: Vec<_> =
            source.ram_blocks().iter().map(|block| PageBitmap::for_bytes(block.length_bytes())).collect();
        pages[0].set(7);
        let batch = record(&source.ram_blocks(), &[&pages], Compression::None, 0, 1).unwrap();
        memory.into_connection().write_all(&batch).unwrap();
        let told: Vec<_> = seen.iter().take(2).collect();
        assert_eq!(told, ["setup", "active"], "and not the end of its patience");
    });
}

/// Its own attempt before may have been lost a moment ago, and the destination does not know yet.
#[test]
fn a_source_that_comes_while_another_guest_may_arrive_is_heard_when_that_one_does_not() {
    let world = owned_world();
    let uri: transport::Uri = format!("unix:{}", world.path("door").display()).parse().unwrap();
    let listener = transport::Listener::bind(&uri).unwrap();
    let connect = || {
        let mut link = Link::new(uri.connect(patience().connect).unwrap()).unwrap();
        link.greet(step()).unwrap();
        link
    };
    let (statistics, parameters) = (Statistics::new(), Parameters::new());
    std::thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            let mut lease = world.lease("destination");
            let mut factory = Factory::new(&world, "destination");
            let mut destination =
                Destination::new(Some(&mut lease), &statistics, patience(), &parameters).unwrap();
            destination.receive(&mut factory, &listener).unwrap().is_some()
        });
        let mut first = connect();
        agreed(&mut first, &world, 1);
        let mut others = [connect(), connect()];
        for (session, other) in others.iter_mut().enumerate() {
            let description = Factory::new(&world, "other").description().unwrap();
            let hello = Hello::new([session as u8; 16], None, Properties::try_from(&description).unwrap());
            other.send(&Message::Hello(Box::new(hello)), step()).unwrap();
        }
        drop(first);
        // Whichever is heard first: the next is when that one has gone.
        let heard = others.map(|mut other| scope.spawn(move || other.receive(step())));
        let answers = heard.map(|heard| heard.join().unwrap());
        parameters.cancel();
        assert!(!receiving.join().unwrap());
        for answer in answers {
            let Ok(Message::Refuse(reasons)) = answer else { panic!("not heard: {answer:?}") };
            assert!(reasons.sentences().concat().contains("the source has none"), "{reasons:?}");
        }
    });
}

#[test]
fn channels_that_do_not_come_do_not_hold_the_destination() {
    let world = owned_world();
    // What comes before takes a thousandth of it.
    let patience = Patience { handshake: Duration::from_secs(3), ..patience() };
    with_any_destination(&world, patience, true, |connect| {
        let mut link = connect();
        agreed(&mut link, &world, 3);
        let cause = rejected(&mut link);
        assert!(cause.contains("more than 3s while waiting for data channels"), "{cause}");
    });
}

#[test]
fn a_source_that_is_granted_what_it_did_not_ask_for_goes_away() {
    let ask = |agree: fn(Agree) -> Agree| {
        let parameters = crate::Parameters::new();
        let agree = agree(Agree { instance: [1; 16], features: 0, channels: 1, key: None });
        let mut nobody = || -> Result<Connection, Error> { panic!("no channel is opened") };
        crate::channels::source::open(&agree, [2; 16], &mut nobody, &parameters, step())
    };
    let key = || Some(crate::protocol::ChannelKey { key: [3; 16] });
    assert!(ask(|agree| agree).unwrap().is_none());
    let refused = |agree: fn(Agree) -> Agree| ask(agree).err().unwrap().chain();
    assert!(refused(|agree| Agree { features: features::LZ4, ..agree }).contains("never offered"));
    assert!(refused(|agree| Agree { features: features::CHANNELS, ..agree }).contains("without a key"));
    for channels in [0, crate::CHANNELS_DEFAULT + 1, u16::MAX] {
        let agree = Agree { instance: [1; 16], features: features::CHANNELS, channels, key: key() };
        let mut nobody = || -> Result<Connection, Error> { panic!("no channel is opened") };
        let parameters = crate::Parameters::new();
        let result = crate::channels::source::open(&agree, [2; 16], &mut nobody, &parameters, step());
        assert!(result.err().unwrap().chain().contains("channels were granted"), "{channels}");
    }
}
