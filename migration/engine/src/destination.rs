//! The side where the guest arrives.
//!
//! [`Destination::receive`] listens until a guest has arrived. Each attempt checks, builds, places RAM, loads the devices,
//! and runs only what the lease offers to exactly this session: `ownership::destination` says what follows on what. Whatever
//! fails before that, the machine is dropped, the session is fenced (it will never run here), and the next peer is heard.

use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use transport::{Connection, DESCRIPTORS_MAX};

use crate::channels::combined;
use crate::channels::destination::{Gathered, Incoming, Intake, agree, gather};
use crate::headway::Headway;
use crate::lease::{self, Id, Lease, NotTaken, random_id};
use crate::link::{Link, Step};
use crate::local::{Mapped, images};
use crate::moment::{Moment, is_same_host};
use crate::ownership::Answer;
use crate::ownership::destination::{Action, Destination as Ownership, Event};
use crate::postcopy::{Announced, Late};
use crate::protocol::{Agree, Commit, Hello, Message, Never, Prepare, Prepared, Reasons, Running};
use crate::ram::Receiver;
use crate::reception::{GLANCE, Reception, Visit, next_visit};
use crate::source::bytes_of;
use crate::storage::Arriving;
use crate::{
    DestinationFactory, DestinationMachine, Error, PAGE_BYTES, Parameters, Patience, RunState, Statistics,
    Status, features,
};

/// A process that waits for a guest.
pub struct Destination<'a> {
    /// The guest's lease, if it has one: opened, not claimed.
    pub lease: Option<&'a mut Lease>,
    /// What the user sees.
    pub statistics: &'a Statistics,
    /// How long each step may take.
    pub patience: Patience,
    /// [`Parameters::cancel`] ends the waiting, until a guest is ours.
    pub parameters: &'a Parameters,
    pub(crate) instance: Id,
    pub(crate) ownership: Ownership,
    /// What the source is told, once a guest is here.
    pub(crate) running: Option<Running>,
    /// Sources that came while a guest was on its way: each may be the next, if that one does not arrive.
    pub(crate) waiting: Vec<Visit>,
    /// Peers that have not said yet what they want, whatever goes on meanwhile.
    pub(crate) reception: Reception,
    /// Images that come with the guest that is on its way.
    pub(crate) disks: Option<Arriving>,
}

/// A guest that is ours.
pub struct Arrived<M> {
    /// It.
    pub machine: M,
    /// What it does: as it was at the source, or paused if it could not be started.
    pub state: RunState,
    /// Why it could not be started. It is ours all the same.
    pub error: Option<Error>,
    /// The source knows. If not, and without a lease, only [`Destination::answer`] can tell it.
    pub acknowledged: bool,
    pub(crate) running: Running,
    /// Memory that it lacks still, which [`Destination::answer`] brings.
    pub(crate) late: Option<Late>,
}

impl<M> Arrived<M> {
    /// Whether it lacks memory still.
    #[must_use]
    pub fn lacks_memory(&self) -> bool {
        self.late.is_some()
    }
}

impl<'a> Destination<'a> {
    /// A destination that has not heard anybody yet.
    ///
    /// # Errors
    /// The kernel has no randomness.
    pub fn new(
        lease: Option<&'a mut Lease>,
        statistics: &'a Statistics,
        patience: Patience,
        parameters: &'a Parameters,
    ) -> Result<Self, Error> {
        let failed =
            |source: std::io::Error| Error::Machine { doing: "name this process", source: source.into() };
        Ok(Self {
            lease,
            statistics,
            patience,
            parameters,
            instance: random_id().map_err(failed)?,
            ownership: Ownership::new(),
            running: None,
            waiting: Vec::new(),
            reception: Reception::new(patience.handshake),
            disks: None,
        })
    }

    /// Hears peers one after the other until a guest has arrived. `None`: it was cancelled. Failed attempts are
    /// in the statistics and in the log.
    ///
    /// # Errors
    /// The listener is broken.
    pub fn receive<F: DestinationFactory>(
        &mut self,
        factory: &mut F,
        incoming: &dyn Incoming,
    ) -> Result<Option<Arrived<F::Machine>>, Error> {
        while !self.parameters.cancelled() {
            if let Some(visit) = next_visit(&mut self.reception, incoming, GLANCE)?
                && let Some(arrived) = self.receive_visits(factory, visit, Some(incoming))
            {
                return Ok(Some(arrived));
            }
        }
        Ok(None)
    }

    /// Hears one peer; gives the guest if it arrived. No further links come in.
    pub fn serve<F: DestinationFactory>(
        &mut self,
        factory: &mut F,
        connection: Connection,
    ) -> Option<Arrived<F::Machine>> {
        let visit = Visit::of(connection, self.patience.handshake)?;
        self.receive_visits(factory, visit, None)
    }

    /// The same with further links, which come in from `incoming`.
    pub fn serve_with<F: DestinationFactory>(
        &mut self,
        factory: &mut F,
        connection: Connection,
        incoming: &dyn Incoming,
    ) -> Option<Arrived<F::Machine>> {
        let visit = Visit::of(connection, self.patience.handshake)?;
        self.receive_visits(factory, visit, Some(incoming))
    }

    /// Hears a peer, and then those that came meanwhile, until a guest has arrived.
    fn receive_visits<F: DestinationFactory>(
        &mut self,
        factory: &mut F,
        visit: Visit,
        incoming: Option<&dyn Incoming>,
    ) -> Option<Arrived<F::Machine>> {
        let mut next = Some(visit);
        while let Some(visit) = next {
            if let Some(arrived) = self.receive_visit(factory, visit, incoming) {
                self.send_others_away();
                return Some(arrived);
            }
            let goes_on = !self.parameters.cancelled() && !self.waiting.is_empty();
            next = goes_on.then(|| self.waiting.remove(0));
        }
        None
    }

    fn receive_visit<F: DestinationFactory>(
        &mut self,
        factory: &mut F,
        visit: Visit,
        incoming: Option<&dyn Incoming>,
    ) -> Option<Arrived<F::Machine>> {
        let Visit { peer, mut link, said, passes_descriptors } = visit;
        match said {
            Ok(Message::Hello(mut hello)) => {
                hello.features = features::known(hello.features);
                if !passes_descriptors {
                    hello.features &= !(features::LOCAL | features::IMAGE_FILES);
                }
                self.statistics.start();
                match self.attempt(factory, &mut link, &hello, incoming) {
                    Ok(mut arrived) => {
                        // Once: whoever asks again later changes nothing about a source that has said that it knows.
                        self.statistics.update(|s| s.unacknowledged = Some(hello.session));
                        let end = Instant::now() + self.patience.answer;
                        if let Some(late) = &mut arrived.late {
                            self.statistics.set_status(Status::PostcopyActive);
                            arrived.acknowledged = self.acknowledged(&mut link, &arrived.running, end);
                            self.begin_postcopy(late, arrived.acknowledged.then_some(link));
                            return Some(arrived);
                        }
                        self.statistics.set_status(Status::Completed);
                        arrived.acknowledged = self.acknowledged(&mut link, &arrived.running, end);
                        // What is said beside each image ends with its guest running, and nobody waits for that.
                        self.disks = None;
                        link.close(self.patience.last_words);
                        Some(arrived)
                    }
                    Err(error) => {
                        let error = match error {
                            // Nobody calls off at this end what the other one began.
                            Error::Cancelled if self.parameters.cancelled() => Error::Ended,
                            error => error,
                        };
                        // The machine is gone, and the session is fenced before the source hears of it.
                        self.ownership.on(Event::Failed);
                        self.parameters.reopen();
                        let error = self.farewell(link, error, hello.session);
                        // Images that are nobody's may take long to remove, and the source's guest stands still until it is answered.
                        self.disks = None;
                        log::warn!("no guest from {peer}: {}", error.chain());
                        self.statistics.fail(&error.chain());
                        None
                    }
                }
            }
            said => {
                self.answer_stranger(Visit { peer, link, said, passes_descriptors });
                None
            }
        }
    }

    /// From the hello to the running guest.
    fn attempt<F: DestinationFactory>(
        &mut self,
        factory: &mut F,
        link: &mut Link,
        hello: &Hello,
        incoming: Option<&dyn Incoming>,
    ) -> Result<Arrived<F::Machine>, Error> {
        let incoming = incoming.filter(|_| link.can_be_joined());
        let (mut machine, agree) = self.agree(factory, link, hello, incoming.is_some())?;
        let is_local = agree.features & features::LOCAL != 0;
        let mapped = if is_local { Some(self.map(&mut machine, link, agree.features)?) } else { None };
        let Gathered { channels, pages } = match incoming {
            Some(incoming) => self.gather(&agree, hello.session, link, incoming)?,
            None => Gathered::default(),
        };
        let mut pages =
            pages.zip(agree.key.map(|key| key.key)).map(|(link, key)| (link, key, agree.features));
        let expected = factory.expected().map_err(Error::machine("describe this machine"))?;
        let mut receiver = match &mapped {
            Some(_) => Receiver::local(expected),
            None => Receiver::live(expected, machine.ram_blocks()),
        };
        let mut announced = Announced::new(&machine.ram_blocks());
        let (prepare, digests) =
            self.place_all(link, &mut receiver, channels, (&mut machine, &mut announced))?;
        self.statistics.has_moved();
        let late = match pages.take() {
            Some(channel) if announced.is_complete() => {
                let memory = machine.missing_pages().ok_or_else(|| Error::Machine {
                    doing: "run a guest ahead of its memory",
                    source: "this host does not let missing pages be brought".into(),
                })?;
                announced.keep_missing(|block, pages| machine.keep_missing(block, pages))?;
                Some(Late::new(memory, announced, channel, self.patience)?)
            }
            _ => None,
        };
        self.load(&mut machine, link, receiver, &prepare, digests)?;
        let room = mapped.as_ref().map_or(0, |_| DESCRIPTORS_MAX);
        let (commit, passed) = self.await_commit(link, room)?;
        if let Some(late) = &late {
            late.own().map_err(|error| Error::Never { reason: error.chain() })?;
        }
        let memory = mapped.map(|mapped| (mapped, passed));
        let taken = self.take(&mut machine, &commit, memory, RunState::from(prepare.running));
        let (error, mut running) = taken.inspect_err(|_| late.iter().for_each(Late::disown))?;
        running.ran = running.ran.filter(|_| agree.features & features::MOMENT != 0);
        self.running = Some(running.clone());
        let state = RunState::from(running.running);
        Ok(Arrived { machine, state, error, acknowledged: false, running, late })
    }

    /// The links beside `link` that were agreed on. Others who come meanwhile wait.
    fn gather(
        &mut self,
        agree: &Agree,
        session: Id,
        link: &mut Link,
        incoming: &dyn Incoming,
    ) -> Result<Gathered, Error> {
        let step = self.handshake("waiting for data channels");
        let fresh = Reception::new(self.patience.handshake);
        let mut reception = std::mem::replace(&mut self.reception, fresh);
        let sources = (&mut reception, incoming);
        let gathered = gather(agree, session, link, sources, step, &mut |visit| self.put_off(visit));
        self.reception = reception;
        gathered.map_err(|error| Self::explained(link, error))
    }

    /// Everything that can be checked before RAM moves, and the machine.
    fn agree<F: DestinationFactory>(
        &mut self,
        factory: &mut F,
        link: &mut Link,
        hello: &Hello,
        has_way_in: bool,
    ) -> Result<(F::Machine, Agree), Error> {
        if self.ownership.on(Event::Hello { session: hello.session }) == Action::Refuse {
            let reasons = vec!["this session has ended here before".to_owned()];
            return Err(Error::Refused { reasons });
        }
        let mut source = hello.description();
        let mut reasons = Vec::new();
        let mut lacking = features::MOMENT;
        match Arriving::of(factory, hello, &mut source, self.statistics) {
            Ok(disks) => {
                self.disks = disks;
                match factory.description().map_err(Error::machine("describe this machine")) {
                    Ok(own) => {
                        reasons.extend(factory.differences(&source, &own));
                        if is_same_host(&source, &own) {
                            lacking = 0;
                        }
                    }
                    // One reason among others, though nobody knows what else differs.
                    Err(error) => reasons.push(error.chain()),
                }
            }
            // Without its images there is no machine to compare.
            Err(Error::Refused { reasons: more }) => reasons.extend(more),
            Err(error) => return Err(error),
        }
        reasons.extend(self.lease_differs(hello)?);
        if u64::from(hello.page_bytes) != PAGE_BYTES {
            reasons.push(format!(
                "page size: the source has {}, the destination {PAGE_BYTES}",
                hello.page_bytes
            ));
        }
        if hello.features & features::POSTCOPY != 0
            && let Err(error) =
                factory.can_miss_pages().map_err(Error::machine("run a guest ahead of its memory"))
        {
            reasons.push(format!("postcopy: {}", error.chain()));
        }
        if !reasons.is_empty() {
            return Err(Error::Refused { reasons });
        }
        let machine = factory.build(&source).map_err(|source| Error::Refused {
            reasons: vec![Error::Machine { doing: "build the machine", source }.chain()],
        })?;
        if !machine.takes_memory() {
            lacking |= features::LOCAL;
        }
        let granted = hello.features & !lacking;
        if granted & features::LOCAL == 0 || machine.image_files().is_none() {
            lacking |= features::IMAGE_FILES;
        }
        let agree = agree(hello, granted & !lacking, self.instance, has_way_in)?;
        link.send(&Message::Agree(agree.clone()), self.handshake("agreeing"))?;
        Ok((machine, agree))
    }

    /// The memory itself, to be read, and the files of the images, if they were granted.
    fn map(
        &self,
        machine: &mut dyn DestinationMachine,
        link: &mut Link,
        granted: u64,
    ) -> Result<Mapped, Error> {
        let doing = "taking over guest memory";
        let step =
            Step { doing, patience: self.patience.silence, cancel: Some(self.parameters), until: None };
        let mapped = Mapped::receive(machine, link, step, unexpected)?;
        self.statistics.update(|s| s.handed_over_bytes = mapped.bytes);
        if granted & features::IMAGE_FILES != 0 {
            images::receive(machine, link, Step { doing: "taking the files of images", ..step }, unexpected)?;
        }
        Ok(mapped)
    }

    fn lease_differs(&self, hello: &Hello) -> Result<Option<String>, Error> {
        let ours = match &self.lease {
            Some(lease) => Some((lease.path().display(), lease.read()?.map(|record| record.lease))),
            None => None,
        };
        Ok(match (hello.lease(), ours) {
            (None, None) => None,
            (Some(theirs), Some((_, Some(ours)))) if theirs == ours => None,
            (Some(_), Some((path, _))) => Some(format!("lease: {path} is not the file that the source has")),
            (Some(_), None) => {
                Some("lease: the source has one, the destination was started without".to_owned())
            }
            (None, Some((path, _))) => {
                Some(format!("lease: the destination has {path}, the source has none"))
            }
        })
    }

    /// RAM and devices, until the source asks to load them: over the link and `channels`. The digests of the channels.
    fn place_all(
        &mut self,
        link: &mut Link,
        receiver: &mut Receiver<'_>,
        channels: Vec<Connection>,
        (machine, announced): (&mut dyn DestinationMachine, &mut Announced),
    ) -> Result<(Prepare, Vec<u64>), Error> {
        if channels.is_empty() {
            return Ok((self.place(link, receiver, None, (machine, announced))?, Vec::new()));
        }
        let blocks = machine.ram_blocks();
        receiver.refuse_pages();
        let placed = std::thread::scope(|scope| {
            let user = (self.parameters, self.statistics);
            let memory = (blocks.as_slice(), machine.fresh_memory());
            let intake = Intake::start(scope, channels, memory, user, &self.patience)?;
            let prepare = self.place(link, receiver, Some(&intake), (machine, announced))?;
            Ok((prepare, intake.finish(&announced.by_name())?))
        });
        placed.map_err(|error| Self::explained(link, error))
    }

    /// Why a channel failed, if the source has said so on its link before. If not, it listens there to hear why from us.
    fn explained(link: &mut Link, error: Error) -> Error {
        let words = error.link_is_gone().then(|| link.last_words(Duration::ZERO)).flatten();
        words.unwrap_or(error)
    }

    /// RAM and devices, until the source asks to load them.
    fn place(
        &mut self,
        link: &mut Link,
        receiver: &mut Receiver<'_>,
        intake: Option<&Intake>,
        (machine, announced): (&mut dyn DestinationMachine, &mut Announced),
    ) -> Result<Prepare, Error> {
        let doing = "receiving RAM and devices";
        let step =
            Step { doing, patience: self.patience.silence, cancel: Some(self.parameters), until: None };
        let (mut moved, mut beside_bytes) = (Instant::now(), 0);
        let headway = Headway::new(&self.patience);
        loop {
            let mut brought = receiver.brought();
            if let Some(intake) = intake {
                let since = Instant::now();
                while !link.is_spoken_to(step)? {
                    intake.check()?;
                    step.patient(since)?;
                    // Here the source says something now and then only.
                    if beside_bytes == 0 && intake.came().0 > 0 {
                        self.statistics.set_status(Status::Active);
                    }
                }
                let (bytes, beside) = intake.came();
                if beside_bytes != bytes {
                    (moved, beside_bytes) = (Instant::now(), bytes);
                    self.statistics.set_status(Status::Active);
                }
                brought = brought + beside;
            }
            if let Some(disks) = &self.disks {
                brought = brought + disks.brought();
            }
            headway.check(brought)?;
            let message = link.receive(step)?;
            match &message {
                Message::Stream if !link.body().is_empty() => moved = Instant::now(),
                Message::Stream | Message::Progress(_) if moved.elapsed() >= self.patience.stall => {
                    return Err(Error::TimedOut { doing, waited: self.patience.stall });
                }
                _ => {}
            }
            match message {
                Message::Stream => {
                    self.statistics.set_status(Status::Active);
                    receiver.feed(link.body())?;
                }
                Message::Progress(progress) => self.statistics.told(&progress),
                Message::Blocks => {
                    let disks = self.disks.as_mut().ok_or_else(|| unexpected(Message::Blocks, doing))?;
                    self.statistics.set_status(Status::Active);
                    disks.place(link.body(), self.statistics)?;
                    moved = Instant::now();
                }
                Message::Missing(missing) => {
                    // What is dropped is not to be waited for.
                    intake.map_or(Ok(()), Intake::release)?;
                    announced.add(&missing, |block, pages| machine.discard(block, pages))?;
                }
                Message::Listed => {
                    if announced.listed() {
                        link.send(&Message::Listed, step)?;
                    }
                }
                Message::Settle(settle) => {
                    intake.map_or(Ok(()), |intake| intake.settle(settle.channel_bytes))?;
                    self.disks.as_mut().map_or(Ok(()), Arriving::settle)?;
                    link.send(&Message::Settled, step)?;
                }
                Message::Prepare(prepare) => return Ok(prepare),
                other => return Err(unexpected(other, doing)),
            }
        }
    }

    /// Loads the devices and says so.
    fn load(
        &mut self,
        machine: &mut dyn DestinationMachine,
        link: &mut Link,
        receiver: Receiver<'_>,
        prepare: &Prepare,
        channels: Vec<u64>,
    ) -> Result<(), Error> {
        let start = Instant::now();
        self.statistics.set_status(Status::Device);
        let mut received = receiver.finish()?;
        let blocks = self.disks.as_mut().map(Arriving::finish).transpose()?;
        received.digest = combined(received.digest, channels.into_iter().chain(blocks));
        if received.digest != prepare.digest {
            return Err(Error::Protocol {
                doing: "comparing what came with what was sent",
                reason: format!(
                    "the digest is {:#018x}, the source's {:#018x}",
                    received.digest, prepare.digest
                ),
            });
        }
        let device_bytes = bytes_of(received.sections.iter());
        machine.load_devices(received.sections).map_err(Error::machine("load the devices"))?;
        let load = start.elapsed();
        self.statistics.update(|s| (s.downtime.load, s.device_bytes) = (load, device_bytes));
        self.ownership.on(Event::Loaded);
        let prepared = Prepared { digest: received.digest, load_ns: nanoseconds(load) };
        let step =
            Step { doing: "reporting the load", patience: self.patience.silence, cancel: None, until: None };
        link.send(&Message::Prepared(prepared), step)
    }

    /// COMMIT, and at most `room` descriptors that came along.
    fn await_commit(&mut self, link: &mut Link, room: usize) -> Result<(Commit, Vec<OwnedFd>), Error> {
        let doing = "waiting for the guest to be handed over";
        let step =
            Step { doing, patience: self.patience.prepare, cancel: Some(self.parameters), until: None };
        match link.receive_with(room, step)? {
            (Message::Commit(commit), descriptors) => Ok((commit, descriptors)),
            (other, _) => Err(unexpected(other, doing)),
        }
    }

    /// Makes the guest ours and starts it. Every error is the reason of a NEVER: nothing has run, nothing was written.
    fn take(
        &mut self,
        machine: &mut dyn DestinationMachine,
        commit: &Commit,
        memory: Option<(Mapped, Vec<OwnedFd>)>,
        mut state: RunState,
    ) -> Result<(Option<Error>, Running), Error> {
        let start = Instant::now();
        if !self.parameters.commit() {
            return Err(Error::Never { reason: "the destination was told to quit".to_owned() });
        }
        let mut reason = "COMMIT of another session".to_owned();
        let (mut error, mut ran, mut resume) = (None, None, Duration::ZERO);
        let mut memory = Ok(memory);
        let Commit { session, generation } = *commit;
        let mut action = self.ownership.on(Event::Commit { session, generation });
        loop {
            let event = match action {
                Action::Take { session, generation } => {
                    match self.take_under_lock(machine, &mut memory, &session, generation) {
                        Ok(()) => Event::Taken,
                        Err(NotTaken::Refused(error)) => {
                            machine.release_images();
                            reason = Error::from(error).chain();
                            Event::NotTaken
                        }
                        Err(NotTaken::Unknown(error)) => {
                            // If the source settles meanwhile, it needs them.
                            machine.release_images();
                            let failure = Error::from(error).chain();
                            if reason != failure {
                                log::error!(
                                    "whether the guest is ours is tried until it is known: {failure}"
                                );
                                reason = failure;
                            }
                            self.again_or_end()
                        }
                    }
                }
                Action::GiveBack { session } => match self.give_back(&session) {
                    Ok(()) => Event::GivenBack,
                    Err(error) => {
                        log::error!("the guest may be lost with this process: {}", error.chain());
                        Event::NotGivenBack
                    }
                },
                Action::Start { .. } => {
                    match machine.start(state).map_err(Error::machine("start the guest")) {
                        Ok(when) => ran = when,
                        Err(why) => {
                            log::error!("the guest is ours and stays paused: {}", why.chain());
                            (state, error) = (RunState::Paused, Some(why));
                        }
                    }
                    resume = ran.unwrap_or_else(Instant::now) - start;
                    self.statistics.update(|s| s.downtime.resume = resume);
                    Event::Started
                }
                Action::Answer { answer: Answer::Running, .. } => {
                    let (running, resume_ns) = (state == RunState::Running, nanoseconds(resume));
                    let ran = ran.and_then(Moment::of);
                    return Ok((error, Running { session, running, resume_ns, ran }));
                }
                Action::Answer { answer: Answer::Never, .. } => return Err(Error::Never { reason }),
                Action::Go | Action::Refuse => return Err(Error::Unsure { reason }),
            };
            action = self.ownership.on(event);
        }
    }

    /// After a try to take the guest that left it open: a moment later, unless this process is to end.
    fn again_or_end(&self) -> Event {
        if self.parameters.end_is_wished() {
            return Event::Failed;
        }
        std::thread::sleep(self.patience.retry);
        Event::NotKnown
    }

    /// Images, memory and lease, in this order and under the record lock: what can fail fails while the guest is still the source's,
    /// which can neither write nor settle meanwhile.
    fn take_under_lock(
        &mut self,
        machine: &mut dyn DestinationMachine,
        memory: &mut Result<Option<(Mapped, Vec<OwnedFd>)>, String>,
        session: &Id,
        generation: u64,
    ) -> Result<(), NotTaken> {
        let mut images = || {
            let locked = machine.take_image_locks().map_err(Error::machine("take the image locks"));
            let opened =
                locked.and_then(|()| machine.open_images().map_err(Error::machine("open the images")));
            opened.map_err(|error| error.chain())?;
            // Once: it stays where it is, or is not ours to write, as often as the lease is tried again.
            let handed_over = memory.as_mut().map_err(|reason| reason.clone())?.take();
            let adopted = handed_over.map_or(Ok(()), |(mapped, passed)| mapped.adopt(machine, passed));
            adopted.inspect_err(|reason| *memory = Err(reason.clone()))
        };
        if let Some(disks) = &mut self.disks {
            return disks.own(session, &mut images);
        }
        match &mut self.lease {
            Some(lease) => lease.take(session, generation, &mut images).map(drop),
            None => images().map_err(|reason| NotTaken::Refused(lease::Error::Condition { reason })),
        }
    }

    /// Lets the source have it back, though the record may say `taken`. The images are released already.
    fn give_back(&mut self, session: &Id) -> Result<(), Error> {
        if let Some(disks) = &mut self.disks {
            return disks.disown(session);
        }
        match self.lease.as_mut().map(|lease| lease.give_back(session)) {
            // It was never ours.
            None | Some(Ok(()) | Err(lease::Error::Moved { .. })) => Ok(()),
            Some(Err(error)) => Err(error.into()),
        }
    }

    /// Tells the source why, or hears why from it. The machine is gone and the session fenced by now.
    pub(crate) fn farewell(&self, mut link: Link, error: Error, session: Id) -> Error {
        let patience = self.patience.last_words;
        let message = match &error {
            // Nothing that could be said is known to be true.
            Error::Peer { .. } | Error::Unsure { .. } => return error,
            Error::Refused { reasons } => Message::Refuse(Reasons::new(reasons)),
            Error::Never { reason } => Message::Never(Never { session, reason: reason.as_str().into() }),
            error => Message::Reject(Reasons::new(&[error.chain()])),
        };
        let step = Step { doing: "taking leave", patience, cancel: None, until: None };
        let _it_finds_out_by_itself = link.send(&message, step);
        link.close(patience);
        error
    }

    pub(crate) fn handshake(&self, doing: &'static str) -> Step<'a> {
        Step { doing, patience: self.patience.handshake, cancel: Some(self.parameters), until: None }
    }
}

pub(crate) fn unexpected(message: Message, doing: &'static str) -> Error {
    match message {
        Message::Cancel(reasons) => Error::Peer { reason: reasons.sentences().join("; ") },
        other => Error::Protocol { doing, reason: format!("the source sent {}", other.name()) },
    }
}

fn nanoseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}
