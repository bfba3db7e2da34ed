//! How long each step may take.

use std::time::Duration;

/// Deadlines. The defaults suit people and their machines; tests use shorter ones.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// Reaching the destination.
    pub connect: Duration,
    /// The first words of a peer: a silent one keeps others out no longer.
    pub handshake: Duration,
    /// Building the machine at the destination.
    pub build: Duration,
    /// A message, or room for one in the socket, while RAM moves.
    pub silence: Duration,
    /// Loading the devices at the destination; draining the disks at the source.
    pub prepare: Duration,
    /// Signs of life of a source that sends no RAM: it writes back its images.
    pub stall: Duration,
    /// What a destination grants a source for bringing again what was here before, in rounds that do not end, all together: time that comes
    /// on top of what contents buy that are new (`headway` says how). An honest source needs it for a guest that dirties its memory as fast
    /// as the link takes it, and the rhythm in which such guests become calm is one of days, at most of a week: who is still not done after
    /// that does not converge. It keeps a source that is broken or hostile, and says the same for ever, from holding a destination for ever.
    pub repetition: Duration,
    /// What rounds show of a guest is believed after as long: vCPUs that are slowed down dirty nothing for a part of the time and much in
    /// the rest.
    pub throttle: Duration,
    /// From the stop until the destination has loaded, beyond the downtime that the user allows. It bounds a destination that
    /// moves too little to be useful and too much to be silent.
    pub stopped: Duration,
    /// The answer to COMMIT.
    pub answer: Duration,
    /// From a lost COMMIT until the undecided state is given back to the caller.
    pub settle: Duration,
    /// Between attempts to ask again.
    pub retry: Duration,
    /// Hearing what the other side had to say before the link broke, and letting it hear us.
    pub last_words: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            handshake: Duration::from_secs(5),
            build: Duration::from_secs(60),
            silence: Duration::from_secs(30),
            prepare: Duration::from_secs(60),
            stall: Duration::from_secs(300),
            repetition: Duration::from_secs(7 * 24 * 3600),
            throttle: Duration::from_millis(200),
            stopped: Duration::from_secs(120),
            answer: Duration::from_secs(10),
            settle: Duration::from_secs(30),
            retry: Duration::from_millis(100),
            last_words: Duration::from_secs(1),
        }
    }
}
