//! What becomes of a device when its machine moves.

/// What becomes of a device when its machine moves. There is no default: whoever lists the devices of a machine says it of each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Migratability {
    /// It has a state, which moves along.
    State,
    /// Built alike, it is alike: it keeps nothing that its guest could miss.
    Stateless,
    /// It has something that cannot move; why, in words for whoever wants to migrate its machine.
    NonMigratable(&'static str),
}

impl Migratability {
    /// The reason why the device's machine cannot move, if it is the device's.
    #[must_use]
    pub fn blocker(self) -> Option<&'static str> {
        match self {
            Self::State | Self::Stateless => None,
            Self::NonMigratable(why) => Some(why),
        }
    }
}
