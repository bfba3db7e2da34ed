//! A running NVMe controller, with the guest as the attacker.
//!
//! An input is a list of steps: registers at any width, doorbells, entries and lists in memory, commands of every kind, faults of the images,
//! moves to another controller. Next to the guest a second actor rewrites memory in the midst of a pass, wherever the controller
//! calls out ([`actor`]). What must hold, whatever the steps are ([`machine`]):
//!
//! - nothing panics, and the controller comes to rest;
//! - memory that the guest never pointed at is as it was;
//! - of the commands of a queue pair that nobody interferes with, each ends once, whatever it says;
//! - what is saved can be loaded elsewhere and is saved there as it was;
//! - after a reset nothing is in flight, and the controller can be enabled and serves commands.
//!
//! Each target plays the same steps in another mixture. [`pointers`] looks at data pointers alone, against a second implementation.
//!
//! # Absent
//!
//! Several controllers in a subsystem: the tests of crate `nvme` have those.

mod actor;
mod entry;
mod machine;
mod play;
pub mod pointers;
mod seeds;

pub use actor::Actor;
pub use machine::{ARENA_BYTES, Machine};
use play::Step::{self, *};
pub use play::play;
pub use seeds::{admin_seeds, command_seeds, pointer_seeds, queue_seeds, register_seeds};

/// Mostly registers, and the configuration space.
pub const REGISTERS: &[Step] = &[
    Register,
    Register,
    Register,
    Register,
    ReadRegister,
    Configuration,
    Configuration,
    Doorbell,
    Run,
    Buffer,
    Admin,
    Io,
    Enable,
    Move,
    Plan,
    Vector,
    Region,
];

/// Mostly queues in memory that others write too.
pub const QUEUES: &[Step] = &[
    CreateQueue,
    CreateQueue,
    Entry,
    Entry,
    Poke,
    Poke,
    Doorbell,
    Doorbell,
    Plan,
    Shadow,
    Run,
    Poll,
    Io,
    Move,
    Fault,
    Release,
];

/// Mostly admin commands.
pub const ADMIN: &[Step] = &[
    Admin, Admin, Admin, Admin, Admin, Admin, Io, Run, Run, Poke, Plan, Namespace, Fault, Release, Move,
    Enable, Register,
];

/// Mostly I/O commands with lists.
pub const COMMANDS: &[Step] =
    &[Io, Io, Io, Io, Io, List, List, Poke, Run, Plan, Fault, Release, Admin, Shadow, Move, Buffer, Region];

/// Plays registers.
pub fn registers(bytes: &[u8]) {
    play(REGISTERS, bytes, None);
}

/// Plays queues.
pub fn queues(bytes: &[u8]) {
    play(QUEUES, bytes, None);
}

/// Plays admin commands.
pub fn admin(bytes: &[u8]) {
    play(ADMIN, bytes, None);
}

/// Plays I/O commands.
pub fn commands(bytes: &[u8]) {
    play(COMMANDS, bytes, None);
}
