//! Byte links between two processes, and the names by which a user chooses one.
//!
//! A [`Uri`] says where the peer (or a file) is, [`Security`] what protects the way there; both are an [`Endpoint`]. It and
//! [`Listener`] make a [`Connection`]: a full-duplex byte stream whose reads and writes are bounded in time, that another thread
//! can shut down, and that knows how to name its peer in an error. What the bytes mean is the business of crates `stream` and
//! `engine`, which write one message with one `write_all`.
//!
//! Invariants: plain TCP leaves this host never, unless the user says so in so many words ([`Security::Insecure`]); with TLS no
//! byte passes before both ends have proven who they are ([`Credentials`] say how), and a peer that has not holds nobody but the
//! thread that hears it, for as long as a handshake may take; a listening Unix socket is reachable by its owner only, from its
//! first instant, and its file goes away with the [`Listener`]; a socket file of a dead process is replaced, one of a living
//! process never.
//!
//! Over a Unix socket descriptors can go along with bytes ([`Connection::write_with`], [`Connection::read_with`]); whoever reads does so
//! with a bound, or gets none.
//!
//! [`Connection::pair`] gives both ends of a link inside one process, and [`faulty`] damages a link at a chosen
//! message, for tests of the layers above.
//!
//! A socket may also come from outside (`fd:`): [`inherit`] takes over what whoever started this process left open, and both
//! [`Endpoint`] and [`Listener`] take sockets that are there already.
//!
//! [`Connection::send_memory`] and [`Connection::receive_memory`] move the memory of a running guest without a copy in this
//! process, over links that take bytes as they are; over TLS they are copied.
//!
//! Absent: `MSG_ZEROCOPY`, descriptors that go along with TLS, lists of revoked certificates (a short validity
//! does their work). A file is only named here: reading and writing it is the engine's business.
#![deny(unsafe_code)]

mod connection;
mod credentials;
mod descriptors;
mod error;
pub mod faulty;
#[allow(unsafe_code, reason = "a number becomes a descriptor that has an owner")]
mod given;
mod listener;
mod memory;
mod private_socket;
mod security;
mod tls;
mod tls_cause;
mod uri;

pub use connection::{Connection, Link};
pub use credentials::{Credentials, LOCAL_NAME};
pub use descriptors::{DESCRIPTORS_MAX, Received, read_with, write_with};
pub use error::Error;
pub use given::inherit;
pub use listener::Listener;
pub use private_socket::PrivateSocket;
pub use security::{Endpoint, Security};
pub use tls::Identity;
pub use uri::{Layout, Uri};
