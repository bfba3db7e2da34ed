//! With the exerciser: many disk commands, RAM that is dirtied and checked, a look at the time.

use std::fs::File;

use anyhow::Context;
use exerciser::report::Counters;

use super::report::{Checked, Report};
use super::{Audience, destination};
use crate::drive::Stage;
use crate::drive::exerciser::{Gap, Reader, history};

pub use crate::drive::exerciser::IMAGE;

/// Verified I/Os on each side that the demonstration waits for.
const ENOUGH: u64 = 1000;
/// Size of the disk that is a file.
const DISK_BYTES: u64 = 64 << 20;
/// What the guest does: see the exerciser's README.
const WORDS: &str = "queues=4 inflight=32 size=64K events=2 ram=96M dirty=16M check=64M";

/// Moves the exerciser while it verifies its I/O.
///
/// # Errors
/// A process failed or the guest found an error; with what both sides wrote last.
pub fn run(stage: &mut Stage, audience: &mut dyn Audience) -> anyhow::Result<Report> {
    let disk = stage.folder().join("disk.img");
    let kernel = stage.folder().join("exerciser.elf");
    File::create(&disk)
        .and_then(|file| file.set_len(DISK_BYTES))
        .and_then(|()| std::fs::write(&kernel, IMAGE))
        .with_context(|| format!("cannot make the guest's files in {}", stage.folder().display()))?;
    let machine = stage.machine([
        "--memory".to_owned(),
        "256M".to_owned(),
        "--nvme".to_owned(),
        "serial=demo,queues=8".to_owned(),
        "--ns".to_owned(),
        format!("controller=demo,nsid=1,backend=file,path={}", disk.display()),
        "--ns".to_owned(),
        "controller=demo,nsid=3,backend=memory,size=16M".to_owned(),
        "--ns".to_owned(),
        "controller=demo,nsid=7,backend=memory,size=16M,lba=4096".to_owned(),
    ]);

    let mut source = machine.boot("source", &kernel, WORDS)?;
    stage.enter(&source)?;
    audience.hear(&format!(
        "the exerciser runs in process {}: 256 MiB RAM, NVMe namespaces 1 (file), 3 and 7 (memory, 512 and 4096 bytes a block)",
        source.id()
    ));
    let mut reader = Reader::new();
    reader.wait_for_verified(&source, ENOUGH)?;
    let mut destination = destination(stage, &machine)?;
    audience.hear(&format!("moving to process {}", destination.id()));
    let finished = source.migrate_to(&mut destination, |progress| audience.see(progress))?;

    let before = history(&source);
    let last = before.last().copied().context("the source has said something")?;
    let mut reader = Reader::new();
    let first = reader.wait_for(&destination, "a first line", |_| true)?;
    reader.wait_for_verified(&destination, first.verified + ENOUGH)?;
    audience.hear("the guest goes on; it now checks everything once more and ends");
    let done = reader.finish(&mut destination)?;
    destination.wait_for_end()?;
    source.quit()?;
    let report = Report::new(&finished, "exerciser")?;
    Ok(Report {
        verified: sides(&last, &first, &done, |counters| counters.verified),
        ram_checked: Some(sides(&last, &first, &done, |counters| counters.ram_checked)),
        guest_gap: Some(Gap::new(&before, &first)),
        ..report
    })
}

/// What was counted for sure before the move and after it: what happened between two lines is left out.
fn sides(last: &Counters, first: &Counters, done: &Counters, count: impl Fn(&Counters) -> u64) -> Checked {
    Checked { before: count(last), after: count(done).saturating_sub(count(first)) }
}
