//! The side that the guest leaves.
//!
//! [`migrate`] is the story: agree, rounds, stop, prepare. Until then every failure goes through `undo` and the guest runs on.
//! Then a [`Handover`] gives the guest away, or finds out whose it is.

use std::thread::Scope;
use std::time::{Duration, Instant};

use stream::DeviceSection;

use crate::channels::combined;
use crate::channels::source::{Channels, Opened, offered, open};
use crate::handover::Handover;
use crate::lease::{Id, Lease, random_id};
use crate::link::{Dial, Link, Step, Until};
use crate::local::{Memory, prepare_until_little_is_left};
use crate::ownership::source::{Action, Event, Source};
use crate::postcopy::{self, Followers, Remainder, announce};
use crate::protocol::{Hello, Message, Prepare, Properties, Reasons};
use crate::ram::Outgoing;
use crate::rounds::{Rest, check_way_out, prepare_stop, rounds};
use crate::sink::Sink;
use crate::storage::Leaving;
use crate::{
    Description, Error, PageBitmap, Parameters, Patience, RamBlock, RunState, SaveFor, SourceMachine,
    Statistics, Status, features,
};

/// What a migration is made with.
pub struct Context<'a> {
    /// The guest's lease, if it has one. Without, a late failure may need an operator.
    pub lease: Option<&'a mut Lease>,
    /// What the user may change meanwhile.
    pub parameters: &'a Parameters,
    /// What the user sees.
    pub statistics: &'a Statistics,
    /// How long each step may take.
    pub patience: Patience,
}

/// How it ended.
#[derive(Debug)]
pub enum Outcome {
    /// The guest is the destination's (or the file's); [`SourceMachine::finish`] was called.
    Completed {
        /// What decided, where it was not the answer to COMMIT.
        note: Option<String>,
    },
    /// The guest is ours.
    Failed {
        /// What went wrong ([`Error::Cancelled`]: the user's wish).
        error: Error,
        /// Why the guest stays paused, if it could not be resumed.
        paused: Option<String>,
    },
    /// COMMIT was sent, or the lease could not be written, and nothing has decided yet: the guest must stay paused.
    /// [`Handover::resolve`] may be called again.
    Unknown(Handover),
}

/// Moves the guest to the destination that `dial` reaches. `dial` is called again after a lost link, to ask what became of
/// the guest.
pub fn migrate(machine: &mut dyn SourceMachine, dial: &mut Dial<'_>, context: &mut Context<'_>) -> Outcome {
    context.statistics.start();
    let mut attempt = Attempt::new(context.lease.is_some());
    let outcome = match attempt.run(machine, dial, context) {
        Ok(handover) => handover.begin(machine, &mut attempt.link, dial, context),
        Err(error) => attempt.undo(machine, context, error),
    };
    let outcome = attempt.take_leave(context, outcome);
    report(&outcome, context.statistics);
    outcome
}

/// Tells the user how it ended.
pub(crate) fn report(outcome: &Outcome, statistics: &Statistics) {
    match outcome {
        Outcome::Completed { .. } => statistics.set_status(Status::Completed),
        Outcome::Failed { error, paused } => {
            let paused = paused.as_ref().map(|why| format!("; the guest stays paused: {why}"));
            let cause = format!("{}{}", error.chain(), paused.unwrap_or_default());
            match error {
                Error::Cancelled => statistics.cancelled(&cause),
                _ => statistics.fail(&cause),
            }
        }
        Outcome::Unknown(_) => {}
    }
}

/// What has been done so far, and so what must be undone.
struct Attempt {
    ownership: Source,
    session: Id,
    instance: Id,
    link: Option<Link>,
    /// What goes itself, instead of its contents.
    memory: Option<Memory>,
    /// They stay open until leave was taken.
    channels: Option<Opened>,
    /// Where the destination asks for pages, and what it shows there.
    pages: Option<Link>,
    key: Id,
    /// Guest memory that follows after the guest.
    remainder: Option<Box<Remainder>>,
    /// Whether the destination says when it has placed all.
    settles: bool,
    /// Images that go with the guest.
    disks: Option<Box<Leaving>>,
    tracking: bool,
    stopped: Option<Stopped>,
    disks_touched: bool,
}

#[derive(Clone, Copy)]
struct Stopped {
    state: RunState,
    since: Instant,
    until: Until,
}

impl Attempt {
    fn new(leased: bool) -> Self {
        Self {
            ownership: Source::new(leased),
            session: Id::default(),
            instance: Id::default(),
            link: None,
            memory: None,
            channels: None,
            pages: None,
            key: Id::default(),
            remainder: None,
            settles: false,
            disks: None,
            tracking: false,
            stopped: None,
            disks_touched: false,
        }
    }

    /// Everything until the destination has loaded and it is too late to cancel.
    fn run(
        &mut self,
        machine: &mut dyn SourceMachine,
        dial: &mut Dial<'_>,
        context: &mut Context<'_>,
    ) -> Result<Handover, Error> {
        let reasons = machine.blockers();
        if !reasons.is_empty() {
            return Err(Error::Blocked { reasons });
        }
        self.session = random_id()
            .map_err(|source| Error::Machine { doing: "draw a session id", source: source.into() })?;
        self.agree(machine, dial, context)?;
        let digest = std::thread::scope(|scope| self.transfer(scope, machine, context))?;
        self.prepare(machine, context, digest)?;
        if let Some(error) = self.remainder.as_ref().and_then(|remainder| remainder.take_loss()) {
            return Err(error);
        }
        if !context.parameters.commit() {
            return Err(Error::Cancelled);
        }
        let Stopped { state, since, .. } = self.stopped.expect("transfer stops the guest");
        let link = self.link.as_ref().expect("agree leaves a link");
        let handover = Handover::new(self.ownership, self.session, link, self.instance, state, since);
        let handover = handover.with_remainder(self.remainder.take()).with_disks(self.disks.take());
        Ok(match self.memory.take() {
            Some(memory) => handover.with_memory(memory.into_writable()),
            None => handover,
        })
    }

    /// Connects, and lets the destination check and build.
    fn agree(
        &mut self,
        machine: &mut dyn SourceMachine,
        dial: &mut Dial<'_>,
        context: &mut Context<'_>,
    ) -> Result<(), Error> {
        let Patience { handshake, build, .. } = context.patience;
        let cancel = Some(context.parameters);
        self.disks = Leaving::of(machine, context)?.map(Box::new);
        let mut description = machine.description().map_err(Error::machine("describe this machine"))?;
        if let Some(disks) = &self.disks {
            // They will be others there.
            description.take_identities();
            disks.describe(&mut description);
        }
        let identified = properties(&description)?;
        let lease = match &context.lease {
            Some(lease) => lease.read()?.map(|record| record.lease),
            None => None,
        };
        let link = self.link.insert(Link::new(dial()?)?);
        link.greet(Step { doing: "greeting the destination", patience: handshake, cancel, until: None })?;
        let memory = match &self.disks {
            Some(_) => None,
            None => Memory::to_offer(machine, link, context),
        };
        let description = if link.knows_identities() { identified } else { told(&description)? };
        let mut hello = Hello::new(self.session, lease, description);
        hello.features = memory.as_ref().map_or(0, Memory::features);
        let postcopy = if self.disks.is_some() { 0 } else { postcopy::offered(context.parameters) };
        if self.disks.is_some() {
            hello.features |= features::STORAGE;
        }
        if link.can_be_joined() {
            hello.features |= offered(context.parameters) | postcopy;
        }
        hello.features |= features::SETTLE | features::MOMENT;
        hello.features = features::known(hello.features);
        if hello.features & features::POSTCOPY == 0 {
            context.parameters.leave_postcopy_out();
        }
        hello.channels = context.parameters.channels();
        link.send_with(
            &Message::Hello(Box::new(hello)),
            memory.as_ref().map_or(&[], |memory| std::slice::from_ref(memory.token())),
            Step { doing: "introducing this machine", patience: handshake, cancel, until: None },
        )?;
        let doing = "waiting for the destination to accept this machine";
        match link.receive(Step { doing, patience: build, cancel, until: None })? {
            Message::Agree(agree) => {
                self.instance = agree.instance;
                self.settles = agree.features & features::SETTLE != 0;
                if self.disks.is_some() && agree.features & features::STORAGE == 0 {
                    let reasons = vec!["it takes no images, and this guest brings its own".to_owned()];
                    return Err(Error::Refused { reasons });
                }
                if agree.features & CHANNELS_AND_POSTCOPY == CHANNELS_AND_POSTCOPY && !self.settles {
                    let reason = "memory may follow, and it never says what of the channels is in its place";
                    return Err(Error::Protocol { doing, reason: reason.to_owned() });
                }
                let granted = agree.features & features::LOCAL != 0;
                if memory.is_some() && !granted {
                    log::warn!("the destination takes no memory itself: its contents are sent instead");
                }
                self.memory = memory.and_then(|memory| memory.granted(agree.features));
                if !granted {
                    check_way_out(context.parameters, agree.features)?;
                    let step =
                        Step { doing: "opening data channels", patience: handshake, cancel, until: None };
                    if agree.features & features::CHANNELS != 0 {
                        self.channels = open(&agree, self.session, dial, context.parameters, step)?;
                    }
                    self.key = agree.key.as_ref().map(|key| key.key).unwrap_or_default();
                    self.pages = postcopy::open(&agree, self.session, dial, context)?;
                }
                Ok(())
            }
            other => Err(unexpected(other, doing)),
        }
    }

    /// RAM in rounds, the stop, the last pages and the devices. Returns the digest of all that was sent.
    fn transfer<'scope, 'a: 'scope>(
        &mut self,
        scope: &'scope Scope<'scope, '_>,
        machine: &mut dyn SourceMachine,
        context: &mut Context<'a>,
    ) -> Result<u64, Error> {
        let statistics = context.statistics;
        let link = self.link.as_mut().expect("agree leaves a link");
        let handed_over = self.memory.as_ref().map(|memory| memory.pass(link, context)).transpose()?;
        let peer = link.peer().to_owned();
        let sink = Sink::new(link, context);
        let blocks = machine.ram_blocks();
        // Memory that goes itself is none of the stream's: its digests too would cost the stop the more the larger it is.
        let sent: &[RamBlock] = if handed_over.is_some() { &[] } else { &blocks };
        let channels = match &self.channels {
            Some(opened) => Some(Channels::start(scope, opened, sent, context)?),
            None => None,
        };
        let mut ram = Outgoing::start(sink, MACHINE, sent, channels, context)?.settling(self.settles);

        if handed_over.is_none() {
            machine.start_dirty_tracking().map_err(Error::machine("track dirty pages"))?;
            self.tracking = true;
        }
        if let Some(disks) = &mut self.disks {
            disks.begin(&self.session, &peer)?;
        }
        // Tracking comes first: a page that is filled while the holes are looked for is dirty.
        let mut pages = Vec::with_capacity(sent.len());
        for block in sent {
            let ranges =
                machine.populated(block).map_err(Error::machine("find the holes of guest memory"))?;
            let mut bitmap = PageBitmap::for_bytes(block.length_bytes());
            ranges.into_iter().for_each(|range| bitmap.set_bytes(range));
            pages.push(bitmap);
        }
        statistics.update(|s| {
            s.total_bytes = blocks.iter().map(|block| block.length_bytes()).sum();
            s.handed_over_bytes = handed_over.unwrap_or_default();
        });
        statistics.set_status(Status::Active);
        let mut followers = None;
        let mut missing = Vec::new();
        if !self.tracking {
            prepare_until_little_is_left(|| prepare_stop(machine, context, &mut ram));
        } else if rounds(
            machine,
            context,
            &mut ram,
            &mut pages,
            (self.pages.is_some(), self.disks.as_deref_mut()),
        )? == Rest::Follows
        {
            let followers = followers.insert(Followers::of(machine, &blocks));
            ram.round(&followers.needed(&pages))?;
            // A page that is on its way in a channel would come after the word on the link that it is to be dropped.
            ram.settle_channels()?;
            missing = followers.follow(&pages);
            // All of this costs time, and the stop then only has to name what is dirtied meanwhile.
            announce(&blocks, &missing, |message| ram.out().tell(message))?;
            let doing = "waiting until the destination has dropped old pages";
            match ram.out().hear(doing)? {
                Message::Listed => {}
                other => return Err(unexpected(other, doing)),
            }
            pages = blocks.iter().map(|block| PageBitmap::for_bytes(block.length_bytes())).collect();
        }

        let since = Instant::now();
        let state = machine.stop().map_err(Error::machine("stop the guest"))?;
        let allowed = context.patience.stopped + context.parameters.downtime_limit();
        let until = Until { end: since + allowed, allowed };
        self.stopped = Some(Stopped { state, since, until });
        statistics.set_status(Status::Device);
        let stopped_at = Instant::now();
        // The devices first: reading them may write guest memory's last pages (kvm-clock, say).
        let sections =
            machine.save_devices(SaveFor::Connection).map_err(Error::machine("save the devices"))?;
        let saved_at = Instant::now();
        if self.tracking {
            let more = machine.collect_dirty().map_err(Error::machine("read the dirty pages"))?;
            pages.iter_mut().zip(&more).for_each(|(bitmap, more)| bitmap.union(more));
        }
        ram.out().unlimited(until);
        let before = ram.out().sent_bytes();
        if let Some(followers) = &followers {
            let more = followers.follow(&pages);
            announce(&blocks, &more, |message| ram.out().tell(message))?;
            missing.iter_mut().zip(&more).for_each(|(bitmap, more)| bitmap.union(more));
            pages = followers.needed(&pages);
        }
        if let Some(disks) = &mut self.disks {
            disks.last_round(statistics, ram.out())?;
        }
        ram.last_round(&pages)?;
        sections.iter().try_for_each(|section| ram.device(section))?;
        let beside = ram.out().beside_bytes();
        let digest = combined(ram.finish_live()?, self.disks.iter().map(|disks| disks.digest()));
        let link = self.link.as_mut().expect("agree leaves a link");
        let sent_bytes = link.sent_bytes() + beside - before;
        statistics.has_moved();
        statistics.update(|s| {
            s.device_bytes = bytes_of(&sections);
            s.downtime.stop = stopped_at - since;
            s.downtime.device_save = saved_at - stopped_at;
            s.downtime.last_pass = saved_at.elapsed();
            s.downtime_bytes = sent_bytes;
            s.transferred_bytes = link.sent_bytes() + beside;
            s.remaining_bytes = missing.iter().map(PageBitmap::count).sum::<u64>() * crate::PAGE_BYTES;
        });
        if let Some(channel) = self.pages.take()
            && followers.is_some()
        {
            let key = (self.session, self.key);
            let remainder = Remainder::new(key, &blocks, &missing, channel, link, context.patience)?;
            self.remainder = Some(Box::new(remainder));
        }
        Ok(digest)
    }

    /// Lets the destination load, while the disks are made stable here.
    fn prepare(
        &mut self,
        machine: &mut dyn SourceMachine,
        context: &mut Context<'_>,
        digest: u64,
    ) -> Result<(), Error> {
        let cancel = Some(context.parameters);
        let stopped = self.stopped.expect("transfer stops the guest");
        let until = Some(stopped.until);
        let link = self.link.as_mut().expect("agree leaves a link");
        let sent_at = Instant::now();
        let prepare = Prepare { digest, running: stopped.state == RunState::Running };
        let step = Step {
            doing: "asking the destination to load",
            patience: context.patience.silence,
            cancel,
            until,
        };
        link.send(&Message::Prepare(prepare), step)?;
        self.disks_touched = true;
        machine.quiesce_disks().map_err(Error::machine("make the images stable"))?;
        let doing = "waiting for the destination to load";
        match link.receive(Step { doing, patience: context.patience.prepare, cancel, until })? {
            Message::Prepared(prepared) if prepared.digest == digest => {
                let load = Duration::from_nanos(prepared.load_ns);
                context.statistics.update(|s| {
                    s.downtime.load = load;
                    s.downtime.transfer = sent_at.elapsed().saturating_sub(load);
                });
                Ok(())
            }
            Message::Prepared(prepared) => Err(Error::Protocol {
                doing,
                reason: format!("its digest is {:#018x}, ours {digest:#018x}", prepared.digest),
            }),
            other => Err(unexpected(other, doing)),
        }
    }

    /// Before the hand-over: as if nothing had happened.
    fn undo(&mut self, machine: &mut dyn SourceMachine, context: &mut Context<'_>, error: Error) -> Outcome {
        if matches!(error, Error::Cancelled) {
            context.statistics.set_status(Status::Cancelling);
        }
        let action = self.ownership.on(Event::Failed);
        debug_assert_eq!(action, Action::Resume, "nothing was given away yet");
        (self.remainder, self.pages) = (None, None);
        let state = self.stopped.map(|stopped| stopped.state);
        let paused = bring_back(machine, self.tracking, self.disks_touched, state).err();
        // The guest does not wait for what is said beside its images.
        self.disks = None;
        Outcome::Failed { error, paused }
    }

    /// Tells the destination how it ended, if it is still there: the guest comes first, since nobody else waits.
    fn take_leave(&mut self, context: &Context<'_>, outcome: Outcome) -> Outcome {
        let patience = context.patience.last_words;
        let Some(mut link) = self.link.take() else { return outcome };
        let step = Step { doing: "taking leave", patience, cancel: None, until: None };
        match outcome {
            Outcome::Completed { .. } => {
                // It learns the figures, and that its answer arrived.
                let figures = Message::Progress(context.statistics.progress());
                let _the_guest_is_there_anyway = link.send(&figures, step);
                link.close(patience);
                outcome
            }
            Outcome::Failed { error, paused } if error.link_is_gone() => {
                // Where it was a data channel that broke, the other side finds that too, or hears it from here. It has the last word:
                // what it has found first is the cause for both.
                let words = match link.is_spoken_to(step) {
                    Ok(true) => link.last_words(patience),
                    Ok(false) | Err(_) => None,
                };
                let words = words.or_else(|| {
                    let farewell = Message::Cancel(Reasons::new(&[error.chain()]));
                    let _it_may_have_said_why = link.send(&farewell, step);
                    link.last_words(context.patience.handshake)
                });
                Outcome::Failed { error: words.unwrap_or(error), paused }
            }
            Outcome::Failed { ref error, .. } if !error.came_from_peer() => {
                let farewell = Message::Cancel(Reasons::new(&[error.chain()]));
                let _it_finds_out_by_itself = link.send(&farewell, step);
                link.close(patience);
                outcome
            }
            // It knows, or it is to be asked on another link.
            Outcome::Failed { .. } | Outcome::Unknown(_) => outcome,
        }
    }
}

/// The machine type in a stream's configuration. What the machine is in detail, the hello says.
pub(crate) const MACHINE: &str = "ferry";

/// Memory comes in channels, and some of it may come after the guest.
const CHANNELS_AND_POSTCOPY: u64 = features::CHANNELS | features::POSTCOPY;

/// The description as everybody can read it: without identities. One that nobody could read is found before anything is stopped.
pub(crate) fn told(description: &Description) -> Result<Properties, Error> {
    let mut description = description.clone();
    description.take_identities();
    properties(&description)
}

fn properties(description: &Description) -> Result<Properties, Error> {
    Properties::try_from(description)
        .map_err(|reason| Error::Blocked { reasons: vec![format!("its description: {reason}")] })
}

/// What of a stream is state of vCPUs and devices.
pub(crate) fn bytes_of<'a>(sections: impl IntoIterator<Item = &'a DeviceSection>) -> u64 {
    sections.into_iter().map(|section| section.payload.len() as u64).sum()
}

/// Makes the guest run here again; the error says why it stays paused.
pub(crate) fn bring_back(
    machine: &mut dyn SourceMachine,
    tracking: bool,
    disks_touched: bool,
    stopped: Option<RunState>,
) -> Result<(), String> {
    if tracking {
        machine.stop_dirty_tracking();
        machine.stop_throttling();
    }
    if disks_touched {
        machine
            .reacquire_images()
            .map_err(|source| Error::Machine { doing: "take the images back", source }.chain())?;
    }
    match stopped {
        Some(state) => machine
            .resume(state)
            .map_err(|source| Error::Machine { doing: "resume the guest", source }.chain()),
        None => Ok(()),
    }
}

/// The destination says no, or something else than it should.
pub(crate) fn unexpected(message: Message, doing: &'static str) -> Error {
    match message {
        Message::Refuse(reasons) => Error::Refused { reasons: reasons.sentences() },
        Message::Reject(reasons) => Error::Peer { reason: reasons.sentences().join("; ") },
        other => Error::Protocol { doing, reason: format!("the destination sent {}", other.name()) },
    }
}
