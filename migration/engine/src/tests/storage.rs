//! Guests that go with their images.

use std::sync::Arc;

use transport::Connection;
use transport::faulty::{Fault, Part};

use super::disks::Images;
use super::migrate::assert_moved;
use super::mock::{Source, Trouble, World};
use super::{End, Ending, Play, impatience, patience, patiently};
use crate::lease::{Mark, State};
use crate::link::{Link, Step};
use crate::protocol::{Hello, Message, Prepare, Properties};
use crate::storage::BLOCK_BYTES;
use crate::{
    Context, Convergence, Destination, Error, OnTimeout, Outcome, Parameters, RunState, SourceMachine,
    Statistics, Status, Word, features,
};

/// Two hosts that have nothing in common.
pub struct Hosts {
    pub world: World,
    source: Arc<Images>,
    destination: Arc<Images>,
}

impl Hosts {
    pub fn new() -> Self {
        let world = World::with_images_of_each();
        let source = Images::of_a_guest(&world, "source");
        let destination = Images::none(&world, "destination");
        Self { world, source, destination }
    }

    pub fn play(&self) -> Play {
        let mut play = Play::new(&self.world);
        play.with_lease = false;
        play.parameters.set_storage(true);
        play.source.guest.images = Some(Arc::clone(&self.source));
        play.factory.images = Some(Arc::clone(&self.destination));
        play
    }

    /// The guest runs where its images are.
    pub fn assert_moved(&self, ending: &Ending) {
        assert_moved(&self.world, ending);
        assert!(self.source.contents() == self.destination.contents(), "images differ");
        assert!(matches!(self.destination.record().unwrap().state, State::Taken { .. }));
        assert!(matches!(self.source.record().unwrap().state, State::Moved { .. }));
        let for_good = |mark: &Option<Mark>| {
            mark.as_ref()
                .is_some_and(|mark| matches!(mark.record.state, State::Moved { .. }) && mark.unless.is_none())
        };
        assert!(self.source.marks().iter().all(for_good), "{:?}", self.source.marks());
        assert_eq!(self.destination.marks(), [None, None]);
    }

    /// It runs where it was, and nothing is left elsewhere.
    fn assert_stayed(&self, what: &str) {
        self.world.assert_sound(what);
        assert_eq!(self.world.running(), ["source"], "{what}\n{:#?}", self.world.log());
        assert_eq!(self.source.record().unwrap().state, State::Owned, "{what}");
        assert!(self.destination.contents().is_empty(), "{what}");
        assert!(self.destination.record().is_none(), "{what}");
        assert_eq!(
            [self.source.marks(), self.destination.marks()].concat(),
            [None, None, None, None],
            "{what}"
        );
        let log = self.world.log();
        let at = |step: &str| log.iter().rposition(|entry| entry == step);
        let settled = at("source: marks settled");
        assert!(
            settled.is_none() || at("source: runs") < settled,
            "{what}: the guest waits for what is said beside its images: {log:#?}"
        );
    }
}

fn failure(ending: &Ending) -> &Error {
    match &ending.source {
        Some((Outcome::Failed { error, paused: None }, _)) => error,
        other => panic!("{:?}", other.as_ref().map(|(outcome, _)| outcome)),
    }
}

#[test]
fn a_guest_moves_with_its_images() {
    for channels in [0, 2] {
        let hosts = Hosts::new();
        let mut play = hosts.play();
        play.channels = channels;
        let ending = play.run();
        hosts.assert_moved(&ending);
        let storage = ending.source_statistics.storage.unwrap();
        assert_eq!(storage.total_bytes, 43 * BLOCK_BYTES + 1024);
        assert!(storage.rounds >= 2 && storage.remaining_bytes == 0, "{storage:?}");
        assert!(storage.downtime_bytes >= 2 * BLOCK_BYTES, "{storage:?}");
        let received = ending.destination_statistics.storage.unwrap();
        assert_eq!(received.total_bytes, storage.total_bytes);
        assert!(received.transferred_bytes > 12 * BLOCK_BYTES);
        assert!(ending.source_statistics.transferred_bytes > storage.transferred_bytes);
    }
}

#[test]
fn holes_stay_holes() {
    let hosts = Hosts::new();
    *hosts.source.writes.lock().unwrap() = 0;
    let ending = hosts.play().run();
    hosts.assert_moved(&ending);
    // Twelve blocks of the first that hold something and the last one that was written; of the second, which is not known to be blank,
    // the zeroes too.
    let second = 3 * BLOCK_BYTES + 1024 + 1024;
    let written = *hosts.destination.written_bytes.lock().unwrap();
    assert_eq!(written, 13 * BLOCK_BYTES + second, "{written}");
}

#[test]
fn all_is_stable_and_marked_before_anybody_else_may_run_it() {
    let hosts = Hosts::new();
    hosts.play().run();
    let log = hosts.world.log();
    let at = |step: &str| {
        log.iter().rposition(|entry| entry == step).unwrap_or_else(|| panic!("{step}: {log:#?}"))
    };
    let order = [
        "destination: make images",
        "destination: build",
        "source: mark image",
        "source: track images",
        "source: find holes",
        "source: stop",
        "source: look at images",
        "destination: sync images",
        "destination: load",
        "source: mark moved",
        "source: release image",
        "destination: own images",
        "destination: open image",
        "destination: start",
        "destination: runs",
        "source: marks settled",
    ];
    let places: Vec<_> = order.iter().map(|step| at(step)).collect();
    assert!(places.is_sorted(), "{:#?}\n{log:#?}", order.iter().zip(&places).collect::<Vec<_>>());
}

#[test]
fn whatever_fails_the_guest_runs_where_it_was_and_a_second_attempt_succeeds() {
    for step in [
        "mark image",
        "track images",
        "find holes",
        "look at images",
        "read image",
        "mark moved",
        "after the mark",
    ] {
        let hosts = Hosts::new();
        *hosts.source.fails_at.lock().unwrap() = Some(step);
        let ending = hosts.play().run();
        let error = failure(&ending).chain();
        assert!(error.contains(step), "{step}: {error}");
        hosts.assert_stayed(step);
    }
    for step in ["make images", "write image", "write zeroes", "sync images", "own images"] {
        let hosts = Hosts::new();
        *hosts.destination.fails_at.lock().unwrap() = Some(step);
        let ending = hosts.play().run();
        let theirs = ending.destination_statistics.error.clone().unwrap();
        let ours = failure(&ending).chain();
        let cause = format!("{step}: no space left on device");
        assert!(ours.contains(&cause) && theirs.contains(&cause), "{ours}\n{theirs}");
        hosts.assert_stayed(step);
    }
    for step in ["build", "load", "take image", "open image"] {
        let hosts = Hosts::new();
        let mut play = hosts.play();
        play.factory.trouble = Some(Trouble::Fail(step));
        let ending = play.run();
        failure(&ending);
        hosts.assert_stayed(step);
    }
    for step in ["stop", "save", "quiesce", "release image"] {
        let hosts = Hosts::new();
        let mut play = hosts.play();
        play.source.guest.trouble = Some(Trouble::Fail(step));
        let ending = play.run();
        failure(&ending);
        hosts.assert_stayed(step);
    }
}

/// Images may be large, and long to remove.
#[test]
fn a_source_is_answered_before_what_did_not_come_is_given_up() {
    for step in ["own images", "sync images"] {
        let hosts = Hosts::new();
        *hosts.destination.fails_at.lock().unwrap() = Some(step);
        *hosts.destination.gives_up_after.lock().unwrap() = Some("source");
        let ending = hosts.play().run();
        assert!(failure(&ending).chain().contains(step), "{step}");
        hosts.assert_stayed(step);
    }
}

#[test]
fn a_cancelled_attempt_leaves_nothing() {
    let hosts = Hosts::new();
    let mut play = hosts.play();
    let parameters = Arc::clone(&play.parameters);
    play.source.on_look = Some(Box::new(move |_| {
        parameters.cancel();
    }));
    let ending = play.run();
    assert!(matches!(failure(&ending), Error::Cancelled));
    hosts.assert_stayed("cancelled");
}

#[test]
fn images_that_are_there_are_given_up_only_on_request() {
    let mut hosts = Hosts::new();
    hosts.destination = Images::of_a_guest(&hosts.world, "destination");
    let before = hosts.destination.contents();
    let error = failure(&hosts.play().run()).chain();
    assert!(error.contains("there are images already"), "{error}");
    assert!(before == hosts.destination.contents());
    assert_eq!(hosts.destination.record().unwrap().state, State::Owned);

    // Its guest has ended.
    let mut images =
        Arc::into_inner(std::mem::replace(&mut hosts.destination, Images::none(&hosts.world, "nobody")))
            .expect("nobody else has it");
    images.overwrite = true;
    images.let_go();
    hosts.destination = Arc::new(images);
    *hosts.destination.fails_at.lock().unwrap() = Some("sync images");
    failure(&hosts.play().run());
    let record = hosts.destination.record().unwrap();
    assert!(matches!(record.state, State::Incoming { .. }), "it is no longer valid, and says so: {record}");
    let ending = hosts.play().run();
    hosts.assert_moved(&ending);
}

/// How it ended, whatever broke.
fn judge(hosts: &Hosts, ending: &Ending, what: &str) {
    hosts.world.assert_sound(what);
    let running = hosts.world.running();
    assert!(running.len() <= 1, "{what}: {running:?}");
    hosts.source.assert_one_starts_at_most(&hosts.destination);
    if let Some(arrived) = &ending.arrived {
        assert!(hosts.source.contents() == hosts.destination.contents(), "{what}: images differ");
        // A bit of PREPARE says whether it is to run.
        assert_eq!(running.is_empty(), arrived.state == RunState::Paused, "{what}");
        return;
    }
    match running.first().map(String::as_str) {
        Some("destination") => panic!("{what}: it runs, and never arrived"),
        Some(_) => assert_eq!(hosts.source.record().unwrap().state, State::Owned, "{what}"),
        // Undecided: only with the other side gone.
        None => assert!(
            ending.destination_killed || ending.source.is_none(),
            "{what}: {:?}\n{:#?}",
            ending.source.as_ref().map(|(outcome, _)| outcome),
            hosts.world.log()
        ),
    }
}

#[test]
fn a_link_that_breaks_anywhere_leaves_one_guest_with_its_images() {
    for end in [End::Source, End::Destination] {
        let faults: [fn() -> Fault; 3] = [|| Fault::CutBefore, || Fault::CutMiddle, || Fault::CutAfter];
        for fault in faults {
            let (mut at, mut arrived) = (0, 0);
            loop {
                let hosts = Hosts::new();
                let mut play = hosts.play();
                play.fault = Some((end, at, fault()));
                let ending = play.run();
                let what = format!("{:?} of {end:?} at message {at}", fault());
                judge(&hosts, &ending, &what);
                assert_eq!(hosts.world.running().len(), 1, "{what}: both live");
                arrived += u32::from(ending.arrived.is_some());
                if !ending.struck {
                    break;
                }
                at += 1;
            }
            assert!(at > 3 && arrived > 0, "{:?} of {end:?}", fault());
        }
    }
}

/// A bit that is another on the way is seen, whether it is in a head or in contents.
#[test]
fn a_link_that_damages_what_it_carries_leaves_no_guest_with_other_images() {
    for part in [Part::First, Part::Middle, Part::Last] {
        let (mut at, mut refused) = (0, 0);
        loop {
            let (hosts, ending) = patiently(impatience(), |patience| {
                let hosts = Hosts::new();
                let mut play = hosts.play();
                play.fault = Some((End::Source, at, Fault::Damage(part)));
                play.patience = patience;
                let ending = play.run();
                // One that ends before it comes there, and has not moved, was too slow.
                (ending.struck || ending.arrived.is_some()).then_some((hosts, ending))
            });
            let what = format!("{part:?} of message {at}");
            judge(&hosts, &ending, &what);
            refused += u32::from(hosts.world.running() == ["source"]);
            if !ending.struck {
                break;
            }
            at += 1;
        }
        assert!(refused > 5, "{part:?}: {refused}");
    }
}

#[test]
fn a_process_that_is_killed_anywhere_leaves_no_two_guests_and_the_record_says_which() {
    for step in ["make images", "build", "load", "take image", "open image", "start"] {
        let hosts = Hosts::new();
        let mut play = hosts.play();
        play.patience = impatience();
        play.factory.trouble = Some(Trouble::Kill(step));
        let ending = play.run();
        judge(&hosts, &ending, step);
    }
    for step in ["stop", "save", "quiesce", "release image", "finish"] {
        let hosts = Hosts::new();
        let mut play = hosts.play();
        play.patience = impatience();
        play.source.guest.trouble = Some(Trouble::Kill(step));
        let ending = play.run();
        judge(&hosts, &ending, step);
    }
}

#[test]
fn an_operator_who_knows_has_it_one_way_or_the_other() {
    for (word, state) in [(Word::Reclaim, "owned"), (Word::Confirm, "moved")] {
        let hosts = Hosts::new();
        let mut play = hosts.play();
        play.patience.settle = std::time::Duration::ZERO;
        play.factory.trouble = Some(Trouble::Kill("take image"));
        let ending = play.run();
        let Some((Outcome::Unknown(handover), mut source)) = ending.source else { panic!("{word:?}") };
        assert!(ending.source_statistics.handover_unknown.unwrap().contains("ferry reclaim"));
        let record = hosts.source.record().unwrap();
        assert!(matches!(record.state, State::Moved { .. }), "nobody starts it meanwhile: {record}");
        let (parameters, statistics) = (Parameters::new(), Statistics::new());
        parameters.say(word);
        let mut context =
            Context { lease: None, parameters: &parameters, statistics: &statistics, patience: patience() };
        let mut nobody = || Err(Error::Closed { doing: "connecting" });
        let outcome = handover.resolve(&mut source, &mut nobody, &mut context);
        let record = hosts.source.record().unwrap();
        assert!(record.state.to_string().starts_with(state), "{word:?}: {outcome:?}, {record}");
        assert_eq!(hosts.world.running().len(), usize::from(word == Word::Reclaim));
        hosts.world.assert_sound("the operator");
    }
}

#[test]
fn a_guest_whose_images_cannot_be_called_its_own_again_stays_paused() {
    let hosts = Hosts::new();
    let mut play = hosts.play();
    play.factory.trouble = Some(Trouble::Fail("open image"));
    *hosts.source.fails_at.lock().unwrap() = Some("take back");
    let ending = play.run();
    let Some((Outcome::Failed { paused: Some(paused), .. }, _)) = ending.source else {
        panic!("{:?}", ending.source.map(|(outcome, _)| outcome));
    };
    assert!(paused.contains("the images are the guest's again"), "{paused}");
    assert_eq!(hosts.world.running(), [""; 0]);
    hosts.world.assert_sound("paused");
    // Whoever lets it go on looks at the lease, which the images had.
    let log = hosts.world.log();
    let at = |what: &str| log.iter().position(|entry| entry == what);
    let (given_back, resumed) = (at("source: marks settled"), at("source: resume"));
    assert!(given_back.is_some() && given_back < resumed, "{log:#?}");
}

/// The guest leaves its memory alone and fills its disk.
#[test]
fn a_guest_that_fills_its_disk_faster_than_it_goes_does_not_converge() {
    for (on_timeout, moves) in [(OnTimeout::Cancel, false), (OnTimeout::Force, true)] {
        let hosts = Hosts::new();
        *hosts.source.writes.lock().unwrap() = 30;
        let mut play = hosts.play();
        play.source.writes = vec![0; 100];
        let parameters = &play.parameters;
        parameters.set_downtime_limit(std::time::Duration::ZERO);
        parameters.set_convergence(Convergence { max_rounds: Some(5), on_timeout, ..Convergence::default() });
        let ending = play.run();
        if moves {
            hosts.assert_moved(&ending);
            assert_eq!(ending.source_statistics.storage.unwrap().rounds, 5);
            continue;
        }
        let error = failure(&ending);
        let Error::NoConvergence { rounds: 5, remaining_bytes, .. } = error else { panic!("{error:?}") };
        assert!((30 * BLOCK_BYTES..31 * BLOCK_BYTES).contains(remaining_bytes), "{remaining_bytes}");
        hosts.assert_stayed("no convergence");
    }
}

#[test]
fn a_side_that_does_not_expect_images_is_told_before_anything_moves() {
    let hosts = Hosts::new();
    let mut play = hosts.play();
    play.factory.images = None;
    let error = failure(&play.run()).chain();
    assert!(error.contains("cannot receive the images") && error.contains("has its own"), "{error}");

    let hosts = Hosts::new();
    let mut play = hosts.play();
    play.source.guest.images = None;
    let error = failure(&play.run()).chain();
    assert!(error.contains("no images that could go with it"), "{error}");

    let hosts = Hosts::new();
    let mut play = hosts.play();
    play.with_lease = true;
    let error = failure(&play.run()).chain();
    assert!(error.contains("a lease that both sides have"), "{error}");
}

fn step() -> Step<'static> {
    Step { doing: "testing", patience: patience().handshake, cancel: None, until: None }
}

/// Says hello as a source does, then `bodies` of blocks and PREPARE; what the destination answers.
fn answer_to(hosts: &Hosts, with_storage: bool, bodies: &[Vec<u8>]) -> Message {
    let (near, far) = Connection::pair().unwrap();
    std::thread::scope(|scope| {
        let world = &hosts.world;
        scope.spawn(move || {
            let mut factory = super::mock::Factory::new(world, "destination");
            factory.images = Some(Arc::clone(&hosts.destination));
            let (parameters, statistics) = (Parameters::new(), Statistics::new());
            let mut destination = Destination::new(None, &statistics, patience(), &parameters).unwrap();
            assert!(destination.serve(&mut factory, far).is_none());
            assert_eq!(statistics.snapshot().status, Status::Failed);
        });
        let mut link = Link::new(near).unwrap();
        link.greet(step()).unwrap();
        let mut machine = Source::new(world, "source");
        let mut description = machine.description().unwrap();
        if with_storage {
            super::disks::IMAGES.iter().for_each(|(name, length)| {
                description.set(format!("storage.{name}.length_bytes"), length);
                description.set(format!("storage.{name}.format"), "raw");
            });
        }
        let mut hello = Hello::new([1; 16], None, Properties::try_from(&description).unwrap());
        hello.features = if with_storage { features::STORAGE } else { 0 };
        link.send(&Message::Hello(Box::new(hello)), step()).unwrap();
        let Message::Agree(agree) = link.receive(step()).unwrap() else { panic!("it agrees") };
        assert_eq!(agree.features & features::STORAGE != 0, with_storage);
        for body in bodies {
            let mut frame = [&[0; stream::frame::HEADER_BYTES], body.as_slice()].concat();
            // It may have gone by now.
            let _said = link.send_frame(stream::frame::Kind::Blocks, &mut frame, step());
        }
        let _said = link.send(&Message::Prepare(Prepare { digest: 0, running: true }), step());
        let answer = link.receive(step()).unwrap();
        drop(link);
        answer
    })
}

#[test]
fn what_a_hostile_source_says_about_images_is_refused() {
    let head = |disk: u16, kind: u8, offset: u64, length: u64| {
        let mut head = disk.to_be_bytes().to_vec();
        head.extend([kind, 0, 0, 0, 0, 0]);
        head.extend(offset.to_be_bytes());
        head.extend(length.to_be_bytes());
        head.extend([0; 8]);
        head
    };
    for (with_storage, bodies, reason) in [
        (false, vec![head(0, 1, 0, BLOCK_BYTES)], "the source sent blocks"),
        (true, vec![head(2, 1, 0, BLOCK_BYTES)], "image 2, where 2 come"),
        (true, vec![head(0, 1, 40 * BLOCK_BYTES, BLOCK_BYTES)], "are not inside image disk0-1"),
        (true, vec![head(0, 1, u64::MAX - 65_535, BLOCK_BYTES)], "are not inside image disk0-1"),
        (true, vec![head(0, 0, 0, BLOCK_BYTES)], "0 bytes came"),
        (true, vec![vec![0; 5]], "5 bytes are no run of blocks"),
        (true, vec![head(0, 1, 0, 40 * BLOCK_BYTES)], "receiving RAM"),
    ] {
        let hosts = Hosts::new();
        let answer = answer_to(&hosts, with_storage, &bodies);
        let Message::Reject(reasons) = answer else { panic!("{reason}: {answer:?}") };
        let said = reasons.sentences().join("; ");
        assert!(said.contains(reason) || reason == "receiving RAM", "{reason}: {said}");
        assert!(hosts.destination.contents().is_empty() && hosts.destination.record().is_none(), "{reason}");
    }
}
