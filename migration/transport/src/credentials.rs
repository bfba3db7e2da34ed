//! Who a process is and whom it believes: a folder with three files in PEM.
//!
//! - `ca.pem`: the authorities whose word counts, about either end.
//! - `cert.pem`: this process's certificate, and those between it and an authority.
//! - `key.pem`: its private key.
//!
//! A source believes a destination whose certificate an authority of ca.pem has signed and which is valid for the host of the
//! address: the name or address as the user wrote it, [`LOCAL_NAME`] where there is none (`unix:`, `fd:`). A destination believes
//! a source whose certificate an authority has signed, whatever its names: it cannot know where a guest comes from, so ca.pem is
//! to hold authorities that sign for nobody but those who may send one.
//!
//! Only TLS 1.3 is spoken. Nothing of a session is resumed: each link shows both certificates again, so that one that has
//! expired is refused from then on.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::client::{Resumption, WebPkiServerVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};

use crate::Error;

/// The name that the certificate of a destination must be valid for where its address names no host.
pub const LOCAL_NAME: &str = "localhost";

/// Of each file; many authorities fit.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// What a process shows its peers, and what it wants to see of them.
pub struct Credentials {
    folder: PathBuf,
    client: Arc<ClientConfig>,
    server: Arc<ServerConfig>,
}

impl Credentials {
    /// Reads ca.pem, cert.pem and key.pem in `folder`.
    ///
    /// # Errors
    /// The first file that is missing, readable for everybody though it is the key, or does not hold what it should.
    pub fn load(folder: &Path) -> Result<Self, Error> {
        let provider = Arc::new(provider());
        let (authorities, certificate, key) =
            (folder.join("ca.pem"), folder.join("cert.pem"), folder.join("key.pem"));
        let mut roots = RootCertStore::empty();
        for authority in certificates(&authorities)? {
            roots.add(authority).map_err(|error| unusable(&authorities, error))?;
        }
        let roots = Arc::new(roots);
        let chain = certificates(&certificate)?;
        let private_key = private_key(&key)?;

        let versions = &[&rustls::version::TLS13];
        let verifier = WebPkiServerVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
            .build()
            .map_err(|error| unusable(&authorities, error))?;
        let mut client = ClientConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(versions)
            .map_err(|error| unusable(folder, error))?
            .with_webpki_verifier(verifier)
            .with_client_auth_cert(chain.clone(), private_key.clone_key())
            .map_err(|error| mismatch(&certificate, &key, error))?;
        client.resumption = Resumption::disabled();

        let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider))
            .build()
            .map_err(|error| unusable(&authorities, error))?;
        let mut server = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(versions)
            .map_err(|error| unusable(folder, error))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain, private_key)
            .map_err(|error| mismatch(&certificate, &key, error))?;
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        Ok(Self { folder: folder.to_owned(), client: Arc::new(client), server: Arc::new(server) })
    }

    /// The side that connects to `peer`, which has to be `host`.
    pub(crate) fn client(&self, host: &str, peer: &str) -> Result<rustls::Connection, Error> {
        let tls = |reason: String| Error::Tls { peer: peer.to_owned(), reason };
        let name = ServerName::try_from(host.to_owned())
            .map_err(|_| tls(format!("no certificate can be valid for {host:?}")))?;
        let connection = ClientConnection::new(Arc::clone(&self.client), name);
        Ok(connection.map_err(|error| tls(error.to_string()))?.into())
    }

    /// The side to which `peer` has connected.
    pub(crate) fn server(&self, peer: &str) -> Result<rustls::Connection, Error> {
        let tls = |error: rustls::Error| Error::Tls { peer: peer.to_owned(), reason: error.to_string() };
        Ok(ServerConnection::new(Arc::clone(&self.server)).map_err(tls)?.into())
    }
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Credentials").field("folder", &self.folder).finish_non_exhaustive()
    }
}

/// AES with 128 bits first: it is the fastest of the three where the processor knows AES, and as good.
fn provider() -> CryptoProvider {
    let cipher_suites = vec![
        ring::cipher_suite::TLS13_AES_128_GCM_SHA256,
        ring::cipher_suite::TLS13_AES_256_GCM_SHA384,
        ring::cipher_suite::TLS13_CHACHA20_POLY1305_SHA256,
    ];
    CryptoProvider { cipher_suites, ..ring::default_provider() }
}

fn certificates(path: &Path) -> Result<Vec<CertificateDer<'static>>, Error> {
    let text = read(path, |_| Ok(()))?;
    let found = CertificateDer::pem_slice_iter(&text).collect::<Result<Vec<_>, _>>();
    match found {
        Ok(certificates) if certificates.is_empty() => Err(unusable(path, "there is no certificate in it")),
        Ok(certificates) => Ok(certificates),
        Err(error) => Err(unusable(path, error)),
    }
}

fn private_key(path: &Path) -> Result<PrivateKeyDer<'static>, Error> {
    let text = read(path, |mode| match mode {
        mode if mode & 0o007 != 0 => {
            Err(unusable(path, format!("everybody can use it (mode {mode:04o}): chmod 600 makes it yours")))
        }
        mode => {
            if mode & 0o070 != 0 {
                log::warn!("{}: others of your group can use this key (mode {mode:04o})", path.display());
            }
            Ok(())
        }
    })?;
    PrivateKeyDer::from_pem_slice(&text).map_err(|error| match error {
        pem::Error::NoItemsFound => unusable(path, "there is no private key in it"),
        error => unusable(path, error),
    })
}

/// The contents of a file whose permissions `check` likes.
fn read(path: &Path, check: impl FnOnce(u32) -> Result<(), Error>) -> Result<Vec<u8>, Error> {
    let failed = |error: io::Error| unusable(path, error);
    let file = File::open(path).map_err(failed)?;
    check(file.metadata().map_err(failed)?.mode() & 0o777)?;
    let mut text = Vec::new();
    file.take(FILE_BYTES_MAX + 1).read_to_end(&mut text).map_err(failed)?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(unusable(path, format!("it has more than {FILE_BYTES_MAX} bytes")));
    }
    Ok(text)
}

fn unusable(path: &Path, reason: impl ToString) -> Error {
    Error::Credentials { path: path.to_owned(), reason: reason.to_string() }
}

/// What is wrong with certificate and key, of which one may be alright.
fn mismatch(certificate: &Path, key: &Path, error: rustls::Error) -> Error {
    match error {
        rustls::Error::InconsistentKeys(_) => {
            unusable(key, format!("it is not the key of {}", certificate.display()))
        }
        rustls::Error::InvalidCertificate(_) => unusable(certificate, error),
        error => unusable(key, error),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    use certificates::{Authority, Validity};

    use super::*;

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let fill = || Authority::new("a").fill(folder.path(), &["localhost"], Validity::Valid);
        let path = |name: &str| folder.path().join(name);
        let write = |name: &str, text: &[u8]| {
            fs::write(path(name), text).unwrap();
            fs::set_permissions(path(name), Permissions::from_mode(0o600)).unwrap();
        };
        let error = || Credentials::load(folder.path()).unwrap_err().to_string();
        fill();
        Credentials::load(folder.path()).unwrap();
        for name in ["ca.pem", "cert.pem", "key.pem"] {
            fs::remove_file(path(name)).unwrap();
            let reason = format!("{name}: No such file");
            assert!(error().contains(&reason), "{}", error());
            write(name, b"# nothing");
            assert!(error().contains(&format!("{name}: there is no ")), "{}", error());
            write(name, &vec![b'\n'; (FILE_BYTES_MAX + 1) as usize]);
            assert!(error().contains("it has more than 1048576 bytes"), "{}", error());
            write(name, b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n");
            assert!(error().contains(name), "{}", error());
            fill();
        }
        let other = tempfile::tempdir().unwrap();
        Authority::new("b").fill(other.path(), &["localhost"], Validity::Valid);
        fs::copy(other.path().join("key.pem"), path("key.pem")).unwrap();
        assert!(error().contains("key.pem: it is not the key of "), "{}", error());
        fill();
        fs::set_permissions(path("key.pem"), Permissions::from_mode(0o604)).unwrap();
        assert!(error().contains("everybody can use it (mode 0604)"), "{}", error());
        fs::set_permissions(path("key.pem"), Permissions::from_mode(0o640)).unwrap();
        Credentials::load(folder.path()).unwrap();
    }
}
