//! Whole runs on the host, against a model of a machine with one NVMe controller that can be told to fail. What
//! the exerciser does not notice here, it would not notice in a virtual machine either.

mod model;

use exerciser::report::{Counters, Line};
use model::{Fault, Model};

/// Runs, and returns the lines.
fn run(words: &str, fault: Fault) -> Vec<String> {
    let mut model = Model::new(fault);
    exerciser::run(&mut model, words);
    assert!(model.is_off(), "the machine was not switched off");
    model.output().lines().map(str::to_owned).collect()
}

fn done(lines: &[String]) -> Counters {
    let last = lines.last().expect("a run prints lines");
    assert!(last.starts_with("done "), "{last}");
    Counters::from_line(&Line::parse(last)).expect("a done line has all counters")
}

/// The kind of the error that ends a run with this fault.
fn error(words: &str, fault: Fault) -> String {
    let lines = run(words, fault);
    assert_eq!(done(&lines).errors, 1, "{lines:#?}");
    let line = Line::parse(&lines[lines.len() - 2]);
    assert_eq!(line.kind, "error", "{lines:#?}");
    [line.get("kind"), line.get("reason")].into_iter().flatten().collect::<Vec<_>>().join(": ")
}

#[test]
fn a_good_controller_passes() {
    for words in [
        "ios=300",
        "ios=300 queues=4 inflight=32 depth=5",
        "ios=300 queues=2 doorbells=shadow",
        "ios=300 completion=msix queues=3",
        "ios=300 size=64K span=1M inflight=3 events=3",
        "ios=300 ram=64K dirty=100M check=100M",
    ] {
        let lines = run(words, Fault::None);
        let counters = done(&lines);
        assert_eq!(counters.errors, 0, "{words}: {lines:#?}");
        assert!(
            counters.verified >= 300 && counters.writes > 100 && counters.flushes > 0,
            "{words}: {counters}"
        );
        assert_eq!(counters.inflight, 0);
        assert_eq!(counters.ram_checked > 0, words.contains("ram="));
        let namespaces: Vec<_> =
            lines.iter().map(|line| Line::parse(line)).filter(|line| line.kind == "namespace").collect();
        let identifiers: Vec<_> = namespaces.iter().map(|line| line.number("nsid")).collect();
        assert_eq!(identifiers, [Some(2), Some(9)], "{words}");
    }
}

#[test]
fn cpuid_is_printed_where_it_is_asked_for() {
    let lines = run("ios=10 cpuid=show", Fault::None);
    let leaves: Vec<_> =
        lines.iter().map(|line| Line::parse(line)).filter(|line| line.kind == "cpuid").collect();
    let rings: Vec<_> = leaves.iter().map(|line| (line.number("ring"), line.number("eax"))).collect();
    assert_eq!(rings.len(), 12, "{lines:#?}");
    assert_eq!((rings[0], rings[6]), ((Some(0), Some(0)), (Some(3), Some(1))), "ring 3 has its own");
    assert!(!run("ios=10", Fault::None).iter().any(|line| line.starts_with("cpuid")));
}

#[test]
fn wrong_data_is_noticed() {
    assert_eq!(error("ios=500", Fault::FlipBit), "block");
    assert_eq!(error("ios=500", Fault::LoseWrite), "block");
    assert_eq!(error("ios=500", Fault::LoseZeroes), "block");
    assert_eq!(error("ios=500", Fault::NoData), "block");
    assert_eq!(error("ios=500", Fault::OtherBlock), "block");
}

#[test]
fn wrong_completions_are_noticed() {
    assert_eq!(error("ios=500", Fault::Status), "status");
    assert_eq!(error("ios=500 stall=50", Fault::LoseCompletion), "stall");
    assert_eq!(error("ios=500", Fault::Twice), "completion: no command has this identifier");
    assert_eq!(error("ios=500 depth=16", Fault::Head), "completion: impossible submission queue head");
    assert_eq!(error("ios=500 stall=50 completion=msix inflight=1", Fault::LoseInterrupt), "stall");
}

#[test]
fn memory_that_the_controller_does_not_have_is_missed() {
    for words in ["queues_in=cmb", "data_in=cmb"] {
        assert_eq!(error(words, Fault::None), "controller: has no controller memory buffer");
    }
    for words in ["pmr=fill", "pmr=kept", "data_in=pmr"] {
        assert_eq!(error(words, Fault::None), "controller: has no persistent memory region");
    }
}

#[test]
fn a_lost_event_request_is_noticed() {
    assert_eq!(error("ios=50 events=2", Fault::LoseEvent), "stall");
    assert_eq!(error("ios=50 events=9", Fault::None), "controller: takes fewer Asynchronous Event Requests");
}

#[test]
fn time_that_goes_back_is_noticed() {
    assert_eq!(error("ios=500", Fault::Time), "time");
}

#[test]
fn a_pause_is_a_gap_and_no_stall() {
    for words in ["ios=500 inflight=1", "ios=500 inflight=32 queues=4 doorbells=shadow"] {
        let lines = run(words, Fault::Pause);
        assert_eq!(done(&lines).errors, 0, "{words}: {lines:#?}");
        let gaps: Vec<u64> = lines
            .iter()
            .filter_map(|line| Counters::from_line(&Line::parse(line)))
            .map(|line| line.gap_us)
            .collect();
        let long = gaps.iter().filter(|gap| **gap >= 100_000_000).count();
        assert_eq!(long, 1, "{words}: {gaps:?}");
    }
}

#[test]
fn the_rate_is_counted() {
    let lines = run("mode=iops seconds=1 report=200", Fault::None);
    let counters = done(&lines);
    let rates: Vec<u64> = lines
        .iter()
        .map(|line| Line::parse(line))
        .filter(|line| line.kind == "rate")
        .map(|line| line.number("reads").expect("a rate line has the reads"))
        .collect();
    assert!(rates.len() >= 4 && counters.reads > 0);
    assert_eq!(rates.iter().sum::<u64>(), counters.reads);
    assert_eq!((counters.verified, counters.writes), (0, 0));
    let timed = lines.iter().map(|line| Line::parse(line)).filter(|line| line.number("timed") > Some(0));
    let (mut seen, mut median_ns) = (0, 0);
    for line in timed {
        let times = [line.number("latency_50_ns"), line.number("latency_99_ns")].map(Option::unwrap);
        assert!(times[0] <= times[1], "{line:?}");
        (seen, median_ns) = (seen + 1, times[0].max(median_ns));
    }
    assert!(seen > 0 && median_ns > 0, "commands take time");
}

#[test]
fn a_key_ends_the_run() {
    let mut model = Model::new(Fault::None);
    model.type_key(b'q');
    exerciser::run(&mut model, "report=1");
    let lines: Vec<String> = model.output().lines().map(str::to_owned).collect();
    assert_eq!(done(&lines).errors, 0);
}

#[test]
fn words_that_cannot_be_met_are_refused_with_a_reason() {
    assert_eq!(error("queues=65", Fault::None), "controller: grants fewer queues than asked for");
    assert_eq!(error("depth=2000", Fault::None), "controller: queues cannot be that deep");
    assert_eq!(error("quiet", Fault::None), "option: quiet: expected name=value");
}
