//! Migrations that stand still where a test wants them: all that this process has of one, and neither an engine nor a peer.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use engine::{MachineResult, PostcopyStart, RunState, SourceMachine, Statistics, Status};
use transport::{Endpoint, Security, Uri};

use super::source::Source;
use super::{Current, Migrations, Waiting, lock};
use crate::vmm::{Request, Vmm};

/// A migration that only goes on when it is told to.
pub struct Staged {
    vmm: Arc<Vmm>,
    statistics: Arc<Statistics>,
    /// The guest that leaves, and what it did before it was stopped.
    source: Arc<Mutex<Option<(Source, RunState)>>>,
}

impl Staged {
    /// A guest begins to leave, and its memory may follow it.
    pub fn leave(vmm: &Arc<Vmm>) -> Self {
        let source = Source::new(vmm, vmm.machine().unwrap(), Arc::default());
        Self::begin(vmm, Some((source, RunState::Running)), Status::Active)
    }

    /// A guest has arrived, and its memory follows it.
    pub fn arrive(vmm: &Arc<Vmm>) -> Self {
        Self::begin(vmm, None, Status::PostcopyActive)
    }

    fn begin(vmm: &Arc<Vmm>, source: Option<(Source, RunState)>, status: Status) -> Self {
        let (migrations, outgoing) = (&vmm.migrations, source.is_some());
        let nowhere = Endpoint { uri: Uri::Unix("/nowhere".into()), security: Security::ThisHost };
        migrations.parameters.begin();
        migrations.parameters.set_postcopy(PostcopyStart::WhenAsked);
        migrations.ways.begin(Some(&nowhere));
        let statistics = Arc::new(Statistics::new());
        statistics.set_status(status);
        let source = Arc::new(Mutex::new(source));
        let ended = Arc::new(Waiting::default());
        let thread = std::thread::spawn({
            let (vmm, statistics) = (Arc::clone(vmm), Arc::clone(&statistics));
            let (source, ended) = (Arc::clone(&source), Arc::clone(&ended));
            move || {
                let lease = vmm.take_lease();
                while !vmm.migrations.waiting.pause(Duration::from_secs(60)) {}
                if let Some((mut source, before)) = lock(&source).take()
                    && vmm.migrations.parameters.cancelled()
                {
                    source.resume(before).unwrap();
                    statistics.set_status(Status::Cancelled);
                }
                vmm.return_lease(lease);
                ended.end();
                vmm.request(if outgoing { Request::MigrationEnded } else { Request::MemoryArrived });
            }
        });
        *lock(&migrations.current) = Some(Current {
            statistics: Arc::clone(&statistics),
            peer: "nowhere".to_owned(),
            outgoing,
            in_flight_at_stop: Arc::default(),
            thread: Some(thread),
            ended,
        });
        Self { vmm: Arc::clone(vmm), statistics, source }
    }

    fn with_source<T>(&self, act: impl FnOnce(&mut Source) -> MachineResult<T>) -> MachineResult<T> {
        act(&mut lock(&self.source).as_mut().expect("a guest leaves").0)
    }

    /// The guest is stopped for the last pass.
    ///
    /// # Errors
    /// It is not, and runs on.
    pub fn stop(&self) -> MachineResult<()> {
        let before = self.with_source(SourceMachine::stop)?;
        lock(&self.source).as_mut().expect("a guest leaves").1 = before;
        self.statistics.set_status(Status::Device);
        Ok(())
    }

    /// It is handed over, and nobody answers.
    pub fn hand_over(&self) {
        assert!(self.vmm.migrations.parameters.commit());
        self.with_source(SourceMachine::release_image_locks).unwrap();
        self.statistics.set_status(Status::HandoverUnknown);
    }

    /// It has gone ahead of its memory.
    pub fn go_ahead(&self) {
        self.with_source(|source| {
            source.finish();
            Ok(())
        })
        .unwrap();
        self.statistics.set_status(Status::PostcopyActive);
    }

    /// The link is lost on which memory follows.
    pub fn lose_link(&self) {
        self.statistics.set_status(Status::PostcopyPaused);
    }

    /// All memory has come, or gone.
    pub fn complete(&self) {
        self.statistics.set_status(Status::Completed);
        self.end();
    }

    /// It goes no further.
    pub fn end(&self) {
        self.vmm.migrations.waiting.end();
        self.vmm.migrations.wait_for_end();
    }
}

impl Migrations {
    /// Waits until the migration has ended, which it was told to, and has said so.
    pub fn wait_for_end(&self) {
        let thread = lock(&self.current).as_mut().and_then(|current| current.thread.take());
        thread.expect("there is a migration").join().expect("it ends in order");
    }

    /// Whether the migration that runs was told to end, in time.
    pub fn is_cancelled(&self) -> bool {
        self.parameters.cancelled()
    }

    /// All that commands have said to migrations. A wish to cancel that came too late is none.
    pub fn told(&self) -> String {
        let parameters = format!("{:?}", self.parameters).replace(", wished: true", ", wished: false");
        let peer = lock(&self.current).as_ref().map(|current| current.peer.clone());
        format!("{parameters} {peer:?} {}", lock(&self.ways.listener).is_some())
    }
}
