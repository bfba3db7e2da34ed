//! The control socket: QMP, as QEMU's clients speak it, over a Unix socket.
//!
//! ```text
//! client --bytes--> framing --> session (handshake) --> protocol (JSON) --> commands --> dyn Operations (the machine)
//! client <--lines-- queue <--------------------------------------- answers, and events of the EventBus
//! ```
//!
//! The names and shapes are QEMU's (`docs/interop/qmp-spec`, `qapi/run-state.json`, `qapi/migration.json`), so that its
//! Python package and scripts work unchanged. What has no name there is under `x-ferry-status`, `x-ferry-snapshot`, `x-ferry-confirm`,
//! `x-ferry-reclaim`, `x-ferry-namespace-add`, `-remove` and `-resize`, and `x-ferry-ana-set`; a COMMIT whose outcome
//! is unknown shows as migration status `device` with run state `postmigrate`, and its details are there. `migrate` takes
//! `x-ferry-tls-dir` (a folder with ca.pem, cert.pem and key.pem), `x-ferry-insecure`, `x-ferry-local`, `x-ferry-postcopy` and
//! `x-ferry-with-storage` beside QEMU's arguments, and with `fd:NAME` the socket that `getfd` has named on the same connection; `quit` takes
//! `x-ferry-force`.
//!
//! Invariants:
//!
//! - The machine never waits for a client: events go into bounded queues, and a client that leaves its queue full is cut
//!   off. Each client has its own threads, so none waits for another.
//! - A client is hostile: requests have at most [`protocol::MAX_REQUEST_BYTES`] bytes, clients at most [`server::MAX_CLIENTS`],
//!   and malformed JSON is answered with QEMU's error, never with a panic.
//! - The socket is its owner's alone (mode 0600 from its first moment) and its file goes away with the server.
//! - Which command is legal when is decided by the machine behind [`Operations`], not here.
//!
//! Absent: out-of-band execution, TCP, QEMU's extension of JSON by single quotes, and the many commands of QEMU that have no
//! meaning here.

mod access;
mod channel;
pub mod client;
mod commands;
mod convergence;
mod cpu;
mod descriptors;
pub mod event;
mod follow;
mod framing;
mod namespaces;
pub mod operations;
pub mod protocol;
pub mod server;
mod session;
#[cfg(test)]
mod tests;

pub use channel::FerryChannel;
pub use client::Client;
#[cfg(test)]
pub(crate) use commands::names as command_names;
pub use convergence::{ConvergenceParameters, Limits, OnTimeout};
pub use cpu::FerryCpu;
pub use event::{Event, EventBus, NamespaceChange, ShutdownCause};
pub use follow::{Finished, MigrateRequest};
pub use operations::{
    AccessScope, AccessState, DiskStats, FerryAccess, FerryDisk, FerryDowntime, FerryLease, FerryMember,
    FerryMigration, FerryOwnership, FerryPostcopy, FerryStart, FerryStatus, MigrationInfo,
    MigrationParameters, MigrationStatus, MigrationTarget, MultifdCompression, Operations, RamStats, Refusal,
    RunState,
};
pub use server::Server;

use std::io;
use std::path::PathBuf;

/// What can go wrong on either end of the socket.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The server cannot listen.
    #[error("the control socket cannot be made")]
    Listen(#[source] transport::Error),
    /// The thread that accepts clients cannot be started.
    #[error("a thread for the control socket cannot be started")]
    Thread(#[source] io::Error),
    /// A client cannot be read from.
    #[error("a client cannot be read from")]
    Read(#[source] io::Error),
    /// A client went away.
    #[error("the client does not read any more")]
    Gone,
    /// The client cannot connect.
    #[error("no machine answers at {path}", path = path.display())]
    Connect {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The server closed the connection.
    #[error("the machine at {path} closed the connection", path = path.display())]
    Closed {
        /// Where.
        path: PathBuf,
    },
    /// The connection failed, or an answer did not come in time.
    #[error("the connection to {path} failed", path = path.display())]
    Lost {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The server does not speak QMP.
    #[error("{path} does not speak QMP: {detail}", path = path.display())]
    NotQmp {
        /// Where.
        path: PathBuf,
        /// What was wrong.
        detail: String,
    },
    /// The machine refused a command.
    #[error("{command} was refused: {description}")]
    Refused {
        /// Which.
        command: String,
        /// QMP's `desc`.
        description: String,
    },
}
