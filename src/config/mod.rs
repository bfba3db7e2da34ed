//! What the user asked for, and what it means.
//!
//! Text on the command line becomes a [`Config`] (its *shape*: options that parse); a [`Config`] becomes a checked
//! [`MachineSpec`] (its *meaning*: serials are unique, every namespace has a controller, sizes fit together). Only a
//! [`MachineSpec`] builds a machine, so the code behind it repeats none of these checks.
//!
//! Nothing here opens a file: whether an image exists and has the right size is found out when the machine is built.

mod disk;
mod options;
mod size;
mod spec;

pub use disk::{
    BackendSpec, ControllerSpec, DEFAULT_QUEUE_PAIRS, MAX_NSID, MetadataSpec, NamespaceOption, NamespaceSpec,
    NvmeOption, SubsystemSpec,
};
pub use options::Options;
pub use size::{display_size, parse_size};
pub use spec::{Config, MachineSpec, SerialOutput, Tables};

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum Error {
    /// A size does not parse.
    #[error("{text:?} is not a size: write a number with an optional K, M, G or T, as in 512M")]
    Size {
        /// What was written.
        text: String,
    },
    /// An option list such as `a=1,b` does not parse.
    #[error("{option} {text:?}: {reason}")]
    Options {
        /// The flag.
        option: &'static str,
        /// What was written.
        text: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The parts do not make a machine.
    #[error("{0}")]
    Machine(String),
}
