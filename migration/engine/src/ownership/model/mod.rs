//! The hand-over in every order: two processes, the link between them, the disk with the lease, and an operator.
//!
//! `world` runs the machines and the lease's rules that ship; it adds only what surrounds them: when a message comes, is
//! lost, comes again or comes late, when a wait is over, when a process is killed, and what of a write is on the disk then.
//! `explorer` visits every state of that world.
//!
//! A message that is lost, late or twice there, or arrives in one direction only, is what a link that is cut, stalls or is half
//! closed does to it; a process that is stopped is one whose next step comes late. A kill while the lease is written leaves it on
//! the disk or not. RAM is there where it is
//! handed over itself, as who wrote it last; `postcopy` is a world of its own for the memory that follows. Absent: the failures that end with the source running before anything is given away, a third process, and
//! a destination that is started again (it knows no session and refuses to say anything of one).

mod explorer;
mod postcopy;
mod steps;
mod tests;
mod world;
