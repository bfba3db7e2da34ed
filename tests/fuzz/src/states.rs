//! States that come from other processes: sections of our machine, and messages of the migration protocol.

use engine::{FileState, protocol};
use vmstate::{Problem, VmState};

use crate::mutate::Random;
use crate::seeds;

/// A type of states: how it is read, and how valid bytes of it are made.
struct Kind {
    name: &'static str,
    version: u32,
    read: fn(&[u8], u32) -> bool,
    seed: fn(&mut Random) -> Vec<u8>,
}

const fn kind<T: VmState>() -> Kind {
    Kind { name: T::NAME, version: T::VERSION, read: read::<T>, seed: seeds::state::<T> }
}

/// Every type that is a section of its own, or a large part of one.
const DEVICES: &[Kind] = &[
    kind::<legacy::SerialState>(),
    kind::<legacy::RtcState>(),
    kind::<legacy::AcpiPmState>(),
    kind::<pci::RootBusState>(),
    kind::<pci::EndpointState>(),
    kind::<virtio::VirtioState>(),
    kind::<nvme::NvmeState>(),
    kind::<nvme::Inventory>(),
    kind::<ferry::vcpu::VcpuState>(),
    kind::<ferry::kvm::IrqchipState>(),
    kind::<ferry::kvm::PitState>(),
    kind::<ferry::kvm::ClockState>(),
    kind::<FileState>(),
];

/// The bodies of frames.
const MESSAGES: &[Kind] = &[
    kind::<protocol::Hello>(),
    kind::<protocol::Agree>(),
    kind::<protocol::Reasons>(),
    kind::<protocol::Prepare>(),
    kind::<protocol::Prepared>(),
    kind::<protocol::Commit>(),
    kind::<protocol::Running>(),
    kind::<protocol::Never>(),
    kind::<protocol::Query>(),
    kind::<protocol::Progress>(),
    kind::<protocol::ChannelHello>(),
    kind::<protocol::MemoryBlocks>(),
    kind::<protocol::ImageFiles>(),
];

/// Loads a state, which must be saved as it was; returns whether it could be loaded.
fn read<T: VmState>(bytes: &[u8], version: u32) -> bool {
    let whole = vmstate::from_bytes::<T>(bytes, version);
    if let Ok(length) = vmstate::measure::<T>(bytes, version) {
        assert!(length <= bytes.len());
        assert!(whole.is_err() || length == bytes.len());
    }
    match whole {
        Ok(state) => {
            if version == T::VERSION {
                assert_eq!(vmstate::to_bytes(&state), bytes, "{} is saved as it was loaded", T::NAME);
            }
            cut::<T>(bytes, version);
            true
        }
        Err(error) => {
            assert!(!error.to_string().is_empty());
            false
        }
    }
}

/// Cuts a state that could be loaded: whoever waits for what it is then known to lack, waits for what comes. One byte may follow the
/// state, to show that it is at its end.
fn cut<T: VmState>(bytes: &[u8], version: u32) {
    const CUTS: usize = 8;
    for length in (0..bytes.len()).step_by(1 + bytes.len() / CUTS) {
        let error = vmstate::measure::<T>(&bytes[..length], version).expect_err("a part of a state").problem;
        let Problem::Truncated { needed, left } = error else {
            panic!("{} bytes of {}: {error}", length, T::NAME)
        };
        let more = needed.saturating_sub(left);
        assert!(
            more > 0 && more <= (bytes.len() - length) as u64 + 1,
            "{length} bytes of {}: {more} more",
            T::NAME
        );
    }
}

/// The first byte says which type, the second which version; the rest is read.
fn run(kinds: &[Kind], bytes: &[u8]) {
    let [index, version, state @ ..] = bytes else { return };
    let Some(kind) = kinds.get(usize::from(*index) % kinds.len()) else { return };
    (kind.read)(state, u32::from(*version));
}

/// # Panics
///
/// If no seed of a type can be loaded: then nothing behind its first fields is ever tried.
fn seeds(kinds: &[Kind]) -> Vec<Vec<u8>> {
    let mut out = Vec::new();
    for (index, kind) in kinds.iter().enumerate() {
        let mut valid = 0;
        for seed in 0..6 {
            let state = (kind.seed)(&mut Random::new(seed));
            valid += usize::from((kind.read)(&state, kind.version));
            out.push([&[index as u8, kind.version as u8], state.as_slice()].concat());
        }
        assert!(valid > 0, "no seed of {:?} is valid", kind.name);
    }
    out
}

/// The state of any device.
pub fn devices(bytes: &[u8]) {
    run(DEVICES, bytes);
}

/// The body of any message.
pub fn messages(bytes: &[u8]) {
    run(MESSAGES, bytes);
}

/// Valid states of every device.
#[must_use]
pub fn device_seeds() -> Vec<Vec<u8>> {
    seeds(DEVICES)
}

/// Valid bodies of every message.
#[must_use]
pub fn message_seeds() -> Vec<Vec<u8>> {
    seeds(MESSAGES)
}
