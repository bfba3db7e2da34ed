//! Guests whose memory follows them, over links that break.

use std::sync::Arc;
use std::time::Duration;

use transport::faulty::Fault;

use super::missing::MARK_OFFSET;
use super::mock::{Trouble, World};
use super::{End, Ending, Play};
use crate::lease::State;
use crate::ram::PAGE_LENGTH;
use crate::{Error, Outcome, Parameters, PostcopyStart, Status};

/// More messages than either side ever sends on one link.
const MESSAGES_MAX: u32 = 400;

/// A migration in which memory follows as `start` says.
pub fn play(world: &World, start: PostcopyStart) -> Play {
    let mut play = Play::new(world);
    play.parameters.set_postcopy(start);
    // Nothing is small enough for a stop.
    play.parameters.set_downtime_limit(Duration::ZERO);
    let parameters = Arc::clone(&play.parameters);
    play.listeners.0 = Some(Box::new(recover_each_time(parameters)));
    let world = world.clone();
    play.listeners.1 = Some(Box::new(move |status| check_that_it_stands_still(&world, status)));
    play
}

/// A guest whose memory does not come stands still, and only that.
fn check_that_it_stands_still(world: &World, status: Status) {
    let expected = match status {
        Status::PostcopyPaused | Status::PostcopyRecover => true,
        Status::PostcopyActive | Status::Completed => false,
        _ => return,
    };
    let Some(memory) = world.missing() else { return };
    if memory.is_held() != expected {
        world.violate(format!("{status}, and whether the guest stands still is {}", memory.is_held()));
    }
}

/// An operator who replaces every link that is lost.
fn recover_each_time(parameters: Arc<Parameters>) -> impl Fn(Status) + Send + Sync {
    move |status| {
        if status == Status::PostcopyPaused {
            parameters.recover();
        }
    }
}

/// The guest has all that it had, though it wrote on while its memory came.
fn assert_has_all(ending: &mut Ending, what: &str) {
    let arrived = ending.arrived.as_mut().unwrap_or_else(|| panic!("{what}: nobody arrived"));
    let guest = &mut arrived.machine.0;
    let threads = std::mem::take(&mut guest.threads);
    assert_eq!(threads.len(), 2, "{what}");
    let found: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
    let memory = guest.missing.clone().unwrap();
    let here = guest.contents();
    let source = &ending.source.as_ref().unwrap_or_else(|| panic!("{what}: the source is gone")).1;
    let there = source.guest.contents();
    for found in found {
        assert_eq!(found.len(), 640, "{what}");
        for ((block, page), bytes) in found {
            let block = there.len() - 1 - block;
            let start = page as usize * PAGE_LENGTH;
            let expected = &there[block][start..start + MARK_OFFSET];
            assert!(bytes[..MARK_OFFSET] == *expected, "{what}: page {page} of block {block} was not there");
        }
    }
    for (block, (here, there)) in here.iter().zip(&there).enumerate() {
        let pages = here.chunks(PAGE_LENGTH).zip(there.chunks(PAGE_LENGTH));
        for (page, (here, there)) in pages.enumerate() {
            assert!(here[..MARK_OFFSET] == there[..MARK_OFFSET], "{what}: page {page} of block {block}");
            assert_eq!(here[MARK_OFFSET..], [0xff; 8], "{what}: page {page} of block {block} came again");
        }
    }
    assert!(memory.touched_missing() > 0, "{what}");
}

pub fn assert_moved(world: &World, ending: &mut Ending, what: &str) {
    assert_has_all(ending, what);
    let Some((Outcome::Completed { .. }, source)) = &ending.source else {
        panic!("{what}: {:?}\n{:#?}", ending.source.as_ref().map(|(outcome, _)| outcome), world.log());
    };
    assert!(source.finished, "{what}");
    assert_eq!(world.running(), ["destination"], "{what}");
    let statistics = (&ending.source_statistics, &ending.destination_statistics);
    assert_eq!((statistics.0.status, statistics.1.status), (Status::Completed, Status::Completed), "{what}");
    assert_eq!((statistics.0.remaining_bytes, statistics.1.remaining_bytes), (0, 0), "{what}");
    world.assert_sound(what);
}

/// The end of the link where pages are asked for does not take the other with it, on which it is said why.
#[test]
fn a_source_that_gives_up_when_all_was_prepared_says_why() {
    let world = World::new();
    let mut play = play(&world, PostcopyStart::AtOnce);
    play.source.guest.trouble = Some(Trouble::Fail("quiesce"));
    let ending = play.run();
    let Some((Outcome::Failed { error, paused: None }, _)) = &ending.source else { panic!("it stays") };
    assert!(error.chain().contains("make the images stable"), "{}", error.chain());
    assert_eq!(ending.destination_statistics.error, Some(error.chain()));
    assert_eq!(world.running(), ["source"]);
    world.assert_sound("given up");
}

#[test]
fn memory_follows_a_guest_from_the_start() {
    let world = World::new();
    let play = play(&world, PostcopyStart::AtOnce);
    // The background sends 64 pages, and then hardly anything: the guest gets the rest by asking.
    play.parameters.set_max_bandwidth(Parameters::MAX_BANDWIDTH_LEAST);
    let mut ending = play.run();
    assert_moved(&world, &mut ending, "from the start");
    let (source, destination) = (&ending.source_statistics, &ending.destination_statistics);
    assert_eq!(source.rounds, 0, "no round was made");
    let (sent, got) = (source.postcopy.as_ref().unwrap(), destination.postcopy.as_ref().unwrap());
    // Two thirds of 432 pages hold something, and all of the 432 are populated.
    assert!(got.bytes >= 432 * 4096 && sent.bytes > 280 * 4096, "{sent:?} {got:?}");
    assert!(got.requests > 100 && sent.requests > 100 && got.zero_faults > 0, "{sent:?} {got:?}");
    let vcpus = got.threads.iter().filter(|(name, time)| name.starts_with("vcpu") && !time.is_zero());
    assert!(vcpus.count() > 0, "{got:?}");
    assert!(!got.blocktime.is_zero() && got.latency_max >= got.latency_median, "{got:?}");
    let record = world.lease("reader").read().unwrap().unwrap();
    assert!(matches!(record.state, State::Taken { .. }) && record.owner.vm == "destination", "{record}");
}

/// Who touches a larger page of the destination's waits for all of its parts, and sees none of them before.
#[test]
fn memory_follows_a_guest_into_larger_pages() {
    for (start, times, name) in [
        (PostcopyStart::AtOnce, 8, "from the start"),
        (PostcopyStart::AtOnce, 40, "from the start, in pages of the length of a block"),
        (PostcopyStart::AfterFirstRound, 8, "after the first round"),
    ] {
        let world = World::new();
        world.enlarge_pages(times);
        let play = play(&world, start);
        // The guest gets what it touches by asking.
        play.parameters.set_max_bandwidth(Parameters::MAX_BANDWIDTH_LEAST);
        let mut ending = play.run();
        assert_moved(&world, &mut ending, name);
        let got = ending.destination_statistics.postcopy.unwrap();
        let sent = ending.source_statistics.postcopy.unwrap();
        assert!(got.requests > 0 && sent.requests > 0, "{name}: {sent:?} {got:?}");
        // One request for a run, not one for each page.
        let are_whole = start == PostcopyStart::AtOnce;
        assert!(!are_whole || sent.requests * 2 <= got.bytes / 4096, "{name}: {sent:?} {got:?}");
    }
}

/// One message completes several of them, of which one cannot be shown: those before it have been seen, and never come again.
#[test]
fn a_larger_page_that_cannot_be_shown_takes_none_with_it_that_was() {
    // The first of all is shown to a device, before the guest is given away.
    for completions in 1..8 {
        let world = World::new();
        world.enlarge_pages(8);
        world.fail_a_completion_after(completions);
        // What comes unasked is one message, and the guest touches nothing before the link is lost for it.
        world.lock().sleeps = true;
        let mut play = play(&world, PostcopyStart::AtOnce);
        play.parameters.set_max_bandwidth(Parameters::MAX_BANDWIDTH_LEAST);
        let (stands_still, guest) = (play.listeners.1.take().unwrap(), world.clone());
        play.listeners.1 = Some(Box::new(move |status| {
            stands_still(status);
            if status == Status::PostcopyPaused {
                guest.missing().unwrap().wake();
            }
        }));
        let mut ending = play.run();
        let name = format!("after {completions}");
        assert_moved(&world, &mut ending, &name);
        assert_eq!(ending.source_statistics.postcopy.unwrap().recoveries, 1, "{name}");
    }
}

#[test]
fn what_was_dirtied_since_the_first_round_follows() {
    let world = World::new();
    let mut ending = play(&world, PostcopyStart::AfterFirstRound).run();
    assert_moved(&world, &mut ending, "after the first round");
    let (source, destination) = (&ending.source_statistics, &ending.destination_statistics);
    assert_eq!(source.rounds, 1);
    let got = destination.postcopy.as_ref().unwrap();
    assert!((1..400 * 4096).contains(&got.bytes), "{got:?}");
}

#[test]
fn a_user_lets_memory_follow_while_it_moves() {
    let world = World::new();
    let mut play = play(&world, PostcopyStart::WhenAsked);
    play.source.writes = vec![500; 100];
    let parameters = Arc::clone(&play.parameters);
    play.listeners.1 = Some(Box::new(move |status| {
        if status == Status::Active {
            parameters.start_postcopy();
        }
    }));
    let mut ending = play.run();
    assert_moved(&world, &mut ending, "when asked");
    assert!(ending.source_statistics.rounds >= 1);
}

#[test]
fn a_guest_that_can_be_stopped_for_the_rest_is() {
    let world = World::new();
    let play = play(&world, PostcopyStart::AfterFirstRound);
    play.parameters.set_downtime_limit(Duration::from_secs(300));
    let ending = play.run();
    assert!(matches!(ending.source, Some((Outcome::Completed { .. }, _))));
    assert!(ending.arrived.unwrap().machine.0.missing.is_none(), "nothing was missing");
    assert_eq!(ending.source_statistics.postcopy, None);
}

#[test]
fn a_destination_that_cannot_miss_pages_says_so_before_anything_moves() {
    let world = World::new();
    let mut play = play(&world, PostcopyStart::AfterFirstRound);
    play.factory.needs_all = Some("no userfaultfd here");
    let ending = play.run();
    let cause = ending.source_statistics.error.unwrap();
    assert!(cause.contains("postcopy") && cause.ends_with("no userfaultfd here"), "{cause}");
    assert_eq!((ending.source_statistics.normal_pages, world.running()), (0, vec!["source".to_owned()]));
    assert_eq!(ending.destination_statistics.error, Some(cause));
}

/// Seen by `check_that_it_stands_still`, as every other loss of a link here.
#[test]
fn a_guest_whose_memory_does_not_come_stands_still_until_it_does() {
    let world = World::new();
    let mut play = play(&world, PostcopyStart::AtOnce);
    play.breaks_after_handover = true;
    // Nothing is asked for on the link that stays, before this one is lost, and what comes unasked does not come to its end.
    world.lock().sleeps = true;
    play.parameters.set_max_bandwidth(Parameters::MAX_BANDWIDTH_LEAST);
    let parameters = Arc::clone(&play.parameters);
    let stands_still = play.listeners.1.take().unwrap();
    let (told, statuses) = std::sync::mpsc::channel();
    let memory_of = world.clone();
    play.listeners.1 = Some(Box::new(move |status| {
        stands_still(status);
        told.send(status).unwrap();
        if status == Status::PostcopyPaused {
            parameters.set_max_bandwidth(0);
            memory_of.missing().unwrap().wake();
        }
    }));
    let mut ending = play.run();
    assert_moved(&world, &mut ending, "over another link");
    let statuses: Vec<_> = statuses.try_iter().collect();
    assert!(statuses.contains(&Status::PostcopyPaused), "{statuses:?}");
}

#[test]
fn a_guest_whose_threads_cannot_be_served_ends_with_the_same_reason_on_both_sides() {
    const REASON: &str = "cannot hear who waits for guest memory: userfaultfd is gone";
    let world = World::new();
    // One before it runs, and its first; the background sends too little for it to need none.
    world.silence_faults_after(1);
    let broken = play(&world, PostcopyStart::AtOnce);
    broken.parameters.set_max_bandwidth(Parameters::MAX_BANDWIDTH_LEAST);
    let mut ending = broken.run();
    let memory = world.missing().unwrap();
    assert_eq!(memory.why_lost().as_deref(), Some(REASON));
    assert!(memory.is_held(), "it does nothing more");
    let threads = std::mem::take(&mut ending.arrived.as_mut().unwrap().machine.0.threads);
    threads.into_iter().for_each(|thread| drop(thread.join().unwrap()));
    assert_eq!(ending.destination_statistics.status, Status::Failed);
    assert_eq!(ending.destination_statistics.error.as_deref(), Some(REASON));
    let Some((Outcome::Failed { error: Error::GuestLost { reason }, .. }, source)) = ending.source else {
        panic!("{:?}", ending.source.map(|(outcome, _)| outcome));
    };
    assert_eq!((reason.as_str(), source.finished), (REASON, true));

    // Before the guest was given away it has lost nothing.
    let world = World::new();
    world.silence_faults_after(0);
    let ending = play(&world, PostcopyStart::AtOnce).run();
    let Some((Outcome::Failed { error: Error::Never { reason }, paused: None }, _)) = ending.source else {
        panic!("{:?}", ending.source.map(|(outcome, _)| outcome));
    };
    assert_eq!(reason, REASON);
    assert_eq!(world.running(), ["source"]);
    assert!(world.missing().unwrap().why_lost().is_none());
    world.assert_sound("nobody could be served");
}

/// Plays a fault at every message of one end of one of the links, until it does not strike.
fn at_every_message(link: u32, end: End, start: PostcopyStart, fault: impl Fn() -> Fault) -> u32 {
    with_channels_at_every_message(0, link, end, start, fault)
}

fn with_channels_at_every_message(
    channels: u16,
    link: u32,
    end: End,
    start: PostcopyStart,
    fault: impl Fn() -> Fault,
) -> u32 {
    for at in 0..MESSAGES_MAX {
        let world = World::new();
        let mut play = play(&world, start);
        play.channels = channels;
        if channels > 0 {
            // A channel that is cut before it says what it is for is waited for.
            play.patience.handshake = Duration::from_millis(500);
        }
        // Each of these pages is a message of its own.
        play.source.writes = vec![40; 8];
        (play.fault, play.fault_link) = (Some((end, at, fault())), link);
        let mut ending = play.run();
        let what = format!("{:?} at message {at} of the {end:?} on link {link}, {start:?}", fault());
        world.assert_sound(&what);
        match world.running().first().map(String::as_str) {
            Some("source") => {
                assert!(ending.arrived.is_none(), "{what}");
                let Some((Outcome::Failed { error, paused: None }, _)) = &ending.source else {
                    panic!("{what}: {:?}", ending.source.map(|(outcome, _)| outcome));
                };
                // The first link is whole, and both say the same.
                let causes = (error.chain(), ending.destination_statistics.error.unwrap_or_default());
                let are_one = causes.0.contains(&causes.1) || causes.1.contains(&causes.0);
                assert!(link == 0 || are_one && !causes.1.is_empty(), "{what}: {causes:?}");
            }
            Some("destination") => assert_moved(&world, &mut ending, &what),
            other => panic!("{what}: {other:?} runs the guest\n{:#?}", world.log()),
        }
        if !ending.struck {
            return at;
        }
    }
    panic!("more than {MESSAGES_MAX} messages");
}

/// The same on a link of a recovery: the operator wants one although nothing is broken when the guest has gone.
fn recovery_at_every_message(link: u32, end: End, fault: impl Fn() -> Fault) {
    for at in 0..MESSAGES_MAX {
        let world = World::new();
        let mut play = play(&world, PostcopyStart::AtOnce);
        (play.fault, play.fault_link) = (Some((end, at, fault())), link);
        play.breaks_after_handover = true;
        let mut ending = play.run();
        let what = format!("{:?} at message {at} of the {end:?} on link {link}", fault());
        assert_moved(&world, &mut ending, &what);
        if !ending.struck {
            return;
        }
    }
    panic!("more than {MESSAGES_MAX} messages");
}

#[test]
fn no_page_is_lost_with_any_message_of_the_main_link() {
    for end in [End::Source, End::Destination] {
        for fault in [|| Fault::CutBefore, || Fault::CutMiddle, || Fault::CutAfter] {
            assert!(at_every_message(0, end, PostcopyStart::AtOnce, fault) >= 5);
        }
    }
    // More messages, of few pages each.
    at_every_message(0, End::Source, PostcopyStart::AfterFirstRound, || Fault::CutMiddle);
}

/// The first link breaks late, in the background; what replaces it breaks too.
#[test]
fn no_page_is_lost_with_any_message_of_a_recovery() {
    for link in [2, 3] {
        for end in [End::Source, End::Destination] {
            for fault in [|| Fault::CutBefore, || Fault::CutAfter] {
                recovery_at_every_message(link, end, fault);
            }
        }
    }
}

#[test]
fn no_page_is_lost_with_any_message_of_the_channel_for_pages() {
    for end in [End::Source, End::Destination] {
        for fault in [|| Fault::CutBefore, || Fault::CutMiddle, || Fault::CutAfter] {
            assert!(at_every_message(1, end, PostcopyStart::AtOnce, fault) > 1);
        }
    }
}

#[test]
fn memory_comes_in_channels_before_it_follows() {
    for channels in [1, 2, 5] {
        for start in [PostcopyStart::AtOnce, PostcopyStart::AfterFirstRound] {
            let what = format!("{channels} channels, {start:?}");
            let world = World::new();
            let mut play = play(&world, start);
            play.channels = channels;
            // Between the first round and the end, again and again.
            play.source.writes = vec![300; 20];
            let mut ending = play.run();
            assert_moved(&world, &mut ending, &what);
            let (source, destination) = (&ending.source_statistics, &ending.destination_statistics);
            assert_eq!(source.channel_bytes.len(), usize::from(channels), "{what}");
            let beside: u64 = source.channel_bytes.iter().sum();
            let expected = if start == PostcopyStart::AtOnce { 0..64 << 10 } else { 280 * 4096..u64::MAX };
            assert!(expected.contains(&beside), "{what}: {beside} bytes");
            assert!(destination.postcopy.as_ref().is_some_and(|got| got.bytes > 0), "{what}");
        }
    }
}

/// Or a page that was sent in the first round and has changed since would be taken for the one that follows.
#[test]
fn what_comes_late_in_a_channel_is_older_than_what_is_dropped() {
    for lag in [2, 20].map(Duration::from_millis) {
        let world = World::new();
        let mut play = play(&world, PostcopyStart::AfterFirstRound);
        (play.channels, play.lag) = (2, lag);
        play.source.writes = vec![300; 20];
        let mut ending = play.run();
        assert_moved(&world, &mut ending, &format!("{lag:?}"));
    }
}

#[test]
fn no_page_is_lost_with_any_message_of_a_channel_or_beside_channels() {
    for link in 0..=3 {
        for end in [End::Source, End::Destination] {
            for fault in [|| Fault::CutBefore, || Fault::CutMiddle, || Fault::CutAfter] {
                with_channels_at_every_message(2, link, end, PostcopyStart::AfterFirstRound, fault);
            }
        }
    }
}
