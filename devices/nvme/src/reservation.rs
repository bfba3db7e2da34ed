//! The reservation of one namespace (Base 8.19): who is registered, who holds it, and what each command makes of that.
//!
//! Nothing here knows controllers, queues or locks: a command goes in with the host that sent it, and what comes out is a status or
//! what is to be told to whom. [`crate::reservations`] keeps one of these for each namespace that has one.

use nvme_spec::Status;

/// Hosts that can be registered with one namespace at a time.
pub(crate) const MAX_REGISTRANTS: usize = 64;

/// Who sends commands to a controller: its Host Identifier (Base 5.27.1.25).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum HostIdentity {
    /// None was set: of two controllers that both have a Host Identifier of 0h the hosts are different ones, so this is the host of one
    /// controller, from one reset to the next.
    Unnamed { controller: u16 },
    /// 64 bits.
    Short([u8; 8]),
    /// 128 bits.
    Extended([u8; 16]),
}

/// Reservation Type (Base figure 419).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    WriteExclusive = 1,
    ExclusiveAccess = 2,
    WriteExclusiveRegistrantsOnly = 3,
    ExclusiveAccessRegistrantsOnly = 4,
    WriteExclusiveAllRegistrants = 5,
    ExclusiveAccessAllRegistrants = 6,
}

impl Kind {
    pub fn from_value(value: u8) -> Option<Self> {
        Some(match value {
            1 => Self::WriteExclusive,
            2 => Self::ExclusiveAccess,
            3 => Self::WriteExclusiveRegistrantsOnly,
            4 => Self::ExclusiveAccessRegistrantsOnly,
            5 => Self::WriteExclusiveAllRegistrants,
            6 => Self::ExclusiveAccessAllRegistrants,
            _ => return None,
        })
    }

    /// Every registrant is a holder.
    fn is_held_by_all(self) -> bool {
        matches!(self, Self::WriteExclusiveAllRegistrants | Self::ExclusiveAccessAllRegistrants)
    }

    /// Registrants may do what the holder may.
    fn admits_registrants(self) -> bool {
        !matches!(self, Self::WriteExclusive | Self::ExclusiveAccess)
    }

    fn excludes_reads(self) -> bool {
        matches!(
            self,
            Self::ExclusiveAccess
                | Self::ExclusiveAccessRegistrantsOnly
                | Self::ExclusiveAccessAllRegistrants
        )
    }
}

/// A host and the key that it has registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Registrant {
    pub host: HostIdentity,
    pub key: u64,
}

/// Commands of a host that a reservation keeps away.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Conflicts {
    pub reads: bool,
    pub writes: bool,
}

/// Type of a reservation notification (Base 5.16.1.24).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Notification {
    RegistrationPreempted = 1,
    ReservationReleased = 2,
    ReservationPreempted = 3,
}

/// What a command does beyond its namespace.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub told: Vec<(HostIdentity, Notification)>,
    /// Hosts that were unregistered by another.
    pub preempted: Vec<HostIdentity>,
}

/// See the module's text. The default is that of a namespace nobody has registered with.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Reservation {
    /// In the order of their hosts.
    pub registrants: Vec<Registrant>,
    /// The type and the holder; of the types that all registrants hold it is whoever acquired it.
    pub held: Option<(Kind, HostIdentity)>,
    /// GEN: counts what changes registrations, and wraps.
    pub generation: u32,
    /// It survives the loss of power (PTPL).
    pub persists: bool,
}

/// What a Reservation Register command does to the registration (RREGA).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Registration {
    Register {
        key: u64,
    },
    /// A key that is given must be the registered one; with Ignore Existing Key none is.
    Unregister {
        current: Option<u64>,
    },
    Replace {
        current: Option<u64>,
        key: u64,
    },
}

const CONFLICT: Status = Status::RESERVATION_CONFLICT.do_not_retry();

impl Reservation {
    fn find(&self, host: HostIdentity) -> Result<usize, usize> {
        self.registrants.binary_search_by_key(&host, |registrant| registrant.host)
    }

    pub fn is_registered(&self, host: HostIdentity) -> bool {
        self.find(host).is_ok()
    }

    /// Whether `host` is a reservation holder.
    pub fn is_holder(&self, host: HostIdentity) -> bool {
        match self.held {
            Some((kind, _)) if kind.is_held_by_all() => self.is_registered(host),
            Some((_, holder)) => holder == host,
            None => false,
        }
    }

    /// What `host` may not do (Base 8.19, figure "Command Behavior in the Presence of a Reservation").
    pub fn conflicts(&self, host: HostIdentity) -> Conflicts {
        let Some((kind, holder)) = self.held else { return Conflicts::default() };
        if host == holder || kind.admits_registrants() && self.is_registered(host) {
            return Conflicts::default();
        }
        Conflicts { reads: kind.excludes_reads(), writes: true }
    }

    /// Reservation Register (Base 7.3). The persistence through power loss is changed along, if it is to be.
    pub fn register(
        &mut self,
        host: HostIdentity,
        registration: Registration,
        persists: Option<bool>,
    ) -> Result<Outcome, Status> {
        let found = self.find(host);
        let mut outcome = Outcome::default();
        match (registration, found) {
            // A host may register one key as often as it likes, on all its controllers.
            (Registration::Register { key }, Ok(place)) if self.registrants[place].key == key => {}
            (Registration::Register { .. }, Ok(_)) => return Err(CONFLICT),
            // With Ignore Existing Key a key is replaced "without regard to its registration status or current reservation key value".
            (Registration::Register { key } | Registration::Replace { current: None, key }, Err(place)) => {
                if self.registrants.len() == MAX_REGISTRANTS {
                    return Err(Status::INTERNAL_ERROR);
                }
                self.registrants.insert(place, Registrant { host, key });
            }
            (Registration::Unregister { current } | Registration::Replace { current, .. }, Ok(place))
                if current.is_some_and(|key| self.registrants[place].key != key) =>
            {
                return Err(CONFLICT);
            }
            (Registration::Replace { key, .. }, Ok(place)) => self.registrants[place].key = key,
            (Registration::Unregister { .. }, Ok(_)) => self.unregister(host, &mut outcome),
            (Registration::Unregister { .. } | Registration::Replace { .. }, Err(_)) => return Err(CONFLICT),
        }
        self.persists = persists.unwrap_or(self.persists);
        self.generation = self.generation.wrapping_add(1);
        Ok(outcome)
    }

    /// A registration ends, and with it what its host held (Base 8.19.4).
    fn unregister(&mut self, host: HostIdentity, outcome: &mut Outcome) {
        let Ok(place) = self.find(host) else { return };
        self.registrants.remove(place);
        let Some((kind, holder)) = self.held else { return };
        if kind.is_held_by_all() {
            // It is released with the last of them.
            self.held = self.registrants.first().map(|other| match holder {
                holder if holder == host => (kind, other.host),
                holder => (kind, holder),
            });
        } else if holder == host {
            self.held = None;
            if kind.admits_registrants() {
                self.tell_others(host, Notification::ReservationReleased, outcome);
            }
        }
    }

    fn tell_others(&self, host: HostIdentity, what: Notification, outcome: &mut Outcome) {
        let others = self.registrants.iter().filter(|other| other.host != host);
        outcome.told.extend(others.map(|other| (other.host, what)));
    }

    /// The host of Reservation Acquire and Release is a registrant, and knows its key.
    fn check_key(&self, host: HostIdentity, key: u64) -> Result<(), Status> {
        match self.find(host) {
            Ok(place) if self.registrants[place].key == key => Ok(()),
            _ => Err(CONFLICT),
        }
    }

    /// Reservation Acquire (Base 7.2, 8.19.5).
    pub fn acquire(&mut self, host: HostIdentity, key: u64, kind: Kind) -> Result<Outcome, Status> {
        self.check_key(host, key)?;
        match self.held {
            None => self.held = Some((kind, host)),
            Some((held, _)) if held == kind && self.is_holder(host) => {}
            Some(_) => return Err(CONFLICT),
        }
        Ok(Outcome::default())
    }

    /// Reservation Acquire with the action Preempt, or Preempt and Abort (Base 8.19.7): `victim` is the key of those to unregister.
    pub fn preempt(
        &mut self,
        host: HostIdentity,
        key: u64,
        victim: u64,
        kind: Kind,
    ) -> Result<Outcome, Status> {
        self.check_key(host, key)?;
        let before = self.held;
        let takes = before.is_some_and(|(held, holder)| {
            if held.is_held_by_all() {
                victim == 0
            } else {
                self.registrants.iter().any(|holding| holding.host == holder && holding.key == victim)
            }
        });
        let all = takes && before.is_some_and(|(held, _)| held.is_held_by_all());
        let chosen = |registrant: &Registrant| {
            // Who takes the reservation stays registered.
            (all || registrant.key == victim) && !(takes && registrant.host == host)
        };
        let victims: Vec<HostIdentity> = self
            .registrants
            .iter()
            .filter(|registrant| chosen(registrant))
            .map(|victim| victim.host)
            .collect();
        // A key of 0h means all registrants of a reservation that all of them hold, and nothing else.
        if !takes && victim == 0 {
            return Err(Status::INVALID_FIELD.do_not_retry());
        }
        if !takes && victims.is_empty() {
            return Err(CONFLICT);
        }
        let mut outcome = Outcome::default();
        if takes {
            self.held = None;
        }
        for victim in victims {
            self.unregister(victim, &mut outcome);
            if victim != host {
                outcome.told.push((victim, Notification::RegistrationPreempted));
                outcome.preempted.push(victim);
            }
        }
        if takes {
            self.held = Some((kind, host));
            if before.is_some_and(|(held, _)| held != kind) {
                self.tell_others(host, Notification::ReservationReleased, &mut outcome);
            }
        }
        self.generation = self.generation.wrapping_add(1);
        Ok(outcome)
    }

    /// Reservation Release (Base 7.4, 8.19.6).
    pub fn release(&mut self, host: HostIdentity, key: u64, kind: Option<Kind>) -> Result<Outcome, Status> {
        self.check_key(host, key)?;
        let mut outcome = Outcome::default();
        // Of who holds nothing there is nothing to release, which is no error.
        if let Some((held, _)) = self.held.filter(|_| self.is_holder(host)) {
            if kind != Some(held) {
                return Err(Status::INVALID_FIELD.do_not_retry());
            }
            self.held = None;
            if held.admits_registrants() {
                self.tell_others(host, Notification::ReservationReleased, &mut outcome);
            }
        }
        Ok(outcome)
    }

    /// Reservation Release with the action Clear (Base 8.19.8): nobody is registered any more.
    pub fn clear(&mut self, host: HostIdentity, key: u64) -> Result<Outcome, Status> {
        self.check_key(host, key)?;
        let mut outcome = Outcome::default();
        self.tell_others(host, Notification::ReservationPreempted, &mut outcome);
        self.registrants.clear();
        self.held = None;
        self.generation = self.generation.wrapping_add(1);
        Ok(outcome)
    }

    /// A host is gone that cannot come back as the same (Base 5.27.1.25: registrations of a Host Identifier of 0h do not persist across
    /// a Controller Level Reset).
    pub fn forget(&mut self, host: HostIdentity) -> Outcome {
        let mut outcome = Outcome::default();
        if self.is_registered(host) {
            self.unregister(host, &mut outcome);
            self.generation = self.generation.wrapping_add(1);
        }
        outcome
    }
}
