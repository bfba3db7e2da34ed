//! The hand-over in every order: two processes, the link between them, the disk with the lease, and an operator.
//!
//! `world` runs the machines and the lease's rules that ship; `steps` adds only what surrounds them: when a message comes, is
//! lost, comes again or comes late, when a wait is over, when a process is killed, and what of a write is on the disk then.
//! `explorer` visits every state of that world, and `properties` says what none of them may be and what must come of each.
//!
//! An attempt goes from its hello to the last answer. Each side may fail in each step of it, which stands for a refusal, a cancel, a
//! timeout and a device that fails alike: what the other is told of that (REFUSE, REJECT, CANCEL) makes it fail as well, as it may at any
//! time. What is different are the answers to COMMIT and QUERY.
//!
//! A message that is lost, late or twice there, or arrives in one direction only, is what a link that is cut, stalls or is half
//! closed does to it; a process that is stopped is one whose next step comes late. A kill while the lease is written leaves it on
//! the disk or not. RAM is there where it is
//! handed over itself, as who wrote it last; `postcopy` is a world of its own for the memory that follows.
//!
//! Leases are one that both sides see, or none, or one at each end: that of a guest that takes its images along, where what is beside
//! the images says whether a guest may be started from them. There a side that was killed may be started anew, by anybody whom the lease
//! lets and by an operator who has looked at the other end; what he must not conclude from a record alone is among the mutations.
//!
//! That it is decided in the end means: from every state it can be, without a further fault. How long that takes is no matter here, nor
//! that whoever can go on does.
//!
//! Absent: a third process, a destination that is started again to wait (it knows no session and refuses to say anything of one), and
//! guests that go into files.

mod explorer;
mod postcopy;
mod properties;
mod record;
mod steps;
mod tests;
mod world;
