//! Guests whose memory follows them: who needs whom meanwhile, and new links for lost ones.

use std::str::FromStr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{bail, ensure};
use engine::{Incoming, PostcopyStart, Status};
use transport::{Connection, Endpoint, Listener, Uri};

use super::{Migrations, lock};

/// What of a migration may be replaced when its links are lost.
#[derive(Default)]
pub(super) struct Ways {
    /// Where the source finds the destination, or the destination listens.
    endpoint: Mutex<Option<Endpoint>>,
    /// Where a destination listens since.
    pub(super) listener: Mutex<Option<Arc<Listener>>>,
}

impl Ways {
    /// A migration begins.
    pub fn begin(&self, endpoint: Option<&Endpoint>) {
        *lock(&self.endpoint) = endpoint.cloned();
        *lock(&self.listener) = None;
    }

    /// Where the other side is now.
    pub fn endpoint(&self) -> Option<Endpoint> {
        lock(&self.endpoint).clone()
    }
}

/// Where a destination listens: at first, and since a recovery.
pub(super) struct ProcessDoor<'a> {
    pub first: &'a Listener,
    pub ways: &'a Ways,
}

impl Incoming for ProcessDoor<'_> {
    fn accept(&self, timeout: Duration) -> Result<Option<Connection>, transport::Error> {
        let since = lock(&self.ways.listener).clone();
        since.as_deref().unwrap_or(self.first).accept(timeout)
    }
}

/// Whose memory is where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Following {
    /// The guest has left, and needs memory of this process.
    NeedsUs,
    /// The guest is here, and some of its memory is not.
    LacksMemory,
}

impl Migrations {
    fn following(&self) -> Option<(Following, Status)> {
        let current = lock(&self.current);
        let current = current.as_ref().filter(|current| current.is_active())?;
        let status = current.statistics.snapshot().status;
        let following = if current.outgoing { Following::NeedsUs } else { Following::LacksMemory };
        status.is_postcopy().then_some((following, status))
    }

    /// Why this process must not end, if so: a guest that has left dies with it.
    #[must_use]
    pub fn guest_needs_this_process(&self) -> Option<String> {
        let (following, status) = self.following()?;
        (following == Following::NeedsUs).then(|| {
            format!(
                "the guest at the destination still needs memory that only this process has ({status}), and would die with it; wait for \
                 the end of the migration, or force it"
            )
        })
    }

    /// Whether the guest is here, and some of its memory is not.
    #[must_use]
    pub fn guest_lacks_memory(&self) -> bool {
        self.following().is_some_and(|(following, _)| following == Following::LacksMemory)
    }

    /// The same, and none comes at present.
    #[must_use]
    pub fn guest_waits_for_memory(&self) -> bool {
        let waiting =
            |(following, status)| following == Following::LacksMemory && status != Status::PostcopyActive;
        self.following().is_some_and(waiting)
    }

    /// Lets memory follow after the guest from now on, unless it does already.
    ///
    /// # Errors
    /// No migration for which that was allowed goes on, or its guest is handed over.
    pub fn start_postcopy(&self) -> anyhow::Result<()> {
        if self.following().is_some_and(|(following, _)| following == Following::NeedsUs) {
            return Ok(());
        }
        ensure!(
            self.is_leaving() && !self.parameters.committed(),
            "there is no migration whose guest could go ahead of its memory"
        );
        ensure!(
            self.parameters.postcopy() != PostcopyStart::Never,
            "the migration began without the capability postcopy-ram, so its destination need not be able to"
        );
        self.parameters.start_postcopy();
        Ok(())
    }

    /// Replaces the links of a migration whose guest has gone and whose memory has not: the source connects again, the destination
    /// hears it again; at `uri`, if it is given.
    ///
    /// # Errors
    /// No such migration has lost its links, or nobody can listen there.
    pub fn recover(&self, uri: Option<&str>) -> anyhow::Result<()> {
        let uri = uri.map(Uri::from_str).transpose()?;
        let Some((following, Status::PostcopyPaused)) = self.following() else {
            bail!("there is no postcopy migration that has lost its link");
        };
        let mut endpoint = lock(&self.ways.endpoint);
        let Some(endpoint) = endpoint.as_mut() else { bail!("there is no address") };
        let new = Endpoint { uri: uri.unwrap_or_else(|| endpoint.uri.clone()), ..endpoint.clone() };
        match following {
            Following::NeedsUs => {
                // Its thread touches nothing before it is told to.
                let statistics = lock(&self.current).as_mut().map(|current| {
                    current.peer = new.uri.to_string();
                    Arc::clone(&current.statistics)
                });
                statistics.inspect(|statistics| statistics.begin_recovery());
                *endpoint = new;
                self.parameters.recover();
            }
            // It listens where it did, unless that is of no use.
            Following::LacksMemory if new.uri == endpoint.uri => {}
            Following::LacksMemory => {
                let listener = Listener::bind_endpoint(&new)?;
                *endpoint = Endpoint { uri: listener.uri().clone(), ..new };
                if let Some(current) = lock(&self.current).as_mut() {
                    current.peer = listener.uri().to_string();
                }
                *lock(&self.ways.listener) = Some(Arc::new(listener));
            }
        }
        Ok(())
    }
}
