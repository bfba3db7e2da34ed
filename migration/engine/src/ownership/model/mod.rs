//! The hand-over in every order: two processes, the link between them, the disk with the lease, and an operator.
//!
//! `world` runs the machines and the lease's rules that ship; it adds only what surrounds them: when a message comes, is
//! lost, comes again or comes late, when a wait is over, when a process is killed, and what of a write is on the disk then.
//! `explorer` visits every state of that world.

mod explorer;
mod steps;
mod tests;
mod world;
