//! Two builds, one of which lacks something that the other knows: the guest moves without it, or is refused with a reason that names
//! it. Nothing is said that an older build would not understand.

use std::sync::Arc;
use std::time::Duration;

use stream::frame::Kind;

use super::local::local;
use super::migrate::assert_moved;
use super::mock::World;
use super::overheard::Overheard;
use super::storage::Hosts;
use super::{Ending, Play, postcopy};
use crate::features::{
    CHANNELS, IMAGE_FILES, LOCAL, LZ4, MOMENT, PAGE_RUNS, POSTCOPY, SETTLE, STORAGE, SUPPORTED, ZSTD,
};
use crate::{Compression, Outcome, Parameters, PostcopyStart};

/// How a guest is to move.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Way {
    OverTheLink,
    InChannels(Compression),
    /// Ahead of its memory, some of which may have come in so many channels.
    Ahead(PostcopyStart, u16),
    /// With its memory itself.
    Itself,
    WithImages,
}

const WAYS: [Way; 10] = [
    Way::OverTheLink,
    Way::InChannels(Compression::None),
    Way::InChannels(Compression::Lz4),
    Way::InChannels(Compression::Zstd),
    Way::Ahead(PostcopyStart::AtOnce, 0),
    Way::Ahead(PostcopyStart::AtOnce, 2),
    Way::Ahead(PostcopyStart::AfterFirstRound, 0),
    Way::Ahead(PostcopyStart::AfterFirstRound, 2),
    Way::Itself,
    Way::WithImages,
];

/// Every feature by itself, and all at once: the first build of all.
fn lacks() -> impl Iterator<Item = u64> {
    (0..u64::BITS).map(|bit| 1 << bit).filter(|bit| SUPPORTED & bit != 0).chain([SUPPORTED])
}

impl Way {
    /// What is seen to be used between two builds of today.
    fn uses(self) -> u64 {
        match self {
            Self::OverTheLink => SETTLE | MOMENT,
            Self::InChannels(Compression::None) => CHANNELS | SETTLE | MOMENT,
            Self::InChannels(Compression::Lz4) => CHANNELS | LZ4 | SETTLE | MOMENT,
            Self::InChannels(Compression::Zstd) => CHANNELS | ZSTD | SETTLE | MOMENT,
            Self::Ahead(PostcopyStart::AtOnce, 0) => POSTCOPY | PAGE_RUNS | MOMENT,
            Self::Ahead(PostcopyStart::AtOnce, _) => POSTCOPY | PAGE_RUNS | CHANNELS | SETTLE | MOMENT,
            Self::Ahead(_, 0) => POSTCOPY | MOMENT,
            Self::Ahead(..) => POSTCOPY | CHANNELS | SETTLE | MOMENT,
            Self::Itself => LOCAL | IMAGE_FILES | MOMENT,
            // Two hosts, with a clock each.
            Self::WithImages => STORAGE | SETTLE,
        }
    }

    /// What is seen to be used without `lacking`, where the guest moves.
    fn uses_without(self, lacking: u64) -> u64 {
        match self {
            // Contents are sent, as they are anywhere.
            Self::Itself | Self::InChannels(_) if lacking & (LOCAL | CHANNELS) & self.uses() != 0 => {
                Self::OverTheLink.uses() & !lacking
            }
            Self::Ahead(start, _) if lacking & CHANNELS != 0 => Self::Ahead(start, 0).uses() & !lacking,
            _ => self.uses() & !lacking,
        }
    }

    /// Words of the reason for which the guest stays, if it does.
    fn refusal(self, lacking: u64) -> Option<&'static str> {
        match self {
            Self::Ahead(..) if lacking & POSTCOPY != 0 => Some("postcopy: "),
            Self::Ahead(_, 2) if lacking & SETTLE != 0 => {
                Some("memory may follow, and it never says what of the channels is in its place")
            }
            Self::WithImages if lacking & STORAGE != 0 => Some("storage: the source has "),
            _ => None,
        }
    }

    fn play(self) -> (World, Play, Option<Hosts>) {
        let world = World::new();
        let mut play = match self {
            Self::OverTheLink => Play::new(&world),
            Self::InChannels(compression) => {
                let mut play = Play::new(&world);
                play.channels = 2;
                play.parameters.set_compression(compression);
                play
            }
            Self::Ahead(start, channels) => {
                if start == PostcopyStart::AtOnce {
                    // Several pages are asked for at once, and hardly anything comes unasked.
                    world.enlarge_pages(8);
                }
                let mut play = postcopy::play(&world, start);
                if start == PostcopyStart::AtOnce {
                    play.parameters.set_max_bandwidth(Parameters::MAX_BANDWIDTH_LEAST);
                }
                play.channels = channels;
                play
            }
            Self::Itself => local(&world),
            Self::WithImages => {
                let hosts = Hosts::new();
                let mut play = hosts.play();
                play.overheard = Some(Arc::default());
                return (hosts.world.clone(), play, Some(hosts));
            }
        };
        play.overheard = Some(Arc::default());
        (world, play, None)
    }
}

/// The features that somebody used.
fn used(ending: &Ending, heard: &Overheard, way: Way) -> u64 {
    let statistics = &ending.source_statistics;
    let compression = match way {
        Way::InChannels(Compression::Lz4) => LZ4,
        Way::InChannels(Compression::Zstd) => ZSTD,
        _ => 0,
    };
    // Without larger pages whether several are asked for at once is a matter of how fast they come.
    let runs = matches!(way, Way::Ahead(PostcopyStart::AfterFirstRound, _));
    let has_moment = ending.arrived.as_ref().is_some_and(|arrived| arrived.running.ran.is_some());
    let signs = [
        (CHANNELS, !statistics.channel_bytes.is_empty()),
        (compression, statistics.compressed_pages > 0),
        (LOCAL, heard.has(Kind::Memory) || heard.has(Kind::Mapped)),
        (IMAGE_FILES, heard.has(Kind::ImageFiles) || heard.has(Kind::Identified)),
        (
            POSTCOPY,
            [Kind::Missing, Kind::Listed, Kind::PageRequest, Kind::Pages].iter().any(|kind| heard.has(*kind)),
        ),
        (PAGE_RUNS, heard.has(Kind::RunRequest) && !runs),
        (STORAGE, heard.has(Kind::Blocks)),
        (SETTLE, heard.has(Kind::Settle) || heard.has(Kind::Settled)),
        (MOMENT, has_moment),
    ];
    signs.iter().filter(|(_, seen)| *seen).fold(0, |used, (feature, _)| used | feature)
}

/// Moves a guest, or does not, between two builds that lack this.
fn moves(way: Way, lacking: (u64, u64)) {
    let what = format!("{way:?}, lacking {lacking:x?}");
    let (world, mut play, hosts) = way.play();
    play.lacking = lacking;
    if !matches!(way, Way::Ahead(..)) {
        // However slow this host is: rounds end.
        play.parameters.set_downtime_limit(Duration::from_secs(3600));
    }
    let heard = Arc::clone(play.overheard.as_ref().unwrap());
    let mut ending = play.run();
    world.assert_sound(&what);
    let lacking = lacking.0 | lacking.1;
    if let Some(words) = way.refusal(lacking) {
        let Some((Outcome::Failed { error, paused: None }, _)) = &ending.source else {
            panic!("{what}: {:?}", ending.source.as_ref().map(|(outcome, _)| outcome));
        };
        assert!(error.chain().contains(words), "{what}: {}", error.chain());
        assert_eq!(ending.source_statistics.normal_pages, 0, "{what}: before anything moves");
        assert!(ending.arrived.is_none(), "{what}");
        assert_eq!(world.running(), ["source"], "{what}");
        return;
    }
    println!("{what}");
    match (way, &hosts) {
        (Way::Ahead(..), _) => postcopy::assert_moved(&world, &mut ending, &what),
        (_, Some(hosts)) => hosts.assert_moved(&ending),
        (_, None) => assert_moved(&world, &ending),
    }
    assert_eq!(world.running(), ["destination"], "{what}");
    let (used, expected) = (used(&ending, &heard, way), way.uses_without(lacking));
    assert_eq!(used, expected, "{what}: uses {used:#x} instead of {expected:#x}");
}

#[test]
fn two_builds_of_today_use_all_that_a_way_has() {
    WAYS.into_iter().for_each(|way| moves(way, (0, 0)));
}

#[test]
fn a_guest_comes_from_a_build_that_lacks_something() {
    WAYS.into_iter().for_each(|way| lacks().for_each(|lacking| moves(way, (lacking, 0))));
}

#[test]
fn a_guest_goes_to_a_build_that_lacks_something() {
    WAYS.into_iter().for_each(|way| lacks().for_each(|lacking| moves(way, (0, lacking))));
}

/// A feature that has no test here is none that was thought of.
#[test]
fn every_feature_is_used_in_some_way() {
    assert_eq!(WAYS.into_iter().fold(0, |all, way| all | way.uses()), SUPPORTED);
}
