//! What can go wrong before a link exists.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

/// Why an address was not understood, or no link came about.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The text is no address that this build knows.
    #[error("address {text:?}: {reason}")]
    Address {
        /// What the user wrote.
        text: String,
        /// What is wrong with it.
        reason: String,
    },
    /// TCP to or from another host.
    #[error(
        "address {text:?} reaches beyond this host (it resolves to {resolved}); that needs TLS (--tls-dir), or --insecure to do without"
    )]
    BeyondLoopback {
        /// What the user wrote.
        text: String,
        /// The first address that is not a loopback address.
        resolved: String,
    },
    /// The peer could not be reached.
    #[error("cannot connect to {uri}")]
    Connect {
        /// Where to.
        uri: String,
        /// Why.
        source: io::Error,
    },
    /// The address cannot be listened on.
    #[error("cannot listen on {uri}")]
    Listen {
        /// Where.
        uri: String,
        /// Why.
        source: io::Error,
    },
    /// Another process listens there.
    #[error("cannot listen on {uri}: another process already does")]
    InUse {
        /// Where.
        uri: String,
    },
    /// The path exists and is not a socket: it is not ours to remove.
    #[error("cannot listen on {uri}: the path exists and is not a socket")]
    NotASocket {
        /// Where.
        uri: String,
    },
    /// Nobody answered in time.
    #[error("no connection to {uri} within {timeout:?}")]
    TimedOut {
        /// Where to.
        uri: String,
        /// How long it was tried.
        timeout: Duration,
    },
    /// A file of a folder with credentials.
    #[error("cannot use {path}: {reason}", path = path.display())]
    Credentials {
        /// Which.
        path: PathBuf,
        /// What is wrong with it.
        reason: String,
    },
    /// The two ends do not trust each other.
    #[error("no secure connection with {peer}: {reason}")]
    Tls {
        /// The other end.
        peer: String,
        /// What is wrong, of the other end.
        reason: String,
    },
    /// A connection that was being set up failed.
    #[error("cannot set up the connection with {peer}")]
    Setup {
        /// The other end.
        peer: String,
        /// Why.
        source: io::Error,
    },
}
