//! How a link is protected, and where it may lead.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use crate::given::Given;
use crate::{Connection, Credentials, Error, Uri};

/// What protects a link.
#[derive(Clone, Debug, Default)]
pub enum Security {
    /// The kernel: bytes go as they are, and never leave this host.
    #[default]
    ThisHost,
    /// Nothing: bytes go as they are, and TCP goes wherever it leads, since the user said so.
    Insecure,
    /// TLS 1.3, on which both ends prove who they are, whatever carries it.
    Tls(Arc<Credentials>),
}

/// Where a peer is and what protects the link with it.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Where.
    pub uri: Uri,
    /// How.
    pub security: Security,
}

impl Endpoint {
    /// Connects, as [`Uri::connect`] does, and proves who both ends are where that is asked for. All of it ends after `timeout`,
    /// or twice that.
    ///
    /// # Errors
    /// As there; with TLS also what is wrong with the certificate of the peer, which has to be valid for the host of the address.
    /// Whether the peer likes ours shows when the first bytes are read.
    pub fn connect(&self, timeout: Duration) -> Result<Connection, Error> {
        let Self { uri, security } = self;
        let connection = uri.connect_beyond(security.goes_beyond(), timeout)?;
        security.warn(uri);
        self.secure(connection, timeout)
    }

    /// The same over a connected socket that this process was given.
    ///
    /// # Errors
    /// It is none, or as [`connect`](Self::connect).
    pub fn connect_over(&self, descriptor: OwnedFd, timeout: Duration) -> Result<Connection, Error> {
        let mut connection = Given::new(descriptor, &self.uri, &self.security)?.connection(&self.uri)?;
        connection.lives();
        self.secure(connection, timeout)
    }

    fn secure(&self, connection: Connection, timeout: Duration) -> Result<Connection, Error> {
        let Security::Tls(credentials) = &self.security else { return Ok(connection) };
        let mut connection = connection.with_tls(|peer| credentials.client(self.uri.host(), peer))?;
        connection.establish(timeout)?;
        Ok(connection)
    }
}

impl Security {
    /// As flags say it: a folder with credentials, or that the user wants none, or neither.
    ///
    /// # Errors
    /// Both, or the credentials cannot be used.
    pub fn chosen(tls_dir: Option<&Path>, insecure: bool) -> Result<Self, Error> {
        match (tls_dir, insecure) {
            (None, false) => Ok(Self::ThisHost),
            (None, true) => Ok(Self::Insecure),
            (Some(folder), false) => Ok(Self::Tls(Arc::new(Credentials::load(folder)?))),
            (Some(folder), true) => Err(Error::Credentials {
                path: folder.to_owned(),
                reason: "a link is either secure by them or insecure, not both".to_owned(),
            }),
        }
    }

    /// Whether other hosts may be at the other end.
    pub(crate) fn goes_beyond(&self) -> bool {
        !matches!(self, Self::ThisHost)
    }

    /// Says what it means that a link leads to another host without protection.
    pub(crate) fn warn(&self, uri: &Uri) {
        if matches!(self, Self::Insecure) && uri.leaves_this_host() {
            self.warn_beyond(uri);
        }
    }

    /// The same where it is known that it does.
    pub(crate) fn warn_beyond(&self, uri: &Uri) {
        if matches!(self, Self::Insecure) {
            log::warn!(
                "{uri} is not secure: whoever is on the network can read and change the guest, or send another one"
            );
        }
    }
}
