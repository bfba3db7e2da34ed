//! The VM generation ID: 16 random bytes in guest memory that are others in every guest that was made from one snapshot.
//!
//! A guest that runs on from a snapshot has the random numbers, keys and nonces of every other that does. By this it learns
//! that time was split: a device of the ACPI tables says where the bytes are, and an event, that they have changed (Microsoft,
//! "Virtual Machine Generation ID", 2012; Linux seeds its random numbers anew then). A guest that moves, is suspended, or is
//! reset keeps its own.
//!
//! Invariants: the bytes lie in a page that the memory map reserves, and are the whole state: they move as memory does, and a
//! guest without the tables, or of a version without the device, never looks there.

use bus::GuestMemory;
use rustix::rand::{GetRandomFlags, getrandom};
use vm_memory::{Bytes, GuestAddress};

use super::{Error, write};
use crate::layout::GENERATION_ID_START;

/// "An 8-byte aligned ... 128-bit cryptographically random integer".
type GenerationId = [u8; 16];

const PLACE: GuestAddress = GuestAddress(GENERATION_ID_START);

/// Gives a guest that boots for the first time its own; one that is reset has it.
pub(super) fn ensure(memory: &GuestMemory) -> Result<(), Error> {
    let mut present = GenerationId::default();
    let read = memory.read_slice(&mut present, PLACE);
    if read.is_ok() && present != GenerationId::default() { Ok(()) } else { renew(memory) }
}

/// Gives the guest another, of which it is told by [`crate::layout::GENERATION_GSI`].
///
/// # Errors
/// The host has no random numbers, or guest memory has no such page.
pub fn renew(memory: &GuestMemory) -> Result<(), Error> {
    let mut id = GenerationId::default();
    // Up to 256 bytes come whole (getrandom(2)).
    getrandom(&mut id, GetRandomFlags::empty()).map_err(|source| Error::Random(source.into()))?;
    write(memory, "the VM generation ID", PLACE, &id)
}
