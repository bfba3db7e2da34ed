//! What must go well, and what must be refused.

use std::time::{Duration, Instant};

use transport::Connection;
use transport::faulty::Gate;

use super::mock::{Factory, Source, World};
use super::{End, Ending, Play, impatience, patience};
use crate::lease::{State, random_id};
use crate::link::{Link, Step};
use crate::moment::Moment;
use crate::protocol::{Commit, Hello, Message, Progress, Properties, Query};
use crate::{
    Arrived, Context, Destination, Error, Outcome, Parameters, Patience, RunState, SourceMachine, Statistics,
    Status,
};

/// The guest runs at the destination with the RAM and the device that it had.
pub fn assert_moved(world: &World, ending: &Ending) {
    let Some((Outcome::Completed { note: None }, source)) = &ending.source else {
        panic!("{:?}\n{:#?}", ending.source.as_ref().map(|(outcome, _)| outcome), world.log());
    };
    let arrived = ending.arrived.as_ref().unwrap();
    assert!(source.finished && arrived.acknowledged && arrived.error.is_none());
    assert!(source.guest.contents() == arrived.machine.0.contents(), "RAM differs");
    assert_eq!(source.guest.device, arrived.machine.0.device);
    world.assert_sound("moved");
}

#[test]
fn a_running_guest_moves_with_all_it_wrote() {
    let world = World::new();
    let ending = Play::new(&world).run();
    assert_moved(&world, &ending);
    assert_eq!(world.running(), ["destination"]);
    assert_eq!(world.image_holder().as_deref(), Some("destination"));
    let record = world.lease("reader").read().unwrap().unwrap();
    assert_eq!((record.generation, record.owner.vm.as_str()), (2, "destination"));
    assert!(matches!(record.state, State::Taken { .. }));

    let (source, destination) = (&ending.source_statistics, &ending.destination_statistics);
    assert_eq!((source.status, destination.status), (Status::Completed, Status::Completed));
    assert!(source.rounds >= 2, "{source:?}");
    assert!(source.zero_pages > 0 && source.normal_pages > 300);
    assert_eq!(source.total_bytes, 640 * 4096);
    let state = vmstate::to_bytes(&ending.arrived.as_ref().unwrap().machine.0.device);
    assert_eq!((source.device_bytes, destination.device_bytes), (state.len() as u64, state.len() as u64));
    assert_eq!(destination.downtime, source.downtime, "both sides tell the same figures");
    assert!(!source.downtime.total.is_zero());
}

#[test]
fn the_stop_is_made_in_the_order_of_the_design() {
    let world = World::new();
    Play::new(&world).run();
    let log = world.log();
    let wanted = [
        "source: describe",
        "destination: build",
        "source: start tracking",
        "source: populated",
        "source: collect",
        "source: stop",
        "source: save",
        "source: collect",
        "destination: load",
        "source: release image",
        "destination: take image",
        "destination: open image",
        "destination: start",
        "destination: runs",
        "source: finish",
    ];
    let mut rest = log.iter();
    for step in wanted {
        assert!(rest.any(|entry| entry == step), "{step} is missing or early in {log:#?}");
    }
    let quiesced = log.iter().position(|entry| entry == "source: quiesce").unwrap();
    let released = log.iter().position(|entry| entry == "source: release image").unwrap();
    assert!(quiesced < released);
}

#[test]
fn on_one_host_the_stop_ends_when_the_guest_ran_and_not_when_the_word_came() {
    let world = World::new();
    let before = Moment::of(Instant::now()).unwrap();
    let ending = Play::new(&world).run();
    assert_moved(&world, &ending);
    let ran = ending.arrived.unwrap().running.ran.unwrap();
    let total = ending.source_statistics.downtime.total;
    let until_it_ran = Duration::from_nanos(ran.monotonic_ns - before.monotonic_ns);
    assert!(!total.is_zero() && total < until_it_ran, "{total:?} of {until_it_ran:?}");

    let world = World::new();
    let mut play = Play::new(&world);
    play.factory.host = "there";
    let ending = play.run();
    assert_moved(&world, &ending);
    assert_eq!(ending.arrived.unwrap().running.ran, None, "its clock says nothing here");
    assert!(!ending.source_statistics.downtime.total.is_zero());
}

/// The description of a machine with thousands of namespaces is longer than a frame may be.
#[test]
fn a_large_machine_moves_as_a_small_one() {
    let world = World::new();
    world.enlarge_machines(30_000);
    let ending = Play::new(&world).run();
    assert_moved(&world, &ending);
    assert_eq!(world.running(), ["destination"]);
}

#[test]
fn a_machine_that_cannot_be_described_does_not_even_connect() {
    let world = World::new();
    world.enlarge_machines(300_000);
    let ending = Play::new(&world).run();
    let cause = ending.source_statistics.error.unwrap();
    assert!(cause.contains("300004 properties, more than the 262144"), "{cause}");
    assert_eq!(ending.destination_statistics.status, Status::None);
    assert_eq!(world.running(), ["source"]);
}

#[test]
fn a_paused_guest_arrives_paused() {
    let world = World::new();
    let mut play = Play::new(&world);
    play.source.pause();
    let ending = play.run();
    assert_moved(&world, &ending);
    assert_eq!(ending.arrived.unwrap().state, RunState::Paused);
    assert_eq!(world.running(), [""; 0]);
}

/// While the images are written back the guest dirties all of its memory: it is not stopped for that.
#[test]
fn what_the_guest_dirties_while_the_stop_is_prepared_is_sent_before_the_stop() {
    let world = World::new();
    let mut play = Play::new(&world);
    let mut preparations = 0;
    play.source.preparation = Some(Box::new(move |guest| {
        preparations += 1;
        if preparations == 1 {
            (0..600).for_each(|page| guest.write(0, page, 77_000 + page));
        }
    }));
    let ending = play.run();
    assert_moved(&world, &ending);
    let statistics = &ending.source_statistics;
    assert!(statistics.downtime_bytes < 200 * 4096, "{statistics:?}");
    let prepared = world.log().iter().filter(|entry| *entry == "source: prepare stop").count();
    assert_eq!(prepared, 2);
}

#[test]
fn a_guest_that_dirties_too_much_during_every_preparation_moves_all_the_same() {
    let world = World::new();
    let mut play = Play::new(&world);
    play.source.preparation =
        Some(Box::new(|guest| (0..600).for_each(|page| guest.write(0, page, 77_000 + page))));
    let ending = play.run();
    assert_moved(&world, &ending);
    let prepared = world.log().iter().filter(|entry| *entry == "source: prepare stop").count();
    assert_eq!(prepared, 3);
}

/// The destination would give up a silent source.
#[test]
fn a_source_that_writes_back_its_images_for_long_says_that_it_lives() {
    let world = World::new();
    let mut play = Play::new(&world);
    play.destination_patience = Some(patience());
    play.patience.silence = std::time::Duration::from_secs(2);
    let (tally, writes) = std::sync::mpsc::channel();
    play.tally = Some(tally);
    play.source.preparation = Some(Box::new(move |_| {
        while writes.try_recv().is_ok() {}
        for _ in 0..2 {
            writes.recv_timeout(patience().silence).expect("a sign of life");
        }
    }));
    let ending = play.run();
    assert_moved(&world, &ending);
}

#[test]
fn every_reason_of_a_refusal_is_told_before_ram_moves() {
    let world = World::new();
    let mut play = Play::new(&world);
    play.factory.cpus = 4;
    play.factory.less_ram = true;
    let ending = play.run();
    let Some((Outcome::Failed { error: Error::Refused { reasons }, paused: None }, _)) = &ending.source
    else {
        panic!("{:?}", ending.source.map(|(outcome, _)| outcome));
    };
    assert_eq!(
        *reasons,
        [
            "cpus: the source has 2, the destination 4",
            "ram.namespace: the source has length_bytes=163840, the destination has no such thing",
        ]
    );
    assert_eq!(ending.source_statistics.error, ending.destination_statistics.error);
    assert_eq!(ending.source_statistics.normal_pages, 0);
    assert_eq!(world.running(), ["source"]);
    assert!(!world.log().iter().any(|entry| entry == "destination: build"));
}

#[test]
fn another_lease_is_refused() {
    let (world, other) = (World::new(), World::new());
    other.lease("stranger").claim().unwrap();
    let mut play = Play::new(&world);
    play.destination_lease = Some(other.lease("destination"));
    let ending = play.run();
    let cause = ending.source_statistics.error.unwrap();
    assert!(cause.contains("is not the file that the source has"), "{cause}");
    assert_eq!(world.running(), ["source"]);
}

#[test]
fn a_blocked_machine_does_not_even_connect() {
    let world = World::new();
    let mut play = Play::new(&world);
    play.source.blockers = vec!["a passed-through disk".to_owned(), "a debugger".to_owned()];
    let ending = play.run();
    let cause = ending.source_statistics.error.unwrap();
    assert_eq!(cause, "this machine cannot migrate: a passed-through disk; a debugger");
    assert_eq!(ending.destination_statistics.status, Status::None);
    assert_eq!(world.running(), ["source"]);
}

/// The user cancels while a message of the source waits at a gate; then the gate opens.
#[test]
fn cancel_works_at_every_message_until_commit() {
    let mut refused_at = None;
    for at in 0..40 {
        let world = World::new();
        let mut play = Play::new(&world);
        let (gate, fault) = Gate::new();
        play.fault = Some((End::Source, at, fault));
        let parameters = std::sync::Arc::clone(&play.parameters);
        let canceller = std::thread::spawn(move || {
            let accepted = gate.wait(std::time::Duration::from_secs(30)) && parameters.cancel();
            gate.open();
            accepted
        });
        let ending = play.run();
        let accepted = canceller.join().unwrap();
        world.assert_sound(&format!("cancel at {at}"));
        if accepted {
            assert_eq!(refused_at, None, "cancel works again after COMMIT");
            let source = ending.source.unwrap();
            assert!(matches!(source.0, Outcome::Failed { error: Error::Cancelled, paused: None }), "{at}");
            assert_eq!(ending.source_statistics.status, Status::Cancelled);
            assert_eq!(ending.source_statistics.error.as_deref(), Some("migration cancelled"), "{at}");
            // What the destination hears may be the link's end, if the source had not yet said what it wants.
            let theirs = ending.destination_statistics.error;
            assert!(theirs.is_none_or(|cause| cause == "migration cancelled"), "{at}");
            assert_eq!(world.running(), ["source"], "{at}");
            let record = world.lease("reader").read().unwrap().unwrap();
            assert_eq!(record.state, State::Owned);
        } else {
            assert_moved(&world, &ending);
            refused_at = refused_at.or(Some(at));
            if !ending.struck {
                break;
            }
        }
    }
    assert!(refused_at.unwrap() > 5, "{refused_at:?}");
}

#[test]
fn a_guest_goes_there_and_back_again() {
    let world = World::new();
    let mut here = Source::new(&world, "vm0");
    let mut lease = world.lease("vm0");
    lease.claim().unwrap();
    for round in 1..=20 {
        let (near, far) = Connection::pair().unwrap();
        let before = here.guest.device.clone();
        let name = format!("vm{round}");
        let (arrived, mut new_lease) = std::thread::scope(|scope| {
            let receiving = scope.spawn(|| {
                let mut lease = world.lease(&name);
                let (statistics, parameters) = (Statistics::new(), Parameters::new());
                let mut destination =
                    Destination::new(Some(&mut lease), &statistics, patience(), &parameters).unwrap();
                let arrived = destination.serve(&mut Factory::new(&world, &name), far);
                (arrived, lease)
            });
            let mut near = Some(near);
            let mut dial = || Ok(near.take().expect("one link suffices"));
            let (statistics, parameters) = (Statistics::new(), Parameters::new());
            let mut context = Context {
                lease: Some(&mut lease),
                parameters: &parameters,
                statistics: &statistics,
                patience: patience(),
            };
            let outcome = crate::migrate(&mut here, &mut dial, &mut context);
            assert!(matches!(outcome, Outcome::Completed { note: None }), "{round}: {outcome:?}");
            receiving.join().unwrap()
        });
        let arrived: Arrived<_> = arrived.unwrap();
        assert!(here.guest.contents() == arrived.machine.0.contents(), "round {round}");
        assert_eq!(arrived.machine.0.device, before);
        assert_eq!(new_lease.read().unwrap().unwrap().generation, round + 1);
        std::mem::swap(&mut lease, &mut new_lease);
        here = Source::arrived(arrived.machine);
        world.assert_sound(&name);
        assert_eq!(world.running(), [name]);
    }
}

pub fn step() -> Step<'static> {
    Step { doing: "testing", patience: patience().build, cancel: None, until: None }
}

/// A destination in a thread; `talk` plays its peers, one connection each.
pub fn with_destination(
    world: &World,
    patience: Patience,
    talk: impl FnOnce(&mut dyn FnMut() -> Link),
) -> Option<Arrived<super::mock::Arriving>> {
    with_any_destination(world, patience, false, talk)
}

/// The same; it lets data channels in or has no way in for them.
pub fn with_any_destination(
    world: &World,
    patience: Patience,
    with_channels: bool,
    talk: impl FnOnce(&mut dyn FnMut() -> Link),
) -> Option<Arrived<super::mock::Arriving>> {
    let (links, arriving) = std::sync::mpsc::channel::<Connection>();
    std::thread::scope(|scope| {
        let receiving = scope.spawn(move || {
            let (statistics, parameters) = (Statistics::new(), Parameters::new());
            let mut lease = world.lease("destination");
            let mut factory = Factory::new(world, "destination");
            let mut destination =
                Destination::new(Some(&mut lease), &statistics, patience, &parameters).unwrap();
            let arrived = super::wait_for_guest(&mut destination, &mut factory, &arriving, with_channels);
            let unknown = statistics.snapshot().unacknowledged;
            let is_known = arrived.as_ref().is_none_or(|arrived| arrived.acknowledged);
            assert_eq!(unknown.is_none(), is_known, "{unknown:?}");
            arrived
        });
        let mut connect = || super::connected(&links);
        talk(&mut connect);
        drop(links);
        receiving.join().unwrap()
    })
}

#[test]
fn a_silent_peer_keeps_nobody_out() {
    let world = World::new();
    with_destination(&world, impatience(), |connect| {
        let _silent = connect();
        let query = Message::Query(Query { session: [1; 16], instance: [2; 16] });
        // On a host with other work whoever speaks may be too late, and comes again.
        let answer = std::iter::repeat_with(|| {
            let mut other = connect();
            other.send(&query, step()).and_then(|()| other.receive(step()))
        });
        let answer = answer.take(100).find_map(Result::ok);
        assert!(matches!(answer, Some(Message::Refuse(_))), "{answer:?}");
    });
}

#[test]
fn first_words_that_make_no_sense_are_refused_with_the_reason() {
    use stream::frame::{HEADER_BYTES, Kind};
    let world = World::new();
    with_destination(&world, patience(), |connect| {
        let mut link = connect();
        link.send_frame(Kind::Hello, &mut [&[0; HEADER_BYTES], b"garbage".as_slice()].concat(), step())
            .unwrap();
        let answer = link.receive(step()).unwrap();
        let Message::Refuse(reasons) = answer else { panic!("{answer:?}") };
        assert!(reasons.sentences()[0].contains("hello: "), "{reasons:?}");
    });
}

#[test]
fn a_commit_out_of_the_blue_takes_nothing() {
    let world = World::new();
    let mut lease = world.lease("source");
    lease.claim().unwrap();
    let session = random_id().unwrap();
    let generation = lease.offer(&session, "somebody").unwrap();
    let arrived = with_destination(&world, patience(), |connect| {
        let mut link = connect();
        link.send(&Message::Commit(Commit { session, generation }), step()).unwrap();
        assert!(link.receive(step()).is_err(), "nothing was prepared on this link");
    });
    assert!(arrived.is_none());
    assert!(matches!(lease.read().unwrap().unwrap().state, State::Offered { .. }));
}

/// Prepares a migration by hand, up to PREPARED.
fn prepared(
    link: &mut Link,
    world: &World,
    session: [u8; 16],
    digest_error: u64,
) -> Result<[u8; 16], Message> {
    let mut machine = Source::new(world, "source");
    let description = Properties::try_from(&machine.description().unwrap()).unwrap();
    let lease = world.lease("reader").read().unwrap().map(|record| record.lease);
    link.send(&Message::Hello(Box::new(Hello::new(session, lease, description))), step()).unwrap();
    let instance = match link.receive(step()).unwrap() {
        Message::Agree(agree) => agree.instance,
        other => return Err(other),
    };
    let (parameters, statistics) = (Parameters::new(), Statistics::new());
    let context =
        Context { lease: None, parameters: &parameters, statistics: &statistics, patience: patience() };
    let blocks = machine.ram_blocks();
    let sink = crate::sink::Sink::new(link, &context);
    let mut ram = crate::ram::Sender::start(sink, "ferry", &blocks, &statistics, "test").unwrap();
    let all: Vec<_> = blocks
        .iter()
        .map(|block| {
            let mut bitmap = crate::PageBitmap::for_bytes(block.length_bytes());
            bitmap.set_bytes(0..block.length_bytes());
            bitmap
        })
        .collect();
    ram.last_round(&all).unwrap();
    for section in machine.save_devices(crate::SaveFor::Connection).unwrap() {
        ram.device(&section).unwrap();
    }
    let digest = ram.finish_live().unwrap() ^ digest_error;
    link.send(&Message::Prepare(crate::protocol::Prepare { digest, running: true }), step()).unwrap();
    match link.receive(step()).unwrap() {
        Message::Prepared(_) => Ok(instance),
        other => Err(other),
    }
}

#[test]
fn signs_of_life_alone_do_not_hold_the_destination() {
    let world = World::new();
    world.lease("source").claim().unwrap();
    let patience = Patience { stall: std::time::Duration::ZERO, ..patience() };
    with_destination(&world, patience, |connect| {
        let mut link = connect();
        let description =
            Properties::try_from(&Source::new(&world, "source").description().unwrap()).unwrap();
        let lease = world.lease("reader").read().unwrap().map(|record| record.lease);
        link.send(&Message::Hello(Box::new(Hello::new([1; 16], lease, description))), step()).unwrap();
        assert!(matches!(link.receive(step()).unwrap(), Message::Agree(_)));
        link.send(&Message::Progress(Progress::default()), step()).unwrap();
        let answer = link.receive(step()).unwrap();
        let Message::Reject(reasons) = answer else { panic!("{answer:?}") };
        assert!(reasons.sentences()[0].contains("receiving RAM"), "{reasons:?}");
    });
}

#[test]
fn a_wrong_digest_is_rejected() {
    let world = World::new();
    world.lease("source").claim().unwrap();
    let arrived = with_destination(&world, patience(), |connect| {
        let mut link = connect();
        let answer = prepared(&mut link, &world, [1; 16], 1).unwrap_err();
        let Message::Reject(reasons) = answer else { panic!("{answer:?}") };
        assert!(reasons.sentences()[0].contains("digest"), "{reasons:?}");
    });
    assert!(arrived.is_none());
}

#[test]
fn a_commit_after_the_source_settled_is_answered_never_and_for_ever() {
    let world = World::new();
    let mut lease = world.lease("source");
    lease.claim().unwrap();
    let session = [1; 16];
    let arrived = with_destination(&world, patience(), |connect| {
        let mut link = connect();
        let instance = prepared(&mut link, &world, session, 0).unwrap();
        let generation = lease.offer(&session, "destination").unwrap();
        lease.settle(&session).unwrap();
        link.send(&Message::Commit(Commit { session, generation }), step()).unwrap();
        assert!(matches!(link.receive(step()).unwrap(), Message::Never(_)));
        drop(link);
        for _again in 0..2 {
            let mut link = connect();
            link.send(&Message::Query(Query { session, instance }), step()).unwrap();
            assert!(matches!(link.receive(step()).unwrap(), Message::Never(_)));
        }
        // The session is fenced: it may not even start anew.
        let refused = prepared(&mut connect(), &world, session, 0).unwrap_err();
        assert!(matches!(refused, Message::Refuse(_)), "{refused:?}");
    });
    assert!(arrived.is_none());
    assert_eq!(lease.read().unwrap().unwrap().state, State::Owned);
}

#[test]
fn commit_and_query_are_answered_alike_however_often_they_come() {
    for acknowledges in [false, true] {
        commit_and_query(acknowledges);
    }
}

/// An answer that was sent and cut off is not known to the source: only its word counts.
fn commit_and_query(acknowledges: bool) {
    let world = World::new();
    let mut lease = world.lease("source");
    lease.claim().unwrap();
    let session = [1; 16];
    let arrived = with_destination(&world, patience(), |connect| {
        let mut link = connect();
        let instance = prepared(&mut link, &world, session, 0).unwrap();
        let generation = lease.offer(&session, "destination").unwrap();
        let commit = Message::Commit(Commit { session, generation });
        for _again in 0..3 {
            link.send(&commit, step()).unwrap();
            assert!(matches!(link.receive(step()).unwrap(), Message::Running(running) if running.running));
        }
        drop(link);
        for _again in 0..2 {
            let mut link = connect();
            link.send(&Message::Query(Query { session, instance }), step()).unwrap();
            assert!(matches!(link.receive(step()).unwrap(), Message::Running(_)));
            if acknowledges {
                link.send(&Message::Progress(Progress::default()), step()).unwrap();
            }
        }
        let mut stranger = connect();
        let query = Query { session: [3; 16], instance: [4; 16] };
        stranger.send(&Message::Query(query), step()).unwrap();
        assert!(matches!(stranger.receive(step()).unwrap(), Message::Refuse(_)));
    });
    assert_eq!(arrived.unwrap().acknowledged, acknowledges);
    assert_eq!(lease.read().unwrap().unwrap().generation, 2);
}

#[test]
fn a_destination_that_failed_hears_the_next_source() {
    let world = World::new();
    let mut lease = world.lease("source");
    lease.claim().unwrap();
    let arrived = with_destination(&world, patience(), |connect| {
        let mut first = connect();
        assert!(prepared(&mut first, &world, [1; 16], 1).is_err());
        drop(first);
        let mut second = connect();
        prepared(&mut second, &world, [2; 16], 0).unwrap();
        let generation = lease.offer(&[2; 16], "destination").unwrap();
        second.send(&Message::Commit(Commit { session: [2; 16], generation }), step()).unwrap();
        assert!(matches!(second.receive(step()).unwrap(), Message::Running(_)));
    });
    assert!(arrived.is_some());
}

/// They stay silent for much longer than anybody who speaks waits, and they are many.
#[test]
fn silent_peers_keep_nobody_waiting_and_the_oldest_makes_room() {
    let world = World::new();
    let folder = tempfile::tempdir().unwrap();
    let uri = transport::Uri::Unix(folder.path().join("socket"));
    let listener = transport::Listener::bind(&uri).unwrap();
    let (statistics, parameters) = (Statistics::new(), Parameters::new());
    let hour = std::time::Duration::from_secs(3600);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut factory = Factory::new(&world, "destination");
            let patience = Patience { handshake: hour, ..patience() };
            let mut destination = Destination::new(None, &statistics, patience, &parameters).unwrap();
            assert!(destination.receive(&mut factory, &listener).unwrap().is_none());
        });
        let connect = || Link::new(uri.connect(patience().connect).unwrap()).unwrap();
        let heard = std::panic::catch_unwind(|| {
            let mut oldest = connect();
            oldest.greet(step()).unwrap();
            let _silent: Vec<_> = (0..8).map(|_| connect()).collect();
            let mut other = connect();
            other.greet(step()).unwrap();
            other.send(&Message::Query(Query { session: [1; 16], instance: [2; 16] }), step()).unwrap();
            assert!(matches!(other.receive(step()).unwrap(), Message::Refuse(_)));
            assert!(matches!(oldest.receive(step()).unwrap_err(), Error::Closed { .. }));
        });
        // The thread must end, whatever the result is.
        parameters.cancel();
        heard.unwrap();
    });
}

/// The destination has passed the point of no return once, for nothing: it can be ended all the same.
#[test]
fn a_destination_that_could_not_take_a_guest_can_still_be_ended() {
    let world = World::new();
    let mut lease = world.lease("source");
    lease.claim().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let uri = transport::Uri::Unix(folder.path().join("socket"));
    let listener = transport::Listener::bind(&uri).unwrap();
    let (statistics, parameters) = (Statistics::new(), Parameters::new());
    let (ended, end) = std::sync::mpsc::channel();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut own = world.lease("destination");
            let mut factory = Factory::new(&world, "destination");
            let mut destination =
                Destination::new(Some(&mut own), &statistics, patience(), &parameters).unwrap();
            ended.send(destination.receive(&mut factory, &listener).unwrap().is_none()).unwrap();
        });
        let mut link = Link::new(uri.connect(patience().connect).unwrap()).unwrap();
        link.greet(step()).unwrap();
        prepared(&mut link, &world, [1; 16], 0).unwrap();
        // The lease offers nothing.
        link.send(&Message::Commit(Commit { session: [1; 16], generation: 1 }), step()).unwrap();
        assert!(matches!(link.receive(step()).unwrap(), Message::Never(_)));
        drop(link);
        parameters.cancel();
        let ended = end.recv_timeout(patience().answer);
        // The thread must end, whatever the result is.
        parameters.begin();
        parameters.cancel();
        assert_eq!(ended, Ok(true));
    });
}

/// Both sides say the same: it was not the source's user who ended that.
#[test]
fn a_destination_that_is_ended_says_so() {
    let world = World::new();
    let mut lease = world.lease("source");
    lease.claim().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let uri = transport::Uri::Unix(folder.path().join("socket"));
    let listener = transport::Listener::bind(&uri).unwrap();
    let (statistics, parameters) = (Statistics::new(), Parameters::new());
    std::thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            let mut own = world.lease("destination");
            let mut factory = Factory::new(&world, "destination");
            let mut destination =
                Destination::new(Some(&mut own), &statistics, patience(), &parameters).unwrap();
            assert!(destination.receive(&mut factory, &listener).unwrap().is_none());
        });
        let heard = std::panic::catch_unwind(|| {
            let mut link = Link::new(uri.connect(patience().connect).unwrap()).unwrap();
            link.greet(step()).unwrap();
            prepared(&mut link, &world, [1; 16], 0).unwrap();
            parameters.cancel();
            link.receive(step()).unwrap()
        });
        // The thread must end, whatever the result is.
        parameters.cancel();
        receiving.join().unwrap();
        let Ok(Message::Reject(reasons)) = heard else { panic!("{heard:?}") };
        assert_eq!(reasons.sentences(), ["the destination's process was told to end"]);
        assert_eq!(statistics.snapshot().error.as_deref(), Some("the destination's process was told to end"));
    });
}

#[test]
fn a_source_that_never_stops_asking_does_not_hold_the_destination() {
    let world = World::new();
    let mut lease = world.lease("source");
    lease.claim().unwrap();
    let session = [1; 16];
    let patience = Patience { answer: impatience().answer, ..patience() };
    let arrived = with_destination(&world, patience, |connect| {
        let mut link = connect();
        prepared(&mut link, &world, session, 0).unwrap();
        let generation = lease.offer(&session, "destination").unwrap();
        let commit = Message::Commit(Commit { session, generation });
        let start = std::time::Instant::now();
        while link.send(&commit, step()).is_ok() && link.receive(step()).is_ok() {
            assert!(start.elapsed() < patience.silence, "it answers for ever");
        }
    });
    assert!(!arrived.unwrap().acknowledged);
}
