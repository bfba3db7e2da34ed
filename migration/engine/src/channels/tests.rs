//! One channel: what its bytes are, and what of them is refused.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dirty_bitmap::DirtyBitmap;
use transport::Connection;
use vm_memory::bitmap::NewBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, FileOffset, VolatileMemory, VolatileSlice};

use super::Compression;
use super::destination::Intake;
use super::lane::{Input, Lane, LaneInput, Watch};
use super::receive::Inlet;
use super::replay::{place, record};
use super::wire::{Chain, Head, RUNS_MAX, Run, RunKind};
use crate::link::{Link, Step};
use crate::tests::fresh::MockFresh;
use crate::{Error, FreshMemory, PAGE_BYTES, PageBitmap, Parameters, RamBlock, Statistics};

const PAGE: usize = PAGE_BYTES as usize;
/// Two chunks and a bit, and a small block; in the order of their names the small one is first.
const SIZES: [(&str, u64); 2] = [("ram.low", 520), ("namespace", 8)];

/// Fresh memory, with or without a file behind it.
pub(super) fn memory(with_file: bool) -> Vec<RamBlock> {
    let block = |(name, pages): &(&str, u64)| {
        let length = (pages * PAGE_BYTES) as usize;
        let bitmap = DirtyBitmap::with_len(length);
        let region = MmapRegionBuilder::new_with_bitmap(length, bitmap)
            .with_mmap_prot(nix::libc::PROT_READ | nix::libc::PROT_WRITE);
        let region = if with_file {
            let file = tempfile::tempfile().unwrap();
            file.set_len(length as u64).unwrap();
            region.with_mmap_flags(nix::libc::MAP_SHARED).with_file_offset(FileOffset::new(file, 0))
        } else {
            region.with_mmap_flags(nix::libc::MAP_ANONYMOUS | nix::libc::MAP_PRIVATE)
        };
        RamBlock { name: (*name).to_owned(), mapping: Arc::new(region.build().unwrap()) }
    };
    SIZES.iter().map(block).collect()
}

fn memfd_of(name: &str, length: usize) -> RamBlock {
    crate::tests::passed::Memory::block(name, length).0
}

fn write(block: &RamBlock, page: u64, value: u64) {
    block.mapping.as_volatile_slice().write_obj(value, (page * PAGE_BYTES) as usize + 8).unwrap();
}

fn contents(blocks: &[RamBlock]) -> Vec<Vec<u8>> {
    let of_block = |block: &RamBlock| {
        let mut bytes = vec![0; block.mapping.size()];
        block.mapping.as_volatile_slice().copy_to(&mut bytes);
        bytes
    };
    blocks.iter().map(of_block).collect()
}

fn bitmaps(pages: &[(usize, std::ops::Range<u64>)]) -> Vec<PageBitmap> {
    let mut bitmaps: Vec<_> = SIZES.iter().map(|(_, pages)| PageBitmap::new(*pages)).collect();
    pages.iter().for_each(|(block, range)| bitmaps[*block].set_range(range.clone()));
    bitmaps
}

/// Some of it is zero, in all ways that runs can lie.
fn filled() -> Vec<RamBlock> {
    let blocks = memory(false);
    for page in (0..520).filter(|page| page % 7 != 0 && !(300..320).contains(page)) {
        write(&blocks[0], page, page + 1);
    }
    (2..5).for_each(|page| write(&blocks[1], page, 77));
    blocks
}

fn recorded(compression: Compression) -> (Vec<RamBlock>, Vec<u8>) {
    let blocks = filled();
    let (first, second) = (bitmaps(&[(0, 0..520), (1, 1..6)]), bitmaps(&[(0, 5..9)]));
    let bytes = record(&blocks, &[&first, &second], compression, 0, 1).unwrap();
    (blocks, bytes)
}

/// As little as has all that a channel can carry.
fn small(compression: Compression) -> Vec<u8> {
    let blocks = filled();
    record(&blocks, &[&bitmaps(&[(1, 1..4)])], compression, 0, 1).unwrap()
}

fn refusal(bytes: &[u8]) -> String {
    place(bytes, &memory(false), None, 0, 1).expect_err("refused").chain()
}

#[test]
fn memory_arrives_as_it_is_however_it_is_kept_and_sent() {
    for compression in Compression::ALL {
        let (source, bytes) = recorded(compression);
        for with_file in [false, true] {
            let destination = memory(with_file);
            place(&bytes, &destination, None, 0, 1).unwrap();
            assert!(contents(&source) == contents(&destination), "{compression}, file: {with_file}");
        }
    }
}

#[test]
fn each_channel_carries_its_own_chunks_and_all_of_them_everything() {
    let source = filled();
    let all = bitmaps(&[(0, 0..520), (1, 0..8)]);
    for count in [2, 3, 5] {
        let destination = memory(true);
        let channels: Vec<_> = (0..count)
            .map(|index| record(&source, &[&all], Compression::None, index, count).unwrap())
            .collect();
        for (index, bytes) in (0..).zip(&channels) {
            place(bytes, &destination, None, index, count).unwrap();
            if bytes.len() > 100 {
                let other = (index + 1) % count;
                let error = place(bytes, &memory(false), None, other, count).unwrap_err().chain();
                assert!(error.contains("belong to another channel"), "{error}");
            }
        }
        assert!(contents(&source) == contents(&destination), "{count}");
    }
}

#[test]
fn holes_stay_holes_and_pages_that_became_zero_are_zero() {
    let source = memory(false);
    write(&source[0], 3, 1);
    let first = bitmaps(&[(0, 0..200)]);
    let before = record(&source, &[&first], Compression::None, 0, 1).unwrap();
    let destination = memory(true);
    place(&before, &destination, None, 0, 1).unwrap();
    let file: &File = destination[0].mapping.file_offset().unwrap().file();
    assert_eq!(file.metadata().unwrap().blocks() * 512, PAGE_BYTES, "one page has contents");

    // In the same session, so that the second round knows of the first.
    let end = before.len() - 24;
    let zero = Run { block: 1, kind: RunKind::Zero, first_page: 3, pages: 1, contents_bytes: 0 };
    let mut bytes = before[..end].to_vec();
    append(&mut bytes, 2, &[zero], &[], &[]);
    let destination = memory(false);
    place(&finished(&bytes, &[0..end, end..bytes.len()]), &destination, None, 0, 1)
        .expect_err("the chain holds contents, which are no part of it");
    // Its head, table and digest; its page; the other batch.
    let contents_start = end - PAGE;
    let parts = [0..contents_start, end..bytes.len()];
    place(&finished(&bytes, &parts), &destination, None, 0, 1).unwrap();
    assert!(contents(&destination)[0].iter().all(|byte| *byte == 0));
}

/// Fresh memory whose file is one of huge pages, which takes no writes. What is mapped is other memory: the host may have reserved none.
fn memory_with_huge_file() -> Option<Vec<RamBlock>> {
    use rustix::fs::MemfdFlags;

    let mut blocks = memory(false);
    for (block, (_, pages)) in blocks.iter_mut().zip(SIZES) {
        let length = (pages * PAGE_BYTES) as usize;
        let file = rustix::fs::memfd_create("huge", MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB).ok()?;
        rustix::fs::ftruncate(&file, (length as u64).next_multiple_of(2 << 20)).unwrap();
        let bitmap = DirtyBitmap::with_len(length);
        let region = MmapRegionBuilder::new_with_bitmap(length, bitmap)
            .with_mmap_prot(nix::libc::PROT_READ | nix::libc::PROT_WRITE)
            .with_mmap_flags(nix::libc::MAP_ANONYMOUS | nix::libc::MAP_PRIVATE)
            .with_file_offset(FileOffset::new(file.into(), 0));
        block.mapping = Arc::new(region.build().unwrap());
    }
    Some(blocks)
}

/// The second round brings pages between those of the first, and some of them once more.
#[test]
fn memory_that_is_filled_is_touched_only_where_it_holds_something() {
    let source = filled();
    let mut first = bitmaps(&[(0, 100..110), (1, 0..3)]);
    (200..520).step_by(3).for_each(|page| first[0].set(page));
    let all = bitmaps(&[(0, 0..520), (1, 0..8)]);
    for compression in Compression::ALL {
        let bytes = record(&source, &[&first, &all], compression, 0, 1).unwrap();
        for fails_after in [None, Some(0), Some(1), Some(30), Some(250)] {
            let destination: Vec<_> =
                SIZES.iter().map(|(name, pages)| memfd_of(name, *pages as usize * PAGE)).collect();
            let fresh = MockFresh::new(&destination, fails_after);
            let memory: Arc<dyn FreshMemory> = Arc::clone(&fresh) as _;
            place(&bytes, &destination, Some(&memory), 0, 1).unwrap();
            assert!(contents(&source) == contents(&destination), "{compression}, {fails_after:?}");
            assert_eq!(fresh.touched(), [], "{compression}, {fails_after:?}");
            assert_eq!(fresh.is_released(), fails_after.is_some());
            // Not the small block, which is the last.
            let with_contents = (0..520).filter(|page| page % 7 != 0 && !(300..320).contains(page)).count();
            assert_eq!(fresh.filled_pages(), fails_after.unwrap_or(with_contents as u64), "{compression}");
        }
    }
}

/// Devices would wait for ever when they are loaded.
#[test]
fn memory_that_waits_on_for_who_touches_it_is_no_guests() {
    let bytes = record(&filled(), &[&bitmaps(&[(0, 0..3)])], Compression::None, 0, 1).unwrap();
    let (parameters, statistics, patience) = (Parameters::new(), Statistics::new(), crate::tests::patience());
    for fails_after in [None, Some(0)] {
        let destination = [memfd_of(SIZES[0].0, 520 * PAGE), memfd_of(SIZES[1].0, 8 * PAGE)];
        let fresh = MockFresh::new(&destination, fails_after);
        fresh.cannot_be_released();
        let (mut near, far) = Connection::pair().unwrap();
        let channel = Link::new(far).unwrap().into_connection();
        near.write_all(&bytes).unwrap();
        let error = std::thread::scope(|scope| {
            let user = (&parameters, &statistics);
            let memory = (destination.as_slice(), Some(fresh as Arc<dyn FreshMemory>));
            let intake = Intake::start(scope, vec![channel], memory, user, &patience).unwrap();
            intake.finish(&[]).unwrap_err().chain()
        });
        assert!(error.ends_with("the host refuses"), "{fails_after:?}: {error}");
    }
}

#[test]
fn huge_pages_are_written_where_they_are_mapped() {
    let source = filled();
    let all = bitmaps(&[(0, 0..520), (1, 0..8)]);
    for compression in Compression::ALL {
        let bytes = record(&source, &[&all], compression, 0, 1).unwrap();
        let Some(destination) = memory_with_huge_file() else {
            return println!("this kernel has no huge pages of 2 MiB");
        };
        place(&bytes, &destination, None, 0, 1).unwrap();
        assert!(contents(&source) == contents(&destination), "{compression}");
    }
}

/// Adds a batch.
fn append(bytes: &mut Vec<u8>, round: u32, runs: &[Run], digests: &[u64], contents: &[u8]) {
    let contents_bytes = contents.len();
    bytes.extend(Head::Pages { round, runs: runs.len(), digests: digests.len(), contents_bytes }.encode());
    runs.iter().for_each(|run| bytes.extend(run.encode()));
    digests.iter().for_each(|digest| bytes.extend(digest.to_be_bytes()));
    bytes.extend(contents);
}

/// Adds the end, for heads and tables that are at `said`.
fn finished(bytes: &[u8], said: &[std::ops::Range<usize>]) -> Vec<u8> {
    let mut chain = Chain::default();
    said.iter().for_each(|range| chain.add(&bytes[range.clone()]));
    let end = Head::End.encode();
    chain.add(&end);
    [bytes, &end, &chain.digest().to_be_bytes()].concat()
}

#[test]
fn a_flipped_bit_anywhere_is_refused() {
    for compression in Compression::ALL {
        let bytes = small(compression);
        let blocks = memory(false);
        place(&bytes, &blocks, None, 0, 1).unwrap();
        for with_file in [false, true] {
            let destination = memory(with_file);
            for place_of_bit in 0..bytes.len() * 8 {
                // Every bit of what is said; of pages that are all alike, one of each byte.
                if place_of_bit > 200 * 8 && !place_of_bit.is_multiple_of(9) {
                    continue;
                }
                let mut flipped = bytes.clone();
                flipped[place_of_bit / 8] ^= 1 << (place_of_bit % 8);
                let result = place(&flipped, &destination, None, 0, 1);
                // What is compressed can be said in more ways than one.
                let is_another_way = || {
                    let fresh = memory(with_file);
                    compression != Compression::None
                        && place(&flipped, &fresh, None, 0, 1).is_ok()
                        && contents(&fresh) == contents(&blocks)
                };
                assert!(
                    result.is_err() || is_another_way(),
                    "{compression}: bit {place_of_bit} of {}",
                    bytes.len() * 8
                );
            }
        }
    }
}

#[test]
fn a_channel_that_is_cut_anywhere_is_refused() {
    for compression in Compression::ALL {
        let bytes = small(compression);
        let destination = memory(true);
        for length in 0..bytes.len() {
            let error = place(&bytes[..length], &destination, None, 0, 1).unwrap_err();
            assert!(matches!(error, Error::Lost { .. }), "{compression}, {length}: {}", error.chain());
        }
    }
}

#[test]
fn heads_that_cannot_be_are_refused() {
    let good = small(Compression::None);
    let refused = |place_of_bytes: usize, bytes: &[u8], words: &str| {
        let mut bad = good.clone();
        bad[place_of_bytes..place_of_bytes + bytes.len()].copy_from_slice(bytes);
        let error = refusal(&bad);
        assert!(error.contains(words), "{bytes:x?} at {place_of_bytes}: {error}");
    };
    refused(0, b"rb", "a batch begins with 0x72 0x62 0x01 0x00");
    refused(2, &[3], "a batch of kind 3");
    refused(2, &[2], "an end with contents");
    refused(3, &[1], "a batch begins with");
    refused(8, &[0, 0], "a batch of 0 runs");
    refused(8, &(RUNS_MAX as u16 + 1).to_be_bytes(), "a batch of 257 runs");
    refused(10, &257_u16.to_be_bytes(), "a batch of 257 pages");
    refused(12, &u32::MAX.to_be_bytes(), "are more than 2 pages have");
    refused(12, &4096_u32.to_be_bytes(), "the runs have 2 pages of 8192 bytes, the batch 2 of 4096");
    let mut late = good.clone();
    late[7] = 2;
    late.splice(late.len() - 24.., good.iter().copied());
    assert!(refusal(&late).contains("a batch of round 1 in round 2"));
}

#[test]
fn runs_that_cannot_be_are_refused() {
    let run = Run { block: 1, kind: RunKind::Data, first_page: 4, pages: 2, contents_bytes: 8192 };
    let cases: [(Run, &str); 12] = [
        (Run { block: 2, ..run }, "a run of block 2, which is not there"),
        (Run { pages: 0, contents_bytes: 0, ..run }, "are not inside one chunk"),
        (Run { first_page: 255, ..run }, "pages 0xff..0x101 are not inside one chunk of block 1"),
        (
            Run { first_page: 519, ..run },
            "pages 0x207..0x209 are not inside one chunk of block 1 of 0x208 pages",
        ),
        (Run { block: 0, first_page: 7, ..run }, "are not inside one chunk of block 0 of 0x8 pages"),
        (Run { first_page: u64::from(u32::MAX), ..run }, "are not inside one chunk"),
        (Run { contents_bytes: 4096, ..run }, "4096 bytes for 2 pages as Data"),
        (Run { kind: RunKind::Zero, ..run }, "8192 bytes for 2 pages as Zero"),
        (Run { kind: RunKind::Lz4, ..run }, "8192 bytes for 2 pages as Lz4"),
        (Run { kind: RunKind::Zstd, contents_bytes: 0, ..run }, "0 bytes for 2 pages as Zstd"),
        (Run { kind: RunKind::Lz4, contents_bytes: 100, ..run }, "LZ4: "),
        (Run { kind: RunKind::Zstd, contents_bytes: 100, ..run }, "Zstandard: "),
    ];
    for (run, words) in cases {
        let mut bytes = Vec::new();
        append(&mut bytes, 1, &[run], &[0, 0], &vec![0x5a; run.contents_bytes]);
        let error = refusal(&bytes);
        assert!(error.contains(words), "{run:?}: {error}");
    }
    let mut bytes = Vec::new();
    append(&mut bytes, 1, &[run], &[0, 0], &[0; 8192]);
    for (kind, zero) in [(4, 0), (1, 1)] {
        (bytes[18], bytes[19]) = (kind, zero);
        assert!(refusal(&bytes).contains("a run of kind"), "{kind} {zero}");
    }
}

#[test]
fn contents_never_become_larger_than_their_pages() {
    let bomb = vec![0; 64 * PAGE];
    for compression in [Compression::Lz4, Compression::Zstd] {
        let mut compressor = super::compress::Compressor::new(compression).unwrap().unwrap();
        let smaller = compressor.compress(&bomb).unwrap().to_vec();
        let kind = compressor.kind();
        for pages in [1, 63, 65] {
            let run = Run { block: 1, kind, first_page: 0, pages, contents_bytes: smaller.len() };
            let mut bytes = Vec::new();
            append(&mut bytes, 1, &[run], &vec![0; pages as usize], &smaller);
            let error = refusal(&bytes);
            assert!(
                error.contains("LZ4") || error.contains("Zstandard") || error.contains("came out"),
                "{error}"
            );
        }
    }
}

/// The guest writes to pages while they are sent: what the source saw is not what came.
#[test]
fn a_page_that_was_written_to_meanwhile_must_come_again() {
    let page = |value: u8| vec![value; PAGE];
    let seen = |value: u8| twox_hash::XxHash3_64::oneshot(&page(value));
    let run = |first_page| Run { block: 1, kind: RunKind::Data, first_page, pages: 1, contents_bytes: PAGE };
    for with_file in [false, true] {
        let mut bytes = Vec::new();
        append(&mut bytes, 1, &[run(7), run(9)], &[seen(1), seen(2)], &[page(8), page(2)].concat());
        let first = 16 + 2 * 16 + 2 * 8;
        let error =
            place(&finished(&bytes, std::slice::from_ref(&(0..first))), &memory(with_file), None, 0, 1)
                .unwrap_err()
                .chain();
        assert!(error.contains("page 0x7 of RAM block \"ram.low\" is not what was sent"), "{error}");
        let second = bytes.len();
        append(&mut bytes, 2, &[run(7)], &[seen(3)], &page(3));
        let said = [0..first, second..second + 16 + 16 + 8];
        let destination = memory(with_file);
        place(&finished(&bytes, &said), &destination, None, 0, 1).unwrap();
        let placed = &contents(&destination)[0];
        assert!(placed[7 * PAGE..8 * PAGE] == page(3) && placed[9 * PAGE..10 * PAGE] == page(2));
    }
}

/// A page that is named as one that follows comes once more: what of it came in a channel was dropped, and nobody judges it.
#[test]
fn a_page_that_was_written_to_meanwhile_may_follow() {
    let run = Run { block: 1, kind: RunKind::Data, first_page: 7, pages: 1, contents_bytes: PAGE };
    let mut bytes = Vec::new();
    append(&mut bytes, 1, &[run], &[0], &[8; PAGE]);
    let bytes = finished(&bytes, std::slice::from_ref(&(0..16 + 16 + 8)));
    let (parameters, statistics) = (Parameters::new(), Statistics::new());
    let end_with = |follow: [&PageBitmap; 2]| {
        let (mut near, far) = Connection::pair().unwrap();
        let channel = Link::new(far).unwrap().into_connection();
        near.write_all(&bytes).unwrap();
        std::thread::scope(|scope| {
            let user = (&parameters, &statistics);
            let patience = crate::tests::patience();
            let intake =
                Intake::start(scope, vec![channel], (&memory(false), None), user, &patience).unwrap();
            intake.finish(&follow)
        })
    };
    let by_name = |pages: &[u64]| {
        let [mut low, namespace] = <[PageBitmap; 2]>::try_from(bitmaps(&[])).unwrap();
        pages.iter().for_each(|page| low.set(*page));
        [namespace, low]
    };
    for others in [&[][..], &[6, 8]] {
        let error = end_with(by_name(others).each_ref()).unwrap_err().chain();
        assert!(error.contains("page 0x7 of RAM block \"ram.low\" is not what was sent"), "{error}");
    }
    assert_eq!(end_with(by_name(&[7, 8]).each_ref()).unwrap().len(), 1);
    assert_eq!(
        (&*statistics.snapshot().channel_pages, statistics.snapshot().channel_bytes[0]),
        (&[1][..], 4136)
    );
}

fn step(patience: Duration) -> Step<'static> {
    Step { doing: "testing", patience, cancel: None, until: None }
}

/// Both ends of a channel, as they are after their hellos.
fn ends() -> (Lane, Lane) {
    let (one, other) = Connection::pair().unwrap();
    let lane = |connection| Lane::new(Link::new(connection).unwrap().into_connection());
    (lane(one), lane(other))
}

#[test]
fn a_channel_may_be_silent_between_batches_and_not_within_one() {
    let (mut near, far) = ends();
    let bytes = small(Compression::None);
    let watch = Watch::default();
    let brief = step(Duration::from_millis(1));
    let (begin, rest) = bytes.split_at(50);
    near.send::<()>(begin, &[], step(Duration::from_secs(20)), &watch).unwrap();
    let mut input = LaneInput { lane: far, step: brief, watch: &watch, since: Instant::now() };
    let error = Inlet::new(&memory(false), 0, 1, None).receive(&mut input).unwrap_err();
    assert!(matches!(error, Error::TimedOut { .. }), "{error:?}");

    let (mut near, far) = ends();
    std::thread::scope(|scope| {
        let (told, ended) = std::sync::mpsc::channel();
        let watch = &watch;
        scope.spawn(move || {
            let mut input = LaneInput { lane: far, step: brief, watch, since: Instant::now() };
            told.send(Inlet::new(&memory(false), 0, 1, None).receive(&mut input)).unwrap();
        });
        let silence = ended.recv_timeout(Duration::from_millis(50));
        assert!(silence.is_err(), "it waits for a batch: {silence:?}");
        near.send::<()>(&[begin, rest].concat(), &[], step(Duration::from_secs(20)), watch).unwrap();
        assert!(ended.recv_timeout(Duration::from_secs(20)).unwrap().is_ok());
    });
}

#[test]
fn a_channel_ends_with_the_others_whatever_it_waits_for() {
    let (mut near, far) = ends();
    let watch = Watch::default();
    std::thread::scope(|scope| {
        let receiving = scope.spawn(|| {
            let mut lane =
                LaneInput { lane: far, step: step(Duration::MAX), watch: &watch, since: Instant::now() };
            lane.read(&mut [0; 1], true)
        });
        watch.fail(Error::Closed { doing: "testing" });
        watch.fail(Error::Cancelled);
        assert!(receiving.join().unwrap().is_err());
    });
    let mut much = vec![0; 8 << 20];
    let memory = [VolatileSlice::from(much.as_mut_slice())];
    assert!(near.send(&[], &memory, step(Duration::from_secs(20)), &watch).is_err());
    assert!(matches!(watch.take_cause(), Some(Error::Closed { .. })), "the first cause counts");
}

/// Both sides have the same digests, whichever version they are.
#[test]
fn digests_are_those_of_every_version() {
    let mut chain = Chain::default();
    (0..200_u32).for_each(|number| chain.add(&number.to_le_bytes()));
    let digests = [super::combined(1, [2, 3]), chain.digest(), twox_hash::XxHash3_64::oneshot(&[7; PAGE])];
    assert_eq!(digests, [0x2721_7e97_05f2_4dec, 0xb881_6dc2_61d1_f241, 0x63a6_bf87_74b6_859d]);
    assert_eq!(twox_hash::XxHash3_64::oneshot(b""), 0x2d06_8005_38d3_94c2, "XXH3, as published");
}
