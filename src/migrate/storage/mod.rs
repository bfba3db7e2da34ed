//! The images of this process's machine that go with its guest: what the migration engine reads and writes of them.
//!
//! Both ends name an image after its controller and namespace, and go through the backends that the guest uses, so that what moves is
//! what the guest sees. What may start from images is said by the lease record of the machine, which lies beside the first of them and
//! speaks for all, and by a mark beside each, in whatever machine it is used: before the stop that its guest is about to leave, and from
//! before its first block until the guest runs that it comes.

mod image;
mod incoming;
mod outgoing;
#[cfg(test)]
mod tests;

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, ensure};
use block::{Backend, Base, BaseFormat, Buffers, Completion, IoContext, Operation, Request};
use bus::{GuestMemory, GuestRange};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::poll::PollContext;

use crate::config::{BackendSpec, MachineSpec};

pub use incoming::{ImagesCome, Incoming, Shared};
pub use outgoing::Outgoing;

const _: () = assert!(block::DIRTY_BLOCK_BYTES == engine::storage::BLOCK_BYTES);

/// The most that is read or written in one request.
const PIECE_BYTES: usize = 512 << 10;
/// Between two looks whether a disk is done that has said nothing.
const GLANCE: Duration = Duration::from_secs(1);

/// An image of a machine that its guest may write.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Place {
    /// Of its controller in the specification.
    controller: usize,
    nsid: u32,
    /// Unique in the machine, and the same at both ends.
    name: String,
    path: PathBuf,
    format: &'static str,
    /// Some of it is in a base.
    is_overlay: bool,
    /// What the guest can reach of it is a multiple of this.
    block_bytes: u64,
}

/// The images of `spec` that are not only read, by name.
fn places(spec: &MachineSpec) -> Vec<Place> {
    let mut places = Vec::new();
    for (index, controller) in spec.controllers.iter().enumerate() {
        for namespace in controller.namespaces.iter().filter(|namespace| !namespace.read_only) {
            let (path, format) = match &namespace.backend {
                BackendSpec::File(path) => (path, "raw"),
                BackendSpec::Qcow2(path) => (path, "qcow2"),
                // One over a base goes as a whole, and arrives as what the base is, which is what its guest takes it for.
                BackendSpec::Overlay { path, base: Base { format: BaseFormat::Raw, .. } } => (path, "raw"),
                BackendSpec::Overlay { path, base: Base { format: BaseFormat::Qcow2, .. } } => {
                    (path, "qcow2")
                }
                // In guest memory, or nowhere.
                BackendSpec::Memory { .. } | BackendSpec::Null { .. } => continue,
            };
            places.push(Place {
                controller: index,
                nsid: namespace.nsid,
                name: format!("{}-{}", controller.serial, namespace.nsid),
                path: path.clone(),
                format,
                is_overlay: matches!(namespace.backend, BackendSpec::Overlay { .. }),
                block_bytes: namespace.block_bytes.into(),
            });
        }
    }
    places.sort_by(|one, other| one.name.cmp(&other.name));
    places
}

/// What is to be known of an image that has no mark.
fn only_the_lease_tells(image: &Path) -> String {
    format!(
        "{} is a block device, beside which nothing lasts: only the lease of its machine tells whether its guest is there",
        image.display()
    )
}

/// Reads and writes images, one request at a time, and waits for each.
struct ImageIo {
    context: IoContext,
    memory: GuestMemory,
    poll: PollContext<u64>,
    ended: Vec<Completion>,
}

impl ImageIo {
    fn new() -> anyhow::Result<Self> {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), PIECE_BYTES)])
            .context("cannot get memory to copy images through")?;
        let context = IoContext::new(memory.clone(), 1)?;
        let poll = PollContext::new().map_err(io::Error::from)?;
        poll.add(context.event_fd(), 0).map_err(io::Error::from)?;
        Ok(Self { context, memory, poll, ended: Vec::with_capacity(1) })
    }

    /// Reads from an image; at most [`PIECE_BYTES`].
    fn read(&mut self, image: &dyn Backend, offset_bytes: u64, into: &mut [u8]) -> anyhow::Result<()> {
        self.run(image, Operation::Read, offset_bytes, into.len() as u64, true)?;
        Ok(self.memory.read_slice(into, GuestAddress(0))?)
    }

    /// Writes to an image; at most [`PIECE_BYTES`].
    fn write(&mut self, image: &dyn Backend, offset_bytes: u64, contents: &[u8]) -> anyhow::Result<()> {
        ensure!(contents.len() <= PIECE_BYTES, "{} bytes are too many at once", contents.len());
        self.memory.write_slice(contents, GuestAddress(0))?;
        self.run(image, Operation::Write { fua: false }, offset_bytes, contents.len() as u64, true)
    }

    /// Makes a part of an image zeroes, and a hole if it can be one.
    fn write_zeroes(
        &mut self,
        image: &dyn Backend,
        offset_bytes: u64,
        length_bytes: u64,
    ) -> anyhow::Result<()> {
        let zeroes = Operation::WriteZeroes { deallocate: true, fua: false };
        self.run(image, zeroes, offset_bytes, length_bytes, false)
    }

    fn run(
        &mut self,
        image: &dyn Backend,
        operation: Operation,
        offset_bytes: u64,
        length_bytes: u64,
        moves_data: bool,
    ) -> anyhow::Result<()> {
        ensure!(
            !moves_data || length_bytes <= PIECE_BYTES as u64,
            "{length_bytes} bytes are too many at once"
        );
        let range = [GuestRange { address: GuestAddress(0), length_bytes: length_bytes as u32 }];
        let buffers = if moves_data { Buffers::Guest(&range) } else { Buffers::None };
        image
            .submit(&mut self.context, &Request { token: 0, operation, offset_bytes, length_bytes, buffers });
        self.ended.clear();
        loop {
            self.context.submit()?;
            self.context.completions(&mut self.ended);
            if let Some(completion) = self.ended.first() {
                return completion
                    .result
                    .map_err(|failure| anyhow::anyhow!("{failure}"))
                    .with_context(|| format!("{length_bytes} bytes at {offset_bytes:#x}"));
            }
            self.poll.wait_timeout(GLANCE).map_err(io::Error::from)?;
            // Empty if it was a glance.
            let _ = self.context.event_fd().read();
        }
    }
}
