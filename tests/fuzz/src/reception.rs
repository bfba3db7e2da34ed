//! A destination that hears a whole peer: greeting, hello, images, RAM, devices and the hand-over, in any order and as often as it
//! likes.
//!
//! What is tried here is what a peer can do that has got through TLS, or comes without: everything below is someone else's code,
//! with tests of its own.

use std::io::{self, Cursor, Read, Write};
use std::net::Shutdown;
use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::lease::Id;
use engine::protocol::{Commit, Hello, Prepare, Progress, Properties, Query, Reasons, Settle};
use engine::storage::{Disk, IncomingDisks};
use engine::{
    Description, Destination, DestinationFactory, DestinationMachine, MachineResult, PAGE_BYTES, Parameters,
    Patience, RamBlock, RunState, Statistics, features,
};
use stream::frame::{self, Kind};
use stream::{Expected, SectionSet};
use transport::{Connection, Link};
use vm_memory::MmapRegion;
use vmstate::VmState;

use crate::images::{self, Images};
use crate::streams::{self, Device};

/// What a peer says, and then that it has gone. What it is told it does not hear.
#[derive(Debug)]
struct Script(Cursor<Vec<u8>>);

impl Read for Script {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.0.read(buffer)
    }
}

impl Write for Script {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Link for Script {
    fn try_clone(&self) -> io::Result<Box<dyn Link>> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn set_read_timeout(&self, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }

    fn set_write_timeout(&self, _: Option<Duration>) -> io::Result<()> {
        Ok(())
    }

    fn shutdown(&self, _: Shutdown) -> io::Result<()> {
        Ok(())
    }
}

/// Builds the model machine for whoever comes.
#[derive(Debug, Default)]
struct Factory {
    /// Those that come.
    images: Option<Images>,
}

/// The model machine, and how far it has come.
#[derive(Debug)]
struct Model {
    blocks: Vec<RamBlock>,
    loaded: bool,
    owned: bool,
    started: Option<RunState>,
}

impl DestinationFactory for Factory {
    type Machine = Model;

    fn description(&mut self) -> MachineResult<Description> {
        Ok(description())
    }

    fn receive_disks(&mut self, _: &Id, disks: &[Disk]) -> MachineResult<Box<dyn IncomingDisks>> {
        if disks != images::disks() {
            return Err("other images are expected".into());
        }
        assert!(self.images.is_none(), "they come once");
        Ok(Box::new(self.images.insert(Images::default()).clone()))
    }

    fn expected(&mut self) -> MachineResult<Expected> {
        Ok(streams::expected())
    }

    fn build(&mut self, source: &Description) -> MachineResult<Model> {
        assert!(source.differences(&description()).is_empty(), "only what fits is built");
        let blocks = streams::blocks().into_iter().map(|block| {
            let length = usize::try_from(block.length_bytes)?;
            Ok(RamBlock { name: block.name, mapping: Arc::new(MmapRegion::new(length)?) })
        });
        let blocks = blocks.collect::<MachineResult<_>>()?;
        Ok(Model { blocks, loaded: false, owned: false, started: None })
    }
}

impl DestinationMachine for Model {
    fn ram_blocks(&self) -> Vec<RamBlock> {
        self.blocks.clone()
    }

    fn load_devices(&mut self, mut sections: SectionSet) -> MachineResult<()> {
        assert!(!self.loaded, "once");
        sections.take::<Device>("device", 0)?;
        sections.take::<Device>("device", 1)?;
        sections.finish()?;
        self.loaded = true;
        Ok(())
    }

    fn take_image_locks(&mut self) -> MachineResult<()> {
        assert!(self.loaded, "images are taken for a guest that is here");
        self.owned = true;
        Ok(())
    }

    fn open_images(&mut self) -> MachineResult<()> {
        Ok(())
    }

    fn release_images(&mut self) {
        self.owned = false;
    }

    fn start(&mut self, state: RunState) -> MachineResult<Option<Instant>> {
        assert!(self.owned && self.started.is_none(), "it starts once, with its images");
        self.started = Some(state);
        Ok(None)
    }
}

fn description() -> Description {
    let mut description = Description::new();
    description.set("machine", "model");
    description.set("nvme.d0.queues", 8);
    description
}

/// Everything that a peer says to a destination; whether a guest has arrived.
fn hear(bytes: &[u8]) -> bool {
    let (statistics, parameters) = (Statistics::new(), Parameters::new());
    // Nobody is waited for: whoever has said all has gone.
    let destination = Destination::new(None, &statistics, Patience::default(), &parameters);
    let mut destination = destination.expect("there is randomness");
    let connection = || Connection::new(Box::new(Script(Cursor::new(bytes.to_vec()))), "a peer");
    let mut factory = Factory::default();
    let arrived = destination.serve(&mut factory, connection());
    let are_owned = factory.images.is_none_or(|images| images.owner().is_some());
    let Some(mut arrived) = arrived else { return false };
    assert!(arrived.machine.started == Some(arrived.state) && arrived.machine.loaded && are_owned);
    // Whoever comes now is too late, whatever it says.
    destination.answer_one(&mut arrived, connection());
    true
}

/// Everything that a peer says to a destination.
pub fn reception(bytes: &[u8]) {
    hear(bytes);
}

fn message(out: &mut Vec<u8>, kind: Kind, body: &impl VmState) {
    frame::write(out, kind, 0, &vmstate::to_bytes(body)).expect(WRITTEN);
}

const WRITTEN: &str = "our own writer can write it";
const SESSION: [u8; 16] = [7; 16];

/// A peer up to the hello.
fn introduced(with_images: bool) -> Vec<u8> {
    let mut out = frame::encode_preamble().to_vec();
    let mut description = description();
    for Disk { name, length_bytes, format } in images::disks().into_iter().filter(|_| with_images) {
        description.set(format!("storage.{name}.length_bytes"), length_bytes);
        description.set(format!("storage.{name}.format"), format);
    }
    let properties = Properties::try_from(&description).expect("it can be told");
    let mut hello = Hello::new(SESSION, None, properties);
    hello.features = if with_images { features::STORAGE | features::SETTLE } else { 0 };
    message(&mut out, Kind::Hello, &hello);
    out
}

/// A peer up to its request to load, whose stream is cut into frames of this length.
fn sent(frame_bytes: usize, with_images: bool) -> Vec<u8> {
    let mut out = introduced(with_images);
    let writer = streams::model(true).expect(WRITTEN);
    let mut digest = writer.digest();
    if with_images {
        digest = images::digest_of(digest);
        let bodies = images::bodies();
        bodies.iter().for_each(|body| frame::write(&mut out, Kind::Blocks, 0, body).expect(WRITTEN));
        message(&mut out, Kind::Settle, &Settle { channel_bytes: 0 });
    }
    for piece in writer.finish_live().expect(WRITTEN).chunks(frame_bytes) {
        frame::write(&mut out, Kind::Stream, 0, piece).expect(WRITTEN);
    }
    message(&mut out, Kind::Progress, &Progress { rounds: 2, ..Progress::default() });
    message(&mut out, Kind::Prepare, &Prepare { digest, running: true });
    out
}

/// Peers that are understood.
///
/// # Panics
///
/// If no guest arrives of those that should.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let commit = Commit { session: SESSION, generation: 0 };
    let arriving = |frame_bytes, with_images| {
        let mut out = sent(frame_bytes, with_images);
        message(&mut out, Kind::Commit, &commit);
        message(&mut out, Kind::Commit, &commit);
        message(&mut out, Kind::Progress, &Progress::default());
        assert!(hear(&out), "a guest arrives");
        out
    };
    let page = PAGE_BYTES as usize;
    let mut cancelled = sent(page, false);
    message(&mut cancelled, Kind::Cancel, &Reasons::new(&["enough"]));
    let mut asking = frame::encode_preamble().to_vec();
    message(&mut asking, Kind::Query, &Query { session: SESSION, instance: [8; 16] });
    vec![
        arriving(page, false),
        arriving(777, false),
        cancelled,
        asking,
        introduced(false),
        arriving(page, true),
        introduced(true),
    ]
}
