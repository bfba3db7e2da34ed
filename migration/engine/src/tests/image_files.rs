//! Files of images that go with the memory itself: when they do, and what a destination refuses to take for them.

use std::io::Read;
use std::os::fd::OwnedFd;

use transport::DESCRIPTORS_MAX;

use super::Play;
use super::local::{Hand, local, reason};
use super::migrate::{assert_moved, step, with_destination};
use super::mock::{Source, World};
use super::passed::image_files;
use crate::features::{IMAGE_FILES, LOCAL};
use crate::protocol::{ImageFiles, Message};
use crate::{ImageFile, SourceMachine};

fn names(count: usize) -> Vec<String> {
    (0..count).map(|number| format!("disk.{number}")).collect()
}

/// What the destination opens its images by, after a hand-over; the guest has moved.
fn adopted(world: &World, play: Play) -> Vec<String> {
    let ending = play.run();
    assert_moved(world, &ending);
    assert!(ending.source_statistics.handed_over_bytes > 0, "the memory itself goes");
    let machine = ending.arrived.unwrap().machine;
    machine.0.adopted.iter().map(|file| file.name.clone()).collect()
}

#[test]
fn the_files_of_images_go_before_the_stop_however_many_there_are() {
    for count in [1, 2, DESCRIPTORS_MAX, DESCRIPTORS_MAX + 1, 2 * DESCRIPTORS_MAX] {
        let world = World::new();
        let mut play = local(&world);
        (play.source.guest.image_files, play.factory.image_files) = (Some(names(count)), Some(names(count)));
        assert_eq!(adopted(&world, play), names(count));
        let log = world.log();
        let stop = log.iter().position(|entry| entry == "source: stop").unwrap();
        let adoptions: Vec<_> =
            (0..log.len()).filter(|at| log[*at] == "destination: adopt image files").collect();
        assert_eq!(adoptions.len(), count.div_ceil(DESCRIPTORS_MAX));
        assert!(adoptions.iter().all(|at| *at < stop), "{log:#?}");
    }
}

#[test]
fn what_only_one_side_has_is_left_out() {
    for (theirs, ours) in [(3, 2), (2, 3), (DESCRIPTORS_MAX + 1, 1)] {
        let world = World::new();
        let mut play = local(&world);
        (play.source.guest.image_files, play.factory.image_files) = (Some(names(theirs)), Some(names(ours)));
        assert_eq!(adopted(&world, play), names(theirs.min(ours)));
    }
}

/// As with processes of older versions, which know nothing of them, and machines that have none.
#[test]
fn images_are_opened_by_their_names_where_one_side_passes_or_takes_none() {
    for (theirs, ours) in [(None, Some(names(2))), (Some(names(2)), None), (None, None)] {
        let world = World::new();
        let mut play = local(&world);
        (play.source.guest.image_files, play.factory.image_files) = (theirs, ours);
        assert!(adopted(&world, play).is_empty());
        let asked = world.log().iter().any(|entry| entry == "destination: adopt image files");
        assert!(!asked, "nothing is passed that was not agreed on");
    }
    let world = World::new();
    let mut play = local(&world);
    play.source.guest.trouble = Some(super::mock::Trouble::Fail("image files"));
    assert!(adopted(&world, play).is_empty(), "a host that has no descriptors left");
}

#[test]
fn they_are_granted_only_with_the_memory() {
    let world = World::new();
    world.lease("source").claim().unwrap();
    for (offered, token, granted) in [
        (LOCAL | IMAGE_FILES, true, LOCAL | IMAGE_FILES),
        (LOCAL, true, LOCAL),
        (IMAGE_FILES, true, 0),
        (LOCAL | IMAGE_FILES, false, 0),
    ] {
        with_destination(&world, super::patience(), |connect| {
            let (_hand, features) = Hand::agreed_on(offered, connect, &world, token);
            assert_eq!(features & (LOCAL | IMAGE_FILES), granted, "{offered:#x} {token}");
        });
    }
    let world = World::new();
    let mut play = local(&world);
    play.factory.takes_memory = false;
    let ending = play.run();
    assert_moved(&world, &ending);
    assert!(ending.arrived.unwrap().machine.0.adopted.is_empty());
}

/// A source by hand that has passed its memory, and its files.
fn with_hand(talk: impl FnOnce(&mut Hand, Vec<ImageFile>)) {
    let world = World::new();
    world.lease("source").claim().unwrap();
    let arrived = with_destination(&world, super::patience(), |connect| {
        let (mut hand, _) = Hand::agreed_on(LOCAL | IMAGE_FILES, connect, &world, true);
        let (blocks, descriptors) = (hand.source.ram_blocks(), hand.readable());
        assert_eq!(hand.passes(&blocks, &descriptors), Message::Mapped);
        talk(&mut hand, image_files(&world, &names(3)));
    });
    assert!(arrived.is_none());
    world.assert_sound("a source by hand");
}

fn passes(hand: &mut Hand, names: &[&str], descriptors: &[OwnedFd], more: bool) -> Message {
    let message = Message::ImageFiles(ImageFiles::new(names, more));
    hand.link.send_with(&message, descriptors, step()).unwrap();
    hand.link.receive(step()).unwrap()
}

#[test]
fn what_does_not_fit_is_refused_with_the_reason() {
    type Case = (&'static str, &'static [&'static str], fn(&mut Vec<OwnedFd>));
    let cases: [Case; 4] = [
        ("2 descriptors came for 1 files", &["disk.0"], |_| {}),
        ("1 descriptors came for 2 files", &["disk.0", "disk.1"], |descriptors| drop(descriptors.pop())),
        ("0 descriptors came for 1 files", &["disk.0"], Vec::clear),
        ("another file came for disk.0", &["disk.0", "disk.1"], |descriptors| descriptors.swap(0, 1)),
    ];
    for (expected, names, change) in cases {
        with_hand(|hand, files| {
            let mut descriptors: Vec<_> = files.into_iter().take(2).map(|file| file.descriptor).collect();
            change(&mut descriptors);
            let reason = reason(passes(hand, names, &descriptors, false));
            assert!(reason.contains(expected), "{expected}: {reason}");
        });
    }
    with_hand(|hand, _| {
        let reason = reason(hand.passes(&[], &[]));
        assert!(reason.contains("the source sent memory"), "{reason}");
    });
}

/// The end of a pipe comes when nobody can write to it any more.
#[test]
fn what_this_machine_has_no_use_for_is_closed_and_a_peer_that_has_ever_more_of_it_is_sent_away() {
    with_hand(|hand, mut files| {
        let (mut end, begin) = std::io::pipe().unwrap();
        // A name that comes again is of no use either.
        let passed = [files.swap_remove(0).descriptor, begin.try_clone().unwrap().into(), begin.into()];
        assert_eq!(passes(hand, &["disk.0", "other", "disk.0"], &passed, true), Message::Identified);
        drop(passed);
        assert_eq!(end.read(&mut [0; 1]).unwrap(), 0);
        let message = Message::ImageFiles(ImageFiles::new::<&str>(&[], true));
        hand.link.send(&message, step()).unwrap();
        assert_eq!(hand.link.receive(step()).unwrap(), Message::Identified);
        let reason = reason(hand.link.receive(step()).unwrap());
        assert!(reason.contains("more files of images came than this machine has"), "{reason}");
    });
}

/// What came so goes on so.
#[test]
fn a_guest_whose_files_came_can_be_handed_over_again() {
    let world = World::new();
    let machine = local(&world).run().arrived.unwrap().machine;
    let mut play = Play::new(&World::new());
    play.with_lease = false;
    play.world = world.clone();
    play.source = Source::arrived(machine);
    play.source.passes_memory = true;
    play.parameters.set_local(true);
    play.factory = super::mock::Factory::new(&world, "third");
    let machine = play.run().arrived.unwrap().machine;
    assert_eq!(machine.0.adopted.len(), 2);
    world.assert_sound("twice");
}
