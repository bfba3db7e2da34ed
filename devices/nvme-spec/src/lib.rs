//! The NVM Express structures and numbers that a controller and a driver share.
//!
//! Section numbers refer to the NVM Express Base Specification 2.0 ("Base") and the NVM Command Set
//! Specification 1.0 ("NVM"). Everything here can be checked against those texts alone:
//!
//! | module | content |
//! | --- | --- |
//! | [`regs`] | controller registers: offsets and bit fields |
//! | [`opcode`] | admin and I/O command opcodes |
//! | [`reservation`] | reservation commands and their report |
//! | [`entry`] | submission and completion queue entries |
//! | [`sgl`] | scatter gather list descriptors |
//! | [`status`] | status codes |
//! | [`identify`] | Identify data structures |
//! | [`feature`] | feature identifiers and their bit fields |
//! | [`log`] | log pages |
//! | [`persistent`] | the Persistent Event log |
//! | [`event`] | asynchronous events |
//!
//! The controller model (`nvme`) and the bare-metal test guest (`exerciser`) are both built on it; neither side
//! has a private idea of the layout.
//!
//! Invariants: integers are little-endian on the wire; reserved bytes are written as zero and ignored when read;
//! `from_bytes(x.to_bytes()) == x`. Fields of a structure are listed with their byte offset, in order, and a compile-time check
//! refuses overlaps.
//!
//! Absent: behaviour, allocation, dependencies (a build script compiles this crate with plain `rustc` for a
//! freestanding target), and NVMe over Fabrics.
#![no_std]
#![forbid(unsafe_code)]

#[macro_use]
mod wire;

pub mod entry;
pub mod event;
pub mod feature;
pub mod identify;
pub mod log;
pub mod opcode;
pub mod persistent;
pub mod regs;
pub mod reservation;
pub mod sgl;
pub mod status;

pub use entry::{CompletionEntry, SubmissionEntry};
pub use sgl::SglDescriptor;
pub use status::Status;

/// The namespace identifier that means "all namespaces" (Base 3.2.1.2).
pub const NSID_BROADCAST: u32 = 0xffff_ffff;
/// Size of every Identify data structure in bytes (Base 5.17).
pub const IDENTIFY_SIZE_BYTES: usize = 4096;
