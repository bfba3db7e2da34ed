//! Guests whose memory follows them: who needs whom meanwhile, and new links for lost ones.

use std::str::FromStr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use anyhow::{bail, ensure};
use engine::{Incoming, PostcopyStart, Status};
use transport::{Connection, Endpoint, Listener, Uri};

use super::{Current, Migrations, lock};

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

/// Whose memory is where, and how that stands; nothing where none follows.
fn following(current: &Current) -> Option<(Following, Status)> {
    let status = current.statistics.snapshot().status;
    let following = if current.outgoing { Following::NeedsUs } else { Following::LacksMemory };
    (current.is_active() && status.is_postcopy()).then_some((following, status))
}

impl Migrations {
    fn following(&self) -> Option<(Following, Status)> {
        lock(&self.current).as_ref().and_then(following)
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
            "the migration began without the capability postcopy-ram, or goes into a file: its destination need not be able to run a \
             guest ahead of its memory"
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
        let is_not_lost = "there is no postcopy migration that has lost its link";
        let Some((who, Status::PostcopyPaused)) = self.following() else { bail!(is_not_lost) };
        let Some(old) = self.ways.endpoint() else { bail!("there is no address") };
        let is_elsewhere = uri.as_ref().is_some_and(|uri| *uri != old.uri);
        let mut new = Endpoint { uri: uri.unwrap_or_else(|| old.uri.clone()), ..old };
        // Names may take long to be resolved: with no lock. It listens where it did, unless that is of no use.
        let listener = match who {
            Following::LacksMemory if is_elsewhere => Some(Listener::bind_endpoint(&new)?),
            Following::LacksMemory | Following::NeedsUs => None,
        };
        // In the order of whoever begins a migration. Another client may have been faster, or nothing be lost any more.
        let mut current = lock(&self.current);
        let Some(current) = current.as_mut() else { bail!(is_not_lost) };
        ensure!(following(current) == Some((who, Status::PostcopyPaused)), is_not_lost);
        match listener {
            Some(listener) => {
                new.uri = listener.uri().clone();
                *lock(&self.ways.listener) = Some(Arc::new(listener));
            }
            None if who == Following::LacksMemory => return Ok(()),
            None => {}
        }
        current.peer = new.uri.to_string();
        *lock(&self.ways.endpoint) = Some(new);
        if who == Following::NeedsUs {
            current.statistics.begin_recovery();
            self.parameters.recover();
        }
        Ok(())
    }
}
